"""Ranks by counting, and the values of each row: no top-k list, no sorting.

scores [B, N] --> how many items score above the target, and equal --> rank [B] --> values of each row
queries [B, D], vectors [N, D] --> scores of some rows and items at a time, and the same ----^

Among equal scores, items stand in an order that depends on their tokens alone: the same for every model, seed, batch
and machine, and unrelated to popularity or to the order of the data. So ``rank = 1 + #(score > target's) + #(score ==
target's and earlier in that order)``, and a model that gives every item the same score gets what chance would give.

With one target per row, these metrics are functions of its rank, so neither a top-k list nor a [B, N] matrix of hits is
made.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.profiler import record_function

from recbole_mm.errors import TrainingError

RANK_METRICS = ("hit", "recall", "precision", "mrr", "ndcg", "map")  # functions of the rank of the one target
COMPARED_AT_ONCE = 1 << 20  # scores, so that they stay in the cache for the second comparison
ON_GPU = 16  # times as many


class Ranked(NamedTuple):
    """Where the targets of some rows stand.

    Attributes:
        rank: [R] int64, from 1.
        constant: [R] bool, True where all candidates got the same score: that rank says nothing of the model.
    """

    rank: Tensor
    constant: Tensor


# ------------------------------------------------ ranks


def tie_order(tokens: Sequence[str]) -> Tensor:
    """[N], the place of each item among equal scores: by the sha256 of its token. ``tokens[0]``, padding, is last."""
    digests = [hashlib.sha256(str(token).encode()).digest() for token in tokens]
    items = sorted(range(1, len(digests)), key=digests.__getitem__)
    order = torch.empty(len(digests), dtype=torch.long)
    order[torch.tensor([*items, 0])] = torch.arange(len(digests))
    return order


@torch.no_grad()
def rank_targets(
    scores: Tensor, targets: Tensor, order: Tensor, *, candidates: Tensor | None = None, name: str = "the model"
) -> Ranked:
    """Rank of each row's target among the candidates.

    Two comparisons and a sum per score, in blocks that stay in the cache; beyond the scores, memory for one block of
    bool. Rows with ties are looked at once more.

    Args:
        scores: [B, N]; column 0 is padding and not looked at.
        targets: [B] item ids, 1..N-1.
        order: [N] from `tie_order`.
        candidates: [N] bool, the items that are ranked; None for all but padding.
        name: of the model, for messages.

    Raises:
        TrainingError: scores that are not finite.
        ValueError: a target that is no candidate.
    """
    scores, targets, order = scores.detach(), targets.to(scores.device), order.to(scores.device)
    if candidates is not None:
        candidates = candidates.to(scores.device)
        _check_candidates(targets, candidates)
        candidates = candidates[1:]
    n_items = scores.shape[1] - 1
    n_candidates = n_items if candidates is None else int(candidates.sum())
    size = rows_at_once(COMPARED_AT_ONCE, n_items, scores.device)
    count = partial(_count, buffer=torch.empty(min(size, len(scores)), n_items, dtype=torch.bool, device=scores.device))
    rank = torch.empty(len(scores), dtype=torch.long, device=scores.device)
    constant = torch.empty(len(scores), dtype=torch.bool, device=scores.device)
    for start in range(0, len(scores), size):
        block, target = scores[start : start + size, 1:], targets[start : start + size, None] - 1
        _check_finite(block, name)
        own = block.gather(1, target)  # [b, 1]
        higher = count(torch.gt, block, own, candidates)
        equal = count(torch.ge, block, own, candidates) - higher  # the target is one of them
        rank[start : start + size] = higher + 1
        constant[start : start + size] = (equal == n_candidates) & (n_candidates > 1)
        tied = (equal > 1).nonzero().squeeze(1)
        if len(tied):
            earlier = order[1:] < order[1:][target[tied]]  # [tied, N - 1]
            if candidates is not None:
                earlier &= candidates
            rank[start + tied] += count(torch.eq, block[tied], own[tied], earlier)
    return Ranked(rank, constant)


@torch.no_grad()
def rank_products(
    queries: Tensor,
    vectors: Tensor,
    targets: Tensor,
    order: Tensor,
    *,
    chunk: int,
    candidates: Tensor | None = None,
    name: str = "the model",
) -> Ranked:
    """`rank_targets` of the scores ``queries @ vectors.T``, of which there is never more than a tile.

    O(B N D) time; memory of `COMPARED_AT_ONCE` scores or of ``chunk``. A target's own score comes out of a product of
    the same size as that in which it is compared, since products of other sizes may round otherwise. Rows are taken in
    the order of their targets, so that these products are few.

    Args:
        queries: [B, D].
        vectors: [N, D]; row 0 is padding and not looked at.
        targets, order, candidates, name: as in `rank_targets`.
        chunk: items at a time, >= 1.

    Raises:
        TrainingError: scores that are not finite.
        ValueError: a target that is no candidate.
    """
    device = queries.device
    targets, order, vectors = targets.to(device), order.to(device)[1:], vectors[1:]
    candidates = None if candidates is None else candidates.to(device)
    if candidates is not None:
        _check_candidates(targets, candidates)
        candidates = candidates[1:]
    n_candidates = len(vectors) if candidates is None else int(candidates.sum())
    chunk = min(chunk, max(1, len(vectors)))
    rank = torch.empty(len(queries), dtype=torch.long, device=device)
    constant = torch.empty(len(queries), dtype=torch.bool, device=device)
    for rows in targets.argsort(stable=True).split(rows_at_once(COMPARED_AT_ONCE, chunk, device)):
        rank[rows], equal = _ranks_of_block(
            queries[rows], vectors, targets[rows] - 1, order, chunk=chunk, candidates=candidates, name=name
        )
        constant[rows] = (equal == n_candidates) & (n_candidates > 1)
    return Ranked(rank, constant)


def _ranks_of_block(
    queries: Tensor,
    vectors: Tensor,
    target: Tensor,
    order: Tensor,
    *,
    chunk: int,
    candidates: Tensor | None,
    name: str,
) -> tuple[Tensor, Tensor]:
    """Ranks of some rows, and how many items score like the target, itself among them: [b] each; without padding."""
    tile = queries.new_empty(len(queries) * chunk)
    count = partial(_count, buffer=torch.empty(len(queries), chunk, dtype=torch.bool, device=queries.device))

    def scores_of(start: int) -> Tensor:
        items = vectors[start : start + chunk]  # [c, D]
        scores = torch.mm(queries, items.T, out=tile[: len(queries) * len(items)].view(-1, len(items)))
        _check_finite(scores, name)
        return scores

    own = queries.new_empty(len(queries), 1)
    home = target // chunk  # [b], the chunk that a row's target is in
    for number in home.unique().tolist():
        here = (home == number).nonzero().squeeze(1)
        own[here] = scores_of(number * chunk)[here].gather(1, target[here, None] - number * chunk)
    rank, equal = torch.ones_like(target), torch.zeros_like(target)
    for start in range(0, len(vectors), chunk):
        scores, items = scores_of(start), slice(start, start + chunk)
        among = None if candidates is None else candidates[items]
        higher = count(torch.gt, scores, own, among)
        same = count(torch.ge, scores, own, among) - higher
        rank += higher
        equal += same
        tied = (same > (home == start // chunk)).nonzero().squeeze(1)  # other items than the target
        if len(tied):
            earlier = order[items] < order[target[tied], None]  # [tied, c]
            if among is not None:
                earlier &= among
            rank[tied] += count(torch.eq, scores[tied], own[tied], earlier)
    return rank, equal


def _check_candidates(targets: Tensor, candidates: Tensor) -> None:
    if not candidates[targets].all():
        raise ValueError("a target is no candidate, so it has no rank")


def rows_at_once(limit: int, n_columns: int, device: torch.device) -> int:
    """How many rows of scores to look at together: about ``limit`` scores on a CPU, more on a GPU."""
    rows = max(1, limit * (1 if device.type == "cpu" else ON_GPU) // max(1, n_columns))
    return rows - rows % 32 if rows > 32 else rows  # products are quickest with whole tiles of rows


_NUMPY = {torch.gt: np.greater, torch.ge: np.greater_equal, torch.eq: np.equal}  # five times as fast on a CPU


def _count(compare: Callable, block: Tensor, own: Tensor, among: Tensor | None, *, buffer: Tensor) -> Tensor:
    """Where a comparison is true, row by row: [b, n], [b, 1], and which columns count, [n] or [b, n] -> [b] int64."""
    found = buffer.view(-1)[: block.numel()].view(block.shape)
    on_cpu = block.device.type == "cpu"
    if on_cpu and block.dtype in (torch.float32, torch.float64):
        _NUMPY[compare](block.numpy(), own.numpy(), out=found.numpy())
    else:
        compare(block, own, out=found)
    if among is not None:
        found &= among
    if not on_cpu:
        return found.sum(1)
    # A sum of bool takes ten times as long as the comparison.
    return torch.from_numpy(np.fromiter(map(np.count_nonzero, found.numpy()), dtype=np.int64, count=len(found)))


def _check_finite(scores: Tensor, name: str) -> None:
    """One sum; an exact look only where that is not finite, which sums of large finite scores may be as well."""
    suspect = (~torch.isfinite(scores.sum(1))).nonzero().squeeze(1)
    if len(suspect) and (rows := int((~torch.isfinite(scores[suspect])).any(1).sum())):
        raise TrainingError(
            f"{name} gave scores that are not finite, in {rows} of {len(scores)} rows of a batch\n"
            "  they cannot be ranked; training has probably diverged: try a smaller learning_rate"
        )


def rank_rows(
    score_batch: Callable[[Any], tuple[Tensor, Tensor]],
    batches: Iterable[tuple[np.ndarray, Any]],
    *,
    order: Tensor,
    candidates: Tensor | None = None,
    name: str = "the model",
) -> tuple[np.ndarray, Ranked]:
    """Ranks of all rows of some batches, by scores of all items.

    Args:
        score_batch: batch -> scores [B, N] and targets [B].
        batches: positions of the rows in the data set [B], and the batch itself.
        order, candidates, name: as in `rank_targets`.

    Returns:
        Positions of the rows [R], in the order of the batches, and their ranks, on the CPU.
    """

    def rank_batch(batch: Any) -> Ranked:
        with record_function("scores"):
            scores, targets = score_batch(batch)
        with record_function("ranks"):
            return rank_targets(scores, targets, order, candidates=candidates, name=name)

    return ranks_of_batches(rank_batch, batches)


def ranks_of_batches(
    rank_batch: Callable[[Any], Ranked], batches: Iterable[tuple[np.ndarray, Any]]
) -> tuple[np.ndarray, Ranked]:
    """What `rank_rows` returns, of batches that ``rank_batch`` ranks."""
    # Filled in place: small results of each block, kept apart, would lie between the large blocks of scores, which then
    # could not take each other's memory, and a whole evaluation would need as much as all its scores.
    kept = np.empty((3, 1024), dtype=np.int64)
    n_rows = 0
    for rows, batch in batches:
        ranked = rank_batch(batch)  # and lets its scores go, so that the next block takes their memory
        begin, n_rows = n_rows, n_rows + len(rows)
        while n_rows > kept.shape[1]:
            kept = np.concatenate([kept, kept], axis=1)
        for row, values in zip(kept, (rows, ranked.rank.cpu().numpy(), ranked.constant.cpu().numpy()), strict=True):
            row[begin:n_rows] = values
    positions, rank, constant = kept[:, :n_rows]
    return positions, Ranked(torch.tensor(rank), torch.tensor(constant > 0))


# ------------------------------------------------ metrics


def values_of(rank: np.ndarray, metrics: Sequence[str], topk: Sequence[int]) -> dict[str, np.ndarray]:
    """Values of each row, by metric and cut-off such as "recall@20": [R] float64 each.

    With one target, hit and recall are 1 within the first k, precision is that / k, mrr and map are 1 / rank, and ndcg
    is 1 / log2(1 + rank).

    Raises:
        ValueError: a metric that is not one of `RANK_METRICS`.
    """
    rank = np.asarray(rank, dtype=np.float64)
    values = {}
    for metric in map(str.lower, metrics):
        for k in topk:
            if metric in ("hit", "recall"):
                value = np.ones_like(rank)
            elif metric == "precision":
                value = np.full_like(rank, 1 / k)
            elif metric in ("mrr", "map"):
                value = 1 / rank
            elif metric == "ndcg":
                value = 1 / np.log2(1 + rank)
            else:
                raise ValueError(f"{metric} is no function of the rank; those are {', '.join(RANK_METRICS)}")
            values[f"{metric}@{k}"] = np.where(rank <= k, value, 0.0)
    return values
