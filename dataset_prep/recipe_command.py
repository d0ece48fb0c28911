"""The command ``python -m dataset_prep recipe``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from dataset_prep.arguments import names
from dataset_prep.recipes import (
    STEPS,
    commands_of,
    compare,
    find_recipe,
    next_command,
    recipe_names,
    run_recipe,
    with_changes,
)
from recbole_mm.errors import SettingError

EXAMPLES = """examples:
  python -m dataset_prep recipe --list
  python -m dataset_prep recipe Office --reviews Office_Products_5.json.gz --meta meta_Office_Products.json.gz
  python -m dataset_prep recipe Office --download downloads
  python -m dataset_prep recipe Office --reviews R --meta M --steps prepare,features --features text
  python -m dataset_prep recipe Office --reviews R --meta M --set features.text.model=path/to/a/model
  python -m dataset_prep recipe shop.yaml --interactions orders.csv --items items.csv --dry-run

The commands of the recipe are shown before they run. What is done already is kept: the same command again continues an
interrupted preparation. A recipe of your own is a YAML file; copy one of properties/dataset.
"""


def add_command(commands: argparse._SubParsersAction, run: Callable[[Sequence[str]], None]) -> None:
    """Add ``recipe`` to the commands of ``python -m dataset_prep``.

    Args:
        run: runs another command line of the same program.
    """
    parser = commands.add_parser(
        "recipe",
        help="the whole preparation of a known dataset",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="a known one, see --list, or the path of a YAML file")
    parser.add_argument("--list", action="store_true", help="show the known recipes")
    parser.add_argument(
        "--reviews", nargs="+", type=Path, metavar="FILE", help="of Amazon: reviews, as they were downloaded"
    )
    parser.add_argument("--meta", nargs="+", type=Path, metavar="FILE", help="of Amazon: metadata of the products")
    parser.add_argument("--download", type=Path, metavar="DIR", help="of Amazon: fetch both into this folder instead")
    parser.add_argument("--interactions", type=Path, metavar="FILE", help="of a shop of your own")
    parser.add_argument("--items", type=Path, metavar="FILE", help="of a shop of your own")
    parser.add_argument("--images", type=Path, metavar="DIR", help="pictures that lie here, instead of a download")
    parser.add_argument("--out", type=Path, default=Path("dataset"), help="folder that gets the dataset's (dataset)")
    parser.add_argument("--steps", type=names, default=STEPS, metavar="A,B", help=f"only these of {', '.join(STEPS)}")
    parser.add_argument("--features", type=names, metavar="A,B", help="only these features of the recipe")
    parser.add_argument("--device", help="for encoders, such as cuda:0")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="another option: features.text.model=path"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that was prepared otherwise")
    parser.add_argument("--dry-run", action="store_true", help="show the commands and do nothing")
    parser.set_defaults(run=lambda options: _run(options, run))


def _run(options: argparse.Namespace, run: Callable[[Sequence[str]], None]) -> None:
    if options.list:
        for name in recipe_names():
            print(f"{name:14} {find_recipe(name).title}")
        return
    if options.name is None:
        raise SettingError(f"name a recipe: one of {recipe_names()}, or the path of a .yaml file")
    recipe = with_changes(find_recipe(options.name), options.set)
    lines = commands_of(
        recipe,
        options.out,
        files=_files(options, recipe.prepare["command"]),
        images=options.images,
        device=options.device,
        steps=options.steps,
        features=options.features,
        overwrite=options.overwrite,
    )
    if recipe.note:
        print(recipe.note)
    if options.dry_run:
        run_recipe(lines, lambda line: None)
        return
    run_recipe(lines, run)
    if "prepare" in options.steps:
        print(compare(recipe, options.out / recipe.name))
    if {"features", "reduce"} <= set(options.steps) and options.features is None:
        print(f"ready: {next_command(recipe, options.out)}")


def _files(options: argparse.Namespace, command: str) -> dict[str, object]:
    """Options that name the sources of the first command."""
    of_amazon = {"reviews": options.reviews, "meta": options.meta, "download": options.download}
    of_tables = {"interactions": options.interactions, "items": options.items}
    mine, foreign = (of_amazon, of_tables) if command == "amazon" else (of_tables, of_amazon)
    if given := [key for key, value in foreign.items() if value is not None]:
        raise SettingError(f"--{given[0]} does not go with this recipe, which starts with the command {command}")
    if options.download is not None:
        if options.reviews or options.meta:
            raise SettingError("--download fetches reviews and metadata; leave out --reviews and --meta")
        return {"download": True, "download_to": options.download}
    if "prepare" not in options.steps:
        return {}
    if command == "amazon" and not (options.reviews and options.meta):
        raise SettingError("the recipe needs --reviews FILE and --meta FILE, or --download DIR to fetch them")
    if command == "table" and options.interactions is None:
        raise SettingError("the recipe needs --interactions FILE")
    return mine
