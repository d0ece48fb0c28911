import copy
import math
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from recbole_mm.model import pivots as pivots_module
from recbole_mm.model.pivots import PivotTransformer, Pool

WIDTH, N_HEADS, N_PIVOTS = 6, 2, 2  # so that masks are no multiple of 4 long
LENGTHS = (3, 1, 2)  # F of each stream
EXACT = {"rtol": 1e-10, "atol": 1e-11}


def transformer(dtype=torch.double, **settings):
    """Every bias and gain differs from where it starts, so that each of them matters."""
    torch.manual_seed(1)
    small = {"width": WIDTH, "n_streams": 2, "n_rounds": 2, "n_heads": N_HEADS, "inner_size": 6}
    made = PivotTransformer(**small | settings)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return made.to(dtype)


def inputs(n_items, n_streams=2, *, per_item=False, dtype=torch.double, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(n_items, N_PIVOTS) if per_item else (N_PIVOTS,), *((n_items, length) for length in LENGTHS[:n_streams])]
    made = [torch.randn(*shape, WIDTH, generator=generator, dtype=torch.double) for shape in shapes]
    pivots, *streams = (tensor.to(dtype).requires_grad_() for tensor in made)
    return pivots, streams


def literal(made, pivots, streams, dropped=None):
    """One item, layer and head at a time, as the equations have it; autograd does the rest."""
    finals = []
    for item in range(len(streams[0])):
        p, x = (pivots if pivots.dim() == 2 else pivots[item]), [stream[item] for stream in streams]
        for number in range(made.n_rounds * made.n_streams):
            stream = number % made.n_streams
            z = torch.cat([p, x[stream]])  # [T, D]
            masks = (None, None) if dropped is None else [mask[item] for mask in dropped[number]]
            out = literal_layer(made, number, z, masks)
            p, x[stream] = (p + out[: len(p)]) / 2, x[stream] + out[len(p) :]
        finals.append(p)
    return torch.stack(finals)


def literal_layer(made, number, z, dropped):
    size = WIDTH // N_HEADS
    q, k, v = (z @ made.qkv_weight[number].T + made.qkv_bias[number]).chunk(3, dim=1)  # [T, D] each
    heads = []
    for head in range(N_HEADS):
        own = slice(head * size, (head + 1) * size)
        exps = (q[:, own] @ k[:, own].T / math.sqrt(size)).exp()  # [query, key]
        heads.append(exps / exps.sum(1 if made.softmax_over == "keys" else 0, keepdim=True) @ v[:, own])
    attended = torch.cat(heads, dim=1) @ made.out_weight[number].T
    z1 = literal_norm(made, number, 0, z + without(attended, dropped[0], made.dropout))
    inner = (z1 @ made.inner_weight[number].T + made.inner_bias[number]).clamp_min(0)
    outer = inner @ made.outer_weight[number].T + made.outer_bias[number]
    return literal_norm(made, number, -1, z1 + without(outer, dropped[1], made.dropout))


def literal_norm(made, number, index, x):
    centred = x - x.mean(1, keepdim=True)
    normed = centred / (centred.square().mean(1, keepdim=True) + made.eps).sqrt()
    return normed * made.norm_weight[number, index] + made.norm_bias[number, index]


def without(x, dropped, rate):
    """The mask may have fewer rows than x: those of the others nobody reads."""
    if dropped is None:
        return x
    return torch.cat([x[: len(dropped)] * ~dropped / (1 - rate), x[len(dropped) :]])


def masks_of(result, made):
    """What a forward pass dropped: for each layer and sub-layer, [N, rows, D]."""
    slices = result.grad_fn.kept
    n_items = [len(layers[0].z) for layers in slices]
    return [
        [
            torch.cat(
                [layers[number].remain[part].view(n, -1, WIDTH) == 0 for layers, n in zip(slices, n_items, strict=True)]
            )
            for part in range(2)
        ]
        for number in range(len(slices[0]))
    ]


def gradients(result, made, pivots, streams):
    """Of everything that goes in, along a fixed direction."""
    return torch.autograd.grad(scalar(result), [pivots, *streams, *made.parameters()])


def scalar(result):
    direction = torch.randn(result.shape, generator=torch.Generator().manual_seed(7), dtype=torch.double)
    return (result * direction).sum()


