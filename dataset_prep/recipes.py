"""Recipes: the whole preparation of a named dataset, as a list of this package's own commands.

A recipe is the key ``recipe`` of a YAML file, ``properties/dataset/<name>.yaml`` or one of your own:

    recipe:
      title: Office Products, Amazon reviews 2018
      prepare: {command: amazon, edition: 2018, category: Office_Products, min_user: 5, min_item: 5}
      pictures: {per_item: 1}
      features:
        text: {encoder: sentence, model: all-mpnet-base-v2}
        image_full: {encoder: torchvision}
      reduce: [{features: image, width: 64}]
      expected: {users: 87346, items: 25986, source: where the figures are from}

Each entry becomes one command line, ``min_user: 5`` the option ``--min-user 5``: everything a recipe does can be done
by hand, and is checked in one place. Every command keeps what is done already, so that the same recipe again continues
where the last one was interrupted.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recbole_mm.errors import SettingError, nearest
from recbole_mm.paths import properties_dir

KEYS = ("title", "note", "prepare", "pictures", "features", "reduce", "expected")
STEPS = ("prepare", "pictures", "features", "reduce", "describe", "check")
PREPARE_COMMANDS = ("amazon", "table")
COUNTED = ("users", "sessions", "items", "interactions")


@dataclass(frozen=True)
class Recipe:
    """How one dataset is prepared.

    Attributes:
        name: of the dataset's folder.
        prepare: options of the command that makes the folder; ``command`` names it, ``category`` is what to download.
        pictures: options of ``pictures``; None: the recipe uses none.
        features: options of ``features``, by name of the feature.
        reduce: options of ``reduce``, once for each list of features.
        expected: published figures, such as ``{"users": 87346}``, and their source.
    """

    name: str
    title: str
    note: str
    prepare: dict[str, Any]
    pictures: dict[str, Any] | None
    features: dict[str, dict[str, Any]]
    reduce: list[dict[str, Any]]
    expected: dict[str, Any] = field(default_factory=dict)


# ---------------------------------------------------------------- reading


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in _folder().glob("*.yaml") if _read(path).get("recipe"))


def find_recipe(name: str) -> Recipe:
    """A recipe by its name, or by the path of a YAML file, whose stem is then the name.

    Raises:
        SettingError: no such recipe or file, or a file that holds no recipe.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = _folder() / f"{name}.yaml"
        if not path.is_file() or not _read(path).get("recipe"):
            known = recipe_names()
            raise SettingError(
                f"no recipe {name!r}, only {known}{nearest(name, known)}; or give the path of a .yaml file"
            )
    elif not path.is_file():
        raise SettingError(f"no file {path}")
    return _recipe(path.stem, _read(path).get("recipe"), path)


def _folder() -> Path:
    return properties_dir() / "dataset"


