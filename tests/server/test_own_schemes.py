"""Schemes of the application on a real server: identity, binding to its users, limits, errors and the log."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import zcproto
from tests.server.conftest import Serve
from tests.server.helpers import PATIENT_CLIENT, ROOT, TIMEOUT, ServerThread
from zcproto.app.app import App, Context
from zcproto.app.authentication import Answer, CallableAuthenticator
from zcproto.auth import BUILT_IN_SCHEMES, Identity, UserFile
from zcproto.auth.login import MAX_PENDING
from zcproto.config.model import LogConfig
from zcproto.errors import Code, NotFound
from zcproto.observe.log import configure_logging
from zcproto.sessions import OpenedSession
from zcproto.wire.frame import Kind

PASSWORDS = {"ada": "correct horse", "root": "battery staple"}


def check(context: Context, user: str, password: str) -> Answer:
    assert context.peer == "127.0.0.1"
    if PASSWORDS.get(user) != password:
        return None
    return Identity(user, roles={"operator"} if user == "root" else set())


PASSWORD = CallableAuthenticator("password", check)


def login(user: str = "ada", password: str | None = None, **more: Any) -> dict[str, Any]:
    return {"scheme": "password", "user": user, "password": password or PASSWORDS[user], **more}


def app(*authenticators: Any) -> App:
    application = App(authenticators=authenticators)

    @application.method("who")
    def who(context: Context) -> str:
        return context.user

    return application


def opened(server: ServerThread, **fields: Any) -> Any:
    """Return a client with a session."""
    client = server.client()
    client.token = client.call("session.open", login(**fields))["token"]
    return client


def test_application_names_its_authenticators(serve: Serve) -> None:
    server = serve(app(PASSWORD), users_file=True)
    with opened(server) as client:
        assert client.call("who") == "ada"
    with server.client() as client:
        answer = client.refused("session.open", {"scheme": "api_key", "user": "ada", "key": "k"})
        assert (answer.code, answer.message) == (
            Code.INVALID_ARGUMENT,
            "scheme: not offered here; use one of: password",
        )


def test_authenticators_of_the_server_replace_those_of_the_application(serve: Serve) -> None:
    other = CallableAuthenticator("other", lambda: "eve")
    server = serve(app(PASSWORD), authenticators=[other])
    with server.client() as client:
        client.token = client.call("session.open", {"scheme": "other"})["token"]
        assert client.call("who") == "eve"
        assert client.call("session.info")["bound"] is False


def test_identity_makes_an_operator(serve: Serve) -> None:
    server = serve(app(PASSWORD), users_file=True)
    with opened(server, user="root") as root, opened(server) as ada:
        assert {each["user"] for each in root.call("server.sessions")} == {"ada", "root"}
        assert ada.refused("server.sessions").code == Code.PERMISSION_DENIED


# --- beside the users of the home folder --------------------------------------------------------------


@pytest.mark.parametrize("store", ["memory", "sqlite"])
def test_users_of_the_file_and_of_the_application_share_a_server(serve: Serve, store: str) -> None:
    server = serve(app(BUILT_IN_SCHEMES, PASSWORD), users_file=True, store__url=store)
    users = UserFile(server.home / "users.toml")
    key = users.add("grace")
    with server.client() as grace, opened(server) as ada:
        grace.open_session("grace", key)
        assert (grace.call("who"), ada.call("who")) == ("grace", "ada")
        with server.client() as other:  # the user is looked up when a connection first uses a token
            other.token = ada.token
            assert other.call("who") == "ada"
            other.token = grace.token
            assert other.call("who") == "grace"
        users.remove("grace")
        server.until(lambda: len(server.server.state.registry) == 1)
        assert grace.refused("who").code == Code.TOKEN_REVOKED


def test_two_authenticators_of_one_scheme_prevent_the_start(serve: Serve) -> None:
    own = CallableAuthenticator("api_key", lambda user, key: user)
    with pytest.raises(ValueError, match="two authenticators for the scheme 'api_key'"):
        serve(app(own, BUILT_IN_SCHEMES), users_file=True)


# --- failures -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("long_login_delay")
def test_failures_are_throttled_by_the_field_that_names_the_user(serve: Serve) -> None:
    def by_email(email: str, password: str) -> str | None:
        return email if password == "right" else None

    own = CallableAuthenticator("email", by_email, user_field="email")
    server = serve(app(own), users_file=True, limits__login_failures=2)

    def attempt(email: str, password: str) -> int:
        with server.client() as client:
            fields = {"scheme": "email", "email": email, "password": password}
            try:
                client.call("session.open", fields)
            except Exception as error:
                return int(getattr(error, "code", 0))
            return 0

    assert [attempt("ada@example.org", "wrong") for _ in range(3)] == [
        Code.UNAUTHENTICATED,
        Code.UNAUTHENTICATED,
        Code.RESOURCE_EXHAUSTED,
    ]
    assert attempt("eve@example.org", "right") == 0
    assert attempt("ada@example.org", "right") == Code.RESOURCE_EXHAUSTED


async def never() -> str:
    await asyncio.Event().wait()
    return "ada"


def refuse(user: str, password: str) -> str:
    raise NotFound(f"{user} with {password} is not known")


def fail(user: str, password: str) -> str:
    raise KeyError(password)


@pytest.mark.parametrize(
    ("function", "fields", "code", "event"),
    [
        (never, {}, Code.UNAVAILABLE, "login.timed_out"),
        (refuse, {"user": "adam", "password": "hunter2"}, Code.UNAUTHENTICATED, "login.refused"),
        (fail, {"user": "adam", "password": "hunter2"}, Code.INTERNAL, "request.failed"),
        (lambda user: 5, {"user": "adam"}, Code.INTERNAL, "request.failed"),
    ],
)
def test_client_gets_one_answer_and_the_log_the_reason(
    serve: Serve,
    capsys: pytest.CaptureFixture[str],
    function: Callable[..., Any],
    fields: dict[str, Any],
    code: Code,
    event: str,
) -> None:
    configure_logging(LogConfig(level="info", format="json"))
    server = serve(
        app(CallableAuthenticator("own", function)),
        users_file=True,
        limits__login_timeout="100ms" if function is never else "10m",
    )
    with server.client() as client:
        answer = client.refused("session.open", {"scheme": "own", **fields})
    assert answer.code == code
    text = capsys.readouterr().err
    found = {line["event"]: line for line in map(json.loads, text.splitlines())}
    assert event in found
    assert "hunter2" not in text
    assert found[event].get("reason") in (None, "NOT_FOUND: *** with *** is not known")


def test_program_ends_the_sessions_of_a_user(serve: Serve) -> None:
    server = serve(app(PASSWORD), users_file=True)
    with opened(server) as ada, opened(server, user="root") as root:
        ended = asyncio.run_coroutine_threadsafe(server.server.end_sessions("ada"), server.loop)
        assert ended.result(TIMEOUT) == 1
        assert ada.event().value == ["session.revoked", {"reason": "the user was changed"}]
        assert ada.refused("who").code == Code.TOKEN_REVOKED
        assert root.call("who") == "root"


class Accounts:
    """The state of an application."""

    def __init__(self) -> None:
        self.threads: list[str] = []

    def verify(self, password: str) -> bool:
        self.threads.append(threading.current_thread().name)
        return password == "right"


@asynccontextmanager
async def accounts(app: App[Accounts]) -> AsyncIterator[Accounts]:
    yield Accounts()


@pytest.mark.parametrize("thread", [False, True])
def test_authenticator_has_the_state_of_the_application_and_may_run_in_a_thread(
    serve: Serve, thread: bool
) -> None:
    def check(context: Context[Accounts], user: str, password: str) -> str | None:
        return user if context.state.verify(password) else None

    application: App[Accounts] = App(
        lifespan=accounts, authenticators=[CallableAuthenticator("password", check, thread=thread)]
    )

    @application.method("threads")
    def threads(context: Context[Accounts]) -> list[str]:
        return [*context.state.threads, threading.current_thread().name]

    server = serve(application, users_file=True)
    with server.client() as client:
        wrong = client.refused("session.open", login(password="wrong"))
        assert wrong.code == Code.UNAUTHENTICATED
        client.token = client.call("session.open", login(password="right"))["token"]
        *names, loop = client.call("threads")
        assert len(names) == 2
        assert all((name != loop) is thread for name in names)


def test_reload_changes_the_limits_of_logins(serve: Serve) -> None:
    own = CallableAuthenticator("own", never)
    server = serve(app(own), users_file=True, limits__login_timeout="10m")
    server.reload(limits__login_timeout="100ms")
    with server.client() as client:
        assert client.refused("session.open", {"scheme": "own"}).code == Code.UNAVAILABLE
        server.reload(limits__login_timeout="10m", limits__logins_pending=4)
        client.send(*(client.request("session.open", {"scheme": "own"}) for _ in range(5)))
        answers = [client.receive().code for _ in range(4)]
    assert answers == [Code.RESOURCE_EXHAUSTED] * 4, "one address may have a quarter"


def test_logins_that_name_no_user_are_limited_for_their_user_until_their_sessions_are_open(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = asyncio.Event()

    async def check(ticket: str) -> str:
        return ticket

    server = serve(app(CallableAuthenticator("ticket", check)), users_file=True, sessions__per_user=20)
    sessions = server.server.state.sessions
    open_now = sessions.open

    async def open_later(user: str, **opening: Any) -> OpenedSession:
        await gate.wait()
        return await open_now(user, **opening)

    monkeypatch.setattr(sessions, "open", open_later)
    with server.client() as client:

        def send(user: str, count: int) -> None:
            login = {"scheme": "ticket", "ticket": user}
            client.send(*(client.request("session.open", login) for _ in range(count)))

        send("ada", MAX_PENDING + 1)
        assert client.receive().code == Code.RESOURCE_EXHAUSTED
        send("bob", 1)
        server.in_loop(gate.set)
        found = client.answers(MAX_PENDING + 1).values()
        assert {answer.kind for answer in found} == {Kind.RESPONSE}
        assert client.call("session.open", {"scheme": "ticket", "ticket": "ada"})["user"] == "ada"


PROGRAM = """
from zcproto import App, CallableAuthenticator, Config, Context, ServerConfig, serve
from zcproto.config import StoreConfig, TlsConfig

app = App()


@app.method
def who(context: Context) -> str:
    return context.user


serve(
    app,
    Config(
        server=ServerConfig(host=["127.0.0.1"], port=0),
        store=StoreConfig(timeout=10.0),
        tls=TlsConfig(handshake_timeout=30.0),
    ),
    authenticators=[CallableAuthenticator("own", lambda name: name, user_field="name")],
    ready=lambda server: print(server.port, flush=True),
)
"""


def test_serve_takes_authenticators(tmp_path: Path, certs: Path) -> None:
    shutil.copytree(certs, tmp_path / "certs")
    environ = {**os.environ, "ZCPROTO_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM]
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True) as process:
        try:
            address, ca_file = f"127.0.0.1:{process.stdout.readline().strip()}", tmp_path / "certs" / "ca.crt"
            options = {"login": {"scheme": "own", "name": "ada"}, "ca_file": ca_file, "home": tmp_path}
            with zcproto.connect_blocking(address, **options, **PATIENT_CLIENT) as client:
                assert client.call("who") == "ada"
        finally:
            process.terminate()
            process.communicate(timeout=TIMEOUT)
