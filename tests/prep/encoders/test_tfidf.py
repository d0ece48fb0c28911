"""TF-IDF vectors: which texts are close, and how wide they are."""

from __future__ import annotations

import numpy as np
import pytest

from dataset_prep.encoders.text import TfidfEncoder
from recbole_mm.errors import DatasetError, SettingError

TEXTS = [f"a {colour} {thing}" for colour in ("red", "green", "blue") for thing in ("tent", "lantern", "warm wool hat")]


def fitted() -> TfidfEncoder:
    encoder = TfidfEncoder()
    encoder.fit(TEXTS)
    return encoder


def test_texts_that_share_words_are_closer():
    encoder = fitted()
    tent, same_thing, other = encoder.encode(["a red tent", "a blue tent", "a blue lantern"])
    assert tent @ same_thing > tent @ other + 0.1


def test_a_text_without_a_known_word_is_the_zero_vector():
    encoder = fitted()
    assert not encoder.encode(["xylophone !!", ""])[0].any()


def test_width_is_at_most_what_the_catalogue_carries():
    for n_texts, width, expected in ((1, 256, 1), (9, 256, 9), (9, 4, 4)):
        encoder = TfidfEncoder(width=width)
        encoder.fit(TEXTS[:n_texts])
        assert encoder.settings["width"] == expected == len(encoder.encode(["red tent"])[0])


def test_full_width_keeps_the_similarities_of_tf_idf():
    """Oracle: with every dimension kept, the SVD is a rotation of scikit-learn's TF-IDF rows."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    rows = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True).fit_transform(TEXTS).toarray()
    encoder = fitted()
    vectors = np.stack(encoder.encode(TEXTS))
    np.testing.assert_allclose(vectors @ vectors.T, rows @ rows.T, atol=1e-6)


def test_rare_words_are_left_out_of_large_catalogues_only():
    small, large = TfidfEncoder(), TfidfEncoder()
    small.fit(TEXTS)
    large.fit([f"word{i} tent" for i in range(300)])
    assert (small.settings["min_df"], large.settings["min_df"]) == (1, 2)
    assert large.settings["n_terms"] == 1


def test_a_large_catalogue_that_shares_no_word_still_works():
    encoder = TfidfEncoder()
    encoder.fit([f"word{i}" for i in range(300)])
    assert encoder.settings["min_df"] == 1


def test_the_number_of_threads_changes_no_bit():
    limits = pytest.importorskip("threadpoolctl").threadpool_limits
    random = np.random.default_rng(0)
    texts = [" ".join(f"word{n}" for n in random.integers(0, 900, 15)) for _ in range(900)]
    made = []
    for threads in (1, 2):
        with limits(threads):
            encoder = TfidfEncoder()
            encoder.fit(texts)
            made.append(np.stack(encoder.encode(texts)).tobytes())
    assert made[0] == made[1]


def test_texts_without_words_are_refused():
    with pytest.raises(DatasetError, match="hold no word of two or more letters"):
        TfidfEncoder().fit(["a", "1", "!"])


def test_a_width_below_one_is_refused():
    with pytest.raises(SettingError, match="width is 0, expected at least 1"):
        TfidfEncoder(width=0)
