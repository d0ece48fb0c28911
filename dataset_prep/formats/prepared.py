"""What exporters share: reading a prepared folder, a vector for every item, and a place that is filled as a whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dataset_prep.features import read_items
from dataset_prep.folder_writer import put_in_place, remove_leftovers
from dataset_prep.locking import locked
from dataset_prep.session_folder import Rows
from recbole_mm.data.files import numbers, read_table
from recbole_mm.data.layout import SPLITS, Manifest, folder_kind, interaction_files, read_feature
from recbole_mm.errors import DatasetError, SettingError

if TYPE_CHECKING:
    from pandas import DataFrame

MISSING = ("zero", "mean")
OWNERS = ("user_id", "session_id")  # columns that say whose interactions these are, the first one there is taken
TEXT_COLUMNS = ("title", "categories", "brand")  # UniSRec's title, category and brand


@dataclass(frozen=True)
class Prepared:
    """A prepared folder.

    Attributes:
        parts: rows of a folder that is split; None for a plain one.
        owners, items, times: of each interaction of a plain one, in the order of the file.
        more: further columns of a plain ``.inter``: time_text, as it stands there, and rating, if there is one.
        table: its ``.item``, or None.
    """

    folder: Path
    name: str
    manifest: Manifest
    parts: dict[str, Rows] | None = None
    owners: list[str] = field(default_factory=list)
    items: list[str] = field(default_factory=list)
    times: Sequence[float] = ()
    more: dict[str, list[str]] = field(default_factory=dict)
    table: DataFrame | None = None

    @property
    def table_items(self) -> set[str]:
        """The items that the table has."""
        return set() if self.table is None else set(self.table["item_id"])


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        counts: of rows, users and items, in the order of telling.
        remarks: further things to know.
    """

    folder: Path
    counts: dict[str, int]
    remarks: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.folder}: " + ", ".join(f"{n} {what}" for what, n in self.counts.items())]
        return "\n".join(lines + [f"  {remark}" for remark in self.remarks])


def read_prepared(folder: Path, *, user: str | None = None) -> Prepared:
    """Read the interactions and items of a prepared folder.

    Args:
        user: column of a plain ``.inter`` with the users; None takes user_id, or session_id without one.

    Raises:
        DatasetError: no folder, a file that cannot be read, or no such column.
    """
    folder = Path(os.path.abspath(folder))
    manifest = Manifest.load(folder)
    table = read_items(folder) if (folder / f"{folder.name}.item").is_file() else None
    common: dict[str, Any] = {"folder": folder, "name": folder.name, "manifest": manifest, "table": table}
    if folder_kind(folder) == "splits":
        parts = {}
        for part, path in zip(SPLITS, interaction_files(folder), strict=True):
            frame = read_table(path, needed=["item_id_list", "item_id"])
            owner = _owner(frame, path, None)
            prefixes = [text.split(" ") for text in frame["item_id_list"]]
            parts[part] = Rows(frame[owner].tolist(), prefixes, frame["item_id"].tolist())
        return Prepared(**common, parts=parts)
    path = interaction_files(folder)[0]
    frame = read_table(path, needed=["item_id", "timestamp"])
    more = {"time_text": frame["timestamp"].tolist()}
    if "rating" in frame:
        more["rating"] = frame["rating"].tolist()
    return Prepared(
        **common,
        owners=frame[_owner(frame, path, user)].tolist(),
        items=frame["item_id"].tolist(),
        times=numbers(frame, "timestamp", path),
        more=more,
    )


def _owner(frame: DataFrame, path: Path, user: str | None) -> str:
    for name in (user,) if user else OWNERS:
        if name in frame:
            return name
    raise DatasetError(
        f"{path} has no column {user or 'user_id or session_id'}, only {', '.join(frame)}; choose one with --user"
    )


