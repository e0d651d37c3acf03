"""What a worker and a coordinator show: the figures of the whole server."""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families as parse

from tests.admin.https_client import ask
from tests.limits import TIMEOUT
from tests.server.conftest import Serve
from tests.server.helpers import ServerThread
from zcproto.admin.parts import FleetFigures, Parts
from zcproto.admin.snapshot import read_status, store_readiness
from zcproto.cli.status import lines_of
from zcproto.common.clock import system_clock
from zcproto.errors import Code, Unavailable
from zcproto.runtime.build import WorkerRole
from zcproto.sessions.token import token_text
from zcproto.workers.figures import Collector, Member, RemoteFigures, Reporter, read_report
from zcproto.workers.merge import Depth, Report


def group_of_one(parts: Parts) -> FleetFigures:
    """Let one server stand for a coordinator and two workers. The third one is absent."""
    collector = Collector(1, 3, system_clock, join_s=0)
    collector.read = partial(read_report, parts, Member(0, 1))
    for number in (1, 2):
        reporter = Reporter()
        reporter.read = partial(read_report, parts, Member(number, number + 1, number))

        async def answer(question: bytes, reporter: Reporter = reporter) -> bytes:
            return reporter.answer(question)

        collector.joined(Member(number, number + 1, number), answer)
    return RemoteFigures(collector.answer)


def coordinator_alone(parts: Parts) -> FleetFigures:
    """Let a coordinator stand for a server that no worker has joined."""
    return RemoteFigures(Collector(1, 2, system_clock, join_s=0).answer)


def silent(parts: Parts) -> FleetFigures:
    """Let a coordinator not answer."""

    async def fail(question: bytes) -> bytes:
        raise ConnectionResetError("reset")

    return RemoteFigures(fail)


@pytest.fixture
def server(serve: Serve) -> ServerThread:
    return serve(role=WorkerRole(fleet=group_of_one), http__metrics="open", store__url="sqlite")


@pytest.fixture
def alone(serve: Serve) -> ServerThread:
    return serve(role=WorkerRole(fleet=silent), http__metrics="open")


def series(text: str) -> dict[tuple[str, tuple[str, ...]], float]:
    samples = [sample for family in parse(text) for sample in family.samples]
    found = {(sample.name, tuple(sample.labels.values())): sample.value for sample in samples}
    assert len(found) == len(samples)  # no series twice
    return found


def test_metrics_are_sums_under_the_usual_names_and_by_worker_under_others(server: ServerThread) -> None:
    with server.client("ada") as client:
        for _ in range(10):
            client.echo()
        answer = ask(server, "/metrics")
    assert answer.status == 200
    found = series(answer.body.decode())
    one = found["zcproto_worker_requests_total", ("1",)]
    assert one >= 11
    assert found["zcproto_requests_total", ()] == 3 * one
    assert found["zcproto_method_calls_total", ("echo",)] == 30
    assert found["zcproto_limit", ("limits.max_connections",)] == 20_000
    assert found["zcproto_draining", ()] == 0
    assert found["zcproto_worker_up", ("2",)] == 1
    assert found["zcproto_worker_up", ("3",)] == 0
    assert found["zcproto_worker_restarts_total", ("2",)] == 2
    lags = [found["zcproto_worker_loop_lag_seconds_count", (name,)] for name in ("1", "2", "coordinator")]
    assert found["zcproto_loop_lag_seconds_count", ()] == lags[0] + lags[1]
    assert {name for name, labels in found if "1" in labels and name.startswith("zcproto_")} <= {
        name for name, _ in found if name.startswith("zcproto_worker_")
    }


def test_status_and_page_show_the_whole_and_each_worker(server: ServerThread) -> None:
    with server.client("ada") as client:
        status = asyncio.run_coroutine_threadsafe(read_status(server.server.parts), server.loop).result(
            TIMEOUT
        )
        answer = ask(server, "/status.json", headers={"Authorization": f"Bearer {token_text(client.token)}"})
    assert status["pid"] == os.getppid()
    assert status["connections"]["zcp"] == 3
    assert [(line["worker"], line["state"], line["restarts"]) for line in status["workers"]] == [
        ("coordinator", "serving", 0),
        ("1", "serving", 1),
        ("2", "serving", 2),
        ("3", "absent", 0),
    ]
    assert status["traffic"]["work"].keys() >= {"p50", "p99"}
    page = json.loads(answer.body)
    assert [line["worker"] for line in page["workers"]] == ["coordinator", "1", "2", "3"]
    assert page["ready"]


def fleet_without_workers(parts: Parts) -> FleetFigures:
    """Let a coordinator stand for a server whose workers have all ended."""
    collector = Collector(1, 2, system_clock, join_s=0)
    collector.read = partial(read_report, parts, Member(0, 1))
    return RemoteFigures(collector.answer)


def test_status_shows_that_no_worker_serves(serve: Serve) -> None:
    server = serve(role=WorkerRole(fleet=fleet_without_workers))
    status = asyncio.run_coroutine_threadsafe(read_status(server.server.parts), server.loop).result(TIMEOUT)
    assert [line["state"] for line in status["workers"]] == ["serving", "absent", "absent"]
    assert not status["draining"]
    text = "\n".join(line for line, _ in lines_of(status))
    assert "NO WORKER SERVES" in text.splitlines()[0]
    assert "workers: 0 of 2 serving" in text


