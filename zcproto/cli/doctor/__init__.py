"""`zcproto doctor`: diagnose the server of this machine, or the connection to one.

Rules: nothing is created, changed or repaired. A condition under which a server refuses to start is a fault, with
the server's message; one that will cause trouble later is a warning.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import resource
import shlex
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Final

import click
from cryptography import x509

from zcproto import accelerator
from zcproto.alerts.service import webhook_of
from zcproto.alerts.sinks import Undelivered
from zcproto.auth.jwt import LEEWAY_S, fits
from zcproto.auth.oidc import KeysFailed
from zcproto.bus.sealing import fingerprint, load_keys
from zcproto.certs.examine import FileState, SurveyedCertificate, survey
from zcproto.cli import EXIT_FAILED, Instance, cert_report, number_option
from zcproto.cli.config import StartCheck, app_option, check_start, no_file
from zcproto.cli.connect import TrustChoice, is_typed, key_option, trust_options, user_option
from zcproto.cli.doctor import remote
from zcproto.cli.doctor.remote import FAULT, OK, SKIPPED, WARNING, Finding, Result, from_message
from zcproto.cli.output import print_report, report_options, utc
from zcproto.cli.store import CONFIGURED, damage_of, examine_carrier, examine_store, is_in_use, with_store
from zcproto.common.clock import MS_PER_SECOND, system_clock, system_entropy
from zcproto.common.files import user_name
from zcproto.common.home import Home
from zcproto.common.text import counted, escape_text
from zcproto.config import Config, OidcConfig
from zcproto.config.load import PREFIX
from zcproto.errors import ConfigError, ZcprotoError
from zcproto.runtime.build import check_telemetry, provider_of
from zcproto.runtime.preflight import certificate_faults
from zcproto.runtime.process_setup import KEY_LOG, SPARE_FILES, usable_cores, worker_count
from zcproto.runtime.store_setup import MEMORY, SQLITE
from zcproto.server.listener import bind

LITTLE_SPACE: Final = 256 * 1024 * 1024
"""Bytes: store and log of a busy day."""

NO_SPACE: Final = 16 * 1024 * 1024
"""Bytes below which a checkpoint of SQLite may fail."""

FEW_FILES: Final = 1_000
MAX_FILES: Final = 1_000
"""Files of the home folder that are checked."""

IN_USE: Final = "in use"

CORRECT: Final = "correct it, then run: zcproto config check"
"""The cure of a fault whose message says what would be right."""

REISSUED: Final = "the server issues another at its start, or within a minute if it runs"
RESTORE: Final = f"{REISSUED}; to keep the pin, restore the files from a backup first"
OLD_CERTIFICATE: Final = (
    "the server does not serve the files on the disk; if they are older than a minute, zcproto alert list has the"
    " reason"
)

_OF_PRIVATE: Final = (0o077, "read or change", "go-rwx")
_OF_PUBLIC: Final = (0o022, "change", "go-w")
"""The forbidden permissions of a file, what they allow, and the mode that removes them."""

_PUBLIC: Final = frozenset({".crt", ".pem", ".crl", ".toml~", ".log"})
"""Endings of names, also before the ".aside" of a damaged file."""

_MIB: Final = 1024 * 1024

MAX_TIMEOUT: Final = 60
MAX_SHOWN: Final = 1_000


@click.command()
@click.argument("address", metavar="[HOST:PORT]", required=False)
@user_option("Also open a session of this user, use it and close it.")
@key_option("user")
@trust_options
@app_option
@number_option(
    "--timeout",
    click.FloatRange(0, MAX_TIMEOUT, min_open=True),
    10.0,
    "SECONDS",
    "The timeout of each step over the network.",
)
@report_options
def doctor(
    instance: Instance,
    address: str | None,
    user: str | None,
    key_file: Path | None,
    trust: TrustChoice,
    app: str | None,
    timeout: float,
    as_json: bool,
) -> int:
    """Diagnose the server of this machine, or the connection to the one at HOST:PORT, and print how to fix it.

    Without HOST:PORT it checks the home folder, permissions, configuration, certificates, store, disk, limits,
    identity providers, and the server itself if it runs. Nothing is changed. Run it as the server's user.

    \b
    Exit codes: 0  no faults; warnings are possible
                1  there are faults
                2  wrong usage
    """
    if user is None and is_typed("key_file"):
        raise click.UsageError("--key-file goes with --user.")
    login = None if user is None else (user, key_file)
    findings = folder(instance.home)
    config = configuration(instance, findings)
    if address is None and config is None:
        findings.append(Finding("server", SKIPPED, "further checks need a valid configuration"))
    elif address is None and config is not None:
        findings += server(config, instance.home)
        checked = check_start(config, instance.home, app, timeout)
        findings += starting(checked, config, findings)
        if any(
            each.check == "port" and each.state == OK and each.found.endswith(IN_USE) for each in findings
        ):
            findings += own_server(config, trust, instance.home, login, timeout, findings)
    if address is not None:
        findings += remote.check(address, trust, instance.home, login, timeout)
    print_report(
        as_json, [{**each._asdict(), "cure": each.cure or None} for each in findings], as_text(findings)
    )
    return EXIT_FAILED if any(each.state == FAULT for each in findings) else 0


def as_text(findings: Iterable[Finding]) -> str:
    """Return lines with state, check and result, and the fix below."""
    lines = []
    for each in findings:
        colour = {OK: "green", WARNING: "yellow", FAULT: "red"}.get(each.state)
        state = click.style(f"{each.state:<8}", fg=colour)
        lines.append(f"{state}  {each.check:<12}  {escape_text(each.found, MAX_SHOWN)}")
        if each.cure:
            lines.append(f"{'':<24}{escape_text(each.cure, MAX_SHOWN)}")
    return "\n".join(lines)


# --- this machine ----------------------------------------------------------------------------------------


def folder(home: Home) -> list[Finding]:
    """Check the home folder and the permissions of its files."""
    if not home.path.exists():
        cure = "a server creates it; if one has run here, name its folder with --home or ZCPROTO_HOME"
        return [Finding("home", WARNING, f"{home.path}: does not exist", cure)]
    try:
        home.check()
    except ConfigError as error:
        return [Finding("home", *from_message(fault)) for fault in error.faults]
    wrong = list(_permissions(home)) or [(OK, "keys and databases are private")]
    return [Finding("home", OK, str(home.path)), *(Finding("permissions", *each) for each in wrong)]


def _permissions(home: Home) -> Iterator[Result]:
    owner = home.path.stat().st_uid
    if os.geteuid() == 0 and owner != 0:
        cure = (
            "run commands as the server's user, who cannot read files of root: sudo -u"
            f" {user_name(owner)} zcproto --home {shlex.quote(str(home.path))} ..."
        )
        yield WARNING, f"the home folder belongs to uid {owner}, and this is root", cure
    for number, path in enumerate(_files(home.path)):
        if number == MAX_FILES:
            found = f"more than {MAX_FILES} files in the home folder"
            yield WARNING, found, "remove those that are not needed"
            return
        try:
            status = path.lstat()
        except FileNotFoundError:  # a running server replaces its files
            continue
        quoted = shlex.quote(str(path))
        if stat.S_ISLNK(status.st_mode) or stat.S_ISSOCK(status.st_mode):
            continue
        is_public = Path(path.name.removesuffix(".aside")).suffix in _PUBLIC or path.name == "config.toml"
        forbidden, what, mode = _OF_PUBLIC if is_public else _OF_PRIVATE
        if status.st_uid not in (0, owner):
            yield FAULT, f"{path}: belongs to uid {status.st_uid}", f"run: chown {owner} {quoted}"
        elif status.st_mode & forbidden:
            yield FAULT, f"{path}: others can {what} it", f"run: chmod {mode} {quoted}"


def _files(home: Path) -> Iterator[Path]:
    for place in (home, home / "certs", home / "certs" / "acme"):
        if place.is_dir():
            yield from (path for path in sorted(place.iterdir()) if not path.is_dir())


def configuration(instance: Instance, findings: list[Finding]) -> Config | None:
    """Check the configuration. Return it, or None if it has faults."""
    where = instance.config_file or instance.home.config
    try:
        config = instance.read_config()
    except ConfigError as error:
        findings += [Finding("config", *_config_fault(fault, where)) for fault in error.faults]
        return None
    findings.append(Finding("config", OK, str(where) if where.exists() else no_file(where)))
    return config


def _config_fault(fault: str, file: Path) -> Result:
    """Return a fault, with the place at which to correct it."""
    name = re.escape(escape_text(file.name))
    sources = dict.fromkeys(re.findall(rf"\(({name}|{PREFIX}[^()]+)\)", fault))
    if not sources:  # it is about the file, and has its own cure
        return from_message(fault)
    places = [f"the variable {each}" if each.startswith(PREFIX) else str(file) for each in sources]
    return FAULT, fault, f"correct it in {' or '.join(places)}, then run: zcproto config check"


def server(config: Config, home: Home) -> list[Finding]:
    """Check everything else that a server on this machine needs."""
    return [Finding(name, *result) for name, check in _CHECKS.items() for result in check(config, home)]


def _process(config: Config, home: Home) -> Iterator[Result]:
    if os.environ.get(KEY_LOG):
        yield WARNING, f"{KEY_LOG} is set", f"unset {KEY_LOG}: clients write their TLS secrets to this file"
    if os.geteuid() == 0:
        yield WARNING, "this is root", "run the server as a separate user: zcproto deploy systemd"
    else:
        yield OK, f"uid {os.geteuid()}"


def _accelerator(config: Config, home: Home) -> Iterator[Result]:
    is_missing = accelerator.compiled is None and not accelerator.is_off
    hint = "; it is built if the installation finds a C compiler and Python's headers" if is_missing else ""
    yield OK, accelerator.describe() + hint


def _workers(config: Config, home: Home) -> Iterator[Result]:
    workers, cores = worker_count(config), usable_cores()
    found = f"{counted(workers, 'worker')}, {counted(cores, 'core')}"
    if workers > 1 and not hasattr(os, "fork"):
        yield FAULT, f"server.workers = {workers}: this needs Linux or macOS", "set it to 1"
    elif workers > cores:
        yield (
            WARNING,
            found,
            'set server.workers = "auto": more workers than cores cost memory and gain nothing',
        )
    elif workers == 1 and cores > 1:
        yield OK, f'{found}; server.workers = "auto" uses all of them'
    else:
        yield OK, found


def _disk(config: Config, home: Home) -> Iterator[Result]:
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
            yield FAULT, found, "free some space: sessions cannot be written, and no session can be opened"
        elif free < LITTLE_SPACE:
            yield WARNING, found, f"free some space; {LITTLE_SPACE // _MIB} MiB last for a busy day"
        elif disk.f_files and disk.f_favail < FEW_FILES:
            yield WARNING, f"{disk.f_favail} free inodes at {there}", "remove some files"
        else:
            yield OK, found


def _certificates(config: Config, home: Home) -> Iterator[Result]:
    now = utc()
    try:
        found = survey(config, now, os.environ)
    except ZcprotoError as error:
        yield from_message(str(error))
        return
    refused = [from_message(fault) for fault in certificate_faults(config)]
    yield from ((state, problem, cure or CORRECT) for state, problem, cure in refused)
    folder = str(config.certificates.directory)
    yield from (from_message(each) for each in found.problems if not (refused and each.startswith(folder)))
    for row in found.certificates:
        if row.state is FileState.NOT_MADE:
            yield OK, f"{row.certificate.name}: does not exist yet; a server creates it"
        elif row.state.is_bad:
            ended = (
                f"{row.certificate}: expired on {row.leaf.not_valid_after_utc:%Y-%m-%d}" if row.leaf else ""
            )
            state, problem, cure = from_message(row.problem or ended)
            is_consequence = refused and (row.is_managed or row.use != "server")
            if is_consequence or problem in (each[1] for each in refused):
                continue
            if row.is_managed or (row.use == "ca" and row.leaf is None):
                cure = RESTORE  # other cures are for files of other programs
                if row.leaf is not None and not _is_of_now(row.leaf, now):
                    cure = f"check the clock of this machine (date -u); if it is right, {REISSUED}"
            yield state, problem, cure or "replace the file"
        elif row.leaf is not None:
            yield _good(row, now)
            if row.note:
                problem, _, cure = row.note.partition("; ")
                yield WARNING, problem, cure


def _is_of_now(certificate: x509.Certificate, now: datetime) -> bool:
    return certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc


def _good(row: SurveyedCertificate, now: datetime) -> Result:
    assert row.leaf is not None
    names = cert_report.shown_names(cert_report.names_of(row.leaf)) if row.use == "server" else row.use
    left = counted(cert_report.days_left(row.leaf, now), "day")
    found = f"{row.certificate.name}: {left} left; {names}"
    if row.state is FileState.DUE:
        cure = "a running server renews managed ones, see its log if this stays; replace external ones"
        return WARNING, found, cure
    return OK, found


def _store(config: Config, home: Home) -> Iterator[Result]:
    url = config.store.url
    if url == MEMORY:
        yield WARNING, "sessions end with the server", 'set store.url = "sqlite" to keep them'
        return
    if url == SQLITE:
        path = home.sessions
        if not path.exists():
            yield OK, f"{path.name}: does not exist yet; a server creates it"
            return
        try:
            used = is_in_use(path)
        except OSError as error:
            yield FAULT, f"{path}.lock: {error.strerror}", "give the file to the user of the server"
            return
        if used:
            yield OK, f"{path.name}: a server runs with these sessions"
            return
        try:
            faults = damage_of(path)
        except ZcprotoError as error:
            yield from_message(str(error))
            return
        if faults:
            cure = "restore it (docs/backup.md); otherwise a server sets it aside and starts without sessions"
            yield FAULT, f"{path}: damaged: {escape_text('; '.join(faults), 300)}", cure
            return
    elif home.store_key.exists():
        try:
            key, *_ = load_keys(home.store_key, system_entropy)
        except ConfigError as error:
            yield from_message(escape_text(str(error), 500))
        else:
            yield OK, f"store.key {fingerprint(key)}: must be the same on all servers of this store"
    try:
        count, notes = examine_store(with_store(config, CONFIGURED), home)
    except ZcprotoError as error:
        yield from_message(escape_text(str(error), 500))
        return
    yield OK, f"it answers; sessions: {count}"
    yield from ((WARNING, escape_text(note, 500)) for note in notes)
    if url != SQLITE and home.store_key.exists():
        yield _carrier(config, home)


def _carrier(config: Config, home: Home) -> Result:
    try:
        examine_carrier(with_store(config, CONFIGURED), home)
    except ZcprotoError as error:
        found = f"topics and calls do not reach other servers: {escape_text(str(error), 500)}"
        return FAULT, found, "let the user of the store use its channels: in an ACL, &zcp:* and +@pubsub"
    return OK, "it carries topics and calls to the other servers"


def _webhook(config: Config, home: Home) -> Iterator[Result]:
    """Connect to the receiver of alerts, without a message."""
    if not config.alerts.webhook:
        return
    try:
        sink = webhook_of(config.alerts, system_clock)
        asyncio.run(sink.reach())
    except ConfigError:
        return  # a fault of the preflight
    except Undelivered as error:
        cure = "check the receiver and alerts.webhook; alerts wait for it, and zcproto alert test sends one"
        yield WARNING, str(error), cure
    else:
        yield OK, f"{sink.where}: reachable"


def _issuers(config: Config, home: Home) -> Iterator[Result]:
    """Fetch the keys of each provider."""
    if importlib.util.find_spec("jwt") is None:
        return  # a fault of the preflight
    for number, each in enumerate(config.auth.oidc):
        yield from _issuer(each, f"auth.oidc[{number}]")


def _issuer(config: OidcConfig, key: str) -> Iterator[Result]:
    try:
        provider = provider_of(config, key)
        keys = asyncio.run(provider.keys())
    except ConfigError as error:
        yield from map(from_message, error.faults)
        return
    except KeysFailed as error:
        cure = f"check the provider and {key}; logins go on for a day where its keys are known"
        yield FAULT, f"{config.issuer}: {error}", cure
        return
    usable = sum(any(fits(each, algorithm) for algorithm in config.algorithms) for each in keys)
    if not usable:
        found = f"{config.issuer}: none of its keys is for {', '.join(config.algorithms)}"
        yield FAULT, found, f"set {key}.algorithms to those of the provider's tokens"
        return
    yield OK, f"{config.issuer}: {counted(usable, 'usable key')}"
    ahead_s = _ahead_s(provider.date)
    if ahead_s is not None and abs(ahead_s) > LEEWAY_S:
        direction = "behind" if ahead_s > 0 else "ahead of"
        found = f"the clock of this machine is {abs(ahead_s):.0f} s {direction} that of {config.issuer}"
        yield WARNING, found, f"check NTP: tokens are refused beyond {LEEWAY_S:g} s"


def _ahead_s(date: str) -> float | None:
    """Return by how many seconds the clock of a server is ahead, by its header Date; None without a valid one."""
    try:
        return parsedate_to_datetime(date).timestamp() - system_clock.wall() / MS_PER_SECOND
    except (ValueError, OverflowError):
        return None


def _collector(config: Config, home: Home) -> Iterator[Result]:
    """Send an empty message of each signal."""
    telemetry = config.telemetry
    signals = [each for each in ("traces", "metrics", "logs") if getattr(telemetry, each)]
    if not signals:
        return
    try:
        check_telemetry(telemetry)
    except ConfigError:
        return  # a fault of the preflight
    from zcproto.telemetry.export import try_collector  # noqa: PLC0415 - of an extra

    try:
        for signal, reason in try_collector(telemetry, signals):
            if reason:
                cure = "check telemetry.endpoint and the collector; the server runs on without it"
                yield WARNING, f"{signal}: {reason}", cure
            else:
                yield OK, f"{signal}: the collector takes them"
    except ConfigError as error:
        for state, found, *cures in map(from_message, error.faults):
            yield state, found, cures[0] or "check the file that it names"


_CHECKS: Final[dict[str, Callable[[Config, Home], Iterator[Result]]]] = {
    "process": _process,
    "workers": _workers,
    "accelerator": _accelerator,
    "disk": _disk,
    "certificate": _certificates,
    "store": _store,
    "issuer": _issuers,
    "collector": _collector,
    "webhook": _webhook,
}


def starting(checked: StartCheck, config: Config, known: Sequence[Finding]) -> Iterator[Finding]:
    """Yield what would prevent the start of a server, except what is `known`, and what a running one has."""
    reported = {each.found for each in known}
    for fault in checked.faults:
        finding = Finding(fault.check, *from_message(fault.message))
        finding = finding._replace(cure=finding.cure or CORRECT)
        if finding.found not in reported:
            yield finding
    for note in checked.notes:
        yield Finding("server", WARNING, *from_message(note)[1:])
    yield Finding("file limit", *_file_limit(config, checked))
    if away := ({} if checked.status is None else checked.status.get("runs", {})).get("away"):
        cure = "see runs.away and runs.refused in its log"
        yield Finding("durable runs", WARNING, f"{counted(away, 'process')} cannot reach the store", cure)
    if any("server.port = " in fault.message for fault in checked.faults):
        return
    where = f"{', '.join(config.server.host)} port {config.server.port}"
    if config.server.port == 0:
        yield Finding("port", SKIPPED, "server.port = 0 is a different port at each start")
    elif checked.is_running or not _is_free(config):
        yield Finding("port", OK, f"{where}: {IN_USE}")
    else:
        yield Finding("port", OK, f"{where}: free; no server runs")


def _is_free(config: Config) -> bool:
    try:
        for each in bind(config.server.host, config.server.port, backlog=0):
            each.close()
    except ConfigError:  # systemd holds it, else it is a fault
        return False
    return True


def _file_limit(config: Config, checked: StartCheck) -> Result:
    """Judge the limit of the running server; that of this shell is another one."""
    status = checked.status
    if status is None:
        reason = "the server cannot be asked" if checked.is_running else "no server runs"
        return SKIPPED, f"{reason}; its limit is that of its service (LimitNOFILE=), not of this shell"
    if not hasattr(resource, "prlimit"):
        return SKIPPED, "this system does not show the limit of another process"
    wanted = config.limits.max_connections + SPARE_FILES
    try:
        allowed, _ = resource.prlimit(status["pid"], resource.RLIMIT_NOFILE)
    except OSError as error:
        return SKIPPED, f"the limit of the server cannot be read: {error.strerror}"
    if allowed != resource.RLIM_INFINITY and allowed < wanted:
        fitting = max(1, allowed - SPARE_FILES)
        cure = f"raise it (LimitNOFILE=, ulimit -Hn), or set limits.max_connections = {fitting}"
        return WARNING, f"{allowed} open files are allowed, {wanted} are needed", cure
    return OK, f"{allowed} open files are allowed"


def own_server(
    config: Config,
    trust: TrustChoice,
    home: Home,
    login: tuple[str, Path | None] | None,
    timeout: float,
    known: Sequence[Finding],
) -> Iterator[Finding]:
    """Check the server of this machine over the network. `known` is what was found in its files."""
    name = None
    is_own_trust = trust == TrustChoice()
    if config.certificates.mode != "own" and is_own_trust:
        trust, name = own_trust(config)
    is_known = any(each.state == FAULT and each.check in ("certificate", "reload") for each in known)
    for each in remote.check(
        own_address(config), trust, home, login, timeout, server_name=name, is_here=True
    ):
        if each.check != "trust" or each.state != FAULT or not is_own_trust:
            yield each
        elif is_known:
            yield Finding("trust", SKIPPED, "the files of the certificates have faults")
        else:
            yield each._replace(cure=OLD_CERTIFICATE)


def own_trust(config: Config) -> tuple[TrustChoice, str | None]:
    """Return the pins and a name of the certificate on the disk, which may not name an address of this machine."""
    rows = survey(config, utc(), os.environ).certificates
    found = [row.leaf for row in rows if row.use == "server" and not row.site and row.leaf is not None]
    names = [name for leaf in found for name in cert_report.names_of(leaf)]
    pins = tuple(map(cert_report.key_pin, found))
    return TrustChoice(pins=pins), names[0].replace("*", "any", 1) if names else None


def own_address(config: Config) -> str:
    """Return the address of the server for a client on this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.server.host[0], config.server.host[0])  # noqa: S104
    return f"[{host}]:{config.server.port}" if ":" in host else f"{host}:{config.server.port}"
