"""Variables of the environment that give clients their user, key and CA."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.cli.helpers import LoopAhead, connect_patiently
from tests.limits import TIMEOUT
from tests.server.conftest import Serve
from tests.server.helpers import ServerThread
from zcproto.cli import connect, main
from zcproto.client import client, dial

__all__ = ["Serve"]

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def variables(
    shared: ServerThread, key_file: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> pytest.MonkeyPatch:
    """Set all variables for ada at the shared server."""
    monkeypatch.delenv("ZCPROTO_KEY", raising=False)
    monkeypatch.setenv("ZCPROTO_USER", "ada")
    monkeypatch.setenv("ZCPROTO_KEY_FILE", str(key_file))
    monkeypatch.setenv("ZCPROTO_CA_FILE", str(shared.home / "certs" / "ca.crt"))
    return monkeypatch


def test_call_needs_no_options(variables: pytest.MonkeyPatch, shared: ServerThread, capsys: Capture) -> None:
    assert main(["call", f"127.0.0.1:{shared.port}", "session.info"]) == 0
    assert json.loads(capsys.readouterr().out)["user"] == "ada"


def test_session_open_and_doctor_use_them(
    variables: pytest.MonkeyPatch, shared: ServerThread, home: Path, capsys: Capture
) -> None:
    address = f"127.0.0.1:{shared.port}"
    assert main(["session", "open", address]) == 0
    assert len(capsys.readouterr().out.strip()) == 43
    assert main(["doctor", address]) == 0
    out = capsys.readouterr().out
    assert "ada opened, used and closed one" in out
    assert f"by {shared.home / 'certs' / 'ca.crt'}" in out


def test_operator_of_a_server_is_the_user(
    variables: pytest.MonkeyPatch, shared: ServerThread, capsys: Capture
) -> None:
    address = f"127.0.0.1:{shared.port}"
    assert main(["session", "list", "--server", address]) == 1
    assert "PERMISSION_DENIED" in capsys.readouterr().err


def test_they_do_not_require_server_or_user(
    variables: pytest.MonkeyPatch, home: Path, shared: ServerThread
) -> None:
    home.mkdir(0o700)
    assert main(["session", "list"]) == 0
    variables.delenv("ZCPROTO_USER")
    assert main(["call", f"127.0.0.1:{shared.port}", "server.info"]) == 0


def test_options_override_them(
    variables: pytest.MonkeyPatch, shared: ServerThread, tmp_path: Path, capsys: Capture
) -> None:
    address = f"127.0.0.1:{shared.port}"
    assert main(["call", address, "session.info", "--user", "eve"]) == 0
    assert json.loads(capsys.readouterr().out)["user"] == "eve"
    assert main(["call", address, "server.info", "--key-file", str(tmp_path / "none")]) == 2
    assert "none: No such file" in capsys.readouterr().err


def test_help_names_them(home: Path, capsys: Capture) -> None:
    assert main(["call", "-h"]) == 0
    out = capsys.readouterr().out
    for name in ("ZCPROTO_USER", "ZCPROTO_KEY_FILE", "ZCPROTO_KEY", "ZCPROTO_CA_FILE"):
        assert name in out


# --- what a call reports ----------------------------------------------------------------------------------


def test_method_that_needs_a_session_names_the_options(
    shared: ServerThread, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    ca = str(shared.home / "certs" / "ca.crt")
    assert main(["call", f"127.0.0.1:{shared.port}", "echo", "--ca", ca]) == 1
    assert capsys.readouterr().err == (
        "zcproto: echo needs a session; use --user NAME and --key-file FILE, or set ZCPROTO_USER and"
        " ZCPROTO_KEY_FILE\n"
    )


def test_server_of_this_machine_without_a_ca_in_the_home_folder(
    shared: ServerThread, home: Path, capsys: Capture
) -> None:
    assert main(["call", f"127.0.0.1:{shared.port}", "server.info"]) == 2
    err = capsys.readouterr().err
    assert f"{home}/certs/ca.crt: does not exist; copy the CA of the server to this path" in err


def test_remote_server_is_verified_by_the_store_of_the_system(home: Path, capsys: Capture) -> None:
    assert main(["call", "no-such-host.invalid", "server.info"]) == 3
    err = capsys.readouterr().err
    assert err.startswith("zcproto: no connection: no-such-host.invalid:7443: ")
    assert err.endswith("; check the host name and DNS\n")


@pytest.mark.parametrize(("options", "seconds"), [([], 60), (["--timeout", "7"], 7)])
def test_call_waits_for_the_server_within_its_timeout(
    home: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    seconds: int,
) -> None:
    connect_patiently(monkeypatch)
    loop = LoopAhead()

    def is_over(*arguments: Any) -> None:
        loop.ahead_s = TIMEOUT
        dial.report_wait(*arguments)

    monkeypatch.setattr(connect, "new_event_loop", lambda: loop)
    monkeypatch.setattr(client, "report_wait", is_over)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        assert main(["call", address, "server.info", *options]) == 3
    assert caplog.messages == [
        f"{address}: nothing listens there yet; waiting up to {seconds} s for the server to start"
    ]
    assert capsys.readouterr().err == (
        f"zcproto: no connection: {address}: Connection refused, and {home}/certs/ca.crt does not exist; start the"
        " server, or check the host and the port\n"
    )
