"""Decides which names a certificate may contain, how each is written, and which of them this machine has.

Rules:
- A name is a DNS name of letters, digits and hyphens (RFC 5890 section 2.3.1; `*` as the whole first label),
  or an IPv4 or IPv6 address. Each has one normal form: DNS names in lower case with A-labels and no trailing dot,
  addresses in their shortest form. At most 100 names are allowed, because each adds bytes to every handshake.
- The names of this machine come from the kernel alone, because a resolver (`getfqdn`, `getaddrinfo`) can hang for a
  minute. Link-local addresses are left out: they need a scope, which a certificate cannot express.

Must not know: files, keys, certificates.
"""

from __future__ import annotations

import ctypes
import re
import socket
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address

from cryptography import x509

from zcproto.errors import CertificateError

MAX_NAMES = 100
MAX_DNS_NAME = 253
"""RFC 1035 section 2.3.4: 255 octets on the wire, which is 253 characters."""

_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_WILDCARD_LABELS = 3  # `*.com` would cover a whole registry; clients refuse it anyway

LOOPBACK = ("127.0.0.1", "::1")

# Offsets in sockaddr_in and sockaddr_in6; the same on Linux, macOS and the BSDs.
_IPV4 = slice(4, 8)
_IPV6 = slice(8, 24)
_SOCKADDR_IN = 16
_SOCKADDR_IN6 = 28


class _Interface(ctypes.Structure):
    """The first fields of `struct ifaddrs`, the same on Linux, macOS and the BSDs."""


_Interface._fields_ = [
    ("next", ctypes.POINTER(_Interface)),
    ("name", ctypes.c_char_p),
    ("flags", ctypes.c_uint),
    ("address", ctypes.c_void_p),
]


def check_names(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names in normal form, without duplicates. Raises CertificateError with the first invalid name."""
    checked: dict[str, None] = {}
    for name in names:
        checked[check_name(name)] = None
        if len(checked) > MAX_NAMES:
            raise CertificateError(f"a certificate holds at most {MAX_NAMES} names; give fewer")
    return tuple(checked)


def check_name(name: str) -> str:
    """Return one name in normal form. Raises CertificateError if it is invalid."""
    address = _address(name)
    if address is None:
        return _dns_name(name)
    if address.is_unspecified or address.is_multicast:
        raise _bad(name, "no server is reachable at this address; use the address that clients connect to")
    if isinstance(address, IPv6Address) and address.scope_id is not None:
        raise _bad(name, "an address in a certificate has no scope; remove the part from `%` on")
    return str(address)


def general_names(names: Iterable[str]) -> list[x509.GeneralName]:
    """Return checked names as SubjectAltName entries: addresses as iPAddress, the rest as dNSName."""
    entries: list[x509.GeneralName] = []
    for name in names:
        address = _address(name)
        entries.append(x509.DNSName(name) if address is None else x509.IPAddress(address))
    return entries


def is_address(name: str) -> bool:
    """Return True if the name is an IP address."""
    return _address(name) is not None


def covers(entry: str, name: str) -> bool:
    """Return True if a SubjectAltName entry is valid for `name`: a wildcard stands for exactly one first label.

    Only the same wildcard covers a wildcard name (RFC 9525 section 6.3).
    """
    entry = entry.lower()
    if entry == name:
        return True
    return entry.startswith("*.") and not name.startswith("*.") and name.partition(".")[2] == entry[2:]


@lru_cache(maxsize=256)
def _address(name: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(name)
    except ValueError:
        return None


def _dns_name(name: str) -> str:
    # Check the length first: the codec below is slow on long input.
    if not 1 <= len(name) <= MAX_DNS_NAME + 1:
        raise _bad(name, f"a DNS name has 1 to {MAX_DNS_NAME} characters")
    ascii_name = name.lower() if name.isascii() else _a_labels(name)
    ascii_name = ascii_name.removesuffix(".")
    if len(ascii_name) > MAX_DNS_NAME:
        raise _bad(name, f"a DNS name has 1 to {MAX_DNS_NAME} characters")
    labels = ascii_name.split(".")
    if labels[0] == "*":
        if len(labels) < _WILDCARD_LABELS:
            raise _bad(name, "a wildcard needs two labels after it, as in *.example.com")
        labels = labels[1:]
    if not all(_LABEL.fullmatch(label) for label in labels):
        raise _bad(
            name,
            "a label has 1 to 63 letters, digits and hyphens, without a hyphen at either end;"
            " `*` is allowed only as the whole first label",
        )
    if _NUMBER.fullmatch(labels[-1]):
        # Clients read a name that ends in a number as an IPv4 address (RFC 1123 section 2.1).
        raise _bad(name, "it ends in a number but is not an IPv4 address")
    return ascii_name


def _a_labels(name: str) -> str:
    """Return the ASCII form of an internationalized name.

    The standard library implements only IDNA 2003. If that maps a character to another one (a sharp s to ss),
    IDNA 2008 gives a different result. Such a name is refused, and the operator has to write its A-label.
    """
    try:
        ascii_name = name.encode("idna").decode("ascii")
        back = ascii_name.encode("ascii").decode("idna")
    except UnicodeError:
        raise _bad(name, "it has no ASCII form; write it with its xn-- labels") from None
    if back != unicodedata.normalize("NFC", name.lower()):
        raise _bad(name, "its ASCII form depends on the IDNA version; write it with its xn-- labels")
    return ascii_name.lower()


def _bad(name: str, why: str) -> CertificateError:
    shown = name if len(name) <= MAX_DNS_NAME else name[:MAX_DNS_NAME] + "..."
    return CertificateError(f"{shown!r} is not a valid name for a certificate: {why}")


# --- the names of this machine -----------------------------------------------------------------------------


def found_names() -> tuple[str, ...]:
    """Return localhost, the host's names, the loopback addresses and the addresses of its interfaces."""
    hostname = socket.gethostname()
    candidates = ["localhost", hostname, hostname.partition(".")[0], *LOOPBACK]
    candidates += [str(address) for address in interface_addresses() if not address.is_link_local]
    names: dict[str, None] = {}
    for candidate in candidates:
        try:
            names[check_name(candidate)] = None
        except CertificateError:
            continue  # a host may be called `my_host`, which must not prevent a start
    return tuple(names)


def interface_addresses() -> list[IPv4Address | IPv6Address]:
    """Return the addresses of this machine's interfaces; none if the C library has no such function."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        getifaddrs, freeifaddrs = libc.getifaddrs, libc.freeifaddrs
    except (AttributeError, OSError, TypeError):
        return []  # the loopback addresses and the configured names remain
    head = ctypes.POINTER(_Interface)()
    if getifaddrs(ctypes.byref(head)) != 0:
        return []
    try:
        return list(_walk(head))
    finally:
        freeifaddrs(head)


def _walk(head: ctypes._Pointer[_Interface]) -> Iterator[IPv4Address | IPv6Address]:
    entry = head
    while entry:
        pointer = entry.contents.address
        if pointer:
            family = _family(ctypes.string_at(pointer, 2), sys.platform)
            if family == socket.AF_INET:
                yield IPv4Address(ctypes.string_at(pointer, _SOCKADDR_IN)[_IPV4])
            elif family == socket.AF_INET6:
                yield IPv6Address(ctypes.string_at(pointer, _SOCKADDR_IN6)[_IPV6])
        entry = entry.contents.next


def _family(start: bytes, platform: str) -> int:
    """Return the family in the first two bytes of a sockaddr. On the BSDs the first byte is a length."""
    if platform == "linux":
        return int.from_bytes(start, sys.byteorder)
    return start[1]
