"""Fields of Amazon's metadata, whatever their type: a row may hold numbers, texts, lists or nothing in any place."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any


def field_text(value: Any, separator: str) -> str:
    """A text, or the texts of a list; anything else is nothing."""
    if type(value) is str:
        return "" if value == "None" else value
    if type(value) is list:
        return separator.join(part for part in value if type(part) is str and part)
    return ""


def categories_of(value: Any) -> tuple[str, ...]:
    """Names of a list, or of the first path of the 2014 edition's list of paths."""
    if type(value) is list and value and type(value[0]) is list:
        value = value[0]
    if type(value) is str:
        value = [value]
    return tuple(name for name in value if type(name) is str and name) if type(value) is list else ()


def price_of(value: Any) -> str:
    """A price as text; NaN and "None" are none."""
    if type(value) in (int, float):
        return "" if value != value else repr(value)
    return value if type(value) is str and value != "None" else ""


def addresses_of(row: dict[str, Any], edition: str) -> Iterator[str]:
    """Of an item's pictures, the largest first."""
    if edition == "2014":
        yield from _strings(row.get("imUrl"))
    elif edition == "2018":
        for key in ("imageURLHighRes", "imageURL", "image"):
            yield from _strings(row.get(key))
    else:
        images = row.get("images")
        if type(images) is str and images.startswith(("[", "{")):
            images = _parsed(images)
        if type(images) is dict:  # of lists, as in the Parquet form
            names = [name for name in ("hi_res", "large", "thumb", "variant") if type(images.get(name)) is list]
            longest = max((len(images[name]) for name in names), default=0)
            images = [
                {name: images[name][place] for name in names if place < len(images[name])} for place in range(longest)
            ]
        pictures = [picture for picture in images if type(picture) is dict] if type(images) is list else []
        pictures.sort(key=lambda picture: picture.get("variant") != "MAIN")  # stable
        for picture in pictures:
            sizes = (address for size in ("hi_res", "large", "thumb") for address in _strings(picture.get(size)))
            yield from islice(sizes, 1)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _strings(value: Any) -> Iterator[str]:
    if type(value) is str:
        value = [value]
    if type(value) is list:
        yield from (text for text in value if type(text) is str and text and text != "None")
