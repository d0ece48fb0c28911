"""Pickles of arrays: read as NumPy reads them, and nothing that a file names is run."""

from __future__ import annotations

import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from dataset_prep.safe_pickle import load_array_pickle, unpacked
from recbole_mm.errors import DatasetError, UnsafeFileError

ARRAYS = [
    np.arange(6, dtype=np.float32).reshape(2, 3),
    np.arange(6, dtype=">f8").reshape(3, 2),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.arange(4, dtype=np.int16)[::2],
    np.float16([1.5]),
]


def read(tmp_path: Path, content: bytes):
    (tmp_path / "file.pkl").write_bytes(content)
    return load_array_pickle(tmp_path / "file.pkl", holds="vectors by item")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: array.dtype.str)
def test_arrays_are_what_numpy_would_read(tmp_path, array, protocol):
    found = read(tmp_path, pickle.dumps({"item": [array, array.tolist()]}, protocol=protocol))
    ours = unpacked(found["item"][0])
    assert ours.dtype == array.dtype
    np.testing.assert_array_equal(ours, array)
    assert found["item"][1] == array.tolist()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_numbers_and_texts_of_numpy_are_plain_ones(tmp_path, protocol):
    content = {np.str_("B00é"): [np.float32(0.5), np.int64(3)]}
    assert read(tmp_path, pickle.dumps(content, protocol=protocol)) == {"B00é": [0.5, 3]}


def test_arrays_written_by_numpy_2_are_read(tmp_path):
    content = pickle.dumps(np.arange(3.0), protocol=2).replace(b"cnumpy.core.multiarray", b"cnumpy._core.multiarray")
    assert b"_core" in content
    np.testing.assert_array_equal(unpacked(read(tmp_path, content)), np.arange(3.0))


def test_arrays_written_by_python_2_are_read(tmp_path):
    """There, the bytes of an array are a text of Python 2."""
    raw = np.float64([1.0, -2.5]).tobytes()
    content = (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x02\x85cnumpy\n"
        b"dtype\nU\x02f8K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        b"U" + bytes([len(raw)]) + raw + b"tb."
    )
    np.testing.assert_array_equal(pickle.loads(content, encoding="latin1"), [1.0, -2.5])
    np.testing.assert_array_equal(unpacked(read(tmp_path, content)), [1.0, -2.5])


class Hostile:
    """Runs a command when it is loaded."""

    def __init__(self, command: str = "touch MARKER") -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


class Evaluates:
    def __reduce__(self):
        return eval, ("open('MARKER', 'w')",)


HOSTILE = [
    pickle.dumps({"item": [Hostile()]}),
    pickle.dumps({"item": [np.arange(3.0), Evaluates()]}, protocol=2),
    pickle.dumps(np.array([Hostile()], dtype=object)),
    b"cos\nsystem\n(S'touch MARKER'\ntR.",
    b"(S'touch MARKER'\nios\nsystem\n.",
    b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0ctouch MARKER\x85R.",
    b"cnumpy.core.multiarray\n_reconstruct\ncos\nsystem\n(S'touch MARKER'\ntR.",
    b"\x80\x02cnumpy\nload\n.",
    b"\x80\x02cnumpy.core.multiarray\nfromfile\n.",
    b"\x80\x02cbuiltins\ngetattr\n.",
    b"Psomewhere else\n.",
]


@pytest.mark.parametrize("content", HOSTILE)
def test_F55_what_asks_for_code_is_refused_and_leaves_no_marker(tmp_path, content):
    with pytest.raises(UnsafeFileError, match="nothing was run|it was refused") as error:
        read(tmp_path, content)
    assert error.value.exit_code == 6
    assert not (tmp_path / "MARKER").exists()  # the working directory


def test_F55_the_samples_would_run_if_they_were_loaded_the_old_way(tmp_path):
    pickle.loads(HOSTILE[0])
    assert (tmp_path / "MARKER").exists()


def test_F39_an_array_of_objects_is_refused_as_unsafe(tmp_path):
    with pytest.raises(UnsafeFileError, match="array of Python objects, expected plain numbers"):
        read(tmp_path, pickle.dumps({"item": np.array([1.0, None], dtype=object)}))


STAND_INS = [b"numpy\ndtype", b"numpy\nndarray", b"numpy.core.multiarray\n_reconstruct", b"_codecs\nencode"]


