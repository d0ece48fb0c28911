"""Downloads from a server of the test: resumed, tried again, checked, and refused with what was tried."""

from __future__ import annotations

import gzip
import hashlib
import random
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dataset_prep.sources import download
from dataset_prep.sources.download import fetch_category, read_hosts
from recbole_mm.errors import DatasetError, SettingError

requests = pytest.importorskip("requests")
CONTENT = {
    "Pens_5.json.gz": gzip.compress(random.Random(0).randbytes(300_000), mtime=0),
    "meta_Pens.json.gz": gzip.compress(b"{}\n", mtime=0),
}


class Shop(ThreadingHTTPServer):
    """Serves `CONTENT`; ``plan`` holds what it does instead, by request: a status, or bytes after which it hangs up."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.plan: list[int | str] = []
        self.asked: list[tuple[str, str | None]] = []
        self.version = '"1"'
        self.content = dict(CONTENT)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        shop: Shop = self.server
        name = self.path.rsplit("/", 1)[-1]
        wanted = self.headers.get("Range")
        shop.asked.append((name, wanted))
        step = shop.plan.pop(0) if shop.plan else 200
        content = shop.content.get(name)
        if content is None or (isinstance(step, int) and step != 200):
            self.send_response(404 if content is None else step)
            self.send_header("Retry-After", "7")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        if self.headers.get("If-Range", shop.version) != shop.version:
            start = 0
        body = content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", shop.version)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        self.wfile.write(body[: int(step[3:])] if isinstance(step, str) else body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def shop():
    server = Shop()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def fetch(shop, tmp_path):
    waited: list[float] = []

    def run(*first: str, sha256: dict[str, str] | None = None, category: str = "Pens") -> tuple[Path, Path]:
        hosts = tmp_path / "hosts.yaml"
        lines = ['"2018":']
        for kind, name in (("reviews", "{category}_5.json.gz"), ("meta", "meta_{category}.json.gz")):
            lines += [f"  {kind}:", *(f"    - {host}/{name}" for host in (*first, f"{shop.address}/a"))]
        lines += ["  sha256:", *(f"    {name}: {value}" for name, value in sha256.items())] if sha256 else []
        hosts.write_text("\n".join(lines))
        return fetch_category("2018", category, tmp_path / "raw", hosts=hosts, progress=False, sleep=waited.append)

    run.waited = waited
    return run


def check(paths: tuple[Path, Path]) -> None:
    assert [path.name for path in paths] == list(CONTENT)
    assert [path.read_bytes() for path in paths] == list(CONTENT.values())
    assert sorted(path.name for path in paths[0].parent.iterdir()) == sorted(CONTENT)


def test_both_files_are_fetched_once_and_their_hashes_printed(shop, fetch, capsys):
    paths = fetch()
    check(paths)
    assert paths[0].parent.name == "amazon-2018"
    told = capsys.readouterr().err
    for name, content in CONTENT.items():
        assert f"{name}: sha256 {hashlib.sha256(content).hexdigest()}; pin it in a file for --hosts" in told
    assert fetch() == paths and len(shop.asked) == 2


def test_a_download_goes_on_where_it_stopped(shop, fetch):
    shop.plan = ["cut100000", "cut50000"]
    check(fetch())
    ranges = [wanted for name, wanted in shop.asked if name == "Pens_5.json.gz"]
    assert ranges == [None, "bytes=100000-", "bytes=150000-"] and fetch.waited == [1, 2]


def test_a_download_goes_on_in_another_run(shop, fetch, monkeypatch):
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    shop.plan = ["cut100000"]
    with pytest.raises(DatasetError, match="no host gave the reviews:"):
        fetch()
    check(fetch())
    assert shop.asked[1] == ("Pens_5.json.gz", "bytes=100000-")


def test_a_part_outlives_another_host_that_has_nothing(shop, fetch, monkeypatch):
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    shop.plan = ["cut100000", 404]
    with pytest.raises(DatasetError, match="first/Pens_5.json.gz: 100,000 of [0-9,]+ bytes came, 1 times"):
        fetch(f"{shop.address}/first")
    check(fetch(f"{shop.address}/first"))
    assert shop.asked[2] == ("Pens_5.json.gz", "bytes=100000-")


def test_an_attempt_that_brings_much_is_no_failure(shop, fetch, monkeypatch):
    monkeypatch.setattr(download, "PROGRESS", 20_000)
    shop.plan = ["cut20000"] * 12
    check(fetch())
    assert fetch.waited == [1] * 12


def test_a_file_that_changed_meanwhile_is_fetched_anew(shop, fetch, monkeypatch):
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    whole, shop.content["Pens_5.json.gz"] = (
        CONTENT["Pens_5.json.gz"],
        gzip.compress(random.Random(1).randbytes(300_000)),
    )
    shop.plan = ["cut100000"]
    with pytest.raises(DatasetError):
        fetch()
    shop.content["Pens_5.json.gz"], shop.version = whole, '"2"'
    check(fetch())
    assert shop.asked[1] == ("Pens_5.json.gz", "bytes=100000-")


def test_a_part_that_is_none_of_the_file_is_removed(shop, fetch):
    shop.plan = ["cut100000", 416]
    check(fetch())
    assert [wanted for _, wanted in shop.asked[:3]] == [None, "bytes=100000-", None]


def test_busy_servers_are_asked_again_and_their_wishes_heeded(shop, fetch):
    shop.plan = [503, 429, 500]
    check(fetch())
    assert fetch.waited == [7, 7, 7]


def test_the_next_host_is_tried_and_all_are_named_at_the_end(shop, fetch):
    check(fetch(f"{shop.address}/gone/away"))  # the same names, so the server gives them
    shop.content = {}
    with pytest.raises(DatasetError) as error:
        fetch(f"{shop.address}/first", category="Ink")
    lines = str(error.value).splitlines()
    assert lines == [
        "no host gave the reviews:",
        f"  {shop.address}/first/Ink_5.json.gz: http 404 Not Found",
        f"  {shop.address}/a/Ink_5.json.gz: http 404 Not Found",
        "get the file otherwise, and pass it with --reviews FILE",
    ]


def test_a_host_that_is_down_is_passed_over(shop, fetch):
    check(fetch("http://127.0.0.1:9"))  # discards, or refuses
    assert fetch.waited == [1, 2, 4, 8] * 2


def test_a_page_instead_of_a_file_is_no_file(shop, fetch):
    shop.content["Pens_5.json.gz"] = b"<html>moved</html>"
    with pytest.raises(DatasetError, match="sent something that is not gzip, such as a page for people"):
        fetch()


def test_known_hashes_are_checked(shop, fetch, tmp_path, capsys):
    right = {name: hashlib.sha256(content).hexdigest() for name, content in CONTENT.items()}
    wrong = {**right, "Pens_5.json.gz": "a" * 64}
    with pytest.raises(DatasetError, match=f"sent a file with the sha256 {right['Pens_5.json.gz']}, expected aaaa"):
        fetch(sha256=wrong)
    check(fetch(sha256=right))
    assert "sha256" not in capsys.readouterr().err
    (tmp_path / "raw" / "amazon-2018" / "Pens_5.json.gz").write_bytes(b"x")
    with pytest.raises(
        DatasetError, match="Pens_5.json.gz is there with the sha256 .*; remove it to download it again"
    ):
        fetch(sha256=right)


@pytest.mark.parametrize("category", ["../etc", "a/b", "", ".x", "a b", "{x}"])
def test_F15_names_of_categories_lead_nowhere_else(fetch, category):
    with pytest.raises(SettingError, match="is no category; names are like Office_Products"):
        fetch(category=category)


def test_an_edition_without_hosts_is_refused(tmp_path):
    with pytest.raises(SettingError, match="--download needs an edition, one of 2014, 2018, 2023, not 'auto'"):
        fetch_category("auto", "Pens", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "names no edition; expected"),
        ("", "names no edition"),
        ('"2018": {reviews: ["https://x/{category}"]}', "2018 has not reviews and meta"),
        ('"2018": {reviews: ["file:///x/{category}"], meta: ["https://x/{category}"]}', "2018, reviews: no list"),
        ('"2018": {reviews: ["https://x/{category}"], meta: ["https://x/"]}', "2018, meta: no list of addresses"),
        (
            '"2018": {reviews: ["https://x/{category}"], meta: ["https://x/{category}"], sha256: {a: 1}}',
            "has 64 digits",
        ),
        ("a: [", "no YAML"),
        ("!!python/object/apply:os.system [exit]", "no YAML"),
    ],
)
def test_a_file_of_hosts_of_another_form_is_refused(tmp_path, content, message):
    (tmp_path / "hosts.yaml").write_text(content)
    with pytest.raises(SettingError, match=message):
        read_hosts(tmp_path / "hosts.yaml")
    with pytest.raises(SettingError, match="cannot read .*nowhere.yaml: No such file"):
        read_hosts(tmp_path / "nowhere.yaml")


def test_the_known_hosts_have_all_editions_and_own_ones_replace_them(tmp_path):
    known = read_hosts()
    assert set(known) == {"2014", "2018", "2023"}
    (tmp_path / "hosts.yaml").write_text('"2018": {reviews: ["https://x/{category}"], meta: ["https://y/{category}"]}')
    mine = read_hosts(tmp_path / "hosts.yaml")
    assert mine["2018"].reviews == ("https://x/{category}",) and mine["2014"] == known["2014"]


def test_a_way_from_an_encrypted_to_a_plain_address_is_refused(shop, fetch, monkeypatch):
    ask = download._ask

    def redirected(session, address, *rest):
        return ask(session, address.replace("https://elsewhere", shop.address), *rest)

    monkeypatch.setattr(download, "_ask", redirected)
    paths = fetch("https://elsewhere")
    check(paths)
    assert [name for name, _ in shop.asked] == [name for name in CONTENT for _ in range(2)]
    with requests.Session() as session, pytest.raises(download._Unavailable, match="leads to http:.* not encrypted"):
        download._download(session, "https://elsewhere/Pens_5.json.gz", paths[0], None, False, print)


def test_two_processes_do_not_write_one_file(fetch, tmp_path):
    from filelock import FileLock

    (tmp_path / "raw").mkdir()
    with FileLock(tmp_path / "raw" / ".amazon-2018.lock"), pytest.raises(DatasetError, match="is being written by"):
        fetch()


def test_without_requests_the_install_command_is_told(fetch, monkeypatch):
    monkeypatch.setitem(sys.modules, "requests", None)
    with pytest.raises(SettingError, match='downloads need requests: pip install "recbole_mm.prep."'):
        fetch()
