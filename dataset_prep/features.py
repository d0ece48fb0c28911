"""Features for the items of a folder: out of their texts, out of their pictures, or out of vectors made elsewhere.

An item without content gets no row and is not listed in the feature: missing is a state of its own, not a zero vector.
A feature is made once: the same command finds it up to date, and continues one that was stopped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dataset_prep.encoders import Encoder, build_encoder
from dataset_prep.encoding.contents import Contents, picture_contents, text_contents
from dataset_prep.encoding.engine import (
    ENGINE_VERSION,
    Running,
    encode_contents,
    feature_key,
    full_disk_explained,
    is_up_to_date,
    work_key,
)
from dataset_prep.encoding.shards import Encoded, WorkFolder
from dataset_prep.locking import locked
from dataset_prep.pictures.store import file_inside, picture_files, read_index
from dataset_prep.text import clean_text, sentences
from recbole_mm.data.files import read_table, sha256_of
from recbole_mm.data.layout import Manifest, check_feature_name, write_feature, write_feature_blocks
from recbole_mm.errors import DatasetError, SettingError, UnsafeFileError

if TYPE_CHECKING:
    from pandas import DataFrame

TEXT_COLUMNS = ("title", "brand", "category", "categories", "description")
ONE_SENTENCE = ("title", "brand", "category", "categories")  # never split
LISTS = ("category", "categories")  # of names, separated by spaces, with underscores inside a name
ROWS = ("sentence", "item")
PICTURE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif")
TEXTS_AT_ONCE = 512  # contents of a shard, which is lost when a run is stopped
PICTURES_AT_ONCE = 256
BLOCK_BYTES = 1 << 24  # of rows that are written at a time
OUTSIDE = "picture outside the folder"
NO_PICTURE = "no picture named"


@dataclass(frozen=True)
class FeatureReport:
    """What became of the items.

    Attributes:
        n_items: rows of the ``.item`` file.
        n_filled: items that have at least one row in the feature.
        shape: of the array, [S, F].
        missing: number of items without a row, by reason.
        examples: an item for each reason.
        remarks: further things to know.
        up_to_date: it was there already, made from the same contents in the same way.
    """

    feature: str
    n_items: int
    n_filled: int
    shape: tuple[int, int]
    missing: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    up_to_date: bool = False

    def __str__(self) -> str:
        rows, width = self.shape
        lines = [f"feature {self.feature!r}: {self.n_filled} of {self.n_items} items, {rows} rows of width {width}"]
        if self.up_to_date:
            lines[0] += "; up to date, nothing was done (--force makes it again)"
        lines += [f"  {n} without: {why} (such as item {self.examples[why]!r})" for why, n in self.missing.items()]
        return "\n".join(lines + [f"  {remark}" for remark in self.remarks])


def make_feature(
    folder: Path,
    name: str,
    *,
    encoder: Encoder | None = None,
    build: Callable[[], Encoder] | None = None,
    columns: Sequence[str] | None = None,
    rows: str = "sentence",
    max_rows: int = 10,
    column: str | None = None,
    images: Path | None = None,
    per_item: int = 1,
    running: Running | None = None,
    force: bool = False,
    progress: bool = True,
) -> FeatureReport:
    """Make one feature for the items of ``<folder>/<name of folder>.item`` and add it to the folder.

    Each different content is encoded once, in shards that are kept until all are there: after a stop or a crash, the
    same call continues and ends with the same bytes. A feature that was made of the same contents by the same encoder
    is left alone. Memory: the contents' names, and a few shards.

    Args:
        name: of the feature.
        encoder: None takes what ``build`` makes, or ``tfidf`` for a feature "text" and ``histogram`` for "image".
        build: makes the encoder; for other processes it must be picklable, such as a ``functools.partial``.
        columns: texts: columns to use, in this order; None takes those of ``TEXT_COLUMNS`` that are there.
        rows: texts: "sentence" for one vector per sentence, "item" for one per item.
        max_rows: texts: sentences of an item that are used, the first ones.
        column: pictures: the column with a path, relative to ``images``; None takes "image".
        images: pictures: None takes ``folder``. Without such a column, ``<images>/<item_id>.jpg`` and the like. With
            neither ``column`` nor ``images``, the pictures of ``<folder>/pictures/index.tsv``, if that is there.
        per_item: pictures of an item that are used, the first ones.
        running: threads, processes or a cluster; None takes a thread per core.
        force: make it again, whatever is there.
        progress: show a progress bar on stderr.

    Raises:
        DatasetError: no ``.item`` file, a column is missing, an item occurs twice, no item has content, or another
            process writes this folder.
        SettingError: an unknown value of ``rows``, ``max_rows`` or ``per_item`` below 1, no default encoder for this
            name.
        OSError: the disk is full, memory runs out, a process dies again and again; what is finished stays.
    """
    folder, running = Path(folder), running or Running()
    if encoder is None:
        build = build or partial(build_encoder, None, feature=name)
        encoder = build()
    items = read_items(folder)
    try:
        check_feature_name(name)
    except ValueError as error:
        raise DatasetError(f"feature {name!r} of {folder.name} cannot be written: {error}") from error
    if encoder.source == "text":
        used, settings = _text_columns(items, folder, columns), {"rows": rows, "max_rows": max_rows}
        where: dict[str, Any] = {}  # it lay, which no row depends on
        if rows == "item":
            del settings["max_rows"]
        texts = item_texts(items, columns=used, rows=rows, max_rows=max_rows)
        contents, shard_size = text_contents(items["item_id"], texts), TEXTS_AT_ONCE
        counted = rows == "sentence"
    else:
        used, paths, why = _picture_paths(items, folder, column=column, images=images, per_item=per_item)
        settings, where = {"per_item": per_item}, {"images": None if images is None else Path(images).name}
        contents, shard_size = picture_contents(items["item_id"], paths, why, progress=progress), PICTURES_AT_ONCE
        counted = per_item > 1
    settings = {"columns": used, **settings}
    inputs = contents.sha256()
    key = feature_key(encoder, inputs, shard_size=shard_size, further=settings)
    with locked(folder):
        work = WorkFolder(folder, name, work_key(key, encoder, running))
        work.clean()
        if force:
            work.remove()
        elif is_up_to_date(folder, original_name(Manifest.load(folder), name), key):
            work.remove()
            return known_report(folder, name, n_items=len(items))
        remarks: list[str] = []
        encoded = Encoded(contents, shard_size, work)
        if contents.unique:
            encoded = encode_contents(
                contents,
                encoder,
                work=work,
                shard_size=shard_size,
                build=build,
                running=running,
                remarks=remarks,
                progress=progress,
            )
        settings |= {**where, **encoder.settings, "inputs_sha256": inputs}
        settings["engine"] = {"version": ENGINE_VERSION, "shard_size": shard_size, "key": key}
        made = {"encoder": encoder.name, "source": ", ".join(used), "settings": settings}
        report = _write(folder, name, contents, encoded, counted=counted, remarks=remarks, **made)
        work.remove()
    return report


def known_report(folder: Path, name: str, *, n_items: int) -> FeatureReport:
    """Of a feature that is there already, as it is or reduced."""
    manifest = Manifest.load(folder)
    info = manifest.features[name]
    original = original_name(manifest, name)
    missing = manifest.features[original].settings.get("missing", [])
    n_filled = (folder / info.items).read_bytes().count(b"\n")
    remarks = (f"it is reduced from {original}, which is up to date",) if original != name else ()
    return FeatureReport(
        feature=name,
        n_items=n_items,
        n_filled=n_filled,
        shape=info.shape,
        missing={one["reason"]: one["items"] for one in missing},
        examples={one["reason"]: one["such_as"] for one in missing},
        remarks=remarks,
        up_to_date=True,
    )


def original_name(manifest: Manifest, name: str) -> str:
    """What the feature is called as its encoder made it: ``<name>_full`` where ``name`` was reduced, else ``name``.

    A feature that was made anew after a reduction is its own original again.
    """
    full, info = f"{name}_full", manifest.features.get(name)
    return full if full in manifest.features and (info is None or "reduction" in info.settings) else name


def import_vectors(
    folder: Path, name: str, *, file: Path, vector_items: Path | None = None, zero_is_missing: bool = False
) -> FeatureReport:
    """Add vectors made elsewhere as a feature.

    Args:
        file: ``.npy``, [n, F] of floats; stored as float32.
        vector_items: whose vectors these are: a text file with an item token per row of ``file``, or an atomic file
            that ends in ``.item``; rows of other items are left out. None: the rows of the folder's ``.item``.
        zero_is_missing: an all-zero row stands for an item without content.

    Raises:
        DatasetError: no such file, no plain array, another shape or type, a value that is not finite, an item twice.
    """
    folder, file = Path(folder), Path(file)
    items = read_items(folder)
    owners = Path(vector_items or folder / f"{folder.name}.item")
    tokens = list(items["item_id"]) if vector_items is None else _vector_tokens(owners)
    try:
        rows = np.load(file, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise DatasetError(f"no file {file}") from error
    except Exception as error:  # on a broken header or archive NumPy raises whatever it likes
        if "Python objects" in str(error):
            raise UnsafeFileError(
                f"{file} holds Python objects, a pickle, which can run any code; it was refused, and nothing was run"
            ) from error
        raise DatasetError(
            f"{file} is no plain .npy array or is cut short ({error}); save it with numpy.save"
        ) from error
    if not isinstance(rows, np.ndarray) or rows.ndim != 2 or len(rows) != len(tokens):
        found = rows.shape if isinstance(rows, np.ndarray) else "an archive"
        raise DatasetError(
            f"{file} has shape {found}, expected ({len(tokens)}, width): "
            f"one row per row of {owners.name}, in that order"
            + ("; if it is of other items, name them with --vectors-items" if vector_items is None else "")
        )
    if rows.dtype.kind != "f":
        raise DatasetError(f"{file} has dtype {rows.dtype}, expected float32 (or float16, float64)")
    with np.errstate(over="ignore"):
        rows = np.asarray(rows, dtype=np.float32)
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(bad):
        raise DatasetError(
            f"{file} has NaN, infinity or values beyond float32 in {len(bad)} rows, such as row {bad[0]} "
            f"(item {tokens[bad[0]]!r}); repair them, or set them to 0 and pass --zero-is-missing"
        )
    zero = ~rows.any(axis=1)
    row_of = {token: row for row, token in enumerate(tokens)}
    found = [row_of.get(token) for token in items["item_id"]]
    vectors = [[] if row is None or (zero_is_missing and zero[row]) else [rows[row]] for row in found]
    why = [f"not in {owners.name}" if row is None else "the row is all zero" for row in found]
    remarks = ()
    if others := len(tokens) - sum(row is not None for row in found):
        remarks = (f"{others} rows of {owners.name} are of other items",)
    if zero.any() and not zero_is_missing:
        remarks += (f"{zero.sum()} rows are all zero; if these are items without content, pass --zero-is-missing",)
    settings = {"file": file.name, "sha256": sha256_of(file), "zero_is_missing": zero_is_missing}
    if vector_items is not None:
        settings |= {"items": owners.name, "items_sha256": sha256_of(owners)}
    return _save(
        folder, name, items, vectors, why, encoder="imported", source=file.name, settings=settings, remarks=remarks
    )


def _vector_tokens(path: Path) -> list[str]:
    if path.suffix == ".item":
        tokens = list(read_table(path, needed=["item_id"], optional=[])["item_id"])
    else:
        try:
            tokens = path.read_text(encoding="utf-8-sig").splitlines()
        except OSError as error:
            raise DatasetError(f"cannot read {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise DatasetError(f"{path} is no text file in UTF-8 with an item token a line") from error
    if twice := [token for token, n in Counter(tokens).items() if n > 1]:
        raise DatasetError(f"{path}: {len(twice)} items occur twice, such as {twice[:3]}; keep one row each")
    return tokens


# ---------------------------------------------------------------- items


def read_items(folder: Path) -> DataFrame:
    """The ``.item`` table of a folder, each item once.

    Raises:
        DatasetError: no folder, no table, an item without id or with two rows.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DatasetError(f"no dataset folder {folder}")
    path = folder / f"{folder.name}.item"
    if not path.is_file():
        raise DatasetError(
            f"{folder} has no {path.name}, the table of its items; features are made from it\n"
            "  write one: a header such as item_id:token<TAB>title:token_seq<TAB>image:token, then a line per item"
        )
    items = read_table(path, needed=["item_id"])
    twice = items["item_id"][items["item_id"].duplicated()].unique()
    if len(twice):
        raise DatasetError(f"{path}: {len(twice)} items occur twice, such as {list(twice[:3])}; keep one row each")
    if (items["item_id"] == "").any():
        raise DatasetError(f"{path}: a row has an empty item_id; remove the row")
    return items


