"""Recipes become command lines that the program's own parser takes, and run as a whole."""

from __future__ import annotations

import inspect
import shlex
from pathlib import Path

import pytest

import dataset_prep.__main__ as program
from dataset_prep.encoders import NEIGHBOURS, find_encoder
from dataset_prep.recipes import STEPS, commands_of, compare, find_recipe, options, recipe_names, with_changes
from recbole_mm.data.files import write_table
from recbole_mm.errors import SettingError

FILES = {"reviews": [Path("a.json.gz")], "meta": [Path("b.json.gz")]}
SHOP = """\
MAX_ITEM_LIST_LENGTH: 10
recipe:
  title: A shop
  prepare: {command: table, min_user: 2, min_item: 1}
  features:
    text: {encoder: tfidf, width: 4}
  expected: {users: 4, items: 3, source: a count by hand}
"""


def shop(folder: Path) -> Path:
    """A recipe, a log of four users and a table of three items."""
    (folder / "shop.yaml").write_text(SHOP)
    rows = ["user_id,item_id,timestamp"]
    rows += [
        f"u{user},i{(user + step) % 3},{1_600_000_000 + 100 * user + step}" for user in range(4) for step in range(5)
    ]
    (folder / "log.csv").write_text("\n".join(rows) + "\n")
    (folder / "items.csv").write_text("item_id,title,price\ni0,a red lamp,$1\ni1,a blue tent,$2\ni2,a red tent,$3\n")
    return folder / "shop.yaml"


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_made_of_commands_that_there_are(name):
    recipe = find_recipe(name)
    for line in commands_of(recipe, Path("dataset"), files=FILES, device="cpu"):
        assert callable(program._parser().parse_args(line).run)


