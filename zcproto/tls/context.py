"""Build TLS contexts, and select one by server name: TLS 1.3 only, no tickets, no compression.

A server that requests client certificates requires a chain to a certificate in the client CA file, which may be
an issuing CA without its root (so that other CAs of that root are not trusted), valid dates, a purpose that
allows TLS clients and, with a CRL, that the CRL is valid and does not list the leaf. VERIFY_X509_STRICT is not
used: it refuses harmless deviations from RFC 5280 common in corporate CAs, such as basic constraints not marked
critical or a missing authority key id. Chain, signatures, key sizes and purposes are checked without it.

Never load into a context in use: build a new one, test it (`proof.py`), and swap it in.
"""

from __future__ import annotations

import errno
import os
import ssl
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from zcproto.common.files import (
    NO_LINKS,
    NO_WAIT,
    OPEN,
    UnusableFileError,
    check_access,
    file_errors,
    read_file,
)
from zcproto.common.text import escape_text
from zcproto.errors import CertificateError, ConfigError, TlsError

SUITES: Final = ("TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256")
"""The two cipher suites of ZCP/1 (zcp1.md, section 4), with 256-bit keys, in the server's order of preference."""

MAX_KEY_FILE: Final = 1 << 20

_NO_SITES: Final[Mapping[str, ssl.SSLContext]] = {}

Passphrase = str | bytes | Callable[[], str | bytes]


Pair = tuple[Path, Path] | tuple[Path, Path, bytes | None]
"""The file of a certificate with its chain, that of its key, which may be the same, and the key's passphrase."""


class ServerContext(ssl.SSLContext):
    """A server context. `leaves` are the SHA-256 of its certificates (DER), verified by a handshake."""

    leaves: frozenset[bytes] = frozenset()


class SiteContexts:
    """The contexts of one server: `default`, and those of `by_name` with exact names and `*.` wildcards.

    The names are in normal form, as the configuration has them. Immutable: replace the whole instance.
    """

    def __init__(self, default: ssl.SSLContext, by_name: Mapping[str, ssl.SSLContext] = _NO_SITES) -> None:
        self.default = default
        self._by_name = dict(by_name)

    def choose(self, server_name: str | None) -> ssl.SSLContext:
        """Return the context for a requested server name (SNI, RFC 6066 section 3) in lower case, or for None.

        The exact name precedes the wildcard of its parent: a star stands for one left-most label, as in
        certificates (RFC 9525 section 6.3). Clients with an unknown name, or none, get the default certificate and
        judge it themselves: an unrecognized_name alert would reveal the known names to scanners, and would lock out
        clients that connect to an address, through a tunnel or by a private name.
        """
        by_name = self._by_name
        if server_name is None or not by_name:
            return self.default
        found = by_name.get(server_name) or by_name.get("*." + server_name.partition(".")[2])
        return self.default if found is None else found


@dataclass(frozen=True, slots=True)
class ClientTrust:
    """The files with which client certificates are verified."""

    ca: Path
    """PEM, with the certificates of the trusted CAs."""
    crl: Path | None = None
    """PEM, with one or several revocation lists."""
    is_required: bool = False
    """Whether clients without a certificate are refused."""


def server_context(
    pairs: Iterable[Pair],
    protocols: Sequence[str],
    clients: ClientTrust | None = None,
) -> ServerContext:
    """Return a server context with one certificate and key per key type.

    Args:
        pairs: certificates to serve.
        protocols: ALPN names in the server's order.
        clients: how to verify client certificates; None requests none.

    Raises:
        CertificateError: a file cannot be loaded.
        TlsError: this OpenSSL prefers a suite that is not allowed.
    """
    # Not create_default_context: it honours SSLKEYLOGFILE, which a server must never do.
    context = ServerContext(ssl.PROTOCOL_TLS_SERVER)
    _restrict(context)
    # A resumed handshake saves less than the tickets cost, and a ticket would outlive a rotation.
    # OP_NO_TICKET does not stop TLS 1.3 tickets; this does.
    context.num_tickets = 0
    context.options |= ssl.OP_CIPHER_SERVER_PREFERENCE | ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(list(protocols))
    for pair in pairs:
        _load_pair(context, *pair)
    if clients is not None:
        _ask_for_certificates(context, clients)
    return context


