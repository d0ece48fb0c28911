"""Time and memory: one training step, one evaluation, alternately of several models, on a CPU or on a GPU."""

from __future__ import annotations

import ctypes
import importlib
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

STATUS_FILE, MEMORY_FILE = Path("/proc/self/status"), Path("/proc/meminfo")
MMAP_THRESHOLD, LARGEST_THRESHOLD = -3, 32 << 20  # glibc's number of the option, in malloc.h, and its bytes
FORGET_PEAK = Path("/proc/self/clear_refs"), "5"  # Linux: VmHWM starts again from what is resident now


# ---------------------------------------------------------------- what is timed


def total(losses) -> Tensor:
    return losses if isinstance(losses, Tensor) else sum(losses)


class Trained:
    """A model with its optimizer: one call, one step.

    Args:
        model: with RecBole's ``calculate_loss``.
        anomaly_mode: run the step under autograd's anomaly mode, which importing RecBole's models switches on.
    """

    def __init__(self, model: nn.Module, *, learning_rate: float = 1e-4, anomaly_mode: bool = False) -> None:
        self.model, self.anomaly_mode = model.train(), anomaly_mode
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=learning_rate)

    def __call__(self, batch) -> None:
        with torch.autograd.set_detect_anomaly(self.anomaly_mode):
            self.optimizer.zero_grad()
            total(self.model.calculate_loss(batch)).backward()
            self.optimizer.step()


class Evaluated:
    """Scores of all batches, one after the other, with nothing left from the last evaluation."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @torch.no_grad()
    def __call__(self, batches) -> None:
        self.model.train()
        self.model.eval()  # as after an epoch
        for batch in batches:
            self.model.full_sort_predict(batch)


# ---------------------------------------------------------------- clocks


class Clock:
    """Seconds of one call: of the wall or of all processors; on a GPU between two events.

    Args:
        device: "cpu" or "cuda".
        kind: "wall", or "processor", which other programs disturb less where torch has one thread.
    """

    def __init__(self, device: str = "cpu", kind: str = "wall") -> None:
        self.device, self.now = device, {"wall": time.perf_counter, "processor": time.process_time}[kind]

    def seconds(self, call: Callable[[], object]) -> float:
        if self.device != "cuda":
            begin = self.now()
            call()
            return self.now() - begin
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1000


def alternate(runs: Mapping[str, Callable], batches: Sequence, *, clock: Clock | None = None) -> dict[str, list[float]]:
    """Seconds of each call, A B A B; the first batch is for warming up."""
    clock, seconds = clock or Clock(), {name: [] for name in runs}
    for batch in batches:
        for name, run in runs.items():
            seconds[name].append(clock.seconds(lambda run=run, batch=batch: run(batch)))
    return {name: times[1:] for name, times in seconds.items()}


def times_as_fast(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median of the ratios of calls that alternated; of the medians where one side was called less often."""
    if len(ours) == len(theirs):
        return statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    return statistics.median(theirs) / statistics.median(ours)


# ---------------------------------------------------------------- memory


def entry_of(file: Path, entry: str) -> float:
    """MiB of an entry of one of Linux's files."""
    return int(file.read_text().split(f"{entry}:")[1].split()[0]) / 1024


def memory_mib(entry: str) -> float:
    """Linux's count for this process: VmRSS now, VmHWM at its highest. `getrusage` would include the parent's."""
    return entry_of(STATUS_FILE, entry)


class Peak:
    """The most memory since it was made, and how much of it came on top; on a GPU what torch holds there.

    In a process of its own: what a process once had, it may keep.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.restart()
        self.before = torch.cuda.memory_allocated() / 2**20 if device == "cuda" else memory_mib("VmRSS")

    def restart(self) -> None:
        """Forget the peak so far; what came on top still counts from where this was made."""
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            file, digit = FORGET_PEAK
            file.write_text(digit)

    def mib(self) -> dict[str, float]:
        peak = torch.cuda.max_memory_allocated() / 2**20 if self.device == "cuda" else memory_mib("VmHWM")
        return {"peak_mib": peak, "growth_mib": peak - self.before}


def give_back_freed_memory() -> None:
    """After `recbole_mm.allocation.keep_freed_memory`: large buffers are mapped and unmapped again, as in any program.

    The threshold is the one that glibc's own grows to; where there is no glibc, nothing happens.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, LARGEST_THRESHOLD)


def load_libraries(device: str = "cpu") -> None:
    """One step of almost nothing: what PyTorch loads when it is first needed is no time or memory of a model."""
    layer = nn.Linear(1, 1).to(device)
    optimizer = torch.optim.Adam(layer.parameters())
    nn.functional.cross_entropy(layer(torch.ones(2, 1, device=device)), layer.weight.new_zeros(2).long()).backward()
    optimizer.step()


# ---------------------------------------------------------------- processes


class Failed(Exception):  # noqa: N818
    """A process ended without an answer.

    Attributes:
        status: as of a program; the negative number of a signal.
    """

    def __init__(self, status: int, told: str) -> None:
        super().__init__(told)
        self.status = status


class Processes:
    """Processes that have imported what they need: one is kept, which every other is forked from.

    So each measurement has a process and memory of its own, without waiting seconds for imports.

    Args:
        module: it has ``answer(*arguments)``, which gives what can be pickled.
        threads: of OpenMP.
    """

    def __init__(self, module: str, *, threads: int) -> None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        self.module, self.context = module, multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([module, "benchmarks.clocks", "torch._dynamo"])

    def __call__(self, *arguments: Any) -> Any:
        """What ``answer`` gives.

        Raises:
            Failed: the process ended without; what it wrote to stderr last.
        """
        receiver, sender = self.context.Pipe(duplex=False)
        with tempfile.NamedTemporaryFile(mode="r", errors="replace") as log:
            process = self.context.Process(target=_answer, args=(sender, log.name, self.module, arguments))
            process.start()
            sender.close()
            try:
                found = receiver.recv()
            except EOFError:
                found = None
            process.join()
            if process.exitcode or found is None:
                told = [line.strip() for line in log.read().splitlines() if line.strip()]
                raise Failed(process.exitcode, told[-1] if told else f"ended with status {process.exitcode}")
        return found


def _answer(sender, log: str, module: str, arguments: Sequence) -> None:
    with open(log, "w") as out:
        for stream in (1, 2):
            os.dup2(out.fileno(), stream)
    sender.send(importlib.import_module(module).answer(*arguments))
