"""The property files: every key is read, every key that is read is there, every key says what it means."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import recbole
import yaml
from recbole.utils import training_arguments

from recbole_mm.model import find_model, lineage, model_names
from recbole_mm.paths import properties_dir
from recbole_mm.settings import read_settings

PACKAGE = Path(__file__).resolve().parents[1] / "recbole_mm"
STOCK = {
    *yaml.safe_load((Path(recbole.__file__).parent / "properties" / "overall.yaml").read_text()),
    *yaml.safe_load((Path(recbole.__file__).parent / "properties" / "dataset" / "sample.yaml").read_text()),
    *training_arguments,
}


def keys_read_in(path: Path) -> set[str]:
    """Every ``config["key"]`` of a source file."""
    keys = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if (
            isinstance(node, ast.Subscript)
            and isinstance(node.slice, ast.Constant)
            and isinstance(node.slice.value, str)
        ):
            if ast.unparse(node.value).endswith("config"):
                keys.add(node.slice.value)
    return keys


@pytest.mark.parametrize("name", model_names())
def test_a_model_s_property_file_has_the_keys_that_the_model_reads(name):
    overall = set(read_settings(properties_dir() / "overall.yaml"))
    base = keys_read_in(PACKAGE / "model" / "base.py")
    keys, read = set(), set()  # of the model and of those that it derives from
    for each in lineage(find_model(name)):
        keys |= read_settings(properties_dir() / "model" / f"{each}.yaml").keys()
        read |= keys_read_in(PACKAGE / "model" / f"{each.lower()}.py")
    assert read - keys - overall - STOCK - {"dataset"} == set(), "read, but in no property file"
    unread = {key for key in keys - read - base - STOCK if key.removeprefix("pretrain_") not in STOCK}
    assert unread - {"loss_type"} == set(), "in the property file, but read by nobody"


@pytest.mark.parametrize("name", [name for name in model_names() if len(lineage(find_model(name))) > 1])
def test_the_file_of_a_derived_model_holds_only_what_differs(name):
    *bases, own = [read_settings(properties_dir() / "model" / f"{each}.yaml") for each in lineage(find_model(name))]
    inherited = {key: value for base in bases for key, value in base.items()}
    assert [key for key, value in own.items() if key in inherited and inherited[key] == value] == []


def test_every_file_of_a_model_has_its_class():
    assert [find_model(name).__name__ for name in model_names()] == model_names()


@pytest.mark.parametrize("file", sorted(properties_dir().rglob("*.yaml")), ids=lambda path: path.name)
def test_every_setting_has_a_type_and_a_meaning(file):
    for line in file.read_text().splitlines():
        if re.match(r"^[A-Za-z]\w*:", line):
            assert re.search(r"# \((str|int|float|bool|list|dict|none)\) \S", line), f"{file.name}: {line}"


def test_no_setting_stands_in_two_places():
    overall = set(read_settings(properties_dir() / "overall.yaml"))
    for name in model_names():
        twice = overall & set(read_settings(properties_dir() / "model" / f"{name}.yaml"))
        assert twice <= STOCK, f"{name}.yaml repeats {sorted(twice - STOCK)} of overall.yaml"
