"""What operators may do about the sessions of others: `server.sessions` and `server.revoke`.

Rules:
- A session is named by its id. No token is ever shown.
- Whoever ends sessions is in the log, with how many they were.
"""

from __future__ import annotations

from typing import Any, Final

from zcproto.app.app import Method
from zcproto.app.context import Context
from zcproto.errors import InvalidArgument
from zcproto.server.state import ServerState, log
from zcproto.sessions import EndReason
from zcproto.sessions.record import SessionRecord
from zcproto.sessions.session import BOUND, OPERATOR
from zcproto.sessions.token import id_text

LISTED: Final = 1_000
"""Sessions in one answer: at most 500 KB, which every client takes."""

REVOKED_AT_ONCE: Final = 1_000


def operator_methods(state: ServerState) -> list[Method]:
    async def server_sessions(user: str | None = None) -> list[dict[str, Any]]:
        """The sessions of a user, or of everybody: the 1,000 oldest."""
        return [describe(record) for record in await state.sessions.records(user, LISTED)]

    async def server_revoke(
        context: Context, ids: list[str] | None = None, user: str | None = None, all: bool = False
    ) -> dict[str, Any]:
        """End sessions of anybody: those with `ids`, or those of a `user`, or `all` there are."""
        if (ids is not None) + (user is not None) + all != 1:
            raise InvalidArgument("give ids, or user, or all = true")
        if ids is not None and len(ids) > REVOKED_AT_ONCE:
            raise InvalidArgument(f"at most {REVOKED_AT_ONCE} ids")
        sessions = state.sessions
        if user is not None:
            revoked = await sessions.revoke_user(
                user, EndReason.BY_OPERATOR, context.suppress_revoked_event()
            )
        elif ids is not None:
            revoked = 0
            for session_id in dict.fromkeys(ids):
                revoked += await sessions.revoke(
                    session_id,
                    user=None,
                    reason=EndReason.BY_OPERATOR,
                    suppress_event=context.suppress_revoked_event(),
                )
        else:
            revoked = await sessions.revoke_all(EndReason.BY_OPERATOR)
        log.warning(
            "operator.revoked", operator=context.user, user=user, all=all, sessions=revoked, peer=context.peer
        )
        state.on_revoked(f"operator {context.user}", revoked, False)
        return {"revoked": revoked}

    return [
        Method("server.sessions", server_sessions, operator=True),
        Method("server.revoke", server_revoke, operator=True),
    ]


def describe(record: SessionRecord) -> dict[str, Any]:
    """A session, as operators see it."""
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
        "operator": record.flags & OPERATOR != 0,
    }
