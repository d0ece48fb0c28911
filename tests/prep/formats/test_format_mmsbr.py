"""MMSBR's arrays for a folder that is there: each row finds its item through the list of names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_shop import ITEMS, write_shop

from dataset_prep.__main__ import main
from dataset_prep.formats.imported import add_features
from dataset_prep.formats.mmsbr import read_mmsbr
from recbole_mm.data.layout import Manifest, read_feature
from recbole_mm.errors import DatasetError, UnsafeFileError


@pytest.fixture
def arrays(tmp_path) -> Path:
    """Items in another order than the shop's, one of them unknown there."""
    folder = tmp_path / "mmsbr"
    folder.mkdir()
    names = np.array([*ITEMS[::-1], "stranger"])
    np.save(folder / "asinlist.npy", names)
    for number, file in enumerate(("imgMatrixpca.npy", "textMatrixpca.npy", "textImgMatrixpca.npy")):
        np.save(folder / file, np.random.default_rng(number).normal(size=(len(names), 4)))
    return folder


def test_F38_rows_find_their_items_by_name(arrays, tmp_path):
    shop = write_shop(tmp_path / "shop")
    report = add_features(read_mmsbr(arrays), shop)
    array = np.load(arrays / "imgMatrixpca.npy").astype(np.float32)
    feature = read_feature(shop, "image")
    assert set(feature.tokens) == set(ITEMS)
    for token, row in zip(feature.tokens, feature.rows, strict=True):
        np.testing.assert_array_equal(row, array[[*ITEMS[::-1]].index(token)])
    assert read_feature(shop, "image_from_text").rows.shape == (8, 4)
    assert "1 items of imgMatrixpca.npy are not in the dataset and were left out" in str(report)
    assert "no imgTextMatrixpca.npy" in str(report)


def test_what_is_wrong_is_said(arrays, tmp_path):
    np.save(arrays / "imgMatrixpca.npy", np.ones((3, 4)))
    with pytest.raises(DatasetError, match=r"found \(3, 4\) of float64, expected \(9, width\)"):
        read_mmsbr(arrays)
    np.save(arrays / "asinlist.npy", np.array(["a", "a", "c"]))
    with pytest.raises(DatasetError, match=r"asinlist.npy, \[1\]: found 'a', expected another name"):
        read_mmsbr(arrays)
    np.save(arrays / "asinlist.npy", np.array(["a", None], dtype=object), allow_pickle=True)
    with pytest.raises(UnsafeFileError, match="holds Python objects"):
        read_mmsbr(arrays)
    (arrays / "asinlist.npy").unlink()
    with pytest.raises(DatasetError, match="has no asinlist.npy(.|\n)*python -m dataset_prep released"):
        read_mmsbr(arrays)


def test_a_folder_without_arrays_is_refused(arrays):
    for path in arrays.glob("*pca.npy"):
        path.unlink()
    with pytest.raises(DatasetError, match="has none of imgMatrixpca.npy, textMatrixpca.npy"):
        read_mmsbr(arrays)


def test_the_command_adds_features(arrays, tmp_path, capsys):
    shop = write_shop(tmp_path / "shop")
    assert main(["import", "mmsbr", "--folder", str(arrays), "--dataset", str(shop)]) == 0
    assert "feature 'image': 8 of 9 items" in capsys.readouterr().out


def test_what_is_replaced_is_said_and_the_card_is_made_anew(arrays, tmp_path, capsys):
    shop = write_shop(tmp_path / "shop")
    assert main(["describe", str(shop), "--card"]) == 0
    before = (shop / "DATASET.md").read_text()
    replaces = "image" in Manifest.load(shop).features
    assert main(["import", "mmsbr", "--folder", str(arrays), "--dataset", str(shop)]) == 0
    assert ("replaced: the folder's features image" in capsys.readouterr().out) == replaces
    assert (shop / "DATASET.md").read_text() != before
    assert main(["import", "mmsbr", "--folder", str(arrays), "--dataset", str(shop)]) == 0
    assert "replaced: the folder's features image, image_from_text, text of before" in capsys.readouterr().out
