"""How long MSM4SR takes beside the same model computed literally, in one run on one machine.

    python -m benchmarks.msm4sr                 steps and evaluation on made-up data of the size of Amazon Pantry
    python -m benchmarks.msm4sr --startup       opening and aligning features, in a process of its own

Both models have the same parameters; their steps alternate, and each number is a median. Then, with dropout
off, their losses, gradients and scores are compared. Sequences are prefixes of histories of 5 + a geometric number of
items, 9.7 on average as in Pantry (13,101 users, 126,962 interactions), of which the newest 50 items count; items
follow a Zipf law.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import yaml
from torch import Tensor

from benchmarks import RECBOLE_FIELDS, Settings
from benchmarks.calibration import calibrate
from benchmarks.clocks import Evaluated, Trained, alternate, memory_mib, times_as_fast, total
from benchmarks.literal_msm4sr import LiteralMSM4SR
from benchmarks.results import write_json
from recbole_mm.data.files import write_table
from recbole_mm.data.layout import write_feature
from recbole_mm.model.layers import FeatureRows
from recbole_mm.model.msm4sr import MSM4SR

MAX_LENGTH = 50
MODEL_YAML = Path(__file__).parents[1] / "properties" / "model" / "MSM4SR.yaml"
RECBOLE = {**RECBOLE_FIELDS, "MAX_ITEM_LIST_LENGTH": MAX_LENGTH}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0, "adaptor_dropout": 0.0}


# ---------------------------------------------------------------- made-up data


class Vectors(NamedTuple):
    rows: Tensor
    starts: Tensor
    counts: Tensor
    fallback: Tensor


class MadeUpDataset:
    """Random rows: at most ``n_rows`` of them per item, the same number for all unless ``ragged``."""

    def __init__(self, *, n_items: int, n_rows: int, width: int, ragged: bool) -> None:
        self.n_items, self.n_rows, self.width, self.ragged = n_items, n_rows, width, ragged

    def num(self, field: str) -> int:
        return self.n_items

    def feature_names(self) -> list[str]:
        return ["text", "image"]

    def vectors(self, name: str) -> Vectors:
        generator = torch.Generator().manual_seed(len(name))
        counts = torch.full((self.n_items,), self.n_rows)
        if self.ragged:
            counts = torch.randint(1, self.n_rows + 1, (self.n_items,), generator=generator)
        counts[0] = 0
        rows = torch.randn(int(counts.sum()), self.width, generator=generator)
        return Vectors(rows, counts.cumsum(0) - counts, counts, torch.zeros(self.width))


def histories(n_users: int, n_items: int, rng: np.random.Generator, *, mean_length: float) -> list[np.ndarray]:
    """Items of each user, oldest first: 5 + a geometric number of them."""
    popularity = 1 / np.arange(1, n_items) ** 0.8
    lengths = 5 + rng.geometric(1 / (mean_length - 4), n_users) - 1
    items = 1 + rng.permutation(n_items - 1)[rng.choice(n_items - 1, lengths.sum(), p=popularity / popularity.sum())]
    return np.split(items, lengths.cumsum()[:-1])


def interaction(prefixes: list[np.ndarray], targets: list[int]) -> dict[str, Tensor]:
    """Padded like RecBole's: always to the full length."""
    item_seq = torch.zeros(len(prefixes), MAX_LENGTH, dtype=torch.long)
    for row, prefix in zip(item_seq, prefixes, strict=True):
        newest = torch.from_numpy(prefix[-MAX_LENGTH:])
        row[: len(newest)] = newest
    return {"item_id_list": item_seq, "item_length": (item_seq > 0).sum(1), "item_id": torch.tensor(targets)}


def training_batches(users: list[np.ndarray], size: int, n: int, rng: np.random.Generator) -> list[dict[str, Tensor]]:
    """All prefixes of all users but the last two, which are for validation and test."""
    samples = [(user, end) for user, items in enumerate(users) for end in range(1, len(items) - 2)]
    batches = []
    for chosen in rng.choice(len(samples), (n, size), replace=False):
        picked = [samples[i] for i in chosen]
        batches.append(interaction([users[u][:end] for u, end in picked], [users[u][end] for u, end in picked]))
    return batches


def build(stage: str, dataset: MadeUpDataset, **settings) -> MSM4SR:
    torch.manual_seed(0)
    defaults = {**yaml.safe_load(MODEL_YAML.read_text()), **RECBOLE}
    return MSM4SR(Settings({**defaults, "train_stage": stage, **settings}), dataset)


# ---------------------------------------------------------------- values


def largest_differences(model, literal, batch) -> dict[str, float]:
    """Between a model and its literal version, in which nothing is random: loss, gradient (relative to its tensor's
    largest entry) and score."""
    found = []
    for each in (model, literal):
        torch.manual_seed(1)
        model.zero_grad()
        loss = total(each.calculate_loss(batch))
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        with torch.no_grad():
            found.append((loss.item(), gradients, each.eval().full_sort_predict(batch)[:, 1:]))
        model.train()
    (loss, own, scores), (literal_loss, theirs, literal_scores) = found
    assert own.keys() == theirs.keys(), "one of the models leaves parameters without a gradient"
    largest = max(g.abs().max() for g in theirs.values())
    # A key's bias has the true gradient 0: compare with the largest gradient of all where a tensor's own is rounding.
    relative = [((own[n] - g).abs().max() / g.abs().max().clamp_min(1e-3 * largest)).item() for n, g in theirs.items()]
    return {
        "loss": abs(loss - literal_loss),
        "gradient": max(relative),
        "score": (scores - literal_scores).abs().max().item(),
    }


