"""Decides which keys are good enough, makes them, and proves that a key belongs to a certificate.

Rules: RSA from 2048 bits, ECDSA on P-256, P-384 or P-521 (BCP 195 section 4.5; RFC 8446 section 4.2.3 has
no other curve for ECDSA). There are two families, RSA and ECDSA: one certificate of each serves every
client.

Must not know: files, configuration. Nothing here prints or returns a key as text but `key_pem`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from zcproto.errors import CertificateError

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey

OWN_KEY_TYPES = ("rsa-2048", "rsa-3072", "rsa-4096", "ecdsa-p256", "ecdsa-p384")
"""The key types that are made here. Others may be loaded."""

MIN_RSA_BITS = 2048
_RSA_EXPONENT = 65537
_CURVES: dict[str, tuple[str, type[ec.EllipticCurve]]] = {
    "ecdsa-p256": ("secp256r1", ec.SECP256R1),
    "ecdsa-p384": ("secp384r1", ec.SECP384R1),
    "ecdsa-p521": ("secp521r1", ec.SECP521R1),
}
_KEY_TYPE_OF_CURVE = {curve: key_type for key_type, (curve, _) in _CURVES.items()}


def check_own_key_types(key_types: Sequence[str]) -> None:
    """Raises CertificateError unless these are one or two key types that are made here, one a family."""
    if not key_types:
        raise CertificateError("no key type is given; one is needed, such as 'rsa-4096'")
    families: dict[str, str] = {}
    for key_type in key_types:
        if key_type not in OWN_KEY_TYPES:
            raise CertificateError(_unknown_key_type(key_type))
        other = families.get(family(key_type))
        if other is not None:
            raise CertificateError(
                f"the key types {other!r} and {key_type!r} are of one family; give one of each family"
            )
        families[family(key_type)] = key_type


def _unknown_key_type(key_type: str) -> str:
    choice = ", ".join(repr(known) for known in OWN_KEY_TYPES)
    size = re.fullmatch(r"rsa-([0-9]{1,5})", key_type)
    if size and int(size[1]) < MIN_RSA_BITS:
        return f"key type {key_type!r} is too weak: RSA has at least {MIN_RSA_BITS} bits; use one of {choice}"
    return f"key type {key_type!r} is not made here; use one of {choice}"


def family(key_type: str) -> str:
    """`rsa` or `ecdsa`."""
    return key_type.partition("-")[0]


def generate(key_type: str) -> PrivateKey:
    """A new key. RSA takes from 0.1 s to many seconds; it is made with the GIL released."""
    if family(key_type) == "rsa":
        return rsa.generate_private_key(_RSA_EXPONENT, int(key_type.partition("-")[2]))
    return ec.generate_private_key(_CURVES[key_type][1]())


def key_pem(key: PrivateKey) -> bytes:
    """The key as PKCS#8 PEM, not encrypted: a server starts with nobody there to type a passphrase."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def key_type_of(key: object) -> str:
    """The key type of a private or public key; for one that is no RSA or EC key, what it is instead."""
    if isinstance(key, rsa.RSAPrivateKey | rsa.RSAPublicKey):
        return f"rsa-{key.key_size}"
    if isinstance(key, ec.EllipticCurvePrivateKey | ec.EllipticCurvePublicKey):
        return _KEY_TYPE_OF_CURVE.get(key.curve.name, f"ecdsa-{key.curve.name}")
    return type(key).__name__.removesuffix("PrivateKey").removesuffix("PublicKey").lower()


def weakness(key: object) -> str | None:
    """Why this key must not be served, or None."""
    key_type = key_type_of(key)
    if isinstance(key, rsa.RSAPrivateKey | rsa.RSAPublicKey):
        if key.key_size < MIN_RSA_BITS:
            return f"the RSA key has {key.key_size} bits; it needs at least {MIN_RSA_BITS}"
        return None
    if key_type in _CURVES:
        return None
    return f"the key is {key_type}; use RSA of {MIN_RSA_BITS} bits or more, or ECDSA on P-256, P-384 or P-521"


def belongs(key: PrivateKey, public_key: object) -> bool:
    """Whether `key` signs for `public_key`.

    Comparing the public numbers would pass a key whose private half is damaged. For ECDSA a signature is made and
    verified. For RSA the private numbers are held against the public ones (RFC 8017 section 3.2), in 0.1 ms: a
    signature would keep all other threads waiting for 5 ms at 4096 bits, and OpenSSL's own check of a loaded key,
    which looks for primes too, takes 250 ms.
    """
    if isinstance(key, rsa.RSAPrivateKey) and isinstance(public_key, rsa.RSAPublicKey):
        numbers = key.private_numbers()
        return numbers.public_numbers == public_key.public_numbers() and _fit_together(numbers)
    if isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(public_key, ec.EllipticCurvePublicKey):
        message = b"zcproto key check"
        try:
            signature = key.sign(message, ec.ECDSA(hashes.SHA256()))
            public_key.verify(signature, message, ec.ECDSA(hashes.SHA256()))
        except (InvalidSignature, ValueError):
            return False
        return True
    return False


def _fit_together(numbers: rsa.RSAPrivateNumbers) -> bool:
    """Whether the numbers of an RSA key with two primes are what follows from its modulus and exponents."""
    p, q, d, e = numbers.p, numbers.q, numbers.d, numbers.public_numbers.e
    return (
        min(p, q) > 1
        and p * q == numbers.public_numbers.n
        and (d * e - 1) % (p - 1) == (d * e - 1) % (q - 1) == 0
        and numbers.dmp1 == d % (p - 1)
        and numbers.dmq1 == d % (q - 1)
        and numbers.iqmp * q % p == 1
    )
