"""Many runs side by side: each ends in a record, whatever happens to it."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import TINY, write_planted

import run_recbole_mm
from recbole_mm import runner
from recbole_mm.errors import SettingError
from recbole_mm.plan import Job
from recbole_mm.product import _Lines, parse_names, parse_seeds, run_product
from recbole_mm.quick_start import installed_versions
from recbole_mm.records import load, read_per_user
from recbole_mm.runner import execute, n_cores

RUNS = Path("results/runs.jsonl")
SMALL = {**TINY, "epochs": 1}
# A child that trains nothing: what its seed says happens to it.
CHILD = """
import json, os, signal, sys, time
from pathlib import Path

order = json.loads(Path(sys.argv[1]).read_text())
job, seed = order["job"], order["job"]["seed"]
with open("begun.txt", "a") as file:
    file.write(f"{seed} {os.getpid()}\\n")
if seed == 11:
    os.kill(os.getpid(), signal.SIGKILL)
if seed == 12:
    os.kill(os.getpid(), signal.SIGSEGV)
if seed == 13:
    print("first words\\nlast words")
    sys.exit(7)
if seed == 14:
    Path(order["result"]).write_text(json.dumps({"error": "ValueError: no such thing"}))
    sys.exit(1)
if seed == 15:
    time.sleep(60)
if seed == 16:
    time.sleep(0.3)
content = json.loads(Path("template.json").read_text())
settings = {**content["settings"], **job["settings"], "seed": seed, "knockout": job["knockout"]}
content |= {"model": job["model"], "settings": settings, "seed": seed, "run_id": order["run_id"]}
content["versions"] = {"threads": os.environ["OMP_NUM_THREADS"]}
if order["runs_file"]:
    from recbole_mm.records import RunRecord, append

    append(RunRecord(**content), Path(order["runs_file"]))
