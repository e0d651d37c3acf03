"""Tests of a stolen token of a bound session over real TLS: it is useless.

The thief has everything but the device's key: both tokens, a place in the network, signatures seen on other
connections, and a server that the device may be tricked into using.
"""

from __future__ import annotations

import os
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import trustme
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.limits import TIMEOUT
from tests.server.helpers import NO_TOKEN, Client, Frame, client_context
from tests.server.test_bound_sessions import KEYS, DeviceServer, attaching, leaf, needs_attach, opening
from zcproto.client.blocking import BlockingClient, connect_blocking
from zcproto.client.credentials import Device
from zcproto.errors import Code, Unauthenticated
from zcproto.wire.message import attach_message, open_message

THIEFS_KEY = Ed25519PrivateKey.from_private_bytes(b"t" * 32)
METHODS = (
    "echo",
    "time",
    "session.info",
    "session.list",
    "session.revoke",
    "session.close",
    "server.info",
    "no.such",
)


class AttackedServer(DeviceServer):
    """A server and the open session of ada's laptop."""

    def connect_device(self) -> None:
        """Connect the device and open its session."""
        self.device = self.open()
        self.token: bytes = self.device.opened["token"]
        self.refresh_token: bytes = self.device.opened["refresh_token"]

    def attaching(self, client: Client) -> dict[str, Any]:
        return attaching(client, self.token)

    def assert_undisturbed(self) -> None:
        """Check that the device has not been disturbed."""
        self.device.echo()
        assert self.device.events == []


@pytest.fixture
def attacked(tmp_path: Path, certs: Path) -> Iterator[AttackedServer]:
    attacked = AttackedServer(tmp_path / "home", certs)
    with attacked.server:
        attacked.connect_device()
        yield attacked
        attacked.assert_undisturbed()
        attacked.device.close()
        attacked.server.until_left()


@pytest.fixture
def thief(attacked: AttackedServer) -> Iterator[Client]:
    with attacked.server.client() as client:
        yield client


def not_accepted(frame: Frame) -> bool:
    return (frame.code, frame.details) == (Code.UNAUTHENTICATED, {})


# --- the tokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_stolen_bound_token_cannot_call(attacked: AttackedServer, thief: Client, method: str) -> None:
    assert needs_attach(thief.refused(method, {"id": attacked.device.opened["id"]}, token=attacked.token))


def test_stolen_bound_token_gains_no_event_frame_size_or_time(
    attacked: AttackedServer, thief: Client
) -> None:
    before = attacked.device.call("session.info")["last_used_at"]
    for _ in range(100):
        assert needs_attach(thief.refused("echo", {"x": b"x" * 10_000}, token=attacked.token))
    thief.send(thief.request("echo", {"x": b"x" * 100_000}, token=attacked.token))
    frames, _ = thief.rest_until_closed()
    assert frames[-1].code == Code.FRAME_TOO_LARGE
    registry = attacked.server.server.state.registry
    info = attacked.server.in_loop(
        lambda: registry.info(attacked.device.opened["id"], attacked.server.clock.wall())
    )
    assert info.last_used_at == before


def test_stolen_bound_token_fails_beside_the_thiefs_session(attacked: AttackedServer, thief: Client) -> None:
    """The thief has an account, a device and a proved key on this connection."""
    attacked.users.add("eve")
    attacked.devices.add("eves", "eve", THIEFS_KEY.public_key().public_bytes_raw(), datetime.now(UTC))
    signature = THIEFS_KEY.sign(open_message(thief.salt, leaf(thief), "eves"))
    opened = thief.call("session.open", {"scheme": "ed25519", "device": "eves", "signature": signature})
    thief.token = opened["token"]
    thief.echo()
    assert needs_attach(thief.refused("echo", token=attacked.token))
    signature = THIEFS_KEY.sign(attach_message(thief.salt, leaf(thief), attacked.token))
    assert not_accepted(thief.refused("session.attach", {"signature": signature}, token=attacked.token))
    assert thief.refused("session.revoke", {"id": attacked.device.opened["id"]}).code == Code.NOT_FOUND
    thief.echo()


