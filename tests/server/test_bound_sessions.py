"""Tests of devices over real TLS: enrollment, bound sessions, attach, refresh and removal."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.audit_trail import lines_of
from tests.server.helpers import EVENT, NO_TOKEN, Client, Frame, ServerThread, eventually, wall
from zcproto.auth import DeviceFile, PairingFile, UserFile
from zcproto.auth import pairing as pairing_module
from zcproto.auth.schemes import DeviceAuthenticator
from zcproto.config.model import LogConfig
from zcproto.errors import Code
from zcproto.observe.log import configure_logging
from zcproto.sessions.registry import NEVER
from zcproto.wire.message import attach_message, open_message

KEYS = {
    name: Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n, name in enumerate(("laptop", "phone"))
}
HOUR_MS = 3_600_000


def public(name: str) -> bytes:
    return KEYS[name].public_key().public_bytes_raw()


def leaf(client: Client) -> bytes:
    certificate = client.tls.getpeercert(binary_form=True)
    assert certificate is not None
    return hashlib.sha256(certificate).digest()


def opening(client: Client, device: str = "laptop", key: str = "laptop") -> dict[str, Any]:
    signature = KEYS[key].sign(open_message(client.salt, leaf(client), device))
    return {"scheme": "ed25519", "device": device, "signature": signature}


def attaching(client: Client, token: bytes, key: str = "laptop") -> dict[str, Any]:
    return {"signature": KEYS[key].sign(attach_message(client.salt, leaf(client), token))}


class DeviceServer:
    """A server with the users ada and bob, and ada's laptop."""

    def __init__(self, home: Path, certs: Path, **options: Any) -> None:
        home.mkdir(mode=0o700)
        self.home = home
        self.users = UserFile(home / "users.toml")
        self.keys = {"ada": self.users.add("ada"), "bob": self.users.add("bob")}
        self.devices = DeviceFile(home / "devices.toml")
        self.add("laptop")
        self.codes = PairingFile(home / "pairing.toml")
        self.server = ServerThread(home, certs, users_file=True, **options)

    def add(self, name: str, user: str = "ada", key: str | None = None) -> None:
        self.devices.add(name, user, public(key or name), datetime.now(UTC))

    def client(self) -> Client:
        return self.server.client()

    def open(self, device: str = "laptop", key: str | None = None) -> Client:
        client = self.client()
        client.opened = client.call("session.open", opening(client, device, key or device))
        client.token = client.opened["token"]
        return client


@pytest.fixture
def harness(tmp_path: Path, certs: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DeviceServer]:
    monkeypatch.setattr(pairing_module, "_COST", 2)
    harness = DeviceServer(tmp_path / "home", certs)
    with harness.server:
        yield harness


def needs_attach(frame: Frame) -> bool:
    return (frame.code, frame.details) == (Code.UNAUTHENTICATED, {"attach": True})


# --- opening and attaching ---------------------------------------------------------------------------


def test_device_opens_and_uses_a_bound_session(harness: DeviceServer) -> None:
    with harness.open() as client:
        assert (client.opened["user"], client.opened["bound"]) == ("ada", True)
        client.echo()
        info = client.call("session.info")
        assert (info["id"], info["bound"]) == (client.opened["id"], True)
        client.echo(size=100_000)


def test_bound_token_needs_attach_on_another_connection(harness: DeviceServer) -> None:
    with harness.open() as client, harness.client() as other:
        other.token = client.token
        for method in ("echo", "session.info", "session.close", "server.info", "no.such"):
            assert needs_attach(other.refused(method))
        assert other.call("session.attach", attaching(other, other.token)) == {}
        other.echo()
        other.echo(size=100_000)
        assert other.call("session.attach", attaching(other, other.token)) == {}
        client.echo()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda harness, mine, other: {"signature": bytes(64)},
        lambda harness, mine, other: attaching(mine, mine.token),  # made for another connection
        lambda harness, mine, other: attaching(other, bytes(32)),
        lambda harness, mine, other: attaching(other, mine.token, "phone"),
        lambda harness, mine, other: {"signature": opening(other)["signature"]},
    ],
)
def test_wrong_signature_does_not_attach(harness: DeviceServer, wrong: Callable[..., dict[str, Any]]) -> None:
    with harness.open() as client, harness.client() as other:
        frame = other.refused("session.attach", wrong(harness, client, other), token=client.token)
        assert (frame.code, frame.details) == (Code.UNAUTHENTICATED, {})
        assert needs_attach(other.refused("echo", token=client.token))
        client.echo()


@pytest.mark.parametrize(
    "params", [{}, {"signature": "x" * 64}, {"signature": bytes(63)}, {"signature": None}]
)
def test_malformed_signature_is_refused(harness: DeviceServer, params: dict[str, Any]) -> None:
    with harness.open() as client, harness.client() as other:
        assert other.refused("session.attach", params, token=client.token).code == Code.INVALID_ARGUMENT


