"""Tests of alerts from a real server to a real webhook, a failing one included."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import trustme

from tests.alerts.receiver import Answer, Receiver, answer, hang
from tests.certs.test_manager import check
from tests.conftest import ServerPairs
from tests.server.helpers import NO_TOKEN, TIMEOUT, AnsweredError, ServerThread, eventually
from zcproto.admin.metrics import server_metrics
from zcproto.alerts import AlertKind
from zcproto.alerts.service import STOP_S, ServerAlerts
from zcproto.alerts.sinks import check_signature
from zcproto.auth import UserFile
from zcproto.certs import checker
from zcproto.common.secret import Secret
from zcproto.errors import CertificateError, Code, ConfigError
from zcproto.stores.sync import REPEATED

SECRET = "0123456789abcdef0123456789abcdef"


class AlertingServer:
    """A server whose alerts go to a receiver."""

    def __init__(self, server: ServerThread, receiver: Receiver) -> None:
        self.server = server
        self.receiver = receiver

    @property
    def alerts(self) -> ServerAlerts:
        return self.server.server.parts.alerts

    def tick(self) -> None:
        self.server.in_loop(self.alerts.tick)

    def messages(self) -> list[dict[str, Any]]:
        """Return the received messages; each must have a valid signature."""
        found = []
        for request in list(self.receiver.received):
            header = request.headers["zcproto-signature"]
            wall = 1000 * int(header.removeprefix("t=").partition(",")[0])
            assert check_signature(Secret(SECRET), request.body, header, wall) == ""
            found.append(json.loads(request.body))
        return found

    def sent(self) -> list[tuple[str, str]]:
        return [(each["alert"]["kind"], each["phase"]) for each in self.messages()]

    def exported(self) -> list[str]:
        """Return the lines of the metrics."""
        _, text = self.server.in_loop(lambda: server_metrics(self.server.server.parts).render(""))
        return text.decode().splitlines()

    def until(self, kind: str, phase: str = "began") -> dict[str, Any]:
        """Wait for a message; return its alert."""
        try:
            eventually(lambda: (kind, phase) in self.sent())
        except AssertionError:
            raise AssertionError(f"no {phase} of {kind}: {self.sent()}") from None
        message = next(
            each for each in self.messages() if (each["alert"]["kind"], each["phase"]) == (kind, phase)
        )
        alert: dict[str, Any] = message["alert"]
        return alert


Start = Callable[..., AlertingServer]


@pytest.fixture
def start(tmp_path: Path, certs: Path, server_pairs: ServerPairs, ca_file: Path) -> Iterator[Start]:
    secret = tmp_path / "secret"
    secret.write_text(f"{SECRET}\n")
    secret.chmod(0o600)
    pair = server_pairs.ecdsa
    with ExitStack() as stack:

        def start(
            *answers: Answer, home: Path | None = None, users_file: bool = False, **settings: Any
        ) -> AlertingServer:
            receiver = stack.enter_context(Receiver((pair.certificate, pair.key), *answers))
            chosen = {
                "alerts__webhook": receiver.url,
                "alerts__webhook_secret_file": str(secret),
                "alerts__webhook_ca_file": str(ca_file),
                **settings,
            }
            server = ServerThread(home or tmp_path / "home", certs, users_file=users_file, **chosen)
            return AlertingServer(stack.enter_context(server), receiver)

        yield start


@pytest.fixture
def slow_delivery(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a drain all the time that the delivery takes."""
    monkeypatch.setattr("zcproto.alerts.service.STOP_S", TIMEOUT)


def refused(call: Callable[[], object]) -> int:
    with pytest.raises(AnsweredError) as caught:
        call()
    return caught.value.code


