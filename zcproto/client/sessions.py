"""The client's session: opened, refreshed and, once the server took it away, given up.

What it decides: when a session is opened or refreshed. One attempt serves all calls that wait. After TOKEN_REVOKED
or SESSION_REPLACED, or when opening one was refused, nothing is tried again until the application asks for it:
every call gets the same error.

While a refresh is on its way no call is sent: the server takes the old token for revoked as soon as it has
answered. A refresh token works once; when the answer is lost, the same one is good for a few seconds more, and
after that must never be used again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any, Final

from zcproto.client.backoff import Backoff, Random
from zcproto.client.links import join
from zcproto.client.protocol import ClientProtocol, PendingCall
from zcproto.client.retry import SESSION_IS_OVER, Then, retry_after_ms, what_next
from zcproto.client.session import Certificate, ClientSession, Credentials, DeviceKey
from zcproto.common.clock import Clock
from zcproto.common.deadlines import DeadlineWheel
from zcproto.connection.events import EventReceived
from zcproto.errors import CallError, Code, ConnectionClosed, Unauthenticated, ZcprotoError
from zcproto.wire.frame import NO_TOKEN

ANSWER_TIMEOUT: Final = 10.0
"""Seconds in which the server must answer the methods of sessions."""

CLOSE_TIMEOUT: Final = 2.0
"""Seconds for the server to end the session of a client that leaves."""

REFRESH_GRACE: Final = 5.0
"""Seconds after which a refresh token whose answer was lost is not used again: half the server's usual grace."""

MAX_LOST: Final = 3
"""Answers to session.open lost in a row: each may have left a session behind that counts against the cap."""

MIN_AHEAD_INTERVAL: Final = 1.0
"""Seconds between attempts to refresh ahead of the end."""

_NEVER: Final = float("inf")
_ENDED_BY_REFUSAL: Final = SESSION_IS_OVER | {Code.UNAUTHENTICATED, Code.TOKEN_EXPIRED}
_MAYBE_RUN: Final = frozenset({Code.DEADLINE_EXCEEDED, Code.CANCELLED, Code.INTERNAL, Code.UNKNOWN})


