"""Catalogue text becomes plain text and sentences."""

from __future__ import annotations

import pytest

from dataset_prep.text import clean_text, sentences


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("Salt &amp; pepper", "Salt & pepper"),
        ("Salt &amp;amp; pepper", "Salt & pepper"),
        ("Salt &amp;amp;amp;amp; pepper", "Salt &amp; pepper"),  # three rounds, no more
        ("Lanc&ocirc;me&#39;s &eacute;clat", "Lancôme's éclat"),
        ("<b>New</b> and <i class='x'>old</i>", "New and old"),
        ("&lt;b&gt;New&lt;/b&gt;", "New"),
        ("one<br>two<br />three", "one two three"),
        ("<style>.a-box{color:red}</style>Soap<script>alert('x')</script>", "Soap"),
        ("a<!-- hidden -->b", "a b"),
        ("  many \t spaces\u00a0here ", "many spaces here"),
        ("5 < 6 and 7 > 2, I <3 you", "5 < 6 and 7 > 2, I <3 you"),
        ("zero\u200bwidth and \x07bell", "zerowidth and bell"),
        ("</span></span></span>", ""),
        ("&nbsp;", ""),
        ("", ""),
    ],
)
def test_text_is_cleaned(raw, expected):
    assert clean_text(raw) == expected


def test_cleaning_clean_text_changes_nothing():
    text = clean_text("<p>Warm &amp; dry.</p><p>5 &lt; 6</p>")
    assert clean_text(text) == text


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("Dries in 2.5 hours at approx. 20 degrees.", ["Dries in 2.5 hours at approx.", "20 degrees."]),
        ("Weighs 2.5 kg, e.g. with bag.", ["Weighs 2.5 kg, e.g. with bag."]),
        ('He said "Go." Then left.', ['He said "Go.', "Then left."]),
        ("First<br>second<li>third</li>", ["First", "second", "third"]),
        ("• light • warm", ["light", "warm"]),
        ("暖かい。軽い。", ["暖かい。", "軽い。"]),
        ("... !!! ---", []),
        ("<p></p>", []),
        ("", []),
    ],
)
def test_text_is_split_into_sentences(raw, expected):
    assert sentences(raw) == expected


def test_hostile_text_takes_no_time():
    for text in ("<" * 50_000, "<!--" * 20_000, "<script>" * 5_000, "&amp;" * 50_000, '." ' * 50_000, ". " * 50_000):
        assert len(sentences(text)) <= len(text)
