"""Class names of pictures: which are chosen, and that they reach the text encoder as a whole."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_text_models import save_sentence_model, skip_without

from dataset_prep.encoders import build_encoder
from dataset_prep.encoders import classes as classes_module
from dataset_prep.encoders.classes import ClassNamesEncoder, read_labels
from recbole_mm.errors import DatasetError, SettingError

NAMES = ["background", "red tent, awning", "green hat", "blue hat"]
WEIGHTS = Path(__file__).parents[4] / "shared" / "data" / "weights"
CLOTHES = WEIGHTS.parent / "fixtures" / "clothes"


class ColourClassifier:
    """Scores of "background", red, green and blue: a little more than red, and the mean of each colour."""

    def __init__(self, path: str, *, batch_size: int = 16, value_range: str = "signed") -> None:
        self.batch_size = batch_size
        self.settings = {"model": Path(path).name, "value_range": value_range}

    def image_transform(self, picture: Image.Image) -> np.ndarray:
        return np.asarray(picture.resize((2, 2)))

    def logits(self, arrays: list[np.ndarray]) -> np.ndarray:
        colours = np.stack([array.reshape(-1, 3).mean(axis=0) for array in arrays])
        return np.hstack([colours[:, :1] + 1, colours]).astype(np.float32)


@pytest.fixture
def colours(monkeypatch) -> None:
    monkeypatch.setattr(classes_module, "OnnxModel", ColourClassifier)


def make(folder: Path, names: list[str] = NAMES, **options: object) -> ClassNamesEncoder:
    (folder / "names.txt").write_text("".join(f"{name}\n" for name in names))
    given = {"model": "net.onnx", "labels": str(folder / "names.txt"), "text_encoder": "tfidf"}
    return ClassNamesEncoder(**{**given, **options})


def arrays(encoder: ClassNamesEncoder, *colours: tuple[int, int, int]) -> list[np.ndarray]:
    return [encoder.transform(Image.new("RGB", (5, 4), colour)) for colour in colours]


def test_the_best_classes_are_named_the_best_first_and_background_never(tmp_path, colours):
    encoder = make(tmp_path)
    pictures = arrays(encoder, (250, 90, 0), (0, 90, 250), (7, 7, 7))
    assert encoder.names_of(pictures) == [
        ["red tent, awning", "green hat"], ["blue hat", "green hat"], ["red tent, awning", "green hat"],
    ]  # fmt: skip
    assert make(tmp_path, n_classes=1, skip=[]).names_of(pictures[:1]) == [["background"]]
    assert encoder.encode([]) == []


def test_the_whole_names_reach_the_text_encoder_and_not_their_letters(tmp_path, colours, monkeypatch):
    """The release of MMSBR passes a string where a list is expected, so that every letter is a text."""
    encoder, seen = make(tmp_path), []
    encode = encoder._text.encode
    monkeypatch.setattr(encoder._text, "encode", lambda texts: seen.append(texts) or encode(texts))
    vectors = encoder.encode(arrays(encoder, (250, 90, 0), (0, 90, 250)))
    assert seen == [["red tent, awning, green hat", "blue hat, green hat"]]
    assert [vector.shape for vector in vectors] == [(encoder.settings["width"],)] * 2

    text = build_encoder("tfidf", feature="text")
    text.fit(NAMES)
    np.testing.assert_array_equal(np.stack(vectors), np.stack(text.encode(seen[0])))


def test_neither_order_nor_batch_size_changes_a_vector(tmp_path, colours):
    encoder = make(tmp_path)
    pictures = arrays(encoder, (250, 90, 0), (0, 90, 250), (9, 200, 10))
    together = np.stack(encoder.encode(pictures))
    np.testing.assert_array_equal(np.stack([encoder.encode([picture])[0] for picture in pictures]), together)
    np.testing.assert_array_equal(np.stack(encoder.encode(pictures[::-1])[::-1]), together)


def test_labels_may_be_numbered(tmp_path):
    for text in ("0: cat\n1: dog, hound\n", "0 cat\n1 dog,  hound\n", "cat\ndog, hound", "\ufeffcat\r\ndog, hound\r\n"):
        (tmp_path / "names.txt").write_bytes(text.encode())
        assert read_labels(tmp_path / "names.txt") == ["cat", "dog, hound"]
    (tmp_path / "names.txt").write_text("7 cats\n8 dogs\n")
    assert read_labels(tmp_path / "names.txt") == ["7 cats", "8 dogs"]


def test_labels_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(DatasetError, match=r"cannot read the class names .*none\.txt"):
        read_labels(tmp_path / "none.txt")
    (tmp_path / "names.txt").write_text("cat\n\ndog\n")
    with pytest.raises(DatasetError, match=r"names\.txt, line 2: no class name; every class needs one"):
        read_labels(tmp_path / "names.txt")
    (tmp_path / "names.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(DatasetError, match="are no text file in UTF-8 with a name a line"):
        read_labels(tmp_path / "names.txt")


def test_the_settings_are_json_and_tell_runs_apart(tmp_path, colours):
    settings = make(tmp_path, batch_size=4).settings
    assert json.loads(json.dumps(settings)) == settings and str(tmp_path) not in json.dumps(settings)
    assert (settings["n_labels"], settings["n_classes"], settings["text_encoder"]) == (4, 2, "tfidf")
    assert settings == make(tmp_path).settings
    assert settings != make(tmp_path, NAMES[::-1]).settings
    assert settings != make(tmp_path, classifier_options={"value_range": "unit"}).settings


def test_wrong_arguments_say_what_is_right(tmp_path, colours):
    with pytest.raises(SettingError, match="there are 3 class names, and the classifier has 4 classes"):
        make(tmp_path, NAMES[:3])
    with pytest.raises(SettingError, match=r"net\.onnx comes without class names; give labels"):
        make(tmp_path, labels=None)
    for number in (0, 4):
        with pytest.raises(SettingError, match=f"n_classes is {number}, expected 1 to 3, the classes that may be"):
            make(tmp_path, n_classes=number)
    with pytest.raises(SettingError, match=r"network belongs to torchvision, and model net\.onnx to ONNX"):
        make(tmp_path, network="resnet18")
    with pytest.raises(SettingError, match="ColourClassifier has no option colour; its settings are"):
        make(tmp_path, classifier_options={"colour": 1})
    with pytest.raises(SettingError, match="the encoder 'onnx' reads image; here one is needed that reads text"):
        make(tmp_path, text_encoder="onnx")


def test_a_network_of_torchvision_brings_its_class_names(tmp_path):
    skip_without("torchvision")
    import torch
    from torchvision.models import squeezenet1_1

    torch.manual_seed(0)
    torch.save(squeezenet1_1().state_dict(), tmp_path / "random.pth")
    encoder = build_encoder(
        "class_names",
        feature="text_from_image",
        network="squeezenet1_1",
        weights=str(tmp_path / "random.pth"),
        text_options={"model": str(save_sentence_model(tmp_path / "sentences"))},
        device="cpu",
    )
    pictures = arrays(encoder, (250, 90, 0), (0, 90, 250))
    names = encoder.names_of(pictures)
    assert all(len(both) == 2 and name in encoder._classifier.class_names for both in names for name in both)
    vectors = encoder.encode(pictures)
    np.testing.assert_allclose(vectors, encoder._text.encode([", ".join(both) for both in names]), atol=2e-6)


@pytest.mark.skipif(not WEIGHTS.is_dir() or not CLOTHES.is_dir(), reason="needs ../shared/data beside the repository")
def test_real_weights_see_clothes_in_pictures_of_clothes():
    pytest.importorskip("onnxruntime")
    encoder = ClassNamesEncoder(
        model=str(WEIGHTS / "mobilenet_v2_imagenet.onnx"),
        labels=str(WEIGHTS / "imagenet_labels.txt"),
        text_encoder="tfidf",
    )
    pictures = [Image.open(path).convert("RGB") for path in sorted(CLOTHES.glob("*.jpg"))]
    names = encoder.names_of([encoder.transform(picture) for picture in pictures])
    worn = {
        "jersey",
        "sweatshirt",
        "jean",
        "trunks",
        "wool",
        "cloak",
        "abaya",
        "overskirt",
        "suit",
        "sunglass",
        "backpack",
    }
    found = [any(word in worn for word in " ".join(both).replace(",", " ").split()) for both in names]
    assert sum(found) > len(found) / 2, names
