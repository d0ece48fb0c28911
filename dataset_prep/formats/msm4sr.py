"""The files that MSM4SR's authors released: interactions with commas, and pickles of the vectors of each item.

<dataset>.inter        user_id,item_id,timestamp, with or without RecBole's types; optional for an existing folder
desc_emb.pkl           a dict from item id to a list of vectors, one a sentence: the feature text
image_emb_<N>.pkl      the same, one vector a picture, made of its N nearest words: the feature image

The pickles are read without running what is in them. A list of pairs of id and vector is understood as well. Rows of
zeros are padding. The interactions stay as they are: of repeated pairs of user and item the paper keeps the last, and
it leaves users with fewer than 5 interactions out, which is up to the run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dataset_prep.formats.imported import Imported, Vectors, plain_vectors
from dataset_prep.interactions import Columns, read_interactions
from dataset_prep.safe_pickle import load_array_pickle, unpacked
from dataset_prep.six_lists import Problems
from recbole_mm.data.files import sha256_of
from recbole_mm.errors import DatasetError, SettingError

TEXT_FILE, IMAGE_FILES = "desc_emb.pkl", "image_emb_*.pkl"
HOLDS = (
    "these files hold lists of plain numbers or NumPy's arrays of them, by item; "
    "if you made it out of tensors, write it again with tensor.numpy()"
)
NEEDED = ("user_id", "item_id", "timestamp")


def read_msm4sr(
    folder: Path,
    *,
    text: Path | None = None,
    image: Path | None = None,
    only_features: bool = False,
    bad_rows: str = "refuse",
) -> Imported:
    """Read the released files of one dataset.

    Args:
        text, image: the pickles; None takes those of the usual names in ``folder``, as far as they are there.
        only_features: leave the interactions out.
        bad_rows: "refuse" or "drop" interactions that cannot be used.

    Raises:
        UnsafeFileError: a pickle would run code.
        DatasetError: a file is missing, cut short, or holds something else; or a list of everything wrong with it.
        SettingError: several pickles of pictures to choose from.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DatasetError(f"no folder {folder}; it holds {TEXT_FILE} and image_emb_<N>.pkl as released")
    paths = {"text": text or _only(folder, TEXT_FILE), "image": image or _only(folder, IMAGE_FILES)}
    paths = {name: Path(path) for name, path in paths.items() if path is not None}
    if not paths:
        there = sorted(path.name for path in folder.iterdir())[:8]
        raise DatasetError(f"{folder} has neither {TEXT_FILE} nor image_emb_<N>.pkl, only {there}")
    problems = Problems()
    features = {name: read_vectors(path, problems) for name, path in paths.items()}
    problems.raise_if_any(folder)
    raw_files = {vectors.file: vectors.sha256 for vectors in features.values()}
    remarks = tuple(f"no pickle for the feature {name}" for name in ("text", "image") if name not in features)
    if only_features:
        return Imported(kind="msm4sr", features=features, raw_files=raw_files, remarks=remarks)
    interactions, path, more = _interactions(folder, bad_rows)
    return Imported(
        kind="msm4sr",
        features=features,
        interactions=interactions,
        settings={"bad_rows": bad_rows},
        raw_files={path.name: sha256_of(path), **raw_files},
        remarks=(*remarks, *more),
    )


def _only(folder: Path, pattern: str) -> Path | None:
    found = sorted(folder.glob(pattern))
    if len(found) > 1:
        raise SettingError(f"{folder} has {[path.name for path in found]}; choose one with --image FILE")
    return found[0] if found else None


def _interactions(folder: Path, bad_rows: str) -> tuple[dict[str, Any], Path, tuple[str, ...]]:
    found = sorted(folder.glob("*.inter"))
    if len(found) != 1:
        raise DatasetError(
            f"{folder} has {[path.name for path in found] or 'no .inter file'}, expected one file <dataset>.inter; "
            "features alone go into an existing folder with --dataset"
        )
    path = found[0]
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        header = file.readline().rstrip("\r\n")
    names = {name.partition(":")[0]: name for name in header.split("\t" if "\t" in header else ",")}
    if missing := [name for name in NEEDED if name not in names]:
        raise DatasetError(f"{path} has no column {', '.join(missing)}; its columns are {', '.join(names)}")
    if "\t" in header:  # atomic files are read with names that have no types
        names = {name: name for name in names}
    columns = Columns(user=names["user_id"], item=names["item_id"], time=names["timestamp"])
    frame, dropped = read_interactions(path, columns, bad_rows=bad_rows)
    remarks = tuple(f"{n} interactions were dropped: {why}" for why, n in dropped.items())
    if n_again := int(frame.duplicated(subset=["user", "item"]).sum()):
        remarks += (f"{n_again} interactions repeat an earlier pair of user and item; they were kept",)
    interactions = {
        "user_id:token": frame["user"].tolist(),
        "item_id:token": frame["item"].tolist(),
        "timestamp:float": frame["time"].tolist(),
    }
    return interactions, path, remarks


# ---------------------------------------------------------------- pickles


