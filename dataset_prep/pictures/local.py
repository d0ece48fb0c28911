"""Pictures that lie in a folder already: found, checked, and linked or indexed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dataset_prep.features import PICTURE_ENDINGS, read_items
from dataset_prep.locking import locked
from dataset_prep.pictures.decode import OK, Inspected, inspect_picture
from dataset_prep.pictures.store import (
    NOT_ASKED_FOR,
    NOT_NAMED,
    Journal,
    Picture,
    PicturesReport,
    file_inside,
    publish,
    stored_name,
    wants_retry,
)
from dataset_prep.pictures.workers import answers
from recbole_mm.errors import DatasetError

if TYPE_CHECKING:
    from pandas import DataFrame

OUTSIDE = "outside the folder"
COLUMNS = ("image", "image_urls")  # that may name pictures, the better one first
WEB = ("http://", "https://")


def take_pictures(
    folder: Path,
    images: Path,
    *,
    column: str | None = None,
    per_item: int | None = None,
    in_place: bool = False,
    workers: int = 1,
    retry_failed: str | None = None,
    progress: bool = True,
) -> PicturesReport:
    """Check the pictures of the items of ``<folder>/<its name>.item`` and list them in ``pictures/index.tsv``.

    Every picture is decoded once; what cannot be used is listed with the reason. A later run hashes all files, and
    decodes those that are new or changed. Interrupted, it goes on where it was.

    Args:
        images: where the pictures lie.
        column: names them by paths relative to ``images``, one of type token or several of type token_seq, parted by
            blanks and percent-encoded. None takes image, or image_urls if it holds paths, or without these
            ``<images>/<item_id>.jpg`` and the like.
        per_item: how many of an item's pictures to take, the first ones; None takes all.
        in_place: leave the files where they are; else they are linked, or copied, into ``pictures/``.
        workers: processes that decode; 0 decodes here, without protection against pictures that crash the decoder.
        retry_failed: decode files again that failed before and have not changed: None, "temporary" (the decoder
            crashed, took too long, ...) or "all".
        progress: show a progress bar on stderr.

    Raises:
        DatasetError: no ``.item``, no such column or folder, another process writes the dataset.
    """
    folder, images = Path(folder), Path(images)
    if not images.is_dir():
        raise DatasetError(f"no folder of pictures {images}")
    root = Path(os.path.realpath(images))
    if in_place and not set("\t\n").isdisjoint(str(root)):
        raise DatasetError(
            f"the folder {images} has a tab or line break in its path; rename it, or leave out --in-place"
        )
    items = read_items(folder)
    column, named = _named_pictures(items, folder, root, column)
    encoded = items.attrs["types"][column] == "token_seq"
    paths = {source: file_inside(root, source, encoded=encoded) for sources in named for source in sources[:per_item]}
    with locked(folder), Journal(folder) as journal:
        for source, found in _inspect(paths, journal, workers=workers, retry_failed=retry_failed, progress=progress):
            if found.status == OK and not in_place:
                _put(paths[source], folder / "pictures" / stored_name(found), found.bytes)
            if journal.known.get(source) != found:
                journal.add(source, found)

        def line(item: str, number: int, source: str) -> Picture:
            if per_item is not None and number >= per_item:
                return Picture(item, number, source, NOT_ASKED_FOR)
            if paths[source] is None:
                return Picture(item, number, source, OUTSIDE)
            found = journal.known[source]
            file = os.path.relpath(paths[source], pictures) if in_place else stored_name(found)
            return Picture(item, number, source, found.status, file if found.status == OK else "", *found[2:])

        pictures = os.path.realpath(folder / "pictures")
        lines = []
        for item, sources in zip(items["item_id"], named, strict=True):
            lines += [line(item, number, source) for number, source in enumerate(sources)]
            lines += [] if sources else [Picture(item, 0, "", NOT_NAMED)]
        settings = {
            "from": "folder",
            "images": _described(root, folder),
            "column": column,
            "per_item": per_item,
            "in_place": in_place,
        }
        return publish(folder, lines, settings)


def _named_pictures(items: DataFrame, folder: Path, root: Path, column: str | None) -> tuple[str, list[list[str]]]:
    """The column used, and the paths of each item's pictures relative to ``root``, as given."""
    if column is None:
        column = next((name for name in COLUMNS if name in items and not _has_addresses(items[name])), "item_id")
    if column not in items:
        raise DatasetError(f"{folder} has no column {column}, only {', '.join(items.columns)}; see --column")
    if column == "item_id":
        # In reverse, so that of x.jpg and x.png the first one stays.
        by_stem = {p.stem: p.name for p in sorted(root.iterdir(), reverse=True) if p.suffix.lower() in PICTURE_ENDINGS}
        return column, [[by_stem[token]] if token in by_stem else [] for token in items["item_id"]]
    if items.attrs["types"][column] == "token_seq":
        return column, [value.split() for value in items[column]]
    return column, [[value] if value else [] for value in items[column]]


def _has_addresses(values: DataFrame) -> bool:
    return any(value.lower().startswith(WEB) for value in values)


def _inspect(
    paths: dict[str, Path | None], journal: Journal, *, workers: int, retry_failed: str | None, progress: bool
) -> Iterator[tuple[str, Inspected]]:
    """What is to be said of each source within the folder, in the order of ``paths``."""
    from tqdm import tqdm

    def question(source: str) -> tuple[Path, Inspected | None]:
        known = journal.known.get(source)
        again = known is None or not known.sha256 or wants_retry(known.status, retry_failed)
        return paths[source], None if again else known

    sources = [source for source, path in paths.items() if path is not None]
    found = answers(inspect_picture, map(question, sources), workers=workers)
    for source, answer in tqdm(
        zip(sources, found, strict=True), total=len(sources), unit="picture", disable=not progress, leave=False
    ):
        yield source, Inspected(answer) if isinstance(answer, str) else answer  # text: the worker was lost


def _put(path: Path, place: Path, n_bytes: int) -> None:
    """Link a picture to its place below ``pictures/``, or copy it where the system cannot link."""
    if place.is_file() and place.stat().st_size == n_bytes:
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    try:
        os.link(os.path.realpath(path), place)
    except OSError:  # another disk, or a system without links
        partial = place.with_name(f"{place.name}.partial-{os.getpid()}")
        try:
            shutil.copyfile(path, partial)
            os.replace(partial, place)
        finally:
            partial.unlink(missing_ok=True)


def _described(root: Path, folder: Path) -> str:
    """The folder of pictures, relative to the dataset if it lies within, else its name alone."""
    home = Path(os.path.realpath(folder))
    return root.relative_to(home).as_posix() if root.is_relative_to(home) else root.name
