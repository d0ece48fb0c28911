"""What can be wrong with what a user gives us.

                                                                                        exit code
RecBoleMMError                                                                              1
├── DatasetError      data on disk: a folder, file, row or feature                          3
│   └── UnsafeFileError   a file that would run code when it is read                        6
├── SettingError      a setting, model name, dataset name or command-line argument          2
├── CheckpointError   a checkpoint that cannot be read, is not ours, or does not fit        6
└── TrainingError     training or evaluation cannot go on                                   1

The commands end with these codes, with 4 if the machine gives up (disk, rights, memory), and with 5 if interrupted.
A wrong argument in a direct call of a function is Python's own ``ValueError``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

EXIT_MACHINE, EXIT_INTERRUPTED = 4, 5


class RecBoleMMError(Exception):
    """Base class: its message tells what was found, what was expected and what to do."""

    exit_code = 1


class DatasetError(RecBoleMMError):
    """Something is wrong with data on disk."""

    exit_code = 3


class UnsafeFileError(DatasetError):
    """A file was refused because reading it could run code that somebody put there."""

    exit_code = 6


class SettingError(RecBoleMMError):
    """Something is wrong with a setting."""

    exit_code = 2


class CheckpointError(RecBoleMMError):
    """A checkpoint cannot be used."""

    exit_code = 6


class TrainingError(RecBoleMMError):
    """Training or evaluation cannot go on, such as after a loss of NaN."""


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the known name closest to ``name``, else an empty string."""
    from difflib import get_close_matches

    by_lower = {k.lower(): k for k in known}
    matches = get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return f"; did you mean {by_lower[matches[0]]!r}?" if matches else ""


def exit_code_of(error: RecBoleMMError | OSError | MemoryError) -> int:
    """Tell an error on stderr, of a user's or of the machine's (which file, if one, and why); the code to end with."""
    if isinstance(error, RecBoleMMError):
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    file = getattr(error, "filename", None)
    reason = getattr(error, "strerror", None) or str(error) or "out of memory"
    print(f"the machine gave up: {f'{file}: ' if file else ''}{reason}", file=sys.stderr)
    return EXIT_MACHINE
