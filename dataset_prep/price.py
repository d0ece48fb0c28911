"""Prices: read them out of texts by a strict grammar, and cut them into levels, category by category."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from recbole_mm.errors import DatasetError, SettingError

if TYPE_CHECKING:
    import argparse

    from pandas import DataFrame

METHODS = ("logistic", "linear", "quantile")
POSITIONS = ("last", "first", "all")
RANGES = ("mean", "low")
CATEGORY_COLUMNS = ("category", "categories")  # where there are both, the first is meant to be the one
HIGHEST_PRICE = 1e9  # above, a text is taken for an article number or a mistake
ONE_STEP = 1e-9  # a price this close below a level's lower edge is on it: 0.3 / 0.1 is a little less than 3

# ---------------------------------------------------------------- reading

_SPACES = "[ \u00a0\u202f]*"
_CURRENCY = (
    r"(?:(?:US|CA|AU|NZ|HK|SG|MX|[ACRS])?\$|[£€¥₹₩₽₺₫₪₱฿]|"
    r"USD|EUR|GBP|JPY|CNY|RMB|INR|CAD|AUD|NZD|CHF|SEK|NOK|DKK|PLN|CZK|HUF|TRY|RUB|BRL|MXN|KRW|SGD|HKD|TWD|THB)"
)
_AMOUNT = (
    r"(?:[0-9]{1,3}(?:\.[0-9]{3})+,[0-9]{2}|[0-9]+,[0-9]{2}|"  # 1.234,56  and  12,50
    r"[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"  # 1,234.56  1234.5  .99
)
_DASH = "[-\u2010\u2011\u2012\u2013\u2014\u2015\u2212]"  # hyphen, en dash, em dash, minus, ...
_SIDE = f"(?:{_CURRENCY}{_SPACES})?{_AMOUNT}(?:{_SPACES}{_CURRENCY})?"
_ONE = re.compile(_SIDE)
_RANGE = re.compile(f"(?P<low>{_SIDE}){_SPACES}{_DASH}{_SPACES}(?P<high>{_SIDE})")
_NEGATIVE = re.compile(f"{_DASH}{_SPACES}{_SIDE}|{_CURRENCY}{_SPACES}{_DASH}{_SPACES}{_AMOUNT}")
PLAIN_NUMBER = re.compile(r"(?:-?[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)?")  # or empty: what RecBole reads as a float
_SCIENTIFIC = re.compile(r"[0-9]+(?:\.[0-9]+)?[eE][+-]?[0-9]{1,3}")  # as programs write small numbers
_DIGITS, _SIGN = re.compile("[0-9.,]+"), re.compile(_CURRENCY)


def parse_price(text: str, *, ranges: str = "mean") -> float | None:
    """The price that a text states, or None.

    Read are ``12``, ``12.5``, ``1,299.00``, ``1.234,56``, ``12,50`` (a comma before exactly two last digits is a
    decimal one, before three it parts thousands), each with a currency before, behind or both (``$12``, ``US$ 12``,
    ``12 EUR``), ranges of two of them with any dash (``$10 - $20``), and a plain ``5e-05``. Not read is anything else
    (``Free``, ``from $5``, ``12.``, ``1,2,3``, other digits than 0-9), and no price is 0, below 0 or above
    ``HIGHEST_PRICE``. The currency is not converted: one column, one currency.

    Args:
        ranges: "mean" of the two ends, or the "low" one. Ends in the wrong order or in two currencies are no price.
    """
    return _read(text, ranges)[0]


def parse_prices(texts: Sequence[str], *, ranges: str = "mean") -> tuple[np.ndarray, Counter[str]]:
    """`parse_price` of each text.

    Returns:
        [n] float64, NaN where there is no price; and why, as a count of texts by reason, summing to the number of NaN.
    """
    if ranges not in RANGES:
        raise SettingError(f"ranges is {ranges!r}, expected one of {list(RANGES)}")
    prices, reasons = np.full(len(texts), np.nan), Counter()
    for row, text in enumerate(texts):
        price, reason = _read(text, ranges)
        if price is None:
            reasons[reason] += 1
        else:
            prices[row] = price
    return prices, reasons


def _read(text: str, ranges: str) -> tuple[float | None, str]:
    text = text.strip()
    if not text:
        return None, "empty"
    if _ONE.fullmatch(text):
        value = _number(text)
    elif _SCIENTIFIC.fullmatch(text):
        value = float(text)
    elif match := _RANGE.fullmatch(text):
        low, high = _number(match["low"]), _number(match["high"])
        if low > high:
            return None, "a range from high to low"
        if len(set(_SIGN.findall(text))) > 1:
            return None, "a range in two currencies"
        value = low if ranges == "low" or low == 0 else (low + high) / 2
    elif _NEGATIVE.fullmatch(text):
        return None, "zero or negative"
    else:
        return None, "not written as a price"
    if value <= 0:
        return None, "zero or negative"
    if value > HIGHEST_PRICE:
        return None, f"above {HIGHEST_PRICE:,.0f}"
    return value, ""


def _number(side: str) -> float:
    """An amount with or without currency; the grammar has been checked."""
    amount = _DIGITS.search(side).group()
    if re.search(r",[0-9]{2}$", amount):  # a decimal comma
        amount = amount.replace(".", "").replace(",", ".")
    return float(amount.replace(",", ""))


# ---------------------------------------------------------------- levels


def price_levels(price: np.ndarray, category: Sequence[str], *, n_levels: int, method: str = "logistic") -> np.ndarray:
    """Cut prices into levels, category by category.

    Source: MMSBR, "price discretization"; its released data are "linear", its folder's name says "logistic".
    With P levels, in a category of n priced items with lowest price a, highest b, mean m and deviation s (of all n):

    - logistic: F(t) = 1 / (1 + exp(-(t - m) / g)), g = s sqrt(3) / pi (the logistic distribution of that mean and
      deviation), level = floor((F(p) - F(a)) / (F(b) - F(a)) P) + 1, P at most. Narrow where prices are many.
    - linear: level = floor((p - a) / (b - a) (P - 1)) + 1. The highest price alone has level P.
    - quantile: level = floor(r / n P) + 1, r the number of cheaper items in the category. Equal prices share a level.

    An item alone in its category, or in a category of equal prices, has level 1. Levels do not change with the
    currency or the order of rows. O(n log n).

    Args:
        price: [n], > 0, NaN where unknown.
        category: [n], "" where unknown.
        n_levels: P, at least 1.

    Returns:
        [n] int64 in 1..P; 0 where price or category is unknown.

    Raises:
        SettingError: an unknown method, or n_levels below 1.
        ValueError: arrays of different lengths, an infinite price.
    """
    if method not in METHODS:
        raise SettingError(f"price method is {method!r}, expected one of {list(METHODS)}")
    if n_levels < 1:
        raise SettingError(f"{n_levels} price levels, expected at least 1")
    price = np.asarray(price, dtype=np.float64)
    if price.shape != (len(category),):
        raise ValueError(f"prices of shape {price.shape} and {len(category)} categories, expected one each")
    if np.isinf(price).any():
        raise ValueError("a price is infinite")

    levels = np.zeros(len(price), dtype=np.int64)
    known = np.flatnonzero(~np.isnan(price) & np.array([name != "" for name in category], dtype=bool))
    if not len(known):
        return levels
    numbers: dict[str, int] = {}
    group = np.array([numbers.setdefault(category[row], len(numbers)) for row in known.tolist()])
    order = np.lexsort((price[known], group))  # by price within a category, so that sums do not depend on the rows
    group, p = group[order], price[known][order]
    starts = np.flatnonzero(np.diff(group, prepend=-1))  # of each category
    n = np.diff(starts, append=len(p))
    low, high = p[starts][group], p[starts + n - 1][group]
    share = (p - low) / np.where(high > low, high - low, 1)  # 0 at the lowest, 1 at the highest price

    if method == "quantile":
        row = np.arange(len(p))
        first_equal = np.maximum.accumulate(np.where(np.diff(p, prepend=np.nan) != 0, row, starts[group]))
        cheaper = first_equal - starts[group]
        found = cheaper * n_levels // n[group]
    elif method == "linear":
        found = _floor(share * (n_levels - 1))
    else:
        mean = (np.add.reduceat(share, starts) / n)[group]
        deviation = np.sqrt(np.add.reduceat((share - mean) ** 2, starts) / n)[group]
        scale = np.where(high > low, deviation, 1) * np.sqrt(3) / np.pi
        lowest, here, highest = (0.5 * (1 + np.tanh((t - mean) / scale / 2)) for t in (0, share, 1))  # F, no overflow
        span = np.where(high > low, highest - lowest, 1)
        found = np.minimum(_floor((here - lowest) / span * n_levels), n_levels - 1)
    levels[known[order]] = np.where(high > low, found, 0) + 1
    return levels


def _floor(values: np.ndarray) -> np.ndarray:
    return np.floor(values + ONE_STEP).astype(np.int64)


def item_categories(texts: Sequence[str], *, position: str = "last") -> list[str]:
    """One category for each item out of a list of names, separated by spaces; "" stays "".

    Args:
        position: "last" or "first" name of the list, whichever is the finest in this catalogue, or "all" of it.
    """
    if position not in POSITIONS:
        raise SettingError(f"category position is {position!r}, expected one of {list(POSITIONS)}")
    lists = [text.split() for text in texts]
    if position == "all":
        return [" ".join(names) for names in lists]
    return [names[-1 if position == "last" else 0] if names else "" for names in lists]


# ---------------------------------------------------------------- items


@dataclass(frozen=True)
class PriceSettings:
    """How the price levels of a table of items are made.

    Attributes:
        n_levels: P; 0 makes none.
        method: of `price_levels`.
        price_column: None takes "price" if it is there.
        category_column: None takes "category" or "categories" if one is there; else all items are one category.
        category_position: of `item_categories`.
        min_category: items of categories with fewer priced items get no level.
        ranges: of `parse_price`.
    """

    n_levels: int = 100
    method: str = "logistic"
    price_column: str | None = None
    category_column: str | None = None
    category_position: str = "last"
    min_category: int = 1
    ranges: str = "mean"

    def __post_init__(self) -> None:
        for name, known in (("method", METHODS), ("category_position", POSITIONS), ("ranges", RANGES)):
            if getattr(self, name) not in known:
                raise SettingError(f"{name} is {getattr(self, name)!r}, expected one of {list(known)}")
        if self.n_levels < 0 or self.min_category < 1:
            raise SettingError(
                f"{self.n_levels} price levels and min_category {self.min_category}, expected at least 0 and 1"
            )


@dataclass(frozen=True)
class PriceReport:
    """What became of the prices.

    Attributes:
        settings: with the columns that were used, None where there was none.
        columns: made, such as ``("price_level", "category")``.
        n_items, n_filled: items, and those with a level.
        n_levels: levels that occur.
        n_categories: categories with a level.
        missing: items without a level, by reason.
    """

    settings: PriceSettings
    columns: tuple[str, ...]
    n_items: int
    n_filled: int
    n_levels: int
    n_categories: int
    missing: dict[str, int] = field(default_factory=dict)

    def as_settings(self) -> dict[str, Any]:
        """For the manifest."""
        counts = {name: getattr(self, name) for name in ("n_items", "n_filled", "n_categories", "missing")}
        return {**asdict(self.settings), "columns": list(self.columns), **counts, "n_levels_used": self.n_levels}

    def __str__(self) -> str:
        used = self.settings
        if used.n_levels == 0:
            return "price levels: none are asked for"
        if not self.columns and not self.missing:
            return "price levels: none, the items have no column price"
        categories = "1 category" if self.n_categories == 1 else f"{self.n_categories} categories"
        where = f"{categories} ({used.category_position} of {used.category_column!r})"
        if used.category_column is None:
            where = "one category, because the items have no column categories"
        line = (
            f"price levels: {self.n_filled} of {self.n_items} items, {self.n_levels} of {used.n_levels} levels occur; "
            f"{used.method}, in {where}"
        )
        if not self.columns:
            line = "price levels: none"
        return "\n".join([line, *(f"  {n} without: {why}" for why, n in self.missing.items())])


def with_price_levels(
    items: DataFrame, types: dict[str, str], settings: PriceSettings, *, required: bool = True
) -> tuple[DataFrame, dict[str, str], PriceReport]:
    """A table of items with the columns price_level and, if there are categories, category; empty where unknown.

    Args:
        items: text columns.
        types: of its columns. A price column of type float with texts such as ``$12`` becomes a token, because
            RecBole could not read it.
        required: refuse items none of which gets a level; else nothing is made of them.

    Raises:
        DatasetError: a column asked for is missing, no item gets a level, or a column price_level or category is there
            and holds something else.
    """
    price_column = _column(items, settings.price_column, ("price",), "--price-column")
    category_column = _column(items, settings.category_column, CATEGORY_COLUMNS, "--category-column")
    used = replace(settings, price_column=price_column, category_column=category_column)
    if price_column is None or settings.n_levels == 0:
        return items, types, PriceReport(used, (), len(items), 0, 0, 0)

    texts = items[price_column].tolist()
    price, missing = parse_prices(texts, ranges=settings.ranges)
    category = ["all"] * len(items)
    if category_column is not None:
        category = items[category_column].tolist()
        if types[category_column] != "token":  # a token is one name, even with spaces
            category = item_categories(category, position=settings.category_position)
    priced = ~np.isnan(price)
    n_priced = Counter(name for name, has in zip(category, priced, strict=True) if has)
    small = priced & np.array([name != "" and n_priced[name] < settings.min_category for name in category], dtype=bool)
    alone = priced & np.array([name == "" for name in category], dtype=bool)
    price[small] = np.nan
    missing.update({f"fewer than {settings.min_category} priced items in its category": int(small.sum())})
    missing.update({"no category": int(alone.sum())})
    levels = price_levels(price, category, n_levels=settings.n_levels, method=settings.method)
    missing = {f"price {why}" if why == "empty" else why: n for why, n in missing.most_common() if n}
    if not levels.any() and not required:
        return items, types, PriceReport(used, (), len(items), 0, 0, 0, missing)
    if not levels.any():
        reasons = ", ".join(f"{n} {why}" for why, n in missing.items())
        raise DatasetError(f"no item of {len(items)} gets a price level ({reasons}); --price-levels 0 makes none")

    made = {"price_level": [str(level) if level else "" for level in levels.tolist()]}
    if category_column is not None:
        made["category"] = category
    items, types = items.copy(), dict(types)
    for column, values in made.items():
        if column in items and items[column].tolist() != values:
            raise DatasetError(
                f"the items have a column {column} already, which would be replaced by other values; rename it"
            )
        if column not in items:
            items[column], types[column] = np.array(values, dtype=object), "token"
    if types[price_column] == "float" and not all(PLAIN_NUMBER.fullmatch(text) for text in texts):
        types[price_column] = "token"
    filled = levels > 0
    report = PriceReport(
        settings=used,
        columns=tuple(made),
        n_items=len(items),
        n_filled=int(filled.sum()),
        n_levels=len(set(levels[filled].tolist())),
        n_categories=len({name for name, has in zip(category, filled, strict=True) if has}),
        missing=missing,
    )
    return items, types, report


def _column(items: DataFrame, asked: str | None, usual: Sequence[str], option: str) -> str | None:
    if asked is None:
        return next((name for name in usual if name in items), None)
    if asked not in items:
        raise DatasetError(f"the items have no column {asked}, only {', '.join(items.columns)}; choose with {option}")
    return asked


def add_price_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command line that `price_settings` reads."""
    group = parser.add_argument_group("price levels")
    group.add_argument("--price-levels", type=int, default=100, metavar="P", help="in each category (100); 0 for none")
    group.add_argument(
        "--price-method", choices=METHODS, default="logistic", help="logistic (default), linear as in MMSBR's data, ..."
    )
    group.add_argument(
        "--price-column", metavar="NAME", help="of the items (price): numbers or texts such as $1,299.00"
    )
    group.add_argument("--price-ranges", choices=RANGES, default="mean", help="$10 - $20 is 15 (mean, default) or 10")
    group.add_argument(
        "--category-column", metavar="NAME", help="of the items (category or categories); without one, all are one"
    )
    group.add_argument(
        "--category-position", choices=POSITIONS, default="last", help="name of the list that counts (last)"
    )
    group.add_argument(
        "--min-category", type=int, default=1, metavar="N", help="no level where fewer items have a price (1)"
    )


def price_settings(options: argparse.Namespace) -> PriceSettings:
    return PriceSettings(
        n_levels=options.price_levels,
        method=options.price_method,
        price_column=options.price_column,
        category_column=options.category_column,
        category_position=options.category_position,
        min_category=options.min_category,
        ranges=options.price_ranges,
    )
