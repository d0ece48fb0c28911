"""Contracts that every model of ours keeps, in every stage that it has."""

from __future__ import annotations

import pytest
import torch

from recbole_mm.model import find_model, model_names

CASES = [
    (name, stage)
    for name in model_names()
    for stage in (("pretrain", "finetune") if hasattr(find_model(name), "fresh_parameters") else ("train",))
]

KNOW_NO_GROUPS = ("Popularity", "SessionPopularity")  # they count items, not which ones go together
FIND_NO_GROUPS = {  # by design
    "MMSBRReleased": "it reads no feature, and from its start with nearly constant items it takes 60 epochs and more",
}


@pytest.fixture(params=CASES, ids="-".join)
def case(request, built, planted):
    """A model, a training batch and an evaluation batch."""
    name, stage = request.param
    settings = {} if stage == "train" else {"train_stage": stage}
    _, dataset, train, valid, _, model = built(name, planted, **settings)
    return model, next(iter(train)), next(iter(valid))[0], dataset


def loss_of(model, batch) -> torch.Tensor:
    losses = model.calculate_loss(batch)
    return sum(losses) if isinstance(losses, tuple) else losses


def test_the_loss_is_finite_and_every_parameter_is_trained(case):
    model, batch, *_ = case
    loss = loss_of(model, batch)
    assert loss.isfinite()
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_scores_are_finite_for_all_items_but_padding(case):
    model, _, batch, _ = case
    model.eval()
    scores = model.full_sort_predict(batch)
    assert scores.shape == (len(batch), model.n_items)
    assert scores[:, 1:].isfinite().all() and (scores[:, 0] == -torch.inf).all()


def test_scores_ignore_padding_and_the_rest_of_the_batch(case):
    model, _, batch, _ = case
    model.eval()
    together = model.full_sort_predict(batch)
    for row in (0, len(batch) - 1):
        length = int(batch[model.ITEM_SEQ_LEN][row])
        alone = model.scores(
            model.item_tower(), batch[model.ITEM_SEQ][row : row + 1, :length], batch[model.ITEM_SEQ_LEN][row : row + 1]
        )
        torch.testing.assert_close(alone[:, 1:], together[row : row + 1, 1:], rtol=1e-4, atol=1e-5)


def test_the_cached_item_tower_gives_the_same_scores_and_is_dropped_in_time(case):
    model, batch, evaluation, _ = case
    model.eval()
    with torch.no_grad():
        fresh = model.scores(model.item_tower(), evaluation[model.ITEM_SEQ], evaluation[model.ITEM_SEQ_LEN])
        torch.testing.assert_close(model.full_sort_predict(evaluation)[:, 1:], fresh[:, 1:])
        torch.testing.assert_close(model.full_sort_predict(evaluation)[:, 1:], fresh[:, 1:])
    before = model._cached_tower
    model.train()
    assert before is not None and model._cached_tower is None


def test_predict_gives_the_scores_of_full_sort_predict(case):
    model, _, batch, _ = case
    model.eval()
    scores = model.full_sort_predict(batch)
    expected = scores[torch.arange(len(batch)), batch[model.ITEM_ID]]
    torch.testing.assert_close(model.predict(batch), expected, check_dtype=False)


def test_the_state_holds_no_features_and_restores_the_scores(case):
    model, _, batch, dataset = case
    model.eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    stored = [dataset.vectors(name).rows for name in dataset.feature_names()]
    assert not any(value.shape == rows.shape for value in state.values() for rows in stored)
    before = model.full_sort_predict(batch)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.load_state_dict(state)
    torch.testing.assert_close(model.full_sort_predict(batch), before)


def grouping_models() -> list:
    names = [name for name in model_names() if name not in KNOW_NO_GROUPS]
    marks = {name: pytest.mark.xfail(reason=reason, strict=True) for name, reason in FIND_NO_GROUPS.items()}
    return [pytest.param(name, marks=marks.get(name, ())) for name in names]


@pytest.mark.parametrize("name", grouping_models())
def test_a_few_epochs_find_the_planted_groups(built, planted, name):
    from recbole_mm.trainer import Trainer

    settings = (
        {"epochs": 6, "learning_rate": 0.01, "pretrain_epochs": 3}
        if hasattr(find_model(name), "fresh_parameters")
        else {}
    )
    config, _, train, valid, test, model = built(name, planted, **settings)
    trainer = Trainer(config, model)
    trainer.fit(train, valid, verbose=False)
    # 10 of 30 items share a user's group, so that a guess finds the next one among 10 with probability 1/3.
    assert trainer.evaluate(test)["recall@10"] > 0.8
