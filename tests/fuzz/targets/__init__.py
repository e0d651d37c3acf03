"""Import targets by name."""

from __future__ import annotations

import importlib

from tests.fuzz.target import Target

NAMES = (
    *("frames", "messages", "client_hello", "proxy_header", "http"),
    *("config", "certificates", "server", "client"),
)


def target_named(name: str) -> Target:
    """Import and return a target. The import is late so that the caller can instrument it."""
    found: Target = importlib.import_module(f"{__name__}.{name}").TARGET
    return found
