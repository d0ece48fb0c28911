"""Files of interactions and of items: RecBole atomic files, or CSV or TSV with a header, read byte for byte."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np

from dataset_prep.price import PLAIN_NUMBER
from dataset_prep.session_folder import bad_id
from recbole_mm.data.files import read_table
from recbole_mm.errors import DatasetError

if TYPE_CHECKING:
    from pandas import DataFrame

SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
_ATOMIC = re.compile("[^:]*:(?:token|token_seq|float|float_seq)")  # a column in the header of an atomic file
_COLUMN = re.compile(r"[^:\s](?:[^:\t\r\n]*[^:\s])?")  # a name that it can have


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
    problems[f"its {columns.time} is no number (texts such as 2014-03-01 are not read)"] = ~np.isfinite(time)
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
    _check_unit(frame["time"].to_numpy(), line_of[~bad], time_unit, path)
    frame["time"] *= SECONDS[time_unit]
    return frame, dropped


def _check_unit(time: np.ndarray, line: np.ndarray, time_unit: str, path: Path) -> None:
    """Refuse times that look like another unit than the one given, such as milliseconds, or like two units."""
    powers = np.searchsorted([1e11, 1e14, 1e17], time, side="right")  # 1e11 s is the year 5138, 1e11 ms is 1973
    powers = np.where(time < 1e8, -1, powers)  # too small to tell
    found = {
        ("s", "ms", "us", "ns")[power]: int((powers == power).sum()) for power in range(4) if (powers == power).any()
    }
    if len(found) > 1:
        rarest = min(found, key=found.get)
        first = line[np.flatnonzero(powers == ("s", "ms", "us", "ns").index(rarest))[0]]
        listed = ", ".join(f"{n} look like {unit}" for unit, n in found.items())
        raise DatasetError(
            f"{path} has times in different units: {listed}, the first in {rarest} on line {first}; convert them"
        )
    unit = next(iter(found), time_unit)
    if unit != time_unit:
        remedy = f"pass --time-unit {unit}" if unit in SECONDS else "convert them to seconds"
        raise DatasetError(f"{path}: the times look like {unit}, such as {time.max():.0f}, not {time_unit}; {remedy}")


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
        unusable = [name for name in table if name != item and not _COLUMN.fullmatch(name)]
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
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            columns = file.readline().rstrip("\r\n").split("\t")
            if not all(_ATOMIC.fullmatch(column) for column in columns):
                file.seek(0)
                return _read_separated(file, path, optional, needed)
    except OSError as error:
        raise DatasetError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path}: not UTF-8; save the file as UTF-8 ({error.reason})") from error
    _check_needed([column.partition(":")[0] for column in columns], needed, path)
    return read_table(path, needed=list(needed.values()), optional=optional)


def _check_needed(names: Sequence[str], needed: dict[str, str], path: Path) -> None:
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


def _read_separated(file: TextIO, path: Path, optional: Sequence[str] | None, needed: dict[str, str]) -> DataFrame:
    import pandas as pd

    tabs = "\t" in file.readline()
    file.seek(0)
    format = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"strict": True}
    reader = csv.reader(file, **format)
    try:
        names = next(reader, [])
        if not names:
            raise DatasetError(f"{path} is empty, expected a header and rows")
        _check_needed(names, needed, path)
        if len(set(names)) < len(names):
            raise DatasetError(f"{path}: a column name occurs twice in {', '.join(names)}")
        kept = [i for i, name in enumerate(names) if optional is None or name in optional or name in needed.values()]
        rows, lines = [], []
        for row in reader:
            if len(row) == len(names):
                rows.append([row[i] for i in kept])
                lines.append(reader.line_num)
            elif row:
                raise DatasetError(
                    f"{path}, line {reader.line_num}: {len(row)} fields, the header has {len(names)}; "
                    f"fields are separated by one {'tab' if tabs else 'comma'}"
                )
    except csv.Error as error:
        raise DatasetError(f"{path}, line {reader.line_num}: no CSV ({error})") from error
    if not rows:
        raise DatasetError(f"{path} has a header but no rows")
    return pd.DataFrame(rows, columns=[names[i] for i in kept], index=np.array(lines) - 2, dtype=object)
