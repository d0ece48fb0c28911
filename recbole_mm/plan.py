"""What to run: models x datasets x knock-outs x seeds, and which of it is done already.

    models --+                                         +-- done already, with the same settings, data and features
    floors --+--> for each dataset --> jobs, in order --+-- failed before: tried again
 knock-outs -+                                         +-- to run
    seeds  --+

Nothing is loaded here but settings, the list of features of a folder, and hashes of its files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from recbole_mm.checkpoint import plain
from recbole_mm.config import Config, UnknownSettingError, identity_of, make_demo_folder
from recbole_mm.data.files import read_header, sha256_of
from recbole_mm.data.knockout import COLUMNS, parse
from recbole_mm.data.layout import Manifest, data_fingerprint, folder_kind
from recbole_mm.data.protocols import COLD_ITEMS
from recbole_mm.errors import SettingError
from recbole_mm.model import find_model, model_names
from recbole_mm.records import RunRecord
from recbole_mm.registration import parts_of
from recbole_mm.settings import read_settings

AUTO = "auto"
FLOORS = ("Popularity", "Transitions", "SessionItemKNN")
FLOORS_OF_SESSIONS = ("SessionPopularity",)  # which a folder needs that is split into sessions
CONTENT_FLOOR = "ContentKNN"  # one for each feature
MADE_FROM = "_from_"  # in the name of a feature that is made from another one
ITEM_FILE = "item file"


@dataclass(frozen=True)
class Job:
    """One run to do.

    Attributes:
        model: its own name, such as "MSM4SR".
        dataset: a folder below ``data_path``, or a path to one.
        settings: all that are given for this run, without seed and knock-out.
        knockout: such as "image:noise"; None for nothing.
        budget: of the search that chose the settings, for the record.
        variant: what tells this job from others of the same model, such as "feature text"; for people.
        tested: False leaves the test out, for a trial of a search.
    """

    model: str
    dataset: str
    settings: dict[str, Any]
    seed: int
    knockout: str | None = None
    budget: dict[str, Any] = field(default_factory=dict)
    variant: str = ""
    tested: bool = True

    @property
    def title(self) -> str:
        """Such as "MSM4SR on Office, seed 2021, knocked out image:noise"."""
        variant = f" ({self.variant})" if self.variant else ""
        knocked_out = f", knocked out {self.knockout}" if self.knockout else ""
        return f"{self.model}{variant} on {Path(self.dataset).name}, seed {self.seed}{knocked_out}"

    @property
    def group(self) -> str:
        """The same for jobs that differ in seed and knock-out alone."""
        return json.dumps([self.model, self.dataset, self.settings], sort_keys=True, default=str)

    def all_settings(self) -> dict[str, Any]:
        """Those given for the run, with its seed and its knock-out."""
        knocked_out = {} if self.knockout is None else {"knockout": self.knockout}
        return {**self.settings, "seed": self.seed, **knocked_out}

    def config(self) -> Config:
        return Config(self.model, self.dataset, settings=self.all_settings())


class Facts(NamedTuple):
    """What a job will compute with, known without loading its data.

    Attributes:
        settings: all of them, seed and knock-out included, as plain data.
        given: those that were given.
        features: sha256 of every feature of the folder.
        inputs: as a record of this job would have them, see `inputs_of`.
    """

    settings: dict[str, Any]
    given: dict[str, Any]
    settings_hash: str
    data_fingerprint: str
    features: dict[str, str]
    inputs: dict[str, str]


# ------------------------------------------------ the plan


def make_plan(
    models: Sequence[str],
    datasets: Sequence[str],
    *,
    seeds: Sequence[int] = (),
    knockouts: str | None = None,
    floors: bool = False,
    config_files: Sequence[str | Path] = (),
    settings: Mapping[str, Any] | None = None,
    origins: Mapping[str, str] | None = None,
    tell: Callable[[str], Any] = print,
) -> list[Job]:
    """All runs, in an order that does not change: by dataset, models before floors before knock-outs, then by seed.

    A setting that some of the models do not have is left out for these, and told; one that none of them has is refused.
    Models that count instead of learn keep their one epoch.

    Args:
        models, datasets: as typed by a user.
        seeds: none takes the setting ``seed``.
        knockouts: "auto" for each modality that a model uses, or such as "image:noise;text:noise" for the models that
            use them.
        floors: add what every model must beat: popularity, transitions, item-kNN, and content-kNN by each feature.
        config_files, settings, origins: as `quick_start.run` takes them; ``<Model>:`` in a file is for that model.
        tell: gets notices, one sentence each.

    Raises:
        SettingError, DatasetError: something cannot run, or is named twice; nothing has run yet.
    """
    origins = dict(origins or {})
    sources = [(str(path), read_settings(path)) for path in config_files]
    named = {key: value for _, content in sources for key, value in content.items()} | dict(settings or {})
    _refuse_product_settings(named, origins, seeds, knockouts)
    models = [find_model(name).__name__ for name in models or filter(None, [named.get("model")])]
    datasets = list(datasets or filter(None, [named.get("dataset")]))
    for what, names in (("model", models), ("dataset", datasets), ("seed", seeds)):
        if twice := sorted({name for name in names if list(names).count(name) > 1}):
            raise SettingError(f"the {what} {twice[0]} is named twice; name it once")
    data_path = named.get("data_path", "dataset")
    _refuse_one_folder_twice(datasets, data_path)
    if not models or not datasets:
        raise SettingError("which models and datasets? Give both, such as --model=MSM4SR,SASRec --dataset=demo")
    chosen = _Settings(sources, dict(settings or {}), origins)
    plan: list[Job] = []
    for dataset in datasets:
        make_demo_folder(dataset, data_path)
        full = [chosen.job(model, dataset) for model in models]
        plain_jobs = [*full, *(_floors(chosen, dataset, full, tell) if floors else [])]
        knocked_out = [
            replace(job, knockout=knockout) for job in plain_jobs for knockout in _knockouts_of(job, knockouts)
        ]
        plan += [replace(job, seed=seed) for job in (*plain_jobs, *knocked_out) for seed in seeds or [job.seed]]
    if knockouts not in (None, AUTO):
        _refuse_idle(knockouts, plan)
    chosen.tell_what_was_left_out(models, tell)
    return plan


def _refuse_product_settings(
    named: Mapping[str, Any], origins: Mapping[str, str], seeds: Sequence[int], knockouts: str | None
) -> None:
    """What means one thing for a run and another for a product of runs."""
    if seeds and origins.get("seed") == "--seed":
        raise SettingError("--seed and --seeds are given; name all seeds in --seeds, such as --seeds=2020,2021")
    if named.get("knockout") is not None:
        raise SettingError(
            f"knockout{_from(origins, 'knockout')} is a setting of one run; for several runs give --knockouts instead, "
            'such as --knockouts="image:noise;text:noise" or --knockouts=auto'
        )
    if knockouts not in (None, AUTO):
        for text in _listed(knockouts):
            parse(text)


def _refuse_one_folder_twice(datasets: Sequence[str], data_path: str) -> None:
    """``Office`` and ``dataset/Office`` are one folder, and its runs would be done twice."""
    named: dict[Path, str] = {}
    for dataset in datasets:
        path = Path(dataset)
        folder = (Path(data_path) / path if str(path) == path.name else path).resolve()
        if folder in named:
            raise SettingError(f"the datasets {named[folder]} and {dataset} are one folder, {folder}; name it once")
        named[folder] = dataset


def _from(origins: Mapping[str, str], key: str) -> str:
    return f" (from {origins[key]})" if key in origins else ""


class _Settings:
    """The settings of each model, out of files and a command line that are for all of them."""

    def __init__(self, sources: list[tuple[str, dict]], settings: dict[str, Any], origins: dict[str, str]) -> None:
        self._sources, self._settings, self._origins = sources, settings, origins
        self._left_out: dict[str, dict[str, UnknownSettingError]] = {}  # by setting and model
        self._kept_epochs: set[str] = set()

    def job(self, model: str, dataset: str, **own: Any) -> Job:
        """The job of a model, with the seed that the settings name, checked as far as it can be without data.

        Args:
            own: settings of this job alone.
        """
        shared, for_model, origins = self._of(find_model(model))
        for_model |= own
        while True:
            given = {**shared, **for_model}
            try:
                config = Config(model, dataset, settings=given, origins=origins)
            except UnknownSettingError as error:
                if error.key not in shared or error.key in for_model:
                    raise SettingError(f"{model}: {error}") from error
                del shared[error.key]
                self._left_out.setdefault(error.key, {})[model] = error
                continue
            except SettingError as error:
                raise SettingError(f"{model} on {dataset}: {error}") from error
            if "epochs" in shared and "epochs" not in for_model and config.internal_config_dict["epochs"] == 1:
                del shared["epochs"]
                self._kept_epochs.add(model)
                continue
            given.pop("seed", None)
            return Job(model, str(dataset), given, config["seed"])

    def _of(self, model_class: type) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
        """Settings for all models; those for this one, which win; where they came from."""
        shared: dict[str, Any] = {}
        own: dict[str, Any] = {}
        origins: dict[str, str] = {}
        for path, content in self._sources:
            general, section = parts_of(content, model_class)
            shared |= general
            own = {key: value for key, value in own.items() if key not in general} | section
            origins |= dict.fromkeys([*general, *section], path)
        shared |= self._settings
        own = {key: value for key, value in own.items() if key not in self._settings}
        names = ("model", "dataset")
        return {key: value for key, value in shared.items() if key not in names}, own, origins | self._origins

    def tell_what_was_left_out(self, models: Sequence[str], tell: Callable[[str], Any]) -> None:
        """Notices; a setting that no model has is a mistake.

        Raises:
            SettingError: such a setting.
        """
        keys: dict[str, list[str]] = {}  # by those who lack them
        for key, errors in self._left_out.items():
            if errors.keys() >= {*models}:
                raise SettingError(str(errors[models[0]])) from errors[models[0]]
            keys.setdefault(", ".join(sorted(errors)), []).append(key)
        for lacking, left_out in keys.items():
            tell(f"left out for {lacking}, without such a setting: {', '.join(left_out)}")
        if self._kept_epochs:
            tell(f"epochs is left out for {', '.join(sorted(self._kept_epochs))}: one is enough to count")


def _floors(chosen: _Settings, dataset: str, full: Sequence[Job], tell: Callable[[str], Any]) -> list[Job]:
    """What is not among the models anyway, and can tell the ranked items apart."""
    config = full[0].config()
    folder = config.folder
    names = [*FLOORS, *(FLOORS_OF_SESSIONS if folder_kind(folder) == "splits" else ())]
    if config["protocol"] == COLD_ITEMS and config["candidates"] == "cold":
        refusing = [name for name in names if not find_model(name).reads_prefix_alone]
        names = [name for name in names if name not in refusing]
        tell(
            f"no floors {', '.join(refusing)} on {Path(dataset).name}: they count what is bought in training, and "
            f"protocol {COLD_ITEMS} ranks items alone that training never has"
        )
    floors = [chosen.job(name, dataset) for name in names]
    if CONTENT_FLOOR in model_names():
        contents = [name for name in sorted(Manifest.load(folder).features) if MADE_FROM not in name]
        contents += ["price"] if _has_prices(folder) else []
        floors += [replace(chosen.job(CONTENT_FLOOR, dataset, feature=name), variant=name) for name in contents]
    there = {identity_of(job.config()) for job in full}
    return [job for job in floors if identity_of(job.config()) not in there]


# ------------------------------------------------ knock-outs


def _listed(knockouts: str) -> list[str]:
    found = [text.strip() for text in knockouts.split(";")]
    if not all(found) or len({*found}) < len(found):
        raise SettingError(
            f'--knockouts: cannot read {knockouts!r}; it should look like "image:noise;text:noise", '
            "each one once, or auto"
        )
    return found


def _knockouts_of(job: Job, knockouts: str | None) -> list[str]:
    if knockouts is None:
        return []
    config = job.config()
    if knockouts == AUTO:
        return knockouts_of(config)
    names = _names(config)
    return [text for text in _listed(knockouts) if names & {*parse(text)}]


def knockouts_of(config: Config) -> list[str]:
    """One knock-out for each modality that a model uses of its folder: vectors by noise, prices by shuffling."""
    features = Manifest.load(config.folder).features
    used = {modality: feature for modality, feature in _modalities(config).items() if feature in features}
    knockouts = []
    for modality in used:
        if modality.startswith("pseudo_") or modality.partition("_")[2] in used:
            continue  # goes along with what it is made from
        others = [other for other in used if other.partition("_")[2] == modality and not other.startswith("pseudo_")]
        knockouts.append(",".join(f"{name}:noise" for name in (modality, *others)))
    return knockouts + (["price:shuffle"] if _uses_prices(config) else [])


def _modalities(config: Config) -> dict[str, str]:
    """Feature by modality, of those that settings do not switch off."""
    found = {}
    for key, value in config.final_config_dict.items():
        modality = key.removesuffix("_feature")
        if modality != key and isinstance(value, str) and config[f"use_{modality}"] is not False:
            found[modality] = value
    return found


def _uses_prices(config: Config) -> bool:
    return bool(config["use_price"]) and config["price_score"] != "none" and _has_prices(config.folder)


def _has_prices(folder: Path) -> bool:
    path = folder / f"{folder.name}.item"
    return path.is_file() and COLUMNS["price"] in read_header(path)


def _names(config: Config) -> set[str]:
    """What a knock-out may name for a model."""
    modalities = _modalities(config)
    prices = {"price", COLUMNS["price"], "category"} if _uses_prices(config) else set()
    return {*modalities, *modalities.values(), *prices}


def _refuse_idle(knockouts: str, plan: Sequence[Job]) -> None:
    idle = [text for text in _listed(knockouts) if text not in {job.knockout for job in plan}]
    if idle:
        models = ", ".join(dict.fromkeys(job.model for job in plan))
        raise SettingError(f"--knockouts: none of {models} uses {idle[0]}; --knockouts=auto finds what they use")


# ------------------------------------------------ what is done already


def inputs_of(config: Config) -> dict[str, str]:
    """What a run may read besides interactions: sha256 of each feature that its settings name, and of the item file.

    A record keeps them, so that a feature that comes to a folder later makes a run a new one.
    """
    named: set[str] = set()
    for key, value in config.final_config_dict.items():
        if key.endswith(("feature", "features")):
            named |= {value} if isinstance(value, str) else {*(value or ())}
    found = {name: digest for name, digest in _feature_hashes(config.folder).items() if name in named}
    path = config.folder / f"{config.folder.name}.item"
    return found | ({ITEM_FILE: sha256_of(path)} if path.is_file() else {})


def _feature_hashes(folder: Path) -> dict[str, str]:
    manifest = Manifest.load(folder)
    return {name: manifest.files[feature.file].sha256 for name, feature in sorted(manifest.features.items())}


def facts_of(jobs: Sequence[Job]) -> Iterator[Facts]:
    """What each job will compute with; jobs that differ in seed and knock-out alone share the work.

    Raises:
        SettingError, DatasetError: of the job's settings or folder.
    """
    known: dict[str, Facts] = {}
    fingerprints: dict[Path, str] = {}
    for job in jobs:
        if job.group not in known:
            config = job.config()
            folder = Path(config.folder).resolve()
            fingerprints.setdefault(folder, data_fingerprint(config.folder))
            known[job.group] = Facts(
                plain(config.final_config_dict),
                plain(config.external_config_dict),
                identity_of(config),
                fingerprints[folder],
                _feature_hashes(config.folder),
                inputs_of(config),
            )
        own = {"seed": job.seed, "knockout": job.knockout}
        facts = known[job.group]
        given = {key: value for key, value in facts.given.items() if key not in own}
        given |= {key: value for key, value in own.items() if value is not None}
        yield facts._replace(settings=facts.settings | own, given=given)


def find_done(jobs: Sequence[Job], records: Sequence[RunRecord]) -> list[RunRecord | None]:
    """For each job its newest record: same settings, seed and knock-out, from what the folder has now.

    After a search, the budget in the record is that of the search too. Failed runs are not done.
    """
    by_identity: dict[tuple, list[RunRecord]] = {}
    for record in records:
        if record.status == "done" and record.test:
            by_identity.setdefault(_identity(record), []).append(record)
    found = []
    for job, facts in zip(jobs, facts_of(jobs), strict=True):
        key = (job.model, facts.settings_hash, facts.data_fingerprint, job.seed, _kinds(job.knockout))
        same = [record for record in by_identity.get(key, []) if _same_inputs(record, facts)]
        same = [record for record in same if _tells_budget(record, job.budget)]
        found.append(same[-1] if same else None)
    return found


def find_failed(jobs: Sequence[Job], records: Sequence[RunRecord]) -> list[RunRecord | None]:
    """For each job its newest failed record, whatever the data were."""
    failed = {}
    for record in records:
        if record.status == "failed":
            failed[(*_identity(record)[:2], *_identity(record)[3:])] = record
    return [
        failed.get((job.model, facts.settings_hash, job.seed, _kinds(job.knockout)))
        for job, facts in zip(jobs, facts_of(jobs), strict=True)
    ]


def _identity(record: RunRecord) -> tuple:
    return record.model, record.settings_hash, record.data_fingerprint, record.seed, _kinds(record.knockout)


def _kinds(knockout: str | None) -> frozenset:
    """A knock-out whatever the order of its parts."""
    try:
        return frozenset(parse(knockout).items())
    except SettingError:  # of a record that somebody wrote by hand
        return frozenset({(str(knockout), "")})


def _tells_budget(record: RunRecord, budget: Mapping[str, Any]) -> bool:
    """Whether a record says what finding its settings took; where nothing was searched, there is nothing to say."""
    return not budget or all(record.budget.get(key) == budget.get(key) for key in ("trials", "space_hash"))


def _same_inputs(record: RunRecord, facts: Facts) -> bool:
    if any(facts.features.get(name) != digest for name, digest in record.features.items()):
        return False
    then = record.settings.get("inputs")
    if not isinstance(then, dict) or then.keys() - {ITEM_FILE} != facts.inputs.keys() - {ITEM_FILE}:
        return False
    reads_items = record.settings.get("field_hashes") or "item" in (record.settings.get("load_col") or {})
    return not reads_items or then.get(ITEM_FILE) == facts.inputs.get(ITEM_FILE)
