"""Pickles of other people: what plain values they hold, without running what is in them.

A pickle is a program. There are two readers. `PlainUnpickler` knows numbers, texts, lists and the like, and stops at
the first attempt to import anything, before it is imported. `ArrayUnpickler` reads NumPy's arrays as well: it knows
the names that NumPy writes into a pickle, and puts functions of its own in their place, which take nothing but plain
numbers. Nothing that a file names is ever imported or called.

Both run in Python, not in C, where a small file can exhaust the stack or announce more memory than it fills: keys of
dicts are texts and numbers, as nested tuples take forever to hash, and bytes are copied out of a file only once.
"""

from __future__ import annotations

import io
import mmap
import pickle
import re
import reprlib
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from recbole_mm.errors import DatasetError, UnsafeFileError

_NUMBERS = re.compile("[<>=|]?[fiu](?:1|2|4|8)")  # dtypes of plain numbers, such as <f4
_TEXT = re.compile("[<>=|]?U[0-9]+")
_ZIP = b"PK\x03\x04"  # torch.save writes one; as a pickle, its first step is an import


class _WouldImport(Exception):
    pass


class PlainUnpickler(pickle._Unpickler):
    """Reads numbers, texts, lists, tuples and the like; imports nothing, so that nothing can be called.

    Args:
        stream: at its start.
        size: of the stream in bytes.
    """

    dispatch = dict(pickle._Unpickler.dispatch)

    def __init__(self, stream: BinaryIO | mmap.mmap, size: int) -> None:
        super().__init__(stream, encoding="latin1")  # Python 2 kept the bytes of arrays in texts
        self.size = size

    def find_class(self, module: str, name: str) -> Any:
        raise _WouldImport(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise _WouldImport("an object that is kept elsewhere")

    def load_setitem(self) -> None:
        _check_keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        _check_keys(self.stack[::2])
        super().load_setitems()

    def load_dict(self) -> None:
        _check_keys(self.stack[::2])
        super().load_dict()

    def load_set(self) -> None:
        raise ValueError("it holds a set")

    def load_bytearray8(self) -> None:
        (n,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(min(n, self.size))))  # the rest is missing, which the reader notices

    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.DICT[0]] = load_dict
    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8
    dispatch |= dict.fromkeys((pickle.EMPTY_SET[0], pickle.ADDITEMS[0], pickle.FROZENSET[0]), load_set)


class ArrayUnpickler(PlainUnpickler):
    """Reads arrays of plain numbers too, as pickle protocols 0 to 5 and NumPy 1 and 2 write them."""

    def __init__(self, stream: BinaryIO | mmap.mmap, size: int) -> None:
        super().__init__(stream, size)
        self.stand_ins = _stand_ins(_Allowance(size))

    def find_class(self, module: str, name: str) -> Any:
        stand_in = self.stand_ins.get((module.replace("numpy._core", "numpy.core"), name))
        return super().find_class(module, name) if stand_in is None else stand_in


def _check_keys(keys: list[Any]) -> None:
    """Refuse what could take long to hash, or is made to have equal hashes."""
    for key in keys:
        if type(key) not in (str, bytes) and not (type(key) is int and key.bit_length() < 61):
            raise ValueError(f"the key {_shown(key)}, expected a text")


def load_plain_pickle(content: bytes, *, name: str, holds: str = "") -> Any:
    """What a pickle of plain lists holds.

    Args:
        name: of the file, for messages.
        holds: what files of this kind hold, for messages.

    Raises:
        UnsafeFileError: it asks to import something; nothing of it has been run.
        ValueError: it is no pickle, cut short, or goes on after its end.
    """
    return _load(PlainUnpickler, io.BytesIO(content), len(content), name=name, holds=holds)


