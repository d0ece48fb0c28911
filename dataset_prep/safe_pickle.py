"""Pickles of other people: what plain values they hold, without running what is in them.

A pickle is a program. There are two readers. `PlainUnpickler` knows numbers, texts, lists and the like, and stops at
the first attempt to import anything, before it is imported. `ArrayUnpickler` reads NumPy's arrays as well: it knows
the names that NumPy writes into a pickle, and puts functions of its own in their place, which take nothing but plain
numbers. Nothing that a file names is ever imported or called.
"""

from __future__ import annotations

import io
import mmap
import pickle
import pickletools
import re
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from recbole_mm.errors import DatasetError, UnsafeFileError

_NUMBERS = re.compile("[<>=|]?[fiu](?:1|2|4|8)")  # dtypes of plain numbers, such as <f4
_TEXT = re.compile("[<>=|]?U[0-9]+")


class _WouldImport(Exception):
    pass


class PlainUnpickler(pickle.Unpickler):
    """Reads numbers, texts, lists, tuples and the like; imports nothing, so that nothing can be called."""

    def find_class(self, module: str, name: str) -> Any:
        raise _WouldImport(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise _WouldImport("an object that is kept elsewhere")


class ArrayUnpickler(PlainUnpickler):
    """Reads arrays of plain numbers too, as pickle protocols 0 to 5 and NumPy 1 and 2 write them."""

    def find_class(self, module: str, name: str) -> Any:
        stand_in = _STAND_INS.get((module.replace("numpy._core", "numpy.core"), name))
        return super().find_class(module, name) if stand_in is None else stand_in


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

    Every step of the pickle is looked at first, about a second per million steps; an array takes some twenty.

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
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > size:  # 34 GB, asked for by 6 bytes
                raise ValueError("it asks for more memory than it can fill")
        stream.seek(0)
        loaded = reader(stream, encoding="latin1").load()  # Python 2 kept the bytes of arrays in texts
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
    except Exception as error:  # on broken pickles the reader raises whatever it likes, even MemoryError
        raise ValueError(f"no whole pickle ({type(error).__name__}: {_shorten(str(error))})") from error
    if left := size - stream.tell():
        raise ValueError(f"{left} bytes after the end of the pickle")
    return loaded


def _shorten(text: str) -> str:
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 100 else f"{text[:100]}…"


# ---------------------------------------------------------------- stand-ins for NumPy's functions


class _Fixed:
    """Base of the stand-ins: without attributes that could be set, so that no pickle changes them for the next one."""

    __slots__ = ()


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
            raise ValueError(f"a dtype of {_shorten(repr(state))}")
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
            raise ValueError(f"a dtype of {_shorten(repr(code))}")
        if code.lstrip("<>=|").startswith("O"):
            raise UnsafeFileError("holds an array of Python objects, expected plain numbers; it was refused")
        return _Type(code)


class _Shell(_Fixed):
    """An array that is being read; `unpacked` puts the array in its place."""

    __slots__ = ("array",)

    def __init__(self) -> None:
        self.array: np.ndarray | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, in_columns, content = state
        self.array = _array(content, dtype, shape, order="F" if in_columns else "C")


class _MakeShell(_Fixed):
    """Stands for ``numpy.core.multiarray._reconstruct``, which makes an empty array for `_Shell.__setstate__`."""

    __slots__ = ()

    def __call__(self, kind: Any, shape: Any, code: Any) -> _Shell:
        if not isinstance(kind, _ArrayType):
            raise ValueError("an array of an unknown class")
        return _Shell()


class _FromBuffer(_Fixed):
    """Stands for ``numpy.core.numeric._frombuffer``, which protocol 5 uses."""

    __slots__ = ()

    def __call__(self, content: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
        return _array(content, dtype, shape, order=order)


class _Scalar(_Fixed):
    """Stands for ``numpy.core.multiarray.scalar``, a number or text of NumPy's."""

    __slots__ = ()

    def __call__(self, dtype: Any, content: Any) -> float | int | str:
        if isinstance(dtype, _Type) and _TEXT.fullmatch(dtype.code) and type(content) is bytes:
            coding = "utf-32-be" if dtype.code.startswith(">") else "utf-32-le"
            return content.decode(coding).rstrip("\0")
        return _array(content, dtype, (), order="C").item()


class _Encode(_Fixed):
    """Stands for ``_codecs.encode``, with which old protocols write bytes."""

    __slots__ = ()

    def __call__(self, text: Any, coding: Any) -> bytes:
        if type(text) is not str or coding != "latin1":
            raise ValueError("bytes in an unknown coding")
        return text.encode("latin1")


_STAND_INS = {
    ("numpy", "ndarray"): _ArrayType(),
    ("numpy", "dtype"): _MakeType(),
    ("numpy.core.multiarray", "_reconstruct"): _MakeShell(),
    ("numpy.core.multiarray", "scalar"): _Scalar(),
    ("numpy.core.numeric", "_frombuffer"): _FromBuffer(),
    ("_codecs", "encode"): _Encode(),
}


def _array(content: Any, dtype: Any, shape: Any, *, order: Any) -> np.ndarray:
    """Numbers out of their bytes, read-only.

    Raises:
        ValueError: these are no numbers, or their number is not that of the shape.
    """
    if type(content) is str:  # by Python 2
        content = content.encode("latin1")
    if type(content) not in (bytes, bytearray) or not isinstance(dtype, _Type) or order not in ("C", "F"):
        raise ValueError("an array that is not made of bytes")
    if type(shape) is not tuple or any(type(size) is not int or size < 0 for size in shape):
        raise ValueError(f"an array of the shape {_shorten(repr(shape))}")
    flat = np.frombuffer(content, dtype=dtype.numbers())
    if flat.size != np.prod(shape, dtype=object):
        raise ValueError(f"an array of the shape {_shorten(repr(shape))} with {flat.size} numbers")
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
