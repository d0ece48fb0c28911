"""Who is trained on what and asked for what, of one file of interactions; and what a protocol is called in a table.

leave-one-out   RecBole's: the last item of each user is the test, the last but one validation
time            |--- training ---|valid_from|--- validation ---|test_from|--- test ---|    by the time of the target
new-sessions    the same two moments, by the time when a user (or session) begins; nobody is in two parts
cold-items      some items are taken out of training altogether; they alone are asked for

In ``time``, what stands before a target is all its user did before, also in an earlier part. In ``new-sessions``,
training knows nothing that happened at ``valid_from`` or later and validation nothing at ``test_from`` or later: later
interactions of their users are left out. In ``cold-items``, half of the items taken out are the targets of validation,
half those of test, and both rank all of them; what stands before a target is all its user did before. Our models leave
them out of the softmax in training; for RecBole's own models they are items there, or negatives, that nobody takes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from recbole_mm.data.cuts import Cuts, cuts_by_share
from recbole_mm.errors import DatasetError, SettingError, nearest

LEAVE_ONE_OUT, TIME, NEW_SESSIONS, COLD_ITEMS = "leave-one-out", "time", "new-sessions", "cold-items"
PROTOCOLS = (LEAVE_ONE_OUT, TIME, NEW_SESSIONS, COLD_ITEMS)
MADE_HERE = (TIME, NEW_SESSIONS, COLD_ITEMS)  # the others are RecBole's work
GIVEN_SPLIT = "given split"
DEFAULT_SPLIT = {"LS": "valid_and_test"}
_LATER = "training sees interactions later than the tested ones"
LEAKS = {
    LEAVE_ONE_OUT: f"leaks future information: {_LATER}",
    "ratio per user": f"leaks future information: {_LATER}",
    "RecBole's TS": "validation is not later than training: its rows are the last ones of each user",
    COLD_ITEMS: f"leaks future information: {_LATER}, though none with the tested items",
    GIVEN_SPLIT: "parted beforehand, by a rule that the folder does not tell",
}
BELONGS_TO = {  # settings that mean something in some protocols only
    "time_shares": (TIME, NEW_SESSIONS),
    "time_cuts": (TIME, NEW_SESSIONS),
    "cold_share": (COLD_ITEMS,),
    "cold_choice": (COLD_ITEMS,),
    "cold_seed": (COLD_ITEMS,),
    "candidates": (COLD_ITEMS,),
}


def protocol_label(protocol: str) -> str | None:
    """What a reader of results under this protocol must know; None for nothing."""
    return LEAKS.get(protocol)


# ------------------------------------------------ which protocol


def protocol_of_plain(asked: str | None, eval_args: Mapping[str, Any], *, given_split: bool, origin: str = "") -> str:
    """The protocol of a folder with one file of interactions.

    Args:
        asked: the setting ``protocol``.
        eval_args: RecBole's, complete.
        given_split: whether somebody gave a split in ``eval_args``.
        origin: where ``asked`` came from, for messages.

    Raises:
        SettingError: no such protocol, or ``eval_args`` asks for another one.
    """
    _check_name(asked, origin)
    split, group_by = eval_args["split"], eval_args.get("group_by", "user")
    if asked in MADE_HERE and given_split or asked == LEAVE_ONE_OUT and split != DEFAULT_SPLIT:
        raise SettingError(
            f"protocol {asked}{origin} and eval_args split {split!r} are two ways to part the data; leave one out"
        )
    if asked is not None:
        return asked
    if "RS" in split:
        return "ratio in time order" if str(group_by).lower() == "none" else "ratio per user"
    return "RecBole's TS" if "TS" in split else LEAVE_ONE_OUT


def protocol_of_parts(asked: str | None, manifest_settings: Mapping[str, Any], *, name: str, origin: str = "") -> str:
    """The protocol of a folder with a file each for training, validation and test.

    Args:
        asked: the setting ``protocol``; "new-sessions" may be asked for where the folder does not tell, and
            `check_new_sessions` then looks.
        manifest_settings: how the folder was prepared, as its manifest tells.
        name: of the folder.

    Raises:
        SettingError: no such protocol, or the parts were made by another one.
    """
    _check_name(asked, origin)
    made = manifest_settings.get("protocol")
    if made == "sessions" or made is None and manifest_settings.get("made_by") == "sessions":
        made = {"time": NEW_SESSIONS}.get(manifest_settings.get("split"), manifest_settings.get("split"))
    made = made if made in PROTOCOLS else None
    if asked in (None, made):
        return made or GIVEN_SPLIT
    if asked == NEW_SESSIONS and made is None:
        return asked
    told = f"parted by {made}" if made else "parted by a rule that its manifest does not tell"
    raise SettingError(
        f"protocol {asked}{origin} cannot be made of {name}: it has a file each for training, validation and test, "
        f"{told}\n  leave --protocol out, or use a folder with one file {name}.inter"
    )


def _check_name(asked: str | None, origin: str) -> None:
    if asked is not None and asked not in PROTOCOLS:
        raise SettingError(
            f"protocol must be one of {', '.join(PROTOCOLS)}, found {asked!r}{origin}{nearest(str(asked), PROTOCOLS)}"
        )


def check_new_sessions(sessions: np.ndarray, part_sizes: Sequence[int], *, name: str) -> None:
    """Refuse sessions that occur in two parts.

    Args:
        sessions: [R] session numbers of all rows, training first.
        part_sizes: rows of training, validation and test.

    Raises:
        DatasetError: naming how many there are.
    """
    parts = [np.unique(part) for part in np.split(sessions, np.cumsum(part_sizes)[:-1])]
    found, times = np.unique(np.concatenate(parts), return_counts=True)
    if n_shared := int((times > 1).sum()):
        raise DatasetError(
            f"{name}: {n_shared} of {len(found)} sessions are in two of training, validation and test, and protocol "
            f"{NEW_SESSIONS} keeps them apart\n  give each session an id of its own, or prepare the folder again"
        )


# ------------------------------------------------ settings


@dataclass(frozen=True)
class ProtocolSettings:
    """How a protocol that is made here is made.

    Attributes:
        protocol: one of ``MADE_HERE``.
        time_shares: of training, validation and test, in proportion: of the interactions, or in "new-sessions" of the
            users with two or more of them.
        time_cuts: instead of shares, the moments where validation and where test begin, in the unit of the file.
        cold_share: of the items, taken out of training.
        cold_choice: "hash" takes items by a hash of ``cold_seed`` and their token, "newest" those that came last.
        cold_seed: at least 0.
        candidates: what "cold-items" ranks, "cold" items alone or "all".

    Raises:
        SettingError: a value that cannot be.
    """

    protocol: str
    time_shares: tuple[float, ...] = (0.8, 0.1, 0.1)
    time_cuts: tuple[float, ...] | None = None
    cold_share: float = 0.1
    cold_choice: str = "hash"
    cold_seed: int = 2020
    candidates: str = "cold"

    @classmethod
    def of(cls, config: Any) -> ProtocolSettings | None:
        """From a run's settings; None if the protocol is none that is made here."""
        if config["protocol"] not in MADE_HERE:
            return None
        return cls(
            protocol=config["protocol"],
            time_shares=config["time_shares"],
            time_cuts=config["time_cuts"],
            cold_share=config["cold_share"],
            cold_choice=config["cold_choice"],
            cold_seed=config["cold_seed"],
            candidates=config["candidates"],
        )

    def __post_init__(self) -> None:
        shares, cuts = self.time_shares, self.time_cuts
        if not (_numbers(shares, 3) and all(share > 0 for share in shares)):
            raise SettingError(
                f"time_shares must be three numbers > 0, of training, validation and test, found {shares!r}"
            )
        if cuts is not None and not (_numbers(cuts, 2) and cuts[0] < cuts[1]):
            raise SettingError(
                "time_cuts must be two moments, where validation and where test begin, in the unit of the timestamps, "
                f"such as [1400000000, 1500000000], found {cuts!r}"
            )

    def cuts(self, time: np.ndarray) -> Cuts:
        """The two moments that part these times.

        Raises:
            DatasetError: fewer than three different times.
        """
        if self.time_cuts is not None:
            return Cuts(*map(float, self.time_cuts))
        what = "interactions" if self.protocol == TIME else "beginnings of users with two interactions or more"
        _, valid, test = (share / sum(self.time_shares) for share in self.time_shares)
        return cuts_by_share(time, valid_share=valid, test_share=test, what=what)


