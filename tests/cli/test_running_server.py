"""Commands that use the control socket of a running server, and their errors without one."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.capabilities import obeying_file_modes
from tests.server.conftest import Serve
from tests.server.helpers import TIMEOUT, ServerThread, eventually
from tests.server.process import ServerProcess
from zcproto.admin import control as control_socket
from zcproto.admin.snapshot import status_report, take_snapshot
from zcproto.alerts import AlertKind
from zcproto.auth import DeviceFile
from zcproto.certs import managed
from zcproto.certs.managed import ManagedSettings
from zcproto.cli import control as control_module
from zcproto.cli import main
from zcproto.cli import status as status_module
from zcproto.cli.status import duration, frame, lines_of, size, span
from zcproto.common.network import address_of
from zcproto.errors import PermissionDenied
from zcproto.observe.log import level, set_level

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def running(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> ServerThread:
    """A server with users in a file, in the home folder of the command line."""
    server = serve(users_file=True, store__url="sqlite")
    monkeypatch.setenv("ZCPROTO_HOME", str(server.home))
    return server


def out_of(capsys: Capture, *args: str, code: int = 0) -> str:
    assert main(list(args)) == code, capsys.readouterr()
    return capsys.readouterr().out


def json_of(capsys: Capture, *args: str) -> Any:
    return json.loads(out_of(capsys, *args, "--json"))


# --- with a server -------------------------------------------------------------------------------------------


def test_status_is_printed(running: ServerThread, capsys: Capture) -> None:
    key = out_of(capsys, "user", "add", "ada").strip()
    with running.client() as client:
        client.open_session("ada", key)
        for _ in range(20):
            client.echo()
        text = out_of(capsys, "status")
        assert f"127.0.0.1:{running.port}  serving" in text
        assert "1 ZCP, 0 HTTPS" in text
        assert "1 live, 0 to be refreshed" in text
        assert "server-ecdsa.crt" in text
        assert "days left" in text
        assert "p99" in text
        assert "sqlite: healthy" in text
        assert "alerts: 0 open" in text
        found = json_of(capsys, "status")
        assert found["requests"]["total"] == 21
    running.in_loop(lambda: running.server.parts.alerts.raise_(AlertKind.STORE_DEGRADED, "the store is out"))
    text = out_of(capsys, "status")
    assert "the store is out" in text
    assert "1 open" in text


def test_users_are_changed_by_the_running_server(running: ServerThread, capsys: Capture) -> None:
    assert main(["user", "add", "ada"]) == 0
    printed = capsys.readouterr()
    assert printed.err == "ada is a user now. Keep this key; it is shown once:\n"
    with running.client() as client:
        client.open_session("ada", printed.out.strip())
        made = json_of(capsys, "user", "new-key", "ada")
        assert (made["name"], made["sessions"]) == ("ada", 1)
        client.event()
        client.open_session("ada", made["key"])
        assert main(["user", "disable", "ada"]) == 0
        assert capsys.readouterr().err == "ada is disabled now; 1 session ended.\n"
        client.event()
        assert json_of(capsys, "user", "enable", "ada") == {"name": "ada"}
        client.open_session("ada", made["key"])
        assert json_of(capsys, "user", "remove", "ada") == {"name": "ada", "sessions": 1}
    assert json_of(capsys, "user", "add", "robot", "--no-key") == {"name": "robot", "key": None}
    assert [each["name"] for each in json_of(capsys, "user", "list")] == ["robot"]
    assert main(["user", "remove", "ben"]) == 1
    assert 'NOT_FOUND: no user is named "ben"; zcproto user list' in capsys.readouterr().err
    assert main(["user", "add", "robot"]) == 2
    assert "exists already" in capsys.readouterr().err


def test_pending_calls_are_listed_answered_and_refused(running: ServerThread, capsys: Capture) -> None:
    def ask_ada() -> Future[Any]:
        asked = asyncio.run_coroutine_threadsafe(
            running.server.ask("ada", "approve", text="pay?", timeout=60.0), running.loop
        )
        running.in_loop(lambda: None)  # after the call was asked
        return asked

    one, two = ask_ada(), ask_ada()
    first, second = json_of(capsys, "calls", "list")
    assert (first["user"], first["method"], first["params"]) == ("ada", "approve", {"text": "pay?"})
    assert "0 clients" in out_of(capsys, "calls", "list", "--user", "ada")
    assert main(["calls", "answer", first["id"], "true"]) == 0
    assert capsys.readouterr().err == "answered approve for ada\n"
    assert one.result(TIMEOUT) is True
    assert json_of(capsys, "calls", "refuse", second["id"], "--reason", "no")["id"] == second["id"]
    assert isinstance(two.exception(TIMEOUT), PermissionDenied)
    assert json_of(capsys, "calls", "list") == []
    assert main(["calls", "answer", first["id"], "true"]) == 1
    assert "no pending call has this id" in capsys.readouterr().err


def test_sessions_are_listed_and_revoked_by_the_running_server(
    running: ServerThread, capsys: Capture
) -> None:
    key = out_of(capsys, "user", "add", "ada").strip()
    with running.client() as client, running.client() as other:
        client.open_session("ada", key)
        other.open_session("ada", key)
        found = json_of(capsys, "session", "list", "--user", "ada")
        assert [each["id"] for each in found] == [client.opened["id"], other.opened["id"]]
        assert json_of(capsys, "session", "list", "--user", "ben") == []
        assert client.opened["id"] in out_of(capsys, "session", "list")
        assert json_of(capsys, "session", "revoke", client.opened["id"]) == {"revoked": 1}
        client.event()
        assert main(["session", "revoke", client.opened["id"]]) == 1
        assert (
            "no session has this ID, 0 sessions ended; zcproto session list shows the IDs"
            in capsys.readouterr().err
        )
        assert json_of(capsys, "session", "revoke", "--user", "ada") == {"revoked": 1}
        other.event()
        assert json_of(capsys, "session", "revoke", "--all") == {"revoked": 0}


def test_device_is_removed_by_the_running_server(running: ServerThread, capsys: Capture) -> None:
    out_of(capsys, "user", "add", "ada")
    DeviceFile(running.home / "devices.toml").add("laptop", "ada", bytes(range(32)), datetime.now(UTC))
    found = json_of(capsys, "device", "remove", "laptop")
    assert found == {"name": "laptop", "user": "ada", "sessions": 0}
    assert main(["device", "remove", "laptop"]) == 1
    assert json_of(capsys, "device", "list") == []


def test_certificates_are_issued_by_the_running_server(running: ServerThread, capsys: Capture) -> None:
    (running.home / "config.toml").write_text('[certificates]\nkey_types = ["ecdsa-p256"]\n')
    leaf = running.in_loop(lambda: running.server.certificates[0].leaf_sha256)
    assert main(["cert", "renew"]) == 0
    printed = capsys.readouterr()
    assert "server-ecdsa.crt" in printed.out
    assert printed.err.endswith("The running server uses it now.\n")
    assert running.in_loop(lambda: running.server.certificates[0].leaf_sha256) != leaf
    made = json_of(capsys, "cert", "rotate")
    assert made["next_pins"]["pins"]
    assert "told" not in made
    assert len(json_of(capsys, "cert", "rotate", "--cancel")["cancelled"]) == 1
    pins = running.in_loop(lambda: running.server.pins)
    (one,) = json_of(capsys, "cert", "rotate", "--now")["certificates"]
    assert one["new_key"]
    assert running.in_loop(lambda: running.server.pins) == [one["pin"]] != pins


def test_cert_show_notes_files_that_are_not_served(running: ServerThread, capsys: Capture) -> None:
    (running.home / "config.toml").write_text('[certificates]\nkey_types = ["ecdsa-p256"]\n')
    assert main(["cert", "show"]) == 0
    assert capsys.readouterr().err == ""
    (served, _) = json_of(capsys, "cert", "show")["served"]
    assert served["file"] == "server-ecdsa.crt"
    folder = running.home / "certs"
    other = running.home / "other"
    shutil.copytree(folder, other)
    settings = ManagedSettings(
        names=(),
        key_types=("ecdsa-p256",),
        lifetime=timedelta(days=90),
        renew_before=timedelta(days=30),
        renew_key=False,
        announce_key=timedelta(days=1),
    )
    managed.renew(other, settings, datetime.now(UTC))
    (running.home / "config.toml").write_text(
        f'[certificates]\nkey_types = ["ecdsa-p256"]\ndirectory = "{other}"\n'
    )
    assert main(["cert", "show"]) == 0
    assert "the running server does not serve" in capsys.readouterr().err


def test_cert_show_works_without_access_to_the_server(
    running: ServerThread, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (running.home / "config.toml").write_text('[certificates]\nkey_types = ["ecdsa-p256"]\n')

    def refuse(path: Path, limit_s: float) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("zcproto.cli.control.connect_unix", refuse)
    assert main(["cert", "show"]) == 0
    printed = capsys.readouterr()
    assert "you are not allowed" in printed.err
    assert "server-ecdsa.crt" in printed.out


def test_alerts_are_listed_and_tested_by_the_running_server(
    running: ServerThread, capsys: Capture, tmp_path: Path
) -> None:
    assert out_of(capsys, "alert", "list") == "No open alerts; none closed in the last 24 h.\n"
    assert main(["alert", "test"]) == 1
    assert "set alerts.webhook or alerts.command in" in capsys.readouterr().out
    running.reload(alerts__command=["/bin/sh", "-c", "cat > /dev/null; echo ok"])
    alerts = running.server.parts.alerts

    def happen() -> None:
        alerts.raise_(AlertKind.STORE_DEGRADED, "the store is out")
        alerts.raise_(AlertKind.STORE_GRACE_OVER, "for too long")
        alerts.resolve(AlertKind.STORE_GRACE_OVER)

    running.in_loop(happen)
    rows = [line.split() for line in out_of(capsys, "alert", "list").splitlines()]
    assert [row[2] for row in rows[1:]] == ["open", "closed"]
    assert len(json_of(capsys, "alert", "list")["open"]) == 1
    (result,) = json_of(capsys, "alert", "test")
    assert result["arrived"]


def test_reload_prints_changes_and_faults(running: ServerThread, capsys: Capture) -> None:
    assert out_of(capsys, "reload") == "nothing has changed\n"
    running.settings = {
        **running.settings,
        "limits__max_streams": 3,
        "idempotency__keep": "1h",
        "alerts__webhook": "https://hooks.example/secret",
    }
    for _ in range(2):
        previewed = json_of(capsys, "reload", "--dry-run")
        assert [each["key"] for each in previewed["changed"]] == ["limits.max_streams", "alerts.webhook"]
        assert [each["key"] for each in previewed["restart"]] == ["idempotency.keep"]
    assert main(["reload", "--dry-run"]) == 0
    printed = capsys.readouterr()
    preview = printed.out
    assert printed.err == "nothing is applied yet: zcproto reload applies what needs no restart\n"
    assert running.server.config.limits.max_streams == 128
    assert main(["reload"]) == 0
    printed = capsys.readouterr()
    assert printed.out == preview
    rows = {line.split()[0]: line for line in printed.out.splitlines()}
    assert rows["limits.max_streams"].split() == ["limits.max_streams", "128", "3", "new", "connections"]
    assert rows["idempotency.keep"].endswith("restart needed")
    assert "(hidden)" in rows["alerts.webhook"]
    assert "secret" not in printed.out
    assert printed.err == "restart the server to apply 1 change\n"
    assert [each["key"] for each in json_of(capsys, "reload")["restart"]] == ["idempotency.keep"]
    running.settings = {**running.settings, "limits__max_streams": 0, "limits__threads": 0}
    assert main(["reload"]) == 2
    printed = capsys.readouterr()
    faults = [
        line for line in printed.err.splitlines() if not line.startswith("{")
    ]  # the log of this process goes there too
    assert [fault.split()[1] for fault in faults] == ["limits.max_streams", "limits.threads"]


def test_log_level_is_printed_and_set(running: ServerThread, capsys: Capture) -> None:
    before = level()
    try:
        assert out_of(capsys, "log", "level") == f"{before}\n"
        assert json_of(capsys, "log", "level", "error") == {"level": "error", "before": before}
        assert level() == "error"
        assert main(["log", "level", "debug"]) == 0
        assert capsys.readouterr().err.endswith("the log level is debug now; it was error\n")
        assert main(["log", "level", "loud"]) == 2
    finally:
        set_level(before)


def test_upgrade_reports_a_failure_after_many_questions(
    running: ServerThread, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server admits few connections at once to its control socket."""
    monkeypatch.setattr(control_socket, "MAX_CONNECTIONS", 4)
    monkeypatch.setattr(control_module, "POLL_S", 0.01)
    server, sleeps = running.server, iter(range(20))

    def sleep(seconds: float) -> None:
        if next(sleeps, None) is None:
            server.upgrade_failure = "no database"
        time.sleep(seconds)

    monkeypatch.setattr(control_module, "time", SimpleNamespace(sleep=sleep))
    server.on_upgrade_requested = lambda: None
    assert main(["upgrade"]) == 1
    assert "the new one has failed: no database; see its log" in capsys.readouterr().err


