"""Test the security header fields of every response."""

from __future__ import annotations

from pathlib import Path

import pytest

from zcproto.config.load import load_config
from zcproto.errors import ConfigError
from zcproto.http.messages import (
    DEFAULT_POLICY,
    RESERVED_FIELDS,
    HttpResponse,
    SecurityHeaders,
)


def fields(block: bytes) -> dict[str, str]:
    """Parse a block; names must be unique."""
    assert block.endswith(b"\r\n")
    lines = [line.partition(": ") for line in block.decode("ascii").removesuffix("\r\n").split("\r\n")]
    found = {name: value for name, _, value in lines}
    assert len(found) == len(lines)
    return found


@pytest.mark.requirement("hsts")
def test_owasp_headers_are_present() -> None:
    found = fields(SecurityHeaders(tls=True).block())
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


def test_hsts_is_absent_without_tls() -> None:
    assert "Strict-Transport-Security" not in fields(SecurityHeaders(tls=False).block())


def test_page_policy_replaces_default_policy() -> None:
    headers = SecurityHeaders(tls=True)
    found = fields(headers.block("default-src 'self'"))
    assert found["Content-Security-Policy"] == "default-src 'self'"
    assert set(found) == set(fields(headers.block()))


@pytest.mark.parametrize("policy", ["a\r\nSet-Cookie: b", "a\nb", "\u2028", "é", "a\0"])
def test_multiline_policy_is_refused(policy: str) -> None:
    with pytest.raises(ValueError, match="one line of ASCII"):
        SecurityHeaders(tls=False).block(policy)


def test_handler_cannot_set_reserved_fields() -> None:
    assert {name.lower() for name in fields(SecurityHeaders(tls=True).block())} <= RESERVED_FIELDS
    for name in RESERVED_FIELDS:
        with pytest.raises(ValueError, match="reserved"):
            HttpResponse(200, headers=((name.title(), "x"),))


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