def _numbers(values: Any, n: int) -> bool:
    return (
        isinstance(values, (list, tuple))
        and len(values) == n
        and all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in values)
    )


# ------------------------------------------------ parts


class Part(NamedTuple):
    """The interactions of one part: of training, validation or test.

    Attributes:
        known: [k] ascending positions of the interactions that it may hold, as targets or before them.
        asked: [k] bool, those that are a target if something stands before them.
    """

    known: np.ndarray
    asked: np.ndarray


def parts_of(
    settings: ProtocolSettings, *, user: np.ndarray, item: np.ndarray, time: np.ndarray, cold: np.ndarray | None
) -> tuple[list[Part], str]:
    """Training, validation and test of a protocol, and how they came about, in words.

    Args:
        user, item: [n] numbers, interactions ordered by user, then by time.
        time: [n] float64.
        cold: [N], of `draw_cold`; for "cold-items".

    Raises:
        DatasetError: fewer than three different times.
    """
    if settings.protocol == TIME:
        cuts = settings.cuts(time)
        part = cuts.parts(time)
        return [Part(np.arange(len(time)), part == number) for number in range(3)], str(cuts)
    if settings.protocol == COLD_ITEMS:
        warm = np.flatnonzero(cold[item] == 0)
        parts = [Part(warm, np.ones(len(warm), dtype=bool))]
        parts += [Part(np.arange(len(item)), cold[item] == number) for number in (1, 2)]
        chosen = f"by a hash of seed {settings.cold_seed} and name" if settings.cold_choice == "hash" else "the newest"
        return parts, (
            f"{int((cold > 0).sum())} of {len(cold) - 1} items taken out of training, {chosen}, "
            f"and {len(item) - len(warm)} of {len(item)} interactions with them"
        )
    return _new_sessions(settings, user, time)


