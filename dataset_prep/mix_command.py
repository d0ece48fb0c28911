"""The command ``python -m dataset_prep mix``."""

from __future__ import annotations

import argparse
from pathlib import Path

from dataset_prep.arguments import folder, names

EXAMPLES = """examples:
  python -m dataset_prep mix --datasets dataset/Food dataset/Home --name mix
  python -m dataset_prep mix --datasets dataset/Food dataset/Home --name mix --features text
then:
  python run_recbole_mm.py --model=UniSRec --dataset=mix --train_stage=pretrain
  python run_recbole_mm.py --model=UniSRec --dataset=Office --pretrained_path=saved/....pth

Users and items are called Food-<token> and Home-<token>. A feature must be made by one encoder, in one width.
"""


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add ``mix`` to the commands of ``python -m dataset_prep``."""
    mix = commands.add_parser(
        "mix",
        help="make one folder of several, to pre-train on all of them",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    mix.add_argument(
        "--datasets", type=folder, nargs="+", required=True, metavar="FOLDER", help="prepared folders, of one kind"
    )
    mix.add_argument("--name", required=True, help="of the folder to make")
    mix.add_argument("--out", type=Path, default=Path("dataset"), metavar="DIR", help="gets the folder NAME (dataset)")
    mix.add_argument("--features", type=names, metavar="A,B", help="features to stack (those that all datasets have)")
    mix.add_argument("--overwrite", action="store_true", help="replace a folder prepared here before")
    mix.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from dataset_prep.folder_writer import place_of, refuse_existing
    from dataset_prep.mix import mix

    place = place_of(options.out, options.name)
    refuse_existing(place, overwrite=options.overwrite)  # before everything is read
    print(mix(options.datasets, place, features=options.features, overwrite=options.overwrite))
    print(f"pre-train with: python run_recbole_mm.py --model=UniSRec --dataset={place} --train_stage=pretrain")
