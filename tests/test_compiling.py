"""Compiled parts of models: the same results, the same names, and a way back."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from conftest import TINY
from recbole.model.layers import TransformerLayer

from recbole_mm.compiling import compile_parts, parts_of
from recbole_mm.quick_start import run


def results(model, batch, asked) -> tuple[torch.Tensor, ...]:
    """Loss, gradients and scores."""
    model.train().zero_grad()
    torch.manual_seed(0)
    losses = model.calculate_loss(batch)
    loss = sum(losses) if isinstance(losses, tuple) else losses
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    with torch.no_grad():
        return loss.detach(), gradient, model.eval().full_sort_predict(asked)


def compare(built, folder, name: str, backend: str) -> None:
    no_dropout = {"n_layers": 1, "hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0}
    more = {"train_stage": "finetune", "adaptor_dropout": 0.0} if name == "MSM4SR" else {}
    _, _, train, valid, _, plain = built(name, folder, **no_dropout, **more)
    compiled, warnings = copy.deepcopy(plain), []
    assert compile_parts(compiled, warnings.append, backend=backend) == len(list(parts_of(plain))) > 0
    asked = next(iter(valid))[0]
    for batch, _ in zip(train, range(2), strict=False):  # of different lengths
        for actual, expected in zip(results(compiled, batch, asked), results(plain, batch, asked), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    assert warnings == []
    assert [*compiled.state_dict()] == [*plain.state_dict()]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SASRec", "MSM4SR"])
def test_compiled_parts_compute_the_same(built, planted, name):
    compare(built, planted, name, "eager")  # all but the generation of code


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_generated_code_computes_the_same(built, planted):
    compare(built, planted, "MSM4SR", "inductor")


def test_parts_are_layers_and_what_modules_name(built, planted):
    *_, model = built("MSM4SR", planted, train_stage="finetune")
    names = [(type(module).__name__, name) for module, name in parts_of(model)]
    n_layers = sum(isinstance(module, TransformerLayer) for module in model.modules())
    assert sorted(names) == sorted([("MoEAdaptor", "mix")] * 2 + [("TransformerLayer", "forward")] * n_layers)


def test_without_a_compiler_a_run_goes_on_and_says_so(planted, monkeypatch):
    def refuse(function, **_):
        raise RuntimeError("no C++ compiler\nhere is how to get one")

    settings = {**TINY, "epochs": 1}
    plain = run("SASRec", "planted", settings=settings)
    monkeypatch.setattr(torch, "compile", refuse)
    asked = run("SASRec", "planted", settings={**settings, "compile": True})
    assert asked.test == plain.test and asked.settings_hash != plain.settings_hash
    told = "compile: torch.compile does not work on this machine (no C++ compiler); the model runs as it is"
    assert asked.warnings == [told]


def test_a_part_that_cannot_be_compiled_runs_as_it_is(built, planted, monkeypatch):
    _, _, train, _, _, plain = built("SASRec", planted)

    def fail_later(function, **_):
        def call(*args, **kwargs):
            if len(args) > 1:
                raise RuntimeError("cannot generate code")
            return function(*args, **kwargs)

        return call

    model, warnings, batch = copy.deepcopy(plain), [], next(iter(train))
    monkeypatch.setattr(torch, "compile", fail_later)
    compile_parts(model, warnings.append)
    losses = []
    for each in (plain, model):
        torch.manual_seed(0)
        losses.append(each.calculate_loss(batch))
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=0)
    assert (
        warnings
        == ["compile: TransformerLayer.forward could not be compiled (cannot generate code); it runs as it is"] * 2
    )
    with pytest.raises(TypeError, match="TransformerLayer.forward is compiled and cannot be copied"):
        copy.deepcopy(model)


def test_a_model_without_such_parts_is_told(built, planted):
    *_, model = built("Popularity", planted)
    warnings: list[str] = []
    assert compile_parts(model, warnings.append) == 0
    assert warnings == ["compile: Popularity has no part for it; it runs as it is"]
