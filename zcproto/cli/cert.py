"""`zcproto cert`: see, check, renew and hand out certificates.

Rules: a server that runs with this home folder makes its certificates itself when that is asked for, by its control
socket, and serves them when the command ends. All else works on the files, under their folder's lock; a running
server watches them and takes a change within a second. A private key is never printed, and what is written is its
owner's alone.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from cryptography.hazmat.primitives import hashes, serialization

from zcproto.certs import authority, client_ca, files, keys, managed, pair, rollover
from zcproto.certs.examine import Examination, examine
from zcproto.certs.external import PassphraseSource
from zcproto.certs.issued import REASONS
from zcproto.certs.profile import MAX_CLIENT_LIFETIME
from zcproto.certs.settings import managed_site
from zcproto.cli import cert_report as reports
from zcproto.cli import home_options, read_config
from zcproto.cli.control import ControlError, find_control
from zcproto.cli.output import private_file
from zcproto.common.clock import MS_PER_SECOND, system_clock
from zcproto.common.home import Home
from zcproto.common.text import escape_text
from zcproto.errors import CertificateError, ConfigError

if TYPE_CHECKING:
    from zcproto.config import Config

EXIT_UNUSABLE = 2
SERVED = "The running server uses it now."
TAKEN = "A running server uses it within a second, one that is started later from its start."

IN_FILE = click.Path(path_type=Path, dir_okay=False)
OUT_FILE = click.Path(path_type=Path, dir_okay=False, allow_dash=True)
as_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead.")
force_option = click.option("--force", is_flag=True, help="Replace files that are there.")


@click.group()
@home_options
def cert(home: Home, config_file: Path | None) -> None:
    """See, check, renew and hand out certificates."""


# --- looking ---------------------------------------------------------------------------------------------


@cert.command()
@as_json_option
@home_options
def show(home: Home, config_file: Path | None, as_json: bool) -> int:
    """Show the certificates of the configuration, their pins, when they end, and what is wrong.

    These are the files. If a server runs and serves others, that is told, too.

    Exit code 2 if one has expired or cannot be served.
    """
    now = _now()
    found = reports.report(read_config(home, config_file), now, os.environ)
    served = _served(home)
    if as_json:
        _print(reports.as_data(found, now) | ({} if served is None else {"served": served}))
    else:
        _print(reports.as_text(found, now))
        _compare(found, served)
    return 0 if found.is_good else EXIT_UNUSABLE


@cert.command()
@click.option("--certificate", is_flag=True, help="Of whole certificates: good until they are renewed.")
@click.option("--site", metavar="NAME", help="Of the certificates for this name. [default: the default site]")
@click.option("--plain", is_flag=True, help="Nothing but pins, for scripts.")
@as_json_option
@home_options
def pins(
    home: Home,
    config_file: Path | None,
    certificate: bool,
    site: str | None,
    plain: bool,
    as_json: bool,
) -> None:
    """Print the pins of the server, and those announced to come, to paste into connect(pins=[...])."""
    now = _now()
    found = reports.report(read_config(home, config_file), now, os.environ)
    rows = reports.rows_of_site(found, site)
    for row in rows:
        if row.leaf is None or row.status == reports.PROBLEM:
            raise CertificateError(row.problem or f"{row.certificate}: {row.status}; start the server once")
    leaves = [(row.key_type, row.leaf) for row in rows if row.leaf is not None]
    pin_of = reports.certificate_pin if certificate else reports.key_pin
    current = [(pin_of(leaf), key_type) for key_type, leaf in leaves]
    # Only own certificates have next keys, and only of keys something is known before there is a certificate.
    announced = found.next_pins if not certificate and rows[0].site == () else None
    upcoming = [] if announced is None else announced.pins
    if as_json:
        use_from = None if announced is None else reports.stamp(announced.use_from)
        _print({"current": [pin for pin, _ in current], "next": list(upcoming), "use_from": use_from})
    elif plain:
        _print("\n".join([*(pin for pin, _ in current), *upcoming]))
    else:
        lines = [f'"{pin}",  # {key_type}' for pin, key_type in current]
        if announced is not None:
            lines += [f'"{pin}",  # next, from {reports.moment(announced.use_from)}' for pin in upcoming]
        _print("\n".join(lines))


@cert.command("export-ca")
@click.argument("file", type=OUT_FILE, default="-", metavar="[FILE|-]")
@click.option("--der", is_flag=True, help="In DER form, as Windows and Java like it. [default: PEM]")
@click.option("--client", is_flag=True, help="The CA of client certificates. [default: that of the server]")
@force_option
@home_options
def export_ca(home: Home, config_file: Path | None, file: Path, der: bool, client: bool, force: bool) -> None:
    """Write the CA's certificate, by which clients trust the server, and nothing secret."""
    config = read_config(home, config_file)
    path = _authority_file(config, client)
    certificate = pair.read_certificates(path)[0]
    form = serialization.Encoding.DER if der else serialization.Encoding.PEM
    data = certificate.public_bytes(form)
    if str(file) == "-":
        sys.stdout.buffer.write(data)
        return
    _write(file, data, replace=force)
    click.echo(f"{escape_text(str(file))}: written", err=True)


