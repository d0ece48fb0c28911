"""Knock-outs: what they leave of a modality, whom they reach, and that no run passes for another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, _known, write_planted

import run_recbole_mm
from recbole_mm import records
from recbole_mm.config import Config
from recbole_mm.data.dataset import MultimodalDataset
from recbole_mm.data.files import write_table
from recbole_mm.data.knockout import KnockOuts, parse
from recbole_mm.data.layout import read_feature, write_feature
from recbole_mm.errors import CheckpointError, SettingError
from recbole_mm.quick_start import run


def dataset_of(folder: Path, **settings) -> MultimodalDataset:
    given = {key: value for key, value in TINY.items() if key not in ("hidden_size", "inner_size")}
    return MultimodalDataset(Config("MSM4SR", str(folder), settings={**given, **settings}))


def rows_of(dataset: MultimodalDataset, name: str) -> list[torch.Tensor]:
    rows, starts, counts, _ = dataset.vectors(name)
    return [rows[start : start + count] for start, count in zip(starts, counts, strict=True)]


def lacking(folder: Path, name: str, tokens: set[str]) -> Path:
    """Without the vectors of these items."""
    feature = read_feature(folder, name)
    keep = np.array([token not in tokens for token in feature.tokens])
    write_feature(
        folder,
        name,
        tokens=[token for token in feature.tokens if token not in tokens],
        rows=feature.rows[np.repeat(keep, feature.counts)].copy(),
        counts=feature.counts[keep],
        encoder="planted",
        source="x",
    )
    return folder


# ------------------------------------------------ features


def test_shuffle_gives_each_item_another_item_s_rows(planted):
    plain, shuffled = dataset_of(planted), dataset_of(planted, knockout="text:shuffle")
    before, after = rows_of(plain, "text"), rows_of(shuffled, "text")
    at = [next(k for k, rows in enumerate(before) if torch.equal(rows, mine)) for mine in after]
    assert sorted(at[1:]) == list(range(1, 31)) and all(k != item for item, k in enumerate(at[1:], start=1))
    assert after[0].numel() == 0
    torch.testing.assert_close(shuffled.feature("text")[5], before[at[5]].mean(0))


def test_shuffle_copies_no_rows_and_changes_nothing_in_place():
    rows, starts, counts = torch.rand(9, 2), torch.tensor([0, 0, 4, 5]), torch.tensor([0, 4, 1, 4])
    same, new_starts, new_counts = KnockOuts("x:shuffle", seed=0, settings={}).replace_rows("x", rows, starts, counts)
    assert same is rows and starts.tolist() == [0, 0, 4, 5] and counts.tolist() == [0, 4, 1, 4]
    assert sorted(zip(new_starts.tolist(), new_counts.tolist(), strict=True)) == [(0, 0), (0, 4), (4, 1), (5, 4)]


def test_shuffle_leaves_items_without_content_without(planted):
    lacking(planted, "text", {"i103", "i104"})
    plain, shuffled = (dataset_of(planted, missing_features="mean", knockout=k) for k in (None, "text:shuffle"))
    assert torch.equal(plain.has_content("text"), shuffled.has_content("text"))
    torch.testing.assert_close(plain.vectors("text").fallback, shuffled.vectors("text").fallback)
    missing = ~plain.has_content("text")
    torch.testing.assert_close(plain.feature("text")[missing], shuffled.feature("text")[missing])


def test_constant_gives_every_item_that_has_content_the_mean_of_all_rows(planted):
    lacking(planted, "text", {"i103", "i104"})
    plain, constant = (dataset_of(planted, missing_features="zero", knockout=k) for k in (None, "text:constant"))
    mean = torch.cat(rows_of(plain, "text")).double().mean(0).float()
    has = plain.has_content("text")
    assert torch.equal(has, constant.has_content("text")) and has.sum() == 28
    torch.testing.assert_close(constant.feature("text"), mean * has.unsqueeze(1))
    assert constant.vectors("text").rows.shape == (1, 12)


def test_noise_has_the_feature_s_own_mean_and_deviation_and_nothing_of_its_content(tmp_path):
    folder = write_planted(tmp_path / "dataset" / "wide", n_items=3000, n_users=400, length=20)
    noisy = dataset_of(folder, knockout="text:noise", missing_features="zero")
    plain = dataset_of(folder, missing_features="zero")
    made, real = torch.cat(rows_of(noisy, "text")), torch.cat(rows_of(plain, "text"))
    assert made.shape == real.shape and made.dtype == torch.float32
    assert torch.equal(noisy.vectors("text").counts, plain.vectors("text").counts)
    spread = real.std(0) / len(real) ** 0.5
    assert ((made.mean(0) - real.mean(0)).abs() < 5 * spread).all()
    torch.testing.assert_close(made.std(0), real.std(0), rtol=0.1, atol=0)
    correlation = torch.corrcoef(torch.cat([made, real], dim=1).T)[:12, 12:]
    assert correlation.abs().max() < 5 / len(real) ** 0.5


def test_mean_and_deviation_are_those_of_the_rows_in_use(planted):
    feature = read_feature(planted, "image")
    far = np.full((2, 12), 1e6, dtype=np.float32)
    rows = np.concatenate([feature.rows, far])
    write_feature(planted, "image", tokens=[*feature.tokens, "x1", "x2"], rows=rows, encoder="planted", source="x")
    assert dataset_of(planted, knockout="image:noise").feature("image").abs().max() < 100
    assert dataset_of(planted, knockout="image:constant").feature("image").abs().max() < 100


@pytest.mark.parametrize("kind", ["noise", "shuffle"])
def test_only_knockout_seed_changes_what_is_drawn(planted, kind):
    first, same, other = (
        dataset_of(planted, knockout=f"image:{kind}", **more).feature("image")
        for more in ({}, {"seed": 7}, {"knockout_seed": 1})
    )
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_a_modality_is_the_feature_that_its_setting_names(planted):
    feature = read_feature(planted, "image")
    copies = {"encoder": "planted", "source": "x"}
    write_feature(planted, "pictures", tokens=feature.tokens, rows=feature.rows.copy(), **copies)
    dataset = dataset_of(planted, image_feature="pictures", knockout="image:constant")
    assert len(dataset.vectors("pictures").rows) == 1 and len(dataset.vectors("image").rows) == 30
    by_its_name = dataset_of(planted, image_feature="pictures", knockout="pictures:constant")
    assert len(by_its_name.vectors("pictures").rows) == 1
    noise = (
        dataset_of(planted, image_feature="pictures", knockout=f"{name}:noise").feature("pictures")
        for name in ("image", "pictures")
    )
    assert torch.equal(*noise)  # and other models, which call it otherwise, get the same


def with_pseudo_features(folder: Path) -> Path:
    for name in ("text_from_image", "image_from_text"):
        feature = read_feature(folder, name.partition("_from_")[2])
        first = np.cumsum(feature.counts) - feature.counts
        write_feature(
            folder, name, tokens=feature.tokens, rows=feature.rows[first].copy(), encoder="planted", source="x"
        )
    return folder


def test_what_is_made_from_the_picture_goes_with_it_and_what_is_made_from_the_text_stays(planted, caplog):
    plain, dataset = dataset_of(with_pseudo_features(planted)), dataset_of(planted, knockout="image:shuffle")
    with caplog.at_level("WARNING"):
        after = {name: dataset.feature(name) for name in dataset.feature_names()}
    assert "feature 'text_from_image' is made from image and replaced like it by shuffle (knockout_seed 2020)" in (
        caplog.text
    )
    assert "feature 'image' is replaced by shuffle" in caplog.text
    assert "feature 'image_from_text' is not made from image and stays, but other items' image may" in caplog.text
    assert "to replace it too, add image_from_text:shuffle" in caplog.text and "feature 'text' is" not in caplog.text
    torch.testing.assert_close(after["text_from_image"], after["image"])  # each item got one other item's picture
    assert not torch.equal(after["image"], plain.feature("image"))
    for name in ("text", "image_from_text"):
        assert torch.equal(after[name], plain.feature(name))


def test_noise_in_place_of_two_features_does_not_agree(planted):
    dataset = dataset_of(with_pseudo_features(planted), knockout="image:noise")
    both = torch.stack([dataset.feature(name)[1:] for name in ("image", "text_from_image")])
    assert torch.corrcoef((both - both.mean(1, keepdim=True)).flatten(1))[0, 1].abs() < 0.2


def test_two_features_with_different_gaps_keep_most_items_together(planted):
    plain = dataset_of(lacking(with_pseudo_features(planted), "text_from_image", {"i103"}), missing_features="zero")
    dataset = dataset_of(planted, knockout="image:shuffle", missing_features="zero")
    same = (dataset.feature("image") == dataset.feature("text_from_image")).all(1)
    assert plain.has_content("text_from_image").sum() == 29 and same[1:].sum() >= 28


def test_a_feature_s_own_knock_out_wins_over_that_of_its_source(planted):
    dataset = dataset_of(with_pseudo_features(planted), knockout="image:noise,text_from_image:constant")
    assert len(dataset.vectors("text_from_image").rows) == 1 and len(dataset.vectors("image").rows) == 30


def test_a_feature_is_derived_by_the_role_that_a_setting_gives_it_too():
    settings = {"image_feature": "clip", "text_from_image_feature": "labels", "pseudo_text_feature": "tags"}
    knockouts = KnockOuts("image:noise", seed=0, settings={**settings, "pseudo_image_feature": "drawn", "seed": 1})
    names = ("clip", "labels", "tags", "tags_from_clip", "drawn", "image_from_x", "image", "text")
    hits = {name: knockouts.of_feature(name) for name in names}
    assert [name for name, hit in hits.items() if hit] == ["clip", "labels", "tags", "tags_from_clip"]
    assert hits["labels"].derived and not hits["clip"].derived
    assert [name for name in names if knockouts.leaking(name)] == ["drawn", "image_from_x"]


# ------------------------------------------------ item columns


def with_prices(folder: Path) -> Path:
    tokens = [line.split("\t")[0] for line in (folder / "planted.item").read_text().splitlines()[1:]]
    levels = ["", *(str(n % 4 + 1) if n % 2 else "3" for n in range(29))]
    categories = [f"c{n % 5}" for n in range(30)]
    table = {"item_id:token": tokens, "price_level:token": levels, "category:token": categories}
    write_table(folder / "planted.item", {**table, "price:token": levels})
    return folder


def test_a_price_is_the_price_level_and_nothing_else(planted):
    plain, dataset = dataset_of(with_prices(planted)), dataset_of(planted, knockout="price:constant")
    for column in ("category", "price"):
        assert torch.equal(dataset.item_field(column).values, plain.item_field(column).values)
    known = plain.item_field("price_level").values > 0
    values, tokens = dataset.item_field("price_level")
    assert known.sum() == 29 and torch.equal(values > 0, known)
    assert tokens == ["", "2", "3", "4"] and set(values[known].tolist()) == {tokens.index("3")}


def test_shuffle_and_noise_of_a_column(planted):
    plain = dataset_of(with_prices(planted)).item_field("category").values
    shuffled = dataset_of(planted, knockout="category:shuffle").item_field("category").values
    noise = dataset_of(planted, knockout="category:noise").item_field("category").values
    assert torch.equal(shuffled.bincount(), plain.bincount()) and not torch.equal(shuffled, plain)
    assert not torch.equal(noise.bincount(), plain.bincount()) and noise[0] == 0 and noise[1:].min() > 0
    drawn = KnockOuts("x:noise", seed=0, settings={}).replace_values("x", torch.tensor([2, 2, 7, 9] * 3000))
    assert drawn.unique().tolist() == [2, 7, 9]
    assert drawn.bincount()[[2, 7, 9]].sub(4000).abs().max() < 300  # evenly, not as often as they occur


# ------------------------------------------------ the setting


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image", "cannot read 'image'; it should look like image:noise,price:shuffle"),
        ("image:", "cannot read 'image:'"),
        ("image:noise,", "cannot read ''"),
        ("image:nois", r"no kind 'nois' for image, expected noise, shuffle, constant; did you mean 'noise'\?"),
        ("image:noise,image:shuffle", "image is named twice"),
        ({"image": "noise"}, "must be a text such as image:noise,price:shuffle, found"),
        ("image:noise,clip:noise", "image and clip are the same, clip; name it once"),
        ("price:noise,price_level:noise", "price and price_level are the same, price_level"),
    ],
)
def test_a_setting_that_cannot_be_read_is_refused(text, message):
    with pytest.raises(SettingError, match=f"knockout.*{message}"):
        KnockOuts(text, seed=0, settings={"image_feature": "clip"})


def test_the_setting_is_read_in_order_and_spaces_do_not_matter():
    assert list(parse("image:noise, text : shuffle").items()) == [("image", "noise"), ("text", "shuffle")]
    assert parse(None) == {}


@pytest.mark.parametrize(
    ("model", "knockout", "message"),
    [
        ("MSM4SR", "price:shuffle", "knockout: MSM4SR on planted does not use price; it uses image, text"),
        ("MSM4SR", "imag:noise,text:noise", "does not use imag; it uses image, text; did you mean 'image'?"),
        ("SASRec", "text:noise", "SASRec on planted does not use text; it uses no features and no item columns"),
        ("Transitions", "image:constant", "Transitions on planted does not use image; it uses no features"),
        ("MSM4SR", "image", "SettingError: knockout: cannot read 'image'"),
    ],
)
def test_a_knock_out_that_reaches_nothing_stops_the_run_before_training(planted, capsys, model, knockout, message):
    arguments = [f"--{key}={value}" for key, value in _known(model, TINY).items()]
    assert run_recbole_mm.main([f"--model={model}", "--dataset=planted", f"--knockout={knockout}", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(Path("saved").glob("*.pth")) and not Path("results/runs.jsonl").exists()


def test_a_picture_that_reaches_a_model_only_by_what_is_made_from_it_may_be_knocked_out():
    knockouts = KnockOuts("image:noise,price:shuffle", seed=0, settings={})
    there = ["text", "image", "text_from_image"]
    knockouts.refuse_idle(["text", "text_from_image"], ["price_level"], there=there, run="M on d")
    with pytest.raises(SettingError, match="M on d does not use price; it uses text_from_image, category"):
        knockouts.refuse_idle(["text_from_image"], ["category"], there=there, run="M on d")
    with pytest.raises(SettingError, match="M on d does not use image; it uses price"):
        knockouts.refuse_idle([], ["price_level"], there=[], run="M on d")


def test_one_setting_serves_models_with_prices_and_without(planted, caplog):
    with_prices(planted)
    settings = {**TINY, "epochs": 1, "pretrain_epochs": 1, "knockout": "image:noise,text:shuffle,price:constant"}
    record = run("MSM4SR", "planted", settings=settings)
    assert "knock-out: MSM4SR on planted does not use price anyway" in caplog.text
    assert record.settings["knockout"] == settings["knockout"]
    with pytest.raises(SettingError, match="MSM4SR on planted does not use price; it uses image, text"):
        run("MSM4SR", "planted", settings={**settings, "knockout": "price:constant"})


def test_the_record_and_the_report_say_what_was_knocked_out(planted, caplog):
    plain = run("MSM4SR", "planted", settings={**TINY, "epochs": 1})
    with caplog.at_level("INFO"):
        record = run("MSM4SR", "planted", settings={**TINY, "epochs": 1, "knockout": "image:noise,text:shuffle"})
    assert "MSM4SR on planted, seed 2020, knocked out: image:noise,text:shuffle\n" in caplog.text
    _, loaded = records.load(Path("results/runs.jsonl")).records
    assert loaded.settings["knockout"] == "image:noise,text:shuffle" and loaded.settings["knockout_seed"] == 2020
    assert record.features == plain.features  # hashes of what lies in the folder
    assert record.settings["feature_encoders"] == {
        "image": "noise instead of planted",
        "text": "shuffle instead of planted",
    }
    assert plain.settings["knockout"] is None and plain.test != record.test


def test_weights_from_real_features_do_not_go_on_with_noise_nor_the_other_way_round(planted):
    stage = {**TINY, "pretrain_epochs": 1, "epochs": 1, "train_stage": "pretrain"}
    real = run("MSM4SR", "planted", settings=stage).checkpoint
    noise = run("MSM4SR", "planted", settings={**stage, "knockout": "image:noise"}).checkpoint
    then = {**TINY, "epochs": 1, "train_stage": "finetune"}
    with pytest.raises(CheckpointError, match="'image' is made by 'noise instead of planted', was made by 'planted'"):
        run("MSM4SR", "planted", settings={**then, "pretrained_path": real, "knockout": "image:noise"})
    with pytest.raises(CheckpointError, match="'image' is made by 'planted', was made by 'noise instead of planted'"):
        run("MSM4SR", "planted", settings={**then, "pretrained_path": noise})
    run("MSM4SR", "planted", settings={**then, "pretrained_path": noise, "knockout": "image:noise"})


def test_an_interrupted_run_goes_on_with_its_knock_out(planted):
    settings = {**TINY, "epochs": 1, "pretrain_epochs": 1, "knockout": "image:noise"}
    last = run("MSM4SR", "planted", settings=settings).checkpoint.replace(".pth", "-last.pth")
    assert run(settings={"epochs": 2}, resume=last).settings["knockout"] == "image:noise"
    with pytest.raises(SettingError, match="knockout is 'text:noise', was 'image:noise'"):
        run(settings={"knockout": "text:noise"}, resume=last)


def test_content_alone_finds_no_groups_when_all_content_is_constant(planted):
    settings = {**TINY, "pretrain_epochs": 5, "learning_rate": 0.01, "train_stage": "pretrain"}
    real = run("MSM4SR", "planted", settings=settings)
    lost = run("MSM4SR", "planted", settings={**settings, "knockout": "image:constant,text:constant"})
    assert real.test["recall@10"] > 0.8 and lost.test["recall@10"] < 0.5  # a guess finds a third
