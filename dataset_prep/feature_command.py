"""The command ``python -m dataset_prep features``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataset_prep.arguments import at_least_one, folder, names
from dataset_prep.card import refresh_card
from dataset_prep.encoders import KNOWN
from dataset_prep.encoding.engine import Running
from dataset_prep.encoding.stopping import stoppable
from recbole_mm.errors import SettingError

if TYPE_CHECKING:
    from dataset_prep.features import FeatureReport

# Options of one kind of feature; with the other kind they would be ignored.
KIND_OPTIONS = {
    "text": ("columns", "rows", "max_rows"),
    "image": ("column", "images", "per_item"),
    "features": ("neighbours", "by"),
}
# Arguments of encoders that have a flag of their own: flag, type, help. Others are given with --option.
ENCODER_OPTIONS = (
    ("model", str, "folder, file or hub name of the model"),
    ("revision", str, "branch, tag or commit on the hub"),
    ("pretrained", str, "clip: weights of an open_clip model, a tag or a file"),
    ("network", str, "torchvision, class_names: name of the network (googlenet)"),
    ("weights", str, "torchvision, class_names: file of weights"),
    ("layer", str, "torchvision: layer whose output is taken"),
    ("pooling", str, "bert: pooler, cls or mean"),
    ("labels", str, "class_names: file of class names, a line each"),
    ("n_classes", at_least_one, "class_names: names per picture (2)"),
    ("vocabulary", str, "clip_words: file of words, a line each (frequent words of the items' texts)"),
    ("n_words", at_least_one, "clip_words: words per picture (15)"),
    ("image_token_mode", str, "clip_words: concat or per_word"),
    ("template", str, 'clip_words: what CLIP reads of a word, such as "a photo of a {}"'),
    ("text_encoder", str, "clip_words, class_names: encoder of the words (sentence)"),
    ("image_encoder", str, "generated: encoder of the drawings (histogram)"),
    ("width", int, "tfidf: largest width (256)"),
    ("precision", str, "auto, float32, float16 or bfloat16"),
    ("batch_size", int, "texts or pictures at a time"),
    ("device", str, "such as cpu or cuda:0 (a GPU if there is one)"),
)
FLAGS = {"n_classes": ("--n-classes", "--top-k")}
RUN_OPTIONS = ("workers", "processes", "ray")
WORDS_ENCODER = "clip_words"
VOCABULARY = "features/.vocabulary/words.txt"
EXAMPLES = """examples:
  python -m dataset_prep features --dataset dataset/shop --feature text --columns title,description --rows item
  python -m dataset_prep features --dataset dataset/shop --feature text --encoder sentence --model path/to/model
  python -m dataset_prep features --dataset dataset/shop --feature text --encoder bert --model bert --pooling cls
  python -m dataset_prep features --dataset dataset/shop --feature text_from_image --encoder class_names
      --model mobilenet.onnx --labels labels.txt --top-k 2 --option "text_options={model: path/to/model}"
  python -m dataset_prep features --dataset dataset/shop --feature image_from_text --encoder generated
      --model path/to/pipeline --image-encoder torchvision
  python -m dataset_prep features --dataset dataset/shop --feature image --images path/to/pictures
  python -m dataset_prep features --dataset dataset/shop --feature image --encoder onnx --model mobilenet.onnx
  python -m dataset_prep features --dataset dataset/shop --feature image --encoder torchvision --network googlenet
  python -m dataset_prep features --dataset dataset/shop --feature image --encoder clip --per-item 3 --device cuda:0
  python -m dataset_prep features --dataset dataset/shop --feature image_from_text --encoder clip_text --rows item
  python -m dataset_prep features --dataset dataset/shop --feature image --encoder clip_words --vocabulary words.txt
      --n-words 15 --image-token-mode per_word --text-encoder sentence --option "clip={model: path/to/clip}"
  python -m dataset_prep features --dataset dataset/shop --feature image --vectors clip.npy --zero-is-missing
  python -m dataset_prep features --dataset dataset/shop --feature image --vectors all.npy --vectors-items all.item
  python -m dataset_prep features --dataset dataset/shop --feature image_from_text --encoder neighbours
  python -m dataset_prep features --dataset dataset/shop --feature image_from_text --encoder neighbours
      --by clip_text,clip_image
  python -m dataset_prep features --dataset dataset/shop --feature text --encoder sentence --processes 4
  python -m dataset_prep features --dataset dataset/shop --feature text --encoder sentence --ray auto --workers 16

