"""Towers and encoders in 16 bits, all else in 32."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from conftest import TINY
from recbole.trainer import Trainer as RecBoleTrainer
from torch import nn

from recbole_mm import checkpoint
from recbole_mm.config import Config
from recbole_mm.errors import SettingError, TrainingError
from recbole_mm.model.base import full_softmax_loss
from recbole_mm.model.layers import products
from recbole_mm.model.losses import cross_modality_loss, hard_negative_loss, next_item_loss
from recbole_mm.model.wasserstein import Gaussian, wasserstein_distances
from recbole_mm.precision import GradientScaler, precision_of, run_in
from recbole_mm.quick_start import run
from recbole_mm.records import settings_hash
from recbole_mm.trainer import Trainer

CPU = torch.device("cpu")
CASES = [("MSM4SR", "pretrain"), ("MSM4SR", "finetune"), ("UniSRec", "pretrain"), ("UniSRec", "finetune")]
CASES += [("MMSBR", None), ("SASRec", None), ("GRU4Rec", None)]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def both(built, folder, name: str, stage: str | None, amp: str, device: torch.device):
    """Loss, gradients and scores of one batch in float32, and in 16 bits."""
    _, _, train, valid, _, plain = built(name, folder, **({"train_stage": stage} if stage else {}))
    batch, asked = next(iter(train)).to(device), next(iter(valid))[0].to(device)
    mixed = copy.deepcopy(plain)
    run_in(mixed, precision_of(amp, device, mixed), device)
    for model in (plain, mixed):
        model.to(device)
        torch.manual_seed(1)
        losses = model.calculate_loss(batch)
        loss = sum(losses) if isinstance(losses, tuple) else losses
        loss.backward()
        with torch.no_grad():
            yield loss.detach(), gradient_of(model), model.eval().full_sort_predict(asked)[:, 1:]


def gradient_of(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def check_alike(plain: tuple, mixed: tuple) -> None:
    (loss, gradient, scores), (its_loss, its_gradient, its_scores) = plain, mixed
    assert its_loss.dtype == its_gradient.dtype == its_scores.dtype == torch.float32
    assert not torch.equal(its_scores, scores)
    torch.testing.assert_close(its_loss, loss, rtol=0.01, atol=0)
    assert torch.cosine_similarity(gradient, its_gradient, dim=0) > 0.97
    torch.testing.assert_close(its_scores, scores, rtol=0, atol=0.1 * float(scores.std()))


@pytest.mark.parametrize(("name", "stage"), CASES)
def test_bf16_gives_nearly_the_loss_the_gradient_and_the_scores_of_float32(built, planted, name, stage):
    check_alike(*both(built, planted, name, stage, "bf16", CPU))


@needs_gpu
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize(("name", "stage"), CASES)
def test_16_bits_give_nearly_the_same_on_a_gpu(built, planted, name, stage, amp):
    check_alike(*both(built, planted, name, stage, amp, torch.device("cuda")))


@pytest.mark.parametrize("name", ["MSM4SR", "SASRec"])
def test_scores_are_as_many_numbers_as_in_float32(built, planted, name):
    *_, model = built(name, planted, train_stage="finetune") if name == "MSM4SR" else built(name, planted)
    asked = {"item_id_list": torch.tensor([[1, 2, 3, 0, 0]]), "item_length": torch.tensor([3])}
    run_in(model, precision_of("bf16", CPU, model), CPU)
    with torch.no_grad():
        assert len(model.eval().full_sort_predict(asked)[0].unique()) == model.n_items


def test_losses_and_distances_are_those_of_float32_to_the_last_digit():
    a, b = torch.randn(20, 8), torch.randn(20, 8)
    target, same = torch.arange(20) % 7, torch.arange(20) % 7 == (torch.arange(20) % 7).unsqueeze(1)
    functions = [
        lambda: full_softmax_loss(a, target),
        lambda: next_item_loss([a], b, temperature=0.07, same_target=same),
        lambda: cross_modality_loss(a, b, temperature=0.07),
        lambda: hard_negative_loss(a, b, torch.arange(20), n_negatives=5, temperature=0.07),
        lambda: wasserstein_distances(Gaussian(a, b.exp()), Gaussian(b, a.exp())),
        lambda: products(a, b),
    ]
    for function in functions:
        expected = function()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(function(), expected, rtol=0, atol=0)


def test_logits_of_16_bits_meet_the_softmax_in_float32():
    logits, target = torch.randn(6, 50).bfloat16(), torch.arange(6)
    loss = full_softmax_loss(logits, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, full_softmax_loss(logits.double(), target).float())


def test_names_and_types_of_parameters_stay_what_they_are(built, planted):
    *_, model = built("MSM4SR", planted, train_stage="finetune")
    before = {name: value.dtype for name, value in model.state_dict().items()}
    run_in(model, precision_of("bf16", CPU, model), CPU)
    assert {name: value.dtype for name, value in model.state_dict().items()} == before


def test_a_short_training_in_bf16_ranks_as_well_as_one_in_float32(planted):
    settings = {**TINY, "train_stage": "finetune", "epochs": 5, "learning_rate": 0.01}
    plain, mixed = (run("MSM4SR", "planted", settings={**settings, "amp": amp}) for amp in (None, "bf16"))
    assert plain.settings_hash != mixed.settings_hash
    assert plain.stages[0]["curve"] != mixed.stages[0]["curve"]
    assert abs(plain.test["recall@10"] - mixed.test["recall@10"]) < 0.1 and mixed.test["recall@10"] > 0.5


# ------------------------------------------------ what cannot be


def test_fp16_on_a_cpu_computes_in_float32_and_says_so(planted):
    settings = {**TINY, "epochs": 1}
    plain, asked = (run("SASRec", "planted", settings={**settings, "amp": amp}) for amp in (None, "fp16"))
    assert asked.test == plain.test
    (warning,) = asked.warnings
    assert "amp fp16 on cpu: PyTorch scales losses for fp16 on a GPU only" in warning and "float32 instead" in warning


@pytest.mark.parametrize(
    ("name", "reason"),
    [("ContentKNN", "nothing to compute in 16 bits"), ("RepeatNet", "makes the probabilities of all items")],
)
def test_some_models_stay_in_float32(built, planted, name, reason):
    *_, model = built(name, planted)
    precision = precision_of("bf16", CPU, model)
    assert precision.dtype is None and reason in precision.notice


def test_recbole_s_mixed_precision_is_refused(planted):
    with pytest.raises(SettingError, match=r"enable_amp \(from settings\) is RecBole's .* use amp: bf16 or fp16"):
        Config("SASRec", "dataset/planted", settings={"enable_amp": True})


def test_another_precision_is_refused(planted):
    with pytest.raises(SettingError, match="amp must be one of ~, bf16, fp16, found 'fp8'"):
        Config("SASRec", "dataset/planted", settings={"amp": "fp8"})


def test_a_trainer_of_recbole_s_own_refuses_it(planted, monkeypatch):
    monkeypatch.setattr("recbole_mm.quick_start._trainer_class", lambda config: RecBoleTrainer)
    with pytest.raises(SettingError, match=r"its own, Trainer, .* amp \(bf16\) and fused_optimizer \(True\)"):
        run("SASRec", "planted", settings={"amp": "bf16", "fused_optimizer": True})


@pytest.mark.parametrize(("enabled", "ending"), [(True, "clip_grad_norm, or amp bf16"), (False, "clip_grad_norm$")])
def test_a_loss_that_is_not_finite_names_what_helps(built, planted, enabled, ending):
    config, *_, model = built("SASRec", planted)
    trainer = Trainer(config, model)
    trainer.scaler = GradientScaler(CPU, enabled=enabled)
    with pytest.raises(TrainingError, match=f"SASRec became NaN or infinite after 0 epochs(.|\n)*{ending}"):
        trainer._require_finite(math.inf)


def test_a_run_without_it_has_the_identity_that_it_had_before_there_was_the_setting():
    before = settings_hash("SASRec", {"epochs": 1})
    assert settings_hash("SASRec", {"epochs": 1, "amp": None, "compile": False, "fused_optimizer": False}) == before
    for changed in ({"amp": "bf16"}, {"compile": True}, {"fused_optimizer": True}):
        assert settings_hash("SASRec", {"epochs": 1, **changed}) != before


# ------------------------------------------------ scaled gradients


def line() -> tuple[nn.Parameter, torch.optim.Optimizer]:
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    return weight, torch.optim.SGD([weight], lr=1.0)


@pytest.mark.parametrize("enabled", [True, False])
def test_a_step_is_that_of_the_plain_gradient_and_clipping_sees_its_real_size(enabled):
    weight, optimizer = line()
    scaler, seen = GradientScaler(CPU, enabled=enabled), []
    scaler.backward((weight * torch.tensor([3.0, 4.0])).sum())
    scaler.step(optimizer, clip=lambda: seen.append(weight.grad.clone()))
    torch.testing.assert_close(seen, [torch.tensor([3.0, 4.0])])
    torch.testing.assert_close(weight.detach(), torch.tensor([-2.0, -2.0]))


def test_a_step_with_gradients_that_overflow_is_left_out_and_told():
    weight, optimizer = line()
    scaler = GradientScaler(CPU, enabled=True)
    for factor in (torch.inf, 1.0, 1.0):
        optimizer.zero_grad()
        scaler.backward((weight * factor).sum())
        scaler.step(optimizer)
    torch.testing.assert_close(weight.detach(), torch.tensor([-1.0, 0.0]))
    assert scaler.end_epoch("finetune", 3) == "finetune: epoch 3 left out 1 of 3 steps, as gradients overflowed in fp16"
    assert scaler.n_steps == scaler.n_left_out == 0


def test_an_epoch_without_any_step_stops_the_training():
    weight, optimizer = line()
    scaler = GradientScaler(CPU, enabled=True)
    scaler.backward((weight * torch.nan).sum())
    scaler.step(optimizer)
    with pytest.raises(TrainingError, match="in epoch 0 the gradients of all 1 steps overflowed(.|\n)*amp bf16"):
        scaler.end_epoch("train", 0)


def test_the_scale_is_kept_for_resumption(built, planted):
    config, _, train, valid, _, model = built("SASRec", planted, epochs=1)
    trainer = Trainer(config, model)
    trainer.scaler = GradientScaler(CPU, enabled=True)
    trainer.scaler._scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    trainer.fit(train, valid, verbose=False)
    again = Trainer(config, model)
    again.scaler = GradientScaler(CPU, enabled=True)
    again.resume_checkpoint(trainer._last_file(), train)
    assert again.scaler.state_dict() == checkpoint.load(Path(trainer._last_file()))["scaler"]
    assert again.scaler.state_dict()["scale"] == 512.0


@needs_gpu
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_a_run_on_a_gpu_learns_in_16_bits(planted, amp):
    settings = {**TINY, "use_gpu": True, "epochs": 6, "learning_rate": 0.01, "train_stage": "finetune", "amp": amp}
    assert run("MSM4SR", "planted", settings=settings).test["recall@10"] > 0.5
