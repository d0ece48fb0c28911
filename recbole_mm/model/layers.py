"""Parts of models: tensors and plain numbers in, tensors out; no config, no dataset.

Shapes: B sequences, L positions, P real positions of a batch in one row ("packed"), N item ids, S feature rows, R
rows in use, F encoder width, D model width, H heads, E experts. Id 0 is padding; padding is on the right.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from recbole.model.layers import TransformerEncoder
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from recbole_mm.ragged import mean_and_deviation, segments_of

NORMS_AT_ONCE = 1 << 16  # rows
ROWS_AT_ONCE, ITEMS_AT_ONCE = 2048, 256  # of 16 bits, converted at a time: they stay in the cache
FEATURE_SCALES = ("none", "unit", "sqrt_dim", "standardize")


# ---------------------------------------------------------------- features


class FeatureRows(nn.Module):
    """The frozen feature vectors of all items, several per item, and how to scale them.

    Nothing here is trained or saved. On the CPU ``rows`` may be a memory-mapped file: it is read, never copied. Rows of
    float16 stay what they are, and are converted some at a time where they are used.

    Scaling needs no scaled copy either: a factor per row joins the row's weight, and a shift and factor per dimension
    commute with a weighted mean, so that `AttentionPooling` applies them to its N results instead of the S rows.

    Args:
        rows: [S, F].
        starts, counts: [N], first row and number of rows of each item; an item's rows are contiguous.
        fallback: [F], stands in for items without rows, and is scaled like a row.
        max_rows: later rows of an item are ignored; None takes all.
        scale: "none", "unit" (length 1), "sqrt_dim" (length sqrt(F)), or "standardize" (mean 0 and deviation 1 in
            each dimension over the rows in use; a constant dimension becomes 0).

    Raises:
        ValueError: for an unknown ``scale`` or ``max_rows`` below 1.
    """

    def __init__(
        self,
        rows: Tensor,
        starts: Tensor,
        counts: Tensor,
        fallback: Tensor,
        *,
        max_rows: int | None = None,
        scale: str = "none",
    ) -> None:
        super().__init__()
        if scale not in FEATURE_SCALES:
            raise ValueError(f"scale is {scale!r}, expected one of {', '.join(FEATURE_SCALES)}")
        if max_rows is not None and max_rows < 1:
            raise ValueError(f"max_rows is {max_rows}, expected at least 1, or None for all")
        counts = counts if max_rows is None else counts.clamp(max=max_rows)
        row_ids, _, _ = segments_of(starts, counts)

        row_scale = mean = std = None
        if scale in ("unit", "sqrt_dim"):
            length = 1.0 if scale == "unit" else math.sqrt(rows.shape[1])
            norms = [torch.linalg.vector_norm(at_least_float32(part), dim=1) for part in rows.split(NORMS_AT_ONCE)]
            row_scale = length / torch.cat(norms).clamp_min(1e-12)  # [S]
            fallback = length * F.normalize(fallback, dim=0)
        if scale == "standardize":
            mean, std = mean_and_deviation(rows, row_ids)  # [F], [F]
            std = torch.where(std > 0, std, 1.0)
        for name, tensor in dict(
            rows=rows, starts=starts, counts=counts, fallback=fallback, row_scale=row_scale, mean=mean, std=std
        ).items():
            self.register_buffer(name, tensor, persistent=False)

    @property
    def width(self) -> int:
        return self.rows.shape[1]


def scaled(x: Tensor, there: Tensor, scale: str) -> Tensor:
    """One vector per item, scaled as `FeatureRows` does; zero where an item has no content.

    Args:
        x: [N, F].
        there: [N] bool, items with content.
        scale: one of `FEATURE_SCALES`.
    """
    if scale in ("unit", "sqrt_dim"):
        x = F.normalize(x, dim=1) * (1.0 if scale == "unit" else math.sqrt(x.shape[1]))
    elif scale == "standardize":
        mean, std = mean_and_deviation(x, there.nonzero().squeeze(1))
        x = (x - mean) / torch.where(std > 0, std, 1.0)
    elif scale != "none":
        raise ValueError(f"scale is {scale!r}, expected one of {', '.join(FEATURE_SCALES)}")
    return x * there.unsqueeze(1)


class AttentionPooling(nn.Module):
    """One vector per item out of its rows: e = sum_j a_j x_j, a = softmax_j(x_j W1 W2).

    Source: MSM4SR, attention over the sentences or images of an item. The two maps have no nonlinearity between them,
    hence x W1 W2 = x . v with v = W1 W2. Biases are left out: they add the same to each row's score, and softmax
    ignores that. The softmax is over an item's real rows only. Rows are frozen; the gradient goes to W1 and W2.

    Args:
        width: F.
        attention_size: width between the two maps.
    """

    def __init__(self, *, width: int, attention_size: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, attention_size, bias=False)
        self.outer = nn.Linear(attention_size, 1, bias=False)

    def forward(self, features: FeatureRows, items: Tensor | None = None) -> Tensor:
        """
        Args:
            items: [n] item ids; None for all of them.

        Returns:
            [n, F], or [N, F] without ``items``; an item without rows gets the fallback.
        """
        starts, counts = features.starts, features.counts
        if items is not None:
            starts, counts = starts.index_select(0, items), counts.index_select(0, items)
        row_ids, segments, offsets = segments_of(starts, counts)  # [R], [R], [n]
        scores = self._scores(features, row_ids)  # [R]
        weights = segment_softmax(scores, segments, len(counts))  # [R]
        if features.row_scale is not None:
            weights = weights * features.row_scale.index_select(0, row_ids)
        if features.rows.dtype == torch.float16:
            pooled = _WeightedRows.apply(features.rows, row_ids, segments, offsets, weights)  # [n, F]
        else:
            # A bag of embeddings is a weighted sum of rows that never holds the R rows, [R, F], themselves.
            pooled = F.embedding_bag(row_ids, features.rows, offsets, mode="sum", per_sample_weights=weights)  # [n, F]
        pooled = torch.where((counts == 0).unsqueeze(1), features.fallback, pooled)
        return pooled if features.std is None else (pooled - features.mean) / features.std

    def _scores(self, features: FeatureRows, row_ids: Tensor) -> Tensor:
        direction = (self.outer.weight @ self.inner.weight).squeeze(0)  # [F]
        if features.std is not None:
            direction = direction / features.std  # the mean's share is the same for all rows
        if features.rows.dtype == torch.float16:
            scores = _RowProducts.apply(features.rows, row_ids, at_least_float32(direction))
        elif 4 * len(row_ids) > len(
            features.rows
        ):  # reading all rows in order is as fast as gathering a quarter of them
            scores = (features.rows @ direction).index_select(0, row_ids)
        else:
            scores = features.rows.index_select(0, row_ids) @ direction
        return scores if features.row_scale is None else scores * features.row_scale.index_select(0, row_ids)


class _RowProducts(torch.autograd.Function):
    """Products of rows of 16 bits with one vector: [S, F], [R], [F] -> [R]. Converts a few rows at a time, and again
    in the backward pass, so that memory is O(R) and not O(R F)."""

    @staticmethod
    def forward(ctx, rows: Tensor, row_ids: Tensor, direction: Tensor) -> Tensor:
        ctx.save_for_backward(rows, row_ids)
        with torch.autocast(rows.device.type, enabled=False):  # else the backward pass would add up blocks in bf16
            parts = [rows.index_select(0, ids).to(direction.dtype) @ direction for ids in row_ids.split(ROWS_AT_ONCE)]
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        rows, row_ids = ctx.saved_tensors
        grad_direction = grad.new_zeros(rows.shape[1])
        for ids, part in zip(row_ids.split(ROWS_AT_ONCE), grad.split(ROWS_AT_ONCE), strict=True):
            grad_direction += part @ rows.index_select(0, ids).to(grad.dtype)
        return None, None, grad_direction


class _WeightedRows(torch.autograd.Function):
    """Sum of each item's rows of 16 bits by weight, as a bag of embeddings: [S, F], weights [R] -> [n, F]. Converts a
    few rows at a time, and again in the backward pass."""

    @staticmethod
    def forward(ctx, rows: Tensor, row_ids: Tensor, segments: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(rows, row_ids, segments)
        pooled = weights.new_empty(len(offsets), rows.shape[1])
        starts = offsets[::ITEMS_AT_ONCE].tolist()
        for number, (start, stop) in enumerate(zip(starts, [*starts[1:], len(row_ids)], strict=True)):
            items = slice(number * ITEMS_AT_ONCE, (number + 1) * ITEMS_AT_ONCE)
            pooled[items] = F.embedding_bag(
                torch.arange(stop - start, device=rows.device),
                rows.index_select(0, row_ids[start:stop]).to(weights.dtype),
                offsets[items] - start,
                mode="sum",
                per_sample_weights=weights[start:stop],
            )
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        rows, row_ids, segments = ctx.saved_tensors
        blocks = zip(row_ids.split(ROWS_AT_ONCE), segments.split(ROWS_AT_ONCE), strict=True)
        parts = [(rows.index_select(0, ids).to(grad.dtype) * grad.index_select(0, of)).sum(1) for ids, of in blocks]
        return None, None, None, None, torch.cat(parts)


def segment_softmax(scores: Tensor, segments: Tensor, n_segments: int) -> Tensor:
    """Softmax within each segment, at least in float32.

    Args:
        scores: [R].
        segments: [R], the segment of each score, 0..n_segments-1.

    Returns:
        [R]; the weights of a segment sum to 1.
    """
    scores = at_least_float32(scores)
    largest = scores.new_full((n_segments,), -torch.inf).scatter_reduce(0, segments, scores.detach(), "amax")
    weights = (scores - largest.index_select(0, segments)).exp()
    total = weights.new_zeros(n_segments).index_add(0, segments, weights)
    return weights / total.index_select(0, segments)


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def products(a: Tensor, b: Tensor) -> Tensor:
    """Product of every row of a with every row of b, in float32 at least, autocast or not: [A, D], [B, D] -> [A, B]."""
    with torch.autocast(a.device.type, enabled=False):
        return at_least_float32(a) @ at_least_float32(b).T


class Dropout(nn.Dropout):
    """Dropout whose mask is cheap on a CPU, where `torch.nn.Dropout` draws one number per element.

    Four elements share one 64-bit number, 16 bits each. The probability is rounded to a multiple of 1/65536 and what
    is kept is scaled by the inverse of the rounded one, so that the expectation is exact.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or x.device.type != "cpu" or self.p == 1 or torch.compiler.is_compiling():
            return F.dropout(x, self.p, self.training)
        n_dropped = dropped_of_65536(self.p)
        if n_dropped == 0:
            return x
        kept = torch.empty_like(x, memory_format=torch.contiguous_format, requires_grad=False)
        torch.ge(random_int16(x.shape), n_dropped - 32768, out=kept)  # 1 or 0, as x's type
        return x * kept.mul_(65536 / (65536 - n_dropped))


