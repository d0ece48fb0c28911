from __future__ import annotations

import numpy as np
import pytest

from recbole_mm.data.cuts import Cuts, cuts_by_share
from recbole_mm.errors import DatasetError


def test_of_two_equally_near_places_the_later_is_the_cut():
    assert cuts_by_share(np.arange(10.0), valid_share=0.1, test_share=0.1) == (8, 9)
    time = np.array([1, 2, 3, 4, 5, 6, 7, 8, 8, 9.0])
    assert cuts_by_share(time, valid_share=0.1, test_share=0.2).test_from == 9
    assert cuts_by_share(np.array([3, 1] + [2.0] * 8), valid_share=0.1, test_share=0.1) == (2, 3)


def test_cuts_are_told_in_the_unit_of_the_times():
    assert str(Cuts(5.0, 1.5e9)) == "validation from 5, test from 1500000000"


@pytest.mark.parametrize("seed", range(20))
def test_cut_points_by_share_are_the_nearest_moments(seed):
    made = np.random.default_rng(seed)
    time = made.integers(0, made.integers(3, 40), size=100).astype(float)
    cuts = cuts_by_share(time, valid_share=0.15, test_share=0.25)
    moments = np.unique(time)
    n_before = {moment: int((time < moment).sum()) for moment in moments.tolist()}
    wanted = [moment for moment in moments[2:]]
    best = min(wanted, key=lambda moment: (abs(n_before[moment] - 75), -moment))
    assert cuts.test_from == best
    earlier = [moment for moment in moments[1:] if moment < best]
    assert cuts.valid_from == min(earlier, key=lambda moment: (abs(n_before[moment] - 60), -moment))
    assert set(cuts.parts(time).tolist()) == {0, 1, 2}


def test_cut_points_need_three_moments():
    with pytest.raises(DatasetError, match="3 interactions have 2 different times, and three parts need three"):
        cuts_by_share(np.array([1.0, 1.0, 2.0]), valid_share=0.1, test_share=0.1)
