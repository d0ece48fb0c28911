"""Pictures from the web: politely, never for ever, and never from where an address should not lead.

A picture goes through: its host's turn -> robots.txt -> request -> redirects, each a turn of its host again -> size and
time limits -> decode check in a worker process -> pictures/ab/<sha256>.<ending> -> journal. Failures that may pass are
tried again with growing pauses.
"""

from __future__ import annotations

import hashlib
import http.client
import queue
import shutil
import socket
import ssl
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NamedTuple

from dataset_prep.features import read_items
from dataset_prep.locking import locked
from dataset_prep.pictures.addresses import Address, AddressError, Connection, connect, join_address, parse_address
from dataset_prep.pictures.decode import OK, Inspected, inspect_picture
from dataset_prep.pictures.opt_outs import USER_AGENT, Rule, header_refuses, read_robots, robots_allow
from dataset_prep.pictures.schedule import Schedule
from dataset_prep.pictures.store import (
    NOT_ASKED_FOR,
    NOT_NAMED,
    TEMPORARY,
    Journal,
    Picture,
    PicturesReport,
    publish,
    stored_name,
    wants_retry,
)
from dataset_prep.pictures.workers import SECONDS_PER_PICTURE, WorkerPool
from recbole_mm.errors import DatasetError

COLUMN = "image_urls"
MAX_REDIRECTS = 3
REDIRECTS = (301, 302, 303, 307, 308)
ROBOTS_BYTES = 500_000  # of a robots.txt that count
LONGEST_PAUSE = 120.0  # seconds; a host that asks for more is left for another run
SECONDS_TO_CONNECT = 10.0
NO_ANSWER = ("connection failed", "timed out")
# Requests in a row without an answer, after which a host is not tried any more in this run.
DOWN_AFTER = 20
NEVER_UP_AFTER = 5  # of a host that has not answered at all
MOST_IDLE = 64  # connections that are kept for further requests
SECONDS_TO_END = 2.0  # for threads that wait for a name or a connection when a run is interrupted
HEADERS = {
    "User-Agent": USER_AGENT,
    "Accept": "image/jpeg, image/png, image/webp, image/gif",
    "Accept-Encoding": "identity",
}


@dataclass(frozen=True)
class FetchSettings:
    """How pictures are downloaded.

    Attributes:
        threads: downloads at a time.
        per_host: requests per second to one host, at most.
        connections: to one host at a time, at most.
        max_bytes: of a picture's file.
        timeout: seconds for one request, from connecting to the last byte.
        tries: of a picture whose failure may be temporary.
        pause: seconds before the second try; doubled each time, and varied by half of it to either side.
        allow_private: also addresses of this machine and of its network.
        ignore_opt_outs: also what robots.txt or X-Robots-Tag ask not to take.
    """

    threads: int = 16
    per_host: float = 10.0
    connections: int = 8
    max_bytes: int = 20_000_000
    timeout: float = 30.0
    tries: int = 4
    pause: float = 1.0
    allow_private: bool = False
    ignore_opt_outs: bool = False


def download_pictures(
    folder: Path,
    settings: FetchSettings | None = None,
    *,
    column: str = COLUMN,
    per_item: int = 1,
    workers: int = 1,
    retry_failed: str | None = None,
    progress: bool = True,
) -> PicturesReport:
    """Download the pictures of the items of ``<folder>/<its name>.item`` and list them in ``pictures/index.tsv``.

    What a run has finished is not asked for again, whether it ended or was killed. Pictures are kept under the hash of
    their content; an address that several items name is asked once.

    Args:
        column: addresses, parted by blanks.
        per_item: how many of an item's pictures to take, the first ones.
        workers: processes that check pictures by decoding; 0 decodes here, without protection against crashes.
        retry_failed: also try what failed before: None, "temporary" (that may be gone) or "all".
        progress: show a progress bar on stderr.

    Raises:
        DatasetError: no ``.item``, no such column, another process writes the dataset.
    """
    folder, settings = Path(folder), settings or FetchSettings()
    items = read_items(folder)
    if column not in items:
        raise DatasetError(
            f"{folder} has no column {column}, only {', '.join(items.columns)}"
            "; choose the column with --column, or take pictures from a folder with --images DIR"
        )
    named = [value.split() for value in items[column]]
    with locked(folder), Journal(folder) as journal:
        sources = dict.fromkeys(source for sources in named for source in sources[:per_item])
        wanted = [source for source in sources if not _is_finished(folder, source, journal, retry_failed)]
        _download(folder, wanted, journal, settings, workers=workers, progress=progress)

        def line(item: str, number: int, source: str) -> Picture:
            if number >= per_item:
                return Picture(item, number, source, NOT_ASKED_FOR)
            found = journal.known[source]
            return Picture(item, number, source, found.status, *_place_and_size(found))

        lines = []
        for item, mine in zip(items["item_id"], named, strict=True):
            lines += [line(item, number, source) for number, source in enumerate(mine)]
            lines += [] if mine else [Picture(item, 0, "", NOT_NAMED)]
        shown = {key: value for key, value in asdict(settings).items() if key not in ("threads", "pause")}
        return publish(folder, lines, {"from": "web", "column": column, "per_item": per_item, **shown})


