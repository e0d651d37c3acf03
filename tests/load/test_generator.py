"""The generator against real servers: every outcome of requests, streams and connections is counted."""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple

import pytest

from tests.helpers import until
from tests.limits import TIMEOUT
from tests.load.helpers import all_phases, app_with, share, timing_out
from tests.server.conftest import Serve
from tests.server.helpers import KEY, ServerThread
from zcproto.app.app import App, Method, default_app
from zcproto.common.parameters import Ended
from zcproto.errors import Aborted
from zcproto.load import generator as module
from zcproto.load.generator import Generator, LoadStream, PendingRequest, Stage, code_name, opening_times
from zcproto.load.record import Record, RequestKind, merge_records

OPEN, JOIN, LOAD, LAST, CLOSE = (
    getattr(RequestKind, name) for name in ("OPEN", "JOIN", "LOAD", "LAST", "CLOSE")
)
STREAM = {"stream": "repeat", "items_per_stream": 10, "interval_s": 0.01}


class ServedGenerator(Generator):
    """A generator with its server."""

    server: ServerThread


Generate = Callable[..., ServedGenerator]


@pytest.fixture
def generate(serve: Serve) -> Generate:
    """Return a function that starts a server, by default the usual one, and makes a generator for it.

    Names with two underscores are settings of the server, the others change the share.
    """

    def make(app: App | None = None, **changes: Any) -> ServedGenerator:
        settings = {name: changes.pop(name) for name in [*changes] if "__" in name}
        server = serve(app, **settings)
        made = ServedGenerator(share(server, **changes), asyncio.get_running_loop())
        made.server = server
        return made

    return make


def sharing(connections: int, key: str = KEY, **changes: Any) -> dict[str, Any]:
    """Let so many connections share one session."""
    return {"connections": connections, "credentials": [["user-1", key]], **changes}


async def test_generator_run_is_verified_and_leaves_nothing(generate: Generate) -> None:
    generator = generate()
    server, record = generator.server, generator.record
    await generator.connect()
    assert (record.ready, record.sessions) == (4, 4)
    assert server.stats["connections"] == server.stats["sessions"] == 4
    await generator.load()
    await generator.verify()
    assert generator.progress() == {"connect": 4, "load": 40, "verify": 4, "failed": 0}
    assert server.stats["requests"] == record.requests_sent == 4 + 40 + 4
    await generator.close()
    for kind, count in ((OPEN, 4), (LOAD, 40), (LAST, 4), (CLOSE, 4)):
        tally = record.tallies[kind]
        assert (tally.planned, tally.sent, tally.equal, tally.failed) == (count, count, count, 0)
    assert {name: each.total for name, each in record.latencies.items() if each.total} == {
        "handshake": 4, "session_open": 4, "request": 40, "from_send": 40, "last_request": 4,
        "arrival_lag": 4, "lag": 40,
    }  # fmt: skip
    assert sum(each.total for each in record.request_by_second.values()) == 40
    assert sum(record.answered_over_time.values()) == 44
    assert sum(record.connected_over_time.values()) == 4
    assert record.load_ended > record.load_started > 0
    assert record.cpu_share > 0
    server.until_left()
    assert server.stats["sessions"] == 0


async def test_streams_are_verified_and_timed(generate: Generate) -> None:
    generator = generate(**STREAM, pipeline=2)
    server, record = generator.server, generator.record
    await generator.connect()
    await generator.load()
    assert server.stats["requests"] == record.requests_sent == 4 + 8
    await generator.verify()
    assert generator.progress() == {"connect": 4, "load": 80, "verify": 4, "failed": 0}
    await generator.close()
    for tally, count in ((record.tallies[LOAD], 8), (record.items, 80)):
        assert (tally.planned, tally.sent, tally.equal, tally.failed) == (count, count, count, 0)
    assert {name: each.total for name, each in record.latencies.items() if each.total} == {
        "handshake": 4, "session_open": 4, "first_item": 8, "item": 80, "between_items": 72, "last_request": 4,
        "arrival_lag": 4, "lag": 8,
    }  # fmt: skip
    assert sum(each.total for each in record.request_by_second.values()) == 80
    assert record.load_ended > record.load_started > 0
    assert merge_records([Record.from_json(record.as_json()), Record()]).as_json() == record.as_json()
    server.until_left()


# --- outcomes of requests and streams -------------------------------------------------------------------------


def right(n: int, data: bytes) -> dict[str, Any]:
    return {"n": n, "data": data}


