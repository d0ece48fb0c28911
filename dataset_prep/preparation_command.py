"""The commands ``python -m dataset_prep amazon`` and ``table``: from raw files to a prepared folder."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dataset_prep.arguments import names
from dataset_prep.card import CARD, write_card
from dataset_prep.folder_writer import place_of, refuse_existing
from dataset_prep.interactions import Columns
from dataset_prep.preparation import prepare
from dataset_prep.preparation_settings import CHOICES, PreparationSettings, settings_of
from dataset_prep.price import PriceSettings, add_price_arguments, price_settings
from dataset_prep.session_command import add_setting_options, given_settings
from dataset_prep.session_settings import option_of
from dataset_prep.sources import Source
from dataset_prep.sources.amazon import EDITIONS, AmazonSource
from dataset_prep.sources.download import fetch_category
from dataset_prep.sources.table import ROLES, TIME_UNITS, TableSource
from recbole_mm.errors import SettingError

CLEANING = {  # of PreparationSettings: what a number is called, and what the option is for
    "min_user": ("N", "interactions of a user, at least; with --min-item until nothing changes"),
    "min_item": ("N", "interactions of an item, at least"),
    "duplicates": ("", "first: of those equal in user, item and time; ..._per_pair: of a user's with an item"),
    "without_metadata": ("", "items that the metadata have not"),
    "without_text": ("", "items without title and description"),
    "without_image": ("", "items without a picture's address or path"),
    "without_price": ("", "items without a price that can be read"),
    "max_rejected": ("SHARE", "of a file's rows that may be unusable"),
}
PROTOCOL = {
    "protocol": ("", "who is trained on what"),
    "longest": ("N", "newest items that are kept: of a session, or before a target (time)"),
    "valid_share": ("SHARE", "of the interactions (time) or sessions, for validation"),
    "test_share": ("SHARE", "the same for the test"),
    "valid_from": ("TIME", "validation begins here, instead of shares: unix seconds, or a date such as 2016-07-01"),
    "test_from": ("TIME", "the test begins here"),
    "cuts_from": ("FOLDER", "take both moments from this prepared folder"),
    "cold_items": ("", "items of validation and test that training has not; kept ones are listed in cold_items.txt"),
    "cold_share": ("SHARE", "of the items, taken out of training, so that they are cold"),
    "seed": ("N", "of the draw of cold items, and of --session-order random"),
}
SESSIONS = {
    "sessions": ("", "what a session is: a basket, or of a user all until a --gap, a UTC day, or everything"),
    "gap": ("SECONDS", "longest time between two interactions of a session"),
    "session_order": ("", "of items in a session: by time and line, or shuffled"),
    "repeats": ("", "an item directly after itself in a session"),
    "min_length": ("N", "items of a session, at least"),
    "split": ("", "the sessions that end last, or the last items of each session, are the test"),
    "prefixes": ("", "parts that get a row for each item after a session's first, not for the last only"),
}
PROTOCOLS_TEXT = """protocols:
  leave-one-out   NAME.inter; RecBole takes the last two items of each user; training sees the future of others
  time            NAME.{train,valid,test}.inter: histories of users, cut at the same two moments for all
  sessions        NAME.{train,valid,test}.inter: sessions (see --sessions), split by their last time or leave-one-out
"""
AMAZON_EXAMPLES = f"""examples:
  python -m dataset_prep amazon --reviews Office_5.json.gz --meta meta_Office.json.gz --name Office
  python -m dataset_prep amazon --download Office_Products --edition 2023 --name Office --protocol time
  python -m dataset_prep amazon --reviews a.json.gz --meta b.json.gz --name Phones --protocol sessions --sessions day

{PROTOCOLS_TEXT}
The edition is told by the content. Rows that cannot be used are listed in rejected.tsv.gz.
"""
TABLE_EXAMPLES = f"""examples:
  python -m dataset_prep table --interactions orders.csv --items goods.csv --name shop
  python -m dataset_prep table --interactions clicks.parquet --user visitor --item sku --time at --name shop
  python -m dataset_prep table --interactions a.csv --items b.csv --categories department,group --image file --name shop

