"""Tokens of many texts, cut into batches of about equal length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


def batches_by_length(features: dict[str, Any], size: int) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
    """Batches of texts with about the same number of tokens, the longest first, padded no further than needed.

    Texts of equal length keep their order, so that the same list gives the same batches. What can exhaust the memory
    comes first.

    Args:
        features: what a tokenizer made of all texts; ``attention_mask`` [n, L] is 1 at tokens, 0 at padding.
        size: texts per batch.

    Yields:
        Numbers of the texts in the list [b], and their features: of each [n, L] tensor the part [b, longest].
    """
    import torch

    mask = features["attention_mask"]  # [n, L]
    order = np.argsort(-token_counts(features), kind="stable")
    for start in range(0, len(order), size):
        numbers = order[start : start + size]
        rows = torch.from_numpy(numbers)
        used = torch.nonzero(mask[rows].any(dim=0)).flatten()  # columns with a token, be padding left or right
        yield (
            numbers,
            {name: value[rows][:, used] if _is_per_token(value, mask) else value for name, value in features.items()},
        )


def n_positions(network: Any) -> int | None:
    """Tokens that a network of transformers has positions for; None if it says nothing of the kind.

    Networks such as RoBERTa count positions from behind that of the padding, which costs them the first ones.
    """
    largest = getattr(getattr(network, "config", None), "max_position_embeddings", None)
    for name, module in network.named_modules() if largest else ():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return largest - module.padding_idx - 1
    return largest


def token_counts(features: dict[str, Any]) -> np.ndarray:
    """Tokens of each text, [n]."""
    return features["attention_mask"].sum(dim=1).numpy()


def _is_per_token(value: Any, mask: Tensor) -> bool:
    return getattr(value, "shape", None) == mask.shape


def count_truncated(tokenizer: Any, texts: list[str], counts: np.ndarray, limit: int) -> int:
    """How many texts lost tokens to a limit.

    Args:
        tokenizer: of transformers.
        counts: tokens of each text after truncation, [n]; only texts at the limit are counted again without it.
    """
    at_limit = [texts[number] for number in np.flatnonzero(counts >= limit)]
    if not at_limit:
        return 0
    whole = tokenizer(at_limit, truncation=False, padding=False, verbose=False)["input_ids"]
    return sum(len(ids) > limit for ids in whole)
