"""`zcproto cert show` and `zcproto cert pins`."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from tests.certs.support import constrain
from tests.cli.cert_helpers import (
    CONFIG,
    DAY,
    Capture,
    at,
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
from zcproto.tls.pins import certificate_pin, parse_pins

__all__ = ["made", "made_once", "quick_authority"]


# --- show ------------------------------------------------------------------------------------------------


def test_show_before_the_first_start_creates_nothing(home: Path, capsys: Capture) -> None:
    home.mkdir(0o700)
    assert run("show") == 0
    out = capsys.readouterr().out
    assert out.count("not made yet") == 3  # two rows and a sentence
    assert list(home.iterdir()) == []


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
        "note": None,
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


def test_show_notes_a_constrained_ca_until_it_is_renewed_with_the_same_key(
    made: Path, capsys: Capture
) -> None:
    pin = pin_by_hand(constrain(made, "localhost", "zcp.example.com"))
    assert run("show") == 0
    out = capsys.readouterr().out
    assert f"NOTE: {made / 'ca.crt'}: has name constraints, which clients with BoringSSL" in out
    assert "move it away (keep ca.key) and run zcproto cert renew" in out
    (made / "ca.crt").rename(made / "old.crt")
    assert run("renew") == 0
    assert pin_by_hand(leaf(made / "ca.crt")) == pin
    assert [row["note"] for row in data_of(capsys, "show", "--json")["certificates"]] == [None, None]


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
    home.mkdir(0o700)
    assert run("pins") == 2
    assert "not made yet; start the server once" in capsys.readouterr().err


def test_pins_of_refused_certificates_are_an_error(made: Path, capsys: Capture) -> None:
    (made / "server-ecdsa.key").chmod(0o644)
    assert run("pins") == 2
    assert "chmod 600" in capsys.readouterr().err
