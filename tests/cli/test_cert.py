"""`zcproto cert`: what it prints, what it writes, and what it refuses."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

import zcproto
from tests.cli.cert_helpers import (
    CONFIG,
    DAY,
    Capture,
    configure,
    data_of,
    leaf,
    made,
    made_once,
    pin_by_hand,
    quick_authority,
    run,
    use_files,
)
from tests.conftest import ServerPairs
from zcproto.certs.pair import load_pair

__all__ = ["made", "made_once", "quick_authority"]


# --- export-ca -------------------------------------------------------------------------------------------


def test_export_ca_writes_no_key(made: Path, tmp_path: Path, capfdbinary: Any) -> None:
    with (made / "ca.crt").open("ab") as file:
        file.write((made / "ca.key").read_bytes())
    assert run("export-ca") == 0
    out = capfdbinary.readouterr().out
    assert x509.load_pem_x509_certificate(out) == leaf(made / "ca.crt")
    assert b"PRIVATE" not in out
    assert run("export-ca", "--der") == 0
    assert x509.load_der_x509_certificate(capfdbinary.readouterr().out) == leaf(made / "ca.crt")


def test_export_ca_to_a_file_is_private(made: Path, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "exported.crt"
    before = os.umask(0)
    try:
        assert run("export-ca", path) == 0
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    assert leaf(path) == leaf(made / "ca.crt")
    assert run("export-ca", path) == 1
    assert "--force replaces it" in capsys.readouterr().err
    assert run("export-ca", path, "--force", "--der") == 0
    assert x509.load_der_x509_certificate(path.read_bytes()) == leaf(made / "ca.crt")


def test_export_ca_of_clients(made: Path, home: Path, tmp_path: Path, ca_file: Path, capsys: Capture) -> None:
    assert run("export-ca", "--client") == 2
    assert "`zcproto cert issue-client` creates it" in capsys.readouterr().err
    run("issue-client", "alice")
    run("export-ca", "--client", tmp_path / "own.crt")
    assert leaf(tmp_path / "own.crt") == leaf(made / "client-ca.crt")
    theirs = home / "theirs.crt"
    shutil.copy(ca_file, theirs)
    theirs.chmod(0o600)
    configure(home, f'[tls]\nclient_auth = "required"\nclient_ca_file = "{theirs}"\n')
    run("export-ca", "--client", tmp_path / "theirs.crt")
    assert leaf(tmp_path / "theirs.crt") == leaf(theirs)


def test_export_ca_of_external_certificates_is_an_error(
    home: Path, capsys: Capture, server_pairs: ServerPairs
) -> None:
    use_files(home, server_pairs)
    assert run("export-ca") == 2
    assert "get the CA from the issuer" in capsys.readouterr().err


def test_export_ca_before_the_first_start_is_an_error(home: Path, capsys: Capture) -> None:
    home.mkdir(0o700)
    assert run("export-ca") == 2
    assert "the first start of a server creates it" in capsys.readouterr().err


# --- check -----------------------------------------------------------------------------------------------


def test_check_describes_a_valid_certificate(made: Path, capsys: Capture) -> None:
    words = (made / "server-ecdsa.crt", "--key", made / "server-ecdsa.key", "--name", "zcp.example.com")
    assert run("check", *words) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["pin"] == pin_by_hand(leaf(made / "server-ecdsa.crt"))
    assert lines["key"] == "ecdsa-p256"
    assert lines["verdict"] == "a server accepts this certificate"
    data = data_of(capsys, "check", *words, "--json")
    assert (data["good"], data["refused"], data["warnings"]) == (True, [], [])
    assert data["certificates"][0]["pin"] == lines["pin"]
    assert data["key"] == {"key_type": "ecdsa-p256", "pin": lines["pin"]}


def test_check_reports_all_problems(made: Path, capsys: Capture) -> None:
    (made / "server-ecdsa.key").chmod(0o644)
    words = (made / "server-ecdsa.crt", "--key", made / "server-ecdsa.key", "--name", "other.example")
    assert run("check", *words) == 2
    out = capsys.readouterr().out
    assert out.count("REFUSED") == 2
    assert "verdict      a server refuses this\n" in out
    assert len(data_of(capsys, "check", *words, "--json", code=2)["refused"]) == 2


def test_check_of_a_key_shows_only_its_type_and_pin(made: Path, capsys: Capture) -> None:
    assert run("check", made / "server-ecdsa.key") == 0
    out = capsys.readouterr().out
    assert pin_by_hand(leaf(made / "server-ecdsa.crt")) in out
    assert "a server accepts this key" in out
    secret = (made / "server-ecdsa.key").read_text().splitlines()[1]
    assert secret not in out
    data = data_of(capsys, "check", made / "server-ecdsa.key", "--json")
    assert (data["certificates"], data["key"]["key_type"]) == ([], "ecdsa-p256")


def test_check_of_a_chain_counts_it_and_warns(home: Path, tmp_path: Path, ca: Any, capsys: Capture) -> None:
    path = tmp_path / "chain.pem"
    issued = ca.issue_cert("localhost")
    path.write_bytes(issued.cert_chain_pems[0].bytes() + ca.cert_pem.bytes())
    path.chmod(0o644)
    assert run("check", path) == 0
    out = capsys.readouterr().out
    assert "chain    2 certificates" in out
    assert "warning" in out
    assert "KiB to each handshake" in out


def test_check_of_unparsable_files_reports_a_problem(home: Path, tmp_path: Path, capsys: Capture) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "damaged")])
    now = datetime.now(UTC)
    damaged = x509.UnrecognizedExtension(x509.SubjectAlternativeName.oid, b"\x30\x03\x02")
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now - DAY).not_valid_after(now + 90 * DAY)
    made = builder.add_extension(damaged, critical=False).sign(key, hashes.SHA256())
    der = made.public_bytes(serialization.Encoding.DER)
    curve = bytes.fromhex("06082a8648ce3d030107")
    for form in (der, der.replace(curve, curve[:-1] + b"\x63")):  # the second with an unknown curve
        path = tmp_path / "damaged.pem"
        path.write_text(
            f"-----BEGIN CERTIFICATE-----\n{base64.encodebytes(form).decode()}-----END CERTIFICATE-----\n"
        )
        path.chmod(0o644)
        assert run("check", path) == 2
        assert "contains a certificate that cannot be parsed" in capsys.readouterr().out
        (data,) = data_of(capsys, "check", path, "--json", code=2)["certificates"]
        assert data["names"] == []


def test_check_decrypts_a_key(home: Path, tmp_path: Path, capsys: Capture) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    tmp_path.chmod(0o700)
    for name, content in (
        ("phrase", b"two words\n"),
        (
            "key",
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.BestAvailableEncryption(b"two words"),
            ),
        ),
    ):
        (tmp_path / name).touch(0o600)
        (tmp_path / name).write_bytes(content)
    assert run("check", tmp_path / "key", "--passphrase-file", tmp_path / "phrase") == 0
    assert "two words" not in capsys.readouterr().out
    assert run("check", tmp_path / "key") == 2


@pytest.mark.parametrize("words", [["absent"], [], ["x", "--name", "no name"], ["."]])
def test_check_of_a_missing_file_is_an_error(home: Path, words: list[str], capsys: Capture) -> None:
    assert run("check", *words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err


def test_text_from_a_certificate_is_escaped_for_the_terminal(
    home: Path, tmp_path: Path, capsys: Capture
) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "\x1b[31mred\nREFUSED")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - DAY)
        .not_valid_after(now + 90 * DAY)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("a\x1b[2Jb")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    (tmp_path / "evil.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (tmp_path / "evil.pem").chmod(0o644)
    run("check", tmp_path / "evil.pem")
    run("check", tmp_path / "evil.pem", "--json")
    out = capsys.readouterr().out
    assert all(line.isprintable() for line in out.splitlines())


# --- renew and rotate ------------------------------------------------------------------------------------


def test_renew_keeps_the_key(made: Path, capsys: Capture) -> None:
    before = leaf(made / "server-ecdsa.crt")
    key = (made / "server-ecdsa.key").read_bytes()
    assert run("renew") == 0
    out, err = capsys.readouterr()
    after = leaf(made / "server-ecdsa.crt")
    assert after.serial_number != before.serial_number
    assert (made / "server-ecdsa.key").read_bytes() == key
    assert pin_by_hand(before) in out
    assert "kept" in out
    assert "A running server uses it within a second" in err


def test_renew_as_json(made: Path, capsys: Capture) -> None:
    data = data_of(capsys, "renew", "--type", "ecdsa", "--json")
    (one,) = data["certificates"]
    assert (one["new_key"], data["next_pins"]) == (False, None)
    assert one["pin"] == pin_by_hand(leaf(made / "server-ecdsa.crt"))


def test_renew_of_an_unconfigured_key_type_is_an_error(made: Path, capsys: Capture) -> None:
    assert run("renew", "--type", "rsa") == 2
    assert "certificates.key_types has only ecdsa" in capsys.readouterr().err


def test_renew_of_one_key_type_keeps_the_other_and_its_next_key(
    made: Path, home: Path, capsys: Capture
) -> None:
    rsa_pair = made / "server.crt", made / "server.key"
    configure(home, CONFIG.replace('["ecdsa-p256"]', '["ecdsa-p256", "rsa-4096"]'))
    assert run("rotate", "--json") == 0  # makes the RSA one, too
    before = [(made / name).read_bytes() for name in ("server.crt", "server.key", "server.next.key")]
    data = data_of(capsys, "renew", "--type", "ecdsa", "--json")
    assert len(data["next_pins"]["pins"]) == 2
    assert [(made / name).read_bytes() for name in ("server.crt", "server.key", "server.next.key")] == before
    assert load_pair(*rsa_pair, datetime.now(UTC)).key_type == "rsa-4096"


def test_rotate_announces_the_next_key_and_keeps_the_current_one(made: Path, capsys: Capture) -> None:
    before = (made / "server-ecdsa.crt").read_bytes()
    assert run("rotate") == 0
    out, err = capsys.readouterr()
    assert (made / "server-ecdsa.crt").read_bytes() == before
    assert (made / "server-ecdsa.next.key").stat().st_mode & 0o777 == 0o600
    assert "Next pins, used from " in out
    assert "pins.next" in err
    first = data_of(capsys, "rotate", "--json")["next_pins"]
    assert first == data_of(capsys, "rotate", "--json")["next_pins"]  # they stay the next ones
    assert first["pins"][0] in out


def test_rotate_now_uses_the_announced_key(made: Path, capsys: Capture) -> None:
    announced = data_of(capsys, "rotate", "--json")["next_pins"]["pins"]
    data = data_of(capsys, "rotate", "--now", "--json")
    (one,) = data["certificates"]
    assert (one["new_key"], data["next_pins"]) == (True, None)
    assert [one["pin"]] == announced == [pin_by_hand(leaf(made / "server-ecdsa.crt"))]
    assert run("rotate", "--now") == 0
    out, err = capsys.readouterr()
    assert "new" in out
    assert "Clients that have none of these pins" in err


def test_rotate_is_cancelled(made: Path, capsys: Capture) -> None:
    run("rotate")
    assert data_of(capsys, "rotate", "--cancel", "--json") == {
        "cancelled": [str(made / "server-ecdsa.next.key")]
    }
    assert not (made / "server-ecdsa.next.key").exists()
    assert run("rotate", "--cancel") == 0
    assert capsys.readouterr().out == "Nothing to do: no key is announced.\n"
    run("rotate")
    capsys.readouterr()
    assert run("rotate", "--cancel") == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "was set aside as" in err
    assert run("rotate", "--cancel", "--now") == 2


@pytest.mark.parametrize("words", [["renew"], ["rotate"], ["rotate", "--now"], ["rotate", "--cancel"]])
def test_external_certificates_are_neither_renewed_nor_rotated(
    home: Path, capsys: Capture, server_pairs: ServerPairs, ca: Any, words: list[str]
) -> None:
    certificate, key = use_files(home, server_pairs)
    before = certificate.read_bytes(), key.read_bytes()
    assert run(*words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert leaf(certificate).issuer.rfc4514_string() in err
    assert "use the tool that issued" in err
    assert (certificate.read_bytes(), key.read_bytes()) == before
    assert not (home / "certs").exists()
    certificate.unlink()
    assert run(*words) == 2
    assert "none can be read" in capsys.readouterr().err


def test_folder_writable_by_others_gets_no_key(made: Path, capsys: Capture) -> None:
    made.chmod(0o777)
    assert run("rotate") == 2
    assert "chmod 700" in capsys.readouterr().err
    assert not (made / "server-ecdsa.next.key").exists()


def test_no_command_prints_a_private_key(made: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    for words in (
        ["rotate"], ["rotate", "--now"], ["renew"], ["issue-client", "alice", "--out", out], ["show"],
        ["show", "--json"], ["pins"], ["export-ca"], ["check", made / "server-ecdsa.key"],
        ["revoke-client", "alice"], ["rotate", "--json"], ["issue-client", "bob", "--json"],
    ):  # fmt: skip
        assert run(*words) == 0
    printed = "".join(capsys.readouterr())
    for path in [*made.rglob("*.key"), *out.rglob("*.key")]:
        body = [line for line in path.read_text().splitlines() if not line.startswith(("-", "zcproto"))]
        assert body
        assert all(line not in printed for line in body)


# --- clients ---------------------------------------------------------------------------------------------


def test_issue_client_writes_certificate_and_key(made: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    assert run("issue-client", "alice", "--days", "7", "--out", out) == 0
    printed, err = capsys.readouterr()
    lines = dict(line.split(maxsplit=1) for line in printed.splitlines())
    assert (lines["certificate"], lines["key"]) == (f"{out}/alice.crt", f"{out}/alice.key")
    assert 'set tls.client_auth = "optional" or "required"' in err
    issued = leaf(out / "alice.crt")
    assert lines["pin"] == pin_by_hand(issued)
    assert (issued.not_valid_after_utc - datetime.now(UTC)) // DAY == 6
    issued.verify_directly_issued_by(leaf(made / "client-ca.crt"))
    assert (made / "clients" / "alice.key").read_bytes() == (out / "alice.key").read_bytes()
    assert out.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o600}


def test_issue_client_with_client_certificates_enabled_gives_no_advice(
    made: Path, home: Path, capsys: Capture
) -> None:
    configure(home, f'{CONFIG}[tls]\nclient_auth = "optional"\n')
    run("issue-client", "alice")
    assert "client_auth" not in capsys.readouterr().err


def test_issue_client_for_a_csr_leaves_the_key_on_the_device(
    made: Path, tmp_path: Path, capsys: Capture, monkeypatch: Any
) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ignored")])
    csr = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    path = tmp_path / "device.csr"
    path.write_bytes(csr.public_bytes(serialization.Encoding.PEM))
    data = data_of(capsys, "issue-client", "phone", "--csr", path, "--out", tmp_path / "out", "--json")
    assert (data["name"], data["key"], data["certificate"]) == ("phone", None, f"{tmp_path}/out/phone.crt")
    assert leaf(tmp_path / "out" / "phone.crt").public_key() == key.public_key()
    assert not (made / "clients" / "phone.key").exists()
    with path.open("rb") as file:
        monkeypatch.setattr(sys, "stdin", type("Stdin", (), {"buffer": file})())
        assert run("issue-client", "tablet", "--csr", "-") == 0
    assert leaf(made / "clients" / "tablet.crt").public_key() == key.public_key()


def test_force_replaces_existing_files(made: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    first = data_of(capsys, "issue-client", "alice", "--out", out, "--json")
    assert run("issue-client", "alice", "--out", out, "--renew") == 2
    assert "--force replaces it" in capsys.readouterr().err
    assert len(data_of(capsys, "show", "--json")["clients"]) == 1  # nothing was issued for nothing
    assert run("issue-client", "alice") == 2
    second = data_of(capsys, "issue-client", "alice", "--out", out, "--renew", "--force", "--json")
    assert second["serial"] != first["serial"]
    assert second["pin"] == first["pin"]
    assert f"{leaf(out / 'alice.crt').serial_number:X}" == second["serial"]


@pytest.mark.parametrize("name", ["", "../x", "a b", "x" * 300, "192.0.2.1", "*.example.com", "a\nb"])
def test_invalid_client_name_is_an_error(made: Path, tmp_path: Path, name: str, capsys: Capture) -> None:
    assert run("issue-client", name, "--out", tmp_path / "out") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.removesuffix("\n").isprintable()
    assert list((tmp_path / "out").iterdir()) == []
    assert list(made.glob("client*")) == []


def test_nothing_is_issued_that_cannot_be_written(made: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o755)
    assert run("issue-client", "alice", "--out", tmp_path / "open") == 2
    assert "chmod 700" in capsys.readouterr().err
    assert list(made.glob("client*")) == []


def test_revoke_client_by_name(made: Path, capsys: Capture) -> None:
    serial = data_of(capsys, "issue-client", "alice", "--json")["serial"]
    assert run("revoke-client", "alice", "--reason", "keyCompromise") == 0
    out, err = capsys.readouterr()
    assert out == f"revoked {serial} of alice\n"
    assert "within a second" in err
    crl = x509.load_pem_x509_crl((made / "client-ca.crl").read_bytes())
    assert crl.get_revoked_certificate_by_serial_number(int(serial, 16)) is not None
    assert run("revoke-client", "alice") == 0
    assert capsys.readouterr().out == "Nothing to do: it was revoked before.\n"
    assert data_of(capsys, "revoke-client", "alice", "--json") == {"revoked": []}


def test_revoke_client_by_serial_number(made: Path, capsys: Capture) -> None:
    first = data_of(capsys, "issue-client", "alice", "--json")["serial"]
    run("issue-client", "alice", "--renew")
    data = data_of(capsys, "revoke-client", "--serial", first, "--json")
    assert data == {"revoked": [{"name": "alice", "serial": first}]}
    states = [entry["revoked_at"] is None for entry in data_of(capsys, "show", "--json")["clients"]]
    assert states == [False, True]


@pytest.mark.parametrize("words", [[], ["alice", "--serial", "AB"], ["unknown"], ["alice", "--reason", "x"]])
def test_invalid_revocation_is_an_error(made: Path, words: list[str], capsys: Capture) -> None:
    run("issue-client", "alice")
    capsys.readouterr()
    assert run("revoke-client", *words) == 2
    assert capsys.readouterr().err


# --- as a process ----------------------------------------------------------------------------------------


def test_separate_process_pipes_its_ca_and_keeps_files_private(made: Path, tmp_path: Path) -> None:
    environ = {**os.environ, "PYTHONPATH": str(Path(zcproto.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-m", "zcproto", "cert", "export-ca", "--der"],
        capture_output=True,
        env=environ,
        check=True,
    )
    assert x509.load_der_x509_certificate(done.stdout) == leaf(made / "ca.crt")
    assert done.stderr == b""
