"""Tests of the memory that closed connections leave."""

from __future__ import annotations

from pathlib import Path

from tests.server.helpers import Client, ServerProcess

WARM_UP = 1_000
GONE = 3_000
MAX_KIB_EACH = 0.75
AT_ONCE = 100


def resident_kib(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4


def come_and_go(server: ServerProcess, count: int) -> None:
    """Open many connections at once; close every other one without close_notify."""
    for _ in range(0, count, AT_ONCE):
        clients: list[Client] = [server.client() for _ in range(AT_ONCE)]
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
        come_and_go(server, WARM_UP)
        before = resident_kib(server.process.pid)
        come_and_go(server, GONE)
        left_each = (resident_kib(server.process.pid) - before) / GONE
    finally:
        server.process.terminate()
        assert server.wait() == 0
    assert left_each <= MAX_KIB_EACH
