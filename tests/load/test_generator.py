"""The generator against a real server: a whole run, wrong answers, and requests that cannot be sent."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.helpers import until
from tests.load.helpers import all_phases, app_with, share, timing_out
from tests.server.conftest import Serve
from tests.server.helpers import KEY, ServerThread
from zcproto.errors import Aborted
from zcproto.load.generator import Generator
from zcproto.load.record import RequestKind


async def test_generator_run_is_verified_and_leaves_nothing(serve: Serve) -> None:
    server = serve()
    generator = Generator(share(server), asyncio.get_running_loop())
    await generator.connect()
    assert (generator.record.ready, generator.record.sessions) == (4, 4)
    assert server.stats["connections"] == server.stats["sessions"] == 4
    await generator.load()
    await generator.verify()
    assert generator.progress() == {"connect": 4, "load": 40, "verify": 4, "failed": 0}
    assert server.stats["requests"] == generator.record.requests_sent == 4 + 40 + 4
    await generator.close()
    record = generator.record
    for kind, count in (
        (RequestKind.OPEN, 4),
        (RequestKind.LOAD, 40),
        (RequestKind.LAST, 4),
        (RequestKind.CLOSE, 4),
    ):
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


async def test_fewer_sessions_than_connections_are_shared(serve: Serve) -> None:
    server = serve()
    few = share(server, connections=7, credentials=[["user-1", KEY], ["user-1", KEY]])
    generator = Generator(few, asyncio.get_running_loop())
    await generator.connect()
    assert (generator.record.ready, generator.record.sessions) == (7, 2)
    assert (server.stats["connections"], server.stats["sessions"]) == (7, 2)
    assert generator.record.tallies[RequestKind.JOIN].equal == 5
    await generator.load()
    await generator.verify()
    assert generator.record.tallies[RequestKind.LAST].equal == 7
    await generator.close()
    assert generator.record.tallies[RequestKind.CLOSE].equal == 2
    assert generator.record.lost_connections == {}
    server.until_left()


async def test_sharing_connection_waits_for_the_session(serve: Serve) -> None:
    server = serve()
    # All connect at once, so the session is not open when the other handshakes are complete.
    crowd = share(server, connections=20, credentials=[["user-1", KEY]], arrival_rate=1e6)
    generator = Generator(crowd, asyncio.get_running_loop())
    await generator.connect()
    assert generator.record.ready == 20
    await generator.close()


async def test_pipeline_sets_the_requests_per_write(serve: Serve) -> None:
    seen: list[int] = []

    def echo(**params: Any) -> dict[str, Any]:
        seen.append(params["n"])
        return params

    server = serve(app_with(echo))
    generator = Generator(share(server, pipeline=8, rate=800.0), asyncio.get_running_loop())
    await all_phases(generator)
    assert generator.record.tallies[RequestKind.LOAD].equal == 80
    assert generator.record.latencies["lag"].total == 10
    assert len(set(seen)) == len(seen) == 84


async def test_request_numbers_are_unique_across_processes(serve: Serve) -> None:
    seen: list[int] = []

    def echo(**params: Any) -> dict[str, Any]:
        seen.append(params["n"])
        return params

    server = serve(app_with(echo))
    for number in (0, 1):
        part = share(server, number=number, processes=2)
        await all_phases(Generator(part, asyncio.get_running_loop()))
    assert len(set(seen)) == len(seen) == 88
    assert {number % 2 for number in seen} == {0, 1}


async def test_load_with_large_payload_ends(serve: Serve) -> None:
    generator = Generator(share(serve(), payload_bytes=100_000), asyncio.get_running_loop())
    await all_phases(generator)
    assert generator.record.tallies[RequestKind.LOAD].equal == 40


# --- wrong answers ----------------------------------------------------------------------------------------


async def test_wrong_answer_is_unequal(serve: Serve) -> None:
    def echo(n: int, data: bytes) -> dict[str, Any]:
        return {"n": n, "data": data[:-1] + b"\0" if n == 3 else data}

    generator = Generator(share(serve(app_with(echo)), seed=5), asyncio.get_running_loop())
    await all_phases(generator)
    tally = generator.record.tallies[RequestKind.LOAD]
    assert (tally.sent, tally.equal, tally.unequal, tally.failed) == (40, 39, 1, 1)


async def test_answers_of_another_request_are_unequal(serve: Serve) -> None:
    kept: list[dict[str, Any]] = []

    def echo(**params: Any) -> dict[str, Any]:
        kept.append(params)
        return kept[max(len(kept) - 2, 0)]

    generator = Generator(share(serve(app_with(echo))), asyncio.get_running_loop())
    await all_phases(generator)
    assert generator.record.tallies[RequestKind.LOAD].unequal == 39
    assert generator.record.tallies[RequestKind.LAST].equal == 0


async def test_error_is_counted_by_its_code(serve: Serve) -> None:
    def echo(n: int, data: bytes) -> dict[str, Any]:
        if n % 2:
            raise Aborted("not this one")
        return {"n": n, "data": data}

    generator = Generator(share(serve(app_with(echo))), asyncio.get_running_loop())
    await all_phases(generator)
    assert generator.record.tallies[RequestKind.LOAD].errors == {"ABORTED": 20}
    assert generator.record.tallies[RequestKind.LOAD].equal == 20


async def test_late_answer_stays_lost(serve: Serve) -> None:
    release = asyncio.Event()

    async def echo(n: int, data: bytes) -> dict[str, Any]:
        if n == 5:
            await release.wait()
        return {"n": n, "data": data}

    server = serve(app_with(echo))
    generator = Generator(share(server), asyncio.get_running_loop())
    await generator.connect()
    tally = generator.record.tallies[RequestKind.LOAD]
    with timing_out(generator, lambda: tally.equal == 39):
        await generator.load()
    assert tally.lost == 1
    server.in_loop(release.set)
    await generator.verify()
    assert generator.record.tallies[RequestKind.LAST].equal == 4
    assert tally.equal == 39
    await generator.close()


async def test_late_error_stays_lost(serve: Serve) -> None:
    release = asyncio.Event()

    async def echo(n: int, data: bytes) -> dict[str, Any]:
        if n == 5:
            await release.wait()
            raise Aborted("late")
        return {"n": n, "data": data}

    server = serve(app_with(echo))
    generator = Generator(share(server), asyncio.get_running_loop())
    await generator.connect()
    tally = generator.record.tallies[RequestKind.LOAD]
    with timing_out(generator, lambda: tally.equal == 39):
        await generator.load()
    server.in_loop(release.set)
    await generator.verify()
    assert tally.lost == 1
    assert tally.errors == {}
    await generator.close()


# --- requests that cannot be sent -----------------------------------------------------------------------


async def test_requests_beyond_max_streams_are_not_sent(serve: Serve) -> None:
    async def echo(n: int, data: bytes) -> dict[str, Any]:
        await asyncio.sleep(0.05)
        return {"n": n, "data": data}

    server = serve(app_with(echo), limits__max_streams=2)
    generator = Generator(share(server, pipeline=5, rate=100.0, duration_s=0.05), asyncio.get_running_loop())
    await all_phases(generator)
    tally = generator.record.tallies[RequestKind.LOAD]
    assert (tally.planned, tally.sent, tally.equal) == (5, 2, 2)
    assert tally.not_sent == {"too many requests in flight on the connection": 3}


async def test_oversized_payload_is_not_sent(serve: Serve) -> None:
    server = serve(limits__max_frame_bytes=20_000)
    generator = Generator(share(server, payload_bytes=30_000, rate=50.0), asyncio.get_running_loop())
    await all_phases(generator)
    assert generator.record.tallies[RequestKind.LOAD].not_sent == {"larger than the server accepts": 5}
    assert generator.record.tallies[RequestKind.LAST].not_sent == {"larger than the server accepts": 4}


async def test_request_on_ending_connection_is_not_sent(serve: Serve) -> None:
    generator = Generator(share(serve()), asyncio.get_running_loop())
    await generator.connect()
    generator.connections[0].close()
    await generator.verify()
    assert generator.record.tallies[RequestKind.LAST].not_sent == {"the connection is ending": 1}
    assert generator.record.tallies[RequestKind.LAST].equal == 3
    await generator.close()


async def test_requests_of_lost_connections_are_not_sent(serve: Serve) -> None:
    server = serve()
    generator = Generator(share(server), asyncio.get_running_loop())
    await generator.connect()
    server.in_loop(lambda: [each.abort("test") for each in [*server.server.state.connections][:3]])
    await until(lambda: generator.record.ready == 1)
    await generator.load()
    await generator.verify()
    assert generator.record.lost_connections in ({"truncated": 3}, {"connection_reset": 3})
    assert generator.record.tallies[RequestKind.LOAD].equal == 40  # the load uses the remaining connections
    assert generator.record.tallies[RequestKind.LAST].not_sent == {"the connection was lost": 3}
    assert generator.progress()["failed"] == 6
    await generator.close()
    assert generator.record.tallies[RequestKind.CLOSE].planned == 1


async def test_connections_lost_under_load_lose_their_requests(serve: Serve) -> None:
    seen: list[int] = []
    server: list[ServerThread] = []

    async def echo(n: int, data: bytes) -> dict[str, Any]:
        seen.append(n)
        if len(seen) == 10:
            for each in [*server[0].server.state.connections]:
                each.abort("test")
        return {"n": n, "data": data}

    server.append(serve(app_with(echo)))
    generator = Generator(share(server[0]), asyncio.get_running_loop())
    await all_phases(generator)
    tally = generator.record.tallies[RequestKind.LOAD]
    assert tally.planned == 40
    assert tally.equal < 11
    assert tally.lost >= 1
    assert tally.equal + tally.lost + sum(tally.not_sent.values()) == 40
    assert sum(generator.record.lost_connections.values()) == 4
    assert generator.record.ready == 0
    assert sum(generator.record.connected_over_time.values()) == 0


async def test_load_without_connections_sends_nothing(serve: Serve) -> None:
    generator = Generator(share(serve(), credentials=[["user-1", "wrong"]] * 4), asyncio.get_running_loop())
    await all_phases(generator)
    assert generator.record.tallies[RequestKind.LOAD].planned == 0
    assert generator.record.tallies[RequestKind.LAST].not_sent == {"the connection was lost": 4}


async def test_drained_connections_are_lost_with_their_cause(serve: Serve) -> None:
    server = serve()
    generator = Generator(share(server), asyncio.get_running_loop())
    await generator.connect()
    await asyncio.to_thread(server.drain)
    await generator.verify()
    assert generator.record.lost_connections == {"closed by the server": 4}
    await generator.close()
