"""Two processes that tell each other rows and items have the loss and the gradients of one with the whole batch."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import test_mmsbr
import test_msm4sr
import test_unisrec
import torch

from recbole_mm import distributed
from recbole_mm.model.msm4sr import MSM4SR
from recbole_mm.model.msm4srreleased import MSM4SRReleased
from recbole_mm.model.together import Alone, Together
from recbole_mm.shared_training import SharedTraining

PLAIN = {"item_drop_max": 0.0, "use_mixup": False, "gather_negatives": True, **test_msm4sr.NO_DROPOUT}
WITHOUT_DROPOUT = dict.fromkeys(("feature_dropout", "pivot_dropout", "fusion_dropout", "price_dropout"), 0.0)


def released_msm4sr(**settings):
    test_msm4sr.MSM4SR = MSM4SRReleased
    try:
        return test_msm4sr.built("pretrain", **settings)
    finally:
        test_msm4sr.MSM4SR = MSM4SR


def unisrec(**settings):
    model = test_unisrec.built("pretrain", **settings, gather_negatives=True, **test_unisrec.NOTHING_RANDOM)
    model._augment = lambda item_seq, item_seq_len: (item_seq.flip(0), item_seq_len.flip(0))  # nothing drawn
    if len(settings):
        model._augment = lambda item_seq, item_seq_len: (item_seq + model.n_items * (item_seq > 0), item_seq_len)
    return model


def mmsbr(**settings):
    return test_mmsbr.toy_model(share_items=True, **{**WITHOUT_DROPOUT, **settings})


MODELS = {
    "MSM4SR": lambda: (test_msm4sr.built("pretrain", **PLAIN), test_msm4sr.batch()),
    "MSM4SR, projections": lambda: (test_msm4sr.built("pretrain", proj=True, **PLAIN), test_msm4sr.batch()),
    "MSM4SR, text": lambda: (test_msm4sr.built("pretrain", image_feature=None, **PLAIN), test_msm4sr.batch()),
    "MSM4SRReleased": lambda: (released_msm4sr(proj=True, **PLAIN), test_msm4sr.batch()),
    "UniSRec": lambda: (unisrec(item_drop_prob=1.0), test_msm4sr.batch()),
    "MMSBR": lambda: (mmsbr(), test_mmsbr.batch()),
    "MMSBR, chunks": lambda: (mmsbr(pivots="per_item", tower_chunk=3), test_mmsbr.batch()),
    "MMSBR, anchors": lambda: (mmsbr(contrastive_anchors=4), test_mmsbr.batch()),
}


def rows_of(interaction, rows):
    return {key: value[rows] for key, value in interaction.items()}


def found(model, losses):
    """Loss and gradients by name."""
    losses = losses if isinstance(losses, tuple) else (losses,)
    model.zero_grad()
    sum(losses).backward()
    gradients = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    return {"loss": sum(losses).detach(), **gradients}


def compare() -> dict:
    """What one process makes of whole batches, and what this one of two makes with the other's help."""
    distributed.join()
    results = {}
    for name, make in MODELS.items():
        for n_rows in (3, 1):  # two and one; one, and none
            model, interaction = make()
            interaction, model = rows_of(interaction, slice(0, n_rows)), model.double()
            torch.manual_seed(5)  # anchors are drawn
            alone = found(model, model.calculate_loss(interaction))
            loader = SimpleNamespace(sample_size=n_rows, batch_size=8, collate_fn=lambda rows: rows)
            shared = SharedTraining(model, torch.optim.SGD(model.parameters(), lr=0.1), loader, torch.device("cpu"))
            shared.begin_epoch()
            torch.manual_seed(5 + distributed.rank())
            together = found(model, shared.loss(rows_of(interaction, loader.collate_fn(list(range(n_rows))))))
            together["loss"] = torch.stack(distributed.gathered(together["loss"])).mean()
            results[f"{name}, {n_rows} rows"] = [
                {key: value.numpy() for key, value in each.items()} for each in (alone, together)
            ]
    together = Together()
    torch.manual_seed(distributed.rank())
    results["drawn"] = distributed.gathered([float(together.same(torch.rand(()))), float(torch.rand(()))])
    return results


def test_two_processes_have_the_loss_and_the_gradients_of_one(quick_launch):
    results = distributed.launch(compare, 2)
    (mine, my_own), (theirs, their_own) = results.pop("drawn")
    assert mine == theirs and my_own != their_own  # one number of all, and the streams go on by themselves
    assert len(results) == 2 * len(MODELS)
    for name, (alone, together) in results.items():
        assert alone.keys() == together.keys(), name
        for part, value in together.items():
            np.testing.assert_allclose(value, alone[part], rtol=1e-9, atol=1e-11, err_msg=f"{name}: {part}")


@pytest.mark.parametrize(("n", "n_processes"), [(10, 3), (2, 4), (0, 2), (7, 1)])
def test_parts_are_next_to_each_other_and_differ_by_one_at_most(n, n_processes, monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: n_processes)
    parts = []
    for rank in range(n_processes):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        parts.append(Together().part(torch.arange(n)))
    assert torch.cat(parts).tolist() == list(range(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(("drawn_on", "group"), [("cpu", None), ("cuda", "of GPUs")])
def test_a_number_goes_through_the_group_of_the_device_that_drew_it(drawn_on, group, monkeypatch):
    """UniSRec draws one on the CPU, also where it trains on GPUs, whose group carries nothing else."""
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    sent = []
    monkeypatch.setattr(torch.distributed, "broadcast", lambda number, src, group: sent.append((number, src, group)))
    number = SimpleNamespace(is_cuda=drawn_on == "cuda")
    assert Together("of GPUs").same(number) is number
    assert sent == [(number, 0, group)]


@pytest.mark.parametrize(("settings", "n_sent"), [({}, 5), ({"contrastive_weight": 0.0}, 1)])
def test_items_are_told_as_far_as_a_loss_reads_them(settings, n_sent):
    told, model = [], mmsbr(**settings)

    class Counted(Alone):
        def whole(self, x, n):
            told.append(n)
            return x

    model.together = Counted()
    model.calculate_loss(test_mmsbr.batch())
    assert told == [test_mmsbr.N_IDS] * n_sent


def test_alone_everything_stays_the_tensor_it_was():
    x, alone = torch.randn(3, 2), Alone()
    rows = alone.rows(3, x.device)
    assert rows.places is None
    assert all(y is x for y in (alone.same(x), alone.part(x), alone.whole(x, 3), alone.mean(x, 3), rows.of_all(x)))
