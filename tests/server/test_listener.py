"""Tests of listening sockets and of the limits on connections."""

from __future__ import annotations

import asyncio
import errno
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import pytest

from tests.limits import TIMEOUT
from tests.server.helpers import (
    ServerThread,
    StoppedClock,
    bystander,
    configuration,
    eventually,
    read_to_end,
    reset,
)
from tests.tls.support import captured_hello
from zcproto.app.app import App
from zcproto.config import Config
from zcproto.errors import ConfigError
from zcproto.runtime.build import WorkerRole
from zcproto.server import listener
from zcproto.server.listener import AcceptLoop, Listener, bind
from zcproto.testing import LocalServer
from zcproto.tls.failure import TlsFailure
from zcproto.workers.limits import SharedMemory, memory_size

Serve = Callable[..., ServerThread]


# --- binding -----------------------------------------------------------------------------------------------


@pytest.fixture
def bound() -> Iterator[list[socket.socket]]:
    sockets: list[socket.socket] = []
    yield sockets
    for each in sockets:
        each.close()


def test_port_0_is_the_same_free_port_on_every_address(bound: list[socket.socket]) -> None:
    bound += bind(["127.0.0.1", "::1"], 0)
    addresses = [each.getsockname()[:2] for each in bound]
    assert [host for host, _ in addresses] == ["127.0.0.1", "::1"]
    assert len({port for _, port in addresses}) == 1
    assert addresses[0][1] > 0


def test_port_0_keeps_the_interface_of_a_link_local_address(
    bound: list[socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    addresses = {
        "127.0.0.1": (socket.AF_INET, ("127.0.0.1", 0)),
        "fe80::1": (socket.AF_INET6, ("fe80::1", 0, 0, 7)),
    }
    monkeypatch.setattr(listener, "_addresses", lambda host, port: [addresses[host]])
    asked = []

    def bound_to_loopback(family: int, address: Any) -> socket.socket:
        asked.append(address)
        return socket.create_server(("127.0.0.1", 0))

    monkeypatch.setattr(listener, "_bound", bound_to_loopback)
    bound += bind(list(addresses), 0)
    assert asked[1] == ("fe80::1", bound[0].getsockname()[1], 0, 7)


def test_ipv6_socket_is_ipv6_only(bound: list[socket.socket]) -> None:
    bound += bind(["::"], 0)
    port = bound[0].getsockname()[1]
    bound += bind(["0.0.0.0"], port)
    assert len(bound) == 2


def test_empty_host_binds_every_address(bound: list[socket.socket]) -> None:
    bound += bind([""], 0)
    assert {each.getsockname()[0] for each in bound} == {"0.0.0.0", "::"}


def test_port_in_use_is_a_config_error(bound: list[socket.socket]) -> None:
    bound += bind(["127.0.0.1"], 0)
    port = bound[0].getsockname()[1]
    with pytest.raises(ConfigError) as raised:
        bind(["::1", "127.0.0.1"], port)
    assert raised.value.faults == [
        f"server.host = '127.0.0.1', server.port = {port}: cannot listen: Address already in use; end the program"
        " that uses it (ss -ltnp lists them), or set another port"
    ]
    # Sockets bound before the fault are closed.
    bound += bind(["::1"], port)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "256.1.1.1", "a" * 300, "\udcff"])
def test_unknown_host_is_a_config_error(host: str) -> None:
    with pytest.raises(ConfigError, match=r"server\.host = .*: no such address"):
        bind([host], 0)


def test_foreign_address_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="cannot listen: Cannot assign requested address"):
        bind(["192.0.2.77"], 0)


def test_missing_ipv6_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_socket(*args: Any) -> socket.socket:
        raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")

    monkeypatch.setattr(socket, "socket", no_socket)
    with pytest.raises(ConfigError, match="Address family not supported"):
        bind(["::1"], 0)


# --- the end -----------------------------------------------------------------------------------------------


class IdleAcceptor:
    """An acceptor whose connections end when the test calls `on_closed`."""

    on_closed: Callable[[str], None]

    def set_limits(self, *limits: Any) -> None:
        pass


