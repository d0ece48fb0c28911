"""The figures of a folder are those that one counts by hand."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dataset_prep.__main__ import main
from dataset_prep.description import Spread, describe, short
from dataset_prep.pictures.store import COLUMNS
from recbole_mm.data.files import write_table
from recbole_mm.data.layout import write_feature

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def shop(tmp_path) -> Path:
    """Two users, three items with interactions and one without."""
    folder = tmp_path / "shop"
    folder.mkdir()
    columns = {
        "user_id:token": ["u", "u", "u", "v"],
        "item_id:token": ["a", "b", "a", "c"],
        "timestamp:float": [86_400.0, 86_401.0, 172_800.0, 0.0],
    }
    write_table(folder / "shop.inter", columns)
    items = {
        "item_id:token": ["a", "b", "c", "never"],
        "title:token_seq": ["A lamp", "", "A <b>tent</b>", "gone"],
        "price:token": ["$2.00", "", "free", "$9"],
    }
    write_table(folder / "shop.item", items)
    return folder


@pytest.fixture
def sessions(tmp_path) -> Path:
    """Session 1 is [a, b, a], of which the test has the last step; session 2 is [b, c] in validation."""
    folder = tmp_path / "visits"
    folder.mkdir()
    rows = {"train": [("1", "a", "b")], "valid": [("2", "b", "c")], "test": [("1", "a b", "a")]}
    for part, here in rows.items():
        names = ("session_id:token", "item_id_list:token_seq", "item_id:token")
        write_table(folder / f"visits.{part}.inter", dict(zip(names, map(list, zip(*here, strict=True)), strict=True)))
    return folder


def test_interactions_are_counted_by_user_and_by_item(shop):
    found = describe(shop)
    assert sorted(found.lengths.tolist()) == [1, 3] and found.popularity.tolist() == [2, 1, 1]
    assert (found.n_items, found.n_interactions, found.owner) == (3, 4, "users")
    assert found.density == pytest.approx(4 / 6)
    assert (found.first, found.last) == (0.0, 172_800.0)
    assert "from 1970-01-01 to 1970-01-03" in str(found)


def test_columns_and_prices_count_items_that_occur(shop):
    found = describe(shop)
    assert found.columns == {"title": 2, "price": 2} and found.n_listed == 4
    assert "the table of items has 4, with those that do not occur" in str(found)
    assert found.prices.tolist() == [2.0]


def test_of_each_session_the_longest_row_counts(sessions):
    found = describe(sessions)
    assert sorted(found.lengths.tolist()) == [2, 3] and found.popularity.tolist() == [2, 2, 1]
    assert found.parts == {"train": 1, "valid": 1, "test": 1}
    assert found.cold == 1 and "cold items (in validation or test, not in training): 1" in str(found)


@pytest.mark.parametrize("seed", range(5))
def test_the_figures_are_those_of_a_literal_count(tmp_path, seed):
    generator = np.random.default_rng(seed)
    plain, split = tmp_path / "plain", tmp_path / "split"
    plain.mkdir(), split.mkdir()
    pairs = [(f"u{generator.integers(9)}", f"i{generator.integers(20)}") for _ in range(generator.integers(1, 120))]
    users, items = map(list, zip(*pairs, strict=True))
    write_table(plain / "plain.inter", {"user_id:token": users, "item_id:token": items})
    found = describe(plain)
    assert sorted(found.lengths.tolist()) == sorted(users.count(user) for user in set(users))
    assert found.popularity.tolist() == sorted((items.count(item) for item in set(items)), reverse=True)
    n_head = max(1, round(len(set(items)) / 5))
    assert found.head_share == pytest.approx(sum(found.popularity[:n_head]) / len(items))

    sessions = [[f"i{generator.integers(20)}" for _ in range(generator.integers(2, 7))] for _ in range(12)]
    seen = {"train": set(), "valid": set(), "test": set()}
    for k, part in enumerate(seen):
        rows = [(n, one[:end], one[end]) for n, one in enumerate(sessions) if n % 3 == k for end in range(1, len(one))]
        columns = {
            "session_id:token": [f"s{n}" for n, _, _ in rows],
            "item_id_list:token_seq": [" ".join(prefix) for _, prefix, _ in rows],
            "item_id:token": [target for _, _, target in rows],
        }
        write_table(split / f"split.{part}.inter", columns)
        seen[part] = {item for n, one in enumerate(sessions) if n % 3 == k for item in one}
    found, everything = describe(split), [item for one in sessions for item in one]
    assert sorted(found.lengths.tolist()) == sorted(map(len, sessions))
    assert found.popularity.tolist() == sorted(map(everything.count, set(everything)), reverse=True)
    assert found.cold == len((seen["valid"] | seen["test"]) - seen["train"])


def test_features_cover_items_that_occur(shop):
    rows = np.ones((3, 2), dtype=np.float32)
    write_feature(
        shop, "text", tokens=["a", "never", "c"], rows=rows, counts=np.array([2, 1, 0]), encoder="tfidf", source="title"
    )
    made = describe(shop).features["text"]
    assert (made.n_covered, made.n_rows, made.width, made.encoder) == (1, 3, 2, "tfidf")
    assert "feature text: 1 items (33.3%), 3 x 2, tfidf of title" in str(describe(shop))


def test_pictures_are_counted_by_status(shop):
    (shop / "pictures").mkdir()
    index = shop / "pictures" / "index.tsv"
    rows = [
        (item, "0", "x.png", status, "", "0", "", "0", "0")
        for item, status in zip("abc", ("ok", "ok", "html"), strict=True)
    ]
    index.write_text("\n".join("\t".join(row) for row in [COLUMNS, *rows]) + "\n")
    assert describe(shop).pictures == {"ok": 2, "html": 1}
    assert "pictures: 2 ok, 1 html" in str(describe(shop))


def test_a_folder_without_items_or_manifest_is_described(shop):
    (shop / "shop.item").unlink()
    found = describe(shop)
    assert found.columns == {} and found.n_listed == 0 and len(found.prices) == 0


def test_the_head_is_the_most_popular_fifth(tmp_path):
    folder = tmp_path / "head"
    folder.mkdir()
    items = ["a"] * 6 + ["b", "c", "d", "e"]
    write_table(folder / "head.inter", {"user_id:token": ["u"] * 10, "item_id:token": items})
    found = describe(folder)
    assert found.head_share == pytest.approx(0.6) and found.first is None


def test_numbers_are_as_long_as_one_reads_them():
    assert [short(value) for value in (1234, 2.5, 0.00421, 3.0)] == ["1,234", "2.50", "0.0042", "3"]
    assert str(Spread.of(np.array([1, 2, 9]))) == "1 to 9, median 2, mean 4"


def test_the_command_prints_the_figures(shop, capsys):
    assert main(["describe", str(shop)]) == 0
    assert "shop: 2 users, 3 items, 4 interactions" in capsys.readouterr().out
    assert not (shop / "DATASET.md").exists()
    shutil.rmtree(shop)
    assert main(["describe", str(shop)]) == 3
    assert "no dataset folder" in capsys.readouterr().err


def test_the_command_writes_the_card(shop, capsys):
    assert main(["describe", str(shop), "--card"]) == 0
    assert "DATASET.md: written" in capsys.readouterr().out
    assert "DATASET.md" in json.loads((shop / "manifest.json").read_text())["files"]


def test_the_model_within_an_encoder_is_named(shop):
    settings = {"n_words": 3, "clip": {"model": "ViT-B-32"}, "text_encoder": {"settings": {"model": "mpnet"}}}
    rows = np.ones((1, 2), dtype=np.float32)
    write_feature(shop, "image", tokens=["a"], rows=rows, encoder="clip_words", source="pictures", settings=settings)
    write_feature(
        shop, "seen", tokens=["a"], rows=rows, encoder="torchvision", source="x", settings={"network": "googlenet"}
    )
    made = describe(shop).features
    assert (made["image"].model, made["seen"].model) == ("ViT-B-32, mpnet", "googlenet")


def test_a_reader_that_stops_reading_is_no_fault(shop):
    command = [sys.executable, "-m", "dataset_prep", "describe", str(shop)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=REPOSITORY) as process:
        process.stdout.close()
        error = process.stderr.read().decode()
    assert (process.returncode, error) == (0, "")
