from __future__ import annotations

from tests.load.conftest import certs, serve, short_limits

__all__ = ["certs", "serve", "short_limits"]