def _is_finished(folder: Path, source: str, journal: Journal, retry_failed: str | None) -> bool:
    known = journal.known.get(source)
    if known is None or wants_retry(known.status, retry_failed):
        return False
    if known.status != OK:
        return True
    place = folder / "pictures" / stored_name(known)
    return place.is_file() and place.stat().st_size == known.bytes


def _place_and_size(found: Inspected) -> tuple[str, int, str, int, int]:
    return stored_name(found) if found.status == OK else "", *found[2:]


def _download(
    folder: Path, sources: list[str], journal: Journal, settings: FetchSettings, *, workers: int, progress: bool
) -> None:
    """Finish every source, and write each into the journal as soon as it is."""
    from tqdm import tqdm

    if not sources:
        return
    for left_over in (folder / "pictures").glob(".partial-*"):
        shutil.rmtree(left_over, ignore_errors=True)
    workshop = folder / "pictures" / ".partial-downloads"
    workshop.mkdir()
    pool = WorkerPool(inspect_picture, workers, seconds=SECONDS_PER_PICTURE) if workers else nullcontext()
    try:
        with pool:
            check = pool.ask if workers else inspect_picture
            downloader = _Downloader(settings, workshop, folder / "pictures", check)
            with closing(downloader.run(sources)) as results:
                for source, found in tqdm(
                    results, total=len(sources), unit="picture", disable=not progress, leave=False
                ):
                    journal.add(source, found)
    finally:
        shutil.rmtree(workshop, ignore_errors=True)


# ---------------------------------------------------------------- one run


class _Failed(Exception):
    """A request without a picture: why, and how long its host wants to be left alone."""

    def __init__(self, status: str, wait: float = 0.0) -> None:
        super().__init__(status)
        self.status, self.wait = status, wait


class _Job(NamedTuple):
    source: str
    url: str  # the source, or where it was redirected to
    n_redirects: int = 0
    n_failures: int = 0


class _Downloader:
    """The threads of one run and what they share."""

    def __init__(
        self, settings: FetchSettings, workshop: Path, pictures: Path, check: Callable[[Path], Inspected | str]
    ) -> None:
        self._settings, self._workshop, self._pictures, self._check = settings, workshop, pictures, check
        self._schedule = Schedule(rate=settings.per_host, connections=settings.connections)
        self._results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._requests = _Requests(settings)
        self._unanswered: Counter[str] = Counter()  # requests in a row, by host
        self._up: set[str] = set()  # hosts that have answered

    def run(self, sources: list[str]) -> Iterator[tuple[str, Inspected]]:
        """Each source with what became of it, in the order in which they are finished."""
        for source in sources:
            self._put(_Job(source, source))
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self._settings.threads)]
        for thread in threads:
            thread.start()
        try:
            for _ in sources:
                result = self._results.get()
                if isinstance(result, BaseException):
                    raise result
                yield result
        finally:
            self._schedule.stop()
            self._requests.stop()
            ends = time.monotonic() + SECONDS_TO_END
            for thread in threads:
                thread.join(max(0.0, ends - time.monotonic()))

    def _put(self, job: _Job, after: float = 0.0) -> None:
        try:
            self._schedule.put(parse_address(job.url).host, job, after=after)
        except AddressError as error:
            self._results.put((job.source, Inspected(str(error))))

    def _work(self) -> None:
        while (turn := self._schedule.take()) is not None:
            host, job = turn
            try:
                self._do(host, job)
            except BaseException as error:  # such as a full disk: the run ends with it
                self._results.put(error)
                return
            finally:
                self._schedule.done(host)

    def _do(self, host: str, job: _Job) -> None:
        """One request of a job, after which it is finished, or put back for a redirect or another try."""
        if self._unanswered[host] >= (DOWN_AFTER if host in self._up else NEVER_UP_AFTER):
            self._results.put((job.source, Inspected("host down")))
            return
        name = hashlib.sha256(job.source.encode(errors="surrogateescape")).hexdigest()
        try:
            further = self._requests.fetch(parse_address(job.url), self._workshop / name)
            self._heard(host, answered=True)
            if further is None:
                self._results.put((job.source, self._stored(self._workshop / name)))
            elif job.n_redirects == MAX_REDIRECTS:
                raise _Failed("too many redirects")
            else:
                self._put(job._replace(url=join_address(job.url, further), n_redirects=job.n_redirects + 1))
        except AddressError as error:
            self._results.put((job.source, Inspected(str(error))))
        except _Failed as failed:
            self._heard(host, answered=failed.status not in NO_ANSWER)
            n_failures = job.n_failures + 1
            if failed.wait:
                self._schedule.pause(host, min(failed.wait, LONGEST_PAUSE))
            if failed.status in TEMPORARY and n_failures < self._settings.tries and failed.wait <= LONGEST_PAUSE:
                self._put(job._replace(n_failures=n_failures), after=max(failed.wait, self._pause(job)))
            else:
                self._results.put((job.source, Inspected(failed.status)))
        finally:
            (self._workshop / name).unlink(missing_ok=True)

    def _heard(self, host: str, *, answered: bool) -> None:
        self._unanswered[host] = 0 if answered else self._unanswered[host] + 1
        if answered:
            self._up.add(host)
        self._schedule.heard(host, answered=answered)

    def _pause(self, job: _Job) -> float:
        """Seconds before the next try; pictures that failed together do not all come back together."""
        spread = hashlib.sha256(f"{job.n_failures} {job.source}".encode(errors="surrogateescape")).digest()[0] / 255
        return self._settings.pause * 2**job.n_failures * (0.5 + spread)

    def _stored(self, path: Path) -> Inspected:
        """Check a downloaded file, and move it to its place if it is a picture."""
        found = self._check(path)
        if isinstance(found, str):  # the worker was lost
            return Inspected(found)
        if found.status == OK:
            place = self._pictures / stored_name(found)
            place.parent.mkdir(exist_ok=True)
            path.replace(place)
        return found


