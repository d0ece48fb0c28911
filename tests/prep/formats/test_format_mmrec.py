"""MMRec's files: what is written is what MMRec reads, labels mean the same, and what is read is what was written."""

from __future__ import annotations

import csv
import pickle
from pathlib import Path

import numpy as np
import pytest
from small_shop import ITEMS, USERS, part_rows, user_histories, write_shop, write_split_shop

from dataset_prep.__main__ import main
from dataset_prep.formats.imported import add_features, make_folder
from dataset_prep.formats.mmrec import export_mmrec, read_mmrec
from recbole_mm.data.files import read_table, sha256_of
from recbole_mm.data.layout import Manifest, check_folder, folder_kind, read_feature
from recbole_mm.errors import DatasetError, SettingError, UnsafeFileError


@pytest.fixture
def shop(tmp_path) -> Path:
    return write_shop(tmp_path / "dataset" / "shop")


@pytest.fixture
def exported(shop, tmp_path) -> Path:
    return export_mmrec(shop, tmp_path / "mmrec").folder


def read_as_mmrec_does(folder: Path) -> list[tuple[str, str, int]]:
    """User, item and label of each row, by the ids of the mapping files."""
    import pandas as pd

    frame = pd.read_csv(folder / f"{folder.name}.inter", sep="\t", usecols=["userID", "itemID", "x_label"])
    names = {}
    for file, number in (("i_id_mapping.csv", "itemID"), ("u_id_mapping.csv", "userID")):
        with open(folder / file, encoding="utf-8", newline="") as lines:
            rows = list(csv.DictReader(lines, delimiter="\t"))
        names[number] = {int(row.pop(number)): next(iter(row.values())) for row in rows}
    return [
        (names["userID"][user], names["itemID"][item], label)
        for user, item, label in zip(frame["userID"], frame["itemID"], frame["x_label"], strict=True)
    ]


def write_mmrec(folder: Path, lines: list[str], *, header: str = "userID\titemID\tx_label", n_items: int = 4) -> Path:
    folder.mkdir(parents=True)
    (folder / f"{folder.name}.inter").write_text("\n".join([header, *lines]) + "\n")
    rows = np.random.default_rng(5).normal(size=(n_items, 3))
    np.save(folder / "image_feat.npy", rows)
    return folder


# ---------------------------------------------------------------- export


def test_the_labels_of_a_plain_folder_leave_the_last_two_items_out(exported, shop):
    expected = []
    for user, items in USERS.items():
        names = [ITEMS[number] for number in items]
        labels = [0] * (len(items) - 2) + [1, 2] if len(items) > 2 else [0] * len(items)
        expected += [(user, name, label) for name, label in zip(names, labels, strict=True)]
    assert sorted(read_as_mmrec_does(exported)) == sorted(expected)
    before = read_table(shop / "shop.inter", needed=["user_id", "item_id"])
    rows = [(user, item) for user, item, _ in read_as_mmrec_does(exported)]
    assert rows == list(zip(before["user_id"], before["item_id"], strict=True))  # in the order of the file


def test_row_r_of_the_arrays_is_item_r(exported, shop):
    image = read_feature(shop, "image")
    with open(exported / "i_id_mapping.csv", encoding="utf-8", newline="") as file:
        numbers = {row["asin"]: int(row["itemID"]) for row in csv.DictReader(file, delimiter="\t")}
    array = np.load(exported / "image_feat.npy")
    assert array.shape == (8, 4)
    assert array.dtype == np.float32
    for token, row in zip(image.tokens, image.rows, strict=True):
        np.testing.assert_array_equal(array[numbers[token]], row)
    for token in set(ITEMS) - set(image.tokens):
        assert not array[numbers[token]].any()


def test_the_report_of_an_export_tells_what_was_done(shop, tmp_path):
    report = str(export_mmrec(shop, tmp_path / "mmrec", missing="mean"))
    assert "4 users, 8 items, 8 training interactions, 3 validation interactions, 3 test interactions" in report
    assert "1 users with fewer than 3 interactions are in training only" in report
    assert "feature 'image': 2 of 8 items have no vector and got the mean of the others" in report
    assert "feature 'text': 3 items have several rows, which were averaged" in report


def test_sessions_of_a_split_folder_are_users_and_count_each_interaction_once(tmp_path):
    split_shop = write_split_shop(tmp_path / "dataset" / "shop")
    report = export_mmrec(split_shop, tmp_path / "mmrec")
    expected = []
    for user, numbers in USERS.items():
        labels = [0] * (len(numbers) - 2) + [1, 2] if len(numbers) > 2 else [0, 2]
        expected += [(user, ITEMS[number], label) for number, label in zip(numbers, labels, strict=True)]
    assert sorted(read_as_mmrec_does(report.folder)) == sorted(expected)
    header = (report.folder / "shop.inter").read_text().split("\n")[0]
    assert header == "userID\titemID\tx_label"  # a split folder has no times
    assert "users or sessions have no training rows" in str(report)


