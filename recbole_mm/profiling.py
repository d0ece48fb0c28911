"""Where the time of a run goes: some steps of training and evaluation under PyTorch's profiler.

run --profile --> first steps as they are --> five steps watched --> trace, for chrome://tracing or perfetto.dev
                                                              +--> table: parts of a step, and its costliest operations

Watching changes nothing of what is computed, but takes time itself: the seconds of such a run are no measure.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from recbole_mm.data.files import write_atomically

NOT_COMPARABLE = "profiled with --profile, which takes time itself: do not compare the seconds of this run with others"
WARM_UP, WATCHED, N_COSTLIEST = 5, 5, 10
PARTS = ("make the batch", "move the batch", "forward and loss", "backward", "optimizer", "scores", "ranks")

# What an operation does, by the beginning of its name; the first that fits counts.
KINDS = (
    ("matrix product", ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "dot", "mv", "addmv", "mkldnn_linear")),
    ("attention", ("scaled_dot_product", "_scaled_dot_product", "_flash_attention", "_efficient_attention")),
    ("softmax", ("softmax", "_softmax", "log_softmax", "_log_softmax", "logsumexp", "nll_loss", "cross_entropy")),
    ("normalisation", ("layer_norm", "native_layer_norm", "batch_norm", "linalg_vector_norm", "norm")),
    ("random numbers", ("random_", "rand", "randn", "bernoulli", "native_dropout", "dropout", "uniform_", "normal_")),
    ("rows of a table", ("embedding", "_embedding", "index", "_index", "gather", "scatter", "take", "masked_select")),
    ("copy", ("copy_", "clone", "cat", "resize_", "stack", "to", "_to_copy", "repeat", "fill_", "zero_", "empty")),
    ("sum or order", ("sum", "mean", "max", "min", "amax", "sort", "argsort", "topk", "cumsum", "_unique2")),
    ("optimizer", ("_foreach", "_fused_adam", "addcmul_", "addcdiv_", "lerp_")),
    ("book-keeping", ("view", "as_strided", "slice", "select", "t", "transpose", "permute", "expand", "detach")),
    ("recurrence", ("gru", "lstm", "rnn", "_thnn", "mkldnn_rnn", "quantized_gru")),
)  # fmt: skip


def labelled(items: Iterable[Any], name: str) -> Iterator[Any]:
    """The same items; the making of each one is a part of a profile."""
    items = iter(items)
    while True:
        with record_function(name):
            item = next(items, labelled)
        if item is labelled:
            return
        yield item


class Operation(NamedTuple):
    """One row of a table.

    Attributes:
        name: of a part of a step, or of an operation of PyTorch's.
        kind: what it does, "" for a part of a step.
        calls: a step.
        seconds: a step; of an operation without those that it calls.
        share: of the step.
    """

    name: str
    kind: str
    calls: float
    seconds: float
    share: float


@dataclass(frozen=True)
class Summary:
    """Where the time of some steps went.

    Attributes:
        what: such as "finetune, training".
        n_steps: that were watched.
        seconds: of one of them, on the processor; the profiler's own time is in it.
        device: "CPU" or "GPU", whose time operations are told in.
        parts, costliest: dearest first.
        trace: file.
    """

    what: str
    n_steps: int
    seconds: float
    device: str
    parts: list[Operation]
    costliest: list[Operation]
    trace: Path

    def __str__(self) -> str:
        lines = [f"{self.what}: {self.n_steps} steps watched, {1000 * self.seconds:.1f} ms each"]
        lines += [f"  {part.name:<52}{'':>10} {_cells(part)}" for part in self.parts]
        title = f"costliest operations, their own time on the {self.device}"
        lines.append(f"  {title:<52} {'calls':>9} {'ms':>9} {'share':>6}")
        lines += [f"  {f'{each.name} ({each.kind})':<52} {each.calls:>9.1f} {_cells(each)}" for each in self.costliest]
        return "\n".join([*lines, f"  trace: {self.trace}, for chrome://tracing or https://ui.perfetto.dev"])


def _cells(operation: Operation) -> str:
    return f"{1000 * operation.seconds:>9.2f} {100 * operation.share:>5.1f}%"


def kind_of(name: str) -> str:
    """What an operation does, from its name such as "aten::addmm" or "Optimizer.step#Adam.step"."""
    if name.startswith("Optimizer"):
        return "optimizer"
    library, _, name = name.rpartition("::")
    if library != "aten":
        return "book-keeping"
    for kind, beginnings in KINDS:
        if any(name == each or name.startswith(f"{each}_") for each in beginnings):
            return kind
    return "element by element"


class Profiler:
    """Watches some steps of each stage's training and evaluation, and keeps what they cost.

    The first steps of a stage pass unwatched, as does its first evaluation, unless there will be no other: caches fill
    and memory is taken then. Of an evaluation, a step is a block of rows.

    Args:
        folder: where traces go.
        stem: how their names begin, such as the run's id.
        device: of the training.
    """

    def __init__(self, folder: Path, stem: str, device: torch.device) -> None:
        self.folder, self.stem, self.device = Path(folder), stem, device
        self.summaries: list[Summary] = []
        self._seen: set[str] = set()

    def training(self, batches: Iterable[Any], *, stage: str, n_batches: int, last: bool) -> Iterator[Any]:
        """The same batches; some of the first epoch of a stage are watched, of the second one where they are few."""
        what, first = f"{stage}, training", f"{stage}, first epoch"
        few = n_batches < WARM_UP + WATCHED and first not in self._seen and not last
        self._seen.add(first)
        if what in self._seen or few:
            return iter(batches)
        watched = min(WATCHED, n_batches)
        return self._watched(batches, what, skipped=min(WARM_UP, n_batches - watched), watched=watched)

    def evaluation(self, blocks: Iterable[Any], *, stage: str, last: bool) -> Iterator[Any]:
        """The same blocks; some of the second evaluation of a stage, or of the ``last``, are watched."""
        what, first = f"{stage}, evaluation", f"{stage}, first evaluation"
        if what in self._seen or (first not in self._seen and not last):
            self._seen.add(first)
            return iter(blocks)
        return self._watched(blocks, what, skipped=0, watched=WATCHED)

    def _watched(self, items: Iterable[Any], what: str, *, skipped: int, watched: int) -> Iterator[Any]:
        self._seen.add(what)
        items, n_steps = iter(items), 0
        yield from islice(items, skipped)
        with _profile(self.device) as profiler:
            for n_steps, item in enumerate(items, start=1):  # noqa: B007
                yield item
                if n_steps == watched:
                    break
        if n_steps:
            self._keep(profiler, what, n_steps)
        yield from items

    def _keep(self, profiler: profile, what: str, n_steps: int) -> None:
        path = self.folder / f"{self.stem}-{what.replace(', ', '-')}.json.gz"
        with tempfile.TemporaryDirectory() as folder:
            exported = Path(folder) / path.name
            profiler.export_chrome_trace(str(exported))
            write_atomically(path, lambda out: out.write(exported.read_bytes()))
        self.summaries.append(summary_of(profiler, what, n_steps, path, on_gpu=self.device.type == "cuda"))

    def __str__(self) -> str:
        return "\n".join([*map(str, self.summaries or ["no step was profiled"]), NOT_COMPARABLE])


@contextlib.contextmanager
def _profile(device: torch.device) -> Iterator[profile]:
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiler:
        yield profiler
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def summary_of(profiler: profile, what: str, n_steps: int, trace: Path, *, on_gpu: bool) -> Summary:
    """What the steps that a profiler watched cost."""
    events = [event for event in profiler.key_averages() if event.device_type == DeviceType.CPU]  # not GPU's copies
    times = {event.key: event for event in events}
    parts = [
        Operation(name, "", times[name].count / n_steps, times[name].cpu_time_total / 1e6 / n_steps, 0.0)
        for name in PARTS
        if name in times
    ]
    seconds = sum(part.seconds for part in parts)
    own = {
        event.key: (event.count, event.self_device_time_total if on_gpu else event.self_cpu_time_total)
        for event in events
        if event.key not in PARTS
    }
    whole = sum(time for _, time in own.values()) / 1e6 / n_steps if on_gpu else seconds
    costliest = []
    for name, (count, time) in sorted(own.items(), key=lambda item: -item[1][1])[:N_COSTLIEST]:
        each, label = time / 1e6 / n_steps, name.removeprefix("aten::")
        costliest.append(Operation(label, kind_of(name), count / n_steps, each, each / max(whole, 1e-12)))
    parts = [part._replace(share=part.seconds / max(seconds, 1e-12)) for part in parts]
    parts.sort(key=lambda part: -part.seconds)
    return Summary(what, n_steps, seconds, "GPU" if on_gpu else "CPU", parts, costliest, trace)
