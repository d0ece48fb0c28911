"""Which addresses are asked, and what sites may ask of us."""

from __future__ import annotations

import socket
import time

import pytest

from dataset_prep.pictures import addresses
from dataset_prep.pictures.addresses import AddressError, connect, is_public, join_address, parse_address, resolve
from dataset_prep.pictures.opt_outs import header_refuses, read_robots, robots_allow


def resolving_to(monkeypatch, *places: str) -> list[str]:
    """Let every name resolve to these addresses; returns the names that were asked for."""
    asked = []

    def getaddrinfo(host, port, *args, **kwargs):
        asked.append(host)
        family = {True: socket.AF_INET6, False: socket.AF_INET}
        return [(family[":" in place], socket.SOCK_STREAM, 6, "", (place, port)) for place in places]

    monkeypatch.setattr(addresses.socket, "getaddrinfo", getaddrinfo)
    return asked


# ---------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://shop.example/a.jpg", ("http", "shop.example", 80, "/a.jpg")),
        ("HTTPS://Shop.Example:8443/a b".replace(" ", "%20"), ("https", "shop.example", 8443, "/a%20b")),
        ("https://shop.example", ("https", "shop.example", 443, "/")),
        ("https://shop.example./x?y=1&z=%2F#part", ("https", "shop.example", 443, "/x?y=1&z=%2F")),
        ("https://bücher.example/ü.jpg", ("https", "xn--bcher-kva.example", 443, "/%C3%BC.jpg")),
        ("http://[2606:4700::1111]/a", ("http", "2606:4700::1111", 80, "/a")),
    ],
)
def test_an_address_is_taken_apart(url, expected):
    assert parse_address(url) == expected


def test_an_origin_names_a_port_that_is_not_the_usual_one():
    assert parse_address("https://shop.example:443/a").origin == "https://shop.example"
    assert parse_address("http://shop.example:8080/a").origin == "http://shop.example:8080"
    assert parse_address("http://[2606:4700::1]:8080/a").netloc == "[2606:4700::1]:8080"


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("file:///etc/passwd", "scheme refused"),
        ("ftp://shop.example/a.jpg", "scheme refused"),
        ("data:image/png;base64,AAAA", "scheme refused"),
        ("gopher://shop.example/", "scheme refused"),
        ("pictures/a.jpg", "bad address"),
        ("//shop.example/a.jpg", "bad address"),
        ("http:///a.jpg", "bad address"),
        ("http://shop.example:99999/", "bad address"),
        ("http://[::1/", "bad address"),
        ("http://shop.example\\@evil.example/", "bad address"),
        ("http://shop.example/\r\nX: y", "bad address"),
        ("http://" + "a" * 70 + "\u00fc.example/", "bad address"),
        ("http://shop.example/" + "a" * 5000, "bad address"),
        ("http://user:secret@shop.example/a.jpg", "password in address"),
        ("http://shop.example@evil.example/a.jpg", "password in address"),
        ("http://shop.example:25/", "port refused"),
        ("http://shop.example:22/", "port refused"),
    ],
)
def test_F36_other_schemes_and_odd_forms_are_refused(url, reason):
    with pytest.raises(AddressError, match=f"^{reason}$"):
        parse_address(url)


@pytest.mark.parametrize(
    "number",
    [
        "127.0.0.1", "127.255.0.9", "0.0.0.0", "10.1.2.3", "172.16.0.1", "172.31.9.9", "192.168.1.1", "169.254.169.254",
        "100.64.0.1", "192.0.2.1", "198.18.0.1", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255",
        "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "ff02::1", "fec0::1", "2001:db8::1",
        "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1", "64:ff9b::7f00:1",
        "2002:7f00:1::", "2001:0:7f00:1::",
    ],
)  # fmt: skip
def test_F36_addresses_that_are_not_the_internet_s_are_not_public(number):
    assert not is_public(number)


@pytest.mark.parametrize("number", ["93.184.216.34", "8.8.8.8", "172.32.0.1", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_addresses_of_the_internet_are_public(number):
    assert is_public(number)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/", "http://127.1/", "http://2130706433/", "http://0x7f000001/", "http://0177.0.0.1/",
        "http://0/", "http://[::1]/", "http://[::ffff:127.0.0.1]/", "http://localhost/", "http://169.254.169.254/",
        "http://127.0.0.1./",
    ],
)  # fmt: skip
def test_F36_every_spelling_of_this_machine_is_refused(url):
    try:
        with pytest.raises(AddressError, match="^address refused$"):
            resolve(parse_address(url), allow_private=False)
    except socket.gaierror:
        pytest.skip("this system does not resolve that spelling at all")


