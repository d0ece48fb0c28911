"""A small shop as a prepared folder, with ids that careless readers change."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dataset_prep.formats.splits import histories
from dataset_prep.session_folder import Rows, write_session_folder
from recbole_mm.data.files import read_table, write_table
from recbole_mm.data.layout import write_feature

ITEMS = ["NA", "00123", 'say"hi', "null", "1e5", "b01", "B01", "é"]
USERS = {"u1": [0, 1, 2, 3, 0], "007": [4, 1, 5], "nan": [6, 7, 0, 4], "True": [2, 6]}


def write_shop(folder: Path) -> Path:
    """Plain interactions in a jumbled order, with times; text has several rows per item, two items have no picture."""
    rows = [
        (user, ITEMS[item], 1e9 + 100 * step + number)
        for number, (user, items) in enumerate(USERS.items())
        for step, item in enumerate(items)
    ]
    order = np.random.default_rng(3).permutation(len(rows)).tolist()
    users, items, times = zip(*(rows[row] for row in order), strict=True)
    write_table(
        folder / f"{folder.name}.inter",
        {"user_id:token": users, "item_id:token": items, "timestamp:float": times, "rating:float": [5.0] * len(rows)},
    )
    write_table(
        folder / f"{folder.name}.item",
        {
            "item_id:token": [*ITEMS, "unsold"],
            "title:token_seq": [f"thing {number}" for number in range(8)] + [""],
            "categories:token_seq": ["Old_toys All"] * 9,
        },
    )
    random = np.random.default_rng(1)
    counts = np.array([1, 2, 3, 1, 2, 1, 1, 1])
    text = random.normal(size=(counts.sum(), 6)).astype(np.float32)
    write_feature(folder, "text", tokens=ITEMS, rows=text, counts=counts, encoder="made", source="test")
    image = random.normal(size=(6, 4)).astype(np.float32)
    write_feature(folder, "image", tokens=ITEMS[::-1][:6], rows=image, encoder="made", source="test")
    return folder


def write_split_shop(folder: Path) -> Path:
    """The same split: training on every prefix, the last two items left out."""
    parts = {part: Rows([], [], []) for part in ("train", "valid", "test")}
    for user, numbers in USERS.items():
        items = [ITEMS[number] for number in numbers]
        n_train = len(items) - 2
        for end in range(1, len(items)):
            part = "train" if end < n_train else "valid" if end == n_train else "test"
            for column, value in zip(parts[part], (user, items[:end], items[end]), strict=True):
                column.append(value)
    write_session_folder(folder, parts, None, {}, settings={}, raw_files={})
    image = np.random.default_rng(2).normal(size=(8, 4)).astype(np.float32)
    write_feature(folder, "image", tokens=ITEMS, rows=image, encoder="made", source="test")
    return folder


def user_histories(folder: Path) -> dict[str, list[str]]:
    """Items of each user in the order of time, out of a plain folder."""
    frame = read_table(folder / f"{folder.name}.inter", needed=["user_id", "item_id", "timestamp"])
    items = frame["item_id"].tolist()
    found = histories(frame["user_id"].tolist(), frame["timestamp"].astype(float).tolist())
    return {user: [items[row] for row in rows] for user, rows in found.items()}


def part_rows(folder: Path, part: str) -> list[tuple[str, list[str], str]]:
    """Owner, prefix and target of each row of a part."""
    frame = read_table(folder / f"{folder.name}.{part}.inter", needed=["session_id", "item_id_list", "item_id"])
    lists = [text.split(" ") for text in frame["item_id_list"]]
    return list(zip(frame["session_id"], lists, frame["item_id"], strict=True))
