"""SessionItemKNN, item-based nearest neighbours: what stands in the same training sessions as the prefix's items.

training sessions ---> cosine[i, j] of the sessions with i and with j, ``n_neighbours`` of each i, sparse [N, N] --+
prefix [B, L] -----------------------------------------------------------------------------------------------------+
                                                                                                                   |
                                                                            sum of its items' rows, [B, N] <-------+
"""

from __future__ import annotations

from torch import Tensor

from recbole_mm.model.counting import CountingRecommender, SparseRows, TrainingRows, cosine_neighbours


class SessionItemKNN(CountingRecommender):
    """Ranks items by the sum of their cosines with those of the prefix; the count is in steps of 2^-24."""

    def count_rows(self, config, rows: TrainingRows) -> None:
        n_neighbours = config["n_neighbours"]
        self.neighbours = SparseRows(cosine_neighbours(rows, n_items=self.n_items, n_neighbours=n_neighbours))

    def counts(self, item_seq: Tensor) -> Tensor:
        return self.neighbours.sum_at(item_seq)  # [B, N]
