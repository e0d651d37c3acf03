"""`zcproto doctor`: the checks of a server, healthy or faulty."""

from __future__ import annotations

import itertools
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trustme

from bench.server_process import free_port
from tests.cli.doctor_report import NOW, Capture, Doctor, Report, doctor
from tests.limits import TIMEOUT
from tests.server.conftest import Serve
from tests.server.helpers import HEADER, KEY, ServerThread
from zcproto.auth import UserFile
from zcproto.cli import main
from zcproto.cli.doctor import MAX_TIMEOUT, remote
from zcproto.cli.doctor.remote import NOT_SERVING
from zcproto.tls.failure import TlsFailure

__all__ = ["doctor"]


# --- a server ------------------------------------------------------------------------------------------------


@pytest.fixture
def server(home: Path, serve: Serve) -> ServerThread:
    """A server in the home folder of the command line."""
    return serve(users_file=True)


@pytest.fixture
def key_file(server: ServerThread, tmp_path: Path) -> Path:
    path = tmp_path / "ada.key"
    path.touch(0o600)
    path.write_text(UserFile(server.home / "users.toml").add("ada"))
    return path


def at(server: ServerThread) -> str:
    return f"localhost:{server.port}"


def test_healthy_server_passes_every_step(server: ServerThread, key_file: Path, doctor: Doctor) -> None:
    report = doctor(at(server), "--user", "ada", "--key-file", str(key_file))
    assert report.faults == []
    assert {each["check"] for each in report.findings} >= {
        "reachable",
        "handshake",
        "clock",
        "trust",
        "session",
    }
    assert "TLSv1.3, TLS_AES_256_GCM_SHA384, zcp/1" in report.one("handshake", "ok")
    assert "pin sha256/" in report.one("trust", "ok")
    assert "opened, used and closed one" in report.one("session", "ok")
    assert "64 streams and 32 calls of clients" in report.one("streams", "ok")
    server.until_left()
    assert server.stats["sessions"] == 0
    assert server.stats["tls_failures"] == {}


def test_running_server_of_this_home_is_checked(serve: Serve, home: Path, doctor: Doctor) -> None:
    server = serve(users_file=True, store__url="sqlite", server__port=free_port())
    (home / "config.toml").write_text(
        f"[server]\nport = {server.port}\n[certificates]\nkey_types = ['ecdsa-p256']\n"
    )
    report = doctor()
    assert report.faults == []
    assert ": in use" in report.one("port", "ok")
    assert "a server runs with these sessions" in report.one("store", "ok")
    assert report.state("trust") == "ok"
    assert report.of("session") == []


@pytest.mark.parametrize(
    ("ahead_s", "state", "detail"),
    [
        (0, "ok", "agree"),
        (120, "warning", "ahead of"),
        (-120, "warning", "behind"),
        (86_400, "fault", "ahead of"),
    ],
)
def test_clock_skew_is_reported(
    server: ServerThread, doctor: Doctor, ahead_s: int, state: str, detail: str
) -> None:
    server.clock.ahead_ms = ahead_s * 1000
    assert detail in doctor(at(server)).one("clock", state)


def test_wrong_key_is_a_fault_and_sent_only_to_a_trusted_server(
    server: ServerThread, doctor: Doctor, tmp_path: Path
) -> None:
    wrong = tmp_path / "wrong.key"
    wrong.touch(0o600)
    wrong.write_text("not the key")
    arguments = (at(server), "--user", "ada", "--key-file", str(wrong))
    assert "zcproto user" in doctor(*arguments).one("session", "fault")
    other = tmp_path / "other-ca.pem"
    trustme.CA().cert_pem.write_to_path(other)
    report = doctor(*arguments, "--ca", str(other))
    assert report.faults == ["trust"]
    assert "no key is sent" in report.one("session", "skipped")


def test_untrusted_ca_is_a_fault_with_details(server: ServerThread, doctor: Doctor, tmp_path: Path) -> None:
    other = tmp_path / "other-ca.pem"
    trustme.CA().cert_pem.write_to_path(other)
    detail = doctor(at(server), "--ca", str(other)).one("trust", "fault")
    assert "certificate untrusted" in detail
    assert server.server.pins[0] in detail
    assert "use --ca, or use --pin" in detail


