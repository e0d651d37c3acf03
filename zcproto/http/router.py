"""Route a request to its handler by exact path and method.

Decides 404 for an unknown path, 405 with Allow for an unsupported method, and HEAD wherever there is GET (the
connection omits the body). Paths are neither decoded nor normalised before the lookup.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from zcproto.http.messages import Handler, HttpRequest, HttpResponse, text_response

_PATH: Final = re.compile(r"/[A-Za-z0-9._~/-]*")


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

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(self._paths)

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
