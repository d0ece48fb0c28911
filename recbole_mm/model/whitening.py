"""UniSRec's adaptor: parametric whitening by a mixture of experts, in training with dropout in front of each of them.

Shapes: n rows, P places where they stand, F encoder width, D model width, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from recbole_mm.model.layers import at_least_float32, dropped_of_65536, random_int16

BLOCK = 512  # rows of an adaptor with dropout that are computed at a time


class WhiteningAdaptor(nn.Module):
    """A dense mixture of parametric whitenings from encoder width to model width.

    z = sum_k g_k W_k (Dropout_k(x) - b_k), g = softmax(x G + e (softplus(x V) + 0.01)), e ~ N(0, 1) in training and 0
    otherwise. Source: UniSRec, parametric whitening and MoE-enhanced adaptor. G, V and b start at zero, so that all
    experts count alike at first. Each expert has a dropout of its own, on its input.

    Same function, less work: W_k b_k is one vector for all rows; without dropout the experts' products are shared by
    all places of a row, see `WhitenedRows`; with dropout, which is in front of the product, each place needs its own.

    Args:
        width_in: F.
        width_out: D.
        n_experts: E.
        dropout: probability of dropping a value of an expert's input.
        gate_noise: add noise to the gates in training.
        initializer_range: standard deviation of W at the start.
    """

    def __init__(
        self,
        *,
        width_in: int,
        width_out: int,
        n_experts: int,
        dropout: float,
        gate_noise: bool = True,
        initializer_range: float = 0.02,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.weight = nn.Parameter(torch.empty(n_experts, width_out, width_in))
        self.shift = nn.Parameter(torch.zeros(n_experts, width_in))
        self.gate = nn.Linear(width_in, n_experts, bias=False)
        self.noise = nn.Linear(width_in, n_experts, bias=False) if gate_noise else None
        nn.init.normal_(self.weight, std=initializer_range)
        nn.init.zeros_(self.gate.weight)
        if self.noise is not None:
            nn.init.zeros_(self.noise.weight)

    @property
    def drops(self) -> bool:
        return self.training and self.dropout > 0

    @property
    def noisy(self) -> bool:
        return self.training and self.noise is not None

    def gates(self, logits: Tensor, deviation: Tensor | None) -> Tensor:
        """Softmax over the experts, of logits with fresh noise of these deviations: [P, E], [P, E] -> [P, E]."""
        logits = at_least_float32(logits)
        if deviation is not None:
            logits = logits + torch.randn_like(logits) * deviation
        return logits.softmax(-1)

    def routing(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits of the gates and, while they are noisy, the noise's deviations: [n, F] -> [n, E] each."""
        return self.gate(x), F.softplus(self.noise(x)) + 0.01 if self.noisy else None

    def experts(self, x: Tensor) -> Tensor:
        """What each expert makes of a row that nothing is dropped of: [n, F] -> [n, E, D]."""
        return F.linear(x, self.weight.flatten(0, 1)).unflatten(-1, self.weight.shape[:2]) - self.constant()

    def constant(self) -> Tensor:
        """W_k b_k, [E, D]."""
        return (self.weight @ self.shift.unsqueeze(-1)).squeeze(-1)

    def forward(self, x: Tensor) -> Tensor:
        """[n, F] -> [n, D]."""
        return WhitenedRows(self, x).all()


class WhitenedRows:
    """Vectors that an adaptor makes of rows, wherever they are needed.

    In training each place has its own dropout and its own noise on the gates. What places share is computed once: the
    logits of the gates; without dropout the experts' products too; without noise as well, the vectors themselves.

    Args:
        adaptor: E experts.
        x: [n, F], not trained.
    """

    def __init__(self, adaptor: WhiteningAdaptor, x: Tensor) -> None:
        self.adaptor, self.x = adaptor, x
        self.logits, self.deviation = adaptor.routing(x)  # [n, E]
        self.hidden, self.vectors = None, None
        if adaptor.noisy and not adaptor.drops:
            self.hidden = adaptor.experts(x)  # [n, E, D]
        elif not adaptor.drops:
            gates = adaptor.gates(self.logits, None)
            # Where nothing has to be remembered for a backward pass, not all experts' products are there at once.
            size = len(x) if torch.is_grad_enabled() else BLOCK
            self.vectors = torch.cat(
                [weighted(adaptor.experts(part), g) for part, g in zip(x.split(size), gates.split(size), strict=True)]
            )  # [n, D]

    def all(self) -> Tensor:
        """[n, D]."""
        return self.vectors if self.vectors is not None else self._at(None)

    def at(self, index: Tensor) -> Tensor:
        """Vectors of rows index [P], each with its own dropout and noise: [P, D]."""
        # On a CPU the gradient of an embedding is far cheaper than that of indexing.
        return F.embedding(index, self.vectors) if self.vectors is not None else self._at(index)

    def _at(self, index: Tensor | None) -> Tensor:
        def rows(tensor: Tensor | None) -> Tensor | None:
            return tensor if index is None or tensor is None else F.embedding(index, tensor)

        gates = self.adaptor.gates(rows(self.logits), rows(self.deviation))  # [P, E]
        if self.hidden is None:
            dropped = DroppedExperts.apply(self.x, index, gates, self.adaptor.weight, self.adaptor.dropout)
            return dropped - gates @ self.adaptor.constant()
        return weighted(rows(self.hidden.flatten(1)).view(-1, *self.hidden.shape[1:]), gates)


