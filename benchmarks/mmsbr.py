"""How long MMSBR takes and how much memory, beside the same model computed as its release does, in one run.

    python -m benchmarks.mmsbr                         made-up data of the size of Amazon Cellphones, a few minutes
    python -m benchmarks.mmsbr --quick                 a toy, to see that everything works
    python -m benchmarks.mmsbr --tower-items 100000    whether `MMSBR` trains on that many items within 8 GiB

"Ours" is `MMSBRReleased`; both have the same parameters. First, with dropout off, losses, gradients and scores are
compared, and the run ends where they differ: in float64 with few items to rounding, in float32 with all items to the
tolerances below. Float32 is coarser for two reasons: sums are long, and where logits at the edge of the largest 100
nearly tie, either may be chosen, which leaves the loss alone but changes rows of gradients. Then steps alternate, and
each number is a median of wall-clock seconds. The release runs with autograd's anomaly mode on; its time without stands
beside it, because one line switches that off.

`MMSBR` itself, with its defaults and made-up features, stands beside them: it is another model, not the same maths.

Memory is measured in a process for each number, without anomaly mode: its highest resident size, and how much of it
came after the imports.

The models and the data are made in `benchmarks.mmsbr_models`.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.calibration import Calibration, calibrate
from benchmarks.clocks import Trained, alternate, memory_mib, times_as_fast, total
from benchmarks.literal_mmsbr import CUTOFFS, LiteralMMSBR
from benchmarks.mmsbr_models import (
    ENCODER_WIDTH,
    FEATURES,
    N_LAYERS,
    N_NEGATIVES,
    N_PIVOTS,
    N_SEQUENCES,
    WIDTH,
    Released,
    batches_of,
    build_clean,
    build_fast,
    build_literal,
    in_fast_layout,
    prices_and_categories,
    sessions,
    trimmed,
)
from benchmarks.results import write_json

CLEAN = "MMSBR, not the same maths"
RELEASED_BATCH, LARGE_BATCH = 100, 512
FLOAT64_ITEMS = 400
TOLERANCES = {torch.float64: {"loss": 1e-11, "gradient": 1e-8, "score": 1e-9},
              torch.float32: {"loss": 1e-6, "gradient": 2e-3, "score": 1e-4}}  # fmt: skip
QUICK = {
    "items": 300, "batch": 16, "large_batch": 32, "repeats": 1, "sessions": 150, "train_sessions": 500,
    "memory_items": [300, 600],
}  # fmt: skip


# ---------------------------------------------------------------- equal values


def differences(n_items: int, batch: dict[str, Tensor], dtype: torch.dtype) -> dict[str, float]:
    """Dropout off: of the loss, relative; of gradients, the norm of the difference relative to the norm of each
    tensor; of scores, relative to the largest."""
    literal = build_literal(n_items, use_dropout=False)
    released, fast = Released(literal).to(dtype), build_fast(literal).to(dtype)
    found = []
    for model in (released, fast):
        loss = total(model.train().calculate_loss(batch))
        loss.backward()
        with torch.no_grad():
            found.append((loss.item(), model.eval().full_sort_predict(batch)[:, 1:]))
    (loss, scores), (fast_loss, fast_scores) = found
    theirs = in_fast_layout({name: p.grad for name, p in literal.named_parameters()})
    own = {name: p.grad for name, p in fast.named_parameters() if p.grad is not None}
    if theirs.keys() != own.keys():
        raise ValueError(f"only one model has gradients of {', '.join(sorted(theirs.keys() ^ own.keys()))}")
    largest = max(gradient.norm() for gradient in theirs.values())
    # A query's bias in the pivots' attention has the true gradient 0: compare with the largest where all is rounding.
    relative = [((own[n] - g).norm() / g.norm().clamp_min(1e-6 * largest)).item() for n, g in theirs.items()]
    return {
        "loss": abs(fast_loss - loss) / abs(loss),
        "gradient": max(relative),
        "score": ((fast_scores - scores).abs().max() / scores.abs().max()).item(),
    }


def check_equality(n_items: int, batch_size: int) -> dict[str, dict]:
    """Ends the program where the models differ: the time of a wrong result says nothing."""
    print(f"\n{'largest difference, no dropout':40s}{'loss':>10s}{'gradient':>10s}{'score':>10s}")
    results = {}
    for dtype, tolerance in TOLERANCES.items():
        n = min(n_items, FLOAT64_ITEMS) if dtype == torch.float64 else n_items
        found = differences(n, sessions(batch_size, n, np.random.default_rng(1)), dtype)
        name = f"{str(dtype).removeprefix('torch.')}, {n:,} items"
        print(f"{name:40s}" + "".join(f"{found[key]:10.0e}" for key in tolerance))
        print(f"{'  tolerance':40s}" + "".join(f"{tolerance[key]:10.0e}" for key in tolerance))
        if not all(found[key] <= tolerance[key] for key in tolerance):  # also where one is no number
            raise SystemExit("NOT EQUAL: nothing else is measured")
        results[f"values, {name}"] = found
    return results


# ---------------------------------------------------------------- evaluation


def evaluate(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, float]:
    """The literal's metrics, ranks by counting larger scores; all is computed anew."""
    model.train()
    model.eval()  # as after an epoch: nothing is left from the last evaluation
    ranks = []
    with torch.no_grad():
        for batch in batches:
            scores = model.full_sort_predict(batch)  # [B, 1 + N]
            ranks.append(1 + (scores > scores.gather(1, batch["item_id"].unsqueeze(1))).sum(1))
    rank = torch.cat(ranks).double()
    found = {}
    for k in CUTOFFS:
        hit = rank <= k
        found[f"Prec@{k}"] = hit.double().mean().item()
        found[f"MRR@{k}"] = (hit / rank).mean().item()
        found[f"NDCG@{k}"] = (hit / torch.log2(rank + 1)).mean().item()
    return found


