"""The supervisor: forks the coordinator and the workers of a server, and starts those again that end.

    start:  coordinator ready -> workers ready -> "go" to all of them -> serving
    stop:   "drain" to the workers -> they end -> "drain" to the coordinator -> it ends
    upgrade: a successor does the same beside it (upgrade.py); "prepared" -> "store" -> "serving" -> "left"

Decides: which process runs, and when a process that does not obey is killed.

Rules:
- One thread without an event loop, TLS or keys, so that a fork is safe at any time.
- A failure of any process at the first start ends the start: nothing listens, and the first failure is raised.
- Later a process that ends is started again, alone. So is one that hangs, before it is ready or later. Time in
  which it waits for a processor does not count.
- If no worker can be started for GIVE_UP seconds, the server ends: connections would otherwise wait in the backlog
  for nothing.
- The coordinator raises the alerts of processes that end. Without one, a child is forked for that.
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import Enum
from typing import Any, Final, NamedTuple, NoReturn, Protocol

from zcproto.common.backoff import backoff_s
from zcproto.common.clock import Clock, system_clock
from zcproto.common.process import queued_seconds
from zcproto.errors import ConfigError, ZcprotoError
from zcproto.observe.log import flush_log, get_logger
from zcproto.workers.channel import Channel, ChildFailed, Message, failure_from
from zcproto.workers.upgrade import Action, Handover, Input, Step, Successor

COORDINATOR: Final = 0
"""The number of the coordinator; workers have those from 1 on."""

MARGIN: Final = 10.0
"""Seconds that a process has to end in addition to its drain, before it is killed."""

KILLED_LIMIT: Final = 5.0
"""Seconds for which the end of killed processes is awaited; an uninterruptible system call may take longer."""

RELOAD_LIMIT: Final = 30.0
"""Seconds for which a reload waits for the processes."""

GIVE_UP: Final = 60.0
"""Seconds without a ready worker after which the server ends: time for a database to come back, and no more than
clients wait."""

LATE: Final = 3.0
"""A turn of the supervisor that is late by this part of the limit of hung processes says nothing about them."""

REPORT_AFTER: Final = 10.0
"""Seconds for which the end of a process waits for a coordinator that reports it; then a child does that."""

REPORT_LIMIT: Final = 60
"""Seconds after which that process is ended by the system."""

ABANDONED_LIMIT: Final = 0.3
"""Seconds that workers have to end whose server was to take over from one that was killed."""

MAX_ENDED: Final = 64
MAX_REASON: Final = 200
"""Characters of a reason in an alert."""

SOON: Final = 1.0
"""Seconds after it was ready within which an end counts as a failed start."""

FREE: Final = 3
"""Failed starts in a row that are repeated at once: clients wait, and the cause may have been a passing one."""

FIRST_DELAY: Final = 0.25
LONGEST_DELAY: Final = 10.0
LONGEST_READY_DELAY: Final = 0.5
"""For a process that was ready. A start takes about a tenth of that, on one core."""

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2, signal.SIGCHLD)
_STOP: Final = (signal.SIGTERM, signal.SIGINT)

log = get_logger("zcproto.server")


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

    def config_refused(self, is_refused: bool) -> None:
        """The last configuration was refused, or it was not."""

    def reload(self) -> None:
        """Read the configuration again, which the coordinator has applied, for processes to come."""

    def drain_limit(self) -> float:
        """Return the seconds of a drain."""

    def run_limit(self, limit: float, *, is_replaced: bool) -> float:
        """Return the seconds that durable methods have after a drain, in workers that are replaced or end."""

    def stopping(self, limit: float) -> None:
        """A drain of the server has begun."""

    def start_successor(self) -> Successor:
        """Start this program again, with the sockets and locks of this one. Raises OSError."""

    def upgrade_limit(self) -> float:
        """Return the seconds within which a successor must serve."""

    def left(self, pid: int) -> None:
        """The successor serves: it owns the home folder and speaks to the service manager from now on."""

    def tick(self, ready: int) -> float:
        """Report that this many workers are ready; return the seconds until the next call."""

    def renew_sockets(self) -> bool:
        """Make sockets again that were removed. Return whether a new coordinator is needed, which gets them."""

    def hang_limit(self) -> float | None:
        """Return the seconds within which a process must send a beat; None without a limit."""

    def start_limit(self) -> float | None:
        """Return the seconds within which a process must be ready; None without a limit."""

    def report(self, ended: Sequence[tuple[str, str]]) -> int:
        """Raise the alerts of processes that ended, by name and reason, in a child; return its exit code."""


class RestartPacer:
    """The restarts of one process. `failures` is the number of failed starts in a row.

    What ends a process that has served for a while is not in its start: it starts again at once. One that ends soon
    again and again starts after a growing delay, a short one if it was ready each time: it serves in between.
    """

    def __init__(self) -> None:
        self.failures = 0

    def ended(self, served: float | None) -> float:
        """Return the seconds until the next start. `served` is how long it was ready; None if it never was."""
        if served is not None and served >= SOON:
            self.failures = 0
            return 0.0
        self.failures += 1
        if self.failures <= FREE:
            return 0.0
        longest = LONGEST_DELAY if served is None else LONGEST_READY_DELAY
        return backoff_s(self.failures - FREE, FIRST_DELAY, longest)


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
        """When its last message came; until it is ready, when it was started."""
        self._queued = 0.0
        self.kill_at: float | None = None
        self.is_aborted = False
        self.is_drained = False
        """Whether it was ordered to end."""
        self.start_at: float | None = 0.0
        """When to start it; None while it runs, or if it is not to run."""
        self.failure: ZcprotoError | None = None
        self.pacer = RestartPacer()

    @property
    def is_running(self) -> bool:
        return bool(self.pid)

    def heard(self, now: float) -> None:
        """Begin to count its silence again."""
        self.heard_at, self._queued = now, queued_seconds(self.pid)

    def silence(self, now: float) -> float:
        """Return the seconds since then, without those in which it waited for a processor."""
        return now - self.heard_at - (queued_seconds(self.pid) - self._queued)

    def send(self, name: str, **values: Any) -> bool:
        return self.channel is not None and self.channel.send(name, **values)


class Reload:
    """The reloads of one server. Once `is_stopped` is set, none begins.

        SIGHUP -> "reload" to the coordinator -> "reloaded" -> "reload" to the workers -> "reloaded" of each
               -> "applied" to the coordinator

    If the coordinator refuses the configuration, nothing changes. A reload by the control socket begins in the
    coordinator, so that its "reloaded" is the first message.
    """

    def __init__(
        self,
        service: SupervisedService,
        coordinator: ChildProcess,
        workers: Sequence[ChildProcess],
        now: Callable[[], float],
    ) -> None:
        self._service = service
        self._coordinator = coordinator
        self._workers = workers
        self._now = now
        self._waiting: set[ChildProcess] | None = None
        self._until = 0.0
        self._is_requested = False
        self.is_stopped = False

    def request(self) -> None:
        """Begin a reload, or another one after that in progress."""
        if self.is_stopped:
            return
        if self._waiting is not None:
            self._is_requested = True  # it will read whatever has changed by then
            return
        self._wait_for([self._coordinator])

    def handle_reloaded(self, process: ChildProcess, *, has_applied: bool) -> None:
        """Handle a process that has applied the configuration, or refused it."""
        if process is self._coordinator:
            self._service.config_refused(not has_applied)
        if process is self._coordinator and has_applied and not self.is_stopped:
            self._service.reload()
            self._wait_for(self._workers)
        else:
            self.remove(process)

    def remove(self, process: ChildProcess) -> None:
        """Do not wait for a process any more."""
        if self._waiting is not None:
            self._waiting.discard(process)
            if not self._waiting:
                self._end()

    def check_time(self, now: float) -> None:
        """End a reload that takes too long."""
        if self._waiting is not None and now >= self._until:
            log.warning("workers.reload_slow", count=len(self._waiting), seconds=RELOAD_LIMIT)
            self._end()

    def _wait_for(self, processes: Iterable[ChildProcess]) -> None:
        if self._waiting is None:
            self._service.reloading(True)
        self._until = self._now() + RELOAD_LIMIT
        self._waiting = {each for each in processes if each.ready_at is not None and each.send("reload")}
        if not self._waiting:
            self._end()

    def _end(self) -> None:
        self._waiting = None
        self._service.reloading(False)
        self._coordinator.send("applied")
        if self._is_requested:
            self._is_requested = False
            self.request()


class Phase(Enum):
    """What the end of a process means: a failed start, a restart, the next step of an upgrade, the end."""

    STARTING = 0
    SERVING = 1
    HANDING_OVER = 2
    STOPPING = 3


class ProcessEnd(NamedTuple):
    """The end of a process. `served` is how many seconds it was ready; None if it never was."""

    process: ChildProcess
    pid: int
    reason: str
    is_expected: bool
    served: float | None

    def log(self) -> None:
        log.error("worker.ended", worker=self.process.name, pid=self.pid, reason=self.reason)


class Supervisor:
    """The supervisor of one server with `workers` workers, which replaces `predecessor` if there is one."""

    def __init__(
        self,
        service: SupervisedService,
        workers: int,
        *,
        predecessor: Channel | None = None,
        clock: Clock = system_clock,
    ) -> None:
        self._service = service
        self._now = clock.now
        self.coordinator = ChildProcess(COORDINATOR)
        self.workers = [ChildProcess(number) for number in range(1, workers + 1)]
        self._selector = selectors.DefaultSelector()
        self._signals, self._wakeup = socket.socketpair()
        self._life, self._lifeline = os.pipe()
        self._has_served = False
        self._is_stopping = self._is_forced = False
        self._run_limit = 0.0
        self._limit = 0.0
        self._failure: ZcprotoError | None = None
        self._last_failure: ZcprotoError | None = None
        self._unready_since = self._now()
        self._next_tick = 0.0
        self._reload = Reload(service, self.coordinator, self.workers, self._now)
        self._ended: deque[tuple[str, str]] = deque(maxlen=MAX_ENDED)
        """Processes that have ended, and why, which the coordinator has yet to report."""
        self._report_at = 0.0
        self._reporter = 0
        """The process id of the process that reports without a coordinator."""
        self._handover = Handover()
        self._successor: Successor | None = None
        self._successor_until = 0.0
        self._upgrade_failure = ""
        self._predecessor = predecessor
        if predecessor is not None:
            predecessor.outlive_peer()
            self.coordinator.start_at = None  # the predecessor has the store
            self._selector.register(predecessor, selectors.EVENT_READ, self._handle_predecessor)

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
        self._check_successor(now)
        self._check_report(now)
        self._reload.check_time(now)
        if self._has_served and now >= self._next_tick:
            ready = sum(each.ready_at is not None for each in self.workers)
            self._next_tick = now + self._service.tick(ready)
            is_settled = self._handover.step is Step.IDLE and not self._is_stopping
            if is_settled and self._service.renew_sockets():
                self._drain(self.coordinator)  # the next one has them
        for key, _ in self._wait():
            if key.data is None:
                self._handle_signals()
            elif callable(key.data):
                key.data()
            elif key.data.channel is not None and key.data.channel.fileno() == key.fd:
                self._handle_messages(key.data)
        return True

    def _wait(self) -> list[tuple[selectors.SelectorKey, int]]:
        """Wait for the next event, or until something is due."""
        due = max(self._now(), self._next_event())
        events = self._selector.select(due - self._now())
        now, limit = self._now(), self._service.hang_limit()
        if limit is not None and now - due > limit / LATE:
            for each in self._processes():  # this process was stopped, and perhaps all: they are not late yet
                each.heard(now)
        return events

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
        if not self._has_served and coordinator.ready_at is None and self._predecessor is None:
            return  # it makes what the workers read
        for worker in self.workers:
            if worker.start_at is not None and worker.start_at <= now and not self._is_stopping:
                self._start(worker)

    def _check_time(self, process: ChildProcess, now: float) -> None:
        if process.kill_at is not None and now >= process.kill_at:
            process.kill_at = None
            log.error("worker.killed", worker=process.name, pid=process.pid)
            if process.ready_at is None and not process.is_aborted:
                self._abort(process, now)  # what it waits for is of interest
            else:
                self._signal(process, signal.SIGKILL)
        if process.ready_at is None:
            self._check_start(process, now)
            return
        limit = self._service.hang_limit()
        if limit is not None and now - process.heard_at > limit and process.silence(now) > limit:
            process.heard(now)  # one signal each time
            log.error("worker.hangs", worker=process.name, pid=process.pid, seconds=limit)
            self._abort(process, now)

    def _check_start(self, process: ChildProcess, now: float) -> None:
        limit = self._service.start_limit()
        if limit is None or not process.is_running or process.kill_at is not None:
            return
        if now - process.heard_at > limit and process.silence(now) > limit:
            log.error("worker.not_ready", worker=process.name, pid=process.pid, seconds=limit)
            process.failure = ChildFailed(
                f"the process {process.name} was not ready within {limit:g} s; stderr has the stack of each thread"
            )
            self._abort(process, now)

    def _abort(self, process: ChildProcess, now: float) -> None:
        process.is_aborted = True
        process.kill_at = now + MARGIN
        self._signal(process, signal.SIGABRT)  # it writes the stack of each thread
        self._signal(process, signal.SIGCONT)  # if it was stopped

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
                    self._upgrade(Input.FAILED)
                    self._begin_stop(self._service.drain_limit())
            elif number == signal.SIGHUP and self._has_served:
                self._reload.request()
            elif number == signal.SIGUSR2 and self._has_served and not self._is_stopping:
                self._upgrade(Input.REQUESTED)

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
        if process.ready_at is not None:
            process.heard(self._now())
        is_coordinator = process is self.coordinator
        if name == "ready":
            self._handle_ready(process, values)
        elif name == "failed":
            process.failure = failure_from(process.name, values)
        elif name == "reloaded":
            self._reload.handle_reloaded(process, has_applied=values.get("applied") is True)
        elif name == "drained":  # but for durable methods, whose clients need not wait for one another
            process.kill_at = self._now() + self._run_limit + MARGIN
            self._upgrade(Input.WORKER_ENDED)
        elif name == "drain" and is_coordinator and not self._is_stopping:
            limit = values.get("limit")
            self._begin_stop(float(limit) if isinstance(limit, int | float) else self._service.drain_limit())
        elif name == "upgrade" and is_coordinator and self._has_served and not self._is_stopping:
            if self._handover.step is Step.ENDING:
                self._report_upgrade("the new server of an earlier attempt still ends; repeat the command")
            self._upgrade(Input.REQUESTED)

    def _handle_ready(self, process: ChildProcess, values: dict[str, Any]) -> None:
        if process.ready_at is not None or self._is_stopping:
            return
        process.ready_at = self._now()
        process.heard(process.ready_at)
        log.info("worker.ready", worker=process.name, pid=process.pid)
        if self._has_served:
            process.send("go")
            self._report_ended()
            if process is self.coordinator and self._upgrade_failure:
                process.send("upgrade_failed", reason=self._upgrade_failure)
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
            if self._predecessor is None:
                self._service.serving()
            else:
                self._predecessor.send("serving")
        elif self._predecessor is not None and all(each.ready_at is not None for each in self.workers):
            self._predecessor.send("prepared")

    # --- start and end of a process ------------------------------------------------------------------

    def _start(self, process: ChildProcess) -> None:
        ours, theirs = Channel.pair()

        def run() -> int:
            ours.close()
            return self._service.run(process.number, theirs, self._life)

        try:
            pid = self._fork(run)
        except OSError as error:  # no memory, or too many processes
            ours.close()
            theirs.close()
            self._lose(process, f"fork: {error.strerror}")
            return
        theirs.close()
        process.pid, process.channel, process.start_at = pid, ours, None
        process.failure, process.ready_at, process.kill_at = None, None, None
        process.is_drained = process.is_aborted = False
        process.heard(self._now())
        self._selector.register(ours, selectors.EVENT_READ, process)

    def _fork(self, run: Callable[[], int]) -> int:
        """Run a function in a child, which ends with what it returns. Return the process id. Raises OSError."""
        flush_log()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        # A signal to the whole group must not reach the child while it has the supervisor's handlers.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            pid = os.fork()
            if not pid:
                self._run_child(run, before)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return pid

    def _run_child(self, run: Callable[[], int], mask: Iterable[int]) -> NoReturn:
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            for signal_number in _SIGNALS:
                signal.signal(signal_number, signal.SIG_DFL)
            for signal_number in (signal.SIGINT, signal.SIGHUP):  # sent to the whole group at a terminal
                signal.signal(signal_number, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            self._selector.close()
            self._signals.close()
            self._wakeup.close()
            os.close(self._lifeline)
            peer = None if self._successor is None else self._successor.channel
            for each in (peer, self._predecessor, *(process.channel for process in self._processes())):
                if each is not None:
                    each.close()
            code = run()
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
        if self._successor is not None and self._successor.reason is not None:
            self._lose_successor(self._successor.reason)
        if self._reporter:
            with contextlib.suppress(ChildProcessError):
                if not os.waitpid(self._reporter, os.WNOHANG)[0]:
                    return
            self._reporter = 0

    def _handle_end(self, process: ChildProcess, code: int) -> None:
        if process.channel is not None:
            while messages := process.channel.receive():  # until all of its last words are read
                for message in messages:
                    if message.name == "failed":
                        process.failure = failure_from(process.name, message.values)
            self._close_channel(process)
        self._service.process_ended(process.number)
        reason = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        if process.failure is not None:
            reason = str(process.failure)
        self._lose(process, reason, is_expected=process.is_drained and not code)

    def _lose(self, process: ChildProcess, reason: str, *, is_expected: bool = False) -> None:
        """Note that a process does not run. What follows depends on the phase of the server."""
        served = None if process.ready_at is None else self._now() - process.ready_at
        end = ProcessEnd(process, process.pid, reason, is_expected, served)
        process.pid, process.kill_at, process.ready_at, process.start_at = 0, None, None, None
        self._reload.remove(process)
        {
            Phase.STARTING: self._fail_start,
            Phase.SERVING: self._restart,
            Phase.HANDING_OVER: self._continue_upgrade,
            Phase.STOPPING: self._end_while_stopping,
        }[self._phase_of(process)](end)

    def _phase_of(self, process: ChildProcess) -> Phase:
        if self._is_stopping:
            return Phase.STOPPING
        if not self._has_served:
            return Phase.STARTING
        is_needed = process is not self.coordinator or self._handover.has_coordinator
        return Phase.SERVING if is_needed and not self._handover.is_retiring else Phase.HANDING_OVER

    def _fail_start(self, end: ProcessEnd) -> None:
        self._failure = end.process.failure or ChildFailed(
            f"the process {end.process.name} ended during the start: {end.reason}; the log has more"
        )
        self._begin_stop(0.0)

    def _restart(self, end: ProcessEnd) -> None:
        process, now = end.process, self._now()
        if end.is_expected:
            process.start_at = now
            return
        if process is not self.coordinator:
            self._last_failure = process.failure
        delay = process.pacer.ended(end.served)
        process.start_at = now + delay
        pause = round(delay, 3)
        log.error("worker.ended", worker=process.name, pid=end.pid, reason=end.reason, retry_after_s=pause)
        if not self._ended:
            self._report_at = now + REPORT_AFTER
        self._ended.append((process.name, end.reason[:MAX_REASON]))
        self._report_ended()

    def _continue_upgrade(self, end: ProcessEnd) -> None:
        if not end.is_expected:
            end.log()
        is_coordinator = end.process is self.coordinator
        self._upgrade(Input.COORDINATOR_ENDED if is_coordinator else Input.WORKER_ENDED)

    def _end_while_stopping(self, end: ProcessEnd) -> None:
        process = end.process
        if not end.is_expected:
            end.log()
            self._failure = self._failure or process.failure
        if process is self.coordinator and any(each.is_running for each in self.workers):
            process.start_at = self._now() + process.pacer.ended(
                end.served
            )  # the workers have sessions to store

    def _check_report(self, now: float) -> None:
        """Fork a process that reports, if there is no coordinator for some time."""
        if not self._ended or now < self._report_at or self._reporter or not self._has_served:
            return
        self._report_at = now + REPORT_AFTER
        ended = list(self._ended)

        def run() -> int:
            signal.alarm(REPORT_LIMIT)
            return self._service.report(ended)

        with contextlib.suppress(OSError):  # no memory, or too many processes: later
            self._reporter = self._fork(run)
            self._ended.clear()

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

    # --- upgrade -------------------------------------------------------------------------------------

    def _upgrade(self, given: Input) -> None:
        of_server = {
            Action.START_SUCCESSOR: self._start_successor,
            Action.END_COORDINATOR: self._end_coordinator,
            Action.SERVE_ON: self._serve_on,
            Action.DRAIN_NEXT: self._drain_next,
        }
        of_successor = {
            Action.GIVE_STORE: lambda successor: successor.channel.send("store"),
            Action.LEAVE: self._leave_to,
            Action.END_SUCCESSOR: self._end_successor,
        }
        for action in self._handover.handle(given):
            if action in of_server:
                of_server[action]()
            elif self._successor is not None:
                of_successor[action](self._successor)

    def _serve_on(self) -> None:
        if not self.coordinator.is_running and not self._is_stopping:
            self.coordinator.start_at = self._now()

    def _leave_to(self, successor: Successor) -> None:
        self._service.left(successor.pid)
        successor.channel.send("left")
        for worker in self.workers:
            worker.send("leave")
        log.info("upgrade.done", pid=successor.pid)

    def _end_successor(self, successor: Successor) -> None:
        self._successor_until = self._now() + MARGIN + KILLED_LIMIT  # it kills its processes first
        if not successor.is_ending:
            successor.terminate()

    def _start_successor(self) -> None:
        try:
            self._successor = successor = self._service.start_successor()
        except OSError as error:
            self._lose_successor(f"it cannot be started: {error.strerror}")
            return
        self._successor_until = self._now() + self._service.upgrade_limit()
        self._selector.register(successor.channel, selectors.EVENT_READ, self._handle_successor)
        log.info("upgrade.started", pid=successor.pid)

    def _end_coordinator(self) -> None:
        self.coordinator.start_at = None
        if self.coordinator.is_running:
            self._drain(self.coordinator)
        else:
            self._upgrade(Input.COORDINATOR_ENDED)

    def _drain_next(self) -> None:
        self._limit = self._service.drain_limit()
        self._run_limit = self._service.run_limit(self._limit, is_replaced=True)
        for worker in self.workers:
            worker.start_at = None
        running = [worker for worker in self.workers if worker.is_running]
        for worker in running:
            if worker.kill_at is None:
                return self._drain(worker)
        if not running:
            self._begin_stop(0.0)
        return None

    def _handle_successor(self) -> None:
        assert self._successor is not None
        messages = self._successor.channel.receive()
        for name, values in messages or ():
            if name in ("prepared", "serving"):
                self._upgrade(Input(name))
            elif name == "failed":
                self._successor.failure = self._successor.failure or str(failure_from("new server", values))
        if messages is None:
            self._selector.unregister(self._successor.channel)
            self._successor.is_ending = True
            self._upgrade(Input.FAILED)
            self._reap()

    def _check_successor(self, now: float) -> None:
        if self._successor is None or now < self._successor_until:
            return
        if self._handover.is_timed:
            limit = self._service.upgrade_limit()
            log.error("upgrade.slow", pid=self._successor.pid, seconds=limit)
            self._successor.failure = f"it did not serve within {limit:g} s (server.upgrade_timeout)"
            self._report_upgrade(self._successor.failure)  # its end may take longer
            self._upgrade(Input.FAILED)
        elif self._handover.step is Step.ENDING:
            self._successor.kill()

    def _lose_successor(self, reason: str) -> None:
        if self._successor is not None:
            with contextlib.suppress(KeyError):
                self._selector.unregister(self._successor.channel)
            self._successor.close()
            self._successor = None
        if not self._handover.is_retiring:
            self._report_upgrade(reason)
            log.error("upgrade.failed", reason=reason, cure="correct that; the old server serves on")
        self._upgrade(Input.SUCCESSOR_ENDED)

    def _report_upgrade(self, failure: str) -> None:
        self._upgrade_failure = failure
        self.coordinator.send("upgrade_failed", reason=failure)

    def _handle_predecessor(self) -> None:
        assert self._predecessor is not None
        messages = self._predecessor.receive()
        names = [message.name for message in messages or ()]
        if "store" in names:
            self.coordinator.start_at = self._now()
        if "left" not in names and messages is not None:
            return
        self._selector.unregister(self._predecessor)
        self._predecessor.close()
        self._predecessor = None
        if self._has_served:
            self._service.serving()
        elif self.coordinator.start_at is None and not self.coordinator.is_running:
            self._failure = ChildFailed("the server that this one was to replace has ended; start it again")
            self._begin_stop(0.0)
            for worker in self.workers:  # they serve no client, and the next server needs the home folder
                if worker.is_running:
                    worker.kill_at = self._now() + ABANDONED_LIMIT

    # --- stop ----------------------------------------------------------------------------------------

    def _begin_stop(self, limit: float) -> None:
        self._is_stopping = self._reload.is_stopped = True
        self._limit = limit if self._has_served else 0.0
        self._run_limit = self._service.run_limit(self._limit, is_replaced=self._handover.is_retiring)
        if self._has_served and self._predecessor is None:
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
            process.is_drained |= process.send("drain", limit=self._limit, runs=self._run_limit)

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
