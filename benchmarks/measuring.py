"""All measurements of `python -m benchmarks`, one process after the other, and what is left out and why."""

from __future__ import annotations

import shutil
import signal
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from benchmarks.cases import CASES, QUICK, Sizes
from benchmarks.clocks import MEMORY_FILE, Failed, Processes, entry_of, times_as_fast
from benchmarks.one_case import NO_MEMORY, NOT_EQUAL, Task
from benchmarks.startup import write_folder

USABLE = 0.9  # of the memory at hand
OURS, LITERAL, SHIPPED = "ours", "literal", "as shipped"


@dataclass(frozen=True)
class Options:
    """What is measured, and how.

    Attributes:
        cases: keys of `benchmarks.cases.CASES`.
        items: numbers of items, ascending.
        repeats: calls of each side that count.
        budget: seconds that the calls of a literal version may take in one measurement.
        sizes: of the made-up data.
        device: "cpu" or "cuda".
        clock: "wall" or "processor".
        threads: of torch.
        calibration: seconds of each matrix product that tells the machine's rate.
    """

    cases: Sequence[str] = tuple(CASES)
    items: Sequence[int] = (1000, 5000, 20_000)
    repeats: int = 3
    budget: float = 40.0
    sizes: Sizes = field(default_factory=Sizes)
    device: str = "cpu"
    clock: str = "wall"
    threads: int = 2
    calibration: float = 0.15

    def n_processes(self) -> int:
        return len(self.items) * (3 * len(self.cases) + 2 * self.repeats * len(_started(self.cases)))

    def to_dict(self) -> dict:
        return asdict(self)


def toy(options: Options) -> Options:
    """The same in less than a minute."""
    return replace(options, items=(200, 600), repeats=1, budget=5.0, sizes=QUICK, calibration=0.02)


def measure_all(options: Options, *, step: Callable[[str], None], say: Callable[[str], None]) -> list[dict]:
    """A row for each case, measure and number of items.

    Args:
        step: called before each process, with what it measures.
        say: for what is left out.
    """
    processes, rows = Processes("benchmarks.one_case", threads=options.threads), []
    for case in options.cases:
        one = _OneCase(case, options, processes, step, say)
        for n_items in options.items:
            rows += one.measure(n_items)
    for case in _started(options.cases):
        one = _OneCase(case, options, processes, step, say)
        for n_items in options.items:
            rows += one.start(n_items)
    return rows


def _started(cases: Sequence[str]) -> list[str]:
    """One case of each model: both stages of one start alike."""
    return list({CASES[case].model: case for case in cases}.values())


