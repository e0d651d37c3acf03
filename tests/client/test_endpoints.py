"""Endpoints and Round: which address is tried next, and when."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from math import inf
from random import Random

import pytest

from zcproto.client.endpoints import (
    ATTEMPT_DELAY,
    HANDSHAKE_DELAY,
    MAX_ADDRESSES,
    MAX_ENDPOINTS,
    MAX_KNOWN,
    RESOLUTION_DELAY,
    STABLE_AFTER,
    Address,
    Endpoint,
    Endpoints,
    GoingAway,
    Round,
    parse_addresses,
)
from zcproto.errors import CannotConnect, ConfigError, ConnectionClosed, TlsError, ZcprotoError

START = 1_000.0
A, B, C = (Address(name, 7443) for name in ("a.example", "b.example", "c.example"))
REFUSED = CannotConnect("refused", refused=True)
WRONG_PIN = TlsError("pin_mismatch")


def numbers(*values: float) -> Callable[[], float]:
    iterator: Iterator[float] = itertools.chain(values, itertools.repeat(values[-1]))
    return lambda: next(iterator)


def listed(*addresses: Address, random: Callable[[], float] = lambda: 0.5) -> Endpoints:
    return Endpoints(addresses, False, random)


def at(address: Address, ip: str) -> Endpoint:
    return Endpoint(*address, ip)


def begin(endpoints: Endpoints, found: dict[Address, Sequence[str]], now: float = START) -> Round:
    """Begin a round whose names are resolved at once."""
    attempts = endpoints.begin_round()
    for address in attempts.order:
        attempts.resolved(address, found[address], now)
    return attempts


def tried(attempts: Round, now: float = START) -> list[Endpoint]:
    """Let each attempt of a round fail, and return their order."""
    order = []
    while isinstance(endpoint := attempts.next(now), Endpoint):
        order.append(endpoint)
        attempts.failed(endpoint, REFUSED, now)
    return order


# --- addresses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["a.example, b.example:7444", ["a.example:7443", "b.example:7444"]])
def test_several_addresses_are_a_list_or_a_text(given: str | list[str]) -> None:
    assert parse_addresses(given) == (A, Address("b.example", 7444))


def test_repeated_address_counts_once() -> None:
    assert parse_addresses("a.example:7443,A.example") == (A,)


@pytest.mark.parametrize("count", [0, MAX_ADDRESSES + 1])
def test_number_of_addresses_is_limited(count: int) -> None:
    with pytest.raises(ConfigError, match=f"{count} are given; give from 1 to {MAX_ADDRESSES}"):
        parse_addresses([f"host-{number}" for number in range(count)])


@pytest.mark.parametrize(
    ("endpoint", "text"),
    [
        (Endpoint("a.example", 7443, "192.0.2.1"), "a.example:7443 (192.0.2.1)"),
        (Endpoint("192.0.2.1", 7443, "192.0.2.1"), "192.0.2.1:7443"),
        (Endpoint("::1", 7443, "::1"), "[::1]:7443"),
    ],
)
def test_endpoint_as_text_names_what_was_given_and_the_ip(endpoint: Endpoint, text: str) -> None:
    assert str(endpoint) == text


# --- the order of attempts ---------------------------------------------------------------------------


def test_listed_addresses_are_tried_in_their_order_and_families_alternate() -> None:
    attempts = begin(
        listed(A, B), {A: ["2001:db8::1", "2001:db8::2", "192.0.2.1"], B: ["192.0.2.9", "2001:db8::9"]}
    )
    assert [endpoint.ip for endpoint in tried(attempts)] == [
        *("2001:db8::1", "192.0.2.1", "2001:db8::2"),
        *("192.0.2.9", "2001:db8::9"),
    ]


def test_random_order_shuffles_addresses_and_those_of_a_family() -> None:
    endpoints = Endpoints([A, B], True, numbers(0.0))
    attempts = begin(endpoints, {A: ["2001:db8::1", "192.0.2.1", "192.0.2.2"], B: ["192.0.2.9"]})
    assert [endpoint.ip for endpoint in tried(attempts)] == [
        "192.0.2.9",
        "2001:db8::1",
        "192.0.2.2",
        "192.0.2.1",
    ]


def test_random_order_is_even() -> None:
    endpoints = Endpoints([A, B, C], True, Random(1).random)
    firsts = [endpoints.begin_round().order[0] for _ in range(600)]
    assert all(firsts.count(address) > 150 for address in (A, B, C))


def test_endpoint_of_the_last_connection_comes_first() -> None:
    found = {A: ["192.0.2.1"], B: ["192.0.2.2", "192.0.2.3"]}
    endpoints = listed(A, B)
    endpoints.connected(at(B, "192.0.2.3"), START)
    assert [endpoint.ip for endpoint in tried(begin(endpoints, found))] == [
        "192.0.2.3",
        "192.0.2.2",
        "192.0.2.1",
    ]


def test_repeated_ip_of_a_name_is_tried_once() -> None:
    assert len(tried(begin(listed(A), {A: ["192.0.2.1"] * 3}))) == 1


def test_number_of_endpoints_in_a_round_is_limited() -> None:
    found = {
        A: [f"192.0.2.{number}" for number in range(60)],
        B: [f"192.0.3.{number}" for number in range(60)],
    }
    assert len(tried(begin(listed(A, B), found))) == MAX_ENDPOINTS


def test_number_of_endpoints_that_are_remembered_is_limited() -> None:
    endpoints = listed(A)
    for number in range(2 * MAX_KNOWN):
        tried(begin(endpoints, {A: [f"2001:db8::{number:x}"]}))
    assert len(endpoints._health) == MAX_KNOWN


# --- the next attempt beside those under way ---------------------------------------------------------


def test_next_attempt_begins_at_once_after_a_failure() -> None:
    attempts = begin(listed(A, B), {A: ["192.0.2.1"], B: ["192.0.2.2"]})
    assert attempts.next(START) == at(A, "192.0.2.1")
    attempts.failed(at(A, "192.0.2.1"), REFUSED, START + 0.01)
    assert attempts.next(START + 0.01) == at(B, "192.0.2.2")


def test_next_attempt_begins_after_the_delay_without_a_tcp_connection() -> None:
    attempts = begin(listed(A, B), {A: ["192.0.2.1"], B: ["192.0.2.2"]})
    attempts.next(START)
    assert attempts.next(START) == START + ATTEMPT_DELAY
    assert attempts.next(START + ATTEMPT_DELAY) == at(B, "192.0.2.2")
    assert attempts.next(START + ATTEMPT_DELAY) == inf


def test_next_attempt_waits_longer_for_a_handshake() -> None:
    attempts = begin(listed(A, B), {A: ["192.0.2.1"], B: ["192.0.2.2"]})
    attempts.next(START)
    attempts.reached(at(A, "192.0.2.1"), START + 0.1)
    assert attempts.next(START + ATTEMPT_DELAY) == START + 0.1 + HANDSHAKE_DELAY
    assert attempts.next(START + 0.1 + HANDSHAKE_DELAY) == at(B, "192.0.2.2")


def test_failure_of_an_earlier_attempt_does_not_hasten_the_next() -> None:
    attempts = begin(listed(A, B, C), {A: ["192.0.2.1"], B: ["192.0.2.2"], C: ["192.0.2.3"]})
    attempts.next(START)
    later = START + ATTEMPT_DELAY
    attempts.next(later)
    attempts.reached(at(A, "192.0.2.1"), later)
    attempts.failed(at(A, "192.0.2.1"), REFUSED, later)
    assert attempts.next(later) == later + ATTEMPT_DELAY


def test_resting_endpoint_joins_a_round_that_lasts() -> None:
    endpoints = listed(A, B, random=numbers(0.9))
    endpoints.connected(at(A, "192.0.2.1"), START)
    endpoints.lost(at(A, "192.0.2.1"), START)
    attempts = begin(endpoints, {A: ["192.0.2.1"], B: ["192.0.2.2"]})
    assert attempts.next(START) == at(B, "192.0.2.2")
    assert attempts.next(START) == pytest.approx(START + 0.09)
    assert attempts.next(START + 0.1) == START + ATTEMPT_DELAY
    assert attempts.next(START + ATTEMPT_DELAY) == at(A, "192.0.2.1")


# --- names -------------------------------------------------------------------------------------------


def test_first_attempt_waits_for_the_first_name_to_be_resolved() -> None:
    attempts = listed(A, B).begin_round()
    assert attempts.next(START) == inf
    attempts.resolved(A, ["192.0.2.1"], START)
    assert attempts.next(START) == at(A, "192.0.2.1")


def test_name_that_is_resolved_waits_a_moment_for_those_before_it() -> None:
    attempts = listed(A, B).begin_round()
    attempts.resolved(B, ["192.0.2.2"], START)
    assert attempts.next(START) == START + RESOLUTION_DELAY
    attempts.resolved(A, ["192.0.2.1"], START + 0.01)
    assert attempts.next(START + 0.01) == at(A, "192.0.2.1")


def test_slow_name_does_not_hold_up_the_others_and_joins_later() -> None:
    attempts = listed(A, B).begin_round()
    attempts.resolved(B, ["192.0.2.2"], START)
    assert attempts.next(START + RESOLUTION_DELAY) == at(B, "192.0.2.2")
    attempts.resolved(A, ["192.0.2.1"], START + 0.1)
    attempts.failed(at(B, "192.0.2.2"), REFUSED, START + 0.1)
    assert attempts.next(START + 0.1) == at(A, "192.0.2.1")


def test_name_that_cannot_be_resolved_rests_like_an_endpoint() -> None:
    endpoints = listed(A, random=numbers(0.9))
    endpoints.connected(at(A, "192.0.2.1"), START)
    delays = []
    for _ in range(3):
        endpoints.begin_round().unresolved(A, CannotConnect("no such name"), START)
        delays.append(endpoints.due_at - START)
    assert delays == pytest.approx([0.09, 0.18, 0.36])
    assert endpoints.failure(START) is None


def test_name_that_was_not_resolved_when_another_answered_does_not_wait_for_that_one_to_rest() -> None:
    endpoints, a = listed(A, B), at(A, "192.0.2.1")
    attempts = endpoints.begin_round()
    attempts.resolved(A, [a.ip], START)
    endpoints.connected(a, START)
    endpoints.lost(a, START + STABLE_AFTER, retry_after_ms=60_000)
    assert endpoints.due_at == -inf
    attempts = begin(endpoints, {A: [a.ip], B: ["192.0.2.2"]}, START + STABLE_AFTER)
    assert tried(attempts, START + STABLE_AFTER) == [at(B, "192.0.2.2")]
    assert endpoints.due_at == pytest.approx(START + STABLE_AFTER + 0.05)


# --- rests -------------------------------------------------------------------------------------------


def test_each_endpoint_has_its_own_backoff() -> None:
    endpoints = listed(A, B, random=numbers(1 - 1e-9))
    endpoints.connected(at(A, "192.0.2.1"), START)
    endpoints.lost(at(A, "192.0.2.1"), START)
    found = {A: ["192.0.2.1"], B: ["192.0.2.2"]}
    assert tried(begin(endpoints, found)) == [at(B, "192.0.2.2")]
    now = endpoints.due_at
    assert now == pytest.approx(START + 0.1)
    assert tried(begin(endpoints, found, now + 1e-6), now + 1e-6) == [at(A, "192.0.2.1"), at(B, "192.0.2.2")]
    assert endpoints.due_at == pytest.approx(now + 0.2)


def test_lasting_connection_resets_the_backoff_of_its_endpoint_alone() -> None:
    endpoints = listed(A, B, random=numbers(1 - 1e-9))
    a, b = at(A, "192.0.2.1"), at(B, "192.0.2.2")
    endpoints.connected(a, START)
    for _ in range(4):
        endpoints.failed(b, REFUSED, START)
        endpoints.lost(a, START)
    endpoints.connected(a, START)
    endpoints.lost(a, START + STABLE_AFTER)
    endpoints.failed(b, REFUSED, START + STABLE_AFTER)
    assert endpoints.rests_until(a) == pytest.approx(START + STABLE_AFTER + 0.1)
    assert endpoints.rests_until(b) == pytest.approx(START + STABLE_AFTER + 1.6)


def test_second_loss_of_a_lasting_connection_does_not_reset_the_backoff() -> None:
    endpoints = listed(A, random=numbers(1 - 1e-9))
    a, later = at(A, "192.0.2.1"), START + STABLE_AFTER
    endpoints.connected(a, START)
    endpoints.lost(a, later)
    endpoints.lost(a, later)
    assert endpoints.rests_until(a) == pytest.approx(later + 0.2)


def test_server_that_goes_away_rests_as_long_as_it_asks() -> None:
    endpoints = listed(A)
    endpoints.connected(at(A, "192.0.2.1"), START)
    endpoints.lost(at(A, "192.0.2.1"), START, retry_after_ms=2_000)
    assert endpoints.rests_until(at(A, "192.0.2.1")) == pytest.approx(START + 2.05)


def test_first_connection_resets_all_backoffs() -> None:
    endpoints = listed(A, B, random=numbers(1 - 1e-9))
    a, b = at(A, "192.0.2.1"), at(B, "192.0.2.2")
    for _ in range(5):
        endpoints.failed(a, REFUSED, START)
        endpoints.failed(b, REFUSED, START)
    endpoints.connected(a, START)
    endpoints.lost(b, START + 10)
    assert endpoints.rests_until(b) == pytest.approx(START + 10.1)


# --- the error of a round ----------------------------------------------------------------------------


def failure(
    errors: dict[Address, ZcprotoError], *, was_connected: bool, starts_until: float = inf
) -> ZcprotoError | None:
    endpoints = listed(*errors)
    if was_connected:
        endpoints.connected(at(C, "192.0.2.9"), START)
    attempts = begin(endpoints, {address: ["192.0.2.1"] for address in errors})
    while isinstance(endpoint := attempts.next(START), Endpoint):
        attempts.failed(endpoint, errors[endpoint.address], START)
    return endpoints.failure(starts_until)


CLOSED = ConnectionClosed("cut")
AWAY = GoingAway("the server is going away")


@pytest.mark.parametrize(
    ("first", "second", "raised"),
    [
        (REFUSED, REFUSED, None),
        (REFUSED, AWAY, None),
        (CLOSED, REFUSED, None),
        (CLOSED, CLOSED, CLOSED),
        (REFUSED, WRONG_PIN, WRONG_PIN),
        (CLOSED, WRONG_PIN, WRONG_PIN),
    ],
)
def test_first_round_is_repeated_while_a_server_may_be_starting(
    first: ZcprotoError, second: ZcprotoError, raised: ZcprotoError | None
) -> None:
    assert failure({A: first, B: second}, was_connected=False) is raised


@pytest.mark.parametrize(("first", "second"), [(CLOSED, REFUSED), (REFUSED, CLOSED)])
def test_refusal_is_raised_last_after_the_start_timeout(first: ZcprotoError, second: ZcprotoError) -> None:
    assert failure({A: first, B: second}, was_connected=False, starts_until=START) is CLOSED


def test_refusal_of_all_is_raised_after_the_start_timeout() -> None:
    assert failure({A: REFUSED, B: REFUSED}, was_connected=False, starts_until=START) is REFUSED


@pytest.mark.parametrize(
    ("first", "second", "raised"),
    [(CLOSED, CLOSED, None), (REFUSED, WRONG_PIN, None), (WRONG_PIN, WRONG_PIN, WRONG_PIN)],
)
def test_later_rounds_are_repeated_unless_all_have_failed_permanently(
    first: ZcprotoError, second: ZcprotoError, raised: ZcprotoError | None
) -> None:
    assert failure({A: first, B: second}, was_connected=True) is raised


def test_first_round_is_repeated_for_endpoints_that_were_not_tried() -> None:
    endpoints = listed(A, B)
    attempts = begin(endpoints, {A: ["192.0.2.1"], B: ["192.0.2.2"]})
    attempts.next(START)
    endpoints.failed(at(A, "192.0.2.1"), CLOSED, START)
    assert endpoints.failure(inf) is None
