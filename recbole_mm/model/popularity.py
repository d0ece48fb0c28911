"""Popularity: the same ranking for everyone, most bought first. The floor under every table; RecBole's Pop.

training interactions ---> log(1 + count) [N] ---> times one trained number ---> scores [B, N]

The number is trained so that the softmax over items fits; it is positive and does not change the ranking.
"""

from __future__ import annotations

from torch import Tensor

from recbole_mm.model.counting import CountingRecommender


class Popularity(CountingRecommender):
    """Ranks items by how often they occur in the training interactions."""

    def item_tower(self) -> Tensor:
        return super().item_tower() * self.occurrences.float().log1p()  # [N]

    def scores(self, items: Tensor, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
        return items.expand(len(item_seq), -1)  # [B, N]
