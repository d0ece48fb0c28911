"""Two real datasets as prepared folders, ready for ``run_recbole_mm``.

    python -m benchmarks.real_data --data DIR --out dataset

``DIR`` holds ``amazon-luxury-beauty`` and ``ml-100k-mm`` as RecBole atomic files, the latter with picture vectors.
Neither may be passed on, so neither is part of this project.

Luxury Beauty: hundreds of users hold the same six items of one day (a bundle of reviews, not of purchases); whoever
ranks these items first looks good. Users with at least five of the six are dropped.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from dataset_prep.encoders import build_encoder
from dataset_prep.features import import_vectors, make_feature
from recbole_mm.data.files import read_table, write_table

BUNDLE = frozenset({"6", "146", "232", "234", "364", "407"})
AT_LEAST = 5  # items of the bundle that give a user away


def luxury_beauty(source: Path, folder: Path, *, sentence_model: str | None) -> None:
    """Text as TF-IDF and, given a model, as sentence embeddings; there are no pictures."""
    interactions = read_table(source / f"{source.name}.inter")
    held = interactions[interactions["item_id"].isin(BUNDLE)].groupby("user_id")["item_id"].nunique()
    bundled = set(held[held >= AT_LEAST].index)
    kept = interactions[~interactions["user_id"].isin(bundled)]
    print(
        f"{folder.name}: {len(bundled)} users of the bundle dropped, "
        f"{len(kept)} of {len(interactions)} interactions kept"
    )
    types = interactions.attrs["types"]
    write_table(folder / f"{folder.name}.inter", {f"{c}:{types[c]}": kept[c] for c in kept})
    shutil.copy(source / f"{source.name}.item", folder / f"{folder.name}.item")
    _text(folder, sentence_model)


def films(source: Path, folder: Path, *, sentence_model: str | None) -> None:
    """MovieLens 100K with overviews and posters; posters as MobileNet vectors made elsewhere."""
    folder.mkdir(parents=True, exist_ok=True)
    for suffix in ("inter", "item"):
        shutil.copy(source / f"{source.name}.{suffix}", folder / f"{folder.name}.{suffix}")
    print(import_vectors(folder, "image", file=source / f"{source.name}.image_feat.npy", zero_is_missing=True))
    _text(folder, sentence_model)


def _text(folder: Path, sentence_model: str | None) -> None:
    print(make_feature(folder, "text", encoder=build_encoder("tfidf", feature="text")))
    if sentence_model:
        encoder = build_encoder("sentence", feature="text", model=sentence_model)
        print(make_feature(folder, "text_sentence", encoder=encoder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the two datasets")
    parser.add_argument("--out", type=Path, default=Path("dataset"))
    parser.add_argument("--sentence-model", help="hub name or folder of a sentence-transformers model")
    options = parser.parse_args()
    luxury_beauty(options.data / "amazon-luxury-beauty", options.out / "luxury", sentence_model=options.sentence_model)
    films(options.data / "ml-100k-mm", options.out / "ml-100k-mm", sentence_model=options.sentence_model)


if __name__ == "__main__":
    main()
