"""The papers' released weights under our names: which tensor of theirs is which parameter of ours.

A model that can take released weights has three attributes:

* ``released_names``, ours: theirs. Our side is a regular expression, tried in order; their side too, into which ``\\1``
  puts a group of ours. A name that their side spells out exactly is taken; of several that match, shapes decide. Parts
  that differ in one number are joined in the order of that number, such as the weights of E experts. ``.T`` at the end
  says that a matrix is to be turned: theirs is [in, out] and ours [out, in], or the other way round. `` ?`` at the end
  says that words and shapes find the parts, but not their order, which is asked of the user.
* ``released_dropped``, theirs: reason, as a regular expression, for what has no place in our model.
* ``released_rows``, ours: kind, for tables whose rows have an order of their own, such as one row per item.

What they cannot decide is decided by the user, who names it. Nothing is guessed: a tensor that is missing, left over
or fits two places stops the import.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from recbole_mm.data.layout import PADDING_TOKEN
from recbole_mm.errors import CheckpointError, SettingError


class Pattern(NamedTuple):
    """What a name of theirs looks like: an expression; matrices are turned; the order of several parts is not known."""

    expression: str
    turned: bool
    unordered: bool


class Order(NamedTuple):
    """Tokens of the rows of a table, in their order and in ours; padding is left out of theirs."""

    theirs: Sequence[str]
    ours: Sequence[str]


@dataclass
class Report:
    """What became of each tensor.

    Attributes:
        taken: ours -> the names of theirs it was made of.
        fresh: ours -> why it starts anew, all of it or in part.
        dropped: theirs -> why it is not needed.
    """

    taken: dict[str, list[str]] = field(default_factory=dict)
    fresh: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.taken)} parameters taken:"]
        lines += [f"  {ours} <- {_shortened(theirs)}" for ours, theirs in self.taken.items()]
        for title, reasons in (("starting anew", self.fresh), ("not needed", self.dropped)):
            if reasons:
                lines += [f"{title}:", *(f"  {name}: {reason}" for name, reason in reasons.items())]
        return "\n".join(lines)


def _shortened(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]} ({len(names)} parts)"


def _beside(weights: Sequence[str]) -> list[str]:
    """Names of the biases that go with weights."""
    return [re.sub("weight$", "bias", weight) for weight in weights]


# ---------------------------------------------------------------- importing


def import_released(
    model: nn.Module,
    state: Mapping[str, Any],
    names: Mapping[str, str | Sequence[str]] | None = None,
    *,
    orders: Mapping[str, Order] | None = None,
) -> Report:
    """Give a model the weights of a released checkpoint.

    Args:
        model: with ``released_names``, see above.
        state: theirs, tensors by name.
        names: what the patterns cannot decide, ours: theirs, or a list of theirs to be joined in its order. A ``*`` in
            theirs stands for a number; of a list, all names of the lowest number come first, then those of the next.
            ``.T`` at the end stands for the transpose. A bias comes along with its weight. Names below ``drop`` are not
            needed.
        orders: of the rows of tables, by kind, such as "item"; without it such a table starts anew.

    Raises:
        CheckpointError: listing everything missing, left over, ambiguous, or of another shape. The model is unchanged.
        SettingError: ``names`` has something other than names.
    """
    if wrong := [name for name, theirs in (names or {}).items() if not _are_names(theirs)]:
        raise SettingError(f"names: {wrong[0]} must have a name or a list of names, found {names[wrong[0]]!r}")
    importer = _Importer(model, state, names or {}, orders or {})
    importer.match()
    if importer.problems:
        listed = "".join(f"\n  - {problem}" for problem in importer.problems)
        raise CheckpointError(
            f"the checkpoint does not fit {type(model).__name__}:{listed}\n"
            "  use the settings, and features of the width, that it was trained with\n"
            "  say which is which in a YAML file (--names), ours: theirs, a * for a number, such as\n"
            "    some.weight: theirs.*.weight\n"
            "    other.weight: [theirs.*.first.weight, theirs.*.second.weight]\n"
            "    drop: [what.is.not.needed]"
        )
    model.load_state_dict({**model.state_dict(), **importer.values})
    return importer.report


class _Importer:
    """One import: names are matched, from what is certain to what is left."""

    def __init__(
        self,
        model: nn.Module,
        state: Mapping[str, Any],
        names: Mapping[str, str | Sequence[str]],
        orders: Mapping[str, Order],
    ) -> None:
        self.kinds, self.orders = getattr(model, "released_rows", {}), orders
        self.drop_reasons = model.released_dropped
        self.given = {ours: theirs for ours, theirs in names.items() if ours != "drop"}
        self.given_drops = _listed(names.get("drop", []))
        # Those without a place so far are in self.open. One that serves at two places is there once.
        self.ours: dict[str, Tensor] = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self.open = dict.fromkeys(self.ours)
        self.patterns = {name: _pattern(model.released_names, name) for name in self.ours}
        self.theirs: dict[str, Tensor] = {}  # not used so far
        self.values: dict[str, Tensor] = {}
        self.report, self.problems = Report(), []
        for name, value in state.items():
            if not isinstance(value, Tensor):
                self.problems.append(f"{name} is a {type(value).__name__}, not a tensor")
            elif value.is_floating_point() and not value.isfinite().all():
                self.problems.append(f"{name} {_shape(value)} has values that are not finite")
            else:
                self.theirs[name] = value

    def match(self) -> None:
        self._use_what_is_given()
        for name in list(self.open):
            pattern = self.patterns[name]
            for exact in [theirs for theirs in self.theirs if re.escape(theirs) == pattern.expression]:
                self._take(name, [exact], turned=pattern.turned)
        for theirs in list(self.theirs):
            reasons = [reason for pattern, reason in self.drop_reasons.items() if _matches(pattern, theirs)]
            if reasons:
                self._drop(theirs, reasons[0])
        while self._use_what_is_unambiguous():
            pass
        self._complain()

    # ------------------------------------------------ steps

    def _use_what_is_given(self) -> None:
        for name, theirs in self.given.items():
            if name not in self.ours:
                self.problems.append(f"{name}, given by names, is no parameter of the model")
                continue
            entries = [(each, False) if each in self.theirs else _split(each) for each in _listed(theirs)]
            columns = []  # of each entry, the names that it stands for
            for entry, _ in entries:
                found = [each for each in self._like(entry) if not any(each in column for column in columns)]
                if not found:
                    self.problems.append(f"{name}: {entry}, given by names, is not in the checkpoint, or used twice")
                columns.append(found)
            numbers = {len(column) for column in columns}
            if 0 in numbers or len(numbers) > 1:
                if 0 not in numbers:
                    counts = ", ".join(f"{entry} for {len(c)}" for (entry, _), c in zip(entries, columns, strict=True))
                    self.problems.append(f"{name}: given names must stand for equally many, found {counts}")
                del self.open[name]
                continue
            parts = [part for row in zip(*columns, strict=True) for part in row]  # number by number
            self._take(name, parts, turned=any(turned for _, turned in entries) or self.patterns[name].turned)
        for each in self.given_drops:
            matching = self._like(each)
            if not matching:
                self.problems.append(f"{each}, given to drop, is not in the checkpoint, or used")
            for theirs in matching:
                self._drop(theirs, "as given")

    def _like(self, name: str) -> list[str]:
        """Unused names that are equal to one in which ``*`` stands for a number, by number."""
        pattern = re.escape(name).replace(r"\*", r"\d+")
        return sorted((theirs for theirs in self.theirs if re.fullmatch(pattern, theirs)), key=_by_number)

    def _use_what_is_unambiguous(self) -> bool:
        """One round; whether it came any further."""
        n_open = len(self.open)
        for name in list(self.open):
            biases = (
                _beside(self.report.taken.get(re.sub("bias$", "weight", name), [])) if name.endswith("bias") else []
            )
            if biases and self._fits(name, biases):
                self._take(name, biases, turned=False)
                continue
            fitting = self._fitting(name)
            if len(fitting) == 1:
                self._take(name, fitting[0], turned=self.patterns[name].turned)
        return len(self.open) < n_open

    def _fitting(self, name: str) -> list[list[str]]:
        """Parts that our parameter could be made of, in their order."""
        shapes = {theirs: self.theirs[theirs].shape for theirs in self._matching(name)}
        found = [parts for parts in families(shapes) if self._fits(name, parts)]
        return [parts for parts in found if len(parts) == 1 or not self.patterns[name].unordered]

    def _matching(self, name: str) -> list[str]:
        return [theirs for theirs in self.theirs if _matches(self.patterns[name].expression, theirs)]

    def _fits(self, name: str, parts: Sequence[str]) -> bool:
        if not all(part in self.theirs for part in parts):
            return False
        tensors, shape = [self.theirs[part] for part in parts], self.ours[name].shape
        if name not in self.kinds:
            return joined(tensors, shape, turned=self.patterns[name].turned) is not None
        return self._rows_of(name, tensors) is not None

    def _rows_of(self, name: str, tensors: Sequence[Tensor]) -> Tensor | None:
        """A table like ours but for the number and order of its rows, or None: tables of parts of a row are put side by
        side."""
        shape = self.ours[name].shape[1:]
        if len({tensor.shape for tensor in tensors}) > 1 or not tensors[0].dim():
            return None
        table = tensors[0] if tensors[0].shape[1:] == shape and len(tensors) == 1 else torch.stack(list(tensors), 1)
        order = self.orders.get(self.kinds[name])
        if table.shape[1:] != shape or (order and len(table) - len(order.theirs) not in (0, 1)):
            return None
        return table

    def _take(self, name: str, parts: list[str], *, turned: bool) -> None:
        ours = self.ours[name]
        tensors = [self.theirs.pop(part) for part in parts]
        del self.open[name]
        if name in self.kinds:
            self._take_rows(name, parts, tensors)
            return
        value = joined(tensors, ours.shape, turned=turned)
        if value is None:
            self.problems.append(f"{name} {_shape(ours)} cannot be made of {_with_shapes(parts, tensors)}")
            return
        self.values[name] = value.to(ours)
        self.report.taken[name] = parts

    def _take_rows(self, name: str, parts: list[str], tensors: Sequence[Tensor]) -> None:
        ours, kind = self.ours[name], self.kinds[name]
        if kind not in self.orders:
            self.report.fresh[name] = f"the rows of {_shortened(parts)} have an order of their own, which is not given"
            reason = f"no order of its rows is given, one row per {kind}"
            self.report.dropped.update(dict.fromkeys(parts, reason))
            return
        order, table = self.orders[kind], self._rows_of(name, tensors)
        if table is None:
            self.problems.append(
                f"{name} {_shape(ours)} cannot be made of {_with_shapes(parts, tensors)}: "
                f"{len(order.theirs)} tokens are given, one row each is expected, or one more for padding"
            )
            return
        n_padding = len(table) - len(order.theirs)
        row_of = {token: row for row, token in enumerate(order.theirs, start=n_padding)}
        if n_padding:
            row_of[PADDING_TOKEN] = 0
        rows = torch.tensor([row_of.get(str(token), -1) for token in order.ours])
        known = rows >= 0
        value = ours.clone()
        value[known] = table[rows[known]].to(ours)
        self.values[name] = value
        self.report.taken[name] = parts
        without = [token for token, row in zip(order.ours, rows.tolist(), strict=True) if row < 0]
        if without := [str(token) for token in without if str(token) != PADDING_TOKEN]:
            examples = ", ".join(repr(token) for token in without[:3])
            self.report.fresh[name] = f"in {len(without)} rows that are not in theirs, such as {examples}"

    def _drop(self, theirs: str, reason: str) -> None:
        del self.theirs[theirs]
        self.report.dropped[theirs] = reason

    def _complain(self) -> None:
        for name in self.open:
            what, fitting, matching = f"{name} {_shape(self.ours[name])}", self._fitting(name), self._matching(name)
            if fitting:
                self.problems.append(f"{what} is ambiguous: {' or '.join(map(_shortened, fitting))}")
            elif parts := self._in_some_order(name, matching):
                self.problems.append(f"{what} is ambiguous: made of these, in which order? {', '.join(parts)}")
            elif matching:
                unfit = _with_shapes(matching, [self.theirs[theirs] for theirs in matching])
                self.problems.append(f"{what} is missing; these match, but do not fit: {unfit}")
            else:
                self.problems.append(f"{what} is missing")
        self.problems += [f"{name} {_shape(value)} is left over" for name, value in self.theirs.items()]

    def _in_some_order(self, name: str, matching: Sequence[str]) -> list[str]:
        """Several names of one shape that together would fill our parameter; empty if there are none."""
        for shape in {self.theirs[theirs].shape for theirs in matching}:
            parts = sorted((theirs for theirs in matching if self.theirs[theirs].shape == shape), key=_by_number)
            if len(parts) > 1 and self._fits(name, parts):
                return parts
        return []


# ---------------------------------------------------------------- names and shapes


def _listed(value: str | Sequence[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _are_names(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(each, str) for each in value))


def _pattern(table: Mapping[str, str], ours: str) -> Pattern:
    """Of their names for one of ours; nothing matches if the table has none."""
    for pattern, theirs in table.items():
        if match := re.fullmatch(pattern, ours):
            theirs = re.sub(r"\\(\d)", lambda group, match=match: re.escape(match[int(group[1])]), theirs)
            return Pattern(*_split(theirs.removesuffix(" ?")), unordered=theirs.endswith(" ?"))
    return Pattern("", turned=False, unordered=False)


def _split(name: str) -> tuple[str, bool]:
    """Without ``.T`` at the end, and whether it was there."""
    return name.removesuffix(".T"), name.endswith(".T")


def _matches(pattern: str, name: str) -> bool:
    return re.fullmatch(pattern, name, re.IGNORECASE) is not None


def _shape(value: Tensor) -> str:
    return str(list(value.shape))


def _with_shapes(names: Sequence[str], tensors: Sequence[Tensor]) -> str:
    listed = [f"{name} {_shape(tensor)}" for name, tensor in zip(names, tensors, strict=True)]
    return ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")


def _by_number(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def families(shapes: Mapping[str, Sequence[int]]) -> list[list[str]]:
    """Names of the same shape that differ in one number alone, by that number; a name without such kin by itself.

    ``e.0.weight, e.1.weight, b`` are two families; where two numbers vary, a name is in a family for each of them.
    """
    kin: dict[tuple, list[str]] = {}
    for name in sorted(shapes, key=_by_number):
        for number in re.finditer(r"\d+", name):
            kin.setdefault((name[: number.start()], name[number.end() :], tuple(shapes[name])), []).append(name)
    found = [names for names in kin.values() if len(names) > 1]
    alone = shapes.keys() - {name for names in found for name in names}
    return found + [[name] for name in sorted(alone, key=_by_number)]


def joined(parts: Sequence[Tensor], shape: Sequence[int], *, turned: bool = False) -> Tensor | None:
    """Parts side by side along the first dimension so that they have a shape, or fill it block by block; None if they
    cannot.

    Args:
        turned: matrices are stored the other way round. It decides for square ones and for stacks of matrices; a
            single one that is not square fits in one way only.
    """
    if len({part.shape for part in parts}) > 1:
        return None
    shape, n_values = torch.Size(shape), sum(part.numel() for part in parts)
    if not parts[0].dim():
        return parts[0] if len(parts) == 1 and shape == () else None  # a single number
    ways = [list(parts)]
    if parts[0].dim() == 2 and (turned or len(shape) == 2):
        ways.insert(0 if turned else 1, [part.T for part in parts])
    for way in ways:
        length, *rest = way[0].shape
        axis = len(shape) - way[0].dim()  # along which a part lies, in ours
        if axis >= 0 and list(shape[axis + 1 :]) == rest and length and shape[axis] % length == 0:
            if n_values == shape.numel():
                return torch.cat(way).reshape(shape)
    return None
