"""Cost against the number of items: a drawing that opens in any browser, one panel for each model and measure.

Both axes are logarithmic, and panels of one measure have the same scale, so that slopes and heights compare. Nothing is
loaded from anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from benchmarks.measuring import LITERAL, OURS, SHIPPED

PANEL_WIDTH, PANEL_HEIGHT, GAP = 200, 150, 18
LEFT, TOP, BOTTOM, RIGHT = 100, 84, 64, 20
NARROWEST = 800  # for the title
ROWS = {  # title: the measure
    "training step": "training step",
    "evaluation": "evaluation",
    "start-up": "start-up",
    "memory of training": "memory, training",
}
COLUMNS = ("MSM4SR pre-training", "MSM4SR fine-tuning", "MMSBR", "UniSRec fine-tuning", "SASRec")
MODEL_OF = {"MSM4SR pre-training": "MSM4SR", "MSM4SR fine-tuning": "MSM4SR", "UniSRec fine-tuning": "UniSRec"}
SIDES = {  # colour, dashes and name
    SHIPPED: ("#999999", "2 4", "literal, as shipped with autograd's anomaly mode"),
    LITERAL: ("#666666", "6 4", "literal"),
    OURS: ("#0b61a4", "", "recbole_mm"),
}
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#222}.head{font-size:14px;font-weight:600}"
    ".quiet{fill:#666;font-size:11px}.grid{stroke:#e4e4e4}.frame{fill:none;stroke:#bbb}"
)


def svg(rows: Sequence[Mapping], title: str) -> str:
    """The drawing of `measure_all`'s rows; ``title`` stands above."""
    columns = [case for case in COLUMNS if any(row["case"] == case for row in rows)]
    measured = {name: points_of(rows, columns, measure) for name, measure in ROWS.items()}
    measured = {name: panels for name, panels in measured.items() if any(panels.values())}
    width = max(NARROWEST, LEFT + len(columns) * (PANEL_WIDTH + GAP) - GAP + RIGHT)
    height = TOP + len(measured) * (PANEL_HEIGHT + GAP) - GAP + BOTTOM
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(title)}"><style>{STYLE}</style>'
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        _text(LEFT, 24, title, "head"),
        *_legend(measured),
    ]
    items = sorted(
        {n for panels in measured.values() for p in panels.values() for points in p.values() for n, _ in points}
    )
    for number, (name, panels) in enumerate(measured.items()):
        values = [v for sides in panels.values() for points in sides.values() for _, v in points]
        unit = "MiB" if name.startswith("memory") else "s"
        top = TOP + number * (PANEL_HEIGHT + GAP)
        scale = _Scale(items, values, top)
        out.append(_text(16, top + PANEL_HEIGHT / 2, name, turned=True))
        for place, column in enumerate(columns):
            left = LEFT + place * (PANEL_WIDTH + GAP)
            if number == 0:
                out.append(_text(left + PANEL_WIDTH / 2, top - 8, column, anchor="middle"))
            out += scale.panel(left, panels[column], unit, labelled=place == 0, last=number == len(measured) - 1)
    out.append(_text(LEFT, height - 14, "number of items"))
    return "\n".join([*out, "</svg>", ""])


def page(drawing: str, title: str) -> str:
    """The drawing as a page of HTML."""
    return f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>\n{drawing}</html>\n'


def points_of(rows: Iterable[Mapping], columns: Sequence[str], measure: str) -> dict[str, dict]:
    """By column and side, the points (items, value); stages that start alike have the same start-up."""
    found: dict[str, dict[str, list]] = {column: {} for column in columns}
    for row in sorted(rows, key=lambda row: row["items"]):
        if row["measure"] != measure:
            continue
        for column in columns:
            if row["case"] not in (column, MODEL_OF.get(column)):
                continue
            for side in SIDES:
                if "value" in row.get(side, {}):
                    found[column].setdefault(side, []).append((row["items"], row[side]["value"]))
    return found


def _legend(measured: Mapping) -> list[str]:
    used = {side for panels in measured.values() for sides in panels.values() for side in sides}
    out, left = [], LEFT
    for side, (colour, dashes, name) in reversed(SIDES.items()):
        if side in used:
            out.append(_line(left, 45, left + 28, 45, colour, dashes))
            out.append(_text(left + 34, 49, name))
            left += 60 + 6.3 * len(name)
    return out


class _Scale:
    """Where items and values of one row of panels lie, decades of values as a frame."""

    def __init__(self, items: Sequence[int], values: Sequence[float], top: float) -> None:
        self.items, self.top = items, top
        self.low, self.high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
        self.high += self.high == self.low

    def x(self, n: float) -> float:
        first, last = math.log(self.items[0]), math.log(self.items[-1])
        share = (math.log(n) - first) / (last - first) if last > first else 0.5
        return 14 + share * (PANEL_WIDTH - 28)

    def y(self, value: float) -> float:
        return self.top + PANEL_HEIGHT * (self.high - math.log10(value)) / (self.high - self.low)

    def panel(self, left: float, sides: Mapping, unit: str, *, labelled: bool, last: bool) -> list[str]:
        bottom = self.top + PANEL_HEIGHT
        out = []
        for power in range(self.low, self.high + 1):
            y = self.y(10.0**power)
            out.append(f'<line class="grid" x1="{left}" x2="{left + PANEL_WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
            if labelled:
                out.append(_text(left - 6, y + 4, axis_label(power, unit), "quiet", anchor="end"))
        out.append(f'<rect class="frame" x="{left}" y="{self.top}" width="{PANEL_WIDTH}" height="{PANEL_HEIGHT}"/>')
        if last:
            for n in self.items:
                out.append(_text(left + self.x(n), bottom + 16, short(n), "quiet", anchor="middle"))
        for side, (colour, dashes, name) in SIDES.items():
            points = [(left + self.x(n), self.y(value), n, value) for n, value in sides.get(side, ())]
            for (x, y, _, _), (next_x, next_y, _, _) in zip(points, points[1:], strict=False):
                out.append(_line(x, y, next_x, next_y, colour, dashes))
            for x, y, n, value in points:
                tip = escape(f"{name}, {n:,} items: {told(value, unit)}")
                out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"><title>{tip}</title></circle>')
        if not sides:
            x, y = left + PANEL_WIDTH / 2, self.top + PANEL_HEIGHT / 2
            out.append(_text(x, y, "not measured", "quiet", anchor="middle"))
        return out


def told(value: float, unit: str) -> str:
    if unit == "s":
        return f"{1000 * value:.3g} ms" if value < 1 else f"{value:.3g} s"
    return f"{value / 1024:.3g} GiB" if value > 1024 else f"{value:.3g} MiB"


def axis_label(power: int, unit: str) -> str:
    """Of 10^power."""
    if unit == "s" and power < 0:
        return f"{10.0 ** (power + 3):g} ms"
    return f"{10.0**power:,g} {unit}" if power < 4 else f"{10**power:,} {unit}"


def short(n: int) -> str:
    return f"{n / 1000:g}k" if n >= 1000 else str(n)


def _text(x: float, y: float, text: str, style: str = "", *, anchor: str = "start", turned: bool = False) -> str:
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})" text-anchor="middle"' if turned else f' text-anchor="{anchor}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{style}"{turn}>{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, dashes: str) -> str:
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="2"{dashed}/>'
