"""Batches that are gathered are RecBole's own: the same rows in the same order, from the same draws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import recbole.data
import torch
from conftest import TINY
from recbole.data.dataloader import (
    FullSortEvalDataLoader,
    NegSampleEvalDataLoader,
    TrainDataLoader,
)
from recbole.data.dataset import SequentialDataset
from recbole.utils import init_seed
from test_histories import assert_same
from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler

from recbole_mm.config import Config
from recbole_mm.data import loading
from recbole_mm.data.dataset import MultimodalDataset
from recbole_mm.data.histories import IndexedDataset
from recbole_mm.data.loading import BatchesOfRows, data_preparation

NEGATIVES = {
    "distribution": "uniform",
    "sample_num": 2,
    "alpha": 1.0,
    "dynamic": False,
    "candidate_num": 0,
}


def config_of(folder: Path, model: str = "SASRec", **settings) -> Config:
    tiny = {key: value for key, value in TINY.items() if key not in ("hidden_size", "inner_size")}
    return Config(model, str(folder), settings={**tiny, **settings})


def batches(config: Config, dataset, preparation, *, n_epochs: int = 2) -> tuple[list, torch.Tensor]:
    """What the loaders of a data set give in some epochs, and where the draws of training are then."""
    init_seed(3, True)
    train, *others = preparation(config, dataset)
    train.get_model(None)
    found = [("train", batch) for _ in range(n_epochs) for batch in train]
    for loader in others:
        for batch, history, rows, targets in loader:
            found.append(
                (
                    type(loader).__mro__[1 if loader.__class__.__name__.startswith("Gathering") else 0],
                    batch,
                )
            )
            found += [(None, part) for part in (rows, targets) if part is not None]
            assert history is None
    return found, train.generator.get_state()


def assert_same_batches(one: tuple, other: tuple, *, ordered: bool = True) -> None:
    (one, one_state), (other, other_state) = one, other
    assert len(one) == len(other) > 6 and torch.equal(one_state, other_state)
    for (kind, batch), (same_kind, expected) in zip(one, other, strict=True):
        assert kind == same_kind
        if isinstance(expected, torch.Tensor):
            torch.testing.assert_close(batch, expected, rtol=0, atol=0)
        elif ordered:
            assert_same(batch, expected)
        else:
            assert set(batch) == set(expected)
            for name in expected:
                torch.testing.assert_close(batch[name], expected[name], rtol=0, atol=0)


# ------------------------------------------------ batches of runs


@pytest.mark.parametrize("model", ["MSM4SR", "UniSRec", "SASRec", "GRU4Rec", "SRGNN", "FDSA", "BERT4Rec"])
def test_batches_are_those_of_copies_and_recbole_s_loaders(planted, model):
    found = []
    for kind in ("copies", "index"):
        config = config_of(planted, model, history_storage=kind)
        found.append(batches(config, MultimodalDataset(config), data_preparation))
    assert_same_batches(*found)


@pytest.mark.parametrize(
    "settings",
    [
        {"protocol": "time"},
        {"protocol": "cold-items", "cold_share": 0.2},
        {"train_batch_size": 1},
        {"shuffle": False},
        pytest.param({"worker": 1}, marks=pytest.mark.slow),
    ],
    ids=lambda settings: " ".join(map(str, settings)),
)
def test_batches_are_those_of_copies_under_other_settings(planted, settings):
    found = []
    for kind in ("copies", "index"):
        config = config_of(planted, history_storage=kind, **settings)
        found.append(batches(config, MultimodalDataset(config), data_preparation, n_epochs=1))
    assert_same_batches(*found)


def test_batches_of_a_split_folder_are_those_of_copies(splits):
    found = []
    for kind in ("copies", "index"):
        config = config_of(splits, history_storage=kind)
        found.append(batches(config, MultimodalDataset(config), data_preparation))
    assert_same_batches(*found)


@pytest.mark.parametrize("dataset", [SequentialDataset, IndexedDataset])
def test_batches_of_recbole_s_own_data_set_are_its_own(planted, dataset):
    config = config_of(planted)
    expected = batches(config, SequentialDataset(config), recbole.data.data_preparation)
    assert_same_batches(batches(config, dataset(config), data_preparation), expected, ordered=False)


def test_sampled_negatives_are_recbole_s(planted):
    found = []
    for kind in ("copies", "index"):
        config = config_of(
            planted,
            "GRU4Rec",
            history_storage=kind,
            loss_type="BPR",
            train_neg_sample_args=NEGATIVES,
        )
        found.append(batches(config, MultimodalDataset(config), data_preparation))
    assert "neg_item_id" in found[0][0][0][1]
    assert_same_batches(*found)


def test_an_evaluation_on_sampled_negatives_stays_recbole_s(planted):
    found = []
    for kind in ("copies", "index"):
        config = config_of(planted, history_storage=kind)
        config["eval_args"]["mode"] = {"valid": "full", "test": "uni2"}
        config["test_neg_sample_args"] = NEGATIVES
        init_seed(3, True)
        *_, test = data_preparation(config, MultimodalDataset(config))
        assert type(test) is NegSampleEvalDataLoader
        found.append([part for batch in test for part in batch])
    for part, copies in zip(*found, strict=True):
        assert_same(part, copies) if hasattr(part, "interaction") else torch.testing.assert_close(part, copies)


def test_loaders_gather_where_nothing_else_is_asked_for(planted):
    config = config_of(planted)
    train, valid, test = data_preparation(config, MultimodalDataset(config))
    assert isinstance(train, TrainDataLoader) and isinstance(test, FullSortEvalDataLoader)
    assert [type(loader).__name__ for loader in (train, valid, test)] == ["GatheringTrainLoader"] + [
        "GatheringEvalLoader"
    ] * 2
    assert len(train) == len(list(train)) == -(-len(train._dataset) // 64)
    assert loading.gathering(NegSampleEvalDataLoader) is NegSampleEvalDataLoader
    config = config_of(planted, history_storage="copies")
    assert type(data_preparation(config, MultimodalDataset(config))[0]) is TrainDataLoader


# ------------------------------------------------ row numbers


@pytest.mark.parametrize("known", [True, False], ids=["drawn here", "asked row by row"])
@pytest.mark.parametrize("n", [1, 8, 9, 100])
def test_rows_are_dealt_out_as_torch_does(monkeypatch, n, known):
    monkeypatch.setattr(loading, "_shuffles_by_randperm", lambda: known)
    one, other = (torch.Generator().manual_seed(5) for _ in range(2))
    ours = BatchesOfRows(RandomSampler(range(n), generator=one), 8)
    theirs = BatchSampler(RandomSampler(range(n), generator=other), 8, drop_last=False)
    assert len(ours) == len(theirs)
    for _ in range(3):
        assert [rows.tolist() for rows in ours] == list(theirs)
        assert torch.equal(one.get_state(), other.get_state())
    assert [rows.tolist() for rows in BatchesOfRows(SequentialSampler(range(n)), 8)] == list(
        BatchSampler(SequentialSampler(range(n)), 8, drop_last=False)
    )


def test_torch_shuffles_as_it_is_expected_to():
    assert loading._shuffles_by_randperm()


def test_a_sampler_of_another_kind_is_asked_row_by_row():
    one, other = (torch.Generator().manual_seed(5) for _ in range(2))
    found, expected = (RandomSampler(range(9), replacement=True, generator=generator) for generator in (one, other))
    assert np.concatenate(list(BatchesOfRows(found, 4))).tolist() == list(expected)


def test_a_sampler_with_more_rows_than_it_says_is_refused():
    class Wrong(SequentialSampler):
        def __len__(self) -> int:
            return 4

    with pytest.raises(RuntimeError, match="Wrong gives more rows than its length 4"):
        list(BatchesOfRows(Wrong(range(5)), 2))
