"""Prices out of texts, price levels within categories, and the columns they become."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest

from dataset_prep.price import (
    PriceSettings,
    item_categories,
    parse_price,
    parse_prices,
    price_levels,
    with_price_levels,
)
from recbole_mm.errors import DatasetError, SettingError

METHODS = ("logistic", "linear", "quantile")

# ---------------------------------------------------------------- reading


@pytest.mark.parametrize(
    ("text", "price"),
    [
        ("12", 12.0), ("12.5", 12.5), ("0.008458", 0.008458), (".99", 0.99), ("  7 ", 7.0), ("00012", 12.0),
        ("$1,299.00", 1299.0), ("1,234", 1234.0), ("$12,345,678.90", 12345678.9), ("1234567.5", 1234567.5),
        ("US$ 12", 12.0), ("US$12", 12.0), ("CA$12", 12.0), ("£3.50", 3.5), ("¥1200", 1200.0), ("3.50 €", 3.5),
        ("USD 12", 12.0), ("12 EUR", 12.0), ("12GBP", 12.0), ("$12.00 USD", 12.0), ("$\u00a012", 12.0),
        ("1.234,56 €", 1234.56), ("€ 1.234.567,89", 1234567.89), ("12,50", 12.5), ("0,99 €", 0.99), ("1,23", 1.23),
        ("12.00 - 15.00", 13.5), ("$10-$20", 15.0), ("$10 – 20", 15.0), ("10 — 20 USD", 15.0),
        ("$10.00 \u2212 $20.00", 15.0), ("1,50 € - 2,50 €", 2.0), ("$1,000 - $3,000", 2000.0), ("5 - 5", 5.0),
        ("5e-05", 5e-05), ("1.5E3", 1500.0), ("999999999", 999999999.0),
    ],
)  # fmt: skip
def test_a_price_is_read(text, price):
    assert parse_price(text) == pytest.approx(price, rel=1e-12)


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "Free", "from $5", "NaN", "nan", "inf", "None", "12.", "$", "-", ".", ",", "1_000", "1,2,3",
        "1,23,456", "12,5", "1.234.567", "1,234,56", "12 34", "$ $ 12", "0x10", "２５", "１２.00", "٣", "²",
        "12 dollars", "$12 each",
        ".a-box-inner{background-color:#fff}#alohaBuyBoxWidget .selected{display:none}", "12.00 $ 13", "1 - 2 - 3",
        "2014-03-01", "15 - 12", "$5 - €6", "-5", "$-5", "-$5", "- 5 USD", "\u22125", "0", "0.00", "$0.00", "0 - 5",
        "1e12", "1000000000000", "9" * 400, "1e999", "$1e3", "12\n13", "(5)",
    ],
)  # fmt: skip
def test_F18_F19_anything_else_is_no_price(text):
    assert parse_price(text) is None


def test_a_range_may_count_by_its_low_end():
    assert parse_price("$10 - $20", ranges="low") == 10.0
    assert parse_prices(["$10 - $20", "3"], ranges="low")[0].tolist() == [10.0, 3.0]
    with pytest.raises(SettingError, match="ranges is 'high', expected one of"):
        parse_prices(["1"], ranges="high")


def test_texts_without_a_price_are_counted_by_reason():
    texts = ["1", "", " ", "0", "-3", "Free", "1e12", "9 - 1", "$1 - €2", "2"]
    prices, reasons = parse_prices(texts)
    np.testing.assert_array_equal(np.isnan(prices), [False] + 8 * [True] + [False])
    assert reasons == {
        "empty": 2,
        "zero or negative": 2,
        "not written as a price": 1,
        "above 1,000,000,000": 1,
        "a range from high to low": 1,
        "a range in two currencies": 1,
    }
    assert reasons.total() == np.isnan(prices).sum()


def test_a_long_text_takes_no_long_time():
    assert parse_price("1," * 20_000) is None and parse_price("1.234" * 20_000) is None


# ---------------------------------------------------------------- levels


def literal_level(p: float, others: list[float], n_levels: int, method: str) -> int:
    """The docstring's formulas, one price at a time, with exact fractions where there is no exponential."""
    low, high, n = min(others), max(others), len(others)
    if low == high:
        return 1
    if method == "quantile":
        return math.floor(Fraction(sum(other < p for other in others), n) * n_levels) + 1
    if method == "linear":
        p, low, high = (Fraction(x).limit_denominator(1000) for x in (p, low, high))
        return math.floor((p - low) / (high - low) * (n_levels - 1)) + 1
    mean = sum(others) / n
    g = math.sqrt(sum((other - mean) ** 2 for other in others) / n) * math.sqrt(3) / math.pi

    def F(t: float) -> float:
        return 1 / (1 + math.exp(-(t - mean) / g))

    return min(math.floor((F(p) - F(low)) / (F(high) - F(low)) * n_levels) + 1, n_levels)


