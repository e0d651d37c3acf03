"""The client: calls over one connection at a time, as often as it takes to get an answer or a clear error.

What it decides: after each error of a call, whether it is sent again, by the table of the contract's section 7
(`retry.py`). Connections are `links.py`'s business, the session is `sessions.py`'s.
"""

from __future__ import annotations

import asyncio
import math
import os
import random as system_random
from collections.abc import Callable, Generator, Iterable, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from zcproto.client.address import parse_address
from zcproto.client.backoff import Backoff, Random
from zcproto.client.device import Device
from zcproto.client.dial import Dialer, LoopShare, Trust, leave_share, take_share
from zcproto.client.events import Event, EventStream
from zcproto.client.known_hosts import KnownHosts
from zcproto.client.links import LinkKeeper
from zcproto.client.protocol import ClientProtocol
from zcproto.client.retry import SESSION_IS_OVER, Then, retry_after_ms, what_next
from zcproto.client.session import ClientSession, choose_credentials
from zcproto.client.sessions import SessionKeeper
from zcproto.client.steady import SteadyClock
from zcproto.common.clock import MS_PER_SECOND, Clock, system_clock
from zcproto.common.home import resolve_home
from zcproto.connection.events import EventReceived
from zcproto.errors import (
    CallError,
    Code,
    ConfigError,
    ConnectionClosed,
    DeadlineExceeded,
    InvalidArgument,
    ZcprotoError,
)
from zcproto.tls.context import Passphrase
from zcproto.wire.frame import NO_TOKEN

DEFAULT_TIMEOUT: Final = 30.0
"""Seconds for a call, from the first attempt to the last."""

CONNECT_TIMEOUT: Final = 10.0
"""Seconds for one attempt to connect, from the name to the server's WELCOME."""

KNOWN_HOSTS_FILE: Final = "known_hosts.json"
MAX_DEADLINE_MS: Final = 2**53
NOT_OPEN: Final = "open the client first: async with connect(...) as client"

_FOREVER: Final = float("inf")
_UNSET: Final[Any] = object()


