"""The supervisor, with small processes in place of servers."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import mmap
import os
import select
import selectors
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from tests.helpers import FakeClock
from tests.limits import TIMEOUT
from zcproto.errors import CertificateError, ConfigError, LifespanError
from zcproto.workers import supervisor as module
from zcproto.workers.channel import Channel, Message, failure_of
from zcproto.workers.supervisor import (
    COORDINATOR,
    FREE,
    KILLED_LIMIT,
    LONGEST_DELAY,
    LONGEST_READY_DELAY,
    MARGIN,
    SOON,
    RestartPacer,
    Supervisor,
)
from zcproto.workers.upgrade import Input, Step, Successor

RUN_LIMIT = 300.0


class Child:
    """A process of the supervisor, as a script sees it. `start` counts those of its number, from 1."""

    def __init__(
        self, number: int, start: int, channel: Channel, lifeline: int, note: Callable[..., None]
    ) -> None:
        self.number = number
        self.start = start
        self.channel = channel
        self.lifeline = lifeline
        self.note = note
        self.send = channel.send

    def wait(self, name: str) -> dict[str, Any] | None:
        return wait_for(self.channel, name)

    def serve(self, **handlers: Callable[..., int | None]) -> int:
        """Be ready, and handle messages until the drain, or until a handler returns the exit code."""
        self.send("ready", number=self.number)
        while True:
            select.select([self.channel], [], [])
            messages = self.channel.receive()
            if messages is None:  # the end of the supervisor
                return 0
            for message in messages:
                if message.name == "drain":
                    self.note("drained", self.number, message.values)
                    return 0
                handler = handlers.get(message.name)
                code = handler and handler(**message.values)
                if code is not None:
                    return code

    def hang(self) -> None:
        """Hang until the end of the supervisor."""
        faulthandler.disable()  # of pytest
        os.read(self.lifeline, 1)


Script = Callable[[Child], int]


class Service:
    """A service whose processes do what a script says, and which writes what happens to a pipe."""

    def __init__(self, pipe: int, script: Script, **options: Any) -> None:
        self.pipe = pipe
        self.script = script
        self.options = options
        self.starts = mmap.mmap(-1, 8)  # shared with all processes

    def note(self, *values: Any) -> None:
        os.write(self.pipe, json.dumps([os.getpid(), *values]).encode() + b"\n")

    def run(self, number: int, channel: Channel, lifeline: int) -> int:
        self.starts[number] += 1
        self.note("run", number, *self.inspect(channel, lifeline))
        return self.script(Child(number, self.starts[number], channel, lifeline, self.note))

    def inspect(self, channel: Channel, lifeline: int) -> list[Any]:
        """Return what a process notes with its start."""
        return []

    def coordinator_ready(self, values: dict[str, Any]) -> None:
        self.note("coordinator_ready", values)

    def listen(self) -> None:
        if "listen" in self.options:
            raise ConfigError([self.options["listen"]])
        self.note("listen")

    def serving(self) -> None:
        self.options |= self.options.get("once_serving", {})
        self.note("serving")

    def process_ended(self, number: int) -> None:
        self.note("process_ended", number)

    def reloading(self, is_begun: bool) -> None:
        self.note("reloading", is_begun)

    def config_refused(self, is_refused: bool) -> None:
        self.note("config_refused", is_refused)

    def reload(self) -> None:
        self.note("reload")

    def drain_limit(self) -> float:
        return float(self.options.get("drain", 5.0))

    def run_limit(self, limit: float, *, is_replaced: bool) -> float:
        return RUN_LIMIT if is_replaced else 0.0

    def stopping(self, limit: float) -> None:
        self.note("stopping", limit)

    def start_successor(self) -> Successor:
        self.note("start_successor")
        raise OSError(12, "no memory")

    def upgrade_limit(self) -> float:
        return 5.0

    def left(self, pid: int) -> None:
        self.note("left", pid)

    def tick(self, ready: int) -> float:
        return 0.05

    def renew_sockets(self) -> bool:
        return bool(self.options.pop("renewed", False))

    def hang_limit(self) -> float | None:
        return self.options.get("hang_limit")

    def start_limit(self) -> float | None:
        return self.options.get("start_limit")

    def report(self, ended: Sequence[tuple[str, str]]) -> int:
        self.note("report", ended)
        return 0


class Running:
    """A supervisor in a process of its own. Its exit code is 0, 1 if forced, 3 if it raised."""

    def __init__(
        self,
        script: Script,
        workers: int = 2,
        *,
        predecessor: Channel | None = None,
        kind: type[Service] = Service,
        **options: Any,
    ) -> None:
        self._reading, writing = os.pipe()
        self._buffer = b""
        self.seen: list[list[Any]] = []
        self._position = 0
        self.pid = os.fork()
        if not self.pid:
            code = 70
            try:
                os.close(self._reading)
                service = kind(writing, script, **options)
                try:
                    supervisor = Supervisor(service, workers, predecessor=predecessor)
                    code = 0 if supervisor.run() else 1
                except Exception as error:
                    service.note("raised", type(error).__name__, str(error))
                    code = 3
            finally:
                os._exit(code)
        os.close(writing)

    def next(self, *wanted: Any, after: int | None = None) -> list[Any]:
        """Wait for an event that begins with these values, and return it with its pid first.

        It follows the event that was returned last: one read may have returned both.
        """
        start = self._position if after is None else after
        end = time.monotonic() + TIMEOUT
        while True:
            for position, event in enumerate(self.seen[start:], start + 1):
                if event[1 : 1 + len(wanted)] == list(wanted):
                    self._position = position
                    return event
            assert self._read(end - time.monotonic()), f"{wanted} is missing in {self.seen}"

    def all(self, *wanted: Any) -> list[list[Any]]:
        return [event for event in self.seen if event[1 : 1 + len(wanted)] == list(wanted)]

    def _read(self, seconds: float) -> bool:
        if not select.select([self._reading], [], [], max(0.0, seconds))[0]:
            return False
        data = os.read(self._reading, 65_536)
        if not data:
            return False
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        self.seen += [json.loads(line) for line in lines]
        return True

    def read_to_end(self) -> None:
        """Read until every process has closed the pipe."""
        while self._read(TIMEOUT):
            pass

    def serve(self) -> dict[int, int]:
        """Wait until it serves; return the pids by number."""
        self.next("serving", after=0)
        return {event[2]: event[0] for event in self.all("run")}

    def wait(self) -> int:
        """Wait for the end of the supervisor and all processes; return the exit code."""
        self.read_to_end()
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return os.waitstatus_to_exitcode(status)

    def stop(self) -> int:
        os.kill(self.pid, signal.SIGTERM)
        return self.wait()

    def close(self) -> None:
        """Kill the supervisor, whose processes end by themselves then."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0
        os.close(self._reading)


