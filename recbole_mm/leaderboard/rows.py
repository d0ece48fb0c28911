"""Which runs make which row of which table."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from recbole_mm.errors import SettingError, nearest
from recbole_mm.leaderboard.statistics import TestValues
from recbole_mm.leaderboard.wording import listed, without_paths
from recbole_mm.records import RunRecord, settings_hash

FLOORS = ("Popularity", "SessionPopularity", "Transitions", "SessionItemKNN", "ContentKNN")
VARIANT = {"ContentKNN": "feature"}  # floors that are a row each for every value of this setting
_EPOCHS = {"pretrain": "pretrain_epochs"}  # settings with the maximal epoch of a stage, where it is not `epochs`

# ------------------------------------------------ which runs


def usable_runs(records: Iterable[RunRecord], problems: list[str]) -> list[RunRecord]:
    """Records with an id and a hash each, without those that are done and have no result."""
    usable, ids = [], set()
    for number, run in enumerate(records, start=1):
        if not run.run_id:  # of a release that wrote none
            run = replace(run, run_id=hashlib.sha256(f"{number} {run.started} {run.model}".encode()).hexdigest()[:12])
        if not run.settings_hash:
            run = replace(run, settings_hash=settings_hash(run.model, run.settings))
        called = f"run {run.run_id} ({run.model} on {run.dataset}, seed {run.seed})"
        wrong = [name for part in (run.valid, run.test) for name, value in part.items() if finite(value) is None]
        if run.run_id in ids:
            problems.append(f"{called} stands in the file twice; the first one counts")
        elif wrong:
            problems.append(f"{called} is left out: {listed(sorted(set(wrong)))} is no finite number")
        elif run.status == "done" and not run.test:
            problems.append(f"{called} is left out: it is done and has no test result")
        else:
            ids.add(run.run_id)
            usable.append(run)
    return usable


def only(runs: list[RunRecord], name: str, wanted: str | None) -> list[RunRecord]:
    if wanted is None or not runs:
        return runs
    there = sorted({getattr(run, name) for run in runs})
    names = [one.strip() for one in wanted.split(",") if one.strip()]
    for one in names:
        if one not in there:
            raise SettingError(
                f"no run has the {name} {one}{nearest(one, there)}; there are {listed(filter(None, there))}"
            )
    return [run for run in runs if getattr(run, name) in names]


def check_metric(runs: Sequence[RunRecord], metric: str | None) -> None:
    there = list(dict.fromkeys(name for run in runs for name in run.test))
    if metric and metric.lower() not in there:
        raise SettingError(f"no run has the metric {metric}{nearest(metric, there)}; there are {listed(there)}")


Key = tuple[str, str, str, str]  # dataset, protocol, hash of the interactions, hash of the test rows


def key_of(run: RunRecord) -> Key:
    return run.dataset, run.protocol, run.data_fingerprint, run.test_fingerprint


def by_table(runs: Sequence[RunRecord]) -> dict[Key, list[RunRecord]]:
    """Runs by table. A run that failed before it knew all hashes stands in each table that it may belong to."""
    groups: dict[Key, list[RunRecord]] = {}
    for run in runs:
        if run.status == "done":
            groups.setdefault(key_of(run), []).append(run)
    for run in runs:
        if run.status == "done":
            continue
        fitting = [key for key in groups if all(a in ("", b) for a, b in zip(key_of(run), key, strict=True))]
        for key in fitting or [key_of(run)]:
            groups.setdefault(key, []).append(run)
    return groups


def finite(value: Any) -> float | None:
    """A finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


# ------------------------------------------------ rows


@dataclass(eq=False)
class Row:
    """One row of a table before it becomes plain data."""

    name: str
    model: str
    kind: str
    runs: list[RunRecord]
    knockout: str | None = None
    of: str | None = None
    n_settings: int = 1
    warnings: list[str] = field(default_factory=list)
    values: TestValues | None = None  # of single test rows

    @property
    def seeds(self) -> list[int]:
        return sorted(run.seed for run in self.runs)


def rows_of(runs: Sequence[RunRecord], metric: str, notes: list[str]) -> list[Row]:
    """A row per model, and one per knock-out of it."""
    by_name: dict[str, list[RunRecord]] = {}
    for run in runs:
        by_name.setdefault(_row_name(run), []).append(run)
    rows = []
    for name, mine in by_name.items():
        full = _selected([run for run in mine if not run.knockout], metric)
        of = None
        if full:
            of = _row(name, full)
            of.n_settings = len({_identity(run) for run in mine if not run.knockout})
            rows.append(of)
        knockouts = dict.fromkeys(run.knockout for run in mine if run.knockout)
        rows += [_knockout_row(name, knockout, mine, of, metric, notes) for knockout in knockouts]
    return rows


def _row_name(run: RunRecord) -> str:
    """The model's name, with the setting that tells variants of a floor apart."""
    variant = run.settings.get(VARIANT.get(run.model, "")) or listed(sorted(run.features))
    return f"{run.model} {variant}" if run.model in VARIANT and variant else run.model