def test_replay_sends_signed_webhook_message(start: Start) -> None:
    alerting = start()
    with alerting.server.client("ada") as client:
        frame = client.request("echo", {})
        client.send(frame, frame)
        client.rest_until_closed()
    alert = alerting.until("connection.replayed")
    assert alert["severity"] == "error"
    assert alert["details"]["in_window"] == 1
    (message,) = alerting.messages()
    header = alerting.receiver.received[0].headers["zcproto-signature"]
    body = alerting.receiver.received[0].body
    assert check_signature(Secret(SECRET), body, header, alerting.server.clock.wall()) == ""
    assert message["source"].endswith(f":{alerting.server.port}")


def test_many_stale_frames_raise_alert(start: Start) -> None:
    alerting = start(alerts__stale_frames=3)
    with alerting.server.client("ada") as client:
        for _ in range(3):
            assert refused(lambda: client.call("echo", {}, timestamp=1)) == Code.STALE_TIMESTAMP
    assert alerting.until("connection.stale_frames")["details"]["in_window"] == 3


def test_many_internal_errors_raise_alert(start: Start) -> None:
    alerting = start(alerts__internal_errors=3)
    state = alerting.server.server.state

    def fail() -> None:
        for _ in range(3):
            state.incident("greet", ValueError("no"), peer="", connection="")

    alerting.server.in_loop(fail)
    alert = alerting.until("request.internal_errors")
    assert (alert["severity"], alert["title"]) == ("error", "3 requests failed with INTERNAL within 300 s")


@pytest.mark.requirement("alerting")
def test_tls_failures_raise_alert_by_cause(start: Start) -> None:
    alerting = start(alerts__tls_failures=2)
    stranger = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trustme.CA().configure_trust(stranger)
    stranger.set_alpn_protocols(["zcp/1"])
    for _ in range(2):
        with alerting.server.tcp() as raw, pytest.raises(ssl.SSLCertVerificationError):
            stranger.wrap_socket(raw, server_hostname="localhost")
        with alerting.server.tcp() as raw:
            raw.sendall(b"GET / HTTP/1.0\r\n\r\n")
            raw.recv(100)
    alert = alerting.until("tls.failures")
    assert alert["about"] == "peer_rejected_certificate"
    assert "2 TLS connections failed within 300 s: peer_rejected_certificate" in alert["title"]
    assert [each["alert"]["about"] for each in alerting.messages()] == ["peer_rejected_certificate"]


@pytest.mark.usefixtures("long_login_delay")
def test_many_throttled_logins_raise_alert(start: Start) -> None:
    alerting = start(limits__login_failures=1, alerts__throttled_logins=3)
    with alerting.server.client() as client:
        params = {"scheme": "api_key", "user": "ada", "key": "wrong"}
        codes = [refused(lambda: client.call("session.open", params, token=NO_TOKEN)) for _ in range(4)]
    assert len(set(codes)) == 2
    assert alerting.until("login.throttled")["details"]["in_window"] == 3


@pytest.mark.requirement("alerting")
@pytest.mark.parametrize("url", ["memory", "sqlite"])
def test_refresh_token_reuse_raises_alert_with_session(start: Start, url: str) -> None:
    alerting = start(store__url=url, sessions__refresh_grace="0s")
    with alerting.server.client("ada") as client:
        spent = client.opened["refresh_token"]
        client.call("session.refresh", {"refresh_token": spent}, token=NO_TOKEN)
        refused(lambda: client.call("session.refresh", {"refresh_token": spent}, token=NO_TOKEN))
        alert = alerting.until("session.refresh_reused")
    assert (alert["about"], alert["details"]) == (
        client.opened["id"],
        {"user": "ada", "peer": "127.0.0.1"},
    )
    body = b"".join(request.body for request in alerting.receiver.received)
    assert spent.hex().encode() not in body


@pytest.mark.requirement("alerting")
def test_revocation_by_operator_raises_alert(start: Start) -> None:
    alerting = start()
    with alerting.server.client("ada"), alerting.server.client("operator") as operator:
        operator.call("server.revoke", {"user": "stranger"})  # ends no session
        operator.call("server.revoke", {"user": "ada"})
    alert = alerting.until("session.revoked")
    assert (alert["about"], alert["details"]["sessions"]) == ("operator operator", 1)
    assert alert["title"] == "1 session revoked: operator operator"
    assert alerting.sent() == [("session.revoked", "began")]


