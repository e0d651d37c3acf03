"""The resources of the HTTPS side, and who may read them.

    /healthz  /readyz  /.well-known/zcp   public
    /                                     the status page: public, without any figure
    /status.json                          for a session's or a machine's token: the figures that the page shows
    /metrics                              by `http.metrics`: a token, an address, public, or off

Decides: the content of each resource and its access rule.

Rules:
- Public is what a load balancer, or a client without a session, needs, and no figure more.
- /healthz reports that the process answers. /readyz reports whether new clients should connect, and why not.
- A bearer token (RFC 6750) is checked like the token of a frame: known, live, of an existing user, from an
  admitted address; where sessions are shared, an unknown one is looked up. A bound token also needs a proof of its
  key on the same connection, which over HTTP only a client certificate is. Every bad token gets the same response,
  and no token is logged.
- The script of the page asks for figures with the token that its user types in. A browser sends no `Authorization`
  when another site navigates to the page, so no other site can have figures fetched.
- The policy of the page names the hashes of its one style and its one script: nothing else runs, nothing is loaded
  from elsewhere, no form is sent, no text becomes markup.
- Figures are read on demand, at most once in `FRESH_S` for all viewers, and are bounded in size. What names users,
  peers or addresses is for operators.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, lru_cache
from importlib.resources import files
from typing import Any, Final

from zcproto.admin.machines import NO_MACHINE_TOKEN, REALM
from zcproto.admin.metrics import server_metrics
from zcproto.admin.parts import Parts
from zcproto.admin.snapshot import read_readiness, read_status, readiness_report
from zcproto.auth.schemes import certificate_key
from zcproto.common.clock import MS_PER_SECOND
from zcproto.common.network import AddressSet, plain_address
from zcproto.common.roles import OPERATOR
from zcproto.errors import CallError, CertificateError, Code
from zcproto.http.messages import HTML, HttpRequest, HttpResponse, Route, json_response, text_response
from zcproto.server.state import ServerState, log
from zcproto.sessions import Session
from zcproto.sessions.token import token_from_text
from zcproto.tls.context import SUITES
from zcproto.wire.frame import VERSION

ALPN: Final = "zcp/1"

FRESH_S: Final = 0.9
"""Seconds: a little less than the page's interval of a second, so that a single viewer always gets new figures."""

MAX_ALERTS: Final = 50
"""Open alerts in the figures, and as many closed ones; the newest."""

MAX_NAMES: Final = 8
"""Names of one certificate in the figures."""

NO_TOKEN: Final = text_response(
    401, "this needs a session's token: Authorization: Bearer TOKEN", headers=(("WWW-Authenticate", REALM),)
)
BAD_TOKEN: Final = text_response(
    401,
    "this token is not valid here: open a session",
    headers=(("WWW-Authenticate", f'{REALM}, error="invalid_token"'),),
)

_PAGE_KEYS: Final = (
    *("api", "version", "time", "started_at", "uptime_s", "draining", "connections", "sessions", "requests"),
    *("streams", "traffic", "handshakes", "store", "process", "workers"),
)
_CERTIFICATE_KEYS: Final = ("file", "source", "key_type", "not_after", "days_left", "seconds_left")
_ALERT_KEYS: Final = ("kind", "severity", "began_at", "last_at", "ended_at", "count", "many")
_OPERATOR_KEYS: Final = ("about", "title")


