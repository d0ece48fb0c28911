"""Command line of the preparation: ``python -m dataset_prep demo | sessions | released | prices | features | check``.

Exit codes: 0 done, 2 a wrong argument or setting, 3 wrong data, 4 machine (disk, rights), 5 interrupted,
6 a file refused because it could run code.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dataset_prep import released, session_command
from dataset_prep.price import add_price_arguments
from recbole_mm.data.layout import check_folder
from recbole_mm.errors import DatasetError, SettingError, UnsafeFileError

DESCRIPTION = """Make dataset folders and the features of their items.

Exit codes: 0 done, 2 a wrong argument or setting, 3 wrong data, 4 machine (disk, rights), 5 interrupted,
6 a file refused because it could run code."""
# Options of one kind of feature; with the other kind they would be ignored.
KIND_OPTIONS = {"text": ("columns", "rows", "max_rows"), "image": ("column", "images"), "features": ("neighbours",)}
EXAMPLES = """examples:
  python -m dataset_prep demo                                                   a made-up shop in dataset/demo
  python -m dataset_prep features --dataset dataset/shop --feature text         tf-idf of title, description, ...
  python -m dataset_prep features --dataset dataset/shop --feature image        histograms of the pictures
  python -m dataset_prep sessions --interactions shop.csv --name shop --sessions gap    sessions in dataset/shop
  python -m dataset_prep prices --dataset dataset/shop                          price levels of the items
  python -m dataset_prep released --folder mmsbr/Cellphones --name Cellphones   the data that MMSBR's authors released
  python -m dataset_prep check dataset/shop                                     is everything there and whole?
"""
FEATURE_EXAMPLES = """examples:
  python -m dataset_prep features --dataset dataset/shop --feature text --columns title,description --rows item
  python -m dataset_prep features --dataset dataset/shop --feature text --encoder sentence --model path/to/model
  python -m dataset_prep features --dataset dataset/shop --feature image --images path/to/pictures
  python -m dataset_prep features --dataset dataset/shop --feature image --vectors clip.npy --zero-is-missing
  python -m dataset_prep features --dataset dataset/shop --feature image --vectors all.npy --vectors-items all.item
  python -m dataset_prep features --dataset dataset/shop --feature image_from_text --encoder neighbours

shop.item is a RecBole atomic file: a header such as item_id:token<TAB>title:token_seq<TAB>image:token, an item a line.
Items without content get no row; the models' setting missing_features says what to do about them.
"""

PRICE_EXAMPLES = """examples:
  python -m dataset_prep prices --dataset dataset/shop
  python -m dataset_prep prices --dataset dataset/shop --price-method linear --category-position first

shop.item gets the columns price_level (1 to P in each category; empty without a price) and category, if there is a
column categories. Other columns stay as they are; repeat the command to replace the levels.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; a user's mistake is one message on stderr, no traceback."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (DatasetError, SettingError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2 if isinstance(error, SettingError) else 6 if isinstance(error, UnsafeFileError) else 3
    except OSError as error:
        print(f"the machine gave up: {error}", file=sys.stderr)
        return 4
    except KeyboardInterrupt:
        print("interrupted; nothing half-made was left behind", file=sys.stderr)
        return 5
    return 0


def _demo(options: argparse.Namespace) -> None:
    from dataset_prep.demo import make_demo

    folder = Path(options.out) / "demo"
    make_demo(folder, seed=options.seed)
    print(f"{folder}: made; look at it with: python -m dataset_prep check {folder}")


def _features(options: argparse.Namespace) -> None:
    from dataset_prep.encoders import build_encoder
    from dataset_prep.features import import_vectors, make_feature
    from dataset_prep.pseudo import ENCODER, N_NEIGHBOURS, is_pseudo, make_pseudo_feature

    if options.vectors is not None:
        if options.encoder is not None:
            raise SettingError("--vectors brings vectors made elsewhere, --encoder makes them; give one of the two")
        _refuse(options, [name for kind in KIND_OPTIONS.values() for name in kind], "--vectors, which are made already")
        report = import_vectors(
            options.dataset,
            options.feature,
            file=options.vectors,
            vector_items=options.vectors_items,
            zero_is_missing=options.zero_is_missing,
        )
        print(report)
        return
    if options.zero_is_missing or options.vectors_items is not None:
        given = "--zero-is-missing" if options.zero_is_missing else "--vectors-items"
        raise SettingError(f"{given} belongs to --vectors FILE.npy")
    own = {"model": options.model, "batch_size": options.batch_size, "device": options.device, "width": options.width}
    if options.encoder == ENCODER or (options.encoder is None and is_pseudo(options.feature)):
        foreign = [*KIND_OPTIONS["text"], *KIND_OPTIONS["image"], *own]
        _refuse(options, foreign, f"the encoder {ENCODER}, which reads features")
        print(make_pseudo_feature(options.dataset, options.feature, neighbours=options.neighbours or N_NEIGHBOURS))
        return
    encoder = build_encoder(options.encoder, feature=options.feature, **own)
    other = "image" if encoder.source == "text" else "text"
    foreign = [*KIND_OPTIONS[other], *KIND_OPTIONS["features"]]
    _refuse(options, foreign, f"the encoder {encoder.name}, which reads {encoder.source}")
    given = {name: getattr(options, name) for name in KIND_OPTIONS[encoder.source]}
    given = {name: value for name, value in given.items() if value is not None}
    print(make_feature(options.dataset, options.feature, encoder=encoder, **given))


