"""One run from settings to a record: data, training in one stage or two, one test.

RecBole's own ``quick_start`` is not imported, because it imports ray.
"""

from __future__ import annotations

import importlib
import json
import logging
import platform
import re
import resource
import secrets
import shlex
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from recbole.data import data_preparation
from recbole.trainer import Trainer as RecBoleTrainer
from recbole.utils import dict2str, get_trainer, init_logger, init_seed

from recbole_mm import checkpoint
from recbole_mm.config import Config, read_settings
from recbole_mm.data.dataset import MultimodalDataset
from recbole_mm.data.files import write_atomically
from recbole_mm.data.layout import data_fingerprint
from recbole_mm.errors import DatasetError, SettingError
from recbole_mm.model import find_model
from recbole_mm.records import RUNS_FILE, RunRecord, append, settings_hash
from recbole_mm.trainer import StageResult, Trainer, load_last_state

STAGE_NAMES = {"pretrain": "pre-training", "finetune": "fine-tuning", "train": "training"}
_MAY_CHANGE_ON_RESUME = {
    "epochs", "pretrain_epochs", "stopping_step", "show_progress", "state", "gpu_id", "use_gpu", "device", "data_path",
    "topk", "data_fingerprint", "feature_hashes", "feature_encoders", "field_hashes",
}  # fmt: skip


def run(
    model: str | None = None,
    dataset: str | None = None,
    config_files: Sequence[str | Path] | None = None,
    settings: Mapping[str, Any] | None = None,
    *,
    origins: Mapping[str, str] | None = None,
    resume: str | Path | None = None,
    runs_file: Path | str | None = RUNS_FILE,
    run_id: str | None = None,
    budget: Mapping[str, Any] | None = None,
) -> RunRecord:
    """Train a model on a dataset, select on validation data, test once, append a record.

    Args:
        model: ours, or a sequential model of RecBole.
        dataset: a folder below ``data_path``, or a path to one; "demo" makes itself.
        config_files: YAML files with settings.
        settings: settings that win over all files.
        origins: where each of ``settings`` came from, for messages.
        resume: a ``…-last.pth`` file; model, dataset and settings are then those of the interrupted run.
        runs_file: where the record is appended; None for nowhere.
        run_id: names the run, 12 hex digits; drawn when left out.
        budget: of the search that chose the settings, kept in the record.

    Returns:
        The record of the run.

    Raises:
        SettingError, DatasetError, CheckpointError, TrainingError: with one message that says what to do.
    """
    run_id = run_id or secrets.token_hex(6)
    started, clock = time.strftime("%Y-%m-%dT%H:%M:%S%z"), time.perf_counter()
    if resume is not None:
        if config_files:
            raise SettingError("--resume continues a run with its own settings; leave --config_files out")
        state = load_last_state(Path(resume))
        config = _resumed_config(Path(resume), state, model, dataset, settings or {}, origins or {})
    else:
        state = None
        config = _new_config(model, dataset, config_files or [], settings or {}, origins or {})
    for folder in filter(None, (config["checkpoint_dir"], runs_file and Path(runs_file).parent)):
        _probe(Path(folder))
    _refuse_pickled_loaders(config)
    init_seed(config["seed"], config["reproducibility"])
    logger = _start_log(config)
    given = checkpoint.plain(config.external_config_dict)
    identity = settings_hash(config["model"], checkpoint.plain(config.final_config_dict))

    with _recbole_refuses(f"the data of {config['dataset']}"):
        data = MultimodalDataset(config)
        _fit_topk(config, data.item_num)
        logger.info(data)
        train_data, valid_data, test_data = data_preparation(config, data)
    init_seed(config["seed"] + config["local_rank"], config["reproducibility"])
    with _recbole_refuses(f"the settings of {config['model']}"):
        net = config.model_class(config, train_data._dataset).to(config["device"])
    if config["knockout"] is not None:
        there, name = [*data.feature_names(), *data.item_columns()], f"{config['model']} on {config['dataset']}"
        for unused in data.knockouts.refuse_idle(data.used_features(), data.used_fields(), there=there, run=name):
            logger.warning(f"knock-out: {name} does not use {unused} anyway")
    logger.debug(net)
    n_parameters = sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)
    logger.info(f"{config['model']}: {n_parameters:,} trainable parameters")
    config["data_fingerprint"] = data_fingerprint(config.folder)
    config["feature_hashes"] = {name: data.feature_hash(name) for name in data.used_features()}
    config["feature_encoders"] = {name: data.encoder_of(name) for name in data.used_features()}
    config["field_hashes"] = {name: data.field_hash(name) for name in data.used_fields()}
    trainer = _trainer_class(config)(config, net)
    if state is not None:
        _check_same_data(config, state["config"])
        trainer.resume_checkpoint(resume, train_data)
    seconds = {"data": time.perf_counter() - clock}

    clock = time.perf_counter()
    # Bars are for people who watch; in a log file the lines per epoch say as much.
    show_progress = config["show_progress"] and sys.stderr.isatty()
    _, best_valid = trainer.fit(train_data, valid_data, show_progress=show_progress)
    stages = getattr(trainer, "stages", None) or [_single_stage(trainer, best_valid, time.perf_counter() - clock)]
    seconds |= {stage.stage: stage.seconds for stage in stages}

    clock = time.perf_counter()
    test = trainer.evaluate(test_data, load_best_model=True, show_progress=show_progress)
    seconds["test"] = time.perf_counter() - clock

    record = RunRecord(
        model=config["model"],
        dataset=config["dataset"],
        data_fingerprint=config["data_fingerprint"],
        features=config["feature_hashes"],
        settings=checkpoint.plain(config.final_config_dict),
        seed=config["seed"],
        best_epoch=stages[-1].best_epoch,
        valid={key: float(value) for key, value in best_valid.items()},
        test={key: float(value) for key, value in test.items()},
        stages=[vars(stage) for stage in stages],
        seconds={key: round(value, 3) for key, value in seconds.items()},
        peak_memory=_peak_memory(),
        versions={name: version(name) for name in ("recbole", "torch", "numpy", "pandas")}
        | {"recbole_mm": importlib.import_module("recbole_mm").__version__, "python": platform.python_version()},
        checkpoint=trainer.saved_model_file,
        started=started,
        run_id=run_id,
        settings_given=given,
        settings_hash=identity,
        n_parameters=n_parameters,
        n_items=data.item_num - 1,
        n_test=len(test_data.dataset),
        budget=dict(budget or {}),
        command=command_of(config["model"], config["dataset"], given),
    )
    if runs_file is not None:
        append(record, Path(runs_file))
    _report(logger, record, stages, runs_file)
    return record


