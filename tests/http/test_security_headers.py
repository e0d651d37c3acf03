"""Test the security header fields of every response."""

from __future__ import annotations

from pathlib import Path

import pytest

from zcproto.admin.https import hsts_of
from zcproto.config import Config
from zcproto.config.load import load_config
from zcproto.errors import ConfigError
from zcproto.http.messages import (
    DEFAULT_POLICY,
    RESERVED_FIELDS,
    YEAR_S,
    HttpResponse,
    SecurityHeaders,
    StrictTransportSecurity,
)


def fields(block: bytes) -> dict[str, str]:
    """Parse a block; names must be unique."""
    assert block.endswith(b"\r\n")
    lines = [line.partition(": ") for line in block.decode("ascii").removesuffix("\r\n").split("\r\n")]
    found = {name: value for name, _, value in lines}
    assert len(found) == len(lines)
    return found


def test_owasp_headers_are_present() -> None:
    found = fields(SecurityHeaders(StrictTransportSecurity()).block())
    permissions = found.pop("Permissions-Policy")
    assert found == {
        "Strict-Transport-Security": "max-age=31536000; includeSubDomains",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "X-Permitted-Cross-Domain-Policies": "none",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Embedder-Policy": "require-corp",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Content-Security-Policy": DEFAULT_POLICY,
    }
    assert {each.partition("=")[2] for each in permissions.split(", ")} == {"()"}
    assert {"camera=()", "geolocation=()", "microphone=()", "payment=()", "usb=()"} <= set(
        permissions.split(", ")
    )


@pytest.mark.requirement("hsts")
@pytest.mark.parametrize(
    ("policy", "value"),
    [
        (StrictTransportSecurity(), "max-age=31536000; includeSubDomains"),
        (StrictTransportSecurity(YEAR_S, True, True), "max-age=31536000; includeSubDomains; preload"),
        (StrictTransportSecurity(60, False), "max-age=60"),
        (StrictTransportSecurity(0, True), "max-age=0; includeSubDomains"),
    ],
)
def test_hsts_value_follows_rfc_6797(policy: StrictTransportSecurity, value: str) -> None:
    assert fields(SecurityHeaders(policy).block())["Strict-Transport-Security"] == value


def test_hsts_is_absent_when_switched_off() -> None:
    assert "Strict-Transport-Security" not in fields(SecurityHeaders(None).block())


def test_page_policy_replaces_default_policy() -> None:
    headers = SecurityHeaders(StrictTransportSecurity())
    found = fields(headers.block("default-src 'self'"))
    assert found["Content-Security-Policy"] == "default-src 'self'"
    assert set(found) == set(fields(headers.block()))


@pytest.mark.parametrize("policy", ["a\r\nSet-Cookie: b", "a\nb", "\u2028", "é", "a\0"])
def test_multiline_policy_is_refused(policy: str) -> None:
    with pytest.raises(ValueError, match="one line of ASCII"):
        SecurityHeaders(None).block(policy)


def test_handler_cannot_set_reserved_fields() -> None:
    assert {
        name.lower() for name in fields(SecurityHeaders(StrictTransportSecurity()).block())
    } <= RESERVED_FIELDS
    for name in RESERVED_FIELDS:
        with pytest.raises(ValueError, match="reserved"):
            HttpResponse(200, headers=((name.title(), "x"),))


@pytest.mark.requirement("hsts")
@pytest.mark.parametrize(
    ("settings", "value"),
    [
        ({}, "max-age=31536000; includeSubDomains"),
        ({"hsts_max_age_seconds": 300, "hsts_include_subdomains": False}, "max-age=300"),
        ({"hsts_preload": True}, "max-age=31536000; includeSubDomains; preload"),
        ({"hsts": False}, None),
    ],
)
def test_hsts_follows_configuration(settings: dict[str, object], value: str | None) -> None:
    hsts = hsts_of(Config.model_validate({"http": settings}).http)
    assert (None if hsts is None else hsts.value) == value


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"hsts": False}, "http.hsts"),
        ({"hsts_include_subdomains": False}, "http.hsts_include_subdomains"),
        ({"hsts_max_age_seconds": YEAR_S - 1}, "http.hsts_max_age_seconds"),
    ],
)
def test_preload_is_refused_without_its_requirements(
    settings: dict[str, object], key: str, tmp_path: Path
) -> None:
    overrides = {f"http.{name}": value for name, value in {"hsts_preload": True, **settings}.items()}
    with pytest.raises(ConfigError) as raised:
        load_config(None, home=tmp_path, environ={}, overrides=overrides)
    (fault,) = raised.value.faults
    assert f"must be false with {key}, which is" in fault


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"http.enabled": False}, "must be 0 with http.enabled, which is false"),
        ({"server.port": 8080}, "must not be server.port, which is 8080"),
    ],
)
def test_redirect_port_without_https_is_refused(
    settings: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, home=tmp_path, environ={}, overrides={"http.redirect_port": 8080, **settings})
