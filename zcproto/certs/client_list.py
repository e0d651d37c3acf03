"""The list of the certificates that were issued to clients, `client-ca.issued`: its lines and its bounds.

    zcproto client certificates: serial, name, end, and if revoked: when and why
    4D2A...9F alice 20270601T123015Z
    77C0...01 bob 20270601T123015Z 20260901T080000Z keyCompromise

What this file decides: what a line is, and how long it is kept. With it each certificate of a user can be
revoked by name, and a lost list of revoked ones is made again.

Rules:
- A line has one form; a file with any other line is refused whole, as it may lack revocations.
- A line is kept until a week after its certificate has expired, and has left the signed list.
- There is always room to revoke every certificate in the list: issuing ends first.

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
"""Why a certificate is revoked, as RFC 5280 section 5.3.1 names it. There is no way back from any of them."""

UNKNOWN_NAME: Final = "?"
"""In place of the name of a certificate that is revoked and was not in the list."""

KEEP_EXPIRED: Final = timedelta(days=7)
"""For servers whose clock is behind."""

MAX_SERIAL_NUMBER: Final = 2**159 - 1
"""RFC 5280 section 4.1.2.2: 20 octets, of which the first bit is 0."""

_HEADER: Final = "zcproto client certificates: serial, name, end, and if revoked: when and why"
_HEX: Final = re.compile(r"[0-9A-Fa-f]{1,40}")
_TIME: Final = "%Y%m%dT%H%M%SZ"
_ROOM: Final = len(
    f"{MAX_SERIAL_NUMBER:X}  20270601T123015Z 20260901T080000Z {max(REASONS, key=len)}\n"
)  # what a line takes at most besides its name


@dataclass(frozen=True, slots=True)
class Issued:
    """One certificate that was issued to a client."""

    serial_number: int
    name: str
    """The user; `?` if that is not known."""
    not_after: datetime
    revoked_at: datetime | None = None
    reason: str = ""
    """One of REASONS if it was revoked, else empty."""

    @property
    def serial(self) -> str:
        """The serial number in hexadecimal."""
        return f"{self.serial_number:X}"


def parse_list(data: bytes, where: str) -> tuple[Issued, ...]:
    """The lines of a list; an empty file is an empty list. Raises CertificateError, which names the line."""
    if not data:
        return ()
    lines = data.decode("ascii", "replace").split("\n")
    if lines[0] != _HEADER or lines[-1] != "":
        raise CertificateError(f"{where}: is not the whole list of client certificates; restore it")
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
    """Those that are kept: until a week after their end, and while the signed list has their serial numbers.

    So an expired one leaves the signed list first, where it would not be known for what it is.
    """
    return tuple(
        entry for entry in issued if now <= entry.not_after + KEEP_EXPIRED or entry.serial_number in signed
    )


def has_room(issued: Sequence[Issued], limit: int) -> bool:
    """Whether the list fits into `limit` bytes even if all of it is revoked."""
    return len(_HEADER) + 1 + sum(_ROOM + len(entry.name) for entry in issued) <= limit


def parse_serial(text: str) -> int:
    """A serial number from hexadecimal digits, as they are shown here and by openssl; colons may be between."""
    digits = text.replace(":", "")
    number = int(digits, 16) if _HEX.fullmatch(digits) else 0
    if not 0 < number <= MAX_SERIAL_NUMBER:
        raise CertificateError("a serial number is 1 to 40 hexadecimal digits; copy it from the list")
    return number


def _line(entry: Issued) -> str:
    line = f"{entry.serial} {entry.name} {_stamp(entry.not_after)}"
    return line if entry.revoked_at is None else f"{line} {_stamp(entry.revoked_at)} {entry.reason}"


def _parse_line(line: str) -> Issued | None:
    """What a line says; None unless it is as it would be written."""
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