def test_drain_starts_the_end_of_the_server(running: ServerThread, capsys: Capture) -> None:
    assert main(["drain", "--timeout", "7"]) == 0
    assert capsys.readouterr().err == "the server drains 0 connections within 7 s\n"
    running.join()


def test_drain_wait_returns_after_the_end(running: ServerThread, capsys: Capture) -> None:
    assert json_of(capsys, "drain", "--wait") == {"connections": 0, "timeout": 30.0, "ended": True}
    running.join()
    assert main(["status"]) == 1


def test_drained_process_exits_with_0(tmp_path: Path, certs: Path, home: Path, capsys: Capture) -> None:
    with ServerProcess(home, certs) as server:
        assert main(["drain", "--wait", "--timeout", "3600"]) == 0
        assert server.wait() == 0
    assert '"server.ended"' in server.log


# --- the live view -------------------------------------------------------------------------------------------


@pytest.fixture
def found(running: ServerThread) -> dict[str, Any]:
    return running.in_loop(lambda: status_report(take_snapshot(running.server.parts)))


def test_status_screen_fits_the_terminal(found: dict[str, Any]) -> None:
    for width, height in ((100, 40), (40, 10), (20, 2)):
        text = frame(found, width, height)
        lines = text.split("\r\n")
        assert len(lines) <= height
        for line in lines:
            bare = line
            for code in ("\x1b[H", "\x1b[K", "\x1b[J", "\x1b[1m", "\x1b[31m", "\x1b[0m"):
                bare = bare.replace(code, "")
            assert len(bare) <= width
            assert "\x1b" not in bare


