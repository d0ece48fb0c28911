"""From a source to a folder: what is written, that everything is counted, and that it is whole or not there."""

from __future__ import annotations

import errno
import gzip
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Container, Iterator
from pathlib import Path

import pytest

from dataset_prep.events import EventBuilder, Events
from dataset_prep.preparation import prepare
from dataset_prep.preparation_report import PreparationReport
from dataset_prep.preparation_settings import PreparationSettings, settings_of
from dataset_prep.price import PriceSettings
from dataset_prep.sources import Item
from dataset_prep.sources.amazon import AmazonSource
from dataset_prep.sources.rejects import Rejects
from recbole_mm.data.files import read_table
from recbole_mm.data.layout import Manifest, check_folder, folder_kind
from recbole_mm.errors import DatasetError, SettingError

ROOT = Path(__file__).resolve().parents[2]
RAW = ROOT.parent / "shared" / "data" / "amazon-gift-cards" / "raw"
DAY = 86_400
LOOSE = {"min_user": 1, "min_item": 1}


class MemorySource:
    """A source of rows in memory; the first ``n_bad`` rows of interactions and one of items cannot be used."""

    def __init__(self, rows: list[tuple], items: list[Item], *, n_bad: int = 0) -> None:
        self._rows, self._items, self._n_bad = rows, items, n_bad
        self.described = {"source": "memory", "licence": "none"}
        self.raw_files = {"rows": "0" * 64}
        self.n_rows: dict[str, int] = {}
        self.fixed: Counter[str] = Counter()

    def events(self, rejects: Rejects) -> Events:
        for line in range(1, self._n_bad + 1):
            rejects.add("rows", line, "bad_json", "{")
        builder = EventBuilder(with_baskets=len(self._rows[0]) == 4)
        for line, (user, item, time, *basket) in enumerate(self._rows, start=self._n_bad + 1):
            builder.add(user, item, time, line, *basket)
        self.n_rows["rows"] = len(self._rows) + self._n_bad
        return builder.build()

    def items(self, wanted: Container[str], rejects: Rejects) -> Iterator[Item]:
        self.n_rows["items"] = len(self._items)
        yield from (item for item in self._items if item.item_id in wanted)