# ---------------------------------------------------------------- one request


class _Requests:
    """Requests over checked connections, which are kept for further requests to the same origin."""

    def __init__(self, settings: FetchSettings) -> None:
        self._settings = settings
        self._idle: list[tuple[str, Connection]] = []  # with their origin; the one used last is at the end
        self._active: set[Connection] = set()
        self._robots: dict[str, list[Rule]] = {}
        self._robots_locks: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()
        self._stopped = False

    def stop(self) -> None:
        """End all requests; those in progress fail at once."""
        with self._lock:
            self._stopped = True
            for connection in self._active:
                connection.cut()
            for _, connection in self._idle:
                connection.discard()
            self._idle.clear()

    def fetch(self, address: Address, path: Path) -> str | None:
        """Write what an address holds to a file; or return where it redirects to.

        Raises:
            AddressError: it is not to be asked.
            _Failed: no picture came.
        """
        opt_outs = not self._settings.ignore_opt_outs
        if opt_outs and not robots_allow(self._rules(address), address.target):
            raise _Failed("opted out (robots.txt)")
        with self._response(address) as response:
            if response.redirects:
                return response.redirects
            if response.status != 200:
                raise response.failure()
            if opt_outs and header_refuses(response.headers.get_all("X-Robots-Tag", [])):
                raise _Failed("opted out (X-Robots-Tag)")
            with open(path, "wb") as out:
                for block in response.blocks(self._settings.max_bytes):
                    out.write(block)
        return None

    def _rules(self, address: Address) -> list[Rule]:
        """What the origin's robots.txt says to us; asked once. None there, or none for us, allows everything.

        Raises:
            _Failed: there may be one, but it cannot be had now.
        """
        with self._lock:
            lock = self._robots_locks.setdefault(address.origin, threading.Lock())
        with lock:
            if address.origin not in self._robots:
                self._robots[address.origin] = read_robots(self._robots_file(address._replace(target="/robots.txt")))
            return self._robots[address.origin]

    def _robots_file(self, address: Address) -> str:
        for _ in range(MAX_REDIRECTS + 1):
            with self._response(address) as response:
                if response.status == 429 or response.status >= 500:
                    raise response.failure()
                if not response.redirects:
                    return response.beginning(ROBOTS_BYTES).decode(errors="replace") if response.status == 200 else ""
            address = parse_address(join_address(address.origin + address.target, response.redirects))
        return ""

    @contextmanager
    def _response(self, address: Address) -> Iterator[_Response]:
        """The response to a GET, whose body is to be read within; all within the time limit.

        Raises:
            AddressError: it is not to be asked.
            _Failed: no response came.
        """
        clock, response = _Clock(self._settings.timeout), None
        connection = self._reused(address)
        try:
            with _network(clock):
                if connection is not None:
                    try:
                        response = _get(address, connection, clock)
                    except (OSError, http.client.HTTPException):  # the server had closed it meanwhile
                        self._dropped(connection)
                        connection = None
                if connection is None:
                    connection = self._connected(address)
                    clock.start(connection)
                    connection.secure()
                    response = _get(address, connection, clock)
            yield _Response(response, clock)
        finally:
            clock.stop()
            whole = response is not None and response.isclosed() and not response.will_close
            if whole and not clock.has_run_out:
                self._kept(address, connection)
            elif connection is not None:
                self._dropped(connection)

    def _reused(self, address: Address) -> Connection | None:
        with self._lock:
            for number in reversed(range(len(self._idle))):
                if self._idle[number][0] == address.origin:
                    _, connection = self._idle.pop(number)
                    self._active.add(connection)
                    return connection
        return None

    def _connected(self, address: Address) -> Connection:
        settings = self._settings
        connection = connect(
            address, allow_private=settings.allow_private, seconds=min(settings.timeout, SECONDS_TO_CONNECT)
        )
        connection.sock.settimeout(settings.timeout)
        with self._lock:
            self._active.add(connection)
            if self._stopped:
                connection.cut()
        return connection

    def _kept(self, address: Address, connection: Connection) -> None:
        with self._lock:
            self._active.discard(connection)
            if self._stopped:
                connection.discard()
                return
            self._idle.append((address.origin, connection))
            if len(self._idle) > MOST_IDLE:
                self._idle.pop(0)[1].discard()

    def _dropped(self, connection: Connection) -> None:
        with self._lock:
            self._active.discard(connection)
        connection.discard()


