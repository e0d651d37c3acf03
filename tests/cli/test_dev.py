"""What a developer sees of a server with --dev: its requests, refusals and wrong results."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, cast

import pytest

import zcproto
from tests.server.conftest import Serve
from tests.server.helpers import KEY, PATIENT_CLIENT, ServerThread
from zcproto import App, Client, Ended
from zcproto.cli.connect import CALL_CLIENT
from zcproto.cli.dev import Development

Capture = pytest.CaptureFixture[str]


@dataclass
class Turn:
    prompt: str
    price: Decimal = Decimal(1)


shop = App()
app = App()
app.include(shop, prefix="shop.")


@app.method(public=True)
def hello() -> str:
    return "hello"


@app.method
def turn(kind: str) -> Turn:
    return {"right": Turn("a"), "field": Turn(cast(Any, 7)), "class": cast(Any, "text")}[kind]


@shop.method
def numbers(kind: str) -> list[int]:
    return {"right": [1], "wrong": ["x"], "tuple": (1, 2)}[kind]  # type: ignore[return-value]


@app.method
async def words(kind: str) -> AsyncIterator[str | Ended[int]]:
    yield cast(Any, 7) if kind == "item" else "a"
    yield Ended(cast(Any, "text") if kind == "result" else 1)


@app.method
async def refuse() -> None:
    raise zcproto.NotFound("no such thing; name another")


@app.method
async def leave() -> None:
    raise asyncio.CancelledError


@pytest.fixture
def server(serve: Serve) -> ServerThread:
    development = Development(app, "shop:app")
    server = serve(development.app)
    server.in_loop(lambda: development.ready(server.server))
    return server


def lines(capsys: Capture) -> list[str]:
    """Return what was printed, without times."""
    found = [line.split(maxsplit=1)[1] for line in capsys.readouterr().err.splitlines() if line[2:3] == ":"]
    return [" ".join(word for word in line.split(" ") if word and not word[0].isdigit()) for line in found]


@pytest.mark.parametrize(
    ("method", "kind", "message"),
    [
        ("turn", "right", ""),
        ("turn", "field", "the result is not Turn, as annotated: "),
        ("turn", "class", "the result is not Turn, as annotated: "),
        ("shop.numbers", "right", ""),
        ("shop.numbers", "tuple", ""),
        ("shop.numbers", "wrong", "the result is not list[int], as annotated: result[0] must be an int"),
    ],
)
async def test_result_of_another_type_is_an_error(
    method: str, kind: str, message: str, server: ServerThread, capsys: Capture
) -> None:
    async with server.connect("ada", key=KEY, **PATIENT_CLIENT) as client:
        if message:
            with pytest.raises(zcproto.InternalError):
                await client.call(method, kind=kind)
        else:
            await client.call(method, kind=kind)
    (line,) = lines(capsys)
    assert line.startswith(f"ada {method} ms" + f" INTERNAL: {message}" * bool(message))


async def finish(client: Client, kind: str) -> Any:
    async with client.stream("words", kind=kind) as stream:
        return await stream.finished()


async def test_items_and_the_result_of_a_stream_are_checked(server: ServerThread, capsys: Capture) -> None:
    async with server.connect("ada", key=KEY, **PATIENT_CLIENT) as client:
        assert await finish(client, "right") == 1
        for kind in ("item", "result"):
            with pytest.raises(zcproto.InternalError):
                await finish(client, kind)
    assert lines(capsys) == [
        "ada words ms",
        "ada words ms INTERNAL: the item is not str, as annotated: item must be a str",
        "ada words ms INTERNAL: the result is not int, as annotated: result must be an int",
    ]


async def test_refusals_are_shown_with_the_method_that_was_meant(
    server: ServerThread, capsys: Capture
) -> None:
    async with (
        server.connect("ada", key=KEY, **PATIENT_CLIENT) as ada,
        server.connect(**PATIENT_CLIENT) as anyone,
    ):
        for client, method, error in (
            (ada, "wrods", "no method 'wrods'; did you mean 'words'?"),
            (ada, "zzz", "no method 'zzz'; see the first line"),
            (ada, "words", "this method is a stream; open it with stream"),
            (ada, "refuse", "no such thing; name another"),
            (ada, "leave", "the server cancelled the method"),
            (anyone, "helo", "no method 'helo'; did you mean 'hello'?"),
            (anyone, "turn", "this needs a session: connect with a user and a key"),
        ):
            with pytest.raises(zcproto.CallError) as caught:
                await client.call(method)
            assert error in caught.value.message
    assert lines(capsys) == [
        "ada wrods UNIMPLEMENTED: no method 'wrods'; did you mean 'words'?",
        "ada zzz UNIMPLEMENTED: no method 'zzz'; see the first line",
        "ada words FAILED_PRECONDITION: this method is a stream; open it with stream",
        "ada refuse ms NOT_FOUND: no such thing; name another",
        "ada leave ms cancelled",
        "- helo UNAUTHENTICATED: no method 'helo'; did you mean 'hello'?",
        "- turn UNAUTHENTICATED: this needs a session: connect with a user and a key, or another login",
    ]


async def test_stream_that_the_command_has_called_first_is_shown_once(
    server: ServerThread, capsys: Capture
) -> None:
    async with server.connect("ada", key=KEY, client=CALL_CLIENT, **PATIENT_CLIENT) as client:
        with pytest.raises(zcproto.FailedPrecondition):
            await client.call("words", kind="right")
        await finish(client, "right")
    assert lines(capsys) == ["ada words ms"]


def test_default_application_has_a_banner(capsys: Capture) -> None:
    Development(None, None).print_banner([("127.0.0.1", 7443), ("::1", 7443)])
    assert capsys.readouterr().out == (
        "zcproto: echo, sleep and time listens on localhost:7443: echo, sleep, repeat, time\n"
    )
