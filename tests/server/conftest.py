from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.server.helpers import Client, ServerThread
from tests.server.idempotency_harness import CacheHarness, MakeHarness
from tests.server.protocol_harness import Harness, Peer

Serve = Callable[..., ServerThread]


@pytest.fixture
def connect(shared: ServerThread) -> Iterator[Callable[..., Client]]:
    """Connects to a server that all tests share; each test has its own users."""
    with ExitStack() as stack:
        yield lambda user=None, **options: stack.enter_context(shared.client(user, **options))


@pytest.fixture
def user(request: pytest.FixtureRequest) -> str:
    return str(request.node.name)


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture
def harness(loop: asyncio.AbstractEventLoop) -> Iterator[Harness]:
    harness = Harness(loop)
    yield harness
    assert loop.run_until_complete(harness.state.tasks.close(1.0)) == 0


@pytest.fixture
def peer(harness: Harness) -> Peer:
    return harness.connect("ada")


@pytest.fixture
def make_harness(loop: asyncio.AbstractEventLoop) -> Iterator[MakeHarness]:
    """Return a function that makes caches of answers, whose runs must have ended with the test."""
    made: list[CacheHarness] = []

    def make(*args: Any, **options: Any) -> CacheHarness:
        made.append(CacheHarness(loop, *args, **options))
        return made[-1]

    yield make
    for harness in made:
        assert loop.run_until_complete(harness.tasks.close(1.0)) == 0
        assert harness.cache.running == 0
