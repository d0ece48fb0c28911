"""Pseudo-modalities by neighbours: against a literal version, and by function and command line on a folder."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from dataset_prep.__main__ import main
from dataset_prep.pseudo import make_pseudo_feature, neighbour_means
from dataset_prep.reduction import reduce_features
from recbole_mm.data.files import write_table
from recbole_mm.data.layout import Manifest, check_folder, read_feature, write_feature
from recbole_mm.errors import DatasetError, SettingError


def literal_neighbour_means(
    source: np.ndarray, result: np.ndarray, has_result: np.ndarray, neighbours: int
) -> np.ndarray:
    """One item at a time, by Python's sort, which keeps the order of equals."""
    scaled = (source - source.mean(axis=0)) / source.std(axis=0)
    means = []
    for i, own in enumerate(scaled):
        others = [j for j in range(len(source)) if j != i and has_result[j]]
        cosine = {j: own @ scaled[j] / np.sqrt((own @ own) * (scaled[j] @ scaled[j])) for j in others}
        nearest = sorted(others, key=lambda j: -round(cosine[j], 9))[:neighbours]  # noqa: B023
        means.append(result[nearest].mean(axis=0))
    return np.array(means)


@pytest.fixture
def shop(tmp_path) -> Path:
    """Items a to f: tents a, b and c, lamps d, e and f; c has no picture, f no text, and a two texts."""
    folder = tmp_path / "shop"
    folder.mkdir()
    tokens = list("abcdef")
    write_table(folder / "shop.item", {"item_id:token": tokens, "title:token_seq": tokens})
    write_table(
        folder / "shop.inter",
        {"user_id:token": ["u"] * 6, "item_id:token": tokens, "timestamp:float": [float(i) for i in range(6)]},
    )
    text = np.array([[2, 0, 0], [0, 0, 0], [1, 0.1, 0], [1, 0, 0.1], [0, 1, 0], [0, 1.1, 0.1]], dtype=np.float32)
    counts = np.array([2, 1, 1, 1, 1])
    write_feature(folder, "text", tokens=list("abcde"), rows=text, counts=counts, encoder="-", source="-")
    image = np.array([[1, 0], [3, 0], [0, 5], [0, 7], [0, 9]], dtype=np.float32)
    write_feature(
        folder, "image", tokens=["f", "a", "b", "d", "e"], rows=image[[4, 0, 1, 2, 3]], encoder="-", source="-"
    )
    return folder


# ---------------------------------------------------------------- the rule


def test_the_fast_version_equals_the_literal_one():
    random = np.random.default_rng(0)
    source, result = random.normal(size=(60, 7)), random.normal(size=(60, 4))
    source[30:40] = source[:10]  # items that cannot be told apart: ties
    has_result = random.random(60) < 0.7
    for neighbours in (1, 2, 5, int(has_result.sum()) - 1):
        expected = literal_neighbour_means(source, result, has_result, neighbours)
        actual = neighbour_means(source, result, has_result, neighbours)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_blocks_change_nothing():
    random = np.random.default_rng(1)
    source, result, all_have = random.normal(size=(50, 6)), random.normal(size=(50, 3)), np.ones(50, dtype=bool)
    source[25:] = source[:25]
    whole = neighbour_means(source, result, all_have, 4)
    for at_once in (1, 130, 1000):
        assert np.array_equal(neighbour_means(source, result, all_have, 4, at_once=at_once), whole)


def test_an_item_is_not_its_own_neighbour_and_the_earlier_of_equals_counts():
    source = np.array([[1.0, 0], [1, 0], [1, 0], [0, 1]])
    result = np.array([[1.0], [2], [4], [8]])
    assert neighbour_means(source, result, np.ones(4, dtype=bool), 1).ravel().tolist() == [2, 1, 1, 1]
    assert neighbour_means(source, result, np.array([False, True, True, True]), 1).ravel().tolist() == [2, 4, 2, 2]


def test_the_scale_of_a_dimension_does_not_matter_and_a_constant_one_neither():
    random = np.random.default_rng(2)
    source, result, all_have = random.normal(size=(40, 5)), random.normal(size=(40, 3)), np.ones(40, dtype=bool)
    expected = neighbour_means(source, result, all_have, 3)
    other = np.c_[source * [1, 100, 0.01, 3, 1] + [0, 5, 0, -2, 1000], np.full(40, 0.1)]
    assert np.array_equal(neighbour_means(other, result, all_have, 3), expected)


def test_items_that_are_all_alike_get_the_first_ones():
    result, all_have = np.arange(5.0)[:, None], np.ones(5, dtype=bool)
    assert neighbour_means(np.full((5, 2), 0.1), result, all_have, 2).ravel().tolist() == [1.5, 1, 0.5, 0.5, 0.5]


# ---------------------------------------------------------------- the folder


