"""Cleaning: against slow literal versions, by laws, and what becomes of the texts of an item."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from dataset_prep.cleaning import (
    DUPLICATES,
    ItemSpool,
    Ledger,
    clean_item,
    compacted,
    count_items,
    drop_duplicates,
    drop_items,
    in_order,
    k_core,
    n_twins,
)
from dataset_prep.events import EventBuilder, Events
from dataset_prep.sources import Item
from dataset_prep.text import sentences
from recbole_mm.errors import DatasetError

Row = tuple[str, str, float, int]


def events_of(rows: list[tuple]) -> Events:
    """Of (user, item, time) or (user, item, time, basket)."""
    builder = EventBuilder(with_baskets=len(rows[0]) == 4)
    for line, (user, item, time, *basket) in enumerate(rows, start=1):
        builder.add(user, item, time, line, *basket)
    return builder.build()


def rows_of(events: Events) -> list[Row]:
    codes = zip(events.user.tolist(), events.item.tolist(), events.time.tolist(), events.line.tolist(), strict=True)
    return [(events.users[user], events.items[item], time, line) for user, item, time, line in codes]


def reviews(seed: int, n: int = 300, n_users: int = 40, n_items: int = 30) -> list[tuple[str, str, float]]:
    """Popular and rare users and items, many equal times, exact duplicates, in no order of time."""
    made = random.Random(seed)
    rows = []
    for _ in range(n):
        user, item = min(made.randrange(n_users), made.randrange(n_users)), min(made.choices(range(n_items), k=2))
        rows.append((f"u{user}", f"i{item}", float(1000 + made.randrange(20))))
        if made.random() < 0.1:
            rows.append(rows[-1])
    return rows


def conserved(ledger: Ledger, events: Events) -> bool:
    return ledger.n_read == events.n + sum(ledger.dropped.values())


# ---------------------------------------------------------------- duplicates


def literal_duplicates(rows: list[Row], rule: str) -> list[Row]:
    if rule == "keep":
        return rows
    kept: dict[tuple, Row] = {}
    for row in rows if rule == "first" else sorted(rows, key=lambda row: (row[2], row[3])):
        key = row[:3] if rule == "first" else row[:2]
        if key not in kept or rule == "last_per_pair":
            kept[key] = row
    return sorted(kept.values(), key=lambda row: row[3])


@pytest.mark.parametrize("rule", DUPLICATES)
@pytest.mark.parametrize("seed", range(5))
def test_F11_duplicates_go_by_rule_and_are_counted(seed, rule):
    events = events_of(reviews(seed))
    ledger = Ledger(events.n)
    kept, n_equal = drop_duplicates(events, rule, ledger)
    assert rows_of(kept) == literal_duplicates(rows_of(events), rule)
    assert n_equal == events.n - len({row[:3] for row in rows_of(events)}) > 0
    assert conserved(ledger, kept) and len(ledger.steps) == (rule != "keep")


def test_the_same_item_in_two_baskets_is_no_duplicate():
    events = events_of([("u", "i", 1.0, "a"), ("u", "i", 1.0, "b"), ("u", "i", 1.0, "a")])
    kept, n_equal = drop_duplicates(events, "first", Ledger(3))
    assert [line for *_, line in rows_of(kept)] == [1, 2] and n_equal == 1


# ---------------------------------------------------------------- k-core


def literal_k_core(rows: list[Row], min_user: int, min_item: int) -> list[Row]:
    while True:
        users, items = Counter(row[0] for row in rows), Counter(row[1] for row in rows)
        left = [row for row in rows if users[row[0]] >= min_user and items[row[1]] >= min_item]
        if len(left) == len(rows):
            return rows
        rows = left


@pytest.mark.parametrize(("min_user", "min_item"), [(1, 1), (5, 5), (3, 12), (8, 2), (1, 9), (9, 1)])
@pytest.mark.parametrize("seed", range(5))
def test_the_k_core_is_that_of_removing_by_turns(seed, min_user, min_item):
    events = events_of(reviews(seed))
    ledger = Ledger(events.n)
    kept = k_core(events, ledger, min_user=min_user, min_item=min_item)
    assert rows_of(kept) == literal_k_core(rows_of(events), min_user, min_item)
    assert conserved(ledger, kept)
    assert sum(step.items for step in ledger.steps) == len({row[1] for row in rows_of(events)} - set(kept_items(kept)))


def kept_items(events: Events) -> list[str]:
    return [row[1] for row in rows_of(events)]


def test_a_long_chain_falls_link_by_link_in_no_time():
    """User k has items k and k + 1, but for the last one: every removal makes the next one possible."""
    n = 3_000
    rows = [(f"u{k}", f"i{j}", 1.0) for k in range(n) for j in (k, k + 1) if j < n]
    rows += [(f"v{k}", f"w{j}", 1.0) for k in range(2) for j in range(2)]
    kept = k_core(events_of(rows), Ledger(len(rows)), min_user=2, min_item=2)
    assert kept.n == 4


def test_F26_a_k_core_that_leaves_nothing_is_named():
    events = events_of(reviews(0))
    with pytest.raises(
        DatasetError, match=r"--min-user 500 removes all \d+ interactions that were left of \d+: user with"
    ):
        k_core(events, Ledger(events.n), min_user=500, min_item=5)
    ledger = Ledger(events.n + 2, {"bad_json": 2}, called={"--min-item": "--least"})
    with pytest.raises(DatasetError, match="(?s)--least 900 removes all .* before: 2 dropped: bad_json") as found:
        k_core(events, ledger, min_user=1, min_item=900)
    assert "loosen it, or take other data" in str(found.value)


@pytest.mark.parametrize("seed", range(8))
def test_a_k_core_before_the_items_are_known_changes_nothing(seed, tmp_path):
    """The first k-core keeps a superset of what the policies and the second one keep."""
    made, core = random.Random(seed), {"min_user": 4, "min_item": 4}
    events = events_of(reviews(seed, n=400))
    has_price = {name: made.random() < 0.7 for name in events.items}
    without = {"metadata": "drop", "text": "keep", "image": "keep", "price": "drop"}

    early = compacted(k_core(events, Ledger(events.n), **core))
    with ItemSpool(early.items, tmp_path) as spool:
        for name in early.items:
            spool.add(Item(name, price="1" if has_price[name] else ""))
        kept = k_core(drop_items(early, spool, without, Ledger(early.n)), Ledger(early.n), **core)
    late = [row for row in rows_of(events) if has_price[row[1]]]
    assert rows_of(kept) == literal_k_core(late, 4, 4)


def test_F21_the_order_is_that_of_time_and_then_of_lines():
    events = events_of([("a", "x", 2.0), ("a", "y", 1.0), ("b", "z", 1.0), ("a", "z", 2.0)])
    assert [line for *_, line in rows_of(in_order(events))] == [2, 3, 1, 4]


def test_compacting_keeps_the_interactions_and_forgets_other_names():
    events = events_of([("a", "x", 1.0, "k"), ("b", "y", 2.0, "l"), ("c", "x", 3.0, "m")]).rows(np.array([2, 1]))
    small = compacted(events)
    assert rows_of(small) == rows_of(events)
    assert (small.users, small.items, small.baskets) == (["b", "c"], ["x", "y"], ["l", "m"])
    assert small.user.dtype == np.int32


def test_F16_twins_are_counted():
    assert n_twins(["B01", "b01", "e\u0301", "\u00e9", "x"]) == 2
    assert n_twins(["NA", "null", "00123", "1e5"]) == 0


# ---------------------------------------------------------------- items


def test_texts_of_an_item_are_cleaned_and_changes_are_told():
    item = Item(
        "i",
        title="Salt &amp;amp; <b>pepper</b>\x00",
        brand="  Caf\u00e9 \n Noir ",
        categories=("Home &amp; Kitchen", "</span></span>", "Mills"),
        description="Made of wool<br>washable.\n<p>Warm</p>",
        price="$1,299.00",
        pictures=("https://x/a b.jpg", " ", "c\td.png"),
        more={"colour": " deep\tred "},
    )
    row, changed, no_price = clean_item(item)
    assert row == {
        "colour": "deep red",
        "title": "Salt & pepper",
        "brand": "Caf\u00e9 Noir",
        "categories": "Home_&_Kitchen Mills",
        "description": "Made of wool • washable. Warm",
        "price": "1299",
        "image_urls": "https://x/a%20b.jpg c%09d.png",
    }
    assert changed == ["title", "categories", "description"] and no_price == ""
    assert sentences(row["description"]) == sentences(item.description) == ["Made of wool", "washable.", "Warm"]


@pytest.mark.parametrize("title", ["", " \u00a0", "<b></b>", "</span></span>", "&nbsp;", "\x07"])
def test_F28_a_title_without_characters_is_missing(title):
    assert clean_item(Item("i", title=title))[0] == {}


@pytest.mark.parametrize(
    ("text", "ranges", "written", "reason"),
    [
        ("$1,234.56", "mean", "1234.56", ""),
        ("12,50 €", "mean", "12.5", ""),
        ("12.00 - 15.50", "mean", "13.75", ""),
        ("10.1 - 20.2", "mean", "15.15", ""),
        ("12.00 - 15.50", "low", "12", ""),
        ("5e-05", "mean", "5e-05", ""),
        ("", "mean", None, "empty"),
        ("Free", "mean", None, "not written as a price"),
        (".a-box-inner{background-color:#fff}", "mean", None, "not written as a price"),
        ("0", "mean", None, "zero or negative"),
        ("-3", "mean", None, "zero or negative"),
        ("1e12", "mean", None, "above 1,000,000,000"),
        ("NaN", "mean", None, "not written as a price"),
        ("1_000", "mean", None, "not written as a price"),
        ("\uff11\uff12", "mean", None, "not written as a price"),
    ],
)
def test_F18_F19_a_price_is_written_as_a_plain_number_or_not_at_all(text, ranges, written, reason):
    row, _, no_price = clean_item(Item("i", price=text), ranges=ranges)
    assert row.get("price") == written and no_price == reason


def test_policies_drop_items_one_after_the_other_and_count_them(tmp_path):
    rows = [(f"u{k}", item, float(k)) for k, item in enumerate(["full", "bare", "mute", "free", "unknown"] * 3)]
    events = events_of(rows)
    with ItemSpool(events.items, tmp_path) as spool:
        spool.add(Item("full", title="t", price="1", pictures=("p",)))
        spool.add(Item("bare", description="d", price="1"))
        spool.add(Item("mute", title="<b></b>", brand="b", price="1", pictures=("p",)))
        spool.add(Item("free", title="t", price="Free", pictures=("p",)))
        ledger = Ledger(events.n)
        kept = drop_items(events, spool, dict.fromkeys(("metadata", "text", "image", "price"), "drop"), ledger)
        assert set(kept_items(kept)) == {"full"} and conserved(ledger, kept)
        assert [(step.reason, step.interactions, step.items) for step in ledger.steps] == [
            ("item without metadata", 3, 1),
            ("item without title and description", 3, 1),
            ("item without a picture's address or path", 3, 1),
            ("item without a price", 3, 1),
        ]
        keep = dict.fromkeys(("metadata", "text", "image", "price"), "keep")
        assert drop_items(events, spool, keep, Ledger(events.n)) is events
        only = drop_items(events, spool, {**keep, "text": "drop"}, Ledger(events.n))
        assert set(kept_items(only)) == {"full", "bare", "free"}  # nothing is known of "unknown", no text either
    assert list(tmp_path.iterdir()) == []


def test_items_are_counted_by_column_and_columns_of_numbers_are_told_from_texts(tmp_path):
    with ItemSpool(["a", "b", "c", "d"], tmp_path) as spool:
        spool.add(Item("b", title="A &amp; B", more={"weight": "1.5", "colour": "red", "category": "x y"}))
        spool.add(Item("a", title="t", price="3", more={"weight": "2", "colour": "7"}))
        spool.add(Item("c", title="gone", brand="b"))
        found = count_items(spool, np.array([True, True, False, True]))
    assert found.n == 3 and found.n_rows == 2
    assert found.columns == {"title": 2, "price": 1, "category": 1, "colour": 2, "weight": 2}
    assert found.types == {
        "title": "token_seq", "price": "float", "category": "token", "colour": "token_seq", "weight": "float",
    }  # fmt: skip
    assert found.changed == {"title": 1} and found.no_price == {"empty": 1}