def _text_columns(items: DataFrame, folder: Path, columns: Sequence[str] | None) -> list[str]:
    there = [column for column in items.columns if column != "item_id"]
    if columns is None:
        used = [column for column in TEXT_COLUMNS if column in there]
        if "categories" in used and "category" in used:  # made from the former, and would say it twice
            used.remove("category")
        if not used:
            raise DatasetError(
                f"{folder} has none of the text columns {', '.join(TEXT_COLUMNS)}, only {', '.join(there) or 'item_id'}"
                "; choose with --columns"
            )
        return used
    if missing := [column for column in columns if column not in there]:
        raise DatasetError(f"{folder} has no column {', '.join(missing)}; its columns are {', '.join(there)}")
    return list(columns)


def item_texts(items: DataFrame, *, columns: Sequence[str], rows: str, max_rows: int = 10) -> list[list[str]]:
    """The texts of each item, none if it has no text.

    Args:
        columns: in this order; a title, brand or category is one sentence.
        rows: "sentence" for a list of at most ``max_rows`` different sentences, "item" for a list of one text.

    Raises:
        SettingError: another value of ``rows``, or ``max_rows`` below 1.
    """
    if rows not in ROWS:
        raise SettingError(f"rows is {rows!r}, expected one of {list(ROWS)}")
    if max_rows < 1:
        raise SettingError(f"max_rows is {max_rows}, expected at least 1")
    texts = []
    for values in zip(*(items[column] for column in columns), strict=True):
        if rows == "item":
            whole = " ".join(filter(None, (clean_text(_as_text(c, v)) for c, v in zip(columns, values, strict=True))))
            texts.append([whole] if whole else [])
            continue
        found: dict[str, None] = {}  # each sentence once, in order
        for column, value in zip(columns, values, strict=True):
            value = _as_text(column, value)
            found |= dict.fromkeys([clean_text(value)] if column in ONE_SENTENCE else sentences(value))
        texts.append([text for text in found if text][:max_rows])
    return texts


