"""A dataset folder as RecBole's models and ours see it: the same interactions, ids and candidate items for all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from recbole.data.dataset import SequentialDataset
from torch import Tensor

from recbole_mm.data.files import read_header
from recbole_mm.data.histories import Histories, IndexedHistories, first_of_user
from recbole_mm.data.items import ItemContent
from recbole_mm.data.layout import PADDING_TOKEN, SPLITS, interaction_files
from recbole_mm.data.protocols import (
    COLD_ITEMS,
    NEW_SESSIONS,
    Part,
    ProtocolSettings,
    check_new_sessions,
    draw_cold,
    parts_of,
)
from recbole_mm.data.reading import SafeReading
from recbole_mm.errors import DatasetError, SettingError


class MultimodalDataset(ItemContent, SafeReading, IndexedHistories, SequentialDataset):
    """A dataset folder, and the features and columns of its items by item id.

    Differs from RecBole's ``SequentialDataset`` in this:
    - histories are ordered by exact time, then by line of the file; RecBole compares float32, in steps of 128 s;
    - item ids depend on the interactions alone: reading ``.item`` neither adds candidates nor drops interactions;
    - a history is cut to its newest items, or refused if the folder was split beforehand, never cut to its oldest;
    - prefixes are places in flat columns, gathered batch by batch (`recbole_mm.data.histories`);
    - the setting ``protocol`` parts one file of interactions by exact time, by new sessions or by cold items.

    Ids follow RecBole: items are 1..N-1 and 0 is padding.

    Raises:
        DatasetError: the interactions, or a feature or column that is asked for, cannot be used.
        SettingError: the setting ``knockout`` cannot be read.
    """

    def __init__(self, config) -> None:
        self.folder = Path(config["data_path"])
        self._prepare_content(config)
        self.protocol = None if config["benchmark_filename"] else ProtocolSettings.of(config)  # None: RecBole parts it
        self._seen: Tensor | None = None
        super().__init__(config)
        self._cold = self._draw_cold() if self.protocol and self.protocol.protocol == COLD_ITEMS else None

    # ------------------------------------------------ the protocol

    def candidates(self) -> Tensor | None:
        """[N] bool, True for the items that validation and test rank; None for all of them."""
        if self._cold is None or self.protocol.candidates == "all":
            return None
        return torch.from_numpy(self._cold > 0)

    def n_candidates(self) -> int:
        """How many items validation and test rank."""
        candidates = self.candidates()
        return self.item_num - 1 if candidates is None else int(candidates.sum())

    def seen_in_training(self) -> Tensor | None:
        """[N] bool, True for items that some training row holds; False for padding; None before `build`."""
        return self._seen

    def _draw_cold(self) -> np.ndarray:
        """[N] int64: 0 for items of training, 1 and 2 for those that validation and test ask for."""
        settings, time = self.protocol, self.inter_feat[self.time_field].to_numpy()
        first_time = np.full(self.item_num, np.inf)
        np.minimum.at(first_time, self.inter_feat[self.iid_field].to_numpy(), time)
        tokens = [str(token) for token in self.field2id_token[self.iid_field][1:]]
        drawn = draw_cold(
            tokens,
            first_time[1:],
            share=settings.cold_share,
            choice=settings.cold_choice,
            seed=settings.cold_seed,
        )
        return np.concatenate([[0], drawn])

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
            if self.config["protocol"] == NEW_SESSIONS:
                sessions = pd.factorize(frame[self.uid_field])[0]
                check_new_sessions(sessions, self.file_size_list, name=self.dataset_name)
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

    def _filter_by_inter_num(self) -> None:
        """As RecBole's, which counts all users and items even where every number is allowed."""
        intervals = [self._parse_intervals_str(self.config[f"{who}_inter_num_interval"]) for who in ("user", "item")]
        if not all(interval is None or _allows_all(interval) for interval in intervals):
            super()._filter_by_inter_num()

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

        The same rows in the same order as RecBole's, wherever float32 does not merge different times. With a protocol
        of ours, the rows of training come first, then those of validation and of test.
        """
        self._aug_presets()
        users = self.inter_feat[self.uid_field].numpy()
        n_of_user = np.unique(users, return_counts=True)[1]
        if alone := int((n_of_user == 1).sum()):
            self.logger.info(f"{alone} users with a single interaction have no next item and are left out")
        if (n_of_user == 1).all():
            raise DatasetError(f"{self.dataset_name}: no user has two interactions, so there is nothing to predict")
        parts = [Part(np.arange(len(users)), np.ones(len(users), dtype=bool))]
        if self.protocol:
            items = self.inter_feat[self.iid_field].numpy()
            parts, note = parts_of(self.protocol, user=users, item=items, time=self._exact_time, cold=self._cold)
            self.logger.info(f"protocol {self.protocol.protocol}: {note}")
        spans = [self._spans(part, users) for part in parts]
        self._part_sizes = [len(target) for _, target in spans]
        known, behind = _beside_each_other([part.known for part in parts], n=len(users))
        start, target = (
            np.concatenate([span[end] + n for span, n in zip(spans, behind, strict=True)]) for end in (0, 1)
        )
        feat = self.inter_feat.interaction
        if known is not None:
            feat = {field: values[torch.from_numpy(known)] for field, values in feat.items()}
        self.inter_feat = self._rows_of_prefixes(feat, start, target)

    def _spans(self, part: Part, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each row of a part, where its prefix begins and where its target is, both as places in ``part.known``."""
        first, place = first_of_user(users[part.known])
        target = np.flatnonzero(part.asked & (place > first))
        target = target[np.argsort(self._exact_time[part.known[target]], kind="stable")]
        return np.maximum(first[target], target - self.max_item_list_len), target

    def build(self) -> list[MultimodalDataset]:
        """Training, validation and test."""
        parts = self._parts_of_protocol() if self.protocol else super().build()
        for name, part in zip(("training", "validation", "test"), parts, strict=True):
            if len(part) == 0:
                raise DatasetError(self._empty_part(name))
        self._seen = torch.zeros(self.item_num, dtype=torch.bool)
        feat = parts[0].inter_feat
        fields = (self.iid_field, self.item_id_list_field)
        for items in [feat.held(self.iid_field)] if isinstance(feat, Histories) else [feat[field] for field in fields]:
            self._seen[items] = True
        self._seen[0] = False
        for part in parts:
            part._seen = self._seen
        self._report_parts(parts)
        return parts

    def _parts_of_protocol(self) -> list[MultimodalDataset]:
        self._change_feat_format()
        self._drop_unused_col()
        ends = np.cumsum([0, *self._part_sizes])
        return [self.copy(self.inter_feat[start:end]) for start, end in zip(ends, ends[1:], strict=False)]

    def _empty_part(self, name: str) -> str:
        if self.protocol is None:
            return (
                f"{self.dataset_name}: no {name} rows are left by eval_args {self.config['eval_args']['split']}\n"
                "  leave-one-out needs users with four interactions; choose another split or a looser filter"
            )
        setting = "cold_share" if self._cold is not None else "time_cuts" if self.protocol.time_cuts else "time_shares"
        return (
            f"{self.dataset_name}: no {name} rows are left by protocol {self.protocol.protocol} with {setting} "
            f"{getattr(self.protocol, setting)}\n  choose another {setting}, or another protocol"
        )

    def _report_parts(self, parts: list[MultimodalDataset]) -> None:
        rows = [f"{len(part)} {name}" for name, part in zip(SPLITS, parts, strict=True)]
        targets = parts[2].inter_feat[self.iid_field]
        n_unseen, ranked = int((~self._seen[targets]).sum()), self.n_candidates()
        self.logger.info(
            f"rows: {', '.join(rows)}; {ranked} items are ranked; {n_unseen} test targets are items that training "
            "never has"
        )


def _allows_all(intervals: list[tuple[str, float, float, str]]) -> bool:
    """Whether intervals of RecBole's leave out no number of interactions, which is at least 1."""
    return len(intervals) == 1 and intervals[0][1] <= 0 and intervals[0][2] == float("inf")


def _beside_each_other(known: list[np.ndarray], *, n: int) -> tuple[np.ndarray | None, list[int]]:
    """What the parts know, in a row and where each begins; parts that know the same share it. None for all n."""
    blocks: list[np.ndarray] = []
    begins: list[int] = []
    for part in known:
        sizes = [0, *map(len, blocks)]
        same = next((i for i, block in enumerate(blocks) if np.array_equal(block, part)), len(blocks))
        begins.append(sum(sizes[: same + 1]))
        if same == len(blocks):
            blocks.append(part)
    if len(blocks) == 1 and len(blocks[0]) == n:
        return None, begins
    return np.concatenate(blocks), begins
