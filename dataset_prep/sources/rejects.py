"""Rows of a source that cannot be used: counted, listed with their reason, and too many of them stop the run."""

from __future__ import annotations

import gzip
import io
from collections import Counter
from pathlib import Path

from recbole_mm.data.files import write_atomically
from recbole_mm.errors import DatasetError

LISTED = 10_000  # rows that are listed; all are counted
SHOWN = 200  # characters of each
MAX_SHARE = 0.01


class Rejects:
    """Rows set aside, by file and reason; for every file, rows read = rows used + rows here.

    Args:
        max_share: of a file's rows that may be set aside.
    """

    def __init__(self, *, max_share: float = MAX_SHARE) -> None:
        self.max_share = max_share
        self.counts: dict[str, Counter[str]] = {}
        self._listed: list[tuple[str, int, str, str]] = []

    def add(self, file: str, line: int, reason: str, text: str) -> None:
        """Set one row aside.

        Args:
            file: name of the file.
            line: number of the row, from 1.
            reason: a short name, such as "bad_json"; counts are kept by it.
            text: of the row.
        """
        self.counts.setdefault(file, Counter())[reason] += 1
        if len(self._listed) < LISTED:
            shown = text[:SHOWN].encode("unicode_escape").decode("ascii")
            self._listed.append((file, line, reason, shown))

    def n(self, file: str) -> int:
        """How many rows of a file were set aside."""
        return sum(self.counts.get(file, Counter()).values())

    def check(self, file: str, n_read: int) -> None:
        """Stop if too many of a file's rows were set aside.

        Raises:
            DatasetError: naming the reasons and the first rows.
        """
        if self.n(file) <= self.max_share * n_read:
            return
        reasons = ", ".join(f"{n} {reason}" for reason, n in self.counts[file].most_common())
        first = next((row for row in self._listed if row[0] == file), None)
        example = f"\n  line {first[1]} ({first[2]}): {first[3][:80]}" if first else ""
        raise DatasetError(
            f"{file}: {self.n(file)} of {n_read} rows cannot be used ({reasons}), more than {self.max_share:.0%}; "
            f"is it the right file? Otherwise allow more with --max-rejected{example}"
        )

    def write(self, path: Path) -> None:
        """List the rows in a gzipped table: file, line, reason, text; same rows, same bytes."""

        def write(out: io.BufferedIOBase) -> None:
            with gzip.GzipFile(fileobj=out, mode="wb", mtime=0, filename="") as table:
                table.write(b"file\tline\treason\ttext\n")
                for row in self._listed:
                    table.write(("\t".join(map(str, row)) + "\n").encode())

        write_atomically(path, write)
