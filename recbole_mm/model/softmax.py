"""Softmax over many items: exact in chunks, and approximate over sampled items. Tensors in, scalar out.

queries [B, D] --+--> logits of some items, or of some rows, at a time ---> mean cross-entropy, gradients [B, D], [N, D]
items   [N, D] --+

Shapes: B rows, N items, C columns of a sampled softmax, D width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from recbole_mm.errors import SettingError
from recbole_mm.model.layers import at_least_float32, products

FEWEST_ROWS = 64  # of a block with all items; smaller products are slow


def chunked_softmax_loss(
    queries: Tensor,
    vectors: Tensor,
    target: Tensor,
    *,
    temperature: float,
    chunk: int,
    left_out: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy of queries . vectors / temperature over all items, exact, without the B x N matrix.

    Never more than max(B x chunk) logits. Where so many hold `FEWEST_ROWS` rows with all their items, those rows are
    taken together and their gradient is computed at once: the three products of the plain way, and one pass. Otherwise
    items are taken in chunks, and the backward pass computes the logits again: four products. Both are quicker than the
    plain way on a CPU, whose matrix does not stay in the cache.

    Args:
        queries: [B, D].
        vectors: [N, D].
        target: [B], item ids.
        temperature: > 0, divides the products.
        chunk: items at a time, >= 1.
        left_out: [N] bool, True for items that are no classes; None for none. No target may be among them.

    Returns:
        Scalar, in float32 at least, autocast or not.
    """
    with torch.autocast(queries.device.type, enabled=False):
        queries, vectors = at_least_float32(queries) / temperature, at_least_float32(vectors)
        n_rows = len(queries) * chunk // max(1, len(vectors))
        if n_rows >= min(FEWEST_ROWS, len(queries)):
            return _RowsAtATime.apply(queries, vectors, target, n_rows, left_out)
        return _ItemsAtATime.apply(queries, vectors, target, chunk, left_out)


