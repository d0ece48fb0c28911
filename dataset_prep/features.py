"""Features for the items of a folder: out of their texts, out of their pictures, or out of vectors made elsewhere.

An item without content gets no row and is not listed in the feature: missing is a state of its own, not a zero vector.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dataset_prep.encoders import Encoder, build_encoder
from dataset_prep.encoders.image import PictureError, read_picture
from dataset_prep.text import clean_text, sentences
from recbole_mm.data.files import read_table, sha256_of
from recbole_mm.data.layout import write_feature
from recbole_mm.errors import DatasetError, SettingError

if TYPE_CHECKING:
    from pandas import DataFrame

TEXT_COLUMNS = ("title", "brand", "category", "categories", "description")
ONE_SENTENCE = ("title", "brand", "category", "categories")  # never split
LISTS = ("category", "categories")  # of names, separated by spaces, with underscores inside a name
ROWS = ("sentence", "item")
PICTURE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif")
TEXTS_AT_ONCE = 512
PICTURES_AT_ONCE = 64


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
    """

    feature: str
    n_items: int
    n_filled: int
    shape: tuple[int, int]
    missing: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows, width = self.shape
        lines = [f"feature {self.feature!r}: {self.n_filled} of {self.n_items} items, {rows} rows of width {width}"]
        lines += [f"  {n} without: {why} (such as item {self.examples[why]!r})" for why, n in self.missing.items()]
        return "\n".join(lines + [f"  {remark}" for remark in self.remarks])


def make_feature(
    folder: Path,
    name: str,
    *,
    encoder: Encoder | None = None,
    columns: Sequence[str] | None = None,
    rows: str = "sentence",
    max_rows: int = 10,
    column: str = "image",
    images: Path | None = None,
    progress: bool = True,
) -> FeatureReport:
    """Make one feature for the items of ``<folder>/<name of folder>.item`` and add it to the folder.

    Args:
        name: of the feature.
        encoder: None takes ``tfidf`` for a feature "text" and ``histogram`` for "image".
        columns: texts: columns to use, in this order; None takes those of ``TEXT_COLUMNS`` that are there.
        rows: texts: "sentence" for one vector per sentence, "item" for one per item.
        max_rows: texts: sentences of an item that are used, the first ones.
        column: pictures: the column with a path, relative to ``images``.
        images: pictures: None takes ``folder``. Without such a column, ``<images>/<item_id>.jpg`` and the like.
        progress: show a progress bar on stderr.

    Raises:
        DatasetError: no ``.item`` file, a column is missing, an item occurs twice, no item has content.
        SettingError: an unknown value of ``rows``, ``max_rows`` below 1, no default encoder for this name.
    """
    folder = Path(folder)
    encoder = encoder or build_encoder(None, feature=name)
    items = read_items(folder)
    if encoder.source == "text":
        used, settings = _text_columns(items, folder, columns), {"rows": rows, "max_rows": max_rows}
        if rows == "item":
            del settings["max_rows"]
        content = item_texts(items, columns=used, rows=rows, max_rows=max_rows)
        vectors, why = _encode_texts(content, encoder, progress=progress)
        remarks = _left_out(content, vectors)
    else:
        used, paths = _picture_paths(items, folder, column=column, images=images)
        settings = {"images": None if images is None else Path(images).name}
        vectors, why = _encode_pictures(paths, encoder, progress=progress)
        remarks = ()
    settings = {"columns": used, **settings, **encoder.settings}
    return _save(
        folder,
        name,
        items,
        vectors,
        why,
        counted=encoder.source == "text" and rows == "sentence",
        remarks=remarks,
        encoder=encoder.name,
        source=", ".join(used),
        settings=settings,
    )


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
    except (ValueError, OSError, EOFError) as error:
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
    items: DataFrame, folder: Path, *, column: str, images: Path | None
) -> tuple[list[str], list[Path | None]]:
    """Columns used, and the path of each item's picture; None for an item that names none."""
    if images is not None and not Path(images).is_dir():
        raise DatasetError(f"no folder of pictures {images}")
    root = Path(images or folder)
    if column in items.columns:
        return [column], [root / value if value else None for value in items[column]]
    if images is None:
        raise DatasetError(
            f"{folder} has no column {column}, only {', '.join(items.columns)}"
            "; choose the column with --column, or a folder of <item_id>.jpg with --images"
        )
    by_stem = {p.stem: p for p in sorted(root.iterdir(), reverse=True) if p.suffix.lower() in PICTURE_ENDINGS}
    return ["item_id"], [by_stem.get(token) for token in items["item_id"]]


