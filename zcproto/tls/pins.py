"""Compute, parse and match certificate pins: SHA-256 of the public key (RFC 7469 section 2.4) or certificate."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterable
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from zcproto.errors import TlsError

KEY_PREFIX: Final = "sha256/"
CERTIFICATE_PREFIX: Final = "cert-sha256/"
MAX_PINS: Final = 64


def key_pin(public_key: CertificatePublicKeyTypes) -> str:
    """Return the pin of a public key: `sha256/` and base64 of SHA-256 of its SubjectPublicKeyInfo."""
    # The key is encoded again: if its encoding in a certificate is unusual, such as a compressed point, it has the
    # pin of the usual one. This is what clients compare with, so servers must announce it too.
    spki = public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return KEY_PREFIX + base64.b64encode(hashlib.sha256(spki).digest()).decode()


def certificate_pin(certificate_der: bytes) -> str:
    """Return the pin of a whole certificate: `cert-sha256/` and base64 of SHA-256 of its DER."""
    return CERTIFICATE_PREFIX + base64.b64encode(hashlib.sha256(certificate_der).digest()).decode()


def parse_pins(pins: Iterable[str] | str) -> frozenset[str]:
    """Parse pins. A string may hold several, separated by commas or white space.

    Raises TlsError for a malformed or missing pin: none is ever ignored.
    """
    if isinstance(pins, str):
        pins = pins.replace(",", " ").split() or [pins]
    parsed = frozenset(pins)
    if len(parsed) > MAX_PINS:
        raise TlsError("pin_malformed", f"more than {MAX_PINS} pins")
    for pin in parsed:
        prefix, _, digest = pin.partition("/")
        try:
            raw = base64.b64decode(digest)
        except (binascii.Error, ValueError):
            raw = b""
        well_formed = len(raw) == hashlib.sha256().digest_size
        # Pins are compared as text, so a non-canonical encoding would never match.
        canonical = base64.b64encode(raw).decode() == digest
        if prefix + "/" not in (KEY_PREFIX, CERTIFICATE_PREFIX) or not well_formed or not canonical:
            raise TlsError(
                "pin_malformed",
                f"{pin[:80]!r} is not sha256/BASE64 or cert-sha256/BASE64; zcproto cert pins prints pins",
            )
    return parsed


def pins_match(certificate_der: bytes, pins: frozenset[str]) -> bool:
    """Return True if a certificate matches one of the pins."""
    if certificate_pin(certificate_der) in pins:
        return True
    try:
        return key_pin(x509.load_der_x509_certificate(certificate_der).public_key()) in pins
    except (ValueError, UnsupportedAlgorithm):  # an unreadable key has no pin
        return False
