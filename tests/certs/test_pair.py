from __future__ import annotations

import base64
import hashlib
import os
import random
import ssl
import traceback
from datetime import UTC, timedelta, timezone
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, padding, rsa
from cryptography.x509.name import _ASN1Type
from cryptography.x509.oid import ExtendedKeyUsageOID

from tests.certs.support import DAY, NOW, build, der, openssl, pem, pem_of, pem_of_key, pin_of, write_pair
from zcproto.certs import files, pair
from zcproto.certs.pair import load_pair
from zcproto.errors import CertificateError

TRADITIONAL = serialization.PrivateFormat.TraditionalOpenSSL
SAN = x509.SubjectAlternativeName(
    [
        x509.DNSName("a.example"),
        x509.RFC822Name("someone@a.example"),
        x509.IPAddress(ip_address("192.0.2.7")),
        x509.DNSName("*.b.example"),
        x509.UniformResourceIdentifier("https://a.example"),
        x509.IPAddress(ip_address("2001:db8::7")),
    ]
)


def usage(*, digital_signature: bool) -> x509.KeyUsage:
    return x509.KeyUsage(digital_signature, False, True, False, False, False, False, False, False)


def refusal(folder: Path, chain: Any, key: Any, now: Any = NOW) -> str:
    with pytest.raises(CertificateError) as caught:
        load_pair(*write_pair(folder, chain, key), now)
    message = str(caught.value)
    assert message.startswith(str(folder))
    assert "\n" not in message
    return message


# --- what is taken


def test_pair_is_loaded_with_its_attributes(tmp_path: Path, rsa_key: rsa.RSAPrivateKey) -> None:
    certificate = build(rsa_key, extensions=[SAN])
    paths = write_pair(tmp_path, [certificate], rsa_key)
    loaded = load_pair(*paths, NOW)
    assert (loaded.certificate, loaded.key) == paths
    assert loaded.key_type == "rsa-2048"
    assert loaded.names == ("a.example", "192.0.2.7", "*.b.example", "2001:db8::7")
    assert loaded.not_before == (NOW - DAY).replace(microsecond=0)
    assert loaded.not_after == (NOW + DAY).replace(microsecond=0)
    assert loaded.not_before.tzinfo is loaded.not_after.tzinfo is UTC
    assert loaded.leaf_sha256 == hashlib.sha256(der(certificate)).digest()
    assert loaded.pin == pin_of(certificate)
    assert loaded.passphrase is None


@pytest.mark.parametrize(
    ("curve", "key_type"),
    [(ec.SECP256R1(), "ecdsa-p256"), (ec.SECP384R1(), "ecdsa-p384"), (ec.SECP521R1(), "ecdsa-p521")],
)
def test_ecdsa_pairs_are_loaded(tmp_path: Path, curve: ec.EllipticCurve, key_type: str) -> None:
    key = ec.generate_private_key(curve)
    assert load_pair(*write_pair(tmp_path, [build(key)], key), NOW).key_type == key_type


def test_keys_in_older_pem_formats_are_loaded(
    tmp_path: Path, rsa_key: rsa.RSAPrivateKey, ec_key: ec.EllipticCurvePrivateKey
) -> None:
    for key in (rsa_key, ec_key):
        paths = write_pair(tmp_path, [build(key)], pem_of_key(key, TRADITIONAL))
        assert load_pair(*paths, NOW).pin == pin_of(build(key))
    parameters = openssl("ecparam", "-name", "prime256v1", "-genkey").encode()
    assert parameters.startswith(b"-----BEGIN EC PARAMETERS-----")
    key = serialization.load_pem_private_key(parameters, None)
    assert load_pair(*write_pair(tmp_path, [build(key)], parameters), NOW).key_type == "ecdsa-p256"


def test_certificate_and_key_can_be_in_one_file(tmp_path: Path, ec_key: ec.EllipticCurvePrivateKey) -> None:
    both = tmp_path / "both.pem"
    both.touch(0o600)
    certificate = pem(build(ec_key))
    for data in (pem_of_key(ec_key) + certificate, certificate + pem_of_key(ec_key)):
        both.write_bytes(data)
        assert load_pair(both, both, NOW).key_type == "ecdsa-p256"
    both.chmod(0o644)
    with pytest.raises(CertificateError, match="others can read"):
        load_pair(both, both, NOW)


