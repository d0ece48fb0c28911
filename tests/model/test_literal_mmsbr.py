"""The yardstick itself, against loops over single numbers, in float64."""

import math

import pytest
import torch
from torch import Tensor

from benchmarks.literal_mmsbr import LiteralMMSBR, PivotLayer, wasserstein

N_ITEMS, N_PRICES, N_CATEGORIES, WIDTH, N_HEADS = 12, 5, 3, 8, 2
SESSIONS = [[3, 1, 7], [12], [5, 5]]


def build(n_items: int = N_ITEMS, *, scale: float = 3.0, **settings) -> LiteralMMSBR:
    """Larger parameters than the release starts with, so that nothing is nearly constant."""
    torch.manual_seed(0)
    price, category = 1 + torch.arange(n_items) % N_PRICES, 1 + torch.arange(n_items) % N_CATEGORIES
    small = {"width": WIDTH, "n_heads": N_HEADS, "n_negatives": 5, **settings}
    model = LiteralMMSBR(n_items, N_PRICES, N_CATEGORIES, price, category, **small).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model


def padded(sessions: list[list[int]], length: int) -> tuple[Tensor, Tensor]:
    item_seq = torch.tensor([session + [0] * (length - len(session)) for session in sessions])
    return item_seq, torch.tensor([len(session) for session in sessions])


def affine(layer, x: list[float]) -> list[float]:
    weight = layer.weight.tolist()
    bias = [0.0] * len(weight) if layer.bias is None else layer.bias.tolist()
    return [b + sum(w * v for w, v in zip(row, x, strict=True)) for row, b in zip(weight, bias, strict=True)]


def norm(layer, x: list[float]) -> list[float]:
    mean = sum(x) / len(x)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in x) / len(x) + layer.eps)
    gains, biases = layer.weight.tolist(), layer.bias.tolist()
    return [(v - mean) / deviation * g + b for v, g, b in zip(x, gains, biases, strict=True)]


def added(a: list[float], b: list[float]) -> list[float]:
    return [x + y for x, y in zip(a, b, strict=True)]


def positive(x: list[float]) -> list[float]:
    return [v + 1 if v > 0 else math.exp(v) for v in x]


def distance(mean_a, variance_a, mean_b, variance_b) -> float:
    means = sum((a - b) ** 2 for a, b in zip(mean_a, mean_b, strict=True))
    return means + sum((math.sqrt(a) - math.sqrt(b)) ** 2 for a, b in zip(variance_a, variance_b, strict=True))


# ---------------------------------------------------------------- parameters


def test_every_parameter_starts_uniform_within_the_root_of_the_width():
    torch.manual_seed(0)
    ids = torch.ones(300, dtype=torch.long)
    model = LiteralMMSBR(300, 1, 1, ids, ids)
    for name, parameter in model.named_parameters():
        assert parameter.abs().max() <= 1 / 8, name
        assert len(parameter) == 1 or parameter.unique().numel() > parameter.numel() / 2, name
    assert 0.124 < model.image.weight.abs().max() <= 0.125


def test_parameters_are_eight_tables_and_the_rest():
    model = build()
    tables = [name for name, parameter in model.named_parameters() if parameter.shape == (N_ITEMS, WIDTH)]
    generated = ["image_from_text.weight", "text_from_image.weight"]
    assert sorted(tables) == sorted(
        [f"pivots.{k}.weight" for k in range(4)] + ["image.weight", "text.weight"] + generated
    )
    assert len(model.rounds) == 3


