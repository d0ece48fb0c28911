"""Gaussians with diagonal covariance: their distance, and attention by closeness.

Shapes: B sessions, L positions, D width, H heads, d = D / H, U distinct Gaussians.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recbole_mm.model.layers import Dropout


class Gaussian(NamedTuple):
    """Gaussians with diagonal covariance.

    Attributes:
        mean: [..., D].
        variance: [..., D], positive; of each dimension, not its root.
    """

    mean: Tensor
    variance: Tensor


def wasserstein_distances(a: Gaussian, b: Gaussian) -> Tensor:
    """Squared 2-Wasserstein distance of every a from every b: [A, D], [U, D] -> [A, U], never below zero.

    ||mean_a - mean_b||^2 + ||sqrt(variance_a) - sqrt(variance_b)||^2: the squared Euclidean distance of means and
    deviations side by side, one matrix product. In float32 at least, since it subtracts large numbers.
    """
    with torch.autocast(a.mean.device.type, enabled=False):
        x, y = _point(a), _point(b)  # [A, 2D], [U, 2D]
        squares = x.square().sum(-1, keepdim=True) + y.square().sum(-1)  # [A, U]
        return torch.addmm(squares, x, y.T, alpha=-2).clamp_min(0)


def _point(gaussian: Gaussian) -> Tensor:
    """Mean and deviation side by side, [..., 2D]."""
    dtype = torch.promote_types(gaussian.mean.dtype, torch.float32)
    return torch.cat([gaussian.mean.to(dtype), gaussian.variance.to(dtype).clamp_min(1e-24).sqrt()], dim=-1)


def positive(x: Tensor) -> Tensor:
    """ELU(x) + 1 > 0, how a free number becomes a variance; to all digits, where adding 1 would leave none of them."""
    return x.clamp_max(0).exp() + F.relu(x)


class GaussianEmbedding(nn.Module):
    """Mean and spread of a Gaussian for each pair of price level and category; its variance is positive(spread).

    mean = LN(mu[level] + c[category]), variance = ELU(LN'(sigma[level] + c[category])) + 1. Source: MMSBR, price as
    Gaussian distributions. Differs from the released code: a session's and an item's price are made the same way, each
    with its own LayerNorm; there, an item's is the bare sum and one LayerNorm has six roles.

    Args:
        n_levels, n_categories: sizes of the tables, with 0 for unknown.
        width: D.
    """

    def __init__(self, *, n_levels: int, n_categories: int, width: int, initializer_range: float = 0.02) -> None:
        super().__init__()
        self.mean = nn.Embedding(n_levels, width)
        self.spread = nn.Embedding(n_levels, width)
        self.category = nn.Embedding(n_categories, width)
        self.mean_norm, self.spread_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        for table in (self.mean, self.spread, self.category):
            nn.init.normal_(table.weight, std=initializer_range)

    def forward(self, levels: Tensor, categories: Tensor) -> tuple[Tensor, Tensor]:
        """Mean, and the free number behind the variance: [...], [...] -> [..., D] each."""
        category = self.category(categories)
        return self.mean_norm(self.mean(levels) + category), self.spread_norm(self.spread(levels) + category)


class WassersteinAttention(nn.Module):
    """Self-attention among Gaussians, nearer ones counting more, read at the last position.

    Queries, keys and values are Gaussians: affine maps of mean and variance (ELU + 1 keeps variances positive). With
    dist_j the squared Wasserstein distance of the last position's query and key j, A = Dropout(softmax_j(-dist_j /
    sqrt(d))); the mean becomes sum_j A_j mean_j and the variance sum_j A_j^2 variance_j, as for a weighted sum of
    independent variables. Then output map, dropout, residual and LayerNorm for each. Source: MMSBR, Wasserstein
    self-attention, after STOSA.

    Only the last query is computed, because no other is read: O(L D^2) a session. ||query||^2 is the same for all keys
    and drops out of the softmax, which leaves dot products and a bias per key.

    Args:
        width: D.
        n_heads: H.
        dropout: of attention weights and of both outputs.
    """

    def __init__(self, *, width: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        if width % n_heads:
            raise ValueError(f"n_heads ({n_heads}) must divide width ({width})")
        self.n_heads = n_heads
        self.mean_qkv, self.spread_qkv = nn.Linear(width, 3 * width), nn.Linear(width, 3 * width)
        self.mean_out, self.spread_out = nn.Linear(width, width), nn.Linear(width, width)
        self.mean_norm, self.spread_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = Dropout(dropout)
        for linear in (self.mean_qkv, self.spread_qkv, self.mean_out, self.spread_out):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self, mean: Tensor, spread: Tensor, valid: Tensor, last: Tensor, residual: tuple[Tensor, Tensor] | None = None
    ) -> Gaussian:
        """
        Args:
            mean: [B, L, D].
            spread: [B, L, D], the free numbers behind the variances.
            valid: [B, L] bool, positions that may be attended to; at least one in each row.
            last: [B], the position to read.
            residual: mean and spread to add, [B, D] each; those of the last position without it.

        Returns:
            Gaussians [B, D].
        """
        rows = torch.arange(len(mean), device=mean.device)
        heads = (self.n_heads, mean.shape[-1] // self.n_heads)
        own_mean, own_spread = mean[rows, last], spread[rows, last]  # [B, D] each
        q_mean, k_mean, v_mean = self._query_key_value(self.mean_qkv, mean, own_mean)
        q_var, k_var, v_var = self._query_key_value(self.spread_qkv, positive(spread), positive(own_spread))
        query = _point(Gaussian(q_mean.unflatten(-1, heads), positive(q_var).unflatten(-1, heads)))  # [B, H, 2d]
        key = _point(Gaussian(k_mean.unflatten(-1, heads), positive(k_var).unflatten(-1, heads)))  # [B, L, H, 2d]
        with torch.autocast(mean.device.type, enabled=False):  # a difference of large numbers follows
            products = torch.einsum("bhe,blhe->bhl", query, key)  # [B, H, L]
        closeness = 2 * products - key.square().sum(-1).transpose(1, 2)  # [B, H, L]
        closeness = (closeness / math.sqrt(heads[1])).masked_fill(~valid.unsqueeze(1), -torch.inf)
        weights = self.dropout(closeness.softmax(-1)).to(mean.dtype)  # [B, H, L]
        new_mean = torch.einsum("bhl,blhe->bhe", weights, v_mean.unflatten(-1, heads)).flatten(1)  # [B, D]
        variance = positive(v_var).unflatten(-1, heads)
        new_spread = torch.einsum("bhl,blhe->bhe", weights.square(), variance).flatten(1)  # [B, D]
        base_mean, base_spread = residual or (own_mean, own_spread)
        mean = self.mean_norm(self.dropout(self.mean_out(new_mean)) + base_mean)
        spread = self.spread_norm(self.dropout(self.spread_out(new_spread)) + base_spread)
        return Gaussian(mean, positive(spread))

    @staticmethod
    def _query_key_value(maps: nn.Linear, x: Tensor, own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query of the last position [B, D], keys and values of all [B, L, D]."""
        width = x.shape[-1]
        query = F.linear(own, maps.weight[:width], maps.bias[:width])
        key, value = F.linear(x, maps.weight[width:], maps.bias[width:]).chunk(2, dim=-1)
        return query, key, value
