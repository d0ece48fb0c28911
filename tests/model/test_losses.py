import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from recbole_mm.model import losses as ours
from recbole_mm.model import msm4srreleased as released
from recbole_mm.model.losses import (
    BLOCK,
    cross_modality_loss,
    hard_negative_loss,
    largest,
    largest_log_sum_exp,
    next_item_loss,
)

TEMPERATURE = 0.07
EXACT = {"rtol": 0, "atol": 1e-10}


def vectors(n, seed):
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def cosine(a, b):
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def literal_nip(anchors, targets, target_ids):
    """The formula, pair by pair."""
    total = 0.0
    for i in range(len(targets)):
        above = sum(math.exp(cosine(anchor[i], targets[i]) / TEMPERATURE) for anchor in anchors)
        below = sum(
            math.exp(cosine(anchor[i], targets[j]) / TEMPERATURE)
            for anchor in anchors
            for j in range(len(targets))
            if j == i or target_ids[j] != target_ids[i]
        )
        total -= math.log(above / below)
    return total / len(targets)


def literal_cmcl(text, image):
    total = 0.0
    for own, other in ((text, image), (image, text)):
        for i in range(len(own)):
            below = sum(math.exp(cosine(own[i], other[j]) / TEMPERATURE) for j in range(len(own)))
            below += sum(math.exp(cosine(own[i], own[j]) / TEMPERATURE) for j in range(len(own)) if j != i)
            total -= math.log(math.exp(cosine(own[i], other[i]) / TEMPERATURE) / below)
    return total / len(text) / 2


@pytest.mark.parametrize("n_anchors", [1, 2])
@pytest.mark.parametrize("target_ids", [[1, 2, 3, 4, 5], [7, 2, 7, 7, 2], [3, 3, 3, 3, 3]])
def test_next_item_loss_equals_the_formula(n_anchors, target_ids):
    anchors, targets = [vectors(5, seed) for seed in range(n_anchors)], vectors(5, 9)
    ids = torch.tensor(target_ids)
    actual = next_item_loss(anchors, targets, temperature=TEMPERATURE, same_target=ids.unsqueeze(1) == ids)
    assert actual.item() == pytest.approx(literal_nip(anchors, targets, target_ids), abs=1e-9)


def test_without_same_target_every_other_row_is_a_negative():
    anchor, targets = vectors(4, 0), vectors(4, 1)
    actual = next_item_loss([anchor], targets, temperature=TEMPERATURE)
    assert actual.item() == pytest.approx(literal_nip([anchor], targets, range(4)), abs=1e-9)


def test_cross_modality_loss_equals_the_formula():
    text, image = vectors(6, 0), vectors(6, 1)
    actual = cross_modality_loss(text, image, temperature=TEMPERATURE)
    assert actual.item() == pytest.approx(literal_cmcl(text, image), abs=1e-9)


def test_cross_modality_loss_does_not_mind_the_order_of_modalities():
    text, image = vectors(6, 0), vectors(6, 1)
    torch.testing.assert_close(
        cross_modality_loss(text, image, temperature=0.1), cross_modality_loss(image, text, temperature=0.1)
    )


def losses(text, image):
    same = torch.eye(len(text), dtype=torch.bool)
    return (
        next_item_loss([text], image, temperature=TEMPERATURE, same_target=same),
        next_item_loss([text, image], image, temperature=TEMPERATURE, same_target=same),
        cross_modality_loss(text, image, temperature=TEMPERATURE),
    )


@pytest.mark.parametrize("module", [ours, released])
def test_parts_of_the_rows_among_the_candidates_of_all_make_up_the_whole(module):
    ids, text, image = torch.tensor([3, 1, 3, 2, 3]), vectors(5, 0), vectors(5, 1)
    same = ids.unsqueeze(1) == ids
    nip = module.next_item_loss([text, image], image, temperature=TEMPERATURE, same_target=same)
    cmcl = module.cross_modality_loss(text, image, temperature=TEMPERATURE)
    sums = torch.zeros(2, dtype=torch.double)
    for own in (torch.tensor([1, 4]), torch.tensor([3, 0, 2])):
        anchors = text[own], image[own]
        parts = (
            module.next_item_loss(anchors, image, temperature=TEMPERATURE, same_target=same[own], own=own),
            module.cross_modality_loss(*anchors, temperature=TEMPERATURE, candidates=(text, image), own=own),
        )
        sums += len(own) * torch.stack(parts)
    torch.testing.assert_close(sums / 5, torch.stack([nip, cmcl]), **EXACT)


