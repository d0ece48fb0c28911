"""The file of runs: no line is lost, broken ones are told, and files of single rows come back as they were."""

from __future__ import annotations

import json
import multiprocessing
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from recbole_mm import records
from recbole_mm.errors import DatasetError, TrainingError
from recbole_mm.records import PerUser, RunRecord, append, load, read_per_user, settings_hash, write_per_user

RUN = RunRecord(
    model="SASRec", dataset="shop", data_fingerprint="d" * 64, features={"text": "f" * 64},
    settings={"hidden_size": 64, "knockout": None}, seed=1, best_epoch=3, valid={"recall@5": 0.25},
    test={"recall@5": 0.125}, stages=[{"stage": "train", "curve": [{"epoch": 0, "train_loss": 2.5, "valid": None}]}],
    seconds={"train": 1.5}, peak_memory={"resident": 1 << 30}, versions={"torch": "2.3"}, checkpoint="saved/x.pth",
    started="2024-05-01T10:00:00+0000", slices={"history": {"1-2": {"n": 4, "recall@5": 0.5}}},
    warnings=["naïve – “quoted”"],
)  # fmt: skip
FILE = Path("results/runs.jsonl")
LATER_FIELDS = (
    "run_id", "status", "error", "protocol", "test_fingerprint", "n_test", "n_items", "settings_given", "settings_hash",
    "n_parameters", "latency", "slices", "per_user", "budget", "warnings", "command",
)  # fmt: skip


def changed(**values) -> str:
    """The line of a run with other values, whatever their type."""
    return json.dumps({**asdict(RUN), **values})


def written(*lines: str | bytes) -> Path:
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_bytes(b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines))
    return FILE


# ------------------------------------------------ the file of runs


def test_a_record_comes_back_as_it_was():
    append(RUN, FILE)
    append(replace(RUN, status="failed", error="no memory", test={}), FILE)
    found = load(FILE)
    assert found.problems == [] and found.records[0] == RUN
    assert found.records[1].status == "failed" and FILE.read_bytes().count(b"\n") == 2


def _append_many(barrier, number: int) -> None:
    barrier.wait()
    for seed in range(60):
        append(replace(RUN, run_id=f"process {number}", seed=seed, command="x" * (50_000 if seed % 3 else 10)), FILE)


def test_processes_that_append_at_once_lose_no_line():
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    processes = [context.Process(target=_append_many, args=(barrier, number)) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    found = load(FILE)
    assert found.problems == [] and len(found.records) == 180
    for number in range(3):
        assert [run.seed for run in found.records if run.run_id == f"process {number}"] == list(range(60))


@pytest.mark.parametrize("kept", [1, 100, -1])
def test_a_line_that_was_left_half_written_spoils_no_other(kept):
    append(RUN, FILE)
    FILE.write_bytes(FILE.read_bytes() + changed().encode()[:kept])
    assert load(FILE).records == [RUN] and "line 2 is no record" in load(FILE).problems[0]
    append(replace(RUN, seed=7), FILE)
    found = load(FILE)
    assert [run.seed for run in found.records] == [1, 7] and len(found.problems) == 1


def test_a_last_line_without_its_end_is_read_and_kept():
    written(changed())
    FILE.write_bytes(FILE.read_bytes()[:-1])
    append(replace(RUN, seed=7), FILE)
    assert [run.seed for run in load(FILE).records] == [1, 7] and load(FILE).problems == []


def test_a_disk_that_takes_half_a_line_is_an_error(monkeypatch):
    append(RUN, FILE)
    write = records.os.write
    with monkeypatch.context() as patched:
        patched.setattr(records.os, "write", lambda handle, line: write(handle, line[:50]))
        with pytest.raises(OSError, match="No space left"):
            append(RUN, FILE)
    append(replace(RUN, seed=7), FILE)
    assert [run.seed for run in load(FILE).records] == [1, 7] and len(load(FILE).problems) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_never_written(value):
    append(RUN, FILE)
    for bad in ({"valid": {"recall@5": value}}, {"settings": {"x": value}}, {"stages": [{"curve": [{"y": value}]}]}):
        with pytest.raises(TrainingError, match="SASRec on shop cannot be recorded: a metric, a loss or a setting is"):
            append(replace(RUN, **bad), FILE)
    assert load(FILE) == ([RUN], [])


def test_half_a_character_of_a_path_costs_no_record():
    append(replace(RUN, checkpoint="saved/\udcff.pth"), FILE)
    assert load(FILE).records[0].checkpoint == "saved/?.pth" and load(FILE).problems == []


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("not json", "Expecting value"),
        (b"\xff\xfe\xfa broken", "decode"),
        (b"\0" * 500, "Expecting value"),
        ("[" * 100_000, "recursion"),
        ("[1, 2]", r"found \[1, 2\], expected a mapping"),
        ("null", "found None, expected a mapping"),
        ('{"model": "SASRec", "seed": 1}', "dataset, data_fingerprint, features, .* not found"),
        (changed(test={"recall@5": float("nan")}), "NaN is no result"),
        (changed(test={"recall@5": float("-inf")}), "-Infinity is no result"),
        (changed(test={"recall@5": 0}).replace('@5": 0}', '@5": 1e999}'), "recall@5 is inf, expected a finite number"),
        (changed(test={"recall@5": 10**400}), "too large"),
        (changed(valid={"recall@5": None}), "recall@5 is None, expected a finite number"),
        (changed(test={"recall@5": True}), "recall@5 is True, expected a finite number"),
        (changed(test=[0.5]), r"test is \[0.5\], expected a mapping"),
        (changed(seed="1"), "seed is '1', expected a whole number"),
        (changed(seed=True), "seed is True, expected a whole number"),
        (changed(best_epoch=1.5), "best_epoch is 1.5, expected a whole number"),
        (changed(model=None), "model is None, expected text"),
        (changed(status="perhaps"), "status is 'perhaps', expected done or failed"),
        (changed(stages={"train": 1}), "stages is .*, expected a list"),
        (changed(stages=[1]), r"stages is \[1\], expected a list of mappings"),
        (changed(stages=[{"curve": [1]}]), "the curve of a stage is"),
        (changed(warnings=[1]), r"warnings is \[1\], expected a list of texts"),
        (changed(features={"text": 3}), "expected a text each"),
        (changed(settings={"knockout": 3}), "knockout is 3, expected text"),
        (changed(dataset="\ud800"), "surrogates not allowed"),
    ],
)  # fmt: skip
def test_a_line_that_is_no_record_is_told_by_its_number_and_the_others_are_kept(line, reason):
    found = load(written(changed(), "", line, changed(seed=2)))
    assert [run.seed for run in found.records] == [1, 2] and len(found.problems) == 1
    assert found.problems[0].startswith("results/runs.jsonl, line 3 is no record of a run: ")
    assert re.search(reason, found.problems[0])


