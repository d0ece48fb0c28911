"""Passes over whole histories against one row per prefix: the same targets, the same loss, the same gradient."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from recbole_mm.checkpoint import plain
from recbole_mm.config import identity_of
from recbole_mm.data.files import write_table
from recbole_mm.data.passes import (
    PART_WEIGHT,
    PASS_POSITION,
    PASS_ROW,
    Spans,
    in_passes,
    window_passes,
)
from recbole_mm.errors import SettingError
from recbole_mm.model.positions import read_at_all_positions
from recbole_mm.quick_start import run
from recbole_mm.records import settings_hash
from recbole_mm.trainer import Trainer

from conftest import TINY, write_planted  # isort: skip

STILL = {"hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0}  # nothing is dropped out
OURS = {**STILL, "adaptor_dropout": 0.0, "train_stage": "finetune", "n_experts": 2}
MODELS = {
    "SASRec": STILL,
    "GRU4Rec": {"dropout_prob": 0.0, "embedding_size": 12},
    "MSM4SR": OURS,
    "MSM4SR with projections, softmax in chunks": {**OURS, "proj": True, "softmax": "chunked", "softmax_chunk": 7},
    "UniSRec": {**OURS, "gate_noise": False, "finetune_mode": "transductive"},
    "UniSRec inductive": {**OURS, "gate_noise": False, "finetune_mode": "inductive"},
}


def write_histories(folder: Path, lengths: list[int]) -> Path:
    """The planted folder's items and features, with histories of other lengths."""
    write_planted(folder)
    random = np.random.default_rng(5)
    rows = [(f"u{user}", random.integers(30) + 100, step) for user, n in enumerate(lengths) for step in range(n)]
    users, items, times = zip(*rows, strict=True)
    columns = {"user_id:token": users, "item_id:token": [f"i{item}" for item in items]}
    write_table(folder / f"{folder.name}.inter", {**columns, "timestamp:float": [float(time) for time in times]})
    return folder


@pytest.fixture
def uneven(tmp_path: Path) -> Path:
    """Histories from two items to four times ``MAX_ITEM_LIST_LENGTH``, which is 5."""
    return write_histories(tmp_path / "dataset" / "uneven", [4, 5, 6, 7, 9, 12, 20, 4, 8])


def made(built, name, folder, positions="last", **settings):
    """The training loader of rows, that of passes, and the model in float64."""
    model = name.split()[0]
    settings = {**MODELS[name], "MAX_ITEM_LIST_LENGTH": 5, "train_batch_size": 12, **settings}
    config, _, train, _, _, net = built(model, folder, train_positions=positions, **settings)
    read_at_all_positions(net)
    passes = None if positions == "last" else in_passes(train, positions, config["MAX_ITEM_LIST_LENGTH"])
    return train, passes, net.double()


def rows_of(train):
    """Every training row, (user, history, target), in order."""
    feat = train._dataset.inter_feat
    columns = (feat["user_id"], feat["item_id_list"], feat["item_length"], feat["item_id"])
    return [(int(u), tuple(s[:n].tolist()), int(t)) for u, s, n, t in zip(*columns, strict=True)]


def read_off(batch):
    """What a batch of passes asks for: (user, items that a target's position sees, target)."""
    sequences, users = batch["item_id_list"], batch["user_id"]
    asked = zip(batch[PASS_ROW].tolist(), batch[PASS_POSITION].tolist(), batch["item_id"].tolist(), strict=True)
    return [(int(users[row]), tuple(sequences[row, : at + 1].tolist()), target) for row, at, target in asked]


def loss_and_gradient(model, batches):
    """Sum over all targets, as a mean loss times the number of targets."""
    model.zero_grad()
    total = sum(model.train().calculate_loss(batch) * len(batch["item_id"]) for batch in batches)
    total.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return float(total.detach()), gradients


# ------------------------------------------------ exact


@pytest.mark.parametrize("name", MODELS)
def test_an_epoch_of_passes_has_the_loss_and_the_gradient_of_its_prefix_rows(name, built, uneven):
    train, passes, model = made(built, name, uneven, "all")
    loss, gradients = loss_and_gradient(model, list(passes))
    expected, expected_gradients = loss_and_gradient(model, list(train))
    assert loss == pytest.approx(expected, rel=1e-12)
    assert gradients.keys() == expected_gradients.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[key], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("storage", ["index", "copies"])
def test_passes_see_exactly_the_histories_of_the_rows(storage, built, uneven):
    train, passes, _ = made(built, "SASRec", uneven, "all", history_storage=storage)
    assert sorted(row for batch in passes for row in read_off(batch)) == sorted(rows_of(train))
    assert len(passes.passes.carrier) < len(passes.passes.row)


