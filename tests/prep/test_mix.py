"""Several datasets as one: names, rows, features, refusals, and that models pre-train on it and go on elsewhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dataset_prep import mix as mixing
from dataset_prep.__main__ import main
from dataset_prep.mix import mix
from dataset_prep.price import PriceSettings
from dataset_prep.session_folder import add_price_levels
from recbole_mm.data.files import read_table, write_table
from recbole_mm.data.layout import Manifest, check_folder, data_fingerprint, read_feature, write_feature
from recbole_mm.errors import DatasetError, SettingError

from conftest import TINY, write_planted, write_splits  # isort: skip

MADE = {"encoder": "e", "source": "title", "settings": {"model": "m", "weights_sha256": {"w": "abc"}, "rows": "item"}}


@pytest.fixture
def shops(tmp_path) -> list[Path]:
    """Two with items of equal names: A has one to three vectors of text per item, B one of half precision."""
    folders = []
    for number, name in enumerate("AB"):
        folder = write_planted(tmp_path / "dataset" / name, n_users=15, n_items=24 + 6 * number, seed=number)
        folders.append(folder)
    tokens = read_feature(folders[1], "image").tokens
    rows = np.ones((len(tokens), 12), dtype=np.float16) * np.arange(len(tokens), dtype=np.float16)[:, None]
    write_feature(folders[1], "text", tokens=tokens, rows=rows, encoder="planted", source="group")
    return folders


def small(folder: Path, *, table: dict | None = None, **made) -> Path:
    """Two users, two items, one feature."""
    write_table(
        folder / f"{folder.name}.inter",
        {"user_id:token": ["u", "v"], "item_id:token": ["x", "y"], "timestamp:float": ["1", "0.10"]},
    )
    if table:
        write_table(folder / f"{folder.name}.item", {"item_id:token": ["x", "y"], **table})
    rows = np.full((2, made.pop("width", 3)), 0.5, dtype=np.float32)
    write_feature(folder, made.pop("feature", "text"), tokens=["x", "y"], rows=rows, **{**MADE, **made})
    return folder


def test_users_and_items_carry_their_dataset_s_name_and_nothing_else_changes(shops, tmp_path):
    report = mix(shops, tmp_path / "dataset" / "mix")
    mixed = read_table(tmp_path / "dataset" / "mix" / "mix.inter")
    lines = []
    for folder in shops:
        table = read_table(folder / f"{folder.name}.inter")
        lines += [(f"{folder.name}-{u}", f"{folder.name}-{i}", t) for u, i, t in table.itertuples(index=False)]
    assert list(mixed.itertuples(index=False, name=None)) == lines
    items = read_table(tmp_path / "dataset" / "mix" / "mix.item")
    assert items["item_id"].str[:2].value_counts().to_dict() == {"A-": 24, "B-": 30}
    assert items["title"].tolist()[0] == read_table(shops[0] / "A.item")["title"].tolist()[0]
    assert report.counts == {
        "A": {"users": 15, "items": 24, "interactions": 120},
        "B": {"users": 15, "items": 30, "interactions": 120},
    }
    check_folder(tmp_path / "dataset" / "mix")


def test_features_are_stacked_in_blocks_and_keep_their_items(shops, tmp_path, monkeypatch):
    monkeypatch.setattr(mixing, "BLOCK_BYTES", 100)
    folder = tmp_path / "dataset" / "mix"
    report = mix(shops, folder)
    for name in ("text", "image"):
        parts, mixed = [read_feature(shop, name) for shop in shops], read_feature(folder, name)
        assert mixed.tokens == [f"{n}-{t}" for n, part in zip("AB", parts, strict=True) for t in part.tokens]
        np.testing.assert_array_equal(mixed.rows, np.concatenate([part.rows for part in parts]))
        np.testing.assert_array_equal(mixed.counts, np.concatenate([part.counts for part in parts]))
        assert mixed.rows.dtype == np.float32 and report.features[name] == mixed.rows.shape
    manifest = Manifest.load(folder)
    assert manifest.features["text"].counts and not manifest.features["image"].counts
    assert manifest.settings["datasets"] == {shop.name: data_fingerprint(shop) for shop in shops}
    assert set(manifest.raw_files) == {"A/A.inter", "A/A.item", "B/B.inter", "B/B.item"}


def test_the_same_folders_give_the_same_bytes(shops, tmp_path):
    contents = []
    for place in ("one", "two"):
        mix(shops, tmp_path / place / "mix")
        files = sorted((tmp_path / place / "mix").rglob("*"))
        contents.append({p.name: p.read_bytes() for p in files if p.is_file()})
    assert contents[0] == contents[1]


def test_split_folders_are_mixed_part_by_part(tmp_path):
    shops = [write_splits(tmp_path / name, n_sessions=8, seed=seed) for seed, name in enumerate("AB")]
    mix(shops, tmp_path / "mix")
    for part in ("train", "valid", "test"):
        mixed = read_table(tmp_path / "mix" / f"mix.{part}.inter")
        own = read_table(shops[1] / f"B.{part}.inter")
        later = mixed.iloc[-len(own) :]
        assert later["session_id"].tolist() == [f"B-{s}" for s in own["session_id"]]
        assert later["item_id"].tolist() == [f"B-{i}" for i in own["item_id"]]
        expected = [" ".join(f"B-{i}" for i in text.split(" ")) for text in own["item_id_list"]]
        assert later["item_id_list"].tolist() == expected
    assert "protocol" not in Manifest.load(tmp_path / "mix").settings
    check_folder(tmp_path / "mix")


def test_split_folders_that_were_parted_alike_say_how(tmp_path):
    for made, expected in (
        ([{"made_by": "sessions", "split": "time"}] * 2, {"protocol": "sessions", "split": "time"}),
        ([{"protocol": "time", "split": "time"}] * 2, {"protocol": "time", "split": "time"}),
        ([{"protocol": "time"}, {"protocol": "leave-one-out"}], {}),
        ([{"protocol": "time"}, {}], {}),
    ):
        shops = [write_splits(tmp_path / name, n_sessions=8, seed=seed) for seed, name in enumerate("AB")]
        for shop, settings in zip(shops, made, strict=True):
            replace(Manifest.load(shop), settings=settings).save(shop)
        mix(shops, tmp_path / "mix", overwrite=True)
        settings = Manifest.load(tmp_path / "mix").settings
        assert {key: settings[key] for key in ("protocol", "split") if key in settings} == expected
        assert "was left out" not in str(mix(shops, tmp_path / "mix", overwrite=True))


def rated(folder: Path, column: str, values: list[str]) -> Path:
    times = {"user_id:token": ["u", "v"], "item_id:token": ["x", "y"], "timestamp:float": ["1", "2"]}
    write_table(small(folder) / f"{folder.name}.inter", {**times, column: values})
    return folder


def test_ratings_of_all_are_kept_and_other_columns_are_named(tmp_path):
    shops = [rated(tmp_path / "A", "rating:float", ["5", "1"]), rated(tmp_path / "B", "rating:float", ["3.5", "4"])]
    assert "left out" not in str(mix(shops, tmp_path / "mix"))
    mixed = read_table(tmp_path / "mix" / "mix.inter")
    assert mixed[["item_id", "rating"]].to_numpy().tolist() == [
        ["A-x", "5"], ["A-y", "1"], ["B-x", "3.5"], ["B-y", "4"],
    ]  # fmt: skip
    shops[1] = rated(tmp_path / "B", "clicked:token", ["no", "yes"])
    report = str(mix(shops, tmp_path / "mix", overwrite=True))
    assert "column rating of the interactions of A was left out" in report
    assert "column clicked of the interactions of B was left out" in report
    assert "rating" not in read_table(tmp_path / "mix" / "mix.inter")


def test_price_levels_can_be_made_anew_unless_they_are_somebody_s_own(tmp_path):
    prices = {"price:float": ["1", "9"]}
    shops = [small(tmp_path / name, table=prices) for name in "AB"]
    add_price_levels(shops[0], PriceSettings(n_levels=2))
    report = mix(shops, tmp_path / "mix")
    assert f"anew, for all together: python -m dataset_prep prices --dataset {tmp_path / 'mix'}" in str(report)
    assert read_table(tmp_path / "mix" / "mix.item")["price_level"].tolist()[2:] == ["", ""]
    assert add_price_levels(tmp_path / "mix", PriceSettings(n_levels=2)).n_filled == 4
    small(shops[1], table={**prices, "price_level:token": ["cheap", "dear"]})
    assert "anew" not in str(mix(shops, tmp_path / "mix", overwrite=True))


def test_a_dataset_is_not_replaced_by_its_mixture(shops):
    before = data_fingerprint(shops[0])
    with pytest.raises(SettingError, match="A is one of the datasets, which the mixture would replace; choose another"):
        mix(shops, shops[0], overwrite=True)
    assert data_fingerprint(shops[0]) == before


def test_a_mixture_that_fails_half_way_leaves_what_was_there(shops, tmp_path, monkeypatch):
    mix(shops, tmp_path / "mix")
    before = {p: p.read_bytes() for p in (tmp_path / "mix").rglob("*") if p.is_file()}

    def fail(*args, **kwargs):
        raise OSError("the disk is gone")

    monkeypatch.setattr(mixing, "write_feature_blocks", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        mix(shops, tmp_path / "mix", overwrite=True)
    assert {p: p.read_bytes() for p in (tmp_path / "mix").rglob("*") if p.is_file()} == before
    assert not list(tmp_path.glob(".partial-*"))


def test_columns_that_differ_are_filled_up_or_left_out_with_a_remark(tmp_path):
    one = small(tmp_path / "A", table={"brand:token": ["a", ""], "size:float": ["1", "2"]})
    two = small(tmp_path / "B", table={"title:token_seq": ["t t", "s"], "size:token": ["S", "L"]})
    small(tmp_path / "B", table={"title:token_seq": ["t t", "s"], "size:token": ["S", "L"]}, feature="image")
    report = mix([one, two], tmp_path / "mix")
    table = read_table(tmp_path / "mix" / "mix.item")
    assert table.to_dict("list") == {
        "item_id": ["A-x", "A-y", "B-x", "B-y"], "brand": ["a", "", "", ""], "title": ["", "", "t t", "s"],
    }  # fmt: skip
    assert "item column size has different types, float, token, and was left out" in str(report)
    assert "features image are not in all datasets and were left out" in str(report)
    assert read_table(tmp_path / "mix" / "mix.inter")["timestamp"].tolist() == ["1", "0.10", "1", "0.10"]


def test_what_made_a_feature_stays_known_so_far_as_it_is_the_same(tmp_path):
    other = {**MADE["settings"], "rows": "sentence"}
    mix([small(tmp_path / "A"), small(tmp_path / "B", settings=other)], tmp_path / "mix")
    info = Manifest.load(tmp_path / "mix").features["text"]
    assert (info.encoder, info.source) == ("e", "title")
    assert {k: info.settings[k] for k in ("model", "weights_sha256")} == {"model": "m", "weights_sha256": {"w": "abc"}}
    assert "rows" not in info.settings and set(info.settings["mixed"]) == {"A", "B"}


def test_imported_vectors_are_stacked_with_a_remark(tmp_path):
    shops = [small(tmp_path / name, encoder="imported", settings={"file": name}) for name in "AB"]
    assert "feature 'text' is made by 'imported'; nothing here tells whether one model" in str(
        mix(shops, tmp_path / "mix")
    )


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({}, {"width": 4}, "'text' has the width 3 in A, 4 in B\n  make them with one encoder$"),
        ({}, {"encoder": "f"}, "'text' has the encoder e m abc in A, f m abc in B"),
        ({}, {"settings": {"model": "n", "weights_sha256": {"w": "def"}}}, "encoder e m abc in A, e n def in B"),
        ({"encoder": "tfidf"}, {"encoder": "tfidf"}, "'text' is made by tfidf, fitted to each catalogue: make it"),
        ({"encoder": "pca"}, {"encoder": "pca"}, "'text' is made by pca, .* mix the originals and reduce the mixture"),
        ({}, {"feature": "image"}, r"no feature in common: A has \['text'\], B has \['image'\]; give them one"),
    ],
)  # fmt: skip
def test_features_that_mean_something_else_are_refused(tmp_path, first, second, message):
    shops = [small(tmp_path / "A", **first), small(tmp_path / "B", **second)]
    with pytest.raises(SettingError, match=message):
        mix(shops, tmp_path / "mix")
    assert not (tmp_path / "mix").exists()


def test_features_can_be_chosen(shops, tmp_path):
    write_feature(shops[1], "text", tokens=["x"], rows=np.ones((1, 5)), encoder="planted", source="group")
    with pytest.raises(
        SettingError, match="(?s)'text' has the width 12 in A, 5 in B.*or leave them out with --features image"
    ):
        mix(shops, tmp_path / "mix")
    assert set(mix(shops, tmp_path / "mix", features=["image"]).features) == {"image"}
    with pytest.raises(SettingError, match="no feature 'sound' in A, B\n  make it with: python -m dataset_prep"):
        mix(shops, tmp_path / "more", features=["sound"])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["A"], "--datasets names 1 folder, expected two at least"),
        (["A", "A"], "two datasets are called A; names become prefixes, rename"),
        (["A", "A-B"], "datasets A and A-B: A-B-1 could be an item of either; rename one"),
        (["A", "B C"], "the dataset 'B C' has a space in its name, which parts the items of a list; rename it"),
    ],
)
def test_names_that_cannot_be_prefixes_are_refused(tmp_path, names, message):
    with pytest.raises(SettingError, match=message):
        mix([small(tmp_path / name) for name in names], tmp_path / "mix")


def test_folders_of_both_kinds_are_refused(shops, tmp_path):
    shops[1] = write_splits(tmp_path / "C", n_sessions=8)
    with pytest.raises(
        DatasetError, match="(?s)these datasets have one file of interactions: A; the others .*of one kind"
    ):
        mix(shops, tmp_path / "mix")


@pytest.mark.parametrize("model", ["UniSRec", "MSM4SR"])
def test_the_command_s_folder_pre_trains_and_another_dataset_goes_on(shops, tmp_path, capsys, model):
    from recbole_mm.quick_start import run

    assert main(["mix", "--datasets", *map(str, shops), "--name", "mix"]) == 0
    assert "dataset/mix: 2 datasets\n  A: 15 users, 24 items, 120 interactions" in capsys.readouterr().out
    assert main(["mix", "--datasets", *map(str, shops), "--name", "mix"]) == 3
    assert "is there already; replace it with --overwrite" in capsys.readouterr().err
    settings = {**TINY, "epochs": 1, "pretrain_epochs": 1}
    first = run(model, "mix", settings={**settings, "train_stage": "pretrain"})
    assert first.n_items == 54
    record = run(model, "A", settings={**settings, "pretrained_path": first.checkpoint})
    assert record.n_items == 24 and [stage["stage"] for stage in record.stages] == ["finetune"]
