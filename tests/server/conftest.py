from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.server.helpers import Client, ServerThread

Serve = Callable[..., ServerThread]


@pytest.fixture
def connect(shared: ServerThread) -> Iterator[Callable[..., Client]]:
    """Connects to a server that all tests share; each test has its own users."""
    with ExitStack() as stack:
        yield lambda user=None, **options: stack.enter_context(shared.client(user, **options))


@pytest.fixture
def user(request: pytest.FixtureRequest) -> str:
    return str(request.node.name)