def _as_text(column: str, value: str) -> str:
    return value.replace("_", " ") if column in LISTS else value


def _picture_paths(
    items: DataFrame, folder: Path, *, column: str | None, images: Path | None, per_item: int
) -> tuple[list[str], list[list[Path]], list[str]]:
    """Columns used, the files of each item's pictures, and why an item has none."""
    if per_item < 1:
        raise SettingError(f"per_item is {per_item}, expected at least 1")
    if images is not None and not Path(images).is_dir():
        raise DatasetError(f"no folder of pictures {images}")
    if column is None and images is None and (pictures := read_index(folder)) is not None:
        files, status = picture_files(folder) or {}, {}
        for picture in pictures:
            status.setdefault(picture.item_id, picture.status)
        paths = [files.get(token, [])[:per_item] for token in items["item_id"]]
        return ["pictures"], paths, [_reason(status.get(token)) for token in items["item_id"]]
    column, root = column or "image", Path(images or folder)
    if column in items.columns:
        named = [file_inside(root, value) if value else None for value in items[column]]
        values = zip(items[column], named, strict=True)
        why = [NO_PICTURE if not value else "" if path else OUTSIDE for value, path in values]
        used = [column]
    elif images is None:
        raise DatasetError(
            f"{folder} has no column {column}, only {', '.join(items.columns)}"
            "; choose the column with --column, or a folder of <item_id>.jpg with --images"
        )
    else:
        by_stem = {p.stem: p for p in sorted(root.iterdir(), reverse=True) if p.suffix.lower() in PICTURE_ENDINGS}
        named, used = [by_stem.get(token) for token in items["item_id"]], ["item_id"]
        why = ["" if path else NO_PICTURE for path in named]
    return used, [[path] if path else [] for path in named], why


