"""`zcproto doctor`: the checks of this machine."""

from __future__ import annotations

import os
import shutil
import sqlite3
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import trustme

from bench.server_process import free_port
from tests.capabilities import obeying_file_modes
from tests.certs.support import constrain
from tests.cli.doctor_report import NOW, Capture, Doctor, doctor
from tests.cli.helpers import fill, new_session
from tests.stores.valkey.server_process import PROGRAMS, running
from zcproto import accelerator
from zcproto.auth import UserFile
from zcproto.bus.sealing import fingerprint, load_keys
from zcproto.cli import doctor as doctor_module
from zcproto.cli import main
from zcproto.common.clock import system_entropy
from zcproto.config import load_config

__all__ = ["doctor"]


@pytest.fixture
def folder(home: Path, certs: Path) -> Path:
    """A home folder as left by a server."""
    home.mkdir(0o700)
    shutil.copytree(certs, home / "certs")
    UserFile(home / "users.toml").add("ada")
    (home / "config.toml").write_text(
        f"[certificates]\nkey_types = ['ecdsa-p256']\n[server]\nport = {free_port()}\n"
    )
    fill(home, new_session())
    return home


def test_missing_home_is_a_warning(home: Path, tmp_path: Path, doctor: Doctor) -> None:
    config = tmp_path / "zc.toml"
    config.write_text(f"[server]\nport = {free_port()}\n")
    report = doctor("--config", str(config))
    assert report.faults == []
    assert report.one("home", "warning").startswith(f"{home}: does not exist | a server creates it")
    assert not home.exists(), "nothing is made by looking"


def test_home_of_a_stopped_server_is_ok(folder: Path, doctor: Doctor) -> None:
    before = sorted(folder.rglob("*"))
    report = doctor()
    assert report.faults == []
    assert report.one("store", "ok").startswith("it answers; sessions: 1")
    assert ": free; no server runs" in report.one("port", "ok")
    assert {each["state"] for each in report.of("certificate")} == {"ok"}
    assert sorted(path for path in folder.rglob("*") if not path.name.startswith("sessions.db")) == [
        path for path in before if not path.name.startswith("sessions.db")
    ]


@pytest.mark.parametrize("state", ["in use", "off", "missing"])
def test_accelerator_in_use_is_reported(
    state: str, folder: Path, doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accelerator, "compiled", accelerator if state == "in use" else None)
    monkeypatch.setattr(accelerator, "missing", "No module named 'zcproto._accelerator'")
    monkeypatch.setattr(accelerator, "is_off", state == "off")
    found = doctor().one("accelerator", "ok")
    assert found.startswith(accelerator.describe())
    assert found.startswith("in use") is (state == "in use")
    assert ("finds a C compiler" in found) is (state == "missing")


