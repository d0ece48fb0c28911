"""Anyone's tables as a source: columns by name, times in their units, rows that cannot be used set aside."""

from __future__ import annotations

from datetime import date, datetime
from decimal import Decimal
from pathlib import Path

import pytest

from dataset_prep.interactions import Columns, read_interactions
from dataset_prep.sources import Item
from dataset_prep.sources.rejects import Rejects
from dataset_prep.sources.table import TableSource
from recbole_mm.data.files import sha256_of
from recbole_mm.errors import DatasetError, SettingError

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
START = 1_500_000_000


@pytest.fixture
def source(tmp_path):
    def make(interactions: str, items: str | None = None, **options) -> TableSource:
        (tmp_path / "log.csv").write_text(interactions, newline="")
        if items is not None:
            (tmp_path / "items.csv").write_text(items, newline="")
        return TableSource(tmp_path / "log.csv", items and tmp_path / "items.csv", progress=False, **options)

    return make


def told(events) -> list[tuple[str, str, float, int]]:
    rows = zip(events.user, events.item, events.time.tolist(), events.line.tolist(), strict=True)
    return [(events.users[user], events.items[item], time, line) for user, item, time, line in rows]


def log(*rows: str) -> str:
    return "\n".join(["user_id,item_id,timestamp", *rows]) + "\n"


def test_interactions_equal_those_of_the_command_for_sessions(source, tmp_path):
    made = source(log(f"u1,a,{START}", "", f"u2,b,{START}.5", f'u1,"c,d",{START + 9}'))
    events = made.events(Rejects())
    frame, _ = read_interactions(tmp_path / "log.csv", Columns())
    assert [row[:3] for row in told(events)] == list(frame[["user", "item", "time"]].itertuples(index=False, name=None))
    assert events.line.tolist() == [2, 4, 5] and made.raw_files == {"log.csv": sha256_of(tmp_path / "log.csv")}
    assert made.n_rows == {"log.csv": 3}


def test_columns_may_have_any_name_and_order(source):
    made = source(
        f"when;who;junk;what\n{START};u;x;a\n",
        "what;name;maker;shelf;text;cost\na;Pen;Quill;Office > Pens;Writes;1,50 €\n",
        columns=Columns(user="who", item="what", time="when"),
        item_columns={"title": "name", "brand": "maker", "categories": "shelf", "description": "text", "price": "cost"},
        category_separator=">",
    )
    assert told(made.events(Rejects())) == [("u", "a", START, 2)]
    assert list(made.items({"a"}, Rejects())) == [Item("a", "Pen", "Quill", ("Office", "Pens"), "Writes", "1,50 €")]
    assert made.described["columns"]["user"] == "who" and made.described["item_columns"]["title"] == ["name"]


def test_columns_without_a_role_go_to_more_and_roles_may_have_several_columns(source):
    made = source(
        log(f"u,a,{START}"),
        "item_id,,title,top,sub,colour,category,note: x\na,0,Pen,Home Office,Ball Pens,Dark Red,Pens,n\n",
        item_columns={"categories": ["top", "sub"]},
    )
    found = next(made.items({"a"}, Rejects()))
    assert found.categories == ("Home Office", "Ball Pens")
    assert found.more == {"colour": "Dark Red", "category": "Pens"}
    assert made.fixed == {
        f"column {name!r} left out, whose name cannot be that of a further column": 1 for name in ("", "note: x")
    }


def test_categories_are_a_list_and_a_category_is_one_name(source):
    table = "item_id,categories\na,Home Garden\n"
    assert next(source(log(f"u,a,{START}"), table).items({"a"}, Rejects())).categories == ("Home", "Garden")
    table = "item_id,category\na,Home Garden\n"
    assert next(source(log(f"u,a,{START}"), table).items({"a"}, Rejects())).categories == ("Home Garden",)


