"""Run a login through its scheme, the throttle and the authenticator.

Rules:
- Failures are counted for the user named by the fields, unless the authenticator names another: with the scheme
  `tls`, the user of the client's certificate. Failures of a device, opening or attaching sessions, are counted for
  the device.
- All failed logins get the same error, whatever the cause (zcp1.md, section 9.4).
- A login refused by the throttle is not examined; its error carries the time to wait.
- At most 16 logins of one user are pending at once, so that concurrent guesses to a slow authenticator cannot all
  pass before the first one has failed. All pending ones are limited too; one address has a quarter of them.
- A login that names no user, such as one by a token, counts for the user whom its authenticator has named, from
  then until its session is open. Only tokens of that user can use up this share.
- An exception of the authenticator does not count as a failed login.

Rules of an application's authenticator:
- An answer that is not an identity is an error, so that a bug does not let anyone in.
- An error that refuses the login, such as NotFound, is a failed login: the client gets the answer of all failed
  logins, the log gets the message.
- Messages of errors reach the log without the values of the login's fields: any of them may be a secret.
- One that takes too long is cancelled. The login is not counted as failed, and can be tried again.

Must not know: sessions, connections, how a scheme decides.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import isawaitable
from itertools import islice
from typing import Any, Final, NoReturn, TypeVar

from zcproto.auth.identity import (
    MAX_USER,
    NO_CHANNEL,
    Authenticator,
    Channel,
    Identity,
    check_identity,
    check_scheme,
    user_in,
)
from zcproto.auth.schemes import ApiKeyAuthenticator, DeviceAuthenticator
from zcproto.auth.throttle import LoginThrottle
from zcproto.common.counts import ALONE, Counting
from zcproto.common.exceptions import MAX_EXCEPTIONS
from zcproto.common.network import network_of
from zcproto.errors import CallError, Code, InvalidArgument, ResourceExhausted, Unauthenticated, Unavailable

MAX_PENDING: Final = 16
"""Logins of one user that may wait for their authenticator at the same time."""

ATTACH: Final = "session.attach"
"""Counts proofs of a device's key; listed beside the schemes."""

PENDING_SHARE: Final = 4
"""The part of all pending logins that one address may have is one in this number."""

_RETRY_PENDING_MS: Final = 1000
_ALL: Final = ""

Decision = TypeVar("Decision")


