"""A prepared folder is complete or not there, whatever stops its writer at whichever step."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dataset_prep.folder_writer import place_of, refuse_existing, write_folder
from recbole_mm.data.layout import Manifest, check_folder
from recbole_mm.errors import DatasetError, SettingError

ROOT = Path(__file__).resolve().parents[2]


def fill(text: str = "new") -> Callable[[Path], None]:
    def write(partial: Path) -> None:
        rows = "user_id:token\titem_id:token\ttimestamp:float\nu\ti\t1.0\n"
        (partial / f"{partial.name}.inter").write_text(rows)
        (partial / "extra.txt").write_text(text)

    return write


def write(folder: Path, text: str = "new", **arguments) -> Path:
    write_folder(folder, fill(text), **{"settings": {"made_by": text}, "raw_files": {"raw": "0" * 64}, **arguments})
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_manifest_names_what_was_filled_in(tmp_path):
    folder = write(tmp_path / "out" / "shop")
    manifest = Manifest.load(folder)
    assert set(manifest.files) == {"shop.inter", "extra.txt"} and manifest.settings == {"made_by": "new"}
    assert manifest.raw_files == {"raw": "0" * 64} and check_folder(folder) == []
    assert os.listdir(tmp_path / "out") == ["shop"]


def test_what_finishes_a_folder_sees_its_manifest_and_its_name(tmp_path):
    def finish(partial: Path) -> None:
        assert partial.name == "shop" and Manifest.load(partial).settings == {"made_by": "new"}
        assert not (tmp_path / "shop").exists()
        (partial / "card.md").write_text("late")

    assert (write(tmp_path / "shop", finish=finish) / "card.md").read_text() == "late"


def test_an_existing_folder_is_refused_before_anything_is_done(tmp_path):
    write(tmp_path / "shop")
    with pytest.raises(DatasetError, match="shop is there already; replace it with --overwrite"):
        write_folder(tmp_path / "shop", _break, settings={}, raw_files={})
    refuse_existing(tmp_path / "other", overwrite=False)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", ".hidden", "/tmp", "a\tb", "a\nb"])
def test_a_name_that_leads_elsewhere_is_refused(name):
    with pytest.raises(SettingError, match="expected the name of a folder without a path; see --out"):
        place_of(Path("dataset"), name)
    assert place_of(Path("dataset"), "shop") == Path("dataset/shop")


@pytest.mark.parametrize("overwrite", [False, True])
def test_F48_a_disk_that_is_full_at_any_step_leaves_what_was_there(tmp_path, monkeypatch, overwrite):
    """Every opening for writing, renaming and flushing fails in turn, until a run gets through."""
    folder = tmp_path / "shop"
    real_open, n_refused = open, 0
    for failing in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        before = content(write(folder, "old")) if overwrite else {}
        calls = []

        def faulty(real: Callable, calls: list = calls, failing: int = failing) -> Callable:
            def call(*arguments, **named):
                mode = named.get("mode", arguments[1] if len(arguments) > 1 else "r")
                if real is not real_open or set(str(mode)) & set("wax+"):
                    calls.append(real)
                    if len(calls) == failing + 1:
                        raise OSError(errno.ENOSPC, "No space left on device")
                return real(*arguments, **named)

            return call

        with monkeypatch.context() as patch:
            patch.setattr("builtins.open", faulty(real_open))
            for name in ("fsync", "replace", "rename", "mkdir"):
                patch.setattr(os, name, faulty(getattr(os, name)))
            try:
                write(folder, overwrite=overwrite)
            except OSError as error:
                assert error.errno == errno.ENOSPC
                n_refused += 1
            else:  # the folder was there, so that it did not matter, or nothing failed
                assert check_folder(folder) == []
                if len(calls) <= failing:
                    break
                continue
        assert content(folder) == before if overwrite else not folder.exists()
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".partial")] == []
    assert n_refused > 5 and (folder / "extra.txt").read_text() == "new" and check_folder(folder) == []


def test_F48_a_full_disk_is_named_with_its_place(tmp_path):
    def full(partial: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(
        OSError, match=r"the disk is full; .*shop was not written and what was there is as before. Make"
    ):
        write_folder(tmp_path / "shop", full, settings={}, raw_files={})


@pytest.mark.parametrize("stage", ["filling", "renaming"])
def test_F45_what_a_killed_run_left_is_removed_by_the_next_one(tmp_path, stage):
    folder = write(tmp_path / "shop", "old")
    before = content(folder)
    code = f"""
import os, signal
from pathlib import Path
from dataset_prep import folder_writer

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def fill(partial):
    (partial / "half").write_text("half")
    if {stage == "filling"}:
        die()

rename = Path.rename
Path.rename = lambda path, target: die() if path.parent.name.startswith(".partial") else rename(path, target)
folder_writer.write_folder(Path({str(folder)!r}), fill, settings={{}}, raw_files={{}}, overwrite=True)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert any(path.name.startswith(".partial-shop-") for path in tmp_path.iterdir())
    neighbour = tmp_path / ".partial-shop-window-7"
    neighbour.mkdir()
    with pytest.raises(DatasetError, match="shop is there already"):  # it is, or it came back
        write(folder)
    assert content(folder) == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".partial")] == [neighbour.name]


def _break(*_, **__) -> None:
    raise AssertionError("not reached")
