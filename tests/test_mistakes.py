"""Mistakes of application developers: each has a message with the cure, where it is made.

A row is the mistake, and what its message must contain. The cure is after the semicolon or the colon.
"""

from __future__ import annotations

import asyncio
import errno
import importlib
import re
import resource
import subprocess
import sys
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import zcproto
from tests.server.helpers import KEY, PATIENT_CLIENT, ServerThread
from zcproto import App, Client, Config, Context, Items, ServerConfig
from zcproto.cli import main
from zcproto.client.blocking import BlockingStream
from zcproto.client.streams import Stream
from zcproto.client.typed import BlockingTypedClient, TypedClient, TypedStream
from zcproto.errors import ZcprotoError

ADDRESS = "localhost:7443"


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ZCPROTO_HOME", str(tmp_path / "home"))
    return tmp_path


# --- in the application --------------------------------------------------------------------------------------


async def numbers() -> AsyncIterator[int]:
    yield 1


class Greeter:
    def greet(self, name: str) -> str:
        return name


def add(function: Callable[..., Any], **options: Any) -> Callable[[], object]:
    return lambda: App().method(options.pop("name", "m"), **options)(function)


def plain() -> None: ...


async def with_items(items: Items[int]) -> int: ...  # type: ignore[empty-body]
def blocking_items(items: Items[int]) -> int: ...  # type: ignore[empty-body]
def generator() -> Any:
    yield 1


def without_annotation(context, name: str) -> None: ...  # type: ignore[no-untyped-def]
def short_name(ctx) -> None: ...  # type: ignore[no-untyped-def]
def of_complex(z: complex) -> None: ...
def int_keys() -> dict[int, str]: ...  # type: ignore[empty-body]
def positional(*words: str) -> None: ...
def unresolved(order: Missing) -> None: ...  # type: ignore[name-defined]  # noqa: F821


async def without_yield() -> AsyncIterator[int]:
    raise NotImplementedError


def twice() -> None:
    app = App()
    app.method("m")(plain)
    app.method("m")(plain)


def itself() -> None:
    app = App()
    app.include(app)


async def plain_lifespan(app: App) -> AsyncIterator[None]:
    yield


DEFINITIONS: dict[str, tuple[Callable[[], object], str]] = {
    "public stream": (add(numbers, public=True), "a stream needs a session; remove public=True"),
    "public method with items": (
        add(with_items, public=True),
        "a stream needs a session; remove public=True",
    ),
    "public with roles": (add(plain, public=True, roles={"a"}), "choose public or roles, not both"),
    "method of a class": (add(Greeter.greet), "self would be sent by the caller; register the bound method"),
    "unannotated context": (add(without_annotation), "annotate it: context: Context"),
    "unannotated ctx": (add(short_name), "annotate it: ctx: Context"),
    "stream by a plain generator": (add(generator), "a stream must be an async generator; write async def"),
    "stream without a yield": (add(without_yield), "has no yield; yield its items"),
    "items in a plain function": (add(blocking_items), "waits for them; write async def"),
    "thread of async def": (add(numbers, thread=True), "use asyncio.to_thread in async def"),
    "type that cannot be sent": (add(of_complex), "complex cannot be used"),
    "result with keys that are not str": (add(int_keys), "the keys of a dict must be str"),
    "parameter by position": (add(positional), "must be passable by name"),
    "misspelt annotation": (
        add(unresolved),
        "an annotation cannot be resolved: name 'Missing' is not defined",
    ),
    "name in capitals": (add(plain, name="Greet"), "must be 1 to 128 characters of a-z 0-9 _ ."),
    "name of the protocol": (add(plain, name="server.x"), "are reserved for the protocol"),
    "name twice": (twice, "is registered twice"),
    "application in itself": (itself, "an application cannot include itself"),
    "include of a module": (lambda: App().include(zcproto), "include an App object, such as jobs.app"),  # type: ignore[arg-type]
    "serve of a name": (lambda: zcproto.serve("shop:app"), "zcproto serve takes a name like shop:app"),  # type: ignore[arg-type]
    "serve with a setting": (lambda: zcproto.serve(App(), port=7443), "has no option 'port'; give a Config"),
    "settings as a dict": (lambda: zcproto.Server(App(), {}), "config is a Config, such as Config(server="),  # type: ignore[arg-type]
    "handler without a name": (
        lambda: zcproto.connect(ADDRESS).handler(plain),  # type: ignore[arg-type]
        'the handler has no name; write @client.handler("NAME")',
    ),
    "lifespan without decorator": (
        lambda: App(lifespan=plain_lifespan),  # type: ignore[arg-type]
        "decorate the function with contextlib.asynccontextmanager",
    ),
    "lifespan by position": (
        lambda: App(plain_lifespan),  # type: ignore[misc, arg-type]
        "App: give arguments by name, as in App(lifespan=...)",
    ),
    "section by position": (
        lambda: Config(ServerConfig()),  # type: ignore[misc]
        "Config: give settings by name, such as server=...",
    ),
    "misspelt section": (
        lambda: Config(sever=ServerConfig()),  # type: ignore[call-arg]
        "Config: sever is an unknown key; did you mean server?",
    ),
    "misspelt setting": (
        lambda: ServerConfig(prot=7443),  # type: ignore[call-arg]
        "ServerConfig: prot is an unknown key; did you mean port?",
    ),
}