def test_every_parameter_gets_a_gradient():
    model = build()
    model.loss(*padded(SESSIONS, 3), torch.tensor([2, 3, 12])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        if (
            not name.endswith("query.bias") or "price" in name
        ):  # the same for all queries: a softmax over them ignores it
            assert parameter.grad.abs().max() > 0, name


def test_odd_layers_are_refused():
    with pytest.raises(ValueError, match="even"):
        build(n_layers=3)


# ---------------------------------------------------------------- items


def test_attention_of_pivots_sums_to_one_over_queries_not_keys():
    layer = build().rounds[0]["text"]
    weights = layer.attention_weights(torch.randn(N_ITEMS, 8, WIDTH, dtype=torch.double))
    torch.testing.assert_close(weights.sum(2), torch.ones(N_ITEMS, N_HEADS, 8, dtype=torch.double))
    assert (weights.sum(3) - 1).abs().max() > 0.1


def test_a_pivot_layer_equals_loops():
    torch.manual_seed(0)
    layer = PivotLayer(WIDTH, N_HEADS, 0.0).double()
    x = torch.randn(1, 3, WIDTH, dtype=torch.double)
    tokens, size = x[0].tolist(), WIDTH // N_HEADS
    q, k, v = ([affine(role, token) for token in tokens] for role in (layer.query, layer.key, layer.value))
    context = [[0.0] * WIDTH for _ in tokens]
    for head in range(N_HEADS):
        part = slice(head * size, (head + 1) * size)
        logits = [[sum(x * y for x, y in zip(a[part], b[part], strict=True)) / math.sqrt(size) for b in k] for a in q]
        exps = [[math.exp(value) for value in row] for row in logits]
        for i in range(3):
            for j in range(3):
                weight = exps[i][j] / sum(exps[query][j] for query in range(3))
                for d in range(size):
                    context[i][head * size + d] += weight * v[j][head * size + d]
    expected = []
    for token, mixed in zip(tokens, context, strict=True):
        middle = norm(layer.norm, added(token, affine(layer.output, mixed)))
        inner = [max(0.0, value) for value in affine(layer.widen, middle)]
        expected.append(norm(layer.norm, added(middle, affine(layer.narrow, inner))))
    torch.testing.assert_close(layer(x)[0], torch.tensor(expected, dtype=torch.double))


def test_pivots_go_halfway_and_sequences_add_up():
    model = build()
    pivots = [torch.randn(N_ITEMS, WIDTH, dtype=torch.double) for _ in range(4)]
    sequence = torch.randn(N_ITEMS, 4, WIDTH, dtype=torch.double)
    layer = torch.nn.Linear(WIDTH, WIDTH, bias=False).double()
    torch.nn.init.eye_(layer.weight)
    moved, longer = model.pivot_step(layer, pivots, sequence)  # what goes in comes out
    torch.testing.assert_close(moved, pivots)
    torch.testing.assert_close(longer, 2 * sequence)


def test_item_vectors_are_not_negative_and_not_constant():
    vectors = build().item_vectors()
    assert vectors.shape == (N_ITEMS, WIDTH)
    assert vectors.min() >= 0
    assert vectors.std(0).max() > 1e-3


def test_an_item_vector_depends_on_that_item_alone():
    model, fewer = build(), build(5)
    own = {name: p[:5] if p.shape == (N_ITEMS, WIDTH) else p for name, p in model.state_dict().items()}
    fewer.load_state_dict(own)
    torch.testing.assert_close(fewer.item_vectors(), model.item_vectors()[:5])


def test_text_comes_before_images():
    model = build(n_layers=2)
    calls = []
    for name, layer in model.rounds[0].items():
        layer.register_forward_hook(lambda *_, name=name: calls.append(name))
    model.item_vectors()
    assert calls == ["text", "image"]


# ---------------------------------------------------------------- contrastive loss


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_contrastive_loss_equals_loops(temperature):
    model = build(temperature=temperature)
    total = 0.0
    for real, generated in (("image", "image_from_text"), ("text", "text_from_image")):
        rows, columns = getattr(model, real).weight.tolist(), getattr(model, generated).weight.tolist()
        for i, row in enumerate(rows):
            logits = [sum(a * b for a, b in zip(row, column, strict=True)) / temperature for column in columns]
            total += math.log10(sum(math.exp(value) for value in sorted(logits)[-5:])) - math.log10(math.exp(logits[i]))
    assert model.contrastive().item() == pytest.approx(total, rel=1e-12)


# ---------------------------------------------------------------- prices


def test_wasserstein_distance_equals_loops_and_is_a_distance():
    torch.manual_seed(0)
    mean_a, mean_b = torch.randn(4, WIDTH, dtype=torch.double), torch.randn(3, WIDTH, dtype=torch.double)
    variance_a, variance_b = torch.rand_like(mean_a), torch.rand_like(mean_b)
    expected = [
        [distance(*a, *b) for b in zip(mean_b.tolist(), variance_b.tolist(), strict=True)]
        for a in zip(mean_a.tolist(), variance_a.tolist(), strict=True)
    ]
    actual = wasserstein(mean_a, variance_a, mean_b, variance_b)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.double))
    torch.testing.assert_close(actual, wasserstein(mean_b, variance_b, mean_a, variance_a).T)
    own = wasserstein(mean_a, variance_a, mean_a, variance_a)
    torch.testing.assert_close(own.diagonal(), torch.zeros(4, dtype=torch.double), atol=1e-12, rtol=0)


