"""What methods under test have raised: callers get an incident id, a failed test reports the traceback."""

from __future__ import annotations

import traceback
from collections import deque

incidents: deque[tuple[str, str]] = deque(maxlen=16)
"""The last exceptions: a title with the incident id, and the traceback as text, which keeps no object alive."""


def record_incident(method: str, incident: str, error: BaseException) -> None:
    """Keep an exception of a method."""
    text = "".join(traceback.format_exception(error))
    incidents.append((f"exception in method {method}, incident {incident}", text))