@pytest.mark.parametrize("mistake", DEFINITIONS)
def test_mistake_in_the_application_is_refused_with_its_cure(mistake: str) -> None:
    make, message = DEFINITIONS[mistake]
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        make()


# --- in the options of connect -------------------------------------------------------------------------------

OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "cafile": ({"cafile": "ca.crt"}, "has no option 'cafile'; give ca_file"),
    "api_key": ({"api_key": "k"}, "give key or key_file"),
    "verify_ssl": ({"verify_ssl": False}, "give verify"),
    "port": ({"port": 7443}, 'give the address, as in connect("host:7443")'),
    "misspelt": ({"key_fil": "k"}, "give key_file"),
    "unknown": ({"colour": "red"}, "see zcproto.client.ConnectOptions"),
    "path as key": ({"user": "ada", "key": "ada.key"}, "this is the path of a file; give it as key_file"),
    "Path as key": ({"user": "ada", "key": Path("ada")}, "this is the path of a file; give it as key_file"),
    "bytes as key": ({"user": "ada", "key": b"k"}, "must be a str, not bytes; give the text of the key"),
    "empty key": ({"user": "ada", "key": " "}, "key: holds no key; write the key into it"),
    "key as key_file": (
        {"user": "ada", "key_file": "k" * 43},
        "key_file: this is the key itself; give the path",
    ),
    "missing key file": ({"user": "ada", "key_file": "none.key"}, "check the path of the key file"),
    "key and its file": ({"user": "ada", "key": "k", "key_file": "k"}, "both are given; remove one of them"),
    "user without key": ({"user": "ada"}, "the key is missing; give key_file, key or certificate"),
    "key without user": (
        {"key": "k"},
        "user is missing; give the name of the key's user, or set ZCPROTO_USER",
    ),
    "key of a certificate": (
        {"certificate": "a.crt", "key_file": "a.key"},
        "name that of the certificate's key as certificate_key",
    ),
    "two kinds of trust": ({"ca_file": "ca.crt", "verify": False}, "remove it or the others"),
    "device without name": ({"device": zcproto.Device}, "device_name is missing; give the name"),
    "timeout as text": ({"timeout": "5"}, "timeout is a number of seconds, such as timeout=5.0"),
    "start_timeout as text": ({"start_timeout": "5"}, "start_timeout is a number of seconds"),
    "timeout below 0": ({"timeout": -1}, "timeout: -1 is below 0; give seconds, or None for no limit"),
    "max_connections as text": ({"max_connections": "2"}, "max_connections is an int"),
    "verify as text": ({"verify": "no"}, "verify is True or False"),
    "on_event as text": ({"on_event": "print"}, "on_event is a function"),
    "middleware without a list": ({"middleware": print}, "middleware is a list of functions"),
    "too many connections": ({"max_connections": 1000}, "is out of range; give from 1 to 64"),
}


