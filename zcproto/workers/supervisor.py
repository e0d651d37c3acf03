"""The supervisor: forks the coordinator and the workers of a server, and starts those again that end.

    start:  coordinator ready -> workers ready -> "go" to all of them -> serving
    stop:   "drain" to the workers -> they end -> "drain" to the coordinator -> it ends

Decides: which process runs, and when a process that does not obey is killed.

Rules:
- One thread without an event loop, TLS or keys, so that a fork is safe at any time.
- A failure of any process at the first start ends the start: nothing listens, and the first failure is raised.
- Later a process that ends is started again, alone. If no worker can be started for GIVE_UP seconds, the server
  ends: connections would otherwise wait in the backlog for nothing.
- A child starts with default signal handlers and only those descriptors that its work needs. It ends when the
  supervisor does: the other ends of its channel and of the lifeline are closed then.

Must not know: what the processes do.
"""

from __future__ import annotations

import contextlib
import gc
import os
import selectors
import signal
import socket
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, Final, NoReturn, Protocol

from zcproto.common.clock import Clock, system_clock
from zcproto.errors import CertificateError, ConfigError, LifespanError, ZcprotoError
from zcproto.observe.log import flush_log, get_logger
from zcproto.workers.channel import Channel, Message
from zcproto.workers.restarts import RestartPacer

COORDINATOR: Final = 0
"""The number of the coordinator; workers have those from 1 on."""

GIVE_UP: Final = 60.0
"""Seconds without a ready worker after which the server ends: time for a database to come back, and no more than
clients wait."""

MARGIN: Final = 10.0
"""Seconds that a process has to end in addition to its drain, before it is killed."""

RELOAD_LIMIT: Final = 30.0
"""Seconds for which a reload waits for the processes."""

KILLED_LIMIT: Final = 5.0
"""Seconds for which the end of killed processes is awaited; an uninterruptible system call may take longer."""

MAX_ENDED: Final = 64
MAX_REASON: Final = 200
"""Characters of a reason in an alert."""

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2, signal.SIGCHLD)
_STOP: Final = (signal.SIGTERM, signal.SIGINT)

log = get_logger("zcproto.server")


class ChildFailed(ZcprotoError):
    """A process of the server failed by an error that has no message for the operator."""


class SupervisedService(Protocol):
    """What is supervised. Its methods run in the supervisor, except for `run`, and must return soon."""

    def run(self, number: int, channel: Channel, lifeline: int) -> int:
        """Run a process, in the child; return its exit code. The lifeline is at its end when the supervisor is."""

    def coordinator_ready(self, values: dict[str, Any]) -> None:
        """The coordinator has started for the first time. `values` are those of its message."""

    def listen(self) -> None:
        """All processes have started for the first time: let the sockets listen. Raises ConfigError."""

    def serving(self) -> None:
        """The workers accept from now on."""

    def process_ended(self, number: int) -> None:
        """Clear what the process has left in shared memory."""

    def reloading(self, is_begun: bool) -> None:
        """A reload has begun, or ended."""

    def reload(self) -> None:
        """Read the configuration again, which the coordinator has applied, for processes to come."""

    def drain_limit(self) -> float:
        """Return the seconds of a drain."""

    def stopping(self, limit: float) -> None:
        """A drain of the server has begun."""

    def upgrade(self) -> None:
        """SIGUSR2 has arrived."""

    def tick(self, ready: int) -> float:
        """Report that this many workers are ready; return the seconds until the next call."""

    def watchdog(self) -> float | None:
        """Return the seconds within which a process must send a beat; None without a limit."""


