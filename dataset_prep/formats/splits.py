"""From interactions that carry a label to rows of prefix and target, and back.

Labels are 0 for training, 1 for validation and 2 for test.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np

from dataset_prep.session_folder import Prefixes, Rows
from recbole_mm.data.layout import SPLITS


def histories(owners: Sequence[Hashable], times: Sequence[float] | None = None) -> dict[Hashable, list[int]]:
    """Rows of each owner, by time and then by row; owners in the order of their appearance."""
    order = range(len(owners)) if times is None else np.argsort(np.asarray(times), kind="stable").tolist()
    found: dict[Hashable, list[int]] = {owner: [] for owner in owners}
    for row in order:
        found[owners[row]].append(row)
    return found


def leave_one_out(rows_of: dict[Hashable, list[int]]) -> tuple[list[int], int]:
    """A label for each row: of three or more of an owner, the last is 2 and the one before it 1.

    Returns:
        The labels, and how many owners have fewer than three rows: theirs are all 0.
    """
    labels = [0] * sum(map(len, rows_of.values()))
    n_short = 0
    for rows in rows_of.values():
        if len(rows) < 3:
            n_short += 1
            continue
        labels[rows[-2]], labels[rows[-1]] = 1, 2
    return labels, n_short


def rows_of_labels(
    owners: Sequence[str], items: Sequence[str], labels: Sequence[int], rows_of: dict[str, list[int]]
) -> tuple[dict[str, Rows], int]:
    """Rows of each part. What comes before a target is what a model may have learned from.

    Training: each item of an owner, after the earlier training ones. Validation: each item, after all training ones of
    its owner. Test: each item, after all training and validation ones.

    Returns:
        The parts, and how many validation and test interactions were left out since their owner has nothing before.
    """
    tokens = list(dict.fromkeys(items))
    place = {token: number for number, token in enumerate(tokens)}
    sorted_items: list[int] = []  # of each owner, those for training first
    columns: dict[str, tuple[list[str], list[int], list[int], list[str]]] = {part: ([], [], [], []) for part in SPLITS}
    n_cold = 0

    def add(part: str, owner: str, start: int, end: int, target: str) -> None:
        for column, value in zip(columns[part], (owner, start, end, target), strict=True):
            column.append(value)

    for owner, rows in rows_of.items():
        start = len(sorted_items)
        train, valid, test = ([items[row] for row in rows if labels[row] == label] for label in range(3))
        sorted_items += [place[item] for item in (*train, *valid)]
        for position, target in enumerate(train[1:], start=1):
            add("train", owner, start, start + position, target)
        if not train:  # a model that never saw the owner cannot be asked
            n_cold += len(valid) + len(test)
            continue
        for target in valid:
            add("valid", owner, start, start + len(train), target)
        for target in test:
            add("test", owner, start, start + len(train) + len(valid), target)
    everything = np.array(sorted_items, dtype=np.int64)
    parts = {}
    for part, (owners_here, starts, ends, targets) in columns.items():
        bounds = (np.array(values, dtype=np.int64) for values in (starts, ends))
        parts[part] = Rows(owners_here, Prefixes(tokens, everything, *bounds), targets)
    return parts, n_cold


def labels_of_rows(parts: dict[str, Rows]) -> tuple[list[str], list[str], list[int]]:
    """Interactions with their labels out of rows of each part: owner, item and label of each.

    A training row is followed through its session, from the shortest prefix to the longest, so that each interaction
    counts once. Items in the prefixes of validation and test that no earlier row has are training interactions.
    """
    owners: list[str] = []
    items: list[str] = []
    labels: list[int] = []
    had: dict[str, Counter[str]] = {}

    def add(owner: str, item: str, label: int) -> None:
        owners.append(owner)
        items.append(item)
        labels.append(label)
        had[owner][item] += 1

    for label, part in enumerate(SPLITS):
        rows = parts[part]
        for owner, numbers in histories(rows.session_ids).items():
            had.setdefault(owner, Counter())
            if len(rows.prefixes[numbers[0]]) > len(rows.prefixes[numbers[-1]]):  # UniSRec has the longest first
                numbers = numbers[::-1]
            for number in sorted(numbers, key=lambda number: len(rows.prefixes[number])):
                so_far: Counter[str] = Counter()
                for item in rows.prefixes[number]:
                    so_far[item] += 1
                    if so_far[item] > had[owner][item]:
                        add(owner, item, 0)
                add(owner, rows.targets[number], label)
    return owners, items, labels
