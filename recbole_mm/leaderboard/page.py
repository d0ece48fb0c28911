"""The leaderboard as one HTML file that opens from disk: data, style and script inside, nothing loaded from anywhere.

The data stand in two blocks of JSON: "board" has what the tables show, "runs" the details of single runs, which the
browser reads only when somebody opens one. The templates are in the folder `page` beside this file:

page/page.html     frame, with places for the rest
page/page.css      style, light and dark, for screen, phone and print
page/*.js          one script in parts, put together in the order of SCRIPTS; writes text only, never markup
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from recbole_mm.data.files import write_atomically
from recbole_mm.leaderboard.wording import metric_name

TEMPLATES = Path(__file__).with_name("page")
SCRIPTS = ("view.js", "text.js", "table.js", "details.js", "plots.js", "page.js")  # the last one starts the page
MOST_POINTS = 200  # of one curve; fewer where there are many
FEWEST_POINTS = 20
ALL_POINTS = 400_000  # of all curves of a page

# What many runs have in common stands in the page once.
SHARED = ("versions", "features", "settings_given", "budget", "warnings")
LEFT_OUT = ("stages", "valid", "test", *SHARED)


def write_page(board: Mapping[str, Any], path: Path) -> None:
    """Write the page of a board (`Board.to_dict()`); readers see the old file or the new one."""
    content = page_text(board).encode()
    write_atomically(Path(path), lambda out: out.write(content))


def page_text(board: Mapping[str, Any]) -> str:
    """The page of a board.

    Values that are not finite become empty. Each curve keeps at most 200 points, fewer where there are very many runs,
    so that the page of 10,000 runs has about 25 MB: the first, the last and the best epoch, and others in even steps.
    """
    runs: Mapping[str, Any] = board.get("runs") or {}
    n_points = points_per_curve(runs)
    shown = {key: board.get(key) for key in ("generated", "version", "tables", "problems")}
    shown |= {"metric_names": _metric_names(board.get("tables") or ())}
    shown |= {"n_runs": len(runs), "n_points": n_points, "models": _models_with_curves(runs)}
    style, script = _template("page.css"), _script()
    parts = {
        "style": style,
        "script": script,
        "style hash": _content_hash(style),
        "script hash": _content_hash(script),
        "board": embedded(shown),
        "runs": embedded(packed(runs, n_points)),
    }
    return re.sub(r"\{\{([a-z ]+)\}\}", lambda match: parts[match[1]], _template("page.html"))


def embedded(value: Any) -> str:
    """JSON that is safe inside a script element: no character in it can end the element or open a comment."""
    try:
        text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    except ValueError:  # finding a NaN is slower than writing the JSON
        text = json.dumps(_finite(value), separators=(",", ":"), allow_nan=False)
    for character in "<>&":  # U+2028 and the like are escaped already: the text is ASCII
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def packed(runs: Mapping[str, Any], n_points: int) -> dict[str, Any]:
    """Runs as the page reads them: what they share stands once, curves are columns, metrics have their names once.

    Paths of checkpoints are left out: they mean nothing to a reader elsewhere.
    """
    shared: dict[str, int] = {}

    def number_of(value: Any) -> int:
        return shared.setdefault(json.dumps(value, sort_keys=True, default=str), len(shared))

    def values_of(metrics: Mapping[str, Any] | None) -> list[Any]:
        metrics = metrics or {}
        return [number_of(list(metrics)), list(metrics.values())]

    small = {}
    for run_id, run in runs.items():
        kept = {key: value for key, value in run.items() if key not in LEFT_OUT and value not in (None, "", {}, [])}
        kept |= {key: number_of(run[key]) for key in SHARED if run.get(key)}
        kept |= {key: values_of(run.get(key)) for key in ("valid", "test")}
        kept["stages"] = [_stage(stage, n_points) for stage in run.get("stages") or ()]
        small[run_id] = kept
    return {"shared": [json.loads(text) for text in shared], "runs": small}


def points_per_curve(runs: Mapping[str, Any]) -> int:
    """How many points of each curve the page keeps."""
    n_curves = sum(bool(stage.get("curve")) for run in runs.values() for stage in run.get("stages") or ())
    return max(FEWEST_POINTS, min(MOST_POINTS, ALL_POINTS // max(1, n_curves)))


@lru_cache(maxsize=4096)
def decimated(n_epochs: int, n_points: int, always: tuple[int, ...] = ()) -> list[int]:
    """Positions of a curve that are kept, in order: first, last, ``always``, and others in even steps."""
    if n_epochs <= n_points:
        return list(range(n_epochs))
    kept = {position for position in always if 0 <= position < n_epochs}
    n_steps = n_points - len(kept) - 1
    return sorted(kept | {round(step * (n_epochs - 1) / n_steps) for step in range(n_steps + 1)})


def _stage(stage: Mapping[str, Any], n_points: int) -> dict[str, Any]:
    kept = {key: stage[key] for key in ("stage", "seconds", "epochs", "best_epoch") if key in stage}
    curve = stage.get("curve") or []
    if not curve:
        return kept
    best = [position for position, point in enumerate(curve) if point.get("epoch") == stage.get("best_epoch")]
    points = [curve[position] for position in decimated(len(curve), n_points, tuple(best))]
    columns = {
        key: [_short(point.get(key)) for point in points]
        for key in ("epoch", "train_loss", "valid")
        if any(point.get(key) is not None for point in points)
    }
    return kept | {"curve": columns, "recorded": len(curve)}


def _short(value: Any) -> Any:
    """Five digits: a curve shows no more."""
    return float(f"{value:.5g}") if isinstance(value, float) and math.isfinite(value) else value


def _metric_names(tables: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """How metrics are written, by what they are called in the data."""
    metrics: dict[str, None] = {}
    for table in tables:
        reported = (metric for entry in table.get("reported") or () for metric in entry["metrics"])
        metrics |= dict.fromkeys([*table.get("metrics", ()), table.get("selected_by", ""), *reported])
    return {metric: metric_name(metric) for metric in metrics}


def _models_with_curves(runs: Mapping[str, Any]) -> list[str]:
    """Models of which the page has a curve, so that it need not read all runs to choose some."""
    with_curve = {
        run.get("model")
        for run in runs.values()
        for stage in run.get("stages") or ()
        if len(stage.get("curve") or ()) > 1
    }
    return sorted(model for model in with_curve if isinstance(model, str))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return value


def _template(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _script() -> str:
    """All parts in one scope of their own."""
    return "\n".join(['"use strict";', "(() => {", *map(_template, SCRIPTS), "})();"])


def _content_hash(text: str) -> str:
    """As a Content-Security-Policy names an inline style or script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
