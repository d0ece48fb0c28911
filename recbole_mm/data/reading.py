"""Read atomic files into RecBole's ``Dataset``: what RecBole does, byte-exact and on today's pandas and NumPy."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from recbole.utils.enum_type import FeatureSource, FeatureType

from recbole_mm.data.files import numbers, read_table
from recbole_mm.data.layout import PADDING_TOKEN
from recbole_mm.errors import DatasetError, SettingError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pandas import DataFrame, Series


class SafeReading:
    """Mixin for RecBole's ``Dataset``: put it first, ``class MyDataset(SafeReading, SequentialDataset)``.

    On clean files ids and tensors are RecBole's own. Different are: quotes and ids such as ``NA`` are kept as they
    stand, a broken file is refused with file and line, float columns are exact float64, and sequences may be empty.
    """

    def _load_feat(self, filepath: str, source: FeatureSource | str) -> DataFrame | None:
        """Read one file and set type, source and length of its fields.

        Raises:
            DatasetError: naming file and line.
            SettingError: field_separator or encoding is not that of atomic files.
        """
        load_col, unload_col = self._get_load_and_unload_col(source)
        if load_col == set():
            return None
        for key, only in (("field_separator", "\t"), ("encoding", "utf-8")):
            if (self.config[key] or only).lower() != only:
                raise SettingError(
                    f"{key} is {self.config[key]!r}, but atomic files are read with {only!r}; convert them"
                )
        path = Path(filepath)
        table = read_table(path, optional=load_col)
        types = {
            name: FeatureType(kind) for name, kind in table.attrs["types"].items() if name not in (unload_col or ())
        }
        if not types:
            self.logger.warning(f"No columns has been loaded from [{source}]")
            return None

        columns = {}
        for field, ftype in types.items():
            if source != "link":  # the fields of a link file are those of other files
                self.field2source[field] = source
                self.field2type[field] = ftype
                if "float" in ftype.value:
                    self.field2bucketnum[field] = 2
            if ftype == FeatureType.TOKEN:
                columns[field] = table[field].where(table[field] != "", np.nan)
            elif ftype == FeatureType.FLOAT:
                columns[field] = numbers(table, field, path, may_be_empty=True)
            else:
                values, lengths = _elements(table[field], ftype, self.config["seq_separator"], path)
                longest = int(lengths.max())
                at_most = (self.config["seq_len"] or {}).get(field, longest)
                columns[field] = _rows(values, lengths, at_most=at_most)
            if ftype in (FeatureType.TOKEN_SEQ, FeatureType.FLOAT_SEQ):
                self.field2seqlen[field] = min(at_most, longest)
            elif source != "link":
                self.field2seqlen[field] = 1
        return pd.DataFrame(columns)

    def _concat_remaped_tokens(self, remap_list: list[tuple]) -> tuple[np.ndarray, np.ndarray]:
        parts = [
            np.concatenate(feat[field].to_list())
            if ftype == FeatureType.TOKEN_SEQ
            else feat[field].to_numpy(dtype=object)
            for feat, field, ftype in remap_list
        ]
        return np.concatenate(parts), np.cumsum([len(part) for part in parts])[:-1]

    def _remap(self, remap_list: list[tuple]) -> None:
        """Number the tokens of these columns together, in order of appearance from 1; a missing token is 0."""
        if not remap_list:
            return
        tokens, split_points = self._concat_remaped_tokens(remap_list)
        ids, names = pd.factorize(tokens)
        names = np.array([PADDING_TOKEN, *names])
        token_id = {token: i for i, token in enumerate(names.tolist())}
        if len(token_id) < len(names):
            fields = sorted({field for _, field, _ in remap_list})
            raise DatasetError(
                f"{self.dataset_name}: {', '.join(fields)} holds the token {PADDING_TOKEN}, RecBole's padding;"
                " rename it"
            )

        for (feat, field, ftype), new_ids in zip(remap_list, np.split(ids + 1, split_points), strict=True):
            self.field2id_token.setdefault(field, names)
            self.field2token_id.setdefault(field, token_id)
            if ftype == FeatureType.TOKEN_SEQ:
                feat[field] = _rows(new_ids, lengths_of(feat[field]), index=feat.index)
            else:
                feat[field] = new_ids

    def _fill_nan(self) -> None:
        """Missing tokens become the padding, missing numbers the mean of their column, missing sequences empty ones."""
        for feat_name in self.feat_name_list:
            feat = getattr(self, feat_name)
            for field in feat:
                ftype = self.field2type[field]
                if ftype == FeatureType.TOKEN:
                    feat[field] = feat[field].fillna(0).astype(np.int64)
                elif ftype == FeatureType.FLOAT:
                    feat[field] = feat[field].fillna(feat[field].mean())
                else:
                    empty = np.array([], dtype=np.int64 if ftype == FeatureType.TOKEN_SEQ else np.float64)
                    filled = [empty if isinstance(row, float) else row for row in feat[field]]
                    feat[field] = pd.Series(filled, index=feat.index, dtype=object)

    def _benchmark_presets(self) -> None:
        """Name the list fields of a dataset that is split already, and add the length of each item list."""
        suffix = self.config["LIST_SUFFIX"]
        for field in self.inter_feat:
            if field + suffix in self.inter_feat:
                setattr(self, f"{field}_list_field", field + suffix)
        item_list = self.iid_field + suffix
        if item_list not in self.inter_feat:
            raise DatasetError(
                f"{self.dataset_name}: the .inter files of benchmark_filename need a column {item_list}:token_seq, "
                f"loaded are {', '.join(self.inter_feat)}; add it to the files and to load_col"
            )
        self.item_id_list_field = item_list  # RecBole's models ask for this very name
        self.set_field_property(self.item_list_length_field, FeatureType.TOKEN, FeatureSource.INTERACTION, 1)
        self.inter_feat[self.item_list_length_field] = lengths_of(self.inter_feat[item_list])


def lengths_of(column: Series) -> np.ndarray:
    """Number of elements of each row of a sequence column, int64."""
    return np.fromiter(map(len, column), dtype=np.int64, count=len(column))


def _elements(column: Series, ftype: FeatureType, separator: str, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """All elements of a sequence column in a row, and how many belong to each line."""
    lists = [[element for element in text.split(separator) if element] for text in column]
    lengths = np.fromiter(map(len, lists), dtype=np.int64, count=len(lists))
    elements = _object_array(list(chain.from_iterable(lists)))
    if ftype == FeatureType.TOKEN_SEQ:
        return elements, lengths
    try:
        values = elements.astype(np.float64)
        bad = np.flatnonzero(~np.isfinite(values))
    except ValueError:
        values, bad = elements, [i for i, element in enumerate(elements) if not _is_number(element)]
    if len(bad):
        line = int(np.searchsorted(np.cumsum(lengths), bad[0], side="right")) + 2
        raise DatasetError(
            f"{path}, line {line}: {column.name} holds {elements[bad[0]]!r}, expected finite numbers separated by "
            f"{separator!r} ({len(bad)} such values)"
        )
    return values, lengths


def _is_number(text: str) -> bool:
    try:
        return bool(np.isfinite(float(text)))
    except ValueError:
        return False


def _object_array(values: Sequence[Any]) -> np.ndarray:
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def _rows(values: np.ndarray, lengths: np.ndarray, *, at_most: int | None = None, index: Any = None) -> Series:
    """Cut ``values`` into one array per row, of the given lengths; ``at_most`` keeps the first of each row."""
    ends = np.cumsum(lengths)
    starts = ends - lengths
    if at_most is not None:
        ends = np.minimum(ends, starts + at_most)
    rows = [values[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
    return pd.Series(rows, index=index, dtype=object)
