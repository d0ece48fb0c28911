"""How long a whole evaluation takes and how much memory, beside RecBole's own evaluator on the same scores, in one run.

    python -m benchmarks.evaluation                 100,000 users x 50,000 items, a few minutes
    python -m benchmarks.evaluation --scale 0.05    a twentieth of the users and of the items

Scores are a fixed matrix product of width 64, so that both sides spend the same time on them. Both go through the
`evaluate` of a trainer, from the data loader to the metrics: RecBole's with its Collector and Evaluator, ours with
`FullRanking`. Each side runs in a process of its own, one after the other, on the same threads. Its memory is the
highest resident size of that process, imports and vectors included. Seconds of processors tell more than the wall
clock where other programs run beside.

The vectors hold whole numbers, and the scores stay below 2^24: float32 gives the same ones whatever the size of a
block. No target has the score of another item, since RecBole ranks those by chance. So metrics must be equal, and the
run ends with status 1 if they differ by more than 1e-9.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

N_USERS, N_ITEMS, WIDTH, K = 100_000, 50_000, 64, 20
LARGEST = 700  # of the numbers in the vectors; 2^24 is 13 standard deviations of a score then
POOL = 1 / 25  # of the items; a target is the best among so many, and so half of the targets are in the top K
METRICS = ["NDCG", "MRR", "Recall"]
TOLERANCE, SPEED_UP, MEMORY = 1e-9, 3.0, 2 * 2**30
SIDES = {"recbole": "RecBole's evaluator", "ours": "ours"}
REPOSITORY = Path(__file__).resolve().parents[1]


# ---------------------------------------------------------------- what is evaluated


def vectors(n: int, *, seed: int) -> torch.Tensor:
    """[n, WIDTH] whole numbers as float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-LARGEST, LARGEST + 1, (n, WIDTH), generator=generator).float()


class FixedProduct(torch.nn.Module):
    """A model whose scores are products of fixed vectors of users and items."""

    def __init__(self, n_users: int, n_items: int) -> None:
        super().__init__()
        self.users, self.items = vectors(n_users, seed=0), vectors(n_items + 1, seed=1)
        self.anything = torch.nn.Parameter(torch.zeros(1))  # an optimizer needs something

    def full_sort_predict(self, interaction) -> torch.Tensor:
        return self.users[interaction["user_id"]] @ self.items.T


def draw_targets(model: FixedProduct) -> torch.Tensor:
    """[users] item ids, no two items with the score of the target, often enough among the best K."""
    generator, size, parts = torch.Generator().manual_seed(2), 256, []
    n_items = len(model.items) - 1
    for user in model.users.split(size):
        scores = user @ model.items.T
        scores[:, 0] = -torch.inf
        target = torch.zeros(len(user), dtype=torch.long)
        left = torch.arange(len(user))
        while len(left):
            pool = 1 + torch.randperm(n_items, generator=generator)[: max(1, round(POOL * n_items))]
            target[left] = pool[scores[left[:, None], pool].argmax(1)]
            own = scores.gather(1, target[:, None])
            row, item = np.nonzero(scores.numpy() == own.numpy())
            left = torch.from_numpy(np.unique(row[item != target.numpy()[row]]))
        parts.append(target)
    return torch.cat(parts)


class OneRowEach:
    """One row per user, with what evaluation asks of a data set of RecBole's."""

    uid_field, iid_field = "user_id", "item_id"

    def __init__(self, targets: torch.Tensor, n_items: int) -> None:
        from recbole.data.interaction import Interaction

        self.item_num = n_items + 1
        self.inter_feat = Interaction({"user_id": torch.arange(len(targets)), "item_id": targets})
        self.item_feat = Interaction({"item_id": torch.arange(self.item_num)})
        self.field2id_token = {"item_id": ["[PAD]", *(f"item {number}" for number in range(n_items))]}

    def __len__(self) -> int:
        return len(self.inter_feat)

    def __getitem__(self, index):
        return self.inter_feat[index]

    def get_item_feature(self):
        return self.item_feat


