"""Sessions out of interactions: group, filter, cut, split by time, and write the rows that models train on.

    interactions ─ bad rows ─ duplicates ─ group ─ filters, until nothing changes ─ cut to the newest
                 ─ order ─ split ─ items that training has not ─ prefixes ─ <name>.{train,valid,test}.inter

Every interaction that is read is in a session of one part, or counted under the reason why it is not.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dataset_prep.interactions import SECONDS, Columns, read_interactions, read_items_file
from dataset_prep.price import PriceReport, PriceSettings, with_price_levels
from dataset_prep.session_folder import Rows, refuse_existing, write_session_folder
from recbole_mm.data.files import sha256_of
from recbole_mm.data.layout import SPLITS
from recbole_mm.errors import DatasetError, SettingError

if TYPE_CHECKING:
    from pandas import DataFrame

DAY = 86_400  # seconds
DEFAULT_LIST_LENGTH = 50  # RecBole's MAX_ITEM_LIST_LENGTH
CHOICES = {
    "sessions": ("basket", "gap", "day", "user"),
    "session_order": ("given", "random"),
    "duplicates": ("keep", "first"),
    "repeats": ("keep", "drop"),
    "split": ("time", "leave-one-out"),
    "unseen": ("drop", "keep"),
    "prefixes": ("train", "all", "none"),
    "bad_rows": ("refuse", "drop"),
    "time_unit": tuple(SECONDS),
}
ONLY_WITH = {  # settings that mean something under one value of another
    "gap": ("sessions", "gap"),
    "seed": ("session_order", "random"),
    "valid_share": ("split", "time"),
    "test_share": ("split", "time"),
}


@dataclass(frozen=True)
class SessionSettings:
    """How sessions are made.

    Attributes:
        sessions: "basket" by the basket's id, within a user if there are users; "gap": a user's interactions, parted
            where more than ``gap`` seconds pass; "day": a user's on one UTC day; "user": all of a user's.
        gap: seconds, > 0.
        session_order: "given" by time, then by line of the file; "random" shuffles each session after the cut.
        seed: of the shuffling, at least 0.
        duplicates: of rows equal in user, item and time (and basket, for "basket"), keep all or the "first".
        repeats: "drop" an item that comes directly after itself in a session.
        min_item_count, min_length: interactions of an item, and items of a session, at least; checked by turns until
            nothing changes. Before the cut and the split, after which an item may be rarer. min_length is at least 2.
        longest: sessions keep their newest items, at least 2; prefixes then have at most ``longest - 1``.
        split: "time": sessions that end last are the test. "leave-one-out": of each session of at least 4 items, the
            last is the test, the last but one validation, the rest training; shorter ones are training only.
        valid_share, test_share: of the sessions, for "time".
        unseen: what happens to items of validation and test that training has not: "drop" removes them, and then
            sessions of fewer than 2 items; "keep" leaves them as candidates that were never trained.
        prefixes: a row for each item after the first, for "train", for "all" parts or for "none"; otherwise one row
            per session, whose target is the last item. With "leave-one-out", validation and test have one row each.
        bad_rows: "refuse" or "drop" rows whose ids are empty, hold spaces or are RecBole's padding, or whose time is
            no number >= 0; and second rows of an item.
        time_unit: of the times, "s", "ms" or "us".
    """

    sessions: str
    gap: float = 1800.0
    session_order: str = "given"
    seed: int = 2020
    duplicates: str = "keep"
    repeats: str = "keep"
    min_item_count: int = 5
    min_length: int = 2
    longest: int = 50
    split: str = "time"
    valid_share: float = 0.1
    test_share: float = 0.1
    unseen: str = "drop"
    prefixes: str = "train"
    bad_rows: str = "refuse"
    time_unit: str = "s"

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise SettingError(f"{name} is {getattr(self, name)!r}, expected one of {list(known)}")
        for name, lowest in (("min_item_count", 1), ("min_length", 2), ("longest", 2), ("seed", 0)):
            if getattr(self, name) < lowest:
                raise SettingError(f"{name} is {getattr(self, name)}, expected at least {lowest}")
        if self.split == "leave-one-out" and self.longest < 4:
            raise SettingError(f"longest is {self.longest}, and leave-one-out needs sessions of 4 items")
        if not self.gap > 0:
            raise SettingError(f"gap is {self.gap}, expected more than 0 seconds")
        if not (self.valid_share > 0 and self.test_share > 0 and self.valid_share + self.test_share < 1):
            raise SettingError(
                f"valid_share and test_share are {self.valid_share} and {self.test_share}, "
                "expected each more than 0 and both together less than 1"
            )

    def that_apply(self) -> dict[str, Any]:
        """Without those that mean nothing here, such as the gap of sessions by day; for the manifest."""
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in ONLY_WITH or getattr(self, ONLY_WITH[name][0]) == ONLY_WITH[name][1]
        }


@dataclass(frozen=True)
class SessionReport:
    """What became of the interactions: ``n_read`` is the sum of ``dropped`` and of the parts' interactions.

    Attributes:
        n_read: rows of the file.
        dropped: interactions that are in no part, by reason.
        parts: of each part, the number of sessions, interactions (its own, each counted once), rows, different items.
        n_items: different items in all parts.
        n_duplicates: rows equal to an earlier one, whether they were kept or not.
        equal_times: share of neighbours in a session that have the same time, whose order is that of the file.
        cold: interactions of validation and test with items that training has not.
        remarks: further things to know.
    """

    n_read: int
    dropped: dict[str, int]
    parts: dict[str, dict[str, int]]
    n_items: int
    n_duplicates: int
    equal_times: float
    cold: dict[str, int]
    remarks: tuple[str, ...] = ()
    prices: PriceReport | None = None
    n_items_without_row: int | None = None

    def as_settings(self) -> dict[str, Any]:
        """For the manifest."""
        names = ("n_read", "dropped", "parts", "n_items", "n_duplicates", "equal_times", "cold", "n_items_without_row")
        return {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        kept = sum(part["interactions"] for part in self.parts.values())
        lines = [f"{self.n_read} interactions read, {kept} kept, {self.n_read - kept} dropped; {self.n_items} items"]
        lines += [f"  {n} dropped: {why}" for why, n in self.dropped.items()]
        for name, part in self.parts.items():
            cold = f", {self.cold[name]} interactions with items unseen in training" if self.cold.get(name) else ""
            lines.append(
                f"{name}: {part['sessions']} sessions, {part['interactions']} interactions, {part['rows']} rows, "
                f"{part['items']} items{cold}"
            )
        lines += [f"remark: {remark}" for remark in self.remarks]
        if self.n_items_without_row:
            lines.append(
                f"remark: {self.n_items_without_row} of {self.n_items} items have no row in the table of items"
            )
        return "\n".join(lines + ([str(self.prices)] if self.prices else []))


# ---------------------------------------------------------------- events


@dataclass(frozen=True)
class _Events:
    """Interactions, one per entry, those of a session beside each other in its order."""

    session: np.ndarray  # [n] int
    item: np.ndarray  # [n] int, position in the list of tokens
    time: np.ndarray  # [n] seconds
    line: np.ndarray  # [n] int, position in the file

    def __len__(self) -> int:
        return len(self.session)

    def __getitem__(self, rows: np.ndarray) -> _Events:
        return _Events(*(getattr(self, column.name)[rows] for column in fields(self)))


class _Ledger:
    """Removes interactions and keeps count."""

    def __init__(self, n_read: int, dropped: dict[str, int] | None = None) -> None:
        self.n_read = n_read
        self.dropped = dict(dropped or {})

    def keep(self, events: _Events, wanted: np.ndarray, reason: str, option: str) -> _Events:
        gone = int(len(wanted) - wanted.sum())
        if not gone:
            return events
        if gone == len(wanted):
            before = "".join(f"\n  before: {n} dropped: {why}" for why, n in self.dropped.items())
            raise DatasetError(
                f"{option} removes all {gone} interactions that were left of {self.n_read}: {reason}; "
                f"choose a lower bound or other data{before}"
            )
        self.dropped[reason] = self.dropped.get(reason, 0) + gone
        return events[wanted]


def make_sessions(
    interactions: DataFrame, settings: SessionSettings, *, dropped: dict[str, int] | None = None
) -> tuple[dict[str, Rows], SessionReport]:
    """Sessions of all three parts. O(n log n) for n interactions, and a few passes for the filters.

    Args:
        interactions: columns item, time [seconds], and user or basket or both, in the order of the file; valid ids.
        dropped: rows of the file that are not among them, by reason.

    Returns:
        Rows of "train", "valid" and "test", the sessions of each in the order of their last time, and a report.

    Raises:
        DatasetError: a filter or the split leaves nothing.
    """
    ledger = _Ledger(len(interactions) + sum((dropped or {}).values()), dropped)
    events, tokens, n_duplicates = _group(interactions, settings, ledger)
    events = _filter(events, settings, ledger)
    events = ledger.keep(
        events, _from_end(events) < settings.longest, f"beyond the newest {settings.longest} of its session",
        f"--longest {settings.longest}",
    )  # fmt: skip
    events = _by_last_time(events)
    same = np.diff(events.session) == 0
    equal_times = float((np.diff(events.time)[same] == 0).mean())
    if settings.session_order == "random":
        key = np.random.default_rng(settings.seed).random(len(events))
        events = events[np.lexsort((key, events.session))]

    part, remarks = _split(events, settings)
    events, part, cold = _treat_unseen(events, part, settings, ledger)
    parts = _rows(events, part, tokens, settings)
    counts = {
        name: {
            "sessions": len(set(parts[name].session_ids)),
            "interactions": int((part == number).sum()),
            "rows": len(parts[name].targets),
            "items": len(set(events.item[part == number].tolist())),
        }
        for number, name in enumerate(SPLITS)
    }
    remarks += _remarks(settings, tokens, equal_times, n_duplicates)
    report = SessionReport(
        n_read=ledger.n_read,
        dropped=ledger.dropped,
        parts=counts,
        n_items=len(set(events.item.tolist())),
        n_duplicates=n_duplicates,
        equal_times=round(equal_times, 6),
        cold=cold,
        remarks=tuple(remarks),
    )
    return parts, report


def _group(interactions: DataFrame, settings: SessionSettings, ledger: _Ledger) -> tuple[_Events, list[str], int]:
    """Interactions by session, in the order of time and then of lines; the item tokens; the number of duplicates."""
    import pandas as pd

    if not len(interactions):
        raise DatasetError(f"no interaction of {ledger.n_read} is left: all rows are bad")
    item, tokens = pd.factorize(interactions["item"])
    time = interactions["time"].to_numpy(dtype=np.float64)
    keys = [name for name in ("user", "basket") if name in interactions and (name == "user" or _by_basket(settings))]
    codes = {name: pd.factorize(interactions[name])[0] for name in keys}
    line = np.arange(len(item))

    twice = pd.DataFrame({**codes, "item": item, "time": time}).duplicated().to_numpy()
    wanted = ~twice if settings.duplicates == "first" else np.ones(len(item), dtype=bool)
    rows = np.flatnonzero(wanted)
    if len(rows) < len(item):
        ledger.dropped["equal to an earlier row"] = len(item) - len(rows)
    rows = rows[np.lexsort((time[rows], *(codes[name][rows] for name in reversed(keys))))]  # stable
    new = np.zeros(len(rows), dtype=bool)
    new[0] = True
    for code in codes.values():
        new[1:] |= np.diff(code[rows]) != 0
    if settings.sessions == "gap":
        new[1:] |= np.diff(time[rows]).round(6) > settings.gap  # float64 has microseconds, not more
    elif settings.sessions == "day":
        new[1:] |= np.diff(np.floor(time[rows] / DAY)) != 0
    return _Events(np.cumsum(new) - 1, item[rows], time[rows], line[rows]), list(tokens), int(twice.sum())


def _by_basket(settings: SessionSettings) -> bool:
    return settings.sessions == "basket"


def _filter(events: _Events, settings: SessionSettings, ledger: _Ledger) -> _Events:
    n_items, n_length = settings.min_item_count, settings.min_length
    n_before = None
    while n_before != len(events):
        n_before = len(events)
        if settings.repeats == "drop":
            events = ledger.keep(events, ~_repeated(events), "directly after the same item", "--repeats drop")
        events = ledger.keep(
            events, np.bincount(events.item)[events.item] >= n_items,
            f"item with fewer than {n_items} interactions", f"--min-item-count {n_items}",
        )  # fmt: skip
        events = ledger.keep(
            events, np.bincount(events.session)[events.session] >= n_length,
            f"session of fewer than {n_length} items", f"--min-length {n_length}",
        )  # fmt: skip
    return events


def _repeated(events: _Events) -> np.ndarray:
    repeated = np.zeros(len(events), dtype=bool)
    repeated[1:] = (np.diff(events.session) == 0) & (np.diff(events.item) == 0)
    return repeated


def _from_end(events: _Events) -> np.ndarray:
    """How many interactions of its session come after each."""
    starts, counts = _bounds(events.session)
    return np.repeat(starts + counts, counts) - 1 - np.arange(len(events))


def _bounds(session: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Start and length of each session."""
    starts = np.flatnonzero(np.diff(session, prepend=-1))
    return starts, np.diff(starts, append=len(session))


