"""`zcproto doctor`: healthy servers, and each fault."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trustme

from tests.cli.helpers import fill, new_session
from tests.server.conftest import Serve, certs, serve
from tests.server.helpers import HEADER, KEY, ServerThread
from zcproto.auth import UserFile
from zcproto.cli import main
from zcproto.cli.doctor import local, remote
from zcproto.config import load_config
from zcproto.errors import ConfigError
from zcproto.tls.failure import TlsFailure

__all__ = ["certs", "serve"]

Capture = pytest.CaptureFixture[str]
Look = Callable[..., "Report"]


class Report:
    """The findings of one run."""

    def __init__(self, code: int, out: str) -> None:
        self.code = code
        self.findings: list[dict[str, Any]] = json.loads(out)

    def __repr__(self) -> str:
        return f"exit code {self.code}: {json.dumps(self.findings, indent=1)}"

    def of(self, check: str) -> list[dict[str, Any]]:
        return [each for each in self.findings if each["check"] == check]

    def state(self, check: str) -> str:
        """Return the worst state of a check."""
        states = [each["state"] for each in self.of(check)]
        assert states, f"no finding of {check}: {self}"
        return max(states, key=["ok", "skipped", "warning", "fault"].index)

    def one(self, check: str, state: str) -> str:
        """Return the text and the fix of the one finding with this state."""
        (finding,) = [each for each in self.of(check) if each["state"] == state]
        assert (finding["cure"] is not None) == (state in ("warning", "fault")), finding
        return f"{finding['found']} | {finding['cure']}"

    @property
    def faults(self) -> list[str]:
        return [each["check"] for each in self.findings if each["state"] == "fault"]


@pytest.fixture
def look(capsys: Capture) -> Look:
    """Run the doctor. Asserts that the exit code is 1 exactly if there are faults."""

    def look(*arguments: str) -> Report:
        capsys.readouterr()
        code = main(["doctor", "--json", *arguments])
        report = Report(code, capsys.readouterr().out)
        assert report.code == (1 if report.faults else 0)
        return report

    return look


@pytest.fixture
def folder(home: Path, certs: Path) -> Path:
    """A home folder as left by a server."""
    home.mkdir(0o700)
    shutil.copytree(certs, home / "certs")
    UserFile(home / "users.toml").add("ada")
    (home / "config.toml").write_text(
        f"[certificates]\nkey_types = ['ecdsa-p256']\n[server]\nport = {free()}\n"
    )
    fill(home, new_session())
    return home


def free() -> int:
    """Return a free port."""
    with socket.create_server(("127.0.0.1", 0)) as bound:
        return int(bound.getsockname()[1])


# --- this machine --------------------------------------------------------------------------------------------


def test_missing_home_is_ok(home: Path, look: Look) -> None:
    report = look()
    assert report.faults == []
    assert "does not exist yet" in report.one("home", "ok")
    assert not home.exists(), "nothing is made by looking"


def test_home_of_a_stopped_server_is_ok(folder: Path, look: Look) -> None:
    before = sorted(folder.rglob("*"))
    report = look()
    assert report.faults == []
    assert report.one("store", "ok").startswith("it answers; sessions: 1")
    assert ": free; no server runs" in report.one("port", "ok")
    assert {each["state"] for each in report.of("certificate")} == {"ok"}
    assert sorted(path for path in folder.rglob("*") if not path.name.startswith("sessions.db")) == [
        path for path in before if not path.name.startswith("sessions.db")
    ]


def test_findings_are_printed_as_a_table(folder: Path, capsys: Capture) -> None:
    os.chmod(folder / "users.toml", 0o644)
    assert main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert f"ok        home          {folder}" in lines
    at = next(n for n, line in enumerate(lines) if line.startswith("fault     permissions   "))
    assert lines[at].endswith("users.toml: others can read or change it")
    assert lines[at + 1] == f"{'':24}run: chmod go-rwx {folder / 'users.toml'}"


def test_home_writable_by_others_is_a_fault(folder: Path, look: Look) -> None:
    folder.chmod(0o770)
    assert "others can change this folder (mode 0770) | run: chmod go-w" in look().one("home", "fault")


def test_home_that_is_a_file_is_a_fault(home: Path, look: Look) -> None:
    home.write_text("")
    assert "is not a folder | move it away" in look().one("home", "fault")


@pytest.mark.parametrize(
    ("name", "mode", "sentence", "cure"),
    [
        ("users.toml", 0o640, "others can read or change it", "chmod go-rwx"),
        ("sessions.db", 0o604, "others can read or change it", "chmod go-rwx"),
        ("certs/server-ecdsa.key", 0o644, "others can read or change it", "chmod go-rwx"),
        ("certs/ca.key", 0o660, "others can read or change it", "chmod go-rwx"),
        ("certs/ca.crt", 0o666, "others can change it", "chmod go-w"),
        ("config.toml", 0o622, "others can change it", "chmod go-w"),
    ],
)
def test_files_readable_by_others_are_faults(
    folder: Path, look: Look, name: str, mode: int, sentence: str, cure: str
) -> None:
    (folder / name).chmod(mode)
    detail = look().one("permissions", "fault")
    assert f"{name}: {sentence}" in detail
    assert cure in detail


@pytest.mark.parametrize("name", ["config.toml", "certs/ca.crt"])
def test_public_files_may_be_readable(folder: Path, look: Look, name: str) -> None:
    (folder / name).chmod(0o644)
    assert look().state("permissions") == "ok"


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root")
def test_files_of_another_user_are_faults(folder: Path, look: Look) -> None:
    os.chown(folder / "users.toml", 4711, 4711)
    assert "belongs to uid 4711 | run: chown 0" in look().one("permissions", "fault")
    # Everything belongs to the user of the server, and root runs the doctor.
    for path in (folder, *folder.rglob("*")):
        os.chown(path, 4711, 4711)
    assert "belongs to another user (uid 4711) | run as that user" in look().one("home", "fault")


def test_number_of_checked_files_is_bounded(
    folder: Path, look: Look, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "MAX_FILES", 3)
    assert "more than 3 files" in look().one("permissions", "warning")


def test_invalid_configuration_skips_further_checks(folder: Path, look: Look) -> None:
    (folder / "config.toml").write_text("[server]\nport = 70000\nprot = 1\n")
    report = look()
    assert report.faults == ["config", "config"]
    assert "server.port = 70000" in str(report.of("config"))
    assert report.state("server") == "skipped"


def test_sslkeylogfile_is_a_warning(folder: Path, look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSLKEYLOGFILE", "/tmp/keys")
    assert any("SSLKEYLOGFILE is set" in each["found"] for each in look().of("process"))


@pytest.mark.parametrize(("uid", "state"), [(0, "warning"), (1000, "ok")])
def test_running_as_root_is_a_warning(
    home: Path, look: Look, monkeypatch: pytest.MonkeyPatch, uid: int, state: str
) -> None:
    monkeypatch.delenv("SSLKEYLOGFILE", raising=False)
    monkeypatch.setattr(local.os, "geteuid", lambda: uid)
    assert look().state("process") == state


@pytest.mark.parametrize(
    ("free_bytes", "free_files", "state"),
    [
        (10 * 2**30, 10**6, "ok"),
        (10 * 2**30, 10, "warning"),
        (100 * 2**20, 10**6, "warning"),
        (2**20, 10**6, "fault"),
    ],
)
def test_full_disk_is_reported(
    folder: Path, look: Look, monkeypatch: pytest.MonkeyPatch, free_bytes: int, free_files: int, state: str
) -> None:
    real = os.statvfs

    def statvfs(path: Path) -> os.statvfs_result:
        values = list(real(path))
        values[1], values[4], values[7] = 1, free_bytes, free_files  # f_frsize, f_bavail, f_favail
        return os.statvfs_result(values)

    monkeypatch.setattr(local.os, "statvfs", statvfs)
    assert look().state("disk") == state


@pytest.mark.parametrize(
    ("hard", "state"), [(1_024, "warning"), (20_256, "ok"), (resource.RLIM_INFINITY, "ok")]
)
def test_low_file_limit_is_a_warning(
    folder: Path, look: Look, monkeypatch: pytest.MonkeyPatch, hard: int, state: str
) -> None:
    monkeypatch.setattr(local.resource, "getrlimit", lambda kind: (256, hard))
    report = look()
    assert report.state("file limit") == state
    if state == "warning":
        assert "limits.max_connections = 768" in report.one("file limit", "warning")


# certificates


def test_unreadable_certificate_is_a_fault(folder: Path, look: Look) -> None:
    (folder / "certs" / "server-ecdsa.crt").write_text("not a certificate")
    assert look().faults == ["certificate"]


def test_key_of_another_certificate_is_a_fault(folder: Path, look: Look) -> None:
    key = trustme.CA().issue_cert("localhost", key_type=trustme.KeyType.ECDSA).private_key_pem
    (folder / "certs" / "server-ecdsa.key").write_bytes(key.bytes())
    assert "server-ecdsa.key" in look().one("certificate", "fault")


def foreign(folder: Path, not_after: datetime, not_before: datetime | None = None) -> None:
    """Issue external certificates with this expiry."""
    issued = trustme.CA().issue_cert("server.example", not_after=not_after, not_before=not_before)
    certificate, key = folder / "foreign.pem", folder / "foreign.key"
    issued.cert_chain_pems[0].write_to_path(certificate)
    issued.private_key_pem.write_to_path(key)
    key.chmod(0o600)
    (folder / "config.toml").write_text(
        f"[server]\nport = {free()}\n[certificates]\nmode = 'files'\n"
        f"certificate = ['{certificate}']\nkey = ['{key}']\n"
    )


NOW = datetime.now(UTC)


def test_expired_certificate_file_is_a_fault(folder: Path, look: Look) -> None:
    foreign(folder, NOW - timedelta(days=1), NOW - timedelta(days=90))
    assert "expired on" in look().one("certificate", "fault")


def test_certificate_file_near_expiry_is_a_warning(folder: Path, look: Look) -> None:
    foreign(folder, NOW + timedelta(days=3, hours=1), NOW - timedelta(days=87))
    detail = look().one("certificate", "warning")
    assert "3 days left; server.example" in detail
    assert "replace external ones" in detail


# the store


def test_damaged_store_is_a_fault(folder: Path, look: Look) -> None:
    data = bytearray((folder / "sessions.db").read_bytes())
    data[:100] = bytes(100)
    (folder / "sessions.db").write_bytes(data)
    report = look()
    assert report.faults == ["store"]
    assert ": damaged" in report.one("store", "fault")
    assert "docs/backup.md" in report.one("store", "fault")


def test_memory_store_is_a_warning(folder: Path, look: Look) -> None:
    with (folder / "config.toml").open("a") as config:
        config.write("[store]\nurl = 'memory'\n")
    assert "sessions end with the server" in look().one("store", "warning")


def test_unreachable_store_is_a_fault(folder: Path, look: Look) -> None:
    pytest.importorskip("redis")
    with (folder / "config.toml").open("a") as config:
        config.write(f"[store]\nurl = 'valkey://127.0.0.1:{free()}'\n")
    assert look().faults == ["store"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open all files")
def test_store_lock_of_another_user_is_a_fault(folder: Path, look: Look) -> None:
    (folder / "sessions.db.lock").chmod(0)
    assert look().state("store") == "fault"


# the port


def test_port_that_cannot_be_bound_is_a_fault(
    folder: Path, look: Look, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bind(hosts: tuple[str, ...], port: int) -> list[socket.socket]:
        raise ConfigError(["server.host = '127.0.0.1', server.port = 443: cannot listen: Permission denied"])

    monkeypatch.setattr(local, "bind", bind)
    assert "zcproto.socket" in look().one("port", "fault")


def test_port_0_skips_the_port_check(folder: Path, look: Look) -> None:
    (folder / "config.toml").write_text("[server]\nport = 0\n")
    assert look().state("port") == "skipped"


@pytest.mark.parametrize(
    ("host", "reached"),
    [("::", "[::1]:7443"), ("0.0.0.0", "127.0.0.1:7443"), ("a.example", "a.example:7443")],
)
def test_wildcard_host_is_checked_on_loopback(home: Path, host: str, reached: str) -> None:
    home.mkdir()
    (home / "config.toml").write_text(f"[server]\nhost = '{host}'\n")
    assert local.own_address(load_config(None, home=home, environ={})) == reached


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


def test_healthy_server_passes_every_step(server: ServerThread, key_file: Path, look: Look) -> None:
    report = look(at(server), "--user", "ada", "--key-file", str(key_file))
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
    server.until_left()
    assert server.stats["sessions"] == 0
    assert server.stats["tls_failures"] == {}


def test_running_server_of_this_home_is_checked(serve: Serve, home: Path, look: Look) -> None:
    server = serve(users_file=True, store__url="sqlite", server__port=free())
    (home / "config.toml").write_text(
        f"[server]\nport = {server.port}\n[certificates]\nkey_types = ['ecdsa-p256']\n"
    )
    report = look()
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
    server: ServerThread, look: Look, ahead_s: int, state: str, detail: str
) -> None:
    server.clock.ahead_ms = ahead_s * 1000
    assert detail in look(at(server)).one("clock", state)


def test_wrong_key_is_a_fault_and_sent_only_to_a_trusted_server(
    server: ServerThread, look: Look, tmp_path: Path
) -> None:
    wrong = tmp_path / "wrong.key"
    wrong.touch(0o600)
    wrong.write_text("not the key")
    arguments = (at(server), "--user", "ada", "--key-file", str(wrong))
    assert "zcproto user" in look(*arguments).one("session", "fault")
    other = tmp_path / "other-ca.pem"
    trustme.CA().cert_pem.write_to_path(other)
    report = look(*arguments, "--ca", str(other))
    assert report.faults == ["trust"]
    assert "no key is sent" in report.one("session", "skipped")


def test_untrusted_ca_is_a_fault_with_details(server: ServerThread, look: Look, tmp_path: Path) -> None:
    other = tmp_path / "other-ca.pem"
    trustme.CA().cert_pem.write_to_path(other)
    detail = look(at(server), "--ca", str(other)).one("trust", "fault")
    assert "certificate untrusted" in detail
    assert server.server.pins[0] in detail
    assert "use --ca, or use --pin" in detail


def test_missing_ca_file_is_a_fault(server: ServerThread, look: Look, tmp_path: Path) -> None:
    assert look(at(server), "--ca", str(tmp_path / "nowhere")).faults == ["trust"]


def test_pins_work_alone_and_beside_a_ca(server: ServerThread, look: Look) -> None:
    right, wrong = server.server.pins[0], "sha256/" + "A" * 43 + "="
    assert "by a pin;" in look(at(server), "--pin", right).one("trust", "ok")
    ca = str(server.home / "certs" / "ca.crt")
    assert "and a pin" in look(at(server), "--pin", right, "--ca", ca).one("trust", "ok")
    for trust in (("--pin", wrong), ("--pin", wrong, "--ca", ca)):
        assert "zcproto cert pins" in look(at(server), *trust).one("trust", "fault")


def test_malformed_pin_is_wrong_usage(server: ServerThread, capsys: Capture) -> None:
    assert main(["doctor", at(server), "--pin", "sha256/x"]) == 2
    assert main(["doctor", "a b"]) == 2
    assert main(["doctor", at(server), "--key-file", "x"]) == 2


def test_required_client_certificate_is_reported(home: Path, serve: Serve, look: Look) -> None:
    server = serve(users_file=True, tls__client_auth="required")
    assert "tls.client_auth" in look(at(server)).one("handshake", "fault")


# --- other servers -----------------------------------------------------------------------------------------


def test_unresolvable_name_is_a_fault(home: Path, look: Look) -> None:
    assert "check the name and DNS" in look("no.such.host.invalid:7443").one("reachable", "fault")


def test_refused_connection_is_a_fault(home: Path, look: Look) -> None:
    assert "start the server" in look(f"127.0.0.1:{free()}").one("reachable", "fault")


def test_connect_timeout_is_a_fault(home: Path, look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_answer(*args: Any) -> Any:
        raise TimeoutError

    monkeypatch.setattr(remote.socket, "create_connection", no_answer)
    assert "no answer within 10 s" in look("192.0.2.1:7443").one("reachable", "fault")


@contextmanager
def answering(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """Start another kind of server and yield its address. `answer` is called with each connection."""
    with socket.create_server(("127.0.0.1", 0)) as listening, ExitStack() as connections:

        def run() -> None:
            with suppress(OSError):
                while True:
                    connection = connections.enter_context(listening.accept()[0])
                    connection.settimeout(10)
                    with suppress(OSError):
                        answer(connection)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)
        thread.join(10)


def test_silent_server_is_a_fault(home: Path, look: Look) -> None:
    with answering(lambda connection: None) as address:
        assert "no answer in time" in look(address, "--timeout", "0.2").one("handshake", "fault")


def test_server_without_tls_is_a_fault(home: Path, look: Look) -> None:
    with answering(lambda connection: connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")) as address:
        detail = look(address).one("handshake", "fault")
    assert "check that this is the port of zcproto" in detail


def test_disconnect_in_the_handshake_is_a_fault(home: Path, look: Look) -> None:
    with answering(lambda connection: connection.close()) as address:
        assert look(address).faults == ["handshake"]


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


def test_old_tls_version_is_a_fault(home: Path, look: Look) -> None:
    other = OtherServer("localhost")
    other.context.maximum_version = ssl.TLSVersion.TLSv1_2
    with answering(other.speak(lambda tls: None)) as address:
        assert "unsupported version" in look(address).one("handshake", "fault")


def test_other_alpn_protocol_is_a_fault(home: Path, look: Look) -> None:
    with answering(OtherServer("localhost", alpn="h2").speak(lambda tls: None)) as address:
        assert "this is not a zcproto server" in look(address).one("handshake", "fault")


@pytest.mark.parametrize(
    ("data", "detail"),
    [(b"", "without WELCOME"), (b"HTTP/1.1 200 OK\r\n\r\n" * 10, "not a valid WELCOME"), (bytes(70), "")],
)
def test_invalid_welcome_is_a_fault(home: Path, look: Look, data: bytes, detail: str) -> None:
    def then(tls: ssl.SSLSocket) -> None:
        tls.sendall(data)
        tls.unwrap()

    with answering(OtherServer("localhost").speak(then)) as address:
        assert detail in look(address).one("welcome", "fault")


def test_welcome_sent_byte_by_byte_times_out(home: Path, look: Look) -> None:
    def drip(tls: ssl.SSLSocket) -> None:
        for byte in bytes([0, 0, 255, 0, 1, 1]) + bytes(10_000):
            tls.sendall(bytes([byte]))

    with answering(OtherServer("localhost").speak(drip)) as address:
        assert look(address, "--timeout", "0.2").state("welcome") == "fault"


def test_file_replaced_during_the_check_is_ignored(
    folder: Path, look: Look, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = local._files
    monkeypatch.setattr(local, "_files", lambda home: [*real(home), home / "gone"])
    assert look().state("permissions") == "ok"


def test_endless_welcome_is_a_fault(home: Path, look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "MAX_WELCOME", 100)
    endless = (5_000).to_bytes(4, "big") + b"\x01\x01\x00\x00" + bytes(1_000)
    monkeypatch.setattr(remote.ClientConnection, "receive_data", lambda *args: [])
    with answering(OtherServer("localhost").speak(lambda tls: tls.sendall(endless))) as address:
        assert "does not end" in look(address).one("welcome", "fault")


def judged(look: Look, server: ServerThread, *names: str, **dates: Any) -> Report:
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
        return look(address, "--ca", str(ca))


def test_certificate_name_mismatch_is_a_fault(server: ServerThread, look: Look) -> None:
    detail = judged(look, server, "a.example").one("trust", "fault")
    assert "certificate name mismatch" in detail
    assert "names: a.example" in detail
    assert "certificates.names" in detail


def test_expired_server_certificate_is_a_fault(server: ServerThread, look: Look) -> None:
    dates = {"not_before": NOW - timedelta(days=9), "not_after": NOW - timedelta(days=1)}
    detail = judged(look, server, "127.0.0.1", **dates).one("trust", "fault")
    assert "certificate expired" in detail
    assert "compare the clocks" in detail


def test_server_certificate_near_expiry_is_a_warning(server: ServerThread, look: Look) -> None:
    dates = {"not_before": NOW - timedelta(days=80), "not_after": NOW + timedelta(days=4, hours=1)}
    assert "4 days left" in judged(look, server, "127.0.0.1", **dates).one("trust", "warning")


def test_unreadable_server_certificate_is_reported() -> None:
    assert list(remote._about(b"not a certificate")) == ["its certificate cannot be read"]


def test_cures_are_for_failures_that_clients_can_see() -> None:
    assert set(remote.CURES) <= set(TlsFailure)
    assert all(cure.strip() for cure in remote.CURES.values())


def test_session_limit_of_the_user_is_reported(home: Path, serve: Serve, look: Look, tmp_path: Path) -> None:
    server = serve(sessions__per_user=1)
    path = tmp_path / "key"
    path.touch(0o600)
    path.write_text(KEY)
    with server.client("ada"):
        detail = look(at(server), "--user", "ada", "--key-file", str(path)).one("session", "fault")
    assert "sessions.per_user" in detail
