"""Fixtures for client connections; tests of servers use the global fixture `pair`."""

from __future__ import annotations

import pytest

from tests.connection.helpers import WELCOME_MAP, ClientHarness


@pytest.fixture
def harness() -> ClientHarness:
    """Return a client that has received WELCOME."""
    return ClientHarness(WELCOME_MAP)
