"""One run from settings to a record: data, training in one stage or two, one test.

RecBole's own ``quick_start`` is not imported, because it imports ray.
"""

from __future__ import annotations

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
from typing import Any, NamedTuple

import torch
from recbole.trainer import Trainer as RecBoleTrainer
from recbole.utils import dict2str, get_trainer, init_logger, init_seed

from recbole_mm import checkpoint, distributed
from recbole_mm.allocation import keep_freed_memory
from recbole_mm.config import Config, identity_of, make_demo_folder
from recbole_mm.data.dataset import MultimodalDataset
from recbole_mm.data.files import write_atomically
from recbole_mm.data.layout import data_fingerprint
from recbole_mm.data.loading import data_preparation
from recbole_mm.data.protocols import test_fingerprint
from recbole_mm.errors import SettingError
from recbole_mm.evaluation import Outcome, evaluate_test, with_full_ranking
from recbole_mm.model import find_model
from recbole_mm.plan import inputs_of
from recbole_mm.profiling import NOT_COMPARABLE, Profiler
from recbole_mm.ranking import RANK_METRICS
from recbole_mm.records import RUNS_FILE, RunRecord, append, per_user_file, write_per_user
from recbole_mm.resuming import check_same_data, resumed_config
from recbole_mm.session_graphs import with_vectorised_graphs
from recbole_mm.settings import parse_value, read_settings
from recbole_mm.trainer import StageResult, Trainer, load_last_state
from recbole_mm.trimming import with_trimmed_histories
from recbole_mm.version import __version__

STAGE_NAMES = {"pretrain": "pre-training", "finetune": "fine-tuning", "train": "training"}


