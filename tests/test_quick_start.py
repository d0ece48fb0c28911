"""Whole runs: records, RecBole's models beside ours, the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import TINY, _known, write_planted

import run_recbole_mm
from recbole_mm import records
from recbole_mm.errors import CheckpointError, DatasetError, SettingError, TrainingError, UnsafeFileError
from recbole_mm.model import recbole_model_names
from recbole_mm.quick_start import run
from recbole_mm.settings import parse_arguments


def test_a_run_leaves_a_record(planted):
    record = run("MSM4SR", "planted", settings={**TINY, "epochs": 1})
    (loaded,) = records.load(Path("results/runs.jsonl")).records
    assert loaded == record
    assert (record.model, record.dataset, record.seed) == ("MSM4SR", "planted", 2020)
    assert set(record.features) == {"image", "text"} and len(record.features["text"]) == 64
    assert set(record.seconds) == {"data", "pretrain", "finetune", "test"}
    assert record.peak_memory["resident"] > 0 and record.versions["recbole"] == "1.2.1"
    assert record.settings["hidden_size"] == 16 and Path(record.checkpoint).is_file()
    assert set(record.test) == {f"{metric}@{k}" for metric in ("recall", "ndcg", "mrr") for k in (5, 10)}


def test_a_run_tells_metrics_checkpoints_and_times(planted, caplog):
    with caplog.at_level("INFO"):
        record = run("MSM4SR", "planted", settings={**TINY, "epochs": 1})
    for text in (
        "best valid : recall@5 : ",
        "test result: recall@5 : ",
        record.checkpoint,
        "pre-training: ",
        "fine-tuning: ",
    ):
        assert text in caplog.text


def test_records_are_appended_and_a_broken_line_is_named(planted):
    run("SASRec", "planted", settings={**TINY, "epochs": 1})
    run("SASRec", "planted", settings={**TINY, "epochs": 1, "seed": 1})
    assert [record.seed for record in records.load(Path("results/runs.jsonl")).records] == [2020, 1]
    with open("results/runs.jsonl", "a") as file:
        file.write('{"model": "SASRec"}\n')
    loaded, problems = records.load(Path("results/runs.jsonl"))
    assert len(loaded) == 2 and len(problems) == 1 and "line 3 is no record" in problems[0]


def test_the_same_seed_gives_the_same_result_and_another_seed_another(planted):
    first, second = (run("MSM4SR", "planted", settings={**TINY, "epochs": 1}, runs_file=None) for _ in range(2))
    other = run("MSM4SR", "planted", settings={**TINY, "epochs": 1, "seed": 7}, runs_file=None)
    assert first.valid == second.valid and first.test == second.test != other.test
    assert not Path("results").exists()


@pytest.mark.parametrize("model", recbole_model_names())
def test_recbole_s_models_run_on_the_same_folder(tmp_path, model):
    write_planted(tmp_path / "dataset" / "planted", n_items=120)  # some of them sample a hundred items
    record = run(model, "planted", settings=_known(model, {**TINY, "epochs": 1}))
    assert record.model == model and record.seconds["train"] > 0


@pytest.mark.parametrize("model", ["SASRec", "FDSA"])
def test_recbole_s_models_run_on_a_split_folder(splits, model):
    from recbole_mm.data.files import write_table

    write_table(
        splits / "splits.item", {"item_id:token": [f"i{n}" for n in range(30)], "class:token_seq": ["a b"] * 30}
    )
    assert run(model, "splits", settings={**TINY, "epochs": 1}).settings["benchmark_filename"] == [
        "train",
        "valid",
        "test",
    ]


def test_a_model_of_recbole_gives_what_recbole_s_own_api_gives(planted):
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.model.sequential_recommender import SASRec
    from recbole.trainer import Trainer
    from recbole.utils import init_seed

    ours = run("SASRec", "planted", settings={**TINY, "epochs": 3})
    settings = {key: value for key, value in ours.settings.items() if key in TINY or key in ("load_col", "metrics")}
    settings |= {"train_neg_sample_args": None, "data_path": "dataset", "metric_decimal_place": 6}
    config = Config("SASRec", "planted", config_dict=settings)
    init_seed(config["seed"], config["reproducibility"])
    train, valid, test = data_preparation(config, create_dataset(config))
    init_seed(config["seed"], config["reproducibility"])
    trainer = Trainer(config, SASRec(config, train._dataset))
    assert type(train._dataset).__name__ == "SequentialDataset"
    _, best_valid = trainer.fit(train, valid, verbose=False)
    assert {key: float(value) for key, value in best_valid.items()} == ours.valid
    assert {key: float(value) for key, value in trainer.evaluate(test).items()} == ours.test


def test_every_model_sees_the_same_interactions_ids_and_candidates(built, planted):
    _, plain, *plain_parts, _ = built("SASRec", planted)
    for model in ("MSM4SR", "FDSA"):
        _, dataset, *parts, _ = built(model, planted)
        assert list(dataset.field2id_token["item_id"]) == list(plain.field2id_token["item_id"])
        for part, plain_part in zip(parts, plain_parts, strict=True):
            for column in ("item_id_list", "item_length", "item_id", "user_id"):
                torch.testing.assert_close(part._dataset.inter_feat[column], plain_part._dataset.inter_feat[column])


def test_cut_offs_beyond_the_catalogue_are_dropped_with_a_notice(planted, caplog):
    with caplog.at_level("WARNING"):
        record = run("SASRec", "planted", settings={**TINY, "topk": [5, 10, 50], "epochs": 1})
    assert "topk [5, 10, 50] becomes [5, 10]: only 30 items are ranked" in caplog.text
    assert "recall@50" not in record.test
    with pytest.raises(SettingError, match="valid_metric Recall@50.*only 30 items are ranked"):
        run("SASRec", "planted", settings={**TINY, "topk": [50], "valid_metric": "Recall@50"})


def test_a_folder_with_text_only_runs_and_says_so(tmp_path, caplog):
    write_planted(tmp_path / "dataset" / "words", image=False)
    with caplog.at_level("WARNING"):
        run("MSM4SR", "words", settings={**TINY, "epochs": 1})
    assert "has no feature 'image': MSM4SR runs on text alone" in caplog.text


def tiny_arguments(**more) -> list[str]:
    return [f"--{key}={json.dumps(value)}" for key, value in {**TINY, "epochs": 1, **more}.items()]


def test_the_command_line_runs_a_model(planted, capsys):
    assert run_recbole_mm.main(["-m", "mp4sr", "-d", "planted", *tiny_arguments()]) == 0
    assert records.load(Path("results/runs.jsonl")).records[0].model == "MSM4SR"


def test_config_files_are_read_in_order(planted):
    Path("a.yaml").write_text("seed: 1\nepochs: 1\n")
    Path("b.yaml").write_text("seed: 2\n")
    files = "--config_files=a.yaml b.yaml"
    arguments = [argument for argument in tiny_arguments() if not argument.startswith("--epochs")]
    assert run_recbole_mm.main(["--model=SASRec", "--dataset=planted", files, *arguments]) == 0
    assert records.load(Path("results/runs.jsonl")).records[0].seed == 2


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--model=MSM5SR", "--dataset=planted"], 2, "SettingError: no model 'MSM5SR'; did you mean 'MSM4SR'?"),
        (["--model=MSM4SR", "--dataset=Planted"], 3, "did you mean 'planted'?"),
        (["--model=MSM4SR"], 2, "Give both, such as --model=MSM4SR --dataset=demo"),
        (
            ["--model=SASRec", "--dataset=planted", "--epoch=3"],
            2,
            "unknown setting 'epoch' (from --epoch); did you mean 'epochs'?",
        ),
        (
            ["--model=SASRec", "--dataset=planted", "--epochs=x"],
            2,
            "epochs must be int such as 300, found 'x' (from --epochs)",
        ),
        (["--model=SASRec", "--dataset=planted", "epochs=3"], 2, "cannot read the argument 'epochs=3'"),
        (["--model=SASRec", "--dataset=planted", "--epochs"], 2, "--epochs has no value"),
        (["--model=SASRec", "--dataset=planted", "--seed=1", "--seed=2"], 2, "--seed is given twice"),
        (["--resume=nowhere-last.pth"], 6, "nowhere-last.pth"),
        (["--model=MSM4SR", "--dataset=planted", "--text_feature=x", "--image_feature=y"], 3, "only ['image', 'text']"),
        (["--model=MSM4SR", "--dataset=planted", "--feature_scale=standard"], 2, "did you mean 'standardize'?"),
        (["--model=MSM4SR", "--dataset=planted", "--mixup_max=2.0"], 2, "mixup_max must be in [0, 0.5], found 2.0"),
        (["--model=MSM4SR", "--dataset=planted", "--temperature=0"], 2, "temperature must be > 0, found 0.0"),
        (["--model=MSM4SR", "--dataset=planted", "--loss_type=BPR"], 2, "loss_type is 'BPR', expected CE"),
        (["--model=MSM4SR", "--dataset=planted", "--n_heads=3"], 2, "n_heads (3) must divide width (64)"),
        (["--model=SASRec", "--dataset=planted", "--learner=adm"], 2, "learner must be one of adam, adamw"),
        (["--model=SASRec", "--dataset=planted", "--valid_metric=MRR"], 2, "must be one of the metrics"),
        (["--model=SASRec", "--dataset=planted", "--seed=-1"], 2, "seed must be at least 0"),
        (["--model=SASRec", "--dataset=planted", "--epochs=None"], 2, "epochs must be int such as 300, found None"),
        (["--model=SASRec", "--dataset=planted", "--world_size=2"], 2, "unknown setting 'world_size'"),
        (
            ["--model=SASRec", "--dataset=planted", "--eval_args={splitt: 1}"],
            2,
            "no key 'splitt' (from --eval_args); did",
        ),
        (["--model=SASRec", "--dataset=planted", "--eval_args={order: RO}"], 2, "order must be TO"),
        (
            ["--model=SASRec", "--dataset=planted", "--eval_args={split: {XX: 1}}"],
            2,
            "split must be one of LS, RS or TS",
        ),
        (
            ["--model=SASRec", "--dataset=planted", "--user_inter_num_interval=[100,inf)"],
            2,
            "RecBole cannot use the data",
        ),
        (["--model=SASRec", "--dataset=planted", "--load_col={inter: [user_id, item_id]}"], 2, "leaves out timestamp"),
        (["--model=SASRec", "--dataset=planted", "--train_stage=pretrain"], 2, "SASRec has no pre-training"),
        (["--model=DIN", "--dataset=planted"], 2, "RecBole's DIN does not run here: it predicts clicks from labels"),
        (["--model=MSM4SR", "--dataset=planted", "--pretrained_path=nowhere.pth"], 6, "no checkpoint nowhere.pth"),
        (
            ["--model=MSM4SR", "--dataset=planted", "--pretrained_path=x.pth", "--train_stage=both"],
            2,
            "goes with train_stage finetune, found both (from --train_stage)",
        ),
        (["--model=SASRec", "--dataset=dataset/planted", "--data_path=elsewhere"], 2, "data_path is given too"),
        (["--resume=x-last.pth", "--config_files=a.yaml"], 2, "leave --config_files out"),
        (["--model=SASRec", "--dataset=elsewhere/demo"], 3, "python -m dataset_prep demo --out elsewhere"),
    ],
)
def test_a_wrong_command_gets_one_clear_message(planted, capsys, arguments, code, message):
    assert run_recbole_mm.main(arguments) == code
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("kind", "code"),
    [(UnsafeFileError, 6), (CheckpointError, 6), (DatasetError, 3), (SettingError, 2), (TrainingError, 1)],
)
def test_a_special_kind_of_error_has_the_exit_code_of_its_kind(monkeypatch, capsys, kind, code):
    def stop(*_, **__):
        raise type("Special", (kind,), {})("no")

    monkeypatch.setattr("recbole_mm.quick_start.run", stop)
    assert run_recbole_mm.main(["--model=SASRec", "--dataset=x"]) == code
    assert capsys.readouterr().err == "Special: no\n"


def test_help_shows_examples_models_and_datasets(planted, capsys):
    assert run_recbole_mm.main(["--help"]) == 0
    text = capsys.readouterr().out
    for part in ("--model=MSM4SR --dataset=demo", "MSM4SR", "SRGNN", "MP4SR = MSM4SR", "datasets in dataset/: planted"):
        assert part in text


def test_the_value_may_follow_the_key():
    settings, origins = parse_arguments(["--epochs", "3", "--topk=[5, 10]"])
    assert settings == {"epochs": 3, "topk": [5, 10]} and origins["epochs"] == "--epochs"


def test_model_and_dataset_may_stand_in_a_config_file(planted):
    Path("all.yaml").write_text("model: SASRec\ndataset: planted\nepochs: 1\n")
    arguments = [argument for argument in tiny_arguments() if not argument.startswith("--epochs")]
    assert run_recbole_mm.main(["--config_files=all.yaml", *arguments]) == 0


def test_a_folder_is_found_from_inside(planted, monkeypatch):
    arguments = [*tiny_arguments(), "--model=SASRec"]
    monkeypatch.chdir(planted)
    assert run_recbole_mm.main(["--dataset=.", *arguments]) == 0
    monkeypatch.chdir(planted.parent)
    assert run_recbole_mm.main(["--dataset=planted/", "--data_path=.", *arguments]) == 0


def test_a_place_that_cannot_be_written_stops_the_run_before_training(planted, capsys):
    Path("saved").write_text("a file")
    assert run_recbole_mm.main(["--model=SASRec", "--dataset=planted", *tiny_arguments()]) == 4
    assert "the machine gave up: saved" in capsys.readouterr().err


def test_a_full_disk_is_no_traceback(planted, capsys, monkeypatch):
    import errno
    import os

    from recbole_mm.trainer import Trainer

    def full(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "saved/x.pth")

    monkeypatch.setattr(Trainer, "_save_last", full)
    assert run_recbole_mm.main(["--model=SASRec", "--dataset=planted", *tiny_arguments()]) == 4
    assert "saved/x.pth: No space left on device" in capsys.readouterr().err


def test_an_interrupted_run_says_how_to_continue(planted, capsys, monkeypatch):
    from recbole_mm.trainer import Trainer

    save = Trainer._save_last

    def save_and_stop(self, *args, **kwargs):
        save(self, *args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_save_last", save_and_stop)
        assert run_recbole_mm.main(["--model=SASRec", "--dataset=planted", *tiny_arguments(epochs=2)]) == 5
    last = capsys.readouterr().err.strip().partition("--resume=")[2]
    assert last.endswith("-last.pth") and run_recbole_mm.main([f"--resume={last}"]) == 0


def test_a_run_resumes_from_another_directory(planted, tmp_path, monkeypatch):
    from conftest import TINY as tiny

    record = run("SASRec", "planted", settings={**tiny, "epochs": 1})
    planted.parent.rename(tmp_path / "moved")
    last = record.checkpoint.replace(".pth", "-last.pth")
    again = run("sasrec", "moved/planted", settings={"epochs": 2, "data_path": "moved"}, resume=last)
    assert again.stages[-1]["epochs"] == 2


class FixedScores:
    """The next rows of one random matrix, whatever is asked."""

    def __init__(self, n_users: int, n_items: int) -> None:
        self.rows = iter(torch.rand(n_users, n_items, generator=torch.Generator().manual_seed(1)))

    def __call__(self, batch) -> torch.Tensor:
        return torch.stack([next(self.rows) for _ in range(len(batch))])


def test_equal_scores_give_equal_results_whichever_model_gives_them(built, planted):
    from recbole_mm.trainer import Trainer

    results = []
    for model in ("SASRec", "MSM4SR"):
        config, _, train, _, test, net = built(model, planted)
        net.full_sort_predict = FixedScores(len(test._dataset), net.n_items)
        results.append(dict(Trainer(config, net).evaluate(test, load_best_model=False)))
    assert results[0] == results[1]


def test_checkpoints_of_runs_in_the_same_second_are_different_files(planted):
    records = [run("Popularity", "planted", settings=_known("Popularity", {**TINY, "seed": seed})) for seed in range(3)]
    assert len({record.checkpoint for record in records}) == 3


def test_a_pickled_data_loader_is_not_loaded(planted):
    Path("saved").mkdir()
    Path("saved/planted-for-SASRec-dataloader.pth").write_bytes(b"anything")
    with pytest.raises(SettingError, match="is a pickle that RecBole would load"):
        run("SASRec", "planted", settings={**TINY, "epochs": 1})
