"""Alerts: what operators must know, and its delivery.

alert -> center (which are open, sans-IO) -> service (of one server) -> sinks (queues) -> webhook, command
"""

from __future__ import annotations

from zcproto.alerts.alert import CATALOGUE, Alert, AlertKind, Ending, Message, Phase, Severity
from zcproto.alerts.center import AlertCenter

__all__ = ["CATALOGUE", "Alert", "AlertCenter", "AlertKind", "Ending", "Message", "Phase", "Severity"]
