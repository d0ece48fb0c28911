import logging
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from benchmarks import RECBOLE_FIELDS, Settings
from benchmarks.literal_msm4sr import LiteralMSM4SR
from recbole_mm.errors import DatasetError
from recbole_mm.model.msm4sr import MSM4SR, Content

N_ITEMS, MAX_LENGTH = 20, 12
MODEL_YAML = Path(__file__).parents[2] / "properties" / "model" / "MSM4SR.yaml"
RECBOLE = {**RECBOLE_FIELDS, "MAX_ITEM_LIST_LENGTH": MAX_LENGTH, "dataset": "toys"}
SMALL = {"hidden_size": 8, "inner_size": 16, "n_experts": 3, "attention_size": 4, "initializer_range": 0.3}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0, "adaptor_dropout": 0.0}
# So little that nothing is dropped: the path of dropout, the values of none.
IDLE_DROPOUT = {**NO_DROPOUT, "adaptor_dropout": 1e-6}


class Vectors(NamedTuple):
    rows: Tensor
    starts: Tensor
    counts: Tensor
    fallback: Tensor


class Toys:
    """20 item ids, 0 to 3 rows each, rows in the opposite order of the ids."""

    def __init__(self, features=("text", "image"), most_rows=3, width=6):
        self.features, self.most_rows, self.width = features, most_rows, width

    def num(self, field):
        return {"item_id": N_ITEMS}[field]

    def feature_names(self):
        return list(self.features)

    def vectors(self, name):
        generator = torch.Generator().manual_seed(len(name))
        counts = torch.randint(0, self.most_rows + 1, (N_ITEMS,), generator=generator)
        counts[0], counts[1], counts[2] = 0, 0, self.most_rows
        starts = counts.sum() - counts.cumsum(0)
        rows = torch.randn(int(counts.sum()), self.width, generator=generator) + 0.5
        return Vectors(rows, starts, counts, torch.zeros(self.width))


def built(stage="finetune", dataset=None, **settings):
    torch.manual_seed(0)
    config = Settings({**yaml.safe_load(MODEL_YAML.read_text()), **RECBOLE, **SMALL, "train_stage": stage, **settings})
    model = MSM4SR(config, dataset or Toys())
    for name, parameter in model.named_parameters():  # parameters that start at 0 or 1 would hide mistakes
        if "gate" in name or "norm" in name.lower() or "bias" in name:
            nn.init.normal_(parameter, mean=float("weight" in name and "gate" not in name), std=0.5)
    return model


def batch(lengths=(1, 12, 3, 3, 7, 2, 1, 5), seed=0, width=MAX_LENGTH):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(lengths)
    item_seq = torch.randint(1, N_ITEMS, (len(lengths), width), generator=generator)
    item_seq[torch.arange(width) >= lengths.unsqueeze(1)] = 0
    targets = torch.randint(1, 6, (len(lengths),), generator=generator)  # so few that some rows share theirs
    return {"item_id_list": item_seq, "item_length": lengths, "item_id": targets}


def total(losses):
    return losses if isinstance(losses, Tensor) else sum(losses)


def gradients(model, loss):
    """By parameter name; None where there is none."""
    model.zero_grad()
    loss.backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


VARIANTS = [
    pytest.param("pretrain", {}, id="pretrain"),
    pytest.param("pretrain", {"proj": True}, id="pretrain-proj"),
    pytest.param("pretrain", {"use_mixup": False, "item_drop_max": 0.0}, id="pretrain-plain"),
    pytest.param("pretrain", {"image_feature": None}, id="pretrain-text"),
    pytest.param("pretrain", {"text_feature": None, "proj": True}, id="pretrain-image-proj"),
    pytest.param("finetune", {}, id="finetune"),
    pytest.param("finetune", {"proj": True, "n_layers": 1}, id="finetune-proj"),
    pytest.param("finetune", {"image_feature": None}, id="finetune-text"),
    pytest.param("finetune", {"feature_scale": "sqrt_dim", "max_rows": 2}, id="finetune-sqrt_dim"),
    pytest.param("finetune", {"feature_scale": "none", "freeze_attention_in_finetune": True}, id="finetune-frozen"),
]


