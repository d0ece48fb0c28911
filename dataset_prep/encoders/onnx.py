"""Picture networks in ONNX files, run by onnxruntime on the processor: no download, no PyTorch model, any maker."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dataset_prep.encoders.devices import require_finite
from dataset_prep.encoders.model_files import first_line, versions
from dataset_prep.encoders.transforms import IMAGENET_MEAN, IMAGENET_STD, Pixels, normalised
from recbole_mm.data.files import sha256_of
from recbole_mm.errors import SettingError

VALUE_RANGES = {  # mean and standard deviation that are taken out of numbers from 0 to 1
    "signed": ((0.5,) * 3, (0.5,) * 3),  # -1 to 1
    "unit": ((0.0,) * 3, (1.0,) * 3),  # 0 to 1
    "bytes": ((0.0,) * 3, (1 / 255,) * 3),  # 0 to 255
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
}
DEFAULT_SIZE = 224  # of a network that takes any
LOGITS = "logits"


class OnnxModel:
    """A picture network of one input, [n, 3, H, W] or [n, H, W, 3] float.

    Runs on one thread of the processor, so that the same pictures give the same bytes on any number of them. Networks
    whose batch has a fixed size get batches of that size, filled up with the last picture.

    Args:
        path: the ``.onnx`` file; files of weights that it names, beside it, belong to it.
        output: name of the output that holds the features; None takes the first one of two dimensions, [n, F], that is
            not called "logits".
        value_range: what the network takes: "signed" (-1 to 1), "unit" (0 to 1), "bytes" (0 to 255), or "imagenet"
            (mean and deviation of ImageNet).
        size: side of the square input, for a network that takes any (224).
        resize: length that a picture's shorter side gets before the centre is cut out; None squashes the whole picture.
        batch_size: pictures per run.

    Raises:
        SettingError: onnxruntime is not installed, no such file, no picture network, or an argument that does not fit.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        output: str | None = None,
        value_range: str = "signed",
        size: int | None = None,
        resize: int | None = None,
        batch_size: int = 4,
    ) -> None:
        if value_range not in VALUE_RANGES:
            raise SettingError(f"value_range is {value_range!r}, expected one of {sorted(VALUE_RANGES)}")
        if batch_size < 1:
            raise SettingError(f"batch_size is {batch_size}, expected at least 1")
        self._path = Path(path)
        self._session = _session(self._path)
        self._input, self._channels_first, fixed_batch, own_size = self._look_at_input()
        if size is not None and own_size not in (None, (size, size)):
            raise SettingError(f"size is {size}, but {self._path.name} takes pictures of {own_size}; leave it out")
        self._batch_size, self._fixed = fixed_batch or batch_size, fixed_batch is not None
        self._mean, self._std = VALUE_RANGES[value_range]
        side = size or DEFAULT_SIZE
        size_of_input = own_size or (side, side)
        self.image_transform = Pixels(size_of_input, resize=resize, mode="squash" if resize is None else "shortest")
        self._outputs = [out.name for out in self._session.get_outputs()]
        self._output = output or self._choose_output()
        self._require(self._output, "choose one of them with --output")
        self.settings: dict[str, Any] = {
            "model": self._path.name,
            "weights_sha256": {file.name: sha256_of(file) for file in _files(self._path)},
            "output": self._output,
            "value_range": value_range,
            "pixels": self.image_transform.settings,
            "versions": versions(("onnxruntime", "pillow")),
        }

    def _look_at_input(self) -> tuple[str, bool, int | None, tuple[int, int] | None]:
        """Its name, whether colours come before places, and batch size and size of pictures where they are fixed."""
        inputs = self._session.get_inputs()
        shape = inputs[0].shape if len(inputs) == 1 else []
        if len(shape) != 4 or 3 not in (shape[1], shape[3]) or inputs[0].type != "tensor(float)":
            found = ", ".join(f"{one.name} {one.type} {one.shape}" for one in inputs)
            raise SettingError(
                f"{self._path.name} is no network of pictures: it takes {found}, expected one tensor(float) of"
                " [n, 3, height, width] or [n, height, width, 3]"
            )
        batch, channels_first = shape[0], shape[1] == 3
        sides = tuple(shape[2:] if channels_first else shape[1:3])
        fixed = all(isinstance(side, int) and side > 0 for side in sides)
        return (
            inputs[0].name,
            channels_first,
            batch if isinstance(batch, int) and batch > 0 else None,
            (sides if fixed else None),
        )

    def _choose_output(self) -> str:
        two = [out.name for out in self._session.get_outputs() if len(out.shape) == 2]
        features = [name for name in two if name != LOGITS] or two
        return features[0] if features else self._outputs[0]

    def _require(self, output: str, remedy: str) -> None:
        if output not in self._outputs:
            raise SettingError(f"{self._path.name} has no output {output!r}, only {self._outputs}; {remedy}")

    def features(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """[n, F] float32 of what ``image_transform`` made; an output with places [n, F, h, w] is averaged over them."""
        rows = self._run(self._output, arrays)
        if rows.ndim == 4:
            rows = rows.mean(axis=(2, 3))
        if rows.ndim != 2:
            raise SettingError(
                f"the output {self._output!r} of {self._path.name} has shape {rows.shape}, expected [n, width]"
                f"; choose another with --output, of {self._outputs}"
            )
        return rows

    def logits(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """[n, classes] float32: the output "logits".

        Raises:
            SettingError: there is none.
        """
        self._require(LOGITS, "class names need a network with an output of that name")
        return self._run(LOGITS, arrays)

    def _run(self, output: str, arrays: Sequence[np.ndarray]) -> np.ndarray:
        parts = []
        for start in range(0, len(arrays), self._batch_size):
            batch = list(arrays[start : start + self._batch_size])
            n_missing = (self._batch_size - len(batch)) if self._fixed else 0
            pixels = normalised(batch + batch[-1:] * n_missing, mean=self._mean, std=self._std)  # [n, 3, H, W]
            if not self._channels_first:
                pixels = pixels.permute(0, 2, 3, 1).contiguous()  # [n, H, W, 3]
            parts.append(self._session.run([output], {self._input: pixels.numpy()})[0][: len(batch)])
        rows = np.concatenate(parts).astype(np.float32, copy=False)
        require_finite(rows, model=self._path.name, precision="float32")
        return rows


class OnnxEncoder:
    """Features of pictures by a local ONNX file.

    Args:
        model: the file; see ``OnnxModel`` for it and the others.
    """

    name, source = "onnx", "image"

    def __init__(
        self,
        *,
        model: str | None = None,
        output: str | None = None,
        value_range: str = "signed",
        size: int | None = None,
        resize: int | None = None,
        batch_size: int = 4,
    ) -> None:
        if model is None:
            raise SettingError("the encoder 'onnx' needs a network; give it with --model FILE.onnx")
        self._model = OnnxModel(
            model, output=output, value_range=value_range, size=size, resize=resize, batch_size=batch_size
        )
        self.transform = self._model.image_transform
        blank = np.zeros((*self.transform.size, 3), dtype=np.uint8)
        self.settings: dict[str, Any] = {**self._model.settings, "width": self._model.features([blank]).shape[1]}

    def fit(self, everything: Sequence[Any]) -> None:
        """Nothing to learn."""

    def encode(self, batch: Sequence[np.ndarray]) -> list[np.ndarray]:
        return list(self._model.features(batch)) if len(batch) else []


def _session(path: Path) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise SettingError(
            f"the encoder 'onnx' needs the package onnxruntime ({error})\n"
            '  install it with: pip install "recbole_mm[onnx]"'
        ) from error
    if not path.is_file():
        raise SettingError(f"no file {path}; the encoder 'onnx' takes a local .onnx file, not a name on a hub")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has many classes of its own, none of them public
        raise SettingError(f"onnxruntime cannot load {path} ({first_line(error)}); is it an ONNX file?") from error


def _files(path: Path) -> list[Path]:
    """The file, and those beside it that it names as places of its weights."""
    beside = (file for file in sorted(path.parent.iterdir()) if file != path and file.is_file())
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return [path, *(other for other in beside if content.find(_location(other.name)) >= 0)]


def _location(name: str) -> bytes:
    """How an ONNX file, which is a protocol buffer, says that weights lie in the file ``name``."""
    value, length = name.encode(), b""
    n = len(value)
    while n >= 128:
        length, n = length + bytes([n % 128 + 128]), n // 128
    return b"location\x12" + length + bytes([n]) + value
