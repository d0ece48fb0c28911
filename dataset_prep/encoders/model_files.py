"""Which files a language model is: enough to tell whether another run had the same one.

A model is a local folder or a name on the Hugging Face hub, with its tokenizer and perhaps further modules.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from recbole_mm.data.files import sha256_of
from recbole_mm.errors import SettingError

WEIGHTS = ((".safetensors",), (".bin", ".pth", ".pt"))  # of a folder's, the first kind that is there is read
CONFIGURATION = (".json", ".txt", ".model")  # of network and tokenizer
OTHER_RUNTIMES = ("onnx", "openvino")  # the same network again, for libraries that are not used here


def first_line(error: BaseException) -> str:
    """Of an error's text, for a message of our own; the libraries write whole pages."""
    return (str(error).strip().splitlines() or [""])[0]


def model_settings(model: str, revision: str | None, *, packages: tuple[str, ...]) -> dict[str, Any]:
    """What identifies a model.

    Args:
        model: folder or name on the hub; it must have been loaded, so that it lies in the hub's cache.
        revision: as the user gave it.
        packages: distributions whose version may change a vector.

    Returns:
        model (of a folder the last part), revision (None for a folder), weights_sha256 (by file), the hash of all
        other files together as configuration_sha256, and versions.
    """
    folder = Path(model)
    local = folder.is_dir()
    found = folder if local else _cached(model, revision)
    return {
        "model": folder.resolve().name if local else str(model),
        "revision": None if local else (found.name if found else revision),  # a branch moves, a commit does not
        "weights_sha256": _weights_sha256(found) if found else {},
        "configuration_sha256": _configuration_sha256(found) if found else None,
        "versions": versions(packages),
    }


def check_revision(model: str, revision: str | None) -> None:
    """Refuse a revision of a folder, which has none.

    Raises:
        SettingError: naming both.
    """
    if revision is not None and Path(model).is_dir():
        raise SettingError(f"revision {revision!r} belongs to a name on the hub, and {model} is a folder; leave it out")


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Of the packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _weights_sha256(folder: Path) -> dict[str, str]:
    """sha256 of each weights file of a folder and its modules' folders, by path in it."""
    files: list[Path] = []
    for place in sorted({file.parent for kind in WEIGHTS for file in _files(folder, kind)}):
        here = ([file for file in _files(folder, kind) if file.parent == place] for kind in WEIGHTS)
        files += next(filter(None, here))
    return {file.relative_to(folder).as_posix(): sha256_of(file) for file in files}


def _configuration_sha256(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in _files(folder, CONFIGURATION):
        digest.update(f"{file.relative_to(folder).as_posix()} {sha256_of(file)}\n".encode())
    return digest.hexdigest()


def _files(folder: Path, endings: tuple[str, ...]) -> list[Path]:
    """In order of their paths; a hub model's files are links, and its folder names no place of this machine."""
    found = (file for depth in ("*", "*/*", "*/*/*") for file in folder.glob(depth) if file.suffix in endings)
    return sorted(
        file for file in found if file.is_file() and not set(OTHER_RUNTIMES) & set(file.relative_to(folder).parts)
    )


def _cached(model: str, revision: str | None) -> Path | None:
    """Folder of a hub model in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    for name in (model, f"sentence-transformers/{model}"):
        for file in ("config.json", "modules.json", "model.safetensors", "model_index.json"):
            path = try_to_load_from_cache(name, file, revision=revision) if name.count("/") <= 1 else None
            if isinstance(path, str):
                return Path(path).parent
    return None


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Without the progress bars of transformers, which every process would draw."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
