"""Command line: train a model on a dataset and print its metrics."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

EXIT_MACHINE, EXIT_INTERRUPTED = 4, 5  # those of errors in what the user gave stand with the errors

EXAMPLES = """\
examples:
  run_recbole_mm --model=MSM4SR --dataset=demo                    pre-train, fine-tune, test once on a made-up shop
  run_recbole_mm --model=SASRec --dataset=demo --epochs=20        RecBole's own models run on the same folder
  run_recbole_mm -m MSM4SR -d dataset/Office --config_files="a.yaml b.yaml" --learning_rate=3e-4
  run_recbole_mm --model=MSM4SR --dataset=Office --train_stage=finetune --pretrained_path=saved/….pth
  run_recbole_mm --resume=saved/…-last.pth                        continue an interrupted run
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
    from recbole_mm.errors import RecBoleMMError

    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the last epoch's state is saved
        from recbole_mm.config import parse_arguments
        from recbole_mm.quick_start import run

        settings, origins = parse_arguments(rest)
        run(args.model, args.dataset, (args.config_files or "").split(), settings, origins=origins, resume=args.resume)
        return 0
    except RecBoleMMError as error:
        if args.debug:
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except (OSError, MemoryError) as error:
        if args.debug:
            raise
        where = f"{error.filename}: " if getattr(error, "filename", None) else ""
        print(f"the machine gave up: {where}{getattr(error, 'strerror', None) or 'out of memory'}", file=sys.stderr)
        return EXIT_MACHINE
    except KeyboardInterrupt:
        trainer = sys.modules.get("recbole_mm.trainer")
        last = trainer.Trainer.last_saved if trainer else None
        print(f"interrupted{f'; continue with: run_recbole_mm --resume={last}' if last else ''}", file=sys.stderr)
        return EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="run_recbole_mm", add_help=False, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train a recommender on a dataset folder, select the epoch on validation data, test once.",
        epilog=EXAMPLES,
    )  # fmt: skip
    parser.add_argument("--model", "-m", metavar="NAME", help="a model of ours or a sequential model of RecBole")
    parser.add_argument(
        "--dataset", "-d", metavar="FOLDER", help="a folder below dataset/, or a path; demo makes itself"
    )
    parser.add_argument(
        "--config_files", metavar="FILES", help='YAML files with settings, "a.yaml b.yaml"; the later one wins'
    )
    parser.add_argument("--resume", metavar="FILE", help="continue an interrupted training from its …-last.pth")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--help", "-h", action="store_true", help="this text, models, datasets found")
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
