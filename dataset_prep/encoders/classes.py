"""Pictures as class names: a classifier names what it sees, a text encoder encodes the names.

Source: MMSBR, text generated from a picture: the two best classes of ImageNet stand for the picture.
Differences from the released code: the names go to the text encoder as one text; the release runs over its letters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from dataset_prep.encoders.inner import build_text_encoder, with_defaults
from dataset_prep.encoders.onnx import OnnxModel
from dataset_prep.encoders.torchvision_networks import TorchvisionNetwork
from recbole_mm.errors import DatasetError, SettingError

if TYPE_CHECKING:
    from PIL.Image import Image

SEPARATOR = ", "


class Classifier(Protocol):
    """Scores the classes of pictures.

    Attributes:
        image_transform: makes of a picture the array that ``logits`` takes.
        settings: enough to make the same scores again.
    """

    image_transform: Callable[[Image], np.ndarray]
    settings: dict[str, Any]

    def logits(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """[n, classes]."""


class ClassNamesEncoder:
    """Picture -> names of the best classes -> text encoder.

    Args:
        model: an ``.onnx`` file with an output "logits"; None takes a network of torchvision.
        network: name of a classifier of torchvision (googlenet, as in the paper).
        weights: of the network, see ``TorchvisionNetwork``.
        labels: file of class names, a name a line, in the order of the classes; None takes those that come with
            torchvision's weights.
        n_classes: names per picture.
        skip: names that never count, such as the class of everything else.
        classifier_options: further arguments of the classifier.
        text_encoder: name of the encoder of the names.
        text_options: its arguments.
        batch_size, precision, device: of classifier and text encoder, where these options do not name their own.

    Raises:
        SettingError: no classifier or no labels, labels of another number, or an argument that does not fit.
        DatasetError: the file of labels cannot be read.
    """

    name, source = "class_names", "image"

    def __init__(
        self,
        *,
        model: str | None = None,
        network: str | None = None,
        weights: str | None = None,
        labels: str | None = None,
        n_classes: int = 2,
        skip: Sequence[str] = ("background",),
        classifier_options: dict[str, Any] | None = None,
        text_encoder: str = "sentence",
        text_options: dict[str, Any] | None = None,
        batch_size: int | None = None,
        precision: str | None = None,
        device: str | None = None,
    ) -> None:
        shared = {"batch_size": batch_size, "precision": precision, "device": device}
        given = {"network": network, "weights": weights, **(classifier_options or {})}
        self._classifier, own_labels = _classifier(model, given, shared)
        if labels is None and own_labels is None:
            raise SettingError(f"{model or weights} comes without class names; give labels, a file with a name a line")
        self._labels = read_labels(Path(labels)) if labels is not None else list(own_labels)
        self._check_number()
        self._skipped = np.isin(self._labels, list(skip))  # [classes]
        largest = int((~self._skipped).sum())
        if not 1 <= n_classes <= largest:
            raise SettingError(f"n_classes is {n_classes}, expected 1 to {largest}, the classes that may be named")
        self._n_classes = n_classes
        self._text = build_text_encoder(text_encoder, text_options, shared, texts=self._labels)
        self.transform: Callable[[Image], np.ndarray] = self._classifier.image_transform
        self.counts: Mapping[str, int] = getattr(self._text, "counts", {})
        self.settings: dict[str, Any] = {
            "classifier": self._classifier.settings,
            "labels_sha256": hashlib.sha256("\n".join(self._labels).encode()).hexdigest(),
            "n_labels": len(self._labels),
            "n_classes": n_classes,
            "skip": list(skip),
            "text_encoder": self._text.name,
            "text": self._text.settings,
            "width": self._text.settings["width"],
        }

    def _check_number(self) -> None:
        from PIL import Image

        blank = self._classifier.image_transform(Image.new("RGB", (64, 64)))
        n_classes = self._classifier.logits([blank]).shape[1]
        if n_classes != len(self._labels):
            raise SettingError(
                f"there are {len(self._labels)} class names, and the classifier has {n_classes} classes"
                "; the file of labels needs a line per class, in the classifier's order"
            )

    def fit(self, everything: Sequence[Any]) -> None:
        """Nothing to learn: a text encoder that learns was shown all class names."""

    def encode(self, batch: Sequence[np.ndarray]) -> list[np.ndarray]:
        if not len(batch):
            return []
        return self._text.encode([SEPARATOR.join(names) for names in self.names_of(batch)])

    def names_of(self, batch: Sequence[np.ndarray]) -> list[list[str]]:
        """The best classes of each picture, the best first; equally good ones in the order of the labels.

        Args:
            batch: what ``transform`` made of pictures.
        """
        scores = np.asarray(self._classifier.logits(batch), dtype=np.float64)  # [n, classes]
        scores[:, self._skipped] = -np.inf
        best = np.argsort(-scores, axis=1, kind="stable")[:, : self._n_classes]
        return [[self._labels[number] for number in row] for row in best]


def _classifier(
    model: str | None, options: dict[str, Any], shared: dict[str, Any]
) -> tuple[Classifier, list[str] | None]:
    """A classifier and the class names that come with it."""
    options = {name: value for name, value in options.items() if value is not None}
    if model is None:
        network = TorchvisionNetwork(**with_defaults(options, shared, TorchvisionNetwork))
        return network, network.class_names
    if foreign := [name for name in ("network", "weights") if name in options]:
        raise SettingError(f"{foreign[0]} belongs to torchvision, and model {model} to ONNX; give one of them")
    return OnnxModel(model, **with_defaults(options, shared, OnnxModel)), None


def read_labels(path: Path) -> list[str]:
    """Class names of a file, a name a line; numbers before a name ("7: cock", "7 cock") do not belong to it.

    Raises:
        DatasetError: no such file, not UTF-8, or a line without name.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip("\n").split("\n")
    except OSError as error:
        raise DatasetError(f"cannot read the class names {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DatasetError(f"the class names {path} are no text file in UTF-8 with a name a line") from error
    names = [" ".join(line.split()) for line in lines]
    if "" in names:
        raise DatasetError(f"{path}, line {names.index('') + 1}: no class name; every class needs one")
    if all(name.partition(" ")[0].rstrip(":") == str(number) for number, name in enumerate(names)):
        names = [name.partition(" ")[2] for name in names]
    return names