def test_missing_ca_file_is_a_fault(server: ServerThread, doctor: Doctor, tmp_path: Path) -> None:
    assert doctor(at(server), "--ca", str(tmp_path / "nowhere")).faults == ["trust"]


def test_pins_work_alone_and_beside_a_ca(server: ServerThread, doctor: Doctor) -> None:
    right, wrong = server.server.pins[0], "sha256/" + "A" * 43 + "="
    assert "by a pin;" in doctor(at(server), "--pin", right).one("trust", "ok")
    ca = str(server.home / "certs" / "ca.crt")
    assert "and a pin" in doctor(at(server), "--pin", right, "--ca", ca).one("trust", "ok")
    for trust in (("--pin", wrong), ("--pin", wrong, "--ca", ca)):
        assert "zcproto cert pins" in doctor(at(server), *trust).one("trust", "fault")


def test_malformed_pin_is_wrong_usage(server: ServerThread, capsys: Capture) -> None:
    assert main(["doctor", at(server), "--pin", "sha256/x"]) == 2
    assert main(["doctor", "a b"]) == 2
    assert main(["doctor", at(server), "--key-file", "x"]) == 2


def test_required_client_certificate_is_reported(home: Path, serve: Serve, doctor: Doctor) -> None:
    server = serve(users_file=True, tls__client_auth="required")
    assert "tls.client_auth" in doctor(at(server)).one("handshake", "fault")


# --- other servers -----------------------------------------------------------------------------------------


def test_unresolvable_name_is_a_fault(home: Path, doctor: Doctor) -> None:
    assert "check the name and DNS" in doctor("no.such.host.invalid:7443").one("reachable", "fault")


def test_refused_connection_is_a_fault(home: Path, doctor: Doctor) -> None:
    assert "start the server" in doctor(f"127.0.0.1:{free_port()}").one("reachable", "fault")