class SessionKeeper:
    """Keeps the session of one client.

    `token` is what calls carry now, and they may be sent while the time is below `good_until`; beyond it, wait
    for `make_good`.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        wheel: DeadlineWheel,
        clock: Clock,
        get_link: Callable[[], Awaitable[ClientProtocol]],
        *,
        credentials: Credentials | None,
        client: str,
        random: Random,
    ) -> None:
        self.session: ClientSession | None = None
        self.token = NO_TOKEN
        self.good_until = _NEVER
        self.deadline_tick = 0
        self._loop = loop
        self._wheel = wheel
        self._clock = clock
        self._get_link = get_link
        self._credentials = credentials
        self._device = credentials if isinstance(credentials, DeviceKey) else None
        self._client = client
        self._random = random
        self._is_wanted = False
        self._unknown_token = NO_TOKEN  # the server did not know it, or a method wants more than it
        self._over: CallError | None = None
        self._renewing: asyncio.Task[None] | None = None
        self._attaching: tuple[bytes, PendingCall] | None = None

    @property
    def is_over(self) -> bool:
        """Whether the server took the session away, or refused one: only the application goes on from here."""
        return self._over is not None

    def want(self) -> None:
        """From here on calls need a session. What was over is forgotten, and so is a session that was refused.

        Raises Unauthenticated if there is nothing to open one with.
        """
        if self._credentials is None:
            raise Unauthenticated(
                "this client has neither a key nor a device nor a certificate to open a session with"
            )
        self._is_wanted = True
        self._over = None
        if self.session is not None and self.token == self._unknown_token:
            self.session = None
            self.token = NO_TOKEN
        self._set_good()

    async def make_good(self) -> None:
        """Return when calls may be sent: with a session that is alive, or with none if none is wanted.

        Raises the error that ended the session, or with which none could be opened.
        """
        while True:
            if self._over is not None:
                raise type(self._over)(self._over.message, self._over.details)
            if self._renewing is None:
                if self._loop.time() < self.good_until:
                    return
                self._start(must=True)
            assert self._renewing is not None
            await join(self._renewing)

    def used(self, now: float) -> None:
        """A call with the token is being sent."""
        session = self.session
        if session is not None and session.idle_timeout_ms:
            session.used(now)
            self.good_until = session.good_until

    def expired(self, token: bytes) -> None:
        """The server says that a token has expired."""
        if token == self.token and self.session is not None:
            self.session.expire()
            self._set_good()

    def reopen(self, token: bytes) -> bool:
        """The server says that a token belongs to another certificate. False if this client shows none."""
        if not isinstance(self._credentials, Certificate):
            return False
        if token == self.token:
            self._drop_refresh_token()
            self.expired(token)
        return True

    def unknown(self, token: bytes) -> None:
        """The server answered UNAUTHENTICATED to a token. It is sent on until the application asks for another."""
        self._unknown_token = token

    def ended(self, token: bytes, error: CallError) -> None:
        """The server says that a token's session was taken away."""
        if token == self.token:
            self._give_up(error)

    def _give_up(self, error: CallError) -> None:
        self._over = error
        self.session = None
        self.token = NO_TOKEN
        self._wheel.discard(self)
        self._set_good()

    def _set_good(self) -> None:
        if self._over is not None or self._renewing is not None:
            self.good_until = -_NEVER
        elif self.session is not None:
            self.good_until = self.session.good_until
        else:
            self.good_until = -_NEVER if self._is_wanted else _NEVER

    # --- new connections and events ---------------------------------------------------------------

    def show(self, link: ClientProtocol) -> None:
        """Show the token on a new connection, so that it has its session and gets its events. If it is bound to a
        device, that proves its key.

        A small request goes first: a larger one would be refused on a connection without a session.
        """
        if self._renewing is None:
            self._show(link)

    def _show(self, link: ClientProtocol) -> None:
        if self.session is None or not link.ready:
            return
        token = self.token
        if self.session.bound and self._device is not None and not link.proved:
            call = self._attach(link, self._device)
        else:
            call = link.request("session.info", None, token, None, self._loop.time() + ANSWER_TIMEOUT)

        def shown(call: asyncio.Future[Any]) -> None:
            error = None if call.cancelled() else call.exception()
            if isinstance(error, CallError):
                self._refused(token, error)

        call.add_done_callback(shown)

    def _attach(self, link: ClientProtocol, device: DeviceKey) -> PendingCall:
        """Prove the device's key on a connection; one request serves all who want it."""
        token = self.token
        if self._attaching is not None:
            attached, call = self._attaching
            if attached == token and call.link is link and not call.done():
                return call
        params = device.attach_params(link, token)
        call = link.request("session.attach", params, token, None, self._loop.time() + ANSWER_TIMEOUT)
        self._attaching = token, call

        def proved(call: asyncio.Future[Any]) -> None:
            if not call.cancelled() and call.exception() is None:
                link.proved = True

        call.add_done_callback(proved)
        return call

    async def attach(self, link: ClientProtocol, token: bytes) -> bool:
        """The server wants the key of a token proved on a connection: do so, if both are still in use.

        False if there is no device to prove it with. Raises the server's answer, or DeadlineExceeded.
        """
        if self._device is None:
            return False
        if token == self.token and link.ready:
            link.proved = False
            call = self._attach(link, self._device)
            await asyncio.wait([call])  # whoever is cancelled leaves alone
            error = call.exception()
            if isinstance(error, CallError):
                raise type(error)(error.message, error.details)
        return True

    def _refused(self, token: bytes, error: CallError) -> None:
        if what_next(error) is Then.REOPEN:
            self.reopen(token)
        elif error.code is Code.UNAUTHENTICATED:
            self.unknown(token)
        elif error.code is Code.TOKEN_EXPIRED:
            self.expired(token)
        elif error.code in SESSION_IS_OVER:
            self.ended(token, error)

    def event_received(self, event: EventReceived, link: ClientProtocol | None) -> None:
        """What an event says of the session."""
        if event.token != self.token or self.session is None:
            return
        if event.name == "session.revoked" and link is not None:
            self.show(link)  # the answer tells whether it was revoked or replaced
        elif event.name == "session.expiring":
            self._refresh_ahead()

    # --- opening and refreshing -------------------------------------------------------------------

    def handle_deadline(self, now: float) -> None:
        self._refresh_ahead()

    def _refresh_ahead(self) -> None:
        session = self.session
        if session is not None and self._renewing is None and session.can_refresh(self._loop.time()):
            self._start(must=False)

    def _start(self, *, must: bool) -> None:
        self._renewing = self._loop.create_task(self._renew(must))
        self._renewing.add_done_callback(self._renewed)
        self._set_good()

    def _renewed(self, task: asyncio.Task[None]) -> None:
        self._renewing = None
        self._set_good()
        if not task.cancelled():
            task.exception()  # if nobody waited, the next call tries again and is told

    async def _renew(self, must: bool) -> None:
        """Get a new token. If it need not be, for the old one is good, give up at the first difficulty."""
        backoff = Backoff(self._random)
        stale_retried = attach_tried = False
        lost = 0
        while True:
            link = await self._get_link()
            await link.wait_ready()
            if not link.ready:
                continue
            method, params = self._next_request(link)
            sent_at = self._loop.time()
            try:
                result = await _answer(link.request(method, params, NO_TOKEN, None, sent_at + ANSWER_TIMEOUT))
            except ConnectionClosed:
                lost += 1
                if lost > MAX_LOST:
                    raise
                must = must or method == "session.refresh"  # the old token may be dead by now
                if self._loop.time() - sent_at > REFRESH_GRACE:
                    self._drop_refresh_token()
            except CallError as error:
                then = what_next(error)
                if then is Then.LATER and must:
                    await asyncio.sleep(backoff.next(retry_after_ms(error.details)))
                elif then is Then.AT_ONCE and not stale_retried:
                    stale_retried = True
                elif then is Then.ATTACH and not attach_tried:
                    attach_tried = True
                    with contextlib.suppress(CallError):  # whatever it is, the next answer tells it, too
                        await self.attach(link, self.token)
                elif method == "session.refresh" and self._goes_on_without_refresh(error):
                    must = True
                elif not must and error.code not in SESSION_IS_OVER:
                    self._wheel.set(self, self._next_ahead())
                    return
                else:
                    if error.code in _ENDED_BY_REFUSAL:
                        self._give_up(error)
                    raise
            else:
                self._opened(result, link)
                if self._device is not None and method == "session.open":
                    link.proved = True
                elif self._device is not None and not link.proved:
                    self._show(link)
                return

    def _next_request(self, link: ClientProtocol) -> tuple[str, dict[str, Any]]:
        session = self.session
        if session is not None and session.can_refresh(self._loop.time()):
            return "session.refresh", {"refresh_token": session.refresh_token_bytes, "client": self._client}
        assert self._credentials is not None  # `want` saw to it
        return "session.open", {**self._credentials.params(link), "client": self._client}

    def _goes_on_without_refresh(self, error: CallError) -> bool:
        """Whether to open a session instead: the refresh token is past its life, may be spent, or belongs to the
        certificate before."""
        is_anothers = what_next(error) is Then.REOPEN and isinstance(self._credentials, Certificate)
        if error.code is not Code.TOKEN_EXPIRED and error.code not in _MAYBE_RUN and not is_anothers:
            return False
        self._drop_refresh_token()
        return True

    def _drop_refresh_token(self) -> None:
        if self.session is not None:
            self.session.drop_refresh_token()

    def _next_ahead(self) -> float:
        """When to try again to refresh ahead: after a quarter to a half of the time that is left."""
        now = self._loop.time()
        left = self.session.good_until - now if self.session is not None else 0.0
        return now + max(left * (0.25 + self._random() / 4), MIN_AHEAD_INTERVAL)

    def _opened(self, result: Any, link: ClientProtocol) -> None:
        now = self._loop.time()
        server_wall = self._clock.wall() + link.clock_offset_ms
        session = ClientSession(result, server_wall=server_wall, now=now, jitter=self._random())
        link.session_ended(self.token)
        self.session = session
        self.token = session.token_bytes
        self._wheel.set(self, session.refresh_at if session.can_refresh(now) else _NEVER)

    # --- the end ----------------------------------------------------------------------------------

    async def close(self, link: ClientProtocol | None) -> None:
        """End the session on the server, if that can be done now: sessions of a user are counted."""
        renewing, token = self._renewing, self.token
        if renewing is not None:
            renewing.cancel()
            await asyncio.wait([renewing])
        self._wheel.discard(self)
        if self.session is None or link is None or not link.ready:
            return
        self.session = None
        call = link.request("session.close", None, token, None, self._loop.time() + CLOSE_TIMEOUT)
        try:
            await _answer(call)
        except ZcprotoError:
            return  # it ends by itself on the server; there is nothing to be done about it here


async def _answer(call: PendingCall) -> Any:
    try:
        return await call
    except asyncio.CancelledError:
        call.link.abandon(call)
        raise
