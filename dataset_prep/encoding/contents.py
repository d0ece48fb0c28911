"""What items hold: sentences, texts or pictures, each different one once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from recbole_mm.data.files import sha256_of

HASHING_THREADS = 4
MISSING_FILE = "picture file missing"
UNREADABLE = "picture file unreadable"


@dataclass(frozen=True)
class Contents:
    """The contents of items, in the order in which items first hold them.

    Attributes:
        kind: "text" or "image".
        tokens: of the items.
        of_items: for each item the numbers of its contents; none for an item without content.
        reasons: for each item why it has no content; "" for one that has.
        unique: the different contents: texts, or paths of pictures.
        identities: what a content is known by: the text itself, or the sha256 of the file.
    """

    kind: str
    tokens: list[str]
    of_items: list[list[int]]
    reasons: list[str]
    unique: list[str]
    identities: list[str]

    def sha256(self) -> str:
        """Hash of tokens and contents; of pictures their bytes count, and not where they lie."""
        digest = hashlib.sha256(self.kind.encode())
        for token, numbers in zip(self.tokens, self.of_items, strict=True):
            line = json.dumps([token, [self.identities[number] for number in numbers]])
            digest.update(line.encode() + b"\n")
        return digest.hexdigest()

    def described(self, number: int) -> str:
        """A content for a message: a short text, or the name of the picture's file."""
        content = self.unique[number]
        return repr(content if len(content) <= 60 else content[:60] + "…") if self.kind == "text" else content


def text_contents(tokens: Sequence[str], texts: Sequence[Sequence[str]]) -> Contents:
    """Contents of items that have texts, or none.

    Args:
        texts: of each item.
    """
    numbers: dict[str, int] = {}
    of_items = [[numbers.setdefault(text, len(numbers)) for text in mine] for mine in texts]
    reasons = ["" if mine else "no text" for mine in texts]
    return Contents("text", list(tokens), of_items, reasons, list(numbers), list(numbers))


def picture_contents(
    tokens: Sequence[str], paths: Sequence[Sequence[Path]], reasons: Sequence[str], *, progress: bool = False
) -> Contents:
    """Contents of items that have pictures; files of the same bytes are one content. Reads every file once.

    Args:
        paths: files of each item.
        reasons: for each item why it has none, if it has none.
        progress: show a bar on stderr.
    """
    from tqdm import tqdm

    files = list(dict.fromkeys(path for mine in paths for path in mine))
    with ThreadPoolExecutor(HASHING_THREADS) as threads:
        hashes = threads.map(_file_hash, files)
        shown = tqdm(hashes, total=len(files), unit="file", desc="hashing", disable=not progress, leave=False)
        found = dict(zip(files, shown, strict=True))

    numbers: dict[str, int] = {}
    unique: list[str] = []
    of_items, why = [], []
    for mine, reason in zip(paths, reasons, strict=True):
        here: dict[int, None] = {}
        for path in mine:
            sha256, problem = found[path]
            reason = reason or problem
            if problem:
                continue
            if sha256 not in numbers:
                numbers[sha256] = len(unique)
                unique.append(str(path))
            here[numbers[sha256]] = None
        of_items.append(list(here))
        why.append("" if here else reason)
    return Contents("image", list(tokens), of_items, why, unique, list(numbers))


def _file_hash(path: Path) -> tuple[str, str]:
    """sha256 of a file, or "" and why there is none."""
    try:
        if not path.is_file():
            return "", MISSING_FILE
        return sha256_of(path), ""
    except OSError:
        return "", UNREADABLE
