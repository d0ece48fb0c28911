"""MSM4SR as the authors' released code computes it in the forward pass and the losses, defects included.

For one purpose: to measure, on the same data and with the same trainer, what the defects do. For everything else there
is `MSM4SR`, which this differs from as follows:

* Attention pooling gets no gradient and keeps its random start (``train_attention: false``). Its weights are
  equal to about 1 % on rows of length 1, so that it is a mean of the rows.
* Zero rows, which fill every item up to the largest number of rows T, take part in its softmax. Of an item with n rows,
  about n/T of the mean is left: the length of the vector tells the number of rows.
* Features are taken as they are (``feature_scale: none``). The adaptor's bias outweighs short vectors: the adapted
  vectors of two unrelated items have a cosine of .5 if they come from vectors of length 1, of .99 if from .1.
* Pairs with the same target have the logit 0 in NIP and count as exp(0) = 1, about a fifth of an ordinary negative.
* The image side of CMCL reuses the text side's sum over the other modality: the loss is not symmetric.
* Item drop writes dropped items too, each over the last kept one: the predecessors of dropped items vanish, the newest
  item always stays, the first one need not. PyTorch leaves the outcome of such a ``scatter`` undefined; this is the one
  on a CPU, on every device.
* Scores ignore the projections: ``proj: true`` trains them for the loss alone.

What has the same value there and here is written once: losses broadcast to [B, B]; the self pair of CMCL, added and
subtracted again; the padding item as a class of the softmax. Biases of attention pooling and the adaptor's ``w_noise``
change nothing and are left out. Weights start alike in both classes and there: the linear layers of pooling and the
adaptor's bias as PyTorch starts them, gates at zero, the rest at N(0, 0.02).

Not repeated: an item without content stops the released code, here it has its stand-in (``missing_features``); random
numbers come from torch alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_mm.model.layers import AttentionPooling, FeatureRows, segment_softmax, valid_positions
from recbole_mm.model.losses import cosines, of_own, own_places, without_own
from recbole_mm.model.msm4sr import MSM4SR
from recbole_mm.ragged import segments_of


class PaddedPooling(AttentionPooling):
    """Attention pooling in which every item is filled up with zero rows to the largest number of rows T.

    A zero row has the score 0 and adds nothing to the sum, so that the result is that over the real rows, times their
    share of the weights. The padding item is zero.
    """

    def forward(self, features: FeatureRows, items: Tensor | None = None) -> Tensor:
        items = torch.arange(len(features.counts), device=features.counts.device) if items is None else items
        pooled = super().forward(features, items)  # [n, F]
        share = self.share_of_real_rows(features, items).masked_fill(items == 0, 0)  # [n]
        return pooled * share.unsqueeze(1)

    def share_of_real_rows(self, features: FeatureRows, items: Tensor) -> Tensor:
        """[n] -> [n]; 1 for an item without rows, which has its stand-in."""
        counts = features.counts.index_select(0, items)  # [n]
        row_ids, segments, _ = segments_of(features.starts.index_select(0, items), counts)  # [R], [R]
        scores = self._scores(features, row_ids)  # [R]
        if features.mean is not None:  # standardised: the mean's share, which real rows have in common, zero rows lack
            scores = scores - (self.outer.weight @ self.inner.weight).squeeze(0) @ (features.mean / features.std)
        zero_rows = (features.counts.max() - counts).to(scores.dtype).log()  # [n], log of their sum of exp(0)
        weights = segment_softmax(
            torch.cat([scores, zero_rows]),
            torch.cat([segments, torch.arange(len(items), device=items.device)]),
            len(items),
        )  # [R + n]
        return torch.where(counts == 0, 1, 1 - weights[len(scores) :])


def overwrite_items(item_seq: Tensor, item_seq_len: Tensor, rate: float | Tensor) -> tuple[Tensor, Tensor]:
    """Item drop with `scatter_last`; arguments, draws and results as of `layers.drop_items`."""
    keep = torch.rand(item_seq.shape, device=item_seq.device) >= rate  # [B, L]
    return scatter_last(item_seq, item_seq_len, keep)


def scatter_last(item_seq: Tensor, item_seq_len: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Each kept item opens a slot, each dropped one overwrites the slot before it: 11 to 15, kept 11 and 13 -> 12, 15.

    Hence the last item before each kept one survives, and the last of all.

    Args:
        item_seq: [B, L], padded with 0 on the right.
        item_seq_len: [B].
        keep: [B, L] bool; the first item is always kept, padding does not count.

    Returns:
        The new sequences [B, L] and their lengths [B].
    """
    valid = valid_positions(item_seq, item_seq_len)
    keep = keep & valid
    keep[:, 0] = True
    survives = keep.roll(-1, dims=1)  # the next one is kept
    survives.scatter_(1, item_seq_len.unsqueeze(1) - 1, True)
    survives &= valid
    new_len = survives.sum(1)  # [B]
    # Both masks are walked row by row, so the survivors of a row fill its first places.
    kept = torch.zeros_like(item_seq).masked_scatter(valid_positions(item_seq, new_len), item_seq[survives])
    return kept, new_len


