"""The client for programs without an event loop."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import inspect
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.client.conftest import Blocking
from tests.limits import TIMEOUT
from tests.server.conftest import Serve
from tests.server.helpers import KEY, ServerThread, eventually
from zcproto.app.app import App
from zcproto.app.context import Context
from zcproto.client.blocking import BlockingClient, BlockingUserSession, connect_blocking
from zcproto.client.client import Client, UserSession, connect
from zcproto.client.handlers import Event
from zcproto.client.options import ConnectOptions
from zcproto.errors import (
    ConnectionClosed,
    DeadlineExceeded,
    InvalidArgument,
    TlsError,
    Unauthenticated,
)


@contextlib.contextmanager
def ctrl_c(when: Callable[[], Any]) -> Iterator[None]:
    """Interrupt the main thread once a condition holds, by a signal that pytest does not use."""

    def press(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    def wait_and_press() -> None:
        eventually(when)
        signal.pthread_kill(main, signal.SIGUSR2)

    main = threading.main_thread().ident
    assert main is not None
    pressing = threading.Thread(target=wait_and_press)
    old = signal.signal(signal.SIGUSR2, press)
    pressing.start()
    try:
        yield
    finally:
        pressing.join()
        signal.signal(signal.SIGUSR2, old)


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "zcproto-client"]


def test_a_call_returns_its_result(shared: ServerThread, blocking: Blocking) -> None:
    with blocking(shared) as client:
        assert client.call("echo", x=1) == {"x": 1}
        assert client.call("echo", {"timeout": 1}, y=2) == {"timeout": 1, "y": 2}
        assert client.call("echo", timeout=TIMEOUT, idempotency_key="k") == {}
        assert client.session is not None
        assert client.session.user == "ada"
        assert client.welcome["server"] == "zcproto"
        assert client.address.port == shared.port
        assert repr(client) == f"BlockingClient('127.0.0.1:{shared.port}')"
    assert threads() == []
    assert client.session is None


def test_blocking_call_raises_the_same_errors_as_async(shared: ServerThread, blocking: Blocking) -> None:
    with blocking(shared) as client:
        with pytest.raises(InvalidArgument):
            client.call("sleep", ms=-1)
        with pytest.raises(DeadlineExceeded):
            client.call("sleep", ms=3_600_000, timeout=0.05)
        assert client.call("echo", x=1) == {"x": 1}


def test_concurrent_threads_share_one_connection(shared: ServerThread, blocking: Blocking) -> None:
    before = shared.stats["connections_opened"]
    with blocking(shared) as client, concurrent.futures.ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: client.call("echo", i=i), range(200)))
    assert results == [{"i": i} for i in range(200)]
    assert shared.stats["connections_opened"] == before + 1


def test_failed_connect_raises_and_leaves_no_thread(shared: ServerThread, blocking: Blocking) -> None:
    with pytest.raises(Unauthenticated):
        blocking(shared, key="wrong").open()
    with pytest.raises(TlsError), blocking(shared, server_hostname="other.example"):
        pass
    assert threads() == []


def test_client_opens_once_and_works_only_while_open(shared: ServerThread, blocking: Blocking) -> None:
    client = blocking(shared)
    with pytest.raises(ConnectionClosed, match="open the client first"):
        client.call("echo")
    client.open()
    with pytest.raises(RuntimeError, match="opened before"):
        client.open()
    client.close()
    client.close()
    with pytest.raises(ConnectionClosed, match="closed"):
        client.call("echo")


def test_a_client_that_was_never_opened_is_closed_without_ado(
    shared: ServerThread, blocking: Blocking
) -> None:
    client = blocking(shared)
    client.close()
    with pytest.raises(ConnectionClosed, match="closed"):
        client.open()
    assert threads() == []


def test_exhausted_file_limit_raises_and_leaves_no_thread(
    shared: ServerThread, blocking: Blocking, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted() -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("zcproto.client.blocking.new_event_loop", exhausted)
    client = blocking(shared)
    with pytest.raises(OSError, match="Too many open files"):
        client.open()
    client.close()
    with pytest.raises(ConnectionClosed):
        client.call("echo")


def test_ctrl_c_during_close_leaves_no_thread(
    shared: ServerThread,
    blocking: Blocking,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    client = blocking(shared)
    client.open()

    closing = threading.Event()

    async def never(link: Any) -> None:
        closing.set()
        await asyncio.sleep(3_600)

    monkeypatch.setattr(client._client._sessions, "close", never)
    with ctrl_c(closing.is_set), pytest.raises(KeyboardInterrupt):
        client.close()
    assert threads() == []
    assert capfd.readouterr().err == ""


def test_close_fails_pending_calls_of_other_threads(shared: ServerThread, blocking: Blocking) -> None:
    client = blocking(shared)
    client.open()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        before = shared.stats["running"]
        call = pool.submit(client.call, "sleep", ms=3_600_000)
        shared.until(lambda: shared.server.state.tasks.running > before)
        client.close()
        with pytest.raises(ConnectionClosed):
            call.result()


def test_session_can_be_opened_later(shared: ServerThread, blocking: Blocking) -> None:
    with blocking(shared, session=False) as client:
        assert client.session is None
        assert client.open_session().user == "ada"
        assert client.call("echo", x=1) == {"x": 1}


def test_event_iterator_ends_when_client_closes(serve: Serve, blocking: Blocking) -> None:
    app = App()

    @app.method("poke")
    def poke(context: Context, n: int) -> bool:
        return context.send_event("poked", {"n": n})

    server = serve(app)
    client = blocking(server)
    client.open()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        events = iter(client.events)
        for n in range(3):
            client.call("poke", n=n)
        assert [next(events) for _ in range(3)] == [Event("poked", {"n": n}) for n in range(3)]
        rest = pool.submit(list, events)
        client.close()
        assert rest.result() == []
    assert list(client.events) == []


def test_on_event_runs_in_the_client_thread(serve: Serve, blocking: Blocking) -> None:
    app = App()
    seen: list[tuple[str, str]] = []
    arrived = threading.Event()

    def on_event(event: Event) -> None:
        seen.append((event.name, threading.current_thread().name))
        arrived.set()

    @app.method("poke")
    def poke(context: Context) -> bool:
        return context.send_event("poked", None)

    with blocking(serve(app), on_event=on_event) as client:
        client.call("poke")
        assert arrived.wait(TIMEOUT)
    assert seen == [("poked", "zcproto-client")]


def test_ctrl_c_cancels_only_the_call(serve: Serve, blocking: Blocking) -> None:
    server = serve()

    with blocking(server) as client:
        with ctrl_c(lambda: server.stats["running"]), pytest.raises(KeyboardInterrupt):
            client.call("sleep", ms=3_600_000, timeout=None)
        server.until(lambda: server.server.state.tasks.running == 0)
        assert client.call("echo", x=1) == {"x": 1}


PROGRAM = """
import sys
import zcproto
client = zcproto.connect_blocking(
    sys.argv[1], user="ada", key=sys.argv[2], ca_file=sys.argv[3], timeout=900, connect_timeout=900
)
client.open()
print(client.call("echo", x=1), flush=True)
"""


def test_program_without_close_exits_and_ends_its_session(serve: Serve, tmp_path: Path) -> None:
    server = serve()
    arguments = [f"127.0.0.1:{server.port}", KEY, str(server.home / "certs" / "ca.crt")]
    environment = {**os.environ, "ZCPROTO_HOME": str(tmp_path / "client-home")}
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        env=environment,
        check=False,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "{'x': 1}\n", "")
    server.until(lambda: len(server.server.state.registry) == 0)


FIELDS = {field.name: field for field in dataclasses.fields(ConnectOptions)}


def test_both_clients_have_the_same_methods_and_options() -> None:
    def options(function: Callable[..., Any]) -> dict[str, Any]:
        return {
            name: (parameter.kind, parameter.default)
            for name, parameter in inspect.signature(function).parameters.items()
        }

    assert options(connect) == options(connect_blocking)
    assert {name: (inspect.Parameter.KEYWORD_ONLY, field.default) for name, field in FIELDS.items()} == {
        name: option for name, option in options(connect).items() if name != "address"
    }
    for ours, blocking in ((Client, BlockingClient), (UserSession, BlockingUserSession)):
        names = {name for name in dir(ours) if not name.startswith("_")}
        assert names <= {name for name in dir(blocking) if not name.startswith("_")}
        for name in ("call", "stream", "open", "close", "open_session"):
            twins = list(options(getattr(ours, name))), list(options(getattr(blocking, name)))
            assert twins[0] == twins[1]
    assert options(Client.session_for) == options(BlockingClient.session_for)


def test_blocking_call_does_not_poll(
    shared: ServerThread, blocking: Blocking, monkeypatch: pytest.MonkeyPatch
) -> None:
    timeouts: list[float | None] = []

    def record(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if threading.current_thread() is threading.main_thread():
                timeouts.append(args[-1])
            return function(*args)

        return call

    wait = threading.Condition.wait
    with blocking(shared) as client, monkeypatch.context() as patch:
        patch.setattr(time, "sleep", record(time.sleep))
        patch.setattr(threading.Condition, "wait", lambda self, timeout=None: record(wait)(self, timeout))
        client.call("sleep", ms=50)
    assert set(timeouts) <= {None}
