"""A folder of sessions: what is written, that it is whole or not there, and price levels added to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dataset_prep.price import PriceSettings, with_price_levels
from dataset_prep.session_folder import Prefixes, Rows, add_price_levels, write_session_folder
from recbole_mm.data.files import file_info, read_table, write_table
from recbole_mm.data.layout import Manifest, check_folder, write_feature
from recbole_mm.errors import DatasetError, SettingError

ROOT = Path(__file__).resolve().parents[2]
TYPES = {"item_id": "token", "title": "token_seq", "price": "float"}
ITEMS = pd.DataFrame(
    {
        "item_id": ["z", "a", "b", "NA", "unused"],
        "title": ["a Z", "", 'a "quote', "é", "never"],
        "price": ["1.50", "02", "", "3", "9"],
    },
    dtype=object,
)


def parts() -> dict[str, Rows]:
    return {
        "train": Rows(["1", "1", "2"], [["a"], ["a", "b"], ["NA"]], ["b", "z", "a"]),
        "valid": Rows(["3"], [["b", "b"]], ["a"]),
        "test": Rows(["4"], [["z"]], ["NA"]),
    }


def write(folder: Path, **changes) -> Path:
    arguments = {"settings": {"made_by": "a test"}, "raw_files": {"raw.csv": "0" * 64}, **changes}
    write_session_folder(folder, arguments.pop("parts", parts()), arguments.pop("items", ITEMS), TYPES, **arguments)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------- writing


def test_rows_items_and_manifest_are_written(tmp_path):
    folder = write(tmp_path / "out" / "shop")
    files = {name: data.decode() for name, data in content(folder).items()}
    header = "session_id:token\titem_id_list:token_seq\titem_id:token\n"
    assert files["shop.train.inter"] == header + "1\ta\tb\n1\ta b\tz\n2\tNA\ta\n"
    assert files["shop.valid.inter"] == header + "3\tb b\ta\n"
    assert files["shop.test.inter"] == header + "4\tz\tNA\n"
    assert files["shop.item"] == (
        'item_id:token\ttitle:token_seq\tprice:float\nz\ta Z\t1.50\na\t\t02\nb\ta "quote\t\nNA\té\t3\n'
    )
    manifest = Manifest.load(folder)
    assert set(manifest.files) == set(files) - {"manifest.json"} and len(files) == 5
    assert all(known == file_info(folder / file) for file, known in manifest.files.items())
    assert manifest.settings == {"made_by": "a test"} and manifest.raw_files == {"raw.csv": "0" * 64}
    assert check_folder(folder) == [] and [path.name for path in folder.parent.iterdir()] == ["shop"]


def test_without_a_table_there_is_no_item_file(tmp_path):
    folder = tmp_path / "shop"
    write_session_folder(folder, parts(), None, {}, settings={}, raw_files={})
    assert not (folder / "shop.item").exists() and check_folder(folder) == []


def test_the_folder_loads_with_its_price_levels(tmp_path, built):
    items, types, _ = with_price_levels(ITEMS[:4], TYPES, PriceSettings(n_levels=4, method="linear"))
    folder = tmp_path / "shop"
    write_session_folder(folder, parts(), items, types, settings={}, raw_files={})
    columns = {"inter": ["session_id", "item_id_list", "item_id"], "item": ["item_id", "price_level"]}
    _, dataset, train, valid, test, _ = built("Popularity", folder, load_col=columns)
    assert dataset.item_num == 5 and [len(part.dataset) for part in (train, valid, test)] == [3, 1, 1]
    levels = dataset.field2id_token["price_level"][dataset.item_feat["price_level"].numpy()]
    of_item = dict(zip(dataset.field2id_token["item_id"], levels, strict=True))
    assert of_item == {"[PAD]": "[PAD]", "z": "1", "a": "2", "b": "[PAD]", "NA": "4"}


def test_the_same_arguments_give_the_same_bytes(tmp_path):
    assert content(write(tmp_path / "1" / "shop")) == content(write(tmp_path / "2" / "shop"))
    assert content(write(tmp_path / "1" / "shop", overwrite=True)) == content(tmp_path / "2" / "shop")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": Rows([], [], [])}, "no session is left for train; every part needs at least one row"),
        ({"test": Rows([], [], [])}, "no session is left for test"),
        ({"valid": Rows(["3"], [[]], ["a"])}, "valid, row 1: the prefix is empty"),
        ({"valid": Rows(["3"], [["a b"]], ["a"])}, "valid: the id 'a b' holds a space, tab or line break"),
        ({"valid": Rows(["3"], [["a"]], ["\t"])}, "holds a space, tab or line break"),
        ({"valid": Rows(["3"], [["a"]], [""])}, "valid: the id '' is empty"),
        ({"valid": Rows([""], [["a"]], ["b"])}, "valid: the id '' is empty"),
        ({"test": Rows(["3"], [["a"]], ["[PAD]"])}, r"test: the id '\[PAD\]' is RecBole's padding token"),
    ],
)
def test_rows_that_could_not_be_read_again_are_refused(tmp_path, change, message):
    with pytest.raises(DatasetError, match=message):
        write(tmp_path / "shop", parts={**parts(), **change})
    assert list(tmp_path.iterdir()) == []


def test_wrong_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"parts are \['train'\], expected"):
        write(tmp_path / "shop", parts={"train": parts()["train"]})
    with pytest.raises(ValueError, match=r"test: \[1, 1, 2\] values, expected the same number"):
        write(tmp_path / "shop", parts={**parts(), "test": Rows(["1"], [["a"]], ["b", "c"])})
    with pytest.raises(ValueError, match="items has no column price, only item_id, title"):
        write(tmp_path / "shop", items=ITEMS[["item_id", "title"]])
    with pytest.raises(DatasetError, match=r"1 items occur twice, such as \['b'\]; keep one row each"):
        write(tmp_path / "shop", items=pd.concat([ITEMS, ITEMS.iloc[[2]]]))


# ---------------------------------------------------------------- whole or not there


def test_a_folder_that_is_there_is_replaced_only_when_asked(tmp_path):
    folder = write(tmp_path / "shop")
    write_feature(folder, "text", tokens=["a"], rows=pd.DataFrame([[1.0]]).to_numpy(), encoder="e", source="s")
    before = content(folder)
    with pytest.raises(DatasetError, match="shop is there already; replace it with --overwrite, or choose another pla"):
        write(folder, settings={"made_by": "another"})
    assert content(folder) == before
    write(folder, settings={"made_by": "another"}, overwrite=True)
    assert Manifest.load(folder).settings == {"made_by": "another"} and not (folder / "features").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["shop"]


def test_files_that_were_not_made_here_are_never_removed(tmp_path):
    folder = write(tmp_path / "shop")
    (folder / "notes").mkdir()
    (folder / "notes" / "mine.txt").write_text("years of work")
    with pytest.raises(DatasetError, match="its manifest does not name notes/mine.txt .1 such files.; move them away"):
        write(folder, overwrite=True)
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "plain.inter").write_text("user_id:token\n")
    with pytest.raises(DatasetError, match="does not name plain.inter"):
        write(plain, overwrite=True)
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(plain)
    for name in ("file", "link"):
        with pytest.raises(DatasetError, match=f"{name} is there already and is no folder"):
            write(tmp_path / name, overwrite=True)
    assert (plain / "plain.inter").exists() and (folder / "notes" / "mine.txt").exists()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "failing", ["folder_writer.Manifest.save", "session_folder.write_table", "folder_writer.put_in_place"]
)
def test_a_run_that_breaks_off_leaves_what_was_there(tmp_path, monkeypatch, overwrite, failing):
    folder = tmp_path / "shop"
    before = content(write(folder)) if overwrite else {}
    monkeypatch.setattr(f"dataset_prep.{failing}", _break)
    with pytest.raises(OSError, match="disk full"):
        write(folder, settings={"made_by": "another"}, overwrite=overwrite)
    assert content(folder) == before and [path.name for path in tmp_path.iterdir()] == ["shop"] * overwrite


def test_the_old_folder_comes_back_when_the_new_one_cannot_be_renamed(tmp_path, monkeypatch):
    folder = write(tmp_path / "shop")
    before = content(folder)
    rename = Path.rename

    def refuse_the_new(path: Path, target: Path) -> Path:
        if target == folder and path.name == "shop":
            raise OSError("disk full")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse_the_new)
    with pytest.raises(OSError, match="disk full"):
        write(folder, settings={"made_by": "another"}, overwrite=True)
    assert content(folder) == before and [path.name for path in tmp_path.iterdir()] == ["shop"]


def _break(*_, **__) -> None:
    raise OSError("disk full")


# ---------------------------------------------------------------- price levels


@pytest.fixture
def plain(tmp_path) -> Path:
    """A folder without manifest: interactions that RecBole splits, and items with texts for prices."""
    folder = tmp_path / "plain"
    write_table(
        folder / "plain.inter",
        {"user_id:token": ["u", "u"], "item_id:token": ["1", "2"], "timestamp:float": [1.0, 2.0]},
    )
    columns = {
        "item_id:token": ["1", "2", "3", "4"],
        "price:token": ["$1,299.00", "Free", "$10 - $20", "12"],
        "categories:token_seq": ["x a", "x a", "x a", 'b "c'],
    }
    write_table(folder / "plain.item", columns)
    return folder


def test_levels_are_added_to_any_folder(plain):
    before = read_table(plain / "plain.item")
    report = add_price_levels(plain, PriceSettings(n_levels=10))
    items = read_table(plain / "plain.item")
    assert items["price_level"].tolist() == ["10", "", "1", "1"] and items["category"].tolist() == ["a", "a", "a", '"c']
    assert items[list(before)].equals(before) and report.missing == {"not written as a price": 1}
    manifest = Manifest.load(plain)
    assert manifest.files == {} and manifest.settings["prices"] == report.as_settings()
    assert manifest.settings["prices"]["columns"] == ["price_level", "category"] and check_folder(plain) == []


def test_levels_are_replaced_and_the_same_settings_give_the_same_bytes(plain):
    add_price_levels(plain, PriceSettings(n_levels=10))
    before = content(plain)
    add_price_levels(plain, PriceSettings(n_levels=3, category_position="first", method="quantile"))
    items = read_table(plain / "plain.item")
    assert items["price_level"].tolist() == ["2", "", "1", "1"] and items["category"].tolist() == ["x", "x", "x", "b"]
    assert list(items) == ["item_id", "price", "categories", "price_level", "category"]
    add_price_levels(plain, PriceSettings(n_levels=10))
    assert content(plain) == before


def test_the_manifest_keeps_up_with_the_items(tmp_path):
    folder = write(tmp_path / "shop")
    add_price_levels(folder, PriceSettings(n_levels=2))
    assert check_folder(folder) == [] and Manifest.load(folder).settings["made_by"] == "a test"
    assert read_table(folder / "shop.item")["price_level"].tolist() == ["1", "1", "", "2"]


def test_a_crash_while_adding_levels_leaves_nothing_that_check_calls_broken(tmp_path, monkeypatch):
    folder = write(tmp_path / "shop")
    before = (folder / "shop.item").read_bytes()
    monkeypatch.setattr("dataset_prep.session_folder.file_info", _break)
    with pytest.raises(OSError, match="disk full"):
        add_price_levels(folder)
    monkeypatch.undo()
    assert check_folder(folder) == [] and (folder / "shop.item").read_bytes() != before


def test_folders_that_cannot_get_levels_are_refused(tmp_path, plain):
    with pytest.raises(DatasetError, match="no dataset folder"):
        add_price_levels(tmp_path / "nowhere")
    with pytest.raises(SettingError, match="0 price levels, expected at least 1"):
        add_price_levels(plain, PriceSettings(n_levels=0))
    write_table(plain / "plain.item", {"item_id:token": ["1"], "cost:float": ["2"]})
    before = content(plain)
    with pytest.raises(DatasetError, match="the items have no column price, only item_id, cost; try --price-column"):
        add_price_levels(plain)
    write_table(plain / "plain.item", {"item_id:token": ["1"], "price:float": ["2"], "price_level:token": ["mine"]})
    with pytest.raises(DatasetError, match="have a column price_level already"):
        add_price_levels(plain)
    assert set(content(plain)) == set(before)


@pytest.mark.slow
def test_hash_seeds_change_no_byte(tmp_path):
    """In processes of their own, because sets of texts are ordered by the hash seed."""
    table = {
        "user_id:token": [f"u{k // 4}" for k in range(200)],
        "item_id:token": [f"i{k * k % 23}" for k in range(200)],
        "timestamp:float": [float(1_500_000_000 + 40_000 * (k // 4)) for k in range(200)],
    }
    write_table(tmp_path / "raw.inter", table)
    names = sorted(set(table["item_id:token"]))
    items = {"item_id:token": names, "price:float": [float(len(names) - k) for k in range(len(names))]}
    write_table(tmp_path / "raw.item", items)
    command = (
        f"sessions --interactions {tmp_path}/raw.inter --items {tmp_path}/raw.item --sessions day --name shop --out"
    )
    for seed in ("1", "2"):
        subprocess.run(
            [sys.executable, "-m", "dataset_prep", *command.split(), str(tmp_path / seed)],
            cwd=ROOT, check=True, capture_output=True, env={**os.environ, "PYTHONHASHSEED": seed},
        )  # fmt: skip
    assert content(tmp_path / "1" / "shop") == content(tmp_path / "2" / "shop")
    assert json.loads(content(tmp_path / "1" / "shop")["manifest.json"])["settings"]["prices"]["n_filled"] > 0


# ---------------------------------------------------------------- prefixes


def test_prefixes_are_lists_that_are_made_when_asked_for():
    prefixes = Prefixes(["a", "b", "c", "d"], np.array([2, 0, 1, 3, 3]), np.array([0, 1, 3]), np.array([2, 3, 4]))
    assert list(prefixes) == prefixes == [["c", "a"], ["a", "b"], ["d"]] and prefixes != [["c", "a"]]
    assert prefixes.different() == {"a", "b", "c", "d"} and len(prefixes) == 3 and prefixes[1] == ["a", "b"]
    rows = Rows(["1", "1", "2"], prefixes, ["b", "x", "y"])
    assert rows.different() == {"a", "b", "c", "d", "x", "y"} == Rows(*map(list, rows)).different()
    beginning = Prefixes(["a", "b"], np.array([0, 1]), np.array([0]), np.array([1]))
    assert beginning.different() == {"a"}


def test_cold_items_are_listed_one_a_line(tmp_path):
    assert (write(tmp_path / "shop", cold=["z", "NA"]) / "cold_items.txt").read_text() == "z\nNA\n"
    assert check_folder(tmp_path / "shop") == []
    assert not (write(tmp_path / "other" / "shop") / "cold_items.txt").exists()