class ChildProcess:
    """One process of the server, and its successors."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.name = "coordinator" if number == COORDINATOR else str(number)
        self.pid = 0
        """0 while it does not run."""
        self.channel: Channel | None = None
        self.ready_at: float | None = None
        self.heard_at = 0.0
        self.kill_at: float | None = None
        self.start_at: float | None = 0.0
        """When to start it; None while it runs, or if it is not to run."""
        self.failure: ZcprotoError | None = None
        self.pacer = RestartPacer()

    @property
    def is_running(self) -> bool:
        return bool(self.pid)

    def send(self, name: str, **values: Any) -> bool:
        return self.channel is not None and self.channel.send(name, **values)


class Supervisor:
    """The supervisor of one server with `workers` workers."""

    def __init__(self, service: SupervisedService, workers: int, *, clock: Clock = system_clock) -> None:
        self._service = service
        self._now = clock.now
        self.coordinator = ChildProcess(COORDINATOR)
        self.workers = [ChildProcess(number) for number in range(1, workers + 1)]
        self._selector = selectors.DefaultSelector()
        self._signals, self._wakeup = socket.socketpair()
        self._life, self._lifeline = os.pipe()
        self._has_served = False
        self._is_stopping = self._is_forced = False
        self._limit = 0.0
        self._failure: ZcprotoError | None = None
        self._last_failure: ZcprotoError | None = None
        self._unready_since = self._now()
        self._next_tick = 0.0
        self._reloading: set[ChildProcess] | None = None
        self._reload_until = 0.0
        self._reload_again = False
        self._ended: deque[tuple[str, str]] = deque(maxlen=MAX_ENDED)
        """Processes that have ended, and why, which the coordinator has yet to report."""

    def run(self) -> bool:
        """Run the server until it has ended. Return False if a second signal has ended it at once.

        Raises the first failure of the start, the failure because of which no worker could be started, or that of a
        lifespan at the end.
        """
        gc.collect()
        gc.freeze()  # a collection in a child would copy the pages of every object
        with self._signal_handlers():
            try:
                while self._step():
                    pass
            finally:
                self._kill_rest()
                os.close(self._life)
                os.close(self._lifeline)
                self._selector.close()
                self._signals.close()
                self._wakeup.close()
        if self._failure is not None and not self._is_forced:
            raise self._failure
        return not self._is_forced

    @contextlib.contextmanager
    def _signal_handlers(self) -> Iterator[None]:
        """Write each signal to a socket that the loop watches."""
        self._signals.setblocking(False)
        self._wakeup.setblocking(False)
        self._selector.register(self._signals, selectors.EVENT_READ)
        old = {number: signal.signal(number, lambda number, frame: None) for number in _SIGNALS}
        old_wakeup = signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(old_wakeup)
            for number, handler in old.items():
                signal.signal(number, handler)

    def _processes(self) -> Iterator[ChildProcess]:
        yield self.coordinator
        yield from self.workers

    # --- one turn ------------------------------------------------------------------------------------

    def _step(self) -> bool:
        """Do what is due, then wait for the next event. Return False at the end."""
        now = self._now()
        if self._is_stopping:
            self._stop_coordinator()
            if self._is_forced or not any(each.is_running for each in self._processes()):
                return False
        elif self._gives_up(now):
            return True
        self._start_due(now)
        for each in self._processes():
            self._check_time(each, now)
        if self._reloading is not None and now >= self._reload_until:
            log.warning("workers.reload_slow", count=len(self._reloading), seconds=RELOAD_LIMIT)
            self._end_reload()
        if self._has_served and now >= self._next_tick:
            ready = sum(each.ready_at is not None for each in self.workers)
            self._next_tick = now + self._service.tick(ready)
        for key, _ in self._selector.select(max(0.0, self._next_event() - self._now())):
            if key.data is None:
                self._handle_signals()
            elif key.data.channel is not None and key.data.channel.fileno() == key.fd:
                self._handle_messages(key.data)
        return True

    def _next_event(self) -> float:
        """Return the time of the next thing to do, if nothing happens before."""
        times = [self._now() + 1.0]
        if self._has_served:
            times.append(self._next_tick)
        for each in self._processes():
            times += [time for time in (each.kill_at, each.start_at) if time is not None]
        return min(times)

    def _start_due(self, now: float) -> None:
        coordinator = self.coordinator
        if coordinator.start_at is not None and coordinator.start_at <= now:
            self._start(coordinator)
        if not self._has_served and coordinator.ready_at is None:
            return  # it makes what the workers read
        for worker in self.workers:
            if worker.start_at is not None and worker.start_at <= now and not self._is_stopping:
                self._start(worker)

    def _check_time(self, process: ChildProcess, now: float) -> None:
        if process.kill_at is not None and now >= process.kill_at:
            process.kill_at = None
            log.error("worker.killed", worker=process.name, pid=process.pid)
            self._signal(process, signal.SIGKILL)
        limit = self._service.watchdog()
        if limit is not None and process.ready_at is not None and now - process.heard_at > limit:
            process.heard_at = now  # one signal each time
            log.error("worker.hangs", worker=process.name, pid=process.pid, seconds=limit)
            process.kill_at = now + MARGIN
            self._signal(process, signal.SIGABRT)  # it writes the stack of each thread

    def _gives_up(self, now: float) -> bool:
        if any(each.ready_at is not None for each in self.workers):
            self._unready_since = now
        elif self._has_served and now - self._unready_since > GIVE_UP:
            self._failure = self._last_failure or ChildFailed(
                f"no worker could be started for {GIVE_UP:g} s; the log has the reason under worker.ended"
            )
            log.error("workers.gave_up", seconds=GIVE_UP)
            self._begin_stop(0.0)
            return True
        return False

    # --- signals and messages ------------------------------------------------------------------------

    def _handle_signals(self) -> None:
        try:
            numbers = self._signals.recv(4096)
        except (BlockingIOError, InterruptedError):
            return
        self._reap()
        for number in numbers:
            if number in _STOP:
                if self._is_stopping:
                    self._is_forced = True
                else:
                    self._begin_stop(self._service.drain_limit())
            elif number == signal.SIGHUP and self._has_served:
                self._begin_reload()
            elif number == signal.SIGUSR2 and self._has_served and not self._is_stopping:
                self._service.upgrade()

    def _handle_messages(self, process: ChildProcess) -> None:
        assert process.channel is not None
        messages = process.channel.receive()
        if messages is None:  # it has ended, or will be killed if it has not
            self._close_channel(process)
            process.kill_at = self._now() + KILLED_LIMIT
            self._reap()
            return
        for message in messages:
            self._handle_message(process, message)

    def _handle_message(self, process: ChildProcess, message: Message) -> None:
        name, values = message
        process.heard_at = self._now()
        is_coordinator = process is self.coordinator
        if name == "ready":
            self._handle_ready(process, values)
        elif name == "failed":
            process.failure = failure_from(process, values)
        elif name == "reloaded":
            self._handle_reloaded(process, values.get("applied") is True)
        elif name == "drain" and is_coordinator and not self._is_stopping:
            limit = values.get("limit")
            self._begin_stop(float(limit) if isinstance(limit, int | float) else self._service.drain_limit())

    def _handle_ready(self, process: ChildProcess, values: dict[str, Any]) -> None:
        if process.ready_at is not None or self._is_stopping:
            return
        process.ready_at = self._now()
        log.info("worker.ready", worker=process.name, pid=process.pid)
        if self._has_served:
            process.send("go")
            self._report_ended()
            return
        if process is self.coordinator:
            self._service.coordinator_ready(values)
        if all(each.ready_at is not None for each in self._processes()):
            try:
                self._service.listen()
            except ConfigError as error:
                self._failure = error
                self._begin_stop(0.0)
                return
            self._has_served = True
            for each in self._processes():
                each.send("go")
            self._service.serving()

    # --- start and end of a process ------------------------------------------------------------------

    def _start(self, process: ChildProcess) -> None:
        ours, theirs = Channel.pair()
        flush_log()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        # A signal to the whole group must not reach the child while it has the supervisor's handlers.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            pid = os.fork()
            if not pid:
                ours.close()
                self._run_child(process.number, theirs, before)
        except OSError as error:  # no memory, or too many processes
            ours.close()
            theirs.close()
            self._lose(process, f"fork: {error.strerror}")
            return
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        process.pid, process.channel, process.start_at = pid, ours, None
        process.failure, process.ready_at, process.kill_at = None, None, None
        process.heard_at = self._now()
        self._selector.register(ours, selectors.EVENT_READ, process)

    def _run_child(self, number: int, channel: Channel, mask: Iterable[int]) -> NoReturn:
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            for each in _SIGNALS:
                signal.signal(each, signal.SIG_DFL)
            signal.signal(
                signal.SIGINT, signal.SIG_IGN
            )  # Ctrl-C reaches every process; the supervisor decides
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            self._selector.close()
            self._signals.close()
            self._wakeup.close()
            os.close(self._lifeline)
            for process in self._processes():
                if process.channel is not None:
                    process.channel.close()
            code = self._service.run(number, channel, self._life)
        except BaseException as error:  # nothing may return into the supervisor's code
            with contextlib.suppress(BaseException):
                log.error("server.fault", what="run", exc_info=error)
        finally:
            with contextlib.suppress(BaseException):
                flush_log()
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def _reap(self) -> None:
        """Collect the processes that have ended."""
        for process in self._processes():
            if not process.is_running:
                continue
            try:
                pid, status = os.waitpid(process.pid, os.WNOHANG)
            except ChildProcessError:  # the program has collected it
                pid, status = process.pid, 0
            if pid:
                self._handle_end(process, os.waitstatus_to_exitcode(status))

    def _handle_end(self, process: ChildProcess, code: int) -> None:
        if process.channel is not None:
            for message in process.channel.receive() or ():  # its last words
                if message.name == "failed":
                    process.failure = failure_from(process, message.values)
            self._close_channel(process)
        self._service.process_ended(process.number)
        reason = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        if process.failure is not None:
            reason = str(process.failure)
        self._lose(process, reason, is_expected=self._is_stopping and not code)

    def _lose(self, process: ChildProcess, reason: str, *, is_expected: bool = False) -> None:
        """Note that a process does not run, and when it starts again."""
        now = self._now()
        pid, process.pid, process.kill_at = process.pid, 0, None
        served = None if process.ready_at is None else now - process.ready_at
        process.ready_at = process.start_at = None
        if self._reloading is not None:
            self._reload_done(process)
        if self._is_stopping:
            if not is_expected:
                log.error("worker.ended", worker=process.name, pid=pid, reason=reason)
                self._failure = self._failure or process.failure
            if process is self.coordinator and any(each.is_running for each in self.workers):
                process.start_at = now + process.pacer.ended(served)  # the workers have sessions to store
            return
        if not self._has_served:
            self._failure = process.failure or ChildFailed(
                f"the process {process.name} ended during the start: {reason}; the log has more"
            )
            self._begin_stop(0.0)
            return
        if process is not self.coordinator:
            self._last_failure = process.failure
        delay = process.pacer.ended(served)
        process.start_at = now + delay
        log.error("worker.ended", worker=process.name, pid=pid, reason=reason, retry_after_s=round(delay, 3))
        self._ended.append((process.name, reason[:MAX_REASON]))
        self._report_ended()

    def _report_ended(self) -> None:
        while self._ended and self.coordinator.ready_at is not None:
            name, reason = self._ended[0]
            if not self.coordinator.send("ended", worker=name, reason=reason):
                break  # it has ended too
            self._ended.popleft()

    def _close_channel(self, process: ChildProcess) -> None:
        if process.channel is not None:
            self._selector.unregister(process.channel)
            process.channel.close()
            process.channel = None

    def _signal(self, process: ChildProcess, number: int) -> None:
        if process.is_running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)

    # --- reload --------------------------------------------------------------------------------------

    def _begin_reload(self) -> None:
        """Let the coordinator apply the configuration first: if it refuses, nothing changes."""
        if self._is_stopping:
            return
        if self._reloading is not None:
            self._reload_again = True  # it will read whatever has changed by then
            return
        self._wait_for_reload([self.coordinator])

    def _wait_for_reload(self, processes: Iterable[ChildProcess]) -> None:
        if self._reloading is None:
            self._service.reloading(True)
        self._reload_until = self._now() + RELOAD_LIMIT
        self._reloading = {each for each in processes if each.ready_at is not None and each.send("reload")}
        if not self._reloading:
            self._end_reload()

    def _handle_reloaded(self, process: ChildProcess, has_applied: bool) -> None:
        if process is self.coordinator and has_applied and not self._is_stopping:
            self._service.reload()
            self._wait_for_reload(self.workers)
        elif self._reloading is not None:
            self._reload_done(process)

    def _reload_done(self, process: ChildProcess) -> None:
        assert self._reloading is not None
        self._reloading.discard(process)
        if not self._reloading:
            self._end_reload()

    def _end_reload(self) -> None:
        self._reloading = None
        self._service.reloading(False)
        self.coordinator.send("applied")
        if self._reload_again:
            self._reload_again = False
            self._begin_reload()

    # --- stop ----------------------------------------------------------------------------------------

    def _begin_stop(self, limit: float) -> None:
        self._is_stopping, self._limit = True, limit
        if self._has_served:
            self._service.stopping(limit)
        for worker in self.workers:
            worker.start_at = None
            self._drain(worker)

    def _stop_coordinator(self) -> None:
        if any(each.is_running for each in self.workers):
            return
        self.coordinator.start_at = None
        if self.coordinator.is_running and self.coordinator.kill_at is None:
            self._drain(self.coordinator)

    def _drain(self, process: ChildProcess) -> None:
        if process.is_running:
            process.kill_at = self._now() + self._limit + MARGIN
            process.send("drain", limit=self._limit)

    def _kill_rest(self) -> None:
        """Kill what still runs, and wait for it, so that the port and the store are free."""
        for process in self._processes():
            self._signal(process, signal.SIGKILL)
        until = self._now() + KILLED_LIMIT
        while any(each.is_running for each in self._processes()) and self._now() < until:
            self._selector.select(0.05)
            self._is_stopping = True
            with contextlib.suppress(BlockingIOError):
                self._signals.recv(4096)
            self._reap()


_ERRORS: Final = {"certificate": CertificateError, "lifespan": LifespanError}
"""Errors with one sentence for the operator, by the `kind` of the message `failed`."""


def failure_of(error: BaseException) -> dict[str, Any]:
    """Return the values of the message `failed`, of which `failure_from` makes the error again."""
    if isinstance(error, ConfigError):
        return {"kind": "config", "text": [fault[:1000] for fault in error.faults[:50]]}
    for kind, error_type in _ERRORS.items():
        if isinstance(error, error_type):
            return {"kind": kind, "text": [str(error)[:4000]]}
    return {"kind": "other", "text": [type(error).__name__]}


def failure_from(process: ChildProcess, values: dict[str, Any]) -> ZcprotoError:
    """Return the error that a process has reported."""
    kind, text = values.get("kind"), values.get("text")
    lines = [str(each) for each in text] if isinstance(text, list) and text else ["(no text)"]
    if kind == "config":
        return ConfigError(lines)
    if kind in _ERRORS:
        return _ERRORS[kind](lines[0])
    return ChildFailed(
        f"the process {process.name} raised {lines[0]}; the log has the traceback under server.fault"
    )