# ------------------------------------------------ before training


def _new_config(
    model: str | None,
    dataset: str | None,
    config_files: Sequence[str | Path],
    settings: Mapping[str, Any],
    origins: Mapping[str, str],
) -> Config:
    """The settings of a new run; the made-up shop makes itself when its folder is not there yet."""
    named = {key: value for source in (*map(read_settings, config_files), settings) for key, value in source.items()}
    model, dataset = model or named.get("model"), dataset or named.get("dataset")
    if model is None or dataset is None:
        raise SettingError("which model and dataset? Give both, such as --model=MSM4SR --dataset=demo")
    find_model(model)  # before anything is made
    if str(Path(dataset)) == "demo":
        folder = Path(named.get("data_path", "dataset")) / "demo"
        if not folder.exists():
            # Preparation is imported here alone, and only then.
            importlib.import_module("dataset_prep.demo").make_demo(folder)
    return Config(model, dataset, config_files, settings, origins)


def _resumed_config(
    path: Path,
    state: Mapping[str, Any],
    model: str | None,
    dataset: str | None,
    settings: Mapping[str, Any],
    origins: Mapping[str, str],
) -> Config:
    """The settings of the interrupted run; only those that do not change its course may be given anew."""
    stored, given = state["config"], state["given"]
    if model is not None and find_model(model).__name__ != stored["model"]:
        raise SettingError(f"{path} is a run of {stored['model']}, not of {model}; leave --model out when resuming")
    if dataset is not None and Path(dataset).name != stored["dataset"]:
        raise SettingError(
            f"{path} is a run on {stored['dataset']}, not on {dataset}; leave --dataset out when resuming"
        )
    config = Config(stored["model"], stored["dataset"], None, {**given, **settings}, origins)
    now = checkpoint.plain(config.final_config_dict)
    changed = [key for key in now.keys() & stored.keys() - _MAY_CHANGE_ON_RESUME if now[key] != stored[key]]
    if "topk" in settings and settings["topk"] != given.get("topk"):
        changed.append("topk")  # the stored ones may have been cut to fit the catalogue
    if changed:
        listed = ", ".join(f"{key} is {now[key]!r}, was {stored[key]!r}" for key in sorted(changed))
        raise SettingError(
            f"--resume continues a run as it began, but settings differ: {listed}\n"
            "  leave them out, or start a new run; --epochs, --pretrain_epochs and --stopping_step may change"
        )
    return config


def _check_same_data(config: Config, stored: Mapping[str, Any]) -> None:
    """Interactions, features and item columns are those that the interrupted run began with."""

    def hashes(settings: Any) -> dict[str, str]:
        columns = {f"column {name}": digest for name, digest in settings["field_hashes"].items()}
        return {"the interactions": settings["data_fingerprint"], **settings["feature_hashes"], **columns}

    nothing = {"data_fingerprint": None, "feature_hashes": {}, "field_hashes": {}}
    then, now = hashes({**nothing, **stored}), hashes(config)
    changed = [name for name in then if then[name] != now.get(name)]
    if changed:
        raise DatasetError(
            f"{', '.join(changed)} in {config.folder} changed since the run began "
            f"({str(now.get(changed[0]))[:12]}, then {str(then[changed[0]])[:12]}); start a new run"
        )


