"""Text files of other tools, read as they stand: ids stay texts, and every row has the fields that the header has."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from recbole_mm.errors import DatasetError


def read_separated(path: Path, *, needed: Sequence[str] = ()) -> dict[str, list[str]]:
    """Columns of a file with a header, whose fields are separated by tabs or, if the header has none, by commas.

    Types in the header, such as in ``user_id:token``, are left out of the names. Fields may stand in double quotes.

    Raises:
        DatasetError: no file, not UTF-8, a missing column, a row of another width, no rows.
    """
    lines = _text(path).split("\n")
    if not lines[0]:
        raise DatasetError(f"{path} is empty, expected a header and rows")
    separator = "\t" if "\t" in lines[0] else ","
    try:
        rows = list(csv.reader(lines, delimiter=separator, strict=True))
    except csv.Error as error:
        raise DatasetError(f"{path} cannot be read: {error}") from error
    names = [name.partition(":")[0] for name in rows[0]]
    if missing := [name for name in needed if name not in names]:
        raise DatasetError(f"{path} has no column {', '.join(missing)}; its columns are {', '.join(names)}")
    wrong = [line for line, row in enumerate(rows, start=1) if row and len(row) != len(names)]
    if wrong:
        raise DatasetError(
            f"{path}, line {wrong[0]}: {len(rows[wrong[0] - 1])} fields, the header has {len(names)} "
            f"({len(wrong)} such lines)"
        )
    body = [row for row in rows[1:] if row]
    if not body:
        raise DatasetError(f"{path} has a header but no rows")
    return {name: [row[place] for row in body] for place, name in enumerate(names)}


def read_index(path: Path) -> list[str]:
    """The name with each number, out of lines such as ``B00MV9H6VY<TAB>0``.

    Raises:
        DatasetError: no file, not UTF-8, a line of another form, a name or number twice, a number left out.
    """
    lines = _text(path).split("\n")
    pairs = [line.rsplit("\t", 1) for line in lines if line]
    for line, pair in enumerate(pairs, start=1):
        if len(pair) != 2 or not _is_number(pair[1]):
            raise DatasetError(f"{path}, line {line}: {chr(9).join(pair)[:80]!r}, expected a name, a tab and a number")
    return names_by_number(path, [name for name, _ in pairs], [number for _, number in pairs])


def names_by_number(path: Path, names: Sequence[str], numbers: Sequence[str]) -> list[str]:
    """The names in the order of their numbers, which are 0 to n - 1.

    Raises:
        DatasetError: no names, a name or number twice, a number left out, or none.
    """
    if not names:
        raise DatasetError(f"{path} has no rows")
    if wrong := [number for number in numbers if not _is_number(number)]:
        raise DatasetError(f"{path}: {wrong[0]!r} is no number ({len(wrong)} such rows)")
    by_number: dict[int, str] = {}
    for name, number in zip(names, map(int, numbers), strict=True):
        if number in by_number:
            raise DatasetError(f"{path}: the number {number} belongs to {by_number[number]!r} and to {name!r}")
        by_number[number] = name
    if left_out := [number for number in range(len(by_number)) if number not in by_number]:
        raise DatasetError(
            f"{path}: {len(by_number)} names, but none has the number {left_out[0]}; "
            f"numbers are 0 to {len(by_number) - 1}, each once"
        )
    if len(set(names)) < len(names):
        seen: set[str] = set()
        twice = [name for name in names if name in seen or seen.add(name)]
        raise DatasetError(f"{path}: {len(twice)} names occur twice, such as {twice[:3]}")
    return [by_number[number] for number in range(len(by_number))]


def number_of(text: str, n: int) -> int | None:
    """A number from 0 to n - 1, or None."""
    return int(text) if _is_number(text) and int(text) < n else None


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 19


def _text(path: Path) -> str:
    try:
        return Path(path).read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as error:
        raise DatasetError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is not UTF-8 at byte {error.start}; save the file as UTF-8") from error
