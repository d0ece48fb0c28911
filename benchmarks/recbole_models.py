"""Training steps and scores of RecBole's SASRec, GRU4Rec, SR-GNN and NARM: as shipped, and as our runner runs them.

    python -m benchmarks.recbole_models                  2,048 histories of 8 items on average, 20,000 items
    python -m benchmarks.recbole_models --toy            in some seconds

Each batch is given to RecBole's model with autograd's anomaly mode on, as importing RecBole leaves it, with it off,
and to ours with ``vectorised_graphs`` and with each value of ``trim_histories``; they alternate, and medians are told.
Before that, losses and gradients are compared with dropout off, and scores in evaluation. Graphs of sessions are
measured by themselves. On a CPU, memory is kept by the process (``keep_freed_memory``) for all sides, unless
``--return-memory``. What reading data costs is no part of it; see `benchmarks.sasrec` for whole epochs.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import recbole
import torch
from recbole.data.interaction import Interaction
from recbole.model import sequential_recommender
from torch import Tensor, nn

from benchmarks import RECBOLE_FIELDS, Settings
from benchmarks.calibration import calibrate
from benchmarks.clocks import Clock, Evaluated, Trained, alternate, times_as_fast
from benchmarks.results import write_json
from recbole_mm.allocation import keep_freed_memory
from recbole_mm.session_graphs import session_graphs, with_vectorised_graphs
from recbole_mm.settings import read_settings
from recbole_mm.trimming import EXACT, groups_of, with_trimmed_histories

MODELS = ("SASRec", "GRU4Rec", "SRGNN", "NARM")
SHIPPED, NO_ANOMALY, EVALUATION, ALL = "as shipped", "anomaly mode off", "ours, evaluation", "ours, all"
CLOSE = 1e-4  # of losses and gradients in float32, relative to the largest


def settings_of(name: str, device: str, max_length: int) -> Settings:
    file = Path(recbole.__file__).parent / "properties" / "model" / f"{name}.yaml"
    own = read_settings(file) | {"loss_type": "CE", "MAX_ITEM_LIST_LENGTH": max_length}
    return Settings(RECBOLE_FIELDS | own | {"device": torch.device(device)})


def batch_of(model: nn.Module, args: argparse.Namespace) -> Interaction:
    """Histories of a geometric number of items, cut to the longest."""
    lengths = torch.distributions.Geometric(1 / args.mean_length).sample((args.batch,)).long()
    lengths = (lengths + 1).clamp(max=args.max_length)
    item_seq = torch.randint(1, args.items, (args.batch, args.max_length))
    item_seq *= torch.arange(args.max_length) < lengths.unsqueeze(1)
    target = torch.randint(1, args.items, (args.batch,))
    batch = {model.ITEM_SEQ: item_seq, model.ITEM_SEQ_LEN: lengths, model.POS_ITEM_ID: target}
    return Interaction(batch).to(args.device)


def sides_of(name: str, args: argparse.Namespace) -> dict[str, nn.Module]:
    """The model in its three forms, with the same parameters."""
    config, data = settings_of(name, args.device, args.max_length), SimpleNamespace(num=lambda _: args.items)
    stock = getattr(sequential_recommender, name)
    forms = {NO_ANOMALY: stock}
    forms |= {
        side: with_trimmed_histories(with_vectorised_graphs(stock), trim)
        for side, trim in ((EVALUATION, "evaluation"), (ALL, "all"))
    }
    models = {side: form(config, data).to(args.device) for side, form in forms.items()}
    for model in models.values():
        model.load_state_dict(models[NO_ANOMALY].state_dict())
    return models


def require_equal(name: str, models: dict[str, nn.Module], batch: Interaction) -> dict[str, float]:
    """The largest difference of a loss or gradient, and of a score, from RecBole's model.

    Raises:
        SystemExit: they differ by more than rounding, or at all where scores shall be the same.
    """
    gaps = {}
    expected = stock_scores = None
    for side, model in models.items():
        dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout)]
        rates, _ = [module.p for module in dropouts], [setattr(module, "p", 0.0) for module in dropouts]
        loss = model.train().calculate_loss(batch)
        found = [loss.detach(), *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])]
        for module, rate in zip(dropouts, rates, strict=True):
            module.p = rate
        with torch.no_grad():
            scores = model.eval().full_sort_predict(batch)
        if expected is None:
            expected, stock_scores = found, scores
            continue
        gaps[side] = max(_gap(a, b) for a, b in zip(found, expected, strict=True))
        gaps[f"scores, {side}"] = _gap(scores, stock_scores)
        exact = side == EVALUATION and name in EXACT and batch[model.ITEM_SEQ].device.type == "cpu"
        if max(gaps[side], gaps[f"scores, {side}"]) > CLOSE or (exact and not torch.equal(scores, stock_scores)):
            raise SystemExit(f"{name}, {side}: not what RecBole's model computes; differences {gaps}")
    return gaps


def _gap(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))


def measure_model(name: str, args: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """Seconds of a training step and of the scores of a batch, of each side."""
    models = sides_of(name, args)
    gaps = require_equal(name, models, batch_of(models[ALL], args))
    batches = [batch_of(models[ALL], args) for _ in range(args.repeats + 1)]
    steps = {SHIPPED: Trained(models[NO_ANOMALY], anomaly_mode=True)}
    steps |= {side: Trained(model) for side, model in models.items()}
    training = alternate(steps, batches, clock=clock)
    scoring = {side: Evaluated(models[side]) for side in (NO_ANOMALY, EVALUATION, ALL)}
    evaluation = alternate(scoring, [[batch] for batch in batches], clock=clock)
    return {"gaps": gaps, "training step": training, "scores of a batch": evaluation}


def measure_graphs(args: argparse.Namespace, clock: Clock) -> dict[str, list[float]]:
    """Seconds for the graphs of a batch: in RecBole's loops, at once, and at once in groups of like length."""
    stock, here = sequential_recommender.SRGNN, SimpleNamespace(device=torch.device(args.device))
    fields = SimpleNamespace(ITEM_SEQ="seq", ITEM_SEQ_LEN="len", POS_ITEM_ID="target")
    batches = [batch_of(fields, args)["seq"] for _ in range(args.repeats + 1)]
    expected = stock._get_slice(here, batches[0])
    if not all(map(torch.equal, session_graphs(batches[0]), expected)):
        raise SystemExit("the graphs of sessions are not RecBole's")

    def in_groups(item_seq: Tensor) -> None:
        for rows, longest in groups_of(item_seq, exact=False):
            session_graphs(item_seq[rows, :longest])

    runs = {"RecBole's loops": lambda seq: stock._get_slice(here, seq), "at once": session_graphs}
    return alternate(runs | {"at once, in groups": in_groups}, batches, clock=clock)


