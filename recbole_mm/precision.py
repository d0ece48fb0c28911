"""Mixed precision: towers and encoders in 16 bits, scores and losses in float32.

amp: bf16 | fp16

                 +-- 16 bits: maps, products ---+      +-- float32: products of sessions and items,
batch, items --> |  of towers and encoders      | ---> |   softmax over items, contrastive and           ---> loss
                 |  (weights stay in float32)   |      |   Wasserstein terms
                 +------------------------------+      +-----------------------------------------

Our models run in `torch.autocast` and leave it where a sum, a difference or a softmax needs more digits; a model of
RecBole's runs its ``forward`` there, which gives the sequences' vectors, and makes scores and losses outside. Scores
keep 24 bits of precision also because of ties: in bf16, five thousand items share a few hundred scores.

fp16 has a narrow range, so that small gradients become zero: the loss is scaled up before the backward pass and the
gradients down after it, and a step whose gradients overflow is left out (`torch.amp.GradScaler`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from recbole_mm.errors import TrainingError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_OF_RECBOLE = ("forward",)  # of ours, a model names them itself
_PROBABILITIES_IN_FORWARD = ("RepeatNet",)


@dataclass(frozen=True)
class Precision:
    """What a model is computed in.

    Attributes:
        dtype: of towers and encoders; None for float32 throughout.
        notice: why this is not what was asked for; "" where it is.
    """

    dtype: torch.dtype | None
    notice: str = ""


def precision_of(amp: str | None, device: torch.device, model: nn.Module) -> Precision:
    """The precision that was asked for, or float32 where the device or the model cannot do with it.

    Args:
        amp: "bf16", "fp16" or None.
    """
    if amp is None:
        return Precision(None)
    reason, name = "", type(model).__name__
    if name in _PROBABILITIES_IN_FORWARD:
        reason = f"{name} makes the probabilities of all items within its encoder"
    elif not _parts_of(model):
        reason = f"{name} has nothing to compute in 16 bits"
    elif amp == "fp16" and device.type == "cpu":
        reason = "PyTorch scales losses for fp16 on a GPU only, and without it small gradients become zero"
    elif amp == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        reason = f"{torch.cuda.get_device_name(device)} has no arithmetic of that kind; fp16 may do"
    if reason:
        return Precision(None, f"amp {amp} on {device}: {reason}; this run computes in float32 instead")
    return Precision(DTYPES[amp])


def run_in(model: nn.Module, precision: Precision, device: torch.device) -> None:
    """Let a model compute in this precision from now on; its parameters stay in float32.

    Only the instance changes, and neither its parameters nor their names.
    """
    if precision.dtype is None:
        return
    for name in _parts_of(model):
        setattr(model, name, _in_autocast(getattr(model, name), precision.dtype, device.type))


def _parts_of(model: nn.Module) -> tuple[str, ...]:
    return getattr(model, "in_16_bits", _OF_RECBOLE)


def _in_autocast(function: Callable, dtype: torch.dtype, device_type: str) -> Callable:
    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device_type, dtype=dtype):
            result = function(*args, **kwargs)
        return _in_float32(result)

    return run


def _in_float32(result: Any) -> Any:
    """Tensors of 16 bits, also within tuples and lists, in float32; all else as it is."""
    if isinstance(result, Tensor):
        return result.float() if result.dtype in DTYPES.values() else result
    if isinstance(result, (tuple, list)):
        return type(result)(_in_float32(part) for part in result)
    return result


class GradientScaler:
    """Steps of an optimizer with scaled gradients, for fp16, or plain ones.

    Args:
        enabled: whether to scale.

    Attributes:
        enabled: whether gradients are scaled.
        n_steps, n_left_out: of the current epoch; left out are those whose gradients were not finite.
    """

    def __init__(self, device: torch.device, *, enabled: bool) -> None:
        self._scaler, self.enabled = torch.amp.GradScaler(device.type, enabled=enabled), enabled
        self.n_steps = self.n_left_out = 0

    def backward(self, loss: Tensor) -> None:
        self._scaler.scale(loss).backward()

    def step(self, optimizer: torch.optim.Optimizer, *, clip: Callable[[], Any] | None = None) -> None:
        """One step; ``clip`` sees gradients of their real size."""
        if clip is not None:
            self._scaler.unscale_(optimizer)
            clip()
        self._scaler.step(optimizer)
        before = self._scaler.get_scale() if self._scaler.is_enabled() else 0.0
        self._scaler.update()
        self.n_steps += 1
        self.n_left_out += self._scaler.is_enabled() and self._scaler.get_scale() < before

    def end_epoch(self, stage: str, epoch: int) -> str:
        """What a reader must know of this epoch's steps; "" for nothing.

        Raises:
            TrainingError: all of them were left out.
        """
        n_steps, n_left_out = self.n_steps, self.n_left_out
        self.n_steps = self.n_left_out = 0
        if n_steps and n_left_out == n_steps:
            raise TrainingError(
                f"{stage}: in epoch {epoch} the gradients of all {n_steps} steps overflowed in fp16, so that nothing "
                "was learnt\n  use amp bf16, whose range is that of float32, or a smaller learning_rate"
            )
        if 10 * n_left_out > n_steps:
            return f"{stage}: epoch {epoch} left out {n_left_out} of {n_steps} steps, as gradients overflowed in fp16"
        return ""

    def state_dict(self) -> dict[str, Any]:
        return self._scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the scale of an interrupted training; nothing where it had none."""
        if state and self._scaler.is_enabled():
            self._scaler.load_state_dict(state)