def test_problems_are_highlighted_and_output_is_escaped(found: dict[str, Any]) -> None:
    found["certificates"][0] |= {"days_left": -1, "seconds_left": -5, "site": ["\x1b[2J.example"]}
    found["store"] |= {"state": "degraded", "refusing": True, "pending_revocations": 2}
    found["draining"] = True
    found["handshakes"] |= {
        "failed": {"not_tls": 3, "truncated": 5},
        "groups": {"x25519": 1, "X25519MLKEM768": 1_200},
    }
    found["requests"]["incidents"] = 1
    found["streams"] |= {"open": 1, "opened": 5, "cut": 2, "items_sent": 1_000}
    found["calls"] |= {"handlers": 3, "in_flight": 1, "ended": {"answered": 1_200, "deadline": 2}}
    found["traffic"]["waits"] = {"count": 1, "p50": 2.5, "p90": 2.5, "p99": 2.5, "p999": 2.5}
    alert = {"severity": "error", "title": "bad\r\n\x1b[31mnews", "began_at": found["time"] - 90_000}
    found["alerts"] = {
        "open": [alert] * 12,
        "sinks": [{"name": "webhook", "down": True, "waiting": 7}],
        "over": [],
    }
    lines = lines_of(found)
    text = "\n".join(line for line, _ in lines)
    assert "\x1b" not in text
    assert "EXPIRED" in text
    assert "degraded, all tokens are refused, 2 revocations pending" in text
    assert "8 failed: truncated 5, not_tls 3" in text
    assert "X25519MLKEM768 1,200, x25519 1" in text
    assert "DRAINING" in text
    assert "1 open; 5 in all, 2 cut; 1,000 items sent, 0 received" in text
    assert "handled by 3 clients; 1 in flight; 1,200 answered, 2 deadline" in text
    assert "and 2 more" in text
    assert "(for 1m 30s)" in text
    assert "awaiting      p50 2.5 s" in text
    assert "the webhook is not reachable; waiting: 7 messages" in text
    assert sum(style == "bad" for _, style in lines) >= 15


