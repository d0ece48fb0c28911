"""Full ranking: ranks, ties, metrics and what is kept of each test row, beside literal versions and RecBole's own."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, _known, write_planted
from recbole.trainer import Trainer as RecBoleTrainer

from recbole_mm import evaluation, ranking, records
from recbole_mm.errors import TrainingError
from recbole_mm.evaluation import FullRanking, evaluate_test, scoring_latency, with_full_ranking
from recbole_mm.quick_start import run
from recbole_mm.ranking import RANK_METRICS, rank_products, rank_rows, rank_targets, tie_order, values_of
from recbole_mm.trainer import Trainer

EVERY_METRIC = ["Hit", "Recall", "Precision", "MRR", "NDCG", "MAP"]


def literal_rank(scores: list[float], target: int, order: list[int], candidates: list[bool]) -> int:
    """Items sorted by score, then by the order; where the target stands."""
    items = [item for item in range(1, len(scores)) if candidates[item]]
    return 1 + sorted(items, key=lambda item: (-scores[item], order[item])).index(target)


def literal_metrics(ranked: list[int], relevant: set[int], k: int) -> dict[str, float]:
    """The metrics' definitions for a ranked list and any number of relevant items."""
    hits = [item in relevant for item in ranked[:k]]
    gains = [hit / math.log2(position + 2) for position, hit in enumerate(hits)]
    ideal = [1 / math.log2(position + 2) for position in range(min(len(relevant), k))]
    precisions = [sum(hits[: position + 1]) / (position + 1) for position in range(len(hits))]
    return {
        "hit": float(any(hits)),
        "recall": sum(hits) / len(relevant),
        "precision": sum(hits) / k,
        "mrr": 1 / (hits.index(True) + 1) if any(hits) else 0.0,
        "ndcg": sum(gains) / sum(ideal),
        "map": sum(p for p, hit in zip(precisions, hits, strict=True) if hit) / min(len(relevant), k),
    }


