"""What each store of runs does: random operations give the same answers as `RunTable`."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from zcproto.errors import CallError
from zcproto.runs.log import Gap, Opening, RunInfo, RunKey, RunLimits, RunState, RunTable, Superseded
from zcproto.runs.shared import RunCarrier

LIMITS = RunLimits(items=6, bytes=1_000, runs_per_user=3, bytes_per_user=1_600, keep_s=60)
KEYS = [RunKey(user, id_) for user in ("ada", "bob") for id_ in "abcdefghijkl"]


def info_of(number: int) -> RunInfo:
    """Return what is fixed of a run, with a generation of this number."""
    is_bound = number % 5 == 4
    return RunInfo(
        *("chat", b"digest", "session", "192.0.2.1", is_bound, 1, None, "owner", b"%d" % number, number)
    )


class Reference:
    """A table as a carrier, whose time is given."""

    def __init__(self) -> None:
        self.table = RunTable(LIMITS, may_lag=True)
        self.now = 0.0

    async def call(self, name: str, *arguments: Any) -> Any:
        operation = getattr(self.table, name)
        if name == "append":
            key, info, *rest, taken = arguments
            return operation(key, info.generation, *rest, self.now, taken)
        if name in ("open", "restore", "detach", "forget"):
            return operation(*arguments, self.now)
        return operation(*arguments)


async def outcome(call: Any) -> Any:
    """Return what can be seen of an operation: its result or its error."""
    try:
        return _plain(await call)
    except CallError as error:
        return type(error).__name__, error.details
    except (Gap, Superseded) as error:
        return type(error).__name__, getattr(error, "next", None)


def _plain(value: Any) -> Any:
    if isinstance(value, RunState):
        return [_plain(getattr(value, name)) for name in RunState.__slots__]
    if isinstance(value, RunInfo):
        return value
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(each) for each in value]
    return value


async def agree(carrier: RunCarrier, seed: int, steps: int) -> int:
    """Do random operations with a carrier and the reference. Return how many had a result rather than an error."""
    chance, reference = random.Random(seed), Reference()
    infos = [info_of(number) for number in range(6)]
    done = 0
    for step in range(steps):
        key = chance.choice(KEYS)
        attachment, order = f"p.{chance.randrange(4)}", chance.choice([0, 0, 0, chance.randrange(9)])
        position = chance.choice([0, 0, chance.randrange(12)])
        info = chance.choice(infos)
        known = dict(reference.table.runs()).get(key)
        if known is not None and chance.random() < 0.8:  # else most have no effect
            info = known.info
            attachment, position = known.attachment, chance.randint(known.first, known.next)
        bodies = [b"%d " % step * chance.randrange(1, 60) for _ in range(chance.randrange(4))]
        end = (chance.choice([0, 2]), b"end") if chance.random() < 0.1 else None
        taken = (attachment, position, order) if chance.random() < 0.5 else None
        lost = RunState(
            info, taken=chance.randrange(10), attachment=attachment, order=order, is_attached=True
        )
        name, arguments = chance.choices(
            [
                ("open", (key, Opening("chat", b"digest", 0, attachment, True, info))),
                ("open", (key, Opening("chat", None, position, attachment, chance.random() < 0.5))),
                ("open", (key, Opening(chance.choice(["chat", "x"]), b"other", 0, attachment, True, info))),
                ("append", (key, info, known.next if known else position, bodies, end, taken)),
                ("append", (key, info, position, bodies, end, taken)),
                ("read", (key, attachment, position, chance.randrange(1, 5), chance.randrange(900), order)),
                ("take", (key, attachment, position, order)),
                ("detach", (key, attachment)),
                ("cancel", (key, "caller")),
                ("runs", (key.user,)),
                ("forget", (key.user,)),
                ("restore", (key, lost)),
            ],
            [20, 8, 2, 40, 10, 30, 20, 4, 2, 4, 0.3, 4],
        )[0]
        expected = await outcome(reference.call(name, *arguments))
        found = await outcome(getattr(carrier, name)(*arguments))
        assert found == expected, f"step {step}: {name}{arguments}"
        done += expected is not None and not (isinstance(expected, tuple))
    return done
