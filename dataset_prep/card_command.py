"""The command ``python -m dataset_prep describe``."""

from __future__ import annotations

import argparse

from dataset_prep.arguments import folder

EXAMPLES = """examples:
  python -m dataset_prep describe dataset/shop             figures of users, items, content, features
  python -m dataset_prep describe dataset/shop --card      the same, and write DATASET.md with pictures
"""


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add ``describe`` to the commands of ``python -m dataset_prep``."""
    parser = commands.add_parser(
        "describe",
        help="what is in a folder, in figures; and its dataset card",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=folder, metavar="FOLDER")
    parser.add_argument("--card", action="store_true", help="write DATASET.md and card/*.png, or write them anew")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from dataset_prep.card import CARD, write_card
    from dataset_prep.description import describe
    from dataset_prep.locking import locked

    if not options.card:
        print(describe(options.folder))
        return
    with locked(options.folder):
        print(write_card(options.folder))
    print(f"{options.folder / CARD}: written")
