"""The SQLite store passes the contract of all stores."""

from __future__ import annotations

from tests.stores.contract import DurabilityContract, StoreContract


class TestSqliteStore(StoreContract, DurabilityContract):
    """It is not shared."""
