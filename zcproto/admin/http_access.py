"""Who may see figures over HTTP: whoever shows a session's token, or comes from an address on a list.

What this file decides: what `Authorization: Bearer` must hold (RFC 6750), and how it is refused.

Rules:
- A token is looked at as that of a frame is: known, live, of somebody who is a user, from an address that it may
  be used from. Where sessions are shared, one that is not known here is looked up.
- A bound token alone is worth nothing: what it is bound to must be proved on the same connection, which HTTP can do
  with a client certificate only.
- Whatever is wrong with a token, the answer is the same. No token is in a log.
"""

from __future__ import annotations

from typing import Final

from zcproto.auth.certificate import certificate_key
from zcproto.errors import CallError, CertificateError, Code
from zcproto.http.messages import HttpRequest, HttpResponse, text_response
from zcproto.server.state import ServerState, log
from zcproto.sessions import Session
from zcproto.sessions.token import token_from_text

_REALM: Final = 'Bearer realm="zcproto"'
_MS: Final = 1000

NO_TOKEN: Final = text_response(
    401, "this needs a session's token: Authorization: Bearer TOKEN", headers=(("WWW-Authenticate", _REALM),)
)
BAD_TOKEN: Final = text_response(
    401,
    "this token is not good here: open a session",
    headers=(("WWW-Authenticate", f'{_REALM}, error="invalid_token"'),),
)


class BearerTokens:
    """The check of tokens for one server."""

    def __init__(self, state: ServerState) -> None:
        self._state = state

    async def session_of(self, request: HttpRequest) -> Session | HttpResponse:
        """The session whose token a request shows; else what to answer it with."""
        authorization = request.headers.get("authorization")
        if authorization is None:
            return NO_TOKEN
        scheme, _, text = authorization.partition(" ")
        token = token_from_text(text.strip()) if scheme.lower() == "bearer" else None
        found: Session | HttpResponse = BAD_TOKEN if token is None else await self._check(token, request)
        if found is BAD_TOKEN:
            log.info("http.token_refused", peer=request.peer.address)
        return found

    async def _check(self, token: bytes, request: HttpRequest) -> Session | HttpResponse:
        state, address = self._state, request.peer.address
        session = state.registry.check(token, state.clock.wall())
        if not isinstance(session, Session) and state.sessions.is_shared:
            try:
                await state.sessions.look_up(token, address, session)
            except CallError as error:
                return _try_later(error)
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
        if state.binding.is_enabled and not state.binding.admits(
            session.user, record.address, request.peer.address
        ):
            return False
        if session.bound:
            certificate = request.peer.certificate()
            if certificate is None or _key_of(certificate) != state.registry.key_of(session):
                return False
            state.registry.use(session, state.clock.wall())
        return True


def _key_of(certificate: bytes) -> str | None:
    try:
        return certificate_key(certificate)
    except CertificateError:
        return None


def _try_later(error: CallError) -> HttpResponse:
    seconds = max(1, -(-int(error.details.get("retry_after_ms", _MS)) // _MS))
    status = 429 if error.code is Code.RESOURCE_EXHAUSTED else 503
    return text_response(status, error.message, headers=(("Retry-After", str(seconds)),))
