"""Our models under RecBole's own naming conventions, so that its ``run_recbole(model="MSM4SR")`` finds them.

RecBole looks for a model in ``recbole.model.sequential_recommender.<name>``, for its data set class in
``recbole.data.dataset.<Name>Dataset``, for its trainer in ``recbole.trainer.<Name>Trainer`` and for its defaults in a
file of its own package. Each of the four is answered when RecBole is imported; nothing of it is imported from here.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from recbole_mm.compat import around
from recbole_mm.model import lineage, model_names
from recbole_mm.paths import properties_dir

RECIPE = "recipe"  # key of a dataset's property file, read by dataset_prep
_PREFIX = "recbole.model.sequential_recommender."


def default_files(model_class: type) -> list[Path]:
    """Our property files with the defaults of a model, weakest first: those of its base classes before its own."""
    models = properties_dir() / "model"
    return [properties_dir() / "overall.yaml", *(models / f"{name}.yaml" for name in lineage(model_class))]


def dataset_settings(dataset: str, model_class: type) -> dict[str, Any]:
    """What a dataset changes; how it is prepared, ``recipe:``, is no setting of a run."""
    general, own = parts_of({key: value for key, value in _dataset_file(dataset).items() if key != RECIPE}, model_class)
    return general | own


def parts_of(content: dict[str, Any], model_class: type) -> tuple[dict[str, Any], dict[str, Any]]:
    """A file of settings as plain keys, for every model, and those below ``<Model>:``, for that one.

    The latter hold for models that derive from it as well, unless these have a section of their own.
    """
    models = {key: value for key, value in content.items() if is_section(key, value)}
    general = {key: value for key, value in content.items() if key not in models}
    own = next((models[cls.__name__] for cls in model_class.__mro__ if cls.__name__ in models), {})
    return general, own


def is_section(key: str, value: Any) -> bool:
    """Whether a line of a file of settings is a model's section, and no setting such as MAX_ITEM_LIST_LENGTH."""
    return key[:1].isupper() and "_" not in key and isinstance(value, dict)


def has_recipe(dataset: str) -> bool:
    """Whether a dataset's property file says how to prepare it."""
    return RECIPE in _dataset_file(dataset)


def _dataset_file(dataset: str) -> dict[str, Any]:
    file = properties_dir() / "dataset" / f"{dataset}.yaml"
    return (yaml.safe_load(file.read_text(encoding="utf-8")) or {}) if file.is_file() else {}


class _ModelFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Answers ``recbole.model.sequential_recommender.msm4sr`` with the module object ``recbole_mm.model.msm4sr``."""

    def find_spec(self, fullname: str, path=None, target=None) -> importlib.machinery.ModuleSpec | None:
        name = fullname.removeprefix(_PREFIX)
        if name == fullname or name not in (known.lower() for known in model_names()):
            return None
        return importlib.machinery.ModuleSpec(fullname, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = importlib.import_module(f"recbole_mm.model.{spec.name.removeprefix(_PREFIX)}")
        self._own_spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._own_spec  # the import system has just put the alias there


def _answer(package: ModuleType, suffix: str, module: str, attribute: str) -> None:
    """Let ``package.<Model><suffix>`` be our class; imported when asked for, since our modules import that package."""

    def find(name: str):
        if name.endswith(suffix) and name.removesuffix(suffix) in model_names():
            return getattr(importlib.import_module(module), attribute)
        raise AttributeError(f"module {package.__name__!r} has no attribute {name!r}")

    package.__getattr__ = find


@around("recbole.data.dataset")
def datasets():
    module = yield
    _answer(module, "Dataset", "recbole_mm.data.dataset", "MultimodalDataset")


@around("recbole.trainer")
def trainers():
    module = yield
    _answer(module, "Trainer", "recbole_mm.trainer", "Trainer")


@around("recbole.config.configurator")
def defaults():
    module = yield
    stock = module.Config
    load = stock._load_internal_config_dict

    def load_ours_too(self, model, model_class, dataset):
        load(self, model, model_class, dataset)
        if lineage(model_class):
            for file in default_files(model_class):
                self._update_internal_config_dict(file)
            self.internal_config_dict.update(dataset_settings(dataset, model_class))

    stock._load_internal_config_dict = load_ours_too


def apply() -> None:
    """Idempotent."""
    if not any(isinstance(finder, _ModelFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _ModelFinder())