def test_prices_of_a_session_equal_loops():
    model = build()
    attention, session = model.price_attention, SESSIONS[0]
    size = WIDTH // N_HEADS
    levels = [(item - 1) % N_PRICES for item in session]
    mean_rows = [model.price_mean.weight[level].tolist() for level in levels]
    variance_rows = [model.price_variance.weight[level].tolist() for level in levels]
    categories = [norm(model.price_norm, model.category.weight[(i - 1) % N_CATEGORIES].tolist()) for i in session]
    mean = [added(norm(model.price_norm, row), c) for row, c in zip(mean_rows, categories, strict=True)]
    rows = [added(norm(model.price_norm, row), c) for row, c in zip(variance_rows, categories, strict=True)]
    variance = [positive(row) for row in rows]

    def parts(branch, x, role):
        x = affine(branch[role], x)
        return positive(x) if branch is attention.variance else x

    mean_context, variance_context = [], []
    for head in range(N_HEADS):
        part = slice(head * size, (head + 1) * size)
        query = [parts(attention.mean, mean[-1], "query")[part], parts(attention.variance, variance[-1], "query")[part]]
        keys = [
            [parts(attention.mean, m, "key")[part], parts(attention.variance, v, "key")[part]]
            for m, v in zip(mean, variance, strict=True)
        ]
        exps = [math.exp(-distance(*query, *key) / math.sqrt(size)) for key in keys]
        weights = [e / sum(exps) for e in exps]
        for d in range(part.start, part.stop):
            mean_context.append(
                sum(w * parts(attention.mean, m, "value")[d] for w, m in zip(weights, mean, strict=True))
            )
            variance_context.append(
                sum(w**2 * parts(attention.variance, v, "value")[d] for w, v in zip(weights, variance, strict=True))
            )
    expected_mean = norm(model.price_norm, added(affine(attention.mean["output"], mean_context), mean_rows[-1]))
    expected_variance = positive(
        norm(model.price_norm, added(affine(attention.variance["output"], variance_context), variance_rows[-1]))
    )
    actual_mean, actual_variance = model.price_session(*padded(SESSIONS, 4))
    torch.testing.assert_close(actual_mean[0], torch.tensor(expected_mean, dtype=torch.double))
    torch.testing.assert_close(actual_variance[0], torch.tensor(expected_variance, dtype=torch.double))


# ---------------------------------------------------------------- sessions and scores


def test_rows_of_padding_are_zero():
    model = build()
    table = torch.randn(N_ITEMS, WIDTH, dtype=torch.double)
    rows = model.gather(table, padded(SESSIONS, 4)[0])
    assert not rows[0, 3].any() and not rows[1, 1:].any() and not rows[2, 2:].any()
    torch.testing.assert_close(rows[0, :3], table[[2, 0, 6]])


