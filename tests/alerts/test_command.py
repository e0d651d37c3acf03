"""Test the command sink with real programs."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import uvloop

from tests.server.helpers import TIMEOUT, eventually
from zcproto.alerts.sinks import MAX_OUTPUT, SHOWN, TRIES, Command, Undelivered
from zcproto.errors import ConfigError

BODY = b'{"id":"1"}'
LOOPS = [asyncio.new_event_loop, uvloop.new_event_loop]


class HeldCommand(Command):
    """A command whose timeout begins when its program has written a line to a file."""

    def __init__(self, place: Path, arguments: Sequence[str]) -> None:
        super().__init__(arguments, timeout=0.01, environ={})
        self._place = place

    async def _begin(self, *arguments: Any) -> subprocess.Popen[bytes]:
        process = await super()._begin(*arguments)
        await asyncio.to_thread(eventually, lambda: self._place.exists() and "\n" in self._place.read_text())
        return process


@pytest.fixture(params=LOOPS, ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[..., str]:
    """Deliver a message to a program, with each event loop. It hangs after it has written to `hangs_after`."""

    def deliver(
        *arguments: str,
        body: bytes = BODY,
        environ: dict[str, str] | None = None,
        hangs_after: Path | None = None,
    ) -> str:
        sink = (
            Command(arguments, timeout=TIMEOUT, environ=environ or {})
            if hangs_after is None
            else HeldCommand(hangs_after, arguments)
        )

        async def main() -> str:
            return await sink.deliver(body)

        with asyncio.Runner(loop_factory=request.param) as runner:
            return runner.run(main())

    return deliver


def python(script: str) -> tuple[str, str, str]:
    return sys.executable, "-c", script


@pytest.mark.requirement("alerting")
def test_program_gets_message_on_stdin(run: Callable[..., str], tmp_path: Path) -> None:
    place = tmp_path / "got"
    script = f"import sys; open({str(place)!r}, 'wb').write(sys.stdin.buffer.read())"
    assert run(*python(script)) == "exit code 0"
    assert place.read_bytes() == BODY + b"\n"


def test_no_shell_is_used(run: Callable[..., str]) -> None:
    assert run("/bin/echo", "$HOME; rm -rf *", "`id`") == "exit code 0: $HOME; rm -rf * `id`"


def test_program_gets_minimal_environment_and_descriptors(run: Callable[..., str]) -> None:
    environ = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "KEY_PASSPHRASE": "hunter2", "ZCPROTO_HOME": "/x"}
    script = "import os; print(sorted(os.environ), sorted(map(int, os.listdir('/proc/self/fd')))[:-1], os.getcwd())"
    inherited = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(inherited, True)
    try:
        answer = run(*python(script), environ=environ)
    finally:
        os.close(inherited)
    assert answer == "exit code 0: ['LANG', 'PATH'] [0, 1, 2] /"


def test_failure_is_reported_with_output(run: Callable[..., str]) -> None:
    script = "import sys; print('no pager'); sys.exit(3)"
    with pytest.raises(Undelivered, match="the program ended with exit code 3: no pager") as caught:
        run(*python(script))
    assert caught.value.tries == TRIES
    with pytest.raises(Undelivered, match=r"^the program ended with signal 9$"):
        run(*python("import os; os.kill(os.getpid(), 9)"))


def test_output_is_bounded_and_on_one_line(run: Callable[..., str]) -> None:
    script = "import sys; sys.stdout.write('a\\x1b[31m\\n' + 'b' * 5_000_000)"
    answer = run(*python(script))
    assert len(answer) <= len("exit code 0: ") + SHOWN
    assert answer.isprintable()
    assert MAX_OUTPUT < 5_000_000


def test_program_that_does_not_read_is_accepted(run: Callable[..., str]) -> None:
    assert run("/bin/true", body=b"x" * 1_000_000) == "exit code 0"


def test_timeout_kills_program_and_its_children(run: Callable[..., str], tmp_path: Path) -> None:
    place = tmp_path / "pids"
    script = f"sleep 600 & echo $$ $! > {place}; wait"
    with pytest.raises(Undelivered, match=r"the program did not end within 0\.01 s") as caught:
        run("/bin/sh", "-c", script, hangs_after=place)
    assert caught.value.tries == TRIES
    for pid in map(int, place.read_text().split()):
        eventually(lambda pid=pid: not is_running(pid))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_detached_child_holding_the_pipe_blocks_nothing(run: Callable[..., str], tmp_path: Path) -> None:
    place = tmp_path / "pid"
    script = f"setsid sh -c 'echo $$ > {place}; exec sleep 600' &"
    try:
        with pytest.raises(Undelivered, match=r"the program did not end within 0\.01 s"):
            run("/bin/sh", "-c", script, hangs_after=place)
    finally:
        os.kill(int(place.read_text()), 9)


async def test_cancelled_delivery_leaves_nothing(tmp_path: Path) -> None:
    place = tmp_path / "pid"
    script = f"import os, time; open({str(place)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    task = asyncio.create_task(Command(python(script), timeout=TIMEOUT, environ={}).deliver(BODY))
    await asyncio.to_thread(eventually, lambda: place.exists() and place.read_text())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not is_running(int(place.read_text()))


async def test_cancelled_start_kills_program(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[subprocess.Popen[bytes]] = []
    asked, go_on = threading.Event(), threading.Event()

    class Slow(subprocess.Popen[bytes]):
        def __init__(self, *args: object, **options: Any) -> None:
            asked.set()
            assert go_on.wait(TIMEOUT)
            super().__init__(["/bin/sleep", "600"], **{**options, "stdin": None, "stdout": None})
            begun.append(self)

    monkeypatch.setattr(subprocess, "Popen", Slow)
    task = asyncio.create_task(Command(["/bin/true"], timeout=TIMEOUT, environ={}).deliver(BODY))
    await asyncio.to_thread(asked.wait, TIMEOUT)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go_on.set()
    await asyncio.to_thread(eventually, lambda: begun and begun[0].returncode == -9)


async def test_program_deleted_meanwhile_is_a_failure(tmp_path: Path) -> None:
    program = tmp_path / "page"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o700)
    sink = Command([str(program)], timeout=TIMEOUT, environ={})
    assert sink.where == str(program)
    assert await sink.deliver(BODY) == "exit code 0"
    before = set(os.listdir("/proc/self/fd"))
    program.unlink()
    with pytest.raises(Undelivered, match="the program cannot be run: No such file"):
        await sink.deliver(BODY)
    assert set(os.listdir("/proc/self/fd")) == before


async def test_temporary_file_replaces_memfd(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delattr(os, "memfd_create")
    assert await Command(["/bin/cat"], timeout=TIMEOUT, environ={}).deliver(BODY) == 'exit code 0: {"id":"1"}'


def test_program_that_cannot_run_is_refused_at_start(tmp_path: Path) -> None:
    for path, fault in (
        (tmp_path / "none", "cannot be run: No such file"),
        (tmp_path, "is not a program"),
        (Path("/etc/passwd"), r"run: chmod \+x /etc/passwd"),
    ):
        with pytest.raises(ConfigError, match=rf"alerts\.command: .*{fault}"):
            Command([str(path)], timeout=1.0, environ={})


@pytest.mark.parametrize("mode", [0o722, 0o772])
def test_program_writable_by_others_is_refused(tmp_path: Path, mode: int) -> None:
    program = tmp_path / "page"
    program.touch()
    program.chmod(mode)
    with pytest.raises(
        ConfigError, match=r"alerts\.command: .*others can change this file .*; run: chmod go-w"
    ):
        Command([str(program)], timeout=1.0, environ={})


def test_program_that_others_can_replace_is_refused(tmp_path: Path) -> None:
    program = tmp_path / "page"
    program.touch(0o755)
    Command([str(program)], timeout=1.0, environ={})
    tmp_path.chmod(0o777)
    with pytest.raises(
        ConfigError, match=r"alerts\.command: .*others can change this folder .*; run: chmod go-w"
    ):
        Command([str(program)], timeout=1.0, environ={})


def test_program_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "page"
    program.touch(0o755)
    owner = program.stat().st_uid
    monkeypatch.setattr("zcproto.common.files.trusted_owners", lambda: {owner + 1})
    with pytest.raises(ConfigError, match=rf"alerts\.command: .*belongs to another user \(uid {owner}\)"):
        Command([str(program)], timeout=1.0, environ={})
