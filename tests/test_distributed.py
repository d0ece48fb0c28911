"""Two processes train what one would, count each row once, write once, and end together."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, write_errors_to, write_planted

from recbole_mm import checkpoint, distributed, evaluation, shared_training
from recbole_mm.config import Config
from recbole_mm.data.dataset import MultimodalDataset
from recbole_mm.errors import SettingError, TrainingError
from recbole_mm.quick_start import run
from recbole_mm.records import RUNS_FILE, load, read_per_user
from recbole_mm.shared_training import SharedTraining
from recbole_mm.trainer import Trainer, load_pretrained
from run_recbole_mm import main

N_USERS = 61  # so that neither batches nor the test rows come out even; 305 training rows
EQUAL = {  # a training in which rounding stays small: no dropout, and no optimizer that makes steps of tiny gradients
    **TINY, "learner": "sgd", "learning_rate": 0.1, "train_batch_size": 76, "seed": 7,
}  # fmt: skip
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0}
STAGES = {"pretrain_epochs": 2, "pretrain_learning_rate": 0.1, "n_experts": 2, "adaptor_dropout": 0.0, **NO_DROPOUT}
MODELS = {  # and nothing that is drawn for each row, as processes draw on their own
    "SASRec": NO_DROPOUT,
    "MSM4SR": {**STAGES, "item_drop_max": 0.0, "use_mixup": False, "gather_negatives": True},
    "UniSRec": {**STAGES, "item_drop_ratio": 0.0, "gate_noise": False, "gather_negatives": True},
    "MMSBR": {
        **{f"{part}_dropout": 0.0 for part in ("feature", "pivot", "fusion", "price")},
        **{"contrastive_weight": 0.5, "n_negatives": 5, "share_items": True},
    },
}


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """``dataset/odd`` below the test's own working directory."""
    return write_planted(tmp_path / "dataset" / "odd", n_users=N_USERS)


# ------------------------------------------------ two processes


def train_together() -> dict:
    """What each of two processes does; those of the first one come back."""
    write_errors_to("errors")
    evaluation.LATENCY_SECONDS = 0
    found = {model: run(model, "odd", settings={**EQUAL, **MODELS[model]}) for model in MODELS}
    pretraining = {**TINY, "train_stage": "pretrain", "n_experts": 2}
    found["whole"] = run("MSM4SR", "odd", settings={**pretraining, "pretrain_epochs": 2})
    half = run("MSM4SR", "odd", settings={**pretraining, "pretrain_epochs": 1})
    last = distributed.from_first(half.checkpoint).replace(".pth", "-last.pth")
    found["resumed"] = run(resume=last, settings={"pretrain_epochs": 2})
    found["same place"] = distributed.gathered(found["SASRec"].checkpoint)
    stock, SharedTraining._average = SharedTraining._average, lambda self: None
    try:
        run("SASRec", "odd", settings={**TINY, "epochs": 1})
    except TrainingError as error:
        found["apart"] = str(error)
    SharedTraining._average = stock
    return found


@pytest.mark.slow
def test_two_processes_train_what_one_trains_and_count_each_row_once(odd, quick_launch, monkeypatch):
    monkeypatch.setattr(evaluation, "LATENCY_SECONDS", 0)
    alone = {model: run(model, "odd", settings={**EQUAL, **MODELS[model]}) for model in MODELS}
    Path(RUNS_FILE).unlink()
    found = distributed.launch(train_together, 2)

    for model, expected in alone.items():
        together = found[model]
        assert len(together.stages) == len(expected.stages) == (2 if model in ("MSM4SR", "UniSRec") else 1)
        for ours, theirs in zip(together.stages, expected.stages, strict=True):
            assert len(ours["curve"]) == 2
            for epoch, same in zip(ours["curve"], theirs["curve"], strict=True):
                assert epoch["train_loss"] == pytest.approx(same["train_loss"], rel=1e-6), model
                assert epoch["valid"] == pytest.approx(same["valid"], abs=1e-6), model
        expected_weights = weights(expected.checkpoint)
        for name, value in weights(together.checkpoint).items():
            torch.testing.assert_close(value, expected_weights[name], rtol=1e-4, atol=1e-5)
        assert together.settings_hash == expected.settings_hash and together.settings_given["nproc"] == 2
        assert together.warnings == expected.warnings == []

        metrics, rank = evaluate_alone(together)  # by one process, with the same weights
        assert metrics == together.test and together.n_test == N_USERS
        rows = read_per_user(RUNS_FILE.parent / together.per_user)
        np.testing.assert_array_equal(rows.rank, rank)
        assert len(set(rows.user)) == N_USERS

    assert found["resumed"].test == found["whole"].test  # with dropout, so each process goes on with its own
    assert found["resumed"].stages[0]["curve"] == found["whole"].stages[0]["curve"]
    assert "sees those of its own process, one in 2 of train_batch_size" in found["whole"].warnings[0]
    assert "gather_negatives" in found["whole"].warnings[0]
    assert found["apart"].startswith("the gradients of 2 processes are not the same: ")

    assert len(set(found["same place"])) == 1
    records = load(RUNS_FILE).records
    assert len(records) == 7 and len({record.run_id for record in records}) == 7
    names = Counter(path.name.split("-")[0] for path in Path("saved").iterdir())
    # Best and last of each stage, those of one process included; the run that failed wrote none.
    assert names == {"SASRec": 4, "MSM4SR": 12, "UniSRec": 8, "MMSBR": 4}
    assert Path("errors").read_text().count("epoch 0 training") == 8  # one log


