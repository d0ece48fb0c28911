"""One measurement of `python -m benchmarks`, in a process of its own.

time      values are equal; then steps and evaluations, ours and literal in turn; operations counted; freed memory is
          kept in ours, as our runner does, and not in the literal version
memory    the most that an evaluation and two training steps take, one side alone
start-up  from the files to a model that can be trained, one side alone
"""

from __future__ import annotations

import gc
import resource
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.calibration import calibrate
from benchmarks.cases import CASES, Case, NotEqualError, Ranked, Sizes
from benchmarks.clocks import Clock, Peak, Trained, give_back_freed_memory, load_libraries
from benchmarks.flops import flop_of
from benchmarks.startup import start_up
from recbole_mm.allocation import keep_freed_memory

NOT_EQUAL, NO_MEMORY = 3, 4  # exit statuses


class Timed:
    """Calls of one side, as many as its seconds allow.

    Args:
        run: takes one of ``batches``.
        batches: the first is for warming up.
        budget: seconds that all calls together may take; where the first call leaves no time for another, it counts
            itself, and ``warm`` is False.
        scale: what a call's seconds stand for, such as 39 where one batch of 39 is evaluated.
        ours: freed memory is kept, as our runner does, and operations are counted, in one call more; otherwise
            memory is as in a program that does nothing about it.
    """

    def __init__(
        self,
        run: Callable,
        batches: Sequence,
        *,
        budget: float = float("inf"),
        scale: float = 1.0,
        ours: bool = False,
    ) -> None:
        self.run, self.batches, self.budget, self.scale = run, list(batches), budget, scale
        self.counts, self.allocate = ours, keep_freed_memory if ours else give_back_freed_memory
        self.first, self.samples, self.spent, self.flop = None, [], 0.0, 0

    def warm_up(self, clock: Clock) -> None:
        self.allocate()
        if self.counts:
            self.flop = flop_of(lambda: self.run(self.batches[0]))
        self.first = self.spent = clock.seconds(lambda: self.run(self.batches[0]))

    def sample(self, number: int, clock: Clock) -> None:
        """The ``number``-th call after the first, if there is time."""
        if number < len(self.batches) and self.spent + self.first <= self.budget:
            self.allocate()
            self.samples.append(clock.seconds(lambda: self.run(self.batches[number])))
            self.spent += self.samples[-1]

    def to_dict(self) -> dict:
        seconds = [self.scale * value for value in self.samples or [self.first]]
        told = {
            "value": statistics.median(seconds),
            "samples": seconds,
            "warm": bool(self.samples),
            "scale": self.scale,
        }
        return told | ({"gflop": self.scale * self.flop / 1e9} if self.counts else {})


def alternately(sides: dict[str, Timed], clock: Clock) -> dict[str, dict]:
    """All sides warm up, then are called in turn."""
    for side in sides.values():
        side.warm_up(clock)
    for number in range(1, max(len(side.batches) for side in sides.values())):
        for side in sides.values():
            side.sample(number, clock)
    return {name: side.to_dict() for name, side in sides.items()}


def on(device: str, batches: list) -> list:
    return [{field: values.to(device) for field, values in batch.items()} for batch in batches]


# ---------------------------------------------------------------- time


def time_of(case: Case, *, literal: bool, repeats: int, budget: float, clock: Clock) -> dict[str, dict]:
    """Seconds of steps, evaluations and the item tower, with the operations of their matrix products."""
    device, found = clock.device, {"differences": case.check()}
    ours = case.ours().to(device)
    sides = {"ours": Timed(Trained(ours), on(device, case.training(repeats + 1)), ours=True)}
    slow = None
    if literal:
        slow = case.literal(ours).to(device)
        few = on(device, case.training(repeats + 1))
        sides["literal"] = Timed(Trained(slow), few, budget=budget)
        if case.shipped_in_anomaly_mode:
            sides["as shipped"] = Timed(Trained(slow, anomaly_mode=True), few, budget=budget)
    found["training step"] = alternately(sides, clock)

    if hasattr(case, "item_tower"):
        run = case.item_tower(ours)
        found["item tower"] = alternately({"ours": Timed(lambda _: run(), [None] * (repeats + 1), ours=True)}, clock)

    if case.evaluates:
        batches = on(device, case.evaluation())
        sides = {"ours": Timed(Ranked(ours, case.rank), [batches] * (repeats + 1), ours=True)}
        if slow is not None:
            batches = on(device, case.evaluation(case.literal_evaluation_batch))
            one = [batches[:1]] * 3  # the literal version computes all anew for each batch: one stands for all
            sides["literal"] = Timed(Ranked(slow, case.literal_rank), one, budget=budget, scale=len(batches))
        found["evaluation"] = alternately(sides, clock)
    return found


