"""A server of several processes, as users start it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import pytest

from tests.helpers import until, whole_lines
from tests.limits import TIMEOUT
from tests.server.helpers import ROOT, AnsweredError, Client, configuration, eventually
from tests.server.process import ServerProcess, home_with
from zcproto import connect
from zcproto.auth import UserFile
from zcproto.client import Client as UserClient
from zcproto.config import Config
from zcproto.errors import Code, ConfigError
from zcproto.runtime import process_setup
from zcproto.runtime.build import WorkerRole
from zcproto.runtime.process_setup import usable_cores, worker_count
from zcproto.runtime.server import Server
from zcproto.runtime.service_manager import ServiceManager
from zcproto.workers import fleet
from zcproto.workers.link import Topics
from zcproto.workers.processes import ForkedService

if TYPE_CHECKING:
    from zcproto.stores.sync import StoreSync
    from zcproto.workers.link import LinkServer

CONFIG = """
[certificates]
key_types = ["ecdsa-p256"]

[server]
drain_timeout = "1h"
hang_timeout = "1h"
"""


@pytest.fixture
def server(home: Path, certs: Path) -> Iterator[ServerProcess]:
    with ServerProcess(home, certs, "--workers", "2") as server:
        yield server


def pids(server: ServerProcess) -> dict[str, int]:
    """Return the last process of each name."""
    return {line["worker"]: line["pid"] for line in server.events("worker.ready")}


def test_processes_serve_and_drain_on_one_signal(server: ServerProcess, key: str) -> None:
    assert set(pids(server)) == {"coordinator", "1", "2"}
    with server.client("ada", key) as client:
        assert client.call("echo", {"text": "a"}) == {"text": "a"}
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    assert {line["worker"] for line in server.events("server.ended")} == {"coordinator", "1", "2"}
    opened = server.events("session.opened")
    assert [line["worker"] for line in opened] in (["1"], ["2"])
    assert not (server.home / "control.sock").exists()


PLACE = """
import asyncio
import os

from zcproto.app.app import App
from zcproto.app.context import Context

app = App()

@app.method("pid")
def pid():
    return os.getpid()

@app.method("send.events")
async def send_events(context: Context):
    while context.send_event("tick", 1):
        await asyncio.sleep(0.001)
    return "not sent"
