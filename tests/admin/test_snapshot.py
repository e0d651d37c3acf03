"""The snapshot of a server and its reports; rates and percentiles of the last minute."""

from __future__ import annotations

import json

from tests.server.conftest import Serve
from zcproto.admin.snapshot import status_report, take_snapshot
from zcproto.admin.traffic import RATE_S, WINDOW_S, Traffic, rates_of
from zcproto.app.app import Method
from zcproto.observe.histogram import QUICK_S, quantile
from zcproto.server.state import Counters
from zcproto.tls.failure import TlsFailure


class FakeClock:
    def __init__(self) -> None:
        self.time = 100.0

    def now(self) -> float:
        return self.time

    def wall(self) -> int:
        return 0


class FakeAcceptor:
    """The counters of a TlsAcceptor."""

    def __init__(self) -> None:
        self.handshakes_completed = 0
        self.failures = dict.fromkeys(TlsFailure, 0)


class FakeLoopLag:
    """The longest lag since the last sample."""

    def __init__(self) -> None:
        self.recent = 0.0


def traffic() -> tuple[Traffic, FakeClock, Counters, FakeAcceptor, Method]:
    clock, counters, acceptor = FakeClock(), Counters(), FakeAcceptor()
    method = Method("m", lambda: None)
    samples = Traffic(clock, counters, acceptor, {"m": method}, FakeLoopLag())  # type: ignore[arg-type]
    return samples, clock, counters, acceptor, method


def test_a_new_server_has_zero_rates_and_no_percentiles() -> None:
    rates = rates_of(traffic()[0].window())
    assert rates["requests_per_s"] == 0.0
    assert rates["work"] == {"count": 0, "p50": None, "p90": None, "p99": None, "p999": None}


def test_rates_cover_the_last_ten_seconds() -> None:
    samples, clock, counters, acceptor, _ = traffic()
    for _ in range(30):
        counters.requests += 1000
        clock.time += 1
        samples.sample()
    for _ in range(int(RATE_S)):
        counters.requests += 50
        counters.errors[3] += 1
        acceptor.handshakes_completed += 2
        acceptor.failures[TlsFailure.NOT_TLS] += 3
        clock.time += 1
        samples.sample()
    rates = rates_of(samples.window())
    assert rates["rate_window_s"] == RATE_S
    assert rates["requests_per_s"] == 50.0
    assert rates["errors_per_s"] == 1.0
    assert rates["handshakes_per_s"] == 2.0
    assert rates["handshake_failures_per_s"] == 3.0


def test_percentiles_cover_the_last_minute() -> None:
    samples, clock, _, _, method = traffic()
    for _ in range(1000):
        method.durations.add(0.4)
    for _ in range(int(WINDOW_S) + 5):
        clock.time += 1
        samples.sample()
        method.durations.add(0.0001)
    rates = rates_of(samples.window())
    assert rates["latency_window_s"] == WINDOW_S
    assert rates["work"]["count"] == WINDOW_S + 1
    assert rates["work"]["p50"] is not None
    assert rates["work"]["p999"] is not None
    assert 0.00005 < rates["work"]["p50"] <= rates["work"]["p999"] <= 0.0001
    assert rates["waits"]["count"] == 0
    assert len(samples._samples) == WINDOW_S + 1


def test_rates_after_a_blocked_loop_compare_with_the_last_sample() -> None:
    samples, clock, counters, _, _ = traffic()
    clock.time += 100  # the loop was blocked
    counters.requests += 200
    assert rates_of(samples.window())["requests_per_s"] == 2.0


def test_a_server_without_methods_has_no_percentiles() -> None:
    samples = Traffic(FakeClock(), Counters(), FakeAcceptor(), {}, FakeLoopLag())  # type: ignore[arg-type]
    samples.sample()
    assert rates_of(samples.window())["work"]["count"] == 0


def test_quantiles_are_interpolated_between_bounds() -> None:
    bounds = (1.0, 2.0, 4.0)
    assert quantile(bounds, (0, 0, 0, 0), 0.5) is None
    assert quantile(bounds, (0, 10, 0, 0), 0.5) == 1.5
    assert quantile(bounds, (5, 5, 0, 0), 0.5) == 1.0
    assert quantile(bounds, (0, 0, 4, 0), 1.0) == 4.0
    assert quantile(bounds, (1, 0, 0, 9), 0.99) == 4.0  # beyond the last bound
    assert quantile(QUICK_S, [0] * len(QUICK_S) + [1], 0.5) == QUICK_S[-1]


def test_status_report_of_a_running_server(serve: Serve) -> None:
    server = serve()
    with server.client("ada") as client:
        for _ in range(50):
            client.echo()
        report = server.in_loop(lambda: status_report(take_snapshot(server.server.parts)))
    assert json.loads(json.dumps(report)) == report
    assert report["api"] == 1
    assert report["connections"]["zcp"] == report["connections"]["tcp"] == 1
    assert report["sessions"] == {"live": 1, "lapsed": 0, "opened": 1, "revoked": 0}
    assert report["requests"]["total"] == 51
    assert report["traffic"]["work"]["count"] > 0
    assert report["streams"] == {
        **dict.fromkeys(("open", "opened", "cut"), 0),
        **dict.fromkeys(("items_sent", "items_received", "waiting_bytes"), 0),
        **dict.fromkeys(("bytes_sent", "bytes_received"), 0),
    }
    assert [*report["handshakes"].pop("groups").values()] == [1]
    assert report["calls"] == {"handlers": 0, "in_flight": 0, "elsewhere": 0, "ended": {}, "pending": 0}
    assert report["handshakes"] == {"completed": 1, "in_progress": 0, "pending": 0, "failed": {}}
    assert report["store"]["url"] == "memory"
    assert report["store"]["state"] == "healthy"
    assert [each["source"] for each in report["certificates"]] == ["own", "authority"]
    assert report["certificates"][0]["days_left"] in (88, 89)
    assert report["alerts"]["open"] == []
    assert report["addresses"] == [f"127.0.0.1:{server.port}"]
    assert not report["draining"]


def test_status_report_omits_the_address_of_the_store(serve: Serve) -> None:
    """It may contain a password; the report has only the kind of the store."""
    server = serve(store__url="memory")
    server.server.parts.active.config = server.server.config.model_copy(
        update={
            "store": server.server.config.store.model_copy(
                update={"url": "valkey://user:hunter2@store.example"}
            )
        }
    )
    report = server.in_loop(lambda: status_report(take_snapshot(server.server.parts)))
    assert report["store"]["url"] == "valkey"
    assert "hunter2" not in json.dumps(report)
