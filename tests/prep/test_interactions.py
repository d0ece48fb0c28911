"""Files of interactions and items as shops have them: what is read, what is refused, and on which line."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from dataset_prep.interactions import Columns, read_interactions, read_items_file
from recbole_mm.errors import DatasetError


@pytest.fixture
def file(tmp_path):
    def write(content: str, name: str = "log.csv") -> Path:
        (tmp_path / name).write_text(content)
        return tmp_path / name

    return write


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "log.csv is empty, expected a header and rows"),
        ("user_id,item_id,timestamp\n\n", "log.csv has a header but no rows"),
        ("user_id;item_id;timestamp\nu;a;1\n", "has no column item_id; .*\n  fields are separated by one comma or tab"),
    ],
)
def test_an_empty_or_foreign_file_is_refused(file, content, message):
    with pytest.raises(DatasetError, match=message):
        read_interactions(file(content), Columns())


def test_a_bad_row_is_found_on_its_line_behind_empty_lines_and_breaks_in_quotes(file):
    path = file('user_id,item_id,timestamp,note\nu,a,1,"two\nlines"\n\nu,b,2,\nu,,3,\nu,d,4,\n')
    with pytest.raises(DatasetError, match=r"line 6: its item_id is empty \(1 such rows\): item_id '', timestamp '3'"):
        read_interactions(path, Columns())
    frame, dropped = read_interactions(path, Columns(), bad_rows="drop")
    assert frame["item"].tolist() == ["a", "b", "d"] and dropped == {"its item_id is empty": 1}


def test_baskets_may_have_no_user_or_nobody_known(file):
    anonymous = file("basket_id,item_id,timestamp\n1,a,1\n")
    assert list(read_interactions(anonymous, Columns(), by_basket=True)[0]) == ["item", "time", "basket"]
    guests = file("user_id,basket_id,item_id,timestamp\nu,1,a,1\n,2,b,2\n")
    assert read_interactions(guests, Columns(), by_basket=True)[0]["user"].tolist() == ["u", ""]
    with pytest.raises(DatasetError, match="its user_id is empty"):
        read_interactions(guests, Columns())
    with pytest.raises(DatasetError, match="no column custmer; .*\n.*; without users, leave --user out"):
        read_interactions(guests, Columns(user="custmer"), by_basket=True)


def test_columns_that_an_atomic_file_cannot_have_are_left_out_and_named(file):
    """pandas writes the number of a row without a name, and reads it back as "Unnamed: 0"."""
    path = file("Unnamed: 0,,item_id,title,price\n0,0,a,A,1\n1,1,b,B,2\n")
    table, types, remarks = read_items_file(path, "item_id")
    assert types == {"item_id": "token", "title": "token_seq", "price": "float"} and list(table) == list(types)
    assert remarks == ["columns without a usable name were left out: 'Unnamed: 0', ''"]
    table, types, _ = read_items_file(file("Unnamed: 0,title\na,A\n"), "Unnamed: 0")
    assert table["item_id"].tolist() == ["a"] and types == {"item_id": "token", "title": "token_seq"}


def test_a_category_of_a_csv_is_one_name_and_categories_are_a_list(file):
    path = file("item_id,category,categories,shelf\na,Home Decor,Home Vases,Top left\n")
    assert read_items_file(path, "item_id")[1]["category"] == "token"
    types = read_items_file(path, "item_id", category="shelf")[1]
    assert (types["categories"], types["shelf"]) == ("token_seq", "token")


def test_compressed_tables_are_read_like_plain_ones(file, tmp_path):
    plain = file("user_id,item_id,timestamp\nu,NA,1\nu,00,2.5\n")
    (tmp_path / "packed.csv").write_bytes(gzip.compress(plain.read_bytes()))
    read = [read_interactions(path, Columns())[0] for path in (plain, tmp_path / "packed.csv")]
    assert read[0].equals(read[1]) and read[0]["item"].tolist() == ["NA", "00"]


def test_parquet_is_refused_with_what_is_expected(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"user_id": ["u"]}), tmp_path / "log.parquet")
    with pytest.raises(DatasetError, match="log.parquet is Parquet, expected an atomic file, CSV or TSV; convert it"):
        read_interactions(tmp_path / "log.parquet", Columns())
