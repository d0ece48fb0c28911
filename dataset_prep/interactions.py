"""Files of interactions and of items: RecBole atomic files, or CSV or TSV with a header, read byte for byte."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dataset_prep.price import PLAIN_NUMBER
from dataset_prep.session_folder import bad_id
from dataset_prep.sources.table_rows import TableRows
from dataset_prep.sources.times import SECONDS, check_unit
from recbole_mm.errors import DatasetError

if TYPE_CHECKING:
    from pandas import DataFrame

COLUMN = re.compile(r"[^:\s](?:[^:\t\r\n]*[^:\s])?")  # a name that a column of an atomic file can have


@dataclass(frozen=True)
class Columns:
    """Names of the columns in the interactions; item is its name in the table of items too."""

    user: str = "user_id"
    item: str = "item_id"
    time: str = "timestamp"
    basket: str = "basket_id"


def read_interactions(
    path: Path, columns: Columns, *, by_basket: bool = False, time_unit: str = "s", bad_rows: str = "refuse"
) -> tuple[DataFrame, dict[str, int]]:
    """The rows of a file that can be used, and the number of others by reason.

    Args:
        by_basket: baskets are needed, and users only if ``columns`` names them otherwise than usual; an empty user is
            one of nobody known. Else users are needed, and baskets are not read.
        time_unit: a key of ``SECONDS``.
        bad_rows: "refuse" or "drop" rows that cannot be used.

    Returns:
        Columns item, time [seconds], and user and basket as far as they are there, in the order of the file.

    Raises:
        DatasetError: a missing column, bad rows unless they are to be dropped, times in different units.
    """
    import pandas as pd

    needed = {"item": columns.item, "time": columns.time}
    needed |= {"basket": columns.basket} if by_basket else {"user": columns.user}
    if columns.user != Columns.user:
        needed["user"] = columns.user
    table = _read_any(path, [columns.user] if by_basket else [], needed=needed)
    names = {role: name for role, name in {**needed, "user": columns.user}.items() if name in table}
    frame = pd.DataFrame({role: table[name] for role, name in names.items()}, dtype=object)

    problems: dict[str, np.ndarray] = {}
    codes, tokens = pd.factorize(frame["item"])
    reasons = np.array([bad_id(token) or "" for token in tokens], dtype=object)[codes]
    for reason in dict.fromkeys(reasons[reasons != ""]):
        problems[f"its {columns.item} {reason}"] = reasons == reason
    owner = "basket" if by_basket else "user"
    problems[f"its {names[owner]} is empty"] = (frame[owner] == "").to_numpy()
    time = pd.to_numeric(frame["time"], errors="coerce").to_numpy(dtype=np.float64)
    dates = "dates such as 2014-03-01 are read by: python -m dataset_prep table --time-unit iso"
    problems[f"its {columns.time} is no number ({dates})"] = ~np.isfinite(time)
    problems[f"its {columns.time} is negative"] = time < 0

    line_of = frame.index.to_numpy() + 2
    bad, dropped, lines = np.zeros(len(frame), dtype=bool), {}, []
    for reason, rows in problems.items():
        rows = rows & ~bad
        if rows.any():
            row = int(np.flatnonzero(rows)[0])
            shown = ", ".join(f"{name} {str(frame[role].iloc[row])[:40]!r}" for role, name in names.items())
            lines.append(f"  - line {line_of[row]}: {reason} ({rows.sum()} such rows): {shown}")
            dropped[reason] = int(rows.sum())
            bad |= rows
    if lines and bad_rows == "refuse":
        raise DatasetError(
            "\n".join([f"{path} has rows that cannot be used:", *lines, "  drop them with --bad-rows drop"])
        )
    frame = frame[~bad].reset_index(drop=True)
    # Python's float, because pandas before 3 reads some decimals with a wrong last bit.
    frame["time"] = frame["time"].to_numpy(dtype=object).astype(np.float64)
    check_unit(frame["time"].to_numpy(), line_of[~bad], time_unit, path)
    frame["time"] *= SECONDS[time_unit]
    return frame, dropped


def read_items_file(
    path: Path, item: str, *, category: str | None = None, bad_rows: str = "refuse"
) -> tuple[DataFrame, dict[str, str], list[str]]:
    """The table of items with the column item_id, its types, and remarks on what was left out.

    In a CSV, ``category`` (and the column called category) is one name, which may hold spaces; categories is a list.

    Args:
        item: the column with the item ids.
        bad_rows: "refuse" or "drop" second rows of an item that differ from its first one.

    Raises:
        DatasetError: a file that cannot be read, no such column, or an item with different rows.
    """
    table = _read_any(path, None, needed={"item": item})
    types, remarks = dict(table.attrs.get("types") or {}), []
    if not types:  # a CSV
        unusable = [name for name in table if name != item and not COLUMN.fullmatch(name)]
        table = table.drop(columns=unusable)
        if unusable:
            remarks.append(f"columns without a usable name were left out: {', '.join(map(repr, unusable))}")
        for name in table:
            table[name] = table[name].str.replace(r"\s+", " ", regex=True).astype(object)  # atomic files hold no breaks
            number = all(PLAIN_NUMBER.fullmatch(text) for text in table[name])
            single = name in ("category", category) and name != "categories"
            types[name] = "token" if single else "float" if number else "token_seq"
    types = {"item_id": "token", **{name: kind for name, kind in types.items() if name != item}}
    if item != "item_id" and "item_id" in table:
        raise DatasetError(f"{path} has both columns {item} and item_id; remove or rename item_id")
    table = table.rename(columns={item: "item_id"})[list(types)]
    table = table.drop_duplicates(ignore_index=False)
    again = table["item_id"].duplicated()
    if again.any() and bad_rows == "refuse":
        second = table.index[again][0]
        token = table["item_id"][second]
        first = table.index[table["item_id"] == token][0]
        raise DatasetError(
            f"{path}: item {token!r} has different rows on lines {first + 2} and {second + 2} ({again.sum()} such rows)"
            "; keep one row each, or the first ones with --bad-rows drop"
        )
    if again.any():
        remarks.append(f"{again.sum()} second rows of items were dropped")
    return table[~again], types, remarks


def _read_any(path: Path, optional: Sequence[str] | None, *, needed: dict[str, str]) -> DataFrame:
    """Text columns of a RecBole atomic file, a CSV or a TSV, the row of line 2 numbered 0.

    Those of an atomic file have ``.attrs["types"]``.
    """
    import pandas as pd

    reader = TableRows(path, None)
    if reader.kind == "parquet":
        raise DatasetError(f"{path} is Parquet, expected an atomic file, CSV or TSV; convert it")
    names = reader.names
    check_needed(names, needed, path)
    kept = [i for i, name in enumerate(names) if optional is None or name in optional or name in needed.values()]
    rows, lines = [], []
    for line, row in reader:
        rows.append([row[i] for i in kept])
        lines.append(line)
    frame = pd.DataFrame(rows, columns=[names[i] for i in kept], index=np.array(lines) - 2, dtype=object)
    frame.attrs["types"] = {names[i]: reader.types[names[i]] for i in kept if names[i] in reader.types}
    return frame


def check_needed(names: Sequence[str], needed: dict[str, str], path: Path) -> None:
    """Refuse a table that lacks a column.

    Args:
        names: columns of the table.
        needed: columns by role, such as ``{"user": "user_id"}``; the role is the option that names the column.

    Raises:
        DatasetError: naming the columns found, and the option.
    """
    for role, name in needed.items():
        if name not in names:
            hint = f"name it with --{role}, such as --{role} {names[0]}"
            if role == "user":
                hint += "; without users, " + (
                    "leave --user out" if "basket" in needed else "group with --sessions basket"
                )
            if len(names) == 1:
                hint = "fields are separated by one comma or tab; convert the file"
            raise DatasetError(f"{path} has no column {name}; its columns are {', '.join(names)}\n  {hint}")