@pytest.mark.parametrize("mistake", OPTIONS)
def test_mistake_in_the_options_is_refused_with_its_cure(mistake: str) -> None:
    options, message = OPTIONS[mistake]
    with pytest.raises((TypeError, ZcprotoError)) as caught:
        zcproto.connect(ADDRESS, **options)
    assert message in str(caught.value)
    assert "k" * 43 not in "".join(traceback.format_exception(caught.value))


ADDRESSES = {
    "::1:7443": "write [::1]:7443 for a port, or [::1:7443] for an address",
    "localhost:": "the port must be a number from 1 to 65535",
    "https://localhost:7443": "write HOST:PORT",
    "": "write HOST:PORT",
}


@pytest.mark.parametrize("address", ADDRESSES)
def test_mistake_in_the_address_is_refused_with_its_cure(address: str) -> None:
    with pytest.raises(ZcprotoError) as caught:
        zcproto.connect(address)
    assert ADDRESSES[address] in str(caught.value)


@pytest.mark.parametrize("address", [7443, None, [7443]])
def test_address_that_is_not_a_text_is_refused_with_the_cure(address: Any) -> None:
    with pytest.raises(TypeError, match='the address is a str, such as "host:7443"'):
        zcproto.connect(address)


def test_port_by_position_is_refused_with_the_cure() -> None:
    with pytest.raises(
        TypeError, match=re.escape('as in connect("host:7443"), or a list; give options by name')
    ):
        zcproto.connect("localhost", 7443)  # type: ignore[misc]


# --- in calls --------------------------------------------------------------------------------------------------

app = App()


@app.method("items")
async def take(chunks: Items[bytes]) -> int:
    return len([chunk async for chunk in chunks])


@app.method("stream")
async def give(context: Context) -> AsyncIterator[int]:
    yield 1


@app.method("open", public=True)
def open_to_all() -> None: ...


@app.method("late")
async def late() -> AsyncIterator[int]:
    await asyncio.get_running_loop().create_future()
    yield 1


@app.method("wait")
async def wait() -> None:
    await asyncio.get_running_loop().create_future()


@app.method("keys")
def keys() -> Any:
    return {1: "one"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, certs: Path) -> Any:
    with ServerThread(tmp_path_factory.mktemp("mistakes") / "home", certs, app) as running:
        yield running


async def finish(stream: Stream) -> None:
    async with stream:
        await stream.finished()


async def read_twice(client: Client) -> None:
    stream = client.stream("stream")
    for _ in range(2):
        async for _item in stream:
            pass


async def use_closed(client: Client) -> None:
    await client.close()
    await client.call("wait")


