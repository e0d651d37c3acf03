"""Devices: sessions, and the proof of the key on each connection."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.client.helpers import (
    ReceivedRequest,
    ScriptedServer,
    ServerLink,
    client_of,
    cut,
    expire_token,
    fail,
    now,
    numbers,
    refreshable,
    scripted,
    silence,
    turns,
)
from tests.helpers import WALL
from tests.limits import TIMEOUT
from tests.server.helpers import ServerThread
from zcproto.auth import PairingFile, UserFile
from zcproto.auth import pairing as pairing_module
from zcproto.client.blocking import connect_blocking, enroll_blocking
from zcproto.client.client import Client, connect, enroll
from zcproto.client.credentials import CertificateLogin, Device
from zcproto.common.clock import system_clock
from zcproto.errors import (
    AlreadyExists,
    Code,
    DeadlineExceeded,
    InvalidArgument,
    ResourceExhausted,
    Unauthenticated,
)
from zcproto.wire.frame import NO_TOKEN
from zcproto.wire.message import attach_message, open_message

KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
DEVICE = Device(KEY)


# --- a server that binds sessions --------------------------------------------------------------------


class FakeTls:
    """The TLS object of a connection, with the server's certificate."""

    def getpeercert(self, binary_form: bool) -> bytes:
        assert binary_form
        return b"certificate"


LEAF = hashlib.sha256(b"certificate").digest()


class BoundServer(ScriptedServer):
    """Binds the sessions of one device and verifies its signatures."""

    def __init__(self) -> None:
        super().__init__()
        self.session = {"bound": True}
        self.proved: list[ServerLink] = []
        self.on_welcome = [self.greet] * 20
        self.refused: list[ReceivedRequest] = []

    def greet(self, link: ServerLink) -> None:
        link._extra["ssl_object"] = FakeTls()

    def act(self, request: ReceivedRequest) -> None:
        if self.scripts.get(request.method):
            super().act(request)
        elif request.method == "session.open":
            message = open_message(request.link.salt, LEAF, request.params["device"])
            KEY.public_key().verify(request.params["signature"], message)
            self.proved.append(request.link)
            super().act(request)
        elif request.method == "session.attach":
            message = attach_message(request.link.salt, LEAF, request.token)
            KEY.public_key().verify(request.params["signature"], message)
            self.proved.append(request.link)
            request.respond({})
        elif request.token != NO_TOKEN and request.link not in self.proved:
            self.refused.append(request)
            request.fail(Code.UNAUTHENTICATED, {"attach": True})
        else:
            super().act(request)


@pytest.fixture
def server() -> BoundServer:
    return BoundServer()


def device_client(server: ScriptedServer, **options: Any) -> Client:
    return client_of(server, user=None, device=DEVICE, device_name="laptop", **options)


@scripted
async def test_device_session_needs_no_attach_on_its_first_connection(server: BoundServer) -> None:
    async with device_client(server) as client:
        opened = server.calls("session.open")[0]
        assert {**opened.params, "signature": b""} == {
            "scheme": "ed25519",
            "device": "laptop",
            "signature": b"",
            "client": opened.params["client"],
        }
        assert client.session is not None
        assert client.session.bound
        assert await client.call("echo", x=1) == {"x": 1}
    assert server.methods == ["session.open", "echo", "session.close"]


@scripted
async def test_reconnect_attaches_before_any_call(server: BoundServer) -> None:
    async with device_client(server) as client:
        for number in range(3):
            await server.lose()
            assert await client.call("echo", x=number) == {"x": number}
    assert server.methods == ["session.open", *["session.attach", "echo"] * 3, "session.close"]
    assert server.refused == []
    assert {request.token for request in server.calls("session.attach")} == {bytes([1]) * 32}


@scripted
async def test_reconnect_attaches_before_handlers_are_registered(server: BoundServer) -> None:
    server.greeting["calls"] = {"max": 4}
    client = device_client(server)
    client.handler("ask")(lambda: 1)
    async with client:
        await server.lose()
        await asyncio.sleep(1)
    handled = ["session.handle", "session.attach", "session.handle"]
    assert server.methods == ["session.open", *handled, "session.close"]
    assert server.refused == []


def methods_of(link: ServerLink) -> list[str]:
    return [request.method for request in link.requests]


