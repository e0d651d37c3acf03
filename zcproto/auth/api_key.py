"""Authenticate the scheme `api_key`: a user's name and a key of 32 random bytes, as text of 43 characters.

Decides: whether the key is the user's.

Rules:
- An unknown user, a wrong key and a malformed key take the same steps: one digest, one comparison.
- `authenticate` does not suspend unless the file of users has changed.
- A valid key is accepted without a look at the file if the last look is recent: concurrent logins share one. A key
  is never refused without a look, so that a new user is accepted immediately.

Must not know: how many attempts there were.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from hmac import compare_digest
from typing import Any, Final

from zcproto.auth.identity import MAX_USER, NO_CHANNEL, Channel, Identity
from zcproto.auth.users import CurrentUsers
from zcproto.common.clock import Entropy, system_clock, system_entropy
from zcproto.errors import InvalidArgument
from zcproto.sessions.token import DIGEST_SIZE, TOKEN_SIZE, digest_of, token_from_text

MAX_KEY: Final = 128
"""Longest text accepted as a key, in characters: room for a typing error."""

LOOK_HOLDS_S: Final = 0.01
"""Seconds for which one look at the file suffices to accept keys. A session that a removed user opens within them
ends when directory.py finds the change."""

_FIELDS: Final = frozenset({"scheme", "client", "user", "key"})
_NO_KEY: Final = bytes(TOKEN_SIZE)


class ApiKeyAuthenticator:
    """Checks API keys against a file of users. `now` returns monotonic seconds."""

    scheme: Final = "api_key"

    def __init__(
        self,
        users: CurrentUsers,
        *,
        entropy: Entropy = system_entropy,
        now: Callable[[], float] = system_clock.now,
    ) -> None:
        self._users = users
        self._decoy = entropy(DIGEST_SIZE)  # compared for unknown users; no key has this digest
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
        if self._users.changed():
            return self._after_reading(user, key)
        self._looked_until = now + LOOK_HOLDS_S
        return self._identity(user, key)

    async def _after_reading(self, user: str, key: str) -> Identity | None:
        await self._users.refresh()
        return self._identity(user, key)

    def _identity(self, user: str, key: str) -> Identity | None:
        known = self._users.known(user)
        secret = token_from_text(key)
        digest = digest_of(_NO_KEY if secret is None else secret)
        matches = compare_digest(digest, self._decoy if known is None else known.digest)
        if not matches or known is None or secret is None:
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