def _new_sessions(settings: ProtocolSettings, user: np.ndarray, time: np.ndarray) -> tuple[list[Part], str]:
    first = np.diff(user, prepend=-1) != 0  # [n]
    several = np.diff(np.append(np.flatnonzero(first), len(user))) > 1  # [users]
    began = time[first]  # [users]
    cuts = settings.cuts(began[several])
    number = np.cumsum(first) - 1  # [n] users in a row
    part = cuts.parts(began)[number]
    ends = (cuts.valid_from, cuts.test_from, np.inf)
    known = [np.flatnonzero((part == p) & (time < end)) for p, end in enumerate(ends)]
    n_out = len(user) - sum(map(len, known))
    return [Part(k, np.ones(len(k), dtype=bool)) for k in known], (
        f"{cuts}, by the time a user begins; {n_out} of {len(user)} interactions left out, "
        "because they are later than the part of their user"
    )


def draw_cold(
    tokens: Sequence[str], first_time: np.ndarray, *, share: float, choice: str = "hash", seed: int = 2020
) -> np.ndarray:
    """Which items are taken out of training: [n] int64, 0 stays, 1 is asked for in validation, 2 in test.

    ``round(share * n)`` items, by turns for test and validation. With "hash", an item's luck depends on its token and
    the seed only: a larger share takes the same items and more. With "newest", those whose first interaction is latest;
    among equal times, by hash.

    Args:
        tokens: of the items, n of them.
        first_time: [n], of their first interaction.

    Raises:
        DatasetError: the share comes to fewer than two items.
    """
    n_cold = round(share * len(tokens))
    if n_cold < 2:
        raise DatasetError(
            f"cold_share {share} of {len(tokens)} items is {n_cold}, and validation and test need one each; "
            "choose a larger share"
        )
    luck = [hashlib.sha256(f"{seed} {token}".encode()).digest() for token in tokens]
    order = sorted(range(len(tokens)), key=luck.__getitem__)
    if choice == "newest":
        order.sort(key=lambda entry: -first_time[entry])  # stable
    drawn = np.zeros(len(tokens), dtype=np.int64)
    drawn[order[0:n_cold:2]], drawn[order[1:n_cold:2]] = 2, 1
    return drawn


# ------------------------------------------------ what a result was computed on


def test_fingerprint(dataset: Any, test_data: Any) -> str:
    """16 hex digits of the test rows, in order, and of the candidate items.

    Metrics of two runs can be compared where it is the same.

    Args:
        dataset: a `MultimodalDataset`.
        test_data: its test part, or a loader of that.
    """
    part = getattr(test_data, "_dataset", test_data)
    users, items = (dataset.field2id_token[field] for field in (dataset.uid_field, dataset.iid_field))
    feat = part.inter_feat
    rows = zip(users[feat[part.uid_field].numpy()], items[feat[part.iid_field].numpy()], strict=True)
    candidates = dataset.candidates()
    ranked = items[1:] if candidates is None else items[candidates.numpy()]
    digest = hashlib.sha256("".join(f"{user}\t{item}\n" for user, item in rows).encode())
    digest.update("".join(f"\n{item}" for item in sorted(map(str, ranked))).encode())
    return digest.hexdigest()[:16]