def test_status_is_unavailable_while_no_process_is_built(serve: Serve) -> None:
    server = serve(role=WorkerRole(fleet=coordinator_alone))
    asked = asyncio.run_coroutine_threadsafe(read_status(server.server.parts), server.loop)
    with pytest.raises(Unavailable, match="retry"):
        asked.result(TIMEOUT)


def set_longest_pause(server: ServerThread, seconds: float) -> None:
    server.in_loop(lambda: setattr(server.server.parts.loop_lag, "longest", seconds))


def test_server_stats_are_those_of_all_workers(server: ServerThread) -> None:
    set_longest_pause(server, 60.0)
    with server.client("operator") as client:
        stats = client.call("server.stats")
    assert stats["connections"] == 3
    assert len(stats["workers"]) == 4
    assert stats["longest_pause_s"] == 60.0


def test_only_statistics_begin_the_interval_of_the_longest_pause_again(server: ServerThread) -> None:
    def longest(depth: Depth) -> float:
        parts = server.server.parts
        return server.in_loop(lambda: float(read_report(parts, Member(1, 1), depth).stats["longest_pause_s"]))

    set_longest_pause(server, 60.0)
    assert [longest(Depth.FIGURES), longest(Depth.FIGURES), longest(Depth.STATS)] == [60.0] * 3
    assert longest(Depth.FIGURES) < 60.0


def test_readiness_is_that_of_all_workers(server: ServerThread) -> None:
    answer = ask(server, "/readyz")
    assert (answer.status, json.loads(answer.body)["ready"]) == (200, True)
    assert ask(server, "/healthz").body == b"ok\n"


def test_server_is_not_ready_before_a_worker_has_answered(serve: Serve) -> None:
    answer = ask(serve(role=WorkerRole(fleet=coordinator_alone)), "/readyz")
    assert answer.status == 503
    report = json.loads(answer.body)
    assert (report["ready"], report["reasons"]) == (False, ["workers: none has answered"])


def fleet_without_store(parts: Parts) -> FleetFigures:
    """Let workers that see no failure themselves have a coordinator whose store fails."""

    def read(depth: Depth) -> Report:
        report = read_report(parts, Member(0, 1), depth)
        return replace(report, readiness={**store_readiness(parts), "has_store": False})

    collector = Collector(1, 1, system_clock, join_s=0)
    collector.read = read
    reporter = Reporter()
    reporter.read = partial(read_report, parts, Member(1, 2))

    async def answer(question: bytes) -> bytes:
        return reporter.answer(question)

    collector.joined(Member(1, 2), answer)
    return RemoteFigures(collector.answer)


def test_server_is_not_ready_without_the_store_of_its_coordinator(serve: Serve) -> None:
    answer = ask(serve(role=WorkerRole(fleet=fleet_without_store)), "/readyz")
    assert answer.status == 503
    report = json.loads(answer.body)
    assert not report["ready"]
    assert "has_store" not in report


def test_store_that_fails_is_a_reason_against_readiness(serve: Serve) -> None:
    server = serve(store__url="sqlite")
    parts = server.server.parts
    assert server.in_loop(lambda: store_readiness(parts)) == {
        "has_store": True,
        "reasons": [],
        "checks": {"store": "healthy"},
    }

    def fail() -> dict[str, Any]:
        for _ in range(3):  # of workers
            parts.store.breaker.failed("disk full", 0.0)
        return store_readiness(parts)

    assert server.in_loop(fail) == {
        "has_store": False,
        "reasons": ["store: it does not answer; known sessions continue, none can be opened"],
        "checks": {"store": "degraded"},
    }


def test_worker_without_coordinator_refuses_figures_and_reports_its_own_readiness(
    alone: ServerThread,
) -> None:
    answer = ask(alone, "/metrics")
    assert (answer.status, answer.one("retry-after")) == (503, "1")
    with alone.client("operator") as client:
        bearer = {"Authorization": f"Bearer {token_text(client.token)}"}
        assert ask(alone, "/status.json", headers=bearer).status == 503
        assert client.refused("server.stats").code == Code.UNAVAILABLE
    answer = ask(alone, "/readyz")
    assert answer.status == 200
    (warning,) = json.loads(answer.body)["warnings"]
    assert warning.startswith("workers: the figures of all workers cannot be collected")


def test_coordinator_hides_no_figure_of_the_workers(server: ServerThread) -> None:
    """Its loop is idle, it does not listen, and its limits are those of the whole configuration."""

    def report(number: int) -> Report:
        return server.in_loop(lambda: read_report(server.server.parts, Member(number, 1)))

    worker, coordinator = report(1), report(0)
    assert worker.series.keys() - coordinator.series.keys() == {
        *("zcproto_draining", "zcproto_limit", "zcproto_limit_use", "zcproto_loop_lag_seconds"),
        *("zcproto_worker_connections", "zcproto_worker_requests_total"),
    }
    assert coordinator.readiness == {}
    assert "draining" not in coordinator.status


def test_readiness_alone_reads_no_figures(server: ServerThread) -> None:
    report: Any = server.in_loop(lambda: read_report(server.server.parts, Member(1, 1), Depth.READINESS))
    assert (report.status, report.stats, report.series, report.workers) == ({}, {}, {}, [])
    assert report.readiness["ready"]
