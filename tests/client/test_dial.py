"""Dialer over loopback: trust, failures, and `sts` policies."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import shutil
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.server_process import free_port
from tests.client.conftest import ConnectTo
from tests.client.helpers import LoopClock
from tests.conftest import ServerPairs
from tests.helpers import WALL
from tests.limits import TIMEOUT
from tests.server.conftest import Serve
from tests.server.helpers import PATIENT_CLIENT, ServerThread
from zcproto.client.client import Client, connect
from zcproto.client.dial import (
    KNOWN_HOSTS_FILE,
    MAX_CONTEXTS,
    KnownHosts,
    LoopResources,
    Trust,
    _ip_of,
    _resources,
    connect_error,
)
from zcproto.client.endpoints import Address
from zcproto.client.options import ConnectOptions
from zcproto.errors import CannotConnect, CertificateError, Code, ConfigError, ConnectionClosed, TlsError
from zcproto.testing import MovableClock

REFUSED = "Connection refused; start the server, or check the host and the port"
WRONG_PIN = "sha256/" + "A" * 43 + "="


@pytest.fixture
def known(home: Path) -> Callable[[], dict[str, Any]]:
    """Return the stored policies."""

    def read() -> dict[str, Any]:
        path = home / "known_hosts.json"
        return json.loads(path.read_text())["hosts"] if path.exists() else {}  # type: ignore[no-any-return]

    return read


@contextlib.asynccontextmanager
async def plain_server(
    talk: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any], context: ssl.SSLContext | None = None
) -> AsyncIterator[str]:
    """Start a server with the given handler and return its address."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            await talk(reader, writer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


# --- trust -------------------------------------------------------------------------------------------


async def test_ca_file_pin_or_both_are_accepted(
    shared: ServerThread, connect_to: ConnectTo, known: Callable[[], dict[str, Any]]
) -> None:
    for trust in (
        {"ca_file": shared.home / "certs" / "ca.crt"},
        {"ca_file": str(shared.home / "certs" / "ca.crt"), "pins": shared.server.pins},
        {"pins": [WRONG_PIN, *shared.server.pins]},
    ):
        async with connect_to(shared, server_hostname="localhost", **trust) as client:
            assert await client.call("echo", x=1) == {"x": 1}
        assert list(known()) == ["localhost"]  # the policy is that of the verified name


@pytest.mark.parametrize(
    ("trust", "host", "failure"),
    [
        ({"system_store": True}, "127.0.0.1", "certificate_untrusted"),
        ({"system_store": True, "pins": [WRONG_PIN]}, "127.0.0.1", "certificate_untrusted"),
        ({"pins": [WRONG_PIN]}, "127.0.0.1", "pin_mismatch"),
        ({"pins": ["right"], "server_hostname": "other.example"}, "127.0.0.1", "certificate_name_mismatch"),
        ({"ca_file": "right", "pins": [WRONG_PIN]}, "127.0.0.1", "pin_mismatch"),
        ({"ca_file": "right", "server_hostname": "other.example"}, "127.0.0.1", "certificate_name_mismatch"),
        ({"ca_file": "other"}, "127.0.0.1", "certificate_untrusted"),
    ],
)
async def test_untrusted_server_gets_no_application_data(
    serve: Serve, ca_file: Path, trust: dict[str, Any], host: str, failure: str
) -> None:
    server = serve()
    files = {"right": server.home / "certs" / "ca.crt", "other": ca_file}
    if "ca_file" in trust:
        trust = {**trust, "ca_file": files[trust["ca_file"]]}
    if trust.get("pins") == ["right"]:
        trust = {**trust, "pins": server.server.pins}
    with pytest.raises(TlsError) as caught:
        await connect(f"{host}:{server.port}", user="ada", key="secret", **{**PATIENT_CLIENT, **trust})
    assert caught.value.failure == failure
    assert caught.value.detail
    stats = server.stats
    assert stats["connections_opened"] == 0
    assert stats["requests"] == 0


async def test_missing_or_invalid_ca_file_is_named(
    shared: ServerThread, connect_to: ConnectTo, tmp_path: Path
) -> None:
    nothing = tmp_path / "nothing.pem"
    with pytest.raises(CertificateError, match=r"nothing\.pem: does not exist; copy the CA of the server"):
        await connect_to(shared, ca_file=nothing)
    nothing.write_text("no certificate")
    with pytest.raises(CertificateError, match=r"nothing\.pem"):
        await connect_to(shared, ca_file=nothing)