def _load_pair(
    context: ssl.SSLContext, certificate: Path, key: Path, passphrase: Passphrase | None = None
) -> None:
    try:
        # Without a passphrase OpenSSL would prompt on the terminal; an empty one raises instead.
        context.load_cert_chain(certificate, key, password="" if passphrase is None else passphrase)
    except (ssl.SSLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or type(error).__name__
        if isinstance(error, ssl.SSLError) and error.reason is None and _is_encrypted(key):
            reason = (
                f"the key is encrypted, and its passphrase is {'missing' if passphrase is None else 'wrong'}"
            )
        raise CertificateError(f"{certificate}: cannot be used with {key}: {reason}") from error


def _is_encrypted(key: Path) -> bool:
    try:
        with key.open("rb") as file:
            return b"ENCRYPTED" in file.read(MAX_KEY_FILE)
    except OSError:
        return False  # deleted meanwhile


def _ask_for_certificates(context: ssl.SSLContext, clients: ClientTrust) -> None:
    _load_trusted(context, clients.ca, "x509", "no CA certificate")
    if clients.crl is not None:
        _load_trusted(context, clients.crl, "crl", "no certificate revocation list")
        context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF
    context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN
    context.verify_mode = ssl.CERT_REQUIRED if clients.is_required else ssl.CERT_OPTIONAL


def _load_trusted(context: ssl.SSLContext, path: Path, kind: str, missing: str) -> None:
    before = context.cert_store_stats()[kind]
    try:
        context.load_verify_locations(cafile=path)
    except (ssl.SSLError, OSError) as error:
        why = f": {error.strerror}; check the path"
        if isinstance(error, ssl.SSLError):
            why = "; name a PEM file"
        raise CertificateError(f"{path}: {missing} could be read from it{why}") from error
    if context.cert_store_stats()[kind] == before:
        raise CertificateError(f"{path}: contains {missing}")


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
    """Return a client context that trusts a CA file, or the system's store without one.

    With `verify` off, chain and name are not checked, and the caller must check a pin. `certificate` is
    presented to servers that request one; its key may be in the same file. A callable `passphrase` is called
    only for an encrypted key. With `key_log` the secrets of all connections are appended to that file.

    Raises:
        CertificateError: a file cannot be used.
        ConfigError: the key log cannot be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _restrict(context)
    context.set_alpn_protocols(list(protocols))
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif ca_file is not None:
        if not ca_file.exists():
            raise CertificateError(
                f"{escape_text(str(ca_file))}: does not exist; copy the CA of the server to this path (zcproto cert"
                " export-ca writes it), or check the path"
            )
        _load_trusted(context, ca_file, "x509", "no CA certificate")
    else:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    if certificate is not None:
        key = certificate if key is None else key
        _require_private(key)
        _load_pair(context, certificate, key, passphrase)
    if key_log is not None:
        log_keys(context, key_log)
    return context


def log_keys(context: ssl.SSLContext, path: Path) -> None:
    """Append the secrets of a context's connections to a file that only this user can access.

    It decrypts captured traffic (spec/wireshark). It is written only to an explicitly configured file, never
    because of SSLKEYLOGFILE, and never by a server.

    The file is created here with mode 0600, because the ssl module would use the umask. Raises ConfigError if
    others can access the file or it cannot be written.
    """
    try:
        _make_private(path)
        context.keylog_filename = str(path)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno == errno.ELOOP:
            raise ConfigError([f"{path}: is a link; give the path of the key log itself"]) from error
        reason = getattr(error, "strerror", None) or error
        raise ConfigError([f"{path}: the key log cannot be written: {reason}; check the path"]) from error


def _make_private(path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | NO_LINKS | NO_WAIT | OPEN, 0o600)
    try:
        status = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise UnusableFileError(path, "the key log is not a regular file; give another path")
    check_access(path, status)


def _require_private(key: Path) -> None:
    """Raise CertificateError unless only this user or root can access the file of a key."""
    with file_errors(key, "read", CertificateError, fix="check the path"):
        try:
            read_file(key, MAX_KEY_FILE)
        except ValueError as error:
            raise OSError(errno.EINVAL, "the path contains a NUL") from error


def _restrict(context: ssl.SSLContext) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.options |= ssl.OP_NO_COMPRESSION
    set_suites = getattr(context, "set_ciphersuites", None)  # Python 3.15
    if set_suites is not None:
        set_suites(":".join(SUITES))
    check_suite_order(
        [cipher["name"] for cipher in context.get_ciphers() if cipher["name"].startswith("TLS_")]
    )


def check_suite_order(names: Sequence[str]) -> None:
    """Raise TlsError if OpenSSL could choose another suite for a client that offers an allowed one.

    Judging the ClientHello excludes AES_128 only because OpenSSL prefers the allowed suites to it.
    """
    ours = [name in SUITES for name in names]
    if not any(ours) or ours != sorted(ours, reverse=True):
        raise TlsError(
            "wrong_parameters", f"this OpenSSL prefers suites that are not allowed: {', '.join(names)}"
        )


def suites_are_allowed(tls: ssl.SSLObject) -> bool:
    """Return True if a completed handshake negotiated TLS 1.3 and one of the two suites."""
    cipher = tls.cipher()
    return tls.version() == "TLSv1.3" and cipher is not None and cipher[0] in SUITES
