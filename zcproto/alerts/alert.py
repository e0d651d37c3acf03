"""One alert, and the message that tells of it.

Rules: no value holds a secret: details go through the same sieve as the log. All text is bounded, and prints on
one line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from zcproto.alerts.kinds import AlertKind, Severity
from zcproto.common.text import escape_text
from zcproto.observe.values import Loggable, loggable

MAX_ABOUT: Final = 200
"""Characters of what an alert is about."""

MAX_TITLE: Final = 300
MAX_DETAILS: Final = 16
MAX_MESSAGE: Final = 8_192
"""Bytes of a message; a longer one keeps all but its details."""

FORMAT: Final = 1
"""The version of the JSON form. Fields may be added to a version; none changes its meaning."""


class Phase(Enum):
    """What a message says of its alert."""

    BEGAN = "began"
    CHANGED = "changed"
    """It has become graver, or there is something new to say."""
    REMINDER = "reminder"
    """It has lasted for another `alerts.repeat`."""
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Alert:
    """An alert as it is at one moment.

    `kind` and `about` together name it: two alerts with the same are one, which has come again. `about` is empty
    where a kind needs none. `count` is how often it came. Times are milliseconds since the Unix epoch; `ended_at`
    is None while it is open. `is_many` is for all alerts of a kind together that were too many to tell of each:
    `about` is empty then, too.
    """

    kind: AlertKind
    about: str
    severity: Severity
    title: str
    details: Mapping[str, Loggable]
    began_at: int
    last_at: int
    ended_at: int | None
    count: int
    is_many: bool = False

    def as_dict(self) -> dict[str, Any]:
        """What receivers, and people, are shown of it."""
        return {
            "kind": self.kind.value,
            "about": self.about,
            "severity": self.severity.word,
            "title": self.title,
            "details": dict(self.details),
            "began_at": self.began_at,
            "last_at": self.last_at,
            "ended_at": self.ended_at,
            "count": self.count,
            "many": self.is_many,
        }


@dataclass(frozen=True, slots=True)
class Message:
    """Something to tell of an alert. `number` grows by one from message to message of one process."""

    number: int
    phase: Phase
    alert: Alert

    def as_json(self, origin: str, source: str) -> bytes:
        """The message for a webhook or a command, one line of ASCII.

        `origin` is random and the process's own: with the number it makes an id that no other message has, and that
        stays the same when a message is sent again. `source` says which server it is, for people.
        """
        fields: dict[str, Any] = {
            "format": FORMAT,
            "id": f"{origin}-{self.number}",
            "phase": self.phase.value,
            "source": source,
            "alert": self.alert.as_dict(),
        }
        body = _encode(fields)
        if len(body) > MAX_MESSAGE:
            fields["alert"]["details"] = {"oversize": len(body)}
            body = _encode(fields)
        return body


def _encode(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, separators=(",", ":")).encode("ascii")


def clean_text(text: str, limit: int) -> str:
    """`text` on one line, and no longer than `limit`."""
    return escape_text(escape_text(text, limit), limit)


def clean_details(details: Mapping[str, object]) -> dict[str, Loggable]:
    """The first details, each fit to be told: nothing secret, nothing large."""
    return {name: loggable(name, value) for name, value in list(details.items())[:MAX_DETAILS]}
