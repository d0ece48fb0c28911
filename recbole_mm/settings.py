"""Settings as people write them: on a command line, and in YAML files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from recbole_mm.errors import SettingError
from recbole_mm.model import find_model
from recbole_mm.registration import is_section


class _Loader(yaml.SafeLoader):
    """YAML without Python objects, in which 1e-4 is a number (plain YAML 1.1 asks for 1.0e-4)."""


# YAML 1.1 takes 1_0, 0b1, 007 and 10:20 for numbers; here they are text.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:int"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def parse_value(text: str) -> Any:
    """One setting as typed on a command line: YAML, Python's ``None``, or else the text itself, such as ``[5,inf)``."""
    if text in ("None", ""):
        return None
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        return text


def parse_arguments(arguments: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """``--key=value`` and ``--key value`` of a command line as settings, and where each came from, for messages.

    Raises:
        SettingError: something else, a key without value, or a key given twice with different values.
    """
    settings, origins = {}, {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        key, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not key:
            raise SettingError(f"cannot read the argument {argument!r}; settings look like --learning_rate=0.001")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise SettingError(f"--{key} has no value; settings look like --{key}=value")
            text = rest.pop(0)
        if key in settings and settings[key] != parse_value(text):
            raise SettingError(f"--{key} is given twice, as {settings[key]!r} and {text!r}")
        settings[key], origins[key] = parse_value(text), f"--{key}"
    return settings, origins


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a YAML file.

    Raises:
        SettingError: no such file, no YAML, or no mapping of keys to values.
    """
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise SettingError(f"cannot read the settings file {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingError(f"{path} is no plain YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise SettingError(f"{path} must hold lines like 'learning_rate: 0.001', found a {type(content).__name__}")
    return _with_proper_sections(content, path)


def _with_proper_sections(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """With the models' own names above their sections, ``MSM4SR: {epochs: 20}``."""
    named: dict[str, Any] = {}
    for key, value in content.items():
        if is_section(key, value):
            try:
                key = find_model(key).__name__
            except SettingError as error:
                raise SettingError(f"{path}: a section must have the name of a model: {error}") from error
        if key in named:
            raise SettingError(f"{path} has two sections for {key}; make them one")
        named[key] = value
    return named
