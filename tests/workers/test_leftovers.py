"""A start waits for the processes of a server that was killed, and no longer."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import FakeClock
from zcproto.common.files import try_lock
from zcproto.errors import ConfigError
from zcproto.workers.processes import PATIENCE, PAUSE, Patience, bind_patiently, wait_unlocked


class Waiting(Patience):
    """Patience without waiting. `then` is called at the third pause."""

    def __init__(self, then: Any = lambda: None) -> None:
        self.pauses: list[float] = []
        self.clock = FakeClock()

        def sleep(seconds: float) -> None:
            self.clock.advance(seconds)
            self.pauses.append(seconds)
            if len(self.pauses) == 3:
                then()

        super().__init__(self.clock, sleep)


def used_port() -> socket.socket:
    listening = socket.create_server(("127.0.0.1", 0))
    listening.listen()
    return listening


def test_port_of_a_killed_server_is_awaited(capfd: pytest.CaptureFixture[str]) -> None:
    old = used_port()
    port = old.getsockname()[1]
    waiting = Waiting(old.close)
    [new] = bind_patiently(["127.0.0.1"], port, patience=waiting)
    with new:
        assert new.getsockname()[1] == port
    assert waiting.pauses == [PAUSE] * 3
    assert capfd.readouterr().err.count('"event":"server.start_waits"') == 1


def test_port_of_another_program_is_reported_after_the_wait() -> None:
    waiting = Waiting()
    with used_port() as old, pytest.raises(ConfigError, match="Address already in use; end the program"):
        bind_patiently(["127.0.0.1"], old.getsockname()[1], patience=waiting)
    assert sum(waiting.pauses) == pytest.approx(PATIENCE, abs=2 * PAUSE)


def test_other_failure_is_reported_at_once() -> None:
    waiting = Waiting()
    with pytest.raises(ConfigError, match=r"no such address|cannot listen"):
        bind_patiently(["192.0.2.1"], 7443, patience=waiting)
    assert waiting.pauses == []


def test_lock_of_a_killed_server_is_awaited_and_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "sessions.db"
    wait_unlocked(path, Waiting())  # no process has run
    lock = tmp_path / "sessions.db.lock"
    held = try_lock(lock)
    assert held is not None
    waiting = Waiting(lambda: os.close(held))
    wait_unlocked(path, waiting)
    assert len(waiting.pauses) == 3
    held = try_lock(lock)
    assert held is not None
    waiting = Waiting()
    wait_unlocked(path, waiting)  # who opens the file reports it
    assert sum(waiting.pauses) == pytest.approx(PATIENCE, abs=2 * PAUSE)
    os.close(held)
