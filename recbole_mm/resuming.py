"""An interrupted run goes on as it began: with its settings, but for a few, and with the same data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recbole_mm import checkpoint
from recbole_mm.config import Config
from recbole_mm.errors import DatasetError, SettingError
from recbole_mm.model import find_model

_MAY_CHANGE = {
    "epochs", "pretrain_epochs", "stopping_step", "show_progress", "state", "gpu_id", "use_gpu", "device", "data_path",
    "topk", "data_fingerprint", "feature_hashes", "feature_encoders", "field_hashes", "inputs",
    "history_storage", "keep_freed_memory",
}  # fmt: skip


def resumed_config(
    path: Path,
    state: Mapping[str, Any],
    model: str | None,
    dataset: str | None,
    settings: Mapping[str, Any],
    origins: Mapping[str, str],
) -> Config:
    """The settings of the interrupted run; only those that do not change its course may be given anew.

    Args:
        path: of the last state, for messages.
        state: what is in it.
        model, dataset, settings, origins: as `quick_start.run` takes them.

    Raises:
        SettingError: naming each setting that differs.
    """
    stored, given = state["config"], state["given"]
    if model is not None and find_model(model).__name__ != stored["model"]:
        raise SettingError(f"{path} is a run of {stored['model']}, not of {model}; leave --model out when resuming")
    if dataset is not None and Path(dataset).name != stored["dataset"]:
        raise SettingError(
            f"{path} is a run on {stored['dataset']}, not on {dataset}; leave --dataset out when resuming"
        )
    config = Config(stored["model"], stored["dataset"], None, {**given, **settings}, origins)
    now = checkpoint.plain(config.final_config_dict)
    # A checkpoint of an earlier version lacks settings that there are now; they were what they are by default.
    changed = [
        key
        for key in now.keys() - _MAY_CHANGE
        if (now[key] != stored[key] if key in stored else key in config.external_config_dict)
    ]
    if "topk" in settings and settings["topk"] != given.get("topk"):
        changed.append("topk")  # the stored ones may have been cut to fit the catalogue
    if changed:
        listed = ", ".join(
            f"{key} is {now[key]!r}, was {repr(stored[key]) if key in stored else 'not there'}"
            for key in sorted(changed)
        )
        raise SettingError(
            f"--resume continues a run as it began, but settings differ: {listed}\n"
            "  leave them out, or start a new run; --epochs, --pretrain_epochs and --stopping_step may change"
        )
    return config


def check_same_data(config: Config, stored: Mapping[str, Any]) -> None:
    """Interactions, features and item columns are those that the interrupted run began with.

    Raises:
        DatasetError: naming what changed.
    """

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
