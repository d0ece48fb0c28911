"""Sessions out of interactions: group, filter, cut, split by time, and write the rows that models train on.

    interactions ─ bad rows ─ duplicates ─ group ─ filters, until nothing changes ─ cut to the newest
                 ─ order ─ split ─ items that training has not ─ prefixes ─ <name>.{train,valid,test}.inter

Every interaction that is read is in a session of one part, or counted under the reason why it is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dataset_prep.cleaning import Ledger, n_different, n_twins
from dataset_prep.folder_writer import refuse_existing
from dataset_prep.interactions import Columns, read_interactions, read_items_file
from dataset_prep.locking import locked
from dataset_prep.price import PriceReport, PriceSettings, with_price_levels
from dataset_prep.protocols import dates_of, drawn_items
from dataset_prep.session_folder import Prefixes, Rows, write_session_folder
from dataset_prep.session_settings import DEFAULT_LIST_LENGTH, SessionSettings
from recbole_mm.data.cuts import Cuts, boundary
from recbole_mm.data.files import sha256_of
from recbole_mm.data.layout import SPLITS
from recbole_mm.errors import DatasetError

if TYPE_CHECKING:
    from pandas import DataFrame

DAY = 86_400  # seconds


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
        cold_items: these items, in the order of their first appearance.
        n_drawn: of them, taken out of training on purpose.
        cuts: the moments that part the sessions, by their last time; None for leave-one-out, or if a moment is on
            both sides.
        remarks: further things to know.
    """

    n_read: int
    dropped: dict[str, int]
    parts: dict[str, dict[str, int]]
    n_items: int
    n_duplicates: int
    equal_times: float
    cold: dict[str, int]
    cold_items: tuple[str, ...] = ()
    n_drawn: int = 0
    cuts: Cuts | None = None
    remarks: tuple[str, ...] = ()
    prices: PriceReport | None = None
    n_items_without_row: int | None = None

    def as_settings(self) -> dict[str, Any]:
        """For the manifest."""
        names = ("n_read", "dropped", "parts", "n_items", "n_duplicates", "equal_times", "cold", "n_items_without_row")
        cold = {"n_cold_items": len(self.cold_items), "n_drawn_cold_items": self.n_drawn}
        return {**{name: getattr(self, name) for name in names}, **(cold if self.cold_items else {})}

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
        if self.cold_items:
            drawn = f", {self.n_drawn} of them taken out of it" if self.n_drawn else ""
            lines.append(f"cold items: {len(self.cold_items)} that training has not{drawn}")
        if self.cuts:
            lines.append(f"cut points: {dates_of(self.cuts)}")
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

    def rows(self, wanted: np.ndarray) -> _Events:
        return _Events(*(getattr(self, column.name)[wanted] for column in fields(self)))


def make_sessions(
    interactions: DataFrame, settings: SessionSettings, *, ledger: Ledger | None = None
) -> tuple[dict[str, Rows], SessionReport]:
    """Sessions of all three parts. O(n log n) for n interactions, and a few passes for the filters.

    Args:
        interactions: columns item, time [seconds], and user or basket or both, in the order of the file; valid ids.
        ledger: what was read and dropped before.

    Returns:
        Rows of "train", "valid" and "test", the sessions of each in the order of their last time, and a report.

    Raises:
        DatasetError: a filter or the split leaves nothing.
    """
    ledger = ledger or Ledger(len(interactions))
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
        events = events.rows(np.lexsort((key, events.session)))

    part, cuts, remarks = _split(events, settings)
    events, part, n_drawn = _take_out(events, part, tokens, settings, ledger)
    events, part, cold, cold_items = _treat_cold(events, part, settings, ledger)
    parts = _rows(events, part, tokens, settings)
    counts = {
        name: {
            "sessions": len(set(parts[name].session_ids)),
            "interactions": int((part == number).sum()),
            "rows": len(parts[name].targets),
            "items": n_different(events.item[part == number]),
        }
        for number, name in enumerate(SPLITS)
    }
    remarks += _remarks(settings, tokens, equal_times, n_duplicates)
    report = SessionReport(
        n_read=ledger.n_read,
        dropped=ledger.dropped,
        parts=counts,
        n_items=n_different(events.item),
        n_duplicates=n_duplicates,
        equal_times=round(equal_times, 6),
        cold=cold,
        cold_items=tuple(tokens[item] for item in cold_items),
        n_drawn=n_drawn,
        cuts=cuts,
        remarks=tuple(remarks),
    )
    return parts, report