def one_is_wrong(n: int, data: bytes) -> dict[str, Any]:
    return right(n, data[:-1] + b"\0" if n == 3 else data)


class OfAnother:
    """Each answer is that of the request before."""

    def __init__(self) -> None:
        self.kept: list[dict[str, Any]] = []

    def __call__(self, n: int, data: bytes) -> dict[str, Any]:
        self.kept.append(right(n, data))
        return self.kept[max(len(self.kept) - 2, 0)]


def half_fails(n: int, data: bytes) -> dict[str, Any]:
    if n % 2:
        raise Aborted("not this one")
    return right(n, data)


async def slow(n: int, data: bytes) -> dict[str, Any]:
    await asyncio.sleep(0.05)
    return right(n, data)


def empty(**params: Any) -> dict[str, Any]:
    return {}


class Outcome(NamedTuple):
    """What becomes of a whole load."""

    echo: Callable[..., Any]
    changes: dict[str, Any]
    tallies: dict[RequestKind, dict[str, Any]]
    lost: dict[str, int] = {}  # noqa: RUF012 - not changed


OUTCOMES = {
    "one wrong answer": Outcome(
        one_is_wrong, {"seed": 5}, {LOAD: {"sent": 40, "equal": 39, "unequal": 1, "failed": 1}}
    ),
    "answers of other requests": Outcome(OfAnother(), {}, {LOAD: {"unequal": 39}, LAST: {"equal": 0}}),
    "errors": Outcome(half_fails, {}, {LOAD: {"equal": 20, "errors": {"ABORTED": 20}}}),
    "large payload": Outcome(right, {"payload_bytes": 100_000}, {LOAD: {"equal": 40}}),
    "payload above the server's limit": Outcome(
        right,
        {"limits__max_frame_bytes": 20_000, "payload_bytes": 30_000, "rate": 50.0},
        {
            LOAD: {"not_sent": {"larger than the server accepts": 5}},
            LAST: {"not_sent": {"larger than the server accepts": 4}},
        },
    ),
    "more requests in flight than permitted": Outcome(
        slow,
        {"limits__max_streams": 2, "pipeline": 5, "rate": 100.0, "duration_s": 0.05},
        {
            LOAD: {
                **{"planned": 5, "sent": 2, "equal": 2},
                "not_sent": {"too many requests in flight on the connection": 3},
            }
        },
    ),
    "fewer sessions than connections": Outcome(
        right,
        {"connections": 7, "credentials": [["user-1", KEY]] * 2},
        {OPEN: {"equal": 2}, JOIN: {"equal": 5}, LAST: {"equal": 7}, CLOSE: {"equal": 2}},
    ),
    # all connect at once, so the session is not open when the other handshakes are complete
    "shared session that opens late": Outcome(
        right, sharing(20, arrival_rate=1e6), {JOIN: {"equal": 19}, LAST: {"equal": 20}}
    ),
    "a wrong key": Outcome(
        right,
        {"credentials": [["user-1", KEY], ["user-2", "wrong"], ["user-3", KEY], ["user-4", KEY]]},
        {OPEN: {"errors": {"UNAUTHENTICATED": 1}}, LAST: {"equal": 3}},
        {"no session: UNAUTHENTICATED": 1},
    ),
    "wrong keys only": Outcome(
        right,
        {"credentials": [["user-1", "wrong"]] * 4},
        {LOAD: {"planned": 0}, LAST: {"not_sent": {"the connection was lost": 4}}},
        {"no session: UNAUTHENTICATED": 4},
    ),
    **{
        f"refused session that is shared, {rate:g} connections a second": Outcome(
            right,
            sharing(3, "wrong", arrival_rate=rate),
            {LAST: {"equal": 0}},
            {"no session: UNAUTHENTICATED": 1, "its session could not be opened": 2},
        )
        for rate in (1e6, 20.0)
    },
    "shared session with a wrong first answer": Outcome(
        empty, sharing(2), {JOIN: {"equal": 0}}, {"its first answer differs from the request": 1}
    ),
}


@pytest.mark.parametrize("outcome", OUTCOMES.values(), ids=OUTCOMES)
async def test_outcome_of_requests_is_counted(generate: Generate, outcome: Outcome) -> None:
    generator = generate(app_with(outcome.echo), **outcome.changes)
    await all_phases(generator)
    record = generator.record
    for kind, expected in outcome.tallies.items():
        tally = record.tallies[kind]
        assert {name: getattr(tally, name) for name in expected} == expected
    assert record.lost_connections == outcome.lost
    assert "wrong" not in str(record.as_json())