async def test_wait_empty_ends_with_the_last_connection_after_close() -> None:
    acceptor: Any = IdleAcceptor()
    ports = Listener(acceptor, Any, asyncio.get_running_loop(), Config())

    def connect() -> None:
        ports._by_network.add("192.0.2.1")
        ports._all.add("")

    connect()
    acceptor.on_closed("192.0.2.1")  # none is left, but more may come
    connect()
    connect()
    ports.close()
    waiting = asyncio.ensure_future(ports.wait_empty())
    await asyncio.sleep(0)
    acceptor.on_closed("192.0.2.1")
    for _ in range(3):
        await asyncio.sleep(0)
    assert not waiting.done()
    acceptor.on_closed("192.0.2.1")
    async with asyncio.timeout(TIMEOUT):
        await waiting
    await ports.wait_empty()  # at once: none is left


# --- a running server --------------------------------------------------------------------------------------


def test_server_listens_on_ipv4_and_ipv6(serve: Serve) -> None:
    server = serve(server__host=["127.0.0.1", "::1"])
    assert [host for host, _ in server.server.addresses] == ["127.0.0.1", "::1"]
    for host in ("127.0.0.1", "::1"):
        with server.client("ada", host=host) as client:
            assert client.call("session.info")["address"] == host


def test_port_in_use_prevents_start(serve: Serve, tmp_path: Path, certs: Path) -> None:
    first = serve()
    second = ServerThread(tmp_path / "second", certs, server__port=first.port)
    with pytest.raises(ConfigError, match="Address already in use"):
        second.start()
    second.join()
    with first.client("ada") as client:
        client.echo()


def refused_at_accept(server: ServerThread, host: str = "127.0.0.1") -> None:
    with server.tcp(host) as connection:
        assert read_to_end(connection) == (b"", "FIN")


def test_connections_over_the_address_limit_are_closed_and_counted(serve: Serve) -> None:
    server = serve(server__host=["127.0.0.1", "::1"], limits__connections_per_address=2)
    with server.client("ada") as first:
        half_open = server.tcp()
        server.until(lambda: server.server.parts.listener.connections == 2)
        refused_at_accept(server)
        refused_at_accept(server)
        assert server.stats["refused_per_address"] == 2
        # Another address is not affected.
        with server.client("eve", host="::1") as other:
            other.echo()
        first.echo()
        # A closed connection makes room for another.
        reset(half_open)
        server.until(lambda: server.server.parts.listener.connections == 1)
        with server.client("ada") as next_one:
            next_one.echo()
    server.until_left()


def test_address_limit_0_is_unlimited(serve: Serve) -> None:
    server = serve(limits__connections_per_address=0)
    with server.client("ada") as client, server.client("ada") as other:
        client.echo()
        other.echo()
        assert server.stats["refused_per_address"] == 0


def test_connections_over_the_total_limit_are_closed_and_counted(serve: Serve) -> None:
    server = serve(server__host=["127.0.0.1", "::1"], limits__max_connections=2)
    with server.client("ada") as first, server.client("eve", host="::1") as second:
        refused_at_accept(server)
        refused_at_accept(server, "::1")
        assert server.stats["refused_full"] == 2
        first.echo()
        second.echo()
    server.until_left()
    with server.client("ada") as client:
        client.echo()


def test_silent_connections_are_displaced_and_logins_succeed(serve: Serve) -> None:
    server = serve(tls__max_handshakes=2, tls__max_pending=8)
    with bystander(server):
        silent = [server.tcp() for _ in range(40)]  # 4 at a time, all from one network
        server.until(lambda: server.server.statistics()["tls_failures"].get("displaced") == 36)
        for _ in range(5):
            with server.client("ada") as client:
                client.echo()
        assert server.stats["handshakes_pending"] <= 4
        for each in silent:
            reset(each)
    server.until_left()


def test_silent_connections_are_displaced_at_the_total_limit(serve: Serve) -> None:
    server = serve(limits__max_connections=2)
    with server.client("ada") as client:
        silent = server.tcp()
        server.until(lambda: server.server.parts.listener.connections == 2)
        with server.client("eve") as other:
            other.echo()
            refused_at_accept(server)
        assert read_to_end(silent) == (b"", "FIN")
        silent.close()
        client.echo()
    server.until_left()