def value_and_gradients(made, pivots, streams):
    result = made(pivots, streams)
    return result, gradients(result, made, pivots, streams)


def held(made):
    """Buffers that wait to be used again."""
    return [tensor for free in made._pool._free.values() for tensor in free]


def size_held(made):
    return sum(tensor.nbytes for tensor in held(made))


# ---------------------------------------------------------------- values and gradients


@pytest.mark.parametrize("softmax_over", ["keys", "queries"])
@pytest.mark.parametrize("shared_norm", [False, True])
@pytest.mark.parametrize("n_streams", [1, 2, 3])
@pytest.mark.parametrize(("per_item", "n_items", "slice_size"), [(False, 5, 2), (True, 3, 512)])
def test_the_tower_equals_one_item_at_a_time(softmax_over, shared_norm, n_streams, per_item, n_items, slice_size):
    made = transformer(n_streams=n_streams, softmax_over=softmax_over, shared_norm=shared_norm, slice_size=slice_size)
    pivots, streams = inputs(n_items, n_streams, per_item=per_item)
    actual, expected = made(pivots, streams), literal(made, pivots, streams)
    torch.testing.assert_close(actual, expected, **EXACT)
    torch.testing.assert_close(
        gradients(actual, made, pivots, streams), gradients(expected, made, pivots, streams), **EXACT
    )


@pytest.mark.parametrize("softmax_over", ["keys", "queries"])
def test_gradients_are_those_of_central_differences(softmax_over):
    made = transformer(softmax_over=softmax_over, n_rounds=1, inner_size=3)
    pivots, streams = inputs(2)
    names, parameters = zip(*made.named_parameters(), strict=True)

    def run(pivots, first, second, *parameters):
        weights = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(made, weights, (pivots, [first, second]))

    assert torch.autograd.gradcheck(
        lambda *tensors: Anew.apply(run, *tensors), (pivots, *streams, *parameters), fast_mode=True
    )


class Anew(torch.autograd.Function):
    """A forward pass for every backward pass: gradcheck asks one graph for several."""

    @staticmethod
    def forward(ctx, run, *tensors):
        ctx.run = run
        ctx.save_for_backward(*tensors)
        return run(*tensors)

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            tensors = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
            return None, *torch.autograd.grad(ctx.run(*tensors), tensors, grad)


@pytest.mark.parametrize("per_item", [False, True])
@pytest.mark.parametrize("slice_size", [1, 3, 6, 7])
def test_slices_do_not_matter(slice_size, per_item):
    pivots, streams = inputs(7, per_item=per_item)
    expected = value_and_gradients(transformer(), pivots, streams)
    actual = value_and_gradients(transformer(slice_size=slice_size), pivots, streams)
    torch.testing.assert_close(actual, expected, **EXACT)


def test_weights_of_a_query_sum_to_one_over_keys_or_those_of_a_key_over_queries():
    """Where all values are alike, an average over keys is that value, and queries and keys do not matter."""
    for softmax_over in ("keys", "queries"):
        made, (pivots, streams) = transformer(softmax_over=softmax_over), inputs(3)
        results = []
        with torch.no_grad():
            made.qkv_weight[:, 2 * WIDTH :] = 0
            results.append(made(pivots, streams))
            made.qkv_weight[:, : 2 * WIDTH] *= 2
            results.append(made(pivots, streams))
        assert torch.allclose(*results, **EXACT) == (softmax_over == "keys")
        for kept in made(pivots, streams).grad_fn.kept[0]:
            torch.testing.assert_close(kept.weights.sum(1), torch.ones_like(kept.weights[:, 0]))


def test_float32_is_close_to_float64():
    exact = value_and_gradients(transformer(), *inputs(30))
    rounded = value_and_gradients(transformer(torch.float), *inputs(30, dtype=torch.float))
    torch.testing.assert_close(rounded[0].double(), exact[0], rtol=1e-5, atol=1e-5)
    for actual, expected in zip(rounded[1], exact[1], strict=True):
        assert (actual - expected).norm() <= 1e-5 * (expected.norm() + 1)


def test_strides_do_not_matter():
    made, (pivots, streams) = transformer(slice_size=2), inputs(5)
    turned = [stream.detach().transpose(0, 1).contiguous().requires_grad_() for stream in streams]  # [F, N, D]
    made(pivots, streams).sum().backward()
    made(pivots, [stream.transpose(0, 1) for stream in turned]).sum().backward()
    for actual, expected in zip(turned, streams, strict=True):
        torch.testing.assert_close(actual.grad.transpose(0, 1), expected.grad)


