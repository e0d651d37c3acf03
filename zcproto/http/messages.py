"""Define requests and responses, and route each request to its handler by exact path and method.

Decides:
- Which header fields a handler may set: not those of security nor those that frame a message. Every response has
  these exactly once, errors included, as fixed bytes after the status line.
- The fields of security, for an origin that serves figures to programs and one page to people:
  Strict-Transport-Security (RFC 6797), only with TLS, and the fields listed by OWASP's Secure Headers Project and
  ASVS 5.0 (3.4). A response that is not a page may do nothing in a browser. A page has its own policy.
- 404 for an unknown path, 405 with Allow for an unsupported method, and HEAD wherever there is GET (the connection
  omits the body). Paths are neither decoded nor normalised before the lookup.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

YEAR_S: Final = 31_536_000
"""The minimum max-age of the browsers' preload lists."""

STRICT_TRANSPORT_SECURITY: Final = f"max-age={YEAR_S}; includeSubDomains"

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


class SecurityHeaders:
    """The fields of every response of one endpoint, with Strict-Transport-Security if it uses TLS."""

    def __init__(self, *, tls: bool) -> None:
        first = (("Strict-Transport-Security", STRICT_TRANSPORT_SECURITY),) if tls else ()
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


TEXT: Final = "text/plain; charset=utf-8"
JSON: Final = "application/json"
HTML: Final = "text/html; charset=utf-8"

_PATH: Final = re.compile(r"/[A-Za-z0-9._~/-]*")

RESERVED_FIELDS: Final = SECURITY_FIELDS.union(
    ("connection", "content-length", "content-type", "date", "server", "trailer", "transfer-encoding")
)
"""Header fields that a handler must not set."""


@dataclass(frozen=True, slots=True, eq=False)
class Peer:
    """The sender of requests. `certificate` returns the client certificate (DER), or None."""

    address: str = ""
    certificate: Callable[[], bytes | None] = lambda: None


@dataclass(frozen=True, slots=True, eq=False)
class HttpRequest:
    """A complete request. `path` and `query` are not decoded; `query` excludes the `?`.

    `headers` have lower-case names; repeated fields are joined by a comma (RFC 9110 section 5.3).
    """

    method: str
    path: str
    query: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    peer: Peer = Peer()

    def json(self) -> Any:
        """Return the body as JSON. Raises ValueError if it is not valid JSON."""
        return json.loads(self.body)


@dataclass(frozen=True, slots=True)
class HttpResponse:
    """A response.

    `headers` are added to those of every response: `WWW-Authenticate`, `Allow`, `Location` and the like. `policy`
    replaces the default Content-Security-Policy. With `close` the connection ends after this response.
    """

    status: int
    body: bytes = b""
    content_type: str = TEXT
    headers: tuple[tuple[str, str], ...] = ()
    policy: str | None = None
    close: bool = False

    def __post_init__(self) -> None:
        if not 200 <= self.status <= 599 or (self.status in (204, 304) and self.body):
            raise ValueError(f"status {self.status} must be final, and 204 and 304 have no body")
        for name, _ in self.headers:
            if name.lower() in RESERVED_FIELDS:
                raise ValueError(f"{name} is reserved: handlers cannot set it")


Handler = Callable[[HttpRequest], HttpResponse | Coroutine[Any, Any, HttpResponse]]
"""Answer a request. May be a coroutine function."""


def text_response(status: int, text: str, **more: Any) -> HttpResponse:
    """Return a response with one line of plain text."""
    return HttpResponse(status, f"{text}\n".encode(), TEXT, **more)


def json_response(status: int, value: Any, **more: Any) -> HttpResponse:
    """Return a value as JSON, with a line end for terminals."""
    return HttpResponse(status, json.dumps(value).encode() + b"\n", JSON, **more)


@dataclass(frozen=True, slots=True)
class Route:
    """One method of one path with its handler."""

    method: str
    path: str
    handler: Handler


class Router:
    """The routes of one endpoint."""

    __slots__ = ("_paths",)

    def __init__(self, routes: Iterable[Route] = ()) -> None:
        self._paths: dict[str, dict[str, Handler]] = {}
        for route in routes:
            self.add(route)

    def add(self, route: Route) -> None:
        """Add a route. Raises ValueError if the path is invalid or already has this method."""
        if not _PATH.fullmatch(route.path):
            raise ValueError(f"invalid path {route.path!r}: use / followed by letters, digits and . _ ~ / -")
        methods = self._paths.setdefault(route.path, {})
        if route.method in methods:
            raise ValueError(f"{route.method} {route.path} already has a handler")
        methods[route.method] = route.handler

    def find(self, request: HttpRequest) -> Handler | HttpResponse:
        """Return the handler of a request, or an error response if it has none."""
        methods = self._paths.get(request.path)
        if methods is None:
            return text_response(404, "not found")
        handler = methods.get(request.method)
        if handler is None and request.method == "HEAD":
            handler = methods.get("GET")
        if handler is not None:
            return handler
        allowed = sorted({*methods, *(("HEAD",) if "GET" in methods else ())})
        return text_response(405, "method not allowed", headers=(("Allow", ", ".join(allowed)),))
