"""One process at a time writes a folder, and a place that cannot be written is told before anything else."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dataset_prep.locking import check_writable, locked
from recbole_mm.errors import DatasetError

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import sys
from pathlib import Path
from dataset_prep.locking import locked
with locked(Path({folder!r})):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(folder: Path) -> subprocess.Popen:
    """A process that holds the lock until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(folder=str(folder))],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "held\n"
    return process


def test_nested_use_is_fine_and_leaves_nothing(tmp_path):
    with locked(tmp_path / "shop"):
        with locked(tmp_path / "shop"):
            assert (tmp_path / ".shop.lock").exists()
        assert (tmp_path / ".shop.lock").exists()
    assert list(tmp_path.iterdir()) == []


def test_F61_a_second_process_is_refused_with_the_name_of_the_first(tmp_path):
    process = holder(tmp_path / "shop")
    try:
        with pytest.raises(DatasetError, match=rf"shop is being written by process {process.pid} on .*; wait until it"):
            with locked(tmp_path / "shop"):
                pass
        with locked(tmp_path / "other"):
            pass
    finally:
        process.communicate()
    with locked(tmp_path / "shop"):
        pass


def test_F52_the_lock_of_a_killed_process_is_free(tmp_path):
    process = holder(tmp_path / "shop")
    process.send_signal(signal.SIGKILL)
    process.wait()
    with locked(tmp_path / "shop"):
        assert str(os.getpid()) in (tmp_path / ".shop.owner").read_text()
    process.communicate()


def test_F49_a_place_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write into .*file/out: Not a directory"):
        with locked(tmp_path / "file" / "out" / "shop"):
            pass
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OSError, match=r"cannot write into .*link: File exists"):
        check_writable(tmp_path / "link")

    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    with pytest.raises(OSError, match=r"cannot write into .*: Read-only file system"):
        check_writable(tmp_path)