def dropped_of_65536(p: float) -> int:
    """A probability as a number of 65536 equally likely draws, of which one at least is kept."""
    return min(round(p * 65536), 65535)


def random_int16(shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Evenly drawn from -32768..32767, on the CPU; four of them share one draw of 64 bits."""
    n = math.prod(shape)
    bits = torch.empty((n + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    return bits.view(torch.int16)[:n].view(shape)


# ---------------------------------------------------------------- adaptor


class MoEAdaptor(nn.Module):
    """A dense mixture of experts from encoder width to model width.

    z = sum_k g_k LayerNorm_k(Dropout(A_k x + a_k)), g = softmax(x G). Source: MSM4SR, mixture-of-experts adaptor.
    G starts at zero, so all experts count alike at first. Differs from UniSRec's adaptor: bias after the map, dropout
    on its output, a LayerNorm, no noise on the gates.

    All experts are one matrix product, and what is random comes after it. A caller who needs an item at several
    places, each with its own dropout, calls `experts` once per item and `mix` once per place.

    Args:
        width_in: F.
        width_out: D.
        n_experts: E.
        dropout: probability of dropping a value of an expert's output.
        eps: added to the variance in LayerNorm.
        initializer_range: standard deviation of A at the start.
    """

    compiled = ("mix",)  # with the setting compile

    def __init__(
        self,
        *,
        width_in: int,
        width_out: int,
        n_experts: int,
        dropout: float,
        eps: float,
        initializer_range: float = 0.02,
    ) -> None:
        super().__init__()
        self.n_experts, self.eps = n_experts, eps
        self.project = nn.Linear(width_in, n_experts * width_out)
        self.gate = nn.Linear(width_in, n_experts, bias=False)
        self.norm_weight = nn.Parameter(torch.ones(n_experts, width_out))
        self.norm_bias = nn.Parameter(torch.zeros(n_experts, width_out))
        self.dropout = Dropout(dropout)
        nn.init.normal_(self.project.weight, std=initializer_range)
        nn.init.zeros_(self.gate.weight)

    def experts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Experts' outputs before dropout, [n, E, D], and gates [n, E], of x [n, F]."""
        return self.project(x).unflatten(-1, (self.n_experts, -1)), at_least_float32(self.gate(x)).softmax(-1)

    def mix(self, hidden: Tensor, gates: Tensor) -> Tensor:
        """Dropout, one LayerNorm per expert, sum weighted by gates: [n, E, D], [n, E] -> [n, D]."""
        normed = F.layer_norm(self.dropout(hidden), hidden.shape[-1:], eps=self.eps)  # [n, E, D]
        weighted = torch.bmm(gates.unsqueeze(1), normed * self.norm_weight).squeeze(1)  # [n, D]
        return weighted + gates @ self.norm_bias

    def forward(self, x: Tensor) -> Tensor:
        """[n, F] -> [n, D]."""
        return self.mix(*self.experts(x))


# ---------------------------------------------------------------- augmentation


def drop_items(item_seq: Tensor, item_seq_len: Tensor, rate: float | Tensor) -> tuple[Tensor, Tensor]:
    """Drop items of each sequence at random; what is kept moves left in its order, the first item always stays.

    Source: MSM4SR, sequence random dropout.

    Args:
        item_seq: [B, L], padded with 0 on the right.
        item_seq_len: [B].
        rate: probability of dropping an item.

    Returns:
        The new sequences [B, L] and their lengths [B].
    """
    keep = (torch.rand(item_seq.shape, device=item_seq.device) >= rate) & valid_positions(
        item_seq, item_seq_len
    )  # [B, L]
    keep[:, 0] = True
    kept_len = keep.sum(1)  # [B]
    # Both masks are walked row by row, so the kept items of a row fill its first places.
    kept = torch.zeros_like(item_seq).masked_scatter(valid_positions(item_seq, kept_len), item_seq[keep])  # [B, L]
    return kept, kept_len


def valid_positions(item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
    """True where a position holds an item: [B, L], [B] -> [B, L] bool."""
    return torch.arange(item_seq.shape[1], device=item_seq.device) < item_seq_len.unsqueeze(1)


def mixup(text: Tensor, image: Tensor, valid: Tensor, prob: float | Tensor) -> tuple[Tensor, Tensor]:
    """Swap text and image at random positions, the same ones in both: what one stream gives, the other takes.

    Source: MSM4SR, complementary sequence mixup.

    Args:
        text, image: [..., D].
        valid: [...] bool; padding is not swapped.
        prob: probability of a swap, at most 0.5 for each stream to stay dominated by its own modality.

    Returns:
        The text-dominated and the image-dominated stream, [..., D] each.
    """
    swap = ((torch.rand(valid.shape, device=valid.device) < prob) & valid).unsqueeze(-1)  # [..., 1]
    return torch.where(swap, image, text), torch.where(swap, text, image)


# ---------------------------------------------------------------- sequences


class SequenceEncoder(nn.Module):
    """SASRec's encoder: a causal Transformer over a sequence of vectors, read at the last item.

    Source: SASRec as in RecBole, whose `TransformerEncoder` holds the parameters. Same function, less work:

    * it takes and normalises packed positions, so that padding costs nothing there;
    * sequences are sorted by length into a few groups and padded within a group only. Nothing masks that padding: it
      is on the right, and no position looks to its right;
    * the last layer computes queries, feed-forward and norms at the last item only, since nothing else is read.

    Args:
        width: D.
        inner_size: width inside the feed-forward part.
        max_length: longest sequence, the size of the position table.
        n_groups: groups of similar length in a batch.

    Raises:
        ValueError: if ``n_heads`` does not divide ``width``.
    """

    def __init__(
        self,
        *,
        width: int,
        inner_size: int,
        n_layers: int,
        n_heads: int,
        max_length: int,
        hidden_dropout: float,
        attn_dropout: float,
        hidden_act: str = "gelu",
        layer_norm_eps: float = 1e-12,
        initializer_range: float = 0.02,
        n_groups: int = 4,
    ) -> None:
        super().__init__()
        if width % n_heads:
            raise ValueError(f"n_heads ({n_heads}) must divide width ({width})")
        self.max_length, self.n_groups = max_length, n_groups
        self.position_embedding = nn.Embedding(max_length, width)
        self.trm_encoder = TransformerEncoder(
            n_layers=n_layers,
            n_heads=n_heads,
            hidden_size=width,
            inner_size=inner_size,
            hidden_dropout_prob=hidden_dropout,
            attn_dropout_prob=attn_dropout,
            hidden_act=hidden_act,
            layer_norm_eps=layer_norm_eps,
        )
        self.LayerNorm = nn.LayerNorm(width, eps=layer_norm_eps)
        self.dropout = Dropout(hidden_dropout)
        for layer in self.trm_encoder.layer:
            layer.multi_head_attention.attn_dropout = Dropout(attn_dropout)
            layer.multi_head_attention.out_dropout = Dropout(hidden_dropout)
            layer.feed_forward.dropout = Dropout(hidden_dropout)
            if hidden_act == "gelu":
                layer.feed_forward.intermediate_act_fn = F.gelu  # the same function in one pass instead of five
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=initializer_range)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, packed: Tensor, lengths: Tensor, places: Tensor | None = None) -> Tensor:
        """
        Args:
            packed: [P, D], the positions of the first sequence, then those of the second, and so on; no padding.
            lengths: [B], summing to P.
            places: [T] positions in ``packed`` to read; None for each sequence's last one.

        Returns:
            [B, D], the output at each sequence's last position, or [T, D] at ``places``.

        Raises:
            ValueError: if a sequence is longer than the position table.
        """
        longest = int(lengths.max())
        if longest > self.max_length:
            raise ValueError(f"a sequence has {longest} items, the position table {self.max_length}: raise max_length")
        return causal_outputs(self, packed, lengths, places, n_groups=self.n_groups)


