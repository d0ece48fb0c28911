"""Catalogue text becomes plain text and sentences."""

from __future__ import annotations

import random

import pytest

from dataset_prep.text import clean_text, one_line, sentences


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("Salt &amp; pepper", "Salt & pepper"),
        ("Salt &amp;amp; pepper", "Salt & pepper"),
        ("Salt &amp;amp;amp;amp; pepper", "Salt & pepper"),
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


PIECES = [
    "&", "amp;", "lt;", "&lt;", "&#60;", "#", "&#11", "&#50;", ";", "<", "b", ">", "/", "<br>", "</p>", "<!--", "-->",
    "<script>", "</script>", "\n", "\r\n", " ", "\u00a0", "\x00", "\x85", "\u200b", ".", "!", '"', "”", ")", "(", "“",
    "•", "。", "…", "A", "Then", "made", "7", "***",
]  # fmt: skip


def nasty_texts(n: int) -> list[str]:
    made = random.Random("nasty")
    return ["".join(made.choices(PIECES, k=made.randrange(1, 14))) for _ in range(n)]


@pytest.mark.parametrize("clean", [clean_text, one_line])
def test_F29_cleaning_a_clean_text_changes_nothing(clean):
    hand = ["<p>Warm &amp; dry.</p><p>5 &lt; 6</p>", "&amp;#39;", "<<<<<<b>b>b>b>b>b>", "&am&#112;lt;b>", "<\x00b>"]
    for text in [*hand, *nasty_texts(20_000)]:
        assert clean(clean(text)) == clean(text), repr(text)


def test_lines_of_a_description_stay_apart_in_one_line():
    for text in ["Made of wool<br>washable. <p>Warm</p>", 'He said "Go."<br>Then left.', *nasty_texts(20_000)]:
        stored = one_line(text)
        assert sentences(stored) == sentences(text), repr(text)
        assert "\n" not in stored and "\t" not in stored and stored == " ".join(stored.split())
    assert one_line("Made of wool<br>washable. <p>Warm</p>") == "Made of wool • washable. Warm"
    assert one_line("one line\nand another") == "one line • and another"


@pytest.mark.parametrize("text", ["", "  ", "\u00a0\n", "<p></p><br/>", "&nbsp;<!-- -->", "\x07\u200b"])
def test_F28_a_text_without_characters_is_empty(text):
    assert clean_text(text) == one_line(text) == ""


def test_F30_emoji_and_other_scripts_stay_and_control_characters_go():
    for text in ("👩\u200d🚀 ok", "שלום עולם", "\u202bمرحبا\u202c", "é e\u0301", "x" * 1_000_000):
        assert clean_text(text) == one_line(text) == text
    assert clean_text("a\x00b\x1bc\x7fd\x9be") == "abcde"


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
