"""Which runs a command stands for, and which of them are done."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, write_planted, write_splits

from recbole_mm.config import Config
from recbole_mm.data.files import read_table, write_table
from recbole_mm.data.layout import write_feature
from recbole_mm.errors import DatasetError, SettingError
from recbole_mm.leaderboard.rows import FLOORS as FLOORS_OF_BOARDS
from recbole_mm.plan import (
    CONTENT_FLOOR,
    FLOORS,
    FLOORS_OF_SESSIONS,
    Job,
    facts_of,
    find_done,
    find_failed,
    knockouts_of,
    make_plan,
)
from recbole_mm.quick_start import command_of, run
from recbole_mm.records import RunRecord
from recbole_mm.settings import parse_arguments

SMALL = {**TINY, "epochs": 1}


def names(plan: list[Job]) -> list[tuple]:
    return [(Path(job.dataset).name, job.model, job.variant, job.knockout, job.seed) for job in plan]


def silent(text: str) -> None:
    pass


@pytest.fixture
def other(tmp_path: Path) -> Path:
    return write_planted(tmp_path / "dataset" / "other", image=False)


# ------------------------------------------------ the product


def test_the_plan_is_the_product_in_an_order_that_stays(planted, other):
    models, datasets, seeds = ["SASRec", "mp4sr"], ["planted", "other"], [7, 3]
    plan = make_plan(models, datasets, seeds=seeds, settings=TINY, tell=silent)
    expected = [(d, m, "", None, s) for d in datasets for m in ("SASRec", "MSM4SR") for s in seeds]
    assert names(plan) == expected
    assert make_plan(models, datasets, seeds=seeds, settings=TINY, tell=silent) == plan


def test_without_seeds_the_setting_counts(planted):
    assert [job.seed for job in make_plan(["SASRec"], ["planted"])] == [2020]
    assert [job.seed for job in make_plan(["SASRec"], ["planted"], settings={"seed": 5})] == [5]


def test_models_and_datasets_may_stand_in_a_file(planted):
    Path("board.yaml").write_text("model: SASRec\ndataset: planted\nseed: 9\n")
    (job,) = make_plan([], [], config_files=["board.yaml"])
    assert (job.model, job.dataset, job.seed, job.settings) == ("SASRec", "planted", 9, {})


def test_the_demo_makes_itself_once(monkeypatch):
    made = []
    monkeypatch.setattr("dataset_prep.demo.make_demo", lambda folder: made.append(write_planted(folder)))
    for _ in range(2):
        (job,) = make_plan(["Popularity"], ["demo"])
    assert job.dataset == "demo" and made == [Path("dataset/demo")]


# ------------------------------------------------ settings


def test_a_section_of_a_file_is_for_its_model(planted):
    Path("board.yaml").write_text("epochs: 5\nMP4SR:\n  epochs: 7\n  n_experts: 2\n")
    plan = make_plan(["MSM4SR", "SASRec", "MSM4SRReleased"], ["planted"], config_files=["board.yaml"])
    assert [job.settings for job in plan] == [
        {"epochs": 7, "n_experts": 2},
        {"epochs": 5},
        {"epochs": 7, "n_experts": 2},  # derives from it
    ]


def test_the_later_file_wins_and_the_command_line_over_all(planted):
    Path("a.yaml").write_text("SASRec:\n  epochs: 7\n  hidden_size: 32\n")
    Path("b.yaml").write_text("epochs: 9\n")
    (job,) = make_plan(["SASRec"], ["planted"], config_files=["a.yaml", "b.yaml"], settings={"hidden_size": 64})
    assert job.settings == {"epochs": 9, "hidden_size": 64}


def test_a_single_run_reads_sections_too(planted):
    Path("board.yaml").write_text("epochs: 5\nMSM4SR: {epochs: 7}\nSASRec: {epochs: 8}\n")
    config = Config("MSM4SR", "planted", ["board.yaml"])
    assert config["epochs"] == 7 and config.origins["epochs"] == "board.yaml"
    assert Config("GRU4Rec", "planted", ["board.yaml"])["epochs"] == 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("MSM4RS: {epochs: 7}", "board.yaml: a section must have the name of a model: no model 'MSM4RS'.*'MSM4SR'"),
        ("MP4SR: {epochs: 7}\nMSM4SR: {epochs: 8}", "board.yaml has two sections for MSM4SR"),
        ("SASRec: {n_experts: 7}", "SASRec: unknown setting 'n_experts' \\(from board.yaml\\)"),
        ("SASRec: {epochs: 0}", "SASRec on planted: epochs must be at least 1"),
    ],
)
def test_a_wrong_section_is_refused(planted, content, message):
    Path("board.yaml").write_text(content)
    with pytest.raises(SettingError, match=message):
        make_plan(["SASRec"], ["planted"], config_files=["board.yaml"])


def test_a_setting_that_some_models_lack_is_left_out_there_and_told(planted):
    told = []
    settings = {"n_experts": 2, "temperature": 0.1, "epochs": 3}
    plan = make_plan(["MSM4SR", "SASRec", "Popularity"], ["planted"], settings=settings, tell=told.append)
    assert [job.settings for job in plan] == [settings, {"epochs": 3}, {}]
    assert told == [
        "left out for Popularity, SASRec, without such a setting: n_experts, temperature",
        "epochs is left out for Popularity: one is enough to count",
    ]


def test_a_setting_that_no_model_has_is_refused(planted):
    origins = {"n_expert": "--n_expert"}
    with pytest.raises(
        SettingError, match="unknown setting 'n_expert' \\(from --n_expert\\); did you mean 'n_experts'"
    ):
        make_plan(["MSM4SR", "SASRec"], ["planted"], settings={"n_expert": 2}, origins=origins)


@pytest.mark.parametrize(
    ("arguments", "more", "message"),
    [
        ((["SASRec", "sasrec"], ["planted"]), {}, "the model SASRec is named twice"),
        ((["MP4SR", "MSM4SR"], ["planted"]), {}, "the model MSM4SR is named twice"),
        ((["SASRec"], ["planted", "planted"]), {}, "the dataset planted is named twice"),
        (
            (["SASRec"], ["planted", "./dataset/planted/"]),
            {},
            "the datasets planted and ./dataset/planted/ are one folder, .*dataset/planted; name it once",
        ),
        ((["SASRec"], ["planted"]), {"seeds": [1, 1]}, "the seed 1 is named twice"),
        ((["SASRec"], []), {}, "which models and datasets"),
        ((["NoModel"], ["planted"]), {}, "no model 'NoModel'"),
        ((["SASRec"], ["planted"]), {"settings": {"learning_rate": -1.0}}, "SASRec on planted: learning_rate must be"),
        (
            (["SASRec"], ["planted"]),
            {"seeds": [1, 2], "settings": {"seed": 3}, "origins": {"seed": "--seed"}},
            "--seed and --seeds are given; name all seeds in --seeds",
        ),
        (
            (["MSM4SR"], ["planted"]),
            {"settings": {"knockout": "text:noise"}},
            "for several runs give --knockouts instead, such as",
        ),
    ],
)
def test_what_cannot_run_is_refused_before_anything_runs(planted, arguments, more, message):
    with pytest.raises(SettingError, match=message):
        make_plan(*arguments, **more)


def test_a_folder_that_is_not_there_is_refused(planted):
    with pytest.raises(DatasetError, match="no dataset folder dataset/plantde; did you mean 'planted'"):
        make_plan(["SASRec"], ["planted", "plantde"])


# ------------------------------------------------ floors and knock-outs


def test_floors_come_after_the_models_and_before_the_knock_outs(planted):
    plan = make_plan(["MSM4SR", "Pop"], ["planted"], seeds=[1, 2], floors=True, knockouts="auto", tell=silent)
    listed = [entry[1:4] for entry in names(plan) if entry[-1] == 1]
    assert listed == [
        ("MSM4SR", "", None),
        ("Popularity", "", None),  # named by the user, so it is not added
        ("Transitions", "", None),
        ("SessionItemKNN", "", None),
        ("ContentKNN", "image", None),
        ("ContentKNN", "text", None),
        ("MSM4SR", "", "text:noise"),
        ("MSM4SR", "", "image:noise"),
    ]
    assert [job.settings["feature"] for job in plan if job.model == "ContentKNN"] == ["image", "image", "text", "text"]


def test_a_board_knows_the_floors_of_a_plan():
    assert {*FLOORS, *FLOORS_OF_SESSIONS, CONTENT_FLOOR} == {*FLOORS_OF_BOARDS}


def test_a_split_folder_has_one_floor_more(splits):
    plan = make_plan(["SASRec"], ["splits"], floors=True, tell=silent)
    assert "SessionPopularity" in [job.model for job in plan]


@pytest.mark.parametrize(
    ("candidates", "counting"), [("cold", []), ("all", ["Popularity", "Transitions", "SessionItemKNN"])]
)
def test_floors_that_refuse_the_protocol_are_left_out_and_told(planted, candidates, counting):
    told, settings = [], {"protocol": "cold-items", "candidates": candidates}
    plan = make_plan(["SASRec"], ["planted"], floors=True, settings=settings, tell=told.append)
    assert [job.model for job in plan] == ["SASRec", *counting, "ContentKNN", "ContentKNN"]
    assert told == (
        []
        if counting
        else [
            "no floors Popularity, Transitions, SessionItemKNN on planted: they count what is bought in training, and "
            "protocol cold-items ranks items alone that training never has"
        ]
    )


def test_a_folder_with_prices_gets_a_floor_and_a_knock_out_for_them(planted):
    path = planted / "planted.item"
    table = read_table(path)
    columns = {f"{name}:{kind}": list(table[name]) for name, kind in table.attrs["types"].items()}
    levels = {"price_level:token": [str(1 + n % 3) for n in range(len(table))], "category:token": ["c"] * len(table)}
    write_table(path, columns | levels)
    plan = make_plan(["MMSBR"], ["planted"], floors=True, knockouts="auto", tell=silent)
    assert [job.knockout for job in plan if job.knockout] == ["text:noise", "image:noise", "price:shuffle"]
    assert [job.variant for job in plan if job.model == "ContentKNN"] == ["image", "text", "price"]


def test_a_knock_out_is_made_of_what_a_model_uses(planted, other):
    def found(model: str, dataset: str, **settings) -> list[str]:
        return knockouts_of(Config(model, dataset, settings=settings))

    assert found("MSM4SR", "planted") == ["text:noise", "image:noise"]
    assert found("MSM4SR", "other") == ["text:noise"]
    assert found("MMSBR", "planted", use_image=False) == ["text:noise"]
    assert found("UniSRec", "planted") == ["text:noise"]
    assert found("UniSRec", "planted", image_feature="image") == ["text:noise", "image:noise"]
    for model in ("SASRec", "Transitions", "ContentKNN"):
        assert found(model, "planted") == []


def test_the_text_with_dropped_words_goes_with_the_text(planted):
    tokens = [f"i{number}" for number in range(100, 130)]
    rows = np.ones((30, 12), dtype=np.float32)
    write_feature(planted, "text_dropped", tokens=tokens, rows=rows, encoder="planted", source="group")
    config = Config("UniSRec", "planted", settings={"dropped_text_feature": "text_dropped", "item_drop_prob": 0.5})
    assert knockouts_of(config) == ["text:noise,dropped_text:noise"]


def test_named_knock_outs_go_to_the_models_that_use_them(planted):
    plan = make_plan(["MSM4SR", "UniSRec", "SASRec"], ["planted"], knockouts="image:noise; text:shuffle", tell=silent)
    assert [(job.model, job.knockout) for job in plan if job.knockout] == [
        ("MSM4SR", "image:noise"),
        ("MSM4SR", "text:shuffle"),
        ("UniSRec", "text:shuffle"),
    ]


@pytest.mark.parametrize(
    ("knockouts", "message"),
    [
        ("image:noise;", '--knockouts: cannot read .image:noise;.; it should look like "image:noise;text:noise"'),
        ("image:noise;image:noise", "each one once"),
        ("image:loud", "no kind 'loud' for image"),
        ("sound:noise", "none of MSM4SR uses sound:noise; --knockouts=auto"),
    ],
)
def test_wrong_knock_outs_are_refused(planted, knockouts, message):
    with pytest.raises(SettingError, match=message):
        make_plan(["MSM4SR"], ["planted"], knockouts=knockouts)


# ------------------------------------------------ what is done already


@pytest.mark.parametrize(("model", "knockout"), [("MSM4SR", "text:noise,image:noise"), ("SASRec", None)])
def test_the_plan_and_the_run_agree_about_identity(planted, model, knockout):
    settings = {**SMALL, "topk": [5, 10, 50]}  # data change these
    job = dataclasses.replace(make_plan([model], ["planted"], settings=settings)[0], knockout=knockout)
    record = run(model, "planted", settings=job.all_settings())
    (facts,) = facts_of([job])
    assert facts.settings_hash == record.settings_hash and facts.data_fingerprint == record.data_fingerprint
    assert facts.given == record.settings_given and facts.inputs == record.settings["inputs"]
    assert done_already(job, [record]) is record


@pytest.mark.parametrize(
    "value",
    ["a b", "it's", "1e-4", "true", "None", "", "~", "00", "a: b", "x #y", "[5,inf)", "ü😀", "text:noise,image:noise"],
)
def test_the_command_of_a_record_says_what_was_given(value):
    given = {"text": value, "listed": [value], "by_name": {"k": value}, "number": 1e-05, "nothing": None, "flag": True}
    words = shlex.split(command_of("SASRec", "my shop", given))
    assert words[:4] == ["python", "run_recbole_mm.py", "--model=SASRec", "--dataset=my shop"]
    settings, _ = parse_arguments(words[4:])
    assert settings == given


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A run of MSM4SR, and its job, in a folder of text alone."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("recorded")
        patch.chdir(folder)
        write_planted(folder / "dataset" / "other", image=False)
        (job,) = make_plan(["MSM4SR"], ["other"], settings={**SMALL, "train_stage": "finetune"})
        return job, run(job.model, job.dataset, settings=job.all_settings(), runs_file=None)


def done_already(job: Job, records: list[RunRecord]) -> RunRecord | None:
    return find_done([job], records)[0]


def test_another_setting_seed_or_knock_out_is_not_done(recorded, other):
    job, record = recorded
    assert done_already(job, [record]) is record
    for change in ({"seed": 1}, {"knockout": "text:noise"}, {"settings": {**job.settings, "epochs": 2}}):
        assert done_already(dataclasses.replace(job, **change), [record]) is None
    quiet = {**job.settings, "state": "warning", "checkpoint_dir": "elsewhere"}  # changes no result
    assert done_already(dataclasses.replace(job, settings=quiet), [record]) is record


def test_what_a_search_found_is_done_when_the_record_tells_its_budget(recorded, other):
    job, record = recorded
    budget = {"trials": 3, "space_hash": "abc", "seconds": 9.0}
    searched, told = dataclasses.replace(job, budget=budget), dataclasses.replace(record, budget=budget)
    assert done_already(searched, [record]) is None  # a default that a search found to be best
    assert done_already(searched, [record, told]) is told and done_already(job, [told]) is told
    assert done_already(dataclasses.replace(searched, budget={**budget, "trials": 4}), [told]) is None


def test_the_newest_of_several_records_counts(recorded, other):
    job, record = recorded
    newer = dataclasses.replace(record, run_id="newer")
    assert done_already(job, [record, newer]) is newer


def test_a_knock_out_is_the_same_in_another_order(recorded, planted, other):
    job, record = recorded
    record = dataclasses.replace(record, settings=record.settings | {"knockout": "text:noise,image:noise"})
    assert done_already(dataclasses.replace(job, knockout="image:noise, text:noise"), [record]) is record


def test_other_interactions_are_run_again(recorded, tmp_path):
    job, record = recorded
    write_planted(tmp_path / "dataset" / "other", image=False, seed=1)
    assert done_already(job, [record]) is None


def test_a_changed_feature_is_run_again(recorded, other):
    job, record = recorded
    tokens = [f"i{number}" for number in range(100, 130)]
    rows = np.random.default_rng(1).normal(size=(30, 12)).astype(np.float32)
    write_feature(other, "text", tokens=tokens, rows=rows, encoder="planted", source="group")
    assert done_already(job, [record]) is None


def test_a_feature_that_came_later_is_run_again_if_the_model_would_use_it(recorded, other):
    job, record = recorded
    tokens = [f"i{number}" for number in range(100, 130)]
    rows = np.ones((30, 12), dtype=np.float32)
    write_feature(other, "sound", tokens=tokens, rows=rows, encoder="planted", source="group")
    assert done_already(job, [record]) is record
    write_feature(other, "image", tokens=tokens, rows=rows, encoder="planted", source="group")
    assert done_already(job, [record]) is None


def test_a_changed_item_file_counts_for_those_who_read_it(recorded, other):
    job, record = recorded
    with open(other / "other.item", "a") as file:
        file.write("new\tthing\tc0 all\t1.0\n")
    assert done_already(job, [record]) is record
    reader = dataclasses.replace(record, settings=record.settings | {"field_hashes": {"price_level": "0" * 64}})
    assert done_already(job, [reader]) is None


def test_a_failed_run_is_not_done(recorded, other):
    job, record = recorded
    failed = dataclasses.replace(record, status="failed", error="out of memory", test={}, valid={})
    assert done_already(job, [failed]) is None
    assert find_failed([job, dataclasses.replace(job, seed=1)], [failed]) == [failed, None]


def test_a_record_without_what_it_read_is_not_trusted(recorded, other):
    job, record = recorded
    settings = {key: value for key, value in record.settings.items() if key != "inputs"}
    assert done_already(job, [dataclasses.replace(record, settings=settings)]) is None


def test_splits_are_identified_by_all_their_files(tmp_path):
    folder = write_splits(tmp_path / "dataset" / "splits")
    (job,) = make_plan(["Popularity"], ["splits"], settings={"topk": [5, 10], "valid_metric": "Recall@10"})
    record = run(job.model, job.dataset, settings=job.all_settings(), runs_file=None)
    assert done_already(job, [record]) is record
    path = folder / "splits.test.inter"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")
    assert done_already(job, [record]) is None
