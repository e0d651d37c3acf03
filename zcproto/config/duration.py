"""Durations as text ("24h", "500ms", "1h30m") and as seconds. They are whole milliseconds, at least 0."""

from __future__ import annotations

import re

_MS = {"d": 86_400_000, "h": 3_600_000, "m": 60_000, "s": 1_000, "ms": 1}

# Twelve digits are 31 years in milliseconds; more would only cost time to read.
_DURATION = re.compile("".join(rf"(?:([0-9]{{1,12}}(?:\.[0-9]{{1,9}})?){unit}(?![a-z]))?" for unit in _MS))


def parse_duration(text: str) -> float | None:
    """The seconds that `text` means, or None if it is no duration.

    Units are d, h, m, s and ms, each at most once, the largest first.
    """
    match = _DURATION.fullmatch(text)
    if match is None or not text:
        return None
    parts = zip(match.groups(), _MS.values(), strict=True)
    return round(sum(float(number) * ms for number, ms in parts if number is not None)) / 1000


def format_duration(seconds: float) -> str:
    """The shortest text that `parse_duration` reads as `seconds`, in one unit: "90d", "36h", "90m", "1500ms"."""
    ms = round(seconds * 1000)
    if ms == 0:
        return "0s"
    if ms == _MS["d"]:
        return "24h"  # as people say it
    unit = next(unit for unit, size in _MS.items() if ms % size == 0)
    return f"{ms // _MS[unit]}{unit}"
