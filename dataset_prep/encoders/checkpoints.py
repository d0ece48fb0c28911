"""Checkpoints of PyTorch: files that could run code are refused, and the message says so."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from dataset_prep.encoders.model_files import first_line
from recbole_mm.errors import RecBoleMMError, SettingError, UnsafeFileError


def cannot_load(what: str | Path, error: Exception, remedy: str) -> RecBoleMMError:
    """The error to raise when a checkpoint did not load.

    Returns:
        UnsafeFileError if the file holds Python objects, which PyTorch refused to make; else SettingError.
    """
    if isinstance(error, pickle.UnpicklingError) and "unsupported global" in str(error).lower():
        return UnsafeFileError(
            f"{what} holds Python objects beside weights, and reading them could run code; it was not read\n"
            "  get it as .safetensors, or save its state_dict alone with torch.save where you trust it"
        )
    return SettingError(f"cannot load {what} ({type(error).__name__}: {first_line(error)})\n  {remedy}")


def read_state(path: Path) -> dict[str, Any]:
    """Tensors by name out of a ``.pth``, ``.pt``, ``.bin`` or ``.safetensors`` file; runs no code of the file.

    What lies under "state_dict" or "model" is taken, and a leading "module." of the names is left out.

    Raises:
        SettingError: no such file, or no such content.
        UnsafeFileError: it holds Python objects.
    """
    import torch

    if not path.is_file():
        raise SettingError(f"no file of weights {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of pickle, zipfile, PyTorch or safetensors
        raise cannot_load(path, error, "give a state_dict as torch.save writes it, or .safetensors") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise SettingError(f"{path} is no state_dict, found {type(state).__name__}; give tensors by name")
    return {name.removeprefix("module."): value for name, value in state.items()}
