"""Cut points and the split of histories: against a slow literal version, and by laws."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from dataset_prep.cleaning import Ledger
from dataset_prep.events import EventBuilder, Events
from dataset_prep.protocols import (
    TimeSplit,
    check_cold_settings,
    cuts_of_folder,
    draw_cold,
    given_cuts,
    read_time,
    split_by_time,
)
from recbole_mm.data.cuts import Cuts
from recbole_mm.data.layout import SPLITS, Manifest
from recbole_mm.errors import DatasetError, SettingError

CUTS = Cuts(1060.0, 1080.0)


def events_of(rows: list[tuple[str, str, float]]) -> Events:
    builder = EventBuilder()
    for line, (user, item, time) in enumerate(rows, start=1):
        builder.add(user, item, time, line)
    return builder.build()


def histories(seed: int, n: int = 400) -> list[tuple[str, str, float]]:
    """Users of one interaction and of many; items that appear late; equal times; in no order."""
    made = random.Random(seed)
    rows = []
    for _ in range(n):
        time = 1000 + made.randrange(100)
        rows.append((f"u{min(made.choices(range(60), k=2))}", f"i{made.randrange(max(3, time - 970))}", float(time)))
    return rows


def split(rows: list[tuple[str, str, float]], cuts: Cuts = CUTS, **settings) -> tuple[TimeSplit, Ledger]:
    ledger = Ledger(len(rows))
    return split_by_time(events_of(rows), cuts, ledger, **settings), ledger


def rows_of(found: TimeSplit) -> list[tuple[str, str, list[str], str]]:
    """(part, user, prefix, target) of every row."""
    return [(name, *row) for name in SPLITS for row in zip(*found.parts[name], strict=True)]


# ---------------------------------------------------------------- the split


def literal(rows: list[tuple[str, str, float]], cuts: Cuts, longest: int, cold_items: str) -> list[tuple]:
    """One user and one interaction at a time."""
    of_user: dict[str, list[tuple[float, int, str]]] = {}
    for line, (user, item, time) in enumerate(rows):
        of_user.setdefault(user, []).append((time, line, item))
    for history in of_user.values():
        history.sort()
    trained = set()
    for history in of_user.values():
        early = [item for time, _, item in history if time < cuts.valid_from]
        trained |= set(early) if len(early) > 1 else set()
    found = []
    for user, history in of_user.items():
        if cold_items == "drop":
            history = [event for event in history if event[2] in trained]
        for place in range(1, len(history)):
            time, _, target = history[place]
            part = "train" if time < cuts.valid_from else "valid" if time < cuts.test_from else "test"
            found.append((part, user, [item for _, _, item in history[:place]][-longest:], target))
    return found


@pytest.mark.parametrize("longest", [1, 3, 50])
@pytest.mark.parametrize("cold_items", ["drop", "keep"])
@pytest.mark.parametrize("seed", range(4))
def test_rows_are_those_of_going_through_each_history(seed, cold_items, longest):
    rows = histories(seed)
    found, ledger = split(rows, longest=longest, cold_items=cold_items)
    key = lambda row: (SPLITS.index(row[0]), row[1], row[2], row[3])  # noqa: E731
    assert sorted(rows_of(found), key=key) == sorted(literal(rows, CUTS, longest, cold_items), key=key)
    assert ledger.n_read == found.events.n + sum(ledger.dropped.values())


@pytest.mark.parametrize("settings", [{}, {"cold_items": "keep"}, {"cold_items": "keep", "cold_share": 0.3}])
@pytest.mark.parametrize("seed", range(4))
def test_laws_of_the_split(seed, settings):
    twice = histories(seed)
    found, ledger = split(twice, **settings)
    time_of: dict[tuple[str, str], list[float]] = {}
    for user, item, time in twice:
        time_of.setdefault((user, item), []).append(time)
    for part, user, prefix, target in rows_of(found):
        assert prefix
        earliest = [min(time_of[user, item]) for item in (*prefix, target)]
        if part == "train":
            assert max(earliest) < CUTS.valid_from
        if part == "valid":
            assert max(earliest) < CUTS.test_from
    targets = Counter((user, target) for _, user, _, target in rows_of(found))
    assert all(n <= len(time_of[pair]) for pair, n in targets.items())  # each interaction in at most one row
    assert sum(part["interactions"] for part in found.counts.values()) == found.events.n
    assert found.events.n + sum(ledger.dropped.values()) == len(twice)
    n_users = len(set(found.events.user.tolist()))
    assert sum(part["rows"] for part in found.counts.values()) == found.events.n - n_users

    trained = found.parts["train"].different()
    asked = found.parts["valid"].different() | found.parts["test"].different()
    assert set(found.cold) == asked - trained and len(set(found.cold)) == len(found.cold)
    assert (found.cold == []) == (settings == {})
    if "cold_share" in settings:
        assert found.n_drawn > 0 and ledger.dropped["taken out of training by --cold-share"] > 0


def test_no_training_row_changes_when_the_future_does():
    rows = histories(1)
    early = [row for row in rows if row[2] < CUTS.valid_from]
    found, _ = split(rows)
    other, _ = split([*early, ("u0", "i0", 1065.0), ("u0", "i1", 1090.0)])
    assert sorted(map(str, rows_of(found)[: len(found.parts["train"].targets)])) == sorted(
        map(str, rows_of(other)[: len(other.parts["train"].targets)])
    )


def test_equal_times_keep_the_order_of_the_source():
    rows = [("u", name, time) for name, time in (("b", 1.0), ("a", 1.0), ("c", 1.0), ("b", 5.0), ("a", 9.0))]
    found, _ = split(rows, Cuts(5.0, 9.0))
    assert rows_of(found) == [
        ("train", "u", ["b"], "a"),
        ("train", "u", ["b", "a"], "c"),
        ("valid", "u", ["b", "a", "c"], "b"),
        ("test", "u", ["b", "a", "c", "b"], "a"),
    ]


def test_an_item_that_is_only_the_first_of_a_training_history_is_cold():
    """The history has no training row, because nothing comes after its first item before the cut."""
    rows = [("u", "a", 1.0), ("u", "b", 2.0), ("v", "lone", 1.0), ("v", "a", 6.0), ("v", "b", 9.0), ("u", "a", 6.0)]
    kept, _ = split(rows, Cuts(5.0, 8.0), cold_items="keep")
    assert kept.cold == ["lone"] and ("valid", "v", ["lone"], "a") in rows_of(kept)
    dropped, ledger = split(rows, Cuts(5.0, 8.0))
    assert "lone" not in dropped.parts["valid"].different() and ledger.dropped == {"item that no training row has": 1}


def test_F26_a_part_without_interactions_or_rows_is_refused_with_its_moments():
    rows = histories(0)
    with pytest.raises(
        DatasetError, match=r"no interaction is left for test: they lie between 1000 \(1970-01-01 00:16:40"
    ):
        split(rows, Cuts(1050.0, 5000.0))
    lonely = [("u", "a", 1.0), ("u", "b", 2.0), ("v", "a", 6.0), ("w", "b", 9.0), ("w", "a", 9.0)]
    with pytest.raises(DatasetError, match="no row is left for valid: none of its 0 interactions has an earlier one"):
        split(lonely, Cuts(5.0, 8.0))


# ---------------------------------------------------------------- cut points


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1467331200", 1467331200.0),
        (1467331200, 1467331200.0),
        ("1e9", 1e9),
        ("2016-07-01", 1467331200.0),
        ("2016-07-01T00:00:00Z", 1467331200.0),
        ("2016-07-01T02:00:00+02:00", 1467331200.0),
        ("2016-07-01 12:00:00", 1467374400.0),
    ],
)
def test_times_are_seconds_or_dates_in_utc(text, seconds, monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    assert read_time(text) == seconds


@pytest.mark.parametrize("text", ["", "yesterday", "2016-13-01", "nan", "inf", "01.07.2016"])
def test_other_times_are_refused(text):
    with pytest.raises(SettingError, match="is no time; expected unix seconds or a date such as 2016-07-01"):
        read_time(text)


def test_cut_points_come_in_order():
    assert given_cuts("2016-07-01", 1467331201) == (1467331200.0, 1467331201.0)
    with pytest.raises(SettingError, match="valid_from is 5 and test_from 5; expected the test to begin later"):
        given_cuts("5", "5")


def test_cut_points_are_found_in_another_folder(tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    Manifest(name="other", settings={"cuts": CUTS._asdict()}).save(folder)
    assert cuts_of_folder(folder) == CUTS
    Manifest(name="other", settings={}).save(folder)
    with pytest.raises(DatasetError, match="other has no cut points in its manifest; they come from --protocol time"):
        cuts_of_folder(folder)
    with pytest.raises(DatasetError, match="no dataset folder"):
        cuts_of_folder(tmp_path / "nowhere")


# ---------------------------------------------------------------- cold items


def test_the_draw_depends_on_names_and_the_seed_alone():
    names = [f"i{number}" for number in range(100)]
    drawn = draw_cold(names, share=0.3, seed=1)
    assert drawn.sum() == 30
    chosen = {name for name, taken in zip(names, drawn, strict=True) if taken}
    backwards = draw_cold(names[::-1], share=0.3, seed=1)
    assert {name for name, taken in zip(names[::-1], backwards, strict=True) if taken} == chosen
    more = draw_cold(names, share=0.5, seed=1)
    assert (more >= drawn).all() and (draw_cold(names, share=0.3, seed=2) != drawn).any()
    assert draw_cold([], share=0.3, seed=1).tolist() == [] and not draw_cold(names, share=0.0, seed=1).any()


@pytest.mark.parametrize(
    ("cold_items", "cold_share", "message"),
    [
        ("remove", 0.0, r"cold_items is 'remove', expected one of \['drop', 'keep'\]"),
        ("keep", 1.0, "cold_share is 1.0, expected at least 0 and less than 1"),
        ("drop", 0.2, "cold_share takes items out of training, and cold_items drops them; use cold_items keep"),
    ],
)
def test_wrong_settings_of_cold_items_are_refused(cold_items, cold_share, message):
    with pytest.raises(SettingError, match=message):
        check_cold_settings(cold_items, cold_share)
