"""Search of hyper-parameters: the same number of trials for each model, judged on validation data alone.

What is searched stands in a YAML file, see `search_space`. The first trial has the settings as they are given, or by
default; the others are proposed by Optuna's TPE sampler. A trial is no result: it never touches the test set, and is
kept in ``search/<dataset>-<model>-<hash of the space>.log`` beside the file of runs, from which an interrupted search
goes on. Trial n depends on the seed, on n and on the trials before it, so that an interrupted search ends where an
uninterrupted one does.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from recbole_mm.errors import SettingError, TrainingError
from recbole_mm.records import RUNS_FILE, RunRecord
from recbole_mm.search_space import Dimension, Space, dimensions_of, encoded, read_space, size_of, space_hash

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial

    from recbole_mm.plan import Job

FOLDER = "search"  # beside the file of runs
N_TRIALS = 20
_ATTEMPTS = 20  # at a proposal that is new
_QUIET = {"show_progress": False, "state": "warning"}


class SearchResult(NamedTuple):
    """What a search came to.

    Attributes:
        settings: the searched ones, of the best trial; empty where the defaults are best.
        budget: trials (failed ones included), failed, seconds, space_hash, sampler, valid_metric and best_valid, which
            is None if all failed; empty where nothing is searched.
    """

    settings: dict[str, Any]
    budget: dict[str, Any]


# ------------------------------------------------ the search


def search(
    model: str,
    dataset: str,
    space: Path | str,
    *,
    n_trials: int = N_TRIALS,
    seconds: float | None = None,
    config_files: Sequence[str | Path] = (),
    settings: Mapping[str, Any] | None = None,
    runs_file: Path | str = RUNS_FILE,
) -> SearchResult:
    """Search the settings of one model on one dataset; goes on where an interrupted search of the same ended.

    Args:
        space: a YAML file, see `search_space`.
        n_trials: trainings, failed ones included, those of an earlier search of the same included too.
        seconds: no trial begins after so many seconds of trials; None for no limit.
        config_files, settings: as for a run; the first trial has them, the others change what is searched. The seed
            among them seeds the sampler too.
        runs_file: the trials are kept in a folder beside it.

    Returns:
        Settings to add to the given ones, and what finding them took.

    Raises:
        SettingError: a wrong space, or Optuna is not installed.
        DatasetError: no such dataset.
        TrainingError: all trials failed.
    """
    from recbole_mm.plan import make_plan

    jobs = make_plan([model], [dataset], config_files=config_files, settings=settings)
    result = _results(jobs, read_space(Path(space)), n_trials, seconds, 1, Path(runs_file))[0]
    if result.budget and result.budget["best_valid"] is None:
        raise TrainingError(f"all {result.budget['trials']} trials of {model} on {dataset} failed")
    return result


def search_for(
    jobs: Sequence[Job],
    space: Space,
    *,
    n_trials: int = N_TRIALS,
    seconds: float | None = None,
    n_jobs: int | None = None,
    runs_file: Path | str = RUNS_FILE,
) -> list[Job]:
    """Search for each model and dataset of a plan, with the same budget, and give its jobs the best settings.

    One search is for all seeds and knock-outs of a model: it takes the first seed and knocks nothing out. A model of
    which all trials failed keeps its settings.

    Args:
        n_jobs: trials at once, of different models; trials of one model come one after the other.
        others: as in `search`.

    Raises:
        SettingError, DatasetError: as `search`, for all models before any trial.
        KeyboardInterrupt: after the children have ended and what is kept is told.
    """
    groups = _distinct(jobs)
    results = _results(groups, space, n_trials, seconds, n_jobs or 1, Path(runs_file))
    found = {job.group: result for job, result in zip(groups, results, strict=True)}
    return [
        replace(job, settings={**job.settings, **found[job.group].settings}, budget=found[job.group].budget)
        for job in jobs
    ]


def _distinct(jobs: Sequence[Job]) -> list[Job]:
    """One job for each model, dataset and settings, of the first seed and with nothing knocked out."""
    first: dict[str, Job] = {}
    for job in jobs:
        first.setdefault(job.group, replace(job, knockout=None))
    return [*first.values()]


def _results(
    jobs: Sequence[Job], space: Space, n_trials: int, seconds: float | None, n_jobs: int, runs_file: Path
) -> list[SearchResult]:
    """The searches of several jobs, in rounds: one trial of each, up to ``n_jobs`` of them at once."""
    from recbole_mm.runner import execute

    _optuna()
    if n_trials < 1:
        raise SettingError(f"a search takes at least 1 trial, found {n_trials}")
    if seconds is not None and not seconds > 0:
        raise SettingError(f"the seconds of a search must be above 0, found {seconds}")
    spaces = [dimensions_of(space, job) for job in jobs]  # all are checked before anything runs
    searches = [_Search(job, *dimensions, n_trials, seconds) for job, dimensions in zip(jobs, spaces, strict=True)]
    with ExitStack() as stack:
        for each in searches:
            each.open(runs_file.parent / FOLDER, stack)
        under_way = searches
        try:
            while True:
                trials = [(each, trial) for each in under_way if (trial := each.next_trial()) is not None]
                if not trials:
                    break
                under_way = [each for each, _ in trials]
                execute(
                    [trial for _, trial in trials], n_jobs=n_jobs, runs_file=None,
                    on_done=lambda position, record: under_way[position].add(record),  # noqa: B023
                )  # fmt: skip
        except KeyboardInterrupt:
            print("interrupted: the trials so far are kept; the same command goes on with the search", flush=True)
            raise
        return [each.result() for each in searches]


class _Search:
    """The search of one job: what is to be tried next, and what came of it."""

    def __init__(
        self, job: Job, dimensions: dict[str, Dimension], others: list[str], n_trials: int, seconds: float | None
    ) -> None:
        self._job, self._dimensions, self._n_trials, self._seconds = job, dimensions, n_trials, seconds
        self._base = job.config()
        self._metric = str(self._base["valid_metric"]).lower()
        self._space_hash = space_hash(dimensions)
        self._study: Study | None = None
        self._searched: dict[str, Any] = {}  # of the trial under way
        if others:
            self._tell(f"not searched, since it makes no use of them: {', '.join(sorted(others))}")
        if not dimensions:
            self._tell("nothing to search, its settings stay as they are")

    def _tell(self, text: str) -> None:
        variant = f" ({self._job.variant})" if self._job.variant else ""
        print(f"search: {self._base['model']}{variant} on {self._base['dataset']}: {text}", flush=True)

    def open(self, folder: Path, stack: ExitStack) -> None:
        """Take the file of trials, until the stack is closed."""
        if not self._dimensions:
            return
        self._file = folder / f"{self._base['dataset']}-{self._base['model']}-{self._space_hash}.log"
        stack.enter_context(_alone(self._file))
        self._checkpoints = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "checkpoints"
        direction = "maximize" if self._base["valid_metric_bigger"] else "minimize"
        self._study = _study(
            self._file, f"{self._base['model']} on {self._base['dataset']}, {self._identity()}", direction
        )
        if self._study.trials:
            self._tell(f"{len(self._study.trials)} trials are in {self._file} already")

    def _identity(self) -> str:
        """12 hex digits of all that trials have in common: settings, seed, interactions, features and item columns."""
        from recbole_mm.config import identity_of
        from recbole_mm.data.layout import data_fingerprint
        from recbole_mm.plan import inputs_of

        folder = self._base.folder
        content = [identity_of(self._base), self._job.seed, data_fingerprint(folder), inputs_of(self._base)]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]

    def next_trial(self) -> Job | None:
        """The next one; None if there are enough, or none left."""
        if self._study is None:
            return None
        trials = self._study.trials
        if len(trials) >= self._n_trials:
            return None
        if self._seconds is not None and _seconds_of(trials) >= self._seconds:
            self._tell(f"{_seconds_of(trials):.0f} s are spent, no further trial")
            return None
        searched = _proposal(self._study, self._dimensions, self._job.seed) if trials else {}
        if searched is None:
            self._tell("every setting of the space has been tried")
            return None
        self._searched = searched
        settings = {**self._job.settings, **searched, **_QUIET, "checkpoint_dir": str(self._checkpoints)}
        return replace(self._job, settings=settings, tested=False)

    def add(self, record: RunRecord) -> None:
        """Keep what came of the trial under way."""
        shutil.rmtree(self._checkpoints, ignore_errors=True)
        told = {"settings": self._searched, "seconds": sum(record.seconds.values()), "error": record.error}
        inside = {key: self._base[key] for key, each in self._dimensions.items() if self._base[key] in each}
        self._study.add_trial(_frozen(self._dimensions, self._searched or inside, record.valid.get(self._metric), told))
        trials = self._study.trials
        if trials[-1].value is None:
            score = f"failed: {record.error}"
        else:
            score = f"{self._metric} {trials[-1].value:.4f} (best {self._best(trials).value:.4f})"
        listed = " ".join(f"{key}={_shown(value)}" for key, value in self._searched.items()) or "nothing changed"
        self._tell(f"trial {len(trials)} of {self._n_trials}, {score}, {told['seconds']:.1f} s; {listed}")

    def _best(self, trials: Sequence[FrozenTrial]) -> FrozenTrial | None:
        """The first of the best, so that the first trial wins a tie; None if all failed."""
        choose = max if self._base["valid_metric_bigger"] else min
        done = (trial for trial in trials if trial.value is not None)
        return choose(done, key=lambda trial: trial.value, default=None)

    def result(self) -> SearchResult:
        if self._study is None:
            return SearchResult({}, {})
        trials = self._study.trials[: self._n_trials]
        best = self._best(trials)
        budget = {
            "trials": len(trials),
            "failed": sum(trial.value is None for trial in trials),
            "seconds": round(_seconds_of(trials), 3),
            "space_hash": self._space_hash,
            "sampler": f"TPE of Optuna {_optuna().__version__}, seed {self._job.seed}",
            "valid_metric": self._metric,
            "best_valid": None if best is None else best.value,
        }
        if best is None:
            self._tell(f"all trials failed; to try them again, mend the reason and remove {self._file}")
            return SearchResult({}, budget)
        return SearchResult(dict(best.user_attrs["settings"]), budget)


# ------------------------------------------------ Optuna


def _optuna() -> Any:
    try:
        optuna = importlib.import_module("optuna")
    except ImportError as error:
        raise SettingError('a search needs Optuna, which is not installed: pip install "recbole_mm[tune]"') from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """One search at a time writes a file of trials, so that two do not spend the budget twice.

    A last line that an interrupted write left without an end is cut off; that trial is done again.
    """
    from filelock import FileLock, Timeout

    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(file.with_name(f".{file.name}.busy"), timeout=0, is_singleton=True, thread_local=False):
            if file.is_file():
                content = file.read_bytes()
                if not content.endswith(b"\n"):
                    with file.open("r+b") as cut:
                        cut.truncate(content.rfind(b"\n") + 1)
            yield
    except Timeout as error:
        raise SettingError(f"another search writes {file}; wait until it is done, or stop it first") from error


def _study(file: Path, name: str, direction: str) -> Study:
    """The trials that were done; one file may hold searches around several settings."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    try:
        storage = JournalStorage(JournalFileBackend(str(file)))
        return optuna.create_study(storage=storage, study_name=name, direction=direction, load_if_exists=True)
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise SettingError(
            f"{file} is no file of trials ({error}); move it away, and the search begins anew"
        ) from error


