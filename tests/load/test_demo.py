"""The demonstration, and that it leaves nothing however it ends."""

from __future__ import annotations

import io
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.limits import TIMEOUT
from tests.load.conftest import StandardInput
from tests.load.helpers import plan, verified_result
from tests.server.helpers import eventually
from zcproto.errors import ConfigError, ZcprotoError
from zcproto.load import demo as module
from zcproto.load import demo_child as child
from zcproto.load.demo import Demo, DemoServer, run_demo, temporary_home
from zcproto.load.plan import Plan
from zcproto.load.processes import module_command, module_environment, uninterrupted
from zcproto.load.record import RequestKind, Tally
from zcproto.load.result import Result, Verdict

QUICK = Demo(connections=20, rate=400.0, seconds=0.2)


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder in which temporary folders are created."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder


def test_demo_prints_its_report_and_leaves_nothing(
    temporary: Path, tmp_path: Path, children: Callable[[], list[int]]
) -> None:
    out = io.StringIO()
    path = tmp_path / "demo.json"
    result = run_demo(Demo(20, 400.0, 0.2, json=path), out)
    assert result.verdict is Verdict.VERIFIED
    first, *_, last = out.getvalue().splitlines()
    assert first.startswith("zcproto demo: creates users and certificates in a temporary folder")
    assert "20 TLS 1.3 connections" in first
    assert last.startswith("Proven: 20 TLS 1.3 connections were open at once on one server process")
    assert "all 100 answers were correct" in last
    written = json.loads(path.read_text())
    assert written["verified_connections"] == 20
    assert written["figures"]["memory_per_connection_kib"]["bar"] == 38.0
    assert written["figures"]["memory_per_connection_kib"]["value"] > 0
    assert [*temporary.iterdir()] == []
    assert children() == []


@pytest.mark.parametrize(
    ("capacity", "rates"), [((2_000.0, 40_000.0), (450.0, 5_000.0)), ((100.0, 800.0), (50.0, 400.0))]
)
def test_rates_fit_the_machine(
    monkeypatch: pytest.MonkeyPatch, capacity: tuple[float, float], rates: tuple[float, float]
) -> None:
    trials: list[Plan] = []

    def measure(trial: Plan, out: io.StringIO, *, keeps_part: bool) -> Result:
        trials.append(trial)
        result = verified_result(plan=trial, connected=trial.connections)
        result.record.tallies[RequestKind.LAST] = Tally(*[trial.connections] * 3)
        result.connect_s = trial.connections / capacity[0]
        result.load_s = result.record.tallies[RequestKind.LOAD].equal / capacity[1]
        monkeypatch.setattr(Result, "reasons", lambda self: [])
        return result

    monkeypatch.setattr(module, "measure", measure)
    out = io.StringIO()
    whole = plan(connections=2_000, sessions=2_000, arrival_rate=450.0, rate=5_000.0)
    fitting = module.fit(whole, out)
    assert (fitting.arrival_rate, fitting.rate) == pytest.approx(rates)
    assert fitting == replace(whole, arrival_rate=fitting.arrival_rate, rate=fitting.rate)
    assert trials[0].connections == trials[0].sessions == 20
    assert "this machine opens" in out.getvalue()


def test_rates_stay_if_the_machine_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    few = plan(connections=1_000)
    assert module.fit(few, out) is few
    monkeypatch.setattr(module, "measure", lambda *_, **options: verified_result(interrupted=True))
    many = plan(connections=2_000)
    assert module.fit(many, out) is many
    assert out.getvalue() == ""


def test_impossible_demo_is_refused_first(
    monkeypatch: pytest.MonkeyPatch, temporary: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1_024, 4_096))
    out = io.StringIO()
    for demo, fault in (
        (Demo(20, 400.0, 0.2, json=tmp_path / "no" / "demo.json"), "cannot be written"),
        (Demo(10_000, 5_000.0, 6.0), "--connections 3776"),
    ):
        with pytest.raises(ConfigError, match=fault):
            run_demo(demo, out)
    assert out.getvalue() == ""
    assert [*temporary.iterdir()] == []


