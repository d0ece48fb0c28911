"""Runs side by side: each is a process of its own, N at once, on this machine or on a Ray cluster.

    jobs --> [ child | child | ... ] --> results/runs.jsonl
                 |                            ^
                 +-- log/<Model>/….log        |
                 +-- dies, and why -----------+ a record with status "failed"; the others go on

A child is ``python -m recbole_mm.runner --job FILE``. It appends its own record, so that nothing is lost if this
process dies; it ends itself when this process is gone.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from recbole_mm.data.files import write_atomically
from recbole_mm.errors import EXIT_INTERRUPTED, RecBoleMMError, SettingError
from recbole_mm.plan import Facts, Job, facts_of
from recbole_mm.records import RUNS_FILE, RunRecord, append, per_user_file

EXIT_FAILED = 1
SECONDS_TO_END = 20  # that a child has to save its state
SECONDS_BETWEEN_LOOKS = 0.05
LONGEST_REASON = 500
RAY = "ray"
INSTALL_RAY = '  install it with: pip install "recbole_mm[ray]"'
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

OnDone = Callable[[int, RunRecord], Any]


# ------------------------------------------------ this machine


def n_cores() -> int:
    """Cores that this process may use; OMP_NUM_THREADS says how many somebody wants it to."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return min(cores, int(wanted)) if wanted.isdigit() and int(wanted) else cores


def execute(
    jobs: Sequence[Job],
    *,
    n_jobs: int | None = None,
    runs_file: Path | str | None = RUNS_FILE,
    on_done: OnDone | None = None,
    cluster: str | None = None,
) -> list[RunRecord]:
    """Run jobs, each in a process of its own; one that dies becomes a failed record, and the others go on.

    Args:
        n_jobs: how many at once; each gets cores // n_jobs threads.
        runs_file: where records are appended; None for nowhere.
        on_done: gets the position of a job and its record, as jobs end.
        cluster: "ray" or an address, see `run_product`.

    Returns:
        A record for each job, in the order of the jobs.

    Raises:
        SettingError: of a job, before any has run, or Ray cannot be had.
        KeyboardInterrupt: after all children have ended.
    """
    if n_jobs is not None and n_jobs < 1:
        raise SettingError(f"--jobs must be at least 1, found {n_jobs}")
    facts = list(facts_of(jobs))
    found: dict[int, RunRecord] = {}
    endings = _on_this_machine(jobs, n_jobs or 1, runs_file) if cluster is None else _on_ray(jobs, n_jobs, cluster)
    with closing(endings):  # which ends the children, whatever happens here
        for number, ending in endings:
            found[number] = record = ending.record or _failed(jobs[number], facts[number], ending)
            if runs_file is not None:
                _keep(record, ending, Path(runs_file))
            if on_done is not None:
                on_done(number, record)
    return [found[number] for number in range(len(jobs))]


@dataclass(frozen=True)
class Ending:
    """How a child ended.

    Attributes:
        record: of a run that is done.
        error: why there is none, one line.
        appended: whether the record stands in the file of runs.
        per_user: content of the file with the values of single test rows, of a run on another machine.
    """

    run_id: str
    record: RunRecord | None
    error: str
    started: str
    seconds: float
    appended: bool = False
    per_user: bytes | None = None


def _keep(record: RunRecord, ending: Ending, runs_file: Path) -> None:
    """Append a record, and the values of single test rows beside it, where the child has not done so."""
    content = ending.per_user
    if content is not None:
        write_atomically(per_user_file(runs_file, record.run_id), lambda out: out.write(content))
    if not ending.appended:
        append(record, runs_file)


