import math

import pytest
import torch

from recbole_mm.model.losses import cross_modality_loss, next_item_loss

TEMPERATURE = 0.07


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