def _group(interactions: DataFrame, settings: SessionSettings, ledger: Ledger) -> tuple[_Events, list[str], int]:
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
        ledger.add("duplicates", "equal to an earlier row", len(item) - len(rows))
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


def _filter(events: _Events, settings: SessionSettings, ledger: Ledger) -> _Events:
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
    return _Events(session, events.item, events.time, events.line).rows(order)


# ---------------------------------------------------------------- split


def _split(events: _Events, settings: SessionSettings) -> tuple[np.ndarray, Cuts | None, list[str]]:
    """0, 1 or 2 for each interaction: training, validation, test; the moments between them; remarks."""
    starts, counts = _bounds(events.session)
    n = len(starts)
    if settings.split == "leave-one-out":
        long_enough = np.repeat(counts >= 4, counts)
        if not long_enough.any():
            raise DatasetError(f"none of {n} sessions has 4 items, which leave-one-out needs; try --split time")
        return np.where(long_enough, np.maximum(2 - _from_end(events), 0), 0), None, []
    if n < 3:
        raise DatasetError(f"{n} sessions are left, and three parts need one each; loosen the filters")
    last = np.maximum.reduceat(events.time, starts)
    if (cuts := settings.cuts()) is not None:
        part = cuts.parts(last)
        if empty := [name for number, name in enumerate(SPLITS) if number not in part]:
            raise DatasetError(
                f"none of {n} sessions is left for {', '.join(empty)}: they end between {last.min():.15g} and "
                f"{last.max():.15g} unix seconds, and the cut points are: {dates_of(cuts)}"
            )
        return np.repeat(part, counts), cuts, []
    remarks = []
    changes = np.flatnonzero(np.diff(last)) + 1
    n_test, n_valid = (int(n * share + 0.5) for share in (settings.test_share, settings.valid_share))
    test, tied_test = boundary(changes, wanted=n - n_test, low=2, high=n - 1)
    valid, tied_valid = boundary(changes, wanted=n - n_test - n_valid, low=1, high=test - 1)
    if tied_test or tied_valid:
        remarks.append("sessions that end at the same time are in different parts, or a part would be empty")
    cuts = None if tied_test or tied_valid else Cuts(float(last[valid]), float(last[test]))
    part = (np.arange(n) >= valid).astype(np.int64) + (np.arange(n) >= test)
    return np.repeat(part, counts), cuts, remarks


def _take_out(
    events: _Events, part: np.ndarray, tokens: list[str], settings: SessionSettings, ledger: Ledger
) -> tuple[_Events, np.ndarray, int]:
    """Without the training interactions of some items, and how many items these are."""
    if not settings.cold_share:
        return events, part, 0
    drawn = drawn_items(events.item, part, tokens, share=settings.cold_share, seed=settings.seed)
    filters = [("taken out of training by --cold-share", lambda: (part > 0) | ~drawn[events.item])]
    if settings.repeats == "drop" and settings.session_order == "given":
        filters.append(("directly after the same item", lambda: ~_repeated(events)))
    filters.append(("training session of one item after that", lambda: np.bincount(events.session)[events.session] > 1))
    for reason, wanted in filters:
        kept = wanted()
        events, part = ledger.keep(events, kept, reason, "--cold-share"), part[kept]
    if part.all():
        raise DatasetError(f"--cold-share {settings.cold_share} leaves no session for train; choose a lower share")
    return events, part, int(drawn.sum())


