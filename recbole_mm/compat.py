"""What RecBole 1.2.1 breaks on with today's packages, one patch each.

``apply()`` imports nothing but NumPy. A patch of a RecBole module waits until that module is imported, or runs at once
if it is already. Patches look for the fault itself and not for a version, so they do nothing where nothing is broken.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np

Patch = Callable[[], Generator[None, ModuleType, None]]
_PATCHES: dict[str, list[Patch]] = {}


def apply() -> None:
    """Patch what is imported, and see to it that the rest is patched when it is; a second call does nothing."""
    if _FINDER in sys.meta_path:
        return
    _name_numpy_types()
    sys.meta_path.insert(0, _FINDER)
    for name, patches in _PATCHES.items():
        if name in sys.modules:
            _after(sys.modules[name], _before(patches))


def around(module_name: str) -> Callable[[Patch], Patch]:
    """Run the decorated generator around the import of a module: up to its ``module = yield`` before, the rest after.

    If the module is imported already, all of it runs at once.
    """

    def register(patch: Patch) -> Patch:
        _PATCHES.setdefault(module_name, []).append(patch)
        if _FINDER in sys.meta_path and module_name in sys.modules:
            _after(sys.modules[module_name], _before([patch]))
        return patch

    return register


def _before(patches: list[Patch]) -> list[Generator]:
    running = [patch() for patch in patches]
    for patch in running:
        next(patch)
    return running


def _after(module: ModuleType, running: list[Generator]) -> None:
    for patch in running:
        with suppress(StopIteration):
            patch.send(module)


class _Finder(MetaPathFinder):
    """Finds what the other finders find, and puts our loader before theirs for the modules to be patched."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name not in _PATCHES:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec = find(name, path, target) if finder is not self and find else None
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _PatchingLoader(spec.loader, _PATCHES[name])
                return spec
        return None


class _PatchingLoader(Loader):
    """The real loader, with patches around the execution of the module."""

    def __init__(self, loader: Any, patches: list[Patch]) -> None:
        self._loader, self._patches = loader, patches

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = module.__spec__.loader = self._loader
        running = _before(self._patches)
        self._loader.exec_module(module)
        _after(module, running)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


_FINDER = _Finder()


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    stock = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, stock)


# ---------------------------------------------------------------- numpy


def _name_numpy_types() -> None:
    # NumPy 2 removed the first four, 1.24 the last; RecBole and ray use them, the last even before a Config adds it.
    names = {
        "bool8": np.bool_,
        "float_": np.float64,
        "complex_": np.complex128,
        "unicode_": np.str_,
        "float": np.float64,
    }
    for name, kind in names.items():
        if name not in vars(np):
            setattr(np, name, kind)


# ---------------------------------------------------------------- files


@around("recbole.utils.utils")
def _make_folders_that_others_make_too() -> Generator[None, ModuleType, None]:
    # RecBole looks whether a folder is there and then makes it, which fails where another process is quicker. The code
    # is exchanged and not the name, which others have imported.
    module = yield

    def ensure_dir(dir_path):
        os.makedirs(dir_path, exist_ok=True)

    module.ensure_dir.__code__ = ensure_dir.__code__


# ---------------------------------------------------------------- models


@around("recbole.model.sequential_recommender.sine")
def _leave_anomaly_mode_alone() -> Generator[None, ModuleType, None]:
    # sine.py switches it on for the whole process, which about doubles the cost of every training.
    import torch

    imported = hasattr(sys.modules["recbole.model.sequential_recommender.sine"], "SINE")
    wanted = torch.is_anomaly_enabled() and not imported
    yield
    torch.autograd.set_detect_anomaly(wanted)


@around("recbole.model.general_recommender")
@around("recbole.model.knowledge_aware_recommender")
def _give_dok_matrix_its_update() -> Generator[None, ModuleType, None]:
    # SciPy 1.13 removed the private method with which LightGCN and others fill their graph.
    from scipy.sparse import dok_matrix

    if not hasattr(dok_matrix, "_update"):
        dok_matrix._update = lambda self, data: self._dict.update(data)
    yield


@around("recbole.model.abstract_recommender")
def _unpack_other_parameter() -> Generator[None, ModuleType, None]:
    # Arrays and sparse matrices, as EASE and ItemKNN have, lie in our checkpoints as tensors.
    module = yield
    stock = module.AbstractRecommender.load_other_parameter

    @wraps(stock)
    def load_other_parameter(self: Any, para: dict[str, Any] | None) -> None:
        from recbole_mm.checkpoint import unpacked

        stock(self, unpacked(para))

    module.AbstractRecommender.load_other_parameter = load_other_parameter


# ---------------------------------------------------------------- data


@around("recbole.data.dataset.dataset")
@around("recbole.data.dataset.sequential_dataset")
@around("recbole.data.dataset.kg_dataset")
def _count_sequences_row_by_row() -> Generator[None, ModuleType, None]:
    # pandas 3 gives the whole column to the function in column.agg(len), where RecBole means each row.
    import pandas as pd

    module = yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        broken = not isinstance(pd.Series([np.zeros(2)]).agg(len), pd.Series)
    if broken:
        module.len = lambda value: value.map(len) if _is_sequence_column(value) else len(value)


def _is_sequence_column(value: Any) -> bool:
    import pandas as pd

    return isinstance(value, pd.Series) and len(value) > 0 and isinstance(value.iloc[0], np.ndarray)


