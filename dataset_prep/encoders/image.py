"""A picture encoder without weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dataset_prep.encoders.model_files import versions
from recbole_mm.errors import SettingError

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class _Square:
    """A picture as uint8 [size, size, 3]; by the mean over boxes where it is wider."""

    size: int

    def __call__(self, image: Image) -> np.ndarray:
        from PIL import Image

        how = Image.Resampling.BOX if image.width > self.size else None
        return np.asarray(image.resize((self.size, self.size), how))


class HistogramEncoder:
    """Colours and edges of a picture, counted in the four quarters of it; no weights.

    Per quarter: a joint histogram of hue (8 bins), saturation (3) and value (3), and the mean edge strength in 8
    directions (0 to 180 degrees). All are square roots of shares, so that a large plain background does not drown the
    rest (distances between vectors are then Hellinger's). F = 4 (72 + 8) = 320.

    Args:
        size: pictures are brought to size x size pixels first, so that scale and shape do not matter.

    Raises:
        SettingError: a size below 4.
    """

    name, source = "histogram", "image"
    bins, directions, grid = (8, 3, 3), 8, 2

    def __init__(self, *, size: int = 96) -> None:
        if size < 2 * self.grid:
            raise SettingError(f"size is {size}, expected at least {2 * self.grid} pixels, two for each quarter")
        self.settings: dict[str, Any] = {"size": size, "bins": list(self.bins)}
        self.settings |= {"directions": self.directions, "grid": self.grid, "versions": versions(("pillow", "numpy"))}
        cell = np.arange(size) * self.grid // size
        self.transform = _Square(size)
        self._cells = (cell[:, None] * self.grid + cell).ravel()  # [size * size]
        self._n_cells = self.grid**2
        self._pixels = np.bincount(self._cells, minlength=self._n_cells)  # per cell
        self.settings["width"] = self._n_cells * (int(np.prod(self.bins)) + self.directions)

    def fit(self, everything: Sequence[np.ndarray]) -> None:
        """Nothing to learn."""

    def encode(self, batch: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [np.sqrt(self._histograms(pixels)).astype(np.float32) for pixels in batch]

    def _histograms(self, pixels: np.ndarray) -> np.ndarray:
        from PIL import Image

        image = Image.fromarray(pixels)
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