shop.item is a RecBole atomic file: a header such as item_id:token<TAB>title:token_seq<TAB>image:token, an item a line.
Items without content get no row; the models' setting missing_features says what to do about them.

A run that was stopped, killed or ran out of disk is continued by the same command, and ends with the same bytes. A
feature is left alone while model, options and contents are the same. Threads, processes and clusters give the same
bytes; another --batch-size or --device may round differently.
"""


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add ``features`` to the commands of ``python -m dataset_prep``."""
    parser = features = commands.add_parser(
        "features",
        help="make one feature of a folder's items",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    features.add_argument("--dataset", type=folder, required=True, metavar="FOLDER", help="holds <its name>.item")
    features.add_argument("--feature", required=True, metavar="NAME", help="what models call it: text, image, ...")
    features.add_argument(
        "--encoder",
        metavar="NAME",
        help=f"{', '.join(KNOWN)} or neighbours; without it: tfidf for text, histogram for image, neighbours for "
        "image_from_text and the like",
    )
    features.add_argument(
        "--columns", type=names, metavar="A,B", help="text columns (title, brand, category, categories, description)"
    )
    features.add_argument("--rows", choices=("sentence", "item"), help="a vector per sentence (default), or one")
    features.add_argument("--max-rows", type=at_least_one, metavar="N", help="sentences of an item that count (10)")
    features.add_argument("--column", help="column with the picture's path (image, if there is no pictures/index.tsv)")
    features.add_argument("--images", type=Path, metavar="DIR", help="where these paths start (the dataset's folder)")
    features.add_argument("--per-item", type=at_least_one, metavar="N", help="pictures of an item that count (1)")
    features.add_argument(
        "--neighbours", type=at_least_one, metavar="K", help="neighbours: items to average (5; 1 with --by)"
    )
    features.add_argument(
        "--by",
        type=names,
        metavar="A,B",
        help="neighbours: compare A of an item with B of others (clip_text,clip_image)",
    )
    features.add_argument("--force", action="store_true", help="make it again, even if nothing has changed")
    encoders = features.add_argument_group("options of encoders")
    for name, kind, text in ENCODER_OPTIONS:
        flags = FLAGS.get(name, (_flag(name),))
        encoders.add_argument(
            *flags, dest=name, type=kind, metavar="N" if kind in (int, at_least_one) else "X", help=text
        )
    encoders.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="any other argument of the encoder, in YAML"
    )
    run = features.add_argument_group("how it runs")
    run.add_argument("--workers", type=at_least_one, metavar="N", help="threads (one per core; one on a GPU)")
    run.add_argument("--processes", type=at_least_one, metavar="N", help="processes with an encoder each, not threads")
    run.add_argument(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="run on a Ray cluster, with --workers actors; without an address, one that is started on this machine",
    )
    features = features.add_argument_group("vectors made elsewhere")
    features.add_argument(
        "--vectors", type=Path, metavar="FILE.npy", help="take vectors made elsewhere, a row per row of .item"
    )
    features.add_argument(
        "--vectors-items", type=Path, metavar="FILE", help="with --vectors: whose rows, a token a line or another .item"
    )
    features.add_argument("--zero-is-missing", action="store_true", help="with --vectors: a zero row is no content")
    parser.set_defaults(run=_run)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _run(options: argparse.Namespace) -> None:
    from dataset_prep.locking import locked

    with locked(options.dataset) if options.dataset.is_dir() else nullcontext():
        report = _make(options)
        print(report)
        if not report.up_to_date:
            refresh_card(options.dataset)


