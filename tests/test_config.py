"""Settings: precedence, types, unknown keys and values, folders."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from recbole_mm import registration
from recbole_mm.config import Config, datasets_in, stage_config
from recbole_mm.errors import DatasetError, SettingError
from recbole_mm.paths import properties_dir
from recbole_mm.settings import parse_value, read_settings


def config(folder: Path, model: str = "MSM4SR", **settings):
    return Config(model, str(folder), settings=settings, origins={key: f"--{key}" for key in settings})


def test_later_sources_win(planted, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("epochs: 7\nlearning_rate: 5e-4\n")
    made = Config("MSM4SR", "planted", [file], {"epochs": 9})
    assert (made["epochs"], made["learning_rate"]) == (9, 5e-4)
    assert made["valid_metric"] == "Recall@20"  # overall.yaml over RecBole's MRR@10


def test_a_derived_model_inherits_the_settings_of_its_base(planted):
    base, derived = config(planted), config(planted, model="MSM4SRReleased")
    assert (derived["feature_scale"], derived["train_attention"]) == ("none", False)
    same = {key for key in base.final_config_dict if base[key] == derived[key]}
    assert {"hidden_size", "temperature", "clip_grad_norm", "pretrain_epochs", "valid_metric"} <= same
    with pytest.raises(SettingError, match=r"mixup_max must be in \[0, 0.5\]"):
        config(planted, model="MSM4SRReleased", mixup_max=0.7)
    with pytest.raises(SettingError, match="feature_scale must be one of none, unit"):
        config(planted, model="MSM4SRReleased", feature_scale="standard")


def test_a_dataset_is_a_name_or_a_path(planted, tmp_path):
    by_name, by_path = config(Path("planted")), config(planted)
    assert by_name["dataset"] == by_path["dataset"] == "planted"
    assert Path(by_name["data_path"]).resolve() == Path(by_path["data_path"]).resolve()


def test_a_program_s_own_arguments_are_no_settings(planted, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pytest", "--epochs=1", "--tb=short"])
    assert config(planted)["epochs"] != 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"learnig_rate": 0.1},
            r"unknown setting 'learnig_rate' \(from --learnig_rate\); did you mean 'learning_rate'",
        ),
        ({"epochs": "many"}, r"epochs must be int such as \d+, found 'many' \(from --epochs\)"),
        ({"epochs": 0}, "epochs must be at least 1, found 0"),
        ({"epochs": True}, "epochs must be int"),
        ({"learning_rate": -1.0}, "learning_rate must be > 0, found -1.0"),
        ({"use_gpu": "perhaps"}, "use_gpu must be bool"),
        ({"metrics": ["Recal"]}, "no metric 'Recal'.*did you mean 'recall'"),
        ({"valid_metric": "Recall@7"}, "valid_metric 'Recall@7'.*must be one of the metrics"),
        ({"topk": "[5,10"}, "cannot read '\\[5,10'"),
        ({"topk": [0]}, "topk must be whole numbers of at least 1"),
        (
            {"train_stage": "pretraining"},
            "train_stage must be one of both, pretrain, finetune.*did you mean 'pretrain'",
        ),
        ({"missing_features": "skip"}, "missing_features must be one of error, zero, mean"),
        ({"save_dataset": True}, "RecBole's cache is a pickle"),
    ],
)
def test_a_wrong_setting_says_what_was_found_and_where_it_came_from(planted, settings, message):
    with pytest.raises(SettingError, match=message):
        config(planted, **settings)


def test_the_message_names_the_file_a_setting_came_from(planted, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("epoch: 7\n")
    with pytest.raises(SettingError, match=r"unknown setting 'epoch' \(from .*mine\.yaml\); did you mean 'epochs'"):
        Config("MSM4SR", "planted", [file])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs: [1", "no plain YAML"),
        ("- 1\n- 2", "must hold lines like"),
        ("a: !!python/object/apply:os.getcwd []", "no plain YAML"),
    ],
)
def test_a_settings_file_is_plain_yaml(tmp_path, text, message):
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(SettingError, match=message):
        read_settings(tmp_path / "wrong.yaml")


def test_a_missing_settings_file_is_named():
    with pytest.raises(SettingError, match="cannot read the settings file nowhere.yaml"):
        read_settings(Path("nowhere.yaml"))


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("3", 3), ("True", True), ("None", None), ("[5,10]", [5, 10]), ("[5,inf)", "[5,inf)"),
     ("__import__('os').getcwd()", "__import__('os').getcwd()"), ("{LS: valid_only}", {"LS": "valid_only"})],
)  # fmt: skip
def test_values_are_read_as_yaml_and_never_run(text, value):
    assert parse_value(text) == value


def test_whole_numbers_stand_for_floats_and_single_values_for_lists(planted):
    made = config(planted, learning_rate=1, topk=20, metrics="Recall", gpu_id=0)
    assert (
        made["learning_rate"] == 1.0
        and made["topk"] == [20]
        and made["metrics"] == ["Recall"]
        and made["gpu_id"] == "0"
    )


def test_an_unknown_model_lists_the_nearest_and_all(planted):
    with pytest.raises(SettingError, match="no model 'SASREK'; did you mean 'SASRec'.*\n.*MSM4SR.*SRGNN"):
        config(planted, model="SASREK")


def test_aliases_and_lower_case_find_a_model(planted):
    assert config(planted, model="mp4sr")["model"] == "MSM4SR"
    assert config(planted, model="sasrec")["model"] == "SASRec"


def test_a_missing_folder_says_which_commands_make_it(planted):
    with pytest.raises(
        DatasetError, match=r"no dataset folder dataset/shop(.|\n)*dataset_prep features --dataset dataset/shop"
    ):
        config(Path("shop"))
    with pytest.raises(DatasetError, match="did you mean 'planted'"):
        config(Path("plantd"))


RECIPE = """topk: [5, 7]
valid_metric: Recall@7
recipe:                    # (dict) how the dataset is prepared
  edition: 2014
  topk: [3]
