"""Hold the calls that wait for an answer, not for a connection, and offer them to the clients of their user.

    a method asks      -> `add`: an offer to each client of the user that handles the call
    a client registers -> an offer of each call that it handles; it leaves -> its offers end
    an answer          -> the call ends, and the other offers are withdrawn, in one step

    state     input                             next      action
    none      registered                        OFFERED   CALL
    OFFERED   RESULT, or FAILURE of a handler   none      the call ends
    OFFERED   UNIMPLEMENTED                     DECLINED
    OFFERED   another code, or an old token     DELAYED
    OFFERED   an answer to another process      ANSWERED
    ANSWERED  it does not count there           DELAYED
    DELAYED   its time                          OFFERED   CALL
    DECLINED  registered again                  OFFERED   CALL
    any       the client has gone               none      WITHDRAW, if OFFERED
    any       the call ends                     none      WITHDRAW, if OFFERED

A CALL that cannot be sent is DELAYED, too. A client that has ANSWERED may go. The calls of other processes to users
who have clients here are kept as copies (remote_pending.py): offered like the own ones, but decided there.

Decides: which clients get a call, which answers count, and when it is offered again.

Rules:
- A call gets one answer. A session that has ended, or has not shown its newest token, gives none.
- A client with several connections gets one offer.
- A call ends with its deadline, with the method that asked, and with the session of that method's caller if that is
  revoked: nothing that a thief has asked for stays when the thief has gone.
- The calls of each user and of all users are limited, in number and in size, copies included.

It must not know: sockets, what the answer means.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from enum import Enum
from functools import partial
from math import isfinite
from typing import Any, Final, Protocol

from zcproto.common.clock import Clock
from zcproto.common.deadlines import DeadlineWheel
from zcproto.connection.server_calls import CallToClient, encode_offer
from zcproto.errors import (
    CallError,
    Cancelled,
    Code,
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
)
from zcproto.observe.log import get_logger
from zcproto.observe.values import loggable
from zcproto.server.clients import Key, RegisteredClients, Registering
from zcproto.sessions import Session
from zcproto.sessions.token import FAMILY_SIZE, id_of
from zcproto.wire.message import MessageError, decode_body, encode_request

log = get_logger("zcproto.server")

BYTES_PER_USER: Final = 4_194_304
BYTES_IN_ALL: Final = 67_108_864
"""Bytes of parameters of the calls that wait."""

FIRST_DELAY_S: Final = 1.0
MAX_DELAY_S: Final = 30.0

NO_ANSWERS: Final = frozenset(
    {
        *(Code.UNAUTHENTICATED, Code.STALE_TIMESTAMP, Code.CANCELLED),
        *(Code.UNAVAILABLE, Code.UNIMPLEMENTED, Code.RESOURCE_EXHAUSTED),
    }
)
"""Codes of a FAILURE that leave a call open."""

PENDING_RESULTS: Final = ("answered", "failed", "expired", "withdrawn", "refused")
"""How pending calls end. failed: with an error of the client or the operator; refused: at a limit."""


class OfferState(Enum):
    OFFERED = "offered"
    DELAYED = "delayed"
    DECLINED = "declined"
    ANSWERED = "answered"


class Offer:
    """What has become of a call at one client. `due` is when a delayed one is sent again."""

    __slots__ = ("connection", "due", "state", "tries", "withdraw")

    def __init__(self, connection: Registering) -> None:
        self.connection = connection
        self.state = OfferState.DELAYED
        self.due = 0.0
        self.tries = 0
        self.withdraw: Callable[[], None] = _nothing


ClientKey = tuple[str, str]
"""The id of a session and the address of its peer: one client, however many connections it has."""


class PendingCall:
    """One call that waits. `deadline` is monotonic seconds, `asked_at` and `expires_at` are wall time.

    `session` and `peer` are those of the caller of the method that asked; empty if the application asked. `owner`
    is the process that decides the call; empty for this one.
    """

    __slots__ = (
        "asked_at",
        "bound",
        "deadline",
        "deadline_tick",
        "done",
        "expires_at",
        "handle_deadline",
        "id",
        "method",
        "offers",
        "owner",
        "peer",
        "request",
        "session",
        "traceparent",
        "user",
    )

    def __init__(
        self, user: str, method: str, *, bound: bool, session: str = "", peer: str = "", owner: str = ""
    ) -> None:
        self.owner = owner
        self.user = user
        self.method = method
        self.bound = bound
        self.session = session
        self.peer = peer
        self.id = ""
        self.request = b""
        self.traceparent: str | None = None
        self.asked_at = self.expires_at = 0
        self.deadline = 0.0
        self.offers: dict[ClientKey, Offer] = {}
        self.done: Callable[[Any, CallError | None], None] = _ignore
        self.deadline_tick = 0
        self.handle_deadline: Callable[[float], None] = _ignore_time

    def as_dict(self) -> dict[str, Any]:
        """Return what operators see of it. `offered` counts the clients of this process."""
        offered = sum(offer.state is OfferState.OFFERED for offer in self.offers.values())
        return {
            "id": self.id,
            "user": self.user,
            "method": self.method,
            "params": {name: loggable(name, value) for name, value in self.params().items()},
            "asked_at": self.asked_at,
            "expires_at": self.expires_at,
            "session": self.session,
            "peer": self.peer,
            "offered": offered,
        }

    def params(self) -> dict[str, Any]:
        return dict(decode_body(self.request)[1] or {})


class CallsElsewhere(Protocol):
    """The other processes, as the pending calls of this one use them."""

    def changed(self, call: PendingCall) -> None:
        """Offer a call of this process elsewhere, or withdraw it there if it has ended."""

    def answered(
        self, call: PendingCall, client: ClientKey, session: Session, value: Any, error: CallError | None
    ) -> bool:
        """Pass an answer to the owner of a copy. False: not now."""

    def registered(self, user: str) -> None:
        """Get copies of the calls to a user who has a client here."""


class PendingCalls:
    """The calls of one process that wait for an answer, and its copies of those of others."""

    def __init__(
        self,
        clients: RegisteredClients,
        wheel: DeadlineWheel,
        clock: Clock,
        entropy: Callable[[int], bytes],
        call_soon: Callable[[Callable[[], None]], object],
    ) -> None:
        self._clients = clients
        self._wheel = wheel
        self._clock = clock
        self._entropy = entropy
        self._call_soon = call_soon
        self.elsewhere: CallsElsewhere | None = None
        self._calls: dict[str, PendingCall] = {}
        self._copies = 0
        self._by_user: dict[str, dict[PendingCall, None]] = {}
        self._by_session: dict[str, dict[PendingCall, None]] = {}  # of the caller
        self._sizes: Counter[str] = Counter()  # by user
        self._size = 0
        self.ended: Counter[str] = Counter()
        """Calls that ended, by result."""
        clients.on_ready, clients.on_gone = self._client_ready, self._client_gone

    def __len__(self) -> int:
        """Return the number of own calls."""
        return len(self._calls) - self._copies

    @property
    def held(self) -> int:
        """The number of calls, copies included."""
        return len(self._calls)

    @property
    def most(self) -> int:
        """The calls to the user who has most of them."""
        return max(map(len, self._by_user.values()), default=0)

    def of(self, user: str | None, owner: str = "") -> list[PendingCall]:
        """Return the calls of a process, of this one by default, to a user or to all users, the oldest first."""
        calls = self._calls.values() if user is None else self._by_user.get(user, ())
        return [call for call in calls if call.owner == owner]

    def _to(self, user: str) -> list[PendingCall]:
        """Return the calls to a user, copies included."""
        return [*self._by_user.get(user, ())]

    # --- asking ----------------------------------------------------------------------------------------

    async def ask(
        self,
        user: str,
        made: CallToClient,
        max_body: int,
        *,
        caller: Session | None = None,
        peer: str = "",
        bound: bool = False,
    ) -> Any:
        """Wait until a client of the user has answered, and return its result.

        `caller` is the session for which a method asks. If it is one of the user, the session that answers is at
        least as bound. `max_body` is the largest body of a CALL.
        """
        call = PendingCall(
            user,
            made.method,
            bound=bound or (caller is not None and caller.bound and caller.user == user),
            session="" if caller is None else caller.id,
            peer=peer,
        )
        call.traceparent = made.traceparent
        answer: asyncio.Future[tuple[Any, CallError | None]] = asyncio.get_running_loop().create_future()
        call.done = partial(_settle, answer)
        self.add(call, made.params, made.timeout_s, max_body)
        try:
            value, error = await answer
        except asyncio.CancelledError:
            self._withdraw(call, "the method was cancelled")
            raise
        if error is not None:
            raise error
        return value

    def add(self, call: PendingCall, params: Mapping[str, Any], timeout: float, max_body: int) -> None:
        """Offer a call to the clients of its user. `done` is called once, when it ends.

        Raises InvalidArgument for params that cannot be sent, DeadlineExceeded, ResourceExhausted at a limit.
        """
        if not isfinite(timeout):
            raise ValueError("timeout must be finite: a pending call ends with its deadline")
        if timeout <= 0:
            raise DeadlineExceeded("the timeout of the call is over")
        call.id = id_of(self._entropy(FAMILY_SIZE)).hex()
        try:
            call.request = encode_request(call.method, params)
        except MessageError as error:
            raise InvalidArgument(str(error)) from error
        size = len(encode_offer(call.request, call.id, timeout, call.traceparent))
        if size > max_body:
            raise InvalidArgument(f"the call has {size} bytes; at most {max_body} fit")
        limit = self._limit_reached(call)
        if limit is not None:
            self.ended["refused"] += 1
            raise ResourceExhausted("too many calls wait for an answer; wait for some", {"limit": limit})
        wall = self._clock.wall()
        call.asked_at, call.expires_at = wall, wall + int(timeout * 1000)
        if call.session:
            self._by_session.setdefault(call.session, {})[call] = None
        log.info(
            "call.asked",
            call=call.id,
            user=call.user,
            what=call.method,
            session=call.session or None,
            peer=call.peer or None,
        )
        self._keep(call, timeout)
        self._tell(call)

    def has_room(self, user: str) -> bool:
        """Return whether one more call to a user may fit."""
        limits = self._clients.limits
        calls = len(self._by_user.get(user, ()))
        return calls < limits.pending_per_user and len(self._calls) < limits.pending_total

    def _limit_reached(self, call: PendingCall) -> int | None:
        limits, size = self._clients.limits, len(call.request)
        for limit, used in (
            (limits.pending_per_user, len(self._by_user.get(call.user, ())) + 1),
            (limits.pending_total, len(self._calls) + 1),
            (BYTES_PER_USER, self._sizes[call.user] + size),
            (BYTES_IN_ALL, self._size + size),
        ):
            if used > limit:
                return limit
        return None

    def _keep(self, call: PendingCall, timeout: float) -> None:
        """Offer a call to the clients here, and to those that come."""
        now = self._clock.now()
        call.deadline = now + timeout
        call.handle_deadline = partial(self._handle_deadline, call)
        self._calls[call.id] = call
        self._by_user.setdefault(call.user, {})[call] = None
        self._sizes[call.user] += len(call.request)
        self._size += len(call.request)
        for key in self._clients.registrations(call.user):
            self._offer(call, key, now)
        self._schedule(call)

    def _tell(self, call: PendingCall) -> None:
        if self.elsewhere is not None and not call.owner:
            self.elsewhere.changed(call)

    # --- copies ----------------------------------------------------------------------------------------

    def copy(self, call: PendingCall, timeout: float) -> bool:
        """Offer a call of another process to the clients here. False: there is no room now."""
        if self._limit_reached(call) is not None:
            return False
        self._copies += 1
        self._keep(call, timeout)
        return True

    def drop(self, call: PendingCall) -> None:
        """Withdraw the offers of a copy, if it is still kept."""
        if call.id in self._calls:
            self._copies -= 1
            self._end(call, None, None)

    def ask_again(self, call: PendingCall, client: ClientKey) -> None:
        """Offer a copy again, later, to a client whose answer did not count."""
        offer = call.offers.pop(client, None)
        if offer is not None and call.id in self._calls:
            now = self._clock.now()
            for key in self._clients.registrations(call.user):
                if (key[1], key[0].peer) == client and self._clients.takes(
                    key, call.method, bound=call.bound
                ):
                    offer.connection = key[0]
                    call.offers[client] = offer
                    self._delay(offer, now)
                    self._schedule(call)
                    break

    # --- clients ---------------------------------------------------------------------------------------

    def _client_ready(self, user: str, key: Key) -> None:
        if self.elsewhere is not None:
            self.elsewhere.registered(user)
        if user in self._by_user:  # later, when the connection has the registration and has answered it
            self._call_soon(partial(self._offer_all, user, key))

    def _offer_all(self, user: str, key: Key) -> None:
        """Offer a client the calls that it handles."""
        now = self._clock.now()
        for call in self._to(user):
            self._offer(call, key, now)
            self._schedule(call)

    def _offer(self, call: PendingCall, key: Key, now: float) -> None:
        if not self._clients.takes(key, call.method, bound=call.bound):
            return
        connection, session_id = key
        client = session_id, connection.peer
        offer = call.offers.get(client)
        if offer is None:
            offer = call.offers[client] = Offer(connection)
        elif offer.state in (OfferState.DELAYED, OfferState.ANSWERED):
            offer.connection = connection
            return
        elif offer.state is OfferState.OFFERED:
            if not offer.connection.is_draining:
                return
            offer.withdraw()
        offer.connection = connection
        self._send(call, client, offer, now)

    def _send(self, call: PendingCall, client: ClientKey, offer: Offer, now: float) -> None:
        body = encode_offer(call.request, call.id, max(0.001, call.deadline - now), call.traceparent)
        try:
            offer.withdraw = offer.connection.offer(
                client[0], call.method, body, partial(self._answered, call, client)
            )
        except CallError:  # not sent, because of a limit or a connection that ends
            self._delay(offer, now)
        else:
            offer.state = OfferState.OFFERED

    def _delay(self, offer: Offer, now: float) -> None:
        offer.state, offer.withdraw = OfferState.DELAYED, _nothing
        offer.due = now + min(MAX_DELAY_S, FIRST_DELAY_S * 2**offer.tries)
        offer.tries = min(offer.tries + 1, 5)

    def _client_gone(self, user: str, key: Key) -> None:
        connection, session_id = key
        client, had_offers = (session_id, connection.peer), False
        for call in self._to(user):
            offer = call.offers.get(client)
            if (
                offer is not None
                and offer.connection is connection
                and offer.state is not OfferState.ANSWERED
            ):
                del call.offers[client]
                offer.withdraw()
                had_offers = True
        if had_offers:  # perhaps it has another connection
            self._call_soon(partial(self._move_offers, user, client))

    def _move_offers(self, user: str, client: ClientKey) -> None:
        now = self._clock.now()
        keys = [key for key in self._clients.registrations(user) if (key[1], key[0].peer) == client]
        for call in self._to(user):
            for key in keys:
                self._offer(call, key, now)
            self._schedule(call)

    # --- the end ---------------------------------------------------------------------------------------

    def _answered(
        self,
        call: PendingCall,
        client: ClientKey,
        session: Session | None,
        value: Any,
        error: CallError | None,
    ) -> None:
        """Process an answer to an offer, in the step in which it has arrived."""
        offer, now = call.offers[client], self._clock.now()
        offer.withdraw = _nothing
        if now >= call.deadline:  # the wheel is coarse
            self._handle_deadline(call, now)
        elif session is not None and error is not None and error.code is Code.UNIMPLEMENTED:
            offer.state = OfferState.DECLINED
        elif session is None or (error is not None and error.code in NO_ANSWERS):
            self._delay(offer, now)
            self._schedule(call)
        elif not call.owner:
            self._answer(call, value, error, session=session.id, peer=client[1])
        elif self.elsewhere is not None and self.elsewhere.answered(call, client, session, value, error):
            offer.state = OfferState.ANSWERED
        else:
            self._delay(offer, now)
            self._schedule(call)

    def own(self, call_id: str) -> PendingCall | None:
        """Return a call of this process that waits."""
        call = self._calls.get(call_id)
        return None if call is None or call.owner or self._clock.now() >= call.deadline else call

    def answer_from(
        self, call: PendingCall, session_id: str, peer: str, value: Any, error: CallError | None
    ) -> None:
        """End a call that waits with the answer of a session at another process."""
        self._answer(call, value, error, session=session_id, peer=peer)

    def answer(self, call_id: str, value: Any, error: CallError | None, operator: str) -> PendingCall:
        """Answer a call for an operator. Raises NotFound."""
        call = self.own(call_id)
        if call is None:
            raise NotFound("no pending call has this id; it was answered, or has ended")
        self._answer(call, value, error, operator=operator)
        return call

    def _answer(
        self,
        call: PendingCall,
        value: Any,
        error: CallError | None,
        *,
        session: str | None = None,
        peer: str | None = None,
        operator: str | None = None,
    ) -> None:
        self.ended["answered" if error is None else "failed"] += 1
        self._end(call, value, error)
        log.info(
            "call.answered",
            call=call.id,
            user=call.user,
            what=call.method,
            session=session,
            peer=peer,
            operator=operator,
            code=None if error is None else error.code.name,
        )

    def _handle_deadline(self, call: PendingCall, now: float) -> None:
        """End a call whose time is over, or send the offers that are due."""
        if now >= call.deadline:
            if call.owner:
                self.drop(call)
                return
            self.ended["expired"] += 1
            self._end(call, None, DeadlineExceeded("no client has answered in time"))
            log.info("call.expired", call=call.id, user=call.user, what=call.method)
            return
        for client, offer in [*call.offers.items()]:
            if offer.state is OfferState.DELAYED and offer.due <= now:
                self._send(call, client, offer, now)
        self._schedule(call)

    def _schedule(self, call: PendingCall) -> None:
        dues = [offer.due for offer in call.offers.values() if offer.state is OfferState.DELAYED]
        self._wheel.set(call, min([call.deadline, *dues]))

    def caller_ended(self, session_id: str) -> None:
        """End the calls for which methods wait whose caller's session was revoked."""
        for call in [*self._by_session.get(session_id, ())]:
            self._withdraw(call, "the session of the method's caller has ended")

    def close(self) -> None:
        """End all calls: the server stops."""
        for call in [*self._calls.values()]:
            if call.owner:
                self.drop(call)
            else:
                self._withdraw(call, "the server has stopped")

    def _withdraw(self, call: PendingCall, reason: str) -> None:
        if call.id in self._calls:
            self.ended["withdrawn"] += 1
            self._end(call, None, Cancelled(reason))
            log.info("call.withdrawn", call=call.id, user=call.user, what=call.method, reason=reason)

    def _end(self, call: PendingCall, value: Any, error: CallError | None) -> None:
        """End a call that waits, or a copy."""
        del self._calls[call.id]
        _discard(self._by_user, call.user, call)
        if call.session:
            _discard(self._by_session, call.session, call)
        self._size -= len(call.request)
        self._sizes[call.user] -= len(call.request)
        if not self._sizes[call.user]:
            del self._sizes[call.user]
        self._wheel.discard(call)
        for offer in call.offers.values():
            offer.withdraw()
        call.offers.clear()
        self._tell(call)
        call.done(value, error)
        call.done, call.handle_deadline = _ignore, _ignore_time


def _discard(index: dict[str, dict[PendingCall, None]], name: str, call: PendingCall) -> None:
    calls = index[name]
    del calls[call]
    if not calls:
        del index[name]


def _settle(
    answer: asyncio.Future[tuple[Any, CallError | None]], value: Any, error: CallError | None
) -> None:
    if not answer.done():  # cancelled in this turn
        answer.set_result((value, error))


def _nothing() -> None:
    """Do nothing."""


def _ignore(value: Any, error: CallError | None) -> None:
    """Drop an outcome."""


def _ignore_time(now: float) -> None:
    """Do nothing."""
