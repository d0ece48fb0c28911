"""Histories at about their own length, for models of RecBole's that compute every position of a padded history.

    histories [B, L]  --by length-->  rows of 1 to 4 items  -> forward on [n, 4]  --+
    right-padded                      rows of 5 to 9 items  -> forward on [m, 9]  --+-->  in the order of the batch
                                      ...                                         --+

RecBole pads each history to MAX_ITEM_LIST_LENGTH. Where what a model says of a row depends neither on the padding
behind its last item nor on the other rows, the rows of a batch can go through its ``forward`` in groups of like length,
each cut to its longest history. The batch, and the loss over it, stay what they are.

In evaluation, models in `EXACT` give the same scores, bit for bit on a CPU (x86-64 with MKL), because no group is cut
below `SHORTEST` positions or `FEWEST_ROWS` rows, and what needs more than `SUMMED_AT_ONCE` / 2 positions is not cut if
L is more than `SUMMED_AT_ONCE`. Of the others in `TRIMMABLE` scores are the same up to rounding, as
are all losses and gradients in training if nothing is dropped out. Dropout draws as many numbers as are left, so that
they are others than at full length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recbole_mm.model.layers import length_groups
from recbole_mm.model.positions import use_cheaper_parts

# A test compares each with itself at full length. The others pad on purpose (STAMP, NextItNet, SHAN, NPE), have weights
# for each of MAX_ITEM_LIST_LENGTH positions (Caser, FEARec, Fossil, HGN, LightSANs, RepeatNet, SINE), mark positions in
# their batches (BERT4Rec, GRU4RecCPR, SASRecCPR), or look at few positions anyway (FPMC, HRM, TransRec).
EXACT = frozenset({"FDSA", "GCSAN", "GRU4Rec", "GRU4RecF", "SASRec", "SASRecF"})
TRIMMABLE = EXACT | {"CORE", "NARM", "SRGNN"}
SHORTEST = 16  # positions in evaluation: the floats that a vector unit sums at once
SUMMED_AT_ONCE = 192  # terms of a matrix product that MKL sums in one go; of somewhat more, it sums the halves
FEWEST_ROWS = 16  # of a group: a product of few rows is rounded otherwise, and each group costs time by itself
MOST_GROUPS = 8


def with_trimmed_histories(model_class: type, trim: str) -> type:
    """The class of a model whose ``forward`` runs over groups of rows of like length; others are returned as they are.

    Args:
        model_class: any.
        trim: the setting ``trim_histories``: none, evaluation (of `EXACT` models) or all (of `TRIMMABLE` ones, in
            training too, with dropout and gelu as in `recbole_mm.model.positions.use_cheaper_parts`).
    """
    name, module = model_class.__name__, model_class.__module__
    names = {"none": frozenset(), "evaluation": EXACT, "all": TRIMMABLE}[trim]
    if name not in names or not module.startswith("recbole."):
        return model_class
    attributes = {"__doc__": model_class.__doc__, "__module__": module, "trims_in_training": trim == "all"}
    return type(name, (_TrimmedHistories, model_class), attributes)


class _TrimmedHistories:
    """Stands before a model among the bases of a class."""

    trims_in_training: bool

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        if self.trims_in_training:
            use_cheaper_parts(self)

    def forward(self, item_seq: Tensor, *others: Tensor) -> Tensor:
        """As the model's, of all rows: ``item_seq`` is [B, L], right-padded with 0, ``others`` have B rows."""
        forward = super().forward
        if self.training and not self.trims_in_training:
            return forward(item_seq, *others)
        groups = groups_of(item_seq, exact=not self.training)
        if len(groups) == 1:
            return forward(item_seq[:, : groups[0][1]], *others)
        outputs = [forward(item_seq[rows, :longest], *(other[rows] for other in others)) for rows, longest in groups]
        return torch.cat(outputs)[torch.cat([rows for rows, _ in groups]).argsort()]


def groups_of(item_seq: Tensor, *, exact: bool) -> list[tuple[Tensor, int]]:
    """Rows of like length: each row in one group, at least `FEWEST_ROWS` in each if there are as many.

    Args:
        item_seq: [B, L] int, right-padded with 0.
        exact: cut only as far as sums stay the same to the last bit.

    Returns:
        For each group, shortest first: its row numbers, and the positions that it needs.
    """
    n_rows, max_length = item_seq.shape
    lengths = (item_seq > 0).sum(dim=1).clamp(min=min(SHORTEST if exact else 1, max_length))  # [B]
    if exact and max_length > SUMMED_AT_ONCE:
        lengths.masked_fill_(lengths > SUMMED_AT_ONCE // 2, max_length)
    n_groups = min(MOST_GROUPS, n_rows // FEWEST_ROWS)
    if n_groups <= 1:
        return [(torch.arange(n_rows, device=item_seq.device), int(lengths.max()))]
    groups: list[tuple[Tensor, int]] = []
    for rows, longest in length_groups(lengths, n_groups):
        if groups and len(groups[-1][0]) < FEWEST_ROWS:
            rows = torch.cat([groups.pop()[0], rows])
        groups.append((rows, longest))
    if len(groups) > 1 and len(groups[-1][0]) < FEWEST_ROWS:
        rows, longest = groups.pop()
        groups.append((torch.cat([groups.pop()[0], rows]), longest))
    return groups