Run = Callable[..., Running]


@pytest.fixture
def run() -> Iterator[Run]:
    made: list[Running] = []

    def start(script: Script, workers: int = 2, **options: Any) -> Running:
        made.append(Running(script, workers, **options))
        return made[-1]

    yield start
    for each in made:
        each.close()


def wait_for(channel: Channel, name: str) -> dict[str, Any] | None:
    """Wait for a message; None at the end of the supervisor."""
    end = time.monotonic() + TIMEOUT
    while select.select([channel], [], [], max(0.0, end - time.monotonic()))[0]:
        messages = channel.receive()
        if messages is None:
            return None
        for message in messages:
            if message.name == name:
                return message.values
    raise AssertionError(f"no message {name}")


def obedient(child: Child) -> int:
    """Start, serve until the drain, end."""
    return child.serve()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Return both ends of a pipe."""
    ends = os.pipe()
    yield ends
    for descriptor in ends:
        with contextlib.suppress(OSError):
            os.close(descriptor)


# --- start -----------------------------------------------------------------------------------------------------


def test_workers_start_after_the_coordinator_and_listen_together(run: Run) -> None:
    running = run(obedient, 3)
    running.serve()
    names = [tuple(event[1:3]) for event in running.seen if event[1] != "coordinator_ready"]
    assert names[0] == ("run", 0)
    assert sorted(names[1:4]) == [("run", 1), ("run", 2), ("run", 3)]
    assert names[4:] == [("listen",), ("serving",)]
    assert running.all("coordinator_ready")[0][2] == {"number": 0}
    assert running.stop() == 0


def fail_as(error: Exception, failing: int) -> Script:
    def script(child: Child) -> int:
        if child.number == failing:
            child.send("failed", **failure_of(error))
            return 1
        return child.serve()

    return script


@pytest.mark.parametrize("character", ["x", "é", "\U0001f512", "\x01", "\udcff", "\\"])
def test_failure_of_any_length_fits_into_a_message(character: str) -> None:
    ours, theirs = Channel.pair()
    failure = failure_of(ConfigError([character * 5_000] * 1_000))
    assert ours.send("failed", **failure)
    assert theirs.receive() == [("failed", failure)]
    ours.close()
    theirs.close()


@pytest.mark.parametrize("failing", [COORDINATOR, 2])
@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (ConfigError(["one", "two"]), ["ConfigError", str(ConfigError(["one", "two"]))]),
        (CertificateError("no key"), ["CertificateError", "no key"]),
        (LifespanError("it raised KeyError"), ["LifespanError", "it raised KeyError"]),
        (KeyError("secret"), ["ChildFailed", None]),
    ],
    ids=["config", "certificate", "lifespan", "other"],
)
def test_failed_start_of_one_process_is_raised_before_anything_listens(
    run: Run, failing: int, error: Exception, raised: list[Any]
) -> None:
    running = run(fail_as(error, failing))
    assert running.wait() == 3
    (event,) = running.all("raised")
    assert event[2] == raised[0]
    if raised[1] is not None:
        assert event[3] == raised[1]
    assert "secret" not in event[3]
    assert not running.all("listen")
    assert len(running.all("run")) == (1 if failing == COORDINATOR else 3)


def test_process_killed_during_the_start_ends_the_start(run: Run) -> None:
    def script(child: Child) -> int:
        if child.number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return child.serve()

    running = run(script)
    assert running.wait() == 3
    (event,) = running.all("raised")
    assert event[2] == "ChildFailed"
    assert "SIGKILL" in event[3]


def test_port_that_is_taken_meanwhile_is_raised(run: Run) -> None:
    running = run(obedient, listen="cannot listen")
    assert running.wait() == 3
    assert running.all("raised")[0][2:] == ["ConfigError", "cannot listen"]
    assert not running.all("serving")


def test_signal_during_the_start_ends_it(run: Run) -> None:
    def script(child: Child) -> int:
        if child.number == COORDINATOR:
            return child.serve()
        child.wait("drain")
        return 0

    running = run(script)
    running.next("run", 1, after=0)
    assert running.stop() == 0
    assert not running.all("serving")


# --- a process ends ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [COORDINATOR, 1, 2])
def test_killed_process_alone_is_started_again(run: Run, number: int) -> None:
    running = run(obedient)
    pids = running.serve()
    seen = len(running.seen)
    os.kill(pids[number], signal.SIGKILL)
    running.next("run", number, after=seen)
    assert running.all("process_ended") == [[running.pid, "process_ended", number]]
    assert len(running.all("run")) == 4
    assert running.stop() == 0


def test_process_that_breaks_the_rules_of_its_channel_is_killed(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "KILLED_LIMIT", 0.1)

    def script(child: Child) -> int:
        if child.number == COORDINATOR:
            return child.serve()
        return child.serve(go=lambda: os.write(child.channel.fileno(), b"rubbish\n") and None)

    running = run(script, 1)
    running.serve()
    running.next("process_ended", 1)
    running.next("run", 1)


def test_server_ends_if_no_worker_can_be_started_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GIVE_UP", 0.3)

    def script(child: Child) -> int:
        if child.number == COORDINATOR:
            return child.serve()
        if child.start == 1:
            child.serve(go=lambda: 0)
        child.send("failed", **failure_of(LifespanError("no database")))
        return 1

    running = run(script, 1)
    assert running.wait() == 3
    assert running.all("raised")[0][2:] == ["LifespanError", "no database"]


def test_hung_process_is_aborted_and_started_again(run: Run) -> None:
    def script(child: Child) -> int:
        if child.number == 1:
            child.send("ready")
            child.hang()
        return beating(child)

    running = run(script, 2, hang_limit=2.0)
    running.serve()
    running.next("process_ended", 1)
    running.next("run", 1)


def test_process_that_is_not_ready_in_time_is_aborted_and_started_again(run: Run) -> None:
    def script(child: Child) -> int:
        if (child.number, child.start) == (1, 2):
            child.hang()
        return child.serve()

    running = run(script, 1, once_serving={"start_limit": 0.5})
    pids = running.serve()
    os.kill(pids[1], signal.SIGKILL)
    running.next("process_ended", 1)
    hung = running.next("run", 1)
    running.next("process_ended", 1)
    assert running.next("run", 1)[0] != hung[0]


def test_end_of_the_coordinator_is_reported_by_another_process_if_it_does_not_start(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REPORT_AFTER", 0.1)

    def script(child: Child) -> int:
        if child.number == COORDINATOR and child.start > 1:
            child.hang()  # it is never ready
        return child.serve()

    running = run(script, 1)
    pids = running.serve()
    os.kill(pids[COORDINATOR], signal.SIGKILL)
    reporter, _, ended = running.next("report")
    assert ended == [["coordinator", "SIGKILL"]]
    assert reporter not in {running.pid, *pids.values()}


@pytest.mark.parametrize(("silence", "is_late"), [(30.1, True), (29.9, False)])
@pytest.mark.parametrize("is_ready", [True, False])
def test_time_in_which_a_process_waits_for_a_processor_does_not_count(
    monkeypatch: pytest.MonkeyPatch, silence: float, is_late: bool, is_ready: bool
) -> None:
    queued, signals = 5.0, []
    monkeypatch.setattr(module, "queued_seconds", lambda pid: queued)
    with unstarted(hang_limit=30.0, start_limit=30.0) as supervisor:
        monkeypatch.setattr(supervisor, "_signal", lambda process, number: signals.append(number))
        process = supervisor.workers[0]
        process.pid, process.ready_at = 7, 900.0 if is_ready else None
        process.heard(1_000.0)
        queued += 100.0
        supervisor._check_time(process, 1_100.0 + silence)
        assert signals == ([signal.SIGABRT, signal.SIGCONT] if is_late else [])
        supervisor._check_time(process, 1_100.0 + silence)
        assert len(signals) == 2 * is_late, "once"
        if is_late and not is_ready:
            assert "was not ready within 30 s" in str(process.failure)


def test_blocked_start_writes_its_stacks_before_it_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    signals: list[int] = []
    with unstarted() as supervisor:
        monkeypatch.setattr(supervisor, "_signal", lambda process, number: signals.append(number))
        process = supervisor.workers[0]
        process.pid = 7
        supervisor._drain(process)
        supervisor._check_time(process, 1_000.0 + MARGIN)
        supervisor._check_time(process, 1_000.0 + 2 * MARGIN)
        assert signals == [signal.SIGABRT, signal.SIGCONT, signal.SIGKILL]


def beating(child: Child) -> int:
    faulthandler.disable()  # of pytest
    child.send("ready")
    while (messages := child.channel.receive()) is not None:
        if any(message.name == "drain" for message in messages):
            break
        child.send("beat")
        time.sleep(0.02)
    return 0


def test_stopped_process_is_replaced(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MARGIN", TIMEOUT)  # SIGABRT ends it, not SIGKILL
    running = run(beating, 2, hang_limit=2.0)
    pids = running.serve()
    os.kill(pids[1], signal.SIGSTOP)
    running.next("process_ended", 1)


@contextlib.contextmanager
def unstarted(**options: Any) -> Iterator[Supervisor]:
    """Yield a supervisor that does not run. Its service notes nothing.

    For decisions that depend on time or on the order of events: tests call its private methods, which real
    processes would reach only after half a minute, or by chance.
    """
    pipe = os.open(os.devnull, os.O_WRONLY)
    supervisor = Supervisor(Service(pipe, obedient, **options), 2, clock=FakeClock(now=1_000.0))
    try:
        yield supervisor
    finally:
        for descriptor in (pipe, supervisor._life, supervisor._lifeline):
            os.close(descriptor)
        for each in (supervisor._selector, supervisor._signals, supervisor._wakeup):
            each.close()


def test_process_that_beats_is_not_taken_for_hung() -> None:
    with unstarted(hang_limit=30.0) as supervisor:
        for each in supervisor._processes():
            each.start_at, each.ready_at, each.heard_at = None, 900.0, 970.0
        silent = supervisor.workers[0]
        silent.heard_at = 969.9
        for each in supervisor._processes():
            supervisor._check_time(each, 1_000.0)
        assert [each for each in supervisor._processes() if each.kill_at is not None] == [silent]


@pytest.mark.parametrize(("seconds", "is_late"), [(1.0, True), (100.0, False)])
def test_supervisor_that_was_stopped_takes_no_process_for_hung(
    monkeypatch: pytest.MonkeyPatch, seconds: float, is_late: bool
) -> None:
    with unstarted(hang_limit=30.0) as supervisor:
        for each in supervisor._processes():
            each.start_at, each.ready_at, each.heard_at = None, 900.0, 970.0
        clock = FakeClock(now=1_000.0)
        monkeypatch.setattr(supervisor, "_now", clock.now)
        monkeypatch.setattr(supervisor._selector, "select", lambda timeout: clock.advance(seconds) or [])
        supervisor._wait()
        process = supervisor.workers[0]
        supervisor._check_time(process, clock.now())
        assert (process.kill_at is not None) is is_late


def test_last_words_are_read_to_their_end() -> None:
    with unstarted() as supervisor:
        process = supervisor.workers[0]
        process.channel, theirs = Channel.pair()
        supervisor._selector.register(process.channel, selectors.EVENT_READ, process)
        for _ in range(4):
            assert theirs.send("beat", text="x" * 16_000)
        assert theirs.send("failed", **failure_of(LifespanError("no database: " + "x" * 3_000)))
        theirs.close()
        process.pid, process.start_at = 7, None
        supervisor._handle_end(process, 1)
        assert isinstance(process.failure, LifespanError)


def test_crash_of_a_retiring_worker_is_logged(capfd: pytest.CaptureFixture[str]) -> None:
    with unstarted() as supervisor:
        supervisor._has_served = True
        supervisor._handover.step = Step.RETIRING
        process = supervisor.workers[0]
        for code in (-signal.SIGKILL, 0):
            process.pid, process.start_at, process.is_drained = 7, None, True
            supervisor._handle_end(process, code)
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    ended = [(each["worker"], each["reason"]) for each in lines if each["event"] == "worker.ended"]
    assert ended == [("1", "SIGKILL")]


def test_coordinator_gets_renewed_sockets_by_an_orderly_restart(
    run: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    running = run(obedient, renewed=True)
    running.serve()
    running.next("process_ended", COORDINATOR)
    running.next("run", COORDINATOR)
    assert running.stop() == 0
    assert len(running.all("run")) == 4
    assert "worker.ended" not in capfd.readouterr().err


@pytest.mark.parametrize("number", [COORDINATOR, 1])
def test_end_of_a_process_is_reported_by_the_coordinator(run: Run, number: int) -> None:
    def script(child: Child) -> int:
        return child.serve(ended=lambda **values: child.note("heard", values))

    running = run(script)
    pids = running.serve()
    os.kill(pids[number], signal.SIGKILL)
    name = "coordinator" if number == COORDINATOR else "1"
    assert running.next("heard")[2] == {"worker": name, "reason": "SIGKILL"}
    assert len({event[0] for event in running.all("heard")}) == 1
    assert running.stop() == 0


# --- stop --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_drains_workers_before_the_coordinator(run: Run, number: int) -> None:
    running = run(obedient, drain=3.0)
    running.serve()
    os.kill(running.pid, number)
    assert running.wait() == 0
    drained = running.all("drained")
    assert sorted(event[2] for event in drained[:2]) == [1, 2]
    assert drained[2][2] == COORDINATOR
    assert {event[3]["limit"] for event in drained} == {3.0}
    assert running.all("stopping")[0][2] == 3.0


def stubborn(child: Child) -> int:
    child.send("ready")
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)
    child.hang()
    return 0


def test_coordinator_killed_during_a_drain_is_back_for_the_workers_after_its_delay(
    run: Run, monkeypatch: pytest.MonkeyPatch, pipe: tuple[int, int]
) -> None:
    monkeypatch.setattr(module, "FREE", 0)
    monkeypatch.setattr(module, "SOON", TIMEOUT)
    monkeypatch.setattr(module, "LONGEST_READY_DELAY", 0.25)
    gate, opened = pipe

    def script(child: Child) -> int:
        child.serve()
        if child.number != COORDINATOR:
            os.read(gate, 1)
        return 0

    running = run(script, 1)
    pids = running.serve()
    os.kill(running.pid, signal.SIGTERM)
    running.next("stopping")
    killed_at = time.monotonic()
    os.kill(pids[COORDINATOR], signal.SIGKILL)
    running.next("run", COORDINATOR)
    assert time.monotonic() - killed_at >= 0.25
    os.write(opened, b".")
    assert running.wait() == 0


@pytest.mark.parametrize("limit", [0.1, TIMEOUT])
def test_workers_of_a_successor_whose_predecessor_was_killed_have_a_moment_to_end(
    run: Run, monkeypatch: pytest.MonkeyPatch, pipe: tuple[int, int], limit: float
) -> None:
    monkeypatch.setattr(module, "ABANDONED_LIMIT", limit)
    is_short = limit < 1
    ended, end = pipe

    def script(child: Child) -> int:
        child.send("ready")
        child.wait("drain")
        time.sleep(TIMEOUT if is_short else 0.2)
        os.write(end, b".")
        return 0

    raw, other = socket.socketpair()
    ours, theirs = Channel(raw), Channel(other)
    running = run(script, 1, predecessor=theirs)
    assert wait_for(ours, "prepared") == {}
    raw.send(
        b"5\n"
    )  # what breaks the rules of a channel counts as its end, of which other processes have copies
    assert running.wait() == 3
    assert "start it again" in running.all("raised")[0][3]
    os.close(end)
    assert os.read(ended, 1) == (b"" if is_short else b".")
    ours.close()
    theirs.close()


def test_second_signal_kills_everything(run: Run) -> None:
    running = run(stubborn)
    running.serve()
    os.kill(running.pid, signal.SIGTERM)
    running.next("stopping")
    os.kill(running.pid, signal.SIGTERM)
    assert running.wait() == 1


def test_process_that_does_not_end_is_killed_after_its_limit(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MARGIN", 0.1)
    running = run(stubborn, drain=0.1)
    running.serve()
    assert running.stop() == 0


def test_drain_ordered_by_the_coordinator_ends_the_server(run: Run) -> None:
    limits = {COORDINATOR: 0.5, 1: 9.0}  # that of a worker is ignored

    def script(child: Child) -> int:
        def order() -> None:
            if child.number in limits:
                child.send("drain", limit=limits[child.number])

        return child.serve(go=order)

    running = run(script)
    assert running.wait() == 0
    assert [event[2] for event in running.all("stopping")] == [0.5]


def test_failed_end_of_a_lifespan_is_raised(run: Run) -> None:
    def script(child: Child) -> int:
        child.serve()
        if child.number == 2:
            child.send("failed", **failure_of(LifespanError("it did not end")))
            return 1
        return 0

    running = run(script)
    running.serve()
    assert running.stop() == 3
    assert running.all("raised")[0][2:] == ["LifespanError", "it did not end"]


def test_killed_supervisor_leaves_no_process_behind(run: Run) -> None:
    def script(child: Child) -> int:
        child.send("ready")
        assert child.wait("drain") is None  # the end of its supervisor
        assert os.read(child.lifeline, 1) == b""
        return 0

    running = run(script)
    running.serve()
    os.kill(running.pid, signal.SIGKILL)
    running.read_to_end()  # all have ended


# --- reload ------------------------------------------------------------------------------------------------------


def reloading(applied: bool, dead: int | None = None) -> Script:
    """Return a script that answers a reload; the process `dead` ends instead."""

    def script(child: Child) -> int:
        def reload() -> int | None:
            if child.number == dead:
                return 1
            child.send("reloaded", applied=applied)
            return None

        return child.serve(reload=reload)

    return script


def test_hangup_reloads_the_coordinator_then_the_workers(run: Run) -> None:
    running = run(reloading(applied=True))
    running.serve()
    os.kill(running.pid, signal.SIGHUP)
    running.next("reloading", False)
    assert [event[1:] for event in running.seen if event[1].startswith("reload")] == [
        ["reloading", True],
        ["reload"],
        ["reloading", False],
    ]
    assert running.stop() == 0


def test_refused_configuration_reaches_no_worker(run: Run) -> None:
    running = run(reloading(applied=False))
    running.serve()
    os.kill(running.pid, signal.SIGHUP)
    running.next("reloading", False)
    assert not running.all("reload")
    assert [event[2:] for event in running.all("config_refused")] == [[True]]
    assert running.stop() == 0


def test_reload_does_not_wait_for_a_dead_worker(run: Run) -> None:
    running = run(reloading(applied=True, dead=1))
    running.serve()
    os.kill(running.pid, signal.SIGHUP)
    running.next("reloading", False)
    running.next("run", 1, after=0)
    assert running.stop() == 0


def test_upgrade_is_requested_by_usr2(run: Run) -> None:
    running = run(obedient)
    running.serve()
    os.kill(running.pid, signal.SIGUSR2)
    running.next("start_successor")
    assert running.stop() == 0


class FakeSuccessor:
    """A successor that notes signals. `failure` is the supervisor's."""

    pid = 7
    failure = ""
    is_ending = False

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.signals: list[str] = []

    @property
    def reason(self) -> str | None:
        return None

    def terminate(self) -> None:
        self.signals.append("terminate")

    def kill(self) -> None:
        self.signals.append("kill")


