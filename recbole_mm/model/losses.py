"""Contrastive losses: tensors in, scalar out, no parameters; in float32 at least, as log-sum-exp with -inf masks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from recbole_mm.model.workers import n_workers, share_out

BLOCK = 128  # anchors compared with all candidates at a time
GROUP = 8  # columns of which the largest is looked at first


def next_item_loss(
    anchors: Sequence[Tensor],
    targets: Tensor,
    *,
    temperature: float,
    same_target: Tensor | None = None,
    own: Tensor | None = None,
) -> Tensor:
    """Next-item prediction (NIP) among the targets of the batch: InfoNCE, with the anchors pooled inside the logarithm.

    -mean_i log( sum_a exp(s_a,i,i) / sum_a sum_j exp(s_a,i,j) ), where s_a,i,j is the cosine of anchor a of row i and
    the target of row j, divided by the temperature. With one anchor this is InfoNCE. Source: MSM4SR,
    modality-specific next-item prediction; two anchors are its variant with projections. Differs from the released
    code, which gives the logit 0 to pairs with the same target and so counts each of them as exp(0) = 1; here they
    are left out.

    Args:
        anchors: A tensors [B, D], such as the text and the image sequence.
        targets: [C, D], items that come next: those of the B rows, or of more rows than these.
        temperature: > 0; smaller is stricter.
        same_target: [B, C] bool; True where rows i and j share the next item, so that j is no negative for i.
        own: [B], which target is that of each row; None if there are no others, and each row's is the one at its place.

    Returns:
        Scalar.
    """
    own = own_places(targets, own)
    logits = torch.stack([cosines(anchor, targets) for anchor in anchors], dim=1) / temperature  # [B, A, C]
    positive = of_own(logits, own)  # [B, A]
    if same_target is not None:
        others = same_target.scatter(1, own.unsqueeze(1), False)  # [B, C]
        logits = logits.masked_fill(others.unsqueeze(1), -torch.inf)
    return (logits.flatten(1).logsumexp(1) - positive.logsumexp(1)).mean()


def own_places(candidates: Tensor, own: Tensor | None) -> Tensor:
    """[B], which candidate is each row's own, where ``own`` None stands for 0, 1, 2, ..."""
    return torch.arange(len(candidates), device=candidates.device) if own is None else own


def of_own(logits: Tensor, own: Tensor) -> Tensor:
    """Each row's logits with its own candidate: [B, A, C], [B] -> [B, A]."""
    return logits.gather(2, own.view(-1, 1, 1).expand(-1, logits.shape[1], 1)).squeeze(2)


def cross_modality_loss(
    text: Tensor,
    image: Tensor,
    *,
    temperature: float,
    candidates: tuple[Tensor, Tensor] | None = None,
    own: Tensor | None = None,
) -> Tensor:
    """Cross-modality contrastive learning (CMCL): the two sequences of a row belong together.

    The mean of both directions; text to image is
    -mean_i log( exp(s_ii) / (sum_j exp(s_ij) + sum_{j != i} exp(t_ij)) ), s between text and image, t between text
    and text. Source: MSM4SR, cross-modality contrastive learning. Differs from the released code, whose second
    direction reuses the text-to-image sum, so that the loss changes when the modalities change places.

    Args:
        text, image: [B, D].
        temperature: > 0.
        candidates: text and image, [C, D], of these rows and others to compare with; None for no others.
        own: [B], which candidates are those of each row; None if there are no others.

    Returns:
        Scalar.
    """
    own = own_places(text, own)
    across = cosines(text, image if candidates is None else candidates[1]) / temperature  # [B, C]
    across_back = across.T if candidates is None else cosines(image, candidates[0]) / temperature
    texts, images = candidates or (text, image)
    directions = []
    for one, others, similar in ((text, texts, across), (image, images, across_back)):
        within = without_own(cosines(one, others) / temperature, own)  # [B, C]
        directions.append(F.cross_entropy(torch.cat([similar, within], dim=1), own))
    return sum(directions) / 2


def without_own(logits: Tensor, own: Tensor) -> Tensor:
    """Logits [B, C], changed in place, so that each row's own candidate [B] does not count."""
    return logits.scatter_(1, own.unsqueeze(1), -torch.inf)


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

    Exact, at O(A N D) time and, for each thread of a CPU, O(A n_negatives + BLOCK N) memory: blocks of anchors are
    compared with all candidates without autograd, and the backward pass goes through the negatives found, not through
    the A x N matrix.

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
        found = torch.empty(len(anchors), n_largest, dtype=torch.int32, device=anchors.device)  # [A, K]
        share = anchors.new_empty(len(anchors), n_largest)  # [A, K], of the sum
        n_blocks = math.ceil(len(anchors) / BLOCK)
        workers = n_workers(anchors.device, n_blocks)
        buffers = [anchors.new_empty(min(BLOCK, len(anchors)), len(candidates)) for _ in range(workers)]
        scaled = anchors * scale

        def work(number: int, worker: int) -> None:
            rows = slice(number * BLOCK, min((number + 1) * BLOCK, len(anchors)))
            logits = torch.mm(scaled[rows], candidates.T, out=buffers[worker][: rows.stop - rows.start])  # [block, N]
            if left_out is not None:
                logits.scatter_(1, left_out[rows].unsqueeze(1), -torch.inf)
            values, found[rows] = largest(logits, n_largest)
            result[rows] = values.logsumexp(1)
            share[rows] = values.softmax(1).nan_to_num_(0)  # nothing counts: no gradient

        share_out(work, n_blocks, n_workers=workers)
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
            per_sample_weights=weights.flatten().index_select(0, order),
            mode="sum",
        )  # [N, D]
        return grad_anchors, grad_candidates, None, None, None


