"""How a source is prepared: the settings, their checks, and which of them mean something together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dataset_prep.cleaning import DUPLICATES, POLICIES, WITHOUT
from dataset_prep.session_settings import CHOICES as SESSION_CHOICES
from dataset_prep.session_settings import Meant, SessionSettings, refuse_what_means_nothing, settings_that_apply
from dataset_prep.sources.rejects import MAX_SHARE
from recbole_mm.errors import SettingError, nearest

PROTOCOLS = ("leave-one-out", "time", "sessions")
CHOICES = {
    **{name: known for name, known in SESSION_CHOICES.items() if name not in ("bad_rows", "time_unit")},
    "protocol": PROTOCOLS,
    "duplicates": DUPLICATES,
    **{f"without_{what}": POLICIES for what in WITHOUT},
}


@dataclass(frozen=True)
class PreparationSettings:
    """How a dataset is prepared.

    Attributes:
        protocol: "leave-one-out" leaves the split to RecBole; "time" cuts the histories of users at two moments for
            all; "sessions" makes sessions and splits those.
        duplicates: of `cleaning.drop_duplicates`.
        min_user, min_item: interactions of a user and of an item, at least, until nothing changes. With "sessions",
            users may have fewer afterwards, items not.
        without_metadata, without_text, without_image, without_price: "keep" or "drop" items without a row in the
            metadata, without title and description, without a picture's address, without a price.
        max_rejected: share of a file's rows that may be unusable.
        sessions, gap, session_order, repeats, min_length, split, prefixes: of `SessionSettings`; for "sessions".
        longest: newest items that are kept: of a session, or before a target with "time".
        valid_share, test_share: of the interactions for "time", of the sessions for "sessions".
        valid_from, test_from, cuts_from: moments instead of shares, as in `SessionSettings`.
        cold_items, cold_share: of `protocols.split_by_time` and `SessionSettings`.
        seed: of the shuffling of sessions and of the draw of cold items.
    """

    protocol: str = "leave-one-out"
    duplicates: str = "keep"
    min_user: int = 5
    min_item: int = 5
    without_metadata: str = "keep"
    without_text: str = "keep"
    without_image: str = "keep"
    without_price: str = "keep"
    max_rejected: float = MAX_SHARE
    sessions: str | None = None
    gap: float = 1800.0
    session_order: str = "given"
    repeats: str = "keep"
    min_length: int = 2
    split: str = "time"
    prefixes: str = "train"
    longest: int = 50
    valid_share: float = 0.1
    test_share: float = 0.1
    valid_from: str | float | None = None
    test_from: str | float | None = None
    cuts_from: Path | None = None
    cold_items: str = "drop"
    cold_share: float = 0.0
    seed: int = 2020

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known and not (name == "sessions" and self.sessions is None):
                raise SettingError(f"{name} is {getattr(self, name)!r}, expected one of {list(known)}")
        for name in ("min_user", "min_item"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name} is {getattr(self, name)}, expected at least 1")
        if not 0 <= self.max_rejected <= 1:
            raise SettingError(f"max_rejected is {self.max_rejected}, expected a share from 0 to 1")
        if self.protocol == "sessions" and self.sessions is None:
            raise SettingError(f"protocol sessions needs sessions, one of {list(SESSION_CHOICES['sessions'])}")
        if self.sessions is not None and self.protocol != "sessions":
            raise SettingError(
                f"sessions is {self.sessions!r}, which belongs to protocol sessions, not {self.protocol}"
            )
        self.session_settings()  # checks the others

    @property
    def has_cuts(self) -> bool:
        """Whether cut points are given, rather than shares."""
        return self.valid_from is not None or self.cuts_from is not None

    def session_settings(self) -> SessionSettings:
        """Those of the sessions; "user" where there are none, whose cut points and cold items apply all the same."""
        names = {field.name for field in fields(self)} & {field.name for field in fields(SessionSettings)}
        values = {name: getattr(self, name) for name in names - {"sessions", "duplicates"}}
        return SessionSettings(sessions=self.sessions or "user", min_item_count=self.min_item, **values)

    def that_apply(self) -> dict[str, Any]:
        """Without those that mean nothing here; for the manifest."""
        return settings_that_apply(self, MEANT_WHEN)


def _by_time(settings: PreparationSettings) -> bool:
    return settings.protocol == "time" or settings.protocol == "sessions" and settings.split == "time"


_SESSIONS = ("--protocol sessions", lambda s: s.protocol == "sessions")
_SPLIT = ("--protocol time or sessions", lambda s: s.protocol != "leave-one-out")
_SHARES = ("--protocol time, or sessions split by time, without cut points", lambda s: _by_time(s) and not s.has_cuts)
_BY_TIME = "--protocol time, or sessions split by time"
MEANT_WHEN: Meant = {
    **dict.fromkeys(("sessions", "session_order", "repeats", "min_length", "split", "prefixes"), _SESSIONS),
    "gap": ("--sessions gap", lambda s: s.sessions == "gap"),
    **dict.fromkeys(("longest", "cold_items"), _SPLIT),
    "seed": ("--cold-share or --session-order random", lambda s: s.cold_share > 0 or s.session_order == "random"),
    **dict.fromkeys(("valid_share", "test_share"), _SHARES),
    "valid_from": (_BY_TIME, lambda s: _by_time(s) and s.valid_from is not None),
    "test_from": (_BY_TIME, lambda s: _by_time(s) and s.test_from is not None),
    "cuts_from": (_BY_TIME, lambda s: _by_time(s) and s.cuts_from is not None),
    "cold_share": (_BY_TIME, _by_time),
}


def settings_of(given: Mapping[str, Any]) -> PreparationSettings:
    """Settings out of those that somebody gave, by name.

    Raises:
        SettingError: an unknown name, a wrong value, or one that means nothing with the others.
    """
    known = [field.name for field in fields(PreparationSettings)]
    for name in given:
        if name not in known:
            raise SettingError(f"no setting {name!r} of the preparation{nearest(name, known)}; there are {known}")
    settings = PreparationSettings(**given)
    refuse_what_means_nothing(settings, given, MEANT_WHEN)
    return settings
