"""One training on several processes: each takes its part of every batch, and all take the same step.

one batch, in the same order everywhere --+--> rows 0, 2, 4, ... --> loss, gradient --+
                                          +--> rows 1, 3, 5, ... --> loss, gradient --+--> mean gradient --> same step

``train_batch_size`` is the whole batch, so the steps are those of one process: each training row is used once per
epoch, and the loss of a process counts as much as it has rows.

A loss that takes the other rows of a batch for negatives has those of its own process only, unless the model asks for
those of all (``gather_negatives``). What depends on items alone is computed by each process for all items, unless the
model shares it out (``share_items``). Both go through `recbole_mm.model.together`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recbole_mm.data.passes import PART_WEIGHT
from recbole_mm.distributed import gathered, group_of, n_processes, rank
from recbole_mm.errors import SettingError, TrainingError
from recbole_mm.model.together import Together

SENT_AT_ONCE = 1 << 22  # numbers of a gradient, if there are so many
_TELL_APART = 1_000_003  # between the seeds of two processes


def seed_of(seed: int) -> int:
    """The seed of dropout and of negatives in this process; the first one's is the seed itself."""
    return (seed + _TELL_APART * rank()) % 2**32


def mean_of_losses(losses: float | tuple[float, ...]) -> float | tuple[float, ...]:
    """Mean over the processes of a loss, or of each of several."""
    every = gathered(losses)
    if isinstance(losses, tuple):
        return tuple(sum(column) / len(every) for column in zip(*every, strict=True))
    return sum(every) / len(every)


class _Part:
    """Collates this process' rows of a batch instead of all; one row at least, as nothing can be made of none."""

    def __init__(self, collate: Callable[[list[int]], Any], rank: int, n_processes: int) -> None:
        self.collate, self.rank, self.n_processes = collate, rank, n_processes

    def __call__(self, index: list[int]) -> Any:
        own = index[self.rank :: self.n_processes]
        return self.collate(own if len(own) else index[:1])


def split_batches(loader) -> None:
    """Let each process make its own rows of each batch; the loader draws batches in the same order everywhere."""
    if n_processes() > 1 and hasattr(loader, "take_part"):
        loader.take_part(rank(), n_processes())
    elif n_processes() > 1 and not isinstance(loader.collate_fn, _Part):
        loader.collate_fn = _Part(loader.collate_fn, rank(), n_processes())


def part_weights(n_rows: int, batch_size: int, *, rank: int, n_processes: int) -> Iterator[float]:
    """What a process' mean loss counts in each batch: its share of the rows times the number of processes.

    The mean over processes of loss times weight is then the mean over the rows of the batch.
    """
    for start in range(0, n_rows, batch_size):
        n = min(batch_size, n_rows - start)
        yield len(range(rank, n, n_processes)) * n_processes / n


