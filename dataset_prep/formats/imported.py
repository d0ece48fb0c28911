"""What an importer has read, and how it becomes a prepared folder or features of one that is there.

Vectors find their items by id, never by position. A row of zeros stands for an item without content.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dataset_prep.card import write_card
from dataset_prep.features import FeatureReport, read_items
from dataset_prep.folder_writer import write_folder
from dataset_prep.locking import locked
from dataset_prep.session_folder import Rows, bad_id, check_parts, write_parts
from dataset_prep.six_lists import Problems
from recbole_mm.data.files import read_table, sha256_of, write_table
from recbole_mm.data.layout import SPLITS, Manifest, interaction_files, write_feature
from recbole_mm.errors import DatasetError

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class Vectors:
    """Vectors of items.

    Attributes:
        tokens: item ids, each once.
        rows: [S, F] float32, finite, none of them all zero.
        counts: [n] int64, how many rows each item has; None if each has one.
        file: where they come from.
        sha256: of the file.
        zero: ids whose rows are all zero; they are not in ``tokens``.
        remarks: further things to know.
    """

    tokens: list[str]
    rows: np.ndarray
    counts: np.ndarray | None
    file: str
    sha256: str
    zero: frozenset[str] = frozenset()
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Imported:
    """What was read of another tool's files.

    Attributes:
        kind: name of the format.
        features: by name.
        interactions: columns of a plain ``.inter`` with their types, ``{"user_id:token": [...], ...}``; or None.
        parts: rows that are split already; or None.
        items: a row per item with the column item_id; or None.
        item_types: columns of ``items`` to write and their types.
        copied: files to be taken over as they are, by their name's ending, such as "user".
        settings: how it was read, for the manifest.
        raw_files: sha256 by file name.
        remarks: further things to know.
    """

    kind: str
    features: dict[str, Vectors] = field(default_factory=dict)
    interactions: dict[str, Sequence[Any]] | None = None
    parts: dict[str, Rows] | None = None
    items: DataFrame | None = None
    item_types: dict[str, str] = field(default_factory=dict)
    copied: dict[str, Path] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    raw_files: dict[str, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class ImportReport:
    """What was made.

    Attributes:
        counts: of rows and items, in the order of telling; empty if only features were added.
        features: what became of each.
        remarks: further things to know.
    """

    folder: Path
    counts: dict[str, int]
    features: tuple[FeatureReport, ...]
    remarks: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.folder}: " + (", ".join(f"{n} {what}" for what, n in self.counts.items()) or "features added")]
        lines += [f"  {line}" for feature in self.features for line in str(feature).splitlines()]
        return "\n".join(lines + [f"  {remark}" for remark in self.remarks])


# ---------------------------------------------------------------- vectors


def plain_vectors(
    tokens: Sequence[str],
    array: np.ndarray,
    *,
    path: Path,
    problems: Problems,
    counts: np.ndarray | None = None,
) -> Vectors | None:
    """Vectors as they can be stored; None if they cannot, said in ``problems``.

    Args:
        tokens: item ids, each once.
        array: [S, F] of floats or whole numbers, in any byte order and layout.
        path: the file, for messages and its hash.
        counts: [n], rows of each item; None if each has one.
    """
    if array.dtype.kind not in "fiu" or array.ndim != 2 or array.shape[1] < 1:
        expected = "(rows, width) of floats"
        problems.add(path.name, "shapes", "", found=f"{array.shape} of {array.dtype}", expected=expected)
        return None
    remarks = ()
    if array.dtype != np.float32:  # another byte order is another dtype
        remarks = (f"{path.name} has dtype {array.dtype.str}; stored as float32",)
    with np.errstate(over="ignore"):
        rows = np.ascontiguousarray(array, dtype=np.float32)
    owner = np.arange(len(rows)) if counts is None else np.repeat(np.arange(len(tokens)), counts)
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    for row in bad.tolist():
        where = f"row {row} (item {tokens[owner[row]]!r})"
        problems.add(path.name, "numbers", where, found="NaN, infinity or a number beyond float32", expected="numbers")
    filled = rows.any(axis=1)
    if not filled.any():
        problems.add(path.name, "shapes", "", found="no row that is not all zero", expected="a vector for some item")
    if len(bad) or not filled.any():
        return None
    rows, owner = rows[filled], owner[filled]
    if n_zero := int((~filled).sum()):
        remarks += (f"{n_zero} rows of {path.name} are all zero, which is no content",)
    if len(rows) > 1 and (rows == rows[0]).all():
        remarks += (f"all rows of {path.name} are equal: this feature carries no information",)
    n_rows = np.bincount(owner, minlength=len(tokens))
    return Vectors(
        tokens=[token for token, n in zip(tokens, n_rows.tolist(), strict=True) if n],
        rows=rows,
        counts=None if counts is None else n_rows[n_rows > 0],
        file=path.name,
        sha256=sha256_of(path),
        zero=frozenset(token for token, n in zip(tokens, n_rows.tolist(), strict=True) if not n),
        remarks=remarks,
    )


def write_vectors(
    folder: Path, name: str, vectors: Vectors, *, items: Sequence[str], kind: str, max_missing: float = 1.0
) -> FeatureReport:
    """Add vectors to a folder as a feature, for its items and in their order.

    Args:
        items: of the folder, each once.
        kind: name of the format the vectors come from.
        max_missing: share of the items that may have no vector.

    Raises:
        DatasetError: none of the items has a vector, or too few have.
    """
    place = {token: number for number, token in enumerate(vectors.tokens)}
    listed = [token for token in items if token in place]
    wanted = np.array([place[token] for token in listed], dtype=np.int64)
    missing, examples = {}, {}
    for token in items:
        if token not in place:
            why = f"all its rows in {vectors.file} are zero" if token in vectors.zero else f"not in {vectors.file}"
            missing[why] = missing.get(why, 0) + 1
            examples.setdefault(why, token)
    n_missing = sum(missing.values())
    if not listed:
        raise DatasetError(
            f"none of the {len(items)} items of {folder.name} is in {vectors.file}; are these the same ids? "
            f"The dataset has {list(items[:3])}, the file {vectors.tokens[:3]}"
        )
    if n_missing > max_missing * len(items):
        listed_reasons = "; ".join(f"{n} {why}, such as {examples[why]!r}" for why, n in missing.items())
        raise DatasetError(
            f"{n_missing} of {len(items)} items of {folder.name} have no vector in {vectors.file}, more than "
            f"{max_missing:.0%} ({listed_reasons}); complete the file, or allow more with --max-missing"
        )
    remarks = vectors.remarks
    known = set(items)
    if n_extra := sum(token not in known for token in (*vectors.tokens, *vectors.zero)):
        remarks += (f"{n_extra} items of {vectors.file} are not in the dataset and were left out",)
    if vectors.counts is None:
        rows, counts = vectors.rows[wanted], None
    else:
        counts = vectors.counts[wanted]
        starts = np.cumsum(vectors.counts) - vectors.counts
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        rows = vectors.rows[np.repeat(starts[wanted], counts) + within]
    write_feature(
        folder, name, tokens=listed, rows=rows, counts=counts, encoder="imported", source=vectors.file,
        settings={"format": kind, "file": vectors.file, "sha256": vectors.sha256},
    )  # fmt: skip
    return FeatureReport(
        feature=name,
        n_items=len(items),
        n_filled=len(listed),
        shape=rows.shape,
        missing=missing,
        examples=examples,
        remarks=remarks,
    )


# ---------------------------------------------------------------- folders


def make_folder(imported: Imported, folder: Path, *, overwrite: bool = False, max_missing: float = 1.0) -> ImportReport:
    """Make a prepared folder of what was read, complete or not at all; holds its lock.

    Args:
        folder: to make; its files carry its name.
        overwrite: replace a folder that was prepared here before.
        max_missing: share of the items that may have no vector, for each feature.

    Raises:
        DatasetError: the folder is there, an id cannot be used, a part has no rows, or too few items have vectors.
    """
    folder = Path(os.path.abspath(folder))
    occurring = _occurring(imported)
    items, known = imported.items, list(occurring)
    remarks = imported.remarks
    if items is not None:
        if imported.parts is not None:
            if n := len(items) - int(items["item_id"].isin(occurring).sum()):
                remarks += (f"{n} items without interactions were left out",)
            items = items[items["item_id"].isin(occurring)]
        known = list(dict.fromkeys([*items["item_id"], *occurring]))
    reports: list[FeatureReport] = []

    def fill(partial: Path) -> None:
        if imported.parts is not None:
            write_parts(partial, imported.parts)
        else:
            write_table(partial / f"{folder.name}.inter", imported.interactions)
        if items is not None:
            columns = {f"{name}:{kind}": list(items[name]) for name, kind in imported.item_types.items()}
            write_table(partial / f"{folder.name}.item", columns)
        for ending, path in imported.copied.items():
            shutil.copyfile(path, partial / f"{folder.name}.{ending}")

    def finish(partial: Path) -> None:
        for name, vectors in imported.features.items():
            report = write_vectors(
                partial, name, vectors, items=known, kind=imported.kind, max_missing=max_missing
            )  # fmt: skip
            reports.append(report)
        write_card(partial)

    counts = _counts(imported, n_items=len(occurring))
    settings = {"made_by": f"python -m dataset_prep import {imported.kind}", **imported.settings, "counts": counts}
    write_folder(
        folder, fill, settings=settings, raw_files=imported.raw_files, overwrite=overwrite, finish=finish
    )  # fmt: skip
    if items is not None and (n := len(occurring) - int(items["item_id"].isin(occurring).sum())):
        remarks += (f"{n} items with interactions have no row in the table of items",)
    return ImportReport(folder=folder, counts=counts, features=tuple(reports), remarks=remarks)


def add_features(imported: Imported, folder: Path, *, max_missing: float = 1.0) -> ImportReport:
    """Add the features that were read to a folder that is there; holds its lock.

    Raises:
        DatasetError: no folder, nothing to add, another process writes there, or too few items have vectors; features
            that were added before stay.
    """
    folder = Path(folder)
    Manifest.load(folder)
    if not imported.features:
        raise DatasetError(f"there are no vectors to add to {folder}")
    with locked(folder):
        items = folder_items(folder)
        reports = [
            write_vectors(folder, name, vectors, items=items, kind=imported.kind, max_missing=max_missing)
            for name, vectors in imported.features.items()
        ]
    return ImportReport(folder=folder, counts={}, features=tuple(reports), remarks=imported.remarks)


def folder_items(folder: Path) -> list[str]:
    """All items of a folder, each once: those of its ``.item``, then others with interactions."""
    items: dict[str, None] = {}
    if (folder / f"{folder.name}.item").is_file():
        items |= dict.fromkeys(read_items(folder)["item_id"])
    for path in interaction_files(folder):
        frame = read_table(path, needed=["item_id"], optional=["item_id_list"])
        if "item_id_list" in frame:
            for prefix in frame["item_id_list"]:
                items |= dict.fromkeys(prefix.split(" "))
        items |= dict.fromkeys(frame["item_id"])
    items.pop("", None)
    return list(items)


def _occurring(imported: Imported) -> dict[str, None]:
    """Items with interactions, in an order that the files decide; refuses ids that could not be read again."""
    if imported.parts is not None:
        everything = check_parts(imported.parts)
        found = dict.fromkeys(target for part in SPLITS for target in imported.parts[part].targets)
        return found | dict.fromkeys(sorted(everything - set(found)))
    problems = Problems()
    for column in ("user_id:token", "item_id:token"):
        for token in dict.fromkeys(imported.interactions[column]):
            if reason := bad_id(token):
                what = column.partition(":")[0]
                problems.add("interactions", what, what, found=f"{token!r}, which {reason}", expected="a plain id")
    problems.raise_if_any(Path(imported.kind))
    return dict.fromkeys(imported.interactions["item_id:token"])


def _counts(imported: Imported, *, n_items: int) -> dict[str, int]:
    if imported.parts is None:
        users = len(set(imported.interactions["user_id:token"]))
        return {
            "users": users,
            "items with interactions": n_items,
            "interactions": len(imported.interactions["item_id:token"]),
        }
    users = {owner for rows in imported.parts.values() for owner in rows.session_ids}
    rows = {f"{part} rows": len(imported.parts[part].targets) for part in SPLITS}
    return {"users or sessions": len(users), "items with interactions": n_items, **rows}
