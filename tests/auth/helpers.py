"""Helpers of the tests of logins."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from zcproto.auth import Identity, Login
from zcproto.auth.directory import Directory
from zcproto.auth.files import Entry, TableFile
from zcproto.auth.identity import NO_CHANNEL, Channel
from zcproto.sessions import token_from_text, token_text

DIGEST = token_text(bytes(range(32)))
VALID_NAMES = [
    "alice",
    "a",
    "x" * 128,
    "Alice-2_b",
    "alice@example.org",
    "a.b",
    "two words",
    'quo"te',
    "back\\slash",
    "'single'",
    "[users.bob]",
    "#hash",
    "Zoë",
    "日本",
    "😀",
    "0",
    "true",
]


def digest_of(key: str) -> bytes:
    raw = token_from_text(key)
    assert raw is not None
    return sha256(raw).digest()


async def decision(answer: Identity | Awaitable[Identity | None] | None) -> Identity | None:
    """Return the answer of an authenticator, awaited if necessary."""
    return answer if answer is None or isinstance(answer, Identity) else await answer


def directory(file: TableFile[Entry]) -> Directory[Entry]:
    """Return the entries of a file, none of which has a session to end."""

    async def end_none(name: str, entry: Entry) -> int:
        return 0

    return Directory(file, on_gone=end_none)


class FunctionAuthenticator:
    """A scheme decided by a function of the fields and the address."""

    def __init__(
        self,
        scheme: str,
        function: Callable[[Mapping[str, Any], str], Identity | Awaitable[Identity | None] | None],
    ) -> None:
        self.scheme = scheme
        self._function = function

    def authenticate(
        self, params: Mapping[str, Any], address: str, channel: Channel = NO_CHANNEL
    ) -> Identity | Awaitable[Identity | None] | None:
        return self._function(params, address)


class FakeLog:
    """Records the names of events."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def error(self, event: str, **fields: Any) -> None:
        self.events.append(event)

    info = error


def write(path: Path, text: str | bytes, mode: int = 0o600) -> None:
    """Replace a file in one step, like an editor."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    new = path.with_name("editor")
    new.write_bytes(text.encode() if isinstance(text, str) else text)
    new.chmod(mode)
    new.replace(path)


async def identified(
    login: Login, params: Mapping[str, Any], address: str, now: float, channel: Channel = NO_CHANNEL
) -> Identity:
    """Return the user of a login, awaited if necessary."""
    opening = login.open(params, address, now, channel)
    return opening if isinstance(opening, Identity) else await opening
