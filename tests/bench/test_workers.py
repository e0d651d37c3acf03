"""Scenarios of several workers: small runs, and broken promises are detected."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import main
from bench.scenarios import worker_kills, workers
from bench.scenarios.kills import Seen
from bench.stage import Stage, family, private_bytes

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def run(words: list[str], file: Path) -> tuple[int, dict[str, dict[str, dict[str, Any]]]]:
    code = main(["scenario", *words, "--json", str(file)])
    figures: dict[str, dict[str, dict[str, Any]]] = json.loads(file.read_text())["figures"]
    return code, figures


@pytest.mark.timeout(120)
def test_limit_of_sessions_holds_over_all_workers(tmp_path: Path) -> None:
    code, figures = run(["workers", "--only", "limit", "--size", "40"], tmp_path / "limit.json")
    assert (code, figures["limit"]["sessions"]["value"]) == (0, 5)


@pytest.mark.timeout(180)
@pytest.mark.slow
def test_small_loads_are_measured(tmp_path: Path) -> None:
    for part, keys in (("balance", {"share", "private_mib"}), ("crowd", {"share", "kib"})):
        _, figures = run(["workers", "--only", part, "--size", "200"], tmp_path / "part.json")
        assert figures[part]["connections_kept"]["value"] == 200
        assert keys <= figures[part].keys()
        assert all(figures[part][key]["value"] > 0 for key in keys)
    _, figures = run(["workers", "--only", "cpu", "--size", "1"], tmp_path / "part.json")
    assert {key for key, row in figures["cpu"].items() if row["below"]} == {"ratio_1", "ratio_16"}


def test_limit_that_does_not_hold_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "SESSIONS_PER_USER", 4)
    code, figures = run(["workers", "--only", "limit", "--size", "20"], tmp_path / "limit.json")
    assert code == 1
    assert not figures["limit"]["sessions"]["holds"]


@pytest.mark.timeout(240)
@pytest.mark.slow
def test_acknowledged_sessions_survive_the_death_of_each_process(tmp_path: Path) -> None:
    _, figures = run(["worker_kills", "--kills", "8"], tmp_path / "kills.json")
    rows = figures["figure"]
    assert rows["kills"]["value"] == 8
    assert [rows[key]["value"] for key in ("lost", "revived", "reused", "half_done", "left")] == [0] * 5


def test_slow_return_and_left_process_fail(tmp_path: Path) -> None:
    seen = Seen(kills=1, starts_s=[1.0])
    seen.acknowledged.update({"open": 1, "refresh": 1, "close": 1})
    killed = worker_kills.WorkerKills(Stage(tmp_path / "home"), [], 1, seen)
    killed.returns = [returned("worker", 0.2), returned("supervisor", 0.3)]
    killed.gone_s = [0.5]
    assert worker_kills.report(killed, seen, 1).exit_code == 0
    killed.returns.append(returned("worker", 1.5))
    killed.gone_s.append(2.0)
    killed.left = 1
    rows = worker_kills.report(killed, seen, 1).columns["figure"]
    assert [row.key for row in rows if not row.holds] == ["worker_back_s", "gone_s", "left"]


def returned(victim: str, back_s: float) -> worker_kills.Return:
    return worker_kills.Return(victim, 3, 1_000_000_000.0, back_s, 2)


def test_slowest_returns_are_explained_by_the_log() -> None:
    lines = [
        '{"timestamp":"2001-09-09T01:46:39.900Z","level":"info","event":"worker.ready","worker":"2"}',
        '{"timestamp":"2001-09-09T01:46:40.250Z","level":"error","event":"worker.ended","worker":"1",'
        '"reason":"SIGKILL"}',
        '{"timestamp":"2001-09-09T01:46:40.300Z","level":"info","event":"session.opened"}',
        '{"timestamp":"2001-09-09T01:46:40.4',
        '{"timestamp":"2001-09-09T01:46:41.600Z","level":"info","event":"worker.ready","worker":"1"}',
    ]
    logged = worker_kills.telling(lines)
    assert worker_kills.explained(returned("worker", 1.0), logged) == (
        "worker, kill 3: 1.00 s, 2 tries: 0.25 worker.ended 1 SIGKILL"
    )
    assert worker_kills.explained(returned("worker", 0.1), logged).endswith("nothing was logged")


@needs_linux
def test_family_is_a_process_and_its_children_by_age() -> None:
    code = (
        "import subprocess as s; all = [s.Popen(['cat'], stdin=-1) for _ in 'ab'];"
        "print(*(each.pid for each in all), flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdin is not None
        made = [int(pid) for pid in parent.stdout.readline().split()]
        found = family(parent.pid)
        assert found == [parent.pid, *made]
        assert all(worker_kills.is_running(pid) for pid in found)
        parent.stdin.close()
    assert not worker_kills.is_running(parent.pid)
    assert private_bytes(os.getpid()) > 0