CALLS: dict[str, tuple[Callable[[Client], Awaitable[Any]], str]] = {
    "call of a stream": (
        lambda client: client.call("stream"),
        "this method is a stream; open it with stream",
    ),
    "stream of a call": (
        lambda client: finish(client.stream("keys")),
        "this method is not a stream; call it",
    ),
    "unknown method": (
        lambda client: client.call("kees"),
        "unknown method 'kees'; call server.info to list methods",
    ),
    "param by position": (lambda client: client.call("wait", "x"), "by name, as in call('wait', name=...)"),
    "param given twice": (lambda client: client.call("wait", {"ms": 1}, ms=2), "ms is given twice"),
    "stream read twice": (read_twice, "was read to its end; open another one"),
    "unknown param": (lambda client: client.call("wait", ms=1), "ms is unknown"),
    "key of a param": (lambda client: client.call("wait", {"a": {1: 2}}), "has a key of type int, not str"),
    "param of another type": (lambda client: client.call("wait", a=object()), "is of type builtins.object"),
    "params too large": (
        lambda client: client.call("wait", data=bytes(2_000_000)),
        "(limits.max_frame_bytes): send it in pieces, as a stream",
    ),
    "item too large": (
        lambda client: finish(client.stream("items", items=[bytes(100_000)])),
        "(streams.max_item_bytes): send it in pieces",
    ),
    "timeout": (
        lambda client: client.call("wait", timeout=0.001),
        "wait has not answered within 0.001 s; give it a longer timeout",
    ),
    "no time": (lambda client: client.call("wait", timeout=-1), "not answered within -1 s; give it a longer"),
    "timeout as text": (lambda client: client.call("wait", timeout="5"), "timeout is a number of seconds"),  # type: ignore[arg-type]
    "params of a stream": (lambda client: client.stream("give", "x"), "as in stream('give', name=...)"),  # type: ignore[arg-type, return-value]
    "window of one number": (lambda client: client.stream("give", window=8), "window is (items, bytes)"),  # type: ignore[arg-type, return-value]
    "empty window": (lambda client: client.stream("give", window=(0, 1)), "both above 0"),  # type: ignore[return-value]
    "item_timeout as text": (
        lambda client: client.stream("give", item_timeout="5"),  # type: ignore[arg-type, return-value]
        "item_timeout is a number of seconds",
    ),
    "late item": (
        lambda client: finish(client.stream("late", item_timeout=0.001)),
        "late has sent no item within 0.001 s",
    ),
    "items as bytes": (
        lambda client: client.stream("items", items=b"some"),  # type: ignore[arg-type, return-value]
        "items is a list or an iterator of items, not bytes",
    ),
    "items for a method without": (
        lambda client: finish(client.stream("stream", items=[1])),
        "this method takes no items; leave them out",
    ),
    "items as params": (
        lambda client: finish(client.stream("items", chunks=[b""])),
        "chunks is sent as the items of the stream",
    ),
    "reopen without a function": (
        lambda client: client.stream("give", reopen=True),  # type: ignore[arg-type, return-value]
        "reopen is a function of the last item",
    ),
    "closed": (use_closed, "this client is closed; create a new one"),
    "resume where nothing is durable": (
        lambda client: finish(client.resume("A" * 22)),
        "this server has no durable streams",
    ),
    "second open": (lambda client: client.open(), "was opened before; create a new one"),
}


@pytest.mark.parametrize("mistake", CALLS)
async def test_mistake_in_a_call_is_an_error_with_its_cure(mistake: str, server: ServerThread) -> None:
    call, message = CALLS[mistake]
    options = {"user": "ada", "key": f"{KEY}\n", "ca_file": server.ca_file, **PATIENT_CLIENT}
    async with zcproto.connect(f"127.0.0.1:{server.port}", **options) as client:
        with pytest.raises((RuntimeError, TypeError, ValueError, ZcprotoError)) as caught:
            await call(client)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "cure"),
    [
        ({}, "connect with a user and a key, or another login"),
        ({"user": "ada", "key": KEY, "session": False}, "call open_session() of the client first"),
    ],
    ids=["without credentials", "not opened"],
)
async def test_private_method_without_a_session_names_the_cure(
    server: ServerThread, options: dict[str, Any], cure: str
) -> None:
    options |= {"ca_file": server.ca_file, **PATIENT_CLIENT}
    async with zcproto.connect(f"127.0.0.1:{server.port}", **options) as client:
        with pytest.raises(zcproto.Unauthenticated, match=re.escape(f"this needs a session: {cure}")):
            await client.call("keys")


async def test_wrong_key_keeps_its_message_in_a_client_without_session(server: ServerThread) -> None:
    options = {"ca_file": server.ca_file, "user": "ada", "key": KEY, "session": False, **PATIENT_CLIENT}
    async with zcproto.connect(f"127.0.0.1:{server.port}", **options) as client:
        with pytest.raises(zcproto.Unauthenticated, match="the login was not accepted"):
            await client.call("session.open", scheme="api_key", user="ada", key="zk_wrong")


