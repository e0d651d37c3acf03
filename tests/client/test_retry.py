"""The table of zcp1.md, section 11.1, transient TLS failures, and backoff."""

from __future__ import annotations

from math import inf
from typing import Any

import pytest

from tests.wire.vectors import document
from zcproto.client.retry import (
    FIRST_DELAY,
    MAX_DELAY,
    MAX_LOST,
    Attempt,
    Backoff,
    Renewal,
    Shown,
    Step,
    Then,
    deadline_ms,
    is_transient,
    retry_after_ms,
    what_next,
)
from zcproto.errors import CallError, Code
from zcproto.tls.failure import TlsFailure

ROWS = {
    Code.UNAVAILABLE: Then.LATER,
    Code.RESOURCE_EXHAUSTED: Then.LATER,
    Code.STALE_TIMESTAMP: Then.AT_ONCE,
    Code.TOKEN_EXPIRED: Then.RENEW,
}


@pytest.mark.parametrize("code", list(Code))
def test_each_code_has_its_next_step(code: Code) -> None:
    assert what_next(CallError.from_wire(code, "x", {})) is ROWS.get(code, Then.RAISE)


@pytest.mark.parametrize("code", [0, 17, 63, 71, 2**40, -1])
def test_unknown_code_is_raised(code: int) -> None:
    assert what_next(CallError.from_wire(code, "x", {"retry_after_ms": 5})) is Then.RAISE


def test_resource_exhausted_with_limit_is_raised() -> None:
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
def test_retry_after_is_bounded_and_an_int(value: Any, delay: int) -> None:
    assert retry_after_ms({"retry_after_ms": value}) == delay
    assert retry_after_ms({}) == 0


@pytest.mark.parametrize("failure", list(TlsFailure))
def test_identity_and_protocol_failures_are_permanent(failure: TlsFailure) -> None:
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


def test_sts_policy_failure_is_permanent() -> None:
    assert not is_transient("sts_policy")


# --- backoff ----------------------------------------------------------------------------------------


def test_backoff_limit_doubles_from_100_ms_to_30_s() -> None:
    backoff = Backoff(lambda: 1.0)
    expected = [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30.0, 30.0]
    assert [backoff.next() for _ in expected] == pytest.approx(expected)


def test_backoff_reset_starts_at_100_ms() -> None:
    backoff = Backoff(lambda: 1.0)
    for _ in range(20):
        backoff.next()
    assert backoff.next() == MAX_DELAY
    backoff.reset()
    assert backoff.next() == FIRST_DELAY


def test_retry_after_is_added_in_full_to_the_jitter() -> None:
    assert Backoff(lambda: 0.0).next(1_500) == 1.5
    assert Backoff(lambda: 0.5).next(1_500) == pytest.approx(1.55)


# --- another token -----------------------------------------------------------------------------------

BUSY = CallError.from_wire(Code.UNAVAILABLE, "x", {"retry_after_ms": 1_000})
UNKNOWN = {"reason": "unknown_token"}
OTHER_CERTIFICATE = {"certificate": True}
RENEWALS: list[tuple[Code, dict[str, Any], dict[str, bool], Then]] = [
    (Code.UNAVAILABLE, {}, {"must": True}, Then.LATER),
    (Code.UNAVAILABLE, {}, {}, Then.KEEP),
    (Code.STALE_TIMESTAMP, {}, {}, Then.AT_ONCE),
    (Code.UNAUTHENTICATED, {"attach": True}, {}, Then.ATTACH),
    (Code.UNAUTHENTICATED, {}, {"must": True}, Then.REPLACE),
    (Code.UNAUTHENTICATED, UNKNOWN, {"must": True}, Then.REPLACE),
    (Code.UNAUTHENTICATED, UNKNOWN, {}, Then.KEEP),
    (Code.UNAUTHENTICATED, UNKNOWN, {"is_restored": True}, Then.REOPEN),
    (Code.UNAUTHENTICATED, {}, {"must": True, "is_refresh": False}, Then.RAISE),
    (Code.UNAUTHENTICATED, OTHER_CERTIFICATE, {"can_reopen": True}, Then.REOPEN),
    (Code.UNAUTHENTICATED, OTHER_CERTIFICATE, {"must": True}, Then.RAISE),
    (Code.TOKEN_EXPIRED, {}, {}, Then.REOPEN),
    (Code.INTERNAL, {}, {}, Then.REOPEN),
    (Code.INTERNAL, {}, {"must": True, "is_refresh": False}, Then.RAISE),
    (Code.NOT_FOUND, {}, {}, Then.KEEP),
    (Code.NOT_FOUND, {}, {"must": True}, Then.RAISE),
    (Code.TOKEN_REVOKED, {}, {}, Then.RAISE),
    (Code.TOKEN_REVOKED, {}, {"is_restored": True}, Then.REOPEN),
]