def test_each_file_is_read_once(
    tmp_path: Path, ec_key: ec.EllipticCurvePrivateKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write_pair(tmp_path, [build(ec_key)], ec_key)
    both = tmp_path / "both.pem"
    both.touch(0o600)
    both.write_bytes(pem_of_key(ec_key) + pem(build(ec_key)))
    opened: list[Path] = []
    real = os.open

    def count(path: Any, *arguments: Any, **named: Any) -> int:
        opened.append(Path(path))
        return real(path, *arguments, **named)

    monkeypatch.setattr(os, "open", count)
    load_pair(*paths, NOW)
    load_pair(both, both, NOW)
    assert opened == [*paths, both]


def test_root_with_a_weak_signature_is_accepted_in_a_chain(
    tmp_path: Path, rsa_key: rsa.RSAPrivateKey, other_rsa_key: rsa.RSAPrivateKey, ec_key: Any
) -> None:
    leaf = build(ec_key, signer=other_rsa_key, issuer="middle")
    middle = build(other_rsa_key, signer=rsa_key, subject="middle", issuer="root")
    root = sha1_signed(rsa_key, "root")
    assert load_pair(*write_pair(tmp_path, [leaf, middle, root], ec_key), NOW).pin == pin_of(leaf)


def test_signature_of_an_ed25519_authority_is_strong(tmp_path: Path, ec_key: Any) -> None:
    authority = ed25519.Ed25519PrivateKey.generate()
    leaf = build(ec_key, signer=authority, issuer="authority", algorithm=None)
    assert load_pair(*write_pair(tmp_path, [leaf], ec_key), NOW).key_type == "ecdsa-p256"


def test_strong_hashes_and_pss_are_accepted(tmp_path: Path, rsa_key: rsa.RSAPrivateKey, ec_key: Any) -> None:
    for algorithm in (hashes.SHA384(), hashes.SHA512()):
        leaf = build(ec_key, signer=rsa_key, issuer="authority", algorithm=algorithm)
        assert load_pair(*write_pair(tmp_path, [leaf], ec_key), NOW)
    request = x509.CertificateBuilder(
        issuer_name=leaf.issuer,
        subject_name=leaf.subject,
        public_key=ec_key.public_key(),
        serial_number=7,
        not_valid_before=NOW - DAY,
        not_valid_after=NOW + DAY,
    )
    pss = padding.PSS(padding.MGF1(hashes.SHA256()), 32)
    leaf = request.sign(rsa_key, hashes.SHA256(), rsa_padding=pss)
    assert load_pair(*write_pair(tmp_path, [leaf], ec_key), NOW)


@pytest.mark.parametrize(
    "extensions",
    [
        [],
        [x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH])],
        [x509.ExtendedKeyUsage([ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE])],
        [usage(digital_signature=True)],
    ],
)
def test_certificate_without_purpose_limits_is_accepted(tmp_path: Path, ec_key: Any, extensions: Any) -> None:
    leaf = build(ec_key, extensions=extensions)
    assert load_pair(*write_pair(tmp_path, [leaf], ec_key), NOW).names == ()


def test_first_and_last_second_of_validity_are_valid_in_any_zone(tmp_path: Path, ec_key: Any) -> None:
    start, end = NOW.replace(microsecond=0), NOW.replace(microsecond=0) + DAY
    paths = write_pair(tmp_path, [build(ec_key, not_before=start, not_after=end)], ec_key)
    for now in (start, end, end.astimezone(timezone(timedelta(hours=-9)))):
        load_pair(*paths, now)
    with pytest.raises(CertificateError, match="is not valid before"):
        load_pair(*paths, start - timedelta(microseconds=1))
    with pytest.raises(CertificateError, match="expired"):
        load_pair(*paths, end + timedelta(microseconds=1))


# --- what is refused


@pytest.mark.requirement("fallback")
def test_expired_certificate_is_refused(tmp_path: Path, ec_key: Any) -> None:
    says = refusal(tmp_path, [build(ec_key)], ec_key, NOW + 2 * DAY)
    assert says == f"{tmp_path}/site.crt: expired on 2026-06-02 12:30 UTC; replace the certificate"


def test_certificate_not_yet_valid_is_refused(tmp_path: Path, ec_key: Any) -> None:
    says = refusal(tmp_path, [build(ec_key)], ec_key, NOW - 2 * DAY)
    assert says.startswith(
        f"{tmp_path}/site.crt: is not valid before 2026-05-31 12:30 UTC; wait until then, or correct"
    )