def test_only_histories_that_were_cut_have_a_pass_of_their_own(built, uneven):
    # Training knows 2, 3, 4, 5, 7, 10, 18, 2 and 6 items of the nine users; a prefix has at most 5.
    _, passes, _ = made(built, "SASRec", uneven, "all")
    assert len(passes.passes.carrier) == 9 + (7 - 6) + (10 - 6) + (18 - 6)
    assert len(passes.passes.row) == 1 + 2 + 3 + 4 + 6 + 9 + 17 + 1 + 5
    assert passes.n_shortened == 0


@pytest.mark.parametrize("protocol", ["time", "new-sessions", "cold-items"])
def test_passes_have_the_training_targets_of_each_protocol(protocol, built, tmp_path):
    folder = write_planted(tmp_path / "dataset" / "planted", length=9)
    settings = {"protocol": protocol, **({"cold_share": 0.2} if protocol == "cold-items" else {})}
    for positions in ("all", "windows"):
        train, passes, _ = made(built, "SASRec", folder, positions, **settings)
        asked = [row for batch in passes for row in read_off(batch)]
        assert sorted((user, target) for user, _, target in asked) == sorted((u, t) for u, _, t in rows_of(train))
        assert positions == "windows" or sorted(asked) == sorted(rows_of(train))


def test_rows_of_a_random_split_are_read_off_the_rows_that_training_has(built, uneven):
    split = {"eval_args": {"split": {"RS": [0.6, 0.2, 0.2]}, "order": "TO", "group_by": "user"}}
    train, passes, _ = made(built, "SASRec", uneven, "all", **split)
    assert sorted(row for batch in passes for row in read_off(batch)) == sorted(rows_of(train))


@pytest.mark.parametrize("storage", ["index", "copies"])
def test_prefixes_of_a_session_given_as_rows_share_a_pass(storage, built, tmp_path):
    folder = write_planted(tmp_path / "dataset" / "parted")
    (folder / "parted.inter").unlink()
    rows = [("s", "i100 i101 i102", "i103"), ("s", "i100", "i101"), ("s", "i100 i101", "i102"), ("t", "i100", "i104")]
    rows += [("s", "i105", "i100")]  # of the same session, but no prefix of the others
    for part in ("train", "valid", "test"):
        sessions, prefixes, targets = zip(*[(part + s, prefix, t) for s, prefix, t in rows], strict=True)
        columns = {"session_id:token": sessions, "item_id_list:token_seq": prefixes, "item_id:token": targets}
        write_table(folder / f"parted.{part}.inter", columns)
    for positions in ("all", "windows"):
        train, passes, _ = made(built, "SASRec", folder, positions, history_storage=storage)
        feat = train._dataset.inter_feat
        columns = zip(feat["item_id_list"], feat["item_id"].tolist(), strict=True)
        expected = sorted((tuple(items[items > 0].tolist()), target) for items, target in columns)
        batch = passes.batch(torch.arange(len(passes.passes.carrier)))
        places = zip(batch[PASS_ROW], batch[PASS_POSITION], batch["item_id"].tolist(), strict=True)
        asked = [(tuple(batch["item_id_list"][row, : at + 1].tolist()), target) for row, at, target in places]
        assert sorted(asked) == expected
        assert len(passes.passes.carrier) == 3


@pytest.mark.parametrize("storage", ["index", "copies"])
def test_windows_of_sessions_that_were_cut_beforehand_have_the_length_that_is_left(storage, built, tmp_path):
    folder = write_planted(tmp_path / "dataset" / "parted")
    (folder / "parted.inter").unlink()
    tokens = [f"i{100 + number}" for number in range(12)]
    for part in ("train", "valid", "test"):
        prefixes = [" ".join(tokens[max(0, end - 4) : end]) for end in range(1, 12)]
        columns = {"session_id:token": [part] * 11, "item_id_list:token_seq": prefixes, "item_id:token": tokens[1:]}
        write_table(folder / f"parted.{part}.inter", columns)
    train, passes, _ = made(built, "SASRec", folder, "windows", history_storage=storage, MAX_ITEM_LIST_LENGTH=50)
    assert len(passes.passes.carrier) == 4  # over the items 7-10, 5-8, 3-6 and, of rows that are not cut, 0-3
    batch = passes.batch(torch.arange(4))
    feat = train._dataset.inter_feat
    histories = {int(t): s[s > 0].tolist() for t, s in zip(feat["item_id"], feat["item_id_list"], strict=True)}
    for row, at, target in zip(batch[PASS_ROW], batch[PASS_POSITION], batch["item_id"].tolist(), strict=True):
        history, seen = histories.pop(target), batch["item_id_list"][row, : at + 1].tolist()
        assert seen == history[-len(seen) :] and len(seen) >= min(2, len(history))
    assert not histories


