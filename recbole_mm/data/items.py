"""What the items of a folder are: their features and columns, by item id."""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_mm.data.files import read_header, read_table
from recbole_mm.data.knockout import KnockOuts
from recbole_mm.data.layout import Manifest, read_feature
from recbole_mm.errors import DatasetError, nearest
from recbole_mm.ragged import mean_and_deviation, mean_of_items, segments_of

PREPARED_COLUMNS = ("price_level", "category")  # made by python -m dataset_prep prices


class ItemVectors(NamedTuple):
    """All vectors of one feature, item by item, without copying or padding them.

    Attributes:
        rows: [S, F] float32 in the order of the file; on a CPU the mapped file itself. A knock-out may bring others.
            With ``float16_features: mapped``, a file of float16 stays what it is.
        starts: [N] long, where the rows of an item id begin.
        counts: [N] long, how many it has; 0 for padding and for items without content.
        fallback: [F], what stands in for an item without rows: zeros, or the mean of all rows.
    """

    rows: Tensor
    starts: Tensor
    counts: Tensor
    fallback: Tensor

    def padded(self) -> tuple[Tensor, Tensor]:
        """[N, T, F] with zeros behind each item's rows, and valid [N, T] bool; T is the largest count. Copies."""
        position = torch.arange(int(self.counts.max()), device=self.counts.device)
        valid = position < self.counts.unsqueeze(1)  # [N, T]
        index = (self.starts.unsqueeze(1) + position).where(valid, 0)  # [N, T]
        return self.rows[index] * valid.unsqueeze(-1), valid


class ItemField(NamedTuple):
    """One column of the item file, item by item.

    Attributes:
        values: [N] long, the number of each item's value; 0 for padding and where no value is known.
        tokens: the values by number: numbers by size, before texts in natural order; tokens[0] is "", not known.
    """

    values: Tensor
    tokens: list[str]


