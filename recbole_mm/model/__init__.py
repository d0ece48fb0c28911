"""Models: one file and one property file each. A model exists because ``properties/model/<Name>.yaml`` exists.

A model that derives from another one of ours inherits its settings too; its own file holds only what differs.
"""

from __future__ import annotations

import importlib
import inspect

from recbole_mm.errors import SettingError, nearest
from recbole_mm.paths import properties_dir

# RecBole's sequential models that predict something else, or from something else, than the next item from the history.
OTHER_TASKS = {
    "DIN": "it predicts clicks from labels",
    "DIEN": "it predicts clicks from labels",
    "GRU4RecKG": "it needs the vectors of a knowledge graph",
    "KSR": "it needs the vectors of a knowledge graph",
    "S3Rec": "it pre-trains in a trainer of its own; run it with RecBole",
}
ALIASES = {
    "MP4SR": "MSM4SR",  # the later name of the same model, in its second arXiv version
    "Pop": "Popularity",  # RecBole's name
    "ItemKNN": "SessionItemKNN",  # RecBole's name of a general model that does the same with users
}


def model_names() -> list[str]:
    """Names of our models."""
    return sorted(path.stem for path in (properties_dir() / "model").glob("*.yaml"))


def lineage(model_class: type) -> list[str]:
    """Our models among a class and its bases, the class itself last: each one's settings win over those before it."""
    ours = model_names()
    return [cls.__name__ for cls in reversed(model_class.__mro__) if cls.__name__ in ours]


def recbole_model_names() -> list[str]:
    """Names of RecBole's sequential models that run here."""
    return sorted(_recbole_models().keys() - OTHER_TASKS.keys())


def _recbole_models() -> dict[str, type]:
    from recbole.model import sequential_recommender
    from recbole.model.abstract_recommender import SequentialRecommender

    classes = inspect.getmembers(sequential_recommender, inspect.isclass)
    return {name: cls for name, cls in classes if issubclass(cls, SequentialRecommender)}


def find_model(name: str) -> type:
    """The model class of that name, ours or a sequential one of RecBole's; upper and lower case do not matter.

    Raises:
        SettingError: naming the nearest model and all there are.
    """
    ours = {known.lower(): known for known in model_names()}
    wanted = {alias.lower(): target for alias, target in ALIASES.items()}.get(name.lower(), name).lower()
    if wanted in ours:
        return getattr(importlib.import_module(f"recbole_mm.model.{wanted}"), ours[wanted])
    theirs = _recbole_models()
    for known, cls in theirs.items():
        if known.lower() == wanted:
            if known in OTHER_TASKS:
                raise SettingError(f"RecBole's {known} does not run here: {OTHER_TASKS[known]}")
            return cls
    raise SettingError(
        f"no model {name!r}{nearest(name, [*ours.values(), *ALIASES, *theirs])}\n"
        f"  recbole_mm has {', '.join(model_names())}; of RecBole's, {', '.join(recbole_model_names())}"
    )