def weighted(hidden: Tensor, gates: Tensor) -> Tensor:
    """Sum over the experts: [n, E, D], [n, E] -> [n, D]."""
    return torch.bmm(gates.unsqueeze(1), hidden).squeeze(1)


class DroppedExperts(torch.autograd.Function):
    """sum_k g_k W_k Dropout_k(x), in blocks of rows.

    What is kept for the backward pass is which values were kept, one byte each, and the experts' products; the dropped
    inputs, 4 E F bytes a row, are made again. Rows are frozen and get no gradient, so that the backward pass has one
    matrix product, that of W; the gates' gradient comes out of the experts' products.

    Args:
        x: [n, F].
        index: [P], rows of x; None for all of them in their order.
        gates: [P, E].
        weight: [E, D, F].
        p: probability of dropping a value, to a multiple of 1/65536.

    Returns:
        [P, D].
    """

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor | None, gates: Tensor, weight: Tensor, p: float) -> Tensor:
        n, (n_experts, width_out, width_in) = len(gates), weight.shape
        n_dropped = dropped_of_65536(p)
        ctx.scale = 65536 / (65536 - n_dropped)
        kept = torch.empty(n_experts, n, width_in, dtype=torch.bool, device=x.device)
        hidden = x.new_empty(n_experts, n, width_out)
        result = x.new_empty(n, width_out)
        for rows, inputs in _blocks(x, index, n):
            part = kept[:, rows]  # [E, b, F]
            draw_kept(part, n_dropped)
            products = torch.bmm(part.to(x.dtype).mul_(inputs), weight.transpose(1, 2)).mul_(ctx.scale)  # [E, b, D]
            hidden[:, rows] = products
            result[rows] = (products * gates[rows].T.unsqueeze(-1)).sum(0)
        ctx.save_for_backward(x, index, gates, kept, hidden)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, index, gates, kept, hidden = ctx.saved_tensors
        grad_gates = torch.empty_like(gates)
        grad_weight = x.new_zeros(len(hidden), hidden.shape[2], x.shape[1])
        for rows, inputs in _blocks(x, index, len(gates)):
            part = grad[rows]  # [b, D]
            grad_gates[rows] = (hidden[:, rows] * part).sum(-1).T
            shares = part * (ctx.scale * gates[rows]).T.unsqueeze(-1)  # [E, b, D]
            grad_weight.baddbmm_(shares.transpose(1, 2), kept[:, rows].to(x.dtype).mul_(inputs))
        return None, None, grad_gates, grad_weight, None


def _blocks(x: Tensor, index: Tensor | None, n: int) -> Iterator[tuple[slice, Tensor]]:
    """Rows x[index], or x, some at a time: where they are, and [b, F]."""
    size = BLOCK if x.device.type == "cpu" else 16 * BLOCK  # what a cache holds; few and large calls
    for start in range(0, n, size):
        rows = slice(start, min(start + size, n))
        yield rows, x[rows] if index is None else x.index_select(0, index[rows])


def draw_kept(out: Tensor, n_dropped: int) -> None:
    """Fill a mask: each value is False with probability ``n_dropped`` / 65536."""
    if out.device.type == "cpu":
        torch.ge(random_int16(out.shape), n_dropped - 32768, out=out)
    else:
        out.copy_(torch.rand(out.shape, device=out.device) >= n_dropped / 65536)