def test_no_items_have_no_pivots_and_no_gradient():
    made, (pivots, streams) = transformer(), inputs(0)
    result, grads = value_and_gradients(made, pivots, streams)
    assert result.shape == (0, N_PIVOTS, WIDTH)
    assert not any(grad.any() for grad in grads)


# ---------------------------------------------------------------- dropout


@pytest.mark.parametrize("softmax_over", ["keys", "queries"])
@pytest.mark.parametrize("slice_size", [2, 512])
def test_backward_drops_what_forward_dropped(softmax_over, slice_size):
    made, (pivots, streams) = transformer(dropout=0.25, softmax_over=softmax_over, slice_size=slice_size), inputs(5)
    actual = made(pivots, streams)
    expected = literal(made, pivots, streams, masks_of(actual, made))
    torch.testing.assert_close(actual, expected, **EXACT)
    torch.testing.assert_close(
        gradients(actual, made, pivots, streams), gradients(expected, made, pivots, streams), **EXACT
    )


@pytest.mark.parametrize("rate", [0.1, 0.75])
def test_dropout_drops_the_stated_share_and_keeps_the_mean(rate):
    torch.manual_seed(0)
    made, (pivots, streams) = transformer(dropout=rate, slice_size=50), inputs(333)
    masks = masks_of(made(pivots, streams), made)
    for dropped in (mask for layer in masks for mask in layer):
        n = dropped.numel()
        assert dropped.double().mean().item() == pytest.approx(rate, abs=5 * math.sqrt(rate * (1 - rate) / n) + 1e-5)
    first, second = masks[0]
    assert not torch.equal(first, second) and not torch.equal(first, masks[1][0][:, : first.shape[1]])


@pytest.mark.parametrize("rate", [0.1, 0.75])
def test_a_sub_layer_adds_on_average_what_it_adds_without_dropout(rate):
    n_items = 2000
    made, (pivots, streams) = transformer(dropout=rate, slice_size=n_items), inputs(1)
    alike = [stream.expand(n_items, -1, -1) for stream in streams]
    entry = made(pivots, alike).grad_fn.kept[0][0].before_1.view(n_items, -1)  # after one sub-layer, before its norm
    expected = made.eval()(pivots, streams).grad_fn.kept[0][0].before_1.flatten()
    error = 5 * entry.std(0) / math.sqrt(len(entry))
    assert ((entry.mean(0) - expected).abs() <= error).all() and (error > 0).all()


def test_dropout_is_off_in_evaluation_and_the_seed_governs_it():
    dropping, (pivots, streams) = transformer(dropout=0.5), inputs(4)
    plain = transformer()(pivots, streams)
    torch.testing.assert_close(dropping.eval()(pivots, streams), plain, rtol=0, atol=0)
    dropping.train()
    draws = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        draws.append(dropping(pivots, streams))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], plain)


# ---------------------------------------------------------------- buffers


