"""Adam for tables of which a step uses a few rows: gradients, and steps, of those rows alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from recbole_mm.errors import SettingError


class LazyAdam(torch.optim.Adam):
    """Adam, in which the rows of a table move only in steps that have a gradient for them.

    Parameters with dense gradients take Adam's own step. Of a parameter with a sparse gradient (COO, its first
    dimension sparse), rows in it are updated as Adam would, with the number of steps of the whole table; other rows
    keep parameter and averages: O(rows in use) time instead of O(N). An approximation of Adam, which would move the
    others by what their averages still hold, and let these decay.

    Its state is Adam's, so that checkpoints hold it and resumption goes on with it.
    """

    @torch.no_grad()
    def step(self, closure=None):
        sparse = [
            (group, parameter, parameter.grad)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None and parameter.grad.is_sparse
        ]
        for _, parameter, _ in sparse:
            parameter.grad = None  # Adam passes over it
        loss = super().step(closure)
        for group, parameter, grad in sparse:
            _move_rows(parameter, grad.coalesce(), self.state[parameter], group)
            parameter.grad = grad
        return loss


def fused(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """A new Adam or AdamW that moves each parameter in one pass over it instead of a dozen; it rounds otherwise.

    Raises:
        SettingError: another kind of optimizer.
    """
    kind = type(optimizer)
    if kind not in (torch.optim.Adam, torch.optim.AdamW):
        raise SettingError(f"fused_optimizer goes with learner adam or adamw, found {kind.__name__}; leave one out")
    (group,) = optimizer.param_groups
    return kind(group["params"], lr=group["lr"], weight_decay=group["weight_decay"], fused=True)


def _move_rows(parameter: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    if not state:
        state["step"] = torch.zeros(())
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    state["step"] += 1
    step, (beta1, beta2) = state["step"].item(), group["betas"]
    rows, values = grad.indices()[0], grad.values()  # [n], [n, D]
    average = state["exp_avg"].index_select(0, rows).lerp_(values, 1 - beta1)
    square = state["exp_avg_sq"].index_select(0, rows).mul_(beta2).addcmul_(values, values, value=1 - beta2)
    state["exp_avg"].index_copy_(0, rows, average)
    state["exp_avg_sq"].index_copy_(0, rows, square)
    deviation = square.sqrt_().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
    parameter.index_add_(0, rows, average.div_(deviation), alpha=-group["lr"] / (1 - beta1**step))


def clip_gradients(parameters: Iterable[nn.Parameter], *, max_norm: float, norm_type: float = 2.0, **others) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_`, also where some gradients are sparse: as if they were dense.

    Returns:
        The norm before, [].
    """
    parameters = list(parameters)
    stand_ins = []
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
            stand_in = nn.Parameter(parameter.grad.values().detach(), requires_grad=False)
            stand_in.grad = parameter.grad.values()  # the same memory, so that it is scaled in place
            stand_ins.append(stand_in)
    dense = [parameter for parameter in parameters if parameter.grad is None or not parameter.grad.is_sparse]
    return nn.utils.clip_grad_norm_([*dense, *stand_ins], max_norm, norm_type, **others)
