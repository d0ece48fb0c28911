"""Fewer dimensions for features: PCA that a modality and its pseudo twin share.

    image            ─┐ rows of items that occur in training        ┌─> image            [S, width]
    image_from_text  ─┘ ──> mean, directions of largest variance ───┴─> image_from_text  [S', width]

Fitted separately, the axes of two features would have nothing to do with each other, and the likeness of a picture and
its pseudo picture would mean nothing; MMSBR's released script does so. What is fitted sees only items of the training
part. The directions are those of the exact covariance in float64, each with its largest component positive: no random
start, same rows, same directions.

The originals stay in the folder as ``<name>_full``. Reducing again starts from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataset_prep.encoding.engine import is_whole
from dataset_prep.features import original_name
from dataset_prep.locking import locked
from recbole_mm.data.files import numbers, read_table
from recbole_mm.data.layout import (
    Feature,
    FeatureInfo,
    Manifest,
    data_fingerprint,
    folder_kind,
    interaction_files,
    read_feature,
    write_feature,
)
from recbole_mm.errors import DatasetError, SettingError

ENCODER = "pca"
SCALES = ("none", "unit", "standardize")
FIT_ON = ("train", "all")
ROWS_AT_ONCE = 4096
NO_VARIANCE = 1e-12  # of the largest variance: rounding of float32 rows


@dataclass(frozen=True)
class Projection:
    """A map from rows of a feature to shorter ones: ``((row - mean) / deviation) @ directions``.

    Attributes:
        mean, deviation: [F]; the deviation is 1 unless dimensions are standardized.
        directions: [F, width], orthogonal, divided by the deviation along them if rows are whitened.
        unit: bring each result to length 1.
        explained: share of the variance that the directions hold, 0 to 1.
        n_rows: that it was fitted on.
    """

    mean: np.ndarray
    deviation: np.ndarray
    directions: np.ndarray
    unit: bool
    explained: float
    n_rows: int

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """[n, width] float32 of rows [n, F]."""
        out = np.empty((len(rows), self.directions.shape[1]), dtype=np.float32)
        for start in range(0, len(rows), ROWS_AT_ONCE):
            block = np.asarray(rows[start : start + ROWS_AT_ONCE], dtype=np.float64)
            made = ((block - self.mean) / self.deviation) @ self.directions
            if self.unit:
                length = np.linalg.norm(made, axis=1, keepdims=True)
                made /= np.where(length > 0, length, 1)
            out[start : start + ROWS_AT_ONCE] = made
        return out


@dataclass(frozen=True)
class ReductionReport:
    """What became of the features.

    Attributes:
        widths: of each feature before and after.
        explained: share of the variance that is left, by feature; one number for those that were fitted together.
        n_items: items that were fitted on.
        fit_on: "train" or "all".
        up_to_date: features that were there already, made of the same rows in the same way.
    """

    widths: dict[str, tuple[int, int]]
    explained: dict[str, float]
    n_items: int
    fit_on: str
    up_to_date: tuple[str, ...] = ()

    def __str__(self) -> str:
        which = "items of the training part" if self.fit_on == "train" else "items"
        lines = [f"fitted on {self.n_items} {which}"]
        lines += [
            f"feature {name!r}: width {before} to {after}, {self.explained[name]:.1%} of the variance"
            f"; the original is {name}_full" + ("; up to date, nothing was done" if name in self.up_to_date else "")
            for name, (before, after) in self.widths.items()
        ]
        return "\n".join(lines)


def reduce_features(
    folder: Path,
    names: Sequence[str],
    *,
    width: int,
    whiten: bool = False,
    scale: str = "none",
    fit_on: str = "train",
    progress: bool = True,
) -> ReductionReport:
    """Bring features of a folder to a smaller width, each modality together with its pseudo twins.

    Features whose names agree before ``_from_`` are fitted as one, such as image and image_from_text. Every row is
    mapped by itself, so that several rows of an item stay several. O(S F^2 + F^3) time and O(F^2) memory beside the
    result. The same folder gives the same bytes; what was made of the same rows in the same way is left alone.

    Args:
        names: of the features.
        width: of the result, at most the number of directions in which the rows fitted on vary.
        whiten: divide each new dimension by its deviation over the rows fitted on.
        scale: "none"; "unit" brings each new row to length 1; "standardize" brings each old dimension to variance 1
            over the rows fitted on first, so that none counts for more because of its unit.
        fit_on: "train" for items that occur in the training part (of ``<name>.inter``: all but the last two
            interactions of each user, as leave-one-out leaves them), or "all".
        progress: show a progress bar on stderr.

    Raises:
        SettingError: a width that cannot be had, names the largest; an unknown value; twins of different widths; a name
            that is the original of a reduced feature.
        DatasetError: a feature is missing or broken, or none of its items occurs in training.
    """
    folder, names = Path(folder), list(dict.fromkeys(names))
    if width < 1:
        raise SettingError(f"width is {width}, expected at least 1")
    if scale not in SCALES:
        raise SettingError(f"scale is {scale!r}, expected one of {list(SCALES)}")
    if fit_on not in FIT_ON:
        raise SettingError(f"fit_on is {fit_on!r}, expected one of {list(FIT_ON)}")
    with locked(folder):
        return _reduce(folder, names, width=width, whiten=whiten, scale=scale, fit_on=fit_on, progress=progress)


def _reduce(
    folder: Path, names: list[str], *, width: int, whiten: bool, scale: str, fit_on: str, progress: bool
) -> ReductionReport:
    from threadpoolctl import threadpool_limits
    from tqdm import tqdm

    manifest = Manifest.load(folder)
    originals = {name: original_name(manifest, name) for name in names}
    if missing := [name for name, original in originals.items() if original not in manifest.features]:
        raise DatasetError(
            f"{folder.name} has no feature {', '.join(map(repr, missing))}, only {sorted(manifest.features)}\n"
            f"  make it with: python -m dataset_prep features --dataset {folder} --feature {missing[0]}"
        )
    for name in names:
        short = name.removesuffix("_full")
        if short != name and original_name(manifest, short) == name:
            raise SettingError(f"{name} keeps the original of {short}; reduce {short}, which starts from it")
    full = {name: read_feature(folder, original, manifest=manifest) for name, original in originals.items()}
    fitting_items = training_items(folder) if fit_on == "train" else None
    provenance: dict[str, Any] = {"whiten": whiten, "scale": scale, "fit_on": fit_on}
    if fit_on == "train":
        provenance["interactions"] = data_fingerprint(folder)

    made: dict[str, tuple[np.ndarray, dict[str, Any]]] = {}
    explained, fitted_on, kept = {}, set(), []
    with threadpool_limits(limits=1), tqdm(total=len(names), unit="feature", disable=not progress, leave=False) as bar:
        for twins in _twins(names):
            for name in twins:
                fitted_on |= _items_of(full[name], fitting_items)
            wanted = {
                **provenance,
                "width": width,
                "fitted_with": twins,
                "made_of": {twin: manifest.files[manifest.features[originals[twin]].file].sha256 for twin in twins},
            }
            if all(_is_up_to_date(folder, manifest, name, originals[name], wanted) for name in twins):
                for name in twins:
                    explained[name] = manifest.features[name].settings["reduction"]["explained_variance"]
                kept += twins
                bar.update(len(twins))
                continue
            projection = _fit(folder, twins, full, fitting_items, width=width, whiten=whiten, scale=scale)
            reduction = {
                **wanted,
                "n_rows": projection.n_rows,
                "explained_variance": round(projection.explained, 6),
            }
            for name in twins:
                settings = {"reduction": reduction, "of": _provenance(manifest.features[originals[name]])}
                made[name] = projection(full[name].rows), settings
                explained[name] = projection.explained
                bar.update()

    for name in made:
        info, feature = manifest.features[originals[name]], full[name]
        counts = feature.counts if info.counts else None
        if originals[name] == name:
            write_feature(
                folder, f"{name}_full", tokens=feature.tokens, rows=feature.rows, counts=counts, encoder=info.encoder,
                source=info.source, settings=info.settings,
            )  # fmt: skip
        rows, settings = made[name]
        write_feature(
            folder, name, tokens=feature.tokens, rows=rows, counts=counts, encoder=ENCODER, source=f"{name}_full",
            settings=settings,
        )  # fmt: skip
    widths = {name: (full[name].rows.shape[1], width) for name in names}
    return ReductionReport(
        widths=widths, explained=explained, n_items=len(fitted_on), fit_on=fit_on, up_to_date=tuple(kept)
    )


def _provenance(info: FeatureInfo) -> dict[str, Any]:
    return {"encoder": info.encoder, "source": info.source, "settings": info.settings}


def _is_up_to_date(folder: Path, manifest: Manifest, name: str, original: str, wanted: dict[str, Any]) -> bool:
    """Whether a feature is what this reduction of its original would make."""
    info, full = manifest.features.get(name), manifest.features[original]
    if info is None or original == name or info.settings.get("of") != _provenance(full):
        return False
    reduction = info.settings["reduction"]
    if any(reduction.get(key) != value for key, value in wanted.items()):
        return False
    hashes = [
        [file and manifest.files[file].sha256 for file in (entry.items, entry.counts)] for entry in (info, full)
    ]  # of the items and of how many rows each has
    return hashes[0] == hashes[1] and is_whole(folder, manifest, info)


def _fit(
    folder: Path, twins: Sequence[str], full: dict[str, Feature], items: set[str] | None, **how: Any
) -> Projection:
    """The projection of features that share a space, fitted on the rows of these items; None takes all items."""
    widths = {name: full[name].rows.shape[1] for name in twins}
    if len(set(widths.values())) > 1:
        raise SettingError(
            f"features of {folder.name} that share a space need one width, found {widths}; make them with one encoder"
            ", or reduce them one at a time"
        )
    chosen = [_rows_of(full[name], items) for name in twins]
    if not sum(map(len, chosen)):
        raise DatasetError(f"{folder.name}: no item with a row in {' or '.join(twins)} occurs in training")
    arrays = [full[name].rows for name in twins]
    return fit_projection(lambda: _blocks(arrays, chosen), called=" and ".join(twins), **how)


# ---------------------------------------------------------------- what is fitted on what


def _twins(names: Sequence[str]) -> list[list[str]]:
    """Names that agree before ``_from_``, together."""
    together: dict[str, list[str]] = {}
    for name in names:
        together.setdefault(name.partition("_from_")[0], []).append(name)
    return list(together.values())


def training_items(folder: Path) -> set[str]:
    """Tokens of the items that a model sees in training.

    Of a folder with splits those of ``<name>.train.inter``. Of one with ``<name>.inter`` those of all but the last two
    interactions of each user, in order of time and then of lines (the first one always counts), as RecBole's
    leave-one-out parts them.

    Raises:
        DatasetError: no interactions, or a broken file.
    """
    folder = Path(folder)
    path = interaction_files(folder)[0]
    if folder_kind(folder) == "splits":
        table = read_table(path, needed=["item_id", "item_id_list"], optional=[])
        return {token for tokens in table["item_id_list"] for token in tokens.split(" ") if token} | set(
            table["item_id"]
        )
    table = read_table(path, needed=["user_id", "item_id", "timestamp"], optional=[])
    order = np.argsort(numbers(table, "timestamp", path), kind="stable")
    table = table.iloc[order]
    users = table.groupby("user_id", sort=False)["item_id"]
    n_before, n_all = users.cumcount(), users.transform("size")
    return set(table["item_id"][(n_before < n_all - 2) | (n_before == 0)])


def _items_of(feature: Feature, items: set[str] | None) -> set[str]:
    filled = (token for token, count in zip(feature.tokens, feature.counts, strict=True) if count)
    return {token for token in filled if items is None or token in items}


def _rows_of(feature: Feature, items: set[str] | None) -> np.ndarray:
    """Numbers of the rows of these items; None takes all."""
    if items is None:
        return np.arange(len(feature.rows))
    wanted = np.array([token in items for token in feature.tokens], dtype=bool)
    return np.flatnonzero(np.repeat(wanted, feature.counts))


def _blocks(arrays: Sequence[np.ndarray], rows: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """Float64 [b, F] of the chosen rows of each array."""
    for array, chosen in zip(arrays, rows, strict=True):
        for start in range(0, len(chosen), ROWS_AT_ONCE):
            yield np.asarray(array[chosen[start : start + ROWS_AT_ONCE]], dtype=np.float64)


# ---------------------------------------------------------------- PCA


def fit_projection(
    blocks: Callable[[], Iterable[np.ndarray]], *, width: int, whiten: bool, scale: str, called: str
) -> Projection:
    """PCA of rows that come in blocks, which are read twice.

    Args:
        blocks: called for a new iterator over float64 [b, F].
        called: the features' names, for a message.

    Raises:
        SettingError: the rows do not vary in so many directions.
    """
    n_rows, total = 0, 0.0
    for block in blocks():
        n_rows, total = n_rows + len(block), total + block.sum(axis=0)
    mean = total / n_rows  # [F]
    products, largest = np.zeros((len(mean), len(mean))), np.zeros(len(mean))
    for block in blocks():
        np.maximum(largest, np.abs(block).max(axis=0), out=largest)
        block -= mean
        products += block.T @ block
    covariance = products / max(n_rows - 1, 1)  # [F, F]
    deviation = np.sqrt(np.diag(covariance))
    varies = deviation > 1e-7 * largest  # float32 has 7 digits
    deviation = np.where(varies & (scale == "standardize"), deviation, 1.0)
    covariance = np.where(np.outer(varies, varies), covariance, 0) / np.outer(deviation, deviation)

    variances, directions = np.linalg.eigh(covariance)
    variances, directions = variances[::-1], directions[:, ::-1]  # the largest first
    possible = int((variances > NO_VARIANCE * max(variances[0], 0)).sum()) if variances[0] > 0 else 0
    possible = min(possible, n_rows - 1)
    if width > possible:
        raise SettingError(
            f"width is {width}, but the {n_rows} rows of {called} of width {len(mean)} vary in {possible} directions"
            + (f" only; choose at most {possible}" if possible else ": all are equal")
        )
    directions = directions[:, :width]
    signs = np.sign(directions[np.abs(directions).argmax(axis=0), np.arange(width)])
    directions = directions * signs / (np.sqrt(variances[:width]) if whiten else 1)
    explained = float(variances[:width].sum() / variances[variances > 0].sum())
    return Projection(
        mean=mean, deviation=deviation, directions=directions, unit=scale == "unit", explained=explained, n_rows=n_rows
    )
