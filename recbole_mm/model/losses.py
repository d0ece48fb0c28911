"""Contrastive losses: tensors in, scalar out, no parameters; in float32 at least, as log-sum-exp with -inf masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


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
        return F.normalize(a.to(dtype), dim=-1) @ F.normalize(b.to(dtype), dim=-1).T