async def test_replaced_ca_file_is_read_again(
    serve: Serve, connect_to: ConnectTo, ca_file: Path, tmp_path: Path
) -> None:
    server = serve()
    authority = tmp_path / "ca.crt"
    shutil.copy(server.home / "certs" / "ca.crt", authority)
    os.utime(authority, (1, 1))
    async with connect_to(server, ca_file=authority) as client:
        shutil.copy(ca_file, authority)
        with pytest.raises(TlsError):
            await connect_to(server, ca_file=authority)
        assert await client.call("echo", x=1) == {"x": 1}


@pytest.mark.parametrize(
    "options",
    [
        {"verify": False, "ca_file": Path("ca.crt")},
        {"verify": False, "pins": [WRONG_PIN]},
        {"verify": False, "system_store": True},
        {"ca_file": Path("ca.crt"), "system_store": True},
        {"certificate_key": Path("client.key")},
        {"certificate_passphrase": "hunter2"},
    ],
)
def test_contradicting_trust_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Trust(ConnectOptions(**options))


@pytest.mark.parametrize("pin", ["", "sha256/", "sha256/short", "md5/" + "A" * 43 + "=", WRONG_PIN + "x"])
def test_malformed_pin_is_refused(pin: str) -> None:
    with pytest.raises(TlsError) as caught:
        connect("localhost", pins=[pin])
    assert caught.value.failure == "pin_malformed"


async def test_clients_with_the_same_trust_share_a_context(ca_file: Path) -> None:
    resources = LoopResources(asyncio.get_running_loop())

    def trust(**options: Any) -> ssl.SSLContext:
        return Trust(ConnectOptions(**options)).context(resources.contexts)

    assert trust(ca_file=ca_file) is trust(ca_file=ca_file, pins=[WRONG_PIN])
    assert trust(pins=[WRONG_PIN]).verify_mode is ssl.CERT_NONE
    assert trust() is trust(system_store=True)
    assert len({id(trust(ca_file=ca_file)), id(trust()), id(trust(verify=False))}) == 3


async def test_missing_ca_file_never_falls_back_to_other_trust(ca_file: Path, tmp_path: Path) -> None:
    resources = LoopResources(asyncio.get_running_loop())
    authority = tmp_path / "ca.crt"
    shutil.copy(ca_file, authority)
    Trust(ConnectOptions(ca_file=None)).context(resources.contexts)
    Trust(ConnectOptions(ca_file=authority)).context(resources.contexts)
    authority.unlink()
    with pytest.raises(CertificateError, match=r"ca\.crt"):
        Trust(ConnectOptions(ca_file=authority)).context(resources.contexts)


async def test_context_cache_is_bounded(ca_file: Path, tmp_path: Path) -> None:
    resources = LoopResources(asyncio.get_running_loop())
    for number in range(MAX_CONTEXTS + 3):
        link = tmp_path / f"{number}.pem"
        link.symlink_to(ca_file)
        trust = Trust(ConnectOptions(ca_file=link))
        newest = trust.context(resources.contexts)
    assert len(resources.contexts) == MAX_CONTEXTS
    assert trust.context(resources.contexts) is newest


