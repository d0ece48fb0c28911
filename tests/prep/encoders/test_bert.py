"""BERT: each pooling against one text at a time, padding, limits, and models that are not complete."""

from __future__ import annotations

import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_text_models import TEXTS, save_bert

from dataset_prep.encoders import build_encoder, model_files
from dataset_prep.encoders.bert import BertEncoder
from dataset_prep.encoders.model_files import model_settings
from recbole_mm.errors import SettingError

POOLINGS = ("pooler", "cls", "mean")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_bert(tmp_path_factory.mktemp("models") / "bert")


def literal(folder: Path, text: str, pooling: str) -> np.ndarray:
    """Oracle: one text, no padding, token by token."""
    from transformers import BertModel, BertTokenizerFast

    tokens = BertTokenizerFast.from_pretrained(folder)(text, return_tensors="pt")
    with torch.no_grad():
        output = BertModel.from_pretrained(folder).eval()(**tokens)
    states = output.last_hidden_state[0]
    vector = {"pooler": output.pooler_output[0], "cls": states[0], "mean": states.sum(dim=0) / len(states)}[pooling]
    return vector.numpy()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_each_pooling_equals_one_text_at_a_time(folder, pooling):
    vectors = BertEncoder(model=str(folder), pooling=pooling, device="cpu").encode(TEXTS)
    for text, vector in zip(TEXTS, vectors, strict=True):
        assert vector.dtype == np.float32
        np.testing.assert_allclose(vector, literal(folder, text, pooling), atol=2e-6)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_batch_mates_their_number_and_their_order_change_nothing(folder, pooling):
    large = BertEncoder(model=str(folder), pooling=pooling, device="cpu")
    small = BertEncoder(model=str(folder), pooling=pooling, device="cpu", batch_size=2)
    together = np.stack(large.encode(TEXTS))
    np.testing.assert_allclose(np.stack(small.encode(TEXTS)), together, atol=2e-6)
    np.testing.assert_allclose(np.stack(large.encode(TEXTS[::-1])[::-1]), together, atol=2e-6)
    np.testing.assert_allclose(np.stack([large.encode([text])[0] for text in TEXTS]), together, atol=2e-6)
    assert large.encode([]) == []


def test_the_first_token_is_found_behind_padding_on_the_left(folder):
    class Output:
        last_hidden_state = torch.tensor([[[9.0], [1.0], [2.0]], [[3.0], [4.0], [5.0]]])

    encoder = BertEncoder(model=str(folder), pooling="cls", device="cpu")
    assert encoder._pool(Output, torch.tensor([[0, 1, 1], [1, 1, 1]])).tolist() == [[1.0], [3.0]]


def test_encoding_twice_gives_the_same_bytes(folder):
    first, second = (np.stack(BertEncoder(model=str(folder), device="cpu").encode(TEXTS)).tobytes() for _ in range(2))
    assert first == second


def test_threads_may_share_an_encoder(folder):
    encoder = BertEncoder(model=str(folder), pooling="mean", device="cpu", max_length=6)
    expected = np.stack(encoder.encode(TEXTS))
    with ThreadPoolExecutor(4) as pool:
        for vectors in pool.map(encoder.encode, [TEXTS] * 16):
            np.testing.assert_array_equal(np.stack(vectors), expected)


def test_F30_a_text_beyond_the_limit_is_cut_and_counted(folder):
    encoder = BertEncoder(model=str(folder), pooling="mean", device="cpu", max_length=5)
    three, four, endless = "a red tent", "a red wool hat", "red tent " * 500
    vectors = encoder.encode([three, four, endless, "a red wool"])
    assert encoder.counts == {"truncated": 2}
    np.testing.assert_allclose(vectors[1], vectors[3], atol=2e-6)
    assert np.isfinite(vectors[2]).all()
    encoder.encode([four])
    assert encoder.counts == {"truncated": 3}


def test_F30_odd_texts_have_finite_vectors(folder):
    texts = ["", " ", "😀🎉", "שלום עולם", "a\x00b\x1f", "𝒳" * 5000]
    encoder = BertEncoder(model=str(folder), device="cpu")
    assert np.isfinite(np.stack(encoder.encode(texts))).all()
    assert encoder.counts["truncated"] <= 1


def test_a_network_that_counts_positions_behind_the_padding_is_not_given_more_tokens_than_it_has(tmp_path):
    from transformers import RobertaConfig, RobertaModel

    shutil.copytree(save_bert(tmp_path / "bert", positions=10**6), tmp_path / "roberta", dirs_exist_ok=True)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = RobertaConfig(vocab_size=64, max_position_embeddings=34, pad_token_id=1, **sizes)
    RobertaModel(config).save_pretrained(tmp_path / "roberta")
    encoder = BertEncoder(model=str(tmp_path / "roberta"), pooling="mean", device="cpu")
    assert encoder.settings["max_length"] == 32
    assert np.isfinite(encoder.encode(["red " * 100, "a"])).all() and encoder.counts["truncated"] == 1
    with pytest.raises(SettingError, match="max_length is 33, expected 3 to 32 for this model"):
        BertEncoder(model=str(tmp_path / "roberta"), pooling="mean", device="cpu", max_length=33)


