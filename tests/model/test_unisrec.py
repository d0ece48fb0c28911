"""UniSRec against loops in float64 and a literal model; stages, what is frozen, transfer, released weights."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from test_msm4sr import MAX_LENGTH, N_ITEMS, RECBOLE, batch, gradients, total
from torch import Tensor, nn

from benchmarks import Settings
from benchmarks.literal_unisrec import LiteralUniSRec
from recbole_mm import checkpoint
from recbole_mm.config import Config
from recbole_mm.errors import CheckpointError, DatasetError, SettingError
from recbole_mm.model import whitening
from recbole_mm.model.losses import unit_length
from recbole_mm.model.unisrec import UniSRec
from recbole_mm.model.whitening import DroppedExperts, WhitenedRows, WhiteningAdaptor
from recbole_mm.quick_start import run
from recbole_mm.released import import_checkpoint
from recbole_mm.released_weights import Order, import_released

from conftest import TINY, write_planted  # isort: skip

WIDTH = 6
MODEL_YAML = Path(__file__).parents[2] / "properties" / "model" / "UniSRec.yaml"
SMALL = {"hidden_size": 8, "inner_size": 16, "n_experts": 3, "initializer_range": 0.3}
NOTHING_RANDOM = {"hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0, "adaptor_dropout": 0.0, "gate_noise": False}
# So little that nothing is dropped: the path of dropout, the values of none.
IDLE_DROPOUT = {**NOTHING_RANDOM, "adaptor_dropout": 1e-6}
RUN = {**TINY, "n_experts": 3, "pretrain_epochs": 1, "epochs": 1}


class Toys:
    """20 item ids with a vector each; item 1 has none."""

    def num(self, field):
        return {"item_id": N_ITEMS}[field]

    def feature(self, name):
        width = 4 if name == "image" else WIDTH
        rows = torch.randn(N_ITEMS, width, generator=torch.Generator().manual_seed(len(name))) + 0.5
        rows[:2] = 0
        return rows


def fresh(stage="transductive_ft", dataset=None, **settings):
    """A model as it starts."""
    torch.manual_seed(0)
    defaults = {**yaml.safe_load(MODEL_YAML.read_text()), **RECBOLE, **SMALL}
    stage_settings = UniSRec.stage_names.get(stage, {"train_stage": stage})
    return UniSRec(Settings({**defaults, **stage_settings, **settings}), dataset or Toys())


def built(stage="transductive_ft", **settings):
    """With parameters away from 0 and 1, where they could hide mistakes."""
    model = fresh(stage, **settings)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("gate", "noise", "shift", "norm", "Norm", "bias")):
            nn.init.normal_(parameter, mean=float("Norm.weight" in name), std=0.5)
    return model


def random_rows(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


def adaptor_of(**settings):
    torch.manual_seed(3)
    arguments = {"width_in": WIDTH, "width_out": 4, "n_experts": 3, "dropout": 0.0, "gate_noise": False, **settings}
    adaptor = WhiteningAdaptor(**arguments).double()
    for parameter in adaptor.parameters():
        nn.init.normal_(parameter, std=0.5)
    return adaptor


# ---------------------------------------------------------------- adaptor


def literal_adapted(adaptor, x, *, noise=None, masks=None):
    """One number at a time: x [n, F], standard normal noise [n, E], factors on each expert's input [E, n, F]."""
    n_experts, width_out, width_in = adaptor.weight.shape
    rows = []
    for i, row in enumerate(x):
        logits = []
        for k in range(n_experts):
            logit = sum(row[f] * adaptor.gate.weight[k, f] for f in range(width_in))
            if noise is not None:
                raw = sum(row[f] * adaptor.noise.weight[k, f] for f in range(width_in))
                logit = logit + noise[i, k] * (torch.log(1 + torch.exp(raw)) + 0.01)
            logits.append(logit)
        below = sum(torch.exp(logit) for logit in logits)
        z = []
        for d in range(width_out):
            z.append(0.0)
            for k in range(n_experts):
                for f in range(width_in):
                    dropped = row[f] if masks is None else row[f] * masks[k, i, f]
                    whitened = (dropped - adaptor.shift[k, f]) * adaptor.weight[k, d, f]
                    z[d] = z[d] + torch.exp(logits[k]) / below * whitened
        rows.append(torch.stack(z))
    return torch.stack(rows)


def test_whitening_and_gates_equal_their_formula():
    adaptor, x = adaptor_of(), random_rows(5, WIDTH)
    torch.testing.assert_close(adaptor(x), literal_adapted(adaptor, x))


