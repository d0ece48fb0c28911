"""Reading pictures that somebody else made: what cannot be used is refused with a short reason, never a crash."""

from __future__ import annotations

import errno
import hashlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dataset_prep.pictures.workers import SECONDS_PER_PICTURE, answers

if TYPE_CHECKING:
    from PIL.Image import Image

OK = "ok"
FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
ENDINGS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif"}
MAX_PIXELS = 50_000_000
MAX_FILE_BYTES = 200_000_000
MIN_SIDE = 8  # pixels
ROWS_AT_ONCE = 256
HEAD = 1024  # bytes that tell what a file is
TAIL = 64  # bytes that tell whether it has its end
# How files begin that are pictures, but of no accepted format; refused by name.
OTHER_FORMATS = (
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"8BPS", "PSD"),
    (b"%!PS", "EPS"),
    (b"%PDF", "PDF"),
    (b"SIMPLE  =", "FITS"),
    (b"\0\0\1\0", "ICO"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\xff\x0a", "JPEG XL"),
)
HTML = (b"<!doctype html", b"<html", b"<head", b"<body", b"<script")
# EXIF orientation -> name of Pillow's transposition that puts the picture upright.
UPRIGHT = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


class PictureError(ValueError):
    """A file that cannot be used as a picture; the message is the reason."""


class Inspected(NamedTuple):
    """What a look at a picture's file tells.

    Attributes:
        status: "ok", or why it cannot be used.
        ending: of its format, such as "jpg"; empty unless ok.
        bytes, sha256: of the file; 0 and empty if there is none.
        width, height: as stored, before EXIF turns it; 0 unless ok.
    """

    status: str
    ending: str = ""
    bytes: int = 0
    sha256: str = ""
    width: int = 0
    height: int = 0


def read_picture(path: Path) -> Image:
    """A picture as RGB: its first frame, turned as its EXIF says, over white where it is transparent.

    Colour profiles are not applied. At 50 million pixels it takes up to about 0.5 GB (WebP 0.8).

    Args:
        path: JPEG, PNG, WebP or GIF, by content; the name does not matter.

    Raises:
        FileNotFoundError: no such file.
        PictureError: "empty", "html", "truncated", "too small" (a side below 8 px), "format ..." (another one),
            "larger than 50 million pixels", "file larger than 200 MB", "text bomb", "out of memory", "unreadable" (by
            its rights or the disk), "not a picture" or "undecodable".
    """
    from PIL import Image

    path = Path(path)
    head, n_bytes = _head(path)
    _check_head(head, n_bytes)
    try:
        if picture_format(head) == "JPEG" and _is_filled_up(path, n_bytes):
            raise PictureError("truncated")
        with _opened(path) as image:
            _check_size(image.width, image.height)
            image.load()
            return _to_rgb(_upright(image))
    except PictureError:
        raise
    except Image.DecompressionBombError as error:
        raise _too_many_pixels() from error
    except MemoryError as error:
        raise PictureError("out of memory") from error
    except Exception as error:  # on broken files Pillow's decoders raise OSError, SyntaxError, ValueError, EOFError ...
        if "MAX_TEXT" in str(error):
            raise PictureError("text bomb") from error
        cut = "truncated" in str(error) or _ends_early(path, head, n_bytes)
        raise PictureError("truncated" if cut else "undecodable") from error


def inspect_picture(path: Path, known: Inspected | None = None) -> Inspected:
    """Hash a file and decode it once; a file without a usable picture gets its reason as status.

    Args:
        known: an earlier look, which saves the decoding if the content is the same.
    """
    path, sha256, n_bytes = Path(path), "", 0
    try:
        head, _ = _head(path)
        kind = picture_format(head)
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
                n_bytes += len(block)
        sha256 = digest.hexdigest()
        if known is not None and known.sha256 == sha256:
            return known._replace(ending=ENDINGS[kind] if known.status == OK else "")
        read_picture(path)
        with _opened(path) as image:
            return Inspected(OK, ENDINGS[kind], n_bytes, sha256, image.width, image.height)
    except FileNotFoundError:
        return Inspected("missing")
    except PictureError as error:
        return Inspected(str(error), bytes=n_bytes, sha256=sha256)
    except OSError:
        return Inspected("unreadable")


def decode_many(
    paths: Iterable[Path],
    transform: Callable[[Image], np.ndarray],
    *,
    workers: int,
    seconds: float = SECONDS_PER_PICTURE,
) -> Iterator[np.ndarray | PictureError]:
    """Read and transform pictures, in the order of ``paths``; a picture that cannot be used gives its reason.

    With workers, at most 24 pictures per worker are read ahead. A picture whose decoding or transform kills its
    worker or takes too long costs that picture only: "decoder crashed" or "timed out".

    Args:
        paths: read as far as needed.
        transform: of the RGB picture; with workers it is pickled, and runs in processes of their own.
        workers: 0 decodes here, without protection against crashes and hanging.
        seconds: time limit of a picture, with workers.

    Raises:
        Exception: whatever ``transform`` raises.
        ValueError: ``transform`` cannot be pickled.
        RuntimeError: a worker cannot be started.
    """
    read = partial(_read_and_transform, transform=transform)
    for answer in answers(read, ((path,) for path in paths), workers=workers, seconds=seconds):
        yield PictureError(answer) if isinstance(answer, str) else answer