@cert.command()
@click.argument("file", type=IN_FILE)
@click.option(
    "--key", type=IN_FILE, metavar="FILE", help="The private key. [default: in FILE, if it has one]"
)
@click.option("--name", metavar="HOST", help="A name or address by which clients will connect.")
@click.option("--passphrase-file", type=IN_FILE, metavar="FILE", help="Decrypts the key: its first line.")
@as_json_option
@home_options
def check(
    home: Home,
    config_file: Path | None,
    file: Path,
    key: Path | None,
    name: str | None,
    passphrase_file: Path | None,
    as_json: bool,
) -> int:
    """Look at any certificate or key in PEM form as a server would, and tell all that is wrong with it.

    Exit code 2 if a server would refuse it.
    """
    now = _now()
    passphrase = PassphraseSource(passphrase_file).read({})
    found = examine(file, key, now, passphrase=passphrase, host=name)
    _print(_check_data(found, now) if as_json else _check_text(found, now))
    return EXIT_UNUSABLE if found.refused else 0


def _served(home: Home) -> list[dict[str, Any]] | None:
    """The certificates that a running server serves; None if none runs, or cannot be asked."""
    try:
        control = find_control(home)
        if control is None:
            return None
        served: list[dict[str, Any]] = control.get("/v1/certificates")["certificates"]
    except ControlError as error:
        _tell(f"note: {error}")
        return None
    return served


def _compare(found: reports.Report, served: list[dict[str, Any]] | None) -> None:
    """Tell what a running server does not serve of the files."""
    if served is None:
        return
    known = {one["sha256"] for one in served}
    for row in found.rows:
        if row.use != "server" or row.leaf is None:
            continue
        if row.leaf.fingerprint(hashes.SHA256()).hex() not in known:
            _tell(f"note: {row.certificate} is not what the running server serves; its log says why")


def _check_text(found: Examination, now: datetime) -> str:
    lines: list[tuple[str, str]] = []
    if found.chain:
        leaf = found.chain[0]
        days = reports.days_left(leaf, now)
        lines += [
            ("names", reports.shown_names(reports.names_of(leaf)) or "none"),
            ("key", reports.type_of(leaf)),
            ("issuer", reports.issuer_of(leaf)),
            ("from", reports.moment(leaf.not_valid_before_utc)),
            ("until", f"{reports.moment(leaf.not_valid_after_utc)} ({days} days left)"),
            ("pin", reports.key_pin(leaf)),
            ("chain", f"{len(found.chain)} certificates" if len(found.chain) > 1 else "no other certificate"),
        ]
    if found.key is not None:
        lines.append(("private key", f"{keys.key_type_of(found.key)}, pin {pair.key_pin(found.key)}"))
    lines += [("REFUSED", escape_text(reason)) for reason in found.refused]
    lines += [("warning", escape_text(reason)) for reason in found.warnings]
    what = "certificate" if found.chain else "key"
    verdict = "a server refuses this" if found.refused else f"a server takes this {what}"
    return reports.table([*lines, ("verdict", verdict)])


def _check_data(found: Examination, now: datetime) -> dict[str, Any]:
    key = None
    if found.key is not None:
        key = {"key_type": keys.key_type_of(found.key), "pin": pair.key_pin(found.key)}
    return {
        "good": not found.refused,
        "refused": found.refused,
        "warnings": found.warnings,
        "certificates": [reports.certificate_data(each, now) for each in found.chain],
        "key": key,
    }


# --- changing --------------------------------------------------------------------------------------------