def next_item_loss(
    anchors: Sequence[Tensor],
    targets: Tensor,
    *,
    temperature: float,
    same_target: Tensor | None = None,
    own: Tensor | None = None,
) -> Tensor:
    """As `losses.next_item_loss`, but a pair with the same target counts as exp(0) = 1 in the denominator."""
    own = own_places(targets, own)
    logits = torch.stack([cosines(anchor, targets) for anchor in anchors], dim=1) / temperature  # [B, A, C]
    positive = of_own(logits, own)  # [B, A]
    if same_target is not None:
        others = same_target.scatter(1, own.unsqueeze(1), False)  # [B, C]
        logits = logits.masked_fill(others.unsqueeze(1), 0.0)
    return (logits.flatten(1).logsumexp(1) - positive.logsumexp(1)).mean()


def cross_modality_loss(
    text: Tensor,
    image: Tensor,
    *,
    temperature: float,
    candidates: tuple[Tensor, Tensor] | None = None,
    own: Tensor | None = None,
) -> Tensor:
    """As `losses.cross_modality_loss`, but the image side has the text side's sum over the other modality.

    Half the sum, over both sides, of -mean_i log( exp(s_ii) / (sum_j exp(s_ij) + sum_{j != i} exp(o_ij)) ); s is
    between text and image on both sides, o within text on one and within image on the other.
    """
    own, (texts, images) = own_places(text, own), candidates or (text, image)
    across = cosines(text, images) / temperature  # [B, C]
    sides = []
    for one, others in ((text, texts), (image, images)):
        within = without_own(cosines(one, others) / temperature, own)  # [B, C]
        sides.append(F.cross_entropy(torch.cat([across, within], dim=1), own))
    return sum(sides) / 2


def _names_of(modality: str, words: str) -> dict[str, str]:
    """Parameters of a modality, ours: theirs. All that is known of theirs is a word for it, and the shapes."""
    ours, theirs = rf"towers\.{modality}", rf".*(?:{words}).*"
    return {
        rf"{ours}\.pooling\.(?:inner|outer)\.weight": rf"{theirs}weight",
        rf"{ours}\.adaptor\.gate\.weight": rf"(?=.*gate){theirs}.T",
        rf"{ours}\.adaptor\.(?:project\.|norm_)(weight|bias)": rf"{theirs}\1",
        rf"projections\.{modality}\.(weight|bias)": rf"{theirs}\1",
    }


class MSM4SRReleased(MSM4SR):
    """MSM4SR with the defects above, and how to read the released checkpoints (`recbole_mm.released_weights`)."""

    pooling_class = PaddedPooling
    drop_items = staticmethod(overwrite_items)
    next_item_loss = staticmethod(next_item_loss)
    cross_modality_loss = staticmethod(cross_modality_loss)

    def _project(self, sequences: list[Tensor]) -> list[Tensor]:
        return sequences

    # ------------------------------------------------ for recbole_mm.released_weights

    released_names = {
        r"encoder\.(.+)": r"\1",
        r"item_embedding\.weight": r"item_embedding\.weight",
        **_names_of("text", "desc|text|txt"),
        **_names_of("image", "img|image|vis"),
    }
    released_dropped = {
        r"(?:desc|img)_embedding\.weight": "features, which come from the dataset",
        r".*w_noise": "noise of the gates, which is never added",
        r"(?!trm_encoder).*(?:att|pool).*bias": "the same for all rows of an item, which softmax ignores",
        r"item_embedding\.weight": "pre-training has no item embedding",
    }
    released_rows = {"item_embedding.weight": "item"}
