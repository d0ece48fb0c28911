"""Knock-outs: a modality's content replaced when it is loaded, to see what a score owes to it.

``knockout: image:noise,price:shuffle`` names what to replace, and how:

    noise       Gaussian vectors with the feature's own mean and deviation in each dimension; values drawn evenly from
                those that occur
    shuffle     each item gets what another item has
    constant    every item gets the same: the mean of all vectors; the most frequent value

Noise and shuffled vectors still tell items apart, as item ids do: a model may learn what goes together from them, and
loses only what content says of it. With constant ones it loses that too.

A name is a feature of the folder, a modality that the model maps to one by a setting (``image`` by ``image_feature``),
a column of the item file, or ``price``, which is the column price_level and nothing else. Knocking out ``image`` also
knocks out what is made from it, every feature called ``…_from_image``: the picture would leak through otherwise. The
reverse, ``image_from_text``, is chosen by the text and stays; a mean of other items' pictures, it is worth a warning.

Items without content stay without. What a run reads is the same for every model and every ``seed``; it changes with
``knockout_seed``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recbole_mm.errors import SettingError, nearest
from recbole_mm.ragged import mean_and_deviation, segments_of

KINDS = ("noise", "shuffle", "constant")
COLUMNS = {"price": "price_level"}  # names of item columns that differ from the column's own
MADE = {  # modalities that a model names otherwise, and what they are made from
    "pseudo_text": "text_from_image", "pseudo_image": "image_from_text", "dropped_text": "dropped_from_text",
}  # fmt: skip
EXAMPLE = "image:noise,price:shuffle"


class KnockOut(NamedTuple):
    """What replaces a feature or an item column.

    Attributes:
        name: as it was given, such as "image".
        kind: "noise", "shuffle" or "constant".
        derived: whether the feature is made from the named one, such as "text_from_image".
    """

    name: str
    kind: str
    derived: bool = False


class KnockOuts:
    """The knock-outs of a run.

    Args:
        text: the setting, such as "image:noise,price:shuffle"; None for none.
        seed: of noise and shuffle.
        settings: of the run; ``<name>_feature`` tells which feature a modality is.

    Raises:
        SettingError: another kind of text, an unknown kind, or two knock-outs of the same thing.
    """

    def __init__(self, text: str | None, *, seed: int, settings: Mapping[str, Any]) -> None:
        self.seed = seed
        self.kinds = parse(text)
        self._feature_of = {  # by modality
            key.removesuffix("_feature"): value
            for key, value in settings.items()
            if key.endswith("_feature") and isinstance(value, str)
        }
        for resolve in (self._feature, _column):
            named: dict[str, str] = {}
            for name in self.kinds:
                if (other := named.setdefault(resolve(name), name)) != name:
                    raise SettingError(f"knockout: {other} and {name} are the same, {resolve(name)}; name it once")

    def of_feature(self, feature: str) -> KnockOut | None:
        """What replaces a feature of the folder; None if it stays as it is."""
        for name, kind in self.kinds.items():
            if self._feature(name) == feature:
                return KnockOut(name, kind)
        for name, kind in self.kinds.items():
            sources = (f"_from_{name}", f"_from_{self._feature(name)}")
            if any(one.endswith(sources) for one in self._called(feature)):
                return KnockOut(name, kind, derived=True)
        return None

    def leaking(self, feature: str) -> str | None:
        """What is knocked out but may show in this feature, which stays: ``image`` in ``image_from_text``."""
        if self.of_feature(feature):
            return None
        for name in self.kinds:
            results = (f"{name}_from_", f"{self._feature(name)}_from_")
            if any(one.startswith(results) for one in self._called(feature)):
                return name
        return None

    def of_column(self, column: str) -> KnockOut | None:
        """What replaces a column of the item file; None if it stays as it is."""
        return next((KnockOut(name, kind) for name, kind in self.kinds.items() if _column(name) == column), None)

    def refuse_idle(
        self, features: Iterable[str], columns: Iterable[str], *, there: Iterable[str], run: str
    ) -> list[str]:
        """A knock-out of what a model does not look at would pass an ordinary run off as a control.

        Args:
            features, columns: that the model has asked for.
            there: features and columns of the folder.
            run: who asked, such as "MSM4SR on demo".

        Returns:
            Names of what is there and does not reach this model, beside others that do: one setting may serve models
            with prices and without.

        Raises:
            SettingError: naming the knock-outs that reach nothing, and what there is to knock out.
        """
        reached = {hit.name for hit in (*map(self.of_feature, features), *map(self.of_column, columns)) if hit}
        unused = [name for name in self.kinds if name not in reached]
        if idle := [n for n in unused if not reached or not {self._feature(n), _column(n)} & {*there}]:
            short = {column: name for name, column in COLUMNS.items()}
            used = [*features, *(short.get(column, column) for column in columns)]
            raise SettingError(
                f"knockout: {run} does not use {', '.join(idle)}; it uses "
                f"{', '.join(used) or 'no features and no item columns that could be knocked out'}"
                f"{nearest(idle[0], used)}"
            )
        return unused

    def replace_rows(self, feature: str, rows: Tensor, starts: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What a model gets instead of a feature's rows [S, F], starts [N] and counts [N].

        ``shuffle`` and ``constant`` copy nothing, ``constant`` leaves one row. ``noise`` makes an array of its own, as
        large as the rows in use; text and pictures get different numbers, so that they do not agree by accident.
        """
        hit, has_content = self.of_feature(feature), counts > 0
        if hit is None or not has_content.any():
            return rows, starts, counts
        if hit.kind == "shuffle":  # a feature that is made from another goes along with it
            items, others = _in_a_circle(has_content, self._random(self._feature(hit.name)))
            starts, counts = starts.clone(), counts.clone()
            starts[items], counts[items] = starts[others], counts[others]
            return rows, starts, counts
        row_ids, _, offsets = segments_of(starts, counts)
        mean, deviation = mean_and_deviation(rows, row_ids)
        if hit.kind == "constant":
            return mean.unsqueeze(0), torch.zeros_like(starts), has_content.long()
        made = torch.randn(len(row_ids), rows.shape[1], generator=self._random(feature))
        return made.mul_(deviation).add_(mean), offsets.where(has_content, 0), counts

    def replace_values(self, column: str, values: Tensor) -> Tensor:
        """What a model gets instead of a column's values [N], 0 where they are not known."""
        hit, known = self.of_column(column), values > 0
        if hit is None or not known.any():
            return values
        replaced = values.clone()
        if hit.kind == "shuffle":
            items, others = _in_a_circle(known, self._random(column))
            replaced[items] = values[others]
        elif hit.kind == "constant":
            replaced[known] = values[known].bincount().argmax()
        else:
            present = values[known].unique()
            drawn = torch.randint(len(present), (int(known.sum()),), generator=self._random(column))
            replaced[known] = present[drawn]
        return replaced

    def _feature(self, name: str) -> str:
        return self._feature_of.get(name, name)

    def _called(self, feature: str) -> list[str]:
        """Its own name and those that settings give it."""
        modalities = [modality for modality, mapped in self._feature_of.items() if mapped == feature]
        return [feature, *(MADE.get(modality, modality) for modality in modalities)]

    def _random(self, name: str) -> torch.Generator:
        """Random numbers that depend on ``knockout_seed`` and the name of a feature or column alone."""
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def parse(text: str | None) -> dict[str, str]:
    """The kind by name of ``"image:noise,price:shuffle"``, in the order given.

    Raises:
        SettingError: with what is wrong.
    """
    if text is None:
        return {}
    if not isinstance(text, str):
        raise SettingError(f"knockout must be a text such as {EXAMPLE}, found {text!r}")
    kinds: dict[str, str] = {}
    for part in text.split(","):
        name, colon, kind = map(str.strip, part.partition(":"))
        if not (name and colon and kind):
            raise SettingError(f"knockout: cannot read {part!r}; it should look like {EXAMPLE}")
        if kind not in KINDS:
            raise SettingError(
                f"knockout: no kind {kind!r} for {name}, expected {', '.join(KINDS)}{nearest(kind, KINDS)}"
            )
        if name in kinds:
            raise SettingError(f"knockout: {name} is named twice")
        kinds[name] = kind
    return kinds


def _column(name: str) -> str:
    return COLUMNS.get(name, name)


def _in_a_circle(present: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Items that are present, in random order, and for each the next one, which is another unless it is alone.

    All items are put in order, present or not: where two features have different gaps, the others stay together.
    """
    order = torch.randperm(len(present), generator=random)
    items = order[present[order]]
    return items, items.roll(-1)
