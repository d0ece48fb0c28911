"""Transforms for worker processes, which import them by name; light, so that workers start fast."""

from __future__ import annotations

import os
import time

import numpy as np
from PIL import Image


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


def crash_on_red(image: Image.Image) -> np.ndarray:
    if image.getpixel((0, 0)) == (255, 0, 0):
        os._exit(139)
    return np.asarray(image)


def hang_on_red(image: Image.Image) -> np.ndarray:
    if image.getpixel((0, 0)) == (255, 0, 0):
        time.sleep(600)
    return np.asarray(image)


def eat_memory_on_red(image: Image.Image) -> np.ndarray:
    if image.getpixel((0, 0)) == (255, 0, 0):
        np.ones(3 << 30, dtype=np.uint8)
    return np.asarray(image)


def fail_on_red(image: Image.Image) -> np.ndarray:
    if image.getpixel((0, 0)) == (255, 0, 0):
        raise KeyError("no red")
    return np.asarray(image)


def many_pixels(image: Image.Image) -> np.ndarray:
    return np.zeros((600, 600, 3), dtype=np.float32) + image.getpixel((0, 0))[0]
