"""How a check fails, and what stops the kit."""

from __future__ import annotations


class CheckFailed(Exception):
    """The client broke the protocol. The message has what was expected and what was received."""


class Unsupported(CheckFailed):
    """The client's program does not implement a step."""


class KitError(Exception):
    """The kit cannot run, regardless of the client's behaviour."""


def expect(condition: object, otherwise: str) -> None:
    """Raise CheckFailed with a message unless a condition holds."""
    if not condition:
        raise CheckFailed(otherwise)
