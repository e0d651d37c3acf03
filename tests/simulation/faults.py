"""Faults that are planted in the product, by name. A simulation must find each: `--fault NAME`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from zcproto.server.idempotency import IdempotencyCache


def _ask_none() -> None:
    """A server runs a call with an idempotency key without a look at what other servers run."""

    async def claim(self: IdempotencyCache, name: Any, run: Any) -> None:
        return None

    IdempotencyCache._claim = claim


FAULTS: Final[dict[str, Callable[[], None]]] = {"claims_are_not_asked": _ask_none}
