"""RecBole's Trainer with plain-data checkpoints, exact resumption and pre-training before fine-tuning.

                    +-- pretrain --+     best      +-- finetune --+     best
train_stage: both   |  fit, valid  | ------------> |  fit, valid  | ------------> test once
                    +--------------+  checkpoint   +--------------+  checkpoint
"""

from __future__ import annotations

import math
import os
import random
import secrets
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recbole.trainer import Trainer as RecBoleTrainer
from recbole.utils import init_seed
from torch import Tensor
from torch.profiler import record_function
from tqdm import tqdm

from recbole_mm import checkpoint, distributed
from recbole_mm.compiling import compile_parts
from recbole_mm.config import stage_config
from recbole_mm.data.passes import PassLoader, in_passes
from recbole_mm.errors import CheckpointError, SettingError, TrainingError
from recbole_mm.evaluation import FullRanking
from recbole_mm.model.positions import read_at_all_positions
from recbole_mm.optimizer import LazyAdam, clip_gradients, fused
from recbole_mm.precision import GradientScaler, precision_of, run_in
from recbole_mm.profiling import Profiler, labelled
from recbole_mm.shared_training import SharedTraining, mean_of_losses, seed_of

LOSSES_AT_ONCE = 64  # that a GPU hands over together
IN_BATCH_LOSSES = {"FEARec"}  # RecBole's; of ours, those that pre-train


@dataclass
class StageResult:
    """What one training stage came to.

    Attributes:
        stage: "pretrain" or "finetune", or "train" for a model without stages.
        seconds: wall time of all its epochs, validation included, over all resumptions.
        epochs: epochs run.
        best_epoch: the one with the best validation score, from 0.
        valid: validation metrics of that epoch.
        checkpoint: file with the weights of that epoch.
        curve: of every epoch: epoch, train_loss (summed over its batches, as the log shows it) and valid, the score
            that selects, or None where there was no validation.
    """

    stage: str
    seconds: float
    epochs: int
    best_epoch: int
    valid: dict[str, float]
    checkpoint: str
    curve: list[dict[str, Any]] = field(default_factory=list)


