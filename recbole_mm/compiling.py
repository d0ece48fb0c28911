"""`torch.compile` for the parts of a model that it may help: small dense networks that are called often.

What is compiled are the layers of Transformers, and what a module of ours names in ``compiled``. The rest has autograd
functions of its own, or too few operations to be worth it. Parameters and their names in a checkpoint stay what they
are: only the call of a part goes another way.

Compiled code rounds otherwise, and draws dropout in another order than the same code without; so the setting belongs to
what a run is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from recbole.model.layers import TransformerLayer
from torch import nn


def compile_parts(model: nn.Module, warn: Callable[[str], None], *, backend: str = "inductor") -> int:
    """Compile parts of a model; they compute as before, with a warning, where that is not possible.

    Args:
        warn: told once why nothing, or a part, is compiled.
        backend: of `torch.compile`.

    Returns:
        How many parts are compiled when they are called first.
    """
    parts = list(parts_of(model))
    if not parts:
        warn(f"compile: {type(model).__name__} has no part for it; it runs as it is")
        return 0
    if reason := why_not(model, backend):
        warn(f"compile: {reason}; the model runs as it is")
        return 0
    for module, name in parts:
        setattr(module, name, _Compiled(module, name, warn, backend))
    return len(parts)


def parts_of(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Modules, and the name of the method to compile."""
    for module in model.modules():
        names = ("forward",) if isinstance(module, TransformerLayer) else getattr(module, "compiled", ())
        yield from ((module, name) for name in names)


def why_not(model: nn.Module, backend: str) -> str:
    """Why nothing can be compiled here, found out with a function of one line; "" where it can."""
    device = next(model.parameters()).device
    try:
        torch.compile(lambda x: x.sin() + 1, backend=backend)(torch.ones(3, device=device))
    except Exception as error:  # missing compilers show in many ways
        return f"torch.compile does not work on this machine ({_first_line(error)})"
    return ""


class _Compiled:
    """A method of a module, compiled; from the first failure of the compiler on, as it was."""

    def __init__(self, module: nn.Module, name: str, warn: Callable[[str], None], backend: str) -> None:
        self._plain = getattr(module, name)
        self._call = torch.compile(self._plain, dynamic=True, backend=backend)
        self._name, self._warn = f"{type(module).__name__}.{name}", warn

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._call(*args, **kwargs)
        except Exception as error:  # whatever is wrong with the module itself comes again from the plain call
            self._call = self._plain
            self._warn(f"compile: {self._name} could not be compiled ({_first_line(error)}); it runs as it is")
            return self._plain(*args, **kwargs)

    def __deepcopy__(self, memo: dict) -> Any:
        raise TypeError(f"{self._name} is compiled and cannot be copied; copy the model before")


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
