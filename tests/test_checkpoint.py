from __future__ import annotations

import pickle
import zipfile
from collections import Counter, OrderedDict
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch

import recbole_mm  # noqa: F401  (cures RecBole, which checkpoint imports)
from recbole_mm import checkpoint
from recbole_mm.errors import CheckpointError


class Colour(Enum):
    RED = 1


def state(**more):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model(torch.rand(4, 3)).sum().backward()
    optimizer.step()
    return {
        "config": {"model": "SASRec", "dataset": "tiny"},
        "epoch": 3,
        "cur_step": 0,
        "best_valid_score": np.float64(0.25),
        "state_dict": model.state_dict(),
        "other_parameter": {},
        "optimizer": optimizer.state_dict(),
    } | more


def test_plain_turns_settings_into_json_like_values():
    given = {
        "device": torch.device("cuda", 1),
        "type": Colour.RED,
        "rate": np.float64(0.5),
        "n": np.int32(3),
        "flag": np.bool_(True),
        "name": np.str_("x"),
        "metrics": {"b", "a"},
        "sizes": (1, [2.0, None]),
        "counts": Counter("aab"),
        "array": np.arange(2),
        np.int64(4): Path("saved/x"),
    }
    expected = {
        "device": "cuda:1",
        "type": "RED",
        "rate": 0.5,
        "n": 3,
        "flag": True,
        "name": "x",
        "metrics": ["a", "b"],
        "sizes": (1, [2.0, None]),
        "counts": {"a": 2, "b": 1},
        "array": [0, 1],
        4: "saved/x",
    }
    actual = checkpoint.plain(given)
    assert actual == expected
    assert [type(v) for v in actual.values()] == [type(v) for v in expected.values()]


def test_plain_names_what_it_cannot_store():
    with pytest.raises(CheckpointError, match=r"train\['hooks'\]\[1\] is a builtins.object, which a checkpoint cannot"):
        checkpoint.plain({"train": {"hooks": [1, object()]}})


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path):
    saved = state(random_state={"torch": torch.get_rng_state()}, other_parameter={"table": torch.eye(2), "n": [1, 2]})
    checkpoint.save(tmp_path / "a.pth", saved)
    for loaded in (checkpoint.load(tmp_path / "a.pth"), torch.load(tmp_path / "a.pth")):
        assert loaded.keys() == saved.keys()
        assert type(loaded["best_valid_score"]) is float
        assert isinstance(loaded["state_dict"], OrderedDict)
        assert loaded["state_dict"]._metadata == saved["state_dict"]._metadata
        torch.testing.assert_close(loaded["state_dict"], saved["state_dict"], rtol=0, atol=0)
        torch.testing.assert_close(loaded["optimizer"]["state"], saved["optimizer"]["state"], rtol=0, atol=0)
        assert loaded["optimizer"]["param_groups"] == saved["optimizer"]["param_groups"]
        assert loaded["other_parameter"]["n"] == [1, 2]
        assert torch.equal(loaded["random_state"]["torch"], saved["random_state"]["torch"])
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")  # numpy.matrix, which EASE has
def test_arrays_and_sparse_matrices_come_back_in_their_own_form(tmp_path):
    dense = np.asmatrix(np.arange(6, dtype=np.float32).reshape(2, 3))
    others = {
        "matrix": dense,
        "array": np.array([True, False]),
        "lil": scipy.sparse.lil_matrix(dense),
        "csr": scipy.sparse.csr_matrix(dense),
        "layer": torch.nn.Linear(1, 1),
    }
    checkpoint.save(tmp_path / "a.pth", state(other_parameter=others))
    loaded = checkpoint.unpacked(checkpoint.load(tmp_path / "a.pth")["other_parameter"])
    assert "layer" not in loaded  # a module's weights are in state_dict
    for name in ("matrix", "array"):
        assert type(loaded[name]) is type(others[name])
        assert loaded[name].dtype == others[name].dtype and (loaded[name] == others[name]).all()
    for name in ("lil", "csr"):
        assert type(loaded[name]) is type(others[name])
        assert (loaded[name].toarray() == dense).all()


