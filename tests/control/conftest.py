from __future__ import annotations

from ..server.conftest import certs, serve

__all__ = ["certs", "serve"]