async def lost(n: int, data: bytes, count: int, interval: float) -> AsyncIterator[Any]:
    for number in range(count - 1):
        yield right(n + number, data)
    yield Ended({"items": count})


async def reordered(n: int, data: bytes, count: int, interval: float) -> AsyncIterator[Any]:
    for number in (*range(count - 2), count - 1, count - 2):
        yield right(n + number, data)
    yield Ended({"items": count})


async def ended(n: int, data: bytes, count: int, interval: float) -> AsyncIterator[Any]:
    yield right(n, data)
    raise Aborted("enough")


async def unary(n: int, data: bytes, count: int, interval: float) -> Any:
    return {"items": count}


async def stuck(n: int, data: bytes, count: int, interval: float) -> AsyncIterator[Any]:
    yield right(n, data)
    await asyncio.sleep(TIMEOUT)


@pytest.mark.parametrize(
    ("method", "items", "errors"),
    [
        (lost, (36, 0, 4), {}),
        (reordered, (32, 8, 0), {}),
        (ended, (4, 0, 36), {"ABORTED": 4}),
        (unary, (0, 0, 40), {"FAILED_PRECONDITION": 4}),
        (stuck, (4, 0, 36), {}),
    ],
)
async def test_faults_of_streams_are_counted(
    generate: Generate, method: Callable[..., Any], items: tuple[int, int, int], errors: dict[str, int]
) -> None:
    app = App()
    for each in default_app():
        if each.name != "repeat":
            app.add(each)
    app.method("repeat")(method)
    generator = generate(app, **STREAM)
    found, tally = generator.record.items, generator.record.tallies[LOAD]
    with timing_out(generator, lambda: method is stuck and found.equal == 4):
        await all_phases(generator)
    assert (found.equal, found.unequal, found.lost) == items
    assert (tally.equal, tally.failed, tally.errors) == (0, 4, errors)


async def test_server_without_streams_gets_none(generate: Generate) -> None:
    generator = generate(streams__max_open=0, **STREAM)
    await all_phases(generator)
    assert generator.record.tallies[LOAD].not_sent == {"the server has no streams": 4}
    assert generator.record.items.not_sent == {"its stream could not be opened": 40}


@pytest.mark.parametrize("error", [None, Aborted("late")], ids=["answer", "error"])
async def test_late_answer_stays_lost(generate: Generate, error: Aborted | None) -> None:
    release = asyncio.Event()

    async def echo(n: int, data: bytes) -> dict[str, Any]:
        if n == 5:
            await release.wait()
            if error is not None:
                raise error
        return right(n, data)

    generator = generate(app_with(echo))
    await generator.connect()
    tally = generator.record.tallies[LOAD]
    with timing_out(generator, lambda: tally.equal == 39):
        await generator.load()
    assert tally.lost == 1
    generator.server.in_loop(release.set)
    await generator.verify()
    assert generator.record.tallies[LAST].equal == 4
    assert (tally.equal, tally.lost, tally.errors) == (39, 1, {})
    await generator.close()


async def test_pipeline_sets_the_requests_per_write(generate: Generate) -> None:
    generator = generate(pipeline=8, rate=800.0)
    await all_phases(generator)
    assert generator.record.tallies[LOAD].equal == 80
    assert generator.record.latencies["lag"].total == 10


async def test_request_numbers_are_unique_across_processes(serve: Serve) -> None:
    seen: list[int] = []

    def echo(n: int, data: bytes) -> dict[str, Any]:
        seen.append(n)
        return right(n, data)

    server = serve(app_with(echo))
    for number in (0, 1):
        part = share(server, number=number, processes=2)
        await all_phases(Generator(part, asyncio.get_running_loop()))
    assert len(set(seen)) == len(seen) == 88
    assert {number % 2 for number in seen} == {0, 1}


# --- a stream by itself ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "intervals"), [(5.0, 1), (1_250.0, 1), (5_000.0, 4)])
def test_streams_open_evenly_over_whole_intervals(rate: float, intervals: int) -> None:
    part = share(stream="repeat", rate=rate, interval_s=10 / rate, processes=2)
    times = [*opening_times(part, 10)]
    phases = sorted(each % part.interval_s for each in times)
    assert times[-1] == pytest.approx(9 * intervals / rate)
    assert len({round(phase, 9) for phase in phases}) == 10 / math.gcd(10, intervals)


