"""Made-up data and three models on it, for tests and measurements: the literal release, `MMSBRReleased` and `MMSBR`.

The first two get equal parameters, so that their values and gradients can be compared.

Sessions have 2.5 items on average, the target among them; items follow a Zipf law. The release pads to the longest
session of a batch, RecBole to the longest there may be.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from benchmarks import RECBOLE_FIELDS, Settings
from benchmarks.literal_mmsbr import LiteralMMSBR
from recbole_mm.model.mmsbr import MMSBR
from recbole_mm.model.mmsbrreleased import MMSBRReleased

MAX_LENGTH = 20
MODEL_YAMLS = Path(__file__).resolve().parents[1] / "properties" / "model"
RECBOLE = {**RECBOLE_FIELDS, "MAX_ITEM_LIST_LENGTH": MAX_LENGTH}
N_PRICE_LEVELS, N_CATEGORIES = 69, 48
N_LAYERS, N_SEQUENCES, N_PIVOTS, WIDTH, N_NEGATIVES = 6, 4, 4, 64, 100
FEATURES, ENCODER_WIDTH = ("text", "image", "text_from_image", "image_from_text"), 384


# ---------------------------------------------------------------- made-up data


def skewed(n: int, size: int, power: float, rng: np.random.Generator) -> np.ndarray:
    """Ids 1..n, the k-th with a probability proportional to k^-power."""
    weights = 1 / np.arange(1, n + 1) ** power
    return 1 + rng.choice(n, size, p=weights / weights.sum())


def prices_and_categories(n_items: int) -> tuple[Tensor, Tensor]:
    """[N] each, about as uneven as in Cellphones: 467 pairs occur there, and one level has half of all items."""
    rng = np.random.default_rng(0)
    levels, categories = skewed(N_PRICE_LEVELS, n_items, 2.3, rng), skewed(N_CATEGORIES, n_items, 1.1, rng)
    return torch.from_numpy(levels), torch.from_numpy(categories)


def sessions(n: int, n_items: int, rng: np.random.Generator) -> dict[str, Tensor]:
    """Padded to the full length, as RecBole does."""
    lengths = np.minimum(rng.geometric(1 / 1.517, n), MAX_LENGTH - 1)  # without the target
    items = 1 + rng.permutation(n_items)[skewed(n_items, n * MAX_LENGTH, 0.8, rng) - 1].reshape(n, MAX_LENGTH)
    item_seq = np.where(np.arange(MAX_LENGTH) < lengths[:, None], items, 0)
    return {
        "item_id_list": torch.from_numpy(item_seq),
        "item_length": torch.from_numpy(lengths),
        "item_id": torch.from_numpy(items[:, -1].copy()),
    }


def batches_of(data: dict[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    parts = [values.split(size) for values in data.values()]
    return [dict(zip(data, batch, strict=True)) for batch in zip(*parts, strict=True)]


# ---------------------------------------------------------------- both models


class Released(nn.Module):
    """The literal model as a trainer calls it."""

    def __init__(self, literal: LiteralMMSBR) -> None:
        super().__init__()
        self.literal = literal

    def calculate_loss(self, interaction) -> Tensor:
        return self.literal.loss(*trimmed(interaction))

    def full_sort_predict(self, interaction) -> Tensor:
        scores = self.literal.scores(*trimmed(interaction)[:2])  # [B, N]
        return torch.cat([scores.new_full((len(scores), 1), -torch.inf), scores], dim=1)  # [B, 1 + N]


def trimmed(interaction) -> tuple[Tensor, Tensor, Tensor]:
    """Sessions padded to the longest of them, their lengths and targets."""
    lengths = interaction["item_length"]
    return interaction["item_id_list"][:, : lengths.max()], lengths, interaction["item_id"]


def build_literal(n_items: int, *, use_dropout: bool = True) -> LiteralMMSBR:
    torch.manual_seed(0)
    levels, categories = prices_and_categories(n_items)
    return LiteralMMSBR(
        n_items,
        int(levels.max()),  # all of them, unless items are few
        int(categories.max()),
        levels,
        categories,
        width=WIDTH,
        n_layers=N_LAYERS,
        n_sequences=N_SEQUENCES,
        n_pivots=N_PIVOTS,
        n_negatives=min(N_NEGATIVES, n_items),
        feature_dropout=0.6 if use_dropout else 0.0,
        dropout=0.2 if use_dropout else 0.0,
    )


class Column(NamedTuple):
    values: Tensor  # [1 + N]


class MadeUpDataset:
    """What a model asks of a dataset; ids with padding 0. Features are random numbers, made when asked for."""

    dataset_name, folder = "made-up", Path("made-up")

    def __init__(self, levels: Tensor, categories: Tensor, *, features: Sequence[str] = ()) -> None:
        padding = torch.zeros(1, dtype=torch.long)
        self.columns = {"price_level": torch.cat([padding, levels]), "category": torch.cat([padding, categories])}
        self.features, self.n_ids = features, 1 + len(levels)

    def num(self, field: str) -> int:
        return self.n_ids

    def item_columns(self) -> list[str]:
        return list(self.columns)

    def item_field(self, name: str) -> Column:
        return Column(self.columns[name])

    def feature_names(self) -> list[str]:
        return list(self.features)

    def feature(self, name: str) -> Tensor:
        generator = torch.Generator().manual_seed(self.features.index(name))
        return torch.randn(self.n_ids, ENCODER_WIDTH, generator=generator) * self.has_content(name).unsqueeze(1)

    def has_content(self, name: str) -> Tensor:
        return torch.arange(self.n_ids) > 0


def settings_of(*models: str, **changed) -> Settings:
    """Defaults of models, weakest first, and what RecBole has for all."""
    defaults = {key: value for model in models for key, value in _defaults(model).items()}
    return Settings({**defaults, **RECBOLE, **changed})


def _defaults(model: str) -> dict:
    return yaml.safe_load((MODEL_YAMLS / f"{model}.yaml").read_text(encoding="utf-8"))


def build_clean(n_items: int, **settings) -> MMSBR:
    """MMSBR with its defaults, text, images and their pseudo twins."""
    torch.manual_seed(0)
    dataset = MadeUpDataset(*prices_and_categories(n_items), features=FEATURES)
    return MMSBR(settings_of("MMSBR", **settings), dataset)


def build_fast(literal: LiteralMMSBR) -> MMSBRReleased:
    """Our model with the literal's settings, dropout and parameters."""
    settings = settings_of(
        "MMSBR",
        "MMSBRReleased",
        hidden_size=literal.width,
        inner_size=literal.rounds[0]["text"].widen.out_features,
        n_rounds=len(literal.rounds),
        n_heads=literal.price_attention.n_heads,
        n_sequences=len(literal.sequences_text),
        n_pivots=len(literal.pivots),
        n_negatives=literal.n_negatives,
        contrastive_weight=literal.contrastive_weight,
        contrastive_temperature=literal.temperature,
        feature_dropout=literal.sequences_text[0].dropout.p,
        pivot_dropout=literal.rounds[0]["text"].dropout.p,
        fusion_dropout=literal.fusion.dropout.p,
        price_dropout=literal.price_dropout.p,
    )
    fast = MMSBRReleased(settings, MadeUpDataset(literal.price_of_item[1:], literal.category_of_item[1:]))
    own, theirs = dict(fast.named_parameters()), in_fast_layout(dict(literal.named_parameters()))
    if own.keys() != theirs.keys():
        raise ValueError(f"only one model has {', '.join(sorted(own.keys() ^ theirs.keys()))}")
    dtype = literal.fusion.first.weight.dtype
    fast = fast.to(dtype)
    with torch.no_grad():
        for name, parameter in fast.named_parameters():
            if parameter.shape != theirs[name].shape:
                raise ValueError(f"{name} is {list(parameter.shape)} here, {list(theirs[name].shape)} there")
            parameter.copy_(theirs[name])
    return fast


