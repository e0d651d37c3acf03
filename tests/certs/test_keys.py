from __future__ import annotations

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from zcproto.certs import keys


@pytest.mark.requirement("key_size")
@pytest.mark.parametrize("key_type", ["rsa-2048", "ecdsa-p256", "ecdsa-p384"])
def test_generated_key_has_its_type_and_is_parsed_again(key_type: str) -> None:
    key = keys.generate(key_type)
    assert keys.key_type_of(key) == keys.key_type_of(key.public_key()) == key_type
    assert keys.weakness(key) is None
    assert keys.weakness(key.public_key()) is None
    pem = keys.key_pem(key)
    assert pem.startswith(b"-----BEGIN PRIVATE KEY-----\n")
    back = serialization.load_pem_private_key(pem, None)
    assert isinstance(back, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey)
    assert keys.belongs(back, key.public_key())


def test_rsa_keys_use_the_usual_exponent() -> None:
    key = keys.generate("rsa-2048")
    assert isinstance(key, rsa.RSAPrivateKey)
    assert key.public_key().public_numbers().e == 65537


@pytest.mark.requirement("key_size")
@pytest.mark.parametrize(
    ("key", "key_type", "says"),
    [
        (rsa.generate_private_key(65537, 1024), "rsa-1024", "1024 bits; it needs at least 2048"),
        (ec.generate_private_key(ec.SECP224R1()), "ecdsa-secp224r1", "the key is ecdsa-secp224r1; use"),
        (ec.generate_private_key(ec.SECP192R1()), "ecdsa-secp192r1", "the key is ecdsa-secp192r1; use"),
        (ec.generate_private_key(ec.SECP256K1()), "ecdsa-secp256k1", "the key is ecdsa-secp256k1; use"),
        (ed25519.Ed25519PrivateKey.generate(), "ed25519", "the key is ed25519; use RSA of 2048 bits or more"),
    ],
    ids=["rsa-1024", "p224", "p192", "secp256k1", "ed25519"],
)
def test_weak_and_unusual_keys_are_named(key: keys.PrivateKey, key_type: str, says: str) -> None:
    assert keys.key_type_of(key) == key_type
    for one in (key, key.public_key()):
        assert says in str(keys.weakness(one))


def test_p521_can_be_loaded() -> None:
    key = ec.generate_private_key(ec.SECP521R1())
    assert keys.key_type_of(key) == "ecdsa-p521"
    assert keys.weakness(key) is None


def test_key_belongs_only_to_its_public_key(
    rsa_key: rsa.RSAPrivateKey, other_rsa_key: rsa.RSAPrivateKey, ec_key: ec.EllipticCurvePrivateKey
) -> None:
    other_ec_key = ec.generate_private_key(ec.SECP256R1())
    p384_key = ec.generate_private_key(ec.SECP384R1())
    every = (rsa_key, other_rsa_key, ec_key, other_ec_key, p384_key)
    for one in every:
        for other in every:
            assert keys.belongs(one, other.public_key()) is (one is other)


def test_key_with_a_damaged_private_half_does_not_belong(rsa_key: rsa.RSAPrivateKey) -> None:
    numbers = rsa_key.private_numbers()
    damaged = rsa.RSAPrivateNumbers(
        p=numbers.p,
        q=numbers.q,
        d=numbers.d ^ 8,
        dmp1=numbers.dmp1 ^ 8,
        dmq1=numbers.dmq1,
        iqmp=numbers.iqmp,
        public_numbers=numbers.public_numbers,
    ).private_key(unsafe_skip_rsa_key_validation=True)
    assert not keys.belongs(damaged, rsa_key.public_key())