class Trainer(FullRanking, RecBoleTrainer):
    """Trains one model, in one stage or two.

    Differs from RecBole's trainer in this:
    - with ``train_stage: both``, `fit` first pre-trains a model of the same class and takes over its best weights;
      with ``pretrained_path``, it takes them from that checkpoint;
    - besides the best checkpoint it keeps the last state, ``…-last.pth``, from which `resume_checkpoint` continues to
      the same weights (on a CPU) as if nothing had happened;
    - validation and test rank by counting, see `FullRanking`;
    - several processes share the training, see `recbole_mm.shared_training`;
    - towers and encoders may compute in 16 bits, see `recbole_mm.precision`;
    - a GPU is not waited for in each step: its losses are read some at a time.
    """

    last_saved: Path | None = None  # the last state that any trainer of this process has saved

    def __init__(self, config, model) -> None:
        self.run_config = config  # of the whole run, where this is one stage of two
        self.stage = _stage_of(config, model)
        super().__init__(stage_config(config, "pretrain") if self.stage == "pretrain" else config, model)
        stamp = distributed.from_first(f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{secrets.token_hex(2)}")
        stem = f"{config['model']}-{config['dataset']}-{self.stage}-{stamp}"
        self.saved_model_file = str(Path(self.checkpoint_dir) / f"{stem}.pth")
        self.stages: list[StageResult] = []
        self.best_epoch = -1
        self.curve: list[dict[str, Any]] = []
        self.warnings: list[str] = []  # what a reader of the result must know
        self.profiler: Profiler | None = None  # watches some steps
        self._shared: SharedTraining | None = None  # with several processes
        self.positions = self.config["train_positions"] if self.stage != "pretrain" else "last"
        if self.positions not in (None, "last"):
            read_at_all_positions(model)
        precision = precision_of(self.config["amp"], self.device, model)
        run_in(model, precision, self.device)
        self.scaler = GradientScaler(self.device, enabled=precision.dtype is torch.float16)
        self._warn(precision.notice)
        if self.config["compile"]:
            compile_parts(model, self._warn)
        if self.stage != "pretrain" and getattr(model, "softmax", "full") == "sampled":
            self._warn(approximation_of(self.config))
        self._epochs_run = 0
        self._seconds_before = 0.0
        self._resumed: dict[str, Any] | None = None  # state of a pre-training that is to be continued

    def _build_optimizer(self, **kwargs):
        if self.stage == "pretrain" or not self.config["lazy_item_embedding"]:
            optimizer = super()._build_optimizer(**kwargs)
            return fused(optimizer) if self.config["fused_optimizer"] else optimizer
        refuse_lazy(self.config, self.model)
        return LazyAdam(self.model.parameters(), lr=self.learning_rate)

    # ------------------------------------------------ training

    def fit(self, train_data, valid_data=None, verbose=True, saved=True, show_progress=False, callback_fn=None):
        """As RecBole's `fit`: trains, validates after each epoch, keeps the best weights.

        Returns:
            Best validation score and validation metrics, of the last stage.
        """
        if self._epochs_run == 0:  # else resumed within this stage
            if self.stage == "finetune" and self.config["train_stage"] == "both":
                self._pretrain(train_data, valid_data, verbose=verbose, saved=saved, show_progress=show_progress)
            elif self.stage == "finetune":
                self._start_from(self.config["pretrained_path"])
        if self.cur_step > self.stopping_step or self.start_epoch >= self.epochs:
            self.logger.info(f"{self.stage}: nothing to do, training had ended at epoch {self.start_epoch - 1}")
            self.start_epoch = self.epochs
        if self.positions not in (None, "last"):
            train_data = self._in_passes(train_data)
        self._share(train_data)
        started = time.perf_counter()

        def after_epoch(epoch: int, score: float) -> None:
            self.curve[-1]["valid"] = float(score)
            if saved:
                self._save_last(epoch, train_data, seconds=self._seconds_before + time.perf_counter() - started)
            if callback_fn:
                callback_fn(epoch, score)

        best = super().fit(train_data, valid_data, verbose, saved, show_progress, after_epoch)
        seconds = self._seconds_before + time.perf_counter() - started
        valid = {key: float(value) for key, value in (self.best_valid_result or {}).items()}
        epochs = self._epochs_run or self.epochs
        self.stages.append(
            StageResult(self.stage, seconds, epochs, self.best_epoch, valid, self.saved_model_file, self.curve)
        )
        return best

    def _in_passes(self, train_data) -> PassLoader:
        """Batches of passes over histories in place of rows; see the setting ``train_positions``."""
        loader = in_passes(train_data, self.positions, self.config["MAX_ITEM_LIST_LENGTH"])
        n_targets, n_passes = len(loader.passes.row), len(loader.passes.carrier)
        self.logger.info(f"{self.stage}: {n_targets} targets in {n_passes} passes over histories")
        if loader.n_shortened:
            self._warn(
                f"{self.stage}: train_positions {self.positions} is an approximation, in which {loader.n_shortened} of "
                f"{n_targets} training targets see fewer items before them than MAX_ITEM_LIST_LENGTH would show"
            )
        return loader

    def _share(self, train_data) -> None:
        """Train with the other processes of the group, if there are any."""
        if distributed.n_processes() == 1:
            return
        if self._epochs_run == 0 and not distributed.is_first():  # the first one goes on as it would alone
            init_seed(seed_of(self.config["seed"]), self.config["reproducibility"])
        self._shared = SharedTraining(self.model, self.optimizer, train_data, self.device)
        name, n_processes = self.config["model"], distributed.n_processes()
        if name in IN_BATCH_LOSSES or (self.stage == "pretrain" and not self.model.wants_together):
            warning = (
                f"{self.stage} of {name} on {n_processes} processes: where its loss takes the other rows of a batch "
                f"for negatives, it sees those of its own process, one in {n_processes} of train_batch_size"
            )
            if self.stage == "pretrain":
                warning += "; --gather_negatives=True lets it see all"
            self._warn(warning)

    def _pretrain(self, train_data, valid_data, *, verbose: bool, saved: bool, show_progress: bool) -> None:
        """Pre-train another model of this class on the same data, exactly as ``train_stage: pretrain`` would."""
        if not saved or valid_data is None:
            raise TrainingError(
                "train_stage 'both' needs validation data and saved checkpoints; use 'finetune' without them"
            )
        random_state = _random_state(train_data)
        config = stage_config(self.config, "pretrain")
        init_seed(config["seed"], config["reproducibility"])
        model = type(self.model)(config, train_data._dataset).to(config["device"])
        trainer = type(self)(config, model)
        trainer.run_config, trainer.profiler = self.config, self.profiler
        if self._resumed is not None:
            trainer._restore(self._resumed, train_data)
        self.logger.info(f"pre-training {config['model']}: at most {config['epochs']} epochs")
        trainer.fit(train_data, valid_data, verbose=verbose, show_progress=show_progress)
        self.stages += trainer.stages
        self.warnings += [warning for warning in trainer.warnings if warning not in self.warnings]
        _set_random_state(random_state, train_data)  # fine-tuning runs as it would on its own
        self._start_from(trainer.saved_model_file)

    def _start_from(self, path: str | None) -> None:
        if path:
            state = load_pretrained(self.model, Path(path), fresh=self.model.fresh_parameters)
            _check_same_function(state["config"], self.config, type(self.model).same_in_both_stages, path)
            if state["config"]["dataset"] != self.config["dataset"] and "tfidf" in str(self.config["feature_encoders"]):
                self.logger.warning(
                    f"{path} is from the dataset {state['config']['dataset']}, and tfidf is fitted to each catalogue: "
                    "the weights meet dimensions of another meaning; use an encoder that is the same for both"
                )
            self.logger.info(f"fine-tuning {self.config['model']} from {path}")
        else:
            self.logger.warning(f"fine-tuning {self.config['model']} from scratch: no pretrained_path is set")

    def _train_epoch(self, train_data, epoch_idx, loss_func=None, show_progress=False):
        """As RecBole's: the sum of the losses of all batches, or of each of several losses."""
        self.model.train()
        bar = tqdm(train_data, ncols=100, desc=f"Train {epoch_idx:>5}", disable=not show_progress)
        batches: Iterable = bar
        if self.profiler is not None:
            batches = labelled(bar, "make the batch")
            last = epoch_idx == self.epochs - 1
            batches = self.profiler.training(batches, stage=self.stage, n_batches=len(train_data), last=last)
        if self._shared is None:
            losses = self._steps(batches, loss_func or self.model.calculate_loss)
        else:
            self._shared.begin_epoch()
            losses = self._steps(batches, self._shared.loss)
            self._shared.end_epoch()
            losses = mean_of_losses(losses)
        self._warn(self.scaler.end_epoch(self.stage, epoch_idx))
        self._epochs_run = epoch_idx + 1
        loss = float(sum(losses) if isinstance(losses, tuple) else losses)
        self.curve.append({"epoch": epoch_idx, "train_loss": loss, "valid": None})
        return losses

    def _steps(self, batches: Iterable, loss_of: Callable) -> float | tuple[float, ...]:
        """One step of the optimizer for each batch; the sum of its losses, or of each of several."""
        sums = _LossSums(self._require_finite, at_once=1 if self.device.type == "cpu" else LOSSES_AT_ONCE)
        parameters = list(self.model.parameters())
        clip = partial(clip_gradients, parameters, **self.clip_grad_norm) if self.clip_grad_norm else None
        part = record_function if self.profiler is not None else nullcontext
        for interaction in batches:
            with part("move the batch"):
                interaction = interaction.to(self.device)
            with part("forward and loss"):
                self.optimizer.zero_grad()
                losses = loss_of(interaction)
                loss = sum(losses) if isinstance(losses, tuple) else losses
                sums.add(loss, losses)
            with part("backward"):
                self.scaler.backward(loss)
            with part("optimizer"):
                self.scaler.step(self.optimizer, clip=clip)
        return sums.read()

    def watched(self, blocks: Iterable) -> Iterable:
        if self.profiler is None:
            return blocks
        return self.profiler.evaluation(blocks, stage=self.stage, last=self.epochs // self.eval_step <= 1)

    def _valid_epoch(self, valid_data, show_progress=False):
        # Early stopping must not differ by a last digit.
        return distributed.from_first(super()._valid_epoch(valid_data, show_progress=show_progress))

    def _require_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise TrainingError(
                f"the training loss of {self.config['model']} became NaN or infinite after {self._epochs_run} epochs\n"
                f"  try a smaller learning_rate (now {self.learning_rate}) or clip_grad_norm"
                + (", or amp bf16, which has the range of float32" if self.scaler.enabled else "")
                + (f"; the best weights so far are in {self.saved_model_file}" if self.best_epoch >= 0 else "")
            )

    def _warn(self, warning: str) -> None:
        """Into the log and into the record, once; nothing for no warning."""
        if warning and warning not in self.warnings:
            self.logger.warning(warning)
            self.warnings.append(warning)

    # ------------------------------------------------ checkpoints

    def _save_checkpoint(self, epoch, verbose=True, **kwargs):
        if epoch < 0:  # RecBole, when there is no epoch to train: the best weights are there already
            return
        self.best_epoch = epoch
        if distributed.is_first():
            super()._save_checkpoint(epoch, verbose=verbose, **kwargs)
        distributed.require_file(self.saved_model_file)

    def _last_file(self) -> Path:
        path = Path(self.saved_model_file)
        return path.with_name(f"{path.stem}-last.pth")

    def _save_last(self, epoch: int, train_data, *, seconds: float) -> None:
        random_state, *others = distributed.gathered(_random_state(train_data))
        if not distributed.is_first():
            return
        state = {
            "config": checkpoint.plain(self.run_config.final_config_dict),
            "given": checkpoint.plain(self.run_config.external_config_dict),
            "stage": self.stage,
            "epoch": epoch,
            "cur_step": self.cur_step,
            "best_valid_score": float(self.best_valid_score),
            "best_valid_result": {key: float(value) for key, value in (self.best_valid_result or {}).items()},
            "best_epoch": self.best_epoch,
            "best_file": self.saved_model_file,
            "seconds": seconds,
            "curve": self.curve,
            "earlier_stages": [asdict(stage) for stage in self.stages],
            "random_state": random_state,
            "random_states_of_others": others,
            "state_dict": self.model.state_dict(),
            "other_parameter": self.model.other_parameter(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        checkpoint.save(self._last_file(), state)
        Trainer.last_saved = self._last_file()
        distributed.note(last_saved=Trainer.last_saved)

    def resume_checkpoint(self, resume_file, train_data=None) -> None:
        """Continue from a ``…-last.pth`` file in the following `fit`.

        Args:
            train_data: the training data loader, whose order is continued too.

        Raises:
            CheckpointError: not such a file, or one of another model.
        """
        state = load_last_state(Path(resume_file), map_location=self.device)
        _same_model(state, self.config["model"], resume_file)
        if state["stage"] == "pretrain" and self.stage != "pretrain":
            self._resumed = state
        else:
            self._restore(state, train_data)

    def _restore(self, state: dict[str, Any], train_data) -> None:
        self.model.load_state_dict(state["state_dict"])
        self.model.load_other_parameter(state["other_parameter"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state.get("scaler", {}))
        self.start_epoch = self._epochs_run = state["epoch"] + 1
        self.cur_step = state["cur_step"]
        self.best_valid_score = state["best_valid_score"]
        self.best_valid_result = state["best_valid_result"]
        self.best_epoch = state["best_epoch"]
        self.saved_model_file = state["best_file"]
        self._seconds_before = state["seconds"]
        self.curve = state.get("curve", [])
        self.stages = [StageResult(**stage) for stage in state["earlier_stages"]]
        if not Path(self.saved_model_file).is_file():
            raise CheckpointError(
                f"the best checkpoint {self.saved_model_file} is gone; it belongs to the training to resume"
            )
        random_states = [state["random_state"], *state.get("random_states_of_others", [])]
        _set_random_state(random_states[distributed.rank()], train_data)
        self.logger.info(f"{self.stage}: resuming after epoch {state['epoch']}")


class _LossSums:
    """Sums of the losses of an epoch's steps, which are numbers of a device that runs ahead of this program.

    Args:
        check: sees the loss of each step, in order.
        at_once: so many steps may pass before their losses are looked at.
    """

    def __init__(self, check: Callable[[float], None], *, at_once: int) -> None:
        self._check, self._at_once = check, at_once
        self._waiting: list[Tensor] = []
        self._sums: tuple[float, ...] | None = None
        self._several = False

    def add(self, loss: Tensor, losses: Tensor | tuple[Tensor, ...]) -> None:
        """A step's loss, and what it is the sum of."""
        parts = losses if isinstance(losses, tuple) else (losses,)
        self._several = isinstance(losses, tuple)
        if self._at_once == 1:
            self._take(loss.item(), [part.item() for part in parts])
            return
        self._waiting.append(torch.stack([part.detach().reshape(()) for part in (loss, *parts)]))
        if len(self._waiting) == self._at_once:
            self.read()

    def read(self) -> float | tuple[float, ...] | None:
        """The sums so far, of the one loss or of each of several; None before the first step."""
        for loss, *parts in torch.stack(self._waiting).tolist() if self._waiting else ():
            self._take(loss, parts)
        self._waiting.clear()
        return self._sums if self._sums is None or self._several else self._sums[0]

    def _take(self, loss: float, parts: list[float]) -> None:
        self._check(loss)
        before = self._sums or (0.0,) * len(parts)
        self._sums = tuple(map(sum, zip(before, parts, strict=True)))


def approximation_of(config) -> str:
    """What a record says of a training with the sampled softmax."""
    lazily = "; item embeddings move only in steps that use them (lazy_item_embedding)"
    return (
        f"trained on a sampled softmax, an approximation: {config['softmax_negatives']} items a step, drawn by "
        f"{config['negative_sampling']}{lazily if config['lazy_item_embedding'] else ''}; all items are ranked exactly"
    )


def refuse_lazy(config, model) -> None:
    """Refuse what an optimizer that moves some rows alone cannot do.

    Raises:
        SettingError: with all reasons.
    """
    reasons = []
    if getattr(model, "item_embedding", None) is None:
        reasons.append(f"{type(model).__name__} has no item embedding here")
    if config["learner"].lower() != "adam":
        reasons.append(f"learner is {config['learner']}, expected adam")
    if config["weight_decay"]:
        reasons.append(f"weight_decay is {config['weight_decay']}, which moves every row in every step; set it to 0")
    if config["fused_optimizer"]:
        reasons.append("fused_optimizer moves every row in every step; leave one out")
    if distributed.n_processes() > 1:
        reasons.append(f"{distributed.n_processes()} processes average whole gradients; run it with --nproc=1")
    if reasons:
        raise SettingError("lazy_item_embedding cannot be used: " + "; ".join(reasons) + "\n  or leave it out")


def _stage_of(config, model) -> str:
    if not hasattr(model, "fresh_parameters"):  # a model without stages
        return "train"
    return "pretrain" if config["train_stage"] == "pretrain" else "finetune"


def _random_state(train_data) -> dict[str, Any]:
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
        "python": random.getstate(),
        "order": train_data.generator.get_state(),
    }


def _set_random_state(state: dict[str, Any], train_data) -> None:
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    if train_data is not None:
        train_data.generator.set_state(state["order"].cpu())


def load_last_state(path: Path, *, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a ``…-last.pth`` file.

    Raises:
        CheckpointError: it is no such file.
    """
    state = checkpoint.load(path, map_location=map_location)
    if "random_state" not in state:
        raise CheckpointError(
            f"{path} is not the last state of a training; resume from the file that ends in -last.pth"
        )
    kinds = {"given": dict, "stage": str, "epoch": int, "best_file": str, "earlier_stages": list, "optimizer": dict}
    checkpoint.require(path, state, random_state=dict, **kinds)
    return state


def _same_model(state: dict[str, Any], model: str, path: Path | str) -> None:
    found = state["config"]["model"]
    if found != model:
        raise CheckpointError(f"{path} is a checkpoint of {found}, expected one of {model}")


def _check_same_function(stored: dict[str, Any], config, keys: tuple[str, ...], path: str) -> None:
    """Weights mean something only with the settings and the features' encoders that they were trained with.

    Raises:
        CheckpointError: listing every setting and encoder that differs.
    """
    differ = [
        f"{key} is {config[key]!r}, was {stored[key]!r} in pre-training"
        for key in keys
        if key in stored and stored[key] != config[key]
    ]
    now, then = config["feature_encoders"] or {}, stored.get("feature_encoders") or {}
    differ += [
        f"feature {name!r} is made by {now[name]!r}, was made by {then[name]!r} in pre-training"
        for name in sorted(now.keys() & then.keys())
        if now[name] != then[name]
    ]
    if differ:
        listed = "".join(f"\n  - {difference}" for difference in differ)
        raise CheckpointError(f"{path} does not fit the settings:{listed}\n  use what it was pre-trained with")


def load_pretrained(model: torch.nn.Module, path: Path, *, fresh: tuple[str, ...] = ()) -> dict[str, Any]:
    """Take over pre-trained weights, from this dataset or another one.

    Args:
        fresh: names of parameters that are not taken over, such as ID embeddings: they start anew.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: a checkpoint of another model, or any other parameter missing, left over or of another shape.
    """
    state = checkpoint.load(path)
    _same_model(state, type(model).__name__, path)
    theirs = {name: value for name, value in state["state_dict"].items() if name not in fresh}
    ours = {name: value for name, value in model.state_dict().items() if name not in fresh}
    problems = [f"{name} is not in the checkpoint" for name in sorted(ours.keys() - theirs.keys())]
    problems += [f"{name} is not in the model" for name in sorted(theirs.keys() - ours.keys())]
    problems += [
        f"{name} has shape {tuple(theirs[name].shape)}, the model needs {tuple(ours[name].shape)}"
        for name in sorted(ours.keys() & theirs.keys())
        if theirs[name].shape != ours[name].shape
    ]
    if problems:
        raise CheckpointError(
            "\n".join([f"{path} does not fit the model:", *(f"  - {problem}" for problem in problems)])
            + "\n  use the settings, and features of the width, that it was pre-trained with"
        )
    model.load_state_dict({**model.state_dict(), **theirs})
    return state
