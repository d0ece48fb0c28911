"""Classifiers of torchvision with random weights, saved and loaded like published ones."""

from __future__ import annotations

import hashlib
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset_prep.encoders import build_encoder
from dataset_prep.encoders.torchvision_networks import TorchvisionNetwork
from dataset_prep.encoders.torchvision_ops import mend_torchvision
from recbole_mm.errors import SettingError, UnsafeFileError

mend_torchvision()
torchvision = pytest.importorskip("torchvision")


def pictures() -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [
        Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize(size)
        for size in ((300, 200), (200, 300), (64, 64))
    ]


def save(folder: Path, network: str, **arguments) -> Path:
    torch.manual_seed(0)
    model = torchvision.models.get_model(network, weights=None, **arguments)
    for module in model.modules():  # running means that tell whether they are used
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 2)
    torch.save(model.state_dict(), folder / f"{network}.pth")
    return folder / f"{network}.pth"


@pytest.fixture(scope="module")
def resnet(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("weights"), "resnet18")


def published_features(network: str, file: Path, **arguments) -> np.ndarray:
    """As torchvision itself would: its transforms, its model, the classifier replaced by Identity."""
    model = torchvision.models.get_model(network, weights=None, **arguments)
    model.load_state_dict(torch.load(file))
    model.fc = torch.nn.Identity()
    transform = torchvision.models.get_model_weights(network).DEFAULT.transforms()
    with torch.inference_mode():
        return model.eval()(torch.stack([transform(picture) for picture in pictures()])).numpy()


def test_features_equal_those_of_torchvision_and_ignore_batch_mates(resnet):
    encoder = build_encoder("torchvision", feature="image", network="resnet18", weights=str(resnet), batch_size=2)
    arrays = [pickle.loads(pickle.dumps(encoder.transform))(picture) for picture in pictures()]
    together = np.stack(encoder.encode(arrays))
    assert together.dtype == np.float32 and together.shape == (3, 512) and encoder.settings["width"] == 512
    np.testing.assert_allclose(together, published_features("resnet18", resnet), atol=1e-5)
    alone = np.concatenate([encoder.encode([array]) for array in arrays])
    np.testing.assert_allclose(alone, together, atol=1e-5)
    np.testing.assert_allclose(np.stack(encoder.encode(arrays[::-1])[::-1]), together, atol=1e-5)
    assert np.stack(encoder.encode(arrays)).tobytes() == together.tobytes()
    assert encoder.encode([]) == []
    encoder.fit([])


def test_googlenet_has_1024_features_and_takes_numbers_from_minus_one_to_one(tmp_path):
    file = save(tmp_path, "googlenet", init_weights=False)  # with the auxiliary classifiers, as published
    encoder = build_encoder("torchvision", feature="image", network="googlenet", weights=str(file))
    arrays = [encoder.transform(picture) for picture in pictures()]
    vectors = np.stack(encoder.encode(arrays))
    assert vectors.shape == (3, 1024) and encoder.settings["transform_input"] is True
    arguments = {"init_weights": False, "aux_logits": True, "transform_input": True}
    np.testing.assert_allclose(vectors, published_features("googlenet", file, **arguments), atol=1e-5)


def test_settings_identify_network_weights_and_pixels(resnet):
    settings = TorchvisionNetwork(network="resnet18", weights=str(resnet)).settings
    assert settings["weights"] == "resnet18.pth" and settings["layer"] == "input of fc"
    assert settings["weights_sha256"] == {"resnet18.pth": hashlib.sha256(resnet.read_bytes()).hexdigest()}
    assert settings["pixels"]["size"] == [224, 224] and settings["pixels"]["resize"] == 256
    assert settings["transform_input"] is False and settings["precision"] == "float32"
    assert str(resnet.parent) not in str(settings)


def test_logits_have_imagenets_names(resnet):
    network = TorchvisionNetwork(network="resnet18", weights=str(resnet), batch_size=2)
    arrays = [network.image_transform(picture) for picture in pictures()]
    model = torchvision.models.resnet18()
    model.load_state_dict(torch.load(resnet))
    with torch.inference_mode():
        expected = network.features(arrays) @ model.fc.weight.numpy().T + model.fc.bias.numpy()
    np.testing.assert_allclose(network.logits(arrays), expected, atol=1e-4)
    assert len(network.class_names) == 1000 and network.class_names[0] == "tench"


def test_scores_that_are_not_finite_name_no_class(resnet):
    network = TorchvisionNetwork(network="resnet18", weights=str(resnet))
    torch.nn.init.constant_(network._network.fc.bias, float("nan"))
    with pytest.raises(SettingError, match="model resnet18 gave NaN or infinity in float32"):
        network.logits([network.image_transform(picture) for picture in pictures()])


def test_a_file_with_other_classes_is_read_and_has_no_names(tmp_path):
    network = TorchvisionNetwork(network="resnet18", weights=str(save(tmp_path, "resnet18", num_classes=7)))
    assert network.class_names is None
    assert network.logits([network.image_transform(pictures()[0])]).shape == (1, 7)


