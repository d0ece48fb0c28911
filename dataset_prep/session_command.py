"""The command ``python -m dataset_prep sessions``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from dataset_prep.card import CARD, write_card
from dataset_prep.folder_writer import place_of
from dataset_prep.interactions import Columns
from dataset_prep.price import PriceSettings, add_price_arguments, price_settings
from dataset_prep.session_settings import (
    CHOICES,
    MEANT_WHEN,
    SessionSettings,
    option_of,
    refuse_what_means_nothing,
)
from dataset_prep.sessions import prepare_sessions
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
    add_setting_options(parser, SessionSettings(sessions="gap"), CHOICES, OPTIONS)
    add_price_arguments(parser)
    parser.set_defaults(run=_run)


OPTIONS = {  # of SessionSettings: what a number is called, and what the option is for
    "time_unit": ("", "of the times since 1970"),
    "gap": ("SECONDS", "longest time between two interactions of a session"),
    "session_order": ("", "of items in a session: by time and line, or shuffled"),
    "seed": ("N", "of the shuffling, and of the draw of cold items"),
    "duplicates": ("", "rows equal in user, item and time (and basket)"),
    "repeats": ("", "an item directly after itself in a session"),
    "min_item_count": ("N", "interactions of an item, at least"),
    "min_length": ("N", "items of a session, at least"),
    "longest": ("N", "newest items of a session that are kept"),
    "split": ("", "the sessions that end last, or the last items of each session, are the test"),
    "valid_share": ("SHARE", "of the sessions, for validation"),
    "test_share": ("SHARE", "of the sessions, for the test"),
    "valid_from": ("TIME", "validation begins here, instead of shares: unix seconds, or a date such as 2016-07-01"),
    "test_from": ("TIME", "the test begins here"),
    "cuts_from": ("FOLDER", "take both moments from this prepared folder"),
    "cold_items": ("", "validation and test items that training has not"),
    "cold_share": ("SHARE", "of the items, taken out of training, so that they are cold"),
    "prefixes": ("", "parts that get a row for each item after a session's first, not for the last only"),
    "bad_rows": ("", "rows without a usable id or time, second rows of an item"),
}


def add_setting_options(
    parser: argparse._ActionsContainer,
    default: Any,
    choices: Mapping[str, Sequence[str]],
    options: Mapping[str, tuple[str, str]],
) -> None:
    """An option for each setting of a dataclass that is in ``options``; those that are not given are None.

    Args:
        default: settings with their default values, for the help.
        choices: values that a setting can have.
        options: metavar and help by name; settings without a default are texts, or folders if that is the metavar.
    """
    for name, (metavar, text) in options.items():
        value = getattr(default, name)
        kind = type(value) if value is not None else Path if metavar == "FOLDER" else str
        shown = "" if value is None else f" ({value:g})" if isinstance(value, (int, float)) else f" ({value})"
        named = {"choices": choices[name]} if name in choices else {"type": kind, "metavar": metavar}
        parser.add_argument(option_of(name), help=text + shown, **named)


def given_settings(options: argparse.Namespace, kind: type) -> dict[str, Any]:
    """What was given of the settings of a dataclass."""
    found = {field.name: getattr(options, field.name, None) for field in fields(kind)}
    return {name: value for name, value in found.items() if value is not None}


def _run(options: argparse.Namespace) -> None:
    folder = place_of(options.out, options.name)
    prices = price_settings(options)
    if options.items is None and prices != PriceSettings():
        raise SettingError("options of price levels need a table of items: --items FILE")
    if options.basket is not None and options.sessions != "basket":
        raise SettingError("--basket belongs to --sessions basket; leave it out")
    given = given_settings(options, SessionSettings)
    settings = SessionSettings(**given)
    refuse_what_means_nothing(settings, given, MEANT_WHEN)
    report = prepare_sessions(
        folder,
        interactions=options.interactions,
        items=options.items,
        settings=settings,
        columns=Columns(**given_settings(options, Columns)),
        prices=prices,
        overwrite=options.overwrite,
        finish=write_card,
    )
    print(f"{folder}: made\n{report}\nthe dataset card: {folder / CARD}")
