"""What is removed from interactions and items before anything is made of them, each step counted.

    interactions ─ rows set aside ─ duplicates ─ k-core ─┬───────────────────── policies ─ k-core again
                                                         └ items that are left ─┘
                                                           read once, cleaned, spooled to a file

The k-core before the items are read keeps a superset of what the second one keeps, so that the result is the same as
with one k-core after the policies, and the texts of most items are never held.
"""

from __future__ import annotations

import json
import re
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, TypeVar
from urllib.parse import quote

import numpy as np

from dataset_prep.events import Events
from dataset_prep.price import PLAIN_NUMBER, parse_prices
from dataset_prep.sources import Item
from dataset_prep.text import clean_text, one_field, one_line
from recbole_mm.errors import DatasetError

DUPLICATES = ("keep", "first", "first_per_pair", "last_per_pair")
POLICIES = ("keep", "drop")
WITHOUT = {  # what an item can be without: the reason why it is dropped
    "metadata": "item without metadata",
    "text": "item without title and description",
    "image": "item without a picture's address or path",
    "price": "item without a price",
}
COLUMNS = {  # of the items, and what RecBole reads them as
    "title": "token_seq",
    "brand": "token_seq",
    "categories": "token_seq",
    "description": "token_seq",
    "price": "float",
    "image_urls": "token_seq",
}
ONE_VALUE = ("category", "image", "price_level")  # columns of a source's own that are one name, even with spaces

# ---------------------------------------------------------------- keeping count


class Step(NamedTuple):
    """What one step removed.

    Attributes:
        name: of the step, such as "k-core".
        reason: why.
        interactions: how many of them.
        items: that had interactions before and have none after.
    """

    name: str
    reason: str
    interactions: int
    items: int


class _HasItems(Protocol):
    @property
    def item(self) -> np.ndarray: ...

    def rows(self, wanted: np.ndarray) -> Any: ...


_Kept = TypeVar("_Kept", bound=_HasItems)


class Ledger:
    """Removes interactions and keeps count: ``n_read`` is what is kept and what all steps dropped.

    Args:
        n_read: interactions that were read, with those that were set aside.
        dropped: of these, set aside while reading, by reason.
        called: options that are called otherwise by the command that runs.
    """

    def __init__(
        self, n_read: int, dropped: dict[str, int] | None = None, *, called: dict[str, str] | None = None
    ) -> None:
        self.n_read, self._called = n_read, called or {}
        self._steps: dict[tuple[str, str], list[int]] = {}
        for reason, n in (dropped or {}).items():
            self.add("reading", reason, n)

    @property
    def steps(self) -> tuple[Step, ...]:
        return tuple(Step(*key, *counts) for key, counts in self._steps.items())

    @property
    def dropped(self) -> dict[str, int]:
        """Interactions by reason."""
        sums: dict[str, int] = {}
        for step in self.steps:
            sums[step.reason] = sums.get(step.reason, 0) + step.interactions
        return sums

    def add(self, step: str, reason: str, interactions: int, items: int = 0) -> None:
        counts = self._steps.setdefault((step, reason), [0, 0])
        counts[0] += interactions
        counts[1] += items

    def keep(self, events: _Kept, wanted: np.ndarray, reason: str, option: str, *, step: str = "") -> _Kept:
        """The wanted interactions; the others are counted.

        Args:
            wanted: [n] bool.
            option: of the command line that asks for this.
            step: name of it; the option if there is none.

        Raises:
            DatasetError: nothing is wanted; names the option, and what was dropped before.
        """
        gone = int(len(wanted) - np.count_nonzero(wanted))
        if not gone:
            return events
        if gone == len(wanted):
            name, space, value = option.partition(" ")
            option = self._called.get(name, name) + space + value
            before = "".join(f"\n  before: {n} dropped: {why}" for why, n in self.dropped.items())
            raise DatasetError(
                f"{option} removes all {gone} interactions that were left of {self.n_read}: {reason}; "
                f"loosen it, or take other data{before}"
            )
        kept = events.rows(wanted)
        self.add(step or option, reason, gone, n_different(events.item) - n_different(kept.item))
        return kept


def n_different(codes: np.ndarray) -> int:
    """How many different whole numbers >= 0 there are; O(n + the greatest)."""
    return int(np.count_nonzero(np.bincount(codes)))


def n_twins(names: Sequence[str]) -> int:
    """Names that differ from another one only in case or in composed letters."""
    return len(names) - len({unicodedata.normalize("NFC", name).casefold() for name in names})


# ---------------------------------------------------------------- interactions


