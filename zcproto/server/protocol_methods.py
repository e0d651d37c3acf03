"""The protocol's own methods: sessions and what the server tells about itself."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, Final

from zcproto.app.app import App, Method
from zcproto.app.context import Context
from zcproto.auth import Enrollment, Identity, Login
from zcproto.errors import FailedPrecondition, InvalidArgument, NotFound, Unauthenticated
from zcproto.server.operators import operator_methods
from zcproto.server.state import ServerState, log
from zcproto.sessions import EndReason, OpenedSession, Session, SessionInfo
from zcproto.sessions.record import SessionRecord
from zcproto.sessions.session import DEVICE_KEY
from zcproto.sessions.token import digest_of
from zcproto.wire.frame import TOKEN_SIZE, VERSION
from zcproto.wire.signing import SIGNATURE_SIZE

CLIENT_MAX_LENGTH: Final = 128


def default_app() -> App:
    """What `zcproto serve` offers without an application."""
    app = App()

    @app.method("echo")
    def echo(**params: Any) -> dict[str, Any]:
        """Return the params."""
        return params

    @app.method("sleep")
    async def sleep(ms: int) -> dict[str, Any]:
        """Wait for `ms` milliseconds, at most an hour."""
        if not 0 <= ms <= 3_600_000:
            raise InvalidArgument("ms must be from 0 to 3600000")
        await asyncio.sleep(ms / 1000)
        return {}

    @app.method("time")
    def time(context: Context) -> int:
        """The server's clock, milliseconds since the Unix epoch."""
        return context.wall()

    return app