# ---------------------------------------------------------------- one side, in a process of its own


def evaluate(side: str, n_users: int, n_items: int, batch_size: int, targets: Path) -> dict:
    """Metrics, seconds by the wall clock and of all processors, and bytes."""
    sys.argv = sys.argv[:1]  # RecBole reads it too
    from recbole_mm.allocation import keep_freed_memory
    from recbole_mm.evaluation import with_full_ranking  # isort: skip  (RecBole imports on new packages after this)
    from recbole.config import Config
    from recbole.data.dataloader import FullSortEvalDataLoader
    from recbole.trainer import Trainer

    settings = {
        "metrics": METRICS, "topk": [K], "valid_metric": f"MRR@{K}", "metric_decimal_place": 16, "use_gpu": False,
        "eval_batch_size": batch_size, "train_neg_sample_args": None,
    }  # fmt: skip
    config = Config("SASRec", "made-up", config_dict=settings)
    model = FixedProduct(n_users, n_items)
    data = FullSortEvalDataLoader(config, OneRowEach(torch.from_numpy(np.load(targets)), n_items), sampler=None)
    trainer = (Trainer if side == "recbole" else with_full_ranking(Trainer))(config, model)

    if side == "ours":
        keep_freed_memory()  # as every run does
    clock, processor = time.perf_counter(), time.process_time()
    result = trainer.evaluate(data, load_best_model=False)
    seconds, processor = time.perf_counter() - clock, time.process_time() - processor
    resident = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    metrics = {key: float(value) for key, value in result.items()}
    return {"metrics": metrics, "seconds": seconds, "processor": processor, "memory": resident}


def measure(side: str, arguments: list[str], folder: Path) -> dict:
    command = [sys.executable, "-m", "benchmarks.evaluation", "--side", side, *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    if run.returncode:
        raise SystemExit(f"{SIDES[side]} failed:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


# ---------------------------------------------------------------- both


def compare(n_users: int, n_items: int, batch_size: int) -> bool:
    print(f"{n_users:,} users x {n_items:,} items, width {WIDTH}, k {K}, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "targets.npy", draw_targets(FixedProduct(n_users, n_items)).numpy())
        sizes = ["--users", n_users, "--items", n_items, "--batch-size", batch_size]
        arguments = [*map(str, sizes), "--targets", str(folder / "targets.npy")]
        results = {side: measure(side, arguments, folder) for side in SIDES}
    theirs, ours = results["recbole"], results["ours"]
    difference = max(abs(ours["metrics"][key] - value) for key, value in theirs["metrics"].items())
    for side, result in results.items():
        listed = ", ".join(f"{key} {value:.9f}" for key, value in result["metrics"].items())
        print(
            f"{SIDES[side]:22s}{result['seconds']:8.1f} s, {result['processor']:.1f} s of processors, "
            f"{result['memory'] / 2**30:.2f} GiB; {listed}"
        )
    faster, cheaper = (theirs[clock] / ours[clock] for clock in ("seconds", "processor"))
    print(f"{faster:.1f} times as fast (target {SPEED_UP:g}); {cheaper:.1f} times by processor seconds")
    print(f"memory {ours['memory'] / 2**30:.2f} GiB (target {MEMORY / 2**30:g})")
    print(f"largest difference of a metric {difference:.0e} (limit {TOLERANCE:.0e})")
    return difference <= TOLERANCE


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of users and items")
    parser.add_argument("--batch-size", type=int, default=4096, help="eval_batch_size of both; 4096 is RecBole's own")
    for hidden in ("--side", "--targets"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    for hidden in ("--users", "--items"):
        parser.add_argument(hidden, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        result = evaluate(options.side, options.users, options.items, options.batch_size, Path(options.targets))
        print(json.dumps(result))
        return 0
    n_users, n_items = (max(2 * K, round(n * options.scale)) for n in (N_USERS, N_ITEMS))
    return 0 if compare(n_users, n_items, options.batch_size) else 1


if __name__ == "__main__":
    sys.exit(main())
