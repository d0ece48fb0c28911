"""How long an epoch of RecBole's SASRec or GRU4Rec takes: as RecBole ships it, and through our runner.

    python -m benchmarks.sasrec                                 made-up histories: 140,000 targets, 20,000 items
    python -m benchmarks.sasrec --dataset ml-100k               the data set that comes with RecBole
    python -m benchmarks.sasrec --quality                       validation NDCG@10 as well, several seeds

RecBole's own data set, loader, model and trainer run in one process, with autograd's anomaly mode on, which importing
RecBole switches on, and off; our runner runs in one process for each ``train_positions``. They take turns with some
steps each. Seconds are those of the processors, or of the wall on a GPU, per target of the steps that were taken, times
the targets of an epoch: RecBole's epoch is extrapolated from few steps, because all of them would take very long.
Before that, with dropout off and in float64, loss and gradient of a batch of passes are compared with those of
RecBole's model on the prefix rows.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import statistics
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import recbole
import torch

from benchmarks.calibration import calibrate
from benchmarks.clocks import Clock, Peak
from benchmarks.results import write_json
from recbole_mm import quick_start
from recbole_mm.allocation import keep_freed_memory
from recbole_mm.data.files import write_table
from recbole_mm.data.passes import TRAIN_POSITIONS

SHIPPED, NO_ANOMALY = "RecBole as shipped", "RecBole, anomaly mode off"
STILL = {
    "SASRec": {"hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0},
    "GRU4Rec": {"dropout_prob": 0.0},
}
SETTINGS = {
    "train_neg_sample_args": None,
    "metrics": ["Recall", "NDCG"],
    "topk": [10],
    "valid_metric": "NDCG@10",
    "show_progress": False,
}


# ---------------------------------------------------------------- data


def write_made_up(folder: Path, *, n_rows: int, mean_length: float, n_items: int, seed: int = 0) -> Path:
    """Histories of 3 and a geometric number of items for training, and two more for validation and test.

    Half of the items follow from the one before, which has three successors; the others are drawn by a Zipf law.
    """
    random = np.random.default_rng(seed)
    popularity = 1 / np.arange(1, n_items) ** 0.8
    popularity /= popularity.sum()
    successors = random.choice(n_items - 1, (n_items - 1, 3), p=popularity)
    n_users = round(n_rows / (mean_length - 1))
    lengths = 2 + 3 + random.geometric(1 / (mean_length - 2), n_users) - 1
    items = random.choice(n_items - 1, lengths.sum(), p=popularity)
    follows, which = random.random(len(items)) < 0.5, random.integers(0, 3, len(items))
    first = np.append(0, lengths.cumsum()[:-1])
    follows[first] = False
    for place in np.flatnonzero(follows):
        items[place] = successors[items[place - 1], which[place]]
    users = np.repeat(np.arange(n_users), lengths)
    columns = {"user_id:token": users, "item_id:token": items, "timestamp:float": np.arange(len(items)) - first[users]}
    write_table(folder / f"{folder.name}.inter", {name: values.tolist() for name, values in columns.items()})
    return folder


# ---------------------------------------------------------------- one training, some steps at a time


class Some:
    """So many batches of a loader, where the last ones ended; counts their targets."""

    def __init__(self, loader: Any, item_field: str) -> None:
        self.loader, self.item_field = loader, item_field
        self.n_steps = self.n_targets = 0
        self._batches: Iterator = iter(())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return self.n_steps

    def __iter__(self) -> Iterator:
        self.n_targets = 0
        for _ in range(self.n_steps):
            batch = next(self._batches, None)
            if batch is None:
                self._batches = iter(self.loader)
                batch = next(self._batches)
            self.n_targets += len(batch[self.item_field])
            yield batch


def stock(model: str, folder: Path, settings: dict):
    """RecBole's own trainer and training loader, by RecBole's own functions."""
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.data.dataset import SequentialDataset
    from recbole.utils import get_model, get_trainer, init_seed

    sys.argv = sys.argv[:1]  # which RecBole would take for settings
    files = {"data_path": str(folder.parent), "load_col": {"inter": ["user_id", "item_id", "timestamp"]}}
    given = {**SETTINGS, **settings, **files, "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO"}}
    config = Config(model=model, dataset=folder.name, config_dict=given)
    config["data_path"] = str(folder)
    init_seed(config["seed"], config["reproducibility"])
    dataset = create_dataset(config)
    if type(dataset) is not SequentialDataset:
        raise TypeError(f"RecBole's own data set was expected, found {type(dataset).__name__}")
    train_data, _, _ = data_preparation(config, dataset)
    net = get_model(model)(config, train_data._dataset).to(config["device"])
    return get_trainer(config["MODEL_TYPE"], model)(config, net), train_data


def ours(model: str, folder: Path, settings: dict, positions: str):
    """Our runner's trainer and training loader; rows, "last", with histories trimmed in training too."""
    given = {**SETTINGS, **settings, "train_positions": positions, "trim_histories": "all"}
    config = quick_start.new_config(model, str(folder), [], given, {})
    if config["keep_freed_memory"]:  # as the runner does
        keep_freed_memory()
    ready = quick_start._prepare(config, logging.getLogger("benchmarks"))
    rows = ready.train_data
    return ready.trainer, rows if positions == "last" else ready.trainer._in_passes(rows)


