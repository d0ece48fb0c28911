"""Paired statistics of the values of single test rows.

Two rows of a board are compared on the same test rows: the values of each one are averaged over its seeds, and the
differences are what is tested. A positive difference means that the first one is better.

    mean      of the differences over all test rows: the difference of the two printed means
    interval  paired bootstrap over users, all test rows of a user drawn together
    p         Wilcoxon's signed-rank test over users, two-sided; the sign of the mean tells the direction, and where
              the ranks point the other way (many small losses, a few large gains) p is 1: nothing is shown
    p_holm    corrected for all comparisons of one family by Holm's method

The values speak of these seeds: they say how sure a difference is on other users, not with other seeds. Intervals are
those of single comparisons, not corrected for their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from recbole_mm.errors import DatasetError
from recbole_mm.records import read_per_user

N_RESAMPLES = 2000
SEED = 2020  # of the bootstrap: the same runs give the same intervals
LEVEL = 0.95
_EXACT_UP_TO = 50  # pairs; as SciPy does, where no two differences are tied
_DECIMALS = 6  # differences that are equal but for the rounding of float32 are equal
_BLOCK = 1 << 23  # draws at a time


class TestValues(NamedTuple):
    """What one row of a board reached on each test row, averaged over its seeds.

    Attributes:
        user: [R] user or session tokens.
        target: [R] item tokens.
        values: [R] float32 each, by metric.
    """

    __test__ = False  # no test, whatever its name says to pytest

    user: np.ndarray
    target: np.ndarray
    values: dict[str, np.ndarray]


class Comparison(NamedTuple):
    """Mean difference with its interval, and the p-value of the signed-rank test."""

    mean: float
    low: float
    high: float
    p: float


def averaged_over_seeds(files: Sequence[Path]) -> TestValues:
    """Mean values of each test row over the files of several seeds.

    Only metrics that all files have are kept.

    Raises:
        DatasetError: a file is missing or broken, has values that are not finite, or was made on other test rows.
    """
    user = target = np.empty(0)
    sums: dict[str, np.ndarray] = {}
    for number, file in enumerate(files):
        rows = read_per_user(file)
        for metric, values in rows.values.items():
            if not np.isfinite(values).all():
                raise DatasetError(f"{Path(file).name}: {metric} is not a finite number for every test row")
        if number == 0:
            user, target, sums = rows.user, rows.target, {name: v.astype(np.float64) for name, v in rows.values.items()}
            continue
        if not same_rows(TestValues(user, target, {}), TestValues(rows.user, rows.target, {})):
            raise DatasetError(f"{Path(file).name} was made on other test rows than {Path(files[0]).name}")
        sums = {metric: total + rows.values[metric] for metric, total in sums.items() if metric in rows.values}
    return TestValues(user, target, {metric: (v / len(files)).astype(np.float32) for metric, v in sums.items()})


def same_rows(one: TestValues, other: TestValues) -> bool:
    """Whether both were made on the same test rows in the same order."""
    return all(a is b or np.array_equal(a, b) for a, b in ((one.user, other.user), (one.target, other.target)))


def compare(
    comparisons: Sequence[tuple[TestValues, TestValues, str]], *, n_resamples: int = N_RESAMPLES, seed: int = SEED
) -> list[Comparison]:
    """Compare the first of each pair with the second by a metric, all on the same test rows and resamples.

    Time grows with n_resamples × users × comparisons (a matrix product); memory is that of the differences, float32
    [users, comparisons], and a block of draws.

    Raises:
        ValueError: the pairs were made on different test rows.
    """
    if not comparisons:
        return []
    sums, p, counts = _tested(comparisons)
    means = sums.sum(axis=0, dtype=np.float64) / counts.sum()
    low, high = bootstrap_intervals(sums, counts, n_resamples=n_resamples, seed=seed)
    means, low, high = (values.round(_DECIMALS).tolist() for values in (means, low, high))
    return [Comparison(*row) for row in zip(means, low, high, p, strict=True)]


def p_values(comparisons: Sequence[tuple[TestValues, TestValues, str]]) -> list[float]:
    """Wilcoxon's p-value of each pair with its metric, as in `compare`, without intervals."""
    return _tested(comparisons)[1] if comparisons else []