def _by_last_time(events: _Events) -> _Events:
    """Sessions numbered and sorted by their last time, then by their first line."""
    starts, counts = _bounds(events.session)
    last, first_line = np.maximum.reduceat(events.time, starts), np.minimum.reduceat(events.line, starts)
    rank = np.empty(len(starts), dtype=np.int64)
    rank[np.lexsort((first_line, last))] = np.arange(len(starts))
    session = np.repeat(rank, counts)
    order = np.argsort(session, kind="stable")
    return _Events(session, events.item, events.time, events.line)[order]


# ---------------------------------------------------------------- split


def _split(events: _Events, settings: SessionSettings) -> tuple[np.ndarray, list[str]]:
    """0, 1 or 2 for each interaction: training, validation, test."""
    starts, counts = _bounds(events.session)
    n = len(starts)
    if settings.split == "leave-one-out":
        long_enough = np.repeat(counts >= 4, counts)
        if not long_enough.any():
            raise DatasetError(f"none of {n} sessions has 4 items, which leave-one-out needs; try --split time")
        return np.where(long_enough, np.maximum(2 - _from_end(events), 0), 0), []
    if n < 3:
        raise DatasetError(f"{n} sessions are left, and three parts need one each; loosen the filters")
    last = np.maximum.reduceat(events.time, starts)
    remarks = []
    changes = np.flatnonzero(np.diff(last)) + 1
    n_test, n_valid = (int(n * share + 0.5) for share in (settings.test_share, settings.valid_share))
    test, tied_test = _boundary(changes, wanted=n - n_test, low=2, high=n - 1)
    valid, tied_valid = _boundary(changes, wanted=n - n_test - n_valid, low=1, high=test - 1)
    if tied_test or tied_valid:
        remarks.append("sessions that end at the same time are in different parts, or a part would be empty")
    part = (np.arange(n) >= valid).astype(np.int64) + (np.arange(n) >= test)
    return np.repeat(part, counts), remarks