def test_each_item_with_a_source_gets_a_row_out_of_its_neighbours(shop):
    report = make_pseudo_feature(shop, "image_from_text", neighbours=1)
    feature = read_feature(shop, "image_from_text")
    assert feature.tokens == ["a", "b", "c", "d", "e"] and feature.counts.tolist() == [1] * 5
    assert feature.rows[:2].tolist() == [[3, 0], [1, 0]] and feature.rows[3:].tolist() == [[0, 7], [0, 5]]
    assert feature.rows[2].tolist() in ([1, 0], [3, 0])  # c has no picture, and gets that of a tent
    assert (report.n_items, report.n_filled, report.shape, report.missing) == (6, 5, (5, 2), {"no text": 1})
    assert report.examples == {"no text": "f"} and "nothing is generated" in str(report)

    manifest = Manifest.load(shop)
    info = manifest.features["image_from_text"]
    assert (info.encoder, info.source, info.counts) == ("neighbours", "image, text", None)
    made_of = {name: manifest.files[f"features/{name}.npy"].sha256 for name in ("image", "text")}
    assert info.settings == {"neighbours": 1, "made_of": made_of}


def test_an_item_counts_with_the_mean_of_its_rows(shop):
    make_pseudo_feature(shop, "text_from_image", neighbours=1)
    feature = read_feature(shop, "text_from_image")
    assert feature.tokens == ["a", "b", "d", "e", "f"]
    b = feature.rows[feature.tokens.index("b")].tolist()
    assert b == [1, 0, 0]  # the mean of the two texts of a


def test_the_same_features_give_the_same_bytes(shop):
    contents = []
    for _ in range(2):
        make_pseudo_feature(shop, "image_from_text", neighbours=2)
        contents.append((shop / "features/image_from_text.npy").read_bytes() + (shop / "manifest.json").read_bytes())
    assert contents[0] == contents[1]


def test_items_that_the_table_does_not_list_are_left_out(shop):
    write_table(shop / "shop.item", {"item_id:token": list("edb"), "title:token_seq": list("edb")})
    make_pseudo_feature(shop, "image_from_text", neighbours=1)
    feature = read_feature(shop, "image_from_text")
    assert feature.tokens == ["e", "d", "b"] and feature.rows[:2].tolist() == [[0, 5], [0, 7]]


@pytest.mark.parametrize(
    ("name", "neighbours", "kind", "message"),
    [
        ("image", 5, SettingError, "called <result>_from_<source>, such as image_from_text, not 'image'"),
        ("_from_text", 5, SettingError, "not '_from_text'"),
        ("image_from_text", 0, SettingError, "neighbours is 0, expected at least 1"),
        ("image_from_text", 4, SettingError, "only 4 items of shop have both image and text; choose at most 3"),
        ("sound_from_text", 5, DatasetError, r"shop has no 'sound', only \['image', 'text'\]\n  make first: .*sound"),
        ("sound_from_smell", 5, DatasetError, "shop has no 'sound' and no 'smell'"),
    ],
)
def test_what_cannot_be_made_is_refused(shop, name, neighbours, kind, message):
    with pytest.raises(kind, match=message):
        make_pseudo_feature(shop, name, neighbours=neighbours)
    assert sorted(Manifest.load(shop).features) == ["image", "text"]


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="no dataset folder"):
        make_pseudo_feature(tmp_path / "none", "image_from_text")


# ---------------------------------------------------------------- across two features of CLIP


@pytest.fixture
def clip_shop(tmp_path) -> Path:
    """Texts and pictures in one space: the text of item i points to the picture of item i, then to that of i + 1."""
    folder = tmp_path / "shop"
    folder.mkdir()
    tokens = list("abcde")
    write_table(folder / "shop.item", {"item_id:token": tokens})
    pictures = np.eye(5, dtype=np.float32)
    texts = pictures + 0.5 * np.roll(pictures, 1, axis=1) + 3  # a constant part, as between CLIP's texts and pictures
    weights = {"weights_sha256": {"clip.bin": "1"}}
    for name, of, rows in (("clip_text", "abcd", texts), ("clip_image", "abcde", 2 * pictures)):
        write_feature(folder, name, tokens=list(of), rows=rows[: len(of)], encoder="clip", source="-", settings=weights)
    image = np.arange(10, dtype=np.float32).reshape(5, 2)
    write_feature(folder, "image", tokens=tokens, rows=image, encoder="-", source="-")
    return folder


def literal_across(texts: np.ndarray, pictures: np.ndarray, result: np.ndarray, neighbours: int) -> np.ndarray:
    means = []
    for i, text in enumerate(texts):
        cosine = {
            j: text @ picture / np.linalg.norm(text) / np.linalg.norm(picture)
            for j, picture in enumerate(pictures)
            if j != i
        }
        means.append(result[sorted(cosine, key=lambda j: -cosine[j])[:neighbours]].mean(axis=0))  # noqa: B023
    return np.array(means)