def causal_outputs(
    encoder: nn.Module, packed: Tensor, lengths: Tensor, places: Tensor | None = None, *, n_groups: int = 4
) -> Tensor:
    """SASRec's encoder over packed sequences; what `SequenceEncoder` does, for anything that has its parts.

    Args:
        encoder: has position_embedding, LayerNorm, dropout and trm_encoder, like RecBole's SASRec.
        packed, lengths, places: as `SequenceEncoder` takes them.
        n_groups: groups of similar length in a batch; of sequences that are read at their last position alone, and of
            the others.

    Returns:
        [B, D], or [T, D] with ``places``.
    """
    starts = lengths.cumsum(0) - lengths  # [B]
    positions = torch.arange(len(packed), device=packed.device) - starts.repeat_interleave(lengths)  # [P]
    inputs = encoder.dropout(encoder.LayerNorm(packed + encoder.position_embedding(positions)))  # [P, D]
    layers = list(encoder.trm_encoder.layer)
    if places is None:
        groups = length_groups(lengths, n_groups)
        outputs = [_outputs(layers, inputs, starts[rows], longest, lengths[rows] - 1) for rows, longest in groups]
        order = torch.cat([rows for rows, _ in groups])  # [B]
        return F.embedding(order.argsort(), torch.cat(outputs))  # [B, D]

    row = torch.searchsorted(starts, places, right=True) - 1  # [T]
    at_last = torch.zeros_like(lengths).index_add_(0, row, (places == (starts + lengths - 1)[row]).to(lengths.dtype))
    only_last = (at_last > 0) & (row.bincount(minlength=len(lengths)) == at_last)  # [B]
    outputs, shift, n_outputs = [], torch.zeros_like(starts), 0  # [B], from a place to its output
    for chosen, whole in ((only_last, False), (~only_last, True)):
        chosen = chosen.nonzero().squeeze(1)
        for group, longest in length_groups(lengths[chosen], n_groups) if len(chosen) else ():
            rows = chosen[group]
            last = None if whole else lengths[rows] - 1
            outputs.append(_outputs(layers, inputs, starts[rows], longest, last).flatten(0, -2))
            step = torch.arange(len(rows), device=rows.device) * (longest if whole else 1)
            shift[rows] = n_outputs + step - (starts[rows] if whole else starts[rows] + last)
            n_outputs += len(outputs[-1])
    return F.embedding(shift[row] + places, torch.cat(outputs))  # [T, D]


