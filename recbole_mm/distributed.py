"""Several processes as one group: who is in it, what they tell each other, and how they are started and end together.

Processes are started here (`launch`), or by torchrun, which also knows of several machines. They talk through gloo;
gradients on GPUs go through NCCL. The first process alone writes checkpoints, records and the log. In an evaluation
each process ranks its part of the rows, and the ranks are put together, each row once. How they train together is told
in `recbole_mm.shared_training`.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import re
import signal
import socket
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import wraps
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from recbole_mm.errors import RecBoleMMError, SettingError, TrainingError

SECONDS_TO_END, SECONDS_FOR_OTHERS = 10, 1  # for a process that is told to end; for other messages than the first
SECONDS_FOR_FIRST = 3  # before another process than the first one says what went wrong, if torchrun started it
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_LOST = re.compile(
    r"gloo/transport|closed by peer|reset by peer|broken pipe|likely closed|remote process exited|NCCL communicator",
    re.I,
)

_VISIBLE = os.environ.get("CUDA_VISIBLE_DEVICES")  # RecBole writes its gpu_id there

T = TypeVar("T")
_parent: Connection | None = None  # to the process that started this one, if `launch` did
_nccl: Any = None  # the group for tensors on GPUs


class PeerLostError(TrainingError):
    """Another process of the group has ended; its own message says why."""


class Place(NamedTuple):
    """Where a process stands in its group.

    Attributes:
        rank: 0 is the first one.
        n_processes: of the whole group.
        local_rank: on its machine.
        n_local: on its machine.
    """

    rank: int
    n_processes: int
    local_rank: int
    n_local: int


def place() -> Place | None:
    """What the environment says of this process, as `launch` and torchrun write it; None for a process of its own."""
    found = [os.environ.get(name) for name in _VARIABLES]
    if None in found or found[1] == "1":
        return None
    rank, n_processes, local_rank = map(int, found[:3])
    return Place(rank, n_processes, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", n_processes)))


# ---------------------------------------------------------------- the group


def n_processes() -> int:
    """How many processes share this training; 1 without a group."""
    return torch.distributed.get_world_size() if _joined() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return torch.distributed.get_rank() if _joined() else 0


def is_first() -> bool:
    """Whether this is the process that writes files."""
    return rank() == 0


def _joined() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def join() -> None:
    """Join the group that the environment tells of, if there is one; a second call does nothing."""
    here = place()
    if here is None or _joined():
        return
    if _parent is None:
        torch.distributed.init_process_group("gloo", init_method="env://")
    else:
        store = torch.distributed.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        torch.distributed.init_process_group("gloo", store=store, rank=here.rank, world_size=here.n_processes)
    if not is_first():
        _be_quiet()


def _be_quiet() -> None:
    """What all processes would say alike, the first one says."""
    from recbole.trainer import trainer

    warnings.simplefilter("ignore")
    logging.getLogger().setLevel(logging.ERROR)
    trainer.get_tensorboard = lambda logger: _NoTensorboard()


class _NoTensorboard:
    def add_scalar(self, *args: Any) -> None:
        pass

    def add_hparams(self, *args: Any) -> None:
        pass


def leave() -> None:
    """Leave the group, when all have come so far."""
    global _nccl
    if _joined():
        barrier()
        torch.distributed.destroy_process_group()
        _nccl = None


def barrier() -> None:
    """Wait until all processes are here."""
    if n_processes() > 1:
        torch.distributed.barrier()


@contextmanager
def first_process_first() -> Iterator[None]:
    """The others begin when the first process is through, and find what it has made."""
    if not is_first():
        barrier()
    yield
    if is_first():
        barrier()


def from_first(value: T) -> T:
    """The first process' value, in all processes."""
    if n_processes() == 1:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def gathered(value: T) -> list[T]:
    """The values of all processes, in all processes."""
    if n_processes() == 1:
        return [value]
    values: list[Any] = [None] * n_processes()
    torch.distributed.all_gather_object(values, value)
    return values


def require_file(path: str | Path) -> None:
    """Wait for what the first process has written.

    Raises:
        TrainingError: this process does not see it.
    """
    barrier()
    if not Path(path).is_file():
        raise TrainingError(
            f"process {rank() + 1} of {n_processes()} does not see {Path(path).absolute()}, which the first one wrote\n"
            "  several machines must work in a folder that all of them share"
        )


