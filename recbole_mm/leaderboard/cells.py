"""What stands in the cells of tables in text, whatever the format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recbole_mm.leaderboard.wording import interval, listed, metric_name, number

USUAL_CUT_OFF = "10"
COSTS = ("parameters", "seconds_per_epoch", "train_seconds", "epochs", "peak_memory", "peak_memory_gpu", "latency_ms")

Table = Mapping[str, Any]
Row = Mapping[str, Any]


def shown_metrics(table: Table) -> list[str]:
    """The main metric, then those at its cut-off and at 10."""
    cut_offs = (table["main_metric"].partition("@")[2], USUAL_CUT_OFF)
    others = [name for k in cut_offs for name in table["metrics"] if name.partition("@")[2] == k]
    return list(dict.fromkeys([*([table["main_metric"]] if table["metrics"] else []), *others]))


def spread(row: Row, metric: str) -> str:
    """``.1234 ± .0012``; without a deviation where there is one seed, or all gave the same."""
    values = row["test"].get(metric)
    if values is None:
        return "–"
    deviation = f" ± {number(values['sd'])}" if values["sd"] else ""
    return number(values["mean"]) + deviation


def difference(values: Mapping[str, float] | None) -> str:
    """``.0867 (.0500 to .1217)``."""
    return f"{number(values['mean'])} ({interval(values)})" if values else "–"


def p_value(values: Mapping[str, float] | None) -> str:
    """Corrected p-value."""
    if not values:
        return "–"
    p = values["p_holm"]
    return "< .0001" if p < 1e-4 else number(p, 4 if p < 0.1 else 2)


def paper(row: Row, metrics: Sequence[str]) -> str:
    return listed([f"{number(row['paper'][m]['value'])} {metric_name(m)}" for m in metrics if m in row["paper"]])


def figure(value: float | None) -> str:
    """Three digits that count, no exponent."""
    if value is None:
        return "–"
    if 0 < value < 0.001:
        return "< 0.001"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{float(f'{value:.3g}'):,.12g}"


def costs(row: Row) -> list[str]:
    cost = dict(row["cost"])
    for name in ("peak_memory", "peak_memory_gpu"):
        cost[name] = None if cost.get(name) is None else cost[name] / 2**30
    whole = "–" if cost["parameters"] is None else f"{cost['parameters']:,}"
    return [whole, *(figure(cost.get(name)) for name in COSTS[1:])]


def budget(row: Row) -> str:
    budget = row["budget"]
    if not budget:
        return "no search"
    parts = [f"{budget['trials']} trials" if "trials" in budget else "", f"{figure(budget.get('seconds'))} s"]
    return listed([part for part in (*parts, str(budget.get("sampler", ""))) if part and part != "– s"])


def full_rows(table: Table) -> list[Row]:
    return [row for row in table["rows"] if row["kind"] != "knockout"]


def knockout_rows(table: Table) -> list[Row]:
    return [row for row in table["rows"] if row["kind"] == "knockout"]


def is_bold(row: Row, metric: str) -> bool:
    return bool(row["test"].get(metric, {}).get("bold"))


def protocol_of(table: Table) -> str:
    return table["protocol"] or "protocol not recorded"


def _seeds(table: Table) -> list[int]:
    return sorted({seed for row in table["rows"] for seed in row["seeds"]})


def facts(table: Table) -> str:
    seeds = _seeds(table)
    return (
        f"{table['n_test'] or 'an unknown number of'} test rows, {table['n_items'] or 'an unknown number of'} items"
        f" ranked, {'seed' if len(seeds) == 1 else 'seeds'} {listed(seeds) or 'none'}"
    )