# ---------------------------------------------------------------- cost


def step_flop(n_items: int, batch_size: int, *, released: bool = False, clean: bool = False) -> float:
    """Of a training step's matrix products, a backward pass counted as two forward passes.

    The release sends gradients through whole N x N matrices; only those of the largest logits are not 0. `MMSBR` maps
    features, which are frozen, so that only the maps get gradients.
    """
    d, tokens = WIDTH, N_PIVOTS + N_SEQUENCES
    layers = N_LAYERS * (12 * d**2 * tokens + 2 * tokens**2 * d)
    tower = 2 * n_items * (layers + 2 * N_SEQUENCES * 2 * d**2 + (N_PIVOTS + 1) * d**2)
    contrast = 4 * n_items**2 * d
    contrast_backward = 2 * contrast if released else 8 * n_items * N_NEGATIVES * d
    scoring = 6 * batch_size * n_items * d
    maps = 2 * n_items * len(FEATURES) * ENCODER_WIDTH * d if clean else 0
    return 3 * tower + contrast + contrast_backward + 3 * scoring + 2 * maps


def measure_memory(which: str, n_items: int, batch_size: int, *, n_steps: int, tower_chunk: int) -> None:
    """In a process of its own: prints MiB at the highest, and how many came after the imports, and seconds of each
    step."""
    before = memory_mib("VmRSS")
    if which == "clean":
        model = build_clean(n_items, tower_chunk=tower_chunk)
    else:
        literal = build_literal(n_items)
        model = Released(literal) if which == "literal" else build_fast(literal)
        del literal
    step, seconds = Trained(model), []
    for batch in batches_of(sessions(n_steps * batch_size, n_items, np.random.default_rng(0)), batch_size):
        begin = time.perf_counter()
        step(batch)
        seconds.append(time.perf_counter() - begin)
    peak = memory_mib("VmHWM")
    print(json.dumps({"growth_mib": peak - before, "peak_mib": peak, "seconds": seconds}))


def memory_of(which: str, n_items: int, batch_size: int, *, n_steps: int = 2, tower_chunk: int = 0) -> dict:
    """Two steps, so that the optimizer's state is there in the second."""
    command = [sys.executable, "-m", "benchmarks.mmsbr", "--memory", which, "--items", str(n_items)]
    command += ["--batch", str(batch_size), "--threads", str(torch.get_num_threads())]
    command += ["--steps", str(n_steps), "--tower-chunk", str(tower_chunk)]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).resolve().parents[1]
    )
    return json.loads(done.stdout.splitlines()[-1])


