"""Whose turn it is: no host is asked too often or by too many at once, and no thread waits for a slow one."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from dataclasses import dataclass, field
from typing import Any


@dataclass
class _Host:
    jobs: list[tuple[float, int, Any]] = field(default_factory=list)  # a heap: when it is due, its number, the job
    active: int = 0
    connections: int = 1  # at a time; more when it has answered
    next_at: float = 0.0  # no request before
    planned: float | None = None  # when the plan has it


class Schedule:
    """Jobs by host; all methods may be called from any thread. Adding or taking one costs O(log n).

    Args:
        rate: requests per second to one host, at most.
        connections: requests to one host at the same time, at most; one at a time to a host that did not answer yet,
            or not the last time, so that silent hosts hold few threads.
    """

    def __init__(self, *, rate: float, connections: int) -> None:
        self._interval, self._connections = 1 / rate, connections
        self._hosts: dict[str, _Host] = {}
        self._plan: list[tuple[float, int, str]] = []  # a heap of hosts; entries that are out of date are skipped
        self._numbers = itertools.count()
        self._left = 0  # waiting or active
        self._stopped = False
        self._changed = threading.Condition()

    def put(self, host: str, job: Any, *, after: float = 0.0) -> None:
        """Add a job, to be done no sooner than in ``after`` seconds."""
        with self._changed:
            jobs = self._hosts.setdefault(host, _Host()).jobs
            heapq.heappush(jobs, (time.monotonic() + after if after else 0.0, next(self._numbers), job))
            self._left += 1
            self._plan_for(host)
            self._changed.notify()

    def take(self) -> tuple[str, Any] | None:
        """The next host and job, as soon as it may be done; None when all are done. Tell `done` afterwards."""
        with self._changed:
            while self._left and not self._stopped:
                now = time.monotonic()
                if not self._plan or self._plan[0][0] > now:
                    self._changed.wait(self._plan[0][0] - now if self._plan else None)
                    continue
                due, _, name = heapq.heappop(self._plan)
                host = self._hosts[name]
                if due != host.planned:
                    continue
                host.planned = None
                if host.active < host.connections and host.jobs and max(host.next_at, host.jobs[0][0]) <= now:
                    host.active += 1
                    host.next_at = now + self._interval
                    job = heapq.heappop(host.jobs)[2]
                    self._plan_for(name)
                    self._changed.notify()  # its next job may be due before any that the others wait for
                    return name, job
                self._plan_for(name)
            return None

    def done(self, host: str) -> None:
        """A job that was taken is done; one that is to be done again must have been put back before."""
        with self._changed:
            self._hosts[host].active -= 1
            self._left -= 1
            self._plan_for(host)
            self._changed.notify_all()

    def heard(self, host: str, *, answered: bool) -> None:
        """Whether a host answered the last request."""
        with self._changed:
            self._hosts[host].connections = self._connections if answered else 1
            self._plan_for(host)
            self._changed.notify_all()

    def pause(self, host: str, seconds: float) -> None:
        """Leave a host alone for a while."""
        with self._changed:
            self._hosts[host].next_at = max(self._hosts[host].next_at, time.monotonic() + seconds)

    def stop(self) -> None:
        """Give out no further job."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _plan_for(self, name: str) -> None:
        host = self._hosts[name]
        if not host.jobs or host.active >= host.connections:
            return
        due = max(host.next_at, host.jobs[0][0])
        if host.planned is None or due < host.planned:
            host.planned = due
            heapq.heappush(self._plan, (due, next(self._numbers), name))
