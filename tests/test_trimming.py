"""Trimmed histories: what a model says of each row is what it says at full length."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from recbole.data.interaction import Interaction
from recbole.model import sequential_recommender
from torch import Tensor, nn

from recbole_mm import quick_start, trimming
from recbole_mm.config import Config
from recbole_mm.data.dataset import MultimodalDataset
from recbole_mm.model import find_model
from recbole_mm.trimming import (
    EXACT,
    FEWEST_ROWS,
    SHORTEST,
    SUMMED_AT_ONCE,
    TRIMMABLE,
    groups_of,
    with_trimmed_histories,
)
from tests.conftest import TINY, write_planted

LENGTH = 40
SETTINGS = {"MAX_ITEM_LIST_LENGTH": LENGTH, "use_gpu": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_planted(tmp_path_factory.mktemp("data") / "planted")


def stock_and_trimmed(name: str, folder: Path, trim: str, length: int = LENGTH) -> tuple[nn.Module, nn.Module]:
    """The model of RecBole's and the one with trimmed histories, with the same random parameters."""
    config = Config(name, str(folder), settings={**SETTINGS, "MAX_ITEM_LIST_LENGTH": length})
    data = MultimodalDataset(config).build()[0]
    stock = find_model(name)(config, data)
    trimmed = with_trimmed_histories(find_model(name), trim)(config, data)
    for parameter in stock.parameters():
        nn.init.normal_(parameter, std=0.3)
    trimmed.load_state_dict(stock.state_dict())
    return stock, trimmed


def histories(n_rows: int, longest: int = LENGTH, n_items: int = 30) -> tuple[Tensor, Tensor]:
    """Many short ones and a few long ones: [B, L] and their lengths [B]."""
    lengths = (torch.rand(n_rows) ** 3 * longest).long().clamp(max=longest - 1) + 1
    item_seq = torch.randint(1, n_items + 1, (n_rows, LENGTH))
    return item_seq * (torch.arange(LENGTH) < lengths.unsqueeze(1)), lengths


def batch_of(model: nn.Module, n_rows: int) -> Interaction:
    item_seq, lengths = histories(n_rows)
    target = torch.randint(1, 31, (n_rows,))
    return Interaction({model.ITEM_SEQ: item_seq, model.ITEM_SEQ_LEN: lengths, model.POS_ITEM_ID: target})


