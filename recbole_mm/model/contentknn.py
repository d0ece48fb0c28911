"""ContentKNN, content-based nearest neighbours: what is most like the items of the prefix, by one feature alone.

feature [N, F] less its mean, or price levels as vectors ---> length 1 --------------------+
prefix [B, L] ---> mean of its items' vectors, each weighing ``decay`` of the next one's --+--> product [B, N]

The floor under every model that reads content: it learns nothing of what people buy. The product is the weighted mean
of cosines with the prefix's items, so that no table of pairs is needed: memory is linear in N. The mean over items is
taken off because it says nothing of an item and would make all cosines alike.

A price level p of P is the vector of the signs of p - k - 1/2 for k in 1..P-1, by sqrt(P-1). The cosine of two of them
falls from 1 for equal levels to -1 for the lowest and the highest: 1 - 2 |p - q| / (P - 1).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recbole_mm.model.base import MultimodalRecommender
from recbole_mm.model.counting import ROWS_IN_LOSS, TrainingRows
from recbole_mm.model.layers import valid_positions

PRICE = "price"
OFTEN = 0.05  # of training targets that are in their prefix; where repeats are rarer, they are no good guess
BEHIND, WITHOUT_CONTENT = -3.0, -5.0  # cosines are in -1..1


class ContentKNN(MultimodalRecommender):
    """Ranks items by the likeness of their content to the prefix; those without content come last.

    One number is trained, so that the softmax over items fits; it is positive and does not change the ranking.

    Raises:
        DatasetError: the folder has no such feature, or no price levels.
    """

    in_16_bits = ()

    def __init__(self, config, dataset) -> None:
        super().__init__(config, dataset)
        feature, self.decay = config["feature"], config["decay"]
        self.log_scale = nn.Parameter(torch.zeros(()))
        if feature == PRICE:
            level = dataset.item_field("price_level").values  # [N], numbered by size
            vectors, there = level_vectors(level), level > 0
        else:
            vectors, there = dataset.feature(feature), dataset.has_content(feature)
            vectors = vectors - vectors[there].mean(0)
        vectors = F.normalize(vectors, dim=-1).masked_fill(~there.unsqueeze(1), 0)
        self.register_buffer("vectors", vectors, persistent=False)  # [N, F]
        self.register_buffer("there", there, persistent=False)  # [N]
        self.repeats = config["repeats"]
        if self.repeats == "auto":
            share = TrainingRows.of_part(dataset).share_of_repeats()
            self.repeats = "keep" if share >= OFTEN else "last"
            self.logger.info(
                f"{100 * share:.1f} % of training targets are in their prefix already: the prefix's items are ranked "
                f"{'like all others' if self.repeats == 'keep' else 'behind all others that have content'}"
            )

    def item_tower(self) -> Tensor:
        """The trained number, []."""
        return self.log_scale.exp()

    def scores(self, items: Tensor, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
        known = valid_positions(item_seq, item_seq_len) & self.there[item_seq]  # [B, L]
        later = known.flip(1).cumsum(1).flip(1) - 1  # [B, L], how many items with content are from here on, less one
        weight = torch.where(known, self.decay ** later.clamp_min(0).to(self.vectors.dtype), 0)  # [B, L]
        weight = weight / weight.sum(1, keepdim=True).clamp_min(1)  # the newest one weighs 1, before
        session = F.embedding_bag(item_seq, self.vectors, per_sample_weights=weight, mode="sum")  # [B, F]
        scores = (session @ self.vectors.T).masked_fill(~self.there, WITHOUT_CONTENT)  # [B, N]
        if self.repeats == "last":
            scores = scores.scatter(1, item_seq, scores.gather(1, item_seq) + BEHIND)
        return items * scores

    def calculate_loss(self, interaction) -> Tensor:
        """Of the first rows of a batch only, in random order as they are: one number is learned from few of them."""
        return super().calculate_loss(interaction[:ROWS_IN_LOSS])


def level_vectors(level: Tensor) -> Tensor:
    """Levels [N] in 1..P as vectors [N, P-1] of length 1, closer the closer the levels are; 0 is no level."""
    steps = torch.arange(1, max(2, int(level.max()))) + 0.5  # [P-1]
    signs = torch.where(level.unsqueeze(1) > steps, 1.0, -1.0)  # [N, P-1]
    return F.normalize(signs, dim=-1)
