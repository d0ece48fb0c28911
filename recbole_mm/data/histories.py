"""Rows of a sequential data set as places in flat columns, and not as copies of each history for each of its prefixes.

A user's interactions stand once in the flat columns, and a row is two numbers: where its history starts, and where its
target is, which stands right behind it. A batch is gathered from them when it is asked for::

    values["item_id"]   a b c d e | p q r | 0
    row: a b c -> d     start 0, target 3
    row: p -> q         start 5, target 6

R rows over n interactions take O(n + R) memory in place of O(R x L), and give the batches that the copies would give.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from recbole.data.dataset import SequentialDataset
from recbole.data.interaction import Interaction
from recbole.utils.enum_type import FeatureType
from torch import Tensor

ROWS_AT_ONCE = 1 << 14  # of a column that is made whole


@dataclass
class HistoryColumns(MutableMapping[str, Tensor]):
    """The columns of rows by name, each made when it is read.

    Attributes:
        flat: field -> [n + 1, ...], an element for each interaction, and zeros at the end, which padding points to.
        start: [R], the first element before the target; the last one is ``target[r] - 1``.
        target: [R], the element that is the target.
        targets: column -> field whose element at ``target`` it holds.
        lists: column -> (field, L): its elements from ``start`` to right before ``target``, and zeros behind them.
        length_field: the column that holds ``target - start``; None for none.
        rows: column -> [R, ...], those that stand for themselves.
        names: the columns in order.
    """

    flat: dict[str, Tensor]
    start: Tensor
    target: Tensor
    targets: Mapping[str, str]
    lists: Mapping[str, tuple[str, int]]
    length_field: str | None
    names: list[str]
    rows: dict[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        if name not in self.lists or name in self.rows:
            return self.gather([name])[name]
        kind, width = self.lists[name]
        made = self.flat[kind].new_empty(len(self.target), width, *self.flat[kind].shape[1:])
        for begin in range(0, len(self.target), ROWS_AT_ONCE):
            block = slice(begin, begin + ROWS_AT_ONCE)
            made[block] = self.at(block).gather([name])[name]
        return made

    def __setitem__(self, name: str, value: Tensor) -> None:
        if name not in self.names:
            self.names = [*self.names, name]
        self.rows = {**self.rows, name: value}

    def __delitem__(self, name: str) -> None:
        self.names = [other for other in self.names if other != name]
        self.rows = {other: value for other, value in self.rows.items() if other != name}
        used = {self.targets.get(other) for other in self.names} | {
            self.lists[other][0] for other in self.names if other in self.lists
        }
        self.flat = {other: value for other, value in self.flat.items() if other in used}

    def __iter__(self) -> Iterator[str]:
        return iter(list(self.names))

    def __len__(self) -> int:
        return len(self.names)

    def at(self, rows: slice | Tensor) -> HistoryColumns:
        """Some rows, in this order; the flat columns are shared."""
        return replace(
            self,
            start=self.start[rows],
            target=self.target[rows],
            rows={name: value[rows] for name, value in self.rows.items()},
        )

    def gather(self, names: list[str]) -> dict[str, Tensor]:
        """These columns of all rows; what several of them need is made once."""
        columns, places = {}, {}
        length = self.target - self.start
        for name in names:
            if name in self.rows:
                columns[name] = self.rows[name]
            elif name in self.targets:
                columns[name] = self.flat[self.targets[name]].index_select(0, self.target)
            elif name == self.length_field:
                columns[name] = length.long()
            else:
                kind, width = self.lists[name]
                values = self.flat[kind]
                if width not in places:
                    position = torch.arange(width, dtype=self.start.dtype)
                    place = self.start.unsqueeze(1) + position  # [R, L]
                    place.masked_fill_(position >= length.unsqueeze(1), len(values) - 1)
                    places[width] = place.view(-1)
                columns[name] = values.index_select(0, places[width]).view(-1, width, *values.shape[1:])
        return columns


class Histories(Interaction):
    """What stands for an ``Interaction`` with a row per prefix, and makes its columns when they are read.

    ``histories["item_id_list"]`` is [R, L], made anew each time; ``histories[rows]`` are some of the rows, still as
    places; ``histories.batch(rows)`` is a plain ``Interaction`` of them.
    """

    def __init__(self, columns: HistoryColumns) -> None:
        self.interaction = columns
        self.length = len(columns.target)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, str):
            return self.interaction[index]
        if isinstance(index, (int, np.integer)):
            return self.batch([index])[0]
        return Histories(self.interaction.at(_rows(index)))

    def batch(self, index: Any) -> Interaction:
        """Rows with all their columns, as a model sees them. O(rows x L) time and memory."""
        columns = self.interaction.at(_rows(index))
        return Interaction(columns.gather(columns.names))

    def _reindex(self, index: Any) -> None:
        self.interaction = self.interaction.at(_rows(index))

    # ------------------------------------------------ what a loader of another kind builds on

    @property
    def values(self) -> dict[str, Tensor]:
        """field -> [n + 1, ...], the flat columns; the last element is padding."""
        return self.interaction.flat

    @property
    def start(self) -> Tensor:
        """[R], where the history of a row begins in the flat columns."""
        return self.interaction.start

    @property
    def stop(self) -> Tensor:
        """[R], where it ends: the first place behind it, which is the target's."""
        return self.interaction.target

    @property
    def target(self) -> Tensor:
        """[R], the place of the target."""
        return self.interaction.target

    def held(self, field: str) -> Tensor:
        """All values of a field that some row holds, before its target or as its target: [h], each place once."""
        n = len(self.values[field]) - 1
        begun = torch.bincount(self.start, minlength=n + 1) - torch.bincount(self.stop, minlength=n + 1)
        held = begun.cumsum(0)[:n] > 0
        held[self.target.long()] = True
        return self.values[field][:n][held]