def _prices(options: argparse.Namespace) -> None:
    from dataset_prep.price import price_settings
    from dataset_prep.session_folder import add_price_levels

    print(add_price_levels(options.dataset, price_settings(options)))


def _refuse(options: argparse.Namespace, names: Sequence[str], why: str) -> None:
    for name in names:
        if getattr(options, name) is not None:
            raise SettingError(f"--{name.replace('_', '-')} does not go with {why}; leave it out")


def _check(options: argparse.Namespace) -> None:
    remarks = check_folder(options.folder)
    for remark in remarks:
        print(f"remark: {remark}")
    print(f"{options.folder}: whole" + (f", {len(remarks)} remark(s)" if remarks else ""))


def _folder(text: str) -> Path:
    """A folder with a name, which "." has not: the files of a folder carry its name."""
    return Path(text) if Path(text).name not in ("", "..") else Path(text).resolve()


def _names(text: str) -> list[str]:
    return text.split(",")


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number of at least 1, not {text}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m dataset_prep", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=plain
    )
    commands = parser.add_subparsers(
        title="commands", required=True, metavar="demo | sessions | released | prices | features | check"
    )

    demo = commands.add_parser("demo", help="make a made-up shop with texts, pictures and a taste to learn")
    demo.add_argument("--out", type=Path, default=Path("dataset"), help="folder that gets the folder demo (dataset)")
    demo.add_argument("--seed", type=int, default=2020, help="same seed, same bytes (2020)")
    demo.set_defaults(run=_demo)

    features = commands.add_parser(
        "features", help="make one feature of a folder's items", epilog=FEATURE_EXAMPLES, formatter_class=plain
    )
    features.add_argument("--dataset", type=_folder, required=True, metavar="FOLDER", help="holds <its name>.item")
    features.add_argument("--feature", required=True, metavar="NAME", help="what models call it: text, image, ...")
    features.add_argument(
        "--encoder",
        metavar="NAME",
        help="tfidf (default for text), histogram (for image), sentence, neighbours (for image_from_text and the like)",
    )
    features.add_argument(
        "--columns", type=_names, metavar="A,B", help="text columns (title, brand, category, categories, description)"
    )
    features.add_argument("--rows", choices=("sentence", "item"), help="a vector per sentence (default), or one")
    features.add_argument("--max-rows", type=_at_least_one, metavar="N", help="sentences of an item that count (10)")
    features.add_argument("--column", help="column with the picture's path (image)")
    features.add_argument("--images", type=Path, metavar="DIR", help="where these paths start (the dataset's folder)")
    features.add_argument("--neighbours", type=_at_least_one, metavar="K", help="neighbours: items to average (5)")
    features.add_argument("--width", type=int, metavar="N", help="tfidf: largest width (256)")
    features.add_argument("--model", metavar="PATH", help="sentence: folder or hub name (all-MiniLM-L6-v2)")
    features.add_argument("--batch-size", type=int, metavar="N", help="sentence: texts at a time (64)")
    features.add_argument("--device", help="sentence: such as cpu or cuda:0 (the library's choice)")
    features.add_argument(
        "--vectors", type=Path, metavar="FILE.npy", help="take vectors made elsewhere, a row per row of .item"
    )
    features.add_argument(
        "--vectors-items", type=Path, metavar="FILE", help="with --vectors: whose rows, a token a line or another .item"
    )
    features.add_argument("--zero-is-missing", action="store_true", help="with --vectors: a zero row is no content")
    features.set_defaults(run=_features)

    session_command.add_command(commands)
    released.add_command(commands)

    prices = commands.add_parser(
        "prices", help="add price levels to a folder's items", epilog=PRICE_EXAMPLES, formatter_class=plain
    )
    prices.add_argument("--dataset", type=_folder, required=True, metavar="FOLDER", help="holds <its name>.item")
    add_price_arguments(prices)
    prices.set_defaults(run=_prices)

    check = commands.add_parser("check", help="look at everything in a folder and list all problems at once")
    check.add_argument("folder", type=_folder, metavar="FOLDER")
    check.set_defaults(run=_check)
    return parser


if __name__ == "__main__":
    sys.exit(main())
