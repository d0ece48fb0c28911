"""MMSBR: multi-modal session-based recommendation.

Zhang, Xu, Ma, Li, Yang, Lin, "Beyond Co-occurrence: Multi-modal Session-based Recommendation" (arXiv 2309.17037; TKDE
36(4), 2024).

image feature --> projection --> F small networks --> image sequences --+
                      :                                                 +--> pivot transformer --> item vector
text feature  --> projection --> F small networks --> text sequences  --+                              |
                      :  pulled towards the projected pseudo-modality                                  |
                      :  (image made from text, text made from image)                                  v
session --> its items' vectors --> soft attention, order-free ----------------> interest . item vector
        --> its items' prices, Gaussians --> Wasserstein attention, last item --> - distance to the item's price

The equations are those of the released code, corrected; the paper's body was not at hand, so that no equation numbers
are given.

Differences from the released code (`MMSBRReleased` computes what it computes), and what they change:

* Items are seen. There, the features are loaded into tables which the constructor then overwrites with random
  numbers: eight random vectors per item, which are trained. Here features are frozen, scaled, and projected by a
  trained map.
* Pivots are shared by all items (``pivots: shared``). There, each item has its own, a hidden ID embedding of 256
  numbers that is random for an unseen item. ``pivots: per_item`` adds offsets per item to the shared ones, zero at the
  start.
* A session's interest goes through a map, ``next_item``, before it meets the items. There, both are vectors of one
  space, and an item is always what comes after itself first; here a tent may lead to a sleeping bag.
* Item vectors end in a LayerNorm, and the product is divided by sqrt(D). There, they end in a ReLU and dropout; with
  features of real size, scores then start in the dozens, and the quickest way down is to let all item vectors die.
* Attention weights sum to 1 over keys. There, the softmax runs over queries.
* The contrastive loss is a mean of natural logarithms of cosines, the positive always in the denominator and never
  among the negatives. There, it is a sum over all items, of base 10, of dot products, and its size grows with the
  catalogue.
* A larger price distance lowers the score. There, interest x (1 + distance) raises it.
* Sessions and items get their price Gaussians in the same way, each with its own LayerNorm, and the distance is a mean
  over dimensions. There, one LayerNorm has six roles and an item's price none.
* Dropout acts in every epoch, but not on what goes into the fusion network. There, it is switched off after the first
  evaluation and never comes back.
* Weights start as usual. There, all of them, LayerNorm's too, are uniform in +-1/8.
* An item without price is unknown: no key of the price attention, and scored as an average price would be.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from recbole_mm.errors import SettingError
from recbole_mm.model.base import MultimodalRecommender
from recbole_mm.model.layers import Dropout, dropped_of_65536, products, random_int16, scaled, valid_positions
from recbole_mm.model.losses import hard_negative_loss
from recbole_mm.model.pivots import PivotTransformer
from recbole_mm.model.wasserstein import (
    Gaussian,
    GaussianEmbedding,
    WassersteinAttention,
    positive,
    wasserstein_distances,
)


class FeatureSequences(nn.Module):
    """F small networks that each make one vector of an item's feature: x_f = D(tanh(W'_f D(tanh(W_f x)))).

    Source: MMSBR, feature sequences. The F networks are two batched products. On a CPU, training has a backward pass of
    its own (`_Sequences`), which keeps what goes on and a byte per value in place of three numbers.

    Args:
        width: D, of input and output.
        n_sequences: F.
        dropout: D, after either tanh.
    """

    def __init__(self, *, width: int, n_sequences: int, dropout: float) -> None:
        super().__init__()
        self.first = nn.Linear(width, n_sequences * width)
        self.second_weight = nn.Parameter(torch.empty(n_sequences, width, width))
        self.second_bias = nn.Parameter(torch.zeros(n_sequences, 1, width))
        self.dropout = Dropout(dropout)
        for weight in (*self.first.weight.unflatten(0, (n_sequences, width)), *self.second_weight):
            nn.init.xavier_uniform_(weight)
        nn.init.zeros_(self.first.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[n, D] -> [n, F, D]."""
        if x.device.type == "cpu" and torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu"):
            n_dropped = dropped_of_65536(self.dropout.p) if self.training else 0
            weights = (self.first.weight, self.first.bias, self.second_weight, self.second_bias)
            return _Sequences.apply(n_dropped, x, *weights).transpose(0, 1)
        hidden = self.dropout(self.first(x).tanh()).unflatten(1, (len(self.second_weight), -1))  # [n, F, D]
        out = torch.baddbmm(self.second_bias, hidden.transpose(0, 1), self.second_weight)  # [F, n, D]
        return self.dropout(out.tanh()).transpose(0, 1)