def test_failed_demo_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, temporary: Path, children: Callable[[], list[int]]
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        assert len(children()) == 1
        raise ZcprotoError("midway")

    monkeypatch.setattr(module, "run_and_report", fail)
    with pytest.raises(ZcprotoError, match="midway"):
        run_demo(QUICK, io.StringIO())
    assert [*temporary.iterdir()] == []
    assert children() == []


def test_ctrl_c_during_key_generation_leaves_nothing(
    temporary: Path, children: Callable[[], list[int]]
) -> None:
    def interrupt() -> None:
        eventually(children)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    output = io.StringIO()
    with pytest.raises(KeyboardInterrupt):
        run_demo(QUICK, output)
    assert "Interrupted, so nothing is proven. The server is stopped" in output.getvalue()
    assert [*temporary.iterdir()] == []
    assert children() == []


def demo_process(*options: str) -> subprocess.Popen[bytes]:
    arguments = [sys.executable, "-m", "zcproto", "demo", "--connections", "20", *options]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, env=module_environment())


def loading_demo() -> subprocess.Popen[bytes]:
    """Start a demo that takes long, and return it when the load has begun."""
    process = demo_process("--seconds", "60", "--rate", "100")
    assert process.stdout is not None
    output = b""
    while b"loading" not in output:
        line = process.stdout.readline()
        assert line, output
        output += line
    return process


def test_killed_demo_leaves_no_process_and_no_folder(temporary: Path) -> None:
    process = loading_demo()
    assert process.stdout is not None
    pids = descendants(process.pid)
    assert len(pids) == 2  # the server and a generator
    process.kill()
    process.wait()
    process.stdout.close()
    eventually(lambda: not any(Path(f"/proc/{pid}/cmdline").exists() for pid in pids))
    eventually(lambda: not [*temporary.iterdir()])


def test_ctrl_c_under_load_prints_one_line_and_leaves_nothing(temporary: Path) -> None:
    process = loading_demo()
    pids = descendants(process.pid)
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 130
    (line,) = filter(None, rest.splitlines())
    assert line.startswith(b"Interrupted, so nothing is proven. The server is stopped")
    assert not any(Path(f"/proc/{pid}/cmdline").exists() for pid in pids)
    assert [*temporary.iterdir()] == []


def descendants(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(each) for each in (task / "children").read_text().split()]
    return found


# --- the server's process -----------------------------------------------------------------------------------


def test_failed_server_start_quotes_its_last_lines() -> None:
    with temporary_home() as home:
        home.config.write_text("[server]\nprot = 1\n")
        with pytest.raises(ZcprotoError, match=r"did not start: .*server\.prot"), DemoServer(home.path):
            pass


def program(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    """Run another program instead of the server."""
    monkeypatch.setattr(module, "module_command", lambda module, *arguments: [sys.executable, "-c", source])


@pytest.mark.parametrize(
    ("source", "phrase"),
    [
        ("", "did not start: it printed no error"),
        ("print('hello')", "printed 'hello' instead of its address"),
        ("import time; time.sleep(60)", "was not ready within 0 s"),
    ],
)
def test_other_program_is_not_accepted_as_server(
    source: str, phrase: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program(monkeypatch, source)
    if "sleep" in source:
        monkeypatch.setattr(module, "START_TIMEOUT", 0.1)
    with pytest.raises(ZcprotoError, match=phrase), DemoServer(tmp_path):
        pass


def test_server_that_ignores_sigterm_is_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program(
        monkeypatch,
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "print('zcproto: listening on 127.0.0.1:4711', flush=True); time.sleep(60)",
    )
    monkeypatch.setattr(module, "END_TIMEOUT", 0.1)
    with DemoServer(tmp_path) as running:
        assert running.port == 4711
        pid = running.pid
    assert not Path(f"/proc/{pid}").exists()


def test_module_is_found_from_any_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "__init__.py").write_text("raise SystemExit('the wrong module')")
    for path, end in ((None, ""), ("/somewhere", os.pathsep + "/somewhere")):
        monkeypatch.delenv("PYTHONPATH", raising=False)
        if path is not None:
            monkeypatch.setenv("PYTHONPATH", path)
        environment = module_environment()
        assert environment["PYTHONPATH"].partition(os.pathsep)[1:] == (end[:1], end[1:])
        command = module_command("zcproto.load.processes", "x")
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=True)
        assert (done.stdout, done.stderr) == (b"", b"")


