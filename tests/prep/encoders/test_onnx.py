"""Picture networks in ONNX files: real weights where they are at hand, and small files that PyTorch writes."""

from __future__ import annotations

import hashlib
import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset_prep.encoders import build_encoder
from dataset_prep.encoders.onnx import OnnxModel
from recbole_mm.errors import SettingError

onnxruntime = pytest.importorskip("onnxruntime")
DATA = Path(__file__).parents[4] / "shared/data"
MOBILENET = DATA / "weights/mobilenet_v2_imagenet.onnx"
real = pytest.mark.skipif(not MOBILENET.is_file(), reason=f"no real weights in {DATA}")


# A network in the wire format of ONNX (Protocol Buffers), so that the tests need no package that writes it.


def field(number: int, content: bytes | str | int) -> bytes:
    """One field of a message: a whole number, or bytes with their length."""
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    content = content.encode() if isinstance(content, str) else content
    return varint(number << 3 | 2) + varint(len(content)) + content


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def tensor_type(name: str, shape: list[int | str], element: int = 1) -> bytes:
    dims = b"".join(field(1, field(1 if isinstance(d, int) else 2, d)) for d in shape)
    return field(1, name) + field(2, field(1, field(1, element) + field(2, dims)))


def node(operator: str, inputs: list[str], output: str, **lists: list[int]) -> bytes:
    attributes = b"".join(
        field(5, field(1, name) + b"".join(field(8, value) for value in values) + field(20, 7))
        for name, values in lists.items()
    )
    return b"".join(field(1, name) for name in inputs) + field(2, output) + field(4, operator) + attributes


def network(
    path: Path,
    *,
    pixels: list[int | str] | None = None,
    outputs: dict[str, list[int | str]] | None = None,
    element: int = 1,
    inputs: int = 1,
    beside: str | None = None,
) -> Path:
    """features: the mean colour of the picture [n, 3]; logits: its opposite [n, 3]; map: the picture itself.

    With ``beside``, the file of that name holds a weight.
    """
    pixels = pixels or ["n", 3, 8, 6]
    outputs = outputs or {"logits": ["n", 3], "features": ["n", 3]}
    places = [2, 3] if pixels[1] == 3 else [1, 2]
    axes = field(5, field(1, 2) + field(2, 7) + field(7, varint(places[0]) + varint(places[1])) + field(8, "axes"))
    keep = field(1, node("ReduceMean", ["pixels", "axes"], "mean"))
    squeeze = field(1, node("Squeeze", ["mean", "axes"], "features"))
    negative = field(1, node("Neg", ["features"], "logits")) + field(1, node("Identity", ["pixels"], "map"))
    graph = keep + squeeze + negative + field(2, "g") + axes
    if beside is not None:
        place = field(1, "location") + field(2, beside)
        graph += field(5, field(1, 1) + field(2, 1) + field(8, "far") + field(13, place) + field(14, 1))
    graph += field(11, tensor_type("pixels", pixels, element))
    graph += b"".join(field(11, tensor_type(f"more{i}", ["n", 3])) for i in range(inputs - 1))
    graph += b"".join(field(12, tensor_type(name, shape)) for name, shape in outputs.items())
    path.write_bytes(field(1, 9) + field(7, graph) + field(8, field(1, "") + field(2, 18)))
    return path


def pictures() -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [
        Image.fromarray(random.integers(0, 256, (h, w, 3), dtype=np.uint8))
        for w, h in ((6, 8), (6, 8), (40, 30), (3, 50), (8, 8))
    ]


def mean_colours(model: OnnxModel, *, mean: float = 0.5, std: float = 0.5) -> np.ndarray:
    arrays = np.stack([model.image_transform(picture) for picture in pictures()])
    return (arrays.mean(axis=(1, 2)) / 255 - mean) / std


# ---------------------------------------------------------------- small networks


