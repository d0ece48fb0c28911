"""MMSBR as it was released, written down literally: the oracle of tests, the yardstick of a benchmark.

Source: "Beyond Co-occurrence: Multi-modal Session-based Recommendation" (Zhang et al., 2024), from a description of
what its release computes, its defects included: all parameters start uniform, so that features are never seen; pivots
and features are tables per item; the pivots' attention is a softmax over queries; a larger price distance raises a
score.

It also works as the release does. Each call computes all items and both N x N matrices of the contrastive loss, in
evaluation too, where gradients are recorded and all scores are sorted. Modules are called one after the other, rows of
a session are copied in a loop over the batch, and attention looks from all positions at all positions.

Letters: B sessions, L positions, N items without padding, D width, H heads, K pivots, F vectors generated per feature,
T = K + F tokens, P price levels, C categories. Items, price levels and categories have ids from 1; 0 is padding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

CUTOFFS = (1, 5, 10, 20)
MASKED = -10000.0


class LiteralMMSBR(nn.Module):
    """The released model.

    Names of parameters; row i of a table belongs to id i + 1, for padding has no row:
        image, text, image_from_text, text_from_image, pivots.{k} ``.weight``: [N, D]
        price_mean, price_variance ``.weight``: [P, D]
        category.weight: [C, D]
        sequences_{text|image}.{f}.{first|second} ``.weight``, ``.bias``: [D, D], [D]
        rounds.{r}.{text|image}.{query|key|value} ``.weight``, ``.bias``: [D, D], [D]
        rounds.{r}.{text|image}.output.weight: [D, D]
        rounds.{r}.{text|image}.{widen|narrow} ``.weight``, ``.bias``: [4D, D], [4D] and [D, 4D], [D]
        rounds.{r}.{text|image}.norm ``.weight``, ``.bias``: [D], [D]
        fusion.{first|second} ``.weight``, ``.bias``: [D, K D], [D] and [D, D], [D]
        interest_item ``.weight``, ``.bias``: [D, D], [D]
        interest_mean.weight: [D, D]
        interest_weight ``.weight``, ``.bias``: [1, D], [1]
        price_attention.{mean|variance}.{query|key|value|output} ``.weight``, ``.bias``: [D, D], [D]
        price_norm ``.weight``, ``.bias``: [D], [D]

    Args:
        n_items, n_price_levels, n_categories: N, P, C, without padding.
        price_of_item, category_of_item: [N] ids from 1.
        width: D.
        n_layers: pivot layers, two a round: one for text, one for images.
        n_heads: H, in both kinds of attention.
        n_sequences: F.
        n_pivots: K.
        n_negatives: how many of an item's largest logits the contrastive loss sums.
        contrastive_weight: of the sum of both modalities' losses, sums over all items.
        temperature: divides the logits of the contrastive loss.
        feature_dropout: in generated features and pivot layers.
        dropout: in fusion and prices.

    Raises:
        ValueError: for an odd number of layers.
    """

    def __init__(
        self,
        n_items: int,
        n_price_levels: int,
        n_categories: int,
        price_of_item: Tensor,
        category_of_item: Tensor,
        *,
        width: int = 64,
        n_layers: int = 6,
        n_heads: int = 4,
        n_sequences: int = 4,
        n_pivots: int = 4,
        n_negatives: int = 100,
        contrastive_weight: float = 0.01,
        temperature: float = 1.0,
        feature_dropout: float = 0.6,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        if n_layers % 2:
            raise ValueError(
                f"n_layers is {n_layers}, expected an even number: a round has one for text, one for images"
            )
        self.width, self.n_negatives = width, n_negatives
        self.contrastive_weight, self.temperature = contrastive_weight, temperature

        self.image = nn.Embedding(n_items, width)
        self.text = nn.Embedding(n_items, width)
        self.image_from_text = nn.Embedding(n_items, width)
        self.text_from_image = nn.Embedding(n_items, width)
        self.pivots = nn.ModuleList(nn.Embedding(n_items, width) for _ in range(n_pivots))
        self.price_mean = nn.Embedding(n_price_levels, width)
        self.price_variance = nn.Embedding(n_price_levels, width)
        self.category = nn.Embedding(n_categories, width)

        self.sequences_text = nn.ModuleList(FeatureMLP(width, feature_dropout) for _ in range(n_sequences))
        self.sequences_image = nn.ModuleList(FeatureMLP(width, feature_dropout) for _ in range(n_sequences))
        self.rounds = nn.ModuleList(
            nn.ModuleDict({name: PivotLayer(width, n_heads, feature_dropout) for name in ("text", "image")})
            for _ in range(n_layers // 2)
        )
        self.fusion = Fusion(n_pivots * width, width, dropout)

        self.interest_item = nn.Linear(width, width)
        self.interest_mean = nn.Linear(width, width, bias=False)
        self.interest_weight = nn.Linear(width, 1)
        self.price_attention = WassersteinAttention(width, n_heads, dropout)
        self.price_norm = nn.LayerNorm(width, eps=1e-12)
        self.price_dropout = nn.Dropout(dropout)

        padding = torch.zeros(1, dtype=torch.long)
        self.register_buffer("price_of_item", torch.cat([padding, price_of_item]), persistent=False)  # [1 + N]
        self.register_buffer("category_of_item", torch.cat([padding, category_of_item]), persistent=False)  # [1 + N]
        self.start_uniformly()

    def start_uniformly(self) -> None:
        """Every parameter alike, the gains of layer norms too."""
        limit = 1 / math.sqrt(self.width)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -limit, limit)

    # ------------------------------------------------ items

    def item_vectors(self) -> Tensor:
        """All items, [N, D]; they depend on no session."""
        text = self.feature_sequence(self.sequences_text, self.text.weight)  # [N, F, D]
        image = self.feature_sequence(self.sequences_image, self.image.weight)  # [N, F, D]
        pivots = [table.weight for table in self.pivots]  # K times [N, D]
        for layers in self.rounds:
            pivots, text = self.pivot_step(layers["text"], pivots, text)
            pivots, image = self.pivot_step(layers["image"], pivots, image)
        return self.fusion(torch.cat(pivots, dim=1))  # [N, D]

    def feature_sequence(self, generators: nn.ModuleList, feature: Tensor) -> Tensor:
        """F views of a feature: [N, D] -> [N, F, D]."""
        return torch.stack([generate(feature) for generate in generators], dim=1)

    def pivot_step(self, layer: PivotLayer, pivots: list[Tensor], sequence: Tensor) -> tuple[list[Tensor], Tensor]:
        """One layer over pivots and the vectors of one modality; pivots go halfway to what comes out."""
        tokens = torch.cat([*(pivot.unsqueeze(1) for pivot in pivots), sequence], dim=1)  # [N, T, D]
        out = layer(tokens)  # [N, T, D]
        n_pivots = len(pivots)
        pivots = [(out[:, k] + pivots[k]) / 2 for k in range(n_pivots)]
        return pivots, out[:, n_pivots:] + sequence

    def item_prices(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of all items' prices, [N, D] each."""
        price, category = self.price_of_item[1:] - 1, self.category_of_item[1:] - 1
        mean = self.price_mean(price) + self.category(category)
        variance = positive(self.price_variance(price) + self.category(category))
        return mean, variance

    # ------------------------------------------------ contrastive loss

    def contrastive(self) -> Tensor:
        """Both modalities' losses, without their weight."""
        return self.contrast(self.image.weight, self.image_from_text.weight) + self.contrast(
            self.text.weight, self.text_from_image.weight
        )

    def contrast(self, real: Tensor, generated: Tensor) -> Tensor:
        """Sum over all items; the largest logits may be those of the item itself, or not."""
        logits = torch.matmul(real, generated.T) / self.temperature  # [N, N]
        largest = torch.exp(logits).topk(self.n_negatives, dim=1).values  # [N, n_negatives]
        own = torch.exp((real * generated).sum(1) / self.temperature)  # [N]
        return (torch.log10(largest.sum(1)) - torch.log10(own)).sum()

    # ------------------------------------------------ sessions

    def gather(self, table: Tensor, ids: Tensor) -> Tensor:
        """Rows of ids, zeros for padding, one session after the other: [*, D], [B, L] -> [B, L, D]."""
        padded = torch.cat([table.new_zeros(1, self.width), table])
        rows = table.new_zeros(*ids.shape, self.width)  # [B, L, D]
        for session in range(len(ids)):
            rows[session] = padded[ids[session]]
        return rows

    def interest(self, items: Tensor, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
        """Weighted sum of a session's items, weights from each item and the mean: -> [B, D]."""
        rows = self.gather(items, item_seq)  # [B, L, D]
        valid = (item_seq > 0).to(rows.dtype).unsqueeze(-1)  # [B, L, 1]
        mean = rows.sum(1) / item_seq_len.unsqueeze(-1)  # [B, D]
        mean = mean.unsqueeze(1).repeat(1, item_seq.shape[1], 1)  # [B, L, D]
        hidden = torch.sigmoid(self.interest_item(rows) + self.interest_mean(mean))  # [B, L, D]
        weights = self.interest_weight(hidden) * valid  # [B, L, 1]
        return (weights * rows).sum(1)

    def price_session(self, item_seq: Tensor, item_seq_len: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the prices wanted: [B, L], [B] -> [B, D] each."""
        prices = self.price_of_item[item_seq]  # [B, L]
        mean_rows = self.gather(self.price_mean.weight, prices)  # [B, L, D]
        variance_rows = self.gather(self.price_variance.weight, prices)  # [B, L, D]
        categories = self.gather(self.category.weight, self.category_of_item[item_seq])  # [B, L, D]
        mean = self.price_dropout(self.price_norm(mean_rows) + self.price_norm(categories))
        variance = positive(self.price_dropout(self.price_norm(variance_rows) + self.price_norm(categories)))

        mask = ((item_seq == 0).to(mean.dtype) * MASKED)[:, None, None, :]  # [B, 1, 1, L]
        mean_context, variance_context = self.price_attention(mean, variance, mask)  # [B, L, D] each
        mean_out = self.price_norm(mean_context + mean_rows)
        variance_out = self.price_norm(variance_context + variance_rows)
        last = (torch.arange(len(item_seq), device=item_seq.device), item_seq_len - 1)
        return mean_out[last], positive(variance_out[last])

    # ------------------------------------------------ losses and scores

    def forward(self, item_seq: Tensor, item_seq_len: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [B, N] and the contrastive loss, whether it is wanted or not."""
        contrastive = self.contrastive()
        return self.scores(item_seq, item_seq_len), contrastive

    def scores(self, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
        """Scores of items 1..N as the next one: [B, L], [B] -> [B, N]."""
        items = self.item_vectors()  # [N, D]
        interest = self.interest(items, item_seq, item_seq_len) @ items.T  # [B, N]
        distance = wasserstein(*self.price_session(item_seq, item_seq_len), *self.item_prices())  # [B, N]
        return interest + interest * distance

    def loss(self, item_seq: Tensor, item_seq_len: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy over all items plus the weighted contrastive loss; targets [B] are 1..N."""
        scores, contrastive = self(item_seq, item_seq_len)
        return F.cross_entropy(scores, target - 1) + self.contrastive_weight * contrastive

    def evaluate(self, batches: Iterable[tuple[Tensor, Tensor, Tensor]]) -> dict[str, float]:
        """Prec@K, MRR@K and NDCG@K over all sessions, in 0..1; the mode, training or not, stays as it is.

        Args:
            batches: item_seq [B, L], item_seq_len [B] and target [B] each.
        """
        found: dict[str, list[float]] = {f"{name}@{k}": [] for name in ("Prec", "MRR", "NDCG") for k in CUTOFFS}
        for item_seq, item_seq_len, target in batches:
            scores, _ = self(item_seq, item_seq_len)
            order = np.argsort(-scores.detach().cpu().numpy(), axis=1)  # [B, N]
            for ranking, wanted in zip(order, (target - 1).tolist(), strict=True):
                rank = int(np.where(ranking == wanted)[0][0]) + 1
                for k in CUTOFFS:
                    hit = rank <= k
                    found[f"Prec@{k}"].append(float(hit))
                    found[f"MRR@{k}"].append(1 / rank if hit else 0.0)
                    found[f"NDCG@{k}"].append(1 / math.log2(rank + 1) if hit else 0.0)
        return {name: sum(values) / len(values) for name, values in found.items()}


class FeatureMLP(nn.Module):
    """One of F views of a feature: [N, D] -> [N, D]."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dropout(torch.tanh(self.first(x)))
        return self.dropout(torch.tanh(self.second(hidden)))


class PivotLayer(nn.Module):
    """A post-norm Transformer layer, [N, T, D] -> [N, T, D]: softmax over queries, one layer norm used twice."""

    def __init__(self, width: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.output = nn.Linear(width, width, bias=False)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def attention_weights(self, tokens: Tensor) -> Tensor:
        """[N, T, D] -> [N, H, T queries, T keys], summing to 1 over queries."""
        query, key = heads(self.query(tokens), self.n_heads), heads(self.key(tokens), self.n_heads)  # [N, H, T, D/H]
        return torch.softmax(query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]), dim=2)

    def forward(self, tokens: Tensor) -> Tensor:
        value = heads(self.value(tokens), self.n_heads)  # [N, H, T, D/H]
        context = merged(self.attention_weights(tokens) @ value)  # [N, T, D]
        tokens = self.norm(tokens + self.dropout(self.output(context)))
        return self.norm(tokens + self.dropout(self.narrow(torch.relu(self.widen(tokens)))))


class Fusion(nn.Module):
    """Pivots side by side to one vector, not negative: [N, K D] -> [N, D]."""

    def __init__(self, pivots_width: int, width: int, dropout: float) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(pivots_width, width), nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dropout(torch.relu(self.first(self.dropout(x))))
        return self.dropout(torch.relu(self.second(hidden)))


class WassersteinAttention(nn.Module):
    """Attention between Gaussians, all positions to all positions; residuals and norms are the caller's."""

    def __init__(self, width: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.n_heads = n_heads
        roles = ("query", "key", "value", "output")
        self.mean = nn.ModuleDict({role: nn.Linear(width, width) for role in roles})
        self.variance = nn.ModuleDict({role: nn.Linear(width, width) for role in roles})
        self.dropout = nn.Dropout(dropout)

    def forward(self, mean: Tensor, variance: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """[B, L, D] twice and [B, 1, 1, L], added to the logits -> [B, L, D] twice."""
        mean_query, mean_key, mean_value = (
            heads(self.mean[role](mean), self.n_heads) for role in ("query", "key", "value")
        )  # [B, H, L, D/H] each
        variance_query, variance_key, variance_value = (
            heads(positive(self.variance[role](variance)), self.n_heads) for role in ("query", "key", "value")
        )  # [B, H, L, D/H] each
        distance = wasserstein(mean_query, variance_query, mean_key, variance_key)  # [B, H, L, L]
        logits = -distance / math.sqrt(mean_query.shape[-1]) + mask
        weights = self.dropout(torch.softmax(logits, dim=-1))  # [B, H, L, L]
        mean_context = merged(weights @ mean_value)  # [B, L, D]
        variance_context = merged(weights**2 @ variance_value)  # [B, L, D]
        return (
            self.dropout(self.mean["output"](mean_context)),
            self.dropout(self.variance["output"](variance_context)),
        )


def wasserstein(mean_a: Tensor, variance_a: Tensor, mean_b: Tensor, variance_b: Tensor) -> Tensor:
    """Squared 2-Wasserstein distances of diagonal Gaussians: [..., n, D] twice and [..., m, D] twice -> [..., n, m]."""
    deviation_a = torch.sqrt(torch.clamp(variance_a, min=1e-24))
    deviation_b = torch.sqrt(torch.clamp(variance_b, min=1e-24))
    return squared_distance(mean_a, mean_b) + squared_distance(deviation_a, deviation_b)


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """Norms minus twice the product: [..., n, D], [..., m, D] -> [..., n, m]."""
    norm_a = (a**2).sum(-1, keepdim=True)  # [..., n, 1]
    norm_b = (b**2).sum(-1, keepdim=True).transpose(-1, -2)  # [..., 1, m]
    return norm_a + norm_b - 2 * torch.matmul(a, b.transpose(-1, -2))


def positive(x: Tensor) -> Tensor:
    return F.elu(x) + 1


def heads(x: Tensor, n_heads: int) -> Tensor:
    """[B, L, D] -> [B, H, L, D/H]."""
    return x.unflatten(-1, (n_heads, -1)).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    """[B, H, L, D/H] -> [B, L, D]."""
    return x.transpose(1, 2).flatten(2)
