"""Records of made-up runs, written as lines of a file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from recbole_mm.records import PerUser, RunRecord, per_user_file, settings_hash, write_per_user

N_TEST = 60


def record(model: str, seed: int = 1, recall: float = 0.5, **changes) -> RunRecord:
    """A run that is done; ``settings`` and other fields by name."""
    knockout = changes.pop("knockout", None)
    settings = {"valid_metric": "Recall@10", "epochs": 50, "seed": seed, "knockout": knockout}
    settings |= changes.pop("settings", {})
    named = repr((model, seed, settings, changes))
    run_id = changes.pop("run_id", hashlib.sha256(named.encode()).hexdigest()[:12])
    stage = {"stage": "train", "seconds": 20.0, "epochs": 10, "best_epoch": 4, "valid": {}, "checkpoint": "saved/x.pth"}
    stage["curve"] = [{"epoch": 0, "train_loss": 1.5, "valid": 0.1}]
    values = {"recall@10": recall, "ndcg@10": recall / 2}
    fields = {
        "model": model, "dataset": "shop", "data_fingerprint": "data", "features": {}, "settings": settings,
        "seed": seed, "best_epoch": 4, "valid": values, "test": values, "stages": [stage],
        "seconds": {"train": 20.0}, "peak_memory": {"resident": 2**30}, "versions": {"torch": "2"}, "checkpoint": "x",
        "started": "2026-01-01T00:00:00", "run_id": run_id, "protocol": "leave-one-out", "test_fingerprint": "rows",
        "n_test": N_TEST, "n_items": 100, "settings_given": {}, "settings_hash": settings_hash(model, settings),
        "n_parameters": 1000, "latency": {"batch_ms_per_user": 0.5, "single_ms": 2.0},
        "command": f"python run_recbole_mm.py --model={model} --dataset=shop --seed={seed}",
    }  # fmt: skip
    return RunRecord(**{**fields, **changes})


def failed(model: str, seed: int = 1, **changes) -> RunRecord:
    empty = {"valid": {}, "test": {}, "stages": [], "test_fingerprint": "", "error": "the loss is nan"}
    return record(model, seed, status="failed", **{**empty, **changes})


def with_rows(
    run: RunRecord, folder: Path, recall: np.ndarray | None = None, *, users: list | None = None
) -> RunRecord:
    """The same run with a file of its test rows; their mean is its result."""
    if recall is None:
        recall = (np.arange(N_TEST) < round(run.test["recall@10"] * N_TEST)).astype(float)
    values = {"recall@10": recall, "ndcg@10": recall / 2}
    user = np.array(users or [f"u{number}" for number in range(len(recall))])
    rows = PerUser(user, np.array([f"i{number}" for number in range(len(recall))]), 1 + np.arange(len(recall)), values)
    file = per_user_file(folder / "runs.jsonl", run.run_id)
    write_per_user(file, rows)
    test = {metric: float(v.mean()) for metric, v in values.items()}
    return replace(run, test=test, per_user=f"per_user/{file.name}")


def write_runs(path: Path, runs: list[RunRecord]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(asdict(run)) + "\n" for run in runs))
    return path
