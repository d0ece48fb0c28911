"""Connections to addresses that somebody else wrote down: public hosts only, and to the very address that was checked.

A list of addresses may name this machine, its network or a cloud's metadata service, openly, through a name that
resolves there, or through a redirect. So a host is resolved once, each address it resolves to is checked, and the
connection goes to the checked one, whatever the name resolves to by then. TLS is checked against the name. Proxies are
not used: they would resolve names themselves.
"""

from __future__ import annotations

import http.client
import ipaddress
import re
import socket
import ssl
import time
from contextlib import suppress
from functools import cache
from typing import NamedTuple
from urllib.parse import quote, urljoin, urlsplit

GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
IPV4_INSIDE = ipaddress.IPv6Network("2002::/16")  # 6to4 wraps an IPv4 address
DEFAULT_PORTS = {"http": 80, "https": 443}
FIRST_FREE_PORT = 1024  # lower ones belong to other services, such as mail
FORBIDDEN = re.compile(r"[\x00-\x20\x7f\\]")
LONGEST = 4096  # characters of an address
TARGET = "/%:@!$&'()*+,;=~-._"  # left as they are in a path
QUERY = f"{TARGET}?[]"


class AddressError(ValueError):
    """An address that is not asked; the message is the reason."""


class Address(NamedTuple):
    """Parts of a web address.

    Attributes:
        scheme: "http" or "https".
        host: name or number, in lower case and ASCII.
        target: path and query, as a request names them.
    """

    scheme: str
    host: str
    port: int
    target: str

    @property
    def origin(self) -> str:
        """Scheme, host and port: what a robots.txt speaks for."""
        return f"{self.scheme}://{self.netloc}"

    @property
    def netloc(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"


def parse_address(url: str) -> Address:
    """Take a web address apart.

    Raises:
        AddressError: "scheme refused" (not http or https), "bad address", "password in address" or "port refused".
    """
    if FORBIDDEN.search(url) or len(url) > LONGEST:
        raise AddressError("bad address")
    try:
        parts = urlsplit(url)
        port = parts.port
        host = (parts.hostname or "").rstrip(".")
        host = host if host.isascii() else host.encode("idna").decode()
        target = quote(parts.path or "/", safe=TARGET) + (f"?{quote(parts.query, safe=QUERY)}" if parts.query else "")
    except ValueError as error:  # UnicodeError is one
        raise AddressError("bad address") from error
    if parts.scheme not in DEFAULT_PORTS:
        raise AddressError("scheme refused" if parts.scheme else "bad address")
    if not host:
        raise AddressError("bad address")
    if "@" in parts.netloc:
        raise AddressError("password in address")
    port = DEFAULT_PORTS[parts.scheme] if port is None else port
    if port < FIRST_FREE_PORT and port not in DEFAULT_PORTS.values():
        raise AddressError("port refused")
    return Address(parts.scheme, host, port, target)


def join_address(url: str, further: str) -> str:
    """Where a redirect from ``url`` leads; not checked yet.

    Raises:
        AddressError: "bad address".
    """
    try:
        return urljoin(url, further)
    except ValueError as error:
        raise AddressError("bad address") from error


def is_public(address: str) -> bool:
    """Whether a numeric address is one of the internet: not private, local, shared, reserved or multicast."""
    number = ipaddress.ip_address(address.partition("%")[0])
    if number.version == 6:
        if number.ipv4_mapped is not None:
            return is_public(str(number.ipv4_mapped))
        if number not in GLOBAL_UNICAST or number in IPV4_INSIDE:
            return False
    return number.is_global and not (number.is_multicast or number.is_reserved or number.is_unspecified)


def resolve(address: Address, *, allow_private: bool) -> list[tuple[int, tuple]]:
    """Family and socket address of each of a host's addresses.

    Raises:
        AddressError: "address refused", if any of them is not public and that is not allowed.
        OSError: the name cannot be resolved.
    """
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except UnicodeError as error:  # a label that is empty or too long
        raise AddressError("bad address") from error
    places = list(dict.fromkeys((family, place) for family, _, _, _, place in found))
    if not allow_private and not all(is_public(place[0]) for _, place in places):
        raise AddressError("address refused")
    return places


class Connection(http.client.HTTPConnection):
    """A connection to one checked address, which never opens itself again: that would resolve the name again."""

    def __init__(self, address: Address, channel: socket.socket) -> None:
        super().__init__(address.host, address.port)
        self.sock = channel
        self.auto_open = 0
        self._address = address
        self._handle = channel.dup()  # stays the same connection when TLS or a response takes the socket over

    def secure(self) -> None:
        """Begin TLS, if the address asks for it.

        Raises:
            OSError: no TLS; ``ssl.SSLCertVerificationError`` for a certificate that is not trusted for this host.
        """
        if self._address.scheme == "https":
            self.sock = _trust().wrap_socket(self.sock, server_hostname=self._address.host)

    def cut(self) -> None:
        """End it from another thread: whoever reads from it or writes to it goes on at once."""
        with suppress(OSError):
            self._handle.shutdown(socket.SHUT_RDWR)

    def discard(self) -> None:
        """Close it and all that belongs to it."""
        self.close()
        self._handle.close()


def connect(address: Address, *, allow_private: bool, seconds: float) -> Connection:
    """Resolve, check and connect, as yet without TLS.

    Args:
        seconds: longest wait for a connection, shared by the host's addresses, and for each answer later.

    Raises:
        AddressError: as `resolve`.
        OSError: no connection.
    """
    return Connection(address, _connected(resolve(address, allow_private=allow_private), seconds))


def _connected(places: list[tuple[int, tuple]], seconds: float) -> socket.socket:
    problem: OSError = OSError("no address")
    ends = time.monotonic() + seconds
    for n_left, (family, place) in zip(range(len(places), 0, -1), places, strict=True):
        channel = socket.socket(family, socket.SOCK_STREAM)
        try:
            channel.settimeout(max(ends - time.monotonic(), 0.1) / n_left)
            channel.connect(place)
            channel.settimeout(seconds)
            channel.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return channel
        except OSError as error:
            channel.close()
            problem = error
    raise problem


@cache
def _trust() -> ssl.SSLContext:
    """Certificates and host names are checked; the system's authorities, and certifi's where it is installed."""
    context = ssl.create_default_context()
    try:
        import certifi
    except ImportError:
        return context
    context.load_verify_locations(certifi.where())
    return context
