"""Shards: a fixed number of contents, encoded together and kept in a file each until the feature is complete."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dataset_prep.encoding.contents import Contents
from recbole_mm.data.files import write_atomically

WORK = ".work"
SUFFIX = ".npz"
CACHED_BYTES = 1 << 28  # of shards held while rows are put together


class Shard(NamedTuple):
    """What an encoder made of a run of contents.

    Attributes:
        rows: [S, F] float32, those of all contents in a row.
        counts: [n] int64, how many of the rows each content has.
        reasons: n of them: why a content has no row, "" for one that has.
        several: whether the encoder makes several rows of a content.
        notes: what it counted, such as ``{"truncated": 3}``.
    """

    rows: np.ndarray
    counts: np.ndarray
    reasons: list[str]
    several: bool = False
    notes: dict[str, int] = {}


def joined(parts: Sequence[Shard]) -> Shard:
    """One shard of several that follow each other."""
    rows = [part.rows for part in parts if len(part.rows)]
    notes: Counter[str] = Counter()
    for part in parts:
        notes.update(part.notes)
    return Shard(
        rows=np.concatenate(rows) if rows else np.empty((0, 0), dtype=np.float32),
        counts=np.concatenate([part.counts for part in parts]),
        reasons=[reason for part in parts for reason in part.reasons],
        several=any(part.several for part in parts),
        notes=dict(notes),
    )


def pack(shard: Shard) -> bytes:
    """The content of a shard's file: an ``.npz`` without pickles, in which every member has a checksum."""
    said = {"reasons": shard.reasons, "several": shard.several, "notes": shard.notes}
    said = np.frombuffer(json.dumps(said, sort_keys=True).encode(), dtype=np.uint8)
    out = io.BytesIO()
    np.savez(out, rows=shard.rows, counts=shard.counts, said=said)
    return out.getvalue()


def unpack(content: bytes) -> Shard:
    """A shard from the content of its file.

    Raises:
        ValueError: it is cut short, changed or no shard.
    """
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as members:
            rows, counts, said = members["rows"], members["counts"], json.loads(members["said"].tobytes())
        shard = Shard(rows, counts, said["reasons"], said["several"], said["notes"])
    except Exception as error:  # zipfile, zlib, NumPy and json each raise their own
        raise ValueError(f"no shard ({type(error).__name__}: {error})") from error
    fits = rows.ndim == 2 and counts.ndim == 1 and counts.sum() == len(rows) and len(shard.reasons) == len(counts)
    if not fits or (rows.dtype, counts.dtype) != (np.float32, np.int64) or (counts < 0).any():
        raise ValueError("no shard (its parts do not fit each other)")
    return shard


