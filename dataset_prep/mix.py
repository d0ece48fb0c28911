"""Several prepared folders as one, to pre-train on all of them.

A.inter, A.item, features of A ─┐                    users and items of A are called A-<token>, of B B-<token>
                                ├──> mix.inter, mix.item, features with the rows of A, then those of B
B.inter, B.item, features of B ─┘

Names alone change: no dataset shares a user or an item with another one, and a feature's dimensions mean the same
everywhere, which is checked by what made them. What not all datasets have alike is left out, and named. A model that
was pre-trained on the mixture continues on one of its datasets, or on another one with the same features.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from dataset_prep.folder_writer import write_folder
from dataset_prep.formats.prepared import OWNERS, Prepared, read_prepared
from dataset_prep.session_folder import SEPARATOR, Rows, check_parts, write_parts
from recbole_mm.data.files import read_header, sha256_of, write_table
from recbole_mm.data.layout import (
    SPLITS,
    Feature,
    data_fingerprint,
    interaction_files,
    read_feature,
    write_feature_blocks,
)
from recbole_mm.errors import DatasetError, SettingError

MADE_BY = "python -m dataset_prep mix"
BLOCK_BYTES = 1 << 24  # of rows that are copied at a time
FITTED = {  # encoders whose dimensions depend on the catalogue that they were fitted to
    "tfidf": "make it with an encoder that is the same for all, such as --encoder sentence",
    "pca": "mix the originals and reduce the mixture: python -m dataset_prep reduce",
}


@dataclass(frozen=True)
class MixReport:
    """What was made.

    Attributes:
        counts: users, items and rows of each dataset, by name.
        features: of each that was stacked, its shape.
        remarks: what was left out.
    """

    folder: Path
    counts: dict[str, dict[str, int]]
    features: dict[str, tuple[int, int]]
    remarks: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.folder}: {len(self.counts)} datasets"]
        lines += [f"  {name}: " + ", ".join(f"{n} {what}" for what, n in c.items()) for name, c in self.counts.items()]
        lines += [f"  feature {name!r}: {n} rows of width {width}" for name, (n, width) in self.features.items()]
        return "\n".join(lines + [f"  {remark}" for remark in self.remarks])


def mix(
    datasets: Sequence[Path], folder: Path, *, features: Sequence[str] | None = None, overwrite: bool = False
) -> MixReport:
    """Make one prepared folder of several, complete or not at all; same folders, same bytes.

    Rows of features are copied in blocks; interactions and tables of items are held in memory.

    Args:
        datasets: prepared folders, all with one ``.inter`` or all split already; their names become prefixes.
        folder: to make.
        features: to stack; None for those that all datasets have.
        overwrite: replace a folder that was prepared here before.

    Raises:
        SettingError: fewer than two datasets, names that cannot be told apart as prefixes, a place that one of them
            has, a feature that is missing somewhere, of different widths or made by different encoders; no feature at
            all.
        DatasetError: a folder or file that cannot be read, folders of both kinds, or the place is taken.
    """
    paths = [Path(os.path.abspath(path)) for path in datasets]
    _check_names([path.name for path in paths])
    if os.path.realpath(folder) in map(os.path.realpath, paths):
        raise SettingError(f"{folder} is one of the datasets, which the mixture would replace; choose another --name")
    sources = [read_prepared(path) for path in paths]
    plain = [source.name for source in sources if source.parts is None]
    if 0 < len(plain) < len(sources):
        raise DatasetError(
            f"these datasets have one file of interactions: {', '.join(plain)}; the others have a file each for "
            "training, validation and test\n  mix folders of one kind; prepare them alike"
        )
    names, remarks = _features(sources, features)
    rated, left_out = _rated(sources)
    remarks += left_out
    opened = {name: [read_feature(s.folder, name, manifest=s.manifest) for s in sources] for name in names}

    def fill(partial: Path) -> None:
        file = partial / f"{partial.name}.inter"
        if plain:
            write_table(file, _interactions(sources, rated=rated))
        else:
            write_parts(partial, _parts(sources))
        if table := _items(sources, remarks):
            write_table(partial / f"{partial.name}.item", table)

    def finish(partial: Path) -> None:
        for name in names:
            _stack(partial, name, sources, opened[name])

    settings: dict[str, Any] = {
        "made_by": MADE_BY,
        "datasets": {source.name: data_fingerprint(source.folder) for source in sources},
    }
    settings |= _protocol(sources) | _prices(sources)
    if "prices" in settings:
        remarks.append(
            "price levels are those that each dataset had by itself; anew, for all together: "
            f"python -m dataset_prep prices --dataset {folder}"
        )
    files = [(s, file) for s in sources for file in [*interaction_files(s.folder), s.folder / f"{s.name}.item"]]
    raw_files = {f"{source.name}/{file.name}": sha256_of(file) for source, file in files if file.is_file()}
    write_folder(folder, fill, settings=settings, raw_files=raw_files, overwrite=overwrite, finish=finish)
    return MixReport(
        folder=Path(folder),
        counts={source.name: _counts(source) for source in sources},
        features={name: _shape(opened[name]) for name in names},
        remarks=tuple(remarks),
    )


def _check_names(names: Sequence[str]) -> None:
    if len(names) < 2:
        raise SettingError(f"--datasets names {len(names)} folder, expected two at least")
    if twice := [name for name, n in Counter(names).items() if n > 1]:
        raise SettingError(f"two datasets are called {twice[0]}; names become prefixes, rename one of the folders")
    if spaced := [name for name in names if SEPARATOR.search(name)]:
        raise SettingError(
            f"the dataset {spaced[0]!r} has a space in its name, which parts the items of a list; rename it"
        )
    for name in names:
        if longer := [other for other in names if other.startswith(f"{name}-")]:
            raise SettingError(
                f"datasets {name} and {longer[0]}: {longer[0]}-1 could be an item of either; rename one of the folders"
            )


# ---------------------------------------------------------------- interactions and items


def _called(name: str, tokens: Sequence[str]) -> list[str]:
    return [f"{name}-{token}" for token in tokens]


def _protocol(sources: Sequence[Prepared]) -> dict[str, Any]:
    """How rows were parted, as manifests tell it, if it is the same in all datasets; each has moments of its own."""
    told = []
    for settings in (source.manifest.settings for source in sources):
        made_by = "sessions" if settings.get("made_by") == "sessions" else None
        parted = {"protocol": settings.get("protocol", made_by), "split": settings.get("split")}
        told.append({key: value for key, value in parted.items() if value is not None})
    return told[0] if all(each == told[0] for each in told) else {}


def _prices(sources: Sequence[Prepared]) -> dict[str, Any]:
    """Columns of price levels that were made here, so that `dataset_prep.session_folder` may make them again."""
    made, foreign = set(), set()
    for source in (source for source in sources if source.table is not None):
        own = set(source.manifest.settings.get("prices", {}).get("columns", []))
        made, foreign = made | own, foreign | set(source.table) - own
    return {"prices": {"columns": sorted(made - foreign)}} if made - foreign else {}


def _rated(sources: Sequence[Prepared]) -> tuple[bool, list[str]]:
    """Whether all interactions have ratings, which then are kept, and remarks on columns that are not."""
    headers = [read_header(interaction_files(source.folder)[0]) for source in sources]
    rated = all(header.get("rating") == "float" for header in headers) and all(
        source.parts is None for source in sources
    )
    kept = {"item_id", "timestamp", "item_id_list", *(["rating"] if rated else [])}
    lost: dict[str, list[str]] = {}
    for source, header in zip(sources, headers, strict=True):
        owner = next(name for name in OWNERS if name in header)
        for column in header.keys() - kept - {owner}:
            lost.setdefault(column, []).append(source.name)
    left = [f"column {column} of the interactions of {', '.join(lost[column])} was left out" for column in sorted(lost)]
    return rated, left


def _interactions(sources: Sequence[Prepared], *, rated: bool) -> dict[str, list[str]]:
    columns: dict[str, list[str]] = {"user_id:token": [], "item_id:token": [], "timestamp:float": []}
    if rated:
        columns["rating:float"] = [rating for source in sources for rating in source.more["rating"]]
    for source in sources:
        columns["user_id:token"] += _called(source.name, source.owners)
        columns["item_id:token"] += _called(source.name, source.items)
        columns["timestamp:float"] += source.more["time_text"]
    return columns


def _parts(sources: Sequence[Prepared]) -> dict[str, Rows]:
    mixed = {}
    for part in SPLITS:
        rows = Rows([], [], [])
        for source in sources:
            theirs = source.parts[part]
            rows.session_ids.extend(_called(source.name, theirs.session_ids))
            rows.prefixes.extend(_called(source.name, prefix) for prefix in theirs.prefixes)
            rows.targets.extend(_called(source.name, theirs.targets))
        mixed[part] = rows
    check_parts(mixed)
    return mixed


def _items(sources: Sequence[Prepared], remarks: list[str]) -> dict[str, list[str]]:
    """Columns of all tables of items, empty where a dataset has none; empty without tables."""
    types: dict[str, set[str]] = {}
    tables = [source for source in sources if source.table is not None]
    for source in tables:
        for column, kind in source.table.attrs["types"].items():
            types.setdefault(column, set()).add(kind)
    for column, kinds in types.items():
        if len(kinds) > 1:
            remarks.append(f"item column {column} has different types, {', '.join(sorted(kinds))}, and was left out")
    kept = {column: next(iter(kinds)) for column, kinds in types.items() if len(kinds) == 1}
    columns: dict[str, list[str]] = {f"{column}:{kind}": [] for column, kind in kept.items()}
    for source in tables:
        for column, kind in kept.items():
            there = source.table[column].tolist() if column in source.table else [""] * len(source.table)
            columns[f"{column}:{kind}"] += _called(source.name, there) if column == "item_id" else there
    return columns


def _counts(source: Prepared) -> dict[str, int]:
    if source.parts is None:
        return {"users": len(set(source.owners)), "items": len(set(source.items)), "interactions": len(source.items)}
    items = set().union(*(rows.different() for rows in source.parts.values()))
    owners = {owner for rows in source.parts.values() for owner in rows.session_ids}
    n_rows = {f"{part} rows": len(rows.targets) for part, rows in source.parts.items()}
    return {"users or sessions": len(owners), "items": len(items), **n_rows}


# ---------------------------------------------------------------- features


def _features(sources: Sequence[Prepared], wanted: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Names of the features to stack, and remarks on those that are left out."""
    there = [set(source.manifest.features) for source in sources]
    names, remarks = list(dict.fromkeys(wanted or sorted(set.intersection(*there)))), []
    if not names:
        listed = ", ".join(f"{s.name} has {sorted(t) or 'none'}" for s, t in zip(sources, there, strict=True))
        raise SettingError(f"the datasets have no feature in common: {listed}; give them one of the same name")
    for name in names:
        lacking = [source.name for source, has in zip(sources, there, strict=True) if name not in has]
        if lacking:
            raise SettingError(
                f"no feature {name!r} in {', '.join(lacking)}\n  make it with: "
                f"python -m dataset_prep features --dataset {lacking[0]} --feature {name}"
            )
    if wanted is None and (partly := sorted(set.union(*there) - set(names))):
        remarks.append(f"features {', '.join(partly)} are not in all datasets and were left out")
    differences = {name: _differences(name, sources) for name in names}
    if problems := [problem for found in differences.values() for problem in found]:
        listed = "".join(f"\n  - {problem}" for problem in problems)
        fitting = ",".join(name for name, found in differences.items() if not found)
        raise SettingError(
            "these features do not mean the same in all datasets and cannot be stacked:"
            f"{listed}\n  make them with one encoder"
            + (f", or leave them out with --features {fitting}" if fitting and wanted is None else "")
        )
    for name in names:
        info = sources[0].manifest.features[name]
        if "weights_sha256" not in info.settings:
            remarks.append(
                f"feature {name!r} is made by {info.encoder!r}; nothing here tells whether one model made it for all"
            )
    return names, remarks