def test_the_order_of_rows_does_not_matter():
    text, image, order = vectors(6, 0), vectors(6, 1), torch.randperm(6)
    torch.testing.assert_close(losses(text[order], image[order]), losses(text, image))


def test_a_batch_of_one_has_no_negatives():
    one = vectors(1, 0).requires_grad_()
    nip, pooled, cmcl = losses(one, vectors(1, 1))
    torch.testing.assert_close(torch.stack([nip, pooled, cmcl]), torch.zeros(3, dtype=torch.double), atol=1e-12, rtol=0)
    (nip + cmcl).backward()
    assert one.grad.isfinite().all()


def test_gradients_are_those_of_the_formula():
    """Central differences in float64, with and without rows of the same target."""
    ids = torch.tensor([1, 2, 1])
    same = ids.unsqueeze(1) == ids
    text, image = vectors(3, 0).requires_grad_(), vectors(3, 1).requires_grad_()
    torch.autograd.gradcheck(lambda t, v: next_item_loss([t, v], v, temperature=0.5, same_target=same), (text, image))
    torch.autograd.gradcheck(lambda t, v: cross_modality_loss(t, v, temperature=0.5), (text, image))


def test_losses_are_float32_even_for_half_vectors_and_under_autocast():
    text, image = vectors(8, 0).half(), vectors(8, 1).half()
    expected = losses(text.float(), image.float())
    torch.testing.assert_close(losses(text, image), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(losses(text, image), expected)


def test_tiny_temperatures_stay_finite():
    text = vectors(4, 0).float().requires_grad_()
    loss = next_item_loss([text], -text.detach(), temperature=1e-3) + cross_modality_loss(text, -text, temperature=1e-3)
    loss.backward()
    assert loss.isfinite() and text.grad.isfinite().all()


# ---------------------------------------------------------------- hardest negatives among all items


def literal_hard_negatives(anchors, candidates, own, n_negatives, temperature):
    """Anchor by anchor; the own candidate is no negative, and always below the line."""
    total = 0.0
    for anchor, mine in zip(anchors, own.tolist(), strict=True):
        alike = [math.exp(cosine(anchor, candidate) / temperature) for candidate in candidates]
        hardest = sorted((value for j, value in enumerate(alike) if j != mine), reverse=True)[:n_negatives]
        total -= math.log(alike[mine] / (alike[mine] + sum(hardest)))
    return total / len(anchors)


def dense_hard_negatives(anchors, candidates, own, *, n_negatives, temperature):
    """The same with the whole matrix, for autograd."""
    logits = F.normalize(anchors, dim=1) @ F.normalize(candidates, dim=1).T / temperature  # [A, N]
    positive = logits.gather(1, own.unsqueeze(1))  # [A, 1]
    others = logits.scatter(1, own.unsqueeze(1), -torch.inf)
    hardest = others.topk(min(n_negatives, len(candidates) - 1), dim=1).values
    return (torch.cat([positive, hardest], dim=1).logsumexp(1) - positive.squeeze(1)).mean()


def with_gradients(loss, anchors, candidates, own, n_negatives, temperature=TEMPERATURE):
    anchors, candidates = anchors.detach().requires_grad_(), candidates.detach().requires_grad_()
    value = loss(anchors, candidates, own, n_negatives=n_negatives, temperature=temperature)
    return value, *torch.autograd.grad(value, [anchors, candidates])


@pytest.mark.parametrize("n_negatives", [1, 3, 7, 100])
@pytest.mark.parametrize("own", [[0, 1, 2, 3, 4, 5, 6, 7], [6], [3, 3, 0]])
def test_hard_negative_loss_equals_the_formula(own, n_negatives):
    anchors, candidates, own = vectors(len(own), 0), vectors(8, 1), torch.tensor(own)
    actual = hard_negative_loss(anchors, candidates, own, n_negatives=n_negatives, temperature=TEMPERATURE)
    expected = literal_hard_negatives(anchors, candidates, own, n_negatives, TEMPERATURE)
    assert actual.item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("n_negatives", [1, 20, 400, 698, 699, 700, 1000])
@pytest.mark.parametrize("n_anchors", [1, BLOCK, 700])
def test_blocks_of_anchors_equal_the_whole_matrix_in_value_and_gradient(n_anchors, n_negatives):
    own = torch.randperm(700, generator=torch.Generator().manual_seed(2))[:n_anchors]
    data = (vectors(n_anchors, 0), vectors(700, 1), own, n_negatives)
    torch.testing.assert_close(
        with_gradients(hard_negative_loss, *data), with_gradients(dense_hard_negatives, *data), **EXACT
    )


def test_with_all_others_as_negatives_it_is_cross_entropy_of_cosines():
    anchors, candidates, own = vectors(6, 0), vectors(9, 1), torch.tensor([8, 0, 1, 1, 5, 3])
    actual = hard_negative_loss(anchors, candidates, own, n_negatives=8, temperature=0.5)
    logits = F.cosine_similarity(anchors.unsqueeze(1), candidates, dim=-1) / 0.5
    torch.testing.assert_close(actual, F.cross_entropy(logits, own), **EXACT)


def test_candidates_that_are_alike_share_a_gradient_however_ties_are_broken():
    anchors, base = vectors(40, 0).requires_grad_(), vectors(40, 1).requires_grad_()
    found = []
    for loss in (hard_negative_loss, dense_hard_negatives):
        twins = base.repeat(3, 1)  # of each own candidate, two are negatives
        value = loss(anchors, twins, torch.arange(40), n_negatives=4, temperature=0.5)
        found.append((value, *torch.autograd.grad(value, [anchors, base])))
    torch.testing.assert_close(*found, **EXACT)


def test_the_order_of_anchors_and_candidates_does_not_matter_to_hard_negatives():
    anchors, candidates, own = vectors(5, 0), vectors(9, 1), torch.tensor([1, 8, 0, 3, 4])
    expected = hard_negative_loss(anchors, candidates, own, n_negatives=3, temperature=TEMPERATURE)
    rows, columns = torch.randperm(5), torch.randperm(9)
    actual = hard_negative_loss(
        anchors[rows], candidates[columns], columns.argsort()[own[rows]], n_negatives=3, temperature=TEMPERATURE
    )
    torch.testing.assert_close(actual, expected)


def test_gradients_of_hard_negatives_are_those_of_central_differences():
    inputs = (vectors(3, 0).requires_grad_(), vectors(5, 1).requires_grad_())
    own = torch.tensor([4, 0, 2])
    torch.autograd.gradcheck(
        lambda a, c: hard_negative_loss(a, c, own, n_negatives=2, temperature=0.5), inputs, fast_mode=True
    )


@pytest.mark.parametrize("n_candidates", [0, 3])
def test_no_anchors_cost_nothing_and_everything_has_a_gradient(n_candidates):
    anchors = torch.zeros(0, 5, dtype=torch.half, requires_grad=True)
    candidates = torch.randn(n_candidates, 5, dtype=torch.half).requires_grad_()
    loss = hard_negative_loss(anchors, candidates, torch.zeros(0, dtype=torch.long), n_negatives=2, temperature=0.1)
    loss.backward()
    torch.testing.assert_close(loss, torch.zeros(()))
    assert anchors.grad.shape == (0, 5) and not candidates.grad.any()


def test_a_single_item_has_no_negatives():
    value, *grads = with_gradients(hard_negative_loss, vectors(1, 0), vectors(1, 1), torch.tensor([0]), 100)
    torch.testing.assert_close([value, *grads], [torch.zeros_like(x) for x in (value, *grads)], **EXACT)


def test_a_small_loss_keeps_its_digits():
    anchors, candidates = torch.tensor([[1.0, 0]], requires_grad=True), torch.tensor([[2.0, 0], [-1, 0]])
    loss = hard_negative_loss(anchors, candidates, torch.tensor([0]), n_negatives=1, temperature=0.1)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-20)), rel=1e-5)


