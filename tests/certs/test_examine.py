"""What is said of a certificate or key before a server is given it. The certificates are built by hand."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import AuthorityInformationAccessOID, ExtendedKeyUsageOID

from tests.certs.support import DAY, NOW, build, der, pem, pem_of, pem_of_key, write_pair
from zcproto.certs.examine import Examination, examine
from zcproto.certs.pair import load_pair
from zcproto.errors import CertificateError

SAN = x509.SubjectAlternativeName(
    [x509.DNSName("A.example"), x509.DNSName("*.b.example"), x509.IPAddress(ip_address("192.0.2.7"))]
)
LONG = {"not_before": NOW - DAY, "not_after": NOW + 300 * DAY}


@pytest.fixture
def root_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


@pytest.fixture
def root(root_key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    return build(root_key, subject="root", **LONG)


def leaf(key: Any, root_key: Any, *extensions: x509.ExtensionType, **changes: Any) -> x509.Certificate:
    return build(key, signer=root_key, issuer="root", extensions=extensions or (SAN,), **{**LONG, **changes})


def look(folder: Path, chain: Sequence[x509.Certificate], key: Any, **options: Any) -> Examination:
    certificate_path, key_path = write_pair(folder, chain, key)
    return examine(certificate_path, key_path, NOW, **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    return tmp_path


# --- nothing to say --------------------------------------------------------------------------------------


def test_valid_pair_has_no_findings(folder: Path, ec_key: ec.EllipticCurvePrivateKey, root_key: Any) -> None:
    found = look(folder, [leaf(ec_key, root_key)], ec_key)
    assert (found.refused, found.warnings) == ([], [])
    assert len(found.chain) == 1
    assert found.key is not None


def test_one_file_can_hold_certificate_and_key(
    folder: Path, ec_key: ec.EllipticCurvePrivateKey, root_key: Any
) -> None:
    path = folder / "both.pem"
    path.touch(0o600)
    path.write_bytes(pem(leaf(ec_key, root_key)) + pem_of_key(ec_key))
    for key_path in (None, path, folder / "." / "both.pem"):
        found = examine(path, key_path, NOW)
        assert (found.refused, found.warnings) == ([], [])
        assert found.key is not None


def test_certificate_is_examined_without_a_key(folder: Path, ec_key: Any, root_key: Any) -> None:
    certificate_path, _ = write_pair(folder, [leaf(ec_key, root_key)], ec_key)
    found = examine(certificate_path, None, NOW)
    assert (found.refused, found.warnings, found.key) == ([], [], None)


def test_key_is_examined_alone(folder: Path, ec_key: ec.EllipticCurvePrivateKey) -> None:
    _, key_path = write_pair(folder, b"", ec_key)
    found = examine(key_path, None, NOW)
    assert (found.refused, found.warnings, found.chain) == ([], [], [])
    assert isinstance(found.key, ec.EllipticCurvePrivateKey)


def test_encrypted_key_needs_its_passphrase(folder: Path, ec_key: Any, root_key: Any) -> None:
    encrypted = pem_of_key(ec_key, encryption=serialization.BestAvailableEncryption(b"secret words"))
    certificate_path, key_path = write_pair(folder, [leaf(ec_key, root_key)], encrypted)
    assert examine(certificate_path, key_path, NOW, passphrase=b"secret words").refused == []
    for passphrase in (None, b"wrong words"):
        (reason,) = examine(certificate_path, key_path, NOW, passphrase=passphrase).refused
        assert "words" not in reason
        assert "passphrase" in reason


def test_one_file_can_hold_certificate_and_encrypted_key(folder: Path, ec_key: Any, root_key: Any) -> None:
    path = folder / "both.pem"
    path.touch(0o600)
    encrypted = pem_of_key(ec_key, encryption=serialization.BestAvailableEncryption(b"secret words"))
    path.write_bytes(pem(leaf(ec_key, root_key)) + encrypted)
    found = examine(path, None, NOW, passphrase=b"secret words")
    assert (found.refused, found.warnings) == ([], [])
    assert found.key is not None


def test_key_is_not_in_the_repr(folder: Path, ec_key: Any, root_key: Any) -> None:
    assert "key=" not in repr(look(folder, [leaf(ec_key, root_key)], ec_key))


# --- refused ---------------------------------------------------------------------------------------------


def test_all_problems_are_reported_at_once(
    folder: Path, ec_key: Any, root_key: Any, root: x509.Certificate
) -> None:
    weak = rsa.generate_private_key(65537, 1024)
    usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])
    other = build(ec.generate_private_key(ec.SECP256R1()), subject="other", not_after=NOW + 400 * DAY)
    bad = leaf(weak, root_key, usage, not_before=NOW - 9 * DAY, not_after=NOW - DAY)
    certificate_path, key_path = write_pair(folder, [bad, other, root], ec_key)
    key_path.chmod(0o644)
    certificate_path.chmod(0o666)
    folder.chmod(0o755)
    found = examine(certificate_path, key_path, NOW, host="a.example")
    whole = "\n".join(found.refused)
    for words in (
        "others can change this file (mode 0666)",
        "others can read or change this file (mode 0644)",
        "others can list or change this folder (mode 0755)",
        "too weak",
        "does not belong to",
        "lacks serverAuth",
        "certificate 2 is not the issuer of certificate 1",
        "expired on",
        "is not valid for a.example",
    ):
        assert whole.count(words) == 1, words
    assert len(found.refused) == 9
    assert "names no host" in "\n".join(found.warnings)


@pytest.mark.parametrize("secret", ["certificate", "key"])
def test_wrong_permissions_are_reported_in_the_words_of_a_server(
    folder: Path, ec_key: Any, root_key: Any, secret: str
) -> None:
    certificate_path, key_path = write_pair(folder, [leaf(ec_key, root_key)], ec_key)
    (certificate_path if secret == "certificate" else key_path).chmod(0o666)
    with pytest.raises(CertificateError) as refusal:
        load_pair(certificate_path, key_path, NOW)
    assert examine(certificate_path, key_path, NOW).refused == [str(refusal.value)]


def test_file_given_as_key_must_be_private_whatever_it_holds(
    folder: Path, ec_key: Any, root_key: Any
) -> None:
    certificate_path, key_path = write_pair(folder, [leaf(ec_key, root_key)], b"not a key")
    key_path.chmod(0o644)
    refused = "\n".join(examine(certificate_path, key_path, NOW).refused)
    assert "others can read or change this file (mode 0644)" in refused


def test_listable_folder_is_refused_for_one_file_with_both(folder: Path, ec_key: Any, root_key: Any) -> None:
    path = folder / "both.pem"
    path.touch(0o600)
    path.write_bytes(pem(leaf(ec_key, root_key)) + pem_of_key(ec_key))
    folder.chmod(0o755)
    (reason,) = examine(path, None, NOW).refused
    assert reason.endswith(f"run: chmod 700 {folder}")


def test_weak_key_alone_is_refused(folder: Path) -> None:
    _, key_path = write_pair(folder, b"", rsa.generate_private_key(65537, 1024))
    (reason,) = examine(key_path, None, NOW).refused
    assert "too weak" in reason


def test_missing_key_file_is_an_error(folder: Path, ec_key: Any, root_key: Any) -> None:
    certificate_path, _ = write_pair(folder, [leaf(ec_key, root_key)], ec_key)
    with pytest.raises(CertificateError, match=r"absent\.key: cannot be read"):
        examine(certificate_path, folder / "absent.key", NOW)


@pytest.mark.parametrize("data", [b"", b"hello", pem_of(b"\x30\x03\x02\x01\x01"), pem_of(b"x")[:-20]])
def test_file_without_certificate_and_key_is_refused(folder: Path, data: bytes) -> None:
    path = folder / "site.pem"
    path.write_bytes(data)
    path.chmod(0o600)
    found = examine(path, None, NOW)
    assert len(found.refused) == 1
    assert found.chain == []


def test_unparsable_extension_is_reported_once(folder: Path, ec_key: Any, root_key: Any) -> None:
    damaged = x509.UnrecognizedExtension(x509.SubjectAlternativeName.oid, b"\x30\x03\x02")
    found = look(folder, [leaf(ec_key, root_key, damaged)], ec_key, host="a.example")
    assert found.refused == [
        f"{folder}/site.crt: contains a certificate that cannot be parsed; replace the file"
    ]


def test_unparsable_name_is_refused_as_by_a_server(folder: Path, ec_key: Any, root_key: Any) -> None:
    good = der(leaf(ec_key, root_key, subject="owner of it"))
    path, key_path = write_pair(folder, pem_of(good.replace(b"owner", b"own\xffr")), ec_key)
    refusal = f"{path}: contains a certificate that cannot be parsed; replace the file"
    assert examine(path, key_path, NOW).refused == [refusal]
    with pytest.raises(CertificateError) as caught:
        load_pair(path, key_path, NOW)
    assert str(caught.value) == refusal


def test_path_that_cannot_be_read_is_an_error(folder: Path) -> None:
    os.mkfifo(folder / "pipe", 0o600)
    for path in (folder / "absent", folder, folder / "pipe", Path("a\0b")):
        with pytest.raises(CertificateError):
            examine(path, None, NOW)


def test_huge_file_is_an_error(folder: Path) -> None:
    path = folder / "huge"
    path.touch(0o600)
    os.truncate(path, 1 << 30)
    with pytest.raises(CertificateError, match="is larger than"):
        examine(path, None, NOW)


@pytest.mark.parametrize(
    ("host", "good"),
    [
        ("a.example", True),
        ("A.Example.", True),
        ("x.b.example", True),
        ("b.example", False),
        ("x.y.b.example", False),
        ("192.0.2.7", True),
        ("192.0.2.8", False),
        ("example", False),
    ],
)
def test_host_name_must_be_in_the_certificate(
    folder: Path, ec_key: Any, root_key: Any, host: str, good: bool
) -> None:
    found = look(folder, [leaf(ec_key, root_key)], ec_key, host=host)
    assert (found.refused == []) is good
    if not good:
        assert found.refused[0].endswith(
            "clients refuse it; it is valid for A.example, *.b.example, 192.0.2.7"
        )


def test_names_in_messages_are_escaped_and_truncated(folder: Path, ec_key: Any, root_key: Any) -> None:
    names = [x509.DNSName(f"\x1b[2J\n{'a' * 60}{number}") for number in range(10)]
    found = look(
        folder, [leaf(ec_key, root_key, x509.SubjectAlternativeName(names))], ec_key, host="b.example"
    )
    (refusal,) = found.refused
    assert refusal.isprintable()
    assert r"it is valid for \x1b[2J\naaa" in refusal
    assert len(refusal) < 500 + len(str(folder))


def test_invalid_host_name_is_an_error(folder: Path, ec_key: Any, root_key: Any) -> None:
    with pytest.raises(CertificateError, match="is not a valid name"):
        look(folder, [leaf(ec_key, root_key)], ec_key, host="no name")


def test_naive_time_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="aware"):
        examine(folder / "x", None, datetime(2026, 6, 1))


# --- warnings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("life", "left", "near"),
    [(90, 30, True), (90, 31, False), (9, 3, True), (9, 4, False), (1000, 30, True), (1000, 31, False)],
)
def test_near_expiry_is_a_warning(
    folder: Path, ec_key: Any, root_key: Any, life: int, left: int, near: bool
) -> None:
    end = NOW.replace(microsecond=0) + left * DAY
    made = leaf(ec_key, root_key, not_before=end - life * DAY, not_after=end)
    found = look(folder, [made], ec_key)
    assert found.refused == []
    assert [("expires on" in each) for each in found.warnings] == ([True] if near else [])


def test_chain_that_expires_before_its_leaf_is_a_warning(folder: Path, ec_key: Any, root_key: Any) -> None:
    middle_key = ec.generate_private_key(ec.SECP256R1())
    middle = build(
        middle_key,
        signer=root_key,
        subject="middle",
        issuer="root",
        not_before=NOW - DAY,
        not_after=NOW + DAY,
    )
    made = build(ec_key, signer=middle_key, issuer="middle", extensions=[SAN], **LONG)
    (warning,) = look(folder, [made, middle], ec_key).warnings
    assert "certificate 2 of the chain expires before the server's" in warning


def test_root_in_the_file_is_a_warning_with_its_size(
    folder: Path, ec_key: Any, root_key: Any, root: x509.Certificate
) -> None:
    found = look(folder, [leaf(ec_key, root_key), root], ec_key)
    assert found.refused == []
    size = len(root.public_bytes(serialization.Encoding.DER)) / 1024
    assert found.warnings == [
        f"{folder}/site.crt: contains the root, which adds {size:.1f} KiB to each handshake; remove it,"
        " because clients that trust it have it"
    ]


def test_self_signed_certificate_is_a_warning(folder: Path, ec_key: Any) -> None:
    (warning,) = look(folder, [build(ec_key, extensions=[SAN], **LONG)], ec_key).warnings
    assert "is self-signed" in warning


def access(method: x509.ObjectIdentifier) -> x509.AuthorityInformationAccess:
    where = x509.UniformResourceIdentifier("http://ca.example/")
    return x509.AuthorityInformationAccess([x509.AccessDescription(method, where)])


def test_leaf_without_its_chain_is_a_warning(
    folder: Path, ec_key: Any, root_key: Any, root: x509.Certificate
) -> None:
    made = leaf(ec_key, root_key, SAN, access(AuthorityInformationAccessOID.CA_ISSUERS))
    (warning,) = look(folder, [made], ec_key).warnings
    assert warning.endswith("use the file with the full chain")
    assert "full chain" not in "".join(look(folder, [made, root], ec_key).warnings)
    only_ocsp = leaf(ec_key, root_key, SAN, access(AuthorityInformationAccessOID.OCSP))
    assert look(folder, [only_ocsp], ec_key).warnings == []


def test_must_staple_is_a_warning(folder: Path, ec_key: Any, root_key: Any) -> None:
    made = leaf(ec_key, root_key, SAN, x509.TLSFeature([x509.TLSFeatureType.status_request]))
    (warning,) = look(folder, [made], ec_key).warnings
    assert "must-staple" in warning


# --- the same verdict as a server's ----------------------------------------------------------------------


@pytest.mark.parametrize("case", range(8))
def test_server_refuses_exactly_what_is_refused_here(
    folder: Path, ec_key: Any, root_key: Any, root: x509.Certificate, other_rsa_key: Any, case: int
) -> None:
    chain, key = [leaf(ec_key, root_key), root], ec_key
    if case == 1:
        chain.reverse()
    elif case == 2:
        key = other_rsa_key
    elif case == 3:
        chain = [leaf(ec_key, root_key, algorithm=hashes.SHA224())]
    elif case == 4:
        chain = [leaf(ec_key, root_key, not_before=NOW + DAY)]
    elif case == 5:
        chain *= 2
    elif case == 6:
        chain = [build(ec_key, signer=root_key, issuer="root")]
    elif case == 7:
        chain *= 6
    certificate_path, key_path = write_pair(folder, chain, key)
    found = examine(certificate_path, key_path, NOW)
    if found.refused:
        with pytest.raises(CertificateError) as refusal:
            load_pair(certificate_path, key_path, NOW)
        assert str(refusal.value) in found.refused
    else:
        load_pair(certificate_path, key_path, NOW)
    assert bool(found.refused) is (case not in (0, 6))  # 6 names no host, which clients refuse


def test_time_in_another_zone_is_the_same_time(folder: Path, ec_key: Any, root_key: Any) -> None:
    certificate_path, key_path = write_pair(folder, [leaf(ec_key, root_key)], ec_key)
    there = (NOW + 300 * DAY).astimezone(timezone(timedelta(hours=14)))
    assert examine(certificate_path, key_path, there).refused != []
    assert examine(certificate_path, key_path, there - timedelta(seconds=1)).refused == []