def test_unbound_session_cannot_be_attached(harness: DeviceServer) -> None:
    with harness.client() as client, harness.client() as other:
        client.open_session("ada", harness.keys["ada"])
        assert client.opened["bound"] is False
        other.token = client.token
        other.echo()
        assert client.refused("session.attach", {"signature": bytes(64)}).code == Code.FAILED_PRECONDITION
        assert client.refused("session.attach", {"signature": bytes(64)}, token=NO_TOKEN).code == (
            Code.UNAUTHENTICATED
        )


def test_attach_and_call_in_one_read_succeed(harness: DeviceServer) -> None:
    with harness.open() as client, harness.client() as other:
        other.token = client.token
        other.send(
            other.request("session.attach", attaching(other, other.token)), other.request("echo", {"x": 1})
        )
        answers = other.answers(2)
        assert [answers[stream].value for stream in sorted(answers)] == [{}, {"x": 1}]


def test_connection_carries_sessions_of_several_devices(harness: DeviceServer) -> None:
    harness.add("phone", "bob")
    with harness.open() as laptop, harness.open("phone") as phone, harness.client() as gateway:
        for client, key in ((laptop, "laptop"), (phone, "phone")):
            assert needs_attach(gateway.refused("echo", token=client.token))
            gateway.call("session.attach", attaching(gateway, client.token, key), token=client.token)
        for client in (laptop, phone, laptop, phone):
            assert gateway.call("session.info", token=client.token)["id"] == client.opened["id"]


def test_bound_token_without_proof_leaves_no_session(tmp_path: Path, certs: Path) -> None:
    harness = DeviceServer(
        tmp_path / "home", certs, loop_factory=asyncio.new_event_loop, limits__idle_timeout="1h"
    )
    with harness.server, harness.open() as client, harness.client() as other:
        assert needs_attach(other.refused("echo", token=client.token))
        harness.server.advance(300)
        frames, how = other.rest_until_closed()
        assert frames[-1].value["reason"] == "no_session"
        assert how == "close_notify"
        client.echo()


# --- refreshing --------------------------------------------------------------------------------------


def refreshing(source: Client, **more: Any) -> dict[str, Any]:
    return {"refresh_token": source.opened["refresh_token"], **more}


def test_bound_session_is_refreshed_with_proof_and_stays_bound(harness: DeviceServer) -> None:
    with harness.open() as client, harness.client() as other:
        assert needs_attach(other.refused("session.refresh", refreshing(client)))
        client.echo()  # the refresh token is not spent
        refreshed = client.call("session.refresh", refreshing(client), token=NO_TOKEN)
        assert (refreshed["bound"], refreshed["id"]) == (True, client.opened["id"])
        old, client.token = client.token, refreshed["token"]
        client.echo()
        assert client.refused("echo", token=old).code == Code.TOKEN_REVOKED
        assert needs_attach(other.refused("echo", token=client.token))
        other.call("session.attach", attaching(other, client.token), token=client.token)
        client.opened = refreshed
        again = other.call("session.refresh", refreshing(client))
        other.token = again["token"]
        other.echo()


def test_expired_bound_session_is_refreshed_without_proof_and_stays_bound(harness: DeviceServer) -> None:
    with harness.open() as client, harness.client() as other:
        harness.server.clock.ahead_ms = 2 * HOUR_MS  # idle for too long: it cannot be attached

        def late(method: str, params: dict[str, Any], token: bytes) -> Any:
            return other.call(method, params, token=token, timestamp=wall() + 2 * HOUR_MS)

        refreshed = late("session.refresh", refreshing(client), NO_TOKEN)
        token = refreshed["token"]
        frame = other.refused("echo", token=token, timestamp=wall() + 2 * HOUR_MS)
        assert needs_attach(frame)
        late("session.attach", attaching(other, token), token)
        assert late("echo", {"x": 1}, token) == {"x": 1}


def test_lost_refresh_answer_is_repeated_on_another_connection(harness: DeviceServer) -> None:
    with harness.open() as client, harness.client() as other:
        first = client.call("session.refresh", refreshing(client), token=NO_TOKEN)
        again = other.call("session.refresh", refreshing(client))
        assert again["token"] == first["token"]
        assert needs_attach(other.refused("echo", token=again["token"]))


def test_replayed_refresh_token_ends_the_bound_session(harness: DeviceServer) -> None:
    with harness.open() as client, harness.client() as thief:
        refreshed = client.call("session.refresh", refreshing(client), token=NO_TOKEN)
        frame = thief.refused("session.refresh", refreshing(client, client="thief/1"))
        assert frame.code == Code.TOKEN_REVOKED
        assert client.refused("echo", token=refreshed["token"]).code == Code.TOKEN_REVOKED


