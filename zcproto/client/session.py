"""The client's session: its state, and when it is opened, refreshed, given up, and continued after a restart.

Decides: when a session is opened or refreshed. One attempt serves all calls that wait. After TOKEN_REVOKED or
SESSION_REPLACED, or after a refused login, it tries nothing until the application asks for a session again: every
call raises the same error.

Rules:
- No call is sent during a refresh: the server revokes the old token when it answers.
- A refresh token works once. If the answer is lost, the same one is used again for a few seconds after the first
  attempt, and never later: repetitions do not extend the server's grace.
- With a session file, the server is asked before the session of the file is used. If it refuses the token, the
  session is refreshed, or another one is opened. The file is written before a session is used. While a refresh
  token is being spent, the file has none: using it again after a crash would end the session. Closing the client
  keeps the session, unless another client has the file.
- The server cannot cause a storm of requests: early refreshes have a minimum interval, a session that has already
  expired is renewed with growing delays, and one `session.revoked` per token and connection is checked.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Final

from zcproto.client.credentials import CertificateLogin, Credentials, DeviceKey, SchemeLogin, SessionFile
from zcproto.client.protocol import ClientProtocol, PendingCall, join, mark_retrieved
from zcproto.client.retry import (
    ENDED_BY_REFUSAL,
    SESSION_IS_OVER,
    Backoff,
    Random,
    Renewal,
    Shown,
    Step,
    Then,
    retry_after_ms,
    what_next,
)
from zcproto.common.clock import MS_PER_SECOND, Clock
from zcproto.common.deadlines import DeadlineWheel
from zcproto.common.secret import SecretBytes
from zcproto.connection.events import NEVER, EventReceived
from zcproto.connection.refusals import SESSION_MISSING
from zcproto.errors import CallError, Code, ConnectionClosed, ProtocolError, Unauthenticated, ZcprotoError
from zcproto.wire.frame import NO_TOKEN, TOKEN_SIZE

OPEN: Final = "session.open"
REFRESH: Final = "session.refresh"

ANSWER_TIMEOUT: Final = 10.0
"""Seconds for the answer to a session method."""

CLOSE_TIMEOUT: Final = 2.0
"""Seconds for the answer to `session.close`."""

REFRESH_GRACE: Final = 5.0
"""Seconds from the first use of a refresh token in which it may be used again if the answer was lost: half the
server's default grace."""

STABLE_AFTER: Final = 5.0
"""Seconds after which the delays of sessions that the server loses, or of attachments that it ends, start again."""

MIN_REFRESH_INTERVAL: Final = 1.0
"""Minimum of seconds between attempts to refresh before the expiry, and from a session that is valid for less than
that to the next one."""

NOTED_PER_IDLE_TIMEOUT: Final = 64
"""Times that the use of a session is noted within its idle timeout: it costs more than comparing a number."""

REFRESH_AT: Final = 0.8
"""The fraction of a session's lifetime after which it is refreshed."""


