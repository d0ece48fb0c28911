"""Downloading: from a server on this machine with every fault there is."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from dataset_prep.pictures import addresses, check_pictures, fetch, picture_files, read_index, store
from dataset_prep.pictures.fetch import FetchSettings, download_pictures
from dataset_prep.pictures.schedule import Schedule
from recbole_mm.data.files import write_table
from recbole_mm.data.layout import Manifest
from recbole_mm.errors import DatasetError

REPOSITORY = Path(__file__).resolve().parents[3]
FAST = {"allow_private": True, "pause": 0.01, "per_host": 2000.0, "timeout": 5.0, "threads": 4}


def jpeg(seed: int = 0, *, format: str = "JPEG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (20 + seed, 30), "red").save(out, format=format)
    return out.getvalue()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        shop = self.server.shop
        path = self.path.split("?")[0]
        with shop.lock:
            shop.asked[self.path] += 1
            shop.times.append(time.monotonic())
            shop.agents.add(self.headers["User-Agent"])
            shop.hosts.add(self.headers["Host"])
        name, _, rest = path.strip("/").partition("/")
        getattr(self, f"do_{name.replace('.', '_')}", self.do_404)(rest)

    def send(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_404(self, rest: str) -> None:
        self.send(b"<html>no such page</html>", 404)

    def do_robots_txt(self, rest: str) -> None:
        shop = self.server.shop
        self.send(shop.robots.encode(), shop.robots_status)

    def do_ok(self, rest: str) -> None:
        self.send(jpeg(int(rest or 0)))

    def do_slow_ok(self, rest: str) -> None:
        time.sleep(0.05)
        self.send(jpeg(int(rest)))

    def do_png_called_jpg(self, rest: str) -> None:
        self.send(jpeg(format="PNG"), Content_Type="image/jpeg")

    def do_page(self, rest: str) -> None:
        self.send(b"<!doctype html><html>please log in</html>", Content_Type="image/jpeg")

    def do_short_picture(self, rest: str) -> None:
        self.send(jpeg()[:200])

    def do_status(self, rest: str) -> None:
        self.send(b"", int(rest))

    def do_third_time(self, rest: str) -> None:
        with self.server.shop.lock:
            n = self.server.shop.asked[self.path]
        self.send(jpeg()) if n > 2 else self.send(b"busy", int(rest))

    def do_later(self, rest: str) -> None:
        with self.server.shop.lock:
            first = self.server.shop.asked[self.path] == 1
        self.send(b"", 429, Retry_After=rest) if first else self.send(jpeg())

    def do_broken_date(self, rest: str) -> None:
        self.send(b"", 503, Retry_After="Mon, 01 Jan 2020 00:00:00 +99999999999999999999")

    def do_gzip(self, rest: str) -> None:
        self.send(gzip.compress(jpeg()), Content_Encoding="gzip")

    def do_endless(self, rest: str) -> None:
        self.send_response(200)
        self.end_headers()
        try:
            while True:
                self.wfile.write(bytes(1 << 16))
        except OSError:
            self.close_connection = True

    def do_announced(self, rest: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", rest)
        self.end_headers()
        self.wfile.write(jpeg()[:100])
        self.close_connection = True

    def do_chunked(self, rest: str) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for start in range(0, len(content := jpeg()), 100):
            part = content[start : start + 100]
            self.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
        if rest == "whole":
            self.wfile.write(b"0\r\n\r\n")
        self.close_connection = True

    def do_drip_body(self, rest: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.drip()

    def do_drip_head(self, rest: str) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        self.drip()

    def drip(self) -> None:
        try:
            for _ in range(200):
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.05)
        except OSError:
            pass
        self.close_connection = True

    def do_rubbish(self, rest: str) -> None:
        self.wfile.write(b"\x00\x01 this is no HTTP\r\n\r\n")
        self.close_connection = True

    def do_hang_up(self, rest: str) -> None:
        self.close_connection = True

    def do_noai(self, rest: str) -> None:
        self.send(jpeg(), X_Robots_Tag="noindex, noai")

    def do_private(self, rest: str) -> None:
        self.send(jpeg())

    def do_hops(self, rest: str) -> None:
        n = int(rest)
        self.send(b"", 302, Location=f"/hops/{n - 1}" if n else "/ok/0")

    def do_to(self, rest: str) -> None:
        self.send(b"", 301, Location=self.path.partition("?")[2])


class Shop:
    """The server, what it was asked, and the dataset whose items name pictures on it."""

    def __init__(self, folder: Path) -> None:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.shop = self
        self.lock, self.asked, self.agents, self.hosts = threading.Lock(), Counter(), set(), set()
        self.times: list[float] = []
        self.robots, self.robots_status = "", 404
        self.folder, self.url = folder, f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def items(self, *urls: str) -> None:
        """An item per argument: addresses, or paths on this server, parted by blanks."""
        self.folder.mkdir(exist_ok=True)
        full = [" ".join(self.url + u if u.startswith("/") else u for u in one.split()) for one in urls]
        columns = {"item_id:token": [f"i{n}" for n in range(len(urls))], "image_urls:token_seq": full}
        write_table(self.folder / f"{self.folder.name}.item", columns)

    def download(self, *urls: str, per_item: int = 1, retry_failed: str | None = None, **settings) -> list[str]:
        """Status of each line of the index."""
        if urls:
            self.items(*urls)
        settings = FetchSettings(**{**FAST, **settings})
        download_pictures(
            self.folder, settings, per_item=per_item, workers=0, retry_failed=retry_failed, progress=False
        )
        return [picture.status for picture in read_index(self.folder)]


@pytest.fixture
def shop(tmp_path):
    shop = Shop(tmp_path / "shop")
    yield shop
    shop.server.shutdown()
    shop.server.server_close()


# ---------------------------------------------------------------- pictures


def test_a_picture_is_kept_under_the_hash_of_its_content(shop):
    assert shop.download("/ok/1", "/png_called_jpg", "/ok/1") == ["ok"] * 3
    first, second, third = read_index(shop.folder)
    digest = hashlib.sha256(jpeg(1)).hexdigest()
    assert first == ("i0", 0, f"{shop.url}/ok/1", "ok", f"{digest[:2]}/{digest}.jpg", len(jpeg(1)), digest, 21, 30)
    assert second.file.endswith(".png") and third.file == first.file
    assert (shop.folder / "pictures" / first.file).read_bytes() == jpeg(1)
    assert shop.asked["/ok/1"] == 1  # an address that two items name is asked once
    files = picture_files(shop.folder)
    assert list(files) == ["i0", "i1", "i2"] and files["i0"][0].read_bytes() == jpeg(1)
    assert check_pictures(shop.folder, hashes=True) == []


def test_we_say_who_we_are_and_which_host_we_mean(shop):
    shop.download("/ok/1")
    assert shop.agents == {"recbole-mm-pictures/1.0 (recbole_mm dataset_prep; pictures of products for research)"}
    assert shop.hosts == {shop.url.removeprefix("http://")}


def test_every_address_has_a_line_and_so_has_an_item_without_any(shop):
    assert shop.download("/ok/1 /ok/2 /ok/3", "", "/ok/1", per_item=2) == [
        "ok", "ok", "not asked for", "no picture named", "ok",
    ]  # fmt: skip
    assert [(p.item_id, p.number) for p in read_index(shop.folder)] == [
        ("i0", 0), ("i0", 1), ("i0", 2), ("i1", 0), ("i2", 0),
    ]  # fmt: skip
    assert shop.asked["/ok/3"] == 0
    made = Manifest.load(shop.folder)
    assert "pictures/index.tsv" in made.files
    assert made.settings["pictures"]["counts"] == {"ok": 3, "not asked for": 1, "no picture named": 1}
    assert made.settings["pictures"]["from"] == "web" and made.settings["pictures"]["per_item"] == 2


def test_F31_what_is_no_picture_is_told_from_what_failed(shop):
    assert shop.download("/page", "/short_picture", "/status/404", "/status/410", "/status/204", "/status/500") == [
        "html", "truncated", "http 404", "http 410", "http 204", "http 500",
    ]  # fmt: skip
    n_tries = {path: n for path, n in shop.asked.items() if path != "/robots.txt"}
    assert n_tries == {
        "/page": 1, "/short_picture": 1, "/status/404": 1, "/status/410": 1, "/status/204": 1, "/status/500": 4,
    }  # fmt: skip
    assert not list(shop.folder.glob("pictures/??/*"))


# ---------------------------------------------------------------- refused addresses


def test_F36_private_addresses_are_refused_and_never_asked(shop):
    port = shop.url.rpartition(":")[2]
    refused = [f"http://{host}:{port}/ok/1" for host in ("127.0.0.1", "127.1", "localhost", "[::ffff:127.0.0.1]")]
    statuses = shop.download(*refused, "file:///etc/passwd", "http://169.254.169.254/latest", allow_private=False)
    assert statuses == ["address refused"] * 4 + ["scheme refused", "address refused"]
    assert not shop.asked


def test_F36_a_redirect_to_a_private_address_is_refused(shop, monkeypatch):
    """The shop's own name passes for public here; where it redirects to does not."""
    port = shop.url.rpartition(":")[2]
    really = addresses.socket.getaddrinfo

    def getaddrinfo(host, *args, **kwargs):
        return really("127.0.0.1" if host == "shop.example" else host, *args, **kwargs)

    asked = []
    monkeypatch.setattr(addresses.socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(addresses, "is_public", lambda number: not asked.append(number) and len(asked) == 1)
    url = f"http://shop.example:{port}"
    statuses = shop.download(f"{url}/to?http://127.0.0.1:{port}/ok/1", allow_private=False, ignore_opt_outs=True)
    assert statuses == ["address refused"] and asked == ["127.0.0.1", "127.0.0.1"]
    assert list(shop.asked) == [f"/to?http://127.0.0.1:{port}/ok/1"]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("file:///etc/passwd", "scheme refused"),
        ("http://a:b@x.example/", "password in address"),
        ("//[", "bad address"),
    ],
)
def test_F36_a_redirect_to_anything_else_is_refused(shop, target, expected):
    assert shop.download(f"/to?{target}") == [expected]


