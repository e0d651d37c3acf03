from __future__ import annotations

from tests.client.conftest import connect_to, home

__all__ = ["connect_to", "home"]
