import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import Settings
from recbole_mm.model.base import MultimodalRecommender, full_softmax_loss


class Toys:
    def num(self, field):
        return {"item_id": 7}[field]

    def feature(self, name):
        return torch.arange(7 * 3).view(7, 3).float()


class MeanPool(MultimodalRecommender):
    """Mean of the item vectors of a session."""

    modalities = ("image",)

    def __init__(self, **settings) -> None:
        fields = {"USER_ID_FIELD": "user_id", "ITEM_ID_FIELD": "item_id", "LIST_SUFFIX": "_list", "NEG_PREFIX": "neg_"}
        super().__init__(Settings(ITEM_LIST_LENGTH_FIELD="item_length", **fields, **settings), Toys())
        torch.manual_seed(0)
        self.project = nn.Linear(3, 4)
        self.n_towers = 0

    def item_tower(self) -> Tensor:
        self.n_towers += 1
        return self.project(self.image)

    def scores(self, items: Tensor, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
        return items[item_seq].sum(1) / item_seq_len.unsqueeze(1) @ items.T


def batch():
    return {
        "item_id_list": torch.tensor([[1, 2, 3], [4, 0, 0]]),
        "item_length": torch.tensor([3, 1]),
        "item_id": torch.tensor([5, 6]),
    }


def test_the_loss_is_cross_entropy_over_all_items():
    model = MeanPool()
    scores = model.scores(model.item_tower(), batch()["item_id_list"], batch()["item_length"])
    expected = torch.stack([scores[0].logsumexp(0) - scores[0, 5], scores[1].logsumexp(0) - scores[1, 6]]).mean()
    torch.testing.assert_close(model.calculate_loss(batch()), expected)


def test_temperature_divides_the_scores_in_the_loss_alone():
    model, interaction = MeanPool(), batch()
    before = model.full_sort_predict(interaction)
    model.temperature = 0.5
    torch.testing.assert_close(model.full_sort_predict(interaction), before)
    scores = model.scores(model.item_tower(), interaction["item_id_list"], interaction["item_length"])
    torch.testing.assert_close(model.calculate_loss(interaction), F.cross_entropy(scores * 2, interaction["item_id"]))


def test_auxiliary_losses_come_after_the_main_one():
    class WithExtra(MeanPool):
        def auxiliary_losses(self, items, interaction):
            return (items.sum() * 0 + 3,)

    main, extra = WithExtra().calculate_loss(batch())
    torch.testing.assert_close(main, MeanPool().calculate_loss(batch()))
    assert extra.item() == 3


def test_the_padding_class_can_be_left_out():
    logits, target = torch.randn(4, 6), torch.tensor([1, 5, 2, 3])
    without = torch.stack([row[1:].logsumexp(0) - row[t] for row, t in zip(logits, target, strict=True)]).mean()
    torch.testing.assert_close(full_softmax_loss(logits, target, exclude_pad_class=True), without)
    assert full_softmax_loss(logits, target) > without

    model, interaction = MeanPool(exclude_pad_class=True), batch()
    scores = model.scores(model.item_tower(), interaction["item_id_list"], interaction["item_length"])[:, 1:]
    torch.testing.assert_close(model.calculate_loss(interaction), F.cross_entropy(scores, interaction["item_id"] - 1))


def test_padding_is_never_recommended_and_given_items_score_as_in_the_ranking():
    model = MeanPool().eval()
    scores = model.full_sort_predict(batch())
    assert scores.shape == (2, 7) and (scores[:, 0] == -torch.inf).all() and scores[:, 1:].isfinite().all()
    torch.testing.assert_close(model.predict(batch()), scores[[0, 1], [5, 6]])


def test_items_are_computed_once_per_evaluation():
    model = MeanPool().eval()
    with torch.no_grad():
        first, second = model.full_sort_predict(batch()), model.full_sort_predict(batch())
    assert model.n_towers == 1
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.train().eval(),
        lambda model: model.load_state_dict(MeanPool().state_dict()),
        lambda model: model.to("cpu"),
    ],
    ids=["train", "load", "to"],
)
def test_items_are_computed_again_after_a_change(change):
    model = MeanPool().eval()
    with torch.no_grad():
        model.full_sort_predict(batch())
        model.project.weight.mul_(2)
        change(model)
        again = model.full_sort_predict(batch())
        assert model.n_towers == 2
        expected = model.scores(model.item_tower(), batch()["item_id_list"], batch()["item_length"])
    torch.testing.assert_close(again[:, 1:], expected[:, 1:])


def test_with_gradients_nothing_is_kept():
    model = MeanPool().eval()
    model.full_sort_predict(batch())[:, 1:].sum().backward()
    assert model.project.weight.grad is not None
    model.full_sort_predict(batch())
    assert model.n_towers == 2


def test_features_are_moved_with_the_model_but_not_saved():
    model = MeanPool()
    torch.testing.assert_close(model.image, Toys().feature("image"))
    assert "image" in dict(model.named_buffers()) and "image" not in model.state_dict()