def group_of(device: torch.device) -> Any:
    """The group that tensors of this device go through: one of NCCL, made on first use, or None, which is gloo's."""
    global _nccl
    if device.type != "cuda":
        return None
    if _nccl is None:
        _nccl = torch.distributed.new_group(backend="nccl")
    return _nccl


# ---------------------------------------------------------------- devices


def gpu_ids(given: str | None, *, n_local: int) -> str:
    """The GPUs that the processes of this machine use, as CUDA_VISIBLE_DEVICES; "" for the CPU.

    Args:
        given: the setting gpu_id, or None to take what is there.
        n_local: processes on this machine.

    Raises:
        SettingError: fewer GPUs than processes.
    """
    if given is None:
        given = _VISIBLE
    if given is None:
        given = ",".join(map(str, range(torch.cuda.device_count())))
    found = [gpu for gpu in str(given).replace(" ", "").split(",") if gpu]
    if found and len(found) < n_local and torch.cuda.device_count():
        raise SettingError(
            f"{n_local} processes need a GPU each, found {len(found)}: {','.join(found)}\n"
            f"  use --nproc={len(found)}, name more GPUs with --gpu_id=0,1, or take the CPU with --use_gpu=False"
        )
    return ",".join(found[:n_local])


# ---------------------------------------------------------------- evaluation


def own_rows(blocks: Iterable[tuple[np.ndarray, tuple]]) -> Iterable[tuple[np.ndarray, tuple]]:
    """This process' rows of the blocks of an evaluation, as `FullRanking.blocks` makes them."""
    if n_processes() == 1:
        yield from blocks
        return
    mine = slice(rank(), None, n_processes())
    for positions, (interaction, history, rows, targets) in blocks:
        if len(positions[mine]):
            yield positions[mine], (interaction[mine], history, rows[: len(positions[mine])], targets[mine])


def all_rows(positions: np.ndarray, *columns: Tensor) -> tuple[np.ndarray, ...]:
    """The rows of all processes, however many each has: positions [R] and columns [R]."""
    if n_processes() == 1:
        return positions, *columns
    every = gathered((positions, *(column.numpy() for column in columns)))
    positions, *arrays = (np.concatenate(parts) for parts in zip(*every, strict=True))
    return positions, *map(torch.from_numpy, arrays)


# ---------------------------------------------------------------- starting processes


