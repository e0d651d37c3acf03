"""All checks, in the order in which they fail fastest: `python -m tests`.

    --quick           the tests alone: no style, no types, no coverage
    --another-python  as --quick, and without what a run on one version has shown for all
    --all             the slow ones, too: whole measurements in small
    --fix             let ruff mend what it can first

Further arguments go to pytest.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).parent.parent
COVERED = ("wire", "connection", "http", "tls", "sessions", "auth", "certs")
"""Rooms of which every line and every branch is run by a test."""


SECRETS = 10_000
"""Tokens, keys and the like that the tests make at least; none of them may show up (tests/secrets_watch.py)."""

SHOWN_FOR_ALL = (
    *("bench", "costs", "interop", "spec", "http/test_browser.py", "http/test_prometheus.py"),
    *("stores/test_kill.py", "test_layers.py", "test_secrets_watch.py"),
)
"""Tests of other programs, of documents and of measurements, which no version of Python makes different."""

APART = ("alerts", "bench", "cli", "client", "config", "conformance", "control", "interop", "observe", "spec")
"""Tests that those rooms are covered without. They run beside the others: both wait for other programs for much of
their time."""

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
    apart = [f"tests/{each}" for each in APART if not (another and each in SHOWN_FOR_ALL)]
    skipped = [f"--ignore=tests/{each}" for each in (*APART, *(SHOWN_FOR_ALL if another else ()))]
    strict: list[str] = []
    if not another:
        strict.append(f"--secrets-at-least={SECRETS}")
    if not quick:
        strict += [f"--cov=zcproto.{room}" for room in COVERED]
        strict += ["--cov-branch", "--cov-report=term-missing:skip-covered", "--cov-fail-under=100"]
    with ThreadPoolExecutor(1) as beside, tempfile.TemporaryFile("w+") as said:
        others = beside.submit(run, "pytest", *chosen, *apart, output=said)
        passed = run("pytest", *chosen, *strict, *skipped)
        passed = others.result() and passed
        said.seek(0)
        print("-- what the tests beside these said:", said.read(), sep="\n", flush=True)
    return 0 if passed else 1


def run(module: str, *arguments: str, output: TextIO | None = None) -> bool:
    """Run a tool of this environment; tell what it is and how long it took."""
    print(f"-- {module} {' '.join(arguments)}", flush=True)
    began = time.monotonic()
    try:
        code = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
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