"""


@pytest.fixture
def placed(home: Path, certs: Path, key: str) -> Iterator[ServerProcess]:
    """A server with a user, and a method that returns which worker answers."""
    (home / "placed.py").write_text(PLACE)
    with ServerProcess(home, certs, "--workers", "2", app="placed:app") as server:
        yield server


class SharedServer(NamedTuple):
    """The `placed` server of several tests: they end no more than single processes."""

    server: ServerProcess
    key: str


def since(server: ServerProcess) -> Callable[..., list[dict[str, Any]]]:
    """Return a function that returns the events logged from now on, as `ServerProcess.events` does."""
    before = len(whole_lines(server.log))
    return lambda *names: [line for line in whole_lines(server.log)[before:] if line["event"] in names]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, certs: Path) -> Iterator[SharedServer]:
    home = home_with(tmp_path_factory.mktemp("shared"), certs, CONFIG)
    key = UserFile(home / "users.toml").add("ada")
    (home / "placed.py").write_text(PLACE)
    with ServerProcess(home, certs, "--workers", "2", app="placed:app") as server:
        yield SharedServer(server, key)


def one_in_each(server: ServerProcess, key: str, stack: contextlib.ExitStack) -> dict[int, Client]:
    """Connect until each worker has a client with the session of the first one. Return them by pid."""
    clients: dict[int, Client] = {}
    token = None
    while len(clients) < 2:
        client = stack.enter_context(server.client(*(("ada", key) if token is None else ())))
        client.token = token = token or client.token
        clients.setdefault(client.call("pid"), client)
    return clients


def test_killed_worker_loses_its_own_connections_alone_and_raises_an_alert(shared: SharedServer) -> None:
    placed, key = shared
    new = since(placed)
    before = pids(placed)
    with contextlib.ExitStack() as stack:
        clients = one_in_each(placed, key, stack)
        os.kill(before["1"], signal.SIGKILL)
        eventually(lambda: pids(placed)["1"] != before["1"])
        assert clients[before["2"]].call("pid") == before["2"]
        assert not clients[before["1"]].is_open()
    assert pids(placed)["2"] == before["2"]
    (line,) = new("worker.ended")
    assert (line["worker"], line["reason"], line["retry_after_s"]) == ("1", "SIGKILL", 0.0)
    eventually(lambda: ("worker.ended", "worker 1") in alerts(placed))


def alerts(server: ServerProcess) -> set[tuple[str, str]]:
    return {(line["kind"], line["about"]) for line in server.events("alert.began")}


def test_refresh_in_one_worker_suspends_the_session_in_another_which_lists_it(shared: SharedServer) -> None:
    with contextlib.ExitStack() as stack:
        clients = one_in_each(*shared, stack)
        owner = next(client for client in clients.values() if client.opened)
        (other,) = (client for client in clients.values() if client is not owner)
        other.send(other.request("send.events"))
        other.event()
        for client in (owner, other):
            listed = client.call("session.list", stream=9_999)[-1]  # of other tests come before
            assert len(listed["connections"]) >= 2
            assert {each["address"] for each in listed["connections"]} == {"127.0.0.1"}
        params = {"refresh_token": owner.opened["refresh_token"]}
        owner.token = owner.call("session.refresh", params, token=bytes(32))["token"]
        assert other.answer().value == "not sent"
        assert other.refused("pid").code == Code.TOKEN_REVOKED


def test_session_of_one_worker_is_one_of_all_and_outlives_the_coordinator(shared: SharedServer) -> None:
    placed, key = shared
    with contextlib.ExitStack() as stack:
        clients = one_in_each(placed, key, stack)
        assert set(clients) == {pids(placed)["1"], pids(placed)["2"]}
        before = pids(placed)["coordinator"]
        os.kill(before, signal.SIGKILL)
        eventually(lambda: pids(placed)["coordinator"] != before)
        for pid, client in clients.items():
            assert client.call("pid") == pid
            eventually(partial(can_log_in, client, key))
    eventually(lambda: ("worker.ended", "coordinator") in alerts(placed))


def can_log_in(client: Client, key: str) -> bool:
    """Return whether a login succeeds. A worker reaches the next coordinator soon after that is ready."""
    try:
        client.open_session("ada", key)
    except AnsweredError:
        return False
    return True


def test_session_outlives_a_restart(home: Path, certs: Path, key: str) -> None:
    with ServerProcess(home, certs, "--workers", "2") as server, server.client("ada", key) as client:
        token = client.token
    with ServerProcess(home, certs, "--workers", "2") as server, server.client() as client:
        client.token = token
        assert client.call("echo", {"text": "a"}) == {"text": "a"}


def test_session_in_memory_ends_with_the_server(home: Path, certs: Path, key: str) -> None:
    (home / "config.toml").write_text(CONFIG + '[store]\nurl = "memory"\n')
    (home / "placed.py").write_text(PLACE)
    with (
        ServerProcess(home, certs, "--workers", "2", app="placed:app") as server,
        contextlib.ExitStack() as stack,
    ):
        token = next(iter(one_in_each(server, key, stack).values())).token
    with ServerProcess(home, certs, "--workers", "2") as server, server.client() as client:
        client.token = token
        assert client.refused("echo", {"text": "a"}).kind


def test_revocation_is_heard_by_every_worker(shared: SharedServer) -> None:
    with contextlib.ExitStack() as stack:
        clients = one_in_each(*shared, stack)
        one, other = clients.values()
        one.call("session.revoke", {"all": True})
        eventually(lambda: is_refused(other))


def is_refused(client: Client) -> bool:
    try:
        client.call("pid")
    except AnsweredError as error:
        return error.code == Code.TOKEN_REVOKED
    return False


def test_log_level_reaches_every_worker(placed: ServerProcess, key: str) -> None:
    assert zcproto(placed.home, "log", "level", "warning").returncode == 0
    os.kill(pids(placed)["1"], signal.SIGKILL)
    with contextlib.ExitStack() as stack:
        one_in_each(placed, key, stack)
    placed.signal(signal.SIGTERM)
    assert placed.wait() == 0
    assert not placed.events("session.opened")


def zcproto(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "zcproto", "--home", str(home), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False
    )


def test_control_socket_survives_the_coordinator(shared: SharedServer) -> None:
    server, key = shared
    new = since(server)
    with server.client("ada", key) as client:
        os.kill(pids(server)["coordinator"], signal.SIGKILL)
        done = zcproto(server.home, "status")  # waits in the backlog for the next coordinator
        assert done.returncode == 0, done.stderr
        assert client.call("pid") in pids(server).values()
    assert [line["worker"] for line in new("worker.ended")] == ["coordinator"]


def test_killed_supervisor_frees_port_and_home(home: Path, certs: Path, key: str) -> None:
    with ServerProcess(home, certs, "--workers", "2") as server:
        with server.client("ada", key):
            server.process.kill()
            server.process.wait()
        with (
            ServerProcess(home, certs, "--workers", "2", "--port", str(server.port)) as other,
            other.client("ada", key) as client,
        ):
            assert client.call("echo", {"text": "a"}) == {"text": "a"}


HANG = """
import time