def test_records_of_earlier_and_later_versions_are_read():
    early = {key: value for key, value in asdict(RUN).items() if key not in LATER_FIELDS}
    found = load(written(json.dumps(early), changed(invented_later={"x": 1})))
    assert found.problems == [] and found.records[1] == RUN
    assert (found.records[0].status, found.records[0].slices, found.records[0].n_test) == ("done", {}, 0)


def test_no_file_is_an_error_that_says_who_writes_one():
    with pytest.raises(DatasetError, match="cannot read results/runs.jsonl: No such file.*\n.*run_recbole_mm writes"):
        load(FILE)


def test_what_identifies_settings_is_what_changes_a_result():
    settings = {"hidden_size": 64, "seed": 1, "gpu_id": "0", "knockout": None}
    same = settings_hash("SASRec", {"knockout": "text:noise", "gpu_id": "1", "seed": 2, "hidden_size": 64})
    assert settings_hash("SASRec", settings) == same and len(same) == 12
    assert settings_hash("GRU4Rec", settings) != same != settings_hash("SASRec", {**settings, "hidden_size": 32})
    for trim, as_before in (("none", True), ("evaluation", True), ("all", False)):  # in training, other random numbers
        assert (settings_hash("SASRec", {**settings, "trim_histories": trim}) == same) == as_before


# ------------------------------------------------ values of single test rows


def some_rows(n: int = 50) -> PerUser:
    random = np.random.default_rng(0)
    user = np.array([f"ü{n}" for n in range(n)], dtype=object)
    values = {"recall@5": random.random(n), "mrr@5": random.random(n)}
    return PerUser(user, np.array([f"i{n % 7}" for n in range(n)]), random.integers(1, 99, n), values)


def test_values_of_single_rows_come_back_as_they_were():
    path, rows = records.per_user_file(FILE, "abc"), some_rows()
    write_per_user(path, rows)
    found = read_per_user(path)
    assert path == Path("results/per_user/abc.npz") and [*path.parent.iterdir()] == [path]
    for before, after in ((rows.user, found.user), (rows.target, found.target), (rows.rank, found.rank)):
        assert before.tolist() == after.tolist()
    assert list(found.values) == list(rows.values)
    assert all((found.values[name] == values).all() for name, values in rows.values.items())


def test_rows_without_metrics_of_their_own_keep_their_ranks():
    write_per_user(Path("x.npz"), some_rows()._replace(values={}))
    assert read_per_user(Path("x.npz")).values == {} and len(read_per_user(Path("x.npz")).rank) == 50


def test_broken_files_of_single_rows_are_one_clear_error():
    path = Path("x.npz")
    write_per_user(path, some_rows())
    whole, random = path.read_bytes(), np.random.default_rng(0)
    broken = [whole[:length] for length in (0, 1, 100, len(whole) // 2, len(whole) - 1)] + [b"x" * 500]
    for _ in range(40):
        spoiled = bytearray(whole)
        spoiled[random.integers(30, len(whole))] ^= 0xFF
        broken.append(bytes(spoiled))
    n_refused = 0
    for content in broken:
        path.write_bytes(content)
        try:
            found = read_per_user(path)  # a byte that says nothing of the content, such as a date
            assert found.user.tolist() == some_rows().user.tolist()
        except DatasetError as error:
            n_refused += 1
            assert "cannot read the values of single users in x.npz" in str(error) and "run again" in str(error)
    assert n_refused > 20


def test_files_that_hold_something_else_are_refused():
    path, rows = Path("x.npz"), some_rows(3)
    columns = {"user": rows.user.astype(str), "target": rows.target, "rank": rows.rank, "metrics": np.array(["a"])}
    for values in (np.zeros((1, 2)), np.zeros((2, 3)), np.zeros(3), np.full((1, 3), "x")):
        np.savez(path, **columns, values=values)
        with pytest.raises(DatasetError, match="x.npz: .*(values of|expected numbers)"):
            read_per_user(path)
    np.savez(path, **{**columns, "user": rows.user}, values=np.zeros((1, 3)))  # a pickle
    with pytest.raises(DatasetError, match="allow_pickle"):
        read_per_user(path)
    np.save("y.npy", np.zeros(3))
    for name in ("y.npy", "absent.npz"):
        with pytest.raises(DatasetError, match=f"cannot read the values of single users in {name}"):
            read_per_user(Path(name))
