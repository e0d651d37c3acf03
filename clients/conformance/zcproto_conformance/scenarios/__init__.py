"""The conversations with the scripted server, by subject."""

from __future__ import annotations

from zcproto_conformance.check import Check
from zcproto_conformance.scenarios import (
    calls,
    devices,
    framing,
    freshness,
    goaway,
    greeting,
    sessions,
    trust,
)

_SUBJECTS = (trust, greeting, framing, freshness, calls, goaway, sessions, devices)


def checks() -> list[Check]:
    """All of them, in their order."""
    return [check for subject in _SUBJECTS for check in subject.scenario.checks]
