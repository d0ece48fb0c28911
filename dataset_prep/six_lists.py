"""The pickles of six lists that MMSBR's authors released: read without running what is in them, and checked.

`released.py` says what the six lists are, `safe_pickle.py` how they are read.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataset_prep.safe_pickle import load_plain_pickle
from recbole_mm.errors import DatasetError

FIELDS = ("item prefixes", "price-level prefixes", "category prefixes", "price levels", "categories", "last items")
LARGEST = 2**31 - 1  # of a price level or category
_LISTS = (list, tuple)
N_EXAMPLES = 5  # of each kind of problem
HOLDS = "the released files hold lists of whole numbers and nothing else"


@dataclass(frozen=True)
class SixLists:
    """One released file.

    Attributes:
        prefixes: items of each session but the last, 1..N.
        price_levels, categories: of item 1..N.
        targets: last item of each session.
    """

    prefixes: list[list[int]]
    price_levels: list[int]
    categories: list[int]
    targets: list[int]


# ---------------------------------------------------------------- problems


class Problems:
    """Everything that is wrong with the released files, by kind, so that one mistake made often stays readable."""

    def __init__(self) -> None:
        self._examples: dict[tuple[str, str], list[str]] = {}
        self._counts: dict[tuple[str, str], int] = {}

    def add(self, file: str, kind: str, where: str, *, found: str, expected: str) -> None:
        """Note a problem.

        Args:
            kind: of the problem; beyond ``N_EXAMPLES``, problems of a kind are counted.
            where: the place in the file, such as "field 0 (item prefixes)[17][2]", counted from 0.
        """
        key = (file, kind)
        self._counts[key] = self._counts.get(key, 0) + 1
        examples = self._examples.setdefault(key, [])
        if len(examples) < N_EXAMPLES:
            place = f"{file}, {where}" if where else file
            examples.append(f"{place}: found {found}, expected {expected}")

    def raise_if_any(self, folder: Path) -> None:
        """
        Raises:
            DatasetError: with all problems, if there is one.
        """
        if not self._counts:
            return
        lines = [f"{folder}: {sum(self._counts.values())} problem(s)"]
        for key, examples in self._examples.items():
            lines += [f"  - {example}" for example in examples]
            if more := self._counts[key] - len(examples):
                lines.append(f"  - {key[0]}: {more} more like these ({key[1]})")
        raise DatasetError("\n".join(lines))


def _shown(value: Any) -> str:
    """A value of any type, short; Python refuses to print numbers of many digits."""
    if type(value) is int:
        return str(value) if value.bit_length() < 64 else f"a number of {value.bit_length()} bits"
    try:
        return f"{type(value).__name__} {reprlib.repr(value)}"
    except (ValueError, RecursionError):
        return f"a {type(value).__name__}"


# ---------------------------------------------------------------- six lists


def read_six_lists(path: Path, problems: Problems) -> SixLists | None:
    """One released file; None if it is not six lists of whole numbers. Everything wrong with it goes into ``problems``.

    Raises:
        UnsafeFileError: the file asks to import something.
    """
    file, unpacked = path.name, "a pickle of six lists as released, unpacked if it came in a zip"
    if not path.is_file():
        there = sorted(p.name for p in path.parent.iterdir())[:8]
        problems.add(file, "file", "", found=f"no such file, only {there}", expected=unpacked)
        return None
    try:
        packed = path.read_bytes()
        content = load_plain_pickle(packed, name=str(path), holds=HOLDS)
    except ValueError as error:
        problems.add(file, "file", "", found=str(error), expected=unpacked)
        return None
    if type(content) not in _LISTS or len(content) != len(FIELDS):
        found = f"{len(content)} members" if type(content) in _LISTS else _shown(content)
        problems.add(file, "fields", "", found=found, expected=f"a tuple of {len(FIELDS)} lists")
        return None
    n_numbers = sum(
        len(value) for field in content[:3] if type(field) in _LISTS for value in field if type(value) in _LISTS
    )
    if n_numbers > len(packed):  # one list named many times: a small file that would keep the reader busy for days
        found = f"{n_numbers} numbers in {len(packed)} bytes"
        problems.add(file, "fields", "", found=found, expected="each list written out")
        return None
    typed = [_check_types(file, number, content[number], problems, nested=number < 3) for number in range(len(FIELDS))]
    if not all(typed):
        return None
    _check_lengths(file, content, problems)
    _check_tables(file, content, problems)
    _check_ids(file, content, problems)
    _check_look_ups(file, content, problems)
    prefixes, _, _, price_levels, categories, targets = content
    return SixLists([list(prefix) for prefix in prefixes], list(price_levels), list(categories), list(targets))


def _place(number: int) -> str:
    return f"field {number} ({FIELDS[number]})"


def _check_types(file: str, number: int, values: Any, problems: Problems, *, nested: bool) -> bool:
    """Whether a field is a list of whole numbers, or of lists of them."""
    right = True

    def wrong(value: Any, where: str, expected: str) -> None:
        nonlocal right
        right = False
        problems.add(
            file, f"types of field {number}", f"{_place(number)}{where}", found=_shown(value), expected=expected
        )

    if type(values) not in _LISTS:
        wrong(values, "", "a list of lists of whole numbers" if nested else "a list of whole numbers")
        return False
    for index, value in enumerate(values):
        if not nested:
            if type(value) is not int:
                wrong(value, f"[{index}]", "a whole number")
        elif type(value) not in _LISTS:
            wrong(value, f"[{index}]", "a list of whole numbers")
        else:
            for position, member in enumerate(value):
                if type(member) is not int:
                    wrong(member, f"[{index}][{position}]", "a whole number")
    return right


def _check_lengths(file: str, content: Sequence[Any], problems: Problems) -> None:
    for number, other, what in ((1, 0, "sessions"), (2, 0, "sessions"), (5, 0, "sessions"), (4, 3, "items")):
        if len(content[number]) != len(content[other]):
            found, expected = f"{len(content[number])} {what}", f"{len(content[other])}, as in {_place(other)}"
            problems.add(file, f"length of field {number}", _place(number), found=found, expected=expected)
    for number in (0, 3):
        if not content[number]:
            problems.add(file, f"length of field {number}", _place(number), found="an empty list", expected="some")
    for index, prefix in enumerate(content[0]):
        if not prefix:
            where = f"{_place(0)}[{index}]"
            problems.add(file, "empty prefixes", where, found="an empty list", expected="at least one item")
    for number in (1, 2):
        for index, (prefix, values) in enumerate(zip(content[0], content[number], strict=False)):
            if len(values) != len(prefix):
                where, expected = f"{_place(number)}[{index}]", f"{len(prefix)}, as many as items"
                found = f"{len(values)} numbers"
                problems.add(file, f"lengths in field {number}", where, found=found, expected=expected)


def _check_tables(file: str, content: Sequence[Any], problems: Problems) -> None:
    for number in (3, 4):
        for index, value in enumerate(content[number]):
            if not 1 <= value <= LARGEST:
                where = f"{_place(number)}[{index}], item {index + 1}"
                problems.add(file, f"numbers of field {number}", where, found=_shown(value), expected=f"1 to {LARGEST}")


def _check_ids(file: str, content: Sequence[Any], problems: Problems) -> None:
    n_items = len(content[3])
    expected = f"an item, 1 to {n_items}"
    for index, prefix in enumerate(content[0]):
        for position, item in enumerate(prefix):
            if not 1 <= item <= n_items:
                where = f"{_place(0)}[{index}][{position}]"
                problems.add(file, "ids of field 0", where, found=_shown(item), expected=expected)
    for index, item in enumerate(content[5]):
        if not 1 <= item <= n_items:
            problems.add(file, "ids of field 5", f"{_place(5)}[{index}]", found=_shown(item), expected=expected)


def _check_look_ups(file: str, content: Sequence[Any], problems: Problems) -> None:
    """Price levels and categories of prefixes are those of their items."""
    for number in (1, 2):
        table = content[number + 2]
        for index, (prefix, values) in enumerate(zip(content[0], content[number], strict=False)):
            for position, (item, value) in enumerate(zip(prefix, values, strict=False)):
                if 1 <= item <= len(table) and value != table[item - 1]:
                    where = f"{_place(number)}[{index}][{position}], item {_shown(item)}"
                    expected = f"{_shown(table[item - 1])}, its number in field {number + 2}"
                    problems.add(file, f"look-ups of field {number}", where, found=_shown(value), expected=expected)


def compare_tables(train: SixLists, test: SixLists, problems: Problems) -> None:
    """Both files number the same items."""
    for number, theirs, ours in (
        (3, test.price_levels, train.price_levels),
        (4, test.categories, train.categories),
    ):
        kind = f"field {number} against train.txt"
        if len(theirs) != len(ours):
            found, expected = f"{len(theirs)} items", f"{len(ours)} as in train.txt"
            problems.add("test.txt", kind, _place(number), found=found, expected=expected)
            continue
        for index, (value, expected) in enumerate(zip(theirs, ours, strict=True)):
            if value != expected:
                where = f"{_place(number)}[{index}], item {index + 1}"
                expected = f"{_shown(expected)} as in train.txt"
                problems.add("test.txt", kind, where, found=_shown(value), expected=expected)