# ---------------------------------------------------------------- memory


def memory_of(case: Case, side: str, device: str) -> dict[str, dict]:
    """MiB at the highest, and how many came on top of what the imports take: an evaluation, then two steps, so that
    the optimizer's state is there in the second."""
    training = on(device, case.training(2))
    size, rank = (None, case.rank) if side == "ours" else (case.literal_evaluation_batch, case.literal_rank)
    evaluation = on(device, case.evaluation(size)[:2]) if case.evaluates else None
    peak, found = Peak(device), {}
    model = case.ours().to(device)
    if side == "literal":
        model = case.literal(model).to(device)
    gc.collect()
    if evaluation:
        peak.restart()
        Ranked(model, rank)(evaluation)
        found["memory, evaluation"] = peak.mib()
        model.train()
    peak.restart()
    step = Trained(model)
    for batch in training:
        step(batch)
    return found | {"memory, training": peak.mib()}


def limit_memory(mib: float) -> None:
    """Let this process fail, and no other, where it needs more."""
    resource.setrlimit(resource.RLIMIT_DATA, (int(mib * 2**20), resource.RLIM_INFINITY))


# ---------------------------------------------------------------- one process


@dataclass(frozen=True)
class Task:
    """One measurement.

    Attributes:
        what: "time", "memory" or "start-up".
        case: a key of `benchmarks.cases.CASES`.
        side: "ours", "literal", or of times "both".
        repeats, budget, sizes, device, clock, threads, calibration: see `benchmarks.measuring.Options`.
        limit_mib: of memory; more fails.
        folder: of the made-up files, for start-up.
    """

    what: str
    case: str
    items: int
    side: str
    repeats: int
    budget: float
    sizes: Sizes
    device: str
    clock: str
    threads: int
    calibration: float
    limit_mib: float | None = None
    folder: Path | None = None


def answer(task: Task) -> dict:
    """Measure, in the process where this is called.

    Raises:
        SystemExit: with `NOT_EQUAL` or `NO_MEMORY`, the reason on stderr.
    """
    sys.argv = sys.argv[:1]  # RecBole reads it too
    torch.autograd.set_detect_anomaly(False)  # some of RecBole's modules switch it on when imported
    warnings.filterwarnings("ignore", message="Anomaly Detection has been enabled")
    torch.set_num_threads(task.threads)
    if task.limit_mib is not None:
        limit_memory(task.limit_mib)
    load_libraries(task.device)
    try:
        return _measure(task)
    except NotEqualError as error:
        print(error, file=sys.stderr)
        raise SystemExit(NOT_EQUAL) from None
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error) and not isinstance(error, MemoryError):
            raise
        print(f"out of memory: {str(error).splitlines()[0] if str(error) else 'no more'}", file=sys.stderr)
        raise SystemExit(NO_MEMORY) from None


def _measure(task: Task) -> dict:
    clock = Clock(task.device, task.clock)
    if task.what == "start-up":
        if task.side == "ours":
            keep_freed_memory()
        return start_up(task.folder, CASES[task.case].model, task.side, clock=clock)
    case = CASES[task.case](task.items, task.sizes)
    if task.what == "memory":
        if task.side == "ours":
            keep_freed_memory()  # as our runner does
        return memory_of(case, task.side, task.device)
    before = calibrate(clock, seconds_each=task.calibration)
    found = time_of(case, literal=task.side == "both", repeats=task.repeats, budget=task.budget, clock=clock)
    after = calibrate(clock, seconds_each=task.calibration)
    return found | {"calibration": max(before, after, key=lambda rates: rates.gflops).to_dict()}
