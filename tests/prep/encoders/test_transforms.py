"""Pixels: against torchvision's own transforms, for every shape of picture."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from PIL import Image

from dataset_prep.encoders.torchvision_ops import mend_torchvision
from dataset_prep.encoders.transforms import IMAGENET_MEAN, IMAGENET_STD, Pixels, normalised
from recbole_mm.errors import SettingError

SIZES = [(64, 48), (48, 64), (33, 33), (7, 5), (1, 1), (301, 20), (20, 301), (40, 39), (24, 24)]  # width, height


def picture(size: tuple[int, int]) -> Image.Image:
    random = np.random.default_rng(size[0] * 1000 + size[1])
    return Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.fixture
def transforms():
    mend_torchvision()
    return pytest.importorskip("torchvision.transforms")


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", SIZES)
def test_pixels_equal_those_of_torchvision(transforms, size, interpolation):
    how = transforms.InterpolationMode(interpolation)
    for resize, crop in ((32, 28), (24, 24), (20, 25)):
        expected = transforms.Compose(
            [
                transforms.Resize(resize, interpolation=how),
                transforms.CenterCrop(crop),
                transforms.ToTensor(),
                transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )(picture(size))
        pixels = Pixels((crop, crop), resize=resize, interpolation=interpolation)(picture(size))
        assert pixels.dtype == np.uint8 and pixels.shape == (crop, crop, 3)
        actual = normalised([pixels], mean=IMAGENET_MEAN, std=IMAGENET_STD)[0]
        np.testing.assert_allclose(actual.numpy(), expected.numpy(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_squashed_pixels_equal_those_of_torchvision(transforms, size):
    expected = np.asarray(transforms.Resize((20, 30))(picture(size)))
    np.testing.assert_array_equal(Pixels((20, 30), mode="squash")(picture(size)), expected)


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("target", [24, (24, 36)])
@pytest.mark.parametrize("size", SIZES)
def test_pixels_equal_those_of_open_clip(mode, target, size):
    mend_torchvision()
    transform = pytest.importorskip("open_clip.transform")
    image_transform = transform.image_transform(target, is_train=False, resize_mode=mode, fill_color=7)
    expected = image_transform(picture(size))
    height, width = (target, target) if isinstance(target, int) else target
    resize = target if mode == "shortest" and isinstance(target, int) else None
    pixels = Pixels((height, width), resize=resize, mode=mode, interpolation="bicubic", fill=7)(picture(size))
    actual = normalised([pixels], mean=transform.OPENAI_DATASET_MEAN, std=transform.OPENAI_DATASET_STD)[0]
    np.testing.assert_allclose(actual.numpy(), expected.numpy(), atol=1e-6, rtol=0)


def test_normalised_is_arithmetic_and_contiguous():
    arrays = [np.full((2, 3, 3), (0, 51, 255), dtype=np.uint8), np.zeros((2, 3, 3), dtype=np.uint8)]
    rows = normalised(arrays, mean=(0.5, 0.1, 0.0), std=(0.5, 0.1, 2.0))
    assert tuple(rows.shape) == (2, 3, 2, 3) and rows.is_contiguous()
    np.testing.assert_allclose(rows[0, :, 0, 0], [-1, 1, 0.5], rtol=1e-6)
    np.testing.assert_allclose(rows[1, :, 1, 2], [-1, -1, 0], rtol=1e-6)


def test_a_picture_that_is_a_mere_line_stays_small_in_memory():
    """Scaled as a whole, this picture would have 224 x 6,720,000 pixels."""
    line = Image.new("RGB", (30_000, 1), "red")
    line.paste("blue", (15_000, 0, 30_000, 1))
    pixels = Pixels((224, 224), resize=224)(line)
    assert pixels.shape == (224, 224, 3)
    assert pixels[0, 0, 0] > 250 and pixels[0, -1, 2] > 250  # the middle of the line, where red ends
    upright = Pixels((224, 224), resize=224)(line.transpose(Image.Transpose.TRANSPOSE))
    np.testing.assert_array_equal(upright, pixels.transpose(1, 0, 2))


def test_pixels_can_be_pickled_and_named():
    pixels = Pixels((4, 6), resize=8, interpolation="bicubic")
    assert pickle.loads(pickle.dumps(pixels)) == pixels
    assert pixels.settings == {
        "size": [4, 6],
        "resize": 8,
        "mode": "shortest",
        "interpolation": "bicubic",
        "fill": 0,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "crop"}, "the way to resize a picture is 'crop', expected one of .*squash"),
        ({"interpolation": "nearest"}, "interpolation is 'nearest', expected one of"),
        ({"size": (0, 3)}, "expected at least one pixel"),
        ({"resize": 0}, "after a resize to 0, expected at least one pixel"),
        ({"resize": 9, "mode": "squash"}, "resize is 9, which goes with the mode 'shortest' and not 'squash'"),
    ],
)
def test_what_no_picture_can_be_is_refused(arguments, message):
    with pytest.raises(SettingError, match=message):
        Pixels(**{"size": (3, 3), **arguments})