def _boundary(changes: np.ndarray, *, wanted: int, low: int, high: int) -> tuple[int, bool]:
    """The number of sessions before a part: where the time changes, nearest to the one wanted, the later of two.

    True if there is no such place in low..high; the boundary then parts equal times.
    """
    possible = changes[(changes >= low) & (changes <= high)][::-1]
    if not len(possible):
        return min(max(wanted, low), high), True
    return int(possible[np.argmin(np.abs(possible - wanted))]), False


def _treat_unseen(
    events: _Events, part: np.ndarray, settings: SessionSettings, ledger: _Ledger
) -> tuple[_Events, np.ndarray, dict[str, int]]:
    def keep(wanted: np.ndarray, reason: str) -> None:
        nonlocal events, part
        events, part = ledger.keep(events, wanted, reason, "--unseen drop"), part[wanted]

    trained = np.zeros(events.item.max() + 1, dtype=bool)
    trained[events.item[part == 0]] = True
    seen = (part == 0) | trained[events.item]
    cold = {name: int((~seen & (part == number)).sum()) for number, name in enumerate(SPLITS) if number}
    if settings.unseen == "keep":
        return events, part, cold

    keep(seen, "validation or test item that training has not")
    if settings.repeats == "drop" and settings.session_order == "given":
        keep(~_repeated(events), "directly after the same item")
    keep(np.bincount(events.session)[events.session] >= 2, "validation or test session of one item after that")
    for number, name in enumerate(SPLITS):
        if not (part == number).any():
            raise DatasetError(
                f"--unseen drop leaves no session for {name}: too few of its items occur in training; "
                "use --unseen keep, a larger share, or a lower --min-item-count"
            )
    return events, part, {name: 0 for name in cold}


