import numpy as np
import pytest
import torch
import torch.nn.functional as F
from recbole.model.layers import TransformerEncoder
from torch import nn

from recbole_mm.model.layers import (
    AttentionPooling,
    Dropout,
    FeatureRows,
    MoEAdaptor,
    SequenceEncoder,
    drop_items,
    last_position,
    length_groups,
    mixup,
    scaled,
    segment_softmax,
    valid_positions,
)

COUNTS = [0, 3, 1, 0, 5, 2]  # rows of items 0..5; item 0 is padding


def ragged(width=6, counts=COUNTS, seed=0):
    """Rows in a file order that differs from the item order, the first row belonging to nobody."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(1 + sum(counts), width, generator=generator) * torch.linspace(0.5, 4, width) + 2
    starts, begin = torch.zeros(len(counts), dtype=torch.long), 1
    for item in torch.randperm(len(counts), generator=generator).tolist():
        starts[item], begin = begin, begin + counts[item]
    return rows, starts, torch.tensor(counts), torch.randn(width, generator=generator)


def literal_scale(rows, used, scale):
    if scale == "unit":
        return rows / rows.norm(dim=1, keepdim=True)
    if scale == "sqrt_dim":
        return rows / rows.norm(dim=1, keepdim=True) * rows.shape[1] ** 0.5
    if scale == "standardize":
        return (rows - used.mean(0)) / used.std(0, correction=0)
    return rows


def literal_pooling(pooling, rows, starts, counts, fallback, max_rows, scale):
    """One item at a time, factored attention, on a scaled copy of the rows."""
    counts = [min(count, max_rows) for count in counts.tolist()]
    used = torch.cat([rows[start : start + count] for start, count in zip(starts.tolist(), counts, strict=True)])
    pooled = []
    for start, count in zip(starts.tolist(), counts, strict=True):
        if count == 0:
            pooled.append(literal_scale(fallback[None], used, scale)[0])
            continue
        x = literal_scale(rows[start : start + count], used, scale)  # [T, F]
        weights = ((x @ pooling.inner.weight.T + 0.3) @ pooling.outer.weight.T - 0.7).softmax(
            0
        )  # biases must not matter
        pooled.append((weights * x).sum(0))
    return torch.stack(pooled)


@pytest.mark.parametrize("scale", ["none", "unit", "sqrt_dim", "standardize"])
@pytest.mark.parametrize("items", [None, [4], [5, 1, 3, 4, 0]])
@pytest.mark.parametrize("max_rows", [10, 2])
def test_pooling_equals_one_item_at_a_time_in_value_and_gradient(scale, items, max_rows):
    rows, starts, counts, fallback = ragged()
    pooling = AttentionPooling(width=6, attention_size=4)
    index = None if items is None else torch.tensor(items)
    actual = pooling(FeatureRows(rows, starts, counts, fallback, max_rows=max_rows, scale=scale), index)
    expected = literal_pooling(pooling, rows, starts, counts, fallback, max_rows, scale)
    expected = expected if items is None else expected[items]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)

    direction = torch.randn(actual.shape)
    gradients = [torch.autograd.grad((x * direction).sum(), pooling.parameters()) for x in (actual, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_collapsed_attention_equals_the_factored_one():
    rows, starts, counts, fallback = (x.double() if x.is_floating_point() else x for x in ragged(counts=[0, 7]))
    pooling = AttentionPooling(width=6, attention_size=4).double()
    actual = pooling(FeatureRows(rows, starts, counts, fallback), torch.tensor([1]))
    x = rows[starts[1] : starts[1] + 7]
    weights = pooling.outer(pooling.inner(x)).softmax(0)
    torch.testing.assert_close(actual, (weights * x).sum(0, keepdim=True), rtol=0, atol=1e-7)


def test_weights_of_an_item_sum_to_one_and_large_scores_do_not_overflow():
    scores, segments = torch.tensor([1000.0, 999.0, -1000.0, 3.0]), torch.tensor([0, 0, 2, 2])
    weights = segment_softmax(scores, segments, 3)
    expected = torch.tensor([[1000.0, 999.0], [-1000.0, 3.0]]).softmax(1).flatten()
    torch.testing.assert_close(weights, expected)
    assert segment_softmax(scores.half(), segments, 3).dtype == torch.float32


def test_an_item_without_rows_is_finite_and_gets_the_fallback():
    rows, starts, counts, fallback = ragged()
    features = FeatureRows(rows, starts, counts, fallback)
    pooled = AttentionPooling(width=6, attention_size=4)(features, torch.tensor([0, 3]))
    torch.testing.assert_close(pooled, fallback.expand(2, -1))


def test_a_catalogue_without_any_row_is_all_fallback():
    zeros = torch.zeros(3, dtype=torch.long)
    features = FeatureRows(torch.zeros(0, 6), zeros, zeros, torch.ones(6), scale="standardize")
    torch.testing.assert_close(AttentionPooling(width=6, attention_size=4)(features), torch.ones(3, 6))


def test_a_constant_dimension_is_standardised_to_zero():
    rows, starts, counts, fallback = ragged(width=3)
    rows[:, 1] = fallback[1] = 0.1
    pooled = AttentionPooling(width=3, attention_size=4)(
        FeatureRows(rows, starts, counts, fallback, scale="standardize")
    )
    assert pooled.isfinite().all()
    torch.testing.assert_close(pooled[:, 1], torch.zeros(len(counts)))


def test_statistics_are_those_of_the_rows_in_use_and_exact_far_from_zero():
    rows = torch.randn(10_000, 3) * torch.tensor([1e-2, 1.0, 100.0]) + torch.tensor([50.0, 0.0, -3.0])
    counts, starts = torch.full((2500,), 3), torch.arange(2500) * 4
    features = FeatureRows(rows, starts, counts, torch.zeros(3), scale="standardize")
    used = rows.view(2500, 4, 3)[:, :3].reshape(-1, 3).double().numpy()
    np.testing.assert_allclose(features.std, used.std(0), rtol=2e-6)
    # To float32's digits of the mean, or a millionth of the deviation.
    assert (abs(features.mean.numpy() - used.mean(0)) < 1e-7 * abs(used.mean(0)) + 1e-6 * used.std(0)).all()


def test_feature_rows_are_neither_copied_nor_saved(tmp_path):
    np.save(tmp_path / "rows.npy", ragged()[0].numpy())
    rows = torch.from_numpy(np.load(tmp_path / "rows.npy", mmap_mode="c"))
    features = FeatureRows(rows, *ragged()[1:], scale="standardize")
    assert features.rows.data_ptr() == rows.data_ptr()
    assert features.state_dict() == {}


def one_per_item():
    """[N, F] and which of them has content; what stands where there is none must not matter."""
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.5, 4, 5) + 2
    there = torch.tensor([False, True, True, False, True, True, True])
    x[0], x[3] = 0, 1e6
    return x, there


@pytest.mark.parametrize("scale", ["none", "unit", "sqrt_dim", "standardize"])
def test_one_vector_per_item_is_scaled_like_feature_rows_and_zero_without_content(scale):
    x, there = one_per_item()
    before, actual = x.clone(), scaled(x, there, scale)
    torch.testing.assert_close(actual[there], literal_scale(x[there], x[there], scale))
    assert not actual[~there].any()
    torch.testing.assert_close(x, before, rtol=0, atol=0)

    rows = FeatureRows(x, torch.arange(7), there.long(), torch.zeros(5), scale=scale)
    torch.testing.assert_close(actual[there], AttentionPooling(width=5, attention_size=4)(rows)[there].detach())


def test_scaling_ignores_a_constant_dimension_a_zero_vector_and_empty_tables():
    x, there = one_per_item()
    x[:, 1] = 0.1
    x[2] = 0
    assert not scaled(torch.full((7, 5), 0.1), there, "standardize").any()
    for scale in ("unit", "sqrt_dim", "standardize"):
        assert scaled(x, there, scale).isfinite().all()
        assert not scaled(x, torch.zeros(7, dtype=torch.bool), scale).any()
    assert not scaled(x, there, "unit")[2].any()


def test_an_unknown_scale_of_vectors_is_refused():
    with pytest.raises(ValueError, match="scale is 'l2', expected one of none, unit"):
        scaled(*one_per_item(), "l2")


def test_feature_rows_refuse_what_they_do_not_know():
    with pytest.raises(ValueError, match="scale is 'l2', expected one of none, unit"):
        FeatureRows(*ragged(), scale="l2")
    with pytest.raises(ValueError, match="max_rows is 0"):
        FeatureRows(*ragged(), max_rows=0)


# ---------------------------------------------------------------- adaptor


def test_one_product_for_all_experts_equals_a_loop_over_experts():
    adaptor = MoEAdaptor(width_in=6, width_out=4, n_experts=3, dropout=0.0, eps=1e-12)
    for parameter in adaptor.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(5, 6)
    gates = (x @ adaptor.gate.weight.T).softmax(1)
    expected = torch.zeros(5, 4)
    for k in range(3):
        own = slice(4 * k, 4 * k + 4)
        hidden = x @ adaptor.project.weight[own].T + adaptor.project.bias[own]
        centred = hidden - hidden.mean(1, keepdim=True)
        normed = centred / (centred.square().mean(1, keepdim=True) + 1e-12).sqrt()
        expected += gates[:, k : k + 1] * (normed * adaptor.norm_weight[k] + adaptor.norm_bias[k])
    torch.testing.assert_close(adaptor(x), expected, rtol=1e-5, atol=1e-6)


def test_all_experts_count_alike_at_first():
    adaptor = MoEAdaptor(width_in=6, width_out=4, n_experts=8, dropout=0.0, eps=1e-12)
    torch.testing.assert_close(adaptor.experts(torch.randn(3, 6))[1], torch.full((3, 8), 1 / 8))


def test_places_of_the_same_item_draw_their_own_dropout():
    adaptor = MoEAdaptor(width_in=6, width_out=16, n_experts=2, dropout=0.5, eps=1e-12)
    hidden, gates = adaptor.experts(torch.randn(1, 6))
    first, second = adaptor.mix(hidden.expand(2, -1, -1), gates.expand(2, -1))
    assert not torch.equal(first, second)


def test_dropout_drops_the_stated_share_and_keeps_the_mean():
    torch.manual_seed(0)
    dropout, x = Dropout(0.2), torch.ones(333, 1001, requires_grad=True)
    dropped = dropout(x)
    assert sorted(dropped.unique().tolist()) == pytest.approx([0, 1.25], abs=1e-4)
    assert (dropped == 0).double().mean().item() == pytest.approx(0.2, abs=5 * (0.16 / x.numel()) ** 0.5)
    assert dropped.mean().item() == pytest.approx(1, abs=5 * (0.25 / x.numel()) ** 0.5)
    dropped.sum().backward()
    torch.testing.assert_close(x.grad, dropped.detach())


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_dropout_of_nothing_and_of_everything(p):
    torch.testing.assert_close(Dropout(p)(torch.ones(3, 5)), torch.full((3, 5), 1 - p))
    torch.testing.assert_close(Dropout(p).eval()(torch.ones(3, 5)), torch.ones(3, 5))


def test_the_seed_governs_dropout():
    draws = []
    for _ in range(2):
        torch.manual_seed(5)
        draws.append(Dropout(0.5)(torch.ones(100)))
    assert torch.equal(*draws)


# ---------------------------------------------------------------- augmentation


def sequences(*rows, length=None):
    length = length or max(map(len, rows))
    item_seq = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])
    return item_seq, torch.tensor([len(row) for row in rows])


def test_item_drop_keeps_order_the_first_item_and_says_the_length():
    torch.manual_seed(0)
    item_seq, item_seq_len = sequences(*[range(1, n + 1) for n in [1, 2, 9, 20] * 25])
    kept, kept_len = drop_items(item_seq, item_seq_len, 0.4)
    assert kept.shape == item_seq.shape
    for row, n_kept, n in zip(kept.tolist(), kept_len.tolist(), item_seq_len.tolist(), strict=True):
        items = row[:n_kept]
        assert items[0] == 1 and items == sorted(set(items)) and items[-1] <= n
        assert row[n_kept:] == [0] * (20 - n_kept)
    share = (kept_len - 1).sum() / (item_seq_len - 1).sum()
    assert share.item() == pytest.approx(0.6, abs=0.06)


def test_item_drop_keeps_exactly_what_the_draw_keeps(monkeypatch):
    draw = torch.tensor([[0.0, 0.0, 0.9, 0.0, 0.0], [0.0, 0.9, 0.9, 0.9, 0.9]])
    monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: draw)
    kept, kept_len = drop_items(*sequences([11, 12, 13, 14, 15], [21, 22]), 0.5)
    assert kept.tolist() == [[11, 13, 0, 0, 0], [21, 22, 0, 0, 0]] and kept_len.tolist() == [2, 2]


def test_item_drop_of_nothing_changes_nothing():
    item_seq, item_seq_len = sequences([1], [2, 3, 4])
    torch.testing.assert_close(drop_items(item_seq, item_seq_len, 0.0), (item_seq, item_seq_len))


@pytest.mark.parametrize("prob", [0.0, 0.3, 1.0])
def test_mixup_is_complementary(prob):
    text, image = torch.randn(4, 7, 3), torch.randn(4, 7, 3)
    valid = valid_positions(torch.ones(4, 7), torch.tensor([1, 7, 3, 5]))
    mixed_text, mixed_image = mixup(text, image, valid, prob)
    torch.testing.assert_close(mixed_text + mixed_image, text + image, rtol=0, atol=0)
    swapped = (mixed_text == image).all(-1)
    torch.testing.assert_close(mixed_text, torch.where(swapped.unsqueeze(-1), image, text), rtol=0, atol=0)
    assert not swapped[~valid].any()
    assert swapped[valid].float().mean().item() == pytest.approx(prob, abs=0.35)


# ---------------------------------------------------------------- sequences


def encoder(n_layers=2, max_length=12, dropout=0.0, **settings):
    torch.manual_seed(1)
    made = SequenceEncoder(
        width=8, inner_size=16, n_layers=n_layers, n_heads=2, max_length=max_length,
        hidden_dropout=dropout, attn_dropout=dropout, initializer_range=0.3, **settings,
    )  # fmt: skip
    return made.double()


def plain_encode(made, vectors, lengths):
    """SASRec as RecBole computes it: full length, additive mask, every position of every layer."""
    plain = TransformerEncoder(2, 2, 8, 16, 0.0, 0.0, "gelu", 1e-12).double()
    plain.layer = plain.layer[: len(made.trm_encoder.layer)]
    plain.load_state_dict(made.trm_encoder.state_dict())
    n, length, _ = vectors.shape
    valid = torch.arange(length) < lengths.unsqueeze(1)
    mask = torch.where((valid[:, None, None, :].expand(n, 1, length, length)).tril(), 0.0, -10000.0).double()
    x = made.LayerNorm(vectors + made.position_embedding.weight[:length])
    return plain, plain(x, mask)[-1][torch.arange(n), lengths - 1]


@pytest.mark.parametrize("n_layers", [1, 2])
@pytest.mark.parametrize("lengths", [[1], [12], [1, 12, 3, 3, 7, 2, 1, 5, 12], [4, 4, 4], [1, 1]])
def test_grouped_encoder_equals_the_plain_one_in_value_and_gradient(lengths, n_layers):
    made, lengths = encoder(n_layers), torch.tensor(lengths)
    vectors = torch.randn(len(lengths), 12, 8, dtype=torch.double, requires_grad=True)
    actual = made(vectors[torch.arange(12) < lengths.unsqueeze(1)], lengths)
    plain, expected = plain_encode(made, vectors, lengths)
    torch.testing.assert_close(actual, expected)

    direction = torch.randn_like(actual)
    (actual * direction).sum().backward()
    own = [parameter.grad.clone() for parameter in made.trm_encoder.parameters()]
    by_vectors, vectors.grad = vectors.grad, None
    (expected * direction).sum().backward()
    torch.testing.assert_close(own, [parameter.grad for parameter in plain.parameters()])
    torch.testing.assert_close(by_vectors, vectors.grad)


def test_one_position_of_a_layer_equals_that_position_of_the_whole_layer():
    layer = TransformerEncoder(1, 2, 8, 16, 0.0, 0.0, "gelu", 1e-12).double().layer[0]
    x, last, steps = torch.randn(3, 5, 8, dtype=torch.double), torch.tensor([0, 4, 2]), torch.arange(5)
    mask = torch.full((5, 5), -10000.0, dtype=torch.double).triu(1)
    torch.testing.assert_close(last_position(layer, x, last, steps), layer(x, mask)[torch.arange(3), last])


def test_batch_mates_do_not_matter_to_a_sequence():
    made, lengths = encoder(dropout=0.5).eval(), torch.tensor([3, 12, 1, 6])
    packed = torch.randn(22, 8, dtype=torch.double)
    alone = [made(part, lengths[i : i + 1])[0] for i, part in enumerate(packed.split(lengths.tolist()))]
    torch.testing.assert_close(made(packed, lengths), torch.stack(alone))


def test_every_part_of_the_encoder_has_dropout_in_training():
    made, lengths = encoder(dropout=0.5), torch.tensor([3, 2])
    packed = torch.randn(5, 8, dtype=torch.double)
    assert not torch.equal(made(packed, lengths), made(packed, lengths))
    assert sum(type(module) is Dropout for module in made.modules()) == 1 + 3 * 2
    assert not any(type(module) is nn.Dropout for module in made.modules())


def test_a_sequence_longer_than_the_position_table_is_an_error():
    with pytest.raises(ValueError, match="has 13 items, the position table 12"):
        encoder()(torch.randn(15, 8, dtype=torch.double), torch.tensor([2, 13]))
    with pytest.raises(ValueError, match=r"n_heads \(3\) must divide width \(8\)"):
        SequenceEncoder(width=8, inner_size=8, n_layers=1, n_heads=3, max_length=2, hidden_dropout=0, attn_dropout=0)


@pytest.mark.parametrize("n_groups", [1, 2, 4])
def test_length_groups_hold_every_row_once_and_pad_least(n_groups):
    lengths = torch.randint(1, 9, (60,), generator=torch.Generator().manual_seed(n_groups))
    groups = length_groups(lengths, n_groups)
    assert 1 <= len(groups) <= n_groups
    assert sorted(torch.cat([rows for rows, _ in groups]).tolist()) == list(range(60))
    for rows, longest in groups:
        assert lengths[rows].max() == longest
    actual = sum(len(rows) * longest for rows, longest in groups)
    assert actual == least_padding(sorted(lengths.tolist()), n_groups)


def least_padding(lengths, n_groups):
    if n_groups == 1 or len(lengths) == 1:
        return len(lengths) * lengths[-1]
    cuts = [i for i in range(1, len(lengths)) if lengths[i] != lengths[i - 1]]
    whole = len(lengths) * lengths[-1]
    return min([whole, *((len(lengths) - i) * lengths[-1] + least_padding(lengths[:i], n_groups - 1) for i in cuts)])


def test_gelu_in_one_pass_is_recboles():
    plain = TransformerEncoder(hidden_act="gelu").layer[0].feed_forward
    x = torch.linspace(-5, 5, 101, dtype=torch.double)
    torch.testing.assert_close(F.gelu(x), plain.gelu(x))
