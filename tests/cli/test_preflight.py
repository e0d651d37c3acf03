"""Configurations with which a server cannot start: every command refuses them, with one message and cure."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import trustme

from bench.server_process import free_port
from tests.cli.doctor_report import Capture, Doctor, doctor
from tests.server.conftest import Serve
from zcproto.alerts import AlertKind
from zcproto.certs import client_ca
from zcproto.cli import main
from zcproto.config import Config, load_config
from zcproto.errors import CertificateError, ConfigError
from zcproto.observe.log import configure_logging
from zcproto.runtime import service_manager
from zcproto.runtime.server import Server

__all__ = ["doctor"]

APP = "tests.cli.stub_app:app"

CREATE = "create its folder, and let the user of the server write to it"
SECRET = "create it for the user of the server alone (mode 0600), or correct its path"
RESTORE = "correct the file, or restore it from a backup"

CASES = {
    # a section of config.toml, a damaged file or a link in the home folder, the check that finds it, its message
    "log folder": (
        '[log]\nfile = "{home}/no/log"',
        "",
        "log",
        'log.file = "{home}/no/log": cannot be opened: No such file or directory; ' + CREATE,
    ),
    "audit folder": (
        '[log]\naudit_file = "{home}/no/audit"',
        "",
        "log",
        'log.audit_file = "{home}/no/audit": cannot be opened: No such file or directory; ' + CREATE,
    ),
    "damaged users": (
        "",
        "users.toml",
        "users",
        "{home}/users.toml: is not TOML: Expected '=' after a key in a key/value pair (at line 1, column 7); "
        + RESTORE,
    ),
    "damaged devices": (
        "",
        "devices.toml",
        "devices",
        "{home}/devices.toml: is not TOML: Expected '=' after a key in a key/value pair (at line 1, column 7); "
        + RESTORE,
    ),
    "damaged tokens": (
        "",
        "tokens.toml",
        "tokens",
        "{home}/tokens.toml: is not TOML: Expected '=' after a key in a key/value pair (at line 1, column 7); "
        + RESTORE,
    ),
    "dangling users link": (
        "",
        "users.toml -> /no/secret/users.toml",
        "users",
        "{home}/users.toml: is a link to a file that is missing; restore that file, or remove the link",
    ),
    "alert command": (
        '[alerts]\ncommand = ["/no/program"]',
        "",
        "alerts",
        "alerts.command: /no/program cannot be run: No such file or directory; install it, or correct its path",
    ),
    "webhook secret": (
        '[alerts]\nwebhook = "https://h.example/"\nwebhook_secret_file = "{home}/none"',
        "",
        "alerts",
        "alerts.webhook_secret_file: {home}/none: cannot be read: No such file or directory; " + SECRET,
    ),
    "redirect port": (
        "[http]\nredirect_port = {taken}",
        "",
        "port",
        "server.host = '127.0.0.1', http.redirect_port = {taken}: cannot listen: Address already in use; end the"
        " program that uses it (ss -ltnp lists them), or set another port",
    ),
    "role": (
        '[[auth.role]]\nname = "billing"\nallow = ["nothing.*"]',
        "",
        "roles",
        "auth.role[0].allow: 'nothing.*' matches no method that needs a session; zcproto call HOST:PORT --list"
        " shows the methods",
    ),
    "certificate of a site": (
        '[[certificates.site]]\nnames = ["a.example"]\ncertificate = ["{home}/no.pem"]',
        "",
        "certificate",
        "{home}/no.pem: cannot be read: No such file or directory; check the path, and that this user may read it",
    ),
    "mode of a key": (
        "",
        "certs/server-ecdsa.key 0644",
        "certificate",
        "{home}/certs/server-ecdsa.key: others can read or change this file (mode 0644); run: chmod 600"
        " {home}/certs/server-ecdsa.key",
    ),
    "mode of the authority's key": (
        "",
        "certs/ca.key 0640",
        "certificate",
        "{home}/certs/ca.key: others can read or change this file (mode 0640); run: chmod 600 {home}/certs/ca.key",
    ),
    "mode of the folder of keys": (
        "",
        "certs 0777",
        "certificate",
        "{home}/certs: others can list or change this folder (mode 0777); run: chmod 700 {home}/certs",
    ),
    "lost key without repair": (
        "[certificates]\nrepair = false",
        "certs/server-ecdsa.key = missing",
        "certificate",
        "{home}/certs/server-ecdsa.key: is missing or does not belong to {home}/certs/server-ecdsa.crt; restore the"
        " key from a backup, or set certificates.repair = true to replace it with a new one",
    ),
    "certificate of another authority": (
        "",
        "certs/server-ecdsa.crt = foreign",
        "certificate",
        "{home}/certs/server-ecdsa.crt: was not issued by {home}/certs/ca.crt and is never replaced; move it away,"
        ' or set certificates.mode = "files" to use it',
    ),
    "authority of another program": (
        "",
        "certs/ca.crt = foreign",
        "certificate",
        "{home}/certs/ca.crt: was not created here and is never replaced; move it away with its key, or set"
        ' certificates.mode = "files" to use certificates of another authority',
    ),
    "mode of the client authority's key": (
        '[tls]\nclient_auth = "optional"',
        "certs/client-ca.key 0644",
        "certificate",
        "{home}/certs/client-ca.key: others can read or change this file (mode 0644); run: chmod 600"
        " {home}/certs/client-ca.key",
    ),
    "client CA": (
        '[tls]\nclient_auth = "optional"\nclient_ca_file = "{home}/no.pem"',
        "",
        "certificate",
        "{home}/no.pem: cannot be read: No such file or directory; check the path, and that this user may read it",
    ),
    "collector's headers": (
        '[telemetry]\ntraces = true\nheaders_file = "{home}/none"',
        "",
        "collector",
        "telemetry.headers_file: {home}/none: cannot be read: No such file or directory; " + SECRET,
    ),
    "provider's CA": (
        '[[auth.oidc]]\nissuer = "https://i.example"\naudience = ["a"]\nca_file = "{home}/none"',
        "",
        "issuer",
        "auth.oidc[0].ca_file: {home}/none cannot be read: No such file or directory; check the path",
    ),
}


@pytest.fixture
def taken() -> Iterator[int]:
    """A port on which another program listens."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


