"""Amazon reviews and metadata in their three editions, told apart by what the rows hold.

    edition  interactions                          metadata                                   file
    2014     reviewerID asin unixReviewTime [s]    asin title brand categories price imUrl    Python literals or JSON
    2018     reviewerID asin unixReviewTime [s]    asin title brand category price imageURL*  JSON lines
    2023     user_id parent_asin timestamp [ms]    parent_asin title store categories price   JSON lines or Parquet
                                                   images

Sources: McAuley et al., "Image-based recommendations on styles and substitutes" (SIGIR 2015); Ni et al., "Justifying
recommendations using distantly-labeled reviews and fine-grained aspects" (EMNLP 2019); Hou et al., "Bridging language
and items for retrieval and recommendation" (2024). Files of ratings alone (CSV) are read too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from dataset_prep.events import EventBuilder, Events
from dataset_prep.sources import Item, as_paths, named_files
from dataset_prep.sources.amazon_fields import addresses_of, categories_of, field_text, price_of
from dataset_prep.sources.amazon_ratings import HEAD, HEADERS, Ratings, rating_order
from dataset_prep.sources.first_rows import FirstRows
from dataset_prep.sources.ids import id_problem
from dataset_prep.sources.json_rows import JsonRows
from dataset_prep.sources.lines import Lines
from dataset_prep.sources.parquet_rows import ParquetRows, is_parquet
from dataset_prep.sources.rejects import Rejects
from dataset_prep.sources.times import PER_SECOND, bad_time, check_unit
from recbole_mm.errors import DatasetError, SettingError

MAX_PICTURES = 10  # of an item
LICENCE = (
    "Reviews, product texts and pictures belong to their authors and sellers; the publishers of the collection offer "
    "it for research and ask for a citation. Look at its page for the terms: {page}"
)


@dataclass(frozen=True)
class _Edition:
    """What rows of an edition hold; ``*_own`` are keys that no other edition has."""

    user: str
    item: str
    time: str
    unit: str
    reviews_own: frozenset[str]
    meta_own: frozenset[str]
    meta_keys: tuple[str, ...]
    page: str


_SHARED = {"user": "reviewerID", "item": "asin", "time": "unixReviewTime", "unit": "s"}
_EDITIONS = {
    "2014": _Edition(
        **_SHARED,
        reviews_own=frozenset({"helpful"}),
        meta_own=frozenset({"imUrl", "categories", "related", "salesRank"}),
        meta_keys=("asin", "title", "brand", "categories", "description", "price", "imUrl"),
        page="https://cseweb.ucsd.edu/~jmcauley/datasets/amazon/links.html",
    ),
    "2018": _Edition(
        **_SHARED,
        reviews_own=frozenset({"verified", "style", "vote", "image"}),
        meta_own=frozenset(
            "category imageURL imageURLHighRes image also_buy also_view main_cat rank tech1 feature".split()
        ),
        meta_keys=("asin", "title", "brand", "category", "description", "price", "imageURLHighRes", "imageURL"),
        page="https://nijianmo.github.io/amazon/index.html",
    ),
    "2023": _Edition(
        user="user_id",
        item="parent_asin",
        time="timestamp",
        unit="ms",
        reviews_own=frozenset({"user_id", "parent_asin", "timestamp"}),
        meta_own=frozenset({"parent_asin", "main_category", "store", "images"}),
        meta_keys=("parent_asin", "title", "store", "categories", "description", "price", "images"),
        page="https://amazon-reviews-2023.github.io",
    ),
}
EDITIONS = ("auto", *_EDITIONS)
_EITHER = "2014 or 2018"  # the keys that both have, and no others
_OF_SCRIPTS = ("getTime", "aPageStart", ".aui-", ".a-box-inner")  # in titles that were scraped with the page's code
_PICTURE_HOST = re.compile(r"https?://[^/]*amazon\.[^/]*/images/[A-Z]/(?P<picture>[^/.]+)\.")


class AmazonSource:
    """Reviews and metadata of one edition, as a `Source`. The item of the 2023 edition is ``parent_asin``.

    Args:
        reviews: one file or several, ``.json``, ``.jsonl``, gzipped or not, Parquet, or a CSV of ratings.
        meta: one file or several; None leaves items without any description.
        edition: "2014", "2018", "2023", or "auto" to tell by the content.
        progress: show bars on stderr.

    Raises:
        DatasetError: a file that cannot be read, keys of no edition, or of two.
        SettingError: an unknown edition.
    """

    def __init__(
        self,
        reviews: Path | Sequence[Path],
        meta: Path | Sequence[Path] | None = None,
        *,
        edition: str = "auto",
        progress: bool = True,
    ) -> None:
        if edition not in EDITIONS:
            raise SettingError(f"edition is {edition!r}, expected one of {list(EDITIONS)}")
        files = named_files({"reviews": as_paths(reviews), "meta": as_paths(meta)})
        self._reviews, self._meta, self._progress = files["reviews"], files["meta"], progress
        self.edition = _common_edition(self._reviews, self._meta, edition)
        self._form = _EDITIONS[self.edition]
        self.described: dict[str, Any] = {
            "source": "amazon",
            "edition": self.edition,
            "item": self._form.item,
            "reviews": [name for name, _ in self._reviews],
            "meta": [name for name, _ in self._meta],
            "licence": LICENCE.format(page=self._form.page),
        }
        self.files = {name: path for named in files.values() for name, path in named}
        self.raw_files: dict[str, str] = {}
        self.n_rows: dict[str, int] = {}
        self.fixed: Counter[str] = Counter()

    # ---------------------------------------------------------------- interactions

    def events(self, rejects: Rejects) -> Events:
        """All interactions; lines of a second file are numbered on. O(rows) time, 24 bytes a row and the names.

        Raises:
            DatasetError: too many unusable rows, none usable, times in two units, rows of two editions, a damaged file.
        """
        builder, offset, parts = EventBuilder(), 0, []
        for name, path in self._reviews:
            start = len(builder)
            reader = self._reader(name, path, rejects, reviews=True)
            for number, text, row in reader:
                if problem := self._add(builder, row, number, offset, path):
                    rejects.add(name, number, problem, _shown(text, row))
            offset += self._finish(name, path, reader, rejects)
            parts.append((path, offset, slice(start, len(builder))))
        if not len(builder):
            raise DatasetError(f"{', '.join(name for name, _ in self._reviews)}: no usable review")
        events = builder.build()
        before = 0
        for path, offset, rows in parts:
            if rows.start < rows.stop:
                check_unit(events.time[rows], events.line[rows] - before, self._form.unit, path, option=False)
            before = offset
        return events._replace(time=events.time / PER_SECOND[self._form.unit])

    def _add(self, builder: EventBuilder, row: dict[str, Any], number: int, offset: int, path: Path) -> str | None:
        """Take one review, or tell why not."""
        form = self._form
        try:
            user, item, time = row[form.user], row[form.item], row[form.time]
        except KeyError:
            self._refuse_other(row, number, path)
            return "missing_key"
        if type(user) is not str or user not in builder.users:
            if problem := id_problem(user):
                return problem
            self._refuse_other(row, number, path)
        if type(item) is not str or item not in builder.items:
            if problem := id_problem(item):
                return problem
        if problem := bad_time(time, form.unit):
            return problem
        builder.add(user, item, time, offset + number)
        return None

    def _refuse_other(self, row: dict[str, Any], number: int, path: Path) -> None:
        found = _edition_of(row, reviews=True)
        if found not in (None, _EITHER, self.edition):
            raise DatasetError(
                f"{path}: row {number} is of the {found} edition, the first ones of {self.edition}; prepare them apart"
            )

    # ---------------------------------------------------------------- items

    def items(self, wanted: Container[str], rejects: Rejects) -> Iterator[Item]:
        """The items among ``wanted``, each once, in the order of the metadata.

        Raises:
            DatasetError: too many unusable rows, a damaged file; what came before must not be used then.
        """
        first_rows = FirstRows(self.fixed, rejects)
        key = self._form.item
        for name, path in self._meta:
            reader = self._reader(name, path, rejects, reviews=False)
            for number, text, row in reader:
                item_id = row.get(key)
                if type(item_id) is str and item_id in wanted:
                    item = self._item(item_id, row)
                    if item is None:
                        rejects.add(name, number, "non_finite", _shown(text, row))
                    elif first_rows.is_first(item, name, number, text):
                        yield item
                elif problem := id_problem(item_id) if key in row else "missing_key":
                    rejects.add(name, number, problem, _shown(text, row))
            self._finish(name, path, reader, rejects)

    def _item(self, item_id: str, row: dict[str, Any]) -> Item | None:
        """None if a price is infinite."""
        price = row.get("price")
        if type(price) is float and abs(price) == float("inf"):
            return None
        title = field_text(row.get("title"), " ")
        if self.edition == "2018" and any(mark in title for mark in _OF_SCRIPTS):
            title = ""
            self.fixed["title of scraped code left out"] += 1
        return Item(
            item_id=item_id,
            title=title,
            brand=field_text(row.get("store" if self.edition == "2023" else "brand"), " "),
            categories=categories_of(row.get("category" if self.edition == "2018" else "categories")),
            description=field_text(row.get("description"), "\n"),
            price=price_of(price),
            pictures=self._pictures(row),
        )

    def _pictures(self, row: dict[str, Any]) -> tuple[str, ...]:
        """Addresses of different pictures, each in its largest size."""
        kept: dict[str, str] = {}
        for address in addresses_of(row, self.edition):
            if not address.startswith(("http://", "https://")):
                self.fixed["picture address that is not http(s) left out"] += 1
                continue
            match = _PICTURE_HOST.match(address)
            kept.setdefault(match["picture"] if match else address, address)
        if len(kept) > MAX_PICTURES:
            self.fixed[f"pictures beyond {MAX_PICTURES} of an item left out"] += len(kept) - MAX_PICTURES
        return tuple(islice(kept.values(), MAX_PICTURES))

    # ---------------------------------------------------------------- files

    def _reader(self, name: str, path: Path, rejects: Rejects, *, reviews: bool) -> _Rows:
        form = self._form
        columns = [form.user, form.item, form.time] if reviews else [*form.meta_keys, "image"]
        return _Rows(
            name, path, rejects, columns=columns, edition=self.edition if reviews else None,
            literals=self.edition == "2014", progress=self._progress,
        )  # fmt: skip

    def _finish(self, name: str, path: Path, reader: _Rows, rejects: Rejects) -> int:
        if not reader.n:
            raise DatasetError(f"{path} is empty: 0 rows; download it again")
        self.n_rows[name], self.raw_files[name] = reader.n, reader.sha256
        self.fixed.update(reader.fixed)
        rejects.check(name, reader.n)
        return reader.last


def _shown(text: str, row: dict[str, Any]) -> str:
    return text or repr(row)


class _Rows:
    """Rows of a file of any kind: number, line (or nothing), content.

    Args:
        columns: to read of a Parquet file.
        edition: whose keys a CSV of ratings is given; None if there can be none.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        rejects: Rejects,
        *,
        columns: Sequence[str] | None = None,
        edition: str | None = None,
        literals: bool = False,
        progress: bool = True,
    ) -> None:
        self.sha256, self.fixed, self.n, self.last = "", Counter(), 0, 0
        self._source: ParquetRows | JsonRows | Ratings
        if is_parquet(path):
            self._source = ParquetRows(path, columns, progress=progress)
        elif edition and (order := rating_order(path)):
            form = _EDITIONS[edition]
            names = {"user": form.user, "item": form.item, "time": form.time}
            self._source = Ratings(Lines(path, rejects, name=name, progress=progress), rejects, order, names)
        else:
            self._source = JsonRows(path, rejects, name=name, literals=literals, progress=progress)

    def __iter__(self) -> Iterator[tuple[int, str, dict[str, Any]]]:
        source = self._source
        if isinstance(source, ParquetRows):
            for number, row in source:
                yield number, "", row
            self.n = self.last = source.n
            self.sha256 = source.sha256
            return
        yield from source
        lines = source.lines
        self.n, self.last, self.sha256, self.fixed = source.n, lines.n, lines.sha256, lines.fixed