def test_workers_have_a_line_each(found: dict[str, Any]) -> None:
    assert not any("workers" in line for line, _ in lines_of(found))
    known = {"connections": 1_234, "requests_per_s": 5.25, "loop_lag_s": 0.002, "rss_bytes": 45 << 20}
    unknown = dict.fromkeys(known)
    found["workers"] = [
        {"worker": "coordinator", "pid": 4711, "state": "serving", "restarts": 0, **known},
        {"worker": "1", "pid": 4712, "state": "serving", "restarts": 1, **known},
        {"worker": "2", "pid": 4713, "state": "draining", "restarts": 0, **known},
        {"worker": "3", "pid": 4714, "state": "silent", "restarts": 0, **unknown},
        {"worker": "4", "pid": None, "state": "absent", "restarts": 2, **unknown},
    ]
    lines = lines_of(found)
    at = lines.index(("workers: 1 of 4 serving", "head"))
    assert lines[at + 1 : at + 6] == [
        ("  coordinator pid 4711, loop lag 2 ms, 45 MiB", ""),
        ("  1           pid 4712, 1,234 connections, 5.2 requests/s, loop lag 2 ms, 45 MiB, 1 restart", ""),
        ("  2           pid 4713, draining, 1,234 connections, 5.2 requests/s, loop lag 2 ms, 45 MiB", ""),
        ("  3           pid 4714, SILENT", "bad"),
        ("  4           ABSENT, 2 restarts", "bad"),
    ]


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (duration, 0.000_025, "25 us"),
        (duration, 0.0123, "12.3 ms"),
        (duration, 2.5, "2.5 s"),
        (span, 5, "5s"),
        (span, 65, "1m 5s"),
        (span, 3_700, "1h 1m"),
        (span, 100_000, "1d 3h"),
        (size, 3 * 1024 * 1024, "3 MiB"),
    ],
)
def test_numbers_are_formatted(function: Callable[[float], str], value: float, text: str) -> None:
    assert function(value) == text


