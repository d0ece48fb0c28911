"""Command line of the preparation: ``python -m dataset_prep COMMAND``; see ``--help``.

Exit codes: 0 done, 2 a wrong argument or setting, 3 wrong data, 4 machine (disk, rights), 5 interrupted,
6 a file refused because it could run code.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from dataset_prep import (
    card_command,
    feature_command,
    format_command,
    mix_command,
    picture_command,
    preparation_command,
    recipe_command,
    reduction_command,
    released,
    session_command,
)
from dataset_prep.arguments import folder
from dataset_prep.card import refresh_card
from dataset_prep.price import add_price_arguments
from recbole_mm.data.layout import check_folder
from recbole_mm.errors import EXIT_INTERRUPTED, DatasetError, SettingError, exit_code_of

DESCRIPTION = """Make dataset folders and the features of their items.

Exit codes: 0 done, 2 a wrong argument or setting, 3 wrong data, 4 machine (disk, rights), 5 interrupted,
6 a file refused because it could run code."""
EXAMPLES = """examples:
  python -m dataset_prep demo                                                   a made-up shop in dataset/demo
  python -m dataset_prep amazon --reviews Office_5.json.gz --meta meta_Office.json.gz --name Office    in dataset/Office
  python -m dataset_prep table --interactions orders.csv --items goods.csv --name shop    anyone's data in dataset/shop
  python -m dataset_prep features --dataset dataset/shop --feature text         tf-idf of title, description, ...
  python -m dataset_prep features --dataset dataset/shop --feature image        histograms of the pictures
  python -m dataset_prep sessions --interactions shop.csv --name shop --sessions gap    sessions in dataset/shop
  python -m dataset_prep prices --dataset dataset/shop                          price levels of the items
  python -m dataset_prep recipe Office --reviews R --meta M                     everything about a known dataset
  python -m dataset_prep pictures --dataset dataset/shop                        download the pictures of the items
  python -m dataset_prep reduce --dataset dataset/shop --features image --width 64      PCA, the same for pseudo twins
  python -m dataset_prep import unisrec --folder Scientific --name Scientific   folders of other tools; also export
  python -m dataset_prep released --folder mmsbr/Cellphones --name Cellphones   the data that MMSBR's authors released
  python -m dataset_prep mix --datasets dataset/Food dataset/Home --name mix    one folder of several, to pre-train on
  python -m dataset_prep describe dataset/shop --card                           figures, and DATASET.md
  python -m dataset_prep check dataset/shop                                     is everything there and whole?
"""
PRICE_EXAMPLES = """examples:
  python -m dataset_prep prices --dataset dataset/shop
  python -m dataset_prep prices --dataset dataset/shop --price-method linear --category-position first

shop.item gets the columns price_level (1 to P in each category; empty without a price) and category, if there is a
column categories. Other columns stay as they are; repeat the command to replace the levels.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; a user's mistake is one message on stderr, no traceback."""
    try:
        _run(arguments)
    except BrokenPipeError:  # somebody reads no further, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (DatasetError, SettingError, OSError) as error:
        return exit_code_of(error)
    except KeyboardInterrupt:
        print("interrupted; nothing half-made was left behind", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def _run(arguments: Sequence[str] | None) -> None:
    options = _parser().parse_args(arguments)
    options.run(options)


def _demo(options: argparse.Namespace) -> None:
    from dataset_prep.demo import make_demo

    folder = Path(options.out) / "demo"
    make_demo(folder, seed=options.seed)
    print(f"{folder}: made; look at it with: python -m dataset_prep check {folder}")


def _prices(options: argparse.Namespace) -> None:
    from dataset_prep.price import price_settings
    from dataset_prep.session_folder import add_price_levels

    print(add_price_levels(options.dataset, price_settings(options)))
    refresh_card(options.dataset)


def _check(options: argparse.Namespace) -> None:
    from dataset_prep.pictures import check_pictures

    remarks = check_folder(options.folder)
    if problems := check_pictures(options.folder, hashes=True):
        listed = "\n".join(f"  - {problem}" for problem in problems[:20])
        raise DatasetError(f"{options.folder}: {len(problems)} problem(s) with its pictures\n{listed}")
    for remark in remarks:
        print(f"remark: {remark}")
    print(f"{options.folder}: whole" + (f", {len(remarks)} remark(s)" if remarks else ""))


def _parser() -> argparse.ArgumentParser:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m dataset_prep", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=plain
    )
    commands = parser.add_subparsers(
        title="commands",
        required=True,
        metavar="COMMAND",
    )

    demo = commands.add_parser("demo", help="make a made-up shop with texts, pictures and a taste to learn")
    demo.add_argument("--out", type=Path, default=Path("dataset"), help="folder that gets the folder demo (dataset)")
    demo.add_argument("--seed", type=int, default=2020, help="same seed, same bytes (2020)")
    demo.set_defaults(run=_demo)

    recipe_command.add_command(commands, _run)
    preparation_command.add_command(commands)
    feature_command.add_command(commands)
    reduction_command.add_command(commands)
    session_command.add_command(commands)
    picture_command.add_command(commands)
    released.add_command(commands)
    format_command.add_commands(commands)
    mix_command.add_command(commands)

    prices = commands.add_parser(
        "prices", help="add price levels to a folder's items", epilog=PRICE_EXAMPLES, formatter_class=plain
    )
    prices.add_argument("--dataset", type=folder, required=True, metavar="FOLDER", help="holds <its name>.item")
    add_price_arguments(prices)
    prices.set_defaults(run=_prices)

    card_command.add_command(commands)
    check = commands.add_parser("check", help="look at everything in a folder and list all problems at once")
    check.add_argument("folder", type=folder, metavar="FOLDER")
    check.set_defaults(run=_check)
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what is finished is kept
    sys.exit(main())
