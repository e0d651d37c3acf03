"""The checks of this machine. Nothing is created, changed or repaired.

Rules: a condition under which a server refuses to start is a fault, with the server's message; one that will cause
trouble later is a warning.
"""

from __future__ import annotations

import os
import resource
import shlex
import stat
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from zcproto.cli import cert_report, read_config
from zcproto.cli.doctor.finding import FAULT, OK, SKIPPED, WARNING, Finding, from_message
from zcproto.cli.output import utc
from zcproto.cli.session_store import CONFIGURED, examine_store, is_in_use, with_store
from zcproto.cli.store import damage_of
from zcproto.common.home import Home
from zcproto.common.text import escape_text
from zcproto.errors import ConfigError, ZcprotoError
from zcproto.runtime.process import KEY_LOG, SPARE_FILES
from zcproto.runtime.store_setup import MEMORY, SQLITE
from zcproto.server.listener import bind

if TYPE_CHECKING:
    from zcproto.config import Config

LITTLE_SPACE: Final = 256 * 1024 * 1024
"""Bytes: store and log of a busy day."""

NO_SPACE: Final = 16 * 1024 * 1024
"""Bytes below which a checkpoint of SQLite may fail."""

FEW_FILES: Final = 1_000
MAX_FILES: Final = 1_000
"""Files of the home folder that are checked."""

IN_USE: Final = "in use"

_OTHERS: Final = 0o077
_OTHERS_WRITE: Final = 0o022
_PUBLIC: Final = frozenset({".crt", ".pem", ".crl", ".toml~", ".log"})
_MIB: Final = 1024 * 1024


def folder(home: Home) -> list[Finding]:
    """Check the home folder and the permissions of its files."""
    if not home.path.exists():
        return [Finding("home", OK, f"{home.path}: does not exist yet; a server creates it")]
    try:
        home.check()
    except ConfigError as error:
        return [from_message("home", fault) for fault in error.faults]
    findings = [Finding("home", OK, str(home.path))]
    wrong = list(_permissions(home))
    return findings + (wrong or [Finding("permissions", OK, "keys and databases are private")])


def _permissions(home: Home) -> Iterator[Finding]:
    owner = home.path.stat().st_uid
    if os.geteuid() == 0 and owner != 0:
        yield Finding(
            "permissions",
            WARNING,
            f"the home folder belongs to uid {owner}, and this is root",
            f"run commands as the server's user, who cannot read files of root: sudo -u '#{owner}' ...",
        )
    for number, path in enumerate(_files(home.path)):
        if number == MAX_FILES:
            yield Finding(
                "permissions",
                WARNING,
                f"more than {MAX_FILES} files in the home folder",
                "remove those that are not needed",
            )
            return
        try:
            status = path.lstat()
        except FileNotFoundError:  # a running server replaces its files
            continue
        quoted = shlex.quote(str(path))
        if stat.S_ISLNK(status.st_mode) or stat.S_ISSOCK(status.st_mode):
            continue
        if status.st_uid not in (0, owner):
            yield Finding(
                "permissions",
                FAULT,
                f"{path}: belongs to uid {status.st_uid}",
                f"run: chown {owner} {quoted}",
            )
        elif status.st_mode & (_OTHERS_WRITE if _is_public(path) else _OTHERS):
            what = "change" if _is_public(path) else "read or change"
            mode = "go-w" if _is_public(path) else "go-rwx"
            yield Finding(
                "permissions", FAULT, f"{path}: others can {what} it", f"run: chmod {mode} {quoted}"
            )


def _files(home: Path) -> Iterator[Path]:
    for place in (home, home / "certs"):
        if place.is_dir():
            yield from (path for path in sorted(place.iterdir()) if not path.is_dir())


def _is_public(path: Path) -> bool:
    return path.suffix in _PUBLIC or path.name == "config.toml"


def configuration(home: Home, config_file: Path | None) -> list[Finding]:
    """Check the configuration."""
    try:
        read_config(home, config_file)
    except ConfigError as error:
        return [
            Finding("config", FAULT, fault, "zcproto config init writes a file with every key")
            for fault in error.faults
        ]
    where = home.config if config_file is None else config_file
    return [Finding("config", OK, str(where) if where.exists() else "no file: all keys have their defaults")]


def read(home: Home, config_file: Path | None) -> Config | None:
    """Return the configuration, or None if it has faults, which `configuration` reports."""
    try:
        config = read_config(home, config_file)
    except ConfigError:
        return None
    if "directory" in config.certificates.model_fields_set:
        return config
    certificates = config.certificates.model_copy(update={"directory": home.certs})
    return config.model_copy(update={"certificates": certificates})


def server(config: Config, home: Home) -> list[Finding]:
    """Check everything else that a server on this machine needs."""
    return [
        *_process(),
        *_disk(config, home),
        *_file_limit(config),
        *_certificates(config),
        *_store(config, home),
        *_port(config),
    ]


def _process() -> Iterator[Finding]:
    if os.environ.get(KEY_LOG):
        yield Finding(
            "process",
            WARNING,
            f"{KEY_LOG} is set",
            f"unset {KEY_LOG}: clients write their TLS secrets to this file",
        )
    if os.geteuid() == 0:
        yield Finding(
            "process",
            WARNING,
            "this is root",
            "run the server as a separate user: zcproto deploy systemd",
        )
    else:
        yield Finding("process", OK, f"uid {os.geteuid()}")


