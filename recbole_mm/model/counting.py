"""Counts of a training set, and what the models that rank by them share.

training rows ---> counted once: [N], or a sparse [N, N] --+
                                                           +--> count [B, N] + popularity, below one step of the count
prefixes [B, L] -------------------------------------------+      ---> log(1 + .) times one trained number = scores

RecBole trains on rows, a prefix and its target. The rows of a session (of a user, in a folder that is not split yet)
may be all its prefixes or one, so a session is counted as the targets of its rows and what comes before them: the
prefix of its shortest row. Rows of one session must share their session id. A row holds the newest MAX_ITEM_LIST_LENGTH
items before its target, so that pairs in order that are further apart are not seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import coo_matrix, csr_matrix
from torch import Tensor, nn

from recbole_mm.data.histories import HistoryColumn, column_in_parts
from recbole_mm.errors import SettingError
from recbole_mm.model.base import MultimodalRecommender

PAIRS_AT_ONCE = 1 << 22
ENTRIES_AT_ONCE = 1 << 20
COSINE_STEPS = 1 << 24  # per unit; whole numbers add up to the same sum in any order
ROWS_IN_LOSS = 128


class TrainingRows(NamedTuple):
    """What a model is trained on, and what else was there.

    Attributes:
        session: [R], 0..S-1.
        prefix: [R, L] item ids, oldest first, 0 behind the last one; may be read in parts only, ``prefix[rows]``.
        target: [R] item ids.
        opening: [S], the row with the shortest prefix of each session, the first one of several.
    """

    session: np.ndarray
    prefix: np.ndarray | HistoryColumn
    target: np.ndarray
    opening: np.ndarray

    @classmethod
    def of(cls, *, session: Tensor, prefix: Tensor, target: Tensor) -> TrainingRows:
        """From the columns of the rows, sessions as any whole numbers."""
        return cls._of(session.numpy(), prefix.numpy(), target.numpy(), length=(prefix > 0).sum(1).numpy())

    @classmethod
    def of_part(cls, part) -> TrainingRows:
        """From the training part of a data set; prefixes that it keeps as places are not made all at once."""
        inter = part.inter_feat
        session, target, length = (
            inter[field].numpy() for field in (part.uid_field, part.iid_field, part.item_list_length_field)
        )
        prefix = column_in_parts(inter, f"{part.iid_field}{part.config['LIST_SUFFIX']}")
        return cls._of(session, prefix, target, length=length)

    @classmethod
    def _of(
        cls, session: np.ndarray, prefix: np.ndarray | HistoryColumn, target: np.ndarray, *, length: np.ndarray
    ) -> TrainingRows:
        _, numbered = np.unique(session, return_inverse=True)
        order = np.lexsort((length, numbered))  # stable
        first = np.diff(numbered[order], prepend=-1) > 0
        return cls(numbered, prefix, target, order[first])

    def share_of_repeats(self) -> float:
        """The share of rows whose target stands in their prefix."""
        size = max(1, PAIRS_AT_ONCE // self.prefix.shape[1])
        blocks = (slice(start, start + size) for start in range(0, len(self.target), size))
        repeats = sum(int((self.prefix[block] == self.target[block, None]).any(1).sum()) for block in blocks)
        return repeats / len(self.target)


# ------------------------------------------------ what is counted


def occurrences(rows: TrainingRows, *, n_items: int) -> np.ndarray:
    """How often each item id occurs, [N]; 0 for padding."""
    counts = np.bincount(rows.target, minlength=n_items)
    counts += np.bincount(rows.prefix[rows.opening].ravel(), minlength=n_items)
    counts[0] = 0
    return counts


def transition_counts(rows: TrainingRows, *, n_items: int) -> csr_matrix:
    """How often item j stands anywhere behind item i in a session: [N, N] int64.

    O(R L) time, O(distinct pairs) memory.
    """
    total = csr_matrix((n_items, n_items), dtype=np.int64)
    for earlier, later in _ordered_pairs(rows):
        ones = np.ones(len(earlier), dtype=np.int64)
        total += coo_matrix((ones, (earlier, later)), shape=total.shape).tocsr()  # equal pairs are added up
    return total


def _ordered_pairs(rows: TrainingRows) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Every pair of positions of every session as item ids, the earlier and the later one, in blocks."""
    size = max(1, PAIRS_AT_ONCE // rows.prefix.shape[1])
    for start in range(0, len(rows.target), size):
        prefix = rows.prefix[start : start + size]
        valid = prefix > 0  # [block, L]
        yield prefix[valid], np.repeat(rows.target[start : start + size], valid.sum(1))

    opening = rows.prefix[rows.opening]  # [S, L]
    length = (opening > 0).sum(1)
    opening = opening[length > 1, : length.max()]
    first, second = np.triu_indices(opening.shape[1], k=1)
    size = max(1, PAIRS_AT_ONCE // max(1, len(first)))
    for start in range(0, len(opening), size):
        earlier, later = opening[start : start + size, first], opening[start : start + size, second]
        yield earlier[later > 0], later[later > 0]


def cosine_neighbours(rows: TrainingRows, *, n_items: int, n_neighbours: int) -> csr_matrix:
    """Item-item cosines: sessions that hold both, divided by sqrt(sessions with i x sessions with j).

    An item goes with itself as far as sessions hold it twice. A session counts as a set: neither order nor
    MAX_ITEM_LIST_LENGTH matter. O(sum of squared session lengths) time, O(N n_neighbours) memory and a block of rows.

    Args:
        n_neighbours: entries to keep in each row, the highest ones, then the more popular ones; 0 keeps all.

    Returns:
        [N, N] int64, in steps of 1 / COSINE_STEPS, at least one.
    """
    times = _session_items(rows, n_items=n_items)  # [S, N]
    holds = times.sign()
    n_sessions = np.asarray(holds.sum(0)).ravel()  # [N]
    n_twice = np.asarray((times > 1).sum(0)).ravel()  # [N]
    popularity = np.asarray(times.sum(0)).ravel()  # [N]
    by_item = holds.T.tocsr()  # [N, S]
    size = max(1, PAIRS_AT_ONCE // n_items)
    parts = []
    for start in range(0, n_items, size):
        both = (by_item[start : start + size] @ holds).tocoo()  # [block, N]
        row, column = both.row.astype(np.int64) + start, both.col.astype(np.int64)
        together = np.where(row == column, n_twice[row], both.data)
        cosine = together / np.sqrt(n_sessions[row] * n_sessions[column])
        steps = np.where(together > 0, np.maximum(1, np.rint(COSINE_STEPS * cosine)), 0).astype(np.int64)
        order = np.lexsort((column, -popularity[column], -steps, row))
        row, column, steps = row[order], column[order], steps[order]
        begin = np.searchsorted(row, row)  # where the row of each entry begins
        keep = (steps > 0) & ((np.arange(len(row)) - begin < n_neighbours) | (n_neighbours == 0))
        parts.append((steps[keep], row[keep], column[keep]))
    steps, row, column = (np.concatenate(part) for part in zip(*parts, strict=True))
    return coo_matrix((steps, (row, column)), shape=(n_items, n_items)).tocsr()


def _session_items(rows: TrainingRows, *, n_items: int) -> csr_matrix:
    """How often each session holds each item: [S, N] int64."""
    opening = rows.prefix[rows.opening]  # [S, L]
    session, _ = np.nonzero(opening)
    session = np.concatenate([rows.session, session])  # session number s has the opening row opening[s]
    items = np.concatenate([rows.target, opening[opening > 0]])
    shape = (len(rows.opening), n_items)
    return coo_matrix((np.ones(len(items), dtype=np.int64), (session, items)), shape=shape).tocsr()


# ------------------------------------------------ models


class SparseRows(nn.Module):
    """A sparse [N, N] matrix of whole numbers below 2^31, of which rows are added up. Nothing here is saved or trained.

    Three one-dimensional buffers, 12 bytes per entry that is not zero, because not every device adds sparse matrices.
    """

    def __init__(self, matrix: csr_matrix) -> None:
        super().__init__()
        self.n_columns = matrix.shape[1]
        for name, values, dtype in (
            ("crow", matrix.indptr, np.int64),
            ("column", matrix.indices, np.int32),
            ("value", matrix.data, np.int32),
        ):
            self.register_buffer(name, torch.from_numpy(values.astype(dtype)), persistent=False)

    def sum_at(self, index: Tensor) -> Tensor:
        """Sum of the rows ``index`` [B, L], where 0 stands for none: [B, N] float64, exact.

        O(B N + entries of these rows) time; beyond the result, memory for ENTRIES_AT_ONCE entries.
        """
        sums = torch.zeros(len(index) * self.n_columns, dtype=torch.double, device=index.device)
        place, _ = (index > 0).nonzero(as_tuple=True)  # [P]
        rows = index[index > 0]  # [P]
        n_entries = self.crow[rows + 1] - self.crow[rows]  # [P]
        part = (n_entries.cumsum(0) - 1).clamp_min(0) // ENTRIES_AT_ONCE  # [P], ascending
        for here in torch.unique_consecutive(part, return_counts=True)[1].tolist():
            n, rows_here, place_here = n_entries[:here], rows[:here], place[:here]
            n_entries, rows, place = n_entries[here:], rows[here:], place[here:]
            offset = self.crow[rows_here] - (n.cumsum(0) - n)
            entry = torch.arange(int(n.sum()), device=index.device) + offset.repeat_interleave(n)
            target = (place_here * self.n_columns).repeat_interleave(n) + self.column[entry]
            sums.index_add_(0, target, self.value[entry].double())
        return sums.view(len(index), self.n_columns)  # [B, N]


class CountingRecommender(MultimodalRecommender):
    """Ranks by a whole number per item, and by popularity where these are equal.

    One number is trained, so that the softmax over items fits; it is positive and does not change the ranking. Counts
    are not saved with it: they are counted anew whenever the model is made, from the same data.

    Scores are float64: float32 could not tell popularity apart beside large counts.

    A model writes `counts`, and `count_rows` if that reads a table.

    Raises:
        SettingError: the protocol ranks items alone that training never has.
    """

    in_16_bits = ()
    reads_prefix_alone = False  # whether `counts` are known without any training row

    def __init__(self, config, dataset) -> None:
        super().__init__(config, dataset)
        self.log_scale = nn.Parameter(torch.zeros(()))
        rows = TrainingRows.of_part(dataset)
        counts = occurrences(rows, n_items=self.n_items)
        candidates = dataset.candidates()
        if candidates is not None and not self.reads_prefix_alone and not counts[candidates.numpy()].any():
            raise SettingError(
                f"{type(self).__name__} counts what is bought in training, and protocol {config['protocol']} ranks "
                "items alone that training never has: all would be equal\n"
                "  the floor there is ContentKNN; --candidates=all ranks these items among all"
            )
        self.register_buffer("occurrences", torch.from_numpy(counts).double(), persistent=False)  # [N]
        self.count_rows(config, rows)

    def count_rows(self, config, rows: TrainingRows) -> None:
        """Called once, by the constructor: makes the tables that `counts` reads; none by default."""

    def counts(self, item_seq: Tensor) -> Tensor:
        """The whole numbers: [B, L] -> [B, N] float64, which the caller may overwrite."""
        raise NotImplementedError

    def item_tower(self) -> Tensor:
        """The trained number, []."""
        return self.log_scale.exp()

    def scores(self, items: Tensor, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
        """[B, L], [B] -> [B, N] float64."""
        share = self.occurrences / (self.occurrences.max() + 1)  # [N], below 1
        return items * self.counts(item_seq).add_(share).log1p_()

    def calculate_loss(self, interaction) -> Tensor:
        """Of the first rows of a batch only, in random order as they are: one number is learned from few of them."""
        return super().calculate_loss(interaction[:ROWS_IN_LOSS])

    def predict(self, interaction) -> Tensor:
        """[B] float32, because RecBole puts them into a table of that type."""
        return super().predict(interaction).float()
