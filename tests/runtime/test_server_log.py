"""Tests of a server's log: ids that join lines, and input from peers."""

from __future__ import annotations

import asyncio
import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import FakeClock, whole_lines
from tests.loop_reports import LoopReports
from tests.server.conftest import Serve
from tests.server.helpers import eventually
from tests.server.process import ServerProcess
from zcproto.app.app import App
from zcproto.config.model import LogConfig
from zcproto.errors import Code, FailedPrecondition
from zcproto.observe import log as log_module
from zcproto.observe.events import EVENTS
from zcproto.observe.log import configure_logging
from zcproto.runtime.process_setup import log_loop_fault
from zcproto.sessions.token import token_text
from zcproto.wire.frame import NO_TOKEN

Log = Callable[[], list[dict[str, Any]]]
TOKEN = token_text(bytes(range(100, 132)))
HOSTILE = "x\r\n\x1b[2J\x00\x7f\u2028\u202e\x85 event=server.ended" + "y" * 12_000


@pytest.fixture
def lines(tmp_path: Path) -> Log:
    """Return all lines of the log so far."""
    path = tmp_path / "server.log"
    configure_logging(LogConfig(level="debug", file=path))
    return lambda: whole_lines(path.read_text())


def of(lines: list[dict[str, Any]], *events: str) -> list[dict[str, Any]]:
    return [line for line in lines if line["event"] in events]


def test_log_lines_carry_the_connection_id(serve: Serve, lines: Log) -> None:
    server = serve()
    for user in ("ada", "bob"):
        with server.client(user) as client:
            client.send(client.frame(0x66))
            client.rest_until_closed()
    server.until_left()
    names = ("connection.opened", "session.opened", "connection.refused", "connection.ended")
    eventually(lambda: len(of(lines(), *names)) == 2 * len(names))
    found = of(lines(), *names)
    ids = {line["user"]: line["connection"] for line in found if line["event"] == "session.opened"}
    assert len(set(ids.values())) == 2
    (group,) = {line["group"] for line in found if line["event"] == "connection.opened"}
    assert {group: 2} == server.server.parts.acceptor.groups
    for connection in ids.values():
        assert re.fullmatch(r"[0-9a-f]{4}-[0-9]+", connection)
        assert {line["event"] for line in found if line["connection"] == connection} == set(names)


def test_connection_is_numbered_when_first_logged(serve: Serve) -> None:
    configure_logging(LogConfig(level="error"))
    server = serve()
    connections = server.server.state.connections
    for _ in range(2):
        with server.client() as client:
            assert client.refused("nothing", token=NO_TOKEN).code == Code.UNAUTHENTICATED
        server.until(lambda: not connections)
    with server.client() as client:
        assert client.refused("nothing", token=NO_TOKEN).code == Code.UNAUTHENTICATED
        (number,) = server.in_loop(lambda: [each.id.rpartition("-")[2] for each in connections])
    assert number == "1"


def test_value_that_cannot_be_sent_is_logged_by_path_and_type(serve: Serve, lines: Log) -> None:
    app = App()

    @app.method("jobs")
    def jobs() -> dict[str, Any]:
        return {"jobs": [{"id": 1}, {"id": 2, "state": object()}]}

    @app.method("job.state")
    async def state() -> Any:
        return {"state": 2**64}

    with serve(app).client("ada") as client:
        client.refused("jobs")
        client.refused("job.state")
    assert [line["exc_info"] for line in of(lines(), "request.failed")] == [
        "MessageError: value.jobs[1].state is of type builtins.object and cannot be sent",
        "MessageError: value.state is an int of more than 64 bits and cannot be sent",
    ]


def test_incident_id_joins_answer_and_log_line(serve: Serve, lines: Log) -> None:
    app = App()

    @app.method("fail")
    def fail() -> None:
        raise KeyError(f"{TOKEN} and more")

    server = serve(app)
    with server.client("ada") as client:
        answer = client.refused("fail")
    (line,) = of(lines(), "request.failed")
    assert answer.details == {"incident": line["incident"]}
    message = "KeyError: '(hidden) and more'"
    assert (line["what"], line["exc_info"], line["level"]) == ("fail", message, "error")
    assert line["traceback"] == [  # without the frames of zcproto that call the method
        "Traceback (most recent call last):",
        f'  File "{__file__}", line {fail.__code__.co_firstlineno + 2}, in fail',
        '    raise KeyError(f"{TOKEN} and more")',
        message,
    ]
    assert line["connection"]
    assert TOKEN not in json.dumps(lines())
    assert "KeyError" not in str((answer.message, answer.details))


