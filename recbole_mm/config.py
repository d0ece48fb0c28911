"""Settings of a run: RecBole's Config with our property files, no surprises from ``sys.argv``, and no unknown keys."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import recbole
import torch
from recbole.config import Config as RecBoleConfig
from recbole.evaluator import metric_types
from recbole.utils import InputType, dataset_arguments, evaluation_arguments, general_arguments, training_arguments

from recbole_mm import distributed
from recbole_mm.checkpoint import plain
from recbole_mm.data.files import read_header
from recbole_mm.data.layout import Manifest, folder_kind
from recbole_mm.data.protocols import BELONGS_TO, ProtocolSettings, protocol_of_parts, protocol_of_plain
from recbole_mm.errors import DatasetError, SettingError, nearest
from recbole_mm.model import find_model, lineage
from recbole_mm.model.positions import refuse_positions
from recbole_mm.model.softmax import refuse_softmax
from recbole_mm.paths import properties_dir
from recbole_mm.ranges import documented
from recbole_mm.records import settings_hash
from recbole_mm.registration import dataset_settings, default_files, has_recipe, parts_of
from recbole_mm.settings import read_settings

_READ_WITHOUT_DEFAULT = {"reg_weight"}  # read by RecBole, but in none of its property files
_AT_LEAST_ONE = {"train_batch_size", "eval_batch_size", "epochs", "eval_step", "n_layers", "n_heads"}
_CHOICES = {  # of RecBole's settings, which it takes silently for something else, or fails on much later
    "learner": ("adam", "adamw", "sgd", "adagrad", "rmsprop", "sparse_adam"),
    "state": ("info", "debug", "error", "warning", "critical"),
    "rm_dup_inter": (None, "first", "last"),
}
_SPLITS = ("LS", "RS", "TS")
_CATEGORY_COLUMNS = ("categories", "category", "class")
_PICKLED_CACHES = ("save_dataset", "dataset_save_path", "save_dataloaders", "dataloaders_save_path")


class UnknownSettingError(SettingError):
    """A setting that a model does not have.

    Attributes:
        key: the setting.
    """

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


class Config(RecBoleConfig):
    """All settings of one run.

    Precedence, weakest first: RecBole's files, overall.yaml, model/<Model>.yaml of the model's bases and of the model
    itself, folder/<kind>.yaml, dataset/<name>.yaml, config files, ``settings``. In a file, those below ``<Model>:``
    win over the file's plain keys, for that model.

    Args:
        model: name, upper and lower case alike, or class.
        dataset: name of a folder in ``data_path``, or a path to a folder.
        config_files: YAML files, the later one wins.
        settings: keys and values; win over everything.
        origins: where each of ``settings`` came from, for messages.

    Raises:
        SettingError: an unknown model, key or value.
        DatasetError: there is no such folder, or no interactions in it.
    """

    def __init__(
        self,
        model: str | type,
        dataset: str,
        config_files: Sequence[str | Path] | None = None,
        settings: Mapping[str, Any] | None = None,
        origins: Mapping[str, str] | None = None,
    ) -> None:
        self.origins = {}
        cls = find_model(model) if isinstance(model, str) else model
        files = [(str(path), parts_of(read_settings(path), cls)) for path in config_files or []]
        files = [(path, general | own) for path, (general, own) in files]
        for path, content in files:
            self.origins |= dict.fromkeys(content, path)
        self.origins |= dict.fromkeys(settings or {}, "settings") | dict(origins or {})
        self._files = [content for _, content in files]
        try:
            super().__init__(model=cls, dataset=str(dataset), config_file_list=None, config_dict=dict(settings or {}))
        except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
            raise SettingError(f"RecBole refuses the settings: {error}") from error

    # ------------------------------------------------ what RecBole's constructor calls, in this order

    def _load_variable_config_dict(self, config_dict) -> dict[str, Any]:
        return _without_names(config_dict or {})

    def _load_config_files(self, file_list) -> dict[str, Any]:
        return _without_names({key: value for content in self._files for key, value in content.items()})

    def _convert_config_dict(self, config_dict):
        return config_dict  # RecBole evaluates strings as Python

    def _load_cmd_line(self):
        return {}  # RecBole takes any program's sys.argv, such as pytest's, for settings

    def _load_internal_config_dict(self, model, model_class, dataset) -> None:
        external = self.external_config_dict
        path = Path(dataset) if Path(dataset).name else Path(dataset).resolve()
        self.dataset = path.name
        if str(path) != path.name:  # a path instead of a name
            if "data_path" in external:
                raise SettingError(f"dataset is a path, {dataset}, and data_path is given too{self._from('data_path')}")
            external["data_path"] = str(path.parent)
        self._translate_stage(external, model_class)
        super()._load_internal_config_dict(model, model_class, self.dataset)
        sampling = self.internal_config_dict["train_neg_sample_args"]
        for file in default_files(model_class):
            self._update_internal_config_dict(file)
        if not lineage(model_class):  # RecBole's model, whose own file wins over our overall.yaml
            theirs = Path(recbole.__file__).parent / "properties" / "model" / f"{model}.yaml"
            self._update_internal_config_dict(theirs)
        self._refuse_unknown(external)
        self._fit_types(external)
        loss = {**self.internal_config_dict, **external}.get("loss_type")
        if getattr(model_class, "input_type", InputType.PAIRWISE if loss == "BPR" else None) == InputType.PAIRWISE:
            self.internal_config_dict["train_neg_sample_args"] = sampling  # a pairwise loss cannot do without negatives

        self.folder = Path(external.get("data_path", self.internal_config_dict["data_path"])) / self.dataset
        if not self.folder.is_dir():
            raise DatasetError(missing_folder_message(self.folder))
        if folder_kind(self.folder) == "splits":
            self._update_internal_config_dict(properties_dir() / "folder" / "splits.yaml")
        self.internal_config_dict |= dataset_settings(self.dataset, model_class)
        self._choose_columns(external)

    def _set_default_parameters(self) -> None:
        final, given = self.final_config_dict, self.external_config_dict.get("eval_args")
        if isinstance(given, dict):  # those that are not given keep their defaults
            final["eval_args"] = {**self.internal_config_dict["eval_args"], **given}
        self._check_values()
        super()._set_default_parameters()
        final["protocol"] = self._protocol()
        self.final_config_dict["data_path"] = str(self.folder)  # RecBole has its own folder for the name ml-100k
        if not self.final_config_dict["use_gpu"]:
            self.final_config_dict["gpu_id"] = ""  # RecBole forgets to look at use_gpu

    def _init_device(self) -> None:
        """As RecBole's for one process; of several, each has a GPU of its own, or all share the CPU."""
        final, external, here = self.final_config_dict, self.external_config_dict, distributed.place()
        if here is not None:  # this process is one of a group, started by us or by torchrun
            if external.setdefault("nproc", here.n_processes) != here.n_processes:
                raise SettingError(
                    f"nproc{self._from('nproc')} is {final['nproc']}, but {here.n_processes} processes were started; "
                    "leave it out"
                )
            final["nproc"] = here.n_processes
        n_processes = final["nproc"]
        if n_processes > 1:
            self._check_processes(n_processes)
            if final["use_gpu"]:
                n_local = n_processes if here is None else here.n_local
                final["gpu_id"] = distributed.gpu_ids(external.get("gpu_id"), n_local=n_local)
        super()._init_device()
        if here is not None and final["device"].type == "cuda":
            final["device"] = torch.device("cuda", here.local_rank)
            torch.cuda.set_device(here.local_rank)
        if here is not None and here.rank > 0:
            final.update(show_progress=False, log_wandb=False)

    def _check_processes(self, n_processes: int) -> None:
        n_rows, origin = self.final_config_dict["train_batch_size"], self._from("nproc")
        if n_rows < n_processes:
            raise SettingError(
                f"nproc{origin} is {n_processes}, but a batch has {n_rows} rows, and each process needs one at least\n"
                "  use fewer processes or a larger train_batch_size, which is that of all processes together"
            )

    # ------------------------------------------------ checks

    def _from(self, key: str) -> str:
        return f" (from {self.origins[key]})" if key in self.origins else ""

    def _refuse_unknown(self, external: Mapping[str, Any]) -> None:
        arguments = [*general_arguments, *training_arguments, *evaluation_arguments, *dataset_arguments]
        known = {*self.internal_config_dict, *arguments, *_READ_WITHOUT_DEFAULT}
        for key in external:
            if key not in known:
                raise UnknownSettingError(key, f"unknown setting {key!r}{self._from(key)}{nearest(key, known)}")

    def _fit_types(self, external: dict[str, Any]) -> None:
        """Values of the default's type; a whole number may stand for a float, one value for a list of one."""
        for key, value in external.items():
            default = self.internal_config_dict.get(key)
            kind = type(default)
            if default is None or (value is None and kind not in (int, float, bool)):
                continue
            if kind in (list, dict) and isinstance(value, str) and value[:1] in ("[", "{"):
                raise SettingError(f"{key}: cannot read {value!r}{self._from(key)}; it should look like {default!r}")
            if kind is float and isinstance(value, int) and not isinstance(value, bool):
                external[key] = float(value)
            elif kind is str and isinstance(value, (int, float)) and not isinstance(value, bool):
                external[key] = str(value)
            elif kind is list and not isinstance(value, (list, tuple)):
                external[key] = [value]
            elif kind in (int, float, bool, str, dict) and type(value) is not kind and not isinstance(value, kind):
                raise SettingError(
                    f"{key} must be {kind.__name__} such as {default!r}, found {value!r}{self._from(key)}"
                )
            elif kind is int and isinstance(value, bool):
                raise SettingError(f"{key} must be int such as {default!r}, found {value!r}{self._from(key)}")

    def _check_values(self) -> None:
        final = self.final_config_dict
        for key in _AT_LEAST_ONE & final.keys():
            if final[key] is None or final[key] < 1:
                raise SettingError(f"{key} must be at least 1, found {final[key]!r}{self._from(key)}")
        if not final["learning_rate"] > 0:
            raise SettingError(
                f"learning_rate must be > 0, found {final['learning_rate']!r}{self._from('learning_rate')}"
            )
        allowed = {key: values for file in default_files(self.model_class) for key, values in documented(file).items()}
        for key, values in allowed.items():
            if final[key] not in values:
                near = values.nearest(final[key])
                raise SettingError(f"{key} must be {values}, found {final[key]!r}{self._from(key)}{near}")
        for key, choices in _CHOICES.items():
            value = final[key].lower() if isinstance(final[key], str) else final[key]
            if value not in choices:
                listed = ", ".join(map(str, choices))
                raise SettingError(f"{key} must be one of {listed}, found {final[key]!r}{self._from(key)}")
        if final["seed"] < 0:
            raise SettingError(f"seed must be at least 0, found {final['seed']}{self._from('seed')}")
        for key in ("enable_amp", "enable_scaler"):
            if final[key]:
                raise SettingError(
                    f"{key}{self._from(key)} is RecBole's mixed precision, which rounds losses and scores too; "
                    "use amp: bf16 or fp16 instead, which brings its scaler with it"
                )
        self._check_stage()
        self._check_positions()
        self._check_softmax()
        self._check_eval_args()
        for key in _PICKLED_CACHES:
            if final.get(key):
                raise SettingError(
                    f"{key}{self._from(key)}: RecBole's cache is a pickle, which this runner neither writes nor reads"
                )
        if not final["topk"] or not all(isinstance(k, int) and k > 0 for k in final["topk"]):
            raise SettingError(f"topk must be whole numbers of at least 1, found {final['topk']}{self._from('topk')}")
        for metric in final["metrics"]:
            if str(metric).lower() not in metric_types:
                raise SettingError(f"no metric {metric!r}{self._from('metrics')}{nearest(str(metric), metric_types)}")
        name, _, k = str(final["valid_metric"]).partition("@")
        known = [str(metric).lower() for metric in final["metrics"]]
        if name.lower() not in known or k not in map(str, final["topk"]):
            raise SettingError(
                f"valid_metric {final['valid_metric']!r}{self._from('valid_metric')} must be one of the metrics "
                f"{final['metrics']} at one of {final['topk']}, such as {final['metrics'][0]}@{final['topk'][0]}"
            )

    def _translate_stage(self, external: dict[str, Any], model_class: type) -> None:
        """A stage under a name of the model's paper becomes the settings that it stands for."""
        name = external.get("train_stage")
        meant = getattr(model_class, "stage_names", {}).get(name, {}) if isinstance(name, str) else {}
        for key, value in meant.items():
            if key != "train_stage" and external.get(key, value) != value:
                raise SettingError(
                    f"train_stage {name}{self._from('train_stage')} means {key} {value}, "
                    f"found {external[key]}{self._from(key)}; leave one of them out"
                )
            external[key] = value

    def _check_stage(self) -> None:
        """What belongs to stages goes with models that have them; a given checkpoint means fine-tuning."""
        final, external = self.final_config_dict, self.external_config_dict
        if not hasattr(self.model_class, "same_in_both_stages"):
            given = [key for key in ("train_stage", "pretrained_path") if key in external]
            if given:
                raise SettingError(f"{given[0]}{self._from(given[0])}: {self.model} has no pre-training")
            return
        path = final["pretrained_path"]
        if path is None:
            return
        if not isinstance(path, str):
            raise SettingError(f"pretrained_path must be a file, found {path!r}{self._from('pretrained_path')}")
        if "train_stage" not in external:
            final["train_stage"] = "finetune"
        if final["train_stage"] != "finetune":
            raise SettingError(
                f"pretrained_path{self._from('pretrained_path')} goes with train_stage finetune, "
                f"found {final['train_stage']}{self._from('train_stage')}"
            )

    def _check_positions(self) -> None:
        final, key = self.final_config_dict, "train_positions"
        refuse_positions(
            self.model_class, final[key], stage=final["train_stage"], loss_type=final.get("loss_type"),
            origin=self._from(key),
        )  # fmt: skip

    def _check_softmax(self) -> None:
        final = self.final_config_dict
        refuse_softmax(
            self.model_class, final["softmax"], lazy=final["lazy_item_embedding"], origin=self._from("softmax")
        )

    def _check_eval_args(self) -> None:
        args, origin = self.final_config_dict["eval_args"], self._from("eval_args")
        known = ("split", "order", "group_by", "mode")
        for key in args:
            if key not in known:
                raise SettingError(f"eval_args has no key {key!r}{origin}{nearest(str(key), known)}")
        if args.get("order") != "TO":
            raise SettingError(
                f"eval_args: order must be TO, in time, for sequences, found {args.get('order')!r}{origin}"
            )
        modes = args.get("mode")
        for mode in modes.values() if isinstance(modes, dict) else [modes]:
            if mode not in ("full", None):
                raise SettingError(
                    f"eval_args: mode must be full, which ranks every item, found {mode!r}{origin}\n"
                    "  metrics over a sample of the items can put models in another order than metrics over all of "
                    "them (Krichene and Rendle, On Sampled Metrics for Item Recommendation, KDD 2020); leave mode out"
                )
        split = args.get("split")
        if not isinstance(split, dict) or len(split) != 1 or not set(split) <= set(_SPLITS):
            raise SettingError(f"eval_args: split must be one of LS, RS or TS with its value, found {split!r}{origin}")

    def _protocol(self) -> str:
        """The setting ``protocol``, or what the folder is without it."""
        final, external, asked = self.final_config_dict, self.external_config_dict, self.final_config_dict["protocol"]
        origin = self._from("protocol")
        if folder_kind(self.folder) == "splits":
            settings = Manifest.load(self.folder).settings
            protocol = protocol_of_parts(asked, settings, name=self.dataset, origin=origin)
            made_here = None
        else:
            given_split = "split" in (external.get("eval_args") or {})
            protocol = protocol_of_plain(asked, final["eval_args"], given_split=given_split, origin=origin)
            made_here = ProtocolSettings.of({**final, "protocol": protocol})
        for key, protocols in BELONGS_TO.items():
            if key in external and (made_here is None or protocol not in protocols):
                raise SettingError(
                    f"{key}{self._from(key)} belongs to protocol {' and '.join(protocols)}, of a folder with one file "
                    f"of interactions, and this is {protocol}; leave it out, or add --protocol={protocols[0]}"
                )
        return protocol

    def _choose_columns(self, external: Mapping[str, Any]) -> None:
        """The columns to read: those of the id and time fields, and what a model with item fields asks for."""
        settings = {**self.internal_config_dict, **external}
        if "load_col" in external:
            return
        fields = ["USER_ID_FIELD", "ITEM_ID_FIELD", "TIME_FIELD"]
        if settings.get("benchmark_filename") is None:
            self.internal_config_dict["load_col"] = {"inter": [settings[field] for field in fields]}
        if settings.get("selected_features"):  # RecBole's FDSA, SASRecF, GRU4RecF
            self._choose_item_fields(settings, chosen="selected_features" in external)

    def _choose_item_fields(self, settings: Mapping[str, Any], *, chosen: bool) -> None:
        path = self.folder / f"{self.folder.name}.item"
        columns = read_header(path) if path.is_file() else {}
        wanted = list(settings["selected_features"])
        if not chosen and not set(wanted) <= set(columns):
            wanted = [column for column in _CATEGORY_COLUMNS if column in columns][:1]
        if not wanted or not set(wanted) <= set(columns):
            raise SettingError(
                f"{self.model} needs item columns: selected_features {wanted or settings['selected_features']}"
                f"{self._from('selected_features')} is not in {path.name}, "
                f"which has {', '.join(columns) or 'no columns'}\n"
                "  name some of them with --selected_features=[column]"
            )
        self.internal_config_dict["selected_features"] = wanted
        self.internal_config_dict["load_col"]["item"] = [settings["ITEM_ID_FIELD"], *wanted]


