"""The clients of scenarios: they find wrong answers, and hostile ones attack as they should."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from bench.scenarios import churning_clients, failover, failover_times, storm_clients
from bench.scenarios.churning_clients import Client, Seen, now_ms
from bench.scenarios.failover_times import Connected, Done, FailoverTimes, Load
from bench.scenarios.helper import Helper
from bench.scenarios.sessions import ClientSession
from bench.scenarios.soak_clients import is_uncertain
from bench.scenarios.storm_clients import Crowd, Honest, Hostile
from tests.helpers import until
from tests.limits import TIMEOUT
from tests.server.conftest import Serve
from tests.server.helpers import KEY
from zcproto.app.app import App
from zcproto.errors import Code, TokenRevoked, Unavailable, ZcprotoError
from zcproto.load import caller
from zcproto.load.caller import LoadTarget
from zcproto.load.plan import Credential

Patch = pytest.MonkeyPatch
HOUR_MS = 3_600_000


def wrong_echo(is_wrong: Callable[[int], bool]) -> App:
    app = App()

    @app.method("echo")
    def echo(**params: Any) -> dict[str, Any]:
        return {**params, "n": params["n"] + is_wrong(params["n"])}

    return app


# --- of a soak ------------------------------------------------------------------------------------------------

Churning = Callable[..., Any]


@pytest.fixture
async def churning(serve: Serve) -> Any:
    """Return a function that starts a server and a client of it, which has one session."""
    made: list[tuple[Client, LoadTarget]] = []

    async def start(app: App | None = None) -> tuple[Client, Seen]:
        server = serve(app)
        target = LoadTarget("127.0.0.1", "127.0.0.1", server.port, server.home / "certs" / "ca.crt")
        seen = Seen()
        client = Client(target, Credential("user-0", KEY), random.Random(3), seen, 0.001)
        made.append((client, target))
        await client.attempt(client.open)
        return client, seen

    yield start
    for client, target in made:
        await client.leave()
        target.close()


async def test_different_answer_is_wrong(churning: Churning) -> None:
    client, seen = await churning(wrong_echo(lambda n: True))
    await client.attempt(client.echo, client.live[0])
    assert seen.wrong["echo: a different answer"] >= 1
    assert seen.right["echo"] == 0


async def test_accepted_session_that_has_ended_is_wrong(churning: Churning) -> None:
    client, seen = await churning()
    await client.attempt(client.try_ended, client.live[0].token)  # it is live
    assert seen.wrong == {"an ended session was accepted": 1}
    client.live[0].expires_at = now_ms() - HOUR_MS
    await client.attempt(client.echo, client.live[0])
    assert seen.wrong["echo: an expired session was accepted"] == 1
    await client.attempt(client.end, client.live[0])
    await client.attempt(client.try_ended, client.ended[0])
    assert seen.right["refused"] == 1


async def test_refused_live_session_is_wrong(churning: Churning) -> None:
    client, seen = await churning()
    stranger = ClientSession("ada", "x", b"x" * 32, b"y" * 32, now_ms() + HOUR_MS, now_ms() + HOUR_MS)
    await client.attempt(client.echo, stranger)
    stranger.expires_at = now_ms()  # about now either is right
    await client.attempt(client.echo, stranger)
    assert seen.wrong == {"echo: UNAUTHENTICATED": 1}
    assert seen.right["expired"] >= 1


async def test_tolerated_garbage_is_wrong(churning: Churning, monkeypatch: Patch) -> None:
    client, seen = await churning()
    await client.attempt(client.send_garbage)
    assert seen.right["disconnected"] == 1
    monkeypatch.setattr(churning_clients.Intruder, "send", lambda self, data: None)
    monkeypatch.setattr(churning_clients, "DISCONNECT_S", 0.05)
    await client.attempt(client.send_garbage)
    assert seen.wrong == {"garbage was tolerated": 1}


async def test_client_does_everything_without_wrong_answer(churning: Churning) -> None:
    client, seen = await churning()
    running = asyncio.create_task(client.run())
    wanted = {"connect", "open", "echo", "refresh", "end", "refused", "disconnected"}
    await until(lambda: wanted <= seen.right.keys())
    client.stop()
    await running
    await client.settle()
    assert (seen.wrong, seen.lost) == ({}, {})


@pytest.mark.parametrize(
    ("what", "error", "has_key", "has_begun", "is_so"),
    [
        ("run", {"kind": "closed", "clean": False}, False, False, True),
        ("run", {"kind": "closed", "clean": False}, True, False, False),
        ("run", {"kind": "connect"}, False, False, False),
        ("run", {"kind": "call", "code": Code.UNAVAILABLE}, False, False, False),
        ("run", {"kind": "call", "code": Code.DATA_LOSS}, False, False, True),
        ("run", {"kind": "call", "code": Code.CANCELLED}, True, False, True),
        ("run", {"kind": "call", "code": Code.UNKNOWN}, True, False, True),
        ("run", {"kind": "call", "code": Code.UNKNOWN}, False, False, False),
        ("ask", {"kind": "call", "code": Code.ABORTED}, False, False, True),
        ("stream", {"kind": "call", "code": Code.UNAVAILABLE}, False, True, True),
    ],
)
def test_call_is_uncertain_only_if_its_client_must_not_send_it_again(
    what: str, error: dict[str, Any], has_key: bool, has_begun: bool, is_so: bool
) -> None:
    assert is_uncertain(what, error, has_key, has_begun) is is_so


# --- of storms ------------------------------------------------------------------------------------------------


def users(count: int) -> list[Credential]:
    return [Credential(f"user-{number}", KEY) for number in range(count)]


async def test_tolerated_garbage_of_a_mix_is_counted(serve: Serve, monkeypatch: Patch) -> None:
    """No garbage at all looks like a server that accepts any."""
    monkeypatch.setattr(storm_clients, "DISCONNECT_S", 0.05)
    monkeypatch.setattr(storm_clients, "GARBAGE_BYTES", 0)
    server = serve()
    hostile = Hostile(server.port, server.home / "certs" / "ca.crt", users(1), ["garbage"], 10.0)
    await hostile.begin(over_s=0.01)
    await until(lambda: hostile.counts["garbage_tolerated"])
    counts, _ = await hostile.end()
    assert (counts["garbage_tolerated"], counts["disconnected"]) == (1, 0)


async def test_different_answer_to_honest_clients_is_not_equal(serve: Serve) -> None:
    server = serve(wrong_echo(lambda n: n == 7))
    ca_file = server.home / "certs" / "ca.crt"
    honest = Honest(server.port, ca_file, users(2), 100.0)
    await honest.open()
    found = await honest.load(0.2)
    assert (found.sent, found.equal) == (20, 19)
    assert found.failed == {"a different answer": 1}
    await honest.disconnect()
    crowd = Crowd(ca_file, users(10))
    await crowd.open(server.port)
    back = await crowd.come_back(server.port, within_s=TIMEOUT)
    assert (len(back.served_s), back.wrong, await crowd.check()) == (10, 1, 9)
    await crowd.disconnect()
    back = await crowd.come_back(1, within_s=0.0)  # there is no server
    assert back.served_s == []
    assert back.causes.total() == back.tries >= 10


class Process:
    """What runs in the process of a helper."""

    async def timeout(self) -> float:
        return caller.TIMEOUT

    async def die(self) -> None:
        raise SystemExit(1)


async def test_helper_has_its_constants_and_fails_the_calls_of_its_dead_process(monkeypatch: Patch) -> None:
    monkeypatch.setattr(Helper, "constants", {"zcproto.load.caller.TIMEOUT": 7.5})
    async with Helper(Process) as helper:
        assert await helper.call("timeout") == 7.5
        for _ in range(2):
            with pytest.raises(ZcprotoError, match="the process of Process ended unexpectedly"):
                await helper.call("die")


# --- of failovers ---------------------------------------------------------------------------------------------


@pytest.fixture
def graveyard(monkeypatch: Patch) -> failover.Graveyard:
    """Return tokens that died at 1000 s, of which a server accepts one."""
    monkeypatch.setattr(failover, "time", SimpleNamespace(monotonic=lambda: 1_000.0))
    made = failover.Graveyard()
    for token in (b"dead", b"revived"):
        made.add(token, "ada/1", "revoked")
    return made


def caller_of(error: ZcprotoError | None = None) -> Any:
    async def call(method: str, params: dict[str, Any], token: bytes) -> None:
        if error is not None or token != b"revived":
            raise error or TokenRevoked("revoked")

    return SimpleNamespace(call=call)


@pytest.mark.parametrize(("ago_s", "is_late"), [(0.0, False), (failover.MAX_LATE_S + 1, True)])
async def test_accepted_dead_token_is_late_after_five_seconds(
    ago_s: float, is_late: bool, graveyard: failover.Graveyard
) -> None:
    for token in graveyard.tokens.values():
        token.at -= ago_s
    trying = asyncio.create_task(graveyard.haunt([caller_of()], "node-0"))
    await until(lambda: graveyard.outcome.tried == 2)
    trying.cancel()
    made = graveyard.outcome
    assert (made.dead, made.accepted, bool(made.late), made.last_accepted_s) == (2, 1, is_late, ago_s)


async def test_token_that_died_before_the_end_of_a_pause_is_refused_after_it(
    graveyard: failover.Graveyard,
) -> None:
    for token in graveyard.tokens.values():
        token.at = 998.0
    for resumed, stale in ((997.0, 0), (999.0, 1)):
        graveyard.resumed["node-0"] = resumed
        await graveyard.try_latest([caller_of()], "node-0", 998.0)
        assert len(graveyard.outcome.stale) == stale
    tried = graveyard.outcome.tried
    await graveyard.try_latest([caller_of(Unavailable("out"))], "node-0", 998.0)
    assert graveyard.outcome.tried == tried  # no answer, no trial


def test_time_of_a_call_during_a_failover_is_divided_into_steps() -> None:
    times = FailoverTimes(
        done=[Done(10.5, 10.5, 10.6, 1), Done(10.5, 10.75, 15.0, 2)],
        ports={10.0: {1: 7443, 2: 7444}},
        loads=[Load(0.25, 0.5)],
    )
    times.connected[2] += [Connected(8.0, 8.1, 8.2), Connected(11.5, 12.0, 14.0), Connected(16.0, 16.1, 16.2)]
    found = {row.key: row.value for row in failover_times.rows(times, {10.0: 7444}, 1_000.0)}
    steps = {"late": 250.0, "notice": 1_000.0, "tcp": 500.0, "tls": 2_000.0, "answer": 1_000.0}
    assert {name: found[f"failover_{name}_ms"] for name in steps} == pytest.approx(steps, rel=0.01)
    assert found["failover_ms"] == pytest.approx(4_500.0, rel=0.01)
    assert (found["clients_ran_ms"], found["clients_waited_ms"]) == (250.0, 500.0)
