"""Checkpoints of tensors and plain data only: they load with ``weights_only=True``, so no file can run code.

A checkpoint is RecBole's dict (config, epoch, cur_step, best_valid_score, state_dict, other_parameter, optimizer) and
whatever else a caller puts in. Its config is a dict of settings, from which ``config_from`` makes a Config again.
"""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recbole.config import Config

from recbole_mm.data.files import write_atomically
from recbole_mm.errors import CheckpointError

# RecBole finds these anew from the model class, the metrics and the machine.
DERIVED = ("MODEL_TYPE", "MODEL_INPUT_TYPE", "eval_type", "device", "single_spec", "local_rank")
# RecBole changes these on the way in; the stored values are put back afterwards.
_CHANGED_BY_CONFIG = ("data_path", "train_neg_sample_args")
_PACKED = "recbole_mm.packed"  # marks a dict that stands for an array or a sparse matrix
_SPARSE_FORMATS = ("csr", "csc", "coo", "lil", "dok", "bsr", "dia")


# ---------------------------------------------------------------- save and load


def save(path: str | Path, state: dict[str, Any]) -> None:
    """Write a checkpoint, complete or not at all.

    Args:
        state: with the keys above. ``config`` may be a Config. Modules in ``other_parameter`` are left out: their
            weights are in ``state_dict`` already.

    Raises:
        CheckpointError: a value is neither a tensor nor plain data; the message names it.
    """
    state = dict(state)
    if isinstance(state.get("config"), Config):
        state["config"] = settings_of(state["config"])
    if isinstance(state.get("other_parameter"), Mapping):
        kept = {k: v for k, v in state["other_parameter"].items() if not isinstance(v, torch.nn.Module)}
        state["other_parameter"] = kept
    stored = _tensors_and_plain(state, "")
    buffer = io.BytesIO()  # torch reports a full disk as an internal error of its own; a plain write says what it is
    # torch.serialization.save is torch.save under a name that stays when compat redirects the other one.
    torch.serialization.save(stored, buffer)
    write_atomically(Path(path), lambda out: out.write(buffer.getbuffer()))


def load(path: str | Path, *, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint; code that a file may carry is refused and never runs.

    Raises:
        CheckpointError: no file, cut short, no checkpoint, or more than tensors and plain data in it.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint {path}; the log of a run names the file that it saved")
    try:
        state = torch.serialization.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # torch raises half a dozen classes here, depending on the bytes it meets
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint: it is cut short, is no checkpoint, or holds more than tensors and "
            f"plain data, which could run code\n  train again, or copy it again ({type(error).__name__}: {reason})"
        ) from error
    require(path, state, config=Mapping, state_dict=Mapping)
    require(path, state["config"], model=str, dataset=str)
    return state


def require(path: str | Path, state: Any, **kinds: type) -> None:
    """Refuse a checkpoint that lacks one of these keys, or has something of another kind there.

    Raises:
        CheckpointError: naming the file and the keys.
    """
    found = state if isinstance(state, Mapping) else {}
    missing = [key for key, kind in kinds.items() if not isinstance(found.get(key), kind)]
    if missing:
        raise CheckpointError(f"{path} is no checkpoint of a run: it has no {' and no '.join(missing)}; train again")


# ---------------------------------------------------------------- settings


def settings_of(config: Config) -> dict[str, Any]:
    """The settings of a Config as plain data, without what a Config finds by itself."""
    return {key: plain(value, key) for key, value in config.final_config_dict.items() if key not in DERIVED}


def config_from(settings: Mapping[str, Any]) -> Config:
    """A stock Config with exactly these settings, on this machine's device; the command line is not read.

    Raises:
        CheckpointError: the settings name no model or no dataset.
    """
    if not isinstance(settings, Mapping) or not all(isinstance(settings.get(k), str) for k in ("model", "dataset")):
        raise CheckpointError(
            "the checkpoint's config names no model and dataset; it was not saved by a run, train again"
        )
    stored = {key: value for key, value in settings.items() if key not in DERIVED}
    given = {key: value for key, value in stored.items() if key not in _CHANGED_BY_CONFIG}
    # Negative sampling stays out at first: RecBole refuses its own "none" when it meets it a second time.
    config = _StoredConfig(stored["model"], stored["dataset"], config_dict={**given, "train_neg_sample_args": None})
    config.final_config_dict.update(stored)
    config.__class__ = Config  # so that it is, pickles and compares like any other
    return config


