"""`zcproto cert` and `zcproto doctor` with certificates of a public CA."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.certs.acme.fake_ca import DIRECTORY
from tests.certs.acme.support import Desk, wanted
from tests.cli.cert_helpers import Capture, configure, data_of, made_once, quick_authority, run
from tests.cli.doctor_report import Doctor, doctor
from zcproto.certs import managed
from zcproto.certs.acme.orders import Visit
from zcproto.certs.acme.schedule import OrderRecord, digest_of, write_record
from zcproto.certs.examine import survey
from zcproto.certs.settings import AcmeSite, acme_site
from zcproto.cli import cert_report
from zcproto.cli import doctor as doctor_module
from zcproto.cli.connect import TrustChoice
from zcproto.common.home import Home
from zcproto.config import load_config

__all__ = ["doctor", "made_once", "quick_authority"]

CONFIG = f"""
[server]
port = 0
[certificates]
mode = "acme"
key_types = ["ecdsa-p256"]
names = ["zcp.example.com"]
[acme]
directory = "{DIRECTORY}"
terms_agreed = true
"""


@pytest.fixture
def site(home: Path) -> AcmeSite:
    """A home folder with managed certificates and the settings of a CA."""
    configure(home, CONFIG)
    found = acme_site(load_config(None, home=home, environ={}))
    assert found is not None
    managed.ensure(found.managed_directory, found.managed, datetime.now(UTC))
    return found


def order(site: AcmeSite) -> None:
    now = datetime.now(UTC)
    result = asyncio.run(Desk(site, lambda: now).visit(Visit((wanted(site),)), now))
    assert result.problem == ""


def fail(site: AcmeSite) -> None:
    now = datetime.now(UTC)
    write_record(
        site.directory,
        OrderRecord("", "the CA is down; wait", now, now + timedelta(hours=1), digest_of(site.acme)),
    )


def server_row(data: Any) -> Any:
    (row,) = [row for row in data["certificates"] if row["use"] == "server"]
    return row


def test_show_has_the_certificate_of_the_ca(site: AcmeSite, capsys: Capture) -> None:
    row = server_row(data_of(capsys, "show", "--json"))
    assert row["certificate"] == str(site.managed_directory / "server-ecdsa.crt")
    assert "is served until the CA has issued another" in row["note"]
    order(site)
    data = data_of(capsys, "show", "--json")
    row = server_row(data)
    assert data["mode"] == "acme"
    assert row["certificate"] == str(site.directory / "server-ecdsa.crt")
    assert (row["names"], row["status"], row["note"]) == (["zcp.example.com"], "ok", None)
    assert run("show") == 0
    assert "Issued by the CA of acme.directory" in capsys.readouterr().out


def test_pins_are_those_of_the_managed_keys(site: AcmeSite, capsys: Capture) -> None:
    before = data_of(capsys, "pins", "--json")
    order(site)
    assert data_of(capsys, "pins", "--json") == before


def test_announced_keys_are_shown(site: AcmeSite, capsys: Capture) -> None:
    order(site)
    assert run("rotate") == 0
    assert len(data_of(capsys, "pins", "--json")["next"]) == 1


def test_renewal_needs_the_server(site: AcmeSite, capsys: Capture) -> None:
    assert run("renew") == 2
    assert "start the server, through which the CA checks the names" in capsys.readouterr().err


def test_ca_of_its_own_is_not_exported(site: AcmeSite, capsys: Capture) -> None:
    assert run("export-ca") == 2
    assert 'certificates.mode = "acme": get the CA from the issuer' in capsys.readouterr().err


def test_doctor_shows_the_failure_as_a_warning(site: AcmeSite, doctor: Doctor) -> None:
    order(site)
    assert {each["state"] for each in doctor().of("certificate")} == {"ok"}
    fail(site)
    warning = doctor().one("certificate", "warning")
    assert "the last order has failed" in warning
    assert warning.endswith("the CA is down | wait")


def test_doctor_reports_the_missing_package(
    site: AcmeSite, doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_module.importlib.util, "find_spec", lambda name: None)
    assert doctor().one("certificate", "fault") == (
        'certificates.mode = "acme": this needs the package acme | run in a clone of zcproto: pip install ".[acme]"'
    )


def test_doctor_checks_the_files_of_the_ca(site: AcmeSite, doctor: Doctor) -> None:
    order(site)
    (site.directory / "account.key").chmod(0o644)
    assert "account.key: others can read or change it" in doctor().one("permissions", "fault")


def test_doctor_knows_the_server_by_its_pins(site: AcmeSite, home: Path) -> None:
    order(site)
    config = load_config(None, home=home, environ={})
    rows = survey(config, datetime.now(UTC), {}).certificates
    (served,) = [row.leaf for row in rows if row.use == "server"]
    assert served is not None
    pins = (cert_report.key_pin(served),)
    assert doctor_module.own_trust(config) == (TrustChoice(pins=pins), "zcp.example.com")


def test_commands_trust_the_ca_that_has_issued_what_is_served(site: AcmeSite, home: Path) -> None:
    own = home / "certs" / "ca.crt"
    assert TrustChoice().ca_file(Home(home), "zcp.example.com:7443") == own
    order(site)
    assert TrustChoice().ca_file(Home(home), "zcp.example.com:7443") is None
