"""Let a function of the application decide who may open a session."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from inspect import isawaitable, iscoroutinefunction
from typing import Any

from zcproto.app.context import Context
from zcproto.auth.identity import NO_CHANNEL, Channel, Identity, check_scheme
from zcproto.common.parameters import Signature

Answer = Identity | str | None


class CallableAuthenticator:
    """A scheme decided by a function, which gets the fields of a login by name.

        async def check(context: Context, user: str, password: str) -> str | None:
            known = await accounts.verify(user, password)
            return user if known else None

        zcproto.serve(app, authenticators=[zcproto.CallableAuthenticator("password", check)])

    Fields are checked against the annotations like parameters of a method. A parameter annotated `Context` receives
    the context of the login. The function returns the name of a user, an Identity, or None for a failed login. A
    plain function runs in the event loop and must not block, unless `thread` is True: then it runs in one of the
    server's threads, like a method. Failed logins are counted for the user whom the field `user_field` names; None
    counts them for the address alone.

    Raises ValueError for a malformed scheme, TypeError for parameters that cannot be checked.
    """

    def __init__(
        self,
        scheme: str,
        function: Callable[..., Answer | Awaitable[Answer]],
        *,
        user_field: str | None = "user",
        thread: bool = False,
    ) -> None:
        check_scheme(scheme)
        try:
            self._signature = Signature(function, injected=Context)
        except TypeError as error:
            raise TypeError(f"scheme {scheme}: {error}") from error
        if thread and iscoroutinefunction(function):
            raise TypeError(f"scheme {scheme}: thread=True is for def; use asyncio.to_thread in async def")
        self.scheme = scheme
        self._thread = thread
        self._function = function
        self._user_field = user_field

    def __repr__(self) -> str:
        return f"CallableAuthenticator({self.scheme!r})"

    def user_named(self, params: Mapping[str, Any], channel: Channel) -> str:
        """Return the name for which failures are counted, or an empty text."""
        user = None if self._user_field is None else params.get(self._user_field)
        return user if isinstance(user, str) else ""

    def authenticate(
        self, params: Mapping[str, Any], address: str, channel: Channel = NO_CHANNEL
    ) -> Identity | Awaitable[Identity | None] | None:
        signature = self._signature
        arguments = signature.bind({name: value for name, value in params.items() if name != "scheme"})
        if signature.injected is not None:
            arguments[signature.injected] = channel.context
        if self._thread:
            return _identity_later(
                channel.context.caller.run_in_thread(channel.context, self._function, arguments)
            )
        answer = self._function(**arguments)
        return _identity_later(answer) if isawaitable(answer) else _identity(answer)


async def _identity_later(answer: Awaitable[Answer]) -> Identity | None:
    return _identity(await answer)


def _identity(answer: Answer) -> Identity | None:
    """Return the identity that an answer stands for. The login checks it."""
    return Identity(answer) if isinstance(answer, str) else answer