def _make(options: argparse.Namespace) -> FeatureReport:
    from dataset_prep.encoders import build_encoder
    from dataset_prep.encoders.words import build_vocabulary
    from dataset_prep.features import import_vectors, make_feature
    from dataset_prep.pseudo import ENCODER, is_pseudo, make_pseudo_feature

    if options.vectors is not None:
        if options.encoder is not None:
            raise SettingError("--vectors brings vectors made elsewhere, --encoder makes them; give one of the two")
        foreign = [*RUN_OPTIONS, *(name for kind in KIND_OPTIONS.values() for name in kind)]
        _refuse(options, foreign, "--vectors, which are made already")
        return import_vectors(
            options.dataset,
            options.feature,
            file=options.vectors,
            vector_items=options.vectors_items,
            zero_is_missing=options.zero_is_missing,
        )
    if options.zero_is_missing or options.vectors_items is not None:
        given = "--zero-is-missing" if options.zero_is_missing else "--vectors-items"
        raise SettingError(f"{given} belongs to --vectors FILE.npy")
    own = encoder_options(options)
    if options.encoder == ENCODER or (options.encoder is None and is_pseudo(options.feature)):
        foreign = [*KIND_OPTIONS["text"], *KIND_OPTIONS["image"], *RUN_OPTIONS, *own]
        _refuse(options, foreign, f"the encoder {ENCODER}, which reads features")
        return make_pseudo_feature(options.dataset, options.feature, neighbours=options.neighbours, by=options.by)
    if options.encoder == WORDS_ENCODER and "vocabulary" not in own:
        own["vocabulary"] = str(build_vocabulary(options.dataset, out=options.dataset / VOCABULARY))
    build = partial(build_encoder, options.encoder, feature=options.feature, **own)
    encoder = build()
    other = "image" if encoder.source == "text" else "text"
    foreign = [*KIND_OPTIONS[other], *KIND_OPTIONS["features"]]
    _refuse(options, foreign, f"the encoder {encoder.name}, which reads {encoder.source}")
    given = {name: getattr(options, name) for name in KIND_OPTIONS[encoder.source]}
    given = {name: value for name, value in given.items() if value is not None}
    running = Running(
        workers=options.workers, processes=options.processes or 0, ray=options.ray, batch_size=own.get("batch_size")
    )
    given |= {"encoder": encoder, "build": build, "running": running, "force": options.force}
    try:
        with stoppable():
            return make_feature(options.dataset, options.feature, **given)
    except KeyboardInterrupt:
        print(
            f"feature {options.feature!r}: stopped; what is finished is kept, and the same command continues",
            file=sys.stderr,
        )
        raise


def encoder_options(options: argparse.Namespace) -> dict[str, Any]:
    """The constructor arguments of an encoder that a command line gives, by their flags and by ``--option``.

    Raises:
        SettingError: an ``--option`` that is no KEY=VALUE, whose value is no YAML, or that is given twice.
    """
    import yaml

    given = {name: getattr(options, name) for name, *_ in ENCODER_OPTIONS}
    given = {name: value for name, value in given.items() if value is not None}
    for option in options.option:
        key, equals, value = option.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key.isidentifier():
            raise SettingError(f"--option is {option!r}, expected KEY=VALUE, such as --option max_length=128")
        if key in given:
            raise SettingError(f"--option {key} is given twice, or beside {_flag(key)}; give it once")
        try:
            given[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise SettingError(
                f"--option {key}: {value!r} is no value in YAML ({str(error).splitlines()[0]})"
            ) from error
    return given


def _refuse(options: argparse.Namespace, names: Sequence[str], why: str) -> None:
    for name in names:
        if getattr(options, name, name) is not None:
            raise SettingError(f"{_flag(name)} does not go with {why}; leave it out")
