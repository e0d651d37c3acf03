"""What is done to the store, and how it is made good again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Final, NamedTuple

from bench.outages.valkey import Valkey, Way

SLOW_S: Final = 1.0
SLUGGISH_S: Final = 0.1
"""Each way: the store answers within its timeout, but barely."""

Deed = Callable[[Valkey, Way], Coroutine[Any, Any, None]]


class Harm(NamedTuple):
    """One kind of outage."""

    name: str
    title: str
    begin: Deed
    end: Deed
    through_way: bool = False
    """Whether the servers reach the store by a link that can be hurt, instead of directly."""
    refuses: bool = True
    """Whether openings must be refused meanwhile."""


def by_thread(*deeds: Callable[[Valkey], None]) -> Deed:
    """Things that block, one after the other, while the load goes on."""

    async def do(valkey: Valkey, way: Way) -> None:
        for deed in deeds:
            await asyncio.to_thread(deed, valkey)

    return do


def delay(seconds: float) -> Deed:
    async def do(valkey: Valkey, way: Way) -> None:
        way.delay_s = seconds

    return do


async def cut(valkey: Valkey, way: Way) -> None:
    way.cut()


async def mend(valkey: Valkey, way: Way) -> None:
    way.mend()


HARMS: Final = (
    Harm("killed", "killed", by_thread(Valkey.kill), by_thread(Valkey.start)),
    Harm("hung", "hung (SIGSTOP)", by_thread(Valkey.hang), by_thread(Valkey.go_on)),
    Harm("slow", f"slow ({SLOW_S:g} s each way)", delay(SLOW_S), delay(0.0), through_way=True),
    Harm(
        "sluggish",
        f"slow ({SLUGGISH_S:g} s each way)",
        delay(SLUGGISH_S),
        delay(0.0),
        through_way=True,
        refuses=False,
    ),
    Harm(
        "emptied",
        "restarted empty",
        by_thread(Valkey.kill, Valkey.forget, Valkey.start),
        by_thread(),
        refuses=False,
    ),
    Harm(
        "lost",
        "killed, later restarted empty",
        by_thread(Valkey.kill, Valkey.forget),
        by_thread(Valkey.start),
    ),
    Harm("read_only", "read-only", by_thread(Valkey.be_replica), by_thread(Valkey.be_primary)),
    Harm("cut_off", "cut off", cut, mend, through_way=True),
)