def damage_certificates(home: Path, change: str) -> None:
    """Make a mistake in the folder of certificates: "FILE MODE" or "FILE = CONTENT"."""
    client_ca.ensure_authority(home / "certs", datetime.now(UTC))
    name, _, content = change.partition(" = ")
    if content == "missing":
        (home / name).unlink()
    elif content == "foreign":
        trustme.CA().issue_cert("localhost").cert_chain_pems[0].write_to_path(home / name)
    else:
        name, _, mode = change.partition(" ")
        (home / name).chmod(int(mode, 8))


def break_installation(home: Path, case: str, taken: int) -> tuple[str, str]:
    """Make the mistake in a home folder. Return the check that finds it, and its message."""
    section, file, check, message = CASES[case]
    text = section.format(home=home, taken=taken)
    own = "" if "[certificates]" in text else "[certificates]\n"
    (home / "config.toml").write_text(
        f"[server]\nport = {free_port()}\n{own}{text}\n".replace(
            "[certificates]\n", "[certificates]\nkey_types = ['ecdsa-p256']\n"
        )
    )
    name, _, target = file.partition(" -> ")
    if " = " in file or " 0" in file:
        damage_certificates(home, file)
        return check, message.format(home=home)
    if name:
        (home / name).unlink(missing_ok=True)
    if target:
        (home / name).symlink_to(target)
    elif name:
        (home / name).touch(0o600)
        (home / name).write_text("users is damaged")
    return check, message.format(home=home, taken=taken)


def printed(capsys: Capture) -> list[str]:
    """Return what a command has printed on standard error, without the log of a server in this process."""
    return [line for line in capsys.readouterr().err.splitlines() if not line.startswith("{")]


def start(config: Config, home: Path) -> None:
    """Start a server in this process."""
    configure_logging(config.log)
    asyncio.run(Server(config=config, home=home, control=False).start())


