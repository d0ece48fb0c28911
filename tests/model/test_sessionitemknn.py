"""SessionItemKNN against loops over the lines of the file."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import TINY

from recbole_mm.errors import SettingError


@pytest.mark.parametrize("n_neighbours", [0, 3])
def test_scores_are_summed_cosines_then_popularity(built, planted, n_neighbours):
    _, dataset, _, valid, _, model = built("SessionItemKNN", planted, n_neighbours=n_neighbours)
    by_user: dict[str, list[str]] = {}
    for line in (planted / "planted.inter").read_text().splitlines()[1:]:
        user, item, _ = line.split("\t")
        by_user.setdefault(user, []).append(item)
    sessions = [items[:-2] for items in by_user.values()]  # without validation and test items
    n_sessions = Counter(item for items in sessions for item in set(items))  # nobody takes an item twice here
    both = Counter((a, b) for items in sessions for a in items for b in items if a != b)
    tokens = [str(token) for token in dataset.id2token("item_id", np.arange(1, model.n_items))]

    def cosine(a: str, b: str) -> float:
        return both[a, b] / math.sqrt(n_sessions[a] * n_sessions[b])

    near = {}
    for a in tokens:
        ranked = sorted((b for b in tokens if both[a, b]), key=lambda b: (-round(2**24 * cosine(a, b)), -n_sessions[b]))
        near[a] = ranked[: n_neighbours or None]
        if n_neighbours and len(ranked) > n_neighbours:  # else equal neighbours at the cut need one more rule
            last, next_one = ranked[n_neighbours - 1 : n_neighbours + 1]
            if (cosine(a, last), n_sessions[last]) == (cosine(a, next_one), n_sessions[next_one]):
                near[a] = None
    batch = next(iter(valid))[0]
    scores, n_checked = model.full_sort_predict(batch)[:, 1:], 0
    for row, (seq, length) in enumerate(zip(batch[model.ITEM_SEQ], batch[model.ITEM_SEQ_LEN], strict=True)):
        prefix = [str(token) for token in dataset.id2token("item_id", seq[:length].numpy())]
        if any(near[a] is None for a in prefix):
            continue
        n_checked += 1
        sums = torch.tensor([sum(cosine(a, b) for a in prefix if b in near[a]) for b in tokens], dtype=torch.double)
        popularity = torch.tensor([n_sessions[b] for b in tokens], dtype=torch.double)
        exact = (scores[row].exp() - 1) / 2**24
        torch.testing.assert_close(exact, sums + popularity / (popularity.max() + 1) / 2**24, rtol=0, atol=1e-6)
        rest = sums == 0
        torch.testing.assert_close(scores[row][rest], (popularity / (popularity.max() + 1))[rest].log1p())
    assert n_checked >= (len(batch) if n_neighbours == 0 else 1)


def test_a_negative_number_of_neighbours_is_refused(built, planted):
    with pytest.raises(SettingError, match="n_neighbours must be >= 0, found -1"):
        built("SessionItemKNN", planted, **TINY, n_neighbours=-1)