def shop_rows(seed: int = 0, n: int = 600) -> list[tuple[str, str, float]]:
    made = random.Random(seed)
    rows = []
    for _ in range(n):
        time = made.randrange(100)
        item = min(made.choices(range(max(10, time // 2)), k=2))
        rows.append((f"u{min(made.choices(range(50), k=2))}", f"i{item}", float(DAY * 17_000 + DAY * time)))
        rows += [rows[-1]] * (made.random() < 0.05)
    return rows


def shop_items(n: int = 50) -> list[Item]:
    return [
        Item(
            f"i{k}",
            title=f"Thing &amp; {k}" if k % 7 else "",
            categories=("All", f"Group {k % 3}"),
            price=f"${k}.50" if k % 5 else "Free",
            pictures=(f"https://x/{k}.jpg",) if k % 4 else (),
        )
        for k in range(n)
        if k % 11
    ]


def shop(**arguments) -> MemorySource:
    return MemorySource(shop_rows(), shop_items(), **arguments)


def make(folder: Path, source: MemorySource | None = None, overwrite: bool = False, **settings) -> PreparationReport:
    return prepare(source or shop(), folder, PreparationSettings(**settings), overwrite=overwrite)


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


PROTOCOLS = [
    {},
    {"protocol": "time"},
    {"protocol": "time", "cold_items": "keep", "cold_share": 0.2, "longest": 5},
    {"protocol": "sessions", "sessions": "user"},
    {"protocol": "sessions", "sessions": "gap", "gap": 20.0 * DAY, "cold_items": "keep"},
    {"protocol": "sessions", "sessions": "user", "split": "leave-one-out", "longest": 20},
]

# ---------------------------------------------------------------- every protocol


@pytest.mark.parametrize("cleaning", [{}, {"duplicates": "first", "without_text": "drop"}, {"without_price": "drop"}])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_everything_read_is_kept_or_counted_and_the_folder_is_whole(tmp_path, protocol, cleaning):
    settings = {"min_user": 3, "min_item": 3, "max_rejected": 0.5, **protocol, **cleaning}
    report = make(tmp_path / "shop", shop(n_bad=3), **settings)
    assert (
        report.n_read == len(shop_rows()) + 3 == report.n_interactions + sum(step.interactions for step in report.steps)
    )
    remarks = check_folder(tmp_path / "shop")
    assert all("have no row" in remark for remark in remarks)
    manifest = Manifest.load(tmp_path / "shop")
    counts = manifest.settings["counts"]
    assert counts["n_read"] == counts["n_interactions"] + sum(counts["dropped"].values())
    assert counts["rejected"] == {"rows: bad_json": 3} and counts["dropped"]["row set aside, bad_json"] == 3
    assert manifest.settings["source"] == {"source": "memory", "licence": "none"}
    assert manifest.settings["protocol"] == report.settings.protocol and manifest.raw_files == {"rows": "0" * 64}
    listed = gzip.decompress((tmp_path / "shop" / "rejected.tsv.gz").read_bytes()).decode()
    assert listed.count("\n") == 4 and "rows\t2\tbad_json\t{" in listed
    items = read_table(tmp_path / "shop" / "shop.item")
    assert len(items) == report.items.n_rows and not items["item_id"].duplicated().any()
    assert "&amp;" not in "".join(items["title"]) and report.items.changed == {"title": report.items.columns["title"]}
    assert f"{report.n_read:,} interactions read, {report.n_interactions:,} kept" in str(report)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_same_input_gives_the_same_bytes(tmp_path, protocol):
    for place in ("1", "2"):
        make(tmp_path / place / "shop", **LOOSE, **protocol)
    make(tmp_path / "2" / "shop", overwrite=True, **LOOSE, **protocol)
    assert content(tmp_path / "1" / "shop") == content(tmp_path / "2" / "shop")


def test_leave_one_out_writes_interactions_by_time_and_then_by_line(tmp_path):
    rows = [("b", "y", 2.0), ("a", "x", 2.0), ("a", "y", 1.0), ("b", "x", 1.0)]
    report = make(tmp_path / "shop", MemorySource(rows, [Item("x", title="X")]), **LOOSE)
    assert (tmp_path / "shop" / "shop.inter").read_text() == (
        "user_id:token\titem_id:token\ttimestamp:float\na\ty\t1.0\nb\tx\t1.0\nb\ty\t2.0\na\tx\t2.0\n"
    )
    assert (tmp_path / "shop" / "shop.item").read_text() == "item_id:token\ttitle:token_seq\nx\tX\n"
    note = Manifest.load(tmp_path / "shop").settings["protocol_note"]
    assert "training sees what is the future for other users" in note and note in str(report)
    assert "remark: 1 of 2 items have no metadata" in str(report)


def test_leave_one_out_counts_targets_that_nobody_trains_on(tmp_path):
    rows = [(user, item, float(time)) for user in "ab" for time, item in enumerate(f"wxy{user}")]
    report = make(tmp_path / "shop", MemorySource(rows, []), **LOOSE)
    assert report.n_cold == {"valid": 2, "test": 2}
    assert "remark: 2 test targets are items that no training history has" in str(report)
    assert not (tmp_path / "shop" / "shop.item").exists()


def test_items_are_written_with_prices_levels_and_further_columns(tmp_path):
    rows = [(user, item, float(time)) for user in "ab" for time, item in enumerate("wxyz")]
    items = [
        Item("w", title="<b>W</b>", categories=("All", "Big &amp; red"), price="$1 - $2", more={"weight": "2"}),
        Item("x", price="4", categories=("All", "Big &amp; red"), pictures=("a b.jpg",), more={"weight": ""}),
        Item("y", description="one<br>two", price="a-box-inner{}"),
    ]
    source = MemorySource(rows, items)
    report = prepare(source, tmp_path / "shop", PreparationSettings(**LOOSE), prices=PriceSettings(n_levels=2))
    assert (tmp_path / "shop" / "shop.item").read_text() == (
        "item_id:token\ttitle:token_seq\tcategories:token_seq\tdescription:token_seq\tprice:float\t"
        "image_urls:token_seq\tweight:float\tprice_level:token\tcategory:token\n"
        "w\tW\tAll Big_&_red\t\t1.5\t\t2\t1\tBig_&_red\n"
        "x\t\tAll Big_&_red\t\t4\ta%20b.jpg\t\t2\tBig_&_red\n"
        "y\t\t\tone • two\t\t\t\t\t\n"
    )
    assert report.items.no_price == {"not written as a price": 1} and report.prices.n_filled == 2
    settings = Manifest.load(tmp_path / "shop").settings
    assert settings["prices"]["columns"] == ["price_level", "category"]
    assert settings["counts"]["items_with"]["price"] == 2


def test_F20_prices_that_get_no_level_stop_nothing_unless_levels_are_asked_for(tmp_path):
    rows = [(user, item, float(time)) for user in "ab" for time, item in enumerate("wxyz")]
    source = MemorySource(rows, [Item("w", price="4"), Item("x", categories=("All",))])
    report = prepare(source, tmp_path / "shop", PreparationSettings(**LOOSE))
    assert "price levels: none\n  1 without: price empty\n  1 without: no category" in str(report)
    assert (tmp_path / "shop/shop.item").read_text().startswith("item_id:token\tcategories:token_seq\tprice:float\n")
    with pytest.raises(DatasetError, match="no item of 2 gets a price level"):
        prepare(source, tmp_path / "other", PreparationSettings(**LOOSE), prices=PriceSettings(n_levels=2))


def test_a_column_category_is_the_category_of_the_prices(tmp_path):
    rows = [(user, item, float(time)) for user in "ab" for time, item in enumerate("wxyz")]
    items = [Item("w", price="4", categories=("All", "Pens"), more={"category": "Own name"})]
    report = prepare(MemorySource(rows, items), tmp_path / "shop", PreparationSettings(**LOOSE))
    assert "in 1 category (last of 'category')" in str(report)
    assert (tmp_path / "shop/shop.item").read_text().split("\n")[1] == "w\tAll Pens\t4\tOwn name\t1"


def test_cold_items_are_listed_and_never_trained_on(tmp_path):
    report = make(tmp_path / "shop", protocol="time", cold_items="keep", cold_share=0.3, **LOOSE)
    listed = (tmp_path / "shop" / "cold_items.txt").read_text().split()
    train = read_table(tmp_path / "shop" / "shop.train.inter")
    trained = set(train["item_id"]).union(*train["item_id_list"].str.split())
    test = read_table(tmp_path / "shop" / "shop.test.inter")
    assert listed == list(report.cold_items) and report.n_drawn > 5
    assert not trained & set(listed) and set(test["item_id"]) & set(listed)
    counts = Manifest.load(tmp_path / "shop").settings["counts"]
    assert counts["n_cold_items"] == len(listed) and counts["n_drawn_cold_items"] == report.n_drawn


def test_datasets_share_cut_points(tmp_path):
    first = make(tmp_path / "first", protocol="time", **LOOSE)
    again = make(tmp_path / "again", protocol="time", cuts_from=tmp_path / "first", **LOOSE)
    rows = [row for row in shop_rows(seed=1)]
    other = make(
        tmp_path / "other", MemorySource(rows, []), protocol="sessions", sessions="user", cuts_from=tmp_path / "first",
        **LOOSE,
    )  # fmt: skip
    assert first.cuts == again.cuts == other.cuts
    settings = Manifest.load(tmp_path / "other").settings
    assert settings["cuts_from"] == "first" and settings["cuts"] == first.cuts._asdict()
    dates = make(tmp_path / "dates", protocol="time", valid_from="2016-09-01", test_from="2016-10-01", **LOOSE)
    assert dates.cuts == (1472688000.0, 1475280000.0)


def test_baskets_are_sessions_and_users_need_no_name(tmp_path):
    rows = [("", item, float(DAY * day), f"b{day}") for day in range(30) for item in ("x", "y", f"z{day % 3}")]
    report = make(tmp_path / "shop", MemorySource(rows, []), protocol="sessions", sessions="basket", **LOOSE)
    assert report.parts["train"]["sessions"] == 24 and "30 sessions, 5 items" in str(report)
    with pytest.raises(
        SettingError, match="sessions by basket need a source with baskets; name their column with --bas"
    ):
        make(tmp_path / "other", protocol="sessions", sessions="basket")


def test_F16_twins_are_remarked_and_kept_apart(tmp_path):
    rows = [("U", "b01", 1.0), ("u", "B01", 2.0)]
    report = make(tmp_path / "shop", MemorySource(rows, []), **LOOSE)
    assert report.n_items == report.n_users == 2
    assert "1 user ids differ from another only in case or composed letters" in str(report)
    assert "1 item ids differ from another only in case or composed letters" in str(report)


def test_F12_F15_ids_are_data(tmp_path):
    ids = ["NA", "null", "00123", "1e5", "True", "../../etc/x", "C:\\x", "x" * 500]
    rows = [(user, item, 1.0) for user in ids for item in ids]
    make(tmp_path / "shop", MemorySource(rows, [Item(name, title=f'a "{name}') for name in ids]), **LOOSE)
    assert set(read_table(tmp_path / "shop" / "shop.inter")["item_id"]) == set(ids)
    assert read_table(tmp_path / "shop" / "shop.item")["title"].tolist() == [f'a "{name}' for name in ids]
    assert set(os.listdir(tmp_path / "shop")) == {"shop.inter", "shop.item", "manifest.json"}


@pytest.mark.parametrize(("user", "item", "what"), [("u", "[PAD]", "item id '.PAD.'"), ("[PAD]", "i", "user id")])
def test_F17_an_id_of_padding_is_refused(tmp_path, user, item, what):
    with pytest.raises(DatasetError, match=f"the {what}.* is RecBole's padding token; rename it"):
        make(tmp_path / "shop", MemorySource([(user, item, 1.0)], []), **LOOSE)


# ---------------------------------------------------------------- what stops a run


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_item": 5000}, "--min-item 5000 removes all"),
        ({"protocol": "sessions", "sessions": "day", "min_item": 1, "min_length": 50}, "--min-length 50 removes all"),
        (
            {"protocol": "sessions", "sessions": "gap", "gap": 1.0, "min_user": 1, "min_item": 60},
            "--min-item 60 removes",
        ),
        ({"without_metadata": "drop", "min_item": 5, "min_user": 200}, "--min-user 200 removes all"),
    ],
)
def test_F26_the_filter_that_leaves_nothing_is_named(tmp_path, settings, message):
    with pytest.raises(DatasetError, match=message) as found:
        make(tmp_path / "shop", **settings)
    assert found.value.exit_code == 3 and list(tmp_path.iterdir()) == []


def test_metadata_of_other_items_are_refused(tmp_path):
    with pytest.raises(
        DatasetError, match="none of the .* items, such as 'i.*', is in the metadata; are these the same i"
    ):
        make(tmp_path / "shop", MemorySource(shop_rows(), [Item("other")]))


def test_F49_a_place_that_cannot_be_written_is_told_before_anything_is_read(tmp_path):
    class Unread(MemorySource):
        def events(self, rejects: Rejects) -> Events:
            raise AssertionError("read")

    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write into"):
        make(tmp_path / "file" / "shop", Unread([], []))
    make(tmp_path / "shop", **LOOSE)
    with pytest.raises(DatasetError, match="shop is there already"):
        make(tmp_path / "shop", Unread([], []))


@pytest.mark.parametrize("protocol", [PROTOCOLS[0], PROTOCOLS[2]])
def test_F48_a_disk_that_is_full_at_any_write_leaves_the_old_folder(tmp_path, monkeypatch, protocol):
    folder = tmp_path / "shop"
    make(folder, **LOOSE)
    kept = tmp_path / "kept"
    shutil.copytree(folder, kept)
    real = os.fsync
    for failing in range(20):
        calls = []

        def full(handle: int, calls: list = calls, failing: int = failing) -> None:
            calls.append(handle)
            if len(calls) == failing + 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(handle)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            try:
                make(folder, overwrite=True, **LOOSE, **protocol)
                break
            except OSError as error:
                assert error.errno == errno.ENOSPC and "the disk is full" in str(error)
        assert content(folder) == content(kept) and sorted(os.listdir(tmp_path)) == ["kept", "shop"]
    assert failing >= 6 and check_folder(folder) != []  # remarks: items without metadata


def test_F48_a_spool_that_cannot_be_written_leaves_the_old_folder(tmp_path, monkeypatch):
    folder = tmp_path / "shop"
    make(folder, **LOOSE)
    before = content(folder)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("json.dumps", full)
    with pytest.raises(OSError, match="No space left on device"):
        make(folder, overwrite=True, **LOOSE)
    assert content(folder) == before and os.listdir(tmp_path) == ["shop"]


def test_F61_a_second_process_is_refused(tmp_path):
    code = f"""
import sys
from pathlib import Path
from dataset_prep.locking import locked
with locked(Path({str(tmp_path / "shop")!r})):
    print("held", flush=True)
    sys.stdin.read()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(DatasetError, match=f"shop is being written by process {process.pid}"):
            make(tmp_path / "shop")
        assert not (tmp_path / "shop").exists()
    finally:
        process.communicate()
    make(tmp_path / "shop", **LOOSE)


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"protocol": "random"}, "protocol is 'random', expected one of"),
        ({"duplicates": "last"}, "duplicates is 'last', expected one of"),
        ({"without_text": "no"}, "without_text is 'no', expected one of"),
        ({"min_user": 0}, "min_user is 0, expected at least 1"),
        ({"max_rejected": 2.0}, "max_rejected is 2.0, expected a share from 0 to 1"),
        ({"protocol": "sessions"}, "protocol sessions needs sessions, one of"),
        ({"sessions": "day"}, "sessions is 'day', which belongs to protocol sessions, not leave-one-out"),
        ({"protocol": "time", "longest": 1}, "longest is 1, expected at least 2"),
        ({"protocol": "time", "valid_share": 0.7, "test_share": 0.5}, "valid_share and test_share are 0.7 and 0.5"),
        ({"protocol": "time", "valid_from": 5}, "valid_from is 5 and test_from None; expected both or none"),
        ({"protocol": "time", "cold_share": 0.5}, "cold_share takes items out of training"),
        ({"protokoll": "time"}, "no setting 'protokoll' of the preparation; did you mean 'protocol'?"),
        ({"gap": 60.0}, "--gap belongs to --sessions gap; leave it out"),
        ({"longest": 60}, "--longest belongs to --protocol time or sessions; leave it out"),
        ({"protocol": "time", "split": "time"}, "--split belongs to --protocol sessions; leave it out"),
        ({"protocol": "time", "seed": 1}, "--seed belongs to --cold-share or --session-order random; leave it out"),
        (
            {"valid_from": "2016-01-01", "test_from": "2017-01-01"},
            "--valid-from belongs to --protocol time, or sessions s",
        ),
        (
            {"protocol": "time", "valid_from": "2016-01-01", "test_from": "2017-01-01", "valid_share": 0.1},
            "--valid-share belongs to --protocol time, or sessions split by time, without cut points; leave it out",
        ),
    ],
)
def test_settings_that_are_wrong_or_mean_nothing_are_refused(settings, message):
    with pytest.raises(SettingError, match=message.replace("?", r"\?")):
        settings_of(settings)


def test_the_manifest_has_only_settings_that_mean_something():
    plain = PreparationSettings().that_apply()
    assert "longest" not in plain and "sessions" not in plain and "cold_items" not in plain and plain["min_user"] == 5
    sessions = PreparationSettings(protocol="sessions", sessions="gap").that_apply()
    assert sessions["gap"] == 1800.0 and sessions["longest"] == 50 and "seed" not in sessions


# ---------------------------------------------------------------- real files


@pytest.mark.skipif(not RAW.is_dir(), reason="no raw Amazon files beside the project")
def test_real_reviews_have_the_published_counts(tmp_path):
    source = AmazonSource(RAW / "Gift_Cards_5.json.gz", RAW / "meta_Gift_Cards.json.gz", progress=False)
    report = prepare(source, tmp_path / "Gift", PreparationSettings(duplicates="first", **LOOSE))
    assert (report.n_read, report.n_users, report.n_items, report.n_interactions) == (2972, 458, 148, 2969)
    assert report.items.n_rows == 148 and check_folder(tmp_path / "Gift") == []
    assert folder_kind(tmp_path / "Gift") == "interactions"
