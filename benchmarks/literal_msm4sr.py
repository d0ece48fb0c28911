"""MSM4SR written down literally, from the parameters of a given model: the oracle of its tests, the yardstick of its
benchmark.

Everything is computed everywhere: all items through attention pooling and adaptor at each step and for each
evaluation batch, features padded to the largest number of rows, the adaptor on every position, padding included, one
expert after the other, sequences padded to the full length through all of the Transformer, one call per modality. It
draws random numbers in the model's order, so that with dropout 0 and the same seed both compute the same.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from recbole.model.layers import TransformerLayer
from torch import Tensor, nn


class LiteralMSM4SR(nn.Module):
    """Wraps a model: same parameters, hence comparable gradients; same methods as far as a trainer calls them.

    Args:
        model: an MSM4SR.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.padded = [padded_rows(tower.features) for tower in model.towers.values()]  # ([N, T, F], [N, T]) each

    # ------------------------------------------------ items

    def pooled(self) -> list[Tensor]:
        """All items through attention pooling, [N, F] per modality."""
        return [
            pool(tower.pooling, rows, valid, scaled_fallback(tower.features))
            for tower, (rows, valid) in zip(self.model.towers.values(), self.padded, strict=True)
        ]  # [N, F] each

    # ------------------------------------------------ sequences

    def encode(self, x: Tensor, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
        return sasrec(self.model.encoder, x, item_seq, item_seq_len, self.training)

    # ------------------------------------------------ losses and scores

    def calculate_loss(self, interaction) -> Tensor:
        model = self.model
        item_seq, item_seq_len = interaction[model.ITEM_SEQ], interaction[model.ITEM_SEQ_LEN]
        target = interaction[model.POS_ITEM_ID]
        if not model.pretraining:
            scores = self.scores(item_seq, item_seq_len) / model.temperature
            return F.cross_entropy(scores, target)
        item_seq, item_seq_len = model._drop_items(item_seq, item_seq_len)
        pooled = self.pooled()
        adaptors = [tower.adaptor for tower in model.towers.values()]
        targets = [adapt(a, e, self.training)[target] for a, e in zip(adaptors, pooled, strict=True)]  # [B, D] each
        inputs = [adapt(a, e[item_seq], self.training) for a, e in zip(adaptors, pooled, strict=True)]  # [B, L, D] each
        if self.training and model.use_mixup and len(inputs) == 2:
            prob = torch.rand((), device=item_seq.device) * model.mixup_max
            swap = torch.zeros_like(item_seq, dtype=torch.bool)  # [B, L]
            swap[item_seq > 0] = torch.rand(int((item_seq > 0).sum()), device=item_seq.device) < prob
            swap = swap.unsqueeze(-1).to(inputs[0].dtype)
            text, image = inputs
            inputs = [(1 - swap) * text + swap * image, (1 - swap) * image + swap * text]
        sequences = [self.encode(x, item_seq, item_seq_len) for x in inputs]
        same = (target[:, None] == target[None, :]) & ~eye(target)
        if model.projections:
            spaces = [[project(s) for s in sequences] for project in model.projections.values()]
            nip = sum(pooled_nip(space, z, same, model.temperature) for space, z in zip(spaces, targets, strict=True))
        else:
            spaces = [sequences]
            nip = sum(pooled_nip([s], z, same, model.temperature) for s, z in zip(sequences, targets, strict=True))
        if len(sequences) == 1:
            return model.nip_weight * nip
        return model.nip_weight * nip + model.cmcl_weight * sum(cmcl(*space, model.temperature) for space in spaces)

    def scores(self, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
        model = self.model
        ids = 0.0 if model.item_embedding is None else model.item_embedding.weight  # [N, D]
        total = 0.0
        pooled = self.pooled()
        for m, (modality, tower) in enumerate(model.towers.items()):
            table = adapt(tower.adaptor, pooled[m], self.training) + ids  # [N, D]
            x = adapt(tower.adaptor, pooled[m][item_seq], self.training)  # [B, L, D]
            if model.item_embedding is not None:
                x = x + model.item_embedding.weight[item_seq]
            sequence = self.encode(x, item_seq, item_seq_len)
            if model.projections:
                sequence = model.projections[modality](sequence)
            total = total + F.normalize(sequence, dim=-1) @ F.normalize(table, dim=-1).T
        return total  # [B, N]

    def full_sort_predict(self, interaction) -> Tensor:
        scores = self.scores(interaction[self.model.ITEM_SEQ], interaction[self.model.ITEM_SEQ_LEN])
        scores[:, 0] = -torch.inf
        return scores


def padded_rows(features: nn.Module) -> tuple[Tensor, Tensor]:
    """Scaled rows of each item, padded with zeros [N, T, F], and which are real [N, T]."""
    counts, starts = features.counts.tolist(), features.starts.tolist()
    rows = features.rows.new_zeros(len(counts), max(counts), features.rows.shape[1])
    valid = torch.zeros(rows.shape[:2], dtype=torch.bool, device=rows.device)
    for item, (start, count) in enumerate(zip(starts, counts, strict=True)):
        rows[item, :count] = scaled(features, features.rows[start : start + count], slice(start, start + count))
        valid[item, :count] = True
    return rows, valid


def scaled(features: nn.Module, rows: Tensor, where: slice) -> Tensor:
    if features.row_scale is not None:
        return rows * features.row_scale[where].unsqueeze(1)
    return rows if features.std is None else (rows - features.mean) / features.std


def scaled_fallback(features: nn.Module) -> Tensor:
    return features.fallback if features.std is None else (features.fallback - features.mean) / features.std


def pool(pooling: nn.Module, rows: Tensor, valid: Tensor, fallback: Tensor) -> Tensor:
    """Attention over padded rows: [N, T, F] -> [N, F]."""
    scores = pooling.outer(pooling.inner(rows)).squeeze(-1)  # [N, T]
    weights = scores.masked_fill(~valid, -1e30).softmax(-1) * valid
    pooled = (weights.unsqueeze(-1) * rows).sum(1)
    return torch.where(valid.any(1, keepdim=True), pooled, fallback)


def adapt(adaptor: nn.Module, x: Tensor, training: bool) -> Tensor:
    """Experts one after the other: [..., F] -> [..., D]."""
    gates = (x @ adaptor.gate.weight.T).softmax(-1)  # [..., E]
    weights, biases = adaptor.project.weight.chunk(adaptor.n_experts), adaptor.project.bias.chunk(adaptor.n_experts)
    total = 0.0
    for k, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        hidden = F.dropout(x @ weight.T + bias, adaptor.dropout.p, training)
        normed = F.layer_norm(hidden, hidden.shape[-1:], adaptor.norm_weight[k], adaptor.norm_bias[k], adaptor.eps)
        total = total + gates[..., k : k + 1] * normed
    return total


def sasrec(encoder: nn.Module, x: Tensor, item_seq: Tensor, item_seq_len: Tensor, training: bool) -> Tensor:
    """At full length, of both literal models: [B, L, D] -> [B, D]."""
    length = x.shape[1]
    x = F.dropout(encoder.LayerNorm(x + encoder.position_embedding.weight[:length]), encoder.dropout.p, training)
    causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
    visible = (item_seq > 0)[:, None, None, :] & causal  # [B, 1, L, L]
    mask = torch.where(visible, 0.0, -10000.0)
    for layer in encoder.trm_encoder.layer:
        x = plain_layer(layer, x, mask, training)
    return x[torch.arange(len(x), device=x.device), item_seq_len - 1]


def plain_layer(layer: TransformerLayer, x: Tensor, mask: Tensor, training: bool) -> Tensor:
    """RecBole's Transformer layer: post-norm, [B, L, D] -> [B, L, D]."""
    attention, forward = layer.multi_head_attention, layer.feed_forward
    n_heads, size = attention.num_attention_heads, attention.attention_head_size
    q, k, v = (
        f(x).unflatten(-1, (n_heads, size)).transpose(1, 2) for f in (attention.query, attention.key, attention.value)
    )
    weights = (q @ k.transpose(-1, -2) / size**0.5 + mask).softmax(-1)  # [B, H, L, L]
    weights = F.dropout(weights, attention.attn_dropout.p, training)
    context = (weights @ v).transpose(1, 2).flatten(2)  # [B, L, D]
    x = attention.LayerNorm(F.dropout(attention.dense(context), attention.out_dropout.p, training) + x)
    inner = forward.dense_1(x)
    inner = inner * 0.5 * (1.0 + torch.erf(inner / 2**0.5))
    return forward.LayerNorm(F.dropout(forward.dense_2(inner), forward.dropout.p, training) + x)


def pooled_nip(anchors: list[Tensor], targets: Tensor, same: Tensor, temperature: float) -> Tensor:
    """Numerator and denominator summed over the anchors, as written in the formula."""
    above = below = 0.0
    for anchor in anchors:
        e = (F.normalize(anchor, dim=-1) @ F.normalize(targets, dim=-1).T / temperature).exp()  # [B, B]
        above = above + e.diagonal()
        below = below + (e * ~same).sum(1)
    return -(above / below).log().mean()


def eye(rows: Tensor) -> Tensor:
    """[B, B] bool, True where a row meets itself."""
    return torch.eye(len(rows), dtype=torch.bool, device=rows.device)


def cmcl(text: Tensor, image: Tensor, temperature: float) -> Tensor:
    """Both directions, as written in the formula."""
    text, image = F.normalize(text, dim=-1), F.normalize(image, dim=-1)
    others = ~eye(text)
    total = 0.0
    for a, b in ((text, image), (image, text)):
        across, within = (a @ b.T / temperature).exp(), (a @ a.T / temperature).exp()
        total = total - (across.diagonal() / (across.sum(1) + (within * others).sum(1))).log().mean()
    return total / 2
