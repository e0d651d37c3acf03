"""Tests of the memory that closed connections leave."""

from __future__ import annotations

from pathlib import Path

from tests.server.helpers import Client
from tests.server.process import ServerProcess

WARM_UP = 500
MEASURED = 1_500
MAX_KIB_EACH = 0.75
BATCH = 100


def resident_kib(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4


def connect_and_disconnect(server: ServerProcess, count: int) -> None:
    """Open many connections at once; close every other one without close_notify."""
    for _ in range(0, count, BATCH):
        clients: list[Client] = [server.client() for _ in range(BATCH)]
        for number, client in enumerate(clients):
            if number % 2:
                client.close()
            else:
                client.fin()


def test_closed_connection_leaves_under_768_bytes(tmp_path: Path, certs: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    (home / "config.toml").write_text(
        "[limits]\nconnections_per_address = 0\n[certificates]\nkey_types = ['ecdsa-p256']\n"
    )
    server = ServerProcess(home, certs)
    try:
        connect_and_disconnect(server, WARM_UP)
        before = resident_kib(server.process.pid)
        connect_and_disconnect(server, MEASURED)
        left_kib = (resident_kib(server.process.pid) - before) / MEASURED
    finally:
        server.process.terminate()
        assert server.wait() == 0
    assert left_kib <= MAX_KIB_EACH
