"""Popularity against counting lines of the file."""

from __future__ import annotations

from collections import Counter

import torch


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
