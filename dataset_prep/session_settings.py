"""How sessions are made: the settings, their checks, and which of them mean something together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dataset_prep.interactions import SECONDS
from dataset_prep.protocols import COLD_ITEMS, check_cold_settings, cuts_of_folder, given_cuts
from recbole_mm.data.cuts import Cuts
from recbole_mm.errors import SettingError

DEFAULT_LIST_LENGTH = 50  # RecBole's MAX_ITEM_LIST_LENGTH
CHOICES = {
    "sessions": ("basket", "gap", "day", "user"),
    "session_order": ("given", "random"),
    "duplicates": ("keep", "first"),
    "repeats": ("keep", "drop"),
    "split": ("time", "leave-one-out"),
    "cold_items": COLD_ITEMS,
    "prefixes": ("train", "all", "none"),
    "bad_rows": ("refuse", "drop"),
    "time_unit": tuple(SECONDS),
}


@dataclass(frozen=True)
class SessionSettings:
    """How sessions are made.

    Attributes:
        sessions: "basket" by the basket's id, within a user if there are users; "gap": a user's interactions, parted
            where more than ``gap`` seconds pass; "day": a user's on one UTC day; "user": all of a user's.
        gap: seconds, > 0.
        session_order: "given" by time, then by line of the file; "random" shuffles each session after the cut.
        seed: of the shuffling and of the draw of cold items, at least 0.
        duplicates: of rows equal in user, item and time (and basket, for "basket"), keep all or the "first".
        repeats: "drop" an item that comes directly after itself in a session.
        min_item_count, min_length: interactions of an item, and items of a session, at least; checked by turns until
            nothing changes. Before the cut and the split, after which an item may be rarer. min_length is at least 2.
        longest: sessions keep their newest items, at least 2; prefixes then have at most ``longest - 1``.
        split: "time": sessions that end last are the test. "leave-one-out": of each session of at least 4 items, the
            last is the test, the last but one validation, the rest training; shorter ones are training only.
        valid_share, test_share: of the sessions, for "time".
        valid_from, test_from: instead of shares: sessions whose last time is at or after these are validation and
            test. Unix seconds or dates such as 2016-07-01, both or none.
        cuts_from: instead of these: a prepared folder with cut points in its manifest.
        cold_items: what happens to items of validation and test that training has not: "drop" removes them, and then
            sessions of fewer than 2 items; "keep" leaves them as candidates that were never trained, and lists them.
        cold_share: of the items that training and another part have, taken out of training; for "time" and "keep".
        prefixes: a row for each item after the first, for "train", for "all" parts or for "none"; otherwise one row
            per session, whose target is the last item. With "leave-one-out", validation and test have one row each.
        bad_rows: "refuse" or "drop" rows whose ids are empty, hold spaces or are RecBole's padding, or whose time is
            no number >= 0; and second rows of an item.
        time_unit: of the times, "s", "ms" or "us".
    """

    sessions: str
    gap: float = 1800.0
    session_order: str = "given"
    seed: int = 2020
    duplicates: str = "keep"
    repeats: str = "keep"
    min_item_count: int = 5
    min_length: int = 2
    longest: int = 50
    split: str = "time"
    valid_share: float = 0.1
    test_share: float = 0.1
    valid_from: str | float | None = None
    test_from: str | float | None = None
    cuts_from: Path | None = None
    cold_items: str = "drop"
    cold_share: float = 0.0
    prefixes: str = "train"
    bad_rows: str = "refuse"
    time_unit: str = "s"

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise SettingError(f"{name} is {getattr(self, name)!r}, expected one of {list(known)}")
        for name, lowest in (("min_item_count", 1), ("min_length", 2), ("longest", 2), ("seed", 0)):
            if getattr(self, name) < lowest:
                raise SettingError(f"{name} is {getattr(self, name)}, expected at least {lowest}")
        if self.split == "leave-one-out" and self.longest < 4:
            raise SettingError(f"longest is {self.longest}, and leave-one-out needs sessions of 4 items")
        if not self.gap > 0:
            raise SettingError(f"gap is {self.gap}, expected more than 0 seconds")
        check_shares(self.valid_share, self.test_share)
        check_cuts(self.valid_from, self.test_from, self.cuts_from)
        check_cold_settings(self.cold_items, self.cold_share)
        if self.split != "time" and (self.cold_share or self.has_cuts):
            raise SettingError(f"cut points and cold_share belong to split time, and split is {self.split!r}")

    @property
    def has_cuts(self) -> bool:
        """Whether cut points are given, rather than shares."""
        return self.valid_from is not None or self.cuts_from is not None

    def cuts(self) -> Cuts | None:
        """The cut points that are given, or None.

        Raises:
            DatasetError: ``cuts_from`` has none.
        """
        if self.cuts_from is not None:
            return cuts_of_folder(self.cuts_from)
        return given_cuts(self.valid_from, self.test_from) if self.has_cuts else None

    def that_apply(self) -> dict[str, Any]:
        """Without those that mean nothing here, such as the gap of sessions by day; for the manifest."""
        return settings_that_apply(self, MEANT_WHEN)


def check_shares(valid_share: float, test_share: float) -> None:
    if not (valid_share > 0 and test_share > 0 and valid_share + test_share < 1):
        raise SettingError(
            f"valid_share and test_share are {valid_share} and {test_share}, "
            "expected each more than 0 and both together less than 1"
        )


def check_cuts(valid_from: str | float | None, test_from: str | float | None, cuts_from: Path | None) -> None:
    if (valid_from is None) != (test_from is None):
        raise SettingError(f"valid_from is {valid_from} and test_from {test_from}; expected both or none")
    if valid_from is not None:
        given_cuts(valid_from, test_from)
        if cuts_from is not None:
            raise SettingError("cuts_from gives cut points, and so do valid_from and test_from; leave one out")


Meant = dict[str, tuple[str, Callable[[Any], bool]]]  # when a setting means something: in words, and as a condition
MEANT_WHEN: Meant = {
    "gap": ("--sessions gap", lambda s: s.sessions == "gap"),
    "seed": ("--session-order random or --cold-share", lambda s: s.session_order == "random" or s.cold_share > 0),
    "valid_share": ("--split time without cut points", lambda s: s.split == "time" and not s.has_cuts),
    "test_share": ("--split time without cut points", lambda s: s.split == "time" and not s.has_cuts),
    "valid_from": ("--split time", lambda s: s.valid_from is not None),
    "test_from": ("--split time", lambda s: s.test_from is not None),
    "cuts_from": ("--split time", lambda s: s.cuts_from is not None),
    "cold_share": ("--split time", lambda s: s.split == "time"),
}


def settings_that_apply(settings: Any, meant_when: Meant) -> dict[str, Any]:
    """The fields of a dataclass of settings that mean something; folders by their name only."""
    return {
        name: value.name if isinstance(value, Path) else value
        for name, value in asdict(settings).items()
        if name not in meant_when or meant_when[name][1](settings)
    }


def refuse_what_means_nothing(settings: Any, given: Mapping[str, Any], meant_when: Meant) -> None:
    """Refuse settings that were given and that the others make meaningless.

    Raises:
        SettingError: naming the option, and what it belongs to.
    """
    for name in given:
        if name in meant_when and not meant_when[name][1](settings):
            raise SettingError(f"{option_of(name)} belongs to {meant_when[name][0]}; leave it out")


def option_of(name: str) -> str:
    """Of the command line, for a setting."""
    return "--" + name.replace("_", "-")