def weights(path: str) -> dict[str, torch.Tensor]:
    return checkpoint.load(path)["state_dict"]


def evaluate_alone(record) -> tuple[dict[str, float], np.ndarray]:
    """Metrics and ranks of the test rows, by this one process."""
    from recbole.data import data_preparation

    settings = {**record.settings_given, "nproc": 1, "train_stage": "finetune"}
    if len(record.stages) == 1:
        del settings["train_stage"]
    config = Config(record.model, "odd", settings=settings)
    train, _, test = data_preparation(config, MultimodalDataset(config))
    model = config.model_class(config, train._dataset)
    load_pretrained(model, Path(record.checkpoint))
    trainer = Trainer(config, model)
    metrics = trainer.evaluate(test, load_best_model=False)
    return {key: float(value) for key, value in metrics.items()}, trainer.ranked.rank.numpy()


@pytest.mark.slow
def test_the_command_line_starts_the_processes(odd, capfd):
    arguments = [f"--{key}={value}" for key, value in TINY.items() if key not in ("hidden_size", "inner_size")]
    assert main(["--model=SRGNN", "--dataset=odd", "--nproc=2", "--epochs=1", *_without(arguments, "--epochs")]) == 0
    (record,) = load(RUNS_FILE).records
    assert "--nproc=2" in record.command and record.settings["nproc"] == 2 and record.n_test == N_USERS
    assert len(list(Path("log").rglob("*.log"))) == len(list(Path("log_tensorboard").iterdir())) == 1
    captured = capfd.readouterr().err
    assert captured.count("record appended") == 1 and "Warning" not in captured


def _without(arguments: list[str], name: str) -> list[str]:
    return [argument for argument in arguments if not argument.startswith(f"{name}=")]


def fail(kind: str) -> None:
    write_errors_to("errors")
    distributed.join()
    distributed.note(came="so far")
    distributed.barrier()
    if distributed.rank() == 1 and kind == "message":
        raise SettingError("no such thing")
    if distributed.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    distributed.barrier()


@pytest.mark.slow
def test_what_goes_wrong_in_one_process_ends_all_with_one_message(quick_launch):
    notes = {}
    with pytest.raises(SettingError, match=r"^no such thing\n  \(in process 2 of 2\)$"):
        distributed.launch(fail, 2, arguments={"kind": "message"}, notes=notes)
    assert notes == {"came": "so far"}
    with pytest.raises(TrainingError, match="process 2 of 2 was killed by signal 9 without a word\n.*memory"):
        distributed.launch(fail, 2, arguments={"kind": "killed"})
    assert "Traceback" not in Path("errors").read_text()


# ------------------------------------------------ one process


@pytest.mark.parametrize(("n_rows", "batch_size", "n_processes"), [(305, 76, 2), (10, 4, 3), (7, 7, 4), (1, 5, 2)])
def test_parts_hold_each_row_once_and_weigh_as_much_as_they_have_rows(n_rows, batch_size, n_processes):
    values = torch.randn(n_rows, dtype=torch.float64)
    batches = [list(range(start, min(start + batch_size, n_rows))) for start in range(0, n_rows, batch_size)]
    parts = [shared_training._Part(lambda index: index, rank, n_processes) for rank in range(n_processes)]
    weights = [
        list(shared_training.part_weights(n_rows, batch_size, rank=rank, n_processes=n_processes))
        for rank in range(n_processes)
    ]
    seen = Counter()
    for number, batch in enumerate(batches):
        rows = [part(batch) for part in parts]
        seen.update(row for mine, weight in zip(rows, weights, strict=True) if weight[number] for row in mine)
        mean = sum(w[number] * values[mine].mean() for w, mine in zip(weights, rows, strict=True)) / n_processes
        torch.testing.assert_close(mean, values[batch].mean())
    assert seen == Counter(range(n_rows))


