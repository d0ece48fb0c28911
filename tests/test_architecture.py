"""Who may import whom: layers know nothing of models, preparation and models share the folder's layout alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
OURS = ("recbole_mm", "dataset_prep", "run_recbole_mm", "benchmarks", "tests")
# Module -> what it may import of this project; a package stands for all that is in it.
MAY_IMPORT = {
    "recbole_mm": ("recbole_mm.compat", "recbole_mm.registration", "recbole_mm.version"),
    "recbole_mm.version": (),
    "recbole_mm.errors": (),
    "recbole_mm.paths": (),
    "recbole_mm.ragged": (),
    "recbole_mm.data": (),
    "recbole_mm.data.files": ("recbole_mm.errors",),
    "recbole_mm.data.layout": ("recbole_mm.errors", "recbole_mm.data.files"),
    "recbole_mm.records": ("recbole_mm.data.files", "recbole_mm.errors"),
    "recbole_mm.checkpoint": ("recbole_mm.errors", "recbole_mm.data.files"),
    "recbole_mm.data.reading": ("recbole_mm.errors", "recbole_mm.data.files", "recbole_mm.data.layout"),
    "recbole_mm.compat": ("recbole_mm.compat", "recbole_mm.checkpoint", "recbole_mm.data.reading"),
    "recbole_mm.data.knockout": ("recbole_mm.errors", "recbole_mm.ragged"),
    "recbole_mm.data.cuts": ("recbole_mm.errors",),
    "recbole_mm.data.protocols": ("recbole_mm.data.cuts", "recbole_mm.errors"),
    "recbole_mm.data.items": (
        "recbole_mm.data.files",
        "recbole_mm.data.knockout",
        "recbole_mm.data.layout",
        "recbole_mm.errors",
        "recbole_mm.ragged",
    ),
    "recbole_mm.data.histories": (),
    "recbole_mm.data.loading": (),
    "recbole_mm.data.dataset": (
        "recbole_mm.data.files",
        "recbole_mm.data.histories",
        "recbole_mm.data.items",
        "recbole_mm.data.layout",
        "recbole_mm.data.protocols",
        "recbole_mm.data.reading",
        "recbole_mm.errors",
    ),
    "recbole_mm.model": ("recbole_mm.errors", "recbole_mm.paths"),
    "recbole_mm.registration": ("recbole_mm.compat", "recbole_mm.model", "recbole_mm.paths"),
    "recbole_mm.model.layers": ("recbole_mm.ragged",),
    "recbole_mm.model.workers": (),
    "recbole_mm.model.losses": ("recbole_mm.model.workers",),
    "recbole_mm.model.pivots": ("recbole_mm.model.workers",),
    "recbole_mm.model.together": (),
    "recbole_mm.model.sampling": (),
    "recbole_mm.model.softmax": ("recbole_mm.errors", "recbole_mm.model.layers"),
    "recbole_mm.model.wasserstein": ("recbole_mm.model.layers",),
    "recbole_mm.model.whitening": ("recbole_mm.model.layers",),
    "recbole_mm.data.passes": ("recbole_mm.data.histories", "recbole_mm.ragged"),
    "recbole_mm.model.positions": ("recbole_mm.data.passes", "recbole_mm.errors", "recbole_mm.model.layers"),
    "recbole_mm.model.base": (
        "recbole_mm.data.protocols",
        "recbole_mm.errors",
        "recbole_mm.model.layers",
        "recbole_mm.model.positions",
        "recbole_mm.model.sampling",
        "recbole_mm.model.softmax",
        "recbole_mm.model.together",
    ),
    "recbole_mm.model.counting": ("recbole_mm.data.histories", "recbole_mm.errors", "recbole_mm.model.base"),
    "recbole_mm.ranges": ("recbole_mm.errors",),
    "recbole_mm.settings": ("recbole_mm.errors", "recbole_mm.model", "recbole_mm.registration"),
    "recbole_mm.config": (
        "recbole_mm.checkpoint",
        "recbole_mm.data.files",
        "recbole_mm.data.layout",
        "recbole_mm.data.protocols",
        "recbole_mm.distributed",
        "recbole_mm.errors",
        "recbole_mm.model",
        "recbole_mm.model.positions",
        "recbole_mm.model.softmax",
        "recbole_mm.paths",
        "recbole_mm.ranges",
        "recbole_mm.records",
        "recbole_mm.registration",
        "recbole_mm.settings",
    ),
    "recbole_mm.plan": (
        "recbole_mm.checkpoint",
        "recbole_mm.config",
        "recbole_mm.data.files",
        "recbole_mm.data.knockout",
        "recbole_mm.data.layout",
        "recbole_mm.data.protocols",
        "recbole_mm.errors",
        "recbole_mm.model",
        "recbole_mm.records",
        "recbole_mm.registration",
        "recbole_mm.settings",
    ),
    "recbole_mm.product": (
        "recbole_mm.errors",
        "recbole_mm.leaderboard.board",
        "recbole_mm.leaderboard.tables",
        "recbole_mm.plan",
        "recbole_mm.records",
        "recbole_mm.runner",
    ),
    "recbole_mm.runner": (
        "recbole_mm.data.files",
        "recbole_mm.errors",
        "recbole_mm.plan",
        "recbole_mm.quick_start",
        "recbole_mm.records",
    ),
    "recbole_mm.slices": ("recbole_mm.data.files", "recbole_mm.errors", "recbole_mm.model.counting"),
    "recbole_mm.distributed": ("recbole_mm.errors",),
    "recbole_mm.shared_training": (
        "recbole_mm.data.passes",
        "recbole_mm.distributed",
        "recbole_mm.errors",
        "recbole_mm.model.together",
    ),
    "recbole_mm.ranking": ("recbole_mm.errors",),
    "recbole_mm.evaluation": (
        "recbole_mm.checkpoint",
        "recbole_mm.distributed",
        "recbole_mm.profiling",
        "recbole_mm.ranking",
        "recbole_mm.records",
        "recbole_mm.slices",
    ),
    "recbole_mm.precision": ("recbole_mm.errors",),
    "recbole_mm.compiling": (),
    "recbole_mm.profiling": ("recbole_mm.data.files",),
    "recbole_mm.optimizer": ("recbole_mm.errors",),
    "recbole_mm.trainer": (
        "recbole_mm.checkpoint",
        "recbole_mm.compiling",
        "recbole_mm.config",
        "recbole_mm.data.passes",
        "recbole_mm.distributed",
        "recbole_mm.errors",
        "recbole_mm.evaluation",
        "recbole_mm.model.positions",
        "recbole_mm.precision",
        "recbole_mm.profiling",
        "recbole_mm.shared_training",
        "recbole_mm.optimizer",
    ),
    "recbole_mm.released": (
        "recbole_mm.checkpoint",
        "recbole_mm.config",
        "recbole_mm.data.dataset",
        "recbole_mm.data.files",
        "recbole_mm.data.layout",
        "recbole_mm.errors",
        "recbole_mm.model",
        "recbole_mm.released_weights",
        "recbole_mm.settings",
    ),
    "recbole_mm.released_weights": ("recbole_mm.data.layout", "recbole_mm.errors"),
    "recbole_mm.leaderboard": (),
    "recbole_mm.leaderboard.statistics": ("recbole_mm.errors", "recbole_mm.records"),
    "recbole_mm.leaderboard.wording": (),
    "recbole_mm.leaderboard.rows": (
        "recbole_mm.errors",
        "recbole_mm.leaderboard.statistics",
        "recbole_mm.leaderboard.wording",
        "recbole_mm.records",
    ),
    "recbole_mm.leaderboard.plain": (
        "recbole_mm.leaderboard.rows",
        "recbole_mm.leaderboard.wording",
        "recbole_mm.records",
    ),
    "recbole_mm.leaderboard.comparing": (
        "recbole_mm.errors",
        "recbole_mm.leaderboard",
        "recbole_mm.leaderboard.plain",
        "recbole_mm.leaderboard.rows",
        "recbole_mm.leaderboard.statistics",
        "recbole_mm.leaderboard.wording",
    ),
    "recbole_mm.leaderboard.board": (
        "recbole_mm.data.protocols",
        "recbole_mm.errors",
        "recbole_mm.leaderboard",
        "recbole_mm.leaderboard.comparing",
        "recbole_mm.leaderboard.plain",
        "recbole_mm.leaderboard.rows",
        "recbole_mm.leaderboard.statistics",
        "recbole_mm.leaderboard.wording",
        "recbole_mm.paths",
        "recbole_mm.records",
        "recbole_mm.version",
    ),
    "recbole_mm.leaderboard.cells": ("recbole_mm.leaderboard.wording",),
    "recbole_mm.leaderboard.markdown": ("recbole_mm.leaderboard.cells", "recbole_mm.leaderboard.wording"),
    "recbole_mm.leaderboard.latex": ("recbole_mm.leaderboard.cells", "recbole_mm.leaderboard.wording"),
    "recbole_mm.leaderboard.tables": (
        "recbole_mm.data.files",
        "recbole_mm.leaderboard.cells",
        "recbole_mm.leaderboard.latex",
        "recbole_mm.leaderboard.markdown",
        "recbole_mm.leaderboard.wording",
    ),
    "recbole_mm.leaderboard.page": ("recbole_mm.data.files", "recbole_mm.leaderboard.wording"),
    "recbole_mm.leaderboard.__main__": (
        "recbole_mm.errors",
        "recbole_mm.leaderboard.board",
        "recbole_mm.leaderboard.page",
        "recbole_mm.leaderboard.tables",
        "recbole_mm.records",
    ),
    "recbole_mm.allocation": (),
    "recbole_mm.session_graphs": (),
    "recbole_mm.trimming": ("recbole_mm.model.layers", "recbole_mm.model.positions"),
    "recbole_mm.resuming": ("recbole_mm.checkpoint", "recbole_mm.config", "recbole_mm.errors", "recbole_mm.model"),
    "recbole_mm.quick_start": ("recbole_mm",),
    "run_recbole_mm": (
        "recbole_mm.config",
        "recbole_mm.distributed",
        "recbole_mm.errors",
        "recbole_mm.model",
        "recbole_mm.product",
        "recbole_mm.quick_start",
        "recbole_mm.records",
        "recbole_mm.search",
        "recbole_mm.settings",
    ),
    "recbole_mm.search": (
        "recbole_mm.config",
        "recbole_mm.data.layout",
        "recbole_mm.errors",
        "recbole_mm.plan",
        "recbole_mm.records",
        "recbole_mm.runner",
        "recbole_mm.search_space",
    ),
    "recbole_mm.search_space": (
        "recbole_mm.config",
        "recbole_mm.errors",
        "recbole_mm.model",
        "recbole_mm.paths",
        "recbole_mm.plan",
        "recbole_mm.records",
        "recbole_mm.registration",
        "recbole_mm.settings",
    ),
    "recbole_mm.verify": ("recbole_mm",),
}
MODEL = (
    "recbole_mm.errors",
    "recbole_mm.model.base",
    "recbole_mm.model.counting",
    "recbole_mm.model.layers",
    "recbole_mm.model.losses",
    "recbole_mm.model.pivots",
    "recbole_mm.model.together",
    "recbole_mm.model.wasserstein",
    "recbole_mm.model.whitening",
    "recbole_mm.ragged",
)
PREPARATION = (
    "recbole_mm.data.cuts",
    "recbole_mm.data.files",
    "recbole_mm.data.layout",
    "recbole_mm.errors",
    "recbole_mm.paths",
    "dataset_prep",
)


def modules() -> list[str]:
    files = [*(REPOSITORY / "recbole_mm").rglob("*.py"), *(REPOSITORY / "dataset_prep").rglob("*.py")]
    names = [".".join(file.relative_to(REPOSITORY).with_suffix("").parts) for file in files]
    return sorted([*(name.removesuffix(".__init__") for name in names), "run_recbole_mm"])


def imports_of(module: str) -> set[str]:
    path = REPOSITORY.joinpath(*module.split("."))
    path = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & set(modules())
            found |= submodules or {node.module}
    return {name for name in found if name.split(".")[0] in OURS}


@pytest.mark.parametrize("module", modules())
def test_imports_point_downwards(module):
    if module.startswith("dataset_prep"):
        allowed = PREPARATION
    else:
        allowed = MAY_IMPORT.get(module, MODEL)
        if module.startswith("recbole_mm.model.") and module.endswith("released"):  # derives from the model itself
            allowed += (module.removesuffix("released"),)
    packages = tuple(f"{name}." for name in allowed if name in ("recbole_mm", "dataset_prep"))
    wrong = [name for name in imports_of(module) if name not in allowed and not name.startswith(packages)]
    assert wrong == [], f"{module} must not import {wrong}"


@pytest.mark.slow
def test_a_run_imports_neither_ray_nor_recbole_s_quick_start():
    code = "import sys, recbole_mm.quick_start; print({'ray', 'recbole.quick_start'} & set(sys.modules) or 'neither')"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert out.stdout.strip() == "neither"


def test_the_package_itself_imports_nothing_heavy():
    heavy = ("torch", "recbole", "ray", "pandas")
    code = f"import sys, recbole_mm, recbole_mm.data.layout; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert out.stdout.strip() == "[]"
