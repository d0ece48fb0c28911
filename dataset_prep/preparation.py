"""From a source to a prepared folder: read, clean, split, write.

source ─ cleaning ─┬─ leave-one-out ─ <name>.inter                        RecBole splits it
                   ├─ time ────────── <name>.{train,valid,test}.inter     histories of users, cut at two moments
                   └─ sessions ────── <name>.{train,valid,test}.inter     by day, gap, basket or user
                                    + <name>.item, rejected.tsv.gz, cold_items.txt, manifest.json
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from dataset_prep.cleaning import (
    WITHOUT,
    ItemCounts,
    ItemSpool,
    Ledger,
    compacted,
    count_items,
    drop_duplicates,
    drop_items,
    in_order,
    k_core,
    n_different,
    n_twins,
)
from dataset_prep.events import Events
from dataset_prep.folder_writer import refuse_existing, remove_leftovers, write_folder
from dataset_prep.locking import locked
from dataset_prep.preparation_report import REJECTED_FILE, PreparationReport
from dataset_prep.preparation_settings import PreparationSettings
from dataset_prep.price import PriceReport, PriceSettings, with_price_levels
from dataset_prep.protocols import split_by_time
from dataset_prep.session_folder import bad_id, check_parts, write_parts
from dataset_prep.session_settings import DEFAULT_LIST_LENGTH
from dataset_prep.sessions import make_sessions
from dataset_prep.sources import Source
from dataset_prep.sources.rejects import Rejects
from recbole_mm.data.cuts import Cuts, cuts_by_share
from recbole_mm.data.files import sha256_of, write_atomically, write_table
from recbole_mm.data.layout import SPLITS, Manifest
from recbole_mm.errors import DatasetError, SettingError

if TYPE_CHECKING:
    from pandas import DataFrame

BLOCK = 1 << 16  # interactions that are made into text at once

# ---------------------------------------------------------------- preparation


def prepare(
    source: Source,
    folder: Path,
    settings: PreparationSettings | None = None,
    *,
    prices: PriceSettings | None = None,
    overwrite: bool = False,
    keep: bool = False,
    finish: Callable[[Path], Any] | None = None,
) -> PreparationReport | None:
    """Make a prepared folder out of a source, complete or not at all; same source and settings, same bytes.

    Time is O(n log n) in the interactions and linear in the items; memory is linear in the interactions, of which only
    whole numbers are held, and in the items that are kept, of which only names, prices and categories are.

    Args:
        folder: to make; its files carry its name.
        overwrite: replace a folder that was prepared here before, with all its features.
        keep: leave a folder as it is that was made of the same files with the same settings; then there is no report.
        finish: adds to the folder when it has its manifest, before it gets its name.

    Raises:
        DatasetError: the folder is there or is being written, too many rows cannot be used, or a filter leaves nothing.
        SettingError: settings that the source does not allow.
        OSError: nothing can be written there; said before anything is read.
    """
    settings, prices = settings or PreparationSettings(), prices or PriceSettings()
    folder = Path(os.path.abspath(folder))
    with locked(folder):
        remove_leftovers(folder)
        cuts = settings.session_settings().cuts()
        asked = _asked(settings, prices, source, cuts)
        if keep and folder.is_dir():
            if _was_made_of(folder, asked, source):
                return None
            raise DatasetError(
                f"{folder} is there already, made of other files or with other settings; replace it with --overwrite, "
                "or choose another place with --out"
            )
        refuse_existing(folder, overwrite=overwrite)
        rejects = Rejects(max_share=settings.max_rejected)
        events = source.events(rejects)
        if settings.sessions == "basket" and events.basket is None:
            raise SettingError("sessions by basket need a source with baskets; name their column with --basket")
        set_aside = {file: dict(reasons) for file, reasons in rejects.counts.items()}
        dropped: dict[str, int] = {}
        for reasons in set_aside.values():
            for why, n in reasons.items():
                dropped[f"row set aside, {why}"] = dropped.get(f"row set aside, {why}", 0) + n
        ledger = Ledger(events.n + sum(dropped.values()), dropped, called={"--min-item-count": "--min-item"})
        if not events.n:
            raise DatasetError(f"no interaction of {ledger.n_read} can be used: {dropped or 'the source is empty'}")
        core = {"min_user": settings.min_user, "min_item": settings.min_item}
        events, n_duplicates = drop_duplicates(events, settings.duplicates, ledger)
        events = compacted(k_core(events, ledger, **core))
        with ItemSpool(events.items, folder.parent, ranges=prices.ranges) as spool:
            n_rows_before = sum(source.n_rows.values())
            for item in source.items(spool.codes, rejects):
                spool.add(item)
            if not spool.has["metadata"].any() and sum(source.n_rows.values()) > n_rows_before:
                raise DatasetError(
                    f"none of the {len(events.items)} items, such as {events.items[0]!r}, is in the metadata; "
                    "are these the same ids?"
                )
            without = {what: getattr(settings, f"without_{what}") for what in WITHOUT}
            events = k_core(drop_items(events, spool, without, ledger), ledger, **core)
            events = in_order(events)
            _check_ids(events, with_users=settings.protocol != "sessions")
            split = _SPLITTERS[settings.protocol](events, settings, cuts, ledger)
            table = _ItemTable(spool, split.kept, prices)
            report = PreparationReport(
                settings=settings,
                source=source.described,
                n_read=ledger.n_read,
                steps=ledger.steps,
                n_items=int(split.kept.sum()),
                n_duplicates=n_duplicates,
                items=table.counts,
                rejected={file: dict(reasons) for file, reasons in rejects.counts.items()},
                fixed=dict(sorted(source.fixed.items())),
                prices=table.prices,
                remarks=(*split.remarks, *_remarks(events, settings, n_duplicates, table.counts)),
                **split.counts,
            )

            def fill(partial: Path) -> None:
                split.write(partial)
                table.write(partial)
                if report.rejected:
                    rejects.write(partial / REJECTED_FILE)

            write_folder(
                folder, fill,
                settings={**report.as_settings(), "asked": asked}, raw_files=source.raw_files,
                overwrite=overwrite, finish=finish,
            )  # fmt: skip
    return report


def _asked(settings: PreparationSettings, prices: PriceSettings, source: Source, cuts: Cuts | None) -> str:
    """Hex digits that stand for everything but the content of the files; the cut points may come from a folder."""
    described = {name: value for name, value in source.described.items() if name != "licence"}
    everything = [settings.that_apply(), asdict(prices), described, cuts]
    return hashlib.sha256(json.dumps(everything, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _was_made_of(folder: Path, asked: str, source: Source) -> bool:
    manifest = Manifest.load(folder)
    if manifest.settings.get("asked") != asked or set(manifest.raw_files) != set(source.files):
        return False
    return all(sha256_of(path) == manifest.raw_files[name] for name, path in source.files.items())


def _check_ids(events: Events, *, with_users: bool) -> None:
    """Refuse names that could not be read again."""
    written = [("user", events.user, events.users)] if with_users else []
    for what, codes, names in (*written, ("item", events.item, events.items)):
        for name in _used(codes, names):
            if reason := bad_id(name):
                raise DatasetError(f"the {what} id {name!r} {reason}; rename it")


def _used(codes: np.ndarray, names: list[str]) -> list[str]:
    return [names[code] for code in np.flatnonzero(np.bincount(codes)).tolist()]


def _remarks(events: Events, settings: PreparationSettings, n_duplicates: int, items: ItemCounts) -> list[str]:
    """What is worth knowing, but for what `make_sessions` says already."""
    remarks = []
    if n_duplicates and settings.duplicates == "keep" and settings.protocol != "sessions":
        remarks.append(
            f"{n_duplicates:,} interactions are equal to an earlier one in user, item and time; "
            "--duplicates first drops them"
        )
    for what, codes, names in (("user", events.user, events.users), ("item", events.item, events.items)):
        twins = n_twins(_used(codes, names))
        if twins and (what, settings.protocol) != ("item", "sessions"):
            remarks.append(
                f"{twins:,} {what} ids differ from another only in case or composed letters; they are kept apart"
            )
    if 0 < items.n_rows < items.n:
        remarks.append(f"{items.n - items.n_rows:,} of {items.n:,} items have no metadata")
    if settings.protocol == "time" and settings.longest > DEFAULT_LIST_LENGTH:
        remarks.append(
            f"prefixes have up to {settings.longest} items: run with --MAX_ITEM_LIST_LENGTH={settings.longest}"
        )
    return remarks


# ---------------------------------------------------------------- protocols


@dataclass(frozen=True)
class _Split:
    """What a protocol made of the interactions.

    Attributes:
        kept: [N] bool, items that occur.
        counts: fields of the report.
        write: writes the files into a folder.
        remarks: on ties and the like.
    """

    kept: np.ndarray
    counts: dict[str, Any]
    write: Callable[[Path], None]
    remarks: tuple[str, ...] = ()


def _leave_one_out(events: Events, settings: PreparationSettings, cuts: Cuts | None, ledger: Ledger) -> _Split:
    order = np.lexsort((events.line, events.time, events.user))
    user, item = events.user[order], events.item[order]
    ends = np.append(np.flatnonzero(np.diff(user)) + 1, len(user))
    counts = np.diff(ends, prepend=0)
    from_end = np.repeat(ends, counts) - 1 - np.arange(len(user))
    part = np.where(np.repeat(counts, counts) >= 3, np.maximum(2 - from_end, 0), 0)
    n_items = len(events.items)
    cold = np.bincount(item[part == 0], minlength=n_items) == 0
    n_cold = {name: int(cold[item[part == number]].sum()) for number, name in enumerate(SPLITS) if number}
    parts = {"valid": "validation", "test": "test"}
    remarks = tuple(
        f"{n:,} {parts[name]} targets are items that no training history has" for name, n in n_cold.items() if n
    )

    def write(partial: Path) -> None:
        columns = {
            "user_id:token": _names(events.users, events.user),
            "item_id:token": _names(events.items, events.item),
            "timestamp:float": (time for block in _blocks(events.time) for time in block.tolist()),
        }
        write_table(partial / f"{partial.name}.inter", columns)

    equal, ties = _ties(user, events.time[order])
    return _Split(
        kept=np.bincount(events.item, minlength=n_items) > 0,
        counts={"n_users": len(counts), "n_interactions": events.n, "equal_times": equal, "n_cold": n_cold},
        write=write,
        remarks=(*ties, *remarks),
    )


def _time(events: Events, settings: PreparationSettings, cuts: Cuts | None, ledger: Ledger) -> _Split:
    if cuts is None:
        cuts = cuts_by_share(events.time, valid_share=settings.valid_share, test_share=settings.test_share)
    found = split_by_time(
        events, cuts, ledger,
        longest=settings.longest, cold_items=settings.cold_items, cold_share=settings.cold_share, seed=settings.seed,
    )  # fmt: skip
    equal, ties = _ties(found.events.user, found.events.time)
    counts = {
        "n_users": n_different(found.events.user),
        "n_interactions": found.events.n,
        "equal_times": equal,
        "parts": found.counts,
        "cuts": cuts,
        "n_cold": found.n_cold,
        "cold_items": tuple(found.cold),
        "n_drawn": found.n_drawn,
    }
    return _Split(
        kept=np.bincount(found.events.item, minlength=len(events.items)) > 0,
        counts=counts,
        write=lambda partial: write_parts(partial, found.parts, found.cold),
        remarks=ties,
    )


def _sessions(events: Events, settings: PreparationSettings, cuts: Cuts | None, ledger: Ledger) -> _Split:
    parts, report = make_sessions(_frame(events), settings.session_settings(), ledger=ledger)
    occurring = check_parts(parts)
    counts = {
        "n_users": n_different(events.user),
        "n_interactions": sum(part["interactions"] for part in report.parts.values()),
        "equal_times": report.equal_times,
        "parts": report.parts,
        "cuts": report.cuts,
        "n_cold": report.cold,
        "cold_items": report.cold_items,
        "n_drawn": report.n_drawn,
    }
    return _Split(
        kept=np.array([token in occurring for token in events.items], dtype=bool),
        counts=counts,
        write=lambda partial: write_parts(partial, parts, report.cold_items),
        remarks=report.remarks,
    )


_SPLITTERS = {"leave-one-out": _leave_one_out, "time": _time, "sessions": _sessions}


def _frame(events: Events) -> DataFrame:
    """Interactions as `make_sessions` takes them, in the order of the source; names are not repeated in memory."""
    import pandas as pd

    events = events.rows(np.argsort(events.line, kind="stable"))
    columns = {"user": (events.user, events.users), "item": (events.item, events.items)}
    if events.basket is not None:
        columns["basket"] = (events.basket, events.baskets)
    frame = {name: pd.Categorical.from_codes(codes, names) for name, (codes, names) in columns.items()}
    return pd.DataFrame({**frame, "time": events.time})


def _ties(user: np.ndarray, time: np.ndarray) -> tuple[float, tuple[str, ...]]:
    """Share of neighbours in a history at the same time, and a remark if there are any."""
    same = np.diff(user) == 0
    share = round(float((np.diff(time)[same] == 0).mean()), 6) if same.any() else 0.0
    remark = f"{100 * share:.1f} % of neighbours in a history have the same time: their order is that of the source"
    return share, (remark,) if share else ()


def _names(names: list[str], codes: np.ndarray) -> Iterator[str]:
    return (names[code] for block in _blocks(codes) for code in block.tolist())


def _blocks(values: np.ndarray) -> Iterator[np.ndarray]:
    """Parts of an array, so that only one of them is in memory as Python's numbers."""
    return (values[start : start + BLOCK] for start in range(0, len(values), BLOCK))


