"""Test binding of sessions to users, networks and clients: refusals look like an unknown token and end nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from tests.server.conftest import Serve
from tests.server.helpers import AnsweredError, Client, ServerThread
from tests.server.protocol_harness import Harness, Peer
from zcproto.errors import Code, Unauthenticated
from zcproto.sessions import Session
from zcproto.sessions.binding import SessionBinding, network
from zcproto.sessions.record import SessionRecord
from zcproto.sessions.session import EXTERNAL
from zcproto.wire.frame import NO_TOKEN, Kind


@pytest.mark.parametrize(
    ("one", "other", "bits", "same"),
    [
        ("192.0.2.7", "192.0.2.200", 24, True),
        ("192.0.2.7", "192.0.3.7", 24, False),
        ("192.0.2.7", "192.0.2.8", 32, False),
        ("192.0.2.7", "192.0.2.8", 64, False),
        ("192.0.2.7", "192.0.2.7", 64, True),
        ("192.0.2.7", "::ffff:192.0.2.200", 24, True),
        ("192.0.2.7", "::ffff:192.0.2.7", None, True),
        ("192.0.2.7", "192.0.2.8", None, False),
        ("2001:db8::1", "2001:db8::ffff", 64, True),
        ("2001:db8::1", "2001:db8::ffff", None, False),
        ("2001:db8::1", "2001:db8:0:1::1", 64, False),
        ("2001:db8::1", "2001:db8:0:1::1", 56, True),
        ("2001:db8::1", "2001:db8:0:1::1", 24, False),
        ("2001:db8::1", "2001:db8::2", 24, True),
        ("2001:db8::1", "2001:0db8:0:0::1", None, True),
        ("::1", "127.0.0.1", 1, False),
        ("0.0.0.1", "::1", 33, False),
        ("::1", "::2", 128, False),
        ("a socket", "a socket", 24, True),
        ("a socket", "another", 24, False),
    ],
)
def test_network_groups_addresses(one: str, other: str, bits: int | None, same: bool) -> None:
    assert (network(one, bits) == network(other, bits)) == same
    binding = SessionBinding("exact" if bits is None else str(bits))
    assert binding.is_enabled
    assert binding.admits(record(one), other) == binding.admits(record(other), one) == same
    assert binding.refused_addresses == (0 if same else 2)


def test_binding_is_off_by_default() -> None:
    binding = SessionBinding()
    assert not binding.is_enabled
    assert binding.admits(record(), "2001:db8::1")
    binding.check_refresh(record(), "other/1", "2001:db8::1")
    assert binding.refused_addresses == binding.refused_clients == 0


def record(address: str = "192.0.2.7", user: str = "ada", flags: int = 0) -> SessionRecord:
    return SessionRecord(
        bytes(16), bytes(32), bytes(32), user, "test/1", address, flags, created_at=1, last_used_at=1,
        expires_at=2, refresh_expires_at=2,
    )  # fmt: skip


def test_refresh_is_checked_against_configured_binding() -> None:
    by_client, by_address = SessionBinding(client=True), SessionBinding("24")
    by_client.check_refresh(record(), "test/1", "2001:db8::1")
    by_address.check_refresh(record(), "other/1", "192.0.2.8")
    with pytest.raises(Unauthenticated):
        by_client.check_refresh(record(), "test/2", "192.0.2.7")
    with pytest.raises(Unauthenticated):
        by_address.check_refresh(record(), "test/1", "198.51.100.1")
    assert (by_client.refused_clients, by_client.refused_addresses) == (1, 0)
    assert (by_address.refused_clients, by_address.refused_addresses) == (0, 1)


def test_removed_user_is_refused() -> None:
    binding = SessionBinding()
    binding.is_user = {"bob"}.__contains__
    assert binding.is_enabled
    assert binding.admits(record(user="bob"), "2001:db8::1")
    assert not binding.admits(record(), "192.0.2.7")
    assert binding.admits(record(flags=EXTERNAL), "192.0.2.7")
    with pytest.raises(Unauthenticated):
        binding.check_refresh(record(), "test/1", "192.0.2.7")
    assert (binding.refused_users, binding.refused_addresses) == (2, 0)


def test_session_of_another_origin_is_refused() -> None:
    binding = SessionBinding()
    binding.is_user = {"ada"}.__contains__
    binding.is_origin = lambda user, key, origin: (user, key, origin) == ("ada", "device:phone", b"present!")
    present = record()._replace(key="device:phone", origin=b"present!")
    assert binding.admits(present, "192.0.2.7")
    assert binding.admits(record(), "192.0.2.7"), "opened by a version that kept no origin"
    for other in (present._replace(origin=b"previous"), present._replace(key="")):
        assert not binding.admits(other, "192.0.2.7")
        assert binding.admits(other._replace(flags=EXTERNAL), "192.0.2.7")
        with pytest.raises(Unauthenticated):
            binding.check_refresh(other, "test/1", "192.0.2.7")
    assert binding.refused_users == 4


def test_changed_binding_applies_to_what_follows() -> None:
    binding = SessionBinding("exact", client=True)
    binding.reconfigure("24", client=False)
    assert binding.admits(record(), "192.0.2.8")
    binding.check_refresh(record(), "other/1", "192.0.2.8")
    assert not binding.admits(record(), "198.51.100.1")


def test_unknown_refresh_token_is_not_checked() -> None:
    SessionBinding("exact", client=True).check_refresh(None, "any", "192.0.2.7")


# --- one connection ------------------------------------------------------------------------------------------


@pytest.fixture
def harness() -> Iterator[Harness]:
    loop = asyncio.new_event_loop()
    harness = Harness(loop)
    harness.state.binding = SessionBinding("24")
    yield harness
    assert loop.run_until_complete(harness.state.tasks.close(1.0)) == 0
    loop.close()


def peer_at(harness: Harness, address: str, monkeypatch: pytest.MonkeyPatch, token: bytes = NO_TOKEN) -> Peer:
    monkeypatch.setattr("tests.helpers.MockTransport.peer", address)
    peer = harness.connect()
    peer.token = token
    return peer


def open_at(harness: Harness, address: str) -> bytes:
    return harness.registry.open("ada", client="", address=address, wall=harness.clock.wall()).token


def code(peer: Peer, stream: int) -> int:
    peer.send(peer.request(stream, "big", {"n": 1, "size": 0}))
    (answer,) = peer.answers()
    return answer.error.code if answer.kind is Kind.ERROR else 0


def test_token_is_refused_from_another_network(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    token = open_at(harness, "192.0.2.7")
    thief = peer_at(harness, "198.51.100.1", monkeypatch, token)
    owner = peer_at(harness, "192.0.2.8", monkeypatch, token)
    for stream in range(1, 4):
        assert code(thief, stream) == Code.UNAUTHENTICATED
        assert code(owner, stream) == 0
    assert harness.state.binding.refused_addresses == 3
    harness.registry.revoke_user("ada", "test")
    harness.advance(0)
    assert [answer.kind for answer in owner.answers()] == [Kind.EVENT]
    assert thief.answers() == []


def test_binding_is_checked_once_per_connection_and_session(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[str] = []
    binding = harness.state.binding
    monkeypatch.setattr(binding, "admits", lambda record, address: checked.append(address) or True)
    peer = peer_at(harness, "192.0.2.8", monkeypatch, open_at(harness, "192.0.2.7"))
    for stream in range(1, 10):
        assert code(peer, stream) == 0
        harness.clock.advance(30)
    assert checked == ["192.0.2.8"]


def test_refused_token_does_not_keep_connection_open(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = peer_at(harness, "198.51.100.1", monkeypatch, open_at(harness, "192.0.2.7"))
    assert code(peer, 1) == Code.UNAUTHENTICATED
    harness.advance(11)
    assert peer.transport.is_closing()


def test_session_ended_during_lookup_is_not_admitted(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = open_at(harness, "192.0.2.7")
    session = harness.registry.check(token, harness.clock.wall())
    assert isinstance(session, Session)
    peer = peer_at(harness, "192.0.2.8", monkeypatch)
    assert peer.protocol.admits(session)
    harness.registry.close(session)
    assert not peer.protocol.admits(session)


def test_binding_is_not_checked_when_off(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    binding = harness.state.binding = SessionBinding()
    monkeypatch.setattr(binding, "admits", lambda *args: pytest.fail("checked"))
    peer = peer_at(harness, "198.51.100.1", monkeypatch, open_at(harness, "192.0.2.7"))
    assert code(peer, 1) == 0


# --- a whole server ------------------------------------------------------------------------------------------


def refused(client: Client, method: str, /, **params: object) -> object:
    with pytest.raises(AnsweredError) as error:
        client.call(method, params)
    return error.value.frame.value


@pytest.fixture
def both(serve: Serve) -> ServerThread:
    return serve(
        server__host=["127.0.0.1", "::1"], sessions__bind_address="exact", sessions__bind_client=True
    )


def client_of(server: ServerThread, host: str) -> Client:
    port = next(port for address, port in server.server.addresses if address == host)
    return Client(port, server.home / "certs" / "ca.crt", host=host)


def test_token_from_another_address_looks_unknown(both: ServerThread) -> None:
    with client_of(both, "127.0.0.1") as owner, client_of(both, "::1") as thief:
        owner.open_session("ada")
        thief.token = owner.token
        answer = refused(thief, "echo")
        thief.token = b"\x01" * 32
        assert answer == refused(thief, "echo")
        owner.echo()
    assert both.stats["refused_addresses"] == 1


@pytest.mark.parametrize("what", ["address", "client"])
def test_refresh_from_another_address_is_refused_and_session_stays(both: ServerThread, what: str) -> None:
    with client_of(both, "127.0.0.1") as owner, client_of(both, "::1") as elsewhere:
        owner.open_session("ada")
        token = owner.opened["refresh_token"]
        owner.token, live = NO_TOKEN, owner.token
        thief, client = (elsewhere, "test/1") if what == "address" else (owner, "thief/1")
        answer = refused(thief, "session.refresh", refresh_token=token, client=client)
        assert answer == refused(thief, "session.refresh", refresh_token=bytes(32), client=client)
        owner.token = live
        owner.echo()
        owner.token = NO_TOKEN
        again = owner.call("session.refresh", {"refresh_token": token, "client": "test/1"})
        assert again["id"] == owner.opened["id"]
    stats = both.stats
    assert (stats["refused_addresses"], stats["refused_clients"]) == ((1, 0) if what == "address" else (0, 1))
