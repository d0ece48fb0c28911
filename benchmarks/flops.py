"""Floating-point operations of matrix products, as PyTorch counts them while a call runs.

Products in place and attention on a CPU are counted too, which PyTorch's counter leaves out. Products that a backward
pass computes again are counted where they are computed: the fraction of the machine's rate is that of the work done.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

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


def flop_of(call: Callable[[], object]) -> int:
    """Operations of the matrix products of one call, on one thread: the counter does not see what others do."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with FlopCounterMode(display=False, custom_mapping=MORE) as counter:
            call()
    finally:
        torch.set_num_threads(n_threads)
    return counter.get_total_flops()
