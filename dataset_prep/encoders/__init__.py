"""Encoders: what makes vectors out of texts or pictures.

A new encoder is a class with the members of ``Encoder`` in ``text.py`` or ``image.py``, and one line in ``_known``.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from recbole_mm.errors import SettingError, nearest

NEIGHBOURS = "neighbours"  # of pseudo.py, which reads features: an encoder by name only
DEFAULT_ENCODERS = {"text": "tfidf", "image": "histogram"}


class Encoder(Protocol):
    """Makes one vector per text or picture.

    Attributes:
        name: what the user calls it.
        source: "text" or "image": what ``encode`` takes, ``str`` or RGB ``PIL.Image.Image``.
        settings: enough to make the same vectors again; complete once ``fit`` and ``encode`` have run.
    """

    name: str
    source: str
    settings: dict[str, Any]

    def fit(self, everything: Sequence[Any]) -> None:
        """Learn from the whole catalogue, before ``encode``; encoders with weights of their own do nothing here."""

    def encode(self, batch: Sequence[Any]) -> list[np.ndarray]:
        """[F] float32 per member of ``batch``, in its order. Neither order nor size of a batch changes a vector."""


def _known() -> dict[str, type]:
    from dataset_prep.encoders.image import HistogramEncoder
    from dataset_prep.encoders.text import SentenceEncoder, TfidfEncoder

    return {"tfidf": TfidfEncoder, "sentence": SentenceEncoder, "histogram": HistogramEncoder}


def _names() -> list[str]:
    return sorted([*_known(), NEIGHBOURS])


def find_encoder(name: str) -> type:
    """The class of an encoder.

    Raises:
        SettingError: no encoder of that name; lists those there are.
    """
    known = _known()
    if name == NEIGHBOURS:
        raise SettingError(f"the encoder {name} reads features; it makes those called <result>_from_<source> alone")
    if name not in known:
        raise SettingError(f"no encoder {name!r}, only {_names()}{nearest(name, _names())}")
    return known[name]


def build_encoder(name: str | None, *, feature: str, **options: Any) -> Encoder:
    """An encoder ready for use.

    Args:
        name: of the encoder; None takes the default one for the feature.
        feature: name of the feature it is for.
        options: constructor arguments; those that are None are left at their defaults.

    Raises:
        SettingError: no such encoder, no default for the feature, or an option the encoder does not have.
    """
    name = name or DEFAULT_ENCODERS.get(feature)
    if name is None:
        raise SettingError(
            f"feature {feature!r} has no default encoder (only {sorted(DEFAULT_ENCODERS)} have)"
            f"; choose one with --encoder, of {_names()}"
        )
    encoder = find_encoder(name)
    options = {key: value for key, value in options.items() if value is not None}
    takes = list(inspect.signature(encoder).parameters)
    if foreign := [key for key in options if key not in takes]:
        flags = ", ".join("--" + key.replace("_", "-") for key in foreign)
        raise SettingError(f"encoder {name!r} has no option {flags}; its settings are {takes}")
    return encoder(**options)
