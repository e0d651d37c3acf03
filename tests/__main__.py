"""All checks, in the order in which they fail fastest: `python -m tests`.

    --quick           the tests alone: no style, no types, no coverage
    --another-python  as --quick, and without what a run on one version has shown for all
    --all             the slow ones, too: whole measurements in small
    --fix             let ruff mend what it can first

Further arguments go to pytest.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple, TextIO

ROOT = Path(__file__).parent.parent
COVERED = ("wire", "connection", "http", "tls", "sessions", "auth", "certs")
"""Rooms of which every line and every branch is run by a test."""


SHOWN_FOR_ALL = (
    *(
        "bench",
        "load",
        "costs",
        "deploy",
        "docs",
        "fuzz/test_search.py",
        "interop",
        "spec",
        "admin/test_browser.py",
    ),
    *("admin/test_prometheus.py", "stores/test_kill.py", "test_layers.py", "test_secrets_watch.py"),
)
"""Tests of other programs, documents and measurements, and a search, which no version of Python makes different."""


class Group(NamedTuple):
    """Rooms whose tests run in one process."""

    rooms: tuple[str, ...]
    secrets: int = 0
    """Tokens, keys and the like that they make at least; none of them may show up (tests/secrets_watch.py)."""

    covers: bool = True


GROUPS = (
    Group(("adversity", "admin", "app", "http", "runtime", "server"), secrets=5_000),
    Group(
        (
            *("auth", "certs", "cli", "common", "connection", "costs", "fuzz", "properties", "sessions"),
            *("stores", "tls", "wire", "*.py"),
        ),
        secrets=5_000,
    ),
    Group(
        (
            "alerts",
            "bench",
            "client",
            "config",
            "conformance",
            "deploy",
            "docs",
            "interop",
            "load",
            "observe",
            "spec",
        ),
        covers=False,
    ),
)
"""They run at the same time, as they wait for timeouts and other programs for most of theirs."""

LIMIT = 840
"""Seconds for one tool: one that hangs must fail."""


OPTIONS = ("--quick", "--another-python", "--all", "--fix")


def main(arguments: list[str]) -> int:
    another = "--another-python" in arguments
    quick = another or "--quick" in arguments
    if "--fix" in arguments:
        run("ruff", "check", "--fix", "-q", ".")
        run("ruff", "format", "-q", ".")
    chosen = [] if "--all" in arguments else ["-m", "not slow"]
    for_pytest = [argument for argument in arguments if argument not in OPTIONS]
    if not quick and not all((run("ruff", "check", "."), run("ruff", "format", "--check", "."), run("mypy"))):
        return 1
    if for_pytest:
        return 0 if run("pytest", *for_pytest) else 1
    covered = (
        [] if quick else [*(f"--cov=zcproto.{room}" for room in COVERED), "--cov-branch", "--cov-report="]
    )
    with ThreadPoolExecutor(len(GROUPS)) as beside, tempfile.TemporaryDirectory() as folder:

        def test(group: Group, number: int) -> tuple[bool, Path]:
            said = Path(folder) / f"said.{number}"
            options = [*chosen, *(covered if group.covers else ())]
            if group.secrets and not another:
                options.append(f"--secrets-at-least={group.secrets}")
            data = {"COVERAGE_FILE": str(Path(folder) / f".coverage.{number}")}
            with open(said, "w", encoding="utf-8") as output:
                return run("pytest", *options, *paths(group, another), output=output, environment=data), said

        passed = True
        for ended in as_completed([beside.submit(test, group, n) for n, group in enumerate(GROUPS)]):
            good, said = ended.result()
            passed = passed and good
            print(said.read_text(encoding="utf-8", errors="replace"), flush=True)
        if covered and passed:
            data = {"COVERAGE_FILE": str(Path(folder) / ".coverage")}
            report = ("report", "--show-missing", "--skip-covered", "--fail-under=100")
            passed = run("coverage", "combine", "-q", folder, environment=data) and run(
                "coverage", *report, environment=data
            )
    return 0 if passed else 1


def paths(group: Group, another: bool) -> list[str]:
    """Where the tests of a group are."""
    tests = ROOT / "tests"
    found = [path for room in group.rooms for path in sorted(tests.glob(room)) if path.name[:2] != "__"]
    names = [path.relative_to(tests).as_posix() for path in found if path.is_dir() or path.match("test_*.py")]
    if not another:
        return [f"tests/{name}" for name in names]
    without = [f"--ignore=tests/{name}" for name in SHOWN_FOR_ALL if name not in names]
    return without + [f"tests/{name}" for name in names if name not in SHOWN_FOR_ALL]


def run(
    module: str,
    *arguments: str,
    output: TextIO | None = None,
    environment: Mapping[str, str] | None = None,
) -> bool:
    """Run a tool of this environment; tell what it is and how long it took."""
    print(f"-- {module} {' '.join(arguments)}", flush=True)
    began = time.monotonic()
    try:
        code = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            check=False,
            timeout=LIMIT,
            stdout=output,
            stderr=None if output is None else subprocess.STDOUT,
        ).returncode
    except subprocess.TimeoutExpired:
        print(f"-- {module}: did not end within {LIMIT} s", flush=True)
        return False
    print(
        f"-- {module}: {'passed' if code == 0 else 'FAILED'} in {time.monotonic() - began:.1f} s", flush=True
    )
    return code == 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
