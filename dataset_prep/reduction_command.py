"""The command ``python -m dataset_prep reduce``."""

from __future__ import annotations

import argparse

from dataset_prep.arguments import at_least_one, folder, names
from dataset_prep.card import refresh_card

EXAMPLES = """examples:
  python -m dataset_prep reduce --dataset dataset/shop --features image,image_from_text --width 64
  python -m dataset_prep reduce --dataset dataset/shop --features text --width 128 --whiten --scale unit

A modality and its pseudo twin (image and image_from_text) are fitted as one, on items of the training part. The
originals stay as image_full and image_from_text_full; repeat the command to reduce them again in another way.
"""


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add ``reduce`` to the commands of ``python -m dataset_prep``."""
    reduce = commands.add_parser(
        "reduce",
        help="bring features to a smaller width (PCA)",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    reduce.add_argument("--dataset", type=folder, required=True, metavar="FOLDER", help="holds the features")
    reduce.add_argument("--features", type=names, required=True, metavar="A,B", help="features to reduce")
    reduce.add_argument("--width", type=at_least_one, required=True, metavar="N", help="of the result")
    reduce.add_argument("--whiten", action="store_true", help="bring each new dimension to variance 1")
    reduce.add_argument(
        "--scale",
        choices=("none", "unit", "standardize"),
        default="none",
        help="unit: bring each new row to length 1; standardize: bring each old dimension to variance 1 first (none)",
    )
    reduce.add_argument(
        "--fit", choices=("train", "all"), default="train", help="items that the directions are taken from (train)"
    )
    reduce.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from dataset_prep.reduction import reduce_features

    report = reduce_features(
        options.dataset,
        options.features,
        width=options.width,
        whiten=options.whiten,
        scale=options.scale,
        fit_on=options.fit,
    )
    print(report)
    if set(report.up_to_date) != set(report.widths):
        refresh_card(options.dataset)
