"""The space of a search of hyper-parameters: which settings, and what each of them may be.

A YAML file says what is searched. Keys that stand alone hold for every model that has the setting, those below the
name of a model for that model, and they win:

    learning_rate: {log: [1.0e-4, 1.0e-2]}         # a number between the two, its logarithm drawn evenly
    hidden_dropout_prob: {choice: [0.1, 0.3, 0.5]}
    MSM4SR:
      temperature: {uniform: [0.05, 0.2]}          # a number between the two, drawn evenly
      n_experts: {int: [2, 8]}                     # a whole number, both ends included
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from recbole_mm.errors import SettingError, nearest
from recbole_mm.records import NOT_IDENTITY

if TYPE_CHECKING:
    from recbole_mm.config import Config
    from recbole_mm.plan import Job

KINDS = ("choice", "uniform", "log", "int")
_LOOKS_LIKE = "{choice: [0.1, 0.3]}, {uniform: [0.0, 0.5]}, {log: [1.0e-4, 1.0e-2]} or {int: [1, 4]}"
_FITTING_KINDS = {float: ("choice", "uniform", "log"), int: ("choice", "int"), type(None): KINDS}
# Settings for all models that say how a model learns, and not what is measured.
_OF_TRAINING = {"MAX_ITEM_LIST_LENGTH", "missing_features", "train_stage", "pretrained_path"}


@dataclass(frozen=True)
class Dimension:
    """What one setting may be.

    Attributes:
        kind: one of `KINDS`.
        values: the choices, or the lowest and the highest value.
        origin: file and line, for messages.
    """

    key: str
    kind: str
    values: tuple[Any, ...]
    origin: str

    def distribution(self) -> Any:
        """The same for Optuna."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.kind == "choice":
            return CategoricalDistribution([encoded(value) for value in self.values])
        if self.kind == "int":
            return IntDistribution(*self.values)
        return FloatDistribution(*self.values, log=self.kind == "log")

    def value_of(self, parameter: Any) -> Any:
        """A setting from what Optuna proposes."""
        if self.kind != "choice":
            return parameter
        return next(value for value in self.values if encoded(value) == parameter)

    def __contains__(self, value: Any) -> bool:
        if self.kind == "choice":
            return encoded(value) in map(encoded, self.values)
        return type(value) in (int, float) and self.values[0] <= value <= self.values[1]


def encoded(value: Any) -> str:
    """As text: Optuna stores no lists, and tells True from 1 and 1 from 1.0 no better than Python does."""
    return json.dumps(value)


class Space(NamedTuple):
    """A file that says what is searched.

    Attributes:
        shared: dimensions for all models, by setting.
        models: those of single models, by model and setting.
    """

    path: Path
    shared: dict[str, Dimension]
    models: dict[str, dict[str, Dimension]]

    def of(self, model_class: type) -> dict[str, Dimension]:
        """Dimensions of a model: the shared ones, and those below its name or that of the model it derives from."""
        own = next((self.models[cls.__name__] for cls in model_class.__mro__ if cls.__name__ in self.models), {})
        return self.shared | own


def space_hash(dimensions: Mapping[str, Dimension]) -> str:
    """12 hex digits of what is searched, whatever the order and the file."""
    content = sorted((key, each.kind, [encoded(value) for value in each.values]) for key, each in dimensions.items())
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def size_of(dimensions: Mapping[str, Dimension]) -> float:
    """How many different settings a space has."""
    sizes = {"choice": lambda values: len(values), "int": lambda values: values[1] - values[0] + 1}
    return math.prod(sizes.get(each.kind, lambda values: math.inf)(each.values) for each in dimensions.values())


def read_space(path: Path) -> Space:
    """Read and check a search space, apart from what depends on the model.

    Raises:
        SettingError: naming the file, the line and the key: no YAML, a key twice, no such model, no such kind of
            dimension, or a range that is none.
    """
    from recbole_mm.registration import is_section
    from recbole_mm.settings import read_settings

    path = Path(path)
    content = read_settings(path)
    lines = _lines_of(path)
    shared, models = {}, {}
    for key, value in content.items():
        if is_section(key, value):
            models[key] = {
                name: _dimension(str(name), each, f"{path}, line {lines[key, str(name)]}")
                for name, each in value.items()
            }
        else:
            shared[key] = _dimension(key, value, f"{path}, line {lines[key,]}")
    if not shared and not any(models.values()):
        raise SettingError(
            f"{path} names no setting to search; lines look like learning_rate: {{log: [1.0e-4, 1.0e-2]}}"
        )
    return Space(path, shared, models)


def _lines_of(path: Path) -> dict[tuple[str, ...], int]:
    """The line of each key, by the keys above it and itself; models by their own names."""
    from recbole_mm.model import find_model
    from recbole_mm.registration import is_section

    lines: dict[tuple[str, ...], int] = {}

    def walk(node: yaml.Node, above: tuple[str, ...]) -> None:
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            section = not above and isinstance(value, yaml.MappingNode) and is_section(key.value, {})
            name = (*above, find_model(key.value).__name__ if section else str(key.value))
            line = key.start_mark.line + 1
            if name in lines:
                raise SettingError(f"{path}, line {line}: {key.value} stands in line {lines[name]} too")
            lines[name] = line
            walk(value, name)

    walk(yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader), ())
    return lines


