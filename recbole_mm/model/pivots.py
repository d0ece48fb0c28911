"""The hierarchical pivot transformer over all items, with a backward pass of its own.

text sequences   --> layer --> layer'' --> ...        each layer sees the pivots and one modality's sequences;
                   /  pivots  \\ /                      pivots carry what they gathered to the next modality
image sequences  ----> layer' ---------> ...

Source: MMSBR (arXiv 2309.17037), hierarchical pivot transformer. The tower runs over every item in every training step,
and is most of a step's cost. Against plain autograd of the same function:

* items go through all layers slice by slice, small enough to stay in the cache;
* what backward needs is kept in buffers that are used again in the next step, since fresh memory costs page faults;
* of a layer, its input, attention weights and inputs of the norms are kept; queries, keys, values, what the heads
  gathered and the inside of the feed-forward part are computed again, bit for bit;
* queries, keys and values come from one product; the last layer of each modality computes the pivots' rows alone,
  because nothing reads the others;
* on a CPU, slices are shared out among threads, instead of each small product;
* the softmax runs along an axis that is not the last one, where it is vectorised over the matrices.

Cost: with T = K + F tokens, 12 D^2 T multiply-adds per item and layer, three and a half times that with
the backward pass. Memory: about 4 N T D numbers per layer between forward and backward; a caller who has not got it
calls this on parts of the items, each under `torch.utils.checkpoint`.

Shapes: N items, n items of a slice, K pivots, F sequence vectors per modality, T = K + F, D width, H heads, d = D / H.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from recbole_mm.model.workers import n_workers, share_out

SLICE = 256  # items that go through all layers together
aten = torch.ops.aten


class PivotTransformer(nn.Module):
    """Pivots that gather from the modalities' sequences in turn.

    In each round, and for each modality in turn: Z = [p; x], O = layer(Z), p <- (p + O_pivots) / 2, x <- x + O_rest.
    A layer is a post-norm Transformer layer: Z1 = LN(Z + Dropout(MHA(Z))), O = LN(Z1 + Dropout(FFN(Z1))), with biased
    query, key and value maps, an unbiased output map, a ReLU, and no positions. Each round and modality has its own.

    Args:
        width: D.
        n_streams: modalities, one or more.
        n_rounds: how often every modality is visited.
        n_heads: H.
        inner_size: width inside the feed-forward part.
        dropout: probability of dropping a value of either sub-layer's output, below 1; a multiple of 1/65536 is taken.
        eps: added to the variance in LayerNorm.
        softmax_over: "keys", an average over what is attended to; or "queries", as in the released code, where the
            weights of one query do not sum to 1.
        shared_norm: both sub-layers of a layer share one LayerNorm, as in the released code.
        slice_size: items that go through all layers together.

    Raises:
        ValueError: if ``n_heads`` does not divide ``width``, for an unknown ``softmax_over``, or a ``dropout`` outside
            of [0, 1).
    """

    def __init__(
        self,
        *,
        width: int,
        n_streams: int,
        n_rounds: int,
        n_heads: int,
        inner_size: int,
        dropout: float = 0.0,
        eps: float = 1e-5,
        softmax_over: str = "keys",
        shared_norm: bool = False,
        slice_size: int = SLICE,
    ) -> None:
        super().__init__()
        if width % n_heads:
            raise ValueError(f"n_heads ({n_heads}) must divide width ({width})")
        if softmax_over not in ("keys", "queries"):
            raise ValueError(f"softmax_over is {softmax_over!r}, expected keys or queries")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}, expected at least 0 and less than 1")
        self.n_streams, self.n_rounds, self.n_heads = n_streams, n_rounds, n_heads
        self.dropout, self.eps, self.softmax_over, self.slice_size = dropout, eps, softmax_over, slice_size
        n_layers, n_norms = n_streams * n_rounds, 1 if shared_norm else 2
        # All layers' weights side by side: layer l is visited l-th, rounds outside, modalities inside.
        self.qkv_weight = nn.Parameter(torch.empty(n_layers, 3 * width, width))
        self.qkv_bias = nn.Parameter(torch.zeros(n_layers, 3 * width))
        self.out_weight = nn.Parameter(torch.empty(n_layers, width, width))
        self.inner_weight = nn.Parameter(torch.empty(n_layers, inner_size, width))
        self.inner_bias = nn.Parameter(torch.zeros(n_layers, inner_size))
        self.outer_weight = nn.Parameter(torch.empty(n_layers, width, inner_size))
        self.outer_bias = nn.Parameter(torch.zeros(n_layers, width))
        self.norm_weight = nn.Parameter(torch.ones(n_layers, n_norms, width))
        self.norm_bias = nn.Parameter(torch.zeros(n_layers, n_norms, width))
        for maps in (self.qkv_weight, self.out_weight, self.inner_weight, self.outer_weight):
            for layer in maps:
                nn.init.xavier_uniform_(layer)
        self._pool = Pool()

    def forward(self, pivots: Tensor, streams: Sequence[Tensor]) -> Tensor:
        """
        One forward pass serves one backward pass, ``retain_graph`` or not.

        Args:
            pivots: [N, K, D], or [K, D] for all items alike.
            streams: one [N, F, D] per modality, in the order of their turns.

        Returns:
            [N, K, D], the pivots after the last round, in the weights' type, autocast or not.

        Raises:
            ValueError: for another number of modalities, or numbers of items that differ.
        """
        if len(streams) != self.n_streams:
            raise ValueError(f"got {len(streams)} streams, expected n_streams, {self.n_streams}")
        n_items = {len(tensor) for tensor in (*streams, pivots) if tensor.dim() == 3}
        if len(n_items) != 1:
            raise ValueError(f"streams and pivots have {sorted(n_items)} items, expected the same number")
        self._pool.prepare(*n_items)
        plan = Plan(
            n_heads=self.n_heads,
            eps=self.eps,
            n_dropped=min(round(self.dropout * 65536), 65535) if self.training else 0,
            softmax_over=self.softmax_over,
            slice_size=self.slice_size,
            n_streams=self.n_streams,
            keep=torch.is_grad_enabled(),
            pool=self._pool,
        )
        dtype = self.qkv_weight.dtype  # autocast may have changed the inputs'; products with out= it leaves alone
        return _Tower.apply(plan, pivots.to(dtype), *(x.to(dtype) for x in streams), *self._weights())

    def _weights(self) -> tuple[Tensor, ...]:
        return (
            self.qkv_weight, self.qkv_bias, self.out_weight, self.inner_weight, self.inner_bias, self.outer_weight,
            self.outer_bias, self.norm_weight, self.norm_bias,
        )  # fmt: skip

    def _apply(self, *args, **kwargs):  # .to(device), .double() and the like
        self._pool = Pool()
        return super()._apply(*args, **kwargs)


class Pool:
    """Buffers to use again, as long as the number of items stays the same; a copy or a pickle starts empty."""

    def __init__(self) -> None:
        self._free: dict[tuple, list[Tensor]] = defaultdict(list)
        self._n_items = 0

    def __reduce__(self):
        return Pool, ()

    def prepare(self, n_items: int) -> None:
        if n_items != self._n_items:
            self._free.clear()
        self._n_items = n_items

    def take(self, like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or like.dtype
        try:
            return self._free[(shape, dtype, like.device)].pop()
        except IndexError:  # not asked for beforehand, since another thread may be quicker
            with torch.inference_mode(False):  # what inference mode makes could not be written to outside of it
                return torch.empty(shape, dtype=dtype, device=like.device)

    def give(self, *tensors: Tensor | None) -> None:
        for tensor in tensors:
            if tensor is not None:
                self._free[(tuple(tensor.shape), tensor.dtype, tensor.device)].append(tensor)


class Plan(NamedTuple):
    n_heads: int
    eps: float
    n_dropped: int  # of 65536 values, as in `layers.Dropout`: 16 random bits for each
    softmax_over: str
    slice_size: int
    n_streams: int
    keep: bool  # for a backward pass
    pool: Pool


class Layer(NamedTuple):
    """Weights of one layer, or their gradients."""

    qkv_weight: Tensor  # [3D, D]
    qkv_bias: Tensor  # [3D]
    out_weight: Tensor  # [D, D]
    inner_weight: Tensor  # [I, D]
    inner_bias: Tensor  # [I]
    outer_weight: Tensor  # [D, I]
    outer_bias: Tensor  # [D]
    norm_weight: Tensor  # [1 or 2, D]
    norm_bias: Tensor  # [1 or 2, D]


class Kept(NamedTuple):
    """What a layer's backward pass needs, of one slice. n_out is T, or K in the last layer of a modality."""

    z: Tensor  # [n, T, D], input
    weights: Tensor  # attention, [n H, T, n_out] or [n H, T, T], see `_attention`
    before_1: Tensor  # [n n_out, D], input of the first norm
    stats_1: Tensor  # [2, n n_out, 1], mean and inverse deviation
    before_2: Tensor  # [n n_out, D]
    stats_2: Tensor  # [2, n n_out, 1]
    remain: tuple[Tensor | None, Tensor | None]  # [n n_out, D], 1 where dropout left a value of either sub-layer, or 0


