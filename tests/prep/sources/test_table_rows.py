"""Rows of tables: equal to those of the csv module on good files, and none lost on others."""

from __future__ import annotations

import csv
import gzip
import io
import random
from pathlib import Path

import pytest

from dataset_prep.sources.rejects import Rejects
from dataset_prep.sources.table_rows import TableRows
from recbole_mm.data.files import read_table, write_table
from recbole_mm.errors import DatasetError


def write(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8", newline="")
    return path


def read(path: Path, **options) -> tuple[list[list[str]], TableRows, Rejects]:
    rejects = Rejects()
    rows = TableRows(path, rejects, progress=False, **options)
    return [row for _, row in rows], rows, rejects


@pytest.mark.parametrize("separator", [",", ";", "|"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_rows_equal_those_of_the_csv_module(tmp_path, separator, end):
    draw, pieces = random.Random(3), ["a", '"', ",", ";", "\n", " ", "\u00fc", "5", "|", "end"]
    rows = [["".join(draw.choices(pieces, k=draw.randrange(7))) + "x" for _ in range(4)] for _ in range(400)]
    made = io.StringIO()
    writer = csv.writer(made, delimiter=separator, lineterminator=end)
    writer.writerows([["item_id", "b", "c", "d"], *rows])
    text = made.getvalue()
    expected = list(csv.reader(io.StringIO(text.replace("\r\n", "\n"), newline=""), delimiter=separator, strict=True))
    found, table, rejects = read(write(tmp_path / "a.csv", text), separators=",;|")
    assert [table.names, *found] == expected and not rejects.counts
    assert table.n == 400 and table.last == text.count("\n") and table.kind == "csv"


def test_line_numbers_are_those_of_the_first_lines(tmp_path):
    path = write(tmp_path / "a.csv", 'a,b\n1,x\n\n2,"two\nlines"\n3,y\n')
    assert [number for number, _ in TableRows(path, Rejects(), progress=False)] == [2, 4, 6]


def test_F13_a_quote_without_its_partner_is_text_and_no_row_is_lost(tmp_path):
    lines = ["a,b,c", '1,5" disc,x', '2,"open,y', "3,z,z", '4,"fine, it is",x', '5,"a"b,y', '6,"open again,z', "7,u,v"]
    found, table, rejects = read(write(tmp_path / "a.csv", "\n".join(lines)))
    assert found == [
        ["1", '5" disc', "x"], ["2", '"open', "y"], ["3", "z", "z"], ["4", "fine, it is", "x"], ["5", '"a"b', "y"],
        ["6", '"open again', "z"], ["7", "u", "v"],
    ]  # fmt: skip
    assert table.fixed == {"quote without its partner kept as text": 3} and not rejects.counts
    with pytest.raises(DatasetError, match="a.csv, line 3: no CSV .a quote without its partner."):
        list(TableRows(tmp_path / "a.csv", None, progress=False))


def test_F9_rows_of_another_width_are_set_aside_or_refused(tmp_path):
    path = write(tmp_path / "a.csv", 'a,b\n1,2\n1\n1,2,3\n"x,y",2\n"x","y","z"\n3,4\n')
    found, table, rejects = read(path)
    assert found == [["1", "2"], ["x,y", "2"], ["3", "4"]] and rejects.counts == {"a.csv": {"bad_csv": 3}}
    assert table.n == 6
    with pytest.raises(DatasetError, match="a.csv, line 3: 1 fields, the header has 2; .* separated by one comma"):
        list(TableRows(path, None, progress=False))
    with pytest.raises(DatasetError, match="a column name occurs twice in a, b, a"):
        TableRows(write(tmp_path / "a.csv", "a,b,a\n1,2,3\n"), Rejects())


def test_tables_with_tabs_have_no_quotes(tmp_path):
    path = write(tmp_path / "a.tsv", 'a\tb\n"1\t2"\n3\t4\t5\n')
    found, table, rejects = read(path)
    assert found == [['"1', '2"']] and table.kind == "tsv" and rejects.counts == {"a.tsv": {"bad_csv": 1}}
    with pytest.raises(DatasetError, match="line 3: 3 fields, the header has 2; fields are separated by one tab"):
        list(TableRows(path, None, progress=False))


def test_an_atomic_file_is_read_as_read_table_does(tmp_path):
    path = tmp_path / "a.item"
    write_table(path, {"item_id:token": ["NA", "00"], "title:token_seq": ['"a', "b\u00fc"], "price:float": [1.5, None]})
    found, table, _ = read(path)
    expected = read_table(path)
    assert found == expected.to_numpy().tolist() and table.names == list(expected)
    assert (table.kind, table.types) == ("atomic", expected.attrs["types"])
    path.write_bytes(gzip.compress(path.read_bytes()))
    assert read(path)[0] == found


def test_F6_F7_lines_that_are_no_text_are_set_aside_or_refused(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbfa,b\r\n1,\xff\r\n" + b"x" * 1_000_001 + b"\n3,4")
    found, table, rejects = read(path)
    assert (table.names, found, table.n) == (["a", "b"], [["3", "4"]], 3)
    assert rejects.counts == {"a.csv": {"encoding": 1, "line_too_long": 1}}
    assert table.fixed == {"byte order mark": 1}
    with pytest.raises(DatasetError, match="a.csv, line 2: not UTF-8; save the file as UTF-8"):
        list(TableRows(path, None, progress=False))


def test_F8_an_empty_file_or_a_header_alone_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="a.csv is empty, expected a header and rows"):
        read(write(tmp_path / "a.csv", "\n"))
    with pytest.raises(DatasetError, match="a.csv has a header but no rows"):
        read(write(tmp_path / "a.csv", "a,b\n\n"))


def test_a_description_of_many_lines_is_one_row(tmp_path):
    text = "line\n" * 3_000
    found, _, _ = read(write(tmp_path / "a.csv", f'a,b\n1,"{text}"\n2,x\n'))
    assert found == [["1", text], ["2", "x"]]
