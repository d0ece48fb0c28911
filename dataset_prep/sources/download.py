"""Files of a named category of Amazon, from the first known host that has them; resumable and checked.

properties/download/amazon.yaml ─ addresses in order ─ <file>.partial ─ size, sha256 ─ <file>
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from dataset_prep.locking import locked
from dataset_prep.sources.lines import GZIP
from recbole_mm.data.files import sha256_of, write_atomically
from recbole_mm.errors import DatasetError, SettingError
from recbole_mm.paths import properties_dir

if TYPE_CHECKING:
    from requests import Response, Session

KINDS = ("reviews", "meta")
ATTEMPTS = 5  # in a row that bring next to nothing
PROGRESS = 1 << 20  # bytes; an attempt that brings so many is no failure, because the next one goes on from there
TIMEOUT = (10, 60)  # seconds to connect, and without a byte
LONGEST_WAIT = 60.0  # seconds between attempts
AGENT = "recbole_mm dataset_prep"
_CATEGORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_&,-]*")
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Hosts:
    """Where the files of an edition are.

    Attributes:
        reviews, meta: addresses with ``{category}``, in the order in which they are tried.
        sha256: by file name, as far as known.
    """

    reviews: tuple[str, ...]
    meta: tuple[str, ...]
    sha256: Mapping[str, str]


class _Unavailable(Exception):
    """A host does not give the file; the message tells why."""


def read_hosts(own: Path | None = None) -> dict[str, Hosts]:
    """The known hosts by edition, those of the user's file in their place.

    Raises:
        SettingError: a file of another form.
    """
    known = _read_hosts(properties_dir() / "download" / "amazon.yaml")
    return known if own is None else {**known, **_read_hosts(own)}


def _read_hosts(path: Path) -> dict[str, Hosts]:
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingError(f"{path}: no YAML ({' '.join(str(error).split())})") from error
    form = 'expected {"2018": {reviews: [address with {category}], meta: [...], sha256: {file: hash}}}'
    if not isinstance(content, Mapping) or not content:
        raise SettingError(f"{path} names no edition; {form}")
    hosts = {}
    for edition, given in content.items():
        if not isinstance(given, Mapping) or not {*KINDS} <= set(given) <= {*KINDS, "sha256"}:
            raise SettingError(f"{path}: {edition} has not reviews and meta; {form}")
        for kind in KINDS:
            if not isinstance(given[kind], list) or not given[kind] or not all(map(_is_address, given[kind])):
                raise SettingError(f"{path}: {edition}, {kind}: no list of addresses (http, https); {form}")
        hashes = given.get("sha256") or {}
        if not isinstance(hashes, Mapping) or not all(_SHA256.fullmatch(str(value)) for value in hashes.values()):
            raise SettingError(f"{path}: {edition}, sha256: a hash has 64 digits, 0-9 and a-f; {form}")
        hosts[str(edition)] = Hosts(tuple(given["reviews"]), tuple(given["meta"]), dict(hashes))
    return hosts


def _is_address(text: object) -> bool:
    return isinstance(text, str) and text.startswith(("http://", "https://")) and "{category}" in text


def fetch_category(
    edition: str,
    category: str,
    to: Path,
    *,
    hosts: Path | None = None,
    progress: bool = True,
    sleep: Callable[[float], Any] = time.sleep,
) -> tuple[Path, Path]:
    """The files of reviews and of metadata, downloaded unless they are there already.

    An interrupted download goes on where it stopped. TLS certificates are always verified. A file whose sha256 is not
    known has it printed on stderr, so that it can be pinned in a file of hosts.

    Args:
        edition: "2014", "2018" or "2023".
        category: as in the names of the files, such as ``Office_Products``.
        to: folder that gets the files, in a folder named after the edition.
        hosts: a YAML that replaces the known hosts of the editions it names.
        sleep: waits so many seconds between attempts.

    Returns:
        Paths of the reviews and of the metadata.

    Raises:
        SettingError: an unknown edition, a name that is no category's, requests is not installed.
        DatasetError: no host gives a file, or one that is there has another sha256, or another process downloads
            into the same folder; lists what was tried.
    """
    known = read_hosts(hosts)
    if edition not in known:
        raise SettingError(f"--download needs an edition, one of {', '.join(known)}, not {edition!r}")
    if not _CATEGORY.fullmatch(category):
        raise SettingError(f"{category!r} is no category; names are like Office_Products, see the page of the edition")
    try:
        import requests
    except ImportError as error:
        raise SettingError('downloads need requests: pip install "recbole_mm[prep]"') from error

    folder, paths = Path(to) / f"amazon-{edition}", []
    with requests.Session() as session:
        session.headers.update({"User-Agent": AGENT, "Accept-Encoding": "identity"})
        for kind in KINDS:
            addresses = [address.replace("{category}", quote(category)) for address in getattr(known[edition], kind)]
            paths.append(_first_of(session, addresses, folder, known[edition].sha256, kind, progress, sleep))
    return paths[0], paths[1]


def _first_of(
    session: Session,
    addresses: list[str],
    to: Path,
    known: Mapping[str, str],
    kind: str,
    progress: bool,
    sleep: Callable[[float], Any],
) -> Path:
    places = [to / os.path.basename(urlsplit(address).path) for address in addresses]
    if path := _existing(places, known):
        return path
    failed = []
    with locked(to):
        if path := _existing(places, known):  # another process was faster
            return path
        to.mkdir(exist_ok=True)
        for address, path in zip(addresses, places, strict=True):
            try:
                _download(session, address, path, known.get(path.name), progress, sleep)
            except _Unavailable as error:
                failed.append(f"  {address}: {error}")
            else:
                return path
    raise DatasetError(
        "\n".join([f"no host gave the {kind}:", *failed, f"get the file otherwise, and pass it with --{kind} FILE"])
    )


def _existing(places: list[Path], known: Mapping[str, str]) -> Path | None:
    for path in places:
        if path.is_file():
            _check_existing(path, known.get(path.name))
            return path
    return None


def _check_existing(path: Path, expected: str | None) -> None:
    if expected and (found := sha256_of(path)) != expected:
        raise DatasetError(
            f"{path} is there with the sha256 {found}, expected {expected}; remove it to download it again"
        )


def _download(
    session: Session, address: str, path: Path, expected: str | None, progress: bool, sleep: Callable[[float], Any]
) -> None:
    import requests

    partial = path.with_name(path.name + ".partial")
    about = path.with_name(path.name + ".partial.json")  # which file the partial one is a part of
    failures = 0
    while True:
        before = _size(partial)
        wait = min(2.0**failures, LONGEST_WAIT)
        try:
            with _ask(session, address, partial, about) as response:
                wait = max(wait, _wanted_wait(response))
                if address.startswith("https:") and not response.url.startswith("https:"):
                    raise _Unavailable(f"leads to {response.url}, which is not encrypted")
                problem = _refusal(response)
                if not problem:
                    _receive(response, address, partial, about, progress)
                    break
                if response.status_code not in (408, 416, 429) and response.status_code < 500:
                    raise _Unavailable(problem)
                if response.status_code == 416:  # the part is none of this file
                    _remove(partial, about)
        except requests.exceptions.SSLError as error:
            raise _Unavailable(f"its certificate cannot be verified ({_brief(error)})") from error
        except (requests.exceptions.RequestException, _CutShort) as error:
            problem = _brief(error)
        failures = 0 if _size(partial) >= before + PROGRESS else failures + 1
        if failures == ATTEMPTS:
            raise _Unavailable(f"{problem}, {ATTEMPTS} times")
        sleep(wait)
    _finish(partial, about, path, expected)


class _CutShort(Exception):
    pass


def _ask(session: Session, address: str, partial: Path, about: Path) -> Response:
    headers = {}
    known = _read_about(about)
    have = _size(partial)
    if have and known.get("address") == address:  # a part from another host stays until this one sends something
        headers["Range"] = f"bytes={have}-"
        if known.get("version"):
            headers["If-Range"] = known["version"]
    return session.get(address, headers=headers, stream=True, timeout=TIMEOUT)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _read_about(about: Path) -> dict[str, str]:
    try:
        return json.loads(about.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _refusal(response: Response) -> str:
    return "" if response.status_code in (200, 206) else f"http {response.status_code} {response.reason or ''}".strip()


def _wanted_wait(response: Response) -> float:
    """Seconds that the server asks to wait."""
    text = response.headers.get("Retry-After", "")
    return min(float(text), LONGEST_WAIT) if text.isdecimal() and text.isascii() else 0.0


def _receive(response: Response, address: str, partial: Path, about: Path, progress: bool) -> None:
    """Append to the partial file, or begin it anew if the server sends all.

    Raises:
        _CutShort: fewer bytes came than were announced.
    """
    import urllib3
    from tqdm import tqdm

    resumed = response.status_code == 206
    start = _size(partial) if resumed else 0
    if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
        _remove(partial, about)
        raise _CutShort("the server sent another part than asked for")
    if not resumed:
        _remove(partial, about)
    version = response.headers.get("ETag", "")
    if not version or version.startswith("W/"):  # a weak one does not promise equal bytes
        version = response.headers.get("Last-Modified", "")
    content = json.dumps({"address": address, "version": version}).encode()
    write_atomically(about, lambda out: out.write(content))
    length = response.headers.get("Content-Length", "")
    total = start + int(length) if length.isdecimal() else None
    try:
        with (
            open(partial, "ab" if resumed else "wb") as out,
            tqdm(
                total=total, initial=start, desc=partial.stem, unit="B", unit_scale=True, leave=False,
                disable=not progress,
            ) as bar,
        ):  # fmt: skip
            for block in response.raw.stream(1 << 16, decode_content=False):
                out.write(block)
                bar.update(len(block))
    except (urllib3.exceptions.HTTPError, ConnectionError, TimeoutError) as error:
        cut = isinstance(error, urllib3.exceptions.ProtocolError) and total is not None
        raise _CutShort(f"{_size(partial):,} of {total:,} bytes came" if cut else _brief(error)) from error
    if total is not None and _size(partial) != total:
        raise _CutShort(f"{_size(partial):,} of {total:,} bytes came")


def _finish(partial: Path, about: Path, path: Path, expected: str | None) -> None:
    """Give the file its name once it is what it should be; otherwise remove it."""
    with open(partial, "rb") as file:
        is_gzip = file.read(len(GZIP)) == GZIP
    if path.suffix == ".gz" and not is_gzip:
        _remove(partial, about)
        raise _Unavailable("sent something that is not gzip, such as a page for people")
    found = sha256_of(partial)
    if expected and found != expected:
        _remove(partial, about)
        raise _Unavailable(f"sent a file with the sha256 {found}, expected {expected}")
    if not expected:
        print(f"{path.name}: sha256 {found}; pin it in a file for --hosts", file=sys.stderr)
    with open(partial, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)
    about.unlink(missing_ok=True)


def _remove(*paths: Path) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _brief(error: Exception) -> str:
    reason = getattr(error.args[0], "reason", None) if error.args else None  # what urllib3 wraps several times
    return " ".join(str(reason or error).split())[:200] or type(error).__name__
