"""Graphs of sessions: the tensors that RecBole makes in loops."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from recbole.data.interaction import Interaction
from recbole.model.sequential_recommender import GCSAN, SRGNN, SASRec

from benchmarks import RECBOLE_FIELDS, Settings
from recbole_mm.session_graphs import session_graphs, with_vectorised_graphs


def sessions(n_rows: int, length: int, longest: int, n_items: int) -> torch.Tensor:
    n = torch.randint(1, longest + 1, (n_rows, 1))
    n[0] = longest
    return torch.randint(1, n_items + 1, (n_rows, length)) * (torch.arange(length) < n)


def test_the_example_of_srgnn_s_docstring():
    node, edges, items = session_graphs(torch.tensor([[1, 2, 3, 2, 4, 0]]))
    assert items.tolist() == [[0, 1, 2, 3, 4, 0]]
    assert node.tolist() == [[1, 2, 3, 2, 4, 0]]
    incoming, outgoing = edges[0, 1:5, 1:5], edges[0, 1:5, 7:11]
    torch.testing.assert_close(
        outgoing, torch.tensor([[0, 1, 0, 0], [0, 0, 0.5, 0.5], [0, 1, 0, 0], [0, 0, 0, 0]]), rtol=0, atol=0
    )
    torch.testing.assert_close(
        incoming, torch.tensor([[0, 0, 0, 0], [0.5, 0, 0.5, 0], [0, 1, 0, 0], [0, 1, 0, 0]]), rtol=0, atol=0
    )
    assert edges[0, 0].sum() == edges[0, 5].sum() == 0


@pytest.mark.parametrize("model", [SRGNN, GCSAN])
@pytest.mark.parametrize(
    ("length", "longest", "n_items"), [(12, 8, 4), (12, 12, 4), (50, 50, 60), (20, 5, 9), (3, 3, 1), (1, 1, 5)]
)
def test_tensors_and_types_are_those_of_recbole_s_loops(model, length, longest, n_items):
    item_seq, cpu = sessions(25, length, longest, n_items), SimpleNamespace(device="cpu")
    expected = model._get_slice(cpu, item_seq)
    found = with_vectorised_graphs(model)._get_slice(cpu, item_seq)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_losses_of_srgnn_stay_the_same_to_the_last_bit():
    config = Settings(RECBOLE_FIELDS, embedding_size=8, step=2, loss_type="CE", MAX_ITEM_LIST_LENGTH=12)
    data = SimpleNamespace(num=lambda field: 10)
    stock, ours = SRGNN(config, data), with_vectorised_graphs(SRGNN)(config, data)
    ours.load_state_dict(stock.state_dict())
    item_seq = sessions(20, 12, 9, 9)
    lengths = (item_seq > 0).sum(1)
    batch = Interaction({stock.ITEM_SEQ: item_seq, stock.ITEM_SEQ_LEN: lengths, stock.POS_ITEM_ID: lengths})
    for model in (stock, ours):
        model.calculate_loss(batch).backward()
    for theirs, mine in zip(stock.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=0)
    assert type(ours).__name__ == "SRGNN"


def test_other_models_stay_what_they_are():
    assert with_vectorised_graphs(SASRec) is SASRec
