"""Answers to the challenges with which a CA checks that this server has a name, as files in a folder.

    challenges/tls-alpn-01.NAME.pem     a certificate for the TLS handshake of RFC 8737, and its key
    challenges/http-01.TOKEN            a text for the request of RFC 8555 section 8.3

The process that orders writes them before it lets the CA check. All processes of the server read them at the CA's
request, so that it may reach any worker.

Rules:
- A file exists only while an order is in progress. What a crash has left is deleted by the next order.
- The name and the token come from the network: no other file can be read with them.

Must not know: how certificates are ordered, connections.
"""

from __future__ import annotations

import contextlib
import re
import ssl
from datetime import datetime, timedelta
from functools import lru_cache
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from zcproto.certs import files, keys
from zcproto.certs.lifecycle import CLOCK_SKEW
from zcproto.certs.names import check_name, general_names, is_address
from zcproto.common.files import UnusableFileError, file_errors, read_file, replace_file
from zcproto.common.watcher import file_identity
from zcproto.config import Config
from zcproto.errors import CertificateError
from zcproto.tls.client_hello import ACME_PROTOCOL
from zcproto.tls.context import server_context

HTTP_PREFIX: Final = "/.well-known/acme-challenge/"
MAX_ANSWER_BYTES: Final = 1_024
"""Of a text: a token and a thumbprint, each of at most a hundred or so characters."""

_TOKEN: Final = re.compile(r"[A-Za-z0-9_-]{1,128}")
_SERVER_NAME: Final = re.compile(r"[a-z0-9._-]{1,253}")
_IDENTIFIER: Final = x509.ObjectIdentifier("1.3.6.1.5.5.7.1.31")  # RFC 8737 section 6.1, acmeIdentifier
_LIFETIME: Final = timedelta(days=1)
_DER_OCTET_STRING: Final = 0x04


class ChallengeFolder:
    """The answers of one server."""

    def __init__(self, directory: Path) -> None:
        """`directory` is the folder of certificates."""
        self._folder = directory / "acme" / "challenges"

    # --- for the process that orders

    def put_text(self, token: str, text: str) -> None:
        """Answer requests for a token by HTTP. Raises CertificateError."""
        if not _TOKEN.fullmatch(token):
            raise CertificateError("the CA has sent a token that is not base64url")
        self._put(self._text_path(token), text.encode("ascii"))

    def put_certificate(self, name: str, digest: bytes, now: datetime) -> None:
        """Answer handshakes for a name with the SHA-256 of the key authorization. Raises CertificateError."""
        self._put(self._certificate_path(server_name_of(name)), _challenge_pem(name, digest, now))

    def _put(self, path: Path, data: bytes) -> None:
        files.make_folder(self._folder)
        with file_errors(path, "written", CertificateError):
            replace_file(path, data)

    def clear(self) -> None:
        """Delete all answers."""
        with contextlib.suppress(OSError):
            for path in self._folder.iterdir():
                path.unlink(missing_ok=True)

    # --- for all processes

    def text(self, token: str) -> bytes | None:
        """Return the answer to a request by HTTP, or None."""
        if not _TOKEN.fullmatch(token):
            return None
        try:
            data, _ = read_file(self._text_path(token), MAX_ANSWER_BYTES)
        except (OSError, UnusableFileError):
            return None
        return data

    def context(self, server_name: str | None) -> ssl.SSLContext | None:
        """Return the context of a handshake with this server name; None if there is no answer for it."""
        if server_name is None or not _SERVER_NAME.fullmatch(server_name):
            return None
        path = self._certificate_path(server_name)
        identity = file_identity(path)
        return _context(path, identity) if identity else None

    def _text_path(self, token: str) -> Path:
        return self._folder / f"http-01.{token}"

    def _certificate_path(self, server_name: str) -> Path:
        return self._folder / f"tls-alpn-01.{server_name}.pem"


def challenge_folder(config: Config) -> ChallengeFolder | None:
    """Return where the answers of this configuration are; None if it orders no certificates."""
    certificates = config.certificates
    return ChallengeFolder(certificates.directory) if certificates.mode == "acme" else None


def server_name_of(name: str) -> str:
    """Return the server name with which a CA asks for a name: for an address its reverse name (RFC 8738)."""
    return ip_address(name).reverse_pointer if is_address(name) else check_name(name)


@lru_cache(maxsize=16)
def _context(path: Path, identity: tuple[int, ...]) -> ssl.SSLContext | None:
    """Return the context with the certificate of a file. `identity` makes a changed file another one."""
    try:
        return server_context([(path, path)], (ACME_PROTOCOL,))
    except CertificateError:  # deleted meanwhile
        return None


def _challenge_pem(name: str, digest: bytes, now: datetime) -> bytes:
    """Return the certificate of RFC 8737 section 3 and its key, as PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "ACME challenge")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + _LIFETIME)
        .add_extension(x509.SubjectAlternativeName(general_names([name])), critical=False)
        .add_extension(
            x509.UnrecognizedExtension(_IDENTIFIER, bytes((_DER_OCTET_STRING, len(digest))) + digest),
            critical=True,
        )
        .sign(key, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM) + keys.key_pem(key)
