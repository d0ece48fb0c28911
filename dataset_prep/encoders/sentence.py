"""Sentence encoders: any model of sentence-transformers."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dataset_prep.encoders.counts import Counts
from dataset_prep.encoders.devices import choose_device, choose_precision, inference, require_finite
from dataset_prep.encoders.model_files import check_revision, first_line, model_settings, quiet_loading
from dataset_prep.encoders.tokens import batches_by_length, count_truncated, n_positions, token_counts
from dataset_prep.encoders.torchvision_ops import mend_torchvision
from recbole_mm.errors import SettingError

PACKAGES = ("sentence-transformers", "transformers", "tokenizers", "torch")


class SentenceEncoder:
    """A sentence-transformers model, from a local folder or by its name on the hub.

    All texts of a call are tokenized at once and go through the network in batches of about equal length. A text
    beyond the model's maximum is cut there and counted in ``counts["truncated"]``. Several threads may call ``encode``.

    Args:
        model: folder, or name on the hub (downloaded once).
        revision: branch, tag or commit of a model on the hub.
        batch_size: texts per forward pass.
        max_length: tokens of a text that count; None takes the model's own maximum.
        normalize: bring each vector to length 1; many models do so by themselves.
        precision: "auto", "float32", "float16" or "bfloat16", see ``choose_precision``.
        device: such as "cpu" or "cuda:0"; None takes a GPU if there is one.

    Attributes:
        sentence_model: the ``SentenceTransformer``.
        counts: "truncated": texts that lost tokens to the limit.

    Raises:
        SettingError: sentence-transformers is not installed, the model cannot be loaded, or an argument does not fit.
    """

    name, source = "sentence", "text"

    def __init__(
        self,
        *,
        model: str = "sentence-transformers/all-MiniLM-L6-v2",
        revision: str | None = None,
        batch_size: int = 64,
        max_length: int | None = None,
        normalize: bool = False,
        precision: str = "auto",
        device: str | None = None,
    ) -> None:
        mend_torchvision()
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise SettingError(
                f"the encoder 'sentence' needs the package sentence-transformers ({error})\n"
                '  install it with: pip install "recbole_mm[encoders]"'
            ) from error
        if not hasattr(SentenceTransformer, "preprocess"):
            raise SettingError(
                "the encoder 'sentence' needs a newer sentence-transformers\n"
                '  install it with: pip install --upgrade "recbole_mm[encoders]"'
            )
        model = str(model)
        if batch_size < 1:
            raise SettingError(f"batch_size is {batch_size}, expected at least 1")
        check_revision(model, revision)
        self._device = choose_device(device)
        self._precision = choose_precision(precision, self._device)
        try:
            with quiet_loading():
                self.sentence_model = SentenceTransformer(model, revision=revision, device=self._device).eval()
        except Exception as error:  # the library and its three layers below raise whatever they like
            raise SettingError(
                f"cannot load the sentence encoder {model!r} ({type(error).__name__}: {first_line(error)})\n"
                "  give --model a folder with a sentence-transformers model, or a name on the hub while online"
            ) from error
        self._batch_size, self._normalize = batch_size, normalize
        self._prompt = (self.sentence_model.prompts or {}).get(self.sentence_model.default_prompt_name or "") or None
        self._tokenizing = threading.Lock()  # a tokenizer's limits are its state
        if max_length is not None:
            self._limit_length(max_length)
        self.counts = Counts("truncated")
        self.settings: dict[str, Any] = {
            **model_settings(model, revision, packages=PACKAGES),
            "max_length": self.sentence_model.max_seq_length,
            "prompt": self._prompt,
            "normalize": normalize,
            "precision": self._precision,
        }
        self.settings["width"] = len(self.encode(["width"])[0])

    def _limit_length(self, max_length: int) -> None:
        network = getattr(self.sentence_model[0], "auto_model", None)
        largest = (n_positions(network) if network is not None else None) or self.sentence_model.max_seq_length
        fewest = self.sentence_model.tokenizer.num_special_tokens_to_add() + 1
        if max_length < fewest or (largest is not None and max_length > largest):
            raise SettingError(f"max_length is {max_length}, expected {fewest} to {largest}, the model's maximum")
        self.sentence_model.max_seq_length = max_length

    def fit(self, everything: Sequence[str]) -> None:
        """Nothing to learn."""

    def encode(self, batch: Sequence[str]) -> list[np.ndarray]:
        vectors: list[Any] = [None] * len(batch)
        for numbers, features in self._batches(list(batch)):
            features = {k: v.to(self._device) if hasattr(v, "to") else v for k, v in features.items()}
            with inference(self._device, self._precision):
                rows = self.sentence_model(features)["sentence_embedding"].float()  # [b, F]
                rows = rows[:, : self.sentence_model.truncate_dim]
                if self._normalize:
                    rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
                rows = rows.cpu().numpy()
            require_finite(rows, model=self.settings["model"], precision=self._precision)
            for number, row in zip(numbers, rows, strict=True):
                vectors[number] = row
        return vectors

    def _batches(self, texts: list[str]) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
        if not texts:
            return
        features = self._tokenize(texts)
        if getattr(features.get("attention_mask"), "shape", None) == getattr(features.get("input_ids"), "shape", 0):
            yield from batches_by_length(features, self._batch_size)
            return
        for start in range(0, len(texts), self._batch_size):  # a model without padded tokens, such as averaged words
            some = texts[start : start + self._batch_size]
            yield np.arange(start, start + len(some)), self._tokenize(some)

    def _tokenize(self, texts: list[str]) -> dict[str, Any]:
        with self._tokenizing:
            features = dict(self.sentence_model.preprocess(texts, prompt=self._prompt))
            limit, mask = self.sentence_model.max_seq_length, features.get("attention_mask")
            if limit and getattr(mask, "ndim", 0) == 2 and len(mask) == len(texts):
                prompted = [(self._prompt or "") + text for text in texts]
                counts = token_counts(features)
                self.counts["truncated"] += count_truncated(self.sentence_model.tokenizer, prompted, counts, limit)
        return features