def test_noise_is_added_to_the_gates_in_training_alone(monkeypatch):
    adaptor, x, noise = adaptor_of(gate_noise=True), random_rows(5, WIDTH), random_rows(5, 3, seed=1)
    monkeypatch.setattr(torch, "randn_like", lambda tensor: noise[: len(tensor)])
    torch.testing.assert_close(adaptor(x), literal_adapted(adaptor, x, noise=noise))
    index = torch.tensor([4, 0, 4])
    expected = literal_adapted(adaptor, x[index], noise=noise)
    torch.testing.assert_close(WhitenedRows(adaptor, x).at(index), expected)
    torch.testing.assert_close(adaptor.eval()(x), literal_adapted(adaptor, x))


@pytest.mark.parametrize("index", [None, [4, 0, 4, 1, 2, 2, 3]], ids=["all", "some"])
def test_dropout_is_on_each_expert_s_input_and_its_gradients_are_exact(monkeypatch, index):
    monkeypatch.setattr(whitening, "BLOCK", 3)
    adaptor, x = adaptor_of(dropout=0.25, gate_noise=True), random_rows(5, WIDTH)
    index = None if index is None else torch.tensor(index)
    places = x if index is None else x[index]
    noise = random_rows(len(places), 3, seed=1)
    monkeypatch.setattr(torch, "randn_like", lambda tensor: noise)
    drawn, draw = [], whitening.draw_kept

    def remember(out, n_dropped):
        draw(out, n_dropped)
        drawn.append(out.clone())

    monkeypatch.setattr(whitening, "draw_kept", remember)
    rows = WhitenedRows(adaptor, x)
    actual = rows.all() if index is None else rows.at(index)
    masks = torch.cat(drawn, dim=1).double() / 0.75  # [E, P, F]
    assert 0 < masks.count_nonzero() < masks.numel() and not torch.equal(masks[0], masks[1])
    expected = literal_adapted(adaptor, places, noise=noise, masks=masks)
    torch.testing.assert_close(actual, expected)
    direction = random_rows(*actual.shape, seed=2)
    found = [torch.autograd.grad((z * direction).sum(), list(adaptor.parameters())) for z in (actual, expected)]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("p", [0.2, 0.5, 0.999999])
def test_dropout_keeps_the_mean(p):
    n, gates = 20_000, torch.full((20_000, 2), 0.5)
    x, weight = torch.ones(1, 3), torch.eye(3).expand(2, 3, 3)
    made = DroppedExperts.apply(x, torch.zeros(n, dtype=torch.long), gates, weight, p)
    if p < 0.9:
        assert made.mean().item() == pytest.approx(1, abs=0.02)
        assert made.std().item() == pytest.approx(math.sqrt(p / (1 - p) / 2), rel=0.05)
    assert made.isfinite().all()


def test_parameters_start_as_in_the_paper():
    adaptor = WhiteningAdaptor(width_in=100, width_out=30, n_experts=8, dropout=0.2)
    assert adaptor.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for start in (adaptor.shift, adaptor.gate.weight, adaptor.noise.weight):
        assert start.abs().sum() == 0
    rows = adaptor.eval().gates(*adaptor.routing(torch.randn(4, 100)))
    torch.testing.assert_close(rows, torch.full((4, 8), 1 / 8))


