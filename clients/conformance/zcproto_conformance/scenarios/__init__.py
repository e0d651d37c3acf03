"""The scenarios by subject: with the scripted server, and with the real one."""

from __future__ import annotations

from zcproto_conformance.check import Check
from zcproto_conformance.scenarios import (
    calls,
    devices,
    durable,
    framing,
    freshness,
    goaway,
    pending,
    real_server,
    server_calls,
    sessions,
    stream_ends,
    streams,
    trust,
    welcome,
)

_SUBJECTS = (
    trust,
    welcome,
    framing,
    freshness,
    calls,
    goaway,
    sessions,
    devices,
    streams,
    stream_ends,
    durable,
    server_calls,
    pending,
)


def scripted() -> list[Check]:
    """Return the checks with the scripted server, in order."""
    return [check for subject in _SUBJECTS for check in subject.scenario.checks]


def with_real_server() -> list[Check]:
    """Return the checks with the real server, in order."""
    return list(real_server.scenario.checks)