@cert.command()
@click.option(
    "--type",
    "family",
    type=click.Choice(sorted(rollover.STEMS)),
    help="Only the certificate with this kind of key. [default: all]",
)
@as_json_option
@home_options
def renew(home: Home, config_file: Path | None, family: str | None, as_json: bool) -> None:
    """Renew the server's own certificates now, with the keys that they have: pins stay good."""
    config = _own_config(home, config_file, "renews")
    families = sorted({keys.family(key_type) for key_type in config.certificates.key_types})
    if family is not None and family not in families:
        raise ConfigError([f"--type {family}: certificates.key_types has {', '.join(families)} alone"])
    control = find_control(home)
    if control is not None:
        _print_result(_told(control.post("/v1/certificates/renew", type=family)), as_json)
        _tell(SERVED)
        return
    wanted = families if family is None else [family]
    result = managed.renew(config.certificates.directory, _settings(config), _now(), _tell, families=wanted)
    _print_result(result.report(), as_json)
    _tell(TAKEN)


@cert.command()
@click.option("--now", "at_once", is_flag=True, help="Use new keys at once: pins that clients have may end.")
@click.option("--cancel", is_flag=True, help="Take back what is announced; the keys are put aside.")
@as_json_option
@home_options
def rotate(home: Home, config_file: Path | None, at_once: bool, cancel: bool, as_json: bool) -> None:
    """Make the server's next keys and announce their pins; they are used when clients have had time to learn.

    That time is certificates.announce_key. Keys that are announced already stay the next ones.
    """
    if at_once and cancel:
        raise click.UsageError("Give --now or --cancel.")
    config = _own_config(home, config_file, "makes new keys for")
    directory = config.certificates.directory
    control = find_control(home)
    if cancel:
        if control is not None:
            aside = _told(control.post("/v1/certificates/cancel"))["cancelled"]
        else:
            aside = [str(path) for path in managed.cancel(directory, _tell)]
        if as_json:
            _print({"cancelled": aside})
        elif not aside:
            _print("Nothing to do: no key is announced.")
        return
    if control is not None:
        result = _told(control.post("/v1/certificates/rotate", at_once=at_once))
    else:
        result = managed.rotate(directory, _settings(config), _now(), _tell, at_once=at_once).report()
    _print_result(result, as_json)
    if at_once:
        _tell("Clients that know none of these pins by now are refused from now on: give them the new ones.")
    elif not as_json:
        _tell(
            "Clients that are connected learn the next pins by the event pins.next; give them to the others."
        )
    _tell(TAKEN if control is None else SERVED)


def _told(answer: dict[str, Any]) -> dict[str, Any]:
    """What a server has done, after what it had to tell of that."""
    for sentence in answer.pop("told"):
        _tell(str(sentence))
    return answer


def _own_config(home: Home, config_file: Path | None, does: str) -> Config:
    """The configuration, if the certificates are this server's own."""
    config = read_config(home, config_file)
    if config.certificates.mode == "files":
        found = reports.report(config, _now(), os.environ)
        issuers = sorted(
            {reports.issuer_of(row.leaf) for row in found.rows if row.leaf and row.use == "server"}
        )
        raise ConfigError(
            [
                f'certificates.mode = "files": whoever made the certificates {does} them'
                f" ({'; '.join(issuers) or 'none can be read'}), so use their tool; a running server takes new"
                " files by itself"
            ]
        )
    home.ensure()
    return config


def _settings(config: Config) -> managed.ManagedSettings:
    site = managed_site(config)
    assert site is not None
    return site.settings