from zcproto.app.app import App

app = App()

@app.method("hang")
async def hang():
    time.sleep(900)
"""


def test_hung_worker_of_a_killed_supervisor_does_not_keep_the_port(home: Path, certs: Path, key: str) -> None:
    (home / "hanging.py").write_text(HANG)
    with ServerProcess(home, certs, "--workers", "2", app="hanging:app") as server:
        old = pids(server)
        client = server.client("ada", key)
        client.send(client.request("hang"))
        server.process.kill()
        server.process.wait()
        with (
            ServerProcess(home, certs, "--workers", "2", "--port", str(server.port)) as other,
            other.client("ada", key) as again,
        ):
            assert again.call("echo", {"text": "a"}) == {"text": "a"}
        eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in old.values()))
        client.tls.close()


def test_hung_worker_is_replaced_without_a_service_manager(home: Path, certs: Path, key: str) -> None:
    (home / "hanging.py").write_text(HANG)
    (home / "config.toml").write_text(CONFIG.replace('hang_timeout = "1h"', 'hang_timeout = "3s"'))
    with ServerProcess(home, certs, "--workers", "2", app="hanging:app") as server:
        # On a busy machine a process may count as hung before it is asked. It ends then, during a login, too.
        while "in hang" not in server.log:  # the stack
            ended = len(server.events("worker.ended"))
            with contextlib.suppress(OSError, EOFError):
                client = server.client("ada", key)
                with contextlib.closing(client.tls):
                    client.send(client.request("hang"))
                    eventually(lambda ended=ended: len(server.events("worker.ended")) > ended)
        assert server.events("worker.hangs")
        eventually(lambda: len(server.events("worker.ready")) > 3)
        assert "SIGABRT" in {line["reason"] for line in server.events("worker.ended")}
        server.client("ada", key).close()


@pytest.mark.parametrize(
    ("watchdog", "hang_timeout", "limit"),
    [(None, 30.0, 30.0), (10.0, 30.0, 10.0), (60.0, 30.0, 30.0), (10.0, None, 10.0), (None, None, None)],
)
def test_shorter_limit_of_hung_processes_applies(
    watchdog: float | None, hang_timeout: float | None, limit: float | None
) -> None:
    config = Config.model_validate({"server": {"hang_timeout": hang_timeout}})
    service = SimpleNamespace(_manager=ServiceManager(watchdog=watchdog), _config=config)
    assert ForkedService.hang_limit(cast("ForkedService", service)) == limit


@pytest.mark.parametrize(("hang_limit", "limit"), [(4.0, 42.0), (40.0, 52.0), (None, None)])
def test_limit_of_a_start_leaves_time_for_the_lifespan(hang_limit: float | None, limit: float | None) -> None:
    config = Config.model_validate({"server": {"lifespan_timeout": 12.0}})
    service = SimpleNamespace(hang_limit=lambda: hang_limit, _config=config)
    assert ForkedService.start_limit(cast("ForkedService", service)) == limit


HANGING_START = """
import os
from contextlib import suppress

from zcproto.app.app import App
from zcproto.workers import supervisor

supervisor.REPORT_AFTER = 0.1
app = App()


@app.method("pid")
def pid():
    return os.getpid()


def hang_once():
    with suppress(FileNotFoundError):
        os.rename("hang", "hangs")
        with open("hangs") as pipe:
            pipe.read()