def _outputs(layers: list[nn.Module], inputs: Tensor, starts: Tensor, length: int, last: Tensor | None) -> Tensor:
    """Sequences of one group: [P, D], [n] -> [n, D] at the positions ``last`` [n], or [n, length, D] without them."""
    steps = torch.arange(length, device=inputs.device)
    # What follows a shorter sequence is padding; it may hold anything, here the next sequence.
    index = (starts.unsqueeze(1) + steps).clamp_max(len(inputs) - 1)  # [n, length]
    x = F.embedding(index, inputs)  # [n, length, D]
    future = torch.full((length, length), -torch.inf, device=x.device, dtype=x.dtype).triu(1)
    for layer in layers[: None if last is None else -1]:
        x = layer(x, future)  # [n, length, D]
    return x if last is None else last_position(layers[-1], x, last, steps)


def last_position(layer: nn.Module, x: Tensor, last: Tensor, steps: Tensor) -> Tensor:
    """One of RecBole's Transformer layers, at one position of each sequence.

    Args:
        layer: a ``TransformerLayer``.
        x: [n, l, D].
        last: [n], the position to compute, which looks at itself and what is before it.
        steps: [l], 0..l-1.

    Returns:
        [n, D].
    """
    attention = layer.multi_head_attention
    heads = (attention.num_attention_heads, attention.attention_head_size)
    own = x[torch.arange(len(x), device=x.device), last]  # [n, D]
    query = attention.query(own).unflatten(-1, heads).unsqueeze(2)  # [n, H, 1, d]
    key = attention.key(x).unflatten(-1, heads).permute(0, 2, 3, 1)  # [n, H, d, l]
    value = attention.value(x).unflatten(-1, heads).transpose(1, 2)  # [n, H, l, d]
    scores = query @ key / attention.sqrt_attention_head_size  # [n, H, 1, l]
    scores = scores.masked_fill(steps > last.view(-1, 1, 1, 1), -torch.inf)
    weights = attention.attn_dropout(scores.softmax(-1))
    context = (weights @ value).flatten(1)  # [n, D]
    return layer.feed_forward(attention.LayerNorm(attention.out_dropout(attention.dense(context)) + own))