class _Sequences(torch.autograd.Function):
    """`FeatureSequences` with the masks that `Dropout` would draw; [F, n, D]."""

    @staticmethod
    def forward(ctx, n_dropped: int, x: Tensor, first: Tensor, first_bias: Tensor, second: Tensor, second_bias: Tensor):
        hidden, remain_1 = _thinned(torch.addmm(first_bias, x, first.T).tanh_(), n_dropped)  # [n, F D]
        per_network = hidden.unflatten(1, (len(second), -1)).transpose(0, 1)  # [F, n, D]
        out, remain_2 = _thinned(torch.baddbmm(second_bias, per_network, second).tanh_(), n_dropped)
        ctx.n_dropped = n_dropped
        ctx.save_for_backward(x, first, second, hidden, out, remain_1, remain_2)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, first, second, hidden, out, remain_1, remain_2 = ctx.saved_tensors
        per_network = hidden.unflatten(1, (len(second), -1))  # [n, F, D]
        grad_2 = _inside(grad, out, remain_2, ctx.n_dropped)  # [F, n, D]
        grad_hidden = torch.empty_like(hidden)  # [n, F D]
        for network, columns in enumerate(grad_hidden.view(per_network.shape).unbind(1)):
            torch.mm(grad_2[network], second[network].T, out=columns)
        grad_second = torch.bmm(per_network.permute(1, 2, 0), grad_2)
        grad_1 = _inside(grad_hidden, hidden, remain_1, ctx.n_dropped)
        grad_x = grad_1 @ first if ctx.needs_input_grad[1] else None
        return None, grad_x, grad_1.T @ x, grad_1.sum(0), grad_second, grad_2.sum(1, keepdim=True)


def _thinned(x: Tensor, n_dropped: int) -> tuple[Tensor, Tensor | None]:
    """Dropout in place, and what is left of x, 1 or 0."""
    if not n_dropped:
        return x, None
    remain = torch.empty(x.shape, dtype=torch.uint8)
    torch.ge(random_int16(x.shape), n_dropped - 32768, out=remain)
    return x.mul_(remain).mul_(65536 / (65536 - n_dropped)), remain


def _inside(grad: Tensor, y: Tensor, remain: Tensor | None, n_dropped: int) -> Tensor:
    """Gradient of what goes into y = Dropout(tanh(.)): with s the scale of what is left, s (1 - tanh^2) = s - y^2 / s.

    Where y was dropped it is zero, and so is the slope.
    """
    scale = 65536 / (65536 - n_dropped)
    slope = torch.ones_like(y) if remain is None else remain.to(y.dtype).mul_(scale)
    return slope.addcmul_(y, y, value=-1 / scale).mul_(grad)