def in_fast_layout(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The literal's parameters, or their gradients, by the names and in the shapes of our model's: stacked, turned,
    and with a row of zeros for padding."""

    def numbered(name: str) -> list[Tensor]:
        """Of layer 0, 1 and so on, as ``{}`` in the name."""
        found = []
        while (each := name.format(len(found))) in tensors:
            found.append(tensors[each])
        return found

    def padded(rows: Tensor) -> Tensor:
        return torch.cat([rows.new_zeros(1, *rows.shape[1:]), rows])

    def each_layer(name: str) -> list[Tensor]:
        """Rounds outside, modalities inside."""
        by_modality = [numbered(f"rounds.{{}}.{modality}.{name}") for modality in ("text", "image")]
        return [tensor for layers in zip(*by_modality, strict=True) for tensor in layers]

    def query_key_value(name: str, part: str) -> list[Tensor]:
        return [tensors[f"{name}.{role}.{part}"] for role in ("query", "key", "value")]

    made = {
        "tables.text": padded(tensors["text.weight"]),
        "tables.image": padded(tensors["image.weight"]),
        "tables.pseudo_text": padded(tensors["text_from_image.weight"]),
        "tables.pseudo_image": padded(tensors["image_from_text.weight"]),
        "pivots": padded(torch.stack(numbered("pivots.{}.weight"), dim=1)),
        "price_mean.weight": padded(tensors["price_mean.weight"]),
        "price_spread.weight": padded(tensors["price_variance.weight"]),
        "category.weight": padded(tensors["category.weight"]),
        "transformer.out_weight": torch.stack(each_layer("output.weight")),
        "interest.mean.weight": tensors["interest_mean.weight"],
    }
    for part in ("weight", "bias"):
        roles = zip(*(each_layer(f"{role}.{part}") for role in ("query", "key", "value")), strict=True)
        made[f"transformer.qkv_{part}"] = torch.stack([torch.cat(layer) for layer in roles])
        made[f"transformer.inner_{part}"] = torch.stack(each_layer(f"widen.{part}"))
        made[f"transformer.outer_{part}"] = torch.stack(each_layer(f"narrow.{part}"))
        made[f"transformer.norm_{part}"] = torch.stack(each_layer(f"norm.{part}")).unsqueeze(1)
        made[f"fusion.1.{part}"] = tensors[f"fusion.first.{part}"]
        made[f"fusion.4.{part}"] = tensors[f"fusion.second.{part}"]
        made[f"interest.item.{part}"] = tensors[f"interest_item.{part}"]
        made[f"interest.weight.{part}"] = tensors[f"interest_weight.{part}"]
        made[f"price_norm.{part}"] = tensors[f"price_norm.{part}"]
        for ours, theirs in (("mean", "mean"), ("spread", "variance")):
            attention = f"price_attention.{theirs}"
            made[f"price_attention.{ours}_qkv.{part}"] = torch.cat(query_key_value(attention, part))
            made[f"price_attention.{ours}_out.{part}"] = tensors[f"{attention}.output.{part}"]
        for modality in ("text", "image"):
            made[f"sequences.{modality}.first.{part}"] = torch.cat(numbered(f"sequences_{modality}.{{}}.first.{part}"))
    for modality in ("text", "image"):
        second = [numbered(f"sequences_{modality}.{{}}.second.{part}") for part in ("weight", "bias")]
        made[f"sequences.{modality}.second_weight"] = torch.stack(second[0]).transpose(1, 2)
        made[f"sequences.{modality}.second_bias"] = torch.stack(second[1]).unsqueeze(1)
    return made
