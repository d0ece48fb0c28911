"""Views of a board in text: Markdown and LaTeX for each dataset, one CSV of everything, a table for the terminal.

They take the plain data of `Board.to_dict`. Markdown and the terminal show the metrics at the cut-off that selected the
epochs and at 10; the CSV has all.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recbole_mm.data.files import write_atomically
from recbole_mm.leaderboard.cells import (
    COSTS,
    Row,
    Table,
    difference,
    facts,
    figure,
    is_bold,
    protocol_of,
    shown_metrics,
    spread,
)
from recbole_mm.leaderboard.latex import latex
from recbole_mm.leaderboard.markdown import markdown
from recbole_mm.leaderboard.wording import metric_name


def write(board: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write ``<dataset>.md`` and ``<dataset>.tex`` of each dataset, and ``leaderboard.csv``; returns the files."""
    written = []

    def save(name: str, text: str) -> None:
        write_atomically(Path(folder) / name, lambda out: out.write(text.encode()))
        written.append(Path(folder) / name)

    for stem, tables in by_dataset(board).items():
        save(f"{stem}.md", markdown(board, tables))
        save(f"{stem}.tex", latex(board, tables))
    save("leaderboard.csv", csv_of(board))
    return written


def by_dataset(board: Mapping[str, Any]) -> dict[str, list[Table]]:
    """Tables by the name of their files: that of the dataset, in characters that a file name may have."""
    names: dict[str, list[Table]] = {}
    stems: dict[str, str] = {}
    for table in board["tables"]:
        if table["dataset"] not in stems:
            plain = re.sub(r"[^\w.-]+", "_", table["dataset"]).lstrip(".") or "dataset"
            taken, stem, number_ = {stem.lower() for stem in stems.values()}, plain, 2
            while stem.lower() in taken:
                stem, number_ = f"{plain}_{number_}", number_ + 1
            stems[table["dataset"]] = stem
        names.setdefault(stems[table["dataset"]], []).append(table)
    return names


# ------------------------------------------------ CSV


def csv_of(board: Mapping[str, Any]) -> str:
    """One line per row and metric, of all tables."""
    out = io.StringIO()
    lines = [
        _csv_line(table, row, metric) for table in board["tables"] for row in table["rows"] for metric in row["test"]
    ]
    empty = {"dataset": "", "protocol": "", "row": "", "metric": "", "test": ""}
    writer = csv.DictWriter(out, fieldnames=list(lines[0] if lines else empty), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def _csv_line(table: Table, row: Row, metric: str) -> dict[str, Any]:
    test, valid = row["test"][metric], row["valid"].get(metric, {})
    tested = {
        f"{name}{suffix}": row[name].get(metric, {}).get(key)
        for name in ("difference", "gap")
        for suffix, key in (("", "mean"), ("_low", "low"), ("_high", "high"), ("_p", "p"), ("_p_holm", "p_holm"))
    }
    return {
        "dataset": table["dataset"],
        "protocol": table["protocol"],
        "data_fingerprint": table["data_fingerprint"],
        "test_fingerprint": table["test_fingerprint"],
        "n_test": table["n_test"],
        "n_items": table["n_items"],
        "row": row["name"],
        "model": row["model"],
        "kind": row["kind"],
        "knockout": row["knockout"],
        "of": row["of"],
        "metric": metric,
        "seeds": " ".join(map(str, row["seeds"])),
        "test": test["mean"],
        "test_sd": test["sd"],
        "bold": int(test["bold"]),
        "valid": valid.get("mean"),
        "valid_sd": valid.get("sd"),
        "baseline": table["baseline"],
        **tested,
        **{name: row["cost"].get(name) for name in (*COSTS, "latency_single_ms")},
        "settings_run": row["n_settings"],
        "search_trials": row["budget"].get("trials"),
        "search_seconds": row["budget"].get("seconds"),
        "paper": row["paper"].get(metric, {}).get("value"),
        "paper_source": row["paper"].get(metric, {}).get("source"),
        "run_ids": " ".join(row["run_ids"]),
    }


# ------------------------------------------------ terminal


def terminal(table: Table) -> str:
    """A table for people at a terminal: the metrics at the main cut-off, differences, knock-outs, what failed."""
    main = table["main_metric"]
    cut_off = main.partition("@")[2]
    metrics = [metric for metric in shown_metrics(table) if metric.partition("@")[2] == cut_off]
    note = f" ({table['protocol_note']})" if table["protocol_note"] else ""
    lines = [f"{table['dataset']}, {protocol_of(table)}{note}: {facts(table)}"]
    rows = table["rows"]
    if rows:
        header = ["", *map(metric_name, metrics)]
        compared = f"{metric_name(main)} − {table['baseline']}" if table["baseline"] else ""
        lost = any(row["gap"] for row in rows)
        header += [compared] * bool(compared) + [f"lost {metric_name(main)}"] * lost + ["s per epoch"]
        cells = []
        widths = [max(len(spread(row, metric)) for row in rows) for metric in metrics]
        for row in rows:
            values = [spread(row, metric).ljust(width) for metric, width in zip(metrics, widths, strict=True)]
            bold = ["* " if is_bold(row, metric) else "  " for metric in metrics]
            line = [row["name"], *map("".join, zip(bold, values, strict=True))]
            if compared:
                line.append("baseline" if row["name"] == table["baseline"] else difference(row["difference"].get(main)))
            if lost:
                line.append(difference(row["gap"].get(main)))
            cells.append([*line, figure(row["cost"]["seconds_per_epoch"])])
        lines += _aligned(header, cells)
        lines.append("* the highest, and those that cannot be told from it; in brackets 95 % intervals")
    lines += [f"failed: {run['model']}, seed {run['seed']}: {run['error']}" for run in table["failed"]]
    lines += [f"note: {note}" for note in table["notes"]]
    lines += [f"{row['name']}: {warning}" for row in rows for warning in row["warnings"]]
    return "\n".join([*lines, *table["sentences"]])


def _aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns under each other, the first to the left."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return [
        "  ".join([cells[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(cells[1:], widths[1:], strict=True))])
        for cells in (header, *rows)
    ]
