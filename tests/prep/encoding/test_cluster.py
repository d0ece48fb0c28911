"""Shards on Ray: a cluster of this machine with two workers, and what Ray Data needs beside today's packages."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
from encoding_stubs import Crashing, Dying, Failing, Letters
from PIL import Image

from dataset_prep import features
from dataset_prep.encoders import build_encoder
from dataset_prep.encoding import cluster
from dataset_prep.encoding.engine import Running
from dataset_prep.features import make_feature
from recbole_mm.data.files import write_table
from recbole_mm.errors import SettingError

HERE = Path(__file__).resolve().parent


@pytest.fixture(autouse=True)
def _stubs_for_workers(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    monkeypatch.setattr(features, "TEXTS_AT_ONCE", 2)
    monkeypatch.setattr(features, "PICTURES_AT_ONCE", 3)


def shop(folder: Path, *, special: str = "x") -> Path:
    (folder / "images").mkdir(parents=True)
    tokens = [str(number) for number in range(9)]
    for token in tokens[:-1]:
        Image.new("RGB", (12, 12), (int(token) * 9, 50, 1)).save(folder / f"images/{token}.png")
    (folder / "images/3.png").write_bytes(b"no picture")
    texts = [f"{'ab' * int(token)} c {special if token == '3' else token}" for token in tokens]
    pictures = [f"images/{token}.png" for token in tokens]
    columns = {"item_id:token": tokens, "title:token_seq": texts, "image:token": pictures}
    write_table(folder / f"{folder.name}.item", columns)
    return folder


def made(folder: Path) -> dict[str, bytes]:
    places = [*(folder / "features").rglob("*"), folder / "manifest.json"]
    return {path.name: path.read_bytes() for path in places if path.is_file()}


@pytest.mark.slow
def test_two_workers_of_a_local_ray_give_the_same_bytes_as_threads(tmp_path):
    pytest.importorskip("ray")
    folders = [shop(tmp_path / name / "shop") for name in ("here", "ray")]
    for folder, running in zip(folders, (Running(), Running(ray="local", workers=2)), strict=True):
        make_feature(folder, "text", build=Letters, running=running, progress=False)
        build = partial(build_encoder, "histogram", feature="image", size=16)
        report = make_feature(folder, "image", build=build, running=running, progress=False)
        assert report.missing == {"picture not a picture": 1, "picture file missing": 1}
    assert made(folders[0]) == made(folders[1])


@pytest.mark.slow
def test_an_error_in_a_worker_arrives_here_and_a_worker_that_dies_is_replaced(tmp_path):
    ray = pytest.importorskip("ray")
    with pytest.raises(SettingError, match="wrong"):
        make_feature(
            shop(tmp_path / "a" / "shop"),
            "text",
            build=partial(Failing, error=SettingError, message="wrong"),
            running=Running(ray="local", workers=1),
            progress=False,
        )
    assert not ray.is_initialized()
    here, there = shop(tmp_path / "b" / "shop", special="die"), shop(tmp_path / "c" / "shop", special="die")
    build = partial(Dying, log=str(tmp_path / "deaths"))
    make_feature(there, "text", build=build, running=Running(ray="local", workers=1), progress=False)
    assert (tmp_path / "deaths").read_text() == "x"
    make_feature(here, "text", build=Letters, progress=False)
    assert made(here) == made(there)


@pytest.mark.slow
def test_a_picture_that_kills_the_worker_that_decodes_it_costs_itself_only(tmp_path):
    pytest.importorskip("ray")
    folder, build = shop(tmp_path / "shop"), partial(Crashing, red=5 * 9)
    running = Running(ray="local", workers=1)
    report = make_feature(folder, "image", build=build, running=running, progress=False)
    reasons = ["picture not a picture", "picture decoder crashed", "picture file missing"]
    assert report.missing == dict.fromkeys(reasons, 1) and report.examples["picture decoder crashed"] == "5"


@pytest.mark.slow
def test_an_address_without_a_cluster_is_refused(tmp_path):
    pytest.importorskip("ray")
    with pytest.raises(SettingError, match="cannot reach a Ray cluster at '127.0.0.1:1'"):
        running = Running(ray="127.0.0.1:1")
        make_feature(shop(tmp_path / "shop"), "text", build=Letters, running=running, progress=False)


def test_names_that_ray_data_imports_are_given_only_where_they_lack(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("pkg_resources")]:
        monkeypatch.delitem(sys.modules, name)
    package = ModuleType("pkg_resources")
    package.__path__ = []
    monkeypatch.setitem(sys.modules, "pkg_resources", package)
    arrow, formats = ModuleType("pyarrow"), ModuleType("pandas.io.formats.format")
    arrow.ExtensionType, formats._ExtensionArrayFormatter = object, int
    monkeypatch.setitem(sys.modules, "pyarrow", arrow)
    monkeypatch.setattr("pandas.io.formats.format", formats)
    cluster.mend_ray()
    from pkg_resources._vendor.packaging.version import parse

    assert parse("2.10") > parse("2.9")
    assert issubclass(arrow.PyExtensionType, object) and formats.ExtensionArrayFormatter is int
    mine = arrow.PyExtensionType
    cluster.mend_ray()
    assert arrow.PyExtensionType is mine
    for name in [name for name in sys.modules if name.startswith("pkg_resources")]:
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_workers_that_find_no_picture_file_say_so_themselves(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    source = cluster._Source({3: [str(tmp_path / "a"), str(tmp_path / "b")]}, "image")
    assert source.contents(3) == ([b"x", None], False)
    assert cluster._Source({3: ["text"]}, "text").contents(3) == (["text"], False)