def test_interest_equals_loops():
    model = build()
    items = torch.randn(N_ITEMS, WIDTH, dtype=torch.double)
    expected = []
    for session in SESSIONS:
        rows = [items[item - 1].tolist() for item in session]
        mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        total = [0.0] * WIDTH
        for row in rows:
            hidden = added(affine(model.interest_item, row), affine(model.interest_mean, mean))
            (weight,) = affine(model.interest_weight, [1 / (1 + math.exp(-value)) for value in hidden])
            total = added(total, [weight * value for value in row])
        expected.append(total)
    actual = model.interest(items, *padded(SESSIONS, 5))
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.double))


def test_scores_are_interest_times_one_plus_distance():
    model = build()
    item_seq, item_seq_len = padded(SESSIONS, 3)
    items = model.item_vectors()
    interest = model.interest(items, item_seq, item_seq_len)
    mean, variance = model.price_session(item_seq, item_seq_len)
    scores = model.scores(item_seq, item_seq_len)
    for b in range(len(SESSIONS)):
        for item in range(N_ITEMS):
            price, category = model.price_mean.weight[item % N_PRICES], model.category.weight[item % N_CATEGORIES]
            spread = model.price_variance.weight[item % N_PRICES] + category
            item_price = ((price + category).tolist(), positive(spread.tolist()))
            apart = distance(mean[b].tolist(), variance[b].tolist(), *item_price)
            expected = (interest[b] @ items[item]).item() * (1 + apart)
            assert scores[b, item].item() == pytest.approx(expected, rel=1e-10)


def test_padding_and_company_change_no_score():
    model = build()
    together = model.scores(*padded(SESSIONS, 6))
    for session, scores in zip(SESSIONS, together, strict=True):
        torch.testing.assert_close(model.scores(*padded([session], len(session)))[0], scores)


def test_order_matters_only_through_the_last_item():
    model = build()
    first, swapped, other = model.scores(*padded([[3, 1, 7], [1, 3, 7], [1, 7, 3]], 3))
    torch.testing.assert_close(first, swapped)
    assert (first - other).abs().max() > 1e-6


def test_dropout_is_on_in_training_alone():
    model = build()
    batch = padded(SESSIONS, 3)
    torch.testing.assert_close(model.scores(*batch), model.scores(*batch), rtol=0, atol=0)
    model.train()
    assert (model.scores(*batch) - model.scores(*batch)).abs().max() > 1e-6


def test_loss_is_cross_entropy_and_weighted_contrast():
    model = build(contrastive_weight=0.25)
    batch, target = padded(SESSIONS, 3), torch.tensor([2, 3, 12])
    rows = model.scores(*batch).tolist()
    terms = [
        math.log(sum(math.exp(s) for s in row)) - row[wanted - 1]
        for row, wanted in zip(rows, target.tolist(), strict=True)
    ]
    expected = sum(terms) / 3 + 0.25 * model.contrastive().item()
    assert model.loss(*batch, target).item() == pytest.approx(expected, rel=1e-12)


def test_evaluation_ranks_and_counts(monkeypatch):
    model = build()
    scores = torch.zeros(2, N_ITEMS).double()
    scores[0, 3], scores[0, 4], scores[1, 0] = 2.0, 1.0, 1.0
    monkeypatch.setattr(model, "scores", lambda *_: scores)
    ids = padded([[1], [1]], 1)
    found = model.evaluate([(*ids, torch.tensor([5, 1])), (*ids, torch.tensor([4, 1]))])  # ranks 2, 1 and 1, 1
    assert found["Prec@1"] == 0.75 and found["Prec@5"] == 1.0
    assert found["MRR@1"] == 0.75 and found["MRR@20"] == pytest.approx(3.5 / 4)
    assert found["NDCG@10"] == pytest.approx((3 + 1 / math.log2(3)) / 4)
