"""Plans, shares and results for tests, and a view that records its calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.helpers import until, variables
from tests.limits import TIMEOUT
from tests.server.helpers import KEY, PATIENT, ServerThread
from zcproto.app.app import App
from zcproto.load.caller import ServerStats
from zcproto.load.generator import Generator
from zcproto.load.plan import Credential, Plan, Share
from zcproto.load.record import Latencies, Record, RequestKind, Tally
from zcproto.load.result import Moment, Result, StatsReading

OPERATOR = Credential("operator", KEY)


def users(count: int) -> tuple[Credential, ...]:
    return tuple(Credential(f"user-{number}", KEY) for number in range(count))


def plan(**changes: Any) -> Plan:
    usual: dict[str, Any] = {
        "host": "127.0.0.1",
        "port": 7443,
        "connections": 10,
        "sessions": 10,
        "rate": 200.0,
        "duration_s": 0.25,
        "payload_bytes": 16,
        "credentials": users(2),
        "operator": OPERATOR,
        "arrival_rate": 500.0,
    }
    return Plan(**{**usual, **changes})


def plan_for(server: ServerThread, **changes: Any) -> Plan:
    return plan(port=server.port, ca_file=server.home / "certs" / "ca.crt", **changes)


def share(server: ServerThread | None = None, **changes: Any) -> Share:
    usual: dict[str, Any] = {
        "number": 0,
        "processes": 1,
        "address": "127.0.0.1",
        "host": "127.0.0.1",
        "port": 7443 if server is None else server.port,
        "ca_file": None if server is None else str(server.home / "certs" / "ca.crt"),
        "connections": 4,
        "credentials": [[f"user-{number}", KEY] for number in range(4)],
        "rate": 400.0,
        "duration_s": 0.1,
        "payload_bytes": 16,
        "pipeline": 1,
        "arrival_rate": 1000.0,
        "verify_rate": 5000.0,
        "seed": 1,
        "origin": time.monotonic(),
        "connect_timeout_s": TIMEOUT,
        "answer_timeout_s": TIMEOUT,
    }
    return Share(**{**usual, **changes})


class RecordingView:
    """A view that records its calls."""

    def __init__(self) -> None:
        self.phases: list[tuple[str, str, int]] = []
        self.updates: list[dict[str, int]] = []

    def phase(self, name: str, label: str, total: int) -> None:
        self.phases.append((name, label, total))

    def update(self, counts: dict[str, int]) -> None:
        self.updates.append(counts)


def stats(**changes: Any) -> ServerStats:
    usual: dict[str, Any] = {
        "connections": 1,
        "sessions": 1,
        "requests": 3,
        "cpu_s": 1.0,
        "rss_bytes": 40_000_000,
        "longest_pause_s": 0.001,
        "handshakes": 1,
        "items": 0,
    }
    return ServerStats(**{**usual, **changes})


def latencies(*micros: int) -> Latencies:
    made = Latencies()
    for each in micros:
        made.add(each / 1_000_000)
    return made


def verified_result(**changes: Any) -> Result:
    """Return a verified result of ten connections, fifty requests of the load and ten last requests."""
    record = Record()
    record.tallies[RequestKind.OPEN] = Tally(10, 10, 10)
    record.tallies[RequestKind.LOAD] = Tally(50, 50, 50)
    record.tallies[RequestKind.LAST] = Tally(10, 10, 10)
    record.tallies[RequestKind.CLOSE] = Tally(10, 10, 10)
    record.ready = record.sessions = 10
    record.load_started, record.load_ended = 100.0, 100.25
    for name in record.latencies:
        record.latencies[name] = latencies(*range(100, 5_000, 100))
    record.request_by_second = {0: latencies(100, 200, 300), 2: latencies(400)}
    record.connected_over_time = {0: 4, 1: 6}
    record.answered_over_time = {2: 50, 3: 10}
    readings = {
        Moment.IDLE: StatsReading(stats(), 3, 0.0),
        Moment.CONNECTED: StatsReading(
            stats(connections=11, sessions=11, requests=14, cpu_s=1.02, rss_bytes=40_000_000 + 10 * 36_864,
                  longest_pause_s=0.02, handshakes=11), 4, 0.5,
        ),
        Moment.LOADED: StatsReading(stats(connections=11, sessions=11, requests=65, cpu_s=1.021), 5, 0.8),
        Moment.VERIFIED: StatsReading(stats(connections=11, sessions=11, requests=76), 6, 0.9),
        Moment.CLOSED: StatsReading(stats(requests=87), 7, 1.0),
    }  # fmt: skip
    result = Result(plan(), record, readings, connected=10, connect_s=0.02, load_s=0.25, total_s=1.0)
    for name, value in changes.items():
        setattr(result, name, value)
    return result


def app_with(echo: Callable[..., Any]) -> App:
    app = App()
    app.method("echo")(echo)
    return app


async def all_phases(generator: Generator) -> None:
    await generator.connect()
    await generator.load()
    await generator.verify()
    await generator.close()


def wait_long(patch: pytest.MonkeyPatch) -> None:
    """Let loads of this process and servers that it starts wait, however slow the machine is."""
    for name in (
        *("caller.TIMEOUT", "plan.ANSWER_TIMEOUT", "plan.CONNECT_TIMEOUT", "run.CLOSED_TIMEOUT"),
        *("demo.END_TIMEOUT", "demo.START_TIMEOUT", "worker.END_TIMEOUT"),
    ):
        patch.setattr(f"zcproto.load.{name}", TIMEOUT)
    for name, value in variables(PATIENT).items():
        patch.setenv(name, value)


@contextmanager
def timing_out(generator: Generator, when: Callable[[], object]) -> Iterator[None]:
    """Let the generator's waits time out in the body as soon as a condition holds."""
    wait = generator._wait

    async def wait_until(done: Callable[[], bool], limit_s: float) -> None:
        await until(lambda: done() or when())
        await wait(done, 0.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generator, "_wait", wait_until)
        yield
