"""Times of interactions: units, and what cannot be a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from recbole_mm.errors import DatasetError

SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000}
LATEST = 4_102_444_800  # the first second of the year 2100
OTHER_UNIT = 1e11  # seconds from here on (the year 5138) are milliseconds; 1e11 milliseconds are in 1973
TOO_SMALL = 1e8  # numbers below can be times in any unit


def bad_time(value: object, unit: str) -> str | None:
    """Why a value cannot be a time, as a short name, or None.

    Numbers that look like a smaller unit pass, because a whole file of them is another fault: see `check_unit`.
    """
    if type(value) is not int and type(value) is not float:
        return "bad_time" if value is not None else "missing_time"
    if value != value or value in (float("inf"), float("-inf")):
        return "non_finite"
    if value < 0 or LATEST <= value / PER_SECOND[unit] < OTHER_UNIT or value > 1e300:
        return "bad_time"
    return None


def check_unit(time: np.ndarray, line: np.ndarray, time_unit: str, path: Path, *, option: bool = True) -> None:
    """Refuse times that look like another unit than the one given, such as milliseconds, or like two units.

    Args:
        time: [n] as they stand in the file, finite, at least 0.
        line: [n] where each of them stands.
        option: the command has the option ``--time-unit``.

    Raises:
        DatasetError: naming the units found, and the first line of the rarer one.
    """
    powers = np.searchsorted([OTHER_UNIT, OTHER_UNIT * 1e3, OTHER_UNIT * 1e6], time, side="right")
    powers = np.where(time < TOO_SMALL, -1, powers)
    found = {
        ("s", "ms", "us", "ns")[power]: int((powers == power).sum()) for power in range(4) if (powers == power).any()
    }
    if len(found) > 1:
        rarest = min(found, key=found.get)
        first = line[np.flatnonzero(powers == ("s", "ms", "us", "ns").index(rarest))[0]]
        listed = ", ".join(f"{n} look like {unit}" for unit, n in found.items())
        raise DatasetError(
            f"{path} has times in different units: {listed}, the first in {rarest} on line {first}; convert them"
        )
    unit = next(iter(found), time_unit)
    if unit != time_unit:
        remedy = f"pass --time-unit {unit}" if unit in SECONDS and option else "convert them"
        raise DatasetError(f"{path}: the times look like {unit}, such as {time.max():.0f}, not {time_unit}; {remedy}")
