"""Sessions out of interactions: against a slow literal version, by laws, by hand, and by the command line."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dataset_prep.__main__ import main
from dataset_prep.cleaning import Ledger
from dataset_prep.interactions import Columns
from dataset_prep.session_folder import Rows, add_price_levels
from dataset_prep.session_settings import SessionSettings
from dataset_prep.sessions import make_sessions, prefix_rows, prepare_sessions
from recbole_mm.data.files import read_table, sha256_of, write_table
from recbole_mm.data.layout import Manifest, check_folder
from recbole_mm.errors import DatasetError, SettingError

SPLITS = ("train", "valid", "test")
START = 1_500_000_000  # 2:40 on a UTC day


def frame(rows: list[tuple]) -> pd.DataFrame:
    """Of (user, item, time) or (user, item, time, basket)."""
    names = ["user", "item", "time", "basket"][: len(rows[0])]
    made = pd.DataFrame(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)), dtype=object)
    return made.astype({"time": float})


def clicks(seed: int, n: int = 300) -> list[tuple[str, str, float, str]]:
    """Some items frequent and some rare, equal times, long pauses, exact duplicates, lines in no order of time."""
    made = random.Random(seed)
    names = [f"i{number}" for number in range(30)]
    made.shuffle(names)
    rows = []
    for _ in range(n):
        item = names[min(made.randrange(30), made.randrange(30))]
        time = START + 600 * made.randrange(40) + 86_400 * made.randrange(6)
        rows.append((f"u{made.randrange(12)}", item, float(time), f"b{made.randrange(4)}"))
        if made.random() < 0.1:
            rows.append(rows[-1])
    return rows


def whole(parts: dict[str, Rows]) -> dict[str, list[list[str]]]:
    """The sessions of each part, from their longest rows."""
    return {
        name: [
            [*prefix, target]
            for session, prefix, target, following in zip(*rows, [*rows.session_ids[1:], None], strict=True)
            if session != following
        ]
        for name, rows in parts.items()
    }


def sessions_of(rows: list[tuple], **settings) -> list[list[str]]:
    """All sessions, oldest first; nothing is filtered unless ``settings`` say so."""
    loose = {"min_item_count": 1, "cold_items": "keep", "prefixes": "none", **settings}
    parts, _ = make_sessions(frame(rows), SessionSettings(**loose))
    return [session for name in SPLITS for session in whole(parts)[name]]


# ---------------------------------------------------------------- a slow literal version


def literal(rows: list[tuple], s: SessionSettings) -> tuple[dict[str, Rows], Counter]:
    """What the settings say, one session and one item at a time; order "given" only."""
    dropped: Counter = Counter()
    events = [dict(zip(("user", "item", "time", "basket"), row, strict=True), line=n) for n, row in enumerate(rows)]
    if s.duplicates == "first":
        first = {}
        for event in events:
            key = (event["user"], event["item"], event["time"], event["basket"] if s.sessions == "basket" else "")
            first.setdefault(key, event)
        dropped["equal to an earlier row"] = len(events) - len(first)
        events = list(first.values())

    sessions: list[list[dict]] = []
    owners: dict[tuple, list[dict]] = {}
    for event in events:
        owners.setdefault((event["user"], event["basket"] if s.sessions == "basket" else ""), []).append(event)
    for mine in owners.values():
        mine.sort(key=lambda event: (event["time"], event["line"]))
        for event in mine:
            new = event is mine[0]
            if s.sessions == "gap":
                new = new or event["time"] - sessions[-1][-1]["time"] > s.gap
            if s.sessions == "day":
                new = new or event["time"] // 86_400 != sessions[-1][-1]["time"] // 86_400
            if new:
                sessions.append([])
            sessions[-1].append(event)

    def collapse(session: list[dict]) -> list[dict]:
        kept: list[dict] = []
        for event in session:
            if s.repeats == "drop" and kept and kept[-1]["item"] == event["item"]:
                dropped["directly after the same item"] += 1
            else:
                kept.append(event)
        return kept

    while True:
        before = sum(map(len, sessions))
        sessions = [collapse(session) for session in sessions]
        count = Counter(event["item"] for session in sessions for event in session)
        for session in sessions:
            for event in list(session):
                if count[event["item"]] < s.min_item_count:
                    session.remove(event)
                    dropped[f"item with fewer than {s.min_item_count} interactions"] += 1
        for session in sessions:
            if len(session) < s.min_length:
                dropped[f"session of fewer than {s.min_length} items"] += len(session)
        sessions = [session for session in sessions if len(session) >= s.min_length]
        if sum(map(len, sessions)) == before:
            break
    dropped[f"beyond the newest {s.longest} of its session"] = sum(max(0, len(x) - s.longest) for x in sessions)
    sessions = [session[-s.longest :] for session in sessions]
    sessions.sort(key=lambda session: (session[-1]["time"], min(event["line"] for event in session)))

    n = len(sessions)
    for number, session in enumerate(sessions):
        for place, event in enumerate(session):
            event["session"], event["part"] = str(number + 1), 0
            if s.split == "leave-one-out" and len(session) >= 4:
                event["part"] = {len(session) - 1: 2, len(session) - 2: 1}.get(place, 0)
    if s.split == "time":
        times = [session[-1]["time"] for session in sessions]
        n_test, n_valid = int(n * s.test_share + 0.5), int(n * s.valid_share + 0.5)
        test = nearest_change(times, wanted=n - n_test, places=range(2, n))
        valid = nearest_change(times, wanted=n - n_test - n_valid, places=range(1, test))
        for number, session in enumerate(sessions):
            for event in session:
                event["part"] = (number >= valid) + (number >= test)

    if s.cold_items == "drop":
        trained = {event["item"] for session in sessions for event in session if event["part"] == 0}
        for session in sessions:
            for event in list(session):
                if event["part"] and event["item"] not in trained:
                    session.remove(event)
                    dropped["validation or test item that training has not"] += 1
        sessions = [collapse(session) for session in sessions]
        for session in sessions:
            if len(session) < 2:
                dropped["validation or test session of one item after that"] += len(session)
        sessions = [session for session in sessions if len(session) >= 2]

    parts = {name: Rows([], [], []) for name in SPLITS}
    for session in sessions:
        for place, event in enumerate(session):
            if place == 0:
                continue
            name = SPLITS[event["part"]]
            alone = s.prefixes == "none" or (s.prefixes == "train" and name != "train")
            last = place + 1 == len(session) or session[place + 1]["part"] != event["part"]
            if last or not alone:
                parts[name].session_ids.append(event["session"])
                parts[name].prefixes.append([other["item"] for other in session[:place]])
                parts[name].targets.append(event["item"])
    return parts, +dropped


def nearest_change(times: list[float], *, wanted: int, places: range) -> int:
    possible = [place for place in places if times[place - 1] < times[place]]
    assert possible, "this made-up data has enough different times"
    return min(possible, key=lambda place: (abs(place - wanted), -place))


ALL = {
    "sessions": ("basket", "gap", "day", "user"),
    "duplicates": ("keep", "first"),
    "repeats": ("keep", "drop"),
    "split": ("time", "leave-one-out"),
    "cold_items": ("drop", "keep"),
    "prefixes": ("train", "all", "none"),
}


@pytest.mark.parametrize("grouping", ALL["sessions"])
def test_rows_and_counts_equal_those_of_the_literal_version(grouping):
    n_compared = 0
    others = [values for name, values in ALL.items() if name != "sessions"]
    for seed, (duplicates, repeats, split, cold_items, prefixes) in enumerate(itertools.product(*others)):
        made = random.Random(seed)
        settings = SessionSettings(
            sessions=grouping, duplicates=duplicates, repeats=repeats, split=split, cold_items=cold_items,
            prefixes=prefixes, gap=made.choice([3600, 20_000, 90_000]), min_item_count=made.choice([1, 3, 5]),
            longest=made.choice([4, 8, 50]), min_length=made.choice([2, 3]),
            valid_share=0.2, test_share=made.choice([0.1, 0.3]),
        )  # fmt: skip
        rows = clicks(seed)
        expected, dropped = literal(rows, settings)
        if not all(rows.targets for rows in expected.values()):
            with pytest.raises(DatasetError, match="--cold-items drop leaves no session"):
                make_sessions(frame(rows), settings)
            continue
        n_compared += 1
        actual, report = make_sessions(frame(rows), settings)
        for name in SPLITS:
            assert actual[name] == expected[name], (seed, settings, name)
        assert report.dropped == dropped, (seed, settings)
    assert n_compared > 40


# ---------------------------------------------------------------- laws


@pytest.mark.parametrize("order", ["given", "random"])
@pytest.mark.parametrize("split", ALL["split"])
def test_every_interaction_is_in_a_part_or_counted_as_dropped(split, order):
    for seed, grouping in enumerate(ALL["sessions"] * 3):
        settings = SessionSettings(
            sessions=grouping, split=split, session_order=order, min_item_count=4, longest=6, duplicates="first",
            repeats="drop", gap=40_000, seed=seed, prefixes="all" if seed % 2 else "none",
        )  # fmt: skip
        rows = clicks(seed)
        parts, report = make_sessions(frame(rows), settings, ledger=Ledger(len(rows) + 3, {"bad": 3}))
        kept = sum(part["interactions"] for part in report.parts.values())
        assert report.n_read == len(rows) + 3 == kept + sum(report.dropped.values()) and report.dropped["bad"] == 3
        for name, part in report.parts.items():
            assert part["rows"] == len(parts[name].targets) and part["sessions"] == len(set(parts[name].session_ids))
            if split == "leave-one-out" and name != "train":
                assert part["interactions"] == part["sessions"] == part["rows"]
            else:
                assert part["interactions"] == sum(map(len, whole(parts)[name]))
                assert part["rows"] == part["interactions"] * (seed % 2) - part["sessions"] * (1 if seed % 2 else -1)
        assert report.n_items == len(set().union(*(set(x.targets).union(*x.prefixes) for x in parts.values())))


def test_the_filters_leave_nothing_that_they_would_remove():
    for seed in range(10):
        found = sessions_of(clicks(seed), sessions="gap", gap=20_000, min_item_count=5, min_length=3, repeats="drop")
        count = Counter(item for session in found for item in session)
        assert found and min(count.values()) >= 5 and min(map(len, found)) >= 3
        assert all(a != b for session in found for a, b in itertools.pairwise(session))


def test_F23_filters_run_until_nothing_changes():
    """Each round takes away the reason to keep the next: x is rare, so session 1 is short, so y is rare, ..."""
    rows = [
        ("1", "x", 1.0), ("1", "y", 2.0),
        ("2", "y", 3.0), ("2", "z", 4.0),
        ("3", "z", 5.0), ("3", "a", 6.0),
        *((f"u{user}", item, 7.0 + user) for user in range(4) for item in "ab"),
    ]  # fmt: skip
    assert sessions_of(rows, sessions="user", min_item_count=2) == [["a", "b"]] * 4


def test_training_rows_do_not_depend_on_what_happens_to_unseen_items():
    n_cold = 0
    for seed in range(5):
        drop, keep = (
            make_sessions(
                frame(clicks(seed)),
                SessionSettings(sessions="day", min_item_count=1, test_share=0.3, cold_items=cold_items),
            )
            for cold_items in ("drop", "keep")
        )
        assert drop[0]["train"] == keep[0]["train"]
        trained = set(drop[0]["train"].targets).union(*drop[0]["train"].prefixes)
        assert all(set(drop[0][name].targets).union(*drop[0][name].prefixes) <= trained for name in SPLITS)
        assert drop[1].cold == {"valid": 0, "test": 0}
        cold = {
            name: sum(item not in trained for x in whole(keep[0])[name] for item in x) for name in ("valid", "test")
        }
        assert keep[1].cold == cold
        assert drop[1].dropped.get("validation or test item that training has not", 0) == sum(cold.values())
        n_cold += sum(cold.values())
    assert n_cold > 0


def test_the_order_of_users_in_the_file_changes_nothing_but_ties():
    rows = [(user, item, time + 0.001 * line) for line, (user, item, time, _) in enumerate(clicks(0))]
    expected, _ = make_sessions(frame(rows), SessionSettings(sessions="day", min_item_count=3))
    random.Random(1).shuffle(rows)
    actual, _ = make_sessions(frame(rows), SessionSettings(sessions="day", min_item_count=3))
    assert actual == expected


def test_a_random_order_holds_the_same_items_and_depends_on_the_seed_alone():
    rows = clicks(3)
    given = sessions_of(rows, sessions="user", longest=8)
    shuffled = [sessions_of(rows, sessions="user", longest=8, session_order="random", seed=seed) for seed in (1, 1, 2)]
    assert shuffled[0] == shuffled[1] and shuffled[0] != shuffled[2] and shuffled[0] != given
    assert [sorted(session) for session in shuffled[0]] == [sorted(session) for session in given]


def test_a_random_order_comes_before_the_prefixes():
    settings = SessionSettings(sessions="user", session_order="random", min_item_count=1)
    rows, _ = make_sessions(frame(clicks(4)), settings)
    train = rows["train"]
    for k in range(1, len(train.targets)):
        if train.session_ids[k] == train.session_ids[k - 1]:
            assert train.prefixes[k] == [*train.prefixes[k - 1], train.targets[k - 1]]


# ---------------------------------------------------------------- by hand


def test_a_gap_parts_sessions_only_when_it_is_longer():
    rows = [("u", "a", 0.0), ("u", "b", 1800.0), ("u", "c", 3600.5), ("u", "d", 3601.0), ("v", "e", 1.0), ("v", "f", 2)]
    assert sessions_of(rows, sessions="gap") == [["e", "f"], ["a", "b"], ["c", "d"]]


def test_a_gap_is_not_longer_for_the_rounding_of_fractions():
    times = [1_700_000_000.1, 1_700_000_000.4, 1_700_000_000.71]
    assert times[1] - times[0] > 0.3  # as floats
    rows = [(user, item, time, "b") for user in "uvw" for item, time in zip("abc", times, strict=True)]
    assert sessions_of(rows, sessions="gap", gap=0.3) == [["a", "b"]] * 3


def test_a_day_is_a_utc_day():
    midnight = 86_400.0 * 17_000
    rows = [(u, f"{u}{k}", midnight + t) for u in "uvw" for k, t in enumerate((-2, -1, 0, 86_399))]
    assert sessions_of(rows, sessions="day") == [[f"{u}{k}", f"{u}{k + 1}"] for k in (0, 2) for u in "uvw"]


def test_baskets_of_different_users_are_different_sessions():
    rows = [(user, f"{user}{k}", 1.0 * k, "same") for k in range(2) for user in "uvw"]
    assert sessions_of(rows, sessions="basket") == [["u0", "u1"], ["v0", "v1"], ["w0", "w1"]]
    anonymous = frame(rows).drop(columns="user")
    parts, _ = make_sessions(
        pd.concat([anonymous, anonymous.assign(basket="b2"), anonymous.assign(basket="b3")]),
        SessionSettings(sessions="basket", min_item_count=1),
    )
    assert {name: len(sessions) for name, sessions in whole(parts).items()} == {"train": 1, "valid": 1, "test": 1}


def test_F21_equal_times_keep_the_order_of_the_lines_and_are_counted():
    rows = [(u, f"{u}{item}", time) for u in "uvw" for item, time in (("c", 5.0), ("a", 5.0), ("b", 4.0))]
    parts, report = make_sessions(
        frame(rows), SessionSettings(sessions="user", min_item_count=1, cold_items="keep", prefixes="none")
    )
    assert [whole(parts)[name][0] for name in SPLITS] == [["ub", "uc", "ua"], ["vb", "vc", "va"], ["wb", "wc", "wa"]]
    assert report.equal_times == 0.5
    assert "50.0 % of neighbours in a session have the same time: their order is that of the file" in report.remarks


def test_F11_duplicates_are_counted_whether_they_are_kept_or_not():
    rows = [(u, item, float(k), u) for u in "uvw" for k, item in enumerate("aabb")]
    rows += [("u", "a", 0.0, "u"), ("u", "a", 1.0, "another"), ("u", "b", 3.0, "another")]

    def report(**settings):
        return make_sessions(frame(rows), SessionSettings(min_item_count=1, **settings))[1]

    kept, dropped = (report(sessions="user", duplicates=duplicates) for duplicates in ("keep", "first"))
    assert kept.n_duplicates == dropped.n_duplicates == 3 and dropped.dropped == {"equal to an earlier row": 3}
    remark = "3 rows read are equal to an earlier one; --duplicates first drops them"
    assert remark in kept.remarks and remark not in dropped.remarks
    assert report(sessions="basket").n_duplicates == 1  # those of another basket are none


def test_sessions_that_end_together_stay_together():
    """40, 30, 20 and 10 sessions end on four days; a tenth each would cut through the third."""
    rows = []
    for day, n in enumerate((40, 30, 20, 10)):
        rows += [(f"{day}-{k}", item, 86_400.0 * day) for k in range(n) for item in "ab"]
    parts, report = make_sessions(frame(rows), SessionSettings(sessions="day", test_share=0.12, valid_share=0.1))
    assert [report.parts[name]["sessions"] for name in SPLITS] == [70, 20, 10]
    assert not any("different parts" in remark for remark in report.remarks)
    parts, report = make_sessions(frame([(u, i, 0.0) for u, i, _ in rows]), SessionSettings(sessions="day"))
    assert [report.parts[name]["sessions"] for name in SPLITS] == [80, 10, 10]
    assert "sessions that end at the same time are in different parts, or a part would be empty" in report.remarks
    late = [(f"{k}", item, 86_400.0 * (k > 0)) for k in range(10) for item in "ab"]
    _, report = make_sessions(frame(late), SessionSettings(sessions="day", test_share=0.45, valid_share=0.45))
    assert [report.parts[name]["sessions"] for name in SPLITS] == [1, 4, 5]


def test_the_test_ends_after_validation_and_validation_after_training():
    rows = clicks(5)
    last = {}
    for user, _, time, _ in rows:
        last[user] = max(time, last.get(user, 0))
    named = [(user, f"{user}_{n}", time) for n, (user, _, time, _) in enumerate(rows)]
    parts, _ = make_sessions(
        frame(named),
        SessionSettings(sessions="user", min_item_count=1, cold_items="keep", valid_share=0.3, test_share=0.3),
    )
    ends = [[last[target.split("_")[0]] for target in parts[name].targets] for name in SPLITS]
    assert max(ends[0]) < min(ends[1]) and max(ends[1]) < min(ends[2])


def test_leave_one_out_needs_four_items():
    rows = [("u", item, float(k)) for k, item in enumerate("abcd")] + [
        ("v", item, float(k)) for k, item in enumerate("dca")
    ]
    settings = SessionSettings(sessions="user", split="leave-one-out", min_item_count=1, prefixes="all")
    parts, _ = make_sessions(frame(rows), settings)
    assert parts["train"] == Rows(["1", "1", "2"], [["d"], ["d", "c"], ["a"]], ["c", "a", "b"])
    assert parts["valid"] == Rows(["2"], [["a", "b"]], ["c"])
    assert parts["test"] == Rows(["2"], [["a", "b", "c"]], ["d"])


def test_an_unseen_target_of_leave_one_out_is_not_replaced_by_a_training_item():
    rows = [("u", item, float(k)) for k, item in enumerate("abcXb")] + [
        ("v", i, float(k)) for k, i in enumerate("abcaY")
    ]
    rows += [("w", item, float(k)) for k, item in enumerate("cab")]
    settings = SessionSettings(sessions="user", split="leave-one-out", min_item_count=1)
    parts, report = make_sessions(frame(rows), settings)
    assert parts["valid"] == Rows(["3"], [["a", "b", "c"]], ["a"])
    assert parts["test"] == Rows(["2"], [["a", "b", "c"]], ["b"])
    assert report.dropped == {"validation or test item that training has not": 2}


def test_F24_the_newest_items_are_kept():
    rows = [(u, f"{u}{k}", float(k)) for u in "uvw" for k in range(9)]
    assert sessions_of(rows, sessions="user", longest=3) == [[f"{u}6", f"{u}7", f"{u}8"] for u in "uvw"]


def test_F25_a_session_of_one_repeated_item_is_valid():
    rows = [(u, "a", float(k)) for k, u in enumerate("uvwuvw")]
    assert sessions_of(rows, sessions="user") == [["a", "a"]] * 3


def test_prefixes_of_given_sequences():
    assert prefix_rows(["s", "t"], ["abc", "de"], every=True) == Rows(
        ["s", "s", "t"], [["a"], ["a", "b"], ["d"]], ["b", "c", "e"]
    )
    assert prefix_rows(["s", "t"], ["abc", "de"], every=False) == Rows(["s", "t"], [["a", "b"], ["d"]], ["c", "e"])


def test_remarks_tell_what_a_run_needs_to_know():
    rows = [
        (u, item, float(k)) for k, (u, item) in enumerate(itertools.product("uvw", ["B01", "b01", "e\u0301", "\u00e9"]))
    ]
    _, report = make_sessions(frame(rows), SessionSettings(sessions="user", min_item_count=1, longest=60))
    assert report.remarks == (
        "prefixes have up to 59 items: run with --MAX_ITEM_LIST_LENGTH=59",
        "2 item ids differ from another only in case or composed letters; they are kept apart",
    )


# ---------------------------------------------------------------- nothing left


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"min_item_count": 99},
            "--min-item-count 99 removes all 24 interactions that were left of 24: item with fewer",
        ),
        ({"min_length": 9}, "--min-length 9 removes all 24 interactions"),
        ({"sessions": "gap", "gap": 0.5}, "--min-length 2 removes all 24"),
    ],
)
def test_F26_a_filter_that_empties_the_data_is_named(settings, message):
    rows = [(u, item, float(k)) for u in "uvwxyz" for k, item in enumerate("abcd")]
    with pytest.raises(DatasetError, match=message):
        make_sessions(frame(rows), SessionSettings(**{"sessions": "user", "min_item_count": 1, **settings}))


def test_too_few_sessions_or_items_for_three_parts_are_refused():
    rows = [(u, item, float(k)) for u in "uv" for k, item in enumerate("abcd")]
    with pytest.raises(DatasetError, match="2 sessions are left, and three parts need one each; loosen the filters"):
        make_sessions(frame(rows), SessionSettings(sessions="user", min_item_count=1))
    rows = [(u, f"{u}{k}", float(ord(u))) for u in "uvwx" for k in range(3)]
    with pytest.raises(
        DatasetError, match="--cold-items drop leaves no session for valid: too few of its items occur in tr"
    ):
        make_sessions(frame(rows), SessionSettings(sessions="user", min_item_count=1))


def test_leave_one_out_of_short_sessions_alone_is_refused():
    rows = [(u, item, float(k)) for u in "uvwxyz" for k, item in enumerate("abc")]
    with pytest.raises(
        DatasetError, match="none of 6 sessions has 4 items, which leave-one-out needs; try --split time"
    ):
        make_sessions(frame(rows), SessionSettings("user", split="leave-one-out"))


def test_the_message_tells_what_went_before():
    rows = [(u, f"{u}{k}", float(k)) for u in "uvwx" for k in range(3)] + [("y", "u0", 4.0)]
    with pytest.raises(DatasetError, match="\n  before: 11 dropped: item with fewer than 2 interactions"):
        make_sessions(frame(rows), SessionSettings(sessions="user", min_item_count=2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sessions": "week"}, "sessions is 'week', expected one of"),
        ({"prefixes": "some"}, "prefixes is 'some', expected one of"),
        ({"min_length": 1}, "min_length is 1, expected at least 2"),
        ({"longest": 1}, "longest is 1, expected at least 2"),
        ({"min_item_count": 0}, "min_item_count is 0, expected at least 1"),
        ({"seed": -1}, "seed is -1, expected at least 0"),
        ({"gap": 0}, "gap is 0, expected more than 0 seconds"),
        ({"gap": float("nan")}, "gap is nan, expected more than 0 seconds"),
        ({"test_share": 0}, "valid_share and test_share are 0.1 and 0, expected each more than 0"),
        ({"test_share": 0.9}, "both together less than 1"),
        ({"split": "leave-one-out", "longest": 3}, "longest is 3, and leave-one-out needs sessions of 4 items"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        SessionSettings(**{"sessions": "gap", **settings})


# ---------------------------------------------------------------- files


ROWS = [
    (f"u{user}", f"i{(user * step) % 4}", START + 86_400 * user + 60 * step, f"b{user}")
    for user in range(10)
    for step in range(1, 5)
]
ITEMS = {
    "item_id": ["i0", "i1", "i2", "i3", "never"],
    "title": ["zero", 'an "open quote', "", "three, and more", "x"],
    "price": ["1", "", "3", "4", "9"],
    "categories": ["top a", "top a", "top b", "", "top c"],
}


@pytest.fixture
def raw(tmp_path) -> Path:
    """raw.inter and raw.item."""
    write_inter(tmp_path / "raw.inter", ROWS)
    kinds = dict(zip(ITEMS, ("token", "token_seq", "float", "token_seq"), strict=True))
    write_table(tmp_path / "raw.item", {f"{name}:{kinds[name]}": values for name, values in ITEMS.items()})
    return tmp_path


def write_inter(path: Path, rows: list[tuple], names: str = "user_id item_id timestamp basket_id") -> Path:
    columns = [f"{name}:{'float' if name == 'timestamp' else 'token'}" for name in names.split()]
    write_table(path, dict(zip(columns, zip(*rows, strict=True), strict=True)))
    return path


def prepare(raw: Path, name: str = "shop", **changes):
    settings = SessionSettings(**{"sessions": "day", "min_item_count": 1, **changes.pop("settings", {})})
    arguments = {"interactions": raw / "raw.inter", "items": raw / "raw.item", "settings": settings, **changes}
    return prepare_sessions(raw / name, **arguments)


def test_a_folder_is_made_of_two_files(raw):
    report = prepare(raw)
    assert check_folder(raw / "shop") == [] and report.n_items_without_row == 0 and report.n_items == 4
    items = read_table(raw / "shop" / "shop.item")
    assert list(items) == ["item_id", "title", "price", "categories", "price_level", "category"]
    assert items["item_id"].tolist() == ["i0", "i1", "i2", "i3"] and items["title"].tolist() == ITEMS["title"][:4]
    assert items["price_level"].tolist() == ["1", "", "1", ""] and items["category"].tolist() == ["a", "a", "b", ""]
    manifest = Manifest.load(raw / "shop")
    assert manifest.raw_files == {name: sha256_of(raw / name) for name in ("raw.inter", "raw.item")}
    assert manifest.settings["made_by"] == "sessions" and manifest.settings["sessions"] == "day"
    assert "gap" not in manifest.settings and "seed" not in manifest.settings
    assert manifest.settings["counts"]["parts"] == report.parts and manifest.settings["counts"]["n_read"] == 40


def test_two_files_of_the_same_name_are_both_in_the_manifest(raw):
    (raw / "catalogue").mkdir()
    items = (raw / "raw.item").rename(raw / "catalogue" / "raw.inter")
    prepare(raw, items=items)
    hashes = {"raw.inter": sha256_of(raw / "raw.inter"), "items/raw.inter": sha256_of(items)}
    assert Manifest.load(raw / "shop").raw_files == hashes


def test_levels_made_later_are_those_made_with_the_sessions(raw):
    prepare(raw)
    before = [(raw / "shop" / file).read_bytes() for file in ("shop.item", "manifest.json")]
    add_price_levels(raw / "shop")
    assert [(raw / "shop" / file).read_bytes() for file in ("shop.item", "manifest.json")] == before


@pytest.mark.parametrize("separator", [",", "\t"])
def test_a_csv_gives_the_same_folder(raw, separator):
    prepare(raw)
    mapping = {"user_id": "who", "item_id": "sku", "timestamp": "when", "basket_id": "bag"}
    table = pd.DataFrame(ROWS, columns=list(mapping.values()))
    table.assign(more="x, y").to_csv(raw / "clicks.csv", sep=separator, index=False)
    quoting = {"quoting": 3} if separator == "\t" else {}
    pd.DataFrame(ITEMS).rename(columns=mapping).to_csv(raw / "things.csv", sep=separator, index=False, **quoting)
    (raw / "other").mkdir()
    columns = Columns(user="who", item="sku", time="when", basket="bag")
    files = {"interactions": raw / "clicks.csv", "items": raw / "things.csv"}
    prepare(raw, "other/shop", columns=columns, **files)
    for name in ("train.inter", "valid.inter", "test.inter", "item"):
        assert (raw / "other/shop" / f"shop.{name}").read_bytes() == (raw / "shop" / f"shop.{name}").read_bytes()


def test_F12_ids_are_kept_byte_for_byte(raw):
    """pandas reads the first five as missing or as numbers."""
    names = ["NA", "null", "nan", "00123", "1e5", "True", "../../etc/x", "é", "e\u0301", '"', "a,b", "B01", "b01"]
    rows = [(f"u{k}", name, START + 86_400 * k + step, "b") for k in range(5) for step, name in enumerate(names)]
    prepare(raw, "atomic", interactions=write_inter(raw / "odd.inter", rows), items=None)
    pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp", "b"]).to_csv(raw / "odd.csv", index=False)
    prepare(raw, "comma", interactions=raw / "odd.csv", items=None)
    for name in ("atomic", "comma"):
        last = read_table(raw / name / f"{name}.test.inter")
        assert [*last["item_id_list"][0].split(" "), last["item_id"][0]] == names


def test_milliseconds_are_read_when_they_are_announced(raw):
    prepare(raw)
    rows = [(user, item, time * 1000, basket) for user, item, time, basket in ROWS]
    write_inter(raw / "raw.inter", rows)
    with pytest.raises(
        DatasetError, match="raw.inter: the times look like ms, such as 1500777840000, not s; pass --time-u"
    ):
        prepare(raw, "late")
    prepare(raw, "ms", settings={"time_unit": "ms"})
    assert (raw / "ms/ms.train.inter").read_bytes() == (raw / "shop/shop.train.inter").read_bytes()
    write_inter(raw / "raw.inter", [*rows, ("u0", "i0", START, "b0")])
    with pytest.raises(
        DatasetError, match="different units: 1 look like s, 40 look like ms, the first in s on line 42"
    ):
        prepare(raw, "mixed")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            ("u", "", START, "b"),
            "line 42: its item_id is empty .1 such rows.: item_id '', timestamp '1500000000', user_id 'u'",
        ),
        (("u", "a b", START, "b"), "line 42: its item_id holds a space, tab or line break"),
        (("u", " ", START, "b"), "line 42: its item_id holds a space"),
        (("u", "[PAD]", START, "b"), "line 42: its item_id is RecBole's padding token"),
        (("", "i1", START, "b"), "line 42: its user_id is empty"),
        (("u", "i1", "", "b"), "line 42: its timestamp is no number"),
        (("u", "i1", "nan", "b"), "line 42: its timestamp is no number"),
        (("u", "i1", "2014-03-01", "b"), "line 42: its timestamp is no number .dates such as 2014-03-01 are read by"),
        (("u", "i1", -5.0, "b"), "line 42: its timestamp is negative"),
    ],
)
def test_F14_F15_F17_F22_rows_that_cannot_be_used_are_refused_or_dropped(raw, row, message):
    prepare(raw)
    write_inter(raw / "raw.inter", [*ROWS, row])
    with pytest.raises(DatasetError, match=message):
        prepare(raw, "refused")
    report = prepare(raw, "dropped", settings={"bad_rows": "drop"})
    assert list(report.dropped.values())[0] == 1 and report.n_read == 41 and not (raw / "refused").exists()
    assert (raw / "dropped/dropped.train.inter").read_bytes() == (raw / "shop/shop.train.inter").read_bytes()


def test_all_kinds_of_bad_rows_are_listed_at_once(raw):
    write_inter(raw / "raw.inter", [("u", "", START, "b"), ("", "i", START, "b"), ("u", "[PAD]", "", "b")])
    with pytest.raises(DatasetError) as error:
        prepare(raw)
    assert [line.split(":")[0] for line in str(error.value).split("\n")[1:4]] == [
        "  - line 2",
        "  - line 4",
        "  - line 3",
    ]
    assert str(error.value).endswith("drop them with --bad-rows drop")
    with pytest.raises(DatasetError, match="no interaction of 3 is left: all rows are bad"):
        prepare(raw, settings={"bad_rows": "drop"})


def test_F10_an_item_with_two_different_rows_is_refused_or_its_first_row_kept(raw):
    columns = {f"{name}:token": [*values, values[0], values[1]] for name, values in ITEMS.items()}
    write_table(raw / "raw.item", columns)
    prepare(raw, "same")
    columns["title:token"][-1] = "another"
    write_table(raw / "raw.item", columns)
    with pytest.raises(DatasetError, match="item 'i1' has different rows on lines 3 and 8 .1 such rows.; keep one row"):
        prepare(raw, "refused")
    report = prepare(raw, "first", settings={"bad_rows": "drop"})
    assert read_table(raw / "first/first.item")["title"].tolist() == ITEMS["title"][:4]
    assert "1 second rows of items were dropped" in report.remarks


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("user_id,item_id\nu,1\n", "no column timestamp; its columns are user_id, item_id\n  name it with --time"),
        ("item_id,timestamp\n1,2\n", "no column user_id; .*\n.*without users, group with --sessions basket"),
        ("user_id,item_id,timestamp\nu,1\n", "line 2: 2 fields, the header has 3; fields are separated by one comma"),
        ("user_id\titem_id\ttimestamp\nu\t1\n", "line 2: 2 fields, .* separated by one tab"),
        ("user_id,item_id,timestamp\n", "has a header but no rows"),
        ("user_id,item_id,timestamp,item_id\nu,1,2,3\n", "a column name occurs twice in"),
        ('user_id,item_id,timestamp\nu,"1,2\n', "line 2: no CSV"),
        ("user_id:token\titem_id:token\ttimestamp:float\nu\t1\n", "line 2: 2 fields, the header has 3"),
        ("user_id,item_id,timestamp\nu,\udcff,2\n", "not UTF-8; save the file as UTF-8"),
    ],
)
def test_F8_F9_F13_files_that_cannot_be_read_are_refused(tmp_path, content, message):
    (tmp_path / "raw.inter").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(DatasetError, match=message):
        prepare(tmp_path, items=None)
    with pytest.raises(DatasetError, match="cannot read .*nowhere.inter: No such file"):
        prepare(tmp_path, interactions=tmp_path / "nowhere.inter")


def test_a_table_of_other_items_is_refused(raw):
    write_table(raw / "raw.item", {"item_id:token": ["x"], "price:float": [1.0]})
    with pytest.raises(DatasetError, match="raw.item has none of the 4 items of the sessions; are these the same ids?"):
        prepare(raw)
    write_table(raw / "raw.item", {"item_id:token": ["i0"], "price:float": [1.0]})
    assert "remark: 3 of 4 items have no row in the table of items" in str(prepare(raw))


# ---------------------------------------------------------------- command line


def run(raw: Path, *options: str) -> int:
    files = ["--interactions", str(raw / "raw.inter"), "--name", "shop", "--out", str(raw)]
    return main(["sessions", *files, *options])


def test_the_command_makes_a_folder_and_reports(raw, capsys):
    assert run(raw, "--items", str(raw / "raw.item"), "--sessions", "basket", "--min-item-count", "2") == 0
    out = capsys.readouterr().out
    report = """shop: made