class _StoredConfig(Config):
    """A Config from stored settings alone."""

    def _load_cmd_line(self) -> dict[str, Any]:
        return {}

    def _convert_config_dict(self, config_dict: dict[str, Any]) -> dict[str, Any]:
        return config_dict  # RecBole evaluates strings as Python, which would run what a checkpoint says


# ---------------------------------------------------------------- plain data


def plain(value: Any, name: str = "") -> Any:
    """A setting as plain data: str, int, float, bool, None, and lists, tuples and dicts of them.

    A device becomes its name, an Enum its member's name, a NumPy number a Python one, an array a list, a set a sorted
    list.

    Raises:
        CheckpointError: anything else; the message says where it is.
    """
    if isinstance(value, Enum):
        return value.name
    if value is None or isinstance(value, (bool, int, float, str)):
        # Subclasses such as numpy.float64 and numpy.str_ are not what the loader accepts.
        return next((kind(value) for kind in (bool, int, float, str) if isinstance(value, kind)), None)
    if isinstance(value, np.generic):
        return plain(value.item(), name)
    if isinstance(value, (torch.device, torch.dtype, Path)):
        return str(value)
    if isinstance(value, Mapping):
        return {plain(k, f"a key of {name}"): plain(v, _inner(name, k)) for k, v in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((plain(v, name) for v in value), key=lambda v: (type(v).__name__, v))
    if isinstance(value, (list, tuple)):
        items = [plain(v, _inner(name, i)) for i, v in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, np.ndarray):
        return plain(value.tolist(), name)
    raise CheckpointError(
        f"{name or 'the value'} is a {type(value).__module__}.{type(value).__qualname__}, which a checkpoint cannot "
        "hold; use numbers, strings, lists and dicts"
    )


def _inner(name: str, key: Any) -> str:
    return f"{name}[{key!r}]" if name else str(key)


def _tensors_and_plain(value: Any, name: str) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, Mapping):
        items = {plain(k, f"a key of {name}"): _tensors_and_plain(v, _inner(name, k)) for k, v in value.items()}
        if not isinstance(value, OrderedDict):
            return items
        ordered = OrderedDict(items)
        if hasattr(value, "_metadata"):  # of a state_dict: the versions of its layers
            ordered._metadata = OrderedDict(plain(value._metadata, f"{name}._metadata"))
        return ordered
    if isinstance(value, (list, tuple)):
        items = [_tensors_and_plain(v, _inner(name, i)) for i, v in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        kind = "matrix" if isinstance(value, np.matrix) else "array"
        return {_PACKED: kind, "data": torch.from_numpy(np.array(value))}
    if getattr(value, "format", None) in _SPARSE_FORMATS and hasattr(value, "tocsr"):
        rows = value.tocsr()
        parts = {part: torch.from_numpy(np.array(getattr(rows, part))) for part in ("data", "indices", "indptr")}
        return {_PACKED: f"{value.format}_matrix", "shape": tuple(int(n) for n in value.shape), **parts}
    return plain(value, name)


def unpacked(value: Any) -> Any:
    """The NumPy arrays and sparse matrices that ``save`` stored as tensors, in their own form again."""
    if not isinstance(value, dict):
        return value
    kind = value.get(_PACKED)
    if kind is None:
        return {key: unpacked(v) for key, v in value.items()}
    if kind in ("array", "matrix"):
        array = value["data"].cpu().numpy()
        return np.asmatrix(array) if kind == "matrix" else array
    from scipy.sparse import csr_matrix

    parts = tuple(value[part].cpu().numpy() for part in ("data", "indices", "indptr"))
    return csr_matrix(parts, shape=value["shape"]).asformat(kind.removesuffix("_matrix"))
