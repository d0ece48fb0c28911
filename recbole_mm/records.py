"""Records of runs: one JSON line each, appended, never rewritten.

results/runs.jsonl               one line per run
results/per_user/<run_id>.npz    rank and metric values of each test row of that run
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import zlib
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np

from recbole_mm.data.files import write_atomically
from recbole_mm.errors import DatasetError, TrainingError

RUNS_FILE = Path("results/runs.jsonl")
PER_USER = "per_user"  # folder beside the file of runs

# Settings that do not change what a run computes, or that are kept elsewhere in its record.
NOT_IDENTITY = frozenset({
    "seed", "knockout", "state", "gpu_id", "use_gpu", "device", "data_path", "show_progress", "checkpoint_dir",
    "data_fingerprint", "feature_hashes", "feature_encoders", "field_hashes", "inputs", "log_wandb", "wandb_project",
    "worker", "dataset", "model", "encoding", "benchmark_filename", "nproc", "world_size", "local_rank", "offset", "ip",
    "port", "single_spec", "share_items", "history_storage",
    "vectorised_graphs", "keep_freed_memory",
})  # fmt: skip

# Settings that came after the first records, and the values at which a run computes what it computed without them: so
# it keeps the identity that it had.
NEUTRAL = {
    "train_positions": ("last",), "amp": (None,), "compile": (False,), "fused_optimizer": (False,),
    "gather_negatives": (False,), "softmax": ("full",), "softmax_chunk": (4096,), "softmax_negatives": (4096,),
    "negative_sampling": ("popularity",), "lazy_item_embedding": (False,), "float16_features": ("convert",),
    "trim_histories": ("none", "evaluation"),
}  # fmt: skip


@dataclass(frozen=True)
class RunRecord:
    """One training with its result, or the reason why there is none.

    Attributes:
        data_fingerprint: of the interactions; results with different ones cannot be compared.
        features: sha256 of each feature that the model used, by name.
        settings: all of them, as plain data.
        best_epoch: selected on validation data, in the last stage.
        valid, test: metrics by name, such as "recall@20"; test was computed once, from the best checkpoint.
        stages: stage, seconds, epochs, best_epoch, valid, checkpoint and curve of each training stage; a curve has
            epoch, train_loss and valid (the score that selects) of every epoch.
        seconds: wall time of each part: data, each stage, test.
        peak_memory: bytes: largest resident memory of the process, and of the GPU if there is one.
        started: local time, ISO 8601.
        run_id: names the run and its files, 12 hex digits.
        status: "done" or "failed".
        error: why it failed, one line; empty when done.
        protocol: how training, validation and test were parted, such as "leave-one-out".
        test_fingerprint: of the test rows and the candidate items; metrics are comparable only where it is the same.
        n_test, n_items: test rows; items that are ranked.
        settings_given: those that were given for this run, in files or on the command line.
        settings_hash: of all settings that change the result, without the seed and the knock-out.
        n_parameters: trainable ones.
        latency: "batch_ms_per_user", time to score a batch divided by its rows, and "single_ms", time to score one
            user alone; medians, item tower computed before.
        slices: metrics of parts of the test rows, {"popularity": {"head": {"n": 12, "recall@20": …}}}.
        per_user: file with the values of each test row, relative to the folder of the runs file; "" for none.
        budget: of the search that chose the settings, with "trials", "seconds", "space_hash", "sampler" and more, see
            `search.SearchResult`; empty for none.
        warnings: what a reader of the result must know, such as constant scores.
        command: repeats the run.
    """

    model: str
    dataset: str
    data_fingerprint: str
    features: dict[str, str]
    settings: dict[str, Any]
    seed: int
    best_epoch: int
    valid: dict[str, float]
    test: dict[str, float]
    stages: list[dict[str, Any]]
    seconds: dict[str, float]
    peak_memory: dict[str, int]
    versions: dict[str, str]
    checkpoint: str
    started: str
    run_id: str = ""
    status: str = "done"
    error: str = ""
    protocol: str = ""
    test_fingerprint: str = ""
    n_test: int = 0
    n_items: int = 0
    settings_given: dict[str, Any] = field(default_factory=dict)
    settings_hash: str = ""
    n_parameters: int = 0
    latency: dict[str, float] = field(default_factory=dict)
    slices: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    per_user: str = ""
    budget: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    command: str = ""

    @property
    def knockout(self) -> str | None:
        """What was knocked out, as it was given; None for nothing."""
        return self.settings.get("knockout") or None


class Records(NamedTuple):
    """What a file of runs holds.

    Attributes:
        records: those that could be read, in the order of the file.
        problems: a sentence for each line that could not, with its number.
    """

    records: list[RunRecord]
    problems: list[str]


def settings_hash(model: str, settings: Mapping[str, Any]) -> str:
    """12 hex digits of the model and of all settings that change what it computes, but for seed and knock-out."""
    neutral = {key for key, values in NEUTRAL.items() if settings.get(key) in values}
    kept = {key: value for key, value in settings.items() if key not in NOT_IDENTITY and key not in neutral}
    return hashlib.sha256(json.dumps([model, kept], sort_keys=True, default=str).encode()).hexdigest()[:12]


def append(record: RunRecord, path: Path) -> None:
    """Add a record to a file of JSON lines, in one write, so that runs side by side do not mix their lines.

    A line that an interrupted write left without an end keeps its own line.

    Raises:
        TrainingError: a metric, a loss or a setting is not finite.
        OSError: the line could not be written, or not whole.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        text = json.dumps(asdict(record), ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise TrainingError(
            f"{record.model} on {record.dataset} cannot be recorded: a metric, a loss or a setting is not finite\n"
            "  a record holds finite numbers; training has probably diverged: try a smaller learning_rate"
        ) from error
    line = f"{text}\n".encode(errors="replace")  # a path on the disk may hold half a character
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(handle).st_size
        if size and os.pread(handle, 1, size - 1) != b"\n":
            line = b"\n" + line
        if os.write(handle, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        os.fsync(handle)
    finally:
        os.close(handle)


def load(path: Path) -> Records:
    """All records of a file; lines that are no record are reported, the others kept.

    Raises:
        DatasetError: there is no such file.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DatasetError(
            f"cannot read {path}: {error.strerror}\n  run_recbole_mm writes a line there for every run"
        ) from error
    records, problems = [], []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append(_record_of(line))
        except (ValueError, OverflowError, RecursionError) as error:
            problems.append(f"{path}, line {number} is no record of a run: {error}")
    return Records(records, problems)


def _record_of(line: bytes) -> RunRecord:
    """A record without a later version's fields, and with defaults for those that an earlier one lacks.

    Raises:
        ValueError: it is none.
    """
    values = json.loads(line.decode("utf-8-sig"), parse_constant=_not_finite)
    if not isinstance(values, dict):
        raise ValueError(f"found {str(values)[:40]}, expected a mapping")
    if b"\\ud" in line or b"\\uD" in line:  # half of a character could be read, and never be written again
        json.dumps(values, ensure_ascii=False).encode()
    if missing := [f.name for f in fields(RunRecord) if f.name not in values and _is_needed(f)]:
        raise ValueError(f"{', '.join(missing)} not found")
    record = RunRecord(**{f.name: values[f.name] for f in fields(RunRecord) if f.name in values})
    _check(record)
    return record


def _is_needed(each: Field) -> bool:
    return each.default is MISSING and each.default_factory is MISSING


def _not_finite(text: str) -> float:
    raise ValueError(f"{text} is no result")


_KINDS = {"str": (str, "text"), "int": (int, "a whole number"), "dict": (dict, "a mapping"), "list": (list, "a list")}


def _check(record: RunRecord) -> None:
    """Types of all fields, and of the parts that views compute with."""
    for each in fields(RunRecord):
        kind, expected = _KINDS[each.type.partition("[")[0]]
        value = getattr(record, each.name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{each.name} is {value!r}, expected {expected}")
    if record.status not in ("done", "failed"):
        raise ValueError(f"status is {record.status!r}, expected done or failed")
    for name, kind, what in (("stages", dict, "mappings"), ("warnings", str, "texts")):
        values = getattr(record, name)
        if not all(isinstance(value, kind) for value in values):
            raise ValueError(f"{name} is {values!r}, expected a list of {what}")
    for stage in record.stages:
        curve = stage.get("curve", [])
        if not isinstance(curve, list) or not all(isinstance(point, dict) for point in curve):
            raise ValueError(f"the curve of a stage is {curve!r}, expected a list of mappings")
    if record.knockout is not None and not isinstance(record.knockout, str):
        raise ValueError(f"knockout is {record.knockout!r}, expected text")
    if not all(isinstance(digest, str) for digest in record.features.values()):
        raise ValueError(f"features are {record.features!r}, expected a text each")
    for metric, value in (*record.valid.items(), *record.test.items()):
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            raise ValueError(f"{metric} is {value!r}, expected a finite number")


# ------------------------------------------------ values of single test rows


class PerUser(NamedTuple):
    """What a model did with each test row, in the order of the rows.

    Attributes:
        user: [R] user or session tokens.
        target: [R] item tokens.
        rank: [R] position of the target among all candidates, from 1; ties are broken by the fixed rule.
        values: [R] float64 each, by metric, such as "recall@20".
    """

    user: np.ndarray
    target: np.ndarray
    rank: np.ndarray
    values: dict[str, np.ndarray]


def per_user_file(runs_file: Path, run_id: str) -> Path:
    return Path(runs_file).parent / PER_USER / f"{run_id}.npz"


def write_per_user(path: Path, rows: PerUser) -> None:
    """Write the values of single rows; plain arrays, no pickles."""
    columns = {"user": rows.user.astype(str), "target": rows.target.astype(str), "rank": rows.rank.astype(np.int64)}
    columns |= {"metrics": np.array([*rows.values], dtype=str)}  # one array of all: many small ones are slow to read
    columns |= {"values": np.array([*rows.values.values()], dtype=np.float64).reshape(len(rows.values), len(rows.rank))}
    write_atomically(Path(path), lambda out: np.savez_compressed(out, **columns))


def read_per_user(path: Path) -> PerUser:
    """Read what `write_per_user` wrote.

    Raises:
        DatasetError: no such file, or it is broken.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            user, target, rank, names, values = (file[key] for key in ("user", "target", "rank", "metrics", "values"))
        if not user.shape == target.shape == rank.shape == (len(user),) or values.shape != (len(names), len(user)):
            raise ValueError(f"{values.shape} values of {len(names)} metrics and {user.shape} users")
        if values.dtype.kind != "f":
            raise ValueError(f"values are {values.dtype}, expected numbers")
        return PerUser(user, target, rank, dict(zip(names.tolist(), values, strict=True)))
    except (
        OSError,
        ValueError,
        KeyError,
        EOFError,
        TypeError,
        AttributeError,
        RuntimeError,
        BadZipFile,
        zlib.error,
    ) as error:
        raise DatasetError(f"cannot read the values of single users in {path}: {error}; run that run again") from error
