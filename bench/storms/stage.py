"""A server for a storm or a mix: its home folder, its users, and what the system says of its process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from bench.told import open_session
from zcproto.auth import UserFile
from zcproto.common.home import Home
from zcproto.load.caller import Place
from zcproto.load.demo.run import SPARE_CONNECTIONS
from zcproto.load.demo.server import DemoServer
from zcproto.load.plan import SESSIONS_PER_USER, Credential
from zcproto.load.processes import on_processor

HOST: Final = "127.0.0.1"
KIB: Final = 1_024


class Stage:
    """`most` connections at once, at most. `store` is the address of the store of sessions."""

    def __init__(self, home: Home, most: int, store: str) -> None:
        self.home = home
        self.ca_file = home.certs / "ca.crt"
        self._most = most
        self._store = store
        self._users = UserFile(home.users)
        self._operator = Credential("operator", self._users.add("operator", operator=True))

    def users(self, name: str, count: int) -> list[Credential]:
        """Whose each of so many sessions is, as many for a user as it may have."""
        names = [f"{name}-{number}" for number in range(-(-count // SESSIONS_PER_USER))]
        added = [Credential(*each) for each in self._users.add_many(names)]
        return [each for each in added for _ in range(SESSIONS_PER_USER)][:count]

    @contextlib.contextmanager
    def server(self, max_handshakes: int | None = None) -> Iterator[DemoServer]:
        """Run it, with the default of `tls.max_handshakes` or another, on a processor of its own."""
        tls = "" if max_handshakes is None else f"[tls]\nmax_handshakes = {max_handshakes}\n\n"
        self.home.config.write_text(
            f"{tls}[limits]\nmax_connections = {self._most + SPARE_CONNECTIONS}\n"
            "connections_per_address = 0    # all come from one\n\n"
            '[certificates]\nkey_types = ["ecdsa-p256"]\n\n'
            f'[log]\nfile = "{self.home.path / "server.log"}"\n',
            encoding="utf-8",
        )
        self.home.config.chmod(0o600)
        server = DemoServer(self.home.path, self._store)
        with contextlib.ExitStack() as stack:
            with on_processor(0):
                stack.enter_context(server)
            yield server

    async def stats(self, port: int) -> dict[str, Any]:
        """The server's own figures, asked once: pauses of its loop are those since the start."""
        place = Place(HOST, HOST, port, self.ca_file)
        try:
            caller = await place.caller()
            try:
                token = (await open_session(caller, self._operator)).token
                stats: dict[str, Any] = await caller.call("server.stats", {}, token)
                await caller.call("session.close", {}, token)
            finally:
                await caller.leave()
        finally:
            place.close()
        return stats

    def share(self, credentials: list[Credential], **more: Any) -> dict[str, Any]:
        """What a helper's process has to know."""
        return {
            "host": HOST,
            "ca_file": str(self.ca_file),
            "credentials": [[*each] for each in credentials],
            "seed": 1,
            **more,
        }


def memory_bytes(pid: int) -> tuple[int, int]:
    """A process's resident memory now, and the most that it ever was."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return (int(fields["VmRSS"].split()[0]) * KIB, int(fields["VmHWM"].split()[0]) * KIB)


def is_measurable() -> bool:
    """Whether the system tells of processes what is needed here."""
    return os.path.exists("/proc/self/status")
