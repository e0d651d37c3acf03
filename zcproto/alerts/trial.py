"""A test alert, sent to each sink once: for `zcproto alert test`, with a server and without."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from zcproto.alerts import CATALOGUE, Alert, AlertKind, Message, Phase
from zcproto.alerts.sinks import Sink, Undelivered
from zcproto.common.clock import Clock
from zcproto.common.text import escape_text

TITLE: Final = "a test of zcproto: alerts arrive here"
_MS: Final = 1000


async def try_sinks(sinks: Iterable[Sink], clock: Clock, origin: str, source: str) -> list[dict[str, Any]]:
    """Try each sink once, one after the other; what came of it."""
    body = _message(clock.wall()).as_json(origin, source)
    results = []
    for sink in sinks:
        began = clock.now()
        try:
            said, arrived = await sink.deliver(body), True
        except Undelivered as error:
            said, arrived = str(error), False
        results.append(
            {
                "sink": sink.name,
                "where": sink.where,
                "arrived": arrived,
                "ms": round((clock.now() - began) * _MS),
                "said": escape_text(said),
            }
        )
    return results


def _message(wall: int) -> Message:
    kind = AlertKind.TEST
    return Message(1, Phase.BEGAN, Alert(kind, "", CATALOGUE[kind].severity, TITLE, {}, wall, wall, None, 1))
