"""UniSRec's files, in and out.

<dataset>.{train,valid,test}.inter    user_id:token  item_id_list:token_seq  item_id:token; users and items are numbers
<dataset>.feat1CLS                    float32 without header, a row per item number: the feature text
<dataset>.feat2CLS                    the same of texts with words dropped: the feature text_dropped; optional
<dataset>.item2index, .user2index     lines of id, tab, number; without them, ids are the numbers
<dataset>.text                        item_id:token  text:token_seq, with real ids; optional

There are no times: the order of the lists is all that is kept. Exporting a plain ``.inter`` splits it as UniSRec does:
of each user the last item is for testing, the one before it for validation, the others train, every prefix of them, and
prefixes have at most their last 50 items.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dataset_prep.formats.imported import Imported, Vectors, plain_vectors
from dataset_prep.formats.prepared import (
    ExportReport,
    feature_matrix,
    item_texts,
    read_prepared,
    write_export,
)
from dataset_prep.formats.splits import histories
from dataset_prep.formats.tables import number_of, read_index
from dataset_prep.session_folder import Rows
from dataset_prep.six_lists import Problems
from recbole_mm.data.files import read_table, sha256_of, write_atomically, write_table
from recbole_mm.data.layout import SPLITS
from recbole_mm.errors import DatasetError, SettingError

if TYPE_CHECKING:
    from pandas import DataFrame

FEATURE_ENDINGS = {"text": "feat1CLS", "text_dropped": "feat2CLS"}
WIDTH = 768
LONGEST = 50
ENDINGS = (*(f"{part}.inter" for part in SPLITS), *FEATURE_ENDINGS.values(), "item2index", "user2index", "text")


def read_unisrec(folder: Path, *, width: int = WIDTH, only_features: bool = False) -> Imported:
    """Read a dataset of UniSRec's.

    Args:
        width: numbers in a vector, which the files do not tell.
        only_features: leave the interactions and texts out.

    Raises:
        DatasetError: a file is missing or does not fit the others, with what was expected.
        SettingError: a width below 1.
    """
    folder = Path(folder)
    if width < 1:
        raise SettingError(f"the width is {width}, expected at least 1")
    stem = _stem(folder)
    index = folder / f"{stem}.item2index"
    names = read_index(index) if index.is_file() else None
    inter = [folder / f"{stem}.{part}.inter" for part in SPLITS]
    parts = None
    if names is None or not only_features:
        if missing := [path.name for path in inter if not path.is_file()]:
            raise DatasetError(f"{folder} has no {', '.join(missing)}; expected {stem}.train.inter, valid and test")
        parts = {part: read_table(path, needed=["user_id", "item_id_list", "item_id"])
                 for part, path in zip(SPLITS, inter, strict=True)}  # fmt: skip
        names = names or _numbers(parts, inter)
    problems = Problems()
    features = {}
    for name, ending in FEATURE_ENDINGS.items():
        path = folder / f"{stem}.{ending}"
        if path.is_file():
            features[name] = _read_vectors(path, names, width, problems)
    problems.raise_if_any(folder)
    raw_files = {vectors.file: vectors.sha256 for vectors in features.values()}
    remarks = () if index.is_file() else (f"no {index.name}: items are called by their numbers",)
    if only_features:
        return Imported(kind="unisrec", features=features, raw_files=raw_files, remarks=remarks)

    user_index = folder / f"{stem}.user2index"
    users = read_index(user_index) if user_index.is_file() else None
    rows, n_empty = _named(parts, inter, names, users)
    if n_empty:
        remarks += (f"{n_empty} rows without an item before the target were left out",)
    if users is None:
        remarks += (f"no {user_index.name}: users are called by their numbers",)
    items, types = _texts(folder / f"{stem}.text", names)
    used = [*inter, *(path for path in (index, user_index, folder / f"{stem}.text") if path.is_file())]
    return Imported(
        kind="unisrec",
        features=features,
        parts=rows,
        items=items,
        item_types=types,
        settings={"width": width, "split": "as given"},
        raw_files={**{path.name: sha256_of(path) for path in used}, **raw_files},
        remarks=remarks,
    )


def _stem(folder: Path) -> str:
    """The dataset's name, which all its files carry."""
    if not folder.is_dir():
        raise DatasetError(f"no folder {folder}")
    for ending in ("feat1CLS", "train.inter"):
        found = sorted(path.name.removesuffix(f".{ending}") for path in folder.glob(f"*.{ending}"))
        if folder.name in found:
            return folder.name
        if len(found) > 1:
            raise DatasetError(f"{folder} has files of several datasets, {found}; give a folder with one of them")
        if found:
            return found[0]
    there = sorted(path.name for path in folder.iterdir())[:8]
    raise DatasetError(f"{folder} has neither <dataset>.feat1CLS nor <dataset>.train.inter, only {there}")


