"""The connections that use a session in all processes of one server, for `session.list`.

    worker: OF -> coordinator: HERE -> every other worker

Rules:
- A process that does not answer in time, or whose version cannot, is left out: the list shows what is known.
- What one asks is bounded, and so is how much the coordinator asks for at once: a list is never worth a queue.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Final

from zcproto.errors import ResourceExhausted, ZcprotoError
from zcproto.server.state import ConnectionsElsewhere, ConnectionUses, ServerState
from zcproto.workers.link import Link, LinkClient, LinkServer, Topics

OF: Final = "connections.of"
"""Call to the coordinator: the connections of sessions in the other workers, by session."""

HERE: Final = "connections.here"
"""Call to a worker: those of its own."""

ANSWER_S: Final = 0.25
ASK_S: Final = 0.5

SESSIONS: Final = 64
"""Sessions of one list that other processes are asked about: the newest."""

ASKED_AT_ONCE: Final = 16

Join = Callable[[ServerState], ConnectionsElsewhere]


def serve(server: LinkServer, topics: Topics) -> None:
    """Let workers find out about each other's connections."""
    running = 0

    async def ask(link: Link, session_ids: list[str]) -> ConnectionUses:
        try:
            uses: ConnectionUses = await link.call(HERE, session_ids, within=ANSWER_S)
        except ZcprotoError:
            return {}
        return uses

    async def of(link: Link, session_ids: list[str]) -> ConnectionUses:
        nonlocal running
        if running >= ASKED_AT_ONCE:
            raise ResourceExhausted("too many lists of sessions at once")
        running += 1
        try:
            # A worker has another link, for its store, without a number.
            others = [each for each in server.links if each is not link and "number" in each.facts]
            found = await asyncio.gather(*(ask(each, session_ids) for each in others))
        finally:
            running -= 1
        return {
            session_id: [*chain.from_iterable(uses.get(session_id, ()) for uses in found)]
            for session_id in session_ids
        }

    topics.calls[OF] = of


def join(client: LinkClient, topics: Topics) -> Join:
    """Answer for a worker, and return what asks for the others once its state is built."""

    def join(state: ServerState) -> ConnectionsElsewhere:
        async def here(link: Link, session_ids: list[str]) -> ConnectionUses:
            return {session_id: state.session_connections.uses(session_id) for session_id in session_ids}

        async def elsewhere(session_ids: Sequence[str]) -> ConnectionUses:
            try:
                uses: ConnectionUses = await client.call(OF, [*session_ids[-SESSIONS:]], within=ASK_S)
            except ZcprotoError:  # without a coordinator the list has what is here
                return {}
            return uses

        topics.calls[HERE] = here
        return elsewhere

    return join
