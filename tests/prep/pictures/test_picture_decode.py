"""Reading pictures: what is accepted becomes the right pixels, what is not gets its reason."""

from __future__ import annotations

import hashlib
import resource
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import picture_transforms
import pytest
from PIL import Image, ImageFile

from dataset_prep.pictures.decode import Inspected, PictureError, decode_many, inspect_picture, read_picture

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
# Four fields of 4 x 4: what is where tells how a picture was turned.
QUARTERS = np.array([[RED, GREEN], [BLUE, WHITE]], dtype=np.uint8).repeat(4, axis=0).repeat(4, axis=1)  # [8, 8, 3]


def picture(colour: str = "red", size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.new("RGB", size, colour)


def photo(size: tuple[int, int] = (64, 48)) -> Image.Image:
    """Noise, so that compression cannot make it small."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


def reason(path: Path) -> str:
    with pytest.raises(PictureError) as caught:
        read_picture(path)
    return str(caught.value)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *chunks: bytes, bits: int = 8, colours: int = 2, rows: bytes | None = None) -> bytes:
    """A PNG written by hand: what no library would write."""
    header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
    rows = (b"\0" + bytes(3 * width)) * height if rows is None else rows
    parts = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


# ---------------------------------------------------------------- accepted


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "gif"])
def test_four_formats_are_read_as_rgb(tmp_path, ending):
    picture("red").save(tmp_path / f"x.{ending}")
    image = read_picture(tmp_path / f"x.{ending}")
    assert image.mode == "RGB" and image.size == (40, 30)
    assert np.abs(np.asarray(image, dtype=int) - RED).max() <= 8


def test_F31_the_content_counts_and_not_the_ending(tmp_path):
    picture("red").save(tmp_path / "x.jpg", format="PNG")
    assert read_picture(tmp_path / "x.jpg").getpixel((0, 0)) == RED


def test_F34_transparent_parts_are_white(tmp_path):
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "alpha.png")
    Image.new("LA", (8, 8), (0, 0)).save(tmp_path / "grey.png")
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.save(tmp_path / "palette.png", transparency=1)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "one_colour.png", transparency=(255, 0, 0))
    palette.save(tmp_path / "palette.gif", transparency=1)
    for name in ("alpha.png", "grey.png", "palette.png", "one_colour.png", "palette.gif"):
        assert (np.asarray(read_picture(tmp_path / name)) == 255).all(), name


def test_F34_half_transparent_red_over_white_is_pink(tmp_path):
    Image.new("RGBA", (8, 8), (255, 0, 0, 51)).save(tmp_path / "x.png")
    assert read_picture(tmp_path / "x.png").getpixel((3, 3)) == (255, 204, 204)  # 0.2 * red + 0.8 * white


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_far_down_a_tall_picture_is_treated_like_that_at_the_top(tmp_path, mode):
    transparent = Image.new("RGBA", (8, 700), (255, 0, 0, 255))
    transparent.paste((255, 0, 0, 0), (0, 300, 8, 600))
    transparent.convert(mode).save(tmp_path / "x.png")
    column = np.asarray(read_picture(tmp_path / "x.png"))[:, 0, 1]  # green: white has it, red and its grey have less
    assert (column[300:600] == 255).all() and (column[:300] < 100).all() and (column[600:] < 100).all()


def test_F34_palette_grey_one_bit_cmyk_and_sixteen_bits_become_rgb(tmp_path):
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([255, 0, 0])
    palette.save(tmp_path / "palette.gif")
    Image.new("L", (8, 8), 100).save(tmp_path / "grey.png")
    Image.new("1", (8, 8), 1).save(tmp_path / "bit.png")
    Image.new("CMYK", (8, 8), (0, 0, 0, 0)).save(tmp_path / "cmyk_white.jpg")
    Image.new("CMYK", (8, 8), (0, 0, 0, 255)).save(tmp_path / "cmyk_black.jpg", quality=100)
    Image.fromarray(np.full((8, 8), 100 * 256 + 255, dtype=np.uint16)).save(tmp_path / "deep_grey.png")
    deep = b"\0" + struct.pack(">HHH", 200 << 8, 100 << 8, 50 << 8) * 8
    (tmp_path / "deep.png").write_bytes(png(8, 8, bits=16, rows=deep * 8))
    pixels = {path.name: np.asarray(read_picture(path)).reshape(-1, 3) for path in sorted(tmp_path.iterdir())}
    assert all((rows == rows[0]).all() for rows in pixels.values())
    assert {name: tuple(rows[0].tolist()) for name, rows in pixels.items()} == {
        "bit.png": WHITE,
        "cmyk_black.jpg": (0, 0, 0),
        "cmyk_white.jpg": WHITE,
        "deep.png": (200, 100, 50),
        "deep_grey.png": (100, 100, 100),
        "grey.png": (100, 100, 100),
        "palette.gif": RED,
    }


@pytest.mark.parametrize("ending", ["gif", "webp", "png"])
def test_F34_the_first_frame_of_a_moving_picture_counts(tmp_path, ending):
    options = {"lossless": True} if ending == "webp" else {}
    picture("red").save(tmp_path / f"x.{ending}", save_all=True, append_images=[picture("blue")], **options)
    with Image.open(tmp_path / f"x.{ending}") as image:
        assert image.n_frames == 2
    assert (np.asarray(read_picture(tmp_path / f"x.{ending}")) == RED).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_F34_a_picture_is_turned_as_its_exif_says(tmp_path, orientation):
    """EXIF 2.3, tag 274: where row 0 and column 0 of the stored pixels belong in the picture as it is to be seen."""
    stored = {
        1: QUARTERS,
        2: QUARTERS[:, ::-1],
        3: QUARTERS[::-1, ::-1],
        4: QUARTERS[::-1],
        5: QUARTERS.transpose(1, 0, 2),
        6: QUARTERS.transpose(1, 0, 2)[::-1],  # row 0 is the right side: turned left by 90 degrees when stored
        7: QUARTERS[::-1, ::-1].transpose(1, 0, 2),
        8: QUARTERS[::-1].transpose(1, 0, 2),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "x.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(read_picture(tmp_path / "x.png")), QUARTERS)


def test_broken_exif_data_does_not_cost_the_picture(tmp_path):
    picture("red").save(tmp_path / "x.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff rubbish", quality=100)
    assert read_picture(tmp_path / "x.jpg").size == (40, 30)


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "empty"),
        (b"\n <!DOCTYPE html><html>404 not found</html>", "html"),
        (b"<html>404 not found</html>", "html"),
        (b'<?xml version="1.0"?><html xmlns="x"></html>', "html"),
        (b'{"error": "not found"}', "not a picture"),
        (bytes(500), "not a picture"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "format SVG"),
        (b'<?xml version="1.0"?><!-- x --><svg/>', "format SVG"),
        (b"BM" + bytes(60), "format BMP"),
        (b"II*\0" + bytes(60), "format TIFF"),
        (b"MM\0*" + bytes(60), "format TIFF"),
        (b"8BPS" + bytes(60), "format PSD"),
        (b"%!PS-Adobe-3.0 EPSF", "format EPS"),
        (b"SIMPLE  =                    T", "format FITS"),
        (b"\0\0\0\x1cftypavif" + bytes(60), "format AVIF or HEIC"),
        (b"\xff\xd8\xff" + bytes(100), "truncated"),
        (b"\x89PNG\r\n\x1a\n", "truncated"),
        (b"GIF89a", "truncated"),
        (b"RIFF\xff\0\0\0WEBPVP8 ", "truncated"),
    ],
)
def test_F31_F33_what_is_no_accepted_picture_is_refused_by_its_content(tmp_path, content, expected):
    (tmp_path / "x.jpg").write_bytes(content)
    assert reason(tmp_path / "x.jpg") == expected


@pytest.mark.parametrize("format", ["BMP", "TIFF", "PPM", "ICO"])
def test_F33_real_files_of_other_formats_are_refused(tmp_path, format):
    picture("red", (16, 16)).save(tmp_path / "x.jpg", format=format)
    assert reason(tmp_path / "x.jpg") == ("not a picture" if format == "PPM" else f"format {format}")


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "gif"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_F32_a_file_cut_short_is_truncated(tmp_path, ending, share):
    photo().save(tmp_path / f"whole.{ending}")
    content = (tmp_path / f"whole.{ending}").read_bytes()
    (tmp_path / "x").write_bytes(content[: int(len(content) * share)])
    assert reason(tmp_path / "x") == "truncated"
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


@pytest.mark.parametrize(
    ("ending", "options"),
    [("jpg", {}), ("jpg", {"progressive": True}), ("png", {}), ("webp", {}), ("webp", {"lossless": True}), ("gif", {})],
)
def test_F32_cut_anywhere_a_picture_is_whole_or_refused_and_never_half_grey(tmp_path, ending, options):
    photo((9, 8)).save(tmp_path / f"whole.{ending}", **options)
    content, whole = (tmp_path / f"whole.{ending}").read_bytes(), np.asarray(read_picture(tmp_path / f"whole.{ending}"))
    for n in range(len(content)):
        (tmp_path / "x").write_bytes(content[:n])
        try:
            np.testing.assert_array_equal(np.asarray(read_picture(tmp_path / "x")), whole)  # only the end mark lacks
        except PictureError as error:
            assert str(error) in ("empty", "not a picture", "truncated")


@pytest.mark.parametrize("filler", [b"\0", b"\xff"])
def test_F32_a_download_that_was_filled_up_is_truncated(tmp_path, filler):
    photo().save(tmp_path / "x.jpg")
    content = (tmp_path / "x.jpg").read_bytes()
    (tmp_path / "x.jpg").write_bytes(content[:2000] + filler * (len(content) - 2000))
    assert reason(tmp_path / "x.jpg") == "truncated"


def test_zeros_after_the_end_of_a_picture_do_no_harm(tmp_path):
    photo().save(tmp_path / "x.jpg")
    (tmp_path / "x.jpg").write_bytes((tmp_path / "x.jpg").read_bytes() + bytes(500))
    assert read_picture(tmp_path / "x.jpg").size == (64, 48)


def test_F33_a_gif_whose_first_frame_is_larger_than_it_says(tmp_path):
    picture(size=(10, 10)).convert("P").save(tmp_path / "x.gif")
    content = bytearray((tmp_path / "x.gif").read_bytes())
    frame = content.index(b",", 13)
    content[frame + 5 : frame + 9] = struct.pack("<HH", 65535, 65535)
    (tmp_path / "x.gif").write_bytes(content)
    assert reason(tmp_path / "x.gif") == "larger than 50 million pixels"


def test_F32_a_damaged_png_is_undecodable(tmp_path):
    photo().save(tmp_path / "x.png")
    content = bytearray((tmp_path / "x.png").read_bytes())
    content[1000] ^= 255
    (tmp_path / "x.png").write_bytes(content)
    assert reason(tmp_path / "x.png") == "undecodable"


@pytest.mark.parametrize("size", [(8000, 7000), (20_000, 20_000)])  # the second is beyond Pillow's own limit
def test_F33_a_huge_picture_is_refused_before_it_is_decoded(tmp_path, size):
    Image.new("1", size).save(tmp_path / "x.png")
    assert reason(tmp_path / "x.png") == "larger than 50 million pixels"


def test_F33_a_huge_webp_canvas_is_refused_before_room_is_made_for_it(tmp_path):
    canvas = struct.pack("<I", 0)[:4] + (11_999).to_bytes(3, "little") + (11_999).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + canvas
    (tmp_path / "x.webp").write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert reason(tmp_path / "x.webp") == "larger than 50 million pixels"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


def test_F33_a_huge_file_is_refused_before_it_is_read(tmp_path):
    picture().save(tmp_path / "x.png")
    with open(tmp_path / "x.png", "r+b") as file:
        file.truncate(200_000_001)  # a hole: takes no space
    assert reason(tmp_path / "x.png") == "file larger than 200 MB"


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_F33_a_text_chunk_that_unfolds_to_megabytes_is_refused(tmp_path, kind):
    packed = zlib.compress(bytes(50_000_000), 9)
    content = {b"zTXt": b"x\0\0", b"iTXt": b"x\0\1\0\0\0", b"iCCP": b"x\0\0"}[kind] + packed
    (tmp_path / "x.png").write_bytes(png(8, 8, chunk(kind, content)))
    assert reason(tmp_path / "x.png") == "text bomb"


def test_F33_no_width_is_no_picture(tmp_path):
    (tmp_path / "x.png").write_bytes(png(0, 10))
    assert reason(tmp_path / "x.png") in ("undecodable", "too small")


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (7, 100)])
def test_F34_less_than_eight_pixels_on_a_side_is_too_small(tmp_path, size):
    picture(size=size).save(tmp_path / "x.png")
    assert reason(tmp_path / "x.png") == "too small"


def test_eight_pixels_on_a_side_are_enough(tmp_path):
    picture(size=(8, 8)).save(tmp_path / "x.png")
    assert read_picture(tmp_path / "x.png").size == (8, 8)


def test_F31_no_file_a_folder_and_an_endless_name_are_not_found(tmp_path):
    for path in (tmp_path / "none.jpg", tmp_path, tmp_path / ("x" * 5000)):
        with pytest.raises(FileNotFoundError):
            read_picture(path)


# ---------------------------------------------------------------- inspect


def test_a_look_at_a_file_tells_content_hash_and_size(tmp_path):
    picture("red").save(tmp_path / "x.jpg", format="PNG")
    content = (tmp_path / "x.jpg").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    assert inspect_picture(tmp_path / "x.jpg") == Inspected("ok", "png", len(content), digest, 40, 30)
    (tmp_path / "x.jpg").write_bytes(b"<html>")
    assert inspect_picture(tmp_path / "x.jpg")[:3] == ("html", "", 6)
    assert inspect_picture(tmp_path / "none.jpg") == Inspected("missing")


def test_an_earlier_look_is_believed_while_the_content_is_the_same(tmp_path):
    (tmp_path / "x.jpg").write_bytes(b"\xff\xd8\xff no picture, but it was one when it was looked at")
    digest = hashlib.sha256((tmp_path / "x.jpg").read_bytes()).hexdigest()
    known = Inspected("ok", "", 50, digest, 40, 30)
    assert inspect_picture(tmp_path / "x.jpg", known) == known._replace(ending="jpg")
    assert inspect_picture(tmp_path / "x.jpg", known._replace(sha256="other")).status == "truncated"


# ---------------------------------------------------------------- many


@pytest.fixture
def colours(tmp_path) -> list[Path]:
    paths = []
    for number, colour in enumerate(["blue", "red", "lime", "white", "red", "black"]):
        paths.append(tmp_path / f"{number}.png")
        picture(colour, (8, 8)).save(paths[-1])
    return paths


def outcome(answer: np.ndarray | PictureError) -> object:
    return str(answer) if isinstance(answer, PictureError) else tuple(answer[0, 0].tolist())


def test_pictures_come_in_order_and_unusable_ones_as_their_reason(colours, tmp_path):
    (tmp_path / "page.jpg").write_bytes(b"<html>")
    paths = [*colours[:2], tmp_path / "page.jpg", tmp_path / "none.jpg", *colours[2:]]
    here = [outcome(answer) for answer in decode_many(paths, picture_transforms.pixels, workers=0)]
    assert here == [BLUE, RED, "html", "missing", GREEN, WHITE, RED, (0, 0, 0)]
    there = [outcome(answer) for answer in decode_many(iter(paths), picture_transforms.pixels, workers=2)]
    assert there == here


@pytest.mark.parametrize(
    ("transform", "expected"),
    [
        ("crash_on_red", "decoder crashed"),
        ("hang_on_red", "timed out"),
        ("eat_memory_on_red", "out of memory"),
    ],
)
def test_F33_F35_a_crash_a_hang_or_a_glutton_costs_its_picture_only(colours, transform, expected):
    transform = getattr(picture_transforms, transform)
    answers = [outcome(answer) for answer in decode_many(colours, transform, workers=1, seconds=1.5)]
    assert answers == [BLUE, expected, GREEN, WHITE, expected, (0, 0, 0)]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_transform_itself_is_raised(colours, workers):
    with pytest.raises(KeyError, match="no red"):
        list(decode_many(colours, picture_transforms.fail_on_red, workers=workers))


def test_a_transform_that_cannot_be_pickled_is_refused(colours):
    with pytest.raises(ValueError, match="cannot be sent to another process.*use 0 workers"):
        list(decode_many(colours, lambda image: np.asarray(image), workers=1))


def test_who_stops_reading_does_not_wait_for_a_picture_that_hangs(colours):
    blue, red = colours[:2]
    answers = decode_many([blue] * 8 + [red] * 8, picture_transforms.hang_on_red, workers=1, seconds=60)
    assert outcome(next(answers)) == BLUE
    start = time.monotonic()
    answers.close()
    assert time.monotonic() - start < 10


def test_look_ahead_is_bounded(colours):
    n_read = 0

    def endless():
        nonlocal n_read
        while True:
            n_read += 1
            yield colours[n_read % 6]

    answers = decode_many(endless(), picture_transforms.many_pixels, workers=1)
    assert next(answers)[0, 0, 0] == 255
    assert n_read <= 24
    answers.close()
