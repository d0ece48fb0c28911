"""What the processes of a shared training tell each other inside a forward pass, with gradients.

A model asks `Alone`, which knows of one process and changes nothing. While several processes share a training, they ask
`Together` instead, if the model wants it. All of them must ask the same things in the same order.

Gradients: each process goes backward from its own loss, and `recbole_mm.shared_training` takes the mean of the
gradients of all, losses weighted so that their mean over the processes is the loss of the whole batch. Here the
gradient of what was told is the sum over those who heard it, so that the mean is that of one process with the whole
batch.

Cost: what is told is sent once forward, as many bytes of each process as the one with most has, and its gradient once
back; a loss of b rows among B costs each process b x B, not B x B.

Shapes: b own rows, B rows of all processes.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class OwnRows:
    """The rows of a batch, when there are no others.

    Attributes:
        places: [b], where the own rows are among those of all; None for the first, second, ... of them.
    """

    places: Tensor | None = None

    def of_all(self, x: Tensor) -> Tensor:
        """One entry per row, of all processes' rows: [b, ...] -> [B, ...]."""
        return x


class Alone:
    """A process that nobody listens to: everything is its own."""

    def same(self, number: Tensor) -> Tensor:
        """A number that was drawn, the first process' in all of them."""
        return number

    def rows(self, n_rows: int, device: torch.device) -> OwnRows:
        """The rows of this batch, of which ``n_rows`` are here."""
        return OwnRows()

    def part(self, x: Tensor) -> Tensor:
        """Those of n things that this process works on, such as the items: [n, ...] -> [its part, ...]."""
        return x

    def whole(self, x: Tensor, n: int) -> Tensor:
        """What all have made of their parts of n things, in the things' order: [its part, ...] -> [n, ...]."""
        return x

    def mean(self, x: Tensor, n: int) -> Tensor:
        """The mean over n things, out of the mean over those of `part`."""
        return x


class Together(Alone):
    """One process of several.

    Args:
        group: that tensors of the model's device go through, None for the default one.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.rank = torch.distributed.get_rank()
        self.n_processes = torch.distributed.get_world_size()
        self.spare = False  # the rows of this process are none of the batch, but repeat the first one

    @torch.no_grad()
    def same(self, number: Tensor) -> Tensor:
        group = self.group if number.is_cuda else None  # a model may draw on the CPU, wherever it computes
        torch.distributed.broadcast(number, src=0, group=group)
        return number

    def rows(self, n_rows: int, device: torch.device) -> OwnRows:
        counts = torch.zeros(self.n_processes, dtype=torch.long, device=device)
        counts[self.rank] = 0 if self.spare else n_rows
        torch.distributed.all_reduce(counts, group=self.group)
        return _RowsOfAll(self, counts.tolist(), n_rows, device)

    def part(self, x: Tensor) -> Tensor:
        counts = self._counts(len(x))
        return x[sum(counts[: self.rank]) :][: counts[self.rank]]

    def whole(self, x: Tensor, n: int) -> Tensor:
        return self.gathered(x, self._counts(n))

    def mean(self, x: Tensor, n: int) -> Tensor:
        return _Sum.apply(x * (self._counts(n)[self.rank] / max(n, 1)), self.group)

    def _counts(self, n: int) -> list[int]:
        """How many of n things each process has; they are next to each other."""
        ends = [n * i // self.n_processes for i in range(self.n_processes + 1)]
        return [stop - start for start, stop in pairwise(ends)]

    def gathered(self, x: Tensor, counts: list[int]) -> Tensor:
        """The entries of all, the first process' first, ``counts`` of each; of the own ones the first are taken."""
        return _Gathered.apply(x[: counts[self.rank]], counts, self.rank, self.group)


class _RowsOfAll(OwnRows):
    def __init__(self, together: Together, counts: list[int], n_rows: int, device: torch.device) -> None:
        self.together, self.counts = together, counts
        start = sum(counts[: together.rank])
        self.places = torch.arange(n_rows, device=device) + start
        if together.spare:
            self.places = torch.zeros_like(self.places)  # the row that is repeated, of the first process

    def of_all(self, x: Tensor) -> Tensor:
        return self.together.gathered(x, self.counts)


class _Gathered(torch.autograd.Function):
    """Tensors of all processes, one behind the other; the shorter ones travel with zeros behind them."""

    @staticmethod
    def forward(ctx, x: Tensor, counts: list[int], rank: int, group: Any) -> Tensor:
        ctx.start, ctx.stop, ctx.group = sum(counts[:rank]), sum(counts[: rank + 1]), group
        own = x.new_zeros(max(counts), *x.shape[1:])
        own[: len(x)] = x
        parts = [torch.empty_like(own) for _ in counts]
        torch.distributed.all_gather(parts, own, group=group)
        return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return _summed(grad, ctx.group)[ctx.start : ctx.stop], None, None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _summed(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return _summed(grad, ctx.group), None


def _summed(x: Tensor, group: Any) -> Tensor:
    """A copy, summed over the processes."""
    x = x.clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(x, group=group)
    return x
