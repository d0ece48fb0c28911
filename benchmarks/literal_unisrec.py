"""UniSRec written down literally, from the parameters of a given model: the oracle of its tests, the yardstick of its
benchmark.

Everything is computed everywhere: all items through the adaptor at each step and for each evaluation batch, the adaptor
on every position, padding included, one expert after the other, sequences padded to the full length through all of the
Transformer, one call per sequence. Dropout and noise are drawn place by place; without them both models compute the
same, if augmentation starts from the same seed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.literal_msm4sr import eye, sasrec


class LiteralUniSRec(nn.Module):
    """Wraps a model: same parameters, hence comparable gradients; same methods as far as a trainer calls them.

    Args:
        model: a UniSRec.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def encode(self, x: Tensor, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
        return sasrec(self.model.encoder, x, item_seq, item_seq_len, self.training)

    def calculate_loss(self, interaction) -> Tensor:
        model = self.model
        item_seq, item_seq_len = interaction[model.ITEM_SEQ], interaction[model.ITEM_SEQ_LEN]
        target = interaction[model.POS_ITEM_ID]
        if not model.pretraining:
            return F.cross_entropy(self.scores(item_seq, item_seq_len) / model.temperature, target)
        new, new_len = model._augment(item_seq, item_seq_len)
        sequences = self.encode(adapt(model.adaptor, model.features[item_seq], self.training), item_seq, item_seq_len)
        vectors = model.features[new % model.n_items]  # [B, L, F]
        if model.features_with_words_dropped is not None:
            dropped = (new >= model.n_items).unsqueeze(-1)
            vectors = torch.where(dropped, model.features_with_words_dropped[new % model.n_items], vectors)
        augmented = self.encode(adapt(model.adaptor, vectors, self.training), new, new_len)
        targets = adapt(model.adaptor, model.features[target], self.training)  # [B, D]
        same = (target[:, None] == target[None, :]) & ~eye(target)
        seq_item = contrast(sequences, targets, same, model.temperature)
        return seq_item + model.seq_seq_weight * contrast(sequences, augmented, same, model.temperature)

    def scores(self, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
        """[B, N]."""
        model = self.model
        table = adapt(model.adaptor, model.features, self.training)  # [N, D]
        x = adapt(model.adaptor, model.features[item_seq], self.training)  # [B, L, D]
        if model.item_embedding is not None:
            table = table + model.item_embedding.weight
            x = x + model.item_embedding.weight[item_seq]
        sequences = self.encode(x, item_seq, item_seq_len)
        return F.normalize(sequences, dim=-1) @ F.normalize(table, dim=-1).T

    def full_sort_predict(self, interaction) -> Tensor:
        scores = self.scores(interaction[self.model.ITEM_SEQ], interaction[self.model.ITEM_SEQ_LEN])
        scores[:, 0] = -torch.inf
        return scores


def adapt(adaptor: nn.Module, x: Tensor, training: bool) -> Tensor:
    """Experts one after the other: [..., F] -> [..., D]."""
    logits = x @ adaptor.gate.weight.T  # [..., E]
    if training and adaptor.noise is not None:
        deviation = F.softplus(x @ adaptor.noise.weight.T) + 0.01
        logits = logits + torch.randn_like(logits) * deviation
    gates = logits.softmax(-1)
    total = 0.0
    for k, (weight, shift) in enumerate(zip(adaptor.weight, adaptor.shift, strict=True)):
        whitened = (F.dropout(x, adaptor.dropout, training) - shift) @ weight.T  # [..., D]
        total = total + gates[..., k : k + 1] * whitened
    return total


def contrast(anchors: Tensor, others: Tensor, same: Tensor, temperature: float) -> Tensor:
    """InfoNCE as written in the formula: [B, D], [B, D] and pairs that are no negatives [B, B]."""
    e = (F.normalize(anchors, dim=-1) @ F.normalize(others, dim=-1).T / temperature).exp()  # [B, B]
    return -(e.diagonal() / (e * ~same).sum(1)).log().mean()
