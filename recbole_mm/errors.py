"""What can be wrong with what a user gives us.

RecBoleMMError
├── DatasetError      data on disk: a folder, file, row or feature
│   └── UnsafeFileError   a file that would run code when it is read
├── SettingError      a setting, model name, dataset name or command-line argument
├── CheckpointError   a checkpoint that cannot be read, is not ours, or does not fit
└── TrainingError     training or evaluation cannot go on

A wrong argument in a direct call of a function is Python's own ``ValueError``.
"""

from __future__ import annotations

from collections.abc import Iterable


class RecBoleMMError(Exception):
    """Base class: its message tells what was found, what was expected and what to do."""


class DatasetError(RecBoleMMError):
    """Something is wrong with data on disk."""


class UnsafeFileError(DatasetError):
    """A file was refused because reading it could run code that somebody put there."""


class SettingError(RecBoleMMError):
    """Something is wrong with a setting."""


class CheckpointError(RecBoleMMError):
    """A checkpoint cannot be used."""


class TrainingError(RecBoleMMError):
    """Training or evaluation cannot go on, such as after a loss of NaN."""


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the known name closest to ``name``, else an empty string."""
    from difflib import get_close_matches

    by_lower = {k.lower(): k for k in known}
    matches = get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return f"; did you mean {by_lower[matches[0]]!r}?" if matches else ""