def load_array_pickle(path: Path, *, holds: str = "") -> Any:
    """What a pickle of lists, texts, numbers and NumPy's arrays holds; `unpacked` makes arrays of its arrays.

    About half a second per million steps of the pickle: a number in a list is one, an array takes some twenty.

    Args:
        holds: what files of this kind hold, for messages.

    Raises:
        UnsafeFileError: it asks to import something else, or holds an array of Python objects; nothing has been run.
        DatasetError: no such file.
        ValueError: it is no pickle, cut short, or goes on after its end.
    """
    try:
        with open(path, "rb") as file:
            size = file.seek(0, io.SEEK_END)
            if size == 0:
                raise ValueError("the file is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream:
                return _load(ArrayUnpickler, stream, size, name=str(path), holds=holds)
    except FileNotFoundError as error:
        raise DatasetError(f"no file {path}") from error


def _load(reader: type[PlainUnpickler], stream: BinaryIO | mmap.mmap, size: int, *, name: str, holds: str) -> Any:
    if stream.read(len(_ZIP)) == _ZIP:
        raise ValueError("no pickle but a zip archive")
    stream.seek(0)
    try:
        loaded = reader(stream, size).load()
    except _WouldImport as error:
        wanted = _shorten(str(error))
        message = (
            f"{name} is a pickle that asks to import {wanted}, which could run any code; it was refused, and nothing "
            "was run"
        )
        if holds:
            message += f"\n  {holds}"
        if reader is PlainUnpickler and wanted.startswith("numpy"):
            message += (
                "\n  NumPy's numbers need NumPy's classes; if you made the file, write it again with int(number) for "
                "each number and array.tolist() for each array"
            )
        raise UnsafeFileError(message) from error
    except UnsafeFileError as error:
        raise UnsafeFileError(f"{name} {error}") from error
    except (EOFError, IndexError, KeyError, struct.error) as error:  # an unknown step is a KeyError
        raise ValueError("no whole pickle, but one cut short or something else") from error
    except Exception as error:  # on broken pickles the reader raises whatever it likes, even MemoryError
        raise ValueError(f"no whole pickle ({type(error).__name__}: {_shorten(str(error))})") from error
    if left := size - stream.tell():
        raise ValueError(f"{left} bytes after the end of the pickle")
    return loaded


def _shorten(text: str) -> str:
    text = text[:1000]
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 100 else f"{text[:100]}…"


def _shown(value: Any) -> str:
    """A value of any type, short, and lists in lists of lists only hinted at."""
    brief = reprlib.Repr()
    brief.maxlevel = 2
    return _shorten(brief.repr(value))


class _Allowance:
    """How many bytes may still be copied: a file names its bytes once, but one text could be named many times."""

    __slots__ = ("left",)

    def __init__(self, size: int) -> None:
        self.left = size

    def spend(self, n: int) -> None:
        self.left -= n
        if self.left < 0:
            raise ValueError("it asks for more memory than it can fill")


# ---------------------------------------------------------------- stand-ins for NumPy's functions


class _Fixed:
    """Base of the stand-ins, which no pickle can change."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise ValueError(f"a state {_shown(state)} for something that has none")


class _ArrayType(_Fixed):
    """Stands for ``numpy.ndarray``, which pickles only hand on."""

    __slots__ = ()


class _Type(_Fixed):
    """A dtype that is being read."""

    __slots__ = ("code",)

    def __init__(self, code: str) -> None:
        self.code = code

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """The state of a dtype: its version, byte order and, for dtypes that are no numbers, more."""
        order = state[1]
        if order not in ("<", ">", "|", "=") or any(part is not None for part in state[2:5]):
            raise ValueError(f"a dtype of {_shown(state)}")
        self.code = order + self.code.lstrip("<>=|")

    def numbers(self) -> np.dtype:
        """The dtype, if it is one of numbers."""
        if not _NUMBERS.fullmatch(self.code):
            raise ValueError(f"an array of dtype {_shorten(self.code)}, expected numbers")
        return np.dtype(self.code)


class _MakeType(_Fixed):
    """Stands for ``numpy.dtype``."""

    __slots__ = ()

    def __call__(self, code: Any, *_: Any) -> _Type:
        if type(code) is not str:
            raise ValueError(f"a dtype of {_shown(code)}")
        if code.lstrip("<>=|").startswith("O"):
            raise UnsafeFileError("holds an array of Python objects, expected plain numbers; it was refused")
        return _Type(code)


class _Shell(_Fixed):
    """An array that is being read; `unpacked` puts the array in its place."""

    __slots__ = ("allowance", "array")

    def __init__(self, allowance: _Allowance) -> None:
        self.allowance = allowance
        self.array: np.ndarray | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, in_columns, content = state
        self.array = _array(content, dtype, shape, order="F" if in_columns else "C", allowance=self.allowance)


class _Copying(_Fixed):
    """Base of the stand-ins that may copy what they are given."""

    __slots__ = ("allowance",)

    def __init__(self, allowance: _Allowance) -> None:
        self.allowance = allowance


class _MakeShell(_Copying):
    """Stands for ``numpy.core.multiarray._reconstruct``, which makes an empty array for `_Shell.__setstate__`."""

    __slots__ = ()

    def __call__(self, kind: Any, shape: Any, code: Any) -> _Shell:
        if not isinstance(kind, _ArrayType):
            raise ValueError("an array of an unknown class")
        return _Shell(self.allowance)


class _FromBuffer(_Copying):
    """Stands for ``numpy.core.numeric._frombuffer``, which protocol 5 uses."""

    __slots__ = ()

    def __call__(self, content: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
        return _array(content, dtype, shape, order=order, allowance=self.allowance)


class _Scalar(_Copying):
    """Stands for ``numpy.core.multiarray.scalar``, a number or text of NumPy's."""

    __slots__ = ()

    def __call__(self, dtype: Any, content: Any) -> float | int | str:
        if isinstance(dtype, _Type) and _TEXT.fullmatch(dtype.code) and type(content) is bytes:
            self.allowance.spend(len(content))
            coding = "utf-32-be" if dtype.code.startswith(">") else "utf-32-le"
            return content.decode(coding).rstrip("\0")
        return _array(content, dtype, (), order="C", allowance=self.allowance).item()


class _Encode(_Copying):
    """Stands for ``_codecs.encode``, with which old protocols write bytes."""

    __slots__ = ()

    def __call__(self, text: Any, coding: Any) -> bytes:
        if type(text) is not str or coding != "latin1":
            raise ValueError("bytes in an unknown coding")
        self.allowance.spend(len(text))
        return text.encode("latin1")


def _stand_ins(allowance: _Allowance) -> dict[tuple[str, str], _Fixed]:
    """By the module and name that a pickle imports."""
    return {
        ("numpy", "ndarray"): _ArrayType(),
        ("numpy", "dtype"): _MakeType(),
        ("numpy.core.multiarray", "_reconstruct"): _MakeShell(allowance),
        ("numpy.core.multiarray", "scalar"): _Scalar(allowance),
        ("numpy.core.numeric", "_frombuffer"): _FromBuffer(allowance),
        ("_codecs", "encode"): _Encode(allowance),
    }


def _array(content: Any, dtype: Any, shape: Any, *, order: Any, allowance: _Allowance) -> np.ndarray:
    """Numbers out of their bytes, read-only.

    Raises:
        ValueError: these are no numbers, or their number is not that of the shape.
    """
    if type(content) is str:  # by Python 2
        allowance.spend(len(content))
        content = content.encode("latin1")
    if type(content) not in (bytes, bytearray) or not isinstance(dtype, _Type) or order not in ("C", "F"):
        raise ValueError("an array that is not made of bytes")
    if type(shape) is not tuple or len(shape) > 32 or any(type(n) is not int or not 0 <= n < 2**63 for n in shape):
        raise ValueError(f"an array of the shape {_shown(shape)}")
    flat = np.frombuffer(content, dtype=dtype.numbers())
    if flat.size != np.prod(shape, dtype=object):
        raise ValueError(f"an array of the shape {_shown(shape)} with {flat.size} numbers")
    return flat.reshape(shape, order=order)


def unpacked(value: Any) -> Any:
    """What `load_array_pickle` has for an array, as that array; other values as they are.

    Raises:
        ValueError: an array that the file never filled.
    """
    if not isinstance(value, _Shell):
        return value
    if value.array is None:
        raise ValueError("an array without content")
    return value.array