class Login:
    """Opens and attaches sessions. One authenticator for each scheme.

    At most `max_pending` logins wait for their authenticators, `pending` do.
    Counts logins: `accepted`, `refused` and `failed` (the authenticator raised) by scheme, and `throttled`.
    """

    def __init__(
        self,
        authenticators: Iterable[Authenticator],
        throttle: LoginThrottle,
        max_pending: int = 1024,
        counting: Counting = ALONE,
    ) -> None:
        self._authenticators: dict[str, Authenticator] = {}
        self._namers: dict[str, Callable[[Mapping[str, Any], Channel], str]] = {}
        self._devices: DeviceAuthenticator | None = None
        for authenticator in authenticators:
            scheme = authenticator.scheme
            check_scheme(scheme)
            if scheme in self._authenticators:
                raise ValueError(f"two authenticators for the scheme {scheme!r}")
            self._authenticators[scheme] = authenticator
            self._namers[scheme] = getattr(authenticator, "user_named", user_in)
            if isinstance(authenticator, DeviceAuthenticator):
                self._devices = authenticator
        self.external = frozenset(
            scheme
            for scheme, authenticator in self._authenticators.items()
            if isinstance(authenticator, ApplicationAuthenticator)
        )
        """The schemes whose users are the application's, and not those of the home folder."""
        self.without_channel = frozenset(
            scheme
            for scheme, authenticator in self._authenticators.items()
            if type(authenticator) is ApiKeyAuthenticator  # a subclass may read it
        )
        """The schemes that read nothing of the channel, which need not be made for them."""
        self.throttle = throttle
        self.max_pending = max_pending
        self.pending = 0
        self._pending_all = counting.counts("logins_pending")
        self._pending_users = counting.counts("logins_pending_per_user")
        self._pending_networks = counting.counts("logins_pending_per_address")
        self._opening_users = counting.counts("logins_opening_per_user")
        self.throttled = 0
        self.accepted = dict.fromkeys([*self._authenticators, ATTACH], 0)
        self.refused = dict.fromkeys(self.accepted, 0)
        self.failed = dict.fromkeys(self.accepted, 0)

    @property
    def all_pending(self) -> int:
        """The logins that wait for their authenticators in all workers."""
        return self._pending_all[_ALL]

    @property
    def schemes(self) -> tuple[str, ...]:
        """The schemes that `session.open` accepts."""
        return tuple(self._authenticators)

    def user_named(self, params: Mapping[str, Any], channel: Channel) -> str:
        """Return the name for which failures of a login are counted, not proved by it: a user's, or "device:" and a
        device's; or an empty text.
        """
        return self._namers[params["scheme"]](params, channel)

    def open(
        self,
        params: Mapping[str, Any],
        address: str,
        now: float,
        channel: Channel = NO_CHANNEL,
        wait_ms: int | None = None,
    ) -> Identity | Coroutine[Any, Any, Identity]:
        """Return the user of a login by the fields of `session.open` and the connection; a coroutine if the
        authenticator has to wait.

        `now` is monotonic seconds. `wait_ms` is the answer of the throttle if it had to be awaited.

        Raises, at once or later:
            Unauthenticated: the login failed, whatever the cause.
            ResourceExhausted: too many failures; `details["retry_after_ms"]` is the time to wait.
            InvalidArgument: the scheme is not offered, or its fields are missing or mistyped.
            Unavailable, or any other exception of the authenticator, which is not counted as a failed login.
        """
        scheme = params.get("scheme")
        if not isinstance(scheme, str):
            raise InvalidArgument("scheme: a str is needed")
        authenticator = self._authenticators.get(scheme)
        if authenticator is None:
            offered = ", ".join(sorted(self._authenticators))
            raise InvalidArgument(f"scheme: not offered here; use one of: {offered}")
        name = self._namers[scheme](params, channel)
        if wait_ms is None:
            checked = self.throttle.check(name, address, now)
            if not isinstance(checked, int):
                return self._open_later(checked, params, address, now, channel)
            wait_ms = checked
        if wait_ms or self._pending_all[_ALL]:
            self._admit(wait_ms, name, address)
        try:
            answer = authenticator.authenticate(params, address, channel)
        except Exception as error:  # an application's authenticator may raise anything
            self._count_failed(error, scheme)
            raise
        if isinstance(answer, Identity):
            self.throttle.succeeded(name, address, now)
            self.accepted[scheme] += 1
            return answer
        if answer is None:
            return self._refused(scheme, name, address, now)
        return self._when_decided(answer, scheme, name, address, now)

    async def _open_later(
        self,
        wait_ms: Awaitable[int],
        params: Mapping[str, Any],
        address: str,
        now: float,
        channel: Channel,
    ) -> Identity:
        """Open a session whose throttle must be awaited."""
        answer = self.open(params, address, now, channel, await wait_ms)
        return answer if isinstance(answer, Identity) else await answer

    async def _when_decided(
        self, answer: Awaitable[Identity | None], scheme: str, name: str, address: str, now: float
    ) -> Identity:
        try:
            identity = await self._decision(name, address, answer)
        except Exception as error:  # an application's authenticator may raise anything
            self._count_failed(error, scheme)
            raise
        if identity is None:
            return await self._refused(scheme, name, address, now)
        self.throttle.succeeded(name, address, now)
        self.accepted[scheme] += 1
        return identity

    def _count_failed(self, error: Exception, scheme: str) -> None:
        if not isinstance(error, InvalidArgument):  # that is the client's mistake
            self.failed[scheme] += 1

    def _refused(self, scheme: str, name: str, address: str, now: float) -> Coroutine[Any, Any, NoReturn]:
        """Count a refused login. Raise its error, or return what raises it after another process has counted."""
        counted = self.throttle.failed(name, address, now)
        self.refused[scheme] += 1
        error = Unauthenticated("the login was not accepted; check the name, and the key or certificate")
        if counted is not None:
            return _raise_after(counted, error)
        raise error

    async def attach(
        self,
        key: str,
        user: str,
        signature: bytes,
        token: bytes,
        address: str,
        now: float,
        channel: Channel,
    ) -> None:
        """Check the proof of the key to which this user's session with this token is bound.

        Raises Unauthenticated and ResourceExhausted as `open`.
        """
        wait_ms = self.throttle.check(key, address, now)
        self._admit(wait_ms if isinstance(wait_ms, int) else await wait_ms, key, address)
        devices = self._devices
        if devices is None or not await self._decision(
            key, address, devices.attaches(key, user, signature, token, channel)
        ):
            counted = self.throttle.failed(key, address, now)
            self.refused[ATTACH] += 1
            if counted is not None:
                await counted
            raise Unauthenticated(
                "the key was not proved; sign for this connection, with the key of the session"
            )
        self.throttle.succeeded(key, address, now)
        self.accepted[ATTACH] += 1

    async def admit_unnamed(self, address: str, now: float) -> None:
        """Admit an attempt that names no user, such as a request with a token. Raises ResourceExhausted.

        Report a refused one to `refuse_unnamed`.
        """
        wait_ms = self.throttle.check("", address, now)
        wait_ms = wait_ms if isinstance(wait_ms, int) else await wait_ms
        if wait_ms:
            self.throttled += 1
            raise ResourceExhausted("too many refused attempts; wait", {"retry_after_ms": wait_ms})

    async def refuse_unnamed(self, address: str, now: float) -> None:
        """Count a refused attempt for its address."""
        counted = self.throttle.failed("", address, now)
        if counted is not None:
            await counted

    @contextmanager
    def opening(self, fields: Mapping[str, Any], channel: Channel, user: str) -> Iterator[None]:
        """Count a login until the session of the user is open, if the fields have named no user.

        Raises ResourceExhausted if as many of this user are being opened as may be.
        """
        if fields["scheme"] not in self.external or self.user_named(fields, channel):
            yield
            return
        if not self._opening_users.add(user, MAX_PENDING):
            self._refuse_for_now(_RETRY_PENDING_MS)
        try:
            yield
        finally:
            self._opening_users.remove(user)

    def is_gone(self, key: str) -> bool:
        """Return whether a key has been removed, so that no session may be opened with it."""
        return self._devices is not None and self._devices.is_gone(key)

    async def _decision(self, name: str, address: str, answer: Awaitable[Decision]) -> Decision:
        """Await the authenticator's answer. Until then the login is pending."""
        network = network_of(address)
        self.pending += 1
        self._pending_all.add(_ALL)
        self._pending_users.add(name)
        self._pending_networks.add(network)
        try:
            return await answer
        finally:
            self.pending -= 1
            self._pending_all.remove(_ALL)
            self._pending_users.remove(name)
            self._pending_networks.remove(network)

    def _admit(self, retry_after_ms: int, name: str, address: str) -> None:
        if not retry_after_ms and self._is_full(name, address):
            retry_after_ms = _RETRY_PENDING_MS
        if retry_after_ms:
            self._refuse_for_now(retry_after_ms)

    def _refuse_for_now(self, retry_after_ms: int) -> NoReturn:
        self.throttled += 1
        raise ResourceExhausted("too many logins; wait", {"retry_after_ms": retry_after_ms})

    def _is_full(self, name: str, address: str) -> bool:
        """Return whether as many logins are pending as may be: of the user, of the address or in all."""
        pending = self._pending_all[_ALL]
        return pending > 0 and (
            pending >= self.max_pending
            or (name != "" and self._pending_users[name] >= MAX_PENDING)
            or self._pending_networks[network_of(address)] * PENDING_SHARE >= self.max_pending
        )


