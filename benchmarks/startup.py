"""From the files of a dataset to a model that can be trained: the start of a run, beside a literal one.

Ours is what `run_recbole_mm` does before the first step: settings, interactions, features aligned with items, loaders,
and the model with its scaled features.

The literal start ends before the model: RecBole's own dataset and loaders, which copy a history for each of its
prefixes, and features looked up item by item in a list of names, copied into padded arrays of float64, then into
float32.
"""

from __future__ import annotations

import logging
import os
import resource
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recbole.data import data_preparation
from recbole.data.dataset import SequentialDataset

from benchmarks.clocks import Clock, Peak
from benchmarks.mmsbr_models import ENCODER_WIDTH, FEATURES, prices_and_categories
from benchmarks.msm4sr import histories
from recbole_mm import quick_start
from recbole_mm.data.files import write_table
from recbole_mm.data.layout import read_feature, write_feature

REPOSITORY = Path(__file__).resolve().parents[1]
NEEDS = {"MSM4SR": ("text", "image"), "UniSRec": ("text",), "MMSBR": FEATURES, "SASRec": ()}  # model: its features
QUIET = {"show_progress": False, "state": "WARNING"}


def write_folder(folder: Path, model: str, n_items: int, *, n_users: int, n_rows: int, width: int) -> None:
    """Made-up interactions and the features that a model needs; MSM4SR has ``n_rows`` rows an item, others one."""
    rng = np.random.default_rng(0)
    tokens = np.array([f"item{number}" for number in rng.permutation(n_items)])
    users = histories(n_users, n_items, rng, mean_length=9.7)
    lengths = np.array([len(items) for items in users])
    items = np.concatenate([*users, np.arange(1, n_items)])  # the last user had each item once, so that all are known
    columns = {
        "user_id:token": np.concatenate([np.repeat(np.arange(n_users), lengths), np.full(n_items - 1, n_users)]),
        "item_id:token": tokens[items],
        "timestamp:float": np.arange(len(items)) * 1000.0,
    }
    write_table(folder / f"{folder.name}.inter", columns)
    if model == "MMSBR":
        levels, categories = prices_and_categories(n_items)
        prices = {"price_level:float": levels.numpy() * 1.0, "category:token": [f"c{n}" for n in categories.tolist()]}
        write_table(folder / f"{folder.name}.item", {"item_id:token": tokens, **prices})
    n_rows, width = {"MSM4SR": (n_rows, width), "UniSRec": (1, width)}.get(model, (1, min(width, ENCODER_WIDTH)))
    for feature in NEEDS[model]:
        rows = rng.standard_normal((n_items * n_rows, width), dtype=np.float32)
        counts = np.full(n_items, n_rows)
        write_feature(folder, feature, tokens=tokens, rows=rows, counts=counts, encoder="random", source="none")


def start_up(folder: Path, model: str, side: str, *, clock: Clock) -> dict[str, Any]:
    """Seconds, and MiB on top of the imports; in a process of its own, where all is imported."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"recbole\.")
    os.chdir(folder.parent)  # RecBole writes log/ and the like where it is
    settings, made = {**QUIET, "use_gpu": clock.device == "cuda"}, []  # kept, so that nothing is freed while it counts

    def start() -> None:
        config = quick_start.new_config(model, str(folder), [], settings, {})
        if side == "ours":
            made.append(quick_start._prepare(config, logging.getLogger()))
        else:
            made.append(literal_start(config, folder, NEEDS[model]))

    peak = Peak(clock.device)
    return {"start-up": clock.seconds(start), "memory, start-up": peak.mib()}


def import_seconds() -> float:
    """Processor seconds of a Python that imports what a run needs, and ends."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", "import recbole_mm.quick_start, torch._dynamo"], check=True, cwd=REPOSITORY)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def literal_start(config, folder: Path, features: tuple[str, ...]) -> tuple:
    """See above."""
    dataset = SequentialDataset(config)
    loaders = data_preparation(config, dataset)
    return loaders, [literal_feature(folder, name, dataset.field2id_token["item_id"]) for name in features]


def literal_feature(folder: Path, name: str, tokens: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of each item padded with zeros [N, T, F], and how many there are [N]."""
    feature = read_feature(folder, name)
    known, rows = [str(token) for token in feature.tokens], np.asarray(feature.rows)
    starts = np.cumsum(feature.counts) - feature.counts
    padded, counts = np.zeros((len(tokens), max(feature.counts), rows.shape[1])), np.zeros(len(tokens), dtype=int)
    for item, token in enumerate(tokens):
        if token in known:
            entry = known.index(token)
            counts[item] = feature.counts[entry]
            padded[item, : counts[item]] = rows[starts[entry] : starts[entry] + counts[item]]
    return torch.from_numpy(padded.astype(np.float32)), torch.from_numpy(counts)