class Client:
    """A client of one server. Make it with `zcproto.connect`.

    It is for one event loop. Calls may run at once, as many as you like; they share one connection.
    """

    def __init__(
        self,
        address: str,
        *,
        user: str | None = None,
        key: str | None = None,
        ca_file: str | Path | None = None,
        pins: Iterable[str] | str = (),
        system_store: bool = False,
        verify: bool = True,
        server_hostname: str | None = None,
        certificate: str | Path | None = None,
        key_file: str | Path | None = None,
        key_passphrase: Passphrase | None = None,
        device: Device | str | Path | None = None,
        device_name: str | None = None,
        session: bool = True,
        timeout: float | None = DEFAULT_TIMEOUT,
        connect_timeout: float = CONNECT_TIMEOUT,
        client: str | None = None,
        on_event: Callable[[Event], object] | None = None,
        home: str | Path | None = None,
        key_log_file: str | Path | None = None,
        max_frame: int = 1_048_576,
        tolerance_ms: int = 30_000,
        clock: Clock = system_clock,
        random: Random = system_random.random,
    ) -> None:
        self.address = parse_address(address)
        self._credentials = choose_credentials(
            user,
            key,
            has_certificate=certificate is not None,
            device=Device.load(device) if isinstance(device, str | Path) else device,
            device_name=device_name,
        )
        self._opens_session = session and self._credentials is not None
        self._timeout = timeout
        self._client = default_client() if client is None else client
        self._on_event = on_event
        self._random = random
        self._steady = SteadyClock(clock)
        host = self.address.host if server_hostname is None else parse_address(server_hostname).host
        self._dial = Dialer(
            self.address,
            Trust(
                ca_file=None if ca_file is None else Path(ca_file),
                pins=pins,
                system_store=system_store,
                verify=verify,
                certificate=None if certificate is None else Path(certificate),
                key_file=None if key_file is None else Path(key_file),
                key_passphrase=key_passphrase,
                key_log=None if key_log_file is None else Path(key_log_file),
            ),
            _known_hosts(home),
            server_hostname=host,
            clock=self._steady,
            system_clock=clock,
            connect_timeout=connect_timeout,
            max_frame=max_frame,
            tolerance_ms=tolerance_ms,
        )
        self.events = EventStream()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    def __repr__(self) -> str:
        return f"Client({str(self.address)!r})"

    # --- begin and end ----------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def __await__(self) -> Generator[Any, None, Self]:
        return self.__aenter__().__await__()

    async def open(self) -> None:
        """Connect, and open a session if there is something to open one with. `async with` does it.

        Raises at the first attempt: CannotConnect, TlsError, CertificateError, ConnectionClosed, ConfigError for a
        key log that cannot be written, and the CallErrors of `session.open`.
        """
        if self._loop is not None:
            raise RuntimeError("this client was opened before; make a new one")
        loop = self._loop = asyncio.get_running_loop()
        share: LoopShare = take_share(loop)
        self._links = LinkKeeper(
            loop,
            lambda links: self._dial(links, share),
            Backoff(self._random),
            on_event=self._event_received,
            on_link=self._link_made,
            is_wanted=lambda: not self._sessions.is_over,
        )
        self._sessions = SessionKeeper(
            loop,
            share.wheel,
            self._steady,
            self._links.get,
            credentials=self._credentials,
            client=self._client,
            random=self._random,
        )
        try:
            if self._opens_session:
                self._sessions.want()
            await self._links.get()  # which takes `connect_timeout` at most
            await self._ready_before(self._deadline(_UNSET))
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """End the session and the connection. Calls that still wait get ConnectionClosed."""
        if self._closed:
            return
        self._closed = True
        if self._loop is None:
            return
        try:
            await self._sessions.close(self._links.link)
        finally:
            try:
                await self._links.close()
            finally:
                self.events.close()
                leave_share(self._loop)

    # --- what there is to know --------------------------------------------------------------------

    @property
    def session(self) -> ClientSession | None:
        """The session, if one is open."""
        return self._sessions.session if self._loop is not None else None

    @property
    def welcome(self) -> Mapping[str, Any]:
        """What the server last said in its WELCOME; empty while there is no connection."""
        link = self._links.link if self._loop is not None else None
        return {} if link is None else link.welcome

    async def open_session(self) -> ClientSession:
        """Open a session unless one is alive: the way on after TOKEN_REVOKED, SESSION_REPLACED and UNAUTHENTICATED.

        Raises Unauthenticated if the client has nothing to open one with, else as `call`.
        """
        if self._loop is None:
            raise RuntimeError(NOT_OPEN)
        self._sessions.want()
        await self._ready_before(self._deadline(_UNSET))
        assert self._sessions.session is not None
        return self._sessions.session

    # --- calls ------------------------------------------------------------------------------------

    async def call(
        self,
        method: str,
        params: Mapping[str, Any] | None = None,
        /,
        *,
        timeout: float | None = _UNSET,  # noqa: ASYNC109  it travels, and bounds more than one wait
        idempotency_key: str | None = None,
        traceparent: str | None = None,
        **named: Any,
    ) -> Any:
        """Call a method of the server; returns its result.

        Params are given by name, or in a mapping where a name is one of this function's own. `timeout` is in
        seconds and covers everything, waiting for a connection and sending again too; None waits for ever. It
        travels as the call's deadline. With an `idempotency_key` (at most 64 characters) a call is sent again
        also when its answer was lost, as the server runs it once for the key.

        Raises CallError with the server's answer, DeadlineExceeded for the timeout, ConnectionClosed if the
        connection was lost and the call may have run, CannotConnect or TlsError if there is no way to the server.
        """
        if params is not None:
            named = {**params, **named}
        if self._loop is None:
            raise RuntimeError(NOT_OPEN)
        deadline = self._deadline(timeout)
        attempt: _Attempt | None = None
        sessions = self._sessions
        while True:
            link = self._links.link
            now = self._loop.time()
            if link is None or not link.ready or now >= sessions.good_until or self._closed:
                link = await self._ready_before(deadline)
                now = self._loop.time()
            meta = None
            if deadline != _FOREVER:
                if now >= deadline:
                    raise DeadlineExceeded("no answer within the call's timeout")
                meta = {"deadline_ms": min(math.ceil((deadline - now) * MS_PER_SECOND), MAX_DEADLINE_MS)}
            if idempotency_key is not None or traceparent is not None:
                meta = _meta(meta, idempotency_key, traceparent)
            token = sessions.token
            sessions.used(now)
            try:
                pending = link.request(method, named, token, meta, deadline)
                try:
                    return await pending
                except asyncio.CancelledError:
                    link.abandon(pending)
                    raise
            except CallError as error:
                attempt = attempt or _Attempt(self._random)
                await self._after_error(error, attempt, link, token, deadline)
            except ConnectionClosed as error:
                if self._closed or not (link.unanswered_not_run or idempotency_key is not None):
                    raise
                attempt = attempt or _Attempt(self._random)
                # A call that brings its server down must not do so as fast as connections are made.
                await self._wait(attempt.backoff.next(), error, deadline)

    def _deadline(self, timeout: float | None) -> float:
        if timeout is _UNSET:
            timeout = self._timeout
        assert self._loop is not None
        return _FOREVER if timeout is None else self._loop.time() + timeout

    async def _after_error(
        self, error: CallError, attempt: _Attempt, link: ClientProtocol, token: bytes, deadline: float
    ) -> None:
        """Return when a call that was answered with an error may be sent again; raise the error if it may not."""
        then = what_next(error)
        if then is Then.LATER:
            await self._wait(attempt.backoff.next(retry_after_ms(error.details)), error, deadline)
        elif then is Then.AT_ONCE and attempt.once(then):
            return
        elif then is Then.ATTACH and token != NO_TOKEN and attempt.once(then):
            await self._attach(error, attempt, link, token, deadline)
        elif (
            then is Then.REOPEN and token != NO_TOKEN and attempt.once(then) and self._sessions.reopen(token)
        ):
            return
        elif then is Then.RENEW and token != NO_TOKEN and attempt.once(then):
            self._sessions.expired(token)
        elif error.code in SESSION_IS_OVER and token != NO_TOKEN:
            if token != self._sessions.token and not self._sessions.is_over and attempt.once(then):
                return  # the token of a session before this one
            self._sessions.ended(token, error)
            raise error
        elif isinstance(error, InvalidArgument) and "size" in error.details and attempt.once(Then.AT_ONCE):
            await self._show_token(error, link, token, deadline)
        else:
            if error.code is Code.UNAUTHENTICATED and token != NO_TOKEN:
                self._sessions.unknown(token)
            raise error

    async def _attach(
        self, error: CallError, attempt: _Attempt, link: ClientProtocol, token: bytes, deadline: float
    ) -> None:
        """Return when a call that was refused for a key not proved may be sent again; else raise its error."""
        try:
            async with asyncio.timeout_at(None if deadline == _FOREVER else deadline):
                if not await self._sessions.attach(link, token):
                    raise error
        except TimeoutError:
            raise DeadlineExceeded("no answer within the call's timeout") from error
        except CallError as refused:
            if refused is error:
                raise
            if what_next(refused) is Then.LATER:
                attempt.allow_again(Then.ATTACH)
            await self._after_error(refused, attempt, link, token, deadline)

    async def _wait(self, delay: float, error: ZcprotoError, deadline: float) -> None:
        """Wait before a call is sent again. Raises its error now if that would be too late."""
        assert self._loop is not None
        if self._loop.time() + delay >= deadline:
            raise error
        await asyncio.sleep(delay)

    async def _show_token(
        self, error: InvalidArgument, link: ClientProtocol, token: bytes, deadline: float
    ) -> None:
        """A request is too large for a connection without a session: show the token by a small one first."""
        if token == NO_TOKEN or link.has_session:
            raise error
        await self.call("session.info", timeout=_left(deadline, self._loop))

    async def _ready_before(self, deadline: float) -> ClientProtocol:
        """A connection that takes a request now, with its session if one is wanted. Raises DeadlineExceeded."""
        if deadline == _FOREVER:
            return await self._ready()
        try:
            async with asyncio.timeout_at(deadline):
                return await self._ready()
        except TimeoutError:
            cause = self._links.last_error if self._links.link is None else None
            reason = "no answer" if cause is None else f"no connection ({cause})"
            raise DeadlineExceeded(f"{reason} within the call's timeout") from cause

    async def _ready(self) -> ClientProtocol:
        while True:
            if self._closed:
                raise ConnectionClosed("this client is closed", clean=True)
            await self._sessions.make_good()
            link = await self._links.get()
            await link.wait_ready()
            assert self._loop is not None
            if link.ready and self._loop.time() < self._sessions.good_until:
                return link

    # --- what the keepers tell --------------------------------------------------------------------

    def _link_made(self, link: ClientProtocol) -> None:
        self._sessions.show(link)

    def _event_received(self, event: EventReceived) -> None:
        self._sessions.event_received(event, self._links.link)
        seen = Event(event.name, event.data)
        if self._on_event is not None:
            self._on_event(seen)
        else:
            self.events.put(seen)


