"""Offers pending calls to the clients of other processes, and decides their answers.

    a call is asked, or ends -> CHANGED to all: its number, users with new calls, the calls that ended
    users with clients here  -> WANT to the owner, with the known calls -> GIVEN: the others, and those that ended
    a client answers here    -> ANSWERED to the owner: the call ends, or REFUSED

The state of a call is in its owner, the process that asked. Each process has copies of the calls to users who have
clients there, and the answers that were not decided. Messages may be lost, come twice or in another order.

Decides: when a copy is out of date; which answers count.

Rules:
- The CHANGED of an owner are numbered, and the last number is repeated with each `check` while there are calls, and
  for LOST_S after. A process that has missed a number wants the calls to all of its users. It asks until it has
  them. A GIVEN from before the last known CHANGED does not count.
- An answer is sent until the owner has decided it. The owner reads the session from the store first: it must live,
  and the token that the answering connection has shown must be its newest. The first answer that passes ends the
  call. While the store is away, no answer of another process is decided.
- The copies of an owner that has ended are withdrawn, and of one whose number has not come for LOST_S, while this
  process was connected.
- Answers that wait are limited. A client whose answer has no room is asked again.

It must not know: connections, how messages get to other processes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from math import inf
from typing import Any, Final, Protocol

import msgpack

from zcproto.errors import CallError, NotFound, ResourceExhausted, Unavailable
from zcproto.server.pending import ClientKey, PendingCall
from zcproto.server.state import ServerState
from zcproto.sessions import Session
from zcproto.sessions.session import BOUND
from zcproto.sessions.token import id_text
from zcproto.wire.message import decode_body, decode_error, encode_body, encode_error

TOGETHER_S: Final = 0.005
"""How long changes wait for others, to be one message."""

LOST_S: Final = 10.0

WANTED_AT_ONCE: Final = 256
"""Users in one WANT."""

GIVEN_BYTES: Final = 1 << 20
"""Parameters in one GIVEN, unless one call has more."""

LISTED_BYTES: Final = 1 << 20
"""Bytes of the calls that one process lists."""

MAX_ANSWER: Final = 4 << 20
KEPT_BYTES: Final = 8 << 20
ANSWER_BYTES: Final = 256
"""What an answer that waits takes beside its body."""

CHANGED, WANT, GIVEN, ANSWERED, REFUSED, LIST, DECIDE = range(7, 14)
"""Kinds of messages, beside those of remote_clients.py."""

RESULT, ERROR = range(2)


class Messages(Protocol):
    """Messages to the other processes, which may be lost; implemented by `RemoteClients`."""

    state: ServerState
    handlers: dict[int, Callable[..., None]]

    def begin(self) -> None: ...
    def send(self, process: str, *message: Any) -> None: ...
    def publish(self, *message: Any) -> None: ...
    async def search(self, kind: int, *values: Any) -> tuple[Iterable[tuple[str, Any]], bool]: ...
    def reply(self, process: str, number: int, found: Any) -> None: ...
    def watch(self) -> None: ...
    def spawn(self, work: Coroutine[Any, Any, None]) -> object: ...


@dataclass(slots=True)
class _Owner:
    """A process with pending calls. `number` is that of its last CHANGED, `heard` when it came.

    `wanted` are the users to whose calls copies are missing. `asked` is the number of the WANT that waits for its
    GIVEN, or 0. `answers` wait, by call and client.
    """

    heard: float
    number: int = 0
    wanted: dict[str, None] = field(default_factory=dict)
    asked: int = 0
    copies: dict[str, PendingCall] = field(default_factory=dict)
    answers: dict[str, dict[ClientKey, tuple[bytes, int, bytes]]] = field(default_factory=dict)


class RemotePending:
    """The pending calls of all processes, as this one has its part in them."""

    def __init__(self, remote: Messages) -> None:
        self._remote = remote
        self._state = remote.state
        self._calls = remote.state.pending
        self._owners: dict[str, _Owner] = {}
        self._kept = 0
        self._number = 0
        self._wants = 0
        self._users: dict[str, None] = {}  # with calls that were not announced
        self._ended: list[str] = []
        self._announced = -inf  # when the last change was
        self._is_planned = False
        self._deciding: set[tuple[str, ClientKey]] = set()
        self._calls.elsewhere = self
        remote.handlers |= {
            CHANGED: self._changed,
            WANT: self._wanted,
            GIVEN: self._given,
            ANSWERED: self._answer_came,
            REFUSED: self._refused,
            LIST: self._listed,
            DECIDE: self._operator_decides,
        }

    def _now(self) -> float:
        return self._state.clock.now()

    def _plan(self) -> None:
        """Send what has changed a moment later, together with what changes until then."""
        if not self._is_planned:
            self._is_planned = True
            asyncio.get_running_loop().call_later(TOGETHER_S, self._send_changes)

    def _send_changes(self) -> None:
        self._is_planned = False
        if self._users or self._ended:
            self._number += 1
            self._announced = self._now()
            self._announce([*self._users], self._ended)
            self._users, self._ended = {}, []
        for process, owner in self._owners.items():
            self._want(process, owner)

    # --- calls of this process -------------------------------------------------------------------------

    def changed(self, call: PendingCall) -> None:
        """Offer a call in the other processes, or withdraw it there if it has ended."""
        self._remote.begin()
        if self._calls.own(call.id) is None:
            self._ended.append(call.id)
        else:
            self._users[call.user] = None
        self._plan()
        self._remote.watch()

    def _announce(self, users: list[str], ended: list[str]) -> None:
        with suppress(ResourceExhausted):  # the next one has a number that shows what was missed
            self._remote.publish(CHANGED, self._number, users, ended)

    def _wanted(self, sender: str, want: int, users: dict[str, list[str]]) -> None:
        """Give calls to some users, those that are not known to the other process."""
        given: list[Any] = []
        ended: list[str] = []
        complete: list[str] = []
        room, now = GIVEN_BYTES, self._now()
        for user, ids in users.items():
            known, calls = {*ids}, self._calls.of(user)
            ended += known.difference(call.id for call in calls)
            for call in calls:
                if call.id in known:
                    continue
                if given and len(call.request) > room:
                    break
                room -= len(call.request)
                left = call.deadline - now
                given.append((call.id, user, call.method, call.request, left, call.traceparent, call.bound))
            else:
                complete.append(user)
        self._give(sender, ended, want, complete, given)

    def _give(
        self, process: str, ended: list[str], want: int = 0, complete: Iterable[str] = (), given: Any = ()
    ) -> None:
        with suppress(ResourceExhausted):  # it asks again
            self._remote.send(process, GIVEN, ended, want, self._number, complete, given)

    def _answer_came(
        self, sender: str, call_id: str, session_id: str, peer: str, digest: bytes, kind: int, body: bytes
    ) -> None:
        key = call_id, (session_id, peer)
        if self._calls.own(call_id) is None:
            self._give(sender, [call_id])
        elif key not in self._deciding:  # else it was repeated
            self._deciding.add(key)
            self._remote.spawn(self._decide(sender, *key, digest, kind, body))

    async def _decide(
        self, sender: str, call_id: str, client: ClientKey, digest: bytes, kind: int, body: bytes
    ) -> None:
        """Check the session of an answer, and end the call."""
        session_id, peer = client
        try:
            record = await self._state.sessions.holder(digest)
        except CallError:  # the store is away; the answer comes again
            return
        finally:
            self._deciding.discard((call_id, client))
        call = self._calls.own(call_id)
        if call is None:
            self._give(sender, [call_id])
        elif (
            record is not None
            and (record.user, id_text(record.id)) == (call.user, session_id)
            and (record.flags & BOUND or not call.bound)
        ):
            self._calls.answer_from(call, session_id, peer, *decode_answer(kind, body))
        else:
            with suppress(ResourceExhausted):  # the answer comes again
                self._remote.send(sender, REFUSED, call_id, session_id, peer)

    # --- copies ----------------------------------------------------------------------------------------

    def registered(self, user: str) -> None:
        """Want the calls to a user who has a client here."""
        for owner in self._owners.values():
            owner.wanted[user] = None
            self._plan()

    def _changed(self, sender: str, number: int, users: list[str], ended: list[str]) -> None:
        owner = self._owners.get(sender)
        if owner is None:
            owner = self._owners[sender] = _Owner(self._now())
            self._remote.watch()
        owner.heard = self._now()
        self._drop(owner, ended)
        if number > owner.number + bool(users or ended):
            users = self._state.clients.users
        owner.number = max(number, owner.number)
        owner.wanted |= dict.fromkeys(user for user in users if self._state.clients.has(user))
        self._want(sender, owner)

    def _want(self, process: str, owner: _Owner) -> None:
        with_room = (user for user in owner.wanted if self._calls.has_room(user))
        users = [] if owner.asked else [*islice(with_room, WANTED_AT_ONCE)]
        if users:
            known = {user: [call.id for call in self._calls.of(user, process)] for user in users}
            with suppress(ResourceExhausted):  # the next check asks
                self._wants += 1
                self._remote.send(process, WANT, self._wants, known)
                owner.asked = self._wants

    def _given(
        self,
        sender: str,
        ended: list[str],
        want: int,
        number: int,
        complete: list[str],
        given: list[list[Any]],
    ) -> None:
        owner = self._owners.get(sender)
        if owner is None:
            return
        self._drop(owner, ended)
        if not want or want != owner.asked:  # of an earlier WANT, which had other copies
            return
        owner.asked = 0
        if number >= owner.number:
            without_room = {call[1] for call in given if not self._copy(sender, owner, *call)}
            for user in without_room.union(complete):
                owner.wanted.pop(user, None)
            if without_room:
                owner.wanted |= dict.fromkeys(
                    without_room
                )  # behind the others, and not before the next check
                return
        self._want(sender, owner)

    def _copy(
        self,
        process: str,
        owner: _Owner,
        call_id: str,
        user: str,
        method: str,
        request: bytes,
        timeout: float,
        traceparent: str | None,
        bound: bool,
    ) -> bool:
        if call_id in owner.copies or timeout <= 0:
            return True
        call = PendingCall(user, method, bound=bound, owner=process)
        call.id, call.request, call.traceparent = call_id, request, traceparent
        if not self._calls.copy(call, timeout):
            return False
        owner.copies[call_id] = call
        return True

    def _drop(self, owner: _Owner, call_ids: Iterable[str]) -> None:
        for call_id in call_ids:
            call = owner.copies.pop(call_id, None)
            if call is not None:
                self._calls.drop(call)
            for _, _, body in owner.answers.pop(call_id, {}).values():
                self._kept -= ANSWER_BYTES + len(body)

    def answered(
        self, call: PendingCall, client: ClientKey, session: Session, value: Any, error: CallError | None
    ) -> bool:
        """Send an answer to the owner of a copy until it is decided. False: there is no room for it now."""
        owner = self._owners[call.owner]
        kind, body = encode_answer(value, error)
        if self._kept + ANSWER_BYTES + len(body) > KEPT_BYTES:
            return False
        self._kept += ANSWER_BYTES + len(body)
        owner.answers.setdefault(call.id, {})[client] = answer = session.token_digest, kind, body
        self._send_answer(call.owner, call.id, client, answer)
        return True

    def _send_answer(
        self, process: str, call_id: str, client: ClientKey, answer: tuple[bytes, int, bytes]
    ) -> None:
        with suppress(ResourceExhausted):  # the next check sends it
            self._remote.send(process, ANSWERED, call_id, *client, *answer)

    def _refused(self, sender: str, call_id: str, session_id: str, peer: str) -> None:
        owner = self._owners.get(sender)
        answers = {} if owner is None else owner.answers.get(call_id, {})
        answer = answers.pop((session_id, peer), None)
        if owner is not None and answer is not None:
            self._kept -= ANSWER_BYTES + len(answer[2])
            self._calls.ask_again(owner.copies[call_id], (session_id, peer))

    # --- signs of life ---------------------------------------------------------------------------------

    @property
    def is_active(self) -> bool:
        """Whether `check` has something to do."""
        return bool(self._owners or len(self._calls)) or self._now() - self._announced <= LOST_S

    def cut_off(self) -> None:
        """Begin to wait for signs of life again."""
        for owner in self._owners.values():
            owner.heard, owner.asked = self._now(), 0

    def check(self, now: float) -> None:
        """Repeat what may have been lost; drop the copies of lost processes, and those without clients here."""
        if len(self._calls) or now - self._announced <= LOST_S:
            self._announce([], [])
        clients = self._state.clients
        for process, owner in [*self._owners.items()]:
            if now - owner.heard > LOST_S:
                self.lose(process)
                continue
            for call_id, answers in owner.answers.items():
                for client, answer in answers.items():
                    self._send_answer(process, call_id, client, answer)
            unused = [
                call.id
                for call in owner.copies.values()
                if call.deadline <= now or not (owner.answers.get(call.id) or clients.has(call.user))
            ]
            self._drop(owner, unused)
            owner.wanted = {user: None for user in owner.wanted if clients.has(user)}
            owner.asked = 0
            self._want(process, owner)

    @property
    def owners(self) -> list[str]:
        """The processes whose calls are copied here."""
        return [process for process, owner in self._owners.items() if owner.copies]

    def lose(self, process: str) -> None:
        """Withdraw the copies of a process that has ended."""
        owner = self._owners.pop(process, None)
        if owner is not None:
            self._drop(owner, [*owner.copies])

    def stop(self) -> None:
        """End the calls of this process, and drop the copies."""
        self._calls.close()
        self._send_changes()
        self._calls.elsewhere = None
        self._owners.clear()

    # --- operators -------------------------------------------------------------------------------------

    async def list(self, user: str | None) -> tuple[list[dict[str, Any]], bool]:
        """Return the calls of the other processes, and whether all of them have answered with all of theirs."""
        found, is_complete = await self._remote.search(LIST, user)
        rows = [row for _, (rows, _) in found for row in rows]
        return rows, is_complete and not any(is_cut for _, (_, is_cut) in found)

    def _listed(self, sender: str, number: int, user: str | None) -> None:
        rows, size = [], 0
        calls = self._calls.of(user)
        for call in calls:
            row = call.as_dict()
            size += len(msgpack.packb(row, unicode_errors="surrogatepass"))
            if size > LISTED_BYTES:
                break
            rows.append(row)
        self._remote.reply(sender, number, (rows, len(rows) < len(calls)))

    async def decide(
        self, call_id: str, value: Any, error: CallError | None, operator: str
    ) -> dict[str, Any]:
        """Answer a call of another process for an operator. Raises NotFound, Unavailable."""
        found, is_complete = await self._remote.search(
            DECIDE, call_id, *encode_answer(value, error), operator
        )
        for _, row in found:
            if row is not None:
                return dict(row)
        if is_complete:
            raise NotFound("no pending call has this id; it was answered, or has ended")
        raise Unavailable("not all processes have answered; list the calls, and repeat it")

    def _operator_decides(
        self, sender: str, number: int, call_id: str, kind: int, body: bytes, operator: str
    ) -> None:
        row = None
        with suppress(NotFound):
            row = self._calls.answer(call_id, *decode_answer(kind, body), operator).as_dict()
        self._remote.reply(sender, number, row)


def encode_answer(value: Any, error: CallError | None) -> tuple[int, bytes]:
    """Return an answer for another process."""
    if error is None:
        body = encode_body(value)
        if len(body) <= MAX_ANSWER:
            return RESULT, body
        error = ResourceExhausted(
            f"the answer has {len(body)} bytes; at most {MAX_ANSWER} fit between processes"
        )
    return ERROR, encode_error(error.code, error.message, error.details)


def decode_answer(kind: int, body: bytes) -> tuple[Any, CallError | None]:
    """Reverse `encode_answer`."""
    if kind == RESULT:
        return decode_body(body), None
    return None, CallError.from_wire(*decode_error(body))
