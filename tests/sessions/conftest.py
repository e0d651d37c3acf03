from __future__ import annotations

from tests.server.conftest import certs, serve, shared

__all__ = ["certs", "serve", "shared"]
