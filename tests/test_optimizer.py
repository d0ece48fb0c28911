"""Adam on the rows in use, and clipping of sparse gradients, against dense ones."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from recbole_mm.optimizer import LazyAdam, clip_gradients

STEPS = ([0, 2, 2], [1], [2, 4], [0, 1, 2, 3, 4])


def parameters():
    torch.manual_seed(0)
    return nn.Parameter(torch.randn(5, 3, dtype=torch.double)), nn.Parameter(torch.randn(4, dtype=torch.double))


def loss_of(table, dense, ids, *, sparse):
    return F.embedding(torch.tensor(ids), table, sparse=sparse).pow(3).sum() + dense.square().sum()


def test_rows_in_use_move_as_adam_says_and_others_rest():
    table, dense = parameters()
    expected, expected_dense = (parameter.detach().clone() for parameter in (table, dense))
    reference = torch.optim.Adam([nn.Parameter(expected_dense)], lr=0.1)
    (expected_dense,) = reference.param_groups[0]["params"]
    first, second = torch.zeros(5, 3).double(), torch.zeros(5, 3).double()
    optimizer = LazyAdam([table, dense], lr=0.1)
    for step, ids in enumerate(STEPS, start=1):
        optimizer.zero_grad()
        loss_of(table, dense, ids, sparse=True).backward()
        assert table.grad.is_sparse
        optimizer.step()
        reference.zero_grad()
        expected_dense.square().sum().backward()
        reference.step()
        for row in set(ids):  # literally
            for column in range(3):
                gradient = ids.count(row) * 3 * expected[row, column].item() ** 2
                first[row, column] = 0.9 * first[row, column] + 0.1 * gradient
                second[row, column] = 0.999 * second[row, column] + 0.001 * gradient**2
                mean = first[row, column].item() / (1 - 0.9**step)
                deviation = math.sqrt(second[row, column].item() / (1 - 0.999**step))
                expected[row, column] -= 0.1 * mean / (deviation + 1e-8)
        torch.testing.assert_close(table.detach(), expected)
        torch.testing.assert_close(dense.detach(), expected_dense.detach())


def test_with_all_rows_in_every_step_it_is_adam():
    (lazy, _), (plain, _) = parameters(), parameters()
    optimizers = LazyAdam([lazy], lr=0.1), torch.optim.Adam([plain], lr=0.1)
    for _ in range(4):
        for table, optimizer, sparse in ((lazy, optimizers[0], True), (plain, optimizers[1], False)):
            optimizer.zero_grad()
            loss_of(table, torch.zeros(1), range(5), sparse=sparse).backward()
            optimizer.step()
    torch.testing.assert_close(lazy, plain)


def test_its_state_is_saved_and_goes_on():
    ended = []
    for saved_after in (None, 2):
        table, dense = parameters()
        optimizer = LazyAdam([table, dense], lr=0.1)
        for number, ids in enumerate(STEPS):
            if number == saved_after:
                state = optimizer.state_dict()
                optimizer = LazyAdam([table, dense], lr=0.1)
                optimizer.load_state_dict(state)
            optimizer.zero_grad()
            loss_of(table, dense, ids, sparse=True).backward()
            optimizer.step()
        ended.append((table.detach(), dense.detach()))
    torch.testing.assert_close(*ended, rtol=0, atol=0)


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
def test_sparse_gradients_are_clipped_like_dense_ones(max_norm, norm_type):
    sides = parameters(), parameters()
    unused = nn.Parameter(torch.zeros(2))
    for (table, dense), sparse in zip(sides, (True, False), strict=True):
        loss_of(table, dense, [3, 1, 3], sparse=sparse).backward()
    norms = [
        clip_gradients([*sides[0], unused], max_norm=max_norm, norm_type=norm_type),
        nn.utils.clip_grad_norm_([*sides[1], unused], max_norm, norm_type),
    ]
    torch.testing.assert_close(*norms)
    torch.testing.assert_close(sides[0][0].grad.to_dense(), sides[1][0].grad)
    torch.testing.assert_close(sides[0][1].grad, sides[1][1].grad)
