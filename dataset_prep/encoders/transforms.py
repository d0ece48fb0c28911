"""From a picture to the pixels that a network was trained on.

The work is parted in two: ``Pixels`` cuts a picture to the network's size and runs in the workers that decode pictures,
which then hand on a few bytes; ``normalised`` makes numbers of a whole batch, on the network's own device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from recbole_mm.errors import SettingError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MODES = ("shortest", "longest", "squash")
INTERPOLATIONS = ("bilinear", "bicubic")
LONGEST_RATIO = 32  # of the sides; what a longer picture has beyond it lies far outside of the centre crop


@dataclass(frozen=True)
class Pixels:
    """An RGB picture as uint8 [height, width, 3], resized as Pillow does and cut to the centre.

    Same pixels as torchvision's ``Resize`` and ``CenterCrop`` on pictures of Pillow, whose filters take the mean over
    all that a pixel covers. Can be pickled; nothing but Pillow and NumPy runs in it.

    Attributes:
        size: (height, width) of the result.
        resize: mode "shortest": length that the shorter side gets; None takes the least that covers ``size``.
        mode: "shortest" lets the picture cover ``size`` and cuts off what is too large, "longest" fits the whole
            picture in, and "squash" brings it to ``size`` and changes its proportions. What is too small is padded.
        interpolation: "bilinear" or "bicubic".
        fill: grey of the padding, 0 to 255.

    Raises:
        SettingError: another mode or interpolation, a size below 1, or ``resize`` with a mode that has none.
    """

    size: tuple[int, int]
    resize: int | None = None
    mode: str = "shortest"
    interpolation: str = "bilinear"
    fill: int = 0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise SettingError(f"the way to resize a picture is {self.mode!r}, expected one of {list(MODES)}")
        if self.interpolation not in INTERPOLATIONS:
            raise SettingError(f"interpolation is {self.interpolation!r}, expected one of {list(INTERPOLATIONS)}")
        if self.resize is not None and self.mode != "shortest":
            raise SettingError(f"resize is {self.resize}, which goes with the mode 'shortest' and not {self.mode!r}")
        if min(*self.size, 1 if self.resize is None else self.resize) < 1:
            raise SettingError(f"pictures of {self.size} after a resize to {self.resize}, expected at least one pixel")

    @property
    def settings(self) -> dict[str, Any]:
        """What goes into an encoder's settings."""
        return asdict(self) | {"size": list(self.size)}

    def __call__(self, image: Image) -> np.ndarray:
        from PIL.Image import Resampling

        how = Resampling[self.interpolation.upper()]
        height, width = self.size
        if self.mode == "squash":
            return np.asarray(image.resize((width, height), how))
        if self.mode == "shortest":
            image = _without_ends(image)
        return self._centre(image.resize(self._resized(*image.size), how))

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Size of the whole picture before it is cut, (width, height)."""
        if self.resize is not None and width <= height:
            return self.resize, int(self.resize * height / width)
        if self.resize is not None:
            return int(self.resize * width / height), self.resize
        ratios = height / self.size[0], width / self.size[1]
        ratio = min(ratios) if self.mode == "shortest" else max(ratios)
        return max(1, round(width / ratio)), max(1, round(height / ratio))

    def _centre(self, image: Image) -> np.ndarray:
        from PIL import Image

        height, width = self.size
        pad_left, pad_top = max(width - image.width, 0) // 2, max(height - image.height, 0) // 2
        if image.width < width or image.height < height:
            padded = Image.new("RGB", (max(width, image.width), max(height, image.height)), (self.fill,) * 3)
            padded.paste(image, (pad_left, pad_top))
            image = padded
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        return np.asarray(image.crop((left, top, left + width, top + height)))


def _without_ends(image: Image) -> Image:
    """The middle of a picture that is a mere line, which would fill the memory once its short side is enlarged."""
    short, long = sorted(image.size)
    if long <= LONGEST_RATIO * short:
        return image
    keep = LONGEST_RATIO * short
    start = (long - keep) // 2
    box = (start, 0, start + keep, short) if image.width == long else (0, start, short, start + keep)
    return image.crop(box)


def normalised(
    arrays: Sequence[np.ndarray], *, mean: Sequence[float], std: Sequence[float], device: str = "cpu"
) -> Tensor:
    """Pictures as a network's input: scaled to 0..1, less ``mean``, by ``std``.

    Args:
        arrays: n of uint8 [H, W, 3]; they travel to the device as bytes.
        mean, std: of red, green and blue, on the scale 0 to 1.

    Returns:
        [n, 3, H, W] float32, contiguous.
    """
    import torch

    pixels = torch.from_numpy(np.stack(arrays)).to(device).permute(0, 3, 1, 2)  # [n, 3, H, W]
    pixels = pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    mean, std = (torch.tensor(list(values), device=device).view(1, 3, 1, 1) for values in (mean, std))
    return pixels.sub_(mean).div_(std)
