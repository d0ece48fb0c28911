"""Search of hyper-parameters: what is refused, equal budgets, resumption, and that no trial knows the test set."""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from conftest import TINY, write_planted

import run_recbole_mm
from recbole_mm import records, runner
from recbole_mm.errors import SettingError, TrainingError
from recbole_mm.plan import make_plan
from recbole_mm.records import RunRecord
from recbole_mm.search import SearchResult, search, search_for
from recbole_mm.search_space import KINDS, Dimension, read_space, space_hash

pytest.importorskip("optuna")

SETTINGS = {**TINY, "epochs": 1}
SETTINGS_OF_RECBOLE = {key: value for key, value in SETTINGS.items() if key != "inner_size"}
FOR_ALL = {key: TINY[key] for key in ("topk", "valid_metric", "show_progress", "use_gpu")}
SMALL = """\
learning_rate: {log: [1.0e-4, 1.0e-2]}
hidden_dropout_prob: {choice: [0.1, 0.3, 0.5]}
MSM4SR:
  temperature: {uniform: [0.05, 0.2]}
  n_experts: {int: [1, 4]}
"""


def space_file(text: str = SMALL) -> Path:
    path = Path("space.yaml")
    path.write_text(text)
    return path


def record_of(job, valid: dict[str, float], **others) -> RunRecord:
    return RunRecord(
        model=job.model, dataset=job.dataset, data_fingerprint="0", features={}, settings=job.settings, seed=job.seed,
        best_epoch=0, valid=valid, test={}, stages=[], seconds={"train": 2.0}, peak_memory={}, versions={},
        checkpoint="", started="", **others,
    )  # fmt: skip


def _score(job) -> float:
    return 1 - abs(math.log10(job.settings.get("learning_rate", 0.001) / 0.0006)) / 10


@pytest.fixture
def trained(monkeypatch) -> list:
    """Jobs that were asked for; each has a score at once, best at a learning rate of 0.0006."""
    jobs = []

    def execute(asked, *, n_jobs, runs_file, on_done):
        for position, job in enumerate(asked):
            jobs.append(job)
            on_done(position, record_of(job, {"recall@10": _score(job)}))

    monkeypatch.setattr(runner, "execute", execute)
    return jobs


@pytest.fixture
def in_this_process(monkeypatch) -> list:
    """Trials run, one after the other, without processes of their own."""
    from recbole_mm import quick_start

    jobs = []

    def execute(asked, *, n_jobs, runs_file, on_done):
        for position, job in enumerate(asked):
            jobs.append(job)
            on_done(
                position,
                quick_start.run(
                    job.model, job.dataset, settings=job.all_settings(), runs_file=runs_file, tested=job.tested
                ),
            )

    monkeypatch.setattr(runner, "execute", execute)
    return jobs


