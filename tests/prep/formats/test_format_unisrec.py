"""UniSRec's files: what is written is what UniSRec reads, and what is read is what was written."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from small_shop import ITEMS, USERS, part_rows, user_histories, write_shop, write_split_shop

from dataset_prep.__main__ import main
from dataset_prep.formats.imported import add_features, make_folder
from dataset_prep.formats.unisrec import export_unisrec, read_unisrec
from recbole_mm.data.files import read_table, sha256_of, write_table
from recbole_mm.data.layout import Manifest, check_folder, read_feature, write_feature
from recbole_mm.errors import DatasetError, SettingError


@pytest.fixture
def shop(tmp_path) -> Path:
    return write_shop(tmp_path / "dataset" / "shop")


@pytest.fixture
def split_shop(tmp_path) -> Path:
    return write_split_shop(tmp_path / "dataset" / "shop")


@pytest.fixture
def exported(shop, tmp_path) -> Path:
    return export_unisrec(shop, tmp_path / "unisrec").folder


def read_as_unisrec_does(folder: Path, *, width: int) -> dict[str, np.ndarray]:
    """The vector of each real item id, by the lines of UniSRec's own loader: row = int(token)."""
    loaded = np.fromfile(folder / f"{folder.name}.feat1CLS", dtype=np.float32).reshape(-1, width)
    lines = (folder / f"{folder.name}.item2index").read_text(encoding="utf-8").splitlines()
    return {token: loaded[int(index)] for token, index in (line.split("\t") for line in lines)}


# ---------------------------------------------------------------- export


def test_unisrec_s_own_loader_finds_every_item_s_vector(shop, exported):
    text, vectors = read_feature(shop, "text"), read_as_unisrec_does(exported, width=6)
    starts = np.cumsum(text.counts) - text.counts
    for token, start, count in zip(text.tokens, starts, text.counts, strict=True):
        np.testing.assert_allclose(vectors[token], text.rows[start : start + count].mean(axis=0), rtol=1e-6)
    assert set(vectors) == set(ITEMS)


def test_the_split_of_a_plain_folder_is_unisrec_s(shop, exported):
    numbers = dict(line.rsplit("\t", 1) for line in (exported / "shop.item2index").read_text().splitlines())
    users = dict(line.rsplit("\t", 1) for line in (exported / "shop.user2index").read_text().splitlines())
    expected = {"train": [], "valid": [], "test": []}
    for user in users:
        items = [numbers[ITEMS[number]] for number in USERS[user]]
        train = items[:-2] if len(items) > 2 else items
        for back in range(1, len(train)):  # UniSRec writes the longest prefix first
            expected["train"].append((users[user], train[:-back], train[-back]))
        if len(items) > 2:
            expected["valid"].append((users[user], items[:-2], items[-2]))
            expected["test"].append((users[user], items[:-1], items[-1]))
    for part, rows in expected.items():
        lines = [f"{user}\t{' '.join(prefix)}\t{target}\n" for user, prefix, target in rows]
        text = "user_id:token\titem_id_list:token_seq\titem_id:token\n" + "".join(lines)
        assert (exported / f"shop.{part}.inter").read_text() == text


def test_items_are_numbered_as_they_appear_user_by_user(shop, exported):
    order = list(dict.fromkeys(item for items in user_histories(shop).values() for item in items))
    lines = (exported / "shop.item2index").read_text(encoding="utf-8").splitlines()
    assert lines == [f"{token}\t{number}" for number, token in enumerate(order)]


def test_prefixes_are_cut_to_the_last_50(tmp_path):
    folder = write_shop(tmp_path / "long")
    items = [f"i{number}" for number in range(70)]
    write_table(
        folder / "long.inter",
        {"user_id:token": ["u"] * 70, "item_id:token": items, "timestamp:float": list(range(70))},
    )
    write_feature(folder, "text", tokens=items, rows=np.ones((70, 3), dtype=np.float32), encoder="x", source="x")
    out = export_unisrec(folder, tmp_path / "unisrec").folder
    test = read_table(out / "long.test.inter", needed=["item_id_list"])["item_id_list"][0].split(" ")
    assert test == [str(number) for number in range(19, 69)]


def test_the_report_tells_what_was_done(shop, tmp_path):
    report = str(export_unisrec(shop, tmp_path / "unisrec"))
    assert "4 users, 8 items, 4 train rows, 3 valid rows, 3 test rows" in report
    assert "1 users with fewer than 3 interactions have no validation and test rows" in report
    assert "feature 'text': 3 items have several rows, which were averaged" in report
    assert "vectors have width 6: set plm_size" in report
    assert "1 items without interactions were left out" in report


