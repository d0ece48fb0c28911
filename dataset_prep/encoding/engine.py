"""The encoding of a feature's contents: what is finished is kept, what is missing is made, wherever it runs."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataset_prep.encoders import Encoder
from dataset_prep.encoding.contents import Contents
from dataset_prep.encoding.shards import Encoded, WorkFolder, unpack
from dataset_prep.encoding.workers import Job, in_processes, in_threads, is_out_of_memory, one_thread
from recbole_mm.data.files import sha256_of
from recbole_mm.data.layout import FeatureInfo, Manifest
from recbole_mm.errors import SettingError

ENGINE_VERSION = 1  # to be raised when the same encoder, settings and contents give other rows
NAMES = {  # of settings that no row depends on, where the hash is beside them that tells as much
    "model": "configuration_sha256",
    "revision": "configuration_sha256",
    "vocabulary": "vocabulary_sha256",
}
PICTURES_AT_ONCE = 32  # per call of the encoder, whatever its batch size, unless that is given


@dataclass(frozen=True)
class Running:
    """How encoding runs; none of it but ``batch_size`` and the device changes a bit of the result.

    Attributes:
        workers: threads of this process; None takes a thread per core, or one on a GPU.
        processes: processes with an encoder of their own each, instead of threads; 0 for none.
        ray: address of a Ray cluster, "auto" for the one this machine belongs to, "local" for one that is started here;
            None for no Ray.
        batch_size: that the encoder was made with, None for its own.
    """

    workers: int | None = None
    processes: int = 0
    ray: str | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise SettingError(f"workers is {self.workers}, expected at least 1")
        if self.processes < 0:
            raise SettingError(f"processes is {self.processes}, expected at least 0")
        if self.processes and self.ray is not None:
            raise SettingError("--processes and --ray are two ways to run; give one of them (with --ray: --workers)")


def feature_key(encoder: Encoder, contents_sha256: str, *, shard_size: int, further: dict[str, Any]) -> str:
    """Hex digits that stand for everything that a feature's rows depend on.

    Args:
        encoder: before it is fitted; its settings hold the hashes of its weights.
        further: settings of the feature besides the encoder's.
    """
    settings = without_names(encoder.settings)
    everything = [encoder.name, settings, contents_sha256, shard_size, ENGINE_VERSION, further]
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()


def without_names(settings: Any) -> Any:
    """Settings without what a model or a file is called, so that a copy elsewhere, or from the hub, is the same."""
    if not isinstance(settings, dict):
        return settings
    return {name: without_names(value) for name, value in settings.items() if not settings.get(NAMES.get(name))}


def work_key(key: str, encoder: Encoder, running: Running) -> str:
    """Hex digits that stand for everything that a shard's bits depend on: batches and devices round differently."""
    everything = [key, running.batch_size, _runs_on_gpu(encoder)]
    return hashlib.sha256(json.dumps(everything).encode()).hexdigest()


def is_up_to_date(folder: Path, feature: str, key: str) -> bool:
    """Whether a folder has the feature of this key, and its files are as they were written."""
    manifest = Manifest.load(folder)
    info = manifest.features.get(feature)
    return info is not None and info.settings.get("engine", {}).get("key") == key and is_whole(folder, manifest, info)


def is_whole(folder: Path, manifest: Manifest, info: FeatureInfo) -> bool:
    """Whether the files of a feature are as they were written."""
    files = [file for file in (info.file, info.items, info.counts) if file]
    return all(
        file in manifest.files and (folder / file).is_file() and sha256_of(folder / file) == manifest.files[file].sha256
        for file in files
    )