async def _raise_after(counted: Awaitable[None], error: Unauthenticated) -> NoReturn:
    """Refuse a login when its failure has been counted, so that the next attempt meets the delay."""
    await counted
    raise error


# --- authenticators of the application -----------------------------------------------------------------------


_UNDECIDED: Final = frozenset({Code.INVALID_ARGUMENT, Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED})
"""Errors that do not refuse the login; the client gets them as they are."""

MAX_MESSAGES: Final = 64
"""Messages of an exception, its causes and members that are searched. With more of them it is replaced."""

MASKED_FROM: Final = 4
"""Values of this length and above are masked in the log: shorter ones are no secrets, and would hide words."""


@dataclass(frozen=True, slots=True, eq=False)
class ApplicationAuthenticator:
    """An authenticator of the application.

    `timeout` returns the seconds that it may take. `on_refused` is called with the scheme, the reason and the
    client's address, `on_timeout` with the scheme and the address.
    """

    authenticator: Authenticator
    timeout: Callable[[], float]
    on_refused: Callable[[str, str, str], None]
    on_timeout: Callable[[str, str], None]

    @property
    def scheme(self) -> str:
        return self.authenticator.scheme

    def user_named(self, params: Mapping[str, Any], channel: Channel) -> str:
        """Return the name for which failures are counted, or an empty text."""
        user_named = getattr(self.authenticator, "user_named", user_in)
        name: object = user_named(params, channel)
        return name[:MAX_USER] if isinstance(name, str) else ""

    def authenticate(
        self, params: Mapping[str, Any], address: str, channel: Channel = NO_CHANNEL
    ) -> Identity | Awaitable[Identity | None] | None:
        try:
            answer = self.authenticator.authenticate(params, address, channel)
        except CallError as error:
            self._refused(error, params, address)
            return None
        except Exception as error:
            self._raise(error, params)
        if isawaitable(answer):
            return self._wait_for(answer, params, address)
        return check_identity(answer, self.scheme)

    async def _wait_for(
        self, answer: Awaitable[Identity | None], params: Mapping[str, Any], address: str
    ) -> Identity | None:
        limit = asyncio.timeout(self.timeout())
        try:
            async with limit:
                return check_identity(await answer, self.scheme)
        except CallError as error:
            self._refused(error, params, address)
            return None
        except Exception as error:
            if not limit.expired():
                self._raise(error, params)
            self.on_timeout(self.scheme, address)
            raise Unavailable("the login takes too long; try again") from None

    @staticmethod
    def _raise(error: Exception, params: Mapping[str, Any]) -> NoReturn:
        """Raise an unexpected exception, whose messages are logged."""
        replaced = without_fields(error, params)
        if replaced is None:
            raise error
        raise replaced from replaced.__cause__

    def _refused(self, error: CallError, params: Mapping[str, Any], address: str) -> None:
        if error.code in _UNDECIDED:
            raise error
        self.on_refused(self.scheme, mask_fields(str(error), params), address)