def few_values(n_rows: int, n_items: int, *, n_values: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    """[rows, items + 1] scores with many ties; padding scores highest, which nobody may notice."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(n_values, (n_rows, n_items + 1), generator=generator).to(dtype) - n_values // 2
    scores[:, 0] = torch.inf
    return scores


# ------------------------------------------------ ranks


@pytest.mark.parametrize("n_values", [1, 2, 7, 10**6])
@pytest.mark.parametrize("n_items", [1, 7, 300])
@pytest.mark.parametrize("masked", [False, True])
def test_ranks_are_those_of_a_literal_sort(n_values, n_items, masked):
    scores = few_values(9, n_items, n_values=n_values)
    order = tie_order([f"i{n}" for n in range(n_items + 1)])
    candidates = torch.rand(n_items + 1, generator=torch.Generator().manual_seed(1)) < 0.5 if masked else None
    if masked:
        candidates[0], candidates[1] = False, True
    there = torch.arange(n_items + 1) > 0 if candidates is None else candidates
    targets = there.nonzero().squeeze(1)[torch.arange(9) % int(there.sum())]
    ranked = rank_targets(scores, targets, order, candidates=candidates)
    expected = [
        literal_rank(row.tolist(), target, order.tolist(), there.tolist())
        for row, target in zip(scores, targets.tolist(), strict=True)
    ]
    assert ranked.rank.tolist() == expected
    same = [bool((row[there] == row[there][0]).all()) and int(there.sum()) > 1 for row in scores]
    assert ranked.constant.tolist() == same


def few_vectors(n_rows: int, n_items: int, *, n_values: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and vectors of whole numbers, so that products are exact and, with few values, many are equal."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((n_rows, 3), (n_items + 1, 3))
    queries, vectors = (torch.randint(n_values, size, generator=generator).float() - n_values // 2 for size in sizes)
    vectors[0] = torch.nan  # padding, which nobody may notice
    return queries, vectors


@pytest.mark.parametrize(("n_values", "n_items"), [(1, 1), (1, 40), (2, 40), (1000, 40), (2, 300)])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("masked", [False, True])
def test_ranks_of_products_are_those_of_whole_rows_of_scores(n_values, n_items, chunk, masked, monkeypatch):
    monkeypatch.setattr(ranking, "COMPARED_AT_ONCE", 33 * chunk)  # so that there are several blocks of rows
    queries, vectors = few_vectors(50, n_items, n_values=n_values)
    generator = torch.Generator().manual_seed(1)
    targets, order = torch.randint(1, n_items + 1, (50,), generator=generator), torch.randperm(n_items + 1)
    candidates = None
    if masked:
        candidates = torch.rand(n_items + 1, generator=generator) < 0.5
        candidates[targets] = True
    expected = rank_targets(queries @ vectors.T, targets, order, candidates=candidates)
    actual = rank_products(queries, vectors, targets, order, chunk=chunk, candidates=candidates)
    assert actual.rank.tolist() == expected.rank.tolist()
    assert actual.constant.tolist() == expected.constant.tolist()


def test_a_target_equals_itself_in_products_that_are_rounded():
    generator = torch.Generator().manual_seed(0)
    queries, vectors = (torch.randn(n, 100, generator=generator) for n in (200, 701))
    targets = torch.randint(1, 701, (200,), generator=generator)
    vectors[1:] += queries.mean(0)
    best = 1 + (queries @ vectors[1:].T).argmax(1)
    assert (rank_products(queries, vectors, best, torch.arange(701), chunk=64).rank == 1).all()
    twin = torch.cat([vectors, vectors[1:]])  # every item twice, in another chunk: one of both is first
    ranks = [rank_products(queries, twin, t, torch.arange(1401), chunk=100).rank for t in (targets, targets + 700)]
    assert (ranks[1] - ranks[0] == 1).all()


def test_no_rows_have_no_ranks():
    none, order = torch.empty(0, 3), torch.arange(10)
    for ranked in (
        rank_products(none, torch.ones(10, 3), order[:0], order, chunk=4),
        rank_targets(torch.empty(0, 10), order[:0], order),
    ):
        assert len(ranked.rank) == len(ranked.constant) == 0


def test_a_layer_that_is_called_softmax_is_no_setting():
    trainer = FullRanking()
    for softmax, expected in ((torch.nn.Softmax(dim=1), False), ("full", False), ("chunked", True), ("sampled", True)):
        trainer.model = SimpleNamespace(softmax=softmax)
        assert trainer.ranks_products() == expected


def test_products_that_cannot_be_ranked_are_refused():
    queries, vectors = few_vectors(5, 9, n_values=5)
    order, targets = torch.arange(10), torch.arange(1, 6)
    with pytest.raises(ValueError, match="a target is no candidate"):
        rank_products(queries, vectors, targets, order, chunk=4, candidates=torch.arange(10) > 3)
    queries[3] = torch.inf
    with pytest.raises(TrainingError, match="GRU4Rec gave scores that are not finite, in 1 of 5 rows"):
        rank_products(queries, vectors.abs() + 1, targets, order, chunk=4, name="GRU4Rec")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scores_of_any_width_are_ranked(dtype):
    scores = few_values(50, 40, n_values=9, dtype=dtype)
    targets, order = torch.randint(1, 41, (50,)), tie_order(list(map(str, range(41))))
    expected = rank_targets(scores.float(), targets, order)
    assert rank_targets(scores, targets, order).rank.tolist() == expected.rank.tolist()


def test_ranks_do_not_depend_on_blocks_or_batches(monkeypatch):
    scores, targets = few_values(64, 500, n_values=20), torch.randint(1, 501, (64,))
    order = tie_order([f"i{n}" for n in range(501)])
    whole = rank_targets(scores, targets, order)
    one_by_one = torch.cat([rank_targets(scores[i : i + 1], targets[i : i + 1], order).rank for i in range(64)])
    monkeypatch.setattr(ranking, "COMPARED_AT_ONCE", 1100)
    in_twos = rank_targets(scores, targets, order)
    assert whole.rank.tolist() == one_by_one.tolist() == in_twos.rank.tolist()


def test_scores_are_not_changed_and_may_be_views():
    scores, targets = few_values(4, 30, n_values=5), torch.tensor([1, 2, 3, 4])
    order, before = tie_order(list(map(str, range(31)))), scores.clone()
    expected = rank_targets(scores, targets, order).rank.tolist()
    assert torch.equal(scores, before)
    assert rank_targets(scores.T.contiguous().T, targets, order).rank.tolist() == expected
    same_row = scores[:1].expand(4, -1)
    assert rank_targets(same_row, targets, order).rank.tolist() == [
        literal_rank(scores[0].tolist(), target, order.tolist(), [True] * 31) for target in (1, 2, 3, 4)
    ]


def test_rows_keep_the_positions_that_they_come_with():
    scores, order = few_values(10, 20, n_values=5), tie_order(list(map(str, range(21))))
    targets = torch.arange(1, 11)
    rows = np.random.default_rng(0).permutation(10)
    batches = [(part, torch.from_numpy(part)) for part in np.split(rows, [3, 7])]
    positions, ranked = rank_rows(lambda part: (scores[part], targets[part]), batches, order=order)
    assert positions.tolist() == rows.tolist()
    assert ranked.rank.tolist() == rank_targets(scores, targets, order).rank[rows].tolist()
    positions, ranked = rank_rows(lambda part: (scores[part], targets[part]), [], order=order)
    assert len(positions) == len(ranked.rank) == len(ranked.constant) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_counted_and_refused(bad):
    scores, order = torch.randn(6, 11), tie_order(list(map(str, range(11))))
    scores[1, 4] = scores[4, 10] = bad
    with pytest.raises(
        TrainingError, match="it gave scores that are not finite, in 2 of 6 rows of a batch\n.*learning_rate"
    ):
        rank_targets(scores, torch.ones(6, dtype=torch.long), order, name="it")


def test_large_finite_scores_are_fine_even_where_their_sum_is_not():
    scores = torch.full((2, 9), 3e38)
    scores[:, 5] = 3.1e38
    ranked = rank_targets(scores, torch.tensor([5, 5]), tie_order(list(map(str, range(9)))))
    assert ranked.rank.tolist() == [1, 1] and not ranked.constant.any()


def test_a_target_that_is_no_candidate_is_refused():
    candidates = torch.tensor([False, True, False, True])
    with pytest.raises(ValueError, match="a target is no candidate"):
        rank_targets(torch.randn(1, 4), torch.tensor([2]), tie_order("0123"), candidates=candidates)


# ------------------------------------------------ ties


def test_the_order_among_equal_scores_is_that_of_hashes_of_the_tokens():
    import hashlib

    tokens = ["[PAD]", *(f"i{n}" for n in range(50))]
    order = tie_order(tokens)
    assert sorted(order.tolist()) == list(range(51)) and order[0] == 50
    expected = sorted(tokens[1:], key=lambda token: hashlib.sha256(token.encode()).hexdigest())
    assert [tokens[item] for item in order.argsort().tolist()[:-1]] == expected


def test_ranks_do_not_depend_on_the_numbering_of_items():
    tokens = np.array([f"i{n}" for n in range(40)])
    scores, targets = few_values(30, 40, n_values=3)[:, 1:], np.random.default_rng(0).integers(0, 40, 30)
    ranks = []
    for seed in range(3):
        numbering = np.random.default_rng(seed).permutation(40)
        renumbered = torch.cat([torch.zeros(30, 1), scores[:, numbering]], dim=1)
        where = torch.from_numpy(np.argsort(numbering)[targets]) + 1
        ranks.append(rank_targets(renumbered, where, tie_order(["[PAD]", *tokens[numbering]])).rank.tolist())
    assert ranks[0] == ranks[1] == ranks[2]


def test_a_constant_scorer_gets_what_chance_gives_on_average():
    n_items, k = 25, 10
    totals = {"recall": [], "mrr": []}
    for shop in range(400):  # of other tokens each
        order = tie_order(["[PAD]", *(f"{shop}-{n}" for n in range(n_items))])
        ranked = rank_targets(torch.zeros(4, n_items + 1), torch.tensor([1, 2, 3, 25]), order)
        assert ranked.constant.all()
        for metric, values in totals.items():
            values += values_of(ranked.rank.numpy(), [metric], [k])[f"{metric}@{k}"].tolist()
    chance = {"recall": k / n_items, "mrr": sum(1 / rank for rank in range(1, k + 1)) / n_items}
    for metric, values in totals.items():
        error = np.std(values) / math.sqrt(len(values))
        assert abs(np.mean(values) - chance[metric]) < 4 * error


# ------------------------------------------------ metrics


def test_values_are_the_definitions_of_the_metrics():
    random = np.random.default_rng(0)
    lists = [random.permutation(12).tolist() for _ in range(40)]
    ranks = np.array([1 + ranked.index(0) for ranked in lists])
    values = values_of(ranks, EVERY_METRIC, [1, 3, 5, 12])
    for row, ranked in enumerate(lists):
        for k in (1, 3, 5, 12):
            for metric, expected in literal_metrics(ranked, {0}, k).items():
                assert values[f"{metric}@{k}"][row] == pytest.approx(expected, abs=1e-15)
    assert len(values) == 24 and all(each.dtype == np.float64 for each in values.values())


def test_a_metric_that_is_no_function_of_the_rank_is_refused():
    with pytest.raises(ValueError, match="gauc is no function of the rank; those are hit, recall"):
        values_of(np.array([1]), ["GAUC"], [5])


def random_scores(n_rows: int, n_items: int) -> torch.Tensor:
    return torch.rand(n_rows, n_items, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def evaluated_by(kind: type, built_run, scores: torch.Tensor) -> dict[str, float]:
    config, _, _, _, test, model = built_run
    model.full_sort_predict = lambda batch: scores[batch["user_id"]].clone()
    return dict(kind(config, model).evaluate(test, load_best_model=False))


def test_all_metrics_equal_recbole_s_where_no_scores_are_equal(built, planted):
    settings = {"metrics": EVERY_METRIC, "topk": [1, 3, 10], "valid_metric": "MAP@3", "metric_decimal_place": 14}
    case = built("SASRec", planted, **settings)
    scores = random_scores(61, case[-1].n_items)
    theirs, ours = (evaluated_by(kind, case, scores) for kind in (RecBoleTrainer, Trainer))
    assert list(ours) == list(theirs) and len(ours) == 18
    assert all(abs(ours[key] - value) < 1e-9 for key, value in theirs.items())


def test_metrics_that_need_lists_still_come_from_recbole(built, planted):
    settings = {"metrics": ["ItemCoverage", "Recall", "GAUC"], "topk": [5], "valid_metric": "Recall@5"}
    case = built("SASRec", planted, **settings)
    scores = random_scores(61, case[-1].n_items)
    results = []
    for kind in (RecBoleTrainer, Trainer):
        config, _, train, _, test, model = case
        model.full_sort_predict = lambda batch: scores[batch["user_id"]].clone()
        trainer = kind(config, model)
        trainer.eval_collector.data_collect(train)
        results.append(dict(trainer.evaluate(test, load_best_model=False)))
        assert dict(trainer.evaluate(test, load_best_model=False)) == results[-1]  # nothing is left over
    assert results[0] == results[1] and list(results[1]) == ["itemcoverage@5", "recall@5", "gauc"]


def test_an_evaluation_that_fails_leaves_nothing_to_the_next(built, planted, monkeypatch):
    monkeypatch.setattr(evaluation, "SCORES_AT_ONCE", 7 * 31)
    config, _, _, _, test, model = built("SASRec", planted, metrics=["Recall", "GAUC"])
    scores, batches = random_scores(61, model.n_items), []
    model.full_sort_predict = lambda batch: (batches.append(1), scores[batch["user_id"]].clone())[1]
    trainer = Trainer(config, model)
    whole = dict(trainer.evaluate(test, load_best_model=False))
    good, batches[:] = model.full_sort_predict, []
    model.full_sort_predict = lambda batch: good(batch) * (float("nan") if len(batches) > 2 else 1)
    with pytest.raises(TrainingError, match="not finite"):
        trainer.evaluate(test, load_best_model=False)
    model.full_sort_predict = good
    assert dict(trainer.evaluate(test, load_best_model=False)) == whole


def test_small_blocks_of_rows_change_nothing(built, planted, monkeypatch):
    case = built("SASRec", planted)
    whole = dict(Trainer(case[0], case[-1]).evaluate(case[4], load_best_model=False))
    monkeypatch.setattr(evaluation, "SCORES_AT_ONCE", 7 * 31)
    sizes, score = [], case[-1].full_sort_predict
    case[-1].full_sort_predict = lambda batch: (sizes.append(len(batch)), score(batch))[1]
    trainer = Trainer(case[0], case[-1])
    assert dict(trainer.evaluate(case[4], load_best_model=False)) == pytest.approx(whole, abs=1e-6)
    assert max(sizes) == 7 and sum(sizes) == len(trainer.ranked.rank) == 60


def test_only_candidates_are_ranked(built, tmp_path, monkeypatch):
    folder = write_planted(tmp_path / "dataset" / "wide", n_items=90)
    config, dataset, _, _, test, model = built("SASRec", folder)
    scores = random_scores(61, model.n_items)
    model.full_sort_predict = lambda batch: scores[batch["user_id"]].clone()
    targets = test._dataset.inter_feat["item_id"]
    candidates = torch.zeros(model.n_items, dtype=torch.bool)
    candidates[targets] = True
    assert 20 < candidates.sum() < 70
    monkeypatch.setattr(type(dataset), "candidates", lambda self: candidates)
    trainer = Trainer(config, model)
    trainer.evaluate(test, load_best_model=False)
    order = tie_order(dataset.field2id_token["item_id"]).tolist()
    expected = [
        literal_rank(scores[user].tolist(), int(target), order, candidates.tolist())
        for user, target in zip(test._dataset.inter_feat["user_id"], targets, strict=True)
    ]
    assert trainer.ranked.rank.tolist() == expected


# ------------------------------------------------ the test of a run


@pytest.mark.parametrize("trainer", [Trainer, RecBoleTrainer])  # as a model may bring one of its own
def test_a_run_keeps_the_values_of_each_row(planted, monkeypatch, trainer):
    monkeypatch.setattr("recbole_mm.quick_start._trainer_class", lambda config: trainer)
    record = run("SASRec", "planted", settings={**TINY, "epochs": 1})
    rows = records.read_per_user(Path("results") / record.per_user)
    assert record.per_user == f"per_user/{record.run_id}.npz" and len(rows.rank) == record.n_test == 60
    assert set(rows.values) == set(record.test) == {f"{m}@{k}" for m in ("recall", "ndcg", "mrr") for k in (5, 10)}
    for metric, value in record.test.items():
        assert rows.values[metric].mean() == pytest.approx(value, abs=1e-6)
    for metric, each in values_of(rows.rank, ["Recall", "NDCG", "MRR"], [5, 10]).items():
        np.testing.assert_array_equal(rows.values[metric], each)
    last_of = {}
    for line in (planted / "planted.inter").read_text().splitlines()[1:]:
        user, item, _ = line.split("\t")
        last_of[user] = item
    assert dict(zip(rows.user, rows.target, strict=True)) == last_of


def test_a_run_tells_slices_and_latency(planted):
    record = run("Transitions", "planted", settings=_known("Transitions", TINY))
    assert list(record.slices) == ["popularity", "history", "price", "coverage"] and record.warnings == []
    for bands in record.slices.values():
        assert sum(band["n"] for band in bands.values()) == record.n_test
        for metric, value in record.test.items():
            weighed = sum(band["n"] * band[metric] for band in bands.values()) / record.n_test
            assert weighed == pytest.approx(value, abs=2e-6)
    assert 0 < record.latency["batch_ms_per_user"] < record.latency["single_ms"] < 1000


def test_a_run_that_is_not_recorded_writes_no_values(planted):
    record = run("Popularity", "planted", settings=_known("Popularity", TINY), runs_file=None)
    assert record.per_user == "" and record.slices and not Path("results").exists()


def test_a_run_may_have_no_metric_of_ranks(planted):
    record = run("SASRec", "planted", settings={**TINY, "metrics": ["ItemCoverage"], "valid_metric": "ItemCoverage@5"})
    rows = records.read_per_user(Path("results") / record.per_user)
    assert set(record.test) == {"itemcoverage@5", "itemcoverage@10"} and rows.values == {} and len(rows.rank) == 60


def with_scores(built, folder, scores_of):
    """A trainer of a model that scores so, and the loaders of training and test data."""
    config, _, train, _, test, model = built("SASRec", folder)
    trainer = Trainer(config, model)
    trainer._save_checkpoint(0, verbose=False)
    model.full_sort_predict = lambda batch: scores_of(batch["user_id"].unsqueeze(1), torch.arange(31.0))
    return trainer, test, train


def test_the_same_score_for_every_item_in_some_rows_is_a_warning(built, planted):
    trainer, test, train = with_scores(built, planted, lambda user, item: item * (user > 12))
    outcome = evaluate_test(trainer, test, train)
    assert outcome.warnings == ["12 of 60 test rows got the same score for every item"]


def test_the_same_score_for_every_item_in_all_rows_is_a_warning_and_gives_chance(built, planted):
    trainer, test, train = with_scores(built, planted, lambda user, item: user + 0 * item)
    outcome = evaluate_test(trainer, test, train)
    assert outcome.warnings == ["all 60 test rows got the same score for every item: the metrics are those of chance"]
    order = tie_order(test._dataset.field2id_token["item_id"])
    assert outcome.rows.rank.tolist() == (order[test._dataset.inter_feat["item_id"]] + 1).tolist()


def test_equal_scores_get_the_same_result_in_every_order_of_items(built, planted):
    from recbole_mm.data.files import write_table

    results = []
    for reverse in (False, True):
        lines = [line.split("\t") for line in (planted / "planted.inter").read_text().splitlines()[1:]]
        if reverse:  # users in another order, so that items are numbered otherwise; each history as before
            lines = [line for user in range(59, -1, -1) for line in lines if line[0] == f"u{user}"]
            user, item, time = zip(*lines, strict=True)
            columns = {"user_id:token": user, "item_id:token": item, "timestamp:float": list(map(float, time))}
            write_table(planted / "planted.inter", columns)
        config, dataset, _, _, test, model = built("SASRec", planted)
        price = torch.tensor([0.0, *(int(token[1:]) % 4 for token in dataset.field2id_token["item_id"][1:])])
        model.full_sort_predict = lambda batch, price=price: price.repeat(len(batch), 1)
        results.append((dict(Trainer(config, model).evaluate(test, load_best_model=False)), price.tolist()))
    assert results[0][0] == results[1][0] and results[0][1] != results[1][1]


def test_latency_asks_for_scores_of_blocks_and_of_single_rows(built, planted):
    config, _, _, _, test, model = built("MSM4SR", planted)
    trainer, sizes, towers = Trainer(config, model), [], []
    score, tower = model.scores, model.item_tower
    model.scores = lambda items, item_seq, length: (sizes.append(len(item_seq)), score(items, item_seq, length))[1]
    model.item_tower = lambda: (towers.append(1), tower())[1]
    latency = scoring_latency(trainer, test)
    assert set(latency) == {"batch_ms_per_user", "single_ms"} and all(value > 0 for value in latency.values())
    assert set(sizes) == {60, 1} and len(towers) == 1  # made once, before the clock starts


def test_a_trainer_of_recbole_s_own_ranks_as_ours_does(built, planted):
    case = built("SASRec", planted)
    kind = with_full_ranking(RecBoleTrainer)
    assert kind.__name__ == "Trainer" and issubclass(kind, RecBoleTrainer) and with_full_ranking(kind) is kind
    assert with_full_ranking(Trainer) is Trainer
    scores = random_scores(61, case[-1].n_items)
    assert evaluated_by(kind, case, scores) == evaluated_by(Trainer, case, scores)


def test_the_metrics_that_ranks_give_are_known_to_recbole():
    from recbole.evaluator import metrics_dict

    assert set(RANK_METRICS) <= set(metrics_dict)
    assert {name for name, metric in metrics_dict.items() if metric.metric_need == ["rec.topk"]} == set(RANK_METRICS)