def _on_this_machine(jobs: Sequence[Job], n_jobs: int, runs_file: Path | str | None) -> Iterator[tuple[int, Ending]]:
    n_jobs = min(n_jobs, max(1, len(jobs)))
    threads = max(1, n_cores() // n_jobs)
    waiting, places = list(range(len(jobs))), list(range(n_jobs))  # a place is a share of this machine
    running: dict[int, tuple[int, _Child]] = {}
    with tempfile.TemporaryDirectory(prefix="recbole_mm-") as folder:
        try:
            while waiting or running:
                while waiting and places:
                    number, place = waiting.pop(0), places.pop(0)
                    job = _on_its_gpu(jobs[number], place)
                    share = max(1, threads // int(job.settings.get("nproc") or 1))
                    running[number] = place, _Child(job, share, runs_file, Path(folder))
                time.sleep(SECONDS_BETWEEN_LOOKS)
                for number, (place, child) in list(running.items()):
                    if child.has_ended():
                        del running[number]
                        places.append(place)
                        yield number, child.ending()
        finally:
            _end([child for _, child in running.values()])


def _on_its_gpu(job: Job, place: int) -> Job:
    """With ``gpu_id: 0,1`` runs at the same time take turns on the GPUs."""
    gpus = [gpu.strip() for gpu in str(job.settings.get("gpu_id") or "").split(",") if gpu.strip()]
    if len(gpus) < 2 or int(job.settings.get("nproc") or 1) > 1:
        return job
    return replace(job, settings={**job.settings, "gpu_id": gpus[place % len(gpus)]})


class _Child:
    """One run in a process of its own, and in a process group, with whatever it starts."""

    def __init__(self, job: Job, threads: int, runs_file: Path | str | None, folder: Path) -> None:
        self.run_id = secrets.token_hex(6)
        self._clock, self._started = time.perf_counter(), time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self._order, self._result = folder / f"{self.run_id}.job.json", folder / f"{self.run_id}.result.json"
        order = {
            "job": asdict(job), "run_id": self.run_id, "threads": threads, "result": str(self._result),
            "runs_file": None if runs_file is None else str(runs_file),
        }  # fmt: skip
        self._order.write_text(json.dumps(order), encoding="utf-8")
        self._appends = runs_file is not None
        self.log = log_file(job, self.run_id)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "wb") as log:
            self._process = _start(self._order, threads, log)

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def stop(self) -> None:
        """As Ctrl-C: the run keeps its last state."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def ending(self) -> Ending:
        """What became of it, once it has ended."""
        self._process.stdin.close()
        if self._process.returncode != 0:
            self._signal(signal.SIGKILL)  # processes that it started
        seconds = time.perf_counter() - self._clock
        try:
            result = json.loads(self._result.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            result = {}
        if "record" in result:
            record = RunRecord(**result["record"])
            return Ending(self.run_id, record, "", self._started, seconds, appended=self._appends)
        error = result.get("error") or _how_it_died(self._process.returncode, self.log)
        return Ending(self.run_id, None, f"{error} (log: {self.log})", self._started, seconds)


def log_file(job: Job, run_id: str) -> Path:
    """Where what a run prints is kept."""
    parts = [Path(job.dataset).name, job.variant, f"seed{job.seed}", job.knockout or "", run_id]
    name = "-".join("".join(c if c.isalnum() else "_" for c in part) for part in parts if part)
    return Path("log") / job.model / f"{name}.log"


def _command(order: Path) -> list[str]:
    return [sys.executable, "-m", "recbole_mm.runner", "--job", str(order)]


def _start(order: Path, threads: int, log: IO[bytes]) -> subprocess.Popen:
    """A child that finds this package wherever it runs, and that reads the end of its input when this process dies."""
    settings = {**dict.fromkeys(_THREAD_VARIABLES, str(threads)), "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    environment = {**os.environ, **settings, "PYTHONPATH": _python_path()}
    return subprocess.Popen(
        _command(order), stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT,
        env=environment, start_new_session=True,
    )  # fmt: skip


def _python_path() -> str:
    """With the folder of this package, which may be a checkout."""
    package = str(Path(__file__).resolve().parents[1])
    return os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])


def _how_it_died(code: int, log: Path) -> str:
    """Why a child ended without saying so."""
    if code == -signal.SIGKILL:
        return "killed (SIGKILL), as the system does when memory is short"
    if code < 0:
        with suppress(ValueError):
            return f"ended by signal {signal.Signals(-code).name}"
        return f"ended by signal {-code}"
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
    return f"exit code {code}: {last}"[:LONGEST_REASON]


def _end(children: Sequence[_Child]) -> None:
    """End children that still run: first as Ctrl-C does, then at once."""
    for child in children:
        child.stop()
    try:
        deadline = time.monotonic() + SECONDS_TO_END
        while time.monotonic() < deadline and not all(child.has_ended() for child in children):
            time.sleep(SECONDS_BETWEEN_LOOKS)
    finally:
        for child in children:
            child.kill()


def _failed(job: Job, facts: Facts, ending: Ending) -> RunRecord:
    """The record of a run that came to nothing."""
    from recbole_mm.quick_start import command_of, installed_versions

    return RunRecord(
        model=job.model,
        dataset=facts.settings["dataset"],
        data_fingerprint=facts.data_fingerprint,
        features={},
        settings=facts.settings,
        seed=job.seed,
        best_epoch=-1,
        valid={},
        test={},
        stages=[],
        seconds={"total": round(ending.seconds, 3)},
        peak_memory={},
        versions=installed_versions(),
        checkpoint="",
        started=ending.started,
        run_id=ending.run_id,
        status="failed",
        error=ending.error,
        protocol=facts.settings.get("protocol") or "",
        settings_given=facts.given,
        settings_hash=facts.settings_hash,
        budget=job.budget,
        command=command_of(job.model, facts.settings["dataset"], facts.given),
    )


# ------------------------------------------------ a Ray cluster


def _on_ray(jobs: Sequence[Job], n_jobs: int | None, cluster: str) -> Iterator[tuple[int, Ending]]:
    """The same children, started by Ray tasks wherever there is room; records come back to this machine.

    All machines need the same packages, and the datasets at the same place.
    """
    ray = _import_ray()
    started = not ray.is_initialized()
    if started:
        _connect(ray, cluster)
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        n_gpus = sum(int(node.get("GPU", 0)) for node in nodes)
        at_once = n_jobs or n_gpus or len(nodes)
        cores = int(min(node.get("CPU", 1) for node in nodes))
        threads = max(1, cores // -(-at_once // len(nodes)))
        task = ray.remote(num_cpus=threads, max_retries=0)(_ray_task)
        waiting, running = list(range(len(jobs))), {}
        while waiting or running:
            while waiting and len(running) < at_once:
                number = waiting.pop(0)
                on_gpu = bool(n_gpus) and jobs[number].settings.get("use_gpu", True)
                order = task.options(num_gpus=1 if on_gpu else 0).remote(asdict(jobs[number]), threads, os.getcwd())
                running[order] = number, time.perf_counter(), time.strftime("%Y-%m-%dT%H:%M:%S%z")
            (ready, *_), _ = ray.wait(list(running), num_returns=1)
            number, clock, began = running.pop(ready)
            try:
                yield number, _ending_from(ray.get(ready))
            except ray.exceptions.RayError as error:
                reason = f"its Ray worker was lost: {_one_line(error)}"
                yield number, Ending(secrets.token_hex(6), None, reason, began, time.perf_counter() - clock)
    finally:
        if started:
            ray.shutdown()


def _ending_from(answer: dict[str, Any]) -> Ending:
    record = answer.pop("record")
    return Ending(**answer, record=None if record is None else RunRecord(**record))


def _ray_task(job: dict[str, Any], threads: int, folder: str) -> dict[str, Any]:
    """One child beside a Ray worker; what it leaves as plain data."""
    import ray

    os.chdir(folder)
    if gpus := ray.get_gpu_ids():
        job = {**job, "settings": {**job["settings"], "gpu_id": str(gpus[0])}}
    with tempfile.TemporaryDirectory(prefix="recbole_mm-") as place:
        child = _Child(Job(**job), threads, Path(place) / "runs.jsonl", Path(place))
        try:
            while not child.has_ended():
                time.sleep(SECONDS_BETWEEN_LOOKS)
        finally:
            child.kill()
        ending = child.ending()
        path = per_user_file(Path(place) / "runs.jsonl", child.run_id)
        return {
            **vars(ending), "record": ending.record and asdict(ending.record), "appended": False,
            "per_user": path.read_bytes() if path.is_file() else None,
        }  # fmt: skip


def _import_ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise SettingError(f"--cluster needs the package ray ({error})\n{INSTALL_RAY}") from error


def _connect(ray: Any, cluster: str) -> None:
    """Join a cluster, or start one of this machine."""
    settings = {
        "runtime_env": {"env_vars": {"PYTHONPATH": _python_path()}},
        "log_to_driver": False,
        "logging_level": "WARNING",
    }
    address = os.environ.get("RAY_ADDRESS") if cluster == RAY else cluster
    try:
        if address:
            ray.init(address=address, **settings)
        else:
            ray.init(num_cpus=n_cores(), include_dashboard=False, **settings)
    except (OSError, RuntimeError, ValueError) as error:
        raise SettingError(
            f"cannot reach a Ray cluster at {address!r} ({_one_line(error)})\n"
            "  start one with: ray start --head; or give --cluster=ray for this machine alone"
        ) from error


# ------------------------------------------------ a child


def _one_line(error: BaseException) -> str:
    lines = [" ".join(line.split()) for line in str(error).splitlines()]
    text = " ".join(line for line in lines if line and not line.startswith("--debug"))  # the log shows where
    named = text if isinstance(error, RecBoleMMError) and text else f"{type(error).__name__}: {text}".rstrip(": ")
    return named[:LONGEST_REASON]


def _end_with_parent() -> None:
    """Wait for the end of the input, which comes when the process that started this one is gone."""
    with suppress(OSError):
        while os.read(0, 1):
            pass
    os.kill(os.getpid(), signal.SIGTERM)


def main(argv: Sequence[str] | None = None) -> int:
    """A child: runs one job, leaves its record or the reason why there is none."""
    parser = argparse.ArgumentParser(prog="python -m recbole_mm.runner", description="One run of many.")
    parser.add_argument("--job", required=True, metavar="FILE", help="written by run_recbole_mm")
    order = json.loads(Path(parser.parse_args(argv).job).read_text(encoding="utf-8"))
    result = Path(order["result"])
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        record = _run(order)
    except Exception as error:
        traceback.print_exc()
        _leave(result, {"error": _one_line(error)})
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    _leave(result, {"record": asdict(record)})
    return 0


def _run(order: Mapping[str, Any]) -> RunRecord:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    import torch

    from recbole_mm.quick_start import run

    torch.set_num_threads(order["threads"])
    job = Job(**order["job"])
    return run(
        job.model, job.dataset, None, job.all_settings(), runs_file=order["runs_file"], run_id=order["run_id"],
        budget=job.budget, tested=job.tested,
    )  # fmt: skip


def _leave(path: Path, result: Mapping[str, Any]) -> None:
    write_atomically(path, lambda out: out.write(json.dumps(result).encode()))


if __name__ == "__main__":
    sys.exit(main())
