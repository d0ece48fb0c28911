"""Bands of test rows: what a slice holds, from the data alone, and that slices add up to the whole."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import TINY

from recbole_mm.data.files import write_table
from recbole_mm.data.layout import read_feature, write_feature
from recbole_mm.quick_start import run
from recbole_mm.slices import BANDS, bands_of, by_band, history_bands, popularity_bands, price_bands


def rewrite_items(folder, **columns) -> None:
    """The item file with a price of one's own for each item, in the order of their tokens."""
    tokens = sorted(read_feature(folder, "text").tokens)
    write_table(folder / f"{folder.name}.item", {"item_id:token": tokens, **{k: list(v) for k, v in columns.items()}})


def test_a_third_of_all_occurrences_is_in_each_band_of_popularity():
    counts = np.array([0, 10, 1, 6, 4, 0, 5, 4])  # 30 in all, padding first
    assert popularity_bands(counts).tolist() == ["cold", "head", "tail", "mid", "tail", "cold", "mid", "tail"]


def test_items_that_occur_equally_often_share_a_band():
    counts = np.concatenate([[0], np.random.default_rng(0).integers(0, 6, size=200)])
    bands = popularity_bands(counts)
    assert all(len(set(bands[counts == count])) == 1 for count in np.unique(counts))
    shuffled = np.random.default_rng(1).permutation(len(counts))
    assert (popularity_bands(counts[shuffled]) == bands[shuffled]).all()
    assert set(popularity_bands(np.array([0, 3, 3, 3]))[1:]) == {"head"}


def test_nothing_in_training_is_cold_everywhere():
    assert set(popularity_bands(np.zeros(4, dtype=np.int64))) == {"cold"}


def test_histories_fall_into_the_bands_that_their_names_say():
    lengths = [1, 2, 3, 5, 6, 10, 11, 20, 21, 400]
    expected = ["1-2", "1-2", "3-5", "3-5", "6-10", "6-10", "11-20", "11-20", "21+", "21+"]
    assert history_bands(np.array(lengths)).tolist() == expected


def test_prices_are_parted_into_thirds_of_the_known_ones():
    price = np.array([np.nan, 9, 1, 2, 3, 4, 5, 6, 7, 8, np.nan])
    expected = ["unknown", "high", "low", "low", "low", "mid", "mid", "mid", "high", "high", "unknown"]
    assert price_bands(price).tolist() == expected