@pytest.mark.parametrize("dropout", [NO_DROPOUT, IDLE_DROPOUT], ids=["vectors", "hidden"])
@pytest.mark.parametrize(("stage", "settings"), VARIANTS)
def test_loss_and_gradients_equal_those_of_the_literal_model(stage, settings, dropout):
    model = built(stage, **settings, **dropout).double()
    literal = LiteralMSM4SR(model)
    results = []
    for each in (model, literal):
        torch.manual_seed(7)  # the same item drop and mixup in both
        loss = total(each.calculate_loss(batch()))
        results.append((loss.item(), gradients(model, loss)))
        for tower in model.towers.values():
            tower.adaptor.dropout.p = 0.0
    (actual, own), (expected, theirs) = results
    assert actual == pytest.approx(expected, abs=1e-6)
    for name in own:
        if own[name] is not None or theirs[name] is not None:
            torch.testing.assert_close(own[name], theirs[name], rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("stage", "settings"), VARIANTS)
def test_scores_equal_those_of_the_literal_model(stage, settings):
    model = built(stage, **settings).eval()
    with torch.no_grad():
        actual, expected = (each.full_sort_predict(batch()) for each in (model, LiteralMSM4SR(model).eval()))
    assert actual.shape == (8, N_ITEMS)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(("stage", "settings"), VARIANTS)
def test_every_parameter_that_is_trained_gets_a_gradient(stage, settings):
    model = built(stage, **settings)
    found = gradients(model, total(model.calculate_loss(batch())))
    assert [name for name, p in model.named_parameters() if p.requires_grad and found[name] is None] == []
    pooling = [name for name in found if ".pooling." in name]
    trained = not settings.get("freeze_attention_in_finetune")
    assert all((found[name] is not None and found[name].abs().sum() > 0) == trained for name in pooling)


def test_attention_can_be_left_untrained_or_frozen_in_finetuning_alone():
    def trained(stage, **settings):
        return {p.requires_grad for name, p in built(stage, **settings).named_parameters() if ".pooling." in name}

    assert trained("pretrain", train_attention=False) == trained("finetune", train_attention=False) == {False}
    assert trained("pretrain", freeze_attention_in_finetune=True) == {True}
    assert trained("finetune", freeze_attention_in_finetune=True) == {False}


def test_one_row_per_item_needs_no_attention():
    model = built(dataset=Toys(most_rows=1))
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".pooling." in name)
    total(model.calculate_loss(batch())).backward()


def test_pretraining_has_no_item_embedding_and_finetuning_starts_with_a_fresh_one():
    before, after = built("pretrain"), built("finetune")
    extra = after.state_dict().keys() - before.state_dict().keys()
    assert extra == {"item_embedding.weight"} and before.state_dict().keys() <= after.state_dict().keys()
    assert set(after.load_state_dict(before.state_dict(), strict=False).missing_keys) == extra
    assert after.item_embedding.weight[0].abs().sum() == 0
    assert after.item_embedding.weight[1:].std().item() == pytest.approx(0.3, rel=0.3)


def test_the_state_has_no_feature_tables():
    model = built()
    in_state = set(model.state_dict())
    assert in_state == {name for name, _ in model.named_parameters()}
    assert {name.rpartition(".")[2] for name, _ in model.named_buffers()} >= {"rows", "starts", "counts", "fallback"}


def test_features_stay_as_they_are():
    dataset = Toys()
    model = built("pretrain", dataset)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, weight_decay=0.1)
    total(model.calculate_loss(batch())).backward()
    optimizer.step()
    for name in ("text", "image"):
        torch.testing.assert_close(model.towers[name].features.rows, dataset.vectors(name).rows, rtol=0, atol=0)


