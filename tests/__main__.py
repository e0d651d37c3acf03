"""Run all checks, fastest first: `python -m tests`. `python -m tests --help` lists the options."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple, TextIO

from zcproto.accelerator import VARIABLE

ROOT = Path(__file__).parent.parent
COVERED = ("wire", "connection", "http", "tls", "sessions", "auth", "certs")
"""Rooms whose own tests must cover all lines and branches. Other tests run twice as fast without coverage."""

VERSION_INDEPENDENT = (
    *("adversity", "bench", "bus", "conformance", "costs", "deploy", "docs", "interop", "load", "mutation"),
    *("proofs", "properties", "simulation", "spec", "stores/service", "stores/valkey"),
    *("admin/test_browser.py", "admin/test_prometheus.py", "app/test_typing.py", "certs/test_kill.py"),
    *("certs/test_thousand_days.py", "cli/test_stubs.py", "fuzz/test_search.py", "test_layers.py"),
    *("stores/sqlite/test_kill.py", "test_secrets_watch.py", "workers/test_hub_kill.py"),
)
"""Tests of other programs, documents and faults from outside, measurements, searches for rare orders of events."""


class Group(NamedTuple):
    """Rooms whose tests run in one process."""

    rooms: tuple[str, ...] = ()
    """All that no other group names if empty."""

    environment: Mapping[str, str] = {}
    secrets: int = 0
    """Minimum number of secrets created by the tests, none of which may leak (tests/secrets_watch.py)."""

    is_covered: bool = False


FRAMES = (
    *("wire", "connection", "properties/test_both_ends.py", "properties/test_wire.py"),
    *("properties/test_client_conversation.py", "properties/test_server_conversation.py"),
)
"""Tests of what the accelerator does: they are repeated without it."""

GROUPS = (
    Group(("admin", "alerts", "app", "server"), secrets=1_000),
    Group(("adversity", "runtime"), secrets=1_000),
    Group(("bench", "mutation")),
    Group(("client", "config", "conformance", "observe", "spec")),
    Group(("deploy", "interop", "load", "workers")),
    Group(("docs",)),
    Group(("stores",), secrets=2_500),
    Group(secrets=2_500),
    Group(COVERED, secrets=5_000, is_covered=True),
    Group(FRAMES, {VARIABLE: "off"}),
)
"""They run at the same time: no test depends on how busy the machine is. Many tests wait for other processes, and
other groups use the processors meanwhile."""

HANG_S = 7_200.0
"""A test that goes on for so long ends its process: its own limit (tests/limits.py) needs a main thread that runs
Python code. The stacks of all threads are printed."""


def main(arguments: list[str]) -> int:
    chosen, for_pytest = parse(arguments)
    is_quick = chosen.quick or chosen.another_python
    if chosen.fix:
        run("ruff", "check", "--fix", "-q", ".")
        run("ruff", "format", "-q", ".")
    if not is_quick and not all(
        (run("ruff", "check", "."), run("ruff", "format", "--check", "."), run("mypy"))
    ):
        return 1
    options = ["-o", f"faulthandler_timeout={HANG_S}", "-o", "faulthandler_exit_on_timeout=true"]
    if not chosen.all:
        options += ["-m", "not slow"]
    if for_pytest:
        return 0 if run("pytest", *options, *for_pytest) else 1
    passed = run_groups(options, is_quick=is_quick, is_another_python=chosen.another_python)
    return 0 if passed else 1


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the options and the arguments for pytest."""
    parser = argparse.ArgumentParser(
        "python -m tests",
        usage="%(prog)s [OPTION]... [PYTEST_ARGUMENT]...",
        description="Check style and types, then run all tests and check their coverage.",
        epilog="Other arguments, such as `-x tests/wire`, are passed to one run of pytest, without coverage.",
        allow_abbrev=False,
    )
    for option, meaning in (
        ("--quick", "only the tests: no style, types or coverage"),
        (
            "--another-python",
            "like --quick, without tests whose result does not depend on the version of Python",
        ),
        ("--all", "also the slow tests: long builds, searches and measurements"),
        ("--fix", "apply ruff's automatic fixes first"),
    ):
        parser.add_argument(option, action="store_true", help=meaning)
    return parser.parse_known_args(arguments)


def run_groups(options: list[str], *, is_quick: bool, is_another_python: bool) -> bool:
    """Run all groups, then check the coverage. Return True if everything passed."""
    coverage = [] if is_quick else [f"--cov=zcproto.{room}" for room in COVERED]
    coverage += ["--cov-branch", "--cov-report="] if coverage else []
    with ThreadPoolExecutor(len(GROUPS)) as pool, tempfile.TemporaryDirectory() as folder:

        def test(group: Group, number: int) -> tuple[bool, Path]:
            report = Path(folder) / f"report.{number}"
            arguments = [*options, *(coverage if group.is_covered else ())]
            if group.secrets and not is_another_python:
                arguments.append(f"--secrets-at-least={group.secrets}")
            data = {**group.environment, "COVERAGE_FILE": str(Path(folder) / f".coverage.{number}")}
            with open(report, "w", encoding="utf-8") as output:
                arguments += paths(group, is_another_python)
                passed = run("pytest", *arguments, output=output, environment=data)
            return passed, report

        passed = True
        # The accelerator is compared with its Python references on the other Python, too.
        groups = [group for group in GROUPS if not (is_another_python and group.environment)]
        groups = [group for group in groups if paths(group, is_another_python)]  # some only on one Python
        for ended in as_completed([pool.submit(test, group, n) for n, group in enumerate(groups)]):
            is_group_passed, report = ended.result()
            passed = passed and is_group_passed
            print(report.read_text(encoding="utf-8", errors="replace"), flush=True)
        if coverage and passed:
            data = {"COVERAGE_FILE": str(Path(folder) / ".coverage")}
            arguments = ("report", "--show-missing", "--skip-covered", "--fail-under=100")
            passed = run("coverage", "combine", "-q", folder, environment=data) and run(
                "coverage", *arguments, environment=data
            )
    return passed


def paths(group: Group, is_another_python: bool) -> list[str]:
    """Return the paths of a group's tests. Without any, pytest would run all tests."""
    tests = ROOT / "tests"
    found = [
        path for room in group.rooms or "*" for path in sorted(tests.glob(room)) if path.name[0] not in "_."
    ]
    names = [path.relative_to(tests).as_posix() for path in found if path.is_dir() or path.match("test_*.py")]
    if not group.rooms:
        named = {room for each in GROUPS for room in each.rooms}
        names = [name for name in names if name not in named]
    if not is_another_python:
        return [f"tests/{name}" for name in names]
    chosen = [f"tests/{name}" for name in names if name not in VERSION_INDEPENDENT]
    ignored = [f"--ignore=tests/{name}" for name in VERSION_INDEPENDENT if name not in names]
    return chosen and ignored + chosen


def run(
    module: str,
    *arguments: str,
    output: TextIO | None = None,
    environment: Mapping[str, str] | None = None,
) -> bool:
    """Run a tool of this environment and print its duration. Return True if it passed."""
    print(f"-- {module} {' '.join(arguments)}", flush=True)
    began = time.monotonic()
    code = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        check=False,
        stdout=output,
        stderr=None if output is None else subprocess.STDOUT,
    ).returncode
    result = "passed" if code == 0 else "FAILED"
    print(f"-- {module}: {result} in {time.monotonic() - began:.1f} s", flush=True)
    return code == 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
