"""How long UniSRec takes beside the same model computed literally, in one run on one machine.

    python -m benchmarks.unisrec                 steps, evaluation and memory on made-up data of the size of Amazon Arts
    python -m benchmarks.unisrec --scale=0.05    the same with a twentieth of the items, sequences and users

Both models have the same parameters. First, with dropout and noise off, their losses, gradients and scores are
compared; then, with both on as in training, their steps alternate, and each number is a median. An evaluation goes
through users in batches: the literal model adapts all items anew for each of them, ours once, so that the factor grows
with the number of users, of which Arts has 45,485. Memory is the highest of a process that makes one fine-tuning step,
without what it had before it.

Sequences are prefixes of histories of 5 + a geometric number of items, 8.7 on average as in Arts (45,485 users, 395,150
interactions), of which the newest 50 items count; items follow a Zipf law. Sequences are padded to 50, as RecBole does.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import Tensor

from benchmarks import RECBOLE_FIELDS, Settings
from benchmarks.calibration import calibrate
from benchmarks.clocks import Evaluated, Trained, alternate, memory_mib, times_as_fast
from benchmarks.literal_unisrec import LiteralUniSRec
from benchmarks.msm4sr import MAX_LENGTH, histories, interaction, largest_differences, training_batches
from benchmarks.results import write_json
from recbole_mm.model.unisrec import UniSRec

MEAN_LENGTH = 395_150 / 45_485
MODEL_YAML = Path(__file__).parents[1] / "properties" / "model" / "UniSRec.yaml"
RECBOLE = {**RECBOLE_FIELDS, "MAX_ITEM_LIST_LENGTH": MAX_LENGTH}
NOTHING_RANDOM = {"hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0, "adaptor_dropout": 0.0, "gate_noise": False}
STAGES = {"pre-training": "pretrain", "inductive fine-tuning": "inductive_ft", "fine-tuning": "transductive_ft"}


# ---------------------------------------------------------------- made-up data


class MadeUpDataset:
    """One random vector per item, zero for padding."""

    def __init__(self, *, n_items: int, width: int) -> None:
        self.n_items, self.width = n_items, width

    def num(self, field: str) -> int:
        return self.n_items

    def feature(self, name: str) -> Tensor:
        rows = torch.randn(self.n_items, self.width, generator=torch.Generator().manual_seed(len(name)))
        rows[0] = 0
        return rows


def build(stage: str, dataset: MadeUpDataset, **settings) -> UniSRec:
    torch.manual_seed(0)
    defaults = {**yaml.safe_load(MODEL_YAML.read_text()), **RECBOLE}
    stage_settings = UniSRec.stage_names.get(stage, {"train_stage": stage})
    return UniSRec(Settings({**defaults, **stage_settings, **settings}), dataset)


# ---------------------------------------------------------------- values


@torch.no_grad()
def away_from_zero(model: UniSRec) -> None:
    """Change what starts at zero, which could hide mistakes."""
    for parameter in (model.adaptor.shift, model.adaptor.gate.weight):
        parameter.normal_(std=0.1)


def refuse_unequal(stage: str, dataset: MadeUpDataset, batch) -> dict[str, float]:
    """Largest differences between both models.

    Raises:
        AssertionError: they do not compute the same.
    """
    model = build(stage, dataset, **NOTHING_RANDOM)
    away_from_zero(model)
    difference = largest_differences(model, LiteralUniSRec(model), batch)
    equal = difference["loss"] < 1e-4 and difference["gradient"] < 1e-3 and difference["score"] < 1e-4
    assert equal, f"{stage}: the two models differ: {difference}"
    return difference


# ---------------------------------------------------------------- time and memory


def made_up(args: argparse.Namespace) -> tuple[MadeUpDataset, list[np.ndarray], list[dict[str, Tensor]]]:
    """Items, histories and training batches."""
    rng = np.random.default_rng(0)
    dataset = MadeUpDataset(n_items=args.items, width=args.width)
    n_users = max(args.users, round(45_485 * args.scale))
    users = histories(n_users, args.items, rng, mean_length=MEAN_LENGTH)
    return dataset, users, training_batches(users, args.batch, args.repeats + 1, rng)


def peak_of_a_step(args: argparse.Namespace, which: str) -> None:
    """In a process of its own: prints the MiB that a transductive fine-tuning step takes on top."""
    dataset, _, batches = made_up(args)
    model = build("transductive_ft", dataset, hidden_size=args.hidden)
    before = memory_mib("VmRSS")
    Trained(LiteralUniSRec(model) if which == "literal" else model)(batches[0])
    print(json.dumps(memory_mib("VmHWM") - before))


def peak(args: argparse.Namespace, which: str) -> float:
    given = [f"--{name}={getattr(args, name)}" for name in ("items", "width", "hidden", "batch", "users", "threads")]
    command = [sys.executable, "-m", "benchmarks.unisrec", f"--step-of={which}", *given]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(out.splitlines()[-1])


def compare(args: argparse.Namespace) -> dict[str, dict]:
    dataset, users, batches = made_up(args)
    lengths = batches[0]["item_length"].double()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads; {args.items} items x {args.width}, "
        f"hidden {args.hidden}\nusers have {np.mean([len(u) for u in users]):.1f} items, training prefixes "
        f"{lengths.mean():.1f} padded to {MAX_LENGTH}, batch {args.batch}"
    )
    results: dict[str, dict] = {}
    print(f"\n{'largest difference, nothing random':36s}{'loss':>10s}{'gradient':>10s}{'score':>9s}")
    small = {key: value[:256] for key, value in batches[0].items()}
    for name, stage in STAGES.items():
        found = results[f"values, {name}"] = refuse_unequal(stage, dataset, small)
        print(f"{name:36s}{found['loss']:10.1e}{found['gradient']:10.1e}{found['score']:9.0e}   equal")

    slow, own = (peak(args, which) for which in ("literal", "ours"))
    results["peak memory"] = {"literal": slow, "ours": own, "share": own / slow}
    print(f"\n{'peak MiB of a fine-tuning step':36s}{slow:10.0f}{own:10.0f}{100 * own / slow:7.0f} %", flush=True)

    print(f"\n{'median seconds':36s}{'literal':>10s}{'ours':>10s}{'factor':>9s}", flush=True)
    chosen = users[: args.users]
    evaluation = [
        interaction([u[:-1] for u in part], [u[-1] for u in part])
        for part in (chosen[start : start + args.batch] for start in range(0, len(chosen), args.batch))
    ]
    for name, stage, clock, data in (
        ("fine-tuning step, transductive", "transductive_ft", Trained, batches),
        (f"evaluation of {len(chosen)} users", "transductive_ft", Evaluated, [evaluation] * (args.repeats + 1)),
        ("pre-training step", "pretrain", Trained, batches),
    ):
        model = build(stage, dataset, hidden_size=args.hidden)
        times = alternate({"ours": clock(model), "literal": clock(LiteralUniSRec(copy.deepcopy(model)))}, data)
        own, slow = (statistics.median(times[side]) for side in ("ours", "literal"))
        factor = times_as_fast(times["ours"], times["literal"])
        results[name] = {"literal": slow, "ours": own, "factor": factor}
        print(f"{name:36s}{slow:10.3f}{own:10.3f}{factor:8.1f}x", flush=True)

    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="of items, batch and users, where they are not given")
    parser.add_argument("--items", type=int, help="21,000 x scale")
    parser.add_argument("--batch", type=int, help="2,048 x scale")
    parser.add_argument("--users", type=int, help="users of the evaluation, 16,384 x scale")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--hidden", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--step-of", choices=("literal", "ours"), help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    args = parser.parse_args()
    for name, whole in (("items", 21_000), ("batch", 2048), ("users", 16_384)):
        if getattr(args, name) is None:
            setattr(args, name, max(2, round(whole * args.scale)))
    torch.autograd.set_detect_anomaly(False)  # some of RecBole's modules switch it on when imported
    torch.set_num_threads(args.threads)
    if args.step_of:
        peak_of_a_step(args, args.step_of)
        return
    calibration = calibrate()
    print(calibration)
    results = compare(args)
    if args.json:
        write_json(args.json, results, calibration)


if __name__ == "__main__":
    main()
