"""Rows and runs as plain data: short finite numbers, texts without a path of the machine."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from recbole_mm.leaderboard.rows import FLOORS, Row, average, finite
from recbole_mm.leaderboard.wording import without_paths
from recbole_mm.records import RunRecord

_DIGITS = 6


def row_data(
    row: Row, metrics: Sequence[str], tested: dict[str, dict[str, float]], bold: Mapping[str, set[str]]
) -> dict[str, Any]:
    knockout = row.kind == "knockout"
    test = {metric: _spread([run.test[metric] for run in row.runs if metric in run.test]) for metric in metrics}
    valid = list(dict.fromkeys(name for run in row.runs for name in run.valid))
    return {
        "name": row.name,
        "model": row.model,
        "kind": row.kind,
        "knockout": row.knockout,
        "of": row.of,
        "run_ids": [run.run_id for run in row.runs],
        "seeds": row.seeds,
        "n_settings": row.n_settings,
        "valid": {name: _spread([run.valid[name] for run in row.runs if name in run.valid]) for name in valid},
        "test": {
            metric: {**spread, "bold": not knockout and row.name in bold[metric]}
            for metric, spread in test.items()
            if spread["mean"] is not None
        },
        "difference": {} if knockout else tested,
        "gap": tested if knockout else {},
        "cost": _cost(row.runs),
        "budget": clean(row.runs[0].budget),
        "paper": {},
        "slices": _slices(row.runs),
        "warnings": row.warnings,
    }


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and standard deviation; one run has none."""
    if not values:
        return {"mean": None, "sd": None}
    if len({*values}) == 1:  # no deviation by rounding where all seeds gave the same
        return {"mean": short(values[0]), "sd": None if len(values) == 1 else 0.0}
    mean = average(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return {"mean": short(mean), "sd": short(math.sqrt(variance))}


def _cost(runs: Sequence[RunRecord]) -> dict[str, float | None]:
    """Means over the runs; memory is the largest of them. Resident memory is that of the whole process."""
    epochs = [sum(finite(stage.get("epochs")) or 0 for stage in run.stages) for run in runs]
    seconds = [sum(finite(stage.get("seconds")) or 0 for stage in run.stages) for run in runs]

    def mean(values: Iterable[Any]) -> float | None:
        known = [value for value in map(finite, values) if value is not None]
        return short(average(known)) if known else None

    def largest(name: str) -> int | None:
        known = [value for run in runs if (value := finite(run.peak_memory.get(name))) is not None]
        return int(max(known)) if known else None

    return {
        "parameters": 0 if runs[0].model in FLOORS else max(run.n_parameters for run in runs),
        "seconds_per_epoch": short(sum(seconds) / sum(epochs)) if sum(epochs) else None,
        "train_seconds": mean(seconds),
        "epochs": mean(epochs),
        "peak_memory": largest("resident"),
        "peak_memory_gpu": largest("gpu"),
        "latency_ms": mean(run.latency.get("batch_ms_per_user") for run in runs),
        "latency_single_ms": mean(run.latency.get("single_ms") for run in runs),
    }


def _slices(runs: Sequence[RunRecord]) -> dict[str, dict[str, dict[str, float]]]:
    """Means over the runs, by slice, band and metric."""
    collected: dict[str, dict[str, dict[str, list[float]]]] = {}
    for run in runs:
        for name, bands in run.slices.items():
            for band, values in bands.items() if isinstance(bands, dict) else ():
                for metric, value in values.items() if isinstance(values, dict) else ():
                    if (known := finite(value)) is not None:
                        collected.setdefault(name, {}).setdefault(band, {}).setdefault(metric, []).append(known)
    return {
        name: {
            band: {m: int(v[0]) if m == "n" else short(average(v)) for m, v in values.items()}
            for band, values in bands.items()
        }
        for name, bands in collected.items()
    }


def run_data(run: RunRecord) -> dict[str, Any]:
    return clean({
        "run_id": run.run_id,
        "model": run.model,
        "dataset": run.dataset,
        "protocol": run.protocol,
        "seed": run.seed,
        "knockout": run.knockout,
        "status": run.status,
        "error": run.error,
        "started": run.started,
        "settings_given": run.settings_given,
        "features": run.features,
        "data_fingerprint": run.data_fingerprint,
        "test_fingerprint": run.test_fingerprint,
        "settings_hash": run.settings_hash,
        "versions": run.versions,
        "command": run.command,
        "seconds": run.seconds,
        "peak_memory": run.peak_memory,
        "stages": [{key: value for key, value in stage.items() if key != "checkpoint"} for stage in run.stages],
        "valid": run.valid,
        "test": run.test,
        "warnings": run.warnings,
        "budget": run.budget,
        "n_parameters": run.n_parameters,
        "latency": run.latency,
    })  # fmt: skip


def clean(value: Any) -> Any:
    """Plain data without absolute paths and with short, finite numbers."""
    if isinstance(value, float):
        return short(value) if math.isfinite(value) else None
    if isinstance(value, str):
        return without_paths(value)
    if isinstance(value, dict):
        return {str(key): clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(item) for item in value]
    return value


def short(value: float) -> float:
    """Rounded to what a reader can use."""
    return float(f"{value:.{_DIGITS}g}")