def reset_at_accept(server: ServerThread) -> None:
    with pytest.raises(ConnectionResetError), server.tcp() as connection:  # perhaps before `connect` returns
        connection.recv(1)


def test_network_whose_handshakes_fail_is_reset_at_accept_and_others_log_in(serve: Serve) -> None:
    server = serve(server__host=["127.0.0.1", "::1"], limits__failed_handshakes_per_network=10)
    parts = server.server.parts
    clock = parts.state.clock = StoppedClock(parts.state.clock)
    failures = parts.acceptor.failures
    for failed in range(1, 21):
        reset(server.tcp())
        server.until(lambda failed=failed: failures[TlsFailure.DISCONNECTED] == failed)
    for _ in range(3):
        reset_at_accept(server)
    assert server.stats["refused_flooding"] == 3
    with server.client("ada", host="::1") as client:
        client.echo()
    clock.seconds += 0.25  # two connections may be in their handshake
    waiting = [server.tcp(), server.tcp()]
    server.until(lambda: counts(server) == (0, 0, 2))
    reset_at_accept(server)
    for each in waiting:
        reset(each)
    clock.seconds += 1.0
    with server.client("ada") as client:
        client.echo()
    server.until_left()


def counts(server: ServerThread) -> tuple[int, int, int]:
    """Return the handshakes in progress, those that wait for a slot, and the silent connections."""
    acceptor = server.server.parts.acceptor
    silent = acceptor.pending.silent
    return acceptor.handshakes_in_progress, acceptor.pending.places - silent, silent


def hello() -> bytes:
    context = ssl.create_default_context()
    context.set_alpn_protocols(["zcp/1"])
    return captured_hello(context)


def test_network_is_refused_while_its_share_waits_for_slots(serve: Serve) -> None:
    server = serve(server__host=["127.0.0.1", "::1"], tls__max_handshakes=2, tls__max_pending=4)
    waiting = []
    for count in (1, 2, 3):  # one handshake takes a slot, two wait
        waiting.append(server.tcp())
        waiting[-1].sendall(hello())
        server.until(lambda count=count: counts(server) == (1, count - 1, 0))
    refused_at_accept(server)
    assert server.stats["refused_per_network"] == 1
    with server.client("ada", host="::1") as client:
        client.echo()
    for each in waiting:
        reset(each)
    server.until_left()


def test_connections_wait_in_the_backlog_while_all_places_are_taken(serve: Serve) -> None:
    server = serve(tls__max_handshakes=1, tls__max_pending=1)
    parts = server.server.parts
    first = server.tcp()
    first.sendall(hello())
    server.until(lambda: counts(server) == (1, 0, 0))
    second = server.tcp()
    second.sendall(hello())
    server.until(lambda: parts.acceptor.pending.is_full)
    third = server.tcp()
    server.until(lambda: not parts.listener._accepting)
    assert parts.listener.connections == 2
    reset(first)
    server.until(lambda: counts(server) == (1, 0, 1))  # each moves up
    for each in (second, third):
        reset(each)
    with server.client("ada") as client:
        client.echo()
    server.until_left()


def test_accepts_per_turn_grow_while_connections_wait(serve: Serve) -> None:
    server = serve()
    ports = server.server.parts.listener
    waiting: list[socket.socket] = []

    def accept() -> list[int]:
        waiting.extend(server.tcp() for _ in range(200))
        batches = []
        while ports.connections < len(waiting):
            before = ports.connections
            ports._accept(ports._sockets[0], socket.AF_INET)
            batches.append(ports.connections - before)
        return batches

    def accept_nothing() -> None:
        for _ in range(10):
            ports._accept(ports._sockets[0], socket.AF_INET)

    batches = server.in_loop(accept)
    assert batches[:6] == [1] * 6
    assert sorted(batches[:-1]) == batches[:-1]
    assert max(batches) > 20
    server.in_loop(accept_nothing)
    assert server.in_loop(accept)[0] == 1, "they shrink while none wait"
    server.until(lambda: ports.connections == len(waiting))
    for each in waiting:
        reset(each)
    server.until_left()


