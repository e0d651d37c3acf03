"""Send a test alert to each sink once, for `zcproto alert test` with and without a running server."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from zcproto.alerts import CATALOGUE, Alert, AlertKind, Message, Phase
from zcproto.alerts.sinks import Sink, Undelivered
from zcproto.common.clock import Clock
from zcproto.common.text import escape_text

TITLE: Final = "test alert of zcproto: alerts are delivered here"
_MS: Final = 1000


async def try_sinks(sinks: Iterable[Sink], clock: Clock, origin: str, source: str) -> list[dict[str, Any]]:
    """Deliver a test alert to each sink in turn. Return the results as JSON fields."""
    body = _message(clock.wall()).as_json(origin, source)
    results = []
    for sink in sinks:
        began = clock.now()
        try:
            answer, arrived = await sink.deliver(body), True
        except Undelivered as error:
            answer, arrived = str(error), False
        results.append(
            {
                "sink": sink.name,
                "where": sink.where,
                "arrived": arrived,
                "ms": round((clock.now() - began) * _MS),
                "said": escape_text(answer),
            }
        )
    return results


def _message(wall: int) -> Message:
    kind = AlertKind.TEST
    return Message(1, Phase.BEGAN, Alert(kind, "", CATALOGUE[kind].severity, TITLE, {}, wall, wall, None, 1))