def test_without_gradients_many_rows_are_adapted_in_blocks(monkeypatch):
    monkeypatch.setattr(whitening, "BLOCK", 2)
    adaptor, x = adaptor_of().eval(), random_rows(5, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(adaptor(x), literal_adapted(adaptor, x))


# ---------------------------------------------------------------- the whole model


VARIANTS = [
    pytest.param("pretrain", {}, id="pretrain"),
    pytest.param("pretrain", {"dropped_text_feature": "text_dropped", "item_drop_prob": 0.0}, id="pretrain-word-drop"),
    pytest.param("pretrain", {"image_feature": "image", "feature_scale": "unit"}, id="pretrain-image"),
    pytest.param("inductive_ft", {}, id="inductive"),
    pytest.param("transductive_ft", {}, id="transductive"),
    pytest.param(
        "transductive_ft", {"image_feature": "image", "feature_scale": "standardize"}, id="transductive-image"
    ),
    pytest.param("transductive_ft", {"text_feature": None, "image_feature": "image", "n_layers": 1}, id="image-alone"),
]


@pytest.mark.parametrize("dropout", [NOTHING_RANDOM, IDLE_DROPOUT], ids=["shared", "dropped"])
@pytest.mark.parametrize(("stage", "settings"), VARIANTS)
def test_loss_and_gradients_equal_those_of_the_literal_model(stage, settings, dropout, monkeypatch):
    monkeypatch.setattr(whitening, "BLOCK", 16)
    model = built(stage, **settings, **dropout).double()
    results = []
    for each in (model, LiteralUniSRec(model)):
        torch.manual_seed(7)  # the same augmentation in both
        loss = total(each.calculate_loss(batch()))
        results.append((loss.item(), gradients(model, loss)))
        model.adaptor.dropout = 0.0
    (actual, own), (expected, theirs) = results
    assert actual == pytest.approx(expected, abs=1e-9)
    for name in own:
        torch.testing.assert_close(own[name], theirs[name], rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("stage", "settings"), VARIANTS)
def test_scores_equal_those_of_the_literal_model(stage, settings):
    model = built(stage, **settings).eval()
    with torch.no_grad():
        actual, expected = (each.full_sort_predict(batch()) for each in (model, LiteralUniSRec(model).eval()))
    assert actual.shape == (8, N_ITEMS)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(("stage", "settings"), VARIANTS)
def test_every_parameter_gets_a_gradient_and_features_stay(stage, settings):
    model = built(stage, **settings)
    before = model.features.clone()
    found = gradients(model, total(model.calculate_loss(batch())))
    assert [name for name, gradient in found.items() if gradient is None] == []
    assert torch.equal(model.features, before) and not any("features" in name for name in model.state_dict())


def test_the_losses_are_infonce_without_pairs_of_the_same_target():
    model = built("pretrain", **NOTHING_RANDOM, seq_seq_weight=0.3).double()
    interaction = batch()
    torch.manual_seed(7)
    losses = model.calculate_loss(interaction)
    torch.manual_seed(7)
    sequences, augmented, targets = model._pretraining_vectors(
        interaction["item_id_list"], interaction["item_length"], interaction["item_id"]
    )
    ids = interaction["item_id"].tolist()

    def infonce(others):
        def e(i, j):
            a, b = sequences[i].detach(), others[j].detach()
            return math.exp(float(a @ b / a.norm() / b.norm()) / 0.07)

        rows = [-math.log(e(i, i) / sum(e(i, j) for j in range(8) if i == j or ids[i] != ids[j])) for i in range(8)]
        return sum(rows) / 8

    assert len(set(ids)) < 8
    assert [loss.item() for loss in losses] == pytest.approx([infonce(targets), 0.3 * infonce(augmented)], rel=1e-9)


def test_an_item_without_content_does_not_swamp_the_gradients_before_shifts_are_trained():
    for stage in ("pretrain", "inductive_ft", "transductive_ft"):
        model, interaction = fresh(stage), batch()
        interaction["item_id"][0] = 1  # as padding, a vector of zeros at first
        for name, gradient in gradients(model, total(model.calculate_loss(interaction))).items():
            assert gradient.abs().max() < 1e4, (stage, name)


def test_unit_length_is_f_normalize_but_for_the_gradient_of_zeros():
    x = random_rows(6, 5)
    x[2] = 0
    x.requires_grad_()
    direction = random_rows(6, 5, seed=1)
    own, plain = unit_length(x), F.normalize(x, dim=-1)
    assert torch.equal(own, plain)
    found, expected = (torch.autograd.grad((y * direction).sum(), x)[0] for y in (own, plain))
    there = torch.arange(6) != 2
    torch.testing.assert_close(found[there], expected[there], rtol=1e-12, atol=1e-14)
    assert torch.equal(found[2], direction[2]) and expected[2].abs().max() > 1e10


@pytest.mark.parametrize("stage", ["pretrain", "transductive_ft"])
def test_one_sequence_of_one_item_and_a_drop_of_all_it_can_drop_give_finite_losses(stage):
    model = built(stage, item_drop_ratio=0.99999)
    for lengths in ((1,), (12, 1)):
        loss = total(model.calculate_loss(batch(lengths)))
        assert loss.isfinite() and all(g.isfinite().all() for g in gradients(model, loss).values())


@pytest.mark.parametrize("settings", [{"gate_noise": False}, NOTHING_RANDOM], ids=["dropped", "shared"])
@pytest.mark.parametrize("stage", ["pretrain", "transductive_ft"])
def test_half_precision_changes_loss_and_gradients_by_rounding_alone(stage, settings):
    model, results = built(stage, **settings), []
    for enabled in (False, True):
        torch.manual_seed(5)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = total(model.calculate_loss(batch()))
        results.append((loss.item(), gradients(model, loss)))
    (loss, found), (rounded_loss, rounded) = results
    assert rounded_loss == pytest.approx(loss, rel=0.02)
    for name in ("adaptor.weight", "adaptor.shift", "adaptor.gate.weight"):
        assert (found[name] - rounded[name]).norm() < 0.2 * found[name].norm(), name


# ---------------------------------------------------------------- augmentation


def test_item_drop_takes_a_fifth_of_the_items_and_keeps_their_order():
    model = built("pretrain")
    item_seq, lengths = torch.arange(1, 13).repeat(2000, 1), torch.full((2000,), 12)
    new, new_len = model._augment(item_seq, lengths)
    assert ((new_len - 1).double().mean() / 11).item() == pytest.approx(0.8, abs=0.01)
    assert (new[:, 0] == 1).all()
    for row, length in zip(new[:20], new_len[:20].tolist(), strict=True):
        kept = row[:length].tolist()
        assert kept == sorted(set(kept)) and (row[length:] == 0).all()


def test_word_drop_exchanges_a_fifth_of_the_vectors():
    model = built("pretrain", dropped_text_feature="text_dropped", item_drop_prob=0.0)
    item_seq, lengths = torch.randint(1, N_ITEMS, (2000, MAX_LENGTH)), torch.full((2000,), 9)
    item_seq[:, 9:] = 0
    new, new_len = model._augment(item_seq, lengths)
    exchanged = new >= N_ITEMS
    assert torch.equal(new_len, lengths) and torch.equal(new % N_ITEMS, item_seq) and not exchanged[:, 9:].any()
    assert exchanged[:, :9].double().mean().item() == pytest.approx(0.2, abs=0.01)
    rows = model._rows(torch.tensor([3, N_ITEMS + 3]))
    torch.testing.assert_close(rows, torch.stack([Toys().feature("text")[3], Toys().feature("text_dropped")[3]]))


def test_nine_of_ten_batches_have_items_dropped():
    model = built("pretrain", dropped_text_feature="text_dropped")
    interaction = batch((12,) * 8)
    word_drops = 0
    for _ in range(400):
        new, _ = model._augment(interaction["item_id_list"], interaction["item_length"])
        word_drops += int((new >= N_ITEMS).any())
    assert word_drops / 400 == pytest.approx(0.1, abs=0.05)


def test_both_features_stand_beside_each_other_and_several_rows_are_averaged(planted, built):
    settings = {"hidden_size": 8, "inner_size": 16, "train_stage": "pretrain"}
    _, dataset, *_, model = built("UniSRec", planted, image_feature="image", **settings)
    expected = torch.cat([dataset.feature("text"), dataset.feature("image")], dim=1)
    torch.testing.assert_close(model.features, expected)
    rows, starts, counts, _ = dataset.vectors("text")
    item = int((counts > 1).nonzero()[0])
    own = rows[starts[item] : starts[item] + counts[item]]
    torch.testing.assert_close(model.features[item, :12], own.mean(0))


def test_features_that_do_not_fit_are_refused(planted, built):
    with pytest.raises(SettingError, match="text_feature and image_feature are both none; UniSRec knows items by one"):
        built("UniSRec", planted, text_feature=None)
    with pytest.raises(DatasetError, match="planted has no feature 'sound', only"):
        built("UniSRec", planted, image_feature="sound")
    with pytest.raises(
        SettingError, match="dropped_text_feature 'image' must be as wide as text_feature 'text'.* 4 and 6"
    ):
        fresh("pretrain", dropped_text_feature="image")


def test_an_item_that_training_never_has_is_known_by_its_content_alone():
    class ColdToys(Toys):
        def seen_in_training(self):
            return torch.arange(N_ITEMS) < 15

    model = fresh(dataset=ColdToys(), protocol="cold-items").eval()
    table = model.item_tower().table
    content = F.normalize(model.adaptor(model.features), dim=-1)
    torch.testing.assert_close(table[15:], content[15:])
    assert (table[2:15] - content[2:15]).abs().amax(1).min() > 1e-3


# ---------------------------------------------------------------- stages and what is frozen


@pytest.mark.parametrize(
    ("name", "mode"), [("inductive_ft", "inductive"), ("transductive_ft", "transductive"), ("pretrain", "transductive")]
)
def test_stages_have_the_paper_s_names(planted, name, mode):
    config = Config("UniSRec", str(planted), settings={"train_stage": name})
    assert config["train_stage"] == ("pretrain" if name == "pretrain" else "finetune")
    assert config["finetune_mode"] == mode


def test_a_stage_that_contradicts_another_setting_is_refused(planted):
    settings = {"train_stage": "inductive_ft", "finetune_mode": "transductive"}
    message = (
        "train_stage inductive_ft .from settings. means finetune_mode inductive, found transductive .* one of them"
    )
    with pytest.raises(SettingError, match=message):
        Config("UniSRec", str(planted), settings=settings)
    with pytest.raises(SettingError, match="train_stage must be one of both, pretrain, finetune"):
        Config("MSM4SR", str(planted), settings={"train_stage": "inductive_ft"})
    with pytest.raises(SettingError, match="train_stage must be str such as 'both', found"):
        Config("UniSRec", str(planted), settings={"train_stage": ["pretrain"]})
    with pytest.raises(SettingError, match="pretrained_path goes with train_stage finetune|pretrained_path.* both"):
        Config("UniSRec", str(planted), settings={"train_stage": "both", "pretrained_path": "x.pth"})


def frozen(model):
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def test_position_embedding_and_transformer_are_frozen_when_they_come_from_a_checkpoint():
    expected = {
        name
        for name, _ in built().named_parameters()
        if name.startswith(("encoder.position_embedding", "encoder.trm_encoder"))
    }
    assert len(expected) > 20
    for settings in ({"stage": "both"}, {"stage": "inductive_ft", "pretrained_path": "x.pth"}):
        assert frozen(built(**settings)) == expected
        assert frozen(built(**settings, fix_enc=False)) == set()
    for settings in ({"stage": "pretrain"}, {"stage": "transductive_ft"}, {"stage": "finetune"}):
        assert frozen(built(**settings)) == set()


def test_only_transductive_fine_tuning_has_an_item_embedding():
    assert built("transductive_ft").item_embedding is not None and built("finetune").item_embedding is not None
    assert built("both", finetune_mode="inductive").item_embedding is None
    assert built("inductive_ft").item_embedding is None and built("pretrain").item_embedding is None


@pytest.mark.parametrize("mode", ["inductive", "transductive"])
def test_both_stages_run_and_leave_what_is_frozen_as_it_was(planted, mode):
    record = run("UniSRec", "planted", settings={**RUN, "finetune_mode": mode})
    assert [stage["stage"] for stage in record.stages] == ["pretrain", "finetune"]
    before, after = (checkpoint.load(stage["checkpoint"])["state_dict"] for stage in record.stages)
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if name.startswith(("encoder.position", "encoder.trm"))} <= same
    assert not any(name.startswith(("adaptor", "encoder.LayerNorm")) for name in same)
    assert ("item_embedding.weight" in after) == (mode == "transductive")
    apart = run(
        "UniSRec",
        "planted",
        settings={**RUN, "train_stage": f"{mode}_ft", "pretrained_path": record.stages[0]["checkpoint"]},
    )
    assert apart.test == record.test


