"""Rows that are set aside."""

from __future__ import annotations

import pytest

from dataset_prep.sources import rejects as module
from dataset_prep.sources.rejects import Rejects
from recbole_mm.errors import DatasetError


def test_a_file_is_refused_even_if_the_list_is_full_with_rows_of_another(monkeypatch):
    monkeypatch.setattr(module, "LISTED", 2)
    rejects = Rejects(max_share=0.1)
    for line in range(3):
        rejects.add("reviews", line, "bad_json", "{")
    rejects.check("reviews", 100)
    rejects.add("meta", 1, "conflict", "x")
    with pytest.raises(DatasetError, match="meta: 1 of 5 rows cannot be used .1 conflict., more than 10%"):
        rejects.check("meta", 5)
