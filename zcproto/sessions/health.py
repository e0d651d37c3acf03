"""Track the health of the session store (sans-IO): a circuit breaker with a grace for known sessions.

    HEALTHY     every operation goes to the store
    DEGRADED    no operation does, so callers do not wait for timeouts; a probe is planned
    RECOVERING  a probe is running: it checks the store and replays pending operations before others go there

Rules:
- Every transition is in the table; any other is a bug in zcproto.
- A failure that took half the timeout, or the third one within ten seconds, is an outage. Successes in between
  do not reset the count: otherwise a store that can be read but not written would never be detected.
- Results that arrive during an outage belong to operations begun before it and are ignored.
- Known sessions stay valid for the grace, counted from the beginning of the outage on the monotonic clock, or from
  that of a stall of this process before it. Then all are refused until a probe succeeds (GRACE_ENDS in
  spec/store.pml).
- Probes use exponential backoff with jitter. It is reset only after a healthy minute, so a flapping store is probed
  less and less often. A new connection shortens the wait to that of a first probe: the sooner an outage ends, the
  sooner revocations made meanwhile reach all servers.
- One alert each when an outage begins, when the grace is over, and when the outage ends.

Time and randomness are arguments. It must not know: the store, sessions, the delivery of alerts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from enum import Enum
from typing import Final

from zcproto.common.backoff import HALF, backoff_s

FAILURES: Final = 3
WINDOW_S: Final = 10.0
FIRST_DELAY_S: Final = 0.2
MAX_DELAY_S: Final = 5.0
HASTENED_S: Final = 0.1
"""Within which all processes probe a store that can be reached again."""

STEADY_S: Final = 60.0
MIN_RETRY_MS: Final = 100

NEVER: Final = float("inf")
_MS: Final = 1000


class HealthState(Enum):
    HEALTHY = "healthy"
    DEGRADED = "degraded"
    RECOVERING = "recovering"


class HealthInput(Enum):
    FAILURE = "failure"  # an operation failed, without consequence
    OUTAGE = "outage"  # a failure that makes an outage
    PROBE_DUE = "probe_due"
    PROBE_OK = "probe_ok"
    PROBE_FAILED = "probe_failed"
    GRACE_OVER = "grace_over"


TRANSITIONS: Final[dict[HealthState, dict[HealthInput, HealthState]]] = {
    HealthState.HEALTHY: {
        HealthInput.FAILURE: HealthState.HEALTHY,
        HealthInput.OUTAGE: HealthState.DEGRADED,
    },
    HealthState.DEGRADED: {
        HealthInput.FAILURE: HealthState.DEGRADED,
        HealthInput.OUTAGE: HealthState.DEGRADED,
        HealthInput.PROBE_DUE: HealthState.RECOVERING,
        HealthInput.GRACE_OVER: HealthState.DEGRADED,
    },
    HealthState.RECOVERING: {
        HealthInput.FAILURE: HealthState.RECOVERING,
        HealthInput.OUTAGE: HealthState.RECOVERING,
        HealthInput.PROBE_OK: HealthState.HEALTHY,
        HealthInput.PROBE_FAILED: HealthState.DEGRADED,
        HealthInput.GRACE_OVER: HealthState.RECOVERING,
    },
}


def next_state(state: HealthState, given: HealthInput) -> HealthState:
    """Return the next state. A KeyError is a bug in zcproto."""
    return TRANSITIONS[state][given]


class HealthAlert(Enum):
    """Alerts about an outage."""

    BEGAN = "began"
    GRACE_OVER = "grace_over"
    ENDED = "ended"


class StoreHealth:
    """The health of one store. Times are monotonic seconds; `random` returns numbers in [0, 1).

    `outages` and `failures` are counters of outages begun and operations failed. `since` is the beginning of the
    last outage, and `is_slow` whether a late answer began it.
    """

    def __init__(
        self,
        *,
        grace_s: float,
        timeout_s: float,
        random: Callable[[], float],
        on_alert: Callable[[HealthAlert], None],
    ) -> None:
        self._grace_s = grace_s
        self._timeout_s = timeout_s
        self._random = random
        self._on_alert = on_alert
        self._recent: deque[float] = deque(maxlen=FAILURES)
        self._probes = 0
        """Probes planned since the backoff was reset."""
        self._probe_at = NEVER
        self._healthy_since = 0.0
        self.state = HealthState.HEALTHY
        self.since = 0.0
        self.is_slow = False
        self.grace_over = False
        self.outages = 0
        self.failures = 0

    @property
    def is_healthy(self) -> bool:
        """Return True if operations go to the store."""
        return self.state is HealthState.HEALTHY

    def failed(self, now: float, waited_s: float) -> None:
        """Record a failed operation that took `waited_s`."""
        self.failures += 1
        self._recent.append(now)
        grave = waited_s >= self._timeout_s / 2
        if grave or (len(self._recent) == FAILURES and now - self._recent[0] <= WINDOW_S):
            self.begin_outage(now, is_slow=grave)
        else:
            self._take(HealthInput.FAILURE)

    def begin_outage(self, now: float, *, grace: bool = True, is_slow: bool = False) -> None:
        """Stop using the store, except for probes. Pass `grace=False` if no sessions are known."""
        began = self.state is HealthState.HEALTHY
        self._take(HealthInput.OUTAGE)
        if not began:
            return
        if now - self._healthy_since >= STEADY_S:
            self._probes = 0
        self.since = now
        self.grace_over = False
        self.is_slow = is_slow
        self.outages += 1
        self._plan_probe(now)
        self._on_alert(HealthAlert.BEGAN)
        if not grace or not self._grace_s:
            self._end_grace()

    def count_stall(self, now: float, stalled_s: float, hidden_s: float = 0.0) -> None:
        """Count a stall of this process that ended now to the grace of the outage: it has missed changes since.

        `hidden_s` is the part of it in which the monotonic clock stood still, while the machine slept.
        """
        if self.state is not HealthState.HEALTHY:
            self.since = min(self.since - hidden_s, now - stalled_s)
            if self._grace_ends_at() <= now:
                self._end_grace()

    def handle_time(self, now: float) -> bool:
        """Handle due timers. Return True if the caller must probe the store now and report the result."""
        if self._grace_ends_at() <= now:
            self._end_grace()
        if now < self._probe_at:
            return False
        self._probe_at = NEVER
        self._take(HealthInput.PROBE_DUE)
        return True

    def probe_failed(self, now: float) -> None:
        self._take(HealthInput.PROBE_FAILED)
        self._plan_probe(now)

    def probe_succeeded(self, now: float) -> None:
        """Record that the store works and has received all pending operations."""
        self._take(HealthInput.PROBE_OK)
        self._healthy_since = now
        self._recent.clear()
        self.grace_over = False
        self._on_alert(HealthAlert.ENDED)

    def hasten_probe(self, now: float) -> None:
        """Plan the next probes soon, because the store can be reached again."""
        self._probes = 0
        if self.state is HealthState.DEGRADED:
            self._probe_at = min(self._probe_at, now + HASTENED_S * self._random())

    def next_deadline(self) -> float:
        """Return the latest time for the next call of `handle_time`, or NEVER."""
        return min(self._probe_at, self._grace_ends_at())

    def retry_after_ms(self, now: float) -> int:
        """Return the retry delay for refused callers: the time until the next probe may have succeeded."""
        if self.state is HealthState.HEALTHY:
            return MIN_RETRY_MS
        wait_s = self._timeout_s if self._probe_at == NEVER else self._probe_at - now
        return max(MIN_RETRY_MS, round(wait_s * _MS) + MIN_RETRY_MS)

    def _take(self, given: HealthInput) -> None:
        self.state = next_state(self.state, given)

    def _plan_probe(self, now: float) -> None:
        self._probes += 1
        self._probe_at = now + backoff_s(self._probes, FIRST_DELAY_S, MAX_DELAY_S, HALF, self._random())

    def _grace_ends_at(self) -> float:
        if self.state is HealthState.HEALTHY or self.grace_over:
            return NEVER
        return self.since + self._grace_s

    def _end_grace(self) -> None:
        self._take(HealthInput.GRACE_OVER)
        self.grace_over = True
        self._on_alert(HealthAlert.GRACE_OVER)