def test_pre_training_transfers_to_another_dataset_and_to_no_other_model(planted, tmp_path):
    first = run("UniSRec", "planted", settings={**RUN, "train_stage": "pretrain"})
    write_planted(tmp_path / "dataset" / "other", n_items=24, seed=1)
    record = run("UniSRec", "other", settings={**RUN, "pretrained_path": first.checkpoint})
    assert record.stages[0]["stage"] == "finetune" and len(record.stages) == 1
    with pytest.raises(CheckpointError, match="is a checkpoint of UniSRec, expected one of MSM4SR"):
        run("MSM4SR", "other", settings={**RUN, "pretrained_path": first.checkpoint})
    with pytest.raises(CheckpointError, match="feature_scale is 'unit', was 'none' in pre-training"):
        run("UniSRec", "other", settings={**RUN, "pretrained_path": first.checkpoint, "feature_scale": "unit"})


def test_knocking_out_the_text_knocks_out_the_text_with_words_dropped(planted, built):
    settings = {"hidden_size": 8, "inner_size": 16, "train_stage": "pretrain", "dropped_text_feature": "image"}
    _, dataset, *_, plain = built("UniSRec", planted, **settings)
    *_, knocked_out = built("UniSRec", planted, knockout="text:noise", **settings)
    assert not torch.equal(knocked_out.features, plain.features)
    assert not torch.equal(knocked_out.features_with_words_dropped, plain.features_with_words_dropped)


