"""What is in a prepared folder, in figures: read from its files, not from what somebody said about them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dataset_prep.features import read_items
from recbole_mm.data.files import numbers, read_table
from recbole_mm.data.layout import SPLITS, Manifest, data_fingerprint, folder_kind, interaction_files, read_feature

if TYPE_CHECKING:
    from pandas import DataFrame

TEXT_COLUMNS = ("title", "brand", "categories", "category", "description")
HEAD = 0.2  # share of the items that are called popular


class Spread(NamedTuple):
    """How a set of numbers is spread."""

    smallest: float
    median: float
    mean: float
    largest: float

    @classmethod
    def of(cls, values: np.ndarray) -> Spread:
        return cls(float(values.min()), float(np.median(values)), float(values.mean()), float(values.max()))

    def __str__(self) -> str:
        smallest, median, mean, largest = (short(value) for value in self)
        return f"{smallest} to {largest}, median {median}, mean {mean}"


@dataclass(frozen=True)
class FeatureDescription:
    """One feature: items with a row among those that occur, rows in all, width, and what made it."""

    n_covered: int
    n_rows: int
    width: int
    encoder: str
    source: str
    model: str


@dataclass(frozen=True)
class Description:
    """Figures of a prepared folder.

    Attributes:
        kind: "interactions" or "splits", as `recbole_mm.data.layout.folder_kind` says.
        owner: what a history belongs to, "users" or "sessions".
        lengths: [S], interactions of each history. A session that was cut counts with what is left of it.
        popularity: [n], interactions of each item that occurs, falling.
        parts: rows of each part, of a split folder.
        first, last: unix seconds of the first and the last interaction, None where the files hold no times.
        n_listed: items in the table of items, 0 without one.
        columns: items that occur and have something in this column.
        prices: [m], known prices.
        features: by name.
        pictures: pictures by status, empty without an index.
        cold: items in validation or test that training has not, None for an unsplit folder.
    """

    name: str
    kind: str
    fingerprint: str
    owner: str
    lengths: np.ndarray
    popularity: np.ndarray
    parts: dict[str, int]
    first: float | None
    last: float | None
    n_listed: int
    columns: dict[str, int]
    prices: np.ndarray
    features: dict[str, FeatureDescription]
    pictures: dict[str, int]
    cold: int | None
    manifest: Manifest
    tokens: frozenset[str] = field(repr=False, default=frozenset())

    @property
    def n_items(self) -> int:
        """Items that occur."""
        return len(self.popularity)

    @property
    def n_interactions(self) -> int:
        return int(self.lengths.sum())

    @property
    def density(self) -> float:
        """Interactions over the possible pairs of history and item."""
        return self.n_interactions / (len(self.lengths) * self.n_items)

    @property
    def head_share(self) -> float:
        """Share of the interactions that the most popular fifth of the items has."""
        return float(self.popularity[: max(1, round(HEAD * self.n_items))].sum() / self.popularity.sum())

    def __str__(self) -> str:
        lines = [
            f"{self.name}: {len(self.lengths):,} {self.owner}, {self.n_items:,} items, "
            f"{self.n_interactions:,} interactions, density {self.density:.3%}",
            f"length of a history: {Spread.of(self.lengths)}",
            f"interactions of an item: {Spread.of(self.popularity)}; "
            f"the most popular {HEAD:.0%} have {self.head_share:.0%} of all",
        ]
        if self.n_listed > self.n_items:
            lines.append(f"the table of items has {self.n_listed:,}, with those that do not occur")
        if self.first is not None:
            lines.append(f"from {day(self.first)} to {day(self.last)}")
        if self.parts:
            lines.append("rows: " + ", ".join(f"{n:,} {part}" for part, n in self.parts.items()))
        if self.cold is not None:
            lines.append(f"cold items (in validation or test, not in training): {self.cold:,}")
        for column, n in self.columns.items():
            lines.append(f"{column}: {n:,} of {self.n_items:,} items ({n / self.n_items:.1%})")
        if len(self.prices):
            lines.append(f"prices: {Spread.of(self.prices)}")
        for name, made in self.features.items():
            share = made.n_covered / self.n_items
            model = f" ({made.model})" if made.model else ""
            lines.append(
                f"feature {name}: {made.n_covered:,} items ({share:.1%}), {made.n_rows:,} x {made.width}, "
                f"{made.encoder}{model} of {made.source}"
            )
        if self.pictures:
            lines.append("pictures: " + ", ".join(f"{n:,} {status}" for status, n in self.pictures.items()))
        lines.append(f"fingerprint of the interactions: {self.fingerprint}")
        return "\n".join(lines)


def short(value: float) -> str:
    """A number with as many digits as one wants to read: 1,234, 2.5, 0.0042."""
    if value == round(value):
        return f"{value:,.0f}"
    return f"{value:,.2f}" if abs(value) >= 1 else f"{value:.2g}"


def day(seconds: float) -> str:
    """A time as a date in UTC."""
    return str(np.datetime64(int(seconds), "s").astype("datetime64[D]"))


def describe(folder: Path) -> Description:
    """Figures of a prepared folder, or of a plain folder of RecBole's. Reads all its tables and features once.

    Raises:
        DatasetError: no interactions, or a table or feature that cannot be read.
    """
    folder = Path(folder)
    manifest = Manifest.load(folder)
    kind = folder_kind(folder)
    if kind == "interactions":
        lengths, counts, times = _of_interactions(interaction_files(folder)[0])
        parts, cold = {}, None
    else:
        lengths, counts, parts, cold = _of_splits(interaction_files(folder))
        times = None
    tokens = frozenset(counts)
    items = read_items(folder) if (folder / f"{folder.name}.item").is_file() else None
    columns, prices = ({}, np.empty(0)) if items is None else _of_items(items, tokens, folder)
    return Description(
        name=folder.name,
        kind=kind,
        fingerprint=data_fingerprint(folder),
        owner="users" if kind == "interactions" else "sessions",
        lengths=lengths,
        popularity=np.sort(np.fromiter(counts.values(), dtype=np.int64))[::-1],
        parts=parts,
        first=None if times is None else float(times.min()),
        last=None if times is None else float(times.max()),
        n_listed=0 if items is None else len(items),
        columns=columns,
        prices=prices,
        features={name: _of_feature(folder, name, manifest, tokens) for name in sorted(manifest.features)},
        pictures=_of_pictures(folder),
        cold=cold,
        manifest=manifest,
        tokens=tokens,
    )


def _of_interactions(path: Path) -> tuple[np.ndarray, Counter[str], np.ndarray | None]:
    table = read_table(path, needed=["user_id", "item_id"], optional=["timestamp"])
    lengths = table["user_id"].value_counts(sort=False).to_numpy()
    times = numbers(table, "timestamp", path) if "timestamp" in table else None
    return lengths, Counter(table["item_id"].tolist()), times


def _of_splits(paths: list[Path]) -> tuple[np.ndarray, Counter[str], dict[str, int], int]:
    """Of each session the longest row counts: the others are its beginnings."""
    longest: dict[str, list[str]] = {}
    parts, seen = {}, {}
    for part, path in zip(SPLITS, paths, strict=True):
        table = read_table(path, needed=["session_id", "item_id_list", "item_id"])
        parts[part], seen[part] = len(table), set()
        for session, prefix, target in zip(table["session_id"], table["item_id_list"], table["item_id"], strict=True):
            items = [*prefix.split(), target]
            seen[part].update(items)
            if len(items) >= len(longest.get(session, ())):
                longest[session] = items
    counts = Counter(item for items in longest.values() for item in items)
    everything = seen["train"] | seen["valid"] | seen["test"]
    counts.update(dict.fromkeys(everything - set(counts), 1))  # items of rows that were cut since
    lengths = np.fromiter((len(items) for items in longest.values()), dtype=np.int64)
    return lengths, counts, parts, len(everything - seen["train"])


def _of_items(items: DataFrame, tokens: frozenset[str], folder: Path) -> tuple[dict[str, int], np.ndarray]:
    occurring = items[items["item_id"].isin(tokens)]
    shown = [column for column in (*TEXT_COLUMNS, "price", "price_level", "image", "image_urls") if column in items]
    columns = {column: int((occurring[column].str.strip() != "").sum()) for column in shown}
    prices = np.empty(0)
    if "price" in items:
        from dataset_prep.price import parse_prices

        prices = parse_prices(occurring["price"].tolist())[0]
    return columns, prices[~np.isnan(prices)]


def _of_feature(folder: Path, name: str, manifest: Manifest, tokens: frozenset[str]) -> FeatureDescription:
    feature, info = read_feature(folder, name, manifest=manifest), manifest.features[name]
    filled = {token for token, count in zip(feature.tokens, feature.counts, strict=True) if count > 0}
    return FeatureDescription(
        n_covered=len(filled & tokens),
        n_rows=len(feature.rows),
        width=feature.rows.shape[1],
        encoder=info.encoder,
        source=info.source,
        model=_model(info.settings),
    )


def _model(settings: dict[str, Any]) -> str:
    """The model's name among the settings of an encoder, or those of the encoders within it."""
    for key in ("model", "network"):
        if settings.get(key):
            return str(settings[key])
    inner = (_model(value) for value in settings.values() if isinstance(value, dict))
    return ", ".join(dict.fromkeys(filter(None, inner)))


def _of_pictures(folder: Path) -> dict[str, int]:
    from dataset_prep.pictures import read_index

    return dict(Counter(picture.status for picture in read_index(folder) or ()).most_common())
