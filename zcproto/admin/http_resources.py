"""What is to be had over HTTPS: /healthz, /readyz, /.well-known/zcp, /metrics, / and /status.json.

What this file decides: what each says, and to whom.

Rules:
- Open to anybody is what a load balancer or a client needs before it has a session, and no figure more.
- /healthz says that the process answers. /readyz says whether new clients should come here, and why not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

from zcproto.admin.http_access import BearerTokens
from zcproto.admin.parts import Parts
from zcproto.admin.status_page import Figures, StatusFigures, page
from zcproto.common.network import AddressSet, plain_address
from zcproto.http.messages import HttpRequest, HttpResponse, json_response, text_response
from zcproto.http.router import Route
from zcproto.sessions import Session
from zcproto.tls.suites import SUITES
from zcproto.wire.frame import VERSION

ALPN: Final = "zcp/1"
Metrics = Callable[[str], tuple[str, bytes]]
"""The metrics in the form that an Accept header asks for: their content type, and the text."""


class Resources:
    """The routes of a server's HTTPS side.

    `figures` gives the server's status, `metrics` renders its metrics.
    """

    def __init__(self, parts: Parts, *, figures: Figures, metrics: Metrics) -> None:
        self._parts = parts
        self._state = parts.state
        self._metrics = metrics
        self._page = page()
        self._status = StatusFigures(figures, self.readiness, parts.clock)
        self._tokens = BearerTokens(parts.state)

    def routes(self) -> Iterator[Route]:
        yield Route("GET", "/", self._show_page)
        yield Route("GET", "/status.json", self._show_status)
        yield Route("GET", "/healthz", self._healthz)
        yield Route("GET", "/readyz", self._readyz)
        yield Route("GET", "/.well-known/zcp", self._well_known)
        yield Route("GET", "/metrics", self._show_metrics)

    # --- for anybody ---------------------------------------------------------------------------------

    def _show_page(self, request: HttpRequest) -> HttpResponse:
        return self._page

    def _healthz(self, request: HttpRequest) -> HttpResponse:
        return text_response(200, "ok")

    def _readyz(self, request: HttpRequest) -> HttpResponse:
        ready, body = self.readiness()
        return json_response(200 if ready else 503, body)

    def readiness(self) -> tuple[bool, dict[str, Any]]:
        """Whether new clients should come here; and all that this was found by, with the reasons if not."""
        state = self._state
        store = str(state.sessions.statistics()["state"])
        now = self._parts.certificates.now()
        lives = [
            (pair.key_type, (pair.not_after - now).total_seconds()) for pair in self._parts.certificate_pairs
        ]
        left = round(min((seconds for _, seconds in lives), default=0.0))
        reasons = []
        if state.draining:
            reasons.append("draining: the server is stopping")
        if state.registry.closed:
            reasons.append("store: sessions cannot be checked, and every token is refused")
        elif store != "healthy":
            reasons.append(
                "store: it does not answer, and no session can be opened; those that are known go on"
            )
        if left <= 0:
            reasons.append("certificate: one that is served has expired")
        body = {
            "ready": not reasons,
            "reasons": reasons,
            "checks": {
                "draining": state.draining,
                "store": store,
                "certificates": [
                    {"key_type": key_type, "seconds_left": round(seconds)} for key_type, seconds in lives
                ],
            },
        }
        return not reasons, body

    def _well_known(self, request: HttpRequest) -> HttpResponse:
        state = self._state
        settings = state.settings
        return json_response(
            200,
            {
                "server": settings.server,
                "alpn": [ALPN],
                "versions": [VERSION],
                "tls": {"versions": ["TLSv1.3"], "suites": list(SUITES)},
                "time": state.clock.wall(),
                "limits": {
                    "max_frame": settings.max_frame,
                    "max_frame_before_session": settings.max_frame_before_session,
                    "max_streams": settings.max_streams,
                    "max_depth": settings.max_depth,
                    "idle_timeout_ms": round(settings.idle_timeout_s * 1000),
                    "open_timeout_ms": round(settings.open_timeout_s * 1000),
                    "tolerance_ms": settings.tolerance_ms,
                },
                "auth": list(self._parts.login.schemes),
                "pins": list(state.pins),
                "pins_next": state.pins_next,
                "sts": {
                    "max_age": settings.sts.max_age_s,
                    "include_subdomains": settings.sts.include_subdomains,
                },
            },
        )

    # --- for some ------------------------------------------------------------------------------------

    async def _show_status(self, request: HttpRequest) -> HttpResponse:
        session = await self._tokens.session_of(request)
        return self._status.answer(session.operator) if isinstance(session, Session) else session

    async def _show_metrics(self, request: HttpRequest) -> HttpResponse:
        refusal = await self._may_see_figures(request)
        if refusal is not None:
            return refusal
        content_type, body = self._metrics(request.headers.get("accept", ""))
        return HttpResponse(200, body, content_type)

    async def _may_see_figures(self, request: HttpRequest) -> HttpResponse | None:
        """None if whoever asks may see metrics; else what to answer."""
        config = self._parts.config.http
        if config.metrics == "off":
            return text_response(404, "not found")
        if config.metrics == "open":
            return None
        if config.metrics == "address":
            if AddressSet(config.allow).contains(plain_address(request.peer.address)):
                return None
            return text_response(403, "metrics are for the addresses of http.allow")
        session = await self._tokens.session_of(request)
        return None if isinstance(session, Session) else session