MSM4SR:
  epochs: 3
"""


@pytest.fixture
def recipes(tmp_path, monkeypatch):
    """Property files of datasets with a recipe, planted and Office, beside our own files."""
    files = tmp_path / "properties"
    shutil.copytree(properties_dir(), files)
    for name in ("planted", "Office"):
        (files / "dataset" / f"{name}.yaml").write_text(RECIPE)
    monkeypatch.setattr(registration, "properties_dir", lambda: files)
    return files


def test_a_dataset_s_recipe_is_no_setting(planted, recipes):
    made = config(planted)
    assert (made["topk"], made["epochs"]) == ([5, 7], 3)
    assert "recipe" not in made.final_config_dict and "edition" not in made.final_config_dict


def test_a_recipe_in_a_settings_file_is_an_unknown_setting(planted, recipes, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("recipe: {edition: 2014}\n")
    with pytest.raises(SettingError, match=r"unknown setting 'recipe' \(from .*mine\.yaml\)"):
        Config("MSM4SR", "planted", [file])


def test_a_missing_folder_with_a_recipe_says_the_command_that_makes_it(planted, recipes):
    remedy = (
        r"^no dataset folder dataset/Office\n  make it with: python -m dataset_prep recipe Office --reviews FILE --"
    )
    with pytest.raises(DatasetError, match=remedy):
        config(Path("Office"))
    with pytest.raises(DatasetError, match=r"make it with: python -m dataset_prep demo --out dataset"):
        config(Path("demo"))


def test_a_folder_without_interactions_says_what_it_found(tmp_path):
    folder = tmp_path / "dataset" / "empty"
    folder.mkdir(parents=True)
    (folder / "other.inter").touch()
    with pytest.raises(DatasetError, match=r"has neither empty\.inter nor .*found \['other\.inter'\]"):
        config(Path("empty"))
    assert datasets_in(Path("dataset")) == []


def test_a_split_folder_gets_the_settings_it_needs(splits):
    made = config(splits, model="SASRec")
    assert made["benchmark_filename"] == ["train", "valid", "test"]
    assert made["alias_of_item_id"] == ["item_id_list"]


def test_item_fields_of_recbole_s_models_are_chosen_from_the_folder(planted):
    made = config(planted, model="FDSA")
    assert made["selected_features"] == ["categories"] and made["load_col"]["item"] == ["item_id", "categories"]
    with pytest.raises(
        SettingError, match=r"selected_features \['brand'\].*not in planted\.item, which has item_id, title"
    ):
        config(planted, model="FDSA", selected_features=["brand"])


def test_columns_follow_the_names_of_the_fields(planted):
    assert config(planted, USER_ID_FIELD="who")["load_col"]["inter"] == ["who", "item_id", "timestamp"]


def test_models_with_pairwise_loss_keep_their_negatives(planted):
    assert config(planted, model="FPMC")["train_neg_sample_args"]["distribution"] == "uniform"
    assert config(planted, model="SASRec")["train_neg_sample_args"]["distribution"] == "none"


def test_what_a_user_sets_holds_in_both_stages(planted):
    default = config(planted)
    default["pretrain_learning_rate"] = 0.125
    assert stage_config(default, "pretrain")["learning_rate"] == 0.125 != default["learning_rate"]
    assert stage_config(config(planted, learning_rate=0.5), "pretrain")["learning_rate"] == 0.5
    both = stage_config(config(planted, learning_rate=0.5, pretrain_learning_rate=0.25), "pretrain")
    assert both["learning_rate"] == 0.25
    assert stage_config(config(planted), "finetune")["train_stage"] == "finetune"


def test_part_of_eval_args_keeps_the_rest(planted):
    made = config(planted, eval_args={"split": {"RS": [8, 1, 1]}})
    assert made["eval_args"]["order"] == "TO" and made["eval_args"]["split"] == {"RS": [8, 1, 1]}


def test_use_gpu_false_means_the_processor(planted):
    assert config(planted, use_gpu=False)["device"].type == "cpu"
