"""Decides what to report about a certificate or a key before a server uses it.

Rules:
- Everything that a server would refuse is reported at once, in the words in which `load_pair` refuses it.
- What a server accepts, but its clients or its operator may regret, is a warning.
- Nothing is changed. A file with wrong permissions is read nevertheless, to report its other problems.

Must not know: configuration, where the result is printed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import AuthorityInformationAccessOID

from zcproto.certs import files, keys, pair
from zcproto.certs.names import check_name, covers
from zcproto.common.text import escape_text
from zcproto.errors import CertificateError

_MAX_SHOWN = 300
"""Characters of a certificate's names in a message."""

EXPIRY_WARNING = timedelta(days=30)
"""Time left at which an expiry is reported as near; a third of the lifetime if that is less."""


@dataclass(slots=True)
class Examination:
    """What was found in the files, and its problems."""

    chain: list[x509.Certificate] = field(default_factory=list)
    """The leaf, then its issuers; empty if there is no certificate that can be parsed."""
    key: keys.PrivateKey | None = field(default=None, repr=False)
    refused: list[str] = field(default_factory=list)
    """Why a server would not serve this, each with the remedy."""
    warnings: list[str] = field(default_factory=list)

    def passes(self, check: Callable[[], object], path: Path) -> bool:
        """Make a check. If it raises, refuse the files and return False."""
        try:
            with pair.parsing(path):
                check()
        except CertificateError as error:
            self.refuse(str(error))
            return False
        return True

    def refuse(self, reason: str) -> None:
        if reason not in self.refused:
            self.refused.append(reason)


def examine(
    path: Path,
    key_path: Path | None,
    now: datetime,
    *,
    passphrase: bytes | None = None,
    host: str | None = None,
) -> Examination:
    """Return all findings about the PEM file `path` at `now`, an aware time.

    The file may contain a certificate with its chain, a key, or both; `key_path` is a key in another file. `host`
    is a name or address that clients connect to; a certificate without it is refused. Raises CertificateError if
    the file cannot be read at all, or if `host` is invalid.
    """
    moment = pair.utc(now)
    wanted = None if host is None else check_name(host)
    found = Examination()
    data = _read(path, found, secret=False)
    holds_key, holds_certificate = b"PRIVATE KEY-----" in data, b"CERTIFICATE-----" in data
    if holds_certificate or not holds_key:
        found.passes(lambda: found.chain.extend(pair.parse_certificates(data, path)), path)
    if key_path is not None and not _is_same(key_path, path):
        _load_key(found, _read(key_path, found, secret=True), key_path, passphrase)
    elif holds_key or key_path is not None:
        key_path = path
        _check_folder(path, found)
        _load_key(found, data, path, passphrase)
    if found.chain:
        for check in pair.checks(found.chain, path, moment, found.key, key_path):
            found.passes(check, path)
        found.passes(lambda: _warn(found, path, moment), path)
        if wanted is not None:
            _check_host(found, path, wanted)
    return found


def is_self_signed(certificate: x509.Certificate) -> bool:
    return certificate.subject == certificate.issuer


# --- reading ---------------------------------------------------------------------------------------------


def _read(path: Path, found: Examination, *, secret: bool) -> bytes:
    read = files.read_key_file if secret else files.read_certificate_file
    try:
        return read(path)
    except CertificateError as error:
        data = _read_anyhow(path, error)
        found.refuse(str(error))
    if secret:
        _check_folder(path, found)  # the error above came first
    return data


def _read_anyhow(path: Path, refusal: CertificateError) -> bytes:
    """Return the bytes of a file that a server would not read. Raises `refusal` if they cannot be read at all."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            data = file.read(files.MAX_FILE_BYTES + 1)
    except (OSError, ValueError):
        raise refusal from None
    if not data or len(data) > files.MAX_FILE_BYTES:
        raise refusal
    return data


def _check_folder(path: Path, found: Examination) -> None:
    found.passes(lambda: files.check_folder(Path(os.path.realpath(path)).parent), path)


def _is_same(key_path: Path, path: Path) -> bool:
    try:
        return os.path.samefile(key_path, path)
    except OSError:
        return False


def _load_key(found: Examination, data: bytes, path: Path, passphrase: bytes | None) -> None:
    def load() -> None:
        found.key, _ = pair.decrypt_key(data, path, passphrase)

    if found.passes(load, path):
        weak = keys.weakness(found.key)
        if weak is not None and not found.chain:  # otherwise the check of the chain reports it
            found.refuse(f"{path}: the key is too weak: {weak}; generate a new one")


# --- judging ---------------------------------------------------------------------------------------------


def _warn(found: Examination, path: Path, now: datetime) -> None:
    leaf = found.chain[0]
    warn = found.warnings.append
    lifetime = leaf.not_valid_after_utc - leaf.not_valid_before_utc
    if timedelta(0) <= leaf.not_valid_after_utc - now <= min(EXPIRY_WARNING, lifetime / 3):
        warn(f"{path}: expires on {leaf.not_valid_after_utc:%Y-%m-%d %H:%M} UTC; replace it soon")
    for position, certificate in enumerate(found.chain[1:], 2):
        if certificate.not_valid_after_utc < leaf.not_valid_after_utc:
            warn(
                f"{path}: certificate {position} of the chain expires before the server's, on"
                f" {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC; use a chain that lasts longer"
            )
    if found.passes(lambda: pair.names_of(leaf), path):
        _warn_of_extensions(found, path)
    root = found.chain[-1]
    if len(found.chain) > 1 and is_self_signed(root):
        size = len(root.public_bytes(serialization.Encoding.DER))
        warn(
            f"{path}: contains the root, which adds {size / 1024:.1f} KiB to each handshake; remove it,"
            " because clients that trust it have it"
        )
    elif is_self_signed(leaf):
        warn(f"{path}: is self-signed, so clients can trust only this certificate or its pin")


def _warn_of_extensions(found: Examination, path: Path) -> None:
    leaf = found.chain[0]
    warn = found.warnings.append
    if not pair.names_of(leaf):
        warn(
            f"{path}: names no host (SubjectAltName), so clients refuse it; use one with the names that they"
            " connect to"
        )
    for extension in leaf.extensions:
        if isinstance(extension.value, x509.TLSFeature):
            warn(f"{path}: requires a stapled OCSP response, which is not sent; use one without must-staple")
        elif isinstance(extension.value, x509.AuthorityInformationAccess):
            hints = [each.access_method for each in extension.value]
            if AuthorityInformationAccessOID.CA_ISSUERS in hints and len(found.chain) == 1:
                warn(
                    f"{path}: contains the certificate without its issuer, which most clients need;"
                    " use the file with the full chain"
                )


def _check_host(found: Examination, path: Path, host: str) -> None:
    def check() -> None:
        names = pair.names_of(found.chain[0])
        if not any(covers(name, host) for name in names):
            shown = escape_text(", ".join(names[:10]), _MAX_SHOWN)
            others = f"; it is valid for {shown}" if names else ""
            raise CertificateError(f"{path}: is not valid for {host}, so clients refuse it{others}")

    found.passes(check, path)
