"""torchvision beside a PyTorch built without CUDA.

PyPI has torchvision for Linux only as built for CUDA. Beside a PyTorch without it, torchvision's compiled operators do
not load, and its Python stops at ``operator torchvision::nms does not exist``; transformers, timm and
open_clip stop with it. What encoders use of torchvision is Python; only the names of two operators must be known.
A torchvision that works is left as it is.
"""

from __future__ import annotations

import sys

_KEPT_ALIVE: list = []  # a torch.library.Library takes its operators away when it is collected
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def mend_torchvision() -> None:
    """Make ``import torchvision`` work, if it is installed; call it before importing anything that may import it."""
    if "torchvision" in sys.modules:
        return
    try:
        import torchvision  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        import torch

        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(operator + _SCHEMA)
        _KEPT_ALIVE.append(library)
        import torchvision  # noqa: F401
