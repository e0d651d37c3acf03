"""Addresses of servers: `host`, `host:port`, `[::1]:7443`, and several of them."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import Final, NamedTuple

from zcproto.common.text import escape_text
from zcproto.errors import ConfigError

DEFAULT_PORT: Final = 7443
MAX_ADDRESSES: Final = 32
_NAME_MAX_LENGTH: Final = 253
"""RFC 1035, section 2.3.4."""

_LABEL_ALPHABET: Final = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-_")


class Address(NamedTuple):
    """A host and a port. The host is an IP address, or a name in lower case, if international with A-labels."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Endpoint(NamedTuple):
    """Where a client is connected: the host and the port that it was given, and the IP address of the host."""

    host: str
    port: int
    ip: str

    @property
    def address(self) -> Address:
        """The host and the port."""
        return Address(self.host, self.port)

    def __str__(self) -> str:
        return str(self.address) if self.ip == self.host else f"{self.address} ({self.ip})"


def parse_addresses(given: str | Sequence[str]) -> tuple[Address, ...]:
    """Parse a list of addresses, or a text that separates them by commas. Raises ConfigError."""
    texts = given.split(",") if isinstance(given, str) else given
    addresses = tuple(dict.fromkeys(parse_address(text.strip()) for text in texts))
    if not 1 <= len(addresses) <= MAX_ADDRESSES:
        raise ConfigError([f"addresses: {len(addresses)} are given; give from 1 to {MAX_ADDRESSES} of them"])
    return addresses


def parse_address(text: str) -> Address:
    """Parse an address. Raises ConfigError."""
    shown = escape_text(text, 120)
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")) or not (":" in host and is_ip(host)):
            raise ConfigError([f"{shown!r}: write an IPv6 address with a port as [::1]:{DEFAULT_PORT}"])
        port = rest[1:] if rest else str(DEFAULT_PORT)
    elif text.count(":") > 1:
        if not is_ip(text):
            raise ConfigError([f"{shown!r}: write HOST:PORT, or [ADDRESS]:PORT for IPv6"])
        host, port = text, str(DEFAULT_PORT)
    else:
        host, colon, port = text.partition(":")
        if not colon:
            port = str(DEFAULT_PORT)
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and 1 <= int(port) <= 65_535):
        raise ConfigError([f"{shown!r}: the port must be a number from 1 to 65535"])
    return Address(_host(host, shown), int(port))


def _host(host: str, shown: str) -> str:
    if is_ip(host):
        return host.lower()
    try:
        name = host.rstrip(".").encode("idna").decode("ascii").lower()
    except UnicodeError:
        name = ""
    labels = name.split(".")
    if (
        not name
        or len(name) > _NAME_MAX_LENGTH
        or not all(_LABEL_ALPHABET.issuperset(label) and label for label in labels)
        or labels[-1].isdigit()  # resolvers would accept "1.2.3" as an IP address
    ):
        raise ConfigError([f"{shown!r}: not a host name or address; write HOST:PORT"])
    return name


def is_ip(host: str) -> bool:
    """Return whether a host is an IP address."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
