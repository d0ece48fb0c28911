"""CLIP from local files of both families: tiny models with random weights, saved and loaded like real ones."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset_prep.encoders import build_encoder
from dataset_prep.encoders.clip import ClipModel
from dataset_prep.encoders.torchvision_ops import mend_torchvision
from recbole_mm.errors import SettingError, UnsafeFileError

WIDTH = 16
TEXTS = ["a red tent", "a tent", "a much longer text about a bright blue sports car " * 20, "", "lamp"]
OPEN_CLIP = {
    "embed_dim": WIDTH,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def pictures() -> list[Image.Image]:
    random = np.random.default_rng(0)
    sizes = [(40, 30), (30, 50), (32, 32), (9, 12)]
    return [Image.fromarray(random.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


@pytest.fixture(scope="module")
def open_clip_folder(tmp_path_factory) -> Path:
    mend_torchvision()
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny-open-clip"
    folder.mkdir()
    config = {"model_cfg": OPEN_CLIP, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    model = open_clip.model.CLIP(**OPEN_CLIP)
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder


@pytest.fixture(scope="module")
def transformers_folder(tmp_path_factory) -> Path:
    mend_torchvision()
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny-transformers"
    folder.mkdir()
    letters = sorted("abcdefghijklmnopqrstuvwxyz ")
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer.save_pretrained(folder)
    half = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    end = words.index("<|endoftext|>")
    config = transformers.CLIPConfig(
        text_config={
            **half,
            "vocab_size": len(words),
            "max_position_embeddings": 16,
            "eos_token_id": end,
            "pad_token_id": end,
        },
        vision_config={**half, "image_size": 32, "patch_size": 16},
        projection_dim=WIDTH,
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    processor = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}, "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps({**processor, "image_mean": [0.5, 0.4, 0.3]}))
    return folder


@pytest.fixture(params=["open_clip_folder", "transformers_folder"])
def folder(request) -> Path:
    return request.getfixturevalue(request.param)


# ---------------------------------------------------------------- both families


def test_vectors_have_length_one_and_ignore_order_and_batch_mates(folder):
    clip = ClipModel(model=str(folder), batch_size=3)
    arrays = [clip.image_transform(picture) for picture in pictures()]
    for encode, batch in ((clip.encode_images, arrays), (clip.encode_texts, TEXTS)):
        together = encode(batch)
        assert together.dtype == np.float32 and together.shape == (len(batch), WIDTH)
        np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, rtol=1e-6)
        np.testing.assert_allclose(np.concatenate([encode([one]) for one in batch]), together, atol=1e-6)
        np.testing.assert_allclose(encode(batch[::-1])[::-1], together, atol=1e-6)
        assert np.abs(together - together[0]).max() > 1e-3
        assert encode(batch).tobytes() == together.tobytes()


def test_two_models_of_the_same_files_are_the_same(folder):
    first, second = ClipModel(model=str(folder)), ClipModel(model=str(folder))
    assert first.encode_texts(TEXTS).tobytes() == second.encode_texts(TEXTS).tobytes()
    assert first.settings == second.settings and json.dumps(first.settings)
    assert str(folder.parent) not in json.dumps(first.settings)
    assert first.settings["model"] == folder.name and first.settings["precision"] == "float32"
    assert [len(value) for value in first.settings["weights_sha256"].values()] == [64]


def test_texts_beyond_the_limit_are_cut_and_counted(folder):
    clip = ClipModel(model=str(folder))
    long = "a b c d e f g h i j k l m n o p q r s"
    a, b = clip.encode_texts([long, long + " and more"])
    np.testing.assert_array_equal(a, b)
    assert clip.counts == {"truncated": 2}
    clip.encode_texts(["a b"])
    assert clip.counts == {"truncated": 2}


def test_the_encoders_are_the_halves_of_the_model(folder):
    clip = ClipModel(model=str(folder))
    of_pictures = build_encoder("clip", feature="image", model=str(folder), batch_size=2)
    of_texts = build_encoder("clip_text", feature="image_from_text", model=str(folder), device="cpu")
    assert (of_pictures.source, of_texts.source) == ("image", "text")
    arrays = [pickle.loads(pickle.dumps(of_pictures.transform))(picture) for picture in pictures()]
    np.testing.assert_allclose(np.stack(of_pictures.encode(arrays)), clip.encode_images(arrays), atol=1e-6)
    np.testing.assert_array_equal(np.stack(of_texts.encode(TEXTS)), clip.encode_texts(TEXTS))
    assert of_pictures.encode([]) == [] and of_texts.encode([]) == []
    assert of_pictures.settings["width"] == of_texts.settings["width"] == WIDTH
    of_pictures.fit([]), of_texts.fit([])


# ---------------------------------------------------------------- open_clip


def test_open_clip_vectors_equal_its_own(open_clip_folder):
    import open_clip

    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{open_clip_folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{open_clip_folder}")
    model.eval()
    with torch.inference_mode():
        images = model.encode_image(torch.stack([transform(p) for p in pictures()]), normalize=True)
        texts = model.encode_text(tokenizer(TEXTS), normalize=True)
    clip = ClipModel(model=f"local-dir:{open_clip_folder}")
    assert clip.settings["mean"] == [0.5] * 3 and clip.settings["std"] == [0.25] * 3
    arrays = [clip.image_transform(picture) for picture in pictures()]
    np.testing.assert_allclose(clip.encode_images(arrays), images.numpy(), atol=1e-6)
    np.testing.assert_allclose(clip.encode_texts(TEXTS), texts.numpy(), atol=1e-6)


@pytest.fixture
def small_built_in(monkeypatch):
    """A small model among those that open_clip knows by name, with a tag as OpenAI's."""
    mend_torchvision()
    open_clip = pytest.importorskip("open_clip")
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Tiny-B-32", OPEN_CLIP)
    return open_clip


