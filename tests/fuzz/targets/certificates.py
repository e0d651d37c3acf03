"""Any file is a certificate with its key, or a CertificateError that shows nothing of a key.

The first byte says what the rest is: a whole PEM file, the DER of a certificate, or that of a key. The other half
of a pair is a test's own.
"""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from cryptography.hazmat.primitives.asymmetric import ec, rsa

from tests.fuzz.target import FILE_LIMIT_S, Target
from zcproto.certs import CertificatePair, files, pair
from zcproto.certs.examine import Examination, examine
from zcproto.errors import CertificateError

T = TypeVar("T")
NOW = datetime(2026, 6, 1, tzinfo=UTC)
OWN = Path(__file__).parent.parent / "throwaway"
"""A certificate and its key, which were made for this and are used for nothing else."""

LONGEST_MESSAGE = 1_000
SHOWN_BY_CHANCE = 20
"""Characters of a file's line that no message has in common with it by chance."""

_folder = tempfile.TemporaryDirectory(prefix="zcproto-fuzz-")
_path = Path(_folder.name) / "pair.pem"
_path.touch(0o600)


def pem(label: str, der: bytes) -> bytes:
    text = base64.encodebytes(der).decode("ascii")
    return f"-----BEGIN {label}-----\n{text}-----END {label}-----\n".encode()


def file_of(data: bytes) -> bytes:
    """The file that an input stands for."""
    first, rest = data[0] if data else 0, data[1:]
    match first % 4:
        case 1:
            return pem("CERTIFICATE", rest) + (OWN / "key.pem").read_bytes()
        case 2:
            return (OWN / "certificate.pem").read_bytes() + pem("PRIVATE KEY", rest)
        case 3:
            return (OWN / "certificate.pem").read_bytes() + pem("EC PRIVATE KEY", rest)
    return rest


def attempt(load: Callable[[], T]) -> T | CertificateError:
    try:
        return load()
    except CertificateError as error:
        return error


def take(data: bytes) -> None:
    _path.write_bytes(file_of(data))
    attempt(lambda: pair.load_pair(_path, _path, NOW))


def check(data: bytes) -> None:
    content = file_of(data)
    _path.write_bytes(content)
    loaded = attempt(lambda: pair.load_pair(_path, _path, NOW))
    examined = attempt(lambda: examine(_path, None, NOW, host="localhost"))
    chain = attempt(lambda: pair.read_certificates(_path))
    key = attempt(lambda: pair.read_private_key(_path))
    pin = attempt(lambda: pair.spki_pin(data[1:]))
    belongs = pair.match(content, content)
    said = [str(each) for each in (loaded, examined, chain, key, pin) if isinstance(each, CertificateError)]
    if isinstance(examined, Examination):
        said += examined.refused + examined.warnings
    for message in said:
        check_message(message, content, key)
    if isinstance(loaded, CertificatePair):
        assert belongs
        assert not isinstance(chain, CertificateError)
        assert not isinstance(key, CertificateError)
        assert loaded.chain_length == len(chain)
        assert loaded.not_before <= NOW <= loaded.not_after
        check_message(repr(loaded), content, key)
        # What a server takes is refused by the examination for nothing but its names.
        assert isinstance(examined, Examination)
        assert all("is not valid for localhost" in reason for reason in examined.refused)
    elif files._SECRET_MARK in content and b"CERTIFICATE-----" in content:  # a half alone is examined as such
        assert isinstance(examined, CertificateError) or examined.refused
    if isinstance(chain, list):
        assert 1 <= len(chain) <= pair.MAX_CHAIN
        assert all(pair.spki_pin(pair_der(each)).startswith("sha256/") for each in chain)


def pair_der(certificate: pair.x509.Certificate) -> bytes:
    return certificate.public_bytes(pair.serialization.Encoding.DER)


def check_message(message: str, content: bytes, key: object) -> None:
    """A message names the file and a cure; of what is in the file it has names at most, and nothing of a key."""
    assert message.isprintable()
    assert len(message) <= LONGEST_MESSAGE
    if files._SECRET_MARK in content:
        for line in content.splitlines():
            if len(line) >= SHOWN_BY_CHANCE and not line.startswith(b"-----"):
                assert line.decode("latin-1") not in message
    if isinstance(key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey):
        numbers = key.private_numbers()
        secret = numbers.private_value if isinstance(key, ec.EllipticCurvePrivateKey) else numbers.d
        if secret > 2**64:
            assert str(secret) not in message
            assert f"{secret:x}" not in message.lower()


TARGET = Target("certificates", take, check, longest=2_048, limit_s=FILE_LIMIT_S, stretches=False)
