"""Streams of the load: items are verified and timed, and every fault is counted."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from tests.helpers import until
from tests.limits import TIMEOUT
from tests.load.helpers import RecordingView, all_phases, plan_for, share, timing_out, users
from tests.server.conftest import Serve
from zcproto.app.app import App, default_app
from zcproto.common.parameters import Ended
from zcproto.errors import Aborted
from zcproto.load.generator import Generator, LoadStream, opening_times
from zcproto.load.hdr import write_file
from zcproto.load.plan import Target
from zcproto.load.record import Record, RequestKind, merge_records
from zcproto.load.report import as_json, figures
from zcproto.load.result import Verdict
from zcproto.load.run import Stop, run

STREAM = {"stream": "repeat", "items_per_stream": 10, "interval_s": 0.01}


def expect(count: int = 3) -> tuple[LoadStream, list[dict[str, Any]]]:
    """Return a stream of some items, and what they are."""
    part = share(items_per_stream=count, stream="repeat", interval_s=0.5)
    stream = LoadStream(part, 7, b"data", 100.0)
    first = stream.params["n"]
    return stream, [{"n": first + number, "data": b"data"} for number in range(count)]


@pytest.mark.parametrize(("rate", "intervals"), [(5.0, 1), (1_250.0, 1), (5_000.0, 4)])
def test_streams_open_evenly_over_whole_intervals(rate: float, intervals: int) -> None:
    part = share(stream="repeat", rate=rate, interval_s=10 / rate, processes=2)
    times = [*opening_times(part, 10)]
    phases = sorted(each % part.interval_s for each in times)
    assert times[-1] == pytest.approx(9 * intervals / rate)
    assert len({round(phase, 9) for phase in phases}) == 10 / math.gcd(10, intervals)


def test_all_items_in_order_and_the_result_complete_a_stream() -> None:
    stream, items = expect()
    assert [stream.next_due for item in items if stream.take(item)] == [100.5, 101.0, 101.5]
    assert stream.missing == 0
    assert stream.is_complete({"items": 3})
    assert not stream.is_complete({"items": 2})


@pytest.mark.parametrize(
    ("order", "missing"),
    [((0, 1), 1), ((0, 2), 1), ((0, 2, 1), 0), ((0, 1, 1), 0), ((0, 1, 2, 2), 0), ((), 3)],
    ids=["last one lost", "lost", "reordered", "doubled", "one too many", "none"],
)
def test_lost_reordered_and_doubled_items_are_found(order: tuple[int, ...], missing: int) -> None:
    stream, items = expect()
    for number in order:
        stream.take(items[number])
    assert stream.missing == missing
    assert not stream.is_complete({"items": 3})


def test_item_of_another_stream_is_wrong() -> None:
    stream, items = expect()
    assert not stream.take({**items[0], "data": b"other"})
    assert not LoadStream(share(items_per_stream=3), 8, b"data", 0.0).take(items[0])
    assert not stream.take(None)


async def test_streams_are_verified_and_timed(serve: Serve) -> None:
    server = serve()
    generator = Generator(share(server, **STREAM, pipeline=2), asyncio.get_running_loop())
    await generator.connect()
    await generator.load()
    record = generator.record
    assert server.stats["requests"] == record.requests_sent == 4 + 8
    await generator.verify()
    assert generator.progress() == {"connect": 4, "load": 80, "verify": 4, "failed": 0}
    await generator.close()
    tally = record.tallies[RequestKind.LOAD]
    assert (tally.planned, tally.sent, tally.equal, tally.failed) == (8, 8, 8, 0)
    assert (record.items.planned, record.items.sent, record.items.equal, record.items.failed) == (
        80,
        80,
        80,
        0,
    )
    assert {name: each.total for name, each in record.latencies.items() if each.total} == {
        "handshake": 4, "session_open": 4, "first_item": 8, "item": 80, "between_items": 72, "last_request": 4,
        "arrival_lag": 4, "lag": 8,
    }  # fmt: skip
    assert sum(each.total for each in record.request_by_second.values()) == 80
    assert record.load_ended > record.load_started > 0
    assert merge_records([Record.from_json(record.as_json()), Record()]).as_json() == record.as_json()
    server.until_left()


async def test_stream_of_an_application_is_timed_as_a_request(serve: Serve) -> None:
    app = App()

    @app.method
    async def chat(prompt: str) -> AsyncIterator[str | Ended[int]]:
        for word in prompt.split():
            yield word
        yield Ended(3)

    server = serve(app)
    targets = [
        Target("chat", {"prompt": "one two three"}, (expected,), is_stream=True) for expected in (3, 4)
    ]
    right, wrong = [await run(plan_for(server, target=target), RecordingView(), Stop()) for target in targets]
    assert right.verdict is Verdict.VERIFIED
    load = right.record.tallies[RequestKind.LOAD]
    totals = {name: right.record.latencies[name].total for name in ("request", "first_item", "between_items")}
    assert totals == {"request": load.equal, "first_item": load.equal, "between_items": 2 * load.equal}
    assert [*as_json(right, {}, 0.0)["latency_ms"]].count("first_item") == 1
    assert "item" not in as_json(right, {}, 0.0)["latency_ms"]
    assert (wrong.verdict, wrong.record.latencies["request"].total) == (Verdict.FAILED, 0)


def app_with(repeat: Callable[..., Any]) -> App:
    app = App()
    for method in default_app():
        if method.name != "repeat":
            app.add(method)
    app.method("repeat")(repeat)
    return app


async def lost(n: int, data: bytes, count: int, interval: float) -> AsyncIterator[Any]:
    for number in range(count - 1):
        yield {"n": n + number, "data": data}
    yield Ended({"items": count})


async def reordered(n: int, data: bytes, count: int, interval: float) -> AsyncIterator[Any]:
    for number in (*range(count - 2), count - 1, count - 2):
        yield {"n": n + number, "data": data}
    yield Ended({"items": count})


async def ended(n: int, data: bytes, count: int, interval: float) -> AsyncIterator[Any]:
    yield {"n": n, "data": data}
    raise Aborted("enough")


async def unary(n: int, data: bytes, count: int, interval: float) -> Any:
    return {"items": count}


async def stuck(n: int, data: bytes, count: int, interval: float) -> AsyncIterator[Any]:
    yield {"n": n, "data": data}
    await asyncio.sleep(TIMEOUT)


@pytest.mark.parametrize(
    ("method", "outcome", "errors"),
    [
        (lost, (36, 0, 4), {}),
        (reordered, (32, 8, 0), {}),
        (ended, (4, 0, 36), {"ABORTED": 4}),
        (unary, (0, 0, 40), {"FAILED_PRECONDITION": 4}),
        (stuck, (4, 0, 36), {}),
    ],
)
async def test_faults_of_streams_are_counted(
    serve: Serve, method: Callable[..., Any], outcome: tuple[int, int, int], errors: dict[str, int]
) -> None:
    generator = Generator(share(serve(app_with(method)), **STREAM), asyncio.get_running_loop())
    items, tally = generator.record.items, generator.record.tallies[RequestKind.LOAD]
    with timing_out(generator, lambda: method is stuck and items.equal == 4):
        await all_phases(generator)
    assert (items.equal, items.unequal, items.lost) == outcome
    assert (tally.equal, tally.failed) == (0, 4)
    assert tally.errors == errors


async def test_server_without_streams_gets_none(serve: Serve) -> None:
    generator = Generator(share(serve(streams__max_open=0), **STREAM), asyncio.get_running_loop())
    await all_phases(generator)
    assert generator.record.tallies[RequestKind.LOAD].not_sent == {"the server has no streams": 4}
    assert generator.record.items.not_sent == {"its stream could not be opened": 40}


async def test_lost_connection_loses_the_items_of_its_stream(serve: Serve) -> None:
    server = serve()
    generator = Generator(share(server, **{**STREAM, "interval_s": 60.0}), asyncio.get_running_loop())
    await generator.connect()
    loading = asyncio.create_task(generator.load())
    await until(lambda: generator.record.items.equal == 4)
    server.in_loop(lambda: [each.abort("test") for each in [*server.server.state.connections]])
    await loading
    assert generator.record.items.lost == 36
    await generator.verify()
    await generator.close()


async def test_run_with_streams_from_two_processes_is_verified(serve: Serve, tmp_path: Any) -> None:
    server = serve()
    view = RecordingView()
    made = plan_for(server, stream="repeat", processes=2, credentials=users(3), sessions=9, rate=300.0)
    result = await run(made, view, Stop())
    assert result.reasons() == []
    assert result.verdict is Verdict.VERIFIED
    assert result.record.items.equal == made.load == 10 * made.items_per_stream == 80
    assert ("load", "loading", 80) in view.phases
    assert result.counted()[-1][:4] == ("items", 80, 80, 80)
    value = as_json(result, {}, 1_800_000_000.0)
    assert value["items"]["equal"] == 80
    assert value["latency_ms"]["first_item"]["count"] == 10
    assert value["latency_ms"]["between_items"]["count"] == 70
    assert "request" not in value["latency_ms"]
    assert value["rate_per_s"]["items"]["asked"] == 300.0
    measured = {each.key for each in figures(result, {}) if each.value is not None}
    assert {"first_item_p99_ms", "item_p99_ms", "between_items_p99_ms", "item_cpu_us"} <= measured
    write_file(tmp_path / "run.hlog", result.record, 0.0)
    text = (tmp_path / "run.hlog").read_text()
    assert "Tag=first_item," in text
    assert "Tag=between_items," in text
    write_file(tmp_path / "run.hgrm", result.record, 0.0)
    assert "TotalCount     =       80.000" in (tmp_path / "run.hgrm").read_text()