def check_many_items(args) -> dict[str, dict]:
    """One step of `MMSBR` with its tower in chunks; ends the program where it takes more memory than it may."""
    found = memory_of("clean", args.tower_items, LARGE_BATCH, n_steps=1, tower_chunk=args.tower_chunk)
    fits = found["peak_mib"] <= args.limit_gib * 1024
    print(
        f"MMSBR, {args.tower_items:,} items, batch {LARGE_BATCH}, tower_chunk {args.tower_chunk}: a training step of "
        f"{found['seconds'][0]:.1f} s, at most {found['peak_mib'] / 1024:.2f} GiB, "
        f"{'within' if fits else 'MORE THAN'} {args.limit_gib:g} GiB"
    )
    if not fits:
        raise SystemExit(1)
    return {f"{args.tower_items:,} items": {"tower_chunk": args.tower_chunk, **found}}


# ---------------------------------------------------------------- the run


def compare(args: argparse.Namespace, calibration: Calibration) -> dict[str, dict]:
    n_items, rng = args.items, np.random.default_rng(0)
    literal = build_literal(n_items)
    pairs = torch.stack(prices_and_categories(n_items)).unique(dim=1).shape[1]
    print(f"torch {torch.__version__}, {calibration}")
    levels, categories = literal.price_mean.num_embeddings, literal.category.num_embeddings
    print(f"{n_items:,} items, {levels} price levels x {categories} categories in {pairs} pairs")
    results = check_equality(n_items, args.batch)
    results |= compare_steps(args, literal, calibration, rng)
    results |= compare_evaluation(args, literal, rng)
    results |= compare_memory(args)
    return results


def compare_steps(args, literal: LiteralMMSBR, calibration: Calibration, rng: np.random.Generator) -> dict[str, dict]:
    n_items, batch, large = args.items, args.batch, args.large_batch
    released, fast = Released(copy.deepcopy(literal)), build_fast(literal)
    runs = {
        "as released, anomaly mode on": Trained(released, anomaly_mode=True),
        "as released, anomaly mode off": Trained(released),
        "ours": Trained(fast),
        CLEAN: Trained(build_clean(n_items)),
    }
    times = alternate(runs, batches_of(sessions((args.repeats + 1) * batch, n_items, rng), batch))
    large_data = sessions((args.repeats + 1) * large, n_items, rng)
    large_name, clean_large_name = f"ours, batch {large}", f"{CLEAN}, batch {large}"
    large_runs = {large_name: runs["ours"], clean_large_name: runs[CLEAN]}
    times |= alternate(large_runs, batches_of(large_data, large))

    results = {}
    print(f"\n{f'training step, batch {batch}':40s}{'median':>10s}{'ours is':>10s}{'GFLOP':>10s}{'of rate':>10s}")
    for name, seconds in times.items():
        median = statistics.median(seconds)
        size = large if name in large_runs else batch
        flop = step_flop(n_items, size, released="released" in name, clean=name.startswith(CLEAN))
        share = calibration.fraction(flop, median)
        results[name] = {"seconds": median, "samples": seconds, "gflop": flop / 1e9, "of_rate": share}
        text = f"{name:40s}{median:9.3f}s"
        if "released" in name:
            factor = times_as_fast(times["ours"], seconds)
            results[name]["factor"] = factor
            text += f"{factor:9.2f}x"
        else:
            text += " " * 10
        print(f"{text}{flop / 1e9:10.0f}{share:10.0%}")

    steps, large_steps = math.ceil(args.train_sessions / batch), math.ceil(args.train_sessions / large)
    epochs = {name: results[name]["seconds"] * (large_steps if name in large_runs else steps) for name in times}
    title = f"epoch of {args.train_sessions:,} sessions, steps x step"
    print(f"\n{title:40s}{'steps':>10s}{'hours':>10s}{f'b. {large} is':>10s}")
    for name, seconds in epochs.items():
        n, factor = large_steps if name in large_runs else steps, seconds / epochs[large_name]
        results[f"epoch, {name}"] = {"steps": n, "seconds": seconds, "factor": factor}
        print(f"{name:40s}{n:10d}{seconds / 3600:10.2f}{factor:9.1f}x")
    return results