def test_F36_a_name_is_refused_if_one_of_its_addresses_is_private(monkeypatch):
    resolving_to(monkeypatch, "93.184.216.34", "10.0.0.1")
    with pytest.raises(AddressError, match="^address refused$"):
        resolve(parse_address("http://shop.example/"), allow_private=False)
    assert len(resolve(parse_address("http://shop.example/"), allow_private=True)) == 2


def test_F36_the_connection_goes_to_the_checked_address_and_asks_no_second_time(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        asked = resolving_to(monkeypatch, "127.0.0.1")
        address = parse_address(f"http://rebinding.example:{server.getsockname()[1]}/")
        connection = connect(address, allow_private=True, seconds=5)
        assert connection.sock.getpeername()[0] == "127.0.0.1" and asked == ["rebinding.example"]
        connection.discard()
        resolving_to(monkeypatch, "10.0.0.1")
        with pytest.raises(Exception) as caught:  # it never opens itself again
            connection.request("GET", "/")
        assert type(caught.value).__name__ == "NotConnected"


def test_a_name_with_an_empty_part_is_a_bad_address():
    with pytest.raises(AddressError, match="^bad address$"):
        resolve(parse_address("http://shop..example/"), allow_private=False)


def test_redirects_may_be_relative_and_broken():
    assert join_address("http://shop.example/a/b", "../c.jpg") == "http://shop.example/c.jpg"
    with pytest.raises(AddressError, match="^bad address$"):
        join_address("http://shop.example/", "http://[::1/")


# ---------------------------------------------------------------- opt-outs


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], False),
        (["noindex, nofollow"], False),
        (["noai"], True),
        (["NoImageAI"], True),
        (["noindex", "nofollow, noai"], True),
        (["googlebot: noai, noimageai"], False),
        (["recbole-mm-pictures: noai"], True),
        (["unavailable_after: 25 Jun 2030 15:00:00 PST"], False),
        (["max-snippet: 5, noai"], True),
    ],
)
def test_F37_the_header_noai_is_understood(values, expected):
    assert header_refuses(values) is expected


ROBOTS = """\ufeff# ours
User-agent: otherbot
Disallow: /

User-agent: *
Disallow: /private/   # not here
Disallow: /*.gif$
Allow: /private/open/
Disallow:
Crawl-delay: 5
Disallow: /s%C3%BC

Sitemap: https://shop.example/sitemap.xml
"""


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("/a.jpg", True),
        ("/private/a.jpg", False),
        ("/private/open/a.jpg", True),
        ("/x/y.gif", False),
        ("/x/y.gif?z=1", True),
        ("/sü/a.jpg", False),
        ("/private", True),
    ],
)
def test_F37_robots_txt_the_longest_pattern_decides(target, expected):
    assert robots_allow(read_robots(ROBOTS), target) is expected


def test_F37_a_robots_txt_of_many_robots_takes_no_room():
    content = "User-agent: a\n" * 20_000 + "User-agent: *\n" + "Allow: /\n" * 20_000
    start = time.monotonic()
    assert len(read_robots(content)) == 20_000
    assert time.monotonic() - start < 5


def test_F37_a_group_that_names_us_replaces_the_one_for_all():
    rules = read_robots("User-agent: *\nDisallow: /\n\nUser-agent: a\nUser-agent: Recbole-MM-Pictures\nDisallow: /x\n")
    assert robots_allow(rules, "/a.jpg") and not robots_allow(rules, "/x.jpg")


def test_allow_wins_over_a_disallow_of_the_same_length():
    assert robots_allow(read_robots("User-agent: *\nDisallow: /a\nAllow: /a\n"), "/a")


def test_no_robots_or_a_web_page_in_its_place_allows_everything():
    for content in ("", "<html>\n<body>User agent</body>", "\0\xff"):
        assert robots_allow(read_robots(content), "/a.jpg")


@pytest.mark.parametrize(
    ("pattern", "target", "expected"),
    [
        ("/a*b", "/axxb/c", True),
        ("/a*b$", "/axxb/c", False),
        ("/a*b$", "/abxb", True),
        ("/a*b*c$", "/a-c-b", False),
        ("/a*a$", "/a", False),
        ("*", "/x", True),
        ("/$", "/", True),
        ("/$", "/x", False),
        ("/" + "*a" * 40 + "$", "/" + "a" * 5000 + "b", False),
    ],
)
def test_patterns_of_robots_txt_mean_what_rfc_9309_says(pattern, target, expected):
    assert robots_allow(read_robots(f"User-agent: *\nDisallow: {pattern}"), target) is not expected