class _Tower(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan: Plan, pivots: Tensor, *tensors: Tensor) -> Tensor:
        streams, weights = tensors[: plan.n_streams], tensors[plan.n_streams :]
        layers = [Layer(*parts) for parts in zip(*weights, strict=True)]
        parts = _parts(plan, len(streams[0]))
        result = pivots.new_empty(len(streams[0]), *pivots.shape[-2:])
        kept: list = [None] * len(parts)
        # Drawn per slice, so that the number of threads does not change what is dropped.
        seeds = torch.randint(2**62, (len(parts),)).tolist() if plan.n_dropped else []

        def work(number: int, worker: int) -> None:
            generator = torch.Generator(result.device).manual_seed(seeds[number]) if seeds else None
            kept[number] = _slice_forward(plan, layers, pivots, streams, parts[number], result, generator)

        share_out(work, len(parts), n_workers=n_workers(result.device, len(parts)))
        ctx.plan, ctx.kept = plan, kept
        ctx.save_for_backward(pivots, *tensors)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        plan = ctx.plan
        pivots, *tensors = ctx.saved_tensors
        streams, weights = tensors[: plan.n_streams], tensors[plan.n_streams :]
        layers = [Layer(*parts) for parts in zip(*weights, strict=True)]
        parts, grad = _parts(plan, len(grad)), grad.contiguous()
        if ctx.kept is None:
            raise RuntimeError("backward through the pivot transformer a second time; run forward again")
        kept, ctx.kept = ctx.kept, None
        grad_streams = [torch.empty_like(stream) for stream in streams]
        workers = n_workers(grad.device, len(parts))
        # What slices add up, each worker adds up for itself.
        gradients = [[torch.zeros_like(weight) for weight in weights] for _ in range(workers)]
        layer_gradients = [[Layer(*of_layer) for of_layer in zip(*own, strict=True)] for own in gradients]
        own_pivots = [torch.zeros_like(pivots) for _ in range(workers if pivots.dim() == 2 else 1)]

        def work(number: int, worker: int) -> None:
            grad_pivots = own_pivots[worker if pivots.dim() == 2 else 0]
            own, part = layer_gradients[worker], parts[number]
            _slice_backward(plan, layers, own, kept[number], grad, part, grad_pivots, grad_streams)

        share_out(work, len(parts), n_workers=workers)
        return None, sum(own_pivots), *grad_streams, *(sum(of_workers) for of_workers in zip(*gradients, strict=True))