@pytest.mark.parametrize("shape", [["n", 3, 8, 6], ["n", 8, 6, 3]])
@pytest.mark.parametrize("batch_size", [1, 2, 5, 9])
def test_both_layouts_and_every_batch_size_give_the_same_vectors(tmp_path, shape, batch_size):
    model = OnnxModel(network(tmp_path / "x.onnx", pixels=shape), batch_size=batch_size)
    assert model.image_transform.size == (8, 6) and model.image_transform.mode == "squash"
    arrays = [model.image_transform(picture) for picture in pictures()]
    features = model.features(arrays)
    assert features.dtype == np.float32 and model.settings["output"] == "features"
    np.testing.assert_allclose(features, mean_colours(model), atol=1e-5)
    np.testing.assert_allclose(model.logits(arrays), -features)


@pytest.mark.parametrize(("value_range", "mean", "std"), [("signed", 0.5, 0.5), ("unit", 0, 1), ("bytes", 0, 1 / 255)])
def test_value_ranges(tmp_path, value_range, mean, std):
    model = OnnxModel(network(tmp_path / "x.onnx"), value_range=value_range)
    arrays = [model.image_transform(picture) for picture in pictures()]
    np.testing.assert_allclose(model.features(arrays), mean_colours(model, mean=mean, std=std), rtol=1e-4, atol=1e-5)


def test_the_value_range_of_imagenet_takes_out_its_mean(tmp_path):
    model = OnnxModel(network(tmp_path / "x.onnx"), value_range="imagenet")
    grey = [np.full((8, 6, 3), 255, dtype=np.uint8)]
    np.testing.assert_allclose(
        model.features(grey)[0], [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225], rtol=1e-5
    )


def test_a_network_with_a_fixed_batch_gets_full_batches(tmp_path):
    free, fixed = (network(tmp_path / name, pixels=[n, 3, 8, 6]) for name, n in (("a.onnx", "n"), ("b.onnx", 4)))
    fixed = OnnxModel(network(fixed, pixels=[4, 3, 8, 6], outputs={"features": [4, 3]}))
    arrays = [fixed.image_transform(picture) for picture in pictures()]
    np.testing.assert_array_equal(fixed.features(arrays), OnnxModel(free).features(arrays))
    assert fixed.features(arrays[:1]).shape == (1, 3)


def test_a_network_of_any_size_takes_the_size_that_is_given(tmp_path):
    file = network(tmp_path / "x.onnx", pixels=["n", 3, "h", "w"])
    assert OnnxModel(file).image_transform.size == (224, 224)
    model = OnnxModel(file, size=32, resize=40)
    assert (model.image_transform.size, model.image_transform.resize) == ((32, 32), 40)
    np.testing.assert_allclose(
        model.features([model.image_transform(picture) for picture in pictures()]), mean_colours(model), atol=1e-5
    )


def test_an_output_with_places_is_averaged(tmp_path):
    model = OnnxModel(network(tmp_path / "x.onnx", outputs={"map": ["n", 3, 8, 6]}))
    arrays = [model.image_transform(picture) for picture in pictures()]
    assert model.settings["output"] == "map"
    np.testing.assert_allclose(model.features(arrays), mean_colours(model), atol=1e-5)


def test_the_encoder_is_the_model_and_its_transform_can_be_sent(tmp_path):
    file = network(tmp_path / "x.onnx")
    encoder = build_encoder("onnx", feature="image", model=str(file), batch_size=2)
    arrays = [pickle.loads(pickle.dumps(encoder.transform))(picture) for picture in pictures()]
    np.testing.assert_array_equal(np.stack(encoder.encode(arrays)), OnnxModel(file).features(arrays))
    assert encoder.settings["width"] == 3 and encoder.encode([]) == [] and encoder.source == "image"
    encoder.fit([])


def test_settings_name_the_bytes_and_no_place(tmp_path):
    file = network(tmp_path / "x.onnx")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    settings = OnnxModel(file).settings
    assert settings["model"] == "x.onnx" and settings["weights_sha256"] == {"x.onnx": digest}
    assert str(tmp_path) not in json.dumps(settings)


@pytest.mark.parametrize("name", ["weights", "x.onnx.data", "long" * 40])
def test_files_of_weights_that_the_network_names_belong_to_it_and_no_others(tmp_path, name):
    (tmp_path / name).write_bytes(b"1234")
    (tmp_path / "x.onnx_data").write_bytes(b"of an earlier one")
    file = network(tmp_path / "x.onnx", beside=name)
    assert sorted(OnnxModel(file).settings["weights_sha256"]) == sorted([name, "x.onnx"])


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    model = OnnxModel(network(tmp_path / "x.onnx"))
    model._std = (0.0,) * 3
    with pytest.raises(SettingError, match=r"model x\.onnx gave NaN or infinity in float32; its weights are broken"):
        model.logits([np.full((8, 6, 3), 200, dtype=np.uint8)])


