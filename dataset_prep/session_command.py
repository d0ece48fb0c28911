"""The command ``python -m dataset_prep sessions``."""

from __future__ import annotations

import argparse
from dataclasses import asdict, fields
from pathlib import Path

from dataset_prep.interactions import Columns
from dataset_prep.price import PriceSettings, add_price_arguments, price_settings
from dataset_prep.session_folder import place_of
from dataset_prep.sessions import CHOICES, ONLY_WITH, SessionSettings, prepare_sessions
from recbole_mm.errors import SettingError

EXAMPLES = """examples:
  python -m dataset_prep sessions --interactions clicks.csv --items items.csv --name shop --sessions gap --gap 1800
  python -m dataset_prep sessions --interactions a.inter --items a.item --name a --sessions basket --basket session_id

FILE is a RecBole atomic file, or a CSV or TSV with a header. In a CSV of items, the column category is one name, and
categories is a list of names, parted by spaces. Baskets need no user; those of different users are kept apart.
Times are unix seconds, or see --time-unit. Filters run until nothing changes. The split by time puts the sessions that
end last into the test, those before into validation; sessions that end at the same time stay together unless a part
would be empty.
"""


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add ``sessions`` to the commands of ``python -m dataset_prep``."""
    parser = commands.add_parser(
        "sessions",
        help="make sessions out of interactions, and price levels",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = SessionSettings(sessions="gap")

    def choice(name: str, help: str) -> None:
        value = getattr(default, name)
        parser.add_argument(f"--{_option(name)}", choices=CHOICES[name], default=value, help=f"{help} ({value})")

    def number(name: str, metavar: str, help: str) -> None:
        value = getattr(default, name)
        parser.add_argument(f"--{_option(name)}", type=type(value), metavar=metavar, help=f"{help} ({value:g})")

    parser.add_argument("--interactions", type=Path, required=True, metavar="FILE", help="who had which item when")
    parser.add_argument("--items", type=Path, metavar="FILE", help="table of items; without it, no .item and no prices")
    parser.add_argument("--name", required=True, help="of the folder that is made")
    parser.add_argument("--out", type=Path, default=Path("dataset"), help="folder that gets the folder NAME (dataset)")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder prepared before, with its features")
    parser.add_argument(
        "--sessions", choices=CHOICES["sessions"], required=True,
        help="what a session is: a basket, or of a user all until a --gap, a UTC day, or everything",
    )  # fmt: skip
    for role, name in asdict(Columns()).items():
        parser.add_argument(f"--{role}", metavar="COLUMN", help=f"name of the column ({name})")
    choice("time_unit", "of the times since 1970")
    number("gap", "SECONDS", "longest time between two interactions of a session")
    choice("session_order", "of items in a session: by time and line, or shuffled")
    number("seed", "N", "of the shuffling")
    choice("duplicates", "rows equal in user, item and time (and basket)")
    choice("repeats", "an item directly after itself in a session")
    number("min_item_count", "N", "interactions of an item, at least")
    number("min_length", "N", "items of a session, at least")
    number("longest", "N", "newest items of a session that are kept")
    choice("split", "the sessions that end last, or the last items of each session, are the test")
    number("valid_share", "SHARE", "of the sessions, for validation")
    number("test_share", "SHARE", "of the sessions, for the test")
    choice("unseen", "validation and test items that training has not")
    choice("prefixes", "parts that get a row for each item after a session's first, not for the last only")
    choice("bad_rows", "rows without a usable id or time, second rows of an item")
    add_price_arguments(parser)
    parser.set_defaults(run=_run)


def _option(name: str) -> str:
    return name.replace("_", "-")


def _names(settings: type) -> list[str]:
    return [column.name for column in fields(settings)]


def _run(options: argparse.Namespace) -> None:
    folder = place_of(options.out, options.name)
    prices = price_settings(options)
    if options.items is None and prices != PriceSettings():
        raise SettingError("options of price levels need a table of items: --items FILE")
    given = {name: value for name, value in vars(options).items() if value is not None}
    for name, (owner, value) in {**ONLY_WITH, "basket": ("sessions", "basket")}.items():
        if name in given and given[owner] != value:
            raise SettingError(f"--{_option(name)} belongs to --{_option(owner)} {value}; leave it out")
    report = prepare_sessions(
        folder,
        interactions=options.interactions,
        items=options.items,
        settings=SessionSettings(**{name: given[name] for name in _names(SessionSettings) if name in given}),
        columns=Columns(**{name: given[name] for name in _names(Columns) if name in given}),
        prices=prices,
        overwrite=options.overwrite,
    )
    print(f"{folder}: made\n{report}")