def _numbers(parts: dict[str, DataFrame], paths: Sequence[Path]) -> list[str]:
    """The item numbers themselves as ids, as many as the interactions have."""
    highest, found = -1, set()
    for frame, path in zip(parts.values(), paths, strict=True):
        here = set(frame["item_id"]).union(*(text.split(" ") for text in frame["item_id_list"])) - {""}
        if wrong := sorted(token for token in here if number_of(token, 10**9) is None):
            raise DatasetError(
                f"{path}: the item {wrong[0]!r} is no number ({len(wrong)} such items); UniSRec numbers its items from "
                "0, and pre-training sets of several domains are not read"
            )
        found |= here
    highest = max(int(token) for token in found)
    if len(found) != highest + 1:
        raise DatasetError(
            f"{paths[0].parent}: {len(found)} items with numbers up to {highest}, expected 0 to {len(found) - 1}; "
            "items without interactions need the file .item2index"
        )
    return [str(number) for number in range(highest + 1)]


def _read_vectors(path: Path, names: list[str], width: int, problems: Problems) -> Vectors | None:
    size, row = path.stat().st_size, 4 * width
    n, expected = len(names), f"{len(names)} rows of {width} float32, {len(names) * row} bytes"
    with open(path, "rb") as file:
        start = file.read(6)
    if start == b"\x93NUMPY":
        problems.add(path.name, "file", "", found="a .npy array", expected=f"{expected} without a header")
    elif size != n * row:
        found = f"{size} bytes"
        if size and size % (4 * n) == 0:
            found += f", which is {n} rows of width {size // (4 * n)}: pass --width {size // (4 * n)}"
        elif size % row or not size:
            found += f", which is no whole number of rows (cut short, or of another width than {width})"
        else:
            found += f", which is {size // row} rows (of other items)"
        problems.add(path.name, "file", "", found=found, expected=expected)
    else:
        array = np.fromfile(path, dtype="<f4").reshape(n, width)  # [N, F]
        return plain_vectors(names, array, path=path, problems=problems)
    return None


def _named(
    parts: dict[str, DataFrame], paths: Sequence[Path], items: list[str], users: list[str] | None
) -> tuple[dict[str, Rows], int]:
    """Rows with ids in place of numbers, and how many had an empty prefix."""

    def name(text: str, names: list[str], what: str, path: Path, row: int) -> str:
        number = number_of(text, len(names))
        if number is None:
            raise DatasetError(
                f"{path}, line {row + 2}: the {what} {text!r}, expected a number from 0 to {len(names) - 1} as in "
                f"{path.name.split('.')[0]}.{what}2index"
            )
        return names[number]

    found, n_empty = {}, 0
    for (part, frame), path in zip(parts.items(), paths, strict=True):
        rows = Rows([], [], [])
        for row, (user, prefix, target) in enumerate(
            zip(frame["user_id"], frame["item_id_list"], frame["item_id"], strict=True)
        ):
            if not prefix:
                n_empty += 1
                continue
            rows.session_ids.append(user if users is None else name(user, users, "user", path, row))
            rows.prefixes.append([name(token, items, "item", path, row) for token in prefix.split(" ")])
            rows.targets.append(name(target, items, "item", path, row))
        found[part] = rows
    return found, n_empty


def _texts(path: Path, names: list[str]) -> tuple[DataFrame | None, dict[str, str]]:
    """The table of items with their texts; ids are real ones, or numbers where these are the ids."""
    if not path.is_file():
        return None, {}
    from pandas import DataFrame

    table = read_table(path, needed=["item_id", "text"])
    text_of = dict(zip(table["item_id"], table["text"], strict=True))
    if strangers := [token for token in text_of if token not in set(names)]:
        raise DatasetError(
            f"{path}: {len(strangers)} items are not among the {len(names)} of the dataset, such as {strangers[:3]}"
        )
    if len(text_of) < len(table):
        raise DatasetError(f"{path}: {len(table) - len(text_of)} items occur twice; keep one row each")
    columns = {"item_id": names, "text": [text_of.get(token, "") for token in names]}
    return DataFrame(columns, dtype=object), {"item_id": "token", "text": "token_seq"}


# ---------------------------------------------------------------- export


