"""What training rows say of sessions: counts against loops over the sessions themselves."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from recbole_mm.model import counting
from recbole_mm.model.counting import SparseRows, TrainingRows, cosine_neighbours, occurrences, transition_counts

N_ITEMS = 13


def sessions(seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(1, N_ITEMS, size=random.integers(2, 9)).tolist() for _ in range(25)]


def rows_of(sessions: list[list[int]], *, every_prefix: bool, window: int = 20) -> TrainingRows:
    """Rows in random order, each with the newest ``window`` items before its target."""
    rows = []
    for number, items in enumerate(sessions):
        for end in range(1, len(items)) if every_prefix else [len(items) - 1]:
            rows.append((100 - number, items[max(0, end - window) : end], items[end]))
    if every_prefix and window >= 20:
        np.random.default_rng(1).shuffle(rows)
    prefix = torch.zeros(len(rows), window, dtype=torch.long)
    for row, (_, items, _) in enumerate(rows):
        prefix[row, : len(items)] = torch.tensor(items)
    return TrainingRows.of(
        session=torch.tensor([number for number, _, _ in rows]),
        prefix=prefix,
        target=torch.tensor([target for _, _, target in rows]),
    )


def table(counts: dict[tuple[int, int], float]) -> np.ndarray:
    dense = np.zeros((N_ITEMS, N_ITEMS))
    for pair, value in counts.items():
        dense[pair] = value
    return dense


every_kind_of_rows = pytest.mark.parametrize("every_prefix", [True, False], ids=["every prefix", "one row a session"])


@every_kind_of_rows
def test_every_occurrence_counts_once(every_prefix):
    counts = Counter(item for items in sessions() for item in items)
    found = occurrences(rows_of(sessions(), every_prefix=every_prefix), n_items=N_ITEMS)
    assert found.tolist() == [counts[item] for item in range(N_ITEMS)]


@every_kind_of_rows
@pytest.mark.parametrize("pairs_at_once", [1 << 22, 7])
def test_every_pair_of_positions_counts_once(every_prefix, pairs_at_once, monkeypatch):
    monkeypatch.setattr(counting, "PAIRS_AT_ONCE", pairs_at_once)
    counts = Counter()
    for items in sessions():
        for a in range(len(items)):
            for b in range(a + 1, len(items)):
                counts[items[a], items[b]] += 1
    found = transition_counts(rows_of(sessions(), every_prefix=every_prefix), n_items=N_ITEMS)
    np.testing.assert_array_equal(found.toarray(), table(counts))


def test_pairs_beyond_the_window_are_not_seen_and_those_within_count_once():
    counts = Counter()
    for items in sessions():
        for a, b in itertools.combinations(range(len(items)), 2):
            counts[items[a], items[b]] += b - a <= 3
    rows = rows_of(sessions(), every_prefix=True, window=3)
    np.testing.assert_array_equal(transition_counts(rows, n_items=N_ITEMS).toarray(), table(counts))
    assert occurrences(rows, n_items=N_ITEMS).sum() == sum(map(len, sessions()))


def cosines(sessions: list[list[int]]) -> dict[tuple[int, int], float]:
    """Literally: sessions with both, or with two of the same, among those with either."""
    n = Counter(item for items in sessions for item in set(items))
    both = Counter()
    for items in sessions:
        both.update({(a, b) for x, a in enumerate(items) for y, b in enumerate(items) if x != y})
    return {(a, b): together / math.sqrt(n[a] * n[b]) for (a, b), together in both.items()}


@every_kind_of_rows
@pytest.mark.parametrize("pairs_at_once", [1 << 22, 7])
def test_cosines_are_shares_of_sessions(every_prefix, pairs_at_once, monkeypatch):
    monkeypatch.setattr(counting, "PAIRS_AT_ONCE", pairs_at_once)
    rows = rows_of(sessions(), every_prefix=every_prefix)
    found = cosine_neighbours(rows, n_items=N_ITEMS, n_neighbours=0).toarray() / 2**24
    np.testing.assert_allclose(found, table(cosines(sessions())), atol=2**-24)


@every_kind_of_rows
def test_the_nearest_neighbours_are_kept(every_prefix):
    popularity = Counter(item for items in sessions() for item in items)
    kept = {}
    for item in range(1, N_ITEMS):
        mine = [(a, b) for a, b in cosines(sessions()) if a == item]
        mine.sort(key=lambda pair: (-round(cosines(sessions())[pair] * 2**24), -popularity[pair[1]], pair[1]))
        kept |= {pair: cosines(sessions())[pair] for pair in mine[:4]}
    rows = rows_of(sessions(), every_prefix=every_prefix)
    found = cosine_neighbours(rows, n_items=N_ITEMS, n_neighbours=4).toarray() / 2**24
    np.testing.assert_allclose(found, table(kept), atol=2**-24)


def test_of_equal_neighbours_the_more_popular_one_is_kept():
    rows = rows_of([[1, 5], [1, 6], [6, 1], [6, 7], [7, 6]], every_prefix=False)
    both, one = (cosine_neighbours(rows, n_items=N_ITEMS, n_neighbours=n).toarray()[1] for n in (2, 1))
    assert both[5] == both[6] == round(2**24 / math.sqrt(3)) and both.sum() == 2 * both[5]  # 1 / sqrt(3), 2 / sqrt(12)
    assert one[6] == one.sum() == both[6]


def test_the_window_does_not_hide_neighbours():
    narrow, wide = (
        cosine_neighbours(rows_of(sessions(), every_prefix=True, window=window), n_items=N_ITEMS, n_neighbours=0)
        for window in (2, 20)
    )
    np.testing.assert_array_equal(narrow.toarray(), wide.toarray())


@pytest.mark.parametrize("at_once", [1 << 20, 5])
def test_rows_of_a_sparse_matrix_add_up_as_those_of_a_dense_one(at_once, monkeypatch):
    monkeypatch.setattr(counting, "ENTRIES_AT_ONCE", at_once)
    random = np.random.default_rng(0)
    dense = random.integers(1, 50, size=(9, 9)) * (random.random((9, 9)) < 0.4)
    dense[0], dense[4] = 0, 0
    index = torch.tensor([[1, 2, 2], [4, 0, 0], [0, 0, 0], [8, 4, 1]])
    expected = torch.from_numpy(dense)[index].sum(1).double()
    torch.testing.assert_close(SparseRows(csr_matrix(dense)).sum_at(index), expected, rtol=0, atol=0)


def test_the_size_follows_the_pairs_not_the_square_of_the_items():
    rows = rows_of(sessions(), every_prefix=True)
    matrix = SparseRows(transition_counts(rows, n_items=1_000_000))
    n_pairs = transition_counts(rows, n_items=N_ITEMS).nnz
    assert matrix.column.shape == matrix.value.shape == (n_pairs,) and matrix.state_dict() == {}


def test_sums_do_not_depend_on_the_order_of_the_prefix():
    rows = rows_of(sessions(), every_prefix=True)
    neighbours = SparseRows(cosine_neighbours(rows, n_items=N_ITEMS, n_neighbours=0))
    index = torch.randint(1, N_ITEMS, (40, 9))
    one, other = neighbours.sum_at(index), neighbours.sum_at(index[:, torch.randperm(9)])
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["Popularity", "SessionPopularity", "SessionItemKNN", "Transitions"])
def test_a_model_sorts_its_training_rows_once(built, planted, monkeypatch, name):
    of_part, calls = TrainingRows.of_part, []
    monkeypatch.setattr(TrainingRows, "of_part", lambda part: calls.append(1) or of_part(part))
    built(name, planted)
    assert calls == [1]
