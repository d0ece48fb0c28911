"""Each defect of the released MSM4SR against loops in float64, then all of them together against the literal model."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
import yaml
from test_msm4sr import (
    MODEL_YAML,
    N_ITEMS,
    NO_DROPOUT,
    RECBOLE,
    SMALL,
    VARIANTS,
    Toys,
    Vectors,
    batch,
    gradients,
    total,
)
from torch import nn

from benchmarks import Settings, literal_msm4sr
from benchmarks.literal_msm4sr import LiteralMSM4SR
from recbole_mm.model.layers import FeatureRows, drop_items
from recbole_mm.model.msm4sr import MSM4SR
from recbole_mm.model.msm4srreleased import (
    MSM4SRReleased,
    PaddedPooling,
    cross_modality_loss,
    next_item_loss,
    overwrite_items,
    scatter_last,
)

OWN_YAML = MODEL_YAML.with_name("MSM4SRReleased.yaml")
TAU = 0.07


def built(stage="finetune", dataset=None, cls=MSM4SRReleased, **settings):
    """With parameters away from 0 and 1, where they could hide mistakes."""
    torch.manual_seed(0)
    defaults = {**yaml.safe_load(MODEL_YAML.read_text()), **yaml.safe_load(OWN_YAML.read_text())}
    model = cls(Settings({**defaults, **RECBOLE, **SMALL, "train_stage": stage, **settings}), dataset or Toys())
    for name, parameter in model.named_parameters():
        if "gate" in name or "norm" in name.lower() or "bias" in name:
            nn.init.normal_(parameter, mean=float("weight" in name and "gate" not in name), std=0.5)
    return model


class Counted(Toys):
    """Items with given numbers of rows; item 0 is padding."""

    def __init__(self, counts, width=6):
        super().__init__(width=width)
        self.counts = counts

    def vectors(self, name):
        counts = torch.tensor([0, *self.counts])
        rows = torch.randn(int(counts.sum()), self.width, generator=torch.Generator().manual_seed(len(name))) + 0.5
        return Vectors(rows, counts.cumsum(0) - counts, counts, torch.full((self.width,), 7.0))


def random_rows(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


def cosine(a, b):
    return float(a @ b / a.norm() / b.norm())


# ---------------------------------------------------------------- zero rows in the softmax


def features_of(dataset, scale="none"):
    rows, *rest, fallback = dataset.vectors("text")
    return FeatureRows(rows.double(), *rest, fallback.double(), scale=scale)


def pooling_of(width=6):
    torch.manual_seed(1)
    return PaddedPooling(width=width, attention_size=4).double()


def test_zero_rows_take_their_share_of_equal_weights():
    features, pooling = features_of(Counted([1, 3, 5, 8, 10])), pooling_of()
    nn.init.zeros_(pooling.outer.weight)
    share = pooling.share_of_real_rows(features, torch.arange(1, 6))
    torch.testing.assert_close(1 - share, torch.tensor([0.900, 0.700, 0.500, 0.200, 0.0], dtype=torch.double))
    for item, (start, count) in enumerate(zip([0, 1, 4, 9, 17], [1, 3, 5, 8, 10], strict=True), start=1):
        expected = features.rows[start : start + count].sum(0) / 10
        torch.testing.assert_close(pooling(features)[item], expected)


@pytest.mark.parametrize("scale", ["none", "unit", "sqrt_dim", "standardize"])
def test_pooling_equals_a_softmax_over_padded_rows(scale):
    dataset = Counted([1, 3, 0, 2, 4])
    features, pooling = features_of(dataset, scale), pooling_of()
    v = (pooling.outer.weight[0] @ pooling.inner.weight).detach()
    lengths = {"unit": 1.0, "sqrt_dim": math.sqrt(6)}
    rows = features.rows
    if scale in lengths:
        rows = torch.stack([lengths[scale] * x / x.norm() for x in rows])
    if scale == "standardize":
        rows = (rows - rows.mean(0)) / rows.std(0, unbiased=False)
    expected, start = torch.zeros(6, 6, dtype=torch.double), 0
    for item, count in enumerate(dataset.counts, start=1):
        padded = [rows[start + j] if j < count else torch.zeros(6, dtype=torch.double) for j in range(4)]
        below = sum(math.exp(x @ v) for x in padded)
        expected[item] = sum(math.exp(x @ v) / below * x for x in padded)
        start += count
    plain = (features.fallback - features.mean) / features.std if scale == "standardize" else features.fallback
    expected[3] = plain  # without rows: its stand-in; padding: zero
    torch.testing.assert_close(pooling(features), expected)
    some = torch.tensor([4, 0, 4, 3])
    torch.testing.assert_close(pooling(features, some), expected[some])


def test_padding_is_zero_also_where_items_without_rows_are_not():
    tower = built(dataset=Counted([1, 0] * 9 + [3])).towers["text"]
    assert tower.pooled()[0].abs().sum() == 0
    torch.testing.assert_close(tower.pooled()[2], torch.full((6,), 7.0))


# ---------------------------------------------------------------- attention without gradient, features as they are


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_attention_gets_no_gradient_in_either_stage(stage):
    model = built(stage)
    found = gradients(model, total(model.calculate_loss(batch())))
    pooling = {name for name in found if ".pooling." in name}
    assert len(pooling) == 4 and {name for name in found if found[name] is None} == pooling
    before = {name: tower.pooled().clone() for name, tower in model.towers.items()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    optimizer.step()
    for name, tower in model.towers.items():
        assert torch.equal(tower.pooling(tower.features), before[name])


def test_random_attention_is_close_to_a_mean_on_rows_of_length_one():
    torch.manual_seed(0)
    pooling = PaddedPooling(width=768, attention_size=64)
    v = (pooling.outer.weight @ pooling.inner.weight)[0]
    assert v.norm().item() == pytest.approx(0.35, rel=0.15)
    weights = (10 * (F.normalize(torch.randn(10, 768), dim=1) @ v).softmax(0)).tolist()
    assert all(abs(weight - 1) < 0.05 for weight in weights)


def test_features_are_not_scaled():
    for tower in built().towers.values():
        assert tower.features.row_scale is None and tower.features.std is None


def test_weights_start_as_in_the_release():
    torch.manual_seed(0)
    settings = {**yaml.safe_load(MODEL_YAML.read_text()), **yaml.safe_load(OWN_YAML.read_text()), **RECBOLE}
    model = MSM4SRReleased(Settings({**settings, "proj": True}), Toys(width=100))
    tower = model.towers["text"]

    def uniform(parameter, bound):
        assert parameter.abs().max() <= bound and parameter.abs().max() > 0.8 * bound
        assert parameter.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.2)

    uniform(tower.pooling.inner.weight, 1 / math.sqrt(100))
    uniform(tower.pooling.outer.weight, 1 / math.sqrt(64))
    uniform(tower.adaptor.project.bias, 1 / math.sqrt(100))
    uniform(model.projections["text"].weight, 1 / math.sqrt(64))
    assert tower.adaptor.project.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert tower.adaptor.gate.weight.abs().sum() == 0
    assert (tower.adaptor.norm_weight == 1).all() and (tower.adaptor.norm_bias == 0).all()
    query = model.encoder.trm_encoder.layer[0].multi_head_attention.query
    assert query.weight.std().item() == pytest.approx(0.02, rel=0.05) and (query.bias == 0).all()


# ---------------------------------------------------------------- losses


@pytest.mark.parametrize("n_anchors", [1, 2])
def test_a_pair_with_the_same_target_counts_as_one(n_anchors):
    target = [3, 5, 3, 4, 3]
    anchors = [random_rows(5, 4, seed=seed) for seed in range(n_anchors)]
    table = random_rows(6, 4, seed=9)
    targets = table[target]
    losses = []
    for i in range(5):
        above = sum(math.exp(cosine(a[i], targets[i]) / TAU) for a in anchors)
        below = 0.0
        for a in anchors:
            for j in range(5):
                same = target[i] == target[j] and i != j
                below += 1.0 if same else math.exp(cosine(a[i], targets[j]) / TAU)
        losses.append(-math.log(above / below))
    ids = torch.tensor(target)
    actual = next_item_loss(anchors, targets, temperature=TAU, same_target=ids.unsqueeze(1) == ids)
    assert actual.item() == pytest.approx(sum(losses) / 5, rel=1e-10)


def test_the_image_side_has_the_sum_of_the_text_side():
    text, image = random_rows(5, 4, seed=1), random_rows(5, 4, seed=2)

    def loss(t, v):
        def e(a, b):
            return math.exp(cosine(a, b) / TAU)

        rows = []
        for i in range(5):
            across = sum(e(t[i], v[j]) for j in range(5))
            for own in (t, v):
                below = across + sum(e(own[i], own[j]) for j in range(5) if j != i)
                rows.append(-math.log(e(t[i], v[i]) / below))
        return sum(rows) / 10

    assert cross_modality_loss(text, image, temperature=TAU).item() == pytest.approx(loss(text, image), rel=1e-10)
    swapped = cross_modality_loss(image, text, temperature=TAU).item()
    assert swapped == pytest.approx(loss(image, text), rel=1e-10)
    assert abs(swapped - loss(text, image)) > 1e-3


def test_the_self_pair_subtracted_afterwards_and_losses_broadcast_to_a_square_have_these_values():
    text, image = (F.normalize(random_rows(6, 4, seed=seed), dim=1) for seed in (1, 2))
    across = (text @ image.T / TAU).exp()  # [B, B]
    sides = []
    for own in (text, image):
        within = (own @ own.T / TAU).exp().sum(1) - math.exp(1 / TAU)  # [B]
        sides.append(-(across.diagonal().unsqueeze(1) / (across.sum(1) + within)).log())  # [B, 1] / [B] -> [B, B]
    expected = (sides[0].mean() + sides[1].mean()) / 2
    assert sides[0].shape == (6, 6)
    torch.testing.assert_close(cross_modality_loss(text, image, temperature=TAU), expected, rtol=1e-8, atol=0)


def test_padding_is_a_class_and_its_embedding_is_trained():
    model = built(**NO_DROPOUT).double()
    interaction = batch()
    scores = model.scores(model.item_tower(), interaction["item_id_list"], interaction["item_length"]) / TAU
    rows = []
    for row, target in zip(scores.tolist(), interaction["item_id"].tolist(), strict=True):
        rows.append(math.log(sum(math.exp(score) for score in row)) - row[target])
    loss = model.calculate_loss(interaction)
    assert len(row) == N_ITEMS and loss.item() == pytest.approx(sum(rows) / len(rows), rel=1e-10)
    loss.backward()
    assert model.item_embedding.weight[0].abs().sum() == 0 and model.item_embedding.weight.grad[0].abs().sum() > 0


# ---------------------------------------------------------------- item drop


def test_a_dropped_item_overwrites_the_last_kept_one():
    kept = torch.tensor([[True, False, True, False, False]])
    new, length = scatter_last(torch.tensor([[11, 12, 13, 14, 15]]), torch.tensor([5]), kept)
    assert new.tolist() == [[12, 15, 0, 0, 0]] and length.tolist() == [2]


def test_item_drop_equals_writing_one_item_after_the_other():
    lengths = torch.tensor([1, 12, 3, 3, 7, 2, 1, 12])
    interaction = batch(lengths.tolist())
    keep = torch.rand(8, 12, generator=torch.Generator().manual_seed(3)) < 0.5
    new, new_length = scatter_last(interaction["item_id_list"], lengths, keep)
    for row in range(8):
        written, slot = [0] * 12, -1
        for position in range(lengths[row]):
            slot += int(keep[row, position] or position == 0)
            written[slot] = int(interaction["item_id_list"][row, position])
        assert new[row].tolist() == written and new_length[row] == slot + 1


def test_item_drop_draws_like_the_exact_one_but_keeps_the_newest_and_not_the_first():
    item_seq, lengths = torch.arange(1, 9).repeat(4000, 1), torch.full((4000,), 8)
    torch.manual_seed(1)
    exact, exact_length = drop_items(item_seq, lengths, 0.3)
    torch.manual_seed(1)
    new, length = overwrite_items(item_seq, lengths, 0.3)
    torch.testing.assert_close(length, exact_length)
    last = length.unsqueeze(1) - 1
    assert (new.gather(1, last) == 8).all() and (exact[:, 0] == 1).all()
    assert (new[:, 0] == 1).float().mean().item() == pytest.approx(0.7, abs=0.03)


# ---------------------------------------------------------------- projections


def test_scores_ignore_projections_and_the_loss_does_not():
    model = built("pretrain", proj=True, **NO_DROPOUT).eval()
    before, loss = model.full_sort_predict(batch()), total(model.calculate_loss(batch()))
    for parameter in model.projections.parameters():
        nn.init.normal_(parameter)
    torch.testing.assert_close(model.full_sort_predict(batch()), before, rtol=0, atol=0)
    assert abs(total(model.calculate_loss(batch())) - loss) > 1e-3


# ---------------------------------------------------------------- all together


@pytest.fixture
def release(monkeypatch):
    """The literal model with the released formulas."""

    def pool(pooling, rows, valid, fallback):
        weights = pooling.outer(pooling.inner(rows)).squeeze(-1).softmax(-1)  # [N, T], zero rows too
        pooled = (weights.unsqueeze(-1) * rows).sum(1)
        pooled = torch.where(valid.any(1, keepdim=True), pooled, fallback)
        return pooled * (torch.arange(len(pooled)) > 0).unsqueeze(1)

    def pooled_nip(anchors, targets, same, temperature):
        above = below = 0.0
        for anchor in anchors:
            logits = F.normalize(anchor, dim=-1) @ F.normalize(targets, dim=-1).T / temperature
            e = (logits * ~same).exp()
            above, below = above + e.diagonal(), below + e.sum(1)
        return -(above / below).log().mean()

    def cmcl(text, image, temperature):
        text, image = F.normalize(text, dim=-1), F.normalize(image, dim=-1)
        across = (text @ image.T / temperature).exp()
        loss = 0.0
        for own in (text, image):
            below = across.sum(1) + (own @ own.T / temperature).exp().sum(1) - math.exp(1 / temperature)
            loss = loss - (across.diagonal() / below).log().mean()
        return loss / 2

    for function in (pool, pooled_nip, cmcl):
        monkeypatch.setattr(literal_msm4sr, function.__name__, function)


@pytest.mark.parametrize(("stage", "settings"), VARIANTS)
def test_loss_and_gradients_equal_those_of_the_literal_release(release, stage, settings):
    if stage == "finetune":
        settings = {**settings, "proj": False}  # the literal one scores with them
    model = built(stage, **settings, **NO_DROPOUT).double()
    results = []
    for each in (model, LiteralMSM4SR(model)):
        torch.manual_seed(7)
        loss = total(each.calculate_loss(batch()))
        results.append((loss.item(), gradients(model, loss)))
    (actual, own), (expected, theirs) = results
    assert actual == pytest.approx(expected, abs=1e-6)
    for name in own:
        assert (own[name] is None) == (".pooling." in name)
        if own[name] is not None:
            torch.testing.assert_close(own[name], theirs[name], rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_scores_equal_those_of_the_literal_release(release, stage):
    model = built(stage).eval()
    with torch.no_grad():
        actual, expected = (each.full_sort_predict(batch()) for each in (model, LiteralMSM4SR(model).eval()))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-6)


PARTS = ["pooling_class", "drop_items", "next_item_loss", "cross_modality_loss", "_project"]


def outcome(model):
    """Losses and scores at one seed."""
    torch.manual_seed(5)
    losses = model.train().calculate_loss(batch())
    return [*(losses if isinstance(losses, tuple) else (losses,)), model.eval().full_sort_predict(batch())[:, 1:]]


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_without_its_differences_it_is_msm4sr(stage):
    settings = {"proj": True, "feature_scale": "standardize", "train_attention": True, "item_drop_max": 0.9}
    without = type("Without", (MSM4SRReleased,), {part: vars(MSM4SR)[part] for part in PARTS})
    actual, expected = (outcome(built(stage, cls=cls, **settings)) for cls in (without, MSM4SR))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("part", PARTS)
def test_each_difference_makes_one(part):
    settings = {"proj": True, "item_drop_max": 0.9, "cmcl_weight": 1.0}
    only = type("Only", (MSM4SR,), {part: vars(MSM4SRReleased)[part]})
    actual, expected = (outcome(built("pretrain", cls=cls, **settings)) for cls in (only, MSM4SR))
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_where_nothing_meets_a_defect_it_equals_msm4sr(stage):
    """Each item has two rows, targets are distinct, nothing is dropped, CMCL has no weight."""
    settings = {"item_drop_max": 0.0, "cmcl_weight": 0.0}
    interaction = batch()
    interaction["item_id"] = torch.arange(1, 9)
    losses = []
    for cls in (MSM4SRReleased, MSM4SR):
        model = built(stage, Counted([2] * 19), cls=cls, **settings)
        for tower in model.towers.values():
            tower.features.fallback.zero_()  # padding is zero in both
        torch.manual_seed(5)
        losses.append(total(model.calculate_loss(interaction)))
    torch.testing.assert_close(*losses)