def test_a_state_that_cannot_be_stored_leaves_the_old_file(tmp_path):
    checkpoint.save(tmp_path / "a.pth", state())
    before = (tmp_path / "a.pth").read_bytes()
    with pytest.raises(CheckpointError, match=r"extra\['f'\] is a builtins.function"):
        checkpoint.save(tmp_path / "a.pth", state(extra={"f": lambda: 1}))
    assert (tmp_path / "a.pth").read_bytes() == before


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.mark.parametrize("kind", ["plain pickle", "torch file", "old torch file"])
def test_a_checkpoint_with_code_is_refused_and_the_code_does_not_run(tmp_path, kind, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    marker, path = tmp_path / "marker", tmp_path / "a.pth"
    content = state(extra=Hostile(marker))
    if kind == "plain pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "torch file")
    with pytest.raises(CheckpointError, match=r"a\.pth cannot be read as a checkpoint.*could run code\n  train again"):
        checkpoint.load(path)
    assert not marker.exists()


def test_a_truncated_checkpoint_is_refused(tmp_path):
    path = tmp_path / "a.pth"
    checkpoint.save(path, state())
    content = path.read_bytes()
    for n_bytes in (0, 10, len(content) // 2, len(content) - 30):
        path.write_bytes(content[:n_bytes])
        with pytest.raises(CheckpointError, match="a.pth cannot be read as a checkpoint: it is cut short"):
            checkpoint.load(path)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint .*missing.pth"):
        checkpoint.load(tmp_path / "missing.pth")
    (tmp_path / "text.pth").write_text("user_id:token\n")
    with pytest.raises(CheckpointError, match="text.pth cannot be read as a checkpoint"):
        checkpoint.load(tmp_path / "text.pth")
    with zipfile.ZipFile(tmp_path / "zip.pth", "w") as archive:
        archive.writestr("a", "b")
    with pytest.raises(CheckpointError, match="zip.pth cannot be read as a checkpoint"):
        checkpoint.load(tmp_path / "zip.pth")
    torch.save({"weight": torch.eye(2)}, tmp_path / "weights.pth")
    with pytest.raises(
        CheckpointError, match="weights.pth is no checkpoint of a run: it has no config and no state_dict"
    ):
        checkpoint.load(tmp_path / "weights.pth")


@pytest.mark.parametrize("sampling", [None, {"distribution": "uniform", "sample_num": 1}])
def test_a_config_is_rebuilt_without_command_line_and_without_evaluating_strings(tmp_path, monkeypatch, sampling):
    from recbole.config import Config

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    marker = tmp_path / "marker"
    given = {"data_path": "somewhere", "topk": 7, "metrics": "MRR", "gpu_id": "0,1", "train_neg_sample_args": sampling}
    given |= {"loss_type": "BPR" if sampling else "CE", "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO"}}
    monkeypatch.setattr("sys.argv", ["run.py"])
    config = Config("SASRec", "tiny", config_dict=dict(given))
    config["note"] = f"open({str(marker)!r}, 'w')"
    path = tmp_path / "a.pth"
    checkpoint.save(path, state(config=config))

    monkeypatch.setattr("sys.argv", ["run.py", "--topk=[1]", "--dataset=other"])
    rebuilt = checkpoint.config_from(checkpoint.load(path)["config"])
    assert type(rebuilt) is Config
    assert rebuilt.final_config_dict == config.final_config_dict
    assert rebuilt["data_path"] == "somewhere/tiny"
    assert not marker.exists()

    as_stored_elsewhere = checkpoint.plain({**config.final_config_dict, "local_rank": 0, "single_spec": False})
    assert checkpoint.config_from(as_stored_elsewhere).final_config_dict == config.final_config_dict


def test_settings_without_a_model_are_refused():
    with pytest.raises(CheckpointError, match="names no model and dataset"):
        checkpoint.config_from({"dataset": "tiny"})
