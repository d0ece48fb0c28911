"""Shards on disk: whole or not at all, and rows that go to their items again."""

from __future__ import annotations

import io

import numpy as np
import pytest

from dataset_prep.encoding import shards
from dataset_prep.encoding.contents import text_contents
from dataset_prep.encoding.shards import Encoded, Shard, WorkFolder, joined, pack, unpack
from recbole_mm.data.layout import write_feature, write_feature_blocks


def shard(counts: list[int], *, start: int = 0, width: int = 2) -> Shard:
    rows = np.arange(sum(counts) * width, dtype=np.float32).reshape(-1, width) + start
    return Shard(rows, np.array(counts), ["" if n else "nothing" for n in counts], max(counts) > 1, {"truncated": 1})


def test_a_shard_is_read_as_it_was_written():
    written = shard([2, 0, 1])
    read = unpack(pack(written))
    assert np.array_equal(read.rows, written.rows) and read.counts.tolist() == [2, 0, 1]
    assert read[2:] == (["", "nothing", ""], True, {"truncated": 1})
    assert pack(written) == pack(shard([2, 0, 1]))


def test_shards_in_a_row_are_one_and_one_without_rows_has_no_width():
    both = joined([shard([1]), Shard(np.empty((0, 0), np.float32), np.array([0]), ["x"]), shard([2], start=5)])
    assert both.rows.tolist() == [[0, 1], [5, 6], [7, 8]] and both.counts.tolist() == [1, 0, 2]
    assert both.reasons == ["", "x", ""] and both.several and both.notes == {"truncated": 2}


def test_a_shard_that_was_cut_short_anywhere_is_refused():
    content = pack(shard([2, 0, 1]))
    for length in range(len(content)):
        with pytest.raises(ValueError, match="no shard"):
            unpack(content[:length])


def test_a_changed_byte_never_gives_other_rows():
    content, written = pack(shard([2, 0, 1])), shard([2, 0, 1])
    for position in range(len(content)):
        try:
            read = unpack(content[:position] + bytes([content[position] ^ 0x41]) + content[position + 1 :])
        except ValueError:
            continue
        assert np.array_equal(read.rows, written.rows) and read.reasons == written.reasons


def test_parts_that_do_not_fit_each_other_are_no_shard():
    with pytest.raises(ValueError, match="its parts do not fit each other"):
        unpack(pack(shard([1, 1])._replace(counts=np.array([1, 2]))))
    for wrong in ({"rows": np.zeros((2, 2))}, {"counts": np.array([1.0, 1.0])}, {"counts": np.array([3, -1])}):
        with pytest.raises(ValueError, match="its parts do not fit each other"):
            unpack(pack(shard([1, 1])._replace(**wrong)))


def test_a_shard_with_a_pickle_in_it_is_refused_unread():
    out = io.BytesIO()
    np.savez(out, rows=np.array([[print]], dtype=object), counts=np.array([1]), said=np.zeros(1, dtype=np.uint8))
    with pytest.raises(ValueError, match="no shard.*allow_pickle"):
        unpack(out.getvalue())


@pytest.fixture
def contents():
    return text_contents(["1", "2", "3", "4"], [["a", "b"], ["c", "a"], [], ["d", "b", "e"]])


def test_rows_of_items_are_those_of_their_contents_in_order_whatever_memory_holds(tmp_path, contents, monkeypatch):
    work = WorkFolder(tmp_path, "text", "0" * 64)
    parts = [shard([1, 2]), shard([0, 1], start=100), shard([1], start=200)]
    for number, part in enumerate(parts):
        work.write(number, pack(part))
    of = {"a": [[0, 1]], "b": [[2, 3], [4, 5]], "c": [], "d": [[100, 101]], "e": [[200, 201]]}
    expected = [row for text in "abcadbe" for row in of[text]]
    for held in (1, 1 << 28):
        monkeypatch.setattr(shards, "CACHED_BYTES", held)
        encoded = Encoded(contents, 2, work)
        assert encoded.finished() == {0, 1, 2} and encoded.width == 2 and encoded.notes == {"truncated": 3}
        for at_once in (1, 3, 100):
            assert np.concatenate(list(encoded.item_rows(at_once=at_once))).tolist() == expected
        assert encoded.item_counts().tolist() == [3, 1, 0, 4]
        assert encoded.item_reasons() == ["", "nothing", "no text", ""]


def test_a_shard_that_is_cut_or_of_other_contents_is_not_finished(tmp_path, contents):
    work = WorkFolder(tmp_path, "text", "0" * 64)
    work.write(0, pack(shard([1, 2]))[:-1])
    work.write(1, pack(shard([1, 1, 1])))
    work.write(2, pack(shard([1])))
    assert Encoded(contents, 2, work).finished() == {2}
    assert [path.name for path in work.path.iterdir()] == ["000002.npz"]


def test_a_shard_of_another_width_is_refused(tmp_path, contents):
    encoded = Encoded(contents, 2, WorkFolder(tmp_path, "text", "0" * 64))
    encoded.take_note(0, shard([1, 1]))
    with pytest.raises(ValueError, match="shard 1 has width 3, others have 2"):
        encoded.take_note(1, shard([1, 1], width=3))


def test_leftovers_and_shards_of_another_key_go_and_those_of_other_features_stay(tmp_path):
    old, new = (WorkFolder(tmp_path, "text", digit * 64) for digit in "12")
    other, longer = WorkFolder(tmp_path, "image", "1" * 64), WorkFolder(tmp_path, "text-2", "1" * 64)
    for work in (old, new, other, longer):
        work.write(0, b"x")
    leftovers = [
        "manifest.json.partial-1",
        "features/text.npy.partial-1",
        f"features/.work/{new.path.name}/1.partial-1",
    ]
    for name in leftovers:
        (tmp_path / name).write_text("")
    new.clean()
    assert not old.path.exists() and not any((tmp_path / name).exists() for name in leftovers)
    assert all(work.file(0).is_file() for work in (new, other, longer))
    new.remove()
    other.remove()
    assert new.root.is_dir()
    longer.remove()
    assert not new.root.exists()


def test_a_feature_written_in_blocks_has_the_bytes_of_one_written_at_once(tmp_path):
    rows = np.arange(12, dtype=np.float32).reshape(6, 2)
    for name in ("once", "blocks"):
        (tmp_path / name).mkdir()
    made = {"tokens": ["a", "b", "c"], "counts": np.array([1, 2, 3]), "encoder": "x", "source": "y"}
    write_feature(tmp_path / "once", "text", rows=rows, **made)
    write_feature_blocks(
        tmp_path / "blocks", "text", blocks=iter([rows[:1], rows[1:5], rows[5:]]), shape=(6, 2), **made
    )
    for file in ("manifest.json", "features/text.npy", "features/text.counts.npy"):
        once, blocks = ((tmp_path / name / file).read_bytes() for name in ("once", "blocks"))
        assert once.replace(b"once", b"blocks") == blocks


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((6, 3), r"a block of shape \(6, 2\) in an array of shape \(6, 3\)"),
        ((7, 2), "the blocks have 6 rows, expected 7"),
    ],
)
def test_blocks_that_do_not_make_up_the_array_leave_no_feature(tmp_path, shape, message):
    made = {"tokens": ["a"], "counts": np.array([6]), "encoder": "x", "source": "y"}
    with pytest.raises(ValueError, match=message):
        write_feature_blocks(tmp_path, "text", blocks=[np.ones((6, 2))], shape=shape, **made)
    assert not (tmp_path / "features/text.npy").exists() and not (tmp_path / "manifest.json").exists()
