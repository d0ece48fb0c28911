"""What several processes gain for MMSBR, whose items cost more than its batches, and what they hold of mapped features.

    python -m benchmarks.processes                     2 processes, 2,000 and 8,614 items, some minutes on idle cores
    python -m benchmarks.processes --quick             a toy, to see that everything works
    python -m benchmarks.processes --processes 4 --items 20000

Every process has one thread, also the one that is alone. With dropout off, the losses of the first steps of the same
batches are compared, and the run ends where they differ. Then steps are timed: of one process; of several, each of
which makes all item vectors (``share_items: false``); of several that share them (``share_items: true``). These are
medians of wall-clock seconds, so all processes need a core of their own; on a busy machine the processor seconds of a
process tell more, and stand beside them.

Memory: the processes map one file of features and read all of it. Linux says how much of what a process holds is its
own, and how much of the file is.
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.calibration import calibrate
from benchmarks.clocks import memory_mib, total
from benchmarks.mmsbr_models import batches_of, build_clean, sessions
from benchmarks.results import write_json
from recbole_mm import distributed
from recbole_mm.model.layers import FeatureRows
from recbole_mm.shared_training import SharedTraining, mean_of_losses

NO_DROPOUT = dict.fromkeys(("feature_dropout", "pivot_dropout", "fusion_dropout", "price_dropout"), 0.0)
SAME = 1e-5  # relative, of losses in float32 after some steps
QUICK = {"items": [200], "batch": 32, "steps": 2, "features_mib": 8}


# ---------------------------------------------------------------- training


def train(n_items: int, batch_size: int, n_steps: int, *, share_items: bool, dropout: bool) -> dict[str, Any]:
    """Of some steps, after one for warming up: losses, wall-clock seconds and processor seconds of each.

    Alone, or as one of the processes of a group.
    """
    torch.set_num_threads(1)
    distributed.join()
    model = build_clean(n_items, share_items=share_items, **({} if dropout else NO_DROPOUT)).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    n_rows = (n_steps + 1) * batch_size
    data = sessions(n_rows, n_items, np.random.default_rng(0))
    loss_of, rows = model.calculate_loss, slice(None)
    if distributed.n_processes() > 1:
        loader = SimpleNamespace(sample_size=n_rows, batch_size=batch_size, collate_fn=None)
        shared = SharedTraining(model, optimizer, loader, torch.device("cpu"))
        shared.begin_epoch()
        loss_of, rows = shared.loss, slice(distributed.rank(), None, distributed.n_processes())
    losses, wall, processor = [], [], []
    for batch in batches_of(data, batch_size):
        clocks = time.perf_counter(), time.process_time()
        optimizer.zero_grad()
        loss = total(loss_of({key: values[rows] for key, values in batch.items()}))
        loss.backward()
        optimizer.step()
        wall.append(time.perf_counter() - clocks[0])
        processor.append(time.process_time() - clocks[1])
        losses.append(mean_of_losses(loss.item()))
    most = max(distributed.gathered(memory_mib("VmHWM")))
    return {"losses": losses, "wall": wall[1:], "processor": processor[1:], "peak_mib": most}


def launched(function: str, n_processes: int, **arguments: Any) -> dict[str, Any]:
    """What a function of this module returns in the first of some new processes."""
    by_name = importlib.import_module("benchmarks.processes")  # where they find it; this module may be __main__
    return distributed.launch(getattr(by_name, function), n_processes, arguments=arguments)


def check_equality(ways: dict, n_items: int, batch_size: int) -> float:
    """The largest relative difference of the losses of three steps; ends the program where it is not rounding."""
    arguments = {"n_items": n_items, "batch_size": batch_size, "n_steps": 2, "dropout": False}
    expected, *others = (np.array(way(**arguments)["losses"]) for way in ways.values())
    found = max(float(abs(losses / expected - 1).max()) for losses in others)
    print(f"largest relative difference of losses, no dropout, {n_items:,} items: {found:.0e}, tolerance {SAME:.0e}")
    if not found <= SAME:
        raise SystemExit("NOT EQUAL: nothing else is measured")
    return found


def training(n_processes: int, items: Sequence[int], batch_size: int, n_steps: int) -> dict[str, Any]:
    ways = {
        "one process": partial(launched, "train", 1, share_items=False),
        f"{n_processes} processes, all items each": partial(launched, "train", n_processes, share_items=False),
        f"{n_processes} processes, items shared": partial(launched, "train", n_processes, share_items=True),
    }
    results: dict[str, Any] = {"difference": check_equality(ways, min(items), batch_size)}
    for n_items in items:
        print(f"\nMMSBR, {n_items:,} items, batch {batch_size}, one thread each")
        print(f"  {'':34s}{'s per step':>12s}{'CPU s of one':>14s}{'peak MiB':>10s}{'times as fast':>15s}")
        alone = None
        for name, way in ways.items():
            found = way(n_items=n_items, batch_size=batch_size, n_steps=n_steps, dropout=True)
            wall, processor = statistics.median(found["wall"]), statistics.median(found["processor"])
            alone = alone or (wall, processor)
            ratio = f"{alone[0] / wall:.2f} ({alone[1] / processor:.2f})"
            print(f"  {name:34s}{wall:12.3f}{processor:14.3f}{found['peak_mib']:10.0f}{ratio:>15s}", flush=True)
            results[f"{n_items} items, {name}"] = found
    print(
        "in brackets: by processor seconds of one process, which is what a machine with idle cores would come near to"
    )
    return results


# ---------------------------------------------------------------- memory


def read_mapped(path: str) -> dict[str, float]:
    """MiB of this process, while features of a mapped file are in use, all of them read."""
    distributed.join()
    rows = torch.from_numpy(np.load(path, mmap_mode="r+"))
    n_rows, before = len(rows), held("Private_Clean", "Private_Dirty")
    counts = torch.ones(n_rows, dtype=torch.long)
    features = FeatureRows(rows, torch.arange(n_rows), counts, torch.zeros(rows.shape[1]), scale="none")
    for start in range(0, n_rows, 4096):
        features.rows[start : start + 4096].sum()
    distributed.barrier()  # all have read all
    found = {"own, before": before, "own": held("Private_Clean", "Private_Dirty")}
    found |= {"of the file": held("Rss", mapping=path), "of the file, own": held("Private_Dirty", mapping=path)}
    every = distributed.gathered(found)
    return {key: max(each[key] for each in every) for key in found}


def held(*entries: str, mapping: str | None = None) -> float:
    """MiB, as Linux counts them for this process or for one file that it maps."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    kib, counts = 0, mapping is None
    for line in lines:
        name, _, value = line.partition(":")
        if "-" in name.split(" ")[0]:  # the head of a mapping
            counts = mapping is None or line.endswith(os.path.realpath(mapping))
        elif counts and name in entries:
            kib += int(value.split()[0])
    return kib / 1024


def memory(n_processes: int, features_mib: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "rows.npy")
        np.save(path, np.random.default_rng(0).random((features_mib * 1024, 256), dtype=np.float32))
        found = launched("read_mapped", n_processes, path=path)
    print(
        f"\n{n_processes} processes that map and read one file of {features_mib} MiB, the most that one of them holds"
    )
    for name, mib in found.items():
        print(f"  {name:20s}{mib:10.1f} MiB")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--items", type=int, nargs="+", default=[2000, 8614])
    parser.add_argument("--batch", type=int, default=512, help="sessions per step, of all processes together")
    parser.add_argument("--steps", type=int, default=5, help="that are timed")
    parser.add_argument("--features-mib", type=int, default=512, help="size of the file that is mapped")
    parser.add_argument("--quick", action="store_true", help="a toy")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    args = parser.parse_args()
    if args.quick:
        vars(args).update(QUICK)
    torch.set_num_threads(1)
    calibration = calibrate()
    print(calibration)
    results = training(args.processes, args.items, args.batch, args.steps)
    results["memory"] = memory(args.processes, args.features_mib)
    if args.json:
        write_json(args.json, results, calibration, processes=args.processes, batch=args.batch)


if __name__ == "__main__":
    main()
