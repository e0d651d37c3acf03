from __future__ import annotations

import errno
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes

from tests.certs.support import DAY, NOW, build, constrain, der, ensure, openssl, pem, pem_of, pem_of_key
from zcproto.certs import authority, keys, pair, profile
from zcproto.errors import CertificateError


def read(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_authority_is_created_once(made: Path) -> None:
    before = (made / "ca.crt").read_bytes(), (made / "ca.key").read_bytes()
    ensure(made, now=NOW + 80 * DAY)
    assert ((made / "ca.crt").read_bytes(), (made / "ca.key").read_bytes()) == before


def test_authority_for_ecdsa_alone_is_ecdsa_p384(tmp_path: Path) -> None:
    (one,) = ensure(tmp_path / "certs", key_types=["ecdsa-p256"])
    ca = read(tmp_path / "certs" / "ca.crt")
    assert keys.key_type_of(ca.public_key()) == "ecdsa-p384"
    assert isinstance(ca.signature_hash_algorithm, hashes.SHA384)
    assert isinstance(read(one.certificate).signature_hash_algorithm, hashes.SHA384)
    command = ("verify", "-x509_strict", "-purpose", "sslserver", "-attime", str(int(NOW.timestamp())))
    assert openssl(*command, "-CAfile", tmp_path / "certs" / "ca.crt", one.certificate).endswith(": OK\n")


@pytest.mark.parametrize("key_types", [["rsa-4096"], ["ecdsa-p256", "rsa-2048"]])
def test_authority_for_rsa_is_rsa_of_4096_bits(key_types: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert authority.key_type_for(key_types) == "rsa-4096"


def test_rsa_certificate_of_an_ecdsa_authority_is_reported(tmp_path: Path) -> None:
    ensure(tmp_path / "certs", key_types=["ecdsa-p256"])
    before = (tmp_path / "certs" / "ca.crt").read_bytes()
    sentences: list[str] = []
    ensure(tmp_path / "certs", progress=sentences.append)
    assert (tmp_path / "certs" / "ca.crt").read_bytes() == before
    assert sentences[-1].startswith(
        f"ATTENTION: {tmp_path}/certs/server.crt is for clients that support only RSA, but they cannot verify it"
    )


def test_lost_authority_certificate_is_reissued_from_its_key(made: Path) -> None:
    old = read(made / "ca.crt")
    leaf = (made / "server.crt").read_bytes()
    (made / "ca.crt").unlink()
    sentences: list[str] = []
    ensure(made, progress=sentences.append)
    new = read(made / "ca.crt")
    assert new.subject == old.subject
    assert new.public_key() == old.public_key()
    assert new.serial_number != old.serial_number
    assert (made / "server.crt").read_bytes() == leaf
    assert sentences == [f"Renewed {made}/ca.crt with its key, until 2036-05-31."]


def test_damaged_authority_certificate_is_set_aside_and_reissued(made: Path) -> None:
    (made / "ca.crt").write_bytes(b"junk")
    sentences: list[str] = []
    ensure(made, progress=sentences.append)
    assert (made / "ca.crt.aside").read_bytes() == b"junk"
    read(made / "server.crt").verify_directly_issued_by(read(made / "ca.crt"))
    assert sentences[0].endswith(f"It was set aside as {made}/ca.crt.aside.")


@pytest.mark.parametrize(
    "when", [3652 * DAY - 90 * DAY + DAY, 4000 * DAY, -2 * DAY], ids=["due", "expired", "early"]
)
def test_authority_is_renewed_with_its_key_before_a_leaf_could_outlive_it(made: Path, when: Any) -> None:
    old = read(made / "ca.crt")
    (one, _) = ensure(made, now=NOW + when)
    new = read(made / "ca.crt")
    assert new.public_key() == old.public_key()
    assert new.subject == old.subject
    assert new.not_valid_after_utc > one.not_after == (NOW + when + 90 * DAY).replace(microsecond=0)
    assert new.not_valid_before_utc <= one.not_before


def test_authority_is_not_renewed_early(made: Path) -> None:
    old = (made / "ca.crt").read_bytes()
    ensure(made, now=NOW + 3652 * DAY - 91 * DAY)
    assert (made / "ca.crt").read_bytes() == old


def fail_to_write(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The disk is full for the file of this name."""
    real = os.open

    def full(path: Any, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_EXCL and Path(path).name == f".{name}.new":
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", full)


def test_failed_authority_renewal_keeps_the_valid_certificate(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = read(made / "ca.crt")
    fail_to_write(monkeypatch, "ca.crt")
    sentences: list[str] = []
    (one, _) = ensure(made, now=NOW + 3600 * DAY, progress=sentences.append)
    assert one.not_after == old.not_valid_after_utc
    assert (
        f"{made}/ca.crt could not be renewed: {made}/ca.crt: cannot be written: No space left" in sentences[0]
    )
    with pytest.raises(CertificateError, match=r"ca\.crt: cannot be written: No space left on device"):
        ensure(made, now=NOW + 3700 * DAY)


def test_lost_authority_key_keeps_leaves_served_until_they_expire(made: Path) -> None:
    (made / "ca.key").unlink()
    before = [(made / name).read_bytes() for name in ("server.crt", "server-ecdsa.crt")]
    sentences: list[str] = []
    ensure(made, progress=sentences.append)
    assert sentences == []
    pairs = ensure(made, now=NOW + 80 * DAY, progress=sentences.append)
    assert [pair.certificate.read_bytes() for pair in pairs] == before
    assert len(sentences) == 2
    assert sentences[0].startswith(
        f"{made}/server.crt could not be renewed (it expires on 2026-08-30 12:30 UTC): {made}/ca.key: does not"
        " exist, so no certificate can be issued; restore the key, or move ca.crt and"
    )
    with pytest.raises(
        CertificateError, match=r"ca\.key: does not exist, so no certificate can be issued; restore the"
    ):
        ensure(made, now=NOW + 91 * DAY)
    with pytest.raises(
        CertificateError, match=r"must be issued \(it lacks the name new\.example\): .*ca\.key"
    ):
        ensure(made, names=["new.example"])
    assert not (made / "ca.key").exists()


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("other", r"ca\.key: does not belong to .*ca\.crt; no certificate can be issued; restore the key"),
        ("ec", r"ca\.key: does not belong to .*ca\.crt; no certificate can be issued; restore the key"),
        (
            b"junk",
            r"ca\.key: contains no PEM key that can be parsed; restore the file; no certificate can be issued",
        ),
    ],
)
def test_wrong_authority_key_counts_as_missing(
    made: Path, other_rsa_key: Any, ec_key: Any, key: Any, says: str
) -> None:
    found = {"other": pem_of_key(other_rsa_key), "ec": pem_of_key(ec_key)}
    data = found.get(key, key)
    (made / "ca.key").write_bytes(data)
    assert len(ensure(made)) == 2
    with pytest.raises(CertificateError, match=says):
        ensure(made, now=NOW + 91 * DAY)
    assert (made / "ca.key").read_bytes() == data


def test_unreadable_authority_is_reported(made: Path) -> None:
    (made / "ca.crt").unlink()
    (made / "ca.key").write_bytes(b"junk")
    with pytest.raises(CertificateError, match=r"ca\.key: contains no PEM key"):
        ensure(made)
    (made / "ca.key").rename(made / "ca.crt")
    with pytest.raises(CertificateError, match=r"ca\.crt: contains no PEM certificate"):
        ensure(made)
    assert (made / "ca.crt").read_bytes() == b"junk"


def test_authority_key_readable_by_others_prevents_start(made: Path) -> None:
    (made / "ca.key").chmod(0o640)
    with pytest.raises(CertificateError, match=r"ca\.key: others can read .*; run: chmod 600 .*ca\.key"):
        ensure(made)


def test_authority_of_another_issuer_is_never_replaced(made: Path, rsa_key: Any, ec_key: Any) -> None:
    for key in (rsa_key, ec_key):
        foreign = pem(build(key, subject="A company's CA"))
        (made / "ca.crt").write_bytes(foreign)
        (made / "ca.key").write_bytes(pem_of_key(key))
        with pytest.raises(
            CertificateError, match=r"ca\.crt: was not created here and is never replaced; move it"
        ):
            ensure(made, now=NOW + 5000 * DAY)
        assert (made / "ca.crt").read_bytes() == foreign


def test_authority_with_unknown_key_type_is_never_replaced(made: Path, ec_key: Any) -> None:
    ec_public_key = bytes.fromhex("06072a8648ce3d0201")  # RFC 5480 section 2.1.1
    data = der(build(ec_key))
    assert data.count(ec_public_key) == 1
    unknown = pem_of(data.replace(ec_public_key, ec_public_key[:-1] + b"\x7f"))
    (made / "ca.crt").write_bytes(unknown)
    with pytest.raises(CertificateError, match=r"ca\.crt: was not created here and is never replaced"):
        ensure(made)
    assert (made / "ca.crt").read_bytes() == unknown


def test_leaves_without_an_authority_are_not_overwritten(made: Path) -> None:
    for name in ("ca.crt", "ca.key"):
        (made / name).unlink()
    leaf = (made / "server.crt").read_bytes()
    with pytest.raises(CertificateError, match=r"server\.crt: was not issued by"):
        ensure(made)
    assert (made / "server.crt").read_bytes() == leaf
    assert not (made / "ca.crt").exists()
    for path in made.glob("server*"):
        path.unlink()
    assert len(ensure(made)) == 2


def test_copied_folder_keeps_working(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "copy")
    assert [one.pin for one in ensure(made)] == [one.pin for one in ensure(tmp_path / "copy")]


# --- what it may issue for


def test_new_authority_has_no_name_constraints(made: Path) -> None:
    assert not profile.has_constraints(read(made / "ca.crt"))


@pytest.fixture
def constrained_folder(made: Path) -> Path:
    """A folder that an earlier version created."""
    constrain(made, "localhost", "zcp.example.com")
    return made


@pytest.mark.parametrize("name", ["new.example", "*.example.com"])
def test_configured_name_outside_constraints_reissues_the_authority_and_is_reported(
    constrained_folder: Path, name: str
) -> None:
    made = constrained_folder
    old = read(made / "ca.crt")
    sentences: list[str] = []
    pairs = ensure(made, names=["zcp.example.com", name], progress=sentences.append)
    new = read(made / "ca.crt")
    assert new.public_key() == old.public_key()
    assert new.subject == old.subject
    assert not profile.has_constraints(new)
    assert all(name in pair.names for pair in pairs)
    assert sentences[1] == (
        f"ATTENTION: {made}/ca.crt was reissued because the old one is not valid for {name}. Clients that have"
        " the old file refuse this server from now on: give them the new one."
    )
    openssl_accepts(made, NOW)
    before = (made / "ca.crt").read_bytes()
    ensure(made, names=["zcp.example.com", name])
    ensure(made)  # and the name is not wanted any more
    assert (made / "ca.crt").read_bytes() == before


def openssl_accepts(folder: Path, now: datetime) -> None:
    at = str(int(now.timestamp()))
    for name in ("server.crt", "server-ecdsa.crt"):
        strict = ("verify", "-x509_strict", "-purpose", "sslserver", "-attime", at)
        openssl(*strict, "-CAfile", folder / "ca.crt", folder / name)


def test_host_name_outside_constraints_is_left_out_and_reported(constrained_folder: Path) -> None:
    made = constrained_folder
    before, sentences = (made / "ca.crt").read_bytes(), list[str]()
    arguments: dict[str, Any] = {"host_names": ["localhost", "box", "box.lan", "10.0.0.7"]}
    pairs = ensure(made, **arguments, progress=sentences.append)
    assert (made / "ca.crt").read_bytes() == before
    assert pairs[0].names == ("zcp.example.com", "192.0.2.7", "localhost", "10.0.0.7")
    assert sentences[1] == (
        f"{made}/server.crt leaves out box, box.lan: ca.crt may not issue for it. Add it to certificates.names if"
        " clients use it; they will then need a new ca.crt."
    )
    openssl_accepts(made, NOW)
    sentences.clear()
    assert ensure(made, **arguments, progress=sentences.append) == pairs
    assert sentences == []
    with_box = ensure(made, **arguments, names=["box.lan"])
    assert "box" in with_box[0].names  # where a new one is needed, the host's names are taken in
    openssl_accepts(made, NOW)


def test_authority_that_permits_none_of_the_names_is_reissued(tmp_path: Path) -> None:
    folder, sentences = tmp_path / "certs", list[str]()
    arguments: dict[str, Any] = {"names": [], "key_types": ["ecdsa-p256"]}
    ensure(folder, **arguments, host_names=["a.lan"])
    constrain(folder, "a.lan")
    (one,) = ensure(folder, **arguments, host_names=["b.lan"], progress=sentences.append)
    assert one.names == ("b.lan",)
    assert "ATTENTION" in sentences[1]


def test_authority_without_constraints_is_kept_for_any_name(made: Path) -> None:
    old = read(made / "ca.crt")
    sentences: list[str] = []
    changes: dict[str, Any] = {"names": ["new.example"], "host_names": ["localhost", "box"]}
    assert "box" in ensure(made, **changes, progress=sentences.append)[0].names
    assert read(made / "ca.crt") == old
    assert len(sentences) == 2
    ensure(made, **changes, now=NOW + 3600 * DAY)
    renewed = read(made / "ca.crt")
    assert renewed != old
    assert not profile.has_constraints(renewed)


def test_constrained_authority_is_renewed_without_constraints(constrained_folder: Path) -> None:
    made, later = constrained_folder, NOW + 3600 * DAY
    ensure(made, now=later)
    assert not profile.has_constraints(read(made / "ca.crt"))
    openssl_accepts(made, later)


def test_clients_with_a_constrained_authority_accept_what_its_successor_issues(
    constrained_folder: Path, tmp_path: Path
) -> None:
    made, old = constrained_folder, tmp_path / "ca-old.crt"
    assert ensure(made) == ensure(made)  # nothing is issued only because of the constraints
    (made / "ca.crt").rename(old)
    for path in made.glob("server*.crt"):
        path.unlink()
    ensure(made)
    assert not profile.has_constraints(read(made / "ca.crt"))
    openssl_accepts(made, NOW)
    at = ("-attime", str(int(NOW.timestamp())))
    for name in ("server.crt", "server-ecdsa.crt"):
        openssl("verify", "-x509_strict", "-purpose", "sslserver", *at, "-CAfile", old, made / name)


def test_leaf_with_a_name_outside_constraints_is_reissued(constrained_folder: Path) -> None:
    made = constrained_folder
    constrain(made, "localhost", "new.example")
    sentences: list[str] = []
    arguments: dict[str, Any] = {"names": ["new.example"], "host_names": ["localhost"]}
    for name in ("server.crt", "server-ecdsa.crt"):
        assert "zcp.example.com" in pair.names_of(read(made / name))
    pairs = ensure(made, **arguments, progress=sentences.append)
    assert pairs[0].names == ("new.example", "localhost")
    openssl_accepts(made, NOW)


def test_unconfigured_name_outside_constraints_does_not_reissue_the_authority(made: Path) -> None:
    authority = constrain(made, "localhost")
    sentences: list[str] = []
    ensure(made, names=[], progress=sentences.append)
    assert read(made / "ca.crt") == authority
    reason = "(the authority may not issue for its name zcp.example.com)"
    assert [reason in sentence for sentence in sentences] == [True, True]
    openssl_accepts(made, NOW)


def test_authority_without_key_cannot_be_extended_for_more_names(constrained_folder: Path) -> None:
    made = constrained_folder
    (made / "ca.key").unlink()
    before = (made / "ca.crt").read_bytes()
    with pytest.raises(
        CertificateError, match=r"must be issued \(it lacks the name new\.example\): .*ca\.key"
    ):
        ensure(made, names=["new.example"])
    assert (made / "ca.crt").read_bytes() == before


def test_failed_extension_of_the_authority_prevents_start(
    constrained_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = constrained_folder
    before = {path.name: path.read_bytes() for path in made.iterdir()}
    with monkeypatch.context() as patch:
        fail_to_write(patch, "ca.crt")
        with pytest.raises(CertificateError, match=r"ca\.crt: cannot be written: No space left on device"):
            ensure(made, names=["new.example"])
    assert {path.name: path.read_bytes() for path in made.iterdir()} == before
    assert "new.example" in ensure(made, names=["new.example"])[0].names


def test_authority_with_unparsable_constraints_is_never_replaced(made: Path, rsa_key: Any) -> None:
    bad = x509.UnrecognizedExtension(x509.ExtensionOID.NAME_CONSTRAINTS, b"\x30\x03\x82\x05a")
    name = (
        profile.authority_name(rsa_key.public_key(), authority.SERVER.title)
        .rfc4514_string()
        .removeprefix("CN=")
    )
    (made / "ca.crt").write_bytes(pem(build(rsa_key, subject=name, extensions=[bad])))
    (made / "ca.key").write_bytes(pem_of_key(rsa_key))
    with pytest.raises(CertificateError, match=r"ca\.crt: was not created here and is never replaced"):
        ensure(made)


def test_certificates_issued_by_two_clocks_are_valid_for_both(made: Path) -> None:
    """The clock runs ahead by 20 years, and is set right: keys stay, and what is served is valid."""
    before = ensure(made)
    ensure(made, now=NOW + 7300 * DAY)
    assert read(made / "ca.crt").not_valid_before_utc > NOW
    after = ensure(made, now=NOW + DAY)
    assert [pair.pin for pair in after] == [pair.pin for pair in before]
    openssl_accepts(made, NOW + DAY)


def test_clock_starting_in_1970_causes_no_lasting_damage(made: Path) -> None:
    before = ensure(made)
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    early = ensure(made, now=epoch)
    assert early[0].not_before < epoch < early[0].not_after
    after = ensure(made, now=NOW + DAY)
    assert [pair.pin for pair in after] == [pair.pin for pair in before]
    openssl_accepts(made, NOW + DAY)
