"""Small things that the tests of logins share."""

from __future__ import annotations

from collections.abc import Awaitable, Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar

from zcproto.auth import NO_CHANNEL, Channel, Identity, Login
from zcproto.sessions import token_text

T = TypeVar("T")

DIGEST = token_text(bytes(range(32)))


def drive(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that must never suspend, with no event loop there."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    coroutine.close()
    raise AssertionError("it suspended")


async def decision(answer: Identity | Awaitable[Identity | None] | None) -> Identity | None:
    """What an authenticator says, at once or in the end."""
    return answer if answer is None or isinstance(answer, Identity) else await answer


def write(path: Path, text: str | bytes, mode: int = 0o600) -> None:
    """Put a file there in one step, as an editor does."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    new = path.with_name("editor")
    new.write_bytes(text.encode() if isinstance(text, str) else text)
    new.chmod(mode)
    new.replace(path)


async def identified(
    login: Login, params: Mapping[str, Any], address: str, now: float, channel: Channel = NO_CHANNEL
) -> Identity:
    """Who logs in, at once or in the end."""
    opening = login.open(params, address, now, channel)
    return opening if isinstance(opening, Identity) else await opening
