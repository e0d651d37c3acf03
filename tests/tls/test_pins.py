"""Test pins of keys and certificates (RFC 7469 section 2.4)."""

from __future__ import annotations

import base64
import hashlib
import shutil
import ssl
import subprocess

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key

from tests.conftest import ServerPair, ServerPairs
from tests.tls.identities import key_pin_of
from zcproto.errors import TlsError
from zcproto.tls.pins import MAX_PINS, certificate_pin, key_pin, parse_pins, pins_match

GOOD = "sha256/" + base64.b64encode(bytes(range(32))).decode()
BACKUP = "sha256/" + base64.b64encode(bytes(32)).decode()


@pytest.fixture(params=["ecdsa", "rsa"])
def pair(request: pytest.FixtureRequest, server_pairs: ServerPairs) -> ServerPair:
    found: ServerPair = getattr(server_pairs, request.param)
    return found


def der_of(pair: ServerPair) -> bytes:
    return ssl.PEM_cert_to_DER_cert(pair.certificate.read_text())


@pytest.mark.requirement("pinning")
@pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl command to be the witness")
def test_key_pin_matches_openssl_command(pair: ServerPair) -> None:
    """Compare with the usual openssl command for HPKP pins."""
    spki = subprocess.run(
        ["openssl", "x509", "-in", pair.certificate, "-pubkey", "-noout"], capture_output=True, check=True
    ).stdout
    der = base64.b64decode(b"".join(spki.splitlines()[1:-1]))
    assert key_pin_of(der_of(pair)) == "sha256/" + base64.b64encode(hashlib.sha256(der).digest()).decode()


@pytest.mark.requirement("pinning")
def test_certificate_pin_is_digest_of_certificate(pair: ServerPair) -> None:
    der = der_of(pair)
    expected = base64.b64encode(hashlib.sha256(der).digest()).decode()
    assert certificate_pin(der) == "cert-sha256/" + expected


@pytest.mark.requirement("pinning")
def test_certificate_matches_by_key_or_certificate_pin(pair: ServerPair) -> None:
    der = der_of(pair)
    assert pins_match(der, frozenset({key_pin_of(der)}))
    assert pins_match(der, frozenset({certificate_pin(der)}))
    assert pins_match(der, parse_pins([BACKUP, key_pin_of(der)]))


@pytest.mark.requirement("pinning")
def test_certificate_does_not_match_other_pins(server_pairs: ServerPairs) -> None:
    der, other = der_of(server_pairs.ecdsa), der_of(server_pairs.rsa)
    assert not pins_match(der, frozenset({key_pin_of(other), certificate_pin(other), GOOD, BACKUP}))
    assert not pins_match(der, frozenset())


def test_unusual_encoding_of_a_key_has_the_pin_of_the_usual_one() -> None:
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    usual = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    algorithm = usual[2:23]
    point = key.public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
    unusual = b"\x30\x39" + algorithm + b"\x03\x22\x00" + point
    loaded = load_der_public_key(unusual)
    assert isinstance(loaded, ec.EllipticCurvePublicKey)
    assert key_pin(loaded) == key_pin(key)


def test_key_pin_is_not_a_certificate_pin(pair: ServerPair) -> None:
    der = der_of(pair)
    assert not pins_match(
        der, frozenset({"cert-" + key_pin_of(der), certificate_pin(der).removeprefix("cert-")})
    )


def test_pins_are_parsed_as_a_set() -> None:
    assert parse_pins([GOOD, BACKUP, GOOD]) == {GOOD, BACKUP}
    assert parse_pins(["cert-" + GOOD]) == {"cert-" + GOOD}
    assert parse_pins([]) == frozenset()


@pytest.mark.parametrize(
    "text",
    [
        f"{GOOD},{BACKUP}",
        f"{GOOD} {BACKUP}",
        f"{GOOD}, {BACKUP}, {GOOD}",
        f"\n  {GOOD}\n\t{BACKUP}\r\n",
        f",{GOOD},,{BACKUP},",
    ],
)
def test_string_may_hold_several_pins(text: str) -> None:
    assert parse_pins(text) == {GOOD, BACKUP}


@pytest.mark.parametrize("text", ["", " ", ",", "\n", GOOD[:-1], f"{GOOD};{BACKUP}", f"{GOOD} x"])
def test_string_without_pins_is_refused(text: str) -> None:
    """An empty environment variable must not disable pinning."""
    with pytest.raises(TlsError) as caught:
        parse_pins(text)
    assert caught.value.failure == "pin_malformed"


def test_unreadable_certificate_matches_only_by_certificate_pin() -> None:
    der = b"\x30\x00"
    assert not pins_match(der, frozenset({GOOD}))
    assert pins_match(der, frozenset({certificate_pin(der)}))


@pytest.mark.parametrize(
    "pin",
    [
        "",
        "sha256/",
        "sha256",
        GOOD.removeprefix("sha256/"),
        GOOD[:-1],
        GOOD[:-4],
        GOOD + "=",
        GOOD + "AAAA",
        GOOD.replace("sha256/", "sha1/"),
        GOOD.replace("sha256/", "SHA256/"),
        GOOD.replace("sha256/", "sha256//"),
        GOOD.replace("sha256/", "pin-sha256="),
        " " + GOOD,
        GOOD + "\n",
        "sha256/" + bytes(range(32)).hex(),
        "sha256/" + base64.urlsafe_b64encode(b"\xff" * 32).decode(),
        "sha256/" + "ä" * 44,
        # decodes to the same 32 bytes, but pins are compared as text
        GOOD[:-2] + chr(ord(GOOD[-2]) + 1) + "=",
    ],
)
def test_malformed_pin_is_refused_and_named(pin: str) -> None:
    with pytest.raises(TlsError) as caught:
        parse_pins([GOOD, pin])
    assert caught.value.failure == "pin_malformed"
    assert repr(pin)[1:20] in str(caught.value)


def test_long_malformed_pin_is_shortened_in_message() -> None:
    with pytest.raises(TlsError) as caught:
        parse_pins(["sha256/" + "A" * 100_000])
    assert len(str(caught.value)) < 200


def test_number_of_pins_is_limited() -> None:
    pins = ["sha256/" + base64.b64encode(number.to_bytes(32, "big")).decode() for number in range(65)]
    assert len(parse_pins(pins[:MAX_PINS])) == MAX_PINS
    with pytest.raises(TlsError, match="64 pins"):
        parse_pins(pins)