def test_F36_pictures_are_paths_or_http_and_other_addresses_are_left_out(source):
    table = (
        "item_id,image,image_urls\na,my pictures/1.jpg,http://x/1 file:///etc/passwd http://x/1 ../2.jpg C:\\3.jpg\n"
    )
    made = source(log(f"u,a,{START}"), table)
    found = next(made.items({"a"}, Rejects())).pictures
    assert found == ("my pictures/1.jpg", "http://x/1", "../2.jpg", "C:\\3.jpg")
    assert made.fixed == {"picture address that is neither http(s) nor a path left out": 1}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (f",a,{START}", "empty_id"),
        (f"u,,{START}", "empty_id"),
        (f"[PAD],a,{START}", "padding_id"),
        (f"u,two words,{START}", "id_has_separator"),
        (f'u,"line\nbreak",{START}', "id_has_separator"),
        (f"u,{'x' * 1_001},{START}", "id_too_long"),
        ("u,a,", "missing_time"),
        ("u,a,2014-03-01", "bad_time"),
        ("u,a,-5", "bad_time"),
        ("u,a,4294967296", "bad_time"),
        ("u,a,nan", "bad_time"),
        ("u,a,1_000", "bad_time"),
        ("u,a,\u0661\u0662", "bad_time"),
        (f"u,a,{START},x", "bad_csv"),
    ],
)
def test_F9_F14_F15_F17_F22_rows_that_cannot_be_used_are_set_aside(source, row, reason):
    made = source(log(f"u,a,{START}", row, f"u,b,{START}"))
    rejects = Rejects(max_share=1)
    assert [row[:2] for row in told(made.events(rejects))] == [("u", "a"), ("u", "b")]
    assert rejects.counts == {"log.csv": {reason: 1}} and made.n_rows == {"log.csv": 3}


def test_F12_ids_are_kept_byte_for_byte(source):
    ids = ["NA", "null", "nan", "00123", "1e5", "True", "../../etc/x", "b01", "B01", "\u00e9", "e\u0301"]
    events = source(log(*(f"{each},{each},{START}" for each in ids))).events(Rejects())
    assert events.users == events.items == ids


def test_F9_a_missing_column_is_named_with_those_found(source):
    with pytest.raises(DatasetError, match="no column timestamp; its columns are user_id, item_id, t\n.*--time"):
        source(f"user_id,item_id,t\nu,a,{START}\n")
    with pytest.raises(DatasetError, match="items.csv has no column item_id; its columns are id, title"):
        source(log(f"u,a,{START}"), "id,title\na,x\n")
    with pytest.raises(DatasetError, match="no column nam for title; its columns are item_id, name"):
        source(log(f"u,a,{START}"), "item_id,name\na,x\n", item_columns={"title": "nam"})
    with pytest.raises(SettingError, match="'titel' is nothing that an item has, .*; did you mean 'title'?"):
        source(log(f"u,a,{START}"), item_columns={"titel": "name"})
    with pytest.raises(SettingError, match="one column holds the ids of the items, not a, b"):
        source(log(f"u,a,{START}"), item_columns={"item": ["a", "b"]})
    with pytest.raises(SettingError, match="time_unit is 'h', expected one of .*'s', 'ms', 'us', 'iso'"):
        source(log(f"u,a,{START}"), time_unit="h")
    with pytest.raises(SettingError, match="the category separator is empty, expected a text such as '>'"):
        source(log(f"u,a,{START}"), category_separator="")


def test_further_columns_neither_replace_others_nor_pass_for_those_of_the_interactions(source):
    table = "sku,item_id,timestamp,name,title,colour\na,7,5,Pen,Old,red\n"
    made = source(log(f"u,a,{START}"), table, item_columns={"item": "sku", "title": "name"})
    found = next(made.items({"a"}, Rejects()))
    assert (found.item_id, found.title, found.more) == ("a", "Pen", {"colour": "red"})
    left_out = [f"column {name!r} left out" for name in ("item_id", "timestamp", "title")]
    assert [reason.split(",")[0] for reason in made.fixed] == left_out


