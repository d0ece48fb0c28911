"""MSM4SR's fine-tuning and evaluation on a catalogue of a million items: seconds, and memory within a limit.

    python -m benchmarks.large_catalogue                            a million items, sampled softmax, about five minutes
    python -m benchmarks.large_catalogue --fit 10000 40000 160000   how memory grows with the number of items
    python -m benchmarks.large_catalogue --loss                     the softmax alone: full, chunked and sampled
    python -m benchmarks.large_catalogue --items 5000 --rows 3      a toy, in seconds

Features are random float16 files, ten text vectors and one picture per item by default, made in a temporary folder
(``--folder`` says where) and deleted at the end. Training and evaluation run in a process of their own, which maps the
files. Two peaks are told. The process's own memory is what is resident without pages of files, looked at every few
milliseconds; it is what the limit is for. The other one counts mapped pages too, as Linux's VmHWM does: the kernel
drops those when something else needs the memory.

First, on a small catalogue and in float64, losses and gradients of the chunked softmax must equal those of the full
one, ranks those of whole rows of scores, and the sampled softmax must come close with many draws; otherwise the command
ends with status 1. It does so too where memory goes over the limit, or grows faster than N to the power 1.1.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import yaml

from benchmarks import RECBOLE_FIELDS, Settings
from benchmarks.calibration import Calibration, calibrate
from benchmarks.clocks import Clock, Peak, alternate, memory_mib, times_as_fast
from benchmarks.results import write_json
from recbole_mm.model.msm4sr import MSM4SR
from recbole_mm.model.softmax import chunked_softmax_loss, sampled_softmax_loss
from recbole_mm.optimizer import LazyAdam, clip_gradients
from recbole_mm.ranking import rank_products, rank_targets, tie_order

REPOSITORY = Path(__file__).resolve().parents[1]
MODEL_YAML = REPOSITORY / "properties" / "model" / "MSM4SR.yaml"
MAX_LENGTH, MEAN_LENGTH = 50, 10
BLOCK = 1 << 16  # feature rows written at a time
LARGEST_EXPONENT = 1.1
TOLERANCE = 1e-9
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0, "adaptor_dropout": 0.0}


# ---------------------------------------------------------------- made-up data


def write_rows(path: Path, n_rows: int, width: int, dtype: str) -> None:
    """Random rows of length about 1: a block of them, which later blocks repeat with other signs."""
    rng, bits, sign = np.random.default_rng(len(path.name)), np.uint16, 15
    if dtype == "float32":
        bits, sign = np.uint32, 31
    block = rng.normal(scale=width**-0.5, size=(min(BLOCK, n_rows), width)).astype(dtype)
    rows = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(n_rows, width))
    for start in range(0, n_rows, BLOCK):
        part = rows[start : start + BLOCK].view(bits)
        np.bitwise_xor(block[: len(part)].view(bits), rng.integers(2, size=width, dtype=bits) << sign, out=part)
    rows.flush()


class Vectors(NamedTuple):
    rows: torch.Tensor
    starts: torch.Tensor
    counts: torch.Tensor
    fallback: torch.Tensor


class MappedDataset:
    """The first items of the files in a folder."""

    def __init__(self, folder: Path, n_items: int, rows: dict[str, int]) -> None:
        self.folder, self.n_items, self.rows = folder, n_items, rows

    def num(self, field: str) -> int:
        return self.n_items

    def feature_names(self) -> list[str]:
        return sorted(self.rows)

    def vectors(self, name: str) -> Vectors:
        n = self.rows[name]
        counts = torch.full((self.n_items,), n)
        counts[0] = 0
        rows = np.load(self.folder / f"{name}.npy", mmap_mode="c")[: n * (self.n_items - 1)]
        return Vectors(torch.from_numpy(rows), counts.cumsum(0) - counts, counts, torch.zeros(rows.shape[1]))


def batch_of(n_rows: int, n_items: int, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """Histories of 1 + a geometric number of items, and targets; items follow a Zipf law."""

    def items(size) -> torch.Tensor:
        ranks = np.exp(rng.random(size) * math.log(n_items)).astype(np.int64)  # 1/rank
        return torch.from_numpy(1 + ranks * 7919 % (n_items - 1))

    lengths = torch.from_numpy(np.minimum(rng.geometric(1 / MEAN_LENGTH, n_rows), MAX_LENGTH))
    histories = items((n_rows, MAX_LENGTH)) * (torch.arange(MAX_LENGTH) < lengths.unsqueeze(1))
    return {"item_id_list": histories, "item_length": lengths, "item_id": items(n_rows)}


def build(dataset: MappedDataset, **settings) -> MSM4SR:
    torch.manual_seed(0)
    defaults = {**yaml.safe_load(MODEL_YAML.read_text()), **RECBOLE_FIELDS, "MAX_ITEM_LIST_LENGTH": MAX_LENGTH}
    return MSM4SR(
        Settings({**defaults, "train_stage": "finetune", "negative_sampling": "uniform", **settings}), dataset
    )


# ---------------------------------------------------------------- is it right


def check(folder: Path, rows: dict[str, int]) -> None:
    """Compare with the full softmax and whole rows of scores, on 300 items.

    Raises:
        SystemExit: they differ.
    """
    dataset, batch = MappedDataset(folder, 300, rows), batch_of(64, 300, np.random.default_rng(0))
    settings = {"hidden_size": 32, **NO_DROPOUT}
    full = build(dataset, **settings).double()
    loss, gradients = loss_and_gradients(full, batch)
    for chunk in (7, 250):
        chunked = build(dataset, softmax="chunked", softmax_chunk=chunk, **settings).double()
        value, others = loss_and_gradients(chunked, batch)
        apart = max([abs(value - loss), *((a - b).abs().max() for a, b in zip(gradients, others, strict=True))])
        print(f"chunks of {chunk}: loss and gradients differ from the full softmax by {apart:.0e} at most")
        require(apart < TOLERANCE, "the chunked softmax is not the full one")
    sampled = build(dataset, softmax="sampled", softmax_chunk=64, softmax_negatives=1 << 18, **settings).double()
    value, others = loss_and_gradients(sampled, batch)
    cosine = F.cosine_similarity(*(torch.cat([g.flatten() for g in gs]) for gs in (gradients, others)), dim=0)
    print(f"sampled, {1 << 18} draws: loss {value:.4f}, full {loss:.4f}; cosine of the gradients {cosine:.6f}")
    require(abs(value - loss) < 0.02 and cosine > 0.999, "the sampled softmax does not approach the full one")
    sampled.eval()
    order, targets = tie_order(["", *map(str, range(299))]), batch["item_id"]
    with torch.no_grad():
        queries, vectors = sampled.query_and_item_vectors(batch)
        ranks = rank_products(queries, vectors, targets, order, chunk=64).rank
        expected = rank_targets(full.eval().full_sort_predict(batch), targets, order).rank
    print(f"{int((ranks != expected).sum())} of {len(ranks)} ranks differ from those of whole rows of scores")
    require(torch.equal(ranks, expected), "ranks by chunks are not those of whole rows")


def require(true: bool, message: str) -> None:
    if not true:
        raise SystemExit(message)


def loss_and_gradients(model: MSM4SR, batch) -> tuple[float, list[torch.Tensor]]:
    loss = model.calculate_loss(batch)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return loss.item(), list(torch.autograd.grad(loss, trained, materialize_grads=True))


# ---------------------------------------------------------------- one catalogue, in a process of its own


class OwnMemory(threading.Thread):
    """The most memory of this process without pages of files [MiB], from looking every few milliseconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.largest, self._done = memory_mib("RssAnon"), threading.Event()
        self.start()

    def run(self) -> None:
        while not self._done.wait(0.005):
            self.largest = max(self.largest, memory_mib("RssAnon"))

    def stop(self) -> float:
        self._done.set()
        self.join()
        return self.largest