def _probe(folder: Path) -> None:
    """Fail now, and not after the training, if nothing can be written there."""
    write_atomically(folder / ".writable", lambda out: out.write(b"yes"))
    (folder / ".writable").unlink(missing_ok=True)  # a run beside this one may have been quicker


def _refuse_pickled_loaders(config: Config) -> None:
    """RecBole would load a pickle of this name, whoever put it there."""
    file = Path(config["checkpoint_dir"]) / f"{config['dataset']}-for-{config['model']}-dataloader.pth"
    if file.exists():
        raise SettingError(f"{file} is a pickle that RecBole would load, code and all; move it away")


@contextmanager
def _recbole_refuses(what: str) -> Iterator[None]:
    """RecBole's own checks fail with Python's errors; to a user they are wrong settings."""
    try:
        yield
    except (ValueError, NotImplementedError, KeyError, IndexError, ZeroDivisionError, AssertionError) as error:
        reason = str(error) or type(error).__name__
        raise SettingError(f"RecBole cannot use {what}: {reason}\n  --debug shows where") from error


def _start_log(config: Config) -> logging.Logger:
    """RecBole's log, a file of its own for every run of a process."""
    root = logging.getLogger()
    for handler in [h for h in root.handlers if getattr(h, "of_a_run", False)]:
        root.removeHandler(handler)
        handler.close()
    before = list(root.handlers)
    init_logger(config)
    for handler in root.handlers:
        handler.of_a_run = handler not in before
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"recbole\.")  # RecBole's, once per epoch
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    root.debug(config)
    given = {k: v for k, v in config.external_config_dict.items() if k != "data_path"}
    root.info(f"{config['model']} on {config.folder}, seed {config['seed']}; settings given: {given or 'none'}")
    return root


def _fit_topk(config: Config, n_items: int) -> None:
    """Cut-offs beyond the catalogue are dropped, with a notice."""
    fitting = [k for k in config["topk"] if k < n_items]
    if fitting == config["topk"]:
        return
    k = config["valid_metric"].partition("@")[2]
    if not fitting or (k and int(k) not in fitting):
        raise SettingError(
            f"valid_metric {config['valid_metric']} and topk {config['topk']}: the dataset has {n_items - 1} items only"
        )
    logging.getLogger().warning(f"topk {config['topk']} becomes {fitting}: the dataset has {n_items - 1} items only")
    config["topk"] = fitting


def _trainer_class(config: Config) -> type[RecBoleTrainer]:
    theirs = get_trainer(config["MODEL_TYPE"], config["model"])
    return Trainer if theirs is RecBoleTrainer else theirs  # S3Rec and the like bring their own


# ------------------------------------------------ after training


def command_of(model: str, dataset: str, given: Mapping[str, Any]) -> str:
    """The command line that repeats a run, quoted for a shell."""
    settings = [f"--{key}={_typed(value)}" for key, value in given.items() if key not in ("model", "dataset")]
    return shlex.join(["python", "run_recbole_mm.py", f"--model={model}", f"--dataset={dataset}", *settings])


def _typed(value: Any) -> str:
    """A setting as it is typed on a command line; JSON is YAML too."""
    return value if isinstance(value, str) else json.dumps(value)


def _single_stage(trainer: RecBoleTrainer, best_valid: Mapping[str, float], seconds: float) -> StageResult:
    """What a trainer of RecBole's own tells."""
    epochs = len(trainer.train_loss_dict)
    best_epoch = epochs - 1 - trainer.cur_step * trainer.eval_step
    return StageResult("train", seconds, epochs, best_epoch, dict(best_valid), trainer.saved_model_file)


def _peak_memory() -> dict[str, int]:
    """Bytes: the most that this process held so far, and that PyTorch took from a GPU during this run."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would also tell the memory of the program that started this one
        resident = int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) * 1024
    else:
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    peak = {"resident": resident}
    if torch.cuda.is_available():
        peak["gpu"] = torch.cuda.max_memory_allocated()
    return peak


def _report(
    logger: logging.Logger, record: RunRecord, stages: Sequence[StageResult], runs_file: Path | str | None
) -> None:
    knocked_out = f", knocked out: {record.settings['knockout']}" if record.settings.get("knockout") else ""
    lines = [f"{record.model} on {record.dataset}, seed {record.seed}{knocked_out}"]
    for stage in stages:
        lines.append(
            f"{STAGE_NAMES[stage.stage]}: {stage.seconds:.1f} s, {stage.epochs} epochs, best epoch {stage.best_epoch}, "
            f"checkpoint {stage.checkpoint}"
        )
    gigabytes = record.peak_memory["resident"] / 2**30
    lines.append(
        f"data {record.seconds['data']:.1f} s, test {record.seconds['test']:.1f} s, peak memory {gigabytes:.2f} GiB"
    )
    lines.append(f"best valid : {dict2str(record.valid)}")
    lines.append(f"test result: {dict2str(record.test)}")
    if runs_file is not None:
        lines.append(f"record appended to {runs_file}")
    logger.info("\n".join(lines))