def protocol_methods(
    state: ServerState, login: Login, enrollment: Enrollment | None = None
) -> Iterable[Method]:
    """`session.*` and `server.*`, and `device.*` where devices can be enrolled."""
    registry = state.registry

    def told(event: str, context: Context, session: Session, **values: Any) -> None:
        state.log_soon.add(
            event,
            session=session.id,
            user=session.user,
            peer=context.peer,
            connection=context.connection,
            **values,
        )

    def current(context: Context) -> Session:
        assert context.session is not None, "only public methods are run without a session"
        return context.session

    def session_open(context: Context, scheme: str, client: str = "", **fields: Any) -> Any:
        """Open a session: `scheme`, the scheme's own fields, and `client` as product/version."""
        # A plain function: in a crowd of logins that wait for nothing, coroutines are a twentieth of the work.
        _check_client(client)
        peer = context.peer
        try:
            identity = login.open({"scheme": scheme, **fields}, peer, context.now(), context.channel())
        except Unauthenticated:
            refused(context, scheme)
            raise
        if isinstance(identity, Identity) and not identity.key:
            opened = state.sessions.open_nowait(
                identity.user, operator=identity.operator, client=client, address=peer
            )
            if opened is not None:
                return was_opened(context, opened, scheme, client)
        return open_later(context, identity, scheme, client)

    async def open_later(
        context: Context, identity: Identity | Coroutine[Any, Any, Identity], scheme: str, client: str
    ) -> dict[str, Any]:
        """What has to wait: for the authenticator, for the store, or for both."""
        if not isinstance(identity, Identity):
            try:
                identity = await identity
            except Unauthenticated:
                refused(context, scheme)
                raise
        opened = await state.sessions.open(
            identity.user,
            operator=identity.operator,
            client=client,
            address=context.peer,
            key=identity.key,
        )
        if identity.key:
            if login.is_gone(identity.key):  # it was removed while the session was opened
                await state.sessions.revoke(
                    opened.session.id, user=identity.user, reason=EndReason.DEVICE_REMOVED
                )
                raise Unauthenticated("the device was removed; pair it again")
            context.prove(identity.key)
        return was_opened(context, opened, scheme, client)

    def refused(context: Context, scheme: str) -> None:
        log.info("login.failed", peer=context.peer, connection=context.connection, scheme=scheme)

    def was_opened(context: Context, opened: OpenedSession, scheme: str, client: str) -> dict[str, Any]:
        told("session.opened", context, opened.session, scheme=scheme, client=client)
        return _opened(context, opened)

    async def session_attach(context: Context, signature: bytes) -> dict[str, Any]:
        """Prove, by a signature of the device, the key of this bound session on this connection."""
        if len(signature) != SIGNATURE_SIZE:
            raise InvalidArgument(f"signature must have {SIGNATURE_SIZE} bytes")
        session = current(context)
        key = registry.key_of(session)
        if not key.startswith(DEVICE_KEY):
            raise FailedPrecondition(
                "this session is not bound to a device: its token needs no session.attach"
            )
        await login.attach(
            key, session.user, signature, context.token, context.peer, context.now(), context.channel()
        )
        if registry.key_of(session) != key:
            raise Unauthenticated("the session has expired; open a new one")
        context.prove(key)
        context.join(session, context.token)
        return {}

    async def session_refresh(context: Context, refresh_token: bytes, client: str = "") -> dict[str, Any]:
        """Trade a refresh token for a new pair of tokens of the same session. It works once."""
        if len(refresh_token) != TOKEN_SIZE:
            raise InvalidArgument(f"refresh_token must have {TOKEN_SIZE} bytes")
        _check_client(client)
        session = await state.sessions.find_by_refresh_token(refresh_token)
        state.binding.check_refresh(session, client, context.peer)
        if session is not None and session.key and session.refresh_digest == digest_of(refresh_token):
            check_key(context, session)
        opened = await state.sessions.refresh(refresh_token, client=client, address=context.peer)
        told("session.refreshed", context, opened.session, client=client)
        return _opened(context, opened)

    def check_key(context: Context, session: SessionRecord) -> None:
        """Refuse to refresh a bound session where its key could be proved and was not. Nothing is spent by that.

        A spent refresh token does not come here: it leads to the same pair again, or ends the session. Nor must a
        device prove its key for a token that has expired, which nobody can attach.
        """
        if context.has_proved(session.key):
            return
        if not session.key.startswith(DEVICE_KEY):
            raise Unauthenticated(
                "bound to another client certificate: open a session", {"certificate": True}
            )
        wall, idle_ms = context.wall(), state.session_idle_timeout_ms
        if wall < session.expires_at and (idle_ms is None or wall < session.last_used_at + idle_ms):
            raise Unauthenticated(
                "bound refresh token: prove its key here by session.attach first", {"attach": True}
            )

    def _opened(context: Context, opened: OpenedSession) -> dict[str, Any]:
        session = opened.session
        context.join(session, opened.token)
        return {
            "token": opened.token,
            "id": session.id,
            "user": session.user,
            "expires_at": session.expires_at,
            "idle_timeout_ms": state.session_idle_timeout_ms or 0,
            "refresh_token": opened.refresh_token,
            "refresh_expires_at": opened.refresh_expires_at,
            "bound": session.bound,
        }

    def session_info(context: Context) -> dict[str, Any]:
        """What the server knows of this session."""
        return _info(state.sessions.info(current(context)))

    async def session_list(context: Context) -> list[dict[str, Any]]:
        """The sessions of this user, with `current` for the one that asks."""
        session = current(context)
        sessions = await state.sessions.list(session.user)
        return [{**_info(info), "current": info.id == session.id} for info in sessions]

    async def session_revoke(context: Context, id: str | None = None, all: bool = False) -> dict[str, Any]:
        """End one session of this user by its `id`, or `all` of them, this one too."""
        session = current(context)
        if (id is None) is not all:
            raise InvalidArgument("give either id, or all = true")
        quietly = context.suppress_revoked_event()
        if id is None:
            revoked = await state.sessions.revoke_user(session.user, EndReason.BY_USER, quietly)
        else:
            revoked = await state.sessions.revoke(
                id, user=session.user, reason=EndReason.BY_USER, suppress_event=quietly
            )
            if not revoked:
                raise NotFound("no session with this id")
        told("session.revoked", context, session, which="all" if id is None else id, sessions=int(revoked))
        state.on_revoked(f"user {session.user}", int(revoked), True)
        return {"revoked": int(revoked)}

    async def session_close(context: Context) -> dict[str, Any]:
        """End this session."""
        session = current(context)
        await state.sessions.close(session, context.suppress_revoked_event())
        told("session.closed", context, session)
        return {}

    async def device_enroll(context: Context, code: str, public_key: bytes, name: str) -> dict[str, Any]:
        """Trade a code of `zcproto pair` for a device, by whose key its user opens sessions from then on."""
        assert enrollment is not None
        pairing = await enrollment.enroll(
            code, public_key, name, address=context.peer, wall=context.wall(), now=context.now()
        )
        log.info(
            "device.enrolled",
            device=pairing.device,
            user=pairing.user,
            peer=context.peer,
            connection=context.connection,
        )
        return pairing._asdict()

    def server_info(context: Context) -> dict[str, Any]:
        """The server's time, protocol versions, pins now and next, and the methods that this caller may call."""
        session = context.session
        return {
            "time": context.wall(),
            "versions": [VERSION],
            "methods": [
                {"name": name, "doc": method.doc, "params": [param._asdict() for param in method.params]}
                for name, method in sorted(state.methods.items())
                if method.public or (session is not None and (session.operator or not method.operator))
            ],
            "pins": list(state.pins),
            "pins_next": state.pins_next,
        }

    methods = [
        Method("session.open", session_open, public=True, may_wait=True),
        Method("session.attach", session_attach),
        Method("session.refresh", session_refresh, public=True),
        Method("session.info", session_info),
        Method("session.list", session_list),
        Method("session.revoke", session_revoke),
        Method("session.close", session_close),
        Method("server.info", server_info, public=True),
    ]
    methods += operator_methods(state)
    if enrollment is not None:
        methods.append(Method("device.enroll", device_enroll, public=True))
    return methods


def _info(info: SessionInfo) -> dict[str, Any]:
    return {
        "id": info.id,
        "user": info.user,
        "created_at": info.created_at,
        "last_used_at": info.last_used_at,
        "expires_at": info.expires_at,
        "client": info.client,
        "address": info.address,
        "bound": info.bound,
    }


def _check_client(client: str) -> None:
    if len(client) > CLIENT_MAX_LENGTH or not client.isprintable():
        raise InvalidArgument(f"client must be at most {CLIENT_MAX_LENGTH} printable characters")
