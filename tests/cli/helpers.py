"""Sessions in a store, as left by a server."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.limits import TIMEOUT
from tests.sessions import helpers
from tests.sessions.helpers import NewSession
from zcproto.cli.connect import TrustChoice
from zcproto.client import Client
from zcproto.common.clock import system_clock, system_entropy
from zcproto.common.home import Home
from zcproto.common.roles import NO_ROLES
from zcproto.sessions import SessionRegistry, SessionSettings, token_text
from zcproto.sessions.record import SessionRecord, UserLimit
from zcproto.sessions.token import id_text
from zcproto.stores.base import SessionStore
from zcproto.stores.sqlite.store import SqliteStore

HOUR_MS = 3_600_000
ANY_NUMBER = UserLimit(1_000_000, "refuse", None)


def new_session(user: str = "ada", age_ms: int = 0, **options: object) -> NewSession:
    registry = SessionRegistry(SessionSettings(), system_entropy)
    return helpers.new_session(
        registry,
        user,
        roles=options.get("roles", NO_ROLES),
        client=str(options.get("client", "test/1")),
        address="192.0.2.7",
        wall=system_clock.wall() - age_ms,
        key=str(options.get("key", "")),
    )


async def _with_store(store: SessionStore, records: list[SessionRecord]) -> list[SessionRecord]:
    await store.open(lambda change: None)
    try:
        for record in records:
            await store.create(record, ANY_NUMBER)
        return await store.list()
    finally:
        await store.close()


def store_of(home: Path) -> SqliteStore:
    return SqliteStore(home / "sessions.db", timeout=TIMEOUT)


class LoopAhead(asyncio.SelectorEventLoop):
    """An event loop whose time a test advances, so that a deadline is over after a certain step."""

    ahead_s = 0.0

    def time(self) -> float:
        return super().time() + self.ahead_s


def connect_patiently(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exclude connecting from the timeout of `zcproto call`."""
    make_client = TrustChoice.make_client

    def make_patient_client(trust: TrustChoice, home: Home, address: str, **options: Any) -> Client:
        return make_client(trust, home, address, **{**options, "connect_timeout": TIMEOUT})

    monkeypatch.setattr(TrustChoice, "make_client", make_patient_client)


def fill(home: Path, *sessions: NewSession) -> None:
    """Store sessions in the file of a home folder."""
    home.mkdir(mode=0o700, exist_ok=True)
    asyncio.run(_with_store(store_of(home), [each.record for each in sessions]))


def kept(home: Path) -> list[SessionRecord]:
    """Return the sessions in the file."""
    return asyncio.run(_with_store(store_of(home), []))


def id_of(session: NewSession) -> str:
    return id_text(session.record.id)


def secrets_of(session: NewSession) -> list[str]:
    """Return the secrets of a session: tokens and digests."""
    assert session.refresh_token is not None
    record = session.record
    return [
        token_text(session.token),
        token_text(session.refresh_token),
        token_text(record.token_digest),
        record.token_digest.hex(),
        record.refresh_digest.hex(),
    ]
