"""What a check is, and how one fails."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from zcproto.conformance.stage import Stage

Talk = Callable[["Stage"], Awaitable[None]]

VECTORS: Final = "vectors"
SCRIPTED: Final = "scripted"
SERVER: Final = "server"
PARTS: Final = (VECTORS, SCRIPTED, SERVER)


class Broken(Exception):
    """The client did not do what the protocol demands. `str()` says what was expected and what came."""


class Unsupported(Broken):
    """The client's program says that it cannot do a step."""


class KitError(Exception):
    """The kit cannot be run, whatever the client does."""


@dataclass(frozen=True, slots=True)
class Check:
    """One check. `name` begins with its part; `proves` is a section of spec/zcp1.md and its rule."""

    name: str
    proves: str
    run: Talk


class Talks:
    """The conversations of one file, in their order."""

    def __init__(self, part: str) -> None:
        self.part = part
        self.checks: list[Check] = []

    def __call__(self, name: str, proves: str) -> Callable[[Talk], Talk]:
        """Register a conversation."""

        def register(talk: Talk) -> Talk:
            self.checks.append(Check(f"{self.part}/{name}", proves, talk))
            return talk

        return register


def expect(condition: object, otherwise: str) -> None:
    """Raise Broken unless a condition holds."""
    if not condition:
        raise Broken(otherwise)