def drop_duplicates(events: Events, rule: str, ledger: Ledger) -> tuple[Events, int]:
    """Interactions without second ones, and how many are equal to an earlier one in user, item, time (and basket).

    Args:
        rule: "keep" all; the "first" line of those equal; "first_per_pair" or "last_per_pair" in time, and among
            equal times in lines, of those of a user with an item. RecBole's rm_dup_inter knows the latter two.
    """
    keys = [events.user, events.item, events.time]
    keys += [] if events.basket is None else [events.basket]
    order = np.lexsort((events.line, *reversed(keys)))
    n_equal = int(np.count_nonzero(~_changes(keys, order)))
    if rule == "keep" or not n_equal and rule == "first":
        return events, n_equal
    if rule == "first":
        reason, first = "equal to an earlier row", _changes(keys, order)
    else:
        pair = [events.user, events.item]
        order = np.lexsort((events.line, events.time, events.item, events.user))
        first = _changes(pair, order)
        reason = "its user had the item before"
        if rule == "last_per_pair":
            first, reason = np.append(first[1:], True), "its user has the item again later"
    wanted = np.zeros(events.n, dtype=bool)
    wanted[order[first]] = True
    return ledger.keep(events, wanted, reason, f"--duplicates {rule}", step="duplicates"), n_equal


def _changes(keys: Sequence[np.ndarray], order: np.ndarray) -> np.ndarray:
    """[n] bool, False where all keys are those of the one before in this order."""
    changes = np.ones(len(order), dtype=bool)
    if len(order):
        changes[1:] = False
    for key in keys:
        here = key[order]
        changes[1:] |= here[1:] != here[:-1]
    return changes


def k_core(events: Events, ledger: Ledger, *, min_user: int, min_item: int) -> Events:
    """Interactions of users and items that have enough of them, until nothing changes.

    The result does not depend on the order of removal. O(n log n), however many rounds it takes: a round looks only at
    what lost something in the one before.

    Args:
        min_user, min_item: interactions of a user and of an item, at least.
    """
    if min_user <= 1 and min_item <= 1:
        return events
    sides = {
        "user": _Side(events.user, len(events.users), min_user),
        "item": _Side(events.item, len(events.items), min_item),
    }
    left = np.ones(events.n, dtype=bool)
    reasons = np.zeros(events.n, dtype=np.int8)  # 1 for its user, 2 for its item
    candidates = {name: np.flatnonzero(side.n_left) for name, side in sides.items()}
    while any(map(len, candidates.values())):
        for number, (name, other) in enumerate((("user", "item"), ("item", "user")), start=1):
            gone = sides[name].take(candidates[name], left)
            left[gone], reasons[gone] = False, number
            candidates[name] = np.array([], dtype=np.int64)
            if len(gone):
                lost = sides[other].lose(gone)
                candidates[other] = np.union1d(candidates[other], lost)
    for number, name in enumerate(("user", "item"), start=1):
        least = sides[name].least
        wanted = (reasons != number)[left | (reasons >= number)]
        events = ledger.keep(
            events, wanted, f"{name} with fewer than {least} interactions", f"--min-{name} {least}", step="k-core"
        )
    return events


class _Side:
    """Users, or items: which interactions each has, and how many of them are left."""

    def __init__(self, codes: np.ndarray, n: int, least: int) -> None:
        self.codes, self.least = codes, least
        self.n_left = np.bincount(codes, minlength=n)
        self._order = np.argsort(codes, kind="stable")
        self._starts = np.concatenate([[0], np.cumsum(self.n_left)])

    def take(self, candidates: np.ndarray, left: np.ndarray) -> np.ndarray:
        """The interactions, as far as left, of those candidates that have too few, and then have none."""
        few = candidates[(self.n_left[candidates] < self.least) & (self.n_left[candidates] > 0)]
        counts = self._starts[few + 1] - self._starts[few]
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        rows = self._order[np.repeat(self._starts[few], counts) + within]
        self.n_left[few] = 0
        return rows[left[rows]]

    def lose(self, rows: np.ndarray) -> np.ndarray:
        """Count these interactions off; returns whom they belonged to."""
        losers, n_lost = np.unique(self.codes[rows], return_counts=True)
        self.n_left[losers] -= n_lost
        return losers


def compacted(events: Events) -> Events:
    """The same interactions, without the names of users, items and baskets that none of them has."""

    def used(codes: np.ndarray, names: list[str]) -> tuple[np.ndarray, list[str]]:
        numbers, codes = np.unique(codes, return_inverse=True)
        return codes.astype(np.int32), [names[number] for number in numbers.tolist()]

    user, users = used(events.user, events.users)
    item, items = used(events.item, events.items)
    basket, baskets = (None, None) if events.basket is None else used(events.basket, events.baskets)
    return events._replace(user=user, users=users, item=item, items=items, basket=basket, baskets=baskets)


def in_order(events: Events) -> Events:
    """By time, and among equal times by line."""
    return events.rows(np.lexsort((events.line, events.time)))


# ---------------------------------------------------------------- items


