"""The pickles of MSM4SR's authors: every shape of them read, the padding left out, and nothing in them run."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from small_shop import ITEMS, user_histories, write_shop

from dataset_prep.__main__ import main
from dataset_prep.formats.imported import add_features, make_folder
from dataset_prep.formats.msm4sr import read_msm4sr
from recbole_mm.data.files import read_table
from recbole_mm.data.layout import Manifest, check_folder, read_feature
from recbole_mm.errors import DatasetError, SettingError, UnsafeFileError

WIDTH = 5


def vectors_of(n_rows: dict[str, int], *, seed: int = 0) -> dict[str, list[np.ndarray]]:
    random = np.random.default_rng(seed)
    return {token: list(random.normal(size=(n, WIDTH)).astype(np.float32)) for token, n in n_rows.items()}


def write_pickle(path: Path, content: object, *, protocol: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


@pytest.fixture
def released(tmp_path) -> Path:
    folder = tmp_path / "MP4SR" / "pantry"
    text = vectors_of({"a": 2, "b": 1, "c": 3, "only here": 1})
    write_pickle(folder / "desc_emb.pkl", text)
    write_pickle(folder / "image_emb_15.pkl", vectors_of({"c": 1, "a": 2}, seed=1))
    lines = ["u1,a,10", "u1,b,20", "u1,c,30", "u2,NA,5", "u1,b,40"]
    (folder / "pantry.inter").write_text("\n".join(["user_id,item_id,timestamp", *lines]) + "\n")
    return folder


def rows_by_item(folder: Path, name: str) -> dict[str, np.ndarray]:
    tokens, rows, counts = read_feature(folder, name)
    ends = np.cumsum(counts)
    return {token: rows[end - n : end] for token, end, n in zip(tokens, ends, counts, strict=True)}


# ---------------------------------------------------------------- what is read


def test_a_new_folder_has_the_interactions_and_both_features(released, tmp_path):
    report = make_folder(read_msm4sr(released), tmp_path / "dataset" / "pantry")
    assert user_histories(report.folder) == {"u1": ["a", "b", "c", "b"], "u2": ["NA"]}
    text = rows_by_item(report.folder, "text")
    for token, rows in vectors_of({"a": 2, "b": 1, "c": 3}).items():
        np.testing.assert_array_equal(text[token], np.stack(rows))
    assert {token: len(rows) for token, rows in rows_by_item(report.folder, "image").items()} == {"a": 2, "c": 1}
    told = str(report)
    assert "2 users, 4 items with interactions, 5 interactions" in told
    assert "1 interactions repeat an earlier pair of user and item; they were kept" in told
    assert "1 items of desc_emb.pkl are not in the dataset and were left out" in told
    assert "2 without: not in image_emb_15.pkl (such as item 'b')" in told
    assert len(check_folder(report.folder)) == 2  # the items without text or picture
    assert set(Manifest.load(report.folder).raw_files) == {"pantry.inter", "desc_emb.pkl", "image_emb_15.pkl"}


@pytest.mark.parametrize(
    "header", ["user_id:token,item_id:token,timestamp:float", "user_id:token\titem_id:token\ttimestamp:float"]
)
def test_a_header_may_have_types_and_tabs(released, tmp_path, header):
    path = released / "pantry.inter"
    body = path.read_text().split("\n", 1)[1]
    path.write_text(header + "\n" + (body.replace(",", "\t") if "\t" in header else body))
    report = make_folder(read_msm4sr(released), tmp_path / "dataset" / "pantry")
    assert user_histories(report.folder)["u1"] == ["a", "b", "c", "b"]


SHAPES = {
    "lists of arrays": lambda vectors: vectors,
    "lists of lists": lambda vectors: {token: [v.tolist() for v in rows] for token, rows in vectors.items()},
    "one array an item": lambda vectors: {token: np.stack(rows) for token, rows in vectors.items()},
    "tuples": lambda vectors: {token: tuple(rows) for token, rows in vectors.items()},
    "arrays of one row": lambda vectors: {token: [v[None] for v in rows] for token, rows in vectors.items()},
    "pairs": lambda vectors: [(token, v) for token, rows in vectors.items() for v in rows],
    "pairs of lists": lambda vectors: [[token, v.tolist()] for token, rows in vectors.items() for v in rows],
    "padded": lambda vectors: {t: [*rows, *np.zeros((3 - len(rows), WIDTH))] for t, rows in vectors.items()},
    "float64": lambda vectors: {token: [v.astype(">f8") for v in rows] for token, rows in vectors.items()},
    "ids of numpy": lambda vectors: {np.str_(token): rows for token, rows in vectors.items()},
    "numbers of numpy": lambda vectors: {token: [list(v) for v in rows] for token, rows in vectors.items()},
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_the_file_gives_the_same_vectors(released, shape):
    vectors = vectors_of({"a": 2, "b": 1, "c": 3})
    write_pickle(released / "desc_emb.pkl", SHAPES[shape](vectors))
    found = read_msm4sr(released, only_features=True).features["text"]
    assert found.tokens == list(vectors)
    assert found.counts.tolist() == [2, 1, 3]
    np.testing.assert_array_equal(found.rows, np.concatenate(list(vectors.values())))
    assert found.rows.dtype == np.float32


def test_rows_of_zeros_are_padding_and_counted(released, tmp_path):
    zero = np.zeros(WIDTH)
    write_pickle(released / "desc_emb.pkl", {"a": [zero, np.ones(WIDTH), zero], "b": [zero], "c": []})
    report = make_folder(read_msm4sr(released), tmp_path / "dataset" / "pantry")
    assert {token: len(rows) for token, rows in rows_by_item(report.folder, "text").items()} == {"a": 1}
    assert "3 rows of desc_emb.pkl are all zero, which is no content" in str(report)
    assert "2 without: all its rows in desc_emb.pkl are zero (such as item 'b')" in str(report)


def test_F38_features_find_the_items_of_a_folder_by_id(tmp_path):
    shop = write_shop(tmp_path / "dataset" / "shop")
    before = rows_by_item(shop, "text")
    vectors = vectors_of(dict.fromkeys([*ITEMS[::-1], "stranger"], 2))
    del vectors["null"]
    write_pickle(tmp_path / "files" / "desc_emb.pkl", vectors)
    report = add_features(read_msm4sr(tmp_path / "files", only_features=True), shop)
    after = rows_by_item(shop, "text")
    assert set(after) == set(ITEMS) - {"null"}
    assert before.keys() != after.keys()
    for token, rows in after.items():
        np.testing.assert_array_equal(rows, np.stack(vectors[token]))
    assert "2 without: not in desc_emb.pkl" in str(report)
    assert "1 items of desc_emb.pkl are not in the dataset" in str(report)
    assert read_feature(shop, "image") is not None  # others stay


# ---------------------------------------------------------------- what is refused


class Hostile:
    def __reduce__(self):
        return os.system, ("touch MARKER",)


@pytest.mark.parametrize("content", [Hostile(), {"a": [Hostile()]}, {"a": [np.ones(3)], Hostile(): []}])
def test_F55_a_hostile_pickle_is_refused_and_makes_no_marker(released, tmp_path, capsys, content):
    write_pickle(released / "desc_emb.pkl", content)
    with pytest.raises(UnsafeFileError, match=r"asks to import (posix|os)\.system(.|\n)*lists of plain numbers"):
        read_msm4sr(released)
    assert main(["import", "msm4sr", "--folder", str(released), "--out", str(tmp_path / "out")]) == 6
    assert "it was refused, and nothing was run" in capsys.readouterr().err
    assert not (tmp_path / "MARKER").exists()  # the working directory
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").glob("pantry"))


def test_F55_tensors_are_refused_with_a_remedy(released):
    import torch

    write_pickle(released / "desc_emb.pkl", {"a": [torch.ones(3)]})
    with pytest.raises(UnsafeFileError, match=r"asks to import torch(.|\n)*tensor\.numpy\(\)"):
        read_msm4sr(released)


def test_F39_an_array_of_objects_is_refused(released):
    write_pickle(released / "desc_emb.pkl", {"a": np.array([[1.0, "x"]], dtype=object)})
    with pytest.raises(UnsafeFileError, match="holds an array of Python objects") as error:
        read_msm4sr(released)
    assert error.value.exit_code == 6


def test_F43_a_pickle_cut_short_is_refused(released):
    path = released / "desc_emb.pkl"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DatasetError, match="desc_emb.pkl: found no whole pickle .*download it again"):
        read_msm4sr(released)


def test_F40_nan_and_infinity_are_refused_with_the_first_items(released):
    bad = {"a": [np.ones(3), np.array([1, np.nan, 2])], "b": [[1.0, float("inf"), 2.0]], "c": [[1e39, 1.0, 1.0]]}
    write_pickle(released / "desc_emb.pkl", bad)
    with pytest.raises(
        DatasetError, match=r"3 problem(.|\n)*row 1 \(item 'a'\): found NaN(.|\n)*item 'b'(.|\n)*item 'c'"
    ):
        read_msm4sr(released)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "found no item"),
        ([], "found no item"),
        ({"a": []}, "found no vector"),
        ([1.0, 2.0], "found a list, expected a dict from item id"),
        ("text", "found a str, expected a dict from item id"),
        (np.dtype("f4"), "found a piece of an array, expected a dict from item id"),
        (np.ones((3, 2)), r"found an array \(3, 2\) of float64, expected a dict"),
        ({7: [[1.0]]}, "found the id 7, expected a text in one line"),
        ({"": [[1.0]]}, "found the id '', expected a text"),
        ({"a\nb": [[1.0]]}, "expected a text in one line"),
        ({"a": 3}, "item 'a': found no list, expected a list of vectors"),
        ({"a": [[1.0, "x"]]}, "item 'a', vector 0: found a list, expected a list of numbers"),
        ({"a": [[1.0], None]}, "item 'a', vector 1: found a NoneType, expected a list of numbers"),
        ({"a": [[True, False]]}, "expected a list of numbers"),
        ({"a": [np.ones((2, 2))]}, "found an array .2, 2. of float64, expected a list of numbers"),
        ({"a": [[1.0, 2.0]], "b": [[1.0]]}, "item 'b': found a vector of width 1, expected 2"),
        ({"a": [[0.0, 0.0]]}, "found no row that is not all zero"),
        ({"a": [[2**2000]]}, "expected a list of numbers"),
    ],
)
def test_what_is_no_vectors_by_item_is_refused(released, content, message):
    write_pickle(released / "desc_emb.pkl", content)
    with pytest.raises(DatasetError, match=message):
        read_msm4sr(released)


def test_a_small_file_that_names_one_list_often_is_refused(released):
    """Ten bytes a name would otherwise become kilobytes each."""
    row = [1.5] * 100
    write_pickle(released / "desc_emb.pkl", {"a": [row] * 3000})
    with pytest.raises(DatasetError, match="numbers or more in .* bytes, expected each vector written out"):
        read_msm4sr(released)


def test_a_dict_that_holds_itself_is_refused(released):
    endless: dict = {}
    endless["a"] = endless
    write_pickle(released / "desc_emb.pkl", endless)
    with pytest.raises(DatasetError, match="numbers or more in .* bytes, expected each vector written out"):
        read_msm4sr(released)


def test_missing_files_and_columns_are_said(released, tmp_path):
    with pytest.raises(DatasetError, match="no folder"):
        read_msm4sr(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match="no file .*other.pkl"):
        read_msm4sr(released, text=released / "other.pkl")
    (released / "image_emb_10.pkl").write_bytes((released / "image_emb_15.pkl").read_bytes())
    with pytest.raises(SettingError, match="choose one with --image FILE"):
        read_msm4sr(released)
    assert read_msm4sr(released, image=released / "image_emb_10.pkl").features["image"].file == "image_emb_10.pkl"
    (released / "pantry.inter").write_text("user,item_id,timestamp\nu,a,1\n")
    with pytest.raises(DatasetError, match="has no column user_id; its columns are user, item_id, timestamp"):
        read_msm4sr(released, image=released / "image_emb_10.pkl")
    (released / "pantry.inter").unlink()
    with pytest.raises(DatasetError, match="no .inter file.*features alone go into an existing folder"):
        read_msm4sr(released, image=released / "image_emb_10.pkl")
    for path in released.glob("*.pkl"):
        path.unlink()
    with pytest.raises(DatasetError, match="has neither desc_emb.pkl nor image_emb_<N>.pkl"):
        read_msm4sr(released)


def test_bad_rows_are_refused_or_dropped_and_counted(released, tmp_path):
    with open(released / "pantry.inter", "a") as file:
        file.write("u3,a,yesterday\n")
    with pytest.raises(DatasetError, match="--bad-rows drop"):
        read_msm4sr(released)
    report = make_folder(read_msm4sr(released, bad_rows="drop"), tmp_path / "dataset" / "pantry")
    assert "1 interactions were dropped" in str(report)
    assert len(read_table(report.folder / "pantry.inter")) == 5


def test_the_command_makes_a_folder_or_adds_features(released, tmp_path, capsys):
    arguments = ["import", "msm4sr", "--folder", str(released)]
    assert main([*arguments, "--out", str(tmp_path / "dataset")]) == 0
    assert "2 users" in capsys.readouterr().out
    assert main([*arguments, "--dataset", str(tmp_path / "dataset" / "pantry")]) == 0
    assert "features added" in capsys.readouterr().out
    assert main([*arguments, "--dataset", str(tmp_path / "dataset" / "nothing")]) == 3
    assert "no dataset folder" in capsys.readouterr().err
