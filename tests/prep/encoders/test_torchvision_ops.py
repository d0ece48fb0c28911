"""torchvision beside a PyTorch without CUDA: importable in a new process, and left alone where it works."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from dataset_prep.encoders.torchvision_ops import mend_torchvision

ROOT = Path(__file__).parents[3]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("torchvision") is None, reason="torchvision is not installed")
def test_torchvision_can_be_imported_and_works_after_mending():
    out = run(
        "from dataset_prep.encoders.torchvision_ops import mend_torchvision\n"
        "mend_torchvision(); mend_torchvision()\n"
        "import torch, torchvision\n"
        "network = torchvision.models.squeezenet1_1(weights=None).eval()\n"
        "print(tuple(network(torch.zeros(1, 3, 64, 64)).shape))\n"
    )
    assert out == "(1, 1000)"


def test_without_torchvision_nothing_happens():
    out = run(
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torchvision': raise ModuleNotFoundError('No module', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from dataset_prep.encoders.torchvision_ops import mend_torchvision\n"
        "mend_torchvision()\n"
        "print('torch' in sys.modules, 'torchvision' in sys.modules)\n"
    )
    assert out == "False False"


def test_another_error_of_torchvision_is_not_hidden():
    code = (
        "import sys, types\n"
        "class Broken:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torchvision': raise {}\n"
        "sys.meta_path.insert(0, Broken())\n"
        "from dataset_prep.encoders.torchvision_ops import mend_torchvision\n"
        "try: mend_torchvision()\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    assert run(code.format("RuntimeError('out of memory')")) == "RuntimeError out of memory"
    assert run(code.format("ModuleNotFoundError('no numpy', name='numpy')")) == "ModuleNotFoundError no numpy"


def test_a_torchvision_that_is_loaded_is_left_as_it_is(monkeypatch):
    loaded = object()
    monkeypatch.setitem(sys.modules, "torchvision", loaded)
    mend_torchvision()
    assert sys.modules["torchvision"] is loaded