# ------------------------------------------------ the space


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: 0.1", r"space.yaml, line 1: learning_rate must be one of .*, found 0.1"),
        ("\nlearning_rate: {chioce: [0.1]}", r"line 2: learning_rate has no kind 'chioce'; did you mean 'choice'"),
        ("learning_rate: {log: 0.1}", r"line 1: learning_rate: log takes a list, found 0.1"),
        ("learning_rate: {log: [0.1]}", r"learning_rate: log takes two numbers, the lowest and the highest"),
        ("learning_rate: {log: [0.1, .inf]}", r"learning_rate: log takes two numbers"),
        ("n_layers: {int: [1, 2.5]}", r"n_layers: int takes two whole numbers"),
        ("n_layers: {int: [true, 3]}", r"n_layers: int takes two whole numbers"),
        ("learning_rate: {uniform: [0.2, 0.1]}", r"the lowest value 0.2 must be below the highest, found 0.1"),
        ("learning_rate: {log: [0, 0.1]}", r"log takes numbers above 0, found 0.0"),
        ("learning_rate: {choice: []}", r"the choices must be at least one and all different"),
        ("learning_rate: {choice: [0.1, 0.1]}", r"the choices must be at least one and all different"),
        ("learning_rate: {log: [1, 2], int: [1, 2]}", r"learning_rate must be one of"),
        ("n_heads: {int: [1, 2]}\nn_heads: {int: [1, 4]}", r"space.yaml, line 2: n_heads stands in line 1 too"),
        ("MSM4RS:\n  n_heads: {int: [1, 2]}", r"space.yaml: .*no model 'MSM4RS'; did you mean 'MSM4SR'"),
        ("MSM4SR:\n  n_heads: {ent: [1, 2]}", r"line 2: n_heads has no kind 'ent'; did you mean 'int'"),
        (
            "MSM4SR:\n  n_heads: {int: [1, 2]}\nMP4SR:\n  n_layers: {int: [1, 2]}",
            r"space.yaml has two sections for MSM4SR",
        ),
        ("MSM4SR:", r"space.yaml, line 1: MSM4SR must be one of"),
        ("MSM4SR: {}", r"space.yaml names no setting to search"),
        ("", r"space.yaml names no setting to search"),
        ("- 1", r"space.yaml must hold lines like"),
        ("a: [", r"space.yaml is no plain YAML"),
    ],
)
def test_a_wrong_space_is_refused_with_its_line(text, message):
    with pytest.raises(SettingError, match=message):
        read_space(space_file(text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: {log: [0.001, 0.1]}", r"unknown setting 'learning_rat' \(from space.yaml, line 1\); did you"),
        ("MSM4SR:\n  n_pivots: {int: [1, 2]}", r"unknown setting 'n_pivots' \(from space.yaml, line 2\)"),
        ("temperature: {uniform: [0.0, 0.2]}", r"temperature must be > 0, found 0.0 \(from space.yaml, line 1\)"),
        ("mixup_max: {uniform: [0.1, 0.6]}", r"mixup_max must be in \[0, 0.5\], found 0.6 \(from space.yaml, line 1\)"),
        ("hidden_act: {choice: [gelu, rleu]}", r"hidden_act must be one of gelu.*'rleu' \(from space.yaml.*'relu'"),
        ("n_layers: {int: [0, 2]}", r"n_layers must be at least 1, found 0 \(from space.yaml, line 1\)"),
        ("n_layers: {uniform: [1, 2]}", r"line 1: n_layers is int, such as 2; search it with choice or int"),
        ("use_mixup: {int: [0, 1]}", r"use_mixup is bool, such as True; search it with choice"),
        ("learning_rate: {int: [1, 2]}", r"is float, such as 0.001; search it with choice or uniform or log"),
        ("train_neg_sample_args: {choice: [1]}", r"space.yaml, line 1: .*train_neg_sample_args"),
    ],
)  # fmt: skip
def test_what_a_model_does_not_take_is_refused_before_anything_runs(planted, trained, text, message):
    with pytest.raises(SettingError, match=message):
        search("MSM4SR", "planted", space_file(text), settings=SETTINGS)
    assert trained == [] and not Path("results").exists()


@pytest.mark.parametrize("key", ["seed", "topk", "valid_metric", "eval_args", "knockout", "item_inter_num_interval"])
def test_what_decides_what_is_measured_cannot_be_searched(planted, trained, key):
    with pytest.raises(SettingError, match=f"line 1: {key} says what is measured"):
        search("MSM4SR", "planted", space_file(f"{key}: {{choice: [1, 2]}}"), settings=SETTINGS)
    assert trained == []


def test_a_wrong_section_is_refused_before_another_model_trains(planted, trained):
    jobs = make_plan(["SASRec", "MSM4SR"], ["planted"], settings=SETTINGS, tell=str)
    space = read_space(space_file("learning_rate: {log: [0.001, 0.1]}\nMSM4SR:\n  n_heads: {int: [0, 2]}"))
    with pytest.raises(SettingError, match=r"n_heads must be at least 1, found 0 \(from space.yaml, line 3\)"):
        search_for(jobs, space)
    assert trained == []


