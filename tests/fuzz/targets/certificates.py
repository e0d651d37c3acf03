"""Fuzz certificate files: each loads, or raises a CertificateError without bytes of a key.

The first byte selects what the rest is: a whole PEM file, the DER of a certificate, or the DER of a key. The other
half of the pair comes from `throwaway`.
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
from zcproto.certs import pair
from zcproto.certs.examine import Examination, examine
from zcproto.certs.pair import CertificatePair
from zcproto.errors import CertificateError

T = TypeVar("T")
NOW = datetime(2026, 6, 1, tzinfo=UTC)
THROWAWAY = Path(__file__).parent.parent / "throwaway"
"""A certificate and its key, used only by this target."""

SECRET_MARK = b"PRIVATE KEY-----"
MAX_MESSAGE = 1_000
MIN_SECRET_LINE = 20
"""Length from which a line of the file does not appear in a message by coincidence."""

_folder = tempfile.TemporaryDirectory(prefix="zcproto-fuzz-")
_path = Path(_folder.name) / "pair.pem"
_path.touch(0o600)


def pem(label: str, der: bytes) -> bytes:
    text = base64.encodebytes(der).decode("ascii")
    return f"-----BEGIN {label}-----\n{text}-----END {label}-----\n".encode()


def file_of(data: bytes) -> bytes:
    """Return the file that an input encodes."""
    first, rest = data[0] if data else 0, data[1:]
    match first % 4:
        case 1:
            return pem("CERTIFICATE", rest) + (THROWAWAY / "key.pem").read_bytes()
        case 2:
            return (THROWAWAY / "certificate.pem").read_bytes() + pem("PRIVATE KEY", rest)
        case 3:
            return (THROWAWAY / "certificate.pem").read_bytes() + pem("EC PRIVATE KEY", rest)
    return rest


def result_or_error(load: Callable[[], T]) -> T | CertificateError:
    try:
        return load()
    except CertificateError as error:
        return error


def run(data: bytes) -> None:
    _path.write_bytes(file_of(data))
    result_or_error(lambda: pair.load_pair(_path, _path, NOW))


def check(data: bytes) -> None:
    content = file_of(data)
    _path.write_bytes(content)
    loaded = result_or_error(lambda: pair.load_pair(_path, _path, NOW))
    examined = result_or_error(lambda: examine(_path, None, NOW, host="localhost"))
    chain = result_or_error(lambda: pair.read_certificates(_path))
    key = result_or_error(lambda: pair.read_private_key(_path))
    belongs = pair.match(content, content)
    messages = [str(each) for each in (loaded, examined, chain, key) if isinstance(each, CertificateError)]
    if isinstance(examined, Examination):
        messages += examined.refused + examined.warnings
    for message in messages:
        check_message(message, content, key)
    if isinstance(loaded, CertificatePair):
        assert belongs
        assert not isinstance(chain, CertificateError)
        assert not isinstance(key, CertificateError)
        assert loaded.not_before <= NOW <= loaded.not_after
        check_message(repr(loaded), content, key)
        # A served certificate may be refused by the examination only for its names.
        assert isinstance(examined, Examination)
        assert all("is not valid for localhost" in reason for reason in examined.refused)
    elif SECRET_MARK in content and b"CERTIFICATE-----" in content:  # one half alone
        assert isinstance(examined, CertificateError) or examined.refused
    if isinstance(chain, list):
        assert 1 <= len(chain) <= pair.MAX_CHAIN


def check_message(message: str, content: bytes, key: object) -> None:
    """Assert that a message is one bounded line without key material."""
    assert message.isprintable()
    assert len(message) <= MAX_MESSAGE
    if SECRET_MARK in content:
        for line in content.splitlines():
            if len(line) >= MIN_SECRET_LINE and not line.startswith(b"-----"):
                assert line.decode("latin-1") not in message
    if isinstance(key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey):
        numbers = key.private_numbers()
        secret = numbers.private_value if isinstance(key, ec.EllipticCurvePrivateKey) else numbers.d
        if secret > 2**64:
            assert str(secret) not in message
            assert f"{secret:x}" not in message.lower()


TARGET = Target("certificates", run, check, max_size=2_048, limit_s=FILE_LIMIT_S, repeats=False)
