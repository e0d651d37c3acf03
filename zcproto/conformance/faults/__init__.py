"""Faulty clients: for each conversation with the scripted server the one fault that it is there to find.

    python -m zcproto.conformance.faults

runs every conversation against the Python client with just that fault in its code. A conversation that passes all
the same proves nothing, and is told.
"""

from __future__ import annotations

from typing import Final

from zcproto.conformance.faults import of_calls, of_connections
from zcproto.conformance.faults.mutate import Fault

_TABLES: Final = (
    of_connections.TRUST,
    of_connections.GREETING,
    of_connections.FRAMING,
    of_connections.FRESHNESS,
    of_calls.CALLS,
    of_calls.GOING,
    of_calls.SESSIONS,
    of_calls.DEVICES,
)

FAULTS: Final[dict[str, Fault]] = {
    f"scripted/{name}": fault for table in _TABLES for name, fault in table.items()
}


def fault_of(check: str) -> Fault:
    """The fault that a check is there to find. Raises KeyError if there is none."""
    return FAULTS[check]
