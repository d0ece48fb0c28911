"""What a profile watches, tells and leaves alone."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path

import pytest
import torch
from conftest import TINY
from torch.profiler import record_function

from recbole_mm.profiling import NOT_COMPARABLE, Profiler, kind_of, labelled
from recbole_mm.quick_start import run
from run_recbole_mm import main

CPU = torch.device("cpu")


def work(steps, square: torch.Tensor) -> list[int]:
    """Three products in the forward pass of each step, one in what is called the backward pass."""
    done = []
    for step in steps:
        with record_function("forward and loss"):
            for _ in range(3):
                square @ square
        with record_function("backward"):
            square @ square
        done.append(step)
    return done


@pytest.mark.parametrize("n_batches", [1, 7, 30])
def test_all_batches_come_in_their_order_whether_they_are_watched_or_not(tmp_path, n_batches):
    profiler, square = Profiler(tmp_path, "a", CPU), torch.randn(4, 4)
    for epoch in range(3):
        batches = labelled(iter(range(n_batches)), "make the batch")
        watched = profiler.training(batches, stage="train", n_batches=n_batches, last=epoch == 2)
        assert work(watched, square) == list(range(n_batches))
    (summary,) = profiler.summaries
    assert summary.n_steps == min(5, n_batches)


def test_fewer_batches_than_a_loader_has_told_are_watched_as_far_as_they_go(tmp_path):
    profiler, square = Profiler(tmp_path, "a", CPU), torch.randn(4, 4)
    for n in (3, 7):  # of passes over histories, as many as there are may be known too late
        watched = profiler.training(range(n), stage=str(n), n_batches=30, last=True)
        assert work(watched, square) == list(range(n))
    (summary,) = profiler.summaries
    assert summary.n_steps == 2


def test_the_table_counts_what_a_step_calls(tmp_path):
    profiler = Profiler(tmp_path, "a", CPU)
    work(profiler.training(range(12), stage="train", n_batches=12, last=True), torch.randn(100, 100))
    (summary,) = profiler.summaries
    (product,) = [each for each in summary.costliest if each.name == "mm"]
    assert (product.kind, product.calls) == ("matrix product", 4)
    assert [part.name for part in summary.parts] == ["forward and loss", "backward"]
    assert sum(part.seconds for part in summary.parts) == pytest.approx(summary.seconds)
    assert product.share == pytest.approx(product.seconds / summary.seconds) and 0 < product.share <= 1
    assert len(summary.costliest) <= 10


def test_the_second_evaluation_is_watched_or_the_only_one(tmp_path):
    profiler, square = Profiler(tmp_path, "a", CPU), torch.randn(4, 4)
    for _ in range(3):
        work(profiler.evaluation(range(3), stage="pretrain", last=False), square)
    work(profiler.evaluation(range(9), stage="finetune", last=True), square)
    assert [(each.what, each.n_steps) for each in profiler.summaries] == [
        ("pretrain, evaluation", 3), ("finetune, evaluation", 5)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::addmm", "matrix product"),
        ("aten::_softmax_backward_data", "softmax"),
        ("aten::native_layer_norm_backward", "normalisation"),
        ("aten::embedding_dense_backward", "rows of a table"),
        ("aten::copy_", "copy"),
        ("aten::mul", "element by element"),
        ("Optimizer.step#Adam.step", "optimizer"),
        ("aten::view", "book-keeping"),
        ("autograd::engine::evaluate_function: MmBackward0", "book-keeping"),
    ],
)
def test_operations_are_told_by_what_they_do(name, kind):
    assert kind_of(name) == kind


@pytest.mark.parametrize(
    ("name", "stages"),
    [("SASRec", ["train"]), pytest.param("MSM4SR", ["pretrain", "finetune"], marks=pytest.mark.slow)],
)
def test_a_profiled_run_computes_the_same_and_leaves_traces_beside_its_record(planted, caplog, name, stages):
    settings = {**TINY, "epochs": 1} | ({"pretrain_epochs": 1} if len(stages) == 2 else {})
    plain = run(name, "planted", settings=settings, runs_file=None)
    with caplog.at_level(logging.INFO):
        watched = run(name, "planted", settings=settings, profile=True)
    assert (watched.test, watched.valid, watched.settings_hash) == (plain.test, plain.valid, plain.settings_hash)
    assert [stage["curve"] for stage in watched.stages] == [stage["curve"] for stage in plain.stages]
    assert watched.warnings == [*plain.warnings, NOT_COMPARABLE]
    files = sorted(path.name for path in Path("results/profiles").iterdir())
    parts = [f"{stage}-{part}" for stage in stages for part in ("training", "evaluation")]
    assert files == sorted(f"{watched.run_id}-{part}.json.gz" for part in parts)
    with gzip.open(f"results/profiles/{files[0]}") as trace:
        assert any(event.get("name") == "aten::mm" for event in json.load(trace)["traceEvents"])
    for told in (f"{stages[-1]}, training: ", "backward", "(matrix product)", "ranks", "trace: results/profiles/"):
        assert told in caplog.text
    assert NOT_COMPARABLE in caplog.text and not Path("saved/profiles").exists()


def test_several_runs_are_not_profiled_at_once(planted, capsys):
    assert main(["--model=SASRec,NARM", "--dataset=planted", "--profile"]) == 2
    assert "--profile looks into one run" in capsys.readouterr().err
