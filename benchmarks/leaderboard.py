"""How long it takes to read many records of runs and to write all views of them.

    python -m benchmarks.leaderboard                 10,000 runs
    python -m benchmarks.leaderboard --quick         a tenth of them, to see that everything works
    python -m benchmarks.leaderboard --keep FOLDER   leave the made-up runs and the views there

The runs are made up: datasets with 1,000 test rows each, ten models and four floors, three seeds, several settings of
each model, two knock-outs of each multimodal one, curves of 30 epochs, slices, and every twentieth run failed. Each run
that is done has its file of single test rows with twelve metrics. What is measured is ``python -m
recbole_mm.leaderboard`` in a process of its own: wall-clock seconds from its start to its end, with the page, its CPU
seconds, which other work on the machine changes less, and its highest resident size. The process is held to two cores
where the system allows it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

from recbole_mm.records import PER_USER, PerUser, RunRecord, per_user_file, settings_hash, write_per_user

N_RUNS, QUICK = 10_000, 10
N_CORES, TARGET_SECONDS = 2, 20
CUT_OFFS = (5, 10, 20, 50)
N_EPOCHS = 30
MODALITIES = ("text:noise", "image:noise")
MODELS = {  # name: how good it is, what it owes to its text and to its pictures
    "MSM4SR": (0.50, 0.25, 0.01), "MMSBR": (0.45, 0.15, 0.10), "UniSRec": (0.46, 0.30, 0.0), "SASRec": (0.40, 0, 0),
    "SRGNN": (0.38, 0, 0), "GRU4Rec": (0.39, 0, 0), "NARM": (0.40, 0, 0), "STAMP": (0.35, 0, 0), "CORE": (0.42, 0, 0),
    "FDSA": (0.41, 0.05, 0),
}  # fmt: skip
FLOORS = {
    "Popularity": (0.05, None),
    "Transitions": (0.33, None),
    "ContentKNN": (0.28, "text"),
    "SessionItemKNN": (0.3, None),
}


class Maker:
    """Makes up runs on one dataset."""

    def __init__(self, folder: Path, dataset: str, *, n_test: int, seed: int) -> None:
        self.folder, self.dataset, self.n_test = folder, dataset, n_test
        self.random = np.random.default_rng(seed)
        self.user = np.array([f"u{number}" for number in range(n_test)])
        self.target = np.array([f"i{number}" for number in self.random.integers(500, size=n_test)])
        self.hard = self.random.random(n_test)  # how hard each row is, for all models
        self.lines: list[str] = []

    def run(
        self,
        model: str,
        quality: float,
        *,
        seed: int,
        knockout: str | None = None,
        learning_rate: float = 1e-3,
        feature: str | None = None,
        fails: bool = False,
    ) -> None:
        """Add a run of this quality, 0 to 1."""
        number = len(self.lines)
        run_id = digits(f"{self.dataset} {number}")
        given = {"learning_rate": learning_rate} | ({"feature": feature} if feature else {})
        settings = {
            **given, "epochs": 200, "pretrain_epochs": N_EPOCHS, "valid_metric": "Recall@20", "seed": seed,
            "knockout": knockout, "metric_decimal_place": 6, "topk": list(CUT_OFFS), "hidden_size": 64,
        }  # fmt: skip
        given |= {"knockout": knockout} if knockout else {}
        values, per_user, slices = {}, "", {}
        if not fails:
            rank = 1 + np.floor(500 * (0.7 * self.hard + 0.3 * self.random.random(self.n_test)) ** (1 + 4 * quality))
            rows = rows_of(rank)
            values = {metric: float(v.mean()) for metric, v in rows.items()}
            file = per_user_file(self.folder / "runs.jsonl", run_id)
            write_per_user(file, PerUser(self.user, self.target, rank, rows))
            per_user = f"{PER_USER}/{file.name}"
            slices = slices_of(rows)
        stage = {
            "stage": "train", "seconds": 40.0 + 10 * quality, "epochs": N_EPOCHS, "best_epoch": N_EPOCHS - 11,
            "valid": values, "checkpoint": "saved/x.pth",
            "curve": [
                {"epoch": e, "train_loss": 6 * 0.9**e + 1, "valid": quality * (1 - 0.8**e)} for e in range(N_EPOCHS)
            ],
        }  # fmt: skip
        multimodal = MODELS.get(model, (0, 0, 0))[1] > 0
        record = RunRecord(
            model=model,
            dataset=self.dataset,
            data_fingerprint=digits(self.dataset),
            features={"text": "46b1d346f9e4", "image": "c0a1ebf6c20d"} if multimodal else {},
            settings=settings,
            seed=seed,
            best_epoch=N_EPOCHS - 11,
            valid={metric: value * 1.05 for metric, value in values.items()},
            test=values,
            stages=[] if fails else [stage],
            seconds={"data": 1.2, "train": stage["seconds"], "test": 0.8},
            peak_memory={"resident": int(7e8 + 1e8 * quality)},
            versions={
                "recbole": "1.2.1",
                "torch": "2.13.0",
                "numpy": "1.26.4",
                "pandas": "2.3.3",
                "recbole_mm": "0.1.0",
            },
            checkpoint="saved/x.pth",
            started="2026-01-01T12:00:00+0000",
            run_id=run_id,
            status="failed" if fails else "done",
            error="TrainingError: the loss is nan in epoch 3; try a lower learning_rate" if fails else "",
            protocol="leave-one-out",
            test_fingerprint="0123456789abcdef",
            n_test=self.n_test,
            n_items=500,
            settings_given=given,
            settings_hash=settings_hash(model, settings),
            n_parameters=int(1e6 * quality) if model in MODELS else 0,
            latency={"batch_ms_per_user": 0.02 + 0.1 * quality, "single_ms": 1 + quality},
            slices=slices,
            per_user=per_user,
            warnings=[],
            command=f"python run_recbole_mm.py --model={model} --dataset={self.dataset} --seed={seed}"
            + "".join(f" --{key}={value}" for key, value in given.items()),
        )
        self.lines.append(json.dumps(asdict(record)))


def digits(text: str) -> str:
    """12 hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def rows_of(rank: np.ndarray) -> dict[str, np.ndarray]:
    """Values of each test row, by metric."""
    gains = {"recall": np.ones_like(rank), "ndcg": 1 / np.log2(rank + 1), "mrr": 1 / rank}
    return {f"{name}@{k}": np.where(rank <= k, gain, 0.0) for name, gain in gains.items() for k in CUT_OFFS}


