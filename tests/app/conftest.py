from __future__ import annotations

from tests.client.conftest import connect_to, home
from tests.server.conftest import certs, serve, shared

__all__ = ["certs", "connect_to", "home", "serve", "shared"]
