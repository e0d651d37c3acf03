"""TLS contexts: version 1.3 alone, no tickets, no compression, no key log."""

from __future__ import annotations

import ssl
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from zcproto.errors import CertificateError, TlsError

SUITES: Final = ("TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256")
"""The suites of the contract, in the order in which a server prefers them."""


def server_context(
    pairs: Iterable[tuple[Path, Path]], protocols: Sequence[str], suites: Sequence[str] = SUITES
) -> ssl.SSLContext:
    """A server's context with one certificate and key for each kind of key.

    `protocols` are the ALPN names in the server's order. Raises CertificateError if a pair does not load, and
    TlsError if this OpenSSL would prefer a suite outside the contract.
    """
    # Not create_default_context: that one honours SSLKEYLOGFILE, which a server must never do.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _restrict(context, suites)
    # A resumed handshake saves less than the tickets cost, and a ticket would outlive a rotation.
    # OP_NO_TICKET does not stop TLS 1.3 tickets; this does.
    context.num_tickets = 0
    context.options |= ssl.OP_CIPHER_SERVER_PREFERENCE | ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(list(protocols))
    for certificate, key in pairs:
        try:
            # A passphrase would be asked for on the terminal: an empty one makes it an error instead.
            context.load_cert_chain(certificate, key, password="")
        except (ssl.SSLError, OSError, ValueError) as error:
            reason = (
                getattr(error, "reason", None) or getattr(error, "strerror", None) or type(error).__name__
            )
            raise CertificateError(f"{certificate}: cannot be used with {key}: {reason}") from error
    return context


def client_context(
    *, ca_file: Path | None = None, verify: bool = True, protocols: Sequence[str] = ("zcp/1",)
) -> ssl.SSLContext:
    """A client's context: trust in a CA file, or in the system's store if none is named.

    With `verify` off the chain and the name are not checked here; the caller must check a pin instead.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _restrict(context, SUITES)
    context.set_alpn_protocols(list(protocols))
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif ca_file is not None:
        try:
            context.load_verify_locations(cafile=ca_file)
        except (ssl.SSLError, OSError) as error:
            raise CertificateError(f"{ca_file}: no CA certificate could be read from it") from error
    else:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    return context


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
