"""Clients that crash do not lock their user out, and clients that are connected keep their sessions."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import zcproto
from tests.server.helpers import KEY, PATIENT_CLIENT, ROOT, AnsweredError, ServerThread, eventually
from tests.server.process import ServerProcess
from tests.stores.valkey.server_process import running

PER_USER = 5

CLIENT = """
import asyncio, sys, zcproto

async def main(port, key, home, file=None):
    async with zcproto.connect(
        f"127.0.0.1:{port}", user="ada", key=key, ca_file=f"{home}/certs/ca.crt", session_file=file,
        timeout=900, connect_timeout=900
    ) as client:
        print(client.session.id, flush=True)
        await asyncio.sleep(3600)

asyncio.run(main(*sys.argv[1:]))
"""


class ClientProcess:
    """A client in its own process, with a session. `session_id` is empty if it has got none."""

    def __init__(self, port: int, key: str, home: Path, *session_file: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLIENT, str(port), key, str(home), *session_file],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "ZCPROTO_HOME": str(home)},
        )

    @property
    def session_id(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def kill(self) -> None:
        self.process.kill()
        assert self.process.wait() == -signal.SIGKILL

    def __enter__(self) -> ClientProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.mark.requirement("per_user")
@pytest.mark.parametrize("store", ["sqlite", pytest.param("memory", marks=pytest.mark.slow)])
def test_sixth_client_gets_in_at_once_after_five_were_killed(
    home: Path, certs: Path, key: str, store: str
) -> None:
    (home / "config.toml").write_text(f'[store]\nurl = "{store}"\n')
    with ExitStack() as stack:
        server = stack.enter_context(ServerProcess(home, certs))
        clients = [stack.enter_context(ClientProcess(server.port, key, home)) for _ in range(PER_USER)]
        assert len({client.session_id for client in clients} - {""}) == PER_USER
        with stack.enter_context(ClientProcess(server.port, key, home)) as refused:
            assert refused.session_id == ""
        for client in clients:
            client.kill()
        sixth = stack.enter_context(ClientProcess(server.port, key, home))
        assert sixth.session_id != ""


def test_killed_client_continues_its_session_from_a_file(home: Path, certs: Path, key: str) -> None:
    file = str(home.with_name("session.json"))
    with ServerProcess(home, certs) as server:
        ids = set()
        for _ in range(3):
            with ClientProcess(server.port, key, home, file) as client:
                ids.add(client.session_id)
                client.kill()
        assert len(ids - {""}) == 1


def connector(server: ServerThread, home: Path) -> Callable[[], zcproto.Client]:
    """Return a function that returns a client of ada."""
    known = {"user": "ada", "key": KEY, "ca_file": server.home / "certs" / "ca.crt", "home": home}
    return lambda: zcproto.connect(f"127.0.0.1:{server.port}", **known, **PATIENT_CLIENT)


def test_one_client_too_many_that_always_comes_back_never_ends_the_session_of_another(
    certs: Path, tmp_path: Path
) -> None:
    """No kick loop: each of N+1 clients reconnects and logs in again whenever it can."""

    async def main(client: Callable[[], zcproto.Client]) -> None:
        clients = [await client() for _ in range(PER_USER)]
        sessions = [each.session for each in clients]
        for _ in range(20):
            with pytest.raises(zcproto.ResourceExhausted, match="all sessions of this user are in use"):
                await client()
            for each, session in zip(clients, sessions, strict=True):
                await each.call("session.info")
                assert each.session is session
        await clients[0].close()
        async with client() as admitted:
            await admitted.call("session.info")
        for each in clients[1:]:
            await each.close()

    with ServerThread(tmp_path / "home", certs, sessions__per_user=PER_USER) as server:
        asyncio.run(main(connector(server, tmp_path / "client")))


def test_client_whose_session_was_evicted_while_it_was_disconnected_logs_in_again(
    certs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main(client: Callable[[], zcproto.Client]) -> None:
        async with client() as evicted:
            before = evicted.session
            assert before is not None
            dial, is_back = evicted._dial, asyncio.Event()

            async def dial_later(*arguments: object) -> object:
                await is_back.wait()
                return await dial(*arguments)  # type: ignore[arg-type]

            monkeypatch.setattr(evicted, "_dial", dial_later)
            connection = evicted._connections.current
            assert connection is not None
            assert connection._transport is not None
            connection._transport.abort()
            await asyncio.to_thread(eventually, lambda: server.leftovers()["connections"] == 0)
            async with client():
                pass
            is_back.set()
            info = await evicted.call("session.info")
            assert evicted.session is not None
            assert info["id"] == evicted.session.id != before.id

    with ServerThread(tmp_path / "home", certs, sessions__per_user=1) as server:
        asyncio.run(main(connector(server, tmp_path / "client")))


@pytest.fixture
def servers(tmp_path: Path, certs: Path) -> Iterator[list[ServerThread]]:
    """Return two servers that share a store."""
    with running("valkey-server", tmp_path / "store") as store, ExitStack() as stack:
        settings = {"store__url": store.url, "sessions__per_user": PER_USER}
        yield [
            stack.enter_context(ServerThread(tmp_path / name, certs, **settings)) for name in ("one", "other")
        ]


def test_client_gets_in_on_another_server_than_those_that_crashed(servers: list[ServerThread]) -> None:
    one, other = servers
    clients = [one.client("ada") for _ in range(PER_USER)]
    with other.client() as late:
        with pytest.raises(AnsweredError, match="all sessions of this user are in use"):
            late.open_session("ada")
        for client in clients:
            client.close()

        def gets_in() -> bool:
            try:
                late.open_session("ada")
            except AnsweredError:
                return False
            return True

        eventually(gets_in)
        late.echo()
