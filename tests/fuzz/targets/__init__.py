"""The targets, by name."""

from __future__ import annotations

import importlib

from tests.fuzz.target import Target

NAMES = (
    *("frames", "messages", "client_hello", "proxy_header", "http"),
    *("config", "certificates", "server", "client"),
)


def target_named(name: str) -> Target:
    """The target of a module here. It is imported only now, so that its coverage can be noted from the start."""
    found: Target = importlib.import_module(f"{__name__}.{name}").TARGET
    return found
