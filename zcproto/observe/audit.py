"""The audit trail: who did what, from where and with which outcome, as JSON lines of a fixed schema.

Decides: the form of a line, and its schema. The catalogue (`events`) decides which events are in the trail.

Rules:
- A line has `timestamp`, `event`, `outcome` and fields of its event; fields without a value are omitted.
- Values are masked and bounded like those of the log (`values`).

Must not know: where lines are written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from zcproto.observe.events import EVENTS, FIELDS, LogEvent
from zcproto.observe.values import MAX_ITEMS, MAX_TEXT, Loggable, line_within, loggable

MAX_AUDIT_LINE: Final = 16_384
"""Maximum characters of a line; a longer one is written without its longest values."""

_ADDED: Final = ("suppressed", "worker", "oversize")
"""Fields that the log adds to any event."""

_OWN: Final = ("timestamp", "event", "outcome")
_INTEGERS: Final = frozenset(
    {
        *("connections", "count", "cut_off", "days_left", "lines", "oversize", "pid", "port", "sessions"),
        *("suppressed", "threshold_days", "uid"),
    }
)
_NUMBERS: Final = frozenset({"seconds"})
_FLAGS: Final = frozenset({"all"})
_LISTS: Final = frozenset(
    {"added", "changed", "denied", "faults", "ids", "missing", "pins", "removed", "restart", "roles"}
)
_encode = json.JSONEncoder(separators=(",", ":")).encode


def audit_line(event: LogEvent, timestamp: str, values: Mapping[str, Any]) -> str:
    """Return the line of an event, with those of the values that its schema has."""
    head: dict[str, Loggable] = {"timestamp": timestamp, "event": event.name, "outcome": event.audit}
    fields = {
        name: loggable(name, values[name])
        for name in (*event.fields, *_ADDED)
        if values.get(name) is not None
    }
    line = line_within(MAX_AUDIT_LINE, head | fields, _encode)
    return line.replace("\x7f", "\\u007f") + "\n"


def audit_schema() -> dict[str, Any]:
    """Return the JSON Schema of a line."""
    audited = [event for event in EVENTS.values() if event.audit]
    used = {name for event in audited for name in event.fields}
    timestamp = {"type": "string", "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$"}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A line of the audit trail of zcproto",
        "type": "object",
        "required": list(_OWN),
        "properties": {"timestamp": timestamp, **{name: _schema_of(name) for name in _ADDED}},
        "oneOf": [
            {
                "description": event.meaning,
                "properties": {
                    "event": {"const": event.name},
                    "outcome": {"const": event.audit},
                    **{name: {"$ref": f"#/$defs/{name}"} for name in event.fields},
                },
            }
            for event in audited
        ],
        "unevaluatedProperties": False,
        "$defs": {name: _schema_of(name) for name in sorted(used)},
    }


def _schema_of(name: str) -> dict[str, Any]:
    return {**_type_of(name), "description": FIELDS[name]}


def _type_of(name: str) -> dict[str, Any]:
    if name in _INTEGERS:
        return {"type": "integer"}
    if name in _NUMBERS:
        return {"type": "number"}
    if name in _FLAGS:
        return {"type": "boolean"}
    text = {"type": "string", "maxLength": MAX_TEXT}
    return {"type": "array", "items": text, "maxItems": MAX_ITEMS} if name in _LISTS else text