def shop(seed: int, n: int = 60) -> tuple[np.ndarray, list[str]]:
    """Prices in cents, many of them equal, some unknown, in categories of very different sizes."""
    made = random.Random(seed)
    price = np.array([made.choice([made.randint(1, 9999) / 100, 9.99, 10.0, math.nan]) for _ in range(n)])
    return price, [made.choice(["a", "b", "b", "c c", "", f"rare{i}"]) for i in range(n)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n_levels", [1, 2, 10, 100])
def test_levels_equal_the_formulas_computed_one_by_one(method, n_levels):
    for seed in range(10):
        price, category = shop(seed)
        levels = price_levels(price, category, n_levels=n_levels, method=method)
        for i, (p, name) in enumerate(zip(price.tolist(), category, strict=True)):
            others = [
                q for q, other in zip(price.tolist(), category, strict=True) if other == name and not math.isnan(q)
            ]
            unknown = math.isnan(p) or name == ""
            assert levels[i] == (0 if unknown else literal_level(p, others, n_levels, method)), (seed, i)


def test_linear_levels_are_those_of_the_released_data():
    dollars = np.arange(5, 105, dtype=float)  # floor((p - 5) / 99 * 99) + 1: a dollar a level
    assert price_levels(dollars, ["c"] * 100, n_levels=100, method="linear").tolist() == list(range(1, 101))


def test_linear_levels_do_not_slip_by_rounding():
    price = np.arange(1, 12) / 10  # 0.3 - 0.1 is a little less than 0.2
    assert price_levels(price, ["c"] * 11, n_levels=11, method="linear").tolist() == list(range(1, 12))


def test_quantile_levels_hold_equally_many_items():
    price = np.random.default_rng(0).permutation(1000) + 1.0
    levels = price_levels(price, ["c"] * 1000, n_levels=10, method="quantile")
    assert np.bincount(levels).tolist() == [0] + [100] * 10


def test_logistic_levels_are_narrow_where_prices_are_many():
    price = np.random.default_rng(0).lognormal(sigma=1.0, size=2000)
    used = {
        method: len(set(price_levels(price, ["c"] * 2000, n_levels=100, method=method).tolist())) for method in METHODS
    }
    assert used["linear"] < 70 < 95 <= used["logistic"] and used["quantile"] == 100


@pytest.mark.parametrize("method", METHODS)
def test_levels_rise_with_the_price_and_stay_in_range(method):
    for seed in range(10):
        price, category = shop(seed)
        levels = price_levels(price, category, n_levels=7, method=method)
        np.testing.assert_array_equal(levels == 0, np.isnan(price) | (np.array(category) == ""))
        for name in set(category) - {""}:
            mine = np.flatnonzero((np.array(category) == name) & ~np.isnan(price))
            if len(mine):
                sorted_levels = levels[mine[np.argsort(price[mine])]]
                assert sorted_levels[0] == 1 and (np.diff(sorted_levels) >= 0).all() and sorted_levels[-1] <= 7
                if method != "quantile" and len(set(price[mine])) > 1:
                    assert sorted_levels[-1] == 7


@pytest.mark.parametrize("method", METHODS)
def test_neither_order_nor_currency_changes_levels(method):
    for seed in range(10):
        price, category = shop(seed)
        levels = price_levels(price, category, n_levels=50, method=method)
        order = np.random.default_rng(seed).permutation(len(price))
        shuffled = price_levels(price[order], [category[i] for i in order], n_levels=50, method=method)
        np.testing.assert_array_equal(shuffled, levels[order])
        for slope, shift in ((0.893, 0.0), (151.3, 20.0), (100.0, 0.0)):
            exchanged = price_levels(price * slope + shift, category, n_levels=50, method=method)
            np.testing.assert_array_equal(exchanged, levels)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("price", "levels"),
    [
        ([5.0], [1]), ([5.0, 5.0, 5.0], [1, 1, 1]), ([np.nan], [0]), ([], []), ([0.1 + 0.2, 0.1 + 0.2], [1, 1]),
    ],
)  # fmt: skip
def test_F20_one_price_has_level_1(method, price, levels):
    with np.errstate(all="raise"):
        assert price_levels(np.array(price), ["c"] * len(price), n_levels=9, method=method).tolist() == levels


@pytest.mark.parametrize("method", METHODS)
def test_a_far_outlier_overflows_nothing(method):
    price = np.array([1.0] * 4999 + [2.0, 1e9])
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        levels = price_levels(price, ["c"] * 5001, n_levels=100, method=method)
    assert levels[0] == 1 and levels[-1] == 100 and 1 <= levels[-2] <= 100


def test_wrong_arguments_of_levels_are_refused():
    with pytest.raises(SettingError, match="price method is 'log', expected one of"):
        price_levels(np.ones(1), ["a"], n_levels=2, method="log")
    with pytest.raises(SettingError, match="0 price levels, expected at least 1"):
        price_levels(np.ones(1), ["a"], n_levels=0)
    with pytest.raises(ValueError, match=r"prices of shape \(2,\) and 1 categories"):
        price_levels(np.ones(2), ["a"], n_levels=2)
    with pytest.raises(ValueError, match="a price is infinite"):
        price_levels(np.array([np.inf]), ["a"], n_levels=2)


# ---------------------------------------------------------------- items