def _print_result(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _print(result)
        return
    rows = [
        (
            escape_text(Path(one["certificate"]).name),
            one["key_type"],
            reports.moment(datetime.fromisoformat(one["not_after"])),
            "new" if one["new_key"] else "kept",
            one["pin"],
        )
        for one in result["certificates"]
    ]
    _print(reports.table([("certificate", "key", "until", "key is", "pin"), *rows]))
    announced = result["next_pins"]
    if announced is not None:
        _print(f"\nNext pins, used from {reports.moment(datetime.fromisoformat(announced['use_from']))}:")
        _print("\n".join(announced["pins"]))


# --- clients ---------------------------------------------------------------------------------------------


@cert.command("issue-client")
@click.argument("name")
@click.option(
    "--csr", type=OUT_FILE, metavar="FILE", help="The request of a device that keeps its key; - reads it."
)
@click.option("--days", type=click.IntRange(1, MAX_CLIENT_LIFETIME.days), default=365, show_default=True,
              metavar="N", help="How long it is valid.")  # fmt: skip
@click.option("--renew", is_flag=True, help="Replace a certificate that is still good, with the same key.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
              help="Also write NAME.crt and NAME.key here, for the way to the client.")  # fmt: skip
@force_option
@as_json_option
@home_options
def issue_client(
    home: Home,
    config_file: Path | None,
    name: str,
    csr: Path | None,
    days: int,
    renew: bool,
    out: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Make a certificate by which a client proves to be the user NAME.

    Certificate and key are in clients/ in the folder of certificates. The first one makes the CA of client_ca.
    """
    config = read_config(home, config_file)
    request = None if csr is None else _read_csr(csr)
    home.ensure()
    if out is not None:  # before anything is issued, which could not be handed out
        files.make_folder(out)
        if not force:
            _refuse_to_replace([out / f"{name}.crt", out / f"{name}.key"])
    issued = client_ca.issue_client(
        config.certificates.directory,
        name,
        lifetime=timedelta(days=days),
        now=_now(),
        renew=renew,
        csr=request,
        progress=_tell,
    )
    written = [path for path in (issued.certificate, issued.key) if path is not None]
    if out is not None:
        written = [_copy(path, out / path.name, force) for path in written]
    if as_json:
        _print(
            {
                "name": issued.name,
                "certificate": str(written[0]),
                "key": str(written[1]) if len(written) > 1 else None,
                "serial": issued.serial,
                "not_after": reports.stamp(issued.not_after),
                "pin": issued.pin,
            }
        )
        return
    lines = [("certificate", escape_text(str(written[0])))]
    lines += [("key", escape_text(str(path))) for path in written[1:]]
    lines += [("serial", issued.serial), ("until", reports.moment(issued.not_after)), ("pin", issued.pin)]
    _print(reports.table(lines))
    if config.tls.client_auth == "off":
        _tell('The server asks no client for a certificate; set tls.client_auth = "optional" or "required".')


@cert.command("revoke-client")
@click.argument("name", required=False)
@click.option("--serial", metavar="HEX", help="One certificate instead of all that NAME has.")
@click.option("--reason", type=click.Choice(REASONS), default=REASONS[0], show_default=True,
              help="What the list of revoked certificates says.")  # fmt: skip
@as_json_option
@home_options
def revoke_client(
    home: Home, config_file: Path | None, name: str | None, serial: str | None, reason: str, as_json: bool
) -> None:
    """Revoke the certificates of the client NAME. There is no way back.

    A running server closes the connections of those who show one of them.
    """
    if (name is None) == (serial is None):
        raise click.UsageError("Give NAME, or --serial.")
    directory = read_config(home, config_file).certificates.directory
    revoked = client_ca.revoke_client(
        directory, name=name, serial=serial, now=_now(), reason=reason, progress=_tell
    )
    if as_json:
        _print({"revoked": [{"name": entry.name, "serial": entry.serial} for entry in revoked]})
        return
    if not revoked:
        _print("Nothing to do: it was revoked before.")
        return
    _print("\n".join(f"revoked {entry.serial} of {escape_text(entry.name)}" for entry in revoked))
    _tell(TAKEN)


def _read_csr(path: Path) -> bytes:
    if str(path) == "-":
        return sys.stdin.buffer.read(client_ca.MAX_CSR_BYTES + 1)
    with path.open("rb") as file:
        return file.read(client_ca.MAX_CSR_BYTES + 1)


def _refuse_to_replace(paths: list[Path]) -> None:
    for path in paths:
        if os.path.lexists(path):
            raise ConfigError([f"{escape_text(str(path))}: is there already; --force replaces it"])


def _copy(source: Path, target: Path, force: bool) -> Path:
    _write(target, files.read_key_file(source), replace=force)
    return target


# --- what is common --------------------------------------------------------------------------------------


def _authority_file(config: Config, client: bool) -> Path:
    directory = config.certificates.directory
    if client:
        foreign = config.tls.client_ca_file
        path = directory / "client-ca.crt" if foreign is None else foreign
        hint = "`zcproto cert issue-client` makes it"
    else:
        if config.certificates.mode == "files":
            raise ConfigError(
                [
                    'certificates.mode = "files": others make the certificates, so ask them for their CA;'
                    " `zcproto cert show` says who issued them"
                ]
            )
        path, _ = authority.SERVER.paths(directory)
        hint = "the first start of a server makes it"
    if not path.exists():
        raise CertificateError(f"{path}: is not there yet; {hint}")
    return path


def _now() -> datetime:
    return datetime.fromtimestamp(system_clock.wall() / MS_PER_SECOND, UTC)


def _write(path: Path, data: bytes, *, replace: bool) -> None:
    with private_file(path, replace=replace) as file:
        file.buffer.write(data)


def _print(result: str | dict[str, Any]) -> None:
    click.echo(result if isinstance(result, str) else json.dumps(result, indent=2))


def _tell(sentence: str) -> None:
    """What goes on, beside the result."""
    click.echo(escape_text(sentence), err=True)
