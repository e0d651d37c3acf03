"""Where the time of calls during a failover goes.

    due, or in flight -> an attempt begins -> TCP connection -> WELCOME -> answer
                   notice                 TCP             TLS       answer

Decides: to which of these steps each moment of a call belongs.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final, NamedTuple

from bench.report import Row
from zcproto.client.dial import Dial, LoopResources
from zcproto.client.endpoints import Endpoint
from zcproto.client.protocol import ClientProtocol, ConnectionOwner
from zcproto.load.hdr import percentiles_ms
from zcproto.load.record import Latencies
from zcproto.observe.loop_lag import WaitingTime

AFTER_S: Final = 1.0
"""A call that is due so long after a kill is one during a failover."""

STEPS: Final = {
    "notice": "until an attempt to connect begins",
    "tcp": "TCP connection",
    "tls": "TLS handshake and WELCOME",
    "answer": "from there, or on the old connection, to the answer",
}

LABELS: Final = {
    "late": "begun late by the clients' process",
    **STEPS,
    "again": "the same of calls that were in flight, and are sent again",
}


class Done(NamedTuple):
    """A call with a key that was answered: when it was due, sent and answered (monotonic), and by which client."""

    due: float
    begin: float
    end: float
    client: int


class Connected(NamedTuple):
    """A connection: when the attempt began, and had its TCP connection and its WELCOME (monotonic)."""

    began: float
    reached: float
    welcomed: float


class Load(NamedTuple):
    """What the clients' process did in the AFTER_S from a kill on, in seconds."""

    ran: float
    waited: float
    """For a processor that other processes had."""


@dataclass(slots=True)
class FailoverTimes:
    """What the clients note."""

    done: list[Done] = field(default_factory=list)
    ports: dict[float, dict[int, int]] = field(default_factory=dict)
    """Where each client was connected at each kill."""
    connected: dict[int, list[Connected]] = field(default_factory=lambda: defaultdict(list))
    """The connections of each client, in their order."""
    loads: list[Load] = field(default_factory=list)

    def timed(self, dial: Dial, client: int) -> Dial:
        """Return a dial that notes the connections of a client."""

        async def attempt(
            owner: ConnectionOwner,
            resources: LoopResources,
            endpoint: Endpoint,
            on_reached: Callable[[], None],
        ) -> ClientProtocol:
            began = reached = time.monotonic()

            def note() -> None:
                nonlocal reached
                reached = time.monotonic()
                on_reached()

            connection = await dial(owner, resources, endpoint, note)
            self.connected[client].append(Connected(began, reached, time.monotonic()))
            return connection

        return attempt

    async def note_load(self) -> None:
        """Note what this process does in the next AFTER_S."""
        waiting = WaitingTime()
        ran, waited = time.process_time(), waiting.read()
        await asyncio.sleep(AFTER_S)
        self.loads.append(Load(time.process_time() - ran, waiting.read() - waited))

    def judge(self, kills: Mapping[float, int]) -> tuple[Latencies, Latencies, dict[str, Latencies]]:
        """Return how long calls took: all, those during a failover, and these by step.

        `kills` has the ports of the killed servers.
        """
        everything, failovers = Latencies(), Latencies()
        steps = {name: Latencies() for name in LABELS}
        for call in self.done:
            everything.add(call.end - call.due)
            at = self._kill_of(call, kills)
            if at is None:
                continue
            failovers.add(call.end - call.due)
            steps["late"].add(call.begin - call.due)
            for name, seconds in zip(STEPS, self._steps(call, at), strict=True):
                is_again = name == "answer" and call.begin < at
                steps["again" if is_again else name].add(seconds)
        return everything, failovers, steps

    def _kill_of(self, call: Done, kills: Mapping[float, int]) -> float | None:
        """Return when the server was killed that delayed a call."""
        for at, port in kills.items():
            if call.due <= at + AFTER_S and call.end >= at and self.ports[at].get(call.client) == port:
                return at
        return None

    def _steps(self, call: Done, at: float) -> Iterable[float]:
        """Return the time of each step of a call; one that was over before the call was due took none."""
        connected = self.connected.get(call.client, [])
        first = bisect_left(connected, at, key=lambda each: each.welcomed)
        moments = [*connected[first]] if first < len(connected) else []
        if not moments or moments[-1] > call.end:  # answered on the old connection
            moments = [call.due] * 3
        times = [min(max(call.due, moment), call.end) for moment in moments]
        return [after - before for before, after in pairwise([call.due, *times, call.end])]


def rows(times: FailoverTimes, kills: Mapping[float, int], max_p99_ms: float) -> list[Row]:
    """Return the figures about calls, those of failovers against their bar."""
    everything, failovers, steps = times.judge(kills)
    calls, during = percentiles_ms(everything), percentiles_ms(failovers)
    found = [
        Row("p50_ms", "call, p50", calls.get("p50"), "ms"),
        Row("p99_ms", "call, p99", calls.get("p99"), "ms"),
        Row("failover_calls", "calls during a failover", failovers.total),
        Row("failover_p50_ms", "call during a failover, p50", during.get("p50"), "ms"),
        Row("failover_p99_ms", "call during a failover, p99", during.get("p99"), "ms", below=max_p99_ms),
        Row("failover_ms", "call during a failover, longest", during.get("max"), "ms"),
    ]
    for name, label in LABELS.items():
        figures = percentiles_ms(steps[name])
        found += [
            Row(f"failover_{name}_{short}", f"{label}, {word}", figures.get(key), "ms")
            for short, word, key in (
                ("p50_ms", "p50", "p50"),
                ("p99_ms", "p99", "p99"),
                ("ms", "longest", "max"),
            )
        ]
    of_process = {
        f"ran in {AFTER_S:g} s after a kill": "ran",
        "waited for a processor in that time": "waited",
    }
    return found + [
        Row(f"clients_{name}_ms", f"clients' process {label}", _mean_ms(times.loads, name), "ms")
        for label, name in of_process.items()
    ]


def _mean_ms(loads: Sequence[Load], name: str) -> float | None:
    return 1_000 * sum(getattr(each, name) for each in loads) / len(loads) if loads else None
