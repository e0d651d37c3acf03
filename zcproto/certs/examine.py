"""Decides what there is to say about a certificate or a key before a server is given it.

Rules:
- What a server would refuse is said in the words in which `load_pair` refuses it, all of it at once.
- What a server takes and its clients or its operator may regret is a warning.
- Nothing is changed. A file with wrong permissions is read all the same, to tell what else is wrong.

Must not know: configuration, where an answer is printed.
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
from zcproto.certs.foreign import covers
from zcproto.certs.names import check_name
from zcproto.common.text import escape_text
from zcproto.errors import CertificateError

_MAX_SHOWN = 300
"""Characters of a certificate's names in a message."""

EXPIRY_WARNING = timedelta(days=30)
"""The time left at which an end is called near; a third of the life where that is less."""


@dataclass(slots=True)
class Examination:
    """What was found in the files, and what is wrong with it."""

    chain: list[x509.Certificate] = field(default_factory=list)
    """The leaf, then its issuers; empty if there is no certificate, or none that can be read."""
    key: keys.PrivateKey | None = field(default=None, repr=False)
    refused: list[str] = field(default_factory=list)
    """Why a server would not serve this, each with the cure."""
    warnings: list[str] = field(default_factory=list)

    def passes(self, check: Callable[[], object], path: Path) -> bool:
        """Makes a check; if it raises, that is a reason to refuse."""
        try:
            check()
        except CertificateError as error:
            self.refuse(str(error))
        except pair.UNREADABLE:
            self.refuse(f"{path}: holds a certificate that cannot be read; get it anew")
        else:
            return True
        return False

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
    """Everything to be said of the PEM file `path`, at `now`, an aware time.

    The file may hold a certificate with its chain, a key, or both; `key_path` is a key that is elsewhere.
    `host` is a name or address that clients connect to; a certificate that does not have it is refused.
    Raises CertificateError if the file cannot be read at all, or if `host` is no name.
    """
    moment = pair.utc(now)
    wanted = None if host is None else check_name(host)
    found = Examination()
    data = _read(path, found, secret=False)
    holds_key, holds_certificate = b"PRIVATE KEY-----" in data, b"CERTIFICATE-----" in data
    if holds_certificate or not holds_key:
        _take_chain(found, data, path)
    if key_path is not None and not _is_same(key_path, path):
        _take_key(found, _read(key_path, found, secret=True), key_path, passphrase)
    elif holds_key or key_path is not None:
        key_path = path
        _check_folder(path, found)
        _take_key(found, data, path, passphrase)
    if found.chain:
        _judge_chain(found, path, key_path, moment)
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
        _check_folder(path, found)  # which the refusal of the file itself came before
    return data


def _read_anyhow(path: Path, refusal: CertificateError) -> bytes:
    """The bytes of a file that a server would not read. Raises `refusal` if they cannot be had at all."""
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


def _take_chain(found: Examination, data: bytes, path: Path) -> None:
    found.passes(lambda: found.chain.extend(pair._parse_certificates(data, path)), path)


def _take_key(found: Examination, data: bytes, path: Path, passphrase: bytes | None) -> None:
    def take() -> None:
        found.key, _ = pair._decrypt_key(data, path, passphrase)

    if found.passes(take, path):
        weak = keys.weakness(found.key)
        if weak is not None and not found.chain:  # of a certificate's key it is said once, below
            found.refuse(f"{path}: the key is too weak: {weak}; make a new one")


# --- judging ---------------------------------------------------------------------------------------------


def _judge_chain(found: Examination, path: Path, key_path: Path | None, now: datetime) -> None:
    chain, key = found.chain, found.key

    def belongs() -> None:
        assert key is not None
        assert key_path is not None
        if not keys.belongs(key, chain[0].public_key()):
            raise CertificateError(pair._mismatch(chain, path, key, key_path))

    found.passes(lambda: pair._check_strength(chain, path), path)
    if key is not None:
        found.passes(belongs, path)
    found.passes(lambda: pair._check_purpose(chain[0], path), path)
    found.passes(lambda: pair._check_order(chain, path), path)
    found.passes(lambda: pair._check_validity(chain[0], path, now), path)


def _warn(found: Examination, path: Path, now: datetime) -> None:
    leaf = found.chain[0]
    warn = found.warnings.append
    left = leaf.not_valid_after_utc - now
    if (
        timedelta(0)
        <= left
        <= min(EXPIRY_WARNING, (leaf.not_valid_after_utc - leaf.not_valid_before_utc) / 3)
    ):
        warn(f"{path}: expires on {leaf.not_valid_after_utc:%Y-%m-%d %H:%M} UTC; get its successor now")
    for position, certificate in enumerate(found.chain[1:], 2):
        if certificate.not_valid_after_utc < leaf.not_valid_after_utc:
            warn(
                f"{path}: certificate {position} of the chain expires before the server's, on"
                f" {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC; get a chain that lasts"
            )
    if found.passes(lambda: pair.names_of(leaf), path):
        _warn_of_extensions(found, path)
    root = found.chain[-1]
    if len(found.chain) > 1 and is_self_signed(root):
        size = len(root.public_bytes(serialization.Encoding.DER))
        warn(
            f"{path}: the root is in the file, which costs {size / 1024:.1f} KiB a connection; leave it out,"
            " as clients that trust it have it"
        )
    elif is_self_signed(leaf):
        warn(f"{path}: is self-signed, so clients can trust this one certificate alone, or its pin")


def _warn_of_extensions(found: Examination, path: Path) -> None:
    leaf = found.chain[0]
    warn = found.warnings.append
    if not pair.names_of(leaf):
        warn(
            f"{path}: names no host (SubjectAltName), so clients refuse it; get one with the names that they"
            " connect to"
        )
    for extension in leaf.extensions:
        if isinstance(extension.value, x509.TLSFeature):
            warn(f"{path}: asks for a stapled OCSP answer, which is not sent; get one without must-staple")
        elif isinstance(extension.value, x509.AuthorityInformationAccess):
            hints = [each.access_method for each in extension.value]
            if AuthorityInformationAccessOID.CA_ISSUERS in hints and len(found.chain) == 1:
                warn(
                    f"{path}: holds the certificate without its issuer's, which most clients need;"
                    " use the file with the full chain"
                )


def _check_host(found: Examination, path: Path, host: str) -> None:
    def check() -> None:
        names = pair.names_of(found.chain[0])
        if not any(covers(name, host) for name in names):
            shown = escape_text(", ".join(names[:10]), _MAX_SHOWN)
            others = f"; it is for {shown}" if names else ""
            raise CertificateError(f"{path}: is not for {host}, so its clients refuse it{others}")

    found.passes(check, path)