@pytest.mark.parametrize("missing", ["zero", "mean"])
def test_items_without_a_vector_get_what_is_asked_for(shop, tmp_path, missing):
    report = export_unisrec(shop, tmp_path / "unisrec", chosen={"text": "image"}, missing=missing)
    image, vectors = read_feature(shop, "image"), read_as_unisrec_does(report.folder, width=4)
    expected = np.zeros(4) if missing == "zero" else image.rows.mean(axis=0)
    for token in set(ITEMS) - set(image.tokens):
        np.testing.assert_allclose(vectors[token], expected, rtol=1e-5)
    for token, row in zip(image.tokens, image.rows, strict=True):
        np.testing.assert_array_equal(vectors[token], row)
    assert "feature 'image': 2 of 8 items have no vector" in str(report)


def test_the_text_file_has_real_ids_and_title_category_brand(exported):
    lines = (exported / "shop.text").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "item_id:token\ttext:token_seq"
    assert "00123\tthing 1 Old toys All" in lines


# ---------------------------------------------------------------- round trips


def test_a_split_folder_comes_back_as_it_was(split_shop, tmp_path):
    out = export_unisrec(split_shop, tmp_path / "unisrec", chosen={"text": "image"}).folder
    report = make_folder(read_unisrec(out, width=4), tmp_path / "back" / "shop")
    for part in ("train", "valid", "test"):
        assert part_rows(report.folder, part) == part_rows(split_shop, part)
        name = f"shop.{part}.inter"
        assert (report.folder / name).read_bytes() == (split_shop / name).read_bytes()
    before, after = read_feature(split_shop, "image"), read_feature(report.folder, "text")
    assert set(before.tokens) == set(after.tokens)
    vectors = dict(zip(before.tokens, before.rows, strict=True))
    for token, row in zip(after.tokens, after.rows, strict=True):
        np.testing.assert_array_equal(row, vectors[token])
    assert check_folder(report.folder) == []


def test_the_histories_of_a_plain_folder_come_back(shop, exported, tmp_path):
    folder = make_folder(read_unisrec(exported, width=6), tmp_path / "back" / "shop").folder
    whole = {user: [*prefix, target] for user, prefix, target in part_rows(folder, "test")}
    assert whole == {user: items for user, items in user_histories(shop).items() if len(items) > 2}
    texts = read_table(folder / "shop.item", needed=["item_id", "text"])
    assert dict(zip(texts["item_id"], texts["text"], strict=True))["NA"] == "thing 0 Old toys All"


def test_items_that_occur_nowhere_are_counted_when_they_are_left_out(exported, tmp_path):
    """The last interaction of a user is nowhere else, if its row goes."""
    lines = (exported / "shop.train.inter").read_text().splitlines()
    for part in ("train", "valid", "test"):
        (exported / f"shop.{part}.inter").write_text("\n".join(lines[:2]) + "\n")
    there = set(lines[1].replace("\t", " ").split(" ")[1:])
    report = make_folder(read_unisrec(exported, width=6), tmp_path / "back" / "shop")
    assert f"{8 - len(there)} items without interactions were left out" in str(report)


def test_what_is_exported_again_is_the_same(split_shop, tmp_path):
    first = export_unisrec(split_shop, tmp_path / "one", chosen={"text": "image"}).folder
    back = make_folder(read_unisrec(first, width=4), tmp_path / "back" / "shop").folder
    second = export_unisrec(back, tmp_path / "two").folder
    names = [path.name for path in sorted(first.iterdir())]
    assert names == [path.name for path in sorted(second.iterdir())]
    assert [sha256_of(first / name) for name in names] == [sha256_of(second / name) for name in names]


def test_a_second_file_of_vectors_becomes_text_dropped(split_shop, tmp_path):
    out = export_unisrec(split_shop, tmp_path / "unisrec", chosen={"text": "image", "text_dropped": "image"}).folder
    imported = read_unisrec(out, width=4)
    assert list(imported.features) == ["text", "text_dropped"]


# ---------------------------------------------------------------- import


def test_without_index_files_ids_are_the_numbers(exported, tmp_path):
    for ending in ("item2index", "user2index", "text"):
        (exported / f"shop.{ending}").unlink()
    report = make_folder(read_unisrec(exported, width=6), tmp_path / "back" / "shop")
    assert "no shop.item2index: items are called by their numbers" in str(report)
    vectors = np.fromfile(exported / "shop.feat1CLS", dtype=np.float32).reshape(-1, 6)
    feature = read_feature(report.folder, "text")
    for token, row in zip(feature.tokens, feature.rows, strict=True):
        np.testing.assert_array_equal(row, vectors[int(token)])


