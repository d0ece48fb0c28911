"""Picture classifiers of torchvision, GoogLeNet among them: their last features before the classes, or any layer.

picture ──> Pixels ──> network ──────> last linear layer ──> logits, one per class name
                                 └───> features [n, F], 1024 of GoogLeNet
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dataset_prep.encoders.checkpoints import cannot_load, read_state
from dataset_prep.encoders.devices import choose_device, choose_precision, inference, require_finite
from dataset_prep.encoders.model_files import versions
from dataset_prep.encoders.torchvision_ops import mend_torchvision
from dataset_prep.encoders.transforms import Pixels, normalised
from recbole_mm.data.files import sha256_of
from recbole_mm.errors import SettingError, nearest

INCEPTIONS = ("googlenet", "inception_v3")  # their published weights expect numbers from -1 to 1
CHANNELS_LAST = "swin"  # networks whose inner layers give [n, h, w, F]


class TorchvisionNetwork:
    """A classifier of torchvision, in evaluation mode.

    Args:
        network: its name in torchvision.models.
        weights: "DEFAULT", the name of one of the network's published weights such as "IMAGENET1K_V1" (downloaded
            once), or a local file with a state_dict. A file is taken to want the pictures that "DEFAULT" wants.
        layer: the module whose output is taken, such as "inception4a"; places and tokens are averaged. None takes what
            the last linear layer is given (of a network that ends in a convolution: that, averaged over places).
        batch_size: pictures per forward pass.
        precision: "auto", "float32", "float16" or "bfloat16", see ``choose_precision``.
        device: such as "cpu" or "cuda:0"; None takes a GPU if there is one.

    Attributes:
        image_transform: makes of a picture what ``features`` and ``logits`` take; can be pickled.
        class_names: of the logits; None if the weights come from a file with another number of classes.
        settings: what identifies network, weights and preprocessing.

    Raises:
        SettingError: torchvision is not installed, an argument does not fit, or the weights cannot be had.
        UnsafeFileError: a file of weights that could run code.
    """

    def __init__(
        self,
        *,
        network: str = "googlenet",
        weights: str = "DEFAULT",
        layer: str | None = None,
        batch_size: int = 32,
        precision: str = "auto",
        device: str | None = None,
    ) -> None:
        if batch_size < 1:
            raise SettingError(f"batch_size is {batch_size}, expected at least 1")
        self._device = choose_device(device)
        self._precision = choose_precision(precision, self._device)
        self._name, self._batch_size = network, batch_size
        published, file, state = _weights(network, weights)
        preset = published.transforms()
        self.image_transform = Pixels(
            (preset.crop_size[0],) * 2, resize=preset.resize_size[0], interpolation=preset.interpolation.value
        )
        self._mean, self._std = preset.mean, preset.std
        self._network, n_classes = _build(network, published, state, file)
        self._network.eval().to(self._device)
        names = published.meta.get("categories")
        self.class_names = list(names) if names and len(names) == n_classes else None
        self._layer = layer or _last_layer(self._network)
        self._before = layer is None
        self._check_layer()
        self.settings: dict[str, Any] = {
            "network": network,
            "weights": published.name if str(weights) != str(file) else file.name,
            "weights_sha256": {file.name: sha256_of(file)},
            "layer": f"input of {self._layer}" if self._before else self._layer,
            "pixels": self.image_transform.settings,
            "mean": list(self._mean),
            "std": list(self._std),
            "transform_input": network in INCEPTIONS,
            "precision": self._precision,
            "versions": versions(("torchvision", "torch", "pillow")),
        }

    def features(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """[n, F] float32 of what ``image_transform`` made."""
        return np.concatenate([self._features(batch) for batch in self._batches(arrays)])

    def logits(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """[n, classes] float32, in the order of ``class_names``."""
        rows = []
        for batch in self._batches(arrays):
            with inference(self._device, self._precision):
                rows.append(self._network(self._pixels(batch)).float().cpu().numpy())
        scores = np.concatenate(rows)
        require_finite(scores, model=self._name, precision=self._precision)
        return scores

    def _batches(self, arrays: Sequence[np.ndarray]) -> list[Sequence[np.ndarray]]:
        return [arrays[start : start + self._batch_size] for start in range(0, len(arrays), self._batch_size)]

    def _pixels(self, batch: Sequence[np.ndarray]) -> Any:
        return normalised(batch, mean=self._mean, std=self._std, device=self._device)

    def _features(self, batch: Sequence[np.ndarray]) -> np.ndarray:
        seen: list[Any] = []
        module = self._network.get_submodule(self._layer)
        hook = (
            module.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
            if self._before
            else module.register_forward_hook(lambda _, given, made: seen.append(made))
        )
        try:
            with inference(self._device, self._precision):
                self._network(self._pixels(batch))
                rows = self._averaged(seen[-1].float()).cpu().numpy()
        finally:
            hook.remove()
        require_finite(rows, model=self._name, precision=self._precision)
        return rows

    def _averaged(self, output: Any) -> Any:
        """[n, F] of [n, F], [n, F, h, w] or [n, tokens, F]."""
        if output.ndim == 4:
            return output.mean(dim=(1, 2) if self._name.startswith(CHANNELS_LAST) else (2, 3))
        return output.mean(dim=1) if output.ndim == 3 else output.flatten(1)

    def _check_layer(self) -> None:
        layers = [name for name, _ in self._network.named_modules() if name]
        if self._layer not in layers:
            top = [name for name in layers if "." not in name]
            raise SettingError(
                f"{self._name} has no layer {self._layer!r}{nearest(self._layer, layers)}; its parts are {top}"
            )


class TorchvisionEncoder:
    """Features of pictures by a classifier of torchvision; its arguments are those of ``TorchvisionNetwork``."""

    name, source = "torchvision", "image"

    def __init__(
        self,
        *,
        network: str | None = None,
        weights: str | None = None,
        layer: str | None = None,
        batch_size: int = 32,
        precision: str = "auto",
        device: str | None = None,
    ) -> None:
        if weights not in (None, "DEFAULT") and network is None:
            raise SettingError(
                f"weights {weights!r} are given without the network they belong to; "
                "name it with --network, such as googlenet or resnet50"
            )
        self._network = TorchvisionNetwork(
            network=network or "googlenet", weights=weights or "DEFAULT", layer=layer, batch_size=batch_size,
            precision=precision, device=device,
        )  # fmt: skip
        self.transform = self._network.image_transform
        blank = np.zeros((*self.transform.size, 3), dtype=np.uint8)
        self.settings = {**self._network.settings, "width": self._network.features([blank]).shape[1]}

    def fit(self, everything: Sequence[Any]) -> None:
        """Nothing to learn."""

    def encode(self, batch: Sequence[np.ndarray]) -> list[np.ndarray]:
        return list(self._network.features(batch)) if len(batch) else []


def _weights(network: str, weights: str) -> tuple[Any, Path, dict[str, Any]]:
    """Published weights that tell preprocessing and classes, the file that is used, and its tensors."""
    mend_torchvision()
    try:
        from torchvision import models
    except ImportError as error:
        raise SettingError(
            f"the encoder 'torchvision' needs the package torchvision ({error})\n"
            '  install it with: pip install "recbole_mm[encoders]"'
        ) from error
    known = models.list_models(module=models)
    if network not in known:
        raise SettingError(f"torchvision has no classifier {network!r}{nearest(network, known)}; it has {known}")
    published = models.get_model_weights(network)
    names = list(published.__members__)
    if weights in names:
        return published[weights], *_downloaded(published[weights])
    file = Path(weights)
    if not file.is_file():
        raise SettingError(
            f"no weights {weights!r} of {network}: neither a file nor one of {names}{nearest(str(weights), names)}"
        )
    return published.DEFAULT, file, read_state(file)


def _downloaded(weights: Any) -> tuple[Path, dict[str, Any]]:
    """File and tensors of published weights, out of PyTorch's cache or from their address.

    The name of the file holds the beginning of its sha256, which is compared.
    """
    import torch

    file = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rpartition("/")[2]
    expected = file.stem.rpartition("-")[2]
    if file.is_file() and not (found := sha256_of(file)).startswith(expected):
        raise SettingError(
            f"{file} has sha256 {found[:12]}…, its name says {expected}…: it was changed or cut short; delete it"
        )
    try:
        return file, weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except Exception as error:  # of the network, of the file system, or of pickle
        remedy = (
            f"download {weights.url} where there is a network, and give --weights the file, or put it there: {file}"
        )
        raise cannot_load(f"the weights {weights}", error, remedy) from error


def _build(network: str, published: Any, state: dict[str, Any], file: Path) -> tuple[Any, int]:
    """The network with its weights, and its number of classes."""
    from torchvision import models

    given: dict[str, Any] = {}
    if network in INCEPTIONS:  # the auxiliary classifiers are for training
        given = {"aux_logits": False, "transform_input": True, "init_weights": False}
        state = {name: value for name, value in state.items() if not name.lower().startswith("aux")}
    if network.startswith("vit"):  # has a vector for each place
        given = {"image_size": published.meta["min_size"][0]}
    model = models.get_model(network, weights=None, **given)
    last = f"{_last_layer(model)}.weight"
    n_classes = len(state[last]) if last in state else len(model.state_dict()[last])
    if n_classes != len(model.state_dict()[last]):
        model = models.get_model(network, weights=None, num_classes=n_classes, **given)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        listed = " ".join(str(error).split())
        raise SettingError(
            f"{file} holds no weights of {network} ({listed[:300]}…)\n  give the network they belong to with --network"
        ) from error
    return model, n_classes


def _last_layer(model: Any) -> str:
    """Name of the layer that makes the classes: the last linear one, or the last convolution if there is no linear."""
    import torch

    for kind in (torch.nn.Linear, torch.nn.Conv2d):
        if found := [name for name, module in model.named_modules() if isinstance(module, kind)]:
            return found[-1]
    raise SettingError("the network has neither a linear layer nor a convolution; name a layer with --layer")