def test_an_export_without_features_is_refused(tmp_path, shop):
    (shop / "manifest.json").unlink()
    with pytest.raises(DatasetError, match="neither the feature image nor text, only .*MMRec needs one of them"):
        export_mmrec(shop, tmp_path / "mmrec")


# ---------------------------------------------------------------- round trips


def test_a_plain_folder_comes_back_as_it_was(shop, exported, tmp_path):
    report = make_folder(read_mmrec(exported), tmp_path / "back" / "shop")
    assert folder_kind(report.folder) == "interactions"
    before, after = (
        read_table(folder / "shop.inter", needed=["user_id", "item_id", "timestamp", "rating"])
        for folder in (shop, report.folder)
    )
    assert before.to_dict("list") == after[list(before)].to_dict("list")
    image, again = read_feature(shop, "image"), read_feature(report.folder, "image")
    vectors = dict(zip(image.tokens, image.rows, strict=True))
    assert set(again.tokens) == set(vectors)  # rows of zeros are no content
    for token, row in zip(again.tokens, again.rows, strict=True):
        np.testing.assert_array_equal(row, vectors[token])
    check_folder(report.folder)


def test_a_split_folder_comes_back_with_the_same_histories(tmp_path):
    exported = export_mmrec(write_split_shop(tmp_path / "dataset" / "shop"), tmp_path / "mmrec").folder
    folder = make_folder(read_mmrec(exported, split="none"), tmp_path / "back" / "shop").folder
    assert user_histories(folder) == {user: [ITEMS[n] for n in numbers] for user, numbers in USERS.items()}


@pytest.mark.parametrize("split", ["given", "none"])
def test_what_is_exported_again_is_the_same(exported, tmp_path, split):
    back = make_folder(read_mmrec(exported, split=split), tmp_path / "back" / "shop").folder
    again = export_mmrec(back, tmp_path / "again").folder
    assert sorted(read_as_mmrec_does(again)) == sorted(read_as_mmrec_does(exported))
    if split == "none":
        for path in exported.iterdir():
            assert sha256_of(path) == sha256_of(again / path.name)


# ---------------------------------------------------------------- import


def test_a_random_split_becomes_rows_whose_prefix_is_what_was_trained_on(tmp_path):
    lines = ["0\t0\t1\t10", "0\t1\t0\t20", "0\t2\t2\t30", "0\t3\t0\t40", "1\t2\t0\t5", "1\t1\t2\t6", "2\t3\t2\t1"]
    source = write_mmrec(tmp_path / "toys", lines, header="userID\titemID\tx_label\ttimestamp")
    report = make_folder(read_mmrec(source), tmp_path / "dataset" / "toys")
    assert part_rows(report.folder, "train") == [("0", ["1"], "3")]
    assert part_rows(report.folder, "valid") == [("0", ["1", "3"], "0")]
    assert part_rows(report.folder, "test") == [("0", ["1", "3", "0"], "2"), ("1", ["2"], "1")]
    assert "1 validation and test interactions are of users without training ones" in str(report)
    assert "2 of 4 validation and test interactions are older than a training one" in str(report)
    assert Manifest.load(report.folder).settings["split"] == "given"


def test_without_times_the_order_of_the_file_is_kept_and_said(tmp_path):
    source = write_mmrec(tmp_path / "toys", ["0\t3\t0", "0\t1\t0", "0\t2\t1", "0\t0\t2"])
    report = make_folder(read_mmrec(source), tmp_path / "dataset" / "toys")
    assert user_histories(report.folder) == {"0": ["3", "1", "2", "0"]}
    assert "there are no timestamps: the order of the file is taken for that of time" in str(report)
    assert "no i_id_mapping.csv: items are called by their numbers" in str(report)


def test_labels_that_are_left_out_are_said(tmp_path):
    source = write_mmrec(tmp_path / "toys", ["0\t3\t2", "0\t1\t0", "0\t2\t1", "0\t0\t0"])
    report = make_folder(read_mmrec(source, split="none"), tmp_path / "dataset" / "toys")
    assert "the labels for training, validation and test were left out" in str(report)


def test_F39_other_types_are_cast_and_objects_are_refused(tmp_path):
    source = write_mmrec(tmp_path / "toys", ["0\t3\t0", "0\t1\t0", "0\t2\t1", "0\t0\t2"])
    rows = np.arange(1.0, 13).reshape(4, 3)
    for array in (rows, rows.astype(">f4"), np.asfortranarray(rows), rows.astype(np.int64)):
        np.save(source / "image_feat.npy", array)
        vectors = read_mmrec(source).features["image"]
        np.testing.assert_array_equal(vectors.rows, rows.astype(np.float32))
        assert vectors.rows.dtype == np.float32
        assert f"image_feat.npy has dtype {array.dtype.str}; stored as float32" in vectors.remarks
    np.save(source / "image_feat.npy", rows[:, 0])
    with pytest.raises(DatasetError, match=r"found \(4,\) of float64, expected \(rows, width\) of floats"):
        read_mmrec(source)
    np.save(source / "image_feat.npy", np.array([[None] * 3] * 4), allow_pickle=True)
    with pytest.raises(UnsafeFileError, match="holds Python objects"):
        read_mmrec(source)
    (source / "image_feat.npy").write_bytes(pickle.dumps(rows))
    with pytest.raises(UnsafeFileError, match="holds Python objects"):
        read_mmrec(source)