def slices_of(rows: dict[str, np.ndarray]) -> dict[str, dict[str, dict[str, float]]]:
    bands = {
        "popularity": ("head", "mid", "tail", "cold"),
        "history": ("1-2", "3-5", "6-10"),
        "coverage": ("all", "some"),
    }
    parts = {name: np.arange(len(rows["mrr@5"])) % len(labels) for name, labels in bands.items()}
    return {
        name: {
            label: {"n": int((parts[name] == number).sum())}
            | {metric: float(values[parts[name] == number].mean()) for metric, values in rows.items()}
            for number, label in enumerate(labels)
        }
        for name, labels in bands.items()
    }


def make_dataset(
    folder: Path, dataset: str, *, seed: int, n_test: int = 1000, n_settings: int = 3, n_runs: int | None = None
) -> list[str]:
    """At most ``n_runs`` lines of runs on one dataset: models, their settings and knock-outs, floors."""
    maker = Maker(folder, dataset, n_test=n_test, seed=seed)
    seeds = (2020, 2021, 2022)
    for one in seeds:
        for model, (quality, _, _) in MODELS.items():
            for setting in range(n_settings):
                fails = len(maker.lines) % 20 == 19
                maker.run(model, quality - 0.04 * setting, seed=one, learning_rate=1e-3 / 3**setting, fails=fails)
        for model, (quality, *owes) in MODELS.items():
            for knockout, loss in zip(MODALITIES, owes, strict=True):
                if owes[0]:
                    maker.run(model, quality - loss, seed=one, knockout=knockout)
        for model, (quality, feature) in FLOORS.items():
            maker.run(model, quality, seed=one, feature=feature)
        maker.run("ContentKNN", 0.1, seed=one, feature="image")
    return maker.lines[:n_runs]


def measure(folder: Path) -> dict[str, float]:
    """Seconds and GiB of the command, in a process of its own."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:N_CORES])
    command = [
        sys.executable,
        "-m",
        "recbole_mm.leaderboard",
        str(folder / "runs.jsonl"),
        "--out",
        str(folder / "views"),
    ]
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    unit = 1 if sys.platform == "darwin" else 1 << 10  # bytes of ru_maxrss
    return {"seconds": seconds, "CPU": used.ru_utime + used.ru_stime, "GiB": used.ru_maxrss * unit / 2**30}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the runs")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where runs and views are left")
    options = parser.parse_args()
    n_runs = N_RUNS // (QUICK if options.quick else 1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        lines: list[str] = []
        while len(lines) < n_runs:
            lines += make_dataset(folder, f"shop{len(lines):05d}", seed=len(lines), n_runs=n_runs - len(lines))
            print(f"\rmaking up runs: {len(lines):,} of {n_runs:,}", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        (folder / "runs.jsonl").write_text("\n".join(lines) + "\n")
        found = measure(folder)
        views = sorted((folder / "views").rglob("*"))
        size = sum(file.stat().st_size for file in views) / 2**20
    print(f"{n_runs:,} records read, {len(views)} files of {size:.0f} MiB written")
    print(f"all       {found['seconds']:6.1f} s   (target: under {TARGET_SECONDS} s for {N_RUNS:,})")
    print(f"CPU       {found['CPU']:6.1f} s")
    print(f"memory    {found['GiB']:6.2f} GiB at most")


if __name__ == "__main__":
    main()
