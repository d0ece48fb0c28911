"""MMSBR: the whole forward pass against loops in float64, laws that it keeps, and data that lack something."""

from __future__ import annotations

import itertools
import logging
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.mmsbr_models import settings_of
from dataset_prep.session_folder import add_price_levels
from recbole_mm.data.layout import write_feature
from recbole_mm.errors import DatasetError, SettingError
from recbole_mm.model.layers import Dropout
from recbole_mm.model.mmsbr import MMSBR, FeatureSequences

N_IDS, WIDTH = 13, 4
SMALL = {
    "hidden_size": WIDTH, "n_sequences": 2, "n_pivots": 2, "n_rounds": 2, "n_heads": 2, "inner_size": 3,
    "n_negatives": 3, "feature_dropout": 0.0, "pivot_dropout": 0.0, "fusion_dropout": 0.0, "price_dropout": 0.0,
}  # fmt: skip
SESSIONS = [[3, 1, 7, 2], [9], [5, 5], [4, 8]]  # items 4 and 8 have no price; item 2 has one, item 7 has not
TARGETS = [2, 3, 9, 1]
ALL_FEATURES = ("text", "image", "text_from_image", "image_from_text")


class Column(NamedTuple):
    values: Tensor


class Toys:
    """Twelve items, some without content, price or category. Eight have a price: shares of items are exact numbers."""

    dataset_name, folder = "toys", Path("dataset/toys")
    levels = [0, 1, 2, 3, 0, 1, 2, 0, 0, 3, 1, 2, 0]
    categories = [0, 1, 1, 2, 1, 0, 2, 2, 0, 2, 1, 2, 1]
    without = {"text": [3], "image": [4, 6], "text_from_image": [4, 6], "image_from_text": [3, 5]}

    def __init__(self, features=ALL_FEATURES, columns=("price_level", "category"), width_of=None) -> None:
        self.features, self.columns = list(features), list(columns)
        self.width_of = width_of or {"text": 5, "text_from_image": 5, "image": 6, "image_from_text": 6}

    def num(self, field):
        return N_IDS

    def feature_names(self):
        return self.features

    def feature(self, name):
        rows = torch.randn(N_IDS, self.width_of[name], generator=torch.Generator().manual_seed(len(name)))
        return (rows * 2 + 1).double() * self.has_content(name).unsqueeze(1)

    def has_content(self, name):
        return torch.tensor([i > 0 and i not in self.without[name] for i in range(N_IDS)])

    def item_columns(self):
        return self.columns

    def item_field(self, name):
        return Column(torch.tensor({"price_level": self.levels, "category": self.categories}[name]))


def toy_model(toys: Toys | None = None, **settings) -> MMSBR:
    """In float64, with parameters away from 0 and 1, where they could hide mistakes."""
    torch.manual_seed(0)
    model = MMSBR(settings_of("MMSBR", **{**SMALL, **settings}), toys or Toys()).double()
    for name, parameter in model.named_parameters():
        positive_mean = name == "fusion.0.bias" or ("norm" in name and "weight" in name)  # no ReLU is dead
        nn.init.normal_(parameter, mean=float(positive_mean), std=0.5)
    return model


def padded(sessions=SESSIONS, length: int = 6) -> tuple[Tensor, Tensor]:
    item_seq = torch.tensor([session + [0] * (length - len(session)) for session in sessions])
    return item_seq, torch.tensor([len(session) for session in sessions])


def batch(sessions=SESSIONS, targets=TARGETS) -> dict[str, Tensor]:
    item_seq, item_seq_len = padded(sessions)
    return {"item_id_list": item_seq, "item_length": item_seq_len, "item_id": torch.tensor(targets)}


def scores_of(model: MMSBR, sessions=SESSIONS) -> Tensor:
    """Without padding, [B, N]."""
    return model.scores(model.item_tower(), *padded(sessions))[:, 1:]


def contrast_of(model: MMSBR) -> Tensor:
    """The contrastive loss without its weight."""
    (loss,) = model.auxiliary_losses(model.item_tower(), None)
    return loss / model.contrastive_weight


def total(losses) -> Tensor:
    return sum(losses) if isinstance(losses, tuple) else losses