@pytest.mark.parametrize(
    ("setting", "severities"), [("any", ["info", "warning"]), ("operators", ["warning"]), ("rate", [])]
)
@pytest.mark.usefixtures("slow_delivery")
def test_revocation_alerts_follow_the_setting(start: Start, setting: str, severities: list[str]) -> None:
    alerting = start(alerts__revocations=setting)
    with alerting.server.client("ada") as one, alerting.server.client("operator") as operator:
        with alerting.server.client("ada") as other:
            one.call("session.revoke", {"id": other.opened["id"]})
        operator.call("server.revoke", {"user": "ada"})
        alerting.tick()
    alerting.server.drain()  # delivers what is queued
    assert [each["alert"]["severity"] for each in alerting.messages()] == severities


def test_many_revocations_raise_alert_but_closing_does_not(start: Start) -> None:
    alerting = start(alerts__revocation_rate=5, alerts__revocations="rate")
    with alerting.server.client("operator") as operator, ExitStack() as stack:
        for _ in range(6):
            with alerting.server.client("bob") as bob:
                bob.call("session.close")
        alerting.tick()
        for _ in range(5):
            stack.enter_context(alerting.server.client("ada"))
        operator.call("server.revoke", {"user": "ada"})
    alert = alerting.until("session.revocation_rate")
    assert alert["details"]["in_window"] == 5
    assert alerting.server.in_loop(lambda: alerting.server.server.state.registry.revoked) == 5


