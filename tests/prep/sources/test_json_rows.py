"""Rows of JSON lines: what is no row is set aside with its reason, and nothing is ever run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dataset_prep.sources.json_rows import JsonRows
from dataset_prep.sources.rejects import Rejects


def read(path: Path, content: str, **options) -> tuple[list[dict], dict[str, int], int]:
    path.write_text(content, encoding="utf-8", newline="")
    rejects = Rejects()
    rows = JsonRows(path, rejects, progress=False, **options)
    found = [row for _, _, row in rows]
    return found, dict(rejects.counts.get(path.name, {})), rows.n


def test_rows_equal_those_of_the_json_module(tmp_path):
    rows = [{"a": number, "b": ["\u00fc\U0001f600", None, {"c": 1.5}]} for number in range(50)]
    content = "".join(json.dumps(row, ensure_ascii=row["a"] % 2 == 0) + " \r\n" * (row["a"] % 3 + 1) for row in rows)
    assert read(tmp_path / "a", content) == (rows, {}, 50)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"asin": "B0', "bad_json"),
        ('{"asin": "B0"} {', "bad_json"),
        ("[1]", "bad_json"),
        ("null", "bad_json"),
        ("<html>", "bad_json"),
        (' {"a": 1}', "bad_json"),
        ('{"a": "tab\tinside"}', "bad_json"),
        ('{"a": ' + "9" * 5_000 + "}", "bad_json"),
        ("[" * 100_000, "bad_json"),
        ('{"a": NaN}', "non_finite"),
        ('{"a": {"b": [1, -Infinity]}}', "non_finite"),
        ('{"a": 1, "b": 2, "a": 1}', "duplicate_key"),
        ('{"a": {"b": 1, "\\u0062": 2}}', "duplicate_key"),
        ('{"a": "half \\ud83d of it"}', "encoding"),
        ('{"a": "\\uDE00\\ud83d"}', "encoding"),
        ("{'asin': 'B01'}", "bad_json"),
    ],
)
def test_F4_F5_F6_rows_that_cannot_be_relied_on_are_set_aside(tmp_path, line, reason):
    good = '{"a": "whole \\ud83d\\ude00"}'
    assert read(tmp_path / "a", f"{good}\n{line}\n{good}\n") == ([{"a": "whole \U0001f600"}] * 2, {reason: 1}, 3)


def test_F4_literals_are_read_where_they_are_expected_and_never_run(tmp_path):
    marker = tmp_path / "marker"
    lines = [
        "{'asin': \"it's\", 'categories': [['A', 'B']], 'price': 1.5, 'none': None}",
        f"{{'asin': __import__('pathlib').Path({str(marker)!r}).touch()}}",
        "{'a': 1}.update({'b': 2})",
        "{'a': " + "-" * 100_000 + "1}",
        "{'a': " + "(" * 1_000 + "}",
        "{'a': [1}",
        "{'a': {}, {'b'}: 1}",
        "{'a', 'b'}",
        '{"strict": "json"}',
    ]
    rows, rejected, n = read(tmp_path / "a", "\n".join(lines), literals=True)
    assert rows == [
        {"asin": "it's", "categories": [["A", "B"]], "price": 1.5, "none": None},
        {"strict": "json"},
    ]
    assert rejected == {"bad_json": 7} and n == 9 and not marker.exists()


def test_empty_lines_are_no_rows(tmp_path):
    assert read(tmp_path / "a", '\n{"a": 1}\n  \n\n') == ([{"a": 1}], {}, 1)
