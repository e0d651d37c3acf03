"""`zcproto cert`: show, check, renew and export certificates.

Rules: if a server runs with this home folder, its control socket is used to renew and rotate, and the new
certificates are served when the command ends. Everything else works on the files, under their folder's lock; a
running server watches them and picks up a change within a second. A private key is never printed, and written files
are readable only by their owner.
"""

from __future__ import annotations

import os
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import click
from cryptography.hazmat.primitives import hashes, serialization

from zcproto.certs import authority, client_ca, files, keys, managed, pair, rollover
from zcproto.certs.examine import Examination, FileState, Survey, examine, survey, type_of
from zcproto.certs.external import PassphraseSource
from zcproto.certs.issued import REASONS
from zcproto.certs.notices import day
from zcproto.certs.profile import MAX_CLIENT_LIFETIME
from zcproto.certs.settings import ManagedSite, managed_site
from zcproto.cli import (
    EXIT_UNUSABLE,
    Instance,
    command_group,
    file_option,
    force_option,
    instance_options,
    number_option,
    out_option,
)
from zcproto.cli import cert_report as reports
from zcproto.cli.audit import recorded
from zcproto.cli.control import ControlError, find_control
from zcproto.cli.output import print_report, private_file, report_options, utc
from zcproto.common.text import aligned, counted, escape_text
from zcproto.config import Config
from zcproto.errors import CertificateError, ConfigError
from zcproto.tls.pins import key_pin

SERVED = "The running server uses it now."
WATCHED = "A running server uses it within a second."


cert = command_group("cert", "Show, check, renew and export certificates.")


# --- reading ---------------------------------------------------------------------------------------------


@cert.command()
@report_options
def show(instance: Instance, as_json: bool) -> int:
    """Show the certificates of the configuration, their pins, their expiry, and problems.

    This reads the files. It also reports if a running server serves other certificates.

    Exit code 2 if one has expired or cannot be served.
    """
    now = utc()
    found = survey(instance.existing_config(), now, os.environ)
    served = _served(instance)
    data = reports.as_data(found, now) | ({} if served is None else {"served": served})
    print_report(as_json, data, reports.as_text(found, now))
    if not as_json:
        _note_differences(found, served or [])
    return 0 if found.is_good else EXIT_UNUSABLE


@cert.command()
@click.option("--certificate", is_flag=True, help="Pins of whole certificates, valid until they are renewed.")
@click.option(
    "--site", metavar="NAME", help="Pins of the certificates for this name. [default: the default site]"
)
@click.option("--plain", is_flag=True, help="Print only pins, for scripts.")
@report_options
def pins(instance: Instance, certificate: bool, site: str | None, plain: bool, as_json: bool) -> None:
    """Print the current and the announced pins of the server, to paste into connect(pins=[...])."""
    now = utc()
    found = survey(instance.existing_config(), now, os.environ)
    rows = found.of_site(site)
    for row in rows:
        if row.leaf is None or row.state is FileState.PROBLEM:
            raise CertificateError(
                row.problem or f"{row.certificate}: {row.state.value}; start the server once"
            )
    pin_of = reports.certificate_pin if certificate else reports.key_pin
    current = [(pin_of(row.leaf), row.key_type) for row in rows if row.leaf is not None]
    # Only managed certificates have next keys, and a certificate that is not issued yet has no pin.
    announced = found.next_pins if not certificate and rows[0].site == () else None
    following = [] if announced is None else list(announced.pins)
    if plain:
        lines = [*(pin for pin, _ in current), *following]
    else:
        lines = [f'"{pin}",  # {key_type}' for pin, key_type in current]
        if announced is not None:
            lines += [f'"{pin}",  # next, from {day(announced.use_from)}' for pin in following]
    use_from = announced and reports.timestamp(announced.use_from)
    data = {"current": [pin for pin, _ in current], "next": following, "use_from": use_from}
    print_report(as_json, data, "\n".join(lines))


