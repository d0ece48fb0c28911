"""Paired tests and intervals: the right direction, the stated error rates, equal to literal versions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from recbole_mm.errors import DatasetError
from recbole_mm.leaderboard.statistics import (
    TestValues,
    averaged_over_seeds,
    bootstrap_intervals,
    compare,
    holm,
    p_values,
    same_rows,
    signed_ranks,
)
from recbole_mm.records import PerUser, write_per_user

METRIC = "ndcg@10"


def rows(values: np.ndarray, users: list | None = None) -> TestValues:
    tokens = np.array(users if users is not None else [f"u{n}" for n in range(len(values))])
    return TestValues(tokens, np.array([f"i{n}" for n in range(len(values))]), {METRIC: values.astype(np.float32)})


def gains(random: np.random.Generator, n: int, size: int = 100) -> np.ndarray:
    """Values as a metric has them: many zeros, few levels."""
    rank = random.integers(1, size, size=n)
    return np.where(rank <= 10, 1 / np.log2(rank + 1), 0.0)


def write(path: Path, values: list[float], *, users: tuple = ("u", "v", "w"), metric: str = METRIC) -> Path:
    write_per_user(path, PerUser(np.array(users), np.array(["a", "b", "c"]), np.arange(3), {metric: np.array(values)}))
    return path


# ------------------------------------------------ direction and error rates


def test_a_model_that_is_better_has_a_positive_difference_and_a_small_p():
    random = np.random.default_rng(0)
    base = gains(random, 500)
    ours = np.where(random.random(500) < 0.3, 1.0, base)
    better, worse = compare([(rows(ours), rows(base), METRIC), (rows(base), rows(ours), METRIC)])
    assert better.mean > 0 and better.low > 0 and better.p < 1e-6
    assert worse.mean == -better.mean and worse.high < 0 and worse.p == better.p
    assert better.mean == pytest.approx((ours - base).mean(), abs=1e-6)


def test_identical_models_are_called_different_as_often_as_the_level_says():
    random = np.random.default_rng(1)
    pairs = [(rows(gains(random, 200, 30)), rows(gains(random, 200, 30)), METRIC) for _ in range(400)]
    found = compare(pairs, n_resamples=400)
    expected = stats.binom(400, 0.05)
    low, high = expected.ppf(0.001), expected.ppf(0.999)
    assert low <= sum(one.p < 0.05 for one in found) <= high
    assert low <= sum(one.low > 0 or one.high < 0 for one in found) <= expected.ppf(0.9999)


def test_a_family_of_identical_models_rarely_raises_any_alarm():
    random = np.random.default_rng(2)
    alarms = 0
    for _ in range(100):
        base = rows(gains(random, 100, 30))
        p = p_values([(rows(gains(random, 100, 30)), base, METRIC) for _ in range(8)])
        alarms += min(holm(p)) < 0.05
    assert alarms <= stats.binom(100, 0.05).ppf(0.999)


def test_intervals_hold_the_true_mean_as_often_as_they_say():
    random = np.random.default_rng(3)
    n, n_repeats = 150, 400
    values = np.where(random.random((n, n_repeats)) < 0.3, random.exponential(size=(n, n_repeats)), 0.0)
    low, high = bootstrap_intervals(values, np.ones(n), n_resamples=600)
    held = int(((low <= 0.3) & (high >= 0.3)).sum())
    assert stats.binom(n_repeats, 0.92).ppf(0.001) <= held <= stats.binom(n_repeats, 0.97).ppf(0.999)


def test_users_with_many_rows_widen_the_interval():
    random = np.random.default_rng(4)
    per_user = random.normal(size=50)
    values = np.repeat(per_user, 20)  # the rows of a user say the same twenty times
    nothing = rows(np.zeros(1000))
    (alone,) = compare([(rows(values), nothing, METRIC)])
    users = [f"u{n // 20}" for n in range(1000)]
    (together,) = compare([(rows(values, users), rows(np.zeros(1000), users), METRIC)])
    assert together.mean == alone.mean
    assert (together.high - together.low) / (alone.high - alone.low) == pytest.approx(20**0.5, rel=0.2)
    assert together.p == pytest.approx(stats.wilcoxon(per_user.round(6)).pvalue)


def test_users_with_different_numbers_of_rows_give_the_mean_over_rows():
    (one,) = compare(
        [(rows(np.array([1.0, 0, 0, 0]), ["u", "v", "v", "v"]), rows(np.zeros(4), ["u", "v", "v", "v"]), METRIC)]
    )
    assert one.mean == 0.25


# ------------------------------------------------ the methods


@pytest.mark.parametrize("n", [7, 30, 50, 51, 400])
@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_wilcoxon_equals_scipy_s(n, shift):
    values = np.random.default_rng(n).normal(shift, 1, size=n).round(5)
    assert signed_ranks(values)[0] == pytest.approx(stats.wilcoxon(values).pvalue, rel=1e-9)


def test_wilcoxon_with_ties_and_zeros_equals_scipy_s():
    values = np.random.default_rng(5).normal(0.2, 1, size=300).round(0)
    assert (values == 0).any()
    assert signed_ranks(values)[0] == pytest.approx(stats.wilcoxon(values).pvalue, rel=1e-9)


def test_wilcoxon_of_no_difference_is_one():
    assert signed_ranks(np.zeros(20))[0] == 1.0
    assert signed_ranks(np.full(20, 1e-9))[0] == 1.0  # rounding of float32 is no difference


def test_ranks_that_point_the_other_way_than_the_mean_show_nothing():
    values = np.r_[np.full(90, -0.01), np.full(10, 0.5)]  # many small losses, a few large gains
    assert stats.wilcoxon(values).pvalue < 1e-5 and values.mean() > 0
    one, two = rows(np.maximum(values, 0)), rows(np.maximum(-values, 0))
    for first, second in ((one, two), (two, one)):
        (found,) = compare([(first, second, METRIC)])
        assert found.p == 1.0 and abs(found.mean) == pytest.approx(0.041)
    assert p_values([(one, two, METRIC)]) == [1.0]


def literal_holm(p: list[float]) -> list[float]:
    """Step down: the k-th smallest of m times m − k + 1, never below one before it, at most 1."""
    corrected, before = [0.0] * len(p), 0.0
    for k, index in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        before = max(before, min(1.0, p[index] * (len(p) - k)))
        corrected[index] = before
    return corrected


def test_holm_equals_a_literal_version():
    random = np.random.default_rng(6)
    for n in (0, 1, 2, 5, 30):
        p = random.random(n).round(1).tolist()
        assert holm(p) == pytest.approx(literal_holm(p))
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_intervals_equal_a_literal_bootstrap():
    random = np.random.default_rng(7)
    values = random.exponential(size=(60, 1))
    low, high = bootstrap_intervals(values, np.ones(60), n_resamples=4000)
    means = [random.choice(values[:, 0], size=60).mean() for _ in range(4000)]
    assert [low[0], high[0]] == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.02)


def test_intervals_do_not_depend_on_the_size_of_a_block(monkeypatch):
    values = np.random.default_rng(8).random((40, 3))
    whole = bootstrap_intervals(values, np.ones(40), n_resamples=100)
    monkeypatch.setattr("recbole_mm.leaderboard.statistics._BLOCK", 40 * 7)
    np.testing.assert_allclose(bootstrap_intervals(values, np.ones(40), n_resamples=100), whole, rtol=1e-6)


def test_the_same_values_give_the_same_intervals():
    random = np.random.default_rng(9)
    pair = (rows(gains(random, 100)), rows(gains(random, 100)), METRIC)
    assert compare([pair]) == compare([pair])
    assert compare([]) == [] and p_values([]) == []


# ------------------------------------------------ values of several seeds


def test_values_are_averaged_over_seeds_row_by_row(tmp_path):
    files = [write(tmp_path / "1.npz", [0, 1, 0.5]), write(tmp_path / "2.npz", [1, 1, 0])]
    np.testing.assert_allclose(averaged_over_seeds(files).values[METRIC], [0.5, 1, 0.25])


def test_a_metric_that_one_seed_lacks_is_left_out(tmp_path):
    files = [write(tmp_path / "1.npz", [0, 1, 0.5]), write(tmp_path / "2.npz", [1, 1, 0], metric="mrr@10")]
    assert averaged_over_seeds(files).values == {}


def test_seeds_with_other_test_rows_are_refused(tmp_path):
    files = [write(tmp_path / "1.npz", [0, 1, 0.5]), write(tmp_path / "2.npz", [1, 1, 0], users=("u", "w", "v"))]
    with pytest.raises(DatasetError, match=r"2\.npz was made on other test rows than 1\.npz"):
        averaged_over_seeds(files)


def test_values_that_are_not_finite_are_refused(tmp_path):
    with pytest.raises(DatasetError, match=r"1\.npz: ndcg@10 is not a finite number for every test row"):
        averaged_over_seeds([write(tmp_path / "1.npz", [0, float("nan"), 0.5])])


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="cannot read the values of single users"):
        averaged_over_seeds([tmp_path / "none.npz"])


@pytest.mark.parametrize("damage", ["half", "bits", "text", "users", "none", "single"])
def test_a_broken_file_is_refused(tmp_path, damage):
    path = write(tmp_path / "a.npz", [0, 1, 1])
    content = path.read_bytes()
    if damage == "half":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "bits":
        for number in range(40, len(content), 29):
            path.write_bytes(content[:number] + bytes([content[number] ^ 255]) + content[number + 1 :])
            try:
                averaged_over_seeds([path])  # what zip files do not check is allowed to go unseen
            except DatasetError as error:
                assert "run that run again" in str(error)
        return
    else:
        columns = {
            "user": ["u", "v"],
            "target": ["a", "b"],
            "rank": [1, 2],
            "metrics": [METRIC],
            "values": [[0.0, 1.0]],
        }
        columns |= {"text": {"values": [["a", "b"]]}, "users": {"user": ["u"]}, "none": {"metrics": 5}}.get(damage, {})
        columns |= {"single": {"user": 5}}.get(damage, {})
        np.savez(path, **{name: np.array(column) for name, column in columns.items()})
    with pytest.raises(DatasetError, match="cannot read the values of single users in .*a.npz: .*; run that run again"):
        averaged_over_seeds([path])


def test_different_test_rows_are_not_compared():
    one, other = rows(np.zeros(3)), rows(np.zeros(3), ["x", "y", "z"])
    assert not same_rows(one, other)
    for function in (compare, p_values):
        with pytest.raises(ValueError, match="different test rows"):
            function([(one, other, METRIC)])