def test_watch_continues_until_interrupted(
    running: ServerThread, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []

    def wait(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(status_module, "time", SimpleNamespace(sleep=wait))  # not for the server's threads
    assert main(["status", "--watch", "--json", "--interval", "0.5"]) == 130
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["pid"] for line in lines] == [os.getpid()] * 3
    assert looks == [0.5] * 3
    looks.clear()
    assert main(["status", "--watch"]) == 130  # not a terminal: plain texts in sequence
    assert capsys.readouterr().out.count("zcproto 0.") == 3


def test_watch_restores_the_terminal(running: ServerThread) -> None:
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "zcproto", "status", "--watch", "--interval", "0.2"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "ZCPROTO_HOME": str(running.home), "COLUMNS": "80", "LINES": "20"},
    )
    os.close(theirs)
    seen = b""
    try:
        while seen.count(b"\x1b[H") < 3:
            seen += os.read(ours, 65_536)
        process.send_signal(signal.SIGINT)
        while b"\x1b[?1049l" not in seen:
            seen += os.read(ours, 65_536)
        assert process.wait(TIMEOUT) == 130
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert seen.startswith(b"\x1b[?1049h")
    assert b"serving" in seen


# --- without a server, or with another program at the socket -------------------------------------------------


@pytest.mark.parametrize(
    "command", [["status"], ["reload"], ["drain"], ["log", "level"], ["alert", "list"], ["status", "--watch"]]
)
def test_commands_without_a_running_server_fail(home: Path, capsys: Capture, command: list[str]) -> None:
    home.mkdir(0o700)
    assert main(command) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == (f"zcproto: no server runs with the home folder {home}; start one, or use --home\n")


def test_stale_socket_counts_as_no_server(home: Path, capsys: Capture) -> None:
    home.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as dead, address_of(home / "control.sock") as address:
        dead.bind(address)
    assert main(["status"]) == 1
    assert "no server runs" in capsys.readouterr().err
    assert main(["user", "add", "ada"]) == 0  # changes the file


