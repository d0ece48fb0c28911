"""Lines out of hostile files: nothing is lost without a word, and memory stays bounded."""

from __future__ import annotations

import gzip
import hashlib
import os
import random
import tracemalloc
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dataset_prep.sources import lines as module
from dataset_prep.sources.lines import LONGEST_LINE, Lines
from dataset_prep.sources.rejects import Rejects
from recbole_mm.errors import DatasetError


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def read(path: Path, rejects: Rejects | None = None, **options) -> list[tuple[int, str]]:
    return list(Lines(path, rejects or Rejects(), progress=False, **options))


@contextmanager
def peak_below(n_bytes: float) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < n_bytes
    finally:
        tracemalloc.stop()


def noise(n: int) -> bytes:
    """Lines that gzip cannot shrink much."""
    draw = random.Random(0)
    return b"".join(b"%d %s\n" % (number, draw.randbytes(20).hex().encode()) for number in range(n))


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_lines_and_hash_equal_those_of_the_whole_file(tmp_path, pack):
    content = noise(60_000)  # several blocks
    path = write(tmp_path / "a.json", pack(content))
    lines = Lines(path, Rejects(), progress=False)
    assert list(lines) == list(enumerate(content.decode().split("\n")[:-1], start=1))
    assert lines.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() and lines.n == 60_000


@pytest.mark.parametrize("block", [1, 7, 64])
def test_the_size_of_blocks_changes_nothing(tmp_path, monkeypatch, block):
    content = "a\n\nbb\r\nz\u00fcrich \U0001f600\nlast".encode()
    monkeypatch.setattr(module, "CHUNK", block)
    monkeypatch.setattr(module, "BLOCK", block)
    expected = [(1, "a"), (2, ""), (3, "bb"), (4, "z\u00fcrich \U0001f600"), (5, "last")]
    assert read(write(tmp_path / "a", content)) == expected
    assert read(write(tmp_path / "a.gz", gzip.compress(content[:9]) + gzip.compress(content[9:]))) == expected


@pytest.mark.parametrize("left", [0.5, 0.9, 0.9999])
def test_F1_a_truncated_gzip_is_refused_and_the_row_named(tmp_path, left):
    content = gzip.compress(noise(50_000))
    path = write(tmp_path / "cut.json.gz", content[: int(len(content) * left)])
    got = []
    with pytest.raises(
        DatasetError, match=r"cut.json.gz ends early, after row \d+: .* remove it and get it again"
    ) as error:
        for line in Lines(path, Rejects(), progress=False):
            got.append(line)
    assert f"after row {len(got)}:" in str(error.value) and len(got) > 20_000


def test_F1_a_damaged_gzip_is_refused(tmp_path):
    content = bytearray(gzip.compress(noise(1_000)))
    content[-6] ^= 1  # in the checksum
    with pytest.raises(DatasetError, match="damaged after row .*incorrect data check.*; download it again"):
        read(write(tmp_path / "a.gz", bytes(content)))


def test_F2_members_of_a_gzip_are_read_one_after_the_other(tmp_path):
    path = write(tmp_path / "a.gz", gzip.compress(b"1\n2") + gzip.compress(b"") + gzip.compress(b"3\n4\n") + b"\0" * 9)
    assert read(path) == [(1, "1"), (2, "23"), (3, "4")]


def test_F2_garbage_behind_a_gzip_is_refused(tmp_path):
    path = write(tmp_path / "a.gz", gzip.compress(b"1\n2\n") + b"<html>")
    with pytest.raises(DatasetError, match="something that is not gzip follows its end, after row .*download it again"):
        read(path)


def test_F3_a_gzip_bomb_is_refused_before_memory_grows(tmp_path):
    packer = zlib.compressobj(9, wbits=31)
    bomb = b"".join(packer.compress(bytes(1 << 20)) for _ in range(100)) + packer.flush()
    path = write(tmp_path / "a.gz", gzip.compress(noise(1_000)) + bomb)  # something usual stands before it
    assert len(bomb) < 150_000
    with peak_below(20e6), pytest.raises(DatasetError, match="after row 1001: refused as a gzip bomb"):
        read(path)


def test_F3_more_text_than_allowed_is_refused(tmp_path):
    for pack in (bytes, gzip.compress):
        with pytest.raises(DatasetError, match="more than 1,000 bytes of text, at row .*; is it the right file?"):
            read(write(tmp_path / "a", pack(noise(1_000))), max_bytes=1_000)


def test_what_compresses_well_is_no_bomb(tmp_path):
    content = b'{"asin": "B000000001", "text": "fine"}\n' * 450_000
    packed = gzip.compress(content, 9)
    assert len(content) > 150 * len(packed)
    assert len(read(write(tmp_path / "a.gz", packed))) == 450_000


def test_F6_a_byte_order_mark_is_removed_and_counted(tmp_path):
    lines = Lines(write(tmp_path / "a", b"\xef\xbb\xbfa\nb\n"), Rejects(), progress=False)
    assert list(lines) == [(1, "a"), (2, "b")] and lines.fixed == {"byte order mark": 1}


def test_F6_lines_that_are_no_text_are_set_aside_with_the_byte(tmp_path):
    rejects = Rejects()
    content = b"good\nlatin \xe9\nnul \0\nhalf \xed\xa0\x80\nf\xc3\xbcr\r\n"
    lines = Lines(write(tmp_path / "a.json", content), rejects, progress=False)
    assert list(lines) == [(1, "good"), (5, "f\u00fcr")]
    assert rejects.counts == {"a.json": {"encoding": 3}} and (lines.n, lines.n_rejected) == (5, 3)
    rejects.write(tmp_path / "rejected.tsv.gz")
    listed = gzip.decompress((tmp_path / "rejected.tsv.gz").read_bytes()).decode().splitlines()
    assert listed[1].startswith("a.json\t2\tencoding\tnot UTF-8 at byte 6: latin")
    assert listed[2].startswith("a.json\t3\tencoding\tNUL at byte 4: nul")


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_F7_a_line_without_end_is_set_aside_without_a_buffer_for_it(tmp_path, pack):
    path = tmp_path / "a.json"
    with open(path, "wb") as out:
        out.write(pack(b"first\n"))
        for _ in range(15):
            out.write(pack(os.urandom(500_000).hex().encode()))
        out.write(pack(b"\nlast\n"))
    rejects = Rejects()
    with peak_below(8e6):
        assert read(path, rejects) == [(1, "first"), (3, "last")]
    assert rejects.counts == {"a.json": {"line_too_long": 1}}


def test_F7_the_longest_line_is_read_and_one_more_byte_is_not(tmp_path):
    rejects = Rejects()
    for text in ("x", "\u00fc"):
        line = text * (LONGEST_LINE // len(text.encode()))
        assert read(write(tmp_path / "a", f"{line}\nb\n".encode()), rejects) == [(1, line), (2, "b")]
        assert read(write(tmp_path / "a", f"{line}x\nb\n".encode()), rejects) == [(2, "b")]
    assert rejects.counts == {"a": {"line_too_long": 2}}


def test_F8_windows_line_ends_and_a_missing_last_one_are_fine(tmp_path):
    assert read(write(tmp_path / "a", b"a\r\nb\r\nc")) == [(1, "a"), (2, "b"), (3, "c")]
    assert read(write(tmp_path / "a", b"")) == []


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(DatasetError, match="cannot read .*nowhere: No such file"):
        read(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match="cannot read .*Is a directory"):
        read(tmp_path)
