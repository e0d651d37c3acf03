"""What a server did in the last minute: rates, and how long requests took, from counters read once a second.

Nothing is counted here, and nothing is added to a request: the last minute is the difference of two readings.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from zcproto.app.app import Method
from zcproto.common.clock import Clock
from zcproto.observe.histogram import QUICK_S, WAITED_S, quantile
from zcproto.observe.log import get_logger
from zcproto.server.state import Counters
from zcproto.tls.server import TlsAcceptor

SAMPLE_S: Final = 1.0
WINDOW_S: Final = 60.0
"""Of which percentiles are told."""

RATE_S: Final = 10.0
"""Of which rates are told: long enough to be steady, short enough to see a change."""

QUANTILES: Final = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999}

log = get_logger("zcproto.server")


class _Sample(NamedTuple):
    """Counters at one moment (monotonic seconds)."""

    at: float
    requests: int
    errors: int
    handshakes: int
    handshake_failures: int
    work: list[int]
    waits: list[int]


class Traffic:
    """The last minute of a server. `now` of the clock is what it reckons with."""

    def __init__(
        self, clock: Clock, counters: Counters, acceptor: TlsAcceptor, methods: Mapping[str, Method]
    ) -> None:
        self._clock = clock
        self._counters = counters
        self._acceptor = acceptor
        self._methods = methods
        self._samples: deque[_Sample] = deque([self._read()])

    async def run(self) -> None:
        """Read the counters once a second, until cancelled."""
        while True:
            await asyncio.sleep(SAMPLE_S)
            try:
                self.sample()
            except Exception as error:  # a fault of ours must not end the readings
                log.error("server.fault", what="traffic", exc_info=error)

    def sample(self) -> None:
        """Read the counters, and forget what is older than the window."""
        samples = self._samples
        samples.append(self._read())
        while samples[0].at < samples[-1].at - WINDOW_S:
            samples.popleft()

    def figures(self) -> dict[str, Any]:
        """Rates a second over about 10 s, percentiles in seconds over about a minute.

        `work` is the time of the loop to a request's answer or first wait, of some of the requests; `waits` is how
        long those took that waited, of all of them.
        """
        now = self._read()
        recent = next(
            each for each in self._samples if each.at >= now.at - RATE_S or each is self._samples[-1]
        )
        oldest = self._samples[0]
        seconds = now.at - recent.at
        return {
            "rate_window_s": round(seconds, 3),
            "requests_per_s": _rate(now.requests - recent.requests, seconds),
            "errors_per_s": _rate(now.errors - recent.errors, seconds),
            "handshakes_per_s": _rate(now.handshakes - recent.handshakes, seconds),
            "handshake_failures_per_s": _rate(now.handshake_failures - recent.handshake_failures, seconds),
            "latency_window_s": round(now.at - oldest.at, 3),
            "work": _percentiles(QUICK_S, oldest.work, now.work),
            "waits": _percentiles(WAITED_S, oldest.waits, now.waits),
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
        )


def _rate(events: int, seconds: float) -> float:
    return round(max(0, events) / seconds, 3) if seconds > 0 else 0.0


def _percentiles(
    bounds: tuple[float, ...], before: list[int], now: list[int]
) -> dict[str, float | int | None]:
    counts = [max(0, later - earlier) for earlier, later in zip(before or [0] * len(now), now, strict=True)]
    found = {name: quantile(bounds, counts, part) for name, part in QUANTILES.items()}
    shown = {name: None if value is None else round(value, 6) for name, value in found.items()}
    return {"count": sum(counts), **shown}
