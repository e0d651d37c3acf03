"""Signs of life: whether a claim's process is still there, as other processes see it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stores.valkey.helpers import opened
from tests.stores.valkey.server_process import VALKEY_FIRST, ServerProcess, is_installed, running
from zcproto.stores.base import ChangeKind, ClaimState
from zcproto.stores.valkey import store as module

BODY = b"b" * 32
OTHER = b"o" * 32
KEEP_MS = 600_000


@pytest.fixture(params=VALKEY_FIRST)
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ServerProcess]:
    if not is_installed(request.param):
        pytest.skip(f"{request.param} is not installed")
    with running(request.param, tmp_path / "store") as process:
        yield process


async def test_claim_of_a_process_that_is_there_has_no_orphan(server: ServerProcess) -> None:
    async with opened(server.url) as (one, _), opened(server.url) as (two, _):
        claimed = await asyncio.gather(*(one.claim("ada", f"k-{n}", BODY, KEEP_MS) for n in range(3)))
        assert {claim.state for claim in claimed} == {ClaimState.NEW}
        seen = await two.claim("ada", "k-1", BODY, KEEP_MS)
        assert (seen.state, seen.is_own, seen.is_orphan) == (ClaimState.RUNNING, False, False)
        own = await one.claim("ada", "k-1", BODY, KEEP_MS)
        assert (own.is_own, own.is_orphan) == (True, False)


async def test_claim_of_a_process_that_was_killed_is_an_orphan(server: ServerProcess) -> None:
    async with opened(server.url) as (one, _), opened(server.url) as (two, _):
        await one.claim("ada", "k", BODY, KEEP_MS)
        [key] = [key for key in server.command("KEYS", "*") if b"h:" in key]
        assert 0 < server.command("PTTL", key) <= module.LIFE_MS
        await one._life.end()
        server.command("DEL", key)  # as it expires
        seen = await two.claim("ada", "k", BODY, KEEP_MS)
        assert (seen.state, seen.is_orphan) == (ClaimState.RUNNING, True)


async def test_expired_claim_is_given_away_only_when_its_process_is_gone(
    server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(server.url) as (one, _), opened(server.url) as (two, _):
        assert (await one.claim("ada", "k", BODY, 1)).state is ClaimState.NEW
        seen = await two.claim("ada", "k", BODY, KEEP_MS)
        while not seen.has_expired:
            seen = await two.claim("ada", "k", BODY, KEEP_MS)
        assert (seen.state, seen.is_orphan) == (ClaimState.RUNNING, False)
        assert (await two.claim("ada", "k", OTHER, KEEP_MS)).state is ClaimState.CONFLICT
        await one._life.end()
        [key] = [key for key in server.command("KEYS", "*") if key.endswith(b"h:" + one._node)]
        server.command("DEL", key)  # as it expires
        seen = await two.claim("ada", "k", BODY, KEEP_MS)
        assert (seen.state, seen.is_orphan) == (ClaimState.RUNNING, True), (
            "two has not had the store for long"
        )
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(two._life, "_trusted_at", loop.time())
        assert (await two.claim("ada", "k", OTHER, KEEP_MS)).state is ClaimState.NEW
        await one.keep_answer("ada", "k", b"late", KEEP_MS)
        await one.release_claim("ada", "k")
        assert (await two.claim("ada", "k", OTHER, KEEP_MS)).is_own
        await two.keep_answer("ada", "k", b"answer", KEEP_MS)
        await one.keep_answer("ada", "k", b"late", KEEP_MS)
        assert (await one.claim("ada", "k", OTHER, KEEP_MS)).answer == b"answer"


async def test_processes_have_time_for_a_sign_of_life_after_the_store_was_away(server: ServerProcess) -> None:
    async with opened(server.url) as (one, changes):
        before = one._life._trusted_at
        server.command("CLIENT", "KILL", "TYPE", "normal")
        while ChangeKind.ALL not in {change.kind for change in changes}:  # noqa: ASYNC110  it is in another process
            await asyncio.sleep(0.01)
        assert one._life._trusted_at > before


async def test_sign_is_renewed_until_the_store_is_closed(
    server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RENEW_S", 0.01)
    async with opened(server.url) as (one, _), opened(server.url) as (two, _):
        await one.claim("ada", "k", BODY, KEEP_MS)
        key = b"h:" + one._node
        [name] = [each for each in server.command("KEYS", "*") if each.endswith(key)]
        server.command("DEL", name)
        while (await two.claim("ada", "k", BODY, KEEP_MS)).is_orphan:  # noqa: ASYNC110  it is in another process
            await asyncio.sleep(0.01)
        task = one._life._task
    assert task is not None
    assert task.cancelled()