def test_a_tokenizer_without_padding_pads_with_another_token_that_is_masked(folder, tmp_path):
    file = shutil.copytree(folder, tmp_path / "unknown") / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token": None}))
    encoder = BertEncoder(model=str(tmp_path / "unknown"), device="cpu")
    assert encoder._tokenizer.pad_token == "[UNK]"
    expected = BertEncoder(model=str(folder), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(encoder.encode(TEXTS), expected, atol=2e-6)


def test_weights_of_every_part_and_kind_tell_models_apart(tmp_path):
    for name in ("model.safetensors", "pytorch_model.bin", "2_Dense/pytorch_model.bin", "a/b/model.safetensors"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"weights")
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx/model.bin").write_bytes(b"of another runtime")
    found = model_settings(str(tmp_path), None, packages=())["weights_sha256"]
    assert list(found) == ["model.safetensors", "2_Dense/pytorch_model.bin", "a/b/model.safetensors"]
    (tmp_path / "model.safetensors").rename(tmp_path / "open_clip_model.pth")
    found = model_settings(str(tmp_path), None, packages=())["weights_sha256"]
    assert list(found)[:2] == ["open_clip_model.pth", "pytorch_model.bin"]


def test_of_a_branch_on_the_hub_the_commit_is_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(model_files, "_cached", lambda *_: tmp_path / ("c" * 40))
    assert model_settings("shop/bert", "main", packages=())["revision"] == "c" * 40
    monkeypatch.setattr(model_files, "_cached", lambda *_: None)
    assert model_settings("shop/bert", "main", packages=())["revision"] == "main"


def test_the_settings_tell_models_apart(folder, tmp_path):
    settings = BertEncoder(model=str(folder), pooling="mean", device="cpu", batch_size=3).settings
    assert settings == BertEncoder(model=str(folder), pooling="mean", device="cpu", batch_size=7).settings
    assert json.loads(json.dumps(settings)) == settings
    assert settings["model"] == "bert" and str(folder.parent) not in json.dumps(settings)
    assert (settings["pooling"], settings["max_length"], settings["precision"]) == ("mean", 32, "float32")
    assert settings["width"] == 16 and list(settings["weights_sha256"]) == ["model.safetensors"]
    other = BertEncoder(model=str(save_bert(tmp_path / "bert", seed=1)), pooling="mean", device="cpu").settings
    assert other["weights_sha256"] != settings["weights_sha256"]
    assert other["configuration_sha256"] == settings["configuration_sha256"]
    words = tmp_path / "bert" / "vocab.txt"
    words.write_text(words.read_text() + "more\n")
    again = BertEncoder(model=str(tmp_path / "bert"), pooling="mean", device="cpu").settings
    assert again["configuration_sha256"] != settings["configuration_sha256"]


def test_it_is_built_by_its_name(folder):
    encoder = build_encoder("bert", feature="text", model=str(folder), device="cpu", pooling=None)
    assert (encoder.name, encoder.source, encoder.settings["pooling"]) == ("bert", "text", "pooler")


def test_a_model_without_pooler_weights_is_not_pooled_with_random_ones(tmp_path):
    folder = save_bert(tmp_path / "bert", pooler=False)
    with pytest.raises(SettingError, match=r"has no trained pooler; choose --pooling cls or mean"):
        BertEncoder(model=str(folder), device="cpu")
    assert len(BertEncoder(model=str(folder), pooling="cls", device="cpu").encode(TEXTS)) == len(TEXTS)


def test_a_model_that_lacks_other_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save_bert(tmp_path / "bert")
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SettingError, match=r"lacks 1 weights, such as encoder\.layer\.1\.output\.dense\.weight, which"):
        BertEncoder(model=str(folder), pooling="mean", device="cpu")


def test_weights_that_are_not_finite_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save_bert(tmp_path / "bert")
    weights = load_file(folder / "model.safetensors")
    weights["encoder.layer.1.output.dense.weight"][:] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SettingError, match="model bert gave NaN or infinity in float32"):
        BertEncoder(model=str(folder), pooling="mean", device="cpu")


def test_F64_without_transformers_the_install_command_is_given(monkeypatch, folder):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SettingError, match=r'(?s)needs the package transformers.*pip install "recbole_mm\[encoders\]"'):
        BertEncoder(model=str(folder), device="cpu")


def test_wrong_arguments_say_what_is_right(folder, tmp_path):
    def make(**options):
        return BertEncoder(**{"model": str(folder), "device": "cpu", **options})

    with pytest.raises(SettingError, match=r"pooling is 'men', expected one of .*; did you mean 'mean'"):
        make(pooling="men")
    with pytest.raises(SettingError, match="batch_size is 0, expected at least 1"):
        make(batch_size=0)
    for length in (2, 33):
        with pytest.raises(SettingError, match=f"max_length is {length}, expected 3 to 32 for this model"):
            make(max_length=length)
    with pytest.raises(SettingError, match=r"(?s)revision 'main' belongs to a name on the hub, and .*bert is a folder"):
        make(revision="main")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SettingError, match="(?s)cannot load the text encoder .*empty.*give --model a folder"):
        make(model=str(tmp_path / "empty"))
