"""Catalogue text: plain text out of what shops store, and sentences out of plain text."""

from __future__ import annotations

import html
import re

MAX_ROUNDS = 3  # catalogues escape twice at times ("&amp;amp;"); what is nested deeper is hostile

# What is not closed runs to the end, as in a browser; all patterns take linear time on hostile text.
_HIDDEN = re.compile(r"<(script|style)\b[^<>]*>.*?(?:</\1\s*>|\Z)|<!--.*?(?:-->|\Z)", re.IGNORECASE | re.DOTALL)
_BLOCK_TAG = re.compile(r"</?(?:br|p|div|li|ul|ol|tr|table|h[1-6])\b[^<>]*>", re.IGNORECASE)
_TAG = re.compile(r"</?[A-Za-z][^<>]*>")  # "< 5" and "<3" are no tags
_AMPERSANDS = re.compile("&(?:amp;)+")
_BLANKS = re.compile(r"[^\S\n]+")
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u200b\ufeff]")
# After . ! ? and closing quotes, before something that can begin a sentence; CJK full stops need no space.
_QUOTES, _BEGINNING = "[\"'”’)\\]]*", "[\"'“‘(\\[]?[A-Z0-9À-ÖØ-Þ]"
_SENTENCE_END = re.compile(rf"(?<=[.!?…]){_QUOTES}\s+(?={_BEGINNING})|(?<=[。！？])\s*| ?[•\n]\s*")
_FIRST = re.compile(_BEGINNING)


def clean_text(text: str) -> str:
    """Plain text in one line: entities resolved, tags removed, white space collapsed. Cleaned twice, it is the same.

    >>> clean_text("Salt &amp;amp; <b>pepper</b>")
    'Salt & pepper'
    """
    return " ".join(_plain(text).split())


def one_line(text: str) -> str:
    """`clean_text`, but lines of HTML stay apart: ``sentences(one_line(text)) == sentences(text)``.

    Between two lines that `sentences` would not tell apart otherwise stands a bullet.

    >>> one_line("Made of wool<br>washable. <p>Warm</p>")
    'Made of wool • washable. Warm'
    """
    joined: list[str] = []
    lines = (" ".join(line.split()) for line in _plain(text).split("\n"))
    before = ""
    for line in filter(None, lines):
        if joined:
            full_stop = before.rstrip("\"'”’)]").endswith((".", "!", "?", "…")) and _FIRST.match(line)
            joined.append(" " if full_stop or before[-1] in "•。！？" or line[0] == "•" else " • ")
        joined.append(line)
        before = line
    return "".join(joined)


def one_field(text: str) -> str:
    """As it stands, without control characters, white space collapsed: for fields that are no prose."""
    return " ".join(_CONTROL.sub("", text).split())


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
    """Text without entities, tags and control characters; a tag that breaks the line becomes a line break.

    What a round of cleaning brings to light again and again (``<<<<b>b>b>b>``) loses its ``&`` and ``<`` in the end,
    so that cleaning twice changes nothing.
    """
    text = _CONTROL.sub("", text)
    for _ in range(MAX_ROUNDS):
        if "&" not in text and "<" not in text:
            break
        before, text = text, _round(text)
        if text == before:
            break
    else:
        if _round(text) != text:
            text = text.replace("&", " ").replace("<", " ")
    return _BLANKS.sub(" ", text)


def _round(text: str) -> str:
    text = _CONTROL.sub("", html.unescape(_AMPERSANDS.sub("&", text)))
    return _TAG.sub("", _BLOCK_TAG.sub("\n", _HIDDEN.sub(" ", text)))