class SoftAttention(nn.Module):
    """What a session is about: s = sum_t beta_t h_t, beta_t = w . sigmoid(A h_t + C m + a) + b, m the mean of all h_t.

    Source: MMSBR, session interest, after SR-GNN. The weights beta are free numbers, no softmax. Without positions the
    order of the items does not matter.

    Args:
        width: D.
        positions: None, or "forward" or "reversed": a vector for each place, counted from the first or from the last
            item, joins the sum inside the sigmoid.
        max_length: the largest number of places.
    """

    def __init__(self, *, width: int, positions: str | None, max_length: int) -> None:
        super().__init__()
        self.item, self.mean = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.weight = nn.Linear(width, 1)
        self.reversed = positions == "reversed"
        self.position = nn.Embedding(max_length, width) if positions else None
        for linear in (self.item, self.mean, self.weight):
            nn.init.xavier_uniform_(linear.weight)
        for linear in (self.item, self.weight):
            nn.init.zeros_(linear.bias)
        if self.position is not None:
            nn.init.normal_(self.position.weight, std=0.02)

    def forward(self, items: Tensor, lengths: Tensor) -> Tensor:
        """[B, L, D] with zeros at the padding, [B] -> [B, D]."""
        mean = items.sum(1) / lengths.unsqueeze(1).to(items.dtype)  # [B, D]
        inside = self.item(items) + self.mean(mean).unsqueeze(1)  # [B, L, D]
        if self.position is not None:
            steps = torch.arange(items.shape[1], device=items.device)
            places = (lengths.unsqueeze(1) - 1 - steps).clamp_min(0) if self.reversed else steps
            inside = inside + self.position(places)
        beta = self.weight(inside.sigmoid())  # [B, L, 1]
        return (beta * items).sum(1)  # padding adds zeros


class Items(NamedTuple):
    """What depends on items alone.

    Attributes:
        vectors: [N, D].
        prices: of the U distinct pairs of price level and category, [U, D], or None.
        in_sessions: mean and spread of these pairs as attention reads them, [U, D] each, or None.
        projected: by feature name, [N, D]; those that the contrastive loss compares.
    """

    vectors: Tensor
    prices: Gaussian | None
    in_sessions: tuple[Tensor, Tensor] | None
    projected: dict[str, Tensor]


