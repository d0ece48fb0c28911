"""Rows as places in flat columns, against the padded copies that RecBole makes, and against loops."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from recbole.data.dataset import SequentialDataset
from recbole.data.interaction import Interaction
from test_dataset import dataset_of, interactions

from recbole_mm.config import Config
from recbole_mm.data import histories as module
from recbole_mm.data.files import write_table
from recbole_mm.data.histories import (
    Groups,
    Histories,
    HistoryColumn,
    IndexedDataset,
    column_in_parts,
    histories_of_lists,
    histories_of_prefixes,
)
from recbole_mm.errors import SettingError

LISTS = {"item": "item_list", "size": "size_list"}


def columns_of(feat: Interaction) -> dict[str, torch.Tensor]:
    return {name: feat[name] for name in feat}


def assert_same(one: Interaction, other: Interaction) -> None:
    """The same columns in the same order, bit by bit."""
    one, other = columns_of(one), columns_of(other)
    assert list(one) == list(other)
    for name, column in one.items():
        torch.testing.assert_close(
            column,
            other[name],
            rtol=0,
            atol=0,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def prefixes(seed: int = 0, *, n: int = 40, width: int = 4) -> tuple[Histories, Interaction]:
    """Rows over random interactions, as places and as copies that a loop makes; ``size`` has two numbers each."""
    random = np.random.default_rng(seed)
    user = np.sort(random.integers(0, 9, n))
    feat = {
        "user": torch.from_numpy(user),
        "item": torch.from_numpy(random.integers(1, 30, n)),
        "size": torch.from_numpy(random.normal(size=(n, 2)).astype(np.float32)),
    }
    rows = [
        (place, max(place - width, first)) for place in range(n) if (first := int((user < user[place]).sum())) < place
    ]
    rows = [rows[row] for row in random.permutation(len(rows))]
    copies = {name: torch.stack([value[place] for place, _ in rows]) for name, value in feat.items()}
    for name, column in LISTS.items():
        copies[column] = torch.zeros(len(rows), width, *feat[name].shape[1:], dtype=feat[name].dtype)
        for row, (place, start) in enumerate(rows):
            copies[column][row, : place - start] = feat[name][start:place]
    copies["length"] = torch.tensor([place - start for place, start in rows])
    target, start = (np.array([row[end] for row in rows]) for end in (0, 1))
    made = histories_of_prefixes(
        feat,
        start=start,
        target=target,
        lists=LISTS,
        max_length=width,
        length_field="length",
    )
    return made, Interaction(copies)


# ------------------------------------------------ columns and rows


@pytest.mark.parametrize("rows_at_once", [3, 1 << 14])
def test_columns_of_prefixes_equal_copies_made_by_a_loop(monkeypatch, rows_at_once):
    monkeypatch.setattr(module, "ROWS_AT_ONCE", rows_at_once)
    made, copies = prefixes()
    assert_same(made, copies)
    assert len(made) == len(copies) and made.columns == copies.columns


@pytest.mark.parametrize(
    "index",
    [
        slice(2, 9),
        slice(None, None, 3),
        [5, 1, 1, 0],
        range(3, 6),
        [],
        np.array([4, 2]),
        torch.tensor([-1, 0]),
        "mask",
    ],
    ids=str,
)
def test_rows_that_are_asked_for_are_those_of_the_copies(index):
    made, copies = prefixes()
    index = (copies["length"] == 2) if isinstance(index, str) else index
    expected = Interaction({name: copies[name][index] for name in copies})
    assert isinstance(made[index], Histories)
    assert_same(made[index], expected)
    batch = made.batch(index)
    assert type(batch) is Interaction and len(batch) == len(expected)
    assert_same(batch, expected)


def test_a_single_row_is_what_it_is_of_the_copies():
    made, copies = prefixes()
    for name, value in made[3].interaction.items():
        torch.testing.assert_close(value, copies[3][name], rtol=0, atol=0)


@pytest.mark.parametrize(
    "change",
    [
        lambda feat: feat.sort(by="item"),
        lambda feat: feat.sort(by=["user", "size"], ascending=[True, True]),
        lambda feat: (torch.manual_seed(3), feat.shuffle()),
        lambda feat: feat.drop("size"),
        lambda feat: [feat.drop(name) for name in ("size", "size_list")],
        lambda feat: feat.update(Interaction({"item": torch.arange(len(feat)), "new": torch.ones(len(feat))})),
        lambda feat: (
            feat.__setitem__("item_list", torch.ones(len(feat), 2)),
            feat.sort(by="item"),
        ),
    ],
)
def test_changes_change_what_they_change_of_the_copies(change):
    made, copies = prefixes()
    change(made), change(copies)
    assert_same(made, copies)
    assert_same(made.batch([2, 0]), copies[[2, 0]])
    assert ("size" in made.values) == any(name.startswith("size") for name in copies)


@pytest.mark.parametrize(
    "derive",
    [
        copy.deepcopy,
        lambda feat: pickle.loads(pickle.dumps(feat)),
        lambda feat: feat.to("cpu", selected_field="item"),
        lambda feat: feat.repeat(2),
        lambda feat: Interaction(feat.numpy()),
    ],
)
def test_what_is_derived_is_what_is_derived_of_the_copies(derive):
    made, copies = prefixes()
    assert_same(derive(made), derive(copies))


def test_a_column_can_be_read_in_parts():
    made, copies = prefixes()
    column = column_in_parts(made, "item_list")
    assert isinstance(column, HistoryColumn) and column.shape == tuple(copies["item_list"].shape)
    for rows in (slice(3, 7), np.array([5, 0, 5])):
        assert np.array_equal(column[rows], copies["item_list"].numpy()[rows])
    assert np.array_equal(column_in_parts(made, "item"), copies["item"].numpy())
    assert np.array_equal(column_in_parts(copies, "item_list"), copies["item_list"].numpy())


def test_what_rows_hold_is_each_element_before_a_target_or_a_target():
    made, copies = prefixes(n=60, width=3)
    for rows in (range(len(copies)), [3, 8, 9], [0]):
        held = made[rows].held("item")
        ids = {
            *copies["item"][list(rows)].tolist(),
            *copies["item_list"][list(rows)].flatten().tolist(),
        } - {0}
        assert set(held.tolist()) == ids and len(held) <= 60


def test_an_unknown_column_is_a_key_error():
    made, _ = prefixes()
    with pytest.raises(KeyError, match="price"):
        made["price"]


def test_memory_grows_with_the_interactions_and_not_with_their_histories():
    made, copies = prefixes(n=2000, width=100)
    numbers = [*made.values.values(), made.start, made.target]
    size = sum(tensor.numel() * tensor.element_size() for tensor in numbers)
    assert size < 50 * 2000 < sum(tensor.numel() * tensor.element_size() for tensor in columns_of(copies).values()) / 10


def test_places_are_32_bits_wide_as_long_as_the_padding_has_one():
    assert module._places(np.array([3]), (1 << 31) - 3).dtype == torch.int32
    assert module._places(np.array([3]), (1 << 31) - 2).dtype == torch.int64


def test_rows_of_lists_have_their_targets_behind_them():
    rows = {"session": torch.tensor([7, 8]), "item": torch.tensor([5, 6])}
    lists = {
        "item_list": ("item", torch.tensor([1, 2, 3])),
        "price_list": ("price", torch.tensor([0.1, 0.2, 0.3])),
    }
    names = ["session", "price_list", "item_list", "item"]
    made = histories_of_lists(rows, lists, np.array([2, 1]), names=names)
    assert made.values["item"].tolist() == [1, 2, 5, 3, 6, 0]
    assert made.columns == names and made["item"].tolist() == [5, 6] and made["session"].tolist() == [7, 8]
    assert made["item_list"].tolist() == [[1, 2], [3, 0]]
    torch.testing.assert_close(made["price_list"], torch.tensor([[0.1, 0.2], [0.3, 0]]), rtol=0, atol=0)
    assert (made.start.tolist(), made.stop.tolist(), made.target.tolist()) == (
        [0, 3],
        [2, 4],
        [2, 4],
    )


# ------------------------------------------------ groups


@pytest.mark.parametrize("n", [1, 2])
def test_leaving_out_the_last_rows_is_recbole_s(n):
    keys = np.random.default_rng(n).integers(0, 12, 60)
    keys[7] = 99  # a group of one
    stock = SequentialDataset.__new__(SequentialDataset)
    expected = stock._split_index_by_leave_one_out(stock._grouped_index(keys), n)
    assert [rows.tolist() for rows in Groups.of(keys).leave_out(n)] == expected
    assert list(Groups.of(keys)) == list(stock._grouped_index(keys))


# ------------------------------------------------ data sets


def in_both(folder: Path, model: str = "SASRec", **settings) -> list[list]:
    """Training, validation and test, with rows as places and as copies."""
    return [dataset_of(folder, model=model, history_storage=kind, **settings).build() for kind in ("index", "copies")]


EVAL_ARGS = {"order": "TO", "mode": "full"}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"MAX_ITEM_LIST_LENGTH": 3},
        {"eval_args": {"split": {"RS": [8, 1, 1]}, "group_by": "user", **EVAL_ARGS}},
        {"eval_args": {"split": {"RS": [8, 1, 1]}, "group_by": None, **EVAL_ARGS}},
        {"eval_args": {"split": {"TS": [7, 2, 1]}, "group_by": "user", **EVAL_ARGS}},
        {"protocol": "time"},
        {"protocol": "new-sessions"},
        {"protocol": "cold-items", "cold_share": 0.2},
        {"unused_col": {"inter": ["timestamp", "timestamp_list"]}},
        {"normalize_all": True, "numerical_features": ["timestamp"]},
    ],
    ids=lambda settings: " ".join(map(str, settings)) or "default",
)
def test_the_parts_are_those_of_copies(planted, settings):
    for part, copies in zip(*in_both(planted, **settings), strict=True):
        assert isinstance(part.inter_feat, Histories) and not isinstance(copies.inter_feat, Histories)
        assert_same(part.inter_feat, copies.inter_feat)
        assert_same(part[[1, 0]], copies[[1, 0]])
        assert torch.equal(part.seen_in_training(), copies.seen_in_training())


def test_parts_that_know_the_same_interactions_share_them(planted):
    train, *_ = dataset_of(planted, protocol="time").build()
    assert len(train.inter_feat.values["item_id"]) == 60 * 8 + 1
    train, *_ = dataset_of(planted, protocol="cold-items", cold_share=0.2).build()
    assert 60 * 8 < len(train.inter_feat.values["item_id"]) < 2 * 60 * 8


def test_columns_of_sequences_are_those_of_copies(tmp_path):
    random = np.random.default_rng(0)
    table = {
        "user_id:token": [],
        "item_id:token": [],
        "timestamp:float": [],
        "tags:token_seq": [],
        "sizes:float_seq": [],
    }
    for step in range(60):
        row = (
            f"u{step % 7}",
            f"i{random.integers(9)}",
            step,
            "a b c"[: 2 * (step % 3) + 1],
            "0.5 1.5"[: 3 + 4 * (step % 2)],
        )
        for column, value in zip(table.values(), row, strict=True):
            column.append(value)
    folder = tmp_path / "wide"
    write_table(folder / "wide.inter", table)
    settings = {
        "load_col": {"inter": "*"},
        "MAX_ITEM_LIST_LENGTH": 4,
        "topk": [1],
        "valid_metric": "Recall@1",
    }
    for part, copies in zip(*in_both(folder, **settings), strict=True):
        assert_same(part.inter_feat, copies.inter_feat)
        assert part.inter_feat["tags_list"].shape[1:] == (4, 3)


def test_the_parts_of_a_split_folder_are_those_of_copies(splits):
    for part, copies in zip(*in_both(splits), strict=True):
        assert isinstance(part.inter_feat, Histories) and part.inter_feat.values.keys() == {"item_id"}
        assert_same(part.inter_feat, copies.inter_feat)
        assert_same(part[[3, 0, 3]], copies[[3, 0, 3]])
        assert torch.equal(part.seen_in_training(), copies.seen_in_training())


def test_further_lists_of_a_split_folder_are_those_of_copies(splits):
    """One as long as that of the items, one of another length, one that is cut, and a number for each row.

    And two whose own columns are of another type or have a list for each row.
    """
    for path in splits.glob("*.inter"):
        header, *lines = path.read_text().splitlines()
        header += "\tprice_list:float_seq\tprice:float\ttags_list:token_seq\tcut_list:token_seq"
        header += "\tsize:token\tsize_list:float_seq\twords:token_seq\twords_list:token_seq"
        for number, line in enumerate(lines):
            length = len(line.split("\t")[1].split())
            prices = " ".join(str(step / 3) for step in range(length))
            lines[number] += f"\t{prices}\t{number}\ta b\t{' '.join('c' * length)}"
            lines[number] += f"\ts{number % 3}\t{prices}\td e\t{' '.join('e' * length)}"
        path.write_text("\n".join([header, *lines]) + "\n")
    settings = {"load_col": {"inter": "*"}, "seq_len": {"cut_list": 3}}
    for part, copies in zip(*in_both(splits, **settings), strict=True):
        assert part.inter_feat.values.keys() == {"item_id", "price", "size", "words"}
        assert_same(part.inter_feat, copies.inter_feat)


def test_counts_of_interactions_and_items_beside_the_rows_are_those_of_copies(planted):
    tokens = [f"i{100 + number}" for number in range(30)]
    write_table(
        planted / "planted.item",
        {"item_id:token": tokens, "class:token": [f"c{n % 4}" for n in range(30)]},
    )
    settings = {
        "load_col": {
            "inter": ["user_id", "item_id", "timestamp"],
            "item": ["item_id", "class"],
        }
    }
    part, copies = (parts[0] for parts in in_both(planted, **settings))
    assert "class" in part[[0, 4]]
    assert_same(part[[0, 4]], copies[[0, 4]])
    assert (part.inter_matrix("csr") != copies.inter_matrix("csr")).nnz == 0
    assert part.avg_actions_of_items == copies.avg_actions_of_items and part.inter_num == copies.inter_num


def test_recbole_s_own_data_set_with_places_has_its_rows_in_its_order(tmp_path):
    random = np.random.default_rng(1)
    columns = (
        random.integers(0, 9, 120),
        random.integers(0, 20, 120),
        random.integers(0, 50, 120),
    )
    rows = [(f"u{user}", f"i{item}", int(time)) for user, item, time in zip(*columns, strict=True)]  # equal times, too
    folder = interactions(tmp_path / "same", rows)
    for longest in (3, 50):
        config = Config("SASRec", str(folder), settings={"MAX_ITEM_LIST_LENGTH": longest})
        for ours, stock in zip(
            IndexedDataset(config).build(),
            SequentialDataset(config).build(),
            strict=True,
        ):
            assert isinstance(ours.inter_feat, Histories) and set(ours.inter_feat) == set(stock.inter_feat)
            assert_same(
                Interaction({name: ours.inter_feat[name] for name in stock.inter_feat}),
                stock.inter_feat,
            )


@pytest.mark.parametrize("interval", ["[0,inf)", "[3,inf)", "[1,20]", None])
def test_filters_by_number_of_interactions_leave_what_recbole_s_leave(tmp_path, interval):
    random = np.random.default_rng(2)
    rows = [
        (f"u{int(user**2 / 9)}", f"i{item}", step) for step, (user, item) in enumerate(random.integers(0, 9, (80, 2)))
    ]
    settings = {
        "user_inter_num_interval": interval,
        "item_inter_num_interval": interval,
    }
    config = Config("SASRec", str(interactions(tmp_path / "few", rows)), settings=settings)
    ours, stock = (cls(config) for cls in (type(dataset_of(tmp_path / "few")), SequentialDataset))
    assert ours.inter_num == stock.inter_num and list(ours.field2id_token["item_id"]) == list(
        stock.field2id_token["item_id"]
    )


def test_a_storage_that_does_not_exist_is_refused(planted):
    with pytest.raises(
        SettingError,
        match="history_storage must be one of index, copies, found 'lists'",
    ):
        dataset_of(planted, history_storage="lists")
