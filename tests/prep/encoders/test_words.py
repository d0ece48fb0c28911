"""CLIP's words of a picture: which words a vocabulary has, which of them are chosen, and what is encoded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_text_models import save_clip, save_sentence_model

from dataset_prep.encoders import build_encoder, find_encoder
from dataset_prep.encoders import words as words_module
from dataset_prep.encoders.words import ClipWordsEncoder, build_vocabulary, read_vocabulary, vocabulary_of
from recbole_mm.data.files import write_table
from recbole_mm.errors import DatasetError, SettingError

COLOURS = ["red", "green", "blue"]


class ColourClip:
    """CLIP that knows three colours: a picture's mean colour, and the colours that a text names."""

    made_texts: list[str] = []

    def __init__(self, *, model: str = "colours", batch_size: int = 32, device: str | None = None) -> None:
        self.settings = {"model": model}
        self.batch_size, self.device = batch_size, device

    def image_transform(self, picture: Image.Image) -> np.ndarray:
        return np.asarray(picture.resize((2, 2)))

    def encode_images(self, arrays: list[np.ndarray]) -> np.ndarray:
        return unit(np.stack([array.reshape(-1, 3).mean(axis=0) for array in arrays]))

    def encode_texts(self, texts: list[str]) -> np.ndarray:
        self.made_texts += texts
        return unit(np.array([[colour in text for colour in COLOURS] for text in texts], dtype=float) + 1e-3)


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def colour_clip(monkeypatch) -> type[ColourClip]:
    monkeypatch.setattr(words_module, "ClipModel", ColourClip)
    monkeypatch.setattr(ColourClip, "made_texts", [])
    return ColourClip


def vocabulary(folder: Path, *words: str) -> str:
    (folder / "words.txt").write_text("".join(f"{word}\n" for word in words))
    return str(folder / "words.txt")


def arrays(encoder: ClipWordsEncoder, *colours: tuple[int, int, int]) -> list[np.ndarray]:
    return [encoder.transform(Image.new("RGB", (5, 4), colour)) for colour in colours]


def make(folder: Path, *words: str, **options: object) -> ClipWordsEncoder:
    options = {"n_words": 2, "text_encoder": "tfidf", **options}
    return ClipWordsEncoder(vocabulary=vocabulary(folder, *words), **options)


# ---------------------------------------------------------------- vocabulary


def test_the_vocabulary_has_frequent_words_of_letters_and_no_stop_words():
    texts = ["The Red tent, the tent & the 4x4 tent's poles", "don't paint a red TENT 12", "été été x x red"]
    assert vocabulary_of(texts, min_count=2) == ["tent", "red", "été"]
    assert vocabulary_of(texts, min_count=1) == ["tent", "red", "été", "paint", "poles"]
    assert vocabulary_of(texts, min_count=3, more=["zebra", "tent", "sleeping bag"]) == [
        "tent", "red", "zebra", "sleeping bag",
    ]  # fmt: skip


def test_the_vocabulary_of_a_folder_is_written_beside_its_items(tmp_path):
    folder = tmp_path / "shop"
    write_table(
        folder / "shop.item",
        {
            "item_id:token": ["a", "b", "c"],
            "title:token_seq": ["Red &amp; <b>warm</b> hat", "warm hat", ""],
            "categories:token_seq": ["Warm_things", "Warm_things", "hat"],
            "price:float": [1.0, 2.0, 3.0],
        },
    )
    assert build_vocabulary(folder, min_count=3) == folder / "vocabulary.txt"
    assert (folder / "vocabulary.txt").read_bytes() == b"warm\nhat\n"
    (tmp_path / "extra.txt").write_text("# of colours\nred\n\nsea  green\n")
    path = build_vocabulary(
        folder, columns=["title"], min_count=2, extra=tmp_path / "extra.txt", out=tmp_path / "mine.txt"
    )
    assert read_vocabulary(path) == ["hat", "warm", "red", "sea green"]

    with pytest.raises(DatasetError, match=r"shop\.item: no word occurs 9 times in title, categories"):
        build_vocabulary(folder, min_count=9)
    with pytest.raises(DatasetError, match="has no column brand"):
        build_vocabulary(folder, columns=["brand"])
    with pytest.raises(SettingError, match="min_count is 0, expected at least 1"):
        build_vocabulary(folder, min_count=0)
    write_table(folder / "shop.item", {"item_id:token": ["a"], "price:float": [1.0]})
    with pytest.raises(DatasetError, match="has none of the text columns title, .*; choose with --columns"):
        build_vocabulary(folder)


