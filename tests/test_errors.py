"""The tree of errors: data in, a sentence out, nothing secret."""

from __future__ import annotations

import pickle

import pytest

from tests.helpers import FATAL_CODES
from zcproto import errors
from zcproto.errors import (
    CallError,
    CertificateError,
    Code,
    ConfigError,
    ConnectionClosed,
    ProtocolError,
    TlsError,
    UnknownError,
    ZcprotoError,
)

NUMBERS = {
    1: "CANCELLED",
    2: "UNKNOWN",
    3: "INVALID_ARGUMENT",
    4: "DEADLINE_EXCEEDED",
    5: "NOT_FOUND",
    6: "ALREADY_EXISTS",
    7: "PERMISSION_DENIED",
    8: "RESOURCE_EXHAUSTED",
    9: "FAILED_PRECONDITION",
    10: "ABORTED",
    11: "OUT_OF_RANGE",
    12: "UNIMPLEMENTED",
    13: "INTERNAL",
    14: "UNAVAILABLE",
    15: "DATA_LOSS",
    16: "UNAUTHENTICATED",
    64: "PROTOCOL_ERROR",
    65: "FRAME_TOO_LARGE",
    66: "REPLAYED",
    67: "STALE_TIMESTAMP",
    68: "TOKEN_EXPIRED",
    69: "TOKEN_REVOKED",
    70: "SESSION_REPLACED",
}
"""ZCP/1, section 7."""


def test_codes_are_those_of_the_protocol() -> None:
    assert {code.value: code.name for code in Code} == NUMBERS


def test_three_codes_of_a_connection_are_of_no_call() -> None:
    assert set(Code) - CallError.by_code.keys() == FATAL_CODES


@pytest.mark.parametrize("code", [code for code in Code if code not in FATAL_CODES])
def test_each_code_of_a_call_has_its_own_class(code: Code) -> None:
    error = CallError.from_wire(code, "do this next", {"retry_after_ms": 100})
    assert type(error) is CallError.by_code[code]
    assert error.code is code
    assert error.message == "do this next"
    assert error.details == {"retry_after_ms": 100}
    assert str(error) == f"{code.name}: do this next"
    assert isinstance(error, ZcprotoError)


@pytest.mark.parametrize("code", [0, 17, 63, 64, 71, -1, 2**64])
def test_unknown_code_keeps_its_number(code: int) -> None:
    error = CallError.from_wire(code, "odd", None)
    assert isinstance(error, UnknownError)
    assert error.code is Code.UNKNOWN
    assert str(error) == f"UNKNOWN: odd (code {code})"
    assert error.details == {}


def test_error_without_a_message_shows_its_name() -> None:
    assert str(CallError.by_code[Code.NOT_FOUND]()) == "NOT_FOUND"


def test_details_are_not_shared_between_errors() -> None:
    first, second = errors.Aborted(), errors.Aborted()
    first.details["a"] = 1
    assert second.details == {}


def test_config_error_lists_all_faults() -> None:
    error = ConfigError(["a: was 1", "b: was 2"])
    assert error.faults == ["a: was 1", "b: was 2"]
    assert str(error) == "a: was 1\nb: was 2"


def test_protocol_error_has_code_and_reason() -> None:
    error = ProtocolError(Code.REPLAYED, "nonce counter did not grow")
    assert (error.code, error.reason) == (Code.REPLAYED, "nonce counter did not grow")
    assert str(error) == "REPLAYED: nonce counter did not grow"


@pytest.mark.parametrize(
    ("error", "text"),
    [(TlsError("truncated"), "truncated"), (TlsError("pin_mismatch", "it has X"), "pin_mismatch: it has X")],
)
def test_tls_error_names_its_failure(error: TlsError, text: str) -> None:
    assert str(error) == text


def test_closed_connection_reports_whether_it_was_clean() -> None:
    error = ConnectionClosed("draining", clean=True)
    assert (str(error), error.clean, error.code) == ("draining", True, None)
    error = ConnectionClosed("replayed", code=Code.REPLAYED)
    assert (error.clean, error.code) == (False, Code.REPLAYED)


def test_failed_connection_reports_whether_it_was_refused() -> None:
    error = errors.CannotConnect("the port is closed", refused=True)
    assert isinstance(error, ConnectionClosed)
    assert (str(error), error.refused, error.clean, error.code) == ("the port is closed", True, False, None)
    assert pickle.loads(pickle.dumps(error)).refused
    assert not errors.CannotConnect("unknown host").refused


@pytest.mark.parametrize(
    "error",
    [
        ConfigError(["a"]),
        CertificateError("x.pem: expired"),
        ProtocolError(Code.PROTOCOL_ERROR, "r"),
        TlsError("truncated", "d"),
        ConnectionClosed("reason"),
        errors.NotFound("m", {"a": 1}),
    ],
)
def test_errors_survive_pickling(error: ZcprotoError) -> None:
    """They cross process borders in tests and in pools."""
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert copy.args == error.args


def test_every_error_has_the_same_root() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert len(kinds) >= 26
    assert all(issubclass(kind, ZcprotoError) for kind in kinds)
