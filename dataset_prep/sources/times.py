"""Times of interactions: units, and what cannot be a time."""

from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np

from recbole_mm.errors import DatasetError

SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000}
LATEST = 4_102_444_800  # the first second of the year 2100
OTHER_UNIT = 1e11  # seconds from here on (the year 5138) are milliseconds; 1e11 milliseconds are in 1973
TOO_SMALL = 1e8  # numbers below can be times in any unit
UTC = timezone.utc  # noqa: UP017, because Python 3.10 has no datetime.UTC
_DATE = re.compile(
    r"(?P<day>[0-9]{4}-[0-9]{2}-[0-9]{2})"
    r"(?:[T ](?P<minute>(?:[01][0-9]|2[0-3]):[0-9]{2})(?::(?P<second>[0-9]{2})(?:[.,](?P<rest>[0-9]{1,9}))?)?"
    r" ?(?P<zone>[Zz]|(?P<sign>[+-])(?P<hours>[0-9]{2}):?(?P<minutes>[0-9]{2})?)?)?"
)


def seconds_of_date(text: str) -> float | None:
    """Unix seconds of 2016-07-01, 2016-07-01T12:00 or 2016-07-01 12:00:00.5+02:00, in UTC unless it tells; or None.

    Python's own reader takes other forms in other versions.
    """
    match = _DATE.fullmatch(text)
    if not match:
        return None
    try:
        found = datetime.fromisoformat(f"{match['day']}T{match['minute'] or '00:00'}:{match['second'] or '00'}")
        offset = timedelta(hours=int(match["hours"] or 0), minutes=int(match["minutes"] or 0))
        zone = timezone(-offset if match["sign"] == "-" else offset)
        return found.replace(microsecond=int((match["rest"] or "").ljust(6, "0")[:6]), tzinfo=zone).timestamp()
    except (ValueError, OverflowError):
        return None


def bad_time(value: object, unit: str) -> str | None:
    """Why a value cannot be a time, as a short name, or None.

    Numbers that look like a smaller unit pass, because a whole file of them is another fault: see `check_unit`.
    """
    if type(value) is not int and type(value) is not float:
        return "bad_time" if value is not None else "missing_time"
    if value != value or value in (float("inf"), float("-inf")):
        return "non_finite"
    if value < 0 or value > 1e300 or LATEST <= value / PER_SECOND[unit] < OTHER_UNIT:
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