def without_dropout(model: nn.Module) -> nn.Module:
    """In float64; graphs of sessions, which are float32, too."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if graphs := getattr(model, "_get_slice", None):
        model._get_slice = lambda item_seq: [t.double() if t.is_floating_point() else t for t in graphs(item_seq)]
    return model.double().train()


@pytest.mark.parametrize("name", sorted(EXACT))
def test_scores_in_evaluation_are_the_same_to_the_last_bit(name, folder):
    stock, trimmed = stock_and_trimmed(name, folder, "evaluation")
    for n_rows, longest in ((64, LENGTH), (20, 5), (1, 7)):
        inputs = histories(n_rows, longest)[: len(inspect.signature(stock.forward).parameters)]
        expected, found = stock.eval()(*inputs), trimmed.eval()(*inputs)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["SASRec", "GCSAN"])
def test_scores_of_long_histories_are_the_same_to_the_last_bit(name, folder):
    stock, trimmed = stock_and_trimmed(name, folder, "evaluation", length=200)
    lengths = torch.cat([torch.arange(1, 33), torch.arange(80, 190, 4)])
    inputs = torch.randint(1, 31, (len(lengths), 200)) * (torch.arange(200) < lengths.unsqueeze(1)), lengths
    with torch.no_grad():
        torch.testing.assert_close(trimmed.eval()(*inputs), stock.eval()(*inputs), rtol=0, atol=0)


@pytest.mark.parametrize("name", sorted(TRIMMABLE))
def test_loss_gradient_and_scores_are_those_at_full_length(name, folder):
    stock, trimmed = map(without_dropout, stock_and_trimmed(name, folder, "all"))
    batch = batch_of(stock, 64)
    expected, loss = stock.calculate_loss(batch), trimmed.calculate_loss(batch)
    torch.testing.assert_close(loss, expected)
    gradients = torch.autograd.grad(expected, list(stock.parameters()), allow_unused=True)
    found = torch.autograd.grad(loss, list(trimmed.parameters()), allow_unused=True)
    for gradient, other in zip(gradients, found, strict=True):
        torch.testing.assert_close(other, gradient, rtol=1e-9, atol=1e-12)
    scores = trimmed.eval().full_sort_predict(batch)
    torch.testing.assert_close(scores, stock.eval().full_sort_predict(batch), rtol=1e-9, atol=1e-12)


def test_in_evaluation_alone_training_draws_what_it_drew_before(folder):
    stock, trimmed = stock_and_trimmed("SASRec", folder, "evaluation")
    batch, losses = batch_of(stock, 50), []
    for model in (stock, trimmed):
        torch.manual_seed(3)
        losses.append(model.train().calculate_loss(batch))
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=0)


def test_what_is_computed_shrinks_with_the_histories(folder, monkeypatch):
    _, trimmed = stock_and_trimmed("SASRec", folder, "all")
    positions = []
    trimmed.LayerNorm.register_forward_hook(lambda module, inputs, output: positions.append(output[..., 0].numel()))
    item_seq, lengths = histories(400)
    trimmed.train()(item_seq, lengths)
    assert len(positions) > 3 and sum(positions) < 1.2 * int(lengths.sum())


@pytest.mark.parametrize("n_rows", [1, FEWEST_ROWS, 40, 333])
@pytest.mark.parametrize("exact", [True, False])
def test_every_row_is_in_one_group_that_holds_all_of_it(n_rows, exact):
    item_seq, lengths = histories(n_rows)
    groups, shortest = groups_of(item_seq, exact=exact), SHORTEST if exact else 1
    assert sorted(torch.cat([rows for rows, _ in groups]).tolist()) == list(range(n_rows))
    for rows, longest in groups:
        assert max(shortest, int(lengths[rows].max())) <= longest <= LENGTH
        assert len(rows) >= min(n_rows, FEWEST_ROWS)


def test_a_maximum_below_the_shortest_cut_is_kept():
    groups = groups_of(torch.ones(40, 5, dtype=torch.long), exact=True)
    assert [longest for _, longest in groups] == [5]


def test_long_histories_are_not_cut_where_sums_would_be_other_ones():
    lengths = torch.tensor([SUMMED_AT_ONCE // 2, SUMMED_AT_ONCE // 2 + 1]).repeat_interleave(FEWEST_ROWS)
    item_seq = (torch.arange(SUMMED_AT_ONCE + 8) < lengths.unsqueeze(1)).long()
    assert [longest for _, longest in groups_of(item_seq, exact=True)] == [SUMMED_AT_ONCE // 2, SUMMED_AT_ONCE + 8]
    assert groups_of(item_seq, exact=False)[-1][1] == SUMMED_AT_ONCE // 2 + 1
    assert groups_of(item_seq[:, :SUMMED_AT_ONCE], exact=True)[-1][1] == SUMMED_AT_ONCE // 2 + 1


@pytest.mark.parametrize(
    ("name", "trim"), [("SASRec", "none"), ("NARM", "evaluation"), ("STAMP", "all"), ("MSM4SR", "all")]
)
def test_other_models_stay_what_they_are(name, trim):
    assert with_trimmed_histories(find_model(name), trim) is find_model(name)


def test_all_models_that_are_named_are_recbole_s():
    assert all(hasattr(sequential_recommender, name) for name in trimming.TRIMMABLE)


def test_a_run_comes_to_the_same_with_and_without(folder):
    given = TINY | {"MAX_ITEM_LIST_LENGTH": LENGTH, "epochs": 1}
    records = [
        quick_start.run("SASRec", str(folder), settings=given | {"trim_histories": trim}, runs_file=None)
        for trim in ("none", "evaluation")
    ]
    assert records[0].test == records[1].test and records[0].settings_hash == records[1].settings_hash