class _Attempt:
    """What a call has tried already. Made at its first error: most calls have none."""

    __slots__ = ("_done", "backoff")

    def __init__(self, random: Random) -> None:
        self.backoff = Backoff(random)
        self._done: set[Then] = set()

    def once(self, then: Then) -> bool:
        """True the first time."""
        if then in self._done:
            return False
        self._done.add(then)
        return True

    def allow_again(self, then: Then) -> None:
        """It did not come to that after all."""
        self._done.discard(then)


def _known_hosts(home: str | Path | None) -> KnownHosts | None:
    try:
        return KnownHosts(resolve_home(home, os.environ).path / KNOWN_HOSTS_FILE)
    except ConfigError:
        if home is not None:
            raise
        return None  # a user without a home folder, as in some containers: no place to remember hosts in


def _meta(
    meta: dict[str, Any] | None, idempotency_key: str | None, traceparent: str | None
) -> dict[str, Any]:
    more: dict[str, Any] = {} if meta is None else meta
    if idempotency_key is not None:
        more["idempotency_key"] = idempotency_key
    if traceparent is not None:
        more["traceparent"] = traceparent
    return more


def _left(deadline: float, loop: asyncio.AbstractEventLoop | None) -> float | None:
    assert loop is not None
    return None if deadline == _FOREVER else max(0.0, deadline - loop.time())


@cache
def default_client() -> str:
    """How this client names itself: product/version."""
    try:
        return f"zcproto-python/{metadata.version('zcproto')}"
    except metadata.PackageNotFoundError:
        return "zcproto-python/0"
