"""Values of the command line that several commands share."""

from __future__ import annotations

import argparse
from pathlib import Path


def folder(text: str) -> Path:
    """A folder with a name, which "." has not: the files of a folder carry its name."""
    return Path(text) if Path(text).name not in ("", "..") else Path(text).resolve()


def names(text: str) -> list[str]:
    return text.split(",")


def at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number of at least 1, not {text}")
    return int(text)
