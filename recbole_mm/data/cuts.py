"""Two moments that part a dataset into training, validation and test."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from recbole_mm.errors import DatasetError


class Cuts(NamedTuple):
    """Two moments, in the unit of the timestamps, that part a dataset.

    Attributes:
        valid_from: what is before it is training.
        test_from: what is at it or after it is test.
    """

    valid_from: float
    test_from: float

    def parts(self, time: np.ndarray) -> np.ndarray:
        """0 for training, 1 for validation, 2 for test, of each time, int64; equal times are never parted."""
        return (time >= self.valid_from).astype(np.int64) + (time >= self.test_from)

    def __str__(self) -> str:
        return f"validation from {self.valid_from:.15g}, test from {self.test_from:.15g}"


def cuts_by_share(time: np.ndarray, *, valid_share: float, test_share: float, what: str = "interactions") -> Cuts:
    """Cut points, where the time changes, nearest to the shares; of two equally near ones the later. O(n log n).

    Args:
        what: has these times, for messages.

    Raises:
        DatasetError: fewer than three different times.
    """
    time = np.sort(time)
    changes = np.flatnonzero(np.diff(time)) + 1  # positions where another time begins
    n, n_test, n_valid = len(time), int(len(time) * test_share + 0.5), int(len(time) * valid_share + 0.5)
    if len(changes) < 2:
        raise DatasetError(
            f"{n} {what} have {len(np.unique(time))} different times, and three parts need three; "
            "use the protocol leave-one-out"
        )
    test, _ = boundary(changes, wanted=n - n_test, low=changes[1], high=n - 1)
    valid, _ = boundary(changes, wanted=n - n_test - n_valid, low=1, high=test - 1)
    return Cuts(float(time[valid]), float(time[test]))


def boundary(changes: np.ndarray, *, wanted: int, low: int, high: int) -> tuple[int, bool]:
    """How many come before a part: where the time changes, nearest to the number wanted, the later of two.

    True if there is no such place in low..high; the boundary then parts equal times.
    """
    possible = changes[(changes >= low) & (changes <= high)][::-1]
    if not len(possible):
        return min(max(wanted, low), high), True
    return int(possible[np.argmin(np.abs(possible - wanted))]), False
