"""Negatives of a sampled softmax, drawn once for all rows of a batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

SAMPLINGS = ("popularity", "uniform")


class NegativeSampler(nn.Module):
    """Draws items with replacement, each with its probability q.

    Numbers come from torch's generator, so that ``seed`` governs them and a resumed run goes on with them.
    O(n log N) time a draw, O(N) memory. Nothing here is trained or saved.

    Args:
        weights: [N], q times any constant; an item of weight 0 is never drawn.
        n_drawn: how many, each time.

    Raises:
        ValueError: ``n_drawn`` below 1, a negative weight, or none above 0.
    """

    def __init__(self, weights: Tensor, *, n_drawn: int) -> None:
        super().__init__()
        weights = weights.double()
        if n_drawn < 1 or not (weights >= 0).all() or not (weights > 0).any():
            raise ValueError(
                f"{n_drawn} draws from {len(weights)} items need one draw and one positive weight at least"
            )
        self.n_drawn = n_drawn
        drawable = weights.nonzero().squeeze(1)
        upto = weights[drawable].cumsum(0)
        self.register_buffer("drawable", drawable, persistent=False)  # [d] item ids
        self.register_buffer("upto", upto, persistent=False)  # [d]
        log_expected = (weights[drawable] / upto[-1]).log() + math.log(n_drawn)
        self.register_buffer("log_expected", log_expected.float(), persistent=False)  # [d], log of the expected number

    def draw(self) -> tuple[Tensor, Tensor]:
        """Items that were drawn, each once and in the order of their ids, and the corrections of their logits.

        Returns:
            [c] item ids, and [c] log(times drawn) - log(times expected): with exp(correction) as weights, a sum over
            the drawn items is on average the sum over all items that can be drawn.
        """
        at = torch.rand(self.n_drawn, dtype=torch.double, device=self.upto.device) * self.upto[-1]
        # Rounding may reach the very end.
        place = torch.searchsorted(self.upto, at, right=True).clamp_max(len(self.upto) - 1)
        place, times = place.unique(return_counts=True)
        return self.drawable[place], times.to(self.log_expected.dtype).log() - self.log_expected[place]


def sampling_weights(kind: str, targets: Tensor | None, can_be_drawn: Tensor) -> Tensor:
    """What `NegativeSampler` draws by, [N].

    Args:
        kind: "uniform", or "popularity": as often as an item is the target of a training row, plus one, so that every
            item has its chance.
        targets: [R] item ids, of the training rows; read for "popularity" alone.
        can_be_drawn: [N] bool.

    Raises:
        ValueError: another kind.
    """
    if kind not in SAMPLINGS:
        raise ValueError(f"negative_sampling is {kind!r}, expected one of {', '.join(SAMPLINGS)}")
    weights = can_be_drawn.double()
    return weights if kind == "uniform" else weights * (1 + torch.bincount(targets, minlength=len(weights)))
