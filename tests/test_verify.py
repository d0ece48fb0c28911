"""Repeating a recorded run: the same again, a changed record, changed data, runs without a result."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import TINY, write_planted

from recbole_mm import verify
from recbole_mm.errors import DatasetError, SettingError
from recbole_mm.quick_start import run
from recbole_mm.records import append, load
from recbole_mm.verify import find_run, main

SETTINGS = {**TINY, "epochs": 1}
RUNS = Path("results/runs.jsonl")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    """A folder with a dataset, a run of MSM4SR and its record, made once; tests work on copies."""
    folder = tmp_path_factory.mktemp("recorded")
    write_planted(folder / "dataset" / "planted")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run("MSM4SR", "planted", settings={**SETTINGS, "seed": 3, "knockout": "image:noise"}, run_id="abcdef012345")
    return folder


@pytest.fixture
def here(recorded, tmp_path) -> Path:
    """A copy of it, in the test's own working directory."""
    shutil.copytree(recorded, tmp_path, dirs_exist_ok=True)
    return tmp_path


def change(**values) -> None:
    """Write another value into the only record."""
    content = json.loads(RUNS.read_text())
    RUNS.write_text(json.dumps(content | values) + "\n")


@pytest.fixture
def comes_out_again(here, monkeypatch) -> None:
    """The repetition gives what was recorded, without training."""
    record = find_run("abcdef", RUNS)
    monkeypatch.setattr("recbole_mm.quick_start.run", lambda *given, **named: record)


def test_a_run_comes_out_again_exactly_and_adds_no_record(here, capsys):
    lines = RUNS.read_text()
    assert main(["abcdef", "--tolerance=0"]) == 0
    out = capsys.readouterr().out
    assert "verified: MSM4SR on planted, seed 3, knocked out image:noise, run abcdef012345 comes out again" in out
    assert "recall@10" in out and "+0.000000" in out and "NO" not in out
    assert RUNS.read_text() == lines and len(list(Path("saved").glob("*"))) == len(list((here / "saved").glob("*")))


@pytest.mark.parametrize("part", ["test", "valid"])
def test_a_record_with_another_metric_is_found_out(here, comes_out_again, capsys, part):
    metrics = json.loads(RUNS.read_text())[part]
    change(**{part: metrics | {"recall@10": metrics["recall@10"] + 0.01}})
    assert main(["abcdef"]) == 1
    out = capsys.readouterr().out
    assert "NOT verified" in out and "-0.010000" in out and out.count("  NO") == 1
    if part == "test":
        assert "the record contradicts itself: recall@10" in out
        return
    assert main(["abcdef", "--tolerance=0.02"]) == 0


def test_a_metric_that_only_the_record_has_is_not_within(here, comes_out_again, capsys):
    change(test=json.loads(RUNS.read_text())["test"] | {"recall@99": 0.5})
    assert main(["abcdef", "--tolerance=1"]) == 1
    assert "none" in capsys.readouterr().out


def test_changed_interactions_are_refused_before_training(here, capsys, monkeypatch):
    write_planted(here / "dataset" / "planted", seed=1)
    monkeypatch.setattr("recbole_mm.quick_start.run", None)
    assert main(["abcdef"]) == 3
    err = capsys.readouterr().err
    assert "cannot verify run abcdef012345" in err and "the interactions" in err and "--data-path" in err
    assert "the feature text" in err


def test_only_what_the_run_used_must_be_the_same(here):
    record = find_run("abcdef", RUNS)
    verify._check_data(record, here / "dataset" / "planted")
    items = here / "dataset" / "planted" / "planted.item"
    items.write_text(items.read_text().replace("thing", "object"))
    verify._check_data(record, here / "dataset" / "planted")  # MSM4SR reads features, and not the item file
    with_fields = replace(record, settings=record.settings | {"field_hashes": {"price": "1"}})
    with pytest.raises(DatasetError, match="the item file"):
        verify._check_data(with_fields, here / "dataset" / "planted")
    without_text = replace(record, features=record.features | {"sound": "f" * 64})
    with pytest.raises(DatasetError, match="the feature sound: ffffffffffff then, gone now"):
        verify._check_data(without_text, here / "dataset" / "planted")


def test_other_test_rows_cannot_be_compared(here):
    record = find_run("abcdef", RUNS)
    verify._check_rows(record, record)
    verify._check_rows(replace(record, test_fingerprint="", n_test=0), record)  # a record of an earlier release
    with pytest.raises(DatasetError, match="not the same: the test rows and candidates"):
        verify._check_rows(record, replace(record, test_fingerprint="0" * 16))
    with pytest.raises(DatasetError, match=r"the number of test rows \(60, now 59\)"):
        verify._check_rows(record, replace(record, n_test=59))


def test_a_feature_that_came_to_the_folder_later_is_told_and_refused_when_it_is_used(here):
    record = find_run("abcdef", RUNS)
    inputs = {name: digest for name, digest in record.settings["inputs"].items() if name != "text"}
    features = {name: digest for name, digest in record.features.items() if name != "text"}
    without = replace(record, settings=record.settings | {"inputs": inputs}, features=features)
    _, notes = verify._settings_of(without, here / "dataset" / "planted")
    assert notes == ["not there when the run was made, and used now if the model can: the feature text"]
    with pytest.raises(DatasetError, match=r"the features \(\['image'\], now \['image', 'text'\]\)"):
        verify._check_rows(without, record)


