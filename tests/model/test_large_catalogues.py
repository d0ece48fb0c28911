"""MSM4SR and UniSRec with other softmaxes than the full one: the same losses, gradients and ranks, or close to them."""

from __future__ import annotations

from pathlib import Path

import pytest
import test_msm4sr
import test_unisrec
import torch
from conftest import TINY, write_planted
from test_msm4sr import N_ITEMS, batch, gradients

from recbole_mm import checkpoint
from recbole_mm.data.layout import write_feature
from recbole_mm.errors import SettingError
from recbole_mm.evaluation import FullRanking
from recbole_mm.model.base import MultimodalRecommender
from recbole_mm.model.layers import AttentionPooling, FeatureRows, MoEAdaptor, _RowProducts
from recbole_mm.optimizer import LazyAdam
from recbole_mm.quick_start import run
from recbole_mm.ragged import mean_and_deviation, mean_of_items, segments_of
from recbole_mm.ranking import tie_order
from recbole_mm.trainer import Trainer

CHUNKED, SAMPLED = {"softmax": "chunked", "softmax_chunk": 7}, {"softmax": "sampled", "softmax_chunk": 7}
UNIFORM = {**SAMPLED, "negative_sampling": "uniform", "softmax_negatives": 40}
FROZEN = {**test_msm4sr.NO_DROPOUT, "freeze_attention_in_finetune": True, "proj": True}
INDUCTIVE = {**test_unisrec.NOTHING_RANDOM, "finetune_mode": "inductive"}
CASES = [
    pytest.param(test_msm4sr.built, test_msm4sr.NO_DROPOUT, id="MSM4SR"),
    pytest.param(test_msm4sr.built, FROZEN, id="MSM4SR-frozen"),
    pytest.param(test_unisrec.built, test_unisrec.NOTHING_RANDOM, id="UniSRec"),
    pytest.param(test_unisrec.built, INDUCTIVE, id="UniSRec-inductive"),
]


class ColdToys(test_msm4sr.Toys):
    """Training has the items below 12."""

    def seen_in_training(self):
        return (torch.arange(N_ITEMS) < 12) & (torch.arange(N_ITEMS) > 0)