@pytest.mark.parametrize("outcome", ["proved", "refused", "lost"])
def test_calls_wait_until_handlers_are_registered_after_attach(outcome: str) -> None:
    @scripted
    async def test() -> None:
        server = BoundServer()
        server.greeting["calls"] = {"max": 4}
        client = device_client(server)
        client.handler("ask")(lambda: 1)
        async with client:
            held: list[ReceivedRequest] = []
            server.script("session.attach", held.append)
            await server.lose()
            call = asyncio.create_task(client.call("echo", x=1))
            await asyncio.sleep(1)
            link = server.link
            assert methods_of(link) == ["session.attach"]
            if outcome == "proved":
                server.proved.append(link)
                held[0].respond({})
            elif outcome == "refused":
                held[0].fail(Code.UNAVAILABLE, {"retry_after_ms": 0})
            else:
                link.cut()
            assert await call == {"x": 1}
            if outcome != "refused":
                assert methods_of(server.link) == ["session.attach", "session.handle", "echo"]
            await asyncio.sleep(2)
            assert server.calls("session.handle")[-1].link is server.link

    test()


@pytest.mark.parametrize("is_called_at_once", [True, False])
@scripted
async def test_handlers_are_registered_first_with_the_session_that_replaces_an_expired_one(
    server: BoundServer, is_called_at_once: bool
) -> None:
    server.greeting["calls"] = {"max": 4}
    client = device_client(server)
    client.handler("ask")(lambda: 1)
    async with client:
        expire_token(client)
        await server.lose()
        await asyncio.sleep(0 if is_called_at_once else 1)
        assert await client.call("echo", x=1) == {"x": 1}
        assert methods_of(server.link) == ["session.open", "session.handle", "echo"]


@scripted
async def test_call_refused_without_proof_attaches_and_is_retried(server: BoundServer) -> None:
    async with device_client(server) as client:
        server.proved.clear()  # the server has forgotten the proof: the name now belongs to another device
        assert await client.call("echo", x=1) == {"x": 1}
    assert server.methods == ["session.open", "echo", "session.attach", "echo", "session.close"]


@scripted
async def test_concurrent_refused_calls_attach_once(server: BoundServer) -> None:
    async with device_client(server) as client:
        server.proved.clear()
        answers = await asyncio.gather(*(client.call("echo", x=number) for number in range(10)))
        assert answers == [{"x": number} for number in range(10)]
    assert len(server.calls("session.attach")) == 1


@scripted
async def test_refused_attach_raises_and_is_not_retried(server: BoundServer) -> None:
    async with device_client(server) as client:
        server.proved.clear()
        server.script("session.attach", *[fail(Code.UNAUTHENTICATED)] * 2)
        for _ in range(2):
            with pytest.raises(Unauthenticated) as caught:
                await client.call("echo")
            assert caught.value.details == {}
        assert len(server.calls("session.attach")) == 2
        await client.open_session()  # retries explicitly
        assert await client.call("echo", x=1) == {"x": 1}


@scripted
async def test_second_attach_demand_raises(server: BoundServer) -> None:
    async with device_client(server) as client:
        server.script("echo", *[fail(Code.UNAUTHENTICATED, attach=True)] * 2)
        with pytest.raises(Unauthenticated) as caught:
            await client.call("echo")
        assert caught.value.details == {"attach": True}
        server.proved.clear()
        server.script("session.attach", *[fail(Code.UNAUTHENTICATED, attach=True)] * 2)
        with pytest.raises(Unauthenticated):
            await client.call("echo")
    assert len(server.calls("session.attach")) == 2


@scripted
async def test_attach_is_retried_within_the_timeout(server: BoundServer) -> None:
    async with device_client(server, random=numbers(0.0)) as client:
        server.proved.clear()
        server.script("session.attach", *[fail(Code.RESOURCE_EXHAUSTED, retry_after_ms=1000)] * 3)
        assert await client.call("echo", x=1) == {"x": 1}
        server.proved.clear()
        server.script("session.attach", *[fail(Code.RESOURCE_EXHAUSTED, retry_after_ms=1000)] * 100)
        with pytest.raises(ResourceExhausted):
            await client.call("echo", timeout=5.5)
        assert len(server.calls("session.attach")) == 4 + 6


@scripted
async def test_attach_with_stale_timestamp_is_retried(server: BoundServer) -> None:
    async with device_client(server) as client:
        await server.lose()
        server.script("session.attach", fail(Code.STALE_TIMESTAMP, server_time=WALL))
        assert await client.call("echo", x=1) == {"x": 1}


@scripted
async def test_token_expired_during_attach_is_renewed(server: BoundServer) -> None:
    async with device_client(server) as client:
        server.proved.clear()
        server.script("session.attach", fail(Code.TOKEN_EXPIRED))
        assert await client.call("echo", x=1) == {"x": 1}
    assert server.methods == [
        "session.open",
        "echo",
        "session.attach",
        "session.open",
        "echo",
        "session.close",
    ]


@scripted
async def test_attach_without_answer_ends_at_the_timeout(server: BoundServer) -> None:
    async with device_client(server) as client:
        server.proved.clear()
        server.script("session.attach", silence, silence)
        began = now()
        with pytest.raises(DeadlineExceeded, match="no answer within the call's timeout"):
            await client.call("echo", timeout=2)
        assert now() - began == pytest.approx(2)
        with pytest.raises(DeadlineExceeded):
            await client.call("echo", timeout=None)  # attach has its own timeout