def test_connect_timeout_is_a_fault(home: Path, doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_answer(*args: Any) -> Any:
        raise TimeoutError

    monkeypatch.setattr(remote.socket, "create_connection", no_answer)
    assert "no answer within 7 s" in doctor("192.0.2.1:7443", "--timeout", "7").one("reachable", "fault")


@contextmanager
def answering(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """Start another kind of server and yield its address. `answer` is called with each connection."""
    with socket.create_server(("127.0.0.1", 0)) as listening, ExitStack() as connections:

        def run() -> None:
            with suppress(OSError):
                while True:
                    connection = connections.enter_context(listening.accept()[0])
                    connection.settimeout(TIMEOUT)
                    with suppress(OSError):
                        answer(connection)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)
        thread.join(TIMEOUT)


def test_silent_server_is_a_fault(home: Path, doctor: Doctor) -> None:
    with answering(lambda connection: None) as address:
        detail = doctor(address, "--timeout", "0.2").one("handshake", "fault")
        assert detail == f"no answer in time | {NOT_SERVING}", "no firewall is between a machine and itself"


def test_server_without_tls_is_a_fault(home: Path, doctor: Doctor) -> None:
    with answering(lambda connection: connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")) as address:
        detail = doctor(address).one("handshake", "fault")
    assert "check that this is the port of zcproto" in detail


def test_disconnect_in_the_handshake_is_a_fault(home: Path, doctor: Doctor) -> None:
    with answering(lambda connection: connection.close()) as address:
        assert doctor(address).faults == ["handshake"]


Speak = Callable[[ssl.SSLSocket], None]


class OtherServer:
    """Return the context of another TLS server."""

    def __init__(self, *names: str, alpn: str = "zcp/1", **options: Any) -> None:
        self.ca = trustme.CA()
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.ca.issue_cert(*names, **options).configure_cert(self.context)
        self.context.set_alpn_protocols([alpn])

    def speak(self, then: Speak) -> Callable[[socket.socket], None]:
        def answer(connection: socket.socket) -> None:
            with self.context.wrap_socket(connection, server_side=True) as tls:
                then(tls)

        return answer


def test_old_tls_version_is_a_fault(home: Path, doctor: Doctor) -> None:
    other = OtherServer("localhost")
    other.context.maximum_version = ssl.TLSVersion.TLSv1_2
    with answering(other.speak(lambda tls: None)) as address:
        assert "unsupported version" in doctor(address).one("handshake", "fault")


def test_other_alpn_protocol_is_a_fault(home: Path, doctor: Doctor) -> None:
    with answering(OtherServer("localhost", alpn="h2").speak(lambda tls: None)) as address:
        assert "this is not a zcproto server" in doctor(address).one("handshake", "fault")


@pytest.mark.parametrize(
    ("data", "detail"),
    [(b"", "without WELCOME"), (b"HTTP/1.1 200 OK\r\n\r\n" * 10, "not a valid WELCOME"), (bytes(70), "")],
)
def test_invalid_welcome_is_a_fault(home: Path, doctor: Doctor, data: bytes, detail: str) -> None:
    def then(tls: ssl.SSLSocket) -> None:
        tls.sendall(data)
        tls.unwrap()

    with answering(OtherServer("localhost").speak(then)) as address:
        assert detail in doctor(address).one("welcome", "fault")


def test_welcome_sent_byte_by_byte_times_out(
    home: Path, doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = itertools.count(step=MAX_TIMEOUT)
    clock = SimpleNamespace(now=lambda: float(next(seconds)), wall=remote.system_clock.wall)
    monkeypatch.setattr(remote, "system_clock", clock)

    def drip(tls: ssl.SSLSocket) -> None:
        for byte in bytes([0, 0, 255, 0, 1, 1]) + bytes(60_000):
            tls.sendall(bytes([byte]))

    with answering(OtherServer("localhost").speak(drip)) as address:
        assert "does not end" in doctor(address).one("welcome", "fault")


def test_endless_welcome_is_a_fault(home: Path, doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "MAX_WELCOME", 100)
    endless = (5_000).to_bytes(4, "big") + b"\x01\x01\x00\x00" + bytes(1_000)
    monkeypatch.setattr(remote.ClientConnection, "receive_data", lambda *args: [])
    with answering(OtherServer("localhost").speak(lambda tls: tls.sendall(endless))) as address:
        assert "does not end" in doctor(address).one("welcome", "fault")


def judged(doctor: Doctor, server: ServerThread, *names: str, **dates: Any) -> Report:
    """Proxy a real server behind another certificate."""
    other = OtherServer(*names, **dates)
    ca = server.home / "other-ca.pem"
    other.ca.cert_pem.write_to_path(ca)
    with server.client() as client:
        welcome = client.welcome

    def then(tls: ssl.SSLSocket) -> None:
        head = HEADER.pack(
            64 + len(welcome.body), 1, welcome.kind, 0, 0, welcome.timestamp, welcome.salt, 0, welcome.token
        )
        tls.sendall(head + welcome.body)
        tls.recv(1)

    with answering(other.speak(then)) as address:
        return doctor(address, "--ca", str(ca))


def test_certificate_name_mismatch_is_a_fault(server: ServerThread, doctor: Doctor) -> None:
    detail = judged(doctor, server, "a.example").one("trust", "fault")
    assert "certificate name mismatch" in detail
    assert "names: a.example" in detail
    assert "certificates.names" in detail


def test_expired_server_certificate_is_a_fault(server: ServerThread, doctor: Doctor) -> None:
    dates = {"not_before": NOW - timedelta(days=9), "not_after": NOW - timedelta(days=1)}
    detail = judged(doctor, server, "127.0.0.1", **dates).one("trust", "fault")
    assert "certificate expired" in detail
    assert "compare the clocks" in detail


def test_server_certificate_near_expiry_is_a_warning(server: ServerThread, doctor: Doctor) -> None:
    dates = {"not_before": NOW - timedelta(days=80), "not_after": NOW + timedelta(days=4, hours=1)}
    assert "4 days left" in judged(doctor, server, "127.0.0.1", **dates).one("trust", "warning")


def test_unreadable_server_certificate_is_reported() -> None:
    assert list(remote._about(b"not a certificate")) == ["its certificate cannot be read"]


def test_cures_are_for_failures_that_clients_can_see() -> None:
    assert set(remote.CURES) <= set(TlsFailure)
    assert all(cure.strip() for cure in remote.CURES.values())


def test_session_limit_of_the_user_is_reported(
    home: Path, serve: Serve, doctor: Doctor, tmp_path: Path
) -> None:
    server = serve(sessions__per_user=1)
    path = tmp_path / "key"
    path.touch(0o600)
    path.write_text(KEY)
    with server.client("ada"):
        detail = doctor(at(server), "--user", "ada", "--key-file", str(path)).one("session", "fault")
    assert "sessions.per_user" in detail