def _read_and_transform(path: Path, *, transform: Callable[[Image], np.ndarray]) -> np.ndarray | PictureError:
    try:
        return transform(read_picture(path))
    except PictureError as error:
        return PictureError(str(error))  # without the traceback, which holds the picture
    except FileNotFoundError:
        return PictureError("missing")
    except MemoryError:
        return PictureError("out of memory")


# ---------------------------------------------------------------- before decoding


@contextmanager
def _opened(path: Path) -> Iterator[Image]:
    """A picture of an accepted format, of which the header alone was read."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd EXIF data, and size, which is checked here
        with Image.open(path, formats=FORMATS) as image:
            yield image


def _head(path: Path) -> tuple[bytes, int]:
    """First bytes of a file, and how many it has."""
    try:
        if not path.is_file():
            raise FileNotFoundError(path)
        with open(path, "rb") as file:
            return file.read(HEAD), os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise FileNotFoundError(path) from error
        raise PictureError("unreadable") from error


def _check_head(head: bytes, n_bytes: int) -> None:
    """Refuse what the first bytes and the size tell is no usable picture."""
    if not head:
        raise PictureError("empty")
    kind = picture_format(head)
    if kind is None:
        raise PictureError(_what_it_is(head))
    if n_bytes > MAX_FILE_BYTES:
        raise PictureError(f"file larger than {MAX_FILE_BYTES // 1_000_000} MB")
    if kind == "WEBP" and (size := _webp_size(head)):
        _check_size(*size)  # Pillow makes room for the whole canvas when it opens one


def picture_format(head: bytes) -> str | None:
    """Which of ``FORMATS`` a file's first 12 bytes or more announce, or None."""
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    return "WEBP" if head.startswith(b"RIFF") and head[8:12] == b"WEBP" else None


def _what_it_is(head: bytes) -> str:
    """Reason for a file that is of no accepted format."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(HTML):
        return "html"
    if text.startswith((b"<svg", b"<?xml", b"<!--")):
        if b"<svg" in text:
            return "format SVG"
        return "html" if b"<html" in text else "not a picture"
    if head[4:8] == b"ftyp":
        return "format AVIF or HEIC"
    for start, name in OTHER_FORMATS:
        if head.startswith(start):
            return f"format {name}"
    return "not a picture"


def _webp_size(head: bytes) -> tuple[int, int] | None:
    """Width and height of a WebP canvas, from the file's first 30 bytes."""
    kind = head[12:16]
    if len(head) < 30:
        return None
    if kind == b"VP8X":
        return int.from_bytes(head[24:27], "little") + 1, int.from_bytes(head[27:30], "little") + 1
    if kind == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        return int.from_bytes(head[26:28], "little") & 0x3FFF, int.from_bytes(head[28:30], "little") & 0x3FFF
    return None


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise _too_many_pixels()
    if min(width, height) < MIN_SIDE:
        raise PictureError("too small")


def _too_many_pixels() -> PictureError:
    return PictureError(f"larger than {MAX_PIXELS // 1_000_000} million pixels")


def _ends_early(path: Path, head: bytes, n_bytes: int) -> bool:
    """Whether a file that cannot be decoded lacks its format's end."""
    kind = picture_format(head)
    if kind == "WEBP":
        return n_bytes < int.from_bytes(head[4:8], "little") + 8
    tail = _tail(path, n_bytes)
    return {"JPEG": b"\xff\xd9", "PNG": b"IEND", "GIF": b"\0;"}[kind] not in tail


def _is_filled_up(path: Path, n_bytes: int) -> bool:
    """Whether zeros stand for the rest of a JPEG, as after half a download: they decode, as grey."""
    return not _tail(path, n_bytes).strip(b"\0") and not path.read_bytes().rstrip(b"\0").endswith(b"\xff\xd9")


def _tail(path: Path, n_bytes: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(max(0, n_bytes - TAIL))
        return file.read()


# ---------------------------------------------------------------- after decoding


def _upright(image: Image) -> Image:
    from PIL.Image import Transpose

    try:
        turn = UPRIGHT.get(image.getexif().get(0x0112))
    except Exception:  # broken EXIF data raises almost anything, and says nothing about the picture
        turn = None
    return image.transpose(Transpose[turn]) if turn else image


def _to_rgb(image: Image) -> Image:
    from PIL import Image

    if image.mode.startswith("I"):  # 16 bits of grey, which convert() would clip
        return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        return _over_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _over_white(image: Image) -> Image:
    """A picture with transparent parts over white, some rows at a time: a whole copy in between would take memory."""
    from PIL import Image

    white = Image.new("RGB", image.size, "white")
    for top in range(0, image.height, ROWS_AT_ONCE):
        box = (0, top, image.width, min(image.height, top + ROWS_AT_ONCE))
        part = image.crop(box).convert("RGBA")
        white.paste(part, box, mask=part)
    return white
