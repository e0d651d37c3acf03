"""The link between processes over a real UNIX socket: calls both ways, notices, limits, reconnecting."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable
from math import inf
from pathlib import Path
from typing import Any

import pytest

from tests.limits import TIMEOUT
from tests.loop_reports import LoopReports
from zcproto.common.backoff import HALF
from zcproto.common.unix_socket import listen_unix
from zcproto.errors import (
    InternalError,
    ResourceExhausted,
    Unimplemented,
)
from zcproto.workers import link as link_module
from zcproto.workers.link import (
    HELLO,
    MIN_VERSION,
    TICKS,
    VERSION,
    Link,
    LinkClient,
    LinkLost,
    LinkServer,
    Topics,
    pack,
)


class Pair:
    """A server and its clients. Handlers may be added to `topics` at any time, for both ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.topics = Topics()
        self.topics.calls["echo"] = self._echo
        self.topics.calls["wait"] = self._wait
        self.released = asyncio.Event()
        self.served: list[Any] = []
        self.server = self._new_server()
        self.clients: list[LinkClient] = []

    def _new_server(self) -> LinkServer:
        return LinkServer(listen_unix(self.path, 16), self.topics, name="coordinator", facts={"epoch": b"1"})

    async def _echo(self, link: Link, *arguments: Any) -> list[Any]:
        self.served.append((link.name, arguments))
        return [*arguments]

    async def _wait(self, link: Link) -> str:
        self.served.append("waits")
        await self.released.wait()
        self.served.append("ended")
        return "released"

    async def restart(self) -> None:
        await self.server.close()
        self.server = self._new_server()
        await self.server.start()

    def client(self, name: str = "worker 1", **options: Any) -> LinkClient:
        client = LinkClient(
            self.path, self.topics, name=name, facts={"pid": 7}, random=lambda: 0.0, **options
        )
        self.clients.append(client)
        return client

    async def connected(self, name: str = "worker 1", **options: Any) -> LinkClient:
        client = self.client(name, **options)
        client.start()
        await client.ready(TIMEOUT)
        await until(lambda: any(link.name == name for link in self.server.links))
        return client

    @property
    def link(self) -> Link:
        """The server's end of the first connection."""
        return next(iter(self.server.links))


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(TIMEOUT):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Pair]:
    pair = Pair(tmp_path / "link.sock")
    await pair.server.start()
    yield pair
    pair.released.set()
    for client in pair.clients:
        await client.close()
    await pair.server.close()


async def test_calls_go_both_ways_and_both_know_the_name_and_facts_of_the_other(pair: Pair) -> None:
    client = await pair.connected()
    assert await client.call("echo", 1, "a\ud800b", b"\xff", None, (2, 3)) == [
        1,
        "a\ud800b",
        b"\xff",
        None,
        [2, 3],
    ]
    assert await pair.link.call("echo", "down") == ["down"]
    assert pair.served == [
        ("worker 1", (1, "a\ud800b", b"\xff", None, [2, 3])),
        ("coordinator", ("down",)),
    ]
    assert client.link is not None
    assert (client.link.facts, pair.link.facts) == ({"epoch": b"1"}, {"pid": 7})


async def test_concurrent_calls_get_their_own_answers(pair: Pair) -> None:
    client = await pair.connected()
    waiting = asyncio.ensure_future(client.call("wait"))
    answers = await asyncio.gather(*(client.call("echo", n, bytes(n)) for n in range(300)))
    assert answers == [[n, bytes(n)] for n in range(300)]
    pair.released.set()
    assert await waiting == "released"


async def test_notices_arrive_in_order_with_the_calls_and_unknown_ones_are_ignored(pair: Pair) -> None:
    client = await pair.connected()
    pair.topics.notices["note"] = lambda link, *arguments: pair.served.append((link.name, *arguments))
    assert client.notify("of a newer version", 1)
    client.notify("note", 2)
    await client.call("echo", 3)
    client.notify("note", 4)
    await client.call("echo", 5)
    worker = "worker 1"
    assert pair.served == [(worker, 2), (worker, (3,)), (worker, 4), (worker, (5,))]


async def test_notice_of_the_server_reaches_all_clients(pair: Pair) -> None:
    heard: list[str] = []
    pair.topics.notices["note"] = lambda link, text: heard.append(text)
    for name in ("worker 1", "worker 2", "worker 3"):
        await pair.connected(name)
    pair.server.notify("note", "drain")
    await until(lambda: heard == ["drain"] * 3)


Kind = Callable[[Callable[[Link], object]], Callable[[Link], object]]


def waiting(handler: Callable[[Link], object]) -> Callable[[Link], object]:
    """Return a handler that is a coroutine function."""

    async def wait(link: Link) -> object:
        await asyncio.sleep(0)
        return handler(link)

    return wait