def serve(which: str, model: str, folder: Path, settings: dict, threads: int, pipe) -> None:
    """A process of its own: answers (steps, anomaly mode) with seconds, targets and memory, until it is ended."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore", FutureWarning)  # of RecBole's own code
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as scratch, suppress(EOFError):
        settings = {**settings, "checkpoint_dir": scratch}
        trainer, loader = stock(model, folder, settings) if which == "RecBole" else ours(model, folder, settings, which)
        some = Some(loader, trainer.config["ITEM_ID_FIELD"])
        peak = Peak("cuda" if settings["use_gpu"] else "cpu")
        clock = Clock("cuda", "wall") if settings["use_gpu"] else Clock("cpu", "processor")
        pipe.send({"targets": len(loader._dataset), "steps": len(loader)})
        while True:
            some.n_steps, anomaly_mode = pipe.recv()
            with torch.autograd.set_detect_anomaly(anomaly_mode, check_nan=True):
                seconds = clock.seconds(lambda: trainer._train_epoch(some, 0))
            pipe.send({"seconds": seconds, "targets": some.n_targets, **peak.mib()})


class Child:
    """`serve` in a process of its own."""

    def __init__(self, which: str, *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(which, *arguments, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.size = self._answer()

    def _answer(self) -> dict[str, Any]:
        try:
            return self.pipe.recv()
        except EOFError:
            raise SystemExit(
                "a process of the benchmark ended early: its error stands above, or the system ended it for lack of "
                "memory; RecBole's own needs 5 GiB at batch 2048"
            ) from None

    def steps(self, n: int, *, anomaly_mode: bool = False) -> dict[str, Any]:
        self.pipe.send((n, anomaly_mode))
        return self._answer()

    def end(self) -> None:
        self.pipe.close()
        self.process.join(60)
        self.process.kill()


# ---------------------------------------------------------------- what is compared


def check_equal(model: str, folder: Path, settings: dict) -> float:
    """The relative difference of the loss of one batch of passes from that of RecBole's model on its prefix rows.

    Raises:
        SystemExit: it, or that of a gradient to the longest one, is more than rounding: a time would mean nothing.
    """
    from recbole.model import sequential_recommender

    settings = {**settings, **STILL[model], "train_batch_size": 256}
    with tempfile.TemporaryDirectory() as scratch:
        trainer, passes = ours(model, folder, {**settings, "checkpoint_dir": scratch}, "all")
    chosen = torch.arange(min(40, len(passes.passes.carrier)))
    rows = torch.cat([passes.passes.row[b : b + n] for b, n in zip(*passes.passes[3:], strict=True)][: len(chosen)])
    theirs = getattr(sequential_recommender, model)(trainer.config, passes._dataset).double()
    theirs.load_state_dict(trainer.model.state_dict())
    net, device = trainer.model.double(), trainer.device
    expected = theirs.to(device).calculate_loss(passes.rows.collate_fn(rows.numpy()).to(device))
    loss = net.calculate_loss(passes.batch(chosen).to(device))
    (loss, gradients), (expected, gradients_expected) = (
        (float(part.detach()), torch.autograd.grad(part, list(m.parameters())))
        for part, m in ((loss, net), (expected, theirs))
    )
    length = max(float(gradient.norm()) for gradient in gradients_expected)
    gaps = [float((a - b).norm()) / length for a, b in zip(gradients, gradients_expected, strict=True)]
    gap, difference = max(gaps), abs(loss / expected - 1)
    if max(gap, difference) > 1e-9:
        raise SystemExit(f"passes and rows differ: the loss by {difference:.1e}, a gradient by {gap:.1e}")
    return max(gap, difference)


def measure(arguments: argparse.Namespace, folder: Path, settings: dict) -> dict[str, dict[str, Any]]:
    """Seconds of an epoch and samples of each way."""
    common = (arguments.model, folder, settings, arguments.threads)
    children = {which: Child(which, *common) for which in ("RecBole", *arguments.positions)}
    ways = {SHIPPED: ("RecBole", True), NO_ANOMALY: ("RecBole", False)}
    names = {"last": "ours, last, trimmed"}
    ways |= {names.get(which, f"ours, {which}"): (which, False) for which in arguments.positions}
    samples: dict[str, list[float]] = {name: [] for name in ways}
    peak = dict.fromkeys(ways, 0.0)
    try:
        for child in children.values():
            child.steps(1)  # warm-up
        for _ in range(arguments.rounds):
            for name, (which, anomaly_mode) in ways.items():
                n_steps = arguments.recbole_steps if which == "RecBole" else arguments.steps
                told = children[which].steps(n_steps, anomaly_mode=anomaly_mode)
                samples[name].append(told["seconds"] / told["targets"] * children[which].size["targets"])
                peak[name] = told["peak_mib"]
    finally:
        for child in children.values():
            child.end()
    steps = {name: children[which].size["steps"] for name, (which, _) in ways.items()}
    return {
        name: {
            "epoch_seconds": statistics.median(samples[name]),
            "samples": samples[name],
            "steps": steps[name],
            "peak_mib": peak[name],
        }
        for name in ways
    }


def quality(arguments: argparse.Namespace, folder: Path, settings: dict) -> dict[str, dict[str, Any]]:
    """Validation NDCG@10 of the best epoch by seed, after the same number of epochs at most."""
    results: dict[str, dict[str, Any]] = {}
    for positions in arguments.positions:
        for seed in arguments.seeds:
            with tempfile.TemporaryDirectory() as scratch:
                given = {**SETTINGS, **settings, "train_positions": positions, "trim_histories": "all"}
                given |= {"seed": seed, "checkpoint_dir": scratch}
                given |= {"epochs": arguments.epochs, "stopping_step": 5}
                logging.disable(logging.WARNING)
                record = quick_start.run(arguments.model, str(folder), settings=given, runs_file=None)
            result = results.setdefault(positions, {"ndcg@10": [], "epochs": []})
            result["ndcg@10"].append(record.valid["ndcg@10"])
            result["epochs"].append(record.stages[-1]["epochs"])
            print(
                f"  {positions}, seed {seed}: NDCG@10 {record.valid['ndcg@10']:.4f}, epoch {record.best_epoch}",
                flush=True,
            )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="SASRec", choices=tuple(STILL), help="a left-to-right model of RecBole's")
    parser.add_argument("--rows", type=int, default=140_000, help="training targets of made-up histories")
    parser.add_argument("--mean-length", type=float, default=8, help="items of a training history")
    parser.add_argument("--items", type=int, default=20_000, help="item ids of made-up histories, padding included")
    parser.add_argument("--dataset", help="ml-100k, which comes with RecBole, or the path of a folder")
    parser.add_argument("--positions", nargs="+", choices=TRAIN_POSITIONS, default=list(TRAIN_POSITIONS))
    parser.add_argument("--rounds", type=int, default=3, help="turns of each way")
    parser.add_argument("--steps", type=int, default=10, help="steps of ours per turn")
    parser.add_argument("--recbole-steps", type=int, default=2, help="steps of RecBole's per turn")
    parser.add_argument("--batch", type=int, default=2048, help="targets per step")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quality", action="store_true", help="train as well, and compare validation NDCG@10")
    parser.add_argument("--seeds", type=int, nargs="+", default=[2020, 2021, 2022])
    parser.add_argument("--epochs", type=int, default=30, help="at most, of --quality")
    parser.add_argument("--json", type=Path, help="write the results into this file")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    logging.disable(logging.WARNING)
    settings = {"train_batch_size": arguments.batch, "use_gpu": arguments.device == "cuda"}
    with tempfile.TemporaryDirectory() as scratch:
        folder = _folder(arguments, Path(scratch))
        rate = calibrate()
        print(f"{arguments.model} on {folder.name}, {arguments.batch} targets per step; {rate}")
        gap = check_equal(arguments.model, folder, settings)
        print(f"passes and prefix rows agree in float64: loss and gradients differ by {gap:.1e} at most\n")
        times = measure(arguments, folder, settings)
        _print_times(times)
        scores = {}
        if arguments.quality:
            print(f"\nvalidation NDCG@10, at most {arguments.epochs} epochs")
            scores = quality(arguments, folder, settings)
            for positions, result in scores.items():
                mean = statistics.mean(result["ndcg@10"])
                print(f"{positions:8} mean {mean:.4f} of seeds {arguments.seeds}")
    if arguments.json:
        results = {"arguments": {k: v for k, v in vars(arguments).items() if k != "json"}}
        write_json(arguments.json, {**results, "epochs": times, "quality": scores}, rate)


def _folder(arguments: argparse.Namespace, scratch: Path) -> Path:
    if arguments.dataset == "ml-100k":
        return Path(recbole.__file__).parent / "dataset_example" / "ml-100k"
    if arguments.dataset:
        return Path(arguments.dataset).resolve()
    sizes = {"n_rows": arguments.rows, "mean_length": arguments.mean_length, "n_items": arguments.items}
    return write_made_up(scratch / "made-up", **sizes)


def _print_times(times: dict[str, dict[str, Any]]) -> None:
    print(f"{'':28} {'epoch':>9} {'steps':>6} {'peak':>9} {'times as fast as shipped':>25} {'anomaly mode off':>17}")
    shipped, off = (times[name]["epoch_seconds"] for name in (SHIPPED, NO_ANOMALY))
    for name, row in times.items():
        seconds = row["epoch_seconds"]
        print(
            f"{name:28} {seconds:7.1f} s {row['steps']:6} {row['peak_mib']:5.0f} MiB {shipped / seconds:25.1f} "
            f"{off / seconds:17.1f}"
        )


if __name__ == "__main__":
    main()