async def test_concurrent_attempts_share_one_look_at_the_files_and_later_ones_look_again(
    ca_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resources, looks = LoopResources(asyncio.get_running_loop()), 0
    authority, other = tmp_path / "ca.crt", Trust(ConnectOptions(verify=False))
    shutil.copy(ca_file, authority)
    trusts = [Trust(ConnectOptions(ca_file=authority)) for _ in range(50)]
    looking = Trust.context

    def context(self: Trust, *arguments: Any) -> ssl.SSLContext:
        nonlocal looks
        looks += self is not other
        return looking(self, *arguments)

    monkeypatch.setattr(Trust, "context", context)
    cancelled = asyncio.ensure_future(resources.context(trusts[0]))
    asyncio.get_running_loop().call_soon(cancelled.cancel)
    first = await asyncio.gather(*map(resources.context, trusts), resources.context(other))
    assert looks == 1
    assert len({*map(id, first[:-1])}) == 1
    assert first[-1] is not first[0]
    authority.unlink()
    with pytest.raises(CertificateError, match=r"ca\.crt"):
        await resources.context(trusts[0])
    assert looks == 2


# --- the sts policy ----------------------------------------------------------------------------------


async def test_known_sts_host_refuses_verify_false(
    serve: Serve, connect_to: ConnectTo, known: Callable[[], dict[str, Any]]
) -> None:
    server = serve()
    async with connect_to(server, host="localhost", verify=False) as client:
        assert await client.call("echo", x=1) == {"x": 1}
    assert known() == {}  # nothing is learned from a server that was not verified
    async with connect_to(server, host="localhost"):
        pass
    assert known()["localhost"]["include_subdomains"] is True
    before = server.stats["connections_opened"]
    for host in ("localhost", "LOCALHOST.", "www.localhost"):
        with pytest.raises(TlsError) as caught:
            await connect_to(server, host=host, verify=False)
        assert caught.value.failure == "sts_policy"
    for host, name in (("localhost", "other.example"), ("127.0.0.1", "localhost")):
        with pytest.raises(TlsError) as caught:
            await connect_to(server, host=host, server_hostname=name, verify=False)
        assert caught.value.failure == "sts_policy"
    assert server.stats["connections_opened"] == before
    async with connect_to(server, host="127.0.0.1", verify=False):
        pass  # an address has no policy (RFC 6797 section 8.1.1)


async def test_sts_policy_expires_when_the_clock_is_set(home: Path) -> None:
    KnownHosts(home / KNOWN_HOSTS_FILE).learn("localhost", {"max_age": 60, "include_subdomains": False}, WALL)
    clock = LoopClock()
    client = Client("localhost:1", ConnectOptions(verify=False), clock=clock)
    clock.wall_ms += 59_000
    with pytest.raises(TlsError):
        await client
    client = Client("localhost:1", ConnectOptions(verify=False, start_timeout=0.0), clock=clock)
    clock.wall_ms += 2_000
    with pytest.raises(CannotConnect):
        await client


def damage(home: Path) -> None:
    home.mkdir()
    (home / "known_hosts.json").write_text("damaged")


async def test_sts_policy_that_cannot_be_stored_is_logged(
    shared: ServerThread, connect_to: ConnectTo, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await asyncio.to_thread(damage, home)
    with caplog.at_level(logging.WARNING, "zcproto.client"):
        async with connect_to(shared, host="localhost") as client:
            assert await client.call("echo", x=1) == {"x": 1}
    assert "localhost" in caplog.text
    with pytest.raises(TlsError, match="cannot be parsed"):
        await connect_to(shared, host="localhost", verify=False)


async def test_address_has_no_policy_and_needs_no_look_at_the_file(
    shared: ServerThread, connect_to: ConnectTo, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned: list[str] = []
    monkeypatch.setattr(KnownHosts, "learn", lambda self, host, *_: learned.append(host))
    for host in ("127.0.0.1", "localhost"):
        async with connect_to(shared, host=host) as client:
            assert await client.call("echo", x=1) == {"x": 1}
    assert learned == ["localhost"]


async def test_home_option_sets_the_known_hosts_folder(
    shared: ServerThread,
    connect_to: ConnectTo,
    tmp_path: Path,
    known: Callable[[], dict[str, Any]],
) -> None:
    elsewhere = tmp_path / "elsewhere"
    async with connect_to(shared, host="localhost", home=elsewhere):
        pass
    assert known() == {}
    with pytest.raises(TlsError, match="elsewhere"):
        await connect_to(shared, host="localhost", home=elsewhere, verify=False)
    with pytest.raises(ConfigError):
        connect("localhost", home="~unknown-user/x")


async def test_verify_false_works_without_a_home(
    shared: ServerThread, connect_to: ConnectTo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZCPROTO_HOME", "~unknown-user/x")
    async with connect_to(shared, host="localhost", verify=False) as client:
        assert await client.call("echo", x=1) == {"x": 1}


# --- no connection -----------------------------------------------------------------------------------


@pytest.fixture
def silent_socket() -> Iterator[tuple[str, socket.socket]]:
    """An address at which nothing listens, with the socket that could."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}", bound


async def test_connection_refused_names_address_and_cause(silent_socket: tuple[str, socket.socket]) -> None:
    address, _ = silent_socket
    with pytest.raises(CannotConnect) as caught:
        await connect(address, start_timeout=0, system_store=True)
    assert str(caught.value) == f"{address}: {REFUSED}"
    assert _resources == {}


async def test_unknown_host_raises() -> None:
    with pytest.raises(CannotConnect, match=r"^no-such-host\.invalid:7443: "):
        await connect("no-such-host.invalid", **PATIENT_CLIENT)


async def test_dns_that_does_not_answer_is_an_error(
    monkeypatch: pytest.MonkeyPatch, shared: ServerThread, connect_to: ConnectTo
) -> None:
    loop, resolve = asyncio.get_running_loop(), asyncio.get_running_loop().getaddrinfo

    async def hang(host: str, *args: Any, **kwargs: Any) -> Any:
        return await (loop.create_future() if host == "slow.example" else resolve(host, *args, **kwargs))

    monkeypatch.setattr(loop, "getaddrinfo", hang)
    with pytest.raises(CannotConnect, match=r"^slow\.example:7443: DNS has not answered within 0\.05 s"):
        await connect("slow.example", connect_timeout=0.05)
    ca_file = shared.home / "certs" / "ca.crt"
    async with connect(
        ["slow.example", f"localhost:{shared.port}"],
        address_order="listed",
        ca_file=ca_file,
        **PATIENT_CLIENT,
    ) as client:
        assert client.endpoint is not None
        assert client.endpoint.host == "localhost"


async def test_address_that_refuses_is_skipped(shared: ServerThread) -> None:
    addresses = f"127.0.0.1:{free_port()},localhost:{shared.port}"
    ca_file = shared.home / "certs" / "ca.crt"
    async with connect(addresses, address_order="listed", ca_file=ca_file, **PATIENT_CLIENT) as client:
        assert client.endpoint is not None
        assert (client.endpoint.host, client.endpoint.port) == ("localhost", shared.port)
        assert client.welcome["server"]


@pytest.mark.parametrize(
    ("sockaddr", "ip"),
    [
        (("192.0.2.1", 7443), "192.0.2.1"),
        (("2001:db8::1", 7443, 0, 0), "2001:db8::1"),
        (("fe80::1", 7443, 0, 2), "fe80::1%2"),
        (("fe80::1%eth0", 7443, 0, 2), "fe80::1%eth0"),
    ],
)
def test_link_local_address_keeps_its_zone(sockaddr: tuple[Any, ...], ip: str) -> None:
    assert _ip_of(sockaddr) == ip


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ECONNREFUSED, "Connect call failed ('::1', 1)"), REFUSED),
        (
            OSError(errno.ENETUNREACH, "Connect call failed"),
            "Network is unreachable; check the address and the network",
        ),
        (
            socket.gaierror(-2, "Name or service not known"),
            "Name or service not known; check the host name and DNS",
        ),
        (OSError("nothing more"), "OSError; check the host name and DNS"),
    ],
)
def test_failed_connect_is_one_system_message_with_its_cure(error: OSError, reason: str) -> None:
    failed = connect_error(Address("host", 7443), error)
    assert failed.reason == f"host:7443: {reason}"
    assert failed.refused == (reason == REFUSED)


# --- a server that is starting -----------------------------------------------------------------------


async def test_ca_that_the_server_creates_before_it_listens_is_awaited(
    silent_socket: tuple[str, socket.socket],
    server_pairs: ServerPairs,
    ca_file: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    address, listening = silent_socket
    opening = asyncio.create_task(
        connect(address, ca_file=tmp_path / "ca.crt", start_timeout=TIMEOUT, **PATIENT_CLIENT).open()
    )
    while not caplog.messages:  # noqa: ASYNC110 - the log has no event
        await asyncio.sleep(0.01)
    assert "waiting up to 900 s for the server to start" in caplog.text
    os.symlink(ca_file, tmp_path / "ca.crt")  # an attempt may be reading it
    server = await asyncio.start_server(leave, sock=listening, ssl=tls_13(server_pairs))
    with pytest.raises(ConnectionClosed, match="closed"):  # after the handshake: the CA was trusted
        await opening
    server.close()


async def test_missing_ca_without_a_server_is_named(
    silent_socket: tuple[str, socket.socket], tmp_path: Path
) -> None:
    missing = tmp_path / "ca.crt"
    with pytest.raises(CannotConnect, match=rf"refused, and {missing} does not exist; start the server"):
        await connect(silent_socket[0], ca_file=missing, start_timeout=0)


async def test_silent_address_fails_before_the_missing_ca_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        address = full.getsockname()
        with contextlib.ExitStack() as stack:
            for _ in range(4):  # fills the backlog: further connections get no answer
                waiting = stack.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(address)
            with pytest.raises(CannotConnect, match="no answer within"):
                await connect(f"127.0.0.1:{address[1]}", ca_file=tmp_path / "ca.crt", connect_timeout=0.5)


def tls_13(pairs: ServerPairs) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*pairs.ecdsa)
    context.set_alpn_protocols(["zcp/1"])
    return context


Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]


def saying(data: bytes) -> Talk:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10_000)
        writer.write(data)
        await writer.drain()

    return talk


async def say_at_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"\xff" * 200)
    await reader.read()


async def leave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.close()


async def silence(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()
    await reader.read()


QUICK = {"connect_timeout": 0.5}


@pytest.mark.parametrize(
    ("talk", "is_tls", "options", "error", "attributes"),
    [
        (saying(b"HTTP/1.1 400 Bad Request\r\n\r\n"), False, {}, TlsError, {"failure": "not_tls"}),
        (saying(b"SSH-2.0-OpenSSH_9.9\r\n"), False, {}, TlsError, {"failure": "not_tls"}),
        (saying(b""), False, {}, TlsError, {"failure": "disconnected"}),
        (silence, False, QUICK, CannotConnect, {}),
        (silence, True, QUICK, CannotConnect, {}),  # no WELCOME
        (say_at_once, True, {}, ConnectionClosed, {"code": Code.FRAME_TOO_LARGE}),
        (leave, True, {}, ConnectionClosed, {"code": None}),
    ],
    ids=["HTTP", "SSH", "closed", "silent", "silent after the handshake", "garbage", "closed after it"],
)
async def test_server_that_does_not_welcome_is_an_error(
    server_pairs: ServerPairs,
    ca_file: Path,
    talk: Talk,
    is_tls: bool,
    options: dict[str, Any],
    error: type[Exception],
    attributes: dict[str, Any],
) -> None:
    context = tls_13(server_pairs) if is_tls else None
    async with plain_server(talk, context) as address:
        with pytest.raises(error) as caught:
            await connect(address, ca_file=ca_file, **{**PATIENT_CLIENT, **options})
    assert {name: getattr(caught.value, name) for name in attributes} == attributes
    assert "connect_timeout" not in options or "no answer within 0.5 s" in str(caught.value)


async def test_late_tls_alert_raises_after_the_close() -> None:
    closed, may_close = asyncio.Event(), asyncio.Event()

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10_000)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        while await reader.read(10_000):
            pass
        closed.set()
        await may_close.wait()

    async with plain_server(speak) as address:
        connecting = asyncio.create_task(connect(address, system_store=True, **PATIENT_CLIENT).open())
        await closed.wait()
        assert not connecting.done()  # the caller may stop the loop at once, while the connection is open
        may_close.set()
        with pytest.raises(TlsError, match="does not speak TLS"):
            await connecting


async def test_late_tls_alert_without_close_raises_at_the_connect_timeout() -> None:
    refused, raised, reset = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def stay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10_000)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        while await reader.read(10_000):
            pass
        refused.set()
        await raised.wait()
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(b"still here")
                await writer.drain()
                await asyncio.sleep(0)
        reset.set()

    clock = MovableClock()
    async with plain_server(stay) as address:
        with clock.drive(asyncio.get_running_loop()):
            connecting = asyncio.create_task(connect(address, system_store=True, **PATIENT_CLIENT).open())
            await refused.wait()
            clock.advance(TIMEOUT)
            with pytest.raises(TlsError, match="does not speak TLS"):
                await connecting
        raised.set()
        await reset.wait()


async def test_connect_can_be_cancelled() -> None:
    connected = asyncio.Event()

    async def silence(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected.set()
        await reader.read()

    async with plain_server(silence) as address:
        connecting = asyncio.create_task(connect(address, system_store=True, **PATIENT_CLIENT).open())
        await connected.wait()
        connecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await connecting
    assert _resources == {}


async def test_connect_can_be_cancelled_while_storing_the_policy(
    serve: Serve, connect_to: ConnectTo, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(sessions__open_timeout="5m")  # the client ends the connection
    loop = asyncio.get_running_loop()
    learning, may_go_on = asyncio.Event(), threading.Event()

    def learn(*_: object) -> None:
        loop.call_soon_threadsafe(learning.set)
        may_go_on.wait(TIMEOUT)

    monkeypatch.setattr(KnownHosts, "learn", learn)
    connecting = asyncio.create_task(connect_to(server, host="localhost").open())
    await learning.wait()
    assert server.leftovers()["connections"] == 1
    connecting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await connecting
    may_go_on.set()
    await asyncio.to_thread(server.until_left)
    assert _resources == {}
