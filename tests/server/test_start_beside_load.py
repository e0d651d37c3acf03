"""A server with very many sessions in its file answers before it has loaded them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.server.helpers import AnsweredError, Client, ServerThread
from zcproto.errors import Code
from zcproto.sessions.record import EndedRecord, SessionRecord
from zcproto.stores import sync as sync_module
from zcproto.stores.sqlite import database
from zcproto.stores.sqlite.store import SqliteStore

USERS = ("ada", "bob", "carol", "dan")


def test_requests_with_sessions_are_answered_before_the_load_has_ended(
    tmp_path: Path, certs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, opened = tmp_path / "home", dict[str, dict[str, Any]]()
    with ServerThread(home, certs, store__url="sqlite") as server:
        for user in USERS:
            with server.client(user) as client:
                opened[user] = client.opened
    monkeypatch.setattr(sync_module, "LOADED_FIRST", 1)
    monkeypatch.setattr(database, "_SLICE", 1)
    gates = list[asyncio.Event]()
    load = SqliteStore.load

    async def load_slowly(self: SqliteStore) -> AsyncIterator[Sequence[SessionRecord | EndedRecord]]:
        gate = asyncio.Event()
        gates.append(gate)
        async for batch in load(self):
            yield batch
            await gate.wait()

    monkeypatch.setattr(SqliteStore, "load", load_slowly)
    with ServerThread(home, certs, store__url="sqlite") as server, server.client() as client:

        def ask(user: str, method: str, **params: Any) -> Any:
            client.token = opened[user]["token"]
            return client.call(method, params)

        def code(user: str) -> Code:
            with pytest.raises(AnsweredError) as error:
                ask(user, "session.info")
            return Code(error.value.code)

        assert server.stats["sessions"] == 1
        assert ask("ada", "session.info")["id"] == opened["ada"]["id"]
        assert ask("bob", "session.info")["id"] == opened["bob"]["id"], "it is not loaded"
        opened["eve"] = {"token": b"e" * 32}
        assert code("eve") is Code.UNAUTHENTICATED
        assert [each["id"] for each in ask("bob", "session.list")] == [opened["bob"]["id"]]
        assert (
            asyncio.run_coroutine_threadsafe(server.server.end_sessions("carol"), server.loop).result() == 1
        )
        assert code("carol") is Code.TOKEN_REVOKED
        spent = opened["dan"]["token"]
        renewed: Any = refresh(client, opened["dan"]["refresh_token"])
        assert server.in_loop(lambda: server.server.state.settings.looks_up)
        server.in_loop(gates[0].set)
        server.until(lambda: not server.server.state.settings.looks_up)
        assert server.stats["sessions"] == len(USERS) - 1
        assert code("carol") is Code.TOKEN_REVOKED
        opened["dan"] = {"token": spent}
        assert code("dan") is Code.TOKEN_REVOKED
        opened["dan"] = renewed
        for user in ("ada", "bob", "dan"):
            assert ask(user, "session.info")["user"] == user
        assert code("eve") is Code.UNAUTHENTICATED


def refresh(client: Client, token: bytes) -> Any:
    return client.call("session.refresh", {"refresh_token": token}, token=bytes(32))