def test_hard_negatives_stay_finite_at_tiny_temperatures_and_for_zero_vectors():
    anchors, candidates = vectors(6, 0).float(), vectors(6, 1).float()
    anchors[0] = candidates[0] = candidates[3] = 0
    for x in with_gradients(hard_negative_loss, anchors, candidates, torch.arange(6), 3, temperature=1e-3):
        assert x.isfinite().all()


def test_hard_negative_loss_is_float32_even_for_half_vectors_and_under_autocast():
    anchors, candidates, own = vectors(8, 0).half(), vectors(8, 1).half(), torch.arange(8)
    expected = with_gradients(hard_negative_loss, anchors.float(), candidates.float(), own, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = with_gradients(hard_negative_loss, anchors, candidates, own, 3)
    torch.testing.assert_close(actual[0], expected[0])
    torch.testing.assert_close(actual[1:], tuple(x.half() for x in expected[1:]), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("n_largest", [1, 5, 60, 100])
def test_log_of_the_largest_terms_equals_that_of_the_whole_matrix(n_largest):
    """Without normalising, and without one left out."""
    anchors, candidates = vectors(30, 0).requires_grad_(), vectors(60, 1).requires_grad_()
    actual = largest_log_sum_exp(anchors, candidates, n_largest, scale=1.7)
    expected = (1.7 * anchors @ candidates.T).topk(min(n_largest, 60), dim=1).values.logsumexp(1)
    torch.testing.assert_close(actual, expected, **EXACT)
    direction = vectors(6, 3).flatten()
    found = [torch.autograd.grad((x * direction).sum(), [anchors, candidates]) for x in (actual, expected)]
    torch.testing.assert_close(*found, **EXACT)


def test_where_no_candidate_counts_the_sum_is_zero_and_so_is_the_gradient():
    anchors, candidates = vectors(2, 0).requires_grad_(), vectors(1, 1).requires_grad_()
    result = largest_log_sum_exp(anchors, candidates, 3, scale=1.0, left_out=torch.tensor([0, 0]))
    assert (result == -torch.inf).all()
    result.sum().backward()
    assert not anchors.grad.any() and not candidates.grad.any()


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the mode that watches is of this thread
    yield
    torch.set_num_threads(before)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation made."""

    n_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = result if isinstance(result, (tuple, list)) else [result]
        self.n_elements = max([self.n_elements, *(x.numel() for x in made if isinstance(x, torch.Tensor))])
        return result


def test_memory_is_linear_in_the_items(one_thread):
    n, n_negatives, saved = 3000, 10, []
    anchors, candidates = vectors(n, 0).requires_grad_(), vectors(n, 1).requires_grad_()
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x)
    with LargestTensor() as made, hooks:
        loss = hard_negative_loss(
            anchors, candidates, torch.arange(n), n_negatives=n_negatives, temperature=TEMPERATURE
        )
        loss.backward()
    assert saved and max(x.numel() for x in saved) == n * n_negatives
    assert made.n_elements == n * BLOCK


@pytest.mark.parametrize("n_columns", [1, 7, 8, 16, 17, 63, 64, 65, 100, 1001, 20_003])
@pytest.mark.parametrize("n_rows", [1, 3])
@pytest.mark.parametrize("kind", ["all differ", "ties", "mostly -inf"])
def test_largest_finds_what_topk_finds(n_columns, n_rows, kind):
    generator = torch.Generator().manual_seed(n_columns)
    x = torch.randn(n_rows, n_columns, generator=generator)
    if kind == "ties":
        x = x.round()
    if kind == "mostly -inf":
        x = x.masked_fill(x < 1, -torch.inf)
    for n_largest in sorted({1, 2, 5, n_columns // 17, n_columns // 2, n_columns} & set(range(1, n_columns + 1))):
        values, columns = largest(x, n_largest)
        expected = x.topk(n_largest, dim=1).values
        torch.testing.assert_close(values.sort(1, descending=True).values, expected, rtol=0, atol=0)
        torch.testing.assert_close(x.gather(1, columns), values, rtol=0, atol=0)
        assert all(len(row.unique()) == n_largest for row in columns)


@pytest.mark.parametrize("n_columns", [200, 207])
def test_largest_finds_no_less_where_a_floor_holds_nothing_back(n_columns):
    """All alike, or no numbers, which count as larger than all."""
    alike = torch.ones(3, n_columns)
    values, columns = largest(alike, 4)
    assert (values == 1).all() and all(len(row.unique()) == 4 for row in columns)
    some = torch.arange(n_columns).expand(3, -1).float().clone()
    some[1, 5:9] = torch.nan
    values, _ = largest(some, 4)
    assert values[1].isnan().all()
    torch.testing.assert_close(values[::2].sort(1).values, some[::2, -4:])


def test_one_row_that_ties_leaves_the_others_what_is_theirs():
    x = vectors(200, 0).T.contiguous()
    x[4] = 0.5
    torch.testing.assert_close(largest(x, 3)[0].sort(1).values, x.topk(3, dim=1).values.flip(1), rtol=0, atol=0)


def test_threads_change_no_value_and_no_gradient_of_hard_negatives(one_thread):
    anchors, candidates = vectors(3 * BLOCK + 1, 0).requires_grad_(), vectors(300, 1).requires_grad_()
    found = []
    for n_threads in (1, 2):
        torch.set_num_threads(n_threads)
        result = largest_log_sum_exp(anchors, candidates, 7, scale=1.5)
        found.append((result, *torch.autograd.grad(result.square().sum(), [anchors, candidates])))
    torch.testing.assert_close(found[0], found[1], **EXACT)
