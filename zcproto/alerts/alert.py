"""Define an alert and the messages about it.

Rules: details are masked like values of the log, so no value contains a secret. All text is bounded and on one
line.
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
"""Maximum characters of the subject of an alert."""

MAX_TITLE: Final = 300
MAX_DETAILS: Final = 16
MAX_MESSAGE: Final = 8_192
"""Maximum bytes of a message; a longer one is sent without its details."""

FORMAT: Final = 1
"""Version of the JSON format. Fields may be added to a version; none changes its meaning."""


class Phase(Enum):
    """Phases of an alert."""

    BEGAN = "began"
    CHANGED = "changed"
    """The severity increased, or the subject changed."""
    REMINDER = "reminder"
    """The alert is still open after another `alerts.repeat`."""
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Alert:
    """A snapshot of an alert.

    `kind` and `about` identify it; raising the same again increments `count`. `about` is empty if the kind needs
    none. Times are milliseconds since the Unix epoch; `ended_at` is None while the alert is open. `is_many`
    marks the summary of all alerts of a kind that were too many to be sent one by one; its `about` is empty.
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
        """Return the JSON fields of the alert."""
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
    """A message about an alert. `number` increases by one per message of a process."""

    number: int
    phase: Phase
    alert: Alert

    def as_json(self, origin: str, source: str) -> bytes:
        """Return the message for a webhook or command as one line of ASCII.

        `origin` is random per process: with the number it forms a unique id, which stays the same when a message is
        retried. `source` names the server for people.
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
    """Return `text` escaped to one line and cut to `limit`."""
    return escape_text(escape_text(text, limit), limit)


def clean_details(details: Mapping[str, object]) -> dict[str, Loggable]:
    """Return the first details, masked and bounded."""
    return {name: loggable(name, value) for name, value in list(details.items())[:MAX_DETAILS]}
