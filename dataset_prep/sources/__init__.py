"""Where interactions and items come from: one module a kind of source, each a `Source`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dataset_prep.events import Events
from dataset_prep.sources.rejects import Rejects
from recbole_mm.errors import SettingError


@dataclass(frozen=True)
class Item:
    """What a source says of one item, as it stands there: nothing is cleaned yet. Empty means unknown.

    Attributes:
        item_id: never empty.
        categories: from the broadest to the finest.
        description: may hold HTML; parts are separated by line breaks. Any text may hold tabs and line breaks.
        price: text, such as "$1,299.00".
        pictures: addresses (http, https) or paths, the best one first.
        more: further columns by name, for sources that have them.
    """

    item_id: str
    title: str = ""
    brand: str = ""
    categories: tuple[str, ...] = ()
    description: str = ""
    price: str = ""
    pictures: tuple[str, ...] = ()
    more: dict[str, str] = field(default_factory=dict)


class Source(Protocol):
    """Interactions, and what is known of the items; both are read as streams.

    Attributes:
        described: goes into the manifest and the dataset card: kind of source, edition, licence note, options.
        files: all of them, by a name that tells no folder.
        raw_files: sha256 by file name, of the files read so far.
        n_rows: rows by file name, of the files read so far, with those that went to the rejects.
        fixed: what was mended or left out without losing a row, by kind.
    """

    described: dict[str, Any]
    files: dict[str, Path]
    raw_files: dict[str, str]
    n_rows: dict[str, int]
    fixed: Counter[str]

    def events(self, rejects: Rejects) -> Events:
        """All interactions with a usable user, item and time; the others go to ``rejects``."""

    def items(self, wanted: Container[str], rejects: Rejects) -> Iterator[Item]:
        """The items among ``wanted``, each once, in the order of the source; unusable rows go to ``rejects``."""


def named_files(files: dict[str, Sequence[Path]]) -> dict[str, list[tuple[str, Path]]]:
    """Files by their role, each with a name of its own that tells no folder: ``a.csv``, and ``items/a.csv`` if taken.

    Args:
        files: such as ``{"interactions": [...], "items": [...]}``.

    Raises:
        SettingError: a file twice in one role, whose rows would count double.
    """
    for role, paths in files.items():
        real = [os.path.realpath(path) for path in paths]
        if twice := [str(path) for path, where in zip(paths, real, strict=True) if real.count(where) > 1]:
            raise SettingError(f"{role}: {twice[1]} is given twice; leave one out")
    taken: set[str] = set()

    def name_of(role: str, path: Path) -> str:
        name = path.name if path.name not in taken else f"{role}/{path.name}"
        number = 2
        while name in taken:
            name, number = f"{role}/{number}/{path.name}", number + 1
        taken.add(name)
        return name

    return {role: [(name_of(role, path), path) for path in paths] for role, paths in files.items()}


def as_paths(files: Path | str | Sequence[Path | str] | None) -> list[Path]:
    """One file, several or none, as a list."""
    if files is None:
        return []
    return [Path(files)] if isinstance(files, (str, Path)) else [Path(file) for file in files]
