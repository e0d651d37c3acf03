"""The worker's main function: commands from a pipe, reports on standard output."""

from __future__ import annotations

import asyncio
import gc
import json
import runpy
import signal
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import uvloop

from tests.helpers import until
from tests.load.conftest import StandardInput
from tests.load.helpers import share
from tests.server.conftest import Serve
from zcproto.load import worker
from zcproto.load.record import Record, RequestKind

NOWHERE = share(connections=1, credentials=[["user-1", "key"]])


def messages(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def done(reports: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {each["done"]: each for each in reports if "done" in each}


async def test_worker_executes_commands_and_reports(
    stdin: StandardInput, serve: Serve, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "PROGRESS_PERIOD", 0.02)
    part = share(serve())
    stdin.send(json.dumps(part.as_json()))
    serving = asyncio.create_task(worker.serve())
    reports: list[dict[str, Any]] = []
    for command in ("connect", "load", "verify", "close"):
        stdin.send(command)
        while command not in done(reports):
            await asyncio.sleep(0.01)
            reports += messages(capsys)
    stdin.close()
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
    stdin: StandardInput, serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve()
    stdin.send(json.dumps(share(server, duration_s=60.0).as_json()), "connect")
    serving = asyncio.create_task(worker.serve())
    reports: list[dict[str, Any]] = []
    for last, then in (("connect", ("load",)), ("load", ("close",)), ("close", ())):
        while last not in done(reports):
            await asyncio.sleep(0.01)
            reports += messages(capsys)
            if last == "load":
                stdin.send("stop")
        stdin.send(*then)
    stdin.close()
    await serving
    assert Record.from_json(done(reports)["close"]["record"]).tallies[RequestKind.LOAD].planned < 400 * 60
    server.until_left()


async def test_worker_exits_with_its_parent(stdin: StandardInput, serve: Serve) -> None:
    server = serve()
    stdin.send(json.dumps(share(server, duration_s=3600.0).as_json()), "connect")
    serving = asyncio.create_task(worker.serve())
    await asyncio.to_thread(server.until, lambda: server.server.state.counters.requests == 4)
    stdin.send("load")
    await asyncio.to_thread(server.until, lambda: server.server.state.counters.requests > 10)
    stdin.close()
    await serving
    await asyncio.to_thread(
        server.in_loop, lambda: [each.abort("test") for each in [*server.server.state.connections]]
    )
    transports = asyncio.get_running_loop()._transports  # type: ignore[attr-defined]
    await until(lambda: all(each._sock is None for each in transports.values()))


@pytest.mark.parametrize("sent", [[], [json.dumps(NOWHERE.as_json())]], ids=["nothing", "the share"])
async def test_closed_input_ends_the_worker(
    stdin: StandardInput, sent: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    stdin.send(*sent)
    stdin.close()
    await worker.serve()
    assert messages(capsys) == [{"done": "start"}] * len(sent)


async def test_unknown_command_fails_the_worker(stdin: StandardInput) -> None:
    stdin.send(json.dumps(NOWHERE.as_json()), "dance")
    with pytest.raises(ExceptionGroup) as caught:
        await worker.serve()
    assert caught.group_contains(KeyError)


@pytest.fixture
def after_main() -> Iterator[None]:
    """Restore what the program changes in its process."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)
    gc.enable()


@pytest.mark.usefixtures("after_main")
def test_worker_ignores_ctrl_c_and_disables_gc(stdin: StandardInput, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    async def serve() -> None:
        seen.extend([signal.getsignal(signal.SIGINT), gc.isenabled(), asyncio.get_running_loop()])

    monkeypatch.setattr(worker, "serve", serve)
    worker.main()
    assert seen[:2] == [signal.SIG_IGN, False]
    assert isinstance(seen[2], uvloop.Loop)


@pytest.mark.usefixtures("after_main")
def test_the_module_is_the_program(stdin: StandardInput, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "zcproto.load.worker")
    stdin.close()
    runpy.run_path(worker.__file__, run_name="__main__")
    assert not gc.isenabled()
