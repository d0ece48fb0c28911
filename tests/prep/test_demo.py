"""The made-up shop: deterministic, whole, and with the taste in it that its description promises."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset_prep.__main__ import main
from dataset_prep.demo import (
    KINDS,
    LONGEST,
    NEXT_KINDS,
    SHORTEST,
    STYLES,
    Article,
    Shelves,
    make_articles,
    make_demo,
    make_histories,
    step_probability,
)
from recbole_mm.data.files import numbers, read_table
from recbole_mm.data.layout import Manifest, check_folder, read_feature
from recbole_mm.errors import DatasetError

SMALL = {"n_items": 60, "n_users": 40, "progress": False}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("out") / "demo"
    make_demo(folder, seed=1, n_items=300, n_users=60, progress=False)
    return folder


@pytest.fixture(scope="module")
def shop() -> tuple[list[Article], list[list[Article]]]:
    """The catalogue of the default size with 1500 histories."""
    articles = make_articles(seed=2020, n_items=900)
    histories = make_histories(articles, seed=2020, n_users=1500)
    return articles, [[article for _, article in history] for history in histories]


# ---------------------------------------------------------------- the folder


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_ones(tmp_path):
    for place, seed in (("one", 3), ("two", 3), ("three", 4)):
        make_demo(tmp_path / place / "demo", seed=seed, **SMALL)
    one, two, three = (contents(tmp_path / place / "demo") for place in ("one", "two", "three"))
    assert one == two
    assert one.keys() == three.keys()
    assert all(one[file] != three[file] for file in ("demo.inter", "demo.item", "images/1.png", "features/text.npy"))


def test_the_folder_is_whole_and_every_item_has_text_and_picture(demo):
    assert check_folder(demo) == []
    items = read_table(demo / "demo.item")
    assert items.attrs["types"] == {
        "item_id": "token",
        "title": "token_seq",
        "description": "token_seq",
        "price": "float",
        "categories": "token_seq",
        "image": "token",
        "price_level": "token",
        "category": "token",
    }
    assert (items != "").all(axis=None) and items["item_id"].is_unique
    assert numbers(items, "price", demo / "demo.item").min() > 0
    for name in ("text", "image", "text_from_image", "image_from_text"):
        assert sorted(read_feature(demo, name).tokens) == sorted(items["item_id"])
    assert sorted(Manifest.load(demo).features) == ["image", "image_from_text", "text", "text_from_image"]
    assert read_feature(demo, "text").counts.min() >= 3 and (read_feature(demo, "image").counts == 1).all()
    with Image.open(demo / items["image"].iloc[0]) as image:
        assert image.size == (48, 48) and image.format == "PNG"


def test_the_price_level_tells_the_tier_of_an_article_among_its_kind(demo):
    items, articles = read_table(demo / "demo.item"), make_articles(seed=1, n_items=300)
    kinds = list(KINDS)
    assert items["category"].tolist() == [kinds[article.kind].replace(" ", "_") for article in articles]
    levels = items["price_level"].astype(int).to_numpy()
    assert levels.min() == 1 and levels.max() == 20 and len(set(levels)) > 10
    for kind in range(len(kinds)):
        tiers = [
            {level for level, a in zip(levels, articles, strict=True) if (a.kind, a.tier) == (kind, t)}
            for t in (1, 2, 3)
        ]
        assert tiers[0] and tiers[1] and tiers[2] and max(tiers[0]) < min(tiers[1]) and max(tiers[1]) < min(tiers[2])


def test_the_text_feature_does_not_use_the_category_twice(demo):
    assert Manifest.load(demo).features["text"].settings["columns"] == ["title", "categories", "description"]


def test_some_texts_look_like_those_of_a_real_catalogue(demo):
    text = "\n".join(read_table(demo / "demo.item")["description"])
    assert "&amp;" in text and "<br>" in text and "<b>" in text


def test_times_are_real_seconds_and_close_in_places(demo):
    frame = read_table(demo / "demo.inter")
    time = numbers(frame, "timestamp", demo / "demo.inter").astype(float)
    assert (np.diff(time) >= 0).all() and 1.6e9 < time.min() < time.max() < 1.8e9
    by_user = [np.diff(time[frame["user_id"] == user]) for user in frame["user_id"].unique()]
    gaps = np.concatenate(by_user)
    assert gaps.min() >= 20 and 0.3 < (gaps < 128).mean() < 0.7
    lengths = np.array([len(gaps) + 1 for gaps in by_user])
    assert lengths.min() >= SHORTEST and lengths.max() <= LONGEST and 7 < lengths.mean() < 9.5


def test_another_name_gives_files_of_that_name(tmp_path):
    make_demo(tmp_path / "bazaar", **SMALL)
    assert (tmp_path / "bazaar" / "bazaar.inter").is_file() and check_folder(tmp_path / "bazaar") == []


def test_a_run_that_is_stopped_leaves_nothing(tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("dataset_prep.demo.draw_picture", stop)
    with pytest.raises(KeyboardInterrupt):
        make_demo(tmp_path / "demo", **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_behind_is_cleared_an_hour_later(tmp_path):
    for name, age in ((".partial-1", 4000), (".partial-2", 0)):
        (tmp_path / name / "demo").mkdir(parents=True)
        moment = (tmp_path / name).stat().st_mtime - age
        os.utime(tmp_path / name, (moment, moment))
    make_demo(tmp_path / "demo", **SMALL)
    assert sorted(os.listdir(tmp_path)) == [".partial-2", "demo"]


def test_a_shop_made_before_is_replaced_and_anything_else_is_not(tmp_path):
    make_demo(tmp_path / "demo", seed=1, **SMALL)
    (tmp_path / "demo" / "stray.txt").touch()
    make_demo(tmp_path / "demo", seed=2, **SMALL)
    assert not (tmp_path / "demo" / "stray.txt").exists() and os.listdir(tmp_path) == ["demo"]

    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "own.inter").touch()
    with pytest.raises(DatasetError, match="is there already and was not made by this command; remove it, or choose"):
        make_demo(tmp_path / "own", **SMALL)
    assert os.listdir(tmp_path / "own") == ["own.inter"]


@pytest.mark.parametrize("size", [{"n_items": 19}, {"n_users": 0}])
def test_too_small_a_shop_is_refused(tmp_path, size):
    with pytest.raises(ValueError, match="expected at least 20 and 1"):
        make_demo(tmp_path / "demo", **{**SMALL, **size})


def test_the_command_makes_the_folder_demo(tmp_path, monkeypatch, capsys):
    made = []
    monkeypatch.setattr("dataset_prep.demo.make_demo", lambda folder, *, seed: made.append((folder, seed)))
    assert main(["demo", "--out", str(tmp_path), "--seed", "7"]) == 0
    assert made == [(tmp_path / "demo", 7)] and "python -m dataset_prep check" in capsys.readouterr().out


# ---------------------------------------------------------------- the taste


def test_the_table_of_next_kinds_is_complete():
    assert NEXT_KINDS.keys() == KINDS.keys() and len(KINDS) == 15 and len(STYLES) == 12
    reached = set()
    for kind, following in NEXT_KINDS.items():
        assert len(set(following)) == 4 and kind not in following
        reached |= set(following)
    assert reached == set(KINDS)


def test_the_rule_in_closed_form_is_a_probability(shop):
    articles, _ = shop
    shelves = Shelves(articles)
    for last in articles[:5]:
        assert sum(step_probability(last, article, shelves) for article in articles) == pytest.approx(1)


def test_most_steps_keep_the_style_and_follow_the_table(shop):
    _, histories = shop
    kinds = list(KINDS)
    steps = [(a, b) for history in histories for a, b in zip(history, history[1:], strict=False)]
    along = np.mean([kinds[b.kind] in NEXT_KINDS[kinds[a.kind]] for a, b in steps])
    same_style = np.mean([a.style == b.style for a, b in steps])
    # Both articles of a step are no asides with 0.9 * 0.9 = 0.81; chance would be 4/15 and about 0.15.
    assert 0.75 < along < 0.92 and 0.65 < same_style < 0.85


def test_nobody_buys_an_article_twice(shop):
    _, histories = shop
    assert all(len({article.token for article in history}) == len(history) for history in histories)


def test_who_knows_the_rule_beats_popularity_and_counts(shop):
    articles, histories = shop
    position = {article.token: i for i, article in enumerate(articles)}
    shelves = Shelves(articles)
    popularity, follows = np.zeros(len(articles)), np.zeros((len(articles), len(articles)))
    for history in histories:
        ids = [position[article.token] for article in history[:-1]]
        np.add.at(popularity, ids, 1)
        np.add.at(follows, (ids[:-1], ids[1:]), 1)
    hits = {"popularity": 0, "counts": 0, "rule": 0}
    for history in histories[:400]:
        last, target = history[-2], position[history[-1].token]
        rule = np.array([step_probability(last, article, shelves) for article in articles])
        scores = {"popularity": popularity, "counts": follows[position[last.token]], "rule": rule}
        for name, score in scores.items():
            score = score + 1e-9 * popularity
            hits[name] += (score > score[target]).sum() < 20
    recall = {name: n / 400 for name, n in hits.items()}
    assert 0.05 < recall["popularity"] < 0.16
    assert recall["rule"] > 0.55 > recall["counts"] > 2 * recall["popularity"]
    assert recall["rule"] > 4 * recall["popularity"]


def share_told(rows: np.ndarray, attribute: np.ndarray, *, n_folds: int = 10) -> float:
    """How often a linear map tells an article's attribute, fitted on the articles of the other folds."""
    rows = np.c_[(rows - rows.mean(axis=0)) / rows.std(), np.ones(len(rows))]
    target, fold, n_right = np.eye(attribute.max() + 1)[attribute], np.arange(len(rows)) % n_folds, 0
    for held_out in range(n_folds):
        fit, test = rows[fold != held_out], rows[fold == held_out]
        weights = fit.T @ np.linalg.solve(fit @ fit.T + 10 * np.eye(len(fit)), target[fold != held_out])  # ridge
        n_right += ((test @ weights).argmax(axis=1) == attribute[fold == held_out]).sum()
    return n_right / len(rows)


