"""Reading tables byte for byte, features in and out, and a check that says everything at once."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from recbole_mm.data.files import file_info, numbers, read_table, write_table
from recbole_mm.data.layout import (
    FeatureInfo,
    Manifest,
    check_folder,
    data_fingerprint,
    folder_kind,
    interaction_files,
    read_feature,
    write_feature,
)
from recbole_mm.errors import DatasetError

ROWS = np.arange(8, dtype=np.float32).reshape(4, 2)


def table(tmp_path: Path, content: str | bytes) -> Path:
    path = tmp_path / "shop.item"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def shop(tmp_path: Path) -> Path:
    """Three items, the feature "text" of 4 rows for two of them."""
    folder = tmp_path / "shop"
    write_table(
        folder / "shop.inter",
        {"user_id:token": ["u", "u", "v"], "item_id:token": ["a", "b", "c"], "timestamp:float": [1.0, 2.0, 3.0]},
    )
    write_table(folder / "shop.item", {"item_id:token": ["a", "b", "c"], "title:token_seq": ["A", "B", "C"]})
    write_feature(folder, "text", tokens=["b", "a"], rows=ROWS, counts=np.array([3, 1]), encoder="stub", source="title")
    return folder


def spoil(folder: Path, file: str, array: np.ndarray, **info: object) -> None:
    """Put another array in place and let the manifest believe in its bytes, so that only its content is wrong."""
    np.save(folder / file, array, allow_pickle=True)
    manifest = Manifest.load(folder)
    feature = replace(manifest.features["text"], **info)
    files = {**manifest.files, file: file_info(folder / file)}
    replace(manifest, files=files, features={"text": feature}).save(folder)


# ---------------------------------------------------------------- tables


def test_an_unbalanced_quote_stays_in_its_field(tmp_path):
    frame = read_table(table(tmp_path, 'item_id:token\ttitle:token_seq\n1\t"Half a quote\n2\t12" ruler\n'))
    assert frame["title"].tolist() == ['"Half a quote', '12" ruler']


def test_ids_that_look_missing_or_numeric_stay_as_they_are(tmp_path):
    frame = read_table(table(tmp_path, "item_id:token\nNA\nnull\n007\n1e5\nnan\n"))
    assert frame["item_id"].tolist() == ["NA", "null", "007", "1e5", "nan"]


def test_byte_order_mark_and_windows_line_ends_do_not_matter(tmp_path):
    plain = read_table(table(tmp_path, "item_id:token\tprice:float\na\t1\nb\t\n"))
    windows = read_table(table(tmp_path, b"\xef\xbb\xbfitem_id:token\tprice:float\r\na\t1\r\nb\t\r\n"))
    assert plain.equals(windows) and plain.attrs == windows.attrs == {"types": {"item_id": "token", "price": "float"}}


def test_the_last_line_needs_no_line_end(tmp_path):
    assert read_table(table(tmp_path, "item_id:token\na\nb"))["item_id"].tolist() == ["a", "b"]


def test_a_carriage_return_inside_a_field_is_no_line_end(tmp_path):
    frame = read_table(table(tmp_path, b"item_id:token\ttitle:token_seq\na\tone\rtwo\nb\tthree\n"))
    assert frame["title"].tolist() == ["one\rtwo", "three"]


def test_a_wrong_number_of_fields_names_the_line(tmp_path):
    with pytest.raises(DatasetError, match=r"shop\.item, line 3: 3 fields, the header has 2 \(1 such lines\)"):
        read_table(table(tmp_path, "item_id:token\tprice:float\na\t1\nb\t2\t3\n"))


def test_a_missing_column_lists_the_columns_found(tmp_path):
    with pytest.raises(DatasetError, match="has no column image; its columns are item_id, price"):
        read_table(table(tmp_path, "item_id:token\tprice:float\na\t1\n"), needed=["item_id", "image"])


def test_only_the_columns_asked_for_are_read(tmp_path):
    path = table(tmp_path, "item_id:token\tprice:float\ttitle:token_seq\na\t1\tA\n")
    assert list(read_table(path, needed=["item_id"], optional=["title", "brand"])) == ["item_id", "title"]


@pytest.mark.parametrize("content", ["", "item_id\n1\n", "item_id:str\n1\n"])
def test_a_header_without_types_is_refused(tmp_path, content):
    with pytest.raises(DatasetError, match=r"line 1: column '.*' has no type; the header of an atomic file reads like"):
        read_table(table(tmp_path, content))


@pytest.mark.parametrize("content", ["item_id:token", "item_id:token\n", "item_id:token\n\n\n"])
def test_a_header_without_rows_is_refused(tmp_path, content):
    with pytest.raises(DatasetError, match="has a header but no rows"):
        read_table(table(tmp_path, content))


def test_bytes_that_are_not_utf8_name_the_line(tmp_path):
    with pytest.raises(DatasetError, match="line 3: not UTF-8 at byte .*; save the file as UTF-8"):
        read_table(table(tmp_path, b"item_id:token\na\ncaf\xe9\n"))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DatasetError, match=r"cannot read .*none\.item: No such file"):
        read_table(tmp_path / "none.item")


def test_numbers_are_exact_and_a_wrong_one_names_its_line(tmp_path):
    path = table(tmp_path, "item_id:token\tprice:float\tnote:float\na\t1672531201\t\nb\t3\tcheap\n")
    frame = read_table(path)
    assert numbers(frame, "price", path).tolist() == [1672531201, 3]
    with pytest.raises(DatasetError, match="line 3: note is 'cheap', expected a finite number"):
        numbers(frame, "note", path, may_be_empty=True)
    with pytest.raises(DatasetError, match="line 2: note is ''"):
        numbers(frame, "note", path)


@pytest.mark.parametrize("odd", ["", "1_000", "inf", "nan", "0x1", "1e999", "--1", "."])
def test_a_column_of_plain_numbers_is_read_as_python_reads_them_and_an_odd_one_is_found(tmp_path, odd):
    plain = ["0.1", "1672531201.123456", "-3e-5", "+4", "5.", ".5", "1E2", "9007199254740993", "00012"]
    path = table(tmp_path, "\n".join(["item_id:token\tprice:float", *(f"a\t{text}" for text in plain)]) + "\n")
    assert numbers(read_table(path), "price", path).tolist() == [float(text) for text in plain]
    path = table(tmp_path, "\n".join(["item_id:token\tprice:float", *(f"a\t{text}" for text in [*plain, odd])]) + "\n")
    with pytest.raises(
        DatasetError, match=rf"line 11: price is {re.escape(repr(odd))}, expected a finite number \(1 s"
    ):
        numbers(read_table(path), "price", path)


def test_a_table_comes_back_as_it_was_written(tmp_path):
    columns = {"item_id:token": ["NA", '"b"'], "title:token_seq": ["é 'n' ü", ""], "price:float": [0.1, None]}
    write_table(tmp_path / "x.item", columns)
    frame = read_table(tmp_path / "x.item")
    assert frame.to_numpy().tolist() == [["NA", "é 'n' ü", "0.1"], ['"b"', "", ""]]


@pytest.mark.parametrize("value", ["a\tb", "a\nb", "a\rb"])
def test_a_value_that_would_shift_columns_is_not_written(tmp_path, value):
    with pytest.raises(DatasetError, match="holds a tab or line break"):
        write_table(tmp_path / "x.item", {"item_id:token": [value]})
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- folders


def test_a_folder_of_one_file_or_of_three_is_recognised(tmp_path):
    folder = shop(tmp_path)
    assert folder_kind(folder) == "interactions" and interaction_files(folder) == [folder / "shop.inter"]
    for split in ("train", "valid", "test"):
        (folder / "shop.inter").with_name(f"shop.{split}.inter").write_bytes((folder / "shop.inter").read_bytes())
    before = data_fingerprint(folder)
    (folder / "shop.inter").unlink()
    assert folder_kind(folder) == "splits"
    assert [path.name.split(".")[1] for path in interaction_files(folder)] == ["train", "valid", "test"]
    assert data_fingerprint(folder) != before


def test_a_folder_without_interactions_says_what_it_found(tmp_path):
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "other.inter").touch()
    with pytest.raises(DatasetError, match=r"neither shop\.inter nor .* found \['other\.inter'\]"):
        folder_kind(tmp_path / "shop")


def test_a_manifest_of_another_version_is_refused(tmp_path):
    folder = shop(tmp_path)
    content = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**content, "format_version": 99}))
    with pytest.raises(DatasetError, match="format_version is 99, this release reads 1"):
        Manifest.load(folder)


@pytest.mark.parametrize("content", ["{", "[]", '{"format_version": 1}'])
def test_a_broken_manifest_is_refused(tmp_path, content):
    folder = shop(tmp_path)
    (folder / "manifest.json").write_text(content)
    with pytest.raises(DatasetError, match="is no manifest of a prepared folder"):
        Manifest.load(folder)


def test_a_manifest_comes_back_as_it_was_saved(tmp_path):
    info = FeatureInfo("features/x.npy", "features/x.items.txt", None, (2, 3), "float32", "stub", "title", {"a": [1]})
    manifest = Manifest("shop", {}, {"x": info}, {"seed": 1}, {"raw.gz": "00"})
    manifest.save(tmp_path)
    assert Manifest.load(tmp_path) == manifest


# ---------------------------------------------------------------- features


def test_a_feature_comes_back_as_it_was_written(tmp_path):
    feature = read_feature(shop(tmp_path), "text")
    assert feature.tokens == ["b", "a"] and feature.counts.tolist() == [3, 1]
    assert feature.rows.dtype == np.float32 and np.array_equal(feature.rows, ROWS)


def test_without_counts_each_item_has_one_row(tmp_path):
    folder = shop(tmp_path)
    write_feature(folder, "image", tokens=list("dcba"), rows=ROWS.astype(np.float16), encoder="stub", source="image")
    feature = read_feature(folder, "image")
    assert feature.tokens == list("dcba") and feature.counts.tolist() == [1] * 4 and feature.rows.dtype == np.float16
    assert not (folder / "features/image.counts.npy").exists()
    assert sorted(Manifest.load(folder).features) == ["image", "text"]


def test_writing_a_feature_again_replaces_it(tmp_path):
    folder = shop(tmp_path)
    write_feature(folder, "text", tokens=["c"], rows=ROWS[:1], encoder="other", source="title")
    assert read_feature(folder, "text").tokens == ["c"]
    assert check_folder(folder) == [
        "feature 'text' covers 1 of 3 items, not ['a', 'b']…; run with --missing_features=zero or mean, or complete it"
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": ["a"]}, "1 items and 1 rows expected, found an array of shape"),
        ({"tokens": ["a", "a", "b", "c"]}, "occurs twice"),
        ({"tokens": ["a", "b", "c\n", "d"]}, "line break"),
        ({"rows": np.full((4, 2), np.nan, np.float32)}, "not finite"),
        ({"rows": ROWS[:, 0]}, "found an array of shape"),
        ({"name": "../x"}, "letters, digits"),
    ],
)
def test_writing_refuses_what_does_not_fit(tmp_path, arguments, message):
    given = {"name": "x", "tokens": list("abcd"), "rows": ROWS, "encoder": "stub", "source": "title", **arguments}
    with pytest.raises(ValueError, match=message):
        write_feature(shop(tmp_path), **given)


def test_an_unknown_feature_lists_those_there_are(tmp_path):
    with pytest.raises(DatasetError, match=r"has no feature 'image', only \['text'\]\n  make it with: python -m"):
        read_feature(shop(tmp_path), "image")


@pytest.mark.parametrize(
    ("array", "info", "message"),
    [
        (ROWS.reshape(2, 4), {}, r"text\.npy has shape \(2, 4\), the manifest says \(4, 2\)"),
        (ROWS[:, :1], {}, r"has shape \(4, 1\), the manifest says \(4, 2\)"),
        (ROWS.ravel(), {"shape": (8,)}, r"has shape \(8,\), the manifest says \(8,\)"),
        (ROWS[:3], {"shape": (3, 2)}, r"has 3 rows, features/text\.counts\.npy asks for 4"),
        (ROWS.astype(np.int64), {}, "has dtype int64, expected float32"),
        (ROWS.astype(object), {}, r"text\.npy is no plain \.npy array"),
        (np.where(ROWS == 5, np.nan, ROWS), {}, r"NaN or infinity in 1 rows: row 2 \(item 'b'\)"),
        (np.where(ROWS == 7, np.inf, ROWS), {}, r"NaN or infinity in 1 rows: row 3 \(item 'a'\)"),
        (np.where(ROWS == 0, -np.inf, np.where(ROWS == 1, np.inf, ROWS)), {}, r"row 0 \(item 'b'\)"),
    ],
)
def test_a_wrong_array_is_refused_with_its_reason(tmp_path, array, info, message):
    folder = shop(tmp_path)
    spoil(folder, "features/text.npy", array, **info)
    with pytest.raises(DatasetError, match=message) as caught:
        read_feature(folder, "text")
    assert "make it again with: python -m dataset_prep features" in str(caught.value)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (np.array([3.0, 1.0]), "must hold one whole number >= 0 per item, found float64"),
        (np.array([5, -1]), "must hold one whole number >= 0 per item"),
        (np.array([[3, 1]]), "must hold one whole number >= 0 per item"),
        (np.array([3, 1, 0]), r"has 3 entries, features/text\.items\.txt has 2 items"),
        (np.array([3, 2]), "has 4 rows, .* asks for 5"),
    ],
)
def test_wrong_counts_are_refused(tmp_path, counts, message):
    folder = shop(tmp_path)
    spoil(folder, "features/text.counts.npy", counts)
    with pytest.raises(DatasetError, match=message):
        read_feature(folder, "text")


def test_duplicate_tokens_are_refused(tmp_path):
    folder = shop(tmp_path)
    (folder / "features/text.items.txt").write_text("b\nb\n")
    with pytest.raises(DatasetError, match=r"has 1 duplicate tokens, such as \['b'\]; each item once"):
        read_feature(folder, "text")


@pytest.mark.parametrize("file", ["text.npy", "text.counts.npy", "text.items.txt"])
def test_a_file_cut_short_or_missing_is_refused(tmp_path, file):
    folder = shop(tmp_path)
    path = folder / "features" / file
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DatasetError, match="bytes, the manifest says .*: cut short or replaced"):
        read_feature(folder, "text")
    path.unlink()
    with pytest.raises(DatasetError, match=f"features/{file} is missing"):
        read_feature(folder, "text")


def test_an_array_cut_short_is_refused_even_if_the_manifest_believes_it(tmp_path):
    folder = shop(tmp_path)
    path = folder / "features/text.npy"
    path.write_bytes(path.read_bytes()[:-4])
    manifest = Manifest.load(folder)
    replace(manifest, files={**manifest.files, "features/text.npy": file_info(path)}).save(folder)
    with pytest.raises(DatasetError, match=r"text\.npy is no plain \.npy array or is cut short"):
        read_feature(folder, "text")


# ---------------------------------------------------------------- check


def test_a_whole_folder_passes_with_remarks_on_items_without_rows(tmp_path):
    assert check_folder(shop(tmp_path)) == [
        "feature 'text' covers 2 of 3 items, not ['c']…; run with --missing_features=zero or mean, or complete it"
    ]


def test_the_check_lists_all_problems_at_once_with_remedies(tmp_path):
    folder = shop(tmp_path)
    write_feature(folder, "image", tokens=list("abcd"), rows=ROWS, encoder="stub", source="image")
    spoil_image = np.load(folder / "features/image.npy")
    spoil_image[1, 1] = np.nan
    np.save(folder / "features/image.npy", spoil_image)  # same size, other content
    (folder / "features/text.npy").unlink()
    (folder / "shop.item").write_text("item_id:token\ttitle:token_seq\na\tA\na\tA\n")
    (folder / "shop.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\nu\t[PAD]\t1\nu\t\tsoon\n")
    with pytest.raises(DatasetError) as caught:
        check_folder(folder)
    message = str(caught.value)
    assert "problem(s)" in message.splitlines()[0]
    for part in (
        "timestamp is 'soon', expected a finite number",
        "1 items occur twice, such as ['a']; keep one row each",
        "feature 'text': features/text.npy is missing; make it again with: python -m dataset_prep features",
        "feature 'image': features/image.npy: NaN or infinity in 1 rows: row 1 (item 'b'); make it again with",
        "features/image.npy has sha256",
    ):
        assert part in message


def test_the_check_names_padding_and_empty_ids(tmp_path):
    folder = shop(tmp_path)
    (folder / "shop.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\nu\t[PAD]\t1\nu\t\t2\n")
    with pytest.raises(DatasetError, match=r"(?s)empty item_id; remove the row.*called \[PAD\], RecBole's padding"):
        check_folder(folder)


def test_a_changed_byte_is_found_by_its_hash(tmp_path):
    folder = shop(tmp_path)
    path = folder / "features/text.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(DatasetError, match=hashlib.sha256(bytes(content)).hexdigest()[:12] + "….*was changed"):
        check_folder(folder)
    assert check_folder(folder, hashes=False)
