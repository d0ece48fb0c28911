"""The softmax in chunks and over sampled items, against sums written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from recbole_mm.errors import SettingError
from recbole_mm.model import find_model, softmax
from recbole_mm.model.sampling import NegativeSampler, sampling_weights
from recbole_mm.model.softmax import chunked_softmax_loss, refuse_softmax, sampled_softmax_loss

B, N, D, TEMPERATURE = 9, 23, 4, 0.5


def drawn_vectors(dtype=torch.double):
    generator = torch.Generator().manual_seed(0)
    queries, vectors = (torch.randn(n, D, generator=generator, dtype=dtype).requires_grad_() for n in (B, N))
    return queries, vectors, torch.randint(1, N, (B,), generator=generator)


def literal_loss(queries, vectors, target, left_out=()):
    """Mean over the rows of log(sum over the items of exp(logit)) - own logit."""
    total = 0.0
    for query, own in zip(queries, target.tolist(), strict=True):
        logits = [query @ vector / TEMPERATURE for vector in vectors]
        classes = [logit.exp() for item, logit in enumerate(logits) if item not in left_out]
        total = total + sum(classes).log() - logits[own]
    return total / len(queries)


@pytest.mark.parametrize("left_out", [(), (0,), (0, 1, 2, 22)], ids=["all", "padding", "a-whole-chunk"])
@pytest.mark.parametrize(("chunk", "fewest"), [(1, 64), (3, 64), (N, 64), (N + 5, 64), (6, 2), (12, 4)])
def test_the_softmax_in_chunks_is_the_full_one_in_value_and_gradient(chunk, fewest, left_out, monkeypatch):
    monkeypatch.setattr(softmax, "FEWEST_ROWS", fewest)  # of rows and items at a time, each is taken in some cases
    queries, vectors, target = drawn_vectors()
    target = torch.where(torch.isin(target, torch.tensor(left_out, dtype=torch.long)), 5, target)
    mask = torch.zeros(N, dtype=torch.bool)
    mask[list(left_out)] = True
    actual = chunked_softmax_loss(
        queries, vectors, target, temperature=TEMPERATURE, chunk=chunk, left_out=mask if left_out else None
    )
    expected = literal_loss(queries, vectors, target, left_out)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(3 * loss, (queries, vectors)) for loss in (actual, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


def test_both_ways_are_taken_and_logits_of_thousands_do_not_overflow(monkeypatch):
    taken = []
    for name in ("_RowsAtATime", "_ItemsAtATime"):
        way = getattr(softmax, name)
        monkeypatch.setattr(
            way, "apply", lambda *args, way=way, name=name, f=way.apply: (taken.append(name), f(*args))[1]
        )
    queries, vectors, target = drawn_vectors()
    losses = [
        chunked_softmax_loss(1e3 * queries, vectors, target, temperature=TEMPERATURE, chunk=chunk) for chunk in (2, N)
    ]
    assert taken == ["_ItemsAtATime", "_RowsAtATime"]
    expected = torch.nn.functional.cross_entropy(1e3 * queries @ vectors.T / TEMPERATURE, target)
    torch.testing.assert_close(losses, [expected, expected])


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else [out]:
            if isinstance(each, torch.Tensor):
                self.largest = max(self.largest, each.numel())
        return out


@pytest.mark.parametrize("chunk", [50, 1200])
def test_there_are_never_more_logits_than_rows_times_chunk(chunk):
    queries, vectors = torch.randn(100, 2, requires_grad=True), torch.randn(2000, 2, requires_grad=True)
    target = torch.randint(1, 2000, (100,))
    with Largest() as seen:
        chunked_softmax_loss(queries, vectors, target, temperature=1.0, chunk=chunk).backward()
    assert seen.largest <= max(100 * chunk, vectors.numel()) < 100 * 2000


def test_losses_are_float32_at_least_autocast_or_not():
    queries, vectors, target = drawn_vectors(torch.float)
    arguments = (queries.bfloat16(), vectors.bfloat16())
    expected = torch.nn.functional.cross_entropy(arguments[0].float() @ arguments[1].float().T / TEMPERATURE, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        chunked = chunked_softmax_loss(*arguments, target, temperature=TEMPERATURE, chunk=4)
        sampled = sampled_softmax_loss(*arguments, target, torch.zeros(N), temperature=TEMPERATURE)
    assert chunked.dtype == sampled.dtype == torch.float32
    torch.testing.assert_close([chunked, sampled], [expected, expected], rtol=1e-5, atol=1e-5)


# ------------------------------------------------ sampled


def test_every_item_drawn_once_and_uniformly_is_the_full_softmax():
    queries, vectors, target = drawn_vectors()
    # N draws of q = 1/N are expected to hit each item once.
    actual = sampled_softmax_loss(queries, vectors, target, torch.zeros(N), temperature=TEMPERATURE)
    expected = literal_loss(queries, vectors, target)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, (queries, vectors)) for loss in (actual, expected)))


def test_a_literal_sum_over_draws_is_the_sampled_softmax():
    queries, vectors, target = drawn_vectors()
    sampler = NegativeSampler(torch.arange(N), n_drawn=7)
    torch.manual_seed(1)
    ids, correction = sampler.draw()
    columns = torch.cat([target, ids]).unique()
    full_correction = torch.full((len(columns),), -torch.inf, dtype=torch.double)
    full_correction[torch.searchsorted(columns, ids)] = correction.double()
    actual = sampled_softmax_loss(
        queries, vectors[columns], torch.searchsorted(columns, target), full_correction, temperature=TEMPERATURE
    )
    torch.manual_seed(1)
    places = torch.searchsorted(sampler.upto, torch.rand(7, dtype=torch.double) * sampler.upto[-1], right=True)
    drawn = sampler.drawable[places].tolist()  # with repetitions
    probability = torch.arange(N) / (N * (N - 1) / 2)
    total = 0.0
    for query, own in zip(queries, target.tolist(), strict=True):
        logit = query @ vectors[own] / TEMPERATURE
        negatives = [  # accidental hits taken out
            (query @ vectors[item] / TEMPERATURE).exp() / (7 * probability[item]) for item in drawn if item != own
        ]
        total = total + (logit.exp() + sum(negatives)).log() - logit
    torch.testing.assert_close(actual, total / B, rtol=1e-6, atol=0)  # the corrections are float32


@pytest.mark.parametrize("kind", ["popularity", "uniform"])
def test_the_more_are_drawn_the_closer_the_gradient_comes_to_the_full_one(kind):
    queries, vectors, target = drawn_vectors()
    exact = torch.autograd.grad(literal_loss(queries, vectors, target), (queries, vectors))
    torch.manual_seed(0)
    weights = sampling_weights(kind, target, torch.ones(N, dtype=torch.bool))
    apart = []
    for n_drawn in (20, 2_000, 200_000):
        sampler = NegativeSampler(weights, n_drawn=n_drawn)
        errors = []
        for _ in range(5):
            ids, correction = sampler.draw()
            of_all = torch.full((N,), -torch.inf, dtype=torch.double).index_copy(0, ids, correction.double())
            loss = sampled_softmax_loss(queries, vectors, target, of_all, temperature=TEMPERATURE)
            errors.append(
                sum(
                    (a - b).square().sum()
                    for a, b in zip(torch.autograd.grad(loss, (queries, vectors)), exact, strict=True)
                )
            )
        apart.append(math.sqrt(sum(errors) / len(errors)))
    size = math.sqrt(sum(gradient.square().sum() for gradient in exact))
    assert apart[2] < apart[1] < apart[0] and apart[2] < 0.02 * size
    assert 3 < apart[1] / apart[2] < 30  # as the root of the number of draws


# ------------------------------------------------ refusals


def test_a_model_whose_scores_are_no_products_keeps_the_full_softmax():
    for name in ("MMSBR", "ContentKNN", "SASRec"):
        with pytest.raises(
            SettingError, match=f"softmax chunked .from a file. does not go with {name}: it needs scores"
        ):
            refuse_softmax(find_model(name), "chunked", lazy=False, origin=" (from a file)")
        refuse_softmax(find_model(name), "full", lazy=False)
    refuse_softmax(find_model("MSM4SR"), "sampled", lazy=True)
    with pytest.raises(SettingError, match="lazy_item_embedding needs softmax sampled, found chunked"):
        refuse_softmax(find_model("MSM4SR"), "chunked", lazy=True)