def launch(
    target: Callable[..., T],
    n_processes: int,
    *,
    notes: dict[str, Any] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> T:
    """Call a function in several new processes of this machine, a group of their own.

    If one of them fails, or this one is interrupted, all end.

    Args:
        target: a function of a module, imported anew in each process.
        notes: takes what the first process tells by `note`, also of a call that fails.
        arguments: of the function; what pickle can carry.

    Returns:
        What the function returned in the first process.

    Raises:
        RecBoleMMError, OSError, ...: what the function raised, in the process that failed first.
        TrainingError: a process ended without a word.
    """
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    n_threads = max(1, torch.get_num_threads() // n_processes)
    processes, ends = [], {}
    try:
        for number in range(n_processes):
            receiver, sender = context.Pipe(duplex=False)
            environment = _environment(number, n_processes, store.port)
            process = context.Process(target=_child, args=(environment, n_threads, sender, target, arguments or {}))
            process.start()
            sender.close()
            processes.append(process)
            ends[receiver] = number
        result = _result(processes, ends, {} if notes is None else notes)
        for process in processes:
            process.join(SECONDS_TO_END)
        return result
    finally:
        _end(processes)


def _environment(number: int, n_processes: int, port: int) -> dict[str, str]:
    """As torchrun writes it."""
    variables = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": n_processes, "LOCAL_WORLD_SIZE": n_processes}
    environment = {name: str(value) for name, value in variables.items()}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    loopback = {name for _, name in socket.if_nameindex()} & {"lo", "lo0"}
    if loopback and "GLOO_SOCKET_IFNAME" not in os.environ:  # gloo would look up the machine's name, which may fail
        environment["GLOO_SOCKET_IFNAME"] = loopback.pop()
    return environment


def _child(
    environment: Mapping[str, str],
    n_threads: int,
    parent: Connection,
    target: Callable[..., Any],
    arguments: Mapping[str, Any],
) -> None:
    """Call the function and tell its result, or what it raised."""
    global _parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends its children
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.environ.update(environment)
    torch.set_num_threads(n_threads)
    tqdm.set_lock(threading.RLock())  # its own one is a semaphore that stays behind when the process is ended
    _parent = parent
    try:
        outcome = _outcome(target, arguments)
        with suppress(BrokenPipeError):
            parent.send(outcome)
        if outcome[0] == "done":
            with suppress(RuntimeError):  # the first process failed after its last message to this one, and says why
                leave()
    except KeyboardInterrupt:
        os._exit(1)
    if outcome[0] == "failed":
        os._exit(1)  # at once: the group is broken, and to leave it would mean to wait for the others


def _outcome(target: Callable[..., Any], arguments: Mapping[str, Any]) -> tuple[str, Any]:
    try:
        result = target(**arguments)
        return "done", result if is_first() else None
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        text = traceback.format_exc()
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # an exception with a constructor of its own may be no friend of pickle
            error = RuntimeError(f"{type(error).__name__}: {error}")
        return "failed", (error, text)


def _result(processes: list, ends: dict[Connection, int], notes: dict[str, Any]) -> Any:
    """What the first process returns, when all are through."""
    result, failures, until = None, [], None
    while ends:
        patience = None if until is None else max(0.0, until - time.monotonic())
        ready = wait(list(ends), patience)
        if not ready:
            break
        for end in ready:
            number = ends[end]
            try:
                kind, content = end.recv()
            except (EOFError, ConnectionResetError):
                kind, content = "died", None
            if kind == "note":
                notes |= content
                continue
            del ends[end]
            if kind == "done":
                result = content if number == 0 else result
                continue
            failures.append((number, *(content or (_died(processes[number], number, len(processes)), ""))))
            until = until or time.monotonic() + SECONDS_FOR_OTHERS
    if failures:
        number, error, text = min(failures, key=lambda failure: _is_consequence(failure[1]))
        if number and isinstance(error, RecBoleMMError):
            error.args = (f"{error}\n  (in process {number + 1} of {len(processes)})",)
        raise error from (_TracebackOfChild(text) if text else None)
    return result


def _died(process, number: int, n_processes: int) -> TrainingError:
    process.join(SECONDS_TO_END)
    code = process.exitcode
    how = f"was killed by signal {-code}" if code and code < 0 else f"ended with code {code}"
    advice = (
        "  if a script of yours calls run(), it must do so below: if __name__ == '__main__':"
        if code and code > 0
        else "  perhaps memory ran out: each process holds its own copy of data and model; use fewer processes"
    )
    return TrainingError(f"process {number + 1} of {n_processes} {how} without a word\n{advice}")


def _is_consequence(error: BaseException) -> bool:
    """Whether an error only says that another process has ended."""
    return isinstance(error, PeerLostError) or (isinstance(error, RuntimeError) and bool(_LOST.search(str(error))))


class _TracebackOfChild(Exception):
    def __init__(self, text: str) -> None:
        super().__init__(f"\n{text}")


def _end(processes: list) -> None:
    """End what still runs: by asking, then by force."""
    until = time.monotonic() + SECONDS_TO_END
    for process in processes:
        if process.is_alive():
            process.terminate()
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


def note(**values: Any) -> None:
    """Tell the process that called `launch`, if this is its first child."""
    if _parent is not None and is_first():
        _parent.send(("note", values))


def one_message(function: Callable[..., T]) -> Callable[..., T]:
    """Of what goes wrong in several processes, one message reaches the user."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> T:
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            if n_processes() == 1 or not _is_consequence(error):
                raise
            raise PeerLostError(
                f"process {rank() + 1} of {n_processes()} lost the others: one of them has ended, and said why"
            ) from error
        except RecBoleMMError:
            if _parent is None and not is_first():  # torchrun ends this one as soon as the first one has spoken
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                time.sleep(SECONDS_FOR_FIRST)
            raise

    return call
