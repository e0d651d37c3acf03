"""The generator against a real server: a whole run, and each answer that is not what was sent."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.load.conftest import Serve
from tests.load.helpers import all_phases, app_with, share, until
from tests.server.helpers import KEY, ServerThread
from zcproto.errors import Aborted
from zcproto.load.generator import Generator
from zcproto.load.tally import Kind

pytestmark = pytest.mark.usefixtures("short_limits")


async def test_a_whole_run_is_verified_and_leaves_nothing(serve: Serve) -> None:
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
    for kind, count in ((Kind.OPEN, 4), (Kind.LOAD, 40), (Kind.LAST, 4), (Kind.CLOSE, 4)):
        tally = record.tallies[kind]
        assert (tally.planned, tally.sent, tally.equal, tally.failed) == (count, count, count, 0)
    assert {name: each.total for name, each in record.latencies.items()} == {
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


async def test_with_fewer_sessions_than_connections_the_others_share_them(serve: Serve) -> None:
    server = serve()
    few = share(server, connections=7, credentials=[["user-1", KEY], ["user-1", KEY]])
    generator = Generator(few, asyncio.get_running_loop())
    await generator.connect()
    assert (generator.record.ready, generator.record.sessions) == (7, 2)
    assert (server.stats["connections"], server.stats["sessions"]) == (7, 2)
    assert generator.record.tallies[Kind.JOIN].equal == 5
    await generator.load()
    await generator.verify()
    assert generator.record.tallies[Kind.LAST].equal == 7
    await generator.close()
    assert generator.record.tallies[Kind.CLOSE].equal == 2
    assert generator.record.lost_links == {}
    server.until_left()


async def test_a_sharing_connection_waits_until_the_session_is_there(serve: Serve) -> None:
    server = serve()
    # All arrive at once, so the session is not open yet when the others have shaken hands.
    crowd = share(server, connections=20, credentials=[["user-1", KEY]], arrival_rate=1e6)
    generator = Generator(crowd, asyncio.get_running_loop())
    await generator.connect()
    assert generator.record.ready == 20
    await generator.close()


async def test_each_write_carries_as_many_requests_as_asked(serve: Serve) -> None:
    seen: list[int] = []

    def echo(**params: Any) -> dict[str, Any]:
        seen.append(params["n"])
        return params

    server = serve(app_with(echo))
    generator = Generator(share(server, pipeline=8, rate=800.0), asyncio.get_running_loop())
    await all_phases(generator)
    assert generator.record.tallies[Kind.LOAD].equal == 80
    assert generator.record.latencies["lag"].total == 10
    assert len(set(seen)) == len(seen) == 84


async def test_processes_never_use_the_same_number(serve: Serve) -> None:
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


async def test_a_load_ends_whatever_the_payload(serve: Serve) -> None:
    generator = Generator(share(serve(), payload_bytes=100_000), asyncio.get_running_loop())
    await all_phases(generator)
    assert generator.record.tallies[Kind.LOAD].equal == 40


# --- answers that are not what was sent -------------------------------------------------------------------


async def test_a_wrong_answer_is_unequal(serve: Serve) -> None:
    def echo(n: int, data: bytes) -> dict[str, Any]:
        return {"n": n, "data": data[:-1] + b"\0" if n == 3 else data}

    generator = Generator(share(serve(app_with(echo)), seed=5), asyncio.get_running_loop())
    await all_phases(generator)
    tally = generator.record.tallies[Kind.LOAD]
    assert (tally.sent, tally.equal, tally.unequal, tally.failed) == (40, 39, 1, 1)


async def test_answers_of_another_request_are_unequal(serve: Serve) -> None:
    kept: list[dict[str, Any]] = []

    def echo(**params: Any) -> dict[str, Any]:
        kept.append(params)
        return kept[max(len(kept) - 2, 0)]

    generator = Generator(share(serve(app_with(echo))), asyncio.get_running_loop())
    await all_phases(generator)
    assert generator.record.tallies[Kind.LOAD].unequal == 39
    assert generator.record.tallies[Kind.LAST].equal == 0


async def test_an_error_is_counted_by_its_code(serve: Serve) -> None:
    def echo(n: int, data: bytes) -> dict[str, Any]:
        if n % 2:
            raise Aborted("not this one")
        return {"n": n, "data": data}

    generator = Generator(share(serve(app_with(echo))), asyncio.get_running_loop())
    await all_phases(generator)
    assert generator.record.tallies[Kind.LOAD].errors == {"ABORTED": 20}
    assert generator.record.tallies[Kind.LOAD].equal == 20


async def test_a_missing_answer_is_lost_even_if_it_comes_later(serve: Serve) -> None:
    release = asyncio.Event()

    async def echo(n: int, data: bytes) -> dict[str, Any]:
        if n == 5:
            await release.wait()
        return {"n": n, "data": data}

    server = serve(app_with(echo))
    generator = Generator(share(server), asyncio.get_running_loop())
    await generator.connect()
    await generator.load()
    assert generator.record.tallies[Kind.LOAD].lost == 1
    server.in_loop(release.set)
    await generator.verify()
    assert generator.record.tallies[Kind.LAST].equal == 4
    assert generator.record.tallies[Kind.LOAD].equal == 39
    await generator.close()


async def test_a_late_error_changes_nothing_either(serve: Serve) -> None:
    release = asyncio.Event()

    async def echo(n: int, data: bytes) -> dict[str, Any]:
        if n == 5:
            await release.wait()
            raise Aborted("late")
        return {"n": n, "data": data}

    server = serve(app_with(echo))
    generator = Generator(share(server), asyncio.get_running_loop())
    await generator.connect()
    await generator.load()
    server.in_loop(release.set)
    await generator.verify()
    assert generator.record.tallies[Kind.LOAD].lost == 1
    assert generator.record.tallies[Kind.LOAD].errors == {}
    await generator.close()


# --- requests that cannot be sent -----------------------------------------------------------------------


async def test_more_in_flight_than_the_server_takes_is_not_sent(serve: Serve) -> None:
    async def echo(n: int, data: bytes) -> dict[str, Any]:
        await asyncio.sleep(0.05)
        return {"n": n, "data": data}

    server = serve(app_with(echo), limits__max_streams=2)
    generator = Generator(share(server, pipeline=5, rate=100.0, duration_s=0.05), asyncio.get_running_loop())
    await all_phases(generator)
    tally = generator.record.tallies[Kind.LOAD]
    assert (tally.planned, tally.sent, tally.equal) == (5, 2, 2)
    assert tally.not_sent == {"too many in flight on the connection": 3}


async def test_a_payload_larger_than_the_server_takes_is_not_sent(serve: Serve) -> None:
    server = serve(limits__max_frame_bytes=20_000)
    generator = Generator(share(server, payload_bytes=30_000, rate=50.0), asyncio.get_running_loop())
    await all_phases(generator)
    assert generator.record.tallies[Kind.LOAD].not_sent == {"larger than the server takes": 5}
    assert generator.record.tallies[Kind.LAST].not_sent == {"larger than the server takes": 4}


async def test_a_request_on_a_connection_that_is_just_ending_is_not_sent(serve: Serve) -> None:
    generator = Generator(share(serve()), asyncio.get_running_loop())
    await generator.connect()
    generator.links[0].close()
    await generator.verify()
    assert generator.record.tallies[Kind.LAST].not_sent == {"the connection is ending": 1}
    assert generator.record.tallies[Kind.LAST].equal == 3
    await generator.close()


async def test_requests_of_lost_connections_are_not_sent(serve: Serve) -> None:
    server = serve()
    generator = Generator(share(server), asyncio.get_running_loop())
    await generator.connect()
    server.in_loop(lambda: [each.abort("test") for each in [*server.server.state.connections][:3]])
    await until(lambda: generator.record.ready == 1)
    await generator.load()
    await generator.verify()
    assert generator.record.lost_links in ({"truncated": 3}, {"connection_reset": 3})
    assert generator.record.tallies[Kind.LOAD].equal == 40  # the load is for those that are there
    assert generator.record.tallies[Kind.LAST].not_sent == {"the connection is lost": 3}
    assert generator.progress()["failed"] == 6
    await generator.close()
    assert generator.record.tallies[Kind.CLOSE].planned == 1


async def test_connections_lost_under_load_take_their_requests_with_them(serve: Serve) -> None:
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
    tally = generator.record.tallies[Kind.LOAD]
    assert tally.planned == 40
    assert tally.equal < 11
    assert tally.lost >= 1
    assert tally.equal + tally.lost + tally.not_sent["the connection is lost"] == 40
    assert sum(generator.record.lost_links.values()) == 4
    assert generator.record.ready == 0
    assert sum(generator.record.connected_over_time.values()) == 0


async def test_nothing_is_loaded_without_connections(serve: Serve) -> None:
    generator = Generator(share(serve(), credentials=[["user-1", "wrong"]] * 4), asyncio.get_running_loop())
    await all_phases(generator)
    assert generator.record.tallies[Kind.LOAD].planned == 0
    assert generator.record.tallies[Kind.LAST].not_sent == {"the connection is lost": 4}


async def test_a_server_that_goes_away_is_told_by_what_it_says(serve: Serve) -> None:
    server = serve()
    generator = Generator(share(server), asyncio.get_running_loop())
    await generator.connect()
    await asyncio.to_thread(server.drain)
    await generator.verify()
    assert generator.record.lost_links == {"closed by the server": 4}
    await generator.close()