# ---------------------------------------------------------------- editions


def _edition_of(row: Iterable[str], *, reviews: bool, literal: bool = False) -> str | None:
    """The edition of a row by its keys; ``2014 or 2018`` if it can be both, None if it is no row of any."""
    keys = set(row)
    if "parent_asin" in keys and (not reviews or {"user_id", "timestamp"} <= keys):
        return "2023"
    if not ({"reviewerID", "asin", "unixReviewTime"} if reviews else {"asin"}) <= keys:
        return None
    own = {
        name: bool(keys & (form.reviews_own if reviews else form.meta_own))
        for name, form in _EDITIONS.items()
        if name != "2023"
    }
    if own["2014"] == own["2018"]:
        return "2014" if literal else _EITHER
    return "2014" if own["2014"] else "2018"


def _editions_in(path: Path, *, reviews: bool) -> set[str]:
    """The editions of a file's first rows.

    Raises:
        DatasetError: no such rows; tells the keys found, and those expected.
    """
    nowhere = Rejects()
    if is_parquet(path):
        names = ParquetRows(path).names
        found, keys = {_edition_of(names, reviews=reviews)}, names
    elif reviews and (order := rating_order(path)):
        with_header = next(iter(Lines(path, nowhere, progress=False)))[1].split(",") in HEADERS
        found, keys = {"2023" if with_header else "2014" if order[0] == "user" else "2018"}, []
    else:
        head = list(islice(JsonRows(path, nowhere, literals=True, progress=False), HEAD))
        if not head and not nowhere.counts:
            raise DatasetError(f"{path} is empty: 0 rows; download it again")
        found = {_edition_of(row, reviews=reviews, literal=line.startswith("{'")) for _, line, row in head}
        keys = list(dict.fromkeys(key for _, _, row in head for key in row))
    known = found - {None}
    if known:
        return known
    kind = "reviews" if reviews else "metadata"
    lines = [f"  {name}: {', '.join(_needed(form, reviews=reviews))}" for name, form in _EDITIONS.items()]
    what = f"its keys are {', '.join(keys[:20])}" if keys else "it holds no JSON objects, one a line"
    raise DatasetError("\n".join([f"{path}: no {kind} of Amazon: {what}; the editions have", *lines]))


def _needed(form: _Edition, *, reviews: bool) -> list[str]:
    """Keys of an edition, those that every row needs first."""
    needed = [form.user, form.item, form.time] if reviews else [form.item]
    own = form.reviews_own if reviews else form.meta_own
    return [*needed, *sorted(own - set(needed))]


def _common_edition(reviews: list[tuple[str, Path]], meta: list[tuple[str, Path]], wanted: str) -> str:
    found = {name: _editions_in(path, reviews=True) - {_EITHER} for name, path in reviews}
    found |= {name: _editions_in(path, reviews=False) - {_EITHER} for name, path in meta}
    editions = sorted(set().union(*found.values()))
    listed = ", ".join(f"{name} is of {' and '.join(sorted(of))}" for name, of in found.items() if of)
    if len(editions) > 1:
        raise DatasetError(f"files of different editions: {listed}; prepare each edition apart")
    if wanted == "auto":
        return editions[0] if editions else "2018"
    if editions and editions[0] != wanted:
        raise DatasetError(f"the edition {wanted} was asked for, and {listed}; leave --edition out")
    if not editions and wanted == "2023":
        raise DatasetError("the edition 2023 was asked for, and the files are of 2014 or 2018; leave --edition out")
    return wanted
