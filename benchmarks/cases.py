"""The models that `python -m benchmarks` measures: ours, its literal version, and made-up data for both.

MSM4SR, UniSRec   benchmarks.msm4sr, benchmarks.unisrec: literal versions of our models, from the same parameters
MMSBR             benchmarks.mmsbr: `MMSBRReleased` beside the model as it was released
SASRec            RecBole's own class at full length, beside itself as our runner makes it with trim_histories=all;
                  one pass per history instead of one row per prefix is measured in benchmarks.sasrec

Histories have the lengths of Amazon Pantry, whatever the number of items, so that what grows is what the items cost.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import recbole
import torch
import yaml
from recbole.model.sequential_recommender import SASRec
from torch import Tensor, nn

from benchmarks import RECBOLE_FIELDS, Settings, mmsbr, msm4sr, unisrec
from benchmarks.clocks import Evaluated
from benchmarks.literal_msm4sr import LiteralMSM4SR
from benchmarks.literal_unisrec import LiteralUniSRec
from benchmarks.mmsbr_models import Released, batches_of, build_fast, build_literal, sessions
from recbole_mm.ranking import rank_targets
from recbole_mm.trimming import with_trimmed_histories

LARGEST_K = 50  # of RecBole's cut-offs: it makes a list of so many items per user


@dataclass(frozen=True)
class Sizes:
    """How much made-up data there is.

    Attributes:
        rows, width: feature rows per item and modality (MSM4SR; UniSRec has one), and their width.
        histories: users of the training.
        batch, users: of a training step and of an evaluation.
        session_batch, sessions: the same of MMSBR, as released.
        evaluation_batch: of our evaluations, and of RecBole's.
        checked_items: items when values are compared, at most.
    """

    rows: int = 10
    width: int = 768
    histories: int = 13_101
    batch: int = 1024
    users: int = 4096
    session_batch: int = 100
    sessions: int = 7766
    evaluation_batch: int = 4096
    checked_items: int = 400


QUICK = Sizes(
    rows=3, width=64, histories=600, batch=64, users=256, session_batch=16, sessions=128, evaluation_batch=256,
    checked_items=100,
)  # fmt: skip


class NotEqualError(Exception):
    """Ours and the literal version do not compute the same: their times say nothing."""


class Case:
    """One model in one stage, with so many items.

    Attributes:
        name: in tables.
        model: of the runner.
        shipped_in_anomaly_mode: the literal version is also timed as it is shipped, with autograd's anomaly mode on.
    """

    name: str
    model: str
    shipped_in_anomaly_mode = False
    evaluates = True

    def __init__(self, n_items: int, sizes: Sizes) -> None:
        self.n_items, self.sizes = n_items, sizes

    def ours(self) -> nn.Module:
        raise NotImplementedError

    def literal(self, ours: nn.Module) -> nn.Module:
        """With the same parameters as ours, its own copies of them."""
        raise NotImplementedError

    def training(self, n: int) -> list[dict[str, Tensor]]:
        """So many batches."""
        raise NotImplementedError

    def evaluation(self, size: int | None = None) -> list[dict[str, Tensor]]:
        """All users, in batches of that size."""
        raise NotImplementedError

    @property
    def literal_evaluation_batch(self) -> int:
        return self.sizes.evaluation_batch

    def rank(self, scores: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """As our evaluation does."""
        return rank_targets(scores, batch["item_id"], torch.arange(scores.shape[1], device=scores.device)).rank

    def literal_rank(self, scores: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """As RecBole's evaluation does, which looks for the target in a list of the best."""
        return scores.topk(min(LARGEST_K, scores.shape[1]), dim=1).indices == batch["item_id"].unsqueeze(1)

    def differences(self) -> dict[str, float]:
        """Largest ones of loss, gradient and score in float64, with nothing random."""
        raise NotImplementedError

    tolerances = {"loss": 1e-9, "gradient": 1e-6, "score": 1e-9}

    def check(self) -> dict[str, float]:
        """Of fewer items.

        Raises:
            NotEqualError: ours and the literal version differ.
        """
        few = type(self)(min(self.n_items, self.sizes.checked_items), replace(self.sizes, batch=64, rows=3, width=32))
        found = few.differences()
        if not all(found[key] <= limit for key, limit in self.tolerances.items()):  # also where one is no number
            raise NotEqualError(f"{self.name}: ours and the literal version differ by {found}")
        return found


class Ranked(Evaluated):
    """A whole evaluation: item vectors, scores and ranks of all batches, with nothing left from the last one."""

    def __init__(self, model: nn.Module, rank: Callable[[Tensor, dict], Tensor]) -> None:
        super().__init__(model)
        self.rank = rank

    @torch.no_grad()
    def __call__(self, batches) -> None:
        self.model.train()
        self.model.eval()  # as after an epoch
        for batch in batches:
            self.rank(self.model.full_sort_predict(batch), batch)


# ---------------------------------------------------------------- users with histories


class _OfUsers(Case):
    def __init__(self, n_items: int, sizes: Sizes) -> None:
        super().__init__(n_items, sizes)
        n_users = max(sizes.histories, sizes.users)
        self.users = msm4sr.histories(n_users, n_items, np.random.default_rng(0), mean_length=9.7)

    def training(self, n: int) -> list[dict[str, Tensor]]:
        return msm4sr.training_batches(self.users, self.sizes.batch, n, np.random.default_rng(1))

    def evaluation(self, size: int | None = None) -> list[dict[str, Tensor]]:
        chosen, size = self.users[: self.sizes.users], size or self.sizes.evaluation_batch
        parts = [chosen[start : start + size] for start in range(0, len(chosen), size)]
        return [msm4sr.interaction([u[:-1] for u in part], [int(u[-1]) for u in part]) for part in parts]

    def small_batch(self) -> dict[str, Tensor]:
        return msm4sr.training_batches(self.users, 64, 1, np.random.default_rng(2))[0]


