"""Numbers and sentences of a board, in words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

SIGNIFICANT = 0.05
_CALLED = {"image": "pictures", "price": "prices"}  # modalities whose names are not what one says
_REPLACED = {
    "noise": "replacing {} by noise",
    "shuffle": "shuffling {}",
    "constant": "making {} the same for all items",
}
_METRICS = {"ndcg": "NDCG", "mrr": "MRR", "map": "MAP", "auc": "AUC", "gauc": "GAUC"}
_PATH = re.compile(r"(?<![\w.~/-])(?:[A-Za-z]:\\(?:[^\s\\/'\",;:]+\\)+|/(?:[^\s/'\",;:()]+/)+)(?=[^\s/\\])")


def number(value: float | None, digits: int = 4) -> str:
    """``.1234``, with a real minus sign; ``–`` for nothing."""
    if value is None:
        return "–"
    text = f"{abs(value):.{digits}f}"
    sign = "−" if value < 0 and float(text) else ""
    return sign + (text[1:] if text.startswith("0.") else text)


def metric_name(metric: str) -> str:
    """``ndcg@20`` as it is written: ``NDCG@20``."""
    name, at, k = metric.partition("@")
    return _METRICS.get(name, name[:1].upper() + name[1:]) + at + k


def listed(names: Sequence[Any]) -> str:
    return ", ".join(map(str, names))


def without_paths(text: str) -> str:
    """A text in which absolute paths are cut to the name of the file: a board does not tell where it was made."""
    return _PATH.sub("", text) if "/" in text or "\\" in text else text


def interval(difference: Mapping[str, float]) -> str:
    """``.0040 to .0200``."""
    return f"{number(difference['low'])} to {number(difference['high'])}"


def certainty(difference: Mapping[str, float]) -> str:
    """``certain`` if zero is outside the interval and the corrected test agrees, ``none`` if neither, else ``open``."""
    outside = difference["low"] > 0 or difference["high"] < 0
    significant = difference["p_holm"] < SIGNIFICANT
    return "certain" if outside and significant else "open" if outside or significant else "none"


def sentences(rows: Sequence[Mapping[str, Any]], *, metric: str, baseline: str) -> list[str]:
    """Two sentences: who is ahead of the baseline, and what its modalities are worth (or a floor, without knock-outs).

    Args:
        rows: of a table, as plain data, the best first.
    """
    full = [row for row in rows if row["kind"] != "knockout" and metric in row["test"]]
    if not full:
        return ["No run has come to a result here yet.", "So nothing can be said of any model."]
    return [_ahead(full, metric, baseline), _owes(rows, metric) or _above_floors(full, metric)]


def _ahead(full: Sequence[Mapping[str, Any]], metric: str, baseline: str) -> str:
    """The best row against the baseline."""
    name = metric_name(metric)
    base = next((row for row in full if row["name"] == baseline), None)
    others = [row for row in full if row is not base]
    if base is None or not others:
        top, reached = full[0]["name"], number(full[0]["test"][metric]["mean"])
        if len(full) == 1:
            return f"{top} has {reached} {name}; there is no other row to compare it with."
        return f"{top} has the highest {name}, {reached}, of {len(full)} rows; there is no baseline to test it against."
    best, difference = others[0], others[0]["difference"].get(metric)
    ahead = best["test"][metric]["mean"] - base["test"][metric]["mean"]
    who, tail = best["name"], ""
    if best["kind"] == "floor":
        who = f"the floor {best['name']}"
        if ahead > 0 and any(row["kind"] == "model" for row in full):
            tail = "; no model is above that floor"
    elif ahead > 0 and base["kind"] != "floor":
        tail = _below_a_floor(base, full, metric)
    text = _compared(who, baseline, difference, ahead, name) + tail + "."
    return text if text.startswith(best["name"]) else _first_up(text)


def _below_a_floor(base: Mapping[str, Any], full: Sequence[Mapping[str, Any]], metric: str) -> str:
    """What a baseline is worth that counting alone beats."""
    floor = next((row for row in full if row["kind"] == "floor"), None)
    if floor is None or floor["test"][metric]["mean"] <= base["test"][metric]["mean"]:
        return ""
    return f"; {base['name']} is below the floor {floor['name']} too, {number(floor['test'][metric]['mean'])}"


def _compared(who: str, baseline: str, difference: Mapping[str, float] | None, ahead: float, name: str) -> str:
    """The best of the other rows and the baseline, as sure as the tests are."""
    if difference is None:
        way = "ahead of" if ahead > 0 else "behind" if ahead < 0 else "level with"
        by = f" by {number(abs(ahead))} {name}" if ahead else ""
        return f"{who} is {way} {baseline}{by}, not tested for want of values of single users"
    size, told = number(difference["mean"]), f"(95 % interval {interval(difference)})"
    sure = certainty(difference)
    if sure == "none":
        return f"{who} and {baseline} cannot be told apart: the difference is {size} {name} {told}"
    if sure == "open":
        corrected = f"p = {difference['p_holm']:.2g} after correction"
        return f"whether {who} differs from {baseline} is not certain: by {size} {name} {told}, {corrected}"
    if difference["mean"] > 0:
        return f"{who} is ahead of {baseline} by {size} {name} {told}"
    return f"nothing is ahead of {baseline}: the next, {who}, differs by {size} {name} {told}"


def _first_up(text: str) -> str:
    return text[:1].upper() + text[1:]


def _owes(rows: Sequence[Mapping[str, Any]], metric: str) -> str:
    """What the best of the models with knock-outs loses by them; empty where there are none."""
    order = [row["name"] for row in rows if row["kind"] != "knockout"]
    tested = [row for row in rows if metric in row["gap"] and row["of"] in order]
    if not tested:
        return ""
    of = min((row["of"] for row in tested), key=order.index)
    mine = sorted((row for row in tested if row["of"] == of), key=lambda row: -row["gap"][metric]["mean"])
    told, verdicts, said = [], {"none": [], "open": [], "gain": []}, None
    for row in mine:
        gap = row["gap"][metric]
        size = f"{number(gap['mean'])}{f' {metric_name(metric)}' if not told else ''} ({interval(gap)})"
        kinds = {part.partition(":")[2] for part in row["knockout"].split(",")}
        what = f"its {_modalities(row['knockout'])}"
        if kinds == said:  # "… costs .02, its pictures .01"
            told.append(f"{what} {size}")
        else:
            told.append(f"{_replacing(row['knockout'], of if not told else '')} costs {size}")
        said = kinds
        sure = certainty(gap)
        if sure == "certain" and gap["mean"] < 0:
            sure = "gain"
        if sure in verdicts:
            verdicts[sure].append(f"the {_modalities(row['knockout'])}")
    text = ", ".join(told)
    endings = (
        ("none", "{} bring nothing here that could be measured"),
        ("open", "what {} bring is not certain"),
        ("gain", "{} do harm here"),
    )
    ends = [_singular(ending, verdicts[sure]) for sure, ending in endings if verdicts[sure]]
    return f"{_first_up(text)}{': ' if ends else ''}{'; '.join(ends)}."


def _singular(sentence: str, names: Sequence[str]) -> str:
    """``the text brings``, ``the text and the pictures bring``."""
    joined = " and ".join(dict.fromkeys(names))
    if " and " not in joined and not joined.endswith("s"):
        sentence = sentence.replace(" bring", " brings").replace(" do ", " does ")
    return sentence.format(joined)


def _replacing(knockout: str, of: str) -> str:
    """``replacing the text of MSM4SR by noise``; ``its text`` without the name."""
    told = []
    for part in knockout.split(","):
        name, _, kind = part.partition(":")
        what = f"the {_called(name)} of {of}" if of and not told else f"its {_called(name)}"
        told.append(_REPLACED.get(kind.strip(), "knocking out {}").format(what))
    return " and ".join(told)


def _modalities(knockout: str) -> str:
    return " and ".join(_called(part.partition(":")[0]) for part in knockout.split(","))


def _called(name: str) -> str:
    return _CALLED.get(name.strip(), name.strip())


def _above_floors(full: Sequence[Mapping[str, Any]], metric: str) -> str:
    """How many models are above the highest floor."""
    floors = [row for row in full if row["kind"] == "floor"]
    models = [row for row in full if row["kind"] == "model"]
    if not floors:
        return "No floor was run, so it is not known what counting alone would reach."
    mean = floors[0]["test"][metric]["mean"]
    worth = f"{floors[0]['name']} with {number(mean)} {metric_name(metric)}"
    floor = f"the highest floor, {worth}"
    if not models:
        return f"No model was run beside {floor}."
    above = sum(row["test"][metric]["mean"] > mean for row in models)
    if len(models) == 1:
        return f"{models[0]['name']} is {'above' if above else 'not above'} {floor}."
    if not above:
        best = f"{models[0]['name']} with {number(models[0]['test'][metric]['mean'])}"
        return f"The highest of {len(models)} models is {best}; the highest floor is {worth}."
    return f"{above} of {len(models)} models {'is' if above == 1 else 'are'} above {floor}."
