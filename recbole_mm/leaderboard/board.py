"""The board: recorded runs, put into tables that compare only what can be compared.

One table per dataset, protocol, hash of the interactions and hash of the test rows; one row per model, with the setting
that was best on validation data, its seeds, its knock-outs, and the statistics against a baseline. `Board.to_dict` is
plain data, from which all views are written.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recbole_mm.data.protocols import protocol_label
from recbole_mm.errors import DatasetError, SettingError, nearest
from recbole_mm.leaderboard import statistics
from recbole_mm.leaderboard.comparing import bold_rows, compared, read_values
from recbole_mm.leaderboard.plain import clean, row_data, run_data
from recbole_mm.leaderboard.rows import (
    Key,
    Row,
    by_table,
    check_metric,
    mean_of,
    note_features,
    note_missing_seeds,
    only,
    rows_of,
    usable_runs,
    validation_of,
)
from recbole_mm.leaderboard.wording import listed, metric_name, sentences, without_paths
from recbole_mm.paths import properties_dir
from recbole_mm.records import Records, RunRecord
from recbole_mm.version import __version__

USUAL_BASELINE = "SASRec"
PAPERS = "papers.yaml"


@dataclass
class Board:
    """Tables of comparable results.

    Attributes:
        generated: local time, ISO 8601.
        version: of this package.
        tables: plain data, one for each group of comparable runs.
        runs: those that tables show or list as failed, by id.
        problems: what could not be used, a sentence each.
    """

    generated: str
    version: str
    tables: list[dict[str, Any]]
    runs: dict[str, dict[str, Any]]
    problems: list[str]

    def to_dict(self) -> dict[str, Any]:
        """As plain data, ready for JSON: no NaN, no absolute path."""
        return dict(vars(self))


def build(
    records: Records,
    *,
    results_folder: Path,
    baseline: str | None = None,
    metric: str | None = None,
    dataset: str | None = None,
    protocol: str | None = None,
    papers: Mapping[str, Any] | None = None,
    n_resamples: int = statistics.N_RESAMPLES,
) -> Board:
    """Put runs into tables.

    Args:
        records: what `recbole_mm.records.load` returned.
        results_folder: with the values of single test rows, to which records point.
        baseline: name of the row that all others are compared with; SASRec if left out, or the highest floor.
        metric: shown first and told about; what selected the epochs if left out.
        dataset, protocol: only these, one or several parted by commas.
        papers: numbers that papers report, as in properties/papers.yaml, which is read if left out.
        n_resamples: of the bootstrap.

    Raises:
        DatasetError: no run can be used.
        SettingError: no run has this dataset, protocol, metric or baseline.
    """
    problems = list(records.problems)
    runs = usable_runs(records.records, problems)
    runs = only(runs, "dataset", dataset)
    runs = only(runs, "protocol", protocol)
    if not runs:
        told = "\n  ".join(problems[:5]) or "the file is empty"
        raise DatasetError(f"no record of a run can be used: {told}\n  run_recbole_mm writes one for every run")
    papers = _read_papers() if papers is None else papers
    check_metric(runs, metric)
    options = _Options(Path(results_folder), baseline, metric and metric.lower(), papers, n_resamples)
    tables = [_table(key, group, options) for key, group in by_table(runs).items()]
    if baseline and not any(table["baseline"] == baseline for table in tables):
        names = sorted({row["name"] for table in tables for row in table["rows"] if row["kind"] != "knockout"})
        raise SettingError(f"no row is called {baseline}{nearest(baseline, names)}; rows are {listed(names)}")
    tables.sort(key=lambda table: (table["dataset"], table["protocol"], not table["test_fingerprint"], table["id"]))
    shown = {run_id for table in tables for row in table["rows"] for run_id in row["run_ids"]}
    shown |= {failed["run_id"] for table in tables for failed in table["failed"]}
    return Board(
        generated=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        version=__version__,
        tables=tables,
        runs={run.run_id: run_data(run) for run in runs if run.run_id in shown},
        problems=[without_paths(problem) for problem in problems],
    )


@dataclass(frozen=True)
class _Options:
    results_folder: Path
    baseline: str | None
    metric: str | None
    papers: Mapping[str, Any]
    n_resamples: int


# ------------------------------------------------ tables


def _table(key: Key, runs: Sequence[RunRecord], options: _Options) -> dict[str, Any]:
    dataset, protocol, data_fingerprint, test_fingerprint = key
    done = [run for run in runs if run.status == "done"]
    notes: list[str] = []
    selected_by = _selecting_metric(runs, notes)
    metrics = list(dict.fromkeys(name for run in done for name in run.test))
    main = options.metric if options.metric in metrics else selected_by
    if options.metric and main != options.metric:
        notes.append(f"no run has {metric_name(options.metric)} here; shown is {metric_name(main)}")
    if main not in metrics and metrics:
        main = metrics[0]
    rows = rows_of(done, selected_by, notes)
    note_missing_seeds(rows)
    note_features(rows, notes)
    if done and not test_fingerprint:
        notes.append(
            "records of an earlier release, without a hash of the test rows: it is not known whether all were tested"
            " on the same ones"
        )
    baseline = _baseline(rows, options, main, selected_by, notes)
    table_rows = _rows_data(rows, metrics, baseline, options, notes)
    table_rows = sorted(table_rows, key=lambda row: _position(row, table_rows, main))
    digest = hashlib.sha256(f"{data_fingerprint} {test_fingerprint}".encode()).hexdigest()[:8]
    papers = next((value for name, value in options.papers.items() if name.lower() == dataset.lower()), {})
    for row in table_rows:
        row["paper"] = _paper(papers.get(row["name"]), metrics)
    return {
        "id": f"{dataset}/{protocol or 'unknown'}/{digest}",
        "dataset": dataset,
        "protocol": protocol,
        "protocol_note": (protocol and protocol_label(protocol)) or "",
        "data_fingerprint": data_fingerprint,
        "test_fingerprint": test_fingerprint,
        "n_test": max((run.n_test for run in done), default=0),
        "n_items": max((run.n_items for run in done), default=0),
        "metrics": metrics,
        "main_metric": main,
        "selected_by": selected_by,
        "baseline": baseline.name if baseline else "",
        "sentences": sentences(table_rows, metric=main, baseline=baseline.name if baseline else ""),
        "rows": table_rows,
        "failed": _failed(runs, done),
        "notes": notes,
        "reported": _reported_elsewhere(papers, {row["name"] for row in table_rows}),
    }


def _selecting_metric(runs: Sequence[RunRecord], notes: list[str]) -> str:
    """What chose the epochs, in most runs."""
    used = Counter(str(run.settings.get("valid_metric", "")).lower() for run in runs if run.status == "done")
    if len(used) > 1:
        notes.append(f"epochs were selected by different metrics: {listed(map(metric_name, used))}")
    return used.most_common(1)[0][0] if used else ""


def _baseline(rows: Sequence[Row], options: _Options, metric: str, selected_by: str, notes: list[str]) -> Row | None:
    full = {row.name: row for row in rows if row.kind != "knockout"}
    if options.baseline in full:
        return full[options.baseline]
    if options.baseline:
        notes.append(f"{options.baseline} was not run here, so differences are to another baseline")
    if USUAL_BASELINE in full:
        return full[USUAL_BASELINE]
    floors = [row for row in full.values() if row.kind == "floor"]
    return max(floors, key=lambda row: (validation_of(row.runs, selected_by), mean_of(row, metric) or 0), default=None)


def _position(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], metric: str) -> tuple:
    """Rows by the main metric, the best first; knock-outs last, in the order of their models."""
    place = {other["name"]: other["test"].get(metric, {}).get("mean", -math.inf) for other in rows}
    own = place[row["name"]]
    if row["kind"] == "knockout":
        return 1, -place.get(row["of"], -math.inf), row["model"], row["knockout"]
    return 0, -own, row["name"], ""


def _failed(runs: Sequence[RunRecord], done: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Runs that failed and were not repeated with success."""
    repeated = {(run.model, run.settings_hash, run.seed, run.knockout) for run in done}
    return [
        {
            "run_id": run.run_id,
            "model": run.model,
            "seed": run.seed,
            "knockout": run.knockout,
            "error": without_paths(run.error) or "no reason was recorded",
            "settings_given": clean(run.settings_given),
        }
        for run in runs
        if run.status == "failed" and (run.model, run.settings_hash, run.seed, run.knockout) not in repeated
    ]


