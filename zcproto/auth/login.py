"""Run a login through its scheme, the throttle and the authenticator.

Rules:
- Failures are counted for the user named by the fields; with the scheme `tls`, by the client's certificate.
  Failures of a device, opening or attaching sessions, are counted for the device.
- All failed logins get the same error, whatever the cause (zcp1.md, section 9.4).
- A login refused by the throttle is not examined; its error carries the time to wait.
- At most 16 logins of one user are pending at once, so that concurrent guesses to a slow authenticator cannot all
  pass before the first one has failed.
- An exception of the authenticator does not count as a failed login.

Must not know: sessions, connections, how a scheme decides.
"""

from __future__ import annotations

from collections.abc import Awaitable, Coroutine, Iterable, Mapping
from typing import Any, Final, TypeVar

from zcproto.auth.identity import MAX_USER, NO_CHANNEL, Authenticator, Channel, Identity
from zcproto.auth.schemes import CertificateAuthenticator, DeviceAuthenticator
from zcproto.auth.throttle import Throttle
from zcproto.errors import InvalidArgument, ResourceExhausted, Unauthenticated
from zcproto.sessions.session import DEVICE_KEY

MAX_PENDING: Final = 16
"""Logins of one user that may wait for their authenticator at the same time."""

ATTACH: Final = "session.attach"
"""Counts proofs of a device's key; listed beside the schemes."""

_RETRY_PENDING_MS: Final = 1000

Decision = TypeVar("Decision")


class Login:
    """Opens and attaches sessions. One authenticator for each scheme.

    Counts logins: `accepted` and `refused` by scheme, and `throttled`.
    """

    def __init__(self, authenticators: Iterable[Authenticator], throttle: Throttle) -> None:
        self._authenticators: dict[str, Authenticator] = {}
        self._devices: DeviceAuthenticator | None = None
        for authenticator in authenticators:
            if authenticator.scheme in self._authenticators:
                raise ValueError(f"two authenticators for the scheme {authenticator.scheme!r}")
            self._authenticators[authenticator.scheme] = authenticator
            if isinstance(authenticator, DeviceAuthenticator):
                self._devices = authenticator
        self.throttle = throttle
        self._pending: dict[str, int] = {}
        self.throttled = 0
        self.accepted = dict.fromkeys([*self._authenticators, ATTACH], 0)
        self.refused = dict.fromkeys(self.accepted, 0)

    @property
    def schemes(self) -> tuple[str, ...]:
        """The schemes that `session.open` accepts."""
        return tuple(self._authenticators)

    def open(
        self, params: Mapping[str, Any], address: str, now: float, channel: Channel = NO_CHANNEL
    ) -> Identity | Coroutine[Any, Any, Identity]:
        """Return the user of a login by the fields of `session.open` and the connection; a coroutine if the
        authenticator has to wait.

        `now` is monotonic seconds.

        Raises, at once or later:
            Unauthenticated: the login failed, whatever the cause.
            ResourceExhausted: too many failures; `details["retry_after_ms"]` is the time to wait.
            InvalidArgument: the scheme is not offered, or its fields are missing or mistyped.
        """
        authenticator = self._authenticator(params)
        if isinstance(authenticator, CertificateAuthenticator):
            name = authenticator.user_named(channel)
        else:
            name = _name(params)
        self._admit(name, address, now)
        answer = authenticator.authenticate(params, address, channel)
        if answer is None or isinstance(answer, Identity):
            return self._decided(answer, authenticator.scheme, name, address, now)
        return self._when_decided(answer, authenticator.scheme, name, address, now)

    async def _when_decided(
        self, answer: Awaitable[Identity | None], scheme: str, name: str, address: str, now: float
    ) -> Identity:
        return self._decided(await self._decision(name, answer), scheme, name, address, now)

    def _decided(
        self, identity: Identity | None, scheme: str, name: str, address: str, now: float
    ) -> Identity:
        if identity is None:
            self.throttle.failed(name, address, now)
            self.refused[scheme] += 1
            raise Unauthenticated("the login was not accepted; check the name, and the key or certificate")
        self.throttle.succeeded(name, address, now)
        self.accepted[scheme] += 1
        return identity

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
        self._admit(key, address, now)
        devices = self._devices
        if devices is None or not await self._decision(
            key, devices.attaches(key, user, signature, token, channel)
        ):
            self.throttle.failed(key, address, now)
            self.refused[ATTACH] += 1
            raise Unauthenticated(
                "the key was not proved; sign for this connection, with the key of the session"
            )
        self.throttle.succeeded(key, address, now)
        self.accepted[ATTACH] += 1

    def is_gone(self, key: str) -> bool:
        """Return whether a key has been removed, so that no session may be opened with it."""
        return self._devices is not None and self._devices.is_gone(key)

    async def _decision(self, name: str, answer: Awaitable[Decision]) -> Decision:
        """Await the authenticator's answer. Until then the login is pending."""
        self._pending[name] = self._pending.get(name, 0) + 1
        try:
            return await answer
        finally:
            pending = self._pending.pop(name) - 1
            if pending:
                self._pending[name] = pending

    def _authenticator(self, params: Mapping[str, Any]) -> Authenticator:
        scheme = params.get("scheme")
        if not isinstance(scheme, str):
            raise InvalidArgument("scheme: a str is needed")
        authenticator = self._authenticators.get(scheme)
        if authenticator is None:
            offered = ", ".join(sorted(self._authenticators))
            raise InvalidArgument(f"scheme: not offered here; use one of: {offered}")
        return authenticator

    def _admit(self, name: str, address: str, now: float) -> None:
        retry_after_ms = self.throttle.check(name, address, now)
        if not retry_after_ms and name and self._pending.get(name, 0) >= MAX_PENDING:
            retry_after_ms = _RETRY_PENDING_MS
        if retry_after_ms:
            self.throttled += 1
            raise ResourceExhausted("too many logins; wait", {"retry_after_ms": retry_after_ms})


def _name(params: Mapping[str, Any]) -> str:
    """Return the name given by the fields, for which failures are counted, or an empty text."""
    user, device = params.get("user"), params.get("device")
    if isinstance(user, str):
        return user[:MAX_USER]
    if isinstance(device, str):
        return DEVICE_KEY + device[:MAX_USER]
    return ""
