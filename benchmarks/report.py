"""What came out, to read: a table, fits of cost against the number of items, and figures that are to be reached."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from benchmarks.measuring import LITERAL, OURS, SHIPPED

HEAD = ("", "items", "literal", "as shipped", "ours", "x literal", "x shipped", "GFLOP", "of rate")


class Figure(NamedTuple):
    """A number to reach.

    Attributes:
        case, measure: which rows.
        key: of a row.
        limit: at least that.
        items: where it is to be reached, within a tenth; None for the largest number measured, from `LARGE` on.
    """

    case: str
    measure: str
    key: str
    limit: float
    items: int | None = None


LARGE = 4000  # items: with fewer, shares and slopes are those of what does not grow
FIGURES = (
    Figure("MSM4SR pre-training", "training step", "factor", 8, 4900),
    Figure("MSM4SR fine-tuning", "training step", "factor", 4, 4900),
    Figure("MSM4SR fine-tuning", "evaluation", "factor", 13, 4900),
    Figure("MSM4SR fine-tuning", "training step", "of_rate", 0.4),
    Figure("MMSBR", "training step", "factor_as_shipped", 4.5, 8614),
    Figure("MMSBR", "training step", "factor", 2, 8614),
    Figure("MMSBR", "evaluation", "factor", 100, 8614),
    Figure("MMSBR", "item tower", "of_rate", 0.5),
)
MOST_EXPONENT = 1.1  # of memory against items
FITTED = ("MSM4SR pre-training", "MSM4SR fine-tuning", "MMSBR", "UniSRec fine-tuning", "SASRec")
TOLD = {
    "factor": "times as fast as the literal version",
    "factor_as_shipped": "times as fast as the literal version as shipped",
    "of_rate": "of the machine's matrix rate",
}


# ---------------------------------------------------------------- table


def table(rows: Iterable[Mapping]) -> list[tuple[str, ...]]:
    """Cells of `HEAD`, and before the rows of each case one with its name alone."""
    cells, case = [], None
    for row in sorted(rows, key=_order):
        if row["case"] != case:
            case = row["case"]
            cells.append((case, *[""] * (len(HEAD) - 1)))
        ours = row[OURS]
        cells.append(
            (
                f"  {row['measure']}", f"{row['items']:,}", told(row.get(LITERAL), row["unit"]),
                told(row.get(SHIPPED), row["unit"]), told(ours, row["unit"]), _times(row.get("factor")),
                _times(row.get("factor_as_shipped")), f"{ours['gflop']:,.0f}" if "rate" in row else "",
                f"{row['of_rate']:.0%}" if "of_rate" in row else "",
            )
        )  # fmt: skip
    return cells


MEASURES = (
    "training step", "item tower", "evaluation", "start-up", "memory, training", "memory, evaluation",
    "memory, start-up",
)  # fmt: skip
CASE_ORDER = (
    "MSM4SR",
    "MSM4SR pre-training",
    "MSM4SR fine-tuning",
    "MMSBR",
    "UniSRec",
    "UniSRec fine-tuning",
    "SASRec",
)


def _order(row: Mapping) -> tuple:
    return CASE_ORDER.index(row["case"]), MEASURES.index(row["measure"]), row["items"]


def told(side: Mapping | None, unit: str) -> str:
    if side is None:
        return ""
    if "value" not in side:
        return "left out" if "skipped" in side else "failed"
    value = side["value"]
    if unit == "MiB":
        return f"{value:,.0f} MiB" if value < 10_240 else f"{value / 1024:,.1f} GiB"
    text = f"{1000 * value:,.1f} ms" if value < 0.0995 else f"{value:,.3g} s" if value < 99.5 else f"{value:,.0f} s"
    return text + ("" if side.get("warm", True) else "*") + ("~" if side.get("scale", 1) != 1 else "")


def _times(factor: float | None) -> str:
    return "" if factor is None else f"{factor:.1f}x" if factor < 99.5 else f"{factor:.0f}x"


NOTES = (
    "Seconds are medians; factors are medians of the ratios of calls that alternated. * one call, not warmed up: more "
    "would not fit the budget. ~ one batch, times the number of batches. Memory is what comes on top of the imports, "
    "each in a process of its own; start-up comes after them, too. Ours evaluates in batches of 4,096, and so does the "
    "literal version, but MMSBR's in batches of 100, as released. GFLOP and the share of the machine's matrix rate are "
    "those of our matrix products, as counted."
)


def as_text(rows: Iterable[Mapping]) -> str:
    """The table in columns."""
    cells = [HEAD, *table(rows)]
    named = [line for line in cells if any(line[1:])]
    widths = [max(len(line[column]) for line in named) for column in range(len(HEAD))]
    lines = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]).rstrip()
        for line in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def as_markdown(rows: Iterable[Mapping]) -> str:
    """The table as Markdown."""
    lines = [f"| {' | '.join(HEAD)} |", f"|---{'|---:' * (len(HEAD) - 1)}|"]
    for first, *others in table(rows):
        name = first.strip() if any(others) else f"**{first}**"
        lines.append(f"| {' | '.join([name, *others])} |")
    return "\n".join(lines)


# ---------------------------------------------------------------- fits


class Fit(NamedTuple):
    """How a cost grows with the number of items.

    Attributes:
        exponent: e of cost = c N^e, by least squares over all sizes.
        last: the same between the two largest sizes, where what does not grow counts least.
    """

    case: str
    measure: str
    side: str
    exponent: float
    last: float
    items: tuple[int, ...]


def fits(rows: Iterable[Mapping]) -> list[Fit]:
    """Of each cost that was measured at two sizes at least."""
    found: dict[tuple[str, str, str], list[tuple[int, float]]] = {}
    for row in sorted(rows, key=_order):
        for side in (OURS, LITERAL):
            if row.get(side, {}).get("value", 0) > 0:
                found.setdefault((row["case"], row["measure"], side), []).append((row["items"], row[side]["value"]))
    return [
        Fit(*key, exponent(points), exponent(points[-2:]), tuple(n for n, _ in points))
        for key, points in found.items()
        if len(points) > 1
    ]


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """Slope of log cost over log N, by least squares."""
    x, y = ([math.log(value) for value in column] for column in zip(*points, strict=True))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread


def told_fits(found: Iterable[Fit]) -> str:
    lines = [f"{'cost ~ items ^ e':44s}{'literal':>18s}{'ours':>18s}   e over all sizes (between the two largest)"]
    by_side: dict[tuple[str, str], dict[str, Fit]] = {}
    for fit in found:
        by_side.setdefault((fit.case, fit.measure), {})[fit.side] = fit
    for (case, measure), sides in by_side.items():
        cells = [f"{sides[s].exponent:.2f} ({sides[s].last:.2f})" if s in sides else "" for s in (LITERAL, OURS)]
        lines.append(f"{f'{case}: {measure}':44s}{cells[0]:>18s}{cells[1]:>18s}")
    return "\n".join(lines)


# ---------------------------------------------------------------- figures


def figures(rows: Sequence[Mapping]) -> list[dict]:
    """What is to be reached, as far as it was measured: text, value, limit, reached."""
    found = []
    for figure in FIGURES:
        mine = [r for r in rows if (r["case"], r["measure"]) == figure[:2] and figure.key in r]
        if figure.items is not None:
            mine = [r for r in mine if abs(r["items"] - figure.items) <= figure.items / 10]
        else:
            mine = [r for r in mine if r["items"] >= LARGE]
        if mine:
            row = max(mine, key=lambda r: r["items"])
            value, share = row[figure.key], figure.key == "of_rate"
            show = "{:.0%}".format if share else "{:.1f}".format
            text = f"{figure.case}, {figure.measure}, {row['items']:,} items: {show(value)} {TOLD[figure.key]}"
            found.append(_figure(f"{text}, to reach {show(figure.limit)}", value, figure.limit, value >= figure.limit))
    for fit in fits(rows):
        if fit.items[-1] >= LARGE and fit.side == OURS and fit.measure == "memory, training" and fit.case in FITTED:
            value = max(fit.exponent, fit.last)
            text = f"{fit.case}, memory of training grows as items ^ {value:.2f}, at most {MOST_EXPONENT}"
            found.append(_figure(text, value, MOST_EXPONENT, value <= MOST_EXPONENT))
    return found


def _figure(text: str, value: float, limit: float, reached: bool) -> dict:
    return {"text": text, "value": value, "limit": limit, "reached": reached}


def left_out(rows: Iterable[Mapping]) -> list[str]:
    """A line for each reason why sides were not measured."""
    found: dict[tuple, list[str]] = {}
    for row in sorted(rows, key=_order):
        for side in (OURS, LITERAL, SHIPPED):
            for what in ("skipped", "failed"):
                if reason := row.get(side, {}).get(what):
                    found.setdefault((row["case"], row["items"], side, reason), []).append(row["measure"])
    return [
        f"{case}, {items:,} items, {side}: {reason} ({'; '.join(measures)})"
        for (case, items, side, reason), measures in found.items()
    ]


def has_failed(rows: Iterable[Mapping]) -> bool:
    """A measurement of ours failed, or values were not equal."""
    return any("failed" in row[OURS] for row in rows)
