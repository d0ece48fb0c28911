"""What every multimodal model shares: an item tower computed once, a full softmax, scores over all items."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from recbole.model.abstract_recommender import SequentialRecommender
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from recbole_mm.data.protocols import COLD_ITEMS
from recbole_mm.errors import DatasetError
from recbole_mm.model.layers import products, valid_positions
from recbole_mm.model.positions import places_of
from recbole_mm.model.sampling import NegativeSampler, sampling_weights
from recbole_mm.model.softmax import chunked_softmax_loss, refuse_softmax, sampled_softmax_loss
from recbole_mm.model.together import Alone


class MultimodalRecommender(SequentialRecommender):
    """A sequential recommender whose items have content.

    A model writes two methods, `item_tower` and `scores`; the rest is here. Cost of a training step: one item tower and
    a [B, N] product; of an evaluation: one item tower altogether, then a product per batch.

    A model whose scores are products writes `queries` and `item_vectors` instead of `scores`, and an `item_tower` of
    given items, and sets ``scores_are_products``. Then ``softmax`` may be other than "full", and no [B, N] matrix is
    made in training or in evaluation. "chunked" is exact and takes ``softmax_chunk`` items at a time through the tower,
    which the backward pass computes again; "sampled" is an approximation, which takes the batch's items and some
    negatives through it.

    Under the protocol cold-items, an item that no training row has is known by its content alone: it is no candidate
    of the softmax in training (`training_logits`), and a model with a trained row per item, such as an ID embedding,
    reads it through `trained_only`.

    Shapes: B sessions, L positions, N item ids with padding 0, F encoder width, D model width.
    """

    # With the setting amp.
    in_16_bits: tuple[str, ...] = ("calculate_loss", "full_sort_predict", "predict", "query_and_item_vectors")
    modalities: tuple[str, ...] = ()  # each becomes a non-persistent buffer of that name, [N, F]
    together: Alone = Alone()  # while several processes share a training, and if `wants_together`, what links them
    wants_together = False
    scores_are_products = False  # of `queries` and `item_vectors`, and the softmax is the only loss over all items
    left_to_right = (
        False  # a position depends on nothing behind it, and `scores` takes ``places``, see `model.positions`
    )
    # No input_type: with loss_type CE, RecBole then refuses negative sampling instead of feeding random negatives.

    def __init__(self, config, dataset) -> None:
        super().__init__(config, dataset)
        if config["loss_type"] not in ("CE", None):
            raise ValueError(f"loss_type is {config['loss_type']!r}, expected CE: the loss is a softmax over all items")
        self.temperature = 1.0
        self.exclude_pad_class = bool(config["exclude_pad_class"])
        self._cached_tower: Any = None  # all items; where they come in chunks, their vectors [N, D]
        unseen = None
        if config["protocol"] == COLD_ITEMS:
            unseen = ~dataset.seen_in_training()
            unseen[0] = False  # padding stays what it is
        self.register_buffer("unseen", unseen, persistent=False)  # [N] bool; None under other protocols
        for name in self.modalities:
            self.register_buffer(name, dataset.feature(name), persistent=False)  # [N, F]
        self._build_softmax(config, dataset)

    def _build_softmax(self, config, dataset) -> None:
        self.softmax, self.softmax_chunk = config["softmax"] or "full", config["softmax_chunk"]
        self.lazy_item_embedding, self.sampler = bool(config["lazy_item_embedding"]), None
        left_out = torch.zeros(self.n_items, dtype=torch.bool) if self.unseen is None else self.unseen.clone()
        left_out[0] |= self.exclude_pad_class
        self.register_buffer("left_out", left_out if left_out.any() else None, persistent=False)  # no class: [N] bool
        refuse_softmax(type(self), self.softmax, lazy=self.lazy_item_embedding)
        if self.softmax == "sampled":
            popular = config["negative_sampling"] == "popularity"
            targets = dataset.inter_feat[self.POS_ITEM_ID] if popular else None
            weights = sampling_weights(config["negative_sampling"], targets, ~left_out)
            self.sampler = NegativeSampler(weights, n_drawn=config["softmax_negatives"])

    # ------------------------------------------------ what a model writes

    def item_tower(self, items: Tensor | None = None) -> Any:
        """What depends on items alone, such as vectors [N, D]; handed to `scores` as ``items``.

        A model with `queries` makes it of the given item ids too, [n]; None for all of them.
        """
        raise NotImplementedError

    def scores(self, items: Any, item_seq: Tensor, item_seq_len: Tensor, places: Tensor | None = None) -> Tensor:
        """Score of every item as the next one: [B, L], [B] -> [B, N], or [T, N] at ``places``, see `queries`."""
        return products(self.queries(items, item_seq, item_seq_len, places), self.item_vectors(items))

    def queries(self, items: Any, item_seq: Tensor, item_seq_len: Tensor, places: Tensor | None = None) -> Tensor:
        """What a sequence looks for, to be multiplied with `item_vectors`.

        Args:
            items: from `item_tower`, of all items or of some.
            item_seq: [B, L], which of ``items`` they are: of all items, their ids. Padding may be anything.
            item_seq_len: [B].
            places: [T] of the packed positions, where it is read; None for each sequence's last one.

        Returns:
            [B, D], or [T, D] with ``places``.
        """
        raise NotImplementedError

    def item_vectors(self, items: Any, index: Tensor | None = None) -> Tensor:
        """What queries are multiplied with, of all of ``items`` or of some [n] among them: [n, D]."""
        raise NotImplementedError

    def auxiliary_losses(self, items: Any, interaction) -> tuple[Tensor, ...]:
        """Further losses, already weighted; none by default."""
        return ()

    # ------------------------------------------------ what RecBole calls

    def calculate_loss(self, interaction) -> Tensor | tuple[Tensor, ...]:
        """Cross-entropy of the next item over all items, then the auxiliary losses."""
        if self.softmax != "full":
            return self._chunked_loss(interaction) if self.softmax == "chunked" else self._sampled_loss(interaction)
        items = self.item_tower()
        scores = self._scores_of(items, interaction)  # [B, N], or [T, N] of passes
        logits = self.training_logits(scores / self.temperature)
        losses = (
            full_softmax_loss(logits, interaction[self.POS_ITEM_ID], exclude_pad_class=self.exclude_pad_class),
            *self.auxiliary_losses(items, interaction),
        )
        return losses if len(losses) > 1 else losses[0]

    def _scores_of(self, items: Any, interaction) -> Tensor:
        """Of each row of a batch, or of each target of a batch of passes."""
        item_seq, item_seq_len = interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN]
        places = places_of(interaction, item_seq_len)
        at = {} if places is None else {"places": places}
        return self.scores(items, item_seq, item_seq_len, **at)

    def full_sort_predict(self, interaction) -> Tensor:
        """Scores of all items, [B, N]; padding gets -inf."""
        scores = self._all_scores(interaction)
        return scores.index_fill(1, torch.zeros(1, dtype=torch.long, device=scores.device), -torch.inf)

    def predict(self, interaction) -> Tensor:
        """Scores of the given items, [B]."""
        return self._all_scores(interaction).gather(1, interaction[self.ITEM_ID].unsqueeze(1)).squeeze(1)

    def _all_scores(self, interaction) -> Tensor:
        """[B, N], padding like any other item."""
        if self.softmax != "full" and not torch.is_grad_enabled():
            return products(*self.query_and_item_vectors(interaction))
        return self.scores(self._items(), interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN])

    # ------------------------------------------------ many items: never a [B, N] matrix

    def query_and_item_vectors(self, interaction) -> tuple[Tensor, Tensor]:
        """In evaluation, what scores are products of: [B, D], and [N, D] that is kept as the item tower is."""
        item_seq = interaction[self.ITEM_SEQ]

        def all_vectors() -> Tensor:
            everything = torch.arange(self.n_items, device=item_seq.device)
            return torch.cat([self._vectors_of(ids) for ids in everything.split(self.softmax_chunk)])

        return self._queries_and_items(interaction, item_seq[:0, 0])[0], self._kept(all_vectors)

    def _queries_and_items(self, interaction, others: Tensor) -> tuple[Tensor, Any, Tensor]:
        """Queries of a batch with a tower of its items and others [n] alone; that tower, and where the others are."""
        item_seq, item_seq_len = interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN]
        valid = valid_positions(item_seq, item_seq_len)
        ids, index = torch.cat([item_seq[valid], others]).unique(return_inverse=True)
        of_sequences, of_others = index.split([len(index) - len(others), len(others)])
        items, sequences = self.item_tower(ids), torch.zeros_like(item_seq).masked_scatter(valid, of_sequences)
        return self.queries(items, sequences, item_seq_len, places_of(interaction, item_seq_len)), items, of_others

    def _vectors_of(self, ids: Tensor) -> Tensor:
        return self.item_vectors(self.item_tower(ids))

    def _chunked_loss(self, interaction) -> Tensor:
        """The full softmax, exactly; with dropout, other draws of it. O(N D) memory and a chunk of the item tower."""
        target = interaction[self.POS_ITEM_ID]
        queries = self._queries_and_items(interaction, target[:0])[0]  # [B, D]
        everything = torch.arange(self.n_items, device=target.device)
        vectors = torch.cat(
            [checkpoint(self._vectors_of, ids, use_reentrant=False) for ids in everything.split(self.softmax_chunk)]
        )  # [N, D]
        return chunked_softmax_loss(
            queries,
            vectors,
            target,
            temperature=self.temperature,
            chunk=self.softmax_chunk,
            left_out=self.left_out,
        )

    def _sampled_loss(self, interaction) -> Tensor:
        """An approximation of the full softmax, see `sampled_softmax_loss`; time and memory do not depend on N."""
        target = interaction[self.POS_ITEM_ID]
        drawn, of_drawn = self.sampler.draw()  # [c] each
        columns, column = torch.cat([target, drawn]).unique(return_inverse=True)  # [C], [B + c]
        correction = of_drawn.new_full((len(columns),), -torch.inf)
        correction = correction.index_copy(0, column[len(target) :], of_drawn)  # [C]
        queries, items, of_columns = self._queries_and_items(interaction, columns)  # [B, D]
        vectors = self.item_vectors(items, of_columns)  # [C, D]
        return sampled_softmax_loss(queries, vectors, column[: len(target)], correction, temperature=self.temperature)

    # ------------------------------------------------ items that training never has

    def trained_only(self, table: Tensor) -> Tensor:
        """A trained row per item, [N, ...]; under cold-items, zeros for items that training never has."""
        if self.unseen is None:
            return table
        return table.masked_fill(self.unseen.view(-1, *[1] * (table.dim() - 1)), 0)

    def id_rows(self, embedding: nn.Embedding, items: Tensor | None) -> Tensor:
        """Rows of an item embedding as `trained_only` reads them, of these ids [n] or of all: [n, D].

        With ``lazy_item_embedding``, their gradient is a sparse one, of these rows alone.
        """
        if items is None:
            return self.trained_only(embedding.weight)
        rows = F.embedding(items, embedding.weight, sparse=self.lazy_item_embedding)  # [n, D]
        return rows if self.unseen is None else rows.masked_fill(self.unseen[items].unsqueeze(1), 0)

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
        return self._kept(self.item_tower)

    def _kept(self, make: Callable[[], Any]) -> Any:
        """What depends on items alone, made anew wherever weights may move, or something is dropped out."""
        if self.training or torch.is_grad_enabled():
            return make()
        if self._cached_tower is None:
            self._cached_tower = make()
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
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits[:, 1:], target - 1) if exclude_pad_class else F.cross_entropy(logits, target)