def _dimension(key: str, value: Any, origin: str) -> Dimension:
    if not isinstance(value, dict) or len(value) != 1:
        raise SettingError(f"{origin}: {key} must be one of {_LOOKS_LIKE}, found {value!r}")
    ((kind, values),) = value.items()
    if kind not in KINDS:
        raise SettingError(f"{origin}: {key} has no kind {kind!r}{nearest(str(kind), KINDS)}; it must be {_LOOKS_LIKE}")
    if not isinstance(values, list):
        raise SettingError(f"{origin}: {key}: {kind} takes a list, found {values!r}; it must be {_LOOKS_LIKE}")
    if kind == "choice":
        if not values or len({encoded(each) for each in values}) < len(values):
            raise SettingError(f"{origin}: {key}: the choices must be at least one and all different, found {values!r}")
        return Dimension(key, kind, tuple(values), origin)
    numbers = (int,) if kind == "int" else (int, float)
    if len(values) != 2 or any(type(each) not in numbers or not math.isfinite(each) for each in values):
        wanted = "two whole numbers" if kind == "int" else "two numbers"
        raise SettingError(f"{origin}: {key}: {kind} takes {wanted}, the lowest and the highest, found {values!r}")
    low, high = values if kind == "int" else map(float, values)
    if not low < high:
        raise SettingError(f"{origin}: {key}: the lowest value {low} must be below the highest, found {high}")
    if kind == "log" and low <= 0:
        raise SettingError(f"{origin}: {key}: log takes numbers above 0, found {low}")
    return Dimension(key, kind, (low, high), origin)


# ------------------------------------------------ the space of one model


def dimensions_of(space: Space, job: Job) -> tuple[dict[str, Dimension], list[str]]:
    """What is searched for a model, checked; and what the space holds for other models only.

    Raises:
        SettingError: naming file, line and key: a setting that no model has, that says what is measured, or that is of
            another type; a value that the model does not take.
    """
    from recbole.utils import training_arguments

    from recbole_mm.config import UnknownSettingError

    base = job.config()
    dimensions, others = space.of(base.model_class), []
    shared = {key for key, dimension in dimensions.items() if space.shared.get(key) is dimension}
    if base.internal_config_dict["epochs"] == 1:  # it counts, and nothing is trained that changes the ranking
        others = sorted(shared & set(training_arguments))
    searched = {key: dimension for key, dimension in dimensions.items() if key not in others}
    for dimension in searched.values():
        _check_kind(dimension, base)
    while True:
        try:
            _check_values(searched, job)
            return searched, others
        except UnknownSettingError as error:
            if error.key not in shared or error.key not in known_settings():
                raise
            others.append(error.key)
            del searched[error.key]


def _check_kind(dimension: Dimension, base: Config) -> None:
    key, origin, default = dimension.key, dimension.origin, base.internal_config_dict.get(dimension.key)
    if key in _decide_what_is_measured():
        raise SettingError(f"{origin}: {key} says what is measured, and is no hyper-parameter that can be searched")
    kinds = _FITTING_KINDS.get(type(default), ("choice",))
    if dimension.kind not in kinds:
        raise SettingError(
            f"{origin}: {key} is {type(default).__name__}, such as {default!r}; "
            f"search it with {' or '.join(kinds)}, not with {dimension.kind}"
        )


def _check_values(dimensions: Mapping[str, Dimension], job: Job) -> None:
    """Whether a model takes every value; ranges are without holes, so that it is enough to look at both ends.

    Values of all dimensions are tried together, and on their own only to find out which one is wrong.
    """
    from recbole_mm.config import Config, UnknownSettingError

    def attempt(values: Mapping[str, Any]) -> None:
        origins = {key: dimensions[key].origin for key in values}
        Config(job.model, job.dataset, settings={**job.all_settings(), **values}, origins=origins)

    try:
        for number in range(max((len(each.values) for each in dimensions.values()), default=0)):
            attempt({key: each.values[number % len(each.values)] for key, each in dimensions.items()})
    except UnknownSettingError:
        raise
    except SettingError:
        for key, dimension in dimensions.items():
            for value in dimension.values:
                try:
                    attempt({key: value})
                except SettingError as error:
                    origin = dimension.origin
                    raise SettingError(str(error) if origin in str(error) else f"{origin}: {error}") from error


@cache
def known_settings() -> frozenset[str]:
    """Settings of all models that run here, ours and RecBole's."""
    import recbole

    from recbole_mm.model import recbole_model_names
    from recbole_mm.paths import properties_dir
    from recbole_mm.settings import read_settings

    theirs = Path(recbole.__file__).parent / "properties" / "model"
    files = [*(properties_dir() / "model").glob("*.yaml"), *(theirs / f"{name}.yaml" for name in recbole_model_names())]
    return frozenset(key for file in files if file.is_file() for key in read_settings(file))


@cache
def _decide_what_is_measured() -> frozenset[str]:
    """Settings that would change the question instead of the answer."""
    from recbole.utils import dataset_arguments, evaluation_arguments, general_arguments, training_arguments

    from recbole_mm.paths import properties_dir
    from recbole_mm.settings import read_settings

    overall = read_settings(properties_dir() / "overall.yaml").keys() - set(training_arguments)
    keys = NOT_IDENTITY | overall | {*evaluation_arguments, *general_arguments, *dataset_arguments}
    return frozenset(keys - _OF_TRAINING)
