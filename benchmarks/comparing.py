"""Two measurements, an older and a newer one: what became slower or larger beyond scatter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.measuring import OURS

LEAST = {"s": 0.10, "MiB": 0.05}  # shares; changes below are none
LEAST_MIB = 8
SAME_MACHINE = ("processor", "cores", "threads", "device", "gpu")


def compare(old: Mapping, new: Mapping) -> tuple[list[str], bool]:
    """Lines that tell what changed in ours, and whether anything became worse.

    On another machine, seconds are compared in products of the machine's matrix rate and seconds. A time has changed
    where the ranges of its calls do not meet and the medians differ by a tenth at least; memory, which hardly
    scatters, by a twentieth and 8 MiB. Of a time that was taken once, the range is a tenth to either side.
    """
    differing = [key for key in SAME_MACHINE if old["machine"].get(key) != new["machine"].get(key)]
    scale = 1.0
    lines = []
    if differing:
        scale = old["calibration"]["gflops"] / new["calibration"]["gflops"]
        told = ", ".join(f"{key} {old['machine'].get(key)} and {new['machine'].get(key)}" for key in differing)
        lines.append(f"another machine ({told}): old seconds are multiplied by {scale:.2f}, the ratio of matrix rates")
    if old["settings"]["sizes"] != new["settings"]["sizes"]:
        raise ValueError(f"not the same data: {old['settings']['sizes']} and {new['settings']['sizes']}")
    before = {_key(row): row for row in old["results"]}
    after = {_key(row): row for row in new["results"]}
    worse, n_compared = False, 0
    for key, row in after.items():
        if key not in before:
            continue
        factor, changed = _change(before[key][OURS], row[OURS], row["unit"], scale if row["unit"] == "s" else 1.0)
        n_compared += factor is not None
        if changed:
            worse |= factor is None or factor > 1
            lines.append(_told(key, before[key][OURS], row[OURS], factor, row["unit"]))
    what = "some are" if worse else "none is"
    lines.append(f"{n_compared} of {len(before)} measurements compared, {what} slower or larger beyond scatter")
    return lines, worse


def _key(row: Mapping) -> tuple:
    return row["case"], row["measure"], row["items"]


def _change(before: Mapping, after: Mapping, unit: str, scale: float) -> tuple[float | None, bool]:
    """New over old, None where one is missing, and whether that is a change."""
    if "value" not in before or "value" not in after:
        return None, "value" in before
    factor = after["value"] / (scale * before["value"])
    if max(factor, 1 / factor) < 1 + LEAST[unit]:
        return factor, False
    if unit != "s":
        return factor, abs(after["value"] - before["value"]) >= LEAST_MIB
    low, high = _range(after["samples"])
    old_low, old_high = (scale * value for value in _range(before["samples"]))
    return factor, low > old_high or high < old_low


def _range(samples: Sequence[float]) -> tuple[float, float]:
    if len(samples) == 1:
        return samples[0] * (1 - LEAST["s"]), samples[0] * (1 + LEAST["s"])
    return min(samples), max(samples)


def _named(key: tuple) -> str:
    case, measure, items = key
    return f"{case}, {measure}, {items:,} items"


def _told(key: tuple, before: Mapping, after: Mapping, factor: float | None, unit: str) -> str:
    if factor is None:
        return f"{_named(key)}: FAILED, was {before['value']:.4g} {unit}"
    word = {"s": ("SLOWER", "faster"), "MiB": ("LARGER", "smaller")}[unit][factor < 1]
    return f"{_named(key)}: {word}, {before['value']:.4g} -> {after['value']:.4g} {unit}, {factor:.2f} x"
