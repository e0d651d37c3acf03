"""A server of several processes: what is prepared before the first fork, and what each process does.

    supervisor    binds the sockets, owns the home folder, speaks to the service manager (supervisor.py)
    coordinator   a Server that accepts nothing: what must exist once, and the control socket
    worker        a Server on the inherited sockets

Rules:
- All workers accept on the same sockets, so that a restart loses no connection of the backlog.
- Nothing listens before every worker has started its lifespan.
- A process that loses its supervisor closes the port at once, and ends within ORPHAN_LIMIT: the next supervisor
  needs the port and the sessions, and limits do not hold over the processes of two servers.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import faulthandler
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from mmap import mmap
from pathlib import Path
from typing import Any, Final

from zcproto.admin.control import BACKLOG as CONTROL_BACKLOG
from zcproto.admin.control import open_control, renewed_socket
from zcproto.bus.sealing import load_keys
from zcproto.common.clock import Clock, system_clock, system_entropy
from zcproto.common.files import is_locked
from zcproto.common.process import import_event_loop, new_event_loop
from zcproto.common.text import counted
from zcproto.common.unix_socket import SocketFile
from zcproto.config import Config
from zcproto.config.changes import effective
from zcproto.errors import ConfigError
from zcproto.observe.log import LogChange, finish_log, name_process, reopen_log
from zcproto.runtime.build import build_alerts
from zcproto.runtime.first_start import FirstStart
from zcproto.runtime.process_setup import (
    UPGRADE,
    exit_at_once,
    log_loop_fault,
    log_risks,
    raise_limit_for,
    tune_interpreter,
)
from zcproto.runtime.reload import ReadConfig
from zcproto.runtime.server import Server, at_home, no_redirect
from zcproto.runtime.service_manager import ServiceManager
from zcproto.runtime.store_setup import MEMORY, SQLITE, run_limit
from zcproto.server.listener import bind, listen
from zcproto.server.state import log
from zcproto.workers import fleet
from zcproto.workers.alerts import on_process_ended
from zcproto.workers.channel import Channel, failure_of
from zcproto.workers.figures import Member
from zcproto.workers.fleet import Membership
from zcproto.workers.limits import SharedMemory, memory_size, share_of
from zcproto.workers.link import Link
from zcproto.workers.supervisor import COORDINATOR, Supervisor
from zcproto.workers.upgrade import Inheritance, Successor

ORPHAN_LIMIT: Final = 0.3
"""Seconds that a process has to end after its supervisor: for GOAWAY, and the answers that wait to be sent."""

LINK_BACKLOG: Final = 1_024
"""Workers, with three links each, that wait for a new coordinator."""

LEAST_START: Final = 30.0
"""Seconds that a process has to start, in addition to its lifespan, whatever the limit of hung ones is: it imports,
reads certificates, and waits for the store."""

REPORTED_WITHIN: Final = 20.0
"""Seconds in which alerts are delivered without a coordinator."""

BEATS: Final = 3
"""Beats of a process in the time after which it counts as hung."""

MAX_NAMES: Final = 100
"""Names of a certificate that the supervisor may show: a certificate may have thousands."""

APPLIED_LIMIT: Final = 60.0
"""Seconds for which a reload by the control socket waits for the workers."""

PATIENCE: Final = 3.0
"""Seconds: ten times what a process has that lost its supervisor. Another program may have the port for good."""

PAUSE: Final = 0.02


def serve_processes(
    server: Server, make: Callable[..., Server], workers: int, risks: Mapping[str, str], **options: Any
) -> None:
    """Run a server of several processes, perhaps as the successor of another, until it has ended.

    Further options are those of ForkedService. Raises as `serve`.
    """
    inheritance = Inheritance.from_environ(os.environ)
    try:
        if workers == 1:
            raise ConfigError(
                ["server.workers = 1: one process cannot take over from several; restart the server instead"]
            )
        ForkedService(server, make, workers, **options).serve(risks, inheritance)
    except Exception as error:
        if inheritance is not None:
            inheritance.report(error)
        raise


class ForkedService:
    """What the processes of one server inherit, and what each of them does.

    `server` is not started: it has the configuration. `make` makes that of a process, with `options`.
    """

    def __init__(
        self,
        server: Server,
        make: Callable[..., Server],
        workers: int,
        *,
        options: Mapping[str, Any],
        manager: ServiceManager,
        first: FirstStart,
        ready: Callable[[Server], None],
        listening: Callable[[Sequence[tuple[str, int]]], None],
    ) -> None:
        self._make = make
        self._options = dict(options)
        self._home = server.home
        self._config = server.config
        self._read_config = server.read_config
        self._workers = workers
        self._manager = manager
        self._first = first
        self._on_worker_ready = ready
        self._on_listening = listening
        self._control_file = SocketFile(server.home.control)
        self._control: socket.socket | None = None
        self._link_file = SocketFile(server.home.workers)
        self._link: socket.socket | None = None
        self._sockets: list[socket.socket] = list(self._options.pop("sockets", ()))
        self._redirect_sockets: list[socket.socket] = list(self._options.pop("redirect_sockets", ()))
        self._certificate_names: list[str] = []
        self._ready = workers
        self._is_refused = False
        self._has_predecessor = False
        self._ended: Counter[int] = Counter()
        self._started_at = system_clock.wall()
        connections = self._config.limits.max_connections
        self._counts = SharedMemory(
            mmap(-1, memory_size(workers, connections)), workers, connections, system_entropy(32)
        )

    # --- in the supervisor ---------------------------------------------------------------------------

    def serve(self, risks: Mapping[str, str], inheritance: Inheritance | None = None) -> None:
        """Run the server until it has ended. Raises as `serve`."""
        if not hasattr(os, "fork"):
            raise ConfigError([f"server.workers = {self._workers}: this needs Linux or macOS; set it to 1"])
        if threading.active_count() > 1:
            log.warning(
                "workers.threads", cure="start threads in a lifespan, not while the program is imported"
            )
        log_risks(risks)
        self._home.ensure()
        import_event_loop()
        with contextlib.closing(self):
            if inheritance is None:
                self.open()
            else:
                self.inherit(inheritance)
            predecessor = None if inheritance is None else inheritance.channel
            if not Supervisor(self, self._workers, predecessor=predecessor).run():
                log.warning("server.forced")
                exit_at_once()
        self._manager.close()

    def open(self) -> None:
        """Take the home folder and bind the sockets. Raises ConfigError."""
        config = self._config
        if self._options.pop("control", True):
            self._control = open_control(self._control_file)
        self._link = open_link(self._link_file)
        if config.store.url == SQLITE:
            wait_unlocked(self._home.sessions)
        elif config.store.url != MEMORY:
            load_keys(self._home.store_key, system_entropy)  # create it once
        if not self._sockets:
            self._sockets = bind_patiently(config.server.host, config.server.port)
        if self._redirect_sockets and not config.http.enabled:
            raise no_redirect()
        if config.http.enabled and config.http.redirect_port and not self._redirect_sockets:
            self._redirect_sockets = bind_patiently(
                config.server.host, config.http.redirect_port, "http.redirect_port"
            )

    def inherit(self, inheritance: Inheritance) -> None:
        """Take what a predecessor has passed in place of `open`."""
        self._options.pop("control", None)
        self._sockets, self._redirect_sockets = inheritance.sockets, inheritance.redirect_sockets
        if inheritance.control is not None:
            self._control, lock = inheritance.control
            self._control_file.adopt(lock)
        self._link, lock = inheritance.link
        self._link_file.adopt(lock)
        self._has_predecessor = True

    def close(self) -> None:
        for each in (*self._sockets, *self._redirect_sockets):
            each.close()
        for listening in (self._control, self._link):
            if listening is not None:
                listening.close()
        self._control_file.close()
        self._link_file.close()

    @property
    def addresses(self) -> list[tuple[str, int]]:
        return [each.getsockname()[:2] for each in self._sockets]

    def coordinator_ready(self, values: dict[str, Any]) -> None:
        self._certificate_names = [str(name) for name in values.get("names", ())]

    def listen(self) -> None:
        listen([*self._sockets, *self._redirect_sockets])

    def serving(self) -> None:
        self._has_predecessor = False
        self._control_file.take_over()
        self._link_file.take_over()
        self._first.ready(self._certificate_names, self.addresses[0][1])
        self._on_listening(self.addresses)
        self._manager.begin(self._status)

    def _status(self) -> str:
        refused = "; the configuration was refused, a restart would fail" if self._is_refused else ""
        return f"{self._ready} of {counted(self._workers, 'worker')}{refused}"

    def process_ended(self, number: int) -> None:
        self._ended[number] += 1
        if number != COORDINATOR:
            self._counts.clear(number - 1)

    def reloading(self, is_begun: bool) -> None:
        if is_begun:
            self._manager.reload_begins()
        else:
            self._manager.reload_ends()

    def config_refused(self, is_refused: bool) -> None:
        self._is_refused = is_refused
        self._manager.tick()

    def reload(self) -> None:
        if self._read_config is not None:
            with contextlib.suppress(ConfigError):  # the file has changed again since the coordinator read it
                new = at_home(self._read_config(), self._home)
                LogChange(self._config.log, new.log).apply()
                self._config = effective(self._config, new)
        reopen_log()

    def drain_limit(self) -> float:
        return self._config.server.drain_timeout

    def stopping(self, limit: float) -> None:
        runs = self.run_limit(limit, is_replaced=False)
        self._manager.stopping(limit + runs + self._config.server.lifespan_timeout)

    def run_limit(self, limit: float, *, is_replaced: bool) -> float:
        return run_limit(self._config, limit, is_replaced=is_replaced)

    def start_successor(self) -> Successor:
        ours, theirs = Channel.pair()
        try:
            assert self._link is not None
            assert self._link_file.lock is not None
            control = self._control_file.lock
            passed = Inheritance(
                theirs,
                self._sockets,
                self._redirect_sockets,
                None if self._control is None or control is None else (self._control, control),
                (self._link, self._link_file.lock),
            )
            environment = {**os.environ, **self._manager.environment(), UPGRADE: passed.encode()}
            command = [sys.executable, *sys.orig_argv[1:]]
            return Successor(command, environment, passed.descriptors(), ours, theirs)
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()

    def upgrade_limit(self) -> float:
        return self._config.server.upgrade_timeout

    def left(self, pid: int) -> None:
        self._manager.notify(MAINPID=pid)
        self._manager.close()
        self._control_file.leave()
        self._link_file.leave()

    def tick(self, ready: int) -> float:
        self._ready = ready
        self._manager.tick()
        return self._manager.interval

    def renew_sockets(self) -> bool:
        control = renewed_socket(self._control_file, CONTROL_BACKLOG)
        link = renewed_socket(self._link_file, LINK_BACKLOG)
        for old in (self._control if control else None, self._link if link else None):
            if old is not None:
                old.close()
        self._control, self._link = control or self._control, link or self._link
        return control is not None or link is not None

    def hang_limit(self) -> float | None:
        limits = (self._manager.watchdog, self._config.server.hang_timeout)
        return min((limit for limit in limits if limit is not None), default=None)

    def start_limit(self) -> float | None:
        limit = self.hang_limit()
        return None if limit is None else self._config.server.lifespan_timeout + max(limit, LEAST_START)

    # --- in the processes ----------------------------------------------------------------------------

    def report(self, ended: Sequence[tuple[str, str]]) -> int:
        """Raise alerts in place of a coordinator, in the child; return its exit code."""
        name_process("reporter")
        self._leave_files()
        for each in (*self._sockets, *self._redirect_sockets, self._control, self._link):
            if each is not None:
                each.close()
        try:
            asyncio.run(_report(self._config, ended))
        finally:
            finish_log()
        return 0

    def _leave_files(self) -> None:
        self._manager.close()
        self._control_file.leave()
        self._link_file.leave()

    def run(self, number: int, channel: Channel, lifeline: int) -> int:
        """Run a process until it is ordered to end, or its supervisor ends."""
        member = Member(number, os.getpid(), self._ended[number], self._started_at)
        name_process(member.name)
        self._leave_files()
        threading.Thread(target=_end_with, args=(lifeline,), name="zcproto-lifeline", daemon=True).start()
        if sys.stderr is not None:
            faulthandler.enable()
        try:
            with asyncio.Runner(loop_factory=new_event_loop) as runner:
                runner.run(self._run(member, channel))
        except Exception as error:
            failure = failure_of(error)
            if failure["kind"] == "other":
                log.error("server.fault", what="run", exc_info=error)
            channel.send("failed", **failure)
            return 1
        finally:
            finish_log()
        return 0

    async def _run(self, member: Member, channel: Channel) -> None:
        asyncio.get_running_loop().set_exception_handler(log_loop_fault)
        config, read = self._config, self._read_config
        assert self._link is not None
        own: dict[str, Any]
        if member.number == COORDINATOR:
            own = {"control": self._control or False, "addresses": self.addresses}
            for each in (*self._sockets, *self._redirect_sockets):
                each.close()
            joining = fleet.coordinator(
                member,
                self._workers,
                self._link,
                config,
                self._home,
                has_predecessor=self._has_predecessor,
            )
        else:
            own = {"control": False, "sockets": self._sockets, "redirect_sockets": self._redirect_sockets}
            self._link.close()
            if self._control is not None:
                self._control.close()
            counting = self._counts.worker(member.number - 1)
            joining = fleet.worker(member, config, self._home.workers, counting)
            config = share_of(config, self._workers)
            if read is not None:
                read = partial(_read_share, read, self._workers)
        async with joining as part:
            server = self._make(
                config=config,
                home=self._home.path,
                read_config=read,
                role=part.role,
                progress=self._first.progress,
                **self._options,
                **own,
            )
            server.owns_log = True
            server.on_config = raise_limit_for
            orders = Orders(server, part, channel, self.hang_limit())
            await orders.run(partial(self._started, part))

    def _started(self, part: Membership, server: Server) -> None:
        if part.client is not None:
            self._on_worker_ready(server)
        else:
            self._first.end()
            part.serve_parts(server.parts)


async def _report(config: Config, ended: Sequence[tuple[str, str]]) -> None:
    alerts = await build_alerts(config, system_clock, system_entropy)
    alerts.start()
    for name, reason in ended:
        on_process_ended(alerts, name, reason)
    await alerts.stop(REPORTED_WITHIN)


def _read_share(read: ReadConfig, workers: int) -> Config:
    return share_of(read(), workers)


def open_link(file: SocketFile) -> socket.socket:
    """Return the listening socket for the workers. Raises ConfigError."""
    try:
        listening = file.open(LINK_BACKLOG)
    except OSError as error:
        raise ConfigError(
            [f"{file.path}: cannot be created: {error.strerror}; workers need it, or set server.workers = 1"]
        ) from error
    if listening is None:
        raise ConfigError([f"{file.path}: a server with workers runs with this home folder; stop it"])
    return listening


def _end_with(lifeline: int) -> None:
    """End this process some time after its supervisor, even if its loop hangs."""
    os.read(lifeline, 1)  # nothing is ever written to it
    time.sleep(ORPHAN_LIMIT)
    os._exit(1)


class Orders:
    """Carries out the orders of the supervisor in a process."""

    def __init__(self, server: Server, part: Membership, channel: Channel, hang_limit: float | None) -> None:
        self._server = server
        self._part = part
        self._channel = channel
        self._hang_limit = hang_limit
        self._go, self._stop, self._applied = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._limit: float | None = None
        self._runs = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        server.before_listening = self._before_listening
        server.on_drain = self._drain
        server.on_connections_drained = lambda: channel.send("drained")
        if part.server is not None:
            server.on_reload_requested = self._reload_everywhere
            server.on_log_level = part.share_log_level
            server.on_certificates = part.certificates_changed
            server.on_drain_requested = lambda limit: channel.send("drain", limit=limit)
            server.on_upgrade_requested = lambda: channel.send("upgrade")

    async def run(self, ready: Callable[[Server], None]) -> None:
        """Start the server, and drain it when the supervisor orders it. Raises what `Server.start` raises."""
        server, loop = self._server, asyncio.get_running_loop()
        loop.add_reader(self._channel.fileno(), self._read)
        if self._part.server is not None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it serves the workers until they have ended
        else:
            loop.add_signal_handler(signal.SIGTERM, self._stop.set)
        if self._hang_limit is not None:
            self._beat(loop, self._hang_limit / BEATS)
        starting, stopping = loop.create_task(server.start()), loop.create_task(self._stop.wait())
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            await asyncio.wait({starting})
            if self._part.server is not None:
                log.info("server.start_stopped")
            exit_at_once(0)  # a thread that generates a key would delay the end
        starting.result()
        tune_interpreter()
        if self._part.client is not None:
            self._part.topics.notices[fleet.CERTIFICATES] = self._check_certificates
            self._part.client.on_up.append(self._check_certificates)
        ready(server)
        await stopping
        await server.drain(self._limit, self._runs)
        if server.state.tasks.running or server.parts.lifespans.is_stuck:
            exit_at_once()

    async def _before_listening(self, names: Sequence[str]) -> None:
        self._channel.send("ready", names=names[:MAX_NAMES])
        await self._go.wait()

    def _beat(self, loop: asyncio.AbstractEventLoop, interval: float) -> None:
        loop.call_later(interval, self._beat, loop, interval)
        self._channel.send("beat")

    def _read(self) -> None:
        messages = self._channel.receive()
        if messages is None:  # the supervisor has ended
            asyncio.get_running_loop().remove_reader(self._channel.fileno())
            self._drain(0.0)
            return
        for name, values in messages:
            if name == "go":
                self._go.set()
            elif name == "leave":
                self._server.leave()
            elif name == "drain":
                self._runs = values.get("runs", 0.0)
                self._drain(values.get("limit"))
            elif name == "reload":
                self._begin(self._reload())
            elif name == "ended":
                assert self._part.role.alerts is not None
                on_process_ended(self._part.role.alerts, str(values["worker"]), str(values["reason"]))
            elif name == "upgrade_failed":
                self._server.upgrade_failure = str(values.get("reason"))
            elif name == "applied":
                self._applied.set()

    def _drain(self, limit: float | None) -> None:
        self._part.announce_end()
        self._limit = limit
        self._stop.set()

    def _check_certificates(self, link: Link) -> None:
        self._begin(self._server.parts.certificates.check())

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _reload(self) -> None:
        applied = True
        if self._server.can_reload:
            try:
                await self._server.reload_here()
            except ConfigError:  # logged by the reload
                applied = False
        reopen_log()
        self._channel.send("reloaded", applied=applied)

    async def _reload_everywhere(self, has_applied: bool) -> None:
        """Let the workers apply what the coordinator has applied, and wait for them."""
        self._applied.clear()
        self._channel.send("reloaded", applied=has_applied)
        if not has_applied:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(APPLIED_LIMIT):
                await self._applied.wait()


# --- the start of a server whose predecessor was killed --------------------------------------------------------
# A service manager starts a server at once when its supervisor was killed. The other processes of the old one hold
# the port and the sessions for up to ORPHAN_LIMIT.


class Patience:
    """Pauses between attempts, for PATIENCE seconds in all. `sleep` waits so many seconds."""

    def __init__(self, clock: Clock = system_clock, sleep: Callable[[float], object] = time.sleep) -> None:
        self._now = clock.now
        self._sleep = sleep
        self._until: float | None = None

    def pause(self, what: str) -> bool:
        """Wait until the next attempt. Return False if there is to be none. `what` is in use, for the log."""
        now = self._now()
        if self._until is None:
            self._until = now + PATIENCE
            log.warning("server.start_waits", what=what, seconds=PATIENCE)
        if now >= self._until:
            return False
        self._sleep(PAUSE)
        return True


def bind_patiently(
    hosts: Sequence[str], port: int, key: str = "server.port", patience: Patience | None = None
) -> list[socket.socket]:
    """Bind as `bind`, without listening. Wait for a port that is in use. Raises ConfigError."""
    patience = patience or Patience()
    while True:
        try:
            return bind(hosts, port, key, backlog=0)
        except ConfigError as error:
            in_use = isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EADDRINUSE
            if not in_use or not patience.pause(f"{key} = {port}"):
                raise


def wait_unlocked(path: Path, patience: Patience | None = None) -> None:
    """Wait until no process holds the lock beside `path`. Who takes it next reports if one still does."""
    patience = patience or Patience()
    lock = path.with_name(path.name + ".lock")
    while is_locked(lock) and patience.pause(str(path)):
        pass