def _disk(config: Config, home: Home) -> Iterator[Finding]:
    places = [home.path, config.certificates.directory]
    if config.log.file is not None:
        places.append(config.log.file.parent)
    seen: set[int] = set()
    for place in places:
        there = next((each for each in (place, *place.parents) if each.exists()), Path("/"))
        device = there.stat().st_dev
        if device in seen:
            continue
        seen.add(device)
        disk = os.statvfs(there)
        free = disk.f_bavail * disk.f_frsize
        found = f"{free // _MIB} MiB free at {there}"
        if free < NO_SPACE:
            yield Finding(
                "disk",
                FAULT,
                found,
                "free some space: sessions cannot be written, and no session can be opened",
            )
        elif free < LITTLE_SPACE:
            yield Finding(
                "disk", WARNING, found, f"free some space; {LITTLE_SPACE // _MIB} MiB last for a busy day"
            )
        elif disk.f_files and disk.f_favail < FEW_FILES:
            yield Finding("disk", WARNING, f"{disk.f_favail} free inodes at {there}", "remove some files")
        else:
            yield Finding("disk", OK, found)


def _file_limit(config: Config) -> Iterator[Finding]:
    wanted = config.limits.max_connections + SPARE_FILES
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        cure = f"raise it (ulimit -Hn, LimitNOFILE=), or set limits.max_connections = {max(1, hard - SPARE_FILES)}"
        yield Finding("file limit", WARNING, f"{hard} open files are allowed, {wanted} are needed", cure)
    else:
        yield Finding("file limit", OK, f"{wanted} open files are allowed")


def _certificates(config: Config) -> Iterator[Finding]:
    now = utc()
    try:
        found = cert_report.report(config, now, os.environ)
    except ZcprotoError as error:
        yield from_message("certificate", str(error))
        return
    for problem in found.problems:
        yield from_message("certificate", problem)
    for row in found.rows:
        if row.status == cert_report.NOT_MADE:
            yield Finding(
                "certificate", OK, f"{row.certificate.name}: does not exist yet; a server creates it"
            )
        elif row.status in cert_report.BAD:
            ended = (
                f"{row.certificate}: expired on {row.leaf.not_valid_after_utc:%Y-%m-%d}" if row.leaf else ""
            )
            finding = from_message("certificate", row.problem or ended)
            cure = finding.cure or "start the server, which renews managed ones; replace external ones"
            yield Finding("certificate", FAULT, finding.found, cure)
        elif row.leaf is not None:
            yield _good(row, now)


def _good(row: cert_report.Row, now: datetime) -> Finding:
    assert row.leaf is not None
    names = cert_report.shown_names(cert_report.names_of(row.leaf)) if row.use == "server" else row.use
    found = f"{row.certificate.name}: {cert_report.days_left(row.leaf, now)} days left; {names}"
    if row.status == cert_report.DUE:
        cure = "a running server renews managed ones, see its log if this stays; replace external ones"
        return Finding("certificate", WARNING, found, cure)
    return Finding("certificate", OK, found)


def _store(config: Config, home: Home) -> Iterator[Finding]:
    url = config.store.url
    if url == MEMORY:
        yield Finding(
            "store", WARNING, "sessions end with the server", 'set store.url = "sqlite" to keep them'
        )
        return
    if url == SQLITE:
        path = home.sessions
        if not path.exists():
            yield Finding("store", OK, f"{path.name}: does not exist yet; a server creates it")
            return
        try:
            used = is_in_use(path)
        except OSError as error:
            yield Finding(
                "store", FAULT, f"{path}.lock: {error.strerror}", "give the file to the user of the server"
            )
            return
        if used:
            yield Finding("store", OK, f"{path.name}: a server runs with these sessions")
            return
        faults = damage_of(path)
        if faults:
            cure = "restore it (docs/backup.md); otherwise a server sets it aside and starts without sessions"
            yield Finding("store", FAULT, f"{path}: damaged: {escape_text('; '.join(faults), 300)}", cure)
            return
    try:
        count, notes = examine_store(with_store(config, CONFIGURED), home)
    except ZcprotoError as error:
        yield from_message("store", escape_text(str(error), 500))
        return
    yield Finding("store", OK, f"it answers; sessions: {count}")
    yield from (Finding("store", WARNING, escape_text(note, 500)) for note in notes)


def _port(config: Config) -> Iterator[Finding]:
    where = ", ".join(config.server.host)
    if config.server.port == 0:
        yield Finding("port", SKIPPED, "server.port = 0 is a different port at each start")
        return
    try:
        sockets = bind(config.server.host, config.server.port)
    except ConfigError as error:
        if "Address already in use" in str(error):
            yield Finding("port", OK, f"{where} port {config.server.port}: {IN_USE}")
        else:
            cure = "change server.port or server.host; for a port below 1024 let systemd bind it (zcproto.socket)"
            yield from (Finding("port", FAULT, fault, cure) for fault in error.faults)
        return
    for each in sockets:
        each.close()
    yield Finding("port", OK, f"{where} port {config.server.port}: free; no server runs")


def is_served(findings: list[Finding]) -> bool:
    """Whether the configured port is in use."""
    return any(each.check == "port" and each.found.endswith(IN_USE) for each in findings)


def own_address(config: Config) -> str:
    """Return the address of the server for a client on this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.server.host[0], config.server.host[0])  # noqa: S104
    return f"[{host}]:{config.server.port}" if ":" in host else f"{host}:{config.server.port}"
