"""Rows of a file with one JSON object a line, or one Python literal where an old file has those."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dataset_prep.sources.lines import Lines
from dataset_prep.sources.rejects import Rejects


class _Unusable(ValueError):
    """A line that is JSON to Python, and nothing that can be relied on."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        raise _Unusable("duplicate_key")
    return row


def _constant(name: str) -> None:
    raise _Unusable("non_finite")


_scan = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant).scan_once


class JsonRows:
    """Objects of a file with their line numbers and lines; iterate once. Empty lines are no rows.

    Args:
        path: UTF-8 text, plain or gzipped.
        rejects: gets lines that are no object (``bad_json``), name a key twice (``duplicate_key``), hold NaN or
            infinity (``non_finite``) or half of a character (``encoding``), and those that `Lines` sets aside.
        literals: read lines such as ``{'asin': 'B01'}`` too, as data; they are never run.

    Attributes:
        n: rows so far, with those in ``rejects``.
        lines: the file.
    """

    def __init__(
        self, path: Path, rejects: Rejects, *, name: str | None = None, literals: bool = False, progress: bool = True
    ) -> None:
        self.lines = Lines(path, rejects, name=name, progress=progress)
        self._rejects, self._literals, self._n_empty = rejects, literals, 0

    @property
    def n(self) -> int:
        return self.lines.n - self._n_empty

    def __iter__(self) -> Iterator[tuple[int, str, dict[str, Any]]]:
        scan, literals = _scan, self._literals
        for number, line in self.lines:
            try:
                if literals and line.startswith("{'"):
                    row = ast.literal_eval(line)
                else:
                    row, end = scan(line, 0)
                    if end != len(line) and not line[end:].isspace():
                        row = None
                if type(row) is not dict:
                    raise _Unusable("bad_json")
                if "\\ud" in line or "\\uD" in line:  # most are halves of a pair, which make one character
                    json.dumps(row, ensure_ascii=False).encode()
            except _Unusable as error:
                self._rejects.add(self.lines.name, number, str(error), line)
            except UnicodeEncodeError:
                self._rejects.add(self.lines.name, number, "encoding", line)
            except (ValueError, StopIteration, SyntaxError, TypeError, MemoryError, RecursionError):
                if not line or line.isspace():
                    self._n_empty += 1
                else:
                    self._rejects.add(self.lines.name, number, "bad_json", line)
            else:
                yield number, line, row