# ---------------------------------------------------------------- items


class _ItemTable:
    """The items that are kept, with their price levels; texts stay in the spool until they are written.

    Attributes:
        counts: what is known of them.
        prices: what became of the prices; None without items.
    """

    def __init__(self, spool: ItemSpool, kept: np.ndarray, settings: PriceSettings) -> None:
        from pandas import DataFrame

        self._spool, self._kept = spool, kept
        self.counts = count_items(spool, kept)
        self.types = {"item_id": "token", **self.counts.types}
        self.prices: PriceReport | None = None
        self._made: dict[str, list[str]] = {}
        if not self.counts.n_rows:
            return
        asked = {"price", settings.price_column, "categories", "category", settings.category_column, "price_level"}
        used = {name: kind for name, kind in self.types.items() if name in asked}
        columns: dict[str, list[str]] = {name: [] for name in used}
        for _, row, *_ in spool.rows(kept):
            for name, values in columns.items():
                values.append(row.get(name, ""))
        frame = DataFrame(columns or None, index=range(self.counts.n_rows), dtype=object)
        asked_for = settings != PriceSettings()
        frame, types, self.prices = with_price_levels(frame, used, settings, required=asked_for)
        self._made = {name: frame[name].tolist() for name in frame if name not in used}
        self.types |= types

    def write(self, folder: Path) -> None:
        """Write ``<name>.item``; nothing if no item has metadata."""
        if self.counts.n_rows:
            write_atomically(folder / f"{folder.name}.item", self._write)

    def _write(self, out: BinaryIO) -> None:
        out.write(_line(f"{name}:{kind}" for name, kind in self.types.items()))
        for number, (code, row, *_) in enumerate(self._spool.rows(self._kept)):
            made = {name: values[number] for name, values in self._made.items()}
            row = {**row, **made, "item_id": self._spool.items[code]}
            out.write(_line(row.get(name, "") for name in self.types))


def _line(fields: Iterable[str]) -> bytes:
    return ("\t".join(fields) + "\n").encode()