# ---------------------------------------------------------------- released weights


def released(model) -> dict[str, Tensor]:
    """A model's weights under the names of the released checkpoints, with what these have on top."""
    state = {name.removeprefix("encoder."): value for name, value in model.encoder.state_dict().items()}
    for k in reversed(range(len(model.adaptor.weight))):
        state[f"moe_adaptor.experts.{k}.bias"] = model.adaptor.shift[k]
        state[f"moe_adaptor.experts.{k}.lin.weight"] = model.adaptor.weight[k]
    state["moe_adaptor.w_gate"] = model.adaptor.gate.weight.T
    state["moe_adaptor.w_noise"] = model.adaptor.noise.weight.T
    state["plm_embedding.weight"] = torch.randn(50, WIDTH)
    if model.item_embedding is not None:
        state["item_embedding.weight"] = model.item_embedding.weight
    return {name: value.detach().clone() for name, value in state.items()}


@pytest.mark.parametrize("stage", ["pretrain", "transductive_ft"])
def test_a_released_checkpoint_gives_equal_outputs(stage):
    source, target = built(stage), built(stage)
    for parameter in target.parameters():
        nn.init.normal_(parameter)
    order = Order([str(item) for item in range(1, N_ITEMS)], ["[PAD]", *(str(item) for item in range(1, N_ITEMS))])
    report = import_released(target, released(source), orders={"item": order})
    assert report.fresh == {} and report.taken.keys() == dict(target.named_parameters()).keys()
    assert report.dropped == {"plm_embedding.weight": "features, which come from the dataset"}
    torch.testing.assert_close(dict(target.state_dict()), dict(source.state_dict()), rtol=0, atol=0)
    expected = LiteralUniSRec(source).eval().full_sort_predict(batch())
    torch.testing.assert_close(target.eval().full_sort_predict(batch()), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        (r"experts\.(\d)\.lin\.", r"expert_list.\1.linear."),
        (r"experts\.(\d)\.bias", r"experts.\1.shift"),
        (r"w_(gate|noise)", r"\1.weight"),
    ],
)
def test_other_names_inside_the_adaptor_are_understood_too(pattern, name):
    source, target = built("pretrain", hidden_size=WIDTH), built("pretrain", hidden_size=WIDTH)  # square: not turned
    nn.init.normal_(target.adaptor.weight)
    state = {re.sub(pattern, name, theirs): value for theirs, value in released(source).items()}
    assert state.keys() != released(source).keys()
    import_released(target, state)
    for ours in ("weight", "shift"):
        assert torch.equal(getattr(target.adaptor, ours), getattr(source.adaptor, ours))


