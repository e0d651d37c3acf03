"""TLS contexts: version 1.3 alone, no tickets, no compression; a key log for clients that ask for one.

What a server demands of its clients' certificates, where it asks for them: a chain to a certificate of the client
CA's file, which may be an issuing CA without its root (whoever names one does not want its sisters); valid dates;
a purpose that allows TLS clients; and, with a revocation list, that the list is good and does not name the leaf.
Not VERIFY_X509_STRICT: it refuses certificates that RFC 5280 would have otherwise but that are no danger, a CA
whose basic constraints are not marked critical or a leaf without its issuer's key id, as the CAs of many companies
have made them for years. Chain, signatures, key sizes and purposes are checked without it.

A context in use is never loaded into: build another one, let it prove itself (`proof.py`), put it in the place.
"""

from __future__ import annotations

import os
import shlex
import ssl
import stat
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final, Literal, Protocol

from zcproto.errors import CertificateError, TlsError
from zcproto.tls.key_log import log_keys
from zcproto.tls.suites import SUITES

MAX_KEY_FILE: Final = 1 << 20
_OTHERS: Final = 0o077

ClientAuth = Literal["off", "optional", "required"]
Passphrase = str | bytes | Callable[[], str | bytes]


class PairOfFiles(Protocol):
    """A certificate's file, with its chain, and its key's, which may be the same."""

    @property
    def certificate(self) -> Path: ...

    @property
    def key(self) -> Path: ...


Pair = PairOfFiles | tuple[Path, Path] | tuple[Path, Path, bytes | None]
"""What a server is to show. A passphrase is the third of a tuple, or the attribute `passphrase`."""


class ServerContext(ssl.SSLContext):
    """A server's context. `leaves` are the SHA-256 of the certificates (DER) that it has proved to show."""

    leaves: frozenset[bytes] = frozenset()


def server_context(
    pairs: Iterable[Pair],
    protocols: Sequence[str],
    suites: Sequence[str] = SUITES,
    *,
    client_auth: ClientAuth = "off",
    client_ca: Path | bytes | None = None,
    client_crl: Path | bytes | None = None,
) -> ServerContext:
    """A server's context with one certificate and key for each kind of key.

    `protocols` are the ALPN names in the server's order. With `client_auth` not off, `client_ca` is the PEM file
    of the CAs whose client certificates are believed, or what is in it, and `client_crl` their revocation lists.
    Raises CertificateError if something does not load, and TlsError if this OpenSSL would prefer a suite outside
    the contract.
    """
    # Not create_default_context: that one honours SSLKEYLOGFILE, which a server must never do.
    context = ServerContext(ssl.PROTOCOL_TLS_SERVER)
    _restrict(context, suites)
    # A resumed handshake saves less than the tickets cost, and a ticket would outlive a rotation.
    # OP_NO_TICKET does not stop TLS 1.3 tickets; this does.
    context.num_tickets = 0
    context.options |= ssl.OP_CIPHER_SERVER_PREFERENCE | ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(list(protocols))
    for pair in pairs:
        _load_pair(context, *_files_of(pair))
    if client_auth != "off":
        _ask_for_certificates(context, client_auth, client_ca, client_crl)
    return context


def _files_of(pair: Pair) -> tuple[Path, Path, bytes | None]:
    if isinstance(pair, tuple):
        return pair[0], pair[1], pair[2] if len(pair) == 3 else None
    return pair.certificate, pair.key, getattr(pair, "passphrase", None)