def test_disconnect_before_adoption_leaves_nothing(serve: Serve) -> None:
    server = serve()

    async def gone(*args: Any) -> Any:
        raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")

    class FailingLoop:
        """The server's loop, which fails to adopt one connection."""

        def __getattr__(self, name: str) -> Any:
            return gone if name == "connect_accepted_socket" else getattr(server.loop, name)

    loop = server.server.parts.listener._loop
    server.server.parts.listener._loop = FailingLoop()
    refused_at_accept(server)
    server.server.parts.listener._loop = loop
    server.until_left()
    assert server.stats["tls_failures"] == {"disconnected": 1}
    with server.client("ada") as client:
        client.echo()


class AdoptingLoop:
    """A loop that has an accepted socket when its waiter is done."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self.waiters: list[asyncio.Future[None]] = []
        self.turns: list[Callable[[], None]] = []
        self.ended: list[str] = []

    def call_soon(self, callback: Callable[[], None]) -> None:
        self.turns.append(callback)

    def turn(self) -> None:
        turns, self.turns = self.turns, []
        for callback in turns:
            callback()

    async def connect_accepted_socket(self, factory: Callable[[], Any], connection: socket.socket) -> None:
        waiter = self._loop.create_future()
        self.waiters.append(waiter)
        try:
            await waiter
        except BaseException:
            self.ended.append("closed")
            raise
        self.ended.append("adopted")

    def close(self) -> None:
        self._loop.close()


@pytest.fixture
def adopting() -> Iterator[tuple[AcceptLoop, AdoptingLoop]]:
    """An AcceptLoop that has handed two sockets to its loop."""
    loop = AdoptingLoop()
    accepting = AcceptLoop(cast("asyncio.AbstractEventLoop", loop))
    for _ in range(2):
        accepting._adopt(cast("socket.socket", None), asyncio.Protocol())
    yield accepting, loop
    loop.close()


def test_adoptions_end_together_when_loop_has_the_sockets(adopting: tuple[AcceptLoop, AdoptingLoop]) -> None:
    accepting, loop = adopting
    loop.waiters[0].set_result(None)
    loop.turn()
    assert loop.ended == ["adopted"]
    loop.waiters[1].set_result(None)
    loop.turn()
    assert loop.ended == ["adopted", "adopted"]
    assert not accepting._adopting
    assert not loop.turns


def test_protocol_that_closes_at_once_does_not_stop_other_adoptions(
    adopting: tuple[AcceptLoop, AdoptingLoop],
) -> None:
    accepting, loop = adopting
    loop.waiters[0].set_exception(RuntimeError("closed Transport handle"))
    loop.waiters[1].set_result(None)
    loop.turn()
    assert loop.ended == ["closed", "adopted"]
    assert not accepting._adopting


class FailingSocket:
    """A listening socket whose first `accept` fails; the others are those of another one."""

    def __init__(self, error: OSError, others: socket.socket | None = None) -> None:
        self.error = error
        self.others = others
        self.accepts = 0

    def _accept(self) -> Any:
        self.accepts += 1
        if self.accepts == 1 or self.others is None:
            raise self.error
        return self.others._accept()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.others, name)


def test_connection_aborted_in_backlog_ends_the_turn(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve()
    ports = server.server.parts.listener
    monkeypatch.setattr(ports, "_batch", 8.0)
    backlog: Any = FailingSocket(ConnectionAbortedError(), ports._sockets[0])
    server.in_loop(lambda: ports._accept(backlog, socket.AF_INET))
    assert backlog.accepts == 1
    with server.client("ada") as client:
        client.echo()


def test_unexpected_accept_error_is_raised(serve: Serve) -> None:
    server = serve()
    broken: Any = FailingSocket(OSError(errno.EBADF, "Bad file descriptor"))
    with pytest.raises(OSError, match="Bad file descriptor"):
        server.in_loop(lambda: server.server.parts.listener._accept(broken, socket.AF_INET))


def test_descriptor_exhaustion_pauses_accepting(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "PAUSE_WHEN_EXHAUSTED", 0.3)
    server = serve()
    monkeypatch.setattr(server.server.parts.listener, "_batch", 8.0)
    exhausted: Any = FailingSocket(OSError(errno.EMFILE, "Too many open files"))
    with bystander(server) as client:
        paused_at = time.monotonic()
        server.in_loop(lambda: server.server.parts.listener._accept(exhausted, socket.AF_INET))
        assert server.stats["accept_failed"] == 1
        client.echo()
        with server.client("ada") as later:  # it waits in the backlog until the pause ends
            later.echo()
            assert time.monotonic() - paused_at >= 0.9 * listener.PAUSE_WHEN_EXHAUSTED
    # A listener closed during the pause does not resume.
    server.in_loop(lambda: server.server.parts.listener._accept(exhausted, socket.AF_INET))
    server.drain()


EXHAUST = """
import contextlib, os, resource, socket, sys, time
from pathlib import Path
from tests.server.helpers import ServerThread, eventually, reset
from zcproto.server import listener