def test_a_vocabulary_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(DatasetError, match="cannot read the vocabulary .*none.txt"):
        read_vocabulary(tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(DatasetError, match="no text file in UTF-8 with a word a line"):
        read_vocabulary(tmp_path / "latin.txt")
    (tmp_path / "empty.txt").write_text("# nothing\n\n")
    with pytest.raises(DatasetError, match="holds no word; write a word a line"):
        read_vocabulary(tmp_path / "empty.txt")


# ---------------------------------------------------------------- words of pictures


def test_the_words_that_fit_best_are_chosen_the_best_first(tmp_path, colour_clip):
    encoder = make(tmp_path, "green", "blue", "red", "wheel")
    chosen = encoder.words_of(arrays(encoder, (250, 90, 0), (0, 90, 250), (9, 10, 9)))
    # "wheel" names no colour and is as near to all: 0.74 from orange, whose cosine with red is 0.94, with green 0.34
    assert chosen == [["red", "wheel"], ["blue", "wheel"], ["wheel", "green"]]
    assert encoder.words_of([]) == [] and encoder.encode([]) == []


def test_equally_good_words_come_in_the_order_of_the_vocabulary(tmp_path, colour_clip):
    encoder = make(tmp_path, "reddish", "red hat", "infrared", "blue", n_words=3)
    assert encoder.words_of(arrays(encoder, (255, 0, 0)) * 7) == [["reddish", "red hat", "infrared"]] * 7


def test_concat_encodes_the_words_as_one_text_and_per_word_each_alone(tmp_path, colour_clip):
    concat, per_word = (
        make(tmp_path, *COLOURS, text_options={"width": 3}, image_token_mode=mode) for mode in ("concat", "per_word")
    )
    text = build_encoder("tfidf", feature="text", width=3)
    text.fit(COLOURS)
    (row,), (rows,) = (encoder.encode(arrays(encoder, (250, 90, 0))) for encoder in (concat, per_word))
    np.testing.assert_array_equal(row, text.encode(["red green"])[0])
    np.testing.assert_array_equal(rows, text.encode(["red", "green"]))
    assert row.shape == (3,) and rows.shape == (2, 3) and rows.dtype == row.dtype == np.float32


def test_words_are_encoded_in_the_vocabularys_batches_whatever_was_asked_before(tmp_path, colour_clip, monkeypatch):
    monkeypatch.setattr(words_module, "WORDS_AT_ONCE", 2)
    encoder = make(tmp_path, *COLOURS, n_words=1, image_token_mode="per_word")
    asked = []
    encode, encoder._text.encode = encoder._text.encode, lambda words: asked.append(list(words)) or encode(words)
    for colour in ((0, 0, 255), (0, 255, 0), (255, 0, 0), (0, 0, 255)):
        encoder.encode(arrays(encoder, colour))
    assert asked == [["blue"], ["red", "green"]]


@pytest.mark.parametrize("mode", ["concat", "per_word"])
def test_neither_order_nor_batch_size_changes_a_vector(tmp_path, colour_clip, mode):
    encoder = make(tmp_path, *COLOURS, "red wheel", image_token_mode=mode)
    pictures = arrays(encoder, (250, 90, 0), (0, 90, 250), (250, 90, 0), (60, 200, 10))
    together = np.stack(encoder.encode(pictures))
    np.testing.assert_array_equal(np.stack([encoder.encode([picture])[0] for picture in pictures]), together)
    np.testing.assert_array_equal(np.stack(encoder.encode(pictures[::-1])[::-1]), together)


def test_clip_reads_the_template_and_the_vectors_of_words_are_made_once(tmp_path, colour_clip):
    first = make(tmp_path, *COLOURS, template="a photo of a {}")
    first.fit([])
    assert colour_clip.made_texts == [f"a photo of a {colour}" for colour in COLOURS]
    second = make(tmp_path, *COLOURS, template="a photo of a {}")
    pictures = arrays(first, (250, 90, 0))
    assert second.words_of(pictures) == first.words_of(pictures)
    assert len(colour_clip.made_texts) == 3
    make(tmp_path, *COLOURS).fit([])
    make(tmp_path, *COLOURS, "wheel").fit([])
    make(tmp_path, *COLOURS, clip={"model": "other"}).fit([])
    assert len(colour_clip.made_texts) == 3 + 3 + 4 + 3  # another template, vocabulary or model has its own


def test_broken_vectors_of_words_are_made_again(tmp_path, colour_clip):
    make(tmp_path, *COLOURS).fit([])
    (kept,) = tmp_path.glob("words.txt.*.npy")
    content = kept.read_bytes()
    kept.write_bytes(content[:100])
    make(tmp_path, *COLOURS).fit([])
    assert kept.read_bytes() == content and len(colour_clip.made_texts) == 6


def test_a_read_only_place_of_the_vocabulary_is_no_obstacle(tmp_path, colour_clip, monkeypatch):
    def refuse(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr(words_module, "write_atomically", refuse)
    encoder = make(tmp_path, *COLOURS)
    assert encoder.words_of(arrays(encoder, (255, 0, 0)))[0][0] == "red"


def test_the_settings_are_json_and_tell_vocabularies_apart(tmp_path, colour_clip):
    settings = make(tmp_path, *COLOURS, batch_size=4, device="cpu").settings
    assert json.loads(json.dumps(settings)) == settings and str(tmp_path) not in json.dumps(settings)
    assert (settings["n_vocabulary"], settings["n_words"], settings["text_encoder"]) == (3, 2, "tfidf")
    assert settings != make(tmp_path, *COLOURS[::-1]).settings
    assert settings == make(tmp_path, *COLOURS).settings


def test_shared_options_reach_both_halves_unless_they_name_their_own(tmp_path, colour_clip):
    encoder = make(tmp_path, *COLOURS, batch_size=4, device="cpu", clip={"batch_size": 9})
    assert (encoder._clip.batch_size, encoder._clip.device) == (9, "cpu")


def test_wrong_arguments_say_what_is_right(tmp_path, colour_clip):
    with pytest.raises(SettingError, match="needs a file of words, a word a line; give it with --vocabulary FILE"):
        ClipWordsEncoder()
    with pytest.raises(SettingError, match=r"image_token_mode is 'words', expected one of \['concat', 'per_word'\]"):
        make(tmp_path, *COLOURS, image_token_mode="words")
    with pytest.raises(SettingError, match=r"n_words is 4, expected 1 to 3, the words of .*words\.txt"):
        make(tmp_path, *COLOURS, n_words=4)
    with pytest.raises(SettingError, match=r"template is 'a photo', expected \{\} in it once"):
        make(tmp_path, *COLOURS, template="a photo")
    with pytest.raises(SettingError, match="ColourClip has no option modle; its settings are"):
        make(tmp_path, *COLOURS, clip={"modle": "x"})
    with pytest.raises(SettingError, match="the encoder 'histogram' reads image; here one is needed that reads text"):
        make(tmp_path, *COLOURS, text_encoder="histogram")


def test_a_small_clip_and_a_small_sentence_model_work_together(tmp_path):
    """Random weights: only the shapes and the way through the real libraries are looked at."""
    model = save_sentence_model(tmp_path / "sentences")
    encoder = build_encoder(
        "clip_words",
        feature="text_from_image",
        vocabulary=vocabulary(tmp_path, "red", "green", "tent"),
        n_words=2,
        image_token_mode="per_word",
        clip={"model": str(save_clip(tmp_path / "clip"))},
        text_options={"model": str(model)},
        device="cpu",
    )
    pictures = arrays(encoder, (250, 90, 0), (0, 90, 250))
    encoder.fit([])
    assert [rows.shape for rows in encoder.encode(pictures)] == [(2, 16)] * 2
    assert encoder.settings["width"] == 16 and find_encoder("clip_words").source == "image"
    again = [encoder.words_of([picture])[0] for picture in pictures]
    assert again == encoder.words_of(pictures)