class _Clock:
    """Cuts a connection when a request takes too long, however busy it looks."""

    def __init__(self, seconds: float) -> None:
        self._ends, self._timer = time.monotonic() + seconds, None
        self.has_run_out = False

    def start(self, connection: Connection) -> None:
        self.stop()
        self._timer = threading.Timer(max(0.0, self._ends - time.monotonic()), self._run_out, [connection])
        self._timer.daemon = True
        self._timer.start()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _run_out(self, connection: Connection) -> None:
        self.has_run_out = True
        connection.cut()


class _Response:
    """What a server answered, read within the time limit.

    Attributes:
        status: HTTP's.
        redirects: where it sends us, or "".
    """

    def __init__(self, response: http.client.HTTPResponse, clock: _Clock) -> None:
        self._response, self._clock = response, clock
        self.status, self.headers = response.status, response.headers
        location = response.getheader("Location", "") if response.status in REDIRECTS else ""
        location = location.encode("latin-1", errors="replace").decode(errors="replace")
        self.redirects = location.strip().replace(" ", "%20")

    def failure(self) -> _Failed:
        """The status as a failure, with the time that the server wants to be left alone."""
        status = f"http {self.status}"
        return _Failed(status, _seconds(self.headers.get("Retry-After", "")) if status in TEMPORARY else 0.0)

    def beginning(self, most: int) -> bytes:
        """The first ``most`` bytes of the body; as `blocks`."""
        content = b""
        for block in self.blocks(sys.maxsize):
            content += block
            if len(content) >= most:
                break
        return content[:most]

    def blocks(self, most: int) -> Iterator[bytes]:
        """The body, as it comes.

        Raises:
            _Failed: it does not come in time, has more than ``most`` bytes, or fewer than were announced.
        """
        n, left = 0, self._response.length  # None if the server does not tell
        if left is not None and left > most:
            raise _Failed("too large")
        while left is None or left > 0:
            with _network(self._clock):
                block = self._response.read1(1 << 16 if left is None else min(left, 1 << 16))
            if not block:
                break
            n, left = n + len(block), None if left is None else left - len(block)
            if n > most:
                raise _Failed("too large")
            yield block
        if self._clock.has_run_out:
            raise _Failed("timed out")
        if left:
            raise _Failed("cut short")
        self._response.close()


def _get(address: Address, connection: Connection, clock: _Clock) -> http.client.HTTPResponse:
    clock.start(connection)
    connection.request("GET", address.target, headers={"Host": address.netloc, **HEADERS})
    return connection.getresponse()


@contextmanager
def _network(clock: _Clock) -> Iterator[None]:
    """Whatever goes wrong within is a failed request."""
    try:
        yield
    except AddressError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _Failed("timed out" if clock.has_run_out else _reason(error)) from error


def _seconds(retry_after: str) -> float:
    """How long a Retry-After header asks to wait; 0 if it says nothing."""
    if retry_after.strip().isdecimal():
        return float(retry_after)
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return "bad certificate"
    if isinstance(error, socket.gaierror) and error.errno != socket.EAI_AGAIN:
        return "no such host"
    if isinstance(error, TimeoutError):
        return "timed out"
    return "cut short" if isinstance(error, http.client.IncompleteRead) else "connection failed"