# ---------------------------------------------------------------- vectors


def _encode_texts(
    content: list[list[str]], encoder: Encoder, *, progress: bool
) -> tuple[list[list[np.ndarray]], list[str]]:
    """Vectors of each item, and why it would have none."""
    filled = [texts for texts in content if texts]
    if not filled:
        raise DatasetError(f"none of the {len(content)} items has text; choose other text columns with --columns")
    encoder.fit([" ".join(texts) for texts in filled])
    flat = [text for texts in filled for text in texts]
    rows: list[np.ndarray] = []
    for batch in _batches(flat, TEXTS_AT_ONCE, progress=progress, unit="text"):
        rows += encoder.encode(batch)
    row, vectors, why = iter(rows), [], []
    for texts in content:
        mine = [next(row) for _ in texts]
        vectors.append([vector for vector in mine if vector.any()])
        why.append("no known word in its text" if texts else "no text")
    return vectors, why


def _left_out(content: list[list[str]], vectors: list[list[np.ndarray]]) -> tuple[str, ...]:
    """A remark on texts without a vector, of items that have others."""
    n = sum(len(texts) - len(mine) for texts, mine in zip(content, vectors, strict=True) if mine)
    return (f"{n} texts hold no word that the encoder knows and got no row",) if n else ()


def _encode_pictures(
    paths: list[Path | None], encoder: Encoder, *, progress: bool
) -> tuple[list[list[np.ndarray]], list[str]]:
    """Vector of each item's picture, and why it would have none."""
    vectors: list[list[np.ndarray]] = [[] for _ in paths]
    why = ["no picture named"] * len(paths)
    for batch in _batches(range(len(paths)), PICTURES_AT_ONCE, progress=progress, unit="picture"):
        pictures = {}
        for index in batch:
            if paths[index] is None:
                continue
            try:
                pictures[index] = read_picture(paths[index])
            except (FileNotFoundError, PictureError) as error:
                why[index] = f"picture {error}" if isinstance(error, PictureError) else "picture file missing"
        for index, vector in zip(pictures, encoder.encode(list(pictures.values())), strict=True):
            vectors[index] = [vector]
    return vectors, why


def _batches(members: Sequence, size: int, *, progress: bool, unit: str) -> Iterator[Sequence]:
    from tqdm import tqdm

    with tqdm(total=len(members), unit=unit, disable=not progress, leave=False) as bar:
        for start in range(0, len(members), size):
            batch = members[start : start + size]
            yield batch
            bar.update(len(batch))


def _save(
    folder: Path,
    name: str,
    items: DataFrame,
    vectors: list[list[np.ndarray]],
    why: list[str],
    *,
    counted: bool = False,
    remarks: tuple[str, ...] = (),
    **made: object,
) -> FeatureReport:
    """Write the feature for the items that have vectors, and report on the others."""
    tokens = list(items["item_id"])
    missing = Counter(reason for mine, reason in zip(vectors, why, strict=True) if not mine)
    examples: dict[str, str] = {}
    for token, mine, reason in zip(tokens, vectors, why, strict=True):
        if not mine:
            examples.setdefault(reason, token)
    listed = [token for token, mine in zip(tokens, vectors, strict=True) if mine]
    if not listed:
        reasons = ", ".join(f"{n} {reason}" for reason, n in missing.most_common())
        raise DatasetError(f"feature {name!r} of {folder.name}: no item of {len(tokens)} has content ({reasons})")
    rows = np.stack([vector for mine in vectors for vector in mine])  # [S, F]
    if len(rows) > 1 and (rows == rows[0]).all():
        remarks = (*remarks, "all rows are equal: this feature carries no information")
    counts = np.array([len(mine) for mine in vectors if mine])
    try:
        write_feature(folder, name, tokens=listed, rows=rows, counts=counts if counted else None, **made)
    except ValueError as error:
        raise DatasetError(f"feature {name!r} of {folder.name} cannot be written: {error}") from error
    return FeatureReport(
        feature=name,
        n_items=len(tokens),
        n_filled=len(listed),
        shape=rows.shape,
        missing=dict(missing.most_common()),
        examples=examples,
        remarks=remarks,
    )