40 interactions read, 40 kept, 0 dropped; 4 items
train: 8 sessions, 32 interactions, 24 rows, 4 items
valid: 1 sessions, 4 interactions, 1 rows, 1 items
test: 1 sessions, 4 interactions, 1 rows, 4 items
cut points: validation from 1500691440 (2017-07-22 02:44:00 UTC), test from 1500777840 (2017-07-23 02:44:00 UTC)
price levels: 2 of 4 items, 1 of 100 levels occur; logistic, in 2 categories (last of 'categories')
  1 without: price empty
  1 without: no category
"""
    assert report in out and out.endswith("DATASET.md\n") and "# shop" in (raw / "shop/DATASET.md").read_text()
    assert main(["check", str(raw / "shop")]) == 0
    assert run(raw, "--sessions", "basket") == 3
    assert "shop is there already; replace it with --overwrite" in capsys.readouterr().err
    assert run(raw, "--sessions", "gap", "--gap", "30", "--min-length", "2", "--overwrite") == 3
    assert run(raw, "--sessions", "gap", "--gap", "60", "--overwrite") == 0 and not (raw / "shop/shop.item").exists()


def test_the_command_for_prices_replaces_levels(raw, capsys):
    assert run(raw, "--items", str(raw / "raw.item"), "--sessions", "day", "--price-levels", "0") == 0
    assert "price levels: none are asked for" in capsys.readouterr().out
    assert "price_level" not in read_table(raw / "shop/shop.item")
    options = ["--price-levels", "4", "--price-method", "linear", "--category-position", "first"]
    assert main(["prices", "--dataset", str(raw / "shop"), *options]) == 0
    assert "2 of 4 items, 2 of 4 levels occur; linear, in 1 category (first of" in capsys.readouterr().out
    assert read_table(raw / "shop/shop.item")["price_level"].tolist() == ["1", "", "4", ""]
    assert main(["prices", "--dataset", str(raw / "shop"), "--price-column", "cost"]) == 3
    assert "no column cost" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--sessions day --gap 60", "--gap belongs to --sessions gap; leave it out"),
        ("--sessions day --basket bag", "--basket belongs to --sessions basket; leave it out"),
        ("--sessions day --seed 1", "--seed belongs to --session-order random or --cold-share; leave it out"),
        (
            "--sessions day --split leave-one-out --test-share 0.2",
            "--test-share belongs to --split time without cut points; leave it out",
        ),
        (
            "--sessions day --valid-from 2017-01-01 --test-from 2017-02-01 --valid-share 0.2",
            "--valid-share belongs to --split time without cut points; leave it out",
        ),
        (
            "--sessions day --valid-from 2017-01-01",
            "valid_from is 2017-01-01 and test_from None; expected both or none",
        ),
        ("--sessions day --cold-share 0.5", "cold_share takes items out of training, and cold_items drops them"),
        ("--sessions day --price-method linear", "options of price levels need a table of items: --items FILE"),
        (
            "--sessions day --name ../shop",
            "--name is '../shop', expected the name of a folder without a path; see --out",
        ),
        ("--sessions day --name=", "--name is '', expected the name of a folder"),
        ("--sessions day --min-length 1", "min_length is 1, expected at least 2"),
    ],
)
def test_options_that_would_be_ignored_or_are_wrong_are_refused(raw, capsys, options, message):
    assert run(raw, *options.split()) == 2
    assert message in capsys.readouterr().err and not (raw / "shop").exists()


def test_a_catalogue_with_spaces_in_its_categories_gets_levels_by_category(raw, capsys):
    rows = [("i0", "$1,299.00", "Home Decor"), ("i1", "$12", "Home Decor"), ("i2", "5", "Garden"), ("i3", "Free", "")]
    text = "item_id,price,category\n" + "".join(f'{item},"{price}",{category}\n' for item, price, category in rows)
    (raw / "things.csv").write_text(text)
    assert run(raw, "--sessions", "day", "--min-item-count", "1", "--items", str(raw / "things.csv")) == 0
    items = read_table(raw / "shop/shop.item")
    assert items["category"].tolist() == ["Home Decor", "Home Decor", "Garden", ""]
    assert items["price_level"].tolist() == ["100", "1", "1", ""] and check_folder(raw / "shop") == []


def test_the_made_folder_trains_a_model(raw, built):
    prepare(raw)
    _, dataset, train, _, test, _ = built("Popularity", raw / "shop")
    assert dataset.item_num == 5 and len(train.dataset) == 24 and len(test.dataset) == 1
    assert np.array_equal(np.unique(train.dataset.inter_feat["item_length"].numpy()), [1, 2, 3])


# ---------------------------------------------------------------- cut points and cold items


def shop(number: int, **settings):
    loose = {"sessions": "day", "min_item_count": 1, "test_share": 0.3, "cold_items": "keep", **settings}
    return make_sessions(frame(clicks(number, n=800)), SessionSettings(**loose))


@pytest.mark.parametrize("seed", range(3))
def test_cut_points_of_a_report_make_the_same_sessions_again(seed):
    parts, report = shop(seed)
    again, second = shop(seed, valid_from=report.cuts.valid_from, test_from=report.cuts.test_from)
    assert again == parts and second.parts == report.parts and second.cuts == report.cuts


def test_sessions_are_split_at_the_moments_that_are_given():
    day = 86_400
    rows = [(user, item, START + day * number) for number, user in enumerate("abcdef") for item in "xyz"]
    cuts = {"valid_from": START + 2 * day, "test_from": "2017-07-18T02:40:00"}
    parts, report = make_sessions(
        frame(rows), SessionSettings(sessions="user", min_item_count=1, prefixes="none", **cuts)
    )
    assert [len(parts[name].targets) for name in SPLITS] == [2, 2, 2]
    assert report.cuts == (START + 2 * day, START + 4 * day)
    with pytest.raises(
        DatasetError, match=r"none of 6 sessions is left for valid, test: they end between 1500000000 and"
    ):
        settings = {"valid_from": "2030-01-01", "test_from": "2031-01-01"}
        make_sessions(frame(rows), SessionSettings(sessions="user", min_item_count=1, **settings))


@pytest.mark.parametrize("repeats", ["keep", "drop"])
@pytest.mark.parametrize("seed", range(3))
def test_items_taken_out_of_training_never_occur_there(seed, repeats):
    parts, report = shop(seed, cold_share=0.3, repeats=repeats)
    trained = parts["train"].different()
    asked = parts["valid"].different() | parts["test"].different()
    assert set(report.cold_items) == asked - trained and 0 < report.n_drawn <= len(report.cold_items)
    kept = sum(part["interactions"] for part in report.parts.values())
    assert kept + sum(report.dropped.values()) == report.n_read
    assert report.dropped["taken out of training by --cold-share"] > 0
    assert shop(seed, cold_share=0.3, repeats=repeats) == (parts, report)
    assert shop(seed, cold_share=0.3, repeats=repeats, seed=1)[1].cold_items != report.cold_items


def test_cold_items_that_are_kept_are_listed_in_the_folder(tmp_path):
    write_table(tmp_path / "raw.inter", {
        "user_id:token": [f"u{k // 3}" for k in range(90)],
        "item_id:token": [f"i{(k // 3) // 10}{k % 3}" for k in range(90)],
        "timestamp:float": [float(START + k) for k in range(90)],
    })  # fmt: skip
    settings = SessionSettings(sessions="user", min_item_count=1, cold_items="keep", valid_share=0.3, test_share=0.3)
    report = prepare_sessions(tmp_path / "s", interactions=tmp_path / "raw.inter", items=None, settings=settings)
    listed = (tmp_path / "s" / "cold_items.txt").read_text().split()
    assert listed == list(report.cold_items) and listed == ["i20", "i21", "i22"] and check_folder(tmp_path / "s") == []
    manifest = Manifest.load(tmp_path / "s")
    assert "cold_items.txt" in manifest.files and manifest.settings["counts"]["n_cold_items"] == len(listed)
    assert manifest.settings["cuts"] == report.cuts._asdict()
    assert f"cold items: {len(listed)} that training has not" in str(report)


def test_cut_points_and_cold_shares_need_a_split_by_time():
    with pytest.raises(
        SettingError, match="cut points and cold_share belong to split time, and split is 'leave-one-out'"
    ):
        SessionSettings(sessions="day", split="leave-one-out", cold_items="keep", cold_share=0.1)