def test_any_layer_can_be_taken_and_is_averaged_over_places(resnet):
    arrays = None
    for layer, width in (("layer1", 64), ("layer3.1.conv1", 256), ("avgpool", 512), ("fc", 1000)):
        network = TorchvisionNetwork(network="resnet18", weights=str(resnet), layer=layer)
        arrays = arrays or [network.image_transform(picture) for picture in pictures()]
        assert network.features(arrays).shape == (3, width) and network.settings["layer"] == layer
    default = TorchvisionNetwork(network="resnet18", weights=str(resnet)).features(arrays)
    last = TorchvisionNetwork(network="resnet18", weights=str(resnet), layer="layer4").features(arrays)
    np.testing.assert_allclose(last, default, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "layer", "width"),
    [
        ("squeezenet1_1", None, 512),
        ("mobilenet_v3_small", None, 1024),
        ("vit_b_32", None, 768),
        ("vit_b_32", "encoder", 768),
        ("swin_t", None, 768),
        ("swin_t", "features.1", 96),
    ],
)
def test_other_kinds_of_networks_have_one_vector_per_picture(tmp_path, network, layer, width):
    model = TorchvisionNetwork(network=network, weights=str(save(tmp_path, network)), layer=layer)
    assert model.features([model.image_transform(picture) for picture in pictures()[:1]]).shape == (1, width)


# ---------------------------------------------------------------- published weights


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """PyTorch's cache, and no network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)

    def no_network(*arguments, **more):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    return tmp_path / "hub/checkpoints"


def test_F63_without_a_network_one_error_tells_address_and_place(cache):
    message = "(?s)cannot load the weights ResNet18_Weights.IMAGENET1K_V1 .OSError: Network is unreachable.*"
    with pytest.raises(
        SettingError, match=message + "download https://.*resnet18-f37072fd.pth .*put it there: .*checkpo"
    ):
        TorchvisionNetwork(network="resnet18")


def test_F63_the_copy_in_the_cache_is_used_if_its_hash_is_the_published_one(cache, resnet, monkeypatch):
    content = resnet.read_bytes()
    weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    name = f"resnet18-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    monkeypatch.setattr(type(weights.value), "url", property(lambda _: f"https://x.org/{name}"), raising=False)
    (cache / name).parent.mkdir(parents=True, exist_ok=True)
    (cache / name).write_bytes(content)
    network = TorchvisionNetwork(network="resnet18")
    assert network.settings["weights"] == "IMAGENET1K_V1" and list(network.settings["weights_sha256"]) == [name]
    (cache / name).write_bytes(content[:-1] + b"x")
    with pytest.raises(SettingError, match=f"has sha256 .*, its name says {name[9:-4]}…: it was changed or cut short"):
        TorchvisionNetwork(network="resnet18")


# ---------------------------------------------------------------- mistakes


def test_F63_weights_without_the_network_they_belong_to_are_refused(resnet):
    with pytest.raises(
        SettingError, match="weights .*resnet18.pth' are given without the network they belong to; name it"
    ):
        build_encoder("torchvision", feature="image", weights=str(resnet))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"network": "resnet81"}, "torchvision has no classifier 'resnet81'; did you mean 'resnet18'"),
        (
            {"weights": "IMAGENET1K_V7"},
            r"no weights 'IMAGENET1K_V7' of resnet18: neither a file nor one of \['IMAGENET1K_V",
        ),
        ({"layer": "layer9"}, r"resnet18 has no layer 'layer9'; did you mean 'layer\d'.*its parts are \['conv1'"),
        ({"network": "resnet34"}, "(?s)resnet18.pth holds no weights of resnet34 .*give the network they belong to"),
        ({"batch_size": 0}, "batch_size is 0, expected at least 1"),
        ({"precision": "half"}, "precision is 'half', expected one of"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(resnet, arguments, message):
    with pytest.raises(SettingError, match=message):
        TorchvisionNetwork(**{"network": "resnet18", "weights": str(resnet), **arguments})


def test_files_that_hold_no_weights_are_refused(tmp_path):
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    torch.save(Harm(), tmp_path / "harm.pth")
    with pytest.raises(UnsafeFileError, match="harm.pth holds Python objects beside weights"):
        TorchvisionNetwork(network="resnet18", weights=str(tmp_path / "harm.pth"))
    assert not (tmp_path / "harm").exists()
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(SettingError, match="list.pth is no state_dict, found list"):
        TorchvisionNetwork(network="resnet18", weights=str(tmp_path / "list.pth"))
    (tmp_path / "cut.pth").write_bytes(b"PK")
    with pytest.raises(SettingError, match="(?s)cannot load .*cut.pth .*give a state_dict as torch.save writes it"):
        TorchvisionNetwork(network="resnet18", weights=str(tmp_path / "cut.pth"))


def test_tensors_are_found_in_every_wrapping(resnet, tmp_path):
    from safetensors.torch import save_file

    state = torch.load(resnet)
    expected = TorchvisionNetwork(network="resnet18", weights=str(resnet))
    arrays = [expected.image_transform(pictures()[0])]
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "a.pth")
    torch.save({"model": state}, tmp_path / "b.pth")
    save_file(state, tmp_path / "c.safetensors")
    for name in ("a.pth", "b.pth", "c.safetensors"):
        network = TorchvisionNetwork(network="resnet18", weights=str(tmp_path / name))
        np.testing.assert_array_equal(network.features(arrays), expected.features(arrays))


def test_F64_without_torchvision_the_install_command_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(SettingError, match=r'(?s)needs the package torchvision.*pip install "recbole_mm\[encoders\]"'):
        TorchvisionNetwork(network="resnet18")
