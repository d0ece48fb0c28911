"""Pictures out of a folder, the index, and the command."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset_prep.__main__ import main
from dataset_prep.folder_writer import refuse_existing
from dataset_prep.locking import locked
from dataset_prep.pictures import check_pictures, decode, picture_files, read_index, store
from dataset_prep.pictures.local import take_pictures
from recbole_mm.data.files import file_info, write_table
from recbole_mm.data.layout import Manifest
from recbole_mm.errors import DatasetError

REPOSITORY = Path(__file__).resolve().parents[3]
DATA = REPOSITORY.parent / "shared" / "data"


def save(path: Path, colour: str = "red", **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 30), colour).save(path, **options)
    return path


def dataset(folder: Path, column: str | None, *values: str) -> Path:
    """A folder whose items i0, i1, ... name these pictures, or are themselves called so if no column is given."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = (
        {"item_id:token": list(values)} if column is None else {"item_id:token": [f"i{n}" for n in range(len(values))]}
    )
    if column is not None:
        columns[column] = list(values)
    write_table(folder / f"{folder.name}.item", columns)
    return folder


def take(folder: Path, images: Path, **options) -> dict[str, str]:
    """Status by source, or by item where no source is named."""
    take_pictures(folder, images, **{"workers": 0, "progress": False, **options})
    return {picture.source or picture.item_id: picture.status for picture in read_index(folder)}


def state(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def images(tmp_path) -> Path:
    return tmp_path / "images"


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "shop"


# ---------------------------------------------------------------- local


def test_pictures_are_linked_under_the_hash_of_their_content(folder, images):
    path = save(images / "a/red.png")
    save(images / "b.jpg", "blue", format="PNG")
    dataset(folder, "image:token", "a/red.png", "b.jpg", "a/red.png", "")
    assert take(folder, images) == {"a/red.png": "ok", "b.jpg": "ok", "i3": "no picture named"}
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    first, second, third, fourth = read_index(folder)
    size = path.stat().st_size
    assert first == ("i0", 0, "a/red.png", "ok", f"{digest[:2]}/{digest}.png", size, digest, 20, 30)
    assert second.file.endswith(".png") and third.file == first.file
    assert fourth == ("i3", 0, "", "no picture named", "", 0, "", 0, 0)
    assert os.path.samefile(folder / "pictures" / first.file, path)
    assert (folder / "pictures/index.tsv").read_text().splitlines()[0].split("\t") == [
        "item_id", "number", "source", "status", "file", "bytes", "sha256", "width", "height",
    ]  # fmt: skip


def test_on_another_disk_pictures_are_copied(folder, images, monkeypatch):
    path = save(images / "red.png")

    def no_link(*args):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_link)
    take(dataset(folder, "image:token", "red.png"), images)
    copy = picture_files(folder)["i0"][0]
    assert copy.read_bytes() == path.read_bytes() and not os.path.samefile(copy, path)
    assert check_pictures(folder, hashes=True) == []


@pytest.mark.parametrize("place", ["shop/raw", "elsewhere"])
def test_in_place_the_files_stay_and_the_index_finds_them(folder, tmp_path, place):
    images = tmp_path / place
    dataset(folder, "image:token", "x y/red.png")
    path = save(images / "x y/red.png")
    take(folder, images, in_place=True)
    assert picture_files(folder) == {"i0": [path.resolve()]}
    assert sorted(p.name for p in (folder / "pictures").iterdir()) == ["index.tsv"]
    assert Manifest.load(folder).settings["pictures"]["images"] == Path(place).name
    assert str(tmp_path) not in (folder / "pictures/index.tsv").read_text() + (folder / "manifest.json").read_text()


def test_in_place_through_a_linked_dataset_folder(tmp_path, folder, images):
    save(images / "red.png")
    dataset(folder, "image:token", "red.png")
    (tmp_path / "deep/er").mkdir(parents=True)
    shutil.move(folder, tmp_path / "deep/er/shop")
    folder.symlink_to(tmp_path / "deep/er/shop")
    take(folder, images, in_place=True)
    assert picture_files(folder)["i0"][0].is_file() and check_pictures(folder) == []