def test_stolen_bound_refresh_token_fails_without_side_effect(
    attacked: AttackedServer, thief: Client
) -> None:
    for client in ("", "test/1"):
        params = {"refresh_token": attacked.refresh_token, "client": client}
        assert needs_attach(thief.refused("session.refresh", params))
    attacked.assert_undisturbed()
    refreshed = attacked.device.call(
        "session.refresh", {"refresh_token": attacked.refresh_token}, token=NO_TOKEN
    )
    attacked.device.token = attacked.token = refreshed["token"]
    assert needs_attach(thief.refused("echo", token=attacked.token))
    assert needs_attach(thief.refused("session.refresh", {"refresh_token": refreshed["refresh_token"]}))


def test_stolen_refresh_token_of_offline_device_yields_a_bound_token(
    attacked: AttackedServer, thief: Client
) -> None:
    """An expired token cannot be attached: the refresh comes before the proof."""
    late = {"timestamp": attacked.server.clock.wall() + 7_200_000}
    attacked.server.clock.ahead_ms = 7_200_000
    stolen = thief.call("session.refresh", {"refresh_token": attacked.refresh_token}, token=NO_TOKEN, **late)
    for method in METHODS:
        assert needs_attach(thief.refused(method, token=stolen["token"], **late))
    params = {"refresh_token": stolen["refresh_token"]}
    assert needs_attach(thief.refused("session.refresh", params, token=NO_TOKEN, **late))
    # The device's own refresh token is spent: its next refresh ends the whole session.
    params = {"refresh_token": attacked.refresh_token, "client": "laptop/1"}
    assert (
        attacked.device.refused("session.refresh", params, token=NO_TOKEN, **late).code == Code.TOKEN_REVOKED
    )
    assert thief.refused("echo", token=stolen["token"], **late).code == Code.TOKEN_REVOKED
    attacked.server.clock.ahead_ms = 0
    opened = attacked.device.call("session.open", opening(attacked.device), token=NO_TOKEN)
    attacked.device.token = opened["token"]


# --- signatures seen elsewhere -----------------------------------------------------------------------


# --- a server in between -----------------------------------------------------------------------------


class Relay(threading.Thread):
    """A server of the thief that the device trusts, which relays to the real one.

    It terminates TLS on both sides: it can read and change every byte, but not use the real certificate.
    """

    def __init__(self, certificate: Path, key: Path, target: int, ca_file: Path) -> None:
        super().__init__(name="relay", daemon=True)
        self.seen = [b"", b""]
        self._target = target
        self._upstream = client_context(ca_file)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.minimum_version = ssl.TLSVersion.TLSv1_3
        self._context.set_alpn_protocols(["zcp/1"])
        self._context.load_cert_chain(certificate, key)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self._pumps: list[threading.Thread] = []
        self._sockets: list[socket.socket] = [self._listening]

    def run(self) -> None:
        with suppress(OSError):
            while True:
                raw, _ = self._listening.accept()
                near = self._context.wrap_socket(raw, server_side=True)
                far = self._upstream.wrap_socket(
                    socket.create_connection(("127.0.0.1", self._target)), server_hostname="localhost"
                )
                self._sockets += [near, far]
                for side, (source, sink) in enumerate(((near, far), (far, near))):
                    pump = threading.Thread(target=self._pump, args=(side, source, sink), daemon=True)
                    self._pumps.append(pump)
                    pump.start()

    def _pump(self, side: int, source: ssl.SSLSocket, sink: ssl.SSLSocket) -> None:
        with suppress(OSError, ValueError):
            while data := source.recv(65_536):
                self.seen[side] += data
                sink.sendall(data)
        with suppress(OSError, ValueError):
            sink.shutdown(socket.SHUT_WR)

    def end(self) -> None:
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        for each in self._sockets:
            with suppress(OSError):
                each.close()
        for pump in self._pumps:
            pump.join(TIMEOUT)
        self.join(TIMEOUT)