@pytest.fixture(params=[waiting, lambda handler: handler], ids=["waits", "at once"])
def kind(request: pytest.FixtureRequest) -> Kind:
    """A kind of handler of calls, which is made from a function."""
    return request.param  # type: ignore[no-any-return]


async def test_call_is_answered_and_in_the_order_of_calls_if_its_handler_does_not_wait(pair: Pair) -> None:
    client = await pair.connected()
    served: list[int] = []
    pair.topics.calls["now"] = lambda link, number: served.append(number) or [link.name, number]
    numbers = [*range(30)]
    answers = await asyncio.gather(*(client.call("now", number) for number in numbers))
    assert (served, answers) == (numbers, [["worker 1", number] for number in numbers])


async def test_error_of_a_call_arrives_as_the_same_error_with_its_details(pair: Pair, kind: Kind) -> None:
    def refuse(link: Link) -> None:
        raise ResourceExhausted("wait", {"retry_after_ms": 5})

    client = await pair.connected()
    pair.topics.calls["refuse"] = kind(refuse)
    with pytest.raises(ResourceExhausted) as refused:
        await client.call("refuse")
    assert (refused.value.message, refused.value.details) == ("wait", {"retry_after_ms": 5})
    with pytest.raises(Unimplemented, match="nonsense is not known: the processes are of different versions"):
        await client.call("nonsense")


@pytest.mark.parametrize("result", [object(), ZeroDivisionError()], ids=["unpackable", "raised"])
async def test_fault_of_a_handler_is_reported_there_and_hidden_here(
    pair: Pair, kind: Kind, result: object, loop_reports: LoopReports
) -> None:
    def fail(link: Link) -> object:
        if isinstance(result, Exception):
            raise result
        return result

    client = await pair.connected()
    pair.topics.calls["fail"] = kind(fail)
    with pytest.raises(InternalError, match="the other process failed; see its log"):
        await client.call("fail")
    (reported,) = loop_reports.take()
    assert isinstance(reported["exception"], TypeError | ZeroDivisionError)
    assert await client.call("echo") == []


async def test_unpackable_argument_is_the_callers_error_and_the_link_stays(pair: Pair) -> None:
    client = await pair.connected()
    with pytest.raises(TypeError):
        await client.call("echo", object())
    assert await client.call("echo", 1) == [1]


async def test_call_without_an_answer_in_time_is_lost_and_its_late_answer_ignored(pair: Pair) -> None:
    client = await pair.connected(silence=0.04)
    with pytest.raises(LinkLost, match="did not answer in time"):
        await client.call("wait", within=0.01)
    pair.released.set()
    await until(lambda: "ended" in pair.served)
    assert await client.call("echo", 1) == [1]


async def test_cancelled_call_runs_to_its_end_there(pair: Pair) -> None:
    client = await pair.connected()
    call = asyncio.ensure_future(client.call("wait"))
    await until(lambda: "waits" in pair.served)
    call.cancel()
    await asyncio.wait([call])
    pair.released.set()
    await until(lambda: "ended" in pair.served)
    assert await client.call("echo", 1) == [1]


async def test_client_reconnects_to_a_restarted_server_and_waiting_calls_fail(pair: Pair) -> None:
    client = await pair.connected()
    seen: list[str] = []
    client.on_up.append(lambda link: seen.append(f"up: {link.name}"))
    client.on_down.append(lambda link: seen.append(f"down: {link.lost}"))
    call = asyncio.ensure_future(client.call("wait"))
    await until(lambda: "waits" in pair.served)
    first = client.link
    restart = asyncio.ensure_future(pair.restart())
    with pytest.raises(LinkLost, match="closed the connection"):
        await call
    assert client.link is None
    assert not client.notify("note")
    with pytest.raises(LinkLost, match="closed the connection"):
        await client.call("echo")
    pair.released.set()
    await restart
    await client.ready(TIMEOUT)
    assert client.link is not first
    assert await client.call("echo", 1) == [1]
    assert seen == ["down: the other process closed the connection", "up: coordinator"]


@pytest.mark.parametrize(("lasting_s", "expected"), [(inf, [1, 2, 3]), (0.0, [])])
async def test_pauses_grow_with_connections_in_a_row_that_did_not_last(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, lasting_s: float, expected: list[int]
) -> None:
    failures: list[int] = []

    def no_pause(count: int, *limits: float) -> float:
        assert limits == (link_module.FIRST_PAUSE_S, link_module.LONGEST_PAUSE_S, HALF, 0.0)
        failures.append(count)
        return 0.0

    monkeypatch.setattr(link_module, "LASTING_S", lasting_s)
    monkeypatch.setattr(link_module, "backoff_s", no_pause)
    ended: list[Link] = []
    pair.server.on_link += [ended.append, lambda link: link.lose("refused")]
    pair.client().start()
    await until(lambda: len(ended) > 4)
    assert failures[:3] == expected