def mask_fields(text: str, params: Mapping[str, Any]) -> str:
    """Return a text without the values of a login's fields."""
    for name, value in params.items():
        if name != "scheme" and isinstance(value, str) and len(value) >= MASKED_FROM:
            text = text.replace(value, "***").replace(repr(value)[1:-1], "***")
    return text


def without_fields(error: BaseException, params: Mapping[str, Any]) -> RuntimeError | None:
    """Return what to log in place of an exception whose messages have values of a login's fields, if any has."""
    texts = [*islice(_messages(error), MAX_MESSAGES + 1)]
    if len(texts) <= MAX_MESSAGES and all(mask_fields(text, params) == text for text in texts):
        return None
    replaced: RuntimeError | None = None
    for each in reversed([*_chain(error)]):
        text = f"{type(each).__name__}: {mask_fields(str(each), params)}"
        effect = RuntimeError(text).with_traceback(each.__traceback__)
        effect.__cause__ = replaced
        replaced = effect
    return replaced


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    for _ in range(MAX_EXCEPTIONS):  # as many as the log shows
        if error is None:
            return
        yield error
        error = error.__cause__ or error.__context__


def _messages(error: BaseException) -> Iterator[str]:
    """Yield what the log shows of an exception, of its causes and of the members of groups."""
    for each in _chain(error):
        yield str(each)
        yield from getattr(each, "__notes__", ())
        for member in getattr(each, "exceptions", ()):
            yield from _messages(member)
