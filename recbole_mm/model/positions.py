"""Which models can be trained at all positions of a history in one pass, and how RecBole's own among them are.

``train_positions: last`` has a row for each prefix of a history, ``all`` and ``windows`` have passes over whole ones
(see `recbole_mm.data.passes`). A model can do with passes if what it computes at a position depends on nothing behind it.
Ours say so themselves (`MultimodalRecommender.left_to_right`). For SASRec and GRU4Rec of RecBole it is done here, with
their parameters, from their parts: the loss and its gradient are those of their prefix rows up to rounding, as long as
nothing is dropped out.

Shapes: S sequences, P their packed positions, T targets, L positions, N items, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recbole_mm.data.passes import PASS_POSITION, PASS_ROW
from recbole_mm.errors import SettingError
from recbole_mm.model.layers import Dropout, causal_outputs, length_groups, valid_positions

N_GROUPS = 4  # of like length, within a batch
_LAST_ITEM = "it looks at the last item of each history, so that each one needs a pass of its own"
_BOTH_SIDES = "it looks at what is behind a position too"
_REASONS = {
    "NARM": _LAST_ITEM,
    "STAMP": _LAST_ITEM,
    "SRGNN": _LAST_ITEM,
    "GCSAN": _LAST_ITEM,
    "MMSBR": _LAST_ITEM,
    "MMSBRReleased": _LAST_ITEM,
    "BERT4Rec": _BOTH_SIDES,
    "CORE": "it takes a weighted mean of a whole history",
}


def places_of(interaction: Any, lengths: Tensor) -> Tensor | None:
    """Where the targets of a batch are read, as positions of the packed sequences, [T]; None for their last ones.

    Args:
        interaction: a batch, of passes or of rows.
        lengths: [S], of its histories.
    """
    if PASS_ROW not in interaction:
        return None
    return (lengths.cumsum(0) - lengths)[interaction[PASS_ROW]] + interaction[PASS_POSITION]


# ------------------------------------------------ who can


def refuse_positions(model_class: type, positions: str, *, stage: str, loss_type: str | None, origin: str = "") -> None:
    """Refuse passes where a model, or a stage of it, needs a row for each prefix.

    Args:
        positions: the setting ``train_positions``.
        stage: the setting ``train_stage``; "both" pre-trains with rows and fine-tunes with passes.
        loss_type: CE, or a pairwise loss.
        origin: of the setting, for the message.

    Raises:
        SettingError: with the reason.
    """
    if positions == "last":
        return
    name, own = model_class.__name__, getattr(model_class, "left_to_right", None)
    if own is None and _is_recbole_s(model_class):
        own = name in _OUTPUTS
    if not own:
        reason = _REASONS.get(name, "it is not known to compute a position from what is before it alone")
    elif loss_type not in ("CE", None):
        reason = f"loss_type is {loss_type}, and passes go with CE, a softmax over all items"
    elif stage == "pretrain" and hasattr(model_class, "same_in_both_stages"):
        reason = "the losses of its pre-training compare whole histories of one batch with each other"
    else:
        return
    raise SettingError(
        f"train_positions {positions}{origin} does not go with {name}: {reason}\n"
        "  leave it out, so that each prefix of a history is a row of its own; models that can do with it are "
        f"{', '.join(_OUTPUTS)}, and MSM4SR and UniSRec in fine-tuning"
    )


def _is_recbole_s(model_class: type) -> bool:
    return model_class.__module__.startswith("recbole.")


# ------------------------------------------------ RecBole's models


def read_at_all_positions(model: nn.Module) -> None:
    """Let a model of RecBole's take batches of passes too; ours can, and others stay what they are.

    Only the instance changes. Dropout draws its masks as `layers.Dropout` does, and gelu is computed in one pass.
    """
    name = type(model).__name__
    if not _is_recbole_s(type(model)) or name not in _OUTPUTS or hasattr(model, "outputs_at"):
        return
    use_cheaper_parts(model)
    stock = model.calculate_loss
    model.outputs_at = MethodType(_OUTPUTS[name], model)
    model.in_16_bits = ("forward", "outputs_at")

    def calculate_loss(self: nn.Module, interaction: Any) -> Tensor:
        if PASS_ROW not in interaction:
            return stock(interaction)
        item_seq, lengths = interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN]
        outputs = self.outputs_at(item_seq, lengths, places_of(interaction, lengths))  # [T, D]
        return self.loss_fct(outputs @ self.item_embedding.weight.T, interaction[self.POS_ITEM_ID])

    model.calculate_loss = MethodType(calculate_loss, model)


def use_cheaper_parts(model: nn.Module) -> None:
    """Let a model of RecBole's draw its dropout as `layers.Dropout` does, and compute gelu in one pass."""
    for module in list(model.modules()):
        for child_name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, child_name, Dropout(child.p))
        if getattr(getattr(module, "intermediate_act_fn", None), "__name__", "") == "gelu":
            module.intermediate_act_fn = F.gelu


def _sasrec_outputs(self: nn.Module, item_seq: Tensor, lengths: Tensor, places: Tensor) -> Tensor:
    """RecBole's SASRec at some positions: [S, L], [S], [T] -> [T, D]."""
    packed = self.item_embedding(item_seq[valid_positions(item_seq, lengths)])  # [P, D]
    return causal_outputs(self, packed, lengths, places, n_groups=N_GROUPS)


def _gru4rec_outputs(self: nn.Module, item_seq: Tensor, lengths: Tensor, places: Tensor) -> Tensor:
    """RecBole's GRU4Rec at some positions: [S, L], [S], [T] -> [T, D]."""
    starts = lengths.cumsum(0) - lengths  # [S]
    outputs, shift, n_outputs = [], torch.zeros_like(starts), 0  # [S], from a place to its output
    for rows, longest in length_groups(lengths, N_GROUPS):
        hidden, _ = self.gru_layers(self.emb_dropout(self.item_embedding(item_seq[rows, :longest])))  # [s, l, H]
        outputs.append(hidden.flatten(0, 1))
        shift[rows] = n_outputs + torch.arange(len(rows), device=rows.device) * longest - starts[rows]
        n_outputs += len(outputs[-1])
    row = torch.searchsorted(starts, places, right=True) - 1  # [T]
    return self.dense(F.embedding(shift[row] + places, torch.cat(outputs)))


_OUTPUTS: dict[str, Callable[..., Tensor]] = {"SASRec": _sasrec_outputs, "GRU4Rec": _gru4rec_outputs}
