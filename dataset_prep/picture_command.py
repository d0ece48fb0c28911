"""The command ``python -m dataset_prep pictures``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from dataset_prep.arguments import at_least_one, folder
from dataset_prep.card import refresh_card
from dataset_prep.pictures.store import RETRIES
from recbole_mm.errors import SettingError

# Options of one way to get pictures; with the other they would be ignored.
LOCAL_ONLY = ("in_place",)
DOWNLOAD_ONLY = ("threads", "per_host", "max_bytes", "timeout", "allow_private", "ignore_opt_outs")
EXAMPLES = """examples:
  python -m dataset_prep pictures --dataset dataset/shop                        download, column image_urls
  python -m dataset_prep pictures --dataset dataset/shop --retry-failed         try those again that failed
  python -m dataset_prep pictures --dataset dataset/shop --images path/to/pictures
  python -m dataset_prep pictures --dataset dataset/shop --images path/to/pictures --in-place

Every picture is decoded once. pictures/index.tsv lists all of them with their status; the usable ones lie beside it,
named by their content, or stay where they are with --in-place. Interrupted, the same command goes on where it was.
"""


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add ``pictures`` to the commands of ``python -m dataset_prep``."""
    parser = commands.add_parser(
        "pictures",
        help="download the items' pictures, or take them from a folder, and check them",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dataset", type=folder, required=True, metavar="FOLDER", help="holds <its name>.item")
    parser.add_argument("--images", type=Path, metavar="DIR", help="take pictures that lie here; no download")
    parser.add_argument(
        "--column", help="names the pictures (download: image_urls; --images: image, image_urls, or DIR/<item_id>.jpg)"
    )
    parser.add_argument(
        "--per-item", type=at_least_one, metavar="N", help="pictures of an item, at most (download: 1; --images: all)"
    )
    parser.add_argument("--workers", type=_not_negative, metavar="N", help="processes that decode (one per core)")
    parser.add_argument(
        "--retry-failed", nargs="?", const="temporary", choices=RETRIES,
        help="try pictures again that failed before, and may do better now (temporary, the default), or all",
    )  # fmt: skip
    parser.add_argument(
        "--in-place", action="store_true", default=None, help="--images: only list the files, neither link nor copy"
    )
    web = parser.add_argument_group("download")
    web.add_argument("--threads", type=at_least_one, metavar="N", help="downloads at a time (16)")
    web.add_argument("--per-host", type=_positive, metavar="RATE", help="requests per second to one host (10)")
    web.add_argument("--max-bytes", type=at_least_one, metavar="N", help="largest file (20000000)")
    web.add_argument("--timeout", type=_positive, metavar="SECONDS", help="longest time for one request (30)")
    web.add_argument(
        "--allow-private", action="store_true", default=None, help="also addresses of this machine and of its network"
    )
    web.add_argument(
        "--ignore-opt-outs", action="store_true", default=None,
        help="also what robots.txt or X-Robots-Tag: noai, noimageai ask not to take; know the law that applies to you",
    )  # fmt: skip
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    given = {name: value for name, value in vars(options).items() if value is not None}
    foreign = [name for name in (LOCAL_ONLY if options.images is None else DOWNLOAD_ONLY) if name in given]
    if foreign:
        why = "belongs to --images DIR" if options.images is None else "belongs to downloads, without --images"
        raise SettingError(f"--{foreign[0].replace('_', '-')} {why}; leave it out")
    shared = {name: given[name] for name in ("column", "per_item", "retry_failed") if name in given}
    shared["workers"] = _n_cores() if options.workers is None else options.workers
    if options.images is not None:
        from dataset_prep.pictures.local import take_pictures

        report = take_pictures(options.dataset, options.images, in_place=bool(options.in_place), **shared)
    else:
        from dataset_prep.pictures.fetch import FetchSettings, download_pictures

        settings = FetchSettings(**{name: given[name] for name in DOWNLOAD_ONLY if name in given})
        report = download_pictures(options.dataset, settings, **shared)
    print(report)
    refresh_card(options.dataset)


def _n_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _not_negative(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"a whole number of at least 0, not {text}")
    return int(text)


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0.001 <= number <= 1_000_000:
        raise argparse.ArgumentTypeError(f"a number from 0.001 to 1000000, not {text}")
    return number
