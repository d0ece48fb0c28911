"""Texts as pictures: a diffusion model draws each text, an image encoder encodes the drawing.

Source: MMSBR, image generated from text; it has one picture per text and the image encoder of the real pictures.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from dataset_prep.encoders.counts import Counts
from dataset_prep.encoders.devices import choose_device, choose_precision
from dataset_prep.encoders.inner import build_image_encoder
from dataset_prep.encoders.model_files import check_revision, first_line, model_settings, quiet_loading
from dataset_prep.encoders.torchvision_ops import mend_torchvision
from recbole_mm.errors import SettingError

if TYPE_CHECKING:
    from PIL.Image import Image

PACKAGES = ("diffusers", "transformers", "torch")


class GeneratedEncoder:
    """Text -> picture by a pipeline of diffusers -> image encoder.

    Each text has a seed of its own, made of ``seed`` and the text, and is drawn alone: neither order nor batch mates
    change its picture. A drawing takes seconds on a GPU and minutes on a processor.

    Args:
        model: folder of a pipeline of diffusers, or its name on the hub (downloaded once).
        revision: branch, tag or commit of a model on the hub.
        image_encoder: name of the encoder of the pictures.
        image_options: its arguments.
        steps: of denoising.
        guidance: how closely the picture follows the text; 1 or less turns guidance off.
        size: height and width of a picture [pixels]; None takes the model's own.
        prompt: what the model draws of a text, "{}" standing for it, such as "a photo of {}".
        seed: whole number; another one gives other pictures.
        batch_size: of the image encoder, where ``image_options`` does not name its own.
        precision: "auto" loads the model in float16 on a GPU, in float32 elsewhere.
        device: such as "cpu" or "cuda:0"; None takes a GPU if there is one.

    Raises:
        SettingError: diffusers is not installed, the model cannot be loaded, or an argument does not fit.
    """

    name, source = "generated", "text"

    def __init__(
        self,
        *,
        model: str | None = None,
        revision: str | None = None,
        image_encoder: str = "histogram",
        image_options: dict[str, Any] | None = None,
        steps: int = 30,
        guidance: float = 7.5,
        size: int | None = None,
        prompt: str = "{}",
        seed: int = 2020,
        batch_size: int | None = None,
        precision: str = "auto",
        device: str | None = None,
    ) -> None:
        if model is None:
            raise SettingError(
                "the encoder 'generated' needs a text-to-picture model; give --model a folder with a pipeline of"
                " diffusers, or its name on the hub"
            )
        if steps < 1 or (size is not None and (size < 8 or size % 8)):
            raise SettingError(f"steps is {steps} and size {size}, expected 1 or more, and a multiple of 8 [pixels]")
        if prompt.count("{}") != 1:
            raise SettingError(f"prompt is {prompt!r}, expected {{}} in it once, where the text goes")
        model = str(model)
        check_revision(model, revision)
        device = choose_device(device)
        precision = choose_precision(precision, device)
        shared = {"batch_size": batch_size, "device": device}
        self._pictures = build_image_encoder(image_encoder, image_options, shared)
        self._pictures.fit([])
        self._pipeline = load_pipeline(model, revision, device=device, precision=precision)
        self._arguments: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": float(guidance)}
        if size is not None:
            self._arguments |= {"height": size, "width": size}
        self._prompt, self._seed = prompt, seed
        self._drawing = threading.Lock()  # a pipeline keeps the steps of the picture it is at
        self.counts = Counts("truncated", "refused_by_safety_check")
        self.settings: dict[str, Any] = {
            **model_settings(model, revision, packages=PACKAGES),
            "steps": steps,
            "guidance": float(guidance),
            "size": size,
            "prompt": prompt,
            "seed": seed,
            "precision": precision,
            "image_encoder": self._pictures.name,
            "image": self._pictures.settings,
            "width": self._pictures.settings["width"],
        }

    def fit(self, everything: Sequence[str]) -> None:
        """Nothing to learn."""

    def encode(self, batch: Sequence[str]) -> list[np.ndarray]:
        if not batch:
            return []
        return self._pictures.encode([self._pictures.transform(picture) for picture in self.pictures_of(batch)])

    def pictures_of(self, texts: Sequence[str]) -> list[Image]:
        """The drawing of each text, RGB; the same text gives the same drawing."""
        return [self._draw(text) for text in texts]

    def _draw(self, text: str) -> Image:
        import torch

        prompt = self._prompt.replace("{}", text)
        with self._drawing, torch.inference_mode():
            self.counts["truncated"] += _is_too_long(prompt, getattr(self._pipeline, "tokenizer", None))
            drawn = self._pipeline(
                prompt=prompt,
                generator=torch.Generator("cpu").manual_seed(seed_of(text, self._seed)),
                **self._arguments,
            )
        if any(getattr(drawn, "nsfw_content_detected", None) or ()):
            self.counts["refused_by_safety_check"] += 1
        return drawn.images[0].convert("RGB")


def _is_too_long(prompt: str, tokenizer: Any) -> bool:
    if tokenizer is None:  # of several tokenizers: a pipeline that cuts in its own way
        return False
    return len(tokenizer(prompt, truncation=False, verbose=False)["input_ids"]) > tokenizer.model_max_length


def seed_of(text: str, seed: int) -> int:
    """A seed for a text, 0 to 2^63 - 1: the same on every machine."""
    digest = hashlib.sha256(f"{seed} {text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def load_pipeline(model: str, revision: str | None, *, device: str, precision: str) -> Any:
    """A text-to-picture pipeline of diffusers on a device.

    Raises:
        SettingError: diffusers is not installed, or the model cannot be loaded.
    """
    import torch

    mend_torchvision()
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise SettingError(
            f"the encoder 'generated' needs the package diffusers ({error})\n"
            '  install it with: pip install "recbole_mm[generate]"'
        ) from error
    try:
        with quiet_loading(), _quiet_diffusers():
            pipeline = DiffusionPipeline.from_pretrained(model, revision=revision, use_safetensors=True)
    except Exception as error:  # the library and its layers below raise whatever they like
        raise SettingError(
            f"cannot load the text-to-picture model {model!r} ({type(error).__name__}: {first_line(error)})\n"
            "  give --model a folder with a pipeline of diffusers, or a name on the hub while online"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(torch.device(device), getattr(torch, precision))


@contextmanager
def _quiet_diffusers() -> Iterator[None]:
    """Without the progress bar of loading, which every process would draw."""
    from diffusers.utils import logging

    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