@around("recbole.data.dataset.dataset")
def _fill_missing_values_in_place() -> Generator[None, ModuleType, None]:
    # With copy-on-write, always on in pandas 3, feat[field].fillna(inplace=True) changes nothing.
    import pandas as pd

    module = yield
    frame = pd.DataFrame({"x": [np.nan]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        frame["x"].fillna(value=0, inplace=True)
    if frame["x"].isna().any():
        from recbole_mm.data.reading import SafeReading

        module.Dataset._load_feat = SafeReading._load_feat
        module.Dataset._fill_nan = SafeReading._fill_nan


# ---------------------------------------------------------------- evaluation


@around("recbole.evaluator.collector")
def _move_only_tensors() -> Generator[None, ModuleType, None]:
    # RecBole calls .cpu() on the counts that ItemCoverage, AveragePopularity, GiniIndex and TailPercentage need.
    module = yield
    stock = module.Collector.get_data_struct

    @wraps(stock)
    def get_data_struct(self: Any) -> Any:
        collected = self.data_struct._data_dict
        counts = {key: value for key, value in collected.items() if not hasattr(value, "cpu")}
        for key in counts:
            del collected[key]
        result = stock(self)
        collected.update(counts)
        result._data_dict.update(counts)
        return result

    module.Collector.get_data_struct = get_data_struct


# ---------------------------------------------------------------- checkpoints


@around("recbole.trainer.trainer")
def _save_plain_checkpoints() -> Generator[None, ModuleType, None]:
    # RecBole pickles its Config into the checkpoint, which torch 2.6 refuses to load; and it writes in place.
    module = yield

    def saving_plain(stock: Callable) -> Callable:
        @wraps(stock)
        def save(self: Any, *args: Any, **kwargs: Any) -> Any:
            import torch

            from recbole_mm import checkpoint

            def write(state: dict[str, Any], file: Any, **_: Any) -> None:
                checkpoint.save(file, state)

            with _replaced(torch, "save", write):
                return stock(self, *args, **kwargs)

        return save

    for trainer in (module.Trainer, module.PretrainTrainer, module.DecisionTreeTrainer):
        for name in ("_save_checkpoint", "save_pretrained_model"):
            if name in vars(trainer):
                setattr(trainer, name, saving_plain(vars(trainer)[name]))


@around("recbole.quick_start.quick_start")
def _load_plain_checkpoints() -> Generator[None, ModuleType, None]:
    # load_data_and_model expects a Config in the checkpoint. Its code is exchanged and not its name, so that scripts
    # which imported the name before this package get the cure as well.
    module = yield
    function = module.load_data_and_model
    function.stock = FunctionType(function.__code__, function.__globals__, function.__name__)

    def load_data_and_model(model_file):
        from recbole_mm.compat import load_with_config_rebuilt

        return load_with_config_rebuilt(model_file)

    function.__code__ = load_data_and_model.__code__


def load_with_config_rebuilt(model_file: str) -> tuple:
    """RecBole's ``load_data_and_model`` for a plain checkpoint.

    Raises:
        CheckpointError: the file is missing, cut short or no checkpoint of ours.
    """
    import torch
    from recbole.quick_start import quick_start

    from recbole_mm import checkpoint

    state = checkpoint.load(model_file)
    state["config"] = checkpoint.config_from(state["config"])
    stock_load = torch.load

    def load(file: Any, *args: Any, **kwargs: Any) -> Any:
        return state if file is model_file else stock_load(file, *args, **kwargs)

    with _replaced(torch, "load", load):
        return quick_start.load_data_and_model.stock(model_file)


# ---------------------------------------------------------------- tuning


@around("recbole.quick_start.quick_start")
def _do_without_ray() -> Generator[None, ModuleType, None]:
    # quick_start imports ray for one line of its objective function; old ray needs pkg_resources, which is gone.
    import inspect

    try:
        from ray import tune
    except Exception:  # a half-broken package fails with whatever its own imports fail with
        for name in [name for name in sys.modules if name == "ray" or name.startswith("ray.")]:
            del sys.modules[name]
        tune = SimpleNamespace(report=lambda **metrics: None)
        ray = ModuleType("ray")
        ray.tune = tune
        with _stand_in("ray", ray):
            yield  # only RecBole sees the stand-in: others shall find out that there is no ray
        return
    module = yield
    parameters = inspect.signature(tune.report).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        # Newer ray wants one dict, RecBole gives keywords.
        module.tune = SimpleNamespace(report=lambda **metrics: tune.report(metrics))


@contextmanager
def _stand_in(name: str, module: ModuleType) -> Iterator[None]:
    sys.modules[name] = module
    try:
        yield
    finally:
        with suppress(KeyError):
            del sys.modules[name]


@around("recbole.trainer.hyper_tuning")
def _draw_from_either_generator() -> Generator[None, ModuleType, None]:
    # RecBole draws with a RandomState, which hyperopt 0.2.5 wants (randint) and later ones do not (integers).
    module = yield

    class RandomState(np.random.RandomState):
        def integers(self, *args: Any, **kwargs: Any) -> Any:
            return self.randint(*args, **kwargs)

    stock = module.exhaustive_search

    @wraps(stock)
    def exhaustive_search(*args: Any, **kwargs: Any) -> Any:
        with _replaced(np.random, "RandomState", RandomState):
            return stock(*args, **kwargs)

    module.exhaustive_search = exhaustive_search
