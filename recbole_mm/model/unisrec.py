"""UniSRec: universal sequence representations for recommender systems, from text instead of item ids.

Hou, Mu, Zhao, Li, Ding, Wen, "Towards Universal Sequence Representation Learning for Recommender Systems" (KDD 2022).

item's vector --> E parametric whitenings, mixed by noisy gates --> Transformer --> sequence h
                                                                       ^
pre-training      h against the next item (seq-item) and against the   |   content alone, of one dataset or several
                  same sequence with items or words dropped (seq-seq)  |
fine-tuning       inductive: content alone; transductive: + item embedding, in sequences and items
                  softmax over all items; position embedding and Transformer stay as pre-trained (``fix_enc``)

score(item) = cos(h, item's adapted vector (+ item embedding))

An item with several vectors has their mean. Text and pictures together are one vector, one beside the other
(``image_feature``).

Differences from the released code, and what they change:

* Pairs with the same target are left out of both losses. There, each still counts as exp(0) = 1.
* Item drop keeps the items it keeps, the first one always. There, a dropped item overwrites its predecessor, and on a
  GPU the winner is undefined.
* Sequences are augmented inside the model, so that a batch carries ids and no vectors.
* Gradients of several processes are synchronised. There, each process trains a copy of its own, and one is saved.
* Pre-training is validated too, by scores from content alone, and its best epoch is taken. There, it runs for 300
  epochs, and a checkpoint of every 50th is kept.
* Random numbers come from torch alone, so that its seed governs a run.

Kept as released: the padding item in the softmax (``exclude_pad_class``), vectors as they come from the encoder
(``feature_scale: none``), one kind of augmentation per batch.

Cost: an item at a place takes E products of [F] with [F, D]. Dropout is in front of them, so that in training places
cannot share a product; padding costs nothing, experts are one batched product, and in evaluation, or without dropout,
each item is adapted once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recbole_mm.errors import SettingError
from recbole_mm.model.base import MultimodalRecommender
from recbole_mm.model.layers import SequenceEncoder, at_least_float32, drop_items, scaled, valid_positions
from recbole_mm.model.losses import next_item_loss, unit_length
from recbole_mm.model.whitening import WhitenedRows, WhiteningAdaptor


class Items(NamedTuple):
    """What depends on items alone.

    Attributes:
        content: adapted vectors of n items.
        ids: [n, D], their item embeddings; None without.
        table: [N, D], what sequences are compared with, of length 1, where these are all items; None otherwise.
    """

    content: WhitenedRows
    ids: Tensor | None
    table: Tensor | None = None

    def with_ids(self, index: Tensor | None = None) -> Tensor:
        """Content plus item embedding of the items at these places, or of all: [n, D]."""
        content = self.content.all() if index is None else self.content.at(index)
        if self.ids is None:
            return content
        return content + (self.ids if index is None else F.embedding(index, self.ids))


class UniSRec(MultimodalRecommender):
    """UniSRec, of one stage: ``train_stage: pretrain`` has the contrastive losses, any other fine-tunes.

    ``finetune_mode`` says whether fine-tuning has an item embedding; the paper's names of the stages say both.

    Raises:
        DatasetError: the folder lacks a feature that is asked for.
        SettingError: neither text nor image is asked for.
    """

    scores_are_products = True
    fresh_parameters = ("item_embedding.weight",)  # not taken over from pre-training: item ids differ between datasets
    same_in_both_stages = ("n_heads", "hidden_act", "layer_norm_eps", "feature_scale", "gate_noise")
    left_to_right = True
    stage_names = {
        "inductive_ft": {"train_stage": "finetune", "finetune_mode": "inductive"},
        "transductive_ft": {"train_stage": "finetune", "finetune_mode": "transductive"},
    }

    def __init__(self, config, dataset) -> None:
        super().__init__(config, dataset)
        width, initializer_range = config["hidden_size"], config["initializer_range"]
        stage = config["train_stage"]
        self.pretraining = stage == "pretrain"
        self.wants_together = self.pretraining and config["gather_negatives"]
        self.temperature = config["temperature"]
        self.seq_seq_weight = config["seq_seq_weight"]
        self.item_drop_prob, self.item_drop_ratio = config["item_drop_prob"], config["item_drop_ratio"]
        self.word_drop_ratio = config["word_drop_ratio"]
        text, image, dropped = config["text_feature"], config["image_feature"], config["dropped_text_feature"]

        if not (text or image):
            raise SettingError(
                "text_feature and image_feature are both none; UniSRec knows items by one of them at least"
            )
        scale = config["feature_scale"]
        self.register_buffer("features", _vectors(dataset, (text, image), scale=scale), persistent=False)  # [N, F]
        with_words_dropped = _vectors(dataset, (dropped, image), scale=scale) if self.pretraining and dropped else None
        if with_words_dropped is not None and with_words_dropped.shape != self.features.shape:
            raise SettingError(
                f"dropped_text_feature {dropped!r} must be as wide as text_feature {text!r}; with the image, if there "
                f"is one, they are {with_words_dropped.shape[1]} and {self.features.shape[1]} wide"
            )
        self.register_buffer("features_with_words_dropped", with_words_dropped, persistent=False)  # [N, F]

        self.adaptor = WhiteningAdaptor(
            width_in=self.features.shape[1],
            width_out=width,
            n_experts=config["n_experts"],
            dropout=config["adaptor_dropout"],
            gate_noise=config["gate_noise"],
            initializer_range=initializer_range,
        )
        self.encoder = SequenceEncoder(
            width=width,
            inner_size=config["inner_size"],
            n_layers=config["n_layers"],
            n_heads=config["n_heads"],
            max_length=self.max_seq_length,
            hidden_dropout=config["hidden_dropout_prob"],
            attn_dropout=config["attn_dropout_prob"],
            hidden_act=config["hidden_act"],
            layer_norm_eps=config["layer_norm_eps"],
            initializer_range=initializer_range,
        )
        if config["fix_enc"] and (stage == "both" or (not self.pretraining and config["pretrained_path"])):
            self.encoder.position_embedding.requires_grad_(False)
            self.encoder.trm_encoder.requires_grad_(False)
        self.item_embedding = None
        if not self.pretraining and config["finetune_mode"] == "transductive":
            self.item_embedding = nn.Embedding(self.n_items, width, padding_idx=0)
            nn.init.normal_(self.item_embedding.weight[1:], std=initializer_range)

    # ------------------------------------------------ items and sequences

    def item_tower(self, items: Tensor | None = None) -> Items:
        ids = None if self.item_embedding is None else self.id_rows(self.item_embedding, items)
        features = self.features if items is None else self.features.index_select(0, items)
        found = Items(WhitenedRows(self.adaptor, features), ids)
        return found if items is not None else found._replace(table=_directions(found.with_ids()))

    def queries(self, items: Items, item_seq: Tensor, item_seq_len: Tensor, places: Tensor | None = None) -> Tensor:
        packed = item_seq[valid_positions(item_seq, item_seq_len)]  # [P]
        return _directions(self.encoder(items.with_ids(packed), item_seq_len, places))  # [B, D]

    def item_vectors(self, items: Items, index: Tensor | None = None) -> Tensor:
        if index is None and items.table is not None:
            return items.table
        return _directions(items.with_ids(index))

    def full_sort_predict(self, interaction) -> Tensor:
        """Scores of all items, [B, N]; padding gets -inf. In evaluation without a second matrix of that size."""
        if torch.is_grad_enabled():
            return super().full_sort_predict(interaction)
        scores = self._all_scores(interaction)
        scores[:, 0] = -torch.inf
        return scores

    # ------------------------------------------------ pre-training

    def calculate_loss(self, interaction) -> Tensor | tuple[Tensor, ...]:
        """Pre-training: seq-item and weighted seq-seq contrast. Fine-tuning: cross-entropy over all items."""
        if not self.pretraining:
            return super().calculate_loss(interaction)
        target = interaction[self.POS_ITEM_ID]  # [B]
        sequences, augmented, targets = self._pretraining_vectors(
            interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN], target
        )  # [B, D] each
        rows = self.together.rows(len(target), target.device)
        contrast = {
            "temperature": self.temperature,
            "same_target": target.unsqueeze(1) == rows.of_all(target),
            "own": rows.places,
        }
        seq_item = next_item_loss([sequences], rows.of_all(targets), **contrast)
        return seq_item, self.seq_seq_weight * next_item_loss([sequences], rows.of_all(augmented), **contrast)

    def _pretraining_vectors(self, item_seq: Tensor, item_seq_len: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        """Sequences, augmented sequences and targets, [B, D] each. Touches only the items that are in the batch."""
        augmented, augmented_len = self._augment(item_seq, item_seq_len)
        packed = [s[valid_positions(s, n)] for s, n in ((item_seq, item_seq_len), (augmented, augmented_len))]
        places = torch.cat([*packed, target])  # [P + P' + B]
        rows, index = places.unique(return_inverse=True)
        vectors = WhitenedRows(self.adaptor, self._rows(rows)).at(index)
        inputs, targets = vectors[: -len(target)], vectors[-len(target) :]
        sequences = self.encoder(inputs, torch.cat([item_seq_len, augmented_len]))  # [2 B, D]
        return *sequences.chunk(2), targets

    def _augment(self, item_seq: Tensor, item_seq_len: Tensor) -> tuple[Tensor, Tensor]:
        """Items dropped, or vectors exchanged for those of texts with words dropped: [B, L], [B] of the same kind.

        Item N + i stands for item i with words dropped. One of both for the whole batch.
        """
        if self.features_with_words_dropped is None or self.together.same(torch.rand(())) < self.item_drop_prob:
            return drop_items(item_seq, item_seq_len, self.item_drop_ratio)
        exchanged = (torch.rand(item_seq.shape, device=item_seq.device) < self.word_drop_ratio) & (item_seq > 0)
        return item_seq + self.n_items * exchanged, item_seq_len

    def _rows(self, places: Tensor) -> Tensor:
        """Vectors of items, also of those with words dropped: [n] -> [n, F]."""
        rows = self.features.index_select(0, places % self.n_items)
        if self.features_with_words_dropped is None:
            return rows
        exchanged = places >= self.n_items
        rows[exchanged] = self.features_with_words_dropped[places[exchanged] - self.n_items]
        return rows

    # ------------------------------------------------ for recbole_mm.released_weights

    released_names = {
        r"encoder\.(.+)": r"\1",
        r"item_embedding\.weight": r"item_embedding\.weight",
        r"adaptor\.weight": r"moe_adaptor\.(?!.*(?:gate|noise)).*weight",
        r"adaptor\.shift": r"moe_adaptor\.(?!.*(?:gate|noise)).*(?:bias|shift)",
        r"adaptor\.(gate|noise)\.weight": r"moe_adaptor\..*\1.*.T",
    }
    released_dropped = {
        r"plm_embedding(?:_aug)?\.weight": "features, which come from the dataset",
        r"item_embedding\.weight": "pre-training and inductive fine-tuning have no item embedding",
    }
    released_rows = {"item_embedding.weight": "item"}


def _directions(x: Tensor) -> Tensor:
    return unit_length(at_least_float32(x))


def _vectors(dataset, names: tuple[str | None, ...], *, scale: str) -> Tensor:
    """Features beside each other, one vector per item, each scaled by itself: [N, F]."""
    parts = [dataset.feature(name) for name in names if name]
    return torch.cat([scaled(part, part.any(dim=1), scale) for part in parts], dim=1)
