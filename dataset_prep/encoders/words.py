"""Pictures as words: CLIP picks the words of a vocabulary that fit a picture best, a text encoder encodes them.

Source: MSM4SR: a word w scores cosine(CLIP(picture), CLIP(w)); the N best words stand for the picture and go through
the same sentence encoder as the item's text.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dataset_prep.encoders.clip import ClipModel
from dataset_prep.encoders.inner import build_text_encoder, with_defaults
from dataset_prep.text import clean_text
from recbole_mm.data.files import read_header, read_table, write_atomically
from recbole_mm.errors import DatasetError, SettingError

if TYPE_CHECKING:
    from PIL.Image import Image

TOKEN_MODES = ("concat", "per_word")
VOCABULARY = "vocabulary.txt"  # its name in a dataset folder
COLUMNS = ("title", "brand", "category", "categories", "description")
LISTS = ("category", "categories")  # of names, separated by blanks, with underscores inside a name
DECIMALS = 6  # of a cosine; what differs beyond them is a tie
WORDS_AT_ONCE = 256
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?")


# ---------------------------------------------------------------- vocabulary


def vocabulary_of(texts: Iterable[str], *, min_count: int = 5, more: Sequence[str] = ()) -> list[str]:
    """Words that describe a catalogue's items.

    Lower-cased words of letters only, two at least, that occur often enough and are no stop words of English
    (scikit-learn's list); of "women's" the "women" counts.

    Args:
        texts: plain, such as ``clean_text`` makes them.
        min_count: occurrences in all texts together that a word needs.
        more: words that are taken in any case, after the others.

    Returns:
        The most frequent word first, equally frequent ones by alphabet; each once.
    """
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(_words(text))
    often = [word for word, n in counts.items() if n >= min_count and word not in ENGLISH_STOP_WORDS]
    often.sort(key=lambda word: (-counts[word], word))
    return list(dict.fromkeys([*often, *more]))


def _words(text: str) -> list[str]:
    found = []
    for word in _WORD.findall(text.lower()):
        stem, apostrophe, ending = word.replace("’", "'").partition("'")
        if len(stem) >= 2 and (not apostrophe or ending == "s"):  # no pieces of "don't"
            found.append(stem)
    return found


def build_vocabulary(
    folder: Path,
    *,
    columns: Sequence[str] | None = None,
    min_count: int = 5,
    extra: Path | None = None,
    out: Path | None = None,
) -> Path:
    """Write the vocabulary of a dataset folder's texts, a word a line.

    Args:
        folder: holds ``<its name>.item``.
        columns: text columns; None takes those of ``COLUMNS`` that are there.
        min_count: occurrences that a word needs, at least 1.
        extra: a file of further words, a word a line.
        out: the file to write; None is ``vocabulary.txt`` in the folder.

    Returns:
        The file, for the option ``vocabulary`` of the encoder ``clip_words``.

    Raises:
        DatasetError: no table, a column is missing, or no word is left.
        SettingError: ``min_count`` below 1.
    """
    folder = Path(folder)
    if min_count < 1:
        raise SettingError(f"min_count is {min_count}, expected at least 1")
    table = folder / f"{folder.name}.item"
    if columns is None:
        there = read_header(table)
        columns = [column for column in COLUMNS if column in there]
        if not columns:
            raise DatasetError(f"{table} has none of the text columns {', '.join(COLUMNS)}; choose with --columns")
    items = read_table(table, needed=list(columns), optional=[])
    texts = (
        clean_text(value.replace("_", " ") if column in LISTS else value)
        for column in columns
        for value in items[column]
    )
    words = vocabulary_of(texts, min_count=min_count, more=read_vocabulary(extra) if extra else ())
    if not words:
        raise DatasetError(
            f"{table}: no word occurs {min_count} times in {', '.join(columns)}"
            "; write a file of words, a word a line, and give it with --vocabulary"
        )
    path = Path(out or folder / VOCABULARY)
    write_atomically(path, lambda file: file.write("".join(f"{word}\n" for word in words).encode()))
    return path


def read_vocabulary(path: Path) -> list[str]:
    """The words of a file, a word (or a few) a line, each once; lines that are empty or begin with # do not count.

    Raises:
        DatasetError: no such file, not UTF-8, or no word in it.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise DatasetError(f"cannot read the vocabulary {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DatasetError(f"the vocabulary {path} is no text file in UTF-8 with a word a line") from error
    words = dict.fromkeys(" ".join(line.split()) for line in lines if not line.lstrip().startswith("#"))
    words.pop("", None)
    if not words:
        raise DatasetError(f"the vocabulary {path} holds no word; write a word a line")
    return list(words)


# ---------------------------------------------------------------- encoder


class ClipWordsEncoder:
    """CLIP picture -> the N words of a vocabulary that fit best -> text encoder.

    The words' CLIP vectors are made once and kept beside the vocabulary, as ``<vocabulary>.<hash>.npy``, so that other
    processes need not make them again; where that folder cannot be written, each process makes them.

    Args:
        vocabulary: file of words, a word a line; ``build_vocabulary`` makes one of a catalogue's texts.
        n_words: N, words per picture.
        image_token_mode: "concat" encodes the words, joined by blanks, as one text: a row per picture. "per_word"
            encodes each word: N rows per picture.
        template: what CLIP reads of a word, "{}" standing for it, such as "a photo of a {}".
        clip: arguments of ``ClipModel``.
        text_encoder: name of the encoder of the words.
        text_options: its arguments.
        batch_size, precision, device: of CLIP and text encoder, where these options do not name their own.

    Raises:
        SettingError: an argument that does not fit, or an encoder that cannot be made.
        DatasetError: the vocabulary cannot be read.
    """

    name, source = "clip_words", "image"

    def __init__(
        self,
        *,
        vocabulary: str | None = None,
        n_words: int = 15,
        image_token_mode: str = "concat",
        template: str = "{}",
        clip: dict[str, Any] | None = None,
        text_encoder: str = "sentence",
        text_options: dict[str, Any] | None = None,
        batch_size: int | None = None,
        precision: str | None = None,
        device: str | None = None,
    ) -> None:
        if vocabulary is None:
            raise SettingError(
                "the encoder 'clip_words' needs a file of words, a word a line; give it with --vocabulary FILE"
            )
        if image_token_mode not in TOKEN_MODES:
            raise SettingError(f"image_token_mode is {image_token_mode!r}, expected one of {list(TOKEN_MODES)}")
        if template.count("{}") != 1:
            raise SettingError(f"template is {template!r}, expected {{}} in it once, where the word goes")
        self._path = Path(vocabulary)
        self._words = read_vocabulary(self._path)
        if not 1 <= n_words <= len(self._words):
            raise SettingError(f"n_words is {n_words}, expected 1 to {len(self._words)}, the words of {vocabulary}")
        shared = {"batch_size": batch_size, "precision": precision, "device": device}
        self._clip = ClipModel(**with_defaults(clip, shared, ClipModel))
        self._text = build_text_encoder(text_encoder, text_options, shared, texts=self._words)
        self._n_words, self._mode, self._template = n_words, image_token_mode, template
        self._word_rows: np.ndarray | None = None
        self._making_rows = threading.Lock()
        self._vectors_of_words: dict[int, np.ndarray] = {}  # [WORDS_AT_ONCE, F] by the number of the batch
        self.transform: Callable[[Image], np.ndarray] = self._clip.image_transform
        self.counts: Mapping[str, int] = getattr(self._text, "counts", {}) if image_token_mode == "concat" else {}
        self.settings: dict[str, Any] = {
            "vocabulary": self._path.name,
            "vocabulary_sha256": _sha256_of_lines(self._words),
            "n_vocabulary": len(self._words),
            "n_words": n_words,
            "image_token_mode": image_token_mode,
            "template": template,
            "clip": self._clip.settings,
            "text_encoder": self._text.name,
            "text": self._text.settings,
            "width": self._text.settings["width"],
        }

    def fit(self, everything: Sequence[Any]) -> None:
        """Make the words' CLIP vectors, or read those that were made before; the pictures are not looked at."""
        self._rows_of_words()

    def encode(self, batch: Sequence[np.ndarray]) -> list[np.ndarray]:
        if self._mode == "concat":
            return self._text.encode([" ".join(words) for words in self.words_of(batch)])
        return [np.stack([self._vector_of(number) for number in row]) for row in self._best(batch)]  # [N, F] each

    def _vector_of(self, number: int) -> np.ndarray:
        """The text encoder's vector of a word, [F].

        Words are encoded in the vocabulary's batches, so that what was encoded before does not change a bit.
        """
        batch, place = divmod(number, WORDS_AT_ONCE)
        if batch not in self._vectors_of_words:
            words = self._words[batch * WORDS_AT_ONCE : (batch + 1) * WORDS_AT_ONCE]
            self._vectors_of_words[batch] = np.stack(self._text.encode(words))
        return self._vectors_of_words[batch][place]

    def words_of(self, batch: Sequence[np.ndarray]) -> list[list[str]]:
        """The N words of each picture, the best first; equally good ones in the vocabulary's order.

        Args:
            batch: what ``transform`` made of pictures.
        """
        return [[self._words[number] for number in row] for row in self._best(batch)]

    def _best(self, batch: Sequence[np.ndarray]) -> list[list[int]]:
        """Numbers of those words, [n][N]."""
        if not len(batch):
            return []
        pictures = np.asarray(self._clip.encode_images(batch), dtype=np.float64)  # [n, F]
        scores = np.round(pictures @ self._rows_of_words().T, DECIMALS)  # [n, V]
        return np.argsort(-scores, axis=1, kind="stable")[:, : self._n_words].tolist()

    def _rows_of_words(self) -> np.ndarray:
        """CLIP's vectors of the vocabulary, [V, F] float64."""
        with self._making_rows:
            if self._word_rows is None:
                self._word_rows = self._read_rows()
                if self._word_rows is None:
                    self._word_rows = self._make_rows()
            return self._word_rows

    def _read_rows(self) -> np.ndarray | None:
        try:
            rows = np.load(self._rows_file(), allow_pickle=False)
        except (OSError, ValueError, EOFError):  # not there, or not whole: made again
            return None
        return rows.astype(np.float64) if rows.ndim == 2 and len(rows) == len(self._words) else None

    def _make_rows(self) -> np.ndarray:
        from tqdm import tqdm

        texts = [self._template.replace("{}", word) for word in self._words]
        parts = []
        with tqdm(total=len(texts), unit="word", desc="vocabulary", leave=False) as bar:
            for start in range(0, len(texts), WORDS_AT_ONCE):
                parts.append(np.asarray(self._clip.encode_texts(texts[start : start + WORDS_AT_ONCE]), np.float32))
                bar.update(len(parts[-1]))
        rows = np.concatenate(parts)  # [V, F]
        try:
            write_atomically(self._rows_file(), lambda file: np.save(file, rows))
        except OSError:  # a read-only place: every process makes them for itself
            pass
        return rows.astype(np.float64)

    def _rows_file(self) -> Path:
        made_of = {"words": _sha256_of_lines(self._words), "template": self._template, "clip": self._clip.settings}
        digest = hashlib.sha256(json.dumps(made_of, sort_keys=True, default=str).encode()).hexdigest()
        return self._path.with_name(f"{self._path.name}.{digest[:16]}.npy")


def _sha256_of_lines(words: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(words).encode()).hexdigest()
