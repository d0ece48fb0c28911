"""Parts of the test rows that a mean hides: rare targets, short histories, prices, items without content.

A slice parts the rows into bands by what is in the data set alone, so that it is the same for every model.

popularity   head, mid, tail: items by their occurrences in training, a third of all occurrences each; cold: in none
history      items before the target, at most MAX_ITEM_LIST_LENGTH: 1-2, 3-5, 6-10, 11-20, 21+
price        low, mid, high: thirds of the items by price, or by price level; unknown. Only if the folder has either
coverage     all, some or none of the folder's features have content for the target. Only if the folder has features
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from recbole_mm.data.files import read_table
from recbole_mm.errors import DatasetError
from recbole_mm.model.counting import TrainingRows, occurrences

HISTORY_BANDS = {"1-2": 2, "3-5": 5, "6-10": 10, "11-20": 20, "21+": np.inf}  # band -> its longest history
BANDS = {  # in the order in which they are shown
    "popularity": ("head", "mid", "tail", "cold"),
    "history": tuple(HISTORY_BANDS),
    "price": ("low", "mid", "high", "unknown"),
    "coverage": ("all", "some", "none"),
}
PRICE_COLUMNS = ("price", "price_level")


def bands_of(train, test) -> tuple[dict[str, np.ndarray], list[str]]:
    """The band of each test row in each slice.

    Args:
        train, test: the parts of a `MultimodalDataset`.

    Returns:
        ``{"popularity": [R] str, …}``, and a sentence for each slice that could not be made.
    """
    target = test.inter_feat[test.iid_field].numpy()  # [R]
    bands = {
        "popularity": popularity_bands(_training_occurrences(train))[target],
        "history": history_bands(test.inter_feat[test.item_list_length_field].numpy()),
    }
    problems = []
    for name, of_items in (("price", _price_of_items), ("coverage", _coverage_of_items)):
        try:
            band = of_items(test)  # [N], or None
        except (DatasetError, OSError, ValueError) as error:
            problems.append(f"no slices by {name}: {str(error).partition(chr(10))[0]}")
            continue
        if band is not None:
            bands[name] = band[target]
    return bands, problems


def by_band(
    bands: Mapping[str, np.ndarray], values: Mapping[str, np.ndarray], *, decimals: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Means of each band and its number of rows: ``{"popularity": {"head": {"n": 12, "recall@20": …}}}``."""
    slices: dict[str, dict[str, dict[str, float]]] = {}
    for name, band in bands.items():
        slices[name] = {}
        for value in BANDS[name]:
            rows = band == value
            if rows.any():
                means = {metric: round(float(each[rows].mean()), decimals) for metric, each in values.items()}
                slices[name][value] = {"n": int(rows.sum()), **means}
    return slices


# ------------------------------------------------ bands of rows


def history_bands(length: np.ndarray) -> np.ndarray:
    """[R] lengths -> [R] bands."""
    return np.array(BANDS["history"])[np.searchsorted(list(HISTORY_BANDS.values()), length)]


# ------------------------------------------------ bands of items


def popularity_bands(counts: np.ndarray) -> np.ndarray:
    """[N] occurrences -> [N] bands.

    Items that occur equally often share a band: the one in which the first of them falls, the most popular item first.
    """
    order = np.argsort(-counts, kind="stable")
    before = np.cumsum(counts[order]) - counts[order]  # occurrences of the items before, [N] in that order
    more_popular = np.empty_like(counts)
    more_popular[order] = before[np.searchsorted(-counts[order], -counts[order])]
    third = np.minimum(3 * more_popular // max(1, counts.sum()), 2)
    return np.where(counts == 0, "cold", np.array(BANDS["popularity"])[third])


def _training_occurrences(train) -> np.ndarray:
    return occurrences(TrainingRows.of_part(train), n_items=train.item_num)


def price_bands(price: np.ndarray) -> np.ndarray:
    """[N] prices, NaN where unknown -> [N] bands; the thirds are those of the known ones."""
    known = np.isfinite(price)
    edges = np.quantile(price[known], [1 / 3, 2 / 3])
    return np.array(BANDS["price"])[np.where(known, np.searchsorted(edges, price), 3)]


def _price_of_items(dataset) -> np.ndarray | None:
    """[N]; from the file itself, since what a model reads may be knocked out. The first column that holds a number."""
    columns = [name for name in PRICE_COLUMNS if name in dataset.item_columns()]
    if not columns:
        return None
    path = dataset.folder / f"{dataset.folder.name}.item"
    table = read_table(path, needed=[dataset.iid_field, *columns], optional=[]).set_index(dataset.iid_field)
    tokens = [str(token) for token in dataset.field2id_token[dataset.iid_field]]
    for column in columns:
        number = pd.to_numeric(table[column], errors="coerce").to_dict()
        price = np.array([np.nan, *(number.get(token, np.nan) for token in tokens[1:])])  # padding has none
        if np.isfinite(price).any():
            return price_bands(price)
    return None


def _coverage_of_items(dataset) -> np.ndarray | None:
    """[N]; from the files themselves, and of all features, whichever a model uses."""
    if not dataset.manifest.features:
        return None
    tokens = [str(token) for token in dataset.field2id_token[dataset.iid_field]]
    n_with_content = np.zeros(len(tokens), dtype=np.int64)
    for info in dataset.manifest.features.values():
        entries = (dataset.folder / info.items).read_text(encoding="utf-8").split("\n")[:-1]
        counts = np.ones(len(entries)) if info.counts is None else np.load(dataset.folder / info.counts)
        covered = {token for token, count in zip(entries, counts, strict=True) if count > 0}
        n_with_content += [token in covered for token in tokens]
    n_features = len(dataset.manifest.features)
    return np.where(n_with_content == n_features, "all", np.where(n_with_content == 0, "none", "some"))
