"""MSM4SR: multimodal pre-training for sequential recommendation via contrastive learning.

Zhang, Zhou, Zeng, Shen, "Multimodal Pre-training Framework for Sequential Recommendation via Contrastive Learning"
(arXiv 2303.11879; ACM TORS). Also called MP4SR.

text rows ---> attention pooling -> expert adaptor -> [item drop, mixup] ---> Transformer ---> text sequence --+
                                                             ^ v             (shared)                          |
image rows --> attention pooling -> expert adaptor -> [item drop, mixup] ---> Transformer ---> image sequence -+
                                                                                                               |
pre-training  content alone; next item's text and image (NIP), text against image sequence (CMCL)  <-----------+
fine-tuning   content + item embedding in sequences and items; no drop, no mixup; softmax over items  <--------+

score(item) = cos(text sequence, item's text) + cos(image sequence, item's image)

Differences from the released code, which `MSM4SRReleased` repeats, and what they change:

* Attention pooling is trained. There, pooled vectors are copied into a table, so that it never gets a gradient and
  stays at its random start, close to a plain mean. ``train_attention: false`` freezes it here.
* It looks at an item's real rows. There, items are filled up with zero rows that take part in the softmax: an item
  with 1 of 10 rows keeps a tenth of its length, and the length tells the number of rows.
* Features are standardised first (``feature_scale``); vectors of length 1 or less would drown in the adaptor's bias.
* Pairs with the same target are left out of NIP. There, each still counts as exp(0) = 1.
* CMCL is the same in both directions. There, the second direction reuses the first one's sum.
* Item drop keeps the items it keeps. There, a dropped item overwrites its predecessor, and on a GPU the winner is
  undefined.
* With ``proj: true`` scores use the projections. There, they are ignored outside the loss.
* CMCL removes the self pair before the exponential, not by subtracting it afterwards, which loses digits.
* Random numbers come from torch alone, so that its seed governs a run.

Kept as released: one drop rate and one mixup probability per batch, the padding item in the softmax
(``exclude_pad_class``), no gate noise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recbole_mm.model.base import MultimodalRecommender
from recbole_mm.model.layers import (
    AttentionPooling,
    FeatureRows,
    MoEAdaptor,
    SequenceEncoder,
    at_least_float32,
    drop_items,
    mixup,
    valid_positions,
)
from recbole_mm.model.losses import cross_modality_loss, next_item_loss
from recbole_mm.model.together import OwnRows


class Modality(nn.Module):
    """What one modality knows of an item: its feature rows pooled and adapted to the model's width.

    Args:
        features: the rows.
        pooling: one vector out of an item's rows.
        adaptor: from encoder width to model width.
        keep_pool: keep the results of all items, [N, F], where pooling has no trainable parameters.
    """

    def __init__(
        self, *, features: FeatureRows, pooling: AttentionPooling, adaptor: MoEAdaptor, keep_pool: bool = True
    ) -> None:
        super().__init__()
        self.features, self.pooling, self.adaptor, self.keep_pool = features, pooling, adaptor, keep_pool
        self._frozen_pool: Tensor | None = None

    def pooled(self, items: Tensor | None = None) -> Tensor:
        """Pooled features of the given item ids [n, F], or of all [N, F]."""
        if not self.keep_pool or any(parameter.requires_grad for parameter in self.pooling.parameters()):
            return self.pooling(self.features, items)
        if self._frozen_pool is None:
            self._frozen_pool = self.pooling(self.features)
        return self._frozen_pool if items is None else self._frozen_pool.index_select(0, items)

    def content(self, items: Tensor | None = None) -> Content:
        return Content(self.adaptor, self.pooled(items))

    def _apply(self, *args, **kwargs):  # .to(device), .double() and the like
        self._frozen_pool = None
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs):  # also when a model that holds this one is loaded
        self._frozen_pool = None
        return super()._load_from_state_dict(*args, **kwargs)


class Content:
    """Adapted vectors of n items, wherever they are needed.

    With dropout, each place draws its own, behind the experts' matrix product: that product is kept here, and dropout,
    LayerNorm and gates are done where a vector is asked for. Without dropout the vectors are.

    Args:
        adaptor: of the modality.
        pooled: [n, F].
    """

    def __init__(self, adaptor: MoEAdaptor, pooled: Tensor) -> None:
        self.adaptor = adaptor
        if adaptor.training and adaptor.dropout.p > 0:
            self.hidden, self.gates = adaptor.experts(pooled)  # [n, E, D], [n, E]
        else:
            self.hidden, self.gates = None, None
            self.vectors = adaptor(pooled)  # [n, D]

    def all(self) -> Tensor:
        """[n, D]."""
        return self.vectors if self.hidden is None else self.adaptor.mix(self.hidden, self.gates)

    def at(self, index: Tensor) -> Tensor:
        """Vectors of items index [P], each with a dropout of its own: [P, D]."""
        if self.hidden is None:
            return F.embedding(index, self.vectors)  # on a CPU its gradient is far cheaper than that of indexing
        hidden = F.embedding(index, self.hidden.flatten(1)).view(-1, *self.hidden.shape[1:])  # [P, E, D]
        return self.adaptor.mix(hidden, F.embedding(index, self.gates))


class Items(NamedTuple):
    """What depends on items alone.

    Attributes:
        contents: of n items, one entry per modality.
        ids: [n, D], their item embeddings; None in pre-training.
    """

    contents: list[Content]
    ids: Tensor | None

    def parts(self, index: Tensor | None = None) -> list[Tensor]:
        """Content plus item embedding of the items at these places, or of all: [n, D] per modality."""
        contents = [content.all() if index is None else content.at(index) for content in self.contents]
        if self.ids is None:
            return contents
        return [content + (self.ids if index is None else F.embedding(index, self.ids)) for content in contents]


class MSM4SR(MultimodalRecommender):
    """MSM4SR, of one stage: ``train_stage: pretrain`` has no item embedding and the contrastive losses; any other
    fine-tunes.

    A folder with one of the two modalities is enough: then there is one sequence, no mixup and no CMCL.

    Raises:
        DatasetError: the folder has neither feature.
    """

    scores_are_products = True
    fresh_parameters = ("item_embedding.weight",)  # not taken over from pre-training: item ids differ between datasets
    same_in_both_stages = ("n_heads", "hidden_act", "layer_norm_eps", "max_rows", "feature_scale", "proj")
    left_to_right = True

    # Parts that a subclass may exchange.
    pooling_class = AttentionPooling
    drop_items = staticmethod(drop_items)
    next_item_loss = staticmethod(next_item_loss)
    cross_modality_loss = staticmethod(cross_modality_loss)

    def __init__(self, config, dataset) -> None:
        super().__init__(config, dataset)
        width, eps, initializer_range = config["hidden_size"], config["layer_norm_eps"], config["initializer_range"]
        self.pretraining = config["train_stage"] == "pretrain"
        self.temperature = config["temperature"]
        self.nip_weight, self.cmcl_weight = config["nip_weight"], config["cmcl_weight"]
        self.item_drop_max, self.mixup_max = config["item_drop_max"], config["mixup_max"]
        self.use_mixup = config["use_mixup"]
        self.wants_together = self.pretraining and config["gather_negatives"]
        train_attention = config["train_attention"] and (self.pretraining or not config["freeze_attention_in_finetune"])

        self.towers = nn.ModuleDict()  # by modality, text first
        for modality, feature in self._features(config, dataset).items():
            vectors = dataset.vectors(feature)
            features = FeatureRows(*vectors, max_rows=config["max_rows"], scale=config["feature_scale"])
            pooling = self.pooling_class(width=features.width, attention_size=config["attention_size"])
            # The only row of an item has weight 1 whatever its score.
            pooling.requires_grad_(train_attention and int(features.counts.max()) > 1)
            adaptor = MoEAdaptor(
                width_in=features.width,
                width_out=width,
                n_experts=config["n_experts"],
                dropout=config["adaptor_dropout"],
                eps=eps,
                initializer_range=initializer_range,
            )
            keep_pool = self.softmax != "sampled"  # which pools the items of a batch alone
            self.towers[modality] = Modality(features=features, pooling=pooling, adaptor=adaptor, keep_pool=keep_pool)
        self.encoder = SequenceEncoder(
            width=width,
            inner_size=config["inner_size"],
            n_layers=config["n_layers"],
            n_heads=config["n_heads"],
            max_length=self.max_seq_length,
            hidden_dropout=config["hidden_dropout_prob"],
            attn_dropout=config["attn_dropout_prob"],
            hidden_act=config["hidden_act"],
            layer_norm_eps=eps,
            initializer_range=initializer_range,
        )
        self.projections = nn.ModuleDict({m: nn.Linear(width, width) for m in self.towers} if config["proj"] else {})
        self.item_embedding = None
        if not self.pretraining:
            self.item_embedding = nn.Embedding(self.n_items, width, padding_idx=0)
            nn.init.normal_(self.item_embedding.weight[1:], std=initializer_range)

    def _features(self, config, dataset) -> dict[str, str]:
        """The feature of each modality that the folder has, ``{"text": "text", "image": "image"}``."""
        wanted = {"text": config["text_feature"], "image": config["image_feature"]}
        found = self.features_there(config, dataset, wanted)
        for modality in wanted.keys() - found.keys():
            self.logger.warning(
                f"{config['dataset']} has no feature {wanted[modality]!r}: MSM4SR runs on {' '.join(found)} alone, "
                "without mixup and without the cross-modality loss (CMCL)"
            )
        return found

    # ------------------------------------------------ items and sequences

    def item_tower(self, items: Tensor | None = None) -> Items:
        contents = [tower.content(items) for tower in self.towers.values()]
        return Items(contents, None if self.item_embedding is None else self.id_rows(self.item_embedding, items))

    def queries(self, items: Items, item_seq: Tensor, item_seq_len: Tensor, places: Tensor | None = None) -> Tensor:
        """All modalities beside each other, so that one product adds up their cosines: [B, modalities D]."""
        packed = item_seq[valid_positions(item_seq, item_seq_len)]  # [P]
        sequences = self._project(self._encode(items.parts(packed), item_seq_len, places))  # [B, D] each
        return unit_rows(sequences)

    def item_vectors(self, items: Items, index: Tensor | None = None) -> Tensor:
        return unit_rows(items.parts(index))

    def _project(self, sequences: list[Tensor]) -> list[Tensor]:
        """Sequences as scores compare them with items: with projections, each in its own modality's space."""
        if not self.projections:
            return sequences
        return [project(s) for project, s in zip(self.projections.values(), sequences, strict=True)]

    def _encode(self, inputs: list[Tensor], lengths: Tensor, places: Tensor | None = None) -> list[Tensor]:
        """All modalities' sequences in one call: packed positions [P, D] each, lengths [B] -> [B, D] each, or [T, D]."""
        if places is not None:
            places = torch.cat([places + number * len(inputs[0]) for number in range(len(inputs))])
        return list(self.encoder(torch.cat(inputs), lengths.repeat(len(inputs)), places).chunk(len(inputs)))

    # ------------------------------------------------ pre-training

    def calculate_loss(self, interaction) -> Tensor | tuple[Tensor, ...]:
        """Pre-training: NIP and, with two modalities, CMCL, weighted. Fine-tuning: cross-entropy over all items."""
        if not self.pretraining:
            return super().calculate_loss(interaction)
        target = interaction[self.POS_ITEM_ID]  # [B]
        sequences, targets = self._pretraining_vectors(
            interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN], target
        )  # [B, D] per modality
        anchors, rows = self._anchors(sequences), self.together.rows(len(target), target.device)
        nip = self._nip(anchors, targets, target, rows)
        if len(self.towers) == 1:
            return self.nip_weight * nip
        return self.nip_weight * nip, self.cmcl_weight * self._cmcl(anchors, rows)

    def _pretraining_vectors(self, item_seq: Tensor, item_seq_len: Tensor, target: Tensor) -> tuple[list, list]:
        """Sequences and targets, [B, D] per modality each. Touches only the items that are in the batch."""
        item_seq, item_seq_len = self._drop_items(item_seq, item_seq_len)
        packed = item_seq[valid_positions(item_seq, item_seq_len)]  # [P]
        items, index = torch.cat([packed, target]).unique(return_inverse=True)  # [u], [P + B]
        target_items, target_index = index[len(packed) :].unique(return_inverse=True)  # equal targets share a dropout
        contents = [tower.content(items) for tower in self.towers.values()]
        targets = [F.embedding(target_index, content.at(target_items)) for content in contents]
        inputs = self._mixup([content.at(index[: len(packed)]) for content in contents])
        return self._encode(inputs, item_seq_len), targets

    def _drop_items(self, item_seq: Tensor, item_seq_len: Tensor) -> tuple[Tensor, Tensor]:
        """One drop rate per batch, between 0 and ``item_drop_max``; in training only."""
        if not self.training or self.item_drop_max == 0:
            return item_seq, item_seq_len
        rate = self.together.same(torch.rand((), device=item_seq.device)) * self.item_drop_max
        return self.drop_items(item_seq, item_seq_len, rate)

    def _mixup(self, inputs: list[Tensor]) -> list[Tensor]:
        """One probability per batch, between 0 and ``mixup_max``; in training, with two modalities."""
        if not (self.training and self.use_mixup and len(inputs) == 2):
            return inputs
        text, image = inputs  # [P, D] each
        valid = torch.ones(len(text), dtype=torch.bool, device=text.device)
        prob = self.together.same(torch.rand((), device=text.device)) * self.mixup_max
        return list(mixup(text, image, valid, prob))

    def _anchors(self, sequences: list[Tensor]) -> list[list[Tensor]]:
        """Sequences to compare in each modality's space.

        Without projections text with text and image with image; with them every sequence is mapped into every space,
        and the first index is the space.
        """
        if not self.projections:
            return [[sequence] for sequence in sequences]
        return [[project(sequence) for sequence in sequences] for project in self.projections.values()]

    def _nip(self, anchors: list[list[Tensor]], targets: list[Tensor], target: Tensor, rows: OwnRows) -> Tensor:
        """Sum over the modalities; ``target`` [B] are the ids of the target items."""
        contrast = {
            "temperature": self.temperature,
            "same_target": target.unsqueeze(1) == rows.of_all(target),
            "own": rows.places,
        }
        return sum(
            self.next_item_loss(space, rows.of_all(vectors), **contrast)
            for space, vectors in zip(anchors, targets, strict=True)
        )

    def _cmcl(self, anchors: list[list[Tensor]], rows: OwnRows) -> Tensor:
        """Sum over the spaces; without projections there is one."""
        spaces = anchors if self.projections else [[sequence for (sequence,) in anchors]]
        return sum(
            self.cross_modality_loss(
                *space,
                temperature=self.temperature,
                candidates=None if rows.places is None else tuple(map(rows.of_all, space)),
                own=rows.places,
            )
            for space in spaces
        )


def unit_rows(parts: list[Tensor]) -> Tensor:
    """Each part's rows at length 1, side by side, so that one product of two such matrices adds up the parts'
    cosines."""
    return torch.cat([F.normalize(at_least_float32(part), dim=-1) for part in parts], dim=-1)
