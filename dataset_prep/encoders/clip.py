"""CLIP: pictures and texts as vectors of one space, in which a picture lies near the texts that describe it.

Two families of files can be read:

- open_clip: the name of one of its models with its weights ("ViT-B-32" with "openai", or with a checkpoint file), or a
  folder with ``open_clip_config.json`` and a checkpoint;
- transformers: a folder as ``save_pretrained`` writes it, with the tokenizer; torchvision is not needed.

Names on the Hugging Face hub ("openai/clip-vit-base-patch32", "hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K") are such
folders, downloaded once.

CLIP's pair for a model with pseudo-modalities, such as MMSBR, needs no generator: the vector of an item's text stands
for the picture that the text describes, and the reverse. Made with the same ``model``, one vector per item:

    feature           encoder
    image             clip
    image_from_text   clip_text     (--rows item)
    text              clip_text     (--rows item)
    text_from_image   clip
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dataset_prep.encoders.checkpoints import cannot_load
from dataset_prep.encoders.counts import Counts
from dataset_prep.encoders.devices import choose_device, choose_precision, inference, require_finite
from dataset_prep.encoders.model_files import first_line, model_settings, quiet_loading, versions
from dataset_prep.encoders.tokens import batches_by_length, count_truncated, token_counts
from dataset_prep.encoders.torchvision_ops import mend_torchvision
from dataset_prep.encoders.transforms import Pixels, normalised
from recbole_mm.data.files import sha256_of
from recbole_mm.errors import SettingError, nearest

DEFAULT_MODEL, DEFAULT_PRETRAINED = "ViT-B-32", "openai"
HUB, FOLDER = "hf-hub:", "local-dir:"
OPEN_CLIP_CONFIG, TRANSFORMERS_CONFIG = "open_clip_config.json", "config.json"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PACKAGES = ("open_clip_torch", "transformers", "tokenizers", "torch", "pillow")
INSTALL = 'install it with: pip install "recbole_mm[encoders]"'
REMEDY = (
    "give --model a folder with open_clip_config.json or a transformers CLIP, or a name on the hub while online;"
    " --pretrained takes a local checkpoint"
)


class ClipModel:
    """Both halves of a CLIP model.

    Args:
        model: name of an open_clip model, folder, or name on the hub; see above.
        pretrained: weights of an open_clip model: one of its tags, or a local checkpoint; None takes "openai". Folders
            bring their own.
        revision: branch, tag or commit of a name on the hub.
        batch_size: pictures or texts per forward pass.
        precision: "auto", "float32", "float16" or "bfloat16", see ``choose_precision``.
        device: such as "cpu" or "cuda:0"; None takes a GPU if there is one.

    Attributes:
        image_transform: makes of a picture what ``encode_images`` takes; can be pickled.
        counts: "truncated": texts that lost tokens to the model's limit.
        settings: what identifies model, weights and preprocessing.

    Raises:
        SettingError: a package is not installed, the model cannot be loaded, or an argument does not fit.
        UnsafeFileError: a checkpoint that could run code.
    """

    def __init__(
        self,
        *,
        model: str = DEFAULT_MODEL,
        pretrained: str | None = None,
        revision: str | None = None,
        batch_size: int = 32,
        precision: str = "auto",
        device: str | None = None,
    ) -> None:
        if batch_size < 1:
            raise SettingError(f"batch_size is {batch_size}, expected at least 1")
        self._device = choose_device(device)
        self._precision = choose_precision(precision, self._device)
        self._batch_size = batch_size
        folder, settings = _find(str(model), pretrained=pretrained, revision=revision)
        if folder is not None and not (folder / OPEN_CLIP_CONFIG).is_file():
            self._halves: Any = _TransformersClip(folder, str(model))
        elif folder is not None:
            self._halves = _OpenClip(f"{FOLDER}{folder}", None, str(model))
        else:
            self._halves = _OpenClip(str(model).replace("/", "-"), pretrained or DEFAULT_PRETRAINED, str(model))
        self._halves.network.eval().to(self._device)
        self.image_transform: Pixels = self._halves.pixels
        self.counts = self._halves.counts
        self.settings: dict[str, Any] = {
            **settings,
            **self._halves.settings,
            "pixels": self.image_transform.settings,
            "mean": list(self._halves.mean),
            "std": list(self._halves.std),
            "precision": self._precision,
            "unit_length": True,
        }

    def encode_images(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """[n, F] float32, each row of length 1.

        Args:
            arrays: what ``image_transform`` made.
        """
        parts = []
        for start in range(0, len(arrays), self._batch_size):
            batch = arrays[start : start + self._batch_size]
            with inference(self._device, self._precision):
                pixels = normalised(batch, mean=self._halves.mean, std=self._halves.std, device=self._device)
                parts.append(self._halves.images(pixels).float().cpu().numpy())
        return self._unit_rows(np.concatenate(parts))

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """[n, F] float32, each row of length 1; a text beyond the model's limit is cut there and counted."""
        features = self._halves.tokenize(list(texts))
        rows: np.ndarray | None = None
        for numbers, part in batches_by_length(features, self._batch_size):
            part = {name: value.to(self._device) for name, value in part.items()}
            with inference(self._device, self._precision):
                vectors = self._halves.texts(part).float().cpu().numpy()  # [b, F]
            rows = np.empty((len(texts), vectors.shape[1]), dtype=np.float32) if rows is None else rows
            rows[numbers] = vectors
        return self._unit_rows(rows)

    def _unit_rows(self, rows: np.ndarray) -> np.ndarray:
        require_finite(rows, model=self.settings["model"], precision=self._precision)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-12)


