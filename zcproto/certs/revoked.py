"""Which certificates a list of revoked ones (CRL, RFC 5280 section 5) names.

What it decides: how one certificate is told from all others: by its issuer and its serial number
(RFC 5280 section 4.1.2.2).

Must not know: who holds them, whether the list is signed by whom it should be (OpenSSL sees to that).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from cryptography import x509

from zcproto.certs import files
from zcproto.certs.pair import UNREADABLE
from zcproto.errors import CertificateError

Issue = tuple[bytes, int]
"""The DER of the issuer's name, and the serial number."""

_BLOCK: Final = re.compile(rb"-----BEGIN X509 CRL-----.+?-----END X509 CRL-----", re.DOTALL)


def crl_blocks(path: Path) -> list[bytes]:
    """The lists in a PEM file, as they are written there. Raises CertificateError if it cannot be read."""
    return _BLOCK.findall(files.read_certificate_file(path))


def revoked_in(path: Path) -> frozenset[Issue]:
    """Every certificate that the lists in a PEM file name. Raises CertificateError if one cannot be read."""
    found: set[Issue] = set()
    for block in crl_blocks(path):
        try:
            revoked = x509.load_pem_x509_crl(block)
            issuer = revoked.issuer.public_bytes()
            found.update((issuer, one.serial_number) for one in revoked)
        except UNREADABLE as error:
            raise CertificateError(
                f"{path}: holds a list of revoked certificates that cannot be read; get it anew"
            ) from error
    return frozenset(found)


def issue_of(certificate_der: bytes) -> Issue:
    """What a list would name a certificate by."""
    certificate = x509.load_der_x509_certificate(certificate_der)
    return certificate.issuer.public_bytes(), certificate.serial_number
