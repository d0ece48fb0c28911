"""Broken and hostile files through the real commands: exit code, one message, and nothing left half-written."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dataset_prep.__main__ import main
from recbole_mm.data.files import read_table
from recbole_mm.data.layout import check_folder

ROOT = Path(__file__).resolve().parents[2]
LOOSE = ["--min-user", "1", "--min-item", "1"]
START = 1_500_000_000
REVIEW = {"reviewerID": "u0", "asin": "i0", "unixReviewTime": START, "verified": True}
ITEM = {"asin": "i0", "title": "Thing", "category": ["All"], "also_buy": []}


def lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


REVIEWS = lines(
    [{**REVIEW, "reviewerID": f"u{k % 6}", "asin": f"i{k % 5}", "unixReviewTime": START + k} for k in range(200)]
)
META = lines([{**ITEM, "asin": f"i{k}"} for k in range(5)])


@pytest.fixture
def amazon(tmp_path):
    """Runs the command on files of this content; returns its exit code."""

    def run(*options: str, reviews: bytes = REVIEWS, meta: bytes = META) -> int:
        (tmp_path / "reviews").write_bytes(reviews)
        (tmp_path / "meta").write_bytes(meta)
        files = ["--reviews", str(tmp_path / "reviews"), "--meta", str(tmp_path / "meta")]
        return main(["amazon", *files, "--name", "shop", "--out", str(tmp_path / "out"), *LOOSE, *options])

    return run


def left(tmp_path: Path) -> list[str]:
    return sorted(os.listdir(tmp_path / "out")) if (tmp_path / "out").exists() else []


def packed(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"reviews": packed(REVIEWS)[:-200]}, "reviews ends early, after row"),
        ({"meta": packed(META)[:-9]}, "meta ends early, after row"),
        ({"reviews": packed(REVIEWS) + b"rest"}, "something that is not gzip follows its end"),
        ({"reviews": packed(b"0" * 50_000_000)}, "refused as a gzip bomb"),
        ({"reviews": b""}, "reviews is empty: 0 rows"),
        ({"meta": b"\r\n\n"}, "meta is empty: 0 rows"),
        ({"reviews": b"{'asin': __import__('os').system('true')}\n"}, "it holds no JSON objects, one a line"),
        ({"reviews": lines([{"user": 1}])}, "no reviews of Amazon: its keys are user; the editions have"),
        ({"reviews": REVIEWS + b"{broken\n" * 3}, "3 of 203 rows cannot be used (3 bad_json), more than 1%"),
        ({"reviews": REVIEWS + b"\xff\n\x00\n" + b'"\\ud800"\n'}, "1 bad_json), more than 1%"),
        ({"reviews": REVIEWS + lines([{**REVIEW, "asin": "[PAD]"}] * 3)}, "3 padding_id), more than 1%"),
        ({"reviews": REVIEWS.replace(b"15000001", b"15000000001")}, "has times in different units"),
        ({"meta": lines([{**ITEM, "asin": "other"}])}, "none of the 5 items, such as 'i0', is in the metadata"),
    ],
)  # fmt: skip
def test_F1_F2_F3_F4_F6_F8_F9_F17_F22_files_that_cannot_be_used_end_with_code_3(
    amazon, tmp_path, capsys, files, message
):
    assert amazon(**files) == 3
    told = capsys.readouterr().err
    assert message in told and "Traceback" not in told and left(tmp_path) == []


def test_F5_F7_F10_F22_odd_rows_are_set_aside_and_listed(amazon, tmp_path, capsys):
    times = [-1, 4.3e9, "2014-03-01", None, True, [1], 10**400]
    odd = [{**REVIEW, "unixReviewTime": time} for time in times]
    more = b'{"reviewerID": NaN}\n{"asin": "a", "asin": "b"}\n' + b"x" * 1_000_001 + b"\n"
    meta = META + lines([{**ITEM, "title": "Another"}, ITEM])
    assert amazon("--max-rejected", "0.3", reviews=REVIEWS + lines(odd) + more, meta=meta) == 0
    assert "210 interactions read, 200 kept, 10 dropped" in capsys.readouterr().out
    told = gzip.decompress((tmp_path / "out/shop/rejected.tsv.gz").read_bytes()).decode().split("\n")[1:-1]
    reasons = sorted(row.split("\t")[2] for row in told)
    assert reasons == [*["bad_time"] * 6, "conflict", "duplicate_key", "line_too_long", "missing_time", "non_finite"]


def test_F12_F15_F16_ids_are_data_and_no_file_is_named_after_them(amazon, tmp_path):
    ids = ["NA", "null", "00123", "1e5", "../../etc/x", "..", "/tmp/x", "C:\\x", "b01", "B01", "\u00e9", "e\u0301"]
    reviews = [{**REVIEW, "reviewerID": user, "asin": item} for user in ids for item in ids]
    assert amazon(reviews=lines(reviews), meta=lines([{**ITEM, "asin": item} for item in ids])) == 0
    folder = tmp_path / "out/shop"
    table = read_table(folder / "shop.inter")
    assert table[["user_id", "item_id"]].to_numpy().tolist() == [[user, item] for user in ids for item in ids]
    assert read_table(folder / "shop.item")["item_id"].tolist() == ids
    check_folder(folder)
    assert left(tmp_path) == ["shop"] and sorted(os.listdir(tmp_path)) == ["meta", "out", "reviews"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--min-user", "500"], "--min-user 500 removes all 200 interactions that were left of 200"),
        (["--without-image", "drop"], "--without-image drop removes all 200 interactions"),
        (["--protocol", "sessions", "--sessions", "gap", "--gap", "0.5"], "--min-length 2 removes all 200"),
        (["--protocol", "sessions", "--sessions", "user", "--min-length", "99"], "--min-length 99 removes all 200"),
        (["--protocol", "time", "--valid-from", "2030-01-01", "--test-from", "2031-01-01"], "is left for valid, test"),
    ],
)
def test_F23_F26_the_filter_that_leaves_nothing_is_named(amazon, tmp_path, capsys, options, message):
    assert amazon(*options) == 3
    assert message in capsys.readouterr().err and left(tmp_path) == []


def test_F24_F25_long_sessions_and_those_of_one_item_are_valid(amazon, tmp_path):
    rows = [{**REVIEW, "reviewerID": f"u{user}", "unixReviewTime": START + user} for user in range(4) for _ in range(9)]
    sessions = ["--protocol", "sessions", "--sessions", "user", "--longest", "3"]
    assert amazon(*sessions, reviews=lines(rows), meta=META) == 0
    train = read_table(tmp_path / "out/shop/shop.train.inter")
    assert set(train["item_id_list"]) == {"i0", "i0 i0"} and set(train["item_id"]) == {"i0"}


def test_F18_F19_F20_odd_prices_are_missing_and_stop_nothing(amazon, tmp_path, capsys):
    prices = ["$5", "Free", -1, 1e12, "\uff11\uff12"]
    assert amazon(meta=lines([{**ITEM, "asin": f"i{k}", "price": price} for k, price in enumerate(prices)])) == 0
    assert "no price: 2 not written as a price, 1 zero or negative, 1 above 1,000,000,000" in capsys.readouterr().out
    items = read_table(tmp_path / "out/shop/shop.item")
    assert items["price"].tolist() == ["5", "", "", "", ""] and items["price_level"].tolist() == ["1", "", "", "", ""]


def test_F28_F29_texts_without_characters_are_missing_and_entities_are_resolved(amazon, tmp_path):
    titles = ["<b> </b>", "&amp;#39;", "a &lt;b&gt;c", " ", None]
    assert amazon(meta=lines([{**ITEM, "asin": f"i{k}", "title": title} for k, title in enumerate(titles)])) == 0
    assert read_table(tmp_path / "out/shop/shop.item")["title"].tolist() == ["", "'", "a c", "", ""]


def test_F49_a_place_that_cannot_be_written_ends_with_code_4(amazon, tmp_path, capsys):
    (tmp_path / "out").mkdir(mode=0o500)
    if os.access(tmp_path / "out", os.W_OK):  # whoever may write anywhere
        (tmp_path / "out").rmdir()
        (tmp_path / "out").write_text("a file")
    assert amazon() == 4
    assert f"cannot write into {tmp_path / 'out'}" in capsys.readouterr().err


def _command(tmp_path: Path, out: str, **environment: str) -> subprocess.Popen:
    rows, goods = tmp_path / "log.csv", tmp_path / "goods.csv"
    rows.write_text(
        "user_id,item_id,timestamp\n" + "".join(f"u{k % 7},i{k * 3 % 5},2017-07-{k % 27 + 1:02}\n" for k in range(90))
    )
    goods.write_text("item_id,title,price,colour\n" + "".join(f"i{k},T\u00fcr {k},{k}.5,red\n" for k in range(5)))
    options = ["--protocol", "time", "--cold-items", "keep", "--cold-share", "0.2", "--time-unit", "iso"]
    files = ["--interactions", str(rows), "--items", str(goods), "--name", "shop", "--out", out]
    return subprocess.Popen(
        [sys.executable, "-m", "dataset_prep", "table", *files, *LOOSE, *options],
        cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def _content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_F62_neither_hash_seed_nor_locale_nor_time_zone_changes_a_byte(tmp_path):
    made = [
        _command(tmp_path, str(tmp_path / "a"), PYTHONHASHSEED="1", TZ="Asia/Tokyo", LC_ALL="C"),
        _command(tmp_path, str(tmp_path / "b"), PYTHONHASHSEED="2", TZ="America/Lima", LC_ALL="C.UTF-8"),
    ]
    for process in made:
        _, told = process.communicate()
        assert process.returncode == 0, told
    assert _content(tmp_path / "a/shop") == _content(tmp_path / "b/shop") and len(_content(tmp_path / "a/shop")) > 5


def test_F61_of_two_processes_that_write_one_folder_one_is_refused(tmp_path):
    made = [_command(tmp_path, str(tmp_path / "out")) for _ in range(2)]
    told = [process.communicate()[1] for process in made]
    assert sorted(process.returncode for process in made) == [0, 3], told
    refused = next(text for text, process in zip(told, made, strict=True) if process.returncode == 3)
    assert "is being written by process" in refused or "is there already" in refused
    assert left(tmp_path) == ["shop"]
    check_folder(tmp_path / "out/shop")