def test_lists_of_paths_are_parted_by_blanks_and_percent_encoded(folder, images):
    save(images / "a b.png")
    save(images / "c.png", "blue")
    dataset(folder, "image_urls:token_seq", "c.png a%20b.png", "c.png")
    take(folder, images)
    assert [(p.item_id, p.number, p.source, p.status) for p in read_index(folder)] == [
        ("i0", 0, "c.png", "ok"), ("i0", 1, "a%20b.png", "ok"), ("i1", 0, "c.png", "ok"),
    ]  # fmt: skip
    assert [len(files) for files in picture_files(folder).values()] == [2, 1]
    take(folder, images, per_item=1)
    assert [p.status for p in read_index(folder)] == ["ok", "not asked for", "ok"]


def test_a_column_of_addresses_gives_way_to_files_called_like_the_items(folder, images):
    save(images / "i1.png")
    dataset(folder, "image_urls:token_seq", "https://shop.example/a.jpg", "https://shop.example/b.jpg")
    assert take(folder, images) == {"i0": "no picture named", "i1.png": "ok"}


def test_F15_no_file_is_named_after_an_item_or_looked_for_outside(folder, images, tmp_path):
    save(tmp_path / "secret.png")
    save(images / "x.png")
    ids = ["../secret", "/etc/x", "C:\\x", "a" * 5000, "x", ".."]
    assert set(take(dataset(folder, None, *ids), images)) == {"x.png", *ids} - {"x"}
    assert not [path for path in folder.rglob("*") if "secret" in path.name or "aaa" in path.name]


@pytest.mark.parametrize(
    "path",
    [
        "../secret.png",
        "a/../../secret.png",
        "/etc/passwd",
        "C:\\x.png",
        "..\\secret.png",
        "\\\\server\\share\\x.png",
        "a/..",
    ],
)
def test_F15_a_path_that_leaves_the_folder_is_refused(folder, images, tmp_path, path):
    save(tmp_path / "secret.png")
    save(images / "a/x.png")
    assert take(dataset(folder, "image:token", path, "a/x.png"), images) == {
        path: "outside the folder",
        "a/x.png": "ok",
    }


def test_F15_an_encoded_path_that_leaves_the_folder_is_refused(folder, images, tmp_path):
    save(tmp_path / "secret.png")
    images.mkdir()
    source = "%2e%2e%2fsecret.png"
    assert take(dataset(folder, "image_urls:token_seq", source), images) == {source: "outside the folder"}


def test_a_pipe_and_a_circle_of_links_are_no_pictures(folder, images):
    images.mkdir()
    os.mkfifo(images / "pipe.png")
    (images / "circle.png").symlink_to("circle.png")
    assert set(take(dataset(folder, "image:token", "pipe.png", "circle.png"), images).values()) == {"missing"}


def test_F15_names_that_no_system_allows_are_missing(folder, images):
    images.mkdir()
    names = ["x" * 5000, "a\0b.png", " "]
    assert set(take(dataset(folder, "image:token", *names), images).values()) == {"missing"}


def test_F31_F32_F33_F34_bad_pictures_stop_nothing_and_are_listed_and_counted(folder, images):
    save(images / "ok.png")
    save(images / "moving.gif", save_all=True, append_images=[Image.new("RGB", (20, 30), "blue")])
    Image.new("CMYK", (20, 30)).save(images / "cmyk.jpg")
    Image.new("P", (20, 30)).save(images / "palette.png")
    Image.new("1", (8000, 7000)).save(images / "huge.png")
    Image.new("RGB", (1, 1)).save(images / "dot.png")
    (images / "short.jpg").write_bytes(save(images / "x.jpg").read_bytes()[:300])
    (images / "empty.jpg").touch()
    (images / "page.jpg").write_text("<html>not found</html>")
    (images / "folder.jpg").mkdir()
    expected = {
        "ok.png": "ok", "moving.gif": "ok", "cmyk.jpg": "ok", "palette.png": "ok",
        "huge.png": "larger than 50 million pixels", "dot.png": "too small", "short.jpg": "truncated",
        "empty.jpg": "empty", "page.jpg": "html", "folder.jpg": "missing", "none.jpg": "missing",
    }  # fmt: skip
    dataset(folder, "image:token", *expected)
    report = take_pictures(folder, images, workers=1, progress=False)
    assert {picture.source: picture.status for picture in read_index(folder)} == expected
    assert report.n_items == 11 and report.n_with == 4
    assert report.counts == {
        "ok": 4, "missing": 2, "larger than 50 million pixels": 1, "too small": 1, "truncated": 1, "empty": 1,
        "html": 1,
    }  # fmt: skip
    lines = str(report).splitlines()
    assert lines[0].startswith("pictures: 4 of 11 items have one, ") and lines[1] == "  4 ok"
    assert "  2 missing (such as item 'i9')" in lines
    assert all(picture.file == "" for picture in read_index(folder) if picture.status != "ok")


