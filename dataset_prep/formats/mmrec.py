"""MMRec's files, in and out.

<dataset>.inter       userID  itemID  x_label, separated by tabs, perhaps rating and timestamp; numbers from 0;
                      x_label is 0 for training, 1 for validation, 2 for test
image_feat.npy        a row per item number: the feature image; optional
text_feat.npy         the same: the feature text; optional
i_id_mapping.csv      asin TAB itemID; without it, ids are the numbers
u_id_mapping.csv      user_id TAB userID; the same

MMRec's models know no order: its split is often a random one. If the labels are those of leaving the last two items of
each user out, the interactions become a plain ``.inter``, which RecBole splits in the same way. Otherwise they become
rows of prefix and target: a validation item after all training items of its user, a test item after those and the
validation items, whatever their times. Exporting a plain ``.inter`` leaves the last two items of each user out.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dataset_prep.formats.imported import Imported, Vectors, plain_vectors
from dataset_prep.formats.prepared import ExportReport, feature_matrix, read_prepared, write_export
from dataset_prep.formats.splits import histories, labels_of_rows, leave_one_out, rows_of_labels
from dataset_prep.formats.tables import names_by_number, number_of, read_separated
from dataset_prep.released import read_array
from dataset_prep.six_lists import Problems
from recbole_mm.data.files import sha256_of, write_atomically
from recbole_mm.errors import DatasetError, SettingError

FEATURE_FILES = {"image": "image_feat.npy", "text": "text_feat.npy"}
ITEM_MAPPING, USER_MAPPING = "i_id_mapping.csv", "u_id_mapping.csv"
SPLIT_CHOICES = ("auto", "given", "none")


def read_mmrec(folder: Path, *, split: str = "auto", only_features: bool = False) -> Imported:
    """Read a dataset of MMRec's.

    Args:
        split: "given" makes the three parts of the labels, "none" a plain ``.inter`` without them; "auto" does the
            latter if RecBole's own split gives the same parts.
        only_features: leave the interactions out.

    Raises:
        UnsafeFileError: an array holds Python objects.
        DatasetError: a file is missing or does not fit the others, with what was expected.
        SettingError: another value of ``split``.
    """
    folder = Path(folder)
    if split not in SPLIT_CHOICES:
        raise SettingError(f"split is {split!r}, expected one of {list(SPLIT_CHOICES)}")
    if not folder.is_dir():
        raise DatasetError(f"no folder {folder}")
    names = _mapping(folder / ITEM_MAPPING, "itemID")
    remarks = () if names else (f"no {ITEM_MAPPING}: items are called by their numbers",)
    problems = Problems()
    features = {}
    for name, file in FEATURE_FILES.items():
        if (folder / file).is_file():
            features[name] = _read_vectors(folder / file, names, problems)
    problems.raise_if_any(folder)
    raw_files = {vectors.file: vectors.sha256 for vectors in features.values()}
    remarks += tuple(f"no {file}" for name, file in FEATURE_FILES.items() if name not in features)
    if only_features:
        return Imported(kind="mmrec", features=features, raw_files=raw_files, remarks=remarks)

    path = _inter(folder)
    users = _mapping(folder / USER_MAPPING, "userID")
    if users is None:
        remarks += (f"no {USER_MAPPING}: users are called by their numbers",)
    columns, labels, times, more = _interactions(path, names, users)
    remarks += more
    owners, items = columns["user_id:token"], columns["item_id:token"]
    for vectors in features.values():
        _check_reach(path, vectors, names, items)
    rows_of = histories(owners, times)
    in_order = leave_one_out(rows_of)[0] == labels
    used = [path, *(folder / file for file in (ITEM_MAPPING, USER_MAPPING) if (folder / file).is_file())]
    made: dict[str, Any] = {"kind": "mmrec", "features": features}
    made["raw_files"] = {**{file.name: sha256_of(file) for file in used}, **raw_files}
    counts = Counter(labels)
    if split == "none" or (split == "auto" and in_order):
        if not in_order:
            remarks += ("the labels for training, validation and test were left out: RecBole splits these data anew",)
        settings = {"split": "none", "labels": "leave-one-out by time" if in_order else "left out"}
        return Imported(**made, interactions=columns, settings=settings, remarks=remarks)
    parts, n_cold = rows_of_labels(owners, items, labels, rows_of)
    if n_cold:
        remarks += (f"{n_cold} validation and test interactions are of users without training ones and were left out",)
    n_early = _n_before_training(rows_of, labels)
    if n_early:
        held = counts[1] + counts[2]
        remarks += (
            f"{n_early} of {held} validation and test interactions are older than a training one of their user: "
            "the split does not follow time",
        )
    return Imported(**made, parts=parts, settings={"split": "given"}, remarks=remarks)


def _inter(folder: Path) -> Path:
    found = sorted(folder.glob("*.inter"))
    if folder / f"{folder.name}.inter" in found:
        return folder / f"{folder.name}.inter"
    if len(found) != 1:
        raise DatasetError(f"{folder} has {[path.name for path in found] or 'no .inter file'}, expected one file")
    return found[0]


def _mapping(path: Path, number: str) -> list[str] | None:
    """The id with each number; None without the file."""
    if not path.is_file():
        return None
    table = read_separated(path, needed=[number])
    if len(table) != 2:
        raise DatasetError(f"{path} has the columns {', '.join(table)}, expected two: an id and {number}")
    other = next(name for name in table if name != number)
    return names_by_number(path, table[other], table[number])


def _read_vectors(path: Path, names: list[str] | None, problems: Problems) -> Vectors | None:
    array = read_array(path, problems)
    if array is None:
        return None
    if names is not None and (array.ndim != 2 or len(array) != len(names)):
        expected = f"({len(names)}, width), a row for each item of {ITEM_MAPPING}"
        problems.add(path.name, "shapes", "", found=f"{array.shape} of {array.dtype}", expected=expected)
        return None
    tokens = names or [str(number) for number in range(len(array) if array.ndim else 0)]
    vectors = plain_vectors(tokens, array, path=path, problems=problems)
    if vectors is None:
        return None
    times_seen = Counter(row.tobytes() for row in vectors.rows)
    n_equal = sum(n for n in times_seen.values() if n > 1)
    if 1 < n_equal < len(vectors.rows):
        remark = (
            f"{n_equal} rows of {path.name} are equal to another: MMRec's notebooks give items without one the mean"
        )
        return replace(vectors, remarks=(*vectors.remarks, remark))
    return vectors


def _check_reach(path: Path, vectors: Vectors, names: list[str] | None, items: Sequence[str]) -> None:
    """Without names, every item of the interactions needs a row."""
    if names is not None:
        return
    known = {*vectors.tokens, *vectors.zero}
    if beyond := sorted({token for token in items if token not in known}, key=int):
        raise DatasetError(
            f"{path} has items up to {beyond[-1]}, {vectors.file} has {len(known)} rows; "
            f"the file of another dataset, or without {ITEM_MAPPING}?"
        )


def _interactions(
    path: Path, names: list[str] | None, users: list[str] | None
) -> tuple[dict[str, list[Any]], list[int], list[float], tuple[str, ...]]:
    """Columns of a plain ``.inter``, the label and time of each row, and remarks."""
    table = read_separated(path, needed=["userID", "itemID", "x_label"])
    owners = [_named(path, row, text, users, "userID", USER_MAPPING) for row, text in enumerate(table["userID"])]
    items = [_named(path, row, text, names, "itemID", ITEM_MAPPING) for row, text in enumerate(table["itemID"])]
    labels = []
    for row, text in enumerate(table["x_label"]):
        label = number_of(text.removesuffix(".0"), 3)
        if label is None:
            raise DatasetError(f"{path}, line {row + 2}: x_label is {text!r}, expected 0, 1 or 2")
        labels.append(label)
    remarks: tuple[str, ...] = ()
    if "timestamp" in table:
        times = _numbers(path, table["timestamp"], "timestamp")
    else:
        times = [float(row) for row in range(len(items))]
        remarks = ("there are no timestamps: the order of the file is taken for that of time, 0, 1, 2, …",)
    columns: dict[str, list[Any]] = {"user_id:token": owners, "item_id:token": items, "timestamp:float": times}
    if "rating" in table:
        columns["rating:float"] = _numbers(path, table["rating"], "rating")
    return columns, labels, times, remarks


def _named(path: Path, row: int, text: str, names: list[str] | None, column: str, mapping: str) -> str:
    number = number_of(text, 10**9 if names is None else len(names))
    if number is None:
        range_of = "0 or more" if names is None else f"0 to {len(names) - 1} as in {mapping}"
        raise DatasetError(f"{path}, line {row + 2}: {column} is {text!r}, expected a number, {range_of}")
    return str(number) if names is None else names[number]


def _numbers(path: Path, texts: Sequence[str], column: str) -> list[float]:
    found = []
    for row, text in enumerate(texts):
        try:
            number = float(text)
        except ValueError:
            number = np.nan
        if not np.isfinite(number):
            raise DatasetError(f"{path}, line {row + 2}: {column} is {text!r}, expected a finite number")
        found.append(number)
    return found


def _n_before_training(rows_of: dict[str, list[int]], labels: Sequence[int]) -> int:
    n = 0
    for rows in rows_of.values():
        last = max((position for position, row in enumerate(rows) if labels[row] == 0), default=-1)
        n += sum(labels[row] != 0 for row in rows[: last + 1])
    return n


# ---------------------------------------------------------------- export


def export_mmrec(
    folder: Path,
    out: Path,
    *,
    chosen: dict[str, str] | None = None,
    missing: str = "zero",
    user: str | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write ``<out>/<name of folder>/`` as MMRec wants it, complete or not at all.

    Args:
        folder: a prepared folder; the parts of one that is split give the labels, and its sessions are the users.
        chosen: the feature to write as "image" or "text"; else those of these names, as far as there are.
        missing: what an item without vector gets: "zero", or the "mean" of the others.
        user: column of a plain ``.inter`` with the users; None takes user_id, or session_id without one.
        overwrite: replace files of an earlier export.

    Raises:
        DatasetError: no such folder or feature, or the place is taken.
    """
    prepared = read_prepared(folder, user=user)
    remarks: tuple[str, ...] = ()
    if prepared.parts is None:
        owners, items = prepared.owners, prepared.items
        labels, n_short = leave_one_out(histories(owners, prepared.times))
        if n_short:
            remarks = (f"{n_short} users with fewer than 3 interactions are in training only",)
        more = {"rating": prepared.more.get("rating"), "timestamp": prepared.more["time_text"]}
    else:
        owners, items, labels = labels_of_rows(prepared.parts)
        more = {"rating": None, "timestamp": None}
        trained = {owner for owner in prepared.parts["train"].session_ids}
        if n_added := len(set(owners) - trained):
            remarks = (
                f"{n_added} users or sessions have no training rows: what they had before their targets was labelled "
                "training, since MMRec knows users by that alone",
            )
    item_number = {token: number for number, token in enumerate(dict.fromkeys(items))}
    user_number = {token: number for number, token in enumerate(dict.fromkeys(owners))}
    there = {name: name for name in FEATURE_FILES if name in prepared.manifest.features}
    chosen = {**there, **(chosen or {})}
    if not chosen:
        raise DatasetError(
            f"{folder} has neither the feature image nor text, only {sorted(prepared.manifest.features)}; MMRec needs "
            "one of them: choose with --image or --text"
        )
    matrices = {}
    for name, feature in chosen.items():
        matrices[name], told = feature_matrix(prepared, feature, list(item_number), missing=missing)
        remarks += told
    columns: dict[str, Sequence[Any]] = {
        "userID": [user_number[owner] for owner in owners],
        "itemID": [item_number[token] for token in items],
        **{name: values for name, values in more.items() if values is not None},
        "x_label": labels,
    }

    def fill(place: Path) -> None:
        _write_rows(place / f"{prepared.name}.inter", columns)
        _write_rows(place / ITEM_MAPPING, {"asin": list(item_number), "itemID": list(item_number.values())})
        _write_rows(place / USER_MAPPING, {"user_id": list(user_number), "userID": list(user_number.values())})
        for name, matrix in matrices.items():
            write_atomically(
                place / FEATURE_FILES[name], lambda out, matrix=matrix: np.save(out, matrix, allow_pickle=False)
            )  # fmt: skip

    known = (f"{prepared.name}.inter", ITEM_MAPPING, USER_MAPPING, *FEATURE_FILES.values())
    place = write_export(Path(out) / prepared.name, fill, known=known, overwrite=overwrite)
    if n_left := len(prepared.table_items - set(items)):
        remarks += (f"{n_left} items without interactions were left out",)
    by_label = Counter(labels)
    counts = {"users": len(user_number), "items": len(item_number)}
    counts |= {f"{what} interactions": by_label[label] for label, what in enumerate(("training", "validation", "test"))}
    return ExportReport(folder=place, counts=counts, remarks=remarks)


def _write_rows(path: Path, columns: dict[str, Sequence[Any]]) -> None:
    """A table as pandas writes it: separated by tabs, quotes only where a value needs them."""
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    write_atomically(path, lambda out: out.write(text.getvalue().encode()))
