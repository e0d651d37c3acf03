from __future__ import annotations

from tests.load.conftest import Serve, certs, serve

__all__ = ["Serve", "certs", "serve"]
