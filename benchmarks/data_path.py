"""From a file of interactions to batches: RecBole's copies of histories beside places in flat columns; no model.

    python -m benchmarks.data_path                                   1 million interactions, as in ml-1m; some minutes
    python -m benchmarks.data_path --interactions 20000 --users 300 --items 400 --repeats 1      a toy
    python -m benchmarks.data_path --dataset dataset/ml-100k-mm      a folder with one file of interactions

Three sides, each in processes of its own: RecBole's ``SequentialDataset`` and loaders; the same data set with places
and gathered batches, for who uses RecBole without our runs; and what our runs use, which also reads and orders in
another way. Start-up is data set, parts and loaders; an epoch is all training batches, one after the other. Times are
medians of processor seconds of one thread, memory is the highest resident size above that after the imports.

Before anything is timed, all batches of an epoch of all sides are compared, by their hashes: same columns, values,
types and order. The made-up times are apart in float32, which RecBole orders by; in a folder where they are not, our
runs order by the exact times, and only the first two sides are compared.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.calibration import calibrate
from benchmarks.clocks import Peak
from benchmarks.results import write_json

SIDES = {
    "recbole": "RecBole",
    "places": "RecBole's data set with places",
    "ours": "our runs",
}
REPOSITORY = Path(__file__).resolve().parents[1]
TARGET = 5.0
APART_IN_FLOAT32 = 1 << 24


def write_folder(folder: Path, *, n_interactions: int, n_users: int, n_items: int) -> None:
    """Interactions in random order, of users and items of whom a few have many; no two at the same time."""
    random = np.random.default_rng(0)
    users = np.minimum(random.exponential(n_users / 4, n_interactions).astype(int), n_users - 1)
    items = np.minimum(random.exponential(n_items / 5, n_interactions).astype(int), n_items - 1)
    times = random.permutation(n_interactions) * max(1, APART_IN_FLOAT32 // n_interactions)
    folder.mkdir(parents=True)
    with open(folder / f"{folder.name}.inter", "w", encoding="utf-8") as out:
        out.write("user_id:token\titem_id:token\ttimestamp:float\n")
        out.writelines(
            f"u{user}\ti{item}\t{time}\n"
            for user, item, time in zip(users.tolist(), items.tolist(), times.tolist(), strict=True)
        )


# ---------------------------------------------------------------- one side, in a process of its own


def prepared(side: str, folder: Path) -> Callable[[], tuple]:
    """What makes the loaders of a side; all imports are done and all settings read."""
    import recbole.data
    from recbole.data.dataset import SequentialDataset

    from recbole_mm.config import Config
    from recbole_mm.data.dataset import MultimodalDataset
    from recbole_mm.data.histories import IndexedDataset
    from recbole_mm.data.loading import data_preparation

    warnings.simplefilter("ignore", FutureWarning)
    config = Config("SASRec", str(folder), settings={"show_progress": False, "state": "ERROR"})
    dataset = {
        "recbole": SequentialDataset,
        "places": IndexedDataset,
        "ours": MultimodalDataset,
    }[side]
    prepare = recbole.data.data_preparation if side == "recbole" else data_preparation
    return lambda: prepare(config, dataset(config))


def digest(loader) -> str:
    """Of all batches of an epoch: names, types, shapes and bytes."""
    found = hashlib.sha256()
    for batch in loader:
        for name in sorted(batch.interaction):
            values = batch[name]
            found.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
            found.update(values.contiguous().numpy().tobytes())
    return found.hexdigest()


def measure(side: str, folder: Path, *, check: bool) -> dict:
    torch.set_num_threads(1)
    make = prepared(side, folder)
    peak, begin = Peak(), time.process_time()
    train, *_ = make()
    start_up, begin = time.process_time() - begin, time.process_time()
    if check:
        return {"digest": digest(train), "rows": len(train._dataset)}
    for _ in train:
        pass
    return {
        "start_up": start_up,
        "epoch": time.process_time() - begin,
        "memory": peak.mib()["growth_mib"],
    }


# ---------------------------------------------------------------- all sides


def compare(folder: Path, n_repeats: int, *, same_order: bool) -> dict:
    def run(side: str, *more: str) -> dict:
        command = [sys.executable, "-m", "benchmarks.data_path", "--side", side, "--dataset", str(folder), *more]
        paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(f"{SIDES[side]} failed:\n{done.stderr}")
        return json.loads(done.stdout.splitlines()[-1])

    checked = {side: run(side, "--check") for side in SIDES if same_order or side != "ours"}
    rows = checked["recbole"]["rows"]
    if len({result["digest"] for result in checked.values()}) > 1:
        raise SystemExit("NOT EQUAL: the batches of an epoch differ; nothing is timed")
    print(f"batches of an epoch are bit-equal: {', '.join(SIDES[side] for side in checked)} ({rows:,} training rows)")

    samples: dict[str, list[dict]] = {side: [] for side in SIDES}
    for _ in range(n_repeats):
        for side in SIDES:
            samples[side].append(run(side))
    results = {
        side: {key: statistics.median(each[key] for each in found) for key in found[0]}
        for side, found in samples.items()
    }
    print(f"{'':34s}{'start-up':>12s}{'epoch':>12s}{'both':>12s}{'memory':>12s}   seconds, MiB")
    theirs = _with_sum(results["recbole"])
    for side, name in SIDES.items():
        mine = _with_sum(results[side])
        print(f"{name:34s}" + "".join(f"{mine[key]:12.2f}" for key in mine))
        if side != "recbole":
            print(f"{'  times less':34s}" + "".join(f"{theirs[key] / mine[key]:12.1f}" for key in mine))
    print(f"(target: {TARGET:g} times less time and memory)")
    return {"medians": results, "samples": samples, "rows": rows}


def _with_sum(found: dict) -> dict:
    start_up, epoch = found["start_up"], found["epoch"]
    return {
        "start_up": start_up,
        "epoch": epoch,
        "both": start_up + epoch,
        "memory": found["memory"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interactions", type=int, default=1_000_000)
    parser.add_argument("--users", type=int, default=6040)
    parser.add_argument("--items", type=int, default=3700)
    parser.add_argument(
        "--dataset",
        type=Path,
        help="a folder with one file of interactions, in place of made-up ones",
    )
    parser.add_argument("--repeats", type=int, default=3, help="processes of each side")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options.side, options.dataset, check=options.check)))
        return 0
    if not 1 <= options.interactions <= APART_IN_FLOAT32:
        parser.error(f"--interactions must be 1 to {APART_IN_FLOAT32}, so that float32 tells their times apart")
    torch.set_num_threads(1)
    calibration = calibrate()
    print(calibration)
    with tempfile.TemporaryDirectory() as name:
        folder = options.dataset.resolve() if options.dataset else Path(name) / "made-up"
        if options.dataset is None:
            sizes = {
                "n_interactions": options.interactions,
                "n_users": options.users,
                "n_items": options.items,
            }
            write_folder(folder, **sizes)
            print(f"{options.interactions:,} interactions, {options.users:,} users, {options.items:,} items")
        results = compare(folder, options.repeats, same_order=options.dataset is None)
    if options.json:
        write_json(
            options.json,
            results,
            calibration,
            dataset=str(options.dataset or "made-up"),
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
