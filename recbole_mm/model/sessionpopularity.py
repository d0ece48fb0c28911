"""SessionPopularity, also called S-POP: what the session holds already, most often first; then what all buy.

prefix [B, L] ---> how often it holds each item, [B, N]; among equals, popularity
"""

from __future__ import annotations

import torch
from torch import Tensor

from recbole_mm.model.counting import CountingRecommender


class SessionPopularity(CountingRecommender):
    """Ranks items by how often they occur in the prefix."""

    reads_prefix_alone = True

    def counts(self, item_seq: Tensor) -> Tensor:
        counts = torch.zeros(len(item_seq), self.n_items, dtype=torch.double, device=item_seq.device)  # [B, N]
        return counts.scatter_add_(1, item_seq, (item_seq > 0).double())