def test_a_model_by_name_takes_a_local_checkpoint(small_built_in, open_clip_folder):
    checkpoint = open_clip_folder / "open_clip_pytorch_model.bin"
    clip = ClipModel(model="Tiny-B-32", pretrained=str(checkpoint))
    settings = clip.settings
    assert (settings["model"], settings["pretrained"], settings["library"]) == (
        "Tiny-B-32",
        checkpoint.name,
        "open_clip",
    )
    assert list(settings["weights_sha256"]) == [checkpoint.name]
    np.testing.assert_array_equal(clip.encode_texts(TEXTS), ClipModel(model=str(open_clip_folder)).encode_texts(TEXTS))


def test_weights_of_a_tag_bring_their_activation_and_preprocessing(small_built_in, open_clip_folder, monkeypatch):
    """OpenAI's weights were trained with an approximation of GELU; the plain model's exact one gives other vectors."""
    checkpoint = open_clip_folder / "open_clip_pytorch_model.bin"
    tag = {"file": str(checkpoint), "quick_gelu": True, "mean": (0.1,) * 3, "std": (0.2,) * 3}
    monkeypatch.setitem(small_built_in.pretrained._PRETRAINED, "Tiny-B-32", {"openai": tag})
    clip = ClipModel(model="Tiny-B-32")
    assert clip.settings["pretrained"] == "openai" and clip.settings["mean"] == [0.1] * 3
    exact = ClipModel(model="Tiny-B-32", pretrained=str(checkpoint)).encode_texts(TEXTS)
    assert 1e-5 < np.abs(clip.encode_texts(TEXTS) - exact).max()