@pytest.mark.parametrize(("code", "details", "given", "then"), RENEWALS)
def test_renewal_after_error(code: Code, details: dict[str, Any], given: dict[str, bool], then: Then) -> None:
    given = {"must": False, "is_refresh": True, "can_reopen": False, "is_restored": False, **given}
    renewal = Renewal(lambda: 0.5, must=given.pop("must"))
    assert renewal.after_error(CallError.from_wire(code, "x", details), **given).then is then
    if then in (Then.AT_ONCE, Then.ATTACH):  # once
        assert renewal.after_error(CallError.from_wire(code, "x", details), **given).then is Then.KEEP
    elif then in (Then.REOPEN, Then.REPLACE):  # the token cannot be used any more
        assert renewal.after_error(BUSY, **given).then is Then.LATER


def test_renewal_is_required_once_the_refresh_token_may_be_spent() -> None:
    renewal = Renewal(lambda: 0.5, must=False)
    assert renewal.after_loss(may_be_spent=True) == Step(Then.AT_ONCE)
    step = renewal.after_error(BUSY, is_refresh=True, can_reopen=False, is_restored=False)
    assert step == Step(Then.LATER, 1 + FIRST_DELAY / 2)
    assert [renewal.after_loss(may_be_spent=False).then for _ in range(MAX_LOST)][-1] is Then.RAISE


# --- the vectors of the specification -----------------------------------------------------------------

VECTORS = {vector["name"]: vector for vector in document("retry")["vectors"]}
STEPS = {
    Then.AT_ONCE: "send",
    Then.CATCH_UP: "send",
    Then.LATER: "wait",
    Then.RENEW: "refresh",
    Then.REOPEN: "reopen",
    Then.REPLACE: "reopen",
    Then.ATTACH: "attach",
    Then.RAISE: "report",
}


def attempt_of(request: dict[str, Any], random: float) -> Attempt:
    """Return the retries of a call that has taken the steps of a vector before."""
    attempt = Attempt(lambda: random)
    attempt.done = {then for then, name in STEPS.items() if name in request["done"]}
    for _ in range(request["delays"]):
        attempt.backoff.next()
    return attempt


@pytest.mark.parametrize("name", [name for name in VECTORS if name.startswith("retry-")])
def test_decision_vectors(name: str) -> None:
    vector = VECTORS[name]
    request, has = vector["request"], vector["client"]
    attempt = attempt_of(request, vector["random"])
    left = inf if request["time_left_ms"] is None else request["time_left_ms"] / 1000
    if "connection" in vector["outcome"]:
        was_run = vector["outcome"]["connection"] == "lost"
        step = attempt.after_loss(is_repeatable=request["idempotent"] or not was_run, left=left)
    else:
        error = vector["outcome"]["error"]
        step = attempt.after_error(
            CallError.from_wire(error["code"], "x", error["details"]),
            Shown(request["token"]),
            opens=has["credentials"] is not None,
            is_draining=request["draining"],
            left=left,
        )
    expected: dict[str, Any] = {"step": STEPS[step.then]}
    if step.then is Then.RENEW and not has["refresh_token"]:
        expected = {"step": "reopen", "after_ms": 0}
    elif step.then is Then.LATER:
        expected["after_ms"] = pytest.approx(step.delay * 1000)
    elif step.then is Then.REPLACE:
        backoff = Backoff(lambda: vector["random"])
        delays = [backoff.next() for _ in range(has["reopenings"] + 1)]
        expected["after_ms"] = pytest.approx(delays[-1] * 1000)
    elif step.then is Then.REOPEN:
        expected["after_ms"] = 0
    assert vector["expect"] == expected


@pytest.mark.parametrize("name", [name for name in VECTORS if name.startswith("deadline-")])
def test_deadline_vectors(name: str) -> None:
    vector = VECTORS[name]
    timeout = vector["timeout_ms"]
    sent = [
        None if timeout is None or at >= timeout else deadline_ms((timeout - at) / 1000)
        for at in vector["attempts_at_ms"]
    ]
    assert sent == vector["expect"]["deadline_ms"]


def test_deadline_is_not_longer_than_the_timeout_by_rounding() -> None:
    now = 1449.6199313028235
    assert now + 900.0 - now > 900.0
    assert deadline_ms(now + 900.0 - now) == 900_000
    assert deadline_ms(0.0001) == 1
