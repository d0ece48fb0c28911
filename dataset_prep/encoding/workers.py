"""Encoding shards in the threads of this process, or in processes of their own.

PyTorch and ONNX spread one operation over cores, which changes the order of sums and with it the last bits. Here every
shard is encoded on one thread, and the cores are filled with several shards: the same bytes on any number of them.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from multiprocessing import connection
from pathlib import Path
from typing import Any

import numpy as np

from dataset_prep.encoders import Encoder
from dataset_prep.encoding.shards import Shard, joined, pack
from recbole_mm.errors import DatasetError, SettingError

NO_WORD = "no known word in its text"
NOTHING_FOUND = "nothing recognised in its picture"
TRIES = 3  # of a shard whose process dies
FEW_PICTURES = 64  # are decoded here: starting a process takes longer
MEMORY = "out of memory"
_ERRORS = {"SettingError": SettingError, "DatasetError": DatasetError, MEMORY: MemoryError}


@dataclass(frozen=True)
class Job:
    """What a process needs to encode shards; can be pickled if ``build`` can.

    Attributes:
        build: makes the encoder.
        kind: "text" or "image".
        at_once: contents per call of the encoder.
        settings: that the encoder must have, as JSON; another machine may have another version of a model.
    """

    build: Callable[[], Encoder]
    kind: str
    at_once: int
    settings: str

    def encoder(self) -> Encoder:
        """The encoder, made and compared.

        Raises:
            SettingError: it is not the one that the parent has.
        """
        import json

        with one_thread():
            encoder = self.build()
        found = json.dumps(encoder.settings, sort_keys=True)
        if found != self.settings:
            raise SettingError(
                f"a worker has another encoder than this process: {found}, expected {self.settings}\n"
                "  install the same packages and models on all machines"
            )
        return encoder


# ---------------------------------------------------------------- one shard


def encode_block(encoder: Encoder, members: Sequence[Any]) -> Shard:
    """One call of the encoder.

    Args:
        members: texts; or of pictures what ``encoder.transform`` made, or an exception that tells why there is nothing.

    Raises:
        DatasetError: the encoder made a value that is not finite.
        ValueError: it made another number of vectors than it got contents, or vectors of different widths.
    """
    before = dict(getattr(encoder, "counts", {}))
    usable = [member for member in members if not isinstance(member, Exception)]
    vectors = encoder.encode(usable) if usable else []
    if len(vectors) != len(usable):
        raise ValueError(f"the encoder {encoder.name} made {len(vectors)} vectors of {len(usable)} contents")
    made = iter(vectors)
    rows, reasons, several = [], [], False
    for member in members:
        if isinstance(member, Exception):
            rows.append(None)
            reasons.append(f"picture {member}")
            continue
        vector = np.asarray(next(made), dtype=np.float32)
        several |= vector.ndim == 2
        vector = np.atleast_2d(vector) if vector.size else np.empty((0, 0), dtype=np.float32)  # [T, F]
        if not np.isfinite(vector).all():
            what = f": {member[:60]!r}" if isinstance(member, str) else " of a picture"
            raise DatasetError(f"the encoder {encoder.name} made NaN or infinity{what}; use another one")
        if encoder.source == "text":
            vector = vector[vector.any(axis=1)]
        rows.append(vector)
        nothing = NO_WORD if encoder.source == "text" else NOTHING_FOUND
        reasons.append("" if len(vector) else nothing)
    filled = [vector for vector in rows if vector is not None and len(vector)]
    after = getattr(encoder, "counts", {})
    return Shard(
        rows=np.concatenate(filled) if filled else np.empty((0, 0), dtype=np.float32),
        counts=np.array([0 if vector is None else len(vector) for vector in rows], dtype=np.int64),
        reasons=reasons,
        several=several,
        notes={key: after[key] - before.get(key, 0) for key in after if after[key] != before.get(key, 0)},
    )


def encode_shard(encoder: Encoder, contents: Sequence[str], *, kind: str, at_once: int, decoders: int = 0) -> Shard:
    """Encode the contents of one shard.

    Args:
        contents: texts, or paths of pictures.
        at_once: contents per call of the encoder.
        decoders: processes that decode pictures; 0 decodes here.
    """
    members = iter(contents) if kind == "text" else decoded(contents, encoder, decoders)
    return joined([encode_block(encoder, block) for block in blocks(members, at_once)])


def blocks(members: Iterable[Any], size: int) -> Iterator[list[Any]]:
    members = iter(members)
    while block := list(islice(members, size)):
        yield block


def decoded(paths: Iterable[str], encoder: Encoder, decoders: int) -> Iterator[Any]:
    """What the encoder's transform makes of each picture, or the exception that tells why there is nothing."""
    from dataset_prep.pictures.decode import decode_many

    return decode_many(map(Path, paths), encoder.transform, workers=decoders)


