"""The conversations with the scripted server, by subject."""

from __future__ import annotations

from zcproto.conformance.check import Check
from zcproto.conformance.talks import calls, devices, framing, freshness, going, greeting, sessions, trust

_SUBJECTS = (trust, greeting, framing, freshness, calls, going, sessions, devices)


def checks() -> list[Check]:
    """All of them, in their order."""
    return [check for subject in _SUBJECTS for check in subject.talk.checks]
