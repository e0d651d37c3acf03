"""`zcproto store` reports problems of a store, and loses no session when it copies them to another."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.helpers import ANY_NUMBER, HOUR_MS, fill, kept, new_session, secrets_of
from tests.stores.valkey.server_process import PROGRAMS, ServerProcess, is_installed, running
from zcproto.auth import UserFile
from zcproto.cli import main
from zcproto.common.roles import OPERATORS
from zcproto.sessions.record import EndedRecord, SessionRecord
from zcproto.stores.sqlite.store import SqliteStore

Capture = pytest.CaptureFixture[str]


@pytest.fixture(params=PROGRAMS)
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ServerProcess]:
    """A real Valkey or Redis server."""
    if not is_installed(request.param):
        pytest.skip(f"{request.param} is not installed")
    with running(request.param, tmp_path / "server") as process:
        yield process


# --- check ---------------------------------------------------------------------------------------------------


def test_check_reports_an_intact_sqlite_file(home: Path, capsys: Capture) -> None:
    fill(home, new_session(), new_session())
    for options in ([], ["sqlite"], ["configured"]):
        assert main(["store", "check", *options]) == 0
        assert capsys.readouterr().out == f"{home / 'sessions.db'}: is intact; sessions: 2\n"


def test_check_does_not_create_a_missing_file(home: Path, capsys: Capture) -> None:
    home.mkdir(mode=0o700)
    assert main(["store", "check"]) == 0
    assert "does not exist yet" in capsys.readouterr().out
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("damage", ["header", "page", "no database"])
def test_check_reports_a_damaged_file_and_leaves_it_unchanged(
    home: Path, capsys: Capture, damage: str
) -> None:
    fill(home, *(new_session(f"user-{number}") for number in range(400)))
    path = home / "sessions.db"
    data = bytearray(path.read_bytes())
    if damage == "header":
        data[:16] = b"x" * 16
    elif damage == "page":
        data[8_192:16_384] = b"\xff" * 8_192
    else:
        data = bytearray(b"no database at all" * 1_000)
    path.write_bytes(data)
    before = sorted(home.iterdir())
    assert main(["store", "check"]) == 1
    err = capsys.readouterr().err
    assert "is damaged; at its next start the server renames it" in err
    assert err.replace("\n", "").isprintable()
    assert path.read_bytes() == data
    assert sorted(home.iterdir()) == before


def test_check_refuses_a_file_in_use_by_a_server(home: Path, capsys: Capture) -> None:
    import fcntl

    fill(home, new_session())
    with open(home / "sessions.db.lock", "r+") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        assert main(["store", "check"]) == 2
    assert "a running server uses it; run zcproto status" in capsys.readouterr().err


def test_check_of_memory_succeeds(home: Path, capsys: Capture) -> None:
    assert main(["store", "check", "memory"]) == 0
    assert "end with it" in capsys.readouterr().out


def test_check_reports_whether_the_server_answers(home: Path, capsys: Capture, server: ServerProcess) -> None:
    assert main(["store", "check", server.url]) == 0
    out, err = capsys.readouterr()
    assert out == "the store answers; sessions: 0\n"
    assert "note: " in err, "this server has no persistence"
    server.kill()
    assert main(["store", "check", server.url]) == 1
    assert "unavailable" in capsys.readouterr().err


@pytest.mark.parametrize("url", ["nonsense", "redis://", "http://cache"])
def test_check_refuses_an_invalid_url(home: Path, capsys: Capture, url: str) -> None:
    assert main(["store", "check", url]) == 2
    err = capsys.readouterr().err
    assert "store" in err
    assert err.count("\n") == 1


# --- migrate -------------------------------------------------------------------------------------------------


def test_migrate_to_a_server_and_back_keeps_sessions_unchanged(
    home: Path, capsys: Capture, server: ServerProcess
) -> None:
    sessions = [
        new_session("ada", 2 * HOUR_MS, roles=OPERATORS),
        new_session("ada", 25 * HOUR_MS, client=""),
        new_session("bob", key="device:phone"),
        *(new_session(f"user-{number}") for number in range(300)),
    ]
    fill(home, *sessions)
    before = kept(home)
    assert len(before) == len(sessions)
    for _ in range(2):
        assert main(["store", "migrate", "sqlite", server.url]) == 0
        assert capsys.readouterr().err == f"sessions copied: {len(sessions)}\n"
    assert kept(home) == before, "they stay in the source"
    (home / "sessions.db").unlink()
    assert main(["store", "migrate", server.url, "sqlite"]) == 0
    out, err = capsys.readouterr()
    after = kept(home)
    assert sorted(after, key=lambda record: record.id) == sorted(before, key=lambda record: record.id)
    for secret in secrets_of(sessions[0]):
        assert secret not in out + err


def test_migrate_does_not_revive_ended_sessions_in_the_target(home: Path, server: ServerProcess) -> None:
    session = new_session()
    fill(home, session)
    assert main(["store", "migrate", "sqlite", server.url]) == 0
    options = ["--config", str(home.parent / "config.toml")]
    (home.parent / "config.toml").write_text(f'[store]\nurl = "{server.url}"\n')
    assert main(["session", "revoke", "--user", "ada", *options]) == 0
    assert main(["store", "migrate", "sqlite", "configured", *options]) == 0
    (home / "sessions.db").unlink()
    assert main(["store", "migrate", "configured", "sqlite", *options]) == 0
    assert kept(home) == []


def test_migrate_does_not_copy_tombstones(home: Path, server: ServerProcess) -> None:
    fill(home, new_session("ada"), new_session("bob"))
    assert main(["session", "revoke", "--user", "ada"]) == 0
    assert main(["store", "migrate", "sqlite", server.url]) == 0
    (home / "sessions.db").unlink()
    assert main(["store", "migrate", server.url, "sqlite"]) == 0

    async def everything() -> list[SessionRecord | EndedRecord]:
        store = SqliteStore(home / "sessions.db")
        await store.open(lambda change: None)
        found = [record async for batch in store.load() for record in batch]
        await store.close()
        return found

    (record,) = asyncio.run(everything())
    assert isinstance(record, SessionRecord)
    assert record.user == "bob"


def test_migrate_of_more_sessions_than_are_listed_goes_by_the_user_file_or_fails(
    home: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, server: ServerProcess
) -> None:
    fill(home, *(new_session(user) for user in ("ada", "ada", "bob", "eve")))
    assert main(["store", "migrate", "sqlite", server.url]) == 0
    (home / "sessions.db").unlink()
    for module in ("zcproto.cli.store", "zcproto.stores.valkey.store"):
        monkeypatch.setattr(f"{module}.MAX_LISTED", 1, raising=False)
    assert main(["store", "migrate", server.url, "sqlite"]) == 1
    assert "users who are not in the user file" in capsys.readouterr().err
    users = UserFile(home / "users.toml")
    for name in ("ada", "bob", "eve"):
        users.add_digest(name, None)
    assert main(["store", "migrate", server.url, "sqlite"]) == 0
    assert sorted(record.user for record in kept(home)) == ["ada", "ada", "bob", "eve"]


def test_migrate_from_a_missing_file_copies_nothing(home: Path, capsys: Capture) -> None:
    home.mkdir(mode=0o700)
    assert main(["store", "migrate", "sqlite", "redis://127.0.0.1:1"]) == 0
    assert capsys.readouterr().err == "sessions copied: 0\n"


@pytest.mark.parametrize(
    ("source", "target", "complaint"),
    [
        ("memory", "sqlite", "memory"),
        ("sqlite", "memory", "memory"),
        ("sqlite", "sqlite", "the same"),
        ("sqlite", "configured", "the same"),
        ("nonsense", "sqlite", "the store must be"),
    ],
)
def test_migrate_refuses_invalid_stores(
    home: Path, capsys: Capture, source: str, target: str, complaint: str
) -> None:
    fill(home, new_session())
    assert main(["store", "migrate", source, target]) == 2
    assert complaint in capsys.readouterr().err
    assert len(kept(home)) == 1


def test_migrate_reports_a_target_without_room(
    home: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, server: ServerProcess
) -> None:
    from zcproto.cli import store as module

    fill(home, new_session("ada"), new_session("ada"))
    monkeypatch.setattr(module, "NO_LIMIT", type(ANY_NUMBER)(1, "refuse", None))
    assert main(["store", "migrate", "sqlite", server.url]) == 1
    assert "more sessions than the target can store" in capsys.readouterr().err


def test_settings_of_the_configured_server_are_not_sent_to_another(tmp_path: Path) -> None:
    from zcproto.cli.store import PATIENCE_S, with_store
    from zcproto.config.model import Config, StoreConfig

    config = Config(store=StoreConfig(url="redis://one", password_file=tmp_path / "password"))
    assert with_store(config, "redis://one").store.password_file == tmp_path / "password"
    assert with_store(config, "configured").store.password_file == tmp_path / "password"
    assert with_store(config, "configured").store.timeout == PATIENCE_S
    assert with_store(config, "redis://two").store == StoreConfig(url="redis://two", timeout=PATIENCE_S)