def test_the_command_s_checkpoint_is_where_fine_tuning_starts(planted, built):
    settings = {key: RUN[key] for key in ("MAX_ITEM_LIST_LENGTH", "hidden_size", "inner_size", "n_experts", "use_gpu")}
    *_, source = built("UniSRec", planted, n_experts=3, train_stage="pretrain")
    for parameter in source.parameters():
        nn.init.normal_(parameter)
    torch.save({"state_dict": released(source)}, "plain.pth")
    import_checkpoint("UniSRec", "planted", "plain.pth", "saved/released.pth", settings=settings)
    state = checkpoint.load("saved/released.pth")
    assert state["config"]["train_stage"] == "pretrain"
    torch.testing.assert_close(state["state_dict"]["adaptor.weight"], source.adaptor.weight.detach())
    record = run(
        "UniSRec", "planted", settings={**RUN, "train_stage": "inductive_ft", "pretrained_path": "saved/released.pth"}
    )
    after = checkpoint.load(record.checkpoint)["state_dict"]
    assert torch.equal(after["encoder.position_embedding.weight"], source.encoder.position_embedding.weight)


def test_what_lacks_in_a_released_checkpoint_is_said():
    source = built("pretrain")
    state = released(source)
    del state["moe_adaptor.experts.1.bias"]
    with pytest.raises(CheckpointError, match=r"adaptor.shift \[3, 6\] is missing; these match, but do not fit"):
        import_released(built("pretrain"), state)


def test_the_loss_is_the_softmax_over_all_items():
    model = built(**NOTHING_RANDOM).double()
    interaction = batch()
    scores = model.scores(model.item_tower(), interaction["item_id_list"], interaction["item_length"])
    expected = F.cross_entropy(scores / 0.07, interaction["item_id"])
    assert model.calculate_loss(interaction).item() == pytest.approx(expected.item(), rel=1e-12)