@distributed.one_message
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
    tested: bool = True,
    profile: bool = False,
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
        tested: False leaves the test out, for a trial of a search, which is to know nothing of it.
        profile: watch some steps, write traces into the folder ``profiles`` beside ``runs_file`` (below
            ``checkpoint_dir`` without one), and log what was costliest. It computes the same, and takes longer.

    Returns:
        The record of the run.

    Raises:
        SettingError, DatasetError, CheckpointError, TrainingError: with one message that says what to do.
    """
    distributed.join()
    run_id = run_id or distributed.from_first(secrets.token_hex(6))
    runs_file = runs_file if distributed.is_first() else None
    started, clock = time.strftime("%Y-%m-%dT%H:%M:%S%z"), time.perf_counter()
    config, state = _begin(model, dataset, config_files or [], settings or {}, origins or {}, resume=resume)
    if config["nproc"] > 1:
        _refuse_processes(config)
    asked = {key: config[key] for key in ("amp", "compile", "fused_optimizer")}
    _refuse_trainer_of_its_own(config, {**asked, "--profile": profile})
    if config["nproc"] > distributed.n_processes():
        return _run_on_processes(
            config["nproc"], model=model, dataset=dataset, config_files=config_files, settings=settings,
            origins=origins, resume=resume, runs_file=runs_file, run_id=run_id, budget=budget, tested=tested,
            profile=profile,
        )  # fmt: skip
    for folder in filter(None, (config["checkpoint_dir"], runs_file and Path(runs_file).parent)):
        _probe(Path(folder))
    _refuse_pickled_loaders(config)
    if config["keep_freed_memory"]:
        keep_freed_memory()
    init_seed(config["seed"], config["reproducibility"])
    logger = _start_log(config)
    given = checkpoint.plain(config.external_config_dict)
    identity = identity_of(config)

    data, train_data, valid_data, test_data, trainer = _prepare(config, logger)
    if state is not None:
        check_same_data(config, state["config"])
        trainer.resume_checkpoint(resume, train_data)
    if profile and distributed.is_first():
        traces = (Path(runs_file).parent if runs_file else Path(config["checkpoint_dir"])) / "profiles"
        trainer.profiler = Profiler(traces, run_id, config["device"])
    seconds = {"data": time.perf_counter() - clock}

    # Bars are for people who watch; in a log file the lines per epoch say as much.
    show_progress = config["show_progress"] and sys.stderr.isatty()
    stages, best_valid = _train(trainer, train_data, valid_data, show_progress=show_progress)
    seconds |= {stage.stage: stage.seconds for stage in stages}

    clock = time.perf_counter()
    outcome = evaluate_test(trainer, test_data, train_data, show_progress=show_progress) if tested else Outcome()
    for warning in outcome.warnings:
        logger.warning(warning)
    seconds["test"] = time.perf_counter() - clock

    record = RunRecord(
        model=config["model"],
        dataset=config["dataset"],
        data_fingerprint=config["data_fingerprint"],
        features=config["feature_hashes"],
        settings=checkpoint.plain(config.final_config_dict),
        seed=config["seed"],
        best_epoch=stages[-1].best_epoch,
        valid=best_valid,
        test=outcome.metrics,
        stages=[vars(stage) for stage in stages],
        seconds={key: round(value, 3) for key, value in seconds.items()},
        peak_memory=_largest(distributed.gathered(_peak_memory())),
        versions=installed_versions(),
        checkpoint=trainer.saved_model_file,
        started=started,
        run_id=run_id,
        settings_given=given,
        settings_hash=identity,
        n_parameters=_n_parameters(trainer.model),
        protocol=config["protocol"],
        test_fingerprint=test_fingerprint(data, test_data),
        n_items=data.n_candidates(),
        n_test=len(test_data._dataset),
        latency=outcome.latency,
        slices=outcome.slices,
        per_user=_write_rows(outcome, runs_file, run_id),
        warnings=[*getattr(trainer, "warnings", []), *outcome.warnings, *[NOT_COMPARABLE] * profile],
        budget=dict(budget or {}),
        command=command_of(config["model"], config["dataset"], given),
    )
    if runs_file is not None:
        append(record, Path(runs_file))
    _report(logger, record, stages, runs_file)
    if profile and distributed.is_first():
        logger.info(f"profile\n{trainer.profiler}")
    return record


class _Ready(NamedTuple):
    """What a training needs: the data set, the loaders of its three parts, and a trainer with its model."""

    data: MultimodalDataset
    train_data: Any
    valid_data: Any
    test_data: Any
    trainer: RecBoleTrainer


def _prepare(config: Config, logger: logging.Logger) -> _Ready:
    """Read and part the data, make the model; into the settings goes what identifies the data."""
    with _recbole_refuses(f"the data of {config['dataset']}"):
        data = MultimodalDataset(config)
        _fit_topk(config, data.n_candidates())
        logger.info(data)
        loaders = data_preparation(config, data)
    init_seed(config["seed"] + config["local_rank"], config["reproducibility"])
    with _recbole_refuses(f"the settings of {config['model']}"):
        net = _quick_class(config)(config, loaders[0]._dataset).to(config["device"])
    if config["knockout"] is not None:
        there, name = [*data.feature_names(), *data.item_columns()], f"{config['model']} on {config['dataset']}"
        for unused in data.knockouts.refuse_idle(data.used_features(), data.used_fields(), there=there, run=name):
            logger.warning(f"knock-out: {name} does not use {unused} anyway")
    logger.debug(net)
    logger.info(f"{config['model']}: {_n_parameters(net):,} trainable parameters")
    config["inputs"] = inputs_of(config)
    config["data_fingerprint"] = data_fingerprint(config.folder)
    config["feature_hashes"] = {name: data.feature_hash(name) for name in data.used_features()}
    config["feature_encoders"] = {name: data.encoder_of(name) for name in data.used_features()}
    config["field_hashes"] = {name: data.field_hash(name) for name in data.used_fields()}
    return _Ready(data, *loaders, with_full_ranking(_trainer_class(config))(config, net))


def _quick_class(config: Config) -> type:
    """The model's class; where it is RecBole's, with what makes it quicker and leaves what it computes."""
    model_class = config.model_class
    if config["vectorised_graphs"]:
        model_class = with_vectorised_graphs(model_class)
    return with_trimmed_histories(model_class, config["trim_histories"])


def _n_parameters(net: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)


def _train(
    trainer: RecBoleTrainer, train_data, valid_data, *, show_progress: bool
) -> tuple[list[StageResult], dict[str, float]]:
    """Fit; the stages and the best validation metrics of the last one."""
    clock, scores = time.perf_counter(), {}
    _, best = trainer.fit(train_data, valid_data, show_progress=show_progress, callback_fn=scores.__setitem__)
    best_valid, seconds = {key: float(value) for key, value in best.items()}, time.perf_counter() - clock
    return getattr(trainer, "stages", None) or [_single_stage(trainer, best_valid, seconds, scores)], best_valid


# ------------------------------------------------ before training


def _begin(
    model: str | None,
    dataset: str | None,
    config_files: Sequence[str | Path],
    settings: Mapping[str, Any],
    origins: Mapping[str, str],
    *,
    resume: str | Path | None,
) -> tuple[Config, dict[str, Any] | None]:
    """The settings of a new run, or those of an interrupted one and its last state."""
    if resume is None:
        with distributed.first_process_first():
            return new_config(model, dataset, config_files, settings, origins), None
    if config_files:
        raise SettingError("--resume continues a run with its own settings; leave --config_files out")
    state = load_last_state(Path(resume))
    return resumed_config(Path(resume), state, model, dataset, settings, origins), state


def new_config(
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
    make_demo_folder(dataset, named.get("data_path", "dataset"))
    return Config(model, dataset, config_files, settings, origins)


def _refuse_processes(config: Config) -> None:
    """What several processes cannot do."""
    trainer, others = _trainer_class(config), [m for m in config["metrics"] if m.lower() not in RANK_METRICS]
    if trainer is not Trainer:
        raise SettingError(
            f"nproc is {config['nproc']}, but {config['model']} trains in a trainer of its own, {trainer.__name__}, "
            "which knows of one process; leave --nproc out"
        )
    if others:
        raise SettingError(
            f"nproc is {config['nproc']}, but {', '.join(others)} needs more than the rank of each target, which is "
            "all that processes tell each other\n  leave it out of metrics, or leave --nproc out"
        )


def _refuse_trainer_of_its_own(config: Config, asked: Mapping[str, Any]) -> None:
    """What only our trainer can do."""
    trainer, wanted = _trainer_class(config), [f"{key} ({value})" for key, value in asked.items() if value]
    if wanted and trainer is not Trainer:
        raise SettingError(
            f"{config['model']} trains in a trainer of its own, {trainer.__name__}, which knows nothing of "
            f"{' and '.join(wanted)}; leave that out"
        )


def _run_on_processes(n_processes: int, **arguments: Any) -> RunRecord:
    """The same run, by several processes of this machine."""
    told: dict[str, Any] = {}
    try:
        return distributed.launch(run, n_processes, arguments=arguments, notes=told)
    finally:
        Trainer.last_saved = told.get("last_saved", Trainer.last_saved)


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
    if not distributed.is_first():
        return root
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


def _fit_topk(config: Config, n_ranked: int) -> None:
    """Cut-offs beyond the items that are ranked are dropped, with a notice."""
    fitting = [k for k in config["topk"] if k <= n_ranked]
    if fitting == config["topk"]:
        return
    k = config["valid_metric"].partition("@")[2]
    if not fitting or (k and int(k) not in fitting):
        raise SettingError(
            f"valid_metric {config['valid_metric']} and topk {config['topk']}: only {n_ranked} items are ranked"
        )
    logging.getLogger().warning(f"topk {config['topk']} becomes {fitting}: only {n_ranked} items are ranked")
    config["topk"] = fitting


def _trainer_class(config: Config) -> type[RecBoleTrainer]:
    theirs = get_trainer(config["MODEL_TYPE"], config["model"])
    return Trainer if theirs is RecBoleTrainer else theirs  # S3Rec and the like bring their own


# ------------------------------------------------ after training


def _write_rows(outcome: Outcome, runs_file: Path | str | None, run_id: str) -> str:
    """Keep the values of each test row beside the file of runs; the name relative to its folder, "" for none."""
    if runs_file is None or outcome.rows is None:
        return ""
    path = per_user_file(Path(runs_file), run_id)
    write_per_user(path, outcome.rows)
    return path.relative_to(Path(runs_file).parent).as_posix()


def installed_versions() -> dict[str, str]:
    """Of what a result may depend on, by name."""
    packages = {name: version(name) for name in ("recbole", "torch", "numpy", "pandas")}
    return packages | {"recbole_mm": __version__, "python": platform.python_version()}


def command_of(model: str, dataset: str, given: Mapping[str, Any]) -> str:
    """The command line that repeats a run, quoted for a shell."""
    settings = [f"--{key}={_typed(value)}" for key, value in given.items() if key not in ("model", "dataset")]
    return shlex.join(["python", "run_recbole_mm.py", f"--model={model}", f"--dataset={dataset}", *settings])


def _typed(value: Any) -> str:
    """A setting as it is typed on a command line; JSON is YAML too. Text such as "1e-4" needs quotes to stay text."""
    return value if isinstance(value, str) and parse_value(value) == value else json.dumps(value, ensure_ascii=False)


def _single_stage(
    trainer: RecBoleTrainer, best_valid: Mapping[str, float], seconds: float, scores: Mapping[int, float]
) -> StageResult:
    """What a trainer of RecBole's own tells; ``scores`` are those of its validations, by epoch."""
    epochs = len(trainer.train_loss_dict)
    best_epoch = epochs - 1 - trainer.cur_step * trainer.eval_step
    curve = [
        {"epoch": epoch, "train_loss": float(loss), "valid": float(scores[epoch]) if epoch in scores else None}
        for epoch, loss in trainer.train_loss_dict.items()
    ]
    return StageResult("train", seconds, epochs, best_epoch, dict(best_valid), trainer.saved_model_file, curve)


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


def _largest(peaks: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Of several processes, what the one that needed most needed."""
    return {key: max(peak[key] for peak in peaks) for key in peaks[0]}


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
