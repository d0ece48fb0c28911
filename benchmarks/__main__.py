"""Time and memory of MSM4SR (both stages), MMSBR, UniSRec and RecBole's SASRec at 1,000, 5,000 and 20,000 items, beside
literal, slow versions: training step, evaluation, start-up, peak memory; the machine's rate of matrix products, and the
share of it that is reached.

    python -m benchmarks                            everything, a quarter of an hour on two idle cores
    python -m benchmarks --quick                    a toy in a minute, to see that everything works
    python -m benchmarks --models mmsbr --items 5000 --threads 1 --clock processor
    python -m benchmarks --compare OLD.json         what became slower or larger; with a second file, without measuring
    python -m benchmarks --list                     the other measurements here
    python -m benchmarks mmsbr --quick              one of them, the same as python -m benchmarks.mmsbr --quick

Before times are taken, loss, gradient and scores of both versions are compared in float64, and a model whose versions
differ is not timed. Calls alternate, and medians are told. Each measurement has a process of its own. A literal version
that needs more time than --budget, or more memory than is at hand, is left out, and the reason is printed. Ours and the
literal version run with autograd's anomaly mode off; of MMSBR and SASRec the latter is also timed as shipped, with that
mode on, since importing RecBole's models switches it on.

A table is printed; --out is a folder for benchmark.json, benchmark.md and the plot benchmark.html.
"""

from __future__ import annotations

import argparse
import ast
import os
import runpy
import sys
import time
from dataclasses import replace
from pathlib import Path

COMMAND = "python -m benchmarks"


# ---------------------------------------------------------------- the other commands


def commands() -> dict[str, str]:
    """Modules of this package that can be run, with the first sentence of what they say."""
    found = {}
    for file in sorted(Path(__file__).parent.glob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        has_main = any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)
        if has_main and file.stem not in ("__main__", "one_case"):
            found[file.stem] = (ast.get_docstring(tree) or "").split("\n\n")[0].replace("\n", " ")
    return found


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", metavar="MODEL", help="msm4sr-pretrain, msm4sr-finetune, mmsbr, unisrec, sasrec"
    )
    parser.add_argument("--items", type=int, nargs="+", metavar="N")
    parser.add_argument("--repeats", type=int, help="calls of each side that count; 3")
    parser.add_argument("--budget", type=float, help="seconds of a literal version in each measurement; 40")
    parser.add_argument("--threads", type=int, help="of torch; all cores")
    parser.add_argument(
        "--clock",
        choices=("wall", "processor"),
        default="wall",
        help="processor seconds, with one thread, on a busy machine",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="a toy: sizes and repeats are set")
    parser.add_argument("--out", type=Path, default=Path("benchmark"), help="folder; ./benchmark")
    parser.add_argument("--json", type=Path, help="the numbers, in this file instead of benchmark.json in --out")
    parser.add_argument(
        "--compare", type=Path, nargs="+", metavar="JSON", help="an older file; a second one is the newer"
    )
    parser.add_argument("--list", action="store_true", help="what else can be measured")
    return parser.parse_args(arguments)


# ---------------------------------------------------------------- the run


def measure(args: argparse.Namespace) -> tuple[dict, bool]:
    """Measure, print, write; what was written, and whether all went well."""
    import torch
    from tqdm import tqdm

    from benchmarks import measuring, report
    from benchmarks.calibration import calibrate
    from benchmarks.clocks import Clock
    from benchmarks.results import read_json, write_json
    from benchmarks.startup import import_seconds

    options = options_of(args)
    torch.set_num_threads(options.threads)
    begin, clock = time.perf_counter(), Clock(options.device, options.clock)
    calibration = calibrate(clock, seconds_each=options.calibration)
    print(f"torch {torch.__version__}, {calibration}", flush=True)
    with tqdm(total=options.n_processes(), unit="process", dynamic_ncols=True, disable=None) as bar:

        def step(what: str) -> None:
            bar.set_description(what)
            bar.update()

        rows = measuring.measure_all(options, step=step, say=lambda line: bar.write(line))
    again = calibrate(clock, seconds_each=options.calibration)
    calibration = max(calibration, again, key=lambda found: found.gflops)

    fits, figures, skipped = report.fits(rows), report.figures(rows), report.left_out(rows)
    imports, seconds = import_seconds(), time.perf_counter() - begin
    print("", report.as_text(rows), report.NOTES, f"Imports take {imports:.1f} processor seconds before.", sep="\n\n")
    print(f"\n{report.told_fits(fits)}")
    told = [f"{'reached' if f['reached'] else 'NOT REACHED'}: {f['text']}" for f in figures]
    for title, lines in (("figures", told), ("left out", skipped)):
        if lines:
            print(f"\n{title}", *(f"  {line}" for line in lines), sep="\n")

    path = args.json or args.out / "benchmark.json"
    write_json(
        path, rows, calibration, settings=options.to_dict(), seconds=seconds, imports=imports,
        fits=[fit._asdict() for fit in fits], figures=figures,
    )  # fmt: skip
    write_views(args.out, read_json(path))
    print(f"\n{seconds / 60:.1f} minutes; {path}, {args.out}/benchmark.md and .html")
    return read_json(path), not report.has_failed(rows)


