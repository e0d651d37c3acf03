"""Build the header fields of every response once.

Decides Strict-Transport-Security (RFC 6797) and the fields listed by OWASP's Secure Headers Project and ASVS 5.0
(3.4), for an origin that serves figures to programs and one page to people.

Rules:
- The fields are fixed bytes after the status line of every response, errors included, so none is missing or
  doubled.
- No Strict-Transport-Security without TLS (RFC 6797 section 7.2), nor when it is switched off.
- A response that is not a page may do nothing in a browser. A page has its own policy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

YEAR_S: Final = 31_536_000
"""The minimum max-age of the browsers' preload lists."""

DEFAULT_POLICY: Final = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
"""The Content-Security-Policy of responses other than pages. default-src does not cover the other three."""

_FORBIDDEN_FEATURES: Final = (
    *("accelerometer", "autoplay", "camera", "cross-origin-isolated", "display-capture", "encrypted-media"),
    *("fullscreen", "geolocation", "gyroscope", "keyboard-map", "magnetometer", "microphone", "midi"),
    *("payment", "picture-in-picture", "publickey-credentials-get", "screen-wake-lock", "sync-xhr"),
    *("usb", "xr-spatial-tracking"),
)
_ALWAYS: Final = (
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("X-Permitted-Cross-Domain-Policies", "none"),
    ("Referrer-Policy", "no-referrer"),
    ("Cache-Control", "no-store"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cross-Origin-Embedder-Policy", "require-corp"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Permissions-Policy", ", ".join(f"{feature}=()" for feature in _FORBIDDEN_FEATURES)),
)

SECURITY_FIELDS: Final = frozenset(
    {"strict-transport-security", "content-security-policy", *(name.lower() for name, _ in _ALWAYS)}
)
"""The names of all these fields in lower case."""


@dataclass(frozen=True, slots=True)
class StrictTransportSecurity:
    """The policy of RFC 6797 section 6.1. With `max_age_s` 0, browsers delete it."""

    max_age_s: int = YEAR_S
    include_subdomains: bool = True
    preload: bool = False

    @property
    def value(self) -> str:
        """Return the value of the header field."""
        subdomains = "; includeSubDomains" if self.include_subdomains else ""
        return f"max-age={self.max_age_s}{subdomains}{'; preload' if self.preload else ''}"


class SecurityHeaders:
    """The fields of every response of one endpoint. `hsts` is None without TLS or when it is switched off."""

    def __init__(self, hsts: StrictTransportSecurity | None) -> None:
        self.hsts = hsts
        first = () if hsts is None else (("Strict-Transport-Security", hsts.value),)
        self._before = "".join(f"{name}: {value}\r\n" for name, value in (*first, *_ALWAYS)).encode("ascii")
        self._usual = self._with(DEFAULT_POLICY)

    def block(self, policy: str | None = None) -> bytes:
        """Return the fields as bytes, line ends included. `policy` is the Content-Security-Policy of a page.

        Raises ValueError if the policy is not one line of ASCII.
        """
        return self._usual if policy is None else self._with(policy)

    def _with(self, policy: str) -> bytes:
        if not policy.isascii() or not policy.isprintable():
            raise ValueError("a Content-Security-Policy must be one line of ASCII")
        return b"%bContent-Security-Policy: %b\r\n" % (self._before, policy.encode("ascii"))