@cert.command("export-ca")
@click.argument(
    "file", type=click.Path(path_type=Path, dir_okay=False, allow_dash=True), default="-", metavar="[FILE|-]"
)
@click.option("--der", is_flag=True, help="Write DER, for Windows and Java. [default: PEM]")
@click.option("--client", is_flag=True, help="Export the client CA. [default: the server CA]")
@force_option
@instance_options
def export_ca(instance: Instance, file: Path, der: bool, client: bool, force: bool) -> None:
    """Write the certificate of the CA, with which clients verify the server. It contains no secret."""
    config = instance.existing_config()
    path = _authority_file(config, client)
    certificate = pair.read_certificate(path)
    form = serialization.Encoding.DER if der else serialization.Encoding.PEM
    data = certificate.public_bytes(form)
    if str(file) == "-":
        sys.stdout.buffer.write(data)
        return
    _write(file, data, replace=force)
    click.echo(f"{escape_text(str(file))}: written", err=True)


@cert.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@file_option("--key", text="The private key. [default: the key in FILE]", dir_okay=False)
@click.option("--name", metavar="HOST", help="A name or address that clients connect to.")
@file_option("--passphrase-file", text="Its first line decrypts the key.", dir_okay=False)
@report_options
def check(
    instance: Instance,
    file: Path,
    key: Path | None,
    name: str | None,
    passphrase_file: Path | None,
    as_json: bool,
) -> int:
    """Check any certificate or key in PEM form as a server would, and report all problems.

    Exit code 2 if a server would refuse it.
    """
    now = utc()
    passphrase = PassphraseSource(passphrase_file).read({})
    found = examine(file, key, now, passphrase=passphrase, host=name)
    print_report(as_json, _check_data(found, now), _check_text(found, now))
    return EXIT_UNUSABLE if found.refused else 0


def _served(instance: Instance) -> list[dict[str, Any]] | None:
    """Return the certificates that a running server serves; None if none runs or it cannot be asked."""
    try:
        control = find_control(instance.home)
        return None if control is None else control.get("/v1/certificates")["certificates"]
    except ControlError as error:
        _note(f"note: {error}")
        return None


def _note_differences(found: Survey, served: list[dict[str, Any]]) -> None:
    known = {one["sha256"] for one in served}
    for row in found.certificates if served else ():
        if row.use == "server" and row.leaf and row.leaf.fingerprint(hashes.SHA256()).hex() not in known:
            _note(
                f"note: the running server does not serve {row.certificate}; run zcproto reload, or see its log"
            )


def _check_text(found: Examination, now: datetime) -> str:
    lines: list[tuple[str, str]] = []
    if found.chain:
        leaf = found.chain[0]
        left = counted(reports.days_left(leaf, now), "day")
        lines += [
            ("names", reports.shown_names(reports.names_of(leaf)) or "none"),
            ("key", type_of(leaf)),
            ("issuer", reports.issuer_of(leaf)),
            ("from", day(leaf.not_valid_before_utc)),
            ("until", f"{day(leaf.not_valid_after_utc)} ({left} left)"),
            ("pin", reports.key_pin(leaf)),
            (
                "chain",
                counted(len(found.chain), "certificate") if len(found.chain) > 1 else "no other certificate",
            ),
        ]
    if found.key is not None:
        lines.append(("private key", f"{keys.key_type_of(found.key)}, pin {key_pin(found.key.public_key())}"))
    lines += [("REFUSED", escape_text(reason)) for reason in found.refused]
    lines += [("warning", escape_text(reason)) for reason in found.warnings]
    what = "certificate" if found.chain else "key"
    verdict = "a server refuses this" if found.refused else f"a server accepts this {what}"
    return aligned([*lines, ("verdict", verdict)])


def _check_data(found: Examination, now: datetime) -> dict[str, Any]:
    key = found.key and {"key_type": keys.key_type_of(found.key), "pin": key_pin(found.key.public_key())}
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
    help="Renew only the certificate with this key type. [default: all]",
)
@report_options
def renew(instance: Instance, family: str | None, as_json: bool) -> None:
    """Renew the managed certificates now with their current keys, so that pins remain valid.

    Those of a public CA are ordered by the running server, which may take minutes.
    """
    site = _managed_site(instance)
    families = sorted({keys.family(key_type) for key_type in site.settings.key_types})
    if family is not None and family not in families:
        raise ConfigError([f"--type {family}: certificates.key_types has only {', '.join(families)}"])
    control = find_control(instance.home)
    if control is not None:
        result = _with_notes(control.post("/v1/certificates/renew", type=family))
    elif instance.read_config().certificates.mode == "acme":
        raise ConfigError(
            [
                'certificates.mode = "acme": start the server, through which the CA checks the names; it orders'
                " certificates when they are due, and then by this command"
            ]
        )
    else:
        chosen = families if family is None else [family]
        with recorded(instance, "certificates.renew"):
            result = managed.renew(site.directory, site.settings, utc(), _note, families=chosen).report()
    _print_issued(as_json, result)
    _note(WATCHED if control is None else SERVED)


