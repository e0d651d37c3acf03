"""`zcproto cert`: what it prints, what it writes, and what it refuses."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

import zcproto
from tests.conftest import ServerPairs
from zcproto.certs import authority
from zcproto.certs.pair import load_pair
from zcproto.cli import main
from zcproto.common.clock import system_clock
from zcproto.tls.pins import certificate_pin, parse_pins

Capture = pytest.CaptureFixture[str]

DAY = timedelta(days=1)
CONFIG = '[certificates]\nkey_types = ["ecdsa-p256"]\nnames = ["zcp.example.com"]\n'


@pytest.fixture(autouse=True)
def quick_authority(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(authority, "KEY_TYPE", "rsa-2048")


@pytest.fixture(scope="session")
def _made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("once") / "home"
    folder.mkdir(mode=0o700)
    (folder / "config.toml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(authority, "KEY_TYPE", "rsa-2048")
        assert main(["cert", "renew", "--home", str(folder)]) == 0
    return folder


@pytest.fixture
def made(_made_once: Path, home: Path) -> Path:
    """A home folder with own certificates; the folder of certificates is returned."""
    shutil.copytree(_made_once, home)
    return home / "certs"


def run(*words: str | Path) -> int:
    return main(["cert", *map(str, words)])


def data_of(capsys: Capture, *words: str | Path, code: int = 0) -> Any:
    capsys.readouterr()
    assert run(*words) == code
    return json.loads(capsys.readouterr().out)


def at(monkeypatch: pytest.MonkeyPatch, moment: datetime) -> None:
    monkeypatch.setattr(system_clock.__class__, "wall", lambda clock: int(moment.timestamp() * 1000))


def leaf(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def pin_by_hand(certificate: x509.Certificate) -> str:
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    spki = certificate.public_key().public_bytes(serialization.Encoding.DER, form)
    return "sha256/" + base64.b64encode(hashlib.sha256(spki).digest()).decode()


def configure(home: Path, text: str) -> None:
    home.mkdir(mode=0o700, exist_ok=True)
    (home / "config.toml").write_text(text)


def use_files(home: Path, pairs: ServerPairs) -> tuple[Path, Path]:
    """Configures certificates of others, as their owner keeps them."""
    folder = home / "files"
    folder.mkdir(mode=0o700, parents=True)
    home.chmod(0o700)
    certificate, key = folder / "site.crt", folder / "site.key"
    shutil.copy(pairs.ecdsa.certificate, certificate)
    shutil.copy(pairs.ecdsa.key, key)
    certificate.chmod(0o644)
    key.chmod(0o600)
    configure(home, f'[certificates]\nmode = "files"\ncertificate = ["{certificate}"]\nkey = ["{key}"]\n')
    return certificate, key


# --- show ------------------------------------------------------------------------------------------------


def test_show_before_the_first_start_creates_nothing(home: Path, capsys: Capture) -> None:
    assert run("show") == 0
    out = capsys.readouterr().out
    assert out.count("not made yet") == 3  # two rows and a sentence
    assert not home.exists()


def test_show_is_a_table_with_aligned_columns(made: Path, capsys: Capture) -> None:
    assert run("show") == 0
    out = capsys.readouterr().out
    tables = [part.splitlines() for part in out.split("\n\n")]
    head, default, own_ca = tables[1]
    end = leaf(made / "server-ecdsa.crt").not_valid_after_utc
    for column, value in (("site", "default"), ("until", f"{end:%Y-%m-%d}"), ("status", "ok")):
        assert default[head.index(column) :].startswith(value)
    assert default[: head.index("days left") + 9].endswith(" 89")
    assert default.endswith("server-ecdsa.crt")
    assert own_ca.startswith("own CA")
    pin = pin_by_hand(leaf(made / "server-ecdsa.crt"))
    assert tables[2] == [f"file{' ' * 14}pin", f"server-ecdsa.crt  {pin}"]
    assert "zcp.example.com" in tables[3][1]
    assert leaf(made / "ca.crt").subject.rfc4514_string() in tables[3][1]


def test_show_has_the_hours_of_short_lifetimes(made: Path, home: Path, capsys: Capture) -> None:
    configure(home, CONFIG + 'lifetime = "6h"\nrenew_before = "1h"\n')
    run("renew")
    capsys.readouterr()
    assert run("show") == 0
    end = leaf(made / "server-ecdsa.crt").not_valid_after_utc
    row = capsys.readouterr().out.splitlines()[3]
    assert f"  {end:%Y-%m-%d %H:%M}  " in row
    assert f"  {end - timedelta(hours=1):%Y-%m-%d %H:%M}  " in row


def test_show_as_json_is_complete(made: Path, capsys: Capture) -> None:
    data = data_of(capsys, "show", "--json")
    assert data.keys() == {
        *("good", "mode", "directory", "certificates", "next_pins", "clients", "client_crl", "problems")
    }
    assert (data["good"], data["mode"], data["directory"]) == (True, "own", str(made))
    server, ca = data["certificates"]
    found = leaf(made / "server-ecdsa.crt")
    stamp = "%Y-%m-%dT%H:%M:%SZ"
    renewal = found.not_valid_after_utc - 30 * DAY
    assert server.pop("names")[0] == "zcp.example.com"
    assert server.pop("days_left") == 89
    assert server == {
        "use": "server",
        "site": [],
        "key_type": "ecdsa-p256",
        "subject": "CN=zcp.example.com",
        "issuer": leaf(made / "ca.crt").subject.rfc4514_string(),
        "serial": f"{found.serial_number:X}",
        "not_before": found.not_valid_before_utc.strftime(stamp),
        "not_after": found.not_valid_after_utc.strftime(stamp),
        "pin": pin_by_hand(found),
        "certificate_pin": certificate_pin(found.public_bytes(serialization.Encoding.DER)),
        "renewal_due": renewal.strftime(stamp),
        "certificate": str(made / "server-ecdsa.crt"),
        "key": str(made / "server-ecdsa.key"),
        "status": "ok",
        "problem": None,
    }
    assert (ca["use"], ca["status"], ca["certificate"]) == ("ca", "ok", str(made / "ca.crt"))


@pytest.mark.parametrize(
    ("days", "status", "code"),
    [(59, "ok", 0), (61, "renewal due", 0), (91, "expired", 2), (-2, "problem", 2)],
)
def test_show_reports_status_over_time(
    made: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, days: int, status: str, code: int
) -> None:
    at(monkeypatch, datetime.now(UTC) + days * DAY)
    assert data_of(capsys, "show", "--json", code=code)["certificates"][0]["status"] == status
    assert run("show") == code
    assert ("\n\nPROBLEM: " in capsys.readouterr().out) is (code != 0)


@pytest.mark.parametrize("what", ["others", "garbage", "other key", "other CA", "no CA key", "other CA key"])
def test_show_reports_what_a_server_would_refuse(
    made: Path, capsys: Capture, server_pairs: ServerPairs, what: str
) -> None:
    words = {
        "others": "chmod 600",
        "garbage": "contains no PEM certificate",
        "other key": "does not belong to",
        "other CA": "was not issued by",
        "no CA key": "ca.key: cannot be read",
        "other CA key": "does not belong to",
    }[what]
    if what == "others":
        (made / "server-ecdsa.key").chmod(0o644)
    elif what == "garbage":
        (made / "server-ecdsa.crt").write_bytes(b"x")
    elif what == "other key":
        (made / "server-ecdsa.key").write_bytes(server_pairs.ecdsa.key.read_bytes())
    elif what == "other CA":
        (made / "server-ecdsa.crt").write_bytes(server_pairs.ecdsa.certificate.read_bytes())
        (made / "server-ecdsa.key").write_bytes(server_pairs.ecdsa.key.read_bytes())
    elif what == "no CA key":
        (made / "ca.key").unlink()
    else:
        (made / "ca.key").write_bytes((made / "server-ecdsa.key").read_bytes())
    data = data_of(capsys, "show", "--json", code=2)
    (row,) = [row for row in data["certificates"] if row["status"] == "problem"]
    assert words in row["problem"]
    assert run("show") == 2
    assert f"PROBLEM: {row['problem']}" in capsys.readouterr().out


def test_show_reports_an_unreadable_ca_separately(made: Path, capsys: Capture) -> None:
    (made / "ca.crt").write_bytes(b"x")
    rows = data_of(capsys, "show", "--json", code=2)["certificates"]
    assert [row["status"] for row in rows] == ["ok", "problem"]


def test_show_lists_external_sites(
    made: Path, home: Path, capsys: Capture, server_pairs: ServerPairs
) -> None:
    text = (
        CONFIG + '[[certificates.site]]\nnames = ["localhost"]\n'
        f'certificate = ["{home}/site.pem"]\nkey_passphrase_variable = "PHRASE"\n'
    )
    configure(home, text)
    (home / "site.pem").touch(0o600)
    (home / "site.pem").write_bytes(
        server_pairs.ecdsa.certificate.read_bytes() + server_pairs.ecdsa.key.read_bytes()
    )
    data = data_of(capsys, "show", "--json", code=2)
    assert "PHRASE is not set" in data["certificates"][1]["problem"]
    configure(home, text.replace('key_passphrase_variable = "PHRASE"\n', ""))
    data = data_of(capsys, "show", "--json")
    assert [(row["site"], row["status"]) for row in data["certificates"][:2]] == [
        ([], "ok"),
        (["localhost"], "ok"),
    ]
    configure(
        home, text.replace('key_passphrase_variable = "PHRASE"\n', "").replace('"localhost"', '"x.example"')
    )
    data = data_of(capsys, "show", "--json", code=2)
    assert "is not valid for x.example" in data["certificates"][1]["problem"]


def test_show_lists_external_default_files(home: Path, capsys: Capture, server_pairs: ServerPairs) -> None:
    certificate, _ = use_files(home, server_pairs)
    data = data_of(capsys, "show", "--json")
    (row,) = data["certificates"]
    assert (row["certificate"], row["status"]) == (str(certificate), "ok")
    run("show")
    assert capsys.readouterr().out.startswith("Issued by other programs;")


def test_show_lists_announced_pins_and_clients(made: Path, capsys: Capture) -> None:
    assert run("rotate") == 0
    assert run("issue-client", "alice") == 0
    assert run("issue-client", "bob") == 0
    assert run("revoke-client", "bob") == 0
    data = data_of(capsys, "show", "--json")
    assert len(data["next_pins"]["pins"]) == 1
    assert [(one["name"], one["reason"]) for one in data["clients"]] == [
        ("alice", None),
        ("bob", "unspecified"),
    ]
    assert [row["use"] for row in data["certificates"]] == ["server", "ca", "client-ca"]
    assert [one["revoked"] for one in data["client_crl"]] == [1]
    run("show")
    out = capsys.readouterr().out
    assert data["next_pins"]["pins"][0] in out
    assert "Client certificates: 1 valid, 1 revoked; --json lists them." in out


def test_show_reports_an_expired_or_damaged_crl(
    made: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("issue-client", "alice")
    with monkeypatch.context() as patch:
        at(patch, datetime.now(UTC) + 400 * DAY)
        problems = data_of(capsys, "show", "--json", code=2)["problems"]
    assert any("so every client is refused" in problem for problem in problems)
    block = "-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n"
    for name, content in (("client-ca.crl", "x"), ("client-ca.crl", block), ("client-ca.issued", "x")):
        (made / name).write_text(content)
        (problem,) = data_of(capsys, "show", "--json", code=2)["problems"]
        assert name in problem


def test_show_lists_the_configured_client_ca(made: Path, home: Path, capsys: Capture, ca_file: Path) -> None:
    theirs = home / "theirs.crt"
    shutil.copy(ca_file, theirs)
    theirs.chmod(0o600)
    configure(home, f'{CONFIG}[tls]\nclient_auth = "required"\nclient_ca_file = "{theirs}"\n')
    rows = data_of(capsys, "show", "--json")["certificates"]
    assert [(row["use"], row["certificate"]) for row in rows[2:]] == [("client-ca", str(theirs))]


def test_show_lists_the_configured_crls(made: Path, home: Path, capsys: Capture, ca_file: Path) -> None:
    run("issue-client", "alice")
    theirs = home / "theirs.crl"
    theirs.write_bytes((made / "client-ca.crl").read_bytes() * 2)
    theirs.chmod(0o600)
    configure(home, f'{CONFIG}[tls]\nclient_auth = "required"\nclient_crl_file = "{theirs}"\n')
    lists = data_of(capsys, "show", "--json")["client_crl"]
    assert [(one["file"], one["revoked"]) for one in lists] == [(str(theirs), 0)] * 2


# --- pins ------------------------------------------------------------------------------------------------


def test_pins_can_be_pasted(made: Path, capsys: Capture) -> None:
    run("rotate")
    capsys.readouterr()
    assert run("pins") == 0
    out = capsys.readouterr().out
    pasted = eval(f"[{out}]")
    assert pasted[0] == pin_by_hand(leaf(made / "server-ecdsa.crt"))
    assert len(parse_pins(pasted)) == 2
    assert "# next, from " in out
    run("pins", "--plain")
    assert capsys.readouterr().out.split() == pasted
    data = data_of(capsys, "pins", "--json")
    assert (data["current"], data["next"]) == (pasted[:1], pasted[1:])
    assert datetime.fromisoformat(data["use_from"]) - datetime.now(UTC) > 6 * DAY


def test_pins_of_whole_certificates_are_current(made: Path, capsys: Capture) -> None:
    run("rotate")
    der = leaf(made / "server-ecdsa.crt").public_bytes(serialization.Encoding.DER)
    data = data_of(capsys, "pins", "--certificate", "--json")
    assert data == {"current": [certificate_pin(der)], "next": [], "use_from": None}


def test_pins_of_a_site(made: Path, home: Path, capsys: Capture, server_pairs: ServerPairs) -> None:
    site, key = home / "site.crt", home / "site.key"
    for name, source in ((site, server_pairs.ecdsa.certificate), (key, server_pairs.ecdsa.key)):
        name.touch(0o600)
        name.write_bytes(source.read_bytes())
    configure(
        home,
        f'{CONFIG}[[certificates.site]]\nnames = ["localhost"]\ncertificate = ["{site}"]\nkey = ["{key}"]\n',
    )
    run("rotate")
    data = data_of(capsys, "pins", "--site", "LOCALHOST", "--json")
    assert data == {"current": [pin_by_hand(leaf(site))], "next": [], "use_from": None}
    data = data_of(capsys, "pins", "--site", "elsewhere.example", "--json")
    assert data["current"] == [pin_by_hand(leaf(made / "server-ecdsa.crt"))]
    assert len(data["next"]) == 1


def test_pins_before_the_first_key_are_an_error(home: Path, capsys: Capture) -> None:
    assert run("pins") == 2
    assert "not made yet; start the server once" in capsys.readouterr().err


def test_pins_of_refused_certificates_are_an_error(made: Path, capsys: Capture) -> None:
    (made / "server-ecdsa.key").chmod(0o644)
    assert run("pins") == 2
    assert "chmod 600" in capsys.readouterr().err


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