def _proposal(study: Study, dimensions: Mapping[str, Dimension], search_seed: int) -> dict[str, Any] | None:
    """Settings that were not tried yet; None if there are none left.

    They depend on the seed and on the trials that were done, and on nothing that an interruption would lose.
    """
    import numpy as np
    import optuna

    distributions = {key: dimension.distribution() for key, dimension in sorted(dimensions.items())}
    tried = [trial.params for trial in study.trials]
    if len({json.dumps(each, sort_keys=True) for each in tried if len(each) == len(dimensions)}) >= size_of(dimensions):
        return None
    for attempt in range(_ATTEMPTS):
        seed = int(np.random.SeedSequence([search_seed, len(tried), attempt]).generate_state(1)[0])
        ahead = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed), direction=study.direction)
        ahead.add_trials(study.trials)
        proposed = ahead.ask(distributions).params
        if proposed not in tried:
            break
    return {key: dimensions[key].value_of(parameter) for key, parameter in proposed.items()}


def _frozen(
    dimensions: Mapping[str, Dimension], values: Mapping[str, Any], score: float | None, told: Mapping[str, Any]
) -> FrozenTrial:
    """A finished trial as Optuna keeps it."""
    from optuna.trial import TrialState, create_trial

    parameters = {key: encoded(value) if dimensions[key].kind == "choice" else value for key, value in values.items()}
    return create_trial(
        state=TrialState.COMPLETE if score is not None else TrialState.FAIL,
        value=score,
        params=parameters,
        distributions={key: dimensions[key].distribution() for key in parameters},
        user_attrs=dict(told),
    )