# ---------------------------------------------------------------- again


def test_same_input_same_bytes_whatever_the_workers_and_the_history(folder, images):
    for n, colour in enumerate(["red", "blue", "lime"]):
        save(images / f"{n}.png", colour)
    (images / "3.png").write_text("<html>")
    dataset(folder, "image:token", *(f"{n}.png" for n in range(5)))
    take(folder, images, workers=0)
    fresh = state(folder)
    take(folder, images, workers=2)
    assert state(folder) == fresh
    take(folder, images, in_place=True)
    take(folder, images)
    assert state(folder) == fresh


def test_only_new_and_changed_files_are_decoded_again(folder, images, monkeypatch):
    for n in range(3):
        save(images / f"{n}.png", ["red", "blue", "lime"][n])
    (images / "page.png").write_text("<html>")
    dataset(folder, "image:token", "0.png", "1.png", "2.png", "page.png")
    take(folder, images)
    read, really = [], decode.read_picture
    monkeypatch.setattr(decode, "read_picture", lambda path: read.append(path.name) or really(path))
    save(images / "1.png", "white")
    take(folder, images)
    assert read == ["1.png"]
    read.clear()
    take(folder, images, retry_failed="temporary")
    assert read == []
    take(folder, images, retry_failed="all")
    assert read == ["page.png"]


def test_a_journal_that_ends_in_half_a_line_is_read_up_to_there(folder, images):
    save(images / "0.png")
    dataset(folder, "image:token", "0.png")
    found = decode.inspect_picture(images / "0.png")
    for cut in range(3):  # the half line must not become a whole one at the next start
        with store.Journal(folder) as journal:
            assert list(journal.known) == ["a\u00fc.png", "b.png"][:cut]
            journal.add(["a\u00fc.png", "b.png", "c.png"][cut], found)
        path = folder / "pictures/.journal.tsv"
        whole = path.read_bytes()
        path.write_bytes(whole + "d\u00fc.png\tok\tpng\t12".encode()[: 2 + cut])
    assert take(folder, images) == {"0.png": "ok"}
    assert not (folder / "pictures/.journal.tsv").exists()


def test_a_journal_with_lines_that_are_none_is_read_all_the_same(folder, images):
    save(images / "0.png")
    dataset(folder, "image:token", "0.png")
    with store.Journal(folder) as journal:
        journal.add("0.png", decode.inspect_picture(images / "0.png"))
    path = folder / "pictures/.journal.tsv"
    path.write_bytes(b"\0\0\xff\n" + path.read_bytes() + b"a\tok\tpng\tx\t\t0\t0\n")
    assert list(store.Journal(folder).known) == ["0.png"]
    assert take(folder, images) == {"0.png": "ok"}


def test_F48_a_full_disk_leaves_no_half_copy_and_the_next_run_goes_on(folder, images, monkeypatch, capsys):
    save(images / "0.png")
    save(images / "1.png", "blue")
    dataset(folder, "image:token", "0.png", "1.png")
    command = ["pictures", "--dataset", str(folder), "--images", str(images), "--workers", "0"]

    def no_link(*args):
        raise OSError(18, "Invalid cross-device link")

    def full(source, target):
        if Path(source).name == "1.png":
            Path(target).write_bytes(b"half")
            raise OSError(28, "No space left on device", str(target))
        return really(source, target)

    really = shutil.copyfile
    monkeypatch.setattr(os, "link", no_link)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        assert main(command) == 4
    assert "No space left on device" in capsys.readouterr().err
    assert read_index(folder) is None and not list(folder.rglob("*.partial-*"))
    assert main(command) == 0
    assert len(picture_files(folder)) == 2 and check_pictures(folder, hashes=True) == []