def _parts(plan: Plan, n_items: int) -> list[slice]:
    starts = range(0, n_items, plan.slice_size)
    return [slice(start, min(start + plan.slice_size, n_items)) for start in starts]


def _slice_forward(
    plan: Plan,
    layers: Sequence[Layer],
    pivots: Tensor,
    streams: Sequence[Tensor],
    part: slice,
    result: Tensor,
    generator: torch.Generator | None,
) -> list[Kept]:
    """All layers for the items of one slice; the final pivots go to ``result[part]``."""
    n, n_streams = part.stop - part.start, len(streams)
    n_pivots = pivots.shape[-2]
    p = pivots if pivots.dim() == 2 else pivots[part]  # [K, D] or [n, K, D]
    x = [stream[part] for stream in streams]  # [n, F, D] each
    all_kept = []
    for number, layer in enumerate(layers):
        stream = number % n_streams
        last = number >= len(layers) - n_streams
        n_tokens = n_pivots + x[stream].shape[1]
        z = plan.pool.take(x[stream], n, n_tokens, x[stream].shape[2])  # [n, T, D]
        z[:, :n_pivots] = p
        z[:, n_pivots:] = x[stream]
        n_out = n_pivots if last else n_tokens
        kept, out = _layer_forward(plan, layer, z, n_out, generator)  # out [n, n_out, D]
        p = (out[:, :n_pivots] + z[:, :n_pivots]).mul_(0.5)  # [n, K, D]
        if not last:
            x[stream] = out[:, n_pivots:] + z[:, n_pivots:]  # [n, F, D]
        if plan.keep:
            all_kept.append(kept)
        else:
            _give(plan.pool, kept)
    result[part] = p
    return all_kept