def _treat_cold(
    events: _Events, part: np.ndarray, settings: SessionSettings, ledger: Ledger
) -> tuple[_Events, np.ndarray, dict[str, int], list[int]]:
    """Drop or keep what training has not; of what is kept, interactions by part, and the items."""

    def keep(wanted: np.ndarray, reason: str) -> None:
        nonlocal events, part
        events, part = ledger.keep(events, wanted, reason, "--cold-items drop"), part[wanted]

    trained = np.zeros(events.item.max() + 1, dtype=bool)
    trained[events.item[part == 0]] = True
    seen = (part == 0) | trained[events.item]
    cold = {name: int((~seen & (part == number)).sum()) for number, name in enumerate(SPLITS) if number}
    if settings.cold_items == "keep":
        return events, part, cold, np.unique(events.item[~seen]).tolist()

    keep(seen, "validation or test item that training has not")
    if settings.repeats == "drop" and settings.session_order == "given":
        keep(~_repeated(events), "directly after the same item")
    keep(np.bincount(events.session)[events.session] >= 2, "validation or test session of one item after that")
    for number, name in enumerate(SPLITS):
        if not (part == number).any():
            raise DatasetError(
                f"--cold-items drop leaves no session for {name}: too few of its items occur in training; "
                "use --cold-items keep, a larger share, or ask for fewer interactions of an item"
            )
    return events, part, {name: 0 for name in cold}, []


# ---------------------------------------------------------------- rows


def prefix_rows(session_ids: Sequence[str], sequences: Sequence[Sequence[str]], *, every: bool) -> Rows:
    """Rows of a part out of whole sessions.

    Args:
        session_ids: one per session.
        sequences: items of each session, at least 2.
        every: a row for each item after the first; else one per session, whose target is the last item.
    """
    counts = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    tokens = list(chain.from_iterable(sequences))
    ends = np.cumsum(counts)
    starts = ends - counts
    first_target = starts + 1 if every else ends - 1
    n_rows = ends - first_target
    targets = np.arange(n_rows.sum()) + np.repeat(first_target - (np.cumsum(n_rows) - n_rows), n_rows)
    return Rows(
        list(chain.from_iterable(map(repeat, session_ids, n_rows.tolist()))),
        Prefixes(tokens, np.arange(len(tokens)), np.repeat(starts, n_rows), targets),
        [tokens[target] for target in targets.tolist()],
    )


def _rows(events: _Events, part: np.ndarray, tokens: list[str], settings: SessionSettings) -> dict[str, Rows]:
    parts = {}
    for number, name in enumerate(SPLITS):
        mine, every = part == number, settings.prefixes == "all" or (settings.prefixes == "train" and number == 0)
        if settings.split == "leave-one-out" and number:  # the sessions that have a target here, up to it
            mine, every = (part <= number) & np.isin(events.session, events.session[mine]), False
        here = events.rows(mine)
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
    twins = n_twins(tokens)
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
    finish: Callable[[Path], Any] | None = None,
) -> SessionReport:
    """Make a prepared folder of sessions out of a file of interactions and a table of items.

    Price levels are made of the items that occur in the sessions.

    Args:
        folder: to make; its files carry its name.
        interactions, items: RecBole atomic files, or CSV or TSV with a header; ``items`` may be None.
        finish: adds to the folder when it has its manifest, before it gets its name.

    Raises:
        DatasetError: a file or a row that cannot be used, nothing is left, or the folder is there already.
    """
    columns, prices = columns or Columns(), prices or PriceSettings()
    with locked(folder):
        refuse_existing(folder, overwrite=overwrite)
        frame, dropped = read_interactions(
            interactions,
            columns,
            by_basket=_by_basket(settings),
            time_unit=settings.time_unit,
            bad_rows=settings.bad_rows,
        )
        ledger = Ledger(len(frame) + sum(dropped.values()), dropped)
        parts, report = make_sessions(frame, settings, ledger=ledger)
        made = {"made_by": "sessions", **settings.that_apply(), "column_names": asdict(columns)}
        made |= {"cuts": report.cuts._asdict()} if report.cuts else {}
        table, types, raw_files = None, {}, {Path(interactions).name: sha256_of(interactions)}
        if items is not None:
            table, types, remarks = read_items_file(
                items, columns.item, category=prices.category_column, bad_rows=settings.bad_rows
            )
            occurring = set().union(*(rows.different() for rows in parts.values()))
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
        write_session_folder(
            folder, parts, table, types,
            settings=made, raw_files=raw_files, cold=report.cold_items, overwrite=overwrite,
            finish=finish,
        )  # fmt: skip
        return report