def _without_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Without the names of model and dataset, which may stand in a config file too."""
    return {key: value for key, value in settings.items() if key not in ("model", "dataset")}


def identity_of(config: Config) -> str:
    """The hash that a run with these settings has in its record; it needs the settings alone, before data change them.

    It knows neither seed nor knock-out.
    """
    return settings_hash(config["model"], plain(config.final_config_dict))


def make_demo_folder(dataset: str | Path, data_path: str | Path = "dataset") -> None:
    """Make the made-up shop, if it is asked for by its name and is not there yet."""
    folder = Path(data_path) / "demo"
    if str(Path(dataset)) == "demo" and not folder.exists():
        # Preparation is imported here alone, and only then.
        importlib.import_module("dataset_prep.demo").make_demo(folder)


def missing_folder_message(folder: Path) -> str:
    """What to do when there is no folder of that name."""
    found = datasets_in(folder.parent)
    name = folder.name
    if name == "demo":
        return f"no dataset folder {folder}\n  make it with: python -m dataset_prep demo --out {folder.parent}"
    if has_recipe(name):
        return (
            f"no dataset folder {folder}\n"
            f"  make it with: python -m dataset_prep recipe {name} --reviews FILE --meta FILE"
        )
    return (
        f"no dataset folder {folder}{nearest(name, found)}\n"
        f"  found in {folder.parent}: {', '.join(found) or 'nothing'}; 'demo' makes itself\n"
        f"  to make it, put RecBole's atomic files {name}.inter and {name}.item into {folder} and run:\n"
        f"    python -m dataset_prep features --dataset {folder} --feature text\n"
        f"    python -m dataset_prep features --dataset {folder} --feature image --images <folder of pictures>"
    )


def datasets_in(data_path: Path) -> list[str]:
    """Names of the dataset folders below ``data_path``."""
    names = []
    for folder in sorted(Path(data_path).glob("*/")):
        try:
            folder_kind(folder)
            names.append(folder.name)
        except DatasetError:
            continue
    return names


def stage_config(config: RecBoleConfig, stage: str) -> RecBoleConfig:
    """The settings of one training stage, of our Config or of RecBole's own.

    For ``"pretrain"``, each ``pretrain_<key>`` takes the place of ``<key>``, unless the user gave ``<key>`` and not
    ``pretrain_<key>``: what a user sets holds in both stages.
    """
    staged = copy.copy(config)
    final = staged.final_config_dict = dict(config.final_config_dict)
    given = config.external_config_dict
    final["train_stage"] = stage
    if stage == "pretrain":
        for name in [key for key in final if key.startswith("pretrain_")]:
            key = name.removeprefix("pretrain_")
            if key in final and (name in given or key not in given):
                final[key] = final[name]
    return staged
