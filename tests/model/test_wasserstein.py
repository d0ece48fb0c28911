import math

import pytest
import torch
from torch import nn

from recbole_mm.model.wasserstein import (
    Gaussian,
    GaussianEmbedding,
    WassersteinAttention,
    positive,
    wasserstein_distances,
)

WIDTH, N_HEADS = 6, 2
EXACT = {"rtol": 1e-10, "atol": 1e-11}


def gaussians(n, seed, width=WIDTH, dtype=torch.double):
    generator = torch.Generator().manual_seed(seed)
    mean, spread = (torch.randn(n, width, generator=generator, dtype=torch.double) for _ in range(2))
    return Gaussian(mean.to(dtype).requires_grad_(), spread.exp().to(dtype).requires_grad_())


def literal_distance(mean_a, variance_a, mean_b, variance_b):
    return ((mean_a - mean_b) ** 2).sum() + ((variance_a.sqrt() - variance_b.sqrt()) ** 2).sum()


# ---------------------------------------------------------------- distance


def test_distances_equal_a_loop_over_pairs_in_value_and_gradient():
    a, b = gaussians(4, 0), gaussians(3, 1)
    actual = wasserstein_distances(a, b)
    rows = [[literal_distance(*x, *y) for y in zip(*b, strict=True)] for x in zip(*a, strict=True)]
    expected = torch.stack([torch.stack(row) for row in rows])
    torch.testing.assert_close(actual, expected, **EXACT)
    direction = torch.randn(4, 3, dtype=torch.double)
    found = [torch.autograd.grad((x * direction).sum(), [*a, *b]) for x in (actual, expected)]
    torch.testing.assert_close(*found, **EXACT)


def test_distance_is_that_of_gaussians_with_any_covariance():
    """||m - n||^2 + tr(S + T - 2 (S^1/2 T S^1/2)^1/2), the 2-Wasserstein distance, squared."""
    a, b = gaussians(1, 0), gaussians(1, 1)
    s, t = (torch.diag(gaussian.variance[0]) for gaussian in (a, b))
    cross = square_root(square_root(s) @ t @ square_root(s))
    expected = (a.mean - b.mean).square().sum() + torch.trace(s + t - 2 * cross)
    torch.testing.assert_close(wasserstein_distances(a, b)[0, 0], expected, **EXACT)


def square_root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T


@pytest.mark.parametrize("dtype", [torch.float, torch.double])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_distance_is_a_squared_metric_up_to_rounding(dtype, scale):
    x = gaussians(40, 0, width=64, dtype=dtype)
    x = Gaussian(scale * x.mean, scale**2 * x.variance)
    distances = wasserstein_distances(x, x)
    rounding = 20 * torch.finfo(dtype).eps * (x.mean.square() + x.variance).sum(1).max().item()
    assert distances.min() >= 0
    assert distances.diagonal().max() <= rounding
    torch.testing.assert_close(distances, distances.T, rtol=0, atol=rounding)
    root = (distances + rounding).sqrt()
    assert (root.unsqueeze(1) <= root.unsqueeze(2) + root.unsqueeze(0)).all()  # i to k is no further than over j


def test_distance_has_finite_gradients_at_itself_and_without_variance():
    x = gaussians(3, 0, dtype=torch.float)
    with torch.no_grad():
        x.variance[0] = 0
    wasserstein_distances(x, x).sum().backward()
    assert x.mean.grad.isfinite().all() and x.variance.grad.isfinite().all()