def test_one_name_of_a_list_is_the_category():
    texts = ["Vest_top Upper Ladies", " Bra  Under ", "", "one"]
    assert item_categories(texts) == ["Ladies", "Under", "", "one"]
    assert item_categories(texts, position="first") == ["Vest_top", "Bra", "", "one"]
    assert item_categories(texts, position="all") == ["Vest_top Upper Ladies", "Bra Under", "", "one"]
    with pytest.raises(SettingError, match="category position is 'finest'"):
        item_categories(texts, position="finest")


def table(**columns: list[str]) -> pd.DataFrame:
    n = len(next(iter(columns.values())))
    return pd.DataFrame({"item_id": [f"i{k}" for k in range(n)], **columns}, dtype=object)


TYPES = {"item_id": "token", "price": "float", "categories": "token_seq"}


def test_levels_and_categories_become_columns_and_leave_the_others_alone():
    items = table(price=["1", "2", "", "7", "3"], categories=["x a", "x a", "a", "", "x b"])
    made, types, report = with_price_levels(items, TYPES, PriceSettings(n_levels=5))
    assert made["price_level"].tolist() == ["1", "5", "", "", "1"]
    assert made["category"].tolist() == ["a", "a", "a", "", "b"]
    assert types == {**TYPES, "price_level": "token", "category": "token"} and "price_level" not in TYPES
    assert made["price"].tolist() == items["price"].tolist() and "price_level" not in items
    assert (report.n_items, report.n_filled, report.n_levels, report.n_categories) == (5, 3, 2, 2)
    assert report.missing == {"price empty": 1, "no category": 1} and report.columns == ("price_level", "category")
    assert str(report) == (
        "price levels: 3 of 5 items, 2 of 5 levels occur; logistic, in 2 categories (last of 'categories')\n"
        "  1 without: price empty\n  1 without: no category"
    )


def test_without_a_column_of_categories_all_items_are_one_category():
    made, types, report = with_price_levels(table(price=["1", "2", "3"]), TYPES, PriceSettings(n_levels=3))
    assert made["price_level"].tolist() == ["1", "2", "3"] and "category" not in made and "category" not in types
    assert "in one category, because the items have no column categories" in str(report)


def test_a_token_is_one_category_even_with_spaces():
    items = table(price=["1", "2"], category=["Hair Care", "Skin Care"])
    made, _, report = with_price_levels(items, {"category": "token", "price": "float"}, PriceSettings())
    assert made["price_level"].tolist() == ["1", "1"] and report.n_categories == 2
    assert made["category"].tolist() == ["Hair Care", "Skin Care"]


def test_few_priced_items_of_a_category_get_no_level():
    items = table(price=["1", "2", "3", ""], categories=["a", "a", "b", "b"])
    made, _, report = with_price_levels(items, TYPES, PriceSettings(n_levels=5, min_category=2))
    assert made["price_level"].tolist() == ["1", "5", "", ""]
    assert report.missing == {"price empty": 1, "fewer than 2 priced items in its category": 1}


def test_prices_in_texts_make_the_column_a_token():
    _, types, _ = with_price_levels(table(price=["$1", "2"]), TYPES, PriceSettings())
    assert types["price"] == "token"
    _, types, _ = with_price_levels(table(price=["1.5", "", "-2", "1e-05"]), TYPES, PriceSettings())
    assert types["price"] == "float"


def test_no_levels_without_prices_or_when_none_are_wanted():
    items, types, report = with_price_levels(table(title=["x"]), TYPES, PriceSettings())
    assert list(items) == ["item_id", "title"] and types == TYPES and report.columns == ()
    assert str(report) == "price levels: none, the items have no column price"
    items, _, report = with_price_levels(table(price=["1"]), TYPES, PriceSettings(n_levels=0))
    assert "price_level" not in items and str(report) == "price levels: none are asked for"


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        ({"price": ["1"]}, {"price_column": "cost"}, "no column cost, only item_id, price; choose with --price-column"),
        ({"price": ["1"]}, {"category_column": "kind"}, "no column kind, only item_id, price; choose with --category-"),
        ({"price": ["", "Free"]}, {}, "no item of 2 gets a price level .1 price empty, 1 not written as a price."),
        ({"price": ["1"], "price_level": ["3"]}, {}, "a column price_level already, .* other values; rename it"),
        (
            {"price": ["1"], "categories": ["a b"], "category": ["a"]},
            {"category_column": "categories"},
            "a column category already",
        ),
    ],
)
def test_items_that_cannot_get_levels_are_refused(columns, settings, message):
    with pytest.raises(DatasetError, match=message):
        with_price_levels(table(**columns), TYPES, PriceSettings(**settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_levels": -1}, "-1 price levels and min_category 1, expected at least 0 and 1"),
        ({"min_category": 0}, "100 price levels and min_category 0"),
        ({"method": "log"}, "method is 'log', expected one of"),
        ({"ranges": "high"}, "ranges is 'high', expected one of"),
        ({"category_position": "any"}, "category_position is 'any', expected one of"),
    ],
)
def test_price_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        PriceSettings(**settings)