@pytest.fixture
def relay(attacked: AttackedServer, tmp_path: Path) -> Iterator[Relay]:
    """Create its certificate for the server's name, from an authority that the device trusts."""
    authority = trustme.CA(key_type=trustme.KeyType.ECDSA)
    issued = authority.issue_cert("localhost", "127.0.0.1", key_type=trustme.KeyType.ECDSA)
    issued.cert_chain_pems[0].write_to_path(tmp_path / "relay.crt")
    issued.private_key_pem.write_to_path(tmp_path / "relay.key")
    trusted = attacked.server.ca_file.read_bytes() + authority.cert_pem.bytes()
    (tmp_path / "trusted.pem").write_bytes(trusted)
    relay = Relay(
        tmp_path / "relay.crt", tmp_path / "relay.key", attacked.server.port, attacked.server.ca_file
    )
    relay.start()
    yield relay
    relay.end()


def through(relay: Relay, tmp_path: Path) -> Client:
    return Client(relay.port, tmp_path / "trusted.pem")


def test_signature_relayed_through_another_server_opens_no_session(
    attacked: AttackedServer, relay: Relay, tmp_path: Path
) -> None:
    """The salt is that of the real server, the certificate is not."""
    with through(relay, tmp_path) as fooled:
        relayed = opening(fooled)
        assert not_accepted(fooled.refused("session.open", relayed))
        assert relayed["signature"] in relay.seen[0]  # it did arrive


def test_token_cannot_be_attached_through_a_relay(
    attacked: AttackedServer, relay: Relay, tmp_path: Path
) -> None:
    with through(relay, tmp_path) as fooled:
        attaching = attacked.attaching(fooled)
        assert not_accepted(fooled.refused("session.attach", attaching, token=attacked.token))
        assert needs_attach(fooled.refused("echo", token=attacked.token))


def test_relay_cannot_reuse_what_it_saw(
    attacked: AttackedServer, relay: Relay, thief: Client, tmp_path: Path
) -> None:
    with through(relay, tmp_path) as fooled:
        assert not_accepted(thief.refused("session.open", opening(fooled)))
        assert not_accepted(thief.refused("session.attach", attacked.attaching(fooled), token=attacked.token))


def library(attacked: AttackedServer, port: int, ca_file: Path, device: Device) -> BlockingClient:
    return connect_blocking(
        f"localhost:{port}",
        device=device,
        device_name="laptop",
        ca_file=ca_file,
        home=attacked.server.home / "client",
    )


def test_client_library_resists_a_relay(attacked: AttackedServer, relay: Relay, tmp_path: Path) -> None:
    device = Device(KEYS["laptop"])
    with library(attacked, attacked.server.port, attacked.server.ca_file, device) as client:
        assert client.call("echo", x=1) == {"x": 1}
    with pytest.raises(Unauthenticated), library(attacked, relay.port, tmp_path / "trusted.pem", device):
        pass


# --- guessing ----------------------------------------------------------------------------------------


def test_random_signatures_are_refused(attacked: AttackedServer, thief: Client) -> None:
    for _ in range(50):
        attaching = {"signature": os.urandom(64)}
        assert not_accepted(thief.refused("session.attach", attaching, token=attacked.token))
    good = bytearray(attacked.attaching(thief)["signature"])
    for bit in range(0, 512, 13):
        good[bit // 8] ^= 1 << bit % 8
        assert not_accepted(thief.refused("session.attach", {"signature": bytes(good)}, token=attacked.token))
        good[bit // 8] ^= 1 << bit % 8


def test_signature_made_for_something_else_is_refused(attacked: AttackedServer, thief: Client) -> None:
    """Each of them is valid for what it was made for."""
    with attacked.client() as seen:
        other = attacked.device.call("session.open", opening(attacked.device), token=NO_TOKEN)["token"]
        of_opening, of_attaching = opening(thief), attacked.attaching(thief)
        assert not_accepted(thief.refused("session.open", opening(seen)))
        assert not_accepted(thief.refused("session.open", {**of_opening, **of_attaching}))
        for token, params in (
            (attacked.token, attacked.attaching(seen)),
            (attacked.token, {"signature": of_opening["signature"]}),
            (other, of_attaching),
        ):
            assert not_accepted(thief.refused("session.attach", params, token=token))
            assert needs_attach(thief.refused("echo", token=token))
        assert seen.call("session.attach", attacked.attaching(seen), token=attacked.token) == {}
        assert thief.call("session.attach", of_attaching, token=attacked.token) == {}