def _rows(index: Any) -> slice | Tensor:
    """Rows as a tensor knows them: what ``Interaction`` takes as a list of Python numbers."""
    if isinstance(index, slice):
        return index
    if isinstance(index, Tensor):
        return index
    index = np.asarray(index)
    return torch.from_numpy(index if index.size else index.astype(np.int64))


class HistoryColumn:
    """One column of histories that is read in parts: ``column[rows]`` is [r, L], NumPy."""

    def __init__(self, histories: Histories, name: str) -> None:
        self._columns, self._name = histories.interaction, name
        self.shape = (len(histories), histories.interaction.lists[name][1])

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        return self._columns.at(_rows(index))[self._name].numpy()


def column_in_parts(feat: Interaction, name: str) -> HistoryColumn | np.ndarray:
    """A column that is read in parts, rows by rows; made whole only where it is there as a whole."""
    if isinstance(feat, Histories) and name in feat.interaction.lists and name not in feat.interaction.rows:
        return HistoryColumn(feat, name)
    return feat[name].numpy()


# ------------------------------------------------ made of flat columns


def histories_of_prefixes(
    feat: Mapping[str, Tensor],
    *,
    start: np.ndarray,
    target: np.ndarray,
    lists: Mapping[str, str],
    max_length: int,
    length_field: str,
) -> Histories:
    """Rows whose history ends right before their target.

    Args:
        feat: field -> [n, ...], interactions in order.
        start, target: [R] places in it.
        lists: field -> name of the column of histories; those without have targets alone.
        max_length: L.
        length_field: the column of lengths.
    """
    target = _places(target, len(target) and int(target.max()))
    names = [*feat, *lists.values(), length_field]
    return Histories(
        HistoryColumns(
            flat={name: _with_padding(value) for name, value in feat.items()},
            start=torch.from_numpy(np.asarray(start)).to(target.dtype),
            target=target,
            targets={name: name for name in feat},
            lists={column: (name, max_length) for name, column in lists.items()},
            length_field=length_field,
            names=names,
        )
    )