def test_a_moved_folder_is_found_with_data_path(here, capsys):
    (here / "dataset").rename(here / "elsewhere")
    assert main(["abcdef"]) == 3
    assert "--data-path=FOLDER" in capsys.readouterr().err
    record = find_run("abcdef", RUNS)
    folder = verify._folder_of(record, "elsewhere")
    assert folder == Path("elsewhere/planted")
    settings, notes = verify._settings_of(record, folder)
    assert settings["data_path"] == "elsewhere" and notes == []


def test_other_versions_are_told(here):
    record = find_run("abcdef", RUNS)
    assert verify._versions(record) == []
    older = replace(record, versions=record.versions | {"torch": "1.0", "gone": "2"})
    notes = verify._versions(older)
    assert any(note.startswith("not the same version: torch 1.0 then, ") for note in notes)
    assert "not the same version: gone 2 then, none now" in notes
    elsewhere = replace(record, peak_memory={"resident": 1} if "gpu" in record.peak_memory else {"gpu": 1})
    assert verify._versions(elsewhere)[0].startswith("not the same kind of machine: with")


def test_a_default_that_has_changed_since_is_told_and_the_recorded_value_is_used(here):
    record = find_run("abcdef", RUNS)
    folder = here / "dataset" / "planted"
    assert verify._settings_of(record, folder)[1] == []
    older = replace(record, settings=record.settings | {"learning_rate": 0.5}, settings_hash="0" * 12)
    settings, notes = verify._settings_of(older, folder)
    assert notes == ["not the default any more: learning_rate is 0.5 as recorded, the default is 0.001 now"]
    assert settings["learning_rate"] == 0.5
    assert settings["pretrain_learning_rate"] == record.settings["pretrain_learning_rate"], "which 0.5 would replace"
    assert (settings["seed"], settings["knockout"]) == (3, "image:noise")


def test_a_fine_tuning_needs_its_checkpoint(here):
    record = find_run("abcdef", RUNS)
    tuned = replace(record, settings=record.settings | {"pretrained_path": "saved/gone.pth"})
    with pytest.raises(SettingError, match="was fine-tuned from saved/gone.pth, which is not there"):
        verify._settings_of(tuned, here / "dataset" / "planted")


def test_failed_runs_and_runs_without_a_test_have_nothing_to_verify(here, capsys):
    change(status="failed", error="out of memory", test={})
    assert main(["abcdef"]) == 2
    assert "the run abcdef012345 failed, and has no result to verify: out of memory" in capsys.readouterr().err
    change(status="done", error="")
    assert main(["abcdef"]) == 2
    assert "has no test metrics" in capsys.readouterr().err


def test_a_run_is_found_by_id_beginning_line_or_as_the_last(here):
    record = find_run("abcdef", RUNS)
    for number, run_id in enumerate(("abc000000000", "123456789012", "")):
        append(replace(record, run_id=run_id, seed=number), RUNS)
    assert find_run("abcdef012345", RUNS) == record
    assert find_run("12", RUNS).seed == 1 and find_run("line:2", RUNS).seed == 0 and find_run("last", RUNS).seed == 2
    with pytest.raises(SettingError, match="'abc' stands for 2 runs of .*\n.*the last of them:\n.*abcdef012345"):
        find_run("abc", RUNS)
    for unknown in ("zzz", "", "line:9", "line:0", "line:x"):
        with pytest.raises(SettingError, match=r"no run '.*' in results/runs.jsonl.*\n  the last ones:\n"):
            find_run(unknown, RUNS)
    with pytest.raises(SettingError, match="did you mean 'abcdef012345'"):
        find_run("abcdef012354", RUNS)


def test_broken_lines_are_told_and_lines_are_then_not_counted(here):
    with RUNS.open("a") as file:
        file.write("{\n")
    told = []
    assert find_run("abcdef", RUNS, tell=told.append).run_id == "abcdef012345"
    assert len(told) == 1 and "line 2 is no record" in told[0]
    with pytest.raises(SettingError, match="cannot be counted"):
        find_run("line:1", RUNS, tell=told.append)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device", "saved/x.pth"), "saved/x.pth: No space left on device"),
        (OSError("cannot do this"), "cannot do this"),
        (MemoryError(), "out of memory"),
    ],
)
def test_a_machine_that_gives_up_is_no_traceback(here, monkeypatch, capsys, error, message):
    def fail(*given, **named):
        raise error

    monkeypatch.setattr("recbole_mm.quick_start.run", fail)
    assert main(["abcdef"]) == 4
    assert capsys.readouterr().err == f"the machine gave up: {message}\n"


def test_no_file_and_no_runs_are_refused(here, capsys):
    assert main(["abcdef", "--runs-file=none.jsonl"]) == 3
    Path("empty.jsonl").touch()
    assert main(["abcdef", "--runs-file=empty.jsonl"]) == 2
    assert "empty.jsonl has no run to verify" in capsys.readouterr().err
    assert main(["abcdef", "--tolerance=-1"]) == 2
    assert "--tolerance must be at least 0" in capsys.readouterr().err


def test_a_run_of_recbole_s_own_model_comes_out_again(planted):
    own = {key: value for key, value in SETTINGS.items() if key != "inner_size"}
    run("SASRec", str(planted), settings={**own, "topk": [5, 10, 500]})  # cut to fit, as recorded
    assert load(RUNS).records[0].settings["topk"] == [5, 10]
    assert main(["last", "--tolerance=0"]) == 0