# ---------------------------------------------------------------- steps and evaluation


def compare(args: argparse.Namespace) -> dict[str, dict]:
    rng = np.random.default_rng(0)
    dataset = MadeUpDataset(n_items=args.items, n_rows=args.rows, width=args.width, ragged=args.ragged)
    users = histories(13_101, args.items, rng, mean_length=9.7)
    batches = training_batches(users, args.batch, args.repeats + 1, rng)
    evaluation = interaction([u[:-1] for u in users[: args.users]], [u[-1] for u in users[: args.users]])
    lengths = batches[0]["item_length"].double()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads; "
        f"{args.items} items x {args.rows} rows x {args.width}"
    )
    print(
        f"users have {np.mean([len(u) for u in users]):.1f} items, training prefixes {lengths.mean():.1f}, "
        f"batch {args.batch}\n"
    )
    print(f"{'median seconds':32s}{'literal':>10s}{'ours':>10s}{'factor':>9s}")

    results = {}
    for name, stage, clock, data in (
        ("pre-training step", "pretrain", Trained, batches),
        ("fine-tuning step", "finetune", Trained, batches),
        (f"evaluation of {args.users} users", "finetune", Evaluated, [[evaluation]] * (args.repeats + 1)),
    ):
        model = build(stage, dataset)
        times = alternate({"ours": clock(model), "literal": clock(LiteralMSM4SR(copy.deepcopy(model)))}, data)
        own, slow = (statistics.median(times[side]) for side in ("ours", "literal"))
        factor = times_as_fast(times["ours"], times["literal"])
        results[name] = {"literal": slow, "ours": own, "factor": factor}
        print(f"{name:32s}{slow:10.3f}{own:10.3f}{factor:8.1f}x")

    print(f"\n{'largest difference, no dropout':32s}{'loss':>10s}{'gradient':>10s}{'score':>9s}")
    small = {key: value[:256] for key, value in batches[0].items()}
    for stage in ("pretrain", "finetune"):
        model = build(stage, dataset, **NO_DROPOUT)
        difference = largest_differences(model, LiteralMSM4SR(model), small)
        equal = difference["loss"] < 1e-4 and difference["gradient"] < 1e-3 and difference["score"] < 1e-4
        results[f"values, {stage}"] = {**difference, "equal": equal}
        print(
            f"{stage:32s}{difference['loss']:10.1e}{difference['gradient']:10.1e}{difference['score']:9.0e}"
            f"   {'equal' if equal else 'NOT EQUAL'}"
        )
    return results


# ---------------------------------------------------------------- start-up


def load_once(folder: Path) -> None:
    """In a process of its own: prints seconds, and MiB of memory on top of what imports and interactions take."""
    from recbole_mm.config import Config
    from recbole_mm.data.dataset import MultimodalDataset

    dataset = MultimodalDataset(Config("MSM4SR", str(folder), settings={"use_gpu": False}))
    before = memory_mib("VmRSS")
    begin = time.perf_counter()
    vectors = dataset.vectors("text")
    aligned = time.perf_counter()
    FeatureRows(*vectors, max_rows=10, scale="standardize")
    scaled = time.perf_counter()
    result = {
        "seconds": aligned - begin,
        "scaling_seconds": scaled - aligned,
        "peak_mib": memory_mib("VmHWM") - before,
        "feature_mib": vectors.rows.numel() * vectors.rows.element_size() / 2**20,
    }
    print(json.dumps(result))


def startup(n_items: int = 26_000, n_rows: int = 20, width: int = 768) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "made-up"
        rng = np.random.default_rng(0)
        tokens = np.array([f"item{i}" for i in rng.permutation(n_items)])
        n = 2 * n_items  # each item twice, ten items a user
        write_table(
            folder / "made-up.inter",
            {
                "user_id:token": np.arange(n) // 10,
                "item_id:token": np.concatenate([rng.permutation(tokens), rng.permutation(tokens)]),
                "timestamp:float": np.arange(n) * 1.0,
            },
        )
        rows = rng.standard_normal((n_items * n_rows, width), dtype=np.float32)
        counts = np.full(n_items, n_rows)
        write_feature(folder, "text", tokens=tokens, rows=rows, counts=counts, encoder="random", source="none")
        del rows
        command = [sys.executable, "-m", "benchmarks.msm4sr", "--load", str(folder)]
        result = json.loads(
            subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
        )
    result["peak_over_size"] = result["peak_mib"] / result["feature_mib"]
    print(
        f"start-up, {n_items} items x {n_rows} rows x {width}: opening and aligning {result['seconds']:.2f} s, "
        f"standardising {result['scaling_seconds']:.2f} s,\n"
        f"peak memory {result['peak_mib']:.0f} MiB = {result['peak_over_size']:.2f} x the feature's "
        f"{result['feature_mib']:.0f} MiB"
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=4900)
    parser.add_argument("--rows", type=int, default=10)
    parser.add_argument("--ragged", action="store_true", help="1 to --rows rows per item instead of always --rows")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--users", type=int, default=4096, help="users of the evaluation")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of torch; 1 is least disturbed by other programs")
    parser.add_argument("--startup", action="store_true", help="measure opening and aligning features instead")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    args = parser.parse_args()
    torch.autograd.set_detect_anomaly(False)  # some of RecBole's modules switch it on when imported
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.load:
        load_once(args.load)
        return
    calibration = calibrate()
    print(calibration)
    results = startup() if args.startup else compare(args)
    if args.json:
        write_json(args.json, results, calibration)


if __name__ == "__main__":
    main()
