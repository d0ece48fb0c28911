"""Pictures: reading them safely, and an encoder without weights."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
MAX_PIXELS = 50_000_000


class PictureError(ValueError):
    """A file that cannot be used as a picture; the message is the reason."""


def read_picture(path: Path) -> Image:
    """A picture as RGB: its first frame, turned as its EXIF says, over white where it is transparent.

    Args:
        path: JPEG, PNG, WebP or GIF, by content; the name does not matter.

    Raises:
        FileNotFoundError: no such file.
        PictureError: empty, cut short, another format, or more than 50 million pixels.
    """
    from PIL import Image, ImageOps

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd EXIF data, and size, which is checked below
            with Image.open(path, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise PictureError(f"larger than {MAX_PIXELS // 1_000_000} million pixels")
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image))
    except PictureError:
        raise
    except Image.DecompressionBombError as error:
        raise PictureError(f"larger than {MAX_PIXELS // 1_000_000} million pixels") from error
    except Exception as error:  # on broken files Pillow's decoders raise OSError, SyntaxError, ValueError, EOFError ...
        raise PictureError("undecodable") from error


def _to_rgb(image: Image) -> Image:
    from PIL import Image

    if image.mode.startswith("I"):  # 16 bits of grey, which convert() would clip
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


class HistogramEncoder:
    """Colours and edges of a picture, counted in the four quarters of it; no weights.

    Per quarter: a joint histogram of hue (8 bins), saturation (3) and value (3), and the mean edge strength in 8
    directions (0 to 180 degrees). All are square roots of shares, so that a large plain background does not drown the
    rest (distances between vectors are then Hellinger's). F = 4 (72 + 8) = 320.

    Args:
        size: pictures are brought to size x size pixels first, so that scale and shape do not matter.
    """

    name, source = "histogram", "image"
    bins, directions, grid = (8, 3, 3), 8, 2

    def __init__(self, *, size: int = 96) -> None:
        self.settings: dict[str, Any] = {"size": size, "bins": list(self.bins)}
        self.settings |= {"directions": self.directions, "grid": self.grid}
        cell = np.arange(size) * self.grid // size
        self._size, self._cells = size, (cell[:, None] * self.grid + cell).ravel()  # [size * size]
        self._n_cells = self.grid**2
        self._pixels = np.bincount(self._cells, minlength=self._n_cells)  # per cell
        self.settings["width"] = self._n_cells * (int(np.prod(self.bins)) + self.directions)

    def fit(self, everything: Sequence[Image]) -> None:
        """Nothing to learn."""

    def encode(self, batch: Sequence[Image]) -> list[np.ndarray]:
        return [np.sqrt(self._histograms(image)).astype(np.float32) for image in batch]

    def _histograms(self, image: Image) -> np.ndarray:
        from PIL import Image

        image = image.resize((self._size, self._size), Image.Resampling.BOX if image.width > self._size else None)
        colours = self._colours(np.asarray(image.convert("HSV"), dtype=np.int64))  # [4, 72]
        edges = self._edges(np.asarray(image.convert("L"), dtype=np.float64) / 255)  # [4, 8]
        return np.concatenate([colours, edges], axis=1).ravel()  # [F]

    def _colours(self, hsv: np.ndarray) -> np.ndarray:
        """Share of a cell's pixels in each bin, [cells, bins]."""
        hue, saturation, value = (hsv[..., i].ravel() * n // 256 for i, n in enumerate(self.bins))
        _, n_saturation, n_value = self.bins
        bin_of = (hue * n_saturation + saturation) * n_value + value
        n_bins = int(np.prod(self.bins))
        counts = np.bincount(self._cells * n_bins + bin_of, minlength=self._n_cells * n_bins)
        return counts.reshape(self._n_cells, n_bins) / self._pixels[:, None]

    def _edges(self, grey: np.ndarray) -> np.ndarray:
        """Mean gradient of a cell in each direction, [cells, directions]."""
        down, right = np.gradient(grey)
        direction = np.arctan2(down, right) % np.pi / np.pi * self.directions  # in [0, 8]
        bin_of = np.round(direction).astype(np.int64).ravel() % self.directions
        strength = np.bincount(
            self._cells * self.directions + bin_of,
            weights=np.hypot(down, right).ravel(),
            minlength=self._n_cells * self.directions,
        )
        return strength.reshape(self._n_cells, self.directions) / self._pixels[:, None]
