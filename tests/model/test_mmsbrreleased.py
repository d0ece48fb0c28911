"""The released MMSBR against its literal version in float64, part by part, and each of its defects by itself."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from test_literal_mmsbr import N_CATEGORIES, N_ITEMS, N_PRICES, SESSIONS, padded
from test_literal_mmsbr import build as build_literal
from torch import nn

from benchmarks.literal_mmsbr import LiteralMMSBR
from benchmarks.mmsbr_models import MadeUpDataset, build_fast, in_fast_layout, settings_of
from recbole_mm.errors import SettingError
from recbole_mm.model.layers import Dropout
from recbole_mm.model.mmsbrreleased import MMSBRReleased
from recbole_mm.model.wasserstein import Gaussian

SMALL = {"hidden_size": 8, "inner_size": 32, "n_heads": 2, "n_negatives": 5}
TARGETS = torch.tensor([2, 3, 12])
VARIANTS = [
    pytest.param({}, id="default"),
    pytest.param({"n_layers": 2, "n_sequences": 3, "n_pivots": 2, "n_heads": 4}, id="other-sizes"),
    pytest.param({"n_pivots": 1, "n_sequences": 1, "n_negatives": N_ITEMS, "temperature": 0.5}, id="ones"),
]


class Catalogue(MadeUpDataset):
    """Prices and categories of the literal model's items, and features that nobody may read."""

    def __init__(self) -> None:
        numbers = torch.arange(N_ITEMS)
        super().__init__(1 + numbers % N_PRICES, 1 + numbers % N_CATEGORIES, features=("text", "image"))

    def feature(self, name: str):
        raise AssertionError(f"read feature {name}")


def built(dataset=None, **settings) -> MMSBRReleased:
    torch.manual_seed(0)
    return MMSBRReleased(settings_of("MMSBR", "MMSBRReleased", **{**SMALL, **settings}), dataset or Catalogue())


def batch(sessions=SESSIONS, length: int = 5) -> dict[str, torch.Tensor]:
    item_seq, item_seq_len = padded(sessions, length)
    return {"item_id_list": item_seq, "item_length": item_seq_len, "item_id": TARGETS[: len(sessions)]}


def session_price(model: MMSBRReleased, item_seq: torch.Tensor, item_seq_len: torch.Tensor) -> Gaussian:
    valid, pair = item_seq > 0, model.pair_of_item[item_seq]  # [B, L] each
    return model._session_price(model.item_tower().in_sessions, pair, item_seq_len - 1, valid, valid)


# ---------------------------------------------------------------- part by part


def assert_same_outputs_and_gradients(literal: LiteralMMSBR, fast: MMSBRReleased, expected, actual) -> None:
    """Of one or several tensors, the gradient that of a random combination."""
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    gradients = []
    for model, outputs in ((literal, expected), (fast, actual)):
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(output.shape, generator=generator, dtype=torch.double) for output in outputs]
        model.zero_grad()
        sum((weight * output).sum() for weight, output in zip(weights, outputs, strict=True)).backward()
        found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
        gradients.append(in_fast_layout(found) if model is literal else found)
    assert any(gradient.any() for gradient in gradients[0].values())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-7, atol=1e-9)


@pytest.fixture(params=VARIANTS)
def both(request) -> tuple[LiteralMMSBR, MMSBRReleased]:
    literal = build_literal(**request.param)
    return literal, build_fast(literal).eval()


def test_item_vectors_equal_the_literal_ones(both):
    literal, fast = both
    assert_same_outputs_and_gradients(*both, literal.item_vectors(), fast.item_tower().vectors[1:])


def test_item_prices_equal_the_literal_ones(both):
    literal, fast = both
    mean, variance = (part[fast.pair_of_item[1:]] for part in fast.item_tower().prices)
    assert_same_outputs_and_gradients(*both, literal.item_prices(), (mean, variance))


def test_session_prices_equal_the_literal_ones(both):
    literal, fast = both
    item_seq, item_seq_len = padded(SESSIONS, 4)
    actual = session_price(fast, item_seq, item_seq_len)
    assert_same_outputs_and_gradients(*both, literal.price_session(item_seq, item_seq_len), tuple(actual))