@cert.command()
@click.option(
    "--now",
    "at_once",
    is_flag=True,
    help="Use new keys at once, which may invalidate pins that clients have.",
)
@click.option("--cancel", is_flag=True, help="Cancel the announcement and set the keys aside.")
@report_options
def rotate(instance: Instance, at_once: bool, cancel: bool, as_json: bool) -> None:
    """Generate the server's next keys and announce their pins; they are used when clients have had time to learn
    them.

    That time is certificates.announce_key. Keys that are already announced remain the next ones.
    """
    if at_once and cancel:
        raise click.UsageError("Give --now or --cancel.")
    site = _managed_site(instance)
    control = find_control(instance.home)
    if cancel:
        if control is not None:
            aside = _with_notes(control.post("/v1/certificates/cancel"))["cancelled"]
        else:
            with recorded(instance, "certificates.cancel"):
                aside = [str(path) for path in rollover.cancel(site.directory, _note)]
        if as_json or not aside:
            print_report(as_json, {"cancelled": aside}, "Nothing to do: no key is announced.")
        return
    if control is not None:
        result = _with_notes(control.post("/v1/certificates/rotate", at_once=at_once))
    else:
        with recorded(instance, "certificates.rotate"):
            result = managed.rotate(site.directory, site.settings, utc(), _note, at_once=at_once).report()
    _print_issued(as_json, result)
    if at_once:
        _note("Clients that have none of these pins are refused from now on: give them the new ones.")
    elif not as_json:
        _note("Connected clients receive the next pins by the event pins.next; give them to the others.")
    _note(WATCHED if control is None else SERVED)


def _with_notes(answer: dict[str, Any]) -> dict[str, Any]:
    """Print what a server reports about its work, and return the result."""
    for sentence in answer.pop("told"):
        _note(str(sentence))
    return answer


def _managed_site(instance: Instance) -> ManagedSite:
    """Return the managed certificates. Raises ConfigError if other programs provide the certificates."""
    config = instance.read_config()
    site = managed_site(config)
    if site is None:
        rows = survey(config, utc(), os.environ).certificates
        issuers = {reports.issuer_of(row.leaf) for row in rows if row.leaf and row.use == "server"}
        raise ConfigError(
            [
                'certificates.mode = "files": use the tool that issued the certificates'
                f" ({'; '.join(sorted(issuers)) or 'none can be read'}); a running server picks up new files"
            ]
        )
    instance.home.ensure()
    return site


def _print_issued(as_json: bool, result: dict[str, Any]) -> None:
    rows = [
        (
            escape_text(Path(one["certificate"]).name),
            one["key_type"],
            day(datetime.fromisoformat(one["not_after"])),
            "new" if one["new_key"] else "kept",
            one["pin"],
        )
        for one in result["certificates"]
    ]
    text = aligned([("certificate", "key", "until", "key is", "pin"), *rows])
    announced = result["next_pins"]
    if announced is not None:
        use_from = day(datetime.fromisoformat(announced["use_from"]))
        text = "\n".join((f"{text}\n\nNext pins, used from {use_from}:", *announced["pins"]))
    print_report(as_json, result, text)


# --- clients ---------------------------------------------------------------------------------------------