class _OneCase:
    def __init__(self, case: str, options: Options, processes: Processes, step, say) -> None:
        self.case, self.options, self.processes, self.step, self.say = case, options, processes, step, say
        self.name = CASES[case].name
        self.seconds: dict[int, float] = {}  # of the literal step, by items
        self.mib: dict[int, float] = {}  # of the literal version

    # ------------------------------------------------ steps, evaluations, memory

    def measure(self, n_items: int) -> list[dict]:
        skipped = self._too_much(n_items)
        timed = self._run("time", n_items, OURS if skipped else "both")
        if "failed" in timed and not skipped and timed["status"] == NO_MEMORY:
            skipped, timed = timed["failed"], self._run("time", n_items, OURS)
        if "failed" in timed:
            return [self._row("training step", n_items, {OURS: {"failed": timed["failed"]}}, {})]
        rows = []
        for measure in ("training step", "item tower", "evaluation"):
            if measure in timed:
                sides = timed[measure]
                if skipped and measure != "item tower":
                    sides[LITERAL] = {"skipped": skipped}
                rows.append(self._row(measure, n_items, sides, timed["calibration"]))
        if LITERAL in timed["training step"] and not skipped:
            self.seconds[n_items] = timed["training step"][LITERAL]["value"]
        return rows + self._memory(n_items, skipped)

    def _memory(self, n_items: int, skipped: str | None) -> list[dict]:
        found = {OURS: self._run("memory", n_items, OURS)}
        if skipped:
            self.step(f"{self.name}, {n_items:,} items: memory of the literal version left out")
        else:
            found[LITERAL] = self._run("memory", n_items, LITERAL)
        rows = []
        for measure in ("memory, training", "memory, evaluation"):
            if measure == "memory, evaluation" and not CASES[self.case].evaluates:
                continue
            sides = {side: _memory_side(result, measure) for side, result in found.items()}
            sides.setdefault(LITERAL, {"skipped": skipped})
            rows.append(self._row(measure, n_items, sides, {}, unit="MiB"))
        if "value" in (training := rows[0][LITERAL]):
            self.mib[n_items] = training["value"]
        return rows

    def _too_much(self, n_items: int) -> str | None:
        """Why the literal version is left out, by what it took with fewer items."""
        seconds, mib = predicted(self.seconds, n_items), predicted(self.mib, n_items)
        at_hand = memory_at_hand(self.options.device)
        reason = None
        if seconds > self.options.budget:
            reason = f"a step would take about {seconds:.0f} s, more than --budget={self.options.budget:g}"
        elif mib > at_hand:
            reason = f"it would take about {mib / 1024:.1f} GiB, and {at_hand / 1024:.1f} GiB are at hand"
        if reason:
            self.say(f"{self.name}, {n_items:,} items: literal version left out, {reason}")
        return reason

    # ------------------------------------------------ start-up

    def start(self, n_items: int) -> list[dict]:
        sizes, model = self.options.sizes, CASES[self.case].model
        parent = Path(tempfile.mkdtemp(prefix="benchmarks-"))
        try:
            folder = parent / "made-up"
            write_folder(folder, model, n_items, n_users=sizes.histories, n_rows=sizes.rows, width=sizes.width)
            found: dict[str, list[dict]] = {OURS: [], LITERAL: []}
            for _ in range(self.options.repeats):  # in turns, each in a process of its own
                for side, results in found.items():
                    results.append(self._run("start-up", n_items, side, folder, name=model))
        finally:
            shutil.rmtree(parent)
        sides = {side: _start_side(results) for side, results in found.items()}
        memory = {side: _memory_side(results[0], "memory, start-up") for side, results in found.items()}
        return [
            self._row("start-up", n_items, sides, {}, name=model),
            self._row("memory, start-up", n_items, memory, {}, unit="MiB", name=model),
        ]

    # ------------------------------------------------ one process

    def _run(self, what: str, n_items: int, side: str, folder: Path | None = None, *, name: str | None = None) -> dict:
        """What the process printed, or ``failed`` and its exit status."""
        options, name = self.options, name or self.name
        self.step(f"{name}, {n_items:,} items: {what}{'' if what == 'time' else f' of {side}'}")
        limit = memory_at_hand("cpu") if side != OURS and options.device == "cpu" else None
        task = Task(
            what, self.case, n_items, side, options.repeats, options.budget, options.sizes, options.device,
            options.clock, options.threads, options.calibration, limit, folder,
        )  # fmt: skip
        try:
            return self.processes(task)
        except Failed as error:
            status, reason = error.status, str(error)
            if status == -signal.SIGKILL:
                status, reason = NO_MEMORY, "killed, probably because memory ran out"
            elif status not in (NOT_EQUAL, NO_MEMORY):
                reason = f"failed: {reason}"
            self.say(f"{name}, {n_items:,} items, {what} of {side}: {reason}")
            return {"failed": reason, "status": status}

    def _row(
        self, measure: str, n_items: int, sides: dict, calibration: Mapping, *, unit: str = "s", name: str | None = None
    ) -> dict:
        row = {"case": name or self.name, "measure": measure, "items": n_items, "unit": unit, **sides}
        ours, rate = sides[OURS], calibration.get("gflops")
        if "value" not in ours:
            return row
        if rate and ours.get("gflop"):
            row["rate"], row["of_rate"] = rate, ours["gflop"] / ours["value"] / rate
        for side, factor in ((LITERAL, "factor"), (SHIPPED, "factor_as_shipped")):
            if "value" in (other := sides.get(side, {})):
                samples = ours.get("samples", [ours["value"]]), other.get("samples", [other["value"]])
                row[factor] = times_as_fast(*samples)
        return row


def _start_side(results: Sequence[Mapping]) -> dict:
    if failed := [result for result in results if "failed" in result]:
        return {"failed": failed[0]["failed"]}
    samples = [result["start-up"] for result in results]
    return {"value": statistics.median(samples), "samples": samples}


def _memory_side(result: Mapping, measure: str) -> dict:
    if measure not in result:
        return {"failed": result.get("failed", "not measured")}
    found = result[measure]
    return {"value": found["growth_mib"], "peak": found["peak_mib"]}


def predicted(known: Mapping[int, float], n_items: int) -> float:
    """Of a cost, by the two largest N that are known: c + a N where a cost per item falls, a N + b N^2 where it rises.

    One N says nothing of the growth: the cost there is the least that more items will take. 0 where none is known.
    """
    if len(known) < 2:
        return max(known.values(), default=0.0)
    (fewer, less), (n, cost) = sorted(known.items())[-2:]
    b = (cost / n - less / fewer) / (n - fewer)
    if b < 0:
        return max(cost, cost + (cost - less) / (n - fewer) * (n_items - n))
    a = cost / n - b * n
    return cost * (n_items / n) ** 2 if a < 0 else a * n_items + b * n_items**2


def memory_at_hand(device: str) -> float:
    """MiB that a process may take."""
    if device == "cuda":
        import torch

        return USABLE * torch.cuda.mem_get_info()[0] / 2**20
    return USABLE * entry_of(MEMORY_FILE, "MemAvailable") if MEMORY_FILE.exists() else float("inf")
