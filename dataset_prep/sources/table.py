"""Anyone's interactions and catalogue: CSV, TSV, RecBole atomic files or Parquet, with names for the columns."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import date, datetime
from pathlib import Path
from typing import Any

from dataset_prep.cleaning import COLUMNS
from dataset_prep.events import EventBuilder, Events
from dataset_prep.interactions import COLUMN, Columns, check_needed
from dataset_prep.sources import Item, as_paths, named_files
from dataset_prep.sources.first_rows import FirstRows
from dataset_prep.sources.ids import id_problem
from dataset_prep.sources.rejects import Rejects
from dataset_prep.sources.table_rows import TableRows
from dataset_prep.sources.times import LATEST, PER_SECOND, UTC, bad_time, check_unit, seconds_of_date
from recbole_mm.errors import DatasetError, SettingError, nearest

TIME_UNITS = (*PER_SECOND, "iso")
ROLES = ("title", "brand", "categories", "category", "description", "price", "image", "images", "image_urls")
_LISTS = ("categories", "images", "image_urls")
_SEPARATORS = ",;|"
_TAKEN = ("user_id", "item_id", "timestamp", "session_id", "item_id_list")  # columns of the interactions in a folder
WHOLE = 2**53  # whole numbers below it are exact in a float
_SCHEME = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):")  # a single letter is a drive
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")


class TableSource:
    """Two tables as a `Source`; compressed text is read as well. Rows are streamed.

    Args:
        interactions: one file or several with the same columns.
        items: one file or several; None leaves items without any description.
        columns: names of the columns of the interactions; the item's is its name among the items too, unless
            ``item_columns`` has the role "item".
        item_columns: column by role (``ROLES``), where the names differ from the roles; several columns of a role are a
            list, from the broadest category to the finest. A column without a role goes to `Item.more`.
        category_separator: parts the names in the column of categories, such as ">" or "|"; None: blanks. The column
            category holds one name, which is used where there are no categories.
        time_unit: "s", "ms", "us" since 1970, or "iso" for dates such as 2018-09-20 or 2018-09-20T12:30:00+02:00 (UTC
            unless they tell otherwise). Timestamps of Parquet need none.
        with_baskets: read the column of baskets. Then there need not be users (unless ``columns`` names them), and an
            empty user is nobody known.
        progress: show bars on stderr.

    Raises:
        DatasetError: an unreadable file, or a missing column; names those found.
        SettingError: an unknown role or unit, an empty separator.
    """

    def __init__(
        self,
        interactions: Path | Sequence[Path],
        items: Path | Sequence[Path] | None = None,
        *,
        columns: Columns | None = None,
        item_columns: Mapping[str, str | Sequence[str]] | None = None,
        category_separator: str | None = None,
        time_unit: str = "s",
        with_baskets: bool = False,
        progress: bool = True,
    ) -> None:
        if time_unit not in TIME_UNITS:
            raise SettingError(f"time_unit is {time_unit!r}, expected one of {list(TIME_UNITS)}")
        if category_separator == "":
            raise SettingError("the category separator is empty, expected a text such as '>'; leave it out for blanks")
        given = dict(item_columns or {})
        for role in given:
            if role not in ("item", *ROLES):
                raise SettingError(
                    f"{role!r} is nothing that an item has, expected one of {', '.join(ROLES)}{nearest(role, ROLES)}"
                )
        files = named_files({"interactions": as_paths(interactions), "items": as_paths(items)})
        self._interactions, self._items, self._progress = files["interactions"], files["items"], progress
        self._columns, self._separator, self._unit = columns or Columns(), category_separator, time_unit
        self._with_baskets = with_baskets
        self._item_key = _one(given.pop("item", self._columns.item))
        self._given = {role: [names] if isinstance(names, str) else list(names) for role, names in given.items()}
        for name, path in self._interactions:
            self._places(self._rows(name, path, Rejects()), path)
        for name, path in self._items:
            self._layout(self._rows(name, path, Rejects()), path)
        self.described: dict[str, Any] = {
            "source": "table",
            "interactions": [name for name, _ in self._interactions],
            "items": [name for name, _ in self._items],
            "columns": asdict(self._columns),
            "item_columns": {"item": self._item_key, **self._given},
            "category_separator": category_separator,
            "time_unit": time_unit,
            "licence": "as the owner of the files says",
        }
        self.files = {name: path for named in files.values() for name, path in named}
        self.raw_files: dict[str, str] = {}
        self.n_rows: dict[str, int] = {}
        self.fixed: Counter[str] = Counter()

    # ---------------------------------------------------------------- interactions

    def events(self, rejects: Rejects) -> Events:
        """All interactions; lines of a second file are numbered on.

        Raises:
            DatasetError: too many unusable rows, none usable, times in two units or in another one, a damaged file.
        """
        builder, offset, parts = EventBuilder(with_baskets=self._with_baskets), 0, []
        for name, path in self._interactions:
            rows = self._rows(name, path, rejects)
            places, start, in_seconds = self._places(rows, path), len(builder), False
            n_other, other = 0, ""  # numbers where dates are expected, or dates for numbers
            for number, row in rows:
                user, item, basket, time = (None if place is None else row[place] for place in places)
                in_seconds = in_seconds or isinstance(time, (date, datetime))
                time = self._time(time)
                if type(time) is str and self._is_other_time(time):
                    n_other, other = n_other + 1, other or time
                problem = self._problem(builder, user, item, basket)
                problem = problem or bad_time(time, "s" if in_seconds else self._number_unit())
                if problem:
                    rejects.add(name, number, problem, _shown(row))
                else:
                    builder.add(_token(user) or "", _token(item), time, offset + number, _token(basket))
            if n_other > rejects.max_share * rows.n:
                what = "are dates" if self._unit != "iso" else "are numbers"
                remedy = "pass --time-unit iso" if self._unit != "iso" else "leave --time-unit iso out"
                raise DatasetError(f"{path}: the times {what}, such as {other!r}; {remedy}")
            parts.append((path, offset, slice(start, len(builder)), "s" if in_seconds else self._number_unit()))
            offset += self._finish(name, rows, rejects)
        if not len(builder):
            raise DatasetError(f"{', '.join(name for name, _ in self._interactions)}: no usable interaction")
        events = builder.build()
        seconds = events.time.copy()
        for path, offset, rows, unit in parts:
            if rows.start < rows.stop and self._unit != "iso":
                check_unit(events.time[rows], events.line[rows] - offset, unit, path)
            seconds[rows] /= PER_SECOND[unit]
        return events._replace(time=seconds)

    def _places(self, rows: TableRows, path: Path) -> tuple[int | None, ...]:
        """Where user, item, basket and time stand in a row."""
        names = self._columns
        needed = {"item": names.item, "time": names.time}
        if self._with_baskets:
            needed["basket"] = names.basket
        if not self._with_baskets or names.user != Columns.user:
            needed["user"] = names.user
        check_needed(rows.names, needed, path)

        def place(name: str) -> int | None:
            return rows.names.index(name) if name in rows.names else None

        return (place(names.user), place(names.item), place(names.basket) if self._with_baskets else None,
                place(names.time))  # fmt: skip

    def _problem(self, builder: EventBuilder, user: Any, item: Any, basket: Any) -> str | None:
        user, item = _token(user), _token(item)
        if (type(item) is not str or item not in builder.items) and (problem := id_problem(item)):
            return problem
        if self._with_baskets:
            return id_problem(_token(basket)) or (id_problem(user) if user else None)
        return id_problem(user) if type(user) is not str or user not in builder.users else None

    def _is_other_time(self, text: str) -> bool:
        if self._unit == "iso":
            return _NUMBER.fullmatch(text) is not None
        return seconds_of_date(text.strip()) is not None

    def _number_unit(self) -> str:
        return "s" if self._unit == "iso" else self._unit

    def _time(self, value: Any) -> Any:
        """A number where there is one; a date in seconds."""
        if isinstance(value, (date, datetime)) or (self._unit == "iso" and isinstance(value, str)):
            return _seconds(value)
        if isinstance(value, str):
            return float(value) if _NUMBER.fullmatch(value.strip()) else (None if not value.strip() else value)
        return value

    # ---------------------------------------------------------------- items

    def items(self, wanted: Container[str], rejects: Rejects) -> Iterator[Item]:
        """The items among ``wanted``, each once, in the order of the table.

        Raises:
            DatasetError: too many unusable rows, a damaged file; what came before must not be used then.
        """
        first_rows = FirstRows(self.fixed, rejects)
        for name, path in self._items:
            rows = self._rows(name, path, rejects)
            key, roles, more = self._layout(rows, path)
            used = {key, *more.values(), *(place for places in roles.values() for place in places)}
            for place, column in enumerate(rows.names):
                if place not in used:
                    self.fixed[f"column {column!r} left out, whose name cannot be that of a further column"] += 1
            for number, row in rows:
                item_id = _token(row[key])
                if type(item_id) is str and item_id in wanted:
                    item = self._item(item_id, row, roles, more)
                    if first_rows.is_first(item, name, number, _shown(row)):
                        yield item
                elif problem := id_problem(item_id):
                    rejects.add(name, number, problem, _shown(row))
            self._finish(name, rows, rejects)

    def _layout(self, rows: TableRows, path: Path) -> tuple[int, dict[str, list[int]], dict[str, int]]:
        """Where the id, the roles and the further columns stand in a row."""
        names = rows.names
        check_needed(names, {"item": self._item_key}, path)
        roles = {}
        for role in ROLES:
            wanted = self._given.get(role, [role] if role in names else [])
            if missing := [name for name in wanted if name not in names]:
                raise DatasetError(
                    f"{path} has no column {', '.join(missing)} for {role}; its columns are {', '.join(names)}"
                )
            roles[role] = [names.index(name) for name in wanted]
        if roles["categories"] and "category" not in self._given:
            roles["category"] = []
        used = {names.index(self._item_key), *(place for places in roles.values() for place in places)}
        taken = (*_TAKEN, *COLUMNS)  # a further column would be lost under such a name, or hide another one
        more = {
            name: place
            for place, name in enumerate(names)
            if place not in used and name not in taken and COLUMN.fullmatch(name)
        }
        return names.index(self._item_key), roles, more

    def _item(self, item_id: str, row: list[Any], roles: dict[str, list[int]], more: dict[str, int]) -> Item:
        def joined(role: str, separator: str) -> str:
            return separator.join(text for place in roles[role] if (text := _text(row[place], separator)))

        categories = tuple(name for place in roles["categories"] for name in self._names(row[place], roles))
        if not categories:
            categories = tuple(text for place in roles["category"] if (text := _text(row[place], " ").strip()))
        return Item(
            item_id=item_id,
            title=joined("title", " "),
            brand=joined("brand", " "),
            categories=categories,
            description=joined("description", "\n"),
            price=joined("price", " "),
            pictures=self._pictures(row, roles),
            more={name: _text(row[place], " ") for name, place in more.items()},
        )

    def _names(self, value: Any, roles: dict[str, list[int]]) -> list[str]:
        """Names of categories in a field: parted, or one each if several columns hold them."""
        if isinstance(value, (list, tuple)):
            return [text for part in value if (text := _text(part, " ").strip())]
        text = _text(value, " ")
        if len(roles["categories"]) > 1 and self._separator is None:
            return [text.strip()] if text.strip() else []
        return [part.strip() for part in text.split(self._separator) if part.strip()]

    def _pictures(self, row: list[Any], roles: dict[str, list[int]]) -> tuple[str, ...]:
        """Paths and addresses, each once; an image is one path, images and image_urls are parted by blanks."""
        found: dict[str, None] = {}
        for role in ("image", "images", "image_urls"):
            for place in roles[role]:
                value = row[place]
                if isinstance(value, (list, tuple)):
                    parts = [_text(part, " ") for part in value]
                else:
                    parts = _text(value, " ").split() if role in _LISTS else [_text(value, " ")]
                for part in map(str.strip, parts):
                    scheme = _SCHEME.match(part)
                    if scheme and scheme["scheme"].lower() not in ("http", "https"):
                        self.fixed["picture address that is neither http(s) nor a path left out"] += 1
                    elif part:
                        found[part] = None
        return tuple(found)

    # ---------------------------------------------------------------- files

    def _rows(self, name: str, path: Path, rejects: Rejects) -> TableRows:
        return TableRows(path, rejects, name=name, separators=_SEPARATORS, progress=self._progress)

    def _finish(self, name: str, rows: TableRows, rejects: Rejects) -> int:
        self.n_rows[name], self.raw_files[name] = rows.n, rows.sha256
        self.fixed.update(rows.fixed)
        rejects.check(name, rows.n)
        return rows.last


def _one(name: str | Sequence[str]) -> str:
    names = [name] if isinstance(name, str) else list(name)
    if len(names) != 1:
        raise SettingError(f"one column holds the ids of the items, not {', '.join(names)}")
    return names[0]


def _token(value: Any) -> Any:
    """An id: texts as they stand, whole numbers of Parquet in digits; NaN is a missing one, and the rest are none."""
    if isinstance(value, float) and value != value:
        return None
    if isinstance(value, float) and value.is_integer() and abs(value) < WHOLE:  # pandas: whole numbers, some missing
        return str(int(value))
    return str(value) if type(value) is int else value


def _text(value: Any, separator: str) -> str:
    """A field as text; what Parquet holds as a list is joined."""
    if isinstance(value, str):
        return value
    if value is None or value != value:
        return ""
    if isinstance(value, (list, tuple)):
        return separator.join(text for part in value if (text := _text(part, separator)))
    return str(value)


def _shown(row: list[Any]) -> str:
    return "\t".join(_text(value, " ") for value in row)


def _seconds(value: str | date) -> Any:
    """Unix seconds of a date; a text that is none, or a date after the year 2100, stays a text."""
    if isinstance(value, str):
        seconds = seconds_of_date(value.strip())
        return (value.strip() or None) if seconds is None or seconds >= LATEST else seconds
    if not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    if value.tzinfo is None:
        value = value.replace(tzinfo=UTC)
    return value.timestamp() if value.timestamp() < LATEST else str(value)
