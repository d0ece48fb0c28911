"""What a property file's comments allow: ``key: 1  # (int) >= 1, meaning``, so that a range stands in one place."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recbole_mm.errors import nearest

_RANGE = r">=? [\d.]+|in [\[(][\d.]+, [\d.]+[\])]"
_CHOICES = r"(?:~|\w+)(?: \| \w+)+"  # ~ is nothing
_LINE = re.compile(rf"(\w+):.*# \(\w+\) (?:(?P<range>{_RANGE})|(?P<choices>{_CHOICES}))")


@dataclass(frozen=True)
class Allowed:
    """Values that a setting may have.

    Attributes:
        text: the range as it stands in the file, ``>= 1``, ``> 0`` or ``in [0, 1)``; or the choices, ``a | b`` or
            ``~ | a | b``.
        choices: by name, None for nothing among them; or None for a range.
    """

    text: str
    choices: tuple[str | None, ...] | None = None

    def __contains__(self, value: Any) -> bool:
        if self.choices:
            return value in self.choices
        if self.text.startswith("in "):
            low, high = map(float, self.text[4:-1].split(", "))
            above = value >= low if self.text[3] == "[" else value > low
            return above and (value <= high if self.text[-1] == "]" else value < high)
        sign, low = self.text.split()
        return value >= float(low) if sign == ">=" else value > float(low)

    def __str__(self) -> str:
        return f"one of {', '.join(self._names())}" if self.choices else self.text

    def nearest(self, value: Any) -> str:
        return nearest(str(value), self._names()) if self.choices else ""

    def _names(self) -> list[str]:
        return ["~" if choice is None else choice for choice in self.choices or ()]


def documented(file: Path) -> dict[str, Allowed]:
    """The ranges and choices that the comments of a property file state, by setting."""
    found = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        if match := _LINE.match(line):
            text = match["range"] or match["choices"]
            choices = tuple(None if choice == "~" else choice for choice in text.split(" | "))
            found[match[1]] = Allowed(text, choices if match["choices"] else None)
    return found
