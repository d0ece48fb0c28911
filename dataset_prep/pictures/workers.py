"""Processes that may crash or hang without harm: that costs the question it was at, and the process is replaced."""

from __future__ import annotations

import multiprocessing
import pickle
import queue
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice, starmap
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

WORKER_DIED = "decoder crashed"
TIMED_OUT = "timed out"
SECONDS_PER_PICTURE = 30.0
SECONDS_TO_START = 120.0
AT_ONCE = 8  # questions that a worker is given at a time, so that it need not wait for the next one
AHEAD = 3  # times that many, per worker, may be on their way or wait for the one who takes them
MEMORY = 2 << 30  # bytes that a question may take beyond what the worker has at its start


def answers(
    function: Callable[..., Any], questions: Iterable[tuple], *, workers: int, seconds: float = SECONDS_PER_PICTURE
) -> Iterator[Any]:
    """The function's answers, in the order of the questions, of which at most 24 per worker are ahead.

    Args:
        function: as for `WorkerPool`.
        questions: arguments for each call; read as far as needed.
        workers: 0 answers here, without protection against crashes and hanging.
        seconds: how long an answer may take, with workers.

    Yields:
        The answer, or ``WORKER_DIED`` or ``TIMED_OUT``.
    """
    if workers == 0:
        yield from starmap(function, questions)
        return
    questions = iter(questions)
    groups = iter(lambda: list(islice(questions, AT_ONCE)), [])
    with WorkerPool(function, workers, seconds=seconds) as pool, ThreadPoolExecutor(workers) as threads:
        pending = deque(threads.submit(pool.ask_all, group) for group in islice(groups, AHEAD * workers))
        try:
            while pending:
                yield from pending.popleft().result()
                pending.extend(threads.submit(pool.ask_all, group) for group in islice(groups, 1))
        finally:
            for future in pending:
                future.cancel()
            if pending:  # nobody waits for these answers any more
                pool.stop()


class WorkerPool:
    """Runs one function in worker processes, which start when they are needed; to be used as a context.

    Args:
        function: is pickled; takes one picture's arguments, returns something that can be pickled.
        n: workers, at least 1.
        seconds: how long an answer may take.
        memory: bytes that an answer may take (address space; not limited where the system has no such limit).

    Raises:
        ValueError: ``function`` cannot be pickled, or fewer than one worker.
    """

    def __init__(self, function: Callable[..., Any], n: int, *, seconds: float, memory: int = MEMORY) -> None:
        if n < 1:
            raise ValueError(f"{n} workers, expected at least 1")
        try:
            self._function = pickle.dumps(function)
        except Exception as error:  # pickle raises PicklingError, AttributeError, TypeError ...
            raise ValueError(f"{function} cannot be sent to another process ({error}); use 0 workers") from error
        self._seconds, self._memory = seconds, memory
        self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(n):
            self._idle.put(None)
        self._busy: set[_Worker] = set()
        self._stopped = False

    def ask(self, *question: Any) -> Any:
        """The function's answer, or ``WORKER_DIED`` or ``TIMED_OUT``; as `ask_all`."""
        return self.ask_all([question])[0]

    def ask_all(self, questions: Sequence[tuple]) -> list[Any]:
        """The answer to each question from one worker, and its successors if it is lost; for use by threads.

        Raises:
            Exception: whatever the function raises.
            RuntimeError: a worker cannot be started, or the pool was stopped.
        """
        answers: list[Any] = []
        worker = self._idle.get()
        try:
            while len(answers) < len(questions):
                self._check_stopped()
                worker = worker or _Worker(self._function, self._memory, self._seconds)
                self._busy.add(worker)
                self._check_stopped()
                try:
                    for answer in worker.ask(questions[len(answers) :], self._seconds):
                        answers.append(answer)
                except _Lost as lost:
                    self._check_stopped()
                    answers.append(str(lost))
                    self._dismiss(worker)
                    worker = None
        except BaseException:
            self._dismiss(worker)
            worker = None
            raise
        finally:
            self._busy.discard(worker)
            self._idle.put(worker)
        return answers

    def _check_stopped(self) -> None:
        if self._stopped:
            raise RuntimeError("the workers were stopped")

    def _dismiss(self, worker: _Worker | None) -> None:
        self._busy.discard(worker)
        if worker is not None:
            worker.stop()

    def stop(self) -> None:
        """End all workers at once; whoever waits for an answer, or asks later, gets a `RuntimeError`."""
        self._stopped = True
        for worker in list(self._busy):
            worker.kill()
        idle = []
        with suppress(queue.Empty):
            while True:
                idle.append(self._idle.get_nowait())
        for worker in idle:
            self._dismiss(worker)
            self._idle.put(None)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()


class _Lost(Exception):
    """A worker that gave no answer; the message is the reason."""


class _Worker:
    def __init__(self, function: bytes, memory: int, seconds: float) -> None:
        context = multiprocessing.get_context("spawn")  # a forked process may hang on locks that threads hold here
        self._connection, there = context.Pipe()
        self._process = context.Process(target=_answer, args=(there, function, memory, seconds), daemon=True)
        self._process.start()
        there.close()
        try:
            self._receive(SECONDS_TO_START)
        except _Lost as lost:
            self.stop()
            raise RuntimeError(
                f"a process for pictures did not start ({lost}); a script that uses workers keeps its own work under "
                'if __name__ == "__main__":'
            ) from lost

    def ask(self, questions: Sequence[tuple], seconds: float) -> Iterator[Any]:
        """The answers, each as soon as it is there."""
        try:
            self._connection.send(questions)
        except OSError as error:
            raise _Lost(WORKER_DIED) from error
        for _ in questions:
            raised, answer = self._receive(seconds)
            if raised:
                raise answer
            yield answer

    def _receive(self, seconds: float) -> Any:
        try:
            if not self._connection.poll(seconds):
                raise _Lost(TIMED_OUT)
            return pickle.loads(self._connection.recv_bytes())
        except (EOFError, OSError) as error:
            raise _Lost(WORKER_DIED) from error

    def kill(self) -> None:
        """End it while another thread waits for its answer; that one is to `stop` it."""
        self._process.kill()

    def stop(self) -> None:
        self._connection.close()
        self._process.kill()
        self._process.join()


def _answer(connection: Connection, function: bytes, memory: int, seconds: float) -> None:
    """What a worker does, until the other end of its connection is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks; it ends this one
    function = pickle.loads(function)
    _limit_memory(memory)
    _send(connection, None)
    while True:
        try:
            questions = connection.recv()
        except (EOFError, OSError):
            return
        for question in questions:
            _alarm(2 * seconds + 1)  # ends a hanging worker whose parent was killed
            try:
                answer = (False, function(*question))
            except Exception as error:
                answer = (True, error)
            _alarm(0)
            _send(connection, answer)


def _send(connection: Connection, answer: Any) -> None:
    try:
        content = pickle.dumps(answer, protocol=pickle.HIGHEST_PROTOCOL)
    except Exception as error:  # an answer or exception that cannot be pickled
        content = pickle.dumps((True, RuntimeError(f"{answer!r} cannot be sent between processes ({error})")))
    try:
        connection.send_bytes(content)
    except OSError:  # nobody waits for it any more
        raise SystemExit from None


def _limit_memory(memory: int) -> None:
    """Let further allocations fail beyond ``memory`` bytes; only Linux tells how much there is already."""
    try:
        import resource

        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = now + memory if hard == resource.RLIM_INFINITY else min(hard, now + memory)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _alarm(seconds: float) -> None:
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)
