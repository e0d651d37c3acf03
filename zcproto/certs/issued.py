"""The list of certificates issued to clients, `client-ca.issued`: its format and its limits.

    zcproto client certificates: serial, name, end, and if revoked: when and why
    4D2A...9F alice 20270601T123015Z
    77C0...01 bob 20270601T123015Z 20260901T080000Z keyCompromise

Decides: the format of a line and how long it is kept. The list makes it possible to revoke every certificate of a
user by name, and to restore a lost revocation list.

Rules:
- A line has one format. A file with any other line is refused as a whole, because it may lack revocations.
- A line is kept until a week after its certificate has expired and left the revocation list.
- There is always room to revoke every certificate in the list: issuing stops first.

Must not know: files, certificates, what time it is.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from zcproto.certs.client_user import is_dns_user
from zcproto.errors import CertificateError

UNSPECIFIED: Final = "unspecified"
REASONS: Final = (
    UNSPECIFIED,
    "keyCompromise",
    "affiliationChanged",
    "superseded",
    "cessationOfOperation",
    "privilegeWithdrawn",
)
"""Reasons for a revocation, as named by RFC 5280 section 5.3.1. None of them can be undone."""

UNKNOWN_NAME: Final = "?"
"""Stands for the user of a revoked certificate that was not in the list."""

KEEP_EXPIRED: Final = timedelta(days=7)
"""Allows for servers whose clock is behind."""

MAX_SERIAL_NUMBER: Final = 2**159 - 1
"""RFC 5280 section 4.1.2.2: 20 octets, of which the first bit is 0."""

_HEADER: Final = "zcproto client certificates: serial, name, end, and if revoked: when and why"
_HEX: Final = re.compile(r"[0-9A-Fa-f]{1,40}")
_TIME: Final = "%Y%m%dT%H%M%SZ"
_ROOM: Final = len(
    f"{MAX_SERIAL_NUMBER:X}  20270601T123015Z 20260901T080000Z {max(REASONS, key=len)}\n"
)  # the longest line, without the name


@dataclass(frozen=True, slots=True)
class Issued:
    """One certificate that was issued to a client."""

    serial_number: int
    name: str
    """The user; `?` if unknown."""
    not_after: datetime
    revoked_at: datetime | None = None
    reason: str = ""
    """One of REASONS if it was revoked, otherwise empty."""

    @property
    def serial(self) -> str:
        """The serial number in hexadecimal."""
        return f"{self.serial_number:X}"


def parse_list(data: bytes, where: str) -> tuple[Issued, ...]:
    """Return the entries of a list; an empty file is an empty list. Raises CertificateError with the line."""
    if not data:
        return ()
    lines = data.decode("ascii", "replace").split("\n")
    if lines[0] != _HEADER or lines[-1] != "":
        raise CertificateError(f"{where}: is not a complete list of client certificates; restore the file")
    issued: dict[int, Issued] = {}
    for number, line in enumerate(lines[1:-1], 2):
        entry = _parse_line(line)
        if entry is None or entry.serial_number in issued:
            raise CertificateError(f"{where}: line {number} is damaged; restore the file")
        issued[entry.serial_number] = entry
    return tuple(issued.values())


def render_list(issued: Iterable[Issued]) -> bytes:
    return "".join(f"{line}\n" for line in (_HEADER, *map(_line, issued))).encode("ascii")


def current(issued: Iterable[Issued], now: datetime, signed: Container[int] = ()) -> tuple[Issued, ...]:
    """Return the entries to keep: until a week after their expiry, and while the revocation list contains them.

    An expired entry leaves the revocation list first. Otherwise it would be read back from there as unknown.
    """
    return tuple(
        entry for entry in issued if now <= entry.not_after + KEEP_EXPIRED or entry.serial_number in signed
    )


def has_room(issued: Sequence[Issued], limit: int) -> bool:
    """Return True if the list fits into `limit` bytes even if all its certificates are revoked."""
    return len(_HEADER) + 1 + sum(_ROOM + len(entry.name) for entry in issued) <= limit


def parse_serial(text: str) -> int:
    """Return a serial number from hexadecimal digits, with or without colons, as openssl prints them."""
    digits = text.replace(":", "")
    number = int(digits, 16) if _HEX.fullmatch(digits) else 0
    if not 0 < number <= MAX_SERIAL_NUMBER:
        raise CertificateError(
            "a serial number has 1 to 40 hexadecimal digits; copy it from `zcproto cert show --json`"
        )
    return number


def _line(entry: Issued) -> str:
    line = f"{entry.serial} {entry.name} {_stamp(entry.not_after)}"
    return line if entry.revoked_at is None else f"{line} {_stamp(entry.revoked_at)} {entry.reason}"


def _parse_line(line: str) -> Issued | None:
    """Parse a line; return None unless it has exactly the format in which it is written."""
    parts = line.split(" ")
    if len(parts) not in (3, 5):
        return None
    serial, name, not_after, revoked_at, reason = (*parts, "", "")[:5]
    if not (is_dns_user(name) or name == UNKNOWN_NAME) or reason not in ("", *REASONS):
        return None
    try:
        moment = _moment(revoked_at) if revoked_at else None
        entry = Issued(parse_serial(serial), name, _moment(not_after), moment, reason)
    except (CertificateError, ValueError):
        return None
    return entry if _line(entry) == line else None


def _stamp(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime(_TIME)


def _moment(text: str) -> datetime:
    if not text.endswith("Z"):
        raise ValueError("a time in UTC is needed")
    return datetime.fromisoformat(text)
