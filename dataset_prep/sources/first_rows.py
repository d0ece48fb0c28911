"""Items that stand in a source more than once: the first row counts."""

from __future__ import annotations

import hashlib
from collections import Counter

from dataset_prep.sources import Item
from dataset_prep.sources.rejects import Rejects


class FirstRows:
    """Tells whether a row is the first of its item; memory is some 200 bytes an item.

    Args:
        fixed: counts rows that say the same once more.
        rejects: gets rows that say something else (``conflict``).
    """

    def __init__(self, fixed: Counter[str], rejects: Rejects) -> None:
        self._fixed, self._rejects = fixed, rejects
        self._seen: dict[str, tuple[bytes, str, int]] = {}

    def is_first(self, item: Item, file: str, line: int, text: str) -> bool:
        """Remember an item, or count it as a repetition; ``text`` is its row."""
        content = hashlib.blake2b(repr(item).encode(errors="surrogatepass"), digest_size=16).digest()
        first = self._seen.setdefault(item.item_id, (content, file, line))
        if first == (content, file, line):
            return True
        if first[0] == content:
            self._fixed["item given again"] += 1
        else:
            where = f"line {first[2]}" if first[1] == file else f"{first[1]}, line {first[2]}"
            self._rejects.add(file, line, "conflict", f"differs from {where}: {text}")
        return False
