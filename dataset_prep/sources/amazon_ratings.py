"""Amazon's files of ratings alone: a CSV with user, item, rating and time, with a header in the 2023 edition only."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from dataset_prep.sources.lines import Lines
from dataset_prep.sources.rejects import Rejects
from recbole_mm.errors import DatasetError

HEAD = 1_000  # rows that are looked at
HEADERS = (["user_id", "parent_asin", "rating", "timestamp"],)


class Ratings:
    """Rows of a CSV with four fields: user, item, rating, time, or item first."""

    def __init__(self, lines: Lines, rejects: Rejects, order: tuple[str, ...], names: dict[str, str]) -> None:
        self.lines, self._rejects, self._order, self._names, self._n_other = lines, rejects, order, names, 0

    @property
    def n(self) -> int:
        return self.lines.n - self._n_other

    def __iter__(self) -> Iterator[tuple[int, str, dict[str, Any]]]:
        places = [(self._names[role], self._order.index(role)) for role in ("user", "item", "time")]
        time = self._names["time"]
        for number, line in self.lines:
            fields = line.split(",")
            if not line or (number == 1 and fields in HEADERS):
                self._n_other += 1
            elif len(fields) != len(self._order):
                self._rejects.add(self.lines.name, number, "bad_csv", line)
            else:
                row: dict[str, Any] = {key: fields[place] for key, place in places}
                if row[time].isascii() and row[time].replace(".", "", 1).isdigit():
                    row[time] = float(row[time])
                yield number, line, row


def rating_order(path: Path) -> tuple[str, ...] | None:
    """What the fields of a file of ratings are, or None for another file.

    Without a header, items are known by their ids, which have ten characters.

    Raises:
        DatasetError: fields that cannot be told apart.
    """
    head = [line.split(",") for _, line in islice(Lines(path, Rejects(), progress=False), HEAD)]
    if not head or len(head[0]) != 4 or head[0][0].lstrip().startswith(("{", "[")):
        return None
    if head[0] in HEADERS:
        return ("user", "item", "rating", "time")
    ten = [all(len(fields[place]) == 10 for fields in head if len(fields) == 4) for place in (0, 1)]
    if ten == [False, True]:
        return ("user", "item", "rating", "time")
    if ten == [True, False]:
        return ("item", "user", "rating", "time")
    raise DatasetError(
        f"{path}: four fields, and which of the first two are the items cannot be told by their length of ten; "
        "use: python -m dataset_prep table"
    )
