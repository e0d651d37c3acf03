"""Faulty clients: for each scripted scenario and some vectors, the one fault that they exist to detect.

    python -m tests.conformance.faults

runs every scenario against the Python client with its fault applied. A scenario that passes all the same proves
nothing and is reported.
"""

from __future__ import annotations

from typing import Final

from tests.conformance.faults import calls, connections, durable, pending, server_calls, streams
from tests.conformance.faults.mutation import Fault

_TABLES: Final = (
    connections.TRUST,
    connections.WELCOME,
    connections.FRAMING,
    connections.FRESHNESS,
    calls.CALLS,
    calls.GOAWAY,
    calls.SESSIONS,
    calls.DEVICES,
    streams.STREAMS,
    durable.DURABLE,
    server_calls.SERVER_CALLS,
    pending.PENDING,
)

FAULTS: Final[dict[str, Fault]] = {
    f"scripted/{name}": fault for table in _TABLES for name, fault in table.items()
} | {f"vectors/arrival/{name}": fault for name, fault in connections.ARRIVAL.items()}


def fault_of(check: str) -> Fault:
    """Return the fault that a check exists to detect. Raises KeyError if it has none."""
    return FAULTS[check]