class MMSBR(MultimodalRecommender):
    """MMSBR on whatever the folder has of image, text, pseudo-modalities, price and category.

    Cost of a training step: the item tower, 15 MFLOP an item with the defaults, and the contrastive loss, 4 N^2 D for
    two modalities; both independent of the batch, so that large batches are cheap. Several processes divide both among
    them with ``share_items``, and the batch in any case.

    Raises:
        DatasetError: neither image nor text is there.
        SettingError: both are switched off.
    """

    def __init__(self, config, dataset) -> None:
        super().__init__(config, dataset)
        if not (config["use_text"] or config["use_image"]):
            raise SettingError(f"use_text and use_image are both false: {type(self).__name__} needs one of them")
        self.width = config["hidden_size"]
        self.tower_chunk = config["tower_chunk"]
        self.wants_together = config["share_items"]
        self.contrastive_weight = config["contrastive_weight"]
        self.contrastive_temperature = config["contrastive_temperature"]
        self.n_negatives, self.n_anchors = config["n_negatives"], config["contrastive_anchors"]
        self.price_score = config["price_score"]

        wanted = {"text": config["text_feature"], "image": config["image_feature"]}  # in the order of their turns
        used = {"text": config["use_text"], "image": config["use_image"]}
        wanted = {modality: feature for modality, feature in wanted.items() if used[modality]}
        pseudo = {"text": config["pseudo_text_feature"], "image": config["pseudo_image_feature"]}
        pseudo = {modality: pseudo[modality] for modality in wanted if self.contrastive_weight > 0}
        self.streams, self.pairs = self._find_features(config, dataset, wanted, pseudo)
        self._build_features(config, dataset)
        self.sequences = nn.ModuleDict(
            {
                modality: FeatureSequences(
                    width=self.width, n_sequences=config["n_sequences"], dropout=config["feature_dropout"]
                )
                for modality in self.streams
            }
        )
        self._build_pivots(config)
        self._build_fusion(config)
        self.interest = SoftAttention(
            width=self.width,
            positions=None if config["positions"] == "none" else config["positions"],
            max_length=self.max_seq_length,
        )
        self.has_prices = config["use_price"] and config["price_score"] != "none" and self._find_prices(dataset)
        if self.has_prices:
            self._build_prices(config)

    # ------------------------------------------------ what there is

    def _find_features(self, config, dataset, wanted: dict, pseudo: dict) -> tuple[dict, dict]:
        """Features by modality, and pairs (feature, pseudo-feature) by modality; says what is missing."""
        streams, present = self.features_there(config, dataset, wanted), dataset.feature_names()
        pairs = {m: (streams[m], feature) for m, feature in pseudo.items() if m in streams and feature in present}
        absent = [feature for modality, feature in wanted.items() if modality not in streams]
        absent += [feature for modality, feature in pseudo.items() if modality in streams and modality not in pairs]
        if absent:
            self.logger.warning(f"{config['dataset']} has no feature {', '.join(absent)}: MMSBR runs without")
        return streams, pairs

    def _find_prices(self, dataset) -> bool:
        """Price level and category of each item as buffers; false, with a notice, if no item has a price level."""
        columns = dataset.item_columns()
        if "price_level" not in columns or not int((level := dataset.item_field("price_level").values).count_nonzero()):
            self.logger.warning(
                f"{dataset.dataset_name}.item has no price_level: MMSBR runs without prices; if there is a price, "
                f"make levels with: python -m dataset_prep prices --dataset {dataset.folder}"
            )
            return False
        category = torch.zeros_like(level)
        if "category" in columns:
            category = dataset.item_field("category").values
        else:
            self.logger.warning(f"{dataset.dataset_name}.item has no category: MMSBR runs without")
        pairs, pair_of_item = torch.stack([level, category]).unique(dim=1, return_inverse=True)  # [2, U], [N]
        known = level > 0
        known[0] = False
        share = torch.bincount(pair_of_item[known], minlength=pairs.shape[1]) / known.sum()  # [U]
        for name, tensor in dict(
            price_pairs=pairs, pair_of_item=pair_of_item, pair_known=pairs[0] > 0, pair_share=share
        ).items():
            self.register_buffer(name, tensor, persistent=False)
        return True

    # ------------------------------------------------ parts

    def _build_features(self, config, dataset) -> None:
        """Frozen, scaled features as buffers, and a projection for each modality, shared with its pseudo twin."""
        self.projections = nn.ModuleDict()
        for modality, feature in self.streams.items():
            names = {modality: feature}
            if modality in self.pairs:
                names[f"pseudo_{modality}"] = self.pairs[modality][1]
            for name, source in names.items():
                table, there = dataset.feature(source), dataset.has_content(source)
                table = scaled(table, there, config["feature_scale"])  # [N, F]
                self.register_buffer(f"{name}_table", table, persistent=False)
                self.register_buffer(f"{name}_there", there, persistent=False)
                twin = self.projections[modality] if name != modality else None
                if twin is None or twin.in_features != table.shape[1]:
                    self.projections[name] = nn.Linear(table.shape[1], self.width)
                    nn.init.xavier_uniform_(self.projections[name].weight)
                    nn.init.zeros_(self.projections[name].bias)

    def _build_pivots(self, config) -> None:
        n_pivots, kind = config["n_pivots"], config["pivots"]
        self.use_pivots = kind != "none"
        if not self.use_pivots:
            return
        self.pivots = nn.Parameter(torch.empty(n_pivots, self.width))
        nn.init.normal_(self.pivots, std=0.02)
        self.pivot_offsets = None
        if kind == "per_item":
            self.pivot_offsets = nn.Embedding(self.n_items, n_pivots * self.width)
            nn.init.zeros_(self.pivot_offsets.weight)
        self.transformer = self._transformer(config)

    def _transformer(self, config, **more) -> PivotTransformer:
        return PivotTransformer(
            width=self.width,
            n_streams=len(self.streams),
            n_rounds=config["n_rounds"],
            n_heads=config["n_heads"],
            inner_size=config["inner_size"],
            dropout=config["pivot_dropout"],
            **more,
        )

    def _build_fusion(self, config) -> None:
        """A network that makes an item vector of the pivots, and the map from a session to the item it looks for."""
        n_parts = config["n_pivots"] if self.use_pivots else len(self.streams)
        first, second = nn.Linear(n_parts * self.width, self.width), nn.Linear(self.width, self.width)
        for linear in (first, second):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        dropout = Dropout(config["fusion_dropout"])
        self.fusion = nn.Sequential(first, nn.ReLU(), dropout, second, dropout, nn.LayerNorm(self.width))
        self.next_item = nn.Linear(self.width, self.width, bias=False)
        nn.init.xavier_uniform_(self.next_item.weight)

    def _build_prices(self, config) -> None:
        n_levels, n_categories = (int(ids.max()) + 1 for ids in self.price_pairs)
        self.price_embedding = GaussianEmbedding(n_levels=n_levels, n_categories=n_categories, width=self.width)
        self.price_attention = WassersteinAttention(
            width=self.width, n_heads=config["n_heads"], dropout=config["price_dropout"]
        )
        self.price_dropout = Dropout(config["price_dropout"])
        self.price_weight = nn.Parameter(torch.zeros(()))

    # ------------------------------------------------ items

    def item_tower(self) -> Items:
        projected = self._projected()
        vectors = self._vectors([projected[modality] for modality in self.streams])
        prices, in_sessions = self._prices() if self.has_prices else (None, None)
        projected = {name: x for name, x in projected.items() if name.removeprefix("pseudo_") in self.pairs}
        vectors, *tables = (self.together.whole(x, self.n_items) for x in (vectors, *projected.values()))
        return Items(vectors, prices, in_sessions, dict(zip(projected, tables, strict=True)))

    def _projected(self) -> dict[str, Tensor]:
        """Each feature in the model's width, of this process' items, [N, D] for all; pseudo-ones in training only."""
        names = list(self.streams)
        if self.training:
            names += [f"pseudo_{modality}" for modality in self.pairs]
        return {name: self._project(name) for name in names}

    def _project(self, name: str) -> Tensor:
        project = self.projections[name if name in self.projections else name.removeprefix("pseudo_")]
        return project(self.together.part(getattr(self, f"{name}_table")))

    def _vectors(self, features: list[Tensor]) -> Tensor:
        """Item vectors [N, D] out of projected features, [N, D] per modality; in chunks that are computed again in
        the backward pass, if ``tower_chunk`` says so."""
        pivots = self._pivots()
        if not self.tower_chunk or not torch.is_grad_enabled():
            return self._vectors_of(pivots, *features)
        parts = [feature.split(self.tower_chunk) for feature in features]
        if pivots is not None and pivots.dim() == 3:
            pivot_parts = pivots.split(self.tower_chunk)
        else:
            pivot_parts = [pivots] * len(parts[0])
        # The reentrant kind: the forward pass is run without autograd, so that nothing at all is kept.
        vectors = [
            checkpoint(self._vectors_of, *part, use_reentrant=True) for part in zip(pivot_parts, *parts, strict=True)
        ]
        return torch.cat(vectors)

    def _vectors_of(self, pivots: Tensor | None, *features: Tensor) -> Tensor:
        """Pivots and features of n items -> [n, D]."""
        streams = [sequences(x) for sequences, x in zip(self.sequences.values(), features, strict=True)]  # [n, F, D]
        if pivots is None:
            parts = torch.cat([stream.mean(1) for stream in streams], dim=1)  # [n, modalities D]
        else:
            parts = self.transformer(pivots, streams).flatten(1)  # [n, K D]
        return self.fusion(parts)

    def _pivots(self) -> Tensor | None:
        """[K, D] for all items, [N, K, D], or None."""
        if not self.use_pivots:
            return None
        if self.pivot_offsets is None:
            return self.pivots
        offsets = self.together.part(self.trained_only(self.pivot_offsets.weight))
        return self.pivots + offsets.unflatten(1, self.pivots.shape)

    def _prices(self) -> tuple[Gaussian, tuple[Tensor, Tensor]]:
        """``prices`` and ``in_sessions`` of `Items`, here the same ones."""
        mean, spread = self.price_embedding(*self.price_pairs)  # [U, D] each
        return Gaussian(mean, positive(spread)), (mean, spread)

    # ------------------------------------------------ scores

    def scores(self, items: Items, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
        item_seq = item_seq[:, : int(item_seq_len.max())]  # [B, L]
        valid = valid_positions(item_seq, item_seq_len)
        sequence = F.embedding(item_seq, items.vectors) * valid.unsqueeze(-1)  # [B, L, D]
        # Items first, so that prices join row by row.
        interest = products(items.vectors, self._wanted(sequence, item_seq_len))  # [N, B]
        if not self.has_prices:
            return interest.T
        pair = self.pair_of_item[item_seq]  # [B, L]
        known = valid & self.pair_known[pair]  # [B, L]
        session = self._session_price(items.in_sessions, pair, item_seq_len - 1, valid, known)  # [B, D]
        distance = self._price_distances(items.prices, session, known.any(1))  # [U, B]
        return self._with_price(interest, F.embedding(self.pair_of_item, distance)).T

    def _wanted(self, sequence: Tensor, item_seq_len: Tensor) -> Tensor:
        """What the session looks for, [B, L, D] -> [B, D]: its product with an item's vector is the interest in it."""
        return self.next_item(self.interest(sequence, item_seq_len)) / math.sqrt(self.width)

    def _session_price(
        self, in_sessions: tuple[Tensor, Tensor], pair: Tensor, last: Tensor, valid: Tensor, known: Tensor
    ) -> Gaussian:
        """The session's price [B, D], read at its last item, known prices alone if there are any.

        Args:
            in_sessions: [U, D] each.
            pair: [B, L], 0..U-1.
            last: [B], the position of the last item.
            valid, known: [B, L], where an item is, and one with a price.
        """
        attended = torch.where(known.any(1, keepdim=True), known, valid)
        mean, spread = (self.price_dropout(F.embedding(pair, rows)) for rows in in_sessions)  # [B, L, D] each
        return self.price_attention(mean, spread, attended, last)

    def _price_distances(self, prices: Gaussian, session: Gaussian, has_price: Tensor) -> Tensor:
        """Mean squared distance of each distinct price from each session's, [U, B].

        A price that is unknown is as far away as the known ones are on average over the items; a session without any
        known price, where ``has_price`` [B] is false, is as far from all.
        """
        distance = wasserstein_distances(prices, session) / (2 * self.width)  # [U, B]
        average = self.pair_share.to(distance.dtype) @ distance  # [B]
        distance = torch.where(self.pair_known.unsqueeze(1), distance, average)
        return torch.where(has_price, distance, 0.0)

    def _with_price(self, interest: Tensor, distance: Tensor) -> Tensor:
        """Interest [N, B] and price distance [N, B] as one score."""
        weight = F.softplus(self.price_weight)
        if self.price_score == "minus":
            return interest - weight * distance
        if self.price_score == "product_exp":
            return interest * torch.exp(-weight * distance)
        return interest * (1 + weight * distance)

    # ------------------------------------------------ the contrastive loss

    def auxiliary_losses(self, items: Items, interaction) -> tuple[Tensor, ...]:
        """Pseudo-modality contrastive learning, one term per modality that has its pseudo twin."""
        if not self.pairs:
            return ()
        names = (f"pseudo_{modality}" for modality in self.pairs)  # in the same order in all processes
        absent = [name for name in names if name not in items.projected]  # a loss out of training
        projected = items.projected | {name: self.together.whole(self._project(name), self.n_items) for name in absent}
        return (self.contrastive_weight * sum(self._contrast(projected, modality) for modality in self.pairs),)

    def _contrast(self, projected: dict[str, Tensor], modality: str) -> Tensor:
        there = getattr(self, f"{modality}_there") & getattr(self, f"pseudo_{modality}_there")
        ids = there.nonzero().squeeze(1)  # [n]
        own = torch.arange(len(ids), device=ids.device)
        if 0 < self.n_anchors < len(ids):  # a sample of the anchors, all candidates
            own = self.together.same(torch.randperm(len(ids), device=ids.device))[: self.n_anchors]
        here = self.together.part(own)
        loss = hard_negative_loss(
            F.embedding(ids[here], projected[modality]),
            F.embedding(ids, projected[f"pseudo_{modality}"]),
            here,
            n_negatives=self.n_negatives,
            temperature=self.contrastive_temperature,
        )
        return self.together.mean(loss, len(own))