def histories_of_lists(
    rows: Mapping[str, Tensor],
    lists: Mapping[str, tuple[str, Tensor]],
    lengths: np.ndarray,
    *,
    names: list[str],
) -> Histories:
    """Rows whose histories are given one by one: each has elements of its own, its target behind them.

    Args:
        rows: column -> [R, ...], columns of rows.
        lists: column -> the field whose history it is, and [sum of lengths, ...] its elements, row by row. The targets
            are those of the column of that field, and 0 where there is none like it; it then stands for itself.
        lengths: [R], elements of each row.
        names: the columns in order.
    """
    n = int(lengths.sum()) + len(lengths)
    target = _places(np.cumsum(lengths + 1) - 1, n)
    before = torch.ones(n, dtype=torch.bool)
    before[target.long()] = False
    values, targets = {}, {}
    for kind, elements in lists.values():
        values[kind] = elements.new_zeros(n + 1, *elements.shape[1:])
        values[kind][:n][before] = elements
        own = rows.get(kind)
        if own is not None and (own.dtype, own.shape[1:]) == (elements.dtype, elements.shape[1:]):
            values[kind][target.long()] = own
            targets[kind] = kind
    return Histories(
        HistoryColumns(
            flat=values,
            start=target - torch.from_numpy(lengths).to(target.dtype),
            target=target,
            targets=targets,
            lists={name: (kind, int(lengths.max())) for name, (kind, _) in lists.items()},
            length_field=None,
            rows={name: value for name, value in rows.items() if name not in targets},
            names=names,
        )
    )


def _places(places: np.ndarray, largest: int) -> Tensor:
    """Numbers of elements, in the smaller of two types that holds them and the place of the padding."""
    return torch.from_numpy(places).to(torch.int32 if largest < (1 << 31) - 2 else torch.int64)


def _with_padding(values: Tensor) -> Tensor:
    return torch.cat([values, values.new_zeros(1, *values.shape[1:])])


# ------------------------------------------------ data sets with such rows


