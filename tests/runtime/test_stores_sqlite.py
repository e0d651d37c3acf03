"""Sessions in SQLite survive a restart of the server, however it ends."""

from __future__ import annotations

import shutil
import signal
import stat
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.runtime.helpers import Servers, end, refresh, refresh_params
from tests.server.helpers import NO_TOKEN
from tests.server.process import ServerProcess
from zcproto.auth import UserFile
from zcproto.errors import Code, ConfigError


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def servers(tmp_path: Path, certs: Path) -> Iterator[Servers]:
    with ExitStack() as stack:
        yield Servers(tmp_path, certs, stack, store__url="sqlite")


def test_token_survives_a_restart(servers: Servers, home: Path) -> None:
    one = servers.start()
    client = servers.client(one, "ada")
    info = client.call("session.info")
    end(one, client)
    other = servers.start()
    again = servers.client(other, token=client.token)
    again.echo()
    other_run = {"last_used_at": 0, "connections": []}
    assert {**again.call("session.info"), **other_run} == {**info, **other_run}
    again.opened = client.opened
    refreshed = refresh(again)
    assert refreshed["id"] == client.opened["id"]
    again.echo()
    assert again.refused("echo", token=client.token).code == Code.TOKEN_REVOKED
    assert stat.S_IMODE((home / "sessions.db").stat().st_mode) == 0o600
    assert other.stats["store"]["state"] == "healthy"


def test_revoked_session_stays_revoked_after_restart(servers: Servers) -> None:
    one = servers.start(sessions__per_user=2, sessions__when_full="evict_oldest")
    evicted, revoked, keeper = (servers.client(one, "ada") for _ in range(3))
    keeper.call("session.revoke", {"id": revoked.opened["id"]})
    before = keeper.token
    refresh(keeper)
    end(one, evicted, revoked, keeper)
    other = servers.start()
    client = servers.client(other)
    assert client.refused("echo", token=evicted.token).code == Code.SESSION_REPLACED
    assert client.refused("echo", token=revoked.token).code == Code.TOKEN_REVOKED
    assert client.refused("echo", token=before).code == Code.TOKEN_REVOKED
    assert client.call("echo", {"n": 1}, token=keeper.token) == {"n": 1}


@pytest.mark.parametrize("change", ["key", "roles"])
def test_older_store_does_not_revive_sessions_of_a_replaced_key(
    servers: Servers, home: Path, tmp_path: Path, change: str
) -> None:
    home.mkdir(0o700)
    users, store = UserFile(home / "users.toml"), home / "sessions.db"
    keys = {name: users.add(name) for name in ("ada", "bob")}
    one = servers.start(users_file=True)
    clients = {name: servers.client(one) for name in keys}
    for name, client in clients.items():
        client.open_session(name, keys[name])
        refresh(client)
    end(one, *clients.values())
    shutil.copy2(store, tmp_path / "copy")  # the key leaks, and is replaced later
    if change == "key":
        users.new_key("ada")
    else:
        users.set_roles("ada", frozenset({"billing"}))
    two = servers.start(users_file=True)
    assert servers.client(two).refused("echo", token=clients["ada"].token).code == Code.UNAUTHENTICATED
    two.begin_drain()
    two.join()
    (tmp_path / "copy").replace(store)
    three = servers.start(users_file=True)
    again = servers.client(three, token=clients["ada"].token)
    assert again.refused("echo").code == Code.UNAUTHENTICATED
    assert (
        again.refused("session.refresh", refresh_params(clients["ada"]), token=NO_TOKEN).code
        == Code.UNAUTHENTICATED
    )
    kept = servers.client(three, token=clients["bob"].token)
    kept.echo()
    kept.opened = clients["bob"].opened
    refresh(kept)
    kept.echo()


def test_session_limit_counts_sessions_from_before_restart(servers: Servers) -> None:
    one = servers.start(sessions__per_user=1)
    client = servers.client(one, "ada")
    end(one, client)
    other = servers.start(sessions__per_user=1)
    again = servers.client(other)
    login = {"scheme": "api_key", "user": "ada", "key": "the right key", "client": "test/1"}
    refused = again.refused("session.open", login)
    assert (refused.code, refused.details) == (Code.RESOURCE_EXHAUSTED, {"limit": 1})


def test_last_uses_are_stored_on_shutdown(servers: Servers) -> None:
    one = servers.start()
    client = servers.client(one, "ada")
    one.clock.ahead_ms = 10_000
    client.echo()
    used = client.call("session.info")["last_used_at"]
    end(one, client)
    other = servers.start()
    record = other.in_loop(lambda: other.server.state.registry.records("ada", 1))[0]
    assert abs(record.last_used_at - used) < 5_000


def test_idempotency_key_survives_a_restart(servers: Servers) -> None:
    one = servers.start()
    client = servers.client(one, "ada")
    client.send(client.request("time", None, {"idempotency_key": "k"}))
    first = client.answer(client.stream).value
    end(one, client)
    other = servers.start()
    again = servers.client(other, token=client.token)
    again.send(again.request("time", None, {"idempotency_key": "k"}))
    assert again.answer(again.stream).value == first


def test_second_server_with_the_same_home_folder_is_refused(servers: Servers) -> None:
    servers.start()
    with pytest.raises(ConfigError, match="a server runs with this home folder"):
        servers.start()


def test_failed_bind_releases_the_sessions_file(servers: Servers) -> None:
    one = servers.start()
    port = one.port
    end(one)
    busy = servers.start()
    with pytest.raises(ConfigError):
        servers.start(server__port=port)
    end(busy)
    servers.start()


def test_damaged_sessions_file_is_set_aside(
    servers: Servers, home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    one = servers.start()
    client = servers.client(one, "ada")
    end(one, client)
    for path in home.glob("sessions.db*"):
        if path.name in ("sessions.db-wal", "sessions.db-shm"):
            path.unlink()
    (home / "sessions.db").write_bytes(b"not a database" * 1_000)
    other = servers.start()
    servers.client(other, "ada").echo()
    assert '"event":"store.damaged"' in capfd.readouterr().err


@pytest.mark.requirement("recovery")
def test_sigkill_loses_no_acknowledged_session(home: Path, certs: Path) -> None:
    home.mkdir(mode=0o700)
    users = UserFile(home / "users.toml")
    key = users.add("ada")
    (home / "config.toml").write_text("[sessions]\nper_user = 1000\n")
    kept: dict[str, bytes] = {}
    gone: list[bytes] = []
    for round_ in range(3):
        with ServerProcess(home, certs) as server:
            with server.client() as client:
                for token in kept.values():
                    assert client.call("echo", {"n": round_}, token=token) == {"n": round_}
                for token in gone:
                    assert client.refused("echo", token=token).code in (
                        Code.TOKEN_REVOKED,
                        Code.UNAUTHENTICATED,
                    )
                for number in range(12):
                    client.open_session("ada", key)
                    if number % 3 == 1:
                        gone.append(client.token)
                        refresh(client)
                    if number % 3 == 2:
                        gone.append(client.token)
                        client.call("session.close")
                    else:
                        kept[client.opened["id"]] = client.token
            server.signal(signal.SIGKILL)
            assert server.wait() == -signal.SIGKILL
    assert len(kept) == 24