def test_removed_user_raises_alert(start: Start, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    users = UserFile(home / "users.toml")
    key = users.add("ada")
    alerting = start(users_file=True)
    with alerting.server.client() as client:
        client.open_session("ada", key=key)
        users.remove("ada")
        alert = alerting.until("session.revoked")
    assert alert["title"] == "1 session revoked: the user ada was removed or changed"


@pytest.mark.parametrize("name", ["users.toml", "devices.toml", "tokens.toml"])
def test_file_that_cannot_be_read_raises_alert_until_it_can(start: Start, tmp_path: Path, name: str) -> None:
    (tmp_path / "home").mkdir(0o700)
    path = tmp_path / "home" / name
    path.touch(0o600)
    alerting = start(users_file=True)
    path.chmod(0o644)
    alert = alerting.until("file.unreadable")
    assert alert["about"] == str(path)
    assert f"{path}: others can read or change this file (mode 0644); run: chmod 600" in alert["title"]
    assert "zcproto_file_unreadable 1.0" in alerting.exported()
    path.chmod(0o600)
    alerting.until("file.unreadable", "ended")
    assert "zcproto_file_unreadable 0.0" in alerting.exported()


@pytest.mark.requirement("recovery")
def test_store_outage_and_recovery_raise_and_resolve_alert(start: Start) -> None:
    alerting = start(store__url="sqlite", store__grace="0s")
    server = alerting.server.server
    sync = server.parts.store
    assert sync is not None

    def break_it() -> None:
        sync.breaker.reason = "the disk is full"
        sync.health.begin_outage(server.parts.clock.now())

    for _ in range(REPEATED):  # one that is over at once raises none
        alerting.server.until(lambda: sync.health.is_healthy)
        alerting.server.in_loop(break_it)
    assert alerting.until("store.degraded")["title"].endswith("is unavailable: the disk is full")
    assert alerting.until("store.grace_over")["severity"] == "critical"
    alerting.until("store.grace_over", "ended")
    ended = alerting.until("store.degraded", "ended")
    assert ended["title"] == "the session store is available again"
    assert ended["details"]["replayed"] == 0
    assert ended["ended_at"] >= ended["began_at"]


def test_damaged_sessions_file_raises_alert(start: Start, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    (home / "sessions.db").write_bytes(b"no database" * 1_000)
    (home / "sessions.db").chmod(0o600)
    alerting = start(store__url="sqlite")
    alert = alerting.until("store.damaged")
    assert alerting.messages()[0]["source"] == f"{socket.gethostname()}:0", (
        "it was raised before the server listened"
    )
    assert alert["about"] == str(home / "sessions.db")
    assert Path(alert["details"]["aside"]).exists()


@pytest.mark.requirement("alerting")
def test_failed_renewal_raises_alert_until_recovery(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    alerting = start(certificates__watch_interval="1h")
    server = alerting.server
    with monkeypatch.context() as patched:

        def fail(*args: Any, **kwargs: Any) -> None:
            raise OSError(28, "No space left on device")

        patched.setattr("zcproto.certs.files._stage", fail)
        server.clock.ahead_ms = 61 * 86_400_000
        check(server)
        renewal = alerting.until("certificate.renewal_failed")
        assert "No space left" in renewal["title"]
        first = alerting.until("certificate.expiry")
        assert (first["severity"], first["details"]["threshold_days"]) == ("warning", 30)
        server.clock.ahead_ms = 84 * 86_400_000
        check(server)
        assert alerting.until("certificate.expiry", "changed")["severity"] == "error"
    server.clock.ahead_ms += 86_400_000
    check(server)
    alerting.until("certificate.renewal_failed", "ended")
    assert alerting.until("certificate.expiry", "ended")["about"] == first["about"]


def test_bad_certificate_files_raise_alert_until_fixed(
    start: Start, tmp_path: Path, server_pairs: ServerPairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zcproto.certs.external.SETTLE_S", 0.0)  # do not wait for the files to settle
    pair = server_pairs.ecdsa
    chain, key = tmp_path / "site.pem", tmp_path / "site.key"
    chain.write_bytes(pair.certificate.read_bytes())
    key.write_bytes(pair.key.read_bytes())
    key.chmod(0o600)
    alerting = start(
        certificates__mode="files", certificates__certificate=[str(chain)], certificates__key=[str(key)]
    )
    good = chain.read_bytes()
    chain.write_bytes(b"no certificate")
    alert = alerting.until("certificate.files_bad")
    assert "site.pem" in alert["title"] + alert["about"]
    chain.write_bytes(good)
    alerting.until("certificate.files_bad", "ended")


def test_certificate_that_fails_its_test_raises_alert(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    alerting = start(certificates__watch_interval="1h")
    manager = alerting.server.server.parts.certificates
    with monkeypatch.context() as patched:

        def refuse(*args: Any, **kwargs: Any) -> None:
            raise CertificateError("the handshake fails")

        patched.setattr(checker, "proven_sites", refuse)
        manager.checker._is_proven = False
        check(alerting.server)
        assert alerting.until("certificate.not_used")["title"].endswith("the handshake fails")
    check(alerting.server)
    alerting.until("certificate.not_used", "ended")


# --- a webhook that does not do its part --------------------------------------------------------------------------


def raise_one(alerting: AlertingServer, kind: AlertKind = AlertKind.STORE_EMPTIED) -> None:
    alerting.server.in_loop(lambda: alerting.alerts.raise_(kind, "raised by a test"))


def test_failed_webhook_is_retried_with_the_same_id(start: Start) -> None:
    alerting = start(answer(503), answer(200))
    raise_one(alerting)
    first, second = alerting.receiver.until(2)[:2]
    assert json.loads(first.body)["id"] == json.loads(second.body)["id"]
    eventually(lambda: alerting.alerts.queues[0].delivered == 1)


@pytest.mark.usefixtures("slow_delivery")
def test_queued_alerts_are_delivered_on_shutdown(start: Start) -> None:
    alerting = start()
    alerting.server.in_loop(
        lambda: [alerting.alerts.raise_(AlertKind.CERTIFICATE_FILES, "bad", about=str(n)) for n in range(5)]
    )
    alerting.server.drain()
    assert len(alerting.messages()) == 5


def test_hanging_webhook_delays_neither_calls_nor_shutdown(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    alerting = start(hang)
    raise_one(alerting)
    alerting.receiver.until(1)
    with alerting.server.client("ada") as client:
        assert client.call("echo", {"word": "here"}) == {"word": "here"}
    assert STOP_S < TIMEOUT
    alerting.server.drain()  # within TIMEOUT, or it fails
    assert alerting.alerts.queues[0].lost == 1
    assert "alert.lost" in capsys.readouterr().err


@pytest.mark.requirement("alerting")
def test_command_receives_the_webhook_message(start: Start, tmp_path: Path) -> None:
    place = tmp_path / "alerts.jsonl"
    alerting = start(alerts__command=["/bin/sh", "-c", f"cat >> {place}"])
    raise_one(alerting)
    raise_one(alerting, AlertKind.STORE_DAMAGED)
    eventually(lambda: place.exists() and place.read_text().count("\n") == 2)
    eventually(lambda: len(alerting.receiver.received) == 2)
    assert place.read_text().splitlines() == [each.body.decode() for each in alerting.receiver.received]


@pytest.mark.parametrize(
    ("mode", "text", "expected"),
    [
        (0o644, SECRET, "others can read"),
        (0o600, "short", "16 to 4096 characters"),
        (0o600, "", "16 to 4096"),
    ],
)
def test_bad_webhook_secret_prevents_start(
    tmp_path: Path, certs: Path, mode: int, text: str, expected: str
) -> None:
    secret = tmp_path / "key"
    secret.write_text(text)
    secret.chmod(mode)
    settings = {"alerts__webhook": "https://localhost:1/", "alerts__webhook_secret_file": str(secret)}
    with pytest.raises(ConfigError, match=rf"alerts\.webhook_secret_file: .*{expected}") as caught:
        ServerThread(tmp_path / "home", certs, **settings).start()
    assert text == "" or text not in str(caught.value)


def test_missing_alert_command_prevents_start(tmp_path: Path, certs: Path) -> None:
    with pytest.raises(ConfigError, match=r"alerts\.command: /no/such cannot be run"):
        ServerThread(tmp_path / "home", certs, alerts__command=["/no/such"]).start()


def test_internal_error_does_not_end_alert_watch(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    alerting = start()
    broken = True

    def read() -> int:
        if broken:
            raise RuntimeError("a fault")
        return 1

    def begin() -> None:
        alerting.alerts.watch(AlertKind.STORE_EMPTIED, read, 1, lambda count: "raised by a test")

    alerting.server.in_loop(begin)
    sent = ""

    def is_logged() -> bool:
        nonlocal sent
        sent += capsys.readouterr().err
        return "alert.tick_failed" in sent

    eventually(is_logged)
    broken = False
    alerting.until("store.emptied")


def test_failed_start_leaves_no_task(tmp_path: Path, certs: Path) -> None:
    with ServerThread(tmp_path / "home", certs) as server, contextlib.suppress(ConfigError):
        ServerThread(tmp_path / "other", certs, server__port=server.port).start()


def test_alerts_are_exported_as_metrics(start: Start) -> None:
    alerting = start(answer(400))
    raise_one(alerting)
    eventually(lambda: alerting.alerts.queues[0].failures == 1)
    lines = alerting.exported()
    for line in (
        'zcproto_alerts_open{severity="error"} 1.0',
        'zcproto_alerts_raised_total{kind="store.emptied"} 1.0',
        'zcproto_alert_messages_total{result="failed",sink="webhook"} 1.0',
        'zcproto_alert_messages_total{result="arrived",sink="command"} 0.0',
        'zcproto_alert_sink_down{sink="webhook"} 0.0',
    ):
        assert line in lines