@pytest.mark.parametrize("softmax_over", ["keys", "queries"])
def test_nothing_is_read_from_a_buffer_before_it_is_written(softmax_over, monkeypatch):
    def run():
        torch.manual_seed(3)
        return value_and_gradients(transformer(dropout=0.3, softmax_over=softmax_over, slice_size=2), *inputs(5))

    expected, take = run(), Pool.take

    def spoilt(*args, **kwargs):
        buffer = take(*args, **kwargs)
        return buffer.fill_(torch.nan if buffer.is_floating_point() else 7)

    monkeypatch.setattr(Pool, "take", spoilt)
    torch.testing.assert_close(run(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_steps_use_the_first_steps_buffers_again(dropout):
    made, (pivots, streams) = transformer(dropout=dropout, slice_size=2), inputs(5)
    made(pivots, streams).sum().backward()
    first = sorted(tensor.data_ptr() for tensor in held(made))
    for _ in range(2):
        with torch.no_grad():
            made(pivots, streams)
        made(pivots, streams).sum().backward()
        assert sorted(tensor.data_ptr() for tensor in held(made)) == first


def test_two_forward_passes_before_their_backward_passes_share_nothing():
    made, first, second = transformer(slice_size=2), inputs(5, seed=1), inputs(5, seed=2)
    expected = [value_and_gradients(transformer(slice_size=2), *of)[1] for of in (first, second)]
    made(*first).sum().backward()  # so that there are buffers to fight for
    for order in ((0, 1), (1, 0)):
        results = [made(*first), made(*second)]
        actual = {number: gradients(results[number], made, *(first, second)[number]) for number in order}
        torch.testing.assert_close([actual[0], actual[1]], expected, rtol=0, atol=0)


def test_a_forward_pass_without_a_backward_pass_leaves_nothing_behind():
    made, (pivots, streams) = transformer(slice_size=2), inputs(40)
    sizes = []
    for _ in range(3):
        made(pivots, streams)
        sizes.append(size_held(made))
    expected = value_and_gradients(transformer(), pivots, streams)
    torch.testing.assert_close(value_and_gradients(made, pivots, streams), expected, **EXACT)
    assert sizes[0] == sizes[1] == sizes[2] < size_held(made) / 5


def test_without_gradients_memory_does_not_grow_with_the_items_or_layers():
    sizes = []
    for n_items, n_rounds in ((4, 2), (40, 2), (4, 5)):
        made = transformer(slice_size=4, n_rounds=n_rounds)
        with torch.no_grad():
            result = made(*inputs(n_items))
        assert result.grad_fn is None
        sizes.append(size_held(made))
    assert sizes[0] == sizes[1] == sizes[2] > 0


def test_buffers_of_other_numbers_of_items_are_not_kept():
    made = transformer(slice_size=4)
    for n_items in (9, 5, 6, 7, 11):
        made(*inputs(n_items)).sum().backward()
    fresh = transformer(slice_size=4)
    fresh(*inputs(11)).sum().backward()
    assert size_held(made) == size_held(fresh)


def test_a_second_backward_pass_is_an_error():
    made, (pivots, streams) = transformer(), inputs(3)
    result = made(pivots, streams).sum()
    result.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="pivot transformer a second time; run forward again"):
        result.backward()
    result = made(pivots, streams).sum()
    result.backward()
    with pytest.raises(RuntimeError, match="second time"):
        result.backward()


def test_a_second_derivative_is_an_error():
    made, (pivots, streams) = transformer(), inputs(3)
    (grad,) = torch.autograd.grad(made(pivots, streams).square().sum(), [pivots], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_weights_that_change_before_the_backward_pass_are_an_error():
    made, (pivots, streams) = transformer(), inputs(3)
    result = made(pivots, streams).sum()
    with torch.no_grad():
        made.inner_weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.backward()


# ---------------------------------------------------------------- surroundings


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("per_item", [False, True])
def test_checkpointed_chunks_give_the_same_gradients_and_keep_one_chunk(per_item, dropout):
    found, sizes = [], []
    for wrap in (lambda run, *args: run(*args), lambda run, *args: checkpoint(run, *args, use_reentrant=True)):
        made, (pivots, streams) = transformer(dropout=dropout, slice_size=3), inputs(48, per_item=per_item)
        parts = [stream.split(24) for stream in streams]
        pivot_parts = pivots.split(24) if per_item else [pivots] * 2
        torch.manual_seed(2)
        chunks = [wrap(lambda p, *x, made=made: made(p, x), p, *x) for p, *x in zip(pivot_parts, *parts, strict=True)]
        result = torch.cat(chunks)
        scalar(result).backward()
        found.append((result, [tensor.grad for tensor in (pivots, *streams, *made.parameters())]))
        sizes.append(size_held(made))
    torch.testing.assert_close(found[1], found[0], **EXACT)
    assert sizes[1] < 0.7 * sizes[0]


def test_autocast_changes_neither_type_nor_values():
    made, (pivots, streams) = transformer(torch.float), inputs(5, dtype=torch.bfloat16)
    pivots = pivots.detach().float().requires_grad_()
    expected = value_and_gradients(made, pivots, [stream.float() for stream in streams])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = value_and_gradients(made, pivots, streams)
    assert actual[0].dtype == torch.float and actual[1][1].dtype == torch.bfloat16
    torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=0)
    streams_too = [grad.bfloat16() if 1 <= i <= 2 else grad for i, grad in enumerate(expected[1])]
    torch.testing.assert_close(list(actual[1]), streams_too, rtol=0, atol=0)


def test_training_goes_on_after_inference_mode():
    made, (pivots, streams) = transformer(), inputs(5)
    with torch.inference_mode():
        evaluated = made(pivots, streams)
    torch.testing.assert_close(
        value_and_gradients(made, pivots, streams), value_and_gradients(transformer(), pivots, streams)
    )
    torch.testing.assert_close(evaluated.clone(), transformer()(pivots, streams).detach())


@pytest.mark.parametrize("per_item", [False, True])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_threads_work_in_the_mode_of_their_caller(two_threads, mode, per_item, monkeypatch):
    made, (pivots, streams) = transformer(slice_size=2), inputs(7, per_item=per_item)
    modes, layer_forward = [], pivots_module._layer_forward

    def noting(*args):
        modes.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
        return layer_forward(*args)

    monkeypatch.setattr(pivots_module, "_layer_forward", noting)
    with mode():
        evaluated = made(pivots, streams)
    assert set(modes) == {(mode is torch.inference_mode, False)}
    trained, found = value_and_gradients(made, pivots, streams)
    assert modes[-1] == (False, False)
    torch.testing.assert_close(evaluated.clone(), trained.detach())
    torch.set_num_threads(1)
    torch.testing.assert_close(found, value_and_gradients(transformer(slice_size=2), pivots, streams)[1], **EXACT)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
def test_copies_have_the_weights_and_no_buffers(copied):
    made, (pivots, streams) = transformer(dropout=0.2).eval(), inputs(5)
    expected = value_and_gradients(made, pivots, streams)
    copy_of = copied(made)
    assert held(made) and not held(copy_of)
    torch.testing.assert_close(value_and_gradients(copy_of, pivots, streams), expected, rtol=0, atol=0)


def test_another_type_after_the_first_steps():
    made = transformer(torch.float)
    made(*inputs(5, dtype=torch.float)).sum().backward()
    made.zero_grad()
    made.double()
    assert not held(made)
    pivots, streams = inputs(5)
    result = made(pivots, streams)
    assert result.dtype == torch.double
    torch.testing.assert_close(result, literal(made, pivots, streams), **EXACT)


def test_nothing_but_parameters_is_saved():
    made = transformer()
    made(*inputs(3)).sum().backward()
    assert made.state_dict().keys() == dict(made.named_parameters()).keys()


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match=r"n_heads \(4\) must divide width \(6\)"):
        transformer(n_heads=4)
    with pytest.raises(ValueError, match="softmax_over is 'values', expected keys or queries"):
        transformer(softmax_over="values")
    for dropout in (1.0, -0.1):
        with pytest.raises(ValueError, match=f"dropout is {dropout}, expected at least 0 and less than 1"):
            transformer(dropout=dropout)


