"""Command line: train a model on a dataset and print its metrics; or many models on many, and print the table."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EXAMPLES = """\
examples:
  run_recbole_mm --model=MSM4SR --dataset=demo                    pre-train, fine-tune, test once on a made-up shop
  run_recbole_mm --model=SASRec --dataset=demo --epochs=20        RecBole's own models run on the same folder
  run_recbole_mm -m MSM4SR -d dataset/Office --config_files="a.yaml b.yaml" --learning_rate=3e-4
  run_recbole_mm --model=MSM4SR --dataset=Office --train_stage=finetune --pretrained_path=saved/….pth
  run_recbole_mm --resume=saved/…-last.pth                        continue an interrupted run
  run_recbole_mm --model=MSM4SR,SASRec,Transitions --dataset=Office,Arts --seeds=2020,2021,2022 --jobs=2
                                                                  the product, without runs that are done; a table
  run_recbole_mm --model=MSM4SR,SASRec --dataset=Office --search=space.yaml --trials=20 --seeds=2020,2021,2022
                                                                  the same after a search on validation data
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``run_recbole_mm``.

    Returns:
        Exit code: 0 done, 1 training failed, 2 wrong usage or setting, 3 wrong data, 4 machine (disk, rights),
        5 interrupted, 6 a checkpoint or file refused.
    """
    args, rest = _parser().parse_known_args(argv)
    if args.help:
        _print_help()
        return 0
    from recbole_mm.errors import EXIT_INTERRUPTED, RecBoleMMError, exit_code_of

    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the last epoch's state is saved
        from recbole_mm.settings import parse_arguments

        settings, origins = parse_arguments(rest)
        if _is_product(args):
            return _run_product(args, settings, origins)
        from recbole_mm.quick_start import run

        run(
            args.model, args.dataset, (args.config_files or "").split(), settings,
            origins=origins, resume=args.resume, runs_file=args.runs_file, profile=args.profile,
        )  # fmt: skip
        return 0
    except (RecBoleMMError, OSError, MemoryError) as error:
        if args.debug:
            raise
        return exit_code_of(error)
    except KeyboardInterrupt:
        if _is_product(args):  # which has told how to go on
            return EXIT_INTERRUPTED
        trainer = sys.modules.get("recbole_mm.trainer")
        last = trainer.Trainer.last_saved if trainer else None
        print(f"interrupted{f'; continue with: run_recbole_mm --resume={last}' if last else ''}", file=sys.stderr)
        return EXIT_INTERRUPTED


def _is_product(args: argparse.Namespace) -> bool:
    """Whether several runs are asked for, or what belongs to several runs."""
    several = any("," in (names or "") for names in (args.model, args.dataset))
    asked = (args.seeds, args.knockouts, args.jobs, args.cluster, args.search, args.trials, args.search_seconds)
    return several or args.floors or args.dry_run or any(value is not None for value in asked)


def _run_product(args: argparse.Namespace, settings: dict[str, Any], origins: dict[str, str]) -> int:
    from recbole_mm import distributed
    from recbole_mm.errors import SettingError
    from recbole_mm.product import parse_names, parse_seeds, run_product
    from recbole_mm.search import chooser

    if distributed.place() is not None:
        raise SettingError("torchrun shares one run; start several without it, and add --nproc=2 to share each of them")
    if args.profile:
        raise SettingError("--profile looks into one run; name one model and one dataset, and no --seeds")
    if args.resume is not None:
        raise SettingError("--resume continues one run; the same command again continues many")
    return run_product(
        parse_names(args.model, "model"), parse_names(args.dataset, "dataset"),
        seeds=[] if args.seeds is None else parse_seeds(args.seeds),
        knockouts=args.knockouts, floors=args.floors, n_jobs=args.jobs, dry_run=args.dry_run,
        runs_file=args.runs_file, cluster=args.cluster,
        config_files=(args.config_files or "").split(), settings=settings, origins=origins, choose=chooser(args),
    )  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    from recbole_mm.records import RUNS_FILE
    from recbole_mm.search import add_arguments

    parser = argparse.ArgumentParser(
        prog="run_recbole_mm", add_help=False, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train a recommender on a dataset folder, select the epoch on validation data, test once.",
        epilog=EXAMPLES,
    )  # fmt: skip
    parser.add_argument(
        "--model", "-m", metavar="NAME", help="a model of ours or a sequential model of RecBole; several: A,B"
    )
    parser.add_argument(
        "--dataset", "-d", metavar="FOLDER", help="a folder below dataset/, or a path; demo makes itself; several: X,Y"
    )
    parser.add_argument(
        "--config_files", metavar="FILES", help='YAML files with settings, "a.yaml b.yaml"; the later one wins'
    )
    parser.add_argument("--resume", metavar="FILE", help="continue an interrupted training from its …-last.pth")
    parser.add_argument(
        "--runs-file", metavar="FILE", type=Path, default=RUNS_FILE,
        help="where a line is written for every run, %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--profile", action="store_true", help="watch some steps: tell what costs most, write traces for a browser"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--help", "-h", action="store_true", help="this text, models, datasets found")
    many = parser.add_argument_group(
        "many runs", "The product of models, datasets, knock-outs and seeds. Runs that are in --runs-file are skipped."
    )
    many.add_argument("--seeds", metavar="S,T", help="each run once with each seed, such as 2020,2021,2022")
    many.add_argument(
        "--knockouts", metavar="LIST", help='auto: each modality that a model uses; or "image:noise;text:noise"'
    )
    many.add_argument(
        "--floors", action="store_true", help="add popularity, transitions, item-kNN and content-kNN to each dataset"
    )
    many.add_argument("--jobs", metavar="N", type=int, help="runs at once, each with its share of the cores; 1")
    many.add_argument("--dry-run", action="store_true", help="print the plan and run nothing")
    many.add_argument("--cluster", metavar="ray", help="run on Ray: ray for this machine, or ray://host:port")
    add_arguments(parser)
    parser.add_argument("--KEY=VALUE", dest="_", metavar="", help="any setting, such as --epochs=20 or --topk=[10,20]")
    return parser


def _print_help() -> None:
    from recbole_mm.config import datasets_in
    from recbole_mm.model import ALIASES, model_names, recbole_model_names

    _parser().print_help()
    print("\nmodels:")
    print(
        f"  recbole_mm  {', '.join(model_names())}; also known as {', '.join(f'{a} = {b}' for a, b in ALIASES.items())}"
    )
    print(f"  RecBole     {', '.join(recbole_model_names())}")
    found = datasets_in(Path("dataset"))
    print(f"\ndatasets in dataset/: {', '.join(found) or 'none yet'}; demo makes itself on first use")
    print("settings with their meaning: the YAML files in properties/, and RecBole's documentation")


if __name__ == "__main__":
    sys.exit(main())
