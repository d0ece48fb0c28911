"""Stages, checkpoints and resumption."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, write_planted
from recbole.trainer import Trainer as RecBoleTrainer

from recbole_mm import checkpoint
from recbole_mm.errors import CheckpointError, TrainingError
from recbole_mm.quick_start import run
from recbole_mm.trainer import Trainer, _LossSums, load_pretrained

REPOSITORY = Path(__file__).resolve().parents[1]
TWO_STAGES = {**TINY, "epochs": 3, "pretrain_epochs": 2, "learning_rate": 0.01}


def weights(path: str | Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(Path(path))["state_dict"]


def test_both_stages_equal_the_two_run_apart(planted):
    together = run("MSM4SR", "planted", settings=TWO_STAGES)
    first = run("MSM4SR", "planted", settings={**TWO_STAGES, "train_stage": "pretrain"})
    second = run(
        "MSM4SR", "planted", settings={**TWO_STAGES, "train_stage": "finetune", "pretrained_path": first.checkpoint}
    )
    assert [stage["stage"] for stage in together.stages] == ["pretrain", "finetune"]
    assert (
        together.stages[0]["valid"] == first.valid and together.valid == second.valid and together.test == second.test
    )
    for name, value in weights(together.checkpoint).items():
        torch.testing.assert_close(value, weights(second.checkpoint)[name], rtol=0, atol=0)


def test_fine_tuning_starts_from_the_pretrained_weights(built, planted):
    config, _, train, valid, _, model = built("MSM4SR", planted, train_stage="pretrain", epochs=1)
    pretrainer = Trainer(config, model)
    pretrainer.fit(train, valid, verbose=False)
    *_, tuned = built("MSM4SR", planted, train_stage="finetune")
    before = tuned.item_embedding.weight.clone()
    load_pretrained(tuned, Path(pretrainer.saved_model_file), fresh=tuned.fresh_parameters)
    torch.testing.assert_close(tuned.item_embedding.weight, before)
    for name, value in weights(pretrainer.saved_model_file).items():
        torch.testing.assert_close(tuned.state_dict()[name], value)


def test_content_weights_transfer_to_another_dataset_and_ids_start_fresh(planted, tmp_path):
    other = write_planted(tmp_path / "dataset" / "other", n_items=24, seed=5)
    first = run("MSM4SR", "planted", settings={**TINY, "train_stage": "pretrain"})
    record = run(
        "MSM4SR",
        str(other),
        settings={**TINY, "train_stage": "finetune", "pretrained_path": first.checkpoint, "epochs": 1},
    )
    assert weights(record.checkpoint)["item_embedding.weight"].shape[0] == 25
    tuned = run(  # a fine-tuned checkpoint will do as well
        "MSM4SR",
        str(other),
        settings={**TINY, "train_stage": "finetune", "pretrained_path": record.checkpoint, "epochs": 1},
    )
    assert tuned.dataset == "other"


def test_a_checkpoint_that_does_not_fit_is_refused_with_every_difference(built, planted):
    config, _, train, valid, _, model = built("MSM4SR", planted, train_stage="pretrain", epochs=1)
    trainer = Trainer(config, model)
    trainer.fit(train, valid, verbose=False)
    *_, wider = built("MSM4SR", planted, train_stage="finetune", hidden_size=32, proj=True)
    with pytest.raises(
        CheckpointError, match=r"does not fit the model:(.|\n)*projections(.|\n)*has shape \(.*16.*the model needs"
    ):
        load_pretrained(wider, Path(trainer.saved_model_file), fresh=wider.fresh_parameters)


def test_a_checkpoint_of_another_model_is_refused(planted):
    record = run("SASRec", "planted", settings={**TINY, "epochs": 1})
    with pytest.raises(CheckpointError, match="is a checkpoint of SASRec, expected one of MSM4SR"):
        run("MSM4SR", "planted", settings={**TINY, "train_stage": "finetune", "pretrained_path": record.checkpoint})


class Hostile:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_a_pickle_with_code_is_refused_and_not_run(planted, tmp_path):
    torch.save({"config": {"model": "MSM4SR"}, "state_dict": Hostile()}, tmp_path / "hostile.pth")
    for settings in ({"train_stage": "finetune", "pretrained_path": "hostile.pth"},):
        with pytest.raises(CheckpointError, match="hostile.pth"):
            run("MSM4SR", "planted", settings={**TINY, **settings})
    with pytest.raises(CheckpointError, match="hostile.pth"):
        run(resume="hostile.pth")
    assert not (tmp_path / "executed").exists()


def test_checkpoints_are_plain_data_and_hold_no_features(planted):
    record = run("MSM4SR", "planted", settings={**TINY, "epochs": 1})
    for file in Path("saved").glob("*.pth"):
        state = torch.load(file, weights_only=True)
        assert not any(tensor.shape[:1] == (58,) for tensor in state["state_dict"].values())
    assert record.checkpoint in {str(file) for file in Path("saved").glob("*.pth")}
    assert not list(Path("saved").glob("*.partial*"))


KILLED = """
import os, signal, sys
from recbole_mm.trainer import Trainer
save, saves = Trainer._save_last, []
def save_and_die(self, *args, **kwargs):
    save(self, *args, **kwargs)
    saves.append(1)
    if len(saves) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
