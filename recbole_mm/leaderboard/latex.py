"""A board as LaTeX, one file for each dataset."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from recbole_mm.leaderboard.cells import (
    Table,
    difference,
    facts,
    full_rows,
    is_bold,
    knockout_rows,
    p_value,
    protocol_of,
    shown_metrics,
    spread,
)
from recbole_mm.leaderboard.wording import metric_name

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "−": "$-$", "±": r"$\pm$", "–": "--", "…": r"\dots{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "\n": " ",
}  # fmt: skip


def latex(board: Mapping[str, Any], tables: Sequence[Table]) -> str:
    """One ``table`` for each table of a dataset, and one for its knock-outs; needs the package booktabs."""
    head = f"% written by python -m recbole_mm.leaderboard, recbole_mm {board['version']}, {board['generated'][:10]}"
    parts = [f"{head}\n% needs \\usepackage{{booktabs}}"]
    for table in tables:
        parts += [_latex_results(table)] if full_rows(table) else []
        parts += [_latex_knockouts(table)] if knockout_rows(table) else []
    return "\n\n".join(parts) + "\n"


def _latex_results(table: Table) -> str:
    metrics, main = shown_metrics(table), table["main_metric"]
    header = ["", *(_tex(metric_name(metric)) for metric in metrics)]
    if table["baseline"]:
        header.append(_tex(f"− {table['baseline']} (95 % interval)"))
    lines = []
    for row in full_rows(table):
        cells = [_tex(spread(row, metric)) for metric in metrics]
        bold = [f"\\textbf{{{cell}}}" if is_bold(row, m) else cell for cell, m in zip(cells, metrics, strict=True)]
        name = f"\\emph{{{_tex(row['name'])}}}" if row["kind"] == "floor" else _tex(row["name"])
        tested = "baseline" if row["name"] == table["baseline"] else _tex(difference(row["difference"].get(main)))
        lines.append([name, *bold, *([tested] if table["baseline"] else [])])
    note = f" ({table['protocol_note']})" if table["protocol_note"] else ""
    caption = (
        f"{table['dataset']}, {protocol_of(table)}{note}: {facts(table)}. Mean ± standard deviation over seeds; bold:"
        " the highest and those not told from it by Wilcoxon's test with Holm's correction at 5 %."
    )
    if table["baseline"]:
        caption += f" Differences to {table['baseline']} in {metric_name(main)}, paired bootstrap over users."
    return _latex_table(caption, table["id"], header, lines)


def _latex_knockouts(table: Table) -> str:
    main = table["main_metric"]
    header = ["", _tex(metric_name(main)), "lost (95\\,\\% interval)", "$p$"]
    lines = [
        [
            _tex(row["name"]),
            _tex(spread(row, main)),
            _tex(difference(row["gap"].get(main))),
            _tex(p_value(row["gap"].get(main))),
        ]
        for row in knockout_rows(table)
    ]
    caption = (
        f"{table['dataset']}, {protocol_of(table)}: what {metric_name(main)} loses when a modality is knocked out."
    )
    return _latex_table(caption, f"{table['id']}/knockouts", header, lines)


def _latex_table(caption: str, label: str, header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    body = [" & ".join(cells) + r" \\" for cells in lines]
    return "\n".join([
        r"\begin{table}",
        r"\centering\small",
        rf"\caption{{{_tex(caption)}}}",
        rf"\label{{tab:{re.sub(r'[^A-Za-z0-9:/.-]', '-', label)}}}",
        rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
        r"\toprule",
        " & ".join(header) + r" \\",
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ])  # fmt: skip


def _tex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)
