"""Test applications: in memory, or with a real server. Each name is imported on first use.

    async with connect_in_memory(app, user="ada") as client:
        assert await client.call("greet", name="world") == "hello world"

    connect_in_memory  one client of an application, without sockets and TLS
    MemoryServer       the same for several clients
    Link               the network in memory, which can be cut, held, delayed and throttled
    MovableClock       the time of a server in memory, its clients and their event loop
    LocalServer        a real server on a free port; as a fixture: `zcproto_serve`

The pytest plugin is `zcproto.testing.plugin`; pytest loads it by itself.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zcproto.testing.link import Link
    from zcproto.testing.memory import MemoryServer, MovableClock, connect_in_memory
    from zcproto.testing.server import LocalServer

_MODULES = {
    "Link": "link",
    "LocalServer": "server",
    "MemoryServer": "memory",
    "MovableClock": "memory",
    "connect_in_memory": "memory",
}

__all__ = ["Link", "LocalServer", "MemoryServer", "MovableClock", "connect_in_memory"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'zcproto.testing' has no attribute {name!r}")
    return getattr(importlib.import_module(f"zcproto.testing.{_MODULES[name]}"), name)