def measure(case: dict) -> dict:
    """Seconds and memory of some steps and of an evaluation."""
    n_items, folder, clock = case["items"], Path(case["folder"]), Clock(kind=case["clock"])
    before, resident, peak = memory_mib("RssAnon"), memory_mib("VmRSS"), Peak()
    own, rng = OwnMemory(), np.random.default_rng(1)
    result = {}

    def timed(name: str, call):
        result[name] = clock.seconds(lambda: result.__setitem__("out", call()))
        return result.pop("out")

    dataset = MappedDataset(folder, n_items, case["rows"])
    model = timed("start", lambda: build(dataset, **case["settings"]))
    lazily = case["settings"]["lazy_item_embedding"]
    optimizer = (LazyAdam if lazily else torch.optim.Adam)(model.parameters(), lr=1e-3)
    batches = [batch_of(case["batch"], n_items, rng) for _ in range(case["steps"] + 1)]
    losses = []

    def step(batch) -> None:
        optimizer.zero_grad()
        loss = model.calculate_loss(batch)
        loss.backward()
        clip_gradients(model.parameters(), max_norm=5)
        optimizer.step()
        losses.append(loss.item())

    model.train()
    seconds = alternate({"step": step}, batches, clock=clock)["step"]
    result |= {"step": statistics.median(seconds), "steps": seconds, "losses": losses}
    result["own_mib_training"] = own.largest

    model.eval()
    optimizer.zero_grad()
    users = batch_of(case["users"], n_items, rng)
    order = torch.from_numpy(rng.permutation(n_items))

    @torch.no_grad()
    def rank() -> torch.Tensor:
        parts = []
        for start in range(0, case["users"], case["batch"]):
            part = {name: values[start : start + case["batch"]] for name, values in users.items()}
            queries, vectors = model.query_and_item_vectors(part)
            parts.append(rank_products(queries, vectors, part["item_id"], order, chunk=model.softmax_chunk).rank)
        return torch.cat(parts)

    with torch.no_grad():
        timed("item vectors", lambda: model.query_and_item_vectors({k: v[:1] for k, v in users.items()}))
    ranks = timed("ranks", rank)
    result["mean rank"] = ranks.double().mean().item()
    result |= {"own_mib": own.stop(), "own_growth_mib": own.largest - before}
    return result | {"whole_mib": peak.mib()["peak_mib"], "before_mib": resident}


