"""`zcproto doctor` on whole installations: the right finding with the right cure, and no other fault.

Those that cannot start are in test_preflight.py.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import pytest
import trustme

from bench.server_process import free_port
from tests.alerts.receiver import Receiver
from tests.cli.doctor_report import NOW, Doctor, doctor
from tests.server.conftest import Serve
from zcproto.certs import managed
from zcproto.certs.managed import ManagedSettings
from zcproto.cli.doctor import OLD_CERTIFICATE, RESTORE
from zcproto.cli.doctor.remote import NOT_SERVING
from zcproto.common.unix_socket import SocketFile
from zcproto.runtime import service_manager

__all__ = ["doctor"]

OWN = "[certificates]\nkey_types = ['ecdsa-p256']\n"
ACME = (
    "[certificates]\nmode = 'acme'\nkey_types = ['ecdsa-p256']\nnames = ['zcp.example.com']\n"
    "[acme]\ndirectory = 'https://127.0.0.1:1/'\nterms_agreed = true\n"
)


class Machine(NamedTuple):
    """What an installation is made of."""

    home: Path
    serve: Serve
    patch: pytest.MonkeyPatch
    stack: ExitStack
    port: int

    def configure(self, text: str) -> None:
        (self.home / "config.toml").write_text(f"[server]\nport = {self.port}\n{text}")

    def start(self, text: str) -> None:
        """Start a server with this configuration."""
        self.configure(text)
        self.serve(users_file=True, store__url="sqlite", server__port=self.port)

    def listen(self) -> None:
        """Listen on the port, and accept no connection: as systemd does, or a server that is stopped."""
        self.stack.enter_context(socket.create_server(("127.0.0.1", self.port)))

    def external(self, name: str) -> str:
        """Write a certificate of another CA. Return the configuration for it."""
        issued = trustme.CA().issue_cert(name, not_before=NOW, not_after=None)
        pem, key = self.home / "site.pem", self.home / "site.key"
        issued.cert_chain_pems[0].write_to_path(pem)
        issued.private_key_pem.write_to_path(key)
        key.chmod(0o600)
        return f"[certificates]\nmode = 'files'\ncertificate = ['{pem}']\nkey = ['{key}']\n"


def healthy(machine: Machine) -> None:
    machine.start(OWN)


def healthy_with_files(machine: Machine) -> None:
    machine.start(machine.external("zcp.example.com"))


def healthy_with_a_wildcard(machine: Machine) -> None:
    machine.start(machine.external("*.example.com"))


def healthy_before_the_first_order(machine: Machine) -> None:
    machine.start(ACME)


def stopped(machine: Machine) -> None:
    machine.configure(OWN)


def stopped_behind_a_socket_unit(machine: Machine) -> None:
    machine.configure(OWN)
    machine.listen()
    units = machine.home.parent / "units"
    units.mkdir()
    (units / "zcproto.socket").write_text(f"[Socket]\nListenStream={machine.port}\n")
    machine.patch.setattr(service_manager.has_socket_unit, "__defaults__", ([units],))


def hung(machine: Machine) -> None:
    machine.configure(OWN)
    machine.listen()
    file = SocketFile(machine.home / "control.sock")
    control = file.open(1)
    assert control is not None
    machine.stack.enter_context(control)
    machine.stack.callback(file.close)


def another_program(machine: Machine) -> None:
    machine.configure(OWN)
    machine.listen()


def few_files(machine: Machine) -> None:
    machine.start(OWN)
    limit_files(machine, server=1_024, shell=65_536)


def few_files_for_the_shell(machine: Machine) -> None:
    machine.start(OWN)
    limit_files(machine, server=65_536, shell=256)


def limit_files(machine: Machine, *, server: int, shell: int) -> None:
    machine.patch.setattr("resource.prlimit", lambda pid, kind: (server, server))
    machine.patch.setattr("resource.getrlimit", lambda kind: (shell, shell))


def foreign_key(machine: Machine) -> None:
    machine.start(OWN)
    key = trustme.CA().issue_cert("localhost", key_type=trustme.KeyType.ECDSA).private_key_pem
    (machine.home / "certs" / "server-ecdsa.key").write_bytes(key.bytes())


def foreign_key_without_repair(machine: Machine) -> None:
    foreign_key(machine)
    machine.configure(f"{OWN}repair = false\n")


def expired(machine: Machine) -> None:
    machine.configure(OWN)
    day = timedelta(days=1)
    settings = ManagedSettings((), ("ecdsa-p256",), 90 * day, 30 * day, renew_key=False)
    managed.ensure(machine.home / "certs", settings, NOW - 200 * day)


def certificate_of_another_name(machine: Machine) -> None:
    machine.start(machine.external("zcp.example.com"))
    machine.external("other.example.com")


def certificate_not_served_yet(machine: Machine) -> None:
    machine.start(f"{machine.external('zcp.example.com')}watch_interval = '1h'\n")
    machine.external("zcp.example.com")


def lost_certificate(machine: Machine) -> None:
    machine.start(machine.external("zcp.example.com"))
    (machine.home / "site.pem").unlink()


def webhook_down(machine: Machine) -> None:
    machine.start(f"{OWN}[alerts]\nwebhook = 'http://127.0.0.1:{free_port()}/hook'\n")


def webhook_up(machine: Machine) -> None:
    receiver = machine.stack.enter_context(Receiver(None))
    machine.start(f"{OWN}[alerts]\nwebhook = '{receiver.url}'\n")


def run_as_root(machine: Machine) -> None:
    machine.configure(OWN)
    for path in (machine.home, *machine.home.rglob("*")):
        os.chown(path, 4711, 4711)


INSTALLATIONS: list[tuple[Callable[[Machine], None], list[str], str, str, str]] = [
    # installation, faults, and one finding: check, state, text with its cure
    (healthy, [], "trust", "ok", "by "),
    (healthy_with_files, [], "trust", "ok", "names: zcp.example.com"),
    (healthy_with_a_wildcard, [], "trust", "ok", "names: *.example.com"),
    (healthy_before_the_first_order, [], "trust", "ok", "by a pin"),
    (stopped, [], "port", "ok", "free; no server runs"),
    (stopped_behind_a_socket_unit, ["handshake"], "handshake", "fault", f"| {NOT_SERVING}"),
    (hung, ["handshake"], "server", "warning", "it did not answer in time"),
    (hung, ["handshake"], "handshake", "fault", f"| {NOT_SERVING}"),
    (another_program, ["port"], "port", "fault", "| end the program that uses it (ss -ltnp lists them)"),
    (
        few_files,
        [],
        "file limit",
        "warning",
        "1024 open files are allowed, 20256 are needed | raise it (LimitNO",
    ),
    (few_files_for_the_shell, [], "file limit", "ok", "65536 open files are allowed"),
    (foreign_key, ["certificate"], "certificate", "fault", f"| {RESTORE}"),
    (
        foreign_key_without_repair,
        ["certificate"],
        "certificate",
        "fault",
        "| restore the key from a backup, or set certificates.repair = true to replace it with a new one",
    ),
    (
        expired,
        ["certificate"],
        "certificate",
        "fault",
        "| check the clock of this machine (date -u); if it is right,",
    ),
    (
        certificate_of_another_name,
        ["reload"],
        "reload",
        "fault",
        "site.pem: is valid for other.example.com, and not for zcp.example.com, which it replaces | put the right",
    ),
    (
        certificate_of_another_name,
        ["reload"],
        "trust",
        "skipped",
        "the files of the certificates have faults",
    ),
    (certificate_not_served_yet, ["trust"], "trust", "fault", f"| {OLD_CERTIFICATE}"),
    (
        lost_certificate,
        ["certificate"],
        "certificate",
        "fault",
        "site.pem: cannot be read: No such file or directory",
    ),
    (lost_certificate, ["certificate"], "trust", "skipped", "the files of the certificates have faults"),
    (webhook_down, [], "webhook", "warning", "cannot be reached: Connection refused | check the receiver"),
    (webhook_up, [], "webhook", "ok", ": reachable"),
    pytest.param(
        *(
            run_as_root,
            ["home", "config"],
            "home",
            "fault",
            "| run as that user: sudo -u '#4711' zcproto --home",
        ),
        marks=pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    ),
]


@pytest.mark.parametrize(("install", "faults", "check", "state", "text"), INSTALLATIONS)
def test_installation_has_the_right_finding_and_cure(
    install: Callable[[Machine], None],
    faults: list[str],
    check: str,
    state: str,
    text: str,
    home: Path,
    serve: Serve,
    doctor: Doctor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    home.mkdir(0o700)
    monkeypatch.delenv("SSLKEYLOGFILE", raising=False)
    with ExitStack() as stack:
        install(Machine(home, serve, monkeypatch, stack, free_port()))
        report = doctor(*([] if "handshake" not in faults else ["--timeout", "0.2"]))
        assert report.faults == faults, report
        assert text in report.one(check, state)
