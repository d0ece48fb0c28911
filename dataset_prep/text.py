"""Catalogue text: plain text out of what shops store, and sentences out of plain text."""

from __future__ import annotations

import html
import re

MAX_UNESCAPES = 3  # catalogues escape twice at times ("&amp;amp;"); three rounds also end on hostile text

# What is not closed runs to the end, as in a browser; all patterns take linear time on hostile text.
_HIDDEN = re.compile(r"<(script|style)\b[^<>]*>.*?(?:</\1\s*>|\Z)|<!--.*?(?:-->|\Z)", re.IGNORECASE | re.DOTALL)
_BLOCK_TAG = re.compile(r"</?(?:br|p|div|li|ul|ol|tr|table|h[1-6])\b[^<>]*>", re.IGNORECASE)
_TAG = re.compile(r"</?[A-Za-z][^<>]*>")  # "< 5" and "<3" are no tags
_BLANKS = re.compile(r"[^\S\n]+")
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f\u200b\ufeff]")
# After . ! ? and closing quotes, before something that can begin a sentence; CJK full stops need no space.
_SENTENCE_END = re.compile(r"(?<=[.!?…])[\"'”’)\]]*\s+(?=[\"'“‘(\[]?[A-Z0-9À-ÖØ-Þ])|(?<=[。！？])\s*| ?[•\n]\s*")


def clean_text(text: str) -> str:
    """Plain text in one line: entities resolved, tags removed, white space collapsed.

    >>> clean_text("Salt &amp;amp; <b>pepper</b>")
    'Salt & pepper'
    """
    return " ".join(_plain(text).split())


def sentences(text: str) -> list[str]:
    """The sentences of a text, cleaned, in order; none for an empty text.

    Splits after ``.``, ``!`` or ``?`` before a capital letter or digit, at line breaks of HTML and at bullets. An
    abbreviation before a capital letter ("Dr. Who") is split too: harmless for features, and it needs no word list.

    >>> sentences("Warm. Dries in 2.5 hours!<br>Made of wool")
    ['Warm.', 'Dries in 2.5 hours!', 'Made of wool']
    """
    parts = (" ".join(part.split()) for part in _SENTENCE_END.split(_plain(text)))
    return [part for part in parts if any(character.isalnum() for character in part)]


def _plain(text: str) -> str:
    """Text without entities and tags; a tag that breaks the line becomes a line break."""
    for _ in range(MAX_UNESCAPES):
        before, text = text, html.unescape(text)
        if text == before:
            break
    text = _HIDDEN.sub(" ", text)
    text = _TAG.sub("", _BLOCK_TAG.sub("\n", text))
    return _BLANKS.sub(" ", _CONTROL.sub("", text))