def test_vectors_go_to_the_items_of_another_folder_by_id(shop, exported):
    """The same items in another order, one of them unknown there, one known only there."""
    image = read_feature(shop, "image")
    write_feature(shop, "text", tokens=image.tokens, rows=image.rows, encoder="x", source="x")
    report = add_features(read_unisrec(exported, width=6, only_features=True), shop)
    feature, expected = read_feature(shop, "text"), read_as_unisrec_does(exported, width=6)
    assert set(feature.tokens) == set(ITEMS)
    for token, row in zip(feature.tokens, feature.rows, strict=True):
        np.testing.assert_array_equal(row, expected[token])
    assert "1 without: not in shop.feat1CLS (such as item 'unsold')" in str(report)
    info = Manifest.load(shop).features["text"]
    assert info.encoder == "imported"
    assert info.settings["sha256"] == sha256_of(exported / "shop.feat1CLS")


def test_F38_extra_and_missing_items_are_counted_and_too_many_are_refused(shop, exported):
    index = exported / "shop.item2index"
    index.write_text(index.read_text().replace("null\t", "stranger\t"))
    imported = read_unisrec(exported, width=6, only_features=True)
    report = str(add_features(imported, shop))
    assert "feature 'text': 7 of 9 items" in report
    assert "2 without: not in shop.feat1CLS" in report
    assert "1 items of shop.feat1CLS are not in the dataset and were left out" in report
    with pytest.raises(DatasetError, match="2 of 9 items .* more than 10%.*'null'.*--max-missing"):
        add_features(imported, shop, max_missing=0.1)


def test_F38_ids_of_another_dataset_are_refused(shop, exported):
    index = exported / "shop.item2index"
    index.write_text("".join(f"other{number}\t{number}\n" for number in range(8)))
    with pytest.raises(DatasetError, match="none of the 9 items of shop is in shop.feat1CLS; are these the same ids"):
        add_features(read_unisrec(exported, width=6, only_features=True), shop)


@pytest.mark.parametrize(
    ("width", "cut", "message"),
    [
        (768, 0, "192 bytes, which is 8 rows of width 6: pass --width 6"),
        (6, 10, "182 bytes, which is no whole number of rows .cut short.*expected 8 rows of 6 float32, 192 bytes"),
        (6, 192, "0 bytes, which is no whole number of rows .cut short"),
        (6, 24, "168 bytes, which is 7 rows .of other items., expected 8 rows"),
    ],
)
def test_F43_a_file_of_another_size_is_refused(exported, width, cut, message):
    path = exported / "shop.feat1CLS"
    path.write_bytes(path.read_bytes()[: 192 - cut])
    with pytest.raises(DatasetError, match=message):
        read_unisrec(exported, width=width)


def test_F40_numbers_that_are_none_are_refused_with_their_items(exported):
    array = np.fromfile(exported / "shop.feat1CLS", dtype=np.float32)
    array[7] = np.nan
    array.tofile(exported / "shop.feat1CLS")
    token = (exported / "shop.item2index").read_text().splitlines()[1].split("\t")[0]
    with pytest.raises(DatasetError, match=rf"row 1 \(item '{re.escape(token)}'\): found NaN, infinity"):
        read_unisrec(exported, width=6)


def test_F39_a_npy_array_under_this_name_is_refused(exported):
    with open(exported / "shop.feat1CLS", "wb") as file:
        np.save(file, np.ones((8, 6), dtype=np.float32))
    with pytest.raises(DatasetError, match="found a .npy array, expected 8 rows of 6 float32"):
        read_unisrec(exported, width=6)


