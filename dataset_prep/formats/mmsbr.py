"""The feature arrays of MMSBR's authors, for a folder that is there: rows find their items through ``asinlist.npy``.

The whole release, sessions and features, is imported by ``python -m dataset_prep released``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dataset_prep.formats.imported import Imported, Vectors
from dataset_prep.released import FEATURE_FILES, NAMES_FILE, item_names, read_array, read_features
from dataset_prep.six_lists import Problems
from recbole_mm.data.files import sha256_of
from recbole_mm.errors import DatasetError


def read_mmsbr(folder: Path) -> Imported:
    """Read the arrays ``imgMatrixpca.npy`` and so on, as far as they are there.

    Raises:
        UnsafeFileError: an array holds Python objects.
        DatasetError: no folder, no list of names, no array, or a list of everything that is wrong with them.
    """
    folder = Path(folder)
    if not (folder / NAMES_FILE).is_file():
        raise DatasetError(
            f"{folder} has no {NAMES_FILE}, the names of the rows' items\n"
            "  make a folder out of the whole release with: python -m dataset_prep released"
        )
    problems = Problems()
    names = read_array(folder / NAMES_FILE, problems)
    n_items = len(names) if names is not None and names.ndim else 0
    tokens = item_names(folder, n_items, problems)
    problems.raise_if_any(folder)
    features, remarks = read_features(folder, n_items, problems)
    problems.raise_if_any(folder)
    if not features:
        raise DatasetError(f"{folder} has none of {', '.join(FEATURE_FILES.values())}")
    hashes = {FEATURE_FILES[name]: sha256_of(folder / FEATURE_FILES[name]) for name in features}
    vectors = {
        name: _vectors(tokens, rows, filled, FEATURE_FILES[name], hashes[FEATURE_FILES[name]])
        for name, (rows, filled) in features.items()
    }
    return Imported(kind="mmsbr", features=vectors, raw_files=hashes, remarks=remarks)


def _vectors(tokens: list[str], rows: np.ndarray, filled: np.ndarray, file: str, sha256: str) -> Vectors:
    has = filled.tolist()
    return Vectors(
        tokens=[token for token, full in zip(tokens, has, strict=True) if full],
        rows=rows,
        counts=None,
        file=file,
        sha256=sha256,
        zero=frozenset(token for token, full in zip(tokens, has, strict=True) if not full),
    )