class SharedTraining:
    """The training of one model in one stage by all processes.

    All begin with the first one's parameters. After each backward pass, gradients become their means over the
    processes: a parameter without a gradient in some processes counts as zero there, and one without in all is left
    alone, as it would be in one process. Buffers stay what they are: features, and what is computed from them, are the
    same everywhere, and may be files that are mapped into memory.

    Args:
        model: with ``calculate_loss``, a mean over the rows of a batch.
        optimizer: of its parameters; at its first step, gradients and parameters are compared.
        loader: the training data; its batches are split.

    Raises:
        SettingError: the model has nothing to train.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, loader, device: torch.device) -> None:
        self.model, self.loader, self.group = model, loader, group_of(device)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not self.parameters:
            raise SettingError(f"{type(model).__name__} has no parameters to train; leave --nproc out")
        for parameter in model.parameters():
            torch.distributed.broadcast(parameter.detach(), src=0, group=self.group)
        split_batches(loader)
        self.together = Together(self.group) if getattr(model, "wants_together", False) else None
        self._weights: Iterator[float] = iter(())
        self._check = optimizer.register_step_pre_hook(self._compare_gradients)

    def begin_epoch(self) -> None:
        self._weights = part_weights(
            self.loader.sample_size, self.loader.batch_size, rank=rank(), n_processes=n_processes()
        )

    def loss(self, interaction) -> Tensor | tuple[Tensor, ...]:
        """The weighted loss of this process' rows; its backward pass ends with the mean over the processes."""
        # Of passes, a process may have more or fewer targets than of rows; their loader tells.
        weight = float(interaction[PART_WEIGHT]) if PART_WEIGHT in interaction else next(self._weights)
        with self._linked(spare=weight == 0):
            losses = self.model.calculate_loss(interaction)
        if isinstance(losses, tuple):
            weighted = tuple(loss * weight for loss in losses)
            self._average_after_backward(weighted[0])
            return weighted
        self._average_after_backward(weighted := losses * weight)
        return weighted

    @contextmanager
    def _linked(self, *, spare: bool) -> Iterator[None]:
        """The model talks to the other processes in here, and nowhere else: in an evaluation they go different ways."""
        if self.together is None:
            yield
            return
        alone, self.together.spare = self.model.together, spare
        self.model.together = self.together
        try:
            yield
        finally:
            self.model.together = alone

    def _average_after_backward(self, loss: Tensor) -> None:
        # Before gradients are clipped, so not in a hook of the optimizer. DistributedDataParallel does it so, too.
        loss.register_hook(lambda _: torch.autograd.Variable._execution_engine.queue_callback(self._average))

    @torch.no_grad()
    def _average(self) -> None:
        n_users = torch.tensor([float(parameter.grad is not None) for parameter in self.parameters])
        torch.distributed.all_reduce(n_users)
        used = [parameter for parameter, n in zip(self.parameters, n_users.tolist(), strict=True) if n]
        for bucket in _buckets(used):
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
            flat = torch.cat([grad.flatten() for grad in grads])
            torch.distributed.all_reduce(flat, group=self.group)
            flat /= n_processes()
            for parameter, grad, mean in zip(bucket, grads, flat.split([p.numel() for p in bucket]), strict=True):
                parameter.grad = grad.copy_(mean.view_as(grad))

    def end_epoch(self) -> None:
        """All take the first one's running statistics, of batch normalisation, and have the same parameters.

        Raises:
            TrainingError: they have not.
        """
        for module in self.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for buffer in module.buffers():
                    torch.distributed.broadcast(buffer, src=0, group=self.group)
        require_equal("parameters", self.model.named_parameters())

    def _compare_gradients(self, *_: Any) -> None:
        self._check.remove()
        parameters = list(self.model.named_parameters())
        require_equal("parameters", parameters)
        require_equal("gradients", [(name, parameter.grad) for name, parameter in parameters])


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of one type that are sent together, until they are enough."""
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        if bucket and (parameter.dtype != bucket[0].dtype or sum(p.numel() for p in bucket) >= SENT_AT_ONCE):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


def require_equal(what: str, tensors: Iterable[tuple[str, Tensor | None]]) -> None:
    """Compare tensors of all processes by their lengths, in float64: one number each.

    Raises:
        TrainingError: in all processes, if any differ by more than rounding; naming the first.
    """
    named = list(tensors)
    lengths = [
        None if t is None else float(torch.linalg.vector_norm(t.detach(), dtype=torch.float64)) for _, t in named
    ]
    first, *others = gathered(lengths)
    for number, theirs in enumerate(others, start=2):
        for (name, _), a, b in zip(named, first, theirs, strict=True):
            same = a is b is None or (None not in (a, b) and np.isclose(a, b, rtol=1e-6, atol=0, equal_nan=True))
            if not same:
                raise TrainingError(
                    f"the {what} of {n_processes()} processes are not the same: {name} has length {a} in the first "
                    f"process and {b} in process {number}, so they do not train one model\n"
                    "  something in the model changes parameters or gradients by itself; leave --nproc out"
                )