@pytest.mark.parametrize(
    ("ending", "edit", "message"),
    [
        ("item2index", lambda text: text.replace("\t3\n", "\t2\n"), "the number 2 belongs to"),
        ("item2index", lambda text: text.replace("\t3\n", "\t33\n"), "8 names, but none has the number 3"),
        ("item2index", lambda text: text.replace("\t3\n", " 3\n"), "line 4: .*expected a name, a tab and a number"),
        ("item2index", lambda text: text.replace("B01", "b01"), "1 names occur twice, such as .'b01'"),
        (
            "user2index",
            lambda text: text.split("\n")[0] + "\n",
            r"train.inter, line \d+: the user '\d', expected a num",
        ),
        ("train.inter", lambda text: text + "0\t1\t8\n", "the item '8', expected a number from 0 to 7"),
        ("train.inter", lambda text: text + "0\t1 x\t2\n", "the item 'x', expected a number from 0 to 7"),
        ("text", lambda text: text + "stranger\twhat\n", "1 items are not among the 8 of the dataset"),
        ("text", lambda text: text + "NA\tagain\n", "1 items occur twice"),
    ],
)
def test_files_that_do_not_fit_are_refused(exported, ending, edit, message):
    path = exported / f"shop.{ending}"
    path.write_text(edit(path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(DatasetError, match=message):
        read_unisrec(exported, width=6)


def test_pre_training_sets_are_refused(exported):
    (exported / "shop.item2index").unlink()
    path = exported / "shop.train.inter"
    path.write_text(path.read_text() + "0\t0-1\t0-2\n")
    with pytest.raises(DatasetError, match="the item '0-1' is no number .*several domains are not read"):
        read_unisrec(exported, width=6)


def test_what_is_missing_is_said(tmp_path, exported):
    with pytest.raises(DatasetError, match="no folder"):
        read_unisrec(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="neither <dataset>.feat1CLS nor <dataset>.train.inter"):
        read_unisrec(tmp_path / "empty")
    (exported / "shop.valid.inter").unlink()
    with pytest.raises(DatasetError, match="has no shop.valid.inter"):
        read_unisrec(exported, width=6)
    with pytest.raises(SettingError, match="the width is 0"):
        read_unisrec(exported, width=0)


def test_rows_of_zeros_are_no_content(exported, tmp_path):
    array = np.fromfile(exported / "shop.feat1CLS", dtype=np.float32).reshape(8, 6)
    array[2] = 0
    array.tofile(exported / "shop.feat1CLS")
    report = str(make_folder(read_unisrec(exported, width=6), tmp_path / "back" / "shop"))
    assert "1 rows of shop.feat1CLS are all zero, which is no content" in report
    assert "1 without: all its rows in shop.feat1CLS are zero" in report


# ---------------------------------------------------------------- places


def test_an_export_replaces_only_an_export(shop, exported, tmp_path):
    with pytest.raises(DatasetError, match="is there already; replace it with --overwrite"):
        export_unisrec(shop, tmp_path / "unisrec")
    before = {path.name: path.read_bytes() for path in exported.iterdir()}
    export_unisrec(shop, tmp_path / "unisrec", overwrite=True)
    assert {path.name: path.read_bytes() for path in exported.iterdir()} == before
    (exported / "notes.txt").write_text("mine")
    with pytest.raises(DatasetError, match="cannot be replaced: notes.txt is not of an export"):
        export_unisrec(shop, tmp_path / "unisrec", overwrite=True)
    with pytest.raises(DatasetError, match="cannot be replaced"):  # a prepared folder is none either
        export_unisrec(shop, shop.parent, overwrite=True)


def test_F48_an_export_that_fails_leaves_nothing(shop, tmp_path, monkeypatch):
    import dataset_prep.formats.unisrec as module

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_atomically", full)
    with pytest.raises(OSError, match="No space"):
        export_unisrec(shop, tmp_path / "unisrec")
    assert list((tmp_path / "unisrec").iterdir()) == []


def test_other_mistakes_of_an_export_are_said(shop, tmp_path):
    with pytest.raises(DatasetError, match="has no feature 'text'|has no feature 'words'"):
        export_unisrec(shop, tmp_path / "out", chosen={"text": "words"})
    with pytest.raises(SettingError, match="missing is 'guess'"):
        export_unisrec(shop, tmp_path / "out", missing="guess")
    with pytest.raises(DatasetError, match="has no column session_id, only user_id.*--user"):
        export_unisrec(shop, tmp_path / "out", user="session_id")


def test_the_commands_do_the_same(shop, tmp_path, capsys):
    assert main(["export", "unisrec", "--dataset", str(shop), "--out", str(tmp_path / "unisrec")]) == 0
    source = str(tmp_path / "unisrec" / "shop")
    out = ["--out", str(tmp_path / "back"), "--name", "again"]
    assert main(["import", "unisrec", "--folder", source, "--width", "6", *out]) == 0
    assert "feature 'text': 8 of 8 items" in capsys.readouterr().out
    assert main(["check", str(tmp_path / "back" / "again")]) == 0
    assert main(["import", "unisrec", "--folder", source, "--width", "6", "--dataset", str(shop)]) == 0
    assert main(["import", "unisrec", "--folder", source, *out]) == 3
    assert "is there already" in capsys.readouterr().err
    assert main(["import", "unisrec", "--folder", source, "--dataset", str(shop), "--name", "x"]) == 2
    assert "leave the latter out" in capsys.readouterr().err