class ClientSession:
    """An open session.

    `id` is public; `expires_at` and `refresh_expires_at` are milliseconds since the Unix epoch by the server's
    clock; `idle_timeout_ms` is 0 without an idle timeout. `valid_until` and `refresh_at` are monotonic seconds of
    this client.
    """

    def __init__(self, result: Any, *, server_wall: int, now: float, jitter: float) -> None:
        """Parse the result of `session.open` or `session.refresh` (zcp1.md, section 9.3). `jitter` is from 0 to 1.

        Raises ProtocolError if the result is invalid.
        """
        self._fields = fields = _check_result(result)
        self.token_bytes = SecretBytes(fields["token"])
        refresh_token = fields["refresh_token"]
        self.refresh_token_bytes = None if refresh_token is None else SecretBytes(refresh_token)
        self.id: str = fields["id"]
        self.user: str = fields["user"]
        self.expires_at: int = fields["expires_at"]
        self.idle_timeout_ms: int = fields["idle_timeout_ms"]
        self.refresh_expires_at: int | None = fields["refresh_expires_at"]
        self.bound: bool = fields["bound"]
        life = max(0, self.expires_at - server_wall) / MS_PER_SECOND
        self._ends = now + life
        self._idle_s = self.idle_timeout_ms / MS_PER_SECOND if self.idle_timeout_ms else NEVER
        self.valid_until = min(self._ends, now + self._idle_s)
        self._refresh_ends = NEVER
        if self.refresh_expires_at is not None:
            self._refresh_ends = now + max(0, self.refresh_expires_at - server_wall) / MS_PER_SECOND
        self.refresh_at = now + life * (REFRESH_AT + (1 - REFRESH_AT) / 4 * jitter)
        self._may_be_spent = False  # the refresh token

    def __repr__(self) -> str:
        return f"ClientSession(id={self.id!r}, user={self.user!r}, expires_at={self.expires_at})"

    @property
    def token(self) -> str:
        """The token for HTTP's `Authorization: Bearer`: base64url without padding."""
        return base64.urlsafe_b64encode(self.token_bytes).rstrip(b"=").decode()

    def as_result(self) -> dict[str, Any]:
        """Return the result that this session was made from, with the refresh token unless it may be spent."""
        return {**self._fields, "refresh_token": None if self._may_be_spent else self.refresh_token_bytes}

    @property
    def shown_before(self) -> float:
        """Seconds before `valid_until` at which its token has to be sent: 0 if that extends nothing."""
        return 0.0 if self.valid_until == self._ends else self._idle_s / 2

    def used(self, now: float) -> None:
        """Restart the idle timeout, because the token is being sent."""
        self.valid_until = min(self._ends, now + self._idle_s)

    def expire(self) -> None:
        """Mark the session as expired, as the server reported."""
        self.valid_until = self._ends = -NEVER

    def can_refresh(self, now: float) -> bool:
        return self.refresh_token_bytes is not None and now < self._refresh_ends

    def refresh_lost(self, sent_at: float) -> None:
        """Limit further uses of the refresh token to the grace, because the answer to this one was lost."""
        self._may_be_spent = True
        self._refresh_ends = min(self._refresh_ends, sent_at + REFRESH_GRACE)


def _check_result(result: Any) -> dict[str, Any]:
    fields: dict[str, Any] = result if result.__class__ is dict else {}
    token, refresh_token = fields.get("token"), fields.get("refresh_token")
    refresh_expires_at = fields.get("refresh_expires_at")
    if not (
        token.__class__ is bytes
        and len(fields["token"]) == TOKEN_SIZE
        and fields.get("id").__class__ is str
        and fields.get("user").__class__ is str
        and fields.get("expires_at").__class__ is int
        and fields.get("idle_timeout_ms").__class__ is int
        and fields.get("bound").__class__ is bool
        and (refresh_token is None or (refresh_token.__class__ is bytes and len(refresh_token) == TOKEN_SIZE))
        and (refresh_expires_at is None or refresh_expires_at.__class__ is int)
    ):
        raise ProtocolError(
            Code.PROTOCOL_ERROR,
            "the server's answer to session.open or session.refresh is invalid; report it to the operator",
        )
    return {"refresh_token": None, "refresh_expires_at": None, **fields}


