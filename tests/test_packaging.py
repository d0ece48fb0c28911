"""Wheel, wheel from sdist, editable install and checkout: all find properties/ and the templates of the page."""

from __future__ import annotations

import configparser
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
FIND = """
from recbole_mm.paths import properties_dir
from recbole_mm.model import model_names
from recbole_mm.leaderboard.page import TEMPLATES
from dataset_prep.recipes import recipe_names
print(properties_dir(), model_names(), recipe_names(), (properties_dir() / "download" / "amazon.yaml").is_file())
print(sorted(file.name for file in TEMPLATES.iterdir()))
"""
FOUND = (
    "MSM4SR",
    "'Office'",
    " True",
    "['details.js', 'page.css', 'page.html', 'page.js', 'plots.js', 'table.js', 'text.js', 'view.js']",
)

# An editable install is found through a finder of its own, here before a package installed in the test's environment.
FIRST = """
sys.meta_path.sort(key=lambda finder: "Editable" not in getattr(finder, "__name__", ""))
"""


def test_setup_cfg_lists_every_package():
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    listed = set(setup["options"]["packages"].split())
    found = {
        ".".join(file.parent.relative_to(REPOSITORY).parts)
        for package in ("recbole_mm", "dataset_prep")
        for file in (REPOSITORY / package).rglob("__init__.py")
    }
    assert listed == found | {"recbole_mm.properties"}


def test_the_checkout_finds_its_properties():
    out = subprocess.run(
        [sys.executable, "-c", FIND], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    assert str(REPOSITORY / "properties") in out and all(found in out for found in FOUND)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git would track, so that building leaves nothing in the checkout."""
    import shutil

    copy = tmp_path_factory.mktemp("source") / "recbole_mm"
    wanted = (
        "setup.cfg",
        "pyproject.toml",
        "README.md",
        "run_recbole_mm.py",
        "recbole_mm",
        "properties",
        "dataset_prep",
    )
    copy.mkdir()
    for name in wanted:
        path = REPOSITORY / name
        if path.is_dir():
            shutil.copytree(path, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif path.exists():
            shutil.copy(path, copy / name)
    return copy


def installed(tmp_path: Path, *arguments: str) -> str:
    """Install without dependencies and without a network into a folder of its own; where it finds its properties."""
    target = tmp_path / "site"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        str(target),
    ]
    subprocess.run([*install, *arguments], check=True, capture_output=True)
    code = f"import site, sys; sys.path.insert(0, {str(target)!r}); site.addsitedir({str(target)!r}){FIRST}{FIND}"
    return subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout


def build(source: Path, kind: str, into: Path) -> Path:
    into.mkdir()
    code = f"import setuptools.build_meta as b; print(b.build_{kind}({str(into)!r}))"
    out = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=True).stdout
    return into / out.strip().splitlines()[-1]


@pytest.mark.slow
def test_a_wheel_and_one_built_from_an_sdist_find_their_properties(source, tmp_path):
    pytest.importorskip("setuptools")
    wheel = build(source, "wheel", tmp_path / "wheel")
    out = installed(tmp_path, str(wheel))
    assert str(tmp_path / "site" / "recbole_mm" / "properties") in out and all(found in out for found in FOUND)

    sdist = build(source, "sdist", tmp_path / "sdist")
    again = tmp_path / "again"
    again.mkdir()
    out = installed(again, str(sdist))
    assert str(again / "site" / "recbole_mm" / "properties") in out and all(found in out for found in FOUND)


@pytest.mark.slow
def test_an_editable_install_finds_its_properties(source, tmp_path):
    out = installed(tmp_path, str(build(source, "editable", tmp_path / "wheel")))
    assert str(source / "properties") in out and all(found in out for found in FOUND)
