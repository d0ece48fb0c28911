"""Training targets that share a pass: one causal pass over a history predicts the item behind each of its positions.

rows  (prefix, next item)     a | b    a b | c    a b c | d
pass  (carrier)               a b c -> b c d

A row is a prefix of a history and the item that follows. Left-to-right models compute the same at a position whatever
stands behind it, so that a row can be read off the pass over any history that begins with its prefix. A pass is the
prefix of one of its own rows, the carrier; nothing else has to be stored.

Shapes: R rows, n passes; of a batch: T targets, S sequences.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_mm.data.histories import Histories, column_in_parts
from recbole_mm.ragged import segments_of

# Fields of a batch; its item ids are [T], its histories and their lengths [S].
PASS_ROW = "pass_row"  # [T], the sequence of the batch that a target is read off
PASS_POSITION = "pass_position"  # [T], the position there, from 0
PART_WEIGHT = "part_weight"  # [1], with several processes: what the mean over this process' targets counts

TRAIN_POSITIONS = ("last", "all", "windows")  # the setting train_positions
BLOCK = 1 << 14  # rows whose lists are compared at once


class Spans(NamedTuple):
    """Where rows lie: row r is the items ``start[r]`` to ``start[r] + length[r] - 1`` of its sequence, and the target.

    Attributes:
        sequence: [R] number of the sequence, such as a user.
        start: [R] place of the first item of the prefix in it.
        length: [R] of the prefix, at least 1.
    """

    sequence: np.ndarray
    start: np.ndarray
    length: np.ndarray


class Passes(NamedTuple):
    """Which rows are read off which pass.

    Attributes:
        carrier: [n] the row whose prefix the pass is over.
        row: [R] every row once, pass by pass.
        position: [R] where each of ``row`` is read.
        begin: [n] where each pass begins in ``row``.
        count: [n] its number of rows.
    """

    carrier: Tensor
    row: Tensor
    position: Tensor
    begin: Tensor
    count: Tensor


def whole_passes(spans: Spans) -> Passes:
    """One pass for all rows whose prefixes begin at the same place; exact. O(R log R) time.

    A row whose history was cut to its newest items begins later than the others and has a pass of its own.
    """
    order = np.lexsort((spans.length, spans.start, spans.sequence))  # [R]
    last = (np.diff(spans.sequence[order], append=-1) != 0) | (np.diff(spans.start[order], append=-1) != 0)  # [R]
    ends = np.flatnonzero(last) + 1  # [n]
    return _passes(order, spans.length[order] - 1, carrier=order[ends - 1], begin=np.append(0, ends[:-1]))


def window_passes(spans: Spans, max_length: int) -> Passes:
    """Long histories in overlapping windows of ``max_length`` items; approximate, each row read once.

    Rows whose histories are not cut share a pass as in `whole_passes`. The others see half of ``max_length`` items at
    least: windows are laid from the newest item back, so that each one ends right before a target of its own. A
    sequence of h items has about 2 h / ``max_length`` passes. Where rows were cut shorter before, in a folder that is
    split already, the longest of them counts in place of ``max_length``.
    Time: O(R log R) and a round for each window of the longest sequence.
    """
    max_length = min(max_length, int(spans.length.max()))
    half = math.ceil(max_length / 2)
    end = spans.start + spans.length
    order = np.lexsort((end, spans.sequence))  # [R]
    number = np.cumsum(np.diff(spans.sequence[order], prepend=-1) != 0) - 1  # [R], sequences in a row
    first_row = np.flatnonzero(np.diff(number, prepend=-1))  # [s]
    first_place = np.minimum.reduceat(spans.start[order], first_row)  # [s]
    uncut = spans.start[order] == first_place[number]  # [R]
    first_cut = first_row + np.add.reduceat(uncut.astype(np.int64), first_row)  # [s]
    stride = int(end.max()) + max_length + 1
    key = number * stride + end[order]  # [R], ascending
    position, opens, carriers = np.empty_like(end), [], []

    left = np.append(first_row[1:], len(order))  # [s], behind the last row that has no pass yet
    todo = np.arange(len(first_row))
    while len(todo):
        carrier = left[todo] - 1
        start = spans.start[order[carrier]]
        reached = np.maximum(np.searchsorted(key, todo * stride + start + half), first_cut[todo])
        begin = np.where(uncut[carrier], first_row[todo], reached)
        for_each, start_of = _ranges(begin, left[todo]), np.repeat(start, left[todo] - begin)
        position[for_each] = end[order[for_each]] - start_of - 1
        opens.append(begin)
        carriers.append(order[carrier])
        left[todo] = begin
        todo = todo[begin > first_row[todo]]
    begin, carrier = np.concatenate(opens), np.concatenate(carriers)
    by_begin = np.argsort(begin)
    return _passes(order, position, carrier=carrier[by_begin], begin=begin[by_begin])


def _ranges(begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """The numbers of all ranges, one after the other."""
    count = end - begin
    return np.arange(count.sum()) + np.repeat(begin - np.cumsum(count) + count, count)


def _passes(order: np.ndarray, position: np.ndarray, *, carrier: np.ndarray, begin: np.ndarray) -> Passes:
    count = np.diff(begin, append=len(order))
    return Passes(*(torch.from_numpy(np.ascontiguousarray(part)) for part in (carrier, order, position, begin, count)))


# ------------------------------------------------ where the rows of a dataset lie


def spans_of(dataset: Any) -> Spans:
    """Of the rows of a training part, whose targets follow their prefixes in time.

    Where histories are kept as places, these are the places. Otherwise rows are sorted and neighbours compared: a
    prefix that begins with the one before it starts where that starts, and a full one that goes on where the one before
    ended starts one place later; what fits neither is a sequence of its own. Rows that are given as lists, in a folder
    with a file each for training, validation and test, may be in any order, and some of a session may be missing.
    O(R log R + R x L) time.
    """
    feat = dataset.inter_feat
    user, length = feat[dataset.uid_field].numpy(), feat[dataset.item_list_length_field].numpy()
    given = dataset.benchmark_filename_list is not None
    if isinstance(feat, Histories) and not given:
        return Spans(user, feat.start.long().numpy(), length)
    lists, target = column_in_parts(feat, dataset.item_id_list_field), feat[dataset.iid_field].numpy()
    order = _alphabetical(user, lists) if given else np.lexsort((length, user))  # [R]; rows of a user by time
    moved = _moved(lists, length, target, order)
    moved[np.diff(user[order], prepend=-1) != 0] = -1
    new = moved < 0
    walked = np.cumsum(np.where(new, 0, moved))
    sequence, start = np.empty_like(length), np.empty_like(length)
    sequence[order] = np.cumsum(new) - 1
    start[order] = walked - np.maximum.accumulate(np.where(new, walked, 0))
    return Spans(sequence, start, length)


def _alphabetical(user: np.ndarray, lists: Any) -> np.ndarray:
    """Rows in an order in which those that begin alike are beside each other, the shortest first: [R]."""
    words = np.empty((len(user), 1 + lists.shape[1]), dtype=">i4")  # bytes of such numbers are ordered as they are
    words[:, 0] = user
    for at in range(0, len(user), BLOCK):
        words[at : at + BLOCK, 1:] = lists[at : at + BLOCK]
    return np.argsort(words.view(f"V{words.shape[1] * 4}").squeeze(1), kind="stable")


def _moved(lists: Any, length: np.ndarray, target: np.ndarray, order: np.ndarray) -> np.ndarray:
    """By how many places each row, in this order, begins behind the one before it, 0 or 1; -1 if it does not go on."""
    moved = np.full(len(order), -1)
    for at in range(0, len(order) - 1, BLOCK):
        rows = order[at : at + BLOCK + 1]
        items, sizes = lists[rows], length[rows]  # [b + 1, L], [b + 1]
        before, after = items[:-1], items[1:]
        beyond = np.arange(items.shape[1]) >= sizes[:-1, None]  # [b, L]
        same = ((before == after) | beyond).all(1)
        full = (sizes[:-1] == items.shape[1]) & (sizes[1:] == items.shape[1])
        shifted = full & (after[:, -1] == target[rows[:-1]]) & (before[:, 1:] == after[:, :-1]).all(1)
        moved[at + 1 : at + len(rows)] = np.select([same & ~full, shifted], [0, 1], -1)
    return moved


# ------------------------------------------------ batches


class PassLoader:
    """Training batches of whole passes, about ``train_batch_size`` targets each.

    Passes are shuffled and dealt out in that order: batch k has those whose first target is one of the targets
    k x train_batch_size and following. So an epoch has each target once and as many batches as there would be rows'
    batches, or one less; a batch may have some targets more or less than the others, by those of one pass at most. Only
    if passes have more targets than ``train_batch_size`` are there fewer batches, as a pass is never torn apart.
    What else is asked of a loader is that of the rows, above all the generator of the order, so that an interrupted
    training goes on with either.

    Args:
        rows: the loader with a row for each prefix.
        passes: of its rows.

    Attributes:
        n_shortened: targets that see fewer items than in their rows; none where passes are exact.
    """

    def __init__(self, rows: Any, passes: Passes) -> None:
        self.rows, self.passes = rows, passes
        length = rows._dataset.inter_feat[rows._dataset.item_list_length_field]  # [R]
        self.n_shortened = int((passes.position + 1 < length[passes.row]).sum())
        self._collate = type(rows).collate_fn.__get__(rows)  # not what several processes may have put in its place
        self._item = rows._dataset.inter_feat[rows._dataset.iid_field]  # [R]
        self._rank, self._n_processes = 0, 1

    def __getattr__(self, name: str) -> Any:  # of what is not here
        return getattr(self.__dict__["rows"], name)

    def __len__(self) -> int:
        return math.ceil(len(self.passes.row) / self.rows.step)

    def take_part(self, rank: int, n_processes: int) -> None:
        """Let this process make its passes of each batch alone; the order stays the same everywhere."""
        self._rank, self._n_processes = rank, n_processes

    def __iter__(self) -> Iterator[Interaction]:
        n = len(self.passes.carrier)
        order = torch.randperm(n, generator=self.rows.generator) if self.rows.shuffle else torch.arange(n)
        count = self.passes.count[order]
        batch = (count.cumsum(0) - count).div(self.rows.step, rounding_mode="floor")  # [n]
        for chosen in order.split(batch.unique_consecutive(return_counts=True)[1].tolist()):
            yield self._part(chosen)

    def _part(self, chosen: Tensor) -> Interaction:
        if self._n_processes == 1:
            return self.batch(chosen)
        own = chosen[self._rank :: self._n_processes]
        share = self.passes.count[own].sum() / self.passes.count[chosen].sum()
        part = self.batch(own if len(own) else chosen[:1])  # nothing can be made of none; it counts nothing then
        part[PART_WEIGHT] = (share * self._n_processes).view(1)
        return part

    def batch(self, chosen: Tensor) -> Interaction:
        """The given passes: fields of their carriers [S], but for the item ids, which are the targets [T]."""
        places, of_pass, _ = segments_of(self.passes.begin[chosen], self.passes.count[chosen])  # [T], [T]
        batch = self._collate(self.passes.carrier[chosen].numpy())
        batch[self.rows._dataset.iid_field] = self._item[self.passes.row[places]]
        batch[PASS_ROW], batch[PASS_POSITION] = of_pass, self.passes.position[places]
        return batch


def in_passes(rows: Any, positions: str, max_length: int) -> PassLoader:
    """The loader of rows as one of passes.

    Args:
        rows: of the training part, with a row for each prefix.
        positions: "all", see `whole_passes`, or "windows", see `window_passes`.
        max_length: L, the longest history.
    """
    spans = spans_of(rows._dataset)
    return PassLoader(rows, whole_passes(spans) if positions == "all" else window_passes(spans, max_length))
