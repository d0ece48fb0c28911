"""Ids of users and items: kept byte for byte, or set aside."""

from __future__ import annotations

import re

from recbole_mm.data.layout import PADDING_TOKEN

LONGEST_ID = 1_000  # characters
_PARTS = re.compile(r"[\s\x00-\x1f\x7f]")  # a blank parts the items of a list, a tab or line break the fields of a row


def id_problem(token: object) -> str | None:
    """Why a value cannot be an id, as a short name, or None: nothing else is wrong with ``NA``, ``00123`` or ``../x``.

    Args:
        token: as it stands in the file; None is a missing one.
    """
    if token is None:
        return "missing_id"
    if type(token) is not str:
        return "id_is_no_text"
    if not token or token.isspace():
        return "empty_id"
    if token == PADDING_TOKEN:
        return "padding_id"
    if len(token) > LONGEST_ID:
        return "id_too_long"
    if _PARTS.search(token):
        return "id_has_separator"
    return None