def gradients(model: nn.Module, value: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    value.backward(retain_graph=True)
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    return found


# ---------------------------------------------------------------- the oracle: one item, token and session at a time


def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    mean = x.sum() / len(x)
    return (x - mean) / (((x - mean) ** 2).sum() / len(x) + eps).sqrt() * weight + bias


def softmax(values: list[Tensor]) -> list[Tensor]:
    below = sum(value.exp() for value in values)
    return [value.exp() / below for value in values]


def positive(x: Tensor) -> Tensor:
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


def parts_of(x: Tensor, n_parts: int) -> list[Tensor]:
    return list(x.split(len(x) // n_parts))


class Oracle:
    """What MMSBR computes with its parameters, for a dataset, written once more."""

    def __init__(self, model: MMSBR, dataset: Toys, **settings) -> None:
        self.p, self.dataset = dict(model.named_parameters()), dataset
        self.s = settings_of("MMSBR", **{**SMALL, **settings})
        used = [m for m in ("text", "image") if self.s[f"use_{m}"] and m in dataset.features]
        self.pseudo = {"text": "text_from_image", "image": "image_from_text"}
        self.modalities = used

    def linear(self, name: str, x: Tensor) -> Tensor:
        bias = self.p.get(f"{name}.bias")
        return self.p[f"{name}.weight"] @ x + (0 if bias is None else bias)

    # ------------------------------------------------ items

    def projected(self, modality: str, feature: str) -> list[Tensor]:
        """Of every item, [D]; zeros stand for an item without content, and go through the map like others."""
        rows, there = self.dataset.feature(feature), self.dataset.has_content(feature).tolist()
        own = [row for row, has in zip(rows, there, strict=True) if has]
        mean = sum(own) / len(own)
        deviation = (sum((row - mean) ** 2 for row in own) / len(own)).sqrt()
        made = {
            "none": lambda row: row,
            "unit": lambda row: row / row.norm(),
            "sqrt_dim": lambda row: row / row.norm() * math.sqrt(len(row)),
            "standardize": lambda row: (row - mean) / deviation,
        }[self.s["feature_scale"]]
        twin = f"projections.pseudo_{modality}"
        name = twin if feature != modality and f"{twin}.weight" in self.p else f"projections.{modality}"
        return [
            self.linear(name, made(row) if has else torch.zeros_like(row)) for row, has in zip(rows, there, strict=True)
        ]

    def sequence(self, modality: str, x: Tensor) -> list[Tensor]:
        """F vectors of one feature."""
        name, found = f"sequences.{modality}", []
        for f in range(self.s["n_sequences"]):
            rows = slice(f * WIDTH, (f + 1) * WIDTH)
            hidden = torch.tanh(self.p[f"{name}.first.weight"][rows] @ x + self.p[f"{name}.first.bias"][rows])
            second = self.p[f"{name}.second_weight"][f].T @ hidden + self.p[f"{name}.second_bias"][f, 0]
            found.append(torch.tanh(second))
        return found

    def layer(self, number: int, tokens: list[Tensor]) -> list[Tensor]:
        """Of the pivot transformer: each token attends to all."""
        p = {name.removeprefix("transformer."): value[number] for name, value in self.p.items() if "transf" in name}
        n_heads = self.s["n_heads"]
        qkv = [parts_of(p["qkv_weight"] @ token + p["qkv_bias"], 3) for token in tokens]
        q, k, v = ([parts_of(each[role], n_heads) for each in qkv] for role in range(3))  # [token][head]
        out = []
        for i, token in enumerate(tokens):
            context = []
            for h in range(n_heads):
                weights = softmax([q[i][h] @ k[j][h] / math.sqrt(WIDTH / n_heads) for j in range(len(tokens))])
                context.append(sum(weight * v[j][h] for j, weight in enumerate(weights)))
            middle = norm(token + p["out_weight"] @ torch.cat(context), p["norm_weight"][0], p["norm_bias"][0])
            hidden = (p["inner_weight"] @ middle + p["inner_bias"]).clamp(min=0)
            last = middle + p["outer_weight"] @ hidden + p["outer_bias"]
            out.append(norm(last, p["norm_weight"][1], p["norm_bias"][1]))
        return out

    def pivots_of(self, item: int, sequences: list[list[Tensor]]) -> list[Tensor]:
        pivots, layers = list(self.p["pivots"]), itertools.count()
        if self.s["pivots"] == "per_item":
            offsets = parts_of(self.p["pivot_offsets.weight"][item], len(pivots))
            pivots = [pivot + offset for pivot, offset in zip(pivots, offsets, strict=True)]
        for _ in range(self.s["n_rounds"]):
            for m, sequence in enumerate(sequences):
                out = self.layer(next(layers), pivots + sequence)
                sequences[m] = [new + old for new, old in zip(out[len(pivots) :], sequence, strict=True)]
                pivots = [(new + old) / 2 for new, old in zip(out, pivots, strict=False)]
        return pivots

    def items(self) -> list[Tensor]:
        projected = [self.projected(modality, modality) for modality in self.modalities]
        return [self.item(i, [features[i] for features in projected]) for i in range(N_IDS)]

    def item(self, number: int, features: list[Tensor]) -> Tensor:
        sequences = [self.sequence(m, x) for m, x in zip(self.modalities, features, strict=True)]
        if self.s["pivots"] == "none":
            parts = [sum(sequence) / len(sequence) for sequence in sequences]
        else:
            parts = self.pivots_of(number, sequences)
        hidden = self.linear("fusion.0", torch.cat(parts)).clamp(min=0)
        return norm(self.linear("fusion.3", hidden), self.p["fusion.5.weight"], self.p["fusion.5.bias"])

    # ------------------------------------------------ sessions

    def interest(self, items: list[Tensor], session: list[int]) -> list[Tensor]:
        """In every item."""
        rows = [items[i] for i in session]
        mean = sum(rows) / len(rows)
        attended = 0.0
        for t, row in enumerate(rows):
            inside = self.linear("interest.item", row) + self.linear("interest.mean", mean)
            if self.s["positions"] != "none":
                place = t if self.s["positions"] == "forward" else len(rows) - 1 - t
                inside = inside + self.p["interest.position.weight"][place]
            attended = attended + self.linear("interest.weight", torch.sigmoid(inside)) * row
        wanted = self.linear("next_item", attended) / math.sqrt(WIDTH)
        return [item @ wanted for item in items]

    # ------------------------------------------------ prices

    def level_and_category(self, item: int) -> tuple[int, int]:
        return self.dataset.levels[item], self.dataset.categories[item] if "category" in self.dataset.columns else 0

    def price(self, item: int) -> tuple[Tensor, Tensor]:
        """Mean, and the number behind the variance."""
        (level, category), p = self.level_and_category(item), self.p
        row, name = p["price_embedding.category.weight"][category], "price_embedding"
        mean = norm(p[f"{name}.mean.weight"][level] + row, p[f"{name}.mean_norm.weight"], p[f"{name}.mean_norm.bias"])
        spread = p[f"{name}.spread.weight"][level] + row
        return mean, norm(spread, p[f"{name}.spread_norm.weight"], p[f"{name}.spread_norm.bias"])

    def session_price(self, session: list[int]) -> tuple[Tensor, Tensor]:
        """Mean and variance; keys are the items with a price, or all items where none has one."""
        keys = [i for i in session if self.dataset.levels[i]] or session
        n_heads, size = self.s["n_heads"], WIDTH // self.s["n_heads"]
        own_mean, own_spread = self.price(session[-1])

        def maps(item):
            mean, spread = self.price(item)
            means = parts_of(self.linear("price_attention.mean_qkv", mean), 3)
            variances = [positive(x) for x in parts_of(self.linear("price_attention.spread_qkv", positive(spread)), 3)]
            return [[parts_of(x, n_heads) for x in each] for each in (means, variances)]  # [kind][role][head]

        query, others = maps(session[-1]), [maps(item) for item in keys]
        new_mean, new_spread = [], []
        for h in range(n_heads):
            weights = softmax(
                [
                    -self.distance((query[0][0][h], query[1][0][h]), (other[0][1][h], other[1][1][h])) / math.sqrt(size)
                    for other in others
                ]
            )
            new_mean.append(sum(w * other[0][2][h] for w, other in zip(weights, others, strict=True)))
            new_spread.append(sum(w * w * other[1][2][h] for w, other in zip(weights, others, strict=True)))
        name, p = "price_attention", self.p
        mean = self.linear(f"{name}.mean_out", torch.cat(new_mean)) + own_mean
        spread = self.linear(f"{name}.spread_out", torch.cat(new_spread)) + own_spread
        mean = norm(mean, p[f"{name}.mean_norm.weight"], p[f"{name}.mean_norm.bias"])
        return mean, positive(norm(spread, p[f"{name}.spread_norm.weight"], p[f"{name}.spread_norm.bias"]))

    @staticmethod
    def distance(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
        return ((a[0] - b[0]) ** 2).sum() + ((a[1].sqrt() - b[1].sqrt()) ** 2).sum()

    def distances(self, session: list[int]) -> list[Tensor]:
        """Of every item's price from the session's; an item without price is an average one."""
        if not any(self.dataset.levels[i] for i in session):
            return [torch.zeros((), dtype=torch.double)] * N_IDS
        own, known = self.session_price(session), [i for i in range(1, N_IDS) if self.dataset.levels[i]]
        found = {}
        for item in known:
            mean, spread = self.price(item)
            found[item] = self.distance((mean, positive(spread)), own) / (2 * WIDTH)
        average = sum(found.values()) / len(known)
        return [found.get(item, average) for item in range(N_IDS)]

    # ------------------------------------------------ scores and losses

    def score(self, interest: Tensor, distance: Tensor) -> Tensor:
        weighted = torch.log(1 + torch.exp(self.p["price_weight"])) * distance
        return {
            "minus": interest - weighted,
            "product_exp": interest * torch.exp(-weighted),
            "product_plus": interest * (1 + weighted),
        }[self.s["price_score"]]

    def scores(self, sessions=SESSIONS) -> Tensor:
        """Without padding, [B, N]."""
        items, rows = self.items(), []
        for session in sessions:
            row = self.interest(items, session)
            if "price_weight" in self.p:
                row = [self.score(*pair) for pair in zip(row, self.distances(session), strict=True)]
            rows.append(torch.stack(row[1:]))
        return torch.stack(rows)

    def contrast(self) -> Tensor:
        """Sum over the modalities."""
        loss = torch.zeros((), dtype=torch.double)
        for modality in self.modalities:
            twin = self.pseudo[modality]
            if twin not in self.dataset.features:
                continue
            there = (self.dataset.has_content(modality) & self.dataset.has_content(twin)).nonzero().flatten().tolist()
            real, made = self.projected(modality, modality), self.projected(modality, twin)
            terms = []
            for i in there:
                cosine = {j: real[i] @ made[j] / real[i].norm() / made[j].norm() for j in there}
                own = cosine.pop(i)
                hardest = sorted(cosine.values(), key=Tensor.item)[-self.s["n_negatives"] :]
                logits = [value / self.s["contrastive_temperature"] for value in (own, *hardest)]
                terms.append(sum(logit.exp() for logit in logits).log() - logits[0])
            loss = loss + sum(terms) / len(terms)
        return loss

    def losses(self) -> tuple[Tensor, Tensor]:
        scores = self.scores()
        rows = [row.exp().sum().log() - row[target - 1] for row, target in zip(scores, TARGETS, strict=True)]
        return sum(rows) / len(rows), self.s["contrastive_weight"] * self.contrast()


VARIANTS = [
    pytest.param({}, id="default"),
    pytest.param({"pivots": "per_item", "n_rounds": 1}, id="per_item"),
    pytest.param({"pivots": "none", "positions": "forward"}, id="none-forward"),
    pytest.param({"pivots": "none", "positions": "reversed", "feature_scale": "unit"}, id="none-reversed-unit"),
    pytest.param({"use_image": False, "feature_scale": "sqrt_dim"}, id="text-sqrt_dim"),
    pytest.param({"use_text": False, "feature_scale": "none", "price_score": "product_exp"}, id="image-none-exp"),
    pytest.param({"pivots": "none", "price_score": "product_plus"}, id="none-plus"),
    pytest.param({"pivots": "none", "use_price": False, "n_negatives": 50}, id="none-unpriced"),
]


@pytest.mark.parametrize("settings", VARIANTS)
def test_scores_losses_and_gradients_equal_loops(settings):
    dataset = Toys()
    model = toy_model(dataset, **settings)
    oracle = Oracle(model, dataset, **settings)
    actual, expected = model.calculate_loss(batch()), oracle.losses()
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(gradients(model, one), gradients(model, other), rtol=1e-7, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(scores_of(model.eval()), oracle.scores(), rtol=1e-9, atol=1e-9)


def test_the_default_score_has_a_gradient_in_every_parameter():
    found = gradients(model := toy_model(), total(model.calculate_loss(batch())))
    assert [name for name, gradient in found.items() if not gradient.any()] == []


def test_a_pseudo_modality_of_another_width_has_a_map_of_its_own():
    dataset = Toys(width_of={"text": 5, "text_from_image": 3, "image": 6, "image_from_text": 6})
    model = toy_model(dataset)
    assert set(model.projections) == {"text", "pseudo_text", "image"}
    torch.testing.assert_close(contrast_of(model), Oracle(model, dataset).contrast())


def test_without_categories_levels_are_compared_alone():
    dataset = Toys(columns=["price_level"])
    model = toy_model(dataset)
    with torch.no_grad():
        torch.testing.assert_close(scores_of(model), Oracle(model, dataset).scores())


# ---------------------------------------------------------------- features


def test_features_are_those_of_the_folder_and_are_not_trained(planted, built):
    *_, dataset, train, _, _, model = built("MMSBR", planted, feature_scale="none")
    for name in ("text", "image"):
        table = dict(model.named_buffers())[f"{name}_table"]
        torch.testing.assert_close(table, dataset.feature(name), rtol=0, atol=0)
        assert table[1:].abs().sum(1).min() > 0 and not table.requires_grad
    before = model.text_table.clone()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    total(model.calculate_loss(next(iter(train)))).backward()
    optimizer.step()
    assert torch.equal(model.text_table, before)
    assert not any("table" in name for name in model.state_dict())


def test_features_are_standardised_over_the_items_that_have_content():
    model = toy_model()
    own = model.image_table[model.image_there]
    torch.testing.assert_close(own.mean(0), torch.zeros(6).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(own.std(0, correction=0), torch.ones(6).double())
    assert model.image_there.tolist() == Toys().has_content("image").tolist()
    assert not model.image_table[~model.image_there].any()


def test_a_feature_changes_the_scores():
    model = toy_model()
    before = scores_of(model)
    model.text_table[5] += 1.0
    changed = (scores_of(model) - before).abs()
    assert changed[0, 4] > 1e-6 and changed[0].gt(1e-9).sum() == 1  # session 1 has no item 5


# ---------------------------------------------------------------- sessions


@pytest.mark.parametrize("settings", [{}, {"positions": "reversed"}, {"positions": "forward", "pivots": "none"}])
def test_scores_depend_neither_on_padding_nor_on_batch_mates(settings):
    model = toy_model(**settings).eval()
    together = scores_of(model)
    for session, expected in zip(SESSIONS, together, strict=True):
        for length in (len(session), 20):
            alone = model.scores(model.item_tower(), *padded([session], length))[0, 1:]
            torch.testing.assert_close(alone, expected)


def test_the_order_of_a_session_matters_only_through_the_last_item_s_price():
    one, same, other = [3, 1, 5, 2], [1, 5, 3, 2], [3, 1, 2, 5]
    scores = scores_of(toy_model(), [one, same, other])
    torch.testing.assert_close(scores[0], scores[1])
    assert (scores[0] - scores[2]).abs().max() > 1e-6
    scores = scores_of(toy_model(use_price=False), [one, same, other])
    torch.testing.assert_close(scores[1:], scores[:1].expand(2, -1))


@pytest.mark.parametrize("positions", ["forward", "reversed"])
def test_with_positions_the_order_matters(positions):
    scores = scores_of(toy_model(positions=positions, use_price=False), [[3, 1, 5, 2], [1, 3, 5, 2]])
    assert (scores[0] - scores[1]).abs().max() > 1e-6


@pytest.mark.parametrize(("positions", "changed"), [("forward", [True, True]), ("reversed", [False, True])])
def test_places_are_counted_from_the_first_item_or_from_the_last(positions, changed):
    sessions = [[2], [3, 1, 5, 2]]
    model = toy_model(positions=positions, use_price=False)
    before = scores_of(model, sessions)
    with torch.no_grad():
        model.interest.position.weight[{"forward": 0, "reversed": 3}[positions]] += 1  # of item 3
    assert ((scores_of(model, sessions) - before).abs().amax(1) > 1e-9).tolist() == changed


# ---------------------------------------------------------------- prices


def test_a_larger_price_distance_lowers_the_score():
    dataset = Toys()
    model = toy_model(dataset)
    distance = torch.stack(Oracle(model, dataset).distances(SESSIONS[0]))[1:]
    scores = scores_of(model)[0]
    model.has_prices = False
    loss = (scores_of(model)[0] - scores)[distance.argsort()]
    assert (distance.unique().diff() > 1e-6).sum() >= 4 and (loss > 0).all()
    assert (loss.diff() > -1e-12).all() and loss[-1] > loss[0] + 1e-3


@pytest.mark.parametrize(("price_score", "sign"), [("minus", -1), ("product_exp", -1), ("product_plus", 1)])
def test_the_sign_of_a_price_distance(price_score, sign):
    model = toy_model(price_score=price_score)
    interest, near, far = (torch.full((1, 1), value).double() for value in (2.0, 0.5, 0.7))
    assert torch.sign(model._with_price(interest, far) - model._with_price(interest, near)).item() == sign


def test_an_item_without_price_is_no_key_and_scores_as_the_average_price():
    model = toy_model()
    without, changed = scores_of(model, [[3, 2], [3, 7, 2]]), scores_of(model, [[3, 4, 2]])
    model.has_prices = False
    interest = scores_of(model, [[3, 2], [3, 7, 2], [3, 4, 2]])
    lost = interest - torch.cat([without, changed])
    torch.testing.assert_close(lost[1:], lost[:1].expand(2, -1))
    unknown = [item - 1 for item in (4, 7, 8, 12)]
    known = [item - 1 for item in range(1, N_IDS) if Toys.levels[item]]
    torch.testing.assert_close(lost[0, unknown], lost[0, known].mean().expand(4))


def test_a_session_without_any_price_is_as_far_from_all_prices():
    model = toy_model()
    scores = scores_of(model, [[4, 8]])
    model.has_prices = False
    torch.testing.assert_close(scores, scores_of(model, [[4, 8]]))


# ---------------------------------------------------------------- unseen items


def test_no_parameter_belongs_to_an_item_where_pivots_are_shared():
    shared, own = toy_model(), toy_model(pivots="per_item")
    assert not any(N_IDS in parameter.shape for parameter in shared.parameters())
    assert {name for name, p in own.named_parameters() if N_IDS in p.shape} == {"pivot_offsets.weight"}


def test_items_with_equal_content_and_price_have_equal_scores():
    class Twins(Toys):
        def feature(self, name):
            rows = super().feature(name)
            rows[9] = rows[1]
            return rows

        levels = [*Toys.levels[:9], Toys.levels[1], *Toys.levels[10:]]
        categories = [*Toys.categories[:9], Toys.categories[1], *Toys.categories[10:]]

    scores = scores_of(toy_model(Twins()))
    torch.testing.assert_close(scores[:, 8], scores[:, 0])
    assert (scores[:, 7] - scores[:, 0]).abs().max() > 1e-6


def test_offsets_that_are_zero_change_nothing():
    torch.manual_seed(0)
    own = MMSBR(settings_of("MMSBR", **SMALL, pivots="per_item"), Toys()).double()
    assert not own.pivot_offsets.weight.any()
    shared = toy_model()
    shared.load_state_dict({name: value for name, value in own.state_dict().items() if "offsets" not in name})
    torch.testing.assert_close(scores_of(own), scores_of(shared))


def unseen(folder: Path) -> Path:
    """Item z, its price level and category are in no training row, only in tests'."""
    lines = (folder / f"{folder.name}.test.inter").read_text().splitlines()
    head, rows = lines[0], [line.split("\t") for line in lines[1:]]
    rows[0][1], rows[1][2] = "z", "z"
    (folder / f"{folder.name}.test.inter").write_text("\n".join([head, *("\t".join(row) for row in rows)]) + "\n")
    items = ["item_id:token\tprice_level:token\tcategory:token", *(f"i{n}\t{1 + n % 3}\tc{n % 2}" for n in range(30))]
    (folder / f"{folder.name}.item").write_text("\n".join([*items, "z\t9\tc9"]) + "\n")
    for name in ("text", "image"):
        rows = np.random.default_rng(0).normal(size=(31, 12)).astype(np.float32)
        tokens = [*(f"i{n}" for n in range(30)), "z"]
        write_feature(folder, name, tokens=tokens, rows=rows, encoder="planted", source="group")
    return folder


def test_a_session_of_unseen_items_and_prices_has_finite_scores(splits, built):
    """And what is not seen is learnt as what is not bought: its price is scored in every step."""
    _, dataset, train, _, test, model = built("MMSBR", unseen(splits))
    z = dataset.token2id("item_id", "z")
    assert model.pair_of_item[z] not in model.pair_of_item[train._dataset.inter_feat["item_id"]]
    total(model.calculate_loss(next(iter(train)))).backward()
    level = int(model.price_pairs[0, model.pair_of_item[z]])
    assert model.price_embedding.mean.weight.grad[level].any()
    interaction = next(iter(test))[0]
    alone = (interaction["item_id_list"] == z).any(1) & (interaction["item_length"] == 1)
    assert alone.sum() == 1 and (interaction["item_id"] == z).any()
    with torch.no_grad():
        assert model.eval().full_sort_predict(interaction)[:, 1:].isfinite().all()


# ---------------------------------------------------------------- the tower in chunks


@pytest.mark.parametrize("pivots", ["shared", "per_item", "none"])
@pytest.mark.parametrize("chunk", [1, 4, 99])
def test_a_tower_in_chunks_has_the_same_loss_and_gradients(chunk, pivots):
    results = []
    for tower_chunk in (0, chunk):
        model = toy_model(pivots=pivots, tower_chunk=tower_chunk).train()
        loss = total(model.calculate_loss(batch()))
        results.append((loss.detach(), gradients(model, loss)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-12)


def test_chunks_draw_dropout_in_forward_and_backward_alike():
    """Central differences, at one seed, along the gradient: they would not agree with other masks in backward."""
    model = toy_model(tower_chunk=4, feature_dropout=0.3, fusion_dropout=0.3, pivot_dropout=0.3).train()

    def loss():
        torch.manual_seed(5)
        return total(model.calculate_loss(batch()))

    found = gradients(model, loss())
    length = sum(gradient.square().sum() for gradient in found.values()).sqrt()
    values = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter += step * found[name] / length
        values.append(loss().item())
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(length.item(), rel=1e-4)


# ---------------------------------------------------------------- what is missing, and ablations


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Toys(["image", "image_from_text"]), "toys has no feature text: MMSBR runs without"),
        (Toys(["text", "text_from_image"]), "toys has no feature image: MMSBR runs without"),
        (Toys(["text", "image", "image_from_text"]), "toys has no feature text_from_image: MMSBR runs without"),
        (Toys(["text", "image"]), "toys has no feature text_from_image, image_from_text: MMSBR runs without"),
        (Toys(columns=["price_level"]), "toys.item has no category: MMSBR runs without"),
        (Toys(columns=["category"]), "make levels with: python -m dataset_prep prices --dataset dataset/toys"),
        (Toys(columns=[]), "toys.item has no price_level: MMSBR runs without prices"),
    ],
    ids=["text", "image", "pseudo-text", "both-pseudo", "category", "price_level", "columns"],
)
def test_what_is_missing_is_said_and_done_without(dataset, message, caplog):
    with caplog.at_level(logging.WARNING):
        model = toy_model(dataset, dataset="toys")
    assert message in caplog.text and len(caplog.records) == 1
    loss = total(model.calculate_loss(batch()))
    loss.backward()
    assert loss.isfinite() and all(parameter.grad is not None for parameter in model.parameters())


def test_prices_are_embedded_once_in_a_step_and_once_in_an_evaluation():
    model, calls = toy_model(), []
    model.price_embedding.register_forward_hook(lambda *args: calls.append(1))
    model.calculate_loss(batch())
    assert len(calls) == 1
    model.eval()
    with torch.no_grad():
        model.full_sort_predict(batch())
        model.full_sort_predict(batch())
    assert len(calls) == 2


def test_prices_that_no_item_has_are_missing_prices(caplog):
    class Unpriced(Toys):
        levels = [0] * N_IDS

    model = toy_model(Unpriced())
    assert not model.has_prices and "toys.item has no price_level" in caplog.text


def test_nothing_is_said_where_nothing_is_missing_or_wanted(caplog):
    with caplog.at_level(logging.INFO):
        toy_model()
        toy_model(Toys(["text"], columns=[]), use_image=False, use_price=False, contrastive_weight=0.0)
    assert caplog.text == ""


def test_without_text_and_image_the_folder_is_refused():
    with pytest.raises(
        DatasetError, match=r"toys has neither feature 'text' nor 'image', only \['vibes'\]\n.*--text_f"
    ):
        toy_model(Toys(["vibes"]), dataset="toys")
    with pytest.raises(DatasetError, match=r"toys has no feature 'image', only \['text'\]"):
        toy_model(Toys(["text"]), dataset="toys", use_text=False)


def test_no_modality_at_all_is_refused():
    with pytest.raises(SettingError, match="use_text and use_image are both false"):
        toy_model(use_text=False, use_image=False)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_text": False}, {"use_image": False}, {"use_price": False}, {"contrastive_weight": 0.0},
        {"pivots": "none"}, {"price_score": "none"}, {"pivots": "none", "use_image": False, "use_price": False},
    ],
    ids=lambda settings: "-".join(settings),
)  # fmt: skip
def test_ablations_leave_no_parameter_without_a_gradient(settings):
    model = toy_model(**settings)
    losses = model.calculate_loss(batch())
    assert isinstance(losses, tuple) == (settings.get("contrastive_weight") != 0.0)
    found = gradients(model, total(losses))
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert [name for name, gradient in found.items() if not gradient.any()] == []
    gone = {"use_text": "text", "use_image": "image", "pivots": "pivot", "use_price": "price", "price_score": "price"}
    assert [name for name in found for key in settings if gone.get(key, "nothing") in name] == []


def test_empty_modalities_are_refused_or_constant(planted, built):
    """All items of a feature without content: other items have it."""
    rows = np.ones((1, 12), dtype=np.float32)
    write_feature(planted, "text", tokens=["elsewhere"], rows=rows, encoder="planted", source="group")
    with pytest.raises(DatasetError, match="feature 'text' of planted lacks 30 of 30 items"):
        built("MMSBR", planted)
    *_, train, _, _, model = built("MMSBR", planted, missing_features="zero")
    assert not model.text_table.any() and model.projections["text"].bias is not None
    assert total(model.calculate_loss(next(iter(train)))).isfinite()
    before = model.item_tower().vectors
    assert (before[1:] - before[1]).abs().max() > 1e-4  # the images tell items apart


def test_a_pseudo_modality_of_other_items_gives_no_loss():
    class Apart(Toys):
        without = {**Toys.without, "text": [1, 2, 3, 4, 5], "text_from_image": [*range(6, N_IDS)]}

    model = toy_model(Apart(["text", "image", "text_from_image"]))
    contrast = model.calculate_loss(batch())[1]
    assert contrast == 0 and not gradients(model, contrast)["projections.text.weight"].any()


# ---------------------------------------------------------------- the contrastive loss


@pytest.mark.parametrize("n_negatives", [7, 8, 100])  # of 9 and 8 items
def test_more_negatives_than_items_are_all_items(n_negatives):
    dataset = Toys()
    model = toy_model(dataset, n_negatives=n_negatives)
    expected = Oracle(model, dataset, n_negatives=n_negatives).contrast()
    torch.testing.assert_close(contrast_of(model), expected)


def test_one_item_with_both_has_nothing_to_learn_from():
    class One(Toys):
        without = {**Toys.without, "text": [*range(2, N_IDS)]}

    model = toy_model(One(["text", "text_from_image"]))
    contrast = model.calculate_loss(batch())[1]
    assert contrast == 0 and not gradients(model, contrast)["projections.text.weight"].any()


def test_a_sample_of_anchors_has_the_loss_of_all_on_average(monkeypatch):
    model = toy_model(contrastive_anchors=1)
    items = model.item_tower()
    n_items = int((model.text_there & model.pseudo_text_there).sum())
    other = int((model.image_there & model.pseudo_image_there).sum())
    losses = []
    for anchors in itertools.product(range(n_items), range(other)):  # each pair of anchors once
        draws = iter(anchors)
        monkeypatch.setattr(torch, "randperm", lambda n, device, draws=draws: torch.tensor([next(draws)]))
        losses += model.auxiliary_losses(items, None)
        assert next(draws, None) is None
    model.n_anchors = 0
    torch.testing.assert_close(sum(losses) / len(losses), *model.auxiliary_losses(items, None))


@pytest.mark.parametrize("n_anchors", [3, 8, 100])
def test_anchors_are_drawn_without_repetition_and_at_most_all(n_anchors, monkeypatch):
    from recbole_mm.model import mmsbr

    seen = []
    monkeypatch.setattr(
        mmsbr, "hard_negative_loss", lambda a, c, own, **_: seen.append((len(a), len(c), own.tolist())) or a.sum()
    )
    model = toy_model(contrastive_anchors=n_anchors)
    model.calculate_loss(batch())
    for (n, n_candidates, own), n_there in zip(seen, (9, 8), strict=True):
        assert n_candidates == n_there and n == len(own) == len(set(own)) == min(n_anchors, n_there)


def test_pseudo_modalities_are_projected_in_training_alone():
    model = toy_model()
    assert model.train().item_tower().projected.keys() == {"text", "image", "pseudo_text", "pseudo_image"}
    assert model.eval().item_tower().projected.keys() == {"text", "image"}


# ---------------------------------------------------------------- runs


def test_batches_of_one_session_of_one_item_work():
    model = toy_model()
    interaction = batch([[7]], [3])
    assert total(model.calculate_loss(interaction)).isfinite()
    assert model.eval().full_sort_predict(interaction)[:, 1:].isfinite().all()
    torch.testing.assert_close(model.predict(interaction), model.full_sort_predict(interaction)[:, 3])


def test_dropout_acts_in_every_epoch(planted, monkeypatch):
    from recbole_mm.quick_start import run

    modes, calculate_loss = [], MMSBR.calculate_loss

    def noting(self, interaction):
        modes.append(all(module.training for module in self.modules()))
        return calculate_loss(self, interaction)

    monkeypatch.setattr(MMSBR, "calculate_loss", noting)
    settings = {
        "epochs": 2, "hidden_size": 8, "inner_size": 8, "MAX_ITEM_LIST_LENGTH": 10, "topk": [10],
        "valid_metric": "Recall@10", "use_gpu": False, "show_progress": False,
    }  # fmt: skip
    run("MMSBR", str(planted), settings=settings, runs_file=None)
    assert modes == [True, True]


def test_each_rate_of_dropout_acts_in_training_alone():
    for name in ("feature_dropout", "pivot_dropout", "fusion_dropout", "price_dropout"):
        model = toy_model(**{name: 0.4})
        with torch.no_grad():
            one, other = (total(model.train().calculate_loss(batch())) for _ in range(2))
            assert (one - other).abs() > 1e-6, name
            torch.testing.assert_close(scores_of(model.eval()), scores_of(model), rtol=0, atol=0)


def test_prices_of_a_folder_join_the_contract(planted, built):
    add_price_levels(planted)
    *_, train, valid, _, model = built("MMSBR", planted)
    total(model.calculate_loss(next(iter(train)))).backward()
    assert model.has_prices and [name for name, p in model.named_parameters() if p.grad is None] == []
    model.eval()
    interaction = next(iter(valid))[0]
    before, state = model.full_sort_predict(interaction), {n: v.clone() for n, v in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.load_state_dict(state)
    torch.testing.assert_close(model.full_sort_predict(interaction), before)


def test_interest_of_a_free_pair_of_widths_is_checked():
    with pytest.raises(ValueError, match=r"n_heads \(3\) must divide width \(4\)"):
        toy_model(n_heads=3)


def test_the_weights_start_as_usual():
    torch.manual_seed(0)
    model = MMSBR(settings_of("MMSBR"), Toys())
    for name, parameter in model.named_parameters():
        if "norm" in name or name == "fusion.5.weight":
            assert (parameter == float("weight" in name)).all(), name
        elif "bias" in name:
            assert not parameter.any(), name
        elif name == "pivots" or "price_embedding" in name:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.2), name
        elif parameter.dim() > 1:
            *_, out, into = parameter.shape
            if name.endswith("first.weight"):
                out //= 4
            assert parameter.abs().max() <= math.sqrt(6 / (out + into)) and parameter.std() > 0.01, name
    assert F.softplus(model.price_weight).item() == pytest.approx(math.log(2))


def test_the_loss_outside_training_has_the_contrastive_term_too(built, planted):
    from dataset_prep.pseudo import make_pseudo_feature

    make_pseudo_feature(planted, "image_from_text")
    _, _, train, _, _, model = built("MMSBR", planted)
    with torch.no_grad():
        _, contrastive = model.eval().calculate_loss(next(iter(train)))
    assert contrastive.isfinite() and contrastive > 0


# ---------------------------------------------------------------- generated features have a backward pass of their own


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("rate", [0.0, 0.4])
@pytest.mark.parametrize("n_items", [0, 1, 7])
def test_sequences_equal_two_maps_with_dropout_in_value_gradient_and_random_numbers(n_items, rate, training):
    torch.manual_seed(0)
    made = FeatureSequences(width=WIDTH, n_sequences=3, dropout=rate).double().train(training)
    nn.init.normal_(made.first.bias)
    nn.init.normal_(made.second_bias)
    x = torch.randn(n_items, WIDTH, dtype=torch.double, requires_grad=True)
    direction = torch.randn(n_items, 3, WIDTH, dtype=torch.double)

    def literal(x):
        dropout = Dropout(rate).train(training)
        hidden = dropout((x @ made.first.weight.T + made.first.bias).tanh())
        networks = zip(hidden.split(WIDTH, dim=1), made.second_weight, made.second_bias, strict=True)
        outs = [part @ weight + bias for part, weight, bias in networks]
        return dropout(torch.stack(outs).tanh()).transpose(0, 1)

    found = []
    for run in (made, literal):
        torch.manual_seed(5)
        result = run(x)
        gradients = torch.autograd.grad((result * direction).sum(), [x, *made.parameters()])
        found.append((result, gradients, torch.rand(1)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-14)
    with torch.no_grad():
        torch.manual_seed(5)
        torch.testing.assert_close(made(x), found[0][0], rtol=1e-12, atol=1e-14)


def test_sequences_of_frozen_features_ask_for_no_gradient_of_them():
    made = FeatureSequences(width=WIDTH, n_sequences=2, dropout=0.1)
    made(torch.randn(5, WIDTH)).sum().backward()
    assert all(parameter.grad is not None for parameter in made.parameters())