class _RowsAtATime(torch.autograd.Function):
    """Rows with all their items at a time: the softmax of a row is whole, and so its gradient is known at once."""

    @staticmethod
    def forward(ctx, queries: Tensor, vectors: Tensor, target: Tensor, n_rows: int, left_out: Tensor | None):
        n_rows = max(1, min(n_rows, FEWEST_ROWS, len(queries)))  # more bring no speed, and leave the cache
        buffer = queries.new_empty(n_rows, len(vectors))
        wanted = any(ctx.needs_input_grad)
        grad_queries, grad_vectors = torch.empty_like(queries), torch.zeros_like(vectors)
        total = queries.new_zeros((), dtype=torch.double)
        for start in range(0, len(queries), n_rows):
            rows = slice(start, min(start + n_rows, len(queries)))
            own = target[rows].unsqueeze(1)  # [b, 1]
            logits = torch.mm(queries[rows], vectors.T, out=buffer[: rows.stop - start])  # [b, N]
            if left_out is not None:
                logits.masked_fill_(left_out, -torch.inf)
            of_own = logits.gather(1, own)
            largest = logits.amax(1, keepdim=True)
            weights = logits.sub_(largest).exp_()
            sums = weights.sum(1, keepdim=True)
            total += (largest + sums.log() - of_own).sum()
            if wanted:
                weights.div_(sums).scatter_add_(1, own, torch.full_like(of_own, -1))
                torch.mm(weights, vectors, out=grad_queries[rows])
                grad_vectors.addmm_(weights.T, queries[rows])
        ctx.save_for_backward(grad_queries, grad_vectors)
        return (total / len(queries)).to(queries.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        grad_queries, grad_vectors = ctx.saved_tensors
        share = grad / len(grad_queries)
        return grad_queries * share, grad_vectors * share, None, None, None


class _ItemsAtATime(torch.autograd.Function):
    """Items of all rows at a time: the sum of a row grows chunk by chunk, and the gradient needs the logits again."""

    @staticmethod
    def forward(ctx, queries: Tensor, vectors: Tensor, target: Tensor, chunk: int, left_out: Tensor | None):
        own, largest = queries.new_empty(len(queries)), queries.new_full((len(queries),), -torch.inf)
        sums = queries.new_zeros(len(queries))
        for items, logits in _chunks(queries, vectors, chunk, left_out):
            here, column = _targets_in(items, target)
            own[here] = logits[here, column]
            higher = torch.maximum(largest, logits.amax(1))
            base = higher.masked_fill(higher == -torch.inf, 0)  # as long as all items are left out
            sums = sums * (largest - base).exp() + logits.sub_(base.unsqueeze(1)).exp_().sum(1)
            largest = higher
        log_sum = largest + sums.log()  # [B]
        ctx.save_for_backward(queries, vectors, target, log_sum, left_out)
        ctx.chunk = chunk
        return (log_sum - own).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        queries, vectors, target, log_sum, left_out = ctx.saved_tensors
        share = grad / len(queries)
        grad_queries, grad_vectors = torch.zeros_like(queries), torch.empty_like(vectors)
        for items, logits in _chunks(queries, vectors, ctx.chunk, left_out):
            weights = logits.sub_(log_sum.unsqueeze(1)).exp_()
            here, column = _targets_in(items, target)
            weights[here, column] -= 1
            weights *= share
            grad_queries.addmm_(weights, vectors[items])
            torch.mm(weights.T, queries, out=grad_vectors[items])
        return grad_queries, grad_vectors, None, None, None


def _chunks(queries: Tensor, vectors: Tensor, chunk: int, left_out: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Items and their logits [B, c], in one buffer that the next ones overwrite."""
    buffer = queries.new_empty(len(queries) * min(chunk, len(vectors)))
    for start in range(0, len(vectors), chunk):
        items = slice(start, min(start + chunk, len(vectors)))
        n = items.stop - start
        logits = torch.mm(queries, vectors[items].T, out=buffer[: len(queries) * n].view(-1, n))
        if left_out is not None:
            logits.masked_fill_(left_out[items], -torch.inf)
        yield items, logits


def _targets_in(items: slice, target: Tensor) -> tuple[Tensor, Tensor]:
    """Rows whose targets are among some items, and their columns there."""
    here = ((target >= items.start) & (target < items.stop)).nonzero().squeeze(1)
    return here, target[here] - items.start


def refuse_softmax(model_class: type, softmax: str, *, lazy: bool, origin: str = "") -> None:
    """Refuse what a model cannot do, or what would do nothing.

    Args:
        softmax: the setting.
        lazy: the setting ``lazy_item_embedding``.
        origin: of ``softmax``, for the message.

    Raises:
        SettingError: with the reason.
    """
    if softmax != "full" and not getattr(model_class, "scores_are_products", False):
        raise SettingError(
            f"softmax {softmax}{origin} does not go with {model_class.__name__}: it needs scores that are products of "
            "a query and an item's vector, and no other loss over all items\n"
            "  leave it out, so that the softmax is full; models that can do with it are MSM4SR and UniSRec"
        )
    if lazy and softmax != "sampled":
        raise SettingError(
            f"lazy_item_embedding needs softmax sampled, found {softmax}{origin}: there every item has a gradient in "
            "every step, so that no row could be left out"
        )


def sampled_softmax_loss(
    queries: Tensor, vectors: Tensor, own: Tensor, correction: Tensor, *, temperature: float
) -> Tensor:
    """Mean cross-entropy over each row's target and negatives that all rows share: an approximation of the softmax.

    A drawn item's logit is corrected by what `sampling.NegativeSampler` gives, so that the sum of exponentials is right
    on average (log-Q correction); the loss is its logarithm, hence biased, the less the more are drawn. A row's own
    target counts once and uncorrected: where it was drawn too, that hit is taken out.
    Source: Bengio and Senecal (2008), adaptive importance sampling; Jean et al. (2015), large target vocabularies.

    Args:
        queries: [B, D].
        vectors: [C, D], of all targets and all drawn items, each once.
        own: [B], the column of each row's target.
        correction: [C], added to the logits; -inf for items that are targets of some rows but not drawn.
        temperature: > 0, divides the products.

    Returns:
        Scalar, in float32 at least, autocast or not.
    """
    logits = products(queries, vectors) / temperature  # [B, C]
    offset = correction.to(logits.dtype).expand(len(logits), -1).scatter(1, own.unsqueeze(1), 0)  # [B, C]
    return F.cross_entropy(logits + offset, own)
