"""Interactions in compact form: whole numbers instead of names, 24 bytes each however long the reviews are."""

from __future__ import annotations

from array import array
from typing import NamedTuple

import numpy as np


class Events(NamedTuple):
    """Who had which item when, in the order of the source.

    Attributes:
        user: [n] int32, position in ``users``.
        item: [n] int32, position in ``items``.
        time: [n] float64, unix seconds.
        line: [n] int64, where it stands in the source, increasing; decides between equal times.
        users, items: names, each once, in the order of first appearance.
        basket: [n] int32, position in ``baskets``, or None.
        baskets: names, or None.
    """

    user: np.ndarray
    item: np.ndarray
    time: np.ndarray
    line: np.ndarray
    users: list[str]
    items: list[str]
    basket: np.ndarray | None = None
    baskets: list[str] | None = None

    @property
    def n(self) -> int:
        """How many interactions there are."""
        return len(self.item)

    def rows(self, wanted: np.ndarray) -> Events:
        """Some of the interactions, by mask or by position; the names stay as they are."""
        basket = None if self.basket is None else self.basket[wanted]
        return self._replace(
            user=self.user[wanted],
            item=self.item[wanted],
            time=self.time[wanted],
            line=self.line[wanted],
            basket=basket,
        )


class EventBuilder:
    """Collects interactions one by one; memory is 24 bytes each (28 with baskets) and the different names.

    Args:
        with_baskets: every interaction has a basket.

    Attributes:
        users, items: positions by name, so far.
    """

    def __init__(self, *, with_baskets: bool = False) -> None:
        self._user, self._item, self._time, self._line = array("i"), array("i"), array("d"), array("q")
        self._basket = array("i") if with_baskets else None
        self.users: dict[str, int] = {}
        self.items: dict[str, int] = {}
        self._baskets: dict[str, int] = {}

    def add(self, user: str, item: str, time: float, line: int, basket: str | None = None) -> None:
        """One interaction; ids have been checked, lines increase."""
        self._user.append(self.users.setdefault(user, len(self.users)))
        self._item.append(self.items.setdefault(item, len(self.items)))
        self._time.append(time)
        self._line.append(line)
        if self._basket is not None:
            self._basket.append(self._baskets.setdefault(basket, len(self._baskets)))

    def __len__(self) -> int:
        return len(self._item)

    def build(self) -> Events:
        """What was collected; the arrays share the builder's memory, so add nothing afterwards."""
        has_baskets = self._basket is not None
        return Events(
            user=np.frombuffer(self._user, dtype=np.int32),
            item=np.frombuffer(self._item, dtype=np.int32),
            time=np.frombuffer(self._time, dtype=np.float64),
            line=np.frombuffer(self._line, dtype=np.int64),
            users=list(self.users),
            items=list(self.items),
            basket=np.frombuffer(self._basket, dtype=np.int32) if has_baskets else None,
            baskets=list(self._baskets) if has_baskets else None,
        )