def _seconds_of(trials: Sequence[FrozenTrial]) -> float:
    return sum(trial.user_attrs["seconds"] for trial in trials)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ------------------------------------------------ command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of a command that searches before it runs; `chooser` understands them."""
    group = parser.add_argument_group(
        "search of hyper-parameters",
        "On validation data alone, the same number of trials for each model. The runs then have the best settings.",
    )
    group.add_argument("--search", metavar="FILE", help="YAML file with the space, as properties/search/example.yaml")
    group.add_argument("--trials", type=int, metavar="N", help=f"trainings for each model and dataset; {N_TRIALS}")
    group.add_argument(
        "--search-seconds", type=float, metavar="S", help="no trial of a model begins after S seconds of its trials"
    )


def chooser(args: argparse.Namespace) -> Callable[[list[Job]], list[Job]] | None:
    """What gives jobs their settings, as the options ask for; None if they ask for no search.

    Raises:
        SettingError: a space that cannot be read, or options of a search without one.
    """
    if args.search is None:
        if args.trials is not None or args.search_seconds is not None:
            raise SettingError("--trials and --search-seconds belong to --search=FILE, which names the space to search")
        return None
    space = read_space(Path(args.search))
    n_trials = N_TRIALS if args.trials is None else args.trials
    if args.dry_run:
        print("note: the search comes first; here the plan shows the settings as they are given")
    elif args.cluster is not None:
        print("note: the trials of the search run on this machine; the cluster gets the runs that follow")
    return lambda jobs: search_for(
        jobs, space, n_trials=n_trials, seconds=args.search_seconds, n_jobs=args.jobs, runs_file=args.runs_file
    )