def test_a_file_given_twice_is_refused_because_its_rows_would_count_double(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text(log(f"u,a,{START}"))
    with pytest.raises(SettingError, match="interactions: .*log.csv is given twice; leave one out"):
        TableSource([path, tmp_path / "." / "log.csv"], progress=False)


def test_the_items_may_call_their_id_otherwise(source):
    made = source(log(f"u,a,{START}"), "code,title\na,x\n", item_columns={"item": "code"})
    assert next(made.items({"a"}, Rejects())).title == "x"


@pytest.mark.parametrize(
    ("unit", "text", "seconds"),
    [
        ("ms", f"{START}500", START + 0.5),
        ("us", f"{START}000001", START + 1e-6),
        ("iso", "2018-09-20", 1_537_401_600),
        ("iso", "2018-09-20 12:30:00+02:00", 1_537_439_400),
        ("iso", "2018-09-20T12:30:00Z", 1_537_446_600),
        ("iso", " 2018-09-20T12:30 ", 1_537_446_600),
        ("iso", "2018-09-20 12:30:00.25 -0330", 1_537_459_200.25),
        ("iso", "2018-09-20T12:30:00.123456789+02", 1_537_439_400.123456),
    ],
)
def test_times_are_read_in_their_unit(source, unit, text, seconds):
    assert source(log(f"u,a,{text}"), time_unit=unit).events(Rejects()).time.tolist() == [seconds]


@pytest.mark.parametrize(
    "text",
    [
        "20.9.2018",
        "2018-13-01",
        "1969-12-31",
        "2100-01-01",
        "5138-01-01",
        "9999-01-01",
        "12",
        "20180920",
        "2018-W38-4",
        "2018-09-20T24:00",
        "2018-09-20T12:30+99:00",
        "0001-01-01T00:00+01:00",
    ],
)
def test_F22_dates_that_cannot_be_are_set_aside(source, text):
    rejects = Rejects(max_share=1)
    assert source(log("u,a,2018-01-01", f"u,a,{text}"), time_unit="iso").events(rejects).n == 1
    assert rejects.counts == {"log.csv": {"bad_time": 1}}


def test_F22_times_in_another_unit_or_in_two_are_refused(source):
    with pytest.raises(DatasetError, match="times look like ms, such as 1500000000000, not s; pass --time-unit ms"):
        source(log(f"u,a,{START}000")).events(Rejects())
    with pytest.raises(DatasetError, match="different units: 1 look like s, 1 look like ms, the first in s on line 2"):
        source(log(f"u,a,{START}", f"u,a,{START}000"), time_unit="ms").events(Rejects())


def test_F22_dates_without_their_option_and_numbers_with_it_are_told_apart(source):
    with pytest.raises(DatasetError, match="log.csv: the times are dates, such as '2018-09-20'; pass --time-unit iso"):
        source(log("u,a,2018-09-20")).events(Rejects())
    with pytest.raises(DatasetError, match="the times are numbers, such as '1500000000'; leave --time-unit iso out"):
        source(log(f"u,a,{START}"), time_unit="iso").events(Rejects())


def test_F10_items_given_again(source):
    made = source(log(f"u,a,{START}"), "item_id,title\na,x\nb,y\na,x\na,z\n,w\n")
    rejects = Rejects(max_share=1)
    assert [(item.item_id, item.title) for item in made.items({"a"}, rejects)] == [("a", "x")]
    assert rejects.counts == {"items.csv": {"conflict": 1, "empty_id": 1}} and made.fixed == {"item given again": 1}


def test_baskets_are_read_where_they_are_wanted(source):
    text = f"item_id,timestamp,basket_id\na,{START},7\nb,{START},8\nc,{START},\n"
    rejects = Rejects(max_share=1)
    events = source(text, with_baskets=True).events(rejects)
    assert [events.baskets[basket] for basket in events.basket] == ["7", "8"] and events.users == [""]
    assert rejects.counts == {"log.csv": {"empty_id": 1}}
    with pytest.raises(DatasetError, match="has no column user_id"):
        source(text)
    with pytest.raises(DatasetError, match="has no column who"):
        source(text, with_baskets=True, columns=Columns(user="who"))


def test_too_many_unusable_rows_stop_the_run(source):
    with pytest.raises(DatasetError, match="log.csv: 1 of 2 rows cannot be used .1 empty_id., more than 1%"):
        source(log(f"u,a,{START}", f",a,{START}")).events(Rejects())
    with pytest.raises(DatasetError, match="log.csv: no usable interaction"):
        source(log(f",a,{START}")).events(Rejects(max_share=1))


def test_parquet_has_numbers_lists_and_timestamps(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    moment = datetime(2018, 9, 20, 12, 30, 0, 250_000)
    for times, expected in ([moment, moment], 1_537_446_600.25), ([date(2018, 9, 20)] * 2, 1_537_401_600):
        parquet.write_table(
            pyarrow.table({"user_id": [1, None], "item_id": ["a", "b"], "timestamp": times}), tmp_path / "log.parquet"
        )
        rejects = Rejects(max_share=1)
        made = TableSource(tmp_path / "log.parquet", progress=False)
        assert told(made.events(rejects)) == [("1", "a", expected, 1)]
        assert rejects.counts == {"log.parquet": {"missing_id": 1}}
    columns = {
        "item_id": ["a"], "title": [None], "categories": [["Home Office", "Pens"]], "price": [1.5],
        "images": [["http://x/1", "2.jpg"]], "size": [3], "stock": [float("nan")],
    }  # fmt: skip
    parquet.write_table(pyarrow.table(columns), tmp_path / "items.parquet")
    made = TableSource(tmp_path / "log.parquet", tmp_path / "items.parquet", progress=False)
    assert list(made.items({"a"}, Rejects())) == [
        Item("a", "", "", ("Home Office", "Pens"), "", "1.5", ("http://x/1", "2.jpg"), {"size": "3", "stock": ""})
    ]


def test_ids_and_times_of_parquet_are_those_meant_and_what_is_no_id_is_set_aside(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    ids = {
        "float": ([7.0, float("nan"), 2.5], ["7"], {"missing_id": 1, "id_is_no_text": 1}),
        "decimal": ([Decimal("7.00"), None], ["7"], {"missing_id": 1}),
        "bytes": ([b"z\xc3\xbc", b"\xff"], ["z\u00fc"], {"id_is_no_text": 1}),
        "bool": ([True], [], {"id_is_no_text": 1}),
        "list": ([["a"]], [], {"id_is_no_text": 1}),
    }
    for values, expected, reasons in ids.values():
        n = len(values) + 1
        table = {"user_id": ["u"] * n, "item_id": [*values, values[0]], "timestamp": [Decimal(START)] * n}
        parquet.write_table(pyarrow.table(table), tmp_path / "log.parquet")
        rejects, made = Rejects(max_share=1), TableSource(tmp_path / "log.parquet", progress=False)
        if expected:
            events = made.events(rejects)
            assert events.items == expected and events.time.tolist() == [START] * 2
            assert rejects.counts == {"log.parquet": reasons}
        else:
            with pytest.raises(DatasetError, match="no usable interaction"):
                made.events(rejects)


@pytest.mark.skipif(not DATA.is_dir(), reason="no real data in ../shared/data")
@pytest.mark.parametrize(
    ("name", "n", "n_users", "n_items", "given"),
    [
        ("amazon-luxury-beauty", 16_826, 1_841, 842, None),
        ("completejourney", 44_433, 2_038, 3_598, None),
        ("hm-mini/raw/transactions_100customers.csv", 777, 70, 686, "hm-mini/raw/articles_100customers.csv"),
    ],
)
def test_real_tables_have_their_counts(name, n, n_users, n_items, given):
    hm = {
        "columns": Columns("customer_id", "article_id", "t_dat"), "time_unit": "iso",
        "item_columns": {"title": "prod_name", "categories": ["index_name", "product_type_name"]},
    }  # fmt: skip
    files = [DATA / name, DATA / given] if given else [DATA / name / f"{name}.{part}" for part in ("inter", "item")]
    made = TableSource(*files, progress=False, **(hm if given else {}))
    rejects = Rejects(max_share=0)
    events = made.events(rejects)
    assert (events.n, len(events.users), len(events.items)) == (n, n_users, n_items)
    found = list(made.items(set(events.items), rejects))
    assert len(found) == n_items and all(each.title for each in found)
