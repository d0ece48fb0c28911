"""The sessions and features that MMSBR's authors released, as a dataset folder: read without running what is in them.

train.txt, test.txt    each a pickle of six lists; items are numbered 1..N, a session is its first items and the last
    field 0            the first items of each session (lists)
    field 1, 2         price level and category of each of them
    field 3, 4         price level and category of item 1..N
    field 5            the last item of each session, to be predicted
imgMatrixpca.npy, textMatrixpca.npy, imgTextMatrixpca.npy, textImgMatrixpca.npy    optional: row r belongs to item r + 1
asinlist.npy           optional: the name of each item; without it, items are called 1..N

The split is the authors': training and test sessions as given, each once. They had no validation sessions; here, whole
sessions are drawn from the training ones. Three things to know about these data:
- reviews have no time of day, so that the order inside a session is the catalogue's more than the buyer's;
- price levels and categories were renumbered in order of appearance: a higher level is not a higher price;
- each feature file went through a PCA of its own, so that image and image_from_text have unrelated axes.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import numpy as np

from dataset_prep.card import write_card
from dataset_prep.folder_writer import place_of, refuse_existing
from dataset_prep.session_folder import bad_id, write_session_folder
from dataset_prep.sessions import prefix_rows
from dataset_prep.six_lists import Problems, SixLists, compare_tables, read_six_lists
from recbole_mm.data.files import sha256_of
from recbole_mm.data.layout import RELEASED_COMMAND, write_feature
from recbole_mm.errors import DatasetError, SettingError, UnsafeFileError

if TYPE_CHECKING:
    from pandas import DataFrame

FEATURE_FILES = {
    "image": "imgMatrixpca.npy",
    "text": "textMatrixpca.npy",
    "text_from_image": "imgTextMatrixpca.npy",
    "image_from_text": "textImgMatrixpca.npy",
}
NAMES_FILE = "asinlist.npy"
PREFIXES = ("none", "train")
NUMPY_MAGIC, PICKLE_MAGIC = b"\x93NUMPY", b"\x80"


@dataclass(frozen=True)
class ReleasedReport:
    """What was imported.

    Attributes:
        n_sessions, n_rows: by part, "train", "valid" and "test".
        counts: of what is noteworthy, as the manifest has them.
        features: shape of each, in the order of reading.
        remarks: further things to know.
    """

    folder: Path
    n_items: int
    n_sessions: dict[str, int]
    n_rows: dict[str, int]
    counts: dict[str, int]
    features: dict[str, tuple[int, int]] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    def __str__(self) -> str:
        sessions = ", ".join(f"{n} {part}" for part, n in self.n_sessions.items())
        rows = f", {self.n_rows['train']} training rows" if self.n_rows != self.n_sessions else ""
        lines = [f"{self.folder}: {self.n_items} items; sessions: {sessions}{rows}"]
        lines += [f"  {n} {what.replace('_', ' ')}" for what, n in self.counts.items() if n]
        lines += [f"  feature {name!r}: {n} rows of width {width}" for name, (n, width) in self.features.items()]
        return "\n".join(lines + [f"  {remark}" for remark in self.remarks])


def import_released(
    released: Path,
    folder: Path,
    *,
    valid_share: float = 0.1,
    prefixes: str = "none",
    longest: int = 20,
    seed: int = 2020,
    overwrite: bool = False,
) -> ReleasedReport:
    """Make a dataset folder out of the released files; same files and settings, same bytes.

    Sessions are called ``train<i>`` and ``test<i>``, i the position in the released lists, from 0.

    Args:
        released: folder with train.txt and test.txt.
        folder: to make; its files carry its name.
        valid_share: of the training sessions, drawn at random for validation; between 0 and 1, rounded to sessions.
        prefixes: "none" for one row per session, as the authors have it; "train" for a training row per item of a
            session but the first.
        longest: sessions keep their newest items, at least 2; prefixes then have at most ``longest - 1``.
        seed: of the draw.
        overwrite: replace a folder prepared here before.

    Raises:
        UnsafeFileError: a file would run code.
        DatasetError: ``folder`` is there, or a list of everything that is wrong with the files.
        SettingError: a setting out of its range.
    """
    released, folder = Path(released), Path(os.path.abspath(folder))
    _check_settings(valid_share=valid_share, prefixes=prefixes, longest=longest)
    refuse_existing(folder, overwrite=overwrite)
    if not released.is_dir():
        raise DatasetError(f"no folder {released}; it holds train.txt and test.txt as released")

    problems = Problems()
    train, test, tokens = _read_sessions(released, problems)
    features, remarks = read_features(released, len(tokens), problems)
    problems.raise_if_any(released)

    drawn = draw_sessions(len(train.targets), share=valid_share, seed=seed)
    members = {
        "train": [i for i in range(len(train.targets)) if i not in drawn],
        "valid": sorted(drawn),
        "test": range(len(test.targets)),
    }
    parts, sessions, n_cut = {}, {}, 0
    for part, lists, file in (("train", train, "train"), ("valid", train, "train"), ("test", test, "test")):
        whole = [[tokens[item - 1] for item in (*lists.prefixes[i], lists.targets[i])] for i in members[part]]
        sessions[part] = [session[-longest:] for session in whole]
        n_cut += sum(len(session) > longest for session in whole)
        names = [f"{file}{i}" for i in members[part]]
        parts[part] = prefix_rows(names, sessions[part], every=part == prefixes)
    counts = _counts(sessions, n_items=len(tokens), n_cut=n_cut)
    settings = {
        "made_by": RELEASED_COMMAND,
        "split": "training and test sessions as released; validation: whole training sessions, a seeded random draw",
        "order": "as released",
        **{"valid_share": valid_share, "seed": seed, "prefixes": prefixes, "longest": longest, "counts": counts},
        "n_sessions": {part: len(indices) for part, indices in members.items()},
    }
    files = ["train.txt", "test.txt", *(FEATURE_FILES[name] for name in features)]
    files += [NAMES_FILE] if (released / NAMES_FILE).is_file() else []
    raw_files = {file: sha256_of(released / file) for file in files}

    items, types = _items(train, tokens)

    def finish(partial: Path) -> None:
        for name, (rows, filled) in features.items():
            file = FEATURE_FILES[name]
            write_feature(
                partial, name, tokens=[token for token, has in zip(tokens, filled, strict=True) if has], rows=rows,
                encoder="released", source=file, settings={"file": file, "sha256": raw_files[file]},
            )  # fmt: skip
        write_card(partial)

    write_session_folder(
        folder, parts, items, types,
        settings=settings, raw_files=raw_files, overwrite=overwrite, finish=finish,
    )  # fmt: skip
    return ReleasedReport(
        folder=folder,
        n_items=len(tokens),
        n_sessions=settings["n_sessions"],
        n_rows={part: len(rows.targets) for part, rows in parts.items()},
        counts=counts,
        features={name: rows.shape for name, (rows, _) in features.items()},
        remarks=remarks,
    )


def _check_settings(*, valid_share: float, prefixes: str, longest: int) -> None:
    if not 0 < valid_share < 1:
        raise SettingError(f"valid_share is {valid_share}, expected a share between 0 and 1, such as 0.1")
    if prefixes not in PREFIXES:
        raise SettingError(f"prefixes is {prefixes!r}, expected one of {list(PREFIXES)}")
    if longest < 2:
        raise SettingError(f"longest is {longest}, expected at least 2")


# ---------------------------------------------------------------- sessions


def _read_sessions(released: Path, problems: Problems) -> tuple[SixLists, SixLists, list[str]]:
    """Both files and the name of item 1..N; raises if one of the files is not six lists."""
    train, test = (read_six_lists(released / file, problems) for file in ("train.txt", "test.txt"))
    if train is None or test is None:
        problems.raise_if_any(released)
    compare_tables(train, test, problems)
    if len(train.targets) == 1:
        problems.add("train.txt", "sessions", "", found="1 session", expected="2 or more, one of them for validation")
    n_items = len(train.price_levels)
    tokens = item_names(released, n_items, problems) or [str(number) for number in range(1, n_items + 1)]
    return train, test, tokens


# ---------------------------------------------------------------- arrays


def read_array(path: Path, problems: Problems) -> np.ndarray | None:
    """A plain array; None if it is none, said in ``problems``."""
    with open(path, "rb") as file:
        start = file.read(len(NUMPY_MAGIC))
    try:
        array = np.load(path, allow_pickle=False)
    except Exception as error:  # on a broken header or archive NumPy raises whatever it likes, even MemoryError
        if "allow_pickle" in str(error) and start.startswith((NUMPY_MAGIC, PICKLE_MAGIC)):
            raise UnsafeFileError(
                f"{path} holds Python objects, a pickle, which can run any code; it was refused, and nothing was run\n"
                "  if you made it, save it as plain numbers or texts: numpy.save(file, numpy.array(list)); or move it "
                "away and import without it"
            ) from error
        array = None
    if not isinstance(array, np.ndarray):
        problems.add(path.name, "arrays", "", found="no plain .npy array, or one cut short", expected="a .npy array")
        return None
    return array


def read_features(
    released: Path, n_items: int, problems: Problems
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], tuple[str, ...]]:
    """Rows [S, F] float32 of the items that have some, and which these are, [N] bool; by feature. And remarks."""
    features, remarks = {}, []
    for name, file in FEATURE_FILES.items():
        if not (released / file).is_file():
            continue
        array = read_array(released / file, problems)
        if array is None:
            continue
        expected = f"({n_items}, width) of floats, a row per item"
        if array.dtype.kind != "f" or array.ndim != 2 or len(array) != n_items or array.shape[1] < 1:
            problems.add(file, "shapes", "", found=f"{array.shape} of {array.dtype}", expected=expected)
            continue
        with np.errstate(over="ignore"):
            rows = array.astype(np.float32)
        bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        for row in bad.tolist():
            problems.add(file, "numbers", f"row {row} (item {row + 1})", found="NaN or infinity", expected="numbers")
        filled = rows.any(axis=1)
        if not filled.any():
            problems.add(file, "shapes", "", found="zeros in all rows", expected="a vector for some item")
            continue
        if n_zero := int((~filled).sum()):
            remarks.append(f"feature {name!r}: {n_zero} rows are all zero; these items count as items without content")
        rows = rows[filled]
        if len(rows) > 1 and (rows == rows[0]).all():
            remarks.append(f"feature {name!r}: all rows are equal, it carries no information")
        features[name] = (rows, filled)
    for pair in (("image", "image_from_text"), ("text", "text_from_image")):
        if set(pair) <= set(features):
            remarks.append(
                f"{pair[0]} and {pair[1]} come from two PCAs: their axes are unrelated, compare after training"
            )
    if missing := [FEATURE_FILES[name] for name in FEATURE_FILES if not (released / FEATURE_FILES[name]).is_file()]:
        remarks.append(f"no {', '.join(missing)}")
    return features, tuple(remarks)


def item_names(released: Path, n_items: int, problems: Problems) -> list[str] | None:
    """The name of each item; None without such a file, or with one that cannot be used."""
    path = released / NAMES_FILE
    array = read_array(path, problems) if path.is_file() else None
    if array is None:
        return None
    if array.dtype.kind != "U" or array.shape != (n_items,):
        expected = f"({n_items},) of texts, a name per item"
        problems.add(NAMES_FILE, "shapes", "", found=f"{array.shape} of {array.dtype}", expected=expected)
        return None
    tokens, first = array.tolist(), {}
    for index, token in enumerate(tokens):
        if reason := bad_id(token):
            problems.add(NAMES_FILE, "names", f"[{index}]", found=f"{token!r}, which {reason}", expected="a plain name")
        elif (earlier := first.setdefault(token, index)) != index:
            expected = f"another name than [{earlier}]"
            problems.add(NAMES_FILE, "names", f"[{index}]", found=repr(token), expected=expected)
    return tokens


# ---------------------------------------------------------------- rows


def draw_sessions(n: int, *, share: float, seed: int) -> set[int]:
    """At least one and at most n - 1 of n sessions, the same ones on every machine."""
    random = Random(f"validation {seed}")
    order = [random.random() for _ in range(n)]
    n_drawn = min(max(1, round(share * n)), n - 1)
    return set(sorted(range(n), key=order.__getitem__)[:n_drawn])


def _counts(parts: dict[str, list[list[str]]], *, n_items: int, n_cut: int) -> dict[str, int]:
    """What is noteworthy about the sessions of each part; nothing is removed for it but items beyond ``longest``."""
    items = {part: {token for session in sessions for token in session} for part, sessions in parts.items()}
    everything = [session for sessions in parts.values() for session in sessions]
    counts = {
        "sessions_cut_to_their_newest_items": n_cut,
        "last_items_that_are_in_their_session_before": sum(session[-1] in session[:-1] for session in everything),
    }
    for part, what in (("valid", "validation"), ("test", "test")):
        unseen = sum(session[-1] not in items["train"] for session in parts[part])
        counts[f"last_items_of_{what}_that_no_training_session_has"] = unseen
    counts["items_that_no_session_has"] = n_items - len(set.union(*items.values()))
    return counts


def _items(lists: SixLists, tokens: list[str]) -> tuple[DataFrame, dict[str, str]]:
    from pandas import DataFrame

    columns = {"item_id": tokens, "price_level": lists.price_levels, "category": lists.categories}
    frame = DataFrame({name: [str(value) for value in values] for name, values in columns.items()}, dtype=object)
    return frame, dict.fromkeys(columns, "token")


# ---------------------------------------------------------------- command line


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add ``released`` to the commands of ``python -m dataset_prep``."""
    parser = commands.add_parser("released", help="import the sessions and features that MMSBR's authors released")
    parser.add_argument(
        "--folder", type=Path, required=True, metavar="DIR", help="holds train.txt, test.txt and perhaps *pca.npy"
    )
    parser.add_argument("--name", required=True, help="of the dataset, such as Cellphones")
    parser.add_argument("--out", type=Path, default=Path("dataset"), help="folder that gets the folder NAME (dataset)")
    parser.add_argument(
        "--valid-share", type=float, default=0.1, metavar="S", help="training sessions drawn for validation (0.1)"
    )
    parser.add_argument(
        "--prefixes",
        choices=PREFIXES,
        default="none",
        help="a row per session (none), or train on every prefix (train)",
    )
    parser.add_argument("--longest", type=int, default=20, metavar="N", help="newest items of a session to keep (20)")
    parser.add_argument("--seed", type=int, default=2020, help="of the draw (2020)")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder prepared here before")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    report = import_released(
        options.folder,
        place_of(options.out, options.name),
        valid_share=options.valid_share,
        prefixes=options.prefixes,
        longest=options.longest,
        seed=options.seed,
        overwrite=options.overwrite,
    )
    print(report)
    print(f"look at it with: python -m dataset_prep check {report.folder}")
