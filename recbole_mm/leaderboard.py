"""Records of runs: one JSON line each, appended, never rewritten."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from recbole_mm.errors import DatasetError


@dataclass(frozen=True)
class RunRecord:
    """One training with its result.

    Attributes:
        data_fingerprint: of the interactions; results with different ones cannot be compared.
        features: sha256 of each feature that the model used, by name.
        settings: all of them, as plain data.
        best_epoch: selected on validation data, in the last stage.
        valid, test: metrics by name, such as "recall@20"; test was computed once, from the best checkpoint.
        stages: stage, seconds, epochs, best_epoch, valid, checkpoint of each training stage.
        seconds: wall time of each part: data, each stage, test.
        peak_memory: bytes: largest resident memory of the process, and of the GPU if there is one.
        started: local time, ISO 8601.
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


def append(record: RunRecord, path: Path) -> None:
    """Add a record to a file of JSON lines, in one write, so that runs side by side do not mix their lines."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(asdict(record), ensure_ascii=False, allow_nan=False) + "\n"
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        if os.write(handle, line.encode()) < len(line.encode()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        os.fsync(handle)
    finally:
        os.close(handle)


def load(path: Path) -> list[RunRecord]:
    """All records of a file.

    Raises:
        DatasetError: naming the line that is no record.
    """
    names = {f.name for f in fields(RunRecord)}
    records = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            content = json.loads(line)
            records.append(RunRecord(**{key: value for key, value in content.items() if key in names}))
        except (ValueError, TypeError, AttributeError) as error:
            raise DatasetError(f"{path}, line {number} is no record of a run ({error}); remove the line") from error
    return records