@scripted
async def test_connection_lost_during_attach_is_retried(server: BoundServer) -> None:
    async with device_client(server) as client:
        server.proved.clear()
        server.script("session.attach", cut)
        assert await client.call("echo", x=1) == {"x": 1}
    assert server.methods.count("echo") == 2


@scripted
async def test_cancelled_call_does_not_cancel_the_shared_attach(server: BoundServer) -> None:
    async with device_client(server) as client:
        server.proved.clear()
        held: list[ReceivedRequest] = []
        server.script("session.attach", held.append)
        calls = [asyncio.create_task(client.call("echo", x=number)) for number in range(2)]
        await turns()
        calls[0].cancel()
        await turns()
        server.act(held[0])
        assert await calls[1] == {"x": 1}


@scripted
async def test_token_of_previous_session_is_not_attached(server: BoundServer) -> None:
    async with device_client(server) as client:
        held: list[ReceivedRequest] = []
        server.script("echo", held.append)
        call = asyncio.create_task(client.call("echo", x=1))
        await turns()
        expire_token(client)
        await client.call("echo", x=2)
        held[0].fail(Code.UNAUTHENTICATED, {"attach": True})
        assert await call == {"x": 1}
    assert server.calls("session.attach") == []


# --- refreshing --------------------------------------------------------------------------------------


@scripted
async def test_refreshed_token_needs_no_second_proof(server: BoundServer) -> None:
    server.session = refreshable(bound=True)
    async with device_client(server) as client:
        expire_token(client)
        assert await client.call("echo", x=1) == {"x": 1}
    assert server.methods == ["session.open", "session.refresh", "echo", "session.close"]


@scripted
async def test_token_refreshed_on_new_connection_is_attached(server: BoundServer) -> None:
    server.session = refreshable(bound=True)
    async with device_client(server) as client:
        expire_token(client)
        await server.lose()
        assert await client.call("echo", x=1) == {"x": 1}
        assert server.refused == []
    assert server.methods == ["session.open", "session.refresh", "session.attach", "echo", "session.close"]
    assert server.calls("session.attach")[0].token == bytes([2]) * 32


@scripted
async def test_refresh_refused_without_proof_attaches_and_is_retried(server: BoundServer) -> None:
    server.session = refreshable(bound=True)
    server.script("session.refresh", fail(Code.UNAUTHENTICATED, attach=True))
    async with device_client(server) as client:
        expire_token(client)
        assert await client.call("echo", x=1) == {"x": 1}
    refreshing = ["session.refresh", "session.attach", "session.refresh"]
    assert server.methods == ["session.open", *refreshing, "echo", "session.close"]


@scripted
async def test_expired_token_is_refreshed_without_attach(server: BoundServer) -> None:
    server.session = refreshable(bound=True)
    server.script("session.refresh", fail(Code.UNAUTHENTICATED, attach=True))
    server.script("session.attach", fail(Code.TOKEN_EXPIRED))
    async with device_client(server) as client:
        expire_token(client)
        assert await client.call("echo", x=1) == {"x": 1}


@scripted
async def test_refresh_that_cannot_be_proved_raises(server: BoundServer) -> None:
    server.session = refreshable(bound=True)
    server.script("session.refresh", *[fail(Code.UNAUTHENTICATED, attach=True)] * 10)
    async with device_client(server) as client:
        expire_token(client)
        with pytest.raises(Unauthenticated):
            await client.call("echo")
        assert len(server.calls("session.refresh")) == 2
        await client.open_session()
        await client.call("echo")


# --- without device-----------------------------------------------------------------------------------


@scripted
async def test_attach_demand_without_device_raises() -> None:
    server = ScriptedServer()
    async with client_of(server) as client:
        server.script("echo", fail(Code.UNAUTHENTICATED, attach=True))
        with pytest.raises(Unauthenticated) as caught:
            await client.call("echo")
        assert caught.value.details == {"attach": True}
    assert server.methods == ["session.open", "echo", "session.close"]


@scripted
async def test_unbound_session_is_presented_without_attach() -> None:
    server = ScriptedServer()
    async with device_client(server) as client:
        await server.lose()
        await client.call("echo")
    assert server.methods == ["session.open", "session.info", "echo", "session.close"]


def certificate_client(server: ScriptedServer) -> Client:
    """Return a client with a certificate, over a connection without TLS."""
    client = client_of(server)
    client._credentials = CertificateLogin()
    return client