def test_distances_are_float32_even_for_half_vectors_and_under_autocast():
    a, b = gaussians(4, 0, dtype=torch.bfloat16), gaussians(3, 1, dtype=torch.bfloat16)
    expected = wasserstein_distances(*(Gaussian(*(tensor.float() for tensor in x)) for x in (a, b)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(wasserstein_distances(a, b), expected)


# ---------------------------------------------------------------- variances


def test_variances_are_elu_plus_one_and_positive_for_any_number():
    x = torch.linspace(-8, 8, 401, dtype=torch.double, requires_grad=True)
    torch.testing.assert_close(positive(x), nn.functional.elu(x) + 1, **EXACT)
    slopes = [torch.autograd.grad(y.sum(), x)[0] for y in (positive(x), nn.functional.elu(x) + 1)]
    torch.testing.assert_close(*slopes, **EXACT)
    low = torch.tensor([-17.0, -30.0, -80.0])
    torch.testing.assert_close(positive(low), low.exp(), rtol=1e-6, atol=0)
    assert positive(torch.tensor([1e4])).isfinite().all()


def test_embedded_means_and_spreads_are_normalised_sums_of_level_and_category():
    torch.manual_seed(0)
    made = GaussianEmbedding(n_levels=4, n_categories=3, width=WIDTH, initializer_range=1.0).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    levels, categories = torch.tensor([[0, 3], [2, 2]]), torch.tensor([[0, 1], [2, 0]])
    actual = made(levels, categories)
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        level, category = levels[row, column], categories[row, column]
        shared = made.category.weight[category]
        mean = literal_norm(made.mean_norm, made.mean.weight[level] + shared)
        spread = literal_norm(made.spread_norm, made.spread.weight[level] + shared)
        torch.testing.assert_close((actual[0][row, column], actual[1][row, column]), (mean, spread), **EXACT)


def literal_norm(norm, x):
    centred = x - x.mean()
    return centred / (centred.square().mean() + norm.eps).sqrt() * norm.weight + norm.bias


def literal_positive(x):
    return torch.where(x > 0, x, x.exp() - 1) + 1


# ---------------------------------------------------------------- attention


def attention(dtype=torch.double, **settings):
    """Large maps, so that weights are far from equal, and norms that differ from where they start."""
    torch.manual_seed(1)
    made = WassersteinAttention(**{"width": WIDTH, "n_heads": N_HEADS, "dropout": 0.0} | settings)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return made.to(dtype)


def sessions(*lengths, seed=0):
    """Mean and spread [B, L, D], valid [B, L] and last [B]; anything stands in the padding."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths), WIDTH)
    mean, spread = (torch.randn(shape, generator=generator, dtype=torch.double).requires_grad_() for _ in range(2))
    lengths = torch.tensor(lengths)
    return mean, spread, torch.arange(max(lengths)) < lengths.unsqueeze(1), lengths - 1


def literal_attention(made, mean, spread, valid, last, residual=None, drop=lambda x: x):
    """Every position of every session as a query, one head and one pair at a time; then the last is read."""
    size, means, variances = WIDTH // N_HEADS, [], []
    for b in range(len(mean)):
        q_mean, k_mean, v_mean = made.mean_qkv(mean[b]).chunk(3, dim=-1)  # [L, D] each
        q_var, k_var, v_var = literal_positive(made.spread_qkv(literal_positive(spread[b]))).chunk(3, dim=-1)
        keys = valid[b].nonzero().flatten().tolist()
        new_means, new_variances = [], []
        for i in range(mean.shape[1]):
            heads = []
            for head in range(N_HEADS):
                own = slice(head * size, (head + 1) * size)
                pairs = [(q_mean[i, own], q_var[i, own], k_mean[j, own], k_var[j, own]) for j in keys]
                distances = torch.stack([literal_distance(*pair) for pair in pairs])
                weights = drop((-distances / math.sqrt(size)).softmax(0))
                heads.append(
                    (
                        sum(weight * v_mean[j, own] for weight, j in zip(weights, keys, strict=True)),
                        sum(weight**2 * v_var[j, own] for weight, j in zip(weights, keys, strict=True)),
                    )
                )
            new_mean, new_variance = (torch.cat(parts) for parts in zip(*heads, strict=True))
            base = (mean[b, i], spread[b, i]) if residual is None else (residual[0][b], residual[1][b])
            new_means.append(literal_norm(made.mean_norm, drop(made.mean_out(new_mean)) + base[0]))
            new_spread = literal_norm(made.spread_norm, drop(made.spread_out(new_variance)) + base[1])
            new_variances.append(literal_positive(new_spread))
        means.append(new_means[last[b]])
        variances.append(new_variances[last[b]])
    return Gaussian(torch.stack(means), torch.stack(variances))


def gradients(made, gaussian, inputs):
    directions = torch.randn(2, *gaussian.mean.shape, generator=torch.Generator().manual_seed(3), dtype=torch.double)
    scalar = (gaussian.mean * directions[0] + gaussian.variance * directions[1]).sum()
    return torch.autograd.grad(scalar, [*inputs, *made.parameters()])


@pytest.mark.parametrize("lengths", [(1,), (4,), (3, 1, 5)])
@pytest.mark.parametrize("use_residual", [False, True])
def test_attention_at_the_last_position_equals_attention_at_all_of_them(lengths, use_residual):
    made, (mean, spread, valid, last) = attention(), sessions(*lengths)
    residual = [torch.randn(len(lengths), WIDTH, dtype=torch.double).requires_grad_() for _ in range(2)]
    residual = tuple(residual) if use_residual else None
    actual = made(mean, spread, valid, last, residual)
    expected = literal_attention(made, mean, spread, valid, last, residual)
    torch.testing.assert_close(actual, expected, **EXACT)
    inputs = (mean, spread, *(residual or ()))
    torch.testing.assert_close(gradients(made, actual, inputs), gradients(made, expected, inputs), **EXACT)


class Halve(nn.Module):
    """In the place of dropout: it shows where dropout is, without chance."""

    def forward(self, x):
        return x / 2


def test_dropout_is_on_weights_before_they_are_squared_and_on_both_outputs():
    made, inputs = attention(), sessions(3, 1, 5)
    made.dropout = Halve()
    expected = literal_attention(made, *inputs, drop=Halve())
    torch.testing.assert_close(made(*inputs), expected, **EXACT)


def test_dropout_acts_in_training_only():
    made, inputs = attention(dropout=0.5), sessions(4, 4)
    first, second = made(*inputs), made(*inputs)
    assert not torch.equal(first.mean, second.mean) and not torch.equal(first.variance, second.variance)
    torch.testing.assert_close(made.eval()(*inputs), attention()(*inputs), rtol=0, atol=0)


def test_padding_and_batch_mates_change_nothing():
    made, (mean, spread, valid, last) = attention(), sessions(3, 1, 5)
    expected = made(mean, spread, valid, last)
    for b, length in enumerate((3, 1, 5)):
        alone = made(*(tensor[b : b + 1, :length] for tensor in (mean, spread, valid)), last[b : b + 1])
        torch.testing.assert_close(alone.mean[0], expected.mean[b], **EXACT)
        torch.testing.assert_close(alone.variance[0], expected.variance[b], **EXACT)
    noisy = [torch.where(valid.unsqueeze(-1), x, 1e3) for x in (mean, spread)]
    longer = [torch.cat([x, torch.full((3, 2, WIDTH), -50.0)], dim=1) for x in noisy]
    more_valid = torch.cat([valid, torch.zeros(3, 2, dtype=torch.bool)], dim=1)
    torch.testing.assert_close(made(*longer, more_valid, last), expected, **EXACT)


def test_what_padding_holds_gets_no_gradient():
    made, (mean, spread, valid, last) = attention(), sessions(3, 1, 5)
    by_mean, by_spread, *_ = gradients(made, made(mean, spread, valid, last), (mean, spread))
    assert not by_mean[~valid].any() and not by_spread[~valid].any()
    assert by_mean[valid].any(1).all() and by_spread[valid].any(1).all()


def test_the_order_of_the_other_items_does_not_matter_but_the_last_does():
    made, (mean, spread, valid, last) = attention(), sessions(5)
    expected = made(mean, spread, valid, last)
    order = torch.tensor([2, 0, 3, 1, 4])
    torch.testing.assert_close(made(mean[:, order], spread[:, order], valid, last), expected, **EXACT)
    order = torch.tensor([0, 1, 2, 4, 3])
    assert not torch.allclose(made(mean[:, order], spread[:, order], valid, last).mean, expected.mean)


def test_a_last_item_that_may_not_be_attended_to_still_asks():
    made, (mean, spread, valid, last) = attention(), sessions(4)
    valid = valid.clone()
    valid[0, 3] = False
    expected = literal_attention(made, mean, spread, valid, last)
    torch.testing.assert_close(made(mean, spread, valid, last), expected, **EXACT)


def test_one_item_alone_gets_its_own_value():
    made, (mean, spread, valid, last) = attention(), sessions(1)
    value = made.mean_qkv(mean[0])[:, 2 * WIDTH :]
    expected = literal_norm(made.mean_norm, (made.mean_out(value) + mean[0])[0])
    torch.testing.assert_close(made(mean, spread, valid, last).mean[0], expected, **EXACT)


def test_far_apart_gaussians_stay_finite():
    made, (mean, spread, valid, last) = attention(torch.float), sessions(3, 5)
    inputs = [(scale * x.detach().float()).requires_grad_() for scale, x in ((1e4, mean), (50, spread))]
    result = made(*inputs, valid, last)
    found = gradients(made, result, inputs)
    assert all(x.isfinite().all() for x in (*result, *found)) and (result.variance > 0).all()


def test_attention_compares_in_float32_under_autocast():
    """Whole numbers survive bfloat16, but not the differences of their squares."""
    made = WassersteinAttention(width=4, n_heads=1, dropout=0.0)
    made.mean_out = made.mean_norm = nn.Identity()
    with torch.no_grad():
        for maps in (made.mean_qkv, made.spread_qkv):
            maps.weight.copy_(torch.eye(4).repeat(3, 1))
        made.mean_qkv.bias[8:] = -100  # small values, so that their rounding is small, too
    mean = torch.tensor([[100.0, 99], [101, 102], [103, 98], [101, 100]]).repeat(1, 2).unsqueeze(0)
    inputs = (mean, torch.zeros_like(mean), torch.ones(1, 4, dtype=torch.bool), torch.tensor([3]))
    residual = (torch.zeros(1, 4), torch.zeros(1, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = made(*inputs, residual).mean.float()
    weights = torch.tensor([-4.0, -8, -16, 0]).div(2).softmax(0)  # squared distances from the last, by sqrt(4)
    torch.testing.assert_close(actual[0], weights @ (mean[0] - 100), rtol=0.01, atol=0.01)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match=r"n_heads \(4\) must divide width \(6\)"):
        attention(n_heads=4)