os.register_at_fork(after_in_child=hang_once)
"""


def test_alert_is_sent_although_the_coordinator_hangs_at_its_start(home: Path, certs: Path) -> None:
    (home / "hanging.py").write_text(HANGING_START)
    command = f'["/bin/sh", "-c", "cat >> {home}/alerts"]'
    (home / "config.toml").write_text(f"{CONFIG}\n[alerts]\ncommand = {command}\n")
    with ServerProcess(home, certs, "--workers", "2", app="hanging:app") as server:
        first = pids(server)["coordinator"]
        os.mkfifo(home / "hang")
        os.kill(first, signal.SIGKILL)
        eventually(
            lambda: "worker.ended" in (home / "alerts").read_text() if (home / "alerts").exists() else ""
        )
        assert pids(server)["coordinator"] == first, "no other one is ready"
        (began,) = server.events("alert.began")
        assert (began["kind"], began["about"], began["worker"]) == ("worker.ended", "coordinator", "reporter")
        with open(home / "hangs", "w"):
            pass
        eventually(lambda: pids(server)["coordinator"] != first)


def test_removed_sockets_are_made_again(shared: SharedServer) -> None:
    server, key = shared
    new = since(server)
    before = pids(server)
    for name in ("control.sock", "workers.sock"):
        (server.home / name).unlink()
    eventually(lambda: pids(server)["coordinator"] != before["coordinator"])
    assert zcproto(server.home, "status").returncode == 0
    os.kill(before["1"], signal.SIGKILL)
    eventually(lambda: pids(server)["1"] != before["1"])
    with server.client("ada", key) as client:
        assert client.call("pid") in pids(server).values()
    assert [line["worker"] for line in new("worker.ended")] == ["1"]
    assert len(new("server.socket_renewed")) == 2


async def test_coordinator_takes_over_the_revocations_of_a_worker_that_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fleet, "LEFT_AFTER_S", 0.0)
    server, taken = SimpleNamespace(on_lost=[]), asyncio.Event()
    part = fleet.Membership(WorkerRole(), Topics(), server=cast("LinkServer", server))
    part.take_left_revocations(cast("StoreSync", SimpleNamespace(take_left=taken.set)))
    assert not taken.is_set()
    for _ in range(2):  # of both links of a worker
        for on_lost in server.on_lost:
            on_lost(None)
    await taken.wait()
    taken.clear()
    for on_lost in server.on_lost:
        on_lost(None)
    await taken.wait()


FAIL_LATER = "asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, asyncio.current_task().cancel)"


def test_lifespan_that_fails_later_ends_its_worker_alone(home: Path, certs: Path) -> None:
    (home / "failing.py").write_text(FAILING.format(body=FAIL_LATER))
    with ServerProcess(home, certs, "--workers", "2", app="failing:app") as server:
        os.kill(pids(server)["1"], signal.SIGUSR1)
        eventually(lambda: len(server.events("worker.ready")) == 4)
        (line,) = server.events("worker.ended")
        assert line["worker"] == "1"
        assert line["reason"].startswith("the lifespan of the application ended early")


def test_sigterm_drains_one_worker_which_is_replaced(shared: SharedServer) -> None:
    new, before = since(shared.server), pids(shared.server)
    os.kill(before["2"], signal.SIGTERM)
    eventually(lambda: pids(shared.server)["2"] != before["2"])
    assert [line["worker"] for line in new("server.ended")] == ["2"]


def test_hangup_reloads_every_process_and_names_what_an_option_hides(server: ServerProcess) -> None:
    config = server.home / "config.toml"
    config.write_text(CONFIG + "workers = 3\n[limits]\nmax_connections = 400\n")
    server.signal(signal.SIGHUP)
    eventually(lambda: len(server.events("config.reloaded")) == 3)
    assert {tuple(line["changed"]) for line in server.events("config.reloaded")} == {
        ("limits.max_connections",)
    }
    assert {tuple(line["restart"]) for line in server.events("config.overridden")} == {("server.workers",)}
    os.kill(pids(server)["1"], signal.SIGKILL)
    config.write_text("not TOML")
    server.signal(signal.SIGHUP)
    eventually(lambda: server.events("config.refused"))
    assert [line["worker"] for line in server.events("config.refused")] == ["coordinator"]
    eventually(lambda: len(server.events("worker.ready")) == 4)  # with the configuration before


def test_drain_and_reload_by_the_control_socket_reach_every_process(server: ServerProcess) -> None:
    for command in ("reload", "drain"):
        done = zcproto(server.home, command)
        assert done.returncode == 0, done.stderr
    assert server.wait() == 0
    assert len(server.events("config.reloaded")) == 3
    assert len(server.events("server.ended")) == 3


FAILING = """
import asyncio
import signal
from contextlib import asynccontextmanager