def export_unisrec(
    folder: Path,
    out: Path,
    *,
    chosen: dict[str, str] | None = None,
    missing: str = "zero",
    user: str | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write ``<out>/<name of folder>/`` as UniSRec wants it, complete or not at all.

    Args:
        folder: a prepared folder; one that is split keeps its parts.
        chosen: the feature to write as "text" or "text_dropped"; else those of these names, as far as there are.
        missing: what an item without vector gets: "zero", or the "mean" of the others.
        user: column of a plain ``.inter`` with the users; None takes user_id, or session_id without one.
        overwrite: replace files of an earlier export.

    Raises:
        DatasetError: no such folder or feature, the place is taken, no user has three interactions.
    """
    prepared = read_prepared(folder, user=user)
    remarks: tuple[str, ...] = ()
    if prepared.parts is None:
        parts, items, users, n_short = _leave_one_out(prepared.owners, prepared.items, prepared.times)
        if n_short:
            remarks = (f"{n_short} users with fewer than 3 interactions have no validation and test rows",)
        if not parts["test"].targets:
            raise DatasetError(f"{folder}: no user has 3 interactions, which a split into three parts needs")
    else:
        parts = prepared.parts
        rows = [row for part in SPLITS for row in zip(parts[part].prefixes, parts[part].targets, strict=True)]
        items = dict.fromkeys(token for prefix, target in rows for token in (*prefix, target))
        users = dict.fromkeys(owner for part in SPLITS for owner in parts[part].session_ids)
    item_number = {token: str(number) for number, token in enumerate(items)}
    user_number = {token: str(number) for number, token in enumerate(users)}
    there = {name: name for name in FEATURE_ENDINGS if name == "text" or name in prepared.manifest.features}
    chosen = {**there, **(chosen or {})}
    matrices = {}
    for name, feature in chosen.items():
        matrices[name], more = feature_matrix(prepared, feature, list(items), missing=missing)
        remarks += more
    texts = item_texts(prepared, list(items))
    name = prepared.name

    def fill(place: Path) -> None:
        for part in SPLITS:
            rows = parts[part]
            columns = {
                "user_id:token": [user_number[owner] for owner in rows.session_ids],
                "item_id_list:token_seq": (" ".join(map(item_number.__getitem__, prefix)) for prefix in rows.prefixes),
                "item_id:token": [item_number[target] for target in rows.targets],
            }
            write_table(place / f"{name}.{part}.inter", columns)
        for ending, numbers in (("item2index", item_number), ("user2index", user_number)):
            text = "".join(f"{token}\t{number}\n" for token, number in numbers.items())
            write_atomically(place / f"{name}.{ending}", lambda out, text=text: out.write(text.encode()))
        for feature, matrix in matrices.items():
            content = matrix.astype("<f4").tobytes()
            path = place / f"{name}.{FEATURE_ENDINGS[feature]}"
            write_atomically(path, lambda out, content=content: out.write(content))
        if texts is not None:
            write_table(place / f"{name}.text", {"item_id:token": list(items), "text:token_seq": texts})

    place = write_export(Path(out) / name, fill, known=[f"{name}.{ending}" for ending in ENDINGS], overwrite=overwrite)
    widths = {matrix.shape[1] for matrix in matrices.values()}
    if widths != {WIDTH}:
        remarks += (f"vectors have width {', '.join(map(str, sorted(widths)))}: set plm_size in UniSRec's settings",)
    if n_left := len(prepared.table_items - set(items)):
        remarks += (f"{n_left} items without interactions were left out",)
    counts = {"users": len(users), "items": len(items)}
    counts |= {f"{part} rows": len(parts[part].targets) for part in SPLITS}
    return ExportReport(folder=place, counts=counts, remarks=remarks)


def _leave_one_out(
    owners: Sequence[str], items: Sequence[str], times: Sequence[float]
) -> tuple[dict[str, Rows], dict[str, None], dict[str, None], int]:
    """Rows as UniSRec writes them, items and users in the order of its numbers, and how many users are too short."""
    parts = {part: Rows([], [], []) for part in SPLITS}
    order: dict[str, None] = {}
    rows_of = histories(owners, times)
    n_short = 0

    def add(part: str, owner: str, prefix: list[str], target: str) -> None:
        for column, value in zip(parts[part], (owner, prefix[-LONGEST:], target), strict=True):
            column.append(value)

    for owner, rows in rows_of.items():
        history = [items[row] for row in rows]
        order |= dict.fromkeys(history)
        short = len(history) < 3
        n_short += short
        train = history if short else history[:-2]
        for end in range(len(train) - 1, 0, -1):
            add("train", owner, train[:end], train[end])
        if not short:
            add("valid", owner, history[:-2], history[-2])
            add("test", owner, history[:-1], history[-1])
    return parts, order, dict.fromkeys(rows_of), n_short