def test_inputs_that_do_not_fit_are_refused():
    made, (pivots, streams) = transformer(), inputs(4)
    with pytest.raises(ValueError, match="got 1 streams, expected n_streams, 2"):
        made(pivots, streams[:1])
    with pytest.raises(ValueError, match=r"streams and pivots have \[3, 4\] items, expected the same number"):
        made(pivots, [streams[0][:3], streams[1]])
    with pytest.raises(ValueError, match=r"\[1, 4\] items"):
        made(pivots.unsqueeze(0), streams)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("per_item", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_threads_change_neither_values_nor_gradients_nor_what_is_dropped(two_threads, dropout, per_item):
    made, (pivots, streams) = transformer(dropout=dropout, slice_size=2), inputs(7, per_item=per_item)
    found = []
    for n_threads in (2, 1):
        torch.set_num_threads(n_threads)
        torch.manual_seed(5)
        found.append(value_and_gradients(made, pivots, streams))
    torch.testing.assert_close(found[0], found[1], **EXACT)


def test_threads_leave_the_settings_of_torch_as_they_were(two_threads):
    made, (pivots, streams) = transformer(slice_size=2), inputs(7)
    made(pivots, streams).sum().backward()
    assert torch.get_num_threads() == 2 and torch.is_grad_enabled()


def test_an_error_in_a_thread_is_raised(two_threads, monkeypatch):
    made, (pivots, streams) = transformer(slice_size=2), inputs(7)
    monkeypatch.setattr("recbole_mm.model.pivots._layer_forward", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made(pivots, streams)
    assert torch.get_num_threads() == 2