@contextlib.contextmanager
def upgrading() -> Iterator[tuple[Supervisor, FakeSuccessor, Channel, Channel]]:
    """Yield a supervisor, its successor, the other end of its channel, and that of the coordinator's."""
    ours, theirs = Channel.pair()
    coordinators, coordinator = Channel.pair()
    successor: Any = FakeSuccessor(ours)
    with unstarted() as supervisor:
        monkey = pytest.MonkeyPatch()
        monkey.setattr(supervisor._service, "start_successor", lambda: successor)
        supervisor.coordinator.channel = coordinators
        supervisor._upgrade(Input.REQUESTED)
        yield supervisor, successor, theirs, coordinator
    for each in (ours, theirs, coordinators, coordinator):
        each.close()


def test_late_upgrade_is_reported_before_its_successor_has_ended() -> None:
    with upgrading() as (supervisor, successor, _, coordinator):
        supervisor._check_successor(1_005.1)
        reason = "it did not serve within 5 s (server.upgrade_timeout)"
        assert coordinator.receive() == [("upgrade_failed", {"reason": reason})]
        assert successor.signals == ["terminate"]
        assert successor.failure == reason
        supervisor._handle_message(supervisor.coordinator, Message("upgrade", {}))
        assert coordinator.receive() is not None


def test_successor_that_closes_its_channel_may_end_by_itself() -> None:
    """A signal could come before it has printed what is wrong."""
    with upgrading() as (supervisor, successor, theirs, _):
        theirs.send("failed", **failure_of(ConfigError(["workers = 1"])))
        theirs.close()
        supervisor._handle_successor()
        supervisor._handle_successor()
        assert "workers = 1" in successor.failure
        assert successor.signals == []
        supervisor._check_successor(1_000.0 + MARGIN + KILLED_LIMIT)
        assert successor.signals == ["kill"]


