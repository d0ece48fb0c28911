"""Floating-point operations of matrix products, as PyTorch counts them while a call runs.

Products in place and attention on a CPU are counted too, which PyTorch's counter leaves out. Products that a backward
pass computes again are counted where they are computed: the fraction of the machine's rate is that of the work done.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from math import prod
from types import SimpleNamespace

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop, sdpa_flop

aten = torch.ops.aten


def _added_product(added, a, b, *_, **__) -> int:
    """[..., n, k] times [..., k, m], added in place."""
    return 2 * prod(a) * b[-1]


def _attention(query, key, value, *_, **__) -> int:
    return sdpa_flop(query, key, value)


def _attention_backward(grad_out, query, key, value, *_, **__) -> int:
    return sdpa_backward_flop(grad_out, query, key, value)


def _vector_product(matrix, _vector, *_, **__) -> int:
    return 2 * prod(matrix)


MORE = {
    aten.addmm_: _added_product,
    aten.baddbmm_: _added_product,
    aten.addbmm: _added_product,
    aten.addbmm_: _added_product,
    aten.mv: _vector_product,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


@contextmanager
def counting():
    """``with counting() as counted: ...``; then ``counted.flop``."""
    counted = SimpleNamespace(flop=0)
    with FlopCounterMode(display=False, custom_mapping=MORE) as counter:
        yield counted
    counted.flop = counter.get_total_flops()


def flop_of(call: Callable[[], object]) -> int:
    """Operations of the matrix products of one call."""
    with counting() as counted:
        call()
    return counted.flop