def report(title: str, samples: dict[str, list[float]]) -> None:
    for number, (name, seconds) in enumerate(samples.items()):
        slower = [other for other in list(samples)[:2] if other in list(samples)[:number]]
        ratios = [f"{times_as_fast(seconds, samples[other]):6.1f} x as fast as {other}" for other in slower]
        print(f"{title:<28}{name:<20}{1000 * statistics.median(seconds):9.1f} ms  {'  '.join(ratios)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batch", type=int, default=2048, help="histories")
    parser.add_argument("--mean-length", type=float, default=8.0, help="of the histories")
    parser.add_argument("--max-length", type=int, default=50, help="MAX_ITEM_LIST_LENGTH")
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--clock", choices=("wall", "processor"), default="processor", help="on a CPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--return-memory", action="store_true", help="malloc gives memory back, as it does by itself")
    parser.add_argument("--toy", action="store_true", help="batches of 64, 300 items")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    args = parser.parse_args()
    if args.toy:
        args.batch, args.items, args.repeats = 64, 300, 2
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if not args.return_memory:
        keep_freed_memory()
    clock = Clock(args.device, "wall" if args.device == "cuda" else args.clock)
    calibration = calibrate(clock)
    print(calibration)
    results: dict[str, Any] = {"graphs of sessions": measure_graphs(args, clock)}
    report("graphs of sessions", results["graphs of sessions"])
    for name in args.models:
        results[name] = measure_model(name, args, clock)
        for measure in ("training step", "scores of a batch"):
            report(f"{name}, {measure}", results[name][measure])
        print(f"{name}, largest differences: " + ", ".join(f"{k} {v:.0e}" for k, v in results[name]["gaps"].items()))
    if args.json:
        write_json(args.json, results, calibration, settings={k: v for k, v in vars(args).items() if k != "json"})


if __name__ == "__main__":
    main()