def read_vectors(path: Path, problems: Problems) -> Vectors | None:
    """The vectors in one pickle; None if it holds something else, said in ``problems``.

    Raises:
        UnsafeFileError: it would run code.
        DatasetError: no file.
    """
    expected = "a whole pickle of a dict from item id to a list of vectors"
    try:
        content = load_array_pickle(path, holds=HOLDS)
    except ValueError as error:
        problems.add(path.name, "file", "", found=f"{error}; download it again", expected=expected)
        return None
    size = path.stat().st_size
    if (n := _n_numbers(content, at_most=size)) > size:  # a list named many times: a small file that fills the memory
        found = f"{n} numbers or more in {size} bytes"
        problems.add(path.name, "file", "", found=found, expected="each vector written out")
        return None
    by_item = _by_item(content, path, problems)
    if not by_item:
        if by_item is not None:
            problems.add(path.name, "file", "", found="no item", expected=expected)
        return None
    tokens, rows, counts = [], [], []
    for token, value in by_item.items():
        mine = []
        for position, vector in enumerate(value):
            found = _vector(vector)
            if found is None:
                where = f"item {token!r}, vector {position}"
                problems.add(path.name, "vectors", where, found=_kind(vector), expected="a list of numbers")
            else:
                mine.append(found)
        tokens.append(token)
        rows += mine
        counts.append(len(mine))
    return _stacked(path, tokens, rows, np.array(counts), problems)


def _n_numbers(content: Any, *, at_most: int) -> int:
    """How many numbers there are in lists and arrays, counted until there are more than ``at_most``."""
    n, waiting = 0, [content]
    while waiting and n <= at_most:
        value = unpacked(waiting.pop())
        if isinstance(value, np.ndarray):
            n += value.size
        elif isinstance(value, (list, tuple)):
            n += len(value)
            waiting += [member for member in value if type(member) not in (float, int, str)]
        elif isinstance(value, dict):
            n += len(value)
            waiting += value.values()
    return n


def _by_item(content: Any, path: Path, problems: Problems) -> dict[str, list[Any]] | None:
    """The vectors of each item, still as they are in the file."""
    if isinstance(content, dict):
        pairs = [(token, _several(value)) for token, value in content.items()]
    elif isinstance(content, (list, tuple)) and all(isinstance(p, (list, tuple)) and len(p) == 2 for p in content):
        pairs = [(token, _several(value)) for token, value in content]
    else:
        expected = "a dict from item id to a list of vectors, or a list of pairs of id and vector"
        problems.add(path.name, "file", "", found=_kind(content), expected=expected)
        return None
    by_item: dict[str, list[Any]] = {}
    for token, vectors in pairs:
        if type(token) is not str or not token or "\n" in token:
            problems.add(path.name, "ids", "", found=f"the id {token!r}"[:80], expected="a text in one line")
        elif vectors is None:
            problems.add(path.name, "vectors", f"item {token!r}", found="no list", expected="a list of vectors")
        else:
            by_item.setdefault(token, []).extend(vectors)
    return by_item


def _several(value: Any) -> list[Any] | None:
    """What an item has, as a list of vectors: one vector alone is a list of one."""
    value = unpacked(value)
    if isinstance(value, np.ndarray):
        return [value] if value.ndim == 1 else list(value) if value.ndim == 2 else None
    if not isinstance(value, (list, tuple)):
        return None
    if value and all(type(number) in (float, int) for number in value):
        return [value]
    return list(value)


def _vector(value: Any) -> np.ndarray | None:
    """One vector [F], or None if it is none."""
    value = unpacked(value)
    if isinstance(value, (list, tuple)):
        if not all(type(number) in (float, int) for number in value):
            return None
        try:
            value = np.array(value, dtype=np.float64)
        except OverflowError:  # a whole number beyond float64
            return None
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiu":
        return None
    if value.ndim == 2 and len(value) == 1:
        value = value[0]
    return value if value.ndim == 1 and len(value) else None


def _stacked(
    path: Path, tokens: list[str], rows: list[np.ndarray], counts: np.ndarray, problems: Problems
) -> Vectors | None:
    owner = np.repeat(np.arange(len(tokens)), counts).tolist()
    width = len(rows[0]) if rows else 0
    for row, vector in enumerate(rows):
        if len(vector) != width:
            where, expected = f"item {tokens[owner[row]]!r}", f"{width}, as in the first vector"
            problems.add(path.name, "widths", where, found=f"a vector of width {len(vector)}", expected=expected)
    if not rows or any(len(vector) != width for vector in rows):
        if not rows:
            problems.add(path.name, "file", "", found="no vector", expected="a list of vectors for each item")
        return None
    kinds = sorted({vector.dtype.newbyteorder("=").name for vector in rows})
    array = np.empty((len(rows), width), dtype=np.result_type(*kinds))  # [S, F]
    for row, vector in enumerate(rows):
        array[row] = vector
    return plain_vectors(tokens, array, path=path, problems=problems, counts=counts)


def _kind(value: Any) -> str:
    value = unpacked(value)
    if isinstance(value, np.ndarray):
        return f"an array {value.shape} of {value.dtype}"
    name = type(value).__name__
    return "a piece of an array" if name.startswith("_") else f"a {name}"  # what stands in for NumPy's parts
