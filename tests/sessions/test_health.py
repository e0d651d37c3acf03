"""Test the health of a store: outages, probes, grace and alerts, with a manual clock."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from zcproto.sessions.health import (
    FAILURES,
    FIRST_DELAY_S,
    HASTENED_S,
    MAX_DELAY_S,
    MIN_RETRY_MS,
    NEVER,
    STEADY_S,
    TRANSITIONS,
    WINDOW_S,
    HealthAlert,
    HealthInput,
    HealthState,
    StoreHealth,
    next_state,
)

NOW = 1_000.0
GRACE = 300.0
TIMEOUT = 0.25
QUICK = 0.001


class Watch:
    """The health of a store with its alerts and a manual clock."""

    def __init__(self, *, grace: float = GRACE, random: Callable[[], float] = lambda: 0.5) -> None:
        self.alerts: list[HealthAlert] = []
        self.health = StoreHealth(
            grace_s=grace, timeout_s=TIMEOUT, random=random, on_alert=self.alerts.append
        )
        self.now = NOW

    def outage(self) -> None:
        self.health.failed(self.now, TIMEOUT)
        assert self.health.state is HealthState.DEGRADED

    def probe(self) -> None:
        """Advance the clock until a probe is due."""
        while not self.health.handle_time(self.now):
            assert self.health.next_deadline() > self.now
            self.now = self.health.next_deadline()
        assert self.health.state is HealthState.RECOVERING

    def fail_probes(self, count: int = 1) -> None:
        for _ in range(count):
            self.probe()
            self.health.probe_failed(self.now)

    def recover(self) -> None:
        self.probe()
        self.health.probe_succeeded(self.now)


@pytest.fixture
def watch() -> Watch:
    return Watch()


# --- the table --------------------------------------------------------------------------------------------

AFTER = {
    (HealthState.HEALTHY, HealthInput.FAILURE): HealthState.HEALTHY,
    (HealthState.HEALTHY, HealthInput.OUTAGE): HealthState.DEGRADED,
    (HealthState.DEGRADED, HealthInput.FAILURE): HealthState.DEGRADED,
    (HealthState.DEGRADED, HealthInput.OUTAGE): HealthState.DEGRADED,
    (HealthState.DEGRADED, HealthInput.PROBE_DUE): HealthState.RECOVERING,
    (HealthState.DEGRADED, HealthInput.GRACE_OVER): HealthState.DEGRADED,
    (HealthState.RECOVERING, HealthInput.FAILURE): HealthState.RECOVERING,
    (HealthState.RECOVERING, HealthInput.OUTAGE): HealthState.RECOVERING,
    (HealthState.RECOVERING, HealthInput.PROBE_OK): HealthState.HEALTHY,
    (HealthState.RECOVERING, HealthInput.PROBE_FAILED): HealthState.DEGRADED,
    (HealthState.RECOVERING, HealthInput.GRACE_OVER): HealthState.RECOVERING,
}


@pytest.mark.parametrize(("state", "given"), [*itertools.product(HealthState, HealthInput)])
def test_every_state_and_input(state: HealthState, given: HealthInput) -> None:
    if (state, given) in AFTER:
        assert next_state(state, given) is AFTER[state, given]
    else:
        with pytest.raises(KeyError):
            next_state(state, given)


def test_table_covers_and_reaches_every_state() -> None:
    assert set(TRANSITIONS) == set(HealthState)
    assert {state for row in TRANSITIONS.values() for state in row.values()} == set(HealthState)


def test_store_is_used_only_while_healthy(watch: Watch) -> None:
    assert watch.health.is_healthy
    watch.outage()
    assert not watch.health.is_healthy
    watch.probe()
    assert not watch.health.is_healthy
    watch.health.probe_succeeded(watch.now)
    assert watch.health.is_healthy


# --- what is an outage -------------------------------------------------------------------------------------


def test_slow_failure_is_an_outage(watch: Watch) -> None:
    watch.health.failed(NOW, TIMEOUT / 2)
    assert watch.health.state is HealthState.DEGRADED
    assert watch.alerts == [HealthAlert.BEGAN]


def test_third_quick_failure_is_an_outage(watch: Watch) -> None:
    for number in range(FAILURES - 1):
        watch.health.failed(NOW + number, QUICK)
        assert watch.health.is_healthy
    watch.health.failed(NOW + FAILURES, QUICK)
    assert not watch.health.is_healthy
    assert watch.health.failures == FAILURES


def test_quick_failures_far_apart_are_no_outage(watch: Watch) -> None:
    for number in range(20):
        watch.health.failed(NOW + number * WINDOW_S, QUICK)
        assert watch.health.is_healthy
    assert watch.alerts == []
    watch.health.failed(NOW + 19 * WINDOW_S, QUICK)
    assert not watch.health.is_healthy


def test_failures_before_outage_do_not_count_after_recovery(watch: Watch) -> None:
    watch.health.failed(NOW, QUICK)
    watch.health.failed(NOW, QUICK)
    watch.outage()
    watch.recover()
    watch.health.failed(watch.now, QUICK)
    watch.health.failed(watch.now, QUICK)
    assert watch.health.is_healthy


@pytest.mark.parametrize("probing", [False, True])
def test_failures_during_outage_are_ignored(watch: Watch, probing: bool) -> None:
    watch.outage()
    if probing:
        watch.probe()
    state, deadline = watch.health.state, watch.health.next_deadline()
    for _ in range(50):
        watch.health.failed(watch.now, TIMEOUT)
        watch.health.failed(watch.now, QUICK)
        watch.health.begin_outage(watch.now)
    assert (watch.health.state, watch.health.next_deadline()) == (state, deadline)
    assert watch.alerts == [HealthAlert.BEGAN]
    assert watch.health.outages == 1


# --- probes -------------------------------------------------------------------------------------------------


def test_healthy_store_is_not_probed(watch: Watch) -> None:
    assert watch.health.next_deadline() == NEVER
    assert not watch.health.handle_time(NOW + 1e6)
    assert watch.health.state is HealthState.HEALTHY


@pytest.mark.parametrize(("random", "part"), [(0.0, 0.5), (0.5, 0.75), (0.999, 0.9995)])
def test_probes_use_backoff_with_jitter(random: float, part: float) -> None:
    watch = Watch(grace=1e9, random=lambda: random)
    watch.outage()
    delays = []
    for _ in range(8):
        delays.append(watch.health.next_deadline() - watch.now)
        watch.probe()
        assert watch.health.next_deadline() == NOW + 1e9  # one probe at a time
        assert not watch.health.handle_time(watch.now)
        watch.health.probe_failed(watch.now)
    ceilings = [min(FIRST_DELAY_S * 2**number, MAX_DELAY_S) for number in range(8)]
    assert delays == pytest.approx([ceiling * part for ceiling in ceilings])


def test_outage_soon_after_the_machine_booted_is_probed(watch: Watch) -> None:
    watch.now = STEADY_S - 1
    watch.outage()
    assert watch.health.next_deadline() - watch.now == pytest.approx(FIRST_DELAY_S * 0.75)


def test_probe_waits_for_its_time(watch: Watch) -> None:
    watch.outage()
    due = watch.health.next_deadline()
    assert not watch.health.handle_time(due - 0.001)
    assert watch.health.handle_time(due)


@pytest.mark.parametrize(("healthy_s", "first"), [(STEADY_S - 1, False), (STEADY_S, True)])
def test_flapping_store_is_probed_less_often(watch: Watch, healthy_s: float, first: bool) -> None:
    for _ in range(4):
        watch.outage()
        watch.recover()
    watch.now += healthy_s
    watch.outage()
    delay = watch.health.next_deadline() - watch.now
    assert delay == pytest.approx(FIRST_DELAY_S * 0.75 * (1 if first else 2**4))


def test_new_connection_hastens_the_next_probe(watch: Watch) -> None:
    watch.health.hasten_probe(watch.now)
    assert watch.health.next_deadline() == NEVER
    watch.outage()
    watch.fail_probes(4)
    assert watch.health.next_deadline() - watch.now > 1.0
    watch.health.hasten_probe(watch.now)
    due = watch.health.next_deadline()
    assert due - watch.now == pytest.approx(HASTENED_S * 0.5)
    watch.health.hasten_probe(due - 0.001)
    assert watch.health.next_deadline() == due


def test_new_connection_during_a_probe_hastens_the_one_after_it(watch: Watch) -> None:
    watch.outage()
    watch.fail_probes(4)
    watch.probe()
    watch.health.hasten_probe(watch.now)
    assert watch.health.next_deadline() == NOW + GRACE  # one probe at a time
    watch.health.probe_failed(watch.now)
    assert watch.health.next_deadline() - watch.now == pytest.approx(FIRST_DELAY_S * 0.75)


# --- the grace ----------------------------------------------------------------------------------------------


def test_grace_starts_with_the_outage(watch: Watch) -> None:
    watch.outage()
    while watch.now < NOW + GRACE - MAX_DELAY_S:
        watch.fail_probes()
    assert not watch.health.grace_over
    watch.now = NOW + GRACE - 0.001
    watch.health.handle_time(watch.now)
    assert not watch.health.grace_over
    watch.health.handle_time(NOW + GRACE)
    assert watch.health.grace_over
    assert watch.alerts == [HealthAlert.BEGAN, HealthAlert.GRACE_OVER]


def test_grace_ends_during_probe(watch: Watch) -> None:
    watch.outage()
    watch.probe()
    assert not watch.health.handle_time(NOW + GRACE)
    assert (watch.health.state, watch.health.grace_over) == (HealthState.RECOVERING, True)
    assert watch.health.next_deadline() == NEVER
    watch.health.probe_succeeded(NOW + GRACE)
    assert not watch.health.grace_over


def test_end_of_grace_is_alerted_once_and_probes_continue(watch: Watch) -> None:
    watch.outage()
    watch.now = NOW + GRACE
    watch.fail_probes(5)
    watch.recover()
    assert watch.alerts == [HealthAlert.BEGAN, HealthAlert.GRACE_OVER, HealthAlert.ENDED]


def test_each_outage_starts_a_new_grace(watch: Watch) -> None:
    watch.outage()
    watch.recover()
    watch.now = NOW + GRACE - 10
    watch.outage()
    watch.fail_probes()
    watch.now = NOW + GRACE + 100
    watch.health.handle_time(watch.now)
    assert not watch.health.grace_over
    assert watch.health.since == NOW + GRACE - 10


def test_zero_grace_refuses_all_at_once() -> None:
    watch = Watch(grace=0.0)
    watch.outage()
    assert watch.health.grace_over
    assert watch.alerts == [HealthAlert.BEGAN, HealthAlert.GRACE_OVER]


def test_no_grace_without_known_sessions(watch: Watch) -> None:
    watch.health.begin_outage(NOW, grace=False)
    assert watch.health.grace_over
    watch.recover()
    assert watch.alerts == [HealthAlert.BEGAN, HealthAlert.GRACE_OVER, HealthAlert.ENDED]


def test_grace_begins_with_the_stall_before_the_outage(watch: Watch) -> None:
    watch.health.count_stall(watch.now, GRACE)  # without an outage
    assert watch.alerts == []
    watch.outage()
    watch.health.count_stall(watch.now, GRACE - 10.0)
    assert watch.alerts == [HealthAlert.BEGAN]
    assert watch.health.since == watch.now - GRACE + 10.0
    watch.health.handle_time(watch.now + 9.9)
    assert not watch.health.grace_over
    watch.health.count_stall(watch.now + 9.9, 0.5, 0.2)  # the machine slept
    for _ in range(2):
        assert watch.alerts == [HealthAlert.BEGAN, HealthAlert.GRACE_OVER]
        watch.health.count_stall(watch.now, GRACE)


# --- retry delay and alerts ------------------------------------------------------------------


def test_retry_after_is_the_next_probe(watch: Watch) -> None:
    assert watch.health.retry_after_ms(NOW) == MIN_RETRY_MS
    watch.outage()
    first = watch.health.retry_after_ms(NOW)
    assert first == round(FIRST_DELAY_S * 0.75 * 1000) + MIN_RETRY_MS
    assert watch.health.retry_after_ms(NOW + 1e6) == MIN_RETRY_MS  # overdue
    watch.probe()
    assert watch.health.retry_after_ms(watch.now) == round(TIMEOUT * 1000) + MIN_RETRY_MS


def test_outage_has_one_alert_at_begin_and_end(watch: Watch) -> None:
    for _ in range(3):
        watch.outage()
        watch.fail_probes(4)
        watch.recover()
    assert watch.alerts == [HealthAlert.BEGAN, HealthAlert.ENDED] * 3
    assert watch.health.outages == 3
