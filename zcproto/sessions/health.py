"""Whether the store of sessions is asked, and what holds while it is not.

    HEALTHY     every operation goes to the store
    DEGRADED    none does, so that nobody waits for it again and again; a probe will be made
    RECOVERING  a probe is under way: it shows that the store works, brings to it what waited, and only then
                is the store asked again

Rules:
- Every change of state is in this table; what is not in it is a bug of ours.
- A failure that cost its caller half the timeout, or the third one within ten seconds, is an outage. What
  succeeds in between does not count: a store that can be read and not written to would never be found out.
- What fails or succeeds during an outage was begun before it, and says nothing new.
- Sessions that are known go on for the grace, counted from the beginning of the outage on the monotonic clock.
  After that all are refused, until a probe has succeeded.
- Probes come after a random part of a delay that doubles. It begins anew only after a healthy minute, so that
  a store that comes and goes is asked less and less often.
- One alert when an outage begins, one when the grace is over, one when it has ended.

Pure: time and chance are arguments. It must not know: the store, sessions, how an alert is delivered.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from enum import Enum
from typing import Final

FAILURES: Final = 3
WINDOW_S: Final = 10.0
FIRST_DELAY_S: Final = 0.2
MAX_DELAY_S: Final = 5.0
STEADY_S: Final = 60.0
MIN_RETRY_MS: Final = 100

NEVER: Final = float("inf")
_MS: Final = 1000


class State(Enum):
    HEALTHY = "healthy"
    DEGRADED = "degraded"
    RECOVERING = "recovering"


class Input(Enum):
    FAILURE = "failure"  # an operation failed, and no more follows from that
    OUTAGE = "outage"  # one failed, and that was one too many
    PROBE_DUE = "probe_due"
    PROBE_OK = "probe_ok"
    PROBE_FAILED = "probe_failed"
    GRACE_OVER = "grace_over"


TRANSITIONS: Final[dict[State, dict[Input, State]]] = {
    State.HEALTHY: {
        Input.FAILURE: State.HEALTHY,
        Input.OUTAGE: State.DEGRADED,
    },
    State.DEGRADED: {
        Input.FAILURE: State.DEGRADED,
        Input.OUTAGE: State.DEGRADED,
        Input.PROBE_DUE: State.RECOVERING,
        Input.GRACE_OVER: State.DEGRADED,
    },
    State.RECOVERING: {
        Input.FAILURE: State.RECOVERING,
        Input.OUTAGE: State.RECOVERING,
        Input.PROBE_OK: State.HEALTHY,
        Input.PROBE_FAILED: State.DEGRADED,
        Input.GRACE_OVER: State.RECOVERING,
    },
}


def next_state(state: State, given: Input) -> State:
    """The state that follows. A KeyError is a bug in zcproto."""
    return TRANSITIONS[state][given]


class Alert(Enum):
    """What somebody is told of."""

    BEGAN = "began"
    GRACE_OVER = "grace_over"
    ENDED = "ended"


class StoreHealth:
    """The health of one store. Times are monotonic seconds; `random` gives numbers from 0 up to 1.

    `outages` counts how many have begun, `failures` how many operations have failed. `since` is when the last
    outage began.
    """

    __slots__ = (
        "_ceiling",
        "_grace_s",
        "_healthy_since",
        "_on_alert",
        "_probe_at",
        "_random",
        "_recent",
        "_timeout_s",
        "failures",
        "grace_over",
        "outages",
        "since",
        "state",
    )

    def __init__(
        self,
        *,
        grace_s: float,
        timeout_s: float,
        random: Callable[[], float],
        on_alert: Callable[[Alert], None],
    ) -> None:
        self._grace_s = grace_s
        self._timeout_s = timeout_s
        self._random = random
        self._on_alert = on_alert
        self._recent: deque[float] = deque(maxlen=FAILURES)
        self._ceiling = FIRST_DELAY_S
        self._probe_at = NEVER
        self._healthy_since = 0.0
        self.state = State.HEALTHY
        self.since = 0.0
        self.grace_over = False
        self.outages = 0
        self.failures = 0

    @property
    def is_asked(self) -> bool:
        """Whether operations go to the store."""
        return self.state is State.HEALTHY

    def failed(self, now: float, waited_s: float) -> None:
        """An operation could not be done; `waited_s` is what that took."""
        self.failures += 1
        self._recent.append(now)
        grave = waited_s >= self._timeout_s / 2
        if grave or (len(self._recent) == FAILURES and now - self._recent[0] <= WINDOW_S):
            self.begin_outage(now)
        else:
            self._take(Input.FAILURE)

    def begin_outage(self, now: float, *, grace: bool = True) -> None:
        """The store is not asked from here on, but for probes. Without `grace`, because nothing is known."""
        began = self.state is State.HEALTHY
        self._take(Input.OUTAGE)
        if not began:
            return
        if now - self._healthy_since >= STEADY_S:
            self._ceiling = FIRST_DELAY_S
        self.since = now
        self.grace_over = False
        self.outages += 1
        self._plan_probe(now)
        self._on_alert(Alert.BEGAN)
        if not grace or not self._grace_s:
            self._end_grace()

    def handle_time(self, now: float) -> bool:
        """Do what is due. True: the caller makes a probe now, and says what came of it."""
        if self._grace_ends_at() <= now:
            self._end_grace()
        if now < self._probe_at:
            return False
        self._probe_at = NEVER
        self._take(Input.PROBE_DUE)
        return True

    def probe_failed(self, now: float) -> None:
        self._take(Input.PROBE_FAILED)
        self._plan_probe(now)

    def probe_succeeded(self, now: float) -> None:
        """The store works, and has all that waited for it."""
        self._take(Input.PROBE_OK)
        self._healthy_since = now
        self._recent.clear()
        self.grace_over = False
        self._on_alert(Alert.ENDED)

    def next_deadline(self) -> float:
        """When `handle_time` must be called at the latest. NEVER if it need not."""
        return min(self._probe_at, self._grace_ends_at())

    def retry_after_ms(self, now: float) -> int:
        """What to tell somebody who is sent away: when the next probe may have succeeded."""
        if self.state is State.HEALTHY:
            return MIN_RETRY_MS
        wait_s = self._timeout_s if self._probe_at == NEVER else self._probe_at - now
        return max(MIN_RETRY_MS, round(wait_s * _MS) + MIN_RETRY_MS)

    # Parts

    def _take(self, given: Input) -> None:
        self.state = next_state(self.state, given)

    def _plan_probe(self, now: float) -> None:
        self._probe_at = now + self._ceiling * (1 + self._random()) / 2
        self._ceiling = min(self._ceiling * 2, MAX_DELAY_S)

    def _grace_ends_at(self) -> float:
        if self.state is State.HEALTHY or self.grace_over:
            return NEVER
        return self.since + self._grace_s

    def _end_grace(self) -> None:
        self._take(Input.GRACE_OVER)
        self.grace_over = True
        self._on_alert(Alert.GRACE_OVER)