def test_interest_equals_the_literal_one(both):
    literal, fast = both
    item_seq, item_seq_len = padded(SESSIONS, 4)
    table = torch.randn(N_ITEMS, 8, dtype=torch.double)
    rows = literal.gather(table, item_seq)
    assert_same_outputs_and_gradients(
        *both, literal.interest(table, item_seq, item_seq_len), fast.interest(rows, item_seq_len)
    )


def test_the_contrastive_loss_equals_the_literal_one(both):
    literal, fast = both
    (actual,) = fast.auxiliary_losses(fast.item_tower(), None)
    assert_same_outputs_and_gradients(*both, literal.contrastive_weight * literal.contrastive(), actual)


def test_scores_equal_the_literal_ones(both):
    literal, fast = both
    batch = padded(SESSIONS, 5)
    assert_same_outputs_and_gradients(*both, literal.scores(*batch), fast.scores(fast.item_tower(), *batch)[:, 1:])


def test_the_loss_equals_the_literal_one(both):
    literal, fast = both
    expected = literal.loss(*padded(SESSIONS, 3), TARGETS)
    assert_same_outputs_and_gradients(*both, expected, sum(fast.calculate_loss(batch())))


def test_dropout_acts_where_it_does_in_the_literal_model(monkeypatch):
    """Each dropout but those of pivot layers scales by a factor instead, so that one in another place shows."""

    def scale(self, x):
        return x * (1 - self.p) if self.training else x

    literal = build_literal(feature_dropout=0.6, dropout=0.2).train()
    assert build_fast(literal).transformer.dropout == 0.6
    for layers in literal.rounds:
        layers["text"].dropout.p = layers["image"].dropout.p = 0.0
    fast = build_fast(literal).train()
    for dropout in (nn.Dropout, Dropout):
        monkeypatch.setattr(dropout, "forward", scale)
    batch = padded(SESSIONS, 5)
    with torch.no_grad():  # with gradients, generated features draw their masks themselves
        items = fast.item_tower()
    torch.testing.assert_close(items.vectors[1:], literal.item_vectors())
    actual = session_price(fast, *batch)
    torch.testing.assert_close(tuple(actual), literal.price_session(*batch))
    torch.testing.assert_close(fast.scores(items, *batch)[:, 1:], literal.scores(*batch))
    different = literal.eval().item_vectors() - fast.item_tower().vectors[1:]
    assert different.abs().max() > 1e-3


# ---------------------------------------------------------------- parameters: D1a, D11, D12, D19


def test_no_feature_is_read_and_the_tables_are_random_numbers():
    model = built()  # else the catalogue complains
    assert set(model.tables) == {"text", "image", "pseudo_text", "pseudo_image"}
    assert all(table.shape == (1 + N_ITEMS, 8) and table.requires_grad for table in model.tables.values())
    assert list(model.buffers())[-1] is model.evaluated and not any(
        "table" in name for name, _ in model.named_buffers()
    )


def test_every_parameter_starts_uniform_the_gains_of_layer_norms_too():
    model = built(hidden_size=64, inner_size=256, n_heads=4)
    names = {name for name, _ in model.named_parameters()}
    assert {"price_norm.weight", "price_norm.bias", "transformer.norm_weight", "interest.weight.bias"} < names
    for name, parameter in model.named_parameters():
        assert parameter.abs().max() <= 1 / 8, name
        if parameter.numel() > 500:
            assert parameter.mean().abs() < 0.015 and parameter.std().item() == pytest.approx(
                1 / 8 / math.sqrt(3), rel=0.1
            ), name


def test_item_vectors_start_almost_constant_and_half_of_their_dimensions_dead():
    torch.manual_seed(0)
    ids = torch.ones(300, dtype=torch.long)
    model = built(MadeUpDataset(ids, ids), hidden_size=64, inner_size=256, n_heads=4).eval()
    vectors = model.item_tower().vectors[1:]
    assert vectors.std(0).mean() < vectors.mean() / 4
    assert 0.3 < (vectors == 0).double().mean() < 0.7