def length_groups(lengths: Tensor, n_groups: int) -> list[tuple[Tensor, int]]:
    """Sequences in at most ``n_groups`` groups of similar length, cut where padding within the groups is least.

    Args:
        lengths: [B], at least 1 each.

    Returns:
        For each group, shortest first: its row numbers, and its longest length.
    """
    longest = int(lengths.max())
    below = lengths.bincount(minlength=longest + 1).cumsum(0).cpu().double()  # [longest + 1], sequences up to a length
    upto = torch.arange(longest + 1)
    cost = (below - below.unsqueeze(1)) * upto  # [i, j]: positions of one group with the lengths in (i, j]
    cost = cost.masked_fill(upto.unsqueeze(1) > upto, torch.inf)
    best, cuts = cost[0], []
    for _ in range(n_groups - 1):  # one group more: best[j] = min over i of best[i] + cost[i, j]
        best, cut = (best.unsqueeze(1) + cost).min(0)
        cuts.append(cut.tolist())
    ends = [longest]
    for cut in reversed(cuts):
        ends.append(cut[ends[-1]])
    ends = sorted(set(ends) - {0})

    order = lengths.argsort(stable=True)  # [B]
    sizes = below[ends].diff(prepend=below.new_zeros(1)).long().tolist()
    return [(rows, end) for rows, end in zip(order.split(sizes), ends, strict=True) if len(rows)]