def _differences(name: str, sources: Sequence[Prepared]) -> list[str]:
    """Why a feature of several datasets cannot be one."""
    infos = {source.name: source.manifest.features[name] for source in sources}
    fitted = sorted({info.encoder for info in infos.values() if info.encoder in FITTED})
    problems = [f"{name!r} is made by {encoder}, fitted to each catalogue: {FITTED[encoder]}" for encoder in fitted]
    for what, value_of in (("encoder", attrgetter("maker")), ("width", lambda info: info.shape[1])):
        values = {dataset: value_of(info) for dataset, info in infos.items()}
        if len(set(values.values())) > 1:
            problems.append(f"{name!r} has the {what} {', '.join(f'{v} in {d}' for d, v in values.items())}")
    return problems


def _shape(parts: Sequence[Feature]) -> tuple[int, int]:
    return sum(len(part.rows) for part in parts), parts[0].rows.shape[1]


def _stack(folder: Path, name: str, sources: Sequence[Prepared], parts: Sequence[Feature]) -> None:
    infos = [source.manifest.features[name] for source in sources]
    several = any(info.counts for info in infos)
    same = {key: value for key, value in infos[0].settings.items() if all(i.settings.get(key) == value for i in infos)}
    hashes = {s.name: s.manifest.files[info.file].sha256 for s, info in zip(sources, infos, strict=True)}
    write_feature_blocks(
        folder,
        name,
        tokens=[
            token for source, part in zip(sources, parts, strict=True) for token in _called(source.name, part.tokens)
        ],
        blocks=_blocks(parts),
        shape=_shape(parts),
        dtype="float16" if all(info.dtype == "float16" for info in infos) else "float32",
        counts=np.concatenate([part.counts for part in parts]) if several else None,
        encoder=infos[0].encoder,
        source=", ".join(dict.fromkeys(part for info in infos for part in info.source.split(", "))),
        settings={**same, "mixed": hashes},
    )


def _blocks(parts: Sequence[Feature]) -> Iterator[np.ndarray]:
    for part in parts:
        size = max(1, BLOCK_BYTES // max(1, part.rows.shape[1] * part.rows.itemsize))
        for start in range(0, len(part.rows), size):
            yield part.rows[start : start + size]
