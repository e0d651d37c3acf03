"""A fault for each scenario about pending calls."""

from __future__ import annotations

from typing import Final

from tests.conformance.faults.mutation import Fault, fault

_RUN_ONCE: Final = (
    "ClientCalls.receive",
    "if meta.deadline_ms is None:",
    "seen = decode_call.__dict__.setdefault('seen', set())\n"
    "        if pending in seen:\n            return _BUSY\n"
    "        seen.add(pending)\n        if meta.deadline_ms is None:",
)

PENDING: Final[dict[str, Fault]] = {
    "pending-call": fault(
        "gives the application no id",
        ("Call.__init__", "self.id = call.pending", "self.id = 'another'"),
    ),
    "pending-call-withdrawn": fault(
        "keeps a pending call that is withdrawn",
        ("ClientCalls.withdraw", "call.token == token", "call.token == token and not call.pending"),
    ),
    "pending-call-after-a-failure": fault("runs a pending call once", _RUN_ONCE),
    "pending-call-after-reconnect": fault("runs a pending call once, whatever the connection", _RUN_ONCE),
}
