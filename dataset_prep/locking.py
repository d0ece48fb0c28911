"""One process at a time writes a dataset folder."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from recbole_mm.errors import DatasetError


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a dataset folder, which need not be there yet; nested use within a process is fine.

    The lock lies beside the folder, as ``.<name>.lock``, because the folder itself may be renamed. The system takes it
    away from a process that died.

    Raises:
        DatasetError: another process holds it; names the process and the machine.
        OSError: nothing can be written beside the folder; names the place.
    """
    from filelock import FileLock, Timeout

    folder = Path(os.path.abspath(folder))
    check_writable(folder.parent)
    path = folder.parent / f".{folder.name}.lock"
    lock = FileLock(path, timeout=0, is_singleton=True, thread_local=False)
    owner = path.with_suffix(".owner")
    try:
        lock.acquire()
    except Timeout as error:
        who = ""
        with suppress(FileNotFoundError):
            who = owner.read_text()  # empty, if the other process is just about to write it
        raise DatasetError(
            f"{folder} is being written by {who or 'another process'}; wait until it is done, or stop it first"
        ) from error
    try:
        owner.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        if lock.lock_counter == 1:
            owner.unlink(missing_ok=True)
            with suppress(PermissionError):  # Windows does not remove an open file
                path.unlink(missing_ok=True)  # who opened it meanwhile sees that it has no name and starts over
        lock.release()


def check_writable(folder: Path) -> None:
    """Make a folder unless it is there, and write something into it, so that hours of work do not end in a refusal.

    Raises:
        OSError: naming the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"probe")
            probe.flush()
    except OSError as error:
        raise OSError(error.errno, f"cannot write into {folder}: {error.strerror}") from error
