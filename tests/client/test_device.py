"""Devices: the key file, sessions, and the proof of the key on each connection."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import pickle
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from tests.client.helpers import (
    ReceivedRequest,
    ScriptedServer,
    ServerLink,
    client_of,
    cut,
    fail,
    numbers,
    refreshable,
    scripted,
    silence,
    turns,
)
from tests.helpers import WALL
from tests.server.helpers import ServerThread
from zcproto.auth import PairingFile, UserFile
from zcproto.auth import pairing as pairing_module
from zcproto.client.blocking import connect_blocking, enroll_blocking
from zcproto.client.client import Client, connect, enroll
from zcproto.client.credentials import CertificateLogin, Device
from zcproto.common.clock import system_clock
from zcproto.errors import (
    AlreadyExists,
    CertificateError,
    Code,
    ConfigError,
    DeadlineExceeded,
    InvalidArgument,
    ResourceExhausted,
    Unauthenticated,
)
from zcproto.wire.frame import NO_TOKEN
from zcproto.wire.message import attach_message, open_message

KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
DEVICE = Device(KEY)


# --- the file of the key -----------------------------------------------------------------------------


def test_device_key_is_created_once_and_loaded(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        made = Device.create(tmp_path / "laptop.key")
    finally:
        os.umask(old)
    loaded = Device.load(str(tmp_path / "laptop.key"))
    assert loaded.public_key == made.public_key
    assert len(made.public_key) == 32
    Ed25519PublicKey.from_public_bytes(made.public_key).verify(loaded.sign(b"this"), b"this")
    assert stat.S_IMODE((tmp_path / "laptop.key").stat().st_mode) == 0o600
    assert (tmp_path / "laptop.key").read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----\n")
    assert Device.create(tmp_path / "other.key").public_key != made.public_key


def test_device_key_is_not_in_repr_and_not_pickled(tmp_path: Path) -> None:
    assert repr(DEVICE) == f"Device(public_key={DEVICE.public_key.hex()!r})"
    assert KEY.private_bytes_raw().hex() not in repr(DEVICE)
    with pytest.raises(TypeError):
        pickle.dumps(DEVICE)
    assert not hasattr(DEVICE, "__dict__")


@pytest.mark.parametrize("what", ["file", "link", "folder"])
def test_existing_path_is_not_overwritten_by_create(tmp_path: Path, what: str) -> None:
    path = tmp_path / "laptop.key"
    if what == "file":
        path.write_text("old")
    elif what == "link":
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path.mkdir()
    with pytest.raises(CertificateError, match="exists already; load it, or name another file"):
        Device.create(path)
    assert what != "file" or path.read_text() == "old"
    assert not (tmp_path / "elsewhere").exists()


def test_unwritable_path_raises_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        CertificateError, match="cannot be written: No such file or directory; check the path"
    ):
        Device.create(tmp_path / "no" / "laptop.key")
    with pytest.raises(CertificateError, match="cannot be written: ValueError"):
        Device.create("a\0b")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CertificateError, match="cannot be written: No space left on device"):
        Device.create(tmp_path / "laptop.key")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644, 0o660, 0o777])
def test_device_key_readable_by_others_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "laptop.key"
    Device.create(path)
    path.chmod(mode)
    with pytest.raises(CertificateError) as caught:
        Device.load(path)
    assert f"mode {mode:04o}" in str(caught.value)
    assert f"chmod 600 {path}" in str(caught.value)


def test_device_key_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Device.create(tmp_path / "laptop.key")
    status = os.stat(tmp_path / "laptop.key")
    other = os.stat_result((*status[:4], status.st_uid + 12345, *status[5:]))
    monkeypatch.setattr(os, "fstat", lambda descriptor: other)
    with pytest.raises(CertificateError, match="belongs to another user"):
        Device.load(tmp_path / "laptop.key")


def pem(key: Any, encryption: Any = None) -> bytes:
    data: bytes = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption())
    return data


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "does not contain a private key in PEM; create one with Device.create"),
        (b"nonsense", "does not contain a private key in PEM"),
        (pem(KEY)[:-60], "does not contain a private key in PEM"),
        (pem(ec.generate_private_key(ec.SECP256R1())), "is not an Ed25519 key"),
        (
            pem(KEY, BestAvailableEncryption(b"hunter2")),
            "is encrypted; use a device key without a passphrase",
        ),
        (b"x" * 200_000, "is larger than 65536 bytes"),
    ],
)
def test_invalid_device_key_raises_without_its_content(tmp_path: Path, data: bytes, expected: str) -> None:
    path = tmp_path / "laptop.key"
    path.touch(0o600)
    path.write_bytes(data)
    with pytest.raises(CertificateError, match=expected) as caught:
        Device.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).isprintable()


def test_missing_file_folder_and_fifo_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CertificateError, match="cannot be read: No such file or directory"):
        Device.load(tmp_path / "laptop.key")
    with pytest.raises(CertificateError, match="is not a regular file"):
        Device.load(tmp_path)
    os.mkfifo(tmp_path / "fifo", 0o600)
    with pytest.raises(CertificateError, match="is not a regular file"):
        Device.load(tmp_path / "fifo")
    with pytest.raises(CertificateError, match="cannot be read: ValueError"):
        Device.load("a\0b")


def test_device_option_accepts_device_or_file(tmp_path: Path) -> None:
    device = Device.create(tmp_path / "laptop.key")
    for given in (device, tmp_path / "laptop.key", str(tmp_path / "laptop.key")):
        connect("localhost", device=given, device_name="laptop")
    with pytest.raises(CertificateError):
        connect("localhost", device=tmp_path / "other.key", device_name="laptop")
    with pytest.raises(ConfigError, match="device_name is missing"):
        connect("localhost", device=device)


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


def device_client(server: ScriptedServer, **options: Any) -> Client:
    return client_of(server, user=None, device=DEVICE, device_name="laptop", **options)


@scripted
async def test_device_session_needs_no_attach_on_its_first_connection() -> None:
    server = BoundServer()
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
async def test_reconnect_attaches_before_any_call() -> None:
    server = BoundServer()
    async with device_client(server) as client:
        for number in range(3):
            await server.lose()
            assert await client.call("echo", x=number) == {"x": number}
    assert server.methods == ["session.open", *["session.attach", "echo"] * 3, "session.close"]
    assert server.refused == []
    assert {request.token for request in server.calls("session.attach")} == {bytes([1]) * 32}


@scripted
async def test_call_refused_without_proof_attaches_and_is_retried() -> None:
    server = BoundServer()
    async with device_client(server) as client:
        server.proved.clear()  # the server has forgotten the proof: the name now belongs to another device
        assert await client.call("echo", x=1) == {"x": 1}
    assert server.methods == ["session.open", "echo", "session.attach", "echo", "session.close"]


@scripted
async def test_concurrent_refused_calls_attach_once() -> None:
    server = BoundServer()
    async with device_client(server) as client:
        server.proved.clear()
        answers = await asyncio.gather(*(client.call("echo", x=number) for number in range(10)))
        assert answers == [{"x": number} for number in range(10)]
    assert len(server.calls("session.attach")) == 1


@scripted
async def test_refused_attach_raises_and_is_not_retried() -> None:
    server = BoundServer()
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
async def test_second_attach_demand_raises() -> None:
    server = BoundServer()
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
async def test_attach_is_retried_within_the_timeout() -> None:
    server = BoundServer()
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
async def test_attach_with_stale_timestamp_is_retried() -> None:
    server = BoundServer()
    async with device_client(server) as client:
        await server.lose()
        server.script("session.attach", fail(Code.STALE_TIMESTAMP, server_time=WALL))
        assert await client.call("echo", x=1) == {"x": 1}


@scripted
async def test_token_expired_during_attach_is_renewed() -> None:
    server = BoundServer()
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
async def test_attach_without_answer_ends_at_the_timeout() -> None:
    server = BoundServer()
    async with device_client(server) as client:
        server.proved.clear()
        server.script("session.attach", silence, silence)
        with pytest.raises(DeadlineExceeded, match="no answer within the call's timeout"):
            await client.call("echo", timeout=2)
        with pytest.raises(DeadlineExceeded):
            await client.call("echo", timeout=None)  # attach has its own timeout


@scripted
async def test_connection_lost_during_attach_is_retried() -> None:
    server = BoundServer()
    async with device_client(server) as client:
        server.proved.clear()
        server.script("session.attach", cut)
        assert await client.call("echo", x=1) == {"x": 1}
    assert server.methods.count("echo") == 2


@scripted
async def test_cancelled_call_does_not_cancel_the_shared_attach() -> None:
    server = BoundServer()
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
async def test_token_of_previous_session_is_not_attached() -> None:
    server = BoundServer()
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


def expire_token(client: Client) -> None:
    """Make the client treat its token as expired before it sends one."""
    client._sessions.expired(client._sessions.token)


# --- refreshing --------------------------------------------------------------------------------------


@scripted
async def test_refreshed_token_needs_no_second_proof() -> None:
    server = BoundServer()
    server.session = refreshable(bound=True)
    async with device_client(server) as client:
        expire_token(client)
        assert await client.call("echo", x=1) == {"x": 1}
    assert server.methods == ["session.open", "session.refresh", "echo", "session.close"]


@scripted
async def test_token_refreshed_on_new_connection_is_attached() -> None:
    server = BoundServer()
    server.session = refreshable(bound=True)
    async with device_client(server) as client:
        expire_token(client)
        await server.lose()
        assert await client.call("echo", x=1) == {"x": 1}
        assert server.refused == []
    assert server.methods == ["session.open", "session.refresh", "session.attach", "echo", "session.close"]
    assert server.calls("session.attach")[0].token == bytes([2]) * 32


@scripted
async def test_refresh_refused_without_proof_attaches_and_is_retried() -> None:
    server = BoundServer()
    server.session = refreshable(bound=True)
    server.script("session.refresh", fail(Code.UNAUTHENTICATED, attach=True))
    async with device_client(server) as client:
        expire_token(client)
        assert await client.call("echo", x=1) == {"x": 1}
    refreshing = ["session.refresh", "session.attach", "session.refresh"]
    assert server.methods == ["session.open", *refreshing, "echo", "session.close"]


@scripted
async def test_expired_token_is_refreshed_without_attach() -> None:
    server = BoundServer()
    server.session = refreshable(bound=True)
    server.script("session.refresh", fail(Code.UNAUTHENTICATED, attach=True))
    server.script("session.attach", fail(Code.TOKEN_EXPIRED))
    async with device_client(server) as client:
        expire_token(client)
        assert await client.call("echo", x=1) == {"x": 1}


@scripted
async def test_refresh_that_cannot_be_proved_raises() -> None:
    server = BoundServer()
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
        self.trust = {"ca_file": home / "certs" / "ca.crt"}

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