from zcproto.app.app import App

@asynccontextmanager
async def lifespan(app):
    {body}
    yield None

app = App(lifespan=lifespan)
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_failed_lifespan_is_reported_once_and_nothing_listens(home: Path, workers: int) -> None:
    (home / "failing.py").write_text(FAILING.format(body="raise KeyError('database')"))
    done = run_to_end(home, "--workers", str(workers), "failing:app")
    assert done.returncode == 1
    assert re.findall(r"^zcproto: .*", done.stderr, re.MULTILINE) == [
        "zcproto: the lifespan of the application did not start: it raised KeyError; the log has the traceback"
        " under lifespan.failed"
    ]
    assert done.stdout == ""
    assert "server.listening" not in done.stderr


def test_port_in_use_is_reported_as_by_one_process(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run_to_end(home, "--workers", "2", "--port", str(port))
    assert done.returncode == 2
    assert "cannot listen: Address already in use" in done.stderr
    assert "worker." not in done.stderr


def run_to_end(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "zcproto", "--home", str(home), "serve", "--port", "0", *arguments]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=home,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=TIMEOUT,
        check=False,
    )


# --- in a program ------------------------------------------------------------------------------------------------


async def test_server_in_a_program_refuses_workers(home: Path) -> None:
    server = Server(config=configuration(home, server__workers=2), home=home)
    with pytest.raises(ConfigError, match="a Server in a program is one process"):
        await server.start()


PROGRAM = """
import os
import zcproto
{before}
zcproto.serve(zcproto.App(), ready=lambda server: os.write(1, b"ready %d\\n" % server.port))
"""


@contextlib.contextmanager
def run_program(home: Path, before: str = "") -> Iterator[subprocess.Popen[str]]:
    environ = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "ZCPROTO_HOME": str(home),
        "ZCPROTO_SERVER__WORKERS": "2",
        "ZCPROTO_SERVER__PORT": "0",
    }
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(before=before)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environ,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_program_may_have_workers(home: Path) -> None:
    with run_program(home) as process:
        assert process.stdout is not None
        ready = [process.stdout.readline(), process.stdout.readline()]
        process.terminate()
        process.communicate(timeout=TIMEOUT)
    assert ready[0].startswith("ready ")
    assert ready[0] == ready[1]
    assert process.returncode == 0


def test_system_without_fork_is_refused(home: Path) -> None:
    with run_program(home, before="del os.fork") as process:
        _, errors = process.communicate(timeout=TIMEOUT)
    assert "server.workers = 2: this needs Linux or macOS; set it to 1" in errors


def test_threads_of_an_import_are_reported(home: Path) -> None:
    before = "import threading, time; threading.Thread(target=time.sleep, args=[60], daemon=True).start()"
    with run_program(home, before) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.terminate()
        _, errors = process.communicate(timeout=TIMEOUT)
    assert '"event":"workers.threads"' in errors


# --- how many ----------------------------------------------------------------------------------------------------


def test_workers_are_counted_by_the_configuration(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_setup, "usable_cores", lambda: 7)
    assert worker_count(configuration(home)) == 1
    assert worker_count(configuration(home, server__workers=3)) == 3
    assert worker_count(configuration(home, server__workers="auto")) == 7


@pytest.mark.parametrize(
    ("limit", "cores"),
    [
        (None, 16),
        ("max 100000", 16),
        ("200000 100000", 2),
        ("50000 100000", 1),
        ("9900000 100000", 16),
        ("x", 16),
    ],
)
def test_cores_are_those_that_a_container_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str | None, cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    path = tmp_path / "cpu.max"
    if limit is not None:
        path.write_text(limit)
    assert usable_cores(path) == cores


TOPICS = """
import os

from zcproto import App

app = App()
news = app.topic("news", scope="server")
own = app.topic("own")


@app.method("say")
def say(event: int) -> int:
    news.publish(event)
    return os.getpid()
"""


