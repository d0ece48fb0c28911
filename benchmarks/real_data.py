"""Real datasets as prepared folders, ready for ``run_recbole_mm``.

    python -m benchmarks.real_data --data DIR --out dataset [--sentence-model MODEL]

``DIR`` holds ``amazon-luxury-beauty``, ``ml-100k-mm``, ``hm-mini`` and ``completejourney`` as RecBole atomic files, two
of them with picture vectors; what is missing is left out. They may not be passed on, so they are no part of this
project.

    amazon-luxury-beauty  users' histories, text and price
    ml-100k-mm            users' histories, text and pictures
    hm-mini               baskets with text, pictures, prices and categories
    completejourney       baskets with text, prices and categories
    luxury-days           what a user reviewed on one day, with text and prices

Text is TF-IDF, or embeddings of a sentence model.

Luxury Beauty: hundreds of users hold the same six items of one day (a bundle of reviews, not of purchases); whoever
ranks these items first looks good. Users with at least five of the six are dropped.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from dataset_prep.encoders import build_encoder
from dataset_prep.features import import_vectors, make_feature
from dataset_prep.price import PriceSettings
from dataset_prep.pseudo import make_pseudo_feature
from dataset_prep.session_folder import add_price_levels
from dataset_prep.sessions import Columns, SessionSettings, prepare_sessions
from recbole_mm.data.files import read_table, write_table

BUNDLE = frozenset({"6", "146", "232", "234", "364", "407"})
AT_LEAST = 5  # items of the bundle that give a user away


def luxury_beauty(source: Path, out: Path, *, sentence_model: str | None) -> None:
    """Users' histories and, apart, sessions by day."""
    interactions = read_table(source / f"{source.name}.inter")
    held = interactions[interactions["item_id"].isin(BUNDLE)].groupby("user_id")["item_id"].nunique()
    bundled = set(held[held >= AT_LEAST].index)
    kept = interactions[~interactions["user_id"].isin(bundled)]
    n_kept, n_all = len(kept), len(interactions)
    print(f"{source.name}: {len(bundled)} users of the bundle dropped, {n_kept} of {n_all} interactions kept")
    types = interactions.attrs["types"]
    folder = out / source.name
    write_table(folder / f"{folder.name}.inter", {f"{c}:{types[c]}": kept[c] for c in kept})
    shutil.copy(source / f"{source.name}.item", folder / f"{folder.name}.item")
    _text(folder, sentence_model)
    # Days are short: with items of five interactions at least, hardly a session would be left.
    days = SessionSettings("day", min_item_count=2, valid_share=0.15, test_share=0.2)
    inter, items = (folder / f"{folder.name}.{suffix}" for suffix in ("inter", "item"))
    _sessions(inter, items, out, "luxury-days", days, "first", sentence_model)  # of prices without levels
    print(add_price_levels(folder, PriceSettings(n_levels=20)))


def films(source: Path, out: Path, *, sentence_model: str | None) -> None:
    """MovieLens 100K with overviews and posters; posters as MobileNet vectors made elsewhere."""
    folder = out / source.name
    folder.mkdir(parents=True, exist_ok=True)
    for suffix in ("inter", "item"):
        shutil.copy(source / f"{source.name}.{suffix}", folder / f"{folder.name}.{suffix}")
    print(import_vectors(folder, "image", file=source / f"{source.name}.image_feat.npy", zero_is_missing=True))
    _text(folder, sentence_model)


def clothes(source: Path, out: Path, *, sentence_model: str | None) -> None:
    """Baskets of H&M. Most articles occur once or twice; those that occur once are dropped."""
    baskets = SessionSettings("basket", min_item_count=2, valid_share=0.15, test_share=0.2)
    items = source / f"{source.name}.item"
    columns = Columns(basket="session_id")
    folder = _sessions(
        source / f"{source.name}.inter", items, out, source.name, baskets, "first", sentence_model, columns=columns
    )
    vectors = source / f"{source.name}.image_feat.npy"  # a row for each row of the source's items
    print(import_vectors(folder, "image", file=vectors, vector_items=items, zero_is_missing=True))
    for name in ("text_from_image", "image_from_text"):
        print(make_pseudo_feature(folder, name))


def groceries(source: Path, out: Path, *, sentence_model: str | None) -> None:
    """Baskets of the Complete Journey."""
    baskets = SessionSettings("basket", valid_share=0.15, test_share=0.2)
    inter, items = source / f"{source.name}.inter", source / f"{source.name}.item"
    _sessions(inter, items, out, source.name, baskets, "last", sentence_model)


def _sessions(
    inter: Path,
    items: Path,
    out: Path,
    name: str,
    settings: SessionSettings,
    category: str,
    sentence_model: str | None,
    columns: Columns | None = None,
) -> Path:
    prices = PriceSettings(n_levels=20, category_position=category)  # few items: broad levels
    report = prepare_sessions(
        out / name, interactions=inter, items=items, settings=settings, columns=columns, prices=prices, overwrite=True
    )
    print(f"{name}: {report}")
    _text(out / name, sentence_model)
    return out / name


def _text(folder: Path, sentence_model: str | None) -> None:
    if sentence_model:
        encoder = build_encoder("sentence", feature="text", model=sentence_model)
    else:
        encoder = build_encoder("tfidf", feature="text")
    print(make_feature(folder, "text", encoder=encoder))


DATASETS = {
    "amazon-luxury-beauty": luxury_beauty,
    "ml-100k-mm": films,
    "hm-mini": clothes,
    "completejourney": groceries,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the datasets")
    parser.add_argument("--out", type=Path, default=Path("dataset"))
    parser.add_argument("--sentence-model", help="hub name or folder of a sentence-transformers model")
    options = parser.parse_args()
    for name, make in DATASETS.items():
        if (options.data / name).is_dir():
            make(options.data / name, options.out, sentence_model=options.sentence_model)
        else:
            print(f"{name}: not in {options.data}, left out")


if __name__ == "__main__":
    main()