@pytest.mark.parametrize(
    ("order", "missing"),
    [((0, 1, 2), 0), ((0, 1), 1), ((0, 2), 1), ((0, 2, 1), 0), ((0, 1, 1), 0), ((0, 1, 2, 2), 0), ((), 3)],
    ids=["all", "last one lost", "lost", "reordered", "doubled", "one too many", "none"],
)
def test_lost_reordered_and_doubled_items_are_found(order: tuple[int, ...], missing: int) -> None:
    part = share(items_per_stream=3, stream="repeat", interval_s=0.5)
    stream = LoadStream(part, 7, b"data", 100.0)
    items = [right(stream.params["n"] + number, b"data") for number in range(3)]
    due = [stream.next_due for number in order if stream.take(items[number])]
    assert due[:1] == [100.5][: len(order)]
    assert stream.missing == missing
    assert stream.is_complete({"items": 3}) is (order == (0, 1, 2))
    assert not stream.is_complete({"items": 2})
    other = LoadStream(part, 7, b"other", 100.0)
    assert not any(other.take(each) for each in (*items, None))


# --- connections that cannot be made --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "causes"),
    [
        (lambda **params: {"token": b"short"}, {"the answer to session.open has no token"}),
        ("hang up", {"truncated", "connection_reset"}),
    ],
    ids=["no token", "connection lost"],
)
async def test_failed_opening_of_a_session_is_counted(
    generate: Generate, method: Any, causes: set[str]
) -> None:
    generator = generate()
    state = generator.server.server.state

    def hang_up(**params: Any) -> None:
        for each in [*state.connections]:
            each.abort("test")

    opening = Method("session.open", hang_up if method == "hang up" else method, public=True)
    generator.server.in_loop(lambda: state.methods.update({"session.open": opening}))
    await generator.connect()
    record = generator.record
    assert sum(record.lost_connections.values()) == 4
    assert record.lost_connections.keys() <= causes
    assert record.tallies[OPEN].unequal == (0 if method == "hang up" else 4)
    assert (record.ready, record.connected_over_time) == (0, {})
    await generator.close()


async def test_connection_lost_while_waiting_does_not_join(generate: Generate) -> None:
    """No server can be made to lose it between the two; the steps are called."""
    generator = generate(**sharing(2))
    owner, other = generator.connections
    generator._joining[0] = [other]
    generator._fail(other, "truncated")
    generator._handle_opened(owner, PendingRequest(OPEN, 0, 0.0, 0.0), {"token": b"t" * 32})
    assert generator.record.ready == 1
    assert generator.record.tallies[JOIN].planned == 0
    await generator.close()


async def test_refused_and_untrusted_servers_get_no_requests(serve: Serve) -> None:
    server = serve()
    part = share(server=None, port=server.port)
    for cause in ("TLS: certificate_untrusted", "TCP: Connection refused"):
        generator = Generator(part, asyncio.get_running_loop())
        await all_phases(generator)
        assert generator.record.lost_connections == {cause: 4}
        if cause.startswith("TLS"):
            assert server.stats["connections_opened"] == 0
            await asyncio.to_thread(server.drain)


async def test_silent_server_times_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        part = share(server=None, port=listening.getsockname()[1], connect_timeout_s=0.2)
        generator = Generator(part, asyncio.get_running_loop())
        await all_phases(generator)
    assert sum(generator.record.lost_connections.values()) == 4
    assert generator.record.lost_connections.keys() <= {
        *("TLS: handshake_timeout", "no session in time"),
        "no TCP connection in time",  # on a busy machine
    }


async def test_tcp_connect_timeout_is_counted(generate: Generate, monkeypatch: pytest.MonkeyPatch) -> None:
    generator, loop = generate(connect_timeout_s=0.1), asyncio.get_running_loop()

    async def never(*_: Any, **__: Any) -> None:
        await loop.create_future()

    monkeypatch.setattr(loop, "create_connection", never)
    await generator.connect()
    assert sum(generator.record.lost_connections.values()) == 4
    await generator.close()


