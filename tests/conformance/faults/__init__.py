"""Faulty clients: for each conversation with the scripted server the one fault that it is there to find.

    python -m tests.conformance.faults

runs every conversation against the Python client with just that fault in its code. A conversation that passes all
the same proves nothing, and is told.
"""

from __future__ import annotations

from typing import Final

from tests.conformance.faults import calls, connections
from tests.conformance.faults.mutation import Fault

_TABLES: Final = (
    connections.TRUST,
    connections.GREETING,
    connections.FRAMING,
    connections.FRESHNESS,
    calls.CALLS,
    calls.GOING,
    calls.SESSIONS,
    calls.DEVICES,
)

FAULTS: Final[dict[str, Fault]] = {
    f"scripted/{name}": fault for table in _TABLES for name, fault in table.items()
}


def fault_of(check: str) -> Fault:
    """The fault that a check is there to find. Raises KeyError if there is none."""
    return FAULTS[check]
