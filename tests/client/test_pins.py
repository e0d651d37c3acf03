"""Pins: their forms, errors with a cure, and the warning of a single pin."""

from __future__ import annotations

import hashlib
import logging
import ssl
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.client.conftest import ConnectTo
from tests.server.helpers import ServerThread
from zcproto.client.blocking import connect_blocking
from zcproto.client.client import connect
from zcproto.client.dial import Trust, _warn_of_single_pin
from zcproto.client.options import ConnectOptions
from zcproto.errors import TlsError

WRONG, BACKUP = ("sha256/" + letter * 43 + "=" for letter in "AE")


@pytest.fixture(autouse=True)
def reset_warnings(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Reset the warnings that are logged once."""
    _warn_of_single_pin.cache_clear()
    with caplog.at_level(logging.WARNING, "zcproto.client"):
        yield
    _warn_of_single_pin.cache_clear()


def whole_pin(server: ServerThread) -> str:
    pem = (server.home / "certs" / "server-ecdsa.crt").read_text().split("-----END")[
        0
    ] + "-----END CERTIFICATE-----"
    return "cert-sha256/" + b64encode(hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).digest()).decode()


@pytest.mark.requirement("pinning")
async def test_several_pins_in_one_text_are_accepted(shared: ServerThread, connect_to: ConnectTo) -> None:
    (pin,) = shared.server.pins
    for pins in (f"{WRONG},{pin}", f"{WRONG} {pin}\n", [WRONG, pin], iter([pin, pin, BACKUP])):
        async with connect_to(shared, pins=pins) as client:
            assert await client.call("echo", x=1) == {"x": 1}


@pytest.mark.requirement("pinning")
async def test_certificate_pin_is_accepted(shared: ServerThread, connect_to: ConnectTo) -> None:
    async with connect_to(shared, pins=f"{whole_pin(shared)}, {BACKUP}") as client:
        assert await client.call("echo", x=1) == {"x": 1}


@pytest.mark.requirement("pinning")
@pytest.mark.parametrize("make", [connect, connect_blocking])
@pytest.mark.parametrize("pins", ["", " ", ",", "x", [""], [WRONG, "x"]])
def test_wrong_pin_is_refused_with_any_trust(make: Any, pins: Any) -> None:
    with pytest.raises(TlsError) as caught:
        make("localhost", pins=pins)
    assert caught.value.failure == "pin_malformed"


@pytest.mark.requirement("pinning")
async def test_pin_mismatch_shows_both_pins(shared: ServerThread, connect_to: ConnectTo) -> None:
    with pytest.raises(TlsError) as caught:
        await connect_to(shared, pins=[BACKUP, WRONG])
    assert caught.value.failure == "pin_mismatch"
    seen, _, expected = caught.value.detail.partition("expected: ")
    assert f"Its key has {shared.server.pins[0]}" in seen
    assert f"its certificate {whole_pin(shared)}" in seen
    assert expected.startswith(f"{WRONG} or {BACKUP}. If its operator confirms")


@pytest.mark.requirement("pinning")
@pytest.mark.parametrize(("pin", "of"), [(WRONG, "key"), ("cert-" + WRONG, "certificate")])
def test_single_pin_is_warned_of_once(pin: str, of: str, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        Trust(ConnectOptions(pins=[pin, pin]))
    (record,) = caplog.records
    assert record.name == "zcproto.client"
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(f"{pin} is the only pin: when the server's {of} is replaced")
    assert "backup" in record.getMessage()
    Trust(ConnectOptions(pins=[BACKUP]))
    assert len(caplog.records) == 2  # another pin


@pytest.mark.requirement("pinning")
@pytest.mark.parametrize("pins", [(), [WRONG, BACKUP], f"{WRONG} {BACKUP}"])
def test_backup_pins_are_not_warned_of(pins: Any, caplog: pytest.LogCaptureFixture) -> None:
    Trust(ConnectOptions(pins=pins))
    assert caplog.records == []


@pytest.mark.requirement("pinning")
def test_single_pin_with_ca_file_is_warned_of(caplog: pytest.LogCaptureFixture, ca_file: Path) -> None:
    Trust(ConnectOptions(pins=[WRONG], ca_file=ca_file))
    assert len(caplog.records) == 1