async def test_server_reports_clients_that_come_and_go(pair: Pair) -> None:
    seen: list[str] = []
    pair.server.on_link.append(lambda link: seen.append(f"{link.name} came"))
    pair.server.on_lost.append(lambda link: seen.append(f"{link.name} has gone"))
    client = await pair.connected()
    await client.close()
    await until(lambda: len(seen) == 2)
    assert seen == ["worker 1 came", "worker 1 has gone"]
    assert not pair.server.links


async def test_client_waits_for_a_server_that_is_not_there_yet(tmp_path: Path) -> None:
    path = tmp_path / "link.sock"
    client = LinkClient(path, Topics(), name="early", random=lambda: 0.0)
    client.start()
    with pytest.raises(LinkLost, match=r"not connected yet|No such file"):
        await client.ready(0)
    await until(lambda: "No such file" in client.reason)
    server = LinkServer(listen_unix(path, 16), Topics(), name="late")
    await server.start()
    await client.ready(TIMEOUT)
    await client.close()
    await server.close()


async def test_server_that_stops_answering_is_lost_although_its_socket_is_open(pair: Pair) -> None:
    client = await pair.connected(silence=0.02, heartbeat=0.01)
    lost: list[str] = []
    client.on_down.append(lambda link: lost.append(link.lost))
    pair.link._handle = lambda *message: None  # type: ignore[method-assign] # reads, and does nothing
    await until(lambda: lost)
    assert lost[0] == "the other process does not answer"
    await client.ready(TIMEOUT)
    await until(lambda: len(pair.server.links) == 1)
    assert await client.call("echo", 1) == [1]


async def test_call_finds_a_silent_server_without_a_heartbeat(pair: Pair) -> None:
    client = await pair.connected(silence=0.02, heartbeat=3600.0)
    pair.link._handle = lambda *message: None  # type: ignore[method-assign] # reads, and does nothing
    with pytest.raises(LinkLost, match="the other process does not answer"):
        await client.call("echo", 1, within=TIMEOUT)


async def test_server_that_waits_for_a_processor_is_not_silent(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def queued(pid: int) -> float:
        asked.append(pid)
        return float(len(asked) * is_busy)

    is_busy = True
    monkeypatch.setattr(link_module, "queued_seconds", queued)
    client = await pair.connected(silence=0.02, heartbeat=3600.0)
    assert client.link is not None
    client.link.facts = {"pid": 4711}  # of its HELLO
    pair.link._handle = lambda *message: None  # type: ignore[method-assign] # reads, and does nothing
    call = asyncio.create_task(client.call("echo", 1, within=0.02))
    await until(lambda: len(asked) > 4 * TICKS or call.done())
    assert not call.done()
    assert {*asked} == {4711}
    is_busy = False
    with pytest.raises(LinkLost, match="answer"):
        await call


async def test_idle_link_is_kept_by_pings(pair: Pair) -> None:
    client = await pair.connected(silence=0.02, heartbeat=0.001)
    link, pongs = client.link, 0
    assert link is not None
    handle = link._handle

    def count(kind: int, *fields: Any) -> None:
        nonlocal pongs
        pongs += 1
        handle(kind, *fields)

    link._handle = count  # type: ignore[method-assign]
    await until(lambda: pongs >= 20)
    assert client.link is link


async def test_idle_link_has_no_ping_before_its_heartbeat(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    pings: list[object] = []
    monkeypatch.setattr(link_module.LinkCore, "ping", lambda core: pings.append(core) or b"")
    await pair.connected(heartbeat=3600.0)
    for _ in range(100):
        await asyncio.sleep(0)
    assert pings == []


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (pack(HELLO, MIN_VERSION - 1, "old", {}), "has version"),
        (b"GET / HTTP/1.1\r\n\r\n", "over the limit"),
        (pack(HELLO, VERSION, "twice", {}) * 2, "HELLO is the first message, once"),
    ],
)
async def test_peer_that_breaks_the_rules_is_disconnected(pair: Pair, data: bytes, reason: str) -> None:
    lost: list[str] = []
    lose = Link.lose
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Link, "lose", lambda link, why: (lost.append(why), lose(link, why)))
        reader, writer = await asyncio.open_unix_connection(pair.path)
        writer.write(data)
        async with asyncio.timeout(TIMEOUT):
            await reader.read(-1)
        writer.close()
    assert reason in lost[0]
    assert not pair.server.links
    assert not pair.server._open


async def test_peer_without_hello_is_disconnected(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "HELLO_LIMIT_S", 0.01)
    reader, writer = await asyncio.open_unix_connection(pair.path)
    async with asyncio.timeout(TIMEOUT):
        await reader.read(-1)
    writer.close()
    assert not pair.server._open