@cert.command("issue-client")
@click.argument("name")
@file_option(
    "--csr",
    text="The certificate request of a device that keeps its key; - reads standard input.",
    dir_okay=False,
    allow_dash=True,
)
@number_option("--days", click.IntRange(1, MAX_CLIENT_LIFETIME.days), 365, "N", "Days for which it is valid.")
@click.option("--renew", is_flag=True, help="Replace a valid certificate and keep its key.")
@out_option("Also write NAME.crt and NAME.key here, to transfer them to the client.", is_folder=True)
@force_option
@report_options
def issue_client(
    instance: Instance,
    name: str,
    csr: Path | None,
    days: int,
    renew: bool,
    out: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Issue a certificate that authenticates a client as the user NAME.

    Certificate and key are written to clients/ in the certificate folder. The first one also creates the client CA.
    """
    config = instance.read_config()
    request = None if csr is None else _read_csr(csr)
    instance.home.ensure()
    if out is not None:  # fail before a certificate is issued that could not be written
        files.make_folder(out)
        for path in () if force else (out / f"{name}.crt", out / f"{name}.key"):
            if os.path.lexists(path):
                raise ConfigError([f"{escape_text(str(path))}: already exists; --force replaces it"])
    with recorded(instance, "certificates.issue_client", user=name):
        issued = client_ca.issue_client(
            config.certificates.directory,
            name,
            lifetime=timedelta(days=days),
            now=utc(),
            renew=renew,
            csr=request,
            progress=_note,
        )
    written = [path for path in (issued.certificate, issued.key) if path is not None]
    if out is not None:
        for path in written:
            _write(out / path.name, files.read_key_file(path), replace=force)
        written = [out / path.name for path in written]
    data = {
        "name": name,
        "certificate": str(written[0]),
        "key": str(written[1]) if len(written) > 1 else None,
        "serial": issued.serial,
        "not_after": reports.timestamp(issued.not_after),
        "pin": issued.pin,
    }
    lines = [("certificate", escape_text(str(written[0])))]
    lines += [("key", escape_text(str(path))) for path in written[1:]]
    lines += [("serial", issued.serial), ("until", day(issued.not_after)), ("pin", issued.pin)]
    print_report(as_json, data, aligned(lines))
    if config.tls.client_auth == "off" and not as_json:
        _note('The server requests no client certificates; set tls.client_auth = "optional" or "required".')


@cert.command("revoke-client")
@click.argument("name", required=False)
@click.option("--serial", metavar="HEX", help="Revoke this certificate instead of all that NAME has.")
@click.option("--reason", type=click.Choice(REASONS), default=REASONS[0], show_default=True,
              help="The reason in the revocation list.")  # fmt: skip
@report_options
def revoke_client(
    instance: Instance, name: str | None, serial: str | None, reason: str, as_json: bool
) -> None:
    """Revoke the certificates of the client NAME. This cannot be undone.

    A running server closes the connections that use one of them.
    """
    if (name is None) == (serial is None):
        raise click.UsageError("Give NAME, or --serial.")
    directory = instance.existing_config().certificates.directory
    with recorded(instance, "certificates.revoke_client", user=name):
        revoked = client_ca.revoke_client(
            directory, name=name, serial=serial, now=utc(), reason=reason, progress=_note
        )
    lines = [f"revoked {one.serial} of {escape_text(one.name)}" for one in revoked]
    text = "\n".join(lines) or "Nothing to do: it was revoked before."
    print_report(as_json, {"revoked": [{"name": one.name, "serial": one.serial} for one in revoked]}, text)
    if revoked and not as_json:
        _note(WATCHED)


def _read_csr(path: Path) -> bytes:
    if str(path) == "-":
        return sys.stdin.buffer.read(client_ca.MAX_CSR_BYTES + 1)
    with path.open("rb") as file:
        return file.read(client_ca.MAX_CSR_BYTES + 1)


# --- shared parts ----------------------------------------------------------------------------------------


def _authority_file(config: Config, client: bool) -> Path:
    directory = config.certificates.directory
    if client:
        path = config.tls.client_ca_file or authority.CLIENT.paths(directory)[0]
        creator = "`zcproto cert issue-client`"
    elif config.certificates.mode != "own":
        raise ConfigError(
            [
                f'certificates.mode = "{config.certificates.mode}": get the CA from the issuer of the certificates,'
                " which `zcproto cert show` names"
            ]
        )
    else:
        path, creator = authority.SERVER.paths(directory)[0], "the first start of a server"
    if not path.exists():
        raise CertificateError(f"{path}: does not exist yet; {creator} creates it")
    return path


def _write(path: Path, data: bytes, *, replace: bool) -> None:
    with private_file(path, replace=replace) as file:
        file.buffer.write(data)


def _note(sentence: str) -> None:
    click.echo(escape_text(sentence), err=True)
