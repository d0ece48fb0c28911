"""Graphs of sessions for RecBole's SR-GNN and GC-SAN, built for a batch at once instead of item by item.

Source: `recbole.model.sequential_recommender.srgnn.SRGNN._get_slice`, which makes the same tensors in Python loops.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WITH_MASK, _WITHOUT_MASK = "SRGNN", "GCSAN"


def with_vectorised_graphs(model_class: type) -> type:
    """The class of RecBole's SRGNN or GCSAN with graphs from `session_graphs`; any other is returned as it is."""
    name, module = model_class.__name__, model_class.__module__
    if name not in (_WITH_MASK, _WITHOUT_MASK) or not module.startswith("recbole."):
        return model_class
    base = _GraphsWithMask if name == _WITH_MASK else _Graphs
    return type(name, (base, model_class), {"__doc__": model_class.__doc__, "__module__": module})


class _Graphs:
    def _get_slice(self, item_seq: Tensor) -> tuple[Tensor, ...]:
        return session_graphs(item_seq)


class _GraphsWithMask:
    def _get_slice(self, item_seq: Tensor) -> tuple[Tensor, ...]:
        return (*session_graphs(item_seq), item_seq > 0)


def session_graphs(item_seq: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes of each session, and which of them follow each other.

    Takes O(B L²) time and memory, most of it for the edges.

    Args:
        item_seq: [B, L] int, right-padded with 0.

    Returns:
        - of each position, its node: [B, L] int64;
        - edges [B, L, 2L] float32: share of the predecessors of a node, then of its successors; each row sums to 1 or 0;
        - items of the nodes, in ascending order with the padding among them, filled up with 0: [B, L] int64.
    """
    n_rows, length = item_seq.shape
    items_in_order, place = item_seq.sort(dim=1)
    node_in_order = torch.zeros_like(place)
    node_in_order[:, 1:] = (items_in_order[:, 1:] != items_in_order[:, :-1]).cumsum(dim=1)
    node = torch.empty_like(place).scatter_(1, place, node_in_order)  # [B, L]
    items = torch.zeros_like(item_seq).scatter_(1, node, item_seq)  # [B, L]

    has_next = (item_seq[:, 1:] > 0).cumprod(dim=1)  # [B, L-1]
    edge = node[:, :-1] * length + node[:, 1:]
    follows = torch.zeros(n_rows, length * length, device=item_seq.device)
    follows.scatter_add_(1, edge, has_next.to(follows.dtype)).clamp_(max=1)
    follows = follows.view(n_rows, length, length)  # [B, L, L]
    edges = torch.cat([follows.transpose(1, 2), follows], dim=2)  # [B, L, 2L]
    halves = edges.view(n_rows, length, 2, length)
    halves /= halves.sum(dim=3, keepdim=True).clamp_(min=1)
    return node, edges, items