def test_budgets_that_are_none_are_refused(planted, trained):
    with pytest.raises(SettingError, match="at least 1 trial, found 0"):
        search("MSM4SR", "planted", space_file(), n_trials=0, settings=SETTINGS)
    with pytest.raises(SettingError, match="seconds of a search must be above 0, found 0"):
        search("MSM4SR", "planted", space_file(), seconds=0, settings=SETTINGS)


def test_without_optuna_the_message_says_how_to_install_it(planted, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(SettingError, match=r'pip install "recbole_mm\[tune\]"'):
        search("MSM4SR", "planted", space_file(), settings=SETTINGS)


def test_the_hash_of_a_space_knows_what_is_searched_and_neither_order_nor_place():
    def hash_of(text: str) -> str:
        return space_hash(read_space(space_file(text)).shared)

    first = hash_of("n_heads: {int: [1, 2]}\nn_layers: {int: [1, 3]}")
    assert hash_of("# a comment\nn_layers: {int: [1, 3]}\nn_heads: {int: [1, 2]}") == first
    assert hash_of("n_heads: {int: [1, 2]}\nn_layers: {int: [1, 4]}") != first
    assert hash_of("n_heads: {choice: [1, 2]}\nn_layers: {int: [1, 3]}") != first


def test_choices_keep_their_type_on_the_way_through_optuna():
    values = (True, 1, 1.0, "1", None, [64, 32], {"a": 1})
    dimension = Dimension("key", "choice", values, "space.yaml, line 1")
    stored = dimension.distribution().choices
    assert len(set(stored)) == len(values)
    assert [repr(dimension.value_of(each)) for each in stored] == [repr(value) for value in values]


def test_the_example_is_a_space_of_the_models_that_it_names(planted, trained):
    from recbole_mm.paths import properties_dir

    space = read_space(properties_dir() / "search" / "example.yaml")
    jobs = make_plan(["SASRec", "GRU4Rec", *space.models], ["planted"], settings=FOR_ALL, tell=str)
    search_for(jobs, space, n_trials=2)
    searched = {job.model: job.settings.keys() - FOR_ALL.keys() - {"checkpoint_dir", "state"} for job in trained}
    assert searched["SASRec"] == {"learning_rate", "weight_decay", "hidden_dropout_prob"}
    assert searched["GRU4Rec"] == {"learning_rate", "weight_decay", "dropout_prob"}
    assert all(searched[model] >= dimensions.keys() for model, dimensions in space.models.items())
    kinds = {each.kind for part in (space.shared, *space.models.values()) for each in part.values()}
    assert kinds == set(KINDS) and {"MSM4SR", "MMSBR"} <= space.models.keys()


# ------------------------------------------------ the search


def test_every_model_has_the_same_number_of_trials_and_the_first_changes_nothing(planted, trained):
    jobs = make_plan(["SASRec", "MSM4SR"], ["planted"], seeds=[1, 2], settings=SETTINGS, tell=str)
    found = search_for(jobs, read_space(space_file()), n_trials=4)
    for model in ("SASRec", "MSM4SR"):
        trials = [job for job in trained if job.model == model]
        assert len(trials) == 4 and {job.seed for job in trials} == {1}
        assert "learning_rate" not in trials[0].settings and "temperature" not in trials[0].settings
        assert all(("temperature" in job.settings) == (model == "MSM4SR") for job in trials[1:])
        assert all(1e-4 <= job.settings["learning_rate"] <= 1e-2 for job in trials[1:])
    assert [(job.model, job.seed) for job in found] == [(job.model, job.seed) for job in jobs]
    assert {job.budget["trials"] for job in found} == {4}
    assert found[0].settings == found[1].settings and found[0].budget == found[1].budget
    best = max((job for job in trained if job.model == "SASRec"), key=_score)
    assert found[0].settings.get("learning_rate") == best.settings.get("learning_rate")
    assert set(found[0].budget) >= {"trials", "seconds", "space_hash", "sampler", "best_valid"}
    assert found[0].budget["seconds"] == 8.0 and "TPE" in found[0].budget["sampler"]


def test_knock_outs_get_the_settings_of_the_whole_model_and_count_no_trials(planted, trained):
    jobs = make_plan(["MSM4SR"], ["planted"], knockouts="auto", settings=SETTINGS, tell=str)
    found = search_for(jobs, read_space(space_file()), n_trials=3)
    assert len(trained) == 3 and {job.knockout for job in trained} == {None}
    assert {job.knockout for job in found} == {None, "image:noise", "text:noise"}
    assert all(job.settings == found[0].settings for job in found)


def test_the_same_seed_proposes_the_same_and_another_seed_something_else(planted, trained):
    def proposals(seed: int, runs_file: str) -> list[dict]:
        trained.clear()
        search("MSM4SR", "planted", space_file(), n_trials=4, settings={**SETTINGS, "seed": seed}, runs_file=runs_file)
        return [{key: job.settings.get(key) for key in ("learning_rate", "temperature")} for job in trained]

    first = proposals(1, "a/runs.jsonl")
    assert proposals(1, "b/runs.jsonl") == first != proposals(2, "c/runs.jsonl")
    assert len({str(each) for each in first}) == 4


def test_an_interrupted_search_goes_on_to_the_same_trials_within_the_budget(planted, trained, monkeypatch, capsys):
    def run(runs_file: str, n_trials: int) -> SearchResult:
        return search("MSM4SR", "planted", space_file(), n_trials=n_trials, settings=SETTINGS, runs_file=runs_file)

    whole = run("whole/runs.jsonl", 5)
    uninterrupted = [_searched(job) for job in trained]
    trained.clear()
    score = runner.execute

    def interrupted(asked, **others):
        if len(trained) == 3:
            raise KeyboardInterrupt
        score(asked, **others)

    monkeypatch.setattr(runner, "execute", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("parts/runs.jsonl", 5)
    assert "the trials so far are kept" in capsys.readouterr().out
    monkeypatch.setattr(runner, "execute", score)
    (file,) = Path("parts/search").glob("*.log")
    with file.open("a") as log:
        log.write('{"op_code": 4, "wor')  # a write that was cut short
    assert run("parts/runs.jsonl", 5) == whole
    assert [_searched(job) for job in trained] == uninterrupted
    assert run("parts/runs.jsonl", 5) == whole and len(trained) == 5
    assert "5 trials are in" in capsys.readouterr().out


def _searched(job) -> dict:
    keys = ("learning_rate", "hidden_dropout_prob", "temperature", "n_experts")
    return {key: value for key, value in job.settings.items() if key in keys}


def test_a_larger_budget_continues_and_a_smaller_one_looks_at_its_own_trials_only(planted, trained):
    def run(n_trials: int) -> SearchResult:
        return search("MSM4SR", "planted", space_file(), n_trials=n_trials, settings=SETTINGS)

    small = run(2)
    assert run(6).budget["trials"] == 6 and len(trained) == 6
    assert run(2) == small and len(trained) == 6


def test_other_settings_or_other_data_begin_anew(planted, trained):
    for epochs in (1, 2):
        search("MSM4SR", "planted", space_file(), n_trials=2, settings={**SETTINGS, "epochs": epochs})
    assert len(trained) == 4
    write_planted(planted, seed=1)
    search("MSM4SR", "planted", space_file(), n_trials=2, settings={**SETTINGS, "epochs": 1})
    assert len(trained) == 6
    assert len(list(Path("results/search").glob("*.log"))) == 1


def test_failed_trials_count_and_are_told(planted, monkeypatch, capsys):
    asked_for = []

    def execute(asked, *, n_jobs, runs_file, on_done):
        for position, job in enumerate(asked):
            asked_for.append(job)
            failed = len(asked_for) % 2 == 0
            record = record_of(job, {}, status="failed", error="TrainingError: loss NaN")
            on_done(position, record if failed else record_of(job, {"recall@10": 0.5}))

    monkeypatch.setattr(runner, "execute", execute)
    result = search("MSM4SR", "planted", space_file(), n_trials=5, settings=SETTINGS)
    assert len(asked_for) == 5 and (result.budget["trials"], result.budget["failed"]) == (5, 2)
    assert result.settings == {}, "the first of equals wins, which changes nothing"
    assert "trial 2 of 5, failed: TrainingError: loss NaN" in capsys.readouterr().out


def test_when_all_trials_fail_a_single_search_says_so_and_a_plan_keeps_its_settings(planted, monkeypatch, capsys):
    def execute(asked, *, n_jobs, runs_file, on_done):
        for position, job in enumerate(asked):
            on_done(position, record_of(job, {}, status="failed", error="out of memory"))

    monkeypatch.setattr(runner, "execute", execute)
    with pytest.raises(TrainingError, match="all 2 trials of MSM4SR on planted failed"):
        search("MSM4SR", "planted", space_file(), n_trials=2, settings=SETTINGS)
    jobs = make_plan(["MSM4SR"], ["planted"], settings=SETTINGS, tell=str)
    (job,) = search_for(jobs, read_space(space_file()), n_trials=2)
    assert job.settings == jobs[0].settings and job.budget["failed"] == 2
    assert "all trials failed; to try them again" in capsys.readouterr().out


def test_no_trial_begins_after_the_seconds(planted, trained, capsys):
    result = search("MSM4SR", "planted", space_file(), n_trials=20, seconds=5, settings=SETTINGS)
    assert len(trained) == 3 and result.budget["seconds"] == 6.0  # 2 seconds each
    assert "6 s are spent, no further trial" in capsys.readouterr().out


def test_a_small_space_is_tried_once_each_and_no_more(planted, trained, capsys):
    text = "n_layers: {int: [1, 2]}\nhidden_dropout_prob: {choice: [0.1, 0.2]}"
    result = search("MSM4SR", "planted", space_file(text), n_trials=20, settings=SETTINGS)
    tried = [(job.settings.get("n_layers", 2), job.settings.get("hidden_dropout_prob", 0.2)) for job in trained]
    assert sorted(tried) == [(1, 0.1), (1, 0.2), (2, 0.1), (2, 0.2)] and result.budget["trials"] == 4
    assert "every setting of the space has been tried" in capsys.readouterr().out


def test_models_that_count_are_not_searched_by_how_others_learn(planted, trained, capsys):
    jobs = make_plan(["Transitions"], ["planted"], tell=str)
    (job,) = search_for(jobs, read_space(space_file()), n_trials=4)
    assert trained == [] and job.settings == jobs[0].settings and job.budget == {}
    assert "nothing to search" in capsys.readouterr().out


def test_two_searches_do_not_spend_one_budget_twice(planted, trained, monkeypatch):
    search("MSM4SR", "planted", space_file(), n_trials=1, settings=SETTINGS)
    (file,) = Path("results/search").glob("*.log")
    code = f"""
        import sys
        from filelock import FileLock
        with FileLock({str(file.with_name(f".{file.name}.busy"))!r}):
            print("held", flush=True)
            sys.stdin.read()
    """
    other = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(SettingError, match="another search writes results/search/planted-MSM4SR-"):
            search("MSM4SR", "planted", space_file(), n_trials=2, settings=SETTINGS)
    finally:
        other.communicate()
    assert search("MSM4SR", "planted", space_file(), n_trials=2, settings=SETTINGS).budget["trials"] == 2


def test_a_file_that_holds_no_trials_is_named(planted, trained):
    search("MSM4SR", "planted", space_file(), n_trials=1, settings=SETTINGS)
    (file,) = Path("results/search").glob("*.log")
    file.write_text('[1]\n"x"\n')
    with pytest.raises(SettingError, match="is no file of trials .* move it away"):
        search("MSM4SR", "planted", space_file(), n_trials=2, settings=SETTINGS)


# ------------------------------------------------ the test set


def test_no_trial_evaluates_the_test_set(planted, in_this_process, monkeypatch):
    from recbole_mm import quick_start
    from recbole_mm.trainer import Trainer

    tested = []
    evaluate = Trainer.evaluate

    def watched(self, eval_data, load_best_model=True, *others, **named):
        tested.append(load_best_model)
        return evaluate(self, eval_data, load_best_model, *others, **named)

    def refuse(*others, **named):
        raise AssertionError("a trial was tested")

    monkeypatch.setattr(Trainer, "evaluate", watched)
    monkeypatch.setattr(quick_start, "evaluate_test", refuse)
    search("SASRec", "planted", space_file(), n_trials=1, settings=SETTINGS_OF_RECBOLE)
    assert len(in_this_process) == 1 and tested and True not in tested
    assert not Path("results/runs.jsonl").exists() and not list(Path("saved").glob("*"))
    with pytest.raises(AssertionError, match="a trial was tested"):  # the guard sees a test where there is one
        quick_start.run("SASRec", "planted", settings=SETTINGS_OF_RECBOLE)


def test_what_is_tested_changes_no_trial(planted, in_this_process):
    import optuna

    def score(runs_file: str) -> float:
        search("SASRec", "planted", space_file(), n_trials=1, settings=SETTINGS_OF_RECBOLE, runs_file=runs_file)
        (file,) = (Path(runs_file).parent / "search").glob("*.log")
        storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(file)))
        return optuna.load_study(study_name=None, storage=storage).trials[0].value

    before = score("a/runs.jsonl")
    path = planted / "planted.inter"
    header, *lines = path.read_text().splitlines()
    rows = [line.split("\t") for line in lines]
    # The newest items of users behind all items' first rows, which number the items, change places.
    last = [row for row, after in zip(rows, [*rows[1:], [None]], strict=True) if row[0] != after[0]][30:]
    items = [row[1] for row in last]
    for row, item in zip(last, [*items[1:], items[0]], strict=True):
        row[1] = item
    changed = "\n".join([header, *("\t".join(row) for row in rows)]) + "\n"
    assert changed != path.read_text()
    path.write_text(changed)
    assert score("b/runs.jsonl") == before