def clean_item(item: Item, *, ranges: str = "mean") -> tuple[dict[str, str], list[str], str]:
    """A row of the table of items out of what a source says.

    Texts lose entities, tags and control characters; a description keeps its lines apart as `text.one_line` does.
    Category names are parted by spaces, with underscores inside; so are addresses, with percent signs inside.

    Returns:
        Texts by column, only those that are not empty; columns of which more than white space changed; and why there
        is no price, or "".
    """
    more = {name: one_field(value) for name, value in item.more.items()}
    names = [clean_text(name) for name in item.categories]
    price, reasons = parse_prices([item.price], ranges=ranges)
    row = {
        **more,
        "title": clean_text(item.title),
        "brand": clean_text(item.brand),
        "categories": " ".join(name.replace(" ", "_") for name in names if name),
        "description": one_line(item.description),
        "price": "" if np.isnan(price[0]) else format(price[0], ".12g"),
        "image_urls": " ".join(_address(picture) for picture in item.pictures if picture.strip()),
    }
    changed = [name for name in ("title", "brand") if row[name] != _collapsed(getattr(item, name))]
    if any(name != _collapsed(raw) for name, raw in zip(names, item.categories, strict=True)):
        changed.append("categories")
    if clean_text(item.description) != _collapsed(item.description):
        changed.append("description")
    return {name: text for name, text in row.items() if text}, changed, next(iter(reasons), "")


def _collapsed(text: str) -> str:
    return " ".join(text.split())


def _address(picture: str) -> str:
    return re.sub(r"[\s\x00-\x1f\x7f]", lambda blank: quote(blank.group()), picture.strip())


class ItemSpool:
    """Cleaned items in a temporary file, in the order of the source; in memory, four flags each.

    Args:
        items: names of all items that are wanted, of which some may never come.
        folder: where the temporary file lies; it has no name and goes away by itself.
        ranges: of `price.parse_price`.
    """

    def __init__(self, items: Sequence[str], folder: Path, *, ranges: str = "mean") -> None:
        self.items = items
        self.codes = {token: code for code, token in enumerate(items)}
        self.has = {what: np.zeros(len(items), dtype=bool) for what in WITHOUT}
        self._ranges = ranges
        self._file = tempfile.TemporaryFile("w+", dir=folder, encoding="utf-8", newline="\n")

    def __enter__(self) -> ItemSpool:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def add(self, item: Item) -> None:
        """Clean an item and keep it; each comes once."""
        row, changed, no_price = clean_item(item, ranges=self._ranges)
        code = self.codes[item.item_id]
        found = {
            "metadata": True,
            "text": "title" in row or "description" in row,
            "image": "image_urls" in row,
            "price": "price" in row,
        }
        for what, has in found.items():
            self.has[what][code] = has
        self._file.write(json.dumps([code, row, changed, no_price], ensure_ascii=False) + "\n")

    def rows(self, kept: np.ndarray) -> Iterator[tuple[int, dict[str, str], list[str], str]]:
        """The items whose position is True in ``kept``: position, texts by column, changed columns, why no price."""
        self._file.seek(0)
        for line in self._file:
            code, *rest = json.loads(line)
            if kept[code]:
                yield code, *rest


def drop_items(events: Events, spool: ItemSpool, without: dict[str, str], ledger: Ledger) -> Events:
    """Interactions with items that have what they need.

    Args:
        spool: of ``events.items``.
        without: "keep" or "drop", of each key of ``WITHOUT``.
    """
    for what, reason in WITHOUT.items():
        if without[what] == "drop":
            wanted = spool.has[what][events.item]
            events = ledger.keep(events, wanted, reason, f"--without-{what} drop", step="items")
    return events


class ItemCounts(NamedTuple):
    """What is known of the items that are kept.

    Attributes:
        n: items that occur in the interactions.
        n_rows: of them, with metadata.
        columns: how many have something in a column, by column, in the order of writing.
        types: of these columns.
        changed: fields of which entities, tags or control characters were removed, by column.
        no_price: items without a price, by reason.
    """

    n: int
    n_rows: int
    columns: dict[str, int]
    types: dict[str, str]
    changed: dict[str, int]
    no_price: dict[str, int]


def count_items(spool: ItemSpool, kept: np.ndarray) -> ItemCounts:
    """One pass over the items that are kept, [N] bool.

    Columns that only this source has are numbers (float) if all their values are, else texts.
    """
    columns, changed, no_price, n_rows = Counter(), Counter(), Counter(), 0
    texts: set[str] = set()
    for _, row, fields, reason in spool.rows(kept):
        n_rows += 1
        columns.update(row.keys())
        changed.update(fields)
        no_price.update([reason] if reason else [])
        texts.update(name for name, text in row.items() if name not in texts and not PLAIN_NUMBER.fullmatch(text))
    known = {**COLUMNS, **dict.fromkeys(ONE_VALUE, "token")}
    types = {name: known[name] for name in COLUMNS if columns[name]}
    for name in sorted(set(columns) - set(types)):
        types[name] = known.get(name, "token_seq" if name in texts else "float")
    return ItemCounts(
        n=int(np.count_nonzero(kept)),
        n_rows=n_rows,
        columns={name: columns[name] for name in types},
        types=types,
        changed={name: changed[name] for name in COLUMNS if changed[name]},
        no_price=dict(no_price.most_common()),
    )
