"""RecBole's Trainer with plain-data checkpoints, exact resumption and pre-training before fine-tuning.

                    +-- pretrain --+     best      +-- finetune --+     best
train_stage: both   |  fit, valid  | ------------> |  fit, valid  | ------------> test once
                    +--------------+  checkpoint   +--------------+  checkpoint
"""

from __future__ import annotations

import os
import random
import secrets
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recbole.trainer import Trainer as RecBoleTrainer
from recbole.utils import init_seed

from recbole_mm import checkpoint, distributed
from recbole_mm.config import stage_config
from recbole_mm.errors import CheckpointError, TrainingError
from recbole_mm.evaluation import FullRanking
from recbole_mm.shared_training import SharedTraining, mean_of_losses, seed_of

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
    - several processes share the training, see `recbole_mm.shared_training`.
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
        self._shared: SharedTraining | None = None  # with several processes
        self._epochs_run = 0
        self._seconds_before = 0.0
        self._resumed: dict[str, Any] | None = None  # state of a pre-training that is to be continued

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

    def _share(self, train_data) -> None:
        """Train with the other processes of the group, if there are any."""
        if distributed.n_processes() == 1:
            return
        if self._epochs_run == 0 and not distributed.is_first():  # the first one goes on as it would alone
            init_seed(seed_of(self.config["seed"]), self.config["reproducibility"])
        self._shared = SharedTraining(self.model, self.optimizer, train_data, self.device)
        name, n_processes = self.config["model"], distributed.n_processes()
        if self.stage == "pretrain" or name in IN_BATCH_LOSSES:
            warning = (
                f"{self.stage} of {name} on {n_processes} processes: where its loss takes the other rows of a batch "
                f"for negatives, it sees those of its own process, one in {n_processes} of train_batch_size"
            )
            self.logger.warning(warning)
            self.warnings.append(warning)

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
        trainer.run_config = self.config
        if self._resumed is not None:
            trainer._restore(self._resumed, train_data)
        self.logger.info(f"pre-training {config['model']}: at most {config['epochs']} epochs")
        trainer.fit(train_data, valid_data, verbose=verbose, show_progress=show_progress)
        self.stages += trainer.stages
        self.warnings += trainer.warnings
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
        if self._shared is None:
            losses = super()._train_epoch(train_data, epoch_idx, loss_func, show_progress)
        else:
            self._shared.begin_epoch()
            losses = super()._train_epoch(train_data, epoch_idx, self._shared.loss, show_progress)
            self._shared.end_epoch()
            losses = mean_of_losses(losses)
        self._epochs_run = epoch_idx + 1
        loss = float(sum(losses) if isinstance(losses, tuple) else losses)
        self.curve.append({"epoch": epoch_idx, "train_loss": loss, "valid": None})
        return losses

    def _valid_epoch(self, valid_data, show_progress=False):
        # Early stopping must not differ by a last digit.
        return distributed.from_first(super()._valid_epoch(valid_data, show_progress=show_progress))

    def _check_nan(self, loss) -> None:
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the training loss of {self.config['model']} became NaN or infinite after {self._epochs_run} epochs\n"
                f"  try a smaller learning_rate (now {self.learning_rate}) or clip_grad_norm"
                + (f"; the best weights so far are in {self.saved_model_file}" if self.best_epoch >= 0 else "")
            )

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
