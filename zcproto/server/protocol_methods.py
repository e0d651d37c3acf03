"""The protocol's own methods: `session.*`, `device.*` and `server.*` (zcp1.md, sections 9 and 11).

`server.stats` is in zcproto/admin/snapshot.py.

Rules:
- A session is named by its id. Only `session.open` and `session.refresh` return tokens.
- Every revocation is logged with who revoked how many sessions.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from heapq import nlargest
from typing import Any, Final

from zcproto.app.app import App, Method
from zcproto.app.context import CallConnection, Context
from zcproto.auth import Enrollment, Identity, Login
from zcproto.auth.identity import NO_CHANNEL, Channel
from zcproto.common.parameters import Signature
from zcproto.common.roles import NO_ROLES, OPERATORS, Roles, roles_of
from zcproto.errors import Code, FailedPrecondition, InvalidArgument, NotFound, Unauthenticated, Unavailable
from zcproto.server.state import LISTED_CONNECTIONS, ConnectionUses, ServerState, log
from zcproto.sessions import EndReason, OpenedSession, Session, SessionInfo
from zcproto.sessions.record import SessionRecord
from zcproto.sessions.session import BOUND, DEVICE_KEY, OPERATOR
from zcproto.sessions.token import FAMILY_SIZE, digest_of, id_of, id_text
from zcproto.wire.frame import TOKEN_SIZE, VERSION
from zcproto.wire.message import METHOD_ALPHABET, METHOD_MAX_LENGTH, SIGNATURE_SIZE

CLIENT_MAX_LENGTH: Final = 128

LISTED: Final = 1_000
"""Sessions in one answer: at most 500 KB, which every client accepts."""

REVOKED_AT_ONCE: Final = 1_000

HANDLED_METHODS: Final = 256
"""Names of methods in one `session.handle`."""

_SCHEMA_SHARE: Final = 4
"""All schemas in an answer of `server.info` take at most 1/4 of what a frame can carry."""

_SHOWN: Final = ("id", "user", "created_at", "last_used_at", "expires_at", "client", "address", "bound")
"""The fields of a session that its user sees, beside its connections."""


_signatures: dict[str, Signature] = {}
"""By method: reading them takes longer than all else of a server in memory."""


def protocol_method(
    name: str, function: Callable[..., Any], roles: Roles = NO_ROLES, **access: bool
) -> Method:
    """Return a method of the protocol. Its function differs from server to server, its parameters do not."""
    method = Method(name, function, signature=_signatures.get(name), roles=roles, **access)
    _signatures[name] = method.signature
    return method


def protocol_methods(
    state: ServerState, login: Login, enrollment: Enrollment | None = None, app: App[Any] | None = None
) -> list[Method]:
    """Return all methods of the protocol; those of devices only if devices can be enrolled.

    `app` is the application whose state its authenticators see.
    """
    devices = [] if enrollment is None else [enroll_method(enrollment)]
    methods = [*session_methods(state, login), *devices, *server_methods(state)]
    if app is not None and app in app.lifespans():
        for method in methods:
            method.owner = app
    return methods


# --- sessions of the caller ------------------------------------------------------------------------------


def session_methods(state: ServerState, login: Login) -> list[Method]:
    """Return `session.*`."""
    registry = state.registry

    def log_event(event: str, caller: CallConnection, session: Session, **values: Any) -> None:
        state.log_soon.add(
            event,
            {
                "session": session.id,
                "user": session.user,
                "peer": caller.peer,
                "connection": caller.id,
                **values,
            },
        )

    def session_open(context: Context, scheme: str, client: str = "", **fields: Any) -> Any:
        """Open a session: `scheme`, the scheme's own fields, and `client` as product/version."""
        # A plain function: during a rush of logins that need not wait, coroutines are 5% of the work.
        _check_client(client)
        caller = context.caller
        peer, fields["scheme"] = caller.peer, scheme
        channel = NO_CHANNEL if scheme in login.without_channel else caller.channel(context)
        try:
            identity = login.open(fields, peer, state.clock.now(), channel)
        except Unauthenticated:
            log_refused(context, fields, channel)
            raise
        if isinstance(identity, Identity) and not (identity.key or state.sessions.is_stored):
            user, roles, _, ends_at = identity
            opened = registry.open(
                user,
                wall=state.clock.wall(),
                client=client,
                address=peer,
                roles=frozenset(roles),
                external=scheme in login.external,
                ends_at=ends_at,
            )
            log_event("session.opened", caller, opened.session, scheme=scheme, client=client)
            return answer_tokens(caller, opened)
        return open_later(context, identity, fields, channel, client)

    async def open_later(
        context: Context,
        identity: Identity | Coroutine[Any, Any, Identity],
        fields: dict[str, Any],
        channel: Channel,
        client: str,
    ) -> dict[str, Any]:
        """Open a session whose authenticator or store must be awaited."""
        scheme: str = fields["scheme"]
        if not isinstance(identity, Identity):
            try:
                identity = await identity
            except Unauthenticated:
                log_refused(context, fields, channel)
                raise
        is_external = scheme in login.external
        stored = not is_external and state.sessions.is_stored
        origin = state.binding.origin_of(identity.user, identity.key) if stored else b""
        with login.opening(fields, channel, identity.user):
            opened = await state.sessions.open(
                identity.user,
                roles=frozenset(identity.roles),
                client=client,
                address=context.peer,
                key=identity.key,
                external=is_external,
                ends_at=identity.ends_at,
                origin=origin,
            )
        if identity.key:
            if login.is_gone(identity.key):  # removed while the session was opened
                await state.sessions.revoke(
                    opened.session.id, user=identity.user, reason=EndReason.DEVICE_REMOVED
                )
                raise Unauthenticated("the device was removed; pair it again")
            context.caller.prove(identity.key)
        log_event("session.opened", context.caller, opened.session, scheme=scheme, client=client)
        return answer_tokens(context.caller, opened)

    def log_refused(context: Context, fields: dict[str, Any], channel: Channel) -> None:
        log.info(
            "login.failed",
            user=login.user_named(fields, channel) or None,
            peer=context.peer,
            connection=context.connection,
            scheme=fields["scheme"],
        )

    async def session_attach(context: Context, signature: bytes) -> dict[str, Any]:
        """Prove, by a signature of the device, the key of this bound session on this connection."""
        if len(signature) != SIGNATURE_SIZE:
            raise InvalidArgument(f"signature must have {SIGNATURE_SIZE} bytes")
        session = _session_of(context)
        key = registry.key_of(session)
        if not key.startswith(DEVICE_KEY):
            raise FailedPrecondition(
                "this session is not bound to a device; use its token without session.attach"
            )
        await login.attach(
            key, session.user, signature, context.token, context.peer, context.now(), context.caller.channel()
        )
        found = registry.check(context.token, context.wall())
        if found is Code.UNAVAILABLE:  # this process was stopped meanwhile, or has lost its store
            raise Unavailable("no token can be checked for a moment; try again", {"retry_after_ms": 50})
        if registry.key_of(session) != key or not isinstance(found, Session):
            raise Unauthenticated("the session has ended, or was refreshed meanwhile; open another")
        context.caller.prove(key)
        context.caller.join(session, context.token)
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
        user = "" if session is None else session.user
        with state.refreshing(context.caller, id_of(refresh_token[:FAMILY_SIZE])):
            opened = await state.sessions.refresh(
                refresh_token, client=client, address=context.peer, user=user
            )
            log_event("session.refreshed", context.caller, opened.session, client=client)
            return answer_tokens(context.caller, opened)

    def check_key(context: Context, session: SessionRecord) -> None:
        """Refuse to refresh a bound session whose key could be proved here but was not. Spends nothing.

        Not called for a spent refresh token: it repeats its answer, or ends the session. An expired token cannot be
        attached, so its device need not prove the key.
        """
        if context.caller.has_proved(session.key):
            return
        if not session.key.startswith(DEVICE_KEY):
            raise Unauthenticated(
                "bound to another client certificate; open a session", {"certificate": True}
            )
        wall, idle_ms = context.wall(), registry.settings.idle_timeout_ms
        if wall < session.expires_at and (idle_ms is None or wall < session.last_used_at + idle_ms):
            raise Unauthenticated(
                "bound refresh token; prove its key here by session.attach first", {"attach": True}
            )

    def answer_tokens(caller: CallConnection, opened: OpenedSession) -> dict[str, Any]:
        session = opened.session
        if not session.bound or caller.has_proved(registry.key_of(session)):  # else session.attach joins it
            caller.join(session, opened.token)
        return {
            "token": opened.token,
            "id": session.id,
            "user": session.user,
            "expires_at": session.expires_at,
            "idle_timeout_ms": registry.settings.idle_timeout_ms or 0,
            "refresh_token": opened.refresh_token,
            "refresh_expires_at": opened.refresh_expires_at,
            "bound": session.bound,
        }

    def session_handle(context: Context, methods: list[str], max: int) -> dict[str, Any]:
        """Let the server call these methods of this client for this session, at most `max` at once."""
        if len(methods) > HANDLED_METHODS:
            raise InvalidArgument(f"methods: at most {HANDLED_METHODS} names")
        for name in methods:
            if not (0 < len(name) <= METHOD_MAX_LENGTH and METHOD_ALPHABET.issuperset(name)):
                raise InvalidArgument(
                    f"methods: names have 1 to {METHOD_MAX_LENGTH} characters of a-z 0-9 _ ."
                )
        if max < 1:
            raise InvalidArgument("max must be at least 1")
        context.caller.register(_session_of(context), frozenset(methods), max)
        return {}

    def session_info(context: Context) -> dict[str, Any]:
        """What the server knows of this session."""
        return describe_info(registry.info(_session_of(context).id, context.wall()), {})

    async def session_list(context: Context) -> list[dict[str, Any]]:
        """The sessions of this user, with `current` for the one that asks."""
        session = _session_of(context)
        sessions = await state.sessions.list(session.user)
        elsewhere = await state.connections_elsewhere([info.id for info in sessions])
        return [{**describe_info(info, elsewhere), "current": info.id == session.id} for info in sessions]

    def describe_info(info: SessionInfo, elsewhere: ConnectionUses) -> dict[str, Any]:
        uses = map(tuple, elsewhere.get(info.id, ()))
        newest = nlargest(LISTED_CONNECTIONS, (*state.session_connections.uses(info.id), *uses))
        connections = [{"address": address, "since": since} for since, address in newest]
        return {**{name: getattr(info, name) for name in _SHOWN}, "connections": connections}

    async def session_revoke(context: Context, id: str | None = None, all: bool = False) -> dict[str, Any]:
        """End one session of this user by its `id`, or `all` of them, this one too."""
        session = _session_of(context)
        if (id is None) is not all:
            raise InvalidArgument("give either id, or all = true")
        with cut_afterwards(context) as quiet:
            if id is None:
                revoked = await state.revoke_all(session.user, EndReason.BY_USER, quiet)
            else:
                revoked = await state.sessions.revoke(
                    id, user=session.user, reason=EndReason.BY_USER, suppress_event=quiet
                )
        if not revoked and id is not None:
            raise NotFound("no session with this id")
        which = "all" if id is None else id
        log_event("session.revoked", context.caller, session, which=which, sessions=int(revoked))
        state.on_revoked(f"user {session.user}", int(revoked), True)
        return {"revoked": int(revoked)}

    async def session_close(context: Context) -> dict[str, Any]:
        """End this session."""
        session = _session_of(context)
        with cut_afterwards(context) as quiet:
            await state.sessions.revoke(
                session.id, user=session.user, reason=EndReason.CLOSED, suppress_event=quiet
            )
        log_event("session.closed", context.caller, session)
        return {}

    return [
        protocol_method("session.open", session_open, public=True, may_wait=True),
        protocol_method("session.attach", session_attach),
        protocol_method("session.refresh", session_refresh, public=True),
        protocol_method("session.handle", session_handle),
        protocol_method("session.info", session_info),
        protocol_method("session.list", session_list),
        protocol_method("session.revoke", session_revoke),
        protocol_method("session.close", session_close),
    ]