def test_F38_rows_that_are_not_the_items_are_refused(tmp_path, exported):
    np.save(exported / "image_feat.npy", np.ones((7, 4)))
    with pytest.raises(DatasetError, match=r"found \(7, 4\) of float64, expected \(8, width\), a row for each item"):
        read_mmrec(exported)
    source = write_mmrec(tmp_path / "toys", ["0\t3\t0", "0\t9\t0"])
    with pytest.raises(DatasetError, match="has items up to 9, image_feat.npy has 4 rows"):
        read_mmrec(source)


def test_F40_infinity_is_refused_with_its_item(tmp_path):
    source = write_mmrec(tmp_path / "toys", ["0\t3\t0"])
    np.save(source / "image_feat.npy", np.array([[1.0], [2], [np.inf], [1e300]]))
    with pytest.raises(DatasetError, match=r"2 problem(.|\n)*row 2 \(item '2'\)(.|\n)*row 3 \(item '3'\)"):
        read_mmrec(source)


def test_F40_equal_rows_are_said(tmp_path):
    source = write_mmrec(tmp_path / "toys", ["0\t3\t0"])
    np.save(source / "image_feat.npy", np.array([[1.0], [2], [2], [3]]))
    assert "2 rows of image_feat.npy are equal to another" in read_mmrec(source).features["image"].remarks[-1]
    np.save(source / "image_feat.npy", np.ones((4, 2)))
    assert "carries no information" in read_mmrec(source).features["image"].remarks[-1]


@pytest.mark.parametrize(
    ("lines", "header", "message"),
    [
        (["0\t3\t3"], "userID\titemID\tx_label", "line 2: x_label is '3', expected 0, 1 or 2"),
        (["a\t3\t0"], "userID\titemID\tx_label", "line 2: userID is 'a', expected a number, 0 or more"),
        (["0\t3\t0", "0\t-1\t0"], "userID\titemID\tx_label", "line 3: itemID is '-1', expected a number"),
        (["0\t3\t0\tnan"], "userID\titemID\tx_label\ttimestamp", "timestamp is 'nan', expected a finite number"),
        (["0\t3"], "userID\titemID\tx_label", "line 2: 2 fields, the header has 3"),
        (["0\t3"], "userID\titemID", "has no column x_label; its columns are userID, itemID"),
        ([], "userID\titemID\tx_label", "has a header but no rows"),
    ],
)
def test_rows_that_cannot_be_used_are_refused(tmp_path, lines, header, message):
    with pytest.raises(DatasetError, match=message):
        read_mmrec(write_mmrec(tmp_path / "toys", lines, header=header))


def test_other_mistakes_are_said(tmp_path, exported):
    with pytest.raises(DatasetError, match="no folder"):
        read_mmrec(tmp_path / "nowhere")
    with pytest.raises(SettingError, match="split is 'random'"):
        read_mmrec(exported, split="random")
    mapping = exported / "i_id_mapping.csv"
    mapping.write_text(mapping.read_text().replace("\t1\n", "\tone\n"))
    with pytest.raises(DatasetError, match="i_id_mapping.csv: 'one' is no number"):
        read_mmrec(exported)
    (exported / "shop.inter").unlink()
    mapping.unlink()
    with pytest.raises(DatasetError, match="no .inter file"):
        read_mmrec(exported)


def test_the_commands_do_the_same(shop, tmp_path, capsys):
    assert main(["export", "mmrec", "--dataset", str(shop), "--out", str(tmp_path / "mmrec")]) == 0
    source = str(tmp_path / "mmrec" / "shop")
    assert main(["import", "mmrec", "--folder", source, "--out", str(tmp_path / "back"), "--name", "again"]) == 0
    assert main(["check", str(tmp_path / "back" / "again")]) == 0
    assert main(["import", "mmrec", "--folder", source, "--dataset", str(shop), "--max-missing", "0.1"]) == 3
    assert "3 of 9 items of shop have no vector in image_feat.npy, more than 10%" in capsys.readouterr().err


def test_vectors_go_to_another_folder_by_id(shop, exported):
    report = add_features(read_mmrec(exported, only_features=True), shop)
    image = np.load(exported / "image_feat.npy")
    with open(exported / "i_id_mapping.csv", encoding="utf-8", newline="") as file:
        numbers = {row["asin"]: int(row["itemID"]) for row in csv.DictReader(file, delimiter="\t")}
    feature = read_feature(shop, "image")
    for token, row in zip(feature.tokens, feature.rows, strict=True):
        np.testing.assert_array_equal(row, image[numbers[token]])
    assert "2 without: all its rows in image_feat.npy are zero" in str(report)