class one_thread:
    """While it holds, PyTorch runs an operation of the calling thread on that thread alone."""

    def __enter__(self) -> None:
        self._before = None
        self.pin()

    def pin(self) -> None:
        if (torch := sys.modules.get("torch")) is not None:
            self._before = self._before or torch.get_num_threads()
            torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            sys.modules["torch"].set_num_threads(self._before)


def is_out_of_memory(error: BaseException) -> bool:
    """Python's, PyTorch's or ONNX's way of saying that there is no more memory."""
    said = str(error).lower()
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and ("can't allocate memory" in said or "out of memory" in said))
        or "failed to allocate memory" in said
    )


# ---------------------------------------------------------------- threads


def in_threads(
    numbers: Sequence[int],
    contents_of: Callable[[int], Sequence[str]],
    encoder: Encoder,
    *,
    at_once: int,
    workers: int,
    decoders: int,
) -> Iterator[tuple[int, bytes]]:
    """Encode shards in threads of this process; pictures are decoded in processes beside them.

    Args:
        numbers: of the shards.
        contents_of: the texts or paths of a shard.
        workers: threads.
        decoders: processes that decode pictures; none are started for a few.

    Yields:
        Number and content of a shard's file, as they are done.
    """
    pinned = one_thread()
    with pinned:
        pool = ThreadPoolExecutor(workers, thread_name_prefix="encode", initializer=pinned.pin)
        try:
            if encoder.source == "text":
                yield from _texts_in_threads(pool, numbers, contents_of, encoder, at_once, workers)
            else:
                yield from _pictures_in_threads(pool, numbers, contents_of, encoder, at_once, workers, decoders)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _texts_in_threads(
    pool: ThreadPoolExecutor,
    numbers: Iterable[int],
    contents_of: Callable[[int], Sequence[str]],
    encoder: Encoder,
    at_once: int,
    workers: int,
) -> Iterator[tuple[int, bytes]]:
    waiting, running = iter(numbers), {}

    def start(n: int) -> None:
        for number in islice(waiting, n):
            future = pool.submit(encode_shard, encoder, contents_of(number), kind="text", at_once=at_once)
            running[future] = number

    start(workers + 1)
    while running:
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in sorted(done, key=running.__getitem__):
            number = running.pop(future)
            start(1)
            yield number, pack(future.result())


def _pictures_in_threads(
    pool: ThreadPoolExecutor,
    numbers: Sequence[int],
    contents_of: Callable[[int], Sequence[str]],
    encoder: Encoder,
    at_once: int,
    workers: int,
    decoders: int,
) -> Iterator[tuple[int, bytes]]:
    n_pictures = sum(len(contents_of(number)) for number in numbers)
    paths = (path for number in numbers for path in contents_of(number))
    pictures = decoded(paths, encoder, 0 if n_pictures < FEW_PICTURES else decoders)
    running: deque[tuple[int, Future]] = deque()
    parts: dict[int, list[Shard]] = {}

    def next_shard(ahead: int) -> Iterator[tuple[int, bytes]]:
        while len(running) > ahead:
            number, future = running.popleft()
            parts.setdefault(number, []).append(future.result())
            if not running or running[0][0] != number:
                if sum(len(part.counts) for part in parts[number]) == len(contents_of(number)):
                    yield number, pack(joined(parts.pop(number)))

    try:
        for number in numbers:
            for block in blocks(islice(pictures, len(contents_of(number))), at_once):
                running.append((number, pool.submit(encode_block, encoder, block)))
                yield from next_shard(2 * workers)
        yield from next_shard(0)
    finally:
        pictures.close()


# ---------------------------------------------------------------- processes