def same_gradients(actual, expected):
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        if gradient is None:
            assert actual[name] is None
        else:
            torch.testing.assert_close(actual[name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("exclude_pad_class", [False, True])
@pytest.mark.parametrize(("built", "settings"), CASES)
def test_chunks_give_the_loss_and_the_gradients_of_the_full_softmax(built, settings, exclude_pad_class):
    settings = {**settings, "exclude_pad_class": exclude_pad_class}
    full, chunked = built(**settings).double(), built(**settings, **CHUNKED).double()
    losses = [model.calculate_loss(batch()) for model in (full, chunked)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-10, atol=0)
    same_gradients(gradients(chunked, losses[1]), gradients(full, losses[0]))


def test_chunks_with_dropout_draw_the_same_in_the_backward_pass():
    model = test_msm4sr.built(**CHUNKED, hidden_dropout_prob=0.0, attn_dropout_prob=0.0, adaptor_dropout=0.5).double()
    weight, step = model.towers["text"].adaptor.project.weight, 1e-6

    def loss(shift=0.0):
        torch.manual_seed(3)
        with torch.no_grad():
            weight[2, 1] += shift
        return model.calculate_loss(batch())

    slope = gradients(model, loss())["towers.text.adaptor.project.weight"][2, 1]
    higher, lower = loss(step).item(), loss(-2 * step).item()
    assert slope.item() == pytest.approx((higher - lower) / (2 * step), rel=1e-4)


@pytest.mark.parametrize(("built", "settings"), CASES)
def test_drawing_every_item_once_gives_the_full_softmax(built, settings, monkeypatch):
    full, sampled = built(**settings).double(), built(**settings, **UNIFORM).double()
    once = torch.arange(N_ITEMS), torch.zeros(N_ITEMS, dtype=torch.double)
    monkeypatch.setattr(sampled.sampler, "draw", lambda: once)
    losses = [model.calculate_loss(batch()) for model in (full, sampled)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-10, atol=0)
    same_gradients(gradients(sampled, losses[1]), gradients(full, losses[0]))


@pytest.mark.parametrize("softmax", [CHUNKED, UNIFORM])
def test_under_cold_items_training_neither_draws_nor_counts_what_it_never_has(softmax, monkeypatch):
    settings = {**test_msm4sr.NO_DROPOUT, "protocol": "cold-items", "dataset": ColdToys()}
    full, other = test_msm4sr.built(**settings).double(), test_msm4sr.built(**settings, **softmax).double()
    if other.sampler is not None:
        assert set(other.sampler.draw()[0].tolist()) <= set(range(12))
        everything = torch.arange(12), torch.zeros(12, dtype=torch.double)
        monkeypatch.setattr(other.sampler, "draw", lambda: everything)
    interaction = batch()
    interaction["item_id_list"] = interaction["item_id_list"].clamp(max=13)  # 12 and 13 are unseen
    losses = [model.calculate_loss(interaction) for model in (full, other)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-10, atol=0)
    same_gradients(gradients(other, losses[1]), gradients(full, losses[0]))


def test_the_tower_takes_the_items_of_the_batch_and_the_drawn_ones_alone(monkeypatch):
    model = test_msm4sr.built(**{**UNIFORM, "softmax_negatives": 2})
    seen, experts = [], MoEAdaptor.experts
    monkeypatch.setattr(MoEAdaptor, "experts", lambda self, x: (seen.append(len(x)), experts(self, x))[1])
    interaction = batch(lengths=(2, 1))
    model.calculate_loss(interaction).backward()
    known = {*interaction["item_id_list"].flatten().tolist(), *interaction["item_id"].tolist()} - {0}
    assert max(seen) <= len(known) + 2 < N_ITEMS
    assert int((model.item_embedding.weight.grad != 0).any(1).sum()) <= len(known) + 2


@pytest.mark.parametrize("softmax", [CHUNKED, UNIFORM])
@pytest.mark.parametrize(("built", "settings"), CASES)
def test_scores_do_not_depend_on_the_softmax(built, settings, softmax):
    full, other = built(**settings).double().eval(), built(**settings, **softmax).double().eval()
    with torch.no_grad():
        expected, actual = (model.full_sort_predict(batch()) for model in (full, other))
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
        queries, vectors = other.query_and_item_vectors(batch())
        again = other.query_and_item_vectors(batch())[1]
    torch.testing.assert_close((queries @ vectors.T)[:, 1:], expected[:, 1:], rtol=0, atol=1e-12)
    assert again is vectors and other.train().eval()._cached_tower is None


def test_vectors_are_kept_neither_in_training_nor_with_gradients():
    model, asked = test_msm4sr.built(**CHUNKED), batch()
    with torch.no_grad():
        before = model.query_and_item_vectors(asked)[1]
        model.item_embedding.weight += 1
        assert not torch.equal(model.query_and_item_vectors(asked)[1], before)
    assert model.eval().query_and_item_vectors(asked)[1].requires_grad
    with torch.no_grad():
        assert not model.query_and_item_vectors(asked)[1].requires_grad


def test_popularity_is_read_from_the_training_rows():
    class Counted(test_msm4sr.Toys):
        inter_feat = {"item_id": torch.tensor([5, 5, 5, 2])}

    sampler = test_msm4sr.built(dataset=Counted(), **UNIFORM | {"negative_sampling": "popularity"}).sampler
    probabilities = sampler.log_expected.exp() / 40
    assert probabilities[5] == pytest.approx(4 / 24) and probabilities[2] == pytest.approx(2 / 24)
    assert probabilities[0] == pytest.approx(1 / 24)  # padding is a class, as in the full softmax


# ------------------------------------------------ features of 16 bits


def ragged_rows():
    counts = torch.tensor([0, 3, 1, 0, 5, 2] * 60)
    generator = torch.Generator().manual_seed(0)
    rows = (torch.randn(int(counts.sum()), 6, generator=generator) + 1).half()
    return rows, counts.cumsum(0) - counts, counts, torch.zeros(6)


@pytest.mark.parametrize("scale", ["none", "unit", "sqrt_dim", "standardize"])
@pytest.mark.parametrize("items", [None, [4, 1, 3, 301]])
def test_rows_of_16_bits_give_what_a_copy_in_float32_gives(scale, items, monkeypatch):
    monkeypatch.setattr("recbole_mm.model.layers.ROWS_AT_ONCE", 37)
    rows, *rest = ragged_rows()
    torch.manual_seed(0)
    pooling = AttentionPooling(width=6, attention_size=4)
    index = None if items is None else torch.tensor(items)
    pooled = [pooling(FeatureRows(x, *rest, max_rows=4, scale=scale), index) for x in (rows, rows.float())]
    torch.testing.assert_close(*pooled, rtol=1e-5, atol=1e-6)
    direction = torch.randn(pooled[0].shape)
    gradients = [torch.autograd.grad((x * direction).sum(), list(pooling.parameters())) for x in pooled]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_in_autocast_products_of_rows_and_their_gradient_are_those_of_float32():
    rows, (direction, row_ids) = ragged_rows()[0], (torch.randn(6, requires_grad=True), torch.arange(600))
    plain = _RowProducts.apply(rows, row_ids, direction)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = _RowProducts.apply(rows, row_ids, direction)
    torch.testing.assert_close(mixed, plain, rtol=0, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(x.exp().sum(), direction) for x in (mixed, plain)))


def test_statistics_and_means_of_16_bits_are_made_in_float32():
    rows, starts, counts, _ = ragged_rows()
    row_ids, _, _ = segments_of(starts, counts)
    for a, b in zip(mean_and_deviation(rows, row_ids), mean_and_deviation(rows.float(), row_ids), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    torch.testing.assert_close(mean_of_items(rows, starts, counts), mean_of_items(rows.float(), starts, counts))


@pytest.mark.parametrize("missing", ["zero", "mean"])
def test_a_file_of_float16_stays_mapped_if_asked_and_means_the_same(built, tmp_path, missing):
    folder = write_planted(tmp_path / "dataset" / "half")
    tokens = (folder / "features/text.items.txt").read_text().split()
    rows = torch.randn(2 * len(tokens) - 2, 5).half().numpy()
    counts = [2] * (len(tokens) - 1)
    write_feature(folder, "text", tokens=tokens[1:], rows=rows, counts=counts, encoder="e", source="s")
    settings = {"missing_features": missing, "train_stage": "finetune"}
    converted = built("MSM4SR", folder, **settings)[1].vectors("text")
    dataset, *_, model = built("MSM4SR", folder, **settings, float16_features="mapped")[1:]
    mapped = dataset.vectors("text")
    assert (
        mapped.rows.dtype == torch.float16 and model.towers["text"].features.rows.data_ptr() == mapped.rows.data_ptr()
    )
    torch.testing.assert_close(mapped.rows.float(), converted.rows, rtol=0, atol=0)
    torch.testing.assert_close(mapped.fallback, converted.fallback, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dataset.feature("text"), built("MSM4SR", folder, **settings)[1].feature("text"))


# ------------------------------------------------ whole runs

LARGE = {**TINY, "train_stage": "finetune", "epochs": 2, "adaptor_dropout": 0.1, **SAMPLED, "softmax_negatives": 8}


def test_an_evaluation_by_chunks_ranks_as_whole_rows_of_scores_do(built, planted, monkeypatch):
    config, dataset, _, _, test, model = built("MSM4SR", planted, **{**LARGE, **CHUNKED})
    trainer = Trainer(config, model)
    by_chunks, ranks = dict(trainer.evaluate(test, load_best_model=False)), trainer.ranked.rank
    monkeypatch.setattr(FullRanking, "ranks_products", lambda self: False)
    assert dict(trainer.evaluate(test, load_best_model=False)) == by_chunks
    assert torch.equal(trainer.ranked.rank, ranks)
    assert len(tie_order(dataset.field2id_token["item_id"])) == model.n_items


def test_other_metrics_than_ranks_take_scores_of_some_rows(built, planted):
    metrics = {"metrics": ["ItemCoverage", "Recall"], "topk": [5], "valid_metric": "Recall@5"}
    results = []
    for softmax in ({"softmax": "full"}, CHUNKED):
        config, _, train, _, test, model = built("MSM4SR", planted, **{**LARGE, **metrics, **softmax})
        trainer = Trainer(config, model)
        trainer.eval_collector.data_collect(train)
        results.append(dict(trainer.evaluate(test, load_best_model=False)))
    assert results[0] == results[1] and "itemcoverage@5" in results[0]


def test_a_sampled_run_says_so_and_resumes_exactly(planted):
    lazily = {**LARGE, "lazy_item_embedding": True, "epochs": 3}
    whole, short = run("MSM4SR", "planted", settings=lazily), run("MSM4SR", "planted", settings={**lazily, "epochs": 1})
    assert any(
        "sampled softmax, an approximation: 8 items a step, drawn by popularity; item embeddings move only" in warning
        for warning in whole.warnings
    )
    resumed = run(resume=short.checkpoint.replace(".pth", "-last.pth"), settings={"epochs": 3})
    assert resumed.test == whole.test and resumed.stages[-1]["curve"] == whole.stages[-1]["curve"]
    assert checkpoint.load(Path(whole.checkpoint))["state_dict"].keys() >= {"item_embedding.weight"}
    assert whole.latency["single_ms"] > 0


def test_only_the_rows_in_use_of_a_lazy_item_embedding_move(built, planted):
    config, _, train, _, _, model = built("MSM4SR", planted, **LARGE, lazy_item_embedding=True)
    trainer = Trainer(config, model)
    assert isinstance(trainer.optimizer, LazyAdam)
    used, weight, embedding = [], model.item_embedding.weight, MultimodalRecommender.id_rows
    before = weight.detach().clone()
    model.id_rows = lambda table, items: (used.append(items), embedding(model, table, items))[1]
    model.calculate_loss(next(iter(train))).backward()
    assert weight.grad.is_sparse
    trainer.optimizer.step()
    moved = (weight != before).any(1).nonzero().squeeze(1)
    assert set(moved.tolist()) <= set(used[0].tolist())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_decay": 0.1}, "weight_decay is 0.1, which moves every row"),
        ({"learner": "sgd"}, "learner is sgd, expected adam"),
        ({"fused_optimizer": True}, "fused_optimizer moves every row"),
    ],
)
def test_a_lazy_item_embedding_refuses_what_it_cannot_do(planted, settings, message):
    with pytest.raises(SettingError, match=message):
        run("MSM4SR", "planted", settings={**LARGE, "lazy_item_embedding": True, **settings})


def test_a_model_without_item_embedding_refuses_a_lazy_one(planted):
    settings = {**LARGE, "lazy_item_embedding": True, "train_stage": "inductive_ft"}
    settings = {key: value for key, value in settings.items() if key != "adaptor_dropout"}
    with pytest.raises(SettingError, match="UniSRec has no item embedding here"):
        run("UniSRec", "planted", settings=settings)


def test_a_run_of_another_model_refuses_the_sampled_softmax(planted):
    with pytest.raises(SettingError, match="softmax sampled.* does not go with SASRec"):
        run("SASRec", "planted", settings={**TINY, "softmax": "sampled"})
