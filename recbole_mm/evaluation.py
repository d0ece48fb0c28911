"""The evaluation of a trainer, and the one test of a run: every item is ranked, and the values of each row are kept.

How ranks are counted and ties are ordered is told in `recbole_mm.ranking`. A metric that needs more than the rank of
the target, such as ItemCoverage, still goes through RecBole's collector.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

import numpy as np
import torch
from recbole.data.dataloader import FullSortEvalDataLoader
from recbole.evaluator import Register
from recbole.evaluator.collector import DataStruct
from torch import Tensor
from torch.profiler import record_function
from tqdm import tqdm

from recbole_mm import checkpoint, distributed
from recbole_mm.profiling import labelled
from recbole_mm.ranking import (
    RANK_METRICS,
    Ranked,
    rank_products,
    rank_rows,
    ranks_of_batches,
    rows_at_once,
    tie_order,
    values_of,
)
from recbole_mm.records import PerUser
from recbole_mm.slices import bands_of, by_band

SCORES_AT_ONCE = 12 << 20  # of a block of rows; with `keep_freed_memory` each block takes the memory of the one before
LATENCY_SECONDS, LATENCY_SAMPLES, LATENCY_BLOCKS = 0.2, 20, 3


# ------------------------------------------------ a trainer's evaluation


class FullRanking:
    """What a trainer of RecBole's evaluates with instead of its own `evaluate`; stands before it among the bases.

    Differs from RecBole's in this: ranks are counted, ties follow the fixed rule, scores that are not finite stop the
    evaluation, only ``dataset.candidates()`` are ranked where a data set has such a method, and what a batch gets
    scores for is bounded by memory and not by ``eval_batch_size`` alone.

    Attributes:
        ranked: of each row of the data that was evaluated last, in its order; None if RecBole evaluated it.
    """

    ranked: Ranked | None = None
    _order: tuple[Sequence[str], Tensor] | None = None

    @torch.no_grad()
    def evaluate(self, eval_data, load_best_model=True, model_file=None, show_progress=False):
        """Metrics by name, means over all rows, rounded as RecBole rounds them."""
        if not isinstance(eval_data, FullSortEvalDataLoader) or not eval_data.is_sequential:
            self.ranked = None
            return super().evaluate(eval_data, load_best_model, model_file, show_progress)
        if load_best_model:
            self._load_weights(model_file or self.saved_model_file)
        self.model.eval()
        others = [metric for metric in self.evaluator.metrics if metric not in RANK_METRICS]
        self.ranked, collected = self._rank(eval_data, others, show_progress=show_progress)
        result, decimals = {}, self.config["metric_decimal_place"]
        for metric in self.evaluator.metrics:
            if metric in others:
                result |= self.evaluator.metric_class[metric].calculate_metric(collected)
            else:
                values = values_of(self.ranked.rank.numpy(), [metric], self.config["topk"])
                result |= {key: round(value.mean(), decimals) for key, value in values.items()}
        self.wandblogger.log_eval_metrics(result, head="eval")
        return result

    def _load_weights(self, path) -> None:
        state = checkpoint.load(path, map_location=self.device)
        self.model.load_state_dict(state["state_dict"])
        self.model.load_other_parameter(state.get("other_parameter"))
        self.logger.info(f"Loading model structure and parameters from {path}")

    def _rank(self, eval_data, others: Sequence[str], *, show_progress: bool) -> tuple[Ranked, DataStruct]:
        """Ranks of the rows of a data set, and what ``others`` need, from RecBole's collector."""
        collector, dataset = self.eval_collector, eval_data._dataset
        candidates = candidates_of(dataset)
        register, collector.register = collector.register, Register({"metrics": others})

        def score(batch) -> tuple[Tensor, Tensor]:
            interaction, scores, rows, targets = self._full_sort_batch_eval(batch)
            if others:
                ranked = scores if candidates is None else scores.masked_fill(~candidates.to(scores.device), -torch.inf)
                collector.eval_batch_collect(ranked, interaction, rows, targets)
            return scores, targets

        try:
            order = self._order_of(dataset.field2id_token[dataset.iid_field])
            as_products = self.ranks_products() and not others
            blocks = self.blocks(eval_data, show_progress=show_progress, whole=as_products)
            batches = distributed.own_rows(self.watched(labelled(blocks, "make the batch")))
            ranking = {"order": order, "candidates": candidates, "name": self.config["model"]}
            if as_products:
                rows, ranked = ranks_of_batches(partial(self._rank_products, **ranking), batches)
            else:
                rows, ranked = rank_rows(score, batches, **ranking)
            rows, *columns = distributed.all_rows(rows, *ranked)
            ranked = Ranked(*columns)
        finally:
            collector.register = register
            collected = collector.get_data_struct()  # takes it out, so that nothing is left if a batch failed
        first = np.unique(rows, return_index=True)[1]  # a sampler may repeat rows to fill its last batch
        return Ranked(ranked.rank[first], ranked.constant[first]), collected

    def ranks_products(self) -> bool:
        """Whether a model's scores are compared some items at a time, and never are a matrix of all items."""
        return getattr(self.model, "softmax", None) in ("chunked", "sampled")  # of another model, it may be a module

    def _rank_products(self, batch, **ranking) -> Ranked:
        interaction, _, _, targets = batch
        with record_function("scores"):
            queries, vectors = self.model.query_and_item_vectors(interaction.to(self.device))
        with record_function("ranks"):
            return rank_products(queries, vectors, targets, chunk=self.model.softmax_chunk, **ranking)

    def watched(self, blocks: Iterable) -> Iterable:
        """The blocks of an evaluation, where a trainer may look on."""
        return blocks

    def _order_of(self, tokens: Sequence[str]) -> Tensor:
        """`tie_order`, made once for the tokens that all parts of a data set share."""
        if self._order is None or self._order[0] is not tokens:
            self._order = tokens, tie_order(tokens)
        return self._order[1]

    def blocks(
        self, eval_data, *, show_progress: bool = False, whole: bool = False
    ) -> Iterator[tuple[np.ndarray, tuple]]:
        """Batches of an evaluation in blocks of rows whose scores fit into memory, with their positions in the data.

        Args:
            whole: leave batches as they are.
        """
        self.tot_item_num = eval_data._dataset.item_num
        if self.item_tensor is None:
            self.item_tensor = eval_data._dataset.get_item_feature().to(self.device)
        positions = np.fromiter(eval_data.sampler, dtype=np.int64)
        size = eval_data.batch_size if whole else rows_at_once(SCORES_AT_ONCE, self.tot_item_num, self.device)
        done = 0
        for interaction, history, _, targets in tqdm(eval_data, desc="Evaluate", ncols=100, disable=not show_progress):
            for start in range(0, len(interaction), size):
                part = interaction[start : start + size]
                batch = (part, history, torch.arange(len(part)), targets[start : start + size])
                yield positions[done : done + len(part)], batch
                done += len(part)