def test_naive_time_is_refused(tmp_path: Path, ec_key: Any) -> None:
    with pytest.raises(ValueError, match="aware"):
        load_pair(*write_pair(tmp_path, [build(ec_key)], ec_key), NOW.replace(tzinfo=None))


@pytest.mark.requirement("fallback")
def test_key_of_another_certificate_is_refused(
    tmp_path: Path, rsa_key: Any, other_rsa_key: Any, ec_key: Any
) -> None:
    for key in (other_rsa_key, ec_key):
        says = refusal(tmp_path, [build(rsa_key)], key)
        assert says.startswith(
            f"{tmp_path}/site.key: does not belong to {tmp_path}/site.crt; configure a matching"
        )


def test_chain_with_the_leaf_in_the_wrong_place_is_refused(tmp_path: Path, rsa_key: Any, ec_key: Any) -> None:
    chain = [build(rsa_key, subject="authority"), build(ec_key, signer=rsa_key, issuer="authority")]
    assert "the server's certificate is not the first one in the file" in refusal(tmp_path, chain, ec_key)


def test_chain_out_of_order_is_refused(tmp_path: Path, rsa_key: Any, other_rsa_key: Any, ec_key: Any) -> None:
    leaf = build(ec_key, signer=other_rsa_key, issuer="middle")
    middle = build(other_rsa_key, signer=rsa_key, subject="middle", issuer="root")
    root = build(rsa_key, subject="root")
    assert load_pair(*write_pair(tmp_path, [leaf, middle, root], ec_key), NOW)
    for chain, position in (
        ([leaf, root, middle], 1),
        ([leaf, root], 1),
        ([leaf, leaf, middle], 1),
        ([leaf, middle, leaf], 2),
    ):
        says = refusal(tmp_path, chain, ec_key)
        assert f"certificate {position + 1} is not the issuer of certificate {position}; put" in says


def test_issuer_of_the_right_name_that_did_not_sign_is_refused(
    tmp_path: Path, rsa_key: Any, other_rsa_key: Any, ec_key: Any
) -> None:
    leaf = build(ec_key, signer=other_rsa_key, issuer="authority")
    says = refusal(tmp_path, [leaf, build(rsa_key, subject="authority")], ec_key)
    assert "certificate 2 has the name of the issuer of certificate 1 but did not sign it; replace" in says


def test_names_differing_in_case_spaces_and_encoding_are_equal(
    tmp_path: Path, rsa_key: Any, ec_key: Any
) -> None:
    leaf = build(ec_key, signer=rsa_key, issuer="The  Authority ")
    authority = build(rsa_key, subject="the authority")
    assert load_pair(*write_pair(tmp_path, [leaf, authority], ec_key), NOW)
    other = x509.Name(
        [
            x509.NameAttribute(x509.NameOID.COMMON_NAME, "the authority"),
            x509.NameAttribute(x509.NameOID.X500_UNIQUE_IDENTIFIER, b"\0\1", _ASN1Type.BitString),
        ]
    )
    leaf = build(ec_key, signer=rsa_key, issuer=other)
    assert "certificate 2" in refusal(tmp_path, [leaf, authority], ec_key)


def test_chain_that_is_too_long_is_refused(tmp_path: Path, ec_key: Any) -> None:
    certificate = build(ec_key)  # issued by itself
    assert load_pair(*write_pair(tmp_path, [certificate] * 10, ec_key), NOW)
    says = refusal(tmp_path, [certificate] * 11, ec_key)
    assert "contains 11 certificates; keep only those that are needed, at most 10" in says


@pytest.mark.requirement("key_size")
def test_short_rsa_key_is_refused(tmp_path: Path) -> None:
    key = rsa.generate_private_key(65537, 1024)
    says = refusal(tmp_path, [build(key)], key)
    assert (
        "site.crt: the certificate is too weak: the RSA key has 1024 bits; it needs at least 2048; use"
        in says
    )


@pytest.mark.requirement("key_size")
@pytest.mark.parametrize(
    "curve", [ec.SECP224R1(), ec.SECP192R1(), ec.SECP256K1()], ids=lambda curve: curve.name
)
def test_other_curves_are_refused(tmp_path: Path, curve: ec.EllipticCurve) -> None:
    key = ec.generate_private_key(curve)
    assert f"the key is ecdsa-{curve.name}; use RSA" in refusal(tmp_path, [build(key)], key)