def encode_contents(
    contents: Contents,
    encoder: Encoder,
    *,
    work: WorkFolder,
    shard_size: int,
    build: Callable[[], Encoder] | None,
    running: Running,
    remarks: list[str],
    progress: bool,
) -> Encoded:
    """Encode what no finished shard holds yet.

    Args:
        encoder: of this process; is fitted here.
        work: where shards are kept.
        shard_size: contents per shard.
        build: makes the same encoder in another process.
        remarks: gets what the user should know.
        progress: show a bar over the contents on stderr.

    Raises:
        OSError: the disk is full, memory runs out, or a process dies again and again; finished shards stay.
        DatasetError, SettingError: as the encoder raises them.
        KeyboardInterrupt: finished shards stay.
    """
    from tqdm import tqdm

    built_settings = copy.deepcopy(encoder.settings)
    with one_thread():
        _fit(encoder, contents)
    running = _possible(running, encoder, learnt=encoder.settings != built_settings, build=build, remarks=remarks)
    encoded = Encoded(contents, shard_size, work)
    done = encoded.finished()
    todo = [number for number in range(encoded.n_shards) if number not in done]
    n_done = sum(len(encoded.members(number)) for number in done)
    unit = "text" if contents.kind == "text" else "picture"
    at_once = shard_size if contents.kind == "text" else running.batch_size or PICTURES_AT_ONCE
    job = Job(build, contents.kind, at_once, json.dumps(built_settings, sort_keys=True))
    if not todo:
        return encoded
    written = 0
    with tqdm(total=len(contents.unique), initial=n_done, unit=unit, disable=not progress, leave=False) as bar:
        shards = _run(todo, encoded, encoder, job, running)
        try:
            with memory_explained(running):
                for number, content in shards:
                    encoded.take_note(number, unpack(content))
                    written += 1
                    missing = (len(todo) - written) * len(content) + encoded.n_shards * len(content)
                    with full_disk_explained(work.path, missing + len(content)):
                        work.write(number, content)
                        if written == 1:
                            _require_space(work.path, missing)
                    bar.update(len(encoded.members(number)))
        finally:
            shards.close()
    return encoded


def _fit(encoder: Encoder, contents: Contents) -> None:
    if contents.kind == "text":
        whole = (" ".join(contents.unique[n] for n in numbers) for numbers in contents.of_items if numbers)
        encoder.fit(list(whole))
    else:
        encoder.fit([])


def _possible(
    running: Running, encoder: Encoder, *, learnt: bool, build: Callable[[], Encoder] | None, remarks: list[str]
) -> Running:
    elsewhere = running.processes or running.ray is not None
    if elsewhere and learnt:
        remarks.append(f"the encoder {encoder.name} learns from the whole catalogue, so it ran in this process alone")
        return Running(workers=running.workers, batch_size=running.batch_size)
    if elsewhere and build is None:
        raise ValueError("another process cannot make this encoder; give build, a function that makes it")
    return running


def n_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _runs_on_gpu(encoder: Encoder) -> bool:
    parts = (encoder, *vars(encoder).values())
    devices = (getattr(part, name, None) for part in parts for name in ("device", "_device"))
    return any(str(device).partition(":")[0] in ("cuda", "mps", "xpu") for device in devices if device is not None)


def _run(
    todo: list[int], encoded: Encoded, encoder: Encoder, job: Job, running: Running
) -> Iterator[tuple[int, bytes]]:
    if running.ray is not None:
        from dataset_prep.encoding.cluster import on_ray

        n_gpus = 1 if _runs_on_gpu(encoder) else 0
        return on_ray(todo, encoded.contents, job, address=running.ray, workers=running.workers, n_gpus=n_gpus)
    if running.processes:
        return in_processes(todo, encoded.contents, job, workers=running.processes, describe=encoded.described)
    workers = running.workers or (1 if _runs_on_gpu(encoder) else n_cores())
    return in_threads(
        todo,
        encoded.contents,
        encoder,
        at_once=job.at_once,
        workers=workers,
        decoders=running.workers or n_cores(),
    )


# ---------------------------------------------------------------- when the machine gives up


@contextmanager
def memory_explained(running: Running) -> Iterator[None]:
    """Say what can be done when memory runs out."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        size = "its default" if running.batch_size is None else running.batch_size
        raise OSError(
            errno.ENOMEM,
            f"not enough memory to encode ({_first_line(error)}); choose a smaller --batch-size (now {size}) or fewer "
            "--workers or --processes; finished shards stay",
        ) from error


@contextmanager
def full_disk_explained(folder: Path, n_bytes: int) -> Iterator[None]:
    """Say how much room is needed when the disk is full.

    Args:
        n_bytes: about as many are still to be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(error.errno, _no_space(folder, n_bytes)) from error


def _require_space(folder: Path, n_bytes: int) -> None:
    if shutil.disk_usage(folder).free < n_bytes:
        raise OSError(errno.ENOSPC, _no_space(folder, n_bytes))


def _no_space(folder: Path, n_bytes: int) -> str:
    return (
        f"no space left: needs about {max(1, round(n_bytes / 1e6))} MB in {folder}; make room and repeat the command, "
        "which continues with what is missing"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