@contextmanager
def suppress_revoked_event(context: Context) -> Iterator[None]:
    """Suppress `session.revoked` on the caller's connection while the body handles its own revoke request."""
    context.caller.suppress_revoked_event = True
    try:
        yield
    finally:
        context.caller.suppress_revoked_event = False


@contextmanager
def cut_afterwards(context: Context) -> Iterator[AbstractContextManager[None]]:
    """Answer a request before the streams of the sessions that it ends are cut. Yield `suppress_revoked_event`."""
    try:
        yield suppress_revoked_event(context)
    finally:
        context.caller.cut_streams_soon()


def _session_of(context: Context) -> Session:
    assert context.session is not None, "only public methods run without a session"
    return context.session


def _check_client(client: str) -> None:
    if len(client) > CLIENT_MAX_LENGTH or not client.isprintable():
        raise InvalidArgument(f"client must be at most {CLIENT_MAX_LENGTH} printable characters")


# --- devices ---------------------------------------------------------------------------------------------


def enroll_method(enrollment: Enrollment) -> Method:
    """Return `device.enroll`."""

    async def device_enroll(context: Context, code: str, public_key: bytes, name: str) -> dict[str, Any]:
        """Trade a code of `zcproto pair` for a device, by whose key its user opens sessions from then on."""
        try:
            user = await enrollment.enroll(
                code, public_key, name, address=context.peer, wall=context.wall(), now=context.now()
            )
        except Unauthenticated:
            log.info("device.not_enrolled", device=name, peer=context.peer, connection=context.connection)
            raise
        log.info(
            "device.enrolled",
            device=name,
            user=user,
            peer=context.peer,
            connection=context.connection,
        )
        return {"user": user, "device": name}

    return protocol_method("device.enroll", device_enroll, public=True)


