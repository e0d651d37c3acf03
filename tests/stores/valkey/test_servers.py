"""Sentinels, TLS, logins and other ways to reach a server."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import trustme

from tests.limits import TIMEOUT
from tests.stores.contract import FIVE, MINUTE, WALL, digest, session
from tests.stores.valkey.helpers import ALL, ClusterOf, _offset, is_done, opened
from tests.stores.valkey.server_process import (
    PROGRAMS,
    VALKEY_FIRST,
    ServerProcess,
    free_port,
    running,
    until,
    wait_for,
)
from zcproto.common.clock import system_clock
from zcproto.errors import Code, ConfigError
from zcproto.stores.base import Change, ChangeKind, Created, StoreUnavailable
from zcproto.stores.valkey import servers
from zcproto.stores.valkey.store import ValkeyStore

PASSWORD = "hunter2/@:%?#"


ESCAPED = "hunter2%2F%40%3A%25%3F%23"


async def fault_of(url: str, **options: Any) -> str:
    """Return the error of a configuration."""
    with pytest.raises(ConfigError) as error:
        await ValkeyStore(url, **options).open(lambda change: None)
    return str(error.value)


Run = Callable[..., ServerProcess]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """Return a function that runs a server with a folder of this name, until the end of the test."""
    with ExitStack() as stack:

        def run(name: str, *options: str, program: str = PROGRAMS[0]) -> ServerProcess:
            return stack.enter_context(running(program, tmp_path / name, *options))

        yield run


@pytest.mark.parametrize("program", VALKEY_FIRST)
async def test_failover_reported_by_sentinels(program: str, run: Run) -> None:
    first = run("first", program=program)
    second = run("second", "--replicaof", "127.0.0.1", str(first.port), program=program)
    wait_for(lambda: b"master_link_status:up" in second.command("INFO", "replication"))
    sentinel = run(
        "sentinel",
        "--sentinel",
        f"sentinel monitor sessions 127.0.0.1 {first.port} 1",
        f"sentinel down-after-milliseconds sessions {int(TIMEOUT * 1000)}",
        "sentinel failover-timeout sessions 3000",
        program=program,
    )
    unused_port = free_port()
    url = f"redis+sentinel://127.0.0.1:{unused_port},{sentinel.address}/sessions"
    with pytest.raises(StoreUnavailable, match="does not monitor a service of this name"):
        await ValkeyStore(f"redis+sentinel://{sentinel.address}/others").open(lambda change: None)
    wait_for(lambda: _has_replica(sentinel))
    async with opened(url) as (store, changes):
        await store.create(session(), FIVE)
        await until(lambda: _offset(second) >= _offset(first))
        first.kill()
        assert not await is_done(store.ping)
        sentinel.command("SENTINEL", "SET", "sessions", "down-after-milliseconds", 300)
        await until(lambda: is_done(store.ping))
        assert second.command("ROLE")[0] == b"master"
        assert await store.find(session().token_digest) == session()
        assert await store.create(session(2), FIVE) == Created()
        assert second.command("EXISTS", b"zcp:t:" + digest("token 2")) == 1
        assert ALL in changes


async def test_planned_failover_drops_the_link_while_the_old_primary_is_up(run: Run) -> None:
    first, second = run("first"), run("second")
    sentinel = _monitoring(run, "sentinel", first)
    async with opened(f"valkey+sentinel://{sentinel.address}/sessions") as (store, changes):
        await store.create(session(), FIVE)
        sentinel.command("SENTINEL", "REMOVE", "sessions")  # the primary stays in use
        await store.ping()
        sentinel.command("SENTINEL", "MONITOR", "sessions", "127.0.0.1", second.port, 1)
        await until(lambda: changes != [])
        assert first.command("ROLE")[0] == b"master"
        assert await store.create(session(2), FIVE) == Created()
        assert second.command("EXISTS", b"zcp:t:" + digest("token 2")) == 1


async def test_ping_fails_at_a_primary_that_the_sentinels_have_replaced(run: Run) -> None:
    first, second = run("first"), run("second")
    sentinel = _monitoring(run, "sentinel", first)
    async with opened(f"valkey+sentinel://{sentinel.address}/sessions") as (store, changes):
        sentinel.command("SENTINEL", "REMOVE", "sessions")
        await store.ping()  # sentinels without an answer do not matter
        sentinel.command("SENTINEL", "MONITOR", "sessions", "127.0.0.1", second.port, 1)
        with pytest.raises(StoreUnavailable, match="another primary"):
            await store.ping()
        await store.ping()
        assert len(changes) == 1


async def test_store_that_is_closed_or_not_open_has_no_connection_to_the_sentinels(run: Run) -> None:
    primary = run("primary")
    sentinel = _monitoring(run, "sentinel", primary)
    store = ValkeyStore(f"valkey+sentinel://{sentinel.address}/sessions")
    await store.open(lambda change: None)
    await store.close()
    await until(lambda: len(sentinel.command("CLIENT", "LIST").splitlines()) == 1)
    primary.kill()
    with pytest.raises(StoreUnavailable):
        await store.open(lambda change: None)
    await until(lambda: len(sentinel.command("CLIENT", "LIST").splitlines()) == 1)


class PatientWait:
    """A module asyncio whose `wait` with a time limit ends once a single task is left."""

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    async def wait(self, tasks: Any, **options: Any) -> tuple[Any, Any]:
        if "timeout" not in options:
            return await asyncio.wait(tasks, **options)
        done, left = set[Any](), set(tasks)
        while len(left) > 1:
            more, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
            done |= more
        return done, left


async def test_sentinel_with_the_highest_epoch_counts(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "asyncio", PatientWait())  # else it would have to be quick
    first, second = run("first"), run("second")
    behind = _monitoring(run, "behind", first)
    current = _monitoring(run, "current", second, "sentinel config-epoch sessions 3")
    hung = _monitoring(run, "hung", first)
    hung.stop()
    gone = f"127.0.0.1:{free_port()}"
    url = f"valkey+sentinel://{gone},{behind.address},{current.address},{hung.address}/sessions"
    async with opened(url) as (store, changes):
        monkeypatch.setattr(servers, "asyncio", asyncio)
        await store.create(session(), FIVE)
        assert second.command("EXISTS", b"zcp:t:" + session().token_digest) == 1
        hung.go_on()
        await store.ping()
        assert changes == []


async def test_sentinel_that_answers_after_another_has_refused_counts(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zcproto.stores.valkey.servers._PATIENCE", 0.0)
    server = run("server")
    sentinel = _monitoring(run, "sentinel", server)
    async with opened(f"valkey+sentinel://127.0.0.1:{free_port()},{sentinel.address}/sessions") as (
        store,
        _,
    ):
        await store.ping()


async def test_sentinel_user_needs_permission_for_the_address_only(run: Run) -> None:
    server = run("server")
    sentinel = _monitoring(run, "sentinel", server)
    rules = "-@all", "+hello", "+auth", "+client|setinfo", "+sentinel|get-master-addr-by-name"
    sentinel.command("ACL", "SETUSER", "default", *rules)
    async with opened(f"valkey+sentinel://{sentinel.address}/sessions") as (store, _):
        await store.ping()


def _monitoring(run: Run, name: str, primary: ServerProcess, *options: str) -> ServerProcess:
    """Run a sentinel that monitors a primary alone."""
    return run(name, "--sentinel", f"sentinel monitor sessions 127.0.0.1 {primary.port} 1", *options)


def _has_replica(sentinel: ServerProcess) -> bool:
    replicas = sentinel.command("SENTINEL", "REPLICAS", "sessions")
    return len(replicas) == 1 and b"ok" in replicas[0]


class Certificates:
    def __init__(self, folder: Path) -> None:
        self.ca = trustme.CA(key_type=trustme.KeyType.ECDSA)
        self.ca_file = folder / "ca.pem"
        self.ca.cert_pem.write_to_path(self.ca_file)
        self.server = self._issue(folder / "server", "127.0.0.1")
        self.client = self._issue(folder / "client", "zcproto.example")

    def _issue(self, path: Path, name: str) -> tuple[Path, Path]:
        issued = self.ca.issue_cert(name, key_type=trustme.KeyType.ECDSA)
        certificate, key = path.with_suffix(".pem"), path.with_suffix(".key")
        issued.cert_chain_pems[0].write_to_path(certificate)
        issued.private_key_pem.write_to_path(key)
        return certificate, key


@pytest.fixture(params=VALKEY_FIRST)
def tls(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[ServerProcess, Certificates]]:
    certificates, port = Certificates(tmp_path), free_port()
    options = [
        *("--port", "0", "--tls-port", str(port), "--tls-ca-cert-file", str(certificates.ca_file)),
        *("--tls-cert-file", str(certificates.server[0]), "--tls-key-file", str(certificates.server[1])),
    ]
    with running(request.param, tmp_path / "server", *options, port=port) as server:
        yield server, certificates


async def test_tls_with_client_certificate(
    tls: tuple[ServerProcess, Certificates], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, certificates = tls
    url = f"valkeys://{server.address}"
    certificate_file, key_file = certificates.client
    files: dict[str, Any] = {"certificate_file": certificate_file, "key_file": key_file}
    async with opened(url, ca_file=certificates.ca_file, **files) as (store, _):
        await store.create(session(), FIVE)
        assert await store.find(session().token_digest) == session()
    assert "is not trusted" in await fault_of(url, **files)
    # With ca_file the system's authorities are not trusted.
    monkeypatch.setenv(ssl.get_default_verify_paths().openssl_cafile_env, str(certificates.ca_file))
    other = certificates.ca_file.with_name("other.pem")
    trustme.CA().cert_pem.write_to_path(other)
    assert "is not trusted" in await fault_of(url, ca_file=other, **files)
    with pytest.raises(StoreUnavailable):  # it requires a client certificate
        await ValkeyStore(url, ca_file=certificates.ca_file).open(lambda change: None)
    assert "not trusted" in await fault_of(
        url.replace("127.0.0.1", "localhost"), ca_file=certificates.ca_file, **files
    )


async def test_tls_to_a_server_without_tls_fails(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zcproto.stores.valkey.servers.OPEN_TIMEOUT_S", 0.3)
    url = f"rediss://{run('server').address}"
    with pytest.raises(StoreUnavailable):
        await ValkeyStore(url).open(lambda change: None)


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("rediss://127.0.0.1", {"ca_file": "missing"}, "store.ca_file"),
        ("rediss://127.0.0.1", {"ca_file": "empty"}, "store.ca_file"),
        ("rediss://127.0.0.1", {"certificate_file": "empty", "key_file": "empty"}, "store.ca_file"),
        ("redis://127.0.0.1", {"ca_file": "empty"}, "rediss://"),
        ("redis://127.0.0.1", {"certificate_file": "empty"}, "rediss://"),
    ],
)
def test_unusable_tls_files_are_refused(
    url: str, options: dict[str, str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(ConfigError, match=message):
        ValkeyStore(url, **{name: tmp_path / file for name, file in options.items()})


RULES = (
    *("on", f">{PASSWORD}", "~zcp:*", "&*", "-@all", "+@read", "+@write", "+@scripting", "+@connection"),
    *("-@dangerous", "+info", "+role"),
)


@pytest.fixture(params=VALKEY_FIRST)
def protected(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ServerProcess]:
    with running(request.param, tmp_path / "server") as server:
        server.command("ACL", "SETUSER", "sessions", *RULES)
        server.command(
            "ACL",
            "SETUSER",
            "reader",
            "on",
            f">{PASSWORD}",
            "~*",
            "-@all",
            "+@connection",
            "+@read",
            "-client",
        )
        yield server


async def test_login_with_user_and_password(protected: ServerProcess) -> None:
    url = f"redis://sessions:{ESCAPED}@{protected.address}/0"
    async with opened(url) as (store, _), opened(url) as (other, changes):
        await store.create(session(), FIVE)
        await other.find(session().token_digest)
        await store.end_all(Code.TOKEN_REVOKED, WALL)
        await until(lambda: changes == [Change(ChangeKind.SESSION, session().id)])
        await store.ping()
        assert await store.count() == 0
        await store.claim("alice", "k", b"digest", MINUTE)
        await store.keep_answer("alice", "k", b"answer", MINUTE)
        assert (await other.claim("alice", "k", b"digest", MINUTE)).answer == b"answer"
        await store.expire(WALL, 0, 10)
        (message,) = await store.examine(system_clock.wall())
        assert "does not show" in message
        assert PASSWORD not in repr(store)
        assert "sessions@127.0.0.1" in repr(store)
    async with opened(f"redis://sessions@{protected.address}", password=PASSWORD) as (store, _):
        await store.ping()


@pytest.mark.parametrize("password", ["wrong", "hunter3%2F%40"])
async def test_wrong_password_is_reported_and_never_shown(protected: ServerProcess, password: str) -> None:
    fault = await fault_of(f"redis://sessions:{password}@{protected.address}")
    assert "refuses this user or password" in fault
    assert protected.address in fault
    assert password not in fault
    assert "hunter" not in fault


async def test_user_without_permissions_is_reported(protected: ServerProcess) -> None:
    fault = await fault_of(f"redis://reader:{ESCAPED}@{protected.address}")
    assert "does not permit this user" in fault
    assert PASSWORD not in fault


async def test_changed_password_is_an_outage(protected: ServerProcess) -> None:
    async with opened(f"redis://sessions:{ESCAPED}@{protected.address}") as (store, changes):
        protected.command(
            "ACL", "SETUSER", "sessions", "resetpass", ">another"
        )  # which drops its connections
        protected.command("CLIENT", "KILL", "USER", "sessions")
        await until(lambda: _cannot_log_in(store))
        protected.command("ACL", "SETUSER", "sessions", f">{PASSWORD}")
        await until(lambda: is_done(store.ping))
        assert changes == [ALL]


async def _cannot_log_in(store: ValkeyStore) -> bool:
    reason = ""
    try:
        await store.ping()
    except StoreUnavailable as error:
        reason = str(error)
    assert PASSWORD not in reason
    return "refuses this user or password" in reason


async def test_missing_password_is_reported(run: Run) -> None:
    server = run("server", "--requirepass", PASSWORD)
    assert "refuses this user or password" in await fault_of(server.url)
    async with opened(f"valkey://:{ESCAPED}@{server.address}") as (store, _):
        await store.ping()


@pytest.mark.parametrize("program", VALKEY_FIRST)
async def test_unix_socket_and_database(program: str, tmp_path: Path, run: Run) -> None:
    path = tmp_path / "a socket"
    server = run("server", "--unixsocket", str(path), program=program)
    async with opened(f"unix://{str(path).replace(' ', '%20')}?db=3") as (store, _):
        await store.create(session(), FIVE)
        assert await store.count() == 1
        assert "a socket/3" in repr(store)
    async with opened(f"{server.url}/3") as (store, _):
        assert await store.list() == [session()]
    async with opened(server.url) as (store, _):
        assert await store.list() == []
    assert "cannot be used" in await fault_of(f"{server.url}/9999")


async def test_wrong_kind_of_server_is_reported(cluster: ClusterOf, run: Run) -> None:
    assert "redis+cluster://" in await fault_of(f"redis://{cluster.nodes[0].address}")
    server = run("server")
    assert "does not belong to a cluster" in await fault_of(f"redis+cluster://{server.address}")
    with pytest.raises((ConfigError, StoreUnavailable)):
        await ValkeyStore(f"redis+sentinel://{server.address}/x").open(lambda change: None)


async def test_port_of_another_program_is_reported() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1_000)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as other:
        port = other.sockets[0].getsockname()[1]
        with pytest.raises(StoreUnavailable):
            await ValkeyStore(f"redis://127.0.0.1:{port}").open(lambda change: None)


async def test_examine_reports_a_clock_that_is_apart(run: Run) -> None:
    server = run("server")
    async with opened(server.url) as (store, _):
        for apart_ms, is_reported in ((0, False), (-15_000, True), (3_600_000, True)):
            found = await store.examine(system_clock.wall() + apart_ms)
            assert any("clock" in problem for problem in found) == is_reported


async def test_examine_reports_replicas_that_a_failover_may_find_behind(run: Run) -> None:
    primary = run("primary")
    run("replica", "--replicaof", f"127.0.0.1 {primary.port}")
    wait_for(lambda: primary.command("ROLE")[2] != [])
    async with opened(primary.url) as (store, _):
        assert any("min-replicas" in problem for problem in await store.examine(system_clock.wall()))
        primary.command("CONFIG", "SET", "min-replicas-to-write", 1)
        assert not any("min-replicas" in problem for problem in await store.examine(system_clock.wall()))


async def test_examine_reports_unsafe_configuration(run: Run) -> None:
    server = run("server")
    async with opened(server.url) as (store, _):
        assert [text.split()[0] for text in await store.examine(system_clock.wall())] == ["appendonly"]
        server.command("CONFIG", "SET", "appendonly", "yes")
        server.command("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
        assert [text.split()[0] for text in await store.examine(system_clock.wall())] == [
            "appendfsync",
            "maxmemory-policy",
        ]
        server.command("CONFIG", "SET", "appendfsync", "always")
        server.command("CONFIG", "SET", "maxmemory-policy", "noeviction")
        assert await store.examine(system_clock.wall()) == []
