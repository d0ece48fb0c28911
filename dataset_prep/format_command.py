"""The commands ``python -m dataset_prep import`` and ``python -m dataset_prep export``: files of other tools."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from dataset_prep.arguments import at_least_one, folder
from dataset_prep.card import CARD, refresh_card
from recbole_mm.data.layout import Manifest
from recbole_mm.errors import SettingError

if TYPE_CHECKING:
    from dataset_prep.formats.imported import Imported

IMPORT_EXAMPLES = """examples:
  python -m dataset_prep import msm4sr --folder MP4SR/pantry --name pantry
  python -m dataset_prep import msm4sr --folder MP4SR/pantry --dataset dataset/pantry       features alone
  python -m dataset_prep import mmsbr --folder mmsbr/Cellphones --dataset dataset/Cellphones
  python -m dataset_prep import unisrec --folder UniSRec/dataset/downstream/Scientific
  python -m dataset_prep import mmrec --folder MMRec/data/baby --name baby
  python -m dataset_prep import recbole --folder RecBole/dataset/ml-100k --name ml-100k

Vectors find their items by id. With --dataset, features are added to a folder that is there; else a new one is made.
The sessions of MMSBR's authors: python -m dataset_prep released
"""
EXPORT_EXAMPLES = """examples:
  python -m dataset_prep export unisrec --dataset dataset/shop --out UniSRec/dataset/downstream
  python -m dataset_prep export mmrec --dataset dataset/shop --out MMRec/data --missing mean

The files go into OUT/<name of the dataset>. Several rows of an item are averaged; items without a vector are counted.
"""
IMPORTS = {
    "msm4sr": "pickles of MSM4SR's authors (desc_emb.pkl, image_emb_15.pkl), read without running them",
    "mmsbr": "arrays of MMSBR's authors (imgMatrixpca.npy, ...), for a folder that is there",
    "unisrec": "UniSRec's .feat1CLS, index files and sequences",
    "mmrec": "MMRec's labelled .inter, image_feat.npy and text_feat.npy",
    "recbole": "RecBole's atomic files; float_seq columns become features",
}
EXPORTS = {"unisrec": ("text", "text_dropped"), "mmrec": ("text", "image")}


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add ``import`` and ``export`` to the commands of ``python -m dataset_prep``."""
    plain = argparse.RawDescriptionHelpFormatter
    importer = commands.add_parser(
        "import", help="make a folder, or features, of another tool's files", epilog=IMPORT_EXAMPLES,
        formatter_class=plain,
    )  # fmt: skip
    kinds = importer.add_subparsers(title="formats", required=True, metavar=" | ".join(IMPORTS))
    for kind, what in IMPORTS.items():
        _add_importer(kinds.add_parser(kind, help=what, description=what), kind)
    exporter = commands.add_parser(
        "export", help="write a folder as another tool wants it", epilog=EXPORT_EXAMPLES, formatter_class=plain
    )
    kinds = exporter.add_subparsers(title="formats", required=True, metavar=" | ".join(EXPORTS))
    for kind, features in EXPORTS.items():
        _add_exporter(kinds.add_parser(kind, help=f"{kind}'s layout"), kind, features)


def _add_importer(parser: argparse.ArgumentParser, kind: str) -> None:
    parser.add_argument("--folder", type=folder, required=True, metavar="DIR", help="holds the other tool's files")
    parser.add_argument(
        "--dataset", type=folder, required=kind == "mmsbr", metavar="FOLDER", help="add features to this folder"
    )
    if kind != "mmsbr":
        parser.add_argument("--name", help="of the folder to make (that of --folder)")
        parser.add_argument("--out", type=Path, metavar="DIR", help="folder that gets the folder NAME (dataset)")
        parser.add_argument("--overwrite", action="store_true", help="replace a folder prepared here before")
    parser.add_argument(
        "--max-missing", type=_share, default=1.0, metavar="SHARE",
        help="of the items that may have no vector, from 0 to 1 (1)",
    )  # fmt: skip
    if kind == "msm4sr":
        parser.add_argument("--text", type=Path, metavar="FILE.pkl", help="vectors of texts (desc_emb.pkl)")
        parser.add_argument("--image", type=Path, metavar="FILE.pkl", help="vectors of pictures (image_emb_<N>.pkl)")
        parser.add_argument(
            "--bad-rows", choices=("refuse", "drop"), default="refuse", help="interactions that cannot be used (refuse)"
        )
    elif kind == "unisrec":
        parser.add_argument("--width", type=at_least_one, default=768, metavar="N", help="of a vector (768)")
    elif kind == "mmrec":
        parser.add_argument(
            "--split", choices=("auto", "given", "none"), default="auto",
            help="keep the labels' parts (given), drop them (none), or drop them if RecBole's split is the same (auto)",
        )  # fmt: skip
    elif kind == "recbole":
        for role, usual in (("user", "user_id"), ("item", "item_id"), ("time", "timestamp")):
            parser.add_argument(f"--{role}", default=usual, metavar="COLUMN", help=f"column of the {role} ({usual})")
    parser.set_defaults(run=_import, kind=kind)


