"""Transitions against loops over the lines of the files, on every kind of folder."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, _known

from recbole_mm.data.files import write_table
from recbole_mm.quick_start import run


def training_sessions(folder: Path) -> list[list[str]]:
    """Of a folder that is not split: each user's items but the last two, which are for validation and test."""
    by_user: dict[str, list[str]] = {}
    for line in (folder / f"{folder.name}.inter").read_text().splitlines()[1:]:
        user, item, _ = line.split("\t")
        by_user.setdefault(user, []).append(item)
    return [items[:-2] for items in by_user.values()]


def write_sessions(folder: Path, *, every_prefix: bool, seed: int = 3) -> list[list[str]]:
    """A split folder with one row per session, or one per prefix in any order; returns the training sessions."""
    random = np.random.default_rng(seed)
    tokens = [f"i{number}" for number in range(12)]
    sessions = [random.choice(tokens, size=random.integers(2, 8)).tolist() for _ in range(30)]
    for part in ("train", "valid", "test"):
        rows = []
        for number, items in enumerate(sessions):
            for end in range(1, len(items)) if every_prefix else [len(items) - 1]:
                rows.append((f"{part}{number}", " ".join(items[:end]), items[end]))
        random.shuffle(rows)
        ids, prefixes, targets = zip(*rows, strict=True)
        columns = {"session_id:token": ids, "item_id_list:token_seq": prefixes, "item_id:token": targets}
        write_table(folder / f"{folder.name}.{part}.inter", columns)
    return sessions


def literal_ranks(sessions: list[list[str]], prefix: list[str], tokens: list[str]) -> list[str]:
    """Items, best first: summed counts of pairs, then occurrences."""
    pairs, occurrences = Counter(), Counter()
    for items in sessions:
        for a, item in enumerate(items):
            occurrences[item] += 1
            for later in items[a + 1 :]:
                pairs[item, later] += 1
    return [(sum(pairs[item, token] for item in prefix), occurrences[token]) for token in tokens]


def check(model, dataset, batch, sessions: list[list[str]]) -> None:
    tokens = [str(token) for token in dataset.id2token("item_id", np.arange(1, model.n_items))]
    scores = model.full_sort_predict(batch)[:, 1:]
    for row, (seq, length) in enumerate(zip(batch[model.ITEM_SEQ], batch[model.ITEM_SEQ_LEN], strict=True)):
        prefix = [str(token) for token in dataset.id2token("item_id", seq[:length].numpy())]
        expected = literal_ranks(sessions, prefix, tokens)
        # Equal where the literal pair is equal, greater where it is greater: the same ranking.
        order = sorted(set(expected))
        torch.testing.assert_close(
            torch.unique(scores[row], return_inverse=True)[1],
            torch.tensor([order.index(pair) for pair in expected]),
        )
        most = max(count for _, count in expected)
        values = torch.tensor([counted + count / (most + 1) for counted, count in expected], dtype=torch.double)
        torch.testing.assert_close(scores[row], values.log1p())


def test_scores_are_counts_of_pairs_then_popularity(built, planted):
    _, dataset, _, valid, _, model = built("Transitions", planted)
    check(model, dataset, next(iter(valid))[0], training_sessions(planted))


@pytest.mark.parametrize("every_prefix", [True, False])
def test_a_split_folder_counts_the_same_with_one_row_a_session_or_every_prefix(built, tmp_path, every_prefix):
    sessions = write_sessions(tmp_path / "dataset" / "cut", every_prefix=every_prefix)
    settings = {"topk": [5], "valid_metric": "Recall@5"}
    _, dataset, _, valid, _, model = built("Transitions", tmp_path / "dataset" / "cut", **settings)
    check(model, dataset, next(iter(valid))[0], sessions)


def test_the_ranking_stays_whatever_the_trained_number_is(built, planted):
    _, dataset, _, valid, _, model = built("Transitions", planted)
    batch = next(iter(valid))[0]
    before = model.full_sort_predict(batch)
    for number in (-20.0, 3.0):
        with torch.no_grad():
            model.log_scale.fill_(number)
        after = model.full_sort_predict(batch)
        torch.testing.assert_close(after.argsort(stable=True), before.argsort(stable=True))


def test_popularity_is_told_apart_beside_a_count_of_a_hundred_million(built, planted):
    _, _, _, valid, _, model = built("Transitions", planted)
    batch = next(iter(valid))[0]
    model.occurrences.copy_(torch.arange(model.n_items) * 1000)
    model.counts = lambda item_seq: torch.full((len(item_seq), model.n_items), 1e8, dtype=torch.double)
    assert (model.full_sort_predict(batch)[:, 1:].diff() > 0).all()


def test_a_run_is_repeated_and_resumed(planted):
    settings = _known("Transitions", {**TINY, "epochs": 1})
    one, other = (run("Transitions", "planted", settings=settings) for _ in range(2))
    assert one.test == other.test
    again = run(settings={"epochs": 2}, resume=one.checkpoint.replace(".pth", "-last.pth"))
    assert again.stages[-1]["epochs"] == 2 and again.test == one.test
