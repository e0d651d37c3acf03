"""Tests of the timing of reads, with fake time and in a server."""

from __future__ import annotations

import time

import pytest

from tests.server.conftest import Serve
from tests.server.helpers import AnsweredError
from zcproto.app.app import App
from zcproto.errors import NotFound
from zcproto.server.state import PART_BITS


def two_methods() -> App:
    app = App()

    @app.method("quick")
    def quick() -> int:
        return 1

    @app.method("bad")
    def bad() -> int:
        raise NotFound("no such thing")

    return app


def test_timed_read_is_answered_normally(serve: Serve) -> None:
    app = two_methods()
    quick, bad = list(app)
    server = serve(app)
    with server.client("ada") as client:
        began = time.perf_counter()
        for _ in range(20):
            server.in_loop(lambda: setattr(server.server.state, "timed_part", -1))
            assert client.call("quick") == 1
        with pytest.raises(AnsweredError):
            client.call("bad")
        server.in_loop(lambda: setattr(server.server.state, "timed_part", -1))
        refused = client.refused("no.such.method")
        assert "unknown method" in refused.message
    assert quick.calls == 20
    assert sum(quick.durations.counts) == 20
    assert 0 < quick.durations.total < time.perf_counter() - began
    assert bad.calls == 1
    assert sum(quick.waits.counts) == 0, "it never waits"


def test_one_read_per_interval_is_timed(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    app = two_methods()
    quick, _ = list(app)
    server = serve(app)
    clock, interval = type(server.server.state.clock), 1 << PART_BITS
    with server.client("ada") as client:
        begin = (server.server.state.clock.wall() // interval + 1) * interval
        for offset, timed in [(0, 1), (1, 1), (interval - 1, 1), (interval, 2), (0, 3), (interval, 4)]:
            monkeypatch.setattr(clock, "wall", lambda _, wall=begin + offset: wall)
            client.call("quick", timestamp=begin + offset)
            assert sum(quick.durations.counts) == timed
    assert quick.calls == 6


def test_every_waiting_call_is_measured(serve: Serve) -> None:
    server = serve()
    with server.client("ada") as client:
        sleep = server.server.state.methods["sleep"]
        before, began = sum(sleep.waits.counts), time.perf_counter()
        for _ in range(10):
            client.call("sleep", {"ms": 2})  # timers of the loop may be a millisecond early
        client.call("sleep", {"ms": 0}, meta={"idempotency_key": "a"})
        assert sum(sleep.waits.counts) - before == 11
        assert 0.01 <= sleep.waits.total < time.perf_counter() - began