Path(order["result"]).write_text(json.dumps({"record": content}))
"""


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """The record of a real run, which the children hand out as theirs."""
    from recbole_mm.quick_start import run

    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("template")
        patch.chdir(folder)
        write_planted(folder / "dataset" / "planted")
        return run("SASRec", "planted", settings=SMALL, runs_file=None)


@pytest.fixture
def children(planted, template, monkeypatch):
    """Runs are played by `CHILD`."""
    Path("template.json").write_text(json.dumps(dataclasses.asdict(template)))
    monkeypatch.setattr(runner, "_command", lambda order: [sys.executable, "-c", CHILD, str(order)])


def job(seed: int, **more) -> Job:
    return Job("SASRec", "planted", dict(SMALL), seed, **more)


def begun() -> list[tuple[int, int]]:
    """Seed and process id of every child so far."""
    path = Path("begun.txt")
    return [tuple(map(int, line.split())) for line in path.read_text().splitlines()] if path.exists() else []


def product(**more) -> int:
    arguments = {"settings": SMALL, "seeds": [1, 2], **more}
    return run_product(["SASRec"], ["planted"], **arguments)


# ------------------------------------------------ jobs


def test_every_job_gets_its_record_in_order(children):
    seen = []
    found = execute([job(16), job(2), job(3)], n_jobs=3, on_done=lambda number, record: seen.append(number))
    assert [record.seed for record in found] == [16, 2, 3]
    assert sorted(seen) == [0, 1, 2] and seen[-1] == 0  # the first one took longest
    assert {record.run_id for record in load(RUNS).records} == {record.run_id for record in found}


def test_runs_share_the_cores(children, monkeypatch):
    monkeypatch.setattr(runner, "n_cores", lambda: 8)
    for n_jobs, threads in ((1, "8"), (3, "2"), (20, "4")):  # no more than there are jobs
        found = execute([job(1), job(2)] + [job(3)] * (n_jobs == 3), n_jobs=n_jobs, runs_file=None)
        assert {record.versions["threads"] for record in found} == {threads}
    assert not RUNS.exists()


def test_who_asks_for_fewer_cores_gets_fewer(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert n_cores() == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "10000")
    everything = n_cores()
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert n_cores() == everything >= 1


def test_a_run_that_dies_is_recorded_with_its_reason_and_the_others_go_on(children):
    seeds = [11, 12, 13, 14, 1]
    found = execute([job(seed) for seed in seeds], n_jobs=2)
    assert [record.status for record in found] == ["failed"] * 4 + ["done"]
    for record, reason in zip(
        found,
        (
            "killed (SIGKILL), as the system does when memory is short",
            "ended by signal SIGSEGV",
            "exit code 7: last words",
            "ValueError: no such thing",
        ),
        strict=False,
    ):
        log = runner.log_file(job(record.seed), record.run_id)
        assert record.error == f"{reason} (log: {log})" and log.is_file()
    loaded, problems = load(RUNS)
    assert not problems and {record.seed: record.status for record in loaded} == {
        record.seed: record.status for record in found
    }


def test_a_failed_record_says_what_was_tried(children):
    (record,) = execute([job(13, knockout="text:noise", budget={"trials": 3})])
    assert (record.model, record.dataset, record.seed, record.knockout) == ("SASRec", "planted", 13, "text:noise")
    assert record.test == {} and record.budget == {"trials": 3} and record.protocol == "leave-one-out"
    assert record.settings["epochs"] == 1 and record.settings_given["knockout"] == "text:noise"
    assert record.versions == installed_versions()
    assert "--seed=13" in record.command and "--knockout=text:noise" in record.command
    assert load(RUNS).records == [record]


def test_two_runners_on_one_file_lose_no_line(children):
    seeds = (range(20, 32), range(40, 52))
    threads = [
        threading.Thread(target=execute, args=([job(seed) for seed in part],), kwargs={"n_jobs": 4}) for part in seeds
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    loaded, problems = load(RUNS)
    assert not problems and sorted(record.seed for record in loaded) == [*seeds[0], *seeds[1]]


def test_children_end_when_something_goes_wrong_here(children):
    def stop(number: int, record) -> None:
        raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        execute([job(15), job(16), job(3)], n_jobs=2, on_done=stop)
    assert time.monotonic() - started < 15
    assert sorted(seed for seed, _ in begun()) == [15, 16]
    for _, process in begun():
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
    assert [record.seed for record in load(RUNS).records] == [16]  # what was done is kept


def test_runs_at_the_same_time_take_turns_on_several_gpus():
    several = dataclasses.replace(job(1), settings={"gpu_id": "0, 3"})
    assert [runner._on_its_gpu(several, place).settings["gpu_id"] for place in range(3)] == ["0", "3", "0"]
    for settings in ({}, {"gpu_id": "1"}, {"gpu_id": "0,1", "nproc": 2}):
        alone = dataclasses.replace(job(1), settings=settings)
        assert runner._on_its_gpu(alone, 1) == alone


def test_log_files_tell_runs_apart():
    first = dataclasses.replace(job(1, knockout="text:noise"), dataset="some/where/Office", variant="image")
    assert runner.log_file(first, "abc") == Path("log/SASRec/Office-image-seed1-text_noise-abc.log")


# ------------------------------------------------ the command


def test_a_product_is_run_once(children, capsys):
    assert product() == 0
    first = capsys.readouterr().out
    assert "2 runs, 0 of them done already in results/runs.jsonl" in first
    assert "[1/2] SASRec on planted, seed 1: recall@10 0." in first and "[2/2] SASRec" in first
    assert "test rows, 30 items ranked, seeds 1, 2" in first  # the table
    assert product(seeds=[1, 2, 3]) == 0
    second = capsys.readouterr().out
    assert "3 runs, 2 of them done already" in second and "[1/3] SASRec on planted, seed 1: done already: " in second
    assert "seeds 1, 2, 3" in second and [seed for seed, _ in begun()] == [1, 2, 3]


def test_a_dry_run_prints_the_plan_and_runs_nothing(children, capsys):
    product(seeds=[2])
    product(seeds=[13])
    before, n_begun = RUNS.read_bytes(), len(begun())
    capsys.readouterr()
    assert product(seeds=[1, 2, 13], dry_run=True) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "3 runs, 1 of them done already in results/runs.jsonl"
    assert lines[1] == "[1/3] SASRec on planted, seed 1: to run"
    assert lines[2].startswith("[2/3] SASRec on planted, seed 2: done already: recall@10 0.")
    assert lines[3].startswith("[3/3] SASRec on planted, seed 13: failed before, will be tried again: exit code 7: ")
    assert RUNS.read_bytes() == before and len(begun()) == n_begun


def test_a_failed_run_ends_with_a_hint_and_is_tried_again(children, capsys):
    assert product(seeds=[1, 14]) == 1
    out = capsys.readouterr().out
    assert "[2/2] SASRec on planted, seed 14: FAILED after 0 s: ValueError: no such thing (log: log/SASRec/" in out
    assert "1 of 2 runs failed; the same command tries them again" in out
    assert product(seeds=[1, 14]) == 1
    assert "failed before, will be tried again: ValueError" in capsys.readouterr().out
    assert [seed for seed, _ in begun()] == [1, 14, 14]


def test_all_failed_leaves_no_table(children, capsys):
    assert product(seeds=[14]) == 1
    assert "no run is done, so there is no table" in capsys.readouterr().out


def test_an_interrupted_product_goes_on(children, monkeypatch, capsys):
    tell = _Lines.tell

    def interrupt(self, number, text):
        tell(self, number, text)
        if number == 0:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(_Lines, "tell", interrupt)
        product(seeds=[1, 15, 2])
    out = capsys.readouterr().out
    assert "interrupted: 1 of 3 runs are done and kept in results/runs.jsonl; the same command goes on" in out
    assert product(seeds=[1, 2]) == 0
    assert [seed for seed, _ in begun()] == [1, 2]


def test_a_search_chooses_settings_before_anything_is_skipped(children):
    def choose(jobs: list[Job]) -> list[Job]:
        return [
            dataclasses.replace(job, settings={**job.settings, "n_layers": 1}, budget={"trials": 2}) for job in jobs
        ]

    product(seeds=[1])
    product(seeds=[1], choose=choose)
    product(seeds=[1], choose=choose, dry_run=True)
    assert len(begun()) == 2


def test_broken_lines_of_the_file_are_told(children, capsys):
    product(seeds=[1])
    with open(RUNS, "a") as file:
        file.write("{broken\n")
    capsys.readouterr()
    product(seeds=[1])
    assert "note: results/runs.jsonl, line 2 is no record of a run" in capsys.readouterr().out
    assert len(begun()) == 1


# ------------------------------------------------ arguments


def test_seeds_and_names_are_read():
    assert parse_seeds("2020, 0,7") == [2020, 0, 7]
    assert parse_names("A, B", "model") == ["A", "B"] and parse_names(None, "model") == []


@pytest.mark.parametrize("text", ["", "1,", "a", "1.5", "-1", "1;2", "²"])
def test_seeds_must_be_whole_numbers(text):
    with pytest.raises(SettingError, match="--seeds: cannot read .*like 2020,2021,2022"):
        parse_seeds(text)


def test_a_seed_twice_is_refused():
    with pytest.raises(SettingError, match="--seeds names 7 twice; the same seed gives the same run"):
        parse_seeds("7,8,07")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model=SASRec,", "--dataset=planted"], "--model: cannot read 'SASRec,'; it should look like A,B"),
        (["--model=SASRec", "--dataset=planted", "--jobs=0"], "--jobs must be at least 1, found 0"),
        (["--model=SASRec", "--dataset=planted", "--seeds=1,x"], "--seeds: cannot read '1,x'"),
        (["--model=SASRec", "--dataset=planted", "--seeds=1,2", "--seed=3"], "--seed and --seeds are given"),
        (["--model=A,B", "--resume=x-last.pth"], "--resume continues one run; the same command again continues many"),
    ],
)
def test_the_command_line_says_what_is_wrong(planted, arguments, message, capsys):
    assert run_recbole_mm.main([*arguments, "--epochs=1"]) == 2
    assert message in capsys.readouterr().err
    assert not RUNS.exists()


def test_one_model_on_one_dataset_is_one_run_in_this_process(planted, monkeypatch):
    monkeypatch.setattr(runner, "_command", lambda order: pytest.fail("a child was started"))
    settings = [f"--{key}={json.dumps(value)}" for key, value in SMALL.items()]
    assert run_recbole_mm.main(["--model=SASRec", "--dataset=planted", "--runs-file=here/runs.jsonl", *settings]) == 0
    assert len(load(Path("here/runs.jsonl")).records) == 1


def test_a_missing_ray_is_told_with_its_remedy(planted, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SettingError, match='--cluster needs the package ray.*\n.*pip install "recbole_mm\\[ray\\]"'):
        execute([job(1)], cluster="ray")


# ------------------------------------------------ real children


@pytest.mark.slow
def test_real_runs_of_a_product(planted, capsys):
    settings = [f"--{key}={json.dumps(value)}" for key, value in SMALL.items() if key != "use_gpu"]
    arguments = ["--model=MSM4SR,Popularity", "--dataset=planted", "--seeds=1,2", "--jobs=2", *settings]
    assert run_recbole_mm.main(arguments) == 0
    records = load(RUNS).records
    assert sorted((record.model, record.seed) for record in records) == [
        ("MSM4SR", 1), ("MSM4SR", 2), ("Popularity", 1), ("Popularity", 2),
    ]  # fmt: skip
    assert all(record.peak_memory["resident"] > 0 and Path(record.checkpoint).is_file() for record in records)
    out = capsys.readouterr().out
    assert "seeds 1, 2" in out and "MSM4SR" in out.rpartition("test rows")[2]
    size = RUNS.stat().st_size
    assert run_recbole_mm.main(arguments) == 0 and RUNS.stat().st_size == size


@pytest.mark.slow
def test_a_real_run_that_fails_leaves_its_one_line(planted):
    (record,) = execute([Job("SASRec", "planted", {**SMALL, "knockout_seed": 1}, 1, "text:noise")])
    assert record.status == "failed"
    assert record.error.startswith("knockout: SASRec on planted does not use text; it uses no features")
    assert (
        "\n" not in record.error
        and "Traceback" in runner.log_file(job(1, knockout="text:noise"), record.run_id).read_text()
    )


@pytest.mark.slow
def test_a_child_ends_when_its_parent_is_gone(planted):
    code = (
        "import sys, os; from recbole_mm import runner; from recbole_mm.plan import Job\n"
        f"job = Job('SASRec', 'planted', { ({**SMALL, 'epochs': 100000, 'stopping_step': 100000})!r}, 1)\n"
        "start = runner._start\n"
        "def told(*a):\n    process = start(*a); print(process.pid, flush=True); return process\n"
        "runner._start = told\nrunner.execute([job])"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(runner.__file__).resolve().parents[1])}
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment)
    child = int(parent.stdout.readline())
    deadline = time.monotonic() + 60
    while not list(Path("saved").glob("*-last.pth")) and time.monotonic() < deadline:
        time.sleep(0.1)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while time.monotonic() < deadline:
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        pytest.fail("the child still runs")
    assert not RUNS.exists()


@pytest.mark.slow
def test_ray_runs_the_same_jobs(planted):
    pytest.importorskip("ray")
    jobs = [Job("Popularity", "planted", {"topk": [5, 10], "valid_metric": "Recall@10"}, seed) for seed in (1, 2)]
    jobs.append(dataclasses.replace(jobs[0], knockout="text:noise"))  # which Popularity does not use
    found = execute(jobs, n_jobs=2, cluster="ray")
    assert [record.status for record in found] == ["done", "done", "failed"]
    here = execute(jobs[:1], runs_file=None)[0]
    assert found[0].test == here.test and "does not use text" in found[2].error
    assert len(load(RUNS).records) == 3
    assert len(read_per_user(RUNS.parent / found[0].per_user).user) == found[0].n_test
