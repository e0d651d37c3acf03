"""Alerts: what operators must know, and its delivery.

alert      the kinds of alerts in one table, one alert, and the messages about it
center     which alerts are open, and which messages are sent (sans-IO)
rates      when the growth of a counter is an alert (sans-IO)
sinks      a bounded queue with retries for each sink
webhook    the sink that posts signed messages to an address
command    the sink that runs a program
service    all alerts of one server
"""

from __future__ import annotations

from zcproto.alerts.alert import CATALOGUE, Alert, AlertKind, Ending, Message, Phase, Severity
from zcproto.alerts.center import AlertCenter

__all__ = ["CATALOGUE", "Alert", "AlertCenter", "AlertKind", "Ending", "Message", "Phase", "Severity"]