async def user_in_each(
    server: ServerProcess, key: str, stack: contextlib.AsyncExitStack, method: str, **params: Any
) -> dict[int, UserClient]:
    """Connect until each worker has a client. Return them by the pid that `method` returns."""
    clients: dict[int, UserClient] = {}
    while len(clients) < 2:
        connecting = connect(
            f"localhost:{server.port}",
            user="ada",
            key=key,
            ca_file=server.home / "certs" / "ca.crt",
            connect_timeout=TIMEOUT,
        )
        each = await stack.enter_async_context(connecting)
        if clients.setdefault(await each.call(method, **params), each) is not each:
            await each.close()  # its session is free again, of the few that a user has
    return clients


async def test_events_reach_subscribers_in_all_workers_and_after_the_coordinator_was_killed(
    home: Path, certs: Path, key: str
) -> None:
    (home / "topical.py").write_text(TOPICS)
    with ServerProcess(home, certs, "--workers", "2", app="topical:app") as server:
        async with contextlib.AsyncExitStack() as stack:
            first, second = (await user_in_each(server, key, stack, "say", event=0)).values()
            heard: list[int] = []

            async def listen(reader: UserClient) -> None:
                async for event in reader.stream("news"):
                    heard.append(event)

            tasks = [asyncio.create_task(listen(each)) for each in (first, second)]

            async def say_until_both_hear(event: int) -> None:
                while heard.count(event) < 2:
                    heard[:] = [each for each in heard if each != event]
                    await first.call("say", event=event)
                    await asyncio.sleep(0.05)

            await say_until_both_hear(1)
            published = zcproto(home, "topic", "publish", "news", "2")
            assert published.returncode == 0, published.stderr
            await until(lambda: heard.count(2) == 2)
            refused = zcproto(home, "topic", "publish", "own", "2")
            assert "belongs to each worker" in refused.stderr
            os.kill(pids(server)["coordinator"], signal.SIGKILL)
            await say_until_both_hear(3)
            for task in tasks:
                task.cancel()


CALLS = """
import asyncio
import os

from zcproto import App, Context
from zcproto.errors import ZcprotoError

app = App()


@app.method("pid")
def pid() -> int:
    return os.getpid()


@app.method("found")
async def found(context: Context) -> int:
    return len(await context.find_clients(user="ada", handles="approve"))


@app.method("ask")
async def ask(context: Context, tool: str, seconds: float = 60.0) -> str:
    try:
        (client,) = await context.find_clients(user="ada", handles="approve")
        return str(await client.call("approve", tool=tool, timeout=seconds))
    except ZcprotoError as error:
        return f"{type(error).__name__}: {error}"
"""


async def test_method_calls_clients_of_other_workers_whatever_is_killed(
    home: Path, certs: Path, key: str
) -> None:
    (home / "calling.py").write_text(CALLS)
    with ServerProcess(home, certs, "--workers", "2", app="calling:app") as server:
        async with contextlib.AsyncExitStack() as stack:
            clients = await user_in_each(server, key, stack, "pid")
            (_, caller), (pid, handling) = clients.items()
            asked, withdrawn, goes_on = list[str](), asyncio.Event(), asyncio.Event()

            async def approve(tool: str) -> str:
                asked.append(tool)
                if tool == "large":
                    return "x" * 500_000
                try:
                    if tool != "ls":
                        await goes_on.wait()
                except asyncio.CancelledError:
                    withdrawn.set()
                    raise
                return f"{tool} is fine"

            await handling.handle("approve", approve)

            async def is_found() -> None:
                while not await caller.call("found"):
                    pass

            await is_found()
            assert await caller.call("ask", tool="ls") == "ls is fine"
            assert await handling.call("ask", tool="ls") == "ls is fine"
            assert len(await caller.call("ask", tool="large")) == 500_000
            late = await caller.call("ask", tool="late", seconds=0.2)
            assert late.endswith("the client has not answered in time")
            await asyncio.wait_for(withdrawn.wait(), TIMEOUT)

            waiting = asyncio.create_task(caller.call("ask", tool="coordinator"))
            await until(lambda: asked[-1] == "coordinator")
            os.kill(pids(server)["coordinator"], signal.SIGKILL)
            goes_on.set()
            assert await waiting == "coordinator is fine"
            goes_on.clear()

            await is_found()
            waiting = asyncio.create_task(caller.call("ask", tool="worker"))
            await until(lambda: asked[-1] == "worker")
            os.kill(pid, signal.SIGKILL)
            assert (await waiting).startswith("ConnectionClosed: the process of the client is lost")
            assert asked == ["ls", "ls", "large", "late", "coordinator", "worker"]
