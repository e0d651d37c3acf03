"""The error codes that scenarios use (zcp1.md, sections 10.1 and 10.2), independent of those of zcproto."""

from __future__ import annotations

from typing import Final

CANCELLED: Final = 1
UNKNOWN: Final = 2
INVALID_ARGUMENT: Final = 3
DEADLINE_EXCEEDED: Final = 4
NOT_FOUND: Final = 5
RESOURCE_EXHAUSTED: Final = 8
FAILED_PRECONDITION: Final = 9
OUT_OF_RANGE: Final = 11
UNIMPLEMENTED: Final = 12
INTERNAL: Final = 13
UNAVAILABLE: Final = 14
DATA_LOSS: Final = 15
UNAUTHENTICATED: Final = 16
PROTOCOL_ERROR: Final = 64
STALE_TIMESTAMP: Final = 67
TOKEN_EXPIRED: Final = 68
TOKEN_REVOKED: Final = 69
SESSION_REPLACED: Final = 70
