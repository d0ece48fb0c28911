"""Text encoders: ``tfidf`` needs no weights, ``sentence`` runs a sentence-transformers model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recbole_mm.data.files import sha256_of
from recbole_mm.errors import DatasetError, SettingError

MANY_TEXTS = 200  # from here on, words and word pairs of a single text are left out


class TfidfEncoder:
    """TF-IDF of words and word pairs, brought to a small width by truncated SVD (latent semantic analysis).

    Fitted on the catalogue's own texts, so it needs no weights and no network. Same texts, same vectors: the SVD's
    random start is fixed. TF-IDF rows have length 1, which takes out the length of a text; the projected vectors are
    *not* brought to length 1 again, because their length tells how much of a text the kept dimensions hold: a sentence
    of words that hardly any other item has comes out short. A text without a known word becomes the zero vector.

    Args:
        width: F, the largest width; small catalogues give fewer, at most one per text and per term.
        random_state: of the SVD.
    """

    name, source = "tfidf", "text"

    def __init__(self, *, width: int = 256, random_state: int = 2020) -> None:
        if width < 1:
            raise SettingError(f"width is {width}, expected at least 1")
        self.settings: dict[str, Any] = {"max_width": width, "random_state": random_state}

    def fit(self, everything: Sequence[str]) -> None:
        """Learn vocabulary and projection.

        Args:
            everything: the whole text of each item that has one.

        Raises:
            DatasetError: there is no word in the texts.
        """
        from sklearn.utils.extmath import randomized_svd

        min_df = 2 if len(everything) >= MANY_TEXTS else 1
        terms = self._count(everything, min_df=min_df) if min_df > 1 else None
        if terms is None:
            min_df, terms = 1, self._count(everything, min_df=1)
        if terms is None:
            raise DatasetError(
                "the texts hold no word of two or more letters; choose other text columns with --columns"
            )
        width = min(self.settings["max_width"], *terms.shape)
        _, _, self._directions = randomized_svd(
            terms, n_components=width, n_iter=5, random_state=self.settings["random_state"]
        )  # [F, terms]
        self.settings |= {"width": width, "ngrams": [1, 2], "sublinear_tf": True, "min_df": min_df}
        self.settings |= {"n_terms": terms.shape[1]}

    def _count(self, texts: Sequence[str], *, min_df: int) -> Any:
        """[n, terms] sparse TF-IDF; None if no term is in ``min_df`` texts."""
        from sklearn.feature_extraction.text import TfidfVectorizer

        self._terms = TfidfVectorizer(
            ngram_range=(1, 2), sublinear_tf=True, min_df=min_df, max_features=50_000, dtype=np.float64
        )
        try:
            return self._terms.fit_transform(texts)
        except ValueError as error:  # scikit-learn has no class of its own for "empty vocabulary"
            if "vocabulary" in str(error) or "no terms remain" in str(error).lower():
                return None
            raise

    def encode(self, batch: Sequence[str]) -> list[np.ndarray]:
        if not batch:
            return []
        return list((self._terms.transform(batch) @ self._directions.T).astype(np.float32))  # [n, F]


class SentenceEncoder:
    """A sentence-transformers model, from a local folder or by its name on the hub.

    Args:
        model: folder, or name on the hub (downloaded once).
        batch_size: texts per forward pass; the library sorts by length first.
        device: such as "cpu" or "cuda:0"; None lets the library choose.

    Raises:
        SettingError: sentence-transformers is not installed, or the model cannot be loaded.
    """

    name, source = "sentence", "text"

    def __init__(
        self, *, model: str = "sentence-transformers/all-MiniLM-L6-v2", batch_size: int = 64, device: str | None = None
    ) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise SettingError(
                f"the encoder 'sentence' needs the package sentence-transformers ({error})\n"
                '  install it with: pip install "recbole_mm[encoders]"'
            ) from error
        if batch_size < 1:
            raise SettingError(f"batch_size is {batch_size}, expected at least 1")
        try:
            self._model = SentenceTransformer(str(model), device=device).eval()
        except Exception as error:  # the library and its three layers below raise whatever they like
            raise SettingError(
                f"cannot load the sentence encoder {str(model)!r} ({type(error).__name__}: {_first_line(error)})\n"
                "  give --model a folder with a sentence-transformers model, or a name on the hub while online"
            ) from error
        self._batch_size = batch_size
        folder = Path(model)
        self.settings: dict[str, Any] = {
            "model": folder.resolve().name if folder.is_dir() else str(model),
            "weights_sha256": _weights_sha256(str(model)),
            "width": len(self.encode(["width"])[0]),
        }

    def fit(self, everything: Sequence[str]) -> None:
        """Nothing to learn."""

    def encode(self, batch: Sequence[str]) -> list[np.ndarray]:
        rows = self._model.encode(
            list(batch), batch_size=self._batch_size, show_progress_bar=False, convert_to_numpy=True
        )  # [n, F], without gradients
        return list(np.asarray(rows, dtype=np.float32))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _weights_sha256(model: str) -> dict[str, str]:
    """sha256 of each weights file, by file name; of a hub model, as it lies in the hub's cache."""
    folder = Path(model)
    if not folder.is_dir():
        folder = _cached(model)
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin")) if folder else []
    return {file.name: sha256_of(file) for file in files}


def _cached(model: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    for name in (model, f"sentence-transformers/{model}"):
        for file in ("model.safetensors", "pytorch_model.bin", "config.json"):
            path = try_to_load_from_cache(name, file) if name.count("/") <= 1 else None
            if isinstance(path, str):
                return Path(path).parent
    return None
