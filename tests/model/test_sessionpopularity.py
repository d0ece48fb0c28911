"""SessionPopularity: the prefix first, most often first, then everything else by popularity."""

from __future__ import annotations

import torch


def test_the_items_of_the_prefix_come_first_by_how_often_they_occur(built, planted):
    _, _, _, _, _, model = built("SessionPopularity", planted)
    model.occurrences.copy_(torch.arange(model.n_items))  # the higher the id, the more popular
    batch = {model.ITEM_SEQ: torch.tensor([[4, 7, 2, 7, 4, 7], [9, 3, 0, 0, 0, 0]])}
    batch[model.ITEM_SEQ_LEN] = torch.tensor([6, 2])
    first, second = model.full_sort_predict(batch).argsort(descending=True).tolist()
    everything = set(range(1, model.n_items))
    assert first == [7, 4, 2, *sorted(everything - {7, 4, 2}, reverse=True), 0]
    assert second == [9, 3, *sorted(everything - {9, 3}, reverse=True), 0]
