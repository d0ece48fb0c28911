"""Which runs stand in which table and row, and what is compared with what."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from runs import N_TEST, failed, record, with_rows, write_runs

from recbole_mm.errors import DatasetError, SettingError
from recbole_mm.leaderboard import board
from recbole_mm.records import Records, load, settings_hash


def build(runs: list, folder: Path = Path("results"), **options) -> dict:
    made = board.build(Records(runs, []), results_folder=folder, **{"papers": {}, "n_resamples": 200, **options})
    return json.loads(json.dumps(made.to_dict(), allow_nan=False))


def rows_of(made: dict) -> dict[str, dict]:
    (table,) = made["tables"]
    return {row["name"]: row for row in table["rows"]}


# ------------------------------------------------ tables


@pytest.mark.parametrize("field", ["dataset", "protocol", "data_fingerprint", "test_fingerprint"])
def test_runs_that_cannot_be_compared_stand_in_different_tables(field):
    made = build([record("SASRec"), record("NARM", **{field: "another"})])
    assert [[row["name"] for row in table["rows"]] for table in made["tables"]] in (
        [["SASRec"], ["NARM"]],
        [["NARM"], ["SASRec"]],
    )
    assert len({table["id"] for table in made["tables"]}) == 2


def test_a_table_has_its_names_hashes_and_label():
    (table,) = build([record("SASRec")])["tables"]
    assert table["id"].startswith("shop/leave-one-out/") and len(table["id"].split("/")[2]) == 8
    assert (table["data_fingerprint"], table["test_fingerprint"], table["n_test"], table["n_items"]) == (
        "data",
        "rows",
        N_TEST,
        100,
    )
    assert "leaks" in table["protocol_note"]
    assert table["metrics"] == ["recall@10", "ndcg@10"] and table["main_metric"] == "recall@10"


def test_records_of_an_earlier_release_stand_in_a_table_of_their_own():
    old = record("NARM", run_id="", settings_hash="", protocol="", test_fingerprint="")
    made = build([old, replace(old, seed=2), record("SASRec")])
    assert [[row["name"] for row in table["rows"]] for table in made["tables"]] == [["NARM"], ["SASRec"]]
    table = made["tables"][0]
    assert "earlier release" in table["notes"][0] and table["id"].startswith("shop/unknown/")
    assert table["rows"][0]["seeds"] == [1, 2] and len(set(table["rows"][0]["run_ids"])) == 2


def test_only_the_datasets_and_protocols_that_are_asked_for_are_shown():
    runs = [record("SASRec"), record("SASRec", dataset="books"), record("SASRec", dataset="toys", protocol="time")]
    assert {table["dataset"] for table in build(runs, dataset="books,toys")["tables"]} == {"books", "toys"}
    assert [table["dataset"] for table in build(runs, protocol="time")["tables"]] == ["toys"]
    with pytest.raises(SettingError, match="no run has the dataset boks; did you mean 'books'"):
        build(runs, dataset="boks")


# ------------------------------------------------ rows


def test_a_row_has_mean_and_deviation_over_seeds():
    row = rows_of(build([record("SASRec", 1, 0.4), record("SASRec", 2, 0.6)]))["SASRec"]
    assert row["test"]["recall@10"]["mean"] == pytest.approx(0.5)
    assert row["test"]["recall@10"]["sd"] == pytest.approx(0.1 * math.sqrt(2), rel=1e-5)
    assert row["seeds"] == [1, 2] and row["kind"] == "model"


def test_seeds_that_give_the_same_have_a_deviation_of_exactly_zero():
    rows = rows_of(build([record("Popularity", seed, 0.1) for seed in (1, 2, 3)]))
    assert rows["Popularity"]["test"]["recall@10"] == {"mean": 0.1, "sd": 0.0, "bold": True}


def test_one_seed_has_no_deviation():
    assert rows_of(build([record("SASRec")]))["SASRec"]["test"]["recall@10"]["sd"] is None


def test_of_several_settings_the_best_on_validation_is_shown_whatever_its_test():
    worse = [record("SASRec", seed, 0.4, test={"recall@10": 0.9}, settings={"lr": 1}) for seed in (1, 2)]
    better = [record("SASRec", seed, 0.5, test={"recall@10": 0.3}, settings={"lr": 2}) for seed in (1, 2)]
    row = rows_of(build([*better, *worse]))["SASRec"]
    assert row["test"]["recall@10"]["mean"] == 0.3 and row["n_settings"] == 2


def test_a_validation_metric_that_should_be_small_selects_the_smallest():
    runs = [record("SASRec", 1, value, settings={"lr": value, "valid_metric_bigger": False}) for value in (0.2, 0.4)]
    assert rows_of(build(runs))["SASRec"]["test"]["recall@10"]["mean"] == 0.2


def test_the_same_setting_on_other_features_is_another_setting():
    runs = [record("MSM4SR", seed, 0.4 + seed / 10, features={"text": f"hash{seed}"}) for seed in (1, 2)]
    row = rows_of(build(runs))["MSM4SR"]
    assert row["seeds"] == [2] and row["n_settings"] == 2


def test_rows_with_different_features_of_one_name_are_pointed_out():
    runs = [record("MSM4SR", features={"text": "a" * 64}), record("UniSRec", features={"text": "b" * 64})]
    (table,) = build(runs)["tables"]
    assert table["notes"][:1] == [
        "the feature text is not the same in all rows: aaaaaaaa in MSM4SR; bbbbbbbb in UniSRec"
    ]


def test_a_seed_that_was_run_twice_counts_once_the_newest():
    row = rows_of(build([record("SASRec", 1, 0.4, run_id="a"), record("SASRec", 1, 0.6, run_id="b")]))["SASRec"]
    assert row["run_ids"] == ["b"] and row["warnings"][0] == "seed 1 was run 2 times; the newest counts"


def test_a_row_without_all_seeds_says_so_but_floors_need_only_one():
    runs = [record(model, seed) for model in ("SASRec", "NARM") for seed in (1, 2, 3)]
    runs += [record("GRU4Rec", 1), record("GRU4Rec", 2), record("Transitions", 1)]
    rows = rows_of(build(runs))
    assert rows["GRU4Rec"]["warnings"][0] == "seeds 1, 2 only, where most rows have 1, 2, 3"
    for name in ("SASRec", "Transitions"):
        assert not any("seed" in warning for warning in rows[name]["warnings"])


def test_content_floors_have_a_row_for_each_feature():
    runs = [record("ContentKNN", settings={"feature": feature}) for feature in ("text", "image")]
    rows = rows_of(build([*runs, record("ContentKNN", recall=0.6, settings={"feature": "text", "decay": 0})]))
    assert {name: (row["kind"], row["n_settings"]) for name, row in rows.items()} == {
        "ContentKNN text": ("floor", 2),
        "ContentKNN image": ("floor", 1),
    }


def test_a_training_that_was_cut_off_by_the_limit_is_flagged_except_for_floors():
    runs = [record(model, settings={"epochs": 10}) for model in ("SASRec", "Popularity")]
    rows = rows_of(build([*runs, record("NARM")]))
    assert "training stopped at the maximal epoch, 10, in 1 of 1 runs" in rows["SASRec"]["warnings"][0]
    assert not any("maximal" in w for name in ("Popularity", "NARM") for w in rows[name]["warnings"])


def test_a_pre_training_has_a_limit_of_its_own():
    stages = [{"stage": "pretrain", "epochs": 5, "seconds": 1.0}, {"stage": "finetune", "epochs": 5, "seconds": 2.0}]
    row = rows_of(build([record("MSM4SR", stages=stages, settings={"pretrain_epochs": 5})]))["MSM4SR"]
    assert "pre-training stopped at the maximal epoch, 5" in row["warnings"][0]
    assert row["cost"]["seconds_per_epoch"] == 0.3 and row["cost"]["epochs"] == 10


def test_warnings_of_runs_are_told_with_their_number():
    runs = [record("SASRec", 1, warnings=["12 rows had constant scores"]), record("SASRec", 2)]
    assert rows_of(build(runs))["SASRec"]["warnings"][0] == "12 rows had constant scores (1 of 2 runs)"


def test_costs_budget_and_slices_are_those_of_the_runs():
    slices = [{"popularity": {"head": {"n": 20, "recall@10": value}}} for value in (0.2, 0.4)]
    runs = [record("SASRec", seed, slices=part, budget={"trials": 20}) for seed, part in enumerate(slices)]
    row = rows_of(build(runs))["SASRec"]
    assert row["cost"] == {
        "parameters": 1000, "seconds_per_epoch": 2.0, "train_seconds": 20.0, "epochs": 10.0, "peak_memory": 2**30,
        "peak_memory_gpu": None, "latency_ms": 0.5, "latency_single_ms": 2.0,
    }  # fmt: skip
    assert row["budget"] == {"trials": 20}
    assert row["slices"] == {"popularity": {"head": {"n": 20, "recall@10": pytest.approx(0.3)}}}


def test_numbers_of_papers_stand_in_a_column_of_their_own_and_others_below():
    entry = {"source": "table 3", "note": "another edition", "metrics": {"recall@10": 0.07, "recall@50": 0.2}}
    made = build([record("SASRec")], papers={"Shop": {"SASRec": entry, "VQ-Rec": entry}})
    assert rows_of(made)["SASRec"]["paper"] == {
        "recall@10": {"value": 0.07, "source": "table 3", "note": "another edition"}
    }
    assert [each["name"] for each in made["tables"][0]["reported"]] == ["VQ-Rec"]


def test_every_number_of_papers_has_a_source_and_says_why_it_differs():
    for models in board._read_papers().values():
        for entry in models.values():
            assert entry["source"] and entry["note"] and all(0 < value < 1 for value in entry["metrics"].values())


# ------------------------------------------------ bad input


def test_corrupt_lines_are_reported_by_their_number_and_the_others_are_kept(tmp_path):
    file = write_runs(tmp_path / "runs.jsonl", [record("SASRec", 1), record("NARM", 1)])
    lines = file.read_text().splitlines()
    nan = lines[0].replace('"recall@10": 0.5', '"recall@10": NaN')
    many = lines[0].replace('"stages": [', '"stages": ["x", ')
    file.write_text("\n".join([lines[0], '{"model": ', "[1]", nan, many, lines[1]]) + "\n")
    made = board.build(load(file), results_folder=tmp_path, papers={}).to_dict()
    assert set(rows_of(made)) == {"SASRec", "NARM"}
    assert [problem.split(" is no record")[0] for problem in made["problems"]] == [
        f"runs.jsonl, line {number}" for number in (2, 3, 4, 5)
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf, 10**400])
def test_a_result_that_is_no_finite_number_is_left_out_and_reported(value):
    made = build([record("SASRec"), record("NARM", test={"recall@10": value})])
    assert set(rows_of(made)) == {"SASRec"}
    assert "NARM on shop, seed 1) is left out: recall@10 is no finite number" in made["problems"][0]


def test_a_run_that_is_done_without_a_result_is_reported():
    made = build([record("SASRec"), record("NARM", test={})])
    assert "it is done and has no test result" in made["problems"][0]


def test_a_run_that_stands_in_the_file_twice_counts_once():
    made = build([record("SASRec", run_id="a"), record("SASRec", run_id="a")])
    assert "stands in the file twice" in made["problems"][0] and rows_of(made)["SASRec"]["run_ids"] == ["a"]


@pytest.mark.parametrize(
    ("field", "value"),
    [("command", ["x"]), ("per_user", {}), ("features", {"text": {}}), ("settings", {"knockout": ["text:noise"]}),
     ("stages", [{"curve": 5}]), ("stages", [{"curve": [0.5]}]), ("model", "\ud800")],
)  # fmt: skip
def test_a_line_that_no_view_could_show_is_reported_and_the_others_are_kept(tmp_path, field, value):
    file = write_runs(tmp_path / "runs.jsonl", [record("SASRec"), replace(record("NARM"), **{field: value})])
    found = load(file)
    assert [run.model for run in found.records] == ["SASRec"]
    assert len(found.problems) == 1 and "line 2 is no record of a run" in found.problems[0]


def test_no_usable_run_is_an_error():
    with pytest.raises(DatasetError, match=r"no record of a run can be used: runs\.jsonl, line 1 is no record"):
        board.build(Records([], ["runs.jsonl, line 1 is no record"]), results_folder=Path("."), papers={})
    with pytest.raises(DatasetError, match="no record of a run can be used: the file is empty"):
        build([])


def test_failed_runs_are_listed_unless_they_were_repeated_with_success():
    runs = [failed("NARM", 1), failed("SASRec", 1, run_id="x"), record("SASRec", 1), record("SASRec", 2)]
    (table,) = build(runs)["tables"]
    assert [(run["model"], run["seed"], run["error"]) for run in table["failed"]] == [("NARM", 1, "the loss is nan")]


def test_a_dataset_where_everything_failed_has_a_table_without_rows():
    (table,) = build([failed("NARM")])["tables"]
    assert table["rows"] == [] and len(table["failed"]) == 1 and len(table["sentences"]) == 2


def test_runs_that_are_shown_or_failed_are_told_in_full_the_others_are_not():
    runs = [
        record("SASRec", 1, 0.6, run_id="best", settings={"lr": 1}),
        record("SASRec", 1, 0.4, run_id="other"),
        failed("NARM", run_id="bad"),
    ]
    made = build(runs)
    assert set(made["runs"]) == {"best", "bad"}
    assert made["runs"]["best"]["stages"][0]["curve"] == [{"epoch": 0, "train_loss": 1.5, "valid": 0.1}]


def test_no_path_of_the_machine_is_told():
    command = "python run_recbole_mm.py --model=SASRec --dataset=/home/me/data/shop"
    runs = [
        record(
            "SASRec", command=command, settings_given={"data_path": "/home/me/data"}, warnings=["see /home/me/x.log"]
        ),
        failed("NARM", error="cannot read /home/me/data/shop/shop.inter: gone"),
    ]
    made = build(runs)
    assert "/home" not in json.dumps(made)
    assert made["tables"][0]["failed"][0]["error"] == "cannot read shop.inter: gone"


# ------------------------------------------------ comparisons


def test_rows_are_compared_with_the_baseline_row_by_row(tmp_path):
    base = with_rows(record("SASRec", recall=0.4), tmp_path)
    ours = with_rows(record("MSM4SR", recall=0.8), tmp_path)
    same = with_rows(record("NARM", recall=0.4), tmp_path)
    made = build([base, ours, same], tmp_path)
    rows = rows_of(made)
    assert made["tables"][0]["baseline"] == "SASRec" and rows["SASRec"]["difference"] == {}
    found = rows["MSM4SR"]["difference"]["recall@10"]
    assert found["mean"] == pytest.approx(0.4) and found["low"] > 0.2 and found["p"] < 1e-4
    assert found["p_holm"] == pytest.approx(2 * found["p"], rel=1e-4)  # two rows, one family
    assert rows["NARM"]["difference"]["recall@10"] == {"mean": 0, "low": 0, "high": 0, "p": 1, "p_holm": 1}
    assert [row["name"] for row in made["tables"][0]["rows"]] == ["MSM4SR", "NARM", "SASRec"]


def test_rows_that_cannot_be_told_from_the_best_share_its_bold(tmp_path):
    random = np.random.default_rng(0)
    near = (random.random(N_TEST) < 0.78).astype(float)
    runs = [
        with_rows(record("MSM4SR", recall=0.8), tmp_path),
        with_rows(record("UniSRec"), tmp_path, near),
        with_rows(record("SASRec", recall=0.3), tmp_path),
    ]
    rows = rows_of(build(runs, tmp_path))
    assert {name: row["test"]["recall@10"]["bold"] for name, row in rows.items()} == {
        "MSM4SR": True, "UniSRec": True, "SASRec": False,
    }  # fmt: skip


def test_the_baseline_is_sasrec_or_the_floor_that_is_best_on_validation_or_the_one_asked_for():
    floors = [record("Popularity", recall=0.1), record("Transitions", recall=0.3)]
    runs = [*floors, record("MSM4SR", recall=0.2)]
    assert build(runs)["tables"][0]["baseline"] == "Transitions"
    assert build([*runs, record("SASRec", recall=0.1)])["tables"][0]["baseline"] == "SASRec"
    assert build(runs, baseline="MSM4SR")["tables"][0]["baseline"] == "MSM4SR"
    assert build([record("MSM4SR")])["tables"][0]["baseline"] == ""
    with pytest.raises(SettingError, match="no row is called MSM4S; did you mean 'MSM4SR'"):
        build(runs, baseline="MSM4S")


def test_a_baseline_that_one_table_lacks_is_replaced_there_with_a_note():
    made = build([record("NARM"), record("SASRec", dataset="books")], baseline="NARM")
    notes = {table["dataset"]: (table["baseline"], table["notes"][:1]) for table in made["tables"]}
    assert notes["books"] == ("SASRec", ["NARM was not run here, so differences are to another baseline"])
    assert notes["shop"][0] == "NARM"


def test_another_metric_can_be_the_main_one():
    (table,) = build([record("SASRec")], metric="NDCG@10")["tables"]
    assert table["main_metric"] == "ndcg@10" and table["selected_by"] == "recall@10"
    with pytest.raises(SettingError, match="no run has the metric NDCG@11; did you mean 'ndcg@10'"):
        build([record("SASRec")], metric="NDCG@11")


def test_a_row_without_values_of_single_users_is_not_tested_and_says_why(tmp_path):
    gone = replace(with_rows(record("MSM4SR"), tmp_path), per_user="per_user/none.npz")
    rows = rows_of(build([with_rows(record("SASRec"), tmp_path), gone, record("NARM", run_id="abc")], tmp_path))
    assert rows["MSM4SR"]["difference"] == {} == rows["NARM"]["difference"]
    assert "not tested: cannot read the values of single users in none.npz" in rows["MSM4SR"]["warnings"][0]
    assert rows["NARM"]["warnings"] == ["not tested: run abc has no values of single users"]


def test_values_of_other_test_rows_are_not_compared(tmp_path):
    other = with_rows(record("MSM4SR"), tmp_path, users=[f"v{number}" for number in range(N_TEST)])
    rows = rows_of(build([with_rows(record("SASRec"), tmp_path), other], tmp_path))
    assert "its test rows are not those of SASRec" in rows["MSM4SR"]["warnings"][0]


def test_values_that_do_not_belong_to_the_run_are_not_compared(tmp_path):
    wrong = replace(with_rows(record("MSM4SR"), tmp_path), test={"recall@10": 0.9, "ndcg@10": 0.25})
    rows = rows_of(build([with_rows(record("SASRec"), tmp_path), wrong], tmp_path))
    assert "values of single users give another Recall@10 than its runs" in rows["MSM4SR"]["warnings"][0]


# ------------------------------------------------ knock-outs


def test_a_knock_out_has_the_gap_to_the_row_of_the_same_setting(tmp_path):
    full = [with_rows(record("MSM4SR", seed, 0.8), tmp_path) for seed in (1, 2)]
    text = [with_rows(record("MSM4SR", seed, 0.5, knockout="text:noise"), tmp_path) for seed in (1, 2)]
    image = [with_rows(record("MSM4SR", seed, 0.8, knockout="image:noise"), tmp_path) for seed in (1, 2)]
    made = build([*full, *text, *image], tmp_path)
    rows = rows_of(made)
    row = rows["MSM4SR − text:noise"]
    assert (row["kind"], row["of"], row["knockout"], row["difference"]) == ("knockout", "MSM4SR", "text:noise", {})
    assert row["gap"]["recall@10"]["mean"] == pytest.approx(0.3) and row["gap"]["recall@10"]["p_holm"] < 0.001
    assert not row["test"]["recall@10"]["bold"] and not rows["MSM4SR − image:noise"]["test"]["recall@10"]["bold"]
    assert rows["MSM4SR"]["n_settings"] == 1 and rows["MSM4SR"]["gap"] == {}
    assert made["tables"][0]["sentences"][1].startswith("Replacing the text of MSM4SR by noise costs .3000 Recall@10 (")
    assert made["tables"][0]["sentences"][1].endswith("the pictures bring nothing here that could be measured.")


def test_a_knock_out_of_another_setting_has_no_gap(tmp_path):
    full = with_rows(record("MSM4SR", recall=0.8), tmp_path)
    other = with_rows(record("MSM4SR", recall=0.5, knockout="text:noise", settings={"lr": 1}), tmp_path)
    row = rows_of(build([full, other], tmp_path))["MSM4SR − text:noise"]
    assert row["gap"] == {} and row["of"] is None
    assert "knocked out with other settings or features than the row MSM4SR has" in row["warnings"][0]
    alone = rows_of(build([other], tmp_path))["MSM4SR − text:noise"]
    assert "MSM4SR was not run with the same settings and nothing knocked out" in alone["warnings"][0]


def test_knock_outs_of_settings_that_were_not_selected_are_counted_in_a_note():
    runs = [record("MSM4SR", recall=0.8), record("MSM4SR", recall=0.5, settings={"lr": 1})]
    runs += [record("MSM4SR", knockout="text:noise"), record("MSM4SR", knockout="text:noise", settings={"lr": 1})]
    (table,) = build(runs)["tables"]
    assert (
        table["notes"][0] == "MSM4SR − text:noise: runs with settings that were not selected for MSM4SR are left out, 1"
    )


def test_the_hash_of_settings_is_that_of_the_full_run_so_that_a_knock_out_finds_it():
    full, knocked = record("MSM4SR"), record("MSM4SR", knockout="text:noise")
    assert settings_hash("MSM4SR", full.settings) == settings_hash("MSM4SR", knocked.settings)


def test_a_knock_out_without_all_seeds_of_its_model_says_so():
    runs = [record("MSM4SR", seed, 0.5) for seed in (1, 2, 3)] + [record("UniSRec", seed, 0.5) for seed in (1, 2)]
    for model in ("MSM4SR", "UniSRec"):
        runs += [record(model, 1, 0.4, knockout=knockout) for knockout in ("text:noise", "image:noise")]
        runs += [record(model, seed, 0.4, knockout="price:shuffle") for seed in (1, 2)]
    warnings = {name: row["warnings"][0] for name, row in rows_of(build(runs)).items() if row["warnings"]}
    told = {name: text for name, text in warnings.items() if text.startswith("seed")}
    assert told == {
        "UniSRec": "seeds 1, 2 only, where most rows have 1, 2, 3",
        "MSM4SR − text:noise": "seed 1 only, where MSM4SR has 1, 2, 3",
        "MSM4SR − image:noise": "seed 1 only, where MSM4SR has 1, 2, 3",
        "MSM4SR − price:shuffle": "seeds 1, 2 only, where MSM4SR has 1, 2, 3",
        "UniSRec − text:noise": "seed 1 only, where UniSRec has 1, 2",
        "UniSRec − image:noise": "seed 1 only, where UniSRec has 1, 2",
    }


def test_floors_have_no_parameters():
    row = rows_of(build([record("Popularity"), record("SASRec")]))
    assert [row[name]["cost"]["parameters"] for name in ("Popularity", "SASRec")] == [0, 1000]
