"""Features of a folder: from texts, pictures and vectors made elsewhere, by function and by command line."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset_prep import feature_command
from dataset_prep.__main__ import main
from dataset_prep.encoders import build_encoder
from dataset_prep.features import import_vectors, item_texts, make_feature, read_items
from recbole_mm.data.files import read_table, write_table
from recbole_mm.data.layout import Manifest, check_folder, read_feature
from recbole_mm.errors import DatasetError, SettingError

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT.parent / "shared" / "data" / "ml-100k-mm"


class LetterCounts:
    """Stub encoder: how often a, b and c occur."""

    name, source, settings = "letters", "text", {"width": 3}

    def __init__(self) -> None:
        self.fitted_on: list[str] = []

    def fit(self, everything):
        self.fitted_on = list(everything)

    def encode(self, batch):
        return [np.array([text.count(letter) for letter in "abc"], dtype=np.float32) for text in batch]


@pytest.fixture
def shop(tmp_path) -> Path:
    """Five items: 1 and 5 whole, 2 with a broken picture, 3 without its file, 4 without text and picture."""
    folder = tmp_path / "shop"
    (folder / "images").mkdir(parents=True)
    tokens = ["1", "2", "3", "4", "5"]
    write_table(
        folder / "shop.inter",
        {
            "user_id:token": ["u"] * 5,
            "item_id:token": tokens,
            "timestamp:float": [1.0, 2.0, 3.0, 4.0, 5.0],
        },
    )
    write_table(
        folder / "shop.item",
        {
            "item_id:token": tokens,
            "image:token": ["images/1.png", "images/2.png", "images/3.png", "", "images/1.png"],
            "description:token_seq": ["aa bb. Cc bb", "", "<b>a &amp; c</b>", "<p></p>", "bb"],
            "title:token_seq": ["A cab", "cc", "A cab", " ", "bb"],
            "categories:token_seq": ["aa_a bb", "", "", "", ""],
        },
    )
    Image.new("RGB", (8, 8), "red").save(folder / "images/1.png")
    (folder / "images/2.png").write_text("<html>404</html>")
    return folder


# ---------------------------------------------------------------- texts


def test_each_sentence_gets_a_row_title_first_and_none_twice(shop):
    texts = item_texts(read_items(shop), columns=["title", "categories", "description"], rows="sentence")
    assert texts == [["A cab", "aa a bb", "aa bb.", "Cc bb"], ["cc"], ["A cab", "a & c"], [], ["bb"]]


def test_an_item_is_one_text_or_its_first_sentences(shop):
    items = read_items(shop)
    whole = item_texts(items, columns=["title", "description"], rows="item")
    assert whole == [["A cab aa bb. Cc bb"], ["cc"], ["A cab a & c"], [], ["bb bb"]]
    assert item_texts(items, columns=["title", "description"], rows="sentence", max_rows=2)[0] == ["A cab", "aa bb."]


def test_rows_go_to_their_items_in_order(shop):
    encoder = LetterCounts()
    report = make_feature(shop, "text", encoder=encoder, progress=False)
    feature = read_feature(shop, "text")
    assert feature.tokens == ["1", "2", "3", "5"] and feature.counts.tolist() == [4, 1, 2, 1]
    expected = [[1, 1, 1], [3, 2, 0], [2, 2, 0], [0, 2, 1], [0, 0, 2], [1, 1, 1], [1, 0, 1], [0, 2, 0]]
    assert feature.rows.tolist() == expected
    assert encoder.fitted_on[1] == "cc" and len(encoder.fitted_on) == 4
    assert (report.n_items, report.n_filled, report.shape, report.missing) == (5, 4, (8, 3), {"no text": 1})
    info = Manifest.load(shop).features["text"]
    assert (info.encoder, info.source) == ("letters", "title, categories, description")
    settings = dict(info.settings)
    assert len(settings.pop("inputs_sha256")) == len(settings["engine"].pop("key")) == 64
    assert settings == {
        "columns": ["title", "categories", "description"],
        "rows": "sentence",
        "max_rows": 10,
        "width": 3,
        "missing": [{"reason": "no text", "items": 1, "such_as": "4"}],
        "engine": {"version": 1, "shard_size": 512},
    }


def test_many_texts_in_several_batches_stay_in_order(shop, monkeypatch):
    make_feature(shop, "text", encoder=LetterCounts(), progress=False)
    at_once = read_feature(shop, "text").rows.tolist()
    monkeypatch.setattr("dataset_prep.features.TEXTS_AT_ONCE", 3)
    make_feature(shop, "text", encoder=LetterCounts(), progress=False)
    assert read_feature(shop, "text").rows.tolist() == at_once


def test_one_row_per_item_needs_no_counts(shop):
    make_feature(shop, "text", encoder=LetterCounts(), rows="item", columns=["title"], progress=False)
    assert read_feature(shop, "text").rows.tolist() == [[1, 1, 1], [0, 0, 2], [1, 1, 1], [0, 2, 0]]
    assert Manifest.load(shop).features["text"].counts is None


def test_a_text_of_unknown_words_is_missing_and_not_zero(shop):
    write_table(shop / "shop.item", {"item_id:token": ["1", "2"], "title:token_seq": ["ab", "xyz"]})
    report = make_feature(shop, "text", encoder=LetterCounts(), progress=False)
    assert report.missing == {"no known word in its text": 1} and read_feature(shop, "text").tokens == ["1"]


def test_sentences_of_unknown_words_are_left_out_and_reported(shop):
    write_table(
        shop / "shop.item",
        {"item_id:token": ["1", "2"], "title:token_seq": ["ab", "c"], "description:token_seq": ["Xyz.", "b"]},
    )
    report = make_feature(shop, "text", encoder=LetterCounts(), progress=False)
    assert report.remarks == ("1 texts hold no word that the encoder knows and got no row",)
    assert read_feature(shop, "text").counts.tolist() == [1, 2]


def test_equal_rows_are_remarked_on(shop):
    write_table(shop / "shop.item", {"item_id:token": ["1", "2"], "title:token_seq": ["ab", "ab"]})
    report = make_feature(shop, "text", encoder=LetterCounts(), progress=False)
    assert report.remarks == ("all rows are equal: this feature carries no information",)


def test_the_same_texts_give_the_same_bytes(shop):
    contents = []
    for _ in range(2):
        make_feature(shop, "text", progress=False)
        contents.append((shop / "features/text.npy").read_bytes() + (shop / "manifest.json").read_bytes())
    assert contents[0] == contents[1]


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"columns": ["brand"]}, DatasetError, "has no column brand; its columns are image, description, title"),
        ({"rows": "word"}, SettingError, r"rows is 'word', expected one of \['sentence', 'item'\]"),
        ({"max_rows": 0}, SettingError, "max_rows is 0, expected at least 1"),
    ],
)
def test_wrong_text_settings_are_refused(shop, arguments, kind, message):
    with pytest.raises(kind, match=message):
        make_feature(shop, "text", progress=False, **arguments)
    assert not (shop / "manifest.json").exists()


def test_a_table_without_text_or_without_content_is_refused(shop):
    write_table(shop / "shop.item", {"item_id:token": ["1"], "price:float": [1.0]})
    with pytest.raises(DatasetError, match="none of the text columns title, .* only price; choose with --columns"):
        make_feature(shop, "text", progress=False)
    write_table(shop / "shop.item", {"item_id:token": ["1"], "title:token_seq": ["<br>"]})
    with pytest.raises(DatasetError, match="none of the 1 items has text"):
        make_feature(shop, "text", progress=False)


def test_a_folder_without_items_or_with_an_item_twice_is_refused(shop):
    write_table(shop / "shop.item", {"item_id:token": ["1", "1"], "title:token_seq": ["a", "b"]})
    with pytest.raises(DatasetError, match=r"1 items occur twice, such as \['1'\]; keep one row each"):
        make_feature(shop, "text", progress=False)
    (shop / "shop.item").unlink()
    with pytest.raises(DatasetError, match=r"has no shop\.item, the table of its items"):
        make_feature(shop, "text", progress=False)
    with pytest.raises(DatasetError, match="no dataset folder"):
        make_feature(shop / "none", "text", progress=False)


# ---------------------------------------------------------------- pictures


def test_items_without_a_usable_picture_are_counted_and_left_out(shop):
    report = make_feature(shop, "image", progress=False)
    assert read_feature(shop, "image").tokens == ["1", "5"]
    assert report.missing == {"picture html": 1, "picture file missing": 1, "no picture named": 1}
    assert report.examples == {"picture html": "2", "picture file missing": "3", "no picture named": "4"}
    assert "1 without: picture html (such as item '2')" in str(report)
    assert check_folder(shop)[0].startswith("feature 'image' covers 2 of 5 items, not ['2', '3', '4']")


def test_pictures_may_lie_elsewhere_by_path_or_by_item(shop, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "images").mkdir(parents=True)
    Image.new("RGB", (8, 8), "blue").save(elsewhere / "images/3.png")
    make_feature(shop, "image", images=elsewhere, progress=False)
    assert read_feature(shop, "image").tokens == ["3"]

    write_table(shop / "shop.item", {"item_id:token": ["x", "3"], "title:token_seq": ["X", "3"]})
    make_feature(shop, "image", images=elsewhere / "images", progress=False)
    assert read_feature(shop, "image").tokens == ["3"]
    assert Manifest.load(shop).features["image"].source == "item_id"


def test_pictures_that_cannot_be_found_are_refused_with_a_remedy(shop, tmp_path):
    with pytest.raises(DatasetError, match="no folder of pictures"):
        make_feature(shop, "image", images=tmp_path / "none", progress=False)
    with pytest.raises(DatasetError, match="has no column photo, only .* choose the column with --column"):
        make_feature(shop, "image", column="photo", progress=False)
    shutil.rmtree(shop / "images")
    with pytest.raises(DatasetError, match=r"no item of 5 has content \(4 picture file missing, 1 no picture named\)"):
        make_feature(shop, "image", progress=False)


# ---------------------------------------------------------------- vectors


def vectors(shop: Path, array: np.ndarray) -> Path:
    np.save(shop.parent / "clip.npy", array, allow_pickle=True)
    return shop.parent / "clip.npy"


def test_vectors_made_elsewhere_are_matched_by_row(shop):
    rows = np.arange(10, dtype=np.float16).reshape(5, 2)
    rows[3] = 0
    report = import_vectors(shop, "image", file=vectors(shop, rows), zero_is_missing=True)
    feature = read_feature(shop, "image")
    assert feature.tokens == ["1", "2", "3", "5"] and feature.rows.dtype == np.float32
    assert np.array_equal(feature.rows, rows[[0, 1, 2, 4]].astype(np.float32))
    assert report.missing == {"the row is all zero": 1} and report.n_filled == 4


def test_vectors_of_a_larger_catalogue_are_matched_by_item(shop, capsys):
    rows = np.arange(12, dtype=np.float32).reshape(6, 2) + 1
    rows[4] = 0
    tokens = ["7", "5", "1", "x y", "3", "2"]  # no 4, and 3 without content
    (shop.parent / "all.txt").write_text("".join(f"{token}\n" for token in tokens))
    write_table(shop.parent / "all.item", {"item_id:token": tokens, "title:token_seq": tokens})
    for name in ("all.txt", "all.item"):
        arguments = ["--feature", "image", "--vectors", str(vectors(shop, rows)), "--zero-is-missing"]
        arguments += ["--vectors-items", str(shop.parent / name)]
        assert main(["features", "--dataset", str(shop), *arguments]) == 0
        feature = read_feature(shop, "image")
        assert feature.tokens == ["1", "2", "5"] and np.array_equal(feature.rows, rows[[2, 5, 1]])
        out = capsys.readouterr().out
        assert f"1 without: not in {name} (such as item '4')" in out and "1 without: the row is all zero" in out
        assert f"2 rows of {name} are of other items" in out
        assert Manifest.load(shop).features["image"].settings["items"] == name


def test_vectors_of_no_item_or_of_one_item_twice_are_refused(shop):
    file, names = vectors(shop, np.ones((2, 2))), shop.parent / "all.txt"
    for content, message in (
        ("8\n9\n", r"no item of 5 has content \(5 not in all.txt\)"),
        ("1\n1\n", "1 items occur twice"),
        ("1\n", r"has shape \(2, 2\), expected \(1, width\): one row per row of all.txt"),
    ):
        names.write_text(content)
        with pytest.raises(DatasetError, match=message):
            import_vectors(shop, "image", file=file, vector_items=names)
    with pytest.raises(DatasetError, match="cannot read nowhere.txt"):
        import_vectors(shop, "image", file=file, vector_items=Path("nowhere.txt"))
    with pytest.raises(DatasetError, match="name them with --vectors-items"):
        import_vectors(shop, "image", file=file)


def test_zero_rows_are_kept_and_remarked_on_without_the_flag(shop):
    rows = np.eye(5, 3, dtype=np.float32)
    report = import_vectors(shop, "image", file=vectors(shop, rows))
    assert report.n_filled == 5 and "2 rows are all zero; if these" in str(report)
    assert np.array_equal(read_feature(shop, "image").rows, rows)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones((4, 2)), r"has shape \(4, 2\), expected \(5, width\): one row per row of shop\.item, in that order"),
        (np.ones(5), r"has shape \(5,\), expected \(5, width\)"),
        (np.ones((5, 2), dtype=int), "has dtype int64, expected float32"),
        (np.ones((5, 2), dtype=object), "holds Python objects, a pickle, which can run any code; it was refused"),
        (np.full((5, 2), np.nan), r"NaN, infinity .* in 5 rows, such as row 0 \(item '1'\)"),
        (np.full((5, 2), 1e300), "values beyond float32 in 5 rows"),
        (np.zeros((5, 2)), r"no item of 5 has content \(5 the row is all zero\)"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(shop, array, message):
    with pytest.raises(DatasetError, match=message):
        import_vectors(shop, "image", file=vectors(shop, array), zero_is_missing=True)
    assert not (shop / "manifest.json").exists()


def test_a_file_that_is_no_array_is_refused(shop):
    path = shop.parent / "x.npy"
    with pytest.raises(DatasetError, match="no file .*x.npy"):
        import_vectors(shop, "image", file=path)
    path.write_text("hello")
    with pytest.raises(DatasetError, match=r"is no plain \.npy array .* save it with numpy\.save"):
        import_vectors(shop, "image", file=path)
    with open(path, "wb") as out:
        np.savez(out, a=np.ones(3))
    with pytest.raises(DatasetError, match="has shape an archive, expected"):
        import_vectors(shop, "image", file=path)


# ---------------------------------------------------------------- command line


def test_the_command_line_makes_features_and_checks_the_folder(shop, capsys):
    assert main(["features", "--dataset", str(shop), "--feature", "text", "--rows", "item", "--width", "2"]) == 0
    assert "feature 'text': 4 of 5 items, 4 rows of width 2\n  1 without: no text" in capsys.readouterr().out
    assert main(["features", "--dataset", str(shop), "--feature", "image"]) == 0
    file = vectors(shop, np.eye(5, dtype=np.float32))
    assert main(["features", "--dataset", str(shop), "--feature", "clip", "--vectors", str(file)]) == 0
    assert main(["check", str(shop)]) == 0
    out = capsys.readouterr().out
    assert "remark: feature 'image' covers 2 of 5" in out and "whole, 2 remark(s)" in out
    assert sorted(Manifest.load(shop).features) == ["clip", "image", "text"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--feature", "text", "--encoder", "tfdf"], 2, "SettingError: no encoder 'tfdf', only"),
        (["--feature", "text", "--columns", "brand"], 3, "DatasetError: .* has no column brand"),
        (["--feature", "text", "--vectors", "x.npy", "--encoder", "tfidf"], 2, "SettingError: --vectors brings"),
        (["--feature", "text", "--zero-is-missing"], 2, "SettingError: --zero-is-missing belongs to --vectors"),
        (["--feature", "text", "--vectors-items", "x"], 2, "SettingError: --vectors-items belongs to --vectors"),
        (["--feature", "text", "--encoder", "neighbour"], 2, "no encoder 'neighbour', .* did you mean 'neighbours'"),
        (["--feature", "text", "--option", "width"], 2, "--option is 'width', expected KEY=VALUE"),
        (["--feature", "text", "--option", "width=3", "--width", "3"], 2, "--option width is given twice, or beside"),
        (["--feature", "text", "--option", "width={"], 2, "--option width: '{' is no value in YAML"),
        (["--feature", "text", "--option", "widht=3"], 2, "encoder 'tfidf' has no option --widht; its settings are"),
        (["--feature", "text", "--vectors", "x.npy", "--ray"], 2, "--ray does not go with --vectors"),
        (
            ["--feature", "text_from_image", "--processes", "2"],
            2,
            "--processes does not go with the encoder neighbours",
        ),
        (["--feature", "text", "--processes", "2", "--ray"], 2, "--processes and --ray are two ways to run"),
        (["--feature", "image", "--device", "cpu"], 2, "SettingError: encoder 'histogram' has no option --device"),
        (["--feature", "../x", "--encoder", "tfidf"], 3, r"cannot be written: feature name '\.\./x'"),
    ],
)
def test_a_mistake_is_one_message_and_an_exit_code(shop, capsys, arguments, code, message):
    assert main(["features", "--dataset", str(shop), *arguments]) == code
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    assert re.search(message, captured.err)


def test_a_folder_with_problems_fails_the_check_with_code_3(shop, capsys):
    make_feature(shop, "text", progress=False)
    (shop / "features/text.npy").unlink()
    assert main(["check", str(shop)]) == 3
    assert "feature 'text': features/text.npy is missing; make it again with" in capsys.readouterr().err
    assert main(["check", str(shop / "none")]) == 3


def test_the_module_runs_as_a_program_from_inside_the_folder(shop):
    run = [sys.executable, "-m", "dataset_prep", "check", "."]
    result = subprocess.run(run, cwd=shop, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, f"{shop}: whole\n"), result.stderr
    result = subprocess.run([*run[:-2], "--help"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and "python -m dataset_prep features --dataset" in result.stdout


# ---------------------------------------------------------------- real data


@pytest.fixture
def real(tmp_path) -> Path:
    if not REAL.is_dir():
        pytest.skip(f"needs {REAL.name}, which is not part of the project")
    folder = tmp_path / REAL.name
    folder.mkdir()
    for ending in ("inter", "item"):
        shutil.copyfile(REAL / f"{REAL.name}.{ending}", folder / f"{REAL.name}.{ending}")
    return folder


@pytest.mark.slow
def test_tfidf_and_given_vectors_work_on_real_films(real):
    text = make_feature(real, "text", progress=False)
    image = import_vectors(real, "image", file=REAL / f"{REAL.name}.image_feat.npy", zero_is_missing=True)
    n_items = len(read_table(real / f"{real.name}.item"))
    assert text.n_items == image.n_items == n_items == 1682
    assert text.n_filled > 0.99 * n_items and text.shape[1] == 256
    assert 0.98 * n_items < image.n_filled < n_items and image.shape[1] == 1024
    remarks = check_folder(real)
    assert len(remarks) == 1 and remarks[0].startswith(f"feature 'image' covers {image.n_filled} of 1682")

    feature = read_feature(real, "text")
    position = {token: i for i, token in enumerate(feature.tokens)}
    starts = np.concatenate([[0], feature.counts.cumsum()])
    films = {
        name: feature.rows[starts[position[token]] : starts[position[token] + 1]].mean(axis=0)
        for name, token in (("Star Wars", "50"), ("The Empire Strikes Back", "172"), ("Sense and Sensibility", "275"))
    }
    space, sequel, novel = (vector / np.linalg.norm(vector) for vector in films.values())
    assert space @ sequel > space @ novel + 0.1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--width", "3"], {"width": 3}),
        (["--top-k", "5"], {"n_classes": 5}),
        (["--option", "max-length=128", "--option", "normalize=true"], {"max_length": 128, "normalize": True}),
        (["--option", "clip={model: x, batch_size: 2}"], {"clip": {"model": "x", "batch_size": 2}}),
        (["--option", "prompt=a = {}"], {"prompt": "a = {}"}),
        (["--batch-size", "8", "--model", "m"], {"batch_size": 8, "model": "m"}),
    ],
)
def test_options_of_encoders_are_given_by_flag_or_as_key_and_value(arguments, expected):
    parser = argparse.ArgumentParser()
    feature_command.add_command(parser.add_subparsers())
    options = parser.parse_args(["features", "--dataset", "x", "--feature", "text", *arguments])
    assert feature_command.encoder_options(options) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--feature", "text", "--images", "pictures"],
            "--images does not go with the encoder tfidf, which reads text",
        ),
        (["--feature", "text", "--per-item", "3"], "--per-item does not go with the encoder tfidf, which reads text"),
        (["--feature", "image", "--max-rows", "3"], "--max-rows does not go with the encoder histogram"),
        (["--feature", "image", "--vectors", "x.npy", "--columns", "title"], "--columns does not go with --vectors"),
    ],
)
def test_an_option_of_another_kind_of_feature_is_refused(shop, capsys, arguments, message):
    assert main(["features", "--dataset", str(shop), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_category_made_from_the_categories_is_not_said_twice(tmp_path):
    folder = tmp_path / "shop"
    columns = {"item_id:token": ["a", "b"], "title:token_seq": ["red hat", "blue cap"]}
    write_table(
        folder / "shop.item",
        {**columns, "categories:token_seq": ["wear hats", "wear caps"], "category:token": ["hats", "caps"]},
    )
    make_feature(folder, "text", encoder=build_encoder("tfidf", feature="text"))
    assert Manifest.load(folder).features["text"].source == "title, categories"


def test_F15_a_picture_s_path_does_not_lead_out_of_its_folder(shop):
    Image.new("RGB", (16, 16), "red").save(shop.parent / "outside.png")
    table = read_table(shop / "shop.item")
    types = table.attrs["types"]
    table["image"] = ["../outside.png", str(shop.parent / "outside.png"), "C:\\outside.png", "", table["image"].iloc[4]]
    write_table(shop / "shop.item", {f"{name}:{types[name]}": table[name].tolist() for name in table})
    report = make_feature(shop, "image", progress=False)
    assert report.missing == {"picture outside the folder": 3, "no picture named": 1} and report.n_filled == 1


def test_the_card_is_written_anew_only_when_something_has_changed(shop):
    assert main(["describe", str(shop), "--card"]) == 0
    command = ["features", "--dataset", str(shop), "--feature", "text"]
    assert main(command) == 0
    written = (shop / "DATASET.md").stat().st_mtime_ns
    assert "| text |" in (shop / "DATASET.md").read_text()
    assert main(command) == 0
    assert (shop / "DATASET.md").stat().st_mtime_ns == written
    assert main([*command, "--force"]) == 0
    assert (shop / "DATASET.md").stat().st_mtime_ns > written