# --- the server and sessions of others -------------------------------------------------------------------


async def revoke_sessions(
    state: ServerState,
    by: str,
    ids: list[str] | None,
    user: str | None,
    all: bool,
    suppress_event: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> int:
    """End the sessions with `ids`, those of a `user`, or `all`; return their number.

    `by` is the operator, for alerts. `suppress_event` is entered while sessions end.
    """
    if (ids is not None) + (user is not None) + all != 1:
        raise InvalidArgument("give ids, or user, or all = true")
    if ids is not None and len(ids) > REVOKED_AT_ONCE:
        raise InvalidArgument(f"at most {REVOKED_AT_ONCE} ids")
    reason = EndReason.BY_OPERATOR
    if ids is None:
        revoked = await state.revoke_all(user, reason, suppress_event())
    else:
        revoked = 0
        for session_id in dict.fromkeys(ids):
            revoked += await state.sessions.revoke(
                session_id, user=None, reason=reason, suppress_event=suppress_event()
            )
    state.on_revoked(by, revoked, False)
    return revoked


def server_methods(state: ServerState) -> list[Method]:
    """Return `server.info`, and `server.sessions` and `server.revoke` for operators."""

    def server_info(context: Context) -> dict[str, Any]:
        """The server's time, protocol versions, pins now and next, and the methods that this caller may call."""
        session = context.session
        methods: list[dict[str, Any]] = []
        room: float = state.settings.max_body // _SCHEMA_SHARE
        for _, method in sorted(state.methods.items()):
            if method.may_be_called_by(session):
                methods.append(method.listing)
                if method.schema_size <= room:
                    methods[-1]["schema"] = method.schema
                    room -= method.schema_size
        return {
            "time": context.wall(),
            "versions": [VERSION],
            "methods": methods,
            "pins": list(state.pins),
            "pins_next": state.pins_next,
        }

    async def server_sessions(user: str | None = None) -> list[dict[str, Any]]:
        """The sessions of a user, or of everybody: the 1,000 oldest."""
        return [describe(record) for record in await state.sessions.records(user, LISTED)]

    async def server_revoke(
        context: Context, ids: list[str] | None = None, user: str | None = None, all: bool = False
    ) -> dict[str, Any]:
        """End sessions of anybody: those with `ids`, or those of a `user`, or `all` there are."""
        with cut_afterwards(context):
            revoked = await revoke_sessions(
                state, f"operator {context.user}", ids, user, all, partial(suppress_revoked_event, context)
            )
        log.warning(
            "operator.revoked",
            operator=context.user,
            user=user,
            ids=ids,
            all=all,
            sessions=revoked,
            peer=context.peer,
        )
        return {"revoked": revoked}

    return [
        protocol_method("server.info", server_info, public=True),
        protocol_method("server.sessions", server_sessions, roles=OPERATORS),
        protocol_method("server.revoke", server_revoke, roles=OPERATORS),
    ]


def describe(record: SessionRecord) -> dict[str, Any]:
    """Return a session as operators see it."""
    return {
        "id": id_text(record.id),
        "user": record.user,
        "created_at": record.created_at,
        "last_used_at": record.last_used_at,
        "expires_at": record.expires_at,
        "refresh_expires_at": record.refresh_expires_at or None,
        "client": record.client,
        "address": record.address,
        "bound": record.flags & BOUND != 0,
        "roles": sorted(roles_of(record.flags & OPERATOR != 0, record.roles)),
    }