def test_a_row_of_the_tables_belongs_to_one_item_alone():
    model = built().eval()
    before = model.item_tower().vectors
    for table in (model.pivots, model.tables["text"], model.tables["image"]):
        with torch.no_grad():
            table[3] += 1
        after = model.item_tower().vectors
        assert (after != before).any(1).nonzero().tolist() == [[3]]
        before = after


def test_pseudo_tables_are_trained_by_the_contrastive_loss_alone():
    model = built()
    model.calculate_loss(batch())[0].backward(retain_graph=True)
    grads = [model.tables[name].grad for name in ("pseudo_text", "pseudo_image", "text", "image")]
    assert grads[0] is None and grads[1] is None and grads[2].any() and grads[3].any()
    model.calculate_loss(batch())[1].backward()
    assert model.tables["pseudo_text"].grad[1:].any() and model.tables["pseudo_image"].grad[1:].any()


def test_one_layer_norm_serves_both_sub_layers_and_another_one_all_prices():
    model = built()
    assert model.transformer.norm_weight.shape == (6, 1, 8)
    attention = model.price_attention
    assert attention.mean_norm is attention.spread_norm is model.price_norm and model.price_norm.eps == 1e-12
    names = [name for name, _ in model.named_parameters() if "norm" in name and "price" in name]
    assert names == ["price_norm.weight", "price_norm.bias"]


# ---------------------------------------------------------------- formulas: D1b, D3, D7, D8, D9, D10, D20


def test_pivots_attend_with_a_softmax_over_queries():
    model = build_fast(build_literal()).eval()
    before = model.item_tower().vectors
    assert model.transformer.softmax_over == "queries"
    model.transformer.softmax_over = "keys"
    assert (model.item_tower().vectors - before).abs().max() > 1e-3


def test_a_larger_price_distance_raises_the_score():
    model = build_fast(build_literal()).eval()
    item_seq, item_seq_len = padded(SESSIONS, 3)
    scores = model.scores(model.item_tower(), item_seq, item_seq_len)
    model.has_prices = False
    interest = model.scores(model.item_tower(), item_seq, item_seq_len)
    ratio = (scores / interest)[:, 1:]
    assert ratio.min() > 1
    with torch.no_grad():
        model.price_mean.weight[4] += 100.0  # not in the sessions
    model.has_prices = True
    further = model.scores(model.item_tower(), item_seq, item_seq_len)
    dear = [item for item in range(1, N_ITEMS + 1) if (item - 1) % N_PRICES == 3]
    gain = ((further - scores) / interest)[1:, dear]  # sessions 2 and 3 have no item of this level
    assert (gain > 1e4 / 2).all()
    assert (scores - further)[1:, [item for item in range(1, 1 + N_ITEMS) if item not in dear]].abs().max() < 1e-9


def test_distance_is_the_sum_over_dimensions_and_an_item_s_price_the_bare_sum_of_two_rows():
    model = build_fast(build_literal()).eval()
    item_seq, item_seq_len = padded([[3, 1, 7]], 3)
    session = session_price(model, item_seq, item_seq_len)
    scores = model.scores(model.item_tower(), item_seq, item_seq_len)[0]
    model.has_prices = False
    interest = model.scores(model.item_tower(), item_seq, item_seq_len)[0]
    level, category = 1 + 4 % N_PRICES, 1 + 4 % N_CATEGORIES  # of item 5
    row = model.category.weight[category]
    mean, variance = model.price_mean.weight[level] + row, F.elu(model.price_spread.weight[level] + row) + 1
    distance = (session.mean[0] - mean).square().sum() + (session.variance[0].sqrt() - variance.sqrt()).square().sum()
    torch.testing.assert_close(scores[5], interest[5] * (1 + distance))


