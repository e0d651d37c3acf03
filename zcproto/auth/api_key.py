"""The scheme `api_key`: a user's name and a key of 32 random bytes, as text of 43 characters.

What this file decides: whether the key is the user's.

Rules:
- An unknown user, a wrong key and a text that is no key take the same steps: one digest, one comparison.
- While the file of users does not change, `authenticate` answers at once: nearly every login is one of these.
- A key that was good by a look at the file a moment ago is good: in a crowd most logins need no look of their own.
  One that is not good is never refused without a look, so that a new user is known at once.

It must not know: how often someone tried.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from hmac import compare_digest
from typing import Any, Final

from zcproto.auth.current_users import CurrentUsers
from zcproto.auth.identity import MAX_USER, NO_CHANNEL, Channel, Identity
from zcproto.auth.users import UserFile
from zcproto.common.clock import Entropy, system_clock, system_entropy
from zcproto.errors import ConfigError, InvalidArgument
from zcproto.sessions.token import DIGEST_SIZE, TOKEN_SIZE, digest_of, token_from_text

MAX_KEY: Final = 128
"""Longest text taken for a key, in characters: room for a typing error, no more."""

LOOK_HOLDS_S: Final = 0.01
"""Seconds for which a look at the file is good enough to let somebody in. Whoever loses the right to log in by a
change of the file loses the sessions of these seconds as well, when the change is seen (auth/user_directory.py)."""

_FIELDS: Final = frozenset({"scheme", "client", "user", "key"})
_NO_KEY: Final = bytes(TOKEN_SIZE)


class ApiKeyAuthenticator:
    """Checks API keys against a file of users.

    `on_fault` and `on_recovered` are for CurrentUsers, which `users` is for other authenticators to share. `now`
    gives monotonic seconds.
    """

    scheme: Final = "api_key"

    __slots__ = ("_looked_until", "_nobody", "_now", "users")

    def __init__(
        self,
        users: UserFile,
        *,
        on_fault: Callable[[ConfigError], None],
        on_recovered: Callable[[], None] | None = None,
        entropy: Entropy = system_entropy,
        now: Callable[[], float] = system_clock.now,
    ) -> None:
        self.users: Final = CurrentUsers(users, on_fault=on_fault, on_recovered=on_recovered)
        self._nobody = entropy(DIGEST_SIZE)  # what unknown users are compared with; no key has this digest
        self._now = now
        self._looked_until = 0.0

    def authenticate(
        self, params: Mapping[str, Any], address: str, channel: Channel = NO_CHANNEL
    ) -> Identity | Awaitable[Identity | None] | None:
        user, key = _fields(params)
        now = self._now()
        if now < self._looked_until:
            identity = self._identity(user, key)
            if identity is not None:
                return identity
        if self.users.changed():
            return self._when_read(user, key)
        self._looked_until = now + LOOK_HOLDS_S
        return self._identity(user, key)

    async def _when_read(self, user: str, key: str) -> Identity | None:
        await self.users.refresh()
        return self._identity(user, key)

    def _identity(self, user: str, key: str) -> Identity | None:
        known = self.users.known(user)
        secret = token_from_text(key)
        digest = digest_of(_NO_KEY if secret is None else secret)
        fits = compare_digest(digest, self._nobody if known is None else known.digest)
        if not fits or known is None or secret is None:
            return None
        return Identity(user, known.operator)


def _fields(params: Mapping[str, Any]) -> tuple[str, str]:
    user, key = params.get("user"), params.get("key")
    if not isinstance(user, str) or not 0 < len(user) <= MAX_USER:
        raise InvalidArgument(f"user: the scheme api_key needs a str of 1 to {MAX_USER} characters")
    if not isinstance(key, str) or len(key) > MAX_KEY:
        raise InvalidArgument(f"key: the scheme api_key needs a str of at most {MAX_KEY} characters")
    if not _FIELDS.issuperset(params):
        raise InvalidArgument("the scheme api_key takes user and key, and nothing else")
    return user, key