async def test_connections_of_other_users_and_beyond_the_limit_are_refused(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    await pair.connected()
    monkeypatch.setattr(link_module, "MAX_LINKS", 1)
    await _refused(pair)
    monkeypatch.undo()
    monkeypatch.setattr(os, "geteuid", lambda: 4_711)
    monkeypatch.setattr(link_module, "_ROOT", 4_712)
    await _refused(pair)
    assert pair.server.refused == 2
    assert len(pair.server.links) == 1


async def _refused(pair: Pair) -> None:
    reader, writer = await asyncio.open_unix_connection(pair.path)
    async with asyncio.timeout(TIMEOUT):
        assert await reader.read(-1) == b""
    writer.close()


async def test_too_many_waiting_calls_are_refused_except_lasting_ones(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await pair.connected()
    monkeypatch.setattr(link_module, "MAX_CALLS", 2)
    calls = [asyncio.ensure_future(client.call("wait")) for _ in range(2)]
    await until(lambda: len(pair.served) == 2)
    with pytest.raises(ResourceExhausted, match="too many calls wait for another process"):
        await client.call("echo")
    assert await client.call("echo", is_lasting=True) == []
    pair.released.set()
    assert await asyncio.gather(*calls) == ["released"] * 2


async def test_peer_gets_no_more_handlers_than_twice_its_calls(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await pair.connected()
    monkeypatch.setattr(link_module, "MAX_CALLS", 1)
    calls = [asyncio.ensure_future(client.call("wait", is_lasting=True)) for _ in range(3)]
    with pytest.raises(ResourceExhausted):
        await calls[2]
    pair.released.set()
    assert await asyncio.gather(*calls[:2]) == ["released"] * 2


async def test_peer_that_does_not_read_is_refused_calls_then_disconnected(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "HIGH_WATER", 1 << 16)
    monkeypatch.setattr(link_module, "MAX_BUFFER", 1 << 20)
    peer = socket.socket(socket.AF_UNIX)
    peer.connect(str(pair.path))
    with peer:
        peer.sendall(pack(HELLO, VERSION, "deaf", {}))
        await until(lambda: pair.server.links)
        link = pair.link
        while not link._is_paused:
            link.notify("note", bytes(60_000))
            await asyncio.sleep(0)
        with pytest.raises(ResourceExhausted):
            await link.call("echo")
        while not link.lost:
            pair.server.notify("note", bytes(60_000))
            await asyncio.sleep(0)
        assert link.lost == "the other process does not read"
        assert not pair.server.links


async def test_calls_go_on_when_the_peer_reads_again(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "HIGH_WATER", 1 << 16)
    client = await pair.connected()
    link = client.link
    assert link is not None
    pair.link._transport.pause_reading()  # type: ignore[union-attr]
    while not link._is_paused:
        link.notify("note", bytes(60_000))
        await asyncio.sleep(0)
    pair.link._transport.resume_reading()  # type: ignore[union-attr]
    await until(lambda: not link._is_paused)
    assert await client.call("echo", 1) == [1]


async def test_operations_of_one_turn_are_one_write(pair: Pair) -> None:
    client = await pair.connected()
    link = client.link
    assert link is not None
    assert link._transport is not None
    writes: list[bytes] = []
    write = link._transport.write

    class Counted:
        def write(self, data: bytes) -> None:
            writes.append(data)
            write(data)

        def __getattr__(self, name: str) -> Any:
            return getattr(transport, name)

    transport, link._transport = link._transport, Counted()  # type: ignore[assignment]
    await asyncio.gather(*(client.call("echo", n) for n in range(50)))
    assert len(writes) == 1


async def test_server_that_closes_answers_the_calls_that_run_and_begins_no_other(pair: Pair) -> None:
    client = await pair.connected()
    running = asyncio.create_task(client.call("wait"))
    await until(lambda: pair.served)
    closing = asyncio.create_task(pair.server.close(within=TIMEOUT))
    late = asyncio.create_task(client.call("echo"))
    await asyncio.sleep(0)
    pair.released.set()
    assert await running == "released"
    with pytest.raises(LinkLost):
        await late
    await closing
    assert pair.served == ["waits", "ended"]


async def test_handler_that_outlasts_the_closing_server_is_cancelled(tmp_path: Path) -> None:
    pair = Pair(tmp_path / "link.sock")
    await pair.server.start()
    client = await pair.connected()
    call = asyncio.ensure_future(client.call("wait"))
    await until(lambda: "waits" in pair.served)
    await pair.server.close(within=0)
    with pytest.raises(LinkLost):
        await call
    await client.close()
    assert not [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    assert "ended" not in pair.served