def compare_evaluation(args, literal: LiteralMMSBR, rng: np.random.Generator) -> dict[str, dict]:
    data = sessions(args.sessions, args.items, rng)
    small, own = batches_of(data, args.batch), batches_of(data, args.evaluation_batch)
    fast = build_fast(literal)
    literal.eval()
    slow = alternate({"": lambda batch: literal.evaluate([trimmed(batch)])}, [small[0], *small[:2]])[""]
    models = {"ours": fast, CLEAN: build_clean(args.items)}
    clocks = {name: lambda batches, model=model: evaluate(model, batches) for name, model in models.items()}
    timed = alternate(clocks, [own[:1], *[own] * args.repeats])
    scaled, seconds = statistics.mean(slow) * len(small), statistics.median(timed["ours"])
    clean_seconds = statistics.median(timed[CLEAN])

    released, ours = literal.evaluate([trimmed(batch) for batch in small[:2]]), evaluate(fast, small[:2])
    difference = max(abs(ours[name] - value) for name, value in released.items())
    print(f"\nevaluation of {args.sessions:,} sessions")
    print(f"{f'as released, 2 of {len(small)} batches, scaled':40s}{scaled:9.2f}s{scaled / seconds:9.1f}x")
    print(f"{f'ours, all, batch {args.evaluation_batch}':40s}{seconds:9.2f}s")
    print(f"{'  largest difference of a metric':40s}{difference:10.0e}")
    print(f"{CLEAN:40s}{clean_seconds:9.2f}s")
    return {
        "evaluation": {
            "released": scaled, "batch_samples": slow, "ours": seconds, "samples": timed["ours"],
            "factor": scaled / seconds, "metric_difference": difference,
            CLEAN: {"seconds": clean_seconds, "samples": timed[CLEAN]},
        }
    }  # fmt: skip


def compare_memory(args) -> dict[str, dict]:
    print(f"\n{'memory of a training step [MiB]':40s}{'growth':>10s}{'peak':>10s}")
    results, rows = {}, []
    for which, n_items in (("literal", args.items), ("ours", args.items), *(("ours", n) for n in args.memory_items)):
        name = f"{'as released' if which == 'literal' else which}, {n_items:,} items"
        found = results[f"memory, {name}"] = memory_of(which, n_items, args.batch)
        print(f"{name:40s}{found['growth_mib']:10.0f}{found['peak_mib']:10.0f}")
        rows.append(found)
    released, ours, fewer, more = rows
    sizes = ("growth_mib", "peak_mib")
    factor, growth = ({key: a[key] / b[key] for key in sizes} for a, b in ((released, ours), (more, fewer)))
    items = args.memory_items[-1] / args.memory_items[0]
    print(f"{'as released over ours':40s}{factor['growth_mib']:9.2f}x{factor['peak_mib']:9.2f}x")
    print(f"{f'ours with {items:.1f} x as many items':40s}{growth['growth_mib']:9.2f}x{growth['peak_mib']:9.2f}x")
    results["memory, factor"], results["memory, growth with items"] = factor, {"items": items, **growth}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=8614)
    parser.add_argument("--batch", type=int, default=RELEASED_BATCH)
    parser.add_argument("--large-batch", type=int, default=LARGE_BATCH, help="of our epoch")
    parser.add_argument("--evaluation-batch", type=int, default=1024, help="of our evaluation")
    parser.add_argument("--sessions", type=int, default=7766, help="of the evaluation")
    parser.add_argument("--train-sessions", type=int, default=70_260, help="of an epoch")
    parser.add_argument("--memory-items", type=int, nargs=2, default=[10_000, 20_000], help="how memory grows")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--quick", action="store_true", help="a toy: sizes and repeats are set")
    parser.add_argument("--tower-items", type=int, metavar="N", help="check instead that MMSBR trains on N items")
    parser.add_argument("--tower-chunk", type=int, default=2048, metavar="N", help="items at a time in that check")
    parser.add_argument("--limit-gib", type=float, default=8, help="memory that it may take there")
    parser.add_argument("--memory", choices=("literal", "ours", "clean"), help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    args = parser.parse_args()
    if args.quick:
        vars(args).update(QUICK)
    torch.autograd.set_detect_anomaly(False)  # some of RecBole's modules switch it on when imported
    warnings.filterwarnings("ignore", message="Anomaly Detection has been enabled")
    torch.set_num_threads(args.threads)
    if args.memory:
        measure_memory(args.memory, args.items, args.batch, n_steps=args.steps, tower_chunk=args.tower_chunk)
        return
    calibration = calibrate()
    results = check_many_items(args) if args.tower_items else compare(args, calibration)
    if args.json:
        write_json(args.json, results, calibration)


if __name__ == "__main__":
    main()