def test_frames_alone_are_logged_if_configured(serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "frames.log"
    configure_logging(LogConfig(file=path, exceptions="frames"))
    app = App()

    @app.method("fail")
    def fail() -> None:
        raise KeyError("ada@example.com")

    with serve(app).client("ada") as client:
        client.refused("fail")
    (line,) = [json.loads(line) for line in path.read_text().splitlines() if "request.failed" in line]
    assert line["exc_info"] == "KeyError"
    assert line["exc_info_at"][-1].endswith(" fail")
    assert "ada@example.com" not in path.read_text()


def test_log_of_failing_method_is_rate_limited(
    serve: Serve, lines: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_module._state, "clock", FakeClock())  # a second admits another line
    app = App()

    @app.method("fail")
    def fail() -> None:
        raise KeyError

    server = serve(app)
    with server.client("ada") as client:
        for _ in range(200):
            client.refused("fail")
    written = of(lines(), "request.failed")
    assert len(written) == 60
    assert ["traceback" in line for line in written] == [True] * 6 + [False] * 54
    assert all("exc_info_at" in line for line in written[6:])


@pytest.mark.requirement("logs")
@pytest.mark.parametrize("form", ["json", "console"])
def test_peer_input_is_escaped_to_one_log_line(serve: Serve, tmp_path: Path, form: str) -> None:
    path = tmp_path / "server.log"
    app = App()

    @app.method("fail")
    def fail(text: str) -> None:
        raise FailedPrecondition(text) if text == "x" else KeyError(text)

    configure_logging(LogConfig(level="debug", file=path, format=form))
    server = serve(app)
    with server.client("ada") as client:
        refusals: list[dict[str, Any]] = [
            {"scheme": HOSTILE},
            {"scheme": "api_key", "user": HOSTILE, "key": HOSTILE},
            {"scheme": "api_key", "client": HOSTILE},
            {HOSTILE: HOSTILE, "scheme": HOSTILE},
        ]
        for params in refusals:
            client.refused("session.open", params)
        client.refused("fail", {"text": HOSTILE})
        client.refused("session.revoke", {"id": HOSTILE})
        client.send(client.request(HOSTILE[:100]))  # no method's name
    server.until_left()
    text = path.read_text(encoding="ascii")
    assert text.endswith("\n")
    lines = text.splitlines()
    assert len(lines) == text.count("\n")
    for line in lines:
        assert line.isprintable()
        assert len(line) < 4_000
        if form == "json":
            assert json.loads(line)["event"] in EVENTS
        elif not line.startswith("    "):  # of a traceback
            _, _, event, _ = line.split(maxsplit=3)
            assert event in EVENTS
    assert sum("login.failed" in line for line in lines) >= 1
    assert not any(line.startswith("event=") for line in lines)


# --- a whole process ---------------------------------------------------------------------------------------------


def test_sighup_reopens_the_log_file(home: Path, certs: Path, key: str, tmp_path: Path) -> None:
    file, moved = tmp_path / "server.log", tmp_path / "server.log.1"
    (home / "config.toml").write_text(f'[certificates]\nkey_types = ["ecdsa-p256"]\n[log]\nfile = "{file}"\n')
    with ServerProcess(home, certs) as server:
        with server.client("ada", key):
            pass
        eventually(lambda: "session.opened" in file.read_text())
        file.rename(moved)
        server.signal(signal.SIGHUP)
        eventually(lambda: file.exists() and "log.reopened" in file.read_text())
        with server.client("ada", key):
            pass
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        assert server.log == ""
    assert "server.listening" in moved.read_text()
    assert "server.ended" not in moved.read_text()
    rest = [json.loads(line)["event"] for line in file.read_text().splitlines()]
    assert rest[0] == "log.reopened"
    assert rest[-1] == "server.ended"
    assert "session.opened" in rest
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.requirement("logs")
async def test_uncaught_exception_is_logged_without_arguments(lines: Log, loop_reports: LoopReports) -> None:
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(log_loop_fault)

    def broken(token: bytes) -> None:
        raise ValueError(token)

    loop.call_soon(broken, b"hunter2 and more")
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    loop.call_exception_handler({"message": "\r\n<nothing>"})
    assert len(loop_reports.take()) == 2
    one, other = lines()
    assert (one["event"], one["exc_info"]) == ("server.fault", "ValueError: (bytes)")
    assert one["what"].startswith("Exception in callback")
    assert one["traceback"][-1] == "ValueError: (bytes)"
    assert "what" not in other
    assert "hunter2" not in json.dumps(lines())