def _load_pair(context: ssl.SSLContext, certificate: Path, key: Path, passphrase: Passphrase | None) -> None:
    try:
        # A passphrase would be asked for on the terminal: an empty one makes it an error instead.
        context.load_cert_chain(certificate, key, password="" if passphrase is None else passphrase)
    except (ssl.SSLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or type(error).__name__
        if isinstance(error, ssl.SSLError) and error.reason is None and _is_encrypted(key):
            reason = "the key is encrypted, and its passphrase is " + (
                "not given" if passphrase is None else "another one"
            )
        raise CertificateError(f"{certificate}: cannot be used with {key}: {reason}") from error


def _is_encrypted(key: Path) -> bool:
    try:
        with key.open("rb") as file:
            return b"ENCRYPTED" in file.read(MAX_KEY_FILE)
    except OSError:
        return False  # gone since


def _ask_for_certificates(
    context: ssl.SSLContext, client_auth: ClientAuth, ca: Path | bytes | None, crl: Path | bytes | None
) -> None:
    if ca is None:
        raise CertificateError("client certificates cannot be checked without the CA that issued them")
    _load_trusted(context, ca, "x509", "no CA certificate")
    if crl is not None:
        _load_trusted(context, crl, "crl", "no certificate revocation list")
        context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF
    context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN
    context.verify_mode = ssl.CERT_REQUIRED if client_auth == "required" else ssl.CERT_OPTIONAL


def _load_trusted(context: ssl.SSLContext, source: Path | bytes, kind: str, missing: str) -> None:
    """Load the PEM in a file. The ssl module takes revocation lists from files only, so bytes become one."""
    before = context.cert_store_stats()[kind]
    try:
        if isinstance(source, bytes):
            with tempfile.NamedTemporaryFile(prefix="zcproto-", suffix=".pem") as file:
                file.write(source)
                file.flush()
                context.load_verify_locations(cafile=file.name)
        else:
            context.load_verify_locations(cafile=source)
        found = context.cert_store_stats()[kind] > before
    except (ssl.SSLError, OSError) as error:
        why = f": {error.strerror}" if not isinstance(error, ssl.SSLError) else ""
        raise CertificateError(f"{_called(source)}: {missing} could be read from it{why}") from error
    if not found:
        raise CertificateError(f"{_called(source)}: {missing} is in it")


def _called(source: Path | bytes) -> str:
    return "the PEM given" if isinstance(source, bytes) else str(source)


def client_context(
    *,
    ca_file: Path | None = None,
    verify: bool = True,
    protocols: Sequence[str] = ("zcp/1",),
    certificate: Path | None = None,
    key: Path | None = None,
    passphrase: Passphrase | None = None,
    key_log: Path | None = None,
) -> ssl.SSLContext:
    """A client's context: trust in a CA file, or in the system's store if none is named.

    With `verify` off the chain and the name are not checked here; the caller must check a pin instead.
    `certificate` is shown to servers that ask for one; its key may be in the same file. A `passphrase` that is a
    function is called only for a key that is encrypted. With `key_log` the secrets of all connections are
    appended to that file. Raises CertificateError for a file that cannot be used, ConfigError for the key log.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _restrict(context, SUITES)
    context.set_alpn_protocols(list(protocols))
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif ca_file is not None:
        _load_trusted(context, ca_file, "x509", "no CA certificate")
    else:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    if certificate is not None:
        key = certificate if key is None else key
        require_private(key)
        _load_pair(context, certificate, key, passphrase)
    if key_log is not None:
        log_keys(context, key_log)
    return context


def require_private(key: Path) -> None:
    """Raise CertificateError unless a key's file is its owner's alone, who is this user or root."""
    try:
        status = key.stat()
    except (OSError, ValueError) as error:
        raise CertificateError(
            f"{key}: cannot be read: {getattr(error, 'strerror', None) or error}; check the path"
        ) from error
    if not stat.S_ISREG(status.st_mode):  # a FIFO would wait for ever
        raise CertificateError(f"{key}: is not a regular file; name the PEM file of the key")
    if status.st_uid not in (0, os.geteuid()):
        raise CertificateError(
            f"{key}: belongs to another user (uid {status.st_uid});"
            f" run `chown {os.geteuid()} {shlex.quote(str(key))}`"
        )
    if status.st_mode & _OTHERS:
        raise CertificateError(
            f"{key}: others can read or change this key (mode {stat.S_IMODE(status.st_mode):04o});"
            f" run `chmod 600 {shlex.quote(str(key))}`"
        )


def _restrict(context: ssl.SSLContext, suites: Sequence[str]) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.options |= ssl.OP_NO_COMPRESSION
    set_suites = getattr(context, "set_ciphersuites", None)  # Python 3.15
    if set_suites is not None:
        set_suites(":".join(suites))
    check_suite_order(
        [cipher["name"] for cipher in context.get_ciphers() if cipher["name"].startswith("TLS_")]
    )


def can_choose_suites() -> bool:
    """Whether this Python can set the suites of TLS 1.3, and their order (3.15 and later)."""
    return hasattr(ssl.SSLContext, "set_ciphersuites")


def check_suite_order(names: Sequence[str]) -> None:
    """Refuse an OpenSSL that would choose another suite for a client that offers one of ours.

    Reading the ClientHello keeps AES_128 out only because OpenSSL prefers ours to it. Raises TlsError.
    """
    ours = [name in SUITES for name in names]
    if not any(ours) or ours != sorted(ours, reverse=True):
        raise TlsError(
            "wrong_parameters", f"this OpenSSL prefers suites that are not allowed: {', '.join(names)}"
        )


def suites_are_allowed(tls: ssl.SSLObject, suites: frozenset[str]) -> bool:
    """Whether a finished handshake agreed on TLS 1.3 and on one of the suites."""
    cipher = tls.cipher()
    return tls.version() == "TLSv1.3" and cipher is not None and cipher[0] in suites
