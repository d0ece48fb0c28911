"""A folder of sessions that are split already: how it is written, and how price levels are added to its items.

<name>/<name>.{train,valid,test}.inter    session_id:token  item_id_list:token_seq  item_id:token
<name>/<name>.item                        the items that occur, with their columns, price_level:token, category:token
<name>/manifest.json                      hashes, settings, counts; written last
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dataset_prep.features import read_items
from dataset_prep.price import PriceReport, PriceSettings, with_price_levels
from recbole_mm.data.files import file_info, write_table
from recbole_mm.data.layout import PADDING_TOKEN, SPLITS, Manifest
from recbole_mm.errors import DatasetError, SettingError

if TYPE_CHECKING:
    from pandas import DataFrame

SEPARATOR = re.compile(r"\s")  # a space parts the items of a list, a tab or line break the fields of a file


class Rows(NamedTuple):
    """Rows of one part, each a prefix of a session and the item that comes next.

    Attributes:
        session_ids: the same for all rows of a session.
        prefixes: item tokens, oldest first, at least one each.
        targets: the item after each prefix.
    """

    session_ids: list[str]
    prefixes: list[list[str]]
    targets: list[str]


def write_session_folder(
    folder: Path,
    parts: dict[str, Rows],
    items: DataFrame | None,
    item_types: dict[str, str],
    *,
    settings: dict[str, Any],
    raw_files: dict[str, str],
    overwrite: bool = False,
) -> None:
    """Write a prepared folder of sessions, complete or not at all; same arguments, same bytes.

    Everything is made in a folder beside it, which is renamed at the end.

    Args:
        folder: to make; its files carry its name.
        parts: rows of "train", "valid" and "test".
        items: a row per item with the column item_id, each item once; other items than those in ``parts`` are left
            out, the order is kept. Missing values are None, NaN or "". None writes no ``.item``.
        item_types: columns to write and their types, such as ``{"item_id": "token", "title": "token_seq"}``.
        settings: goes into the manifest, how the parts were made.
        raw_files: sha256 of the sources, by file name; goes into the manifest.
        overwrite: replace a folder that was prepared here before, with all its features.

    Raises:
        DatasetError: the folder is there, or holds files that no manifest names; a part without rows, an empty
            prefix, an id that is empty, holds a space or is RecBole's padding; an item with two rows.
        ValueError: other parts than the three, lists of different lengths, a column of ``item_types`` is missing.
    """
    folder = Path(os.path.abspath(folder))
    refuse_existing(folder, overwrite=overwrite)
    occurring = _check_parts(parts)
    if items is not None:
        items = _occurring_items(items, item_types, occurring)

    workshop = folder.parent / f".partial-{folder.name}-{os.getpid()}"
    partial = workshop / folder.name
    try:
        partial.mkdir(parents=True)
        for part in SPLITS:
            rows = parts[part]
            columns = {
                "session_id:token": rows.session_ids,
                "item_id_list:token_seq": [" ".join(prefix) for prefix in rows.prefixes],
                "item_id:token": rows.targets,
            }
            write_table(partial / f"{folder.name}.{part}.inter", columns)
        if items is not None:
            columns = {f"{name}:{kind}": list(items[name]) for name, kind in item_types.items()}
            write_table(partial / f"{folder.name}.item", columns)
        files = {path.name: file_info(path) for path in sorted(partial.iterdir())}
        Manifest(name=folder.name, files=files, settings=settings, raw_files=raw_files).save(partial)
        put_in_place(partial, folder, old=workshop / "replaced")
    finally:
        shutil.rmtree(workshop, ignore_errors=True)


def place_of(out: Path, name: str) -> Path:
    """The folder of this name in another one.

    Raises:
        SettingError: no name, or one that leads elsewhere.
    """
    if not name or name != Path(name).name or name.startswith("."):
        raise SettingError(f"--name is {name!r}, expected the name of a folder without a path; see --out")
    return Path(out) / name


def refuse_existing(folder: Path, *, overwrite: bool) -> None:
    """Refuse a place that is taken; with ``overwrite``, refuse only what was not prepared here.

    Raises:
        DatasetError: naming what is in the way.
    """
    folder = Path(folder)
    if not folder.exists() and not folder.is_symlink():
        return
    elsewhere = "choose another place with --out or another --name"
    if folder.is_symlink() or not folder.is_dir():
        raise DatasetError(f"{folder} is there already and is no folder; {elsewhere}")
    if not overwrite:
        raise DatasetError(f"{folder} is there already; replace it with --overwrite, or {elsewhere}")
    known = {*Manifest.load(folder).files, "manifest.json"}
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    if foreign := [file for file in found if file not in known]:
        raise DatasetError(
            f"{folder} cannot be replaced: its manifest does not name {', '.join(foreign[:3])} "
            f"({len(foreign)} such files); move them away, or {elsewhere}"
        )


def _check_parts(parts: dict[str, Rows]) -> set[str]:
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
        here = set(rows.targets).union(*rows.prefixes)
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


def put_in_place(partial: Path, folder: Path, *, old: Path) -> None:
    """Rename a finished folder; the one that was there goes to ``old``, and comes back if that fails."""
    if folder.exists():
        folder.rename(old)
    try:
        partial.rename(folder)
    except BaseException:
        if old.exists():
            old.rename(folder)
        raise


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