class ItemContent:
    """Mixin for RecBole's ``Dataset``: features and columns of its items, each read when it is first asked for.

    Raises:
        DatasetError: a feature or column that is asked for cannot be used.
        SettingError: the setting ``knockout`` cannot be read.
    """

    def _prepare_content(self, config) -> None:
        """Called first, when ``folder`` is known."""
        self.manifest = Manifest.load(self.folder)
        self.missing_features = config["missing_features"] or "error"
        self.keep_float16 = config["float16_features"] == "mapped"
        self.knockouts = KnockOuts(config["knockout"], seed=config["knockout_seed"], settings=config.final_config_dict)
        # Filled when asked for. The parts that RecBole splits this into share them.
        self._vectors: dict[str, ItemVectors] = {}
        self._fields: dict[str, ItemField] = {}
        self._field_hashes: dict[str, str] = {}

    # ------------------------------------------------ features

    def feature_names(self) -> list[str]:
        """Features that the folder has."""
        return sorted(self.manifest.features)

    def used_features(self) -> list[str]:
        """Features that a model has asked for."""
        return sorted(self._vectors)

    def feature_hash(self, name: str) -> str:
        """sha256 of a feature's array."""
        return self.manifest.files[self.manifest.features[name].file].sha256

    def encoder_of(self, name: str) -> str:
        """What made a feature: the encoder, and its model and weights if it has some; what a knock-out put there."""
        knockout = self.knockouts.of_feature(name)
        return (f"{knockout.kind} instead of " if knockout else "") + self.manifest.features[name].maker

    def vectors(self, name: str) -> ItemVectors:
        """All vectors of a feature, aligned with item ids by item token; opened once.

        O(S F) time to look for values that are not finite, O(N) memory beyond the mapped file.

        Raises:
            DatasetError: no such feature, a broken one, or one that lacks items under ``missing_features: error``.
        """
        if name not in self._vectors:
            self._vectors[name] = self._align(name)
        return self._vectors[name]

    def feature(self, name: str) -> Tensor:
        """One vector per item, [N, F]: the item's vector, or the mean of its vectors. Padding is zero."""
        rows, starts, counts, fallback = self.vectors(name)
        mean = mean_of_items(rows, starts, counts)  # [N, F]
        mean[1:][counts[1:] == 0] = fallback
        return mean

    def has_content(self, name: str) -> Tensor:
        """[N] bool, True where an item has a vector of its own."""
        return self.vectors(name).counts > 0

    def _align(self, name: str) -> ItemVectors:
        feature = read_feature(self.folder, name, manifest=self.manifest)
        tokens = self.field2id_token[self.iid_field]  # [N], padding first
        entry_of = {token: entry for entry, token in enumerate(feature.tokens)}
        entries = np.array([-1, *(entry_of.get(str(token), -1) for token in tokens[1:])])  # [N]
        first = np.concatenate([[0], np.cumsum(feature.counts)])[:-1]
        starts = torch.from_numpy(np.where(entries < 0, 0, first[entries]))
        counts = torch.from_numpy(np.where(entries < 0, 0, feature.counts[entries]))

        missing = np.flatnonzero(counts[1:].numpy() == 0) + 1
        self._report_coverage(name, feature, missing, n_known=int((entries >= 0).sum()))
        kept = (np.float32, np.float16) if self.keep_float16 else (np.float32,)
        rows = torch.from_numpy(feature.rows if feature.rows.dtype in kept else feature.rows.astype(np.float32))
        fallback = torch.zeros(rows.shape[1])
        if self.missing_features == "mean":
            row_ids, _, _ = segments_of(starts, counts)
            if rows.dtype == torch.float16:
                fallback, _ = mean_and_deviation(rows, row_ids)
            else:
                fallback = F.embedding_bag(row_ids, rows, torch.zeros(1, dtype=torch.long), mode="mean")[0]
        if knockout := self.knockouts.of_feature(name):
            why = f"made from {knockout.name} and replaced like it" if knockout.derived else "replaced"
            self._report_knockout(f"feature {name!r}", why, knockout.kind)
        elif source := self.knockouts.leaking(name):
            self.logger.warning(
                f"knock-out: feature {name!r} is not made from {source} and stays, but other items' {source} may show "
                f"in it; to replace it too, add {name}:{self.knockouts.kinds[source]}"
            )
        replaced = self.knockouts.replace_rows(name, rows, starts, counts)
        return ItemVectors(*replaced, fallback)

    def _report_knockout(self, what: str, why: str, kind: str) -> None:
        self.logger.warning(f"knock-out: {what} is {why} by {kind} (knockout_seed {self.knockouts.seed})")

    def _report_coverage(self, name: str, feature, missing: np.ndarray, *, n_known: int) -> None:
        tokens, n_items = self.field2id_token[self.iid_field], self.item_num - 1
        if len(missing) and self.missing_features == "error":
            examples = ", ".join(repr(str(tokens[i])) for i in missing[:3])
            raise DatasetError(
                f"feature {name!r} of {self.dataset_name} lacks {len(missing)} of {n_items} items, such as {examples}\n"
                "  run with --missing_features=zero or --missing_features=mean, or complete the feature with:\n"
                f"    python -m dataset_prep features --dataset {self.folder} --feature {name}"
            )
        n_covered, encoder = n_items - len(missing), self.manifest.features[name].encoder
        stand_in = f", the others get {self.missing_features}" if len(missing) else ""
        self.logger.info(
            f"feature {name!r}: {n_covered} of {n_items} items ({100 * n_covered / n_items:.1f} %){stand_in}; "
            f"{len(feature.rows)} vectors of width {feature.rows.shape[1]}, encoder {encoder}"
        )
        if extra := len(feature.tokens) - n_known:
            self.logger.info(f"feature {name!r}: {extra} items without interactions are not used")

    # ------------------------------------------------ item columns

    def item_columns(self) -> list[str]:
        """Columns of the item file, without that of the item ids; empty if there is no file."""
        path = self._item_file()
        return [column for column in read_header(path) if column != self.iid_field] if path.is_file() else []

    def used_fields(self) -> list[str]:
        """Columns that a model has asked for and that hold something."""
        return sorted(name for name, field in self._fields.items() if len(field.tokens) > 1)

    def field_hash(self, name: str) -> str:
        """sha256 of what the items of this dataset have in a column that a model has asked for."""
        return self._field_hashes[name]

    def item_field(self, name: str) -> ItemField:
        """One column of ``<name>.item``, aligned with item ids by item token; read once.

        A value is the text of the field as it stands, also in a column of sequences. Values count if an item of the
        dataset has them.

        Raises:
            DatasetError: no item file, no such column, or an item with two rows.
        """
        if name not in self._fields:
            self._fields[name] = self._read_field(name)
        return self._fields[name]

    def _item_file(self) -> Path:
        return self.folder / f"{self.folder.name}.item"

    def _read_field(self, name: str) -> ItemField:
        path, columns = self._item_file(), self.item_columns()
        if name not in columns:
            there = f"its columns are {', '.join(columns) or 'item ids alone'}{nearest(name, columns)}"
            remedy = "add it to the file"
            if name in PREPARED_COLUMNS:
                remedy = f"make it with: python -m dataset_prep prices --dataset {self.folder}"
            raise DatasetError(
                f"no item column {name!r} in {path}: {there if path.is_file() else 'there is no such file'}\n  {remedy}"
            )
        table = read_table(path, needed=[self.iid_field, name], optional=[])
        if (twice := table[self.iid_field].duplicated()).any():
            examples = ", ".join(map(repr, table[self.iid_field][twice].unique()[:3]))
            raise DatasetError(f"{path}: {int(twice.sum())} rows repeat an item, such as {examples}; keep one row each")
        value_of = dict(zip(table[self.iid_field], table[name], strict=True))
        items = [str(token) for token in self.field2id_token[self.iid_field]]  # [N], padding first
        texts = ["", *(value_of.get(item, "") for item in items[1:])]
        tokens = ["", *sorted({*texts} - {""}, key=_natural)]
        number_of = {token: number for number, token in enumerate(tokens)}
        values = torch.tensor([number_of[text] for text in texts])

        pairs = sorted(f"{item}\t{text}\n" for item, text in zip(items[1:], texts[1:], strict=True))
        self._field_hashes[name] = hashlib.sha256("".join(pairs).encode()).hexdigest()
        self.logger.info(
            f"item column {name!r}: {int((values > 0).sum())} of {len(items) - 1} items, {len(tokens) - 1} values"
        )
        if knockout := self.knockouts.of_column(name):
            self._report_knockout(f"item column {name!r}", "replaced", knockout.kind)
        return ItemField(self.knockouts.replace_values(name, values), tokens)


def _natural(token: str) -> tuple:
    """Sorts numbers by size, then texts, in which ``c2`` stands before ``c10``."""
    try:
        number = float(token)
    except ValueError:
        number = math.nan
    parts = re.split(r"(\d{1,18})", token)  # Python reads numbers of a few thousand digits only
    parts[1::2] = map(int, parts[1::2])
    return (0, number, token) if math.isfinite(number) else (1, parts, token)