@pytest.mark.parametrize("name", STAND_INS)
def test_a_pickle_cannot_change_what_stands_in_for_numpy(tmp_path, name):
    for state in (b"}S'x'\nK\x01s", b"N}S'__call__'\nK\x01s\x86"):
        with pytest.raises(ValueError, match="no whole pickle"):
            read(tmp_path, b"\x80\x02c" + name + b"\n" + state + b"b.")
    array = np.arange(3.0)
    np.testing.assert_array_equal(unpacked(read(tmp_path, pickle.dumps(array, protocol=2))), array)


@pytest.mark.parametrize(
    ("shape", "code", "content", "message"),
    [
        ((3,), "f4", bytes(8), "shape .3,. with 2 numbers"),
        ((-1,), "f4", bytes(8), "of the shape"),
        ((2**62, 2**62), "f4", bytes(8), "with 2 numbers"),
        ((2,), "f4", [1.0, 2.0], "not made of bytes"),
        ((1,), "V8", bytes(8), "dtype .?V8, expected numbers"),
        ((1,), "M8", bytes(8), "dtype .?M8, expected numbers"),
        ((2,), "f4", bytes(7), "buffer size"),
    ],
)
def test_an_array_that_is_none_is_said_to_be_none(tmp_path, shape, code, content, message):
    class Forged:
        def __reduce__(self):
            return np.core.numeric._frombuffer, (content, Type(), shape, "C")

    class Type:
        def __reduce__(self):
            return np.dtype, (code,)

    with pytest.raises(ValueError, match=f"no whole pickle.*{message}"):
        read(tmp_path, pickle.dumps(Forged()))


def test_F43_a_pickle_cut_short_anywhere_is_noticed(tmp_path):
    content = pickle.dumps({"item": [np.arange(4, dtype=np.float32), [1.0, 2]]})
    for length in range(len(content)):
        with pytest.raises(ValueError, match="no whole pickle|the file is empty"):
            read(tmp_path, content[:length])
    with pytest.raises(ValueError, match="3 bytes after the end"):
        read(tmp_path, content + b"abc")


def test_a_pickle_that_asks_for_much_memory_gets_none(tmp_path):
    assert read(tmp_path, b"\x80\x02Nr" + struct.pack("<I", 2**32 - 1) + b".") is None
    for step in (b"\x8e", b"\x96"):  # bytes and bytearray
        for size in (2**31, 2**40, 2**63 + 1):
            with pytest.raises(ValueError, match="no whole pickle"):
                read(tmp_path, b"\x80\x05" + step + struct.pack("<Q", size) + b"abc.")


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


@pytest.mark.parametrize(
    ("start", "again"),
    [
        (b"c_codecs\nencode\nq\x010](", b"h\x01h\x00" + text("latin1") + b"\x86R"),
        (
            b"cnumpy.core.numeric\n_frombuffer\nq\x01cnumpy\ndtype\n" + text("f4") + b"\x85Rq\x0200](",
            b"h\x01(h\x00h\x02J" + struct.pack("<i", 250) + b"\x85" + text("C") + b"tR",
        ),
    ],
    ids=["encode", "frombuffer"],
)
def test_a_text_named_many_times_is_not_copied_many_times(tmp_path, start, again):
    content = b"\x80\x04" + text("a" * 1000) + b"q\x000" + start
    assert len(read(tmp_path, content + again + b"e.")) == 1
    with pytest.raises(ValueError, match="more memory than it can fill"):
        read(tmp_path, content + 100 * again + b"e.")


NESTED = b"N" + b"\x85" * 200_000  # a tuple in a tuple in a tuple ...
DOUBLED = b"Nq\x00" + b"".join(b"h\x00\x86q\x00" for _ in range(60))  # of 2**60 members


@pytest.mark.parametrize("key", [NESTED, DOUBLED, b"N", b"\x8a\x09" + bytes(8) + b"\x01"], ids="ndNi")
@pytest.mark.parametrize("form", [b"}%sNs", b"}(%sNu", b"(%sNd", b"\x8f(%s\x90", b"(%s\x91"], ids="sudab")
def test_keys_that_would_exhaust_the_stack_or_the_day_are_refused(tmp_path, key, form):
    with pytest.raises(ValueError, match="expected a text|holds a set"):
        read(tmp_path, b"\x80\x04" + form % key + b".")


def test_what_is_nested_without_end_is_shown_in_short(tmp_path):
    for part in (NESTED, DOUBLED):
        with pytest.raises(ValueError, match="no whole pickle .*a dtype of "):
            read(tmp_path, b"\x80\x04cnumpy\ndtype\n" + part + b"\x85R.")


def test_no_file_is_said(tmp_path):
    with pytest.raises(DatasetError, match="no file .*file.pkl"):
        load_array_pickle(tmp_path / "file.pkl")
