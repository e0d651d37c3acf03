"""Reads files of certificate revocation lists (CRL, RFC 5280 section 5).

Decides: what identifies a certificate, namely its issuer and its serial number (RFC 5280 section 4.1.2.2).

Must not know: who owns the certificates, whether a list has a valid signature (OpenSSL checks that).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from cryptography import x509

from zcproto.certs import files
from zcproto.certs.pair import parsing
from zcproto.errors import CertificateError

CertificateId = tuple[bytes, int]
"""The DER of the issuer's name, and the serial number."""

_BLOCK: Final = re.compile(rb"-----BEGIN X509 CRL-----.+?-----END X509 CRL-----", re.DOTALL)


def read_lists(path: Path) -> list[x509.CertificateRevocationList]:
    """Return the lists in a PEM file, at least one. Raises CertificateError if it cannot be read."""
    blocks = _BLOCK.findall(files.read_certificate_file(path))
    if not blocks:
        raise CertificateError(f"{path}: contains no revocation list in PEM; replace the file")
    with parsing(path, "revocation list"):
        return list(map(x509.load_pem_x509_crl, blocks))


def revoked_in(path: Path) -> frozenset[CertificateId]:
    """Return every certificate in the lists of a PEM file. Raises CertificateError if it cannot be read."""
    lists = read_lists(path)
    with parsing(path, "revocation list"):
        return frozenset((crl.issuer.public_bytes(), entry.serial_number) for crl in lists for entry in crl)


def certificate_id(certificate_der: bytes) -> CertificateId:
    """Return what identifies a certificate in a list."""
    certificate = x509.load_der_x509_certificate(certificate_der)
    return certificate.issuer.public_bytes(), certificate.serial_number