def test_conclusion_states_what_was_proven() -> None:
    assert module.conclusion(verified_result(), 33.4).endswith(
        "counts of both sides agree. The server is stopped and its folder deleted; total time 33 s."
    )
    unproven = module.conclusion(Result(plan()), 5.0)
    assert unproven.startswith("Not proven: 10 of 10 connections not verified; ")


def test_uninterrupted_delays_ctrl_c() -> None:
    done: list[str] = []
    before = signal.getsignal(signal.SIGINT)

    def work() -> None:
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("all of it")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["all of it"]
    assert signal.getsignal(signal.SIGINT) is before
    with uninterrupted():
        pass


# --- the child, from inside -----------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


def test_child_serves_its_folder_and_keeps_it(
    stdin: StandardInput, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    started: list[list[str]] = []
    watched: list[int] = []
    monkeypatch.setattr(child, "zcproto", lambda arguments: started.append(arguments) or 0)
    monkeypatch.setattr(child, "end_with_parent", lambda watching, *_: watched.append(watching))
    assert child.main(str(home), "--port", "0") == 0
    assert started == [["--home", str(home), "serve", "--port", "0"]]
    assert watched == [stdin.file.fileno()]
    assert home.exists()


def test_orphaned_child_ends_and_deletes_its_folder(
    stdin: StandardInput, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    def serve(arguments: list[str]) -> int:
        stdin.send("input is ignored")
        stdin.close()
        end = time.monotonic() + TIMEOUT
        while time.monotonic() < end:  # a signal just before `signal.pause` would leave it waiting for ever
            time.sleep(0.01)
        raise AssertionError("SIGTERM did not end it")

    monkeypatch.setattr(child, "zcproto", serve)
    with pytest.raises(SystemExit) as caught:
        child.main(str(home))
    assert caught.value.code == 128 + signal.SIGTERM
    assert not home.exists()


def test_the_module_is_the_program(stdin: StandardInput, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.delitem(sys.modules, "zcproto.load.demo_child")
    monkeypatch.setattr("zcproto.cli.main", len)
    monkeypatch.setattr(sys, "argv", ["child", str(home)])
    threads = {*threading.enumerate()}
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(child.__file__, run_name="__main__")
    assert caught.value.code == 3
    stdin.close()
    for thread in {*threading.enumerate()} - threads:
        thread.join(TIMEOUT)


def test_orphaned_child_that_does_not_drain_exits(
    stdin: StandardInput, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    monkeypatch.setattr(child, "DRAIN_TIMEOUT", 0.0)
    sent: list[tuple[int, int]] = []
    codes: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    monkeypatch.setattr(os, "_exit", codes.append)
    stdin.close()
    orphaned = threading.Event()
    child.end_with_parent(stdin.file.fileno(), str(home), orphaned, threading.Event())
    assert sent == [(os.getpid(), signal.SIGTERM)]
    assert codes == [1]
    assert orphaned.is_set()
    assert not home.exists()


def test_parent_that_ends_after_its_child_changes_nothing(
    stdin: StandardInput, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    monkeypatch.setattr(os, "kill", None)
    stdin.close()
    orphaned, ended = threading.Event(), threading.Event()
    ended.set()
    child.end_with_parent(stdin.file.fileno(), str(home), orphaned, ended)
    assert not orphaned.is_set()
    assert home.exists()