def _tested(comparisons: Sequence[tuple[TestValues, TestValues, str]]) -> tuple[np.ndarray, list[float], np.ndarray]:
    """Sums of the differences by user [U, C], p-values, and test rows of each user [U]."""
    first = comparisons[0][0]
    if not all(same_rows(first, other) for one, two, _ in comparisons for other in (one, two)):
        raise ValueError("values of different test rows cannot be compared")
    users = _users(first.user)
    sums = np.empty((users.n, len(comparisons)), dtype=np.float32)
    p = []
    for column, (one, two, metric) in enumerate(comparisons):
        total = users.sums(one.values[metric].astype(np.float64) - two.values[metric])
        sums[:, column] = total
        p_value, lean = signed_ranks(total / users.counts)
        p.append(1.0 if lean * total.sum() < 0 else p_value)
    return sums, p, users.counts


class _Users(NamedTuple):
    """Which test rows belong to which user."""

    index: np.ndarray | None  # [R], None where every row is a user of its own
    counts: np.ndarray  # [U]

    @property
    def n(self) -> int:
        return len(self.counts)

    def sums(self, values: np.ndarray) -> np.ndarray:
        """[R] -> [U]"""
        return values if self.index is None else np.bincount(self.index, weights=values, minlength=self.n)


def _users(user: np.ndarray) -> _Users:
    _, index, counts = np.unique(user, return_inverse=True, return_counts=True)
    if len(counts) == len(user):
        return _Users(None, np.ones(len(user)))
    return _Users(index.ravel(), counts.astype(np.float64))


# ------------------------------------------------ the methods


def signed_ranks(differences: np.ndarray) -> tuple[float, float]:
    """Wilcoxon's signed-rank test: two-sided p-value, 1 where no difference is left, and which way the ranks lean.

    Differences of zero are left out, ties share their mean rank. Equal to `scipy.stats.wilcoxon`, in a fraction of the
    time, because a board asks some ten thousand times; small samples without ties go to SciPy's exact distribution.
    """
    from scipy import special

    rounded = np.round(differences, _DECIMALS)
    rounded = rounded[rounded != 0]
    n = len(rounded)
    if n == 0:
        return 1.0, 0.0
    size, index, counts = np.unique(np.abs(rounded), return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks = (ends - (counts - 1) / 2)[index.ravel()]
    lean = float(ranks[rounded > 0].sum() - n * (n + 1) / 4)
    if n <= _EXACT_UP_TO and len(size) == n == len(differences):
        from scipy import stats  # slow to import, seldom needed

        return float(stats.wilcoxon(rounded).pvalue), lean
    ties = (counts.astype(np.float64) ** 3 - counts).sum()
    variance = (n * (n + 1) * (2 * n + 1) - ties / 2) / 24
    return float(min(1.0, 2 * special.ndtr(-abs(lean) / np.sqrt(variance)))), lean


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction of one family: the chance of any false alarm stays below the level that is looked at."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return corrected.tolist()


def bootstrap_intervals(
    sums: np.ndarray,
    counts: np.ndarray,
    *,
    n_resamples: int = N_RESAMPLES,
    seed: int = SEED,
    level: float = LEVEL,
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile intervals of the mean over test rows, users drawn with replacement.

    Args:
        sums: [U, C] of each user's test rows, for C quantities that are drawn together.
        counts: [U] test rows of each user.

    Returns:
        Lower and upper end, [C] each.
    """
    n, random = len(sums), np.random.default_rng(seed)
    sums = np.ascontiguousarray(sums, dtype=np.float32)
    weights = np.asarray(counts, dtype=np.float64)
    at_once = max(1, _BLOCK // n)
    means = np.empty((n_resamples, sums.shape[1]))
    for start in range(0, n_resamples, at_once):
        b = min(at_once, n_resamples - start)
        drawn = random.integers(0, n, size=(b, n))
        drawn += n * np.arange(b)[:, None]
        times = np.bincount(drawn.ravel(), minlength=b * n).reshape(b, n)  # how often each user was drawn
        means[start : start + b] = (times.astype(np.float32) @ sums) / (times @ weights)[:, None]
    tail = 50 * (1 - level)
    low, high = np.percentile(means, [tail, 100 - tail], axis=0)
    return low, high
