"""What items hold: each different content once, known by what it is and not by where it lies."""

from __future__ import annotations

import pytest
from PIL import Image

from dataset_prep.encoding.contents import picture_contents, text_contents
from dataset_prep.features import item_texts


def test_each_different_text_is_one_content_in_the_order_of_the_items():
    contents = text_contents(["1", "2", "3"], [["b", "a"], [], ["a", "c"]])
    assert contents.unique == ["b", "a", "c"] and contents.of_items == [[0, 1], [], [1, 2]]
    assert contents.reasons == ["", "no text", ""]


def test_the_hash_of_contents_tells_tokens_texts_and_their_places_apart():
    given = [
        (["1", "2"], [["a"], ["b"]]),
        (["1", "3"], [["a"], ["b"]]),
        (["1", "2"], [["a"], ["c"]]),
        (["1", "2"], [["b"], ["a"]]),
        (["1", "2"], [["a", "b"], []]),
        (["1", "2"], [["ab"], []]),
    ]
    hashes = [text_contents(tokens, texts).sha256() for tokens, texts in given]
    assert len(set(hashes)) == len(given)
    assert text_contents(*given[0]).sha256() == hashes[0]


def test_files_of_the_same_bytes_are_one_content_wherever_they_lie(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
    (tmp_path / "c.png").write_bytes(b"other")
    a, b, c, gone = (tmp_path / f"{name}.png" for name in "abcd")
    contents = picture_contents(
        ["1", "2", "3", "4", "5"], [[a, b], [b, c], [gone], [], [gone, c]], [""] * 3 + ["x", ""]
    )
    assert contents.of_items == [[0], [0, 1], [], [], [1]] and contents.unique == [str(a), str(c)]
    assert contents.reasons == ["", "", "picture file missing", "x", ""]
    elsewhere = picture_contents(["1", "2", "3", "4", "5"], [[b], [a, c], [], [], [c]], [""] * 5)
    assert elsewhere.sha256() == contents.sha256()


def test_a_folder_in_place_of_a_picture_is_a_missing_file(tmp_path):
    assert picture_contents(["1"], [[tmp_path]], [""]).reasons == ["picture file missing"]


@pytest.mark.parametrize("title", ["", " \t ", "<br>", "<p>&nbsp;</p>", "<!-- x -->", "\u200b", "\x00\x01"])
def test_F28_an_empty_title_is_missing_and_not_an_encoding_of_nothing(title):
    from pandas import DataFrame

    for rows in ("sentence", "item"):
        texts = item_texts(DataFrame({"title": [title]}), columns=["title"], rows=rows)
        assert text_contents(["1"], texts).reasons == ["no text"]


def test_F30_emoji_and_right_to_left_texts_are_kept_controls_go_and_a_huge_text_is_no_trouble():
    from pandas import DataFrame

    titles = ["red 👟 shoe", "חולצה أحمر", "a\x00b\x07c\ufeff", "word " * 200_000]
    texts = item_texts(DataFrame({"title": titles}), columns=["title"], rows="item")
    assert texts[0] == ["red 👟 shoe"] and texts[1] == ["חולצה أحمر"] and len(texts[3][0]) == 999_999
    assert not set(texts[2][0]) & set("\x00\x07\ufeff")
    assert len(text_contents(list("1234"), texts).sha256()) == 64
