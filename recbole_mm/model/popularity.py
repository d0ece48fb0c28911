"""Popularity: the same ranking for everyone, most bought first. The floor under every table.

training interactions ---> log(1 + count) [N] ---> times one trained number ---> scores [B, N]

The number is trained so that the softmax over items fits; it does not change the ranking while it is positive.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recbole_mm.model.base import MultimodalRecommender


class Popularity(MultimodalRecommender):
    """Ranks items by how often they occur in the training interactions."""

    def __init__(self, config, dataset) -> None:
        super().__init__(config, dataset)
        inter = dataset.inter_feat  # the training rows: each interaction is a target once, except a history's first
        users = inter[self.USER_ID]
        order = users.argsort(stable=True)
        new = torch.ones_like(order, dtype=torch.bool)
        new[1:] = users[order][1:] != users[order][:-1]
        opening = order[new]  # [users], each user's first row
        opening = opening[inter[self.ITEM_SEQ_LEN][opening] == 1]
        items = torch.cat([inter[self.ITEM_ID], inter[self.ITEM_SEQ][opening, 0]])
        self.register_buffer("log_count", torch.bincount(items, minlength=self.n_items).float().log1p())  # [N]
        self.scale = nn.Parameter(torch.ones(()))

    def item_tower(self) -> Tensor:
        return self.scale * self.log_count  # [N]

    def scores(self, items: Tensor, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
        return items.expand(len(item_seq), -1)  # [B, N]