def _reason(status: str | None) -> str:
    """Why an item has no usable picture, by the status of its first one."""
    if status is None or status == NO_PICTURE:
        return NO_PICTURE
    return "" if status == "ok" else f"picture {status}"


# ---------------------------------------------------------------- vectors


def _write(
    folder: Path,
    name: str,
    contents: Contents,
    encoded: Encoded,
    *,
    counted: bool,
    remarks: list[str],
    **made: Any,
) -> FeatureReport:
    """Put the rows of all items together, and report on items without."""
    per_item = encoded.item_counts()  # [items]
    filled = per_item > 0
    if contents.kind == "text" and not contents.unique:
        raise DatasetError(f"none of the {len(filled)} items has text; choose other text columns with --columns")
    missing, examples = _missing(folder, name, contents.tokens, filled.tolist(), encoded.item_reasons())
    if missing:
        kept = [{"reason": why, "items": n, "such_as": examples[why]} for why, n in missing.items()]
        made["settings"]["missing"] = kept
    shape = (int(per_item.sum()), encoded.width)
    n_bytes = 4 * shape[0] * shape[1]
    blocks = _Watched(encoded.item_rows(at_once=max(1, BLOCK_BYTES // (4 * shape[1]))))
    with full_disk_explained(folder, n_bytes):
        write_feature_blocks(
            folder,
            name,
            tokens=[token for token, has in zip(contents.tokens, filled, strict=True) if has],
            blocks=blocks,
            shape=shape,
            counts=per_item[filled] if counted or encoded.several else None,
            **made,
        )
    remarks += _remarks(contents, encoded, filled)
    if blocks.all_equal and shape[0] > 1:
        remarks.append("all rows are equal: this feature carries no information")
    return FeatureReport(
        feature=name,
        n_items=len(filled),
        n_filled=int(filled.sum()),
        shape=shape,
        missing=missing,
        examples=examples,
        remarks=tuple(remarks),
    )


class _Watched:
    """Blocks of rows on their way, and whether all rows were equal."""

    def __init__(self, blocks: Iterator[np.ndarray]) -> None:
        self._blocks, self._first, self.all_equal = blocks, None, True

    def __iter__(self) -> Iterator[np.ndarray]:
        for block in self._blocks:
            if self._first is None:
                self._first = block[0].copy()
            self.all_equal = self.all_equal and bool((block == self._first).all())
            yield block


def _remarks(contents: Contents, encoded: Encoded, filled: np.ndarray) -> list[str]:
    """On contents without a row, of items that have others; and on what the encoder counted."""
    mine = [numbers for numbers, has in zip(contents.of_items, filled, strict=True) if has]
    n = sum(int(encoded.counts[number] == 0) for numbers in mine for number in numbers)
    remarks = []
    if n and contents.kind == "text":
        remarks.append(f"{n} texts hold no word that the encoder knows and got no row")
    elif n:
        remarks.append(f"{n} pictures of items with others could not be used and got no row")
    return remarks + [f"{n} contents {what.replace('_', ' ')}" for what, n in sorted(encoded.notes.items()) if n]


def _missing(
    folder: Path, name: str, tokens: Sequence[str], filled: Sequence[bool], why: Sequence[str]
) -> tuple[dict[str, int], dict[str, str]]:
    """Number of items without a row and an example, by reason.

    Raises:
        DatasetError: no item has a row.
    """
    missing = Counter(reason for has, reason in zip(filled, why, strict=True) if not has)
    examples: dict[str, str] = {}
    for token, has, reason in zip(tokens, filled, why, strict=True):
        if not has:
            examples.setdefault(reason, token)
    if not any(filled):
        reasons = ", ".join(f"{n} {reason}" for reason, n in missing.most_common())
        raise DatasetError(f"feature {name!r} of {folder.name}: no item of {len(tokens)} has content ({reasons})")
    return dict(missing.most_common()), examples


def _save(
    folder: Path,
    name: str,
    items: DataFrame,
    vectors: list[list[np.ndarray]],
    why: list[str],
    *,
    remarks: tuple[str, ...] = (),
    **made: Any,
) -> FeatureReport:
    """Write the feature for the items that have a vector, and report on the others."""
    tokens = list(items["item_id"])
    filled = [bool(mine) for mine in vectors]
    missing, examples = _missing(folder, name, tokens, filled, why)
    listed = [token for token, has in zip(tokens, filled, strict=True) if has]
    rows = np.stack([vector for mine in vectors for vector in mine])  # [n, F]
    if len(rows) > 1 and (rows == rows[0]).all():
        remarks = (*remarks, "all rows are equal: this feature carries no information")
    try:
        write_feature(folder, name, tokens=listed, rows=rows, **made)
    except ValueError as error:
        raise DatasetError(f"feature {name!r} of {folder.name} cannot be written: {error}") from error
    return FeatureReport(
        feature=name,
        n_items=len(tokens),
        n_filled=len(listed),
        shape=rows.shape,
        missing=missing,
        examples=examples,
        remarks=remarks,
    )
