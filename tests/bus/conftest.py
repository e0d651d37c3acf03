"""Fixtures with real Valkey and Redis servers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.server.process import ServerProcess
from tests.stores.valkey.conftest import cluster, no_time_limits, server, server_of
from tests.stores.valkey.server_process import PROGRAMS, running
from tests.stores.valkey.server_process import ServerProcess as Valkey
from zcproto.auth import UserFile

__all__ = ["cluster", "no_time_limits", "server", "server_of"]

StartServers = Callable[[str], list[tuple[ServerProcess, str]]]


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[Valkey]:
    with running(PROGRAMS[0], tmp_path / "valkey", "--appendonly", "yes") as server:
        yield server


@pytest.fixture
def start_servers(valkey: Valkey, tmp_path: Path, certs: Path) -> Iterator[StartServers]:
    """Return a function that starts two servers of an application, and returns each with the key of ada."""
    with ExitStack() as stack:

        def start(source: str) -> list[tuple[ServerProcess, str]]:
            found = []
            for number in range(2):
                home = tmp_path / f"home{number}"
                home.mkdir(0o700)
                (home / "served.py").write_text(source)
                (home / "config.toml").write_text(f'[store]\nurl = "{valkey.url}"\ntimeout = 2\n')
                if found:
                    (home / "store.key").write_bytes((tmp_path / "home0" / "store.key").read_bytes())
                    (home / "store.key").chmod(0o600)
                user_key = UserFile(home / "users.toml").add("ada").reveal()
                found.append((stack.enter_context(ServerProcess(home, certs, app="served:app")), user_key))
            return found

        yield start