def _read(path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingError(f"{path} is no YAML: {error}") from error
    if not isinstance(content, (dict, type(None))):
        raise SettingError(f"{path}: expected keys and values at the top, found {type(content).__name__}")
    return content or {}


def _recipe(name: str, content: Any, path: Path) -> Recipe:
    if not isinstance(content, dict):
        raise SettingError(f"{path} has no key recipe with keys and values below; see properties/dataset/Office.yaml")
    if foreign := [key for key in content if key not in KEYS]:
        raise SettingError(
            f"{path}: recipe has no key {foreign[0]!r}, only {', '.join(KEYS)}{nearest(foreign[0], KEYS)}"
        )
    prepare = content.get("prepare")
    if not isinstance(prepare, dict) or prepare.get("command") not in PREPARE_COMMANDS:
        raise SettingError(f"{path}: recipe.prepare needs a command, one of {list(PREPARE_COMMANDS)}")
    features, reduce = content.get("features") or {}, content.get("reduce") or []
    for key, value in features.items() if isinstance(features, dict) else [("features", features)]:
        if not isinstance(value, dict):
            raise SettingError(
                f"{path}: recipe.features.{key} is {value!r}, expected options such as {{encoder: sentence}}"
            )
    if not isinstance(reduce, list) or not all(isinstance(entry, dict) for entry in reduce):
        raise SettingError(f"{path}: recipe.reduce is {reduce!r}, expected a list of options")
    return Recipe(
        name=name,
        title=str(content.get("title", name)),
        note=str(content.get("note", "")).strip(),
        prepare=dict(prepare),
        pictures=None if content.get("pictures") is None else dict(content["pictures"]),
        features=dict(features),
        reduce=[dict(entry) for entry in reduce],
        expected=dict(content.get("expected") or {}),
    )


def with_changes(recipe: Recipe, changes: Sequence[str]) -> Recipe:
    """A recipe with some options replaced, ``features.text.model=path/to/model``.

    A value is YAML; an empty one takes the option away, and ``features.image=`` a whole feature.

    Raises:
        SettingError: another form, or a key that the recipe does not have above the option.
    """
    import copy

    import yaml

    content = copy.deepcopy({"prepare": recipe.prepare, "pictures": recipe.pictures, "features": recipe.features})
    content["reduce"] = {str(number): entry for number, entry in enumerate(copy.deepcopy(recipe.reduce))}
    for change in changes:
        path, equals, text = change.partition("=")
        *above, last = path.split(".")
        place: Any = content
        for key in above:
            place = place.get(key) if isinstance(place, dict) else None
        if not equals or not above or not isinstance(place, dict):
            raise SettingError(
                f"--set {change!r} names nothing in the recipe {recipe.name}; expected KEY.OPTION=VALUE with a KEY of "
                f"{', '.join(_keys(content))}"
            )
        if text:
            place[last] = yaml.safe_load(text)
        else:
            place.pop(last, None)
    return Recipe(
        **{**recipe.__dict__, **content, "reduce": [entry for entry in content["reduce"].values()]},
    )


def _keys(content: dict[str, Any]) -> list[str]:
    keys = []
    for key, value in content.items():
        if key in ("features", "reduce"):
            keys += [f"{key}.{inner}" for inner in value]
        elif value is not None:
            keys.append(key)
    return keys


# ---------------------------------------------------------------- commands


def commands_of(
    recipe: Recipe,
    out: Path,
    *,
    files: dict[str, Any],
    images: Path | None = None,
    device: str | None = None,
    steps: Sequence[str] = STEPS,
    features: Sequence[str] | None = None,
    overwrite: bool = False,
) -> list[list[str]]:
    """The command lines of a recipe, in order.

    Args:
        out: folder that gets the dataset's.
        files: options that name the sources, such as ``{"reviews": path, "meta": path}`` or ``{"download": True}``.
        images: a folder of pictures instead of a download.
        device: for encoders that take one.
        steps: of ``STEPS``, those wanted.
        features: of the recipe, those wanted; None makes all.
        overwrite: replace a folder that was prepared otherwise.

    Raises:
        SettingError: an unknown step or feature.
    """
    if foreign := [step for step in steps if step not in STEPS]:
        raise SettingError(f"no step {foreign[0]!r}, only {', '.join(STEPS)}")
    if foreign := [name for name in features or () if name not in recipe.features]:
        raise SettingError(f"the recipe {recipe.name} has no feature {foreign[0]!r}, only {', '.join(recipe.features)}")
    folder = str(Path(out) / recipe.name)
    prepare = dict(recipe.prepare)
    command, category = prepare.pop("command"), prepare.pop("category", None)
    files = dict(files)
    if files.pop("download", False):
        if category is None:
            raise SettingError(f"the recipe {recipe.name} names no category to download; give --reviews and --meta")
        files["download"] = category
    lines: dict[str, list[list[str]]] = {step: [] for step in STEPS}
    again = ["--overwrite"] if overwrite else ["--keep"]
    lines["prepare"] = [[command, "--name", recipe.name, "--out", str(out), *options({**files, **prepare}), *again]]
    if recipe.pictures is not None:
        local = {"images": images} if images is not None else {}
        lines["pictures"] = [["pictures", "--dataset", folder, *options({**recipe.pictures, **local})]]
    for name, wanted in recipe.features.items():
        if features is None or name in features:
            given = {"device": device, **wanted} if takes_device(name, wanted) else wanted
            lines["features"].append(["features", "--dataset", folder, "--feature", name, *options(given)])
    for wanted in recipe.reduce:
        lines["reduce"].append(["reduce", "--dataset", folder, *options(wanted)])
    lines["describe"] = [["describe", folder, "--card"]]
    lines["check"] = [["check", folder]]
    return [line for step in STEPS if step in steps for line in lines[step]]


def takes_device(feature: str, wanted: dict[str, Any]) -> bool:
    """Whether the encoder of a feature is one that runs on a device."""
    import inspect

    from dataset_prep.encoders import DEFAULT_ENCODERS, NEIGHBOURS, find_encoder

    name = wanted.get("encoder") or DEFAULT_ENCODERS.get(feature, NEIGHBOURS)
    return name != NEIGHBOURS and "device" in inspect.signature(find_encoder(name)).parameters


def options(given: dict[str, Any]) -> list[str]:
    """Settings as options of a command line: ``{"min_user": 5, "whiten": True}`` as ``--min-user 5 --whiten``.

    False and None give nothing, a list is parted by commas (paths by blanks), and the entries of a mapping are given
    one by one as ``--option key=value``, those below as JSON.
    """
    line: list[str] = []
    for key, value in given.items():
        name = "--" + key.replace("_", "-")
        if value is None or value is False:
            continue
        if value is True:
            line.append(name)
        elif isinstance(value, dict):
            for inner, inner_value in value.items():
                line += [name, f"{inner}={inner_value if isinstance(inner_value, str) else json.dumps(inner_value)}"]
        elif isinstance(value, (list, tuple)):
            several = any(isinstance(member, Path) for member in value)
            line += [name, *(map(str, value) if several else [",".join(map(str, value))])]
        else:
            line += [name, str(value)]
    return line


def run_recipe(lines: Sequence[Sequence[str]], run: Callable[[Sequence[str]], None]) -> None:
    """Run the commands one after the other, each shown before.

    Args:
        run: runs one command line; its errors end the recipe.
    """
    for number, line in enumerate(lines, start=1):
        print(f"[{number}/{len(lines)}] python -m dataset_prep {shlex.join(line)}", flush=True)
        run(line)


def compare(recipe: Recipe, folder: Path) -> str:
    """The figures of a folder beside the published ones, a line; says so if none can be compared.

    Raises:
        DatasetError: the folder cannot be read.
    """
    from dataset_prep.description import describe

    published = {key: recipe.expected[key] for key in COUNTED if key in recipe.expected}
    if not published:
        return f"{recipe.name}: no published figures to compare with"
    found = describe(folder)
    ours = {found.owner: len(found.lengths), "items": found.n_items, "interactions": found.n_interactions}
    if foreign := [key for key in published if key not in ours]:
        return f"{recipe.name}: figures of {foreign[0]} are published, but the folder holds {found.owner}"
    parts = []
    for key, value in published.items():
        parts.append(f"{key} {ours[key]:,} (published {value:,}, {ours[key] / value - 1:+.2%})")
    return f"{recipe.name}: {', '.join(parts)}; published by {recipe.expected.get('source', 'the paper')}"


def next_command(recipe: Recipe, out: Path) -> str:
    """The command line that runs a model on a prepared folder in ``out``.

    Raises:
        DatasetError: the folder cannot be read.
    """
    from dataset_prep.description import describe

    model = "MMSBR" if recipe.prepare.get("protocol") == "sessions" else "MSM4SR"
    dataset = recipe.name if out == Path("dataset") else out / recipe.name
    found = describe(out / recipe.name)
    lacking = any(feature.n_covered < found.n_items for feature in found.features.values())
    command = f"python run_recbole_mm.py --model={model} --dataset={dataset}"
    return command + " --missing_features=zero" * lacking  # pictures that are gone, and such
