"""Contrastive losses: tensors in, scalar out, no parameters; in float32 at least, as log-sum-exp with -inf masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 128  # anchors compared with all candidates at a time


def next_item_loss(
    anchors: Sequence[Tensor], targets: Tensor, *, temperature: float, same_target: Tensor | None = None
) -> Tensor:
    """Next-item prediction (NIP) among the targets of the batch: InfoNCE, with the anchors pooled inside the logarithm.

    -mean_i log( sum_a exp(s_a,i,i) / sum_a sum_j exp(s_a,i,j) ), where s_a,i,j is the cosine of anchor a of row i and
    the target of row j, divided by the temperature. With one anchor this is InfoNCE. Source: MSM4SR,
    modality-specific next-item prediction; two anchors are its variant with projections. Differs from the released
    code, which gives the logit 0 to pairs with the same target and so counts each of them as exp(0) = 1; here they
    are left out.

    Args:
        anchors: A tensors [B, D], such as the text and the image sequence.
        targets: [B, D], the item that comes next.
        temperature: > 0; smaller is stricter.
        same_target: [B, B] bool; True where rows i and j share the next item, so that j is no negative for i.

    Returns:
        Scalar.
    """
    logits = torch.stack([cosines(anchor, targets) for anchor in anchors], dim=1) / temperature  # [B, A, B]
    positive = logits.diagonal(dim1=0, dim2=2).T  # [B, A]
    if same_target is not None:
        others = same_target & ~torch.eye(len(targets), dtype=torch.bool, device=targets.device)  # [B, B]
        logits = logits.masked_fill(others.unsqueeze(1), -torch.inf)
    return (logits.flatten(1).logsumexp(1) - positive.logsumexp(1)).mean()


def cross_modality_loss(text: Tensor, image: Tensor, *, temperature: float) -> Tensor:
    """Cross-modality contrastive learning (CMCL): the two sequences of a row belong together.

    The mean of both directions; text to image is
    -mean_i log( exp(s_ii) / (sum_j exp(s_ij) + sum_{j != i} exp(t_ij)) ), s between text and image, t between text
    and text. Source: MSM4SR, cross-modality contrastive learning. Differs from the released code, whose second
    direction reuses the text-to-image sum, so that the loss changes when the modalities change places.

    Args:
        text, image: [B, D].
        temperature: > 0.

    Returns:
        Scalar.
    """
    across = cosines(text, image) / temperature  # [B, B]
    rows = torch.arange(len(text), device=text.device)
    directions = []
    for own, similar in ((text, across), (image, across.T)):
        within = (cosines(own, own) / temperature).fill_diagonal_(-torch.inf)  # [B, B]
        directions.append(F.cross_entropy(torch.cat([similar, within], dim=1), rows))
    return sum(directions) / 2


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of every row of a with every row of b, in float32 at least, autocast or not: [A, D], [B, D] -> [A, B]."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    with torch.autocast(a.device.type, enabled=False):
        return unit_length(a.to(dtype)) @ unit_length(b.to(dtype)).T


def unit_length(x: Tensor) -> Tensor:
    """Vectors divided by their lengths; zero stays zero: [..., D] -> [..., D].

    Values are those of `torch.nn.functional.normalize`, but a vector of zeros has a gradient of ordinary size. There it
    is divided by 1e-12, and one such vector, as of an item without content before its shift is trained, is enough to
    fill an optimizer's running averages for thousands of steps.
    """
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(length > 1e-12, length, 1.0)


# ---------------------------------------------------------------- hardest negatives among all items


def hard_negative_loss(
    anchors: Tensor, candidates: Tensor, own: Tensor, *, n_negatives: int, temperature: float
) -> Tensor:
    """InfoNCE of every anchor against its own candidate and the hardest of the others.

    -mean_i log( exp(s_i,own) / (exp(s_i,own) + sum_{j in hardest_i} exp(s_ij)) ), s the cosine divided by the
    temperature, hardest_i the ``n_negatives`` candidates but the own one that are most alike. Source: MMSBR,
    pseudo-modality contrastive learning, where an anchor is an item's modality and its own candidate the same item's
    pseudo-modality. Differs from the released code, which takes plain dot products (they overflow with features of
    real size), the sum over all items and logarithms to base 10 (so that the weight grows with the catalogue), and
    lets the own candidate be among the negatives or be missing from the denominator.

    Exact, at O(A N D) time and O(A n_negatives + BLOCK N) memory: blocks of anchors are compared with all candidates
    without autograd, and the backward pass goes through the negatives found, not through the A x N matrix.

    Args:
        anchors: [A, D].
        candidates: [N, D].
        own: [A], which candidate belongs to each anchor.
        n_negatives: at most; all the others where there are fewer.
        temperature: > 0.

    Returns:
        Scalar; zero without anchors.
    """
    dtype = torch.promote_types(anchors.dtype, torch.float32)
    if not len(anchors):
        return (anchors.sum() + candidates[:0].sum()).to(dtype)
    with torch.autocast(anchors.device.type, enabled=False):
        anchors, candidates = unit_length(anchors.to(dtype)), unit_length(candidates.to(dtype))
        positive = (anchors * F.embedding(own, candidates)).sum(-1) / temperature  # [A]
        negatives = largest_log_sum_exp(anchors, candidates, n_negatives, scale=1 / temperature, left_out=own)  # [A]
        return -F.logsigmoid(positive - negatives).mean()


def largest_log_sum_exp(
    anchors: Tensor, candidates: Tensor, n_largest: int, *, scale: float, left_out: Tensor | None = None
) -> Tensor:
    """log sum exp(scale a_i . c_j) over the ``n_largest`` candidates j of each anchor i, without the A x N matrix.

    Args:
        anchors: [A, D].
        candidates: [N, D].
        n_largest: at least 1, at most all.
        left_out: [A], a candidate that does not count for each anchor.

    Returns:
        [A]; -inf where no candidate counts.
    """
    return _LargestLogSumExp.apply(anchors, candidates, n_largest, scale, left_out)


class _LargestLogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchors: Tensor, candidates: Tensor, n_largest: int, scale: float, left_out: Tensor | None):
        n_largest = min(n_largest, len(candidates))
        result = anchors.new_empty(len(anchors))
        found = torch.empty(len(anchors), n_largest, dtype=torch.long, device=anchors.device)  # [A, K]
        share = anchors.new_empty(len(anchors), n_largest)  # [A, K], of the sum
        buffer = anchors.new_empty(min(BLOCK, len(anchors)), len(candidates))
        scaled = anchors * scale
        for start in range(0, len(anchors), BLOCK):
            rows = slice(start, min(start + BLOCK, len(anchors)))
            logits = torch.mm(scaled[rows], candidates.T, out=buffer[: rows.stop - start])  # [block, N]
            if left_out is not None:
                logits.scatter_(1, left_out[rows].unsqueeze(1), -torch.inf)
            values, found[rows] = largest(logits, n_largest)
            result[rows] = values.logsumexp(1)
            share[rows] = values.softmax(1).nan_to_num_(0)  # nothing counts: no gradient
        ctx.save_for_backward(anchors, candidates, found, share)
        ctx.scale = scale
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        anchors, candidates, found, share = ctx.saved_tensors
        weights = share * (ctx.scale * grad).unsqueeze(1)  # [A, K]
        grad_anchors = F.embedding_bag(found, candidates, per_sample_weights=weights, mode="sum")  # [A, D]
        # Transposed: for each candidate, the anchors that found it.
        order = found.flatten().argsort()  # [A K]
        n_found = torch.bincount(found.flatten(), minlength=len(candidates))  # [N]
        grad_candidates = F.embedding_bag(
            order // found.shape[1],
            anchors,
            n_found.cumsum(0) - n_found,
            per_sample_weights=weights.flatten()[order],
            mode="sum",
        )  # [N, D]
        return grad_anchors, grad_candidates, None, None, None


def largest(x: Tensor, n_largest: int) -> tuple[Tensor, Tensor]:
    """The largest entries of each row, in any order: [A, N] -> values and columns, [A, n_largest] each.

    Columns are dealt into groups; the ``n_largest`` groups with the largest maxima hold all that is sought. One pass
    over the matrix and two small selections, in place of a selection over all columns. Ties go to either entry.
    """
    n_columns, size = x.shape[1], 8
    n_groups = n_columns // size
    if n_groups < 2 * n_largest:
        return x.topk(n_largest, dim=1, sorted=False)
    dealt = x[:, : n_groups * size].unflatten(1, (size, n_groups))  # column c is in group c mod n_groups
    _, groups = dealt.amax(1).topk(n_largest, dim=1, sorted=False)  # [A, n_largest]
    steps = torch.arange(0, n_groups * size, n_groups, device=x.device).unsqueeze(1)  # [size, 1]
    columns = (groups.unsqueeze(1) + steps).flatten(1)  # [A, size n_largest]
    rest = torch.arange(n_groups * size, n_columns, device=x.device).expand(len(x), -1)
    columns = torch.cat([columns, rest], dim=1)
    values, index = x.gather(1, columns).topk(n_largest, dim=1, sorted=False)
    return values, columns.gather(1, index)
