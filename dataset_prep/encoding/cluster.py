"""Encoding shards on a Ray cluster, through Ray Data: the same shards, the same bytes as on one machine.

The cluster needs no disk that all machines share. Contents lie on the machine that runs the command: an actor there
hands each shard's texts, or the bytes of its picture files, to the worker that asks, and the finished shard travels
back as a row. All machines need the same packages, and models at the same places.

RecBole allows ray up to 2.6.3, whose Ray Data does not import beside today's setuptools, pandas and pyarrow; what it
misses is three names, given to it here and in its workers.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from dataset_prep.encoding.workers import TRIES, Job, encode_shard, failure, one_thread, pack, raise_failure
from recbole_mm.errors import SettingError

LOCAL = "local"
SECONDS_TO_ANSWER = 10
INSTALL = '  install it with: pip install "recbole_mm[ray]"'


def mend_ray() -> None:
    """Give Ray Data of ray 2.6.3 the names it imports that newer packages have no more; each only where it lacks."""
    _mend_pkg_resources()
    _mend_pyarrow()
    _mend_pandas()


def _mend_pkg_resources() -> None:
    # setuptools 71 took away the copy of packaging inside pkg_resources. setuptools 82 took away pkg_resources itself,
    # without which none of Ray's own processes starts: the extra "ray" asks for an older one.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that pkg_resources will go
            import pkg_resources._vendor.packaging.version  # noqa: F401
    except ImportError:
        import packaging.version

        vendor = ModuleType("pkg_resources._vendor")
        vendor.packaging = packaging
        sys.modules["pkg_resources._vendor"] = vendor
        sys.modules["pkg_resources._vendor.packaging"] = packaging
        sys.modules["pkg_resources._vendor.packaging.version"] = packaging.version


def _mend_pyarrow() -> None:
    # pyarrow 21 took it away, as it unpickles what it reads; Ray derives two classes from it that nothing here uses.
    import pyarrow

    if hasattr(pyarrow, "PyExtensionType"):
        return

    class PyExtensionType(pyarrow.ExtensionType):
        def __init__(self, storage: Any) -> None:
            super().__init__(storage, f"ray.{type(self).__name__}")

        def __arrow_ext_serialize__(self) -> bytes:
            return b""

    pyarrow.PyExtensionType = PyExtensionType


def _mend_pandas() -> None:
    # pandas 2.2 put an underscore before it.
    from pandas.io.formats import format as formats

    if not hasattr(formats, "ExtensionArrayFormatter"):
        formats.ExtensionArrayFormatter = formats._ExtensionArrayFormatter


def on_ray(
    numbers: Sequence[int],
    contents_of: Callable[[int], Sequence[str]],
    job: Job,
    *,
    address: str,
    workers: int | None = None,
    n_gpus: float = 0,
) -> Iterator[tuple[int, bytes]]:
    """Encode shards on a Ray cluster.

    Args:
        numbers: of the shards.
        contents_of: the texts or paths of a shard, on this machine.
        job: is pickled.
        address: of the cluster, such as "auto" or "ray://head:10001"; "local" starts one here, and stops it.
        workers: actors; None takes the cluster's cores, or its GPUs.
        n_gpus: per actor.

    Yields:
        Number and content of a shard's file, as they are done.

    Raises:
        SettingError: ray or Ray Data cannot be imported, or there is no cluster at the address.
        DatasetError, MemoryError: as raised in a worker.
        RuntimeError: anything else raised there, with its traceback.
    """
    ray = _import_ray()
    started = not ray.is_initialized()
    try:
        if started:
            _connect(ray, address, workers)
        yield from _map_shards(ray, numbers, contents_of, job, workers=workers, n_gpus=n_gpus)
    finally:
        if started:
            ray.shutdown()


def _import_ray() -> ModuleType:
    try:
        mend_ray()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import ray
            import ray.data
    except ImportError as error:
        raise SettingError(f"--ray needs the package ray with Ray Data ({error})\n{INSTALL}") from error
    return ray


def _quiet() -> None:
    """Ray Data tells its plans at a level of its own, whatever Ray is told."""
    for handler in logging.getLogger("ray").handlers:
        handler.setLevel(logging.WARNING)


def _knock(address: str) -> None:
    """Make sure that something listens at an address, for which Ray itself waits for minutes."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=SECONDS_TO_ANSWER).close()