def feature_matrix(
    prepared: Prepared, feature: str, items: Sequence[str], *, missing: str
) -> tuple[np.ndarray, tuple[str, ...]]:
    """One vector for each item, [N, F] float32, and remarks on what had to be done for that.

    Several rows of an item are averaged. Items without rows get zeros, or the mean of the other items' vectors.

    Raises:
        SettingError: another value of ``missing``.
        DatasetError: no such feature, or one that cannot be trusted; none of the items has a vector.
    """
    if missing not in MISSING:
        raise SettingError(f"missing is {missing!r}, expected one of {list(MISSING)}")
    tokens, rows, counts = read_feature(prepared.folder, feature, manifest=prepared.manifest)
    starts = np.cumsum(counts) - counts
    place = {token: number for number, token in enumerate(tokens) if counts[number]}
    found = np.array([place.get(token, -1) for token in items], dtype=np.int64)
    has = found >= 0
    if not has.any():
        raise DatasetError(f"{prepared.folder}: none of the {len(items)} items has a row in the feature {feature!r}")
    matrix = np.zeros((len(items), rows.shape[1]), dtype=np.float32)
    mine = found[has]
    if (counts[mine] == 1).all():
        matrix[has] = rows[starts[mine]]
    else:
        means = [rows[start : start + n].mean(axis=0, dtype=np.float64)
                 for start, n in zip(starts[mine].tolist(), counts[mine].tolist(), strict=True)]  # fmt: skip
        matrix[has] = means
    remarks = []
    if n_several := int((counts[mine] > 1).sum()):
        remarks.append(f"feature {feature!r}: {n_several} items have several rows, which were averaged")
    if n_without := int((~has).sum()):
        filled = "zeros" if missing == "zero" else "the mean of the others"
        remarks.append(f"feature {feature!r}: {n_without} of {len(items)} items have no vector and got {filled}")
        if missing == "mean":
            matrix[~has] = matrix[has].mean(axis=0, dtype=np.float64)
    return matrix, tuple(remarks)


def item_texts(prepared: Prepared, items: Sequence[str]) -> list[str] | None:
    """A text for each item: its text, or its title, categories and brand; a full stop for an item without one.

    None if the table has none of these columns.
    """
    if prepared.table is None:
        return None
    columns = ["text"] if "text" in prepared.table else [name for name in TEXT_COLUMNS if name in prepared.table]
    if not columns:
        return None
    values = zip(*(prepared.table[column] for column in columns), strict=True)
    text_of = {
        token: " ".join(
            text.replace("_", " ") if column == "categories" else text
            for column, text in zip(columns, row, strict=True)
            if text
        )
        for token, row in zip(prepared.table["item_id"], values, strict=True)
    }
    return [text_of.get(token) or "." for token in items]


def write_export(folder: Path, fill: Callable[[Path], Any], *, known: Sequence[str], overwrite: bool) -> Path:
    """Let ``fill`` write the files of another tool into a folder that gets its name when it is complete.

    Args:
        known: names of the files that the tool has; only a folder of these is replaced.
        overwrite: replace such a folder.

    Raises:
        DatasetError: the place is taken.
    """
    folder = Path(os.path.abspath(folder))
    with locked(folder):
        remove_leftovers(folder)
        _refuse_place(folder, known, overwrite=overwrite)
        workshop = folder.parent / f".partial-{folder.name}-{os.getpid()}"
        partial = workshop / folder.name
        try:
            partial.mkdir(parents=True)
            fill(partial)
            put_in_place(partial, folder, old=workshop / "replaced")
        finally:
            shutil.rmtree(workshop, ignore_errors=True)
    return folder


def _refuse_place(folder: Path, known: Sequence[str], *, overwrite: bool) -> None:
    if not folder.exists() and not folder.is_symlink():
        return
    if folder.is_symlink() or not folder.is_dir():
        raise DatasetError(f"{folder} is there already and is no folder; choose another place with --out")
    if not overwrite:
        raise DatasetError(
            f"{folder} is there already; replace it with --overwrite, or choose another place with --out"
        )
    if foreign := sorted(path.name for path in folder.iterdir() if path.name not in known):
        raise DatasetError(
            f"{folder} cannot be replaced: {', '.join(foreign[:3])} is not of an export ({len(foreign)} such files); "
            "move them away, or choose another place with --out"
        )
