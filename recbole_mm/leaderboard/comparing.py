"""Rows of a table against each other: who differs, by how much, and who shares the bold of the best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from recbole_mm.errors import DatasetError
from recbole_mm.leaderboard import statistics
from recbole_mm.leaderboard.plain import short
from recbole_mm.leaderboard.rows import Row, finite, mean_of
from recbole_mm.leaderboard.statistics import SEED, TestValues
from recbole_mm.leaderboard.wording import SIGNIFICANT, metric_name, without_paths


def read_values(rows: Sequence[Row], folder: Path) -> None:
    """Values of single test rows; a row without them, or with those of other test rows, gets a warning."""
    reference: Row | None = None
    for row in rows:
        without = [run.run_id for run in row.runs if not run.per_user]
        if without:
            row.warnings.append(f"not tested: run {without[0]} has no values of single users")
            continue
        try:
            values = statistics.averaged_over_seeds([folder / run.per_user for run in row.runs])
        except DatasetError as error:
            row.warnings.append(f"not tested: {without_paths(str(error))}")
            continue
        if reference is not None and not statistics.same_rows(values, reference.values):
            row.warnings.append(f"not tested: its test rows are not those of {reference.name}, or in another order")
        elif other := _disagreeing(row, values):
            row.warnings.append(
                f"not tested: the values of single users give another {metric_name(other)} than its runs"
            )
        else:
            reference = reference or replace(row, values=values)
            row.values = values._replace(user=reference.values.user, target=reference.values.target)


def _disagreeing(row: Row, values: TestValues) -> str | None:
    """A metric whose mean over test rows is not what the runs recorded: the files are of other runs."""
    digits = finite(row.runs[0].settings.get("metric_decimal_place"))
    tolerance = max(1e-4, 10 ** -(digits or 4))
    for metric, of_rows in values.values.items():
        recorded = mean_of(row, metric)
        if recorded is not None and abs(float(of_rows.mean(dtype=np.float64)) - recorded) > tolerance:
            return metric
    return None


def compared(
    pairs: Sequence[tuple[Row, Row, Row]], metrics: Sequence[str], n_resamples: int
) -> dict[str, dict[str, dict[str, float]]]:
    """By row and metric: the first of the two minus the second, corrected over all rows of the same kind of pair."""
    asked = [
        (row, metric, one.values, two.values)
        for row, one, two in pairs
        for metric in metrics
        if one.values and two.values and metric in one.values.values and metric in two.values.values
    ]
    found = statistics.compare(
        [(one, two, metric) for _, metric, one, two in asked], n_resamples=n_resamples, seed=SEED
    )
    families: dict[tuple[bool, str], list[int]] = {}
    for number, (row, metric, *_) in enumerate(asked):
        families.setdefault((row.kind == "knockout", metric), []).append(number)
    tested: dict[str, dict[str, dict[str, float]]] = {}
    for (_, metric), members in families.items():
        for number, corrected in zip(members, statistics.holm([found[n].p for n in members]), strict=True):
            values = {key: short(value) for key, value in found[number]._asdict().items()}
            tested.setdefault(asked[number][0].name, {})[metric] = {**values, "p_holm": short(corrected)}
    return tested


def bold_rows(rows: Sequence[Row], metrics: Sequence[str]) -> dict[str, set[str]]:
    """By metric: the best row, and those that a test cannot tell from it."""
    bold: dict[str, set[str]] = {}
    asked: list[tuple[str, Row, Row]] = []
    for metric in metrics:
        means = {row.name: mean for row in rows if (mean := mean_of(row, metric)) is not None}
        highest = max(means.values(), default=None)
        bold[metric] = {name for name, mean in means.items() if mean == highest}
        best = next((row for row in rows if row.name in bold[metric]), None)
        tested = [row for row in rows if row.values and metric in row.values.values]
        asked += [(metric, best, row) for row in tested if best in tested and row is not best]
    p_values = statistics.p_values([(best.values, row.values, metric) for metric, best, row in asked])
    for metric in metrics:
        family = [(row, p) for (name, _, row), p in zip(asked, p_values, strict=True) if name == metric]
        corrected = statistics.holm([p for _, p in family])
        bold[metric] |= {row.name for (row, _), p in zip(family, corrected, strict=True) if p >= SIGNIFICANT}
    return bold