async def test_result_with_a_key_that_is_not_str_is_logged_and_the_connection_stays(
    server: ServerThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []
    monkeypatch.setattr(server.server.state, "on_incident", lambda what, id, error: found.append(str(error)))
    async with server.connect("ada", key=KEY, **PATIENT_CLIENT) as client:
        for _ in range(2):
            with pytest.raises(zcproto.InternalError):
                await client.call("keys")
    assert found == 2 * ["value has a key of type int, not str, and cannot be sent"]


@pytest.mark.parametrize("connect", [zcproto.connect, zcproto.connect_blocking])
def test_method_of_the_server_as_attribute_names_the_cure(connect: Callable[[str], Any]) -> None:
    client = connect(ADDRESS)
    with pytest.raises(
        AttributeError, match=r"'greet'; call a method .* by .*client\.call\(\"greet\", \.\.\.\)"
    ):
        client.greet(name="ada")
    with pytest.raises(AttributeError, match=r"'_greet'$"):
        client._greet  # noqa: B018
    assert not hasattr(client, "greet")


async def test_client_that_is_not_open_names_the_cure() -> None:
    with pytest.raises(RuntimeError, match=r"open the client first: async with connect\(\.\.\.\) as client"):
        await zcproto.connect(ADDRESS).call("m")


def test_blocking_client_that_is_not_open_names_the_cure() -> None:
    client = zcproto.connect_blocking(ADDRESS)
    with pytest.raises(zcproto.ConnectionClosed, match=r"open the client first: with connect_blocking"):
        client.call("m")
    client.close()
    with pytest.raises(zcproto.ConnectionClosed, match="this client is closed; create a new one"):
        client.call("m")


def test_client_of_another_event_loop_names_the_cure(server: ServerThread) -> None:
    async def begin() -> Client:
        return await server.connect("ada", key=KEY, **PATIENT_CLIENT)

    with asyncio.Runner() as first:
        client = first.run(begin())
        with pytest.raises(
            RuntimeError, match="belongs to another event loop; create it in the one that uses it"
        ):
            with_other_loop(client)
        first.run(client.close())


def with_other_loop(client: Client) -> None:
    loop = asyncio.new_event_loop()
    try:
        call = loop.create_task(client.call("keys"))
        loop.run_until_complete(call)
    finally:
        loop.close()


async def use(value: Any, way: str) -> None:
    match way:
        case "with":
            with value:
                pass
        case "async with":
            async with value:
                pass
        case "for":
            for _ in value:
                pass
        case "async for":
            async for _ in value:
                pass
        case "await":
            await value


WAYS: dict[str, tuple[Any, str, str]] = {
    "with a client": (
        lambda: zcproto.connect(ADDRESS),
        "with",
        "Client: write async with; a program without",
    ),
    "async with a blocking client": (
        lambda: zcproto.connect_blocking(ADDRESS),
        "async with",
        "BlockingClient: write with; a program with asyncio uses connect",
    ),
    "with a server": (lambda: zcproto.Server(App(), zcproto.Config()), "with", "Server: write async with"),
    "for events": (lambda: zcproto.connect(ADDRESS).events, "for", "EventStream: write async for"),
    **{
        f"{way} {kind.__name__}": (lambda kind=kind: kind.__new__(kind), way, f"{kind.__name__}: {cure}")
        for kind in (Stream, TypedStream)
        for way, cure in (
            ("with", "write async with"),
            ("for", "write async for"),
            ("await", "read it by async for, or open it by async with"),
        )
    },
    **{
        f"{way} BlockingStream": (
            lambda: BlockingStream.__new__(BlockingStream),
            way,
            f"BlockingStream: {cure}; a program with asyncio uses connect",
        )
        for way, cure in (("async with", "write with"), ("async for", "write for"))
    },
}


@pytest.mark.parametrize("mistake", WAYS)
async def test_use_without_async_or_with_it_names_the_cure(mistake: str) -> None:
    make, way, message = WAYS[mistake]
    with pytest.raises(TypeError, match=re.escape(message)):
        await use(make(), way)


def test_blocking_stream_that_is_read_twice_names_the_cure(server: ServerThread) -> None:
    options = {"user": "ada", "key": KEY, "ca_file": server.ca_file, **PATIENT_CLIENT}
    with zcproto.connect_blocking(f"127.0.0.1:{server.port}", **options) as client:
        stream = client.stream("stream")
        assert [*stream] == [1]
        with pytest.raises(RuntimeError, match="was read to its end; open another one"):
            next(iter(stream))
        with pytest.raises(TypeError, match="items is a list or an iterator of items, not async_generator"):
            client.stream("items", items=numbers())  # type: ignore[arg-type]


def test_typed_client_of_the_other_kind_names_the_cure() -> None:
    with pytest.raises(TypeError, match="write this module by zcproto stubs --blocking"):
        TypedClient(zcproto.connect_blocking(ADDRESS))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="write this module without --blocking"):
        BlockingTypedClient(zcproto.connect(ADDRESS))  # type: ignore[arg-type]