def test_the_order_of_a_session_matters_only_through_the_last_item():
    model = build_fast(build_literal()).eval()
    first, swapped, other = model.scores(model.item_tower(), *padded([[3, 1, 7], [1, 3, 7], [1, 7, 3]], 3))
    torch.testing.assert_close(first, swapped)
    assert (first - other).abs().max() > 1e-6


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_contrastive_loss_is_a_sum_of_base_10_logarithms_of_dot_products(temperature):
    model = built(contrastive_temperature=temperature, contrastive_weight=0.25).double()
    total, n_own_found = 0.0, 0
    for modality in ("text", "image"):
        real, pseudo = model.tables[modality].tolist(), model.tables[f"pseudo_{modality}"].tolist()
        for i in range(1, 1 + N_ITEMS):
            logits = [sum(a * b for a, b in zip(real[i], pseudo[j], strict=True)) / temperature for j in range(1, 13)]
            five = sorted(logits)[-5:]
            n_own_found += logits[i - 1] in five
            total += math.log10(sum(math.exp(value) for value in five)) - logits[i - 1] / math.log(10)
    assert 0 < n_own_found < 2 * N_ITEMS  # the own pair may be among the largest, or not
    assert model.calculate_loss(batch())[1].item() == pytest.approx(0.25 * total, rel=1e-10)


def test_dot_products_of_the_size_of_features_do_not_overflow():
    literal = build_literal(scale=100.0)
    assert not literal.contrastive().isfinite()
    (loss,) = build_fast(literal).auxiliary_losses(build_fast(literal).item_tower(), None)
    assert loss.isfinite() and loss > 0


# ---------------------------------------------------------------- dropout until the first evaluation: D2


def test_dropout_ends_with_the_first_evaluation():
    model = built()
    model.train()
    assert all(module.training for module in model.modules())
    assert sum(model.calculate_loss(batch())) != sum(model.calculate_loss(batch()))
    model.eval()
    model.train()
    assert not any(module.training for module in model.modules())
    torch.testing.assert_close(sum(model.calculate_loss(batch())), sum(model.calculate_loss(batch())), rtol=0, atol=0)
    sum(model.calculate_loss(batch())).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_state_knows_whether_dropout_has_ended():
    model, unlike, same = built(), built(), built()
    unlike.load_state_dict(model.state_dict())
    assert unlike.train().training
    model.eval()
    same.load_state_dict(model.state_dict())
    assert same.evaluated and not same.train().training and not same.transformer.training


def test_the_cached_items_are_new_after_each_step_without_dropout():
    model = built().eval()
    with torch.no_grad():
        before = model.full_sort_predict(batch())
        model.train()
        model.pivots += 1
        model.eval()
        assert (model.full_sort_predict(batch()) - before)[:, 1:].abs().max() > 1e-5


def test_a_run_trains_with_dropout_in_its_first_epoch_also_when_resumed(planted, monkeypatch):
    from recbole_mm.quick_start import run

    modes = []
    calculate_loss = MMSBRReleased.calculate_loss

    def noting(self, interaction):
        modes.append(self.training)
        return calculate_loss(self, interaction)

    monkeypatch.setattr(MMSBRReleased, "calculate_loss", noting)
    settings = {
        "epochs": 2, "hidden_size": 8, "inner_size": 8, "train_batch_size": 512, "MAX_ITEM_LIST_LENGTH": 10,
        "topk": [10], "valid_metric": "Recall@10", "use_gpu": False, "show_progress": False,
    }  # fmt: skip
    record = run("MMSBRReleased", str(planted), settings=settings, runs_file=None)
    assert modes == [True, False]
    last = record.stages[-1]["checkpoint"].replace(".pth", "-last.pth")
    run(resume=last, settings={"epochs": 3}, runs_file=None)
    assert modes == [True, False, False]


# ---------------------------------------------------------------- settings and data: D4, D6, D13, D15


def test_settings_are_those_of_the_release():
    settings = settings_of("MMSBR", "MMSBRReleased")
    release = {
        "hidden_size": 64, "n_sequences": 4, "n_pivots": 4, "n_rounds": 3, "n_heads": 4, "inner_size": 256,
        "feature_dropout": 0.6, "pivot_dropout": 0.6, "fusion_dropout": 0.2, "price_dropout": 0.2, "n_negatives": 100,
        "contrastive_weight": 0.01, "contrastive_temperature": 1.0, "learning_rate": 1e-3, "train_batch_size": 100,
        "weight_decay": 0.0, "epochs": 100, "positions": "none", "exclude_pad_class": True,
    }  # fmt: skip
    assert {key: settings[key] for key in release} == release


