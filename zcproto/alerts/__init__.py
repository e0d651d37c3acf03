"""Alerts: what somebody has to be told of, without saying how.

    kinds      all kinds of alerts, in one table
    alert      one alert, and what is sent about it
    center     which alerts are open, what is told of them, and what is told no more
    rates      when so many events in a while are an alert
    signature  how a receiver knows that a message is from here

Nothing here reads a clock or touches the world: times come in, messages come out.
"""

from __future__ import annotations

from zcproto.alerts.alert import Alert, Message, Phase
from zcproto.alerts.center import AlertCenter
from zcproto.alerts.kinds import CATALOGUE, AlertKind, Ending, Severity

__all__ = ["CATALOGUE", "Alert", "AlertCenter", "AlertKind", "Ending", "Message", "Phase", "Severity"]
