"""Build the TLS alerts that the server sends before keys are established (RFC 8446 section 6)."""

from __future__ import annotations

from enum import IntEnum

_ALERT_RECORD = 21
_FATAL = 2


class Alert(IntEnum):
    """The alert descriptions of RFC 8446 section 6 that a server needs before the handshake begins."""

    UNEXPECTED_MESSAGE = 10
    HANDSHAKE_FAILURE = 40
    ILLEGAL_PARAMETER = 47
    DECODE_ERROR = 50
    PROTOCOL_VERSION = 70
    UNRECOGNIZED_NAME = 112
    NO_APPLICATION_PROTOCOL = 120


def alert_record(alert: Alert) -> bytes:
    """Return a fatal alert as one plaintext record with legacy version 0x0303 (RFC 8446 section 5.1)."""
    return bytes((_ALERT_RECORD, 3, 3, 0, 2, _FATAL, alert))