def test_bands_of_a_folder_are_those_of_its_targets(built, planted):
    rewrite_items(planted, **{"price:float": range(30)})
    _, dataset, train, _, test, _ = built("SASRec", planted)
    bands, problems = bands_of(train._dataset, test._dataset)
    assert problems == [] and list(bands) == ["popularity", "history", "price", "coverage"]
    assert set(bands["history"]) == {"6-10"} and set(bands["coverage"]) == {"all"}  # the target is the eighth item

    tokens = dataset.field2id_token["item_id"]
    training = [line.split("\t") for line in (planted / "planted.inter").read_text().splitlines()[1:]]
    training = [item for n, (_, item, _) in enumerate(training) if n % 8 < 6]  # the last two are held out
    price_of = {token: number for number, token in enumerate(sorted(read_feature(planted, "text").tokens))}
    for row, target in enumerate(tokens[test._dataset.inter_feat["item_id"].numpy()]):
        more_popular = sum(training.count(item) for item in price_of if training.count(item) > training.count(target))
        expected = ("head", "mid", "tail")[3 * more_popular // len(training)] if target in training else "cold"
        assert bands["popularity"][row] == expected
        assert bands["price"][row] == ("low", "mid", "high")[price_of[target] // 10]


def test_every_model_gets_the_same_bands(built, planted):
    every = []
    for model, settings in (("SASRec", {}), ("MSM4SR", {}), ("Popularity", {}), ("MSM4SR", {"knockout": "text:noise"})):
        _, _, train, _, test, _ = built(model, planted, **settings)
        every.append(bands_of(train._dataset, test._dataset)[0])
    for bands in every[1:]:
        assert all((bands[name] == every[0][name]).all() for name in every[0])


def test_a_knocked_out_price_leaves_its_slice_alone(built, planted):
    levels = [f"{1 + number % 5}" for number in range(30)]
    rewrite_items(planted, **{"price_level:token": levels, "category:token": ["a"] * 30})
    plain = built("MMSBR", planted)
    replaced = built("MMSBR", planted, knockout="price_level:shuffle")
    bands, other = (bands_of(train._dataset, test._dataset)[0] for _, _, train, _, test, _ in (plain, replaced))
    assert (bands["price"] == other["price"]).all() and set(bands["price"]) == {"low", "mid", "high"}


def test_asking_for_bands_does_not_count_as_using_features(built, planted):
    _, dataset, train, _, test, _ = built("SASRec", planted)
    bands_of(train._dataset, test._dataset)
    assert dataset.used_features() == [] and dataset.used_fields() == []


def test_coverage_tells_all_some_and_none(built, planted):
    for name, kept in (("text", slice(0, 20)), ("image", slice(10, 30))):
        feature = read_feature(planted, name)
        tokens = sorted(feature.tokens)[kept]
        write_feature(planted, name, tokens=tokens, rows=np.ones((len(tokens), 4)), encoder="x", source="x")
    tokens = sorted(read_feature(planted, "text").tokens) + ["none of them"]
    counts = np.array([1] * 5 + [0] * 15 + [1])  # items 5 to 9 have neither; 10 to 19 only a picture
    write_feature(planted, "text", tokens=tokens, rows=np.ones((6, 4)), counts=counts, encoder="x", source="x")
    _, dataset, train, _, test, _ = built("SASRec", planted)
    bands, _ = bands_of(train._dataset, test._dataset)
    pictures = set(read_feature(planted, "image").tokens)
    words = set(tokens[:5])
    for row, target in enumerate(dataset.field2id_token["item_id"][test._dataset.inter_feat["item_id"].numpy()]):
        assert bands["coverage"][row] == ("none", "some", "all")[(target in pictures) + (target in words)]
    assert "none" in bands["coverage"] and "some" in bands["coverage"]


def test_a_folder_without_prices_and_features_has_no_slices_by_them(built, planted, tmp_path):
    (planted / "planted.item").unlink()
    (planted / "manifest.json").unlink()
    _, _, train, _, test, _ = built("SASRec", planted)
    bands, problems = bands_of(train._dataset, test._dataset)
    assert list(bands) == ["popularity", "history"] and problems == []


def test_a_price_that_nobody_knows_makes_no_slice(built, planted):
    rewrite_items(planted, **{"price:float": [None] * 30})
    _, _, train, _, test, _ = built("SASRec", planted)
    assert "price" not in bands_of(train._dataset, test._dataset)[0]


def test_price_levels_serve_where_no_price_is_known(built, planted):
    rewrite_items(planted, **{"price:float": [None] * 30, "price_level:token": [f"{1 + n % 3}" for n in range(30)]})
    _, dataset, train, _, test, _ = built("SASRec", planted)
    bands, _ = bands_of(train._dataset, test._dataset)
    number = {token: n for n, token in enumerate(sorted(read_feature(planted, "text").tokens))}
    targets = dataset.field2id_token["item_id"][test._dataset.inter_feat["item_id"].numpy()]
    assert bands["price"].tolist() == [("low", "mid", "high")[number[target] % 3] for target in targets]


def test_a_slice_that_cannot_be_made_is_a_warning_and_no_end(planted, caplog):
    (planted / "features" / "image.items.txt").unlink()
    record = run("SASRec", "planted", settings={**TINY, "epochs": 1}, runs_file=None)
    assert list(record.slices) == ["popularity", "history", "price"]
    (warning,) = record.warnings
    assert warning.startswith("no slices by coverage: ") and "image.items.txt" in warning and warning in caplog.text


def test_a_split_folder_has_slices_too(built, splits):
    _, dataset, train, _, test, _ = built("SASRec", splits)
    bands, _ = bands_of(train._dataset, test._dataset)
    lengths = test._dataset.inter_feat["item_length"].numpy()
    assert (bands["history"] == history_bands(lengths)).all() and set(bands["coverage"]) == {"all"}
    assert len(bands["popularity"]) == len(test._dataset)


def test_bands_weigh_back_to_the_whole_and_stand_in_their_order():
    random = np.random.default_rng(0)
    bands = {name: random.choice(values[::-1], size=500) for name, values in BANDS.items()}
    values = {"mrr@10": random.random(500), "recall@10": random.integers(0, 2, 500).astype(float)}
    slices = by_band(bands, values, decimals=12)
    for name, of_bands in slices.items():
        assert tuple(of_bands) == BANDS[name] and sum(band["n"] for band in of_bands.values()) == 500
        for metric, each in values.items():
            weighed = sum(band["n"] * band[metric] for band in of_bands.values()) / 500
            assert weighed == pytest.approx(each.mean(), abs=1e-11)


def test_a_band_without_rows_is_left_out():
    slices = by_band({"history": np.array(["1-2", "21+"])}, {"mrr@5": np.array([1.0, 0.5])}, decimals=6)
    assert slices == {"history": {"1-2": {"n": 1, "mrr@5": 1.0}, "21+": {"n": 1, "mrr@5": 0.5}}}