@pytest.mark.slow
def test_F45_killed_in_the_middle_it_goes_on_and_ends_with_the_same_bytes(folder, images):
    generator = np.random.default_rng(0)
    for n in range(60):
        save(images / f"{n}.png")
        Image.fromarray(generator.integers(0, 256, (900, 900, 3), dtype=np.uint8)).save(images / f"{n}.png")
    dataset(folder, "image:token", *(f"{n}.png" for n in range(60)))
    command = [
        sys.executable,
        "-m",
        "dataset_prep",
        "pictures",
        "--dataset",
        folder,
        "--images",
        images,
        "--workers",
        "1",
    ]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal = folder / "pictures/.journal.tsv"
    while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > 5):
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert read_index(folder) is None and 5 < journal.read_bytes().count(b"\n") < 60
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    resumed = state(folder)
    shutil.rmtree(folder / "pictures")
    (folder / "manifest.json").unlink()
    take(folder, images)
    assert state(folder) == resumed


def test_two_processes_do_not_write_one_dataset(folder, images):
    save(images / "0.png")
    dataset(folder, "image:token", "0.png")
    code = (
        "import pathlib, sys; from dataset_prep.locking import locked\nwith locked(pathlib.Path(sys.argv[1])): input()"
    )
    other = subprocess.Popen([sys.executable, "-c", code, folder], cwd=REPOSITORY, stdin=subprocess.PIPE)
    try:
        owner = folder.parent / ".shop.owner"
        while not (owner.exists() and owner.read_text()):
            time.sleep(0.01)
        with pytest.raises(DatasetError, match="is being written by process"):
            take(folder, images)
    finally:
        other.communicate(b"\n")


def test_who_holds_the_lock_already_may_take_pictures(folder, images):
    save(images / "0.png")
    with locked(folder):
        assert take(dataset(folder, "image:token", "0.png"), images) == {"0.png": "ok"}


# ---------------------------------------------------------------- index


def test_without_an_index_there_are_no_pictures(folder):
    dataset(folder, None, "a")
    assert read_index(folder) is None and picture_files(folder) is None and check_pictures(folder) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"item\tfile\n", r"index.tsv, line 1: 'item.tfile', expected the columns item_id, number, .*delete it"),
        (b"", "line 1: '', expected the columns"),
        (b"\xff\xfe", "cannot read .*index.tsv"),
        ("\t".join(store.COLUMNS).encode() + b"\na\t0\n", r"line 2: 'a.t0' is no line of an index; delete it and make"),
        ("\t".join(store.COLUMNS).encode() + b"\na\tx\t\tok\t\t0\t\t0\t0\n", "line 2: .* is no line of an index"),
    ],
)
def test_a_broken_index_is_refused(folder, content, message):
    dataset(folder, None, "a")
    (folder / "pictures").mkdir()
    (folder / "pictures/index.tsv").write_bytes(content)
    with pytest.raises(DatasetError, match=f"(?s){message}"):
        read_index(folder)


def test_missing_shortened_and_changed_pictures_are_found(folder, images):
    for name, colour in (("a", "red"), ("b", "blue"), ("c", "lime"), ("d", "white")):
        save(images / f"{name}.png", colour)
    take(dataset(folder, None, "a", "b", "c", "d"), images, in_place=True)
    (images / "a.png").unlink()
    (images / "b.png").write_bytes(b"x")
    changed = bytearray((images / "c.png").read_bytes())
    changed[-1] ^= 1
    (images / "c.png").write_bytes(changed)
    missing, short = check_pictures(folder)
    assert "a.png is missing (item 'a'); make the pictures again with" in missing
    assert f"b.png has 1 bytes, the index says {read_index(folder)[1].bytes}; make" in short
    assert "c.png is another picture than when it was indexed" in check_pictures(folder, hashes=True)[2]


def test_the_manifest_names_the_index_and_keeps_what_was_there(folder, images):
    save(images / "a.png")
    dataset(folder, None, "a", "b")
    Manifest(name="shop", files={"shop.item": file_info(folder / "shop.item")}, settings={"x": 1}).save(folder)
    take(folder, images)
    made = Manifest.load(folder)
    assert set(made.files) == {"shop.item", "pictures/index.tsv"}
    assert made.files["pictures/index.tsv"] == file_info(folder / "pictures/index.tsv")
    assert made.settings == {
        "x": 1,
        "pictures": {
            "from": "folder", "images": "images", "column": "item_id", "per_item": None, "in_place": False,
            "counts": {"ok": 1, "no picture named": 1}, "items": 2, "items_with_picture": 1,
        },
    }  # fmt: skip