def test_other_key_algorithms_are_refused(tmp_path: Path, ec_key: Any) -> None:
    edwards = ed25519.Ed25519PrivateKey.generate()
    assert "site.key: the key is ed25519; use RSA" in refusal(tmp_path, [build(ec_key)], edwards)
    certificate = build(edwards, algorithm=None)
    assert "site.crt: the certificate is too weak: the key is ed25519" in refusal(
        tmp_path, [certificate], ec_key
    )
    dsa_key = dsa.generate_private_key(1024)
    assert "the key is dsa; use RSA" in refusal(tmp_path, [build(ec_key)], dsa_key)


@pytest.mark.requirement("key_size")
def test_weak_key_in_the_chain_is_refused(tmp_path: Path, ec_key: Any) -> None:
    weak = rsa.generate_private_key(65537, 1024)
    chain = [build(ec_key, signer=weak, issuer="middle"), build(weak, subject="middle", issuer="root")]
    assert "certificate 2 of the chain is too weak: the RSA key has 1024 bits" in refusal(
        tmp_path, chain, ec_key
    )


def sha1_signed(key: Any, subject: str) -> x509.Certificate:
    """A certificate signed with SHA-1, which only openssl still makes."""
    made = openssl(
        "req", "-x509", "-new", "-key", "/dev/stdin", "-sha1", "-subj", f"/CN={subject}", data=pem_of_key(key)
    )
    return x509.load_pem_x509_certificate(made.encode())


def test_sha1_signature_is_refused(tmp_path: Path, rsa_key: Any) -> None:
    says = refusal(tmp_path, [sha1_signed(rsa_key, "server")], rsa_key)
    assert "the certificate is signed with sha1, which is insecure; use one signed with SHA-256" in says


def with_signature_algorithm(certificate: x509.Certificate, last_arc: int) -> bytes:
    """The certificate with another PKCS #1 algorithm in both places, with an invalid signature."""
    arc = bytes.fromhex("06092a864886f70d0101")  # 1.2.840.113549.1.1, RFC 8017 appendix C
    data = der(certificate)
    assert data.count(arc + b"\x0b") == 2
    return pem_of(data.replace(arc + b"\x0b", arc + bytes((last_arc,))))


@pytest.mark.parametrize(("last_arc", "name"), [(4, "md5"), (14, "sha224"), (2, "1.2.840.113549.1.1.2")])
def test_weak_and_unknown_signatures_are_refused(
    tmp_path: Path, rsa_key: Any, ec_key: Any, last_arc: int, name: str
) -> None:
    leaf = build(ec_key, signer=rsa_key, issuer="authority")
    says = refusal(tmp_path, with_signature_algorithm(leaf, last_arc), ec_key)
    assert f"the certificate is signed with {name}, which is insecure" in says
    middle = build(rsa_key, subject="authority", issuer="root")
    says = refusal(tmp_path, pem(leaf) + with_signature_algorithm(middle, last_arc), ec_key)
    assert f"certificate 2 of the chain is signed with {name}" in says


@pytest.mark.parametrize(
    ("extension", "says"),
    [
        (
            usage(digital_signature=False),
            "its key usage lacks digitalSignature; use a certificate",
        ),
        (
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]),
            "its extended key usage lacks serverAuth; use",
        ),
    ],
)
def test_certificate_for_another_purpose_is_refused(
    tmp_path: Path, ec_key: Any, extension: x509.ExtensionType, says: str
) -> None:
    assert says in refusal(tmp_path, [build(ec_key, extensions=[extension])], ec_key)


@pytest.mark.parametrize("form", [serialization.PrivateFormat.PKCS8, TRADITIONAL])
def test_encrypted_key_without_a_passphrase_is_refused_with_the_remedy(
    tmp_path: Path, rsa_key: Any, form: serialization.PrivateFormat
) -> None:
    data = pem_of_key(rsa_key, form, serialization.BestAvailableEncryption(b"pass phrase"))
    says = refusal(tmp_path, [build(rsa_key)], data)
    key_path = tmp_path / "site.key"
    assert says.startswith(f"{key_path}: the key is encrypted and no passphrase is configured; set key_pass")
    assert f"decrypt it with `openssl pkey -in {key_path} -out NEW_FILE`" in says
    with pytest.raises(CertificateError, match="the key is encrypted"):
        pair.read_private_key(key_path)


