"""Tests of the protection of a process that holds keys."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from zcproto.runtime import process_setup
from zcproto.runtime.process_setup import deny_tracing, harden

ROOT = Path(__file__).parents[2]

CHILD = """
import json, os, sys
from pathlib import Path
from zcproto.runtime.process_setup import harden
from zcproto.observe.process import resident_bytes
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
found = harden(os.environ)
print(json.dumps({
    "events": list(found),
    "key_log": os.environ.get("SSLKEYLOGFILE"),
    "resident": resident_bytes(),
    "open_files": len(os.listdir("/proc/self/fd")),
    "uid": os.geteuid(),
}), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def environ() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "SSLKEYLOGFILE": "/tmp/keys"}


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_process_memory_is_unreadable_for_the_same_user(environ: dict[str, str]) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environ,
        cwd="/",
        text=True,
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        report = json.loads(child.stdout.readline())
        proc = Path(f"/proc/{child.pid}")
        assert (proc / "mem").stat().st_uid == 0, "tracing it takes root"
        # Its figures stay readable for everyone.
        assert (proc / "statm").stat().st_mode & 0o444 == 0o444
        assert int((proc / "statm").read_text().split()[1]) > 0
        limits = (proc / "limits").read_text()
        child.stdin.close()
    # It can read its own figures.
    assert report["resident"] > 10_000_000
    assert report["open_files"] > 3
    assert report["key_log"] is None
    assert report["uid"] != 0
    assert report["events"] == ["server.key_log_ignored"]
    assert "Max core file size        0 " in limits


def test_sslkeylogfile_is_removed_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(process_setup, "deny_tracing", lambda: True)
    monkeypatch.setattr(process_setup, "deny_core_dumps", lambda: None)
    environ = {"SSLKEYLOGFILE": "/tmp/keys", "PATH": "/bin"}
    assert list(harden(environ)) == ["server.key_log_ignored"]
    assert environ == {"PATH": "/bin"}
    assert not harden(environ)


def test_core_limit_is_lowered_and_never_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[Any] = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (5, 9))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, pair: limits.append((kind, pair)))
    process_setup.deny_core_dumps()
    assert limits == [(resource.RLIMIT_CORE, (0, 9))]


@pytest.mark.parametrize(("uid", "events"), [(0, ["server.runs_as_root"]), (1000, [])])
def test_running_as_root_is_a_risk(monkeypatch: pytest.MonkeyPatch, uid: int, events: list[str]) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    monkeypatch.setattr(process_setup, "deny_tracing", lambda: True)
    monkeypatch.setattr(process_setup, "deny_core_dumps", lambda: None)
    assert list(harden({})) == events


def test_missing_prctl_is_a_risk(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoLibrary:
        def __init__(self, *args: Any, **options: Any) -> None:
            pass

    monkeypatch.setattr(ctypes, "CDLL", NoLibrary)
    assert not deny_tracing()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not deny_tracing()
    monkeypatch.setattr(process_setup, "deny_core_dumps", lambda: None)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert list(harden({})) == ["server.traceable"]
