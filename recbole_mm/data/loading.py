"""Loaders of batches that are gathered at once: RecBole's own, with row numbers as tensors and not as Python lists.

The batches are RecBole's: the same rows in the same order, by the same draws from the same generator.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from itertools import islice
from logging import getLogger
from typing import Any

import numpy as np
import recbole.data
import torch
from recbole.data.dataloader import (
    AbstractDataLoader,
    FullSortEvalDataLoader,
    TrainDataLoader,
)
from recbole.data.utils import create_samplers, get_dataloader
from recbole.utils import ModelType
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler


def data_preparation(config, dataset) -> tuple[AbstractDataLoader, AbstractDataLoader, AbstractDataLoader]:
    """RecBole's ``data_preparation``, with loaders that gather batches: training, validation and test.

    For sequential models, and data sets of any class; fastest with rows as places (`recbole_mm.data.histories`). With
    ``history_storage: copies``, and where loaders are saved or were saved, all is RecBole's.
    """
    saved = config["save_dataloaders"] or config["dataloaders_save_path"]
    if config["history_storage"] == "copies" or config["MODEL_TYPE"] != ModelType.SEQUENTIAL or saved:
        return recbole.data.data_preparation(config, dataset)
    parts = dataset.build()
    classes = [gathering(get_dataloader(config, phase)) for phase in ("train", "valid", "test")]
    draws = config["train_neg_sample_args"]["distribution"] != "none" or classes[1:] != [GatheringEvalLoader] * 2
    samplers = create_samplers(config, dataset, parts) if draws else (None, None, None)
    loaders = [
        loader(config, part, sampler, shuffle=part is parts[0] and config["shuffle"])
        for loader, part, sampler in zip(classes, parts, samplers, strict=True)
    ]
    logger = getLogger()
    for what, keys in (
        ("Training", ("train_batch_size", "train_neg_sample_args")),
        ("Evaluation", ("eval_batch_size", "eval_args")),
    ):
        logger.info(f"[{what}]: {' '.join(f'{key} = [{config[key]}]' for key in keys)}")
    return tuple(loaders)


class GatheringLoader(DataLoader):
    """Base that puts tensors of row numbers in the place of lists; it stands behind a loader of RecBole's."""

    def __init__(self, dataset: list[int], **arguments: Any) -> None:
        super().__init__(dataset=RowNumbers(len(dataset)), **arguments)

    @property
    def _index_sampler(self) -> BatchesOfRows:
        return BatchesOfRows(self.sampler, self.batch_size)


class GatheringTrainLoader(TrainDataLoader, GatheringLoader):
    """Batches of training rows."""


class GatheringEvalLoader(FullSortEvalDataLoader, GatheringLoader):
    """Batches of rows that are ranked among all items."""


def gathering(loader: type[AbstractDataLoader]) -> type[AbstractDataLoader]:
    """The class that does the same and gathers; one that nothing is known of stays as it is."""
    return {
        TrainDataLoader: GatheringTrainLoader,
        FullSortEvalDataLoader: GatheringEvalLoader,
    }.get(loader, loader)


class RowNumbers:
    """The rows 0..n-1, in place of a list of them: rows that are asked for are returned as they are."""

    def __init__(self, n: int) -> None:
        self._n = n

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, row: int) -> int:
        return row

    def __getitems__(self, rows: Tensor) -> Tensor:
        return rows


class BatchesOfRows:
    """A sampler's rows in tensors of ``batch_size``, the last one with what is left.

    Draws are those of torch's own samplers, also the one that they make at their end.
    """

    def __init__(self, sampler: Any, batch_size: int) -> None:
        self.sampler, self.batch_size = sampler, batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.sampler) / self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        if _is_plain(self.sampler) and _shuffles_by_randperm():
            yield from _shuffled(len(self.sampler), self.sampler.generator).split(self.batch_size)
            _shuffled(len(self.sampler), self.sampler.generator)
            return
        rows = iter(self.sampler)
        drawn = np.fromiter(islice(rows, len(self.sampler)), dtype=np.int64, count=len(self.sampler))
        yield from torch.from_numpy(drawn).split(self.batch_size)
        if next(rows, None) is not None:
            raise RuntimeError(f"{type(self.sampler).__name__} gives more rows than its length {len(self.sampler)}")


def _is_plain(sampler: Any) -> bool:
    """Whether it gives each row once, in an order from a generator of its own."""
    if type(sampler) is not RandomSampler or sampler.replacement or sampler.generator is None:
        return False
    return sampler.num_samples == len(sampler.data_source)


def _shuffled(n: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(n, generator=generator)


@cache
def _shuffles_by_randperm() -> bool:
    """Whether torch's sampler draws as `BatchesOfRows` does; if another release does not, it is asked row by row."""
    theirs, ours = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    rows = list(RandomSampler(range(7), generator=theirs))
    same = rows == _shuffled(7, ours).tolist()
    _shuffled(7, ours)
    return same and torch.equal(theirs.get_state(), ours.get_state())
