"""RecBole's own entry points find our models once ``recbole_mm`` is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY

REPOSITORY = Path(__file__).resolve().parents[1]
STOCK_SCRIPT = """
import json, sys
import recbole_mm
from recbole.quick_start import load_data_and_model, objective_function, run_recbole

settings = json.loads(sys.argv[1])
result = run_recbole(model="MSM4SR", dataset="planted", config_dict=settings)
from pathlib import Path
file = max(Path("saved").glob("MSM4SR-planted-finetune-*.pth"), key=lambda path: "last" not in path.name)
config, model, dataset, train, valid, test = load_data_and_model(str(file))
from recbole.trainer import Trainer
again = Trainer(config, model).evaluate(test, load_best_model=False)
tuned = objective_function({**settings, "model": "MSM4SR", "dataset": "planted", "learning_rate": 0.02})
import torch
print(json.dumps({
    "test": dict(result["test_result"]), "again": dict(again), "tuned": dict(tuned["test_result"]),
    "model": type(model).__module__, "dataset": type(dataset).__name__, "temperature": config["temperature"],
    "anomaly": torch.is_anomaly_enabled(),
}, default=float))
"""


def stock(script: str, settings: dict) -> dict:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, json.dumps(settings)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.slow
def test_a_stock_script_trains_tunes_and_reloads_our_model(planted):
    from recbole_mm.quick_start import run

    settings = {**TINY, "epochs": 2, "pretrain_epochs": 1, "learning_rate": 0.01, "data_path": "dataset"}
    out = stock(STOCK_SCRIPT, settings)
    assert out["model"] == "recbole_mm.model.msm4sr" and out["dataset"] == "MultimodalDataset"
    assert out["temperature"] == 0.07 and out["anomaly"] is False
    assert out["again"] == out["test"] and set(out["tuned"]) == set(out["test"])
    assert (
        run("MSM4SR", str(planted), settings={k: v for k, v in settings.items() if k != "data_path"}).test
        == out["test"]
    )


def test_names_of_recbole_s_own_stay_as_they_are():
    import recbole.data.dataset
    import recbole.trainer
    from recbole.utils import get_model, get_trainer

    from recbole_mm.data.dataset import MultimodalDataset
    from recbole_mm.model.msm4sr import MSM4SR
    from recbole_mm.trainer import Trainer

    assert get_model("MSM4SR") is MSM4SR and get_model("SASRec").__module__.startswith("recbole.model")
    assert get_trainer(None, "MSM4SR") is Trainer and get_trainer(None, "SASRec") is recbole.trainer.Trainer
    assert recbole.data.dataset.MSM4SRDataset is MultimodalDataset
    with pytest.raises(AttributeError, match="has no attribute 'SASRecDataset'"):
        _ = recbole.data.dataset.SASRecDataset


def test_recbole_may_be_imported_first():
    script = """
import json
import recbole.config, recbole.data.dataset, recbole.trainer
import recbole_mm
found = recbole.trainer.MSM4SRTrainer, recbole.data.dataset.MSM4SRDataset
print(json.dumps([kind.__module__ for kind in found]))
"""
    assert stock(script, {}) == ["recbole_mm.trainer", "recbole_mm.data.dataset"]


def test_a_dataset_s_settings_of_a_model_hold_for_those_derived_from_it(tmp_path, monkeypatch):
    from recbole_mm import registration
    from recbole_mm.model import find_model

    classes = {name: find_model(name) for name in ("MSM4SR", "MSM4SRReleased", "Popularity", "SASRec")}
    assert registration.dataset_settings("demo", classes["MSM4SRReleased"])["pretrain_epochs"] == 15
    (tmp_path / "dataset").mkdir()
    file = tmp_path / "dataset" / "shop.yaml"
    monkeypatch.setattr(registration, "properties_dir", lambda: tmp_path)
    file.write_text(
        "topk: [7]\nMSM4SR:\n  epochs: 3\n  n_heads: 1\nMSM4SRReleased:\n  epochs: 4\nSASRec:\n  epochs: 5\n"
    )
    settings = {name: registration.dataset_settings("shop", cls) for name, cls in classes.items()}
    assert settings["MSM4SR"] == {"topk": [7], "epochs": 3, "n_heads": 1}
    assert settings["MSM4SRReleased"] == {"topk": [7], "epochs": 4}
    assert settings["SASRec"] == {"topk": [7], "epochs": 5} and settings["Popularity"] == {"topk": [7]}


def test_recbole_s_own_config_reads_the_files_of_the_base_first(monkeypatch):
    from recbole.config import Config

    monkeypatch.setattr(sys, "argv", ["run.py"])
    config = Config("MSM4SRReleased", "demo", config_dict={"use_gpu": False})
    assert (config["feature_scale"], config["hidden_size"], config["valid_metric"]) == ("none", 64, "Recall@20")


def test_importing_the_model_under_recbole_s_path_gives_the_same_module():
    import importlib

    alias = importlib.import_module("recbole.model.sequential_recommender.msm4sr")
    ours = importlib.import_module("recbole_mm.model.msm4sr")
    assert alias is ours and ours.__spec__.name == "recbole_mm.model.msm4sr"
