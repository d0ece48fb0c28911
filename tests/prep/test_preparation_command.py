"""The commands amazon and table, as somebody types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dataset_prep.__main__ import main
from recbole_mm.data.files import read_table, write_table
from recbole_mm.data.layout import Manifest

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
LOOSE = ["--min-user", "1", "--min-item", "1"]


@pytest.fixture
def reviews(tmp_path) -> list[str]:
    """Files of the 2018 edition, as arguments."""
    rows = [
        {"reviewerID": f"u{user}", "asin": f"i{(user + step) % 6}", "unixReviewTime": 1_500_000_000 + 86_400 * step,
         "verified": True, "reviewText": "good"}
        for user in range(12) for step in range(5)
    ]  # fmt: skip
    items = [
        {"asin": f"i{k}", "title": f"Thing &amp; {k}", "category": ["All", "Few"], "brand": "b",
         "price": f"${k + 1}.00", "description": ["one", "two"], "imageURL": [], "imageURLHighRes": [], "also_buy": []}
        for k in range(8)
    ]  # fmt: skip
    for name, values in (("reviews.json", rows), ("meta.json", items)):
        (tmp_path / name).write_text("".join(json.dumps(value) + "\n" for value in values))
    return ["--reviews", str(tmp_path / "reviews.json"), "--meta", str(tmp_path / "meta.json")]


@pytest.fixture
def tables(tmp_path) -> list[str]:
    """A CSV of orders and one of goods, with column names of their own, as arguments."""
    orders = [
        f"c{user},g{(user + step) % 6},2017-07-{14 + step:02},o{user}\n" for user in range(12) for step in range(5)
    ]
    goods = [f"g{k},Thing {k},Home,Mills {k % 2},{k + 1}.5,pictures/{k}.jpg\n" for k in range(6)]
    (tmp_path / "orders.csv").write_text("who,what,day,order\n" + "".join(orders))
    (tmp_path / "goods.csv").write_text("code,name,department,group,cost,file\n" + "".join(goods))
    interactions = ["--interactions", str(tmp_path / "orders.csv"), "--user", "who", "--item", "what", "--time", "day"]
    items = ["--items", str(tmp_path / "goods.csv"), "--items-id", "code", "--title", "name", "--price", "cost"]
    return [*interactions, "--time-unit", "iso", *items, "--categories", "department,group", "--image", "file"]


def test_reviews_become_a_folder_that_is_whole(reviews, capsys):
    assert main(["amazon", *reviews, "--name", "Office"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("dataset/Office: made\n60 interactions read, 60 kept, 0 dropped\n12 users, 6 items, 60 inter")
    assert "entities, tags and control characters removed from: 6 title" in out
    assert out.endswith("the dataset card: dataset/Office/DATASET.md\n")
    assert "* source: amazon" in Path("dataset/Office/DATASET.md").read_text()
    assert main(["check", "dataset/Office"]) == 0
    items = read_table(Path("dataset/Office/Office.item"))
    assert items["title"].tolist() == [f"Thing & {k}" for k in range(6)] and set(items["categories"]) == {"All Few"}
    assert Manifest.load(Path("dataset/Office")).settings["source"]["edition"] == "2018"
    assert main(["amazon", *reviews, "--name", "Office"]) == 3
    assert "dataset/Office is there already" in capsys.readouterr().err
    assert main(["amazon", *reviews, "--name", "Office", "--overwrite", "--protocol", "time", "--longest", "3"]) == 0
    assert "protocol time" in capsys.readouterr().out


def test_protocols_and_shared_cut_points(reviews, capsys):
    cuts = ["--valid-from", "2017-07-17", "--test-from", "1500300000"]
    assert main(["amazon", *reviews, "--name", "a", "--protocol", "time", *cuts]) == 0
    assert "validation from 1500249600 (2017-07-17 00:00:00 UTC), test from 1500300000" in capsys.readouterr().out
    more = ["--cold-items", "keep", "--cold-share", "0.4", "--seed", "3"]
    assert main(["amazon", *reviews, "--name", "b", "--protocol", "time", "--cuts-from", "dataset/a", *more]) == 0
    assert "cold items: 2 that training has not, 2 of them taken out of it" in capsys.readouterr().out
    assert len(Path("dataset/b/cold_items.txt").read_text().split()) == 2
    assert Manifest.load(Path("dataset/b")).settings["cuts"] == Manifest.load(Path("dataset/a")).settings["cuts"]


def test_a_folder_is_kept_only_if_files_settings_and_cut_points_are_the_same(reviews, capsys):
    cuts = ["--valid-from", "2017-07-17", "--test-from", "2017-07-18"]
    assert main(["amazon", *reviews, "--name", "a", "--protocol", "time", *cuts]) == 0
    command = ["amazon", *reviews, "--name", "b", "--protocol", "time", "--cuts-from", "dataset/a", "--keep"]
    assert main(command) == main(command) == 0
    assert capsys.readouterr().out.endswith("dataset/b: kept, made of the same files with the same settings\n")
    assert main([*command, "--longest", "3"]) == 3
    assert "made of other files or with other settings; replace it with --overwrite" in capsys.readouterr().err
    cuts[1] = "2017-07-16"
    assert main(["amazon", *reviews, "--name", "a", "--protocol", "time", *cuts, "--overwrite"]) == 0
    assert main(command) == 3
    cuts[1] = "2017-07-17"
    assert main(["amazon", *reviews, "--name", "a", "--protocol", "time", *cuts, "--overwrite"]) == 0
    assert main(command) == 0
    Path(reviews[1]).write_text(Path(reviews[1]).read_text().replace("good", "bad"))
    assert main(command) == 3


def test_tables_with_columns_of_any_name(tables, capsys):
    assert main(["table", *tables, "--name", "shop"]) == 0, capsys.readouterr().err
    assert main(["check", "dataset/shop"]) == 0
    items = read_table(Path("dataset/shop/shop.item"))
    assert items.iloc[0].to_dict() == {
        "item_id": "g0", "title": "Thing 0", "categories": "Home Mills_0", "price": "1.5",
        "image_urls": "pictures/0.jpg", "price_level": "1", "category": "Mills_0",
    }  # fmt: skip
    sessions = ["--protocol", "sessions", "--sessions", "basket", "--basket", "order"]
    assert main(["table", *tables, "--name", "baskets", *sessions]) == 0, capsys.readouterr().err
    assert "12 sessions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gap", "5"], "--gap belongs to --sessions gap; leave it out"),
        (["--protocol", "sessions"], "protocol sessions needs sessions, one of"),
        (
            ["--protocol", "sessions", "--sessions", "basket"],
            "reviews have no baskets; use --sessions day, gap or user",
        ),
        (["--cold-items", "keep"], "--cold-items belongs to --protocol time or sessions; leave it out"),
        (["--hosts", "x.yaml"], "--hosts belongs to --download; leave it out"),
        (["--download", "Office"], "--download brings the files, and so does --reviews; give one of the two"),
        (["--name", "../x"], "--name is '../x', expected the name of a folder without a path"),
        (["--protocol", "time", "--valid-from", "soon", "--test-from", "later"], "'soon' is no time; expected unix"),
    ],
)
def test_options_of_amazon_that_are_wrong_are_refused(reviews, capsys, options, message):
    assert main(["amazon", *reviews, "--name", "x", *options]) == 2
    assert message in capsys.readouterr().err and not Path("dataset").exists()


def test_options_about_metadata_need_metadata(reviews, tables, capsys):
    assert main(["amazon", *reviews[:2], "--name", "x", "--without-text", "drop"]) == 2
    assert "--without-text needs metadata: --meta FILE" in capsys.readouterr().err
    assert main(["amazon", *reviews[:2], "--name", "x", "--price-method", "linear"]) == 2
    assert "options of price levels need metadata: --meta FILE" in capsys.readouterr().err
    assert main(["amazon", "--name", "x"]) == 2
    assert "no reviews; name the files with --reviews FILE, or fetch them with --download" in capsys.readouterr().err
    assert main(["table", *tables[:2], "--name", "x", "--title", "name"]) == 2
    assert "--title names a column of a table of items: --items FILE" in capsys.readouterr().err
    assert main(["table", *tables, "--name", "x", "--basket", "order"]) == 2
    assert "--basket belongs to --sessions basket; leave it out" in capsys.readouterr().err
    assert main(["amazon", *reviews[:2], "--name", "x"]) == 0


def test_F26_and_F49_end_with_their_exit_codes(reviews, tmp_path, capsys):
    assert main(["amazon", *reviews, "--name", "x", "--min-item", "99"]) == 3
    assert "--min-item 99 removes all 60 interactions that were left of 60" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["amazon", *reviews, "--name", "x", "--out", str(tmp_path / "file")]) == 4
    assert "cannot write into" in capsys.readouterr().err


def test_too_many_unusable_rows_stop_the_run_unless_allowed(reviews, tmp_path, capsys):
    with open(tmp_path / "reviews.json", "a") as file:
        file.write("{not json\n" * 3)
    assert main(["amazon", *reviews, "--name", "x"]) == 3
    assert "3 of 63 rows cannot be used" in capsys.readouterr().err and not Path("dataset/x").exists()
    assert main(["amazon", *reviews, "--name", "x", "--max-rejected", "0.1"]) == 0
    out = capsys.readouterr().out
    assert "63 interactions read, 60 kept, 3 dropped" in out and "see rejected.tsv.gz" in out
    assert Path("dataset/x/rejected.tsv.gz").is_file()


def test_files_are_fetched_when_asked(reviews, monkeypatch, capsys):
    asked = []

    def fetch(edition: str, category: str, to: Path, *, hosts: Path | None) -> tuple[Path, Path]:
        asked.append((edition, category, to, hosts))
        return Path(reviews[1]), Path(reviews[3])

    monkeypatch.setattr("dataset_prep.preparation_command.fetch_category", fetch)
    download = ["--download", "Office_Products", "--edition", "2018", "--download-to", "store", "--hosts", "h.yaml"]
    assert main(["amazon", *download, "--name", "x"]) == 0
    assert asked == [("2018", "Office_Products", Path("store"), Path("h.yaml"))]
    assert main(["amazon", *download, "--name", "x"]) == 3  # before another download
    assert len(asked) == 1


@pytest.mark.skipif(not DATA.is_dir(), reason="no real data beside the project")
@pytest.mark.parametrize(
    ("name", "options", "line"),
    [
        ("amazon-luxury-beauty", ["--protocol", "time"], "16,826 interactions read"),
        (
            "hm-mini",
            [
                "--protocol",
                "sessions",
                "--sessions",
                "basket",
                "--basket",
                "session_id",
                *LOOSE,
                "--cold-items",
                "keep",
            ],
            "9,388 interactions read",
        ),
        ("completejourney", ["--protocol", "sessions", "--sessions", "day"], "44,433 interactions read"),
    ],
)
def test_real_tables_are_prepared(name, options, line, capsys):
    files = ["--interactions", str(DATA / name / f"{name}.inter"), "--items", str(DATA / name / f"{name}.item")]
    assert main(["table", *files, "--name", "x", *options]) == 0, capsys.readouterr().err
    assert line in capsys.readouterr().out
    assert main(["check", "dataset/x"]) == 0


def test_atomic_files_need_no_names_of_columns(tmp_path, capsys):
    columns = {"user_id:token": ["a", "b"], "item_id:token": ["x", "x"], "timestamp:float": [1.0, 2.0]}
    write_table(tmp_path / "in.inter", columns)
    assert main(["table", "--interactions", str(tmp_path / "in.inter"), "--name", "x", *LOOSE]) == 0
    assert "2 users, 1 items, 2 interactions" in capsys.readouterr().out
