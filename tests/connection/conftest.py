"""The client's end of a conversation. The server's is the fixture `pair` of all tests."""

from __future__ import annotations

import pytest

from tests.connection.helpers import GREETING, Conversation


@pytest.fixture
def talk() -> Conversation:
    """A conversation in which WELCOME was said."""
    return Conversation(GREETING)
