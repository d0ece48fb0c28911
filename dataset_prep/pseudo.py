"""Pseudo-modalities without a generator: what pictures do the items have whose texts are most alike?

The pseudo feature ``image_from_text`` of an item is the mean of the *pictures* of the items whose *texts* resemble its
own most; ``text_from_image`` is the reverse. This is retrieval, not generation: MMSBR's authors had a picture drawn
from each title and the content of each picture named. Nothing is invented here, and only two features are needed:

    source of item i ──── cosine ───> the k most similar other items ──── mean of their result ───> row i

What it keeps of MMSBR's idea is that a pseudo picture tells what the text tells, in the space of the real pictures, so
that it agrees with the real one in what both modalities say and differs in what only one says. The item itself is never
its own neighbour. Both spaces are the real feature's own, so real and pseudo vectors can be compared as they are.

With features of CLIP, text and picture can be compared directly. "The picture of another item that CLIP finds nearest
to this item's text" is made with ``by``, of the CLIP vectors of the texts and those of the pictures:

    clip_text of item i ──── cosine ───> the k other items of nearest clip_image ──── mean of their result ───> row i
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dataset_prep.encoders import NEIGHBOURS as ENCODER
from dataset_prep.encoding.engine import is_whole
from dataset_prep.features import FeatureReport, known_report, original_name, read_items
from dataset_prep.locking import locked
from recbole_mm.data.layout import Feature, Manifest, read_feature, write_feature
from recbole_mm.errors import DatasetError, SettingError

N_NEIGHBOURS = 5
N_NEIGHBOURS_ACROSS = 1  # by two features of CLIP: a text describes one picture
SIMILARITIES_AT_ONCE = 1 << 22  # float64, 32 MiB
DIGITS = 9  # of a cosine that count; those behind differ with block size and machine, and would part equal items


def is_pseudo(name: str) -> bool:
    """Whether a feature is called ``<result>_from_<source>``."""
    result, from_, source = name.partition("_from_")
    return bool(result and from_ and source)


def make_pseudo_feature(
    folder: Path, name: str, *, neighbours: int | None = None, by: Sequence[str] | None = None
) -> FeatureReport:
    """Add the pseudo feature ``<result>_from_<source>`` to a folder that has both features.

    It is left alone if it was made of the same rows with the same arguments. Where a feature was reduced, its rows of
    full width count, and the pseudo feature is to be reduced with it again.

    Every item with a source gets one row; its neighbours are items that have both. Items with several rows count with
    their mean. O(N^2 F) time, a block of N similarities of memory; same features, same bytes.

    Args:
        name: such as "image_from_text".
        neighbours: k, how many items are averaged, at least 1; None takes 5, or 1 with ``by``.
        by: two features of one width in one space, such as ("clip_text", "clip_image"): an item's row of the first is
            compared with the other items' rows of the second, as they are. None compares the rows of the source.

    Raises:
        SettingError: another kind of name, fewer than k other items to choose from, or two features of ``by`` that
            cannot be compared.
        DatasetError: no ``.item`` file, or one of the features is missing or broken.
    """
    folder = Path(folder)
    if not is_pseudo(name):
        raise SettingError(
            f"the encoder {ENCODER} makes features called <result>_from_<source>, such as image_from_text, not {name!r}"
        )
    if neighbours is None:
        neighbours = N_NEIGHBOURS if by is None else N_NEIGHBOURS_ACROSS
    if neighbours < 1:
        raise SettingError(f"neighbours is {neighbours}, expected at least 1")
    with locked(folder):
        return _make(folder, name, neighbours=neighbours, by=by)


def _make(folder: Path, name: str, *, neighbours: int, by: Sequence[str] | None) -> FeatureReport:
    tokens = list(read_items(folder)["item_id"])
    manifest = Manifest.load(folder)
    result, _, source = name.partition("_from_")
    query, candidate = (source, source) if by is None else _two_names(by)
    used = list(dict.fromkeys((result, query, candidate)))
    original = {part: original_name(manifest, part) for part in used}
    _require(folder, name, list(original.values()), manifest)
    if by is not None:
        _check_one_space(folder, original[query], original[candidate], manifest)
    made_of = {part: manifest.files[manifest.features[original[part]].file].sha256 for part in used}
    settings = {"neighbours": neighbours, "made_of": made_of} | ({} if by is None else {"by": [query, candidate]})
    there = manifest.features.get(original_name(manifest, name))
    if there is not None and (there.encoder, there.settings) == (ENCODER, settings):
        if is_whole(folder, manifest, there):
            return known_report(folder, name, n_items=len(tokens))
    vectors = {part: _item_means(read_feature(folder, original[part], manifest=manifest), tokens) for part in used}
    (results, has_result), (queries, has_query) = vectors[result], vectors[query]  # [N, F'], [N], [N, F], [N]
    if not has_query.any():
        raise DatasetError(f"{folder.name}: none of the {len(tokens)} items has a row in the feature {query!r}")
    can_be_found = has_result & vectors[candidate][1]  # [N]
    if (both := int(can_be_found.sum())) <= neighbours:
        raise SettingError(
            f"neighbours is {neighbours}, but only {both} items of {folder.name} have both {result} and {candidate}; "
            f"choose at most {max(both - 1, 0)}"
        )
    if by is None:
        rows = neighbour_means(queries[has_query], results[has_query], has_result[has_query], neighbours)
        made = f"each is the mean {result} of the {neighbours} items most alike by {query}"
    else:
        found = np.flatnonzero(can_be_found)  # [C]
        column_of = np.full(len(tokens), -1)  # [N]
        column_of[found] = np.arange(len(found))
        rows = _nearest_means(
            _unit_rows(queries[has_query]), _unit_rows(vectors[candidate][0][found]), results[found],
            own=column_of[has_query], neighbours=neighbours,
        )  # fmt: skip
        made = f"each is the mean {result} of the {neighbours} other items whose {candidate} is nearest to its {query}"
    listed = [token for token, has in zip(tokens, has_query, strict=True) if has]
    write_feature(
        folder,
        name,
        tokens=listed,
        rows=rows,
        encoder=ENCODER,
        source=", ".join(used),
        settings=settings,
    )
    why, lacking = f"no {query}", np.flatnonzero(~has_query)
    return FeatureReport(
        feature=name,
        n_items=len(tokens),
        n_filled=len(listed),
        shape=rows.shape,
        missing={why: len(lacking)} if len(lacking) else {},
        examples={why: tokens[lacking[0]]} if len(lacking) else {},
        remarks=(f"{made}; nothing is generated",),
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
    found = np.flatnonzero(has_result)  # [C]
    column_of = np.full(len(source), -1)  # [N]
    column_of[found] = np.arange(len(found))
    return _nearest_means(
        directions, directions[found], result[found], own=column_of, neighbours=neighbours, at_once=at_once
    )


def _nearest_means(
    queries: np.ndarray,
    candidates: np.ndarray,
    result: np.ndarray,
    *,
    own: np.ndarray,
    neighbours: int,
    at_once: int | None = None,
) -> np.ndarray:
    """Mean result of the k candidates with the largest cosine to each query, never its own, [n, F'] float32.

    Args:
        queries, candidates: [n, F] and [C, F], rows of length 1 (or 0).
        result: [C, F'].
        own: [n], the candidate that a query may not find; -1 if there is none.
    """
    means = np.empty((len(queries), result.shape[1]), dtype=np.float32)
    block = max(1, (at_once or SIMILARITIES_AT_ONCE) // len(candidates))
    for start in range(0, len(queries), block):
        likeness = np.round(queries[start : start + block] @ candidates.T, DIGITS)  # [b, C]
        mine = own[start : start + block]
        likeness[np.flatnonzero(mine >= 0), mine[mine >= 0]] = -np.inf
        means[start : start + block] = result[_largest(likeness, neighbours)].mean(axis=1)
    return means


def _require(folder: Path, name: str, used: Sequence[str], manifest: Manifest) -> None:
    there = sorted(manifest.features)
    if missing := [part for part in used if part not in there]:
        raise DatasetError(
            f"{name} is made of the features {' and '.join(map(repr, used))}, but {folder.name} has no "
            + " and no ".join(map(repr, missing))
            + f", only {there}\n  make first: python -m dataset_prep features --dataset {folder} --feature {missing[0]}"
        )


def _two_names(by: Sequence[str]) -> tuple[str, str]:
    if len(by) != 2:
        raise SettingError(f"by is {list(by)}, expected two features, such as clip_text and clip_image")
    return by[0], by[1]


def _check_one_space(folder: Path, query: str, candidate: str, manifest: Manifest) -> None:
    """Refuse two features whose cosines mean nothing: of different widths, or known to be of different weights."""
    widths = [manifest.features[part].shape[1] for part in (query, candidate)]
    weights = [manifest.features[part].settings.get("weights_sha256") for part in (query, candidate)]
    if widths[0] != widths[1] or (all(weights) and weights[0] != weights[1]):
        why = (
            "have the widths {} and {}".format(*widths)
            if widths[0] != widths[1]
            else "were made with different weights"
        )
        raise SettingError(
            f"{query} and {candidate} of {folder.name} {why}, so that they cannot be compared; "
            "make both with one CLIP model, as the encoders clip_text and clip do"
        )


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