def _add_exporter(parser: argparse.ArgumentParser, kind: str, features: tuple[str, ...]) -> None:
    parser.add_argument("--dataset", type=folder, required=True, metavar="FOLDER", help="a prepared folder")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder that gets the folder of its name"
    )
    for feature in features:
        name = feature.replace("_", "-")
        parser.add_argument(f"--{name}", metavar="FEATURE", help=f"feature to write as {feature} ({feature})")
    parser.add_argument(
        "--missing", choices=("zero", "mean"), default="zero", help="vector of an item that has none (zero)"
    )
    parser.add_argument("--user", metavar="COLUMN", help="column of the users in a plain .inter (user_id)")
    parser.add_argument("--overwrite", action="store_true", help="replace files of an earlier export")
    parser.set_defaults(run=_export, kind=kind, features=features)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"a share from 0 to 1, not {text}")
    return share


def _import(options: argparse.Namespace) -> None:
    from dataset_prep.folder_writer import place_of, refuse_existing
    from dataset_prep.formats.imported import add_features, make_folder

    if options.dataset is not None:
        if options.kind != "mmsbr" and (options.name or options.out or options.overwrite):
            raise SettingError(
                "--dataset adds features to a folder that is there, --name, --out and --overwrite make a new one; "
                "leave the latter out"
            )
        before = set(Manifest.load(options.dataset).features)
        imported = _read(options, only_features=True)
        print(add_features(imported, options.dataset, max_missing=options.max_missing))
        if replaced := sorted(before & set(imported.features)):
            print(f"replaced: the folder's features {', '.join(replaced)} of before")
        refresh_card(options.dataset)
        return
    place = place_of(options.out or Path("dataset"), options.name or options.folder.name)
    refuse_existing(place, overwrite=options.overwrite)  # before everything is read
    imported = _read(options, only_features=False)
    report = make_folder(imported, place, overwrite=options.overwrite, max_missing=options.max_missing)
    print(report)
    print(f"the dataset card: {place / CARD}")


def _read(options: argparse.Namespace, *, only_features: bool) -> Imported:
    """What the chosen importer makes of the folder."""
    if options.kind == "msm4sr":
        from dataset_prep.formats.msm4sr import read_msm4sr

        given = {"text": options.text, "image": options.image, "bad_rows": options.bad_rows}
        return read_msm4sr(options.folder, **given, only_features=only_features)
    if options.kind == "mmsbr":
        from dataset_prep.formats.mmsbr import read_mmsbr

        return read_mmsbr(options.folder)
    if options.kind == "unisrec":
        from dataset_prep.formats.unisrec import read_unisrec

        return read_unisrec(options.folder, width=options.width, only_features=only_features)
    if options.kind == "mmrec":
        from dataset_prep.formats.mmrec import read_mmrec

        return read_mmrec(options.folder, split=options.split, only_features=only_features)
    from dataset_prep.formats.recbole import read_recbole
    from dataset_prep.interactions import Columns

    columns = Columns(user=options.user, item=options.item, time=options.time)
    return read_recbole(options.folder, columns=columns, only_features=only_features)


def _export(options: argparse.Namespace) -> None:
    from dataset_prep.formats.mmrec import export_mmrec
    from dataset_prep.formats.unisrec import export_unisrec

    export = {"unisrec": export_unisrec, "mmrec": export_mmrec}[options.kind]
    chosen = {name: getattr(options, name) for name in options.features}
    report = export(
        options.dataset, options.out, chosen={name: feature for name, feature in chosen.items() if feature},
        missing=options.missing, user=options.user, overwrite=options.overwrite,
    )  # fmt: skip
    print(report)
