"""The SQLite store passes the contract of all stores."""

from __future__ import annotations

from tests.stores.contract import StoreContract


class TestSqliteStore(StoreContract):
    """Every test of the contract."""
