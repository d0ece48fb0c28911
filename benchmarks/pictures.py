"""How many pictures per second are read and transformed, and whether the worker processes keep their cores busy.

    python -m benchmarks.pictures                      1,000 made-up JPEGs of 500 to 1,000 pixels, a minute
    python -m benchmarks.pictures --images DIR         pictures of your own
    python -m benchmarks.pictures --quick              a few, to see that everything works

The transform is the usual one: shorter side to 256, the middle 224 x 224 of it, uint8. Speed is taken when all workers
are at work; "cores" is the processor time of all processes over the wall-clock seconds of the whole run.
Each line is the fastest of three runs.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from dataset_prep.pictures.decode import PictureError, decode_many

SIZE, SHORTER = 224, 256


def resize_and_crop(image: Image.Image) -> np.ndarray:
    """[224, 224, 3] uint8."""
    scale = SHORTER / min(image.size)
    width, height = (max(SHORTER, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - SIZE) // 2, (height - SIZE) // 2
    return np.asarray(image.crop((left, top, left + SIZE, top + SIZE)))


def make_pictures(folder: Path, n: int) -> list[Path]:
    """JPEGs with smooth colours and some noise, about as large as photographs of products."""
    generator = np.random.default_rng(2020)
    paths = []
    for number in range(n):
        width, height = generator.integers(500, 1001, size=2)
        coarse = Image.fromarray(generator.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
        noise = generator.integers(-6, 7, (height, width, 1), dtype=np.int16)
        paths.append(folder / f"{number}.jpg")
        Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8)).save(paths[-1], quality=85)
    return paths


def measure(paths: list[Path], workers: int) -> tuple[float, float, int]:
    """Pictures per second once all workers are at work, processor seconds per wall-clock second of the whole run, and
    how many pictures could not be used.
    """
    n_first, n_bad = min(32 * workers, len(paths) // 2), 0
    start, processor = time.perf_counter(), _processor_seconds()
    at_work = start
    for n, answer in enumerate(decode_many(paths, resize_and_crop, workers=workers), start=1):
        n_bad += isinstance(answer, PictureError)
        at_work = time.perf_counter() if n == n_first else at_work
        end = time.perf_counter()
    whole = time.perf_counter() - start  # with the end of the workers, whose processor time is known only then
    return (len(paths) - n_first) / (end - at_work), (_processor_seconds() - processor) / whole, n_bad


def _processor_seconds() -> float:
    uses = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in uses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, metavar="DIR", help="pictures of your own, in folders below DIR too")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--quick", action="store_true", help="20 pictures, one run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.images:
            paths = sorted(path for path in options.images.rglob("*") if path.is_file())
        else:
            paths = make_pictures(Path(folder), 20 if options.quick else 1000)
        n_bytes = sum(path.stat().st_size for path in paths)
        print(f"{len(paths)} pictures, {n_bytes / 1e6:.1f} MB, {len(os.sched_getaffinity(0))} cores")
        print("workers  pictures/s  cores  unusable")
        for workers in options.workers:
            runs = [measure(paths, workers) for _ in range(1 if options.quick else 3)]
            speed, cores, n_bad = max(runs)
            print(f"{workers:7}  {speed:10.1f}  {cores:5.2f}  {n_bad:8}")


if __name__ == "__main__":
    main()
