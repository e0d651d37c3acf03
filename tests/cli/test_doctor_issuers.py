"""`zcproto doctor`: the check of identity providers, which answer at a port of this machine."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
import trustme

from bench.server_process import free_port
from tests.alerts.receiver import Answer, Receiver, answer
from tests.auth.issuer import jwk, key_set
from tests.cli.doctor_report import Doctor, Report, doctor
from tests.conftest import ServerPairs

__all__ = ["doctor"]

Check = Callable[..., Report]


@pytest.fixture
def receiver(server_pairs: ServerPairs) -> Iterator[Receiver]:
    with Receiver((server_pairs.ecdsa.certificate, server_pairs.ecdsa.key)) as found:
        yield found


@pytest.fixture
def check(home: Path, doctor: Doctor, receiver: Receiver, ca_file: Path) -> Check:
    """Run the doctor with a provider that answers with these keys and the date of a clock."""

    def check(
        *keys: dict[str, object],
        ahead_s: float = 0.0,
        date: str = "",
        more: str = "",
        ca_file: Path = ca_file,
    ) -> Report:
        issuer = receiver.url.partition("/hook")[0]
        metadata = json.dumps({"issuer": issuer, "jwks_uri": f"{issuer}/keys"}).encode()

        def answer_now(body: bytes) -> Answer:
            def respond(connection: Any, ended: object) -> None:
                header = f"Date: {date or formatdate(time.time() + ahead_s, usegmt=True)}"
                connection.sendall(answer(200, header, body=body))

            return respond

        receiver.answers[:] = [answer_now(metadata), answer_now(key_set(*keys))]
        home.mkdir(0o700)
        (home / "config.toml").write_text(
            f"[server]\nport = {free_port()}\n[store]\nurl = 'memory'\n[auth.oidc]\nissuer = '{issuer}'\n"
            f"audience = 'zcproto'\nca_file = '{ca_file}'\n{more}"
        )
        return doctor()

    return check


def test_issuer_with_usable_keys_is_ok(check: Check) -> None:
    found = check(jwk("RS256"), jwk("ES256", "two"), jwk("ES384", "three"))
    assert found.one("issuer", "ok").endswith(": 2 usable keys | None")
    assert [each["state"] for each in found.of("issuer")] == ["ok"]


@pytest.mark.parametrize(("ahead_s", "direction"), [(-300.0, "ahead of"), (300.0, "behind")])
def test_clock_that_differs_by_more_than_the_leeway_is_a_warning(
    check: Check, ahead_s: float, direction: str
) -> None:
    found = check(jwk("RS256"), ahead_s=ahead_s).one("issuer", "warning")
    assert f" s {direction} that of https://localhost:" in found
    assert "beyond 30 s" in found


def test_issuer_with_an_invalid_date_has_no_clock(check: Check) -> None:
    assert check(jwk("RS256"), date="soon").state("issuer") == "ok"


def test_keys_for_other_algorithms_are_a_fault(check: Check) -> None:
    found = check(jwk("ES384"), more="algorithms = ['RS256']\n").one("issuer", "fault")
    assert ": none of its keys is for RS256 | set auth.oidc[0].algorithms" in found


def test_issuer_without_keys_is_a_fault(check: Check) -> None:
    found = check().one("issuer", "fault")
    assert "the key set cannot be used" in found
    assert "| check the provider and auth.oidc[0]" in found


def test_issuer_whose_certificate_is_not_trusted_is_a_fault(check: Check, tmp_path: Path) -> None:
    trustme.CA().cert_pem.write_to_path(tmp_path / "ca.pem")
    assert "certificate" in check(jwk("RS256"), ca_file=tmp_path / "ca.pem").one("issuer", "fault")


def test_unusable_ca_file_is_a_fault(check: Check, tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("nothing")
    found = check(jwk("RS256"), ca_file=tmp_path / "ca.pem").one("issuer", "fault")
    assert found.endswith("contains no PEM certificates | give a file of CA certificates")


def test_missing_package_is_a_fault(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jwt", None)
    fault = check(jwk("RS256")).one("issuer", "fault")
    assert fault == 'auth.oidc: PyJWT is not installed | run in a clone of zcproto: pip install ".[oidc]"'


def test_server_without_issuers_has_no_finding(home: Path, doctor: Doctor) -> None:
    assert doctor().of("issuer") == []