def in_own_process(case: dict, threads: int) -> dict:
    """What `measure` finds.

    Raises:
        SystemExit: the process failed; what it said comes with it.
    """
    command = [
        sys.executable,
        "-m",
        "benchmarks.large_catalogue",
        "--threads",
        str(threads),
        "--case",
        json.dumps(case),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment)
    if done.returncode:
        raise SystemExit(f"the measurement ended with status {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------- the softmax alone


def compare_losses(n_items: int, n_rows: int, settings: dict, *, width: int = 128, repeats: int = 3) -> dict:
    """Seconds of forward and backward pass, alternating, on fixed vectors."""
    torch.manual_seed(0)
    queries, vectors = (F.normalize(torch.randn(n, width), dim=1).requires_grad_() for n in (n_rows, n_items))
    target, chunk = torch.randint(1, n_items, (n_rows,)), settings["softmax_chunk"]
    drawn = torch.cat([target, torch.randint(n_items, (settings["softmax_negatives"],))]).unique()
    own, correction = torch.searchsorted(drawn, target), torch.full((len(drawn),), math.log(n_items / len(drawn)))
    losses = {
        "full": lambda: F.cross_entropy(queries @ vectors.T / 0.07, target),
        "chunked": lambda: chunked_softmax_loss(queries, vectors, target, temperature=0.07, chunk=chunk),
        "sampled": lambda: sampled_softmax_loss(
            queries, F.embedding(drawn, vectors), own, correction, temperature=0.07
        ),
    }
    exact = [torch.autograd.grad(losses[name](), (queries, vectors)) for name in ("full", "chunked")]
    require(all(map(torch.allclose, *exact)), "the chunked softmax is not the full one")

    def run(loss):
        return lambda _: torch.autograd.grad(loss(), (queries, vectors))

    seconds = alternate({name: run(loss) for name, loss in losses.items()}, range(repeats + 1), clock=Clock())
    for name, times in seconds.items():
        ratio = times_as_fast(times, seconds["full"])
        print(f"  {name:8s} {statistics.median(times):8.3f} s, {ratio:.1f} times as fast as the full softmax")
    return seconds


# ---------------------------------------------------------------- all


def exponent(sizes: list[int], memory: list[float]) -> float:
    """Slope of the logarithm of memory over that of N."""
    return float(np.polyfit(np.log(sizes), np.log(memory), 1)[0])


def tell(result: dict) -> None:
    print(
        f"  start {result['start']:.1f} s; step {result['step']:.2f} s (median of {len(result['steps'])}); "
        f"item vectors {result['item vectors']:.1f} s, ranks {result['ranks']:.1f} s; "
        f"loss {result['losses'][0]:.2f} -> {result['losses'][-1]:.2f}, mean rank {result['mean rank']:,.0f}"
    )
    print(
        f"  own memory {result['own_mib'] / 1024:.2f} GiB ({result['own_mib_training'] / 1024:.2f} in training), "
        f"{result['own_growth_mib'] / 1024:.2f} above that of the imports; with mapped pages "
        f"{result['whole_mib'] / 1024:.2f} GiB"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--rows", type=int, default=10, help="text vectors per item")
    parser.add_argument("--picture-rows", type=int, default=1, help="picture vectors per item; 0 for no pictures")
    parser.add_argument("--width", type=int, default=384, help="of the vectors")
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="of the files")
    parser.add_argument("--limit-gib", type=float, default=12.0, help="own memory that must suffice")
    parser.add_argument("--softmax", choices=("sampled", "chunked", "full"), default="sampled")
    parser.add_argument("--chunk", type=int, default=4096, help="softmax_chunk")
    parser.add_argument("--negatives", type=int, default=4096, help="softmax_negatives")
    parser.add_argument("--dense-adam", action="store_true", help="without lazy_item_embedding")
    parser.add_argument("--batch", type=int, default=1024, help="rows per step, and users ranked together")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--users", type=int, default=1024, help="to rank all items for")
    parser.add_argument("--fit", type=int, nargs="+", metavar="N", help="numbers of items, to fit memory to")
    parser.add_argument(
        "--loss", action="store_true", help="the softmax alone, at 20,000 items and --items up to 100,000"
    )
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS") or 1), help="of torch")
    parser.add_argument("--processor-time", action="store_true", help="instead of the wall clock's")
    parser.add_argument("--folder", type=Path, help="where the features go; the system's temporary folder otherwise")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.argv = sys.argv[:1]  # RecBole reads it too
    torch.set_num_threads(options.threads)
    if options.case:
        print(json.dumps(measure(json.loads(options.case))))
        return 0
    calibration = calibrate()
    print(calibration)
    results, status = run(options, calibration)
    if options.json:
        write_json(options.json, results, calibration, settings={k: str(v) for k, v in vars(options).items()})
    return status


def run(options: argparse.Namespace, calibration: Calibration) -> tuple[dict, int]:
    settings = {
        "softmax": options.softmax, "softmax_chunk": options.chunk, "softmax_negatives": options.negatives,
        "lazy_item_embedding": options.softmax == "sampled" and not options.dense_adam,
    }  # fmt: skip
    if options.loss:
        results = {}
        for n_items in sorted({20_000, min(options.items, 100_000)}):
            print(f"softmax over {n_items:,} items, {options.batch} rows, width 128, forward and backward:")
            results[str(n_items)] = compare_losses(n_items, options.batch, settings)
        return results, 0
    sizes = sorted(options.fit or [options.items])
    n_rows = {"text": options.rows, **({"image": options.picture_rows} if options.picture_rows else {})}
    needed = max(sizes) * sum(n_rows.values()) * options.width * np.dtype(options.dtype).itemsize
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="large_catalogue-") as name:
        folder = Path(name)
        if (free := shutil.disk_usage(folder).free) < 1.1 * needed:
            raise SystemExit(
                f"{folder} has {free / 2**30:.1f} GiB left, the features need {needed / 2**30:.1f}\n"
                "  name another place with --folder, or fewer --items"
            )
        began = time.perf_counter()
        for modality, n in n_rows.items():
            write_rows(folder / f"{modality}.npy", max(300, *sizes) * n, options.width, options.dtype)
        print(f"{needed / 2**30:.2f} GiB of {options.dtype} in {folder}, {time.perf_counter() - began:.0f} s")
        check(folder, n_rows)
        results = {}
        for n_items in sizes:
            print(f"{n_items:,} items, {settings['softmax']} softmax, batches of {options.batch}:")
            case = {
                "items": n_items + 1, "folder": str(folder), "rows": n_rows, "settings": settings,
                "batch": options.batch, "steps": options.steps, "users": options.users,
                "clock": "processor" if options.processor_time else "wall",
            }  # fmt: skip
            results[str(n_items)] = in_own_process(case, options.threads)
            tell(results[str(n_items)])
    return results, judge(sizes, results, options.limit_gib)


def judge(sizes: list[int], results: dict, limit_gib: float) -> int:
    """0 if memory stays within its limits, else 1."""
    own = [results[str(n)]["own_mib"] / 1024 for n in sizes]
    verdict = "within" if max(own) <= limit_gib else "over"
    print(f"own memory {max(own):.2f} GiB at {sizes[-1]:,} items, {verdict} the limit of {limit_gib:g}")
    if len(sizes) == 1:
        return int(verdict == "over")
    found = exponent(sizes, [results[str(n)]["own_growth_mib"] for n in sizes])
    results["exponent"] = found
    print(f"memory above that of the imports grows with N to the power {found:.2f} (limit {LARGEST_EXPONENT})")
    return int(verdict == "over" or found > LARGEST_EXPONENT)


if __name__ == "__main__":
    sys.exit(main())
