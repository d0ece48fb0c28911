"""Who is trained on what and asked for what: cut points that datasets can share, and items kept out of training.

histories of users ──┬─ before valid_from ──────────── training: a row for each item after the first
                     ├─ from valid_from to test_from ─ validation: a row for each item, all earlier ones before it
                     └─ from test_from on ──────────── test: the same
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dataset_prep.events import Events
from dataset_prep.session_folder import Prefixes, Rows
from dataset_prep.sources.times import UTC, seconds_of_date
from recbole_mm.data.cuts import Cuts
from recbole_mm.data.layout import SPLITS, Manifest
from recbole_mm.errors import DatasetError, SettingError

if TYPE_CHECKING:
    from dataset_prep.cleaning import Ledger

COLD_ITEMS = ("drop", "keep")

# ---------------------------------------------------------------- cut points


def dates_of(cuts: Cuts) -> str:
    """The two moments as unix seconds and as dates."""
    return f"validation from {_date(cuts.valid_from)}, test from {_date(cuts.test_from)}"


def _date(seconds: float) -> str:
    try:
        found = datetime.fromtimestamp(seconds, tz=UTC)
    except (ValueError, OverflowError, OSError):
        return f"{seconds:.15g}"
    return f"{seconds:.15g} ({found:%Y-%m-%d %H:%M:%S} UTC)"


def read_time(text: str | float) -> float:
    """Unix seconds out of a number, or of a date such as 2016-07-01 or 2016-07-01T12:00:00+02:00; without zone, UTC.

    Raises:
        SettingError: neither.
    """
    try:
        found = seconds_of_date(text) if isinstance(text, str) else None
        seconds = float(text) if found is None else found
    except (ValueError, OverflowError):
        seconds = float("nan")
    if not np.isfinite(seconds):
        raise SettingError(f"{text!r} is no time; expected unix seconds or a date such as 2016-07-01")
    return seconds


def given_cuts(valid_from: str | float, test_from: str | float) -> Cuts:
    """Two cut points as somebody wrote them.

    Raises:
        SettingError: no times, or in the wrong order.
    """
    cuts = Cuts(read_time(valid_from), read_time(test_from))
    if not cuts.valid_from < cuts.test_from:
        raise SettingError(f"valid_from is {valid_from} and test_from {test_from}; expected the test to begin later")
    return cuts


def cuts_of_folder(folder: Path) -> Cuts:
    """The cut points with which another folder was prepared.

    Raises:
        DatasetError: no such folder, or it has none.
    """
    found = Manifest.load(folder).settings.get("cuts")
    if not isinstance(found, dict) or not set(Cuts._fields) <= set(found):
        raise DatasetError(
            f"{folder} has no cut points in its manifest; they come from --protocol time, or sessions split by time"
        )
    return Cuts(*(float(found[name]) for name in Cuts._fields))


# ---------------------------------------------------------------- cold items


def draw_cold(tokens: Sequence[str], *, share: float, seed: int) -> np.ndarray:
    """Which items are kept out of training: [n] bool, ``round(share * n)`` of them.

    An item's luck depends on its name and the seed only: a larger share takes the same items and more, and the order
    of the items does not matter.
    """
    luck = [hashlib.blake2b(f"{seed} {token}".encode(), digest_size=8).digest() for token in tokens]
    drawn = np.zeros(len(tokens), dtype=bool)
    drawn[sorted(range(len(tokens)), key=luck.__getitem__)[: round(share * len(tokens))]] = True
    return drawn


def drawn_items(item: np.ndarray, part: np.ndarray, tokens: Sequence[str], *, share: float, seed: int) -> np.ndarray:
    """Items to take out of training, [N] bool: a share of those that training and another part have."""
    trained, asked = (np.bincount(item[rows], minlength=len(tokens)) > 0 for rows in (part == 0, part > 0))
    candidates = np.flatnonzero(trained & asked)
    drawn = np.zeros(len(tokens), dtype=bool)
    drawn[candidates[draw_cold([tokens[code] for code in candidates], share=share, seed=seed)]] = True
    return drawn


def check_cold_settings(cold_items: str, cold_share: float) -> None:
    if cold_items not in COLD_ITEMS:
        raise SettingError(f"cold_items is {cold_items!r}, expected one of {list(COLD_ITEMS)}")
    if not 0 <= cold_share < 1:
        raise SettingError(f"cold_share is {cold_share}, expected at least 0 and less than 1")
    if cold_share and cold_items != "keep":
        raise SettingError(
            "cold_share takes items out of training, and cold_items drops them; use cold_items keep and a split by time"
        )


# ---------------------------------------------------------------- global split of histories


@dataclass(frozen=True)
class TimeSplit:
    """Rows of the three parts, and what they hold.

    Attributes:
        parts: rows of "train", "valid" and "test"; session ids are users.
        events: interactions that occur in some row, by user, then time, then line.
        part: [n], of each of them.
        counts: of each part, the number of users, interactions, rows and different items.
        cold: items that no training row has, in the order of their first appearance in the source.
        n_drawn: how many of them were taken out of training on purpose.
        n_cold: interactions of validation and test with cold items.
    """

    parts: dict[str, Rows]
    events: Events
    part: np.ndarray
    counts: dict[str, dict[str, int]]
    cold: list[str]
    n_drawn: int
    n_cold: dict[str, int]


def split_by_time(
    events: Events,
    cuts: Cuts,
    ledger: Ledger,
    *,
    longest: int = 50,
    cold_items: str = "drop",
    cold_share: float = 0.0,
    seed: int = 2020,
) -> TimeSplit:
    """Every interaction is in the part of its time; the items before it in its user's history are known. O(n log n).

    An interaction is the target of one row of its part, unless it is its user's first. Prefixes may begin in an
    earlier part, never in a later one.

    Args:
        longest: newest items of a prefix.
        cold_items: interactions with items that no training row has: "drop", or "keep" as targets and in prefixes of
            validation and test.
        cold_share: of the items that training and another part have, whose training interactions are dropped.
        seed: of that draw.

    Raises:
        DatasetError: a part without rows.
    """
    part = cuts.parts(events.time)
    if len(np.unique(part)) < len(SPLITS):
        raise DatasetError(_empty_part(events, part, cuts))
    drawn = np.zeros(len(events.items), dtype=bool)
    if cold_share:
        drawn = drawn_items(events.item, part, events.items, share=cold_share, seed=seed)
        events = ledger.keep(
            events, (part > 0) | ~drawn[events.item], "taken out of training by --cold-share", "--cold-share"
        )
    order = np.lexsort((events.line, events.time, events.user))
    events = events.rows(order)
    part = cuts.parts(events.time)
    trained = _trained(events, part)
    if cold_items == "drop":
        events = ledger.keep(events, trained[events.item], "item that no training row has", "--cold-items drop")
    in_a_row = np.bincount(events.user, minlength=len(events.users))[events.user] > 1
    events = ledger.keep(events, in_a_row, "only interaction of its user", "--protocol time")
    part = cuts.parts(events.time)

    position = np.arange(events.n)
    first = np.diff(events.user, prepend=-1) != 0
    start = np.maximum.accumulate(np.where(first, position, 0))
    parts, counts = {}, {}
    for number, name in enumerate(SPLITS):
        mine = part == number
        targets = position[mine & ~first]
        if not len(targets):
            raise DatasetError(
                f"no row is left for {name}: none of its {int(mine.sum())} interactions has an earlier one of the same "
                f"user; {dates_of(cuts)}. Choose other cut points, or loosen the filters"
            )
        parts[name] = Rows(
            [events.users[user] for user in events.user[targets].tolist()],
            Prefixes(events.items, events.item, np.maximum(start[targets], targets - longest), targets),
            [events.items[item] for item in events.item[targets].tolist()],
        )
        counts[name] = {
            "users": len(np.unique(events.user[mine])),
            "interactions": int(mine.sum()),
            "rows": len(targets),
            "items": len(np.unique(events.item[mine])),
        }
    occurring = np.bincount(events.item, minlength=len(events.items)) > 0
    cold = occurring & ~trained
    return TimeSplit(
        parts=parts,
        events=events,
        part=part,
        counts=counts,
        cold=[events.items[item] for item in np.flatnonzero(cold).tolist()],
        n_drawn=int((drawn & occurring).sum()),
        n_cold={name: int(cold[events.item[part == number]].sum()) for number, name in enumerate(SPLITS) if number},
    )


def _trained(events: Events, part: np.ndarray) -> np.ndarray:
    """Items that a training row has, [N] bool: those of users with two training interactions."""
    mine = part == 0
    n_of_user = np.bincount(events.user[mine], minlength=len(events.users))
    in_a_row = mine & (n_of_user[events.user] > 1)
    return np.bincount(events.item[in_a_row], minlength=len(events.items)) > 0


def _empty_part(events: Events, part: np.ndarray, cuts: Cuts) -> str:
    empty = ", ".join(name for number, name in enumerate(SPLITS) if number not in part)
    return (
        f"no interaction is left for {empty}: they lie between {_date(events.time.min())} and "
        f"{_date(events.time.max())}, and the cut points are: {dates_of(cuts)}"
    )
