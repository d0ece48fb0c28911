"""Arguments that a user gives an encoder by name: whether it has them, and whether their values are of its types."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from recbole_mm.errors import SettingError, nearest

KINDS = {  # what a value must be an instance of, and what to call it in a message
    str: (str, "a text"),
    Path: ((str, Path), "a text"),
    bool: (bool, "true or false"),
    int: (int, "a whole number"),
    float: ((int, float), "a number"),
    dict: (dict, "a mapping such as {model: path/to/model}"),
    Sequence: ((list, tuple), "a list"),
}


def check_options(options: dict[str, Any], takes: Callable, *, called: str, as_flags: bool = False) -> None:
    """Refuse what a class or function has no argument for.

    Args:
        options: its arguments by name.
        called: what the user calls it.
        as_flags: whether the arguments are given as ``--batch-size``; else they are named as they are.

    Raises:
        SettingError: an argument that it does not have, or a value of another type.
    """
    known = list(inspect.signature(takes).parameters)
    if foreign := [name for name in options if name not in known]:
        named = ", ".join("--" + name.replace("_", "-") if as_flags else name for name in foreign)
        near = nearest(foreign[0], known)
        raise SettingError(f"{called} has no option {named}; its settings are {known}{near}")
    hints = get_type_hints(takes.__init__ if inspect.isclass(takes) else takes)
    for name, value in options.items():
        _check(name, value, hints.get(name, Any), called)


def _check(name: str, value: Any, hint: Any, called: str) -> None:
    accepted = [get_origin(kind) or kind for kind in (get_args(hint) if isinstance(hint, UnionType) else (hint,))]
    kinds = [KINDS[kind] for kind in accepted if kind in KINDS]
    if not kinds or (value is None and NoneType in accepted):
        return
    is_bool = isinstance(value, bool)
    if not any(isinstance(value, kind) and (not is_bool or kind is bool) for kind, _ in kinds):
        expected = " or ".join(dict.fromkeys(words for _, words in kinds))
        raise SettingError(f"{name} of {called} is {value!r}, expected {expected}")
