"""The papers' released checkpoints as checkpoints of ours: equal weights under our names give equal outputs.

    python -m recbole_mm.released --model MSM4SRReleased --dataset D --checkpoint plain.pth --out saved/released.pth

A checkpoint is read as tensors by name, never as code; `recbole_mm.released_weights` finds out which is which. The
order of the rows of tables comes from a file (--items), or from a folder made by ``python -m dataset_prep released``,
see `orders_of`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recbole_mm import checkpoint
from recbole_mm.config import Config
from recbole_mm.data.dataset import MultimodalDataset
from recbole_mm.data.files import read_table
from recbole_mm.data.layout import PADDING_TOKEN, RELEASED_COMMAND
from recbole_mm.errors import CheckpointError, DatasetError, RecBoleMMError, SettingError, exit_code_of
from recbole_mm.model import find_model, model_names
from recbole_mm.released_weights import Order, Report, import_released
from recbole_mm.settings import parse_arguments, read_settings

REMEDY = (
    "  RecBole pickles its Config into its checkpoints, which could run code when loaded\n"
    "  its owner, or who trusts it, takes the tensors out of it, where RecBole is installed:\n"
    "    import torch\n"
    '    torch.save(torch.load("{path}", weights_only=False)["state_dict"], "plain.pth")'
)


# ---------------------------------------------------------------- reading


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name: those of its ``state_dict``, or of the file itself if it is one.

    Raises:
        CheckpointError: no file, no tensors, or more in it than tensors and plain data, with the remedy.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint {path}")
    try:
        # torch.load under a name that stays while compat redirects the other one.
        content = torch.serialization.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen classes here, depending on the bytes it meets
        raise CheckpointError(
            f"{path} holds more than tensors and plain data, or is cut short "
            f"({type(error).__name__}: {str(error).partition(chr(10))[0]})\n{REMEDY.format(path=path)}"
        ) from error
    state = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(state, Mapping) or not any(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds no tensors by name, but a {type(state).__name__}")
    return dict(state)


def read_tokens(path: str | Path) -> list[str]:
    """Tokens of the rows of a table, one a line; a first line ``[PAD]`` stands for the padding row and is left out.

    Raises:
        DatasetError: no such file, or a token twice.
    """
    try:
        tokens = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DatasetError(f"cannot read the tokens in {path}: {error.strerror}") from error
    tokens = tokens[1:] if tokens[:1] == [PADDING_TOKEN] else tokens
    first = {token: line for line, token in reversed(list(enumerate(tokens)))}
    if twice := [token for line, token in enumerate(tokens) if first[token] != line]:
        raise DatasetError(f"{path} has a token twice, such as {twice[0]!r}; it must have one line per row")
    return tokens


# ---------------------------------------------------------------- command


def orders_of(data: MultimodalDataset) -> dict[str, Order]:
    """The rows of the released tables, as far as the folder of the data knows them.

    It does if it was made by ``python -m dataset_prep released``: items stand there in the release's order, and price
    levels and categories are its own numbers, 1..P. Empty if items are missing there, so that rows cannot be counted.
    """
    settings = data.manifest.settings
    if settings.get("made_by") != RELEASED_COMMAND or settings["counts"]["items_that_no_session_has"]:
        return {}
    table = read_table(data.folder / f"{data.folder.name}.item", needed=[data.iid_field, "price_level", "category"])
    orders = {"item": Order(table[data.iid_field].tolist(), data.field2id_token[data.iid_field])}
    for kind in ("price_level", "category"):
        numbers = sorted(set(map(int, table[kind])))
        if numbers == list(range(1, len(numbers) + 1)):
            orders[kind] = Order(
                [str(number) for number in numbers], [PADDING_TOKEN, *data.item_field(kind).tokens[1:]]
            )
    return orders


def import_checkpoint(
    model: str,
    dataset: str,
    file: str | Path,
    out: str | Path,
    *,
    names: Mapping[str, str | Sequence[str]] | None = None,
    items: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    origins: Mapping[str, str] | None = None,
) -> Report:
    """Import a released checkpoint for a dataset folder and save it in our format.

    A model with two stages is one of pre-training, or with ``items`` one of fine-tuning, unless ``settings`` say which.

    Args:
        items: file with the tokens of the released item ids, in their order; not needed where `orders_of` knows it.
        origins: where each of ``settings`` came from, for messages.

    Raises:
        SettingError, DatasetError, CheckpointError: see `import_released`.
    """
    model_class = find_model(model)
    if not hasattr(model_class, "released_names"):
        able = [name for name in model_names() if hasattr(find_model(name), "released_names")]
        raise SettingError(f"{model_class.__name__} reads no released checkpoint; {', '.join(able)} can")
    state = read_state(file)
    tokens = read_tokens(items) if items else None
    settings = dict(settings or {})
    if hasattr(model_class, "same_in_both_stages"):
        settings.setdefault("train_stage", "finetune" if tokens else "pretrain")
    config = Config(model_class, dataset, settings=settings, origins=origins)
    data = MultimodalDataset(config)
    net = config.model_class(config, data.build()[0])
    orders = orders_of(data) if "price_level" in model_class.released_rows.values() else {}  # of MMSBR's release
    if tokens:
        orders["item"] = Order(tokens, data.field2id_token[data.iid_field])
    report = import_released(net, state, names, orders=orders)
    config["feature_hashes"] = {name: data.feature_hash(name) for name in data.used_features()}
    config["feature_encoders"] = {name: data.encoder_of(name) for name in data.used_features()}
    config["field_hashes"] = {name: data.field_hash(name) for name in data.used_fields()}
    content = {"config": config, "epoch": -1, "cur_step": 0, "best_valid_score": 0.0, "optimizer": {}}
    content |= {"state_dict": net.state_dict(), "other_parameter": net.other_parameter()}
    checkpoint.save(out, content)
    return report


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m recbole_mm.released``; returns an exit code as `run_recbole_mm` does."""
    parser = argparse.ArgumentParser(
        prog="python -m recbole_mm.released", allow_abbrev=False,
        description="Make a checkpoint of ours from a released one; further --key=value are settings of the model.",
    )  # fmt: skip
    parser.add_argument("--model", required=True, help="such as MSM4SRReleased or UniSRec")
    parser.add_argument("--dataset", required=True, help="a folder below dataset/, or a path")
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="tensors by name, saved by torch.save")
    parser.add_argument("--out", required=True, metavar="FILE", help="where to save, such as saved/released.pth")
    parser.add_argument("--names", metavar="FILE", help="YAML, ours: theirs, for what stays ambiguous")
    parser.add_argument(
        "--items", metavar="FILE",
        help="tokens of the released item ids in their order, one a line; a folder made by python -m dataset_prep "
        "released knows them, and price levels and categories",
    )  # fmt: skip
    args, rest = parser.parse_known_args(argv)
    try:
        settings, origins = parse_arguments(rest)
        report = import_checkpoint(
            args.model,
            args.dataset,
            args.checkpoint,
            args.out,
            names=read_settings(Path(args.names)) if args.names else None,
            items=args.items,
            settings=settings,
            origins=origins,
        )
    except (RecBoleMMError, OSError) as error:
        return exit_code_of(error)
    print(f"{report}\nsaved {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