class WorkFolder:
    """The finished shards of one feature, ``<folder>/features/.work/<feature>-<key>/<number>.npz``.

    Shards of another key are of no use any more and are removed, as is what a killed run left half-written; so only
    one process at a time may use it.

    Args:
        folder: the dataset folder.
        feature: name of the feature.
        key: hex digits that stand for encoder, settings and contents.
    """

    def __init__(self, folder: Path, feature: str, key: str) -> None:
        self.root = Path(folder) / "features" / WORK
        self.path = self.root / f"{feature}-{key[:16]}"
        self._feature = feature

    def clean(self) -> None:
        """Remove leftovers: half-written files of the folder, and this feature's shards of another key."""
        features = self.root.parent
        for place, pattern in (
            (features.parent, "manifest.json.partial-*"),
            (features, f"{self._feature}.*.partial-*"),
        ):
            for path in place.glob(pattern):
                path.unlink(missing_ok=True)
        for path in self.path.glob("*.partial-*"):
            path.unlink(missing_ok=True)
        ours = re.compile(re.escape(self._feature) + r"-[0-9a-f]{16}")
        for path in self.root.glob("*"):
            if path != self.path and ours.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)

    def file(self, number: int) -> Path:
        return self.path / f"{number:06d}{SUFFIX}"

    def write(self, number: int, content: bytes) -> None:
        write_atomically(self.file(number), lambda out: out.write(content))

    def read(self, number: int) -> Shard:
        """A finished shard.

        Raises:
            FileNotFoundError: there is none.
            ValueError: its file was cut short or changed.
        """
        return unpack(self.file(number).read_bytes())

    def remove(self) -> None:
        """Remove all shards, and the folder of work if nothing else is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self.root.is_dir() and not any(self.root.iterdir()):
            self.root.rmdir()


class Encoded:
    """What became of all contents, as far as memory must hold it; rows stay in their shards.

    Attributes:
        counts: [n] int64, rows of each content.
        reasons: of each content without rows.
        several: whether the encoder makes several rows of a content.
        width: F, None before the first row.
        notes: what the encoder counted.
    """

    def __init__(self, contents: Contents, shard_size: int, work: WorkFolder) -> None:
        self._contents, self._shard_size, self._work = contents, shard_size, work
        self.counts = np.zeros(len(contents.unique), dtype=np.int64)
        self.reasons: dict[int, str] = {}
        self.several, self.width, self.notes = False, None, Counter()
        self._open: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._open_bytes = 0

    @property
    def n_shards(self) -> int:
        return -(-len(self._contents.unique) // self._shard_size)

    def members(self, number: int) -> range:
        """Numbers of the contents of a shard."""
        start = number * self._shard_size
        return range(start, min(start + self._shard_size, len(self._contents.unique)))

    def contents(self, number: int) -> list[str]:
        members = self.members(number)
        return self._contents.unique[members.start : members.stop]

    def described(self, number: int) -> str:
        """A shard for a message."""
        members = self.members(number)
        first, last = (self._contents.described(n) for n in (members.start, members.stop - 1))
        return f"shard {number} ({len(members)} {self._contents.kind}s, from {first} to {last})"

    def take_note(self, number: int, shard: Shard) -> None:
        """Remember what a shard says of its contents.

        Raises:
            ValueError: it has another number of contents than this shard must have, or another width than others.
        """
        members = self.members(number)
        if len(shard.counts) != len(members):
            raise ValueError(f"shard {number} has {len(shard.counts)} contents, expected {len(members)}")
        if len(shard.rows):
            if self.width not in (None, shard.rows.shape[1]):
                raise ValueError(f"shard {number} has width {shard.rows.shape[1]}, others have {self.width}")
            self.width = shard.rows.shape[1]
        self.counts[members.start : members.stop] = shard.counts
        self.reasons |= {n: why for n, why in zip(members, shard.reasons, strict=True) if why}
        self.several |= shard.several
        self.notes.update(shard.notes)

    def finished(self) -> set[int]:
        """Shards that are there and whole; takes note of them."""
        done = set()
        for number in range(self.n_shards):
            try:
                self.take_note(number, self._work.read(number))
                done.add(number)
            except FileNotFoundError:
                continue
            except ValueError:
                self._work.file(number).unlink(missing_ok=True)
        return done

    def rows_of(self, content: int) -> np.ndarray:
        """[counts[content], F] float32."""
        number, position = divmod(content, self._shard_size)
        if number not in self._open:
            shard = self._work.read(number)
            self._open[number] = shard.rows, np.concatenate([[0], shard.counts.cumsum()])
            self._open_bytes += shard.rows.nbytes
            while self._open_bytes > CACHED_BYTES and len(self._open) > 1:
                _, (rows, _) = self._open.popitem(last=False)
                self._open_bytes -= rows.nbytes
        self._open.move_to_end(number)
        rows, starts = self._open[number]
        return rows[starts[position] : starts[position + 1]]

    def item_rows(self, *, at_once: int) -> Iterator[np.ndarray]:
        """Rows of all items, in their order, in blocks of about ``at_once`` rows: [b, F] each."""
        block, n = [], 0
        for numbers in self._contents.of_items:
            for number in numbers:
                if self.counts[number]:
                    block.append(self.rows_of(number))
                    n += len(block[-1])
            if n >= at_once:
                yield np.concatenate(block)
                block, n = [], 0
        if block:
            yield np.concatenate(block)

    def item_counts(self) -> np.ndarray:
        """[items] int64, rows of each item."""
        counts = [int(self.counts[numbers].sum()) if numbers else 0 for numbers in self._contents.of_items]
        return np.array(counts, dtype=np.int64)

    def item_reasons(self) -> list[str]:
        """Why each item without rows has none."""
        return [
            why or next((self.reasons[n] for n in numbers if n in self.reasons), "")
            for numbers, why in zip(self._contents.of_items, self._contents.reasons, strict=True)
        ]
