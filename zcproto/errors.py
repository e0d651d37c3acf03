"""All exceptions of zcproto as one tree, and the error codes of the protocol.

    ZcprotoError
    ├── ConfigError              the configuration is invalid; lists all faults
    ├── CertificateError         a certificate or key cannot be used
    ├── LifespanError            the lifespan of the application failed
    ├── ProtocolError            the peer violated the protocol; has the code for it
    ├── TlsError                 the TLS handshake failed, or the peer cannot be trusted
    ├── LoginError               the application's `login` of a client raised, or returned no login
    ├── ConnectionClosed         the connection ended; `clean` is False after a truncation
    │   └── CannotConnect        no connection could be made: refused, unreachable, timeout
    └── CallError                a call was answered with an error; one subclass per code
        ├── Cancelled, UnknownError, InvalidArgument, DeadlineExceeded, NotFound, AlreadyExists,
        │   PermissionDenied, ResourceExhausted, FailedPrecondition, Aborted, OutOfRange,
        │   Unimplemented, InternalError, Unavailable, DataLoss, Unauthenticated
        └── StaleTimestamp, TokenExpired, TokenRevoked, SessionReplaced

Methods of a server raise the same CallErrors that clients catch. The classes hold data, from which they build
their message. No exception contains a token or a key.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, ClassVar


class Code(IntEnum):
    """Error codes of ZCP/1. 1 to 16 are gRPC's canonical codes, 64 and above are the protocol's own."""

    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16
    PROTOCOL_ERROR = 64
    FRAME_TOO_LARGE = 65
    REPLAYED = 66
    STALE_TIMESTAMP = 67
    TOKEN_EXPIRED = 68
    TOKEN_REVOKED = 69
    SESSION_REPLACED = 70


class ZcprotoError(Exception):
    """The base of all exceptions of this package.

    `of_client` is whether a call from the server to a client failed with it. If the method that called lets it
    pass, its own caller gets ABORTED: the codes of a client's answer do not apply to the caller.
    """

    of_client = False


class ConfigError(ZcprotoError):
    """The configuration is invalid; nothing was started."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__(faults)
        self.faults = faults

    def __str__(self) -> str:
        return "\n".join(self.faults)


class CertificateError(ZcprotoError):
    """A certificate or a key cannot be used. The message names the file and the cure, never the key."""


class LifespanError(ZcprotoError):
    """The lifespan of the application failed to start or to end, or ended early. Its cause is what was raised."""


class ProtocolError(ZcprotoError):
    """The peer violated the protocol.

    `code` is the error code on the wire; `reason` is a fixed phrase, safe to send and to log.
    """

    def __init__(self, code: Code, reason: str) -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.code.name}: {self.reason}"


class TlsError(ZcprotoError):
    """The TLS handshake failed, or the peer is not the expected one.

    `failure` is the name of the cause in `zcproto.tls.TlsFailure` (`certificate_untrusted`, `pin_mismatch`, ...).
    """

    def __init__(self, failure: str, detail: str = "") -> None:
        super().__init__(failure, detail)
        self.failure = failure
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.failure}: {self.detail}" if self.detail else self.failure


class LoginError(ZcprotoError):
    """The function that an application gave to a client as `login` raised, or did not return a login.

    Its exception is the `__cause__`. The next call of the client runs the function again. The message contains no
    value of the login.
    """


class ConnectionClosed(ZcprotoError):
    """The connection ended before the operation was complete.

    `clean` is True after a close_notify, False after a reset or a truncation (RFC 8446 section 6.1).
    `reason` is a fixed phrase or the peer's GOAWAY reason. `code` is the fatal error that the peer sent, if any.
    """

    def __init__(self, reason: str, *, clean: bool = False, code: Code | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.clean = clean
        self.code = code


class CannotConnect(ConnectionClosed):
    """No connection to the server could be made: unknown host, refused, unreachable, or timeout.

    `refused` is whether nothing listens at the address: the server may be starting.
    """

    def __init__(self, reason: str, *, refused: bool = False) -> None:
        super().__init__(reason)
        self.refused = refused


class CallError(ZcprotoError):
    """A call was answered with an error.

    `message` is what to do next. `details` is a map, often empty; UNAVAILABLE and RESOURCE_EXHAUSTED have
    `retry_after_ms` (zcp1.md, section 10.4).
    """

    code: Code = Code.UNKNOWN
    by_code: ClassVar[dict[int, type[CallError]]] = {}

    def __init__(self, message: str = "", details: dict[str, Any] | None = None) -> None:
        super().__init__(message, details)
        self.message = message
        self.details: dict[str, Any] = {} if details is None else details

    def __init_subclass__(cls) -> None:
        CallError.by_code[cls.code] = cls

    def __str__(self) -> str:
        name = self.code.name
        return f"{name}: {self.message}" if self.message else name

    @classmethod
    def from_wire(cls, code: int, message: str, details: dict[str, Any] | None) -> CallError:
        """Return the exception for a received code. An unknown code becomes UNKNOWN with its number."""
        kind = cls.by_code.get(code)
        if kind is None:
            return UnknownError(f"{message} (code {code})", details)
        return kind(message, details)


class Cancelled(CallError):
    code = Code.CANCELLED


class UnknownError(CallError):
    code = Code.UNKNOWN


class InvalidArgument(CallError):
    code = Code.INVALID_ARGUMENT


class DeadlineExceeded(CallError):
    code = Code.DEADLINE_EXCEEDED


class NotFound(CallError):
    code = Code.NOT_FOUND


class AlreadyExists(CallError):
    code = Code.ALREADY_EXISTS


class PermissionDenied(CallError):
    code = Code.PERMISSION_DENIED


class ResourceExhausted(CallError):
    code = Code.RESOURCE_EXHAUSTED


class FailedPrecondition(CallError):
    code = Code.FAILED_PRECONDITION


class Aborted(CallError):
    code = Code.ABORTED


class OutOfRange(CallError):
    code = Code.OUT_OF_RANGE


class Unimplemented(CallError):
    code = Code.UNIMPLEMENTED


class InternalError(CallError):
    code = Code.INTERNAL


class Unavailable(CallError):
    code = Code.UNAVAILABLE


class DataLoss(CallError):
    code = Code.DATA_LOSS


class Unauthenticated(CallError):
    code = Code.UNAUTHENTICATED


class StaleTimestamp(CallError):
    code = Code.STALE_TIMESTAMP


class TokenExpired(CallError):
    code = Code.TOKEN_EXPIRED


class TokenRevoked(CallError):
    code = Code.TOKEN_REVOKED


class SessionReplaced(CallError):
    code = Code.SESSION_REPLACED