def with_full_ranking(trainer: type) -> type:
    """The class of a trainer, which evaluates with `FullRanking`; a name of its own it keeps."""
    if issubclass(trainer, FullRanking):
        return trainer
    return type(trainer.__name__, (FullRanking, trainer), {"__doc__": trainer.__doc__})


def candidates_of(dataset) -> Tensor | None:
    """[N] bool, the items that are ranked, or None for all of them."""
    return dataset.candidates() if hasattr(dataset, "candidates") else None


# ------------------------------------------------ the test


@dataclass(frozen=True)
class Outcome:
    """What the one test of a run came to; nothing for a run without one.

    Attributes:
        metrics: by name, means over all rows.
        rows: values of each row.
        slices: metrics of parts of the rows, ``{"popularity": {"head": {"n": 12, "recall@20": …}}}``.
        latency: "batch_ms_per_user" and "single_ms".
        warnings: what a reader of the result must know.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    rows: PerUser | None = None
    slices: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    latency: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def evaluate_test(trainer, test_data, train_data, *, show_progress: bool = False) -> Outcome:
    """Load the best weights and rank the test rows, once.

    Args:
        trainer: a trainer with `FullRanking`, of our models or of RecBole's.
        test_data, train_data: the data loaders; slices by popularity count what is in the latter.

    Raises:
        TrainingError: scores that are not finite.
    """
    metrics = trainer.evaluate(test_data, load_best_model=True, show_progress=show_progress)
    warnings = _constant_warnings(trainer.ranked.constant)
    rows = _rows_of(trainer, test_data._dataset)
    bands, problems = bands_of(train_data._dataset, test_data._dataset)
    return Outcome(
        metrics={key: float(value) for key, value in metrics.items()},
        rows=rows,
        slices=by_band(bands, rows.values, decimals=trainer.config["metric_decimal_place"]),
        latency=scoring_latency(trainer, test_data) if distributed.is_first() else {},
        warnings=warnings + problems,
    )


def _constant_warnings(constant: Tensor) -> list[str]:
    n_constant, n_rows = int(constant.sum()), len(constant)
    if not n_constant:
        return []
    if n_constant == n_rows:
        return [f"all {n_rows} test rows got the same score for every item: the metrics are those of chance"]
    return [f"{n_constant} of {n_rows} test rows got the same score for every item"]


def _rows_of(trainer, dataset) -> PerUser:
    rank = trainer.ranked.rank.numpy()
    metrics = [metric for metric in trainer.evaluator.metrics if metric in RANK_METRICS]
    user, target = (
        np.asarray(dataset.field2id_token[field])[dataset.inter_feat[field].numpy()].astype(str)
        for field in (dataset.uid_field, dataset.iid_field)
    )
    return PerUser(user, target, rank, values_of(rank, metrics, trainer.config["topk"]))


@torch.no_grad()
def scoring_latency(trainer, eval_data) -> dict[str, float]:
    """Milliseconds that scores take, without ranking them: medians over some blocks, and over some single users.

    What depends on items alone is computed before, as it would be where a model is deployed.
    """
    trainer.model.eval()
    blocks = [batch for _, batch in islice(trainer.blocks(eval_data), LATENCY_BLOCKS)]
    (interaction, history, row, target), *_ = blocks
    singles = [
        (interaction[i : i + 1], history, row[:1], target[i : i + 1])
        for i in range(min(LATENCY_SAMPLES, len(interaction)))
    ]
    trainer._full_sort_batch_eval(singles[0])  # makes the item tower, if the last evaluation has not
    per_user = _median_seconds(trainer, blocks, [len(batch[0]) for batch in blocks])
    single = _median_seconds(trainer, singles, [1] * len(singles))
    return {"batch_ms_per_user": round(1000 * per_user, 6), "single_ms": round(1000 * single, 6)}


def _median_seconds(trainer, batches: Sequence[tuple], n_rows: Sequence[int]) -> float:
    """Median, over the batches in turn, of the time of one divided by its rows: one or more, for a fifth second."""
    seconds, begin = [], time.perf_counter()
    while not seconds or (len(seconds) < LATENCY_SAMPLES and time.perf_counter() - begin < LATENCY_SECONDS):
        number = len(seconds) % len(batches)
        _wait_for_device(trainer.device)
        clock = time.perf_counter()
        trainer._full_sort_batch_eval(batches[number])
        _wait_for_device(trainer.device)
        seconds.append((time.perf_counter() - clock) / n_rows[number])
    return statistics.median(seconds)


def _wait_for_device(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
