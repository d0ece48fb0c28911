"""Plain transformers encoders such as BERT, whose token vectors are pooled here."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dataset_prep.encoders.counts import Counts
from dataset_prep.encoders.devices import choose_device, choose_precision, inference, require_finite
from dataset_prep.encoders.model_files import check_revision, first_line, model_settings, quiet_loading
from dataset_prep.encoders.tokens import batches_by_length, count_truncated, n_positions, token_counts
from dataset_prep.encoders.torchvision_ops import mend_torchvision
from recbole_mm.errors import SettingError, nearest

if TYPE_CHECKING:
    from torch import Tensor

POOLINGS = ("pooler", "cls", "mean")
PACKAGES = ("transformers", "tokenizers", "torch")
MAX_LENGTH = 512  # of a model that names no maximum


class BertEncoder:
    """A transformers encoder, from a local folder or by its name on the hub.

    Padding is masked, so that a vector does not depend on its batch mates. A text beyond ``max_length`` is cut there
    and counted in ``counts["truncated"]``. Several threads may call ``encode``.

    Args:
        model: folder, or name on the hub (downloaded once).
        revision: branch, tag or commit of a model on the hub.
        pooling: "pooler" (the first token through the model's own last layer, as MMSBR has it), "cls" (the first
            token), or "mean" (of all tokens).
        max_length: tokens of a text that count, [CLS] and [SEP] among them; None takes the model's maximum.
        batch_size: texts per forward pass.
        precision: "auto", "float32", "float16" or "bfloat16", see ``choose_precision``.
        device: such as "cpu" or "cuda:0"; None takes a GPU if there is one.

    Raises:
        SettingError: transformers is not installed, the model cannot be loaded or lacks weights, or an argument does
            not fit.
    """

    name, source = "bert", "text"

    def __init__(
        self,
        *,
        model: str = "bert-base-uncased",
        revision: str | None = None,
        pooling: str = "pooler",
        max_length: int | None = None,
        batch_size: int = 64,
        precision: str = "auto",
        device: str | None = None,
    ) -> None:
        model = str(model)
        if pooling not in POOLINGS:
            raise SettingError(
                f"pooling is {pooling!r}, expected one of {list(POOLINGS)}{nearest(str(pooling), POOLINGS)}"
            )
        if batch_size < 1:
            raise SettingError(f"batch_size is {batch_size}, expected at least 1")
        check_revision(model, revision)
        self._device = choose_device(device)
        self._precision = choose_precision(precision, self._device)
        self._tokenizer, self._model = _load(model, revision, pooling=pooling)
        self._model = self._model.eval().to(self._device)
        self._max_length = self._choose_max_length(max_length)
        self._pooling, self._batch_size = pooling, batch_size
        self._tokenizing = threading.Lock()  # a tokenizer's limits are its state
        self.counts = Counts("truncated")
        self.settings: dict[str, Any] = {
            **model_settings(model, revision, packages=PACKAGES),
            "pooling": pooling,
            "max_length": self._max_length,
            "precision": self._precision,
        }
        self.settings["width"] = len(self.encode(["width"])[0])

    def _choose_max_length(self, max_length: int | None) -> int:
        limits = (self._tokenizer.model_max_length, n_positions(self._model))
        largest = min((limit for limit in limits if limit and 0 < limit < 1_000_000), default=None)
        if max_length is None:
            return largest or MAX_LENGTH
        fewest = self._tokenizer.num_special_tokens_to_add() + 1
        if max_length < fewest or (largest is not None and max_length > largest):
            raise SettingError(
                f"max_length is {max_length}, expected {fewest} to {largest or 'any number'} for this model"
            )
        return max_length

    def fit(self, everything: Sequence[str]) -> None:
        """Nothing to learn."""

    def encode(self, batch: Sequence[str]) -> list[np.ndarray]:
        vectors: list[Any] = [None] * len(batch)
        if not batch:
            return vectors
        for numbers, features in batches_by_length(self._tokenize(list(batch)), self._batch_size):
            features = {name: value.to(self._device) for name, value in features.items()}
            with inference(self._device, self._precision):
                rows = self._pool(self._model(**features), features["attention_mask"])  # [b, F]
                rows = rows.float().cpu().numpy()
            require_finite(rows, model=self.settings["model"], precision=self._precision)
            for number, row in zip(numbers, rows, strict=True):
                vectors[number] = row
        return vectors

    def _tokenize(self, texts: list[str]) -> dict[str, Tensor]:
        with self._tokenizing:
            features = dict(
                self._tokenizer(
                    texts, padding=True, truncation=True, max_length=self._max_length,
                    return_attention_mask=True, return_tensors="pt",
                )
            )  # fmt: skip
            self.counts["truncated"] += count_truncated(
                self._tokenizer, texts, token_counts(features), self._max_length
            )
        return features

    def _pool(self, output: Any, mask: Tensor) -> Tensor:
        """One vector per text, [b, F], of the vectors of its tokens."""
        import torch

        if self._pooling == "pooler":
            return output.pooler_output
        tokens = output.last_hidden_state.float()  # [b, L, F]
        if self._pooling == "cls":
            first = mask.argmax(dim=1)  # 0, unless padding is left
            return tokens[torch.arange(len(tokens), device=tokens.device), first]
        weights = mask.unsqueeze(-1).float()  # [b, L, 1]
        return (tokens * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def _load(model: str, revision: str | None, *, pooling: str) -> tuple[Any, Any]:
    """Tokenizer and network.

    Raises:
        SettingError: not installed, not loadable, or weights are missing that the pooling needs.
    """
    mend_torchvision()
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise SettingError(
            f"the encoder 'bert' needs the package transformers ({error})\n"
            '  install it with: pip install "recbole_mm[encoders]"'
        ) from error
    try:
        with quiet_loading():
            tokenizer = AutoTokenizer.from_pretrained(model, revision=revision)
            network, loading = AutoModel.from_pretrained(model, revision=revision, output_loading_info=True)
    except Exception as error:  # the library and its layers below raise whatever they like
        raise SettingError(
            f"cannot load the text encoder {model!r} ({type(error).__name__}: {first_line(error)})\n"
            "  give --model a folder with a transformers model and its tokenizer, or a name on the hub while online"
        ) from error
    tokenizer.pad_token = (
        tokenizer.pad_token or tokenizer.eos_token or tokenizer.unk_token
    )  # any does, for it is masked
    if tokenizer.pad_token is None:
        raise SettingError(f"the tokenizer of {model!r} has no token to pad texts with; name a pad_token in its folder")
    missing = sorted(key for key in loading["missing_keys"] if not key.endswith("position_ids"))
    if random := [key for key in missing if "pooler" not in key]:
        raise SettingError(
            f"the text encoder {model!r} lacks {len(random)} weights, such as {random[0]}, which would be random"
            "; give the folder of a complete model"
        )
    has_pooler = getattr(network, "pooler", None) is not None and not missing
    if pooling == "pooler" and not has_pooler:
        raise SettingError(f"the text encoder {model!r} has no trained pooler; choose --pooling cls or mean")
    if network.config.is_encoder_decoder:
        network = network.get_encoder()
    return tokenizer, network