def options_of(args: argparse.Namespace):
    """What `benchmarks.measuring` takes.

    Raises:
        ValueError: an option that cannot be.
    """
    import torch

    from benchmarks import measuring
    from benchmarks.cases import CASES

    options = measuring.Options(threads=args.threads or os.cpu_count() or 1, device=args.device, clock=args.clock)
    if args.quick:
        options = measuring.toy(options)
    if unknown := [model for model in args.models or [] if model not in CASES]:
        raise ValueError(f"--models: {', '.join(unknown)} is none of {', '.join(CASES)}")
    if args.items and min(args.items) < 100:
        raise ValueError(f"--items: {min(args.items)} is too few, at least 100 are needed")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device=cuda: PyTorch finds no GPU; leave --device out")
    given = {
        "cases": args.models, "items": sorted(set(args.items)) if args.items else None, "repeats": args.repeats,
        "budget": args.budget,
    }  # fmt: skip
    return replace(options, **{key: value for key, value in given.items() if value})


def write_views(folder: Path, told: dict) -> None:
    """benchmark.md and benchmark.html of a file of measurements."""
    from benchmarks import plot, report

    rows, machine, rate = told["results"], told["machine"], told["calibration"]
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    on = machine.get("gpu") or f"{machine['processor']}, {threads}"
    title = f"{on}, float32 matrix products at {rate['gflops']:.0f} GFLOP/s"
    figures = [f"- {'reached' if f['reached'] else '**not reached**'}: {f['text']}" for f in told["figures"]]
    skipped = [f"- left out: {line}" for line in report.left_out(rows)]
    parts = [f"# Benchmark of {told['when'][:10]}", title, report.as_markdown(rows), report.NOTES]
    parts += ["\n".join(figures), "\n".join(skipped)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "benchmark.md").write_text("\n\n".join(filter(None, parts)) + "\n", encoding="utf-8")
    drawing = plot.svg(rows, f"Cost against the number of items: {title}")
    (folder / "benchmark.html").write_text(plot.page(drawing, "Cost against the number of items"), encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in commands():
        sys.argv = [f"{COMMAND} {arguments[0]}", *arguments[1:]]
        runpy.run_module(f"benchmarks.{arguments[0]}", run_name="__main__")
        return 0
    args = parse(arguments)
    sys.argv = sys.argv[:1]  # RecBole reads it too
    if args.list:
        width = max(map(len, commands()))
        print(*(f"python -m benchmarks.{name:{width}s}  {what}" for name, what in commands().items()), sep="\n")
        return 0
    from benchmarks.comparing import compare
    from benchmarks.results import read_json

    try:
        if args.compare and len(args.compare) > 2:
            raise ValueError("--compare takes an older file and perhaps a newer one")
        older = [read_json(path) for path in args.compare or []]
        new, well = (older.pop(), True) if len(older) == 2 else measure(args)
        lines, worse = compare(older[0], new) if older else ([], False)
    except ValueError as error:
        print(f"{COMMAND}: {error}", file=sys.stderr)
        return 2
    if lines:
        print(f"\nbeside {args.compare[0]}", *(f"  {line}" for line in lines), sep="\n")
    return 1 if worse or not well else 0


if __name__ == "__main__":
    sys.exit(main())
