"""The worker's main function: commands from a pipe, reports on standard output."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import runpy
import signal
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import uvloop

from tests.helpers import until
from tests.load.helpers import share
from tests.server.conftest import Serve
from zcproto.load import worker
from zcproto.load.plan import Share
from zcproto.load.record import Record, RequestKind


class Commands:
    """The parent's end of the worker's standard input."""

    def __init__(self) -> None:
        reading, writing = os.pipe()
        self.stdin = os.fdopen(reading, "rb", buffering=0)
        self._writing = os.fdopen(writing, "wb", buffering=0)

    def send(self, *lines: str) -> None:
        self._writing.write("".join(line + "\n" for line in lines).encode())

    def close(self) -> None:
        self._writing.close()


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Iterator[Commands]:
    made = Commands()
    monkeypatch.setattr(sys, "stdin", made.stdin)
    yield made
    made.close()
    made.stdin.close()


def messages(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def done(reports: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {each["done"]: each for each in reports if "done" in each}


async def test_worker_executes_commands_and_reports(
    commands: Commands, serve: Serve, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "PROGRESS_PERIOD", 0.02)
    part = share(serve())
    commands.send(json.dumps(part.as_json()))
    serving = asyncio.create_task(worker.serve())
    reports: list[dict[str, Any]] = []
    for command in ("connect", "load", "verify", "close"):
        commands.send(command)
        while command not in done(reports):
            await asyncio.sleep(0.01)
            reports += messages(capsys)
    commands.close()
    await serving
    ends = done(reports)
    assert [*ends] == ["start", "connect", "load", "verify", "close"]
    assert (ends["connect"]["ready"], ends["connect"]["sessions"], ends["connect"]["requests"]) == (4, 4, 4)
    assert ends["verify"]["requests"] == 48
    assert "record" not in ends["verify"]
    record = Record.from_json(ends["close"]["record"])
    assert record.tallies[RequestKind.LOAD].equal == 40
    progress = [each["progress"] for each in reports if "progress" in each]
    assert progress[-1] == {"connect": 4, "load": 40, "verify": 4, "failed": 0}
    assert len(progress) > 4


async def test_worker_stops_on_command_and_closes(
    commands: Commands, serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve()
    commands.send(json.dumps(share(server, duration_s=60.0).as_json()), "connect")
    serving = asyncio.create_task(worker.serve())
    reports: list[dict[str, Any]] = []
    for last, then in (("connect", ("load",)), ("load", ("close",)), ("close", ())):
        while last not in done(reports):
            await asyncio.sleep(0.01)
            reports += messages(capsys)
            if last == "load":
                commands.send("stop")
        commands.send(*then)
    commands.close()
    await serving
    assert Record.from_json(done(reports)["close"]["record"]).tallies[RequestKind.LOAD].planned < 400 * 60
    server.until_left()


async def test_worker_exits_with_its_parent(commands: Commands, serve: Serve) -> None:
    server = serve()
    commands.send(json.dumps(share(server, duration_s=3600.0).as_json()), "connect")
    serving = asyncio.create_task(worker.serve())
    await asyncio.to_thread(server.until, lambda: server.server.state.counters.requests == 4)
    commands.send("load")
    await asyncio.to_thread(server.until, lambda: server.server.state.counters.requests > 10)
    commands.close()
    await serving
    await asyncio.to_thread(
        server.in_loop, lambda: [each.abort("test") for each in [*server.server.state.connections]]
    )
    transports = asyncio.get_running_loop()._transports  # type: ignore[attr-defined]
    await until(lambda: all(each._sock is None for each in transports.values()))


async def test_closed_input_ends_the_worker(commands: Commands) -> None:
    commands.close()
    await worker.serve()


async def test_closed_input_after_the_share_ends_the_worker(
    commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    commands.send(json.dumps(share(connections=1, credentials=[["user-1", "key"]]).as_json()))
    commands.close()
    await worker.serve()
    assert messages(capsys) == [{"done": "start"}]


async def test_unknown_command_fails_the_worker(commands: Commands) -> None:
    nowhere: Share = share(connections=1, credentials=[["user-1", "key"]])
    commands.send(json.dumps(nowhere.as_json()), "dance")
    with pytest.raises(ExceptionGroup) as caught:
        await worker.serve()
    assert caught.group_contains(KeyError)


def test_worker_ignores_ctrl_c_and_disables_gc(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    async def serve() -> None:
        seen.extend([signal.getsignal(signal.SIGINT), gc.isenabled(), asyncio.get_running_loop()])

    monkeypatch.setattr(worker, "serve", serve)
    before = signal.getsignal(signal.SIGINT)
    try:
        worker.main()
    finally:
        signal.signal(signal.SIGINT, before)
        gc.enable()
    assert seen[:2] == [signal.SIG_IGN, False]
    assert isinstance(seen[2], uvloop.Loop)


def test_the_module_is_the_program(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "zcproto.load.worker")
    commands.close()
    before = signal.getsignal(signal.SIGINT)
    try:
        runpy.run_path(worker.__file__, run_name="__main__")
        assert not gc.isenabled()
    finally:
        signal.signal(signal.SIGINT, before)
        gc.enable()
