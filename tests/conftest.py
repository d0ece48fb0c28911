"""A small prepared folder with known structure, and a working directory of its own for every test."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path

# Tests are many small operations; runs side by side, and processes that they start, should not slow each other down.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

from recbole_mm.data.files import write_table  # noqa: E402
from recbole_mm.data.layout import write_feature  # noqa: E402

TINY = {  # settings of a run that takes a second or two
    "MAX_ITEM_LIST_LENGTH": 10, "train_batch_size": 64, "eval_batch_size": 64, "hidden_size": 16, "inner_size": 32,
    "topk": [5, 10], "valid_metric": "Recall@10", "epochs": 2, "show_progress": False, "use_gpu": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RecBole writes log/, log_tensorboard/ and saved/ into the working directory."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def write_planted(
    folder: Path,
    *,
    n_items: int = 30,
    n_users: int = 60,
    n_groups: int = 3,
    length: int = 8,
    seed: int = 0,
    image: bool = True,
) -> Path:
    """Items form hidden groups that only the features reveal; a history stays inside one group.

    Text has one to three vectors per item, pictures one. Item tokens are not in order, and not numbered from 1.
    """
    random = np.random.default_rng(seed)
    tokens = [f"i{number}" for number in random.permutation(n_items) + 100]
    groups = np.arange(n_items) % n_groups
    rows = []
    for user in range(n_users):
        items = random.choice(np.flatnonzero(groups == user % n_groups), size=length, replace=False)
        rows += [(f"u{user}", tokens[item], 1_600_000_000 + 1000 * user + 10 * step) for step, item in enumerate(items)]
    users, items, times = zip(*rows, strict=True)
    write_table(
        folder / f"{folder.name}.inter",
        {"user_id:token": users, "item_id:token": items, "timestamp:float": [float(time) for time in times]},
    )
    write_table(
        folder / f"{folder.name}.item",
        {
            "item_id:token": tokens,
            "title:token_seq": [f"thing {token}" for token in tokens],
            "categories:token_seq": [f"c{group} all" for group in groups],
            "price:float": [float(group) for group in groups],
        },
    )
    centre = random.normal(size=(n_groups, 12)).astype(np.float32)
    counts = random.integers(1, 4, size=n_items)
    noise = random.normal(scale=0.3, size=(int(counts.sum()), 12)).astype(np.float32)
    text = np.repeat(centre[groups], counts, axis=0) + noise
    made = {"encoder": "planted", "source": "group"}
    write_feature(folder, "text", tokens=tokens, rows=text, counts=counts, **made)
    if image:
        picture = centre[groups] + random.normal(scale=0.3, size=(n_items, 12)).astype(np.float32)
        write_feature(folder, "image", tokens=tokens[::-1], rows=picture[::-1], **made)
    return folder


def write_splits(folder: Path, *, n_items: int = 30, n_sessions: int = 120, seed: int = 0) -> Path:
    """The same kind of data, already split: one row per session prefix."""
    random = np.random.default_rng(seed)
    tokens = [f"i{number}" for number in range(n_items)]
    for part, n_rows in (("train", n_sessions), ("valid", n_sessions // 4), ("test", n_sessions // 4)):
        prefixes, targets = [], []
        for row in range(n_rows):
            group = np.flatnonzero(np.arange(n_items) % 3 == row % 3)
            *prefix, target = random.choice(group, size=random.integers(2, 7), replace=False)
            prefixes.append(" ".join(tokens[item] for item in prefix))
            targets.append(tokens[target])
        columns = {"session_id:token": [f"{part}{row}" for row in range(n_rows)], "item_id_list:token_seq": prefixes}
        write_table(folder / f"{folder.name}.{part}.inter", {**columns, "item_id:token": targets})
    centre = random.normal(size=(3, 12)).astype(np.float32)[np.arange(n_items) % 3]
    for name in ("text", "image"):
        rows = centre + random.normal(scale=0.3, size=centre.shape).astype(np.float32)
        write_feature(folder, name, tokens=tokens, rows=rows, encoder="planted", source="group")
    return folder


@pytest.fixture
def quick_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """`distributed.launch` takes copies of a process that has imported the package, where the system can do that.

    What they write would go where the first test with this fixture wrote; see `write_errors_to`.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return
    context = multiprocessing.get_context("forkserver")
    optimizers_import, trainers_import = "torch._dynamo", "torch.utils.tensorboard"
    context.set_forkserver_preload(["recbole_mm.quick_start", optimizers_import, trainers_import])
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]))
        forkserver.ensure_running()
    monkeypatch.setattr("recbole_mm.distributed.multiprocessing.get_context", lambda method: context)


def write_errors_to(file: str) -> None:
    """Of this process, a started one: what it writes to standard error goes to the end of a file."""
    with open(file, "a") as out:
        os.dup2(out.fileno(), 2)


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """``dataset/planted`` below the test's own working directory."""
    return write_planted(tmp_path / "dataset" / "planted")


@pytest.fixture
def splits(tmp_path: Path) -> Path:
    return write_splits(tmp_path / "dataset" / "splits")


@pytest.fixture
def built() -> Callable:
    """``built(model, folder, **settings)`` -> config, dataset, train, valid, test, model."""

    def build(model: str, folder: Path, **settings):
        from recbole.data import data_preparation
        from recbole.utils import init_seed

        from recbole_mm.config import Config
        from recbole_mm.data.dataset import MultimodalDataset

        config = Config(model, str(folder), settings=_known(model, {**TINY, **settings}))
        init_seed(config["seed"], config["reproducibility"])
        dataset = MultimodalDataset(config)
        train, valid, test = data_preparation(config, dataset)
        init_seed(config["seed"], config["reproducibility"])
        return config, dataset, train, valid, test, config.model_class(config, train._dataset)

    return build


def _known(model: str, settings: dict) -> dict:
    """Without the widths that this model does not have."""
    import recbole

    from recbole_mm.model import find_model, lineage
    from recbole_mm.registration import default_files

    cls = find_model(model)
    theirs = Path(recbole.__file__).parent / "properties" / "model" / f"{cls.__name__}.yaml"
    text = "".join(file.read_text() for file in (default_files(cls) if lineage(cls) else [theirs]))
    return {
        key: value for key, value in settings.items() if key not in ("hidden_size", "inner_size") or f"{key}:" in text
    }
