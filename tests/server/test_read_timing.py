"""Which reads are timed, with time turned by hand; and what that adds to in a server."""

from __future__ import annotations

import pytest

from tests.helpers import FakeTimers
from zcproto.deadlines import DeadlineWheel
from zcproto.errors import NotFound
from zcproto.server.app import App
from zcproto.server.read_timing import PERIOD, ReadTiming

from .conftest import Serve
from .helpers import AnsweredError


def test_one_read_in_each_period_is_timed(timers: FakeTimers) -> None:
    timing = ReadTiming(DeadlineWheel(timers))
    assert timing.time_next
    timing.timed()
    assert not timing.time_next
    timers.advance(3 * PERIOD)
    assert timing.time_next
    timers.advance(100)  # nobody reads: nothing is planned either
    assert timing.time_next
    assert timing.deadline_tick == 0


def test_all_requests_of_a_read_make_one_deadline(timers: FakeTimers) -> None:
    wheel = DeadlineWheel(timers)
    timing = ReadTiming(wheel)
    for _ in range(5):
        timing.timed()
    assert len(wheel) == 1


def test_what_was_stopped_times_nothing_and_leaves_nothing(timers: FakeTimers) -> None:
    wheel = DeadlineWheel(timers)
    timing = ReadTiming(wheel)
    timing.timed()
    timing.stop()
    assert len(wheel) == 0
    timers.advance(1)
    assert not timing.time_next
    timing.timed()  # by a read that was planned before
    assert len(wheel) == 0


def two_methods() -> App:
    app = App()

    @app.method("quick")
    def quick() -> int:
        return 1

    @app.method("bad")
    def bad() -> int:
        raise NotFound("no such thing")

    return app


def test_a_timed_read_is_answered_as_any_other(serve: Serve) -> None:
    app = two_methods()
    quick, bad = list(app)
    server = serve(app)
    with server.client("ada") as client:
        for _ in range(20):
            server.in_loop(lambda: setattr(server.server.serving.reads, "time_next", True))
            assert client.call("quick") == 1
        with pytest.raises(AnsweredError):
            client.call("bad")
        server.in_loop(lambda: setattr(server.server.serving.reads, "time_next", True))
        refused = client.refused("nobody.has.this")
        assert "unknown method" in refused.message
    assert quick.calls == 20
    assert sum(quick.durations.counts) == 20
    assert 0 < quick.durations.total < 20
    assert bad.calls == 1
    assert sum(quick.waits.counts) == 0, "it never waits"


def test_most_reads_are_not_timed(serve: Serve) -> None:
    app = two_methods()
    quick, _ = list(app)
    server = serve(app)
    with server.client("ada") as client:
        server.in_loop(server.server.serving.reads.stop)  # no period ends meanwhile
        before = sum(quick.durations.counts)
        for _ in range(50):
            client.call("quick")
        assert quick.calls == 50
        assert sum(quick.durations.counts) == before


def test_calls_that_wait_are_all_measured(serve: Serve) -> None:
    server = serve()
    with server.client("ada") as client:
        sleep = server.server.serving.methods["sleep"]
        before = sum(sleep.waits.counts)
        for _ in range(10):
            client.call("sleep", {"ms": 1})
        client.call("sleep", {"ms": 0}, meta={"idempotency_key": "a"})
        assert sum(sleep.waits.counts) - before == 11
        assert 0.01 <= sleep.waits.total < 10