def test_buckets_hold_each_parameter_once_and_one_type_each():
    parameters = [torch.nn.Parameter(torch.zeros(n, dtype=kind)) for n in (3, 5) for kind in (torch.float, torch.half)]
    buckets = list(shared_training._buckets(parameters))
    assert [id(p) for bucket in buckets for p in bucket] == [id(p) for p in parameters]
    assert all(len({p.dtype for p in bucket}) == 1 for bucket in buckets)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nproc": 65}, "nproc .* is 65, but a batch has 64 rows, and each process needs one at least"),
        ({"nproc": 0}, "nproc must be >= 1, found 0"),
        ({"nproc": 2, "metrics": ["Recall", "ItemCoverage"]}, "nproc is 2, but ItemCoverage needs more than the rank"),
    ],
)
def test_what_several_processes_cannot_do_is_refused_with_the_reason(planted, settings, message):
    with pytest.raises(SettingError, match=message):
        run("SASRec", "planted", settings={**TINY, **settings})


def test_a_model_with_a_trainer_of_its_own_is_refused(planted, monkeypatch):
    class OwnTrainer(Trainer):
        pass

    monkeypatch.setattr("recbole_mm.quick_start._trainer_class", lambda config: OwnTrainer)
    with pytest.raises(SettingError, match="SASRec trains in a trainer of its own, OwnTrainer"):
        run("SASRec", "planted", settings={**TINY, "nproc": 2})


def test_a_model_without_parameters_is_refused():
    with pytest.raises(SettingError, match="Module has no parameters to train; leave --nproc out"):
        SharedTraining(torch.nn.Module(), None, None, torch.device("cpu"))


def test_each_process_needs_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(distributed, "_VISIBLE", None)
    assert distributed.gpu_ids(None, n_local=2) == "0,1"
    assert distributed.gpu_ids("2, 0", n_local=2) == "2,0"
    with pytest.raises(SettingError, match="2 processes need a GPU each, found 1: 0\n  use --nproc=1, name more GPUs"):
        distributed.gpu_ids("0", n_local=2)
    monkeypatch.setattr(distributed, "_VISIBLE", "5,7")
    assert distributed.gpu_ids(None, n_local=2) == "5,7"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(distributed, "_VISIBLE", None)
    assert distributed.gpu_ids(None, n_local=2) == ""  # the CPU


def test_a_group_of_torchrun_s_is_found_in_the_environment(planted, monkeypatch):
    assert distributed.place() is None
    variables = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**variables, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert distributed.place() == distributed.Place(rank=2, n_processes=4, local_rank=0, n_local=2)
    assert Config("SASRec", "planted", settings=_of_sasrec())["nproc"] == 4
    with pytest.raises(SettingError, match=r"nproc \(from settings\) is 3, but 4 processes were started; leave it out"):
        Config("SASRec", "planted", settings={**_of_sasrec(), "nproc": 3})
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert distributed.place() is None


def test_torchrun_shares_one_run_and_no_product(planted, monkeypatch, capsys):
    variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(["--model=SASRec,NARM", "--dataset=planted", "--dry-run"]) == 2
    assert "SettingError: torchrun shares one run; start several without it" in capsys.readouterr().err


def _of_sasrec() -> dict:
    return {key: value for key, value in TINY.items() if key != "use_gpu"} | {"use_gpu": False}


def test_an_error_of_pytorch_that_others_are_gone_becomes_one_of_ours(monkeypatch):
    @distributed.one_message
    def call(text):
        raise RuntimeError(text)

    lost = "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1"
    with pytest.raises(RuntimeError, match="closed by peer"):
        call(lost)
    monkeypatch.setattr(distributed, "n_processes", lambda: 2)
    with pytest.raises(distributed.PeerLostError, match="process 1 of 2 lost the others"):
        call(lost)
    with pytest.raises(RuntimeError, match="shapes"):
        call("shapes cannot be multiplied")


def test_a_checkpoint_that_a_process_does_not_see_is_named(tmp_path):
    with pytest.raises(TrainingError, match="does not see .*gone.pth(.|\n)*share"):
        distributed.require_file(tmp_path / "gone.pth")


def test_recbole_s_folders_may_be_made_by_several_at_once(tmp_path, monkeypatch):
    from recbole.utils import ensure_dir

    monkeypatch.setattr(os.path, "exists", lambda path: False)  # another process makes it after the look
    for _ in range(2):
        ensure_dir(str(tmp_path / "log"))
    assert (tmp_path / "log").is_dir()