async def test_concurrent_connects_are_limited(generate: Generate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CONNECTING", 2)
    generator = generate(connections=9, arrival_rate=1e6, credentials=[["user-1", KEY]] * 9)
    most, connect = 0, generator._open

    async def watched(connection: Any) -> None:
        nonlocal most
        most = max(most, len(generator._connecting))
        await connect(connection)

    monkeypatch.setattr(generator, "_open", watched)
    await generator.connect()
    assert (generator.record.ready, most) == (9, 2)
    # The delay of those that had to wait is measured.
    assert generator.record.latencies["arrival_lag"].max_us > 500
    await generator.close()


# --- connections that end early -------------------------------------------------------------------------------


async def test_requests_of_ending_and_lost_connections_are_not_sent(generate: Generate) -> None:
    generator = generate()
    server, record = generator.server, generator.record
    await generator.connect()
    server.in_loop(lambda: [each.abort("test") for each in [*server.server.state.connections][:2]])
    await until(lambda: record.ready == 2)
    await generator.load()
    assert record.tallies[LOAD].equal == 40  # the load uses the remaining connections
    next(each for each in generator.connections if each.stage is Stage.READY).close()
    await generator.verify()
    assert record.lost_connections in ({"truncated": 2}, {"connection_reset": 2})
    assert record.tallies[LAST].not_sent == {"the connection was lost": 2, "the connection is ending": 1}
    assert record.tallies[LAST].equal == 1
    assert generator.progress()["failed"] == 5
    await generator.close()


async def test_connections_lost_under_load_lose_their_requests(generate: Generate) -> None:
    seen: list[int] = []

    async def echo(n: int, data: bytes) -> dict[str, Any]:
        seen.append(n)
        if len(seen) == 10:
            for each in [*generator.server.server.state.connections]:
                each.abort("test")
        return right(n, data)

    generator = generate(app_with(echo))
    await all_phases(generator)
    record, tally = generator.record, generator.record.tallies[LOAD]
    assert tally.planned == 40
    assert tally.equal < 11
    assert tally.lost >= 1
    assert tally.equal + tally.lost + sum(tally.not_sent.values()) == 40
    assert sum(record.lost_connections.values()) == 4
    assert (record.ready, sum(record.connected_over_time.values())) == (0, 0)


async def test_lost_connection_loses_the_items_of_its_stream(generate: Generate) -> None:
    generator = generate(**{**STREAM, "interval_s": 60.0})
    server = generator.server
    await generator.connect()
    loading = asyncio.create_task(generator.load())
    await until(lambda: generator.record.items.equal == 4)
    server.in_loop(lambda: [each.abort("test") for each in [*server.server.state.connections]])
    await loading
    assert generator.record.items.lost == 36
    await generator.verify()
    await generator.close()


async def test_drained_connections_are_lost_with_their_cause(generate: Generate) -> None:
    generator = generate()
    await generator.connect()
    await asyncio.to_thread(generator.server.drain)
    await generator.verify()
    assert generator.record.lost_connections == {"closed by the server": 4}
    await generator.close()


@pytest.mark.parametrize("phase", ["connect", "load"])
async def test_stopped_phase_ends_and_sessions_are_closed(generate: Generate, phase: str) -> None:
    is_connecting = phase == "connect"
    many = {"connections": 1_000, "arrival_rate": 10.0, "credentials": [["user-1", KEY]] * 1_000}
    generator = generate(**(many if is_connecting else {"duration_s": 60.0}))
    record = generator.record
    if not is_connecting:
        await generator.connect()
    running = asyncio.create_task(getattr(generator, phase)())
    await until(lambda: record.ready >= 2 if is_connecting else record.tallies[LOAD].equal > 10)
    generator.stop()
    await running
    assert record.ready < 1_000
    assert record.tallies[LOAD].sent < 400 * 60
    await generator.load()
    await generator.verify()  # both are skipped
    assert record.tallies[LAST].sent == 0
    await generator.close()
    assert record.tallies[CLOSE].equal == record.sessions >= 2
    generator.server.until_left()
    assert generator.server.stats["sessions"] == 0


async def test_stop_before_the_start_skips_all_phases(generate: Generate) -> None:
    generator = generate()
    generator.stop()
    await all_phases(generator)
    assert generator.record.requests_sent == 0


async def test_connection_made_after_close_is_closed(generate: Generate) -> None:
    """The steps are called: no server can be made to complete a handshake at this moment."""
    generator = generate(**sharing(1))
    server, (connection,) = generator.server, generator.connections
    generator._arrive(connection, 0.0)
    connection.close()
    generator._fail(connection, "no session in time")
    await until(lambda: server.stats["handshakes_completed"] == 1)
    await generator.close()
    server.until_left()
    assert connection.stage is Stage.OVER
    assert generator.record.latencies["handshake"].total == 0


def test_unknown_code_is_shown_by_number() -> None:
    assert code_name(16) == "UNAUTHENTICATED"
    assert code_name(99) == "CODE_99"
