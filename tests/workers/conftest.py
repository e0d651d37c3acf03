"""Fixtures of servers of several processes, and of their store."""

from tests.runtime.conftest import home, key, patience
from tests.stores.conftest import closes_completely

__all__ = ["closes_completely", "home", "key", "patience"]