class _ClipEncoder:
    """One half of a CLIP model, which writes ``encode`` and ``_width``; the arguments are those of ``ClipModel``."""

    def __init__(
        self,
        *,
        model: str = DEFAULT_MODEL,
        pretrained: str | None = None,
        revision: str | None = None,
        batch_size: int = 32,
        precision: str = "auto",
        device: str | None = None,
    ) -> None:
        self._clip = ClipModel(
            model=model, pretrained=pretrained, revision=revision, batch_size=batch_size, precision=precision,
            device=device,
        )  # fmt: skip
        self.settings = {**self._clip.settings, "width": self._width()}

    def fit(self, everything: Sequence[Any]) -> None:
        """Nothing to learn."""


class ClipEncoder(_ClipEncoder):
    """Pictures by the one half of a CLIP model; its arguments are those of ``ClipModel``."""

    name, source = "clip", "image"

    @property
    def transform(self) -> Pixels:
        return self._clip.image_transform

    def _width(self) -> int:
        return self._clip.encode_images([np.zeros((*self.transform.size, 3), dtype=np.uint8)]).shape[1]

    def encode(self, batch: Sequence[np.ndarray]) -> list[np.ndarray]:
        return list(self._clip.encode_images(batch)) if len(batch) else []


class ClipTextEncoder(_ClipEncoder):
    """Texts by the other half of a CLIP model; its arguments are those of ``ClipModel``."""

    name, source = "clip_text", "text"

    @property
    def counts(self) -> Counts:
        return self._clip.counts

    def _width(self) -> int:
        return self._clip.encode_texts(["width"]).shape[1]

    def encode(self, batch: Sequence[str]) -> list[np.ndarray]:
        return list(self._clip.encode_texts(batch)) if len(batch) else []


# ---------------------------------------------------------------- where a model lies


def _find(model: str, *, pretrained: str | None, revision: str | None) -> tuple[Path | None, dict[str, Any]]:
    """The folder of a model, None if open_clip knows it by its name, and settings that say which one it is.

    Raises:
        SettingError: an argument that does not go with this kind of model, or a hub model that is not to be had.
    """
    path = Path(model.removeprefix(FOLDER))
    is_folder, on_hub = model.startswith(FOLDER) or path.is_dir(), model.startswith(HUB)
    if not is_folder and not on_hub and not _is_open_clip_name(model) and model.count("/") == 1:
        on_hub = True
    if revision is not None and not on_hub:
        raise SettingError(f"revision {revision!r} belongs to a name on the hub, and {model} is none; leave it out")
    if not is_folder and not on_hub:
        return None, {}
    if pretrained is not None:
        raise SettingError(
            f"pretrained {pretrained!r} goes with the name of an open_clip model; {model} brings its own weights"
        )
    folder = _hub_folder(model.removeprefix(HUB), revision) if on_hub else path
    if not any((folder / name).is_file() for name in (OPEN_CLIP_CONFIG, TRANSFORMERS_CONFIG)):
        raise SettingError(f"{folder} holds neither {OPEN_CLIP_CONFIG} nor {TRANSFORMERS_CONFIG}\n  {REMEDY}")
    settings = model_settings(str(folder), None, packages=PACKAGES)
    if on_hub:
        settings |= {"model": model.removeprefix(HUB), "revision": folder.name}
    return folder, settings


def _is_open_clip_name(model: str) -> bool:
    mend_torchvision()
    try:
        import open_clip
    except ImportError:
        return "/" not in model
    return model.replace("/", "-") in open_clip.list_models()


