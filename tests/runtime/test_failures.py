"""Exceptions of an application's code: the caller gets an incident id, the log gets the rest without secrets."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import zcproto
from tests.helpers import whole_lines
from tests.runtime.test_embedding import config, connect
from tests.server.helpers import TIMEOUT
from zcproto import App, Context, Items
from zcproto.client.client import Client
from zcproto.sessions.token import token_text

PACKAGE = f"{Path(zcproto.__file__).parent}/"
TOKEN = token_text(bytes(range(100, 132)))

app = App()


@app.middleware
async def within(context: Context, call_next: Callable[[Context], Awaitable[Any]]) -> Any:
    return await call_next(context)


def fault() -> None:
    try:
        raise KeyError("tea")
    except KeyError as error:
        raise ValueError(f"{TOKEN} is not a token") from error


@app.method("plain")
def plain() -> None:
    fault()


@app.method("later")
async def later() -> None:
    await asyncio.sleep(0)
    fault()


@app.method("thread", thread=True)
def thread() -> None:
    fault()


@app.method("group")
async def group() -> None:
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(later())


@app.method("items")
async def items() -> AsyncIterator[int]:
    yield 1
    fault()


@app.method("takes")
async def takes(numbers: Items[int]) -> int:
    async for _ in numbers:
        fault()
    return 0


@app.method("ends")
async def ends(context: Context) -> AsyncIterator[int]:
    """Fail while the stream is cancelled."""
    try:
        yield 1
        await context.stopping.wait()
    finally:
        fault()


begun = asyncio.Event()


@app.method("cancelled")
async def cancelled() -> None:
    """Fail after the deadline."""
    begun.set()
    try:
        await asyncio.sleep(3600)
    finally:
        fault()


def refuse(context: Context) -> bool:
    fault()
    return False


app.topic("topic", allow=refuse)


async def read(client: Client, method: str) -> None:
    async with client.stream(method) as stream:
        async for _ in stream:
            pass


async def send(client: Client) -> None:
    async with client.stream("takes") as stream:
        await stream.send(1)
        async for _ in stream:
            pass


async def leave(client: Client) -> None:
    async with client.stream("ends") as stream:
        await stream.receive()


async def call_in_vain(client: Client) -> None:
    begun.clear()
    timeout = 0.05
    while not begun.is_set():  # a busy machine may take longer than that to begin it
        with pytest.raises(zcproto.DeadlineExceeded):
            await client.call("cancelled", timeout=timeout)
        timeout *= 2


CALLS: dict[str, Callable[[Client], Awaitable[Any]]] = {
    "plain": lambda client: client.call("plain"),
    "later": lambda client: client.call("later"),
    "thread": lambda client: client.call("thread"),
    "thread with a key": lambda client: client.call("thread", idempotency_key="3"),
    "group": lambda client: client.call("group"),
    "plain with a key": lambda client: client.call("plain", idempotency_key="1"),
    "later with a key": lambda client: client.call("later", idempotency_key="2"),
    "items": lambda client: read(client, "items"),
    "topic": lambda client: read(client, "topic"),
    "takes": send,
    "ends": leave,
    "cancelled": call_in_vain,
}


@pytest.fixture
async def server(home: Path) -> AsyncIterator[zcproto.Server]:
    gc.collect()  # a method that an earlier test has left is logged when it is collected
    log = zcproto.LogConfig(file=home / "log")
    async with zcproto.Server(app, config(log=log), home=home) as server:
        yield server


async def failed(server: zcproto.Server) -> dict[str, Any]:
    """Return the line of the log about a failed request."""
    async with asyncio.timeout(TIMEOUT):
        while True:
            for line in whole_lines((server.home.path / "log").read_text()):
                if line["event"] == "request.failed":
                    return dict(line)
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("call", CALLS)
async def test_failure_is_logged_with_its_cause_and_answered_by_its_incident(
    server: zcproto.Server, call: str
) -> None:
    async with connect(server, "ada", await server.users.add("ada")) as client:
        answer = ""
        try:
            await CALLS[call](client)
        except zcproto.InternalError as error:
            answer = str(error)
        line = await failed(server)
    if answer:
        assert answer == f"INTERNAL: internal error, incident {line['incident']}"
    assert line["what"] == call.partition(" ")[0]
    shown = [text.strip() for text in line["traceback"]]
    assert "fault()" in shown
    cause = shown.index("KeyError: 'tea'")
    assert "direct cause" in shown[cause + 1]
    assert "ValueError: (hidden) is not a token" in shown[cause + 2 :]
    files = [text.partition('"')[2] for text in shown if text.startswith("File ")]
    own = [file for file in files if file.startswith(PACKAGE)]
    assert own == [] or call == "cancelled", "only the cancellation was raised in zcproto"
    assert TOKEN not in (server.home.path / "log").read_text()


async def test_failing_authenticator_is_logged(home: Path) -> None:
    def check(password: str) -> str:
        raise ValueError(f"no account has the password={password}")

    own = zcproto.CallableAuthenticator("password", check, user_field=None)
    log = zcproto.LogConfig(file=home / "log")
    async with zcproto.Server(app, config(log=log), home=home, authenticators=[own]) as server:
        options = {"login": {"scheme": "password", "password": "hunter2"}, "home": home}
        with pytest.raises(zcproto.InternalError, match=r"^INTERNAL: internal error, incident [0-9a-f]{16}$"):
            async with zcproto.connect(f"localhost:{server.port}", ca_file=server.ca_file, **options):
                pass
        line = await failed(server)
    assert "ValueError: no account has the password=" in line["exc_info"]
    assert any(text.endswith("in check") for text in line["traceback"])
    assert "hunter2" not in (home / "log").read_text()


async def test_reload_changes_how_exceptions_are_written(home: Path) -> None:
    file = home / "log"
    full = config(log=zcproto.LogConfig(file=file))
    frames = config(log=zcproto.LogConfig(file=file, exceptions="frames"))
    async with zcproto.Server(app, full, home=home, read_config=lambda: frames) as server:
        assert [change.key for change in (await server.reload()).applied] == ["log.exceptions"]
        async with connect(server, "ada", await server.users.add("ada")) as client:
            with pytest.raises(zcproto.InternalError):
                await client.call("plain")
        line = await failed(server)
    assert (line["exc_info"], "traceback" in line) == ("ValueError", False)
    assert line["exc_info_at"][-1].endswith(" fault")
