"""Requests and responses, as the handlers of routes see them.

What this file decides: which header fields a handler may set. Those of security_headers.py, and those that frame
a message, are not its own: they are on every response exactly once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

TEXT: Final = "text/plain; charset=utf-8"
JSON: Final = "application/json"
HTML: Final = "text/html; charset=utf-8"

NOT_OF_A_HANDLER: Final = frozenset(
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
"""Header fields that every response gets by itself."""


@dataclass(frozen=True, slots=True, eq=False)
class Peer:
    """Who sends requests. `certificate` reads the client's certificate (DER), if it showed one."""

    address: str = ""
    certificate: Callable[[], bytes | None] = lambda: None


NOBODY: Final = Peer()


@dataclass(frozen=True, slots=True, eq=False)
class HttpRequest:
    """One whole request. `path` and `query` are as they came, with nothing decoded; `query` is without its `?`.

    `headers` have names in lower case; the values of a name that came more than once are joined by a comma, as
    RFC 9110 section 5.3 says.
    """

    method: str
    path: str
    query: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    peer: Peer = NOBODY

    def json(self) -> Any:
        """The body as JSON. Raises ValueError if it is none."""
        return json.loads(self.body)


@dataclass(frozen=True, slots=True)
class HttpResponse:
    """What a request is answered with.

    `headers` are beside those that every response has: `WWW-Authenticate`, `Allow`, `Location` and such.
    `policy` takes the place of the Content-Security-Policy of what is no page. With `close` no other request is
    read from this connection.
    """

    status: int
    body: bytes = b""
    content_type: str = TEXT
    headers: tuple[tuple[str, str], ...] = ()
    policy: str | None = None
    close: bool = False

    def __post_init__(self) -> None:
        if not 200 <= self.status <= 599 or (self.status in (204, 304) and self.body):
            raise ValueError(f"{self.status} is no final response, or one without a body")
        for name, _ in self.headers:
            if name.lower() in NOT_OF_A_HANDLER:
                raise ValueError(f"{name} is not set by a handler")


Handler = Callable[[HttpRequest], HttpResponse | Coroutine[Any, Any, HttpResponse]]
"""Answers a request. It may be a coroutine function, if what it needs has to be waited for."""


def text_response(status: int, text: str, **more: Any) -> HttpResponse:
    """A line of text for people."""
    return HttpResponse(status, f"{text}\n".encode(), TEXT, **more)


def json_response(status: int, value: Any, **more: Any) -> HttpResponse:
    """A value as JSON, with a line end for those who read it on a terminal."""
    return HttpResponse(status, json.dumps(value).encode() + b"\n", JSON, **more)
