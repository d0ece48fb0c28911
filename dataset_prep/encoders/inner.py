"""Encoders that lead through another encoder: building the inner one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from dataset_prep.encoders import Encoder, build_encoder, find_encoder
from dataset_prep.encoders.options import check_options
from recbole_mm.errors import SettingError


def with_defaults(options: dict[str, Any] | None, shared: dict[str, Any], takes: Callable) -> dict[str, Any]:
    """``options``, and of ``shared`` what they do not name, is not None, and ``takes`` has an argument for.

    Raises:
        SettingError: an option that ``takes`` has no argument for, or a value of another type.
    """
    check_options(options or {}, takes, called=takes.__name__)
    arguments = inspect.signature(takes).parameters
    found = {name: value for name, value in shared.items() if value is not None and name in arguments}
    return found | (options or {})


def build_text_encoder(
    name: str, options: dict[str, Any] | None, shared: dict[str, Any], *, texts: Sequence[str]
) -> Encoder:
    """A text encoder, fitted on all the texts that can occur.

    Args:
        name: of the encoder.
        options: its arguments.
        shared: further arguments, for those it has and ``options`` does not name.
        texts: all that can occur, or the parts that texts are joined of.

    Raises:
        SettingError: no such encoder, or one that reads pictures.
    """
    encoder = _build(name, options, shared, source="text")
    encoder.fit(texts)
    return encoder


def build_image_encoder(name: str, options: dict[str, Any] | None, shared: dict[str, Any]) -> Encoder:
    """An encoder of pictures, not fitted.

    Raises:
        SettingError: no such encoder, or one that reads texts.
    """
    return _build(name, options, shared, source="image")


def _build(name: str, options: dict[str, Any] | None, shared: dict[str, Any], *, source: str) -> Encoder:
    kind = find_encoder(name)
    if kind.source != source:
        raise SettingError(f"the encoder {name!r} reads {kind.source}; here one is needed that reads {source}")
    return build_encoder(name, feature=source, **with_defaults(options, shared, kind))