@pytest.mark.parametrize("form", [serialization.PrivateFormat.PKCS8, TRADITIONAL])
def test_encrypted_key_is_decrypted_and_its_passphrase_shown_nowhere(
    tmp_path: Path, rsa_key: Any, ec_key: Any, form: serialization.PrivateFormat
) -> None:
    secret = b"correct horse \xff"
    for key in (rsa_key, ec_key):
        data = pem_of_key(key, form, serialization.BestAvailableEncryption(secret))
        paths = write_pair(tmp_path, [build(key)], data)
        loaded = load_pair(*paths, NOW, secret)
        assert loaded.passphrase == secret
        assert "horse" not in repr(loaded)
        assert "passphrase" not in repr(loaded)
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(*paths, password=loaded.passphrase)


@pytest.mark.parametrize("options", ["-aes128", "-des3"])
def test_traditional_keys_encrypted_by_openssl_are_accepted(
    tmp_path: Path, ec_key: Any, options: str
) -> None:
    data = openssl("ec", options, "-passout", "pass:secret", data=pem_of_key(ec_key)).encode()
    assert b"DEK-Info" in data
    assert load_pair(*write_pair(tmp_path, [build(ec_key)], data), NOW, b"secret").passphrase == b"secret"


def test_wrong_passphrase_is_refused_and_not_shown(tmp_path: Path, rsa_key: Any, ec_key: Any) -> None:
    wrong = b"battery" + b" staple"
    for key in (rsa_key, ec_key):
        for form in (serialization.PrivateFormat.PKCS8, TRADITIONAL):
            data = pem_of_key(key, form, serialization.BestAvailableEncryption(b"right"))
            paths = write_pair(tmp_path, [build(key)], data)
            with pytest.raises(CertificateError) as caught:
                load_pair(*paths, NOW, wrong)
            says = str(caught.value)
            assert says.startswith(
                f"{paths[1]}: the configured passphrase does not decrypt the key; configure"
            )
            assert wrong.decode() not in "".join(traceback.format_exception(caught.value))


def test_passphrase_of_an_unencrypted_key_is_not_kept(tmp_path: Path, ec_key: Any) -> None:
    assert load_pair(*write_pair(tmp_path, [build(ec_key)], ec_key), NOW, b"secret").passphrase is None