# ---------------------------------------------------------------- rows


def prefix_rows(session_ids: Sequence[str], sequences: Sequence[Sequence[str]], *, every: bool) -> Rows:
    """Rows of a part out of whole sessions.

    Args:
        session_ids: one per session.
        sequences: items of each session, at least 2.
        every: a row for each item after the first; else one per session, whose target is the last item.
    """
    rows = Rows([], [], [])
    for session_id, sequence in zip(session_ids, sequences, strict=True):
        for end in range(1 if every else len(sequence) - 1, len(sequence)):
            rows.session_ids.append(session_id)
            rows.prefixes.append(list(sequence[:end]))
            rows.targets.append(sequence[end])
    return rows


def _rows(events: _Events, part: np.ndarray, tokens: list[str], settings: SessionSettings) -> dict[str, Rows]:
    parts = {}
    for number, name in enumerate(SPLITS):
        mine, every = part == number, settings.prefixes == "all" or (settings.prefixes == "train" and number == 0)
        if settings.split == "leave-one-out" and number:  # the sessions that have a target here, up to it
            mine, every = (part <= number) & np.isin(events.session, events.session[mine]), False
        here = events[mine]
        starts, counts = _bounds(here.session)
        items = [tokens[item] for item in here.item.tolist()]
        sequences = [
            items[start : start + count] for start, count in zip(starts.tolist(), counts.tolist(), strict=True)
        ]
        parts[name] = prefix_rows([str(number + 1) for number in here.session[starts].tolist()], sequences, every=every)
    return parts


