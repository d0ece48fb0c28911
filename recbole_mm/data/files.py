"""Files of a dataset folder: written completely or not at all, tables read byte for byte.

A table is a RecBole atomic file: fields separated by tabs, each column typed in the header,
``item_id:token<TAB>title:token_seq<TAB>price:float``.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from recbole_mm.errors import DatasetError

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class FileInfo:
    """Size and hash of one file of the folder."""

    bytes: int
    sha256: str


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def file_info(path: Path) -> FileInfo:
    return FileInfo(bytes=path.stat().st_size, sha256=sha256_of(path))


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then rename it: readers see the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        with open(partial, "wb") as out:
            write(out)
            out.flush()
            os.fsync(out.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename in this folder survive a loss of power; Windows cannot open folders and does without."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_table(path: Path, columns: dict[str, Sequence[Any]]) -> None:
    """Write a RecBole atomic file.

    Args:
        columns: ``{"item_id:token": values, ...}``, all of the same length. Floats are written with ``repr``, other
            values with ``str``; None and NaN become an empty field.

    Raises:
        DatasetError: a value holds a tab or a line break, which would shift the columns.
    """

    def text(value: Any) -> str:
        if value is None or value != value:
            return ""
        text = repr(float(value)) if isinstance(value, (float, np.floating)) else str(value)
        if "\t" in text or "\n" in text or "\r" in text:
            raise DatasetError(f"{path.name}: the value {text[:60]!r} holds a tab or line break, which part fields")
        return text

    def write(out: BinaryIO) -> None:
        out.write(("\t".join(columns) + "\n").encode())
        for row in zip(*columns.values(), strict=True):
            out.write(("\t".join(map(text, row)) + "\n").encode())

    path = Path(path)
    write_atomically(path, write)


def read_table(path: Path, *, needed: Sequence[str] = (), optional: Sequence[str] | None = None) -> DataFrame:
    """Read a RecBole atomic file byte for byte: quotes, ``NA`` and leading zeros are kept as they stand.

    RecBole's own reader loses rows when a text holds an unbalanced quote, and takes the id ``NA`` for a missing one.

    Args:
        needed: columns that must be there.
        optional: further columns to read if they are there; None reads all.

    Returns:
        Text columns named without their types; ``.attrs["types"]`` has the types, ``{"item_id": "token", ...}``.

    Raises:
        DatasetError: no file, no header, an untyped or missing column, a row of another width, no rows, not UTF-8.
    """
    import pandas as pd

    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DatasetError(f"cannot read {path}: {error.strerror}") from error
    content = content.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n")
    try:
        header = content.partition(b"\n")[0].decode()
        content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DatasetError(f"{path}, line {line}: not UTF-8 at byte {error.start}; save the file as UTF-8") from error

    types = _column_types(header, path)
    missing = [name for name in needed if name not in types]
    if missing:
        raise DatasetError(f"{path} has no column {', '.join(missing)}; its columns are {', '.join(types)}")

    starts, ends, tabs = _lines(content)
    wrong = np.flatnonzero((tabs != len(types) - 1) & (ends > starts))
    if len(wrong):
        row = int(wrong[0])
        raise DatasetError(
            f"{path}, line {row + 1}: {tabs[row] + 1} fields, the header has {len(types)}"
            f" ({len(wrong)} such lines); fields are separated by one tab"
        )
    if not (ends[1:] > starts[1:]).any():
        raise DatasetError(f"{path} has a header but no rows")

    wanted = [name for name in types if optional is None or name in needed or name in optional]
    frame = pd.read_csv(
        io.BytesIO(content), sep="\t", header=0, names=list(types), usecols=wanted, dtype=str, index_col=False,
        keep_default_na=False, na_filter=False, quoting=csv.QUOTE_NONE, lineterminator="\n", encoding="utf-8",
    )  # fmt: skip
    frame = frame.astype(object)
    frame.attrs["types"] = {name: types[name] for name in wanted}
    return frame[wanted]


def read_header(path: Path) -> dict[str, str]:
    """Columns and types of an atomic file, such as ``{"item_id": "token"}``.

    Raises:
        DatasetError: an unreadable file, or a column without type.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            return _column_types(file.readline().rstrip("\r\n"), Path(path))
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"cannot read {path}: {error}") from error


def _column_types(header: str, path: Path) -> dict[str, str]:
    types = {}
    for column in header.split("\t"):
        name, colon, kind = column.partition(":")
        if not colon or kind not in ("token", "token_seq", "float", "float_seq"):
            raise DatasetError(
                f"{path}, line 1: column {column!r} has no type; the header of an atomic file reads like "
                "user_id:token<TAB>item_id:token<TAB>timestamp:float"
            )
        types[name] = kind
    return types


def _lines(content: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start, end and number of tabs of every line."""
    data = np.frombuffer(content, dtype=np.uint8)
    ends = np.flatnonzero(data == 10)
    if len(data) and data[-1] != 10:
        ends = np.append(ends, len(data))
    starts = np.concatenate([[0], ends[:-1] + 1]) if len(ends) else np.array([], dtype=np.int64)
    positions = np.flatnonzero(data == 9)
    return starts, ends, np.searchsorted(positions, ends) - np.searchsorted(positions, starts)


def numbers(frame: DataFrame, column: str, path: Path, *, may_be_empty: bool = False) -> np.ndarray:
    """A text column as float64, every digit exact; NaN where empty.

    Raises:
        DatasetError: naming file and line of the first value that is no finite number.
    """
    import pandas as pd

    text = frame[column]
    plain = _plain_numbers(text.to_numpy())
    if plain is not None:
        return plain
    empty = (text == "").to_numpy()
    plausible = pd.to_numeric(text.where(~empty, None), errors="coerce").to_numpy(dtype=float)
    bad = ~np.isfinite(plausible) & ~(empty & may_be_empty)
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise DatasetError(
            f"{path}, line {row + 2}: {column} is {text.iloc[row]!r}, expected a finite number ({bad.sum()} such rows)"
        )
    # Python's float, because pandas before 3 reads some decimals with a wrong last bit.
    return text.where(~empty, "nan").to_numpy(dtype=object).astype(np.float64)


def _plain_numbers(text: np.ndarray) -> np.ndarray | None:
    """All of them at once if nothing but digits, signs, points and exponents is there; None where one is odd."""
    if "".join(text).encode().translate(None, b"0123456789+-.eE"):
        return None
    try:
        values = text.astype(np.float64)
    except ValueError:
        return None
    return values if np.isfinite(values).all() else None