def in_processes(
    numbers: Sequence[int],
    contents_of: Callable[[int], Sequence[str]],
    job: Job,
    *,
    workers: int,
    describe: Callable[[int], str],
) -> Iterator[tuple[int, bytes]]:
    """Encode shards in spawned processes, each with an encoder of its own.

    A process that dies costs its shard only, which is tried again, its pictures decoded apart from the encoder then.

    Yields:
        Number and content of a shard's file, as they are done.

    Raises:
        ChildProcessError: a shard's process died three times, or none could be started.
        DatasetError, SettingError, MemoryError: as raised in a process.
        RuntimeError: anything else raised there, with its traceback.
    """
    waiting, died = deque(numbers), Counter()
    processes = [_Process(job) for _ in range(min(workers, len(numbers)))]
    try:
        while processes:
            for ready in connection.wait([process.connection for process in processes]):
                process = next(process for process in processes if process.connection is ready)
                try:
                    number, content = process.receive()
                except (EOFError, OSError):
                    processes.remove(process)
                    code = process.stop()
                    died[process.number] += 1
                    if died[process.number] == TRIES:
                        raise ChildProcessError(_death(process.number, code, describe)) from None
                    if process.number is not None:
                        waiting.appendleft(process.number)
                    processes.append(_Process(job))
                    continue
                if waiting:
                    process.ask(waiting.popleft(), contents_of, died)
                else:
                    processes.remove(process)
                    process.stop()
                if number is not None:
                    yield number, content
    finally:
        for process in processes:
            process.stop()


def _death(number: int | None, code: int | None, describe: Callable[[int], str]) -> str:
    end = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
    if number is None:
        return f"the processes that encode end before they have made the encoder ({end}); try --workers instead"
    return (
        f"{describe(number)}: its process died {TRIES} times, last by {end}; if memory ran out, choose fewer "
        "--processes or a smaller --batch-size, else look for the content that the encoder cannot stand"
    )


class _Process:
    """A process that encodes one shard at a time, and the end of the connection to it."""

    def __init__(self, job: Job) -> None:
        context = multiprocessing.get_context("spawn")  # a forked process may hang on locks that threads hold here
        self.number: int | None = None
        self.connection, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, job))
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"
        try:
            self._process.start()
        finally:
            os.environ.pop("OMP_NUM_THREADS")
            if before is not None:
                os.environ["OMP_NUM_THREADS"] = before
        there.close()

    def ask(self, number: int, contents_of: Callable[[int], Sequence[str]], died: Counter) -> None:
        self.number = number
        try:
            self.connection.send((list(contents_of(number)), 1 if died[number] else 0))
        except OSError:
            return  # it died meanwhile, which the next look at its connection tells

    def receive(self) -> tuple[int | None, bytes]:
        """The shard it was asked for, or (None, b"") when it is ready for the first."""
        kind, content = self.connection.recv()
        if kind == "ready":
            return None, b""
        if kind != "done":
            raise_failure(kind, content)
        return self.number, content

    def stop(self) -> int | None:
        """End it; returns its exit code, if it had ended by itself."""
        self.connection.close()
        self._process.join(0.2)
        code = self._process.exitcode
        self._process.kill()
        self._process.join()
        return code


def _serve(there: connection.Connection, job: Job) -> None:
    """What a process does until the other end of its connection is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    try:
        encoder = job.encoder()
        with one_thread():
            there.send(("ready", b""))
            while True:
                contents, decoders = there.recv()
                shard = encode_shard(encoder, contents, kind=job.kind, at_once=job.at_once, decoders=decoders)
                there.send(("done", pack(shard)))
    except (EOFError, BrokenPipeError):
        return
    except Exception as error:
        with suppress(OSError):  # the parent has heard of another's failure already
            there.send(failure(error))


def failure(error: Exception) -> tuple[str, str]:
    """Kind and message of an error, for the process that waits."""
    if is_out_of_memory(error):
        return MEMORY, str(error)
    if type(error).__name__ in _ERRORS:
        return type(error).__name__, str(error)
    return "error", "".join(traceback.format_exception(error))


def raise_failure(kind: str, message: str) -> None:
    """Raise here what `failure` told of elsewhere."""
    raise _ERRORS.get(kind, RuntimeError)(message)