def _rows_data(
    rows: Sequence[Row], metrics: Sequence[str], baseline: Row | None, options: _Options, notes: list[str]
) -> list[dict[str, Any]]:
    read_values(rows, options.results_folder)
    full = [row for row in rows if row.kind != "knockout"]
    by_name = {row.name: row for row in full}
    pairs = [(row, row, baseline) for row in full if baseline and row is not baseline]
    pairs += [(row, by_name[row.of], row) for row in rows if row.kind == "knockout" and row.of]
    tested = compared(pairs, metrics, options.n_resamples)
    bold = bold_rows(full, metrics)
    if any(row.values is None for row in rows):
        notes.append("rows without values of single users are compared by their means alone")
    return [row_data(row, metrics, tested.get(row.name, {}), bold) for row in rows]


# ------------------------------------------------ numbers of papers


def _read_papers() -> dict[str, Any]:
    import yaml

    return yaml.safe_load((properties_dir() / PAPERS).read_text(encoding="utf-8")) or {}


def _paper(entry: Mapping[str, Any] | None, metrics: Sequence[str]) -> dict[str, dict[str, Any]]:
    if not entry:
        return {}
    told = {"source": entry["source"], "note": entry["note"]}
    return {metric: {"value": value, **told} for metric, value in entry["metrics"].items() if metric in metrics}


def _reported_elsewhere(papers: Mapping[str, Any], names: set[str]) -> list[dict[str, Any]]:
    """What papers report of models that have no row."""
    return [{"name": name, **entry} for name, entry in papers.items() if name not in names]