# --- what a child inherits ---------------------------------------------------------------------------------------


class InspectingService(Service):
    """A service whose workers report their descriptors and signal handlers."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.had = {
            int(name) for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")
        }

    def inspect(self, channel: Channel, lifeline: int) -> list[Any]:
        kinds = []
        for name in sorted(os.listdir("/proc/self/fd"), key=int):
            with contextlib.suppress(OSError):
                target = os.readlink(f"/proc/self/fd/{name}")
                if int(name) > 2 and "/proc/" not in target:
                    kinds.append((int(name), target.partition(":")[0]))
        known = {channel.fileno(), lifeline, self.pipe}
        extra = [kind for number_, kind in kinds if number_ not in known | self.had]
        handlers = [signal.getsignal(each) is signal.SIG_DFL for each in (signal.SIGTERM, signal.SIGUSR2)]
        blocked = [each.name for each in signal.pthread_sigmask(signal.SIG_BLOCK, [])]
        return [extra, handlers, blocked, signal.set_wakeup_fd(-1)]


def test_child_inherits_no_descriptor_and_no_signal_handler(run: Run) -> None:
    running = run(obedient, 3, kind=InspectingService)
    running.serve()
    assert {tuple(map(str, event[3:])) for event in running.all("run")} == {
        ("[]", "[True, True]", "[]", "-1")
    }
    assert running.stop() == 0


def test_bug_in_a_process_does_not_return_into_the_supervisor(
    run: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    def script(child: Child) -> int:
        raise SystemExit("bug")

    running = run(script)
    assert running.wait() == 3
    assert running.all("raised")[0][2] == "ChildFailed"
    assert '"event":"server.fault"' in capfd.readouterr().err


def test_failed_fork_is_retried(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.fork, 0

    def fork() -> int:
        nonlocal calls
        calls += 1
        if calls == 5:  # of the supervisor: the process that was killed
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return real()

    monkeypatch.setattr(os, "fork", fork)
    running = run(obedient)  # the first call
    pids = running.serve()
    os.kill(pids[2], signal.SIGKILL)
    running.next("run", 2)
    assert running.stop() == 0


# --- restarts ----------------------------------------------------------------------------------------------------


def test_process_that_served_is_started_again_at_once() -> None:
    pacer = RestartPacer()
    assert [pacer.ended(SOON) for _ in range(100)] == [0.0] * 100


def test_delay_grows_with_failed_starts_up_to_a_limit() -> None:
    pacer = RestartPacer()
    delays = [pacer.ended(None) for _ in range(FREE + 8)]
    assert delays == [0, 0, 0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, LONGEST_DELAY, LONGEST_DELAY]
    assert [pacer.ended(None) for _ in range(2_000)][-1] == LONGEST_DELAY


def test_process_that_was_ready_is_missing_for_a_short_time() -> None:
    pacer = RestartPacer()
    delays = [pacer.ended(0.1) for _ in range(FREE + 5)]
    assert delays == [0, 0, 0, 0.25, *[LONGEST_READY_DELAY] * 4]


def test_delay_is_reset_by_a_successful_start() -> None:
    pacer = RestartPacer()
    for _ in range(10):
        pacer.ended(0.0)
    assert pacer.ended(60.0) == 0.0
    assert pacer.ended(None) == 0.0