{PROTOCOLS_TEXT}
Tables are CSV, TSV, RecBole atomic files or Parquet. Rows that cannot be used are listed in rejected.tsv.gz.
"""


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add ``amazon`` and ``table`` to the commands of ``python -m dataset_prep``."""
    plain = argparse.RawDescriptionHelpFormatter
    amazon = commands.add_parser(
        "amazon", help="prepare a category of Amazon reviews", epilog=AMAZON_EXAMPLES, formatter_class=plain
    )
    amazon.add_argument("--reviews", type=Path, nargs="+", metavar="FILE", help="reviews: .json, .jsonl, .gz, Parquet")
    amazon.add_argument("--meta", type=Path, nargs="+", metavar="FILE", help="metadata; without it, no .item")
    amazon.add_argument("--edition", choices=EDITIONS, default="auto", help="of the files (auto: told by the content)")
    amazon.add_argument(
        "--download", metavar="CATEGORY", help="fetch the files, such as Office_Products; needs --edition, see --hosts"
    )
    amazon.add_argument("--download-to", type=Path, metavar="DIR", help="folder of what is fetched (raw)")
    amazon.add_argument("--hosts", type=Path, metavar="YAML", help="where to fetch from, instead of the known hosts")
    _add_common(amazon)
    amazon.set_defaults(run=_run_amazon)

    table = commands.add_parser(
        "table", help="prepare anyone's interactions and items", epilog=TABLE_EXAMPLES, formatter_class=plain
    )
    table.add_argument(
        "--interactions", type=Path, nargs="+", required=True, metavar="FILE", help="who had which item when"
    )
    table.add_argument("--items", type=Path, nargs="+", metavar="FILE", help="table of items; without it, no .item")
    columns = table.add_argument_group("columns")
    for role, name in asdict(Columns()).items():
        columns.add_argument(f"--{role}", metavar="COLUMN", help=f"of the interactions ({name})")
    columns.add_argument("--time-unit", choices=TIME_UNITS, help="of the times since 1970, or iso for dates (s)")
    columns.add_argument("--items-id", metavar="COLUMN", help="the item's id in the table of items (as --item)")
    for role in ROLES:
        columns.add_argument(
            option_of(role), type=names, metavar="COLUMN[,COLUMN]", help=f"of the items, if not called {role}"
        )
    columns.add_argument("--category-separator", metavar="TEXT", help="between names of the column categories (blank)")
    _add_common(table)
    table.set_defaults(run=_run_table)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", required=True, help="of the folder that is made")
    parser.add_argument("--out", type=Path, default=Path("dataset"), help="folder that gets the folder NAME (dataset)")
    taken = parser.add_mutually_exclusive_group()
    taken.add_argument("--overwrite", action="store_true", help="replace a folder prepared before, with its features")
    taken.add_argument(
        "--keep", action="store_true", help="keep a folder made of the same files with the same settings"
    )
    default = PreparationSettings()
    for title, options in (("cleaning", CLEANING), ("protocol", PROTOCOL), ("sessions", SESSIONS)):
        add_setting_options(parser.add_argument_group(title), default, CHOICES, options)
    add_price_arguments(parser)


def _run_amazon(options: argparse.Namespace) -> None:
    fetched = options.download is not None
    given = [option_of(name) for name in ("reviews", "meta") if getattr(options, name) is not None]
    if fetched and given:
        raise SettingError(f"--download brings the files, and so does {given[0]}; give one of the two")
    if not fetched:
        if not options.reviews:
            raise SettingError("no reviews; name the files with --reviews FILE, or fetch them with --download CATEGORY")
        for name in ("download_to", "hosts"):
            if getattr(options, name) is not None:
                raise SettingError(f"{option_of(name)} belongs to --download; leave it out")
    if options.sessions == "basket":
        raise SettingError("reviews have no baskets; use --sessions day, gap or user")
    has_items = fetched or options.meta is not None
    settings, prices = _settings(options, has_items=has_items, remedy="metadata: --meta FILE")
    place = place_of(options.out, options.name)
    reviews, meta = options.reviews, options.meta
    if fetched:
        if not options.keep:
            refuse_existing(place, overwrite=options.overwrite)  # before the download
        to = options.download_to or Path("raw")
        reviews, meta = fetch_category(options.edition, options.download, to, hosts=options.hosts)
    _prepare(AmazonSource(reviews, meta, edition=options.edition), place, settings, prices, options)


def _run_table(options: argparse.Namespace) -> None:
    roles = {role: getattr(options, role) for role in ROLES if getattr(options, role) is not None}
    roles |= {"item": options.items_id} if options.items_id is not None else {}
    if options.items is None and (roles or options.category_separator is not None):
        given = [option_of("items_id" if role == "item" else role) for role in roles] or ["--category-separator"]
        raise SettingError(f"{given[0]} names a column of a table of items: --items FILE")
    settings, prices = _settings(options, has_items=options.items is not None, remedy="a table of items: --items FILE")
    with_baskets = options.sessions == "basket"
    if options.basket is not None and not with_baskets:
        raise SettingError("--basket belongs to --sessions basket; leave it out")
    place = place_of(options.out, options.name)
    source = TableSource(
        options.interactions,
        options.items,
        columns=Columns(**given_settings(options, Columns)),
        item_columns=roles,
        category_separator=options.category_separator,
        time_unit=options.time_unit or "s",
        with_baskets=with_baskets,
    )
    _prepare(source, place, settings, prices, options)


def _settings(
    options: argparse.Namespace, *, has_items: bool, remedy: str
) -> tuple[PreparationSettings, PriceSettings]:
    given: dict[str, Any] = given_settings(options, PreparationSettings)
    prices = price_settings(options)
    if not has_items:
        needing = [option_of(name) for name in given if name.startswith("without_")]
        if needing or prices != PriceSettings():
            what = f"{needing[0]} needs" if needing else "options of price levels need"
            raise SettingError(f"{what} {remedy}")
    return settings_of(given), prices


def _prepare(
    source: Source,
    folder: Path,
    settings: PreparationSettings,
    prices: PriceSettings,
    options: argparse.Namespace,
) -> None:
    report = prepare(
        source,
        folder,
        settings,
        prices=prices,
        overwrite=options.overwrite,
        keep=options.keep,
        finish=write_card,
    )
    if report is None:
        print(f"{folder}: kept, made of the same files with the same settings")
        return
    print(f"{folder}: made\n{report}\nthe dataset card: {folder / CARD}")