def _hub_folder(name: str, revision: str | None) -> Path:
    """The folder of a hub model in the hub's cache; downloads what it lacks, or without a network takes it as it is.

    Of several files with the same weights one is fetched: that of open_clip before that of transformers, and
    safetensors before PyTorch's own.
    """
    from huggingface_hub import list_repo_files, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    weights = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors", "pytorch_model.bin")
    try:
        try:
            there = set(list_repo_files(name, revision=revision))
        except (OSError, HfHubHTTPError, OfflineModeIsEnabled):  # what is in the cache must do
            there = set()
        chosen = next(([file] for file in weights if file in there), list(weights))
        return Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.txt", "*.model", *chosen]))
    except Exception as error:  # of the hub's client, of the network, or of the file system
        at = f" at revision {revision!r}" if revision else ""
        raise SettingError(
            f"cannot get the CLIP model {name!r}{at} from the hub ({type(error).__name__}: {first_line(error)})\n"
            "  download it where there is a network, and give --model its folder"
        ) from error


# ---------------------------------------------------------------- the two families


class _OpenClip:
    """A model of open_clip.

    Args:
        name: of a model of open_clip, or "local-dir:<folder>".
        pretrained: tag or checkpoint; None for a folder.
        called: as the user called it.
    """

    def __init__(self, name: str, pretrained: str | None, called: str) -> None:
        mend_torchvision()
        try:
            import open_clip
        except ImportError as error:
            raise SettingError(
                f"the CLIP model {called!r} needs the package open-clip-torch ({error})\n  {INSTALL}"
            ) from error
        if pretrained is not None and name not in open_clip.list_models():
            known = open_clip.list_models()
            raise SettingError(f"open_clip has no model {called!r}{nearest(name, known)}\n  {REMEDY}")
        tag = open_clip.get_pretrained_cfg(name, pretrained) if pretrained else {}
        self.settings: dict[str, Any] = {"library": "open_clip"}
        if pretrained is not None:
            file = self._checkpoint(open_clip, name, pretrained, tag)
            self.settings |= {
                "model": name,
                "pretrained": pretrained if tag else file.name,
                "weights_sha256": {file.name: sha256_of(file)},
                "versions": versions(PACKAGES),
            }
        quick_gelu = bool(tag.get("quick_gelu"))  # these weights were trained with that approximation
        try:
            self.network = open_clip.create_model(
                name, pretrained, precision="fp32", device="cpu", force_quick_gelu=quick_gelu, require_pretrained=True,
                weights_only=True,
            )  # fmt: skip
            self._tokenizer = open_clip.get_tokenizer(name)
        except Exception as error:  # the library raises whatever it likes
            raise cannot_load(f"the CLIP model {called!r}", error, REMEDY) from error
        own = self.network.visual.preprocess_cfg
        size = own["size"] if isinstance(own["size"], (tuple, list)) else (own["size"], own["size"])
        shortest = own["resize_mode"] == "shortest"
        self.pixels = Pixels(
            size=tuple(size),
            resize=size[0] if shortest and size[0] == size[1] else None,
            mode=own["resize_mode"],
            interpolation="bilinear" if own["interpolation"] == "bilinear" else "bicubic",
            fill=own["fill_color"],
        )
        self.mean, self.std = own["mean"], own["std"]
        self.counts = Counts("truncated")
        self._tokenizing = threading.Lock()  # a tokenizer's limits are its state

    @staticmethod
    def _checkpoint(open_clip: Any, name: str, pretrained: str, tag: dict[str, Any]) -> Path:
        """The file with the weights; downloads it where it is not in the cache."""
        if not tag:
            if not Path(pretrained).is_file():
                tags = open_clip.list_pretrained_tags_by_model(name)
                raise SettingError(
                    f"no weights {pretrained!r} of {name}: neither a file nor one of {tags}{nearest(pretrained, tags)}"
                )
            return Path(pretrained)
        try:
            return Path(open_clip.download_pretrained(tag))
        except Exception as error:  # of the network, of the hub's client, or of the file system
            raise SettingError(
                f"cannot get the weights {pretrained!r} of {name} ({type(error).__name__}: {first_line(error)})\n"
                "  download them where there is a network, and give --pretrained the file"
            ) from error

    def tokenize(self, texts: list[str]) -> dict[str, Any]:
        import torch

        with self._tokenizing:
            tokens = self._tokenizer(texts)  # [n, L], L always the model's own
            full = [texts[number] for number in torch.nonzero(tokens[:, -1]).flatten().tolist()]
            self.counts["truncated"] += self._too_long(full, tokens.shape[1])
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

    def _too_long(self, texts: list[str], limit: int) -> int:
        if hasattr(self._tokenizer, "encode"):  # the beginning and the end are tokens, too
            return sum(len(self._tokenizer.encode(text)) + 2 > limit for text in texts)
        inner = getattr(self._tokenizer, "tokenizer", None)  # of transformers, as SigLIP has it
        return count_truncated(inner, texts, np.full(len(texts), limit), limit) if callable(inner) else 0

    def images(self, pixels: Any) -> Any:
        return self.network.encode_image(pixels)

    def texts(self, features: dict[str, Any]) -> Any:
        return self.network.encode_text(features["input_ids"])


