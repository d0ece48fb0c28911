"""Numbers of a measurement in a file, the same way for every command here: what was measured, on what, and when."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.clocks import MEMORY_FILE, entry_of

FORMAT = 1


def write_json(path: Path, results: Mapping[str, Any], calibration=None, **more: Any) -> None:
    """Write ``results`` with the time, the machine and its rate.

    Args:
        calibration: a `benchmarks.calibration.Calibration` of the same run, or None.
        more: further entries, such as settings.
    """
    told = {"format": FORMAT, "when": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    told["machine"] = machine(calibration.device if calibration else "cpu")
    if calibration is not None:
        told["calibration"] = calibration.to_dict()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**told, **more, "results": results}, indent=1) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """A file of `write_json`.

    Raises:
        ValueError: another file.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no file of measurements: {error}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT or "results" not in found:
        raise ValueError(f"{path} is no file of measurements of format {FORMAT}; write one with --json")
    return found


def machine(device: str = "cpu") -> dict:
    """What numbers of different runs may differ by: processor, memory, device, versions."""
    found = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(entry_of(MEMORY_FILE, "MemTotal") / 1024, 1) if MEMORY_FILE.exists() else None,
        "threads": torch.get_num_threads(),
        "device": device,
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    names = [line for line in file.read_text().splitlines() if line.startswith("model name")] if file.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor()