# ---------------------------------------------------------------- laws


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_padding_and_batch_mates_do_not_matter_to_scores(stage):
    model, together = built(stage).eval(), batch()
    expected = model.full_sort_predict(together)
    for i, length in enumerate(together["item_length"].tolist()):
        alone = {"item_id_list": together["item_id_list"][[i], :length], "item_length": together["item_length"][[i]]}
        torch.testing.assert_close(model.full_sort_predict(alone), expected[[i]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_the_order_of_the_batch_does_not_matter_to_the_loss(stage):
    model, interaction = built(stage).eval(), batch()
    order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    shuffled = {key: value[order] for key, value in interaction.items()}
    torch.testing.assert_close(total(model.calculate_loss(shuffled)), total(model.calculate_loss(interaction)))


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize("lengths", [(1,), (12,), (1, 1, 1), (12, 12)])
def test_batches_of_one_and_shortest_and_longest_sequences(stage, lengths):
    model, interaction = built(stage), batch(lengths)
    loss = total(model.calculate_loss(interaction))
    loss.backward()
    assert loss.shape == () and loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    scores = model.eval().full_sort_predict(interaction)
    assert scores.shape == (len(lengths), N_ITEMS) and scores[:, 1:].isfinite().all()


def test_a_sequence_longer_than_the_position_table_is_an_error():
    with pytest.raises(ValueError, match="has 13 items, the position table 12"):
        built().calculate_loss(batch((2, 13), width=13))


def test_scores_are_sums_of_cosines_and_padding_is_never_recommended():
    scores = built().eval().full_sort_predict(batch())
    assert (scores[:, 0] == -torch.inf).all()
    assert scores[:, 1:].abs().max() <= 2 + 1e-5


def test_scores_of_given_items_are_those_of_the_full_ranking():
    model, interaction = built().eval(), batch()
    expected = model.full_sort_predict(interaction).gather(1, interaction["item_id"].unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(model.predict(interaction), expected)


def test_the_padding_class_can_be_left_out_of_the_softmax():
    with_pad, without = built(**NO_DROPOUT), built(exclude_pad_class=True, **NO_DROPOUT)
    interaction = batch()
    scores = with_pad.scores(with_pad.item_tower(), interaction["item_id_list"], interaction["item_length"]) / 0.07
    target = interaction["item_id"]
    torch.testing.assert_close(with_pad.calculate_loss(interaction), F.cross_entropy(scores, target))
    torch.testing.assert_close(without.calculate_loss(interaction), F.cross_entropy(scores[:, 1:], target - 1))


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_the_seed_governs_the_loss(stage):
    model, losses = built(stage), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(total(model.calculate_loss(batch())).item())
    assert losses[0] == losses[1] != losses[2]


def test_item_drop_and_mixup_are_for_training_alone():
    model = built("pretrain", mixup_max=0.5, item_drop_max=0.9, **NO_DROPOUT)
    trained = [total(model.calculate_loss(batch())).item() for _ in range(2)]
    model.eval()
    evaluated = [total(model.calculate_loss(batch())).item() for _ in range(2)]
    assert trained[0] != trained[1] and evaluated[0] == evaluated[1]


def test_weights_multiply_their_losses():
    torch.manual_seed(3)
    nip, cmcl = built("pretrain").eval().calculate_loss(batch())
    weighted = built("pretrain", nip_weight=2.0, cmcl_weight=0.03).eval().calculate_loss(batch())
    torch.testing.assert_close(weighted, (2 * nip, 3 * cmcl))


def test_pretraining_touches_only_the_items_of_the_batch(monkeypatch):
    model, interaction, seen = built("pretrain", item_drop_max=0.0), batch((2, 1)), []
    for tower in model.towers.values():
        pooled = tower.pooled
        monkeypatch.setattr(tower, "pooled", lambda items=None, pooled=pooled: seen.append(items) or pooled(items))
    model.calculate_loss(interaction)
    expected = set(interaction["item_id_list"].flatten().tolist()) - {0} | set(interaction["item_id"].tolist())
    assert [sorted(items.tolist()) for items in seen] == [sorted(expected)] * 2


# ---------------------------------------------------------------- one modality


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_folder_with_one_modality_is_enough_and_the_log_says_so(stage, caplog):
    with caplog.at_level(logging.WARNING):
        model = built(stage, Toys(features=["text", "price"]))
    assert "toys has no feature 'image': MSM4SR runs on text alone, without mixup" in caplog.text
    loss = model.calculate_loss(batch())
    assert isinstance(loss, Tensor) and loss.isfinite()
    assert model.eval().full_sort_predict(batch())[:, 1:].abs().max() <= 1 + 1e-5


def test_a_folder_without_content_is_an_error():
    with pytest.raises(DatasetError, match=r"toys has neither feature 'text' nor 'image', only \['clip', 'price'\]"):
        built(dataset=Toys(features=["price", "clip"]))


def test_features_may_have_other_names_and_widths():
    model = built(dataset=Toys(features=["clip", "price"], width=9), text_feature="clip")
    assert list(model.towers) == ["text"] and model.towers["text"].features.width == 9


# ---------------------------------------------------------------- what is kept between calls


def counted(monkeypatch, model):
    calls = []
    for tower in model.towers.values():
        pooling = tower.pooling.forward
        monkeypatch.setattr(tower.pooling, "forward", lambda *args, f=pooling: calls.append(1) or f(*args))
    return calls


def test_evaluation_computes_items_once_and_equals_a_fresh_computation(monkeypatch):
    model = built().eval()
    with torch.no_grad():
        fresh = model.full_sort_predict(batch())
        calls = counted(monkeypatch, model)
        torch.testing.assert_close(model.full_sort_predict(batch()), fresh, rtol=0, atol=0)
        assert calls == []
        model.train()
        model.eval()
        torch.testing.assert_close(model.full_sort_predict(batch()), fresh)
        assert len(calls) == 2


def test_frozen_attention_pools_once_and_forgets_when_loaded(monkeypatch):
    model, other = (built("finetune", train_attention=False, **NO_DROPOUT) for _ in range(2))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    calls = counted(monkeypatch, model)
    for _ in range(3):
        model.calculate_loss(batch())
    assert len(calls) == 2
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(model.calculate_loss(batch()), other.calculate_loss(batch()))
    assert len(calls) == 4
    model.double()
    assert model.calculate_loss(batch()).dtype == torch.float64 and len(calls) == 6


def test_places_of_an_item_share_the_product_but_not_the_dropout(monkeypatch):
    model = built("finetune", adaptor_dropout=0.5)
    products = []
    for tower in model.towers.values():
        experts = tower.adaptor.experts
        monkeypatch.setattr(tower.adaptor, "experts", lambda x, f=experts: products.append(len(x)) or f(x))
    model.calculate_loss(batch())
    assert products == [N_ITEMS, N_ITEMS]  # the table's product serves the sequences as well
    tower = model.towers["text"]
    first, second = Content(tower.adaptor, tower.pooled()).at(torch.tensor([4, 4]))
    assert not torch.equal(first, second)


# ---------------------------------------------------------------- does it learn


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_learns_that_the_next_item_looks_like_the_last_one(stage):
    """Items come in 4 looks of 5; a sequence ends in one look and goes on with it. Chance to hit the look is 1 in 4."""

    class Looks(Toys):
        def vectors(self, name):
            look = torch.arange(N_ITEMS) % 4
            rows = F.one_hot(look, self.width).float() + 0.1 * torch.randn(N_ITEMS, self.width)
            ones = torch.ones(N_ITEMS, dtype=torch.long)
            return Vectors(rows, torch.arange(N_ITEMS), ones, torch.zeros(self.width))

    torch.manual_seed(0)
    model = built(stage, Looks())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    for step in range(60):
        interaction = batch([3] * 64, seed=step)
        last = interaction["item_id_list"][:, 2]
        interaction["item_id"] = last % 4 + 4 * torch.randint(1, 5, (64,))
        optimizer.zero_grad()
        total(model.calculate_loss(interaction)).backward()
        optimizer.step()
    interaction = batch([3] * 64, seed=1000)
    best = model.eval().full_sort_predict(interaction).argmax(1)
    assert (best % 4 == interaction["item_id_list"][:, 2] % 4).float().mean() > 0.8
