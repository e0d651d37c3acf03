"""The table of section 7, row by row, and what passes by waiting."""

from __future__ import annotations

from typing import Any

import pytest

from zcproto.client.retry import Then, is_transient, retry_after_ms, what_next
from zcproto.errors import CallError, Code
from zcproto.tls.failure import TlsFailure

ROWS = {
    Code.UNAVAILABLE: Then.LATER,
    Code.RESOURCE_EXHAUSTED: Then.LATER,
    Code.STALE_TIMESTAMP: Then.AT_ONCE,
    Code.TOKEN_EXPIRED: Then.RENEW,
}


@pytest.mark.parametrize("code", list(Code))
def test_each_code_has_its_row(code: Code) -> None:
    assert what_next(CallError.from_wire(code, "x", {})) is ROWS.get(code, Then.RAISE)


@pytest.mark.parametrize("code", [0, 17, 63, 71, 2**40, -1])
def test_an_unknown_code_is_told(code: int) -> None:
    assert what_next(CallError.from_wire(code, "x", {"retry_after_ms": 5})) is Then.RAISE


def test_resource_exhausted_with_a_limit_is_told() -> None:
    assert what_next(CallError.from_wire(Code.RESOURCE_EXHAUSTED, "x", {"limit": 5})) is Then.RAISE
    assert what_next(CallError.from_wire(Code.UNAVAILABLE, "x", {"limit": 5})) is Then.LATER


@pytest.mark.parametrize(
    ("value", "delay"),
    [
        (0, 0),
        (1, 1),
        (3_600_000, 3_600_000),
        (2**63, 3_600_000),
        (-1, 0),
        (True, 0),
        (1.5, 0),
        ("1", 0),
        (None, 0),
    ],
)
def test_a_delay_is_bounded_and_an_int(value: Any, delay: int) -> None:
    assert retry_after_ms({"retry_after_ms": value}) == delay
    assert retry_after_ms({}) == 0


@pytest.mark.parametrize("failure", list(TlsFailure))
def test_whom_a_server_is_and_what_it_speaks_does_not_pass(failure: TlsFailure) -> None:
    passing = {
        TlsFailure.HANDSHAKE_TIMEOUT,
        TlsFailure.DISCONNECTED,
        TlsFailure.CONNECTION_RESET,
        TlsFailure.TRUNCATED,
        TlsFailure.BAD_RECORD,
        TlsFailure.PEER_ALERT,
        TlsFailure.OTHER,
    }
    assert is_transient(failure.value) is (failure in passing)


def test_a_policy_does_not_pass() -> None:
    assert not is_transient("sts_policy")