@pytest.fixture
def other_program(home: Path) -> Iterator[Callable[[bytes], None]]:
    """Another program at the socket that answers each connection with these bytes."""
    home.mkdir(mode=0o700)
    listening = socket.socket(socket.AF_UNIX)
    with address_of(home / "control.sock") as address:
        listening.bind(address)
    listening.listen()
    threads = []

    def answer(data: bytes) -> None:
        def run() -> None:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            with connection:
                connection.recv(65_536)
                try:
                    connection.sendall(data)
                except OSError:
                    return

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        threads.append(thread)

    yield answer
    listening.close()
    for thread in threads:
        thread.join(TIMEOUT)


JSON = b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"


@pytest.mark.parametrize(
    ("data", "printed"),
    [
        (b"", "it ended the connection"),
        (b"\x00\x01 nonsense\r\n\r\n", "it ended the connection"),
        (
            b"HTTP/1.1 404 Not Found\r\nContent-Type: text/plain\r\nContent-Length: 0\r\n\r\n",
            "another version",
        ),
        (b"HTTP/1.1 403 Forbidden\r\nContent-Type: text/plain\r\nContent-Length: 0\r\n\r\n", "not allowed"),
        (b"HTTP/1.1 500 Oh\r\nContent-Type: text/plain\r\nContent-Length: 0\r\n\r\n", "answered 500"),
        (JSON % (b"200 OK", 1, b"{"), "malformed JSON"),
        (JSON % (b"409 Conflict", 15, b'{"error": "x"}\n'), "zcproto: x"),
        (JSON % (b"409 Conflict", 2, b"[]"), "answered 409"),
        (JSON % (b"409 Conflict", 26, b'{"error": "a\\u001b[31mb" }\n'[:26]), "a\\x1b[31mb"),
        (JSON % (b"200 OK", 17_000_000, b" " * 17_000_000), "more than 16777216 bytes"),
    ],
    ids=["nothing", "garbage", "404", "403", "500", "json", "409", "list", "escape", "large"],
)
def test_malformed_control_response_is_reported(
    other_program: Callable[[bytes], None], home: Path, capsys: Capture, data: bytes, printed: str
) -> None:
    other_program(data)
    assert main(["status"]) == 1
    err = capsys.readouterr().err
    assert printed in err
    assert "\x1b" not in err
    assert err.count("\n") == 1


def test_files_are_not_changed_while_the_server_cannot_be_asked(
    other_program: Callable[[bytes], None], home: Path, capsys: Capture
) -> None:
    other_program(b"HTTP/1.1 500 Oh\r\nContent-Type: text/plain\r\nContent-Length: 0\r\n\r\n")
    assert main(["user", "add", "ada"]) == 1
    assert not (home / "users.toml").exists()


def test_socket_of_another_user_is_reported(home: Path, capsys: Capture) -> None:
    home.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as other, address_of(home / "control.sock") as address:
        other.bind(address)
        other.listen()
        (home / "control.sock").chmod(0)
        with obeying_file_modes():
            assert main(["status"]) == 1
    assert f"you are not allowed; it belongs to uid {os.geteuid()}" in capsys.readouterr().err


def test_permission_error_is_reported(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def refuse(path: Path, limit_s: float) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("zcproto.cli.control.connect_unix", refuse)
    assert main(["status"]) == 1
    assert "you are not allowed; run this as the server's user, or as root" in capsys.readouterr().err


def test_full_backlog_is_retried(home: Path, capsys: Capture) -> None:
    home.mkdir(mode=0o700)
    listening = socket.socket(socket.AF_UNIX)
    with address_of(home / "control.sock") as address:
        listening.bind(address)
        listening.listen(0)
        first = socket.socket(socket.AF_UNIX)
        first.connect(address)
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(main(["status"])))
    thread.start()
    try:
        connection, _ = listening.accept()  # makes room
        connection.close()
        connection, _ = listening.accept()
        connection.close()
        thread.join(TIMEOUT)
    finally:
        first.close()
        listening.close()
    eventually(lambda: codes == [1])
