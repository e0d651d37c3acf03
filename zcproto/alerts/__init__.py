"""Alerts: what operators must know, and its delivery.

kinds      all kinds of alerts, in one table
alert      one alert, and the messages about it
center     which alerts are open, and which messages are sent (sans-IO)
rates      when the growth of a counter is an alert (sans-IO)
signature  signatures by which a receiver verifies messages
sinks      a bounded queue with retries for each sink
webhook    the sink that posts messages to an address
command    the sink that runs a program
service    all alerts of one server
"""

from __future__ import annotations

from zcproto.alerts.alert import Alert, Message, Phase
from zcproto.alerts.center import AlertCenter
from zcproto.alerts.kinds import CATALOGUE, AlertKind, Ending, Severity

__all__ = ["CATALOGUE", "Alert", "AlertCenter", "AlertKind", "Ending", "Message", "Phase", "Severity"]