def test_F36_three_redirects_are_followed_and_no_more(shop):
    assert shop.download("/hops/2", "/hops/3") == ["ok", "too many redirects"]


def test_F36_over_https_the_certificate_must_be_trusted_and_of_that_host(tmp_path, shop):
    certificate = tmp_path / "certificate.pem"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    )
    key = tmp_path / "key.pem"
    try:
        subprocess.run([*command.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs openssl to make a certificate")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    shop.server.socket = context.wrap_socket(shop.server.socket, server_side=True)
    port = shop.url.rpartition(":")[2]
    urls = [f"https://localhost:{port}/ok/1", f"https://127.0.0.1:{port}/ok/2"]
    assert shop.download(*urls) == ["bad certificate"] * 2
    assert not shop.asked
    trusting = ssl.create_default_context(cafile=certificate)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(addresses, "_trust", lambda: trusting)
        assert shop.download(retry_failed="all") == ["ok", "bad certificate"]  # trusted, but not for 127.0.0.1


# ---------------------------------------------------------------- servers that misbehave


def test_F37_size_is_limited_whether_announced_or_not(shop):
    assert shop.download("/endless", "/announced/99999999999", "/ok/1", max_bytes=300_000) == [
        "too large", "too large", "ok",
    ]  # fmt: skip
    assert not list(shop.folder.glob("pictures/.partial*"))


def test_F37_a_byte_now_and_then_does_not_stretch_the_time(shop):
    start = time.monotonic()
    assert shop.download("/drip_body", "/drip_head", timeout=0.4, tries=1) == ["timed out"] * 2
    assert time.monotonic() - start < 4


def test_F37_busy_servers_are_tried_again(shop):
    assert shop.download("/third_time/503", "/third_time/429", "/third_time/502") == ["ok"] * 3
    assert shop.asked["/third_time/503"] == 3


def test_F37_retry_after_is_honoured(shop):
    start = time.monotonic()
    assert shop.download("/later/1") == ["ok"]
    assert 1 <= time.monotonic() - start < 4


def test_F37_a_host_that_asks_for_hours_is_left_alone(shop):
    start = time.monotonic()
    assert shop.download("/later/7200") == ["http 429"]
    assert time.monotonic() - start < 3 and shop.asked["/later/7200"] == 1


def test_F37_a_broken_retry_after_does_not_end_the_run(shop):
    assert shop.download("/broken_date", "/ok/1", tries=2) == ["http 503", "ok"]


def test_F37_what_comes_packed_is_not_unpacked(shop):
    assert shop.download("/gzip") == ["not a picture"]


def test_F37_a_long_robots_txt_counts_up_to_its_limit(shop):
    rules = "User-agent: *\nDisallow: /private\n"
    shop.robots, shop.robots_status = f"{rules}# {'x' * 600_000}\nDisallow: /ok", 200
    assert shop.download("/ok/1", "/private/1") == ["ok", "opted out (robots.txt)"]


def test_F37_bodies_cut_short_and_broken_answers_are_failures(shop):
    statuses = shop.download("/announced/500", "/chunked/whole", "/chunked/cut", "/rubbish", "/hang_up", tries=2)
    assert statuses == ["cut short", "ok", "cut short", "connection failed", "connection failed"]


def test_F37_opt_outs_are_respected_unless_told_otherwise(shop):
    shop.robots, shop.robots_status = "User-agent: *\nDisallow: /private", 200
    assert shop.download("/noai", "/private/1", "/ok/1") == ["opted out (X-Robots-Tag)", "opted out (robots.txt)", "ok"]
    assert shop.asked["/robots.txt"] == 1 and shop.asked["/private/1"] == 0
    assert shop.download(ignore_opt_outs=True) == ["opted out (X-Robots-Tag)", "opted out (robots.txt)", "ok"]
    assert shop.download(ignore_opt_outs=True, retry_failed="all") == ["ok"] * 3


def test_F37_without_an_answer_about_robots_nothing_is_taken(shop):
    shop.robots_status = 503
    assert shop.download("/ok/1", tries=2) == ["http 503"] and shop.asked["/ok/1"] == 0


def test_a_host_that_never_answers_is_given_up(shop):
    assert set(shop.download(*(f"/hang_up/{n}" for n in range(60)), threads=1, tries=2)) == {"host down"}
    assert sum(shop.asked.values()) <= 40


@pytest.fixture
def everywhere(monkeypatch):
    """All names that end in .example lead to this machine."""
    really = socket.getaddrinfo

    def getaddrinfo(host, *args, **kwargs):
        return really("127.0.0.1" if host.endswith(".example") else host, *args, **kwargs)

    monkeypatch.setattr(addresses.socket, "getaddrinfo", getaddrinfo)


def test_hosts_that_accept_and_stay_silent_do_not_hold_up_the_others(shop, monkeypatch, everywhere):
    finished = []
    really = store.Journal.add
    monkeypatch.setattr(store.Journal, "add", lambda *args: finished.append(args[2].status) or really(*args))
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
        port = silent.getsockname()[1]
        dead = [f"http://dead{n % 2}.example:{port}/{n}" for n in range(20)]
        shop.download(*dead, *(f"/ok/{n}" for n in range(20)), tries=1, timeout=0.3)
    assert Counter(finished) == {"ok": 20, "timed out": 10, "host down": 10}
    assert finished.index("host down") > max(n for n, status in enumerate(finished) if status == "ok")


def test_connections_to_many_hosts_are_not_all_kept(shop, monkeypatch, everywhere):
    monkeypatch.setattr(fetch, "MOST_IDLE", 4)
    most, really = 0, fetch._Requests._kept

    def kept(requests, address, connection):
        nonlocal most
        really(requests, address, connection)
        most = max(most, len(requests._idle))

    monkeypatch.setattr(fetch._Requests, "_kept", kept)
    port = shop.url.rpartition(":")[2]
    assert set(shop.download(*(f"http://h{n}.example:{port}/ok/1" for n in range(20)))) == {"ok"}
    assert most == 4


def test_proxies_are_not_used(shop, monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert shop.download("/ok/1") == ["ok"]


def test_an_unknown_host_and_a_closed_port_are_told_apart(shop, monkeypatch):
    def getaddrinfo(host, port, **kwargs):
        if host == "none.example":
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(addresses.socket, "getaddrinfo", getaddrinfo)
    assert shop.download("http://none.example/a", "http://closed.example:1025/a") == [
        "no such host", "connection failed",
    ]  # fmt: skip


def test_requests_to_a_host_keep_to_the_rate(shop):
    shop.download(*(f"/ok/{n}" for n in range(10)), per_host=20, ignore_opt_outs=True)
    times = sorted(shop.times)
    assert times[-1] - times[0] >= 9 / 20 - 0.1


# ---------------------------------------------------------------- again


def test_a_second_run_asks_for_nothing_and_changes_no_byte(shop):
    urls = [f"/ok/{n}" for n in range(5)] + ["/status/404", "/page", "/status/503"]
    shop.download(*urls, tries=2)
    before = {path: path.read_bytes() for path in sorted(shop.folder.rglob("*")) if path.is_file()}
    shop.asked.clear()
    shop.download(tries=2)
    assert not shop.asked
    assert {path: path.read_bytes() for path in sorted(shop.folder.rglob("*")) if path.is_file()} == before


def test_temporary_failures_are_tried_again_when_asked_and_permanent_ones_only_with_all(shop):
    shop.download("/status/404", "/status/503", tries=1)
    shop.asked.clear()
    shop.download(retry_failed="temporary", tries=1)
    assert shop.asked["/status/404"] == 0 and shop.asked["/status/503"] == 1
    shop.download(retry_failed="all", tries=1)
    assert shop.asked["/status/404"] == 1 and shop.asked["/status/503"] == 2


def test_a_picture_that_was_lost_is_downloaded_again(shop):
    shop.download("/ok/1", "/ok/2")
    picture_files(shop.folder)["i0"][0].unlink()
    assert len(check_pictures(shop.folder)) == 1
    shop.asked.clear()
    assert shop.download() == ["ok", "ok"] and shop.asked["/ok/1"] == 1 and shop.asked["/ok/2"] == 0
    assert check_pictures(shop.folder) == []


RUN = """
import sys
from pathlib import Path
from dataset_prep.pictures.fetch import FetchSettings, download_pictures
settings = FetchSettings(allow_private=True, pause=0.01, per_host=2000, threads=2)
download_pictures(Path(sys.argv[1]), settings, workers=0, progress=False)
"""


@pytest.mark.slow
def test_F45_killed_again_and_again_a_run_ends_with_the_same_bytes_and_repeats_nothing(shop, tmp_path):
    urls = [f"/slow_ok/{n}" for n in range(40)] + ["/status/404", "/page"]
    shop.items(*urls)
    command = [sys.executable, "-c", RUN, str(shop.folder)]
    n_kills = 0
    for n_wanted in (8, 20, 33):
        process = subprocess.Popen(command, cwd=REPOSITORY)
        while process.poll() is None and sum(shop.asked.values()) < n_wanted:
            time.sleep(0.005)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            n_kills += 1
        process.wait()
    assert n_kills == 3 and read_index(shop.folder) is None
    subprocess.run(command, check=True, cwd=REPOSITORY)
    pictures = {path: n for path, n in shop.asked.items() if path != "/robots.txt"}
    assert len(pictures) == 42 and sum(pictures.values()) <= 42 + 3 * 4  # at most those that were on their way
    interrupted = (shop.folder / "pictures/index.tsv").read_bytes()
    for path in (shop.folder / "pictures").rglob("*"):
        path.unlink() if path.is_file() else None
    subprocess.run(command, check=True, cwd=REPOSITORY)
    assert (shop.folder / "pictures/index.tsv").read_bytes() == interrupted


def test_F48_a_full_disk_ends_the_run_and_the_next_one_goes_on(shop, monkeypatch):
    really, n_added = store.Journal.add, 0

    def add(journal, source, found):
        nonlocal n_added
        n_added += 1
        if n_added == 4:
            raise OSError(28, "No space left on device")
        really(journal, source, found)

    with monkeypatch.context() as patch:
        patch.setattr(store.Journal, "add", add)
        with pytest.raises(OSError, match="No space left"):
            shop.download(*(f"/ok/{n}" for n in range(8)))
    assert read_index(shop.folder) is None
    finished = (shop.folder / "pictures/.journal.tsv").read_text().splitlines()
    assert len(finished) == 3
    shop.asked.clear()
    assert shop.download() == ["ok"] * 8
    assert not [line for line in finished if shop.asked[line.split("\t")[0].removeprefix(shop.url)]]


def test_F48_a_full_disk_while_a_picture_is_written_is_no_failure_of_the_picture(shop, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetch, "open", full, raising=False)
    with pytest.raises(OSError, match="No space left"):
        shop.download("/ok/1", "/ok/2")
    assert read_index(shop.folder) is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_F50_interrupted_a_run_ends_within_seconds_whatever_the_servers_do(shop, number):
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
        silent_url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        shop.items("/ok/1", *(f"{silent_url}/{n}" for n in range(20)))
        command = [sys.executable, "-m", "dataset_prep", "pictures", "--dataset", shop.folder, "--allow-private"]
        process = subprocess.Popen(
            [*command, "--workers", "0"], cwd=REPOSITORY, stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        )  # fmt: skip
        journal = shop.folder / "pictures/.journal.tsv"
        while process.poll() is None and not (journal.exists() and journal.read_bytes()):
            time.sleep(0.01)
        start = time.monotonic()
        process.send_signal(number)
        process.communicate(timeout=30)
    assert process.returncode == 5 and time.monotonic() - start < 5
    assert [path.name for path in (shop.folder / "pictures").glob(".*")] == [".journal.tsv"]


def test_without_the_column_the_remedies_are_named(shop):
    shop.items("/ok/1")
    with pytest.raises(DatasetError, match="has no column photo, only item_id, image_urls; .*--column.*--images DIR"):
        download_pictures(shop.folder, FetchSettings(), column="photo")


# ---------------------------------------------------------------- schedule


def test_no_host_holds_up_the_others():
    schedule = Schedule(rate=1.0, connections=1)
    for host in ("slow", "slow", "slow", "quick"):
        schedule.put(host, host)
    first, second = schedule.take(), schedule.take()
    assert {first[0], second[0]} == {"slow", "quick"}


def test_connections_to_a_host_are_limited_and_given_back():
    schedule = Schedule(rate=1e6, connections=2)
    for n in range(3):
        schedule.put("host", n)
    schedule.heard("host", answered=True)
    assert [schedule.take()[1] for _ in range(2)] == [0, 1]
    taken = []
    waiting = threading.Thread(target=lambda: taken.append(schedule.take()), daemon=True)
    waiting.start()
    time.sleep(0.05)
    assert not taken
    schedule.done("host")
    waiting.join(5)
    assert taken == [("host", 2)]


def test_a_host_that_did_not_answer_is_asked_by_one_at_a_time():
    schedule = Schedule(rate=1e6, connections=2)
    for n in range(4):
        schedule.put("host", n)
    schedule.heard("host", answered=True)
    assert [schedule.take()[1] for _ in range(2)] == [0, 1]
    schedule.heard("host", answered=False)
    schedule.done("host")
    taken = []
    waiting = threading.Thread(target=lambda: taken.append(schedule.take()), daemon=True)
    waiting.start()
    time.sleep(0.05)
    assert not taken
    schedule.heard("host", answered=True)
    waiting.join(5)
    assert taken == [("host", 2)]


def test_all_threads_learn_that_the_work_is_done():
    schedule = Schedule(rate=1e6, connections=2)
    schedule.put("host", 0)
    assert schedule.take() == ("host", 0)
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(schedule.take()), daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    schedule.done("host")
    for thread in threads:
        thread.join(5)
    assert answers == [None] * 3


def test_a_pause_is_kept_and_later_jobs_come_later():
    schedule = Schedule(rate=1e6, connections=2)
    schedule.put("host", "later", after=0.2)
    schedule.put("host", "now")
    schedule.heard("host", answered=True)
    schedule.pause("host", 0.1)
    start = time.monotonic()
    assert schedule.take()[1] == "now" and time.monotonic() - start >= 0.09
    assert schedule.take()[1] == "later" and time.monotonic() - start >= 0.19