def test_F63_weights_that_cannot_be_downloaded_name_the_way_out(small_built_in, monkeypatch):
    tag = {"url": "http://127.0.0.1:9/Tiny.pt"}  # a port where nobody listens
    monkeypatch.setitem(small_built_in.pretrained._PRETRAINED, "Tiny-B-32", {"openai": tag})
    with pytest.raises(
        SettingError, match="(?s)cannot get the weights 'openai' of Tiny-B-32 .*give --pretrained the file"
    ):
        ClipModel(model="Tiny-B-32")


def test_unknown_names_and_weights_are_refused(small_built_in, tmp_path):
    with pytest.raises(SettingError, match="(?s)open_clip has no model 'Tny-B-32'; did you mean 'Tiny-B-32'.*a folder"):
        ClipModel(model="Tny-B-32")
    with pytest.raises(SettingError, match="no weights 'open-ai' of Tiny-B-32: neither a file nor one of"):
        ClipModel(model="Tiny-B-32", pretrained="open-ai")


def test_a_checkpoint_that_could_run_code_is_not_read(small_built_in, tmp_path):
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    torch.save({"state_dict": Harm()}, tmp_path / "harm.pt")
    with pytest.raises(UnsafeFileError, match="holds Python objects beside weights"):
        ClipModel(model="Tiny-B-32", pretrained=str(tmp_path / "harm.pt"))
    assert not (tmp_path / "harm").exists()


def test_a_checkpoint_of_another_model_is_refused(small_built_in, tmp_path):
    torch.save({"visual.proj": torch.zeros(3, 3)}, tmp_path / "other.pt")
    with pytest.raises(SettingError, match="(?s)cannot load the CLIP model 'Tiny-B-32'.*--pretrained takes a local"):
        ClipModel(model="Tiny-B-32", pretrained=str(tmp_path / "other.pt"))


def test_a_folder_without_weights_is_refused_and_not_random(open_clip_folder, tmp_path):
    (tmp_path / "open_clip_config.json").write_text((open_clip_folder / "open_clip_config.json").read_text())
    with pytest.raises(SettingError, match="cannot load the CLIP model"):
        ClipModel(model=str(tmp_path))


# ---------------------------------------------------------------- transformers


def test_transformers_vectors_equal_its_own(transformers_folder):
    import transformers

    model = transformers.CLIPModel.from_pretrained(transformers_folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(transformers_folder)
    clip = ClipModel(model=str(transformers_folder))
    assert clip.settings["library"] == "transformers"
    assert (clip.image_transform.resize, clip.image_transform.size) == (36, (32, 32))
    arrays = [clip.image_transform(picture) for picture in pictures()]
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    pixels = (pixels - mean[:, None, None]) / std[:, None, None]
    with torch.inference_mode():
        tokens = [tokenizer(text, truncation=True, max_length=16, return_tensors="pt") for text in TEXTS]
        output = [model(pixel_values=pixels, **one) for one in tokens]
    np.testing.assert_allclose(clip.encode_images(arrays), output[0].image_embeds.numpy(), atol=1e-6)
    expected = torch.cat([one.text_embeds for one in output]).numpy()
    np.testing.assert_allclose(clip.encode_texts(TEXTS), expected, atol=1e-6)


def test_the_preprocessing_is_read_in_every_spelling(transformers_folder, tmp_path):
    from dataset_prep.encoders.clip import CLIP_MEAN, _preprocessing

    pixels, mean, _ = _preprocessing(tmp_path, 32)
    assert (pixels.size, pixels.resize, pixels.interpolation, mean) == ((32, 32), 32, "bicubic", CLIP_MEAN)
    old = {"size": 40, "crop_size": 36, "resample": 2}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(old))
    pixels, _, _ = _preprocessing(tmp_path, 32)
    assert (pixels.size, pixels.resize, pixels.interpolation) == ((36, 36), 40, "bilinear")
    new = {"image_processor": {"size": {"height": 20, "width": 30}, "image_std": [1, 1, 1]}}
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps(new))
    pixels, _, std = _preprocessing(tmp_path, 32)
    assert (pixels.size, pixels.mode, std) == ((20, 30), "squash", (1, 1, 1))