@pytest.mark.parametrize("case", CASES)
def test_every_command_refuses_what_cannot_start(
    case: str, home: Path, serve: Serve, taken: int, capsys: Capture, doctor: Doctor
) -> None:
    server = serve(users_file=True)
    check, message = break_installation(home, case, taken)
    before = sorted(home.rglob("*"))
    with pytest.raises(ConfigError) as refused:
        server.reload()
    assert refused.value.faults == [message]
    alerts = server.in_loop(server.server.parts.alerts.center.open_alerts)
    (alert,) = [
        each for each in alerts if each.kind is AlertKind.CONFIG_REFUSED
    ]  # the file may have one, too
    assert message[:100] in alert.title
    assert message[:100] in server.in_loop(server.server.summary)
    for command in (["reload", "--dry-run"], ["config", "check"]):
        capsys.readouterr()
        assert main(command) == 2
        assert printed(capsys) == [f"zcproto: {message}"]
    server.drain()

    capsys.readouterr()
    assert main(["config", "check", "--app", APP]) == 2
    assert printed(capsys) == [f"zcproto: {message}"]
    found = doctor("--app", APP)
    assert found.one(check, "fault") == message.replace("; ", " | ", 1)
    assert [each for each in found.faults if each != "permissions" or "mode" not in case] == [check]
    assert sorted(home.rglob("*")) == [path for path in before if path.name != "control.sock"]

    with pytest.raises((ConfigError, CertificateError)) as error:
        start(load_config(None, home=home, environ={}), home)
    assert str(error.value) == message


def test_serve_reports_all_faults_at_once(home: Path, certs: Path) -> None:
    home.mkdir(0o700)
    config = (
        f'[log]\nfile = "{home}/no/log"\n[alerts]\ncommand = ["/no/program"]\nwebhook = "https://h.example/"\n'
        f'webhook_secret_file = "{home}/none"\n[[auth.role]]\nname = "a"\nallow = ["nothing"]\n'
    )
    (home / "config.toml").write_text(config)
    (home / "users.toml").write_text("damaged")
    command = [sys.executable, "-m", "zcproto", "--home", str(home), "serve"]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    lines = [line.removeprefix("zcproto: ") for line in done.stderr.splitlines()]
    starts = [line.partition(": ")[0].partition(" = ")[0] for line in lines]
    wanted = ["log.file", f"{home}/users.toml", "alerts.webhook_secret_file", "alerts.command"]
    assert starts == [*wanted, "auth.role[0].allow"]


def test_roles_are_not_checked_without_the_application(home: Path, capsys: Capture, doctor: Doctor) -> None:
    home.mkdir(0o700)
    role = '[[auth.role]]\nname = "a"\nallow = ["shop.*", "server.stats"]\n'
    (home / "config.toml").write_text(f"[server]\nport = {free_port()}\n{role}")
    assert main(["config", "check"]) == 0
    note = "auth.role is not checked; give the application with --app MODULE:APP"
    assert capsys.readouterr().err == f"zcproto: {note}\n"
    report = doctor()
    assert note.replace("; ", " | ") in report.one("server", "warning")
    assert "free; no server runs" in report.one("port", "ok")
    assert report.faults == []


def test_port_of_a_socket_unit_may_be_in_use(
    home: Path, taken: int, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.mkdir(0o700)
    (home / "config.toml").write_text(f"[server]\nport = {taken}\n")
    assert main(["config", "check"]) == 2
    assert f"server.port = {taken}: cannot listen" in capsys.readouterr().err
    units = tmp_path / "units"
    for name, line in (
        ("a.socket", "[Socket]\nListenStream=[::]:1\n"),
        ("b.socket.d/x.conf", "ListenStream="),
    ):
        (units / name).parent.mkdir(exist_ok=True)
        (units / name).write_text(line)
    monkeypatch.setattr(service_manager.has_socket_unit, "__defaults__", ([tmp_path / "none", units],))
    assert main(["config", "check"]) == 2
    (units / "b.socket.d" / "x.conf").write_text(f"ListenStream=\nListenStream=127.0.0.1:{taken}\n")
    assert main(["config", "check"]) == 0
