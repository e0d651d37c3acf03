"""Delays: growing, bounded, and no weapon."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zcproto.auth import Throttle
from zcproto.auth.throttle import ADDRESS_DELAY_S, QUIET_S, USER_DELAY_S

HOME, ELSEWHERE, OTHER = "192.0.2.1", "198.51.100.7", "203.0.113.9"
NOW = 1000.0


def fail(throttle: Throttle, times: int, user: str = "alice", address: str = HOME, now: float = NOW) -> None:
    for _ in range(times):
        throttle.failed(user, address, now)


def attack(
    throttle: Throttle, seconds: float, *, users: list[str], addresses: list[str], now: float = NOW
) -> int:
    """Try everything as soon as it is allowed, for so many seconds; how often it was."""
    tries, end = 0, now + seconds
    while now < end:
        waits = []
        for user in users:
            for address in addresses:
                wait = throttle.check(user, address, now)
                if not wait:
                    tries += 1
                    throttle.failed(user, address, now)
                    wait = max(1, throttle.check(user, address, now))
                waits.append(wait)
        now += max(min(waits) / 1000, 0.001)
    return tries


@pytest.fixture
def throttle() -> Throttle:
    return Throttle()


@pytest.mark.parametrize("free", [1, 2, 5, 10])
def test_first_failures_are_free_then_delays_double(free: int) -> None:
    throttle = Throttle(free)
    for _ in range(free):
        assert throttle.check("alice", HOME, NOW) == 0
        throttle.failed("alice", HOME, NOW)
    for doubling in range(12):
        assert throttle.check("alice", HOME, NOW) == min(1000 * 2**doubling, 900_000)
        throttle.failed("alice", HOME, NOW)


@pytest.mark.parametrize(("after", "wait"), [(0, 1000), (0.25, 750), (0.9991, 1), (1.0, 0), (5.0, 0)])
def test_delay_expires(throttle: Throttle, after: float, wait: int) -> None:
    fail(throttle, 5)
    assert throttle.check("alice", HOME, NOW + after) == wait


def test_throttled_attempt_is_not_counted(throttle: Throttle) -> None:
    fail(throttle, 6)
    for _ in range(100):
        assert throttle.check("alice", HOME, NOW) == 2000


@pytest.mark.parametrize("failures", [25, 1000, 1029, 5000])
def test_delays_are_bounded(throttle: Throttle, failures: int) -> None:
    fail(throttle, failures)
    assert throttle.check("alice", HOME, NOW) == 1000 * ADDRESS_DELAY_S
    assert throttle.check("alice", ELSEWHERE, NOW) == 1000 * USER_DELAY_S


def test_success_resets_the_failures_of_its_pair(throttle: Throttle) -> None:
    fail(throttle, 8)
    throttle.succeeded("alice", HOME, NOW)
    assert throttle.check("alice", HOME, NOW) == 0
    fail(throttle, 4)
    assert throttle.check("alice", HOME, NOW) == 0
    fail(throttle, 1)
    assert throttle.check("alice", HOME, NOW) == 1000


@pytest.mark.parametrize("after", [QUIET_S, QUIET_S + 1, 10 * QUIET_S])
def test_failures_expire(throttle: Throttle, after: float) -> None:
    fail(throttle, 30)
    assert throttle.check("alice", HOME, NOW + after) == 0
    fail(throttle, 1, now=NOW + after)
    assert throttle.check("alice", HOME, NOW + after) == 0
    assert len(throttle) == 3


def test_expired_failures_are_removed_without_those_of_others(throttle: Throttle) -> None:
    fail(throttle, 10, "alice", HOME, NOW)
    fail(throttle, 10, "bob", ELSEWHERE, NOW + 1790)
    fail(throttle, 1, "carol", OTHER, NOW + 1800)
    assert throttle.check("bob", ELSEWHERE, NOW + 1800) == 22_000
    assert throttle.check("alice", HOME, NOW + 1799.9) == 0
    assert len(throttle) == 6


@pytest.mark.parametrize(("after", "delay"), [(1799.0, 2000), (1800.0, 0)])
def test_failures_are_counted_for_half_an_hour(throttle: Throttle, after: float, delay: int) -> None:
    fail(throttle, 5)
    fail(throttle, 1, now=NOW + after)
    assert throttle.check("alice", HOME, NOW + after) == delay


def test_failures_expire_after_the_longest_delay() -> None:
    assert (QUIET_S, ADDRESS_DELAY_S, USER_DELAY_S) == (1800, 900, 60)


# Guessing


USERS = [f"user {number}" for number in range(500)]
ADDRESSES = [f"198.51.100.{number}" for number in range(100)]


@pytest.mark.parametrize(
    ("users", "addresses", "seconds", "tries"),
    [
        pytest.param(["alice"], [ELSEWHERE], 86_400, range(150), id="one user in a day"),
        pytest.param(["alice"], [ELSEWHERE], 3600, range(20), id="one user in an hour"),
        pytest.param(["alice"], ADDRESSES, 3600, range(5 + 7 + 60), id="from many addresses, one a minute"),
        pytest.param(USERS, [ELSEWHERE], 3600, range(20, 50), id="many users from one address"),
    ],
)
def test_guesses_are_limited(
    throttle: Throttle, users: list[str], addresses: list[str], seconds: int, tries: range
) -> None:
    assert attack(throttle, seconds, users=users, addresses=addresses) in tries


def test_unknown_and_known_users_are_throttled_alike(throttle: Throttle) -> None:
    throttle.succeeded("alice", HOME, NOW)
    waits = []
    for user in ("alice", "unknown"):
        for _ in range(8):
            throttle.failed(user, f"198.51.100.{len(user)}", NOW)
            waits.append(throttle.check(user, f"198.51.100.{len(user)}", NOW))
    assert waits[:8] == waits[8:]


# No weapon


def test_user_at_a_known_address_is_not_locked_out_by_others(throttle: Throttle) -> None:
    throttle.succeeded("alice", HOME, NOW)
    fail(throttle, 1000, address=ELSEWHERE)
    assert throttle.check("alice", HOME, NOW) == 0


def test_user_at_a_known_address_is_not_locked_out_by_neighbours(throttle: Throttle) -> None:
    throttle.succeeded("alice", HOME, NOW)
    for number in range(200):
        throttle.failed(f"user {number}", HOME, NOW)
    assert throttle.check("alice", HOME, NOW) == 0
    assert throttle.check("bob", HOME, NOW) > 0


def test_user_at_a_new_address_can_log_in_during_most_of_an_attack(throttle: Throttle) -> None:
    free = 0
    now = NOW
    for _ in range(4 * 3600):
        if not throttle.check("alice", ELSEWHERE, now):
            throttle.failed("alice", ELSEWHERE, now)
        free += not throttle.check("alice", OTHER, now)
        now += 1.0
    assert free > 0.85 * 4 * 3600


def test_failure_at_a_known_address_counts_only_there(throttle: Throttle) -> None:
    throttle.succeeded("alice", HOME, NOW)
    fail(throttle, 30)
    assert throttle.check("alice", HOME, NOW) == 1000 * USER_DELAY_S
    assert throttle.check("alice", ELSEWHERE, NOW) == 0
    assert throttle.check("bob", HOME, NOW) == 0


def test_program_with_an_old_key_does_not_lock_out_its_address(throttle: Throttle) -> None:
    now = NOW
    for _ in range(50):
        now += throttle.check("old", HOME, now) / 1000
        throttle.failed("old", HOME, now)
    assert throttle.check("bob", HOME, now) == 0


def test_other_users_and_addresses_are_not_delayed(throttle: Throttle) -> None:
    fail(throttle, 10)
    assert throttle.check("bob", ELSEWHERE, NOW) == 0
    assert throttle.check("bob", HOME, NOW) == 0


def test_logins_without_a_name_are_counted_by_address_only(throttle: Throttle) -> None:
    fail(throttle, 10, user="", address=ELSEWHERE)
    assert throttle.check("", ELSEWHERE, NOW) > 0
    assert throttle.check("", HOME, NOW) == 0


# Addresses


def test_addresses_of_one_ipv6_network_are_counted_together(throttle: Throttle) -> None:
    for number in range(20):
        throttle.failed("alice", f"2001:db8::{number:x}", NOW)
    assert throttle.check("bob" * 2, "2001:db8::ffff", NOW) == 0
    assert throttle.check("alice", "2001:db8::ffff", NOW) == 1000 * ADDRESS_DELAY_S


# Memory


def test_every_table_is_bounded() -> None:
    throttle = Throttle(max_entries=100)
    for number in range(2000):
        throttle.failed(f"user {number}", f"10.0.{number // 250}.{number % 250}", NOW)
        throttle.succeeded(f"user {number}", f"10.1.{number // 250}.{number % 250}", NOW)
    assert len(throttle) == 400


def test_least_recently_failed_row_is_evicted_first() -> None:
    throttle = Throttle(max_entries=3)
    fail(throttle, 10, "alice", "10.0.0.1")
    fail(throttle, 10, "bob", "10.0.0.2")
    fail(throttle, 10, "carol", "10.0.0.3")
    fail(throttle, 1, "alice", "10.0.0.1")
    fail(throttle, 1, "dave", "10.0.0.4")
    assert throttle.check("alice", "10.0.0.1", NOW) > 0
    assert throttle.check("bob", "10.0.0.2", NOW) == 0
    assert throttle.check("carol", "10.0.0.3", NOW) > 0


def test_least_recently_known_pair_is_evicted_first() -> None:
    throttle = Throttle(max_entries=2)
    for user in ("alice", "bob", "alice", "carol"):
        throttle.succeeded(user, HOME, NOW)
    for user in ("alice", "bob", "carol"):
        fail(throttle, 10, user, ELSEWHERE)
    assert throttle.check("alice", HOME, NOW) == 0
    assert throttle.check("bob", HOME, NOW) > 0
    assert throttle.check("carol", HOME, NOW) == 0


def test_expired_rows_are_removed_on_insert(throttle: Throttle) -> None:
    for number in range(100):
        throttle.failed(f"user {number}", f"10.0.0.{number}", NOW)
    assert len(throttle) == 300
    throttle.failed("late", OTHER, NOW + QUIET_S)
    assert len(throttle) == 3


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["fail", "succeed"]),
            st.sampled_from(["alice", "bob", ""]),
            st.sampled_from([HOME, ELSEWHERE, "2001:db8::1"]),
            st.floats(0, 100),
        ),
        max_size=60,
    )
)
def test_every_delay_ends(steps: list[tuple[str, str, str, float]]) -> None:
    throttle = Throttle(3, max_entries=4)
    now = NOW
    for what, user, address, seconds in steps:
        now += seconds
        if what == "fail":
            throttle.failed(user, address, now)
        else:
            throttle.succeeded(user, address, now)
            assert throttle.check(user, address, now) == 0
        wait = throttle.check(user, address, now)
        assert 0 <= wait <= 1000 * ADDRESS_DELAY_S
        assert throttle.check(user, address, now + wait / 1000 + 0.001) == 0


def test_reconfigured_number_of_free_failures_applies() -> None:
    throttle = Throttle(5)
    for _ in range(3):
        throttle.failed("ada", "192.0.2.1", 0.0)
    assert throttle.check("ada", "192.0.2.1", 0.0) == 0
    throttle.reconfigure(2)
    assert throttle.check("ada", "192.0.2.1", 0.0) == 2000  # what was counted stays counted
    throttle.reconfigure(4)
    assert throttle.check("ada", "192.0.2.1", 0.0) == 0
    for user in range(16):
        throttle.failed(f"user-{user}", "198.51.100.1", 0.0)
    assert throttle.check("alice", "198.51.100.1", 0.0) > 0