class Resources:
    """The routes of one server's HTTPS side."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._metrics = server_metrics(parts)
        self._tokens = BearerTokens(parts.state)
        self._read_at = self._checked_at = float("-inf")
        self._checked: Mapping[str, Any] = {}
        self._figures: dict[bool, HttpResponse] = {}

    def routes(self) -> Iterator[Route]:
        yield Route("GET", "/", lambda request: page())
        yield Route("GET", "/status.json", self._show_status)
        yield Route("GET", "/healthz", lambda request: text_response(200, "ok"))
        yield Route("GET", "/readyz", self._readyz)
        yield Route("GET", "/.well-known/zcp", self._well_known)
        yield Route("GET", "/metrics", self._show_metrics)

    # --- public ----------------------------------------------------------------------------------------

    async def _readyz(self, request: HttpRequest) -> HttpResponse:
        body = await self._readiness()
        return json_response(200 if body["ready"] else 503, body)

    async def _readiness(self) -> Mapping[str, Any]:
        """Return whether new clients should connect. While the coordinator is silent, this worker decides."""
        parts = self._parts
        if parts.fleet is None:
            return readiness_report(parts)
        now = parts.clock.now()
        if now - self._checked_at >= FRESH_S:
            try:
                self._checked = await read_readiness(parts)
            except CallError as error:
                own = readiness_report(parts)
                self._checked = {**own, "warnings": [*own["warnings"], f"workers: {error.message}"]}
            self._checked_at = now
        return self._checked

    def _well_known(self, request: HttpRequest) -> HttpResponse:
        state = self._parts.state
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
                    "idle_timeout_ms": round(settings.idle_timeout_s * MS_PER_SECOND),
                    "open_timeout_ms": round(settings.open_timeout_s * MS_PER_SECOND),
                    "tolerance_ms": settings.tolerance_ms,
                },
                **settings.features,
                "auth": list(self._parts.login.schemes),
                "pins": list(state.pins),
                "pins_next": state.pins_next,
                "sts": {
                    "max_age": settings.sts.max_age_s,
                    "include_subdomains": settings.sts.include_subdomains,
                },
            },
        )

    # --- restricted ------------------------------------------------------------------------------------

    async def _show_status(self, request: HttpRequest) -> HttpResponse:
        machines, token = self._parts.tokens, bearer_token(request)
        machine = None if machines is None or token is None else await machines.find(token)
        is_operator = False
        if machines is not None and machine is not None:
            refusal = machines.check(*machine, request.peer.address, "status")
            if refusal is not None:
                return refusal
        else:
            session = await self._tokens.session_of(request)
            if not isinstance(session, Session):
                return session
            is_operator = OPERATOR in session.roles
        try:
            return await self.figures(is_operator)
        except CallError as error:
            return _retry_later(error)

    async def figures(self, operator: bool) -> HttpResponse:
        """Return the figures of the status page, for an operator or for any other user. Raises Unavailable."""
        now = self._parts.clock.now()
        if now - self._read_at >= FRESH_S:
            report, readiness = await read_status(self._parts), await self._readiness()
            is_ready = {key: readiness[key] for key in ("ready", "reasons")}
            self._figures = {
                role: json_response(200, {**is_ready, **page_figures(report, role)}) for role in (False, True)
            }
            self._read_at = now
        return self._figures[operator]

    async def _show_metrics(self, request: HttpRequest) -> HttpResponse:
        refusal = await self._refuse_metrics(request)
        if refusal is not None:
            return refusal
        metrics = self._metrics
        if self._parts.fleet is not None:
            try:
                metrics = await self._parts.fleet.metrics()
            except CallError as error:
                return _retry_later(error)
        content_type, body = metrics.render(request.headers.get("accept", ""))
        return HttpResponse(200, body, content_type)

    async def _refuse_metrics(self, request: HttpRequest) -> HttpResponse | None:
        """Return None if the caller may read metrics, else the response."""
        config = self._parts.config.http
        if config.metrics == "off":
            return text_response(404, "not found")
        if config.metrics == "open":
            return None
        if config.metrics == "address":
            if _address_set(tuple(config.allow)).contains(plain_address(request.peer.address)):
                return None
            return text_response(403, "metrics are for the addresses of http.allow")
        if config.metrics == "token":
            if "authorization" not in request.headers:
                return NO_MACHINE_TOKEN
            assert self._parts.tokens is not None
            return await self._parts.tokens.refusal(bearer_token(request), request, "metrics")
        session = await self._tokens.session_of(request)
        return None if isinstance(session, Session) else session


_address_set = lru_cache(maxsize=4)(AddressSet)


class BearerTokens:
    """The token check of one server."""

    def __init__(self, state: ServerState) -> None:
        self._state = state

    async def session_of(self, request: HttpRequest) -> Session | HttpResponse:
        """Return the session of a request's token, or the response that refuses it."""
        if "authorization" not in request.headers:
            return NO_TOKEN
        token = bearer_token(request)
        found: Session | HttpResponse = BAD_TOKEN if token is None else await self._check(token, request)
        if found is BAD_TOKEN:
            log.info("http.token_refused", peer=request.peer.address)
        return found

    async def _check(self, token: bytes, request: HttpRequest) -> Session | HttpResponse:
        state, address = self._state, request.peer.address
        session = state.registry.check(token, state.clock.wall())
        if not isinstance(session, Session) and state.sessions.looks_up:
            try:
                await state.sessions.look_up(token, address, session)
            except CallError as error:
                return _retry_later(error)
            session = state.registry.check(token, state.clock.wall())
        if session is Code.UNAVAILABLE:
            return text_response(503, "sessions cannot be checked just now", headers=(("Retry-After", "1"),))
        if not isinstance(session, Session) or not self._admits(session, request):
            return BAD_TOKEN
        return session

    def _admits(self, session: Session, request: HttpRequest) -> bool:
        state = self._state
        record = state.registry.record(session.raw_id)
        if record is None:
            return False
        if state.binding.is_enabled and not state.binding.admits(record, request.peer.address):
            return False
        if session.bound:
            certificate = request.peer.certificate()
            if certificate is None or _key_of(certificate) != state.registry.key_of(session):
                return False
            state.registry.use(session, state.clock.wall())
        return True


