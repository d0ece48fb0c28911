"""Work on parts of a CPU's data shared out among threads: a part on each of two is quicker than each product on two."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

MOST_WORKERS = 4  # more would wait for each other in the interpreter


def n_workers(device: torch.device, n_parts: int) -> int:
    """How many threads to share ``n_parts`` among: at most torch's; one on other devices, which queue their work."""
    return max(1, min(torch.get_num_threads(), MOST_WORKERS, n_parts)) if device.type == "cpu" else 1


def share_out(work: Callable[[int, int], None], n_parts: int, *, n_workers: int) -> None:
    """``work(number, worker)`` for each number below ``n_parts``, without autograd; errors are raised here.

    Workers are threads that share torch's threads evenly. Worker w gets every ``n_workers``-th number from w on, so
    that who gets which does not depend on who is quicker.
    """
    if n_workers == 1:
        with torch.no_grad():
            for number in range(n_parts):
                work(number, 0)
        return
    n_threads, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()

    def run(worker: int) -> None:
        torch.set_num_threads(n_threads // n_workers)
        # Each thread has its own modes. The order matters: inference_mode(False) switches gradients on.
        with torch.inference_mode(inference), torch.no_grad():
            for number in range(worker, n_parts, n_workers):
                work(number, worker)

    try:
        with ThreadPoolExecutor(n_workers) as executor:
            list(executor.map(run, range(n_workers)))
    finally:
        torch.set_num_threads(n_threads)
