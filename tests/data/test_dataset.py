"""What models see of a folder: ids, candidates, order of histories, features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, write_planted

from recbole_mm.config import Config
from recbole_mm.data.dataset import MultimodalDataset
from recbole_mm.data.files import write_table
from recbole_mm.data.layout import read_feature, write_feature
from recbole_mm.errors import DatasetError


def dataset_of(folder: Path, model: str = "SASRec", **settings) -> MultimodalDataset:
    tiny = {key: value for key, value in TINY.items() if key not in ("hidden_size", "inner_size")}
    return MultimodalDataset(Config(model, str(folder), settings={**tiny, **settings}))


def interactions(folder: Path, rows: list[tuple]) -> Path:
    users, items, times = zip(*rows, strict=True)
    columns = {"user_id:token": users, "item_id:token": items, "timestamp:float": times}
    write_table(folder / f"{folder.name}.inter", columns)
    return folder


def histories(dataset: MultimodalDataset, part) -> list[tuple[str, list[str], str]]:
    feat = part.inter_feat
    found = []
    for user, items, length, target in zip(
        feat["user_id"], feat["item_id_list"], feat["item_length"], feat["item_id"], strict=True
    ):
        prefix = [str(token) for token in dataset.id2token("item_id", items[:length].numpy())]
        found.append((str(dataset.id2token("user_id", user)), prefix, str(dataset.id2token("item_id", target))))
    return found


def test_leave_one_out_of_a_user_with_five_interactions(tmp_path):
    folder = interactions(tmp_path / "five", [("u", item, 10 * step) for step, item in enumerate("abcde")])
    dataset = dataset_of(folder, topk=[1], valid_metric="Recall@1")
    train, valid, test = map(lambda part: histories(dataset, part), dataset.build())
    assert train == [("u", ["a"], "b"), ("u", ["a", "b"], "c")]
    assert valid == [("u", ["a", "b", "c"], "d")]
    assert test == [("u", ["a", "b", "c", "d"], "e")]


def test_times_a_second_apart_are_kept_apart_and_equal_times_keep_the_order_of_the_file(tmp_path):
    start = 1_600_000_000  # float32 has steps of 128 s here
    times = {"a": 30, "b": 10, "c": 20, "d": 10, "e": 40}
    folder = interactions(tmp_path / "close", [("u", item, start + time) for item, time in times.items()])
    dataset = dataset_of(folder, topk=[1], valid_metric="Recall@1")
    (*_, (_, prefix, target)) = histories(dataset, dataset.build()[2])
    assert [*prefix, target] == ["b", "d", "c", "a", "e"]


def test_a_long_history_keeps_its_newest_items(tmp_path):
    folder = interactions(tmp_path / "long", [("u", f"i{step}", step) for step in range(15)])
    dataset = dataset_of(folder, MAX_ITEM_LIST_LENGTH=4)
    *_, (_, prefix, target) = histories(dataset, dataset.build()[2])
    assert prefix == ["i10", "i11", "i12", "i13"] and target == "i14"


def test_prefixes_equal_a_literal_loop(planted):
    dataset = dataset_of(planted, MAX_ITEM_LIST_LENGTH=3)
    lines = [line.split("\t") for line in (planted / "planted.inter").read_text().splitlines()[1:]]
    expected = []
    for user in {line[0]: None for line in lines}:
        mine = [item for _, item, _ in sorted((float(time), item, 0) for who, item, time in lines if who == user)]
        expected += [(user, mine[max(0, end - 3) : end], mine[end]) for end in range(1, len(mine))]
    parts = dataset.build()
    found = [row for part in parts for row in histories(dataset, part)]
    assert sorted(found) == sorted(expected)


def test_rows_and_their_order_are_recbole_s_where_float32_can_tell_times_apart(tmp_path):
    from recbole.data.dataset import SequentialDataset

    random = np.random.default_rng(1)
    users, items, times = random.integers(0, 9, 120), random.integers(0, 20, 120), 1000 * random.permutation(120)
    rows = [(f"u{user}", f"i{item}", int(time)) for user, item, time in zip(users, items, times, strict=True)]
    config = Config("SASRec", str(interactions(tmp_path / "same", rows)), settings={"MAX_ITEM_LIST_LENGTH": 5})
    ours, theirs = MultimodalDataset(config), SequentialDataset(config)
    for mine, stock in zip(ours.build(), theirs.build(), strict=True):
        for column in stock.inter_feat.columns:
            torch.testing.assert_close(mine.inter_feat[column], stock.inter_feat[column], rtol=0, atol=0)


def test_reading_item_columns_changes_no_id_and_no_interaction(planted):
    with open(planted / "planted.item", "a") as file:
        file.write("never-bought\ta thing\tc9 all\t1.0\n")
    plain, with_columns = dataset_of(planted), dataset_of(planted, model="FDSA")
    assert list(plain.field2id_token["item_id"]) == list(with_columns.field2id_token["item_id"])
    assert plain.inter_num == with_columns.inter_num and "never-bought" not in plain.field2token_id["item_id"]


def test_an_item_without_a_row_in_the_item_file_stays_a_candidate(planted):
    lines = (planted / "planted.item").read_text().splitlines()
    (planted / "planted.item").write_text("\n".join(lines[:-3]) + "\n")
    plain, with_columns = dataset_of(planted), dataset_of(planted, model="FDSA")
    assert list(plain.field2id_token["item_id"]) == list(with_columns.field2id_token["item_id"])


def test_ids_of_a_split_folder_do_not_depend_on_item_columns(splits):
    tokens = [f"i{number}" for number in reversed(range(30))]
    write_table(splits / "splits.item", {"item_id:token": tokens, "categories:token_seq": ["c"] * 30})
    plain, with_columns = dataset_of(splits), dataset_of(splits, model="FDSA")
    assert list(plain.field2id_token["item_id"]) == list(with_columns.field2id_token["item_id"])


def test_features_are_aligned_by_token(planted):
    dataset = dataset_of(planted)
    stored = read_feature(planted, "text")
    first = np.concatenate([[0], np.cumsum(stored.counts)])
    rows, starts, counts, _ = dataset.vectors("text")
    for item in range(1, dataset.item_num):
        entry = stored.tokens.index(str(dataset.id2token("item_id", item)))
        expected = torch.from_numpy(stored.rows[first[entry] : first[entry + 1]].copy())
        torch.testing.assert_close(rows[starts[item] : starts[item] + counts[item]], expected)
        torch.testing.assert_close(dataset.feature("text")[item], expected.mean(0))
    assert counts[0] == 0 and not dataset.feature("text")[0].any()


def test_padded_vectors_are_the_ragged_ones(planted):
    vectors = dataset_of(planted).vectors("text")
    padded, valid = vectors.padded()
    for item in range(len(vectors.counts)):
        mine = vectors.rows[vectors.starts[item] : vectors.starts[item] + vectors.counts[item]]
        torch.testing.assert_close(padded[item][valid[item]], mine)
    assert not padded[~valid].any()


def drop_from_feature(folder: Path, name: str, tokens: set[str]) -> None:
    feature = read_feature(folder, name)
    keep = [entry for entry, token in enumerate(feature.tokens) if token not in tokens]
    rows = feature.rows.copy()
    write_feature(
        folder, name, tokens=[feature.tokens[k] for k in keep], rows=rows[keep], encoder="planted", source="x"
    )


def test_items_without_content_stop_the_run_unless_a_policy_is_named(planted, caplog):
    gone = set(read_feature(planted, "image").tokens[:3])
    drop_from_feature(planted, "image", gone)
    with pytest.raises(DatasetError, match=r"lacks 3 of 30 items, such as(.|\n)*--missing_features=zero"):
        dataset_of(planted).vectors("image")

    with caplog.at_level("INFO"):
        zero = dataset_of(planted, missing_features="zero")
        has = zero.has_content("image")
    assert "27 of 30 items (90.0 %), the others get zero" in caplog.text
    assert has.sum() == 27 and not has[0]
    missing = (~has).nonzero().flatten()[1:]
    assert {str(token) for token in zero.id2token("item_id", missing.numpy())} == gone
    assert not zero.feature("image")[missing].any()

    mean = dataset_of(planted, missing_features="mean")
    torch.testing.assert_close(mean.feature("image")[missing[0]], mean.feature("image")[has].mean(0))


def test_items_without_interactions_are_not_used_and_said(planted, caplog):
    feature = read_feature(planted, "image")
    rows = np.concatenate([feature.rows, feature.rows[:2]])
    write_feature(planted, "image", tokens=[*feature.tokens, "x1", "x2"], rows=rows, encoder="planted", source="x")
    with caplog.at_level("INFO"):
        dataset_of(planted).vectors("image")
    assert "2 items without interactions are not used" in caplog.text


def test_an_unknown_feature_lists_those_there_are_and_the_command(planted):
    with pytest.raises(
        DatasetError, match=r"has no feature 'sound', only \['image', 'text'\]\n.*dataset_prep features"
    ):
        dataset_of(planted).vectors("sound")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("u", "", 1.0), ("u", "b", 2.0)], "1 interactions have a item_id that is empty, the first in data row 1"),
        ([("u", "[PAD]", 1.0), ("u", "b", 2.0)], "RecBole's padding token"),
        ([("u", "a", ""), ("u", "b", 2.0)], "1 interactions have no timestamp, the first in data row 1"),
        ([("u", "a", "soon"), ("u", "b", 2.0)], r"wrong\.inter, line 2: timestamp is 'soon'"),
        ([("u", "a", 1.0), ("v", "b", 2.0)], "no user has two interactions"),
        ([("u", "a", 1.0), ("u", "b", 2.0), ("u", "c", 3.0)], "no validation rows are left"),
    ],
)
def test_unusable_interactions_are_refused(tmp_path, rows, message):
    folder = interactions(tmp_path / "wrong", rows)
    with pytest.raises(DatasetError, match=message):
        dataset_of(folder, topk=[1], valid_metric="Recall@1").build()


def test_a_missing_column_lists_those_there_are(tmp_path):
    folder = tmp_path / "columns"
    write_table(folder / "columns.inter", {"session_id:token": ["u"], "item_id:token": ["a"]})
    with pytest.raises(
        DatasetError, match=r"columns\.inter has no column user_id, timestamp; its columns are session_id, item_id\n"
    ):
        dataset_of(folder)


def test_an_interaction_file_without_rows_is_refused(tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    (folder / "empty.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\n")
    with pytest.raises(DatasetError, match=r"empty\.inter has a header but no rows"):
        dataset_of(folder)
    (folder / "empty.inter").write_text("")
    with pytest.raises(DatasetError, match="line 1: column '' has no type"):
        dataset_of(folder)


@pytest.mark.parametrize(
    ("length", "message"), [(0, "is empty: 0 items"), (51, "is too long: 51 items, 1 to 50 expected")]
)
def test_a_prefix_of_a_split_folder_has_1_to_50_items(splits, length, message):
    path = splits / "splits.valid.inter"
    lines = path.read_text().splitlines()
    lines[3] = f"odd\t{' '.join(['i1'] * length)}\ti2"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DatasetError, match=rf"splits\.valid\.inter, line 4: item_id_list {message}"):
        dataset_of(splits, MAX_ITEM_LIST_LENGTH=50)


def test_prefixes_of_1_and_of_50_items_are_fine(splits):
    path = splits / "splits.valid.inter"
    lines = path.read_text().splitlines()
    lines[3:5] = [f"odd\t{' '.join(['i1'] * 50)}\ti2", "even\ti3\ti4"]
    path.write_text("\n".join(lines) + "\n")
    dataset = dataset_of(splits, MAX_ITEM_LIST_LENGTH=50)
    assert len(dataset.build()[1]) == 30


def test_duplicates_are_removed_stably(tmp_path):
    rows = [("u", item, 5) for item in "abcabd"] + [("u", "e", 9), ("u", "f", 9)]
    dataset = dataset_of(
        interactions(tmp_path / "twice", rows), rm_dup_inter="first", topk=[1], valid_metric="Recall@1"
    )
    *_, (_, prefix, target) = histories(dataset, dataset.build()[2])
    assert [*prefix, target] == list("abcdef")


def test_users_with_one_interaction_are_counted(tmp_path, caplog):
    folder = write_planted(tmp_path / "dataset" / "lonely")
    with open(folder / "lonely.inter", "a") as file:
        file.write("alone1\ti100\t5.0\nalone2\ti101\t5.0\n")
    with caplog.at_level("INFO"):
        dataset_of(folder).build()
    assert "2 users with a single interaction have no next item and are left out" in caplog.text


def with_columns(folder: Path, **columns: dict[str, str]) -> Path:
    """The planted folder with columns ``name={item token: text}``, empty where an item is not named."""
    tokens = [f"i{100 + number}" for number in range(30)]
    table = {"item_id:token": [*tokens, "never-bought"]}
    for name, text_of in columns.items():
        table[f"{name}:token"] = [text_of.get(token, "") for token in table["item_id:token"]]
    write_table(folder / "planted.item", table)
    return folder


def test_an_item_column_is_aligned_by_token_with_its_values_in_natural_order(planted, caplog):
    levels = {f"i{100 + n}": str((7 * n) % 12 + 1) for n in range(3, 30)} | {"never-bought": "99"}
    dataset = dataset_of(with_columns(planted, price_level=levels, size={"i101": "c10", "i102": "c2", "i103": "-1.5"}))
    with caplog.at_level("INFO"):
        values, tokens = dataset.item_field("price_level")
    assert "item column 'price_level': 27 of 30 items, 12 values" in caplog.text
    assert tokens == ["", *map(str, range(1, 13))] and values[0] == 0 and values.dtype == torch.long
    for item in range(1, dataset.item_num):
        assert tokens[values[item]] == levels.get(str(dataset.id2token("item_id", item)), "")
    assert dataset.item_field("size").tokens == ["", "-1.5", "c2", "c10"]


def test_a_text_of_more_digits_than_python_makes_a_number_of_is_a_value_too(planted):
    long = ["9" * 5000, "1" + "0" * 4999]
    dataset = dataset_of(with_columns(planted, size={"i101": long[0], "i102": long[1]}))
    assert dataset.item_field("size").tokens == ["", *sorted(long)]


def test_item_columns_are_read_once_and_by_all_parts_together(planted):
    dataset = dataset_of(with_columns(planted, category={"i101": "a"}))
    train, *_ = dataset.build()
    assert dataset.used_fields() == [] and dataset.item_columns() == ["category"]
    assert train.item_field("category") is dataset.item_field("category")
    assert dataset.used_fields() == train.used_fields() == ["category"]


def test_the_hash_of_an_item_column_is_that_of_its_content(planted):
    def digest(**values: str) -> str:
        dataset = dataset_of(with_columns(planted, category={"i101": "a", **values}))
        dataset.item_field("category")
        return dataset.field_hash("category")

    first = digest(i102="b")
    lines = (planted / "planted.item").read_text().splitlines()
    (planted / "planted.item").write_text("\n".join([lines[0], *lines[:0:-1]]) + "\n")
    dataset = dataset_of(planted)
    dataset.item_field("category")
    assert dataset.field_hash("category") == first != digest(i102="c")


def test_a_missing_item_column_lists_those_there_are_and_the_command(planted):
    with pytest.raises(
        DatasetError,
        match=r"no item column 'price_level' in .*planted\.item: its columns are title, categories, price; did.*\n"
        r"  make it with: python -m dataset_prep prices --dataset ",
    ):
        dataset_of(planted).item_field("price_level")
    with pytest.raises(DatasetError, match=r"its columns are .*; did you mean 'title'\?\n  add it to the file"):
        dataset_of(planted).item_field("titel")
    (planted / "planted.item").unlink()
    dataset = dataset_of(planted)
    assert dataset.item_columns() == []
    with pytest.raises(DatasetError, match=r"no item column 'category' in .*planted\.item: there is no such file\n"):
        dataset.item_field("category")


def test_an_empty_item_column_is_known_for_no_item_and_not_used(planted):
    dataset = dataset_of(with_columns(planted, category={}))
    values, tokens = dataset.item_field("category")
    assert not values.any() and len(values) == 31 and tokens == [""] and dataset.used_fields() == []


def test_an_item_with_two_rows_is_refused(planted):
    with open(with_columns(planted, category={}) / "planted.item", "a") as file:
        file.write("i105\ta\n")
    with pytest.raises(DatasetError, match="1 rows repeat an item, such as 'i105'; keep one row each"):
        dataset_of(planted).item_field("category")