listener.PAUSE_WHEN_EXHAUSTED = 0.05
server = ServerThread(Path(sys.argv[1]), Path(sys.argv[2]), log__level="error").start()
client = server.client("ada")
open_now = len(os.listdir("/proc/self/fd"))
resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + 20, open_now + 20))
waiting = []
with contextlib.suppress(OSError):
    while True:
        waiting.append(server.tcp())
eventually(lambda: server.server.state.counters.accept_failed)
began, failed = time.monotonic(), server.server.state.counters.accept_failed
client.echo()
eventually(lambda: server.server.state.counters.accept_failed >= failed + 4)
assert time.monotonic() - began > 2 * listener.PAUSE_WHEN_EXHAUSTED, "it spins"
for each in waiting:
    reset(each)
client.echo()
with server.client("eve") as other:
    other.echo()
client.close()
server.drain()
print("recovered")
"""


def test_process_without_descriptors_serves_and_recovers(tmp_path: Path, certs: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", EXHAUST, str(tmp_path / "home"), str(certs)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.stdout == "recovered\n", done.stderr
    assert done.returncode == 0
    assert '"event":"listener.exhausted"' in done.stderr
    assert "Too many open files" in done.stderr


def test_closed_listener_accepts_nothing(serve: Serve) -> None:
    server = serve()
    with server.client("ada") as client:
        port = server.port
        server.begin_drain(TIMEOUT)
        client.rest_until_closed()
    server.join()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    eventually(lambda: not server.alive)


def test_burst_of_connections_is_accepted(serve: Serve) -> None:
    server = serve()
    # The loop is busy while they arrive: all are in the backlog afterwards.
    waiting = server.in_loop(lambda: [server.tcp() for _ in range(42)])
    server.until(lambda: server.server.parts.listener.connections == len(waiting))
    for each in waiting:
        reset(each)
    server.until_left()


def test_worker_leaves_connections_to_others_with_fewer_and_takes_what_they_leave(
    certs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalServer, "_stuck_after_s", TIMEOUT)
    memory = SharedMemory(bytearray(memory_size(2, 1_000)), 2, 1_000, bytes(32))
    [listening] = bind(["127.0.0.1"], 0)
    address = listening.getsockname()
    with listening, ExitStack() as stack:

        def worker(number: int) -> LocalServer:
            home = tmp_path / str(number)
            shutil.copytree(certs, home / "certs")
            config = configuration(home, limits__connections_per_address=0, tls__max_pending=1_000)
            role = WorkerRole(counting=memory.worker(number))
            options: dict[str, Any] = {"sockets": [listening.dup()], "control": False, "role": role}
            return stack.enter_context(LocalServer(App(), config, home=home, **options))

        def connect() -> None:
            before = opened(*workers)
            for _ in range(60):
                stack.enter_context(socket.create_connection(address))
            eventually(lambda: opened(*workers) == before + 60)

        def opened(*workers: LocalServer) -> int:
            return sum(each.server.parts.listener.connections for each in workers)

        workers = [worker(0)]
        connect()
        workers.append(worker(1))
        with monkeypatch.context() as patch:
            for name in ("LEFT_TIME", "MOST_LEFT_TIME"):
                patch.setattr(listener, name, TIMEOUT)
            connect()
        assert opened(workers[1]) > 50
        workers.pop().drain(0.0)
        workers[0].in_loop(workers[0].server.parts.listener._take_left)  # its timer has the long time
        connect()
