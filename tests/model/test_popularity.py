"""Popularity against counting lines of the file."""

from __future__ import annotations

from collections import Counter

import torch

from recbole_mm.model import find_model


def test_scores_count_the_training_interactions(built, planted):
    _, dataset, _, valid, _, model = built("Popularity", planted)
    by_user: dict[str, list[str]] = {}
    for line in (planted / "planted.inter").read_text().splitlines()[1:]:
        user, item, _ = line.split("\t")
        by_user.setdefault(user, []).append(item)
    counts = Counter(item for items in by_user.values() for item in items[:-2])  # without validation and test items
    (batch, *_) = next(iter(valid))
    scores = model.full_sort_predict(batch)
    expected = [counts[str(token)] for token in dataset.id2token("item_id", torch.arange(1, model.n_items).numpy())]
    for row in scores[:, 1:]:
        torch.testing.assert_close(row, torch.tensor(expected).float().log1p())


def test_scores_count_prefixes_and_targets_of_a_split_folder(built, splits):
    _, dataset, _, valid, _, model = built("Popularity", splits)
    rows = [line.split("\t") for line in (splits / "splits.train.inter").read_text().splitlines()[1:]]
    counts = Counter(item for _, prefix, target in rows for item in [*prefix.split(" "), target])
    scores = model.full_sort_predict(next(iter(valid))[0])
    expected = [counts[str(token)] for token in dataset.id2token("item_id", torch.arange(1, model.n_items).numpy())]
    torch.testing.assert_close(scores[0, 1:], torch.tensor(expected).float().log1p())


def test_recbole_s_name_finds_it():
    assert find_model("Pop") is find_model("popularity") is find_model("Popularity")