def _connect(ray: ModuleType, address: str, workers: int | None) -> None:
    """Join a cluster, or start one of this machine with one core more than workers, for Ray Data's own tasks."""
    from dataset_prep.encoding.engine import n_cores

    project = str(Path(__file__).resolve().parents[2])  # so that workers started here find this package
    paths = [project, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    settings: dict[str, Any] = {
        "runtime_env": {"env_vars": environment, "worker_process_setup_hook": mend_ray},
        "log_to_driver": False,
        "logging_level": "WARNING",
    }
    try:
        if address == LOCAL:
            ray.init(num_cpus=(workers or n_cores()) + 1, include_dashboard=False, **settings)
        else:
            _knock(address)
            ray.init(address=address, **settings)
    except (OSError, RuntimeError, ValueError) as error:
        raise SettingError(
            f"cannot reach a Ray cluster at {address!r} ({str(error).strip().splitlines()[0]})\n"
            "  start one with: ray start --head, or leave the address out"
        ) from error


class _Source:
    """Hands out contents from the machine that has them."""

    def __init__(self, shards: dict[int, list[str]], kind: str) -> None:
        self._shards, self._kind, self._stopped = shards, kind, False
        self._given: Counter[int] = Counter()

    def stop(self) -> None:
        """Nobody wants the rest any more."""
        self._stopped = True

    def contents(self, number: int) -> tuple[list[str] | list[bytes | None] | None, bool]:
        """Of a shard, and whether it was asked for before, by a worker that died of it.

        Texts, or the bytes of pictures' files, None for one that is gone; None if nobody wants the shard.
        """
        if self._stopped:
            return None, False
        self._given[number] += 1
        mine = self._shards[number]
        return mine if self._kind == "text" else [_bytes_of(path) for path in mine], self._given[number] > 1


def _bytes_of(path: str) -> bytes | None:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        return None


class _Worker:
    """Encodes shards; Ray Data makes one per actor."""

    def __init__(self, job: Job, source: Any) -> None:
        self._job, self._source, self._encoder = job, source, None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        number = int(batch["shard"][0])
        kind, content = self._answer(number)
        return {"shard": batch["shard"], "kind": np.array([kind]), "content": np.array([content], dtype=object)}

    def _answer(self, number: int) -> tuple[str, bytes]:
        import ray

        try:
            contents, again = ray.get(self._source.contents.remote(number))
            if contents is None:
                return "stopped", b""
            self._encoder = self._encoder or self._job.encoder()
            return "done", self._encode(contents, decoders=1 if again else 0)
        except Exception as error:
            kind, message = failure(error)
            return kind, message.encode()

    def _encode(self, contents: list, *, decoders: int) -> bytes:
        """The content of a shard's file.

        Args:
            decoders: 1 decodes pictures in a process beside this one, so that one that kills it costs itself only.
        """
        job = self._job
        with one_thread(), tempfile.TemporaryDirectory() as place:
            if job.kind == "image":
                contents = [_put(Path(place) / str(n), content) for n, content in enumerate(contents)]
            return pack(encode_shard(self._encoder, contents, kind=job.kind, at_once=job.at_once, decoders=decoders))


def _put(path: Path, content: bytes | None) -> str:
    if content is not None:
        path.write_bytes(content)
    return str(path)


def _map_shards(
    ray: ModuleType,
    numbers: Sequence[int],
    contents_of: Callable[[int], Sequence[str]],
    job: Job,
    *,
    workers: int | None,
    n_gpus: float,
) -> Iterator[tuple[int, bytes]]:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(node_id=ray.get_runtime_context().get_node_id(), soft=False)
    shards = {number: list(contents_of(number)) for number in numbers}
    source = (
        ray.remote(_Source).options(num_cpus=0, scheduling_strategy=here, max_concurrency=4).remote(shards, job.kind)
    )
    there = ray.cluster_resources()
    room = max(1, int(there.get("GPU", 0) // n_gpus if n_gpus else there.get("CPU", 2) - 1))  # a core for Ray Data
    workers = min(workers or room, len(numbers))
    ray.data.set_progress_bars(False)
    _quiet()
    done = (
        ray.data.from_items([{"shard": number} for number in numbers], parallelism=len(numbers))
        .materialize()  # the numbers alone; else their reading would hold a core of each worker's
        .map_batches(
            _Worker,
            fn_constructor_args=(job, source),
            compute=ray.data.ActorPoolStrategy(min_size=min(workers, room), max_size=workers),
            batch_size=1,
            batch_format="numpy",
            num_gpus=n_gpus or None,
            max_restarts=TRIES - 1,
            max_task_retries=TRIES - 1,
        )
    )
    rows = done.iter_rows()
    try:
        for row in rows:
            if row["kind"] != "done":
                raise_failure(str(row["kind"]), row["content"].decode())
            yield int(row["shard"]), row["content"]
    finally:  # Ray Data must come to its end, because its threads do not bear that Ray goes before
        with suppress(Exception):
            ray.get(source.stop.remote())
            for _ in rows:
                pass
