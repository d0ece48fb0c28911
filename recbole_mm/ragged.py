"""Rows of items that have several each: which they are, and their statistics. Tensors in, tensors out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256  # rows summed together


def segments_of(starts: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of ragged items in one list.

    Args:
        starts, counts: [n].

    Returns:
        Row numbers [R], the item each belongs to [R] as 0..n-1, and where each item begins in that list [n].
    """
    offsets = counts.cumsum(0) - counts  # [n]
    segments = torch.repeat_interleave(counts)  # [R]
    row_ids = torch.arange(len(segments), device=counts.device) + (starts - offsets).index_select(0, segments)  # [R]
    return row_ids, segments, offsets


def mean_and_deviation(rows: Tensor, row_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each dimension over the given rows, [F] each, in float32 at least.

    The deviation is 0 where all rows agree; without rows both are 0.
    One pass. Blocks of rows are summed as they are, small enough to stay in the cache, and the blocks' sums in float64.
    Values are taken relative to the first row: a constant dimension is then exactly 0.
    """
    dtype = torch.promote_types(rows.dtype, torch.float32)
    if not len(row_ids):
        return rows.new_zeros(rows.shape[1], dtype=dtype), rows.new_zeros(rows.shape[1], dtype=dtype)
    row_ids = row_ids.sort().values  # the file's order, so that a memory-mapped file is read once from front to back
    origin = rows[row_ids[0]].to(dtype)  # [F]
    total, squares = torch.zeros_like(origin, dtype=torch.double), torch.zeros_like(origin, dtype=torch.double)
    for ids in row_ids.split(BLOCK):
        block = rows.index_select(0, ids).to(dtype).sub_(origin)  # [BLOCK, F]
        total += block.sum(0)
        squares += block.square_().sum(0)
    mean = total / len(row_ids)
    std = (squares / len(row_ids) - mean.square()).clamp_min_(0).sqrt_()
    return (mean + origin).to(dtype), std.to(dtype)


def mean_of_items(rows: Tensor, starts: Tensor, counts: Tensor) -> Tensor:
    """Mean of each item's rows, in float32 at least, zero without rows: [S, F], [n], [n] -> [n, F].

    Without a copy of all rows: rows of 16 bits are converted some at a time.
    """
    if rows.dtype != torch.float16:
        row_ids, _, offsets = segments_of(starts, counts)
        return F.embedding_bag(row_ids, rows, offsets, mode="mean")
    means = torch.empty(len(starts), rows.shape[1], device=rows.device)
    for first in range(0, len(starts), BLOCK):
        items = slice(first, first + BLOCK)
        row_ids, _, offsets = segments_of(starts[items], counts[items])
        index = torch.arange(len(row_ids), device=rows.device)
        means[items] = F.embedding_bag(index, rows.index_select(0, row_ids).float(), offsets, mode="mean")
    return means
