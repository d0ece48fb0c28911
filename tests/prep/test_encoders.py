"""Encoders: order, batch size, type, and what they know."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from dataset_prep.encoders import KNOWN, build_encoder, find_encoder
from dataset_prep.encoders.image import HistogramEncoder
from recbole_mm.errors import SettingError

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


def histograms(pictures: list[Image.Image]) -> list[np.ndarray]:
    encoder = HistogramEncoder()
    return encoder.encode([encoder.transform(one) for one in pictures])


def fitted(name: str) -> tuple:
    encoder = build_encoder(name, feature="x")
    content = TEXTS if encoder.source == "text" else [encoder.transform(one) for one in PICTURES]
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


def test_a_transform_can_be_sent_to_another_process():
    transform = HistogramEncoder(size=48).transform
    array = pickle.loads(pickle.dumps(transform))(picture())
    assert array.shape == (48, 48, 3) and array.dtype == np.uint8
    np.testing.assert_array_equal(array, transform(picture()))


@pytest.mark.parametrize("name", ["tfidf", "histogram"])
def test_encoding_twice_gives_the_same_bytes(name):
    first, second = (np.stack(encoder.encode(content)).tobytes() for encoder, content in (fitted(name), fitted(name)))
    assert first == second


def test_an_unknown_encoder_lists_those_there_are_and_the_nearest():
    known = r"\['bert', 'class_names', 'clip', .*'neighbours', .*'torchvision'\]"
    with pytest.raises(SettingError, match=rf"no encoder 'histgram', only {known}; did you mean 'histogram'"):
        find_encoder("histgram")
    with pytest.raises(SettingError, match="no encoder 'neighbour', .*; did you mean 'neighbours'"):
        find_encoder("neighbour")
    with pytest.raises(SettingError, match="the encoder neighbours reads features; it makes those called"):
        build_encoder("neighbours", feature="text")


def test_every_known_encoder_is_there_and_called_what_it_is_known_by():
    for name in KNOWN:
        encoder = find_encoder(name)
        assert encoder.name == name and encoder.source in ("text", "image")
        assert all(callable(getattr(encoder, member)) for member in ("fit", "encode"))


def test_F64_absent_packages_stop_their_own_encoders_only():
    """In a process without them: every class is found, and those without weights work."""
    code = (
        "import sys\n"
        "absent = 'torch torchvision open_clip transformers sentence_transformers onnxruntime diffusers'.split()\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in absent: raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from dataset_prep.encoders import KNOWN, build_encoder, find_encoder\n"
        "for name in KNOWN: find_encoder(name)\n"
        "build_encoder('tfidf', feature='text').fit(['a red tent'])\n"
        "print(build_encoder('histogram', feature='image').settings['width'])\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout.strip() == "320", done.stderr


def test_a_feature_without_default_encoder_asks_for_one():
    with pytest.raises(SettingError, match=r"feature 'audio' has no default encoder .* choose one with --encoder"):
        build_encoder(None, feature="audio")
    assert build_encoder(None, feature="text").name == "tfidf"
    assert build_encoder(None, feature="image").name == "histogram"


def test_an_option_of_another_encoder_is_refused():
    with pytest.raises(SettingError, match=r"encoder 'tfidf' has no option --batch-size; its settings are \['width'"):
        build_encoder("tfidf", feature="text", batch_size=8, device=None)


# ---------------------------------------------------------------- histogram


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("tfidf", {"width": "wide"}, "width of encoder 'tfidf' is 'wide', expected a whole number"),
        ("tfidf", {"width": True}, "width of encoder 'tfidf' is True, expected a whole number"),
        ("tfidf", {"width": 2.5}, "width of encoder 'tfidf' is 2.5, expected a whole number"),
        ("sentence", {"normalize": "yes"}, "normalize of encoder 'sentence' is 'yes', expected true or false"),
        ("bert", {"model": 3}, "model of encoder 'bert' is 3, expected a text"),
        ("generated", {"guidance": "high"}, "guidance of encoder 'generated' is 'high', expected a number"),
        ("clip_words", {"clip": "ViT-B-32"}, "clip of encoder 'clip_words' is 'ViT-B-32', expected a mapping such as"),
        ("class_names", {"skip": "background"}, "skip of encoder 'class_names' is 'background', expected a list"),
        ("histogram", {"size": 3}, "size is 3, expected at least 4 pixels, two for each quarter"),
        ("histogram", {"sise": 3}, "has no option --sise; its settings are .* did you mean .size"),
    ],
)
def test_a_value_of_another_type_is_refused(name, options, message):
    with pytest.raises(SettingError, match=message):
        build_encoder(name, feature="image", **options)


def test_colour_and_stripes_can_be_told_apart():
    red, upright, lying, green = histograms([picture(), picture(stripes="|"), picture(stripes="-"), picture("green")])
    cells = red.reshape(4, 80)
    assert (cells[:, :72].max(axis=1) == 1).all() and not cells[:, 72:].any()  # one colour, no edges
    assert green @ red == 0
    assert upright.reshape(4, 80)[:, 72].min() > 0.1 > upright.reshape(4, 80)[:, 76].max()  # gradient to the right
    assert lying.reshape(4, 80)[:, 76].min() > 0.1 > lying.reshape(4, 80)[:, 72].max()  # gradient downwards


def test_colour_shares_of_each_quarter_add_up_to_one():
    for vector in histograms(PICTURES):
        np.testing.assert_allclose(np.square(vector.reshape(4, 80)[:, :72]).sum(axis=1), 1, rtol=1e-5)


def test_a_quarter_knows_its_own_colour():
    image = Image.new("RGB", (40, 40), "red")
    image.paste("blue", (0, 0, 20, 20))
    cells = histograms([image])[0].reshape(4, 80)[:, :72].argmax(axis=1)
    assert cells[0] != cells[1] and cells[1] == cells[2] == cells[3]


def test_one_pixel_is_a_picture():
    assert np.isfinite(histograms([Image.new("RGB", (1, 1))])[0]).all()
