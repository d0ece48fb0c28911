"""A folder of sessions that are split already: how it is written, and how price levels are added to its items.

<name>/<name>.{train,valid,test}.inter    session_id:token  item_id_list:token_seq  item_id:token
<name>/<name>.item                        the items that occur, with their columns, price_level:token, category:token
<name>/cold_items.txt                     items that no training row has, one a line; if there are any and they are kept
<name>/manifest.json                      hashes, settings, counts; written last
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import eq
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dataset_prep.features import read_items
from dataset_prep.folder_writer import write_folder
from dataset_prep.locking import locked
from dataset_prep.price import PriceReport, PriceSettings, with_price_levels
from recbole_mm.data.files import file_info, write_atomically, write_table
from recbole_mm.data.layout import PADDING_TOKEN, SPLITS, Manifest
from recbole_mm.errors import DatasetError, SettingError

if TYPE_CHECKING:
    from pandas import DataFrame

COLD_FILE = "cold_items.txt"
SEPARATOR = re.compile(r"\s")  # a space parts the items of a list, a tab or line break the fields of a file


class Prefixes(Sequence[list[str]]):
    """The items before each target, taken out of whole histories when they are asked for: 16 bytes each.

    Args:
        tokens: names of the items.
        items: [n] int, positions in ``tokens``: histories beside each other, oldest first.
        starts, ends: [R] int, each prefix is ``items[start:end]``.
    """

    def __init__(self, tokens: Sequence[str], items: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> None:
        self._tokens, self._items, self._starts, self._ends = tokens, items, starts, ends

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, row: int) -> list[str]:
        return [self._tokens[item] for item in self._items[self._starts[row] : self._ends[row]].tolist()]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(eq, self, other))

    def different(self) -> set[str]:
        """All items that occur in some prefix. O(n + R)."""
        n_covering = np.zeros(len(self._items) + 1, dtype=np.int64)
        np.add.at(n_covering, self._starts, 1)
        np.add.at(n_covering, self._ends, -1)
        covered = np.cumsum(n_covering[:-1]) > 0
        return {self._tokens[item] for item in np.unique(self._items[covered]).tolist()}


class Rows(NamedTuple):
    """Rows of one part, each a prefix of a session and the item that comes next.

    Attributes:
        session_ids: the same for all rows of a session.
        prefixes: item tokens, oldest first, at least one each.
        targets: the item after each prefix.
    """

    session_ids: Sequence[str]
    prefixes: Sequence[list[str]]
    targets: Sequence[str]

    def different(self) -> set[str]:
        """All items that occur."""
        if isinstance(self.prefixes, Prefixes):
            return self.prefixes.different().union(self.targets)
        return set(self.targets).union(*self.prefixes)


def write_session_folder(
    folder: Path,
    parts: dict[str, Rows],
    items: DataFrame | None,
    item_types: dict[str, str],
    *,
    settings: dict[str, Any],
    raw_files: dict[str, str],
    cold: Sequence[str] = (),
    overwrite: bool = False,
    finish: Callable[[Path], Any] | None = None,
) -> None:
    """Write a prepared folder of sessions, complete or not at all; same arguments, same bytes.

    Args:
        folder: to make; its files carry its name.
        parts: rows of "train", "valid" and "test".
        items: a row per item with the column item_id, each item once; other items than those in ``parts`` are left
            out, the order is kept. Missing values are None, NaN or "". None writes no ``.item``.
        item_types: columns to write and their types, such as ``{"item_id": "token", "title": "token_seq"}``.
        settings, raw_files, overwrite, finish: of `write_folder`.
        cold: items that no training row has, to be listed in ``cold_items.txt``.

    Raises:
        DatasetError: the folder is there, or holds files that no manifest names; a part without rows, an empty
            prefix, an id that is empty, holds a space or is RecBole's padding; an item with two rows.
        ValueError: other parts than the three, lists of different lengths, a column of ``item_types`` is missing.
    """
    occurring = check_parts(parts)
    if items is not None:
        items = _occurring_items(items, item_types, occurring)

    def fill(partial: Path) -> None:
        write_parts(partial, parts, cold)
        if items is not None:
            columns = {f"{name}:{kind}": list(items[name]) for name, kind in item_types.items()}
            write_table(partial / f"{partial.name}.item", columns)

    write_folder(folder, fill, settings=settings, raw_files=raw_files, overwrite=overwrite, finish=finish)


def write_parts(folder: Path, parts: dict[str, Rows], cold: Sequence[str] = ()) -> None:
    """Write the rows of a split folder, and its list of cold items if there are any."""
    for part in SPLITS:
        rows = parts[part]
        columns = {
            "session_id:token": rows.session_ids,
            "item_id_list:token_seq": map(" ".join, rows.prefixes),
            "item_id:token": rows.targets,
        }
        write_table(folder / f"{folder.name}.{part}.inter", columns)
    if cold:
        write_atomically(folder / COLD_FILE, lambda out: out.write("".join(f"{token}\n" for token in cold).encode()))


def check_parts(parts: dict[str, Rows]) -> set[str]:
    """Refuse rows that could not be read again; returns all item tokens."""
    if set(parts) != set(SPLITS):
        raise ValueError(f"parts are {sorted(parts)}, expected {list(SPLITS)}")
    occurring: set[str] = set()
    for part in SPLITS:
        rows = parts[part]
        if not len(rows.session_ids) == len(rows.prefixes) == len(rows.targets):
            raise ValueError(f"{part}: {[len(column) for column in rows]} values, expected the same number in each")
        if not rows.targets:
            raise DatasetError(f"no session is left for {part}; every part needs at least one row")
        for row, prefix in enumerate(rows.prefixes, start=1):
            if not prefix:
                raise DatasetError(
                    f"{part}, row {row}: the prefix is empty; it needs at least one item before the next"
                )
        here = rows.different()
        for token in sorted(here | set(rows.session_ids), key=str):
            if reason := bad_id(token):
                raise DatasetError(f"{part}: the id {token!r} {reason}; rename it")
        occurring |= here
    return occurring


def bad_id(token: str) -> str | None:
    """Why a token cannot be an id in a list of items, or None."""
    if token == "":
        return "is empty"
    if token == PADDING_TOKEN:
        return "is RecBole's padding token"
    if SEPARATOR.search(token):
        return "holds a space, tab or line break, which parts the items of a list"
    return None


def _occurring_items(items: DataFrame, item_types: dict[str, str], occurring: set[str]) -> DataFrame:
    if missing := [name for name in ("item_id", *item_types) if name not in items]:
        raise ValueError(f"items has no column {', '.join(missing)}, only {', '.join(map(str, items.columns))}")
    items = items[items["item_id"].isin(occurring)]
    twice = items["item_id"][items["item_id"].duplicated()].unique()
    if len(twice):
        raise DatasetError(f"{len(twice)} items occur twice, such as {list(twice[:3])}; keep one row each")
    return items


# ---------------------------------------------------------------- price levels


def add_price_levels(folder: Path, settings: PriceSettings | None = None) -> PriceReport:
    """Add the columns price_level and category to ``<name>.item``, or replace those made here before.

    All other columns stay as they are. The settings go into the manifest. Levels depend on all items of the file.

    Args:
        folder: any dataset folder with a ``.item``.

    Raises:
        DatasetError: no ``.item``, a missing column, no item with a price, or a column of this name that was not made
            here and would change.
        SettingError: no price levels are asked for.
    """
    folder, settings = Path(folder), settings or PriceSettings()
    if settings.n_levels == 0:
        raise SettingError("0 price levels, expected at least 1")
    Manifest.load(folder)  # refuses what is no folder
    with locked(folder):
        return _add_price_levels(folder, settings)


def _add_price_levels(folder: Path, settings: PriceSettings) -> PriceReport:
    items, manifest = read_items(folder), Manifest.load(folder)
    types = items.attrs["types"]
    ours = manifest.settings.get("prices", {}).get("columns", [])
    others = {name: kind for name, kind in types.items() if name not in ours}
    items, types, report = with_price_levels(items[list(others)], others, settings)
    if not report.columns:
        raise DatasetError(f"{folder}: the items have no column price, only {', '.join(others)}; try --price-column")

    file = f"{folder.name}.item"
    listed = file in manifest.files
    if listed:  # first forget it: a crash below must not leave a new file under an old hash
        rest = {name: info for name, info in manifest.files.items() if name != file}
        replace(manifest, files=rest).save(folder)
    write_table(folder / file, {f"{name}:{kind}": items[name].tolist() for name, kind in types.items()})
    files = {**manifest.files, file: file_info(folder / file)} if listed else manifest.files
    made = {**manifest.settings, "prices": report.as_settings()}
    replace(manifest, files=files, settings=made).save(folder)
    return report