def _remarks(settings: SessionSettings, tokens: list[str], equal_times: float, n_duplicates: int) -> list[str]:
    remarks = []
    if n_duplicates and settings.duplicates == "keep":
        remarks.append(f"{n_duplicates} rows read are equal to an earlier one; --duplicates first drops them")
    if equal_times and settings.session_order == "given":
        remarks.append(
            f"{100 * equal_times:.1f} % of neighbours in a session have the same time: their order is that of the file"
        )
    if settings.longest - 1 > DEFAULT_LIST_LENGTH:
        remarks.append(
            f"prefixes have up to {settings.longest - 1} items: run with --MAX_ITEM_LIST_LENGTH={settings.longest - 1}"
        )
    twins = len(tokens) - len({unicodedata.normalize("NFC", token).casefold() for token in tokens})
    if twins:
        remarks.append(f"{twins} item ids differ from another only in case or composed letters; they are kept apart")
    return remarks


# ---------------------------------------------------------------- files


def prepare_sessions(
    folder: Path,
    *,
    interactions: Path,
    items: Path | None,
    settings: SessionSettings,
    columns: Columns | None = None,
    prices: PriceSettings | None = None,
    overwrite: bool = False,
) -> SessionReport:
    """Make a prepared folder of sessions out of a file of interactions and a table of items.

    Price levels are made of the items that occur in the sessions.

    Args:
        folder: to make; its files carry its name.
        interactions, items: RecBole atomic files, or CSV or TSV with a header; ``items`` may be None.

    Raises:
        DatasetError: a file or a row that cannot be used, nothing is left, or the folder is there already.
    """
    columns, prices = columns or Columns(), prices or PriceSettings()
    refuse_existing(folder, overwrite=overwrite)
    frame, dropped = read_interactions(
        interactions, columns, by_basket=_by_basket(settings), time_unit=settings.time_unit, bad_rows=settings.bad_rows
    )
    parts, report = make_sessions(frame, settings, dropped=dropped)
    made = {"made_by": "sessions", **settings.that_apply(), "column_names": asdict(columns)}
    table, types, raw_files = None, {}, {Path(interactions).name: sha256_of(interactions)}
    if items is not None:
        table, types, remarks = read_items_file(
            items, columns.item, category=prices.category_column, bad_rows=settings.bad_rows
        )
        occurring = {token for rows in parts.values() for token in chain(rows.targets, *rows.prefixes)}
        table = table[table["item_id"].isin(occurring)]
        if not len(table):
            raise DatasetError(
                f"{items} has none of the {len(occurring)} items of the sessions; are these the same ids?"
            )
        table, types, price_report = with_price_levels(table, types, prices)
        name = Path(items).name
        raw_files[f"items/{name}" if name in raw_files else name] = sha256_of(items)
        report = replace(
            report,
            remarks=(*report.remarks, *remarks),
            prices=price_report,
            n_items_without_row=len(occurring) - len(table),
        )
        made["prices"] = price_report.as_settings()
    made["counts"] = report.as_settings()
    write_session_folder(folder, parts, table, types, settings=made, raw_files=raw_files, overwrite=overwrite)
    return report
