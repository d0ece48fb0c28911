"""Rows of items that have several: against loops over the items."""

from __future__ import annotations

import numpy as np
import torch

from recbole_mm.ragged import BLOCK, mean_and_deviation, segments_of

STARTS, COUNTS = torch.tensor([0, 4, 9, 2, 7]), torch.tensor([0, 2, 3, 1, 0])


def test_rows_of_ragged_items_stand_in_one_list_item_by_item():
    row_ids, segments, offsets = segments_of(STARTS, COUNTS)
    assert row_ids.tolist() == [4, 5, 9, 10, 11, 2]
    assert segments.tolist() == [1, 1, 2, 2, 2, 3]
    assert offsets.tolist() == [0, 0, 2, 5, 6]


def test_items_without_rows_make_an_empty_list():
    row_ids, segments, offsets = segments_of(STARTS, torch.zeros_like(COUNTS))
    assert row_ids.tolist() == segments.tolist() == [] and offsets.tolist() == [0] * 5


def test_mean_and_deviation_are_those_of_the_given_rows():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3 * BLOCK, 4, generator=generator) * 3 + 1000
    row_ids = torch.randperm(len(rows), generator=generator)[: 2 * BLOCK + 5]
    rows[rows.shape[0] - 1], row_ids = 1e9, row_ids[row_ids < len(rows) - 1]
    used = rows[row_ids].double().numpy()
    mean, deviation = mean_and_deviation(rows, row_ids)
    assert mean.dtype == deviation.dtype == torch.float32
    np.testing.assert_allclose(mean, used.mean(0), rtol=1e-7)
    np.testing.assert_allclose(deviation, used.std(0), rtol=1e-6)
    again = mean_and_deviation(rows, row_ids.flip(0))
    assert torch.equal(again[0], mean) and torch.equal(again[1], deviation)


def test_where_all_rows_agree_the_mean_is_exact_and_the_deviation_zero():
    row = torch.tensor([0.1, -1e7, 0.0])
    mean, deviation = mean_and_deviation(row.repeat(700, 1), torch.arange(700))
    assert torch.equal(mean, row) and not deviation.any()


def test_without_rows_mean_and_deviation_are_zero():
    mean, deviation = mean_and_deviation(torch.ones(3, 2), torch.empty(0, dtype=torch.long))
    assert mean.tolist() == deviation.tolist() == [0, 0]