# ---------------------------------------------------------------- mistakes


def test_files_that_are_no_picture_networks_are_refused(tmp_path):
    (tmp_path / "page.onnx").write_text("<html>")
    with pytest.raises(SettingError, match="onnxruntime cannot load .*page.onnx .*; is it an ONNX file"):
        OnnxModel(tmp_path / "page.onnx")
    with pytest.raises(SettingError, match="no file .*none.onnx; the encoder 'onnx' takes a local .onnx file"):
        OnnxModel(tmp_path / "none.onnx")
    for arguments in ({"pixels": ["n", 1, 8, 8]}, {"inputs": 2}):
        with pytest.raises(
            SettingError, match="x.onnx is no network of pictures: it takes pixels tensor.float. .*expected"
        ):
            OnnxModel(network(tmp_path / "x.onnx", **arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output": "pool"}, r"x.onnx has no output 'pool', only \['logits', 'features'\]; choose one of them"),
        ({"value_range": "0..1"}, "value_range is '0..1', expected one of .*'signed'"),
        ({"size": 32}, r"size is 32, but x.onnx takes pictures of \(8, 6\); leave it out"),
        ({"batch_size": 0}, "batch_size is 0, expected at least 1"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(tmp_path, arguments, message):
    with pytest.raises(SettingError, match=message):
        OnnxModel(network(tmp_path / "x.onnx"), **arguments)


def test_a_network_without_logits_has_no_class_names(tmp_path):
    model = OnnxModel(network(tmp_path / "x.onnx", outputs={"features": ["n", 3]}))
    with pytest.raises(SettingError, match=r"no output 'logits', only \['features'\]; class names need a network"):
        model.logits([])


def test_the_encoder_needs_a_file():
    with pytest.raises(SettingError, match="the encoder 'onnx' needs a network; give it with --model FILE.onnx"):
        build_encoder("onnx", feature="image")


def test_F64_without_onnxruntime_the_install_command_is_given(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(SettingError, match=r'(?s)needs the package onnxruntime.*pip install "recbole_mm\[onnx\]"'):
        OnnxModel(tmp_path / "x.onnx")


# ---------------------------------------------------------------- real weights


@real
def test_mobilenet_gives_the_same_bytes_for_every_batch_size():
    files = sorted((DATA / "fixtures/clothes").glob("*.jpg"))[:5]
    vectors = []
    for batch_size in (1, 2, 5):
        model = OnnxModel(MOBILENET, batch_size=batch_size)
        arrays = [model.image_transform(Image.open(file).convert("RGB")) for file in files]
        vectors.append(model.features(arrays))
    assert vectors[0].shape == (5, 1280) and np.isfinite(vectors[0]).all()
    assert vectors[0].tobytes() == vectors[1].tobytes() == vectors[2].tobytes()


@real
def test_mobilenet_sees_clothes_on_pictures_of_clothes():
    names = (DATA / "weights/imagenet_labels.txt").read_text().splitlines()
    words = ("jersey", "cardigan", "suit", "gown", "stole", "jean", "brassiere", "bikini", "maillot", "sweatshirt",
             "trench", "coat", "sock", "sandal", "shoe", "pajama", "velvet", "wool", "miniskirt", "kimono", "abaya",
             "sarong", "poncho", "apron", "swimming", "tie", "hoopskirt", "bag", "purse", "buckle")  # fmt: skip
    model = OnnxModel(MOBILENET)
    files = sorted((DATA / "fixtures/clothes").glob("*.jpg"))
    logits = model.logits([model.image_transform(Image.open(file).convert("RGB")) for file in files])
    assert logits.shape == (len(files), len(names))
    seen = [any(word in names[i].lower() for i in row.argsort()[::-1][:3] for word in words) for row in logits]
    assert np.mean(seen) > 0.75