def test_a_folder_without_any_feature_is_enough(planted, built):
    shutil.rmtree(planted / "features")
    (planted / "manifest.json").unlink()
    config, dataset, train, *_, model = built("MMSBRReleased", planted)
    assert dataset.feature_names() == [] and not model.has_prices
    losses = model.calculate_loss(next(iter(train)))
    sum(losses).backward()
    assert all(loss.isfinite() for loss in losses)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_prices_of_a_folder_are_used(planted, built):
    from dataset_prep.session_folder import add_price_levels

    add_price_levels(planted)
    *_, train, _, _, model = built("MMSBRReleased", planted)
    assert model.has_prices
    sum(model.calculate_loss(next(iter(train)))).backward()
    assert model.price_mean.weight.grad[1:].any(1).sum() > 1


def test_without_prices_the_score_is_the_interest():
    with_prices, without = (built(use_price=value).eval() for value in (True, False))
    assert not any("price" in name or "category" in name for name, _ in without.named_parameters())
    with_prices.has_prices = False
    state = {name: value for name, value in with_prices.state_dict().items() if name in without.state_dict()}
    without.load_state_dict(state)
    torch.testing.assert_close(without.full_sort_predict(batch()), with_prices.full_sort_predict(batch()))


@pytest.mark.parametrize("modality", ["text", "image"])
def test_one_modality_is_enough_and_two_are_not_needed(modality):
    model = built(**{f"use_{modality}": False})
    (kept,) = {"text", "image"} - {modality}
    assert set(model.tables) == {kept, f"pseudo_{kept}"}
    sum(model.calculate_loss(batch())).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_no_modality_is_refused():
    with pytest.raises(SettingError, match="MMSBRReleased needs one of them"):
        built(use_text=False, use_image=False)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"pivots": "shared"}, "pivots must be per_item in MMSBRReleased, found 'shared'; MMSBR takes others"),
        ({"pivots": "none"}, "pivots must be per_item in MMSBRReleased, found 'none'"),
        ({"price_score": "minus"}, "price_score must be product_plus or none in MMSBRReleased, found 'minus'"),
        ({"price_score": "product_exp"}, "price_score must be product_plus or none in .* found 'product_exp'"),
        ({"contrastive_anchors": 7}, "contrastive_anchors must be 0 in MMSBRReleased, found 7"),
    ],
)
def test_settings_that_the_release_has_not_are_refused(setting, message):
    with pytest.raises(SettingError, match=message):
        built(**setting)


def test_without_contrastive_loss_there_are_no_pseudo_tables():
    model = built(contrastive_weight=0.0)
    assert set(model.tables) == {"text", "image"}
    model.calculate_loss(batch()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("n_rounds", [1, 2])
def test_any_number_of_rounds_works(n_rounds):
    assert built(n_rounds=n_rounds).transformer.qkv_weight.shape == (2 * n_rounds, 24, 8)


def test_a_batch_of_one_scores_as_in_company():
    model = build_fast(build_literal()).eval()
    together = model.scores(model.item_tower(), *padded(SESSIONS, 5))
    for session, scores in zip(SESSIONS, together, strict=True):
        torch.testing.assert_close(model.scores(model.item_tower(), *padded([session], len(session)))[0], scores)


def test_a_tower_in_chunks_has_the_same_loss_and_gradients():
    gradients = []
    for chunk in (0, 5):
        model = built(tower_chunk=chunk, feature_dropout=0.0, pivot_dropout=0.0, fusion_dropout=0.0, price_dropout=0.0)
        sum(model.double().calculate_loss(batch())).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0])


def test_items_without_price_or_category_have_a_row_of_their_own():
    dataset = Catalogue()
    dataset.columns["price_level"][[2, 5]] = 0
    dataset.columns["category"][[3, 5]] = 0
    model = built(dataset).eval()
    scores = model.full_sort_predict(batch([[2, 5], [3], [5, 1]]))
    assert scores[:, 1:].isfinite().all()
