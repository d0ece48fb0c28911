"""Pictures of items: got from addresses or from a folder, checked by decoding, listed in ``pictures/index.tsv``."""

from __future__ import annotations

from dataset_prep.pictures.store import Picture, PicturesReport, check_pictures, picture_files, read_index

__all__ = ["Picture", "PicturesReport", "check_pictures", "picture_files", "read_index"]