class IndexedHistories:
    """Mixin for a ``SequentialDataset`` of RecBole: put it before; rows, batches and their order stay the same.

    The setting ``history_storage: copies`` makes the rows as RecBole does, padded copies.

    Differs from RecBole's in this: prefixes and groups of users are found by array arithmetic, batches are gathered.
    """

    def __getitem__(self, index: Any, join: bool = True) -> Interaction:
        feat = self.inter_feat
        batch = feat.batch(index) if isinstance(feat, Histories) else feat[index]
        return self.join(batch) if join else batch

    def join(self, df: Interaction) -> Interaction:
        """RecBole's, without Python lists: the columns of users and items beside those of ``df``."""
        for feat, key in (
            (self.user_feat, self.uid_field),
            (self.item_feat, self.iid_field),
        ):
            if feat is not None and key in df:
                rows = df[key]
                df.update(Interaction({name: values[rows] for name, values in feat.interaction.items()}))
        return df

    def data_augmentation(self) -> None:
        """One row per prefix, in order of users and times. O(n log n) time, O(n) memory."""
        self._aug_presets()
        self._check_field("uid_field", "time_field")
        self.sort(by=[self.uid_field, self.time_field], ascending=True)
        first, place = first_of_user(self.inter_feat[self.uid_field].numpy())
        target = np.flatnonzero(place > first)  # all but a user's first
        start = np.maximum(first[target], target - self.max_item_list_len)
        self.inter_feat = self._rows_of_prefixes(self.inter_feat.interaction, start, target)

    def _rows_of_prefixes(self, feat: Mapping[str, Tensor], start: np.ndarray, target: np.ndarray) -> Interaction:
        """Rows over these interactions, stored as the setting says."""
        made = histories_of_prefixes(
            feat,
            start=start,
            target=target,
            lists={name: getattr(self, f"{name}_list_field") for name in feat if name != self.uid_field},
            max_length=self.max_item_list_len,
            length_field=self.item_list_length_field,
        )
        return Interaction(dict(made.interaction)) if self._stores_copies() else made

    def _stores_copies(self) -> bool:
        return self.config["history_storage"] == "copies"

    # ------------------------------------------------ folders that are split already

    def _dataframe_to_interaction(self, data: pd.DataFrame) -> Interaction:
        """The lists of a folder that is split already keep their lengths; all else is RecBole's."""
        if self.benchmark_filename_list is None or data is not self.inter_feat or self._stores_copies():
            return super()._dataframe_to_interaction(data)
        lengths = data[self.item_list_length_field].to_numpy()
        lists = {name: field for name in data if (field := self._field_of_list(name, data[name], lengths))}
        rest = super()._dataframe_to_interaction(data[[name for name in data if name not in lists]])
        elements = {name: (field, self._elements(data[name], name)) for name, field in lists.items()}
        return histories_of_lists(rest.interaction, elements, lengths, names=list(data))

    def _field_of_list(self, name: str, column: pd.Series, lengths: np.ndarray) -> str | None:
        """The field whose histories a column holds, as long as those of the items; None for another column."""
        suffix, kind = self.config["LIST_SUFFIX"], self.field2type[name]
        if kind not in (
            FeatureType.TOKEN_SEQ,
            FeatureType.FLOAT_SEQ,
        ) or not name.endswith(suffix):
            return None
        if name in self.config["numerical_features"] or self.field2seqlen[name] < lengths.max():
            return None
        same = np.array_equal(np.fromiter(map(len, column), dtype=np.int64, count=len(column)), lengths)
        return name.removesuffix(suffix) if same else None

    def _elements(self, column: pd.Series, name: str) -> Tensor:
        dtype = torch.int64 if self.field2type[name] == FeatureType.TOKEN_SEQ else torch.float32
        return torch.from_numpy(np.concatenate(column.to_numpy())).to(dtype)

    # ------------------------------------------------ parts

    def _grouped_index(self, group_by_list: Any) -> Groups:
        return Groups.of(np.asarray(group_by_list))

    def _split_index_by_leave_one_out(self, grouped_index: Groups, leave_one_num: int) -> list[np.ndarray]:
        return grouped_index.leave_out(leave_one_num)


class IndexedDataset(IndexedHistories, SequentialDataset):
    """RecBole's own ``SequentialDataset``, with rows as places; for those who use RecBole without this package's runs.

    ``data_preparation`` of `recbole_mm.data.loading` gives it loaders that gather batches.
    """


def first_of_user(users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of interactions that are ordered by user, the place of the user's first one, and their own: [n] each."""
    place = np.arange(len(users))
    return np.maximum.accumulate(np.where(np.diff(users, prepend=-1) != 0, place, 0)), place


@dataclass(frozen=True)
class Groups:
    """Rows by group, groups in order of their first row and rows of a group in theirs.

    Attributes:
        rows: [R] row numbers, group after group.
        sizes: [G], rows of each group.
    """

    rows: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of(cls, keys: np.ndarray) -> Groups:
        """Rows of equal keys belong together."""
        number = pd.factorize(keys)[0]
        return cls(np.argsort(number, kind="stable"), np.bincount(number))

    def __iter__(self) -> Iterator[list[int]]:
        rows = self.rows.tolist()
        ends = np.cumsum(self.sizes)
        for start, end in zip((ends - self.sizes).tolist(), ends.tolist(), strict=True):
            yield rows[start:end]

    def leave_out(self, n: int) -> list[np.ndarray]:
        """The last ``n`` rows of each group apart: the others, the n-th last of each group, ..., the last of each.

        A group keeps its first row, so that a small one gives its last rows only.
        """
        from_end = np.repeat(np.cumsum(self.sizes), self.sizes) - 1 - np.arange(len(self.rows))  # 0 for the last
        apart = from_end < np.repeat(np.minimum(self.sizes - 1, n), self.sizes)
        return [
            self.rows[~apart],
            *(self.rows[apart & (from_end == place)] for place in reversed(range(n))),
        ]
