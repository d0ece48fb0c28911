"""Who is trained on what and asked for what, against literal loops and small cases by hand."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_dataset import dataset_of, histories, interactions

from recbole_mm.config import Config
from recbole_mm.data import protocols
from recbole_mm.data.dataset import MultimodalDataset
from recbole_mm.data.layout import Manifest
from recbole_mm.data.protocols import draw_cold, protocol_label
from recbole_mm.errors import DatasetError, SettingError

FEW = {"topk": [1], "valid_metric": "Recall@1"}


def random_rows(seed: int = 0, *, n: int = 200, n_times: int = 60) -> list[tuple[str, str, float]]:
    """Interactions with many equal times, in no order."""
    random = np.random.default_rng(seed)
    columns = random.integers(0, 12, n), random.integers(0, 25, n), random.integers(0, n_times, n)
    return [(f"u{user}", f"i{item}", 1e9 + float(time)) for user, item, time in zip(*columns, strict=True)]


def literal(rows: list[tuple], wanted, known=lambda row: True, *, longest: int = 50) -> list[tuple]:
    """Rows (user, prefix, target), sorted: loops over the histories of users, in order of time, then line."""
    found = []
    for user in dict.fromkeys(row[0] for row in rows):
        mine = sorted((row for row in rows if row[0] == user and known(row)), key=lambda row: row[2])  # stable
        for end in range(1, len(mine)):
            if wanted(mine[end]):
                prefix = [item for _, item, _ in mine[max(0, end - longest) : end]]
                found.append((user, prefix, mine[end][1]))
    return sorted(found)


def parts_of(folder: Path, **settings) -> tuple[MultimodalDataset, list[list[tuple]]]:
    dataset = dataset_of(folder, **{"MAX_ITEM_LIST_LENGTH": 50, **settings})
    return dataset, [sorted(histories(dataset, part)) for part in dataset.build()]


# ------------------------------------------------ time


def test_a_target_is_in_the_part_of_its_time_and_its_prefix_is_all_before_it(tmp_path):
    rows = [("a", "w", 1), ("a", "x", 2), ("b", "x", 3), ("a", "y", 5), ("b", "z", 6), ("a", "z", 7), ("b", "w", 9)]
    folder = interactions(tmp_path / "shop", rows)
    _, (train, valid, test) = parts_of(folder, protocol="time", time_cuts=[5, 7], **FEW)
    assert train == [("a", ["w"], "x")]
    assert valid == [("a", ["w", "x"], "y"), ("b", ["x"], "z")]
    assert test == [("a", ["w", "x", "y"], "z"), ("b", ["x", "z"], "w")]


@pytest.mark.parametrize("longest", [3, 50])
def test_the_parts_by_time_equal_a_literal_loop(tmp_path, longest):
    rows = random_rows()
    folder = interactions(tmp_path / "shop", rows)
    _, parts = parts_of(folder, protocol="time", time_cuts=[1e9 + 40, 1e9 + 50], MAX_ITEM_LIST_LENGTH=longest)
    bounds = [(-np.inf, 1e9 + 40), (1e9 + 40, 1e9 + 50), (1e9 + 50, np.inf)]
    for part, (low, high) in zip(parts, bounds, strict=True):
        assert part == literal(rows, lambda row, low=low, high=high: low <= row[2] < high, longest=longest)


def test_seconds_are_told_apart_that_float32_merges(tmp_path):
    start = 1_600_000_000  # float32 has steps of 128 s here
    folder = interactions(tmp_path / "close", [("u", f"i{step}", start + step) for step in range(6)])
    _, (train, valid, test) = parts_of(folder, protocol="time", time_cuts=[start + 3, start + 5], **FEW)
    assert [len(train), len(valid), len(test)] == [2, 2, 1] and test[0][2] == "i5"


@pytest.mark.parametrize("protocol", ["time", "new-sessions"])
def test_shares_of_a_protocol_are_about_what_was_asked_for(tmp_path, protocol):
    rows = [(f"u{user}", f"i{step}", 100.0 * user + step) for user in range(50) for step in range(4)]
    folder = interactions(tmp_path / "shop", rows)
    _, parts = parts_of(folder, protocol=protocol, time_shares=[6, 2, 2], **FEW)
    assert [len(part) for part in parts] == [90, 30, 30]  # 30, 10 and 10 users of 3 rows each


def test_three_parts_need_three_times(tmp_path):
    folder = interactions(
        tmp_path / "flat", [(user, item, time) for user in "ab" for item, time in (("x", 1), ("y", 2))]
    )
    with pytest.raises(DatasetError, match="4 interactions have 2 different times, and three parts need three"):
        dataset_of(folder, protocol="time", **FEW).build()
    with pytest.raises(DatasetError, match="2 beginnings of users with two interactions or more have 1 different times"):
        dataset_of(folder, protocol="new-sessions", **FEW).build()


def test_a_part_without_rows_is_named_with_the_setting_that_made_it(tmp_path):
    folder = interactions(tmp_path / "shop", random_rows())
    with pytest.raises(DatasetError, match=r"no test rows are left by protocol time with time_cuts \[1000000005.0, 20"):
        dataset_of(folder, protocol="time", time_cuts=[1e9 + 5, 2e9]).build()


# ------------------------------------------------ new sessions


def test_nobody_is_in_two_parts_and_no_part_knows_what_is_later_than_it(tmp_path):
    rows = random_rows(3, n=300, n_times=90)
    began = {user: min(time for who, _, time in rows if who == user) for user, _, _ in rows}
    rows = [(user, item, time + 20 * (int(user[1:]) % 6)) for user, item, time in rows]  # users begin at six times
    began = {user: min(time for who, _, time in rows if who == user) for user in began}
    folder = interactions(tmp_path / "shop", rows)
    low, high = sorted(began.values())[7], sorted(began.values())[10]
    _, parts = parts_of(folder, protocol="new-sessions", time_cuts=[low, high])
    users = {
        "train": {user for user in began if began[user] < low},
        "valid": {user for user in began if low <= began[user] < high},
        "test": {user for user in began if began[user] >= high},
    }
    assert all(users.values())
    for part, (name, end) in zip(parts, {"train": low, "valid": high, "test": np.inf}.items(), strict=True):
        mine = users[name]
        assert part == literal(rows, lambda row: True, lambda row, mine=mine, end=end: row[0] in mine and row[2] < end)


def test_new_sessions_by_hand(tmp_path):
    times = {"a": [1, 2, 9], "b": [3, 4, 5], "c": [6, 7, 20], "d": [10, 11, 12]}
    rows = [(user, f"{user}{step}", time) for user, mine in times.items() for step, time in enumerate(mine)]
    folder = interactions(tmp_path / "shop", rows)
    _, parts = parts_of(folder, protocol="new-sessions", time_shares=[2, 1, 1], **FEW)
    assert parts == [
        [("a", ["a0"], "a1"), ("b", ["b0"], "b1"), ("b", ["b0", "b1"], "b2")],  # a2 is as late as validation
        [("c", ["c0"], "c1")],  # c2 is as late as the test
        [("d", ["d0"], "d1"), ("d", ["d0", "d1"], "d2")],
    ]


# ------------------------------------------------ cold items


@pytest.mark.parametrize("choice", ["hash", "newest"])
def test_cold_items_are_in_no_training_row_and_alone_asked_for(tmp_path, choice):
    rows = random_rows(5)
    folder = interactions(tmp_path / "shop", rows)
    dataset, (train, valid, test) = parts_of(folder, protocol="cold-items", cold_share=0.3, cold_choice=choice)
    candidates = dataset.candidates()
    cold = {str(token) for token in dataset.id2token("item_id", candidates.nonzero().flatten().numpy())}
    assert len(cold) == round(0.3 * 25) == dataset.n_candidates() and not candidates[0]
    asked = [{target for _, _, target in part} for part in (valid, test)]
    assert asked[0] | asked[1] == cold and not asked[0] & asked[1]
    assert train == literal(rows, lambda row: True, lambda row: row[1] not in cold)
    for part, items in zip((valid, test), asked, strict=True):
        assert part == literal(rows, lambda row, items=items: row[1] in items)
    seen = dataset.seen_in_training()
    assert not (seen & candidates).any() and int(seen.sum()) == 25 - len(cold)


def test_a_larger_share_takes_the_same_items_and_more_and_order_does_not_matter():
    tokens = [f"i{number}" for number in range(40)]
    time = np.zeros(40)
    few, many = (draw_cold(tokens, time, share=share, seed=1) for share in (0.2, 0.5))
    assert (few > 0).sum() == 8 and (many[few > 0] == few[few > 0]).all()
    assert (draw_cold(tokens[::-1], time, share=0.2, seed=1)[::-1] == few).all()
    assert (draw_cold(tokens, time, share=0.2, seed=2) != few).any()
    first = min(tokens, key=lambda token: hashlib.sha256(f"1 {token}".encode()).digest())
    assert few[tokens.index(first)] == 2  # by turns for test and validation
    assert np.bincount(few).tolist() == [32, 4, 4]


def test_the_newest_items_are_those_whose_first_interaction_is_latest():
    drawn = draw_cold(list("abcde"), np.array([5.0, 1, 4, 2, 3]), share=0.6, choice="newest")
    assert drawn.tolist() == [2, 0, 1, 0, 2]  # a, c, e by turns


def test_all_items_are_ranked_where_that_is_asked_for(tmp_path):
    folder = interactions(tmp_path / "shop", random_rows())
    assert dataset_of(folder, protocol="cold-items", candidates="all").candidates() is None
    assert dataset_of(folder).candidates() is None and dataset_of(folder, protocol="time").candidates() is None


def test_a_share_of_less_than_two_items_is_refused(tmp_path):
    folder = interactions(tmp_path / "shop", random_rows())
    with pytest.raises(DatasetError, match="cold_share 0.02 of 25 items is 0, and validation and test need one each"):
        dataset_of(folder, protocol="cold-items", cold_share=0.02)


WITH_A_ROW_PER_ITEM = [
    ("MSM4SR", {}),
    ("MMSBR", {"pivots": "per_item"}),
    ("UniSRec", {"finetune_mode": "transductive"}),
]


@pytest.mark.parametrize(("model", "settings"), WITH_A_ROW_PER_ITEM, ids=lambda value: str(value))
def test_a_cold_item_is_scored_by_its_content_alone(built, planted, model, settings):
    torch.manual_seed(1)
    _, dataset, train, _, test, net = built(model, planted, protocol="cold-items", cold_share=0.4, **settings)
    cold = dataset.candidates()
    table = net.item_embedding.weight if hasattr(net, "item_embedding") else net.pivot_offsets.weight
    net.eval()
    batch = next(iter(test))[0]
    with torch.no_grad():
        before = net.full_sort_predict(batch)
        table[1:] += torch.randn_like(table[1:]) * cold[1:].unsqueeze(1)
        net.train().eval()  # forgets what it keeps of items
        torch.testing.assert_close(net.full_sort_predict(batch), before, rtol=0, atol=0)
        table[1:] += 1.0 * torch.randn_like(table[1:])
        net.train().eval()
        assert not torch.equal(net.full_sort_predict(batch), before)
    net.train()
    losses = net.calculate_loss(next(iter(train)))
    (sum(losses) if isinstance(losses, tuple) else losses).backward()
    assert not table.grad[cold].any() and table.grad[dataset.seen_in_training()].any()


def test_training_does_not_learn_that_cold_items_are_not_bought(built, planted):
    _, dataset, train, _, _, net = built("MSM4SR", planted, protocol="cold-items", cold_share=0.4)
    batch = next(iter(train))
    scores = net.eval().scores(net.item_tower(), batch["item_id_list"], batch["item_length"]) / net.temperature
    warm = dataset.seen_in_training().clone()
    warm[0] = True  # padding stays in the softmax, as in every other protocol
    target = batch["item_id"]
    expected = -(scores.gather(1, target.unsqueeze(1)).squeeze(1) - scores[:, warm].logsumexp(1)).mean()
    torch.testing.assert_close(net.calculate_loss(batch), expected)


@pytest.mark.parametrize("protocol", ["leave-one-out", "time", "new-sessions"])
def test_other_protocols_leave_the_training_as_it_is(built, planted, protocol):
    assert built("MSM4SR", planted, protocol=protocol)[-1].unseen is None


@pytest.mark.parametrize("model", ["Popularity", "Transitions", "SessionItemKNN"])
def test_counting_says_that_it_knows_nothing_of_cold_items(built, planted, model):
    with pytest.raises(
        SettingError, match=rf"{model} counts what is bought in training.*\n.*floor there is ContentKNN"
    ):
        built(model, planted, protocol="cold-items")
    built(model, planted, protocol="cold-items", candidates="all")
    built("SessionPopularity", planted, protocol="cold-items")


# ------------------------------------------------ what a folder is


@pytest.mark.parametrize(
    ("settings", "protocol"),
    [
        ({}, "leave-one-out"),
        ({"protocol": "leave-one-out"}, "leave-one-out"),
        ({"protocol": "leave-one-out", "eval_args": {"split": {"LS": "valid_and_test"}}}, "leave-one-out"),
        ({"eval_args": {"split": {"RS": [8, 1, 1]}}}, "ratio per user"),
        ({"eval_args": {"split": {"RS": [8, 1, 1]}, "group_by": None}}, "ratio in time order"),
        ({"eval_args": {"split": {"TS": [8, 1, 1]}}}, "RecBole's TS"),
        ({"eval_args": {"mode": "full"}, "protocol": "time"}, "time"),
    ],
)
def test_the_protocol_of_a_plain_folder(planted, settings, protocol):
    assert Config("SASRec", str(planted), settings=settings)["protocol"] == protocol


@pytest.mark.parametrize(
    ("made", "asked", "protocol"),
    [
        ({}, None, "given split"),
        ({}, "new-sessions", "new-sessions"),
        ({"made_by": "sessions", "split": "time"}, None, "new-sessions"),
        ({"made_by": "sessions", "split": "leave-one-out"}, None, "leave-one-out"),
        ({"made_by": "preparation", "protocol": "sessions", "split": "time"}, "new-sessions", "new-sessions"),
        ({"made_by": "preparation", "protocol": "time"}, None, "time"),
        ({"made_by": "python -m dataset_prep released"}, None, "given split"),
    ],
)
def test_the_protocol_of_a_split_folder_is_what_its_manifest_says(splits, made, asked, protocol):
    (splits / "manifest.json").unlink()
    Manifest(name="splits", settings=made).save(splits)
    assert Config("SASRec", str(splits), settings={"protocol": asked})["protocol"] == protocol


@pytest.mark.parametrize("asked", ["time", "cold-items", "leave-one-out"])
def test_a_split_folder_keeps_its_protocol(splits, asked):
    with pytest.raises(
        SettingError, match=rf"protocol {asked} \(from settings\) cannot be made of splits: .*does not tell\n"
    ):
        Config("SASRec", str(splits), settings={"protocol": asked})


def test_a_session_in_two_parts_is_no_new_session(splits):
    path = splits / "splits.test.inter"
    path.write_text(path.read_text().replace("test3\t", "train5\t"))
    assert dataset_of(splits).config["protocol"] == "given split"
    with pytest.raises(DatasetError, match="1 of 179 sessions are in two of training, validation and test"):
        dataset_of(splits, protocol="new-sessions")


def test_what_the_preparation_parts_is_recognised(tmp_path):
    from dataset_prep.session_folder import Rows, write_session_folder

    rows = {part: Rows([part], [["a", "b"]], ["c"]) for part in ("train", "valid", "test")}
    settings = {"made_by": "sessions", "split": "time"}
    folder = tmp_path / "dataset" / "baskets"
    write_session_folder(folder, rows, None, {}, settings=settings, raw_files={})
    assert dataset_of(folder, **FEW).config["protocol"] == "new-sessions"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"protocol": "leave-one-in"}, "protocol must be one of leave-one-out, time, .*; did you mean 'leave-one-out'"),
        ({"protocol": "time", "eval_args": {"split": {"RS": [8, 1, 1]}}}, "two ways to part the data; leave one out"),
        ({"protocol": "time", "eval_args": {"split": {"LS": "valid_and_test"}}}, "protocol time .*and eval_args split"),
        ({"protocol": "leave-one-out", "eval_args": {"split": {"TS": [8, 1, 1]}}}, "two ways to part the data"),
        ({"protocol": "time", "time_shares": [0.9, 0.1]}, "time_shares must be three numbers > 0"),
        ({"protocol": "time", "time_shares": [0.9, 0.1, 0]}, "time_shares must be three numbers > 0"),
        ({"protocol": "time", "time_cuts": [5, 5]}, r"time_cuts must be two moments.*found \[5, 5\]"),
        ({"protocol": "time", "time_cuts": "2016-07-01"}, "time_cuts must be two moments"),
        ({"protocol": "cold-items", "cold_share": 1.0}, r"cold_share must be in \(0, 1\), found 1.0"),
        ({"protocol": "cold-items", "cold_choice": "oldest"}, "cold_choice must be one of hash, newest"),
        ({"protocol": "cold-items", "cold_seed": -1}, "cold_seed must be >= 0"),
        (
            {"cold_share": 0.2},
            "cold_share .*belongs to protocol cold-items.*leave it out, or add --protocol=cold-items",
        ),
        ({"protocol": "cold-items", "time_cuts": [1, 2]}, "time_cuts .*belongs to protocol time and new-sessions"),
        ({"eval_args": {"mode": "uni100"}}, "mode must be full, .*found 'uni100'.*\n.*Krichene and Rendle"),
        ({"eval_args": {"mode": {"valid": "full", "test": "pop100"}}}, "mode must be full, .*found 'pop100'"),
        ({"eval_args": {"mode": "labeled"}}, "mode must be full, .*found 'labeled'"),
    ],
)
def test_settings_that_make_no_protocol_are_refused(planted, settings, message):
    with pytest.raises(SettingError, match=message):
        Config("SASRec", str(planted), settings=settings)


def test_a_message_says_where_the_setting_came_from(planted):
    with pytest.raises(SettingError, match=r"cold_share \(from --cold_share\) belongs to"):
        Config("SASRec", str(planted), settings={"cold_share": 0.2}, origins={"cold_share": "--cold_share"})


def test_protocols_that_see_the_future_are_labelled():
    assert "leaks future information" in protocol_label("leave-one-out") and protocol_label("time") is None
    assert protocol_label("new-sessions") is None and "later than the tested" in protocol_label("cold-items")
    assert protocol_label("") is None


# ------------------------------------------------ fingerprints and records


def test_the_fingerprint_of_a_test_is_that_of_its_rows_and_candidates(tmp_path):
    rows = [("u", item, 10 * step) for step, item in enumerate("abcde")]
    folder = interactions(tmp_path / "five", rows)
    dataset = dataset_of(folder, **FEW)
    test = dataset.build()[2]
    expected = hashlib.sha256(b"u\te\n\na\nb\nc\nd\ne").hexdigest()[:16]
    assert protocols.test_fingerprint(dataset, test) == expected


def test_the_fingerprint_changes_with_rows_and_candidates_and_not_with_model_or_seed(tmp_path):
    folder = interactions(tmp_path / "shop", random_rows())

    def fingerprint(model: str = "SASRec", **settings) -> str:
        dataset = dataset_of(folder, model, **settings)
        return protocols.test_fingerprint(dataset, dataset.build()[2])

    same = {fingerprint(), fingerprint("GRU4Rec"), fingerprint(seed=7), fingerprint(protocol="leave-one-out")}
    cold = {"protocol": "cold-items", "cold_share": 0.3}
    other = {fingerprint(protocol="time"), fingerprint(**cold), fingerprint(**cold, candidates="all")}
    assert len(same) == 1 and len(other) == 3 and not same & other


@pytest.mark.parametrize("protocol", ["leave-one-out", "time", "cold-items"])
def test_the_fingerprint_knows_nothing_of_content_knock_outs_and_what_a_model_reads(planted, protocol):
    item_file = planted / "planted.item"  # also where it lacks items of the interactions, and has others
    lines = item_file.read_text().splitlines()
    item_file.write_text("\n".join([*lines[:20], "nobody\tthing\tc1\t1.0"]) + "\n")

    def fingerprint(model: str, **settings) -> str:
        dataset = dataset_of(planted, model, protocol=protocol, MAX_ITEM_LIST_LENGTH=5, **FEW, **settings)
        return protocols.test_fingerprint(dataset, dataset.build()[2])

    alone = fingerprint("SASRec")
    assert fingerprint("FDSA", selected_features=["categories"]) == alone
    assert fingerprint("MSM4SR", knockout="image:noise", seed=7) == fingerprint("MMSBR") == alone


def test_a_record_says_its_protocol_and_what_was_ranked(planted):
    from recbole_mm.quick_start import run

    settings = {"topk": [1], "valid_metric": "Recall@1", "epochs": 1, "use_gpu": False, "show_progress": False}
    record = run("ContentKNN", "planted", settings={**settings, "protocol": "cold-items"})
    assert (record.protocol, record.n_items) == ("cold-items", 3) and "--protocol=cold-items" in record.command
    dataset = dataset_of(planted, "SASRec", protocol="cold-items", **FEW)
    assert record.test_fingerprint == protocols.test_fingerprint(dataset, test := dataset.build()[2])
    assert record.n_test == len(test)
    assert json.loads(Path("results/runs.jsonl").read_text().splitlines()[0])["protocol"] == "cold-items"
