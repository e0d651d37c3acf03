"""Decides which keys are strong enough, generates them, and proves that a key belongs to a certificate.

Rules: RSA needs at least 2048 bits, ECDSA one of P-256, P-384 and P-521 (BCP 195 section 4.5; RFC 8446 section
4.2.3 allows no other curve). There are two families, RSA and ECDSA: one certificate of each serves every client.

Must not know: files, configuration. Only `key_pem` returns a key as text.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey

MIN_RSA_BITS = 2048
_RSA_EXPONENT = 65537
_CURVES = {"ecdsa-p256": ec.SECP256R1(), "ecdsa-p384": ec.SECP384R1(), "ecdsa-p521": ec.SECP521R1()}
_KEY_TYPE_OF_CURVE = {curve.name: key_type for key_type, curve in _CURVES.items()}


def family(key_type: str) -> str:
    """Return `rsa` or `ecdsa`."""
    return key_type.partition("-")[0]


def generate(key_type: str) -> PrivateKey:
    """Generate a key. RSA takes from 0.1 s to many seconds, with the GIL released."""
    if family(key_type) == "rsa":
        return rsa.generate_private_key(_RSA_EXPONENT, int(key_type.partition("-")[2]))
    return ec.generate_private_key(_CURVES[key_type])


def key_pem(key: PrivateKey) -> bytes:
    """Return the key as PKCS#8 PEM, unencrypted because a server starts unattended."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def key_type_of(key: object) -> str:
    """Return the key type of a private or public key; the algorithm's name if it is neither RSA nor EC."""
    if isinstance(key, rsa.RSAPrivateKey | rsa.RSAPublicKey):
        return f"rsa-{key.key_size}"
    if isinstance(key, ec.EllipticCurvePrivateKey | ec.EllipticCurvePublicKey):
        return _KEY_TYPE_OF_CURVE.get(key.curve.name, f"ecdsa-{key.curve.name}")
    return type(key).__name__.removesuffix("PrivateKey").removesuffix("PublicKey").lower()


def weakness(key: object) -> str | None:
    """Return why this key must not be served, or None."""
    key_type = key_type_of(key)
    if isinstance(key, rsa.RSAPrivateKey | rsa.RSAPublicKey):
        if key.key_size < MIN_RSA_BITS:
            return f"the RSA key has {key.key_size} bits; it needs at least {MIN_RSA_BITS}"
        return None
    if key_type in _CURVES:
        return None
    return f"the key is {key_type}; use RSA of {MIN_RSA_BITS} bits or more, or ECDSA on P-256, P-384 or P-521"


def belongs(key: object, public_key: object) -> bool:
    """Return True if signatures of `key` verify with `public_key`.

    A comparison of the public numbers would accept a key whose private half is damaged. For ECDSA a signature is
    created and verified. For RSA the private numbers are checked against the public ones (RFC 8017 section 3.2) in
    0.1 ms: a signature would block all other threads for 5 ms at 4096 bits, and OpenSSL's check of a loaded key,
    which includes primality tests, takes 250 ms.
    """
    if isinstance(key, rsa.RSAPrivateKey) and isinstance(public_key, rsa.RSAPublicKey):
        numbers = key.private_numbers()
        return numbers.public_numbers == public_key.public_numbers() and _are_consistent(numbers)
    if isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(public_key, ec.EllipticCurvePublicKey):
        message = b"zcproto key check"
        try:
            signature = key.sign(message, ec.ECDSA(hashes.SHA256()))
            public_key.verify(signature, message, ec.ECDSA(hashes.SHA256()))
        except (InvalidSignature, ValueError):
            return False
        return True
    return False


def _are_consistent(numbers: rsa.RSAPrivateNumbers) -> bool:
    """Return True if the numbers of an RSA key with two primes follow from its modulus and exponents."""
    p, q, d, e = numbers.p, numbers.q, numbers.d, numbers.public_numbers.e
    return (
        min(p, q) > 1
        and p * q == numbers.public_numbers.n
        and (d * e - 1) % (p - 1) == (d * e - 1) % (q - 1) == 0
        and numbers.dmp1 == d % (p - 1)
        and numbers.dmq1 == d % (q - 1)
        and numbers.iqmp * q % p == 1
    )