# --- on the command line ---------------------------------------------------------------------------------------

COMMANDS: dict[str, tuple[list[str], str]] = {
    "params as words": (["call", ADDRESS, "m", "a=1", "b=x"], """write: '{"a": 1, "b": "x"}'."""),
    "one param as a word": (["call", ADDRESS, "m", "a=1"], """write: '{"a": 1}'."""),
    "params without quotes": (
        ["call", ADDRESS, "m", "{a:", "1}"],
        "one JSON object in single quotes, such as",
    ),
    "params that are no object": (
        ["call", ADDRESS, "m", "7"],
        "JSON must be an object with the params, such as",
    ),
    "no method": (["call", ADDRESS], "Give either METHOD or --list."),
    "key without user": (["call", ADDRESS, "m", "--key-file", "k"], "--key-file goes with --user."),
    "user without key": (
        ["call", ADDRESS, "m", "--user", "ada"],
        "use --key-file FILE, or set ZCPROTO_KEY_FILE",
    ),
    "port out of range": (["call", "localhost:99999", "m"], "the port must be a number from 1 to 65535"),
    "application without object": (["serve", "shop"], "give the application as MODULE:APP, for example"),
    "module that is missing": (["serve", "missing_shop:app"], "check the name, or install it"),
    "command of another program": (["run", "shop:app"], "No command 'run'; did you mean serve?"),
    "text that is no JSON": (["topic", "publish", "prices", "high"], "Write a text as '\"text\"'"),
    "folder without reload": (["serve", "--reload-dir", "."], "--reload-dir goes with --reload."),
    "blocking TypeScript": (
        ["stubs", "tests.cli.stub_app:app", "--language", "typescript", "--blocking"],
        "--blocking goes with --language python.",
    ),
}


@pytest.mark.parametrize("mistake", COMMANDS)
def test_mistake_on_the_command_line_is_refused_with_its_cure(
    mistake: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ZCPROTO_KEY", raising=False)
    arguments, message = COMMANDS[mistake]
    assert main(arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_few_open_files_are_refused_at_the_start_with_the_cure() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "zcproto", "serve", "--port", "0"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (63, 63)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.endswith(
        "zcproto: 63 open files are allowed, and a server needs 64;"
        " raise the limit with ulimit -n or LimitNOFILE=\n"
    )


def test_command_without_a_free_descriptor_is_refused_with_the_cure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_none(*args: object, **options: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(importlib, "import_module", open_none)
    assert main(["health"]) == 1
    assert capsys.readouterr().err == "zcproto: Too many open files; raise the limit with ulimit -n\n"


def test_unknown_method_is_answered_with_the_one_that_was_meant(
    server: ServerThread, own_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key_file = own_home / "key"
    key_file.touch(0o600)
    key_file.write_text(KEY)
    options = ["--user", "ada", "--key-file", str(key_file), "--ca", str(server.ca_file)]
    assert main(["call", f"127.0.0.1:{server.port}", "kees", *options]) == 1
    assert "unknown method 'kees'; did you mean 'keys'?" in capsys.readouterr().err


def test_public_method_is_suggested_to_a_caller_without_a_session(
    server: ServerThread, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["call", f"127.0.0.1:{server.port}", "opn", "--ca", str(server.ca_file)]) == 1
    assert "or did you mean 'open', which needs none?" in " ".join(capsys.readouterr().err.split())