def _give(pool: Pool, kept: Kept) -> None:
    """What was taken, and no more, or the pool would grow: norms make their own results."""
    pool.give(kept.z, kept.weights, kept.before_1, kept.stats_1, kept.before_2, kept.stats_2, *kept.remain)


def _layer_forward(
    plan: Plan, layer: Layer, z: Tensor, n_out: int, generator: torch.Generator | None
) -> tuple[Kept, Tensor]:
    n, n_tokens, width = z.shape
    pool = plan.pool
    qkv = _query_key_value(plan, layer, z)
    q, k, v = qkv.flatten(1, 2)
    weights = _attention(plan, q, k, n_out)
    context = _context(plan, weights, v, n_out)
    pool.give(qkv)

    rows = z if n_out == n_tokens else z[:, :n_out]
    before_1, remain_1 = _residual(
        plan, rows.reshape(-1, width), None, context, layer.out_weight, generator
    )  # [n n_out, D]
    pool.give(context)
    z1, stats_1, hidden = _hidden(plan, layer, before_1)
    before_2, remain_2 = _residual(plan, z1, layer.outer_bias, hidden, layer.outer_weight, generator)
    pool.give(hidden)
    out, *stats_2 = aten.native_layer_norm(before_2, [width], layer.norm_weight[-1], layer.norm_bias[-1], plan.eps)
    # Copied into buffers: small tensors that live long, between large ones that do not, would keep memory in pieces.
    kept_stats = [
        torch.stack(stats, out=pool.take(z, 2, *stats[0].shape)) if plan.keep else None for stats in (stats_1, stats_2)
    ]
    kept = Kept(z, weights, before_1, kept_stats[0], before_2, kept_stats[1], (remain_1, remain_2))
    return kept, out.view(n, n_out, width)


