"""The cipher suites of the contract, both of TLS 1.3 and with keys of 256 bits."""

from __future__ import annotations

from typing import Final

SUITES: Final = ("TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256")
"""In the order in which a server prefers them."""
