"""The pictures of a dataset folder: files named by their content, and the table that says what became of each.

pictures/index.tsv              a line per item and picture named for it, in the order of the items
pictures/ab/<sha256>.<ending>   the pictures themselves, unless they stay where they were found
pictures/.journal.tsv           what a run has finished so far; gone when the index is written
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple
from urllib.parse import unquote

from dataset_prep.pictures.decode import OK, Inspected
from recbole_mm.data.files import file_info, sha256_of, write_atomically
from recbole_mm.data.layout import Manifest
from recbole_mm.errors import DatasetError

INDEX = "pictures/index.tsv"
JOURNAL = "pictures/.journal.tsv"
COLUMNS = ("item_id", "number", "source", "status", "file", "bytes", "sha256", "width", "height")
NOT_NAMED = "no picture named"
NOT_ASKED_FOR = "not asked for"
# Failures that may be gone at the next try; all others are the picture's own, or its site's decision.
TEMPORARY = {
    "timed out",
    "connection failed",
    "host down",
    "cut short",
    "decoder crashed",
    "out of memory",
    "unreadable",
}
TEMPORARY |= {f"http {code}" for code in (408, 425, 429, 500, 502, 503, 504)}
RETRIES = ("temporary", "all")


class Picture(NamedTuple):
    """A line of the index.

    Attributes:
        number: position among the item's pictures, from 0.
        source: address or path, as the item names it.
        status: "ok", or why there is no usable picture.
        file: relative to ``pictures/``; empty unless ok.
        bytes, sha256: of the file; 0 and empty if none was read.
        width, height: in pixels, as stored; 0 unless ok.
    """

    item_id: str
    number: int
    source: str
    status: str
    file: str = ""
    bytes: int = 0
    sha256: str = ""
    width: int = 0
    height: int = 0


@dataclass(frozen=True)
class PicturesReport:
    """What became of the pictures.

    Attributes:
        n_items: in the ``.item`` file.
        n_with: items with at least one usable picture.
        n_bytes: of the usable pictures, each file once.
        counts: lines of the index by status.
        examples: an item for each status.
    """

    n_items: int
    n_with: int
    n_bytes: int
    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        head = f"pictures: {self.n_with} of {self.n_items} items have one, {self.n_bytes / 1e6:.1f} MB"
        others = {status: n for status, n in self.counts.items() if status != OK}
        lines = [f"  {self.counts.get(OK, 0)} {OK}"]
        lines += [f"  {n} {status} (such as item {self.examples[status]!r})" for status, n in others.items()]
        if n := sum(n for status, n in others.items() if status in TEMPORARY):
            lines.append(f"  {n} of these may succeed later: --retry-failed")
        return "\n".join([head, *lines])


def wants_retry(status: str, retry_failed: str | None) -> bool:
    """Whether a source with this status is to be tried again.

    Args:
        retry_failed: None for no failure, "temporary" for those that may be gone, "all" for every failure.
    """
    return (retry_failed == "all" and status != OK) or (retry_failed == "temporary" and status in TEMPORARY)


def stored_name(found: Inspected) -> str:
    """Where a picture lies below ``pictures/``: named by its content, never by anything a user or a server gave."""
    return f"{found.sha256[:2]}/{found.sha256}.{found.ending}"


# ---------------------------------------------------------------- index


def read_index(folder: Path) -> list[Picture] | None:
    """All lines of a folder's index, or None if it has none.

    Raises:
        DatasetError: a file that is no index.
    """
    path = Path(folder) / INDEX
    try:
        lines = path.read_bytes().decode().removesuffix("\n").split("\n")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"cannot read {path}: {error}") from error
    remedy = f"delete it and make it again with: python -m dataset_prep pictures --dataset {folder}"
    if tuple(lines[0].split("\t")) != COLUMNS:
        raise DatasetError(f"{path}, line 1: {lines[0][:80]!r}, expected the columns {', '.join(COLUMNS)}; {remedy}")
    try:
        return [_picture(line) for line in lines[1:]]
    except ValueError as error:
        number = next(i for i, line in enumerate(lines[1:], start=2) if not _is_picture(line))
        raise DatasetError(f"{path}, line {number}: {lines[number - 1][:80]!r} is no line of an index; {remedy}") from (
            error
        )


def _picture(line: str) -> Picture:
    item_id, number, source, status, file, n_bytes, sha256, width, height = line.split("\t")
    return Picture(item_id, int(number), source, status, file, int(n_bytes), sha256, int(width), int(height))


def _is_picture(line: str) -> bool:
    try:
        return bool(_picture(line))
    except ValueError:
        return False


def picture_files(folder: Path) -> dict[str, list[Path]] | None:
    """The usable pictures of each item that has one, in the order the item names them; None without an index.

    Raises:
        DatasetError: the index cannot be read.
    """
    pictures = read_index(folder)
    if pictures is None:
        return None
    root = os.path.realpath(Path(folder) / "pictures")
    files: dict[str, list[Path]] = {}
    for picture in pictures:
        if picture.status == OK:
            files.setdefault(picture.item_id, []).append(Path(os.path.normpath(os.path.join(root, picture.file))))
    return files


def file_inside(root: Path, source: str, *, encoded: bool = False) -> Path | None:
    """The file that a path names below ``root``, or None for one that leads elsewhere, on any system."""
    path = unquote(source) if encoded else source
    windows = PureWindowsPath(path)
    if PurePosixPath(path).is_absolute() or windows.drive or windows.root or ".." in windows.parts:
        return None
    return root / path


def check_pictures(folder: Path, *, hashes: bool = False) -> list[str]:
    """Compare the files of the usable pictures with the index.

    Args:
        hashes: also compare the sha256, which reads all pictures.

    Returns:
        A problem a line; none without an index.

    Raises:
        DatasetError: the index cannot be read.
    """
    problems = []
    again = f"make the pictures again with: python -m dataset_prep pictures --dataset {folder}"
    for file, picture in _usable(read_index(folder) or []).items():
        path = Path(folder) / "pictures" / file
        if not path.is_file():
            problems.append(f"pictures/{file} is missing (item {picture.item_id!r}); {again}")
        elif (size := path.stat().st_size) != picture.bytes:
            problems.append(f"pictures/{file} has {size} bytes, the index says {picture.bytes}; {again}")
        elif hashes and sha256_of(path) != picture.sha256:
            problems.append(f"pictures/{file} is another picture than when it was indexed; {again}")
    return problems


def _usable(pictures: Iterable[Picture]) -> dict[str, Picture]:
    return {picture.file: picture for picture in pictures if picture.status == OK}


def publish(folder: Path, pictures: Sequence[Picture], settings: dict[str, Any]) -> PicturesReport:
    """Write the index, name it in the manifest, and forget the journal; the caller holds the folder's lock.

    Args:
        pictures: all lines, in the order of the items.
        settings: how they were got; goes into the manifest, with the counts.
    """
    folder = Path(folder)
    report = _report(pictures)
    manifest = Manifest.load(folder)
    content = "".join("\t".join(map(str, line)) + "\n" for line in (COLUMNS, *pictures)).encode()
    if INDEX in manifest.files:  # first forget it: a crash below must not leave a new index under an old hash
        manifest = replace(manifest, files={k: v for k, v in manifest.files.items() if k != INDEX})
        manifest.save(folder)
    write_atomically(folder / INDEX, lambda out: out.write(content))
    made = {**settings, "counts": report.counts, "items": report.n_items, "items_with_picture": report.n_with}
    files = {**manifest.files, INDEX: file_info(folder / INDEX)}
    replace(manifest, files=files, settings={**manifest.settings, "pictures": made}).save(folder)
    (folder / JOURNAL).unlink(missing_ok=True)
    return report


def _report(pictures: Sequence[Picture]) -> PicturesReport:
    examples: dict[str, str] = {}
    for picture in pictures:
        examples.setdefault(picture.status, picture.item_id)
    return PicturesReport(
        n_items=len({picture.item_id for picture in pictures}),
        n_with=len({picture.item_id for picture in pictures if picture.status == OK}),
        n_bytes=sum(picture.bytes for picture in _usable(pictures).values()),
        counts=dict(Counter(picture.status for picture in pictures).most_common()),
        examples=examples,
    )


# ---------------------------------------------------------------- journal


class Journal:
    """What is known of each source, kept on disk while a run goes on; to be used as a context.

    It begins with what the index says, and with what an interrupted run had finished. A line that was cut short by a
    kill, or is none, is ignored.
    """

    def __init__(self, folder: Path) -> None:
        self._path = Path(folder) / JOURNAL
        self.known: dict[str, Inspected] = {}
        for picture in read_index(folder) or []:
            if picture.status not in (NOT_NAMED, NOT_ASKED_FOR):
                ending = picture.file.rpartition(".")[2]
                self.known[picture.source] = Inspected(picture.status, ending, *picture[5:])
        self._read()

    def _read(self) -> None:
        self._whole = 0  # bytes up to the last complete line
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return
        self._whole = content.rfind(b"\n") + 1
        for line in content[: self._whole].decode(errors="replace").split("\n")[:-1]:
            with suppress(ValueError):  # no line of ours, as after the machine lost its power
                source, status, ending, n_bytes, sha256, width, height = line.split("\t")
                self.known[source] = Inspected(status, ending, int(n_bytes), sha256, int(width), int(height))

    def __enter__(self) -> Journal:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._path, "ab")
        self._file.truncate(self._whole)
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def add(self, source: str, found: Inspected) -> None:
        """One source is finished; the line is with the system when this returns."""
        self.known[source] = found
        self._file.write(("\t".join(map(str, (source, *found))) + "\n").encode())
        self._file.flush()
