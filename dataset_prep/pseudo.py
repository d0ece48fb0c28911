"""Pseudo-modalities without a generator: what pictures do the items have whose texts are most alike?

The pseudo feature ``image_from_text`` of an item is the mean of the *pictures* of the items whose *texts* resemble its
own most; ``text_from_image`` is the reverse. This is retrieval, not generation: MMSBR's authors had a picture drawn
from each title and the content of each picture named. Nothing is invented here, and only two features are needed:

    source of item i ──── cosine ───> the k most similar other items ──── mean of their result ───> row i

What it keeps of MMSBR's idea is that a pseudo picture tells what the text tells, in the space of the real pictures, so
that it agrees with the real one in what both modalities say and differs in what only one says. The item itself is never
its own neighbour. Both spaces are the real feature's own, so real and pseudo vectors can be compared as they are.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dataset_prep.encoders import NEIGHBOURS as ENCODER
from dataset_prep.features import FeatureReport, read_items
from recbole_mm.data.layout import Feature, Manifest, read_feature, write_feature
from recbole_mm.errors import DatasetError, SettingError

N_NEIGHBOURS = 5
SIMILARITIES_AT_ONCE = 1 << 22  # float64, 32 MiB
DIGITS = 9  # of a cosine that count; those behind differ with block size and machine, and would part equal items


def is_pseudo(name: str) -> bool:
    """Whether a feature is called ``<result>_from_<source>``."""
    result, from_, source = name.partition("_from_")
    return bool(result and from_ and source)


def make_pseudo_feature(folder: Path, name: str, *, neighbours: int = N_NEIGHBOURS) -> FeatureReport:
    """Add the pseudo feature ``<result>_from_<source>`` to a folder that has both features.

    Every item with a source gets one row; its neighbours are items that have both. Items with several rows count with
    their mean. O(N^2 F) time, a block of N similarities of memory; same features, same bytes.

    Args:
        name: such as "image_from_text".
        neighbours: k, how many items are averaged; at least 1.

    Raises:
        SettingError: another kind of name, or fewer than k other items to choose from.
        DatasetError: no ``.item`` file, or one of the two features is missing or broken.
    """
    folder = Path(folder)
    if not is_pseudo(name):
        raise SettingError(
            f"the encoder {ENCODER} makes features called <result>_from_<source>, such as image_from_text, not {name!r}"
        )
    if neighbours < 1:
        raise SettingError(f"neighbours is {neighbours}, expected at least 1")
    result, source = _two_features(folder, name)
    tokens = list(read_items(folder)["item_id"])
    manifest = Manifest.load(folder)
    source_mean, has_source = _item_means(read_feature(folder, source, manifest=manifest), tokens)  # [N, F], [N]
    result_mean, has_result = _item_means(read_feature(folder, result, manifest=manifest), tokens)  # [N, F'], [N]
    if not has_source.any():
        raise DatasetError(f"{folder.name}: none of the {len(tokens)} items has a row in the feature {source!r}")
    if (both := int((has_source & has_result).sum())) <= neighbours:
        raise SettingError(
            f"neighbours is {neighbours}, but only {both} items of {folder.name} have both {result} and {source}; "
            f"choose at most {max(both - 1, 0)}"
        )
    rows = neighbour_means(source_mean[has_source], result_mean[has_source], has_result[has_source], neighbours)
    listed = [token for token, has in zip(tokens, has_source, strict=True) if has]
    made_of = {part: manifest.files[manifest.features[part].file].sha256 for part in (result, source)}
    write_feature(
        folder,
        name,
        tokens=listed,
        rows=rows,
        encoder=ENCODER,
        source=f"{result}, {source}",
        settings={"neighbours": neighbours, "made_of": made_of},
    )
    why, lacking = f"no {source}", np.flatnonzero(~has_source)
    return FeatureReport(
        feature=name,
        n_items=len(tokens),
        n_filled=len(listed),
        shape=rows.shape,
        missing={why: len(lacking)} if len(lacking) else {},
        examples={why: tokens[lacking[0]]} if len(lacking) else {},
        remarks=(f"each is the mean {result} of the {neighbours} items most alike by {source}; nothing is generated",),
    )


def neighbour_means(
    source: np.ndarray, result: np.ndarray, has_result: np.ndarray, neighbours: int, *, at_once: int | None = None
) -> np.ndarray:
    """Mean result of each item's k nearest other items that have one.

    Likeness is the cosine of the source vectors, each dimension brought to mean 0 and variance 1 over the items first
    (constant ones to 0; a zero vector is equally unlike all). Of equally similar items the earlier ones count.

    Args:
        source: [N, F] float64.
        result: [N, F'] float64; rows without ``has_result`` are not read.
        has_result: [N] bool, more than k of them.
        neighbours: k.
        at_once: similarities held at a time; changes nothing but memory.

    Returns:
        [N, F'] float32.
    """
    directions = _unit_rows(_standardised(source))  # [N, F]
    candidates = np.flatnonzero(has_result)  # [C]
    column_of = np.full(len(source), -1)  # [N]
    column_of[candidates] = np.arange(len(candidates))
    means = np.empty((len(source), result.shape[1]), dtype=np.float32)
    block = max(1, (at_once or SIMILARITIES_AT_ONCE) // len(candidates))
    for start in range(0, len(source), block):
        likeness = np.round(directions[start : start + block] @ directions[candidates].T, DIGITS)  # [n, C]
        own = column_of[start : start + block]
        likeness[np.flatnonzero(own >= 0), own[own >= 0]] = -np.inf
        nearest = candidates[_largest(likeness, neighbours)]  # [n, k]
        means[start : start + block] = result[nearest].mean(axis=1)
    return means


def _two_features(folder: Path, name: str) -> tuple[str, str]:
    """Result and source, once both are in the folder."""
    there = sorted(Manifest.load(folder).features)
    result, _, source = name.partition("_from_")
    if missing := [part for part in (result, source) if part not in there]:
        raise DatasetError(
            f"{name} is made of the features {result!r} and {source!r}, but {folder.name} has no "
            + " and no ".join(map(repr, missing))
            + f", only {there}\n  make first: python -m dataset_prep features --dataset {folder} --feature {missing[0]}"
        )
    return result, source


def _item_means(feature: Feature, tokens: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Mean vector of each item, [N, F] float64 and zero without rows, and which items have rows, [N] bool."""
    filled = np.flatnonzero(feature.counts)
    starts, counts = (np.cumsum(feature.counts) - feature.counts)[filled], feature.counts[filled]
    means = np.zeros((len(tokens), feature.rows.shape[1]))
    has_rows = np.zeros(len(tokens), dtype=bool)
    if not len(filled):
        return means, has_rows
    found = np.add.reduceat(feature.rows, starts, axis=0, dtype=np.float64) / counts[:, None]
    entry_of = {feature.tokens[entry]: row for row, entry in enumerate(filled)}
    entries = np.array([entry_of.get(token, -1) for token in tokens])
    has_rows[:] = entries >= 0
    means[has_rows] = found[entries[has_rows]]
    return means, has_rows


def _standardised(rows: np.ndarray) -> np.ndarray:
    """Each dimension with mean 0 and variance 1; 0 where it is constant but for rounding."""
    deviation = rows.std(axis=0)
    varies = deviation > 1e-7 * np.abs(rows).max(axis=0)  # float32 has 7 digits
    return np.where(varies, (rows - rows.mean(axis=0)) / np.where(varies, deviation, 1), 0)


def _unit_rows(rows: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(length > 0, length, 1)


def _largest(values: np.ndarray, k: int) -> np.ndarray:
    """Columns of the k largest values of each row, [n, k]; of equal values the first ones, in order of columns."""
    least = np.partition(values, -k, axis=1)[:, -k, None]  # [n, 1], the k-th largest
    above, level = values > least, values == least
    n_left = k - above.sum(axis=1, keepdims=True)
    chosen = above | (level & (np.cumsum(level, axis=1) <= n_left))
    return np.nonzero(chosen)[1].reshape(len(values), k)