Trainer._save_last = save_and_die
from recbole_mm.quick_start import run
run("MSM4SR", "planted", settings={settings!r})
"""


@pytest.mark.slow
@pytest.mark.parametrize("killed_after", [1, 2, 4])  # in pre-training, at its end, in fine-tuning
def test_a_killed_run_resumes_to_the_weights_of_an_uninterrupted_one(planted, killed_after):
    whole = run("MSM4SR", "planted", settings=TWO_STAGES)
    for file in Path("saved").glob("*"):
        file.rename(f"whole-{file.name}")
    script = KILLED.replace("{settings!r}", repr(TWO_STAGES))
    # As many threads as here: sums of floats depend on it in the last digit.
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed = subprocess.run([sys.executable, "-c", script, str(killed_after)], env=environment, capture_output=True)
    assert killed.returncode == -9, killed.stderr.decode()

    last = max(Path("saved").glob("*-last.pth"), key=lambda path: path.stat().st_mtime_ns)
    record = run(resume=last)
    assert record.test == whole.test and record.valid == whole.valid
    assert [stage["stage"] for stage in record.stages] == ["pretrain", "finetune"]
    assert [stage["epochs"] for stage in record.stages] == [stage["epochs"] for stage in whole.stages]
    expected = weights(f"whole-{Path(whole.checkpoint).name}")
    for name, value in weights(record.checkpoint).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


def test_recbole_s_models_resume_too(planted):
    settings = {**TINY, "epochs": 4}
    whole = run("SASRec", "planted", settings=settings)
    short = run("SASRec", "planted", settings={**settings, "epochs": 2})
    resumed = run(resume=short.checkpoint.replace(".pth", "-last.pth"), settings={"epochs": 4})
    assert resumed.test == whole.test and resumed.stages[-1]["epochs"] == 4
    assert resumed.stages[-1]["curve"] == whole.stages[-1]["curve"]
    again = run(resume=resumed.checkpoint.replace(".pth", "-last.pth"))  # nothing left to do
    assert again.test == whole.test


def test_resuming_refuses_other_settings_other_data_and_the_best_checkpoint(planted):
    from recbole_mm.errors import DatasetError, SettingError

    record = run("SASRec", "planted", settings={**TINY, "epochs": 1})
    last = record.checkpoint.replace(".pth", "-last.pth")
    with pytest.raises(SettingError, match="learning_rate is 0.5, was 0.001"):
        run(resume=last, settings={"learning_rate": 0.5})
    with pytest.raises(SettingError, match="is a run of SASRec, not of NARM"):
        run("NARM", resume=last)
    with pytest.raises(CheckpointError, match="resume from the file that ends in -last.pth"):
        run(resume=record.checkpoint)
    with open(planted / "planted.inter", "a") as file:
        file.write("u0\ti100\t5.0\n")
    with pytest.raises(DatasetError, match="the interactions in dataset/planted changed since the run began"):
        run(resume=last)


def test_a_run_resumes_under_its_protocol_and_refuses_another_one(planted):
    from recbole_mm import checkpoint
    from recbole_mm.errors import SettingError

    settings = {**TINY, "protocol": "time", "time_shares": [0.6, 0.2, 0.2]}
    whole = run("SASRec", "planted", settings=settings)
    short = run("SASRec", "planted", settings={**settings, "epochs": 1})
    last = Path(short.checkpoint.replace(".pth", "-last.pth"))
    with pytest.raises(SettingError, match="protocol is 'new-sessions', was 'time'"):
        run(resume=last, settings={"protocol": "new-sessions"})
    old = checkpoint.load(last)  # as one of a version without protocols
    for key in ("protocol", "time_shares", "nproc"):
        del old["config"][key]
        old["given"].pop(key, None)
    checkpoint.save(Path("old-last.pth"), old)
    with pytest.raises(SettingError, match="nproc is 2, was not there, protocol is 'time', was not there"):
        run(resume="old-last.pth", settings={"protocol": "time", "nproc": 2})
    resumed = run(resume=last, settings={"epochs": 2})
    assert (resumed.test, resumed.protocol, resumed.test_fingerprint) == (whole.test, "time", whole.test_fingerprint)


def test_resuming_refuses_other_features(planted):
    from recbole_mm.data.layout import read_feature, write_feature
    from recbole_mm.errors import DatasetError

    record = run("MSM4SR", "planted", settings={**TINY, "train_stage": "finetune", "epochs": 1})
    feature = read_feature(planted, "image")
    write_feature(planted, "image", tokens=feature.tokens, rows=2 * feature.rows, encoder="planted", source="x")
    with pytest.raises(DatasetError, match="image in dataset/planted changed since the run began"):
        run(resume=record.checkpoint.replace(".pth", "-last.pth"))


def test_scores_that_are_not_finite_are_no_result(built, planted, monkeypatch):
    config, _, train, valid, _, model = built("SASRec", planted)
    monkeypatch.setattr(model, "full_sort_predict", lambda batch: torch.full((len(batch), model.n_items), np.nan))
    with pytest.raises(TrainingError, match="scores that are not finite, in 60 of 60 rows of a batch"):
        Trainer(config, model).evaluate(valid, load_best_model=False)


def test_a_loss_of_nan_stops_the_run_and_says_what_to_try(built, planted, monkeypatch):
    config, _, train, valid, _, model = built("SASRec", planted)
    monkeypatch.setattr(model, "calculate_loss", lambda batch: model.item_embedding.weight.sum() * np.nan)
    with pytest.raises(TrainingError, match="became NaN or infinite after 0 epochs\n.*smaller learning_rate"):
        Trainer(config, model).fit(train, valid, verbose=False)


def test_the_gradient_is_clipped_at_each_step(built, planted):
    config, _, train, _, _, model = built("SASRec", planted, clip_grad_norm={"max_norm": 0.0})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert len(train) > 2
    Trainer(config, model)._train_epoch(train, 0)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize("learner", ["adam", "adamw"])
def test_the_fused_optimizer_takes_the_same_steps_to_rounding(built, planted, learner):
    kept = []
    for fused in (False, True):
        settings = {"learner": learner, "weight_decay": 0.01, "fused_optimizer": fused}
        config, *_, model = built("SASRec", planted, **settings)
        trainer = Trainer(config, model)
        assert bool(trainer.optimizer.defaults["fused"]) is fused
        torch.manual_seed(0)
        for _ in range(5):
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            trainer.optimizer.step()
        kept.append(dict(model.state_dict()))
    torch.testing.assert_close(kept[1], kept[0])


def test_another_learner_has_no_fused_step(built, planted):
    from recbole_mm.errors import SettingError

    config, *_, model = built("SASRec", planted, learner="sgd", fused_optimizer=True)
    with pytest.raises(SettingError, match="fused_optimizer goes with learner adam or adamw, found SGD"):
        Trainer(config, model)


def test_losses_that_are_read_together_add_up_to_the_same_and_are_all_looked_at():
    losses = torch.rand(7, 2)
    sums = []
    for at_once in (1, 3, 100):
        looked_at: list[float] = []
        kept = _LossSums(looked_at.append, at_once=at_once)
        for pair in losses:
            kept.add(pair.sum(), tuple(pair))
        sums.append(kept.read())
        assert looked_at == losses.sum(1).tolist()
    assert sums[0] == sums[1] == sums[2] == tuple(sum(column) for column in losses.T.tolist())
    alone = _LossSums(looked_at.append, at_once=2)
    alone.add(losses[0, 0], losses[0, 0])
    assert alone.read() == float(losses[0, 0])


def test_early_stopping_keeps_the_best_epoch_of_validation(built, planted, monkeypatch):
    config, _, train, valid, _, model = built("SASRec", planted, epochs=30, stopping_step=1)
    trainer = Trainer(config, model)
    scores = iter([0.1, 0.3, 0.2, 0.2])
    monkeypatch.setattr(
        trainer, "_valid_epoch", lambda *args, **kwargs: ((score := next(scores)), {"recall@10": score})
    )
    trainer.fit(train, valid, verbose=False)
    (stage,) = trainer.stages
    assert (stage.epochs, stage.best_epoch, stage.valid) == (4, 1, {"recall@10": 0.3})
    assert [point["epoch"] for point in stage.curve] == [0, 1, 2, 3]
    assert [point["valid"] for point in stage.curve] == [0.1, 0.3, 0.2, 0.2]
    assert stage.curve[-1]["train_loss"] == trainer.train_loss_dict[3]


def test_a_checkpoint_made_with_other_settings_or_encoders_is_refused(planted):
    from recbole_mm.data.layout import read_feature, write_feature

    record = run("MSM4SR", "planted", settings={**TINY, "train_stage": "pretrain", "epochs": 1})
    settings = {**TINY, "pretrained_path": record.checkpoint, "epochs": 1}
    with pytest.raises(CheckpointError, match="does not fit the settings:\n  - n_heads is 4, was 2 in pre-training"):
        run("MSM4SR", "planted", settings={**settings, "n_heads": 4})
    feature = read_feature(planted, "text")
    write_feature(
        planted, "text", tokens=feature.tokens, rows=feature.rows, counts=feature.counts, encoder="other", source="x"
    )
    with pytest.raises(CheckpointError, match="feature 'text' is made by 'other', was made by 'planted'"):
        run("MSM4SR", "planted", settings=settings)


def test_features_of_another_width_are_refused(planted, tmp_path):
    from recbole_mm.data.layout import read_feature, write_feature

    record = run("MSM4SR", "planted", settings={**TINY, "train_stage": "pretrain", "epochs": 1})
    feature = read_feature(planted, "image")
    write_feature(planted, "image", tokens=feature.tokens, rows=feature.rows[:, :5], encoder="planted", source="x")
    with pytest.raises(CheckpointError, match=r"towers\.image(.|\n)*features of the width"):
        run("MSM4SR", "planted", settings={**TINY, "pretrained_path": record.checkpoint})


@pytest.mark.parametrize(
    "state",
    [{"config": {}, "state_dict": {}}, {"config": "x", "state_dict": {}}, [1, 2], {"config": {"model": "MSM4SR"}}],
)
def test_a_file_of_another_kind_is_no_checkpoint(planted, tmp_path, state):
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="other.pth is no checkpoint of a run"):
        run("MSM4SR", "planted", settings={**TINY, "pretrained_path": "other.pth"})
    with pytest.raises(CheckpointError, match="other.pth is no checkpoint of a run"):
        run(resume="other.pth")


def test_half_a_last_state_is_refused(planted, tmp_path):
    state = {"config": {"model": "SASRec", "dataset": "planted"}, "state_dict": {}, "random_state": {}}
    torch.save(state, tmp_path / "half-last.pth")
    with pytest.raises(CheckpointError, match="it has no given and no stage"):
        run(resume="half-last.pth")


def test_epochs_are_counted_also_without_validation_after_each(built, planted):
    config, _, train, valid, _, model = built("SASRec", planted, epochs=3, eval_step=2)
    trainer = Trainer(config, model)
    trainer.fit(train, valid, verbose=False)
    assert trainer.stages[0].epochs == 3
    assert [point["valid"] is None for point in trainer.stages[0].curve] == [True, False, True]


def test_a_trainer_of_recbole_s_own_tells_its_curve_too(planted, monkeypatch):
    ours = run("SASRec", "planted", settings=TINY)
    monkeypatch.setattr("recbole_mm.quick_start._trainer_class", lambda config: RecBoleTrainer)
    theirs = run("SASRec", "planted", settings=TINY)
    assert theirs.stages[-1]["curve"] == ours.stages[-1]["curve"] and len(ours.stages[-1]["curve"]) == 2