def _identity(run: RunRecord) -> tuple[str, tuple]:
    """Runs with the same one differ in seed and knock-out alone."""
    return run.settings_hash, tuple(sorted(run.features.items()))


def _selected(runs: Sequence[RunRecord], metric: str) -> list[RunRecord]:
    """Runs of the setting with the best mean validation over its seeds."""
    settings: dict[tuple, list[RunRecord]] = {}
    for run in runs:
        settings.setdefault(_identity(run), []).append(run)
    return max(settings.values(), key=lambda mine: validation_of(mine, metric), default=[])


def validation_of(runs: Sequence[RunRecord], metric: str) -> tuple[float, int]:
    newest = list({run.seed: run for run in runs}.values())
    reached = [run.valid[metric] for run in newest if metric in run.valid]
    sign = 1 if newest[0].settings.get("valid_metric_bigger", True) else -1
    return sign * average(reached) if reached else -math.inf, len(newest)


def _row(name: str, runs: Sequence[RunRecord], **more: Any) -> Row:
    """Runs with different seeds; of the same seed the newest."""
    row = Row(name, runs[0].model, "floor" if runs[0].model in FLOORS else "model", [], **more)
    times = Counter(run.seed for run in runs)
    newest = {run.seed: run for run in runs}
    row.runs = [newest[seed] for seed in sorted(newest)]
    for seed, count in sorted(times.items()):
        if count > 1:
            row.warnings.append(f"seed {seed} was run {count} times; the newest counts")
    row.warnings += _told_by_runs(row.runs)
    if row.kind != "floor":
        row.warnings += _stopped_by_the_limit(row.runs)
    return row


def _knockout_row(
    name: str, knockout: str, runs: Sequence[RunRecord], of: Row | None, metric: str, notes: list[str]
) -> Row:
    """The knock-out of the setting that the model's own row shows; without a gap if there is none of that setting."""
    mine = [run for run in runs if run.knockout == knockout]
    same = [run for run in mine if of and _identity(run) == _identity(of.runs[0])]
    title = f"{name} − {knockout}"
    if same:
        if others := len(mine) - len(same):
            notes.append(f"{title}: runs with settings that were not selected for {name} are left out, {others}")
        row = _row(title, same, knockout=knockout, of=name)
    else:
        row = _row(title, _selected(mine, metric), knockout=knockout)
        row.warnings.append(
            f"knocked out with other settings or features than the row {name} has, so there is no gap"
            if of
            else f"{name} was not run with the same settings and nothing knocked out, so there is no gap"
        )
    row.kind = "knockout"
    return row


def _told_by_runs(runs: Sequence[RunRecord]) -> list[str]:
    told = Counter(warning for run in runs for warning in dict.fromkeys(run.warnings))
    return [
        without_paths(text) if count == len(runs) else f"{without_paths(text)} ({count} of {len(runs)} runs)"
        for text, count in told.items()
    ]


def _stopped_by_the_limit(runs: Sequence[RunRecord]) -> list[str]:
    """Stages that ran as long as they were allowed to: more epochs may score higher."""
    hits: Counter[tuple[str, int]] = Counter()
    for run in runs:
        for stage in run.stages:
            name = str(stage.get("stage", ""))
            limit = finite(run.settings.get(_EPOCHS.get(name, "epochs")))
            if limit and (finite(stage.get("epochs")) or 0) >= limit:
                hits[name, int(limit)] += 1
    return [
        f"{'pre-training' if name == 'pretrain' else 'training'} stopped at the maximal epoch, {limit}, in {count} of"
        f" {len(runs)} runs: longer training may score higher"
        for (name, limit), count in hits.items()
    ]


def note_missing_seeds(rows: Sequence[Row]) -> None:
    """Rows that have other seeds than most say so, knock-outs that have others than their model.

    What floors count does not depend on the seed.
    """
    by_name = {row.name: row for row in rows}
    trained = [row for row in rows if row.model not in FLOORS]
    sets = Counter(tuple(row.seeds) for row in trained if row.kind != "knockout")
    common = max(sets, key=lambda seeds: (sets[seeds], len(seeds)), default=())
    for row in trained:
        if row.of:
            expected, who = by_name[row.of].seeds, f"{row.of} has"
        else:
            expected, who = list(common), "most rows have"
        if row.seeds != expected and expected:
            only = " only" if set(row.seeds) < set(expected) else ""
            label = "seed" if len(row.seeds) == 1 else "seeds"
            row.warnings.append(f"{label} {listed(row.seeds)}{only}, where {who} {listed(expected)}")


def note_features(rows: Sequence[Row], notes: list[str]) -> None:
    """The same feature with other content is another experiment."""
    seen: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        for feature, digest in row.runs[0].features.items():
            seen.setdefault(feature, {}).setdefault(str(digest), []).append(row.name)
    for feature, by_hash in seen.items():
        if len(by_hash) > 1:
            told = "; ".join(f"{digest[:8]} in {listed(names)}" for digest, names in by_hash.items())
            notes.append(f"the feature {feature} is not the same in all rows: {told}")


def mean_of(row: Row, metric: str) -> float | None:
    values = [run.test[metric] for run in row.runs if metric in run.test]
    return average(values) if values else None


def average(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
