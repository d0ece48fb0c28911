"""The prepared dataset folder: its files, its manifest, how to read, write and check it.

<name>/
  <name>.inter                       user_id:token  item_id:token  timestamp:float    (RecBole's eval_args split it), or
  <name>.{train,valid,test}.inter    session_id:token  item_id_list:token_seq  item_id:token     (already split)
  <name>.item                        item_id:token  and whatever columns there are       (optional)
  features/<feature>.npy             [n, F], one vector per item; or [S, F], the vectors of all items in a row, and
  features/<feature>.counts.npy      [n], how many of the S rows belong to each item
  features/<feature>.items.txt       the item token of each of the n entries, one a line
  manifest.json                      what is there: hashes, shapes, encoders, settings

A folder of RecBole's without manifest is one too; it just has no features yet. Every file is written under a temporary
name and renamed when complete, the manifest last, and readers believe only what the manifest names.
Arrays are plain ``.npy``: nothing here reads or writes a pickle.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from recbole_mm.data.files import FileInfo, file_info, numbers, read_table, sha256_of, write_atomically
from recbole_mm.errors import DatasetError

FORMAT_VERSION = 1
SPLITS = ("train", "valid", "test")
HASHED_UP_TO = 1 << 28  # bytes; about a second
PADDING_TOKEN = "[PAD]"  # RecBole's own; an item of that name would be taken for padding
RELEASED_COMMAND = "python -m dataset_prep released"  # "made_by" of folders made of what MMSBR's authors released


# ---------------------------------------------------------------- manifest


@dataclass(frozen=True)
class FeatureInfo:
    """One feature of the items.

    Attributes:
        file: the array, relative to the folder.
        items: the file with the item token of each entry.
        counts: the file that says how many rows each entry has; None if each has one.
        shape, dtype: of the array, as NumPy prints them.
        encoder: what made it, such as "tfidf".
        source: what it was made from, such as "title, description".
        settings: the encoder's settings, enough to make it again.
    """

    file: str
    items: str
    counts: str | None
    shape: tuple[int, ...]
    dtype: str
    encoder: str
    source: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def maker(self) -> str:
        """What made it: the encoder, and its model and weights if it has some. It tells what the dimensions mean."""
        weights = [digest[:12] for _, digest in sorted(self.settings.get("weights_sha256", {}).items())]
        return " ".join([self.encoder, *filter(None, [self.settings.get("model")]), *weights])


@dataclass(frozen=True)
class Manifest:
    """What is in a prepared folder.

    Attributes:
        files: size and hash of every file, by its path relative to the folder.
        features: by name.
        settings: how the interactions were prepared.
        raw_files: sha256 of the sources, by file name.
    """

    name: str
    files: dict[str, FileInfo] = field(default_factory=dict)
    features: dict[str, FeatureInfo] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    raw_files: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read ``folder/manifest.json``; a folder without one has an empty manifest.

        Raises:
            DatasetError: no such folder, unreadable JSON, an unknown format version, a missing entry.
        """
        folder = Path(folder)
        path = folder / "manifest.json"
        if not folder.is_dir():
            made = (
                f"\n  make it with: python -m dataset_prep demo --out {folder.parent}" if folder.name == "demo" else ""
            )
            raise DatasetError(f"no dataset folder {folder}{made}")
        if not path.exists():
            return cls(name=folder.name)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version = content["format_version"]
            if version != FORMAT_VERSION:
                raise DatasetError(
                    f"{path}: format_version is {version}, this release reads {FORMAT_VERSION}\n"
                    "  prepare the dataset again, or install the release that wrote it"
                )
            content["files"] = {k: FileInfo(**v) for k, v in content["files"].items()}
            content["features"] = {
                k: FeatureInfo(**{**v, "shape": tuple(v["shape"])}) for k, v in content["features"].items()
            }
            return cls(**content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DatasetError(
                f"{path} is no manifest of a prepared folder ({type(error).__name__}: {error})\n"
                "  delete it and make the features again with: python -m dataset_prep features --dataset " + str(folder)
            ) from error

    def save(self, folder: Path) -> None:
        """Write ``folder/manifest.json``, complete or not at all."""
        text = json.dumps(asdict(self), indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        write_atomically(Path(folder) / "manifest.json", lambda out: out.write(text.encode()))


def folder_kind(folder: Path) -> str:
    """``"splits"`` if the folder holds train, valid and test files, ``"interactions"`` if it holds one file.

    Raises:
        DatasetError: neither is there.
    """
    folder = Path(folder)
    name = folder.name
    if (folder / f"{name}.inter").is_file():
        return "interactions"
    if all((folder / f"{name}.{split}.inter").is_file() for split in SPLITS):
        return "splits"
    found = sorted(p.name for p in folder.glob("*.inter"))
    raise DatasetError(
        f"{folder} has neither {name}.inter nor {name}.train.inter, {name}.valid.inter and {name}.test.inter; "
        f"found {found or 'no .inter file'}\n  the files must carry the folder's name"
    )


def interaction_files(folder: Path) -> list[Path]:
    """The ``.inter`` file or files of a folder, train first."""
    folder = Path(folder)
    if folder_kind(folder) == "interactions":
        return [folder / f"{folder.name}.inter"]
    return [folder / f"{folder.name}.{split}.inter" for split in SPLITS]


def data_fingerprint(folder: Path) -> str:
    """12 hex digits that identify the interactions, computed from the files themselves."""
    digest = hashlib.sha256()
    for path in interaction_files(folder):
        digest.update(sha256_of(path).encode())
    return digest.hexdigest()[:12]


# ---------------------------------------------------------------- features


class Feature(NamedTuple):
    """One feature as it lies on disk.

    Attributes:
        tokens: item token of each entry, n of them.
        rows: [n, F], or [S, F] if an entry has several; memory-mapped, so opening it costs nothing.
        counts: [n] int64, how many rows each entry has; all 1 for one vector per item.
    """

    tokens: list[str]
    rows: np.ndarray
    counts: np.ndarray


def read_feature(folder: Path, name: str, *, manifest: Manifest | None = None) -> Feature:
    """Open one feature and make sure that it can be trusted.

    Reads every row once, to find values that are not finite, O(S F) time and O(1) memory beyond the mapped file. Files
    of up to ``HASHED_UP_TO`` bytes are compared with their sha256; for larger ones, `check_folder` does that.

    Raises:
        DatasetError: no such feature, or a list of everything that is wrong with it.
    """
    folder = Path(folder)
    manifest = manifest or Manifest.load(folder)
    if name not in manifest.features:
        raise DatasetError(
            f"{folder.name} has no feature {name!r}, only {sorted(manifest.features)}\n"
            f"  make it with: python -m dataset_prep features --dataset {folder} --feature {name}"
        )
    problems: list[str] = []
    feature = _open_feature(folder, name, manifest, problems)
    if not problems:
        info = manifest.features[name]
        small = [
            file for file in (info.file, info.items, info.counts) if file and _size(manifest, file) <= HASHED_UP_TO
        ]
        problems += _changed_files(folder, small, manifest)
    if problems or feature is None:
        listed = "".join(f"\n  - {problem}" for problem in problems)
        raise DatasetError(f"feature {name!r} of {folder.name} cannot be used:{listed}\n  {_make_again(folder, name)}")
    return feature


def _size(manifest: Manifest, file: str) -> int:
    return manifest.files[file].bytes if file in manifest.files else 0


def _changed_files(folder: Path, files: Iterable[str], manifest: Manifest) -> list[str]:
    """What the hashes tell that sizes do not."""
    return [
        f"{file} has sha256 {found[:12]}…, the manifest says {manifest.files[file].sha256[:12]}…: it was changed"
        for file in files
        if file in manifest.files and (found := sha256_of(folder / file)) != manifest.files[file].sha256
    ]


def _make_again(folder: Path, name: str) -> str:
    return f"make it again with: python -m dataset_prep features --dataset {folder} --feature {name}"


def _open_feature(folder: Path, name: str, manifest: Manifest, problems: list[str]) -> Feature | None:
    info = manifest.features[name]
    n_before = len(problems)
    for file in filter(None, (info.file, info.items, info.counts)):
        path, known = folder / file, manifest.files.get(file)
        if not path.is_file():
            problems.append(f"{file} is missing")
        elif known is not None and path.stat().st_size != known.bytes:
            problems.append(
                f"{file} has {path.stat().st_size} bytes, the manifest says {known.bytes}: cut short or replaced"
            )
    if len(problems) > n_before:
        return None

    rows = _open_array(folder / info.file, problems)
    tokens = (folder / info.items).read_bytes().decode(errors="replace").split("\n")[:-1]
    if len(set(tokens)) < len(tokens):
        seen: set[str] = set()
        twice = [t for t in tokens if t in seen or seen.add(t)]
        problems.append(f"{info.items} has {len(twice)} duplicate tokens, such as {twice[:3]}; each item once")
    if rows is None:
        return None
    if rows.dtype not in (np.float32, np.float16, np.float64):
        problems.append(f"{info.file} has dtype {rows.dtype}, expected float32 (or float16, float64)")
        return None
    if rows.ndim != 2 or tuple(rows.shape) != info.shape:
        problems.append(f"{info.file} has shape {tuple(rows.shape)}, the manifest says {info.shape}")
        return None

    counts = np.ones(len(tokens), dtype=np.int64)
    if info.counts is not None:
        counts = _open_array(folder / info.counts, problems)
        if counts is None:
            return None
        if counts.dtype.kind not in "iu" or counts.ndim != 1 or (counts < 0).any():
            problems.append(
                f"{info.counts} must hold one whole number >= 0 per item, found {counts.dtype} {counts.shape}"
            )
            return None
        counts = counts.astype(np.int64)
    if len(counts) != len(tokens):
        problems.append(f"{info.counts} has {len(counts)} entries, {info.items} has {len(tokens)} items")
    elif counts.sum() != len(rows):
        problems.append(f"{info.file} has {len(rows)} rows, {info.counts or info.items} asks for {counts.sum()}")
    else:
        _check_finite(info, tokens, rows, counts, problems)
    return Feature(tokens, rows, counts)


def _open_array(path: Path, problems: list[str]) -> np.ndarray | None:
    try:
        # Copy-on-write, because torch refuses read-only memory; nothing is ever written.
        return np.load(path, mmap_mode="c", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        problems.append(f"{path.name} is no plain .npy array or is cut short ({error})")
        return None


def _check_finite(
    info: FeatureInfo, tokens: list[str], rows: np.ndarray, counts: np.ndarray, problems: list[str]
) -> None:
    block = max(1, (1 << 24) // max(1, rows.shape[1] * rows.itemsize))
    bad: list[int] = []
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, len(rows), block):
            part = rows[start : start + block]
            if not np.isfinite(part.sum(dtype=np.float64)):  # one pass without a temporary; exact look only when needed
                bad += (start + np.flatnonzero(~np.isfinite(part).all(axis=1))).tolist()
    if bad:
        entry_of = np.repeat(np.arange(len(tokens)), counts)
        examples = [(row, tokens[entry_of[row]]) for row in bad[:3]]
        listed = ", ".join(f"row {row} (item {token!r})" for row, token in examples)
        problems.append(f"{info.file}: NaN or infinity in {len(bad)} rows: {listed}")


def check_feature_name(name: str) -> None:
    """Refuse a name that cannot be part of a file's name everywhere.

    Raises:
        ValueError: it has other characters than letters, digits, "_" and "-".
    """
    if not name.replace("_", "").replace("-", "").isalnum():
        raise ValueError(f"feature name {name!r}: letters, digits, '_' and '-' only")


def write_feature(
    folder: Path,
    name: str,
    *,
    tokens: Sequence[str],
    rows: np.ndarray,
    counts: np.ndarray | None = None,
    encoder: str,
    source: str,
    settings: dict[str, Any] | None = None,
) -> None:
    """Add a feature to a folder, or replace it; the manifest names it only when all its files are complete.

    Args:
        tokens: item tokens, n of them, each once.
        rows: [n, F], or with ``counts`` [S, F]; stored as float32 unless float16.
        counts: [n], rows of each item, summing to S.

    Raises:
        ValueError: the arguments do not fit each other.
    """
    rows = np.ascontiguousarray(rows, dtype=np.float16 if rows.dtype == np.float16 else np.float32)
    n_expected = len(tokens) if counts is None else int(np.sum(counts))
    if rows.ndim != 2 or len(rows) != n_expected or (counts is not None and len(counts) != len(tokens)):
        raise ValueError(f"{len(tokens)} items and {n_expected} rows expected, found an array of shape {rows.shape}")
    if not np.isfinite(rows).all():
        raise ValueError(f"feature {name!r} has values that are not finite")
    write_feature_blocks(
        folder,
        name,
        tokens=tokens,
        blocks=[rows],
        shape=rows.shape,
        dtype=str(rows.dtype),
        counts=counts,
        encoder=encoder,
        source=source,
        settings=settings,
    )


def write_feature_blocks(
    folder: Path,
    name: str,
    *,
    tokens: Sequence[str],
    blocks: Iterable[np.ndarray],
    shape: tuple[int, int],
    dtype: str = "float32",
    counts: np.ndarray | None = None,
    encoder: str,
    source: str,
    settings: dict[str, Any] | None = None,
) -> None:
    """`write_feature` for rows that come piece by piece: O(a block) of memory, and the same bytes.

    Args:
        blocks: [b, F] each, finite; in a row, they are the array.
        shape: [S, F] of the array.

    Raises:
        ValueError: the arguments do not fit each other; an earlier feature of this name is forgotten then.
    """
    folder = Path(folder)
    check_feature_name(name)
    if len(set(tokens)) < len(tokens):
        raise ValueError("an item token occurs twice")
    if any("\n" in token for token in tokens):
        raise ValueError("an item token holds a line break")

    files = {f"features/{name}.items.txt": lambda out: out.write("".join(f"{t}\n" for t in tokens).encode())}
    if counts is not None:
        packed = np.ascontiguousarray(counts, dtype=np.int64)
        files[f"features/{name}.counts.npy"] = lambda out: np.save(out, packed, allow_pickle=False)
    files[f"features/{name}.npy"] = lambda out: _write_blocks(out, blocks, shape, dtype)

    manifest = Manifest.load(folder)
    if name in manifest.features:  # first forget the old one: a crash below must not leave new files under an old entry
        _without_feature(manifest, name).save(folder)
        manifest = _without_feature(manifest, name)
    for file, write in files.items():
        write_atomically(folder / file, write)
    infos = {file: file_info(folder / file) for file in files}
    feature = FeatureInfo(
        file=f"features/{name}.npy",
        items=f"features/{name}.items.txt",
        counts=None if counts is None else f"features/{name}.counts.npy",
        shape=tuple(shape),
        dtype=dtype,
        encoder=encoder,
        source=source,
        settings=settings or {},
    )
    replace(manifest, files={**manifest.files, **infos}, features={**manifest.features, name: feature}).save(folder)


def _write_blocks(out: BinaryIO, blocks: Iterable[np.ndarray], shape: tuple[int, int], dtype: str) -> None:
    """What ``numpy.save`` writes of the array that the blocks make up."""
    header = {
        "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
        "fortran_order": False,
        "shape": tuple(map(int, shape)),
    }
    np.lib.format.write_array_header_1_0(out, header)
    n = 0
    for block in blocks:
        if block.ndim != 2 or block.shape[1] != shape[1]:
            raise ValueError(f"a block of shape {block.shape} in an array of shape {tuple(shape)}")
        out.write(np.ascontiguousarray(block, dtype=dtype).data)
        n += len(block)
    if n != shape[0]:
        raise ValueError(f"the blocks have {n} rows, expected {shape[0]}")


def _without_feature(manifest: Manifest, name: str) -> Manifest:
    gone = manifest.features[name]
    return replace(
        manifest,
        files={k: v for k, v in manifest.files.items() if k not in (gone.file, gone.items, gone.counts)},
        features={k: v for k, v in manifest.features.items() if k != name},
    )


# ---------------------------------------------------------------- check


def check_folder(folder: Path, *, hashes: bool = True) -> list[str]:
    """Look at everything in a prepared folder.

    Args:
        hashes: also compare every file with its sha256; reads the whole folder.

    Returns:
        Remarks that are no errors, such as items without a feature row.

    Raises:
        DatasetError: listing every problem, each with its remedy.
    """
    folder = Path(folder)
    problems: list[str] = []
    remarks: list[str] = []
    manifest = Manifest.load(folder)

    tokens: set[str] = set()
    try:
        tokens = _check_interactions(folder, problems)
    except DatasetError as error:
        problems.append(str(error))
    item_file = folder / f"{folder.name}.item"
    if item_file.is_file():
        try:
            listed = read_table(item_file, needed=["item_id"])["item_id"]
            twice = listed[listed.duplicated()].unique()
            if len(twice):
                problems.append(
                    f"{item_file.name}: {len(twice)} items occur twice, such as {list(twice[:3])}; keep one row each"
                )
            if absent := len(tokens - set(listed)):
                remarks.append(f"{absent} of {len(tokens)} items with interactions have no row in {item_file.name}")
        except DatasetError as error:
            problems.append(str(error))

    for file, known in manifest.files.items():
        path = folder / file
        if file.startswith("features/") and (not path.is_file() or path.stat().st_size != known.bytes):
            continue  # said below, with the feature's name
        if not path.is_file():
            problems.append(f"{file} is missing; prepare the dataset again")
        elif path.stat().st_size != known.bytes:
            problems.append(
                f"{file} has {path.stat().st_size} bytes, the manifest says {known.bytes}; prepare the dataset again"
            )
        elif hashes:
            problems += _changed_files(folder, [file], manifest)
    for name in manifest.features:
        found_here: list[str] = []
        feature = _open_feature(folder, name, manifest, found_here)
        problems += [f"feature {name!r}: {problem}; {_make_again(folder, name)}" for problem in found_here]
        if feature is not None and len(feature.counts) == len(feature.tokens):
            filled = {t for t, count in zip(feature.tokens, feature.counts, strict=True) if count > 0}
            if missing := sorted(tokens - filled):
                remarks.append(
                    f"feature {name!r} covers {len(tokens) - len(missing)} of {len(tokens)} items, not {missing[:3]}…"
                    "; run with --missing_features=zero or mean, or complete it"
                )
    if problems:
        raise DatasetError("\n".join([f"{folder}: {len(problems)} problem(s)", *(f"  - {p}" for p in problems)]))
    return remarks


def _check_interactions(folder: Path, problems: list[str]) -> set[str]:
    """Problems of the ``.inter`` files go into ``problems``; returns all item tokens."""
    tokens: set[str] = set()
    split = folder_kind(folder) == "splits"
    for path in interaction_files(folder):
        try:
            frame = read_table(path, needed=["item_id", "item_id_list"] if split else ["item_id", "timestamp"])
            if not {"user_id", "session_id"} & set(frame):
                problems.append(f"{path.name} has no column user_id or session_id, only {', '.join(frame)}; rename one")
            found: Iterable[str] = frame["item_id"]
            if split:
                lists = frame["item_id_list"].str.split(" ")
                found = [*found, *(token for tokens in lists for token in tokens)]
            else:
                for column, kind in frame.attrs["types"].items():
                    if kind == "float":
                        numbers(frame, column, path, may_be_empty=column != "timestamp")
            here = set(found)
            if "" in here:
                problems.append(f"{path.name}: a row has an empty item_id; remove the row")
            if PADDING_TOKEN in here:
                problems.append(f"{path.name}: an item is called {PADDING_TOKEN}, RecBole's padding; rename it")
            tokens |= here - {"", PADDING_TOKEN}
        except DatasetError as error:
            problems.append(str(error))
    return tokens
