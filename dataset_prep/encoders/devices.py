"""Where a network runs and with how many digits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from recbole_mm.errors import SettingError, nearest

PRECISIONS = ("auto", "float32", "float16", "bfloat16")


def choose_device(device: str | None) -> str:
    """A device by its name, such as "cpu" or "cuda:1"; None takes a GPU if there is one.

    Raises:
        SettingError: no such device here.
    """
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise SettingError(
            f"the device {device!r} cannot be used here ({reason}); choose cpu, or leave it out"
        ) from error
    return str(device)


def choose_precision(precision: str, device: str) -> str:
    """float32, float16 or bfloat16; "auto" is float16 on a GPU and float32 elsewhere.

    Raises:
        SettingError: another name.
    """
    if precision not in PRECISIONS:
        raise SettingError(
            f"precision is {precision!r}, expected one of {list(PRECISIONS)}{nearest(str(precision), PRECISIONS)}"
        )
    if precision != "auto":
        return precision
    return "float16" if device.partition(":")[0] == "cuda" else "float32"


@contextmanager
def inference(device: str, precision: str) -> Iterator[None]:
    """Without gradients, and with mixed precision unless ``precision`` is float32."""
    import torch

    kind = device.partition(":")[0]
    with torch.inference_mode():
        if precision == "float32":
            yield
            return
        with torch.autocast(kind, dtype=getattr(torch, precision)):
            yield


def require_finite(rows: np.ndarray, *, model: str, precision: str) -> None:
    """Refuse NaN and infinity, which some models give in float16.

    Raises:
        SettingError: naming model and precision.
    """
    if np.isfinite(rows).all():
        return
    remedy = "choose --precision bfloat16 or float32" if precision == "float16" else "its weights are broken"
    raise SettingError(f"model {model} gave NaN or infinity in {precision}; {remedy}")