@dataclass(eq=False, repr=False)
class SessionManager:
    """Manages the session of one client, which is kept in `file`, if given.

    Calls carry `token`, and may be sent until `valid_until` (monotonic seconds); afterwards, await `ensure` first.
    From `noted_until` on, pass the time of a call to `used`.
    `is_lost`: the server does not know the token, and another session has not been opened yet.
    `on_changed` is called after each change of the token, with the previous one and the connection that it came by.
    """

    _loop: asyncio.AbstractEventLoop
    _wheel: DeadlineWheel
    _clock: Clock
    _get_connection: Callable[[], Awaitable[ClientProtocol]]
    _get_room: Callable[[], Awaitable[ClientProtocol]]
    _: KW_ONLY
    credentials: Credentials | None
    client: str
    random: Random
    file: SessionFile | None = None
    on_changed: Callable[[bytes, ClientProtocol], None] = field(
        default=lambda previous, connection: None, init=False
    )
    session: ClientSession | None = field(default=None, init=False)
    token: bytes = field(default=NO_TOKEN, init=False)
    _previous_token: bytes = field(default=NO_TOKEN, init=False)
    valid_until: float = field(default=NEVER, init=False)
    noted_until: float = field(default=-NEVER, init=False)
    deadline_tick: int = field(default=0, init=False)
    _device: DeviceKey | None = field(init=False)
    _login: SchemeLogin | None = field(init=False)
    _is_required: bool = field(default=False, init=False)
    _unauthenticated_token: bytes = field(default=NO_TOKEN, init=False)  # got UNAUTHENTICATED
    _over: CallError | None = field(default=None, init=False)
    _renewing: asyncio.Task[None] | None = field(default=None, init=False)
    _attaching: tuple[bytes, ClientProtocol, PendingCall] | None = field(default=None, init=False)
    _proving: asyncio.Future[Any] | None = field(default=None, init=False)  # calls wait for it
    _refreshed_early_at: float = field(default=-NEVER, init=False)
    _not_before: float = field(default=-NEVER, init=False)  # of the next renewal
    is_lost: bool = field(default=False, init=False)
    _opened_at: float = field(default=-NEVER, init=False)
    _backoff: Backoff = field(init=False)  # of sessions that expire at once
    _lost_backoff: Backoff = field(init=False)  # of sessions that the server has lost
    _checked_revocation: tuple[bytes, bytes] | None = field(default=None, init=False)  # salt and token
    _was_loaded: bool = field(default=False, init=False)  # the file
    _restored: ClientSession | None = field(default=None, init=False)  # from the file, until it is accepted

    def __post_init__(self) -> None:
        self._backoff, self._lost_backoff = Backoff(self.random), Backoff(self.random)
        self._device = self.credentials if isinstance(self.credentials, DeviceKey) else None
        self._login = self.credentials if isinstance(self.credentials, SchemeLogin) else None

    @property
    def is_over(self) -> bool:
        """Whether the server revoked or refused the session: only the application may open another one."""
        return self._over is not None

    def owns(self, token: bytes) -> bool:
        """Return whether a token is that of this session, or was until the last refresh."""
        return token != NO_TOKEN and token in (self.token, self._previous_token)

    @property
    def expires_at_once(self) -> bool:
        """Whether the next renewal is delayed, because the last session had expired already."""
        return self._loop.time() < self._not_before and not self.is_lost

    def shown(self, token: bytes) -> Shown:
        """Return which token a request had. After the session has ended, no token counts as earlier."""
        if token == NO_TOKEN:
            return Shown.NONE
        return Shown.PRESENT if token == self.token or self.is_over else Shown.EARLIER

    def require(self) -> None:
        """Require a session for calls from now on. Forget a revoked, refused or unauthenticated one.

        Raises Unauthenticated without credentials.
        """
        if self.credentials is None:
            raise Unauthenticated(
                "this client has no credentials to open a session;"
                " give connect() a key, a device, a certificate or a login"
            )
        self._is_required = True
        self._over = None
        if self.session is not None and self.token == self._unauthenticated_token:
            self.session = None
            self.token = NO_TOKEN
        self._update_validity()

    def missing(self, error: CallError) -> CallError:
        """Return the error of a call without a token: with credentials, the cure is to open the session."""
        if self.credentials is None or error.message != SESSION_MISSING:
            return error
        return Unauthenticated("this needs a session: call open_session() of the client first", error.details)

    async def ensure(self) -> None:
        """Wait until calls may be sent: with a valid session, or without one if none is required.

        Raises the error that ended the session or prevented opening one.
        """
        while True:
            if self._over is not None:
                raise type(self._over)(self._over.message, self._over.details)
            if self._proving is not None and self._renewing is None:
                await asyncio.wait([self._proving])
                continue
            if self._renewing is None:
                if self._loop.time() < self.valid_until:
                    return
                self._start(must=True)
            assert self._renewing is not None
            await join(self._renewing)

    def used(self, now: float) -> None:
        """Note that a call with the token is being sent."""
        session = self.session
        if session is not None and session.idle_timeout_ms:
            session.used(now)
            if self._proving is None:
                self.valid_until = session.valid_until
            self.noted_until = now + session.idle_timeout_ms / MS_PER_SECOND / NOTED_PER_IDLE_TIMEOUT

    @property
    def is_fetching_login(self) -> bool:
        """Whether the application's function for a login runs."""
        return self._login is not None and self._login.is_fetching

    @property
    def _can_reopen(self) -> bool:
        """Whether these credentials may open a session that is bound to another client certificate."""
        return isinstance(self.credentials, CertificateLogin) or self._login is not None

    def expired(self, token: bytes) -> None:
        """Handle TOKEN_EXPIRED for a token."""
        if token == self.token and self.session is not None:
            self.session.expire()
            self._update_validity()

    def reopen(self, token: bytes) -> bool:
        """Discard a token that is bound to another certificate. Return False for credentials without one."""
        if not self._can_reopen:
            return False
        if token == self.token:
            self._drop_refresh_token()
            self.expired(token)
        return True

    def lost(self, token: bytes) -> None:
        """Handle an unknown token: open another session after a delay, once for all calls (section 11.2).

        The store has lost the refresh token as well.
        """
        if token == self.token and not self.is_lost:
            self._delay_opening()
            self._drop_refresh_token()
            self.expired(token)

    def _delay_opening(self) -> None:
        now = self._loop.time()
        if now - self._opened_at >= STABLE_AFTER:
            self._lost_backoff.reset()
        self.is_lost = True
        self._not_before = now + self._lost_backoff.next()

    def unauthenticated(self, token: bytes) -> None:
        """Handle UNAUTHENTICATED for a token: keep sending it until the application asks for a session again."""
        self._unauthenticated_token = token

    def ended(self, token: bytes, error: CallError) -> None:
        """Handle TOKEN_REVOKED or SESSION_REPLACED for a token, or a refused login."""
        if token != self.token:
            return
        self._over = error
        self.session, self.is_lost = None, False
        self.token = NO_TOKEN
        self._wheel.discard(self)
        self._update_validity()

    def _update_validity(self) -> None:
        self.noted_until = -NEVER
        if self._over is not None or self._renewing is not None or self._proving is not None:
            self.valid_until = -NEVER
        elif self.session is not None:
            self.valid_until = self.session.valid_until
        else:
            self.valid_until = -NEVER if self._is_required else NEVER

    # --- new connections and events ---------------------------------------------------------------

    def present(self, connection: ClientProtocol) -> None:
        """Present the token on a new connection, which then receives the session's events.

        For a bound session, prove the device's key. This small request precedes larger ones, which the server
        refuses on a connection without a session.
        """
        if not self.is_renewing:
            self.present_now(connection)

    @property
    def is_renewing(self) -> bool:
        """Whether another token is being obtained."""
        return self._renewing is not None

    def present_now(self, connection: ClientProtocol) -> None:
        """Present the token like `present`, also one that was just obtained, and to a server that goes away."""
        if self.session is None or connection.error is not None:
            return
        if self.needs_proof(connection) and not connection.ready:
            return  # the token was not used there
        token = self.token
        _, call = self._show(connection)

        def presented(call: asyncio.Future[Any]) -> None:
            error = None if call.cancelled() else call.exception()
            if isinstance(error, CallError):
                self.refused(token, error)

        call.add_done_callback(presented)

    async def is_accepted_on(self, connection: ClientProtocol) -> bool:
        """Show the session on a connection that is not used yet, if there is one. Return False if it is refused."""
        session = self.session
        if session is None or self.is_renewing or not connection.ready:
            return True  # the first call on it finds out
        if self._loop.time() >= session.valid_until:
            return True
        try:
            await answer(connection, self._show(connection))
        except CallError as error:
            return error.code is Code.TOKEN_EXPIRED
        except ConnectionClosed:
            return False
        return True

    def _show(self, connection: ClientProtocol) -> PendingCall:
        if self._device is not None and self.needs_proof(connection):
            return self._attach(connection, self._device)
        return connection.show(self.token, self._loop.time() + ANSWER_TIMEOUT)

    def _attach(self, connection: ClientProtocol, device: DeviceKey) -> PendingCall:
        """Prove the device's key on a connection. Concurrent callers share one request."""
        token = self.token
        if self._attaching is not None:
            attached, where, pending = self._attaching
            if attached == token and where is connection and not pending[1].done():
                return pending
        params = device.attach_params(connection, token)
        pending = connection.request(
            "session.attach", params, token, None, self._loop.time() + ANSWER_TIMEOUT
        )
        self._attaching = token, connection, pending

        def proved(call: asyncio.Future[Any]) -> None:
            if not call.cancelled() and call.exception() is None:
                connection.proved.add(device)

        pending[1].add_done_callback(proved)
        return pending

    def prove(self, connection: ClientProtocol, proved: Callable[[], object], *, holds_calls: bool) -> bool:
        """Prove the device's key on a new connection. Return False if that is not needed, or not possible now.

        `proved` is called after the answer. With `holds_calls` no call is sent before that.
        """
        session, device = self.session, self._device
        if session is None or device is None or not self.needs_proof(connection):
            return False
        if not connection.ready or self._loop.time() >= session.valid_until:
            return False
        _, call = self._attach(connection, device)

        def answered(_: asyncio.Future[Any]) -> None:
            if self._proving is call:
                self._proving = None
                self._update_validity()
            proved()  # before the calls that wait go on

        call.add_done_callback(answered)
        if holds_calls:
            self._proving = call
            self._update_validity()
        return True

    def needs_proof(self, connection: ClientProtocol) -> bool:
        """Return whether the device of the session has to prove its key on a connection."""
        is_bound = self.session is not None and self.session.bound
        return is_bound and self._device is not None and self._device not in connection.proved

    async def attach(self, connection: ClientProtocol, token: bytes) -> bool:
        """Prove the key of a token on a connection, if both are still in use. Return False without a device.

        Raises the server's error, or DeadlineExceeded.
        """
        if self._device is None:
            return False
        if token == self.token and connection.ready:
            connection.proved.discard(self._device)
            _, call = self._attach(connection, self._device)
            await asyncio.wait([call])  # shared: cancelling one caller does not cancel it
            error = call.exception()
            if isinstance(error, CallError):
                raise type(error)(error.message, error.details)
        return True

    def refused(self, token: bytes, error: CallError) -> None:
        """Handle the error that a request got which only shows the token."""
        then = what_next(error)
        if then is Then.REOPEN:
            self.reopen(token)
        elif then is Then.REPLACE and self.credentials is not None:
            self.lost(token)
        elif error.code is Code.UNAUTHENTICATED:
            self.unauthenticated(token)
        elif error.code is Code.TOKEN_EXPIRED:
            self.expired(token)
        elif error.code in SESSION_IS_OVER:
            self.ended(token, error)

    def event_received(self, event: EventReceived, connection: ClientProtocol | None) -> None:
        """React to an event about the session."""
        if event.token != self.token or self.session is None:
            return
        if event.name == "session.revoked" and connection is not None:
            if self._checked_revocation != (connection.salt, self.token):
                self._checked_revocation = connection.salt, self.token
                self.present(connection)  # the answer distinguishes TOKEN_REVOKED from SESSION_REPLACED
        elif event.name == "session.expiring":
            self._refresh_early()

    # --- opening and refreshing -------------------------------------------------------------------

    def handle_deadline(self, now: float) -> None:
        self._refresh_early()

    def _refresh_early(self) -> None:
        session, now = self.session, self._loop.time()
        if session is None or self._renewing is not None or not session.can_refresh(now):
            return
        allowed_at = self._refreshed_early_at + MIN_REFRESH_INTERVAL
        if now < allowed_at:
            self._wheel.set(self, allowed_at)
            return
        self._refreshed_early_at = now
        self._start(must=False)

    def _start(self, *, must: bool) -> None:
        self._renewing = self._loop.create_task(self._renew(must))
        self._renewing.add_done_callback(self._renewed)
        self._update_validity()

    def _renewed(self, task: asyncio.Task[None]) -> None:
        self._renewing = None
        self._update_validity()
        mark_retrieved(task)  # without a waiter the next call retries and raises it

    async def _renew(self, must: bool) -> None:
        """Get another token, or restore the session of the file. `must`: the present token has become invalid."""
        if self.file is None:
            await self._obtain(must)
            return
        try:
            if self._was_loaded or not await self._restore(self.file):
                await asyncio.to_thread(self.file.save, None)
                await self._obtain(must)
        finally:
            result = None if self.session is None else self.session.as_result()
            await asyncio.to_thread(self.file.save, result)

    async def _obtain(self, must: bool) -> None:
        await self._delayed()
        renewal = Renewal(self.random, must=must)
        while True:
            if (login := self._login_to_fetch(self._loop.time())) is not None:
                await self._get_connection()
                await login.fetch(self._loop.time)
            connection = await self._get_room()
            session, sent_at = self.session, self._loop.time()
            if not connection.ready or self._login_to_fetch(sent_at) is not None:
                continue
            method, params = self._next_request(connection, sent_at)
            is_refresh = session is not None and method == REFRESH
            try:
                call = connection.request(method, params, self.token, None, sent_at + ANSWER_TIMEOUT)
                result = await answer(connection, call)
            except (ConnectionClosed, asyncio.CancelledError) as error:
                may_be_spent = is_refresh and not connection.unanswered_not_run
                if session is not None and may_be_spent:
                    session.refresh_lost(sent_at)
                step = renewal.after_loss(may_be_spent=may_be_spent)
                if step.then is Then.RAISE or isinstance(error, asyncio.CancelledError):
                    raise
            except CallError as error:
                step = renewal.after_error(
                    error,
                    is_refresh=is_refresh,
                    can_reopen=self._can_reopen,
                    is_restored=session is not None and session is self._restored,
                )
                if step.then is Then.RAISE:
                    if error.code in ENDED_BY_REFUSAL:
                        self.ended(self.token, error)
                    raise
                if step.then is Then.KEEP:
                    self._wheel.set(self, self._next_refresh())
                    return
                await self._take(step, connection)
            else:
                if method == OPEN and self._device is not None:
                    connection.proved.add(self._device)
                self._adopt(result, connection)
                if method == OPEN:
                    self._opened_at = self._loop.time()
                elif self._device is not None and self._device not in connection.proved:
                    self.present_now(connection)
                return

    async def _take(self, step: Step, connection: ClientProtocol) -> None:
        """Do what a renewal requires before its next request."""
        if step.then is Then.LATER:
            await asyncio.sleep(step.delay)
        elif step.then is Then.ATTACH:
            with contextlib.suppress(CallError):  # the next attempt gets the same error
                await self.attach(connection, self.token)
        elif step.then in (Then.REOPEN, Then.REPLACE):
            if step.then is Then.REPLACE:
                self._delay_opening()
            if self.session is self._restored:
                self._drop_restored()
            self._drop_refresh_token()
            await self._delayed()

    async def _restore(self, file: SessionFile) -> bool:
        """Use the session of the file if the server accepts its token. Return False if it does not."""
        result = await asyncio.to_thread(file.load)
        self._was_loaded = True
        if result is None:
            return False
        connection = await self._ready_connection()
        try:
            session = self._session_of(result, connection)
        except ProtocolError:  # the file does not have a session
            return False
        self._restored = self.session = session
        self.token = session.token_bytes
        backoff = Backoff(self.random)
        while self._loop.time() < session.valid_until:
            try:
                await answer(connection, self._show(connection))
            except ConnectionClosed:
                await asyncio.sleep(backoff.next())
            except CallError as error:
                if what_next(error) in (Then.LATER, Then.AT_ONCE):
                    await asyncio.sleep(backoff.next(retry_after_ms(error.details)))
                else:
                    session.expire()
                    if error.code is not Code.TOKEN_EXPIRED:  # else it may be refreshed
                        self._drop_restored()
            else:
                self._restored = None
                self._begin(session, connection)
                return True
            connection = await self._ready_connection()
        return False

    def _drop_restored(self) -> None:
        """Forget the session of the file, which the server has refused."""
        self._restored = self.session = None
        self.token = NO_TOKEN

    async def _ready_connection(self) -> ClientProtocol:
        while True:
            connection = await self._get_connection()
            await connection.wait_ready()
            if connection.ready:
                return connection

    async def _delayed(self) -> None:
        """Wait until the next session may be opened."""
        delay = self._not_before - self._loop.time()
        if delay > 0:
            await asyncio.sleep(delay)

    def _login_to_fetch(self, now: float) -> SchemeLogin | None:
        """Return the login that must be fetched before the next request; None if it needs none."""
        session = self.session
        if (
            self._login is None
            or self._login.is_fetched(now)
            or (session is not None and session.can_refresh(now))
        ):
            return None
        return self._login

    def _next_request(self, connection: ClientProtocol, now: float) -> tuple[str, dict[str, Any]]:
        session = self.session
        if session is not None and session.can_refresh(now):
            return REFRESH, {"refresh_token": session.refresh_token_bytes, "client": self.client}
        assert self.credentials is not None  # checked by `require`
        return OPEN, {**self.credentials.params(connection), "client": self.client}

    def _drop_refresh_token(self) -> None:
        """Forget a refresh token that may be spent: a second use would revoke the whole family of tokens."""
        if self.session is not None:
            self.session.refresh_token_bytes = None

    def _next_refresh(self) -> float:
        """Return when to retry an early refresh: after a quarter to a half of the remaining time."""
        now = self._loop.time()
        left = self.session.valid_until - now if self.session is not None else 0.0
        return now + max(left * (0.25 + self.random() / 4), MIN_REFRESH_INTERVAL)

    def _adopt(self, result: Any, connection: ClientProtocol) -> None:
        now = self._loop.time()
        session = self._session_of(result, connection)
        connection.conversation.session_ended(self.token)
        connection.cancel_calls(self.token)  # unless the refreshed session has taken them over
        self.session, self.is_lost = session, False
        self._previous_token, self.token = self.token, session.token_bytes
        self._begin(session, connection)
        if session.valid_until - now < MIN_REFRESH_INTERVAL:
            self._not_before = now + MIN_REFRESH_INTERVAL + self._backoff.next()
        else:
            self._backoff.reset()

    def _session_of(self, result: Any, connection: ClientProtocol) -> ClientSession:
        server_wall = self._clock.wall() + connection.conversation.clock_offset_ms
        now = self._loop.time()
        return ClientSession(result, server_wall=server_wall, now=now, jitter=self.random())

    def _begin(self, session: ClientSession, connection: ClientProtocol) -> None:
        """Use a session that the server has accepted on a connection."""
        self.on_changed(self._previous_token, connection)
        can_refresh = session.can_refresh(self._loop.time())
        self._wheel.set(self, session.refresh_at if can_refresh else NEVER)

    # --- the end ----------------------------------------------------------------------------------

    async def close(self, connection: ClientProtocol | None) -> None:
        """Keep the session in the file, or end it on the server if connected: a user's sessions are limited."""
        renewing, token = self._renewing, self.token
        is_kept = self.file is not None and self.file.is_held
        if renewing is not None:
            renewing.cancel()
            await asyncio.wait([renewing])
        self._wheel.discard(self)
        if self.session is not None and not is_kept and connection is not None and connection.ready:
            self.session = None
            call = connection.request("session.close", None, token, None, self._loop.time() + CLOSE_TIMEOUT)
            with contextlib.suppress(ZcprotoError):  # the session will expire on the server
                await answer(connection, call)
        if self.file is not None:
            self.file.close()


async def answer(connection: ClientProtocol, pending: PendingCall) -> Any:
    stream, call = pending
    try:
        return await call
    except asyncio.CancelledError:
        connection.abandon(stream)
        raise
