"""Labels to rows of prefix and target, and back: every interaction counts once."""

from __future__ import annotations

from collections import Counter
from random import Random

from dataset_prep.formats.splits import histories, labels_of_rows, leave_one_out, rows_of_labels
from dataset_prep.session_folder import Rows


def parts_of(**rows: list[tuple[str, str, str]]) -> dict[str, Rows]:
    """Parts out of owner, prefix and target of each row, an item a letter."""
    parts = {}
    for part in ("train", "valid", "test"):
        mine = rows.get(part, [])
        parts[part] = Rows([o for o, _, _ in mine], [list(p) for _, p, _ in mine], [t for _, _, t in mine])
    return parts


def labelled(parts: dict[str, Rows]) -> dict[str, list[tuple[str, int]]]:
    """Item and label of each interaction, by owner."""
    owners, items, labels = labels_of_rows(parts)
    found: dict[str, list[tuple[str, int]]] = {owner: [] for owner in owners}
    for owner, item, label in zip(owners, items, labels, strict=True):
        found[owner].append((item, label))
    return found


def test_histories_go_by_time_and_then_by_row():
    assert histories(["u", "v", "u", "u"], [3, 1, 2, 2]) == {"u": [2, 3, 0], "v": [1]}
    assert histories(["u", "v", "u"]) == {"u": [0, 2], "v": [1]}


def test_the_last_is_for_testing_and_the_one_before_for_validation():
    assert leave_one_out({"u": [2, 0, 1], "v": [3, 4]}) == ([1, 2, 0, 0, 0], 1)


def test_repeats_in_a_prefix_are_interactions_of_their_own():
    assert labelled(parts_of(test=[("s", "aab", "a")])) == {"s": [("a", 0), ("a", 0), ("b", 0), ("a", 2)]}


def test_longer_prefixes_of_a_session_add_only_their_targets():
    expected = {"s": [("a", 0), ("b", 0), ("a", 0), ("c", 1), ("d", 2)]}
    forwards = [("s", "a", "b"), ("s", "ab", "a")]
    for train in (forwards, forwards[::-1]):
        parts = parts_of(train=train, valid=[("s", "aba", "c")], test=[("s", "abac", "d")])
        assert labelled(parts) == expected


def test_prefixes_cut_to_a_window_keep_the_order():
    items = "abcdefgh"
    rows = [("s", items[max(0, end - 3) : end], items[end]) for end in range(1, 8)]
    for train in (rows, rows[::-1]):
        assert labelled(parts_of(train=train)) == {"s": [(item, 0) for item in items]}


def test_labels_become_rows_and_rows_the_same_labels():
    random = Random(7)
    owners = [random.choice("uvwxyz") for _ in range(60)]
    items = [random.choice("abcdefg") for _ in range(60)]
    labels = [random.choice([0, 0, 0, 1, 2]) for _ in range(60)]
    rows_of = histories(owners)
    parts, n_cold = rows_of_labels(owners, items, labels, rows_of)
    assert n_cold == 0
    back = Counter(zip(*labels_of_rows(parts), strict=True))
    assert back == Counter(zip(owners, items, labels, strict=True))
    for label, part in ((1, "valid"), (2, "test")):
        for owner, prefix, target in zip(*parts[part], strict=True):
            before = [items[row] for wanted in range(label) for row in rows_of[owner] if labels[row] == wanted]
            assert list(prefix) == before
            assert (target, label) in [(items[row], labels[row]) for row in rows_of[owner]]
