"""Define the requests and responses that route handlers work with.

Decides which header fields a handler may set: not those of security_headers.py nor those that frame a message.
Every response has these exactly once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

TEXT: Final = "text/plain; charset=utf-8"
JSON: Final = "application/json"
HTML: Final = "text/html; charset=utf-8"

RESERVED_FIELDS: Final = frozenset(
    {
        *("connection", "content-length", "content-type", "date", "server", "trailer", "transfer-encoding"),
        *("cache-control", "content-security-policy", "cross-origin-embedder-policy"),
        *(
            "cross-origin-opener-policy",
            "cross-origin-resource-policy",
            "permissions-policy",
            "referrer-policy",
        ),
        *("strict-transport-security", "x-content-type-options", "x-frame-options"),
        *("x-permitted-cross-domain-policies",),
    }
)
"""Header fields that a handler must not set."""


@dataclass(frozen=True, slots=True, eq=False)
class Peer:
    """The sender of requests. `certificate` returns the client certificate (DER), or None."""

    address: str = ""
    certificate: Callable[[], bytes | None] = lambda: None


UNKNOWN_PEER: Final = Peer()


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
    peer: Peer = UNKNOWN_PEER

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
