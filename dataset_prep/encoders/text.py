"""A text encoder without weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dataset_prep.encoders.model_files import versions
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
        self.settings["versions"] = versions(("scikit-learn", "scipy", "numpy"))

    def fit(self, everything: Sequence[str]) -> None:
        """Learn vocabulary and projection.

        Args:
            everything: the whole text of each item that has one.

        Raises:
            DatasetError: there is no word in the texts.
        """
        from sklearn.utils.extmath import randomized_svd
        from threadpoolctl import threadpool_limits

        min_df = 2 if len(everything) >= MANY_TEXTS else 1
        terms = self._count(everything, min_df=min_df) if min_df > 1 else None
        if terms is None:
            min_df, terms = 1, self._count(everything, min_df=1)
        if terms is None:
            raise DatasetError(
                "the texts hold no word of two or more letters; choose other text columns with --columns"
            )
        width = min(self.settings["max_width"], *terms.shape)
        with threadpool_limits(1):  # several threads add up in another order, which changes the last bits
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
