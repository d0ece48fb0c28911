"""Amazon's editions: told apart, read alike, and what their files hold that cannot be used."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from dataset_prep.sources import Item
from dataset_prep.sources.amazon import LICENCE, AmazonSource
from dataset_prep.sources.rejects import Rejects
from recbole_mm.data.files import sha256_of
from recbole_mm.errors import DatasetError, SettingError

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
START = 1_400_000_000
BIG, SMALL = (
    "https://images-na.ssl-images-amazon.com/images/I/41ab.jpg",
    "https://m.media-amazon.com/images/I/41ab._S_.jpg",
)


def review(edition: str, user: str = "A1", item: str = "B000000001", time: object = START, **more) -> dict:
    if edition == "2023":
        return {
            "rating": 5.0, "title": "good", "text": "fine", "images": [], "asin": "B00000000X", "parent_asin": item,
            "user_id": user, "timestamp": time * 1_000 if type(time) in (int, float) else time, **more,
        }  # fmt: skip
    own = {"helpful": [0, 0]} if edition == "2014" else {"verified": True}
    return {"reviewerID": user, "asin": item, "overall": 5.0, **own, "unixReviewTime": time, **more}


def item(edition: str, item_id: str = "B000000001", **more) -> dict:
    of = {
        "2014": {"asin": item_id, "title": "Pen", "imUrl": BIG, "categories": [["Office", "Pens"], ["Gifts"]],
                 "description": "Writes", "price": 1.5, "brand": "Quill", "related": {}},
        "2018": {"asin": item_id, "title": "Pen", "imageURL": [SMALL], "imageURLHighRes": [BIG],
                 "category": ["Office", "Pens"], "description": ["Writes", "well"], "price": "$1.50", "brand": "Quill"},
        "2023": {"parent_asin": item_id, "title": "Pen", "store": "Quill", "categories": ["Office", "Pens"],
                 "images": [{"thumb": SMALL, "large": SMALL, "hi_res": BIG, "variant": "MAIN"}],
                 "description": ["Writes", "well"], "price": 1.5, "main_category": "Office"},
    }  # fmt: skip
    return {**of[edition], **more}


def write(path: Path, rows: list[dict | str], *, literal: bool = False) -> Path:
    text = "".join((row if isinstance(row, str) else repr(row) if literal else json.dumps(row)) + "\n" for row in rows)
    content = text.encode(errors="surrogatepass")
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def source(folder: Path, reviews: list, meta: list | None = None, **options) -> AmazonSource:
    meta = None if meta is None else write(folder / "meta.jsonl", meta)
    return AmazonSource(write(folder / "reviews.json.gz", reviews), meta, progress=False, **options)


def told(events) -> list[tuple[str, str, float, int]]:
    rows = zip(events.user, events.item, events.time.tolist(), events.line.tolist(), strict=True)
    return [(events.users[user], events.items[item], time, line) for user, item, time, line in rows]


EVERY = ("2014", "2018", "2023")


@pytest.mark.parametrize("edition", EVERY)
def test_editions_are_told_apart_and_read_alike(tmp_path, edition):
    made = source(tmp_path, [review(edition), review(edition, "A2", time=START + 5)], [item(edition)])
    assert made.edition == edition and made.described["edition"] == edition
    assert told(made.events(Rejects())) == [
        ("A1", "B000000001", START, 1),
        ("A2", "B000000001", START + 5, 2),
    ]
    found = list(made.items({"B000000001"}, Rejects()))
    description = "Writes" if edition == "2014" else "Writes\nwell"
    price = "$1.50" if edition == "2018" else "1.5"
    assert found == [Item("B000000001", "Pen", "Quill", ("Office", "Pens"), description, price, (BIG,))]
    files = ("reviews.json.gz", "meta.jsonl")
    assert made.raw_files == {name: sha256_of(tmp_path / name) for name in files}
    assert made.n_rows == {"reviews.json.gz": 2, "meta.jsonl": 1}
    assert made.described["licence"].startswith(LICENCE[:40])


def test_literals_of_the_2014_edition_are_read(tmp_path):
    reviews = write(tmp_path / "a.json", [review("2014", summary="it's")], literal=True)
    meta = write(tmp_path / "b.json.gz", [{"asin": "B1", "title": "a \"b\" 'c'", "price": 2}], literal=True)
    made = AmazonSource(reviews, meta, progress=False)
    assert made.edition == "2014" and made.events(Rejects()).n == 1
    assert [(found.title, found.price) for found in made.items({"B1"}, Rejects())] == [("a \"b\" 'c'", "2")]


def test_F4_literals_in_other_editions_are_set_aside(tmp_path):
    for edition in ("2018", "2023"):
        made = source(tmp_path, [review(edition), repr(review(edition, "A2"))])
        rejects = Rejects(max_share=1)
        assert made.events(rejects).users == ["A1"] and rejects.counts == {"reviews.json.gz": {"bad_json": 1}}


def test_keys_that_two_editions_share_are_read_as_either(tmp_path):
    plain = {"reviewerID": "A1", "asin": "B1", "unixReviewTime": START}
    assert source(tmp_path, [plain]).edition == "2018"
    assert source(tmp_path, [plain], [item("2014")]).edition == "2014"
    assert source(tmp_path, [plain], edition="2014").edition == "2014"
    with pytest.raises(DatasetError, match="the edition 2023 was asked for, and the files are of 2014 or 2018"):
        source(tmp_path, [plain], edition="2023")


def test_files_of_two_editions_are_refused(tmp_path):
    message = "different editions: reviews.json.gz is of 2018, meta.jsonl is of 2023; prepare each edition apart"
    with pytest.raises(DatasetError, match=message):
        source(tmp_path, [review("2018")], [item("2023")])
    with pytest.raises(DatasetError, match="reviews.json.gz is of 2014 and 2018"):
        source(tmp_path, [review("2018"), review("2014")])
    with pytest.raises(DatasetError, match="2014 was asked for, and reviews.json.gz is of 2018; leave --edition out"):
        source(tmp_path, [review("2018")], edition="2014")
    many = [review("2018", f"A{number}") for number in range(1_000)]
    for other in ("2014", "2023"):
        made = source(tmp_path, [*many, review(other, "new")])
        with pytest.raises(DatasetError, match=f"row 1001 is of the {other} edition, the first ones of 2018"):
            made.events(Rejects())


def test_unknown_content_is_refused_with_the_keys_found_and_expected(tmp_path):
    with pytest.raises(DatasetError) as error:
        source(tmp_path, [{"user": 1, "movie": 2}])
    assert "reviews.json.gz: no reviews of Amazon: its keys are user, movie; the editions have" in str(error.value)
    assert "\n  2014: reviewerID, asin, unixReviewTime, helpful\n" in str(error.value)
    assert "\n  2023: user_id, parent_asin, timestamp" in str(error.value)
    with pytest.raises(DatasetError, match="no metadata of Amazon: its keys are title; .*\n  2014: asin, categories"):
        source(tmp_path, [review("2018")], [{"title": "x"}])
    with pytest.raises(DatasetError, match="no reviews of Amazon: it holds no JSON objects, one a line"):
        source(tmp_path, ["<html>", "</html>"])
    with pytest.raises(SettingError, match="edition is '2015', expected one of .*'auto', '2014'"):
        source(tmp_path, [review("2018")], edition="2015")


def test_F8_an_empty_file_is_refused(tmp_path):
    for rows in ([], ["", "  "]):
        with pytest.raises(DatasetError, match="reviews.json.gz is empty: 0 rows; download it again"):
            source(tmp_path, rows)
        with pytest.raises(DatasetError, match="meta.jsonl is empty: 0 rows"):
            source(tmp_path, [review("2018")], rows)


@pytest.mark.parametrize("edition", EVERY)
@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"user": ""}, "empty_id"),
        ({"user": " \t"}, "empty_id"),
        ({"user": "[PAD]"}, "padding_id"),
        ({"item": "[PAD]"}, "padding_id"),
        ({"item": "two words"}, "id_has_separator"),
        ({"item": "line\nbreak"}, "id_has_separator"),
        ({"user": "nul\0"}, "id_has_separator"),
        ({"item": "x" * 1_001}, "id_too_long"),
        ({"user": None}, "missing_id"),
        ({"user": 123}, "id_is_no_text"),
        ({"item": ["B1"]}, "id_is_no_text"),
        ({"time": -1}, "bad_time"),
        ({"time": 4_294_967_296}, "bad_time"),
        ({"time": "2014-03-01"}, "bad_time"),
        ({"time": True}, "bad_time"),
        ({"time": None}, "missing_time"),
    ],
)
def test_F14_F15_F17_F22_unusable_ids_and_times_are_set_aside(tmp_path, edition, changed, reason):
    rejects = Rejects(max_share=1)
    made = source(tmp_path, [review(edition), review(edition, **changed), review(edition, "A3")])
    assert told(made.events(rejects)) == [("A1", "B000000001", START, 1), ("A3", "B000000001", START, 3)]
    assert rejects.counts == {"reviews.json.gz": {reason: 1}} and made.n_rows == {"reviews.json.gz": 3}


@pytest.mark.parametrize("time", ["1e999", "NaN"])
def test_F5_infinite_times_and_missing_keys_are_set_aside(tmp_path, time):
    rejects = Rejects(max_share=1)
    row = json.dumps(review("2018", time="TIME")).replace('"TIME"', time)
    made = source(tmp_path, [review("2018"), row, {"reviewerID": "A2", "verified": True}])
    assert made.events(rejects).n == 1
    assert rejects.counts == {"reviews.json.gz": {"non_finite": 1, "missing_key": 1}}


def test_F12_F15_F16_ids_are_kept_byte_for_byte(tmp_path):
    ids = [
        "NA",
        "null",
        "nan",
        "00123",
        "1e5",
        "True",
        "../../etc/x",
        "C:\\x",
        "b01",
        "B01",
        "\u00e9",
        "e\u0301",
        "x" * 1_000,
    ]
    made = source(tmp_path, [review("2018", user=each, item=each) for each in ids], [item("2018", "NA")])
    events = made.events(Rejects())
    assert events.users == events.items == ids
    assert [found.item_id for found in made.items(dict.fromkeys(ids), Rejects())] == ["NA"]


@pytest.mark.parametrize(("edition", "rarer"), [("2018", "ms"), ("2023", "s")])
def test_F22_times_in_two_units_are_refused(tmp_path, edition, rarer):
    other = START * 1_000 if edition == "2018" else START / 1_000
    made = source(tmp_path, [review(edition, f"A{k}") for k in range(9)] + [review(edition, time=other)])
    with pytest.raises(DatasetError, match=f"different units: .* the first in {rarer} on line 10; convert them"):
        made.events(Rejects())
    made = source(tmp_path, [review(edition, time=other)])
    with pytest.raises(DatasetError, match=f"the times look like {rarer}, .* convert them"):
        made.events(Rejects())


def test_too_many_unusable_rows_stop_the_run(tmp_path):
    made = source(tmp_path, [review("2018")] * 97 + ["{"] * 3)
    with pytest.raises(DatasetError, match="3 of 100 rows cannot be used .3 bad_json., more than 1%"):
        made.events(Rejects())
    assert made.events(Rejects(max_share=0.03)).n == 97
    made = source(tmp_path, [review("2018", user="")])
    with pytest.raises(DatasetError, match="reviews.json.gz: no usable review"):
        made.events(Rejects(max_share=1))


def test_F1_nothing_comes_of_a_truncated_file(tmp_path):
    made = source(tmp_path, [review("2018", f"A{k}", text=str(hash(str(k)))) for k in range(5_000)])
    path = tmp_path / "reviews.json.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DatasetError, match=r"reviews.json.gz ends early, after row \d+"):
        made.events(Rejects())
    assert made.raw_files == {}


def test_several_files_are_one_after_the_other(tmp_path):
    (tmp_path / "more").mkdir()
    paths = [
        write(tmp_path / "a.json", [review("2018", "A1"), review("2018", "A2")]),
        write(tmp_path / "more" / "a.json", [review("2018", "A1", "B2")]),
    ]
    metas = [write(tmp_path / "m.json", [item("2018")]), write(tmp_path / "n.json", [item("2018", "B2")])]
    made = AmazonSource(paths, metas, progress=False)
    assert [row[0::3] for row in told(made.events(Rejects()))] == [("A1", 1), ("A2", 2), ("A1", 3)]
    assert [found.item_id for found in made.items({"B2", "B000000001"}, Rejects())] == ["B000000001", "B2"]
    assert set(made.raw_files) == {"a.json", "reviews/a.json", "m.json", "n.json"}


def test_F10_an_item_given_again_counts_once_and_another_content_is_a_conflict(tmp_path):
    rows = [item("2018"), item("2018", rank="2"), item("2018", title="Other"), item("2018", "B2"), item("2018", "B3")]
    made = source(tmp_path, [review("2018")], rows)
    rejects = Rejects(max_share=1)
    assert [(x.item_id, x.title) for x in made.items({"B000000001", "B2"}, rejects)] == [
        ("B000000001", "Pen"),
        ("B2", "Pen"),
    ]
    assert rejects.counts == {"meta.jsonl": {"conflict": 1}} and made.fixed == {"item given again": 1}
    rejects.write(tmp_path / "rejected")
    assert b"meta.jsonl\t3\tconflict\tdiffers from line 1: {" in gzip.decompress((tmp_path / "rejected").read_bytes())


def test_rows_without_a_usable_id_or_with_an_infinite_price_are_set_aside(tmp_path):
    rows = [
        item("2023"),
        {"title": "x"},
        item("2023", ""),
        json.dumps(item("2023", "B2", price=0)).replace(": 0", ": 1e999"),
    ]
    made = source(tmp_path, [review("2023")], rows)
    rejects = Rejects(max_share=1)
    assert len(list(made.items({"B000000001", "B2"}, rejects))) == 1
    assert rejects.counts == {"meta.jsonl": {"missing_key": 1, "empty_id": 1, "non_finite": 1}}


def test_titles_of_scraped_code_are_emptied_and_counted(tmp_path):
    code = "var aPageStart = (new Date()).getTime();" * 50
    made = source(tmp_path, [review("2018")], [item("2018", title=code), item("2018", "B2", title=".aui-box{}")])
    assert [found.title for found in made.items({"B000000001", "B2"}, Rejects())] == ["", ""]
    assert made.fixed == {"title of scraped code left out": 2}


@pytest.mark.parametrize(
    ("price", "expected"),
    [(12, "12"), (12.5, "12.5"), (None, ""), ("None", ""), ("from 12", "from 12"), (".a-box{}", ".a-box{}"), ([1], ""),
     (True, "")],
)  # fmt: skip
def test_prices_are_handed_on_as_text(tmp_path, price, expected):
    made = source(tmp_path, [review("2023")], [item("2023", price=price)])
    assert [found.price for found in made.items({"B000000001"}, Rejects())] == [expected]


def pictures(folder: Path, edition: str, **row) -> tuple[tuple[str, ...], dict[str, int]]:
    made = source(folder, [review(edition)], [item(edition, **row)])
    return next(made.items({"B000000001"}, Rejects())).pictures, dict(made.fixed)


def test_pictures_are_the_largest_ones_each_once(tmp_path):
    http = "http://x.org/1.jpg"
    assert pictures(tmp_path, "2018", imageURLHighRes=[], imageURL=[SMALL, http, http])[0] == (SMALL, http)
    assert pictures(tmp_path, "2018", imageURLHighRes=[BIG], imageURL=[SMALL, http])[0] == (BIG, http)
    assert pictures(tmp_path, "2018", imageURLHighRes=None, imageURL="", image=[http])[0] == (http,)
    side = {"thumb": "http://x.org/t", "large": "http://x.org/l", "hi_res": None, "variant": "PT01"}
    main = {"thumb": SMALL, "large": BIG, "hi_res": None, "variant": "MAIN"}
    assert pictures(tmp_path, "2023", images=[side, main])[0] == (BIG, "http://x.org/l")
    lists = {key: [side[key], main[key]] for key in side}
    assert pictures(tmp_path, "2023", images=lists)[0] == (BIG, "http://x.org/l")
    assert pictures(tmp_path, "2023", images=json.dumps([side]))[0] == ("http://x.org/l",)
    assert pictures(tmp_path, "2023", images="[")[0] == pictures(tmp_path, "2014", imUrl=None)[0] == ()


def test_F36_addresses_that_are_not_http_are_left_out_and_counted(tmp_path):
    found, fixed = pictures(tmp_path, "2018", imageURLHighRes=["file:///etc/passwd", "data:image/png;base64,", BIG])
    assert found == (BIG,) and fixed == {"picture address that is not http(s) left out": 2}
    many = [f"http://x.org/{number}" for number in range(13)]
    found, fixed = pictures(tmp_path, "2014", imUrl=many)
    assert found == tuple(many[:10]) and fixed == {"pictures beyond 10 of an item left out": 3}


def test_parquet_gives_the_same_as_json_lines(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    reviews = [review("2023", f"A{k % 7}", f"B{k % 5}", START + k) for k in range(40)]
    metas = [item("2023", f"B{k}", price=None if k else 3.5) for k in range(5)]
    for row in metas:
        row["images"] = {key: [image[key] for image in row["images"]] for key in row["images"][0]}
    plain = source(tmp_path, reviews, metas)
    paths = [tmp_path / "r.parquet", tmp_path / "m.parquet"]
    for path, rows in zip(paths, (reviews, metas), strict=True):
        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)
    made = AmazonSource(*paths, progress=False)
    assert made.edition == "2023" and told(made.events(Rejects())) == told(plain.events(Rejects()))
    wanted = {"B0", "B3"}
    assert list(made.items(wanted, Rejects())) == list(plain.items(wanted, Rejects()))
    assert made.raw_files == {path.name: sha256_of(path) for path in paths}
    assert made.n_rows == {"r.parquet": 40, "m.parquet": 5}


def test_F1_a_truncated_parquet_file_is_refused(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "r.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([review("2023")] * 100), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DatasetError, match="r.parquet: no whole Parquet file .*; download it again"):
        AmazonSource(path, progress=False)


def test_without_pyarrow_the_install_command_is_told(tmp_path, monkeypatch):
    (tmp_path / "r.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(SettingError, match='Parquet files need pyarrow: pip install "recbole_mm.prep."'):
        AmazonSource(tmp_path / "r.parquet")


@pytest.mark.parametrize(
    ("rows", "edition", "n_bad"),
    [
        (["A1AAAAAAAAAAA,B000000001,5.0,1400000000"], "2014", 0),
        (["B000000001,A1AAAAAAAAAAA,5.0,1400000000", "B0,1", ""], "2018", 1),
        (["user_id,parent_asin,rating,timestamp", "A1AAAAAAAAAAA,B000000001,5.0,1400000000000"], "2023", 0),
    ],
)
def test_files_of_ratings_alone_are_read(tmp_path, rows, edition, n_bad):
    made = AmazonSource(write(tmp_path / "ratings.csv", rows), progress=False)
    rejects = Rejects(max_share=1)
    assert made.edition == edition
    assert [row[:3] for row in told(made.events(rejects))] == [("A1AAAAAAAAAAA", "B000000001", START)]
    assert rejects.n("ratings.csv") == n_bad and made.n_rows == {"ratings.csv": 1 + n_bad}
    assert list(made.items({"B000000001"}, Rejects())) == []


def test_ratings_whose_columns_cannot_be_told_are_refused(tmp_path):
    with pytest.raises(DatasetError, match="which of the first two are the items cannot be told .*dataset_prep table"):
        AmazonSource(write(tmp_path / "ratings.csv", ["a,b,5,1400000000"]), progress=False)


@pytest.mark.skipif(not DATA.is_dir(), reason="no real data in ../shared/data")
def test_the_real_gift_cards_have_their_counts():
    raw = DATA / "amazon-gift-cards" / "raw"
    made = AmazonSource(raw / "Gift_Cards_5.json.gz", raw / "meta_Gift_Cards.json.gz", progress=False)
    rejects = Rejects(max_share=0)
    events = made.events(rejects)
    assert (made.edition, events.n, len(events.users), len(events.items)) == ("2018", 2_972, 458, 148)
    assert len(np.unique(np.stack([events.user, events.item, events.time]), axis=1).T) == 2_969
    found = list(made.items(set(events.items), rejects))
    assert len(found) == 148 and made.n_rows["meta_Gift_Cards.json.gz"] == 1_547
    assert all(address.startswith("https://") for each in found for address in each.pictures)


@pytest.mark.skipif(not DATA.is_dir(), reason="no real data in ../shared/data")
def test_real_reviews_of_2023_are_read_in_seconds():
    made = AmazonSource(DATA / "fixtures" / "Subscription_Boxes_mini.jsonl.gz", progress=False)
    events = made.events(Rejects(max_share=0))
    assert made.edition == "2023" and events.n == 300
    assert 1.2e9 < events.time.min() and events.time.max() < 1.8e9