@scripted
async def test_certificate_with_new_key_opens_another_session() -> None:
    server = ScriptedServer()
    server.session = refreshable(bound=True)
    async with certificate_client(server) as client:
        server.script("session.info", fail(Code.UNAUTHENTICATED, certificate=True))
        await server.lose()
        await turns()
        assert await client.call("echo", x=1) == {"x": 1}
        server.script("echo", fail(Code.UNAUTHENTICATED, certificate=True))
        assert await client.call("echo", x=2) == {"x": 2}
        assert "session.refresh" not in server.methods
        server.script("session.refresh", fail(Code.UNAUTHENTICATED, certificate=True))
        client._sessions._refresh_early()
        assert await client.call("echo", x=3) == {"x": 3}
        assert server.methods[-3:] == ["session.refresh", "session.open", "echo"]
        server.script("echo", *[fail(Code.UNAUTHENTICATED, certificate=True)] * 2)
        with pytest.raises(Unauthenticated):
            await client.call("echo")
    assert server.methods.count("session.open") == 5


@scripted
async def test_certificate_demand_without_certificate_raises() -> None:
    server = ScriptedServer()
    async with client_of(server) as client:
        server.script("session.info", fail(Code.UNAUTHENTICATED, certificate=True))
        await server.lose()
        await turns()
        server.script("echo", fail(Code.UNAUTHENTICATED, certificate=True))
        with pytest.raises(Unauthenticated):
            await client.call("echo")
    assert server.methods.count("session.open") == 1


# --- over real TLS -----------------------------------------------------------------------------------


class PairingServer:
    """A server with the user ada and pairing codes."""

    def __init__(self, home: Path, certs: Path) -> None:
        home.mkdir(mode=0o700)
        UserFile(home / "users.toml").add_digest("ada", None)
        self.codes = PairingFile(home / "pairing.toml")
        self.server = ServerThread(home, certs, users_file=True)
        self.trust = {"ca_file": home / "certs" / "ca.crt", "timeout": TIMEOUT}

    @property
    def address(self) -> str:
        return f"localhost:{self.server.port}"

    def code(self) -> str:
        return self.codes.make("ada", 60_000, system_clock.wall())

    def lose_connections(self) -> None:
        """Reset all connections."""
        self.server.in_loop(
            lambda: [each.abort("write_timeout") for each in list(self.server.server.state.connections)]
        )


@pytest.fixture
def pairing(tmp_path: Path, certs: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PairingServer]:
    monkeypatch.setattr(pairing_module, "_COST", 2)
    pairing = PairingServer(tmp_path / "home", certs)
    with pairing.server:
        yield pairing


async def test_enrolled_device_opens_sessions_that_survive_reconnect(pairing: PairingServer) -> None:
    assert await enroll(pairing.address, pairing.code(), DEVICE, "laptop", **pairing.trust) == "ada"
    async with connect(pairing.address, device=DEVICE, device_name="laptop", **pairing.trust) as client:
        assert client.session is not None
        session = client.session.id
        for number in range(3):
            assert await client.call("echo", x=number) == {"x": number}
            pairing.lose_connections()
            size = 100_000  # more than a connection without a session accepts
            assert await client.call("echo", idempotency_key=str(number), x=bytes(size)) == {"x": bytes(size)}
        info = await client.call("session.info")
        assert (info["id"], info["bound"]) == (session, True)


def test_blocking_client_enrolls_a_device(pairing: PairingServer, tmp_path: Path) -> None:
    device = Device.create(tmp_path / "laptop.key")
    assert enroll_blocking(pairing.address, pairing.code(), device, "laptop", **pairing.trust) == "ada"
    with connect_blocking(
        pairing.address, device=tmp_path / "laptop.key", device_name="laptop", **pairing.trust
    ) as client:
        assert client.session is not None
        assert client.session.bound
        pairing.lose_connections()
        assert client.call("echo", idempotency_key="k", x=1) == {"x": 1}


async def test_refused_enrolment_raises_the_reason(pairing: PairingServer) -> None:
    code = pairing.code()
    await enroll(pairing.address, pairing.code(), DEVICE, "laptop", **pairing.trust)
    with pytest.raises(AlreadyExists, match="choose another name"):
        await enroll(pairing.address, code, DEVICE, "laptop", **pairing.trust)
    assert await enroll(pairing.address, code, DEVICE, "laptop-2", **pairing.trust) == "ada"
    with pytest.raises(Unauthenticated, match="ask for a new one"):
        await enroll(pairing.address, code, DEVICE, "laptop-3", **pairing.trust)
    with pytest.raises(InvalidArgument, match="name"):
        await enroll(pairing.address, code, DEVICE, "", **pairing.trust)


async def test_unknown_device_opens_no_session(pairing: PairingServer) -> None:
    with pytest.raises(Unauthenticated):
        await connect(pairing.address, device=DEVICE, device_name="laptop", **pairing.trust)
