"""How a prepared folder comes into being: made under another name beside its place, and renamed when it is complete.

<out>/.partial-<name>-<process>/<name>/    is being written; what a killed run left is removed by the next one
<out>/<name>/                              complete, with its manifest, or as it was before
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dataset_prep.locking import locked
from recbole_mm.data.files import file_info
from recbole_mm.data.layout import Manifest
from recbole_mm.errors import DatasetError, SettingError

DISK_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
WORKING = ("features/.work/", "features/.vocabulary/")  # shards of a feature that was stopped; words of the items


def write_folder(
    folder: Path,
    fill: Callable[[Path], Any],
    *,
    settings: dict[str, Any],
    raw_files: dict[str, str],
    overwrite: bool = False,
    finish: Callable[[Path], Any] | None = None,
) -> None:
    """Make a prepared folder, complete or not at all; holds its lock.

    Args:
        folder: to make; its files carry its name.
        fill: writes the data files into the folder that it is given, which has the same name.
        settings: go into the manifest, how the data were made.
        raw_files: sha256 of the sources, by file name; go into the manifest.
        overwrite: replace a folder that was prepared here before, with all its features.
        finish: adds to the folder when it has its manifest, such as features; enters what it writes there.

    Raises:
        DatasetError: the folder is there, holds files that no manifest names, or is written by another process.
        OSError: the disk is full, or anything else that ``fill`` and ``finish`` run into; the place is as before.
    """
    folder = Path(os.path.abspath(folder))
    with locked(folder):
        remove_leftovers(folder)
        refuse_existing(folder, overwrite=overwrite)
        workshop = folder.parent / f".partial-{folder.name}-{os.getpid()}"
        partial = workshop / folder.name
        try:
            partial.mkdir(parents=True)
            fill(partial)
            written = sorted(path for path in partial.rglob("*") if path.is_file())
            files = {path.relative_to(partial).as_posix(): file_info(path) for path in written}
            Manifest(name=folder.name, files=files, settings=settings, raw_files=raw_files).save(partial)
            if finish is not None:
                finish(partial)
            refuse_existing(folder, overwrite=overwrite)
            put_in_place(partial, folder, old=workshop / "replaced")
        except OSError as error:
            raise _with_remedy(error, folder) from error
        finally:
            shutil.rmtree(workshop, ignore_errors=True)


def _with_remedy(error: OSError, folder: Path) -> OSError:
    if error.errno not in DISK_FULL:
        return error
    what = f"the disk is full; {folder} was not written and what was there is as before. Make room in {folder.parent}"
    return OSError(error.errno, what)


def place_of(out: Path, name: str) -> Path:
    """The folder of this name in another one.

    Raises:
        SettingError: no name, one that leads elsewhere, or one with tabs and the like.
    """
    if not name or name != Path(name).name or name.startswith(".") or not name.isprintable():
        raise SettingError(f"--name is {name!r}, expected the name of a folder without a path; see --out")
    return Path(out) / name


def refuse_existing(folder: Path, *, overwrite: bool) -> None:
    """Refuse a place that is taken; with ``overwrite``, refuse only what was not prepared here.

    Raises:
        DatasetError: naming what is in the way.
    """
    folder = Path(folder)
    if not folder.exists() and not folder.is_symlink():
        return
    elsewhere = "choose another place with --out or another --name"
    if folder.is_symlink() or not folder.is_dir():
        raise DatasetError(f"{folder} is there already and is no folder; {elsewhere}")
    if not overwrite:
        raise DatasetError(f"{folder} is there already; replace it with --overwrite, or {elsewhere}")
    from dataset_prep.pictures import read_index

    pictures = {f"pictures/{picture.file}" for picture in read_index(folder) or () if picture.file}
    known = {*Manifest.load(folder).files, "manifest.json", *pictures}
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    found = [file for file in found if not file.startswith(WORKING) and ".partial-" not in file]
    if foreign := [file for file in found if file not in known]:
        raise DatasetError(
            f"{folder} cannot be replaced: its manifest does not name {', '.join(foreign[:3])} "
            f"({len(foreign)} such files); move them away, or {elsewhere}"
        )


def put_in_place(partial: Path, folder: Path, *, old: Path) -> None:
    """Rename a finished folder; the one that was there goes to ``old``, and comes back if that fails."""
    if folder.exists():
        folder.rename(old)
    try:
        partial.rename(folder)
    except BaseException:
        if old.exists():
            old.rename(folder)
        raise


def remove_leftovers(folder: Path) -> None:
    """Remove what killed runs left beside a folder; whoever calls holds its lock.

    A run that was killed between its two renames has moved the old folder aside: it comes back.
    """
    name = re.compile(rf"\.partial-{re.escape(folder.name)}-[0-9]+")
    leftovers = [path for path in folder.parent.iterdir() if name.fullmatch(path.name)]
    for workshop in sorted(leftovers):
        if (workshop / "replaced").is_dir() and not folder.exists():
            (workshop / "replaced").rename(folder)
        shutil.rmtree(workshop, ignore_errors=True)
