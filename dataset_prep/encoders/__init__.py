"""Encoders: what makes vectors out of texts or pictures.

A new encoder is a class with the members of ``Encoder`` in a file of its own, and one line in ``KNOWN``. Its file is
imported when the encoder is asked for, and what it needs when it is made: a package that is absent stops its own
encoders and no others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from dataset_prep.encoders.options import check_options
from recbole_mm.errors import SettingError, nearest

if TYPE_CHECKING:
    from PIL.Image import Image

KNOWN = {  # file and class of each encoder
    "tfidf": "text:TfidfEncoder",
    "sentence": "sentence:SentenceEncoder",
    "bert": "bert:BertEncoder",
    "clip_text": "clip:ClipTextEncoder",
    "histogram": "image:HistogramEncoder",
    "torchvision": "torchvision_networks:TorchvisionEncoder",
    "clip": "clip:ClipEncoder",
    "onnx": "onnx:OnnxEncoder",
    "clip_words": "words:ClipWordsEncoder",
    "class_names": "classes:ClassNamesEncoder",
    "generated": "generated:GeneratedEncoder",
}
NEIGHBOURS = "neighbours"  # of pseudo.py, which reads features: an encoder by name only
DEFAULT_ENCODERS = {"text": "tfidf", "image": "histogram"}


class Encoder(Protocol):
    """Makes vectors out of texts or pictures.

    The arguments of its constructor are plain values of JSON, so that another process can make the same encoder.

    Attributes:
        name: what the user calls it.
        source: "text" or "image".
        settings: enough to make the same vectors again; complete once ``fit`` and ``encode`` have run.
        transform: of encoders of pictures: makes of an RGB ``PIL.Image.Image`` the array that ``encode`` takes. It can
            be pickled and is light: workers that decode pictures run it.
        counts: of encoders that count something: `counts.Counts`.
    """

    name: str
    source: str
    settings: dict[str, Any]
    transform: Callable[[Image], np.ndarray]

    def fit(self, everything: Sequence[Any]) -> None:
        """Learn from the whole catalogue, before ``encode``; encoders with weights of their own do nothing here."""

    def encode(self, batch: Sequence[Any]) -> list[np.ndarray]:
        """Float32, per member of ``batch`` [F], or [T, F] of an encoder that makes several rows of one input.

        Args:
            batch: texts, or what ``transform`` made of pictures. Neither its order nor its size changes a vector beyond
                the rounding of float32.
        """


def find_encoder(name: str) -> type:
    """The class of an encoder.

    Raises:
        SettingError: no encoder of that name; lists those there are.
    """
    if name == NEIGHBOURS:
        raise SettingError(f"the encoder {name} reads features; it makes those called <result>_from_<source> alone")
    if name not in KNOWN:
        names = sorted([*KNOWN, NEIGHBOURS])
        raise SettingError(f"no encoder {name!r}, only {names}{nearest(name, names)}")
    file, _, encoder = KNOWN[name].partition(":")
    return getattr(import_module(f"{__name__}.{file}"), encoder)


def build_encoder(name: str | None, *, feature: str, **options: Any) -> Encoder:
    """An encoder ready for use.

    Args:
        name: of the encoder; None takes the default one for the feature.
        feature: name of the feature it is for.
        options: constructor arguments; those that are None are left at their defaults.

    Raises:
        SettingError: no such encoder, no default for the feature, an option the encoder does not have, or a value of
            another type.
    """
    name = name or DEFAULT_ENCODERS.get(feature)
    if name is None:
        raise SettingError(
            f"feature {feature!r} has no default encoder (only {sorted(DEFAULT_ENCODERS)} have)"
            f"; choose one with --encoder, of {sorted([*KNOWN, NEIGHBOURS])}"
        )
    encoder = find_encoder(name)
    options = {key: value for key, value in options.items() if value is not None}
    check_options(options, encoder, called=f"encoder {name!r}", as_flags=True)
    return encoder(**options)