def test_binding_survives_a_restart(tmp_path: Path, certs: Path) -> None:
    harness = DeviceServer(tmp_path / "home", certs, store__url="sqlite")
    with harness.server, harness.open() as client:
        opened = client.opened
    restarted = ServerThread(tmp_path / "home", certs, users_file=True, store__url="sqlite")
    with restarted, restarted.client() as client:
        client.token = opened["token"]
        assert needs_attach(client.refused("echo"))
        assert needs_attach(
            client.refused("session.refresh", {"refresh_token": opened["refresh_token"]}, token=NO_TOKEN)
        )
        client.call("session.attach", attaching(client, client.token))
        client.echo()
        harness.devices.remove("laptop")
        assert client.event().value == ["session.revoked", {"reason": "the device was removed or changed"}]


# --- devices come and go -----------------------------------------------------------------------------


def test_added_device_is_known_at_once(harness: DeviceServer) -> None:
    with harness.client() as client:
        assert client.refused("session.open", opening(client, "phone", "phone")).code == Code.UNAUTHENTICATED
    harness.add("phone", "bob")
    with harness.open("phone") as client:
        assert client.opened["user"] == "bob"


def test_removed_device_loses_only_its_sessions(harness: DeviceServer) -> None:
    harness.add("phone")
    with harness.open() as first, harness.open() as second, harness.open("phone") as phone:
        harness.devices.remove("laptop")
        for client in (first, second):
            event = client.event()
            assert (event.kind, event.token) == (EVENT, client.token)
            assert event.value == ["session.revoked", {"reason": "the device was removed or changed"}]
            assert client.refused("echo").code == Code.TOKEN_REVOKED
        phone.echo()
        assert phone.events == []
        assert first.refused("session.open", opening(first), token=NO_TOKEN).code == Code.UNAUTHENTICATED


def test_proof_of_removed_device_does_not_count_for_its_successor(harness: DeviceServer) -> None:
    with harness.open() as old, harness.client() as other:
        harness.devices.remove("laptop")
        old.event()
        harness.add("laptop", "ada", "phone")
        opened = other.call("session.open", opening(other, "laptop", "phone"))
        assert needs_attach(old.refused("echo", token=opened["token"]))
        other.token = opened["token"]
        other.echo()


def test_device_removed_while_opening_gets_no_session(harness: DeviceServer) -> None:
    server = harness.server.server
    opening_one = server.state.sessions.open

    async def slow(*args: Any, **options: Any) -> Any:
        opened = await opening_one(*args, **options)
        harness.devices.remove("laptop")
        await server.parts.devices.refresh()
        return opened

    server.state.sessions.open = slow
    with harness.client() as client:
        frame = client.refused("session.open", opening(client))
        assert (frame.code, frame.details) == (Code.UNAUTHENTICATED, {})
    assert harness.server.stats["sessions"] == 0


def test_session_revoked_during_attach_is_not_attached(harness: DeviceServer) -> None:
    server = harness.server.server
    registry = server.state.registry
    proved = DeviceAuthenticator.attaches

    async def slow(*args: Any) -> bool:
        good = await proved(*args)
        registry.revoke_user("ada", "just now")
        return good

    with harness.open() as client, harness.client() as other, pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeviceAuthenticator, "attaches", slow)
        frame = other.refused("session.attach", attaching(other, client.token), token=client.token)
        assert frame.code == Code.UNAUTHENTICATED
        assert other.refused("echo", token=client.token).code == Code.TOKEN_REVOKED
        assert other.events == []


def test_attach_while_no_token_can_be_checked_may_be_tried_again(harness: DeviceServer) -> None:
    """A process that was stopped has to hear of revocations before it accepts a token."""
    registry = harness.server.server.state.registry
    proved = DeviceAuthenticator.attaches

    async def slow(*args: Any) -> bool:
        good = await proved(*args)
        registry.distrust()
        return good

    with harness.open() as client, harness.client() as other:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DeviceAuthenticator, "attaches", slow)
            frame = other.refused("session.attach", attaching(other, client.token), token=client.token)
            assert (frame.code, frame.details) == (Code.UNAVAILABLE, {"retry_after_ms": 50})
        registry.trusted_until = NEVER
        assert other.refused("echo", token=client.token).details == {"attach": True}
        other.call("session.attach", attaching(other, client.token), token=client.token)
        other.call("echo", token=client.token)


def test_reused_device_name_of_another_user_does_not_attach(harness: DeviceServer) -> None:
    """With two servers in a row the session is older than the device that has its name now."""
    with harness.open() as client, harness.client() as other:
        sessions = harness.server.server.state.sessions

        async def leave(*_: str) -> int:
            return 0

        sessions.revoke_key = leave
        harness.devices.remove("laptop")
        harness.add("laptop", "bob", "phone")
        with harness.open("laptop", "phone"):  # loaded here
            params = attaching(other, client.token, "phone")
            frame = other.refused("session.attach", params, token=client.token)
            assert (frame.code, frame.details) == (Code.UNAUTHENTICATED, {})


