"""Run all checks, fastest first: `python -m tests`. `python -m tests --help` lists the options."""

from __future__ import annotations

import argparse
import hashlib
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
    *("bench", "costs", "deploy", "docs", "interop", "load", "mutation", "properties", "spec"),
    *("admin/test_browser.py", "admin/test_prometheus.py", "app/test_typing.py", "certs/test_kill.py"),
    *("certs/test_thousand_days.py", "conformance/test_faults.py", "fuzz/test_search.py"),
    *("stores/sqlite/test_kill.py", "stores/test_hub_kill.py", "test_layers.py", "test_secrets_watch.py"),
)
"""Tests of other programs and documents, measurements, and searches for rare orders of events."""


class Group(NamedTuple):
    """Rooms whose tests run in one process."""

    rooms: tuple[str, ...] = ()
    """All that no other group names if empty."""

    environment: Mapping[str, str] = {}
    secrets: int = 0
    """Minimum number of secrets created by the tests, none of which may leak (tests/secrets_watch.py)."""

    is_covered: bool = False


FRAMES = (
    *("wire", "connection", "fuzz/test_fuzz.py", "properties/test_both_ends.py"),
    *("properties/test_client_conversation.py", "properties/test_server_conversation.py"),
    *("properties/test_wire.py", "app/test_app.py"),
)
"""Tests of what the accelerator does: they are repeated without it."""

GROUPS = (
    Group(("admin", "alerts", "app", "server"), secrets=1_000),
    Group(("adversity", "runtime"), secrets=1_000),
    Group(("bench", "client", "config", "conformance", "deploy", "load", "mutation", "observe", "spec")),
    Group(secrets=5_000),
    Group(COVERED, secrets=5_000, is_covered=True),
    Group(("docs", "interop")),
    Group(FRAMES, {VARIABLE: "off"}),
)
"""The longest first."""

CONCURRENT = 4
"""Groups that run at the same time, because they mostly wait for timeouts and other programs."""

TOOL_TIMEOUT_S = 840.0
"""Timeout of one tool on an idle machine, to detect a hang."""

TEST_TIMEOUT_S = 180.0
"""Timeout of one test on an idle machine. Usual tests take less than ten seconds."""

HANG_S = 900.0
"""A test that goes on for so long, because a loop swallowed its timeout or a lock is held, ends its process. The
stacks of all threads are printed."""

REFERENCE_S = 0.04
"""Time of `calibrate`'s work on the reference machine (two cores) when it is idle."""

MAX_SLOWDOWN = 5.0


def main(arguments: list[str]) -> int:
    chosen, for_pytest = parse(arguments)
    is_quick = chosen.quick or chosen.another_python
    slowdown = calibrate()
    print(f"-- timeouts are multiplied by {slowdown:.1f} for this machine and its load", flush=True)
    if chosen.fix:
        run("ruff", "check", "--fix", "-q", ".")
        run("ruff", "format", "-q", ".")
    if not is_quick and not all(
        (run("ruff", "check", "."), run("ruff", "format", "--check", "."), run("mypy", slowdown=slowdown))
    ):
        return 1
    options = ["-o", f"timeout={TEST_TIMEOUT_S * slowdown:.0f}"]
    if not chosen.all:
        options += ["-m", "not slow", "-o", f"faulthandler_timeout={HANG_S}"]
        options += ["-o", "faulthandler_exit_on_timeout=true"]
    if for_pytest:
        return 0 if run("pytest", *options, *for_pytest, slowdown=slowdown) else 1
    passed = run_groups(options, slowdown, is_quick=is_quick, is_another_python=chosen.another_python)
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
        ("--all", "also the slow tests: whole measurements at a small size"),
        ("--fix", "apply ruff's automatic fixes first"),
    ):
        parser.add_argument(option, action="store_true", help=meaning)
    return parser.parse_known_args(arguments)


def calibrate() -> float:
    """Return how much slower this machine is now than the idle reference machine, from 1 to MAX_SLOWDOWN."""
    began = time.perf_counter()
    for _ in range(5):
        digest = b""
        for number in range(60_000):
            digest = hashlib.sha256(digest + b"%d" % number).digest()
    measured = (time.perf_counter() - began) / (5 * REFERENCE_S)
    waiting = os.getloadavg()[0] / (os.cpu_count() or 1)
    return min(MAX_SLOWDOWN, max(1.0, measured, 1.0 + waiting))


def run_groups(options: list[str], slowdown: float, *, is_quick: bool, is_another_python: bool) -> bool:
    """Run all groups, then check the coverage. Return True if everything passed."""
    coverage = [] if is_quick else [f"--cov=zcproto.{room}" for room in COVERED]
    coverage += ["--cov-branch", "--cov-report="] if coverage else []
    with ThreadPoolExecutor(CONCURRENT) as pool, tempfile.TemporaryDirectory() as folder:

        def test(group: Group, number: int) -> tuple[bool, Path]:
            report = Path(folder) / f"report.{number}"
            arguments = [*options, *(coverage if group.is_covered else ())]
            if group.secrets and not is_another_python:
                arguments.append(f"--secrets-at-least={group.secrets}")
            data = {**group.environment, "COVERAGE_FILE": str(Path(folder) / f".coverage.{number}")}
            with open(report, "w", encoding="utf-8") as output:
                arguments += paths(group, is_another_python)
                passed = run("pytest", *arguments, output=output, environment=data, slowdown=slowdown)
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
    slowdown: float = 1.0,
) -> bool:
    """Run a tool of this environment and print its duration. Return True if it passed."""
    print(f"-- {module} {' '.join(arguments)}", flush=True)
    timeout = TOOL_TIMEOUT_S * slowdown
    began = time.monotonic()
    try:
        code = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            check=False,
            timeout=timeout,
            stdout=output,
            stderr=None if output is None else subprocess.STDOUT,
        ).returncode
    except subprocess.TimeoutExpired:
        print(f"-- {module}: did not end within {timeout:.0f} s", flush=True)
        return False
    result = "passed" if code == 0 else "FAILED"
    print(f"-- {module}: {result} in {time.monotonic() - began:.1f} s", flush=True)
    return code == 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
