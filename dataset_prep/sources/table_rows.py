"""Rows of a table, one by one: RecBole atomic file, CSV, TSV or Parquet, told apart by the content.

first line "user_id:token ..."  atomic file     no quotes
a tab in the first line         TSV             no quotes
else                            CSV             quotes as in RFC 4180; a quote without its partner is text
"PAR1"                          Parquet
"""

from __future__ import annotations

import csv
import re
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dataset_prep.sources.lines import LONGEST_LINE, Lines
from dataset_prep.sources.parquet_rows import ParquetRows, is_parquet
from dataset_prep.sources.rejects import Rejects
from recbole_mm.errors import DatasetError

NAMES = {",": "comma", "\t": "tab", ";": "semicolon", "|": "bar"}
MAX_LINES = 10_000  # that are looked at for the end of a row with line breaks in quotes
_ADVICE = {"encoding": "not UTF-8; save the file as UTF-8", "line_too_long": "longer than a million bytes"}
_ATOMIC = re.compile("[^:]*:(?:token|token_seq|float|float_seq)")  # a column in the header of an atomic file


class _Refusals(Rejects):
    """Stops at the first row that cannot be read."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def add(self, file: str, line: int, reason: str, text: str) -> None:
        raise DatasetError(f"{self._path}, line {line}: {_ADVICE.get(reason, text)}")


class TableRows:
    """Rows with their line numbers; iterate once. The numbers are those of their first lines, of Parquet from 1.

    Values are texts, those of an empty field ""; of Parquet they are what Parquet holds. Empty lines are no rows.

    Args:
        path: UTF-8 text, plain or gzipped, or Parquet.
        rejects: gets rows that cannot be used: ``bad_csv`` for a wrong number of fields, and those of `Lines`. With
            None the first of them is a `DatasetError`, and so is a quote without its partner.
        name: of the file in ``rejects``; its own name if None.
        separators: that a CSV may have; the one that occurs most often in the header is taken.

    Attributes:
        names: columns, in order.
        types: of an atomic file, by column; else empty.
        kind: "atomic", "csv", "tsv" or "parquet".
        separator: between fields.
        n: rows so far, with those in ``rejects``.
        last: number of the last line.
        sha256, fixed: as in `Lines`.

    Raises:
        DatasetError: an unreadable or empty file, a column named twice.
    """

    def __init__(
        self,
        path: Path,
        rejects: Rejects | None,
        *,
        name: str | None = None,
        separators: str = ",",
        progress: bool = True,
    ) -> None:
        self.path, self.name = Path(path), name or Path(path).name
        self.types: dict[str, str] = {}
        self.separator, self.n, self.last, self.sha256, self.fixed = "", 0, 0, "", Counter()
        self._strict = rejects is None
        self._rejects = _Refusals(self.path) if rejects is None else rejects
        self._n_malformed = 0
        self._parquet: ParquetRows | None = None
        if is_parquet(path):
            self.kind, self._parquet = "parquet", ParquetRows(path, progress=progress)
            self.names = self._parquet.names
        else:
            self._lines = Lines(path, self._rejects, name=self.name, progress=progress)
            self._stream = iter(self._lines)
            self._read_header(separators)
        if len(set(self.names)) < len(self.names):
            raise DatasetError(f"{path}: a column name occurs twice in {', '.join(self.names)}")

    def _read_header(self, separators: str) -> None:
        header = next((line for _, line in self._stream if line.strip()), None)
        if header is None:
            raise DatasetError(f"{self.path} is empty, expected a header and rows")
        columns = header.split("\t")
        if all(_ATOMIC.fullmatch(column) for column in columns):
            self.kind, self.separator = "atomic", "\t"
            self.types = dict(tuple(column.rsplit(":", 1)) for column in columns)
            self.names = [column.rsplit(":", 1)[0] for column in columns]
        elif "\t" in header:
            self.kind, self.separator, self.names = "tsv", "\t", columns
        else:
            self.kind, self.separator = "csv", max(separators, key=header.count)
            self.names = self._parsed(header) or header.split(self.separator)

    # ---------------------------------------------------------------- rows

    def __iter__(self) -> Iterator[tuple[int, list[Any]]]:
        """
        Raises:
            DatasetError: no row at all, or a file that `Lines` or `ParquetRows` refuse.
        """
        if self._parquet is not None:
            for number, row in self._parquet:
                yield number, list(row.values())
            self.n, self.last, self.sha256 = self._parquet.n, self._parquet.n, self._parquet.sha256
        else:
            yield from self._quoted() if self.kind == "csv" else self._plain()
            self.last, self.sha256 = self._lines.n, self._lines.sha256
            self.n += self._n_malformed + self._lines.n_rejected
            self.fixed.update(self._lines.fixed)
        if not self.n:
            raise DatasetError(f"{self.path} has a header but no rows")

    def _plain(self) -> Iterator[tuple[int, list[str]]]:
        width, separator = len(self.names), self.separator
        for number, line in self._stream:
            fields = line.split(separator)
            if len(fields) == width and line:
                self.n += 1
                yield number, fields
            elif line:
                self._malformed(number, line, len(fields))

    def _quoted(self) -> Iterator[tuple[int, list[str]]]:
        width, separator = len(self.names), self.separator
        waiting: deque[tuple[int, str]] = deque()  # lines that were looked at and not used
        while True:
            number, line = waiting.popleft() if waiting else next(self._stream, (0, ""))
            if not number:
                return
            if not line:
                continue
            if '"' not in line:
                fields = line.split(separator)
            else:
                fields = self._record(line, waiting)
                if fields is None:
                    if self._strict:
                        raise DatasetError(f"{self.path}, line {number}: no CSV (a quote without its partner)")
                    fields = line.split(separator)
                    self.fixed["quote without its partner kept as text"] += len(fields) == width
            if len(fields) == width:
                self.n += 1
                yield number, fields
            else:
                self._malformed(number, line, len(fields))

    def _record(self, line: str, waiting: deque[tuple[int, str]]) -> list[str] | None:
        """The fields of the row that begins with a line and may go on in the next; None if its quotes are wrong."""
        fields = self._parsed(line)
        if fields is not None:
            return fields
        record, n_used = line, 0
        while n_used < MAX_LINES and len(record) < LONGEST_LINE and self._parsed(record + '"') is not None:
            added = []  # up to the next quote, or there is none
            while n_used < MAX_LINES and not (added and '"' in added[-1]):
                if n_used == len(waiting) and (following := next(self._stream, None)) is not None:
                    waiting.append(following)
                if n_used == len(waiting):
                    return None
                added.append(waiting[n_used][1])
                n_used += 1
            record = "\n".join([record, *added])
            fields = self._parsed(record)
            if fields is not None and len(fields) == len(self.names):
                for _ in range(n_used):
                    waiting.popleft()
                return fields
        return None

    def _parsed(self, record: str) -> list[str] | None:
        try:
            return next(csv.reader([record], delimiter=self.separator, strict=True), None)
        except csv.Error:
            return None

    def _malformed(self, number: int, line: str, n_fields: int) -> None:
        self._n_malformed += 1
        wrong = f"{n_fields} fields, the header has {len(self.names)}"
        if self._strict:
            wrong += f"; fields are separated by one {NAMES[self.separator]}"
        self._rejects.add(self.name, number, "bad_csv", wrong if self._strict else f"{wrong}: {line}")