def test_device_of_removed_user_opens_no_session(harness: DeviceServer) -> None:
    harness.users.remove("ada")
    with harness.client() as client:
        assert client.refused("session.open", opening(client)).code == Code.UNAUTHENTICATED


def test_faulty_devices_file_keeps_known_devices(harness: DeviceServer) -> None:
    harness.devices.path.write_text("nonsense")
    with harness.open() as client:
        client.echo()


# --- enrolling ---------------------------------------------------------------------------------------


def enroll(client: Client, code: str, name: str = "phone", **more: Any) -> Any:
    return client.call("device.enroll", {"code": code, "public_key": public("phone"), "name": name, **more})


def test_pairing_code_enrolls_a_device_without_restart(harness: DeviceServer) -> None:
    code = harness.codes.make("bob", 60_000, wall())
    with harness.client() as client:
        assert enroll(client, code) == {"user": "bob", "device": "phone"}
        client.opened = client.call("session.open", opening(client, "phone", "phone"))
        assert client.opened["user"] == "bob"
        client.token = client.opened["token"]
        client.echo()


def test_pairing_code_works_once_and_ends_after_five_failures(harness: DeviceServer) -> None:
    code = harness.codes.make("bob", 60_000, wall())
    with harness.client() as client:

        def refused(code: str, name: str = "phone") -> Frame:
            return client.refused(
                "device.enroll", {"code": code, "public_key": public("phone"), "name": name}
            )

        assert refused(code, "laptop").code == Code.ALREADY_EXISTS
        enroll(client, code)
        wrong = refused(code, "phone-2")
        code = harness.codes.make("bob", 60_000, wall())
        for _ in range(5):
            assert refused("0000-0000").body == wrong.body
        assert refused(code).body == wrong.body
        assert wrong.code == Code.UNAUTHENTICATED


def test_enrollment_is_in_the_audit_trail_with_its_outcome(harness: DeviceServer, tmp_path: Path) -> None:
    configure_logging(LogConfig(level="error", audit_file=tmp_path / "audit"))
    code = harness.codes.make("bob", 60_000, wall())
    with harness.client() as client:
        client.refused("device.enroll", {"code": "0000-0000", "public_key": public("phone"), "name": "phone"})
        enroll(client, code)
    lines = [line for line in lines_of(tmp_path / "audit") if line["event"].startswith("device.")]
    shown = ("event", "outcome", "device", "user", "peer")
    assert [tuple(line.get(key) for key in shown) for line in lines] == [
        ("device.not_enrolled", "failure", "phone", None, "127.0.0.1"),
        ("device.enrolled", "success", "phone", "bob", "127.0.0.1"),
    ]
    assert code.reveal() not in (tmp_path / "audit").read_text()


@pytest.mark.parametrize(
    "params",
    [
        {"code": 5},
        {"code": "x" * 65},
        {"public_key": bytes(31)},
        {"public_key": "x" * 32},
        {"public_key": bytes(32)},
        {"name": ""},
        {"name": "a\nb"},
        {"user": "ada"},
    ],
)
def test_invalid_enrollment_is_refused(harness: DeviceServer, params: dict[str, Any]) -> None:
    with harness.client() as client:
        usual = {"code": "0000-0000", "public_key": public("phone"), "name": "phone"}
        assert client.refused("device.enroll", {**usual, **params}).code == Code.INVALID_ARGUMENT


def test_own_authenticators_disable_enrollment(serve: Callable[..., ServerThread]) -> None:
    with serve().client() as client:
        assert client.refused("device.enroll", {}).code == Code.UNAUTHENTICATED
        assert "device.enroll" not in [method["name"] for method in client.call("server.info")["methods"]]


# --- throttling --------------------------------------------------------------------------------------


def test_guesses_are_throttled_by_device_and_address(tmp_path: Path, certs: Path) -> None:
    harness = DeviceServer(tmp_path / "home", certs, limits__login_failures=3)
    with harness.server, harness.client() as client:
        for _ in range(3):
            params = {"scheme": "ed25519", "device": "laptop", "signature": bytes(64)}
            assert client.refused("session.open", params).code == Code.UNAUTHENTICATED
        frame = client.refused("session.open", opening(client))
        assert frame.code == Code.RESOURCE_EXHAUSTED
        assert 0 < frame.details["retry_after_ms"] <= 1000


def test_removed_devices_leave_nothing(harness: DeviceServer) -> None:
    with ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(harness.open()).echo()
    eventually(lambda: harness.server.leftovers()["connections"] == 0)
    harness.server.until_left()
