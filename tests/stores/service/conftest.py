"""Fixtures of the session service."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import FakeClock
from tests.limits import TIMEOUT
from tests.sessions.helpers import CountedEntropy
from tests.stores.faulty import FaultyStore
from tests.stores.service.harness import FaultyStoreView, Log, SessionProcess, StartProcess
from zcproto.config.model import LogConfig
from zcproto.observe import log as log_module
from zcproto.observe.output import StandardError
from zcproto.sessions import SessionSettings
from zcproto.stores import operations
from zcproto.stores import revoker as revoker_module
from zcproto.stores import sync as sync_module


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the timeouts of these tests end operations that hang, not those of a busy machine.

    A late timer counts for one part of a timeout. None of the operations that work takes so many turns of the loop.
    """
    monkeypatch.setattr(operations, "_TURNS", 50)
    monkeypatch.setattr(revoker_module, "MIN_DISK_S", TIMEOUT)
    monkeypatch.setattr(sync_module, "CLOSE_LIMIT_S", TIMEOUT)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    """Return the lines that are logged."""
    lines = Log()

    class FakeOutput(StandardError):
        def write(self, line: str) -> int:
            lines.append(json.loads(line))
            return 0

    monkeypatch.setattr(log_module, "StandardError", FakeOutput)
    log_module.configure_logging(LogConfig(level="debug", format="json"))
    return lines


@pytest.fixture
async def start_process(tmp_path: Path, clock: FakeClock) -> AsyncIterator[StartProcess]:
    """Return a function that starts processes, with their own store by default. All are stopped at the end."""
    processes: list[SessionProcess] = []
    entropy = CountedEntropy()

    async def start(
        store: FaultyStore | None = None,
        *,
        shared: bool = False,
        starts: bool = True,
        folder: Path = tmp_path,
        **options: Any,
    ) -> SessionProcess:
        if store is None:
            store = FaultyStore(SessionSettings(per_user=1_000), entropy, shared=shared)
        process = SessionProcess(folder, store, clock, entropy, **options)
        processes.append(process)
        if starts:
            await process.sync.start()
        return process

    yield start
    for process in processes:
        if process.store.gate is not None:
            process.store.gate.set()
        await process.sync.stop()


@pytest.fixture
async def process(start_process: StartProcess) -> SessionProcess:
    """Return a process with its own store."""
    return await start_process()


@pytest.fixture
async def one(start_process: StartProcess) -> SessionProcess:
    """Return a process with a store that is shared with `other`, if the test has that."""
    return await start_process(shared=True)


@pytest.fixture
async def other(start_process: StartProcess, one: SessionProcess) -> SessionProcess:
    """Return another process, which reaches the same store with faults of its own."""
    return await start_process(FaultyStoreView(one.store))


@pytest.fixture
async def shared_process(start_process: StartProcess) -> SessionProcess:
    """Return a process with a store that is shared."""
    return await start_process(shared=True)
