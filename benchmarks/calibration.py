"""What the machine can do, measured in the same run as everything else: its rate of float32 matrix products.

    python -m benchmarks.calibration        the rates of this machine, in a few seconds

Each product is made some times, and its best rate counts. The machine's rate is the best of all: of squares that fit
the caches, and of long, narrow products such as the models make. A fraction of it is then never flattered by a
calibration of a bad shape.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.clocks import Clock
from benchmarks.results import write_json

SQUARES = (512, 1024, 2048)
NARROW = {  # [n, k] times [k, m]
    "items x experts, 4096 x 768 x 512": (4096, 768, 512),
    "tokens x inner, 8192 x 64 x 256": (8192, 64, 256),
    "sessions x items, 1024 x 128 x 8192": (1024, 128, 8192),
}
SECONDS_EACH = 0.15  # of repetitions of one product


@dataclass(frozen=True)
class Calibration:
    """Rates of products in GFLOP per second.

    Attributes:
        threads: of torch.
        device: "cpu", or "cuda".
        gflops: the machine's rate, the best of all products.
        products: the rate of each.
    """

    threads: int
    device: str
    gflops: float
    products: dict[str, float]

    def __str__(self) -> str:
        on = "a GPU" if self.device == "cuda" else f"{self.threads} thread{'s'[: self.threads > 1]}"
        return f"float32 matrix products at {self.gflops:.0f} GFLOP/s on {on}"

    def to_dict(self) -> dict:
        return asdict(self)

    def fraction(self, flop: float, seconds: float) -> float:
        """Of the machine's rate, reached by that many operations in that time."""
        return flop / seconds / (1e9 * self.gflops)


def calibrate(clock: Clock | None = None, *, seconds_each: float = SECONDS_EACH) -> Calibration:
    """Rate of float32 products on the clock's device and the present number of threads, in about a second."""
    clock = clock or Clock()
    device = clock.device
    shapes = {f"{size} x {size} x {size}": (size, size, size) for size in SQUARES} | NARROW
    products = {}
    for name, (n, k, m) in shapes.items():
        a, b = torch.randn(n, k, device=device), torch.randn(k, m, device=device)
        out = torch.empty(n, m, device=device)
        best, end = float("inf"), time.perf_counter() + seconds_each
        while True:
            best = min(best, clock.seconds(lambda a=a, b=b, out=out: torch.mm(a, b, out=out)))
            if time.perf_counter() > end:
                break
        products[name] = 2 * n * k * m / best / 1e9
    return Calibration(torch.get_num_threads(), device, max(products.values()), products)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    found = calibrate(Clock(args.device))
    print(found)
    for name, rate in found.products.items():
        print(f"  {name:40s}{rate:8.0f}")
    if args.json:
        write_json(args.json, {}, found)


if __name__ == "__main__":
    main()