def test_another_type_of_model_and_missing_weights_are_refused(transformers_folder, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    (tmp_path / "config.json").write_text('{"model_type": "siglip"}')
    with pytest.raises(SettingError, match="is a model of type 'siglip', expected 'clip'"):
        ClipModel(model=str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SettingError, match="config.json is no JSON"):
        ClipModel(model=str(tmp_path))
    cut = tmp_path / "cut"
    shutil.copytree(transformers_folder, cut)
    weights = load_file(cut / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, cut / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SettingError, match="lacks 1 weights, such as text_projection.weight, which would be random"):
        ClipModel(model=str(cut))
    (cut / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(SettingError, match="cannot load the CLIP model"):
        ClipModel(model=str(cut))


@pytest.mark.slow
def test_a_transformers_clip_needs_neither_torchvision_nor_open_clip(transformers_folder):
    code = (
        "import sys\n"
        "for name in ('torchvision', 'open_clip', 'timm'): sys.modules[name] = None\n"
        "from dataset_prep.encoders.clip import ClipModel\n"
        "import numpy as np\n"
        f"clip = ClipModel(model={str(transformers_folder)!r})\n"
        "print(clip.encode_texts(['a']).shape, clip.encode_images([np.zeros((32, 32, 3), np.uint8)]).shape)\n"
    )
    root = str(Path(__file__).parents[3])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout.strip() == "(1, 16) (1, 16)", done.stderr


# ---------------------------------------------------------------- hub, absent packages, arguments


def test_F63_a_hub_model_comes_out_of_the_cache_without_a_network(open_clip_folder, tmp_path, monkeypatch):
    """The hub's cache: models--<owner>--<name>/snapshots/<commit>, and refs/main with the commit."""
    import shutil

    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cached = tmp_path / "models--shop--tiny"
    shutil.copytree(open_clip_folder, cached / "snapshots" / ("c" * 40))
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("c" * 40)
    expected = ClipModel(model=str(open_clip_folder)).encode_texts(TEXTS)
    for name in ("hf-hub:shop/tiny", "shop/tiny"):
        clip = ClipModel(model=name)
        np.testing.assert_array_equal(clip.encode_texts(TEXTS), expected)
        assert (clip.settings["model"], clip.settings["revision"]) == ("shop/tiny", "c" * 40)
    with pytest.raises(
        SettingError, match="(?s)cannot get the CLIP model 'shop/none' at revision 'v2' from the hub.*folder"
    ):
        ClipModel(model="shop/none", revision="v2")


@pytest.mark.parametrize(
    ("package", "kind"), [("open_clip", "open_clip_folder"), ("transformers", "transformers_folder")]
)
def test_F64_without_its_package_the_install_command_is_given(request, monkeypatch, package, kind):
    folder = request.getfixturevalue(kind)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SettingError, match=r'(?s)needs the package.*pip install "recbole_mm\[encoders\]"'):
        ClipModel(model=str(folder))


def test_F64_without_open_clip_the_default_model_asks_for_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(SettingError, match=r"'ViT-B-32' needs the package open-clip-torch"):
        ClipModel()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0, expected at least 1"),
        ({"precision": "int8"}, "precision is 'int8', expected one of"),
        ({"device": "cuda:99"}, "the device 'cuda:99' cannot be used here"),
        ({"revision": "v1"}, "revision 'v1' belongs to a name on the hub, and .* is none"),
        ({"pretrained": "openai"}, "pretrained 'openai' goes with the name of an open_clip model; .* brings its own"),
        (
            {"model": "local-dir:nowhere"},
            "(?s)nowhere holds neither open_clip_config.json nor config.json.*give --model",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(open_clip_folder, arguments, message):
    with pytest.raises(SettingError, match=message):
        ClipModel(**{"model": str(open_clip_folder), **arguments})