def test_there_is_a_recipe_for_every_dataset_of_the_papers():
    papers = {"Pantry", "Arts", "Office", "Scientific", "Instruments", "Cellphones", "Grocery", "Sports"}
    assert papers <= set(recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_the_encoders_of_a_recipe_take_its_options(name):
    for feature, wanted in find_recipe(name).features.items():
        if wanted["encoder"] == NEIGHBOURS:
            continue
        takes = inspect.signature(find_encoder(wanted["encoder"])).parameters
        inner = wanted.get("option", {})
        assert {*inner, *({"model"} & set(wanted))} <= set(takes), feature
        for role in [key for key in inner if key.endswith("_encoder")]:
            takes = inspect.signature(find_encoder(inner[role])).parameters
            assert set(inner.get(role.replace("_encoder", "_options"), {})) <= set(takes), feature


def test_only_encoders_that_run_on_a_device_are_given_one():
    lines = commands_of(find_recipe("Cellphones"), Path("d"), files={}, steps=("features",), device="cuda:0")
    with_device = {line[4]: "--device" in line for line in lines}
    assert with_device.pop("image_from_text") is False and set(with_device.values()) == {True}
    own = with_changes(find_recipe("Office"), ["features.text={encoder: tfidf}", "features.image={}"])
    lines = commands_of(own, Path("d"), files={}, steps=("features",), device="cuda:0")
    assert not any("--device" in line for line in lines)


def test_settings_become_options():
    given = {"min_user": 5, "whiten": True, "force": False, "width": None, "columns": ["a", "b"]}
    assert options(given) == ["--min-user", "5", "--whiten", "--columns", "a,b"]
    assert options({"reviews": [Path("x"), Path("y z")]}) == ["--reviews", "x", "y z"]
    nested = {"option": {"pooling": "cls", "clip": {"model": "B", "fast": True}, "n": 2}}
    expected = ["--option", "pooling=cls", "--option", 'clip={"model": "B", "fast": true}', "--option", "n=2"]
    assert options(nested) == expected


def test_steps_and_features_can_be_chosen():
    recipe = find_recipe("Cellphones")
    lines = commands_of(recipe, Path("d"), files={}, steps=("features", "check"), features=["text"])
    assert [line[0] for line in lines] == ["features", "check"] and lines[0][2] == str(Path("d/Cellphones"))
    every = [line[0] for line in commands_of(recipe, Path("d"), files=FILES)]
    assert every == ["amazon", "pictures", *["features"] * 6, "reduce", "reduce", "describe", "check"]
    with pytest.raises(SettingError, match="no step 'fly', only prepare, pictures"):
        commands_of(recipe, Path("d"), files={}, steps=("fly",))
    with pytest.raises(SettingError, match="the recipe Cellphones has no feature 'smell', only text, image"):
        commands_of(recipe, Path("d"), files={}, features=["smell"])


def test_the_download_is_of_the_recipe_s_category():
    (line, *_) = commands_of(find_recipe("Office"), Path("d"), files={"download": True, "download_to": Path("there")})
    assert "--download-to there --download Office_Products" in shlex.join(line)
    recipe = with_changes(find_recipe("Office"), ["prepare.category="])
    with pytest.raises(SettingError, match="names no category to download; give --reviews and --meta"):
        commands_of(recipe, Path("d"), files={"download": True})


def test_an_option_can_be_changed_added_and_taken_away():
    recipe = find_recipe("Office")
    changed = with_changes(
        recipe, ["features.text.model=here/model", "features.image=", "prepare.min_user=3", "pictures.per_item="]
    )
    assert changed.features["text"]["model"] == "here/model" and list(changed.features) == ["text"]
    assert changed.prepare["min_user"] == 3 and changed.pictures == {}
    assert recipe.features["text"]["model"] != "here/model" and recipe.prepare["min_user"] == 5
    deep = with_changes(recipe, ["features.image.option.text_options.model=m"])
    assert deep.features["image"]["option"]["text_options"]["model"] == "m"
    reduced = with_changes(find_recipe("Sports"), ["reduce.0.width=32"])
    assert [entry["width"] for entry in reduced.reduce] == [32, 64]
    for wrong in ("text.model=x", "features.smell.model=x", "prepare", "width=3"):
        with pytest.raises(SettingError, match="names nothing in the recipe Office; expected KEY.OPTION=VALUE"):
            with_changes(recipe, [wrong])


def test_wrong_recipes_are_refused_with_what_is_wrong(tmp_path):
    def refused(text: str, match: str) -> None:
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(SettingError, match=match):
            find_recipe(str(tmp_path / "x.yaml"))

    refused("a: 1", "has no key recipe")
    refused("[1]", "expected keys and values at the top, found list")
    refused("recipe: [", "is no YAML")
    refused("recipe: {prepare: {command: amazon}, featurs: {}}", "no key 'featurs', only .*did you mean 'features'")
    refused("recipe: {prepare: {command: cook}}", r"recipe.prepare needs a command, one of \['amazon', 'table'\]")
    refused("recipe: {prepare: {command: table}, features: {text: tfidf}}", "recipe.features.text is 'tfidf', expected")
    refused("recipe: {prepare: {command: table}, reduce: {width: 3}}", "recipe.reduce is .* expected a list")
    with pytest.raises(SettingError, match="no file"):
        find_recipe(str(tmp_path / "none.yaml"))
    with pytest.raises(SettingError, match="no recipe 'Ofice', only .*did you mean 'Office'"):
        find_recipe("Ofice")
    with pytest.raises(SettingError, match="no recipe 'demo'"):  # a property file without a recipe
        find_recipe("demo")


def test_counts_are_compared_with_the_published_ones(tmp_path):
    folder = tmp_path / "shop"
    folder.mkdir()
    columns = {"user_id:token": ["u", "v", "w"], "item_id:token": ["a", "b", "a"], "timestamp:float": [1.0, 2.0, 3.0]}
    write_table(folder / "shop.inter", columns)
    recipe = find_recipe(str(shop(tmp_path)))
    expected = "shop: users 3 (published 4, -25.00%), items 2 (published 3, -33.33%); published by a count by hand"
    assert compare(recipe, folder) == expected
    assert "no published figures" in compare(find_recipe("Scientific"), folder)
    expected = "Cellphones: figures of sessions are published, but the folder holds users"
    assert compare(find_recipe("Cellphones"), folder) == expected


def test_a_recipe_of_one_s_own_runs_and_runs_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shop(tmp_path)
    line = ["recipe", "shop.yaml", "--interactions", "log.csv", "--items", "items.csv"]
    assert program.main(line) == 0
    first = {path: path.read_bytes() for path in Path("dataset/shop").rglob("*") if path.is_file()}
    out = capsys.readouterr().out
    assert "[1/4] python -m dataset_prep table --name shop --out dataset --interactions log.csv" in out
    assert "shop: users 4 (published 4, +0.00%), items 3 (published 3, +0.00%)" in out
    assert out.rstrip().endswith("ready: python run_recbole_mm.py --model=MSM4SR --dataset=shop")
    assert Path("dataset/shop/DATASET.md") in first and Path("dataset/shop/features/text.npy") in first

    assert program.main(line) == 0
    out = capsys.readouterr().out
    assert "kept" in out and "up to date" in out
    assert first == {path: path.read_bytes() for path in Path("dataset/shop").rglob("*") if path.is_file()}


def test_the_last_line_names_the_model_for_the_kind_of_data_once_there_are_features(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shop(tmp_path)
    line = ["recipe", "shop.yaml", "--interactions", "log.csv", "--items", "items.csv", "--out", "made"]
    sessions = ["--set", "prepare.protocol=sessions", "--set", "prepare.sessions=user", "--set", "prepare.prefixes=all"]
    assert program.main([*line, *sessions, "--steps", "prepare"]) == 0
    assert "ready" not in capsys.readouterr().out
    assert program.main([*line, *sessions]) == 0
    out = capsys.readouterr().out
    assert "shop: figures of users are published, but the folder holds sessions" in out
    assert out.rstrip().endswith(f"ready: python run_recbole_mm.py --model=MMSBR --dataset={Path('made/shop')}")


def test_the_last_line_says_what_to_do_about_items_without_content(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shop(tmp_path)
    (tmp_path / "items.csv").write_text("item_id,title,price\ni0,a red lamp,$1\ni1,,$2\ni2,a red tent,$3\n")
    assert program.main(["recipe", "shop.yaml", "--interactions", "log.csv", "--items", "items.csv"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("--model=MSM4SR --dataset=shop --missing_features=zero")


def test_a_folder_prepared_otherwise_is_not_taken_for_the_recipe_s(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shop(tmp_path)
    line = ["recipe", "shop.yaml", "--interactions", "log.csv", "--items", "items.csv", "--steps", "prepare"]
    assert program.main(line) == 0
    assert program.main([*line, "--set", "prepare.min_user=3"]) == 3
    assert "--overwrite" in capsys.readouterr().err
    assert program.main([*line, "--set", "prepare.min_user=3", "--overwrite"]) == 0
    (tmp_path / "log.csv").write_text((tmp_path / "log.csv").read_text() + "u9,i0,1700000000\n")
    assert program.main(line) == 3


def test_a_dry_run_shows_the_commands_and_does_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert program.main(["recipe", "Office", "--reviews", "a", "--meta", "b", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.count("python -m dataset_prep") == len(out.splitlines()) - 1 == 6
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_is_checked(capsys):
    def refused(*line: str) -> str:
        assert program.main(["recipe", *line]) == 2
        return capsys.readouterr().err

    assert "name a recipe: one of" in refused()
    assert "needs --reviews FILE and --meta FILE, or --download DIR" in refused("Office")
    assert "--download fetches reviews and metadata" in refused("Office", "--download", "d", "--meta", "m")
    assert "--items does not go with this recipe" in refused("Office", "--items", "i")
    assert program.main(["recipe", "--list"]) == 0
    assert "Office         Office Products, Amazon reviews 2018" in capsys.readouterr().out
    assert set(STEPS) == {"prepare", "pictures", "features", "reduce", "describe", "check"}