# ------------------------------------------------ windows


def literal_windows(n_items: int, max_length: int) -> list[tuple[int, int]]:
    """(start, end) of the windows over one sequence, newest first: the last item of each is followed by its target."""
    windows, newest = [], n_items - 1  # the newest target that has no window yet
    while newest > 0:
        start = max(0, newest - max_length)
        windows.append((start, newest))
        reached = max(start + -(-max_length // 2), max_length + 1)  # the oldest with half a window, and a cut history
        newest = reached - 1 if start > 0 else 0
    return windows


@pytest.mark.parametrize("max_length", [1, 2, 5, 6])
def test_windows_lie_where_a_loop_puts_them(max_length):
    lengths = [2, 3, 6, 7, 11, 12, 13, 30]
    spans = [(user, max(0, end - max_length), end) for user, n in enumerate(lengths) for end in range(1, n)]
    order = np.random.default_rng(0).permutation(len(spans))
    user, start, end = np.array(spans)[order].T
    passes = window_passes(Spans(user, start, end - start), max_length)
    carriers = sorted(zip(user[passes.carrier], start[passes.carrier], end[passes.carrier], strict=True))
    expected = [(number, *window) for number, n in enumerate(lengths) for window in literal_windows(n, max_length)]
    assert carriers == sorted(expected)
    assert sorted(passes.row.tolist()) == list(range(len(spans)))


def test_a_target_in_a_window_sees_half_of_it_or_all_there_is(built, uneven):
    train, passes, _ = made(built, "SASRec", uneven, "windows")
    histories = {(user, target): [] for user, _, target in rows_of(train)}
    for user, history, target in rows_of(train):
        histories[user, target].append(history)
    asked = [row for batch in passes for row in read_off(batch)]
    assert len(asked) == len(rows_of(train))
    for user, seen, target in asked:
        whole = [h for h in histories[user, target] if h[len(h) - len(seen) :] == seen]
        assert whole, "not the items before this target"
        assert len(seen) >= min(3, min(map(len, whole)))


def test_windows_are_passes_over_whole_histories_where_none_was_cut(built, planted):
    _, whole, _ = made(built, "SASRec", planted, "all", MAX_ITEM_LIST_LENGTH=10)
    _, windows, _ = made(built, "SASRec", planted, "windows", MAX_ITEM_LIST_LENGTH=10)
    for a, b in zip(whole.passes, windows.passes, strict=True):
        torch.testing.assert_close(a, b)


# ------------------------------------------------ batches


def test_batches_have_about_train_batch_size_targets_and_an_epoch_as_many_steps_as_of_rows(built, uneven):
    train, passes, _ = made(built, "SASRec", uneven, "all")
    sizes = [len(batch["item_id"]) for batch in passes]
    assert len(train) - 1 <= len(sizes) <= len(train) == len(passes)
    assert all(12 - 5 < size < 12 + 5 for size in sizes[:-1])


def test_the_same_seed_gives_the_same_order_and_each_epoch_another_one(built, uneven):
    def epochs():
        _, passes, _ = made(built, "SASRec", uneven, "all")
        return [[batch["item_id"].tolist() for batch in passes] for _ in range(2)]

    first, second = epochs()
    assert first != second
    assert epochs() == [first, second]


@pytest.mark.parametrize("n_processes", [2, 3])
def test_the_parts_of_a_batch_add_up_to_it(n_processes, built, uneven):
    _, passes, model = made(built, "SASRec", uneven, "all", train_batch_size=7)
    whole, gradients = loss_and_gradient_of_means(model, list(passes), [1.0] * 100)
    losses, summed = 0.0, {}
    for rank in range(n_processes):
        _, part, _ = made(built, "SASRec", uneven, "all", train_batch_size=7)
        part.take_part(rank, n_processes)
        batches = list(part)
        loss, own = loss_and_gradient_of_means(model, batches, [float(b[PART_WEIGHT]) for b in batches])
        losses += loss / n_processes
        summed = {name: summed.get(name, 0) + gradient / n_processes for name, gradient in own.items()}
    assert losses == pytest.approx(whole, rel=1e-6)  # weights are float32
    for name, gradient in gradients.items():
        torch.testing.assert_close(summed[name], gradient, rtol=1e-5, atol=1e-7)


def loss_and_gradient_of_means(model, batches, weights):
    model.zero_grad()
    total = sum(model.train().calculate_loss(batch) * weight for batch, weight in zip(batches, weights, strict=False))
    total.backward()
    return float(total.detach()), {name: p.grad.clone() for name, p in model.named_parameters()}


# ------------------------------------------------ whole runs


def test_fine_tuning_takes_passes_and_pre_training_rows(built, planted, caplog):
    settings = {**TINY, "n_experts": 2, "pretrain_epochs": 1, "epochs": 1, "train_positions": "all"}
    with caplog.at_level(logging.INFO):
        record = run("MSM4SR", str(planted), settings=settings, runs_file=None)
    assert [stage["stage"] for stage in record.stages] == ["pretrain", "finetune"]
    assert "finetune: 300 targets in 60 passes over histories" in caplog.text
    assert "pretrain: 300 targets" not in caplog.text


def test_a_resumed_training_in_passes_ends_where_an_unbroken_one_does(planted):
    settings = {**TINY, "train_positions": "windows", "MAX_ITEM_LIST_LENGTH": 3, "epochs": 3}
    unbroken = run("SASRec", str(planted), settings=settings, runs_file=None)
    run("SASRec", str(planted), settings={**settings, "epochs": 2}, runs_file=None)
    resumed = run(resume=Trainer.last_saved, settings={"epochs": 3, "history_storage": "copies"}, runs_file=None)
    assert resumed.stages[0]["curve"] == unbroken.stages[0]["curve"]
    assert resumed.test == unbroken.test
    (warning,) = unbroken.warnings
    assert "windows is an approximation, in which 60 of 300 training targets see fewer items" in warning


@pytest.mark.slow
def test_two_processes_follow_the_losses_of_one(planted, quick_launch):
    settings = {**TINY, **STILL, "train_positions": "all", "epochs": 2}
    alone = run("SASRec", str(planted), settings=settings, runs_file=None)
    both = run("SASRec", str(planted), settings={**settings, "nproc": 2}, runs_file=None)
    curves = [[epoch["train_loss"] for epoch in record.stages[0]["curve"]] for record in (alone, both)]
    np.testing.assert_allclose(*curves, rtol=1e-4)


@pytest.mark.parametrize("model", ["SASRec", "GRU4Rec"])
def test_a_model_of_recbole_s_learns_in_passes_what_is_planted(model, planted):
    settings = {**TINY, "train_positions": "all", "epochs": 8, "learning_rate": 0.02}
    settings = {**settings, "embedding_size": 16} if model == "GRU4Rec" else settings
    if model == "GRU4Rec":
        del settings["inner_size"]
    record = run(model, str(planted), settings=settings, runs_file=None)
    assert record.valid["recall@10"] > 0.6  # 10 of 30 items are those of the group; chance is 1/3


# ------------------------------------------------ refusals and what stays


@pytest.mark.parametrize(
    ("model", "settings", "reason"),
    [
        ("NARM", {}, "NARM: it looks at the last item of each history"),
        ("SRGNN", {}, "SRGNN: it looks at the last item"),
        ("BERT4Rec", {}, "BERT4Rec: it looks at what is behind a position too"),
        ("FPMC", {}, "FPMC: it is not known to compute a position from what is before it alone"),
        ("MMSBR", {}, "MMSBR: it looks at the last item"),
        ("SASRec", {"loss_type": "BPR"}, "SASRec: loss_type is BPR, and passes go with CE"),
        ("MSM4SR", {"train_stage": "pretrain"}, "MSM4SR: the losses of its pre-training compare whole histories"),
    ],
)
def test_passes_are_refused_with_the_reason(model, settings, reason, built, planted):
    with pytest.raises(SettingError, match=f"train_positions all .from settings. does not go with {reason}"):
        built(model, planted, train_positions="all", **settings)


def test_another_word_for_positions_is_refused(built, planted):
    with pytest.raises(SettingError, match="train_positions must be one of last, all, windows, found 'every'"):
        built("SASRec", planted, train_positions="every")


def test_a_run_with_rows_keeps_the_identity_it_had(built, planted):
    config = built("SASRec", planted)[0]
    before = {key: value for key, value in config.final_config_dict.items() if key != "train_positions"}
    assert identity_of(config) == settings_hash("SASRec", plain(before))
    assert identity_of(built("SASRec", planted, train_positions="all")[0]) != identity_of(config)


def test_a_model_that_takes_passes_scores_as_before(built, uneven):
    _, _, _, valid, _, model = built("SASRec", uneven, MAX_ITEM_LIST_LENGTH=5, **STILL)
    batch = next(iter(valid))[0]
    with torch.no_grad():
        expected = model.eval().full_sort_predict(batch)
        read_at_all_positions(model)
        torch.testing.assert_close(model.full_sort_predict(batch), expected)
