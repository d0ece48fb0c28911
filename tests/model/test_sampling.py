"""Negatives: how often each item is drawn, and the correction for it."""

from __future__ import annotations

import pytest
import torch

from recbole_mm.model.sampling import NegativeSampler, sampling_weights


def test_items_are_drawn_as_often_as_their_weights_say():
    torch.manual_seed(0)
    weights = torch.tensor([0.0, 1, 2, 0, 5])
    ids, correction = NegativeSampler(weights, n_drawn=80_000).draw()
    assert ids.tolist() == [1, 2, 4]
    expected = torch.tensor([10_000.0, 20_000, 50_000])
    torch.testing.assert_close(correction.exp(), torch.ones(3), rtol=0, atol=0.05)
    torch.testing.assert_close(correction.exp() * expected, expected, rtol=0.05, atol=0)


def test_a_corrected_sum_is_the_sum_over_all_items_on_average():
    torch.manual_seed(0)
    values, weights = torch.tensor([3.0, 1, 4, 1, 5, 9]), torch.tensor([1.0, 2, 3, 4, 5, 6])
    sampler, sums = NegativeSampler(weights, n_drawn=4), []
    for _ in range(1000):
        ids, correction = sampler.draw()
        assert len(ids) == len(ids.unique()) <= 4
        sums.append((values[ids] * correction.exp()).sum())
    assert abs(torch.stack(sums).mean() - values.sum()) < 1  # three deviations of that mean


def test_the_seed_governs_the_draws_and_nothing_is_saved():
    sampler, drawn = NegativeSampler(torch.ones(1000), n_drawn=50), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(sampler.draw()[0].tolist())
    assert drawn[0] == drawn[1] != drawn[2]
    assert sampler.state_dict() == {} and list(sampler.parameters()) == []


def test_popularity_counts_targets_and_gives_everyone_a_chance():
    can_be_drawn = torch.tensor([True, True, True, False, True])
    targets = torch.tensor([1, 1, 3, 4])
    assert sampling_weights("popularity", targets, can_be_drawn).tolist() == [1, 3, 1, 0, 2]
    assert sampling_weights("uniform", None, can_be_drawn).tolist() == [1, 1, 1, 0, 1]


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="'rare', expected one of popularity, uniform"):
        sampling_weights("rare", None, torch.ones(3, dtype=torch.bool))
    for weights, n_drawn in ((torch.ones(3), 0), (torch.zeros(3), 5), (torch.tensor([1.0, -1]), 5)):
        with pytest.raises(ValueError, match="need one draw and one positive weight at least"):
            NegativeSampler(weights, n_drawn=n_drawn)