def _hidden(plan: Plan, layer: Layer, before: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    """First norm and the inside of the feed-forward part, [n n_out, D] and [n n_out, I].

    Not kept but computed again for the backward pass: a product in the cache costs no more than the way to the memory
    and back, and the inside of the feed-forward part is the largest of all tensors.
    """
    z1, *stats = aten.native_layer_norm(
        before, [before.shape[1]], layer.norm_weight[0], layer.norm_bias[0], plan.eps
    )  # [n n_out, D]
    hidden = plan.pool.take(before, len(before), len(layer.inner_bias))
    torch.mm(z1, layer.inner_weight.T, out=hidden)
    return z1, stats, hidden.add_(layer.inner_bias).relu_()


def _query_key_value(plan: Plan, layer: Layer, z: Tensor) -> Tensor:
    """[n, T, D] -> [3, n, H, T, d]; computed again for the backward pass, as `_hidden` is."""
    (n, n_tokens, width), n_heads, pool = z.shape, plan.n_heads, plan.pool
    d = width // n_heads
    projected = pool.take(z, n * n_tokens, 3 * width)
    torch.mm(z.view(-1, width), layer.qkv_weight.T, out=projected)
    qkv = pool.take(z, 3, n, n_heads, n_tokens, d)
    bias = layer.qkv_bias.view(3, 1, n_heads, 1, d)
    torch.add(projected.view(n, n_tokens, 3, n_heads, d).permute(2, 0, 3, 1, 4), bias, out=qkv)
    pool.give(projected)
    return qkv


def _context(plan: Plan, weights: Tensor, v: Tensor, n_out: int) -> Tensor:
    """What the heads gathered, side by side: [n H, T, d] -> [n n_out, D]; computed again for the backward pass, too."""
    n_heads, d = plan.n_heads, v.shape[2]
    n = len(v) // n_heads
    context = plan.pool.take(v, n * n_out, n_heads * d)
    per_head = plan.pool.take(v, len(v), n_out, d)
    torch.bmm(_by_query(plan, weights, n_out), v, out=per_head)
    context.view(n, n_out, n_heads, d).copy_(per_head.view(n, n_heads, n_out, d).transpose(1, 2))
    plan.pool.give(per_head)
    return context


def _attention(plan: Plan, q: Tensor, k: Tensor, n_out: int) -> Tensor:
    """[n H, key, query] with a softmax over keys, or [n H, query, key] with one over queries: the softmax is over axis
    1, which is far quicker than the short last axis."""
    first, second = (k, q[:, :n_out]) if plan.softmax_over == "keys" else (q, k)
    logits = plan.pool.take(q, len(q), first.shape[1], second.shape[1])
    torch.baddbmm(logits, first, second.transpose(1, 2), beta=0, alpha=1 / math.sqrt(q.shape[2]), out=logits)
    weights = plan.pool.take(q, *logits.shape)
    torch.softmax(logits, 1, out=weights)
    plan.pool.give(logits)
    return weights


def _by_query(plan: Plan, weights: Tensor, n_out: int) -> Tensor:
    """[n H, n_out, key]."""
    return weights.transpose(1, 2) if plan.softmax_over == "keys" else weights[:, :n_out]


def _residual(
    plan: Plan, base: Tensor, bias: Tensor | None, x: Tensor, weight: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Tensor | None]:
    """base + Dropout(x weight^T + bias), and what dropout left."""
    result = plan.pool.take(base, *base.shape)
    if not plan.n_dropped:
        torch.addmm(base, x, weight.T, out=result)
        if bias is not None:
            result += bias
        return result, None
    if bias is None:
        torch.mm(x, weight.T, out=result)
    else:
        torch.addmm(bias, x, weight.T, out=result)
    remain = plan.pool.take(base, *base.shape, dtype=torch.uint8)
    bits = torch.empty((remain.numel() + 3) // 4, dtype=torch.int64, device=remain.device)
    bits.random_(-(2**63), None, generator=generator)
    torch.ge(bits.view(torch.int16)[: remain.numel()].view(remain.shape), plan.n_dropped - 32768, out=remain)
    # Numbers, not bool: filling by a mask takes many times as long.
    torch.add(base, result.mul_(remain), alpha=65536 / (65536 - plan.n_dropped), out=result)
    return result, remain


def _slice_backward(
    plan: Plan,
    layers: Sequence[Layer],
    gradients: Sequence[Layer],
    all_kept: Sequence[Kept],
    grad: Tensor,
    part: slice,
    grad_pivots: Tensor,
    grad_streams: Sequence[Tensor],
) -> None:
    n_streams, n_pivots = len(grad_streams), grad.shape[1]
    grad_p = grad[part]  # [n, K, D]
    grad_x: list[Tensor | None] = [None] * n_streams
    for number in reversed(range(len(layers))):
        stream, kept = number % n_streams, all_kept[number]
        n, n_tokens, width = kept.z.shape
        n_out = len(kept.before_1) // n
        grad_out = plan.pool.take(grad, n, n_out, width)
        torch.mul(grad_p, 0.5, out=grad_out[:, :n_pivots])
        if n_out == n_tokens:
            grad_out[:, n_pivots:] = grad_x[stream]
        grad_z = _layer_backward(plan, layers[number], gradients[number], kept, grad_out.view(-1, width), n_out)
        grad_p = torch.add(grad_z[:, :n_pivots], grad_p, alpha=0.5)  # [n, K, D]
        if n_out == n_tokens:
            grad_x[stream] = grad_z[:, n_pivots:] + grad_x[stream]
        else:
            grad_x[stream] = grad_z[:, n_pivots:].clone()
        plan.pool.give(grad_z, grad_out)
        _give(plan.pool, kept)
    for whole, piece in zip(grad_streams, grad_x, strict=True):
        whole[part] = piece
    if grad_pivots.dim() == 2:
        grad_pivots += grad_p.sum(0)
    else:
        grad_pivots[part] = grad_p


def _layer_backward(plan: Plan, layer: Layer, gradient: Layer, kept: Kept, grad_out: Tensor, n_out: int) -> Tensor:
    """Gradient of a layer's input, [n, T, D]; those of its weights are added to ``gradient``."""
    n, n_tokens, width = kept.z.shape
    n_heads, pool = plan.n_heads, plan.pool
    d = width // n_heads

    # Feed-forward part.
    grad_2 = _norm_backward(layer, gradient, -1, grad_out, kept.before_2, kept.stats_2)  # [n n_out, D]
    branch = _branch(plan, grad_2, kept.remain[1])
    z1, _, hidden = _hidden(plan, layer, kept.before_1)
    gradient.outer_weight.addmm_(branch.T, hidden)
    gradient.outer_bias.add_(branch.sum(0))
    grad_hidden = pool.take(grad_out, *hidden.shape)
    torch.mm(branch, layer.outer_weight, out=grad_hidden)
    aten.threshold_backward.grad_input(grad_hidden, hidden, 0, grad_input=grad_hidden)
    gradient.inner_weight.addmm_(grad_hidden.T, z1)
    gradient.inner_bias.add_(grad_hidden.sum(0))
    grad_z1 = grad_2.addmm_(grad_hidden, layer.inner_weight)
    pool.give(hidden, grad_hidden)

    # Attention.
    grad_1 = _norm_backward(layer, gradient, 0, grad_z1, kept.before_1, kept.stats_1)  # [n n_out, D]
    branch = _branch(plan, grad_1, kept.remain[0])
    qkv = _query_key_value(plan, layer, kept.z)
    context = _context(plan, kept.weights, qkv[2].flatten(0, 1), n_out)
    gradient.out_weight.addmm_(branch.T, context)
    pool.give(context)
    grad_context = pool.take(grad_out, n, n_out, n_heads, d)
    torch.mm(branch, layer.out_weight, out=grad_context.view(-1, width))
    grad_head = pool.take(grad_out, n, n_heads, n_out, d)
    grad_head.copy_(grad_context.transpose(1, 2))
    pool.give(grad_context)
    grad_qkv = pool.take(grad_out, 3, n, n_heads, n_tokens, d)
    _attention_backward(plan, kept.weights, qkv, grad_head.view(-1, n_out, d), grad_qkv, n_out)
    pool.give(grad_head, qkv)
    projected = pool.take(grad_out, n * n_tokens, 3 * width)
    projected.view(n, n_tokens, 3, n_heads, d).copy_(grad_qkv.permute(1, 3, 0, 2, 4))
    pool.give(grad_qkv)
    gradient.qkv_weight.addmm_(projected.T, kept.z.view(-1, width))
    gradient.qkv_bias.add_(projected.sum(0))
    grad_z = pool.take(grad_out, n, n_tokens, width)
    torch.mm(projected, layer.qkv_weight, out=grad_z.view(-1, width))
    grad_z[:, :n_out] += grad_1.view(n, n_out, width)
    pool.give(projected)
    return grad_z


def _attention_backward(
    plan: Plan, weights: Tensor, qkv: Tensor, grad_head: Tensor, grad_qkv: Tensor, n_out: int
) -> None:
    """[n H, n_out, d] -> ``grad_qkv`` [3, n, H, T, d]."""
    q, k, v = qkv.flatten(1, 2)
    grad_q, grad_k, grad_v = grad_qkv.flatten(1, 2)
    pool, n_tokens, scale = plan.pool, q.shape[1], 1 / math.sqrt(q.shape[2])
    grad_weights = pool.take(q, *weights.shape)
    torch.bmm(_by_query(plan, weights, n_out).transpose(1, 2), grad_head, out=grad_v)
    if plan.softmax_over == "keys":
        torch.bmm(v, grad_head.transpose(1, 2), out=grad_weights)
    else:
        rows = pool.take(q, len(q), n_out, n_tokens)  # not a part of grad_weights: that would be one product at a time
        torch.bmm(grad_head, v.transpose(1, 2), out=rows)
        grad_weights[:, :n_out] = rows
        grad_weights[:, n_out:] = 0
        pool.give(rows)
    grad_logits = aten._softmax_backward_data(grad_weights, weights, 1, weights.dtype)
    pool.give(grad_weights)
    if plan.softmax_over == "keys":  # logits [key, query]
        rows = pool.take(q, len(q), n_out, q.shape[2])  # likewise
        torch.baddbmm(rows, grad_logits.transpose(1, 2), k, beta=0, alpha=scale, out=rows)
        grad_q[:, :n_out] = rows
        grad_q[:, n_out:] = 0
        pool.give(rows)
        torch.baddbmm(grad_k, grad_logits, q[:, :n_out], beta=0, alpha=scale, out=grad_k)
    else:  # logits [query, key]
        torch.baddbmm(grad_q, grad_logits, k, beta=0, alpha=scale, out=grad_q)
        torch.baddbmm(grad_k, grad_logits.transpose(1, 2), q, beta=0, alpha=scale, out=grad_k)


def _norm_backward(layer: Layer, gradient: Layer, index: int, grad: Tensor, before: Tensor, stats: Tensor) -> Tensor:
    grad_in, grad_weight, grad_bias = aten.native_layer_norm_backward(
        grad, before, [before.shape[1]], *stats, layer.norm_weight[index], layer.norm_bias[index], [True, True, True]
    )
    gradient.norm_weight[index].add_(grad_weight)
    gradient.norm_bias[index].add_(grad_bias)
    return grad_in


def _branch(plan: Plan, grad: Tensor, remain: Tensor | None) -> Tensor:
    """Gradient behind the dropout of a sub-layer."""
    return grad if remain is None else torch.mul(grad, remain).mul_(65536 / (65536 - plan.n_dropped))