@pytest.mark.parametrize(
    ("workers", "cores", "state", "found"),
    [
        (1, 1, "ok", "1 worker, 1 core"),
        (1, 8, "ok", '1 worker, 8 cores; server.workers = "auto" uses all of them'),
        (8, 8, "ok", "8 workers, 8 cores"),
        (9, 8, "warning", '9 workers, 8 cores | set server.workers = "auto"'),
    ],
)
def test_workers_are_compared_with_the_cores(
    workers: int,
    cores: int,
    state: str,
    found: str,
    folder: Path,
    doctor: Doctor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ZCPROTO_SERVER__WORKERS", str(workers))
    monkeypatch.setattr(doctor_module, "usable_cores", lambda: cores)
    assert doctor().one("workers", state).startswith(found)


def test_workers_without_fork_are_a_fault(
    folder: Path, doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZCPROTO_SERVER__WORKERS", "2")
    monkeypatch.delattr(os, "fork")
    assert "this needs Linux or macOS | set it to 1" in doctor().one("workers", "fault")


def test_findings_are_printed_as_a_table(folder: Path, capsys: Capture) -> None:
    os.chmod(folder / "users.toml", 0o644)
    assert main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert f"ok        home          {folder}" in lines
    at = next(n for n, line in enumerate(lines) if line.startswith("fault     permissions   "))
    assert lines[at].endswith("users.toml: others can read or change it")
    assert lines[at + 1] == f"{'':24}run: chmod go-rwx {folder / 'users.toml'}"


def test_home_writable_by_others_is_a_fault(folder: Path, doctor: Doctor) -> None:
    folder.chmod(0o770)
    assert "others can change this folder (mode 0770) | run: chmod go-w" in doctor().one("home", "fault")


def test_home_that_is_a_file_is_a_fault(home: Path, doctor: Doctor) -> None:
    home.write_text("")
    assert "is not a folder | move it away" in doctor().one("home", "fault")


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
    folder: Path, doctor: Doctor, name: str, mode: int, sentence: str, cure: str
) -> None:
    (folder / name).chmod(mode)
    detail = doctor().one("permissions", "fault")
    assert f"{name}: {sentence}" in detail
    assert cure in detail


@pytest.mark.parametrize(("place", "mode"), [("config.toml", 0o666), ("", 0o777)])
def test_configuration_that_others_can_change_is_a_fault(
    folder: Path, doctor: Doctor, tmp_path: Path, place: str, mode: int
) -> None:
    elsewhere = tmp_path / "etc"
    elsewhere.mkdir()
    (elsewhere / "config.toml").write_bytes((folder / "config.toml").read_bytes())
    arguments = ["--config", str(elsewhere / "config.toml")]
    assert doctor(*arguments).state("config") == "ok"
    (elsewhere / place).chmod(mode)
    detail = doctor(*arguments).one("config", "fault")
    assert (
        f"others can change this {'file' if place else 'folder'} (mode 0{mode:o}) | run: chmod go-w" in detail
    )


def test_alert_command_that_others_can_change_is_a_fault(
    folder: Path, doctor: Doctor, tmp_path: Path
) -> None:
    program = tmp_path / "page"
    program.touch(0o755)
    with (folder / "config.toml").open("a") as config:
        config.write(f"[alerts]\ncommand = ['{program}']\n")
    assert doctor().of("alerts") == []
    program.chmod(0o777)
    detail = doctor().one("alerts", "fault")
    assert "others can change this file (mode 0777) | run: chmod go-w" in detail


@pytest.mark.parametrize("name", ["config.toml", "certs/ca.crt"])
def test_public_files_may_be_readable(folder: Path, doctor: Doctor, name: str) -> None:
    (folder / name).chmod(0o644)
    assert doctor().state("permissions") == "ok"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_files_of_another_user_are_faults(folder: Path, doctor: Doctor) -> None:
    os.chown(folder / "users.toml", 4711, 4711)
    assert "belongs to uid 4711 | run: chown 0" in doctor().one("permissions", "fault")
    # Everything belongs to the user of the server, and root runs the doctor.
    for path in (folder, *folder.rglob("*")):
        os.chown(path, 4711, 4711)
    assert "belongs to another user (uid 4711) | run as that user: sudo -u '#4711'" in doctor().one(
        "home", "fault"
    )


def test_number_of_checked_files_is_bounded(
    folder: Path, doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_module, "MAX_FILES", 3)
    assert "more than 3 files" in doctor().one("permissions", "warning")


@pytest.mark.parametrize(
    ("text", "environ", "found", "cure"),
    [
        ("[server\n", {}, "is not TOML: Expected", "correct this line, or the one before"),
        (
            b"[server]\n# \xff",
            {},
            "is not UTF-8 text (line 2)",
            "correct this line, or save the file as UTF-8",
        ),
        (
            "[server]\nprot = 1",
            {},
            "server.prot = 1 (config.toml): unknown key; did you mean server.port?",
            "{}",
        ),
        ("[sever]\nport = 1", {}, "[sever] (config.toml): unknown section; did you mean [server]?", "{}"),
        ("[server]\nport = 'x'", {}, 'server.port = "x" (config.toml): must be a whole number', "{}"),
        (
            "[tls]\nclient_crl_file = '/a'",
            {},
            'tls.client_crl_file = "/a" (config.toml): must be empty with tls.client_auth, which is "off"'
            ' (default); set client_auth = "optional" or "required"',
            "{}",
        ),
        (
            "",
            {"ZCPROTO_SERVER__PORT": "x"},
            'server.port = "x" (ZCPROTO_SERVER__PORT)',
            "the variable ZCPROTO_SERVER__PORT",
        ),
        (
            "[certificates]\nmode = 'acme'\nnames = ['a.example']",
            {"ZCPROTO_ACME__TERMS_AGREED": "false"},
            "acme.terms_agreed = false (ZCPROTO_ACME__TERMS_AGREED): must be true with certificates.mode",
            "the variable ZCPROTO_ACME__TERMS_AGREED or {}",
        ),
    ],
)
def test_invalid_configuration_is_a_fault_with_the_place_to_correct(
    folder: Path,
    doctor: Doctor,
    monkeypatch: pytest.MonkeyPatch,
    text: str | bytes,
    environ: dict[str, str],
    found: str,
    cure: str,
) -> None:
    file = folder / "config.toml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    report = doctor()
    assert report.faults == ["config"]
    assert report.state("server") == "skipped"
    wanted = (
        cure
        if cure.startswith("correct")
        else f"correct it in {cure.format(file)}, then run: zcproto config check"
    )
    shown, _, fix = report.one("config", "fault").partition(" | ")
    assert shown.removeprefix(f"{file}: ").startswith(found)
    assert fix == wanted


def test_missing_configuration_is_named(folder: Path, doctor: Doctor) -> None:
    (folder / "config.toml").unlink()
    assert f"{folder}/config.toml does not exist, so all keys have their defaults" in doctor().one(
        "config", "ok"
    )
    detail = doctor("--config", str(folder / "zc.toml")).one("config", "fault")
    create = f"correct the path, or create it: zcproto --config {folder}/zc.toml config init"
    assert detail == f"{folder}/zc.toml: no such file | {create}"


def test_sslkeylogfile_is_a_warning(folder: Path, doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSLKEYLOGFILE", "/tmp/keys")
    assert any("SSLKEYLOGFILE is set" in each["found"] for each in doctor().of("process"))


@pytest.mark.parametrize(("uid", "state"), [(0, "warning"), (1000, "ok")])
def test_running_as_root_is_a_warning(
    home: Path, doctor: Doctor, monkeypatch: pytest.MonkeyPatch, uid: int, state: str
) -> None:
    monkeypatch.delenv("SSLKEYLOGFILE", raising=False)
    monkeypatch.setattr(doctor_module.os, "geteuid", lambda: uid)
    assert doctor().state("process") == state


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
    folder: Path,
    doctor: Doctor,
    monkeypatch: pytest.MonkeyPatch,
    free_bytes: int,
    free_files: int,
    state: str,
) -> None:
    real = os.statvfs

    def statvfs(path: Path) -> os.statvfs_result:
        values = list(real(path))
        values[1], values[4], values[7] = 1, free_bytes, free_files  # f_frsize, f_bavail, f_favail
        return os.statvfs_result(values)

    monkeypatch.setattr(doctor_module.os, "statvfs", statvfs)
    assert doctor().state("disk") == state


def test_full_disk_does_not_count_as_damage_of_the_sessions(
    folder: Path, doctor: Doctor, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorcode = sqlite3.SQLITE_IOERR_SHMSIZE
        raise error

    monkeypatch.setattr("zcproto.cli.store.sqlite3.connect", fail)
    cure = "make room on its disk, and check the owner and mode of its folder"
    assert doctor().one("store", "fault") == f"{folder}/sessions.db: cannot be read: disk I/O error | {cure}"
    assert main(["store", "check"]) == 1
    assert (
        capsys.readouterr().err == f"zcproto: {folder}/sessions.db: cannot be read: disk I/O error; {cure}\n"
    )


def test_damaged_certificate_that_was_set_aside_may_be_readable(folder: Path, doctor: Doctor) -> None:
    (folder / "certs" / "server-ecdsa.crt.aside").touch(0o644)
    assert doctor().state("permissions") == "ok"
    (folder / "certs" / "server-ecdsa.key.aside").touch(0o644)
    assert "server-ecdsa.key.aside: others can read or change it" in doctor().one("permissions", "fault")


def test_fault_without_a_cure_of_its_own_is_to_be_corrected(folder: Path, doctor: Doctor) -> None:
    (folder / "users.toml").write_text("[users.ada]\nkey_sha256 = 'short'\n")
    cure = "correct it, then run: zcproto config check"
    assert (
        doctor()
        .one("users", "fault")
        .endswith(f'user "ada": key_sha256 must be 43 characters of base64url, a SHA-256 | {cure}')
    )


# certificates
def test_unreadable_certificate_is_a_fault(folder: Path, doctor: Doctor) -> None:
    (folder / "certs" / "server-ecdsa.crt").write_text("not a certificate")
    assert doctor().faults == ["certificate"]


def test_constrained_ca_is_a_warning(folder: Path, doctor: Doctor) -> None:
    constrain(folder / "certs", "localhost")
    found = doctor().one("certificate", "warning")
    assert "ca.crt: has name constraints, which clients with BoringSSL (gRPC, Android), Mbed TLS" in found
    assert "| if you have such clients, move it away (keep ca.key) and run zcproto cert renew" in found


def test_key_of_another_certificate_is_a_fault(folder: Path, doctor: Doctor) -> None:
    key = trustme.CA().issue_cert("localhost", key_type=trustme.KeyType.ECDSA).private_key_pem
    (folder / "certs" / "server-ecdsa.key").write_bytes(key.bytes())
    assert "server-ecdsa.key" in doctor().one("certificate", "fault")


def foreign(folder: Path, not_after: datetime, not_before: datetime | None = None) -> None:
    """Issue external certificates with this expiry."""
    issued = trustme.CA().issue_cert("server.example", not_after=not_after, not_before=not_before)
    certificate, key = folder / "foreign.pem", folder / "foreign.key"
    issued.cert_chain_pems[0].write_to_path(certificate)
    issued.private_key_pem.write_to_path(key)
    key.chmod(0o600)
    (folder / "config.toml").write_text(
        f"[server]\nport = {free_port()}\n[certificates]\nmode = 'files'\n"
        f"certificate = ['{certificate}']\nkey = ['{key}']\n"
    )


def test_expired_certificate_file_is_a_fault(folder: Path, doctor: Doctor) -> None:
    foreign(folder, NOW - timedelta(days=1), NOW - timedelta(days=90))
    assert "expired on" in doctor().one("certificate", "fault")


def test_certificate_file_near_expiry_is_a_warning(folder: Path, doctor: Doctor) -> None:
    foreign(folder, NOW + timedelta(days=3, hours=1), NOW - timedelta(days=87))
    detail = doctor().one("certificate", "warning")
    assert "3 days left; server.example" in detail
    assert "replace external ones" in detail


# the store
def test_damaged_store_is_a_fault(folder: Path, doctor: Doctor) -> None:
    data = bytearray((folder / "sessions.db").read_bytes())
    data[:100] = bytes(100)
    (folder / "sessions.db").write_bytes(data)
    report = doctor()
    assert report.faults == ["store"]
    assert ": damaged" in report.one("store", "fault")
    assert "docs/backup.md" in report.one("store", "fault")


def test_memory_store_is_a_warning(folder: Path, doctor: Doctor) -> None:
    with (folder / "config.toml").open("a") as config:
        config.write("[store]\nurl = 'memory'\n")
    assert "sessions end with the server" in doctor().one("store", "warning")


def test_unreachable_store_is_a_fault(folder: Path, doctor: Doctor) -> None:
    pytest.importorskip("redis")
    with (folder / "config.toml").open("a") as config:
        config.write(f"[store]\nurl = 'valkey://127.0.0.1:{free_port()}'\n")
    (key,) = load_keys(folder / "store.key", system_entropy)
    report = doctor()
    assert report.faults == ["store"]
    assert f"store.key {fingerprint(key)}: " in report.one("store", "ok")
    (folder / "store.key").write_text("not a key")
    assert doctor().faults == ["store", "store"]


@pytest.mark.parametrize(
    ("permitted", "state", "found"),
    [
        (["allchannels"], "ok", "it carries topics and calls to the other servers"),
        (["resetchannels"], "fault", "does not permit this user a command that zcproto needs"),
        (["allchannels", "-publish"], "fault", "an event cannot be published"),
    ],
    ids=["all", "no channels", "no command"],
)
def test_user_of_the_store_without_channels_is_a_fault(
    folder: Path, doctor: Doctor, tmp_path: Path, permitted: list[str], state: str, found: str
) -> None:
    pytest.importorskip("redis")
    with running(PROGRAMS[0], tmp_path / "valkey") as server:
        server.command("ACL", "SETUSER", "zc", "on", ">secret", "~*", "+@all", *permitted)
        with (folder / "config.toml").open("a") as config:
            config.write(f"[store]\nurl = 'valkey://zc@{server.address}'\n")
            config.write(f"password_file = '{folder / 'store.password'}'\n")
        (folder / "store.password").write_text("secret")
        (folder / "store.password").chmod(0o600)
        load_keys(folder / "store.key", system_entropy)
        report = doctor()
    assert any(found in each["found"] and each["state"] == state for each in report.of("store")), report


def test_store_lock_that_may_not_be_opened_is_a_fault(folder: Path, doctor: Doctor) -> None:
    (folder / "sessions.db.lock").chmod(0)
    with obeying_file_modes():
        assert doctor().state("store") == "fault"


# the port
def test_port_0_skips_the_port_check(folder: Path, doctor: Doctor) -> None:
    (folder / "config.toml").write_text("[server]\nport = 0\n")
    assert doctor().state("port") == "skipped"


@pytest.mark.parametrize(
    ("host", "reached"),
    [("::", "[::1]:7443"), ("0.0.0.0", "127.0.0.1:7443"), ("a.example", "a.example:7443")],
)
def test_wildcard_host_is_checked_on_loopback(home: Path, host: str, reached: str) -> None:
    home.mkdir()
    (home / "config.toml").write_text(f"[server]\nhost = '{host}'\n")
    assert doctor_module.own_address(load_config(None, home=home, environ={})) == reached


def test_file_replaced_during_the_check_is_ignored(
    folder: Path, doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = doctor_module._files
    monkeypatch.setattr(doctor_module, "_files", lambda home: [*real(home), home / "gone"])
    assert doctor().state("permissions") == "ok"
