"""The dataset card says what is in a folder, is entered into the manifest, and is the same each time."""

from __future__ import annotations

import builtins
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset_prep import card
from dataset_prep.card import card_text, refresh_card, write_card
from dataset_prep.demo import make_demo
from dataset_prep.description import describe
from recbole_mm.data.files import write_table
from recbole_mm.data.layout import Manifest, check_folder, write_feature


@pytest.fixture
def shop(tmp_path) -> Path:
    folder = tmp_path / "shop"
    folder.mkdir()
    users = [f"u{number // 3}" for number in range(30)]
    items = [f"i{number * number % 7}" for number in range(30)]
    times = [float(86_400 * number) for number in range(30)]
    write_table(folder / "shop.inter", {"user_id:token": users, "item_id:token": items, "timestamp:float": times})
    tokens = [f"i{number}" for number in range(7)]
    columns = {
        "item_id:token": tokens,
        "title:token_seq": [f"A |thing| costing $1 no. {number} ✈ 灯" for number in range(7)],
        "price:float": [0.5 * 4**number for number in range(7)],
        "image:token": [f"{token}.png" for token in tokens],
    }
    write_table(folder / "shop.item", columns)
    for number, token in enumerate(tokens[:5]):
        Image.new("RGB", (24, 18), (40 * number, 0, 90)).save(folder / f"{token}.png")
    settings = {
        "source": {"source": "made up", "licence": "for this test"},
        "counts": {"n_read": 40, "dropped": {"fewer than 5": 10}, "cleaned": {"titles": 3456}},
        "prices": {"method": "linear", "missing": {}},
        "cuts": {"test_from": 1537401600.0, "share": 0.1, "odd|name": "two\nlines"},
        "remarks": ["a remark"],
    }
    replace(Manifest.load(folder), settings=settings, raw_files={"reviews.gz": "ab" * 32}).save(folder)
    return folder


def test_the_card_says_where_data_come_from_and_what_was_done(shop):
    text = card_text(describe(shop))
    for line in (
        "# shop",
        "* source: made up",
        "* licence: for this test",
        f"| reviews.gz | {'ab' * 32} |",
        "40 interactions were read.",
        "| fewer than 5 | 10 |",
        "| titles | 3,456 |",
        "| cuts.test_from | 1537401600 |",
        "| cuts.share | 0.1 |",
        "| cuts.odd\\|name | two lines |",
        "* from 1970-01-01 to 1970-01-30",
        "* a remark",
        "| prices.method | linear |",
        "training sees what is the future for other users",
        "| price | 4 | 100.0% |",
    ):
        assert line in text, line
    assert "prices.missing" not in text


def test_without_a_licence_it_says_that_there_is_none(shop):
    replace(Manifest.load(shop), settings={}).save(shop)
    assert "licence: not stated" in card_text(describe(shop))


def test_card_and_pictures_are_entered_into_the_manifest_and_the_folder_is_whole(shop):
    pytest.importorskip("matplotlib")
    write_card(shop)
    files = Manifest.load(shop).files
    names = {"card/lengths.png", "card/popularity.png", "card/prices.png", "card/items.png"}
    assert {"DATASET.md", *names} <= set(files)
    text = (shop / "DATASET.md").read_text()
    assert all(f"({name})" in text for name in names)
    check_folder(shop)


def test_the_same_folder_gives_the_same_bytes(shop):
    pytest.importorskip("matplotlib")
    write_card(shop)
    first = {file.name: file.read_bytes() for file in [shop / "DATASET.md", *(shop / "card").iterdir()]}
    write_card(shop)
    assert first == {file.name: file.read_bytes() for file in [shop / "DATASET.md", *(shop / "card").iterdir()]}


def test_the_samples_show_the_pictures(shop):
    pytest.importorskip("matplotlib")
    write_card(shop)
    pixels = np.asarray(Image.open(shop / "card" / "items.png").convert("RGB")).reshape(-1, 3)
    shown = {tuple(pixel) for pixel in np.unique(pixels, axis=0).tolist()}
    found = {token for token in describe(shop).tokens}
    for number in range(5):
        assert ((40 * number, 0, 90) in shown) == (f"i{number}" in found)


def marks(axis) -> list[str]:
    axis.figure.canvas.draw()
    low, high = sorted(axis.get_view_interval())
    return [
        mark.get_text()
        for mark, at in zip(axis.get_ticklabels(), axis.get_ticklocs(), strict=True)
        if low <= at <= high
    ]


