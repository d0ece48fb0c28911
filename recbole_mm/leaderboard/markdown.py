"""A board as Markdown, one file for each dataset, fit to be published beside the runs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from recbole_mm.leaderboard.cells import (
    Table,
    budget,
    costs,
    difference,
    facts,
    full_rows,
    is_bold,
    knockout_rows,
    p_value,
    paper,
    protocol_of,
    shown_metrics,
    spread,
)
from recbole_mm.leaderboard.wording import listed, metric_name, number

_TEXTS = ("settings given", "why", "source", "why it is not comparable", "budget of the search")  # columns of words
_TOLD_TOGETHER = ("--model", "--seed", "--seeds", "--knockout")  # of several runs in one command


def markdown(board: Mapping[str, Any], tables: Sequence[Table]) -> str:
    """All tables of one dataset."""
    parts = [
        f"# {_escaped(tables[0]['dataset'])}",
        f"Written by `python -m recbole_mm.leaderboard` (recbole_mm {board['version']}, {board['generated'][:10]}) from"
        " the records of runs. Every target is ranked among all candidate items.",
    ]
    for table in tables:
        parts += _markdown_table(table, board["runs"])
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown_table(table: Table, runs: Mapping[str, Any]) -> list[str]:
    note = f" ({table['protocol_note']})" if table["protocol_note"] else ""
    hashes = f"Interactions `{table['data_fingerprint'] or 'unknown'}`"
    hashes += f", test rows `{table['test_fingerprint'] or 'unknown'}`."
    selected = metric_name(table["selected_by"])
    selected = f"Epochs and settings were selected by {selected} on validation data." if selected else ""
    return [
        f"## {_escaped(protocol_of(table) + note)}",
        _escaped(" ".join(table["sentences"])),
        f"{facts(table)}. {selected} {hashes}",
        _results(table),
        *_modalities(table),
        *_slices(table),
        *_cost(table),
        *_failed(table),
        *_remarks(table),
        *_reported(table),
        *_made_by(table, runs),
    ]


def _results(table: Table) -> str:
    rows, metrics, main = full_rows(table), shown_metrics(table), table["main_metric"]
    if not rows:
        return "No run has come to a result."
    has_paper = any(row["paper"] for row in rows)
    header = ["", "seeds", *map(metric_name, metrics)]
    if table["baseline"]:
        header += [f"{metric_name(main)} − {table['baseline']} (95 % interval)", "p"]
    header += ["reported in the paper"] * has_paper
    lines = []
    for row in rows:
        name = f"*{_escaped(row['name'])}*" if row["kind"] == "floor" else _escaped(row["name"])
        cells = [f"**{spread(row, m)}**" if is_bold(row, m) else spread(row, m) for m in metrics]
        line = [name, str(len(row["seeds"])), *cells]
        if table["baseline"]:
            tested = row["difference"].get(main)
            line += ["baseline", ""] if row["name"] == table["baseline"] else [difference(tested), p_value(tested)]
        if has_paper:
            line.append(_escaped(paper(row, table["metrics"])))
        lines.append(line)
    legend = (
        "Mean ± standard deviation over seeds, where they differ. Bold: the highest, and those that Wilcoxon's"
        " signed-rank test on values of single users cannot tell from it (Holm's correction, 5 %). Intervals: paired"
        " bootstrap over users of the seed-averaged values, so they say how sure a difference is for other users with"
        " these seeds; they are not corrected for the number of rows, p (Wilcoxon's, two-sided, Holm) is. Italics:"
        " floors, which count and learn nothing."
    )
    papers = {(values["source"], values["note"]): row for row in rows for values in row["paper"].values()}
    told = [
        f"{_escaped(row['name'])} in the paper: {_escaped(source)}; not comparable: {_escaped(note)}."
        for (source, note), row in papers.items()
    ]
    return "\n\n".join([_grid(header, lines), legend, *told])


def _modalities(table: Table) -> list[str]:
    rows, main = knockout_rows(table), table["main_metric"]
    if not rows:
        return []
    name = metric_name(main)
    header = ["knocked out", "seeds", name, f"lost {name} (95 % interval)", "p"]
    lines = [
        [_escaped(row["name"]), str(len(row["seeds"])), spread(row, main), difference(row["gap"].get(main)),
         p_value(row["gap"].get(main))]
        for row in rows
    ]  # fmt: skip
    legend = "Lost: the model minus its knock-out, paired by user as above; p is corrected for all rows of this table."
    return ["### What a modality is worth", _grid(header, lines), legend]


def _slices(table: Table) -> list[str]:
    """A grid for each slice that has more than one band: one band is the whole table again."""
    rows, main = full_rows(table), table["main_metric"]
    names = list(dict.fromkeys(name for row in rows for name in row["slices"]))
    parts = []
    for name in names:
        bands: dict[str, Any] = {}
        for row in rows:
            for band, values in row["slices"].get(name, {}).items():
                bands.setdefault(band, values.get("n"))
        if len(bands) < 2:
            continue
        header = [
            f"by {_escaped(name)}", *(f"{_escaped(band)} ({n} row{'' if n == 1 else 's'})" for band, n in bands.items())
        ]  # fmt: skip
        lines = [
            [_escaped(row["name"]), *(number(row["slices"].get(name, {}).get(band, {}).get(main)) for band in bands)]
            for row in rows
        ]
        parts.append(_grid(header, lines))
    return [f"### {metric_name(main)} on parts of the test rows", *parts] if parts else []


def _cost(table: Table) -> list[str]:
    rows = full_rows(table)
    if not rows:
        return []
    header = [
        "", "parameters", "s per epoch", "training s", "epochs", "memory GiB", "GPU memory GiB", "scoring ms per user",
    ]  # fmt: skip
    chosen = any(row["budget"] or row["n_settings"] > 1 for row in rows)
    header += ["settings run", "budget of the search"] * chosen
    lines = [
        [_escaped(row["name"]), *costs(row), *([str(row["n_settings"]), _escaped(budget(row))] * chosen)]
        for row in rows
    ]
    legend = "Means over seeds; memory is the most that a run's process held."
    told = "" if chosen else " Each model ran with one setting; none was searched for."
    return ["### Cost", _grid(*_without_empty(header, lines)), legend + told]


def _without_empty(header: Sequence[str], lines: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """Columns in which something stands."""
    kept = [n for n in range(len(header)) if n == 0 or any(line[n] != "–" for line in lines)]
    return [header[n] for n in kept], [[line[n] for n in kept] for line in lines]


def _failed(table: Table) -> list[str]:
    if not table["failed"]:
        return []
    lines = [
        [
            _escaped(run["model"] + (f" − {run['knockout']}" if run.get("knockout") else "")),
            str(run["seed"]),
            _escaped(listed([f"{key}={value}" for key, value in run["settings_given"].items()])),
            _escaped(run["error"]),
        ]
        for run in table["failed"]
    ]
    return ["### Runs that failed", _grid(["", "seed", "settings given", "why"], lines)]


def _remarks(table: Table) -> list[str]:
    lines = [f"- {_escaped(note)}" for note in table["notes"]]
    told: dict[str, list[str]] = {}
    for row in table["rows"]:
        for warning in row["warnings"]:
            told.setdefault(warning, []).append(row["name"])
    lines += [f"- {_escaped(listed(names))}: {_escaped(warning)}" for warning, names in told.items()]
    return ["### Remarks", "\n".join(lines)] if lines else []


def _reported(table: Table) -> list[str]:
    if not table["reported"]:
        return []
    metrics = list(dict.fromkeys(metric for entry in table["reported"] for metric in entry["metrics"]))
    lines = [
        [_escaped(entry["name"]), *(number(entry["metrics"].get(metric)) for metric in metrics),
         _escaped(entry["source"]), _escaped(entry["note"])]
        for entry in table["reported"]
    ]  # fmt: skip
    header = ["", *map(metric_name, metrics), "source", "why it is not comparable"]
    return ["### Reported elsewhere, not comparable", _grid(header, lines)]


def _made_by(table: Table, runs: Mapping[str, Any]) -> list[str]:
    text = "\n".join(commands(table, runs))
    fence = "`" * max(3, 1 + max((len(ticks) for ticks in re.findall("`+", text)), default=0))
    return ["### Made by", f"{fence}\n{text}\n{fence}"] if text else []


def _grid(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    left = [n == 0 or name in _TEXTS or any("±" in line[n] for line in lines) for n, name in enumerate(header)]
    rule = ["---" if one else "---:" for one in left]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))


def _escaped(text: str) -> str:
    """Free text that stays text in Markdown, and in one cell."""
    return re.sub(r"([\\`*\[\]|<~&$]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(str(text).split()))


def commands(table: Table, runs: Mapping[str, Any]) -> list[str]:
    """The command lines that made a table: one for all models, seeds and knock-outs that share their other settings."""
    asked = [run_id for row in table["rows"] for run_id in row["run_ids"]]
    asked += [failed["run_id"] for failed in table["failed"]]
    seeds: dict[tuple[tuple[str, ...], str], dict[str, set[int]]] = {}  # by other words and model: by knock-out
    for run in (runs[run_id] for run_id in asked if runs[run_id]["command"]):
        try:
            words = shlex.split(run["command"])
        except ValueError:
            continue
        rest = tuple(word for word in words if word.partition("=")[0] not in _TOLD_TOGETHER)
        by_knockout = seeds.setdefault((rest, run["model"]), {})
        by_knockout.setdefault(run["knockout"] or "", set()).add(run["seed"])
    models: dict[tuple[tuple[str, ...], str, tuple[int, ...]], list[str]] = {}
    for (rest, model), by_knockout in seeds.items():
        for option, of_it in _options(by_knockout):
            models.setdefault((rest, option, tuple(sorted(of_it))), []).append(model)
    lines = []
    for (words, option, of_it), names in models.items():
        n_program = next((n for n, word in enumerate(words) if word.startswith("--")), len(words))
        given = [f"--model={','.join(names)}", *words[n_program:], *filter(None, [option])]
        given.append(("--seed=" if len(of_it) == 1 else "--seeds=") + ",".join(map(str, of_it)))
        lines.append(shlex.join([*words[:n_program], *given]))
    return lines


def _options(seeds: Mapping[str, set[int]]) -> list[tuple[str, set[int]]]:
    """Options for the knock-outs of one model, with their seeds: those with the seeds of the full run go with it."""
    full = seeds.get("")
    together = [knockout for knockout, of_it in seeds.items() if knockout and of_it == full]
    options = [] if full is None else [(f"--knockouts={';'.join(together)}" if together else "", full)]
    alone = [knockout for knockout in seeds if knockout and knockout not in together]
    return options + [(f"--knockout={knockout}", seeds[knockout]) for knockout in alone]