class _MSM4SR(_OfUsers):
    model, stage = "MSM4SR", ""

    def ours(self, **settings) -> nn.Module:
        sizes = self.sizes
        dataset = msm4sr.MadeUpDataset(n_items=self.n_items, n_rows=sizes.rows, width=sizes.width, ragged=False)
        return msm4sr.build(self.stage, dataset, **settings)

    def literal(self, ours: nn.Module) -> nn.Module:
        return LiteralMSM4SR(copy.deepcopy(ours))

    def differences(self) -> dict[str, float]:
        model = self.ours(**msm4sr.NO_DROPOUT).double()
        return msm4sr.largest_differences(model, LiteralMSM4SR(model), self.small_batch())


class MSM4SRPretraining(_MSM4SR):
    name, stage, evaluates = "MSM4SR pre-training", "pretrain", False


class MSM4SRFineTuning(_MSM4SR):
    name, stage = "MSM4SR fine-tuning", "finetune"


class UniSRec(_OfUsers):
    name, model = "UniSRec fine-tuning", "UniSRec"

    def ours(self, **settings) -> nn.Module:
        dataset = unisrec.MadeUpDataset(n_items=self.n_items, width=self.sizes.width)
        return unisrec.build("transductive_ft", dataset, **settings)

    def literal(self, ours: nn.Module) -> nn.Module:
        return LiteralUniSRec(copy.deepcopy(ours))

    def differences(self) -> dict[str, float]:
        model = self.ours(**unisrec.NOTHING_RANDOM).double()
        unisrec.away_from_zero(model)
        return msm4sr.largest_differences(model, LiteralUniSRec(model), self.small_batch())


# ---------------------------------------------------------------- RecBole's SASRec


class _Items:
    """What SASRec asks of a dataset."""

    def __init__(self, n_items: int) -> None:
        self.n_items = n_items

    def num(self, field: str) -> int:
        return self.n_items


class SASRecCase(_OfUsers):
    name, model, shipped_in_anomaly_mode = "SASRec", "SASRec", True

    def build(self, model_class: type, **settings) -> nn.Module:
        torch.manual_seed(0)
        file = Path(recbole.__file__).parent / "properties" / "model" / "SASRec.yaml"
        defaults = {**yaml.safe_load(file.read_text()), **RECBOLE_FIELDS, "layer_norm_eps": 1e-12}
        config = Settings({**defaults, "MAX_ITEM_LIST_LENGTH": msm4sr.MAX_LENGTH, **settings})
        return model_class(config, _Items(self.n_items))

    def ours(self, **settings) -> nn.Module:
        return self.build(with_trimmed_histories(SASRec, "all"), **settings)

    def literal(self, ours: nn.Module, **settings) -> nn.Module:
        model = self.build(SASRec, **settings)
        model.load_state_dict(ours.state_dict())
        return model

    def differences(self) -> dict[str, float]:
        ours = self.ours(hidden_dropout_prob=0.0, attn_dropout_prob=0.0).double()
        literal = self.build(SASRec, hidden_dropout_prob=0.0, attn_dropout_prob=0.0)
        for name, part in ours.named_children():  # the same parameters, so that gradients arrive in one place
            setattr(literal, name, part)
        return msm4sr.largest_differences(ours, literal, self.small_batch())


# ---------------------------------------------------------------- sessions


class MMSBR(Case):
    name, model, shipped_in_anomaly_mode = "MMSBR", "MMSBR", True
    tolerances = mmsbr.TOLERANCES[torch.float64]

    def ours(self) -> nn.Module:
        return build_fast(build_literal(self.n_items))

    def literal(self, ours: nn.Module) -> nn.Module:
        return Released(build_literal(self.n_items))  # from the same seed: the same parameters

    def training(self, n: int) -> list[dict[str, Tensor]]:
        size = self.sizes.session_batch
        return batches_of(sessions(n * size, self.n_items, np.random.default_rng(0)), size)

    def evaluation(self, size: int | None = None) -> list[dict[str, Tensor]]:
        data = sessions(self.sizes.sessions, self.n_items, np.random.default_rng(1))
        return batches_of(data, size or self.sizes.evaluation_batch)

    @property
    def literal_evaluation_batch(self) -> int:
        return self.sizes.session_batch

    def literal_rank(self, scores: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """As the release does, which sorts all scores."""
        return scores.argsort(dim=1, descending=True) == batch["item_id"].unsqueeze(1)

    def differences(self) -> dict[str, float]:
        batch = sessions(self.sizes.batch, self.n_items, np.random.default_rng(2))
        return mmsbr.differences(self.n_items, batch, torch.float64)

    @staticmethod
    def item_tower(model: nn.Module) -> Callable[[], None]:
        """Forward and backward pass of the item tower alone, for its share of the machine's rate."""

        def run() -> None:
            model.train()
            model.zero_grad()
            vectors = model.item_tower().vectors
            vectors.backward(torch.ones_like(vectors))

        return run


CASES: dict[str, type[Case]] = {
    "msm4sr-pretrain": MSM4SRPretraining,
    "msm4sr-finetune": MSM4SRFineTuning,
    "mmsbr": MMSBR,
    "unisrec": UniSRec,
    "sasrec": SASRecCase,
}
