"""Rows of a Parquet file, some thousand in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from recbole_mm.data.files import sha256_of
from recbole_mm.errors import DatasetError, SettingError

BATCH = 4_096  # rows in memory
MAGIC = b"PAR1"


def is_parquet(path: Path) -> bool:
    """By its first bytes.

    Raises:
        DatasetError: a file that cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise DatasetError(f"cannot read {path}: {error.strerror}") from error


class ParquetRows:
    """Rows as ``{column: value}`` with their numbers, from 1.

    Args:
        path: the file.
        columns: to read, as far as they are there; None reads all.

    Decimal numbers become whole or floating ones, and bytes in UTF-8 texts, because programs differ in what they write.

    Attributes:
        names: all columns of the file.
        n: rows so far.
        sha256: of the file, once all was read.

    Raises:
        DatasetError: no Parquet file, or one that was cut short.
        SettingError: pyarrow is not installed.
    """

    def __init__(self, path: Path, columns: Sequence[str] | None = None, *, progress: bool = True) -> None:
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise SettingError('Parquet files need pyarrow: pip install "recbole_mm[prep]"') from error

        self.path, self.n, self.sha256, self._progress = Path(path), 0, "", progress
        try:
            self._file = pyarrow.parquet.ParquetFile(path)
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise DatasetError(f"{path}: no whole Parquet file ({error}); download it again") from error
        self.names = list(self._file.schema_arrow.names)
        self._columns = self.names if columns is None else [name for name in self.names if name in columns]

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        import pyarrow
        from tqdm import tqdm

        n_rows = self._file.metadata.num_rows
        try:
            with tqdm(
                total=n_rows, desc=self.path.name, unit="row", unit_scale=True, leave=False, delay=1,
                disable=not self._progress,
            ) as bar:  # fmt: skip
                for batch in self._file.iter_batches(BATCH, columns=self._columns):
                    bar.update(batch.num_rows)
                    odd = [field.name for field in batch.schema if _is_odd(field.type)]
                    for row in batch.to_pylist():
                        self.n += 1
                        row.update((name, _plain(row[name])) for name in odd)
                        yield self.n, row
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise DatasetError(f"{self.path}: damaged after row {self.n} ({error}); download it again") from error
        self.sha256 = sha256_of(self.path)


def _is_odd(kind: Any) -> bool:
    from pyarrow import types

    return types.is_decimal(kind) or types.is_binary(kind) or types.is_large_binary(kind)


def _plain(value: Decimal | bytes | None) -> Any:
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        return value
