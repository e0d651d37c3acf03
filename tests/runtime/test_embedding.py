"""A server inside another program: users, configuration in code, and `serve` where it cannot run."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import zcproto
from tests.helpers import run_mypy
from tests.server.helpers import PATIENT_CLIENT
from zcproto.client.client import Client
from zcproto.common.roles import NO_ROLES, OPERATORS


@pytest.fixture
async def server(home: Path) -> AsyncIterator[zcproto.Server]:
    async with zcproto.Server(None, config(), home=home) as server:
        yield server


def config(log: zcproto.LogConfig | None = None) -> zcproto.Config:
    return zcproto.Config(
        log=log or zcproto.LogConfig(),
        store=zcproto.StoreConfig(url="memory"),
        server=zcproto.ServerConfig(port=0),
        certificates=zcproto.CertificatesConfig(key_types=("ecdsa-p256",)),
    )


def connect(server: zcproto.Server, user: str, key: str) -> Client:
    return zcproto.connect(
        f"localhost:{server.port}",
        user=user,
        key=key,
        ca_file=server.ca_file,
        home=server.home.path,
        **PATIENT_CLIENT,
    )


async def test_added_user_can_call(server: zcproto.Server) -> None:
    key = await server.users.add("ada")
    assert "hidden" in repr(key)
    async with connect(server, "ada", key) as client:
        assert await client.call("echo", n=1) == {"n": 1}
    assert await server.users.list() == [zcproto.UserEntry("ada", NO_ROLES, True, False)]
    with pytest.raises(zcproto.ConfigError, match='user "ada" exists already'):
        await server.users.add("ada")


async def test_operator_and_user_without_key_are_added(server: zcproto.Server) -> None:
    key = await server.users.add("root", roles=OPERATORS)
    await server.users.add_without_key("robot")
    await server.users.add_without_key("chief", roles=OPERATORS)
    assert await server.users.list() == [
        zcproto.UserEntry("root", OPERATORS, True, False),
        zcproto.UserEntry("robot", NO_ROLES, False, False),
        zcproto.UserEntry("chief", OPERATORS, False, False),
    ]
    async with connect(server, "root", key.reveal()) as client:
        assert (await client.call("server.stats"))["connections"] == 1


async def test_new_key_ends_the_sessions_of_the_old_one(server: zcproto.Server) -> None:
    old = await server.users.add("ada")
    async with connect(server, "ada", old) as client:
        new = await server.users.new_key("ada")
        with pytest.raises(zcproto.TokenRevoked):
            await client.call("echo")
    async with connect(server, "ada", new) as client:
        await client.call("echo")
    with pytest.raises(zcproto.NotFound):
        await server.users.new_key("eve")


async def test_disabled_and_removed_users_lose_their_sessions(server: zcproto.Server) -> None:
    key = await server.users.add("ada")
    async with connect(server, "ada", key):
        assert await server.users.disable("ada") == 1
    assert [user.disabled for user in await server.users.list()] == [True]
    await server.users.enable("ada")
    async with connect(server, "ada", key):
        assert await server.users.remove("ada") == 1
    assert await server.users.list() == []


async def test_change_of_the_file_is_in_the_list(server: zcproto.Server) -> None:
    (server.home.users).touch(0o600)
    server.home.users.write_text("[users.eve]\n")
    assert [user.name for user in await server.users.list()] == ["eve"]


async def test_users_of_own_authenticators_are_elsewhere(home: Path) -> None:
    own = zcproto.CallableAuthenticator("password", lambda params: zcproto.Identity("ada"))
    async with zcproto.Server(None, config(), home=home, authenticators=[own]) as server:
        with pytest.raises(zcproto.FailedPrecondition, match="has its own authenticators"):
            await server.users.list()


async def test_log_applies_if_the_configuration_sets_it(home: Path) -> None:
    first, second = home / "first.log", home / "second.log"
    async with zcproto.Server(None, config(log=zcproto.LogConfig(file=first)), home=home) as server:
        assert "server.listening" in first.read_text()
        other = config(log=zcproto.LogConfig(file=second))
        async with zcproto.Server(None, other, home=home, control=False):
            assert first.read_text().count("server.listening") == 2
        assert server.owns_log
    assert not second.exists()


async def test_log_of_the_program_is_left_alone_by_default(
    server: zcproto.Server, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not server.owns_log
    assert "server.listening" not in capsys.readouterr().err


# --- serve() ---------------------------------------------------------------------------------------------


async def test_serve_in_a_running_loop_names_the_alternative() -> None:
    with pytest.raises(RuntimeError, match=r"one is running here; use `async with zcproto\.Server\(app\)"):
        zcproto.serve()


def test_serve_in_another_thread_names_the_alternative() -> None:
    raised: list[BaseException] = []

    def run() -> None:
        try:
            zcproto.serve()
        except RuntimeError as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert "only the main thread can; use `async with zcproto.Server(app)" in str(raised[0])


# --- types -----------------------------------------------------------------------------------------------

PROGRAM = """
import asyncio
from pathlib import Path

import zcproto
from zcproto import (
    AlertsConfig, CallsConfig, CertificatesConfig, Config, FreshnessConfig, HttpConfig, IdempotencyConfig,
    LimitsConfig, LogConfig, ServerConfig, SessionsConfig, SiteConfig, StoreConfig, StreamsConfig, TlsConfig,
)

config = Config(
    server=ServerConfig(port=0, host=("::1",), drain_timeout=1.0),
    tls=TlsConfig(client_auth="optional"),
    certificates=CertificatesConfig(
        key_types=("ecdsa-p256",), site=(SiteConfig(names=("a.example",), certificate=(Path("/a.pem"),)),)
    ),
    sessions=SessionsConfig(per_user=9, idle_timeout=None),
    store=StoreConfig(url="memory"),
    idempotency=IdempotencyConfig(per_user=5),
    freshness=FreshnessConfig(tolerance=9.0),
    limits=LimitsConfig(max_connections=50),
    streams=StreamsConfig(max_open=2),
    calls=CallsConfig(max=0),
    http=HttpConfig(metrics="open"),
    alerts=AlertsConfig(repeat=None),
    log=LogConfig(exceptions="frames"),
)


async def main() -> None:
    async with zcproto.Server(zcproto.App(), config, home=Path("/tmp")) as server:
        key: str = await server.users.add("ada", roles={"operator"})
        names: list[str] = [user.name for user in await server.users.list()]
        ended: int = await server.users.remove("ada")
        ca_file: Path | None = server.ca_file
        print(key, names, ended, ca_file)


def serve() -> None:
    zcproto.serve(zcproto.App(), config, ready=lambda server: print(server.port))
"""


def test_configuration_in_code_passes_strict_type_checks(tmp_path: Path) -> None:
    good, wrong = tmp_path / "good.py", tmp_path / "wrong.py"
    good.write_text(PROGRAM)
    wrong.write_text(
        "from zcproto import Config, ServerConfig\nConfig(server=ServerConfig(port='x', prot=1))\n"
    )
    done = run_mypy(tmp_path, good, wrong)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[-1].startswith("Found 2 errors in 1 file"), done.stdout
    assert all(line.startswith("/") is False or "wrong.py" in line for line in lines)
    exec(compile(PROGRAM, "program", "exec"), {})  # the values are valid as well


def test_start_does_not_need_the_main_thread(home: Path) -> None:
    answers: list[object] = []

    async def main() -> None:
        async with zcproto.Server(None, config(), home=home) as server:
            key = await server.users.add("ada")
            async with connect(server, "ada", key) as client:
                answers.append(await client.call("echo"))

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    thread.join()
    assert answers == [{}]
