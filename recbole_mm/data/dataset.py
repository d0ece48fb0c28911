"""A dataset folder as RecBole's models and ours see it: the same interactions, ids and candidate items for all."""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from recbole.data.dataset import SequentialDataset
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_mm.data.files import read_header, read_table
from recbole_mm.data.knockout import KnockOuts
from recbole_mm.data.layout import PADDING_TOKEN, Manifest, interaction_files, read_feature
from recbole_mm.data.reading import SafeReading
from recbole_mm.errors import DatasetError, SettingError, nearest
from recbole_mm.ragged import segments_of

PREPARED_COLUMNS = ("price_level", "category")  # made by python -m dataset_prep prices


class ItemVectors(NamedTuple):
    """All vectors of one feature, item by item, without copying or padding them.

    Attributes:
        rows: [S, F] float32 in the order of the file; on a CPU the mapped file itself. A knock-out may bring others.
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


class MultimodalDataset(SafeReading, SequentialDataset):
    """A dataset folder, and the features and columns of its items by item id.

    Differs from RecBole's ``SequentialDataset`` in this:
    - histories are ordered by exact time, then by line of the file; RecBole compares float32, in steps of 128 s;
    - item ids depend on the interactions alone: reading ``.item`` neither adds candidates nor drops interactions;
    - a history is cut to its newest items, or refused if the folder was split beforehand, never cut to its oldest;
    - prefixes are made by array arithmetic: O(rows x L) time and memory, no loop.

    Ids follow RecBole: items are 1..N-1 and 0 is padding.

    Raises:
        DatasetError: the interactions, or a feature or column that is asked for, cannot be used.
        SettingError: the setting ``knockout`` cannot be read.
    """

    def __init__(self, config) -> None:
        self.folder = Path(config["data_path"])
        self.manifest = Manifest.load(self.folder)
        self.missing_features = config["missing_features"] or "error"
        self.knockouts = KnockOuts(config["knockout"], seed=config["knockout_seed"], settings=config.final_config_dict)
        # Filled when asked for. The parts that RecBole splits this into share them.
        self._vectors: dict[str, ItemVectors] = {}
        self._fields: dict[str, ItemField] = {}
        self._field_hashes: dict[str, str] = {}
        super().__init__(config)

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
        info, knockout = self.manifest.features[name], self.knockouts.of_feature(name)
        weights = [digest[:12] for _, digest in sorted(info.settings.get("weights_sha256", {}).items())]
        replaced = f"{knockout.kind} instead of " if knockout else ""
        return replaced + " ".join([info.encoder, *filter(None, [info.settings.get("model")]), *weights])

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
        row_ids, _, offsets = segments_of(starts, counts)
        # A bag of embeddings: the mean of an item's rows without a copy of all rows.
        mean = F.embedding_bag(row_ids, rows, offsets, mode="mean")  # [N, F]
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
        rows = torch.from_numpy(feature.rows if feature.rows.dtype == np.float32 else feature.rows.astype(np.float32))
        fallback = torch.zeros(rows.shape[1])
        if self.missing_features == "mean":
            row_ids, _, _ = segments_of(starts, counts)
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

    # ------------------------------------------------ reading

    def _load_data(self, token, dataset_path) -> None:
        self._check_columns()
        super()._load_data(token, dataset_path)

    def _check_columns(self) -> None:
        split = self.benchmark_filename_list is not None
        list_field = f"{self.iid_field}{self.config['LIST_SUFFIX']}"
        needed = [self.uid_field, self.iid_field, list_field if split else self.time_field]
        names = [f"{self.dataset_name}.{part}.inter" for part in self.benchmark_filename_list or []]
        wanted = (self.config["load_col"] or {}).get("inter", "*")
        if wanted != "*" and (left_out := [field for field in needed if field not in wanted]):
            raise SettingError(
                f"load_col leaves out {', '.join(left_out)} of the interactions, which every model needs"
            )
        for path in [self.folder / name for name in names] or interaction_files(self.folder):
            columns = read_header(path)
            if missing := [field for field in needed if field not in columns]:
                raise DatasetError(
                    f"{path} has no column {', '.join(missing)}; its columns are {', '.join(columns)}\n"
                    "  if they have other names, set USER_ID_FIELD, ITEM_ID_FIELD or TIME_FIELD, "
                    f"such as --{'USER_ID_FIELD' if self.uid_field in missing else 'TIME_FIELD'}={list(columns)[0]}"
                )

    def _load_inter_feat(self, token, dataset_path) -> None:
        super()._load_inter_feat(token, dataset_path)
        frame = self.inter_feat
        for field in (self.uid_field, self.iid_field):
            for bad, what in (
                (frame[field].isna(), "empty"),
                (frame[field] == PADDING_TOKEN, "RecBole's padding token"),
            ):
                if (rows := np.flatnonzero(bad)).size:
                    raise DatasetError(
                        f"{self.dataset_name}: {len(rows)} interactions have a {field} that is {what}, "
                        f"the first in data row {rows[0] + 1}; remove or rename them"
                    )
        if self.benchmark_filename_list is not None:
            self._check_lists()
        elif (rows := np.flatnonzero(frame[self.time_field].isna())).size:
            raise DatasetError(
                f"{self.dataset_name}: {len(rows)} interactions have no {self.time_field}, the first in data row "
                f"{rows[0] + 1}; histories are ordered by it"
            )

    def _check_lists(self) -> None:
        field = f"{self.iid_field}{self.config['LIST_SUFFIX']}"
        lengths = np.fromiter(map(len, self.inter_feat[field]), dtype=np.int64, count=len(self.inter_feat))
        first_rows = np.cumsum([0, *self.file_size_list])
        for bad, what in ((lengths == 0, "is empty"), (lengths > self.max_item_list_len, "is too long")):
            if not bad.any():
                continue
            row = int(np.flatnonzero(bad)[0])
            part = int(np.searchsorted(first_rows, row, side="right")) - 1
            file = f"{self.dataset_name}.{self.benchmark_filename_list[part]}.inter"
            raise DatasetError(
                f"{file}, line {row - first_rows[part] + 2}: {field} {what}: {lengths[row]} items, "
                f"1 to {self.max_item_list_len} expected ({bad.sum()} such rows)\n"
                f"  set --MAX_ITEM_LIST_LENGTH={lengths.max()}, or prepare the dataset again: "
                "RecBole would keep the oldest items"
            )

    # ------------------------------------------------ filtering and ids

    def _remove_duplication(self) -> None:
        """As RecBole's, but stable: equal times keep the order of the file on every platform."""
        keep = self.config["rm_dup_inter"]
        if keep is None:
            return
        if self.time_field in self.inter_feat:
            self.inter_feat = self.inter_feat.sort_values(by=self.time_field, kind="stable")
        self.inter_feat = self.inter_feat.drop_duplicates(subset=[self.uid_field, self.iid_field], keep=keep)

    def _filter_inter_by_user_or_item(self) -> None:
        """Nothing: an item without a row in ``.item`` stays a candidate for every model."""

    def _remap_ID_all(self) -> None:
        if len(self.inter_feat) == 0:
            raise DatasetError(f"{self.dataset_name}: filtering leaves no interactions; loosen the filter settings")
        if self.item_feat is not None:
            known = set(self.inter_feat[self.iid_field])
            for field in self.alias["item_id"]:
                if field != self.iid_field:
                    known.update(token for tokens in self.inter_feat[field] for token in tokens)
            rows = self.item_feat[self.iid_field].isin(known)
            if absent := len(known) - int(rows.sum()):
                self.logger.warning(f"{absent} of {len(known)} items have no row in {self.dataset_name}.item")
            self.item_feat = self.item_feat[rows].reset_index(drop=True)
        super()._remap_ID_all()

    def _get_remap_list(self, field_list):
        """Interactions first, so that ids do not depend on whether ``.item`` is read."""
        return sorted(super()._get_remap_list(field_list), key=lambda entry: entry[0] is not self.inter_feat)

    # ------------------------------------------------ histories

    def _change_feat_format(self) -> None:
        if self.benchmark_filename_list is None:
            frame = self.inter_feat
            time = frame[self.time_field].to_numpy()
            order = np.lexsort((time, frame[self.uid_field].to_numpy()))  # stable: equal times keep the file's order
            self.inter_feat = frame.iloc[order].reset_index(drop=True)
            self._exact_time = time[order]
        super()._change_feat_format()

    def data_augmentation(self) -> None:
        """One row per prefix: the newest L items before a target, right-padded with 0; rows in order of target time.

        The same rows in the same order as RecBole's, wherever float32 does not merge different times.
        """
        self._aug_presets()
        users = self.inter_feat[self.uid_field].numpy()
        new_user = np.concatenate([[True], users[1:] != users[:-1]])
        first_of_user = np.flatnonzero(new_user)[np.cumsum(new_user) - 1]  # [interactions]
        target = np.flatnonzero(~new_user)
        if alone := int(new_user.sum()) - len(np.unique(users[target])):
            self.logger.info(f"{alone} users with a single interaction have no next item and are left out")
        if not len(target):
            raise DatasetError(f"{self.dataset_name}: no user has two interactions, so there is nothing to predict")
        target = target[np.argsort(self._exact_time[target], kind="stable")]
        start = np.maximum(first_of_user[target], target - self.max_item_list_len)
        length = torch.from_numpy(target - start)
        position = torch.arange(self.max_item_list_len)
        valid = position < length.unsqueeze(1)  # [rows, L]
        index = (torch.from_numpy(start).unsqueeze(1) + position).where(valid, 0)  # [rows, L]

        target = torch.from_numpy(target)
        columns = {field: values[target] for field, values in self.inter_feat.interaction.items()}
        for field, values in self.inter_feat.interaction.items():
            if field != self.uid_field:
                prefix = values[index]  # [rows, L, ...]
                mask = valid.view(*valid.shape, *[1] * (prefix.dim() - 2))
                columns[getattr(self, f"{field}_list_field")] = prefix * mask
        columns[self.item_list_length_field] = length
        self.inter_feat = Interaction(columns)

    def build(self) -> list[MultimodalDataset]:
        parts = super().build()
        for name, part in zip(("training", "validation", "test"), parts, strict=True):
            if len(part) == 0:
                raise DatasetError(
                    f"{self.dataset_name}: no {name} rows are left by eval_args {self.config['eval_args']['split']}\n"
                    "  leave-one-out needs users with four interactions; choose another split or a looser filter"
                )
        return parts


def _natural(token: str) -> tuple:
    """Sorts numbers by size, then texts, in which ``c2`` stands before ``c10``."""
    try:
        number = float(token)
    except ValueError:
        number = math.nan
    parts = re.split(r"(\d{1,18})", token)  # Python reads numbers of a few thousand digits only
    parts[1::2] = map(int, parts[1::2])
    return (0, number, token) if math.isfinite(number) else (1, parts, token)
