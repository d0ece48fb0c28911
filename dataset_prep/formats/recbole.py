"""A folder of RecBole's atomic files, checked; columns of vectors (float_seq) become features.

<dataset>.inter                       user_id, item_id, timestamp and whatever else; or, split already,
<dataset>.{train,valid,test}.inter    rows of prefix and target with item_id_list, or interactions without it
<dataset>.item                        optional; every float_seq column becomes a feature of its name
<dataset>.user, .kg, .link            taken over as they are

RecBole reads float_seq columns slowly, and into the wrong places where items have none.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dataset_prep.formats.imported import Imported, Vectors, plain_vectors
from dataset_prep.formats.splits import histories, rows_of_labels
from dataset_prep.interactions import Columns
from dataset_prep.session_folder import Rows
from dataset_prep.six_lists import Problems
from recbole_mm.data.files import numbers, read_header, read_table, sha256_of
from recbole_mm.data.layout import SPLITS, check_feature_name
from recbole_mm.errors import DatasetError

if TYPE_CHECKING:
    from pandas import DataFrame

COPIED = ("user", "kg", "link")


def read_recbole(folder: Path, *, columns: Columns | None = None, only_features: bool = False) -> Imported:
    """Read a folder of atomic files.

    Args:
        columns: names of the columns with users, items and times.
        only_features: read the vectors of the items alone.

    Raises:
        DatasetError: a file is missing or broken, an item has two rows, a vector is none.
    """
    folder, columns = Path(folder), columns or Columns()
    if not folder.is_dir():
        raise DatasetError(f"no folder {folder}")
    stem = _stem(folder)
    item_file = folder / f"{stem}.item"
    items, types, features = None, {}, {}
    if item_file.is_file():
        items, types, features = _items(item_file, columns.item)
    elif only_features:
        raise DatasetError(f"{folder} has no {item_file.name}, whose columns of the type float_seq are features")
    raw_files = {item_file.name: sha256_of(item_file)} if items is not None else {}
    if only_features:
        return Imported(kind="recbole", features=features, raw_files=raw_files)

    remarks = [] if items is not None else [f"no {item_file.name}"]
    plain = folder / f"{stem}.inter"
    paths = [plain] if plain.is_file() else [folder / f"{stem}.{part}.inter" for part in SPLITS]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise DatasetError(f"{folder} has neither {plain.name} nor all of its parts: {', '.join(missing)} is missing")
    interactions, parts = None, None
    if len(paths) == 1:
        interactions, more = _interactions(paths[0], columns)
        remarks += more
    else:
        parts, more = _parts(paths, columns)
        remarks += more
    copied = {ending: folder / f"{stem}.{ending}" for ending in COPIED if (folder / f"{stem}.{ending}").is_file()}
    for path in copied.values():
        read_header(path)
    taken = {path.name for path in (*paths, item_file, *copied.values())}
    if others := sorted(path.name for path in folder.iterdir() if path.name not in taken):
        remarks.append(f"left out: {', '.join(others[:5])}" + (f" and {len(others) - 5} more" * (len(others) > 5)))
    raw_files |= {path.name: sha256_of(path) for path in (*paths, *copied.values())}
    return Imported(
        kind="recbole",
        features=features,
        interactions=interactions,
        parts=parts,
        items=items,
        item_types=types,
        copied=copied,
        settings={"columns": {"user": columns.user, "item": columns.item, "time": columns.time}},
        raw_files=raw_files,
        remarks=tuple(remarks),
    )


def _stem(folder: Path) -> str:
    found = sorted(folder.glob("*.inter"))
    stems = {path.name.removesuffix(".inter") for path in found}
    stems = {stem.rpartition(".")[0] if stem.rpartition(".")[2] in SPLITS else stem for stem in stems}
    if folder.name in stems or (not stems and (folder / f"{folder.name}.item").is_file()):
        return folder.name
    if len(stems) != 1:
        raise DatasetError(
            f"{folder} has {[path.name for path in found] or 'no .inter file'}, expected the files of one dataset"
        )
    return stems.pop()


# ---------------------------------------------------------------- interactions


def _interactions(path: Path, columns: Columns) -> tuple[dict[str, Any], list[str]]:
    """Columns of a plain ``.inter`` under the usual names, and remarks."""
    frame = read_table(path, needed=[columns.user, columns.item])
    types, remarks = dict(frame.attrs["types"]), []
    usual = {columns.user: "user_id", columns.item: "item_id", columns.time: "timestamp"}
    found: dict[str, Any] = {
        "user_id:token": frame[columns.user].tolist(),
        "item_id:token": frame[columns.item].tolist(),
    }
    if columns.time in frame:
        numbers(frame, columns.time, path)
        found["timestamp:float"] = frame[columns.time].tolist()
    else:
        found["timestamp:float"] = [float(row) for row in range(len(frame))]
        remarks.append(f"no column {columns.time}: the order of the file is taken for that of time, 0, 1, 2, …")
    for name, kind in types.items():
        if name in usual:
            continue
        if name in usual.values():
            raise DatasetError(f"{path} has a column {name} beside the one that is to be called so; rename it")
        if kind == "float":
            numbers(frame, name, path, may_be_empty=True)
        found[f"{name}:{kind}"] = frame[name].tolist()
    if n_again := int(frame.duplicated().sum()):
        remarks.append(f"{n_again} interactions are equal to an earlier one; they were kept")
    return found, remarks


def _parts(paths: list[Path], columns: Columns) -> tuple[dict[str, Rows], list[str]]:
    """Rows of each part, of prefixes and targets or of single interactions."""
    lists = f"{columns.item}_list"
    headers = [read_header(path) for path in paths]
    with_lists = [lists in header for header in headers]
    if any(with_lists) and not all(with_lists):
        lacking = [path.name for path, has in zip(paths, with_lists, strict=True) if not has]
        raise DatasetError(f"{paths[0].parent}: {', '.join(lacking)} has no column {lists}, the other parts have one")
    owner = "session_id" if columns.user not in headers[0] and "session_id" in headers[0] else columns.user
    needed = [owner, columns.item, *([lists] if all(with_lists) else [])]
    frames = [read_table(path, needed=needed) for path in paths]
    if all(with_lists):
        parts, n_empty = {}, 0
        for part, frame in zip(SPLITS, frames, strict=True):
            full = frame[frame[lists] != ""]
            n_empty += len(frame) - len(full)
            prefixes = [text.split(" ") for text in full[lists]]
            parts[part] = Rows(full[owner].tolist(), prefixes, full[columns.item].tolist())
        return parts, [f"{n_empty} rows without an item before the target were left out"] if n_empty else []
    owners: list[str] = []
    items: list[str] = []
    labels: list[int] = []
    times: list[float] = []
    remarks = []
    timed = all(columns.time in frame for frame in frames)
    for label, (frame, path) in enumerate(zip(frames, paths, strict=True)):
        owners += frame[owner].tolist()
        items += frame[columns.item].tolist()
        labels += [label] * len(frame)
        times += numbers(frame, columns.time, path).tolist() if timed else []
    if not timed:
        remarks.append(f"no column {columns.time}: the order of the files is taken for that of time")
    parts, n_cold = rows_of_labels(owners, items, labels, histories(owners, times if timed else None))
    remarks.append("the parts hold interactions: each target comes after all items that its user has in earlier parts")
    if n_cold:
        remarks.append(
            f"{n_cold} validation and test interactions are of users without training ones and were left out"
        )
    return parts, remarks


# ---------------------------------------------------------------- items


def _items(path: Path, item: str) -> tuple[DataFrame, dict[str, str], dict[str, Vectors]]:
    """The table of items without its columns of vectors, its types, and these vectors."""
    frame = read_table(path, needed=[item])
    types = dict(frame.attrs["types"])
    if item != "item_id" and "item_id" in types:
        raise DatasetError(f"{path} has both columns {item} and item_id; remove or rename item_id")
    tokens = frame[item]
    twice = tokens[tokens.duplicated()].unique()
    if len(twice):
        raise DatasetError(f"{path}: {len(twice)} items occur twice, such as {list(twice[:3])}; keep one row each")
    if (tokens == "").any():
        raise DatasetError(f"{path}: a row has an empty {item}; remove the row")
    problems = Problems()
    features = {}
    for name, kind in types.items():
        if kind == "float_seq":
            features[name] = _read_vectors(path, name, tokens.tolist(), frame[name].tolist(), problems)
        elif kind == "float":
            numbers(frame, name, path, may_be_empty=True)
    problems.raise_if_any(path.parent)
    kept = {name: kind for name, kind in types.items() if kind != "float_seq"}
    frame = frame[list(kept)].rename(columns={item: "item_id"})
    kept = {"item_id" if name == item else name: kind for name, kind in kept.items()}
    return frame, kept, features


def _read_vectors(path: Path, name: str, tokens: list[str], texts: list[str], problems: Problems) -> Vectors | None:
    """The vectors of one column, separated by spaces; an empty field is no content."""
    try:
        check_feature_name(name)
    except ValueError as error:
        problems.add(path.name, "names", f"column {name}", found=str(error), expected="another name; rename it")
        return None
    listed, rows = [], []
    for line, (token, text) in enumerate(zip(tokens, texts, strict=True), start=2):
        if not text.strip():
            continue
        try:
            row = np.array(text.split(), dtype=np.float64)
        except ValueError:
            problems.add(path.name, name, f"line {line}, {name}", found=text[:40], expected="numbers parted by spaces")
            continue
        if rows and len(row) != len(rows[0]):
            expected = f"{len(rows[0])}, as in the first vector"
            problems.add(path.name, name, f"line {line}, {name}", found=f"{len(row)} numbers", expected=expected)
            continue
        listed.append(token)
        rows.append(row)
    if not rows:
        problems.add(path.name, name, name, found="no vector", expected="numbers for some item")
        return None
    with np.errstate(over="ignore"):
        array = np.stack(rows).astype(np.float32)  # [S, F]
    return plain_vectors(listed, array, path=path, problems=problems)
