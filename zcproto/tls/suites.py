"""The two cipher suites of ZCP/1 (zcp1.md, section 4): TLS 1.3 with 256-bit keys."""

from __future__ import annotations

from typing import Final

SUITES: Final = ("TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256")
"""In the server's order of preference."""
