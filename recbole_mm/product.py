"""Many runs, one command: the product of models, datasets, knock-outs and seeds, and the table of what came out.

plan --> searched, if asked for --> to do --> `runner.execute` --> results/runs.jsonl --> table
           done already: told, and not run again                         |
                     ^                                                   |
                     +------------------ next run of the same command <--+
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from recbole_mm.errors import SettingError
from recbole_mm.plan import Job, find_done, find_failed, make_plan
from recbole_mm.records import RUNS_FILE, Records, RunRecord, load
from recbole_mm.runner import EXIT_FAILED, execute


def run_product(
    models: Sequence[str],
    datasets: Sequence[str],
    *,
    seeds: Sequence[int] = (),
    knockouts: str | None = None,
    floors: bool = False,
    n_jobs: int | None = None,
    dry_run: bool = False,
    runs_file: Path | str = RUNS_FILE,
    cluster: str | None = None,
    config_files: Sequence[str | Path] = (),
    settings: Mapping[str, Any] | None = None,
    origins: Mapping[str, str] | None = None,
    choose: Callable[[list[Job]], list[Job]] | None = None,
) -> int:
    """Run the product of models, datasets, knock-outs and seeds, without what is done already, and print the table.

    Args:
        n_jobs: runs at once; None is one, or one per machine or GPU of a cluster.
        dry_run: print the plan and run nothing.
        cluster: "ray", or the address of a Ray cluster; None runs on this machine.
        choose: gives jobs their settings before they run, as a search does; not called for a dry run.
        others: as in `plan.make_plan`.

    Returns:
        Exit code: 0 if all runs are done, 1 if some failed.

    Raises:
        SettingError, DatasetError: something cannot run; nothing has run.
        KeyboardInterrupt: after the children have ended and what remains is told.
    """
    runs_file = Path(runs_file)
    jobs = make_plan(
        models, datasets, seeds=seeds, knockouts=knockouts, floors=floors,
        config_files=config_files, settings=settings, origins=origins, tell=lambda text: print(f"note: {text}"),
    )  # fmt: skip
    if choose is not None and not dry_run:
        jobs = choose(jobs)
    known = load(runs_file) if runs_file.is_file() else None
    for problem in known.problems if known else []:
        print(f"note: {problem}")
    records = known.records if known else []
    done, failed = find_done(jobs, records), find_failed(jobs, records)
    lines = _Lines(jobs)
    n_done = sum(record is not None for record in done)
    print(f"{_runs(len(jobs))}, {n_done} of them done already in {runs_file}", flush=True)
    for number, (record, failure) in enumerate(zip(done, failed, strict=True)):
        if record is not None:
            lines.tell(number, f"done already: {_score(record)}, run {record.run_id or record.started}")
        elif failure is not None:
            lines.tell(number, f"failed before, will be tried again: {failure.error}")
        elif dry_run:
            lines.tell(number, "to run")
    if dry_run:
        return 0
    to_do = [number for number, record in enumerate(done) if record is None]
    results: dict[int, RunRecord] = {number: record for number, record in enumerate(done) if record is not None}

    def on_done(position: int, record: RunRecord) -> None:
        results[to_do[position]] = record
        lines.tell(to_do[position], _outcome(record))

    try:
        with lines.bar(len(to_do)):
            execute(
                [jobs[number] for number in to_do], n_jobs=n_jobs, runs_file=runs_file, on_done=on_done, cluster=cluster
            )
    except KeyboardInterrupt:
        remaining = len(jobs) - sum(record.status == "done" for record in results.values())
        print(
            f"interrupted: {len(jobs) - remaining} of {_runs(len(jobs))} are done and kept in {runs_file}; the same "
            f"command goes on with the other {remaining}, those under way from their beginning",
            flush=True,
        )
        raise
    broken = [number for number in sorted(results) if results[number].status == "failed"]
    _print_table([results[number] for number in sorted(results)], runs_file)
    if broken:
        print(f"\n{len(broken)} of {_runs(len(jobs))} failed; the same command tries them again")
    return EXIT_FAILED if broken else 0


# ------------------------------------------------ its arguments


def parse_seeds(text: str) -> list[int]:
    """The seeds of ``2020,2021``.

    Raises:
        SettingError: no whole numbers of at least 0, or one twice.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise SettingError(f"--seeds: cannot read {text!r}; it should look like 2020,2021,2022, whole numbers from 0")
    seeds = [int(part) for part in parts]
    if twice := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
        raise SettingError(f"--seeds names {twice[0]} twice; the same seed gives the same run")
    return seeds


def parse_names(text: str | None, what: str) -> list[str]:
    """The names of ``A,B``; none for None.

    Raises:
        SettingError: an empty name.
    """
    names = [name.strip() for name in text.split(",")] if text is not None else []
    if not all(names):
        raise SettingError(f"--{what}: cannot read {text!r}; it should look like A,B")
    return names


# ------------------------------------------------ what it prints


class _Lines:
    """One line for each run, and a bar below them if somebody watches."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs, self._bar = jobs, None

    def bar(self, n_runs: int) -> _Lines:
        if n_runs and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=n_runs, unit="run", leave=False, dynamic_ncols=True)
        return self

    def __enter__(self) -> None:
        if self._bar is not None:
            self._bar.refresh()

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def tell(self, number: int, text: str) -> None:
        width = len(str(len(self._jobs)))
        line = f"[{number + 1:{width}}/{len(self._jobs)}] {self._jobs[number].title}: {text}"
        if self._bar is None:
            print(line, flush=True)
        else:
            self._bar.write(line)
            self._bar.update()


def _runs(n: int) -> str:
    return f"{n} run{'' if n == 1 else 's'}"


def _score(record: RunRecord) -> str:
    metric = str(record.settings.get("valid_metric", "")).lower()
    if metric not in record.test:
        return f"valid {metric} {record.valid[metric]:.4f}" if metric in record.valid else "done"
    valid = f" (valid {record.valid[metric]:.4f})" if metric in record.valid else ""
    return f"{metric} {record.test[metric]:.4f}{valid}"


def _outcome(record: RunRecord) -> str:
    seconds = f"{sum(record.seconds.values()):.0f} s"
    if record.status == "failed":
        return f"FAILED after {seconds}: {record.error}"
    warned = "".join(f"; {warning}" for warning in record.warnings)
    return f"{_score(record)}, {seconds}{warned}"


def _print_table(records: Sequence[RunRecord], runs_file: Path) -> None:
    from recbole_mm.leaderboard import board, tables

    if all(record.status == "failed" for record in records):
        print("\nno run is done, so there is no table")
        return
    found = board.build(Records(list(records), []), results_folder=runs_file.parent).to_dict()
    for table in found["tables"]:
        print(f"\n{tables.terminal(table)}")
    for problem in found["problems"]:
        print(f"note: {problem}")
    print(f"\nas a page, Markdown, LaTeX and CSV: python -m recbole_mm.leaderboard {runs_file}", flush=True)