def test_text_tells_the_kind_and_the_picture_tells_the_style(demo):
    articles = make_articles(seed=1, n_items=300)
    text, image = read_feature(demo, "text"), np.asarray(read_feature(demo, "image").rows, dtype=float)
    mean = np.zeros((len(articles), text.rows.shape[1]))
    np.add.at(mean, np.repeat(np.arange(len(articles)), text.counts), text.rows)
    mean /= text.counts[:, None]
    kind, style = (np.array([getattr(article, name) for article in articles]) for name in ("kind", "style"))
    assert share_told(mean, kind) > 0.95 and share_told(image, style) > 0.8
    assert share_told(image, kind) < 0.2 and share_told(mean, style) < 0.6  # chance is 1/15 and 1/12
    assert share_told(mean, style) > 0.2  # half a hint


def test_a_pseudo_feature_tells_what_its_source_tells(demo):
    articles = make_articles(seed=1, n_items=300)
    kind, style = (np.array([getattr(article, name) for article in articles]) for name in ("kind", "style"))
    pseudo_text, pseudo_image = (
        np.asarray(read_feature(demo, name).rows, dtype=float) for name in ("text_from_image", "image_from_text")
    )
    # A picture finds articles of the same style, a text those of the same kind; chance is 1/12 and 1/15.
    assert share_told(pseudo_text, style) > 0.6 and share_told(pseudo_text, kind) < 0.15
    assert share_told(pseudo_image, kind) > 0.2 and share_told(pseudo_image, style) > 0.13