# ---------------------------------------------------------------- errors and command


def test_a_missing_folder_or_column_is_named(folder, images, tmp_path):
    dataset(folder, "image:token", "a.png")
    with pytest.raises(DatasetError, match="no folder of pictures .*images"):
        take(folder, images)
    images.mkdir()
    with pytest.raises(DatasetError, match="has no column photo, only item_id, image; see --column"):
        take(folder, images, column="photo")
    with pytest.raises(DatasetError, match="no dataset folder"):
        take(tmp_path / "none", images)
    assert not (tmp_path / "none").exists() and not (folder / "pictures").exists()
    (tmp_path / "tab\tbed").mkdir()
    with pytest.raises(DatasetError, match="has a tab or line break in its path; rename it, or leave out --in-place"):
        take(folder, tmp_path / "tab\tbed", in_place=True)


def test_the_command_takes_pictures_and_reports(folder, images, capsys):
    save(images / "a.png")
    dataset(folder, None, "a", "b")
    arguments = ["pictures", "--dataset", str(folder), "--images", str(images), "--workers", "0"]
    assert main(arguments) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("pictures: 1 of 2 items have one") and out[2] == "  1 no picture named (such as item 'b')"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--in-place"], "--in-place belongs to --images DIR; leave it out"),
        (["--images", ".", "--threads", "3"], "--threads belongs to downloads, without --images; leave it out"),
        (["--images", ".", "--allow-private"], "--allow-private belongs to downloads"),
        (["--images", ".", "--ignore-opt-outs"], "--ignore-opt-outs belongs to downloads"),
    ],
)
def test_options_that_would_be_ignored_are_refused(folder, capsys, arguments, message):
    dataset(folder, None, "a")
    assert main(["pictures", "--dataset", str(folder), *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--per-host", "0", "a number from 0.001 to 1000000, not 0"),
        ("--timeout", "inf", "a number from 0.001 to 1000000, not inf"),
        ("--workers", "-1", "a whole number of at least 0, not -1"),
        ("--threads", "0", "a whole number of at least 1, not 0"),
    ],
)
def test_numbers_out_of_range_are_refused(capsys, option, value, message):
    with pytest.raises(SystemExit) as caught:
        main(["pictures", "--dataset", "x", f"{option}={value}"])
    assert caught.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["hm-mini", "ml-100k-mm"])
def test_real_pictures_are_all_usable(tmp_path, name):
    if not (DATA / name).is_dir():
        pytest.skip(f"needs {DATA / name}")
    lines = (DATA / name / f"{name}.item").read_text().splitlines()[:200]
    (tmp_path / name).mkdir()
    (tmp_path / name / f"{name}.item").write_text("\n".join(lines) + "\n")
    report = take_pictures(tmp_path / name, DATA / name, in_place=True, workers=0, progress=False)
    assert report.n_items == 199 and report.n_with >= 190 and set(report.counts) <= {"ok", "no picture named"}


def test_check_looks_at_the_pictures_too(tmp_path, capsys):
    folder = dataset(tmp_path / "shop", "image:token", "a.png")
    write_table(folder / "shop.inter", {"user_id:token": ["u"], "item_id:token": ["i0"], "timestamp:float": [1.0]})
    save(tmp_path / "given" / "a.png")
    take(folder, tmp_path / "given")
    assert main(["check", str(folder)]) == 0
    ((path,),) = picture_files(folder).values()
    path.unlink()
    capsys.readouterr()
    assert main(["check", str(folder)]) == 3
    assert "1 problem(s) with its pictures" in capsys.readouterr().err


def test_a_folder_with_its_pictures_can_be_replaced(tmp_path):
    folder = dataset(tmp_path / "shop", "image:token", "a.png")
    save(tmp_path / "given" / "a.png")
    take(folder, tmp_path / "given")
    manifest = Manifest.load(folder)
    files = {**manifest.files, "shop.item": file_info(folder / "shop.item")}
    replace(manifest, files=files).save(folder)
    refuse_existing(folder, overwrite=True)
    (folder / "pictures" / "mine.txt").write_text("not ours")
    with pytest.raises(DatasetError, match="its manifest does not name pictures/mine.txt"):
        refuse_existing(folder, overwrite=True)