@pytest.mark.parametrize("popularity", [[8, 7, 7, 3], [1], [900, 30, 2] + [1] * 50, [5] * 30])
def test_both_axes_of_popularity_have_marks_and_whole_ones(popularity):
    pytest.importorskip("matplotlib")
    axes = card._ranks(np.array(popularity)).axes[0]
    for axis in (axes.xaxis, axes.yaxis):
        assert [mark for mark in marks(axis) if mark] and "." not in "".join(marks(axis))


@pytest.mark.parametrize("values", [[30.0], [9.99, 9.99], [0.0, 5.0], [0.01, 1e9], [1.0, 2.0, 700.0]])
def test_any_prices_have_a_histogram(values):
    pytest.importorskip("matplotlib")
    axes = card._histogram(np.array(values), "price", "items").axes[0]
    assert sum(bar.get_height() for bar in axes.patches) == len(values)
    assert "." not in "".join(marks(axes.yaxis))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "title",
    [
        "$x^2$ \\frac{",
        "日本語",
        "😀",
        "ไทย",
        "हिन्दी",
        "سلام",
        "\u200b\u200f",
        "a" * 3000,
        "<script>",
        "\U000e0001",
        "𐎀",
        "",
    ],
)
def test_any_title_and_item_can_be_drawn_without_a_word_on_stderr(tmp_path, title, capfd):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "shop"
    folder.mkdir()
    token = title or "灯"
    write_table(folder / "shop.inter", {"user_id:token": ["u"], "item_id:token": [token]})
    columns = {"item_id:token": [token], "title:token_seq": [title], "price:token": ["￥5"]}
    write_table(folder / "shop.item", columns)
    write_card(folder)
    assert (folder / "card" / "items.png").is_file() and capfd.readouterr().err == ""


def test_F15_pictures_outside_the_folder_are_not_shown(shop, tmp_path):
    pytest.importorskip("matplotlib")
    Image.new("RGB", (20, 20), (1, 2, 250)).save(tmp_path / "secret.png")
    tokens = [f"i{number}" for number in range(7)]
    paths = ["../secret.png", str(tmp_path / "secret.png"), "x" * 5000, "a\0b", *["../secret.png"] * 3]
    write_table(shop / "shop.item", {"item_id:token": tokens, "image:token": paths})
    write_card(shop)
    pixels = np.asarray(Image.open(shop / "card" / "items.png").convert("RGB"))
    assert not (pixels == (1, 2, 250)).all(axis=-1).any()


def test_items_without_interactions_are_no_samples(shop):
    pytest.importorskip("matplotlib")
    write_table(shop / "shop.item", {"item_id:token": ["stranger"]})
    write_card(shop)
    assert not (shop / "card" / "items.png").exists() and (shop / "card" / "lengths.png").is_file()


def test_without_matplotlib_the_card_has_no_pictures_and_says_why(shop, monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    write_card(shop)
    assert 'pip install "recbole_mm[prep]"' in (shop / "DATASET.md").read_text()
    assert not (shop / "card").exists()
    check_folder(shop)


def test_a_card_is_refreshed_only_where_there_is_one(shop):
    refresh_card(shop)
    assert not (shop / "DATASET.md").exists()
    write_card(shop)
    write_feature(shop, "text", tokens=["i0"], rows=np.ones((1, 2), dtype=np.float32), encoder="e", source="title")
    refresh_card(shop)
    assert "| text | 1 (25.0%) | 1 x 2 | e |  | title |" in (shop / "DATASET.md").read_text()


def test_a_split_folder_lists_its_parts(tmp_path):
    folder = tmp_path / "visits"
    folder.mkdir()
    for part in ("train", "valid", "test"):
        columns = {"session_id:token": ["1"], "item_id_list:token_seq": ["a"], "item_id:token": ["b"]}
        write_table(folder / f"visits.{part}.inter", columns)
    write_card(folder)
    text = (folder / "DATASET.md").read_text()
    assert "| train | 1 |" in text and "0 items occur in validation or test and not in training" in text


@pytest.mark.slow
def test_the_made_up_shop_has_a_card(tmp_path):
    make_demo(tmp_path / "demo")
    write_card(tmp_path / "demo")
    assert "| 3,000 | 600 | " in (tmp_path / "demo" / "DATASET.md").read_text()
    check_folder(tmp_path / "demo")
