"""Nearest neighbours by content: cosines by hand, what comes last, and prices."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import write_planted

from recbole_mm.data.files import write_table
from recbole_mm.data.layout import write_feature
from recbole_mm.errors import DatasetError, SettingError
from recbole_mm.model import find_model
from recbole_mm.model.contentknn import level_vectors
from recbole_mm.paths import properties_dir

FEW = {"topk": [1], "valid_metric": "Recall@1"}
VECTORS = {"a": [3.0, 1], "b": [1.0, 1], "c": [-2.0, 0], "d": [0.0, -3], "e": [-2.0, 1]}  # their mean is 0, 0


def shop(folder: Path, *, histories=("abcde",) * 5, vectors=None, columns=None) -> Path:
    rows = [(f"u{n}", item, 10.0 * step + n) for n, items in enumerate(histories) for step, item in enumerate(items)]
    users, items, times = zip(*rows, strict=True)
    write_table(
        folder / f"{folder.name}.inter", {"user_id:token": users, "item_id:token": items, "timestamp:float": times}
    )
    vectors = VECTORS if vectors is None else vectors
    write_feature(
        folder, "text", tokens=list(vectors), rows=np.array(list(vectors.values()), np.float32), encoder="x", source="x"
    )
    if columns:
        write_table(folder / f"{folder.name}.item", columns)
    return folder


def scores_of(model, dataset, *prefixes: str) -> list[dict[str, float]]:
    """By item token, for each prefix of single letters."""
    longest = max(map(len, prefixes))
    ids = [
        [dataset.token2id("item_id", token) for token in prefix] + [0] * (longest - len(prefix)) for prefix in prefixes
    ]
    batch = {"item_id_list": torch.tensor(ids), "item_length": torch.tensor([len(prefix) for prefix in prefixes])}
    with torch.no_grad():
        scores = model.eval().full_sort_predict(batch)
    tokens = [str(token) for token in dataset.field2id_token["item_id"]]
    return [dict(zip(tokens[1:], row[1:].tolist(), strict=True)) for row in scores]


def cosine(one: str, other: str) -> float:
    x, y = VECTORS[one], VECTORS[other]
    return (x[0] * y[0] + x[1] * y[1]) / (math.hypot(*x) * math.hypot(*y))


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_scores_are_weighted_means_of_cosines_with_the_prefix(built, tmp_path, decay):
    *_, model = out = built("ContentKNN", shop(tmp_path / "shop"), decay=decay, repeats="keep", **FEW)
    found = scores_of(model, out[1], "abd", "c")
    weights = {"a": decay**2, "b": decay, "d": 1.0}
    for item in "abcde":
        expected = sum(weight * cosine(item, other) for other, weight in weights.items()) / sum(weights.values())
        assert found[0][item] == pytest.approx(expected, abs=1e-6)
        assert found[1][item] == pytest.approx(cosine(item, "c"), abs=1e-6)


def test_the_mean_of_all_items_is_taken_off(built, tmp_path):
    moved = {token: [x + 100, y - 50] for token, (x, y) in VECTORS.items()}
    here = built("ContentKNN", shop(tmp_path / "here"), **FEW)
    there = built("ContentKNN", shop(tmp_path / "there", vectors=moved), **FEW)
    one, other = (scores_of(out[-1], out[1], "ab")[0] for out in (here, there))
    assert one == pytest.approx(other, abs=1e-4)


def test_items_without_content_come_last_and_count_nothing_in_the_prefix(built, tmp_path):
    some = {token: vector for token, vector in VECTORS.items() if token not in "bd"}
    folder = shop(tmp_path / "shop", vectors=some)
    out = built("ContentKNN", folder, missing_features="zero", repeats="last", **FEW)
    with_it, without, nothing = scores_of(out[-1], out[1], "acb", "ac", "b")
    assert {item: with_it[item] for item in "ace"} == pytest.approx({item: without[item] for item in "ace"})
    assert max(with_it["b"], with_it["d"]) < min(with_it[item] for item in "ace")
    assert with_it["b"] < with_it["d"]  # is in the prefix, too
    assert nothing["a"] == nothing["c"] == nothing["e"] == 0 > nothing["d"] > nothing["b"]


def test_the_prefix_s_items_come_last_unless_people_come_back_to_them(built, tmp_path, caplog):
    with caplog.at_level("INFO"):
        never = built("ContentKNN", shop(tmp_path / "never"), **FEW)
        often = built("ContentKNN", shop(tmp_path / "often", histories=("aabbccddee",) * 3), **FEW)
    assert "0.0 % of training targets are in their prefix already" in caplog.text and "behind all others" in caplog.text
    last, kept = (scores_of(out[-1], out[1], "ae")[0] for out in (never, often))
    assert max(last["a"], last["e"]) < min(last[item] for item in "bcd")
    assert max(kept, key=kept.get) == "e"
    forced = built("ContentKNN", tmp_path / "often", repeats="last", **FEW)
    (behind,) = scores_of(forced[-1], forced[1], "ae")
    assert max(behind["a"], behind["e"]) < min(behind[item] for item in "bcd")


def test_what_is_kept_is_linear_in_the_number_of_items(built, planted):
    model = built("ContentKNN", planted)[-1]
    sizes = {name: buffer.shape for name, buffer in model.named_buffers()}
    assert sizes == {"vectors": (31, 12), "there": (31,)} and model.state_dict().keys() == {"log_scale"}


# ------------------------------------------------ prices


def test_price_levels_are_as_like_as_they_are_close():
    vectors = level_vectors(torch.tensor([0, 1, 2, 5]))
    expected = [[1, 0.5, -1], [0.5, 1, -0.5], [-1, -0.5, 1]]  # 1 - 2 |p - q| / 4
    torch.testing.assert_close((vectors @ vectors.T)[1:, 1:], torch.tensor(expected))
    assert level_vectors(torch.tensor([0, 1, 1])).shape == (3, 1)  # a single level


def test_prices_rank_by_the_distance_of_levels(built, tmp_path):
    columns = {"item_id:token": list("abcde"), "price_level:token": ["2", "10", "3", "", "1"]}
    out = built("ContentKNN", shop(tmp_path / "shop", columns=columns), feature="price", repeats="keep", **FEW)
    (found,) = scores_of(out[-1], out[1], "a")
    expected = {"a": 1.0, "c": 1 / 3, "e": 1 / 3, "b": -1 / 3}  # levels 1, 2, 3, 10 are the first to the fourth
    assert {item: found[item] for item in "aceb"} == pytest.approx(expected) and found["d"] < -1
    assert out[1].used_fields() == ["price_level"] and out[1].used_features() == []


def test_a_folder_without_the_feature_says_how_to_make_it(built, planted):
    with pytest.raises(DatasetError, match=r"no feature 'sound', only \['image', 'text'\]"):
        built("ContentKNN", planted, feature="sound")
    with pytest.raises(DatasetError, match=r"no item column 'price_level'.*\n.*dataset_prep prices"):
        built("ContentKNN", planted, feature="price")
    with pytest.raises(SettingError, match="repeats must be one of auto, keep, last"):
        built("ContentKNN", planted, repeats="never")


def test_a_knock_out_of_its_feature_leaves_chance(built, tmp_path):
    folder = write_planted(tmp_path / "dataset" / "many", n_items=90, n_users=120, length=5)

    def hits(**settings) -> float:
        from recbole_mm.trainer import Trainer

        config, _, _, _, test, model = built("ContentKNN", folder, feature="image", **settings)
        return Trainer(config, model).evaluate(test, load_best_model=False)["recall@10"]

    # 30 items of a group, 10 of them shown: about a third of what could be hit; 10 of 90 by chance.
    assert hits() > 0.25 and hits(knockout="image:noise") < 0.2


def test_item_knn_is_found_under_its_short_name():
    assert find_model("itemknn").__name__ == "SessionItemKNN"
    assert yaml.safe_load((properties_dir() / "model" / "ContentKNN.yaml").read_text())["feature"] == "text"
