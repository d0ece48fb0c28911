"""RecBole's atomic files: kept byte for byte, vectors out of their columns, parts as given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_shop import ITEMS, part_rows, user_histories, write_shop, write_split_shop

from dataset_prep.__main__ import main
from dataset_prep.formats.imported import add_features, make_folder
from dataset_prep.formats.recbole import read_recbole
from dataset_prep.interactions import Columns
from recbole_mm.data.files import read_header, read_table
from recbole_mm.data.layout import check_folder, read_feature
from recbole_mm.errors import DatasetError


@pytest.fixture
def atomic(tmp_path) -> Path:
    """Files as RecBole has them, with a column of vectors; two items have none."""
    folder = write_shop(tmp_path / "recbole" / "shop")
    (folder / "manifest.json").unlink()
    vectors = np.random.default_rng(0).normal(size=(8, 3))
    texts = [" ".join(map(repr, row.tolist())) for row in vectors]
    texts[2] = ""
    lines = (folder / "shop.item").read_text(encoding="utf-8").splitlines()
    rows = [f"{line}\t{text}" for line, text in zip(lines[1:], [*texts, ""], strict=True)]
    (folder / "shop.item").write_text("\n".join([lines[0] + "\tclip:float_seq", *rows]) + "\n", encoding="utf-8")
    (folder / "shop.user").write_text("user_id:token\tage:float\nu1\t30\n")
    np.save(tmp_path / "vectors.npy", vectors)
    return folder


def test_everything_is_taken_over_and_vectors_become_a_feature(atomic, tmp_path):
    report = make_folder(read_recbole(atomic), tmp_path / "dataset" / "shop")
    assert user_histories(report.folder) == user_histories(atomic)
    before, after = (read_table(folder / "shop.inter") for folder in (atomic, report.folder))
    assert before.to_dict("list") == after[list(before)].to_dict("list")
    assert list(read_header(report.folder / "shop.item")) == ["item_id", "title", "categories"]
    assert (report.folder / "shop.user").read_bytes() == (atomic / "shop.user").read_bytes()
    vectors = np.load(tmp_path / "vectors.npy").astype(np.float32)
    feature = read_feature(report.folder, "clip")
    assert feature.tokens == [token for token in ITEMS if token != ITEMS[2]]
    for token, row in zip(feature.tokens, feature.rows, strict=True):
        np.testing.assert_array_equal(row, vectors[ITEMS.index(token)])
    assert "2 without: not in shop.item" in str(report)
    assert "left out: features" in str(report)
    check_folder(report.folder)


def test_vectors_alone_go_into_another_folder(atomic, tmp_path):
    shop = write_shop(tmp_path / "dataset" / "shop")
    add_features(read_recbole(atomic, only_features=True), shop)
    assert read_feature(shop, "clip").rows.shape == (7, 3)


def test_parts_with_lists_stay_as_they_are(tmp_path):
    source = write_split_shop(tmp_path / "recbole" / "shop")
    for part in ("train", "valid", "test"):
        path = source / f"shop.{part}.inter"
        path.write_text(path.read_text().replace("session_id:token", "user_id:token"))
    report = make_folder(read_recbole(source), tmp_path / "dataset" / "shop")
    expected = write_split_shop(tmp_path / "expected" / "shop")
    for part in ("train", "valid", "test"):
        assert part_rows(report.folder, part) == part_rows(expected, part)


def test_parts_of_interactions_become_prefixes_and_targets(tmp_path):
    source = tmp_path / "recbole" / "toys"
    source.mkdir(parents=True)
    header = "user_id:token\titem_id:token\ttimestamp:float\n"
    for part, text in {"train": "u\tb\t2\nu\ta\t1\n", "valid": "u\tc\t3\n", "test": "u\td\t4\nv\td\t4\n"}.items():
        (source / f"toys.{part}.inter").write_text(header + text)
    report = make_folder(read_recbole(source), tmp_path / "dataset" / "toys")
    assert part_rows(report.folder, "train") == [("u", ["a"], "b")]
    assert part_rows(report.folder, "valid") == [("u", ["a", "b"], "c")]
    assert part_rows(report.folder, "test") == [("u", ["a", "b", "c"], "d")]
    assert "1 validation and test interactions are of users without training ones" in str(report)


def test_columns_may_have_other_names_and_no_time(tmp_path):
    source = tmp_path / "recbole" / "toys"
    source.mkdir(parents=True)
    (source / "toys.inter").write_text("uid:token\tiid:token\nu\tb\nu\ta\n")
    (source / "toys.item").write_text("iid:token\tname:token_seq\na\tx\nb\ty\n")
    imported = read_recbole(source, columns=Columns(user="uid", item="iid"))
    report = make_folder(imported, tmp_path / "dataset" / "toys")
    assert user_histories(report.folder) == {"u": ["b", "a"]}
    assert "no column timestamp: the order of the file is taken" in str(report)
    assert list(read_header(report.folder / "toys.item")) == ["item_id", "name"]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("item_id:token\tv:float_seq\na\t1 2\nb\t1\n", "line 3, v: found 1 numbers, expected 2"),
        ("item_id:token\tv:float_seq\na\t1 x\n", "line 2, v: found 1 x, expected numbers parted by spaces"),
        ("item_id:token\tv:float_seq\na\t1 nan\n", r"row 0 \(item 'a'\): found NaN, infinity"),
        ("item_id:token\tv:float_seq\na\t\n", "v: found no vector, expected numbers for some item"),
        ("item_id:token\t../v:float_seq\na\t1 2\n", "column ../v: found feature name .../v.: letters, .* rename it"),
        ("item_id:token\tv:float_seq\na\t1\na\t2\n", "1 items occur twice, such as .'a'"),
        ("item_id:token\tv:float_seq\na\t1\n\t2\n", "a row has an empty item_id"),
        ("item_id:token\tprice:float\na\tcheap\n", "price is 'cheap', expected a finite number"),
        ("item_id\tprice:float\na\t1\n", "column 'item_id' has no type"),
    ],
)
def test_a_table_of_items_that_cannot_be_used_is_refused(tmp_path, item, message):
    source = tmp_path / "recbole" / "toys"
    source.mkdir(parents=True)
    (source / "toys.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\nu\ta\t1\n")
    (source / "toys.item").write_text(item)
    with pytest.raises(DatasetError, match=message):
        read_recbole(source)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("u\t[PAD]\t1\n", "item_id: found '.PAD.', which is RecBole's padding token"),
        ("\ta\t1\n", "user_id: found '', which is empty"),
        ("u\ta b\t1\n", "found 'a b', which holds a space"),
    ],
)
def test_F17_ids_that_cannot_be_used_are_refused(tmp_path, row, message):
    source = tmp_path / "recbole" / "toys"
    source.mkdir(parents=True)
    (source / "toys.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\nu\ta\t1\n" + row)
    with pytest.raises(DatasetError, match=message):
        make_folder(read_recbole(source), tmp_path / "dataset" / "toys")
    assert not (tmp_path / "dataset" / "toys").exists()


def test_other_mistakes_are_said(tmp_path, atomic):
    with pytest.raises(DatasetError, match="no folder"):
        read_recbole(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="no .inter file"):
        read_recbole(tmp_path / "empty")
    (atomic / "shop.item").unlink()
    with pytest.raises(DatasetError, match="has no shop.item, whose columns of the type float_seq"):
        read_recbole(atomic, only_features=True)
    (atomic / "shop.inter").rename(atomic / "shop.train.inter")
    with pytest.raises(DatasetError, match="shop.valid.inter, shop.test.inter is missing"):
        read_recbole(atomic)
    (atomic / "shop.valid.inter").write_text("user_id:token\titem_id_list:token_seq\titem_id:token\nu\ta\tb\n")
    (atomic / "shop.test.inter").write_text("user_id:token\titem_id_list:token_seq\titem_id:token\nu\ta\tb\n")
    with pytest.raises(DatasetError, match="shop.train.inter has no column item_id_list, the other parts have one"):
        read_recbole(atomic)


def test_F61_two_processes_do_not_write_one_folder(atomic, tmp_path, monkeypatch):
    from filelock import FileLock

    (tmp_path / "dataset").mkdir()
    other = FileLock(tmp_path / "dataset" / ".shop.lock")  # another object is another holder
    with other, pytest.raises(DatasetError, match="is being written by"):
        make_folder(read_recbole(atomic), tmp_path / "dataset" / "shop")


def test_a_folder_that_is_there_is_refused_or_replaced(atomic, tmp_path):
    imported = read_recbole(atomic)
    folder = make_folder(imported, tmp_path / "dataset" / "shop").folder
    before = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(DatasetError, match="is there already; replace it with --overwrite"):
        make_folder(imported, folder)
    make_folder(imported, folder, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    with pytest.raises(DatasetError, match="more than 10%"):
        make_folder(imported, folder, overwrite=True, max_missing=0.1)
    assert {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_the_command_reads_a_folder(atomic, tmp_path, capsys):
    assert main(["import", "recbole", "--folder", str(atomic), "--out", str(tmp_path / "dataset")]) == 0
    assert "feature 'clip': 7 of 9 items" in capsys.readouterr().out
    assert main(["import", "recbole", "--folder", str(atomic), "--out", str(tmp_path), "--user", "who"]) == 3
    assert "has no column who" in capsys.readouterr().err


def test_a_folder_that_is_imported_has_a_card(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "plain.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\nu\ta\t1\nu\tb\t2\nv\ta\t3\n")
    assert main(["import", "recbole", "--folder", str(plain), "--name", "made"]) == 0
    assert "the dataset card: dataset/made/DATASET.md" in capsys.readouterr().out
    assert "| 2 | 2 | 3 |" in Path("dataset/made/DATASET.md").read_text()
    assert main(["check", "dataset/made"]) == 0
