"""Which handler answers a request: by path and method, exactly as they came.

What this file decides: 404 for a path that nobody has, 405 with Allow for a method that the path does not take,
HEAD where GET is (the connection leaves the body away), and that no path is decoded or made simpler before it is
looked up: what is not written as in the table is another path.
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
    """One method of one path, and who answers it."""

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
        """Raises ValueError for a path that has this method already, or that no request can name."""
        if not _PATH.fullmatch(route.path):
            raise ValueError(f"{route.path!r} is no path of letters, digits and . _ ~ / -")
        methods = self._paths.setdefault(route.path, {})
        if route.method in methods:
            raise ValueError(f"{route.method} {route.path} has a handler already")
        methods[route.method] = route.handler

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(self._paths)

    def find(self, request: HttpRequest) -> Handler | HttpResponse:
        """Who answers a request; or the answer, if nobody does."""
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
