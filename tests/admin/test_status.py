"""The status of a server: what it says, and that its rates and percentiles are those of the last minute."""

from __future__ import annotations

import json

from tests.server.conftest import Serve
from zcproto.admin.status import ServerStatus
from zcproto.admin.traffic import RATE_S, WINDOW_S, Traffic
from zcproto.app.app import Method
from zcproto.observe.histogram import QUICK_S, quantile
from zcproto.server.state import Counters
from zcproto.tls.failure import TlsFailure


class Clock:
    def __init__(self) -> None:
        self.time = 100.0

    def now(self) -> float:
        return self.time

    def wall(self) -> int:
        return 0


class Acceptor:
    """Of a TlsAcceptor the counts alone."""

    def __init__(self) -> None:
        self.handshakes_completed = 0
        self.failures = dict.fromkeys(TlsFailure, 0)


def traffic() -> tuple[Traffic, Clock, Counters, Acceptor, Method]:
    clock, counters, acceptor = Clock(), Counters(), Acceptor()
    method = Method("m", lambda: None)
    return Traffic(clock, counters, acceptor, {"m": method}), clock, counters, acceptor, method  # type: ignore[arg-type]


def test_nothing_has_happened_at_first() -> None:
    figures = traffic()[0].figures()
    assert figures["requests_per_s"] == 0.0
    assert figures["work"] == {"count": 0, "p50": None, "p90": None, "p99": None, "p999": None}


def test_rates_are_those_of_the_last_ten_seconds() -> None:
    of, clock, counters, acceptor, _ = traffic()
    for _ in range(30):
        counters.requests += 1000
        clock.time += 1
        of.sample()
    for _ in range(int(RATE_S)):
        counters.requests += 50
        counters.count_error(3)
        acceptor.handshakes_completed += 2
        acceptor.failures[TlsFailure.NOT_TLS] += 3
        clock.time += 1
        of.sample()
    figures = of.figures()
    assert figures["rate_window_s"] == RATE_S
    assert figures["requests_per_s"] == 50.0
    assert figures["errors_per_s"] == 1.0
    assert figures["handshakes_per_s"] == 2.0
    assert figures["handshake_failures_per_s"] == 3.0


def test_percentiles_forget_what_is_older_than_a_minute() -> None:
    of, clock, _, _, method = traffic()
    for _ in range(1000):
        method.durations.add(0.4)
    for _ in range(int(WINDOW_S) + 5):
        clock.time += 1
        of.sample()
        method.durations.add(0.0001)
    figures = of.figures()
    assert figures["latency_window_s"] == WINDOW_S
    assert figures["work"]["count"] == WINDOW_S + 1
    assert 0.00005 < figures["work"]["p50"] <= figures["work"]["p999"] <= 0.0001
    assert figures["waits"]["count"] == 0
    assert len(of._samples) == WINDOW_S + 1


def test_after_a_long_silence_the_last_reading_is_what_is_compared_with() -> None:
    of, clock, counters, _, _ = traffic()
    clock.time += 100  # the loop stood still
    counters.requests += 200
    assert of.figures()["requests_per_s"] == 2.0


def test_a_server_without_methods_has_no_percentiles() -> None:
    of = Traffic(Clock(), Counters(), Acceptor(), {})  # type: ignore[arg-type]
    of.sample()
    assert of.figures()["work"]["count"] == 0


def test_quantiles_lie_between_their_bounds() -> None:
    bounds = (1.0, 2.0, 4.0)
    assert quantile(bounds, (0, 0, 0, 0), 0.5) is None
    assert quantile(bounds, (0, 10, 0, 0), 0.5) == 1.5
    assert quantile(bounds, (5, 5, 0, 0), 0.5) == 1.0
    assert quantile(bounds, (0, 0, 4, 0), 1.0) == 4.0
    assert quantile(bounds, (1, 0, 0, 9), 0.99) == 4.0  # beyond the last bound nothing is known
    assert quantile(QUICK_S, [0] * len(QUICK_S) + [1], 0.5) == QUICK_S[-1]


def test_a_running_server_tells_all_of_it(serve: Serve) -> None:
    server = serve()
    with server.client("ada") as client:
        for _ in range(50):
            client.echo()
        figures = server.in_loop(ServerStatus(server.server.parts).figures)
    assert json.loads(json.dumps(figures)) == figures
    assert figures["api"] == 1
    assert figures["connections"]["zcp"] == figures["connections"]["tcp"] == 1
    assert figures["sessions"] == {"live": 1, "lapsed": 0, "opened": 1, "revoked": 0}
    assert figures["requests"]["total"] == 51
    assert figures["traffic"]["work"]["count"] > 0
    assert figures["handshakes"] == {"completed": 1, "in_progress": 0, "failed": {}}
    assert figures["store"]["url"] == "memory"
    assert figures["store"]["state"] == "healthy"
    assert [each["source"] for each in figures["certificates"]] == ["own", "authority"]
    assert figures["certificates"][0]["days_left"] in (88, 89)
    assert figures["alerts"]["open"] == []
    assert figures["addresses"] == [f"127.0.0.1:{server.port}"]
    assert not figures["draining"]


def test_an_address_of_a_store_is_not_shown(serve: Serve) -> None:
    """It may hold a password: what kind of store it is says enough."""
    server = serve(store__url="memory")
    server.server.parts.active.config = server.server.config.model_copy(
        update={
            "store": server.server.config.store.model_copy(
                update={"url": "valkey://user:hunter2@store.example"}
            )
        }
    )
    figures = server.in_loop(ServerStatus(server.server.parts).figures)
    assert figures["store"]["url"] == "valkey"
    assert "hunter2" not in json.dumps(figures)