def largest(x: Tensor, n_largest: int) -> tuple[Tensor, Tensor]:
    """The largest entries of each row, in any order: [A, N] -> values and columns, [A, n_largest] each.

    Columns are dealt into groups. On the CPU, the groups' maxima give a floor that at least ``n_largest`` entries reach
    and few others, and only these are selected from. Elsewhere, or where ties put many entries on the floor, the
    ``n_largest`` groups with the largest maxima hold all that is sought. Either is one pass over the matrix and small
    selections, in place of a selection over all columns. Ties go to either entry.
    """
    n_columns = x.shape[1]
    n_groups = n_columns // GROUP
    if n_groups < 2 * n_largest:
        return x.topk(n_largest, dim=1, sorted=False)
    dealt = x[:, : n_groups * GROUP].unflatten(1, (GROUP, n_groups))  # column c is in group c mod n_groups
    maxima = dealt.amax(1)  # [A, n_groups]
    if x.device.type == "cpu" and x.is_contiguous() and x.dtype in (torch.float32, torch.float64):
        found = _largest_above_floor(x, maxima, n_largest)
        if found is not None:
            return found
    _, groups = maxima.topk(n_largest, dim=1, sorted=False)  # [A, n_largest]
    steps = torch.arange(0, n_groups * GROUP, n_groups, device=x.device).unsqueeze(1)  # [GROUP, 1]
    columns = (groups.unsqueeze(1) + steps).flatten(1)  # [A, GROUP n_largest]
    rest = torch.arange(n_groups * GROUP, n_columns, device=x.device).expand(len(x), -1)
    columns = torch.cat([columns, rest], dim=1)
    values, index = x.gather(1, columns).topk(n_largest, dim=1, sorted=False)
    return values, columns.gather(1, index)


def _largest_above_floor(x: Tensor, maxima: Tensor, n_largest: int) -> tuple[Tensor, Tensor] | None:
    """`largest` out of the entries that reach a floor, with NumPy's vectorised sort and search for true entries.

    Args:
        x: [A, N], contiguous, of which column c is in group c mod G, for the first GROUP G columns.
        maxima: [A, G], of the groups, at least 2 ``n_largest`` of them.

    Returns:
        None where the floor holds nothing back: too many entries reach it, or, for no numbers, too few.
    """
    (n_rows, n_columns), n_groups = x.shape, maxima.shape[1]
    n_dealt = n_groups * GROUP
    # Maxima of groups of groups: the n_largest-th largest is reached by at least n_largest entries.
    size = n_groups // (2 * n_largest)
    coarse = maxima[:, : n_groups // size * size].unflatten(1, (size, -1)).amax(1)  # [A, 2 n_largest or some more]
    floor = torch.from_numpy(np.sort(coarse.numpy(), axis=1)[:, -n_largest].copy())  # [A]

    hits = _true_places(maxima >= floor.unsqueeze(1))  # [h], groups that reach it, row by row
    if len(hits) > 4 * n_largest * n_rows:
        return None
    rows = hits // n_groups  # [h]
    steps = torch.arange(0, n_dealt, n_groups)  # [GROUP]
    places = (hits + rows * (n_columns - n_groups)).unsqueeze(1) + steps  # [h, GROUP], in x
    entries = x.view(-1).index_select(0, places.view(-1)).view(places.shape)
    reach = _true_places(entries >= floor.index_select(0, rows).unsqueeze(1))  # [r]
    rows = rows.index_select(0, reach // GROUP)  # [r]
    counts = torch.bincount(rows, minlength=n_rows)  # [A]
    if int(counts.min()) < n_largest:
        return None

    # One line per row of x, filled from the left, and the columns that are in no group behind.
    most, rest = int(counts.max()), n_columns - n_dealt
    width = most + rest
    to = rows * width + torch.arange(len(rows)) - (counts.cumsum(0) - counts).index_select(0, rows)  # [r]
    values = x.new_full((n_rows, width), -torch.inf)
    columns = torch.zeros(n_rows, width, dtype=torch.long)
    values[:, most:] = x[:, n_dealt:]
    columns[:, most:] = torch.arange(n_dealt, n_columns)
    values.view(-1).scatter_(0, to, entries.view(-1).index_select(0, reach))
    columns.view(-1).scatter_(0, to, places.view(-1).index_select(0, reach) - rows * n_columns)
    values, index = values.topk(n_largest, dim=1, sorted=False)
    return values, columns.gather(1, index)


def _true_places(mask: Tensor) -> Tensor:
    """Where a mask is true, counted through row by row; many times quicker than ``nonzero``."""
    return torch.from_numpy(np.flatnonzero(mask.numpy()))
