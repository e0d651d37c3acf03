"""Rates and latencies of the last minute: the difference of two readings of counters, taken once a second.

Must not know: requests. Nothing is counted here, and no request pays for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from zcproto.app.app import Method
from zcproto.common.clock import Clock
from zcproto.common.deadlines import sleep_together
from zcproto.observe.histogram import QUICK_S, WAITED_S, quantile
from zcproto.observe.log import get_logger
from zcproto.observe.loop_lag import LoopLag
from zcproto.server.state import Counters
from zcproto.tls.server import TlsAcceptor

SAMPLE_S: Final = 1.0
WINDOW_S: Final = 60.0
"""The window of percentiles."""

RATE_S: Final = 10.0
"""The window of rates: long enough to be steady, short enough to show a change."""

log = get_logger("zcproto.server")


class _Sample(NamedTuple):
    """Counters at one moment, in monotonic seconds."""

    at: float
    requests: int
    errors: int
    handshakes: int
    handshake_failures: int
    work: list[int]
    waits: list[int]
    lag: float
    """The longest lag of the loop since the sample before."""


class Traffic:
    """The samples of the last minute of one server."""

    def __init__(
        self,
        clock: Clock,
        counters: Counters,
        acceptor: TlsAcceptor,
        methods: Mapping[str, Method],
        loop_lag: LoopLag,
    ) -> None:
        self._clock = clock
        self._counters = counters
        self._acceptor = acceptor
        self._methods = methods
        self._loop_lag = loop_lag
        self._samples: deque[_Sample] = deque([self._read()])

    async def run(self) -> None:
        """Sample the counters once a second until cancelled."""
        while True:
            await sleep_together(SAMPLE_S)
            try:
                self.sample()
            except Exception as error:  # an internal error must not end the sampling
                log.error("server.fault", what="traffic", exc_info=error)

    def sample(self) -> None:
        """Add a sample and drop those older than the window."""
        samples = self._samples
        samples.append(self._read())
        self._loop_lag.recent = 0.0
        while samples[0].at < samples[-1].at - WINDOW_S:
            samples.popleft()

    def longest_lag(self) -> float:
        """Return the longest lag of the loop in about the last minute, in seconds."""
        return max(self._loop_lag.recent, *(each.lag for each in self._samples))

    def window(self) -> dict[str, Any]:
        """Return events per second over about 10 s, and counts of durations over about a minute, as JSON fields.

        `work` is the time of the loop up to the answer or the first await, sampled. `waits` is the time from the
        first await to the end, of all requests that awaited. See `rates_of`.
        """
        now, oldest = self._read(), self._samples[0]
        recent = next(
            each for each in self._samples if each.at >= now.at - RATE_S or each is self._samples[-1]
        )
        seconds = now.at - recent.at
        return {
            "rate_window_s": round(seconds, 3),
            "requests_per_s": _rate(now.requests - recent.requests, seconds),
            "errors_per_s": _rate(now.errors - recent.errors, seconds),
            "handshakes_per_s": _rate(now.handshakes - recent.handshakes, seconds),
            "handshake_failures_per_s": _rate(now.handshake_failures - recent.handshake_failures, seconds),
            "latency_window_s": round(now.at - oldest.at, 3),
            "work": _difference(oldest.work, now.work),
            "waits": _difference(oldest.waits, now.waits),
        }

    def _read(self) -> _Sample:
        counters = self._counters
        methods = self._methods.values()
        return _Sample(
            self._clock.now(),
            counters.requests,
            sum(counters.errors.values()) + sum(counters.refused.values()),
            self._acceptor.handshakes_completed,
            sum(self._acceptor.failures.values()),
            [sum(column) for column in zip(*(method.durations.counts for method in methods), strict=True)],
            [sum(column) for column in zip(*(method.waits.counts for method in methods), strict=True)],
            self._loop_lag.recent,
        )


def _rate(events: int, seconds: float) -> float:
    return round(max(0, events) / seconds, 3) if seconds > 0 else 0.0


def _difference(before: list[int], now: list[int]) -> list[int]:
    return [max(0, later - earlier) for earlier, later in zip(before or [0] * len(now), now, strict=True)]


def rates_of(window: Mapping[str, Any]) -> dict[str, Any]:
    """Return a window with percentiles in place of its counts."""
    return {
        **window,
        "work": _percentiles(QUICK_S, window["work"]),
        "waits": _percentiles(WAITED_S, window["waits"]),
    }


def _percentiles(bounds: Sequence[float], counts: Sequence[int]) -> dict[str, Any]:
    """Return durations in seconds; None without any request."""

    def part(of_all: float) -> float | None:
        value = quantile(bounds, counts, of_all)
        return None if value is None else round(value, 6)

    return {"count": sum(counts), "p50": part(0.5), "p90": part(0.9), "p99": part(0.99), "p999": part(0.999)}
