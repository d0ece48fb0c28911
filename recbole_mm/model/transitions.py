"""Transitions: what stood behind the items of the prefix in training sessions.

training sessions ---> count[i, j] of j anywhere behind i, sparse [N, N] --+
prefix [B, L] -------------------------------------------------------------+---> sum of its items' rows, [B, N]

The strongest of the count tables that were tried on MMSBR's Cellphones, Recall@20 .279: a model that ends below it has
learned less than the counts know. A row holds the newest MAX_ITEM_LIST_LENGTH items before its target, so that pairs
further apart are not seen.
"""

from __future__ import annotations

from torch import Tensor

from recbole_mm.model.counting import CountingRecommender, SparseRows, TrainingRows, transition_counts


class Transitions(CountingRecommender):
    """Ranks items by how often they followed those of the prefix, at any distance."""

    def count_rows(self, config, rows: TrainingRows) -> None:
        self.followers = SparseRows(transition_counts(rows, n_items=self.n_items))

    def counts(self, item_seq: Tensor) -> Tensor:
        return self.followers.sum_at(item_seq)  # [B, N]
