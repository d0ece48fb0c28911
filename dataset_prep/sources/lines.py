"""Lines of a text file, plain or gzipped: read once, in bounded memory, and hashed on the way.

file ─ sha256 ─ gunzip (by content: members, truncation, garbage, bombs) ─ lines ─ UTF-8
                                                                            └ too long, not UTF-8 → rejects
"""

from __future__ import annotations

import hashlib
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from dataset_prep.sources.rejects import SHOWN, Rejects
from recbole_mm.errors import DatasetError

GZIP, BOM = b"\x1f\x8b", b"\xef\xbb\xbf"
CHUNK = 1 << 16  # bytes of the file that are decompressed at a time
BLOCK = 1 << 20  # bytes of text that are cut into lines at a time
LONGEST_LINE = 1_000_000  # bytes
MAX_BYTES = 10**12  # of text; the largest of all review files has a third of it
MAX_RATIO = 1_000  # text to file; reviews have 5, and gzip cannot do more than 1,032
WINDOW = 1 << 24  # bytes of text over which the ratio is taken


class Lines:
    """Lines of a file with their numbers, from 1; iterate once.

    Memory stays within a few MB, whatever is in the file. White space around a line is kept, its line end is not.

    Args:
        path: text in UTF-8, plain or gzipped, whatever its name.
        rejects: gets lines that are too long or not UTF-8.
        name: of the file in ``rejects``; its own name if None.
        max_bytes: of text, uncompressed; more is refused.
        progress: show a bar on stderr, in bytes of the file.

    Attributes:
        n: lines so far, with those in ``rejects``, of which there are ``n_rejected``.
        sha256: of the file, once all was read.
        fixed: what was mended, by kind.
    """

    def __init__(
        self,
        path: Path,
        rejects: Rejects,
        *,
        name: str | None = None,
        max_bytes: int = MAX_BYTES,
        progress: bool = True,
    ) -> None:
        self.path, self.name = Path(path), name or Path(path).name
        self.n, self.n_rejected, self.sha256, self.fixed = 0, 0, "", Counter()
        self._rejects, self._max_bytes, self._progress = rejects, max_bytes, progress

    def __iter__(self) -> Iterator[tuple[int, str]]:
        """The usable lines.

        Raises:
            DatasetError: a file that cannot be read, ends early, is damaged, has something behind its end, or grows
                too large.
        """
        pending, skipping = b"", False
        for block in self._blocks():
            if skipping:
                _, newline, block = block.partition(b"\n")
                if not newline:
                    continue
                skipping = False
            whole, newline, pending = (pending + block).rpartition(b"\n")
            if newline:
                yield from self._decoded(whole)
            if len(pending) > LONGEST_LINE:
                self._too_long(pending)
                pending, skipping = b"", True
        if pending:
            yield from self._decoded(pending)

    # ---------------------------------------------------------------- lines

    def _decoded(self, whole: bytes) -> Iterator[tuple[int, str]]:
        """The usable ones of whole lines, which are decoded together unless one of them cannot be."""
        if not self.n and whole.startswith(BOM):
            whole = whole[len(BOM) :]
            self.fixed["byte order mark"] += 1
        try:
            text = whole.decode()
        except UnicodeDecodeError:
            text = "\0"
        if "\0" in text:
            for line in whole.split(b"\n"):
                yield from self._one(line)
            return
        carriage = "\r" in text
        n = self.n
        for line in text.split("\n"):
            n += 1
            self.n = n
            if len(line) > LONGEST_LINE // 4 and len(line.encode()) > LONGEST_LINE:
                self.n -= 1
                self._too_long(line.encode())
            elif carriage:
                yield n, line.removesuffix("\r")
            else:
                yield n, line

    def _one(self, line: bytes) -> Iterator[tuple[int, str]]:
        if len(line) > LONGEST_LINE:
            self._too_long(line)
            return
        self.n += 1
        place, why = line.find(b"\0"), "NUL"
        text = ""
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            place, why = error.start, "not UTF-8"
        if place < 0:
            yield self.n, text.removesuffix("\r")
        else:
            shown = line[:SHOWN].decode(errors="backslashreplace")
            self._reject("encoding", f"{why} at byte {place}: {shown}")

    def _too_long(self, line: bytes) -> None:
        self.n += 1
        self._reject("line_too_long", line[:SHOWN].decode(errors="backslashreplace"))

    def _reject(self, reason: str, text: str) -> None:
        self.n_rejected += 1
        self._rejects.add(self.name, self.n, reason, text)

    # ---------------------------------------------------------------- bytes

    def _blocks(self) -> Iterator[bytes]:
        from tqdm import tqdm

        digest = hashlib.sha256()
        try:
            with open(self.path, "rb") as file:
                size = file.seek(0, 2)
                file.seek(0)
                with tqdm(
                    total=size, desc=self.name, unit="B", unit_scale=True, leave=False, delay=1,
                    disable=not self._progress,
                ) as bar:  # fmt: skip
                    zipped = file.read(len(GZIP)) == GZIP
                    file.seek(0)
                    chunks = _chunks(file, digest, bar)
                    yield from _grouped(self._gunzip(chunks) if zipped else self._bounded(chunks))
        except OSError as error:
            raise DatasetError(f"cannot read {self.path}: {error.strerror or error}") from error
        self.sha256 = digest.hexdigest()

    def _bounded(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        n = 0
        for chunk in chunks:
            n += len(chunk)
            self._check_size(n)
            yield chunk

    def _check_size(self, n: int) -> None:
        if n > self._max_bytes:
            raise DatasetError(
                f"{self.path}: more than {self._max_bytes:,} bytes of text, at row {self.n}; is it the right file?"
            )

    def _gunzip(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        """Text of all members. What was decompressed before a fault is given first, so that the row is known."""
        decoder, whole = zlib.decompressobj(wbits=31), False
        n = window_in = window_out = 0
        for chunk in chunks:
            while chunk:
                if whole:
                    chunk = chunk.lstrip(b"\0")  # the padding of tapes and disks is no garbage
                    if not chunk:
                        break
                    if not GZIP.startswith(chunk[: len(GZIP)]):
                        raise DatasetError(
                            f"{self.path}: something that is not gzip follows its end, after row {self.n}; "
                            "download it again"
                        )
                    decoder = zlib.decompressobj(wbits=31)
                try:
                    text = decoder.decompress(chunk, BLOCK)
                except zlib.error as error:
                    yield b""
                    raise DatasetError(
                        f"{self.path}: damaged after row {self.n} ({error}); download it again"
                    ) from error
                whole = decoder.eof
                rest = decoder.unused_data if whole else decoder.unconsumed_tail
                n, window_out, window_in = n + len(text), window_out + len(text), window_in + len(chunk) - len(rest)
                chunk = rest
                self._check_size(n)
                if window_out > WINDOW:
                    if window_out > MAX_RATIO * window_in:
                        raise DatasetError(
                            f"{self.path}: {window_out:,} bytes of text out of {window_in:,}, after row {self.n}: "
                            "refused as a gzip bomb"
                        )
                    window_in = window_out = 0
                yield text
        if not whole:
            yield b""
            raise DatasetError(
                f"{self.path} ends early, after row {self.n}: it was cut short; remove it and get it again"
            )


def _chunks(file: BinaryIO, digest: hashlib._Hash, bar: object) -> Iterator[bytes]:
    while chunk := file.read(CHUNK):
        digest.update(chunk)
        bar.update(len(chunk))
        yield chunk


def _grouped(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Pieces joined to blocks of about `BLOCK` bytes; an empty piece asks for what there is."""
    joined, n = [], 0
    for piece in pieces:
        joined.append(piece)
        n += len(piece)
        if n >= BLOCK or not piece:
            yield b"".join(joined)
            joined, n = [], 0
    yield b"".join(joined)
