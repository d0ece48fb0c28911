"""What an encoder counts while it encodes, such as texts that were cut."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping


class Counts(Mapping):
    """Whole numbers by name, from 0, kept apart for each thread: every thread sees what it counted itself.

    Several threads may share an encoder, and each wants to know what was counted in its own part of the work.

    Args:
        names: of what is counted.
    """

    def __init__(self, *names: str) -> None:
        self._names, self._here = names, threading.local()

    def _mine(self) -> dict[str, int]:
        if not hasattr(self._here, "numbers"):
            self._here.numbers = dict.fromkeys(self._names, 0)
        return self._here.numbers

    def __getitem__(self, name: str) -> int:
        return self._mine()[name]

    def __setitem__(self, name: str, number: int) -> None:
        self._mine()[name] = number

    def __iter__(self) -> Iterator[str]:
        return iter(self._mine())

    def __repr__(self) -> str:
        return repr(self._mine())

    def __len__(self) -> int:
        return len(self._mine())