def test_the_nearest_other_picture_by_clip_is_taken(clip_shop):
    report = make_pseudo_feature(clip_shop, "image_from_text", by=("clip_text", "clip_image"))
    feature = read_feature(clip_shop, "image_from_text")
    assert feature.tokens == list("abcd")  # e has no text
    assert feature.rows.tolist() == [[2, 3], [4, 5], [6, 7], [8, 9]]  # never its own picture, always the next one
    assert report.missing == {"no clip_text": 1} and "whose clip_image is nearest to its clip_text" in str(report)
    info = Manifest.load(clip_shop).features["image_from_text"]
    assert info.settings["by"] == ["clip_text", "clip_image"] and info.settings["neighbours"] == 1
    assert sorted(info.settings["made_of"]) == ["clip_image", "clip_text", "image"]
    assert info.source == "image, clip_text, clip_image"


@pytest.mark.parametrize("neighbours", [1, 2, 4, 19])
def test_across_two_features_the_fast_version_equals_the_literal_one(tmp_path, neighbours):
    random = np.random.default_rng(3)
    folder = tmp_path / "shop"
    folder.mkdir()
    tokens = [f"i{i}" for i in range(20)]
    write_table(folder / "shop.item", {"item_id:token": tokens})
    features = {
        name: random.normal(size=(20, width)).astype(np.float32) for name, width in (("t", 6), ("p", 6), ("image", 3))
    }
    for name, rows in features.items():
        write_feature(folder, name, tokens=tokens, rows=rows, encoder="-", source="-")
    make_pseudo_feature(folder, "image_from_text", neighbours=neighbours, by=["t", "p"])
    expected = literal_across(features["t"], features["p"], features["image"], neighbours)
    np.testing.assert_allclose(read_feature(folder, "image_from_text").rows, expected, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_compared_is_refused(clip_shop):
    def refuse(message: str, by: list[str], kind: type = SettingError, neighbours: int | None = None) -> None:
        with pytest.raises(kind, match=message):
            make_pseudo_feature(clip_shop, "image_from_text", by=by, neighbours=neighbours)

    refuse(r"by is \['clip_text'\], expected two features", ["clip_text"])
    refuse("have the widths 5 and 2, so that they cannot be compared; make both with one CLIP", ["clip_text", "image"])
    refuse("but shop has no 'clip', only", ["clip_text", "clip"], DatasetError)
    refuse(
        "only 5 items of shop have both image and clip_image; choose at most 4",
        ["clip_text", "clip_image"],
        neighbours=5,
    )
    rows = np.eye(5, dtype=np.float32)
    other = {"weights_sha256": {"clip.bin": "2"}}
    write_feature(clip_shop, "other", tokens=list("abcde"), rows=rows, encoder="clip", source="-", settings=other)
    refuse("clip_text and other of shop were made with different weights", ["clip_text", "other"])


def test_a_pseudo_feature_stays_up_to_date_when_what_it_is_made_of_is_reduced(clip_shop):
    by = ("clip_text", "clip_image")
    make_pseudo_feature(clip_shop, "image_from_text", by=by)
    assert make_pseudo_feature(clip_shop, "image_from_text", by=by).up_to_date
    once = Manifest.load(clip_shop).features["image_from_text"]
    reduce_features(clip_shop, ["image", "image_from_text"], width=1, fit_on="all", progress=False)
    again = make_pseudo_feature(clip_shop, "image_from_text", by=by)
    assert again.up_to_date and "reduced from image_from_text_full" in str(again)
    manifest = Manifest.load(clip_shop)
    assert manifest.features["image_from_text"].shape[1] == 1
    full = manifest.features["image_from_text_full"]
    assert (full.settings, full.source) == (once.settings, once.source)


# ---------------------------------------------------------------- command line


def test_the_command_line_makes_a_pseudo_feature(shop, capsys):
    run = ["features", "--dataset", str(shop), "--feature", "image_from_text"]
    assert main([*run, "--encoder", "neighbours", "--neighbours", "2"]) == 0
    assert "feature 'image_from_text': 5 of 6 items, 5 rows of width 2\n  1 without: no text" in capsys.readouterr().out
    assert Manifest.load(shop).features["image_from_text"].settings["neighbours"] == 2
    assert main([*run, "--neighbours", "3"]) == 0  # its name tells the encoder
    assert Manifest.load(shop).features["image_from_text"].settings["neighbours"] == 3
    assert all(remark.startswith("feature") for remark in check_folder(shop))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["--feature", "image_from_text", "--columns", "title"],
            2,
            "--columns does not go with the encoder neighbours",
        ),
        (["--feature", "image_from_text", "--width", "3"], 2, "--width does not go with the encoder neighbours"),
        (["--feature", "text", "--neighbours", "3"], 2, "--neighbours does not go with the encoder tfidf"),
        (["--feature", "text", "--encoder", "neighbours"], 2, "called <result>_from_<source>"),
        (["--feature", "a_from_text"], 3, "has no 'a', only"),
        (["--feature", "x", "--vectors", "x.npy", "--neighbours", "3"], 2, "--neighbours does not go with --vectors"),
    ],
)
def test_a_mistake_is_one_message_and_an_exit_code(shop, capsys, arguments, code, message):
    assert main(["features", "--dataset", str(shop), *arguments]) == code
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err and re.search(message, captured.err)