@pytest.mark.slow
def test_the_command_searches_and_then_runs_the_best_settings(planted, capsys):
    settings = [f"--{key}={value}" for key, value in SETTINGS_OF_RECBOLE.items() if key != "topk"]
    command = ["--model=SASRec", "--dataset=planted", f"--search={space_file()}", "--trials=2", "--seeds=1", *settings]
    assert run_recbole_mm.main([*command, "--topk=[5,10]"]) == 0
    (record,) = records.load(Path("results/runs.jsonl")).records
    assert record.seed == 1 and record.budget["trials"] == 2 and record.test
    assert record.valid["recall@10"] == record.budget["best_valid"], "the best trial, run again with its seed"
    assert run_recbole_mm.main([*command, "--topk=[5,10]"]) == 0
    assert len(records.load(Path("results/runs.jsonl")).records) == 1
    assert "1 of them done already" in capsys.readouterr().out


def test_that_trials_run_on_this_machine_is_told_where_a_cluster_is_asked_for(planted, trained, monkeypatch, capsys):
    monkeypatch.setattr("recbole_mm.product.execute", lambda jobs, **more: [])
    command = ["--model=Popularity", "--dataset=planted", f"--search={space_file()}", "--topk=[5,10]", "--cluster=ray"]
    assert run_recbole_mm.main([*command, "--valid_metric=Recall@10"]) == 0
    assert "the trials of the search run on this machine; the cluster gets the runs" in capsys.readouterr().out


def test_options_of_a_search_need_a_space(planted, capsys):
    assert run_recbole_mm.main(["--model=SASRec", "--dataset=planted", "--trials=3"]) == 2
    assert "--trials and --search-seconds belong to --search=FILE" in capsys.readouterr().err
    assert run_recbole_mm.main(["--model=SASRec", "--dataset=planted", "--search=none.yaml"]) == 2
    assert "cannot read the settings file none.yaml" in capsys.readouterr().err
