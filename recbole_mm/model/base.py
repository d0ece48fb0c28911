"""What every multimodal model shares: an item tower computed once, a full softmax, scores over all items."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from recbole.model.abstract_recommender import SequentialRecommender
from torch import Tensor

from recbole_mm.data.protocols import COLD_ITEMS
from recbole_mm.errors import DatasetError


class MultimodalRecommender(SequentialRecommender):
    """A sequential recommender whose items have content.

    A model writes two methods, `item_tower` and `scores`; the rest is here. Cost of a training step: one item tower and
    a [B, N] product; of an evaluation: one item tower altogether, then a product per batch.

    Under the protocol cold-items, an item that no training row has is known by its content alone: it is no candidate
    of the softmax in training (`training_logits`), and a model with a trained row per item, such as an ID embedding,
    reads it through `trained_only`.

    Shapes: B sessions, L positions, N item ids with padding 0, F encoder width, D model width.
    """

    modalities: tuple[str, ...] = ()  # each becomes a non-persistent buffer of that name, [N, F]
    # No input_type: with loss_type CE, RecBole then refuses negative sampling instead of feeding random negatives.

    def __init__(self, config, dataset) -> None:
        super().__init__(config, dataset)
        if config["loss_type"] not in ("CE", None):
            raise ValueError(f"loss_type is {config['loss_type']!r}, expected CE: the loss is a softmax over all items")
        self.temperature = 1.0
        self.exclude_pad_class = bool(config["exclude_pad_class"])
        self._cached_tower: Any = None
        unseen = None
        if config["protocol"] == COLD_ITEMS:
            unseen = ~dataset.seen_in_training()
            unseen[0] = False  # padding stays what it is
        self.register_buffer("unseen", unseen, persistent=False)  # [N] bool; None under other protocols
        for name in self.modalities:
            self.register_buffer(name, dataset.feature(name), persistent=False)  # [N, F]

    # ------------------------------------------------ what a model writes

    def item_tower(self) -> Any:
        """What depends on items alone, such as vectors [N, D]; handed to `scores` as ``items``."""
        raise NotImplementedError

    def scores(self, items: Any, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
        """Score of every item as the next one: [B, L], [B] -> [B, N]."""
        raise NotImplementedError

    def auxiliary_losses(self, items: Any, interaction) -> tuple[Tensor, ...]:
        """Further losses, already weighted; none by default."""
        return ()

    # ------------------------------------------------ what RecBole calls

    def calculate_loss(self, interaction) -> Tensor | tuple[Tensor, ...]:
        """Cross-entropy of the next item over all items, then the auxiliary losses."""
        items = self.item_tower()
        scores = self.scores(items, interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN])  # [B, N]
        logits = self.training_logits(scores / self.temperature)
        losses = (
            full_softmax_loss(logits, interaction[self.POS_ITEM_ID], exclude_pad_class=self.exclude_pad_class),
            *self.auxiliary_losses(items, interaction),
        )
        return losses if len(losses) > 1 else losses[0]

    def full_sort_predict(self, interaction) -> Tensor:
        """Scores of all items, [B, N]; padding gets -inf."""
        scores = self.scores(self._items(), interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN])
        return scores.index_fill(1, torch.zeros(1, dtype=torch.long, device=scores.device), -torch.inf)

    def predict(self, interaction) -> Tensor:
        """Scores of the given items, [B]."""
        scores = self.scores(self._items(), interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN])
        return scores.gather(1, interaction[self.ITEM_ID].unsqueeze(1)).squeeze(1)

    # ------------------------------------------------ items that training never has

    def trained_only(self, table: Tensor) -> Tensor:
        """A trained row per item, [N, ...]; under cold-items, zeros for items that training never has."""
        if self.unseen is None:
            return table
        return table.masked_fill(self.unseen.view(-1, *[1] * (table.dim() - 1)), 0)

    def training_logits(self, logits: Tensor) -> Tensor:
        """Logits [B, N] as the softmax in training takes them: under cold-items, without items that training never has.

        Otherwise a model would learn from their content that nobody buys them.
        """
        return logits if self.unseen is None else logits.masked_fill(self.unseen, -torch.inf)

    # ------------------------------------------------ what a folder has

    @staticmethod
    def features_there(config, dataset, wanted: dict[str, str]) -> dict[str, str]:
        """Those of the wanted features, by modality, that the folder has.

        Raises:
            DatasetError: it has none of them.
        """
        present = dataset.feature_names()
        found = {modality: feature for modality, feature in wanted.items() if feature in present}
        if not found:
            absent, name = " nor ".join(map(repr, wanted.values())), config["dataset"]
            raise DatasetError(
                f"{name} has {'neither' if len(wanted) > 1 else 'no'} feature {absent}, only {sorted(present)}\n"
                f"  name what there is with {' and '.join(f'--{m}_feature' for m in wanted)}, or make one with: "
                f"python -m dataset_prep features --dataset {name} --feature {next(iter(wanted))}"
            )
        return found

    # ------------------------------------------------ the item tower, once per evaluation

    def _items(self) -> Any:
        if self.training or torch.is_grad_enabled():
            return self.item_tower()
        if self._cached_tower is None:
            self._cached_tower = self.item_tower()
        return self._cached_tower

    def train(self, mode: bool = True):
        self._cached_tower = None
        return super().train(mode)

    def load_state_dict(self, *args, **kwargs):
        self._cached_tower = None
        return super().load_state_dict(*args, **kwargs)

    def _apply(self, *args, **kwargs):  # .to(device), .double() and the like
        self._cached_tower = None
        return super()._apply(*args, **kwargs)


def full_softmax_loss(logits: Tensor, target: Tensor, *, exclude_pad_class: bool = False) -> Tensor:
    """Mean cross-entropy over all items.

    Args:
        logits: [B, N].
        target: [B] item ids, 1..N-1.
        exclude_pad_class: leave item id 0 out of the softmax. RecBole's own models keep it, and so do ours by default,
            so that their losses can be compared.
    """
    return F.cross_entropy(logits[:, 1:], target - 1) if exclude_pad_class else F.cross_entropy(logits, target)