class _TransformersClip:
    """A CLIP of transformers.

    Args:
        folder: as ``save_pretrained`` of model and tokenizer writes it.
        called: as the user called it.
    """

    def __init__(self, folder: Path, called: str) -> None:
        mend_torchvision()
        try:
            from transformers import AutoTokenizer, CLIPModel
        except ImportError as error:
            raise SettingError(
                f"the CLIP model {called!r} needs the package transformers ({error})\n  {INSTALL}"
            ) from error
        try:
            config = json.loads((folder / TRANSFORMERS_CONFIG).read_text(encoding="utf-8"))
        except ValueError as error:
            raise SettingError(f"{folder / TRANSFORMERS_CONFIG} is no JSON ({error})") from error
        if config.get("model_type") != "clip":
            raise SettingError(
                f"{called} is a model of type {config.get('model_type')!r}, expected 'clip'; "
                "others, such as SigLIP, can be read from folders of open_clip"
            )
        try:
            with quiet_loading():
                self._tokenizer = AutoTokenizer.from_pretrained(folder)
                self.network, loading = CLIPModel.from_pretrained(folder, output_loading_info=True)
        except Exception as error:  # the library and its layers below raise whatever they like
            raise cannot_load(f"the CLIP model {called!r}", error, REMEDY) from error
        if missing := sorted(key for key in loading["missing_keys"] if not key.endswith("position_ids")):
            raise SettingError(
                f"the CLIP model {called!r} lacks {len(missing)} weights, such as {missing[0]}, which would be random"
                "; give the folder of a complete model"
            )
        self._limit = self.network.config.text_config.max_position_embeddings
        self.pixels, self.mean, self.std = _preprocessing(folder, self.network.config.vision_config.image_size)
        self.settings: dict[str, Any] = {"library": "transformers"}
        self.counts = Counts("truncated")
        self._tokenizing = threading.Lock()  # a tokenizer's limits are its state

    def tokenize(self, texts: list[str]) -> dict[str, Any]:
        with self._tokenizing:
            features = dict(
                self._tokenizer(
                    texts, padding=True, truncation=True, max_length=self._limit, return_attention_mask=True,
                    return_tensors="pt",
                )
            )  # fmt: skip
            self.counts["truncated"] += count_truncated(self._tokenizer, texts, token_counts(features), self._limit)
        return features

    def images(self, pixels: Any) -> Any:
        return _vectors(self.network.get_image_features(pixel_values=pixels))

    def texts(self, features: dict[str, Any]) -> Any:
        wanted = {name: features[name] for name in ("input_ids", "attention_mask")}
        return _vectors(self.network.get_text_features(**wanted))


def _vectors(output: Any) -> Any:
    """[n, F]; transformers before 5 returned it as such."""
    return getattr(output, "pooler_output", output)


def _preprocessing(folder: Path, own_size: int) -> tuple[Pixels, tuple[float, ...], tuple[float, ...]]:
    """Pixels, mean and standard deviation as a folder of transformers says, else as CLIP was trained."""
    found: dict[str, Any] = {}
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            content = json.loads((folder / name).read_text(encoding="utf-8"))
            found |= content.get("image_processor", content)
    size = found.get("size", own_size)
    crop = found.get("crop_size", own_size)
    crop = (crop["height"], crop["width"]) if isinstance(crop, dict) else (crop, crop)
    interpolation = "bilinear" if found.get("resample") == 2 else "bicubic"
    if isinstance(size, dict) and "height" in size:
        pixels = Pixels((size["height"], size["width"]), mode="squash", interpolation=interpolation)
    else:
        shortest = size["shortest_edge"] if isinstance(size, dict) else size
        pixels = Pixels(crop, resize=shortest, interpolation=interpolation)
    return pixels, tuple(found.get("image_mean", CLIP_MEAN)), tuple(found.get("image_std", CLIP_STD))