def bearer_token(request: HttpRequest) -> bytes | None:
    """Return the token of a request; None if it has none, or a malformed one."""
    scheme, _, text = request.headers.get("authorization", "").partition(" ")
    return token_from_text(text.strip()) if scheme.lower() == "bearer" else None


def _key_of(certificate: bytes) -> str | None:
    try:
        return certificate_key(certificate)
    except CertificateError:
        return None


def _retry_later(error: CallError) -> HttpResponse:
    seconds = max(1, -(-int(error.details.get("retry_after_ms", MS_PER_SECOND)) // MS_PER_SECOND))
    status = 429 if error.code is Code.RESOURCE_EXHAUSTED else 503
    return text_response(status, error.message, headers=(("Retry-After", str(seconds)),))


@cache
def page() -> HttpResponse:
    """Return the status page, built from its files once."""
    folder = files("zcproto.admin") / "page"
    style, script, html = (
        (folder / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js", "html")
    )
    body = html.replace("{style}", style).replace("{script}", script)
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; connect-src 'self';"
        " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none';"
        " require-trusted-types-for 'script'; trusted-types 'none'"
    )
    return HttpResponse(200, body.encode(), HTML, policy=policy)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def page_figures(report: Mapping[str, Any], operator: bool) -> dict[str, Any]:
    """Return the part of a status report that the page shows."""
    alerts = report["alerts"]
    newest_open, more_open = _newest(alerts["open"], "began_at")
    newest_over, more_over = _newest(alerts["over"], "ended_at")
    keys = (*_ALERT_KEYS, *_OPERATOR_KEYS) if operator else _ALERT_KEYS
    return {
        **{key: report[key] for key in _PAGE_KEYS},
        "operator": operator,
        "certificates": [
            {
                **{key: one[key] for key in _CERTIFICATE_KEYS},
                "names": one["names"][:MAX_NAMES],
                "more_names": max(0, len(one["names"]) - MAX_NAMES),
            }
            for one in report["certificates"]
        ],
        "alerts": {
            "open": [{key: alert[key] for key in keys} for alert in newest_open],
            "more_open": more_open,
            "over": [{key: alert[key] for key in keys} for alert in newest_over],
            "more_over": more_over,
        },
    }


def _newest(alerts: Sequence[Mapping[str, Any]], by: str) -> tuple[list[Mapping[str, Any]], int]:
    """Return the newest alerts, newest first, and the number of the others."""
    ordered = sorted(alerts, key=lambda alert: alert[by], reverse=True)
    return ordered[:MAX_ALERTS], max(0, len(ordered) - MAX_ALERTS)
