"""Interactions in compact form: what goes in comes out."""

from __future__ import annotations

import random

import numpy as np

from dataset_prep.events import EventBuilder


def test_what_is_added_is_built_in_the_same_order():
    draw = random.Random(1)
    rows = [(f"u{draw.randrange(9)}", f"i{draw.randrange(9)}", draw.random(), 3 * line) for line in range(200)]
    builder = EventBuilder()
    for row in rows:
        builder.add(*row)
    events = builder.build()
    users, items = (
        [names[code] for code in codes] for names, codes in ((events.users, events.user), (events.items, events.item))
    )
    assert list(zip(users, items, events.time.tolist(), events.line.tolist(), strict=True)) == rows
    assert events.users == list(dict.fromkeys(row[0] for row in rows)) and events.basket is None
    assert len(builder) == events.n == 200
    assert [events.user.dtype, events.time.dtype, events.line.dtype] == [np.int32, np.float64, np.int64]


def test_rows_are_taken_by_mask_or_position():
    builder = EventBuilder(with_baskets=True)
    for line, basket in enumerate("xyx"):
        builder.add("u", f"i{line}", 5.0, line, basket)
    events = builder.build()
    for wanted in (np.array([True, False, True]), np.array([0, 2])):
        part = events.rows(wanted)
        assert part.line.tolist() == [0, 2] and part.basket.tolist() == [0, 0]
        assert part.items == events.items and part.baskets == ["x", "y"]
