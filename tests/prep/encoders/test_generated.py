"""Texts as drawn pictures: seeds, order, and what the pipeline is asked for."""

from __future__ import annotations

import json
import sys
import zlib
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tiny_text_models import TEXTS, save_pipeline

from dataset_prep.encoders import build_encoder
from dataset_prep.encoders.generated import GeneratedEncoder, seed_of
from recbole_mm.errors import SettingError


class ColourPipeline:
    """Draws a plain picture whose colour hangs on prompt and seed; "red" is red."""

    asked: list[dict] = []

    @classmethod
    def from_pretrained(cls, model: str, *, revision: str | None, use_safetensors: bool) -> ColourPipeline:
        if "missing" in model:
            raise OSError("no model_index.json\nand a page of advice")
        assert use_safetensors
        return cls()

    def set_progress_bar_config(self, *, disable: bool) -> None:
        assert disable

    def to(self, device, dtype) -> ColourPipeline:
        return self

    def __call__(self, *, prompt: str, generator, **arguments) -> SimpleNamespace:
        self.asked.append({"prompt": prompt, **arguments})
        colour = (
            (255, 0, 0) if "red" in prompt else (0, zlib.crc32(prompt.encode()) % 256, generator.initial_seed() % 256)
        )
        nsfw = ["bad" in prompt]
        return SimpleNamespace(images=[Image.new("RGBA", (16, 16), colour)], nsfw_content_detected=nsfw)


@pytest.fixture
def diffusers(monkeypatch) -> type[ColourPipeline]:
    """The package diffusers, with that pipeline for any model."""
    package, utils = ModuleType("diffusers"), ModuleType("diffusers.utils")
    package.DiffusionPipeline = ColourPipeline
    utils.logging = SimpleNamespace(disable_progress_bar=lambda: None, enable_progress_bar=lambda: None)
    monkeypatch.setitem(sys.modules, "diffusers", package)
    monkeypatch.setitem(sys.modules, "diffusers.utils", utils)
    monkeypatch.setattr(ColourPipeline, "asked", [])
    pytest.importorskip("transformers")
    return ColourPipeline


def test_the_drawing_goes_through_the_image_encoder(diffusers):
    encoder = GeneratedEncoder(model="drawer", device="cpu", image_options={"size": 32})
    histogram = build_encoder("histogram", feature="image", size=32)
    expected = histogram.encode([histogram.transform(Image.new("RGB", (16, 16), (255, 0, 0)))])[0]
    np.testing.assert_array_equal(encoder.encode(["a red tent"])[0], expected)
    assert encoder.encode([]) == []


def test_neither_order_nor_batch_mates_change_a_drawing(diffusers):
    encoder = GeneratedEncoder(model="drawer", device="cpu")
    texts = ["tent", "hat", "a red hat", "tent"]
    together = np.stack(encoder.encode(texts))
    np.testing.assert_array_equal(np.stack(encoder.encode(texts[::-1])[::-1]), together)
    np.testing.assert_array_equal(np.stack([encoder.encode([text])[0] for text in texts]), together)
    np.testing.assert_array_equal(together[0], together[3])


def test_each_text_has_a_seed_of_its_own_that_is_the_same_everywhere():
    seeds = {seed_of(text, seed) for text in TEXTS for seed in (0, 1)}
    assert len(seeds) == 2 * len(TEXTS) and all(0 <= seed < 2**63 for seed in seeds)
    # first 8 bytes of sha256("2020 a red tent"), without the last bit
    assert seed_of("a red tent", 2020) == 6102668885559682779


def test_the_pipeline_gets_steps_guidance_size_and_prompt(diffusers):
    encoder = GeneratedEncoder(model="drawer", device="cpu", steps=4, guidance=3, size=64, prompt="a photo of {}")
    encoder.encode(["hat"])
    expected = {"prompt": "a photo of hat", "num_inference_steps": 4, "guidance_scale": 3.0, "height": 64, "width": 64}
    assert diffusers.asked == [expected]
    GeneratedEncoder(model="drawer", device="cpu").encode(["hat"])
    assert set(diffusers.asked[1]) == {"prompt", "num_inference_steps", "guidance_scale"}


def test_drawings_that_a_safety_check_blackened_are_counted(diffusers):
    encoder = GeneratedEncoder(model="drawer", device="cpu")
    encoder.encode(["a bad hat", "a hat"])
    assert encoder.counts == {"truncated": 0, "refused_by_safety_check": 1}


def test_the_settings_are_json_and_tell_runs_apart(diffusers):
    settings = GeneratedEncoder(model="drawer", device="cpu", batch_size=3).settings
    assert json.loads(json.dumps(settings)) == settings
    assert (settings["steps"], settings["image_encoder"], settings["width"]) == (30, "histogram", 320)
    assert settings != GeneratedEncoder(model="drawer", device="cpu", seed=1).settings
    assert settings != GeneratedEncoder(model="drawer", device="cpu", image_options={"size": 32}).settings


def test_F64_without_diffusers_the_install_command_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(SettingError, match=r'(?s)needs the package diffusers.*pip install "recbole_mm\[generate\]"'):
        GeneratedEncoder(model="drawer", device="cpu")


def test_wrong_arguments_say_what_is_right(diffusers, tmp_path):
    with pytest.raises(SettingError, match="needs a text-to-picture model; give --model a folder"):
        GeneratedEncoder()
    with pytest.raises(
        SettingError, match="(?s)cannot load the text-to-picture model 'missing' .*json\\)\n  give --model"
    ):
        GeneratedEncoder(model="missing", device="cpu")
    for wrong in ({"steps": 0}, {"size": 30}, {"size": 0}):
        with pytest.raises(SettingError, match="expected 1 or more, and a multiple of 8"):
            GeneratedEncoder(model="drawer", device="cpu", **wrong)
    with pytest.raises(SettingError, match=r"prompt is 'a hat', expected \{\} in it once"):
        GeneratedEncoder(model="drawer", device="cpu", prompt="a hat")
    with pytest.raises(SettingError, match="the encoder 'tfidf' reads text; here one is needed that reads image"):
        GeneratedEncoder(model="drawer", device="cpu", image_encoder="tfidf")
    with pytest.raises(SettingError, match="revision 'main' belongs to a name on the hub"):
        GeneratedEncoder(model=str(tmp_path), device="cpu", revision="main")


def test_a_small_pipeline_of_diffusers_draws_by_the_text_alone(tmp_path):
    """Random weights: pictures without meaning, through the real library."""
    folder = save_pipeline(tmp_path / "drawer")
    encoder = GeneratedEncoder(model=str(folder), device="cpu", steps=2)
    texts = ["a hat", "a tent", "a very long tale of tents and hats"]
    together = [np.asarray(picture) for picture in encoder.pictures_of(texts)]
    assert together[0].shape == (16, 16, 3) and (together[0] != together[1]).any()
    backwards = [np.asarray(picture) for picture in encoder.pictures_of(texts[::-1])][::-1]
    np.testing.assert_array_equal(backwards, together)
    assert encoder.counts["truncated"] == 2  # the third, twice
    other = GeneratedEncoder(model=str(folder), device="cpu", steps=2, seed=1).pictures_of(texts[:1])[0]
    assert (np.asarray(other) != together[0]).any()
    assert {file.partition("/")[0] for file in encoder.settings["weights_sha256"]} == {"text_encoder", "unet", "vae"}
    assert encoder.encode(texts)[0].shape == (encoder.settings["width"],)