def test_long_passphrase_is_accepted(tmp_path: Path, ec_key: Any) -> None:
    data = pem_of_key(ec_key, encryption=serialization.BestAvailableEncryption(b"x" * 1023))
    paths = write_pair(tmp_path, [build(ec_key)], data)
    assert load_pair(*paths, NOW, b"x" * 1023)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"junk",
        b"\0" * 100,
        b"-----BEGIN PRIVATE KEY-----\n",
        b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
        b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n",
        "the certificate",
        "half",
        "der",
    ],
)
def test_malformed_key_is_refused_and_not_shown(tmp_path: Path, ec_key: Any, data: Any) -> None:
    certificate = build(ec_key)
    whole = pem_of_key(ec_key)
    kinds = {"the certificate": pem(certificate), "half": whole[: len(whole) // 2], "der": der(certificate)}
    data = kinds.get(data, data)
    says = refusal(tmp_path, [certificate], data)
    assert says == f"{tmp_path}/site.key: contains no PEM key that can be parsed; restore the file"


@pytest.mark.requirement("fallback")
@pytest.mark.parametrize("data", [b"", b"junk", b"\xff" * 50, "the key", "half", "der"])
def test_malformed_certificate_is_refused(tmp_path: Path, ec_key: Any, data: Any) -> None:
    whole = pem(build(ec_key))
    kinds = {"the key": pem_of_key(ec_key), "half": whole[: len(whole) // 2], "der": der(build(ec_key))}
    half = data == "half"
    data = kinds.get(data, data)
    certificate_path, key_path = write_pair(tmp_path, data, ec_key)
    certificate_path.chmod(0o600)  # the key is in it once
    with pytest.raises(CertificateError) as caught:
        load_pair(certificate_path, key_path, NOW)
    what = (
        "is truncated in the middle of a PEM block"
        if half
        else "contains no PEM certificate that can be parsed"
    )
    assert str(caught.value) == f"{certificate_path}: {what}; replace the file"


def test_truncated_chain_is_not_accepted_as_a_shorter_one(tmp_path: Path, rsa_key: Any, ec_key: Any) -> None:
    leaf, middle = build(ec_key, signer=rsa_key, issuer="middle"), build(rsa_key, subject="middle")
    whole = pem(leaf) + pem(middle)
    taken = 0
    for length in range(len(whole) + 1):
        try:
            chain = pair.parse_certificates(whole[:length], tmp_path)
        except files.DamagedFileError:
            continue
        taken += 1
        between = len(pem(leaf)) - 1 <= length <= len(pem(leaf))  # with or without the newline
        assert len(chain) == (1 if between else 2)
        assert between or length >= len(whole) - 1
    assert taken == 4
    assert "is truncated" in refusal(tmp_path, whole[:-30], ec_key)


def test_text_around_the_certificates_does_no_harm(tmp_path: Path, ec_key: Any) -> None:
    text = b"Certificate:\n    Data: ----\n" + pem(build(ec_key)) + b"\nthe end -----\n"
    assert load_pair(*write_pair(tmp_path, text, ec_key), NOW)


def test_unparsable_extension_is_refused(tmp_path: Path, ec_key: Any) -> None:
    bad = x509.UnrecognizedExtension(x509.ExtensionOID.SUBJECT_ALTERNATIVE_NAME, b"\x30\x03\x82\x05a")
    says = refusal(tmp_path, [build(ec_key, extensions=[bad])], ec_key)
    assert says == f"{tmp_path}/site.crt: contains a certificate that cannot be parsed; replace the file"


def test_key_readable_by_others_is_refused(tmp_path: Path, ec_key: Any) -> None:
    certificate_path, key_path = write_pair(tmp_path, [build(ec_key)], ec_key)
    key_path.chmod(0o640)
    with pytest.raises(CertificateError, match=r"site\.key: others can read .* run: chmod 600 "):
        load_pair(certificate_path, key_path, NOW)


def test_damaged_files_raise_only_the_documented_error(tmp_path: Path, ec_key: Any) -> None:
    rng = random.Random(20260601)
    certificate = build(ec_key, extensions=[SAN, usage(digital_signature=True)])
    wholes = {
        "CERTIFICATE": der(certificate),
        "PRIVATE KEY": base64.b64decode(b"".join(pem_of_key(ec_key).split(b"\n")[1:-2])),
    }
    refused = 0
    for turn in range(600):
        label = ("CERTIFICATE", "PRIVATE KEY")[turn % 2]
        data = bytearray(wholes[label])
        position = rng.randrange(len(data))
        match rng.randrange(4):
            case 0:
                del data[position:]
            case 1:
                del data[position]
            case _:
                data[position] ^= 1 << rng.randrange(8)
        text = pem_of(bytes(data), label)
        paths = write_pair(
            tmp_path,
            text if label == "CERTIFICATE" else [certificate],
            text if label == "PRIVATE KEY" else ec_key,
        )
        try:
            load_pair(*paths, NOW)
        except CertificateError:
            refused += 1
    assert refused > 450


# --- pins


@pytest.mark.parametrize("kind", ["rsa", "p256", "p384", "ed25519"])
def test_pin_equals_that_of_openssl(kind: str, rsa_key: Any, ec_key: Any) -> None:
    key = {
        "rsa": rsa_key,
        "p256": ec_key,
        "p384": ec.generate_private_key(ec.SECP384R1()),
        "ed25519": ed25519.Ed25519PrivateKey.generate(),
    }[kind]
    certificate = build(key, algorithm=None if kind == "ed25519" else hashes.SHA256())
    public = openssl("x509", "-pubkey", "-noout", data=pem(certificate)).encode()
    info = base64.b64decode(b"".join(public.splitlines()[1:-1]))
    expected = "sha256/" + base64.b64encode(hashlib.sha256(info).digest()).decode()
    assert pin_of(certificate) == expected


def test_pin_stays_with_the_key(rsa_key: Any, other_rsa_key: Any) -> None:
    assert pin_of(build(rsa_key)) == pin_of(build(rsa_key, subject="other"))
    assert pin_of(build(rsa_key)) != pin_of(build(other_rsa_key))


def test_matching_bytes_are_recognized(rsa_key: Any, other_rsa_key: Any) -> None:
    assert pair.match(pem(build(rsa_key)), pem_of_key(rsa_key))
    assert not pair.match(pem(build(rsa_key)), pem_of_key(other_rsa_key))
    assert not pair.match(pem(build(rsa_key)), pem_of_key(ed25519.Ed25519PrivateKey.generate()))
    assert not pair.match(pem(build(rsa_key)), b"")
    assert not pair.match(b"", pem_of_key(rsa_key))
